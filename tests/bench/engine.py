"""How close the whole engine comes to what the card can do, and to transformers on the same weights.

    python -m tests.bench.engine [--only steps prefill turns latency kv peer experts compiled] [--out FOLDER]

Measures the card's copy and matrix rates first. The model has the shape of a published config.json (DeepSeek-V2-Lite;
DeepSeek-V3 with four layers) and random weights. Contexts are not computed: their blocks are reserved, declared arrived
and filled with random numbers. Every row is a median of engine steps on the host's clock, scheduling, sampling and
reading the tokens included, beside its limit: bytes of the weights and latents that a step has to read over the copy
rate, or operations over the matrix rate. The experts that a step reads are counted, not assumed. Before anything is
timed the graphs' logits are compared with those of the same step launched kernel by kernel. Writes
tests/bench/results/engine-CARD.json after each row.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from services.engine.engine import Engine
from tests.bench.commit import commit
from tests.bench.engine_peer import Peer
from tests.bench.engine_steps import (
    CONFIGS,
    check,
    drain,
    experts_touched,
    first_token_ms,
    gaps_ms,
    history_flops,
    load,
    prefill_flops,
    prompt,
    step_bytes,
    step_ms,
)
from tests.bench.kernels import RESULTS, Rates, measure_rates

# In this order: a part may use what one before it has loaded.
PARTS = ("steps", "prefill", "turns", "latency", "kv", "peer", "experts", "compiled")


@dataclass(frozen=True)
class Row:
    """One figure. fraction: of the limit, or the ratio to what it is compared with; goal: what it should reach."""

    what: str
    value: float
    unit: str
    limit: float | None
    fraction: float
    goal: float
    note: str = ""

    @property
    def is_reached(self) -> bool:
        return self.fraction >= self.goal


class Bench:
    """The parts, each yielding rows."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates
        self._engine: Engine | None = None
        self._weights: Engine | None = None  # the last 16B engine, whatever its cache
        self._peer: Peer | None = None
        self._rate_of: dict[int, float] = {}  # tokens/s at 1024 tokens of context, by batch

    def lite(self) -> Engine:
        """The 16B model in bf16; one for all parts that want it."""
        if self._engine is None:
            self._engine = load("deepseek-v2-lite", max_num_sequences=256, max_num_batched_tokens=8192)
            check(self._engine)
            self._weights = self._engine
        return self._engine

    def forget(self) -> None:
        self._engine = self._weights = None

    def decode(self, engine: Engine, name: str, batch: int, context: int, goal: float, **kwargs: Any) -> Row:
        ms = step_ms(engine, batch, context, **kwargs)
        touched = experts_touched(engine)
        drain(engine)
        limit_ms = step_bytes(engine, batch, context, touched) / self.rates.copy * 1e3
        note = f"{ms:.2f} ms a step, limit {limit_ms:.2f}; {touched:.0f} experts a layer"
        what = f"{name}, batch {batch}, {context} context"
        return Row(what, batch / ms * 1e3, "tokens/s", batch / limit_ms * 1e3, limit_ms / ms, goal, note)

    def steps(self) -> Iterator[Row]:
        for batch, context, goal in ((1, 1024, 0.6), (32, 1024, 0.6), (64, 4096, 0.65), (256, 2048, 0.6)):
            row = self.decode(self.lite(), "16B decode", batch, context, goal)
            if context == 1024:
                self._rate_of[batch] = row.value
            yield row

    def prefill(self) -> Iterator[Row]:
        engine = self.lite()
        ms = statistics.median([first_token_ms(engine, prompt(engine, 8192)) for _ in range(4)][1:])
        limit_ms = prefill_flops(engine, 8192) / self.rates.bfloat16 * 1e3
        yield Row("16B prefill of 8192 tokens", ms, "ms", limit_ms, limit_ms / ms, 0.45)

    def turns(self) -> Iterator[Row]:
        engine = self.lite()
        cold, warm = [], []
        for _ in range(4):
            history = prompt(engine, 16_384)
            first_token_ms(engine, history)
            turn = history + prompt(engine, 200)
            warm.append(first_token_ms(engine, turn))
            cold.append(first_token_ms(engine, prompt(engine, len(turn))))
        reuse, afresh = statistics.median(warm[1:]), statistics.median(cold[1:])
        # 200 tokens choose every expert; the history's keys are expanded, and attended to, besides.
        read_s = step_bytes(engine, 0, 0, engine.config.n_routed_experts) / self.rates.copy
        limit = 1e3 * (read_s + history_flops(engine, 200, 16_384) / self.rates.bfloat16)
        limit_afresh = 1e3 * prefill_flops(engine, 16_584) / self.rates.bfloat16
        note = f"afresh {afresh:.1f} ms; both at their limits: 1/{limit_afresh / limit:.1f}"
        yield Row("16B, first token of 200 new after 16384", reuse, "ms", limit, afresh / reuse, 15, note)

    def latency(self) -> Iterator[Row]:
        """Sequences decode while prompts of 8k tokens arrive, one after another."""
        engine = self.lite()
        config = engine.scheduler.config
        for budget in (512, 1024, 2048):
            engine.scheduler.config = dataclasses.replace(config, max_num_batched_tokens=budget)
            gaps = gaps_ms(engine)
            engine.scheduler.config = config
            p50, p99 = statistics.median(gaps), statistics.quantiles(gaps, n=100)[98]
            what = f"16B, 32 decode while 8k prompts arrive, {budget} tokens a step: p99 between tokens"
            note = f"p50 {p50:.1f} ms of {len(gaps)} gaps; goal: p99 at most twice that"
            yield Row(what, p99, "ms", None, 2 * p50 / p99, 1.0, note)

    def kv(self) -> Iterator[Row]:
        """Two sequences share a context each: 64 contexts of 32k in bf16 would not fit beside the weights."""
        plain = self.decode(self.lite(), "16B, bf16 KV", 64, 32_768, 0.6, num_shared=2, steps=15)
        self.forget()
        engine = load(
            "deepseek-v2-lite", kv_dtype="fp8", max_num_sequences=64, max_num_batched_tokens=2048, memory_fraction=0.92
        )
        self._weights = engine
        packed = self.decode(engine, "16B, FP8 KV", 64, 32_768, 0.6, num_shared=2, steps=15)
        yield from (plain, packed)
        ratio = packed.value / plain.value
        assert plain.limit is not None
        assert packed.limit is not None
        note = f"by the limits {packed.limit / plain.limit:.2f}"
        yield Row("16B, FP8 KV against bf16 KV", ratio, "x", None, ratio, 1.5, note)

    def peer(self) -> Iterator[Row]:
        """transformers with a static cache, launched one by one and as a CUDA graph: the faster one."""
        for batch in (1, 32):
            if batch not in self._rate_of:
                self._rate_of[batch] = self.decode(self.lite(), "16B decode", batch, 1024, 0.6).value
        engine = self._weights or self.lite()
        self._peer = Peer(engine, CONFIGS / "deepseek-v2-lite.json")
        yield from self._against(self._peer)

    def compiled(self) -> Iterator[Row]:
        """The same with torch.compile."""
        if self._peer is None:
            list(self.peer())
        assert self._peer is not None
        self._peer.compile()
        yield from self._against(self._peer)

    def _against(self, peer: Peer) -> Iterator[Row]:
        for batch, goal in ((1, 4.0), (32, 10.0)):
            rate, how = peer.tokens_per_s(batch, 1024)
            ratio = self._rate_of[batch] / rate if rate else float("nan")
            note = f"{self._rate_of[batch]:.0f} against {rate:.0f} tokens/s; {how}"
            yield Row(f"16B decode, batch {batch}, against transformers", ratio, "x", None, ratio, goal, note)

    def experts(self) -> Iterator[Row]:
        self.forget()
        layers = {"num_hidden_layers": 4, "first_k_dense_replace": 1, "num_nextn_predict_layers": 0}
        engine = load(
            "deepseek-v3", layers, max_num_sequences=128, max_num_batched_tokens=2048, kv_cache_bytes=2 * 2**30
        )
        check(engine)
        for batch in (1, 32, 128):
            yield self.decode(engine, "V3 shape, 4 layers, FP8", batch, 1024, 0.6)


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rates = measure_rates()
    print(f"copy {rates.copy / 1e12:.2f} TB/s; TFLOP/s: {rates.bfloat16 / 1e12:.0f} bf16, {rates.fp8 / 1e12:.0f} fp8")
    bench = Bench(rates)
    for part in sorted(arguments.only, key=PARTS.index):
        run_part: Callable[[], Iterator[Row]] = getattr(bench, part)
        rows = []
        for row in run_part():
            rows.append(row)
            limit = f"limit {row.limit:9.1f}" if row.limit is not None else " " * 15
            verdict = f"goal {row.goal:<5} {'reached' if row.is_reached else 'NOT reached'}  {row.note}"
            print(f"{row.what:78} {row.value:9.1f} {row.unit:9} {limit}  {row.fraction:6.3f} {verdict}", flush=True)
            write(arguments.out, part, rates, rows)


def write(folder: Path, part: str, rates: Rates, rows: list[Row]) -> None:
    """The part's rows so far; what earlier runs found out about other parts stays."""
    card = torch.cuda.get_device_name()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"engine-{card.lower().replace(' ', '-')}.json"
    parts = json.loads(path.read_text())["parts"] if path.exists() else {}
    parts[part] = {
        "commit": commit(),
        "torch": torch.__version__,
        "rates": asdict(rates),
        "rows": [asdict(row) | {"is_reached": row.is_reached} for row in rows],
    }
    ordered = {name: parts[name] for name in PARTS if name in parts}
    result = {"card": card, "command": "python -m tests.bench.engine", "parts": ordered}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
