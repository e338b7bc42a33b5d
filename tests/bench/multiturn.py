"""The cluster in a closed loop of conversations: what reuse, affinity, hand-over and the framework cost and bring.

    make bench        or        python -m tests.bench.multiturn [--quick] [--only PART ...]

One run on one machine, the demo model, one thread a replica; ratios inside the run are what counts. Parts:

    reuse      later turns after 2,000 tokens of history: reuse off | one replica | 2 prefill + 2 decode
    routing    eight sessions on two replicas of each kind: affine | random | random, fetching from the holder. Three
               times in turn, medians. Users go on talking about 2,400 tokens of their own, four at a time, 60 new
               tokens and a reply of 24 a turn. The two decode pools hold the sessions' KV once, and 50 % more: a
               router that sends a session to both replicas has no room for all of them
    isolation  gaps between tokens of running replies, idle and while prompts of 1,000 tokens arrive
    handover   1,000 tokens computed by prefill: until decode has its blocks and its first own token
    streams    tokens a second through one gateway process, 64 streams

Writes tests/bench/results/multiturn-cpu.json and prints the README's table.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

# isort: split
from tests.cluster.ray_session import local_ray

# isort: split
from services.client import AsyncClient
from services.common.sampling import SamplingParams
from services.common.settings import EngineSettings
from tests.bench.commit import commit
from tests.bench.gateway_streams import Streams, measure
from tests.bench.turns import Load, Run, TurnSample, one_turn, percentiles, run, summary, tokens_per_word
from tests.cluster.serving import Serving, serving

RESULT = Path(__file__).parent / "results" / "multiturn-cpu.json"
HISTORY_TOKENS = 2000
ROUTED_HISTORY_TOKENS = 2400
PROMPT_TOKENS = 1000
ROOM = 1.5  # of the decode pools, beside what all sessions of `routing` come to
_ENGINE = {"num_blocks": 3072, "max_num_batched_tokens": 512}
_WITHOUT_PREFILL = {"enabled": False}

Results = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a fraction of the turns: to see that it works")
    parser.add_argument("--only", nargs="+", choices=sorted(_PARTS), help="some parts; what others wrote stays")
    args = parser.parse_args()
    results: Results = json.loads(RESULT.read_text())["parts"] if args.only and RESULT.exists() else {}
    with local_ray():
        for name in args.only or _PARTS:
            results[name] = _PARTS[name](args.quick) | {"load_average": os.getloadavg()}
            print(f"{name}: done", flush=True)
    document = {
        "command": "python -m tests.bench.multiturn" + (" --quick" if args.quick else ""),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "commit": commit(),
        "parts": results,
    }
    RESULT.write_text(json.dumps(document, indent=1) + "\n")
    print(table(results))


def reuse(quick: bool) -> Results:
    """The same conversations, one at a time, on three clusters."""
    load = Load(2 if quick else 4, 3 if quick else 5, 1, HISTORY_TOKENS, 100, 32)
    clusters: dict[str, Callable[[], Run]] = {
        "reuse off": lambda: _on(2, 2, load, decode={"reuse_history": False}),
        "one replica": lambda: _on(0, 1, load, prefill=_WITHOUT_PREFILL),
        "disaggregated": lambda: _on(2, 2, load),
    }
    return {name: summary(measured()) for name, measured in clusters.items()}


def routing(quick: bool) -> Results:
    """The same conversations, four at a time, on two prefill and two decode replicas, in pools that they fill."""
    load = Load(8, 3 if quick else 6, 4, ROUTED_HISTORY_TOKENS, 60, 24)
    num_tokens = load.num_sessions * load.num_session_tokens
    pools = {"num_blocks": math.ceil(ROOM * num_tokens / 2 / EngineSettings().block_size)}
    policies: dict[str, dict[str, Any]] = {
        "affine": {},
        "random": {"routing": {"policy": "random"}, "decode": {"fetch_history": False}},
        "random + fetch": {"routing": {"policy": "random"}},
    }
    runs: dict[str, list[Results]] = {name: [] for name in policies}
    for _ in range(1 if quick else 3):
        for name, changes in policies.items():
            runs[name].append(summary(_on(2, 2, load, engine=pools, **changes)))
    rates = {name: sorted(each["output_tokens_per_s"] for each in of) for name, of in runs.items()}
    return {
        "pools": pools | {"session_tokens_at_the_end": num_tokens},
        "output_tokens_per_s": {name: statistics.median(of) for name, of in rates.items()},
        "lowest_and_highest": {name: (of[0], of[-1]) for name, of in rates.items()},
        "runs": runs,
    }


def isolation(quick: bool) -> Results:
    """Gaps between tokens of four replies, alone and with prompts arriving, on 1 + 1 replicas and on one alone."""
    num_tokens = 100 if quick else 300
    apart = _with(1, 1, lambda client: _gaps(client, num_tokens), decode={"remote_prefill": "always"})
    together = _with(0, 1, lambda client: _gaps(client, num_tokens), prefill=_WITHOUT_PREFILL)
    return {"prefill apart": apart, "prefill and decode together": together}


def handover(quick: bool) -> Results:
    """The gap between the token of the prefill replica and the first of decode's own: blocks fetched, one step."""

    async def measured(client: AsyncClient) -> Results:
        words = await tokens_per_word(client)
        turns = [
            await one_turn(client, _prompt(seed, words), SamplingParams(temperature=0.0, max_tokens=4), 1)
            for seed in range(3 if quick else 15)
        ][1:]
        return {
            "prefill_ms": percentiles(turn.finished.timings.prefill_ms for turn in turns),
            "transfer_ms": percentiles(turn.finished.timings.transfer_ms for turn in turns),
            "transfer_bytes": percentiles(turn.finished.timings.transfer_bytes for turn in turns),
            "handover_and_step_ms": percentiles(turn.gaps_ms[0] for turn in turns),
            "step_ms": percentiles(turn.gaps_ms[1] for turn in turns),
            "share_of_cold_prefill": round(
                statistics.median(turn.gaps_ms[0] / turn.finished.timings.prefill_ms for turn in turns), 4
            ),
        }

    return _with(1, 1, measured, decode={"remote_prefill": "always"})


