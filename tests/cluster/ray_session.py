"""A Ray cluster of one small node for tests: on loopback, in its own short folder, gone afterwards.

Import this before `ray`: some of the variables are read when Ray is imported. It imports Ray Serve without the warnings
that it gives about itself, which our tests would take for errors.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_ROOT = Path(__file__).parents[2]
# What the pods of a cluster offer, each for its deployment (deploy/serve/cluster.yaml): here one machine offers it all.
PLACES = dict.fromkeys(("gateway", "tokenizer", "prefill", "decode"), 8)
_ENVIRONMENT = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",  # stay on 127.0.0.1
    "RAY_AUTH_MODE": "token",  # Ray may turn it on by itself, depending on the home folder
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # the behaviour to come; unset, Ray warns
    "OMP_NUM_THREADS": "1",
}
for name, value in _ENVIRONMENT.items():
    os.environ.setdefault(name, value)
# Workers import the tests and the package from here.
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import ray
    import ray.serve


@contextmanager
def local_ray(num_cpus: int = 2, object_store_bytes: int = 100 * 2**20) -> Iterator[None]:
    """A running Ray of one node; joins the one that this process has started already."""
    if ray.is_initialized():
        yield
        return
    # Short: Ray's socket paths have to stay below 107 bytes.
    temp_dir = tempfile.mkdtemp(prefix="ray-", dir="/tmp")
    try:
        ray.init(
            num_cpus=num_cpus,
            resources=PLACES,
            object_store_memory=object_store_bytes,
            include_dashboard=False,
            log_to_driver=False,
            _temp_dir=temp_dir,
            _node_ip_address="127.0.0.1",
        )
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(temp_dir, ignore_errors=True)
