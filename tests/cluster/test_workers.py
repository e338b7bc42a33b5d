"""Prefill and decode replicas of a real cluster: handing over KV blocks both ways, and losing each other."""

from __future__ import annotations

import asyncio
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import grpc
import pytest

# isort: split
import tests.cluster.ray_session  # noqa: F401  (sets variables that Ray reads when it is imported)

# isort: split
import ray
from ray import serve

from services.common.errors import AntiphonError, InvalidRequest, PromptTooLong, Unavailable
from services.common.messages import KvSource, PrefillPlace
from services.common.sampling import SamplingParams
from services.common.settings import Settings
from services.decode.deployment import DecodeDeployment
from services.engine.engine import Engine, EngineRequest
from services.engine.loading import load_engine
from services.gateway.status import error_from_rpc
from services.pb.antiphon.internal.v1 import decode_service_pb2 as pb
from services.pb.antiphon.internal.v1.decode_service_pb2_grpc import DecodeServiceStub
from services.prefill.deployment import PrefillDeployment
from services.sessions.connect import connect
from services.sessions.embedded import EmbeddedServer
from services.sessions.from_settings import keyspace_of, redis_settings
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role
from services.wire import values

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

MODEL = Path(__file__).parents[1] / "data" / "checkpoints" / "v3"
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
SALT = b"tenant"


def _settings(store: EmbeddedServer, folder: Path, remote_prefill: str) -> Settings:
    url = urlsplit(store.url)
    (folder / "password").write_text(url.password or "")
    (folder / "secret").write_text(secrets.token_hex(16))
    return Settings.from_mapping(
        {
            "model": {"path": str(MODEL), "dtype": "float32", "max_seq_len": 1024},
            "engine": {"device": "cpu", "num_blocks": 200, "max_num_batched_tokens": 128, "num_threads": 1},
            "sessions": {
                "store": "redis",
                "url": f"redis://{url.hostname}:{url.port}/0",
                "password_file": str(folder / "password"),
                "secret_file": str(folder / "secret"),
                "heartbeat_s": 0.2,
                "registry_ttl_s": 2.0,
            },
            "decode": {"remote_prefill": remote_prefill},
            "transfer": {"fetch_timeout_s": 3.0, "quarantine_s": 1.0},
        },
        {},
    )


@dataclass
class Reply:
    """What a turn has sent."""

    token_ids: list[int] = field(default_factory=list)
    indices: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    admitted: pb.Admitted | None = None
    finished: pb.Finished | None = None

    @property
    def origins(self) -> list[tuple[KvSource, int]]:
        assert self.finished is not None
        return [(each.source, each.num_tokens) for each in values.origins_from_proto(self.finished.kv_origins)]

    @property
    def place(self) -> PrefillPlace:
        assert self.finished is not None
        place: PrefillPlace = values.PREFILL_PLACES.member(self.finished.prefill_place, "prefill_place")
        return place


