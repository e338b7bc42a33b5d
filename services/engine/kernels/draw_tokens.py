"""One token a row: the best one, or one drawn after temperature, min-p, top-k and top-p.

A draw is the maximum of logit plus Gumbel noise (noise.py). Ties go to the lower token id. B rows, V vocabulary, R rows
of one kind, C candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from services.engine.noise import gumbel

NUM_CANDIDATES = 256  # truncation looks at so many best tokens first; sorting a whole vocabulary is the exception
MIN_TEMPERATURE = 1e-5  # below it fp32 has no room for the quotient, and the best token has all the mass anyhow


@dataclass(frozen=True)
class Draws:
    """How each row is sampled, by row; all on the logits' device.

    temperature fp32: 0 takes the best token. floor fp32: log of min-p, -inf for none. top_k int32: V for all.
    top_p fp32: 1 for all. keys int64: of the noise.
    """

    temperature: Tensor
    floor: Tensor
    top_k: Tensor
    top_p: Tensor
    keys: Tensor


def draw_tokens(logits: Tensor, draws: Draws, out: Tensor, *, cuts_k: bool = True, cuts_p: bool = True) -> None:
    """Token ids of logits [B, V] into out [B] int32; -1 where the best logit is not finite (NaN counts as best).

    cuts_k, cuts_p: whether some row has a top-k, a top-p; without them less is launched.
    On CUDA nothing is read back to the host, so the call can be captured in a graph.
    """
    if logits.is_cuda:
        from services.engine.kernels.draw_tokens_triton import draw_tokens_triton

        draw_tokens_triton(logits, draws, out, cuts_k=cuts_k, cuts_p=cuts_p)
    else:
        draw_tokens_reference(logits, draws, out)


def draw_tokens_reference(logits: Tensor, draws: Draws, out: Tensor) -> None:
    """`draw_tokens` in plain PyTorch."""
    best, tokens = logits.max(dim=-1)
    is_sound = best.isfinite()
    drawn = (draws.temperature > 0).nonzero().squeeze(-1)
    if drawn.numel():
        sound = torch.where(is_sound[drawn].unsqueeze(-1), logits[drawn].float(), 0.0)
        parts = (draws.temperature, draws.floor, draws.top_k, draws.top_p, draws.keys)
        tokens[drawn] = draw(sound, *(each[drawn] for each in parts))
    out.copy_(torch.where(is_sound, tokens, -1))


def draw(
    logits_RV: Tensor, temperature_R: Tensor, floor_R: Tensor, top_k_R: Tensor, top_p_R: Tensor, keys_R: Tensor
) -> Tensor:
    """Temperature, min-p, top-k, top-p and the draw, for sound fp32 logits; tokens [R]."""
    vocab_size = logits_RV.shape[-1]
    temperature = temperature_R.clamp_min(MIN_TEMPERATURE).unsqueeze(-1)
    # Subtracting the largest first keeps small temperatures finite, and makes min-p a comparison with log(min_p).
    logits_RV = (logits_RV - logits_RV.amax(dim=-1, keepdim=True)) / temperature
    logits_RV = logits_RV.masked_fill(logits_RV < floor_R.unsqueeze(-1), -math.inf)
    is_truncated = (top_k_R < vocab_size) | (top_p_R < 1.0)
    tokens_R = torch.empty(len(logits_RV), dtype=torch.int64, device=logits_RV.device)
    whole, truncated = ((~is_truncated).nonzero().squeeze(-1), is_truncated.nonzero().squeeze(-1))
    if whole.numel():
        noise = gumbel(keys_R[whole].unsqueeze(-1), torch.arange(vocab_size, device=logits_RV.device))
        tokens_R[whole] = noise.add_(logits_RV[whole]).argmax(dim=-1)
    if truncated.numel():
        arguments = (each[truncated] for each in (logits_RV, top_k_R, top_p_R, keys_R))
        tokens_R[truncated] = _draw_truncated(*arguments)
    return tokens_R


def _draw_truncated(logits_RV: Tensor, top_k_R: Tensor, top_p_R: Tensor, keys_R: Tensor) -> Tensor:
    """Draw from the top-k / nucleus of each row; tokens [R].

    The best NUM_CANDIDATES are enough if the kept set ends above the last of them; otherwise the row is sorted whole.
    Which of the two happens depends on the row alone, and ties that reach the border are left to the sort, so the
    kept set never depends on the order in which topk returns equal values.
    """
    vocab_size = logits_RV.shape[-1]
    values_RC, ids_RC = logits_RV.topk(min(NUM_CANDIDATES, vocab_size), dim=-1)
    ids_RC, order = ids_RC.sort(dim=-1)
    values_RC, order = values_RC.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    ids_RC = ids_RC.gather(-1, order)
    log_mass_R = logits_RV.logsumexp(dim=-1)
    keep_RC = _kept(values_RC, top_k_R, top_p_R, log_mass_R, vocab_size)
    tokens_R = _draw_among(values_RC, ids_RC, keep_RC, keys_R)
    if values_RC.shape[-1] == vocab_size:
        return tokens_R
    last_kept_R = values_RC.masked_fill(~keep_RC, math.inf).amin(dim=-1)
    is_cut_off_R = (last_kept_R <= values_RC[:, -1]) | ((top_k_R > NUM_CANDIDATES) & (top_k_R < vocab_size))
    left_R = is_cut_off_R.nonzero().squeeze(-1)
    if left_R.numel():
        values_RV, ids_RV = logits_RV[left_R].sort(dim=-1, descending=True, stable=True)
        keep_RV = _kept(values_RV, top_k_R[left_R], top_p_R[left_R], log_mass_R[left_R], vocab_size)
        tokens_R[left_R] = _draw_among(values_RV, ids_RV, keep_RV, keys_R[left_R])
    return tokens_R


def _kept(values_RC: Tensor, top_k_R: Tensor, top_p_R: Tensor, log_mass_R: Tensor, vocab_size: int) -> Tensor:
    """Which of the sorted values are in the top-k and in the nucleus of the top-k; bool [R, C].

    log_mass_R: logsumexp of all the row's logits, the nucleus' whole where top-k does not cut.
    """
    rank_C = torch.arange(values_RC.shape[-1], device=values_RC.device)
    is_top_RC = rank_C < top_k_R.unsqueeze(-1)
    log_top_mass_R = values_RC.masked_fill(~is_top_RC, -math.inf).logsumexp(dim=-1)
    log_mass_R = torch.where(top_k_R < vocab_size, log_top_mass_R, log_mass_R)
    mass_RC = (values_RC - log_mass_R.unsqueeze(-1)).exp().cumsum(dim=-1)
    mass_before_RC = torch.nn.functional.pad(mass_RC[:, :-1], (1, 0))
    # Rounding can bring the sum to 1 early: top-p 1 is off, not a comparison.
    is_nucleus_RC = (mass_before_RC < top_p_R.unsqueeze(-1)) | (top_p_R.unsqueeze(-1) >= 1.0)
    return (is_top_RC & is_nucleus_RC & (values_RC > -math.inf)) | (rank_C == 0)


def _draw_among(values_RC: Tensor, ids_RC: Tensor, keep_RC: Tensor, keys_R: Tensor) -> Tensor:
    scores_RC = gumbel(keys_R.unsqueeze(-1), ids_RC).add_(values_RC).masked_fill_(~keep_RC, -math.inf)
    return ids_RC.gather(-1, scores_RC.argmax(dim=-1, keepdim=True)).squeeze(-1)
