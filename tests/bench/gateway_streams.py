"""How many tokens a second one gateway process streams to 64 clients. The engine is a server of made-up tokens.

Three processes: the stub of a decode replica, the gateway (its own server, pipeline and session store), the clients.
Only here is anything stubbed: what is measured is the gateway.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc

# isort: split
import tests.cluster.ray_session  # noqa: F401  (Ray brings psutil)

# isort: split
import psutil

from services.common.messages import ModelInfo, Timings, Usage
from services.common.sampling import FinishReason, SamplingParams
from services.common.settings import Settings
from services.common.telemetry import Metrics
from services.engine.hub import resolve_model
from services.gateway.decode_client import DecodeClient
from services.gateway.forgetting import Forgetting
from services.gateway.pipeline import Pipeline, PipelineParts
from services.gateway.replicas import Replicas
from services.gateway.server import GatewayServer
from services.gateway.sessions import GatewaySessions
from services.gateway.text import GatewayText
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.pb.antiphon.internal.v1 import decode_service_pb2_grpc
from services.pb.antiphon.v1 import chat_service_pb2 as chat
from services.pb.antiphon.v1 import types_pb2 as types
from services.sessions.redis_store import RedisSessionStore
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role
from services.text.chat_template import ChatEncoder
from services.text.tokenizer import Tokenizer
from services.wire import values
from tests.contract.scripted_decode import InProcessEncoder
from tests.redis_servers import connected, fresh_keyspace, running_server

MODEL = "demo"
_GENERATE = "/antiphon.v1.ChatService/Generate"


@dataclass(frozen=True)
class Streams:
    """num_streams turns at once, of num_tokens tokens each, step_s apart (0: as fast as they are taken)."""

    num_streams: int = 64
    num_tokens: int = 300
    step_s: float = 0.0


class TokenSource(decode_service_pb2_grpc.DecodeServiceServicer):
    """One token a message."""

    def __init__(self, step_s: float) -> None:
        self._step_s = step_s

    async def Generate(self, request: pb.GenerateRequest, context: Any) -> AsyncIterator[pb.GenerateResponse]:  # type: ignore[override]
        yield pb.GenerateResponse(seq=0, admitted=pb.Admitted())
        num_tokens = request.sampling.max_tokens
        due_s = time.perf_counter()
        for index in range(num_tokens):
            if self._step_s:
                due_s += self._step_s
                await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
            chunk = pb.TokenChunk(index=index, token_ids=[1000 + index % 1000])
            yield pb.GenerateResponse(seq=index + 1, chunk=chunk)
        finished = pb.Finished(
            reason=values.FINISH_REASONS.number(FinishReason.LENGTH),
            usage=values.usage_to_proto(Usage(len(request.token_ids), 0, num_tokens)),
            timings=values.timings_to_proto(Timings()),
            prefill_place=1,
        )
        yield pb.GenerateResponse(seq=num_tokens + 1, finished=finished)


def measure(streams: Streams) -> dict[str, float]:
    """Tokens a second that all clients together received, and CPU seconds of the gateway a thousand tokens."""
    context = multiprocessing.get_context("spawn")
    with running_server("embedded") as store:
        source, address = _process(context, _serve_tokens, streams.step_s)
        gateway, target = _process(context, _serve_gateway, store.url, address)
        try:
            asyncio.run(_receive(target, Streams(8, 20)))  # connections, caches
            process = psutil.Process(gateway.pid)
            before, began_s = sum(process.cpu_times()[:2]), time.perf_counter()
            num_received = asyncio.run(_receive(target, streams))
            elapsed_s, cpu_s = time.perf_counter() - began_s, sum(process.cpu_times()[:2]) - before
        finally:
            for process in (gateway, source):
                process.terminate()
                process.join()
    return {
        "streams": streams.num_streams,
        "tokens_per_s": round(num_received / elapsed_s, 1),
        "offered_tokens_per_s": round(streams.num_streams / streams.step_s, 1) if streams.step_s else 0.0,
        "gateway_cpu_ms_per_token": round(cpu_s / num_received * 1e3, 4),
        "tokens_per_s_of_a_whole_core": round(num_received / cpu_s, 1),
    }


async def _receive(target: str, streams: Streams) -> int:
    """Reads without parsing: the client shares the machine with the gateway, and is not what is measured."""
    sampling = values.sampling_to_proto(SamplingParams(temperature=0.0, max_tokens=streams.num_tokens, ignore_eos=True))
    request = chat.GenerateRequest(tokens=types.TokenInput(token_ids=range(100, 140)), sampling=sampling)
    async with grpc.aio.insecure_channel(target) as channel:
        generate = channel.unary_stream(_GENERATE, chat.GenerateRequest.SerializeToString, None)

        async def one() -> int:
            last = b""
            async for message in generate(request):
                last = message
            return int(chat.GenerateResponse.FromString(last).finished.usage.num_generated_tokens)

        return sum(await asyncio.gather(*(one() for _ in range(streams.num_streams))))


def _process(context: Any, serve: Any, *args: Any) -> tuple[Any, str]:
    """A process that serves, and the address that it says."""
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return process, ours.recv()


def _serve_tokens(ready: Connection, step_s: float) -> None:
    async def main() -> None:
        server = grpc.aio.server()
        decode_service_pb2_grpc.add_DecodeServiceServicer_to_server(TokenSource(step_s), server)
        port = server.add_insecure_port("127.0.0.1:0")
        await server.start()
        ready.send(f"127.0.0.1:{port}")
        await server.wait_for_termination()

    _run(main())


def _serve_gateway(ready: Connection, store_url: str, decode_address: str) -> None:
    async def main() -> None:
        async with _gateway(store_url, decode_address) as server:
            ready.send(f"127.0.0.1:{server.port}")
            await asyncio.Event().wait()

    _run(main())


def _run(main: Any) -> None:
    import uvloop  # what Serve's replicas run on

    uvloop.run(main)


@asynccontextmanager
async def _gateway(store_url: str, decode_address: str) -> AsyncIterator[GatewayServer]:
    settings = Settings.from_mapping({"gateway": {"port": 0}}, {})
    folder = resolve_model(MODEL)
    tokenizer, metrics = Tokenizer.from_folder(Path(folder)), Metrics("gateway", MODEL)
    template = ChatEncoder.from_tokenizer(tokenizer)
    encoder = InProcessEncoder(template, tokenizer)
    async with connected(store_url) as client:
        keyspace = fresh_keyspace()
        registry, store = ReplicaRegistry(client, keyspace), RedisSessionStore(client, keyspace)
        record = ReplicaRecord(Role.DECODE, "d", "d-1", 0.0, "m", "l", 16, 10**6, 10**6, address=decode_address)
        await registry.heartbeat(record, 3600.0)
        decode, replicas = DecodeClient(), Replicas(registry, 5.0, metrics)
        forgetting = Forgetting(replicas, decode, keyspace)
        sessions = GatewaySessions(store, settings.sessions, MODEL, template.template_digest, forgetting)
        parts = PipelineParts(
            settings=settings,
            keyspace=keyspace,
            store=store,
            sessions=sessions,
            replicas=replicas,
            decode=decode,
            encoder=encoder,
            tokenizer=tokenizer,
            template_digest=template.template_digest,
            kv_token_bytes=1000,
            metrics=metrics,
        )
        card = ModelInfo(MODEL, "float32", "absorb", 8192, tokenizer.vocab_size, 16, 1, 4, "f00")
        server = GatewayServer(
            settings.gateway, Pipeline(parts), sessions, GatewayText(encoder, tokenizer, card), metrics
        )
        await server.start()
        yield server


if __name__ == "__main__":
    print(measure(Streams()))
