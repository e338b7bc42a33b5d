import hashlib
import json
import struct
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from services.common.errors import InvalidCheckpoint
from services.engine.config import ModelConfig
from services.engine.model import DeepseekForCausalLM
from services.engine.weights import dummy_weights, load_weights
from tests.unit.tiny_model import FP8, random_tensors, tiny_engine, v2_config, v3_config, write_checkpoint

CPU = torch.device("cpu")
Q_PROJ = "model.layers.0.self_attn.q_b_proj.weight"


def network(config, dtype=torch.float32):
    return DeepseekForCausalLM(ModelConfig.from_dict(config), dtype, CPU)


def load(folder, config, dtype=torch.float32):
    model = network(config, dtype)
    load_weights(model, folder)
    return model.checkpoint_views()


def assert_refused(folder, config, tensor=None, match=None):
    with pytest.raises(InvalidCheckpoint, match=match) as caught:
        load(folder, config)
    assert caught.value.tensor == tensor
    assert tensor is None or tensor in str(caught.value)


@pytest.mark.parametrize("config", [v3_config(), v2_config(), v3_config(tie_word_embeddings=True)])
def test_every_tensor_lands_under_its_own_name(tmp_path, config):
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors)
    loaded = load(tmp_path, config)
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_and_computed_number_formats_are_independent(tmp_path, stored, dtype):
    config = v3_config()
    tensors = {name: tensor.to(stored) for name, tensor in random_tensors(config).items()}
    write_checkpoint(tmp_path, config, tensors)
    loaded = load(tmp_path, config, dtype)
    assert torch.equal(loaded[Q_PROJ], tensors[Q_PROJ].to(dtype))
    assert loaded["model.layers.1.mlp.gate.weight"].dtype == torch.float32  # the router's scores are fp32


@pytest.mark.parametrize("num_threads", [1, 5])
def test_tensors_read_at_once_are_those_read_one_by_one(tmp_path, num_threads):
    config = v3_config()
    tensors = random_tensors(config)
    write_checkpoint(tmp_path, config, tensors)
    model, seen = network(config), []
    load_weights(model, tmp_path, lambda done, total: seen.append(done), num_threads)
    assert all(torch.equal(view, tensors[name]) for name, view in model.checkpoint_views().items())
    assert seen == list(range(1, len(tensors) + 1))
    tensors[Q_PROJ][0, 0] = torch.nan
    write_checkpoint(tmp_path, config, tensors)
    with pytest.raises(InvalidCheckpoint, match="holds NaN") as caught:
        load_weights(model, tmp_path, None, num_threads)
    assert caught.value.tensor == Q_PROJ


def test_progress_counts_tensors(tmp_path):
    config = v3_config()
    write_checkpoint(tmp_path, config)
    seen = []
    load_weights(network(config), tmp_path, lambda done, total: seen.append((done, total)))
    total = len(random_tensors(config))
    assert seen == [(done, total) for done in range(1, total + 1)]


def shard(folder: Path, tensors, num_shards=3):
    names = sorted(tensors)
    weight_map = {}
    for i in range(num_shards):
        file_name = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::num_shards]}, folder / file_name)
        weight_map |= dict.fromkeys(names[i::num_shards], file_name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(v3_config()))
    return weight_map


def test_shards_load_as_one_file_does(tmp_path):
    tensors = random_tensors(v3_config())
    shard(tmp_path, tensors)
    loaded = load(tmp_path, v3_config())
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_a_missing_shard_is_named(tmp_path):
    weight_map = shard(tmp_path, random_tensors(v3_config()))
    (tmp_path / weight_map[Q_PROJ]).unlink()
    assert_refused(tmp_path, v3_config(), match=weight_map[Q_PROJ])


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    tensors = random_tensors(v3_config())
    weight_map = shard(tmp_path, tensors)
    extra = "extra.safetensors"
    save_file({Q_PROJ: tensors[Q_PROJ]}, tmp_path / extra)
    index = {"weight_map": weight_map | {"other": extra}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert_refused(tmp_path, v3_config(), Q_PROJ)


DAMAGED_INDICES = [
    "",
    "[]",
    "{}",
    '{"weight_map": 3}',
    '{"weight_map": {"a": "../model.safetensors"}}',
    '{"weight_map": {"a": ".."}}',
    '{"weight_map": {"a": 3}}',
    '{"weight_map": {"a": ["b"]}}',
    '{"weight_map": {"a": 3, "b": "c"}}',
]


@pytest.mark.parametrize("text", DAMAGED_INDICES)
def test_a_damaged_index_is_refused(tmp_path, text):
    write_checkpoint(tmp_path, v3_config())
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert_refused(tmp_path, v3_config())


def test_a_missing_file_is_named(tmp_path):
    assert_refused(tmp_path, v3_config(), match=r"model\.safetensors: is missing")


def test_a_missing_tensor_is_named(tmp_path):
    tensors = random_tensors(v3_config())
    del tensors[Q_PROJ]
    write_checkpoint(tmp_path, v3_config(), tensors)
    assert_refused(tmp_path, v3_config(), Q_PROJ, "missing")


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.0.self_attn.q_b_proj.bias",
        "model.layers.7.input_layernorm.weight",
        "model.layers.1.mlp.experts.4.up_proj.weight",
        "model.layers.0.self_attn.kv_b_proj.weight_scale",
        "nonsense",
    ],
)
def test_an_unexpected_tensor_is_named(tmp_path, name):
    write_checkpoint(tmp_path, v3_config(), random_tensors(v3_config()) | {name: torch.zeros(2)})
    assert_refused(tmp_path, v3_config(), name)


