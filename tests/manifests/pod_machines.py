"""An overlay's pods as KubeRay would start them, on namespaces of this machine; what comes of it, as JSON.

    unshare --net --mount --pid --fork --kill-child --mount-proc python -m tests.manifests.pod_machines OVERLAY

What is played: KubeRay's `ray start` lines and variables, its PUT of serveConfigV2, kubelet's probes, the preStop
hooks; of the autoscaler (it needs an API server), that a pod comes for a replica without one. What is not: the
scheduler, NetworkPolicies.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import yaml
from grpc_health.v1 import health_pb2, health_pb2_grpc

from services.client import AsyncClient
from services.common.messages import Delta
from services.common.sampling import SamplingParams
from services.common.settings import Settings
from tests.manifests.kustomize import K8S, build
from tests.manifests.machines import Machine, image_environment, prepare
from tests.manifests.model import AGENT_PORT, Cluster, Pod
from tests.manifests.moving import move_away
from tests.manifests.stores import make_secrets

_TIMEOUT_S = 240.0


class Pods:
    """All machines of an overlay, with what its operator knows."""

    def __init__(self, overlay: str) -> None:
        self.cluster = Cluster(overlay, build(K8S / "overlays" / overlay))
        self.secrets = {doc["metadata"]["name"]: doc["stringData"] for doc in yaml.safe_load_all(make_secrets().stdout)}
        prepare()
        pods = list(enumerate(self._all_pods()))
        self.machines = [Machine(number, pod, self.cluster, self.secrets) for number, pod in pods]
        self.hosts = {"head": self.of("headgroup")[0].address}
        self.hosts |= {each.pod.name: each.address for each in self.machines if not each.pod.is_ray}
        self.token = self.secrets["antiphon-ray"]["auth_token"]

    def _all_pods(self) -> Iterator[Pod]:
        for pod in self.cluster.pods:
            yield from [pod] * pod.least

    def of(self, name: str) -> list[Machine]:
        return [each for each in self.machines if each.pod.name == name]

    def environment(self, machine: Machine) -> dict[str, str]:
        """The image's, the pod's, and what KubeRay adds."""
        if not machine.pod.is_ray:
            return {"PATH": image_environment()["PATH"]}
        variables = image_environment() | self.cluster.environment
        variables |= {
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": self.token,
            "RAY_ADDRESS": f"{self.hosts['head']}:6379",
        }
        if machine.pod.name == "headgroup":
            options = self.cluster.ray["gcsFaultToleranceOptions"]
            variables |= {
                "RAY_REDIS_ADDRESS": options["redisAddress"],
                "RAY_external_storage_namespace": "test",
                "REDIS_USERNAME": options["redisUsername"]["value"],
                "REDIS_PASSWORD": self.secrets["gcs-redis"]["password"],
                "RAY_ADDRESS": "127.0.0.1:6379",
            }
        return variables

    def command(self, machine: Machine) -> str:
        """KubeRay's `ray start`, or the store's own command."""
        pod = machine.pod
        if not pod.is_ray:
            return "exec " + " ".join(pod.main["command"])
        head = self.cluster.ray["headGroupSpec"]
        group = next((each for each in self.cluster.groups if each["groupName"] == pod.name), head)
        options = {"block": "", "metrics-export-port": "8080", "dashboard-agent-listen-port": str(AGENT_PORT)}
        options |= {"num-cpus": "1", **group["rayStartParams"]}
        if group is head:
            options |= {"head": "", "dashboard-host": "0.0.0.0", "no-monitor": ""}
            options |= {"redis-username": "$REDIS_USERNAME", "redis-password": "$REDIS_PASSWORD"}
        else:
            offered = {name: float(amount) for name, amount in group["resources"].items()}
            labels = ",".join(f"{key}={value}" for key, value in group["labels"].items())
            # By address: gRPC's own resolver asks DNS, which is not played.
            options |= {
                "address": f"{self.hosts['head']}:6379",
                "resources": f"'{json.dumps(offered)}'",
                "labels": labels,
            }
        line = " ".join(f"--{key}={value}" if value else f"--{key}" for key, value in options.items())
        return f"ulimit -n 65536; exec ray start {line}"

    def start(self, *names: str) -> None:
        for machine in [each for each in self.machines if each.pod.name in names]:
            machine.start(self.command(machine), self.environment(machine), self.hosts)

    def add(self, name: str) -> None:
        """One more pod of a group, running."""
        machine = Machine(len(self.machines), self.of(name)[0].pod, self.cluster, self.secrets)
        self.machines.append(machine)
        machine.start(self.command(machine), self.environment(machine), self.hosts)

    def hook(self, machine: Machine) -> int:
        """Runs the pod's preStop hook; its exit status."""
        command = machine.pod.main["lifecycle"]["preStop"]["exec"]["command"]
        return machine.run(command, self.environment(machine))

    def is_ready(self, machine: Machine) -> bool:
        """As kubelet asks; the head, for which KubeRay adds the probe, by Ray's agent."""
        probe = machine.pod.main.get("readinessProbe") or {"httpGet": {"path": "/api/healthz", "port": AGENT_PORT}}
        if "exec" in probe:
            return machine.run(probe["exec"]["command"], self.environment(machine)) == 0
        if "grpc" in probe:
            return _serves(f"{machine.address}:{probe['grpc']['port']}")
        return self.get(machine, probe["httpGet"]["port"], probe["httpGet"]["path"]) is not None

    def get(self, machine: Machine, port: int, path: str, **request: Any) -> str | None:
        """The body of an HTTP answer, None if there is none or it is an error."""
        headers = {"Content-Type": "application/json", "Authorization": f"Bearer {self.token}"}
        asked = urllib.request.Request(f"http://{machine.address}:{port}{path}", headers=headers, **request)
        try:
            with urllib.request.urlopen(asked, timeout=10) as answer:
                return str(answer.read().decode())
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            return None

    def scraped(self, machine: Machine) -> list[str]:
        """Names of the ports that answer a scraper."""
        ports = machine.pod.named_ports.items()
        return sorted(name for name, port in ports if name.endswith("metrics") and self.get(machine, port, "/metrics"))

    def deployments(self) -> dict[str, Any] | None:
        """What Serve says of them; None while it says nothing. One that cannot start ends it all, in its own words."""
        answer = self.get(self.of("headgroup")[0], 8265, "/api/serve/applications/")
        application = json.loads(answer or "{}").get("applications", {}).get("antiphon")
        if application is None:
            return None
        found: dict[str, Any] = application["deployments"]
        if application["status"] == "DEPLOY_FAILED":
            raise SystemExit("\n".join(f"{name}: {each['message'][-2000:]}" for name, each in found.items()))
        return found

    def until(self, what: str, condition: Callable[[], bool]) -> None:
        """Waits; shows what the pods have said if it takes too long, or one has ended."""
        deadline_s = time.monotonic() + _TIMEOUT_S
        while not condition():
            ended = [each.name for each in self.machines if each.log.exists() and not each.is_running]
            if ended or time.monotonic() > deadline_s:
                for machine in self.machines:
                    if machine.log.exists():
                        print(f"--- {machine.name}\n{machine.log.read_text(errors='replace')[-1500:]}", file=sys.stderr)
                raise SystemExit(f"{what}: not in time; ended: {ended}")
            time.sleep(1)


