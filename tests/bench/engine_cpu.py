"""CPU speed of the engine beside transformers: same random model, same threads, one run, ratios.

    make bench          or        python -m tests.bench.engine_cpu [--threads N]

The model: hidden 512, 4 layers, 8 heads, latent 512 + 64, 16 experts top-4, vocabulary 49,152, bf16 (77M parameters).
Measures prefill of 512 tokens, decode at batch 1 and 8 after prompts of 128 to 2,048 tokens, and the first token of a
second turn after 2,000 tokens of history, against computing it afresh. Medians; the load average is recorded, since
another busy process makes PyTorch's threads collapse. Writes tests/bench/results/engine_cpu.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from services.common.sampling import SamplingParams
from services.common.settings import EngineSettings, ModelSettings
from services.engine.engine import Engine, EngineRequest
from services.engine.loading import load_engine
from tests.bench.commit import commit

RESULT = Path(__file__).parent / "results" / "engine_cpu.json"
CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "vocab_size": 49152, "hidden_size": 512,
    "intermediate_size": 1536, "moe_intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 8,
    "num_key_value_heads": 8, "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 64, "qk_rope_head_dim": 64,
    "v_head_dim": 64, "n_routed_experts": 16, "n_shared_experts": 1, "num_experts_per_tok": 4, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "moe_layer_freq": 1, "norm_topk_prob": True, "scoring_func": "sigmoid",
    "topk_method": "noaux_tc", "routed_scaling_factor": 1.0, "max_position_embeddings": 8192, "rope_theta": 10000.0,
    "rope_scaling": None, "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "hidden_act": "silu", "attention_bias": False, "eos_token_id": 1, "bos_token_id": 0,
}  # fmt: skip
DECODE_TOKENS = 32
CONTEXTS = (128, 512, 1024, 2048)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        peer = _make_model(Path(folder))
        engine = load_engine(
            ModelSettings(path=folder, dtype="bfloat16"),
            EngineSettings(device="cpu", num_blocks=2048, max_num_batched_tokens=4096, num_threads=args.threads),
        )
    rows = _measure(engine, peer, args.repeats)
    result = {
        "command": f"python -m tests.bench.engine_cpu --threads {args.threads}",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores, {args.threads} thread(s)",
        "torch": torch.__version__,
        "commit": commit(),
        "load_average": os.getloadavg(),
        "rows": rows,
    }
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['machine']}, torch {torch.__version__}, load {os.getloadavg()[0]:.1f}")
    for row in rows:
        print(f"{row['what']:44s} ours {row['ours']:9.2f}  {row['beside']} {row['peer']:9.2f} {row['unit']}"
              f"   ratio {row['ratio']:.2f}")  # fmt: skip


def _make_model(folder: Path) -> Any:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    torch.manual_seed(0)
    peer = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), attn_implementation="sdpa")
    peer = peer.to(torch.bfloat16).eval()
    for name, buffer in peer.named_buffers():
        if name.endswith("e_score_correction_bias"):
            module = peer.get_submodule(name.rsplit(".", 1)[0])
            module.e_score_correction_bias = buffer.float()
    with tempfile.TemporaryDirectory() as saved:
        peer.save_pretrained(saved)  # writes one tensor an expert, as the hub has them
        next(Path(saved).glob("model.safetensors")).rename(folder / "model.safetensors")
    return peer


@torch.inference_mode()
def _measure(engine: Engine, peer: Any, repeats: int) -> list[dict[str, Any]]:
    rows = []

    def add(what: str, unit: str, ours: Callable[[], float], other: Callable[[], float], beside: str) -> None:
        ours(), other()
        pairs = [(ours(), other()) for _ in range(repeats)]  # interleaved, so that both see the same machine
        mine, theirs = (statistics.median(column) for column in zip(*pairs, strict=True))
        ratio = theirs / mine if unit == "ms" else mine / theirs
        rows.append({"what": what, "unit": unit, "ours": mine, "peer": theirs, "beside": beside, "ratio": ratio})

    hf = "transformers"
    add("prefill of 512 tokens", "ms", lambda: _first_token_ms(engine, _prompt(512)),
        lambda: _peer_prefill_ms(peer, 512), hf)  # fmt: skip
    for context, batch in itertools.product(CONTEXTS, (1, 8)):
        add(f"decode, batch {batch}, context {context:,}", "tokens/s", partial(_decode_rate, engine, batch, context),
            partial(_peer_decode_rate, peer, batch, context), hf)  # fmt: skip
    add("first token, 20 new after 2,000 of history", "ms", lambda: _second_turn_ms(engine),
        lambda: _first_token_ms(engine, _prompt(2020)), "ours afresh")  # fmt: skip
    return rows


_seed = iter(range(10**9))


def _prompt(length: int) -> list[int]:
    generator = torch.Generator().manual_seed(next(_seed))  # never the same twice: nothing is found in the cache
    return torch.randint(3, CONFIG["vocab_size"], (length,), generator=generator).tolist()


def _greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def _run(engine: Engine) -> None:
    while engine.has_work:
        engine.step()


def _first_token_ms(engine: Engine, prompt: list[int]) -> float:
    started = time.perf_counter()
    engine.add(EngineRequest("first", prompt, _greedy(1)))
    _run(engine)
    return (time.perf_counter() - started) * 1e3


def _second_turn_ms(engine: Engine) -> float:
    history = _prompt(2000)
    _first_token_ms(engine, history)
    return _first_token_ms(engine, history + _prompt(20))


def _decode_rate(engine: Engine, batch: int, context: int) -> float:
    for index in range(batch):
        engine.add(EngineRequest(f"decode-{index}", _prompt(context), _greedy(DECODE_TOKENS + 1)))
    while engine.scheduler.num_waiting or any(live.seq.num_generated_tokens < 1 for live in engine._live.values()):
        engine.step()
    started = time.perf_counter()
    count = 0
    while engine.has_work:
        count += len(engine.step())
    return count / (time.perf_counter() - started)


def _peer_prefill_ms(peer: Any, length: int) -> float:
    ids = torch.tensor([_prompt(length)])
    started = time.perf_counter()
    peer.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=2)
    return (time.perf_counter() - started) * 1e3


def _peer_decode_rate(peer: Any, batch: int, context: int) -> float:
    ids = torch.tensor([_prompt(context) for _ in range(batch)])

    def seconds(num_tokens: int) -> float:
        started = time.perf_counter()
        peer.generate(ids, max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False, pad_token_id=2)
        return time.perf_counter() - started

    return batch * DECODE_TOKENS / (seconds(DECODE_TOKENS + 1) - seconds(1))


if __name__ == "__main__":
    main()