def test_tensors_of_the_prediction_layer_are_known_only_if_the_config_has_it(tmp_path):
    name = "model.layers.2.eh_proj.weight"
    write_checkpoint(tmp_path, v3_config(), random_tensors(v3_config()) | {name: torch.zeros(2)})
    load(tmp_path, v3_config(num_nextn_predict_layers=1))
    assert_refused(tmp_path, v3_config(), name)


def test_a_copy_of_the_head_is_tolerated_where_it_is_tied(tmp_path):
    config = v3_config(tie_word_embeddings=True)
    tensors = random_tensors(config)
    copy = {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}
    write_checkpoint(tmp_path, config, tensors | copy)
    assert "lm_head.weight" not in load(tmp_path, config)


@pytest.mark.parametrize("change", [lambda t: t[:-1], lambda t: t.T, lambda t: t.flatten(), lambda t: t[None]])
def test_a_wrong_shape_is_named(tmp_path, change):
    tensors = random_tensors(v3_config())
    tensors[Q_PROJ] = change(tensors[Q_PROJ]).contiguous()
    write_checkpoint(tmp_path, v3_config(), tensors)
    assert_refused(tmp_path, v3_config(), Q_PROJ, "shape")


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.float64, torch.bool, torch.float8_e5m2])
def test_a_number_format_that_is_not_a_model_s_is_named(tmp_path, dtype):
    tensors = random_tensors(v3_config())
    tensors[Q_PROJ] = tensors[Q_PROJ].to(dtype)
    write_checkpoint(tmp_path, v3_config(), tensors)
    assert_refused(tmp_path, v3_config(), Q_PROJ, "dtype")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", [Q_PROJ, "model.embed_tokens.weight", "model.layers.1.mlp.experts.3.down_proj.weight"])
def test_weights_that_are_no_numbers_are_named(tmp_path, name, value):
    tensors = random_tensors(v3_config())
    tensors[name][-1, -1] = value
    write_checkpoint(tmp_path, v3_config(), tensors)
    assert_refused(tmp_path, v3_config(), name, "NaN or infinite")


def test_weights_too_large_for_fp16_are_named(tmp_path):
    tensors = random_tensors(v3_config())
    tensors[Q_PROJ][0, 0] = 1e6
    write_checkpoint(tmp_path, v3_config(), tensors)
    with pytest.raises(InvalidCheckpoint, match=Q_PROJ):
        load(tmp_path, v3_config(), torch.float16)


# FP8.


