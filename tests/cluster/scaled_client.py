"""What a test has of the application on fake nodes: the process that runs it, and load that waits for no reply."""

from __future__ import annotations

import asyncio
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from services.client import AsyncClient, AsyncSession
from services.common.sampling import SamplingParams
from services.common.settings import Settings
from tests.cluster.serving import Serving, Turn, collect

ROOT = Path(__file__).parents[2]


class ScaledApp:
    """A running tests.cluster.scaled_app: its commands, and how to reach the application."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        ready = self._read()
        self.metrics_address: str = ready["metrics"]
        self.serving = Serving(ready["target"], Settings.from_mapping(ready["settings"], {}))

    def ask(self, command: str) -> Any:
        """One command, one answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{command}\n")
        self._process.stdin.flush()
        return self._read()

    async def until(self, condition: Callable[[dict[str, Any]], bool], timeout_s: float) -> list[dict[str, Any]]:
        """Asks for the state until it is as wanted; gives all that were seen."""
        seen: list[dict[str, Any]] = []
        give_up_s = time.monotonic() + timeout_s
        while not seen or not condition(seen[-1]):
            if time.monotonic() > give_up_s:
                raise AssertionError(f"after {timeout_s} s {seen[-1]}; decided last: {self.ask('decisions')[-3:]}")
            seen.append(await asyncio.to_thread(self.ask, "state"))
            await asyncio.sleep(0.5)
        return seen

    def close(self) -> dict[str, Any]:
        """Stops everything; says what is left running."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        left: dict[str, Any] = self._read()
        return left

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the application has ended"
        return json.loads(line)


@contextmanager
def running_app(spec: dict[str, Any]) -> Iterator[ScaledApp]:
    """The application of a spec (see scaled_app), stopped at the end with all its nodes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.cluster.scaled_app", json.dumps(spec)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    with process:
        try:
            app = ScaledApp(process)
            yield app
            assert app.close() == {"left": []}
        finally:
            if process.poll() is None:
                process.terminate()


@dataclass
class Conversation:
    """What became of one: the lines that were said, the turns that came back."""

    lines: list[str] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    async def say(self, session: AsyncSession, line: str, sampling: SamplingParams) -> Turn:
        """One more turn."""
        turn = await collect(session.chat(line, sampling=sampling))
        self.lines.append(line)
        self.turns.append(turn)
        return turn


class OpenLoop:
    """Starts conversations at times that do not depend on how fast they go; keeps what they have come to.

    Each says its lines one after another, pause_s between them. While max_open are running none is started: a machine
    that is slower than the load stays loaded, and is not buried.
    """

    def __init__(
        self,
        client: AsyncClient,
        scripts: Sequence[Sequence[str]],
        sampling: SamplingParams,
        pause_s: float,
        max_open: int = 24,
    ) -> None:
        self._client = client
        self._scripts = scripts
        self._sampling = sampling
        self._pause_s = pause_s
        self._max_open = max_open
        self._rng = random.Random(7)
        self._tasks: list[asyncio.Task[Conversation]] = []

    async def run(self, per_s: float, until: Awaitable[Any]) -> Any:
        """Poisson arrivals at this rate while `until` is not done; gives its result."""
        done = asyncio.ensure_future(until)
        while not done.done():
            await asyncio.wait({done}, timeout=self._rng.expovariate(per_s))
            if not done.done() and sum(not task.done() for task in self._tasks) < self._max_open:
                script = self._scripts[len(self._tasks) % len(self._scripts)]
                self._tasks.append(asyncio.create_task(self._converse(script)))
        return await done

    async def ended(self) -> list[Conversation]:
        """All conversations, once they have ended. Raises what one of them met."""
        return await asyncio.gather(*self._tasks)

    async def _converse(self, script: Sequence[str]) -> Conversation:
        conversation, session = Conversation(), await self._client.create_session()
        for line in script:
            await conversation.say(session, line, self._sampling)
            await asyncio.sleep(self._pause_s)
        return conversation
