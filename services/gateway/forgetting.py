"""A deleted session's KV: whoever holds it is told, so that its blocks are the first to be overwritten."""

from __future__ import annotations

import asyncio
import logging

from services.common.errors import AntiphonError
from services.gateway.decode_client import DecodeClient
from services.gateway.history import History
from services.gateway.replicas import Replicas
from services.gateway.router import LiveHolder, live_holders
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.sessions.base import Acquired
from services.sessions.from_settings import tenant_salt
from services.sessions.keys import Keyspace

log = logging.getLogger(__name__)


class Forgetting:
    """Tells the holders. What does not reach them costs memory until it is evicted anyway, and nothing else."""

    def __init__(self, replicas: Replicas, decode: DecodeClient, keyspace: Keyspace) -> None:
        self._replicas = replicas
        self._decode = decode
        self._keyspace = keyspace

    async def forget(self, acquired: Acquired) -> None:
        """Tells all replicas that hold KV of the session whose lease and journal these are."""
        history, lease = History.of(acquired, ()), acquired.lease
        if not history.token_ids:
            return
        request = pb.ForgetRequest(
            salt=tenant_salt(self._keyspace, lease.tenant),
            token_ids=history.token_ids,
            session_digest=self._keyspace.session_digest(lease.tenant, lease.session_id),
        )
        try:
            holders = live_holders(history.holders, await self._replicas.list())
        except AntiphonError:
            return
        await asyncio.gather(*(self._tell(each, request) for each in holders))

    async def _tell(self, holder: LiveHolder, request: pb.ForgetRequest) -> None:
        named = pb.ForgetRequest()
        named.CopyFrom(request)
        named.incarnation = holder.holder.incarnation
        try:
            await self._decode.forget(holder.address, named)
        except AntiphonError as error:
            fields = {"replica": holder.holder.replica_id, "reason": error.reason}
            log.info("a replica was not told of a deleted session", extra=fields)
