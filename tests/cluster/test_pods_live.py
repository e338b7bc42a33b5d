"""The laptop overlay's pods, each with address, files, user and rights of its own, and a conversation through them.

No Kubernetes runs here: namespaces of this machine stand for pods, and the test for operator and kubelet
(tests/manifests/pod_machines.py says what is played and what is not).
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from typing import Any

import pytest

from tests.manifests.kustomize import ROOT
from tests.manifests.model import DEPLOYMENTS

pytestmark = [pytest.mark.timeout(500), pytest.mark.scale]

TOOLS = ("unshare", "nsenter", "setpriv", "ip", "redis-cli")
APART = ["unshare", "--net", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    """What was seen of the pods. In a process apart, so that nothing outlives it."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        pytest.skip(f"not on PATH: {', '.join(missing)}")
    if os.geteuid() != 0 or subprocess.run([*APART, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces cannot be made here: root is needed")
    if ROOT.is_relative_to("/tmp"):
        pytest.skip("the project lies in /tmp, of which every pod has its own")
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "ANTIPHON__"))}
    done = subprocess.run(
        [*APART, sys.executable, "-m", "tests.manifests.pod_machines", "cpu-demo"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_conversation_goes_through_the_gateways_address(seen: dict[str, Any]) -> None:
    assert seen["num_tokens"] > 0


def test_every_replica_runs_in_a_pod_of_its_group_and_none_on_the_head(seen: dict[str, Any]) -> None:
    assert seen["placed"] == seen["pods"]
    assert set(seen["placed"]) >= set(DEPLOYMENTS)


def test_what_pod_monitors_scrape_answers_in_every_pod(seen: dict[str, Any]) -> None:
    groups = {name.rpartition("-")[0]: ports for name, ports in seen["metrics"].items()}
    both = ["app-metrics", "metrics"]
    assert groups == {
        "headgroup": ["metrics"], "gateway": both, "tokenizer": ["metrics"], "prefill": both, "decode": both,
    }  # fmt: skip


def test_the_gateways_hook_lets_it_end_when_idle(seen: dict[str, Any]) -> None:
    assert seen["drained"] == 0


def test_a_decode_pod_that_ends_hands_its_session_over_and_no_turn_fails(seen: dict[str, Any]) -> None:
    moved = seen["moved"]
    assert (moved["hook"], moved["is_elsewhere"]) == (0, True)
    assert moved["num_turns_meanwhile"] > 0
    assert moved["num_cached_tokens"] >= moved["num_prompt_tokens"] // 16 * 16  # whole blocks
    assert moved["sources"][0] == "LOCAL"


def test_what_replicas_say_is_in_their_pods_logs(seen: dict[str, Any]) -> None:
    assert all(seen["logged"].values())