class Cluster:
    """One prefill and two decode replicas, as a gateway sees them."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    async def replicas(self, role: Role) -> tuple[ReplicaRecord, ...]:
        async with self._registry() as registry:
            return await registry.list(role)

    async def ready(self, num_prefill: int = 1) -> tuple[ReplicaRecord, ReplicaRecord]:
        """The decode replicas, once all are registered and have had time to hear of each other."""
        async with asyncio.timeout(60):
            while True:
                decode, prefill = await self.replicas(Role.DECODE), await self.replicas(Role.PREFILL)
                if len(decode) == 2 and len(prefill) == num_prefill:
                    await asyncio.sleep(2 * self.settings.sessions.heartbeat_s)
                    return decode[0], decode[1]
                await asyncio.sleep(0.1)

    async def until_idle(self, within_s: float = 5.0) -> None:
        """All blocks of all replicas are free."""
        async with asyncio.timeout(within_s):
            while True:
                records = await self.replicas(Role.DECODE) + await self.replicas(Role.PREFILL)
                if all(each.num_free_blocks == each.num_blocks for each in records):
                    return
                await asyncio.sleep(0.1)

    async def turn(
        self,
        record: ReplicaRecord,
        token_ids: Sequence[int],
        sampling: SamplingParams = GREEDY,
        *,
        holder: tuple[ReplicaRecord, int] | None = None,
        **fields: Any,
    ) -> Reply:
        """One turn at a replica; holder: who else holds the history, and how much."""
        reply = Reply()
        async with grpc.aio.insecure_channel(record.address) as channel:
            async for response in DecodeServiceStub(channel).Generate(
                self.request(record, token_ids, sampling, holder=holder, **fields), timeout=60
            ):
                _gather(reply, response)
        return reply

    def request(
        self,
        record: ReplicaRecord,
        token_ids: Sequence[int],
        sampling: SamplingParams = GREEDY,
        *,
        holder: tuple[ReplicaRecord, int] | None = None,
        **fields: Any,
    ) -> pb.GenerateRequest:
        holders = []
        if holder is not None:
            holders = [
                pb.KvHolder(
                    replica=holder[0].replica_id, incarnation=holder[0].incarnation, num_computed_tokens=holder[1]
                )
            ]
        request = {"request_id": secrets.token_hex(4), "incarnation": record.incarnation, "salt": SALT, **fields}
        return pb.GenerateRequest(
            token_ids=token_ids, sampling=values.sampling_to_proto(sampling), holders=holders, **request
        )

    @asynccontextmanager
    async def _registry(self) -> AsyncIterator[ReplicaRegistry]:
        client = connect(redis_settings(self.settings.sessions))
        try:
            yield ReplicaRegistry(client, keyspace_of(self.settings.sessions))
        finally:
            await client.aclose()


def _gather(reply: Reply, response: pb.GenerateResponse) -> None:
    event = response.WhichOneof("event")
    if event == "admitted":
        reply.admitted = response.admitted
    elif event == "chunk":
        reply.indices.append(response.chunk.index)
        reply.token_ids += response.chunk.token_ids
        reply.logprobs += [each.logprob for each in response.chunk.logprobs]
    else:
        reply.finished = response.finished


def _deploy(settings: Settings, num_decode: int) -> None:
    options = {"ray_actor_options": {"num_cpus": 0.1}, "max_ongoing_requests": 64}
    prefill = PrefillDeployment.options(**options).bind(settings)
    decode = DecodeDeployment.options(num_replicas=num_decode, **options).bind(settings, prefill)
    serve.run(decode, name="workers", route_prefix=None)


def _running(remote_prefill: str) -> Iterator[Cluster]:
    with tempfile.TemporaryDirectory() as folder, EmbeddedServer(Path(folder, "store")) as store:
        settings = _settings(store, Path(folder), remote_prefill)
        serve.start(proxy_location="Disabled")
        try:
            _deploy(settings, num_decode=2)
            yield Cluster(settings)
        finally:
            serve.shutdown()


@pytest.fixture(scope="module")
def cluster(ray_cluster: None) -> Iterator[Cluster]:
    """A cluster in which prefill is always asked."""
    yield from _running("always")


@pytest.fixture(scope="module")
def oracle() -> Engine:
    """The same model in this process, with a pool that keeps nothing."""
    settings = Settings.from_mapping(
        {
            "model": {"path": str(MODEL), "dtype": "float32", "max_seq_len": 1024},
            "engine": {"device": "cpu", "num_blocks": 200, "prefix_caching": False, "num_threads": 1},
        },
        {},
    )
    return load_engine(settings.model, settings.engine)


def _expected(engine: Engine, token_ids: Sequence[int], sampling: SamplingParams = GREEDY) -> list[int]:
    engine.add(EngineRequest("oracle", token_ids, sampling))
    tokens: list[int] = []
    while engine.has_work:
        for output in engine.step():
            tokens += output.token_ids
    return tokens


def _prompt(seed: int, num_tokens: int) -> list[int]:
    return [(seed * 7919 + i * i * 31 + i * 17) % 500 + 5 for i in range(num_tokens)]


async def test_a_prompt_computed_by_prefill_gives_the_tokens_of_one_process(cluster: Cluster, oracle: Engine) -> None:
    first, _ = await cluster.ready()
    prompt = _prompt(1, 100)
    reply = await cluster.turn(first, prompt)
    assert reply.token_ids == _expected(oracle, prompt)
    assert reply.indices == list(range(12))
    assert reply.place is PrefillPlace.PREFILL
    assert reply.origins == [(KvSource.PREFILL, 100)]
    assert reply.finished is not None
    assert reply.finished.num_computed_tokens == 111 // 16 * 16
    assert reply.finished.timings.transfer_bytes > 0
    await cluster.until_idle()


async def test_prefill_fetches_the_history_that_only_decode_holds(cluster: Cluster, oracle: Engine) -> None:
    first, _ = await cluster.ready()
    prompt = _prompt(2, 60)
    history = prompt + (await cluster.turn(first, prompt)).token_ids
    prompt = history + _prompt(3, 40)
    reply = await cluster.turn(first, prompt, num_history_tokens=len(history))
    assert reply.token_ids == _expected(oracle, prompt)
    assert reply.place is PrefillPlace.PREFILL
    # 71 of 72 tokens have been computed: 4 full blocks.
    assert reply.origins == [(KvSource.LOCAL, 64), (KvSource.PREFILL, 48)]
    await cluster.until_idle()


async def test_a_session_that_moves_fetches_its_history_from_the_old_holder(cluster: Cluster, oracle: Engine) -> None:
    first, second = await cluster.ready()
    # Not by way of prefill, so that only the old holder has it.
    history = _prompt(4, 640)
    sampling = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, prompt_logprobs=0)
    history += (await cluster.turn(first, history, sampling)).token_ids
    prompt = history + _prompt(5, 30)
    reply = await cluster.turn(second, prompt, num_history_tokens=len(history), holder=(first, 640))
    assert reply.token_ids == _expected(oracle, prompt)
    assert reply.origins == [(KvSource.FETCHED, 640), (KvSource.PREFILL, 42)]
    assert reply.finished is not None
    assert reply.finished.kv_origins[0].replica == first.replica_id
    await cluster.until_idle()


async def test_many_sessions_that_move_at_once_all_fetch_their_history(cluster: Cluster, oracle: Engine) -> None:
    first, second = await cluster.ready()
    sampling = SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, prompt_logprobs=0)
    prompts = [_prompt(200 + i, 330) for i in range(6)]
    for prompt in prompts:
        await cluster.turn(first, prompt, sampling)
    moved = [prompt[:320] + _prompt(300 + i, 20) for i, prompt in enumerate(prompts)]
    replies = await asyncio.gather(*[cluster.turn(second, each, holder=(first, 320)) for each in moved])
    for token_ids, reply in zip(moved, replies, strict=True):
        assert reply.token_ids == _expected(oracle, token_ids)
        assert reply.origins[0] == (KvSource.FETCHED, 320)
        assert reply.finished is not None
        assert reply.finished.kv_origins[0].replica == first.replica_id
    await cluster.until_idle()


async def test_conversations_at_once_are_the_same_as_in_one_process(cluster: Cluster, oracle: Engine) -> None:
    replicas = await cluster.ready()

    async def conversation(i: int) -> tuple[list[int], list[list[int]]]:
        history: list[int] = []
        replies = []
        holder = None
        for turn in range(3):
            history += _prompt(100 + 10 * i + turn, 20 + 7 * i)
            record = replicas[(i + turn) % 2]
            reply = await cluster.turn(record, history, num_history_tokens=len(history), holder=holder)
            assert reply.finished is not None
            holder = (record, reply.finished.num_computed_tokens)
            history += reply.token_ids
            replies.append(reply.token_ids)
        return history, replies

    conversations = await asyncio.gather(*[conversation(i) for i in range(6)])
    for i, (_, replies) in enumerate(conversations):
        expected: list[int] = []
        for turn, reply in enumerate(replies):
            expected += _prompt(100 + 10 * i + turn, 20 + 7 * i)
            assert reply == _expected(oracle, expected)
            expected += reply
    await cluster.until_idle()


async def test_a_seeded_reply_with_logprobs_is_the_same_as_in_one_process(cluster: Cluster, oracle: Engine) -> None:
    first, _ = await cluster.ready()
    sampling = SamplingParams(temperature=0.8, seed=5, presence_penalty=0.5, max_tokens=8, ignore_eos=True, logprobs=2)
    reply = await cluster.turn(first, _prompt(6, 90), sampling)
    assert reply.place is PrefillPlace.PREFILL
    assert reply.token_ids == _expected(oracle, _prompt(6, 90), sampling)
    assert len(reply.logprobs) == 8


@pytest.mark.parametrize("after_s", [0.0, 0.01, 0.03, 0.1])
async def test_a_cancelled_turn_frees_everything(cluster: Cluster, after_s: float) -> None:
    first, second = await cluster.ready()
    long = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
    prompt = _prompt(int(7000 + after_s * 1000), 600)
    async with grpc.aio.insecure_channel(first.address) as channel:
        call = DecodeServiceStub(channel).Generate(cluster.request(first, prompt, long, holder=(second, 320)))
        await anext(aiter(call))
        await asyncio.sleep(after_s)
        call.cancel()
    await cluster.until_idle()


async def test_a_deadline_ends_the_turn_and_frees_everything(cluster: Cluster) -> None:
    first, _ = await cluster.ready()
    long = SamplingParams(temperature=0.0, max_tokens=300, ignore_eos=True)
    async with grpc.aio.insecure_channel(first.address) as channel:
        call = DecodeServiceStub(channel).Generate(cluster.request(first, _prompt(8, 600), long), timeout=0.2)
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            async for _ in call:
                pass
        assert failed.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await cluster.until_idle()


async def test_refusals_carry_their_reason_and_nothing_else(cluster: Cluster) -> None:
    first, second = await cluster.ready()
    cases: list[tuple[pb.GenerateRequest, type[AntiphonError]]] = [
        (cluster.request(first, _prompt(9, 1024)), PromptTooLong),
        (cluster.request(first, []), InvalidRequest),
        (cluster.request(first, [512]), InvalidRequest),
        (cluster.request(second, [1]), Unavailable),
    ]
    async with grpc.aio.insecure_channel(first.address) as channel:
        for request, kind in cases:
            with pytest.raises(grpc.aio.AioRpcError) as failed:
                await anext(aiter(DecodeServiceStub(channel).Generate(request)))
            assert type(error_from_rpc(failed.value)) is kind


async def test_a_prefill_replica_killed_in_mid_call_costs_time_only(cluster: Cluster, oracle: Engine) -> None:
    first, _ = await cluster.ready()
    prompt = _prompt(10, 900)
    reply = Reply()
    async with grpc.aio.insecure_channel(first.address) as channel:
        async for response in DecodeServiceStub(channel).Generate(cluster.request(first, prompt), timeout=60):
            _gather(reply, response)
            if reply.token_ids == [] and reply.admitted is not None:
                (record,) = await cluster.replicas(Role.PREFILL)
                _kill("prefill", record)
    assert reply.token_ids == _expected(oracle, prompt)
    assert reply.place is PrefillPlace.DECODE
    assert reply.finished is not None
    # Lost in mid-call, or before it had taken the call: then nobody is there to take it.
    assert re.search(r"asked and failed \((UNAVAILABLE|EXHAUSTED)\)", reply.finished.prefill_reason)
    await cluster.ready()
    await cluster.until_idle()


async def test_a_reply_goes_on_elsewhere_after_its_replica_was_killed(cluster: Cluster, oracle: Engine) -> None:
    first, second = await cluster.ready()
    prompt = _prompt(11, 200)
    lost = Reply()
    sampling = SamplingParams(temperature=0.0, max_tokens=40, ignore_eos=True)
    async with grpc.aio.insecure_channel(first.address) as channel:
        responses = DecodeServiceStub(channel).Generate(cluster.request(first, prompt, sampling))
        with pytest.raises(grpc.aio.AioRpcError) as failed:
            await _gather_until_killed(responses, lost, first)
        assert type(error_from_rpc(failed.value)) is Unavailable
    num_sent = len(lost.token_ids)
    sent = prompt + lost.token_ids
    holder = (first, 192)  # it is gone, which nobody may know yet
    reply = await cluster.turn(second, sent, sampling, holder=holder, num_resumed_tokens=num_sent)
    assert lost.token_ids + reply.token_ids == _expected(oracle, prompt, sampling)
    assert reply.indices[0] == num_sent
    await cluster.ready()
    await cluster.until_idle()


async def test_a_replica_that_is_taken_away_ends_its_turns_first(cluster: Cluster, oracle: Engine) -> None:
    replicas = await cluster.ready()
    sampling = SamplingParams(temperature=0.0, max_tokens=400, ignore_eos=True)
    turns = [asyncio.ensure_future(cluster.turn(each, _prompt(12, 50), sampling)) for each in replicas]
    async with asyncio.timeout(10):
        while not all([each.num_running for each in await cluster.replicas(Role.DECODE)]):
            await asyncio.sleep(0.05)
    await asyncio.to_thread(_deploy, cluster.settings, 1)
    for reply in await asyncio.gather(*turns):
        assert reply.token_ids == _expected(oracle, _prompt(12, 50), sampling)
    async with asyncio.timeout(60):
        while len(await cluster.replicas(Role.DECODE)) > 1:
            await asyncio.sleep(0.1)
    await cluster.until_idle()


async def _gather_until_killed(responses: Any, reply: Reply, record: ReplicaRecord) -> None:
    async for response in responses:
        _gather(reply, response)
        if len(reply.token_ids) == 5:
            _kill("decode", record)


def _kill(deployment: str, record: ReplicaRecord) -> None:
    name = f"SERVE_REPLICA::workers#{deployment}#{record.serve_replica_id}"
    ray.kill(ray.get_actor(name, namespace="serve"))
