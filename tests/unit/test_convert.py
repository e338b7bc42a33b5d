import dataclasses
import enum
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.errors import InvalidRequest
from services.common.messages import (
    Candidate,
    Delta,
    Explanation,
    Finished,
    KvOrigin,
    KvSource,
    Message,
    ModelInfo,
    PrefillPlace,
    RoutingDecision,
    RoutingReason,
    SessionHolder,
    SessionInfo,
    Started,
    Timings,
    TurnRequest,
    Usage,
)
from services.common.sampling import FinishReason, SamplingParams, TokenLogprobs
from services.gateway import convert, convert_sessions
from services.pb.antiphon.v1 import chat_service_pb2 as chat
from services.pb.antiphon.v1 import session_service_pb2 as sessions
from services.pb.antiphon.v1 import types_pb2 as types
from services.wire import values

UINT32 = st.integers(0, 2**32 - 1)
TEXT = st.text(max_size=20)
REAL = st.floats(allow_nan=False, allow_infinity=False)
LOGPROBS = st.builds(TokenLogprobs, UINT32, REAL, st.lists(st.tuples(UINT32, REAL), max_size=3).map(tuple))
ROUTING = st.builds(
    RoutingDecision,
    TEXT,
    st.sampled_from(RoutingReason),
    TEXT,
    TEXT,
    st.lists(st.builds(Candidate, TEXT, UINT32, UINT32, UINT32, UINT32, REAL, TEXT), max_size=3).map(tuple),
)
EVENTS = st.one_of(
    st.builds(Started, TEXT, st.none() | st.just("s-1"), UINT32, UINT32, UINT32, ROUTING),
    st.builds(
        Delta,
        TEXT,
        st.lists(UINT32, max_size=3).map(tuple),
        UINT32,
        st.lists(LOGPROBS, max_size=2).map(tuple),
        st.lists(LOGPROBS, max_size=2).map(tuple),
    ),
    st.builds(
        Finished,
        st.sampled_from(FinishReason),
        st.builds(Usage, UINT32, UINT32, UINT32),
        st.builds(Timings, REAL, REAL, REAL, REAL, REAL, st.integers(0, 2**64 - 1), REAL, REAL, REAL, REAL),
        TEXT,
        st.lists(st.builds(KvOrigin, st.sampled_from(KvSource), TEXT, UINT32), max_size=3).map(tuple),
        st.sampled_from(PrefillPlace),
        TEXT,
        UINT32,
    ),
)
SAMPLING = st.builds(
    SamplingParams,
    temperature=st.floats(0, 100),
    top_k=st.integers(0, 2**31 - 1),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    repetition_penalty=st.floats(0, 100, exclude_min=True),
    presence_penalty=st.floats(-2, 2),
    frequency_penalty=st.floats(-2, 2),
    logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
    seed=st.none() | st.integers(0, 2**64 - 1),
    max_tokens=st.none() | st.integers(1, 2**31 - 1),
    stop_token_ids=st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
    stop=st.lists(st.text(min_size=1, max_size=8), max_size=3).map(tuple),
    ignore_eos=st.booleans(),
    logprobs=st.none() | st.integers(0, 20),
    prompt_logprobs=st.none() | st.integers(0, 20),
)


@given(SAMPLING)
def test_sampling_round_trips(sampling: SamplingParams) -> None:
    data = values.sampling_to_proto(sampling).SerializeToString()
    assert values.sampling_from_proto(types.SamplingParams.FromString(data)) == sampling


@given(EVENTS)
def test_events_round_trip(event: Started | Delta | Finished) -> None:
    data = convert.event_to_proto(event).SerializeToString()
    assert convert.event_from_proto(chat.GenerateResponse.FromString(data)) == event


def test_the_proto_covers_every_sampling_field() -> None:
    assert {field.name for field in dataclasses.fields(SamplingParams)} == set(
        types.SamplingParams.DESCRIPTOR.fields_by_name
    )


def test_unset_is_not_zero() -> None:
    assert values.sampling_from_proto(types.SamplingParams()) == SamplingParams()
    zero = values.sampling_from_proto(types.SamplingParams(temperature=0.0, seed=0, logprobs=0))
    assert (zero.temperature, zero.seed, zero.logprobs) == (0.0, 0, 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", math.nan),
        ("temperature", -1.0),
        ("top_k", 2**32 - 1),
        ("top_p", 0.0),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", math.inf),
        ("frequency_penalty", -3.0),
        ("max_tokens", 0),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("stop_token_ids", [2**32 - 1]),
        ("logit_bias", {1: 101.0}),
    ],
)
def test_a_bad_sampling_value_is_refused_by_its_field(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequest) as refused:
        values.sampling_from_proto(types.SamplingParams(**{field: value}))
    assert refused.value.field == f"sampling.{field}"


@pytest.mark.parametrize("kind", [FinishReason, RoutingReason, KvSource, PrefillPlace])
def test_python_enums_and_their_protos_have_the_same_members(kind: type[enum.Enum]) -> None:
    proto = getattr(types, kind.__name__)
    suffixes = {name.lower() for name in proto.DESCRIPTOR.values_by_name}
    assert len(suffixes) == len(kind) + 1
    assert all(any(name.endswith(f"_{member.name.lower()}") for name in suffixes) for member in kind)


