"""The stores of the manifests, run here: their own configuration and users, at another address."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import redis

from services.common.settings import Settings
from tests.manifests.kustomize import ROOT
from tests.manifests.model import Cluster

_SCRIPT = ROOT / "scripts" / "cluster_secrets.py"


def make_secrets(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs scripts/cluster_secrets.py."""
    return subprocess.run([sys.executable, str(_SCRIPT), *arguments], capture_output=True, text=True, check=False)


def with_stores(cluster: Cluster, directory: Path, port: int) -> Settings:
    """The settings of an overlay, with the secrets in `directory` and the session store on this machine."""
    assert cluster.settings is not None
    sessions = {
        "url": (cluster.settings.sessions.url or "").replace("sessions-redis:6379", f"127.0.0.1:{port}"),
        "password_file": directory / "sessions-redis" / "password",
        "secret_file": directory / "antiphon-sessions" / "key",
    }
    gateway = {"auth_tokens_file": directory / "antiphon-tenants" / "tokens.yaml"}
    return cluster.settings.model_copy(
        update={
            "sessions": cluster.settings.sessions.model_copy(update=sessions),
            "gateway": cluster.settings.gateway.model_copy(update=gateway),
        }
    )


def free_port() -> int:
    """One that was free a moment ago."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@contextlib.contextmanager
def store(binary: Path, name: str, directory: Path, data: Path) -> Iterator[int]:
    """The server of k8s/redis with one Secret; gives its port."""
    port = free_port()
    text = (ROOT / "k8s" / "redis" / "redis.conf").read_text()
    for line in (f"aclfile {directory / name / 'users.acl'}", f"port {port}", "bind 127.0.0.1", f"dir {data}"):
        text, count = re.subn(rf"^{line.split()[0]} .*$", line, text, flags=re.MULTILINE)
        assert count == 1
    (data / "redis.conf").write_text(text)
    process = subprocess.Popen([str(binary), str(data / "redis.conf")], stdout=subprocess.DEVNULL)
    try:
        _wait_for_noauth(port)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def _wait_for_noauth(port: int) -> None:
    """What the readiness probe waits for."""
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        with contextlib.closing(redis.Redis(port=port, driver_info=None)) as client:
            try:
                client.ping()
            except redis.exceptions.AuthenticationError:
                return
            except redis.exceptions.ConnectionError:
                time.sleep(0.05)
    raise AssertionError("the store does not answer NOAUTH")
