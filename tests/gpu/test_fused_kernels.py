"""The fused CUDA kernels against their references in float64 (or in the dtype that decides), on odd shapes."""

from __future__ import annotations

import pytest
import torch

from services.engine.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from services.engine.kernels.choose_experts import Routing, choose_experts, choose_experts_reference
from services.engine.kernels.gather_latents import gather_latents, gather_latents_reference
from services.engine.kernels.linear import linear, linear_reference
from services.engine.kernels.mla_store import mla_store, mla_store_reference
from services.engine.kernels.moe_experts import moe_experts, moe_experts_reference
from services.engine.kernels.silu_mul import silu_mul, silu_mul_reference
from tests.kernel_inputs import relative_error

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "size"), [(1, 2048), (7, 7168), (3, 48), (300, 1000)])
def test_add_rms_norm(dtype: torch.dtype, rows: int, size: int) -> None:
    h, delta = (torch.randn(rows, size, device="cuda").to(dtype) for _ in range(2))
    weight = torch.rand(size, device="cuda").to(dtype)
    expected_h = h + delta
    expected = add_rms_norm_reference(expected_h.double(), None, weight.double(), 1e-6)
    out = add_rms_norm(h, delta, weight, 1e-6)
    assert torch.equal(h, expected_h)
    assert relative_error(out, expected) < TOLERANCES[dtype]
    wide = torch.randn(rows, size + 64, device="cuda").to(dtype)[:, :size]
    expected = add_rms_norm_reference(wide.double(), None, weight.double(), 1e-6)
    assert relative_error(add_rms_norm(wide, None, weight, 1e-6), expected) < TOLERANCES[dtype]


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("rows", "width"), [(1, 2816), (9, 1000), (300, 10944)])
def test_silu_mul(dtype: torch.dtype, rows: int, width: int) -> None:
    gate_up = torch.randn(rows, 2 * width, device="cuda").to(dtype)
    assert relative_error(silu_mul(gate_up), silu_mul_reference(gate_up.double())) < TOLERANCES[dtype]


ROUTINGS = [
    (64, Routing(6, False, 1, 1, False, False, 1.0)),
    (160, Routing(6, False, 8, 3, False, False, 16.0)),
    (256, Routing(8, True, 8, 4, True, True, 2.5)),
    (12, Routing(3, True, 4, 2, True, True, 2.5)),
    (384, Routing(8, True, 1, 1, True, True, 2.8)),
]


@pytest.mark.parametrize("rows", [1, 2, 33, 128, 700])
@pytest.mark.parametrize(("experts", "routing"), ROUTINGS)
def test_choose_experts(rows: int, experts: int, routing: Routing) -> None:
    x = torch.randn(rows, 1000, device="cuda").bfloat16()
    weight = torch.randn(experts, 1000, device="cuda") / 30
    bias = torch.randn(experts, device="cuda") / 5 if routing.is_sigmoid else None
    ids, weights = choose_experts(x, weight, bias, routing)
    wanted_ids, wanted = choose_experts_reference(
        x.double(), weight.double(), None if bias is None else bias.double(), routing
    )
    dense, wanted_dense = (
        torch.zeros(rows, experts, device="cuda", dtype=torch.float64).scatter_(1, i.long(), w.double())
        for i, w in ((ids, weights), (wanted_ids, wanted))
    )
    # Two experts may be closer than fp32 can tell: such a token may take the other one.
    is_same = (dense - wanted_dense).norm(dim=1) < 1e-5 * wanted_dense.norm(dim=1)
    assert is_same.double().mean() >= 1 - 2 / max(rows, 100)


def test_a_broken_token_gets_experts_that_exist_and_disturbs_nobody() -> None:
    x = torch.randn(5, 256, device="cuda")
    weight = torch.randn(64, 256, device="cuda")
    routing = ROUTINGS[0][1]
    ids, weights = choose_experts(x, weight, None, routing)
    x[3] = torch.nan
    broken_ids, broken_weights = choose_experts(x, weight, None, routing)
    kept = [0, 1, 2, 4]
    assert torch.equal(broken_ids[kept], ids[kept])
    assert torch.equal(broken_weights[kept], weights[kept])
    assert int(broken_ids.min()) >= 0
    assert int(broken_ids.max()) < 64
    assert broken_weights[3].isnan().all()


