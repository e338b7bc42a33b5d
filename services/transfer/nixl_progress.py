"""How often NIXL's own thread looks at its connections.

Each agent has a thread that serves what other agents ask of it, and as it is made by default it never pauses: every
replica takes a core for nothing. NIXL has a knob for the pause but its Python class sets it to zero, so the knob is
turned while the agent is being made.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

log = logging.getLogger(__name__)


@contextmanager
def progress_pauses(pause_us: int) -> Iterator[None]:
    """Agents that this process makes in the block pause for pause_us between looks, 0: not at all.

    NIXL counts in whole milliseconds, rounded up. Where it has changed inside, agents are made as it makes them.
    """
    module = _agent_module()
    bindings = getattr(module, "nixlBind", None)
    config_class = getattr(bindings, "nixlAgentConfig", None)
    if config_class is None or not hasattr(config_class, "pthrDelay"):
        log.warning("the pause of NIXL's thread cannot be set in this version; it may take a core")
        yield
        return

    class PatientConfig(config_class):  # type: ignore[misc,valid-type]
        def __setattr__(self, name: str, value: object) -> None:
            super().__setattr__(name, pause_us if name == "pthrDelay" else value)

    class Bindings:
        nixlAgentConfig = PatientConfig

        def __getattr__(self, name: str) -> Any:
            return getattr(bindings, name)

    module.nixlBind = Bindings()
    try:
        yield
    finally:
        module.nixlBind = bindings


def _agent_module() -> Any:
    """The module that makes agents; which one it is depends on the CUDA that was found."""
    agent_class = importlib.import_module("nixl._api").nixl_agent
    return sys.modules[agent_class.__module__]
