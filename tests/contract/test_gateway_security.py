"""Who may call the edge: tokens and tenants, TLS and mutual TLS."""

import asyncio
import datetime
import ipaddress
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from services.client import AsyncClient, ClientTls
from services.common import errors
from services.gateway import server as server_module
from services.gateway.auth import Authenticator, read_tokens
from tests.contract.echo_gateway import collect, running, text_of

ALICE, BOB = "alice-token-0123456789", "bob-token-0123456789"


def write_secret(path: Path, text: str, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture
def tokens_file(tmp_path: Path) -> Path:
    return write_secret(tmp_path / "tokens.yaml", f"alice: {ALICE}\nbob: [{BOB}, another-{BOB}]\n")


async def test_the_tenant_is_the_tokens(tokens_file: Path) -> None:
    async with running(auth_tokens_file=tokens_file) as edge:
        for token in (ALICE, BOB, f"another-{BOB}"):
            async with AsyncClient(edge.target, token=token) as client:
                assert text_of(await collect(client.generate("x"))) == "x"
    assert [turn.tenant for turn in edge.pipeline.turns] == ["alice", "bob", "bob"]


@pytest.mark.parametrize("token", [None, "", "wrong-token-0123456789", ALICE[:-1], ALICE + "x", ALICE.upper()])
async def test_a_call_without_a_valid_token_never_reaches_the_pipeline(tokens_file: Path, token: str | None) -> None:
    async with running(auth_tokens_file=tokens_file) as edge, AsyncClient(edge.target, token=token) as client:
        with pytest.raises(errors.Unauthenticated):
            await collect(client.generate("x"))
        with pytest.raises(errors.Unauthenticated):
            await client.list_sessions()
        assert await client.is_serving()
    assert edge.pipeline.turns == []


async def test_reflection_needs_a_token_too(tokens_file: Path) -> None:
    async with running(auth_tokens_file=tokens_file) as edge, grpc.aio.insecure_channel(edge.target) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.ServerReflectionInfo(iter([request])).read()
        with_token = stub.ServerReflectionInfo(iter([request]), metadata=(("authorization", f"Bearer {ALICE}"),))
        assert (await with_token.read()).list_services_response.service
        with_token.cancel()
    assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED


async def test_another_tenants_session_does_not_exist(tokens_file: Path) -> None:
    async with (
        running(auth_tokens_file=tokens_file) as edge,
        AsyncClient(edge.target, token=ALICE) as alice,
        AsyncClient(edge.target, token=BOB) as bob,
    ):
        session = await alice.create_session("talk")
        await collect(session.chat("x"))
        with pytest.raises(errors.NotFound) as hidden:
            await bob.get_session("talk")
        with pytest.raises(errors.NotFound) as missing:
            await bob.get_session("nowhere")
        with pytest.raises(errors.NotFound):
            await bob.delete_session("talk")
        assert (await bob.list_sessions()).sessions == ()
        await bob.create_session("talk")
        assert (await session.info()).num_turns == 1
    assert str(hidden.value).replace("talk", "nowhere") == str(missing.value)


def test_without_tokens_everyone_is_the_default_tenant() -> None:
    assert Authenticator(None, "default").tenant_of(None) == "default"


def test_the_scheme_is_read_in_any_case() -> None:
    authenticator = Authenticator({ALICE: "alice"}, "default")
    assert authenticator.tenant_of(f"bearer {ALICE}") == authenticator.tenant_of(f"BEARER  {ALICE}") == "alice"
    with pytest.raises(errors.Unauthenticated):
        authenticator.tenant_of(f"Basic {ALICE}")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- a",
        "alice: short",
        "alice: 1234567890123456789",
        f"'a:b': {ALICE}",
        f"alice: {ALICE}\nbob: {ALICE}",
        "a: [",
    ],
)
def test_a_bad_tokens_file_is_refused_without_quoting_it(tmp_path: Path, text: str) -> None:
    with pytest.raises(errors.InvalidSettings, match="auth_tokens_file") as refused:
        read_tokens(write_secret(tmp_path / "tokens.yaml", text))
    assert ALICE not in str(refused.value)
    assert "short" not in str(refused.value)


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o620])
def test_a_tokens_file_open_to_others_is_refused(tmp_path: Path, mode: int) -> None:
    path = write_secret(tmp_path / "tokens.yaml", f"alice: {ALICE}\n", mode)
    with pytest.raises(errors.InvalidSettings, match="chmod 600"):
        read_tokens(path)


def test_a_missing_tokens_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidSettings, match=r"nowhere\.yaml"):
        read_tokens(tmp_path / "nowhere.yaml")


@dataclass(frozen=True)
class Pair:
    """Files of a certificate and its key."""

    cert_file: Path
    key_file: Path


