"""The replicas that are alive, in Redis: each says so at every heartbeat, and is forgotten a TTL after its last.

All of them stand in one hash, so that the router sees them in one round trip, as of one moment. Which prefixes each
holds is not in here: a session's holders say it for the session, and for a prefix that sessions share (a system prompt)
a consistent hash of its first block finds the same replica again without a table. Both are hints anyway: the block pool
is the truth.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from dataclasses import dataclass

from redis.asyncio import Redis

from services.common.errors import StaleLease
from services.sessions.keys import Keyspace
from services.sessions.scripts import Scripts

SCHEMA_VERSION = 1


class Role(enum.Enum):
    """What a replica does."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class ReplicaRecord:
    """A replica at its last heartbeat. Rates are measured by the replica; None until it has measured.

    incarnation: of the process, one word; the next one holds nothing of what this one held. started_at_s: Unix time.
    address: host:port of its gRPC server; empty for prefill, which is called through Serve.
    model_fingerprint, layout_fingerprint: only replicas that agree in both can exchange blocks.
    num_prefilled_tokens: computed as prompts since the start. num_evictable_blocks: free ones that hold something;
    num_session_blocks: those of them that idle sessions will want again. num_refused_blocks: that turns which were
    refused for want of blocks would have taken, since the start.
    inherits: incarnations of replicas that have handed their sessions over to this one.
    """

    role: Role
    replica_id: str
    incarnation: str
    started_at_s: float
    model_fingerprint: str
    layout_fingerprint: str
    block_size: int
    num_blocks: int
    num_free_blocks: int
    address: str = ""
    serve_replica_id: str = ""
    num_running: int = 0
    num_waiting: int = 0
    num_running_tokens: int = 0
    num_waiting_tokens: int = 0
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    transfer_bytes_per_s: float | None = None
    is_draining: bool = False
    block_bytes: int = 0
    num_prefilled_tokens: int = 0
    num_evictable_blocks: int = 0
    num_idle_sessions: int = 0
    num_session_blocks: int = 0
    num_refused_blocks: int = 0
    inherits: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        assert self.incarnation.split() == [self.incarnation], "an incarnation is one word"


_FIELDS = frozenset(field.name for field in dataclasses.fields(ReplicaRecord))


class ReplicaRegistry:
    """Who is alive. client: of services.sessions.connect; it belongs to the caller. All methods raise Unavailable."""

    def __init__(self, client: Redis, keyspace: Keyspace) -> None:
        self._key = keyspace.replicas
        self._scripts = Scripts(client, ("registry_heartbeat", "registry_list", "registry_deregister"))

    async def heartbeat(self, record: ReplicaRecord, ttl_s: float) -> None:
        """Registers the replica, or renews it, for ttl_s.

        Raises StaleLease in a process that a younger incarnation of the same replica has replaced: it should end.
        """
        started_us, ttl_ms = round(record.started_at_s * 1e6), max(1, round(ttl_s * 1e3))
        reply = await self._scripts.run(
            "registry_heartbeat",
            (self._key,),
            (_field(record.role, record.replica_id), record.incarnation, started_us, ttl_ms, _pack(record)),
        )
        if reply == b"OVERTAKEN":
            raise StaleLease(f"replica {record.replica_id} has a younger incarnation")

    async def list(self, role: Role | None = None) -> tuple[ReplicaRecord, ...]:
        """The replicas that are alive by the server's clock, by id; all roles without one.

        Records of another schema version are left out: what they mean is not known here. A field that only a newer
        version knows is passed over, so that two versions can share a registry during an upgrade.
        """
        values = await self._scripts.run("registry_list", (self._key,), ())
        records = (_unpack(value) for value in values)
        alive = (record for record in records if record is not None and role in (None, record.role))
        return tuple(sorted(alive, key=lambda record: (record.role.value, record.replica_id)))

    async def deregister(self, role: Role, replica_id: str, incarnation: str) -> None:
        """Forgets the replica at once; a younger incarnation of it stays."""
        await self._scripts.run("registry_deregister", (self._key,), (_field(role, replica_id), incarnation))


def _field(role: Role, replica_id: str) -> str:
    return f"{role.value}:{replica_id}"


def _pack(record: ReplicaRecord) -> str:
    fields = dataclasses.asdict(record) | {"role": record.role.value, "v": SCHEMA_VERSION}
    return json.dumps(fields, separators=(",", ":"))


def _unpack(value: bytes) -> ReplicaRecord | None:
    fields = json.loads(value)
    if fields.pop("v") != SCHEMA_VERSION:
        return None
    fields["role"] = Role(fields["role"])
    fields["inherits"] = tuple(fields.get("inherits", ()))
    return ReplicaRecord(**{name: value for name, value in fields.items() if name in _FIELDS})
