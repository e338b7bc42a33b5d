"""What fits into a GPU, and reading the configs of published models (tests/data/configs: their published sizes)."""

import json
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from services.cli import app
from services.engine.config import ModelConfig
from services.engine.plan import SPARE_BYTES, plan

CONFIGS = Path(__file__).parents[1] / "data/configs"
NAMES = ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3", "moonlight-16b-a3b", "kimi-k2")


def config_of(name):
    return ModelConfig.from_folder(CONFIGS / f"{name}.json")


def plan_of(name, gib, **options):
    return plan(config_of(name), gib * 2**30, torch.bfloat16, **options)


def run(*arguments):
    result = CliRunner().invoke(app, ["plan", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("deepseek-v2-lite", 15.71),
        ("deepseek-v2", 235.74),
        ("deepseek-v3", 671.03),
        ("moonlight-16b-a3b", 15.96),
        ("kimi-k2", 1026.41),
    ],
)
def test_parameters_are_counted_as_published(name, billions):
    result = plan_of(name, 24)
    assert round(result.num_parameters / 1e9, 2) == billions
    assert result.weight_bytes >= result.num_parameters


@pytest.mark.parametrize(
    ("name", "absorb", "naive", "fp8"),
    [
        ("deepseek-v2-lite", 31_104, 276_480, 17_712),
        ("deepseek-v2", 69_120, 4_915_200, 39_360),
        ("deepseek-v3", 70_272, 4_997_120, 40_016),
        ("moonlight-16b-a3b", 31_104, 276_480, 17_712),
        ("kimi-k2", 70_272, 2_498_560, 40_016),
    ],
)
def test_bytes_a_token_by_cache(name, absorb, naive, fp8):
    caches = {(cache.cache_mode, cache.kv_dtype): cache.bytes_per_token for cache in plan_of(name, 24).caches}
    assert caches == {("absorb", "bfloat16"): absorb, ("absorb", "fp8"): fp8, ("naive", "bfloat16"): naive}


