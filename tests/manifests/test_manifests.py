"""The manifests as they are: every overlay builds, and nothing is wrong with it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.manifests.checks import check
from tests.manifests.checks.schemas import WHY_NO_CRDS, has_crds
from tests.manifests.kustomize import K8S, build, targets
from tests.manifests.model import Cluster
from tests.manifests.sources import check_sources

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("folder", targets(), ids=lambda folder: folder.name)
def test_overlay_has_no_mistake(folder: Path) -> None:
    assert [str(finding) for finding in check(Cluster(folder.name, build(folder)))] == []


def test_overlays_patch_and_neither_repeat_nor_copy() -> None:
    assert [str(finding) for finding in check_sources(K8S)] == []


def test_the_operators_schemas_are_there() -> None:
    if not has_crds():
        pytest.skip(WHY_NO_CRDS)


def test_every_overlay_of_the_readme_is_built() -> None:
    text = (K8S / "README.md").read_text()
    assert [folder.name for folder in targets()[1:] if f"k8s/overlays/{folder.name}" not in text] == []
