"""Scaling policies under the same open-loop load (autoscaling_load.py).

    python -m tests.bench.autoscaling --policy ours --seed 1    # one run; its row is kept in the result file
    python -m tests.bench.autoscaling --table                   # the table of all rows so far

Engines are paced and their model is tiny (paced_app.py). Processes that start have the lowest priority until they
serve, as a pod of its own would start on cores of its own; run as root, who may raise it again. A turn is good if its
first token comes within 2 s and the others every 100 ms on the mean. A client that is refused (everything is full)
comes again, and its first token counts from its first try. Replica-seconds are those of prefill and decode, starting
and stopping ones included.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from services.ray_environment import prepare_environment

prepare_environment(os.environ)
os.environ["RAY_worker_niceness"] = "19"  # noqa: SIM112

from ray import serve  # noqa: E402

# isort: split
import psutil  # noqa: E402  (Ray brings it)

from services.app import APP_NAME, deployed, local_ray, session_store  # noqa: E402
from services.client import AsyncClient  # noqa: E402
from services.common.sampling import SamplingParams  # noqa: E402
from services.common.settings import Settings  # noqa: E402
from services.scaling.serve_options import serve_config  # noqa: E402
from tests.bench.autoscaling_load import CHAT, LENGTH_S, LONG_PROMPT, LONG_REPLY, Load, Turn  # noqa: E402
from tests.bench.commit import commit  # noqa: E402
from tests.bench.paced_app import IMPORT_PATH, set_niceness  # noqa: E402
from tests.bench.small_checkpoint import write_small_checkpoint  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "autoscaling-cpu.json"
WARM_UP_S = 10.0
MOST_REPLICAS = 3
SERVES_DEFAULTS = {"target_ongoing_requests": 2, "upscale_delay_s": 30.0, "downscale_delay_s": 600.0}
OUR_WINDOWS = {"upscale_delay_s": 1.0, "downscale_delay_s": 15.0}
POLICIES = {
    "fixed-1": "one prefill and one decode replica",
    "fixed-3": "three of each",
    "serve": "Serve's default: calls that go through Serve, two a replica, 30 s up, 600 s down",
    "sequences-2": "Serve's rule, given the sequences of each replica: two a replica; 1 s up, 15 s down",
    "sequences-8": "the same, eight a replica",
    "ours": "queue time, busy time, KV blocks and inter-token time; 15 s down",
}


def settings_of(policy: str, model: Path) -> Settings:
    number = {"fixed-1": 1, "fixed-3": MOST_REPLICAS}.get(policy)
    bounds = {"min": 1, "max": MOST_REPLICAS}
    scaling = {"enabled": number is None, "prefill": bounds, "decode": bounds, "interval_s": 0.5}
    # What a good turn is, with something to spare.
    scaling |= {"target_queue_s": 1.0, "target_inter_token_s": 0.09, "down_window_s": 15.0, "session_keep_s": 30.0}
    return Settings.from_mapping(
        {
            "model": {"path": str(model), "dtype": "float32"},
            "engine": {"device": "cpu", "num_blocks": 2048, "max_num_batched_tokens": 256, "num_threads": 1},
            "gateway": {"port": 0, "drain_timeout_s": 1.0},
            "prefill": {"num_replicas": number or 1, "num_cpus": 0.2},
            "decode": {"num_replicas": number or 1, "num_cpus": 0.2},
            "autoscaling": scaling,
            "sessions": {"heartbeat_s": 0.5, "registry_ttl_s": 5.0},
            "telemetry": {"log_level": "INFO"},
        },
        {},
    )


def config_of(policy: str, settings: Settings) -> dict[str, Any]:
    """The application with paced engines, and the policy."""
    config = serve_config(settings, APP_NAME, IMPORT_PATH)
    application = config["applications"][0]
    if policy == "ours":
        return config
    del application["autoscaling_policy"]
    if policy.startswith("fixed"):
        return config
    options: dict[str, Any] = {"min_replicas": 1, "max_replicas": MOST_REPLICAS, "initial_replicas": 1}
    _, _, target = policy.partition("-")
    options |= {"target_ongoing_requests": int(target), **OUR_WINDOWS} if target else SERVES_DEFAULTS
    application["deployments"] = [{"name": name, "autoscaling_config": options} for name in ("prefill", "decode")]
    if target:
        application["autoscaling_policy"] = {
            "policy_function": "tests.bench.sequences_policy:SequencesPolicy",
            "policy_kwargs": {"settings": application["args"]},
        }
    return config


def prefer_those_that_serve() -> None:
    """What runs now goes before what starts later; a replica that has started catches up by itself (paced_app.py)."""
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess, ProcessLookupError):
            set_niceness(process.pid, 0)


class ReplicaCount:
    """Counts replicas while the load runs."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self.most = {"prefill": 0, "decode": 0}
        self.num_changes = 0

    async def watch(self) -> None:
        """Until it is cancelled."""
        last_s, last = time.perf_counter(), None
        while True:
            await asyncio.sleep(0.5)
            deployments = (await asyncio.to_thread(serve.status)).applications[APP_NAME].deployments
            now_s, running = time.perf_counter(), []
            for name in self.most:
                self.seconds += sum(deployments[name].replica_states.values()) * (now_s - last_s)
                running.append(deployments[name].replica_states.get("RUNNING", 0))
                self.most[name] = max(self.most[name], running[-1])
            self.num_changes += last is not None and running != last
            last_s, last = now_s, running


