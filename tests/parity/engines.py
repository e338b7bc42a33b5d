"""Engines under test, with a tap on the logits that they compute."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from services.common.sampling import SamplingParams
from services.common.settings import EngineSettings, ModelSettings
from services.engine.batch import wants_all_logits
from services.engine.engine import Engine, EngineRequest
from services.engine.loading import load_engine
from services.engine.scheduler import Chunk

WHOLE_LOGITS = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
GREEDY_32 = SamplingParams(temperature=0.0, max_tokens=32, ignore_eos=True)


class Tap:
    """Stands between an engine and its runner and keeps what passes: logits by (request id, position), chunk sizes."""

    def __init__(self, engine: Engine) -> None:
        self._runner = engine._runner
        self.rows: dict[str, dict[int, Tensor]] = {}
        self.chunk_sizes: list[int] = []
        engine._runner = self

    def run(self, chunks: Sequence[Chunk]) -> Tensor:
        logits = self._runner.run(chunks)
        row = 0
        for chunk in chunks:
            self.chunk_sizes.append(chunk.num_tokens)
            end = chunk.start + chunk.num_tokens
            width = chunk.num_tokens if wants_all_logits(chunk) else int(chunk.samples)
            held = self.rows.setdefault(chunk.seq.seq_id, {})
            for position, values in zip(range(end - width, end), logits[row : row + width], strict=True):
                held[position] = values.float().clone()
            row += width
        return logits

    def logits(self, request_id: str) -> Tensor:
        """[T, vocab] of the rows seen, in order of position."""
        held = self.rows[request_id]
        return torch.stack([held[position] for position in sorted(held)])


def engine_of(
    folder: Path | str,
    *,
    dtype: str = "float32",
    cache_mode: str = "absorb",
    kv_dtype: str = "auto",
    chunk: int | None = None,
    max_seq_len: int | None = 512,
    **settings: object,
) -> Engine:
    """An engine on the CPU. chunk: most tokens of a prompt computed in a step, one sequence at a time."""
    if chunk is not None:
        settings |= {"max_num_batched_tokens": chunk, "max_num_sequences": 1}
    if "num_blocks" not in settings:
        settings["num_blocks"] = 128
    return load_engine(
        ModelSettings(path=str(folder), dtype=dtype, cache_mode=cache_mode, kv_dtype=kv_dtype, max_seq_len=max_seq_len),
        EngineSettings(device="cpu", **settings),
    )


def run(engine: Engine, prompts: Sequence[Sequence[int]], sampling: SamplingParams) -> list[list[int]]:
    """The replies to prompts that all arrive at once, under the request ids 0, 1, …; nothing may leak."""
    replies: dict[str, list[int]] = {str(i): [] for i in range(len(prompts))}
    for i, prompt in enumerate(prompts):
        engine.add(EngineRequest(str(i), prompt, sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            replies[output.request_id] += output.token_ids
        engine.check_integrity()
    assert engine.pool.num_free_blocks == engine.pool.num_blocks
    return list(replies.values())


def logits_of(engine: Engine, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits [T, vocab] of every position of prompts that all arrive at once."""
    tap = Tap(engine)
    run(engine, prompts, WHOLE_LOGITS)
    engine._runner = tap._runner
    return [tap.logits(str(i)) for i in range(len(prompts))]
