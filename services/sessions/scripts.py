"""Runs the Lua scripts of lua/ and turns what redis-py raises into our errors."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from importlib.resources import files
from typing import Any

from redis import exceptions as redis_errors
from redis.asyncio import Redis

from services.common.errors import Unavailable
from services.sessions.breaker import Breaker

# One call, retries and all. Longer than a lost packet, shorter than a failover: waiting on is for the caller to decide.
OPERATION_TIMEOUT_S = 1.5
# How a server says that it cannot do its work now; any other error answer is a mistake of ours and stays what it is.
_UNAVAILABLE_REPLIES = ("MISCONF", "NOREPLICAS", "OOM", "READONLY", "LOADING", "MASTERDOWN", "NOAUTH", "BUSY")


class Scripts:
    """The named scripts on one server. name: of the file in lua/, without its ending.

    While the server does not answer, calls fail at once (`breaker`).
    """

    def __init__(self, client: Redis, names: Sequence[str], timeout_s: float = OPERATION_TIMEOUT_S) -> None:
        self._scripts = {name: client.register_script(_source(name)) for name in names}
        self._timeout_s = timeout_s
        self.breaker = Breaker()

    async def run(self, name: str, keys: Sequence[str], args: Sequence[str | bytes | int]) -> Any:
        """What the script returns, undecoded. Raises Unavailable."""
        async with reaching_store(self.breaker, self._timeout_s):
            return await self._scripts[name](keys=keys, args=args)


@contextlib.asynccontextmanager
async def reaching_store(breaker: Breaker, timeout_s: float = OPERATION_TIMEOUT_S) -> AsyncIterator[None]:
    """Around commands to Redis: raises Unavailable if it cannot be reached, or has not answered in time."""
    try:
        with breaker.call():
            try:
                async with asyncio.timeout(timeout_s):
                    yield
            except (redis_errors.ConnectionError, redis_errors.TimeoutError) as error:
                raise OSError(type(error).__name__) from error
    except OSError as error:  # TimeoutError is one
        raise Unavailable(f"the session store cannot be reached ({type(error).__name__})") from error
    except redis_errors.ResponseError as error:
        if isinstance(error, _REFUSALS) or str(error).startswith(_UNAVAILABLE_REPLIES):
            raise Unavailable(f"the session store refuses the command ({type(error).__name__})") from error
        raise


_REFUSALS = (
    redis_errors.ReadOnlyError,
    redis_errors.OutOfMemoryError,
    redis_errors.NoPermissionError,
    redis_errors.ClusterDownError,
    redis_errors.TryAgainError,
)


def _source(name: str) -> str:
    """A script's text. The session scripts have their common part after the first line, which must stay the first."""
    folder = files(__package__) / "lua"
    source = (folder / f"{name}.lua").read_text()
    if not name.startswith("session_"):
        return source
    shebang, rest = source.split("\n", 1)
    return f"{shebang}\n{(folder / 'session_common.lua').read_text()}{rest}"
