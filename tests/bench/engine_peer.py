"""transformers on the engine's own weights: no second copy of them, so that both run side by side on one card."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

from services.engine.engine import Engine
from services.engine.model import DeepseekForCausalLM

_STEPS = 20


class Peer:
    """The same model by transformers: static cache, experts by grouped products."""

    def __init__(self, engine: Engine, config: Path) -> None:
        self._model = peer_of(engine._runner.model, json.loads(config.read_text()), engine.kv_cache.pool.device)
        self._is_compiled = False

    def compile(self) -> None:
        """From now on with torch.compile, a layer at a time: two kinds to compile instead of all of them."""
        for layer in self._model.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=False)
        self._is_compiled = True

    @torch.inference_mode()
    def tokens_per_s(self, batch: int, context: int) -> tuple[float, str]:
        """Rate of decode steps over a cache of `context` tokens, and how they were run: the faster way that works."""
        results = [(0.0, "nothing worked")]
        for captures in (False, True):
            how = "static cache" + ", torch.compile" * self._is_compiled + ", CUDA graph" * captures
            try:
                results.append((batch / self._step_s(batch, context, captures=captures), how))
            except Exception as error:
                print(f"transformers, {how}: {type(error).__name__}: {str(error)[:200]}", flush=True)
        return max(results)

    def _step_s(self, batch: int, context: int, *, captures: bool) -> float:
        device = self._model.device
        cache = StaticCache(config=self._model.config, max_cache_len=context)
        ids = torch.randint(3, 1000, (batch, 1), device=device)
        position = torch.full((batch, 1), context // 2, device=device)

        def step() -> None:
            self._model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True, logits_to_keep=1)

        for _ in range(3):
            step()
        run: Callable[[], object] = step
        if captures:
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
            run = graph.replay
        times = []
        for _ in range(_STEPS):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        return statistics.median(times)


def peer_of(model: DeepseekForCausalLM, config: dict[str, Any], device: torch.device) -> Any:
    """transformers' model over views of `model`'s parameters."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(config))
        peer_config = AutoConfig.from_pretrained(folder)
    dtype = model.model.embed_tokens.weight.dtype
    with torch.device("meta"):
        peer = AutoModelForCausalLM.from_config(peer_config, attn_implementation="sdpa", dtype=dtype)
    peer.set_experts_implementation("grouped_mm")
    views = model.checkpoint_views()
    stacked = {name + "_proj": parameter.data for name, parameter in model.named_parameters() if ".experts." in name}
    state = {name: views[name] if name in views else stacked[name] for name, _ in peer.named_parameters()}
    peer.load_state_dict(state, assign=True, strict=False)
    peer.model.rotary_emb = type(peer.model.rotary_emb)(peer_config).to(device)
    left = [name for name, tensor in (*peer.named_parameters(), *peer.named_buffers()) if tensor.is_meta]
    assert not left, left
    return peer.eval().requires_grad_(False)
