"""Blocks of many sizes and numbers between two replicas of a GPU each, by RDT over NIXL; and how UCX moved them."""

from __future__ import annotations

import json
import os
import re
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

# isort: split
from tests.cluster.ray_session import local_ray

# isort: split
import ray

from tests.bench.transfer import Replica, measure

KIB, MIB, GIB = 2**10, 2**20, 2**30
BLOCK_BYTES = (64 * KIB, 256 * KIB, MIB, 4 * MIB)
COUNTS = (1, 16, 64, 256, 1024, 4096)
MOST_BYTES = 2 * GIB
UCX_SETTINGS: dict[str, dict[str, str]] = {
    "as served": {},
    "UCX's own defaults": {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "auto"},
    "get by zcopy off": {"UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "off"},
}


def measure_transfers(num_gpus: float, repeats: int) -> dict[str, Any]:
    """All sizes; 64 MiB under each setting of UCX; 256 MiB through the object store. num_gpus: of one replica."""
    results: dict[str, Any] = {"sizes": [], "ucx": {}}
    with local_ray(num_cpus=4, object_store_bytes=2 * GIB):
        for block_bytes in BLOCK_BYTES:
            results["sizes"] += _of_one_size(num_gpus, block_bytes, repeats)
        for name, variables in UCX_SETTINGS.items():
            results["ucx"][name] = _under(variables, num_gpus, repeats)
        results["object_store"] = _beside_object_store(num_gpus, repeats)
    return results


def _pair(num_gpus: float, block_bytes: int, num_blocks: int, variables: dict[str, str] | None = None) -> list[Any]:
    """Two replicas with registered pools; the actors end with the last reference."""
    shape = (1, 32, block_bytes // 64)
    actor = ray.remote(num_cpus=0, num_gpus=num_gpus)(Replica).options(runtime_env={"env_vars": variables or {}})
    sides = [actor.remote(seed, num_blocks, "cuda", shape) for seed in (1, 2)]
    ray.get([side.start.remote() for side in sides])
    return sides


def _of_one_size(num_gpus: float, block_bytes: int, repeats: int) -> list[dict[str, Any]]:
    counts = [count for count in COUNTS if count * block_bytes <= MOST_BYTES]
    pool_blocks = 2 * counts[-1]
    sides = _pair(num_gpus, block_bytes, pool_blocks)
    rows = []
    for count in counts:
        for is_scattered in (False, True):
            row = measure(
                *sides, count, pool_blocks, is_scattered=is_scattered, repeats=repeats, block_bytes=block_bytes,
                beside_object_store=False,
            )  # fmt: skip
            if count * block_bytes >= 16 * MIB:
                row["both_ways_gb_s"] = _both_ways(sides, count, pool_blocks, block_bytes, repeats)
            rows.append({"block_kib": block_bytes // KIB, "num_blocks": count} | row)
            print(json.dumps(rows[-1]), flush=True)
    return rows


def _both_ways(sides: list[Any], count: int, pool_blocks: int, block_bytes: int, repeats: int) -> float:
    """GB/s of both directions together: reading alone, each side into the half that the other does not read."""
    low, high = list(range(count)), list(range(pool_blocks - count, pool_blocks))
    rates = []
    for _ in range(repeats + 1):
        offers = ray.get([side.publish.remote(low, high) for side in sides])
        fetched = ray.get([side.fetch.remote(offer, high) for side, offer in zip(sides, reversed(offers), strict=True)])
        ray.get([side.release.remote(offer["ticket"].ticket_id) for side, offer in zip(sides, offers, strict=True)])
        rates.append(2 * count * block_bytes / max(row["read_ms"] for row in fetched) / 1e6)
    return round(statistics.median(rates[1:]), 1)


def _under(variables: dict[str, str], num_gpus: float, repeats: int) -> dict[str, Any]:
    """Reading 64 blocks of 1 MiB, scattered, under variables of UCX; and the transports it says it took."""
    with tempfile.TemporaryDirectory() as folder:
        log = os.path.join(folder, "ucx-%p.log")
        told = {"UCX_PROTO_INFO": "y", "UCX_LOG_FILE": log, **variables}
        sides = _pair(num_gpus, MIB, 128, told)
        row = measure(*sides, 64, 128, is_scattered=True, repeats=repeats, block_bytes=MIB, beside_object_store=False)
        text = "\n".join(path.read_text(errors="replace") for path in Path(folder).iterdir())
        del sides
        time.sleep(1)
    return {"read_gb_s": row["read_gb_s"], "read_ms": row["read_ms"], "transports": _transports(text)}


def _transports(text: str) -> list[str]:
    """The lines of UCX's tables that say how it moves the memory of a GPU, each once, without time and process."""
    lines = {re.sub(r"\s+", " ", re.sub(r"^\s*(\[[^]]*\]\s*)+", "", line)).strip() for line in text.splitlines()}
    return sorted(line for line in lines if "cuda" in line)


def _beside_object_store(num_gpus: float, repeats: int) -> dict[str, Any]:
    sides = _pair(num_gpus, MIB, 512)
    return measure(*sides, 256, 512, is_scattered=True, repeats=min(repeats, 5), block_bytes=MIB)