def streams(quick: bool) -> Results:
    """As fast as tokens are taken, and at 50 a second each."""
    num_tokens = 100 if quick else 500
    return {
        "as fast as taken": measure(Streams(64, num_tokens)),
        "20 ms a token": measure(Streams(64, num_tokens // 4, 0.02)),
    }


async def _gaps(client: AsyncClient, num_tokens: int) -> Results:
    words = await tokens_per_word(client)
    await one_turn(client, _prompt(0, words), SamplingParams(temperature=0.0, max_tokens=4), 1)  # connections
    idle = await _replies(client, num_tokens)
    arriving = asyncio.create_task(_prompts(client, words))
    busy = await _replies(client, num_tokens)
    arriving.cancel()
    prompts = (await asyncio.gather(arriving, return_exceptions=True))[0]
    gaps = {name: percentiles(gap for turn in turns for gap in turn.gaps_ms) for name, turns in
            (("idle", idle), ("prompts arrive", busy))}  # fmt: skip
    assert not isinstance(prompts, Exception), prompts
    return {"itl_ms": gaps, "p99_ratio": round(gaps["prompts arrive"]["p99"] / gaps["idle"]["p99"], 3)}


async def _replies(client: AsyncClient, num_tokens: int) -> list[TurnSample]:
    sampling = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    return list(await asyncio.gather(*(one_turn(client, f"Tell story {i}.", sampling, 1) for i in range(4))))


async def _prompts(client: AsyncClient, words: float) -> None:
    """One after another, until cancelled."""
    seed = 1000
    while True:
        seed += 1
        await one_turn(client, _prompt(seed, words), SamplingParams(temperature=0.0, max_tokens=1), 1)


def _prompt(seed: int, words: float) -> str:
    return Load(1, 1, 1, PROMPT_TOKENS, 0, 0).messages(seed, words)[0][0]


def _on(num_prefill: int, num_decode: int, load: Load, **changes: dict[str, Any]) -> Run:
    """The load on a cluster of its own, after a few turns that make connections and measure rates."""

    async def measured(client: AsyncClient) -> Run:
        await run(client, Load(4, 2, 2, 300, 50, 8), seed=1)
        return await run(client, load, seed=2)

    result: Run = _with(num_prefill, num_decode, measured, **changes)
    return result


def _with(num_prefill: int, num_decode: int, measured: Any, **changes: dict[str, Any]) -> Any:
    async def on(started: Serving) -> Any:
        async with AsyncClient(started.target) as client:
            return await measured(client)

    changes["engine"] = _ENGINE | changes.get("engine", {})
    with serving(max(num_prefill, 1), num_decode, **changes) as started:
        return asyncio.run(on(started))


def table(results: Results) -> str:
    """The README's."""
    lines = ["| | measured | target |", "|---|---|---|"]
    if "reuse" in results:
        rows = {name: row for name, row in results["reuse"].items() if name != "load_average"}
        off = rows["reuse off"]["ttft_ms_later_turns"]["p50"]
        texts = [
            f"{name} {row['ttft_ms_later_turns']['p50']:.0f} ms" for name, row in rows.items() if name != "load_average"
        ]
        best = rows["disaggregated"]
        lines += [
            f"| first token of later turns, {HISTORY_TOKENS:,} tokens of history: {', '.join(texts)} | "
            f"{best['ttft_ms_later_turns']['p50'] / off:.0%} of reuse off | ≤ 20 % |",
            f"| framework's share of a turn's first token, p50 | {best['overhead_ms']['p50']:.1f} ms | ≤ 15 ms |",
        ]
    if "routing" in results:
        rate = results["routing"]["output_tokens_per_s"]
        lines += [
            f"| output tokens/s: affine {rate['affine']:.0f}, random {rate['random']:.0f} | "
            f"{rate['affine'] / rate['random']:.2f} times | ≥ 1.4 times |",
            f"| random routing that fetches from the holder {rate['random + fetch']:.0f} | "
            f"{rate['random + fetch'] / rate['affine']:.0%} of affine | ≥ 85 % |",
        ]
    if "isolation" in results:
        apart, together = (results["isolation"][name] for name in ("prefill apart", "prefill and decode together"))
        idle_ms, busy_ms = (apart["itl_ms"][name]["p99"] for name in ("idle", "prompts arrive"))
        lines.append(
            f"| gap between tokens, p99, while 1,000-token prompts arrive: {busy_ms:.0f} ms, idle {idle_ms:.0f} ms | "
            f"{apart['p99_ratio']:.2f} times"
            f" ({together['p99_ratio']:.2f} on one replica) | ≤ 2 times |"
        )
    if "handover" in results:
        row = results["handover"]
        lines.append(
            f"| handing over 1,000 tokens ({row['transfer_bytes']['p50'] / 1e6:.1f} MB) and the first decode step: "
            f"{row['handover_and_step_ms']['p50']:.1f} ms; their prefill {row['prefill_ms']['p50']:.0f} ms | "
            f"{row['share_of_cold_prefill']:.1%} | ≤ 5 % |"
        )
    if "streams" in results:
        rate = results["streams"]["as fast as taken"]["tokens_per_s"]
        lines.append(f"| tokens/s through one gateway process, 64 streams | {rate:,.0f} | ≥ 3,000 |")
    return "\n".join(lines)


_PARTS: dict[str, Callable[[bool], Results]] = {
    "reuse": reuse,
    "routing": routing,
    "isolation": isolation,
    "handover": handover,
    "streams": streams,
}

if __name__ == "__main__":
    main()
