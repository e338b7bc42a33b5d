import json

import pytest

from services.common.errors import InvalidCheckpoint, UnsupportedConfig
from services.engine.config import ModelConfig
from tests.unit.tiny_model import FP8, v2_config, v3_config, yarn

REFUSED = {
    "unknown model type": ({"model_type": "llama"}, "model_type"),
    "no model type": ({"model_type": None}, "model_type"),
    "unknown architecture": ({"architectures": ["LlamaForCausalLM"]}, "architectures"),
    "attention bias": ({"attention_bias": True}, "attention_bias"),
    "another activation": ({"hidden_act": "gelu"}, "hidden_act"),
    "rope in halves": ({"rope_interleave": False}, "rope_interleave"),
    "grouped heads": ({"num_key_value_heads": 1}, "num_key_value_heads"),
    "odd rope": ({"qk_rope_head_dim": 7}, "qk_rope_head_dim"),
    "unknown rope": ({"rope_scaling": yarn(type="linear")}, "rope_scaling.type"),
    "unknown rope, newer name": ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling.type"),
    "unknown rope, transformers 5": (
        {"rope_scaling": None, "rope_parameters": {"rope_type": "dynamic"}},
        "rope_parameters.type",
    ),
    "fixed attention factor": ({"rope_scaling": yarn(attention_factor=1.2)}, "rope_scaling.attention_factor"),
    "untruncated yarn": ({"rope_scaling": yarn(truncate=False)}, "rope_scaling.truncate"),
    "no factor": ({"rope_scaling": yarn(factor=None)}, "rope_scaling.factor"),
    "shrinking factor": ({"rope_scaling": yarn(factor=0.5)}, "rope_scaling.factor"),
    "negative theta": ({"rope_theta": -1.0}, "rope_theta"),
    "unknown router": ({"topk_method": "expert_choice"}, "topk_method"),
    "unknown scores": ({"scoring_func": "sqrtsoftplus"}, "scoring_func"),
    "router and scores apart": ({"scoring_func": "softmax"}, "scoring_func"),
    "more experts than there are": ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
    "groups that do not divide": ({"n_group": 3}, "n_group"),
    "groups of one": ({"n_group": 4}, "n_group"),
    "more groups than there are": ({"topk_group": 3}, "topk_group"),
    "too few in the groups": ({"num_experts_per_tok": 3}, "topk_group"),
    "text for a number": ({"hidden_size": "32"}, "hidden_size"),
    "true for a number": ({"hidden_size": True}, "hidden_size"),
    "no layers": ({"num_hidden_layers": 0}, "num_hidden_layers"),
    "no vocabulary": ({"vocab_size": None}, "vocab_size"),
    "no epsilon": ({"rms_norm_eps": 0.0}, "rms_norm_eps"),
    "number for a flag": ({"tie_word_embeddings": 1}, "tie_word_embeddings"),
    "frequency of no layer": ({"moe_layer_freq": 0}, "moe_layer_freq"),
    "another quantisation": ({"quantization_config": {"quant_method": "gptq"}}, "quantization_config.quant_method"),
    "static activations": (
        {"quantization_config": FP8 | {"activation_scheme": "static"}},
        "quantization_config.activation_scheme",
    ),
    "another block": (
        {"quantization_config": FP8 | {"weight_block_size": [64, 64]}},
        "quantization_config.weight_block_size",
    ),
    "text for eos": ({"eos_token_id": "</s>"}, "eos_token_id"),
}


@pytest.mark.parametrize(("changes", "field"), REFUSED.values(), ids=REFUSED)
def test_refuses_what_cannot_be_computed_exactly_and_names_the_field(changes, field):
    with pytest.raises(UnsupportedConfig) as caught:
        ModelConfig.from_dict(v3_config(**changes))
    assert caught.value.field == field
    assert field in str(caught.value)


def test_refuses_normalised_softmax_scores():
    with pytest.raises(UnsupportedConfig) as caught:
        ModelConfig.from_dict(v2_config(norm_topk_prob=True))
    assert caught.value.field == "norm_topk_prob"


def test_reads_the_fields_of_v3():
    config = ModelConfig.from_dict(v3_config())
    assert (config.topk_method, config.scoring_func, config.norm_topk_prob) == ("noaux_tc", "sigmoid", True)
    assert config.qk_head_dim == 16
    assert config.moe_layers == (False, True)
    assert config.yarn.factor == 4.0
    assert config.eos_token_ids == (1,)
    assert not config.is_fp8


