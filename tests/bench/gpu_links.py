"""What the links of this host give: the limit of every transfer between its GPUs."""

from __future__ import annotations

import statistics
import subprocess
from typing import Any

import torch

MIB = 2**20
SIZES = (16 * MIB, 256 * MIB, 1024 * MIB)


def measure_links(repeats: int = 20) -> dict[str, Any]:
    """Topology, peer access, and GB/s of plain copies by size; on a host of one GPU the copies stay on it."""
    count = torch.cuda.device_count()
    first, last = torch.device("cuda", 0), torch.device("cuda", count - 1)
    return {
        "gpus": [torch.cuda.get_device_name(index) for index in range(count)],
        "topology": _topology(),
        "can_access_peer": [
            [a == b or torch.cuda.can_device_access_peer(a, b) for b in range(count)] for a in range(count)
        ],
        "copy_gb_s": {f"{size // MIB} MiB": _copy_gb_s(size, first, last, repeats) for size in SIZES},
        "both_ways_gb_s": _both_ways_gb_s(SIZES[1], first, last, repeats) if count > 1 else None,
    }


def _topology() -> str:
    return subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, check=False).stdout


def _copy_gb_s(size: int, source: torch.device, target: torch.device, repeats: int) -> float:
    left = torch.ones(size, dtype=torch.uint8, device=source)
    right = torch.empty(size, dtype=torch.uint8, device=target)
    return round(size / _median_s([(left, right)], repeats) / 1e9, 1)


def _both_ways_gb_s(size: int, a: torch.device, b: torch.device, repeats: int) -> float:
    """Of both directions together."""
    pairs = [
        (torch.ones(size, dtype=torch.uint8, device=here), torch.empty(size, dtype=torch.uint8, device=there))
        for here, there in ((a, b), (b, a))
    ]
    return round(2 * size / _median_s(pairs, repeats) / 1e9, 1)


def _median_s(pairs: list[tuple[torch.Tensor, torch.Tensor]], repeats: int) -> float:
    """Of copying all pairs at once, each on a stream of its source's device."""
    streams = [torch.cuda.Stream(device=left.device) for left, _ in pairs]
    taken = []
    for _ in range(repeats + 3):
        for index in range(torch.cuda.device_count()):
            torch.cuda.synchronize(index)
        events = []
        for stream, (left, right) in zip(streams, pairs, strict=True):
            with torch.cuda.stream(stream):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                begin.record()
                right.copy_(left, non_blocking=True)
                end.record()
                events.append((begin, end))
        for stream in streams:
            stream.synchronize()
        taken.append(max(begin.elapsed_time(end) for begin, end in events) / 1e3)
    return statistics.median(taken[3:])
