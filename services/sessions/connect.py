"""The connection to Redis or Valkey: one server or Sentinel, with or without TLS and an ACL user.

What a deployment's ACL user needs, and no more (`ACL_COMMANDS`, for the keys `Keyspace.pattern`):

    ACL SETUSER antiphon on >PASSWORD ~antiphon:v1:CLUSTER:* resetchannels -@all +ping +evalsha ...
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel, SentinelConnectionPool
from redis.backoff import ExponentialWithJitterBackoff
from redis.maint_notifications import MaintNotificationsConfig

from services.common.errors import InvalidSettings

ACL_COMMANDS = (
    *("ping", "select", "evalsha", "script|load", "time"),
    *("hget", "hgetall", "hvals", "hset", "hdel", "hincrby", "rpush", "lindex", "lrange", "exists", "del", "pexpireat"),
    *("zadd", "zrem", "zrangebyscore", "zrevrange", "zrevrangebyscore"),
)
POOL_WAIT_S = 1.0


@dataclass(frozen=True, slots=True)
class RedisSettings:
    """Where the session store is and how to get in.

    url: redis://, rediss:// (TLS) or unix://, user and password may stand in it. Or, with Sentinel: sentinels (host,
    port) and master_name. ca_file, cert_file, key_file: turn TLS on; cert and key prove who we are (mTLS).
    is_tls: TLS with the system's authorities. timeout_s: of one attempt to connect or to get an answer.
    """

    url: str | None = None
    sentinels: tuple[tuple[str, int], ...] = ()
    master_name: str = "mymaster"
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    sentinel_username: str | None = None
    sentinel_password: str | None = field(default=None, repr=False)
    is_tls: bool = False
    ca_file: str | None = None
    cert_file: str | None = None
    key_file: str | None = None
    db: int = 0
    timeout_s: float = 0.3
    max_connections: int = 64

    def __post_init__(self) -> None:
        if (self.url is None) == (not self.sentinels):
            raise InvalidSettings("redis: exactly one of a url and sentinels is needed")
        if self.url is not None and urlsplit(self.url).scheme not in ("redis", "rediss", "unix"):
            raise InvalidSettings("redis: a url starts with redis://, rediss:// or unix://")
        if (self.cert_file is None) != (self.key_file is None):
            raise InvalidSettings("redis: a client certificate and its key are needed together")

    @property
    def uses_tls(self) -> bool:
        is_rediss = self.url is not None and urlsplit(self.url).scheme == "rediss"
        return is_rediss or self.is_tls or self.ca_file is not None or self.cert_file is not None


def connect(settings: RedisSettings) -> Redis:
    """A client that connects at its first command; the caller closes it with aclose().

    At most max_connections at once, more wait their turn. A command is tried four times before it fails: it has to bear
    repetition.
    """
    options = _options(settings)
    if settings.url is not None:
        return _from_url(settings, options)
    options["ssl"] = settings.uses_tls
    # Sentinels are asked one after another, so each gets a single, short try.
    sentinel_options = options | {"username": settings.sentinel_username, "password": settings.sentinel_password}
    sentinel_options["retry"] = Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 0)
    del sentinel_options["db"]
    sentinel = Sentinel(settings.sentinels, sentinel_kwargs=sentinel_options, **options)  # type: ignore[no-untyped-call]
    client: Redis = sentinel.master_for(
        settings.master_name,
        redis_class=_SentinelClient,
        connection_pool_class=_BlockingSentinelPool,
        max_connections=settings.max_connections,
        timeout=POOL_WAIT_S,
    )
    return client


class _BlockingSentinelPool(SentinelConnectionPool, BlockingConnectionPool):
    """redis-py's own pool for Sentinel fails at once when all its connections are in use."""


class _SentinelClient(Redis):
    """Closes its connections to the Sentinels too; redis-py leaves them to whoever made the Sentinel object."""

    async def aclose(self, close_connection_pool: bool | None = None) -> None:
        await super().aclose(close_connection_pool)
        assert isinstance(self.connection_pool, SentinelConnectionPool)
        await self.connection_pool.sentinel_manager.aclose()


def _from_url(settings: RedisSettings, options: dict[str, Any]) -> Redis:
    url = settings.url or ""
    if settings.uses_tls and url.startswith("redis://"):
        url = "rediss://" + url.removeprefix("redis://")
    # What stands in the URL wins over the same in the options.
    pool = BlockingConnectionPool.from_url(
        url, max_connections=settings.max_connections, timeout=POOL_WAIT_S, **options
    )
    return Redis.from_pool(pool)


def _options(settings: RedisSettings) -> dict[str, Any]:
    options: dict[str, Any] = {
        "db": settings.db,
        "username": settings.username,
        "password": settings.password,
        "protocol": 2,
        "socket_timeout": settings.timeout_s,
        "socket_connect_timeout": settings.timeout_s,
        "retry": Retry(ExponentialWithJitterBackoff(base=0.05, cap=0.5), 3),
        "health_check_interval": 15,
        # Two handshakes at every connection, for a client's name and for notices that only Redis Cloud sends.
        "driver_info": None,
        "maint_notifications_config": MaintNotificationsConfig(enabled=False),
    }
    if settings.uses_tls:
        options |= {
            "ssl_ca_certs": settings.ca_file,
            "ssl_certfile": settings.cert_file,
            "ssl_keyfile": settings.key_file,
            "ssl_cert_reqs": "required",
            "ssl_check_hostname": True,
            "ssl_min_version": ssl.TLSVersion.TLSv1_2,
        }
    return options
