"""A Ray cluster of fake nodes on this machine, with Ray's real autoscaler; other clusters beside it are left alone.

Loopback only, in a short folder of its own, on free ports. Its state can be kept in a Redis server, so that the control
service (GCS) can be killed and started again. Stops what it started, found by its folder, and nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray  # noqa: F401  (brings psutil)

# isort: split
import psutil

HEAD_ID = "f" * 51 + "00000"
HEAD_TYPE = "ray.head.default"  # the autoscaler takes no other name for a head that it has not started
_START_TIMEOUT_S = 90.0


class FakeNodeCluster:
    """head: resources of the head. workers: node types, as Ray's available_node_types. redis_url: keeps Ray's state."""

    def __init__(
        self, head: Mapping[str, float], workers: Mapping[str, Any], *, idle_timeout_s: float, redis_url: str | None
    ) -> None:
        self._temp = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # Ray's socket paths have to stay below 107 bytes
        self.address = f"127.0.0.1:{_free_port()}"
        self._head = dict(head)
        self._workers = dict(workers)
        self._idle_timeout_s = idle_timeout_s
        self._redis_url = redis_url

    def __enter__(self) -> FakeNodeCluster:
        config = Path(self._temp, "autoscaler.json")
        config.write_text(json.dumps(self._autoscaler_config()))
        log = Path(self._temp, "start.log")
        with log.open("wb") as output:
            process = subprocess.run(
                self._command(config),
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=_START_TIMEOUT_S,
                check=False,
            )
        if process.returncode:
            self.__exit__()
            raise RuntimeError("the head did not start")
        return self

    def __exit__(self, *_: object) -> None:
        for signal_number in (signal.SIGTERM, signal.SIGKILL, signal.SIGKILL):
            processes = self.processes()
            for each in processes:
                try:
                    each.send_signal(signal_number)
                except psutil.Error:
                    continue
            psutil.wait_procs(processes, timeout=4)
        shutil.rmtree(self._temp, ignore_errors=True)

    def processes(self) -> list[psutil.Process]:
        """Of this cluster, with all that they have started."""
        roots = []
        for each in psutil.process_iter(["cmdline"]):
            words = " ".join(each.info["cmdline"] or [])
            if f"{self._temp}/" in words or self.address in words:
                roots.append(each)
        found = {each.pid: each for each in roots}
        for each in roots:
            try:
                found |= {child.pid: child for child in each.children(recursive=True)}
            except psutil.Error:
                continue
        found.pop(os.getpid(), None)
        return list(found.values())

    def control_service(self) -> psutil.Process:
        """The GCS."""
        return next(each for each in self.processes() if "gcs_server" in each.name())

    def logs(self) -> Path:
        """Of all processes."""
        return Path(self._temp, "session_latest", "logs")

    def _command(self, config: Path) -> list[str]:
        head = dict(self._head)
        command = [
            str(Path(sys.executable).parent / "ray"), "start", "--head",
            "--node-ip-address=127.0.0.1", f"--port={self.address.rpartition(':')[2]}",
            f"--temp-dir={self._temp}", f"--autoscaling-config={config}", "--disable-usage-stats",
            "--include-dashboard=false", "--object-store-memory=100000000", f"--num-cpus={head.pop('CPU', 0)}",
            f"--resources={json.dumps(head)}",
        ]  # fmt: skip
        if self._redis_url is not None:
            command.append(f"--redis-password={urlsplit(self._redis_url).password or ''}")
        return command

    def _environment(self) -> dict[str, str]:
        environment = os.environ | {
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
            "RAY_enable_autoscaler_v2": "1",
            "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
            "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID,
            "RAY_FAKE_CLUSTER": "1",
            "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        }
        if self._redis_url is not None:
            url = urlsplit(self._redis_url)
            environment["RAY_REDIS_ADDRESS"] = f"{url.hostname}:{url.port}"
        return environment

    def _autoscaler_config(self) -> dict[str, Any]:
        commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
        return {
            "cluster_name": "fake",
            "max_workers": sum(each["max_workers"] for each in self._workers.values()),
            "head_node_type": HEAD_TYPE,
            "provider": {
                "type": "external",
                "module": "tests.cluster.fake_node_provider.LoopbackNodeProvider",
                "use_node_id_as_ip": True,
                "disable_node_updaters": True,
                "disable_launch_config_check": True,
                "gcs_address": self.address,
                "launch_multiple": True,
                "head_node_id": HEAD_ID,
            },
            "available_node_types": {
                **self._workers,
                HEAD_TYPE: {"resources": self._head, "node_config": {}, "max_workers": 0},
            },
            "auth": {},
            "docker": {},
            "upscaling_speed": 1.0,
            "idle_timeout_minutes": self._idle_timeout_s / 60,
            "file_mounts": {},
            "cluster_synced_files": [],
            "file_mounts_sync_continuously": False,
            "rsync_exclude": [],
            "rsync_filter": [],
            **{f"{name}_commands": [] for name in commands},
        }


def restart(process: psutil.Process, down_s: float) -> None:
    """Kills a process and starts it again, after a while, as it was started before."""
    command, environment, folder = process.cmdline(), process.environ(), process.cwd()
    process.kill()
    time.sleep(down_s)
    subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
