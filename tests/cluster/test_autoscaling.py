"""The application follows its load on Ray's real autoscaler: nodes and replicas come and go, and no reply suffers."""

from __future__ import annotations

import asyncio
import contextlib
import random
import urllib.request
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

# isort: split
import tests.cluster.ray_session  # noqa: F401  (sets variables that Ray reads when it is imported)

# isort: split
from services.client import AsyncClient, AsyncSession
from services.common.messages import KvSource, RoutingReason
from services.common.sampling import SamplingParams
from services.local import LocalPipeline
from services.sessions.registry import Role
from tests.cluster.scaled_client import Conversation, OpenLoop, ScaledApp, running_app
from tests.cluster.serving import HEARTBEAT_S, Turn, client_of, local_conversation, oracle

pytestmark = [pytest.mark.ray, pytest.mark.scale, pytest.mark.timeout(900)]

WORDS = SamplingParams(temperature=0.0, max_tokens=64, ignore_eos=True)
FEW_WORDS = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)
TOPICS = ("a fox", "a lantern", "two sisters", "the sea", "an old clock", "a red kite", "the moon", "a lost key")
SCRIPTS = [[f"Tell me a story about {topic}.", "Who helped?", "How did it end?"] for topic in TOPICS]
EARLY, LATE = ("a whale", "snow"), ("a baker", "a bridge", "the wind", "a drum", "a map")

SPEC: dict[str, Any] = {
    "settings": {
        "engine": {"device": "cpu", "num_blocks": 1024, "max_num_batched_tokens": 256, "num_threads": 1},
        "gateway": {"port": 0, "drain_timeout_s": 1.0},
        "prefill": {"num_cpus": 0.1},
        "decode": {"num_cpus": 0.1, "resources": {"decode_slot": 1}},
        "sessions": {"heartbeat_s": HEARTBEAT_S, "registry_ttl_s": 5.0},
        "autoscaling": {
            "enabled": True,
            "decode": {"min": 1, "max": 3},
            "interval_s": 0.5,
            "max_kv_usage": 0.03,  # thirty blocks: a few turns at once are a replica's share
            "up_window_s": 1.0,
            "down_window_s": 5.0,
            "session_keep_s": 20.0,
        },
    },
    "head": {"CPU": 2},
    "workers": {
        "decode": {
            "resources": {"CPU": 1, "decode_slot": 1, "object_store_memory": 80_000_000},
            "node_config": {},
            "min_workers": 0,
            "max_workers": 3,
        }
    },
    "idle_timeout_s": 5.0,
    "gcs_redis": True,
}


@pytest.fixture(scope="module")
def app() -> Iterator[ScaledApp]:
    with running_app(SPEC) as started:
        yield started


@pytest.fixture(scope="module")
def local() -> LocalPipeline:
    return oracle()


def has(number: int) -> Any:
    return lambda state: state["nodes"]["decode_slot"] == number == state["replicas"]["decode"]


class Keepers:
    """Sessions that go on, a few words now and then, while replicas come and go: what they know has to follow them."""

    def __init__(self, client: AsyncClient) -> None:
        self.conversations: list[Conversation] = []
        self._client = client
        self._sessions: list[AsyncSession] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._is_over = asyncio.Event()
        self._rng = random.Random(11)

    async def begin(self, topics: Sequence[str]) -> None:
        """First turns, one a second, so that not all of them talk at once."""
        for topic in topics:
            self._sessions.append(await self._client.create_session())
            self.conversations.append(Conversation())
            self._tasks.append(asyncio.create_task(self._go_on(len(self._tasks), topic)))
            await asyncio.sleep(1.0)

    async def end(self) -> list[Turn]:
        """A last turn of each."""
        self._is_over.set()
        await asyncio.gather(*self._tasks)
        return [await self._more(number) for number in range(len(self._tasks))]

    async def _go_on(self, number: int, topic: str) -> None:
        await self._say(number, f"Tell me a story about {topic}.")
        while not self._is_over.is_set():
            with contextlib.suppress(TimeoutError):
                # Not in step: where a slow machine had them all wait for one another, they would go on as a crowd that
                # is more than one replica's share.
                await asyncio.wait_for(self._is_over.wait(), self._rng.uniform(6.0, 18.0))
                return
            await self._more(number)

    async def _more(self, number: int) -> Turn:
        return await self._say(number, "What happened then?")

    async def _say(self, number: int, line: str) -> Turn:
        return await self.conversations[number].say(self._sessions[number], line, FEW_WORDS)


