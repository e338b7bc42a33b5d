"""The whole engine on CUDA against the engine on a CPU, and graphs against steps launched one by one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from services.common.sampling import SamplingParams
from services.common.settings import EngineSettings, ModelSettings
from services.engine.block_pool import BlockPool
from services.engine.config import ModelConfig
from services.engine.engine import Engine, EngineRequest
from services.engine.fused_runner import FusedRunner
from services.engine.kv_cache import KVCache, KVLayout
from services.engine.loading import load_engine
from services.engine.model import DeepseekForCausalLM
from services.engine.plan import plan
from services.engine.scheduler import Scheduler, SchedulerConfig
from services.engine.weights import load_weights

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

CHECKPOINTS = Path(__file__).parent.parent / "data" / "checkpoints"
GREEDY = SamplingParams(temperature=0.0, max_tokens=24, ignore_eos=True)


def engine_of(
    name: str,
    device: str,
    *,
    dtype: str = "float32",
    kv_dtype: str = "auto",
    cache_mode: str = "absorb",
    **settings: int,
) -> Engine:
    return load_engine(
        ModelSettings(
            path=str(CHECKPOINTS / name), dtype=dtype, kv_dtype=kv_dtype, cache_mode=cache_mode, max_seq_len=512
        ),
        EngineSettings(
            **{"device": device, "num_blocks": 256, "max_num_sequences": 16, "max_num_batched_tokens": 512} | settings
        ),
    )


def prompts(lengths: Sequence[int]) -> list[list[int]]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 500, (length,), generator=generator).tolist() for length in lengths]


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


def logits_of(engine: Engine, asked: list[list[int]]) -> list[torch.Tensor]:
    """Of every position of prompts that all arrive at once, [T, vocab] float64 each."""
    rows: list[dict[int, torch.Tensor]] = [{} for _ in asked]
    sampling = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0)
    for i, prompt in enumerate(asked):
        engine.add(
            EngineRequest(
                str(i),
                prompt,
                sampling,
                on_prompt_logits=lambda at, part, i=i: rows[i].__setitem__(at, part.double().cpu()),
            )
        )
    while engine.has_work:
        engine.step()
    return [torch.cat([parts[at] for at in sorted(parts)]) for parts in rows]


def error_of(ours: list[torch.Tensor], reference: list[torch.Tensor]) -> torch.Tensor:
    """By position, |difference| / |reference|."""
    return torch.cat([(a - b).norm(dim=-1) / b.norm(dim=-1) for a, b in zip(ours, reference, strict=True)])


@pytest.mark.parametrize("name", ["v2lite", "v3"])
@pytest.mark.parametrize("cache_mode", ["absorb", "naive"])
@pytest.mark.parametrize("chunk", [16, 100, 512])
def test_logits_are_those_of_the_cpu(name: str, cache_mode: str, chunk: int) -> None:
    asked = prompts([70, 1, 33, 150, 12])
    ours, reference = (
        logits_of(engine_of(name, device, cache_mode=cache_mode, max_num_batched_tokens=chunk), asked)
        for device in ("cuda", "cpu")
    )
    assert float(error_of(ours, reference).max()) < 1e-4


@pytest.mark.parametrize("name", ["v2lite", "v3"])
def test_bf16_logits_are_close_to_fp32(name: str) -> None:
    asked = prompts([200, 31, 90])
    ours = logits_of(engine_of(name, "cuda", dtype="bfloat16", max_num_batched_tokens=64), asked)
    reference = logits_of(engine_of(name, "cpu"), asked)
    assert float(error_of(ours, reference).median()) < 0.08


@pytest.mark.parametrize("chunk", [16, 300])
def test_fp8_cache_gives_the_logits_of_the_cpu(chunk: int) -> None:
    """The weights dequantised, so that what differs is what the cache holds."""
    asked = prompts([70, 1, 33, 150])
    config, cuda = ModelConfig.from_folder(CHECKPOINTS / "v3_fp8"), torch.device("cuda")
    model = DeepseekForCausalLM(config, torch.float32, cuda)
    load_weights(model, CHECKPOINTS / "v3_fp8")
    cache = KVCache(KVLayout.of(config, "absorb", "fp8", 16), 256, cuda, torch.float32)
    scheduler = Scheduler(SchedulerConfig(chunk, 16, 512, 16), BlockPool(256, 16))
    ours = Engine(FusedRunner(model, cache, 512, 16, cuda), scheduler, config.eos_token_ids)
    reference = engine_of("v3_fp8", "cpu", kv_dtype="fp8", max_num_batched_tokens=chunk)
    # A latent between two steps of e4m3 may fall to either.
    error = error_of(logits_of(ours, asked), logits_of(reference, asked))
    assert float(error.median()) < 2e-2, error.median()


@pytest.mark.parametrize("chunk", [16, 300])
def test_fp8_weights_give_the_logits_of_deepseeks_kernel(chunk: int) -> None:
    asked = json.loads((CHECKPOINTS / "v3_fp8" / "ref.json").read_text())["prompts"][:3]
    reference = load_file(CHECKPOINTS / "v3_fp8" / "ref_w8a8_fp32.safetensors")
    wanted = [reference[f"logits_w8a8_fp32.{i}"].double() for i in range(3)]
    ours = logits_of(engine_of("v3_fp8", "cuda", max_num_batched_tokens=chunk), asked)
    # The tensor cores keep fewer bits than fp32 within 128 channels, and e4m3 roundings fall the other way for it.
    assert float(error_of(ours, wanted).median()) < 2e-2


@pytest.mark.parametrize("name", ["v2lite", "v3"])
def test_replies_are_those_of_the_cpu(name: str) -> None:
    asked = prompts([3, 40, 1, 17, 170, 22, 80])
    expected = replies(engine_of(name, "cpu"), asked)
    for settings in ({}, {"cuda_graphs": False}, {"max_num_batched_tokens": 48}, {"num_blocks": 30}):
        assert replies(engine_of(name, "cuda", **settings), asked) == expected


SAMPLED = SamplingParams(temperature=0.8, top_p=0.9, top_k=40, seed=5, max_tokens=24, ignore_eos=True)


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED])
@pytest.mark.parametrize(
    ("name", "kv_dtype"), [("v2lite", "auto"), ("v3", "auto"), ("v3_fp8", "auto"), ("v3_fp8", "fp8")]
)
def test_a_graph_computes_what_the_same_step_launched_one_by_one_does(
    name: str, kv_dtype: str, sampling: SamplingParams
) -> None:
    asked = prompts([5 + 9 * i for i in range(16)])
    with_graphs, without = (
        engine_of(name, "cuda", dtype="bfloat16", kv_dtype=kv_dtype, cuda_graphs=graphs) for graphs in (True, False)
    )
    # Prompts as they come, so that the very same numbers are decoded from: padding may take another product of cuBLAS.
    with_graphs._runner._chunk_graphs = None
    assert replies(with_graphs, asked, sampling) == replies(without, asked, sampling)


def test_sampled_replies_are_those_of_the_cpu_in_any_batch() -> None:
    asked = prompts([5, 60, 33, 80, 21])
    expected = replies(engine_of("v3", "cpu"), asked, SAMPLED)
    engine = engine_of("v3", "cuda")
    assert replies(engine, asked, SAMPLED) == expected
    assert [replies(engine, [prompt], SAMPLED)[0] for prompt in asked] == expected


def test_a_step_smaller_than_its_graph_leaves_the_cache_alone() -> None:
    engine = engine_of("v3", "cuda")
    engine.add(EngineRequest("0", prompts([20])[0], GREEDY))
    engine.add(EngineRequest("1", prompts([21])[0], GREEDY))
    engine.add(EngineRequest("2", prompts([22])[0], GREEDY))
    engine.step()
    used = {block for live in engine._live.values() for block in live.seq.block_table}
    engine.kv_cache.pool[[block for block in range(256) if block not in used]] = 7.0
    while engine.has_work:
        used |= {block for live in engine._live.values() for block in live.seq.block_table}
        engine.step()
        used |= {block for live in engine._live.values() for block in live.seq.block_table}
    others = [block for block in range(256) if block not in used]
    assert others
    assert bool((engine.kv_cache.pool[others] == 7.0).all())


@pytest.mark.parametrize(("name", "kv_dtype"), [("v2lite", "auto"), ("v3_fp8", "fp8")])
def test_nothing_is_compiled_while_somebody_waits(name: str, kv_dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number, the lengths and the sampling of the requests: all kernels are there once it has loaded."""
    import triton

    engine = engine_of(name, "cuda", dtype="bfloat16", kv_dtype=kv_dtype, num_blocks=1024, max_num_sequences=40)
    compiled: list[str] = []
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", lambda *, fn, **_: compiled.append(str(fn.name)))
    sizes = [[1], [1, 2], [400], [17] * 30, [16] * 30, [300, 5, 90, 1], list(range(1, 40)), [64] * 12, [500, 499]]
    for lengths in sizes:
        asked = prompts(lengths)
        replies(engine, asked, GREEDY)
        replies(engine, asked, SAMPLED)  # their prefixes are found
    assert compiled == []


def test_the_pool_is_what_the_plan_said() -> None:
    """Alone on its card: `antiphon plan` for the share that the settings leave the engine, within 3 %."""
    share = int(0.8 * torch.cuda.get_device_properties(0).total_memory)
    config = ModelConfig.from_folder(CHECKPOINTS / "v2lite")
    expected = plan(config, share, torch.bfloat16).caches[0].num_blocks
    engine = load_engine(
        ModelSettings(path=str(CHECKPOINTS / "v2lite"), dtype="bfloat16"),
        EngineSettings(device="cuda", memory_fraction=0.8),
    )
    assert engine.pool.num_blocks == pytest.approx(expected, rel=0.03)
    assert torch.cuda.memory_reserved() < share
