"""Builds every overlay of k8s/ and checks it: `make manifests`. Exit status 1 if something is wrong.

KubeRay's CRDs are taken from the folder in KUBERAY_CRDS; without them all else is checked, and that is said.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tests.manifests.checks import check
from tests.manifests.checks.schemas import KUBERNETES_VERSION, WHY_NO_CRDS, has_crds
from tests.manifests.kustomize import K8S, BuildFailed, build, targets
from tests.manifests.model import Cluster, Finding
from tests.manifests.sources import check_sources


def main() -> int:
    """Entry point; returns the exit status."""
    findings = check_sources(K8S)
    for folder in targets():
        findings += _check(folder)
    for finding in findings:
        print(finding, file=sys.stderr)
    print(f"Kubernetes {KUBERNETES_VERSION}; KubeRay: {'checked' if has_crds() else f'SKIPPED, {WHY_NO_CRDS}'}")
    return 1 if findings else 0


def _check(folder: Path) -> list[Finding]:
    try:
        cluster = Cluster(folder.name, build(folder))
    except BuildFailed as error:
        return [Finding("kustomize", folder.name, str(error))]
    found = check(cluster)
    print(f"{folder.name}: {len(cluster.docs)} objects, {len(found)} findings")
    return found


if __name__ == "__main__":
    raise SystemExit(main())
