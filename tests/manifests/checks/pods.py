"""Each pod by itself: image, resources, rights, labels, probes, ports."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.manifests.model import DEPLOYMENTS, Cluster, Doc, Finding, Pod

_PINNED = re.compile(r"^[a-z0-9][\w./:-]*?(:\d+\.\d+\.\d+[\w.-]*|@sha256:[0-9a-f]{64})$")
_SECRET_NAME = re.compile(r"PASSWORD|TOKEN|SECRET|_KEY$", re.IGNORECASE)
_SECRET_TEXT = re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY|\b[0-9a-f]{40,}\b|://[^\s/:@]*:[^\s/@]+@")
_HTTP_PATHS = {"/api/healthz", "/-/healthz", "/metrics"}
_ALLOWED_TO_ADD = {"IPC_LOCK"}


def images(cluster: Cluster) -> Iterator[Finding]:
    """image: an exact version or a digest."""
    options = cluster.ray.get("autoscalerOptions") or {}
    named = [(pod.name, each.get("image", "")) for pod in cluster.pods for each in pod.containers]
    named += [("autoscaler", options["image"])] if "image" in options else []
    for name, image in named:
        if not _PINNED.match(image):
            yield Finding("image", name, f"{image!r} is not pinned")


def resources(cluster: Cluster) -> Iterator[Finding]:
    """resources: requests for CPU and memory, and a limit of memory that is what was requested."""
    options = cluster.ray.get("autoscalerOptions") or {}
    all_containers = [(pod.name, each) for pod in cluster.pods for each in pod.containers] + [("autoscaler", options)]
    for name, container in all_containers:
        requests = (container.get("resources") or {}).get("requests") or {}
        limits = (container.get("resources") or {}).get("limits") or {}
        if not {"cpu", "memory"} <= set(requests) or "memory" not in limits:
            yield Finding("resources", name, "requests of cpu and memory and a limit of memory are needed")
        elif name not in _may_burst(cluster) and requests["memory"] != limits["memory"]:
            yield Finding("resources", name, "the limit of memory differs from the request: it ends others first")


def _may_burst(cluster: Cluster) -> set[str]:
    """On a laptop the pods share what there is."""
    return {pod.name for pod in cluster.pods} if cluster.name == "cpu-demo" else set()


def security(cluster: Cluster) -> Iterator[Finding]:
    """security: what the namespace's `restricted` level asks for, and a root file system that is read-only."""
    level = next(cluster.kinds("Namespace"))["metadata"]["labels"].get("pod-security.kubernetes.io/enforce")
    options = cluster.ray.get("autoscalerOptions") or {}
    for pod in cluster.pods:
        context = pod.spec.get("securityContext") or {}
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield Finding("security", pod.name, "runAsNonRoot and a user are needed")
        if (context.get("seccompProfile") or {}).get("type") != "RuntimeDefault":
            yield Finding("security", pod.name, "seccompProfile RuntimeDefault is needed")
        if {"hostNetwork", "hostPID", "hostIPC"} & {key for key, value in pod.spec.items() if value}:
            yield Finding("security", pod.name, "shares a namespace with its machine")
        if any("hostPath" in volume for volume in pod.spec.get("volumes") or []):
            yield Finding("security", pod.name, "mounts a path of its machine")
        for container in pod.containers:
            yield from _locked(pod.name, container, level)
    yield from _locked("autoscaler", options, level)


def _locked(name: str, container: Doc, level: str | None) -> Iterator[Finding]:
    context = container.get("securityContext") or {}
    capabilities = context.get("capabilities") or {}
    if context.get("allowPrivilegeEscalation") is not False or context.get("privileged"):
        yield Finding("security", name, "allowPrivilegeEscalation must be false")
    if not context.get("readOnlyRootFilesystem"):
        yield Finding("security", name, "readOnlyRootFilesystem is needed")
    if capabilities.get("drop") != ["ALL"]:
        yield Finding("security", name, "all capabilities must be dropped")
    added = set(capabilities.get("add") or [])
    if added - _ALLOWED_TO_ADD:
        yield Finding("security", name, f"adds {sorted(added - _ALLOWED_TO_ADD)}")
    if added and level != "privileged":
        yield Finding("security", name, f"the namespace's level {level} refuses {sorted(added)}")


def accounts(cluster: Cluster) -> Iterator[Finding]:
    """account: an account of its own, no token unless the autoscaler's, no rights granted here."""
    for pod in cluster.pods:
        account = cluster.named("ServiceAccount", pod.spec.get("serviceAccountName", ""))
        if account is None or account.get("automountServiceAccountToken") is not False:
            yield Finding("account", pod.name, "a ServiceAccount with automountServiceAccountToken: false is needed")
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield Finding("account", pod.name, "automountServiceAccountToken must be false")
        for volume in pod.spec.get("volumes") or []:
            sources = (volume.get("projected") or {}).get("sources") or []
            mounted = any(each["name"] == volume["name"] for each in pod.main.get("volumeMounts") or [])
            if mounted and any("serviceAccountToken" in source for source in sources):
                yield Finding("account", pod.name, "replicas can use the API server's token")
    for doc in cluster.kinds("Role", "ClusterRole", "RoleBinding", "ClusterRoleBinding"):
        yield Finding("account", f"{doc['kind']}/{doc['metadata']['name']}", "KubeRay grants what is needed itself")


