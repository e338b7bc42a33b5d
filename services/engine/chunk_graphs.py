"""Steps with chunks of prompts, as CUDA graphs where that pays: with few tokens the host would launch too slowly.

Attention depends on how long the sequences are, so it is launched as ever; between two layers' attention everything is
one graph. As with decode steps there are graphs for some numbers of tokens, and tokens left over store nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from services.engine.fused import FusedModel
from services.engine.fused_attention import Projected
from services.engine.graphs import captured
from services.engine.step import Step

_SIZES = (32, 64, 128, 192, 256, 384, 512)


@dataclass(frozen=True, slots=True)
class Widths:
    """Of attention: heads, and numbers of one head's query and value and of a stored latent with its rope key."""

    num_heads: int
    query: int
    value: int
    latent: int


class ChunkGraphs:
    """Captured parts of one model's steps. They share inputs, outputs and the memory in between."""

    def __init__(
        self, model: FusedModel, sampled_ids: Tensor, widths: Widths, max_tokens: int, dtype: torch.dtype, pool: Any
    ) -> None:
        """pool: of graphs that never run at the same time."""
        self._model = model
        self._sampled_ids = sampled_ids
        self._sizes = [size for size in _SIZES if size <= max_tokens]
        device = sampled_ids.device
        self._graphs: dict[int, list[torch.cuda.CUDAGraph]] = {}
        self._results: dict[int, tuple[Tensor, Tensor]] = {}  # the residual stream, and what the last layer adds
        if not self._sizes:
            return
        longest = self._sizes[-1]

        def new(*sizes: int) -> Tensor:
            return torch.zeros(longest, *sizes, dtype=dtype, device=device)

        self._inputs = torch.zeros(3, longest, dtype=torch.int32, device=device)
        heads = widths.num_heads
        self._projected = Projected(new(heads, widths.query), new(widths.latent), new(heads, widths.latent))
        self._attended = new(heads, widths.value)
        stream = torch.cuda.Stream(device)
        for size in reversed(self._sizes):
            self._capture(size, pool, stream)

    @property
    def max_tokens(self) -> int:
        """Longer steps are not for these graphs."""
        return self._sizes[-1] if self._sizes else 0

    def run(self, step: Step) -> Tensor:
        """Logits of a step's rows, as FusedModel."""
        num_tokens = len(step.token_ids)
        size = next(size for size in self._sizes if size >= num_tokens)
        for row, numbers in zip(self._inputs, (step.token_ids, step.positions, step.slots), strict=True):
            row[:num_tokens].copy_(numbers)
        self._inputs[2, num_tokens:size].fill_(-1)
        projected, attended = _first_rows(self._projected, num_tokens), self._attended[:num_tokens]
        first, *others = self._graphs[size]
        first.replay()
        for index, graph in enumerate(others):
            self._model.attend(index, projected, step, attended)
            graph.replay()
        h, delta = self._results[size]
        return self._model.logits(h[:num_tokens], delta[:num_tokens], step.logits_rows)

    def _capture(self, size: int, pool: Any, stream: torch.cuda.Stream) -> None:
        token_ids, positions, slots = self._inputs[:, :size]
        slots.fill_(-1)
        # All tokens as rows: their queries are then in both places where attention looks for them.
        step = Step(token_ids, positions, slots, slots, slots.view(-1, 1), None, None, None)
        projected, attended = _first_rows(self._projected, size), self._attended[:size]
        graph, (h, _) = captured(lambda: self._model.begin(step, self._sampled_ids, projected), pool, stream)
        graphs = [graph]
        last = self._model.num_layers - 1

        def between(index: int) -> Tensor:
            delta = self._model.close(index, h, attended)
            if index < last:
                self._model.open(index + 1, h, delta, step, projected)
            return delta

        for index in range(last + 1):
            graph, delta = captured(lambda i=index: between(i), pool, stream)  # type: ignore[misc]
            graphs.append(graph)
        self._graphs[size] = graphs
        self._results[size] = (h, delta)


def _first_rows(projected: Projected, num_rows: int) -> Projected:
    return Projected(projected.q[:num_rows], projected.latents[:num_rows], projected.absorbed[:num_rows])
