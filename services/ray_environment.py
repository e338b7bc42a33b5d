"""Variables that Ray, Serve and NIXL read when they are imported or when their processes start: set before both.

Nothing here imports Ray. What the user has set stays, but for what would break the hand-over of KV blocks.
"""

from __future__ import annotations

import secrets
from collections.abc import MutableMapping
from pathlib import Path

from services.common.errors import InvalidSettings

# Serve then sends calls, and the references to KV blocks in them, in a way that loses the references' metadata.
_BREAKS_TRANSFER = ("RAY_SERVE_USE_GRPC_BY_DEFAULT", "RAY_SERVE_THROUGHPUT_OPTIMIZED")
_PACKAGE_PARENT = str(Path(__file__).resolve().parents[1])


def prepare_environment(environment: MutableMapping[str, str]) -> None:
    """Fills in what is missing: loopback only, a token for Ray's ports, one thread a worker, direct GPU copies.

    Raises InvalidSettings if a variable is set that cannot be served with.
    """
    check_environment(environment)
    defaults = {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # stay on 127.0.0.1
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_SERVE_LOG_TO_STDERR": "0",  # Serve's logs stay in Ray's folder; ours go to stderr
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
        "RAY_SERVE_QUEUE_LENGTH_RESPONSE_DEADLINE_S": "1.0",  # 0.1 s is missed on a busy machine
        "UCX_CUDA_IPC_ENABLE_GET_ZCOPY": "on",  # eighty times the speed where UCX sees no NVLink
        "OMP_NUM_THREADS": "1",
    }
    for name, value in defaults.items():
        environment.setdefault(name, value)
    folders = [_PACKAGE_PARENT, *filter(None, environment.get("PYTHONPATH", "").split(":"))]
    environment["PYTHONPATH"] = ":".join(dict.fromkeys(folders))  # workers import the package from here


def check_environment(environment: MutableMapping[str, str]) -> None:
    """Raises InvalidSettings if KV blocks could not be handed over under these variables."""
    for name in _BREAKS_TRANSFER:
        if environment.get(name, "0") not in ("", "0"):
            raise InvalidSettings(f"{name} must not be set: KV blocks cannot be handed over then")