def labels(cluster: Cluster) -> Iterator[Finding]:
    """label: what selectors go by."""
    for pod in cluster.pods:
        component = pod.labels.get("app.kubernetes.io/component")
        wanted = {"headgroup": "head"}.get(pod.name, pod.name)
        if pod.labels.get("app.kubernetes.io/part-of") != "antiphon" or component != wanted:
            yield Finding("label", pod.name, f"component must be {wanted}, part-of antiphon")
    for group in cluster.groups:
        if group["groupName"] in DEPLOYMENTS and group.get("labels") != {"antiphon-role": group["groupName"]}:
            yield Finding("label", group["groupName"], "Ray's label antiphon-role must be the group's name")


def probes(cluster: Cluster) -> Iterator[Finding]:
    """probe: at a port that somebody listens on, by a protocol that is spoken there."""
    for pod in cluster.pods:
        if pod.name != "headgroup" and "readinessProbe" not in pod.main:
            yield Finding("probe", pod.name, "a readinessProbe is needed: the operator's own asks for a proxy")
        for key in ("readinessProbe", "livenessProbe", "startupProbe"):
            probe = pod.main.get(key)
            if probe is not None:
                yield from _probe(cluster, pod, key, probe)
    pod = cluster.pod_of("gateway")
    probe = (pod.main.get("readinessProbe") or {}) if pod else {}
    if pod and cluster.settings and _number(pod, probe) != cluster.settings.gateway.port:
        yield Finding("probe", pod.name, "a gateway is ready when its own port is")


def _probe(cluster: Cluster, pod: Pod, key: str, probe: Doc) -> Iterator[Finding]:
    if "exec" in probe:
        return
    number = _number(pod, probe)
    if number not in cluster.listening(pod):
        yield Finding("probe", pod.name, f"{key}: nobody listens on port {number}")
    if "httpGet" in probe and probe["httpGet"].get("path") not in _HTTP_PATHS:
        yield Finding("probe", pod.name, f"{key}: nobody answers at {probe['httpGet'].get('path')}")
    if "grpc" in probe and cluster.settings and cluster.settings.gateway.tls:
        yield Finding("probe", pod.name, f"{key}: Kubernetes' gRPC probe speaks no TLS")


def _number(pod: Pod, probe: Doc) -> int | None:
    for kind in ("grpc", "httpGet", "tcpSocket"):
        if kind in probe:
            return pod.port(probe[kind]["port"])
    return None


def ports(cluster: Cluster) -> Iterator[Finding]:
    """port: what is declared is listened on."""
    for pod in cluster.pods:
        listening = cluster.listening(pod)
        for container in pod.containers:
            for port in container.get("ports") or []:
                if port["containerPort"] not in listening:
                    yield Finding("port", pod.name, f"nobody listens on {port.get('name')} {port['containerPort']}")


def draining(cluster: Cluster) -> Iterator[Finding]:
    """drain: a gateway that ends lets its turns end, Serve moves an engine's replica; both get the time for it."""
    for name, words in {"gateway": [], "prefill": ["--replica"], "decode": ["--replica"]}.items():
        pod = cluster.pod_of(name)
        if pod is not None:
            yield from _drains(pod, ["python", "-m", "services.drain", *words, "--timeout"])


def _drains(pod: Pod, wanted: list[str]) -> Iterator[Finding]:
    hook = ((pod.main.get("lifecycle") or {}).get("preStop") or {}).get("exec") or {}
    command = hook.get("command") or []
    if command[:-1] != wanted:
        yield Finding("drain", pod.name, f"a preStop hook is needed: {' '.join(wanted)} SECONDS")
        return
    wait_s = float(command[-1])
    if pod.spec.get("terminationGracePeriodSeconds", 30) < wait_s + 30:
        yield Finding("drain", pod.name, "the pod is killed before its preStop hook has ended")


def secrets(cluster: Cluster) -> Iterator[Finding]:
    """secret: none is in the tree, by kind, by name or by look."""
    for doc in cluster.kinds("Secret"):
        yield Finding("secret", f"Secret/{doc['metadata']['name']}", "secrets are made in the cluster, not kept here")
    options = cluster.ray.get("autoscalerOptions") or {}
    all_containers = [(pod.name, each) for pod in cluster.pods for each in pod.containers] + [("autoscaler", options)]
    for name, container in all_containers:
        for variable in container.get("env") or []:
            if _SECRET_NAME.search(variable["name"]) and variable.get("value"):
                yield Finding("secret", name, f"{variable['name']} has its value in the tree")
    texts = {f"ConfigMap/{doc['metadata']['name']}": str(doc.get("data")) for doc in cluster.kinds("ConfigMap")}
    texts["serveConfigV2"] = str(cluster.service.get("serveConfigV2"))
    texts["gcsFaultToleranceOptions"] = str(cluster.ray.get("gcsFaultToleranceOptions"))
    password = (cluster.ray.get("gcsFaultToleranceOptions") or {}).get("redisPassword") or {}
    if "value" in password:
        yield Finding("secret", "gcsFaultToleranceOptions", "redisPassword has its value in the tree")
    for where, text in texts.items():
        if _SECRET_TEXT.search(text):
            yield Finding("secret", where, "something in it looks like a secret")


CHECKS = (images, resources, security, accounts, labels, probes, ports, draining, secrets)