def with_fp8(tensors, name=Q_PROJ, seed=0):
    """One weight as e4m3 with a scale a block."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (-(-size // 128) for size in tensors[name].shape)
    scales = torch.rand(rows, columns, generator=generator) + 0.5
    return tensors | {name: tensors[name].to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def test_fp8_weights_are_multiplied_by_their_block_s_scale(tmp_path):
    config = v3_config(quantization_config=FP8, q_lora_rank=160, num_attention_heads=20, num_key_value_heads=20)
    tensors = with_fp8(random_tensors(config))
    assert tensors[f"{Q_PROJ}_scale_inv"].shape == (3, 2)  # 320 x 160: both edges are ragged
    write_checkpoint(tmp_path, config, tensors)
    loaded = load(tmp_path, config)[Q_PROJ]
    for row, column in [(0, 0), (127, 127), (128, 128), (255, 159), (256, 0), (319, 159)]:
        scale = tensors[f"{Q_PROJ}_scale_inv"][row // 128, column // 128]
        assert loaded[row, column] == tensors[Q_PROJ][row, column].float() * scale


def test_a_missing_scale_is_named(tmp_path):
    config = v3_config(quantization_config=FP8)
    tensors = with_fp8(random_tensors(config))
    del tensors[f"{Q_PROJ}_scale_inv"]
    write_checkpoint(tmp_path, config, tensors)
    assert_refused(tmp_path, config, f"{Q_PROJ}_scale_inv", "missing")


@pytest.mark.parametrize("shape", [(1,), (2, 1), (1, 1, 1)])
def test_a_misshapen_scale_is_named(tmp_path, shape):
    config = v3_config(quantization_config=FP8)
    tensors = with_fp8(random_tensors(config)) | {f"{Q_PROJ}_scale_inv": torch.ones(shape)}
    write_checkpoint(tmp_path, config, tensors)
    assert_refused(tmp_path, config, f"{Q_PROJ}_scale_inv", "shape")


def test_a_nan_in_a_scale_is_found(tmp_path):
    config = v3_config(quantization_config=FP8)
    tensors = with_fp8(random_tensors(config)) | {f"{Q_PROJ}_scale_inv": torch.tensor([[float("nan")]])}
    write_checkpoint(tmp_path, config, tensors)
    assert_refused(tmp_path, config, Q_PROJ)


def test_a_scale_without_an_fp8_weight_is_refused(tmp_path):
    """Ignoring it would give numbers that are wrong by its value."""
    name = f"{Q_PROJ}_scale_inv"
    write_checkpoint(tmp_path, v3_config(), random_tensors(v3_config()) | {name: torch.full((1, 1), 2.0)})
    assert_refused(tmp_path, v3_config(), name)


# Damaged files.


@pytest.fixture(scope="module")
def whole_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return write_checkpoint(folder, v3_config()).read_bytes()


def header_size(data):
    return 8 + struct.unpack("<Q", data[:8])[0]


@pytest.mark.parametrize("part", [0.0, 0.00001, 0.01, 0.3, 0.999999])
def test_a_truncated_file_is_refused(tmp_path, whole_file, part):
    (tmp_path / "model.safetensors").write_bytes(whole_file[: int(len(whole_file) * part)])
    assert_refused(tmp_path, v3_config(), match=r"model\.safetensors")


def test_bytes_after_the_end_are_refused(tmp_path, whole_file):
    (tmp_path / "model.safetensors").write_bytes(whole_file + b"\0" * 8)
    assert_refused(tmp_path, v3_config(), match=r"model\.safetensors")


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_flipped_bit_in_the_header_never_goes_unnoticed(tmp_path_factory, whole_file, data):
    folder = tmp_path_factory.mktemp("flipped")
    damaged = bytearray(whole_file)
    position = data.draw(st.integers(0, header_size(whole_file) - 1))
    damaged[position] ^= 1 << data.draw(st.integers(0, 7))
    (folder / "model.safetensors").write_bytes(damaged)
    tensors = random_tensors(v3_config())
    try:
        loaded = load(folder, v3_config())
    except InvalidCheckpoint:
        return
    # A space of the padding may become another blank: then nothing is changed.
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("bit", [0, 7])
def test_a_flipped_bit_in_the_data_is_found_by_the_checksum(tmp_path, whole_file, bit):
    path = tmp_path / "model.safetensors"
    (tmp_path / "SHA256SUMS").write_text(f"{hashlib.sha256(whole_file).hexdigest()}  model.safetensors\n")
    path.write_bytes(whole_file)
    load(tmp_path, v3_config())
    damaged = bytearray(whole_file)
    damaged[-100] ^= 1 << bit
    path.write_bytes(damaged)
    assert_refused(tmp_path, v3_config(), match="SHA-256")


@pytest.mark.parametrize("line", ["{digest}  missing.safetensors", "{digest}  ../model.safetensors"])
def test_checksums_of_files_that_are_not_there_are_refused(tmp_path, whole_file, line):
    (tmp_path / "model.safetensors").write_bytes(whole_file)
    (tmp_path / "SHA256SUMS").write_text(line.format(digest=hashlib.sha256(whole_file).hexdigest()))
    assert_refused(tmp_path, v3_config(), match="SHA256SUMS")


def test_an_engine_of_a_damaged_checkpoint_is_not_made(tmp_path, whole_file):
    (tmp_path / "config.json").write_text(json.dumps(v3_config()))
    (tmp_path / "model.safetensors").write_bytes(whole_file[:-1])
    with pytest.raises(InvalidCheckpoint):
        tiny_engine(tmp_path)


def test_a_folder_that_does_not_exist_is_an_invalid_checkpoint(tmp_path):
    with pytest.raises(InvalidCheckpoint):
        tiny_engine(tmp_path / "nowhere")


# Dummy weights.


def test_dummy_weights_follow_the_seed_alone():
    views = []
    for seed in (1, 1, 2):
        model = network(v3_config())
        dummy_weights(model, seed)
        views.append(model.checkpoint_views())
    assert all(torch.equal(views[0][name], views[1][name]) for name in views[0])
    assert not torch.equal(views[0][Q_PROJ], views[2][Q_PROJ])
    assert all(view.isfinite().all() for view in views[0].values())
