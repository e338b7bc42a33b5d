"""Composition root: Settings -> Serve application graph, and all that has to run around it on one machine.

The only place that binds deployments. `application` is the import path of a Serve config (deploy/serve/*.yaml);
`serve_application` is what `antiphon serve` runs: session store, Ray and the application, gone again at its end.

Import services.ray_environment and prepare the environment before this module: Ray reads it when it is imported.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import shutil
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema

from services.common.errors import InvalidSettings, Unavailable
from services.common.settings import Settings
from services.decode.deployment import DecodeDeployment
from services.engine.hub import resolve_model
from services.gateway.deployment import GatewayDeployment
from services.prefill.deployment import PrefillDeployment
from services.ray_environment import check_environment
from services.scaling.serve_options import most_replicas, replica_options, serve_config
from services.scaling.snapshot import Kind
from services.sessions.embedded import EmbeddedServer
from services.tokenizer.deployment import TokenizerDeployment

APP_NAME = "antiphon"
RESOLVED_APPLICATION = "services.app:resolved_application"
OBJECT_STORE_BYTES = 100 * 2**20  # KV blocks do not go through it
_HELPER_CPUS = 0.1  # of a gateway or tokenizer replica, for Ray's placement
_SECRET_BYTES = 32
_POLL_S = 0.1

log = logging.getLogger(__name__)

Progress = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class RunningApplication:
    """The application, ready for turns. target: host:port of a gateway. settings: those that are in force."""

    target: str
    metrics_address: str
    settings: Settings


def application(args: dict[str, Any]) -> serve.Application:
    """The application of a Serve config whose `args` are Settings. Environment variables override them."""
    return build_app(Settings.from_mapping(args))


def resolved_application(args: dict[str, Any]) -> serve.Application:
    """The application of settings that the environment has overridden already."""
    return build_app(Settings.from_mapping(args, {}))


def build_app(settings: Settings) -> serve.Application:
    """The graph: gateway -> tokenizer, decode -> prefill. Raises InvalidSettings for what cannot work together."""
    check_environment(os.environ)
    if settings.sessions.store == "embedded" or settings.sessions.secret_file is None:
        raise InvalidSettings("sessions: a store that all replicas reach and a secret_file are needed")
    gateways = settings.gateway
    if most_replicas(Kind.GATEWAY, settings) > 1 and gateways.port and not (gateways.reuse_port or gateways.resources):
        raise InvalidSettings("gateway: several replicas need reuse_port, port 0, or resources that keep them apart")
    prefill = None
    if settings.prefill.enabled:
        prefill = _scaled(PrefillDeployment, **_worker_options(Kind.PREFILL, settings)).bind(settings)
    decode = _scaled(DecodeDeployment, **_worker_options(Kind.DECODE, settings)).bind(settings, prefill)
    tokenizer = _scaled(TokenizerDeployment, **_helper_options(Kind.TOKENIZER, settings)).bind(settings)
    gateway = _scaled(
        GatewayDeployment,
        graceful_shutdown_timeout_s=gateways.drain_timeout_s + 5,
        **_helper_options(Kind.GATEWAY, settings),
    )
    graph: serve.Application = gateway.bind(settings, tokenizer, decode)
    return graph


@contextmanager
def serve_application(settings: Settings, progress: Progress = lambda stage: None) -> Iterator[RunningApplication]:
    """Starts everything on this machine and yields when turns can be taken; stops everything at the end.

    Raises InvalidCheckpoint, InvalidSettings, Unavailable; nothing is left running then.
    """
    resolve_model(settings.model.path)  # a mistake shows at once, and a hub is asked once for all replicas
    with ExitStack() as stack:
        progress("session store")
        settings = stack.enter_context(session_store(settings))
        progress("Ray")
        stack.enter_context(local_ray(settings))
        progress(f"model {settings.model.path}: {_replicas_in_words(settings)}")
        handle = stack.enter_context(deployed(settings))
        target = handle.address.remote().result()
        yield RunningApplication(target, handle.metrics_address.remote().result(), settings)
        progress("stopping")


@contextmanager
def session_store(settings: Settings) -> Iterator[Settings]:
    """Settings with a store that can be reached: the embedded one is started here. Makes a secret if there is none."""
    sessions = settings.sessions
    with tempfile.TemporaryDirectory(prefix="antiphon-") as temporary, ExitStack() as stack:
        changes: dict[str, Any] = {}
        if sessions.store == "embedded":
            data_dir = (sessions.data_dir or Path(temporary, "store")).absolute()
            server = stack.enter_context(EmbeddedServer(data_dir))
            stack.enter_context(server.kept_alive())
            url = urlsplit(server.url)
            password_file = _write_secret(Path(temporary, "password"), (url.password or "").encode())
            changes = {"store": "redis", "url": f"redis://{url.hostname}:{url.port}/0", "password_file": password_file}
        if sessions.secret_file is None:
            # Beside data that outlive this run; without it their keys and digests would mean nothing to the next.
            keep_in = sessions.data_dir if sessions.store == "embedded" and sessions.data_dir else Path(temporary)
            changes["secret_file"] = _secret_in(keep_in.absolute())
        yield settings.model_copy(update={"sessions": sessions.model_copy(update=changes)})


@contextmanager
def local_ray(settings: Settings) -> Iterator[None]:
    """A Ray of this machine alone: on loopback, in a short folder of its own, with room for the replicas asked for."""
    temp_dir = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's socket paths have to stay below 107 bytes
    try:
        ray.init(
            address="local",
            num_cpus=max(os.cpu_count() or 1, math.ceil(_cpus_needed(settings))),
            resources=_resources_needed(settings),
            object_store_memory=OBJECT_STORE_BYTES,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            _temp_dir=temp_dir,
            _node_ip_address="127.0.0.1",
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)


@contextmanager
def deployed(settings: Settings, config: dict[str, Any] | None = None) -> Iterator[Any]:
    """The handle of the application's gateway, once all replicas are ready; they drain and end at the end.

    config: a Serve config of it, instead of the one that the settings make. Raises Unavailable if it does not start.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    # No proxy: clients speak to the gateway's own server, and a proxy would be one more open port.
    serve.start(proxy_location="Disabled", logging_config={"log_level": "WARNING", "enable_access_log": False})
    try:
        yield _run(settings, config)
    finally:
        try:
            serve.delete(APP_NAME)
        except TimeoutError:  # Serve itself ends with Ray, and whatever is left of it then
            log.warning("the application has not ended in time")


