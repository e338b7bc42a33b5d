"""A checkpoint so small that it is written anew for each test."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from services.common.settings import EngineSettings, ModelSettings
from services.engine.config import FP8_BLOCK, ModelConfig
from services.engine.engine import Engine
from services.engine.loading import load_engine
from services.engine.model import DeepseekForCausalLM
from services.engine.weights import dummy_weights

VOCABULARY = 96
EOS = 1


def v3_config(**changes: Any) -> dict[str, Any]:
    """A DeepSeek-V3 config.json; a change to None takes the field out."""
    config = {
        "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": VOCABULARY,
        "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "q_lora_rank": 16, "kv_lora_rank": 16,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1,
        "num_experts_per_tok": 2, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1,
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "routed_scaling_factor": 2.5,
        "hidden_act": "silu", "attention_bias": False, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "rope_scaling": yarn(), "max_position_embeddings": 256, "tie_word_embeddings": False,
        "torch_dtype": "bfloat16", "eos_token_id": EOS,
    } | changes  # fmt: skip
    return {name: value for name, value in config.items() if value is not None}


def v2_config(**changes: Any) -> dict[str, Any]:
    """A DeepSeek-V2-Lite config.json."""
    return v3_config(
        **{
            "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "q_lora_rank": None,
            "topk_method": "greedy", "scoring_func": "softmax", "norm_topk_prob": False, "n_group": 1,
        }
        | changes
    )  # fmt: skip


def yarn(**changes: Any) -> dict[str, Any]:
    """A rope_scaling of DeepSeek-V3's kind."""
    return {
        "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 32, "beta_slow": 1,
        "mscale": 1.0, "mscale_all_dim": 1.0,
    } | changes  # fmt: skip


FP8 = {
    "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [FP8_BLOCK, FP8_BLOCK],
}  # fmt: skip


def random_tensors(config: dict[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """All tensors of a checkpoint, by name, in fp32."""
    network = DeepseekForCausalLM(ModelConfig.from_dict(config), torch.float32, torch.device("cpu"))
    dummy_weights(network, seed)
    return {name: view.clone().contiguous() for name, view in network.checkpoint_views().items()}


def write_checkpoint(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor] | None = None) -> Path:
    """config.json and model.safetensors; returns the latter's path."""
    (folder / "config.json").write_text(json.dumps(config))
    path = folder / "model.safetensors"
    save_file(random_tensors(config) if tensors is None else tensors, path)
    return path


def tiny_engine(folder: Path, *, cache_mode: str = "absorb", kv_dtype: str = "auto", **settings: Any) -> Engine:
    """An engine of the checkpoint in FOLDER, fp32 on the CPU, blocks of 4 tokens."""
    settings = {"num_blocks": 64, "block_size": 4} | settings
    return load_engine(
        ModelSettings(path=str(folder), cache_mode=cache_mode, kv_dtype=kv_dtype),
        EngineSettings(device="cpu", **settings),
    )
