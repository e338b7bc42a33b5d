"""How fast blocks move by Ray Direct Transport, against a plain copy and Ray's object store.

    python -m tests.bench.transfer [--device cuda] [--sizes-mb 1 16 64 256]

Two replicas (on a GPU: of one GPU, half each) hand over blocks of about 1 MB, scattered or side by side. Every transfer
is verified; times are medians. Writes tests/bench/results/transfer-DEVICE.json and prints the table.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from tests.cluster.ray_session import local_ray

# isort: split
import ray

from services.transfer.base import Expected, Identity, KVTicket
from services.transfer.digest import BlockDigest
from services.transfer.rdt import RdtTransfer

# 27 layers, 32 tokens of 512 + 64 numbers in bfloat16: 995,328 bytes.
BLOCK_SHAPE = (27, 32, 576)
BLOCK_BYTES = torch.Size(BLOCK_SHAPE).numel() * 2


class Replica:
    """A pool and its transfer. Times are in milliseconds."""

    def __init__(self, seed: int, num_blocks: int, device: str, block_shape: tuple[int, ...] = BLOCK_SHAPE) -> None:
        torch.manual_seed(seed)
        # Numbers of all magnitudes matter to a checksum no more than their bytes do.
        self._pool = torch.randn(num_blocks, *block_shape, device=device).to(torch.bfloat16)
        self._digest = BlockDigest(self._pool)
        identity = Identity(f"replica-{seed}", str(os.getpid()))
        self._transfer = RdtTransfer(self._pool, model="bench", identity=identity, fetch_timeout_s=60.0)

    async def start(self) -> float:
        """Register the pool."""
        begun = time.perf_counter()
        await self._transfer.start()
        return _ms_since(begun)

    async def publish(self, block_ids: list[int], receiver_block_ids: list[int] | None) -> dict[str, Any]:
        """The ticket and what publishing cost."""
        begun = time.perf_counter()
        ticket = await self._transfer.publish(
            block_ids,
            first_token=0,
            num_tokens=len(block_ids) * self._pool.shape[2],
            receiver_block_ids=receiver_block_ids,
            on_release=lambda _: None,
        )
        return {"ticket": ticket, "publish_ms": _ms_since(begun)}

    async def fetch(self, message: dict[str, Any], block_ids: list[int]) -> dict[str, float]:
        """What fetching cost, by part."""
        ticket: KVTicket = message["ticket"]
        expected = Expected(ticket.first_token, ticket.num_tokens)
        report = await self._transfer.fetch(ticket, block_ids, expected=expected)
        return {"read_ms": report.read_ms, "verify_ms": report.verify_ms, "num_descriptors": report.num_descriptors}

    async def release(self, ticket_id: str) -> bool:
        """Acknowledge."""
        return await self._transfer.release(ticket_id)

    def digest_ms(self, block_ids: list[int]) -> float:
        """Digests alone."""
        begun = time.perf_counter()
        self._digest.of(block_ids)
        return _ms_since(begun)

    def copy_ms(self, block_ids: list[int]) -> float:
        """The same blocks copied within the process."""
        index = torch.tensor(block_ids, device=self._pool.device)
        out = self._pool.new_empty(len(block_ids), *self._pool.shape[1:])
        out.zero_()  # so that no page is touched for the first time below
        _synchronize(self._pool)
        begun = time.perf_counter()
        torch.index_select(self._pool, 0, index, out=out)
        _synchronize(self._pool)
        return _ms_since(begun)

    def put_in_object_store(self, block_ids: list[int]) -> dict[str, Any]:
        """The blocks as an object of Ray's store; through host memory."""
        begun = time.perf_counter()
        index = torch.tensor(block_ids, device=self._pool.device)
        host = self._pool.index_select(0, index).view(torch.int16).cpu().numpy()
        return {"ref": ray.put(host), "put_ms": _ms_since(begun)}

    def get_from_object_store(self, message: dict[str, Any], block_ids: list[int]) -> float:
        """The object's blocks, in the pool."""
        begun = time.perf_counter()
        host = torch.from_numpy(ray.get(message["ref"]).copy()).view(torch.bfloat16)
        self._pool.index_copy_(0, torch.tensor(block_ids, device=self._pool.device), host.to(self._pool.device))
        _synchronize(self._pool)
        return _ms_since(begun)


