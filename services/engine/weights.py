"""Weights: from safetensors (one file or shards with an index) into the model's parameters, tensor by tensor.

Strict: every tensor the model needs is filled exactly once, and every tensor in the files is known. The layers from
num_hidden_layers on are the multi-token-prediction layers: recognised and left in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from services.common.errors import InvalidCheckpoint
from services.engine.config import FP8_BLOCK, ModelConfig
from services.engine.kernels.fp8_linear import dequantize
from services.engine.model import DeepseekForCausalLM

Progress = Callable[[int, int], None]
"""Called with (tensors loaded, tensors in all)."""

_MAX_READERS = 8
_PINNED_BYTES = 32 * 2**20

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def load_weights(
    model: DeepseekForCausalLM, folder: Path, progress: Progress | None = None, num_threads: int | None = None
) -> None:
    """Fills the model from FOLDER. FP8 weights are dequantised one at a time. Raises InvalidCheckpoint.

    num_threads: tensors that are read at once; None is one for a CPU, several for a GPU.
    """
    _verify_checksums(folder)
    views = model.checkpoint_views()
    if num_threads is None:
        is_cuda = next(model.parameters()).is_cuda
        num_threads = min(_MAX_READERS, os.cpu_count() or 1) if is_cuda else 1
    with ExitStack() as stack:
        files = _open_files(folder, stack)
        owners = _owners(files)
        _check_names(set(owners), set(views), model.config)
        readers = stack.enter_context(ThreadPoolExecutor(num_threads))
        pinned = threading.local()
        futures = [readers.submit(_fill, view, name, files, owners, pinned) for name, view in views.items()]
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                future.result()
                if progress is not None:
                    progress(done, len(views))
        except BaseException:
            readers.shutdown(cancel_futures=True)
            raise


def dummy_weights(model: DeepseekForCausalLM, seed: int) -> None:
    """Seeded random weights of sensible size (norms near 1, products of unit variance): for benchmarks."""
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        data = parameter.data
        if "norm" in name:
            data.fill_(1.0)
        elif data.dtype == torch.float8_e4m3fn:
            for part in data if data.ndim == 3 else (data,):  # a matrix at a time: fp32 of all experts may not fit
                part.copy_(torch.empty(part.shape, device=device).normal_(0.0, 1.0, generator=generator))
        elif "scale" in name:  # of e4m3 numbers of unit variance
            data.fill_((data.shape[-1] * FP8_BLOCK) ** -0.5)
        elif "e_score_correction_bias" in name:
            data.zero_()
        else:
            deviation = 1.0 if "embed_tokens" in name else data.shape[-1] ** -0.5
            data.normal_(0.0, deviation, generator=generator)


def _open_files(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """File name -> open safetensors file (memory-mapped)."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InvalidCheckpoint(index.name, "not an index of safetensors shards") from error
        if any(not isinstance(name, str) or Path(name).name != name for name in names):
            raise InvalidCheckpoint(index.name, "a shard's name leads out of the folder")
    else:
        names = ["model.safetensors"]
    files = {}
    for name in names:
        try:
            files[name] = stack.enter_context(safe_open(folder / name, framework="pt"))
        except FileNotFoundError as error:
            raise InvalidCheckpoint(name, "is missing") from error
        except (SafetensorError, OSError) as error:
            raise InvalidCheckpoint(name, f"damaged or not safetensors: {error}") from error
    return files


def _owners(files: dict[str, Any]) -> dict[str, str]:
    """Tensor name -> file name."""
    owners: dict[str, str] = {}
    for file_name, file in files.items():
        for name in file.keys():  # noqa: SIM118 - a safetensors file is no mapping
            if name in owners:
                raise InvalidCheckpoint(file_name, f"stands in {owners[name]} too", tensor=name)
            owners[name] = file_name
    return owners


