"""Scaling policies under the same open-loop load that rises, bursts and falls.

    python -m tests.bench.autoscaling --policy ours        # one policy; its row is kept in the result file
    python -m tests.bench.autoscaling --table              # the table of all rows so far

Engines are paced (tests/bench/paced_app.py). Sessions of two turns, the second some seconds after the first; arrivals
wait for no reply. A turn is good if its first token comes within 1 s and the others every 100 ms on the mean.
Replica-seconds are those of prefill and decode, starting and stopping ones included.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.ray_environment import prepare_environment

prepare_environment(os.environ)

from ray import serve  # noqa: E402

from services.app import APP_NAME, deployed, local_ray, session_store  # noqa: E402
from services.client import AsyncClient  # noqa: E402
from services.common.errors import AntiphonError  # noqa: E402
from services.common.messages import Delta  # noqa: E402
from services.common.sampling import SamplingParams  # noqa: E402
from services.common.settings import Settings  # noqa: E402
from services.scaling.serve_options import serve_config  # noqa: E402
from tests.bench.paced_app import IMPORT_PATH  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "autoscaling-cpu.json"
GOOD_FIRST_TOKEN_S, GOOD_INTER_TOKEN_S = 1.0, 0.1
NUM_PROMPT_TOKENS, NUM_REPLY_TOKENS, THINK_S = 300, 48, 8.0
# Length in seconds, sessions a second at its beginning and its end.
PHASES = ((25.0, 0.3, 1.2), (12.0, 2.5, 2.5), (15.0, 0.8, 0.8), (20.0, 0.8, 0.1), (20.0, 0.1, 0.1))
SERVES_DEFAULTS = {"target_ongoing_requests": 2, "upscale_delay_s": 30.0, "downscale_delay_s": 600.0}
SAME_WINDOWS = SERVES_DEFAULTS | {"upscale_delay_s": 1.0, "downscale_delay_s": 15.0}
POLICIES = {
    "fixed-1": "one prefill and one decode replica",
    "fixed-3": "three of each",
    "serve": "Serve's default: calls that go through Serve, two a replica, 30 s up, 600 s down",
    "serve-sequences": "Serve's rule given the sequences of each replica, two a replica, 1 s up, 15 s down",
    "ours": "queue time, busy time, KV blocks and inter-token time, 15 s down",
}


@dataclass(frozen=True)
class TurnTimes:
    """Seconds from the start of the load, and from the turn's own start. None: it failed."""

    started_s: float
    first_token_s: float | None
    inter_token_s: float | None

    @property
    def is_good(self) -> bool:
        return (
            self.first_token_s is not None
            and self.inter_token_s is not None
            and self.first_token_s <= GOOD_FIRST_TOKEN_S
            and self.inter_token_s <= GOOD_INTER_TOKEN_S
        )


def arrivals(seed: int = 11) -> list[float]:
    """When sessions begin: the same for every policy."""
    rng, times, start = random.Random(seed), [], 0.0
    for length, first, last in PHASES:
        now = start
        while True:
            rate = first + (last - first) * (now - start) / length
            now += rng.expovariate(rate)
            if now > start + length:
                break
            times.append(now)
        start += length
    return times


def settings_of(policy: str) -> Settings:
    number = {"fixed-1": 1, "fixed-3": 3}.get(policy)
    bounds = {"min": 1, "max": 3}
    scaling = {"enabled": number is None, "prefill": bounds, "decode": bounds, "interval_s": 0.5}
    # What a good turn is, with something to spare.
    scaling |= {"target_queue_s": 0.5, "target_inter_token_s": 0.09, "down_window_s": 15.0, "session_keep_s": 30.0}
    return Settings.from_mapping(
        {
            "engine": {"device": "cpu", "num_blocks": 1024, "max_num_batched_tokens": 256, "num_threads": 1},
            "gateway": {"port": 0, "drain_timeout_s": 1.0},
            "prefill": {"num_replicas": number or 1, "num_cpus": 0.2},
            "decode": {"num_replicas": number or 1, "num_cpus": 0.2},
            "autoscaling": scaling,
            "sessions": {"heartbeat_s": 0.5, "registry_ttl_s": 5.0},
            "telemetry": {"log_level": "WARNING"},
        },
        {},
    )


def config_of(policy: str, settings: Settings) -> dict[str, Any]:
    """The application with paced engines, and the policy."""
    config = serve_config(settings, APP_NAME, IMPORT_PATH)
    application = config["applications"][0]
    if policy != "ours":
        del application["autoscaling_policy"]
    if policy.startswith("serve"):
        options = SERVES_DEFAULTS if policy == "serve" else SAME_WINDOWS
        bounds = {"min_replicas": 1, "max_replicas": 3, "initial_replicas": 1}
        application["deployments"] = [
            {"name": name, "autoscaling_config": bounds | options} for name in ("prefill", "decode")
        ]
    if policy == "serve-sequences":
        application["autoscaling_policy"] = {
            "policy_function": "tests.bench.sequences_policy:SequencesPolicy",
            "policy_kwargs": {"settings": application["args"]},
        }
    return config


