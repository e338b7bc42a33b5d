"""Waiting for what must not be left half done, however often the one who waits is cancelled.

Twice is usual: at a deadline the edge's own timer cancels a turn, and then gRPC cancels its handler.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


async def until_done(future: asyncio.Future[Any]) -> None:
    """Waits for the end, whatever it is. Raises CancelledError then, if this task was cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled


async def to_its_end(work: Coroutine[Any, Any, T]) -> T:
    """What work returns or raises; it has ended in any case.

    Raises CancelledError in its stead if this task was cancelled meanwhile.
    """
    task = asyncio.ensure_future(work)
    try:
        await until_done(task)
    except asyncio.CancelledError:
        if not task.cancelled():
            task.exception()  # nobody else will look at it, and asyncio would complain
        raise
    return task.result()