@pytest.mark.parametrize("number", [0, 99])
def test_unset_and_unknown_enum_values_are_refused(number: int) -> None:
    with pytest.raises(InvalidRequest, match=r"kv_origins\.source"):
        values.origins_from_proto([types.KvOrigin(source=number)])
    body = chat.GenerateRequest(chat=types.ChatInput(messages=[types.Message(role=number, content="x")]))
    with pytest.raises(InvalidRequest) as refused:
        convert.turn_from_proto(body, "t", "r")
    assert refused.value.field == "chat.messages[0].role"


@pytest.mark.parametrize(
    "turn",
    [
        TurnRequest("t", "r", "s.1", (Message("system", ""), Message("user", "hé\0")), idempotency_key="k"),
        TurnRequest("t", "r", None, token_ids=(0, 1, 2**32 - 1), sampling=SamplingParams(temperature=0.0, seed=3)),
    ],
)
def test_turns_round_trip(turn: TurnRequest) -> None:
    body = chat.GenerateRequest.FromString(convert.turn_to_proto(turn).SerializeToString())
    assert convert.turn_from_proto(body, "t", "r") == turn


def test_an_explain_request_is_the_turn_without_sampling() -> None:
    turn = TurnRequest("t", "r", "s1", (Message("user", "x"),), sampling=SamplingParams(top_k=3))
    explained = convert.turn_from_proto(convert.explain_to_proto(turn), "t", "r")
    assert explained == dataclasses.replace(turn, sampling=SamplingParams())


MESSAGE = types.ChatInput(messages=[types.Message(role=types.ROLE_USER, content="x")])


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (chat.GenerateRequest(), "input"),
        (chat.GenerateRequest(chat=types.ChatInput()), "chat.messages"),
        (chat.GenerateRequest(tokens=types.TokenInput()), "tokens.token_ids"),
        (chat.GenerateRequest(session="s1", chat=MESSAGE), "session"),
        (chat.GenerateRequest(session="sessions/", chat=MESSAGE), "session"),
        (chat.GenerateRequest(session="sessions/a/b", chat=MESSAGE), "session"),
        (chat.GenerateRequest(session="sessions/a:{b}*", chat=MESSAGE), "session"),
        (chat.GenerateRequest(session="sessions/a\r\n", chat=MESSAGE), "session"),
        (chat.GenerateRequest(session="sessions/" + "a" * 129, chat=MESSAGE), "session"),
        (chat.GenerateRequest(session="sessions/é", chat=MESSAGE), "session"),
        (chat.GenerateRequest(chat=MESSAGE, idempotency_key="k"), "idempotency_key"),
        (chat.GenerateRequest(session="sessions/a", chat=MESSAGE, idempotency_key=""), "idempotency_key"),
        (chat.GenerateRequest(session="sessions/a", chat=MESSAGE, idempotency_key="a b"), "idempotency_key"),
    ],
)
def test_a_bad_turn_is_refused_by_its_field(body: chat.GenerateRequest, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        convert.turn_from_proto(body, "t", "r")
    assert refused.value.field == field


def test_an_event_of_a_newer_server_is_skipped() -> None:
    assert convert.event_from_proto(chat.GenerateResponse()) is None


def test_a_role_that_does_not_exist_is_refused_by_the_client() -> None:
    with pytest.raises(InvalidRequest, match="robot"):
        convert.messages_to_proto([Message("robot", "x")])


def test_sessions_round_trip() -> None:
    info = SessionInfo(
        "a", "demo", 1.5e9, 1.5e9 + 0.25, 3600.5, 2, 10, 20, (SessionHolder("decode-1", 64, "gpu"),), 4096, 3
    )
    message = convert_sessions.session_to_proto(info)
    assert message.name == "sessions/a"
    assert message.expire_time.seconds == message.update_time.seconds + 3600
    assert convert_sessions.session_from_proto(message) == info
    idle = dataclasses.replace(info, active_turn=None, holders=())
    assert convert_sessions.session_from_proto(convert_sessions.session_to_proto(idle)) == idle


def test_model_and_explanation_round_trip() -> None:
    model = ModelInfo("demo", "float32", "absorb", 4096, 1000, 16, 4, 1152, "f00", SamplingParams(top_k=5))
    assert convert.model_from_proto(convert.model_to_proto(model)) == model
    explanation = Explanation(RoutingDecision("d", RoutingReason.RANDOM), 5, 4)
    assert convert.explanation_from_proto(convert.explanation_to_proto(explanation)) == explanation


def test_what_create_session_leaves_open_is_none() -> None:
    assert convert_sessions.create_session_from_proto(sessions.CreateSessionRequest()) == (None, None)
    body = sessions.CreateSessionRequest(session_id="a", ttl=convert_sessions.duration_of(1.5))
    assert convert_sessions.create_session_from_proto(body) == ("a", 1.5)


@pytest.mark.parametrize("ttl_s", [0.0, -1.0])
def test_a_ttl_that_is_not_positive_is_refused(ttl_s: float) -> None:
    body = sessions.CreateSessionRequest(ttl=convert_sessions.duration_of(ttl_s))
    with pytest.raises(InvalidRequest, match="ttl"):
        convert_sessions.create_session_from_proto(body)


def test_page_size_has_a_default_and_a_limit() -> None:
    assert convert_sessions.page_size_of(sessions.ListSessionsRequest()) == 50
    with pytest.raises(InvalidRequest, match="page_size"):
        convert_sessions.page_size_of(sessions.ListSessionsRequest(page_size=1001))
