"""What a running `antiphon serve` leaves for the other commands: where its gateway and its session store are.

One file a gateway port, in the user's own state folder, for its owner only; gone when the cluster stops.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from services.common.errors import InvalidSettings, Unavailable
from services.common.settings import SessionSettings


def state_folder() -> Path:
    """XDG_STATE_HOME/antiphon, or ~/.local/state/antiphon."""
    return Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "antiphon"


@contextmanager
def announced(target: str, sessions: SessionSettings, folder: Path | None = None) -> Iterator[None]:
    """Other commands find the cluster by its target while the block runs."""
    path = _path(target, folder)
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    document = {"target": target, "pid": os.getpid(), "sessions": json.loads(sessions.model_dump_json())}
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8") as file:
        json.dump(document, file)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def find_sessions(target: str, folder: Path | None = None) -> SessionSettings:
    """The session store of the cluster at `target` on this machine. Raises Unavailable if none was announced."""
    try:
        document = json.loads(_path(target, folder).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Unavailable(
            f"no `antiphon serve` of this user and machine is at {target}; --config names the store of another cluster"
        ) from None
    except (OSError, ValueError) as error:
        raise InvalidSettings(f"the state file of {target} cannot be read") from error
    return SessionSettings.model_validate(document["sessions"])


def _path(target: str, folder: Path | None) -> Path:
    return (folder or state_folder()) / f"serve-{target.rpartition(':')[2]}.json"
