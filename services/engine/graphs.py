"""Decode steps as CUDA graphs, one for each of some batch sizes: the host launches one thing instead of hundreds.

A step takes the smallest graph that holds it. The rows left over have length 0 and no slot: they compute on numbers
that nobody reads, and store nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.engine.device_tables import DeviceTables
from services.engine.fused import FusedModel
from services.engine.kernels.draw_tokens import Draws, draw_tokens
from services.engine.staging import Staging, fill, num_bytes
from services.engine.step import Step, StepArrays

# Up to here a step's time hardly grows with its rows; beyond, rows left over would cost as much as others.
_FIRST_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
_FURTHER_STEP = 64


def graph_sizes(max_rows: int) -> list[int]:
    """The batch sizes that get a graph, rising; the last holds max_rows."""
    sizes = [*_FIRST_SIZES, *range(_FIRST_SIZES[-1] + _FURTHER_STEP, max_rows + _FURTHER_STEP, _FURTHER_STEP)]
    return [size for size in sizes if size < max_rows] + [max_rows]


# Whether rows with a top-k, a top-p are among them: each kind of sampling is a graph of its own.
_KINDS = ((False, False), (False, True), (True, True))


def captured(function: Callable[[], None], pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A function as a graph: what it writes, every replay writes anew. It is run once before."""
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        function()  # compiles kernels, and makes the libraries' workspaces
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, pool=pool, stream=stream):
        function()
    return graph


class DecodeGraphs:
    """Captured steps of one model, and the sampling after them. All share inputs, outputs and the memory in between."""

    def __init__(
        self,
        model: FusedModel,
        tables: DeviceTables,
        sampled_ids: Tensor,
        vocab_size: int,
        max_rows: int,
        dtype: torch.dtype,
        pool: Any,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """pool: of graphs that never run at the same time. progress: called with (sizes captured, sizes in all)."""
        self._model = model
        self._tables = tables
        self._sampled_ids = sampled_ids
        self._sizes = graph_sizes(max_rows)
        device = tables.tensor.device
        self._vocab_size = vocab_size
        whole = num_bytes(_padding(max_rows).inputs() | self._no_draws(max_rows))
        self._inputs = torch.zeros(whole, dtype=torch.uint8, device=device)
        self._logits = torch.empty(max_rows, vocab_size, dtype=dtype, device=device)
        self._steps: dict[int, torch.cuda.CUDAGraph] = {}
        self._samplers: dict[tuple[int, bool, bool], torch.cuda.CUDAGraph] = {}
        stream = torch.cuda.Stream(device)
        for done, size in enumerate(reversed(self._sizes), start=1):  # the largest first: others fit into its memory
            self._capture(size, pool, stream)
            if progress is not None:
                progress(done, len(self._sizes))

    @property
    def num_sizes(self) -> int:
        return len(self._sizes)

    def run(self, arrays: StepArrays, staging: Staging, draws: dict[str, np.ndarray] | None = None) -> Tensor:
        """Logits [B, V] of a step; valid until the next one. draws: by the names of `Draws`, tokens are sampled too."""
        num_rows = len(arrays.token_ids)
        size = next(size for size in self._sizes if size >= num_rows)
        if len(arrays.places):
            sent = staging.send(arrays.updates())
            self._tables.write(sent["places"], sent["ids"])
        inputs = arrays.padded(size, size).inputs()
        if draws is not None:
            none = self._no_draws(size - num_rows)
            inputs |= {name: np.concatenate((draws[name], padding)) for name, padding in none.items()}
        staging.send(inputs, into=self._inputs)
        self._steps[size].replay()
        if draws is not None:
            cuts_k, cuts_p = cuts(draws, self._vocab_size)
            self._samplers[size, cuts_k, cuts_p or cuts_k].replay()
        return self._logits[:num_rows]

    def _capture(self, size: int, pool: Any, stream: torch.cuda.Stream) -> None:
        inputs = fill(_padding(size).inputs() | self._no_draws(size), self._inputs)
        draws = Draws(*(inputs[name] for name in ("temperature", "floor", "top_k", "top_p", "keys")))

        def sample(cuts_k: bool, cuts_p: bool) -> None:
            draw_tokens(self._logits[:size], draws, self._sampled_ids[:size], cuts_k=cuts_k, cuts_p=cuts_p)

        self._steps[size] = captured(partial(self._step, inputs), pool, stream)
        for kind in _KINDS:
            self._samplers[size, *kind] = captured(partial(sample, *kind), pool, stream)

    def _step(self, inputs: dict[str, Tensor]) -> None:
        tables = self._tables.tensor.index_select(0, inputs["table_rows"])
        step = Step(
            inputs["token_ids"], inputs["positions"], inputs["slots"], inputs["context_lens"], tables, None, None, None
        )
        self._model(step, self._sampled_ids, out=self._logits[: len(inputs["token_ids"])])

    def _no_draws(self, num_rows: int) -> dict[str, np.ndarray]:
        """Of rows that take the best token."""
        return {
            "keys": np.zeros(num_rows, np.int64),
            "temperature": np.zeros(num_rows, np.float32),
            "floor": np.zeros(num_rows, np.float32),
            "top_p": np.ones(num_rows, np.float32),
            "top_k": np.full(num_rows, self._vocab_size, np.int32),
        }


def cuts(draws: dict[str, np.ndarray], vocab_size: int) -> tuple[bool, bool]:
    """Whether some row has a top-k, a top-p."""
    return bool((draws["top_k"] < vocab_size).any()), bool((draws["top_p"] < 1.0).any())


def _padding(num_rows: int) -> StepArrays:
    none = np.zeros(0, np.int32)
    return StepArrays(none, none, none, none, none, np.zeros(0, np.int64), none).padded(num_rows, num_rows)
