"""Logit bias and the three penalties, in place, for the rows that ask for them; the others cost nothing.

Only the logits of the tokens concerned are gathered and written back, so the work grows with the text, not with the
vocabulary. Ids may come as lists or as numpy arrays; the latter save the conversion.

Shape letters: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from services.common.errors import InvalidRequest

if TYPE_CHECKING:
    from services.engine.sampler import SamplingRow


def apply_logit_bias(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Add each row's `logit_bias` to its logits (fp32), in place."""
    biased = [(i, row.params.logit_bias) for i, row in enumerate(rows) if row.params.logit_bias]
    if not biased:
        return
    row_ids = [i for i, bias in biased for _ in bias]
    token_ids = [token_id for _, bias in biased for token_id in bias]
    require_in_vocabulary("sampling.logit_bias", token_ids, logits_BV.shape[1])
    values = torch.tensor([value for _, bias in biased for value in bias.values()], dtype=torch.float32)
    index = torch.tensor([row_ids, token_ids])
    index, values = index.to(logits_BV.device), values.to(logits_BV.device)
    logits_BV.index_put_((index[0], index[1]), values, accumulate=True)


def apply_penalties(logits_BV: Tensor, rows: Sequence[SamplingRow]) -> None:
    """Repetition penalty over prompt and reply, then frequency and presence penalty over the reply; fp32, in place."""
    _apply_repetition(logits_BV, [(i, row) for i, row in enumerate(rows) if row.params.repetition_penalty != 1.0])
    _apply_counted(
        logits_BV,
        [
            (i, row)
            for i, row in enumerate(rows)
            if len(row.output_token_ids) and (row.params.presence_penalty != 0.0 or row.params.frequency_penalty != 0.0)
        ],
    )


def require_in_vocabulary(field: str, token_ids: Sequence[int], vocab_size: int) -> None:
    """Raise InvalidRequest if an id lies outside of [0, vocab_size): on CUDA it would be an access out of bounds."""
    for token_id in token_ids:
        if not 0 <= token_id < vocab_size:
            raise InvalidRequest(field, f"token id {token_id} is outside of the vocabulary of {vocab_size}")


def _apply_repetition(logits_BV: Tensor, rows: Sequence[tuple[int, SamplingRow]]) -> None:
    if not rows:
        return
    # A token that occurs twice is written twice with the same value: cheaper than finding the distinct ones.
    seen = [np.concatenate([_as_array(row.prompt_token_ids), _as_array(row.output_token_ids)]) for _, row in rows]
    index = _index(rows, seen).to(logits_BV.device)
    penalties = np.repeat([row.params.repetition_penalty for _, row in rows], [len(ids) for ids in seen])
    penalty = torch.from_numpy(penalties).float().to(logits_BV.device)
    values = logits_BV[index[0], index[1]]
    penalised = torch.where(values > 0, values / penalty, values * penalty)
    # A tiny penalty overflows, and infinity minus infinity is NaN further on; a masked token (-inf) stays masked.
    logits_BV[index[0], index[1]] = penalised.clamp(max=torch.finfo(torch.float32).max)


def _apply_counted(logits_BV: Tensor, rows: Sequence[tuple[int, SamplingRow]]) -> None:
    if not rows:
        return
    counted = [np.unique(_as_array(row.output_token_ids), return_counts=True) for _, row in rows]
    amounts = np.concatenate(
        [
            row.params.frequency_penalty * counts + row.params.presence_penalty
            for (_, row), (_, counts) in zip(rows, counted, strict=True)
        ]
    )
    index = _index(rows, [ids for ids, _ in counted]).to(logits_BV.device)
    logits_BV[index[0], index[1]] -= torch.from_numpy(amounts).float().to(logits_BV.device)


def _index(rows: Sequence[tuple[int, SamplingRow]], token_ids: Sequence[np.ndarray]) -> Tensor:
    """[2, n]: row and token id of every penalised logit."""
    row_ids = np.repeat([i for i, _ in rows], [len(ids) for ids in token_ids])
    return torch.from_numpy(np.stack([row_ids, np.concatenate(token_ids)]))


def _as_array(token_ids: Sequence[int]) -> np.ndarray:
    return np.asarray(token_ids, dtype=np.int64)
