"""The secrets that the manifests want, and the stores that they open: real servers, configured as in k8s/redis."""

from __future__ import annotations

import contextlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from services.common.settings import Settings
from services.gateway.auth import read_tokens
from services.sessions.connect import connect
from services.sessions.from_settings import keyspace_of, redis_settings
from services.sessions.redis_store import RedisSessionStore
from services.sessions.registry import ReplicaRegistry
from tests.manifests.checks.links import EXTERNAL
from tests.manifests.kustomize import ROOT
from tests.redis_servers import KINDS, binary_of

SCRIPT = ROOT / "scripts" / "cluster_secrets.py"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("secrets")
    assert run("--directory", str(folder), "--tenant", "acme", "--tenant", "umbrella").returncode == 0
    return folder


def test_every_secret_that_a_manifest_names_is_made() -> None:
    made = {doc["metadata"]["name"]: set(doc["stringData"]) for doc in yaml.safe_load_all(run().stdout)}
    assert made == {name: keys for (kind, name), keys in EXTERNAL.items() if kind == "Secret"}


def test_no_two_runs_make_the_same() -> None:
    assert run().stdout != run().stdout


def test_files_are_for_their_owner_and_never_replaced(directory: Path) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    before = {path: path.read_text() for path in files}
    again = run("--directory", str(directory))
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert {path: path.read_text() for path in files} == before


def test_tenants_get_tokens_that_the_gateway_reads(directory: Path) -> None:
    assert sorted(read_tokens(directory / "antiphon-tenants" / "tokens.yaml").values()) == ["acme", "umbrella"]


@contextlib.contextmanager
def store(binary: Path, name: str, directory: Path, data: Path) -> Iterator[int]:
    """The server of k8s/redis with one Secret; gives its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    text = (ROOT / "k8s" / "redis" / "redis.conf").read_text()
    for line in (f"aclfile {directory / name / 'users.acl'}", f"port {port}", "bind 127.0.0.1", f"dir {data}"):
        text, count = re.subn(rf"^{line.split()[0]} .*$", line, text, flags=re.MULTILINE)
        assert count == 1
    (data / "redis.conf").write_text(text)
    process = subprocess.Popen([str(binary), str(data / "redis.conf")], stdout=subprocess.DEVNULL)
    try:
        wait_for_noauth(port)
        yield port
    finally:
        process.terminate()
        process.wait(10)


def wait_for_noauth(port: int) -> None:
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


@pytest.mark.parametrize("kind", KINDS)
async def test_the_application_gets_into_its_store_and_no_further(kind: str, directory: Path, tmp_path: Path) -> None:
    with store(binary_of(kind), "sessions-redis", directory, tmp_path) as port:
        settings = deployed_settings(directory, port)
        keyspace = keyspace_of(settings.sessions)
        async with contextlib.aclosing(connect(redis_settings(settings.sessions))) as client:
            sessions = RedisSessionStore(client, keyspace)
            made = await sessions.create("acme", None, model="demo", ttl_s=60.0, template_digest="d")
            assert (await sessions.get("acme", made.session_id)) == made
            assert await ReplicaRegistry(client, keyspace).list() == ()
            for forbidden in (("GET", "elsewhere"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    await client.execute_command(*forbidden)


def deployed_settings(directory: Path, port: int) -> Settings:
    """What deploy/serve/cluster.yaml says about the store, at another address and with the files elsewhere."""
    text = (ROOT / "deploy" / "serve" / "cluster.yaml").read_text()
    text = text.replace("sessions-redis:6379", f"127.0.0.1:{port}")
    text = text.replace("/etc/antiphon/sessions/password", str(directory / "sessions-redis" / "password"))
    text = text.replace("/etc/antiphon/sessions/key", str(directory / "antiphon-sessions" / "key"))
    document: dict[str, Any] = yaml.safe_load(text)
    return Settings.from_mapping(document["applications"][0]["args"], {})


@pytest.mark.parametrize("kind", KINDS)
def test_ray_gets_what_it_needs_and_cannot_stop_the_store(kind: str, directory: Path, tmp_path: Path) -> None:
    password = (directory / "gcs-redis" / "password").read_text()
    with (
        store(binary_of(kind), "gcs-redis", directory, tmp_path) as port,
        contextlib.closing(redis.Redis(port=port, username="ray", password=password, driver_info=None)) as client,
    ):
        client.hset("RAY1@KV", "key", "value")
        assert client.hscan("RAY1@KV")[1] == {b"key": b"value"}
        assert client.info("server")
        for forbidden in (("SHUTDOWN",), ("CONFIG", "GET", "*"), ("FLUSHALL",)):
            with pytest.raises(redis.exceptions.NoPermissionError):
                client.execute_command(*forbidden)
