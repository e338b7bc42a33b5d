"""Engines of published shapes with random weights, steps of theirs, and what such steps have to read and compute."""

from __future__ import annotations

import gc
import itertools
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from services.common.sampling import SamplingParams
from services.common.settings import EngineSettings, ModelSettings
from services.engine import fused
from services.engine.engine import Engine, EngineRequest
from services.engine.fused_runner import FusedRunner
from services.engine.loading import load_engine
from tests.kernel_inputs import relative_error

CONFIGS = Path(__file__).parents[1] / "data/configs"
_seeds = itertools.count()


def _greedy(num_new: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, ignore_eos=True, max_tokens=num_new)


def load(name: str, changes: dict[str, Any] | None = None, kv_dtype: str = "auto", **settings: Any) -> Engine:
    """An engine with random weights and a pool full of random numbers."""
    gc.collect()
    torch.cuda.empty_cache()
    config = json.loads((CONFIGS / f"{name}.json").read_text()) | (changes or {})
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        started_s = time.perf_counter()
        engine = load_engine(
            ModelSettings(path=folder, load_format="dummy", kv_dtype=kv_dtype, max_seq_len=33_792),
            EngineSettings(device="cuda", block_size=64, **settings),
        )
    blocks = f"{engine.pool.num_blocks} blocks of 64, {torch.cuda.memory_reserved() / 2**30:.1f} GiB"
    print(f"{name}: loaded in {time.perf_counter() - started_s:.0f} s, {blocks}", flush=True)
    fill_with_noise(engine)
    return engine


def fill_with_noise(engine: Engine) -> None:
    """Latents as norms leave them; of FP8 records, through the cache's own packing."""
    layout, pool = engine.layout, engine.kv_cache.pool
    if layout.kv_dtype != "fp8":
        pool.normal_()
        return
    width = layout.kv_lora_rank + layout.qk_rope_head_dim
    blocks = torch.zeros(layout.block_size, dtype=torch.int64, device=pool.device)
    rows = torch.randn(layout.block_size, width, device=pool.device)
    for layer in range(layout.num_layers):
        engine.kv_cache.write(layer, blocks, torch.arange(layout.block_size, device=pool.device), rows)
    pool[1:] = pool[:1]


def prompt(engine: Engine, length: int, seed: int | None = None) -> list[int]:
    generator = torch.Generator().manual_seed(next(_seeds) if seed is None else seed)
    return torch.randint(3, engine.config.vocab_size, (length,), generator=generator).tolist()


def add_with_context(engine: Engine, tokens: list[int], num_computed: int, num_new: int) -> str:
    """A request whose first tokens need not be computed."""
    request_id = f"request-{next(_seeds)}"
    reservation = engine.reserve(tokens)
    engine.arrived(reservation, max(num_computed, reservation.num_computed_tokens))
    engine.add(EngineRequest(request_id, tokens, _greedy(num_new)), reservation)
    return request_id


def drain(engine: Engine) -> None:
    for request_id in list(engine._live):
        engine.abort(request_id)
    while engine.has_work:
        engine.step()


def step_ms(engine: Engine, batch: int, context: int, num_shared: int = 1, steps: int = 40) -> float:
    """Median time of a decode step. num_shared: sequences that have one context in common, in an order of its own.

    In the same order they would read the same blocks at the same time, and the L2 cache would serve all but one.
    """
    for index in range(batch):
        seed = 10**6 + index // num_shared + 1000 * context
        tokens = prompt(engine, context - 1, seed) + prompt(engine, 1)
        request_id = add_with_context(engine, tokens, context - 1, steps + 20)
        table = engine._live[request_id].seq.block_table
        first = (len(table) - 1) * (index % num_shared) // num_shared
        table[:-1] = table[first:-1] + table[:first]
    for _ in range(8):
        engine.step()
    times = []
    for _ in range(steps):
        started_s = time.perf_counter()
        outputs = engine.step()
        times.append(time.perf_counter() - started_s)
        assert len(outputs) == batch, (len(outputs), batch)
    return statistics.median(times) * 1e3


