import pickle

import pytest
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2

from services.common import errors
from services.wire.status import DOMAIN, MAX_TEXT_CHARS, TABLE, from_status, to_status


def all_errors(kind: type[errors.AntiphonError] = errors.AntiphonError) -> list[type[errors.AntiphonError]]:
    return [each for child in kind.__subclasses__() for each in [child, *all_errors(child)]]


EXAMPLES: list[errors.AntiphonError] = [
    errors.InvalidRequest("sampling.top_p", "must be in (0, 1], got 2"),
    errors.PromptTooLong("messages", "9000 tokens, at most 4096 fit"),
    errors.Exhausted("full", 2.5),
    errors.OutOfBlocks("no block is free", 0.25),
    errors.QueueFull("too many wait"),
    errors.QuotaExceeded("256 MiB are taken", 60.0),
    errors.NotFound("session", "abc"),
    errors.AlreadyExists("session", "abc"),
    errors.SessionBusy("abc", 7),
    errors.Unauthenticated("the token is not valid"),
    errors.DeadlineExceeded("too late"),
]
SECRETIVE: list[errors.AntiphonError] = [
    errors.UnsupportedConfig("rope_scaling", "/models/secret is odd"),
    errors.InvalidCheckpoint("/models/secret/a.safetensors", "truncated"),
    errors.InvalidSettings("/etc/secret.yaml: unknown key"),
    errors.Unavailable("secret host 10.0.0.7:1234 refused"),
    errors.TransferFailed("timeout", "secret 10.0.0.7:1234"),
    errors.StaleLease("secret fence 3 < 4"),
    errors.NumericsError("secret sequence 8"),
]


def details(status: status_pb2.Status) -> dict[str, Message]:
    found = {}
    for kind in ("ErrorInfo", "BadRequest", "RetryInfo", "ResourceInfo", "RequestInfo", "DebugInfo"):
        message = getattr(error_details_pb2, kind)()
        if any(detail.Unpack(message) for detail in status.details):
            found[kind] = message
    return found


def test_every_error_has_a_row_and_an_example() -> None:
    kinds = set(all_errors())
    assert kinds == set(TABLE)
    assert kinds == {type(each) for each in EXAMPLES + SECRETIVE}


@pytest.mark.parametrize("error", EXAMPLES + SECRETIVE, ids=lambda error: type(error).__name__)
def test_an_error_survives_the_way_between_processes(error: errors.AntiphonError) -> None:
    back = pickle.loads(pickle.dumps(error))  # noqa: S301  # what Ray does
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


def test_reasons_are_unique() -> None:
    reasons = [kind.reason for kind in all_errors()]
    assert len(set(reasons)) == len(reasons)


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_a_clients_error_comes_back_as_it_was(error: errors.AntiphonError) -> None:
    back = from_status(to_status(error, "r1"))
    assert type(back) is type(error)
    assert str(back) == str(error)
    assert vars(back) == vars(error)


@pytest.mark.parametrize("error", SECRETIVE, ids=lambda error: type(error).__name__)
def test_a_server_side_message_does_not_reach_the_client(error: errors.AntiphonError) -> None:
    status = to_status(error, "r1")
    assert b"secret" not in status.SerializeToString()
    assert type(from_status(status)) is type(error)


@pytest.mark.parametrize("error", EXAMPLES + SECRETIVE, ids=lambda error: type(error).__name__)
def test_every_status_has_error_info_and_request_id(error: errors.AntiphonError) -> None:
    found = details(to_status(error, "r1"))
    assert found["ErrorInfo"].domain == DOMAIN
    assert found["ErrorInfo"].reason == error.reason
    assert found["RequestInfo"].request_id == "r1"
    assert "DebugInfo" not in found


def test_an_unknown_exception_tells_nothing_but_the_request_id() -> None:
    status = to_status(ZeroDivisionError("/srv/secret.py 10.0.0.7"), "r1")
    assert status.code == code_pb2.INTERNAL
    assert status.message == "internal error (request r1)"
    assert b"secret" not in status.SerializeToString()
    assert type(from_status(status)) is errors.AntiphonError


def test_details_stand_where_they_apply() -> None:
    bad = details(to_status(errors.InvalidRequest("a.b", "no"), "r"))["BadRequest"]
    assert (bad.field_violations[0].field, bad.field_violations[0].description) == ("a.b", "no")
    retry = details(to_status(errors.OutOfBlocks("full", 2.5), "r"))["RetryInfo"]
    assert retry.retry_delay.ToTimedelta().total_seconds() == 2.5
    resource = details(to_status(errors.NotFound("session", "x"), "r"))["ResourceInfo"]
    assert (resource.resource_type, resource.resource_name) == ("session", "x")
    busy = details(to_status(errors.SessionBusy("x", 3), "r"))
    assert busy["ErrorInfo"].metadata["turn"] == "3"
    assert busy["ResourceInfo"].resource_name == "x"


def test_a_status_stays_small_enough_for_a_header() -> None:
    status = to_status(errors.InvalidRequest("f", "x" * 100_000), "r1")
    assert len(status.message) == MAX_TEXT_CHARS
    assert len(status.SerializeToString()) < 4096


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (code_pb2.UNAVAILABLE, errors.Unavailable),
        (code_pb2.DEADLINE_EXCEEDED, errors.DeadlineExceeded),
        (code_pb2.RESOURCE_EXHAUSTED, errors.Exhausted),
        (code_pb2.CANCELLED, errors.AntiphonError),
    ],
)
def test_a_bare_status_of_grpc_itself_is_typed_by_its_code(code: int, kind: type[errors.AntiphonError]) -> None:
    assert type(from_status(status_pb2.Status(code=code))) is kind


def test_a_reason_of_a_newer_server_is_the_base_error() -> None:
    status = status_pb2.Status(code=code_pb2.ABORTED, message="new")
    status.details.add().Pack(error_details_pb2.ErrorInfo(domain=DOMAIN, reason="NEW"))
    assert type(from_status(status)) is errors.AntiphonError
