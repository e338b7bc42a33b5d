"""The folders themselves, before they are built: overlays patch, they neither repeat nor copy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import yaml

from tests.manifests.kustomize import BuildFailed, build
from tests.manifests.model import Doc, Finding

_MIN_COPIED_LEAVES = 8  # fewer are names, kinds and the way to what is patched
_KEYS = ("name", "groupName", "mountPath")


def repeats(overlay: Path) -> Iterator[Finding]:
    """repeats-base: a patch or a setting that changes nothing, or an object that is there already."""
    kustomization = _load(overlay / "kustomization.yaml")[0]
    parents = [overlay / each for each in kustomization.get("resources") or [] if (overlay / each).is_dir()]
    before = [doc for parent in parents for doc in build(parent)]
    known = {(doc["kind"], doc["metadata"]["name"]): doc for doc in before}
    for name in kustomization.get("resources") or []:
        for doc in _load(overlay / name) if (overlay / name).is_file() else []:
            if (doc["kind"], doc["metadata"]["name"]) in known:
                yield Finding("repeats-base", f"{overlay.name}/{name}", f"{doc['kind']} is there already: patch it")
    for where, patch in _patches(overlay, kustomization):
        base = known.get((patch.get("kind"), patch.get("metadata", {}).get("name")))
        for path, value in _leaves(patch) if base is not None else []:
            if path[0] == "spec" and path[-1] not in _KEYS and _at(base, path) == value:
                yield Finding("repeats-base", f"{overlay.name}/{where}", f"{'/'.join(path)} is {value!r} already")
    yield from _settings(overlay, kustomization, before)


def _settings(overlay: Path, kustomization: Doc, before: list[Doc]) -> Iterator[Finding]:
    for generator in kustomization.get("configMapGenerator") or []:
        base = [
            doc
            for doc in before
            if doc["kind"] == "ConfigMap" and doc["metadata"]["name"].startswith(generator["name"] + "-")
        ]
        for literal in generator.get("literals") or [] if base else []:
            key, _, value = literal.partition("=")
            if (base[0].get("data") or {}).get(key) == value:
                yield Finding("repeats-base", f"{overlay.name}/kustomization.yaml", f"{key} is {value} already")


def _patches(overlay: Path, kustomization: Doc) -> Iterator[tuple[str, Doc]]:
    for entry in kustomization.get("patches") or []:
        name = entry.get("path", "kustomization.yaml")
        text = (overlay / name).read_text() if "path" in entry else entry["patch"]
        for doc in yaml.safe_load_all(text):
            if isinstance(doc, dict) and "$patch" not in doc:
                yield name, doc


def _leaves(node: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Scalars and their paths; an item of a list is found by its name."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _leaves(value, (*path, str(key)))
    elif isinstance(node, list) and all(isinstance(each, dict) and _key(each) for each in node):
        for each in node:
            yield from _leaves(each, (*path, _key(each)))
    else:
        yield path, node


def _key(item: Doc) -> str:
    return next((f"{key}={item[key]}" for key in _KEYS if key in item), "")


def _at(node: Any, path: tuple[str, ...]) -> Any:
    for step in path:
        if isinstance(node, list):
            node = next((each for each in node if isinstance(each, dict) and step in _names(each)), None)
        elif isinstance(node, dict):
            node = node.get(step)
        else:
            return None
    return node


def _names(item: Doc) -> set[str]:
    return {f"{key}={item[key]}" for key in _KEYS if key in item}


def copies(folders: list[Path]) -> Iterator[Finding]:
    """copied-block: the same block in two folders that could share it."""
    blocks = {folder: {block for path in folder.rglob("*.yaml") for block in _blocks(path)} for folder in folders}
    for one, other in combinations(folders, 2):
        shared = blocks[one] & blocks[other]
        for block in sorted(shared, key=len, reverse=True)[:1]:
            yield Finding("copied-block", f"{one.name} and {other.name}", block[:160])


def _blocks(path: Path) -> Iterator[str]:
    for doc in _load(path):
        yield from _subtrees(doc)


def _subtrees(node: Any) -> Iterator[str]:
    if isinstance(node, dict | list):
        if len(list(_leaves(node))) >= _MIN_COPIED_LEAVES:
            yield json.dumps(node, sort_keys=True)
        for child in node.values() if isinstance(node, dict) else node:
            yield from _subtrees(child)


def _load(path: Path) -> list[Doc]:
    return [doc for doc in yaml.safe_load_all(path.read_text(encoding="utf-8")) if isinstance(doc, dict)]


def check_sources(k8s: Path) -> list[Finding]:
    """All findings about the folders under k8s/."""
    overlays = sorted(path.parent for path in k8s.glob("overlays/*/kustomization.yaml"))
    parts = sorted(path.parent for path in k8s.glob("components/*/kustomization.yaml"))
    try:
        return [finding for overlay in overlays for finding in repeats(overlay)] + list(copies(overlays + parts))
    except (BuildFailed, FileNotFoundError) as error:
        return [Finding("kustomize", "k8s", str(error))]
