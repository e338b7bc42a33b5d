"""Who reaches what: the NetworkPolicies are evaluated for every kind of sender, pod and port, both ways."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.manifests.model import DEPLOYMENTS, Cluster, Doc, Finding, Pod, matches

NAMESPACE = "antiphon"
_REDIS_PORT = 6379
_RAY_PORT = 10002  # any of those on which Ray's workers listen
_DASHBOARD_PORT = 8265
_DNS_PORT = 53


@dataclass(frozen=True)
class Peer:
    """One end of a connection. namespace None: outside the cluster, at `address`."""

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    namespace: str | None = NAMESPACE
    address: str = ""


INTERNET = Peer("the internet", namespace=None, address="203.0.113.7")
STRANGER = Peer("a pod of another namespace", {"app": "other"}, "other")
NEIGHBOUR = Peer("another pod of the namespace", {"app": "other"})
MONITORING = Peer("monitoring", {"app.kubernetes.io/name": "prometheus"}, "monitoring")
OPERATOR = Peer("the operator", {"app.kubernetes.io/name": "kuberay-operator"}, "kuberay-system")
DNS = Peer("the cluster's DNS", {"k8s-app": "kube-dns"}, "kube-system")


def ingress(cluster: Cluster) -> Iterator[Finding]:
    """network: what must be reached is, and nothing else."""
    settings = cluster.settings
    if settings is None:
        return
    gateway, ray = cluster.pod_of("gateway"), [_peer(pod) for pod in cluster.ray_pods]
    redis = [_peer(pod) for pod in cluster.pods if not pod.is_ray]
    outside = [INTERNET, STRANGER, NEIGHBOUR, MONITORING, OPERATOR, *redis]
    for pod in cluster.pods:
        ports = {*cluster.listening(pod), *({_RAY_PORT} if pod.is_ray else ())}
        for port in sorted(ports):
            allowed = {peer.name for peer in ray}
            if pod is gateway and port == settings.gateway.port:
                allowed |= {peer.name for peer in outside}
            if pod.is_ray and port in (8080, settings.telemetry.metrics_port):
                allowed |= {MONITORING.name}
            if pod.name == "headgroup" and port in (_DASHBOARD_PORT, 8000):
                allowed |= {OPERATOR.name}
            yield from _compare(cluster, pod, port, [*outside, *ray], allowed)


def _compare(cluster: Cluster, pod: Pod, port: int, peers: list[Peer], allowed: set[str]) -> Iterator[Finding]:
    for peer in peers:
        is_open = _passes(cluster, _peer(pod), peer, port, "TCP", "ingress")
        if is_open != (peer.name in allowed):
            problem = "reaches" if is_open else "does not reach"
            yield Finding("network", f"{pod.name}:{port}", f"{peer.name} {problem} it")


def egress(cluster: Cluster) -> Iterator[Finding]:
    """egress: pods reach each other, the stores and DNS, and no more; the head also the API server."""
    pods = [_peer(pod) for pod in cluster.ray_pods]
    stores = [_peer(pod) for pod in cluster.pods if not pod.is_ray]
    for pod in cluster.ray_pods:
        sender = _peer(pod)
        wanted = [(peer, _RAY_PORT, "TCP") for peer in pods]
        wanted += [(peer, _REDIS_PORT, "TCP") for peer in stores] + [(DNS, _DNS_PORT, "UDP")]
        for peer, port, protocol in wanted:
            if not _passes(cluster, sender, peer, port, protocol, "egress"):
                yield Finding("egress", pod.name, f"does not reach {peer.name}:{port}")
        if pod.name in DEPLOYMENTS and _passes(cluster, sender, INTERNET, 443, "TCP", "egress"):
            yield Finding("egress", pod.name, "reaches the internet")
        if pod.name == "headgroup" and not _passes(cluster, sender, INTERNET, 6443, "TCP", "egress"):
            yield Finding("egress", pod.name, "the autoscaler does not reach the API server")
    for sender in stores:
        if _passes(cluster, sender, INTERNET, 443, "TCP", "egress"):
            yield Finding("egress", sender.name, "reaches the internet")


def _peer(pod: Pod) -> Peer:
    return Peer(pod.name, pod.labels)


def _passes(cluster: Cluster, pod: Peer, other: Peer, port: int, protocol: str, way: str) -> bool:
    """Whether the policies let a connection in to (ingress) or out of (egress) a pod; without any it passes."""
    policies = [
        doc["spec"]
        for doc in cluster.kinds("NetworkPolicy")
        if matches(doc["spec"]["podSelector"], pod.labels) and way.capitalize() in doc["spec"]["policyTypes"]
    ]
    if not policies:
        return True
    rules = [rule for policy in policies for rule in policy.get(way) or []]
    return any(
        _names(rule, other, "from" if way == "ingress" else "to") and _opens(rule, port, protocol) for rule in rules
    )


def _names(rule: Doc, peer: Peer, key: str) -> bool:
    peers = rule.get(key)
    return not peers or any(_is_meant(each, peer) for each in peers)


def _is_meant(selector: Mapping[str, Any], peer: Peer) -> bool:
    if "ipBlock" in selector:
        cidr = selector["ipBlock"]["cidr"]
        return peer.namespace is None and (cidr in ("0.0.0.0/0", "::/0") or cidr == f"{peer.address}/32")
    if peer.namespace is None:
        return False
    namespace = {"kubernetes.io/metadata.name": peer.namespace}
    if "namespaceSelector" in selector:
        is_there = matches(selector["namespaceSelector"], namespace)
    else:
        is_there = peer.namespace == NAMESPACE
    return is_there and ("podSelector" not in selector or matches(selector["podSelector"], peer.labels))


def _opens(rule: Doc, port: int, protocol: str) -> bool:
    ports = rule.get("ports")
    if not ports:
        return True
    return any(
        each.get("protocol", "TCP") == protocol and ("port" not in each or each["port"] == port) for each in ports
    )


CHECKS = (ingress, egress)
