"""From logits to the next token of every sequence in a batch.

Order: log-probabilities (of the model's own distribution), bias, penalties, temperature, min-p, top-k, top-p, draw.
A draw is the maximum of logit plus Gumbel noise, and the noise depends on (seed, position, token id) alone: what else
is in the batch cannot change a reply. Ties go to the lower token id, in greedy and in truncated sampling.

Shape letters: B rows of the batch, V vocabulary, R rows of one kind, C candidates.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from services.common.errors import NumericsError
from services.common.sampling import SamplingParams, TokenLogprobs
from services.engine.kernels.draw_tokens import draw
from services.engine.noise import stream_key_array
from services.engine.penalties import apply_logit_bias, apply_penalties, require_in_vocabulary

_LOGPROB_CHUNK_ROWS = 128


@dataclass(frozen=True, slots=True)
class SamplingRow:
    """What is needed to sample one sequence. The id sequences are views of the caller's lists and are only read.

    position: the number of tokens generated before this one. seed: from `resolve_seed`, the same at every position.
    """

    params: SamplingParams
    prompt_token_ids: Sequence[int]
    output_token_ids: Sequence[int]
    position: int
    seed: int

    @property
    def is_drawn_on_device(self) -> bool:
        """True if `draw_tokens` has all it takes: no penalty, no bias, no log-probabilities."""
        params = self.params
        return (
            params.logprobs is None
            and not params.logit_bias
            and params.repetition_penalty == 1.0
            and params.presence_penalty == 0.0
            and params.frequency_penalty == 0.0
        )

    @property
    def is_plain_greedy(self) -> bool:
        """True if the token is the largest logit and nothing more is asked for."""
        return self.params.temperature == 0.0 and self.is_drawn_on_device


@dataclass(frozen=True, slots=True)
class Sampled:
    """One sampled token; or, with `error` set, none: token_id is -1 then."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: NumericsError | None = None


class Sampler:
    """Chooses one token a row. Holds no state: everything that matters is in the rows."""

    def sample(self, logits_BV: Tensor, rows: Sequence[SamplingRow]) -> list[Sampled]:
        """The next token of every row; logits_BV [B, V], any float dtype, any device, is not changed.

        A row with NaN, +inf or nothing but -inf gets an error of its own; the others are not disturbed.
        Raises InvalidRequest for a logit bias outside of the vocabulary (`check_vocabulary` refuses it on arrival).
        """
        assert logits_BV.ndim == 2, logits_BV.shape
        assert logits_BV.shape[0] == len(rows), (logits_BV.shape, len(rows))
        if not rows:
            return []
        # max propagates NaN, so one reduction gives the greedy tokens and finds the bad rows.
        best_B, tokens_B = logits_BV.max(dim=-1)
        is_sound_B = best_B.isfinite()
        others = [i for i, row in enumerate(rows) if not row.is_plain_greedy]
        logprobs: dict[int, TokenLogprobs] = {}
        if others:
            index_R = torch.tensor(others, device=logits_BV.device)
            chosen = [rows[i] for i in others]
            logits_RV = logits_BV if len(others) == len(rows) else logits_BV[index_R]
            logits_RV = torch.where(is_sound_B[index_R].unsqueeze(-1), logits_RV.float(), 0.0)
            tokens_R, logprobs_R = _sample_general(logits_RV, chosen)
            tokens_B[index_R] = tokens_R
            logprobs = {others[i]: entry for i, entry in logprobs_R.items()}
        token_ids: list[int] = torch.where(is_sound_B, tokens_B, -1).tolist()
        return [
            Sampled(token_id, logprobs.get(i)) if token_id >= 0 else no_token(rows[i].position)
            for i, token_id in enumerate(token_ids)
        ]


def resolve_seed(params: SamplingParams) -> int:
    """The request's seed, or a fresh random one; call it once a request."""
    return params.seed if params.seed is not None else secrets.randbits(64)


def check_vocabulary(params: SamplingParams, vocab_size: int) -> None:
    """Raise InvalidRequest if a token id of `logit_bias` or `stop_token_ids` is outside of the vocabulary."""
    require_in_vocabulary("sampling.logit_bias", list(params.logit_bias), vocab_size)
    require_in_vocabulary("sampling.stop_token_ids", params.stop_token_ids, vocab_size)