def experts_touched(engine: Engine) -> float:
    """Experts whose weights one step of the running sequences reads, a layer."""
    counts: list[int] = []
    choose = fused.choose_experts

    def counting(*arguments: Any) -> tuple[torch.Tensor, torch.Tensor]:
        ids, weights = choose(*arguments)
        counts.append(int(ids.unique().numel()))
        return ids, weights

    runner = engine._runner
    assert isinstance(runner, FusedRunner)
    graphs, runner._graphs, fused.choose_experts = runner._graphs, None, counting
    try:
        engine.step()
        engine.step()
    finally:
        runner._graphs, fused.choose_experts = graphs, choose
    return statistics.mean(counts)


def step_bytes(engine: Engine, batch: int, context: int, touched: float) -> float:
    """What a step has to read: all weights but the embedding's, of the experts the touched ones; and the latents."""
    runner = engine._runner
    num_bytes = 0.0
    for name, parameter in runner.model.named_parameters():
        size = parameter.numel() * parameter.element_size()
        if ".experts." in name:
            size = size * touched / engine.config.n_routed_experts
        if "embed_tokens" not in name:
            num_bytes += size
    return num_bytes + batch * context * engine.layout.bytes_per_token


def check(engine: Engine) -> None:
    """Logits of a step by a graph against the same step launched one by one."""
    for _ in range(5):
        add_with_context(engine, prompt(engine, 300), 299, 50)
    runner = engine._runner
    assert isinstance(runner, FusedRunner)
    chunks = engine.scheduler.schedule()
    by_graph = runner.run(chunks).clone()
    graphs, runner._graphs = runner._graphs, None
    error = relative_error(by_graph, runner.run(chunks))
    runner._graphs = graphs
    engine.scheduler.commit((), {})
    drain(engine)
    # Another number of rows may take another kernel of cuBLAS.
    assert error < 0.03, error
    print(f"logits of a graph against single launches: {error:.1e}", flush=True)


def first_token_ms(engine: Engine, tokens: list[int]) -> float:
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    engine.add(EngineRequest(f"first-{next(_seeds)}", tokens, _greedy(1)))
    while engine.has_work:
        engine.step()
    return (time.perf_counter() - started_s) * 1e3


def gaps_ms(engine: Engine, num_prompts: int = 12) -> list[float]:
    """Times between tokens of 32 sequences."""
    decoding = {add_with_context(engine, prompt(engine, 2048), 2047, 4000) for _ in range(32)}
    for _ in range(8):
        engine.step()
    gaps, prompts = [], [prompt(engine, 8192) for _ in range(num_prompts)]
    last_s = time.perf_counter()
    while prompts or engine.scheduler.num_waiting or any(name not in decoding for name in engine._live):
        if prompts and all(name in decoding for name in engine._live):
            request = EngineRequest(f"prompt-{next(_seeds)}", prompts.pop(), _greedy(1))
            engine.add(request)
        if any(output.request_id in decoding for output in engine.step()):
            now_s = time.perf_counter()
            gaps.append((now_s - last_s) * 1e3)
            last_s = now_s
    drain(engine)
    return gaps


def prefill_flops(engine: Engine, length: int) -> float:
    """Twice the weights that a token passes through, and attention over half the square; logits of one token."""
    config = engine.config
    active = 0.0
    for name, parameter in engine._runner.model.named_parameters():
        if ".experts." in name:
            active += parameter.numel() * config.num_experts_per_tok / config.n_routed_experts
        elif "embed_tokens" not in name and "lm_head" not in name:
            active += parameter.numel()
    width = config.qk_head_dim + config.v_head_dim
    attention = config.num_hidden_layers * config.num_attention_heads * width * length**2
    return 2 * active * length + attention


def history_flops(engine: Engine, num_new: int, history: int) -> float:
    """A history's latents to keys and values, and the attention of new tokens to them."""
    config = engine.config
    expanding = config.kv_lora_rank * (config.qk_nope_head_dim + config.v_head_dim)
    attending = num_new * (config.qk_head_dim + config.v_head_dim)
    return 2 * config.num_hidden_layers * config.num_attention_heads * history * (expanding + attending)
