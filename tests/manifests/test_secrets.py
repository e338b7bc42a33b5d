"""The secrets that the manifests want, and the stores that they open: real servers, configured as in k8s/redis."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import redis
import yaml

from services.gateway.auth import read_tokens
from services.sessions.connect import connect
from services.sessions.from_settings import keyspace_of, redis_settings
from services.sessions.redis_store import RedisSessionStore
from services.sessions.registry import ReplicaRegistry
from tests.manifests.checks.links import EXTERNAL
from tests.manifests.kustomize import K8S, build
from tests.manifests.model import Cluster
from tests.manifests.stores import make_secrets, store, with_stores
from tests.redis_servers import KINDS, binary_of


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("secrets")
    assert make_secrets("--directory", str(folder), "--tenant", "acme", "--tenant", "umbrella").returncode == 0
    return folder


def test_every_secret_that_a_manifest_names_is_made() -> None:
    made = {doc["metadata"]["name"]: set(doc["stringData"]) for doc in yaml.safe_load_all(make_secrets().stdout)}
    assert made == {name: keys for (kind, name), keys in EXTERNAL.items() if kind == "Secret"}


def test_no_two_runs_make_the_same() -> None:
    assert make_secrets().stdout != make_secrets().stdout


def test_files_are_for_their_owner_and_never_replaced(directory: Path) -> None:
    files = [path for path in directory.rglob("*") if path.is_file()]
    assert {path.stat().st_mode & 0o777 for path in files} == {0o600}
    before = {path: path.read_text() for path in files}
    again = make_secrets("--directory", str(directory))
    assert again.returncode == 1
    assert "exists" in again.stderr
    assert {path: path.read_text() for path in files} == before


def test_tenants_get_tokens_that_the_gateway_reads(directory: Path) -> None:
    assert sorted(read_tokens(directory / "antiphon-tenants" / "tokens.yaml").values()) == ["acme", "umbrella"]


@pytest.mark.parametrize("kind", KINDS)
async def test_the_application_gets_into_its_store_and_no_further(kind: str, directory: Path, tmp_path: Path) -> None:
    with store(binary_of(kind), "sessions-redis", directory, tmp_path) as port:
        settings = with_stores(Cluster("base", build(K8S / "base")), directory, port)
        keyspace = keyspace_of(settings.sessions)
        async with contextlib.aclosing(connect(redis_settings(settings.sessions))) as client:
            sessions = RedisSessionStore(client, keyspace)
            made = await sessions.create("acme", None, model="demo", ttl_s=60.0, template_digest="d")
            assert (await sessions.get("acme", made.session_id)) == made
            assert await ReplicaRegistry(client, keyspace).list() == ()
            for forbidden in (("GET", "elsewhere"), ("FLUSHALL",), ("CONFIG", "GET", "*"), ("ACL", "LIST")):
                with pytest.raises(redis.exceptions.NoPermissionError):
                    await client.execute_command(*forbidden)


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