async def test_nodes_and_replicas_follow_the_load_and_no_reply_fails_or_changes(
    app: ScaledApp, local: LocalPipeline
) -> None:
    async with client_of(app.serving) as client:
        load, keepers = OpenLoop(client, SCRIPTS, WORDS, pause_s=1.0), Keepers(client)
        await keepers.begin(EARLY)
        before = await load.run(0.3, app.until(has(1), 60))
        peak = await load.run(3.0, app.until(has(3), 120))
        await load.run(3.0, keepers.begin(LATE))
        await app.until(has(1), 240)
        last = await keepers.end()
        conversations = await load.ended()
        remaining = await app.serving.replicas(Role.DECODE)
    assert before[-1]["replicas"]["decode"] == 1
    assert [state["replicas"]["decode"] for state in peak] == sorted(state["replicas"]["decode"] for state in peak)
    check_tokens(local, [*conversations, *keepers.conversations])
    check_sessions(keepers.conversations, last, remaining[0].replica_id)
    check_counters(app, [*conversations, *keepers.conversations])
    assert len(remaining[0].inherits) >= 1
    check_decisions(app.ask("decisions"))


def check_tokens(local: LocalPipeline, conversations: list[Conversation]) -> None:
    """Greedy tokens are those of one process, whichever replicas have computed them."""
    longest: dict[str, Conversation] = {}
    for each in conversations:
        if len(each.lines) > len(longest.setdefault(each.lines[0], each).lines):
            longest[each.lines[0]] = each
    expected = {
        first: local_conversation(local, each.lines, FEW_WORDS if "What happened" in each.lines[-1] else WORDS)
        for first, each in longest.items()
    }
    for each in conversations:
        tokens = [turn.token_ids for turn in expected[each.lines[0]][: len(each.lines)]]
        assert [turn.token_ids for turn in each.turns] == tokens


def is_hit(turn: Turn) -> bool:
    """Whether the turn went to a replica that holds its history, or has inherited it, and found it there."""
    is_held = turn.started.routing.reason is RoutingReason.HELD_PREFIX
    return is_held and turn.finished.kv_origins[0].source is KvSource.LOCAL


def check_sessions(keepers: list[Conversation], last: list[Turn], survivor: str) -> None:
    """All have come together at the replica that is left, and those that moved have taken their cache along."""
    assert {turn.finished.replica for turn in last} == {survivor}
    pairs = [pair for keeper in keepers for pair in zip(keeper.turns, keeper.turns[1:], strict=False)]
    moved = [(before, after) for before, after in pairs if before.finished.replica != after.finished.replica]
    stayed = [after for before, after in pairs if before.finished.replica == after.finished.replica]
    # Only an heir may not have got yet what it is known for.
    assert all(is_hit(turn) for turn in stayed if turn.started.routing.reason is RoutingReason.HELD_PREFIX)
    # Those whose replica had stopped found what it had handed over, where it had.
    assert any(is_hit(after) for _, after in moved)


def check_counters(app: ScaledApp, conversations: list[Conversation]) -> None:
    """Every later turn is in one of the two counters: it found its history where it went, or it did not."""
    later = [is_hit(turn) for each in conversations for turn in each.turns[1:]]
    counted = {name: counter(app, f"antiphon_affinity_{name}_total") for name in ("hits", "misses")}
    assert counted == {"hits": sum(later), "misses": len(later) - sum(later)}


def counter(app: ScaledApp, name: str) -> float:
    with urllib.request.urlopen(f"http://{app.metrics_address}/metrics", timeout=5) as response:
        lines = response.read().decode().splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name + "{"))


def check_decisions(lines: list[dict[str, Any]]) -> None:
    """The log says what was decided, and by what."""
    changes = [
        line["details"]
        for line in lines
        if line["details"]["kind"] == "decode" and line["details"]["target"] != line["details"]["current"]
    ]
    targets = [each["target"] for each in changes]
    assert targets[-2:] == [2, 1]  # one at a time
    assert max(targets) == 3
    for each in changes:
        assert each["inputs"]["kv"] >= 0
        assert each["replicas"]


async def test_control_service_killed_and_restarted_under_load_fails_nothing(
    app: ScaledApp, local: LocalPipeline
) -> None:
    async with client_of(app.serving) as client:
        before, pid = app.ask("state"), app.ask("gcs-pid")
        load = OpenLoop(client, SCRIPTS, WORDS, pause_s=1.0)
        await load.run(0.5, asyncio.sleep(2))
        app.ask("restart-gcs 8")
        await load.run(0.5, asyncio.sleep(14))
        conversations = await load.ended()
        assert app.ask("gcs-pid") != pid
        after = (await app.until(lambda state: state["replicas"]["gateway"] == 1, 60))[-1]
    assert {name: after["replicas"][name] for name in ("gateway", "tokenizer", "prefill")} == {
        name: before["replicas"][name] for name in ("gateway", "tokenizer", "prefill")
    }
    check_tokens(local, conversations)
