"""The request that carries a turn to its decode replica."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass

from services.common.sampling import SamplingParams
from services.gateway.history import History
from services.gateway.router import Route
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.wire import values


@dataclass(frozen=True, slots=True)
class TurnIdentity:
    """Who a turn is, on every replica that it tries. number: in its session, 0 without one."""

    request_id: str
    session_digest: str
    number: int
    fence: int
    salt: bytes


def decode_request(
    identity: TurnIdentity,
    route: Route,
    history: History,
    token_ids: Sequence[int],
    num_resumed_tokens: int,
    sampling: SamplingParams,
) -> pb.GenerateRequest:
    """token_ids: prompt and the reply so far, whose length is num_resumed_tokens."""
    others = [each for each in route.live_holders if each.holder.replica_id != route.record.replica_id]
    return pb.GenerateRequest(
        request_id=identity.request_id,
        incarnation=route.record.incarnation,
        session_digest=identity.session_digest,
        turn=identity.number,
        fence=identity.fence,
        salt=identity.salt,
        token_ids=token_ids,
        num_history_tokens=history.num_tokens,
        num_resumed_tokens=num_resumed_tokens,
        sampling=values.sampling_to_proto(sampling),
        call_id=secrets.token_hex(16),
        holders=[
            pb.KvHolder(
                replica=each.holder.replica_id,
                incarnation=each.holder.incarnation,
                num_computed_tokens=each.holder.num_computed_tokens,
                address=each.address,
            )
            for each in others
        ],
    )
