"""The session store of a cluster: Redis 7.0 or newer, or Valkey. Every change is one Lua script.

A script is sent again when its reply is lost, so each recognises its own work: a session by its nonce, a lease by its
owner, a committed turn by the mark in its entry.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from redis.asyncio import Redis

from services.common.errors import AlreadyExists, QuotaExceeded, SessionBusy, StaleLease, Unavailable
from services.sessions.base import (
    SESSION_OVERHEAD_BYTES,
    Acquired,
    AlreadyCommitted,
    Holder,
    JournalPosition,
    Lease,
    RecordPage,
    SessionRecord,
    Tier,
    TurnRecord,
    TurnStart,
    check_new_session,
    check_page,
    new_owner,
    new_session_id,
    not_found,
)
from services.sessions.journal import pack_turn, unpack_turn
from services.sessions.keys import Keyspace
from services.sessions.scripts import Scripts, reaching_store

SCHEMA_VERSION = "1"
_SCRIPTS = tuple(
    f"session_{change}"
    for change in ("create", "list", "delete", "acquire", "renew", "commit", "release", "remove_holder")
)


class RedisSessionStore:
    """Implements SessionStore. client: of services.sessions.connect; it belongs to the caller, who closes it.

    quota_bytes: what a tenant may hold in journals and KV blocks, all sessions together; None is no limit.
    """

    def __init__(self, client: Redis, keyspace: Keyspace, quota_bytes: int | None = None) -> None:
        self._client = client
        self._keyspace = keyspace
        self._quota = -1 if quota_bytes is None else quota_bytes
        self._scripts = Scripts(client, _SCRIPTS)

    async def create(
        self, tenant: str, session_id: str | None, *, model: str, ttl_s: float, template_digest: str
    ) -> SessionRecord:
        session_id = new_session_id() if session_id is None else session_id
        check_new_session(session_id, ttl_s)
        status, *reply = await self._run(
            "create",
            tenant,
            session_id,
            (
                session_id,
                new_owner().hex(),
                model,
                template_digest,
                _milliseconds(ttl_s),
                SESSION_OVERHEAD_BYTES,
                self._quota,
                SCHEMA_VERSION,
            ),
        )
        if status == b"EXISTS":
            raise AlreadyExists("session", session_id)
        return _record(_pairs(reply[1]), reply[0])

    async def get(self, tenant: str, session_id: str) -> SessionRecord:
        found = await self._read_all([self._keyspace.session(tenant, session_id).meta])
        if not found:
            raise not_found(session_id)
        return found[0]

    async def list(self, tenant: str, page_size: int, page_token: str = "") -> RecordPage:
        older_than_us = check_page(page_size, page_token)
        tenant_keys = self._keyspace.tenant(tenant)
        _, _, found = await self._scripts.run(
            "session_list",
            (tenant_keys.sessions, tenant_keys.expiry, tenant_keys.bytes),
            ("", page_size, "+inf" if older_than_us is None else f"({older_than_us}"),
        )
        digests, scores = found[0::2], found[1::2]
        sessions = await self._read_all([self._keyspace.session_meta(tenant, digest.decode()) for digest in digests])
        is_last = len(digests) < page_size
        return RecordPage(sessions, "" if is_last else f"{float(scores[-1]):.0f}")

    async def delete(self, tenant: str, session_id: str) -> None:
        await self._run("delete", tenant, session_id, ())

    async def acquire(
        self, tenant: str, session_id: str, turn: TurnStart, lease_ttl_s: float
    ) -> Acquired | AlreadyCommitted:
        owner = new_owner()
        known = turn.known or JournalPosition(0, b"")
        status, now_us, meta, *rest = await self._run(
            "acquire",
            tenant,
            session_id,
            (
                owner.hex(),
                _milliseconds(lease_ttl_s),
                self._idempotency_digest(tenant, turn.idempotency_key),
                turn.needed_bytes,
                self._quota,
                known.num_turns,
                known.head,
            ),
        )
        fields = _pairs(meta)
        session = _record(fields, now_us)
        if status == b"COMMITTED":
            return AlreadyCommitted(int(rest[0]), unpack_turn(rest[1])[0], session)
        lease = Lease(
            tenant=tenant,
            session_id=session_id,
            fence=int(fields["fence"]),
            turn=session.num_turns + 1,
            expires_at_s=int(fields["lease_ms"]) / 1e3,
            owner=owner,
            idempotency_key=turn.idempotency_key,
        )
        num_known, entries = int(rest[0]), [unpack_turn(entry) for entry in rest[1]]
        head = entries[-1][1] if entries else known.head if num_known else b""
        return Acquired(
            lease, session, tuple(turn for turn, _ in entries), num_known, JournalPosition(session.num_turns, head)
        )

    async def renew(self, lease: Lease, lease_ttl_s: float) -> Lease:
        _, lease_ms = await self._run_leased("renew", lease, (_milliseconds(lease_ttl_s),))
        return dataclasses.replace(lease, expires_at_s=int(lease_ms) / 1e3)

    async def commit(self, lease: Lease, turn: TurnRecord, holders: Sequence[Holder]) -> SessionRecord:
        args: list[str | bytes | int] = [
            lease.turn,
            pack_turn(turn, lease.owner),
            len(turn.prompt_token_ids),
            len(turn.generated_token_ids),
            self._idempotency_digest(lease.tenant, lease.idempotency_key),
            SESSION_OVERHEAD_BYTES,
            self._quota,
        ]
        for holder in holders:
            args += _holder_field(holder.replica_id, holder.incarnation), _holder_value(holder), holder.num_bytes
        _, now_us, meta = await self._run_leased("commit", lease, args)
        return _record(_pairs(meta), now_us)

    async def release(self, lease: Lease) -> None:
        await self._run("release", lease.tenant, lease.session_id, (lease.owner.hex(),))

    async def remove_holder(self, tenant: str, session_id: str, replica_id: str, incarnation: str) -> None:
        await self._run("remove_holder", tenant, session_id, (_holder_field(replica_id, incarnation),))

    async def _run_leased(self, change: str, lease: Lease, args: Sequence[str | bytes | int]) -> Any:
        return await self._run(change, lease.tenant, lease.session_id, (lease.owner.hex(), lease.fence, *args))

    async def _run(self, change: str, tenant: str, session_id: str, args: Sequence[str | bytes | int]) -> Any:
        tenant_keys, keys = self._keyspace.tenant(tenant), self._keyspace.session(tenant, session_id)
        reply = await self._scripts.run(
            f"session_{change}",
            (tenant_keys.sessions, tenant_keys.expiry, tenant_keys.bytes, keys.meta, keys.turns),
            (keys.digest, *args),
        )
        match reply[0]:
            case b"MISSING":
                raise not_found(session_id)
            case b"BUSY":
                raise SessionBusy(session_id, int(reply[1]))
            case b"STALE":
                raise StaleLease(f"the lease on session {session_id!r} has been overtaken, released or committed")
            case b"FULL":
                raise QuotaExceeded(f"the tenant's sessions hold as many bytes as they may ({self._quota})")
        return reply

    async def _read_all(self, metas: Sequence[str]) -> tuple[SessionRecord, ...]:
        async with reaching_store(self._scripts.breaker), self._client.pipeline(transaction=False) as pipeline:
            pipeline.time()
            for key in metas:
                pipeline.hgetall(key)
            (seconds, microseconds), *found = await pipeline.execute()
        now_us = seconds * 1_000_000 + microseconds
        return tuple(_record(_text(meta), now_us) for meta in found if meta)

    def _idempotency_digest(self, tenant: str, key: str | None) -> str:
        return "" if key is None else self._keyspace.idempotency_digest(tenant, key)


def _record(fields: Mapping[str, str], now_us: int) -> SessionRecord:
    if fields["schema"] != SCHEMA_VERSION:
        raise Unavailable(f"a session has schema version {fields['schema']}; this release reads {SCHEMA_VERSION}")
    is_running = "owner" in fields and int(fields["lease_ms"]) > now_us // 1000
    num_turns = int(fields["num_turns"])
    return SessionRecord(
        session_id=fields["session_id"],
        model=fields["model"],
        template_digest=fields["template"],
        created_at_s=int(fields["created_us"]) / 1e6,
        updated_at_s=int(fields["updated_ms"]) / 1e3,
        expires_at_s=int(fields["expires_ms"]) / 1e3,
        ttl_s=int(fields["ttl_ms"]) / 1e3,
        num_turns=num_turns,
        num_prompt_tokens=int(fields["num_prompt"]),
        num_generated_tokens=int(fields["num_generated"]),
        num_bytes=int(fields["bytes"]),
        holders=tuple(_holder(value) for field, value in sorted(fields.items()) if field.startswith("holder:")),
        running_turn=num_turns + 1 if is_running else None,
    )


def _pairs(flat: Sequence[bytes]) -> dict[str, str]:
    return {flat[i].decode(): flat[i + 1].decode() for i in range(0, len(flat), 2)}


def _text(fields: Mapping[bytes, bytes]) -> dict[str, str]:
    return {field.decode(): value.decode() for field, value in fields.items()}


def _holder_field(replica_id: str, incarnation: str) -> str:
    return f"holder:{replica_id}:{incarnation}"


def _holder_value(holder: Holder) -> str:
    return json.dumps(
        {
            "replica": holder.replica_id,
            "incarnation": holder.incarnation,
            "computed": holder.num_computed_tokens,
            "tier": holder.tier.value,
            "bytes": holder.num_bytes,
        },
        separators=(",", ":"),
    )


def _holder(value: str) -> Holder:
    fields = json.loads(value)
    return Holder(
        fields["replica"], fields["incarnation"], fields["computed"], Tier(fields["tier"]), num_bytes=fields["bytes"]
    )


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1e3))
