"""Kernels that begin before the ones in front of them have ended still see all that those have written."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from services.engine.kernels.add_rms_norm import add_rms_norm
from services.engine.kernels.choose_experts import Routing, choose_experts
from services.engine.kernels.linear import linear
from services.engine.kernels.moe_experts import moe_experts
from services.engine.kernels.silu_mul import silu_mul

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODEL, WIDTH, EXPERTS, LAYERS = 2048, 1408, 16, 12
ROUTING = Routing(4, False, 1, 1, False, False, 1.0)


@dataclass(frozen=True)
class _Layer:
    norm: Tensor
    gate_up: Tensor
    down: Tensor
    router: Tensor
    experts_gate_up: Tensor
    experts_down: Tensor

    @classmethod
    def new(cls) -> _Layer:
        def matrix(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").div(float(shape[-1]) ** 0.5).bfloat16()

        return cls(
            torch.rand(MODEL, device="cuda").bfloat16(),
            matrix(2 * WIDTH, MODEL),
            matrix(MODEL, WIDTH),
            torch.randn(EXPERTS, MODEL, device="cuda"),
            matrix(EXPERTS, 2 * WIDTH, MODEL),
            matrix(EXPERTS, MODEL, WIDTH),
        )


@pytest.mark.parametrize("rows", [1, 6])
def test_layers_in_a_graph_give_what_they_give_one_kernel_at_a_time(rows: int) -> None:
    """Every layer computes in memory that the one before has just left, two streams fork and join in each."""
    layers = [_Layer.new() for _ in range(LAYERS)]
    start = torch.empty(rows, MODEL, device="cuda", dtype=torch.bfloat16)
    inputs = [torch.randn(rows, MODEL, device="cuda").bfloat16() for _ in range(3)]
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    expected = []
    for each in inputs:
        start.copy_(each)
        expected.append(_run(start, layers, side, torch.cuda.synchronize))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _run(start, layers, side, lambda: None)
    results = []
    for _ in range(50):
        for each in inputs:
            start.copy_(each)
            graph.replay()
            results.append(out.clone())
    assert bool(expected[0].isfinite().all())
    assert all(torch.equal(result, expected[i % len(inputs)]) for i, result in enumerate(results))


def _run(start: Tensor, layers: list[_Layer], side: torch.cuda.Stream, after_each: Callable[[], None]) -> Tensor:
    h = start.clone()
    delta = None
    for layer in layers:
        x = add_rms_norm(h, delta, layer.norm, 1e-6)
        after_each()
        ids, weights = choose_experts(x, layer.router, None, ROUTING)
        after_each()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            gate_up = linear(x, layer.gate_up)
            after_each()
            activated = silu_mul(gate_up)
            after_each()
            added = linear(activated, layer.down)
            is_added = side.record_event()
        delta = moe_experts(x, layer.experts_gate_up, layer.experts_down, ids, weights, added=added, is_added=is_added)
        after_each()
    return torch.cat((h, delta)) if delta is not None else h
