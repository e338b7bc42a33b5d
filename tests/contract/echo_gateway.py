"""A GatewayServer on a loopback port in front of a small pipeline that echoes: what is tested is the edge."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from services.client import AsyncClient
from services.common import errors
from services.common.messages import (
    Delta,
    Explanation,
    Finished,
    Message,
    ModelInfo,
    RoutingDecision,
    RoutingReason,
    SessionInfo,
    SessionPage,
    Started,
    Timings,
    TurnEvent,
    TurnRequest,
    Usage,
)
from services.common.sampling import FinishReason, SamplingParams
from services.common.settings import GatewaySettings
from services.common.telemetry import Metrics
from services.gateway.server import GatewayServer

DEFAULT_SAMPLING = SamplingParams(temperature=0.6, top_p=0.9)
ROUTING = RoutingDecision("decode-1", RoutingReason.NO_HOLDER, "nobody holds any of it")


class EchoPipeline:
    """Turns, sessions and text in one process: the reply is the last message, a character a delta.

    A token is a code point. Some messages are commands: wait and flood (for ever), crash, stumble, huge.
    """

    def __init__(self) -> None:
        self.turns: list[TurnRequest] = []
        self.num_events = 0
        self.num_failures_left = 0
        self.waits = asyncio.Event()
        self.ended = asyncio.Event()
        self._sessions: dict[tuple[str, str], int] = {}
        self._busy: set[tuple[str, str]] = set()

    async def generate(self, turn: TurnRequest) -> AsyncGenerator[TurnEvent]:
        self.turns.append(turn)
        key = (turn.tenant, turn.session or "")
        number = self._begin(key)
        text = turn.messages[-1].content if turn.messages else "".join(map(chr, turn.token_ids))
        try:
            if self.num_failures_left > 0:
                self.num_failures_left -= 1
                raise errors.Unavailable("no replica at 10.0.0.7")
            self.num_events += 1
            yield Started(turn.request_id, turn.session, number, len(text), 0, ROUTING)
            async for delta in self._reply(text):
                self.num_events += 1
                yield delta
            if turn.session:
                self._sessions[key] = number
            yield Finished(FinishReason.STOP, Usage(len(text), 0, len(text)), Timings(total_ms=1.0), "decode-1")
        finally:
            self._busy.discard(key)
            self.ended.set()

    def _begin(self, key: tuple[str, str]) -> int:
        if not key[1]:
            return 0
        if key not in self._sessions:
            raise errors.NotFound("session", key[1])
        if key in self._busy:
            raise errors.SessionBusy(key[1], self._sessions[key] + 1)
        self._busy.add(key)
        return self._sessions[key] + 1

    async def _reply(self, text: str) -> AsyncGenerator[Delta]:
        if text == "wait":
            self.waits.set()
            await asyncio.Event().wait()
        if text == "crash":
            raise ZeroDivisionError("/srv/secret.py")
        if text == "stumble":
            raise errors.Unavailable("lost in mid-stream")
        if text == "huge":
            yield Delta("x" * 5 * 2**20, (1,), 0)
        while text == "flood":
            yield Delta("x" * 2**16, (1,), 0)
        for index, character in enumerate(text):
            yield Delta(character, (ord(character),), index)

    async def explain(self, turn: TurnRequest) -> Explanation:
        return Explanation(ROUTING, len(turn.messages[-1].content), 0)

    async def create(self, tenant: str, session: str | None, ttl_s: float | None) -> SessionInfo:
        key = (tenant, session or f"made-{len(self._sessions)}")
        if key in self._sessions:
            raise errors.AlreadyExists("session", key[1])
        self._sessions[key] = 0
        return SessionInfo(key[1], "echo", 1.0, 2.0, ttl_s or 60.0)

    async def get(self, tenant: str, session: str) -> SessionInfo:
        if (tenant, session) not in self._sessions:
            raise errors.NotFound("session", session)
        return SessionInfo(session, "echo", 1.0, 2.0, 60.0, num_turns=self._sessions[(tenant, session)])

    async def list(self, tenant: str, page_size: int, page_token: str) -> SessionPage:
        mine = sorted(session for owner, session in self._sessions if owner == tenant)
        page = [session for session in mine if session > page_token][:page_size]
        infos = tuple([await self.get(tenant, session) for session in page])
        return SessionPage(infos, page[-1] if page and page[-1] != mine[-1] else "")

    async def delete(self, tenant: str, session: str) -> None:
        await self.get(tenant, session)
        del self._sessions[(tenant, session)]

    async def tokenize_chat(self, messages: Sequence[Message]) -> Sequence[int]:
        return [0, *(ord(character) for message in messages for character in message.content)]

    async def tokenize(self, text: str, as_prompt: bool = False) -> Sequence[int]:
        return [*([0] if as_prompt else []), *(ord(character) for character in text)]

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        return "".join(map(chr, token_ids))

    async def model(self) -> ModelInfo:
        return ModelInfo("echo", "float32", "absorb", 4096, 0x110000, 16, 1, 4, "f00", DEFAULT_SAMPLING)


class Running:
    """A started server with its pipeline and metrics."""

    def __init__(self, server: GatewayServer, pipeline: EchoPipeline, metrics: Metrics) -> None:
        self.server = server
        self.pipeline = pipeline
        self.metrics = metrics
        self.target = f"127.0.0.1:{server.port}"


@asynccontextmanager
async def running(**settings: Any) -> AsyncIterator[Running]:
    pipeline, metrics = EchoPipeline(), Metrics("gateway", "echo")
    limits = {"port": 0, "drain_timeout_s": 0.2} | settings
    server = GatewayServer(GatewaySettings(**limits), pipeline, pipeline, pipeline, metrics)
    await server.start()
    try:
        yield Running(server, pipeline, metrics)
    finally:
        await server.stop()


@asynccontextmanager
async def connected(**settings: Any) -> AsyncIterator[tuple[Running, AsyncClient]]:
    async with running(**settings) as edge, AsyncClient(edge.target) as client:
        yield edge, client


async def collect(events: AsyncGenerator[TurnEvent]) -> list[TurnEvent]:
    return [event async for event in events]


def text_of(events: Sequence[TurnEvent]) -> str:
    return "".join(event.text for event in events if isinstance(event, Delta))
