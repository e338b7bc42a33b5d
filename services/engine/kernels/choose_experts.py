"""The router of a mixture of experts: which K experts a token passes through, and with what weights.

T tokens, D model, E experts, K chosen ones, in G groups of which the best few are kept (DeepSeek-V2 section 2.1.2,
DeepSeek-V3 section 2.1.2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F


@dataclass(frozen=True)
class Routing:
    """How experts are chosen. is_sigmoid: scores by sigmoid instead of softmax.

    num_groups, num_kept_groups: only experts of the best groups can be chosen. sums_best_two: a group is as good as its
    two best experts together instead of its best one. norms: the weights of a token are scaled to a sum of 1.
    factor: all weights are multiplied by it.
    """

    num_chosen: int
    is_sigmoid: bool
    num_groups: int
    num_kept_groups: int
    sums_best_two: bool
    norms: bool
    factor: float


def choose_experts(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [T, D], router weight [E, D] fp32, bias [E] fp32 (counts for the choice only): ids [T, K], weights [T, K] fp32.

    Everything in fp32. Of equal experts the first is chosen. The order of a token's experts means nothing.
    """
    if x.is_cuda:
        from services.engine.kernels.choose_experts_triton import choose_experts_triton

        return choose_experts_triton(x, weight, bias, routing)
    return choose_experts_reference(x, weight, bias, routing)


def choose_experts_reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """`choose_experts` in plain PyTorch (in float64 for a float64 weight)."""
    logits = F.linear(x.to(weight.dtype), weight)
    scores = logits.sigmoid() if routing.is_sigmoid else logits.softmax(dim=-1)
    choice = scores if bias is None else scores + bias
    if routing.num_kept_groups < routing.num_groups:
        grouped = choice.unflatten(-1, (routing.num_groups, -1))
        merit = grouped.topk(2, dim=-1).values.sum(-1) if routing.sums_best_two else grouped.amax(-1)
        kept = merit.sort(dim=-1, descending=True, stable=True).indices[:, : routing.num_kept_groups]
        dropped = torch.ones_like(merit, dtype=torch.bool).scatter_(-1, kept, False)
        choice = grouped.masked_fill(dropped.unsqueeze(-1), float("-inf")).flatten(-2)
    ids = choice.sort(dim=-1, descending=True, stable=True).indices[:, : routing.num_chosen]
    weights: torch.Tensor = scores.gather(-1, ids)
    if routing.norms:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return ids, weights * routing.factor
