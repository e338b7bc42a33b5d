"""Shape: KubeRay's CRDs and its operator's rules, Kubernetes' own kinds, and the few kinds of other operators."""

from __future__ import annotations

import importlib.util
import json
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import Any

import jsonschema
import kubernetes_validate

from tests.manifests.kustomize import ROOT
from tests.manifests.model import Cluster, Doc, Finding

KUBERNETES_VERSION = kubernetes_validate.latest_version()
CRDS = Path(os.environ.get("KUBERAY_CRDS", ROOT.parent / "shared" / "kuberay-1.7"))
WHY_NO_CRDS = f"KubeRay's schemas are not at {CRDS}: set KUBERAY_CRDS to a folder with its CRDs and validate_crd.py"


def has_crds() -> bool:
    """Whether ray.io kinds can be checked here."""
    return (CRDS / "validate_crd.py").exists()


@lru_cache
def _kuberay() -> tuple[ModuleType, Any]:
    spec = importlib.util.spec_from_file_location("validate_crd", CRDS / "validate_crd.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # it leaves its files for the collector to close
        return module, module.Crds([str(path) for path in sorted(CRDS.glob("*.json"))])


def kuberay(cluster: Cluster) -> Iterator[Finding]:
    """crd: what the API server refuses. operator: what KubeRay refuses after that."""
    if not has_crds():
        return
    module, crds = _kuberay()
    for doc in cluster.docs:
        problems = crds.errors(doc) if str(doc.get("apiVersion", "")).startswith("ray.io/") else []
        for problem in problems or []:
            yield Finding("crd", name_of(doc), problem)
        if doc.get("kind") in ("RayService", "RayCluster") and not problems:
            for problem in module.operator_errors(doc):
                yield Finding("operator", name_of(doc), problem)


def kubernetes(cluster: Cluster) -> Iterator[Finding]:
    """schema: a core kind that the API server refuses or prunes."""
    for doc in cluster.docs:
        group = str(doc.get("apiVersion", "")).rpartition("/")[0]
        problem = None if group == "ray.io" else _problem(json.dumps(doc))
        if problem is not None:
            yield Finding("schema", name_of(doc), problem)


@lru_cache(1024)  # the library reads its schemas anew for each document
def _problem(text: str) -> str | None:
    doc = json.loads(text)
    schema = _FOREIGN.get((str(doc.get("apiVersion")), str(doc.get("kind"))))
    try:
        if schema is not None:
            jsonschema.validate(doc, schema)
        else:
            kubernetes_validate.validate(doc, KUBERNETES_VERSION, strict=True)
    except (jsonschema.ValidationError, kubernetes_validate.ValidationError) as error:
        return f"{'/'.join(str(part) for part in error.absolute_path)}: {error.message[:200]}"
    except kubernetes_validate.SchemaNotFoundError as error:
        return str(error.message)
    return None


def unique(cluster: Cluster) -> Iterator[Finding]:
    """duplicate: two objects of one kind and name."""
    names = [name_of(doc) for doc in cluster.docs]
    for name in sorted({name for name in names if names.count(name) > 1}):
        yield Finding("duplicate", name, "is there twice")


def name_of(doc: Doc) -> str:
    """Kind/name, as kubectl writes it."""
    return f"{doc.get('kind')}/{(doc.get('metadata') or {}).get('name')}"


def _closed(properties: dict[str, Any], *required: str) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


_TEXT = {"type": "string", "minLength": 1}
_TEXTS = {"type": "array", "items": _TEXT, "minItems": 1}
_LABELS = {"type": "object", "additionalProperties": {"type": "string"}}
_DURATION = {"type": "string", "pattern": "^([0-9]+(ms|[smhd]))+$"}
_EXPRESSION = _closed({"key": _TEXT, "operator": {"enum": ["In", "NotIn", "Exists", "DoesNotExist"]}, "values": _TEXTS})
_SELECTOR = _closed({"matchLabels": _LABELS, "matchExpressions": {"type": "array", "items": _EXPRESSION}})
_RULE = {
    **_closed(
        {"alert": _TEXT, "record": _TEXT, "expr": _TEXT, "for": _DURATION, "labels": _LABELS, "annotations": _LABELS},
        "expr",
    ),
    "oneOf": [{"required": ["alert"]}, {"required": ["record"]}],
}
_GROUP = _closed({"name": _TEXT, "interval": _DURATION, "rules": {"type": "array", "items": _RULE}}, "name", "rules")
_ENDPOINT = _closed({"port": _TEXT, "interval": _DURATION, "path": _TEXT}, "port")
_ISSUER = _closed({"group": _TEXT, "kind": {"enum": ["Issuer", "ClusterIssuer"]}, "name": _TEXT}, "name")
_KEY = _closed(
    {
        "algorithm": {"enum": ["RSA", "ECDSA", "Ed25519"]},
        "size": {"type": "integer"},
        "rotationPolicy": {"enum": ["Never", "Always"]},
    }
)


def _kind(spec: dict[str, Any]) -> dict[str, Any]:
    metadata = _closed({"name": _TEXT, "namespace": _TEXT, "labels": _LABELS, "annotations": _LABELS}, "name")
    return _closed({"apiVersion": _TEXT, "kind": _TEXT, "metadata": metadata, "spec": spec}, "metadata", "spec")


# Of the kinds of other operators, the part of their schemas that is used here.
_FOREIGN: dict[tuple[str, str], dict[str, Any]] = {
    ("monitoring.coreos.com/v1", "PodMonitor"): _kind(
        _closed(
            {"selector": _SELECTOR, "podMetricsEndpoints": {"type": "array", "items": _ENDPOINT, "minItems": 1}},
            *("selector", "podMetricsEndpoints"),
        )
    ),
    ("monitoring.coreos.com/v1", "PrometheusRule"): _kind(
        _closed({"groups": {"type": "array", "items": _GROUP, "minItems": 1}}, "groups")
    ),
    ("cert-manager.io/v1", "Certificate"): _kind(
        _closed(
            {
                "secretName": _TEXT,
                "duration": _DURATION,
                "renewBefore": _DURATION,
                "privateKey": _KEY,
                "usages": {"type": "array", "items": {"enum": ["server auth", "client auth"]}},
                "commonName": _TEXT,
                "dnsNames": _TEXTS,
                "issuerRef": _ISSUER,
            },
            *("secretName", "issuerRef"),
        )
    ),
}

CHECKS = (kuberay, kubernetes, unique)
