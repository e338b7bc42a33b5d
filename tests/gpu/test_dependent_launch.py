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
from services.engine.kernels.mla_decode import mla_decode_to_values
from services.engine.kernels.mla_store import mla_store
from services.engine.kernels.moe_experts import moe_experts
from services.engine.kernels.silu_mul import silu_mul

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

MODEL, WIDTH, EXPERTS, LAYERS = 2048, 1408, 16, 12
HEADS, NOPE, ROPE, LATENT, VALUE = 16, 128, 64, 512, 128
BLOCK_SIZE, BLOCKS = 64, 5
ROUTING = Routing(4, False, 1, 1, False, False, 1.0)


@dataclass(frozen=True)
class _Inputs:
    """Of a step. The blocks of a sequence are its own, so that a step gives the same whatever ran before it."""

    x: Tensor
    positions: Tensor
    slots: Tensor
    lens: Tensor
    tables: Tensor

    @classmethod
    def new(cls, rows: int, step: int) -> _Inputs:
        tables = (step * rows + torch.arange(rows, dtype=torch.int32))[:, None] * BLOCKS + torch.arange(BLOCKS)
        positions = torch.randint(BLOCKS * BLOCK_SIZE, (rows,), dtype=torch.int32)
        blocks = tables.gather(1, positions[:, None].long() // BLOCK_SIZE).squeeze(1)
        slots = blocks * BLOCK_SIZE + positions % BLOCK_SIZE
        each = (torch.randn(rows, MODEL).bfloat16(), positions, slots.int(), positions + 1, tables.int())
        return cls(*(tensor.cuda() for tensor in each))

    def copy_(self, other: _Inputs) -> None:
        for name in self.__dataclass_fields__:
            getattr(self, name).copy_(getattr(other, name))


@dataclass(frozen=True)
class _Layer:
    norm: Tensor
    projection: Tensor
    latent_norm: Tensor
    kv_b: Tensor
    output: Tensor
    cache: Tensor
    gate_up: Tensor
    down: Tensor
    router: Tensor
    experts_gate_up: Tensor
    experts_down: Tensor

    @classmethod
    def new(cls, num_blocks: int) -> _Layer:
        def matrix(*shape: int) -> Tensor:
            return torch.randn(*shape, device="cuda").div(float(shape[-1]) ** 0.5).bfloat16()

        return cls(
            torch.rand(MODEL, device="cuda").bfloat16(),
            matrix(HEADS * (NOPE + ROPE) + LATENT + ROPE, MODEL),
            torch.rand(LATENT, device="cuda").bfloat16(),
            matrix(HEADS, NOPE + VALUE, LATENT),
            matrix(MODEL, HEADS * VALUE),
            torch.randn(num_blocks, BLOCK_SIZE, LATENT + ROPE, device="cuda").bfloat16(),
            matrix(2 * WIDTH, MODEL),
            matrix(MODEL, WIDTH),
            torch.randn(EXPERTS, MODEL, device="cuda"),
            matrix(EXPERTS, 2 * WIDTH, MODEL),
            matrix(EXPERTS, MODEL, WIDTH),
        )


@pytest.mark.parametrize("rows", [1, 2, 6])
def test_layers_in_a_graph_give_what_they_give_one_kernel_at_a_time(rows: int) -> None:
    """Every layer computes in memory that the one before has just left, two streams fork and join in each."""
    inputs = [_Inputs.new(rows, step) for step in range(3)]
    layers = [_Layer.new(len(inputs) * rows * BLOCKS) for _ in range(LAYERS)]
    start = _Inputs.new(rows, 0)
    angles = torch.rand(BLOCKS * BLOCK_SIZE, ROPE // 2, device="cuda") * 6
    turns = angles.cos(), angles.sin()
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    expected = []
    for each in inputs:
        start.copy_(each)
        expected.append(_run(start, layers, turns, side, torch.cuda.synchronize))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _run(start, layers, turns, side, lambda: None)
    results = []
    for _ in range(50):
        for each in inputs:
            start.copy_(each)
            graph.replay()
            results.append(out.clone())
    assert bool(expected[0].isfinite().all())
    assert all(torch.equal(result, expected[i % len(inputs)]) for i, result in enumerate(results))


def _run(
    inputs: _Inputs,
    layers: list[_Layer],
    turns: tuple[Tensor, Tensor],
    side: torch.cuda.Stream,
    after_each: Callable[[], None],
) -> Tensor:
    h = inputs.x.clone()
    delta = None
    for layer in layers:
        x = add_rms_norm(h, delta, layer.norm, 1e-6)
        after_each()
        delta = linear(_attend(linear(x, layer.projection), inputs, layer, turns, after_each), layer.output)
        after_each()
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


def _attend(
    projected: Tensor, inputs: _Inputs, layer: _Layer, turns: tuple[Tensor, Tensor], after_each: Callable[[], None]
) -> Tensor:
    after_each()
    q = projected[:, : HEADS * (NOPE + ROPE)].unflatten(1, (HEADS, -1))
    latents = projected[:, HEADS * (NOPE + ROPE) :]
    absorbed = q.new_empty(len(q), HEADS, LATENT + ROPE)
    keys, values = layer.kv_b.split((NOPE, VALUE), dim=1)
    mla_store(
        q, latents, layer.latent_norm, 1e-6, inputs.positions, *turns, layer.cache, inputs.slots, keys, absorbed
    )  # fmt: skip
    after_each()
    out = q.new_empty(len(q), HEADS, VALUE)
    mla_decode_to_values(
        absorbed, layer.cache, inputs.tables, inputs.lens, 0.07, values.transpose(1, 2), out
    )  # fmt: skip
    after_each()
    return out.flatten(1)
