"""The CUDA kernels against their references in float64, on odd shapes and random inputs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from services.engine.kernels.expand_latents import expand_latents, expand_latents_reference
from services.engine.kernels.fp8_linear import fp8_linear, fp8_linear_reference
from services.engine.kernels.mla_decode import (
    mla_decode,
    mla_decode_reference,
    mla_decode_to_values,
    unpack_latents,
)
from services.engine.kernels.mla_prefill import PrefillWork, mla_prefill, mla_prefill_reference
from services.engine.kernels.moe_experts import moe_experts, moe_experts_reference
from tests.kernel_inputs import decode_inputs, fp8_experts, fp8_weight, pack_latents, relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 8e-3, torch.float16: 1.5e-3}
LENGTHS = [1, 15, 64, 0, 65, 700, 3, 4097, 128]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("num_heads", "latent", "rope", "block_size"),
    [(16, 512, 64, 64), (128, 512, 64, 32), (128, 512, 64, 64), (6, 128, 32, 16), (40, 512, 64, 24), (4, 48, 16, 128)],
)
def test_decode(dtype: torch.dtype, num_heads: int, latent: int, rope: int, block_size: int) -> None:
    q, cache, tables, lens = decode_inputs(LENGTHS, num_heads, latent, rope, block_size, dtype, "cuda")
    expected = mla_decode_reference(q.double(), cache.double(), tables, lens, 0.1, latent)
    for bound in (None, max(LENGTHS)):
        out = mla_decode(q, cache, tables, lens, 0.1, latent, bound)
        assert out.dtype == dtype
        assert not out[3].any()
        assert relative_error(out, expected) < TOLERANCES[dtype]


@pytest.mark.parametrize(
    ("num_heads", "latent", "rope"), [(16, 512, 64), (128, 512, 64), (6, 128, 32), (40, 256, 48), (3, 48, 16)]
)
@pytest.mark.parametrize("block_size", [64, 48, 16])
def test_decode_of_fp8_records(num_heads: int, latent: int, rope: int, block_size: int) -> None:
    q, cache, tables, lens = decode_inputs(LENGTHS, num_heads, latent, rope, block_size, torch.bfloat16, "cuda")
    packed = pack_latents(cache, latent)
    records = packed.new_empty(len(packed), 5, *packed.shape[1:])
    records[:, 2] = packed
    expected = mla_decode_reference(q.double(), unpack_latents(packed, latent).double(), tables, lens, 0.1, latent)
    assert relative_error(mla_decode(q, records[:, 2], tables, lens, 0.1, latent), expected) < 8e-3


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("lengths", [[1], [5000], [70, 4097], [0, 33], [70, 0, 4097]], ids=str)
@pytest.mark.parametrize(
    ("num_heads", "latent", "rope", "value"), [(16, 512, 64, 128), (128, 512, 64, 128), (6, 48, 16, 40)]
)
def test_decode_to_values(
    dtype: torch.dtype, lengths: list[int], num_heads: int, latent: int, rope: int, value: int
) -> None:
    q, cache, tables, lens = decode_inputs(lengths, num_heads, latent, rope, 64, dtype, "cuda")
    weights = torch.randn(num_heads, value + 16, latent, device="cuda").div(latent**0.5).to(dtype)
    value_weights = weights[:, 16:].transpose(1, 2)  # as a layer has them, its keys' between
    latents = mla_decode_reference(q.double(), cache.double(), tables, lens, 0.1, latent)
    expected = torch.einsum("bhc,hcv->bhv", latents, value_weights.double())
    out = q.new_full((len(lengths), num_heads, value), 7.0)
    mla_decode_to_values(q, cache, tables, lens, 0.1, value_weights, out)
    assert relative_error(out, expected) < TOLERANCES[dtype]
    assert not out[lens == 0].any()


@pytest.mark.parametrize("num_heads", [16, 64])
@pytest.mark.parametrize("bits", [0xFF, 0x87], ids=["all numbers", "subnormal"])
def test_decode_of_fp8_records_of_any_numbers(num_heads: int, bits: int) -> None:
    q, cache, tables, lens = decode_inputs(LENGTHS, num_heads, 512, 64, 64, torch.bfloat16, "cuda")
    records = pack_latents(cache, 512)
    numbers = torch.randint(0, 256, (*records.shape[:2], 512), device="cuda", dtype=torch.uint8) & bits
    records[..., :512] = numbers.masked_fill(numbers & 0x7F == 0x7F, 0)
    records[..., 512:528] = (torch.rand(*records.shape[:2], 4, device="cuda") / bits).view(torch.uint8)
    expected = mla_decode_reference(q.double(), unpack_latents(records, 512).double(), tables, lens, 0.02, 512)
    assert relative_error(mla_decode(q, records, tables, lens, 0.02, 512), expected) < 8e-3


@pytest.mark.parametrize("num_heads", [16, 64])
def test_decode_passes_the_nan_of_an_fp8_record_on(num_heads: int) -> None:
    q, cache, tables, lens = decode_inputs(LENGTHS, num_heads, 512, 64, 64, torch.bfloat16, "cuda")
    records = pack_latents(cache, 512)
    good = mla_decode(q, records, tables, lens, 0.1, 512)
    records[tables[5, 3].long(), 7, 512:528].view(torch.float32)[2] = torch.nan
    out = mla_decode(q, records, tables, lens, 0.1, 512)
    assert out[5].isnan().all()
    out[5] = good[5]
    assert torch.equal(out, good)


@pytest.mark.parametrize("lengths", [[131_072], [1, 131_072, *range(1, 255)], [2000] * 256])
def test_decode_of_few_and_many_sequences(lengths: list[int]) -> None:
    q, cache, tables, lens = decode_inputs(lengths, 16, 512, 64, 64, torch.bfloat16, "cuda", num_layers=1)
    out = mla_decode(q, cache, tables, lens, 0.05, 512)
    assert relative_error(out, mla_decode_reference(q.float(), cache, tables, lens, 0.05, 512)) < 8e-3


@pytest.mark.parametrize("num_heads", [16, 128])
def test_decode_ignores_what_lies_beyond_the_lengths(num_heads: int) -> None:
    q, cache, tables, lens = decode_inputs([70, 5], num_heads, 512, 64, 64, torch.bfloat16, "cuda")
    out = mla_decode(q, cache, tables, lens, 0.1, 512)
    cache[tables[0, 1].long(), 6:] = torch.nan
    cache[tables[1, 0].long(), 5:] = torch.inf
    assert torch.equal(mla_decode(q, cache, tables, lens, 0.1, 512), out)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_decode_replays_in_a_graph_with_other_lengths(num_heads: int) -> None:
    q, cache, tables, lens = decode_inputs([900, 300, 77], num_heads, 512, 64, 64, torch.bfloat16, "cuda")
    replay, out = _captured(lambda: mla_decode(q, cache, tables, lens, 0.1, 512, 1024))
    lens.copy_(torch.tensor([3, 300, 0]))
    q.normal_()
    replay()
    assert relative_error(out, mla_decode_reference(q.double(), cache.double(), tables, lens, 0.1, 512)) < 8e-3


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("tokens", "chosen", "experts", "width", "model"),
    [(1, 6, 64, 1408, 2048), (7, 2, 8, 192, 384), (33, 8, 256, 96, 112), (300, 3, 5, 200, 328), (2500, 2, 4, 160, 256)],
)
def test_experts(dtype: torch.dtype, tokens: int, chosen: int, experts: int, width: int, model: int) -> None:
    x = torch.randn(tokens, model, device="cuda").to(dtype)
    gate_up = (torch.randn(experts, 2 * width, model, device="cuda") / model**0.5).to(dtype)
    down = (torch.randn(experts, model, width, device="cuda") / width**0.5).to(dtype)
    ids = torch.rand(tokens, experts, device="cuda").topk(chosen).indices
    weights = torch.rand(tokens, chosen, device="cuda")
    out = moe_experts(x, gate_up, down, ids, weights)
    assert out.dtype == dtype
    expected = moe_experts_reference(x.double(), gate_up.double(), down.double(), ids, weights.double())
    assert relative_error(out, expected) < TOLERANCES[dtype]
    # The order in which tokens are dealt is not fixed; the numbers are.
    assert torch.equal(moe_experts(x, gate_up, down, ids, weights), out)


def test_all_tokens_may_choose_the_same_experts() -> None:
    x = torch.randn(70, 256, device="cuda")
    gate_up, down = torch.randn(16, 128, 256, device="cuda") / 16, torch.randn(16, 256, 64, device="cuda") / 8
    ids = torch.tensor([[15, 3]], device="cuda", dtype=torch.int32).expand(70, -1)
    weights = torch.rand(70, 2, device="cuda")
    expected = moe_experts_reference(x.double(), gate_up.double(), down.double(), ids, weights.double())
    assert relative_error(moe_experts(x, gate_up, down, ids, weights), expected) < 3e-6


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(
    ("tokens", "chosen", "experts", "width", "model"),
    [(1, 8, 32, 256, 512), (5, 2, 4, 192, 384), (90, 2, 4, 192, 256), (600, 2, 4, 320, 256)],
)
def test_fp8_experts(tokens: int, chosen: int, experts: int, width: int, model: int, rounds: bool) -> None:
    x = torch.randn(tokens, model, device="cuda")
    weights_fp8 = fp8_experts(experts, width, model, "cuda")
    ids = torch.rand(tokens, experts, device="cuda").topk(chosen).indices
    weights = torch.rand(tokens, chosen, device="cuda")
    arguments = (ids, weights, weights_fp8.gate_up_scale, weights_fp8.down_scale, rounds)
    out = moe_experts(x, weights_fp8.gate_up, weights_fp8.down, *arguments)
    # Tensor cores keep fewer bits than fp32: the second quantisation rounds some numbers to the neighbouring step, and
    # all of a block where that befalls its largest one.
    expected = moe_experts_reference(x, weights_fp8.gate_up, weights_fp8.down, *arguments)
    assert relative_error(out, expected) < 1e-2
    half = moe_experts(x.bfloat16(), weights_fp8.gate_up, weights_fp8.down, *arguments)
    expected = moe_experts_reference(x.bfloat16(), weights_fp8.gate_up, weights_fp8.down, *arguments)
    assert relative_error(half, expected) < 1e-2


def test_experts_replay_in_a_graph_with_other_choices() -> None:
    x = torch.randn(4, 256, device="cuda")
    gate_up, down = torch.randn(8, 128, 256, device="cuda") / 16, torch.randn(8, 256, 64, device="cuda") / 8
    ids, weights = torch.zeros(4, 2, device="cuda", dtype=torch.int64), torch.rand(4, 2, device="cuda")
    replay, out = _captured(lambda: moe_experts(x, gate_up, down, ids, weights))
    ids.copy_(torch.tensor([[0, 7], [3, 4], [7, 0], [1, 1]]))
    replay()
    expected = moe_experts_reference(x.double(), gate_up.double(), down.double(), ids, weights.double())
    assert relative_error(out, expected) < 3e-6


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(
    ("tokens", "outputs", "inputs"),
    [(1, 576, 7168), (3, 192, 128), (17, 130, 208), (100, 1536, 1024), (129, 576, 512), (1000, 320, 384)],
)
def test_fp8_linear(tokens: int, outputs: int, inputs: int, rounds: bool) -> None:
    x = torch.randn(tokens, inputs, device="cuda")
    x[:, : inputs // 2] *= 1e-3
    weight, scale_inv = fp8_weight(outputs, inputs, "cuda")
    expected = fp8_linear_reference(x.double(), weight, scale_inv, rounds)
    # Within 128 channels the tensor cores keep fewer bits than fp32.
    assert relative_error(fp8_linear(x, weight, scale_inv, rounds), expected) < 3e-4
    half = x.bfloat16()
    expected = fp8_linear_reference(half.double(), weight, scale_inv, rounds)
    assert relative_error(fp8_linear(half, weight, scale_inv, rounds), expected) < 4e-3


@pytest.mark.parametrize("tokens", [2, 300])
def test_fp8_linear_passes_nan_on(tokens: int) -> None:
    x = torch.randn(tokens, 256, device="cuda")
    x[1, 7] = torch.nan
    out = fp8_linear(x, *fp8_weight(128, 256, "cuda"))
    assert out[1].isnan().all()
    assert not out[0].isnan().any()


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(
    ("nope", "rope", "value", "num_heads"), [(128, 64, 128, 5), (64, 32, 64, 6), (24, 16, 24, 3), (40, 24, 64, 2)]
)
@pytest.mark.parametrize("pairs", ["many", "few"])
def test_prefill(dtype: torch.dtype, nope: int, rope: int, value: int, num_heads: int, pairs: str) -> None:
    many = [(5, 5), (1, 900), (257, 1000), (0, 3), (700, 700), (128, 128), (64, 129)]
    cu_q, cu_k = _lengths(many if pairs == "many" else [(200, 16_500)])
    q = torch.randn(cu_q[-1], num_heads, nope + rope, device="cuda").to(dtype)
    # As the expansion of the latents leaves them: parts of longer rows.
    expanded = torch.randn(cu_k[-1], num_heads, nope + value, device="cuda").to(dtype)
    k, v = expanded[..., :nope], expanded[..., nope:]
    k_rope = torch.randn(cu_k[-1], 48 + rope, device="cuda").to(dtype)[:, 48:]
    out = mla_prefill(q, k, k_rope, v, 0.2, cu_q, cu_k)
    assert out.dtype == dtype
    expected = mla_prefill_reference(q.double(), k.double(), k_rope.double(), v.double(), 0.2, cu_q, cu_k)
    assert relative_error(out, expected) < TOLERANCES[dtype]


def test_prefill_keeps_a_broken_sequence_to_itself() -> None:
    cu_q, cu_k = _lengths([(40, 50), (30, 30), (20, 90)])
    q, k, v = (torch.randn(cu[-1], 2, d, device="cuda").bfloat16() for cu, d in ((cu_q, 192), (cu_k, 128), (cu_k, 128)))
    k_rope = torch.randn(cu_k[-1], 64, device="cuda").bfloat16()
    out = mla_prefill(q, k, k_rope, v, 0.1, cu_q, cu_k)
    for part, cu in ((q, cu_q), (k, cu_k), (k_rope, cu_k), (v, cu_k)):
        part[cu[1] : cu[2]] = torch.nan
    broken = mla_prefill(q, k, k_rope, v, 0.1, cu_q, cu_k)
    assert torch.equal(broken[: cu_q[1]], out[: cu_q[1]])
    assert torch.equal(broken[cu_q[2] :], out[cu_q[2] :])
    assert broken[cu_q[1] : cu_q[2]].isnan().all()


def test_a_captured_prefill_is_given_other_work() -> None:
    """One graph, with room for more tokens, keys and tiles than there are; what is nobody's stays as it is."""
    num_heads, room_q, room_k = 4, 300, 9000
    q = torch.randn(room_q, num_heads, 192, device="cuda").bfloat16()
    k, v = (torch.randn(room_k, num_heads, 128, device="cuda").bfloat16() for _ in range(2))
    k_rope = torch.randn(room_k, 64, device="cuda").bfloat16()
    out = torch.full((room_q, num_heads, 128), 7.0, device="cuda", dtype=torch.bfloat16)
    work = PrefillWork(torch.zeros(20, 4, device="cuda").int(), torch.tensor([0, 0, 1, 1, 0, 0]).int().cuda(), True)
    run, out = _captured(lambda: mla_prefill(q, k, k_rope, v, 0.1, [], [], work, out))
    run()
    assert bool((out == 7.0).all())
    for first, pairs in ((3, [(200, 8900)]), (0, [(17, 17), (130, 2500), (60, 60)]), (50, [(20, 1030)])):
        out.fill_(7.0)
        cu_q, cu_k = _lengths(pairs)
        cu_q = [first + end for end in cu_q]
        now = PrefillWork.of(cu_q, cu_k, num_heads, q.dtype, q.device)
        work.tiles[: len(now.tiles)] = now.tiles
        work.counts.copy_(now.counts)
        run()
        expected = mla_prefill_reference(q.double(), k.double(), k_rope.double(), v.double(), 0.1, cu_q, cu_k)
        used = slice(cu_q[0], cu_q[-1])
        assert relative_error(out[used], expected[used]) < TOLERANCES[torch.bfloat16]
        assert bool((out[: cu_q[0]] == 7.0).all())
        assert bool((out[cu_q[-1] :] == 7.0).all())


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("channels", "outputs"), [(512, 4096), (48, 80), (128, 6 * 40)])
def test_expanding_as_many_latents_as_there_are(dtype: torch.dtype, channels: int, outputs: int) -> None:
    from services.engine.kernels.expand_latents_triton import cut_for  # Triton is where the GPU is

    room = 1000
    latents = torch.randn(room, channels + 16, device="cuda").to(dtype)[:, :channels]
    weight = torch.randn(outputs, channels, device="cuda").to(dtype) / channels**0.5
    num_keys = torch.zeros(1, dtype=torch.int32, device="cuda")
    run, out = _captured(lambda: expand_latents(latents, weight, num_keys))
    expected = expand_latents_reference(latents.double(), weight.double())
    tile = cut_for(dtype).block_m  # whole ones are written
    for count in (0, 1, 127, 128, 700, room):
        num_keys.fill_(count)
        out.fill_(7.0)
        run()
        assert count == 0 or relative_error(out[:count], expected[:count]) < TOLERANCES[dtype]
        assert bool((out[-(-count // tile) * tile :] == 7.0).all())


def _lengths(pairs: list[tuple[int, int]]) -> tuple[list[int], list[int]]:
    cu_q, cu_k = [0], [0]
    for num_queries, num_keys in pairs:
        cu_q.append(cu_q[-1] + num_queries)
        cu_k.append(cu_k[-1] + num_keys)
    return cu_q, cu_k


def _captured(function: Callable[[], torch.Tensor]) -> tuple[Callable[[], None], torch.Tensor]:
    """The function as a CUDA graph: how to replay it, and its output."""
    function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = function()
    return graph.replay, out