class Load:
    """The sessions of one run."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._sampling = SamplingParams(temperature=0.0, max_tokens=NUM_REPLY_TOKENS, ignore_eos=True)
        self._started_s = time.perf_counter()
        self.turns: list[TurnTimes] = []

    async def run(self) -> None:
        tasks = []
        for number, at_s in enumerate(arrivals()):
            await asyncio.sleep(max(self._started_s + at_s - time.perf_counter(), 0))
            tasks.append(asyncio.create_task(self._session(number)))
        length_s = sum(length for length, _, _ in PHASES)
        await asyncio.sleep(max(self._started_s + length_s - time.perf_counter(), 0))
        await asyncio.gather(*tasks)

    async def _session(self, number: int) -> None:
        rng = random.Random(number)
        session = await self._client.create_session()
        for num_tokens in (NUM_PROMPT_TOKENS, NUM_PROMPT_TOKENS // 4):
            await self._turn(session.id, [rng.randrange(100, 8000) for _ in range(num_tokens)])
            await asyncio.sleep(THINK_S)

    async def _turn(self, session: str, token_ids: Sequence[int]) -> None:
        started_s = time.perf_counter()
        times: list[float] = []
        try:
            async for event in self._client.generate(
                token_ids, session=session, sampling=self._sampling, idempotency_key=f"{session}-{started_s}"
            ):
                if isinstance(event, Delta):
                    times += [time.perf_counter()] * len(event.token_ids)
        except AntiphonError:
            self.turns.append(TurnTimes(started_s - self._started_s, None, None))
        else:
            inter_token_s = (times[-1] - times[0]) / (len(times) - 1)
            self.turns.append(TurnTimes(started_s - self._started_s, times[0] - started_s, inter_token_s))


class ReplicaCount:
    """Counts replicas while the load runs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.most = {"prefill": 0, "decode": 0}

    async def watch(self) -> None:
        last_s = time.perf_counter()
        while True:
            await asyncio.sleep(0.5)
            deployments = (await asyncio.to_thread(serve.status)).applications[APP_NAME].deployments
            now_s = time.perf_counter()
            for name in self.most:
                number = sum(deployments[name].replica_states.values())
                self.seconds += number * (now_s - last_s)
                self.most[name] = max(self.most[name], deployments[name].replica_states.get("RUNNING", 0))
            last_s = now_s


async def measure(target: str) -> dict[str, Any]:
    """One run of the load."""
    async with AsyncClient(target) as client:
        async for _ in client.generate([100, 200, 300], sampling=SamplingParams(max_tokens=4)):
            pass  # connections are there, and something has been measured
        load, replicas = Load(client), ReplicaCount()
        watching = asyncio.create_task(replicas.watch())
        await load.run()
        watching.cancel()
    answered = [turn.first_token_s for turn in load.turns if turn.first_token_s is not None]
    num_good = sum(turn.is_good for turn in load.turns)
    return {
        "num_turns": len(load.turns),
        "num_failed": len(load.turns) - len(answered),
        "num_good": num_good,
        "goodput_turns_per_s": round(num_good / sum(length for length, _, _ in PHASES), 3),
        "ttft_p50_ms": round(statistics.median(answered) * 1e3),
        "ttft_p90_ms": round(statistics.quantiles(answered, n=10)[-1] * 1e3),
        "replica_seconds": round(replicas.seconds, 1),
        "most_replicas": replicas.most,
    }


def run(policy: str) -> dict[str, Any]:
    """The application with one policy, on this machine."""
    began = os.getloadavg()[0]
    with (
        session_store(settings_of(policy)) as settings,
        local_ray(settings),
        deployed(settings, config_of(policy, settings)) as gateway,
    ):
        row = asyncio.run(measure(gateway.address.remote().result()))
    machine = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    return {"policy": policy, "what": POLICIES[policy], "machine": machine, "load_before": round(began, 2), **row}


def read() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return rows


def write(row: dict[str, Any]) -> None:
    """One line a policy, in the order of POLICIES."""
    rows = {each["policy"]: each for each in read()} | {row["policy"]: row}
    lines = [json.dumps(rows[name]) for name in POLICIES if name in rows]
    RESULTS.write_text("[\n" + ",\n".join(lines) + "\n]\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| policy | good turns | goodput, turns/s | TTFT p50 / p90, ms | replica-seconds | most replicas | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        most = row["most_replicas"]
        lines.append(
            f"| {row['policy']} | {row['num_good']} of {row['num_turns']} | {row['goodput_turns_per_s']:.2f} "
            f"| {row['ttft_p50_ms']} / {row['ttft_p90_ms']} | {row['replica_seconds']:.0f} "
            f"| {most['prefill']} + {most['decode']} | {row['num_failed']} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=POLICIES)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.policy:
        row = run(arguments.policy)
        write(row)
        print(row)
    if arguments.table:
        print(table(read()))


if __name__ == "__main__":
    main()
