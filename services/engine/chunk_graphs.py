"""Steps with chunks of prompts, as CUDA graphs: the host, which would launch a thousand kernels, is not in the way.

As with decode steps there are graphs for some numbers of tokens, and tokens left over store nothing. How many keys
there are, and how attention is shared out, the kernels read on the device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from services.engine.device_tables import DeviceTables
from services.engine.fused import FusedModel
from services.engine.graphs import captured
from services.engine.kernels.mla_prefill import PrefillWork, queries_a_tile
from services.engine.mixed_step import MAX_ROWS, AttentionCut, MixedArrays
from services.engine.staging import Staging, fill, num_bytes
from services.engine.step import LongChunks, Step, StepArrays

_SIZES = (32, 64, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
# What a graph has room for; a step with more is launched one by one.
_MAX_KEYS = 32_768
_MORE_TILES = 32  # besides those that one chunk of all tokens has
# Up to here the keys of a tile may be split; more tokens keep the card busy as they are.
_FEW_TOKENS = 512


@dataclass(frozen=True, slots=True)
class _Shape:
    """What a graph is made for. Steps without rows need not look for them."""

    num_tokens: int
    num_rows: int


class ChunkGraphs:
    """Captured steps of one model. They share inputs, outputs and the memory in between."""

    def __init__(
        self,
        model: FusedModel,
        tables: DeviceTables,
        sampled_ids: Tensor,
        cut: AttentionCut,
        hidden_size: int,
        max_tokens: int,
        pool: Any,
    ) -> None:
        """pool: of graphs that never run at the same time."""
        self._model = model
        self._tables = tables
        self._sampled_ids = sampled_ids
        self._cut = cut
        self._sizes = [size for size in _SIZES if size <= max_tokens]
        self._graphs: dict[_Shape, torch.cuda.CUDAGraph] = {}
        device = tables.tensor.device
        longest = max(self._sizes, default=0)
        self._outputs = torch.empty(2, longest, hidden_size, dtype=cut.dtype, device=device)  # see FusedModel.hidden
        shapes = [_Shape(size, rows) for size in reversed(self._sizes) for rows in (min(size, MAX_ROWS), 0)]
        most = max((num_bytes(self._no_inputs(shape)) for shape in shapes), default=0)
        self._inputs = torch.zeros(most, dtype=torch.uint8, device=device)
        stream = torch.cuda.Stream(device)
        for shape in shapes:  # the largest first: others fit into its memory
            self._capture(shape, pool, stream)

    def takes(self, arrays: MixedArrays) -> bool:
        """Whether there is a graph for a step."""
        shape = self._shape_of(arrays)
        if shape is None or len(arrays.rows.context_lens) > shape.num_rows:
            return False
        long = arrays.long
        return long is None or (long.cu_k[-1] <= _MAX_KEYS and len(long.tiles) <= self._max_tiles(shape))

    def run(self, arrays: MixedArrays, staging: Staging, logits_rows: Tensor) -> Tensor:
        """Logits of a step's rows, as FusedModel. The block tables have been written, and keys are read from blocks."""
        shape = self._shape_of(arrays)
        assert shape is not None
        inputs = self._no_inputs(shape) | arrays.rows.padded(shape.num_tokens, shape.num_rows).inputs()
        del inputs["key_slots"]
        if arrays.long is not None:
            assert arrays.long.key_slots is not None
            inputs["counts"] = arrays.long.counts
            inputs["tiles"][: len(arrays.long.tiles)] = arrays.long.tiles
            inputs["key_slots"] = arrays.long.key_slots  # the last: what follows need not be sent
        staging.send(inputs, into=self._inputs)
        self._graphs[shape].replay()
        h, delta = self._outputs
        return self._model.logits(h, delta, logits_rows)

    def _shape_of(self, arrays: MixedArrays) -> _Shape | None:
        """The smallest one that holds the tokens."""
        num_tokens = len(arrays.rows.token_ids)
        size = next((size for size in self._sizes if size >= num_tokens), None)
        return None if size is None else _Shape(size, min(size, MAX_ROWS) if len(arrays.rows.context_lens) else 0)

    def _max_tiles(self, shape: _Shape) -> int:
        return -(-shape.num_tokens // queries_a_tile(self._cut.dtype)) + _MORE_TILES

    def _no_inputs(self, shape: _Shape) -> dict[str, np.ndarray]:
        """Of a step in which nothing is stored and nobody attends."""
        none = np.zeros(0, np.int32)
        nobody = StepArrays(none, none, none, none, none, none, none).padded(shape.num_tokens, shape.num_rows)
        return nobody.inputs() | {
            "tiles": np.zeros((self._max_tiles(shape), 4), np.int32),
            "counts": np.array([0, 0, 1, 1, 0, 0], np.int32),
            "key_slots": np.zeros(_MAX_KEYS, np.int32),
        }

    def _capture(self, shape: _Shape, pool: Any, stream: torch.cuda.Stream) -> None:
        inputs = fill(self._no_inputs(shape), self._inputs)
        may_split = shape.num_tokens <= _FEW_TOKENS
        self._graphs[shape] = captured(lambda: self._step(inputs, may_split=may_split), pool, stream)

    def _step(self, inputs: dict[str, Tensor], *, may_split: bool) -> None:
        work = PrefillWork(inputs["tiles"], inputs["counts"], may_split)
        step = Step(
            inputs["token_ids"],
            inputs["positions"],
            inputs["slots"],
            inputs["context_lens"],
            self._tables.tensor.index_select(0, inputs["table_rows"]),
            None,
            LongChunks([], [], inputs["key_slots"], inputs["counts"][:1], work),
            None,
        )
        for output, numbers in zip(self._outputs, self._model.hidden(step, self._sampled_ids), strict=True):
            output[: len(numbers)].copy_(numbers)