def _serves(target: str) -> bool:
    with grpc.insecure_channel(target) as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=3)
        except grpc.RpcError:
            return False
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def talk(target: str, token: str) -> int:
    """Tokens of two turns of one session."""
    num_tokens = 0
    async with AsyncClient(target, token=token) as client:
        session = await client.create_session()
        for line in ("Tell me a story.", "And then?"):
            async for event in session.chat(line, sampling=SamplingParams(temperature=0.0, max_tokens=16)):
                num_tokens += len(event.token_ids) if isinstance(event, Delta) else 0
    return num_tokens


def bring_up(pods: Pods) -> None:
    """Stores, head, groups, application: each when the one before is ready, as the operator and init containers do."""
    (head,) = pods.of("headgroup")
    stores = [each for each in pods.machines if not each.pod.is_ray]
    pods.start(*{each.pod.name for each in stores})
    pods.until("stores", lambda: all(map(pods.is_ready, stores)))
    pods.start("headgroup")
    pods.until("head", lambda: pods.is_ready(head))
    pods.start(*(group["groupName"] for group in pods.cluster.groups))
    config, path = json.dumps(pods.cluster.serve_config).encode(), "/api/serve/applications/"
    pods.until("application", lambda: pods.get(head, 8265, path, data=config, method="PUT") is not None)
    pods.until("readiness", lambda: pods.deployments() is not None and all(map(pods.is_ready, pods.machines)))


def observe(pods: Pods, settings: Settings) -> dict[str, Any]:
    """A conversation, and what the tests want to know afterwards."""
    (gateway,) = pods.of("gateway")
    token = yaml.safe_load(pods.secrets["antiphon-tenants"]["tokens.yaml"])["demo"]
    num_tokens = asyncio.run(talk(f"{gateway.address}:{settings.gateway.port}", token))
    running = (pods.deployments() or {}).items()
    placed = {name: sorted(each["node_ip"] for each in found["replicas"]) for name, found in running}
    return {
        "num_tokens": num_tokens,
        "placed": placed,
        "pods": {group: [each.address for each in pods.of(group)] for group in placed},
        "metrics": {each.name: pods.scraped(each) for each in pods.machines if each.pod.is_ray},
        "logged": {each.name: '"level": "INFO"' in each.log.read_text(errors="replace") for each in pods.of("gateway")},
        "moved": asyncio.run(move_away(pods, f"{gateway.address}:{settings.gateway.port}", token)),
        "drained": pods.hook(gateway),
    }


def main() -> int:
    """Entry point: plays an overlay through and prints what was seen."""
    pods = Pods(sys.argv[1])
    assert pods.cluster.settings is not None
    bring_up(pods)
    print(json.dumps(observe(pods, pods.cluster.settings)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