class Authority:
    """A CA that lives for one test."""

    def __init__(self, directory: Path, name: str) -> None:
        self._directory = directory
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        certificate = self._builder(self._name, self._key).add_extension(x509.BasicConstraints(True, None), True)
        self.file = directory / f"{name}.pem"
        self.file.write_bytes(self._sign(certificate))

    def issue(self, name: str) -> Pair:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        pair = Pair(self._directory / f"{name}.pem", self._directory / f"{name}.key")
        pair.cert_file.write_bytes(self._sign(self._builder(subject, key).add_extension(address, False)))
        pair.key_file.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return pair

    def _builder(self, subject: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = datetime.datetime.now(datetime.UTC)
        return x509.CertificateBuilder(
            issuer_name=self._name,
            subject_name=subject,
            public_key=key.public_key(),
            serial_number=x509.random_serial_number(),
            not_valid_before=now - datetime.timedelta(hours=1),
            not_valid_after=now + datetime.timedelta(hours=1),
        )

    def _sign(self, builder: x509.CertificateBuilder) -> bytes:
        return builder.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


@pytest.fixture
def authority(tmp_path: Path) -> Callable[[str], Authority]:
    return lambda name: Authority(tmp_path, name)


async def test_tls_serves_who_trusts_the_certificate(authority: Callable[[str], Authority]) -> None:
    ours, theirs = authority("ours"), authority("theirs")
    server = ours.issue("server")
    async with running(tls=vars(server)) as edge:
        async with AsyncClient(edge.target, tls=ClientTls(ca_file=ours.file)) as client:
            assert text_of(await collect(client.generate("x"))) == "x"
        for tls in (ClientTls(ca_file=theirs.file), None):
            async with AsyncClient(edge.target, tls=tls) as client:
                with pytest.raises(errors.Unavailable):
                    await client.model()


async def test_rotated_certificates_are_served_without_a_restart(
    authority: Callable[[str], Authority], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "RELOAD_INTERVAL_S", 0.02)
    ours, newer = authority("ours"), authority("newer")
    pair, replacement = ours.issue("server"), newer.issue("replacement")
    async with running(tls=vars(pair)) as edge:

        async def is_trusted(ca: Authority) -> bool:
            async with AsyncClient(edge.target, tls=ClientTls(ca_file=ca.file), timeout_s=2.0) as client:
                try:
                    return (await client.model()).name == "echo"
                except errors.Unavailable:
                    return False

        assert await is_trusted(ours)
        pair.cert_file.write_bytes(replacement.cert_file.read_bytes())  # no pair yet: the old one is still served
        await asyncio.sleep(0.1)
        assert await is_trusted(ours)
        pair.key_file.write_bytes(replacement.key_file.read_bytes())
        await eventually(lambda: is_trusted(newer))
        assert not await is_trusted(ours)


async def test_rotated_tokens_are_in_force_without_a_restart(
    tokens_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "RELOAD_INTERVAL_S", 0.02)
    newer = "newer-token-0123456789"
    async with running(auth_tokens_file=tokens_file) as edge:

        async def is_let_in(token: str) -> bool:
            async with AsyncClient(edge.target, token=token) as client:
                try:
                    return bool(await client.model())
                except errors.Unauthenticated:
                    return False

        write_secret(tokens_file, "alice: [")  # half written: the old ones hold
        await asyncio.sleep(0.1)
        assert await is_let_in(ALICE)
        write_secret(tokens_file, f"alice: {newer}")
        await eventually(lambda: is_let_in(newer))
        assert not await is_let_in(ALICE)
        assert not await is_let_in(BOB)
        tokens_file.unlink()
        await asyncio.sleep(0.1)
        assert await is_let_in(newer)


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(10):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_mutual_tls_serves_who_shows_a_certificate_of_the_ca(authority: Callable[[str], Authority]) -> None:
    ours, theirs = authority("ours"), authority("theirs")
    server, friend, stranger = ours.issue("server"), ours.issue("friend"), theirs.issue("stranger")
    async with running(tls={**vars(server), "client_ca_file": ours.file}) as edge:
        known = ClientTls(ours.file, friend.cert_file, friend.key_file)
        async with AsyncClient(edge.target, tls=known) as client:
            assert text_of(await collect(client.generate("x"))) == "x"
        for tls in (ClientTls(ours.file), ClientTls(ours.file, stranger.cert_file, stranger.key_file)):
            async with AsyncClient(edge.target, tls=tls) as client:
                with pytest.raises(errors.Unavailable):
                    await client.model()


async def test_a_missing_certificate_is_refused_by_its_key(tmp_path: Path) -> None:
    with pytest.raises(errors.InvalidSettings, match=r"gateway\.tls\.key_file"):
        async with running(tls={"cert_file": tmp_path / "a", "key_file": tmp_path / "b"}):
            pass
