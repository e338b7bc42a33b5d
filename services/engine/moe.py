"""Mixture of experts: the router chooses, the experts compute, the shared expert is always there.

Shapes: T tokens, D model, E experts, K experts a token, M inner width of an expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from services.engine.config import ModelConfig
from services.engine.kernels.fp8_linear import SCALE_BLOCK
from services.engine.kernels.moe_experts import moe_experts
from services.engine.layers import MLP, Fp8MLP, PackedWeight


class Router(nn.Module):
    """Scores in fp32 and chooses K experts a token (DeepSeek-V2 section 2.1.2, DeepSeek-V3 section 2.1.2)."""

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        super().__init__()
        self.config = config
        experts = config.n_routed_experts
        self.weight = nn.Parameter(
            torch.empty(experts, config.hidden_size, dtype=torch.float32, device=device), requires_grad=False
        )
        self.e_score_correction_bias: nn.Parameter | None = None
        if config.topk_method == "noaux_tc":
            bias = torch.empty(experts, dtype=torch.float32, device=device)
            self.e_score_correction_bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, D] to expert ids [T, K] int64 and their weights [T, K] fp32."""
        config = self.config
        logits = F.linear(x.float(), self.weight)
        scores = logits.sigmoid() if config.scoring_func == "sigmoid" else logits.softmax(dim=-1)
        choice = scores if self.e_score_correction_bias is None else scores + self.e_score_correction_bias
        if config.topk_method != "greedy" and config.topk_group < config.n_group:
            choice = self._best_groups_only(choice)
        ids = choice.topk(config.num_experts_per_tok, dim=-1, sorted=False).indices
        weights: Tensor = scores.gather(-1, ids)
        if config.norm_topk_prob:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        return ids, weights * config.routed_scaling_factor

    def _best_groups_only(self, choice: Tensor) -> Tensor:
        """Puts experts outside the best topk_group groups at -inf, so that no kept one can lose to them."""
        config = self.config
        grouped = choice.unflatten(-1, (config.n_group, -1))
        if config.topk_method == "noaux_tc":
            group_scores = grouped.topk(2, dim=-1).values.sum(dim=-1)
        else:
            group_scores = grouped.amax(dim=-1)
        kept = group_scores.topk(config.topk_group, dim=-1, sorted=False).indices
        dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter_(-1, kept, False)
        kept_only: Tensor = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf"))
        return kept_only.flatten(-2)


class Experts(nn.Module):
    """All routed experts of a layer, their weights stacked: gate_up [E, 2M, D], down [E, D, M]."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str) -> None:
        super().__init__()
        num, inner, size = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        self.num_experts = num
        self.gate_up = nn.Parameter(torch.empty(num, 2 * inner, size, dtype=dtype, device=device), requires_grad=False)
        self.down = nn.Parameter(torch.empty(num, size, inner, dtype=dtype, device=device), requires_grad=False)

        self._packed: list[tuple[PackedWeight, PackedWeight]] = []

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """sum over k of weights[t, k] * expert ids[t, k](x[t]); accumulated in fp32, [T, D] in the dtype of x."""
        if x.is_cuda:
            return moe_experts(x, self.gate_up, self.down, ids, weights)
        num_tokens, top_k = ids.shape
        if num_tokens == 1:
            outputs = self._compute(ids[0].tolist(), [x] * top_k)
            return (outputs.float() * weights.T).sum(dim=0, keepdim=True).to(x.dtype)
        flat = ids.flatten()
        order = flat.argsort(stable=True)
        counts = torch.bincount(flat, minlength=self.num_experts).tolist()
        chosen = [expert for expert, count in enumerate(counts) if count]
        rows = x.index_select(0, order.div(top_k, rounding_mode="floor"))
        outputs = self._compute(chosen, rows.split([counts[expert] for expert in chosen]))
        # Back to token order before summing: the sum then does not depend on what else is in the batch.
        in_order = torch.empty_like(outputs).index_copy_(0, order, outputs).view(num_tokens, top_k, -1)
        return (in_order.float() * weights.unsqueeze(-1)).sum(dim=1).to(x.dtype)

    def _compute(self, experts: list[int], inputs: Sequence[Tensor]) -> Tensor:
        """Each expert's output for its own rows, one below another; what is not a product is done once for all."""
        gate_up = torch.cat([self._gate_up(expert, x) for expert, x in zip(experts, inputs, strict=True)])
        gate, up = gate_up.chunk(2, dim=-1)
        inner = (F.silu(gate) * up).split([x.shape[0] for x in inputs])
        return torch.cat([self._down(expert, x) for expert, x in zip(experts, inner, strict=True)])

    def _gate_up(self, expert: int, x: Tensor) -> Tensor:
        return self._packed[expert][0](x) if self._packed else F.linear(x, self.gate_up[expert])

    def _down(self, expert: int, x: Tensor) -> Tensor:
        return self._packed[expert][1](x) if self._packed else F.linear(x, self.down[expert])

    @property
    def is_packed(self) -> bool:
        return bool(self._packed)

    def pack(self) -> None:
        """For a CPU, once the weights are loaded; the plain weights are dropped."""
        self._packed = [
            (PackedWeight(gate_up), PackedWeight(down)) for gate_up, down in zip(self.gate_up, self.down, strict=True)
        ]
        self.gate_up.data = self.gate_up.data.new_empty(0)
        self.down.data = self.down.data.new_empty(0)

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Where the checkpoint's tensors go, by their names below this module."""
        views = {}
        for expert in range(self.num_experts):
            gate, up = self.gate_up.data[expert].chunk(2, dim=0)
            views[f"{expert}.gate_proj.weight"] = gate
            views[f"{expert}.up_proj.weight"] = up
            views[f"{expert}.down_proj.weight"] = self.down.data[expert]
        return views


