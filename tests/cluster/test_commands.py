"""The commands that a newcomer types first, as processes of their own: they work, and leave nothing running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

# isort: split
import tests.cluster.ray_session  # noqa: F401  (sets variables that Ray reads when it is imported)

# isort: split
import psutil  # Ray brings it

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

ROOT = Path(__file__).parents[2]
ANTIPHON = [sys.executable, "-c", "from services.cli import main; main()"]
SETTINGS = {"ANTIPHON__ENGINE__DEVICE": "cpu", "ANTIPHON__GATEWAY__PORT": "0", "COLUMNS": "160", "NO_COLOR": "1"}


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    return os.environ | SETTINGS | {"XDG_STATE_HOME": str(tmp_path)}


@contextmanager
def running(command: list[str], environment: dict[str, str]) -> Iterator[tuple[subprocess.Popen[str], list[str]]]:
    """The process once it is ready, and what it has said so far. All that it started has ended after the block."""
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    with process:
        try:
            while not any("Ctrl-C stops everything" in line for line in lines):
                line = process.stdout.readline()
                assert line, "".join(lines)
                lines.append(line)
            started = psutil.Process(process.pid).children(recursive=True)
            yield process, lines
            assert has_ended(started), [each for each in started if each.is_running()]
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate(timeout=60)


def has_ended(processes: list[psutil.Process]) -> bool:
    _, alive = psutil.wait_procs(processes, timeout=10)
    return not alive


def test_demo_shows_three_turns_and_leaves_nothing_running(environment: dict[str, str]) -> None:
    with running([sys.executable, "scripts/demo.py"], environment) as (process, _):
        text, _ = process.communicate()
        assert process.returncode == 0, text
    words = " ".join(text.split())
    for number in (1, 2, 3):
        assert f"turn {number} on decode-" in words
    for part in ("cached +", "KV ", "first token", "3 turns,", "nothing is left running"):
        assert part in words
    assert "Traceback" not in text


def test_serve_is_seen_by_the_other_commands_and_stops_on_ctrl_c(environment: dict[str, str]) -> None:
    with running([*ANTIPHON, "serve", "demo"], environment) as (process, lines):
        target = next(line for line in lines if "gRPC" in line).split()[2]

        def ask(*arguments: str) -> str:
            asked = subprocess.run(
                [*ANTIPHON, *arguments, "--target", target],
                cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
            assert asked.returncode == 0, asked.stderr
            return asked.stdout

        assert ask("generate", "--prompt", "Tell me a story.", "--session", "first", "--max-tokens", "32").strip()
        assert "first" in ask("sessions", "list")
        shown = ask("sessions", "show", "first")
        assert "decode-" in shown
        status = ask("status")
        assert "prefill-" in status
        assert "1 sessions" in status
        assert "deleted first" in ask("sessions", "delete", "first")
        began_s = time.monotonic()
        process.send_signal(signal.SIGINT)
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 0, text
        assert "stopped" in text
        assert time.monotonic() - began_s < 60
    assert not list(Path(environment["XDG_STATE_HOME"]).rglob("*.json"))


def test_serve_that_is_told_to_end_stops_all_that_it_started(environment: dict[str, str]) -> None:
    alone = {"ANTIPHON__PREFILL__ENABLED": "false"}
    with running([*ANTIPHON, "serve", "demo"], environment | alone) as (process, _):
        process.terminate()
        text, _ = process.communicate(timeout=60)
        assert process.returncode == 0, text
        assert "stopped" in text


def test_serve_of_a_model_that_is_not_there_says_so_and_leaves_nothing(environment: dict[str, str]) -> None:
    asked = subprocess.run(
        [*ANTIPHON, "serve", "./no-such-model"], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert asked.returncode == 1
    assert "no-such-model" in asked.stderr
    assert "Traceback" not in asked.stderr