def test_reads_the_fields_of_v2_without_a_query_rank():
    config = ModelConfig.from_dict(v2_config())
    assert config.q_lora_rank is None
    assert (config.topk_method, config.scoring_func) == ("greedy", "softmax")


@pytest.mark.parametrize("model_type", ["deepseek_v3", "kimi_k2"])
def test_router_fields_have_the_defaults_of_the_model_type(model_type):
    config = ModelConfig.from_dict(v3_config(model_type=model_type, topk_method=None, scoring_func=None))
    assert (config.topk_method, config.scoring_func) == ("noaux_tc", "sigmoid")


@pytest.mark.parametrize(
    ("first_dense", "frequency", "moe_layers"),
    [(0, 1, "MMMM"), (1, 1, "DMMM"), (1, 2, "DDMD"), (0, 3, "MDDM"), (4, 1, "DDDD")],
)
def test_places_experts_by_first_dense_and_frequency(first_dense, frequency, moe_layers):
    values = v3_config(num_hidden_layers=4, first_k_dense_replace=first_dense, moe_layer_freq=frequency)
    config = ModelConfig.from_dict(values)
    assert "".join("DM"[is_moe] for is_moe in config.moe_layers) == moe_layers


def test_a_model_without_experts_is_all_dense():
    config = ModelConfig.from_dict(v3_config(n_routed_experts=None))
    assert config.moe_layers == (False, False)


def test_no_scaling_is_plain_rope():
    assert ModelConfig.from_dict(v3_config(rope_scaling=None)).yarn is None


def test_rope_parameters_say_the_same_as_rope_scaling():
    old = ModelConfig.from_dict(v3_config(rope_theta=5e4))
    parameters = yarn(rope_type="yarn", rope_theta=5e4)
    del parameters["type"]
    new = ModelConfig.from_dict(v3_config(rope_theta=None, rope_scaling=None, rope_parameters=parameters))
    assert old == new


def test_reads_fp8_and_its_scale_format():
    plain = ModelConfig.from_dict(v3_config(quantization_config=FP8))
    rounded = ModelConfig.from_dict(v3_config(quantization_config=FP8 | {"scale_fmt": "ue8m0"}))
    assert (plain.is_fp8, plain.rounds_activation_scales) == (True, False)
    assert (rounded.is_fp8, rounded.rounds_activation_scales) == (True, True)


def test_several_end_tokens():
    assert ModelConfig.from_dict(v3_config(eos_token_id=[1, 7])).eos_token_ids == (1, 7)
    assert ModelConfig.from_dict(v3_config(eos_token_id=None)).eos_token_ids == ()


def test_the_fingerprint_follows_every_field():
    changes = [{}, {"rope_theta": 2e4}, {"rms_norm_eps": 1e-5}, {"vocab_size": 97}, {"rope_scaling": yarn(factor=5.0)}]
    configs = [ModelConfig.from_dict(v3_config(**each)) for each in changes]
    assert len({config.fingerprint for config in configs}) == len(changes)
    assert configs[0].fingerprint == ModelConfig.from_dict(v3_config()).fingerprint


@pytest.mark.parametrize("text", [b"{", b"[]", b"3", b"\xff\xfe", b""])
def test_a_damaged_config_file_is_an_invalid_checkpoint(tmp_path, text):
    (tmp_path / "config.json").write_bytes(text)
    with pytest.raises(InvalidCheckpoint, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


def test_a_missing_config_file_is_an_invalid_checkpoint(tmp_path):
    with pytest.raises(InvalidCheckpoint, match=r"config\.json"):
        ModelConfig.from_folder(tmp_path)


@pytest.mark.parametrize("field", ["rope_scaling", "rope_parameters", "quantization_config"])
@pytest.mark.parametrize("value", ["yarn", 3, [1]])
def test_another_type_in_place_of_an_object_is_refused_by_name(field, value):
    with pytest.raises(UnsupportedConfig) as caught:
        ModelConfig.from_dict(v3_config(**({"rope_scaling": None} | {field: value})))
    assert caught.value.field.startswith(field)


def test_infinite_numbers_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(v3_config(rope_theta=float("inf"))))
    with pytest.raises(UnsupportedConfig) as caught:
        ModelConfig.from_folder(tmp_path)
    assert caught.value.field == "rope_theta"
