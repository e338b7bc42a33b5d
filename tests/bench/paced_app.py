"""The application with engines that take the time of a device of their own.

Two cores cannot compute for six engines at once: more replicas would only share them. So each step here lasts as long
as on some small GPU, asleep for the rest of it, and the model is so small (small_checkpoint.py) that the rest is nearly
all. Tokens, queues, KV blocks, transfers, gateways, sessions and the scaling itself are real.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ray import serve

import services.app
from services.common.settings import Settings
from services.engine.engine import Engine
from services.engine.scheduler import Chunk

STEP_S, SEQUENCE_S, PROMPT_TOKEN_S = 0.04, 0.005, 1 / 2000
IMPORT_PATH = "tests.bench.paced_app:application"


def step_s(chunks: Sequence[Chunk]) -> float:
    """A step's time: fixed, for each sequence, for each token of a prompt."""
    num_prompt_tokens = sum(chunk.num_tokens for chunk in chunks if chunk.num_tokens > 1)
    return STEP_S + SEQUENCE_S * len(chunks) + PROMPT_TOKEN_S * num_prompt_tokens


def pace(engine: Engine) -> None:
    """Stretches the engine's steps from now on."""
    run = engine._runner.run

    def paced(chunks: Any) -> Any:
        ends_s = time.perf_counter() + step_s(chunks)
        logits = run(chunks)
        time.sleep(max(ends_s - time.perf_counter(), 0.0))
        return logits

    engine._runner.run = paced  # type: ignore[method-assign]


def set_niceness(pid: int, niceness: int) -> None:
    """Of all threads of a process. Raises PermissionError: only root may raise a priority."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)


def paced(deployment: Any) -> Any:
    """The deployment with a paced engine."""
    original = deployment.func_or_class

    class Paced(original):  # type: ignore[misc, valid-type]
        async def __init__(self, *args: Any) -> None:
            await super().__init__(*args)
            pace(self._runtime.engine)
            set_niceness(os.getpid(), 0)

    return deployment.options(func_or_class=Paced)


def application(args: dict[str, Any]) -> serve.Application:
    """As services.app:resolved_application."""
    services.app.PrefillDeployment = paced(services.app.PrefillDeployment)
    services.app.DecodeDeployment = paced(services.app.DecodeDeployment)
    return services.app.build_app(Settings.from_mapping(args, {}))