async def measure(target: str, seed: int) -> dict[str, Any]:
    """One run of the load."""
    async with AsyncClient(target) as client:
        for num_tokens in (3, 400, 400):  # connections are there, and speeds have been measured
            async for _ in client.generate([100] * num_tokens, sampling=SamplingParams(max_tokens=4)):
                pass
        await asyncio.sleep(WARM_UP_S)
        load, replicas = Load(client, seed), ReplicaCount()
        watching = asyncio.create_task(replicas.watch())
        await load.run()
        watching.cancel()
    return {
        **figures(load.turns),
        "goodput_turns_per_s": round(sum(turn.is_good for turn in load.turns) / LENGTH_S, 3),
        "failures": dict(Counter(turn.failure for turn in load.turns if turn.failure)),
        "replica_seconds": round(replicas.seconds, 1),
        "most_replicas": replicas.most,
        "num_changes": replicas.num_changes,
        "kinds": {
            kind.name: figures([turn for turn in load.turns if turn.kind == kind.name])
            for kind in (CHAT, LONG_PROMPT, LONG_REPLY)
        },
    }


def figures(turns: Sequence[Turn]) -> dict[str, Any]:
    """Of some turns."""
    first_ms = [turn.first_token_s * 1e3 for turn in turns if turn.first_token_s is not None]
    between_ms = [turn.inter_token_s * 1e3 for turn in turns if turn.inter_token_s is not None]
    return {
        "num_turns": len(turns),
        "num_failed": len(turns) - len(first_ms),
        "num_refusals": sum(turn.num_refusals for turn in turns),
        "num_good": sum(turn.is_good for turn in turns),
        "ttft_p50_ms": round(statistics.median(first_ms)),
        "ttft_p90_ms": round(statistics.quantiles(first_ms, n=10)[-1]),
        "inter_token_p90_ms": round(statistics.quantiles(between_ms, n=10)[-1]),
    }


def run(policy: str, seed: int) -> dict[str, Any]:
    """The application with one policy, on this machine."""
    began = os.getloadavg()[0]
    with (
        tempfile.TemporaryDirectory() as folder,
        session_store(settings_of(policy, write_small_checkpoint(Path(folder)))) as settings,
        local_ray(settings),
        deployed(settings, config_of(policy, settings)) as gateway,
    ):
        prefer_those_that_serve()
        row = asyncio.run(measure(gateway.address.remote().result(), seed))
    machine = f"{os.cpu_count()} cores, {platform.processor() or platform.machine()}"
    about = {"policy": policy, "seed": seed, "what": POLICIES[policy], "machine": machine, "commit": commit()}
    return {**about, "load_before": round(began, 2), **row}


def read() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else []
    return rows


def write(row: dict[str, Any]) -> None:
    """One line a policy and seed, in the order of POLICIES."""
    rows = {(each["policy"], each["seed"]): each for each in read()} | {(row["policy"], row["seed"]): row}
    order = sorted(rows, key=lambda key: (list(POLICIES).index(key[0]), key[1]))
    RESULTS.write_text("[\n" + ",\n".join(json.dumps(rows[key]) for key in order) + "\n]\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; of several runs of a policy the median, least and most in brackets."""
    names = (CHAT.name, LONG_PROMPT.name, LONG_REPLY.name)
    kinds = ", ".join(names)
    lines = [
        f"| policy | runs | good turns/s | good, %: {kinds} | TTFT p90, s: {kinds} | replica-seconds | failed |",
        "|---|---|---|---|---|---|---|",
    ]
    for policy in POLICIES:
        runs = [row for row in rows if row["policy"] == policy]
        if not runs:
            continue
        of_kind = {name: [row["kinds"][name] for row in runs] for name in names}
        good = [
            100 * statistics.median(each["num_good"] / each["num_turns"] for each in of_kind[name]) for name in names
        ]
        first = [statistics.median(each["ttft_p90_ms"] for each in of_kind[name]) / 1e3 for name in names]
        lines.append(
            f"| {policy} | {len(runs)} | {spread([row['goodput_turns_per_s'] for row in runs], 2)} "
            f"| {' / '.join(f'{each:.0f}' for each in good)} | {' / '.join(f'{each:.1f}' for each in first)} "
            f"| {spread([row['replica_seconds'] for row in runs], 0)} | {sum(row['num_failed'] for row in runs)} |"
        )
    return "\n".join(lines)


def spread(values: Sequence[float], digits: int) -> str:
    """Median, and the range if there is one."""
    median = f"{statistics.median(values):.{digits}f}"
    return f"{median} ({min(values):.{digits}f}-{max(values):.{digits}f})" if len(values) > 1 else median


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", choices=POLICIES)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    arguments = parser.parse_args()
    if arguments.policy:
        row = run(arguments.policy, arguments.seed)
        write(row)
        print(row)
    if arguments.table:
        print(table(read()))


if __name__ == "__main__":
    main()