def _check_names(found: set[str], wanted: set[str], config: ModelConfig) -> None:
    for name in sorted(wanted - found):
        raise InvalidCheckpoint("checkpoint", "is missing", tensor=name)
    for name in sorted(found - wanted):
        layer = _LAYER.match(name)
        if layer and config.num_hidden_layers <= int(layer[1]) < (
            config.num_hidden_layers + config.num_nextn_predict_layers
        ):
            continue  # multi-token prediction
        if name.endswith(".weight_scale_inv") and name.removesuffix("_scale_inv") in wanted:
            continue
        if name.endswith("rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings):
            continue  # computed from the config; a copy of the embedding
        raise InvalidCheckpoint("checkpoint", "is not part of this architecture", tensor=name)


def _fill(view: Tensor, name: str, files: dict[str, Any], owners: dict[str, str], pinned: threading.local) -> None:
    tensor = _read(name, files, owners)
    file = owners[name]
    if tensor.shape != view.shape:
        raise InvalidCheckpoint(file, f"has shape {list(tensor.shape)}, not {list(view.shape)}", tensor=name)
    if view.dtype == torch.float8_e4m3fn:
        if tensor.dtype != view.dtype:
            raise InvalidCheckpoint(file, f"is {tensor.dtype}, but quantization_config says FP8", tensor=name)
    elif tensor.dtype == torch.float8_e4m3fn:
        scale_name = f"{name}_scale_inv"
        if scale_name not in owners:
            raise InvalidCheckpoint(file, "its scales are missing", tensor=scale_name)
        scales = _read(scale_name, files, owners)
        wanted = [-(-size // FP8_BLOCK) for size in tensor.shape]
        if list(scales.shape) != wanted:
            raise InvalidCheckpoint(file, f"has shape {list(scales.shape)}, not {wanted}", tensor=scale_name)
        tensor = dequantize(tensor.to(view.device), scales.to(view.device).float(), torch.float32)
    elif tensor.dtype not in _FLOAT_DTYPES:
        raise InvalidCheckpoint(file, f"has dtype {tensor.dtype}", tensor=name)
    elif f"{name}_scale_inv" in owners:
        raise InvalidCheckpoint(file, f"scales weights of dtype {tensor.dtype}", tensor=f"{name}_scale_inv")
    _copy(view, tensor, pinned)
    if not _is_finite(view):
        raise InvalidCheckpoint(file, "holds NaN or infinite numbers", tensor=name)


def _copy(view: Tensor, tensor: Tensor, pinned: threading.local) -> None:
    """To a GPU by way of this thread's pinned memory, a piece at a time: the pages of the file are read meanwhile."""
    if not view.is_cuda or tensor.is_cuda or tensor.dtype != view.dtype or not view.is_contiguous():
        view.copy_(tensor)
        return
    if not hasattr(pinned, "memory"):
        pinned.memory = torch.empty(_PINNED_BYTES, dtype=torch.uint8, pin_memory=True)
    source, target = tensor.contiguous().view(-1).view(torch.uint8), view.view(-1).view(torch.uint8)
    for start in range(0, len(source), _PINNED_BYTES):
        piece = source[start : start + _PINNED_BYTES]
        memory = pinned.memory[: len(piece)]
        np.copyto(memory.numpy(), piece.numpy())  # one thread, without the interpreter's lock
        target[start : start + len(piece)].copy_(memory)


def _is_finite(view: Tensor) -> bool:
    if view.dtype == torch.float8_e4m3fn:
        return bool(((view.view(torch.uint8) & 0x7F) != 0x7F).all())  # e4m3fn has NaN and no infinity
    return bool(view.isfinite().all())


def _read(name: str, files: dict[str, Any], owners: dict[str, str]) -> Tensor:
    try:
        tensor: Tensor = files[owners[name]].get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InvalidCheckpoint(owners[name], f"cannot be read: {error}", tensor=name) from error
    return tensor


def _verify_checksums(folder: Path) -> None:
    """Compares the weight files with SHA256SUMS (format of sha256sum), where the folder has one."""
    sums = folder / "SHA256SUMS"
    if not sums.exists():
        return
    for wanted, name in _checksums(sums):
        path = folder / name
        if Path(name).name != name or not path.exists():
            raise InvalidCheckpoint(sums.name, f"{name} is not in the folder")
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while part := file.read(1 << 22):
                digest.update(part)
        if digest.hexdigest() != wanted:
            raise InvalidCheckpoint(name, "its SHA-256 is not the one in SHA256SUMS: the file is damaged")


def _checksums(path: Path) -> Iterator[tuple[str, str]]:
    for line in path.read_text(encoding="utf-8").splitlines():
        wanted, _, name = line.partition(" ")
        if name:
            yield wanted, name.strip().removeprefix("*")
