"""Weights kept in FP8 and computed with: against DeepSeek's own block-scaled product.

`ref_w8a8_fp32.safetensors` holds logits of the v3_fp8 checkpoint computed through DeepSeek's fp8_gemm kernel.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import load_file

from services.common.sampling import SamplingParams
from services.engine.block_pool import BlockPool
from services.engine.config import ModelConfig
from services.engine.engine import Engine, EngineRequest
from services.engine.kv_cache import KVCache, KVLayout
from services.engine.model import DeepseekForCausalLM
from services.engine.runner import Runner
from services.engine.scheduler import Scheduler, SchedulerConfig
from services.engine.weights import load_weights

CHECKPOINT = Path(__file__).parent.parent / "data" / "checkpoints" / "v3_fp8"


def _engine() -> Engine:
    config = ModelConfig.from_folder(CHECKPOINT)
    cpu = torch.device("cpu")
    model = DeepseekForCausalLM(config, torch.float32, cpu, keeps_fp8=True)
    load_weights(model, CHECKPOINT)
    cache = KVCache(KVLayout.of(config, "absorb", "float32", 16), 16, cpu, torch.float32)
    scheduler = Scheduler(
        SchedulerConfig(max_num_batched_tokens=64, max_num_sequences=4, max_seq_len=256, max_num_waiting=4),
        BlockPool(16, 16),
    )
    return Engine(Runner(model, cache, 256, cpu), scheduler, config.eos_token_ids)


def test_fp8_weights_give_the_logits_of_deepseeks_kernel() -> None:
    engine = _engine()
    prompts = json.loads((CHECKPOINT / "ref.json").read_text())["prompts"]
    reference = load_file(CHECKPOINT / "ref_w8a8_fp32.safetensors")
    errors = []
    for index in range(3):
        rows: list[torch.Tensor] = []
        sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
        engine.add(
            EngineRequest(
                "prompt",
                prompts[index],
                sampling,
                on_prompt_logits=lambda _, part, rows=rows: rows.append(part.clone()),
            )
        )
        while engine.has_work:
            engine.step()
        wanted = reference[f"logits_w8a8_fp32.{index}"].double()
        errors.append((torch.cat(rows).double() - wanted).norm(dim=-1) / wanted.norm(dim=-1))
    # A row in which an e4m3 rounding falls the other way may differ more, so the median judges.
    assert float(torch.cat(errors).median()) <= 1e-5
