"""A pipeline in front of decode replicas that say what a script tells them: what is tested is the gateway's turn.

The replicas are gRPC servers on loopback, the registry and the sessions a real Valkey, the tokenizer the demo model's.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

import grpc

from services.common.messages import KvOrigin, KvSource, Message, PrefillPlace, Timings, Usage
from services.common.sampling import FinishReason
from services.common.settings import Settings
from services.common.telemetry import Metrics
from services.engine.hub import resolve_model
from services.gateway.decode_client import DecodeClient
from services.gateway.forgetting import Forgetting
from services.gateway.pipeline import Pipeline, PipelineParts
from services.gateway.replicas import Replicas
from services.gateway.sessions import GatewaySessions
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.pb.antiphon.internal.v1 import decode_service_pb2_grpc
from services.sessions.redis_store import RedisSessionStore
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role
from services.text.chat_template import ChatEncoder
from services.text.tokenizer import Tokenizer
from services.wire import values
from tests.redis_servers import connected, fresh_keyspace

BLOCK_SIZE = 16


class ScriptedReplica(decode_service_pb2_grpc.DecodeServiceServicer):
    """Replies with `reply`, a token a message, whichever replica it is: token i of a reply is always the same.

    dies_at: index of the token instead of which the call breaks off, once. is_full: refuses. hangs_at: waits for ever
    instead of that token, or until it is stopped (not if ignores_stop). has_nothing: finds none of the history.
    Attributes: requests, forgotten, num_open (calls that have not ended).
    """

    def __init__(self, name: str, reply: Sequence[int]) -> None:
        self.name = name
        self.reply = reply
        self.dies_at: int | None = None
        self.hangs_at: int | None = None
        self.is_full = False
        self.has_nothing = False
        self.ignores_stop = False
        self.forgotten: list[pb.ForgetRequest] = []
        self._stopped = asyncio.Event()
        self.requests: list[pb.GenerateRequest] = []
        self.num_open = 0
        self.record: ReplicaRecord | None = None

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # type: ignore[override]
        self.requests.append(request)
        if self.is_full:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "full")
        self.num_open += 1
        context.add_done_callback(self._closed)
        async for response in self._events(request, context):
            yield response

    async def Stop(self, request: pb.StopRequest, context: Any) -> pb.StopResponse:
        assert request.call_id in [each.call_id for each in self.requests]
        if not self.ignores_stop:
            self._stopped.set()
        return pb.StopResponse()

    async def Forget(self, request: pb.ForgetRequest, context: Any) -> pb.ForgetResponse:
        self.forgotten.append(request)
        return pb.ForgetResponse(num_blocks=1)

    def _closed(self, context: Any) -> None:
        self.num_open -= 1

    async def _events(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:
        num_cached = 0 if self.has_nothing else request.num_history_tokens
        yield pb.GenerateResponse(seq=0, admitted=pb.Admitted(num_cached_tokens=num_cached))
        sampling = values.sampling_from_proto(request.sampling)
        limit = min(sampling.max_tokens or len(self.reply), len(self.reply))
        seq = 1
        for index in range(request.num_resumed_tokens, limit):
            if index == self.hangs_at:
                await self._stopped.wait()
                break
            if index == self.dies_at:
                self.dies_at = None
                await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
            chunk = pb.TokenChunk(index=index, token_ids=[self.reply[index]])
            yield pb.GenerateResponse(seq=seq, chunk=chunk)
            seq += 1
        if limit == self.dies_at:
            self.dies_at = None
            await context.abort(grpc.StatusCode.UNAVAILABLE, "Socket closed")
        num_prompt = len(request.token_ids) - request.num_resumed_tokens
        finished = pb.Finished(
            reason=values.FINISH_REASONS.number(FinishReason.LENGTH),
            usage=values.usage_to_proto(Usage(num_prompt, num_cached, limit)),
            timings=values.timings_to_proto(Timings(prefill_ms=3.0)),
            kv_origins=values.origins_to_proto([KvOrigin(KvSource.COMPUTED, self.name, num_prompt)]),
            prefill_place=values.PREFILL_PLACES.number(PrefillPlace.DECODE),
            prefill_reason="short",
            num_computed_tokens=num_prompt + limit - 1,
        )
        yield pb.GenerateResponse(seq=seq, finished=finished)


class InProcessEncoder:
    """text.Encoder without a deployment."""

    def __init__(self, encoder: ChatEncoder, tokenizer: Tokenizer) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer

    async def encode_turn(
        self, messages: Sequence[Message], is_first_turn: bool, previous_turn_ended_with_eos: bool
    ) -> list[int]:
        return self._encoder.encode_turn(
            messages, is_first_turn=is_first_turn, previous_turn_ended_with_eos=previous_turn_ended_with_eos
        )

    async def tokenize(self, text: str, as_prompt: bool = False) -> list[int]:
        return self._tokenizer.encode(text)


@dataclass
class Cluster:
    """A pipeline and what stands behind it."""

    pipeline: Pipeline
    parts: PipelineParts
    replicas: dict[str, ScriptedReplica]
    registry: ReplicaRegistry
    servers: list[grpc.aio.Server] = field(default_factory=list)

    async def register(self, name: str, **changes: Any) -> None:
        """A heartbeat, with other load if wanted."""
        record = self.replicas[name].record
        assert record is not None
        await self.registry.heartbeat(dataclasses.replace(record, **changes), 60.0)


@asynccontextmanager
async def scripted_cluster(url: str, reply_text: str, names: str = "ab", **settings: Any) -> AsyncIterator[Cluster]:
    folder = resolve_model("demo")
    tokenizer = Tokenizer.from_folder(folder)
    encoder = ChatEncoder.from_tokenizer(tokenizer)
    reply = tokenizer.encode(reply_text)
    replicas = {name: ScriptedReplica(name, reply) for name in names}
    chosen = Settings.from_mapping({"sessions": {"lease_ttl_s": 6.0}} | settings, {})
    metrics = Metrics("gateway", "demo")
    async with connected(url) as client:
        keyspace = fresh_keyspace()
        registry = ReplicaRegistry(client, keyspace)
        store = RedisSessionStore(client, keyspace)
        decode, known = DecodeClient(), Replicas(registry, chosen.sessions.registry_ttl_s, metrics)
        forgetting = Forgetting(known, decode, keyspace)
        parts = PipelineParts(
            settings=chosen,
            keyspace=keyspace,
            store=store,
            sessions=GatewaySessions(store, chosen.sessions, "demo", encoder.template_digest, forgetting),
            replicas=known,
            decode=decode,
            encoder=InProcessEncoder(encoder, tokenizer),
            tokenizer=tokenizer,
            template_digest=encoder.template_digest,
            kv_token_bytes=1000,
            metrics=metrics,
        )
        cluster = Cluster(Pipeline(parts), parts, replicas, registry)
        for name, replica in replicas.items():
            server = grpc.aio.server()
            decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(replica, server)
            port = server.add_insecure_port("127.0.0.1:0")
            await server.start()
            cluster.servers.append(server)
            replica.record = ReplicaRecord(
                Role.DECODE, name, f"{name}-1", 0.0, "m", "l", BLOCK_SIZE, 100, 100, address=f"127.0.0.1:{port}"
            )
            await cluster.register(name)
        try:
            yield cluster
        finally:
            await decode.close()
            for server in cluster.servers:
                await server.stop(None)
