"""Every key that antiphon has in Redis is named here and nowhere else.

    antiphon:v1:<cluster>:{t:<tenant digest>}:sessions                       zset  session digest by creation time (us)
    antiphon:v1:<cluster>:{t:<tenant digest>}:expiry                         zset  session digest by expiry (ms)
    antiphon:v1:<cluster>:{t:<tenant digest>}:bytes                          hash  session digest -> bytes; "total"
    antiphon:v1:<cluster>:{t:<tenant digest>}:session:<session digest>:meta  hash  the session, its lease, its holders
    antiphon:v1:<cluster>:{t:<tenant digest>}:session:<session digest>:turns list  the journal, an entry a turn
    antiphon:v1:<cluster>:{replicas}                                         hash  "<role>:<replica id>" -> record

The hash tag is the tenant's, not the session's: a byte quota that is kept in the script that appends to a journal needs
both in one slot. What people type never becomes part of a key: tenant, session and idempotency key are keyed digests,
so a key that leaks names nobody, and no text can break out of its place.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from dataclasses import dataclass, field

from services.common.errors import InvalidSettings

PREFIX = "antiphon:v1"
MIN_SECRET_BYTES = 16
_CLUSTER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


@dataclass(frozen=True, slots=True)
class SessionKeys:
    """The keys of one session. digest (32 hex characters) stands for it in the tenant's keys and in logs."""

    digest: str
    meta: str
    turns: str


@dataclass(frozen=True, slots=True)
class TenantKeys:
    """The keys of one tenant: what it has, when that ends, and how many bytes that is."""

    sessions: str
    expiry: str
    bytes: str


@dataclass(frozen=True, slots=True)
class Keyspace:
    """The keys of one deployment.

    secret: known to this deployment only, at least 16 bytes; other digests, and so other sessions, come of another.
    Raises InvalidSettings.
    """

    cluster: str
    secret: bytes = field(repr=False)

    def __post_init__(self) -> None:
        if not _CLUSTER_NAME.fullmatch(self.cluster):
            raise InvalidSettings(f"cluster name {self.cluster!r}: 1 to 63 letters, digits, '-', '_' or '.'")
        if len(self.secret) < MIN_SECRET_BYTES:
            raise InvalidSettings(
                f"the deployment's secret has {len(self.secret)} bytes, not {MIN_SECRET_BYTES} or more"
            )

    @property
    def pattern(self) -> str:
        """Matches every key of this deployment and none of another: for an ACL rule `~pattern`."""
        return f"{PREFIX}:{self.cluster}:*"

    @property
    def replicas(self) -> str:
        """The registry of replicas."""
        return f"{PREFIX}:{self.cluster}:{{replicas}}"

    def tenant(self, tenant: str) -> TenantKeys:
        """The keys of a tenant."""
        base = self._tenant_base(tenant)
        return TenantKeys(f"{base}:sessions", f"{base}:expiry", f"{base}:bytes")

    def session(self, tenant: str, session_id: str) -> SessionKeys:
        """The keys of a session of a tenant; the same id of another tenant has nothing in common with them."""
        digest = self.session_digest(tenant, session_id)
        meta = self.session_meta(tenant, digest)
        return SessionKeys(digest, meta, f"{meta.removesuffix(':meta')}:turns")

    def session_meta(self, tenant: str, digest: str) -> str:
        """The meta key of a session of which only the digest is known, as from the tenant's list."""
        return f"{self._tenant_base(tenant)}:session:{digest}:meta"

    def session_digest(self, tenant: str, session_id: str) -> str:
        """32 hex characters that stand for a session where its name must not appear."""
        return self._digest("session", tenant, session_id)

    def idempotency_digest(self, tenant: str, key: str) -> str:
        """32 hex characters that stand for a caller's idempotency key."""
        return self._digest("idempotency", tenant, key)

    def _tenant_base(self, tenant: str) -> str:
        return f"{PREFIX}:{self.cluster}:{{t:{self._digest('tenant', tenant)}}}"

    def _digest(self, *parts: str) -> str:
        # Lengths go in front so that ("a", "bc") and ("ab", "c") differ. surrogatepass: any str has a digest.
        encoded = [part.encode("utf-8", "surrogatepass") for part in parts]
        message = b"".join(len(part).to_bytes(4, "big") + part for part in encoded)
        return hmac.digest(self.secret, message, hashlib.sha256)[:16].hex()
