"""Tiny checkpoints that transformers itself writes and computes: shapes of published models, random weights."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2MLP

_SIZES = {
    "vocab_size": 384, "hidden_size": 96, "intermediate_size": 160, "moe_intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 4, "kv_lora_rank": 48, "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16, "v_head_dim": 24, "hidden_act": "silu", "attention_bias": False, "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0, "rope_scaling": None, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "torch_dtype": "bfloat16", "first_k_dense_replace": 1, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1,
    "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_V2 = _SIZES | {
    "architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "scoring_func": "softmax",
    "norm_topk_prob": False, "topk_method": "greedy", "q_lora_rank": None, "n_routed_experts": 12,
    "n_shared_experts": 2, "num_experts_per_tok": 4, "routed_scaling_factor": 1.0,
}  # fmt: skip
_V3 = _SIZES | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "scoring_func": "sigmoid",
    "norm_topk_prob": True, "topk_method": "noaux_tc", "q_lora_rank": 40, "n_routed_experts": 12,
    "n_shared_experts": 1, "num_experts_per_tok": 4, "routed_scaling_factor": 2.5,
}  # fmt: skip


def _yarn(factor: float, original: int, **others: float) -> dict[str, Any]:
    return {
        "type": "yarn", "factor": factor, "original_max_position_embeddings": original,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
    } | others  # fmt: skip


CONFIGS: dict[str, dict[str, Any]] = {
    # Queries through a latent too, experts chosen in groups, values of another width than keys.
    "v2": _V2 | {
        "q_lora_rank": 40, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "routed_scaling_factor": 16.0, "v_head_dim": 20, "rope_scaling": _yarn(40.0, 64),
    },
    # No YaRN, and an epsilon that the latents' norms do not share.
    "moonlight": _V3 | {
        "q_lora_rank": None, "n_shared_experts": 2, "rms_norm_eps": 1e-5, "rope_theta": 50000.0,
        "routed_scaling_factor": 2.446,
    },
    # YaRN without a ramp (both betas 1), many experts in one group.
    "kimi": _V3 | {
        "n_routed_experts": 48, "num_experts_per_tok": 8, "routed_scaling_factor": 2.827, "rope_theta": 50000.0,
        "rope_scaling": _yarn(32.0, 64, beta_fast=1.0),
    },
    "tied": _V3 | {"tie_word_embeddings": True},
    # mscale and mscale_all_dim apart: cos and sin have an amplitude.
    "mscales": _V2 | {"rope_scaling": _yarn(8.0, 64, mscale=0.7, mscale_all_dim=1.2)},
    "every_other_layer": _V2 | {"num_hidden_layers": 5, "moe_layer_freq": 2},
    "dense": _V3 | {"first_k_dense_replace": 3},
}  # fmt: skip


@dataclass(frozen=True)
class Made:
    """A checkpoint's folder, and the same model in transformers: fp32, eager attention."""

    folder: Path
    model: nn.Module

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> Tensor:
        """[T, vocab] of one pass over the whole text."""
        return self.model(input_ids=torch.tensor([token_ids])).logits[0]

    @torch.no_grad()
    def greedy(self, prompt: list[int], num_tokens: int) -> list[int]:
        """The best next token, again and again."""
        tokens, cache, fresh = [], None, prompt
        for _ in range(num_tokens):
            out = self.model(input_ids=torch.tensor([fresh]), past_key_values=cache, use_cache=True)
            cache, fresh = out.past_key_values, [int(out.logits[0, -1].argmax())]
            tokens += fresh
        return tokens


def make(folder: Path, config: Mapping[str, Any], seed: int = 0, max_shard_size: str = "1GB") -> Made:
    """Writes config.json (as on the hub) and weights (bf16, by transformers) into FOLDER."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(dict(config))
    (folder / "config.json").write_text(text)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="eager")
    for index, layer in enumerate(model.model.layers):
        if index >= config["first_k_dense_replace"] and index % config["moe_layer_freq"]:
            layer.mlp = DeepseekV2MLP(model.config)  # transformers does not know the field
    _randomise(model, torch.Generator().manual_seed(seed))
    _randomise_biases(model, torch.Generator().manual_seed(seed + 1))
    _cast_parameters(model, torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    _cast_parameters(model, torch.float32)
    (folder / "config.json").write_text(text)  # save_pretrained writes its own dialect
    return Made(folder, model.eval())


def _cast_parameters(model: nn.Module, dtype: torch.dtype) -> None:
    """Not the buffers: rotary frequencies must never be rounded, and routing biases are published in fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def _randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Norms around 1, everything else such that products keep their size: each part then shows in the logits."""
    for name, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            noise = 1 + 0.2 * noise
        elif "embed_tokens" not in name:
            noise *= parameter.shape[-1] ** -0.5
        if "kv_a_proj" in name:
            noise *= 0.05  # so small that the epsilon of the norm after it counts
        parameter.copy_(noise)


@torch.no_grad()
def _randomise_biases(model: nn.Module, generator: torch.Generator) -> None:
    """Mostly below zero: an expert of a dropped group, at zero, would win over one that is kept."""
    for name, buffer in sorted(model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            module, _, leaf = name.rpartition(".")
            bias = -0.4 + 0.25 * torch.randn(buffer.shape, generator=generator)
            setattr(model.get_submodule(module), leaf, bias)
