"""Steps under way on a GPU: the host makes the next one ready while one is computed.

A step's sampled tokens stay on the device, where the next step takes them from; the host reads them one step later.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from collections.abc import Sequence as ListLike
from dataclasses import dataclass
from typing import Protocol

from services.common.sampling import SamplingParams
from services.engine.batch import wants_all_logits
from services.engine.fused_runner import FusedRunner, HostIds
from services.engine.sampler import SamplingRow, draw_arrays
from services.engine.scheduler import Chunk, Scheduler
from services.engine.sequence import Sequence


class Seeded(Protocol):
    """What is known of a request besides its sequence."""

    @property
    def seed(self) -> int: ...


@dataclass(frozen=True, slots=True)
class _Flight:
    """A launched step. sampled: its sequences whose next token it samples, in the order of `ids`."""

    chunks: list[Chunk]
    sampled: list[Sequence]
    ids: HostIds
    launched_s: float


class Flights:
    """At most two steps under way: one that is waited for next, and one ahead of it."""

    def __init__(self, runner: FusedRunner, scheduler: Scheduler) -> None:
        self._runner = runner
        self._scheduler = scheduler
        self._under_way: list[_Flight] = []
        self._landed_s = 0.0

    @property
    def is_under_way(self) -> bool:
        return bool(self._under_way)

    def takes(self, chunks: ListLike[Chunk]) -> bool:
        """Whether all tokens of a scheduled step can be sampled on the device."""
        return all(
            not wants_all_logits(chunk) and (not chunk.samples or sampling_row(chunk.seq, 0).is_drawn_on_device)
            for chunk in chunks
        )

    def launch(self, chunks: list[Chunk], requests: Mapping[str, Seeded]) -> None:
        """Launches a scheduled step. requests: by sequence id."""
        self._launch(chunks, requests, None)

    def launch_ahead(self, requests: Mapping[str, Seeded]) -> None:
        """Launches the step after the one under way, where the scheduler knows it."""
        (flight,) = self._under_way
        chunks = self._scheduler.schedule_ahead(flight.chunks)
        if chunks:
            row_of = {seq: row for row, seq in enumerate(flight.sampled)}
            self._launch(chunks, requests, [row_of[chunk.seq] for chunk in chunks])

    def land(self) -> tuple[list[Chunk], list[tuple[Sequence, int]], float]:
        """Waits for the step launched first: its chunks, its tokens (-1: none), and the seconds that it took."""
        flight = self._under_way.pop(0)
        ids = flight.ids.wait()
        now_s = time.perf_counter()
        elapsed_s = now_s - max(flight.launched_s, self._landed_s)
        self._landed_s = now_s
        return flight.chunks, list(zip(flight.sampled, ids, strict=True)), elapsed_s

    def forget(self) -> None:
        """After a failure: what is under way was for nothing, and will be computed again."""
        self._under_way.clear()

    def _launch(self, chunks: list[Chunk], requests: Mapping[str, Seeded], sampled_rows: ListLike[int] | None) -> None:
        launched_s = time.perf_counter()
        sampled = [chunk.seq for chunk in chunks if chunk.samples]
        num_ahead = int(sampled_rows is not None)
        rows = [
            SamplingRow(seq.sampling, (), (), seq.num_generated_tokens + num_ahead, requests[seq.seq_id].seed)
            for seq in sampled
        ]
        ids = self._runner.launch(chunks, draw_arrays(rows, self._runner.vocab_size), sampled_rows)
        self._under_way.append(_Flight(chunks, sampled, ids, launched_s))


def sampling_row(seq: Sequence, seed: int) -> SamplingRow:
    """How the next token of a sequence is sampled."""
    if not _needs_history(seq.sampling):
        return SamplingRow(seq.sampling, (), (), seq.num_generated_tokens, seed)
    prompt = seq.token_ids[: seq.num_prompt_tokens]
    return SamplingRow(seq.sampling, prompt, seq.generated_token_ids, seq.num_generated_tokens, seed)


def _needs_history(params: SamplingParams) -> bool:
    return (params.repetition_penalty, params.presence_penalty, params.frequency_penalty) != (1.0, 0.0, 0.0)
