"""Real session-store servers for tests, and a way to lose what they answer."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import shutil
import socket
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from redis.asyncio import Redis

from services.sessions.connect import RedisSettings, connect
from services.sessions.embedded import EmbeddedServer, find_binary
from services.sessions.keys import Keyspace

KINDS = ("embedded", "debian")


def binary_of(kind: str) -> Path:
    """Skips the test if this machine has no such server."""
    if kind == "embedded":
        return find_binary()
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("redis-server is not on PATH (Debian and Ubuntu: apt-get install redis-server)")
    return Path(found)


@contextlib.contextmanager
def running_server(kind: str) -> Iterator[EmbeddedServer]:
    with tempfile.TemporaryDirectory() as data_dir, EmbeddedServer(Path(data_dir), binary_of(kind)) as server:
        yield server


@contextlib.asynccontextmanager
async def connected(url: str) -> AsyncIterator[Redis]:
    client = connect(RedisSettings(url=url))
    try:
        yield client
    finally:
        await client.aclose()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def fresh_keyspace() -> Keyspace:
    """Tests that share a server see nothing of each other."""
    return Keyspace(cluster=f"test-{secrets.token_hex(4)}", secret=secrets.token_bytes(16))


class LossyProxy:
    """A TCP proxy in front of a server that can lose replies: the command is done, and the client never hears of it."""

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._num_replies_to_lose = 0
        self._listener: asyncio.Server | None = None

    async def __aenter__(self) -> LossyProxy:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listener is not None
        self._listener.close()
        await self._listener.wait_closed()

    @property
    def url(self) -> str:
        """The server's URL, through the proxy."""
        assert self._listener is not None
        port = self._listener.sockets[0].getsockname()[1]
        return self._server_url.replace(f":{urlsplit(self._server_url).port}/", f":{port}/")

    def lose_next_reply(self) -> None:
        self._num_replies_to_lose += 1

    async def _serve(self, client_in: asyncio.StreamReader, client_out: asyncio.StreamWriter) -> None:
        server_in, server_out = await asyncio.open_connection("127.0.0.1", urlsplit(self._server_url).port)
        there = asyncio.create_task(self._copy(client_in, server_out, is_reply=False))
        await self._copy(server_in, client_out, is_reply=True)
        await there

    async def _copy(self, source: asyncio.StreamReader, target: asyncio.StreamWriter, *, is_reply: bool) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65536):
                if is_reply and self._num_replies_to_lose > 0:
                    self._num_replies_to_lose -= 1
                    break
                target.write(data)
                await target.drain()
        target.close()
