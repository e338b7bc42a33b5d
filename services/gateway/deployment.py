"""The gateway deployment: Serve places it, watches it and replaces it; clients speak to its own gRPC server."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any

from ray import serve
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from services.common.errors import AntiphonError, InvalidCheckpoint, QueueFull, Unavailable
from services.common.messages import Message, ModelInfo
from services.common.process_load import ProcessLoad
from services.common.sampling import SamplingParams
from services.common.settings import Settings
from services.common.telemetry import Metrics, MetricsServer, configure_logging
from services.engine.hub import resolve_model
from services.gateway.decode_client import DecodeClient
from services.gateway.forgetting import Forgetting
from services.gateway.pipeline import Pipeline, PipelineParts
from services.gateway.replicas import Replicas
from services.gateway.server import GatewayServer
from services.gateway.sessions import GatewaySessions
from services.gateway.text import GatewayText, NearEncoder, served_name
from services.sessions.connect import connect
from services.sessions.from_settings import keyspace_of, redis_settings
from services.sessions.redis_store import RedisSessionStore
from services.sessions.registry import ReplicaRegistry
from services.text.chat_template import ChatEncoder
from services.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@serve.deployment(name="gateway", max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.1})
class GatewayDeployment:
    """Hosts a GatewayServer. The handle to decode is for what is asked once; turns go there by gRPC."""

    async def __init__(  # type: ignore[misc]  # Serve awaits it
        self, settings: Settings, tokenizer: DeploymentHandle[Any], decode: DeploymentHandle[Any]
    ) -> None:
        replica = serve.get_replica_context().replica_id.unique_id
        configure_logging(settings.telemetry.log_level, "gateway", replica)
        self._settings = settings
        self._load = ProcessLoad()
        far = TokenizerHandle(tokenizer)
        async with translated():
            info: ModelInfo = await decode.model_info.remote()
        vocabulary = await asyncio.to_thread(lambda: Tokenizer.from_folder(resolve_model(settings.model.path)))
        defaults = SamplingParams(**vocabulary.config.sampling_defaults)  # type: ignore[arg-type]
        model = dataclasses.replace(info, name=served_name(settings.model), default_sampling=defaults)
        near = ChatEncoder.from_tokenizer(vocabulary)
        template_digest = await far.template_digest()
        if near.template_digest != template_digest:
            raise InvalidCheckpoint("chat template", "is not the same at gateway and tokenizer")
        encoder = NearEncoder(near, vocabulary, far)
        metrics = Metrics("gateway", model.name)
        self._redis = connect(redis_settings(settings.sessions))
        keyspace = keyspace_of(settings.sessions)
        self._decode = DecodeClient()
        store = RedisSessionStore(self._redis, keyspace, settings.sessions.quota_bytes)
        replicas = Replicas(ReplicaRegistry(self._redis, keyspace), settings.sessions.registry_ttl_s, metrics)
        forgetting = Forgetting(replicas, self._decode, keyspace)
        sessions = GatewaySessions(store, settings.sessions, model.name, template_digest, forgetting)
        parts = PipelineParts(
            settings=settings,
            keyspace=keyspace,
            store=store,
            sessions=sessions,
            replicas=replicas,
            decode=self._decode,
            encoder=encoder,
            tokenizer=vocabulary,
            template_digest=template_digest,
            kv_token_bytes=model.kv_token_bytes,
            metrics=metrics,
        )
        text = GatewayText(encoder, vocabulary, model)
        self._server = GatewayServer(settings.gateway, Pipeline(parts), sessions, text, metrics)
        await self._server.start()
        self._metrics = MetricsServer(metrics, settings.telemetry.metrics_host, settings.telemetry.metrics_port)

    def address(self) -> str:
        """host:port of this replica's gRPC server."""
        return f"{self._settings.gateway.host}:{self._server.port}"

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Its load, for the scaling policy."""
        return {"num_cpus": self._load.num_cpus(), "num_calls": float(self._server.num_turns)}

    def metrics_address(self) -> str:
        """host:port of this replica's /metrics."""
        return f"{self._settings.telemetry.metrics_host}:{self._metrics.port}"

    async def check_health(self) -> None:
        """Serve replaces a gateway whose server is gone."""
        if not self._server.port:
            raise Unavailable("the gateway's server is not running")

    async def __del__(self) -> None:
        """Drains: no new calls, running turns end within gateway.drain_timeout_s."""
        if hasattr(self, "_metrics"):
            await self._server.stop()
            await self._decode.close()
            await self._redis.aclose()
            self._metrics.close()


class TokenizerHandle:
    """Implements text.Encoder over a Serve handle."""

    def __init__(self, handle: DeploymentHandle[Any]) -> None:
        self._handle = handle

    async def template_digest(self) -> str:
        """SHA-256 of the model's chat template."""
        async with translated():
            return str(await self._handle.template_digest.remote())

    async def encode_turn(
        self, messages: Sequence[Message], is_first_turn: bool, previous_turn_ended_with_eos: bool
    ) -> list[int]:
        """What a turn's new messages add to the journal."""
        async with translated():
            ids: list[int] = await self._handle.encode_turn.remote(
                messages, is_first_turn, previous_turn_ended_with_eos
            )
            return ids

    async def tokenize(self, text: str, as_prompt: bool = False) -> list[int]:
        """Token ids of text as it is, or as a raw prompt."""
        async with translated():
            ids: list[int] = await self._handle.tokenize.remote(text, as_prompt)
            return ids


@contextlib.asynccontextmanager
async def translated() -> AsyncIterator[None]:
    """Around a call through a Serve handle: our own errors come out as themselves, Ray's as one of ours."""
    try:
        yield
    except RayTaskError as failed:
        if isinstance(failed.cause, AntiphonError):
            raise failed.cause from None
        raise
    except BackPressureError as error:
        raise QueueFull("too many calls wait for the deployment") from error
    except (RayActorError, DeploymentUnavailableError) as error:
        raise Unavailable("a deployment does not answer") from error
