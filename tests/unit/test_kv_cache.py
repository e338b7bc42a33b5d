import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from services.common.errors import UnsupportedConfig
from services.engine.config import ModelConfig
from services.engine.kv_cache import FP8_GROUP, KVCache, KVLayout, pack_fp8, unpack_fp8
from tests.unit.tiny_model import tiny_engine, v3_config, write_checkpoint

CPU = torch.device("cpu")
DEEPSEEK_V3 = {
    "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip
LAYOUTS = [("absorb", "float32"), ("absorb", "bfloat16"), ("absorb", "fp8"), ("naive", "float32"), ("naive", "float16")]


def layout_of(cache_mode, kv_dtype, block_size=4, **changes):
    return KVLayout.of(ModelConfig.from_dict(v3_config(**changes)), cache_mode, kv_dtype, block_size)


@pytest.mark.parametrize(
    ("cache_mode", "kv_dtype", "bytes_per_layer"),
    [
        ("absorb", "fp8", 656),
        ("absorb", "bfloat16", 1152),
        ("absorb", "float32", 2304),
        ("naive", "bfloat16", 128 * (192 + 128) * 2),
    ],
)
def test_bytes_of_a_token_of_deepseek_v3(cache_mode, kv_dtype, bytes_per_layer):
    layout = layout_of(cache_mode, kv_dtype, 64, **DEEPSEEK_V3)
    assert layout.bytes_per_token == 61 * bytes_per_layer
    assert layout.bytes_per_block == 64 * 61 * bytes_per_layer


@pytest.mark.parametrize(("rank", "rope", "num_bytes"), [(128, 64, 260), (256, 32, 328), (512, 64, 656)])
def test_fp8_bytes_follow_from_rank_and_rope(rank, rope, num_bytes):
    layout = layout_of("absorb", "fp8", kv_lora_rank=rank, qk_rope_head_dim=rope)
    assert layout.width == num_bytes
    assert pack_fp8(torch.randn(3, rank + rope), rank).shape == (3, num_bytes)


def test_fp8_is_refused_where_it_has_no_meaning():
    with pytest.raises(UnsupportedConfig, match="kv_lora_rank"):
        layout_of("absorb", "fp8", kv_lora_rank=96)
    with pytest.raises(UnsupportedConfig, match="kv_dtype"):
        layout_of("naive", "fp8", kv_lora_rank=128)


@pytest.mark.parametrize(("cache_mode", "kv_dtype"), LAYOUTS)
def test_reads_back_what_was_written_block_by_block(cache_mode, kv_dtype):
    layout = layout_of(cache_mode, kv_dtype, kv_lora_rank=128)
    cache = KVCache(layout, 8, CPU, torch.float32)
    numbers = 128 + 8 if kv_dtype == "fp8" else layout.width
    rows = torch.randn(10, numbers).bfloat16().float()
    table = torch.tensor([5, 2, 7])
    positions = torch.arange(10)
    cache.write(1, table[positions // 4], positions % 4, rows)
    tolerance = {"float32": 0.0, "bfloat16": 0.0, "float16": 1e-3, "fp8": 0.3}[kv_dtype]
    held = cache.read(1, table, 10)
    assert held.dtype == torch.float32
    torch.testing.assert_close(held, rows, rtol=0, atol=tolerance)
    assert not cache.pool[:, 0].any()  # the other layer
    assert not cache.pool[[0, 1, 3, 4, 6]].any()  # the other blocks
    assert torch.equal(cache.read(1, table, 6), held[:6])


@given(st.integers(0, 2**31), st.sampled_from([1e-6, 1e-3, 1.0, 300.0, 1e4]))
@settings(max_examples=40, deadline=None)
def test_fp8_rounds_a_latent_by_less_than_a_sixteenth_and_keeps_the_rope_key_in_bf16(seed, size):
    rows = torch.randn(5, 256 + 8, generator=torch.Generator().manual_seed(seed)) * size
    rows[:, 128:256] *= 37.0  # groups of very different size: each has its own scale
    back = unpack_fp8(pack_fp8(rows, 256), 256, torch.float32)
    groups = rows[:, :256].unflatten(-1, (-1, FP8_GROUP))
    largest = groups.abs().amax(-1, keepdim=True).clamp_min(1e-4)
    # Half a step of a 3-bit mantissa, and of the smallest subnormal (2^-9 in units where the largest is 448).
    allowed = (groups.abs() / 16).maximum(largest / 448 * 2**-10) * 1.001
    assert ((back[:, :256].unflatten(-1, (-1, FP8_GROUP)) - groups).abs() <= allowed).all()
    assert torch.equal(back[:, 256:], rows[:, 256:].bfloat16().float())


def test_fp8_keeps_zeros_and_passes_nan_on():
    rows = torch.zeros(2, 128 + 8)
    rows[1, 3] = float("nan")
    back = unpack_fp8(pack_fp8(rows, 128), 128, torch.float32)
    assert torch.equal(back[0], rows[0])
    assert back[1, 3].isnan()


def test_layouts_that_differ_have_different_fingerprints():
    layouts = [layout_of(*each, kv_lora_rank=128) for each in LAYOUTS]
    layouts += [layout_of("absorb", "float32", 8, kv_lora_rank=128), layout_of("absorb", "float32", kv_lora_rank=256)]
    layouts += [layout_of("absorb", "float32", kv_lora_rank=128, rope_theta=5e4)]
    assert len({layout.fingerprint for layout in layouts}) == len(layouts)
    assert layouts[0].fingerprint == layout_of(*LAYOUTS[0], kv_lora_rank=128).fingerprint


def test_prefix_hashes_differ_between_layouts_and_tenants(tmp_path):
    write_checkpoint(tmp_path, v3_config(kv_lora_rank=128))
    engines = [tiny_engine(tmp_path, cache_mode=mode, kv_dtype=dtype) for mode, dtype in LAYOUTS]
    tokens = list(range(3, 15))
    hashes = [engine.hasher(salt).hashes(tokens) for engine in engines for salt in (b"", b"one", b"two")]
    assert all(len(chain) == 3 for chain in hashes)
    assert len({each for chain in hashes for each in chain}) == 3 * len(hashes)