def prompt_logprobs(logits_TV: Tensor, next_token_ids: Sequence[int], top_n: int) -> list[TokenLogprobs]:
    """Log-probabilities of given tokens: row t of logits_TV [T, V] predicts next_token_ids[t].

    Raises NumericsError if a row has NaN, +inf or nothing but -inf.
    """
    assert logits_TV.shape[0] == len(next_token_ids), (logits_TV.shape, len(next_token_ids))
    require_in_vocabulary("prompt", next_token_ids, logits_TV.shape[1])
    result: list[TokenLogprobs] = []
    for start in range(0, len(next_token_ids), _LOGPROB_CHUNK_ROWS):
        ids = next_token_ids[start : start + _LOGPROB_CHUNK_ROWS]
        chunk = logits_TV[start : start + len(ids)]
        if not bool(chunk.amax(dim=-1).isfinite().all()):
            raise NumericsError("the logits of the prompt hold NaN or only infinities")
        logprobs = chunk.float().log_softmax(dim=-1)
        result += _token_logprobs(logprobs, torch.tensor(ids, device=logits_TV.device), [top_n] * len(ids))
    return result


def no_token(position: int) -> Sampled:
    """What stands for token `position` of a reply whose logits are no numbers."""
    message = f"the logits for token {position} of the reply hold NaN or only infinities"
    return Sampled(-1, error=NumericsError(message))


def _sample_general(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> tuple[Tensor, dict[int, TokenLogprobs]]:
    """Tokens [R], and log-probabilities by row for those that ask. logits_RV: fp32, owned here, changed in place."""
    asking = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    index = torch.tensor(asking, device=logits_RV.device, dtype=torch.int64)
    raw_logprobs = logits_RV[index].log_softmax(dim=-1) if asking else None
    apply_logit_bias(logits_RV, rows)
    apply_penalties(logits_RV, rows)
    tokens_R = logits_RV.argmax(dim=-1)
    drawn = [i for i, row in enumerate(rows) if not row.params.is_greedy]
    if drawn:
        drawn_index = torch.tensor(drawn, device=logits_RV.device)
        drawn_logits = logits_RV if len(drawn) == len(rows) else logits_RV[drawn_index]
        tokens_R[drawn_index] = _draw(drawn_logits, [rows[i] for i in drawn])
    if raw_logprobs is None:
        return tokens_R, {}
    counts = [rows[i].params.logprobs or 0 for i in asking]
    return tokens_R, dict(zip(asking, _token_logprobs(raw_logprobs, tokens_R[index], counts), strict=True))


def _token_logprobs(logprobs_RV: Tensor, tokens_R: Tensor, counts: Sequence[int]) -> list[TokenLogprobs]:
    num_top = min(max(counts), logprobs_RV.shape[-1])
    own: list[float] = logprobs_RV.gather(-1, tokens_R.unsqueeze(-1)).squeeze(-1).tolist()
    values, ids = logprobs_RV.topk(num_top, dim=-1)
    value_rows: list[list[float]] = values.tolist()
    id_rows: list[list[int]] = ids.tolist()
    tokens: list[int] = tokens_R.tolist()
    return [
        TokenLogprobs(tokens[i], own[i], tuple(zip(id_rows[i][:count], value_rows[i][:count], strict=True)))
        for i, count in enumerate(counts)
    ]


def _draw(logits_RV: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Temperature, min-p, top-k, top-p and the draw; tokens [R]."""
    arrays = draw_arrays(rows, logits_RV.shape[-1])
    parts = {name: torch.from_numpy(array).to(logits_RV.device) for name, array in arrays.items()}
    return draw(logits_RV, *(parts[name] for name in ("temperature", "floor", "top_k", "top_p", "keys")))


def draw_arrays(rows: Sequence[SamplingRow], vocab_size: int) -> dict[str, np.ndarray]:
    """What `draw_tokens` wants to know of each row, by the names of `Draws`."""
    params = [row.params for row in rows]
    floors = [math.log(p.min_p) if p.min_p > 0.0 else -math.inf for p in params]
    return {
        "keys": stream_key_array([row.seed for row in rows], [row.position for row in rows]),
        "temperature": np.array([p.temperature for p in params], np.float32),
        "floor": np.array(floors, np.float32),
        "top_p": np.array([p.top_p for p in params], np.float32),
        "top_k": np.array([min(p.top_k or vocab_size, vocab_size) for p in params], np.int32),
    }
