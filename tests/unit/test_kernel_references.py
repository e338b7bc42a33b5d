"""The kernels' plain references against float64 spelled out element by element."""

from __future__ import annotations

import pytest
import torch

from services.engine.kernels.fp8_linear import dequantize, fp8_linear, quantize_activations
from services.engine.kernels.mla_decode import mla_decode, mla_decode_to_values, unpack_latents
from services.engine.kernels.mla_prefill import mla_prefill, mla_prefill_reference, query_tiles, work_counts
from services.engine.kernels.moe_experts import moe_experts
from tests.kernel_inputs import decode_inputs, fp8_experts, fp8_weight, pack_latents, relative_error

TOLERANCES = {torch.float32: 2e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(11)


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("latent", "rope", "block_size"), [(128, 32, 16), (512, 64, 5), (48, 16, 64)])
def test_decode_attends_to_the_blocks_of_the_table(dtype: torch.dtype, latent: int, rope: int, block_size: int) -> None:
    q, cache, tables, lens = decode_inputs([1, 17, 0, block_size, 130], 6, latent, rope, block_size, dtype)
    out = mla_decode(q, cache, tables, lens, 0.2, latent)
    assert out.dtype == dtype
    assert not out[2].any()
    for row, length in enumerate(lens.tolist()):
        if length:
            slots = [(int(tables[row, t // block_size]), t % block_size) for t in range(length)]
            keys = torch.stack([cache[slot] for slot in slots]).double()
            expected = (q[row].double() @ keys.t() * 0.2).softmax(-1) @ keys[:, :latent]
            assert relative_error(out[row], expected) < TOLERANCES[dtype]


def test_decode_to_values_is_each_heads_latents_times_its_weights() -> None:
    q, cache, tables, lens = decode_inputs([40, 0, 3], 4, 48, 16, 16, torch.float32)
    value_weights = torch.randn(4, 20, 48).transpose(1, 2)
    out = torch.full((3, 4, 20), 7.0)
    mla_decode_to_values(q, cache, tables, lens, 0.1, value_weights, out)
    latents = mla_decode(q.double(), cache.double(), tables, lens, 0.1, 48)
    assert not out[1].any()
    for head in range(4):
        assert relative_error(out[:, head], latents[:, head] @ value_weights[head].double()) < 2e-6


def test_decode_of_fp8_records_is_that_of_their_numbers() -> None:
    q, cache, tables, lens = decode_inputs([40, 3], 4, 512, 64, 16, torch.bfloat16)
    records = pack_latents(cache, 512)
    assert records.shape[-1] == 656
    numbers = unpack_latents(records, 512)
    assert relative_error(numbers, cache.double()) < 0.04
    assert torch.equal(numbers[..., 512:], cache[..., 512:].float())
    out = mla_decode(q.float(), records, tables, lens, 0.1, 512)
    assert relative_error(out, mla_decode(q.double(), numbers.double(), tables, lens, 0.1, 512)) < 1e-6


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("tokens", "chosen"), [(1, 2), (1, 1), (9, 3), (64, 8)])
def test_experts_are_summed_with_their_weights(dtype: torch.dtype, tokens: int, chosen: int) -> None:
    x = torch.randn(tokens, 40).to(dtype)
    gate_up, down = (torch.randn(8, 48, 40) / 6).to(dtype), (torch.randn(8, 40, 24) / 5).to(dtype)
    ids = torch.stack([torch.randperm(8)[:chosen] for _ in range(tokens)])
    weights = torch.rand(tokens, chosen)
    out = moe_experts(x, gate_up, down, ids, weights)
    assert out.dtype == dtype
    expected = torch.zeros(tokens, 40, dtype=torch.float64)
    for t in range(tokens):
        for expert, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            gate, up = (gate_up[expert].double() @ x[t].double()).chunk(2)
            expected[t] += weight * (down[expert].double() @ (torch.nn.functional.silu(gate) * up))
    assert relative_error(out, expected) < TOLERANCES[dtype] * 2


def test_a_token_gets_the_same_from_its_experts_alone_and_in_a_batch() -> None:
    x, gate_up, down = torch.randn(12, 64), torch.randn(6, 64, 64) / 8, torch.randn(6, 64, 32) / 6
    ids, weights = torch.randint(6, (12, 2), dtype=torch.int32), torch.rand(12, 2)
    together = moe_experts(x, gate_up, down, ids, weights)
    alone = [moe_experts(x[t : t + 1], gate_up, down, ids[t : t + 1], weights[t : t + 1]) for t in range(12)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-5, atol=1e-6)


def test_fp8_experts_round_their_inputs_to_e4m3_and_keep_scales_by_matrix() -> None:
    x = torch.randn(5, 256)
    experts = fp8_experts(num_experts=4, width=192, model=256)
    ids, weights = torch.randint(4, (5, 2)), torch.rand(5, 2)
    out = moe_experts(x, experts.gate_up, experts.down, ids, weights, experts.gate_up_scale, experts.down_scale)
    for t in range(5):
        expected = torch.zeros(256, dtype=torch.float64)
        for expert, weight in zip(ids[t].tolist(), weights[t].tolist(), strict=True):
            gate_up = experts.exact_gate_up(expert)
            gate, up = (gate_up @ _exact_activations(x[t])).chunk(2)
            hidden = _exact_activations((torch.nn.functional.silu(gate) * up).float())
            expected += weight * (experts.exact_down(expert) @ hidden)
        # A number in between on the way may fall to the other side of an e4m3 step.
        assert relative_error(out[t], expected) < 2e-3


@pytest.mark.parametrize("rounds", [False, True])
@pytest.mark.parametrize(("tokens", "outputs", "inputs"), [(1, 576, 256), (7, 192, 128), (3, 130, 200)])
def test_fp8_linear_is_the_product_of_rounded_activations(tokens: int, outputs: int, inputs: int, rounds: bool) -> None:
    x = torch.randn(tokens, inputs)
    weight, scale_inv = fp8_weight(outputs, inputs)
    expected = torch.zeros(tokens, outputs, dtype=torch.float64)
    for row in range(outputs):
        for start in range(0, inputs, 128):
            products = weight[row, start : start + 128].double() * scale_inv[row // 128, start // 128].double()
            for t in range(tokens):
                expected[t, row] += products @ _exact_activations(x[t], rounds)[start : start + 128]
    assert relative_error(fp8_linear(x, weight, scale_inv, rounds), expected) < 1e-6


def test_scales_rounded_up_are_powers_of_two_and_powers_of_two_stay() -> None:
    x = torch.tensor([448.0, 449.0, 1.0, 0.0, 7.0 * 2**-20]).unsqueeze(-1).expand(-1, 128)
    _, scales = quantize_activations(x, round_scales_to_power_of_two=True)
    assert scales.flatten().tolist() == [1.0, 2.0, 2.0**-8, 2.0**-22, 2.0**-22]


def test_dequantized_rows_take_the_scale_of_their_128_whatever_the_height() -> None:
    weight, scale_inv = fp8_weight(192, 130)
    numbers = dequantize(weight, scale_inv, torch.float32)
    assert torch.equal(numbers[127], weight[127].float() * scale_inv[0].repeat_interleave(128)[:130])
    assert torch.equal(numbers[128], weight[128].float() * scale_inv[1].repeat_interleave(128)[:130])


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_prefill_sees_the_prefix_and_never_the_future(dtype: torch.dtype) -> None:
    lengths = [(5, 5), (1, 9), (7, 40), (0, 3), (33, 33)]
    cu_q, cu_k = [0], [0]
    for num_queries, num_keys in lengths:
        cu_q.append(cu_q[-1] + num_queries)
        cu_k.append(cu_k[-1] + num_keys)
    q, nope = torch.randn(cu_q[-1], 3, 24).to(dtype), torch.randn(cu_k[-1], 3, 16).to(dtype)
    rope, v = torch.randn(cu_k[-1], 8).to(dtype), torch.randn(cu_k[-1], 3, 16).to(dtype)
    k = torch.cat((nope, rope.unsqueeze(1).expand(-1, 3, -1)), dim=-1)
    out = mla_prefill(q, nope, rope, v, 0.3, cu_q, cu_k)
    expected = torch.empty(cu_q[-1], 3, 16, dtype=torch.float64)
    for (num_queries, num_keys), q0, k0 in zip(lengths, cu_q[:-1], cu_k[:-1], strict=True):
        for i in range(num_queries):
            seen = slice(k0, k0 + num_keys - num_queries + i + 1)
            scores = torch.einsum("hd,khd->hk", q[q0 + i].double(), k[seen].double()) * 0.3
            expected[q0 + i] = torch.einsum("hk,khv->hv", scores.softmax(-1), v[seen].double())
    assert out.dtype == dtype
    assert relative_error(out, expected) < TOLERANCES[dtype]
    assert relative_error(mla_prefill_reference(q, nope, rope, v, 0.3, cu_q, cu_k), expected) < TOLERANCES[dtype]


def _exact_activations(x: torch.Tensor, rounds: bool = False) -> torch.Tensor:
    """One token's channels, rounded to e4m3 under the scale of their 128, in float64."""
    out = torch.empty(len(x), dtype=torch.float64)
    for start in range(0, len(x), 128):
        part = x[start : start + 128].float()
        scale = torch.clamp(part.abs().max(), min=1e-4) / 448
        if rounds:
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        out[start : start + 128] = (part / scale).to(torch.float8_e4m3fn).double() * scale.double()
    return out


@pytest.mark.parametrize("num_heads", [1, 16, 128])
@pytest.mark.parametrize("pairs", [[(200, 16_000)], [(17, 17)], [(480, 8000), (100, 4000)], [(5, 900)] * 40])
def test_keys_are_split_while_the_card_has_places_left(num_heads: int, pairs: list[tuple[int, int]]) -> None:
    cu_q, cu_k = [3], [0]
    for num_queries, num_keys in pairs:
        cu_q.append(cu_q[-1] + num_queries)
        cu_k.append(cu_k[-1] + num_keys)
    num_tiles = len(query_tiles(cu_q, cu_k, torch.bfloat16))
    keys, tiles, parts, heads_at_once, first, end = work_counts(cu_q, cu_k, num_tiles, num_heads, 132).tolist()
    assert (keys, tiles, first, end) == (cu_k[-1], num_tiles, 3, cu_q[-1])
    assert 1 <= heads_at_once <= num_heads
    assert parts == 1 or parts * tiles * num_heads <= 132
    assert parts <= max(1, max(num_keys for _, num_keys in pairs) // 1000)
    more = 2 * parts * tiles * num_heads
    assert more > 132 or 2 * parts > max(num_keys for _, num_keys in pairs) // 1024 or parts == 16