def _ms_since(begun: float) -> float:
    return (time.perf_counter() - begun) * 1e3


def _synchronize(pool: torch.Tensor) -> None:
    if pool.is_cuda:
        torch.cuda.synchronize(pool.device)


def measure(
    source: Any,
    target: Any,
    num_blocks: int,
    pool_blocks: int,
    *,
    is_scattered: bool,
    repeats: int,
    block_bytes: int = BLOCK_BYTES,
    beside_object_store: bool = True,
) -> dict[str, Any]:
    """One row of the table: medians of `repeats` hand-overs after one that warms up."""
    if is_scattered:
        left, right = (random.Random(seed).sample(range(pool_blocks), num_blocks) for seed in (1, 2))
    else:
        left, right = (list(range(start, start + num_blocks)) for start in (0, pool_blocks - num_blocks))
    rows: list[dict[str, float]] = []
    for _ in range(repeats + 1):
        begun = time.perf_counter()
        message = ray.get(source.publish.remote(left, None if is_scattered else right))
        row = ray.get(target.fetch.remote(message, right))
        row["round_trip_ms"] = _ms_since(begun)
        row["publish_ms"] = message["publish_ms"]
        ray.get(source.release.remote(message["ticket"].ticket_id))
        row["digest_ms"] = ray.get(source.digest_ms.remote(left))
        row["copy_ms"] = ray.get(source.copy_ms.remote(left))
        if beside_object_store:
            stored = ray.get(source.put_in_object_store.remote(left))
            row["object_store_ms"] = stored["put_ms"] + ray.get(target.get_from_object_store.remote(stored, right))
            del stored
        del message
        rows.append(row)
    medians = {name: statistics.median(row[name] for row in rows[1:]) for name in rows[0]}
    num_bytes = num_blocks * block_bytes
    total_ms = medians["publish_ms"] + medians["read_ms"] + medians["verify_ms"]
    result = {
        "mb": num_bytes / 1e6,
        "is_scattered": is_scattered,
        **{name: round(value, 3) for name, value in medians.items()},
        "put_ms": round(medians["publish_ms"] - medians["digest_ms"], 3),
        "total_ms": round(total_ms, 3),
        "read_gb_s": round(num_bytes / medians["read_ms"] / 1e6, 2),
        "digest_gb_s": round(num_bytes / medians["digest_ms"] / 1e6, 2),
        "times_a_copy": round(total_ms / medians["copy_ms"], 2),
    }
    if beside_object_store:
        result["times_faster_than_object_store"] = round(medians["object_store_ms"] / total_ms, 2)
    return result


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes-mb", type=int, nargs="+", default=[1, 16, 64, 256])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    pool_blocks = 2 * max(options.sizes_mb) + 16
    gpus = 0.5 if options.device == "cuda" else 0
    with local_ray(num_cpus=2, object_store_bytes=(4 * max(options.sizes_mb) + 100) << 20):
        actor = ray.remote(num_cpus=0, num_gpus=gpus)(Replica)
        source, target = (actor.remote(seed, pool_blocks, options.device) for seed in (1, 2))
        register_ms = ray.get([source.start.remote(), target.start.remote()])
        rows = []
        for size in options.sizes_mb:
            for is_scattered in (True, False):
                sides = (source, target)
                row = measure(*sides, size, pool_blocks, is_scattered=is_scattered, repeats=options.repeats)
                rows.append(row)
                print(json.dumps(row))
    machine = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} x {platform.machine()}"
    result = {
        "machine": machine,
        "ray": ray.__version__,
        "torch": torch.__version__,
        "repeats": options.repeats,
        "pool_mb": round(pool_blocks * BLOCK_BYTES / 1e6),
        "register_ms": [round(ms) for ms in register_ms],
        "rows": rows,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / f"transfer-{options.device}.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
