"""Decode steps as CUDA graphs, one for each of some batch sizes: the host launches one thing instead of hundreds.

A step takes the smallest graph that holds it. The rows left over have length 0 and no slot: they compute on numbers
that nobody reads, and store nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.engine.device_tables import DeviceTables
from services.engine.fused import FusedModel
from services.engine.staging import Staging, num_bytes, views
from services.engine.step import Step, StepArrays

# Up to here a step's time hardly grows with its rows; beyond, rows left over would cost as much as others.
_FIRST_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 224, 256)
_FURTHER_STEP = 64


def graph_sizes(max_rows: int) -> list[int]:
    """The batch sizes that get a graph, rising; the last holds max_rows."""
    sizes = [*_FIRST_SIZES, *range(_FIRST_SIZES[-1] + _FURTHER_STEP, max_rows + _FURTHER_STEP, _FURTHER_STEP)]
    return [size for size in sizes if size < max_rows] + [max_rows]


class DecodeGraphs:
    """Captured steps of one model. They share inputs, outputs and the memory in between."""

    def __init__(
        self,
        model: FusedModel,
        tables: DeviceTables,
        sampled_ids: Tensor,
        vocab_size: int,
        max_rows: int,
        dtype: torch.dtype,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        """progress: called with (sizes captured, sizes in all)."""
        self._model = model
        self._tables = tables
        self._sampled_ids = sampled_ids
        self._sizes = graph_sizes(max_rows)
        device = tables.tensor.device
        self._inputs = torch.zeros(num_bytes(_padding(max_rows).inputs()), dtype=torch.uint8, device=device)
        self._logits = torch.empty(max_rows, vocab_size, dtype=dtype, device=device)
        self._graphs: dict[int, torch.cuda.CUDAGraph] = {}
        pool = torch.cuda.graph_pool_handle()
        stream = torch.cuda.Stream(device)
        for done, size in enumerate(reversed(self._sizes), start=1):  # the largest first: others fit into its memory
            self._graphs[size] = self._capture(size, pool, stream)
            if progress is not None:
                progress(done, len(self._sizes))

    @property
    def num_sizes(self) -> int:
        return len(self._sizes)

    def run(self, arrays: StepArrays, staging: Staging) -> Tensor:
        """Logits [B, V] of a step; valid until the next one."""
        num_rows = len(arrays.token_ids)
        size = next(size for size in self._sizes if size >= num_rows)
        if len(arrays.places):
            sent = staging.send(arrays.updates())
            self._tables.write(sent["places"], sent["ids"])
        staging.send(arrays.padded(size).inputs(), into=self._inputs)
        self._graphs[size].replay()
        return self._logits[:num_rows]

    def _capture(self, size: int, pool: Any, stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
        arrays = _padding(size).inputs()
        padding = torch.from_numpy(np.concatenate([_bytes(array) for array in arrays.values()]))
        self._inputs[: len(padding)].copy_(padding)
        inputs = views(arrays, self._inputs)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            self._step(inputs)  # compiles kernels, and makes the libraries' workspaces
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            self._step(inputs)
        return graph

    def _step(self, inputs: dict[str, Tensor]) -> None:
        tables = self._tables.tensor.index_select(0, inputs["table_rows"])
        step = Step(
            inputs["token_ids"], inputs["positions"], inputs["slots"], inputs["context_lens"], tables, None, None, None
        )
        self._model(step, self._sampled_ids, out=self._logits[: len(inputs["token_ids"])])


def _padding(num_rows: int) -> StepArrays:
    none = np.zeros(0, np.int32)
    return StepArrays(none, none, none, none, none, np.zeros(0, np.int64), none).padded(num_rows)


def _bytes(array: np.ndarray) -> np.ndarray:
    """As `Staging` lays it out."""
    return np.pad(array.view(np.uint8), (0, -array.nbytes % 16))
