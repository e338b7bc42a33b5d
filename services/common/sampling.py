"""How tokens are chosen and why a reply ends: what the engine needs to know of a request, and says of a token."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from services.common.errors import InvalidRequest

MAX_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 256
MAX_LOGIT_BIAS = 1024


class FinishReason(enum.Enum):
    """Why a reply ended."""

    STOP = "stop"  # end-of-sequence token, stop token or stop string
    LENGTH = "length"  # max_tokens, or the model's context is full
    ABORTED = "aborted"  # cancelled by the caller
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. Every field is validated; none is ignored.

    temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: probabilities; 1 and 0 are off.
    repetition_penalty divides positive (multiplies negative) logits of tokens in prompt or reply (Keskar et al. 2019);
    1 is off. presence_penalty and frequency_penalty are subtracted once, or once per occurrence, for reply tokens.
    logit_bias: token id -> number added to its logit. seed: makes the reply reproducible whatever else is in the batch.
    max_tokens: None fills the context. logprobs: how many top alternatives to return beside the sampled token's own;
    None returns none at all. prompt_logprobs likewise for the prompt's tokens.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        _require_range("temperature", self.temperature, 0.0, 100.0)
        _require_int("top_k", self.top_k, 0, 2**31 - 1)
        _require_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _require_range("min_p", self.min_p, 0.0, 1.0)
        _require_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, low_open=True)
        _require_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _require_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _require_int("seed", self.seed, 0, 2**64 - 1)
        if self.max_tokens is not None:
            _require_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            if value is not None:
                _require_int(name, value, 0, MAX_LOGPROBS)
        for name, kind in (("stop", tuple), ("stop_token_ids", tuple), ("logit_bias", Mapping)):
            if not isinstance(getattr(self, name), kind):
                raise InvalidRequest(f"sampling.{name}", f"must be a {kind.__name__.lower()}")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest("sampling.logit_bias", f"at most {MAX_LOGIT_BIAS} entries, got {len(self.logit_bias)}")
        for token_id, bias in self.logit_bias.items():
            _require_int("logit_bias", token_id, 0, 2**31 - 1)
            _require_range("logit_bias", bias, -100.0, 100.0)
        if len(self.stop) > MAX_STOP_STRINGS:
            raise InvalidRequest("sampling.stop", f"at most {MAX_STOP_STRINGS} stop strings, got {len(self.stop)}")
        for stop in self.stop:
            if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_STRING_CHARS:
                raise InvalidRequest("sampling.stop", f"a stop string has 1 to {MAX_STOP_STRING_CHARS} characters")
        if not isinstance(self.ignore_eos, bool):
            raise InvalidRequest("sampling.ignore_eos", f"must be true or false, got {self.ignore_eos!r}")
        for token_id in self.stop_token_ids:
            _require_int("stop_token_ids", token_id, 0, 2**31 - 1)

    @property
    def is_greedy(self) -> bool:
        return self.temperature == 0.0


def _require_range(name: str, value: float, low: float, high: float, *, low_open: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"sampling.{name}", f"a number is needed, got {type(value).__name__}")
    inside = (low < value if low_open else low <= value) and value <= high
    if not inside:  # NaN and infinities are outside as well
        bracket = "(" if low_open else "["
        raise InvalidRequest(f"sampling.{name}", f"must be in {bracket}{low:g}, {high:g}], got {value}")


def _require_int(name: str, value: int, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InvalidRequest(f"sampling.{name}", f"must be a whole number from {low} to {high}, got {value!r}")


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural-log probabilities at one position, of the distribution before temperature and truncation.

    logprob belongs to the token that stands there; top lists (token id, logprob), best first.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
