"""Sessions and registry on servers as they are run in earnest: ACL user, TLS, Sentinel; and on servers in trouble."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from redis.asyncio import Redis
from redis.exceptions import NoPermissionError

from services.common.errors import InvalidSettings, SessionBusy, Unavailable
from services.common.sampling import FinishReason
from services.common.settings import SessionSettings
from services.sessions.base import Acquired, Holder, SessionStore, TurnRecord, TurnStart
from services.sessions.connect import ACL_COMMANDS, RedisSettings, connect
from services.sessions.embedded import EmbeddedServer
from services.sessions.from_settings import redis_settings
from services.sessions.redis_store import RedisSessionStore
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role
from tests.redis_servers import KINDS, binary_of, connected, free_port, fresh_keyspace, running_server

TURN = TurnRecord((1, 2, 3), (4, 5), FinishReason.STOP)
RECORD = ReplicaRecord(Role.DECODE, "decode-0", "boot-1", 1000.0, "model", "layout", 16, 100, 40)


@pytest.fixture(params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[EmbeddedServer]:
    with running_server(request.param) as started:
        yield started


@pytest.fixture
async def client(server: EmbeddedServer) -> AsyncIterator[Redis]:
    async with connected(server.url) as client:
        yield client


async def make(store: SessionStore, session_id: str = "chat", ttl_s: float = 60.0) -> None:
    await store.create("acme", session_id, model="demo", ttl_s=ttl_s, template_digest="")


async def begin(store: SessionStore) -> Acquired:
    acquired = await store.acquire("acme", "chat", TurnStart(), 30.0)
    assert isinstance(acquired, Acquired)
    return acquired


async def use_everything(store: SessionStore, registry: ReplicaRegistry) -> None:
    """Every method, and in the store every command that the scripts know."""
    await make(store)
    failed = await begin(store)
    with pytest.raises(SessionBusy):
        await begin(store)
    await store.renew(failed.lease, 30.0)
    await store.release(failed.lease)
    for _ in range(2):
        acquired = await begin(store)
        await store.commit(acquired.lease, TURN, [Holder("decode-0", "boot-1", 5, num_bytes=64)])
    assert (await begin(store)).num_known_turns == 0
    known = acquired.lease.position_after_commit
    await store.delete("acme", "chat")
    await make(store)
    await store.acquire("acme", "chat", TurnStart("key", 0, known), 30.0)
    await store.remove_holder("acme", "chat", "decode-0", "boot-1")
    await store.get("acme", "chat")
    assert len((await store.list("acme", 10)).sessions) == 1
    await registry.heartbeat(RECORD, 10)
    assert await registry.list() == (RECORD,)
    await registry.deregister(Role.DECODE, "decode-0", "boot-1")


# Ways in


async def test_acl_user_needs_no_more_than_the_listed_commands_and_keys(server: EmbeddedServer, client: Redis) -> None:
    keyspace = fresh_keyspace()
    await client.execute_command(
        *("ACL", "SETUSER", "antiphon", "on", ">pass word", f"~{keyspace.pattern}", "resetchannels", "-@all"),
        *(f"+{command}" for command in ACL_COMMANDS),
    )
    place = server.url.rsplit("@", 1)[1]
    settings = RedisSettings(url=f"redis://{place}", username="antiphon", password="pass word")
    async with contextlib.aclosing(connect(settings)) as limited:
        await use_everything(RedisSessionStore(limited, keyspace), ReplicaRegistry(limited, keyspace))
        assert await client.execute_command("ACL", "LOG") == []
        for forbidden in (("GET", "elsewhere"), ("FLUSHALL",), ("KEYS", "*"), ("CONFIG", "GET", "*")):
            with pytest.raises(NoPermissionError):
                await limited.execute_command(*forbidden)
        with pytest.raises(Unavailable):
            await make(RedisSessionStore(limited, fresh_keyspace()))


async def test_wrong_password_is_unavailable_and_does_not_show_it(server: EmbeddedServer) -> None:
    settings = RedisSettings(url=f"redis://{server.url.rsplit('@', 1)[1]}", password="not the password")
    assert "not the password" not in repr(settings)
    async with contextlib.aclosing(connect(settings)) as stranger:
        with pytest.raises(Unavailable) as refused:
            await make(RedisSessionStore(stranger, fresh_keyspace()))
    assert "password" not in str(refused.value)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"url": "redis://a", "sentinels": (("a", 1),)},
        {"url": "http://a"},
        {"url": "rediss://a", "cert_file": "c.pem"},
    ],
)
def test_settings_that_lead_nowhere_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidSettings):
        RedisSettings(**settings)  # type: ignore[arg-type]


Authority = tuple[x509.Name, ec.EllipticCurvePrivateKey]


def certificate(directory: Path, name: str, issuer: Authority | None) -> Authority:
    """NAME.pem and NAME.key for 127.0.0.1, signed by the issuer or by itself."""
    key, subject = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    issuer_name, issuer_key = issuer or (subject, key)
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    (directory / f"{name}.pem").write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    (directory / f"{name}.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return subject, key


@contextlib.contextmanager
def spawned(binary: Path, config: Path, port: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server with a configuration of the test's own; it listens when the block begins."""
    log = config.with_suffix(".log").open("wb")
    process = subprocess.Popen([str(binary), str(config), *arguments], stdout=log, stderr=log)
    try:
        _wait_for_port(port)
        yield process
    finally:
        process.kill()
        process.wait()
        log.close()


def _wait_for_port(port: int) -> None:
    deadline_s = time.monotonic() + 10
    while time.monotonic() < deadline_s:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise AssertionError(f"nothing listens on {port}")


