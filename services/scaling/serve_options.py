"""What Serve has to be told so that our policy decides, as plain mappings."""

from __future__ import annotations

from typing import Any

from services.common.settings import Settings
from services.scaling.snapshot import Kind

POLICY = "services.scaling.deployment:ApplicationPolicy"


def replica_options(kind: Kind, settings: Settings) -> dict[str, Any]:
    """Options of a deployment that say how many replicas it has.

    Serve's own delays and factors are out of the way: the windows are the policy's.
    """
    number = getattr(settings, kind.value).num_replicas
    if not settings.autoscaling.enabled:
        return {"num_replicas": number}
    bounds = getattr(settings.autoscaling, kind.value)
    config = {
        "min_replicas": bounds.min,
        "initial_replicas": number,
        "max_replicas": bounds.max,
        "upscale_delay_s": 0.0,
        "downscale_delay_s": 0.0,
    }
    return {"autoscaling_config": config}


def most_replicas(kind: Kind, settings: Settings) -> int:
    """How many there may be at once."""
    if settings.autoscaling.enabled:
        most: int = getattr(settings.autoscaling, kind.value).max
        return most
    number: int = getattr(settings, kind.value).num_replicas
    return number


def serve_config(settings: Settings, app_name: str, import_path: str) -> dict[str, Any]:
    """A Serve config of the application with our policy, which `serve.run` alone cannot be given.

    import_path: of a builder that leaves the environment's overrides alone, because these settings have them.
    """
    args = settings.model_dump(mode="json")
    application = {
        "name": app_name,
        "import_path": import_path,
        "route_prefix": None,
        "args": args,
        "autoscaling_policy": {
            "policy_function": POLICY,
            "policy_kwargs": {"settings": args, "ignores_environment": True},
        },
    }
    return {"proxy_location": "Disabled", "applications": [application]}
