"""The public protos to and from the types of services.common, both ways: the server reads requests, the client replies.

Reading validates: InvalidRequest names the proto's field.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

from services.common.errors import InvalidRequest
from services.common.messages import (
    Candidate,
    Delta,
    Explanation,
    Finished,
    Message,
    ModelInfo,
    RoutingDecision,
    Started,
    TurnEvent,
    TurnRequest,
)
from services.common.sampling import SamplingParams
from services.gateway.convert_sessions import SESSION_PREFIX, session_id_of, session_name
from services.pb.antiphon.v1 import chat_service_pb2 as chat
from services.pb.antiphon.v1 import types_pb2 as types
from services.wire import values

MAX_MESSAGES: Final = 4096

_IDEMPOTENCY_KEY = re.compile(r"[\x21-\x7e]{1,128}")
_ROLES = {
    types.ROLE_SYSTEM: "system",
    types.ROLE_USER: "user",
    types.ROLE_ASSISTANT: "assistant",
    types.ROLE_TOOL: "tool",
}
_ROLE_NUMBERS = {role: number for number, role in _ROLES.items()}


def turn_from_proto(
    request: chat.GenerateRequest | chat.ExplainRequest,
    tenant: str,
    request_id: str,
    deadline_s: float | None = None,
    traceparent: str | None = None,
    default_sampling: SamplingParams = values.DEFAULT_SAMPLING,
) -> TurnRequest:
    """A turn, from the body and from what the edge knows beside it. An ExplainRequest is a turn without sampling."""
    sampling, key = types.SamplingParams(), None
    if isinstance(request, chat.GenerateRequest):
        sampling = request.sampling
        key = request.idempotency_key if request.HasField("idempotency_key") else None
    session = session_id_of(request.session, "session") if request.session else None
    if key is not None and not _IDEMPOTENCY_KEY.fullmatch(key):
        raise InvalidRequest("idempotency_key", "1 to 128 printable ASCII characters, no space")
    if key is not None and session is None:
        raise InvalidRequest("idempotency_key", "needs a session")
    messages, token_ids = _input_from_proto(request)
    return TurnRequest(
        tenant=tenant,
        request_id=request_id,
        session=session,
        messages=messages,
        token_ids=token_ids,
        sampling=values.sampling_from_proto(sampling, default_sampling),
        idempotency_key=key,
        deadline_s=deadline_s,
        traceparent=traceparent,
    )


def turn_to_proto(turn: TurnRequest) -> chat.GenerateRequest:
    """The body of a turn; tenant, request id and deadline travel beside it."""
    message = chat.GenerateRequest(
        session=session_name(turn.session),
        sampling=values.sampling_to_proto(turn.sampling),
        idempotency_key=turn.idempotency_key,
    )
    if turn.messages:
        message.chat.CopyFrom(messages_to_proto(turn.messages))
    else:
        message.tokens.token_ids.extend(turn.token_ids)
    return message


def explain_to_proto(turn: TurnRequest) -> chat.ExplainRequest:
    """The parts of a turn that matter to routing."""
    body = turn_to_proto(turn)
    if turn.messages:
        return chat.ExplainRequest(session=body.session, chat=body.chat)
    return chat.ExplainRequest(session=body.session, tokens=body.tokens)


def messages_from_proto(message: types.ChatInput) -> tuple[Message, ...]:
    """Chat messages. Raises InvalidRequest: none, too many, a role that is missing or unknown."""
    if not 1 <= len(message.messages) <= MAX_MESSAGES:
        raise InvalidRequest("chat.messages", f"1 to {MAX_MESSAGES} messages are needed, got {len(message.messages)}")
    for index, each in enumerate(message.messages):
        if each.role not in _ROLES:
            problem = f"has no value {each.role}" if each.role else "is required"
            raise InvalidRequest(f"chat.messages[{index}].role", problem)
    return tuple(Message(_ROLES[each.role], each.content) for each in message.messages)


def messages_to_proto(messages: Iterable[Message]) -> types.ChatInput:
    """Chat messages. Raises InvalidRequest on a role that does not exist."""
    made = types.ChatInput()
    for index, each in enumerate(messages):
        if each.role not in _ROLE_NUMBERS:
            raise InvalidRequest(
                f"chat.messages[{index}].role", f"one of {', '.join(_ROLE_NUMBERS)}, not {each.role!r}"
            )
        made.messages.add(role=_ROLE_NUMBERS[each.role], content=each.content)
    return made


def event_to_proto(event: TurnEvent) -> chat.GenerateResponse:
    """One message of the stream."""
    if isinstance(event, Delta):  # the frequent one first
        delta = chat.Delta(text=event.text, token_ids=event.token_ids, index=event.index)
        if event.logprobs:
            delta.logprobs.extend(values.logprobs_to_proto(event.logprobs))
        if event.prompt_logprobs:
            delta.prompt_logprobs.extend(values.logprobs_to_proto(event.prompt_logprobs))
        return chat.GenerateResponse(delta=delta)
    if isinstance(event, Started):
        return chat.GenerateResponse(
            started=chat.Started(
                request_id=event.request_id,
                session=session_name(event.session),
                turn=event.turn,
                num_prompt_tokens=event.num_prompt_tokens,
                num_cached_tokens=event.num_cached_tokens,
                routing=routing_to_proto(event.routing),
            )
        )
    return chat.GenerateResponse(
        finished=chat.Finished(
            reason=values.FINISH_REASONS.number(event.reason),
            usage=values.usage_to_proto(event.usage),
            timings=values.timings_to_proto(event.timings),
            replica=event.replica,
            kv_origins=values.origins_to_proto(event.kv_origins),
            prefill_place=values.PREFILL_PLACES.number(event.prefill_place),
            prefill_reason=event.prefill_reason,
            num_resumes=event.num_resumes,
        )
    )


def event_from_proto(message: chat.GenerateResponse) -> TurnEvent | None:
    """One event; None for a kind that a newer server sends and this client does not know."""
    kind = message.WhichOneof("event")
    if kind == "delta":
        delta = message.delta
        return Delta(
            text=delta.text,
            token_ids=tuple(delta.token_ids),
            index=delta.index,
            logprobs=values.logprobs_from_proto(delta.logprobs),
            prompt_logprobs=values.logprobs_from_proto(delta.prompt_logprobs),
        )
    if kind == "started":
        started = message.started
        return Started(
            request_id=started.request_id,
            session=started.session.removeprefix(SESSION_PREFIX) or None,
            turn=started.turn,
            num_prompt_tokens=started.num_prompt_tokens,
            num_cached_tokens=started.num_cached_tokens,
            routing=routing_from_proto(started.routing),
        )
    if kind == "finished":
        finished = message.finished
        return Finished(
            reason=values.FINISH_REASONS.member(finished.reason, "finished.reason"),
            usage=values.usage_from_proto(finished.usage),
            timings=values.timings_from_proto(finished.timings),
            replica=finished.replica,
            kv_origins=values.origins_from_proto(finished.kv_origins),
            prefill_place=values.PREFILL_PLACES.member(finished.prefill_place, "finished.prefill_place"),
            prefill_reason=finished.prefill_reason,
            num_resumes=finished.num_resumes,
        )
    return None


def routing_to_proto(routing: RoutingDecision) -> types.RoutingDecision:
    """A routing decision with its candidates."""
    candidates = [
        types.Candidate(**{name: getattr(each, name) for name in Candidate.__slots__}) for each in routing.candidates
    ]
    return types.RoutingDecision(
        replica=routing.replica,
        reason=values.ROUTING_REASONS.number(routing.reason),
        detail=routing.detail,
        policy=routing.policy,
        candidates=candidates,
    )


def routing_from_proto(message: types.RoutingDecision) -> RoutingDecision:
    """A routing decision with its candidates."""
    return RoutingDecision(
        replica=message.replica,
        reason=values.ROUTING_REASONS.member(message.reason, "routing.reason"),
        detail=message.detail,
        policy=message.policy,
        candidates=tuple(
            Candidate(**{name: getattr(each, name) for name in Candidate.__slots__}) for each in message.candidates
        ),
    )


def explanation_to_proto(explanation: Explanation) -> chat.ExplainResponse:
    """The reply of Explain."""
    return chat.ExplainResponse(
        routing=routing_to_proto(explanation.routing),
        num_prompt_tokens=explanation.num_prompt_tokens,
        num_cached_tokens=explanation.num_cached_tokens,
    )


def explanation_from_proto(message: chat.ExplainResponse) -> Explanation:
    """The reply of Explain."""
    return Explanation(routing_from_proto(message.routing), message.num_prompt_tokens, message.num_cached_tokens)


def model_to_proto(model: ModelInfo) -> chat.Model:
    """Same names on both sides."""
    fields = {name: getattr(model, name) for name in ModelInfo.__slots__}
    return chat.Model(**fields | {"default_sampling": values.sampling_to_proto(model.default_sampling)})


def model_from_proto(message: chat.Model) -> ModelInfo:
    """Same names on both sides."""
    fields = {name: getattr(message, name) for name in ModelInfo.__slots__}
    return ModelInfo(**fields | {"default_sampling": values.sampling_from_proto(message.default_sampling)})


def _input_from_proto(
    request: chat.GenerateRequest | chat.ExplainRequest,
) -> tuple[tuple[Message, ...], tuple[int, ...]]:
    kind = request.WhichOneof("input")
    if kind == "chat":
        return messages_from_proto(request.chat), ()
    if kind == "tokens":
        if not request.tokens.token_ids:
            raise InvalidRequest("tokens.token_ids", "at least one is needed")
        return (), tuple(request.tokens.token_ids)
    raise InvalidRequest("input", "chat or tokens is required")