@pytest.mark.parametrize("must_prove_client", [False, True])
async def test_tls_lets_in_who_trusts_and_is_trusted(tmp_path: Path, must_prove_client: bool) -> None:
    authority = certificate(tmp_path, "ca", None)
    certificate(tmp_path, "server", authority)
    certificate(tmp_path, "client", authority)
    certificate(tmp_path, "stranger", None)
    port = free_port()
    config = tmp_path / "redis.conf"
    config.write_text(
        f'bind 127.0.0.1\nport 0\ntls-port {port}\ndir "{tmp_path}"\nsave ""\n'
        f"tls-cert-file {tmp_path}/server.pem\ntls-key-file {tmp_path}/server.key\ntls-ca-cert-file {tmp_path}/ca.pem\n"
        f"tls-auth-clients {'yes' if must_prove_client else 'no'}\n"
    )
    url, ca_file = f"rediss://127.0.0.1:{port}/0", str(tmp_path / "ca.pem")
    proof = {"cert_file": str(tmp_path / "client.pem"), "key_file": str(tmp_path / "client.key")}
    keyspace = fresh_keyspace()
    with spawned(binary_of("debian"), config, port):
        files = {"tls_cert_file": proof["cert_file"], "tls_key_file": proof["key_file"]} if must_prove_client else {}
        trusted = redis_settings(SessionSettings(store="redis", url=url, tls_ca_file=ca_file, **files))
        async with contextlib.aclosing(connect(trusted)) as client:
            await use_everything(RedisSessionStore(client, keyspace), ReplicaRegistry(client, keyspace))
        strangers = [RedisSettings(url=url, ca_file=str(tmp_path / "stranger.pem")), RedisSettings(url=url)]
        if must_prove_client:
            strangers.append(RedisSettings(url=url, ca_file=ca_file))
        for settings in strangers:
            async with contextlib.aclosing(connect(settings)) as client:
                with pytest.raises(Unavailable):
                    await RedisSessionStore(client, keyspace).get("acme", "chat")


@contextlib.contextmanager
def sentinel_group(binary: Path, directory: Path) -> Iterator[tuple[subprocess.Popen[bytes], RedisSettings]]:
    """A master, a replica and three Sentinels, all with passwords; yields the master's process and the way in."""
    ports = [free_port() for _ in range(5)]
    with contextlib.ExitStack() as stack:
        processes = []
        for number, port in enumerate(ports):
            config = directory / f"{number}.conf"
            config.write_text(
                f'bind 127.0.0.1\nport {port}\ndir "{directory}"\nrequirepass pass-of-sentinel\n'
                f"sentinel monitor antiphon 127.0.0.1 {ports[0]} 2\nsentinel auth-pass antiphon pass-of-data\n"
                "sentinel sentinel-pass pass-of-sentinel\nsentinel down-after-milliseconds antiphon 500\n"
                "sentinel failover-timeout antiphon 2000\n"
                if number >= 2
                else f'bind 127.0.0.1\nport {port}\ndir "{directory}"\nsave ""\nrequirepass pass-of-data\n'
                f"masterauth pass-of-data\nrepl-diskless-sync-delay 0\n"
                + (f"replicaof 127.0.0.1 {ports[0]}\n" if number == 1 else "")
            )
            arguments = ["--sentinel"] if number >= 2 else []
            processes.append(stack.enter_context(spawned(binary, config, port, *arguments)))
        for name in ("pass-of-data", "pass-of-sentinel"):
            (directory / name).write_text(f"{name}\n")
        settings = SessionSettings(
            store="sentinel",
            sentinels=tuple(f"127.0.0.1:{port}" for port in ports[2:]),
            password_file=directory / "pass-of-data",
            sentinel_password_file=directory / "pass-of-sentinel",
        )
        yield processes[0], redis_settings(settings)


async def until(seconds: float, condition: object) -> None:
    """Waits until the coroutine function returns True."""
    assert callable(condition)
    deadline_s = time.monotonic() + seconds
    while not await condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("kind", KINDS)
async def test_sentinel_failover_loses_no_replicated_turn_and_no_call_hangs(tmp_path: Path, kind: str) -> None:
    with sentinel_group(binary_of(kind), tmp_path) as (master, settings):
        async with contextlib.aclosing(connect(settings)) as client:
            keyspace = fresh_keyspace()
            store = RedisSessionStore(client, keyspace)

            async def is_replicated() -> bool:
                with contextlib.suppress(Exception):
                    info = await client.info("replication")
                    return info["connected_slaves"] == 1 and info["slave0"]["state"] == "online"
                return False

            async def sentinels_know_each_other() -> bool:
                known = []
                for host, port in settings.sentinels:
                    url = f"redis://:pass-of-sentinel@{host}:{port}"
                    async with connected(url) as sentinel:
                        state = await sentinel.sentinel_master("antiphon")
                        known.append((state["num-other-sentinels"], state["num-slaves"]) == (2, 1))
                return all(known)

            await until(10, is_replicated)
            await until(15, sentinels_know_each_other)
            await make(store)
            before = await begin(store)
            await store.commit(before.lease, TURN, [])
            assert await client.execute_command("WAIT", 1, 2000) == 1

            master.kill()
            answers: list[float] = []

            async def is_back() -> bool:
                started_s = time.monotonic()
                try:
                    await store.get("acme", "chat")
                except Unavailable:
                    return False
                finally:
                    answers.append(time.monotonic() - started_s)
                return True

            await until(20, is_back)
            assert max(answers) < 2.0
            after = await begin(store)
            assert after.turns == (TURN,)
            assert after.lease.fence > before.lease.fence
            assert (await store.commit(after.lease, TURN, [])).num_turns == 2
