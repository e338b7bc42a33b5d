"""An open-loop load of three kinds of turns: it rises, bursts twice, once with long prompts and once with long replies,
and falls. Arrivals wait for no reply and are the same for every policy.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from services.client import AsyncClient
from services.common.errors import AntiphonError, Exhausted
from services.common.messages import Delta
from services.common.sampling import SamplingParams

GOOD_FIRST_TOKEN_S, GOOD_INTER_TOKEN_S = 2.0, 0.1
THINK_S = 10.0
RETRY_S, PATIENCE_S = 1.0, 30.0  # of a client that is refused because everything is full


@dataclass(frozen=True)
class Kind:
    """Sessions of one kind: tokens of the prompt of each turn, tokens of each reply."""

    name: str
    prompts: tuple[int, ...]
    num_reply_tokens: int


CHAT = Kind("chat", (300, 75), 32)
LONG_PROMPT = Kind("long prompt", (1500,), 12)
LONG_REPLY = Kind("long reply", (48,), 160)


@dataclass(frozen=True)
class Phase:
    """Sessions of a kind for so long, at a rate (sessions a second) that goes from one to the other."""

    name: str
    kind: Kind
    length_s: float
    first_rate: float
    last_rate: float


PHASES = (
    Phase("rise", CHAT, 20, 0.3, 1.2),
    Phase("burst of long prompts", LONG_PROMPT, 40, 1.8, 1.8),
    Phase("lull", CHAT, 20, 0.5, 0.5),
    Phase("burst of long replies", LONG_REPLY, 40, 1.6, 1.6),
    Phase("fall", CHAT, 20, 0.6, 0.1),
)
LENGTH_S = sum(phase.length_s for phase in PHASES)


@dataclass(frozen=True)
class Turn:
    """One that has ended. Seconds from its start; None: it failed. num_refusals: before it was taken."""

    kind: str
    failure: str = ""
    num_refusals: int = 0
    first_token_s: float | None = None
    inter_token_s: float | None = None

    @property
    def is_good(self) -> bool:
        return (
            self.first_token_s is not None
            and self.inter_token_s is not None
            and self.first_token_s <= GOOD_FIRST_TOKEN_S
            and self.inter_token_s <= GOOD_INTER_TOKEN_S
        )


def arrivals(seed: int) -> list[tuple[float, Kind]]:
    """When sessions begin (Poisson), and of which kind."""
    rng, sessions, start_s = random.Random(seed), [], 0.0
    for phase in PHASES:
        now_s = start_s
        while True:
            rate = phase.first_rate + (phase.last_rate - phase.first_rate) * (now_s - start_s) / phase.length_s
            now_s += rng.expovariate(rate)
            if now_s > start_s + phase.length_s:
                break
            sessions.append((now_s, phase.kind))
        start_s += phase.length_s
    return sessions


class Load:
    """The sessions of one run; `turns` fills as they end."""

    def __init__(self, client: AsyncClient, seed: int) -> None:
        self._client = client
        self._seed = seed
        self.turns: list[Turn] = []

    async def run(self) -> None:
        """Until the last phase and the last turn have ended."""
        tasks, started_s = [], time.perf_counter()
        for number, (at_s, kind) in enumerate(arrivals(self._seed)):
            await asyncio.sleep(max(started_s + at_s - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(self._session(number, kind)))
        await asyncio.sleep(max(started_s + LENGTH_S - time.perf_counter(), 0))
        await asyncio.gather(*tasks)

    async def _session(self, number: int, kind: Kind) -> None:
        rng = random.Random(number)
        session = await self._client.create_session()
        for turn, num_tokens in enumerate(kind.prompts):
            await asyncio.sleep(THINK_S if turn else 0)
            prompt = [rng.randrange(100, 8000) for _ in range(num_tokens)]
            self.turns.append(await self._turn(kind, session.id, prompt, f"{session.id}-{turn}"))

    async def _turn(self, kind: Kind, session: str, prompt: Sequence[int], key: str) -> Turn:
        sampling = SamplingParams(temperature=0.0, max_tokens=kind.num_reply_tokens, ignore_eos=True)
        started_s, times, num_refusals = time.perf_counter(), [], 0
        while not times:
            try:
                async for event in self._client.generate(
                    prompt, session=session, sampling=sampling, idempotency_key=key
                ):
                    if isinstance(event, Delta):
                        times += [time.perf_counter()] * len(event.token_ids)
            except Exhausted as error:  # come again, says the reply
                num_refusals += 1
                if times or time.perf_counter() - started_s > PATIENCE_S:
                    return Turn(kind.name, error.reason, num_refusals)
                await asyncio.sleep(RETRY_S)
            except AntiphonError as error:
                return Turn(kind.name, error.reason, num_refusals)
        first_s, inter_token_s = times[0] - started_s, (times[-1] - times[0]) / (len(times) - 1)
        return Turn(kind.name, num_refusals=num_refusals, first_token_s=first_s, inter_token_s=inter_token_s)
