"""The architecture, read from a checkpoint's config.json. Field names are the checkpoint's.

Whatever cannot be computed exactly is refused with the field's name (UnsupportedConfig), never approximated.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common.errors import InvalidCheckpoint, UnsupportedConfig

MODEL_TYPES = ("deepseek_v2", "deepseek_v3", "kimi_k2")
ARCHITECTURES = ("DeepseekV2ForCausalLM", "DeepseekV3ForCausalLM")
FP8_BLOCK = 128

# q_a_layernorm and kv_a_layernorm use this epsilon whatever rms_norm_eps says: so do DeepSeek's model code and
# transformers, and it matters for Moonlight (rms_norm_eps 1e-5).
LATENT_NORM_EPS = 1e-6


@dataclass(frozen=True, slots=True)
class YarnConfig:
    """YaRN (Peng et al. 2023) as DeepSeek's checkpoints parametrise it. None of mscale means: not in the file."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float
    beta_slow: float
    mscale: float | None
    mscale_all_dim: float | None


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A DeepSeek-V2/V3 architecture.

    moe_layers: per layer, whether its feed-forward is a mixture of experts.
    is_fp8: linear weights are e4m3 with one fp32 scale a 128x128 block.
    num_nextn_predict_layers: multi-token-prediction layers in the file.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    q_lora_rank: int | None
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    moe_layers: tuple[bool, ...]
    n_routed_experts: int
    n_shared_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    topk_method: str
    scoring_func: str
    norm_topk_prob: bool
    routed_scaling_factor: float
    n_group: int
    topk_group: int
    rms_norm_eps: float
    rope_theta: float
    yarn: YarnConfig | None
    max_position_embeddings: int
    tie_word_embeddings: bool
    torch_dtype: str
    is_fp8: bool
    rounds_activation_scales: bool
    num_nextn_predict_layers: int
    eos_token_ids: tuple[int, ...]

    @property
    def qk_head_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def fingerprint(self) -> bytes:
        """Changes with every field: part of the seed of the prefix hashes."""
        return hashlib.sha256(repr(self).encode()).digest()

    @classmethod
    def from_folder(cls, folder: Path | str) -> ModelConfig:
        """Reads FOLDER/config.json (or the file itself). Raises InvalidCheckpoint or UnsupportedConfig."""
        path = Path(folder)
        if path.is_dir():
            path = path / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidCheckpoint(path.name, f"cannot be read: {error.strerror}") from error
        except ValueError as error:
            raise InvalidCheckpoint(path.name, f"not JSON: {error}") from error
        if not isinstance(values, dict):
            raise InvalidCheckpoint(path.name, "not a JSON object")
        return cls.from_dict(values)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ModelConfig:
        """Checks the fields of a config.json. Raises UnsupportedConfig naming the first that cannot be served."""
        fields = _Fields(values)
        model_type = fields.choice("model_type", MODEL_TYPES)
        for architecture in values.get("architectures") or ():
            if architecture not in ARCHITECTURES:
                raise UnsupportedConfig("architectures", f"{architecture!r} is not one of {', '.join(ARCHITECTURES)}")
        fields.refuse_unless("hidden_act", "silu", default="silu")
        fields.refuse_unless("attention_bias", False, default=False)
        fields.refuse_unless("rope_interleave", True, default=True)
        num_layers = fields.positive("num_hidden_layers")
        heads = fields.positive("num_attention_heads")
        fields.refuse_unless("num_key_value_heads", heads, default=heads)
        theta, yarn = _rope(fields)
        rope_dim = fields.positive("qk_rope_head_dim")
        if rope_dim % 2:
            raise UnsupportedConfig("qk_rope_head_dim", f"must be even, got {rope_dim}")
        is_fp8, rounds = _quantization(fields.mapping("quantization_config"))
        return cls(
            model_type=model_type,
            vocab_size=fields.positive("vocab_size"),
            hidden_size=fields.positive("hidden_size"),
            intermediate_size=fields.positive("intermediate_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=heads,
            q_lora_rank=None if values.get("q_lora_rank") is None else fields.positive("q_lora_rank"),
            kv_lora_rank=fields.positive("kv_lora_rank"),
            qk_nope_head_dim=fields.positive("qk_nope_head_dim"),
            qk_rope_head_dim=rope_dim,
            v_head_dim=fields.positive("v_head_dim"),
            rms_norm_eps=fields.number("rms_norm_eps", default=1e-6),
            rope_theta=theta,
            yarn=yarn,
            max_position_embeddings=fields.positive("max_position_embeddings"),
            tie_word_embeddings=fields.flag("tie_word_embeddings", default=False),
            torch_dtype=str(values.get("torch_dtype") or values.get("dtype") or "bfloat16"),
            is_fp8=is_fp8,
            rounds_activation_scales=rounds,
            num_nextn_predict_layers=fields.count("num_nextn_predict_layers", default=0),
            eos_token_ids=_eos(values.get("eos_token_id")),
            **_experts(fields, model_type, num_layers),
        )


def _experts(fields: _Fields, model_type: str, num_layers: int) -> dict[str, Any]:
    """The fields of the mixture of experts; a model without routed experts gets zeros."""
    if fields.values.get("n_routed_experts") is None:
        return {
            "moe_layers": (False,) * num_layers, "n_routed_experts": 0, "n_shared_experts": 0, "num_experts_per_tok": 0,
            "moe_intermediate_size": 0, "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False,
            "routed_scaling_factor": 1.0, "n_group": 1, "topk_group": 1,
        }  # fmt: skip
    is_v2 = model_type == "deepseek_v2"
    method = fields.choice(
        "topk_method", ("greedy", "group_limited_greedy", "noaux_tc"), default="greedy" if is_v2 else "noaux_tc"
    )
    scoring = fields.choice(
        "scoring_func", ("softmax", "sigmoid"), default="sigmoid" if method == "noaux_tc" else "softmax"
    )
    if (method == "noaux_tc") != (scoring == "sigmoid"):
        raise UnsupportedConfig("scoring_func", f"{scoring!r} is not defined together with topk_method {method!r}")
    normalises = fields.flag("norm_topk_prob", default=method == "noaux_tc")
    if normalises and scoring == "softmax":
        raise UnsupportedConfig("norm_topk_prob", "published implementations disagree about it for softmax scores")
    experts, top_k = fields.positive("n_routed_experts"), fields.positive("num_experts_per_tok")
    if top_k > experts:
        raise UnsupportedConfig("num_experts_per_tok", f"{top_k} of {experts} experts")
    groups, top_groups = fields.positive("n_group", default=1), fields.positive("topk_group", default=1)
    if method != "greedy":
        if experts % groups or (method == "noaux_tc" and experts // groups < 2):
            raise UnsupportedConfig("n_group", f"{experts} experts do not fall into {groups} groups")
        if top_groups > groups or top_k > top_groups * (experts // groups):
            raise UnsupportedConfig("topk_group", f"{top_groups} of {groups} groups cannot give {top_k} experts")
    first_dense = fields.count("first_k_dense_replace", default=0)
    frequency = fields.positive("moe_layer_freq", default=1)
    return {
        "moe_layers": tuple(i >= first_dense and i % frequency == 0 for i in range(num_layers)),
        "n_routed_experts": experts,
        "n_shared_experts": fields.count("n_shared_experts", default=0),
        "num_experts_per_tok": top_k,
        "moe_intermediate_size": fields.positive("moe_intermediate_size"),
        "topk_method": method,
        "scoring_func": scoring,
        "norm_topk_prob": normalises,
        "routed_scaling_factor": fields.number("routed_scaling_factor", default=1.0),
        "n_group": groups,
        "topk_group": top_groups,
    }


def _rope(fields: _Fields) -> tuple[float, YarnConfig | None]:
    """rope_theta and the scaling, from rope_scaling (hub files) or rope_parameters (transformers 5)."""
    parameters = fields.mapping("rope_parameters") or {}
    scaling = fields.mapping("rope_scaling") or parameters
    theta = fields.values.get("rope_theta", parameters.get("rope_theta", 10000.0))
    theta = _Fields({"rope_theta": theta}).number("rope_theta")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    where = "rope_scaling" if fields.values.get("rope_scaling") else "rope_parameters"
    if kind == "default":
        return theta, None
    if kind != "yarn":
        raise UnsupportedConfig(f"{where}.type", f"{kind!r} is not one of default, yarn")
    for name, harmless in (("attention_factor", None), ("truncate", True)):
        if scaling.get(name, harmless) != harmless:
            raise UnsupportedConfig(f"{where}.{name}", f"{scaling[name]!r} is not supported")
    yarn = _Fields(scaling, prefix=f"{where}.")
    factor = yarn.number("factor")
    if factor < 1:
        raise UnsupportedConfig(f"{where}.factor", f"must be at least 1, got {factor}")
    return theta, YarnConfig(
        factor=factor,
        original_max_position_embeddings=yarn.positive("original_max_position_embeddings"),
        beta_fast=yarn.number("beta_fast", default=32.0),
        beta_slow=yarn.number("beta_slow", default=1.0),
        mscale=None if scaling.get("mscale") is None else yarn.number("mscale"),
        mscale_all_dim=None if scaling.get("mscale_all_dim") is None else yarn.number("mscale_all_dim"),
    )


def _quantization(values: Mapping[str, Any] | None) -> tuple[bool, bool]:
    """(weights are FP8, activation scales are rounded up to powers of two)."""
    if values is None:
        return False, False
    fields = _Fields(values, prefix="quantization_config.")
    fields.refuse_unless("quant_method", "fp8")
    fields.refuse_unless("fmt", "e4m3", default="e4m3")
    fields.refuse_unless("activation_scheme", "dynamic", default="dynamic")
    fields.refuse_unless("weight_block_size", [FP8_BLOCK, FP8_BLOCK])
    return True, fields.choice("scale_fmt", ("float", "ue8m0"), default="float") == "ue8m0"


def _eos(value: Any) -> tuple[int, ...]:
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(each, int) for each in ids):
        raise UnsupportedConfig("eos_token_id", f"token ids are whole numbers, got {value!r}")
    return tuple(ids)


_MISSING = object()


class _Fields:
    """Typed access to a mapping; every complaint names the field."""

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self._prefix = prefix

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is _MISSING:
                raise UnsupportedConfig(self._prefix + name, "is missing")
            return default
        return value

    def positive(self, name: str, default: Any = _MISSING) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UnsupportedConfig(self._prefix + name, f"must be a positive whole number, got {value!r}")
        return value

    def count(self, name: str, default: int) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UnsupportedConfig(self._prefix + name, f"must be a whole number of 0 or more, got {value!r}")
        return value

    def number(self, name: str, default: Any = _MISSING) -> float:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UnsupportedConfig(self._prefix + name, f"must be a positive number, got {value!r}")
        return float(value)

    def mapping(self, name: str) -> Mapping[str, Any] | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise UnsupportedConfig(self._prefix + name, f"must be an object, got {value!r}")
        return value

    def flag(self, name: str, default: bool) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise UnsupportedConfig(self._prefix + name, f"must be true or false, got {value!r}")
        return value

    def choice(self, name: str, known: tuple[str, ...], default: Any = _MISSING) -> str:
        value = self._get(name, default)
        if value not in known:
            raise UnsupportedConfig(self._prefix + name, f"{value!r} is not one of {', '.join(known)}")
        return str(value)

    def refuse_unless(self, name: str, wanted: Any, default: Any = _MISSING) -> None:
        value = self._get(name, default)
        if value != wanted:
            raise UnsupportedConfig(self._prefix + name, f"{value!r} is not supported, only {wanted!r}")
