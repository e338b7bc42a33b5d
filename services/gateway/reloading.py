"""Secrets in files that change while the gateway runs: tokens and certificates are rotated without a restart."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

from services.common.errors import InvalidSettings

T = TypeVar("T")
_Stamp = tuple[tuple[int, int, int] | None, ...]

log = logging.getLogger(__name__)


class FileValue(Generic[T]):
    """What `read` makes of some files; `value` is the newest that was good.

    Raises what `read` raises, but at the start only: a file that is bad later (half written, removed) is reported in
    the log and looked at again, and the value stays.
    """

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        self._paths = paths
        self._read = read
        self._stamp = self._stamp_now()
        self._reported: _Stamp | None = None
        self.value = read()

    def refresh(self) -> bool:
        """Reads the files if they are others than those that were read last. True if there is a new value."""
        stamp = self._stamp_now()
        if stamp == self._stamp:
            return False
        try:
            self.value = self._read()
        except InvalidSettings as error:
            if stamp != self._reported:
                log.error("a changed file is not used: %s", error)
                self._reported = stamp
            return False
        self._stamp = stamp
        return True

    def _stamp_now(self) -> _Stamp:
        return tuple(_stamp(path) for path in self._paths)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()  # of what a link points to: that is how mounted secrets change
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ino, status.st_size
