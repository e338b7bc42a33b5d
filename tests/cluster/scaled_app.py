"""A process that runs the application on a cluster of fake nodes, and says what there is of it; for tests.

    python -m tests.cluster.scaled_app '{"settings": {...}, "head": {...}, "workers": {...}, "gcs_redis": true}'

Reads commands from stdin, a line each, and answers with a line of JSON each: `state`, `restart-gcs SECONDS`, `gcs-pid`,
`decisions`. Ends, and stops everything, when stdin is closed. One process can only be in one Ray cluster, and the one
that runs the tests may be in another.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from services.ray_environment import prepare_environment

prepare_environment(os.environ)
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # Ray writes what it thinks of its nodes to stdout

import ray  # noqa: E402
from ray import serve  # noqa: E402

from services.app import APP_NAME, deployed, session_store  # noqa: E402
from services.common.settings import Settings  # noqa: E402
from services.sessions.embedded import EmbeddedServer  # noqa: E402
from tests.cluster.fake_nodes import FakeNodeCluster, restart  # noqa: E402


@contextlib.contextmanager
def cluster_of(spec: dict[str, Any]) -> Iterator[FakeNodeCluster]:
    """The cluster, and this process in it."""
    with contextlib.ExitStack() as stack:
        redis_url = None
        if spec["gcs_redis"]:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="gcs-"))
            redis_url = stack.enter_context(EmbeddedServer(Path(folder))).url
        cluster = FakeNodeCluster(
            spec["head"], spec["workers"], idle_timeout_s=spec["idle_timeout_s"], redis_url=redis_url
        )
        stack.enter_context(cluster)
        ray.init(address=cluster.address, _node_ip_address="127.0.0.1", log_to_driver=False, logging_level="ERROR")
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # Ray's own handler would leave the servers running
        stack.callback(ray.shutdown)
        yield cluster


def state() -> dict[str, Any]:
    """Living nodes by what they offer, and running replicas by deployment."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    status = serve.status().applications[APP_NAME]
    return {
        "nodes": {name: sum(name in each for each in nodes) for name in ("decode_slot", "prefill_slot")},
        "replicas": {name: each.replica_states.get("RUNNING", 0) for name, each in status.deployments.items()},
    }


def decisions(cluster: FakeNodeCluster) -> list[dict[str, Any]]:
    """What the policy has logged."""
    lines: list[dict[str, Any]] = []
    for path in cluster.logs().glob("worker-*.err"):
        for line in path.read_text(errors="replace").splitlines():
            if '"scaling decision"' in line:
                lines.append(json.loads(line))
    return lines


def answer(command: str, cluster: FakeNodeCluster) -> Any:
    """What a command gives."""
    name, _, argument = command.partition(" ")
    if name == "state":
        return state()
    if name == "restart-gcs":
        # In the background: the one who asks has turns to run meanwhile.
        thread = threading.Thread(target=restart, args=(cluster.control_service(), float(argument)))
        thread.start()
        return {}
    if name == "gcs-pid":
        return cluster.control_service().pid
    assert name == "decisions"
    return decisions(cluster)


def main(spec: dict[str, Any]) -> None:
    """Until stdin ends, or SIGTERM."""
    with (
        session_store(Settings.from_mapping(spec["settings"], {})) as settings,
        cluster_of(spec) as cluster,
        deployed(settings) as gateway,
    ):
        target = gateway.address.remote().result()
        metrics = gateway.metrics_address.remote().result()
        say({"target": target, "metrics": metrics, "settings": settings.model_dump(mode="json")})
        for line in sys.stdin:
            say(answer(line.strip(), cluster))
    say({"left": [each.name() for each in cluster.processes()]})


def say(value: Any) -> None:
    """One line."""
    ANSWERS.write(json.dumps(value) + "\n")
    ANSWERS.flush()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
