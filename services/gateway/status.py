"""The gRPC side of errors: ends a call with a status, and turns a failed call into a typed error.

The table itself is services.wire.status.
"""

from __future__ import annotations

from typing import Any, NoReturn, cast

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from services.common.errors import AntiphonError
from services.wire.status import from_status, to_status


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception, request_id: str) -> NoReturn:
    """Ends the call with the error's status and details. Raises, as every abort does."""
    await context.abort_with_status(rpc_status.to_status(to_status(error, request_id)))
    raise AssertionError("unreachable: abort raises") from error


def error_from_rpc(failed: grpc.RpcError) -> AntiphonError:
    """The typed error of a failed call, sync or async, for a client of either hop."""
    return from_status(status_of(failed))


def status_of(failed: grpc.RpcError) -> status_pb2.Status:
    """The google.rpc.Status of a failed call, made from code and message if it carries none that fits them."""
    call = cast("grpc.Call", failed)  # every RpcError that a call raises is one
    try:
        status = rpc_status.from_call(call)
    except ValueError:  # details that contradict the code: not from our table
        status = None
    return status or status_pb2.Status(code=call.code().value[0], message=call.details() or "")
