"""The whole application in the tests' Ray, and the processes behind it."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from typing import Any

# isort: split
import tests.cluster.ray_session  # noqa: F401  (sets variables that Ray reads when it is imported)

# isort: split
import psutil  # Ray brings it

from services.app import deployed, session_store
from services.client import AsyncClient
from services.common.messages import Delta, Finished, Message, Started, TurnEvent
from services.common.sampling import SamplingParams
from services.common.settings import EngineSettings, ModelSettings, Settings
from services.local import LocalPipeline
from services.ray_environment import prepare_environment
from services.sessions.connect import connect
from services.sessions.from_settings import keyspace_of, redis_settings
from services.sessions.registry import ReplicaRecord, ReplicaRegistry, Role

HEARTBEAT_S = 0.25
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@dataclass(frozen=True)
class Serving:
    """A running application."""

    target: str
    settings: Settings

    async def replicas(self, role: Role | None = None) -> tuple[ReplicaRecord, ...]:
        """What the registry says now."""
        async with _redis(self.settings) as client:
            return await ReplicaRegistry(client, keyspace_of(self.settings.sessions)).list(role)

    async def wait_for(self, condition: Any, timeout_s: float = 60.0) -> None:
        """Until the condition holds for the registry's records."""
        async with asyncio.timeout(timeout_s):
            while not condition(await self.replicas()):
                await asyncio.sleep(HEARTBEAT_S / 2)

    async def is_whole(self) -> None:
        """Until all replicas are there, idle, with all blocks free."""
        num_wanted = self.settings.decode.num_replicas + self.settings.prefill.num_replicas

        def is_idle(records: Sequence[ReplicaRecord]) -> bool:
            idle = [each for each in records if not each.num_running and each.num_free_blocks == each.num_blocks]
            return len(idle) == num_wanted

        await self.wait_for(is_idle)


@dataclass(frozen=True)
class Turn:
    """What a client saw of a turn."""

    started: Started
    finished: Finished
    text: str
    token_ids: tuple[int, ...]


@contextmanager
def serving(num_prefill: int, num_decode: int, **changes: dict[str, Any]) -> Iterator[Serving]:
    """The application on the CPU with the demo model. changes: of sections of the settings."""
    prepare_environment({})
    sections: dict[str, dict[str, Any]] = {
        "engine": {"device": "cpu", "num_blocks": 512, "max_num_batched_tokens": 256, "num_threads": 1},
        "gateway": {"port": 0, "drain_timeout_s": 1.0},
        "prefill": {"num_replicas": num_prefill, "num_cpus": 0.1},
        "decode": {"num_replicas": num_decode, "num_cpus": 0.1},
        "sessions": {"heartbeat_s": HEARTBEAT_S, "registry_ttl_s": 5.0},
    }
    for name, values in changes.items():
        sections[name] = sections.get(name, {}) | values
    with session_store(Settings.from_mapping(sections, {})) as settings, deployed(settings) as gateway:
        yield Serving(gateway.address.remote().result(), settings)


async def collect(events: AsyncIterator[TurnEvent]) -> Turn:
    """Reads a turn to its end; checks that indices have neither gap nor repeat."""
    started: Started | None = None
    text, token_ids = "", []
    async for event in events:
        if isinstance(event, Started):
            started = event
        elif isinstance(event, Delta):
            assert event.index == len(token_ids)
            text += event.text
            token_ids += event.token_ids
        else:
            assert started is not None
            return Turn(started, event, text, tuple(token_ids))
    raise AssertionError("no end")


def local_conversation(pipeline: LocalPipeline, lines: Sequence[str], sampling: SamplingParams) -> list[Turn]:
    """The same conversation in this process: the oracle. `started` is not filled."""
    session = pipeline.session()
    turns: list[Turn] = []
    for line in lines:
        text, token_ids, finished = "", [], None
        for event in session.turn([Message("user", line)], sampling):
            if isinstance(event, Delta):
                text += event.text
                token_ids += event.token_ids
            else:
                finished = event
        assert finished is not None
        turns.append(Turn(None, finished, text, tuple(token_ids)))  # type: ignore[arg-type]
    return turns


def oracle() -> LocalPipeline:
    """One process, the same model."""
    engine = EngineSettings(device="cpu", num_blocks=2048, max_num_batched_tokens=256, num_threads=1)
    return LocalPipeline.load(ModelSettings(), engine)


def process_at(address: str) -> psutil.Process:
    """The process that listens on host:port."""
    port = int(address.rpartition(":")[2])
    for connection in psutil.net_connections("tcp"):
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            return psutil.Process(connection.pid)
    raise AssertionError(f"nobody listens on {port}")


def prefill_processes() -> list[psutil.Process]:
    """The prefill replicas of this test's Ray, by their titles."""
    return [
        each
        for each in psutil.Process().children(recursive=True)
        if "ServeReplica:antiphon:prefill" in " ".join(each.cmdline())
    ]


@asynccontextmanager
async def client_of(serving: Serving) -> AsyncIterator[AsyncClient]:
    async with AsyncClient(serving.target) as client:
        yield client


@asynccontextmanager
async def _redis(settings: Settings) -> AsyncIterator[Any]:
    client = connect(dataclasses.replace(redis_settings(settings.sessions), timeout_s=2.0))
    try:
        yield client
    finally:
        await client.aclose()
