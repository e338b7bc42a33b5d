# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
"""The router on CUDA: scores by one product, then one program a token chooses.

A few tokens take a product of our own, which reads them as they are; many take cuBLAS's, in fp32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from services.engine.kernels.choose_experts import Routing
from services.engine.kernels.dependent_launch import begin_after_earlier, dependent

# Up to here our own product is the faster one.
FEW_TOKENS = 512
BLOCK_T, BLOCK_E, BLOCK_D = 16, 32, 128
# Programs that keep the card busy: the model's width is split among them.
PROGRAMS = 256


def choose_experts_triton(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, routing: Routing
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `choose_experts`; ids are int32."""
    num_tokens, num_experts = x.shape[0], weight.shape[0]
    ids = torch.empty(num_tokens, routing.num_chosen, dtype=torch.int32, device=x.device)
    weights = torch.empty(num_tokens, routing.num_chosen, dtype=torch.float32, device=x.device)
    if num_tokens == 0:
        return ids, weights
    logits = _scores(x, weight)
    has_groups = routing.num_kept_groups < routing.num_groups
    _choose[(num_tokens,)](
        logits,
        bias if bias is not None else logits,
        ids,
        weights,
        num_tokens,
        logits.shape[0],
        routing.factor,
        EXPERTS=num_experts,
        CHOSEN=routing.num_chosen,
        IS_SIGMOID=routing.is_sigmoid,
        HAS_BIAS=bias is not None,
        GROUPS=routing.num_groups if has_groups else 1,
        KEPT_GROUPS=routing.num_kept_groups if has_groups else 1,
        SUMS_TWO=routing.sums_best_two,
        NORMS=routing.norms,
        EXPERTS_POW2=triton.next_power_of_2(num_experts),
        CHOSEN_POW2=triton.next_power_of_2(routing.num_chosen),
        num_warps=1 if num_experts <= 128 else 2,
        **dependent(x.device),
    )
    return ids, weights


