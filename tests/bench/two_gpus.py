"""Prefill on one GPU, decode on another of the same host: the links, the transfers, the cluster.

    python -m tests.bench.two_gpus [--parts links transfers cluster] [--layers N] [--repeats N] [--out FOLDER]

With one GPU the two replicas share it, half each; give --layers there, so that both models fit. --device cpu is a dry
run of the cluster's part. Writes results/two_gpus-MACHINE.json after each part, so that nothing measured is lost.
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

# isort: split
from tests.cluster.ray_session import local_ray

# isort: split
import ray
import torch

from tests.bench.commit import commit
from tests.bench.gpu_cluster import Shape, measure_cluster
from tests.bench.gpu_links import measure_links
from tests.bench.gpu_transfers import measure_transfers

PROMPT_TOKENS = (1024, 4096, 16_384, 32_768)


def main() -> None:
    """All parts, in this order; the script itself holds no memory of a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=("links", "transfers", "cluster"))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--layers", type=int, help="of the model; all of its own if not given")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--longest", type=int, default=PROMPT_TOKENS[-1], help="tokens of the longest prompt")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    is_cpu = options.device == "cpu"
    num_gpus = 0 if is_cpu else torch.cuda.device_count()
    per_replica = 1.0 if num_gpus > 1 else 0.5
    lengths = tuple(length for length in PROMPT_TOKENS if length <= options.longest) or (options.longest,)
    shape = Shape(options.device, per_replica if num_gpus else 0, options.layers, lengths)
    parts = {
        "links": _links,
        "transfers": lambda: measure_transfers(per_replica, options.repeats),
        "cluster": lambda: measure_cluster(shape, options.repeats),
    }
    machine = "CPU" if is_cpu else f"{num_gpus} x {torch.cuda.get_device_name()}"
    result: dict[str, Any] = {
        "machine": machine,
        "commit": commit(),
        "torch": torch.__version__,
        "ray": ray.__version__,
        "repeats": options.repeats,
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / f"two_gpus-{re.sub('[^a-z0-9]+', '-', machine.lower())}.json"
    for name in options.parts or (("cluster",) if is_cpu else parts):
        begun = time.perf_counter()
        result[name] = parts[name]()
        print(f"{name}: {time.perf_counter() - begun:.0f} s", flush=True)
        path.write_text(json.dumps(result, indent=1) + "\n")


def _links() -> dict[str, Any]:
    """In a process of its own, which takes its CUDA contexts with it."""
    with local_ray(num_cpus=2):
        task = ray.remote(num_cpus=1, num_gpus=torch.cuda.device_count(), max_calls=1)(measure_links)
        links: dict[str, Any] = ray.get(task.remote())
        return links


if __name__ == "__main__":
    main()
