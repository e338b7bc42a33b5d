"""Serve's default rule, given what Serve itself cannot see here: turns reach decode by gRPC, not by Serve's calls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from services.common.settings import Settings
from services.scaling.observer import RegistryObserver


class SequencesPolicy:
    """Replicas so that each has target_ongoing_requests sequences, running and waiting. Serve adds its delays."""

    def __init__(self, settings: Mapping[str, Any]) -> None:
        checked = Settings.from_mapping(settings, {})
        self._observer = RegistryObserver(checked.sessions, checked.autoscaling.interval_s)

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, float], dict[Any, dict[str, Any]]]:
        observation = self._observer.latest()
        wanted: dict[Any, float] = {}
        for key, context in contexts.items():
            if observation is None or key.name not in ("prefill", "decode"):
                continue
            records = [each for each in observation.records if each.role.value == key.name]
            num_sequences = sum(each.num_running + each.num_waiting for each in records)
            wanted[key] = max(1.0, num_sequences / context.config.get_target_ongoing_requests())
        return wanted, {}