def _run(settings: Settings, config: dict[str, Any] | None) -> Any:
    try:
        if config is None and settings.autoscaling.enabled:
            config = serve_config(settings, APP_NAME, RESOLVED_APPLICATION)
        if config is not None:
            return _run_config(config)
        return serve.run(build_app(settings), name=APP_NAME, route_prefix=None)
    except RuntimeError as error:  # a deployment that cannot start; the replica's own words are in the status
        raise Unavailable(f"the application did not start: {_first_message(error)}") from error


def _run_config(config: dict[str, Any]) -> Any:
    """As `serve run FILE` does: a policy for the application as a whole can only be given in a config."""
    check_environment(os.environ)
    client = _get_global_client()
    assert client is not None
    client.deploy_apps(ServeDeploySchema.model_validate(config))
    while (status := serve.status().applications.get(APP_NAME)) is None or status.status != "RUNNING":
        if status is not None and status.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            raise RuntimeError(status.message)
        time.sleep(_POLL_S)
    return serve.get_app_handle(APP_NAME)


def _first_message(error: RuntimeError) -> str:
    """The last line of the replica's own traceback: what went wrong, without where."""
    status = serve.status().applications.get(APP_NAME)
    deployments = status.deployments.items() if status is not None else ()
    for name, deployment in deployments:
        lines = [line.strip() for line in deployment.message.splitlines() if line.strip()]
        if lines:
            return f"{name}: {lines[-1].removeprefix('services.common.errors.')}"
    return str(error)


def _scaled(deployment: Any, **options: Any) -> Any:
    """Serve's decorator leaves the type of a plain class behind; it is a Deployment."""
    return deployment.options(**options)


def _worker_options(kind: Kind, settings: Settings) -> dict[str, Any]:
    section = settings.prefill if kind is Kind.PREFILL else settings.decode
    actor_options = {"num_cpus": section.num_cpus, "num_gpus": section.num_gpus, "resources": section.resources}
    return {
        "max_ongoing_requests": section.max_concurrent,
        "ray_actor_options": actor_options,
        **replica_options(kind, settings),
    }


def _helper_options(kind: Kind, settings: Settings) -> dict[str, Any]:
    section = settings.gateway if kind is Kind.GATEWAY else settings.tokenizer
    actor_options = {"num_cpus": _HELPER_CPUS, "resources": section.resources}
    return {"ray_actor_options": actor_options, **replica_options(kind, settings)}


def _cpus_needed(settings: Settings) -> float:
    workers = most_replicas(Kind.DECODE, settings) * settings.decode.num_cpus
    if settings.prefill.enabled:
        workers += most_replicas(Kind.PREFILL, settings) * settings.prefill.num_cpus
    num_helpers = most_replicas(Kind.GATEWAY, settings) + most_replicas(Kind.TOKENIZER, settings)
    return workers + _HELPER_CPUS * num_helpers


def _resources_needed(settings: Settings) -> dict[str, float]:
    """The one machine of a local Ray offers whatever the replicas are placed by."""
    needed: dict[str, float] = defaultdict(float)
    for kind in Kind:
        for name, amount in getattr(settings, kind.value).resources.items():
            needed[name] += amount * most_replicas(kind, settings)
    return needed


def _replicas_in_words(settings: Settings) -> str:
    num_prefill = settings.prefill.num_replicas if settings.prefill.enabled else 0
    return f"{num_prefill} prefill, {settings.decode.num_replicas} decode, {settings.gateway.num_replicas} gateway"


def _secret_in(folder: Path) -> Path:
    path = folder / "secret"
    return path if path.exists() else _write_secret(path, secrets.token_hex(_SECRET_BYTES).encode())


def _write_secret(path: Path, value: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
        file.write(value)
    return path
