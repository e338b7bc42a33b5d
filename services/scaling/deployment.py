"""The part that Ray Serve calls: an application-level autoscaling policy, in the Serve controller.

    applications:
      - autoscaling_policy:
          policy_function: services.scaling.deployment:ApplicationPolicy
          policy_kwargs: {settings: ...}      the application's args once more (a YAML anchor)

Serve sends this module to its controller as it is (by value), so it holds one class and no state. The controller calls
the policy ten times a second, in the loop that also starts and heals replicas: it must neither wait nor raise.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from typing import Any

from services.common.settings import Settings
from services.common.telemetry import configure_logging
from services.scaling.observer import RegistryObserver
from services.scaling.picture import Picture
from services.scaling.policy import ScalingPolicy
from services.scaling.snapshot import HelperLoad, Kind

log = logging.getLogger(__name__)


class ApplicationPolicy:
    """Loads of prefill and decode come from the registry, those of gateways and tokenizers through Serve.

    settings: the application's; the environment overrides them unless ignores_environment. Raises InvalidSettings.
    While the registry cannot be read, or what was read is older than a replica's registration lasts, nothing changes.
    """

    def __init__(self, settings: Mapping[str, Any], ignores_environment: bool = False) -> None:
        checked = Settings.from_mapping(settings, {} if ignores_environment else None)
        configure_logging(checked.telemetry.log_level, "scaling")
        self._settings = checked.autoscaling
        self._max_age_s = checked.sessions.registry_ttl_s
        self._observer = RegistryObserver(checked.sessions, self._settings.interval_s)
        self._policy = ScalingPolicy(self._settings)
        self._picture = Picture()
        self._decided_s = float("-inf")

    def __call__(self, contexts: Mapping[Any, Any]) -> tuple[dict[Any, int], dict[Any, dict[str, Any]]]:
        """Serve's contexts by deployment to numbers of replicas; a deployment that is left out stays as it is."""
        now_s = time.monotonic()
        if now_s - self._decided_s < self._settings.interval_s:
            return {}, {}
        self._decided_s = now_s
        try:
            return self._decide(now_s, contexts), {}
        except Exception:  # it would stop the controller from healing replicas, which is worse than not scaling
            log.exception("no scaling decision")
            return {}, {}

    def close(self) -> None:
        """Stops reading the registry; so does the end of the policy."""
        self._observer.close()

    def _decide(self, now_s: float, contexts: Mapping[Any, Any]) -> dict[Any, int]:
        observation = self._observer.latest()
        if observation is None or now_s - observation.seen_s > self._max_age_s:
            return {}
        scaled = {Kind(key.name): (key, context) for key, context in contexts.items()}
        targets = {kind: context.target_num_replicas for kind, (_, context) in scaled.items()}
        helpers = {kind: _helper_loads(context) for kind, (_, context) in scaled.items()}
        snapshot = self._picture.snapshot(now_s, targets, observation.records, helpers)
        decisions = self._policy.decide(snapshot)
        return {key: decisions[kind].target for kind, (key, _) in scaled.items()}


def _helper_loads(context: Any) -> list[HelperLoad]:
    """What each replica's record_autoscaling_stats said last."""
    metrics = context.raw_metrics or {}
    cpus, calls = metrics.get("num_cpus", {}), metrics.get("num_calls", {})
    return [
        HelperLoad(series[-1].value, calls[replica][-1].value)
        for replica, series in cpus.items()
        if series and calls.get(replica)
    ]
