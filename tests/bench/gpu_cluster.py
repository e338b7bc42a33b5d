"""The cluster on GPUs: what handing over costs of a turn, and what prompts cost those who are being answered.

Weights are random: DeepSeek-V2-Lite's shape, with fewer layers where two replicas share a GPU. Prompts are token ids.
"""

from __future__ import annotations

import asyncio
import json
import random
import shutil
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# isort: split
from tests.cluster.ray_session import local_ray

# isort: split
import ray

from services.app import deployed, session_store
from services.client import AsyncClient
from services.common.messages import Delta
from services.common.sampling import SamplingParams
from services.common.settings import Settings
from services.engine.hub import DEMO_MODEL
from services.local import LocalPipeline, LocalRequest
from tests.bench.turns import TurnSample, one_turn, percentiles

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "tests" / "data" / "configs" / "deepseek-v2-lite.json"
HISTORY_TOKENS, NEW_TOKENS = 16_384, 200
ARRIVING_TOKENS = 8192


@dataclass(frozen=True)
class Shape:
    """What is served, on what. num_gpus: of one replica. num_layers: of the model, None for all of its own."""

    device: str
    num_gpus: float
    num_layers: int | None
    prompt_tokens: tuple[int, ...]

    @property
    def scale(self) -> float:
        """Of the longest prompt to what the full bench has: shorter ones for a dry run."""
        return self.prompt_tokens[-1] / 32_768


def measure_cluster(shape: Shape, repeats: int) -> dict[str, Any]:
    """One prefill and one decode replica, then two that do both."""
    with tempfile.TemporaryDirectory() as folder:
        path = _write_model(Path(folder), shape)
        with local_ray(num_cpus=8, object_store_bytes=200 * 2**20):
            apart = _on(_settings(path, shape, together=False), lambda client: _apart(client, shape, repeats))
            together = _on(_settings(path, shape, together=True), lambda client: _gaps(client, shape))
            prompts = apart.pop("prompts")
            expected = ray.get(_locally(shape.num_gpus).remote(_settings(path, shape, together=False), prompts))
            apart["same_tokens_as_local"] = [
                given == wanted for given, wanted in zip(apart.pop("replies"), expected, strict=True)
            ]
    return {"num_layers": shape.num_layers, "apart": apart, "together": together}


def _write_model(folder: Path, shape: Shape) -> Path:
    """A folder that the cluster can serve: the shape's config and any tokenizer; weights are made when loading."""
    config = json.loads(CONFIG.read_text())
    if shape.num_layers is not None:
        config["num_hidden_layers"] = shape.num_layers
    if shape.device == "cpu":  # a dry run: the same way through, a model that a laptop can compute
        config |= {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 64, "n_routed_experts": 8,
                   "vocab_size": 8192}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO_MODEL / name, folder / name)
    return folder


def _settings(path: Path, shape: Shape, *, together: bool) -> Settings:
    """One of the project's own configurations with this model; together: two replicas that prefill and decode."""
    name = "one-node.yaml" if shape.num_gpus == 1 else "one-gpu.yaml"
    num_gpus = shape.num_gpus if shape.device == "cuda" else 0
    longest = shape.prompt_tokens[-1] + 1024
    changes: dict[str, Any] = {
        "MODEL__PATH": path, "MODEL__LOAD_FORMAT": "dummy", "MODEL__MAX_SEQ_LEN": longest,
        "MODEL__SERVED_NAME": "bench", "ENGINE__DEVICE": shape.device, "GATEWAY__PORT": 0,
        "PREFILL__ENABLED": str(not together).lower(), "PREFILL__NUM_REPLICAS": 1, "PREFILL__NUM_GPUS": num_gpus,
        "DECODE__NUM_REPLICAS": 2 if together else 1, "DECODE__NUM_GPUS": num_gpus,
        "DECODE__REMOTE_PREFILL": "auto" if together else "always",
    }  # fmt: skip
    if shape.device == "cpu":
        changes |= {"MODEL__DTYPE": "float32", "ENGINE__NUM_BLOCKS": 4096}
    environment = {f"ANTIPHON__{key}": str(value) for key, value in changes.items()}
    return Settings.from_yaml(ROOT / "deploy" / "serve" / name, environment)


def _on(settings: Settings, measured: Callable[[AsyncClient], Awaitable[Any]]) -> Any:
    async def run(target: str) -> Any:
        async with AsyncClient(target) as client:
            return await measured(client)

    with session_store(settings) as stored, _gateway(stored) as target:
        return asyncio.run(run(target))


@contextmanager
def _gateway(settings: Settings) -> Iterator[str]:
    with deployed(settings) as gateway:
        yield gateway.address.remote().result()


