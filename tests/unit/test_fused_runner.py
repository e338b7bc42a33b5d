"""The runner for GPUs, on a CPU through the kernels' references: the same replies as the plain one."""

from __future__ import annotations

import pytest
import torch

from services.common.sampling import SamplingParams
from services.engine.block_pool import BlockPool
from services.engine.config import ModelConfig
from services.engine.engine import Engine, EngineRequest
from services.engine.fused_runner import FusedRunner
from services.engine.kernels.draw_tokens import draw_tokens
from services.engine.kv_cache import KVCache, KVLayout
from services.engine.largest_steps import draws_of_all_kinds, largest_steps
from services.engine.model import DeepseekForCausalLM
from services.engine.runner import Runner
from services.engine.scheduler import Scheduler, SchedulerConfig
from services.engine.weights import dummy_weights
from tests.unit.tiny_model import FP8, v2_config, v3_config

CPU = torch.device("cpu")
CONFIGS = {
    "v2": v2_config(),
    "v3": v3_config(),
    "one head": v3_config(num_attention_heads=1, num_key_value_heads=1),
    "fp8": v3_config(
        hidden_size=256, moe_intermediate_size=128, intermediate_size=256, q_lora_rank=128, kv_lora_rank=128,
        quantization_config=FP8,
    ),
}  # fmt: skip
GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)


def engine_of(config: dict[str, object], *, is_fused: bool, kv_dtype: str = "float32", **limits: int) -> Engine:
    model_config = ModelConfig.from_dict(config)
    model = DeepseekForCausalLM(model_config, torch.float32, CPU, keeps_fp8=model_config.is_fp8)
    dummy_weights(model, 0)
    limits = {"num_blocks": 64, "max_num_batched_tokens": 64, "max_num_sequences": 4} | limits
    cache = KVCache(KVLayout.of(model_config, "absorb", kv_dtype, 4), limits["num_blocks"], CPU, torch.float32)
    runner: Runner | FusedRunner = Runner(model, cache, 256, CPU)
    if is_fused:
        runner = FusedRunner(model, cache, 256, limits["max_num_sequences"], CPU)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_batched_tokens=limits["max_num_batched_tokens"],
            max_num_sequences=limits["max_num_sequences"],
            max_seq_len=256,
            max_num_waiting=64,
        ),
        BlockPool(limits["num_blocks"], 4),
    )
    return Engine(runner, scheduler, model_config.eos_token_ids)


def prompts(lengths: list[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 96, (length,), generator=generator).tolist() for length in lengths]


def replies(engine: Engine, asked: list[list[int]], sampling: SamplingParams = GREEDY) -> list[list[int]]:
    """All arrive at once; nothing may leak."""
    tokens: dict[str, list[int]] = {str(i): [] for i in range(len(asked))}
    for i, prompt in enumerate(asked):
        engine.add(EngineRequest(str(i), prompt, sampling))
    while engine.has_work:
        for output in engine.step():
            assert output.error is None
            tokens[output.request_id] += output.token_ids
        engine.check_integrity()
    assert engine.pool.num_free_blocks == engine.pool.num_blocks
    return list(tokens.values())


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chunk", [8, 30, 64])
def test_replies_are_those_of_the_plain_runner(name: str, chunk: int) -> None:
    asked = prompts([3, 40, 1, 17, 70, 22])
    limits = {"max_num_batched_tokens": chunk}
    expected = replies(engine_of(CONFIGS[name], is_fused=False, **limits), asked)
    assert replies(engine_of(CONFIGS[name], is_fused=True, **limits), asked) == expected


def test_replies_are_the_same_after_preemptions_and_with_a_prefix_found() -> None:
    asked = prompts([30, 31, 32, 33])
    few = engine_of(CONFIGS["v3"], is_fused=True, num_blocks=26)
    expected = replies(engine_of(CONFIGS["v3"], is_fused=False), asked)
    assert replies(few, asked) == expected
    assert few.stats().num_preemptions
    assert replies(few, asked) == expected


def test_fp8_cache_gives_the_logits_of_the_plain_runner() -> None:
    asked = prompts([40, 3, 50])
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    logits: list[torch.Tensor] = []
    for is_fused in (False, True):
        engine = engine_of(CONFIGS["fp8"], is_fused=is_fused, kv_dtype="fp8", max_num_batched_tokens=24)
        rows: dict[tuple[str, int], torch.Tensor] = {}
        for i, prompt in enumerate(asked):
            engine.add(
                EngineRequest(
                    str(i),
                    prompt,
                    sampling,
                    on_prompt_logits=lambda at, part, i=i, rows=rows: rows.__setitem__((str(i), at), part.clone()),
                )
            )
        while engine.has_work:
            engine.step()
        logits.append(torch.cat([rows[key] for key in sorted(rows)]))
    assert (logits[0] - logits[1]).norm() / logits[0].norm() < 2e-2


@pytest.mark.parametrize(("name", "kv_dtype"), [("v2", "float32"), ("fp8", "fp8")])
@pytest.mark.parametrize("max_num_tokens", [4, 50])
def test_steps_made_up_to_be_measured_store_nothing(name: str, kv_dtype: str, max_num_tokens: int) -> None:
    engine = engine_of(CONFIGS[name], is_fused=True, kv_dtype=kv_dtype)
    runner = engine._runner
    assert isinstance(runner, FusedRunner)
    sizes = []
    with torch.inference_mode():
        for step in largest_steps(max_num_tokens, 4, runner._cut, CPU):
            logits = runner._fused(step, runner._sampled_ids)
            draw_tokens(logits, draws_of_all_kinds(logits), runner._sampled_ids[: len(logits)])
            sizes.append((len(step.token_ids), len(logits)))
    assert sizes[1:] == [(max_num_tokens, 4), (4, 4)]
    assert not runner.cache.pool.any()
