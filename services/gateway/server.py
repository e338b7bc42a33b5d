"""The gateway's own gRPC server: TLS, tokens, limits, keepalive, health and reflection around the two services."""

from __future__ import annotations

import asyncio
import logging
import ssl
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from services.common.errors import InvalidSettings
from services.common.settings import GatewaySettings, TlsSettings
from services.common.telemetry import Metrics
from services.gateway.auth import Authenticator, read_tokens
from services.gateway.edge import Edge, EdgeInterceptor
from services.gateway.pipeline_api import Sessions, Text, Turns
from services.gateway.reloading import FileValue
from services.gateway.servicers import ChatServicer, SessionServicer, register

log = logging.getLogger(__name__)

RELOAD_INTERVAL_S = 1.0

_LOOPBACK = ("127.0.0.1", "::1", "localhost")


class GatewayServer:
    """Hosts the edge on settings.host:port. start() listens, stop() drains; `port` is the one that was bound."""

    def __init__(
        self, settings: GatewaySettings, turns: Turns, sessions: Sessions, text: Text, metrics: Metrics
    ) -> None:
        self._settings = settings
        self._turns = turns
        self._sessions = sessions
        self._text = text
        self._metrics = metrics
        self._health = health.aio.HealthServicer()
        self._services: tuple[str, ...] = ()
        self._server: grpc.aio.Server | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._tokens: FileValue[dict[str, str]] | None = None
        self._certificates: FileValue[grpc.ServerCertificateConfiguration] | None = None
        self._chat: ChatServicer | None = None
        self.port = 0

    async def start(self) -> None:
        """Listens; health says SERVING from now on. Raises InvalidSettings if a file or the address cannot be used."""
        settings = self._settings
        authenticator = Authenticator(None, settings.default_tenant)
        if settings.auth_tokens_file is not None:
            self._tokens = _tokens_in(settings.auth_tokens_file)
            authenticator.set_tokens(self._tokens.value)
        server = grpc.aio.server(interceptors=[EdgeInterceptor(authenticator)], options=channel_options(settings))
        edge = Edge(authenticator, settings.default_deadline_s, self._metrics)
        chat_servicer = ChatServicer(
            edge,
            self._turns,
            self._text,
            self._metrics,
            settings.max_concurrent_turns,
            settings.slow_client_timeout_s,
        )
        self._chat = chat_servicer
        self._services = register(server, chat_servicer, SessionServicer(edge, self._sessions))
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        if settings.reflection:
            names = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, server)
        self.port = self._bind(server)
        await server.start()
        self._server = server
        self._watcher = asyncio.create_task(self._watch_files(authenticator), name="secret files")
        await self.set_serving(True)
        log.info("gateway listens on port %d", self.port)

    @property
    def num_turns(self) -> int:
        """That run now."""
        return self._chat.num_running_turns if self._chat is not None else 0

    async def set_serving(self, is_serving: bool) -> None:
        """What health says, for the server as a whole and for each service."""
        state = health_pb2.HealthCheckResponse.SERVING if is_serving else health_pb2.HealthCheckResponse.NOT_SERVING
        for service in ("", *self._services):
            await self._health.set(service, state)

    async def stop(self) -> None:
        """Says NOT_SERVING, takes no new calls, lets running ones end within drain_timeout_s, then cancels them."""
        server, self._server = self._server, None
        if server is not None:
            assert self._watcher is not None
            self._watcher.cancel()
            await self._health.enter_graceful_shutdown()
            await server.stop(self._settings.drain_timeout_s)

    async def _watch_files(self, authenticator: Authenticator) -> None:
        while True:
            await asyncio.sleep(RELOAD_INTERVAL_S)
            if self._tokens is not None and self._tokens.refresh():
                authenticator.set_tokens(self._tokens.value)
                log.info("the bearer tokens were read again")
            if self._certificates is not None and self._certificates.refresh():
                log.info("the TLS files were read again")

    def _bind(self, server: grpc.aio.Server) -> int:
        host = f"[{self._settings.host}]" if ":" in self._settings.host else self._settings.host
        address = f"{host}:{self._settings.port}"
        try:
            if self._settings.tls is not None:
                self._certificates = _certificates_of(self._settings.tls)
                return server.add_secure_port(address, _credentials(self._settings.tls, self._certificates))
            if self._settings.host not in _LOOPBACK:
                log.warning("gateway is reachable from other machines without TLS")
            return server.add_insecure_port(address)
        except RuntimeError as error:
            problem = f"cannot listen on {address}: is it in use, are the TLS files good?"
            raise InvalidSettings(f"gateway.port: {problem}") from error


def channel_options(settings: GatewaySettings) -> list[tuple[str, int]]:
    """gRPC's own options for the limits and keepalive of the settings."""

    def milliseconds(seconds: float) -> int:
        return int(seconds * 1000)

    return [
        ("grpc.max_receive_message_length", settings.max_request_bytes),
        ("grpc.max_send_message_length", settings.max_response_bytes),
        ("grpc.keepalive_time_ms", milliseconds(settings.keepalive_interval_s)),
        ("grpc.keepalive_timeout_ms", milliseconds(settings.keepalive_timeout_s)),
        ("grpc.http2.ping_timeout_ms", milliseconds(settings.keepalive_timeout_s)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.min_ping_interval_without_data_ms", milliseconds(settings.keepalive_min_interval_s)),
        ("grpc.http2.min_recv_ping_interval_without_data_ms", milliseconds(settings.keepalive_min_interval_s)),
        ("grpc.max_connection_age_ms", milliseconds(settings.max_connection_age_s)),
        ("grpc.max_connection_age_grace_ms", milliseconds(settings.max_connection_age_grace_s)),
        ("grpc.so_reuseport", int(settings.reuse_port)),
    ]


def _tokens_in(path: Path) -> FileValue[dict[str, str]]:
    return FileValue((path,), lambda: read_tokens(path))


def _certificates_of(tls: TlsSettings) -> FileValue[grpc.ServerCertificateConfiguration]:
    """The PEM files. Raises InvalidSettings if one cannot be read, or if key and certificate are not a pair."""
    files = tuple(path for path in (tls.cert_file, tls.key_file, tls.client_ca_file) if path is not None)

    def read() -> grpc.ServerCertificateConfiguration:
        pair = (_read("key_file", tls.key_file), _read("cert_file", tls.cert_file))
        authority = None if tls.client_ca_file is None else _read("client_ca_file", tls.client_ca_file)
        try:
            ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(tls.cert_file, tls.key_file)
        except (ssl.SSLError, OSError) as error:
            raise InvalidSettings(f"gateway.tls: {tls.cert_file} and {tls.key_file} are not a pair") from error
        return grpc.ssl_server_certificate_configuration([pair], authority)

    return FileValue(files, read)


def _credentials(
    tls: TlsSettings, certificates: FileValue[grpc.ServerCertificateConfiguration]
) -> grpc.ServerCredentials:
    """Each handshake takes the certificate of then. Mutual if there is a CA for clients."""
    return grpc.dynamic_ssl_server_credentials(
        certificates.value, lambda: certificates.value, require_client_authentication=tls.client_ca_file is not None
    )


def _read(key: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InvalidSettings(f"gateway.tls.{key}: {path}: {error.strerror}") from error