def test_blocks_fill_what_weights_and_spare_leave_and_sequences_are_whole_blocks():
    result = plan_of("deepseek-v2-lite", 80)
    assert result.left_bytes == 80 * 2**30 - result.weight_bytes - SPARE_BYTES
    for cache in result.caches:
        block_bytes = cache.bytes_per_token * 16
        assert cache.num_blocks * block_bytes <= result.left_bytes < (cache.num_blocks + 1) * block_bytes
        assert [length for length, _ in cache.sequences] == [4096, 8192, 16384, 32768, 65536, 131072]
        assert all(count == cache.num_blocks // (length // 16) for length, count in cache.sequences)


def test_a_length_that_ends_inside_a_block_takes_the_whole_block():
    cache = plan_of("deepseek-v2-lite", 80, max_seq_len=5000, block_size=64).caches[0]
    assert dict(cache.sequences)[5000] == cache.num_blocks // 79


def test_weights_larger_than_the_memory_leave_no_blocks():
    result = plan_of("deepseek-v3", 24)
    assert result.left_bytes < 0
    assert all(cache.num_blocks == 0 and not any(n for _, n in cache.sequences) for cache in result.caches)


def test_lengths_beyond_the_model_s_own_limit_are_left_out():
    assert [length for length, _ in plan_of("moonlight-16b-a3b", 80).caches[0].sequences] == [4096, 8192]


def test_an_fp8_cache_is_left_out_where_the_rank_does_not_allow_it():
    values = json.loads((CONFIGS / "deepseek-v2-lite.json").read_text()) | {"kv_lora_rank": 320}
    result = plan(ModelConfig.from_dict(values), 80 * 2**30, torch.bfloat16)
    assert [cache.cache_mode for cache in result.caches] == ["absorb", "naive"]


@pytest.mark.parametrize("name", NAMES)
def test_plan_prints_everything_for(name):
    result = run("--model", CONFIGS / f"{name}.json", "--gpu-memory", "4TiB", "--max-seq-len", 8192)
    assert result.exit_code == 0
    figures = plan_of(name, 4096, max_seq_len=8192)
    assert f"{figures.num_parameters / 1e9:,.2f} B parameters" in result.output
    assert "does not fit" not in result.output
    for cache in figures.caches:
        assert f"{cache.bytes_per_token:,}" in result.output
        assert f"{cache.num_blocks:,}" in result.output
        for length, count in cache.sequences:
            row = next(line for line in result.output.splitlines() if f"sequences of {length:,} " in line)
            assert f" {count:,} " in row
    assert max(map(len, result.output.splitlines())) <= 120


def test_plan_shows_4096_8192_and_16384_within_80_columns(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    model = CONFIGS / "deepseek-v2-lite.json"
    result = run("--model", model, "--gpu-memory", "24GiB", "--max-seq-len", 8192)
    assert result.exit_code == 0
    for text in ("sequences of 4,096", "sequences of 8,192", "sequences of 16,384", "276,480"):
        assert text in result.output
    assert "…" not in result.output


def test_plan_says_how_much_more_is_needed_when_the_weights_do_not_fit():
    result = run("--model", CONFIGS / "deepseek-v2-lite.json", "--gpu-memory", "24GiB")
    assert result.exit_code == 0
    assert "does not fit: 7.26 GiB more are needed" in result.output


def test_plan_of_the_demo_model_needs_no_arguments():
    assert "0.02 B parameters" in run().output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--gpu-memory", "abc"], "--gpu-memory"),
        (["--gpu-memory", "0"], "--gpu-memory"),
        (["--gpu-memory", "9" * 400], "--gpu-memory"),
        (["--max-seq-len", "0"], "--max-seq-len"),
        (["--max-seq-len", "-5"], "--max-seq-len"),
        (["--dtype", "int3"], "dtype"),
        (["--model", "/nowhere/[/b]"], "/nowhere/[/b]"),
    ],
)
def test_plan_refuses_bad_options_in_one_line(arguments, named):
    result = run(*arguments)
    assert result.exit_code == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert named in result.stderr
    assert result.stderr.count("\n") == 1


# The architecture as read from config.json.


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("deepseek-v2-lite", {"q_lora_rank": None, "topk_method": "greedy", "scoring_func": "softmax"}),
        ("deepseek-v2", {"q_lora_rank": 1536, "topk_method": "group_limited_greedy", "n_group": 8, "topk_group": 3}),
        ("deepseek-v3", {"topk_method": "noaux_tc", "is_fp8": True, "num_nextn_predict_layers": 1, "n_group": 8}),
        ("moonlight-16b-a3b", {"q_lora_rank": None, "yarn": None, "rope_theta": 5e4, "rms_norm_eps": 1e-5}),
        ("kimi-k2", {"model_type": "kimi_k2", "n_routed_experts": 384, "num_attention_heads": 64, "is_fp8": True}),
    ],
)
def test_published_configs_are_read(name, expected):
    config = config_of(name)
    assert {field: getattr(config, field) for field in expected} == expected
    first_dense = 3 if name == "deepseek-v3" else 1
    assert config.moe_layers == (False,) * first_dense + (True,) * (config.num_hidden_layers - first_dense)


def test_rope_parameters_of_transformers_5_read_like_rope_scaling():
    values = json.loads((CONFIGS / "deepseek-v3.json").read_text())
    scaling = values.pop("rope_scaling")
    theta = values.pop("rope_theta")
    newer = values | {"rope_parameters": scaling | {"rope_theta": theta, "rope_type": scaling["type"]}}
    assert ModelConfig.from_dict(newer) == config_of("deepseek-v3")


def test_fingerprints_of_different_models_differ():
    assert len({config_of(name).fingerprint for name in NAMES}) == len(NAMES)
