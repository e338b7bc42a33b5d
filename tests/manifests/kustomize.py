"""Builds overlays with the pinned kubectl's own kustomize, offline."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"


class BuildFailed(Exception):
    """kustomize refused a folder, or complained about it."""


def targets(k8s: Path = K8S) -> list[Path]:
    """The base and all overlays."""
    return [k8s / "base", *sorted(path.parent for path in k8s.glob("overlays/*/kustomization.yaml"))]


def kubectl() -> str:
    """The one of the `dev` extra, or whichever is on PATH."""
    beside_python = Path(sys.executable).with_name("kubectl")
    found = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    if found is None:
        raise BuildFailed("kubectl is not installed: make venv")
    return found


def build(folder: Path) -> list[dict[str, Any]]:
    """The documents that `kubectl apply -k folder` would send. Raises BuildFailed."""
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, check=False)
    if done.returncode or done.stderr.strip():
        raise BuildFailed(f"{folder.name}: {done.stderr.strip() or 'failed'}")
    return [doc for doc in yaml.safe_load_all(done.stdout) if doc]