@pytest.mark.parametrize("kv_dtype", ["same", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("heads", "nope", "rope", "latent"), [(16, 128, 64, 512), (128, 128, 64, 512), (6, 16, 32, 128)]
)
@pytest.mark.parametrize(("tokens", "absorbed_rows"), [(19, 4), (2, 2), (2, 1)])
def test_mla_store_and_gather(
    tokens: int,
    absorbed_rows: int,
    kv_dtype: str,
    dtype: torch.dtype,
    heads: int,
    nope: int,
    rope: int,
    latent: int,
) -> None:
    block_size = 5
    width = latent + rope if kv_dtype == "same" else latent + latent // 32 + 2 * rope
    pool = torch.zeros(7, 3, block_size, width, device="cuda", dtype=dtype if kv_dtype == "same" else torch.uint8)
    projected = torch.randn(tokens, heads * (nope + rope) + latent + rope, device="cuda").to(dtype)
    positions = torch.randint(100, (tokens,), device="cuda", dtype=torch.int32)
    angles = torch.rand(100, rope // 2, device="cuda") * 6
    slots = torch.randperm(35, device="cuda")[:tokens].int()
    slots[-1] = -1
    norm_weight = torch.rand(latent, device="cuda").to(dtype)
    weights = torch.randn(heads, nope + 24, latent, device="cuda").div(nope**0.5).to(dtype)
    key_weights = weights[:, :nope]  # as a layer has them, its values' between
    tables = angles.cos(), angles.sin()
    results = []
    for function in (mla_store, mla_store_reference):
        p, cache = projected.clone(), pool.clone()
        absorbed = torch.zeros(absorbed_rows, heads, latent + rope, device="cuda", dtype=dtype)
        q = p[:, : heads * (nope + rope)].unflatten(1, (heads, -1))
        latents = p[:, heads * (nope + rope) :]
        function(
            q, latents, norm_weight, 1e-6, positions, *tables, cache[:, 1], slots, key_weights, absorbed
        )  # fmt: skip
        read = gather_latents(cache[:, 1], slots[slots >= 0], latent, dtype)
        assert relative_error(read, gather_latents_reference(cache[:, 1], slots[slots >= 0], latent, dtype)) < 1e-6
        few = gather_latents(cache[:, 1], slots[slots >= 0], latent, dtype, torch.tensor([1], device="cuda").int())
        assert torch.equal(few[:1], read[:1])
        assert not cache[:, 0].any()
        assert not cache[:, 2].any()
        results.append(
            (q[absorbed_rows:], q[..., :nope], latents, absorbed[..., :latent], absorbed[..., latent:], read)
        )
    for ours, reference in zip(*results, strict=True):
        assert reference.numel() == 0 or relative_error(ours, reference) < (
            8e-3 if kv_dtype == "fp8" else TOLERANCES[dtype]
        )


def test_what_is_added_joins_the_experts_sum() -> None:
    x, added = torch.randn(9, 256, device="cuda"), torch.randn(9, 256, device="cuda")
    gate_up, down = torch.randn(8, 128, 256, device="cuda") / 16, torch.randn(8, 256, 64, device="cuda") / 8
    ids, weights = torch.rand(9, 8, device="cuda").topk(3).indices, torch.rand(9, 3, device="cuda")
    out = moe_experts(x, gate_up, down, ids, weights, added=added)
    arguments = (x.double(), gate_up.double(), down.double(), ids, weights.double())
    assert relative_error(out, moe_experts_reference(*arguments, added=added.double())) < 3e-6


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("rows", [1, 2, 3])
@pytest.mark.parametrize(("outputs", "inputs"), [(3648, 2048), (7, 3000), (100, 48)])
def test_linear_of_few_rows(dtype: torch.dtype, outputs: int, inputs: int, rows: int) -> None:
    x = torch.randn(rows, inputs + 8, device="cuda").to(dtype)[:, :inputs]
    weight = (torch.randn(outputs, inputs, device="cuda") / inputs**0.5).to(dtype)
    assert relative_error(linear(x, weight), linear_reference(x.double(), weight.double())) < TOLERANCES[dtype]
