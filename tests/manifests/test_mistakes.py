"""Mistakes planted into manifests that are right: each is found, by the rule that is there for it."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.manifests.checks import check
from tests.manifests.checks.schemas import WHY_NO_CRDS, has_crds
from tests.manifests.kustomize import K8S, build
from tests.manifests.model import Cluster, Doc
from tests.manifests.sources import check_sources

pytestmark = pytest.mark.timeout(120)


@lru_cache
def built(overlay: str) -> list[Doc]:
    return build(K8S / overlay)


class Planted:
    """The documents of an overlay, to spoil one of."""

    def __init__(self, overlay: str) -> None:
        self.docs = copy.deepcopy(built(overlay))

    def doc(self, kind: str, name: str) -> Doc:
        return next(each for each in self.docs if each["kind"] == kind and each["metadata"]["name"].startswith(name))

    @property
    def ray(self) -> Doc:
        cluster: Doc = self.doc("RayService", "antiphon")["spec"]["rayClusterConfig"]
        return cluster

    def group(self, name: str) -> Doc:
        return next(each for each in self.ray["workerGroupSpecs"] if each["groupName"] == name)

    def container(self, group: str) -> Doc:
        found: Doc = self.group(group)["template"]["spec"]["containers"][0]
        return found

    def settings(self, **variables: str) -> None:
        self.doc("ConfigMap", "settings")["data"].update(variables)

    def serve(self, change: Callable[[Any], None]) -> None:
        spec = self.doc("RayService", "antiphon")["spec"]
        document = yaml.safe_load(spec["serveConfigV2"])
        change(document)
        spec["serveConfigV2"] = yaml.safe_dump(document)

    def policy(self, name: str) -> Doc:
        spec: Doc = self.doc("NetworkPolicy", name)["spec"]
        return spec


Mistake = Callable[[Planted], object]

# What is planted, the rule that has to find it, and how.
MISTAKES: dict[str, tuple[str, Mistake]] = {
    "a Service leads to a port name that no pod has": (
        "service",
        lambda p: p.doc("Service", "antiphon")["spec"]["ports"][0].update(targetPort="grcp"),
    ),
    "a Service selects no pod": (
        "service",
        lambda p: p.doc("Service", "antiphon")["spec"]["selector"].update({"app.kubernetes.io/component": "gatway"}),
    ),
    "clear-text gRPC is not announced": (
        "service",
        lambda p: p.doc("Service", "antiphon")["spec"]["ports"][0].pop("appProtocol"),
    ),
    "a pod's label is misspelt": (
        "label",
        lambda p: p.group("decode")["template"]["metadata"]["labels"].update({"app.kubernetes.io/component": "decod"}),
    ),
    "a container has no limit of memory": ("resources", lambda p: p.container("decode")["resources"].pop("limits")),
    "a field that KubeRay does not know": ("crd", lambda p: p.group("decode").update(maxReplica=3)),
    "a field that Kubernetes does not know": (
        "schema",
        lambda p: p.policy("deny-all").update(policyType=["Ingress"]),
    ),
    "a head service with a name": (
        "operator",
        lambda p: p.ray["headGroupSpec"].update(headService={"metadata": {"name": "mine"}}),
    ),
    "Redis variables beside gcsFaultToleranceOptions": (
        "operator",
        lambda p: p.ray["headGroupSpec"]["template"]["spec"]["containers"][0].update(
            env=[{"name": "RAY_REDIS_ADDRESS", "value": "gcs-redis:6379"}]
        ),
    ),
    "an import path that leads nowhere": (
        "import-path",
        lambda p: p.serve(lambda d: d["applications"][0].update(import_path="services.app:aplication")),
    ),
    "a field that Serve does not know": (
        "serve-config",
        lambda p: p.serve(lambda d: d.update(proxy_locaton="HeadOnly")),
    ),
    "a misspelt setting": (
        "settings",
        lambda p: p.serve(lambda d: d["applications"][0]["args"]["decode"].update(num_replica=2)),
    ),
    "a misspelt setting of an overlay": ("settings", lambda p: p.settings(ANTIPHON__GATEWAY__PROT="9001")),
    "a policy that reads other settings": (
        "scaling",
        lambda p: p.serve(
            lambda d: d["applications"][0]["autoscaling_policy"]["policy_kwargs"].update(settings={"decode": {}})
        ),
    ),
    "no policy, though the cluster shall scale": (
        "scaling",
        lambda p: p.serve(lambda d: d["applications"][0].pop("autoscaling_policy")),
    ),
    "a floating tag": ("image", lambda p: p.container("prefill").update(image="antiphon:latest")),
    "an image without a tag": (
        "image",
        lambda p: p.doc("StatefulSet", "gcs-redis")["spec"]["template"]["spec"]["containers"][0].update(image="valkey"),
    ),
    "a Secret in the tree": (
        "secret",
        lambda p: p.docs.append(
            {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "gcs-redis"}, "stringData": {"password": "x"}}
        ),
    ),
    "a password as a plain value": (
        "secret",
        lambda p: p.ray["gcsFaultToleranceOptions"].update(redisPassword={"value": "hunter2"}),
    ),
    "a password in a URL": (
        "secret",
        lambda p: p.settings(ANTIPHON__SESSIONS__URL="redis://antiphon:hunter2@sessions-redis:6379/0"),
    ),
    "a budget that matches nothing": (
        "budget",
        lambda p: p.doc("PodDisruptionBudget", "decode")["spec"]["selector"]["matchLabels"].update(
            {"app.kubernetes.io/component": "decoder"}
        ),
    ),
    "a budget that stops every drain": (
        "budget",
        lambda p: p.doc("PodDisruptionBudget", "decode")["spec"].update(minAvailable=2),
    ),
    "a budget by what Ray's pods do not have": (
        "budget",
        lambda p: (
            p.doc("PodDisruptionBudget", "decode")["spec"].pop("minAvailable"),
            p.doc("PodDisruptionBudget", "decode")["spec"].update(maxUnavailable=1),
        ),
    ),
    "a probe at a port that nobody listens on": (
        "probe",
        lambda p: p.container("gateway").update(readinessProbe={"grpc": {"port": 9001}}),
    ),
    "no probe, so the operator's for an HTTP proxy": ("probe", lambda p: p.container("decode").pop("readinessProbe")),
    "a declared port that nobody listens on": (
        "port",
        lambda p: p.container("decode")["ports"].append({"name": "grpc", "containerPort": 9000}),
    ),
    "nothing denies by default": ("egress", lambda p: p.docs.remove(p.doc("NetworkPolicy", "deny-all"))),
    "Ray's ports open to a namespace": (
        "network",
        lambda p: p.policy("ray-among-itself")["ingress"][0]["from"].append({"namespaceSelector": {}}),
    ),
    "clients shut out": (
        "network",
        lambda p: p.policy("clients-to-gateway")["ingress"][0]["ports"][0].update(port=9001),
    ),
    "anybody may speak to the session store": ("network", lambda p: p.policy("ray-to-redis")["ingress"][0].pop("from")),
    "names cannot be resolved": ("egress", lambda p: p.policy("ray-among-itself")["egress"].pop()),
    "a group offers nothing": ("placement", lambda p: p.group("prefill").pop("resources")),
    "a group that grows further than the settings": ("placement", lambda p: p.group("decode").update(maxReplicas=64)),
    "work on the head": ("head", lambda p: p.ray["headGroupSpec"]["rayStartParams"].update({"num-cpus": "4"})),
    "a gateway on loopback": ("reach", lambda p: p.settings(ANTIPHON__GATEWAY__HOST="127.0.0.1")),
    "decode replicas that register an address of their own": (
        "reach",
        lambda p: p.settings(ANTIPHON__DECODE__HOST="0.0.0.0"),
    ),
    "a secret that is not mounted": (
        "files",
        lambda p: p.container("gateway")["volumeMounts"].pop(
            next(i for i, m in enumerate(p.container("gateway")["volumeMounts"]) if m["name"] == "tenants")
        ),
    ),
    "a ConfigMap that does not exist": (
        "reference",
        lambda p: p.container("decode")["envFrom"][0]["configMapRef"].update(name="settings"),
    ),
    "a key that the Secret does not have": (
        "reference",
        lambda p: p.ray["gcsFaultToleranceOptions"]["redisPassword"]["valueFrom"]["secretKeyRef"].update(key="pw"),
    ),
    "sessions in Ray's own store": (
        "store",
        lambda p: p.settings(ANTIPHON__SESSIONS__URL="redis://antiphon@gcs-redis:6379/0"),
    ),
    "a store without a log on disk": (
        "store",
        lambda p: p.doc("ConfigMap", "sessions-redis")["data"].update({"redis.conf": "port 6379\ndir /data\n"}),
    ),
    "Ray without a token": ("auth", lambda p: p.ray.pop("authOptions")),
    "a pod that runs as root": (
        "security",
        lambda p: p.group("decode")["template"]["spec"]["securityContext"].update(runAsUser=0),
    ),
    "a root file system that can be written to": (
        "security",
        lambda p: p.container("decode")["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    "a further capability": (
        "security",
        lambda p: p.container("decode")["securityContext"]["capabilities"].update(add=["SYS_ADMIN"]),
    ),
    "a token of the API server for replicas": (
        "account",
        lambda p: p.group("decode")["template"]["spec"].update(automountServiceAccountToken=True),
    ),
    "a gateway that is killed while it drains": (
        "drain",
        lambda p: p.group("gateway")["template"]["spec"].update(terminationGracePeriodSeconds=30),
    ),
    "a decode replica that Serve does not move away before its pod ends": (
        "drain",
        lambda p: p.container("decode").pop("lifecycle"),
    ),
    "one name twice": ("duplicate", lambda p: p.docs.append(copy.deepcopy(p.doc("Service", "antiphon")))),
}

# Those that only show in a certain overlay.
ELSEWHERE: dict[str, tuple[str, str, Mistake]] = {
    "a PodMonitor at a port that no pod has": (
        "overlays/gpu",
        "monitor",
        lambda p: p.doc("PodMonitor", "antiphon")["spec"]["podMetricsEndpoints"][0].update(port="app-metric"),
    ),
    "a PodMonitor with a field that it does not have": (
        "overlays/gpu",
        "schema",
        lambda p: p.doc("PodMonitor", "antiphon")["spec"].update(podMetricEndpoints=[]),
    ),
    "a replica without a GPU": (
        "overlays/gpu",
        "placement",
        lambda p: p.container("decode")["resources"]["limits"].pop("nvidia.com/gpu"),
    ),
    "the image for CPUs on a GPU": (
        "overlays/gpu",
        "placement",
        lambda p: p.container("decode").update(image="antiphon:0.1.0-cpu"),
    ),
    "weights that are not mounted": (
        "overlays/gpu",
        "files",
        lambda p: p.settings(ANTIPHON__MODEL__PATH="/weights/v2"),
    ),
    "a namespace that refuses what its pods want": (
        "overlays/gpu-rdma",
        "security",
        lambda p: p.doc("Namespace", "antiphon")["metadata"]["labels"].update(
            {"pod-security.kubernetes.io/enforce": "restricted"}
        ),
    ),
    "a gRPC probe at a TLS port": (
        "overlays/tls",
        "probe",
        lambda p: p.container("gateway").update(readinessProbe={"grpc": {"port": 9000}}),
    ),
    "a certificate that nobody issues": (
        "overlays/tls",
        "reference",
        lambda p: p.doc("Certificate", "antiphon-gateway")["spec"].update(secretName="elsewhere"),
    ),
}

NEED_CRDS = {"crd", "operator"}


@pytest.mark.parametrize("what", MISTAKES)
def test_is_found(what: str) -> None:
    rule, plant = MISTAKES[what]
    assert_found("base", rule, plant)


@pytest.mark.parametrize("what", ELSEWHERE)
def test_is_found_in_its_overlay(what: str) -> None:
    overlay, rule, plant = ELSEWHERE[what]
    assert_found(overlay, rule, plant)


def assert_found(overlay: str, rule: str, plant: Mistake) -> None:
    if rule in NEED_CRDS and not has_crds():
        pytest.skip(WHY_NO_CRDS)
    planted = Planted(overlay)
    plant(planted)
    findings = check(Cluster(Path(overlay).name, planted.docs))
    assert rule in {finding.rule for finding in findings}, [str(finding) for finding in findings]


@pytest.fixture
def k8s(tmp_path: Path) -> Path:
    """A copy of the folders that kustomize reads, to spoil."""
    shutil.copytree(K8S, tmp_path / "k8s")
    shutil.copytree(K8S.parent / "deploy", tmp_path / "deploy")
    return tmp_path / "k8s"


def test_an_overlay_that_repeats_a_setting_is_found(k8s: Path) -> None:
    path = k8s / "overlays" / "h200x8" / "kustomization.yaml"
    path.write_text(path.read_text().replace("MEMORY_FRACTION=0.94", "DEVICE=cuda"))
    assert "repeats-base" in {finding.rule for finding in check_sources(k8s)}


def test_an_overlay_that_repeats_a_field_is_found(k8s: Path) -> None:
    path = k8s / "overlays" / "cpu-demo" / "small.yaml"
    path.write_text(path.read_text().replace("- groupName: decode\n", "- groupName: decode\n        minReplicas: 2\n"))
    assert "repeats-base" in {finding.rule for finding in check_sources(k8s)}


def test_a_block_that_is_copied_between_overlays_is_found(k8s: Path) -> None:
    text = (k8s / "overlays" / "gpu" / "gpu.yaml").read_text()
    (k8s / "overlays" / "h200x8" / "h200.yaml").write_text(text)
    assert "copied-block" in {finding.rule for finding in check_sources(k8s)}


def test_a_folder_that_does_not_build_is_found(k8s: Path) -> None:
    (k8s / "overlays" / "gpu" / "gpu.yaml").unlink()
    assert [finding.rule for finding in check_sources(k8s)] == ["kustomize"]
