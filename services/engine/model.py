"""The model: embedding, layers, norm, head. One forward pass over a batch of chunks.

h += attention(input_layernorm(h));  h += mlp(post_attention_layernorm(h));  logits = lm_head(norm(h))
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.engine.attention import Attention, Projections
from services.engine.batch import Batch
from services.engine.config import ModelConfig
from services.engine.layers import MLP, Linear, PackedWeight, RMSNorm
from services.engine.moe import Experts, Fp8Experts, MoE, feed_forward
from services.engine.rotary import RotaryEmbedding


class DecoderLayer(nn.Module):
    """One layer; its feed-forward is dense or a mixture of experts."""

    def __init__(
        self, config: ModelConfig, index: int, dtype: torch.dtype, device: torch.device | str, *, keeps_fp8: bool
    ) -> None:
        super().__init__()
        size = config.hidden_size
        self.input_layernorm = RMSNorm(size, config.rms_norm_eps, dtype, device)
        self.self_attn = Projections(config, dtype, device, keeps_fp8=keeps_fp8)
        self.post_attention_layernorm = RMSNorm(size, config.rms_norm_eps, dtype, device)
        if config.moe_layers[index]:
            self.mlp: nn.Module = MoE(config, dtype, device, keeps_fp8=keeps_fp8)
        else:
            self.mlp = feed_forward(config, config.intermediate_size, dtype, device, keeps_fp8=keeps_fp8)


class Embedding(nn.Module):
    """Token ids [T] to [T, D]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        weight = torch.empty(config.vocab_size, config.hidden_size, dtype=dtype, device=device)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, token_ids: Tensor) -> Tensor:
        return F.embedding(token_ids, self.weight)


class Backbone(nn.Module):
    """What the checkpoint calls `model`."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, *, keeps_fp8: bool) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config, dtype, device)
        self.layers = nn.ModuleList(
            DecoderLayer(config, i, dtype, device, keeps_fp8=keeps_fp8) for i in range(config.num_hidden_layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, dtype, device)

    @property
    def decoder_layers(self) -> list[DecoderLayer]:
        return cast(list[DecoderLayer], list(self.layers))


class DeepseekForCausalLM(nn.Module):
    """DeepSeek-V2 or V3. Weights are uninitialised until weights.py fills them.

    keeps_fp8: weights that the checkpoint has in FP8 stay so and are computed with (W8A8); otherwise they are
    dequantised while loading. kv_b_proj is always dequantised: the absorbed form needs its numbers.
    """

    def __init__(
        self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, *, keeps_fp8: bool = False
    ) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config, dtype, device, keeps_fp8=keeps_fp8)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, dtype, device)
        self._packed_head: PackedWeight | None = None

    def forward(self, batch: Batch, rotary: RotaryEmbedding, attention: Attention) -> Tensor:
        """Computes the batch, stores its KV through `attention`; returns logits [len(batch.logits_rows), vocab]."""
        cos, sin = rotary.at(batch.positions)
        h = self.model.embed_tokens(batch.token_ids)
        for index, layer in enumerate(self.model.decoder_layers):
            x = layer.input_layernorm(h)
            projections = layer.self_attn
            q, latents = projections.queries(x, cos, sin), projections.latents(x, cos, sin)
            attended = attention.attend(index, projections, q, latents, batch)
            h = h + projections.o_proj(attended.flatten(1))
            h = h + layer.mlp(layer.post_attention_layernorm(h))
        h = self.model.norm(h.index_select(0, batch.logits_rows))
        return self._head(h)

    def _head(self, h: Tensor) -> Tensor:
        if not self.config.tie_word_embeddings:
            logits: Tensor = self.lm_head(h)
            return logits
        return F.linear(h, self.model.embed_tokens.weight) if self._packed_head is None else self._packed_head(h)

    def pack(self) -> None:
        """For a CPU, once the weights are loaded: puts them into the order that its matrix product reads."""
        for module in self.modules():
            if isinstance(module, Projections):
                module.pack()
                module.kv_b_proj.pack()
        for module in self.modules():
            if isinstance(module, Experts | Linear) and not module.is_packed:
                module.pack()
        if self.config.tie_word_embeddings:
            self._packed_head = PackedWeight(self.model.embed_tokens.weight)

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Where each tensor of the checkpoint goes, by its name there; views of the parameters."""
        views: dict[str, Tensor] = {}
        covered: set[str] = set()
        for prefix, module in self.named_modules():
            if isinstance(module, MLP | Experts | Fp8Experts):
                views |= {f"{prefix}.{name}": view for name, view in module.checkpoint_views().items()}
                covered.add(prefix + ".")
        for name, parameter in self.named_parameters():
            if not any(name.startswith(prefix) for prefix in covered):
                views[name] = parameter.data
        return views
