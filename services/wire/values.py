"""Sampling, logprobs, usage, timings, origins and enums, to and from their protos. Shared by both gRPC hops."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Final

from services.common.errors import InvalidRequest
from services.common.messages import KvOrigin, KvSource, PrefillPlace, RoutingReason, Timings, Usage
from services.common.sampling import FinishReason, SamplingParams, TokenLogprobs
from services.pb.antiphon.v1 import types_pb2 as pb

DEFAULT_SAMPLING: Final = SamplingParams()
_OPTIONAL_SAMPLING: Final = (
    *("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty"),
    *("seed", "max_tokens", "ignore_eos", "logprobs", "prompt_logprobs"),
)


class EnumMap:
    """A Python enum and its proto twin: member X is PREFIX_X; the zero value is refused, and so is an unknown one."""

    def __init__(self, kind: type[enum.Enum], proto: Any, prefix: str) -> None:
        self._numbers: Mapping[enum.Enum, int] = {member: proto.Value(f"{prefix}_{member.name}") for member in kind}
        self._members = {number: member for member, number in self._numbers.items()}

    def number(self, member: enum.Enum) -> Any:
        """The proto's number of a member."""
        return self._numbers[member]

    def member(self, number: int, field: str) -> Any:
        """The member of a proto's number. Raises InvalidRequest, naming `field`."""
        if number not in self._members:
            raise InvalidRequest(field, "is required" if number == 0 else f"has no value {number}")
        return self._members[number]


FINISH_REASONS: Final = EnumMap(FinishReason, pb.FinishReason, "FINISH_REASON")
ROUTING_REASONS: Final = EnumMap(RoutingReason, pb.RoutingReason, "ROUTING_REASON")
KV_SOURCES: Final = EnumMap(KvSource, pb.KvSource, "KV_SOURCE")
PREFILL_PLACES: Final = EnumMap(PrefillPlace, pb.PrefillPlace, "PREFILL_PLACE")


def sampling_from_proto(message: pb.SamplingParams, defaults: SamplingParams = DEFAULT_SAMPLING) -> SamplingParams:
    """Unset fields are those of `defaults`. Raises InvalidRequest, naming the proto's field."""
    values: dict[str, Any] = {name: getattr(message, name) for name in _OPTIONAL_SAMPLING if message.HasField(name)}
    return dataclasses.replace(
        defaults,
        logit_bias=dict(message.logit_bias),
        stop_token_ids=tuple(message.stop_token_ids),
        stop=tuple(message.stop),
        **values,
    )


def sampling_to_proto(sampling: SamplingParams) -> pb.SamplingParams:
    """Sets every field but those that are None."""
    values = {name: value for name in _OPTIONAL_SAMPLING if (value := getattr(sampling, name)) is not None}
    return pb.SamplingParams(
        logit_bias=sampling.logit_bias, stop_token_ids=sampling.stop_token_ids, stop=sampling.stop, **values
    )


def logprobs_from_proto(messages: Sequence[pb.TokenLogprobs]) -> tuple[TokenLogprobs, ...]:
    """One a position."""
    return tuple(
        TokenLogprobs(each.token_id, each.logprob, tuple((top.token_id, top.logprob) for top in each.top))
        for each in messages
    )


def logprobs_to_proto(logprobs: Sequence[TokenLogprobs]) -> list[pb.TokenLogprobs]:
    """One a position."""
    return [
        pb.TokenLogprobs(
            token_id=each.token_id,
            logprob=each.logprob,
            top=[pb.TokenLogprob(token_id=token_id, logprob=logprob) for token_id, logprob in each.top],
        )
        for each in logprobs
    ]


def usage_from_proto(message: pb.Usage) -> Usage:
    """Token counts."""
    return Usage(message.num_prompt_tokens, message.num_cached_tokens, message.num_generated_tokens)


def usage_to_proto(usage: Usage) -> pb.Usage:
    """Token counts."""
    return pb.Usage(
        num_prompt_tokens=usage.num_prompt_tokens,
        num_cached_tokens=usage.num_cached_tokens,
        num_generated_tokens=usage.num_generated_tokens,
    )


def timings_from_proto(message: pb.Timings) -> Timings:
    """Same names on both sides."""
    return Timings(**{name: getattr(message, name) for name in Timings.__slots__})


def timings_to_proto(timings: Timings) -> pb.Timings:
    """Same names on both sides."""
    return pb.Timings(**{name: getattr(timings, name) for name in Timings.__slots__})


def origins_from_proto(messages: Sequence[pb.KvOrigin]) -> tuple[KvOrigin, ...]:
    """In order of position."""
    return tuple(
        KvOrigin(KV_SOURCES.member(each.source, "kv_origins.source"), each.replica, each.num_tokens)
        for each in messages
    )


def origins_to_proto(origins: Sequence[KvOrigin]) -> list[pb.KvOrigin]:
    """In order of position."""
    return [
        pb.KvOrigin(source=KV_SOURCES.number(each.source), replica=each.replica, num_tokens=each.num_tokens)
        for each in origins
    ]