async def _apart(client: AsyncClient, shape: Shape, repeats: int) -> dict[str, Any]:
    """Prompts by length, a second turn, the gaps of running replies; and replies to compare with one process."""
    for seed in range(3):
        await _cold(client, shape.prompt_tokens[0], seed)
    by_length = {}
    for length in shape.prompt_tokens:
        turns = [await _cold(client, length, 100 + seed) for seed in range(repeats)]
        by_length[str(length)] = _handover(turns)
        print(length, json.dumps(by_length[str(length)]), flush=True)
    prompts = [_token_ids(length, 7) for length in (33, 500, int(3000 * shape.scale) + 64)]
    replies = [await _tokens_of(client, prompt) for prompt in prompts]
    return {
        "prompts_by_length": by_length,
        "second_turn": await _second_turn(client, shape, repeats),
        **await _gaps(client, shape),
        "prompts": prompts,
        "replies": replies,
    }


async def _cold(client: AsyncClient, length: int, seed: int) -> TurnSample:
    return await one_turn(client, _token_ids(length, seed), _greedy(8), 1)


async def _second_turn(client: AsyncClient, shape: Shape, repeats: int) -> dict[str, Any]:
    """A few new tokens after a long history."""
    history = min(HISTORY_TOKENS, shape.prompt_tokens[-1] // 2)
    turns = []
    for seed in range(repeats):
        session = await client.create_session()
        await one_turn(session, _token_ids(history, 200 + seed), _greedy(8), 1)
        turns.append(await one_turn(session, _token_ids(NEW_TOKENS, 300 + seed), _greedy(8), 2))
    return {"history_tokens": history, "new_tokens": NEW_TOKENS} | _handover(turns)


def _handover(turns: list[TurnSample]) -> dict[str, Any]:
    timings = [turn.finished.timings for turn in turns]
    transfer_ms = percentiles(each.transfer_ms for each in timings)
    num_bytes = timings[0].transfer_bytes
    return {
        "ttft_ms": percentiles(turn.ttft_ms for turn in turns),
        "prefill_ms": percentiles(each.prefill_ms for each in timings),
        "transfer_ms": transfer_ms,
        "transfer_bytes": num_bytes,
        "transfer_gb_s": round(num_bytes / transfer_ms["p50"] / 1e6, 2) if transfer_ms["p50"] else None,
        "transfer_share_of_ttft": percentiles(turn.finished.timings.transfer_ms / turn.ttft_ms for turn in turns),
        "first_gap_ms": percentiles(turn.gaps_ms[0] for turn in turns if turn.gaps_ms),
        "cached_tokens": [turn.started.num_cached_tokens for turn in turns],
    }


async def _gaps(client: AsyncClient, shape: Shape) -> dict[str, Any]:
    """Gaps between the tokens of sixteen replies, idle and while long prompts arrive one after another."""
    await _replies(client, 8)
    idle = await _replies(client, 200)
    arriving = asyncio.create_task(_prompts(client, int(ARRIVING_TOKENS * min(shape.scale * 4, 1))))
    busy = await _replies(client, 400)
    arriving.cancel()
    outcome = (await asyncio.gather(arriving, return_exceptions=True))[0]
    assert isinstance(outcome, asyncio.CancelledError), outcome
    gaps = {
        name: percentiles(gap for turn in turns for gap in turn.gaps_ms)
        for name, turns in (("idle", idle), ("prompts arrive", busy))
    }
    return {"itl_ms": gaps, "itl_p99_ratio": round(gaps["prompts arrive"]["p99"] / gaps["idle"]["p99"], 3)}


async def _replies(client: AsyncClient, num_tokens: int) -> list[TurnSample]:
    given = [_token_ids(64, seed) for seed in range(16)]
    return list(await asyncio.gather(*(one_turn(client, each, _greedy(num_tokens), 1) for each in given)))


async def _prompts(client: AsyncClient, length: int) -> None:
    """One after another, until cancelled."""
    seed = 1000
    while True:
        seed += 1
        await one_turn(client, _token_ids(length, seed), _greedy(1), 1)


async def _tokens_of(client: AsyncClient, prompt: list[int]) -> list[int]:
    return [
        token_id
        async for event in client.generate(prompt, sampling=_greedy(32))
        if isinstance(event, Delta)
        for token_id in event.token_ids
    ]


def _locally(num_gpus: float) -> Any:
    """A process of its own with the one-process pipeline."""

    @ray.remote(num_cpus=1, max_calls=1)
    def replies(settings: Settings, prompts: list[list[int]]) -> list[list[int]]:
        pipeline = LocalPipeline.load(settings.model, settings.engine)
        return [
            [
                token_id
                for _, event in pipeline.run([LocalRequest(prompt, _greedy(32))])
                if isinstance(event, Delta)
                for token_id in event.token_ids
            ]
            for prompt in prompts
        ]

    return replies.options(num_gpus=num_gpus)


def _greedy(num_tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)


def _token_ids(length: int, seed: int) -> list[int]:
    rng = random.Random(f"{length} {seed}")
    return [rng.randrange(10, 4000) for _ in range(length)]