class Fp8Experts(nn.Module):
    """All routed experts of a layer in e4m3 with 128x128 block scales: gate_up [E, 2M, D], down [E, D, M]."""

    def __init__(self, config: ModelConfig, device: torch.device | str) -> None:
        super().__init__()
        num, inner, size = config.n_routed_experts, config.moe_intermediate_size, config.hidden_size
        inner_blocks, size_blocks = -(-inner // SCALE_BLOCK), -(-size // SCALE_BLOCK)

        def parameter(*shape: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
            return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=False)

        self.gate_up = parameter(num, 2 * inner, size, dtype=torch.float8_e4m3fn)
        self.down = parameter(num, size, inner, dtype=torch.float8_e4m3fn)
        self.gate_up_scale = parameter(num, 2 * inner_blocks, size_blocks)
        self.down_scale = parameter(num, size_blocks, inner_blocks)
        self.num_experts = num
        self._rounds_scales = config.rounds_activation_scales

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """As Experts, with activations quantised on the way (W8A8)."""
        return moe_experts(
            x, self.gate_up, self.down, ids, weights, self.gate_up_scale, self.down_scale, self._rounds_scales
        )

    def checkpoint_views(self) -> dict[str, Tensor]:
        """Where the checkpoint's tensors go, by their names below this module."""
        views: dict[str, Tensor] = {}
        for expert in range(self.num_experts):
            gate, up = self.gate_up.data[expert].chunk(2, dim=0)
            gate_scale, up_scale = self.gate_up_scale.data[expert].chunk(2, dim=0)
            views |= {
                f"{expert}.gate_proj.weight": gate,
                f"{expert}.gate_proj.weight_scale_inv": gate_scale,
                f"{expert}.up_proj.weight": up,
                f"{expert}.up_proj.weight_scale_inv": up_scale,
                f"{expert}.down_proj.weight": self.down.data[expert],
                f"{expert}.down_proj.weight_scale_inv": self.down_scale.data[expert],
            }
        return views


class MoE(nn.Module):
    """Routed experts plus the shared expert (one MLP of n_shared_experts times the width, neither gated nor scaled)."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device | str, *, keeps_fp8: bool) -> None:
        super().__init__()
        self.gate = Router(config, device)
        self.experts = Fp8Experts(config, device) if keeps_fp8 else Experts(config, dtype, device)
        self.shared_experts: MLP | Fp8MLP | None = None
        if config.n_shared_experts:
            inner = config.n_shared_experts * config.moe_intermediate_size
            self.shared_experts = feed_forward(config, inner, dtype, device, keeps_fp8=keeps_fp8)

    def forward(self, x: Tensor) -> Tensor:
        routed: Tensor = self.experts(x, *self.gate(x))
        return routed if self.shared_experts is None else routed + self.shared_experts(x)


def feed_forward(
    config: ModelConfig, inner: int, dtype: torch.dtype, device: torch.device | str, *, keeps_fp8: bool
) -> MLP | Fp8MLP:
    """A dense feed-forward of width `inner`, its weights kept in FP8 or not."""
    if keeps_fp8:
        return Fp8MLP(config.hidden_size, inner, device, rounds_scales=config.rounds_activation_scales)
    return MLP(config.hidden_size, inner, dtype, device)