def _scores(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """[splits, T, E] fp32: logits, as parts to be added up."""
    num_tokens, num_experts = x.shape[0], weight.shape[0]
    if num_tokens > FEW_TOKENS:
        return F.linear(x.float(), weight).unsqueeze(0)
    if num_tokens == 1:
        logits = torch.empty(1, 1, num_experts, dtype=torch.float32, device=x.device)
        _one_row[(num_experts,)](x, weight, logits, SIZE=x.shape[1], BLOCK_D=2048, num_warps=4, **dependent(x.device))
        return logits
    num_tiles = triton.cdiv(num_tokens, BLOCK_T) * triton.cdiv(num_experts, BLOCK_E)
    num_steps = triton.cdiv(x.shape[1], BLOCK_D)
    splits = triton.next_power_of_2(max(1, min(PROGRAMS // num_tiles, num_steps)))
    logits = torch.empty(splits, num_tokens, num_experts, dtype=torch.float32, device=x.device)
    _few_rows[(triton.cdiv(num_tokens, BLOCK_T), triton.cdiv(num_experts, BLOCK_E), splits)](
        x,
        weight,
        logits,
        num_tokens,
        num_experts,
        triton.cdiv(num_steps, splits),
        SIZE=x.shape[1],
        BLOCK_T=BLOCK_T,
        BLOCK_E=BLOCK_E,
        BLOCK_D=BLOCK_D,
        num_warps=4,
        num_stages=3,
        **dependent(x.device),
    )
    return logits


@triton.jit
def _one_row(x, weight, logits, SIZE: tl.constexpr, BLOCK_D: tl.constexpr, IS_DEPENDENT: tl.constexpr):
    expert = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    at = weight + expert * SIZE + d
    first = tl.load(at, mask=d < SIZE, other=0.0)
    begin_after_earlier(IS_DEPENDENT)
    acc = first * tl.load(x + d, mask=d < SIZE, other=0.0).to(tl.float32)
    for start in tl.static_range(BLOCK_D, SIZE, BLOCK_D):
        mask = start + d < SIZE
        w = tl.load(at + start, mask=mask, other=0.0)
        acc += w * tl.load(x + start + d, mask=mask, other=0.0).to(tl.float32)
    tl.store(logits + expert, tl.sum(acc, 0))


@triton.jit(do_not_specialize=["num_tokens", "steps_a_split"])
def _few_rows(
    x,
    weight,
    logits,
    num_tokens,
    num_experts,
    steps_a_split,
    SIZE: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """A part of the width. Three tf32 products have the digits of one in fp32."""
    begin_after_earlier(IS_DEPENDENT)
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    acc = tl.zeros([BLOCK_T, BLOCK_E], tl.float32)
    for step in range(split * steps_a_split, (split + 1) * steps_a_split):
        d = step * BLOCK_D + tl.arange(0, BLOCK_D)
        a_mask = (t[:, None] < num_tokens) & (d[None, :] < SIZE)
        a = tl.load(x + t[:, None] * SIZE + d[None, :], mask=a_mask, other=0.0).to(tl.float32)
        b_mask = (e[None, :] < num_experts) & (d[:, None] < SIZE)
        b = tl.load(weight + e[None, :] * SIZE + d[:, None], mask=b_mask, other=0.0)
        acc = tl.dot(a, b, acc, input_precision="tf32x3")
    mask = (t[:, None] < num_tokens) & (e[None, :] < num_experts)
    at = (split * num_tokens + t[:, None]) * num_experts + e[None, :]
    tl.store(logits + at, acc, mask=mask)


@triton.jit(do_not_specialize=["num_tokens", "num_splits"])
def _choose(
    logits,
    bias,
    ids,
    weights,
    num_tokens,
    num_splits,
    factor,
    EXPERTS: tl.constexpr,
    CHOSEN: tl.constexpr,
    IS_SIGMOID: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEPT_GROUPS: tl.constexpr,
    SUMS_TWO: tl.constexpr,
    NORMS: tl.constexpr,
    EXPERTS_POW2: tl.constexpr,
    CHOSEN_POW2: tl.constexpr,
    IS_DEPENDENT: tl.constexpr,
):
    """One token. An expert that is out has a choice of -inf."""
    begin_after_earlier(IS_DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, EXPERTS_POW2)
    is_expert = e < EXPERTS
    logit = tl.load(logits + row * EXPERTS + e, mask=is_expert, other=float("-inf"))
    for split in range(1, num_splits):
        logit += tl.load(logits + (split * num_tokens + row) * EXPERTS + e, mask=is_expert, other=0.0)
    if IS_SIGMOID:
        score = tl.sigmoid(logit)
    else:
        score = tl.exp(logit - tl.max(logit, 0))
        score = score / tl.sum(score, 0)
    choice = score
    if HAS_BIAS:
        choice += tl.load(bias + e, mask=is_expert, other=0.0)
    choice = tl.where(is_expert, choice, float("-inf"))
    if GROUPS > 1:
        choice = _best_groups_only(choice, e, EXPERTS // GROUPS, GROUPS, KEPT_GROUPS, SUMS_TWO)
    k = tl.arange(0, CHOSEN_POW2)
    chosen = tl.zeros([CHOSEN_POW2], tl.int32)
    chosen_score = tl.zeros([CHOSEN_POW2], tl.float32)
    for i in tl.static_range(CHOSEN):
        best = tl.argmax(choice, 0)
        chosen = tl.where(k == i, best, chosen)
        chosen_score = tl.where(k == i, tl.sum(tl.where(e == best, score, 0.0), 0), chosen_score)
        choice = tl.where(e == best, float("-inf"), choice)
    # A sum that is NaN, whichever expert was taken.
    chosen_score += 0.0 * tl.sum(tl.where(is_expert, score, 0.0), 0)
    if NORMS:
        chosen_score = chosen_score / (tl.sum(chosen_score, 0) + 1e-20)
    # NaN compares with nothing: a broken token still gets experts that exist.
    tl.store(ids + row * CHOSEN + k, tl.minimum(chosen, EXPERTS - 1), mask=k < CHOSEN)
    tl.store(weights + row * CHOSEN + k, chosen_score * factor, mask=k < CHOSEN)


@triton.jit
def _best_groups_only(
    choice, e, SIZE: tl.constexpr, GROUPS: tl.constexpr, KEPT_GROUPS: tl.constexpr, SUMS_TWO: tl.constexpr
):
    """-inf for experts outside the best groups; a group is `SIZE` experts side by side."""
    merit_of_expert = tl.full(choice.shape, float("-inf"), tl.float32)
    for group in tl.static_range(GROUPS):
        is_member = (e >= group * SIZE) & (e < (group + 1) * SIZE)
        members = tl.where(is_member, choice, float("-inf"))
        merit = tl.max(members, 0)
        if SUMS_TWO:
            merit += tl.max(tl.where(e == tl.argmax(members, 0), float("-inf"), members), 0)
        merit_of_expert = tl.where(is_member, merit, merit_of_expert)
    is_kept = e < 0
    for _ in tl.static_range(KEPT_GROUPS):
        best = tl.argmax(tl.where(is_kept, float("-inf"), merit_of_expert), 0) // SIZE
        is_kept = is_kept | ((e >= best * SIZE) & (e < (best + 1) * SIZE))
    return tl.where(is_kept, choice, float("-inf"))
