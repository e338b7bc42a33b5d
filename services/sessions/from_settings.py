"""The session store as the configuration describes it: how to reach it, and how its keys are named."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path

from services.common.errors import InvalidSettings
from services.common.settings import SessionSettings
from services.sessions.connect import RedisSettings
from services.sessions.keys import Keyspace

SALT_BYTES = 16


def redis_settings(settings: SessionSettings) -> RedisSettings:
    """How to reach the store. Raises InvalidSettings: a file or address that cannot be read, or an embedded store.

    An embedded store has no address before it runs: who starts it (services.app) hands on settings of store `redis`.
    """
    if settings.store == "embedded":
        raise InvalidSettings(
            "sessions.store: embedded is started by `antiphon serve`; elsewhere give redis and its url"
        )
    return RedisSettings(
        url=None if settings.store == "sentinel" else settings.url,
        sentinels=tuple(_host_and_port(each) for each in settings.sentinels) if settings.store == "sentinel" else (),
        master_name=settings.sentinel_master,
        password=None if settings.password_file is None else _read("password_file", settings.password_file).decode(),
        ca_file=None if settings.tls_ca_file is None else str(settings.tls_ca_file),
        timeout_s=settings.timeout_s,
    )


def keyspace_of(settings: SessionSettings) -> Keyspace:
    """The names of the store's keys. Raises InvalidSettings without a secret: everybody has to read the same one."""
    if settings.secret_file is None:
        raise InvalidSettings("sessions.secret_file: needed by processes that share sessions")
    return Keyspace(settings.cluster, _read("secret_file", settings.secret_file))


def tenant_salt(keyspace: Keyspace, tenant: str) -> bytes:
    """16 secret bytes that seed the tenant's prefix hashes: tenants never share a KV block."""
    message = b"antiphon.prefix-salt\0" + tenant.encode("utf-8", "surrogatepass")
    return hmac.digest(keyspace.secret, message, hashlib.sha256)[:SALT_BYTES]


def _host_and_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal():
        raise InvalidSettings(f"sessions.sentinels: host:port is needed, got {text!r}")
    return host.strip("[]"), int(port)


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes().strip()
    except OSError as error:
        raise InvalidSettings(f"sessions.{key}: {path}: {error.strerror}") from error
