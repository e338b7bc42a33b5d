"""The fused kernels' plain references against the model's own modules, which they stand in for on a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from services.engine.config import ModelConfig
from services.engine.fused import routing_of
from services.engine.kernels.add_rms_norm import add_rms_norm
from services.engine.kernels.choose_experts import choose_experts
from services.engine.kernels.gather_latents import gather_latents
from services.engine.kernels.mla_store import mla_store
from services.engine.kernels.silu_mul import silu_mul
from services.engine.kv_cache import KVCache, KVLayout
from services.engine.layers import RMSNorm
from services.engine.moe import Router
from services.engine.rotary import RotaryEmbedding, rotate
from tests.kernel_inputs import relative_error

CONFIGS = Path(__file__).parents[1] / "data/configs"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_the_sum_that_the_residual_stream_then_holds(dtype: torch.dtype) -> None:
    norm = RMSNorm(40, 1e-6, dtype, CPU)
    norm.weight.data.uniform_()
    h, delta = torch.randn(7, 40).to(dtype), torch.randn(7, 40).to(dtype)
    stream = h.clone()
    out = add_rms_norm(stream, delta, norm.weight, norm.eps)
    assert torch.equal(stream, h + delta)
    assert relative_error(out, norm(h + delta)) < (1e-6 if dtype == torch.float32 else 4e-3)
    strided = torch.randn(7, 64).to(dtype)
    before = strided.clone()
    assert relative_error(add_rms_norm(strided[:, :40], None, norm.weight, norm.eps), norm(strided[:, :40])) < 4e-3
    assert torch.equal(strided, before)


def test_gate_and_up_are_the_halves_of_a_row() -> None:
    gate_up = torch.randn(3, 34)
    torch.testing.assert_close(silu_mul(gate_up), F.silu(gate_up[:, :17]) * gate_up[:, 17:])


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "kimi-k2"])
def test_experts_are_those_of_the_router(name: str) -> None:
    config = ModelConfig.from_folder(CONFIGS / f"{name}.json")
    router = Router(config, CPU)
    router.weight.data.normal_(0, config.hidden_size**-0.5)
    bias = router.e_score_correction_bias
    if bias is not None:
        bias.data.normal_(0, 0.2)
    x = torch.randn(30, config.hidden_size)
    ids, weights = choose_experts(x, router.weight, bias, routing_of(config))
    wanted_ids, wanted_weights = router(x)
    none = torch.zeros(30, config.n_routed_experts)
    torch.testing.assert_close(none.scatter(1, ids, weights), none.scatter(1, wanted_ids, wanted_weights))


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16", "fp8"])
def test_a_stored_latent_is_what_the_cache_would_hold(kv_dtype: str) -> None:
    config = ModelConfig.from_folder(CONFIGS / "deepseek-v2-lite.json")
    rank, rope, heads = config.kv_lora_rank, config.qk_rope_head_dim, config.num_attention_heads
    fused, plain = (KVCache(KVLayout.of(config, "absorb", kv_dtype, 4), 5, CPU, torch.float32) for _ in range(2))
    rotary = RotaryEmbedding(config, 64, CPU)
    norm = RMSNorm(rank, 1e-6, torch.float32, CPU)
    norm.weight.data.uniform_()
    projected = torch.randn(6, heads * config.qk_head_dim + rank + rope)
    q, latents = projected[:, : heads * config.qk_head_dim].unflatten(1, (heads, -1)), projected[:, -rank - rope :]
    positions = torch.randint(64, (6,), dtype=torch.int32)
    slots = torch.tensor([3, 19, -1, 0, 7, 4], dtype=torch.int32)
    kept = slots >= 0
    cos, sin = rotary.at(positions)
    wanted_q = torch.cat((q[..., :-rope], rotate(q[..., -rope:], cos, sin)), dim=-1)
    wanted = torch.cat((norm(latents[:, :rank]), rotate(latents[:, rank:], cos, sin)), dim=-1)
    plain.write(1, slots[kept].long() // 4, slots[kept].long() % 4, wanted[kept])
    key_weights = torch.randn(heads, config.qk_nope_head_dim, rank)
    absorbed = torch.zeros(2, heads, rank + rope)
    tables = rotary.cos, rotary.sin
    mla_store(
        q, latents, norm.weight, 1e-6, positions, *tables, fused.pool[:, 1], slots, key_weights, absorbed
    )  # fmt: skip
    torch.testing.assert_close(q[2:], wanted_q[2:])
    torch.testing.assert_close(absorbed[..., rank:], wanted_q[:2, :, -rope:])
    wanted_rows = torch.einsum("bhn,hnc->bhc", wanted_q[:2, :, :-rope], key_weights)
    torch.testing.assert_close(absorbed[..., :rank], wanted_rows)
    torch.testing.assert_close(latents, wanted)
    read = gather_latents(fused.pool[:, 1], slots[kept], rank, torch.float32)
    if kv_dtype == "fp8":  # a number between two steps of e4m3 may fall to either
        assert relative_error(read, gather_latents(plain.pool[:, 1], slots[kept], rank, torch.float32)) < 1e-3
    else:
        torch.testing.assert_close(fused.pool, plain.pool)
        assert torch.equal(read, fused.pool[:, 1].flatten(0, 1)[slots[kept].long()].float())
