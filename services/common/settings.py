"""The configuration: one frozen, typed schema. An unknown key is an error, every knob says what it is and in what unit.

`Settings.from_yaml(path)` reads a Serve config whose application `args` hold these settings, or the settings alone.
Environment variables override: ANTIPHON__GATEWAY__PORT=9001 sets gateway.port.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, Field, ValidationError, model_validator

from services.common.errors import InvalidSettings
from services.common.settings_model import EngineSettings, ModelSettings
from services.common.settings_scaling import AutoscalingSettings, ReplicaBounds
from services.common.settings_section import MIB, PlacedSection, Port, PositiveInt, Seconds, Section
from services.common.settings_source import application_args, describe, with_overrides

__all__ = [
    "MIB", "AutoscalingSettings", "DecodeSettings", "EngineSettings", "GatewaySettings", "ModelSettings",
    "PrefillSettings", "ReplicaBounds", "RoutingSettings", "SessionSettings", "Settings", "TelemetrySettings",
    "TlsSettings", "TokenizerSettings", "TransferSettings", "markdown",
]  # fmt: skip


class TlsSettings(Section):
    """PEM files of a TLS endpoint."""

    cert_file: Path = Field(description="Certificate chain of the server.")
    key_file: Path = Field(description="Its private key.")
    client_ca_file: Path | None = Field(
        default=None, description="CA of client certificates. Set: a client must show one (mutual TLS)."
    )


class GatewaySettings(PlacedSection):
    """The gRPC server that clients speak to."""

    host: str = Field(default="127.0.0.1", description="Address it listens on. Loopback unless said otherwise.")
    port: Port = Field(default=9000, description="Port it listens on. 0: any free one.")
    reuse_port: bool = Field(
        default=False, description="Let several gateways of one host share the port (SO_REUSEPORT)."
    )
    num_replicas: PositiveInt = Field(default=1, description="Gateway replicas.")
    tls: TlsSettings | None = Field(default=None, description="TLS files. Not set: plain text.")
    auth_tokens_file: Path | None = Field(
        default=None,
        description="Secrets file, YAML of `tenant: token`, for its owner only. Not set: no authentication.",
    )
    default_tenant: str = Field(
        default="default", min_length=1, description="Tenant of callers without authentication."
    )
    max_request_bytes: PositiveInt = Field(default=16 * MIB, description="Largest request, in bytes.")
    max_response_bytes: PositiveInt = Field(default=4 * MIB, description="Largest single response message, in bytes.")
    max_concurrent_turns: PositiveInt = Field(
        default=512, description="Most turns at once in one gateway; more are refused."
    )
    slow_client_timeout_s: Seconds = Field(
        default=10.0, description="A client that does not take an event for this long loses its turn, in seconds."
    )
    default_deadline_s: Seconds = Field(
        default=600.0, description="Deadline of a call that has none of its own, in seconds."
    )
    keepalive_min_interval_s: Seconds = Field(
        default=10.0, description="Shortest interval of client pings, in seconds."
    )
    keepalive_interval_s: Seconds = Field(default=60.0, description="Interval of the server's own pings, in seconds.")
    keepalive_timeout_s: Seconds = Field(
        default=20.0, description="Unanswered pings end a connection after this, in seconds."
    )
    max_connection_age_s: Seconds = Field(
        default=1800.0, description="Connections are asked to close after this, so that load spreads again, in seconds."
    )
    max_connection_age_grace_s: Seconds = Field(
        default=600.0, description="How long their calls may go on then, in seconds."
    )
    drain_timeout_s: Seconds = Field(
        default=30.0, description="How long running turns may take at shutdown, in seconds."
    )
    reflection: bool = Field(default=True, description="Offer gRPC server reflection.")


class SessionSettings(Section):
    """Where sessions and the registry of replicas live, and how long things last there."""

    store: Literal["embedded", "redis", "sentinel"] = Field(
        default="embedded",
        description="A Valkey started by the app (embedded), a Redis or Valkey server, or one by Sentinel.",
    )
    url: str | None = Field(
        default=None,
        description="redis:// or rediss:// URL, without password. store sentinel: user, database and TLS alone count.",
    )
    password_file: Path | None = Field(default=None, description="File with the store's password.")
    tls_ca_file: Path | None = Field(default=None, description="CA of the store's certificate (rediss).")
    tls_cert_file: Path | None = Field(
        default=None, description="Our own certificate, for a store that asks for one (with tls_key_file)."
    )
    tls_key_file: Path | None = Field(default=None, description="The key of tls_cert_file.")
    sentinels: tuple[str, ...] = Field(default=(), description="host:port of each Sentinel (store: sentinel).")
    sentinel_username: str | None = Field(default=None, description="ACL user at the Sentinels.")
    sentinel_password_file: Path | None = Field(
        default=None, description="File with the Sentinels' password; TLS as for the store."
    )
    sentinel_master: str = Field(default="antiphon", description="Name of the master that the Sentinels watch.")
    data_dir: Path | None = Field(
        default=None, description="Directory of the embedded store. Not set: a temporary one."
    )
    cluster: str = Field(
        default="default", min_length=1, description="Name in every key, so clusters can share a store."
    )
    secret_file: Path | None = Field(
        default=None,
        description="File with the key of the digests and salts, 32 bytes or more. Not set: made at start.",
    )
    timeout_s: Seconds = Field(default=0.5, description="Longest wait for one command of the store, in seconds.")
    ttl_s: Seconds = Field(default=86400.0, description="Life of a session after its last turn, in seconds.")
    max_ttl_s: Seconds = Field(default=30 * 86400.0, description="Longest life a client may ask for, in seconds.")
    lease_ttl_s: Seconds = Field(
        default=15.0, description="Life of a turn's lease; renewed at a third of it, in seconds."
    )
    heartbeat_s: Seconds = Field(default=1.0, description="Interval of a replica's report to the registry, in seconds.")
    registry_ttl_s: Seconds = Field(default=5.0, description="A replica silent for this long is gone, in seconds.")
    quota_bytes: PositiveInt = Field(default=256 * MIB, description="Most bytes a tenant's journals may take.")

    @model_validator(mode="after")
    def _store_is_complete(self) -> Self:
        if self.store == "redis" and self.url is None:
            raise ValueError("store redis needs url")
        if self.store == "sentinel" and not self.sentinels:
            raise ValueError("store sentinel needs sentinels")
        if (self.tls_cert_file is None) != (self.tls_key_file is None):
            raise ValueError("tls_cert_file and tls_key_file are needed together")
        if self.heartbeat_s * 2 > self.registry_ttl_s:
            raise ValueError("registry_ttl_s must be at least twice heartbeat_s")
        if self.ttl_s > self.max_ttl_s:
            raise ValueError("ttl_s must not exceed max_ttl_s")
        return self


class RoutingSettings(Section):
    """How the router picks a decode replica."""

    policy: Literal["cost", "consistent_hash", "random"] = Field(
        default="cost", description="cost: held prefix against load. The others are baselines to compare with."
    )
    queue_weight: float = Field(default=1.0, ge=0, description="Weight of waiting and running tokens in the cost.")
    transfer_weight: float = Field(
        default=1.0, ge=0, description="Weight of fetching the history from another replica."
    )
    memory_weight: float = Field(
        default=1.0,
        ge=0,
        description="Weight of lacking blocks that are free, and not full of what idle sessions will want again.",
    )
    max_resumes: int = Field(
        default=2, ge=0, description="How often a turn may go on elsewhere after losing its replica."
    )


class TransferSettings(Section):
    """How KV blocks move between replicas."""

    backend: Literal["rdt"] = Field(default="rdt", description="Ray Direct Transport (NIXL), on GPU and CPU.")
    fetch_timeout_s: Seconds = Field(default=10.0, description="Longest wait for blocks, in seconds.")
    lease_ttl_s: Seconds = Field(
        default=30.0, description="How long published blocks are kept for their fetcher, in seconds."
    )
    progress_pause_s: float = Field(
        default=0.001,
        ge=0,
        description="Pause of the transport's thread between looks at its connections, in seconds; 0 takes a core.",
    )
    quarantine_s: Seconds = Field(
        default=30.0, description="How long the target blocks of a timed-out fetch stay unused, in seconds."
    )


class _WorkerSettings(PlacedSection):
    num_replicas: PositiveInt = Field(default=1, description="Replicas.")
    num_gpus: float = Field(
        default=0.0, ge=0, description="GPUs of one replica; a half shares one with another replica."
    )
    num_cpus: float = Field(default=1.0, ge=0, description="CPUs of one replica, for Ray's placement.")
    max_concurrent: PositiveInt = Field(default=64, description="Most calls that one replica handles at once.")


class PrefillSettings(_WorkerSettings):
    """The prefill deployment."""

    enabled: bool = Field(default=True, description="Off: decode replicas compute every prompt themselves.")
    nice: int = Field(
        default=5,
        ge=0,
        le=19,
        description="Niceness of a replica that computes on a CPU: decode, which may share its cores, goes first.",
    )


class DecodeSettings(_WorkerSettings):
    """The decode deployment."""

    host: str = Field(
        default="127.0.0.1",
        description="Address its gRPC server listens on, for gateways. node: the one that Ray knows the machine by.",
    )
    remote_prefill: Literal["auto", "always", "never"] = Field(
        default="auto", description="Whether prefill replicas compute what is missing. auto: measured rates decide."
    )
    fetch_history: bool = Field(
        default=True, description="Fetch history that another replica holds, where measured rates say that it pays."
    )
    reuse_history: bool = Field(
        default=True, description="Keep and fetch the KV of earlier turns. Off: every turn is cold."
    )


class TokenizerSettings(PlacedSection):
    """The tokenizer deployment."""

    num_replicas: PositiveInt = Field(default=1, description="Replicas.")


class TelemetrySettings(Section):
    """Logs and metrics."""

    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        default="INFO", description="Least level that is logged."
    )
    metrics_host: str = Field(default="127.0.0.1", description="Address of each process's /metrics.")
    metrics_port: Port = Field(default=0, description="Port of the gateway's /metrics. 0: any free one.")
    replica_metrics_port: Port = Field(
        default=0,
        description="Port of a prefill or decode replica's /metrics, if each has a host to itself. 0: any free one.",
    )


class Settings(Section):
    """The whole configuration."""

    model: ModelSettings = ModelSettings()
    engine: EngineSettings = EngineSettings()
    gateway: GatewaySettings = GatewaySettings()
    tokenizer: TokenizerSettings = TokenizerSettings()
    prefill: PrefillSettings = PrefillSettings()
    decode: DecodeSettings = DecodeSettings()
    sessions: SessionSettings = SessionSettings()
    routing: RoutingSettings = RoutingSettings()
    transfer: TransferSettings = TransferSettings()
    autoscaling: AutoscalingSettings = AutoscalingSettings()
    telemetry: TelemetrySettings = TelemetrySettings()

    @model_validator(mode="after")
    def _starts_within_bounds(self) -> Self:
        if self.autoscaling.enabled:
            for name in ("gateway", "tokenizer", "prefill", "decode"):
                bounds, number = getattr(self.autoscaling, name), getattr(self, name).num_replicas
                if not bounds.min <= number <= bounds.max:
                    raise ValueError(f"{name}.num_replicas must be within autoscaling.{name}")
        return self

    @classmethod
    def from_yaml(cls, path: Path | str, environment: Mapping[str, str] | None = None) -> Self:
        """Reads a Serve config with these settings as its application's `args`, or the settings alone.

        `environment` (os.environ if None) overrides. Raises InvalidSettings, naming the key.
        """
        try:
            document = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise InvalidSettings(f"{path}: {error.strerror}") from error
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InvalidSettings(f"{path}: not YAML: {error}") from error
        return cls.from_mapping(application_args(document), environment, source=str(path))

    @classmethod
    def from_mapping(
        cls, values: Mapping[str, Any], environment: Mapping[str, str] | None = None, source: str = "settings"
    ) -> Self:
        """Checks a nested mapping and applies the overrides of `environment`. Raises InvalidSettings."""
        merged = with_overrides(values, os.environ if environment is None else environment)
        try:
            return cls.model_validate(merged)
        except ValidationError as error:
            raise InvalidSettings(f"{source}: {describe(error)}") from error


def markdown() -> str:
    """The table of all knobs for the README: key, default, meaning."""
    lines = ["| key | default | meaning |", "|---|---|---|"]
    lines += [f"| `{key}` | `{default}` | {meaning} |" for key, default, meaning in _knobs(Settings, "")]
    return "\n".join(lines) + "\n"


def _knobs(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str]]:
    for name, field in section.model_fields.items():
        inner = _section_of(field.annotation)
        if inner is not None:
            yield from _knobs(inner, f"{prefix}{name}.")
        else:
            default = "required" if field.is_required() else field.get_default()
            yield f"{prefix}{name}", str(default), field.description or ""


def _section_of(annotation: Any) -> type[BaseModel] | None:
    candidates = [annotation, *getattr(annotation, "__args__", ())]
    return next((each for each in candidates if isinstance(each, type) and issubclass(each, BaseModel)), None)
