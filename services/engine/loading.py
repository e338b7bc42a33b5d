"""From settings to a running engine: device, weights, and a block pool that fits."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch

from services.common.errors import InvalidSettings
from services.common.settings import EngineSettings, ModelSettings
from services.engine.block_pool import BlockPool
from services.engine.config import ModelConfig
from services.engine.engine import Engine
from services.engine.fused_runner import FusedRunner
from services.engine.hub import resolve_model
from services.engine.kv_cache import KVCache, KVLayout
from services.engine.layers import PackedWeight
from services.engine.model import DeepseekForCausalLM
from services.engine.runner import Runner
from services.engine.scheduler import Scheduler, SchedulerConfig
from services.engine.weights import Progress, dummy_weights, load_weights

log = logging.getLogger(__name__)

_CPU_CACHE_BYTES = 256 * 2**20
# Kept free on a GPU, besides what steps were seen to take: the driver's context, the libraries' workspaces, graphs.
_GPU_SPARE_BYTES = 1 * 2**30
# Where nothing was measured.
_STEP_BYTES = 1 * 2**30


def load_engine(
    model: ModelSettings, engine: EngineSettings, eos_token_ids: tuple[int, ...] = (), progress: Progress | None = None
) -> Engine:
    """Loads a model. eos_token_ids: empty takes the config's. Raises InvalidCheckpoint, UnsupportedConfig or
    InvalidSettings."""
    folder = resolve_model(model.path)
    config = ModelConfig.from_folder(folder)
    device = _device(engine.device)
    dtype = compute_dtype(model.dtype, config, device)
    if engine.num_threads is not None and device.type == "cpu":
        torch.set_num_threads(engine.num_threads)
    kv_dtype = str(dtype).removeprefix("torch.") if model.kv_dtype == "auto" else model.kv_dtype
    layout = KVLayout.of(config, model.cache_mode, kv_dtype, engine.block_size)
    network = _network(config, folder, model, dtype, device, progress)
    max_seq_len = _max_seq_len(model.max_seq_len, config)
    runner = _runner(network, layout, max_seq_len, engine, device)
    scheduler = Scheduler(
        SchedulerConfig(
            max_num_batched_tokens=engine.max_num_batched_tokens,
            max_num_sequences=engine.max_num_sequences,
            max_seq_len=max_seq_len,
            max_num_waiting=engine.max_num_waiting,
        ),
        BlockPool(runner.cache.pool.shape[0], engine.block_size),
    )
    eos = eos_token_ids or config.eos_token_ids
    return Engine(runner, scheduler, eos, prefix_caching=engine.prefix_caching)


def compute_dtype(name: str, config: ModelConfig, device: torch.device) -> torch.dtype:
    """auto: the checkpoint's on a GPU. On a CPU float32, so that the same text gives the same tokens however its
    computation is cut into chunks and batches."""
    if name == "auto":
        name = "float32" if device.type == "cpu" else config.torch_dtype
    if name not in ("float32", "bfloat16", "float16"):
        raise InvalidSettings(f"model.dtype: {name!r} is not one of float32, bfloat16, float16")
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def _network(
    config: ModelConfig,
    folder: Path,
    model: ModelSettings,
    dtype: torch.dtype,
    device: torch.device,
    progress: Progress | None,
) -> DeepseekForCausalLM:
    keeps_fp8 = config.is_fp8 and computes_fp8(device)
    network = DeepseekForCausalLM(config, dtype, device, keeps_fp8=keeps_fp8).eval()
    if model.load_format == "dummy":
        dummy_weights(network, model.seed)
    else:
        load_weights(network, folder, progress)
    if device.type == "cpu" and PackedWeight.is_available(dtype):
        network.pack()
    return network


def _runner(
    network: DeepseekForCausalLM, layout: KVLayout, max_seq_len: int, engine: EngineSettings, device: torch.device
) -> Runner | FusedRunner:
    dtype = network.model.embed_tokens.weight.dtype
    if device.type != "cuda" or layout.cache_mode == "naive":
        cache = _cache(layout, _num_blocks(engine, layout, device, _STEP_BYTES), device, dtype)
        return Runner(network, cache, max_seq_len, device)
    cache = _cache(layout, 1, device, dtype)
    runner = FusedRunner(network, cache, max_seq_len, engine.max_num_sequences, device)
    step_bytes = runner.measure(engine.max_num_batched_tokens)
    _resize(cache, _num_blocks(engine, layout, device, step_bytes), device)
    if engine.cuda_graphs:
        started_s = time.perf_counter()
        num_graphs = runner.capture_graphs(engine.max_num_batched_tokens)
        log.info("captured CUDA graphs of %d batch sizes in %.1f s", num_graphs, time.perf_counter() - started_s)
    return runner


def computes_fp8(device: torch.device) -> bool:
    """Whether its matrix units take e4m3 (Ada, Hopper and newer)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InvalidSettings("engine.device: there is no CUDA device here; use cpu")
    return torch.device(name)


def _max_seq_len(wanted: int | None, config: ModelConfig) -> int:
    if wanted is not None and wanted > config.max_position_embeddings:
        raise InvalidSettings(
            f"model.max_seq_len: {wanted}, but the model has {config.max_position_embeddings} positions"
        )
    return wanted or config.max_position_embeddings


def _cache(layout: KVLayout, num_blocks: int, device: torch.device, dtype: torch.dtype) -> KVCache:
    cache = KVCache(layout, 0, device, dtype)
    _resize(cache, num_blocks, device)
    return cache


def _resize(cache: KVCache, num_blocks: int, device: torch.device) -> None:
    try:
        cache.resize(num_blocks)
    except RuntimeError as error:  # torch's allocators, out of memory or address space
        num_bytes = num_blocks * cache.layout.bytes_per_block
        raise InvalidSettings(
            f"engine.kv_cache_bytes: {num_bytes} bytes cannot be allocated on {device.type}"
        ) from error


def _num_blocks(engine: EngineSettings, layout: KVLayout, device: torch.device, step_bytes: int) -> int:
    """step_bytes: what steps take besides."""
    if engine.num_blocks is not None:
        return engine.num_blocks
    budget = engine.kv_cache_bytes
    if budget is None and device.type == "cuda":
        budget = -step_bytes - _GPU_SPARE_BYTES
        free, total = torch.cuda.mem_get_info(device)
        # Its own share of the whole: what other replicas of this GPU take is theirs, unless little is left.
        share = engine.memory_fraction * total - torch.cuda.memory_reserved(device)
        budget += int(min(share, free))
    num_blocks = (_CPU_CACHE_BYTES if budget is None else budget) // layout.bytes_per_block
    if num_blocks < 1:
        raise InvalidSettings(
            f"engine.kv_cache_bytes: {budget} bytes hold no block of {layout.bytes_per_block} bytes; give more"
        )
    return num_blocks
