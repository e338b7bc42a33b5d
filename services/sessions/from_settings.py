"""The session store as the configuration describes it: how to reach it, and how its keys are named."""

from __future__ import annotations

import hashlib
import hmac
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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
    secrets = {name: _secret(name, getattr(settings, name)) for name in ("password_file", "sentinel_password_file")}
    common: dict[str, Any] = {
        "password": secrets["password_file"],
        "ca_file": _text(settings.tls_ca_file),
        "cert_file": _text(settings.tls_cert_file),
        "key_file": _text(settings.tls_key_file),
        "timeout_s": settings.timeout_s,
    }
    if settings.store == "redis":
        return RedisSettings(url=settings.url, **common)
    url = urlsplit(settings.url or "")
    return RedisSettings(
        sentinels=tuple(_host_and_port(each) for each in settings.sentinels),
        master_name=settings.sentinel_master,
        username=url.username,
        db=_database(url.path),
        is_tls=url.scheme == "rediss",
        sentinel_username=settings.sentinel_username,
        sentinel_password=secrets["sentinel_password_file"],
        **common,
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


def _database(path: str) -> int:
    number = path.strip("/") or "0"
    if not number.isdecimal():
        raise InvalidSettings(f"sessions.url: the database is a number, got {number!r}")
    return int(number)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path)


def _secret(key: str, path: Path | None) -> str | None:
    return None if path is None else _read(key, path).decode()


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
