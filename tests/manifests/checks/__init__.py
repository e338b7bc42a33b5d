"""The rules for a built overlay. A rule is a function of the cluster that yields findings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from tests.manifests.checks import links, network, pods, schemas, serving
from tests.manifests.model import Cluster, Finding

Check = Callable[[Cluster], Iterator[Finding]]

# Shape first: the others read documents that they expect to have one.
SHAPE: tuple[Check, ...] = schemas.CHECKS
MEANING: tuple[Check, ...] = (*serving.CHECKS, *pods.CHECKS, *links.CHECKS, *network.CHECKS)


def check(cluster: Cluster) -> list[Finding]:
    """All findings. Where the shape is wrong already, what the rest can make of it is added as far as it goes."""
    findings = [finding for rule in SHAPE for finding in rule(cluster)]
    for rule in MEANING:
        try:
            findings += list(rule(cluster))
        except (KeyError, TypeError, AttributeError, ValueError, IndexError):
            if not findings:
                raise
    return findings
