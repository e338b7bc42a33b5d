"""The forward pass for a GPU: as model.py has it, in fewer and larger operations, over a step of any chunks.

The same weights: where two products read the same numbers, their weights are laid side by side, and what the modules
hold becomes a view of that. Shapes: T tokens, D model, H heads, N nope, R rope, C latent, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from services.engine.attention import Projections
from services.engine.config import LATENT_NORM_EPS, ModelConfig
from services.engine.fused_attention import FusedAttention, Projected
from services.engine.kernels.add_rms_norm import add_rms_norm
from services.engine.kernels.choose_experts import Routing, choose_experts
from services.engine.kernels.embed_tokens import embed_tokens
from services.engine.kernels.fp8_linear import SCALE_BLOCK, fp8_linear
from services.engine.kernels.linear import linear
from services.engine.kernels.mla_store import mla_store
from services.engine.kernels.moe_experts import moe_experts
from services.engine.kernels.silu_mul import silu_mul
from services.engine.kv_cache import KVCache
from services.engine.layers import MLP, Fp8Linear, Fp8MLP, Linear
from services.engine.model import DeepseekForCausalLM
from services.engine.moe import Fp8Experts, MoE
from services.engine.rotary import RotaryEmbedding
from services.engine.step import Step

Product = Callable[[Tensor], Tensor]

# Few tokens leave most of the card idle: the shared experts then run beside the routed ones.
_FEW_TOKENS = 256


class FusedModel:
    """One model's weights, ready to compute steps against one cache."""

    def __init__(self, model: DeepseekForCausalLM, cache: KVCache, rotary: RotaryEmbedding) -> None:
        self._model = model
        self._config = model.config
        self._cache = cache
        self._rotary = rotary
        self._attention = FusedAttention(model.config, cache)
        self._routing = routing_of(model.config)
        device = cache.pool.device
        self._beside = torch.cuda.Stream(device) if device.type == "cuda" else None
        rounds = model.config.rounds_activation_scales
        self._projections: list[tuple[Product, int]] = []
        self._output_projections: list[Product] = []
        self._feed_forwards: list[Product] = []
        self._layers = model.model.decoder_layers
        for layer in self._layers:
            self._projections.append(_first_projection(layer.self_attn, rounds))
            self._output_projections.append(_product(layer.self_attn.o_proj))
            self._feed_forwards.append(self._feed_forward(layer.mlp, rounds))

    def __call__(self, step: Step, sampled_ids: Tensor, out: Tensor | None = None) -> Tensor:
        """Stores the step's KV and returns the logits of its rows, [rows, V], in `out` if given.

        sampled_ids: those of the step before, see `embed_tokens`.
        """
        return self.logits(*self.hidden(step, sampled_ids), step.logits_rows, out)

    def hidden(self, step: Step, sampled_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Stores the step's KV and returns the residual stream [T, D], and what the last layer adds to it, [T, D]."""
        h = embed_tokens(step.token_ids, sampled_ids, self._model.model.embed_tokens.weight)
        delta: Tensor | None = None
        for index, layer in enumerate(self._layers):
            projected = self._project(index, h, delta, step)
            attended = h.new_empty(len(h), self._config.num_attention_heads, self._config.v_head_dim)
            self._attention.attend(index, layer.self_attn, projected, step, attended)
            delta = self._output_projections[index](attended.flatten(1))
            norm = layer.post_attention_layernorm
            delta = self._feed_forwards[index](add_rms_norm(h, delta, norm.weight, norm.eps))
        assert delta is not None, "a model has layers"
        return h, delta

    def logits(self, h: Tensor, delta: Tensor, rows: Tensor | None, out: Tensor | None = None) -> Tensor:
        """Of the residual stream's rows (None: all), [rows, V]."""
        norm = self._model.model.norm
        if rows is not None:
            h, delta = h.index_select(0, rows), delta.index_select(0, rows)
        x = add_rms_norm(h, delta, norm.weight, norm.eps)
        head = self._model.model.embed_tokens if self._config.tie_word_embeddings else self._model.lm_head
        return torch.mm(x, head.weight.t(), out=out)

    def _project(self, index: int, h: Tensor, delta: Tensor | None, step: Step) -> Projected:
        """From the residual stream and what the layer before adds to it to this layer's queries and stored latents."""
        config, layer = self._config, self._layers[index]
        projections = layer.self_attn
        x = add_rms_norm(h, delta, layer.input_layernorm.weight, layer.input_layernorm.eps)
        product, num_first = self._projections[index]
        projected = product(x)
        first, latents = projected[:, :num_first], projected[:, num_first:]
        if config.q_lora_rank is not None:
            first = add_rms_norm(first, None, projections.q_a_layernorm.weight, projections.q_a_layernorm.eps)
            first = projections.q_b_proj(first)
        q = first.unflatten(-1, (config.num_attention_heads, -1))
        absorbed = q.new_empty(step.num_rows, q.shape[1], config.kv_lora_rank + config.qk_rope_head_dim)
        mla_store(
            q,
            latents,
            projections.kv_a_layernorm.weight,
            LATENT_NORM_EPS,
            step.positions,
            self._rotary.cos,
            self._rotary.sin,
            self._cache.pool[:, index],
            step.slots,
            projections.absorb_weights()[0],
            absorbed,
        )
        return Projected(q, latents, absorbed)

    def _feed_forward(self, mlp: nn.Module, rounds: bool) -> Product:
        if not isinstance(mlp, MoE):
            return _dense(mlp, rounds)
        shared = _dense(mlp.shared_experts, rounds) if mlp.shared_experts is not None else None
        experts, router = mlp.experts, mlp.gate
        up_scale, down_scale = None, None
        if isinstance(experts, Fp8Experts):
            up_scale, down_scale = experts.gate_up_scale, experts.down_scale

        def mixture(x: Tensor) -> Tensor:
            side = self._beside if len(x) <= _FEW_TOKENS else None
            if shared is None or side is None:
                added = shared(x) if shared is not None else None
                ids, weights = choose_experts(x, router.weight, router.e_score_correction_bias, self._routing)
                return moe_experts(x, experts.gate_up, experts.down, ids, weights, up_scale, down_scale, rounds, added)
            # The shared experts run beside the routed ones; beside the router they would only hold it up.
            ids, weights = choose_experts(x, router.weight, router.e_score_correction_bias, self._routing)
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                added = shared(x)
                is_added = side.record_event()
            return moe_experts(
                x, experts.gate_up, experts.down, ids, weights, up_scale, down_scale, rounds, added, is_added
            )

        return mixture


def routing_of(config: ModelConfig) -> Routing:
    """How this model chooses experts."""
    has_groups = config.topk_method != "greedy" and config.topk_group < config.n_group
    return Routing(
        num_chosen=config.num_experts_per_tok,
        is_sigmoid=config.scoring_func == "sigmoid",
        num_groups=config.n_group if has_groups else 1,
        num_kept_groups=config.topk_group if has_groups else 1,
        sums_best_two=config.topk_method == "noaux_tc",
        norms=config.norm_topk_prob,
        factor=config.routed_scaling_factor,
    )


def _first_projection(projections: Projections, rounds: bool) -> tuple[Product, int]:
    """Queries (or their latent) and the keys' latent in one product, and how many numbers come first."""
    first = projections.q_proj if hasattr(projections, "q_proj") else projections.q_a_proj
    return _joined(first, projections.kv_a_proj_with_mqa, rounds), first.weight.shape[0]


def _joined(first: Linear | Fp8Linear, second: Linear | Fp8Linear, rounds: bool) -> Product:
    """Both products of the same input, one after another in each row."""
    if isinstance(first, Linear) and isinstance(second, Linear):
        both = _side_by_side(first.weight, second.weight)
        return lambda x: linear(x, both)
    assert isinstance(first, Fp8Linear)
    assert isinstance(second, Fp8Linear)
    if first.weight.shape[0] % SCALE_BLOCK:  # the second's scales would begin within a block
        return lambda x: torch.cat((first(x), second(x)), dim=-1)
    both = _side_by_side(first.weight, second.weight)
    scales = _side_by_side(first.weight_scale_inv, second.weight_scale_inv)
    return lambda x: fp8_linear(x, both, scales, rounds)


def _side_by_side(first: nn.Parameter, second: nn.Parameter) -> Tensor:
    both = torch.cat((first.data.view(_BYTES), second.data.view(_BYTES))).view(first.dtype)
    first.data, second.data = both.split((first.shape[0], second.shape[0]))
    return both


_BYTES = torch.uint8  # what torch.cat takes whatever the weights' type


def _dense(mlp: nn.Module, rounds: bool) -> Product:
    if isinstance(mlp, Fp8MLP):
        gate_up = _joined(mlp.gate_proj, mlp.up_proj, rounds)
    else:
        assert isinstance(mlp, MLP)
        gate_up = _product(mlp.gate_up)
    down = _product(mlp.down_proj)
    return lambda x: down(silu_mul(gate_up(x)))


def _product(module: Linear | Fp8Linear) -> Product:
    if isinstance(module, Linear):
        return lambda x: linear(x, module.weight)
    return module
