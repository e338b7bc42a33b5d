"""What the commands about a cluster say, and where they look, without a cluster."""

from __future__ import annotations

import dataclasses
import io
from pathlib import Path

import pytest
import typer
from rich.console import Console
from typer.testing import CliRunner

from services.cluster_cli import ready_panel, replica_table, serve, sessions_app, status
from services.common.errors import InvalidSettings, Unavailable
from services.common.messages import (
    Delta,
    Finished,
    KvOrigin,
    KvSource,
    RoutingDecision,
    RoutingReason,
    Started,
    Timings,
    Usage,
)
from services.common.sampling import FinishReason
from services.common.settings import SessionSettings
from services.ray_environment import prepare_environment
from services.remote_chat import show_turn, summary
from services.running_state import announced, find_sessions
from services.sessions.registry import ReplicaRecord, Role

NOBODY = "127.0.0.1:1"


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def app() -> typer.Typer:
    made = typer.Typer()
    made.command()(serve)
    made.command()(status)
    made.add_typer(sessions_app, name="sessions")
    return made


def test_announced_cluster_is_found_by_its_target_until_it_stops(state_folder: Path) -> None:
    sessions = SessionSettings(store="redis", url="redis://127.0.0.1:7", password_file=Path("/run/p"))
    with announced("127.0.0.1:9000", sessions):
        assert find_sessions("localhost:9000") == sessions
        (file,) = state_folder.rglob("*.json")
        assert file.stat().st_mode & 0o077 == 0
        with pytest.raises(Unavailable):
            find_sessions("127.0.0.1:9001")
    with pytest.raises(Unavailable):
        find_sessions("127.0.0.1:9000")


def test_environment_keeps_what_is_set_and_refuses_what_breaks_transfers() -> None:
    environment = {"OMP_NUM_THREADS": "8", "PYTHONPATH": "/somewhere"}
    prepare_environment(environment)
    assert environment["OMP_NUM_THREADS"] == "8"
    assert environment["RAY_AUTH_MODE"] == "token"
    assert environment["PYTHONPATH"].endswith(":/somewhere")
    for name in ("RAY_SERVE_USE_GRPC_BY_DEFAULT", "RAY_SERVE_THROUGHPUT_OPTIMIZED"):
        with pytest.raises(InvalidSettings, match=name):
            prepare_environment({name: "1"})
        prepare_environment({name: "0"})


@pytest.mark.parametrize("command", [["sessions", "list"], ["sessions", "show", "s"], ["sessions", "delete", "s"]])
def test_nobody_at_the_target_is_one_line_and_exit_code_1(command: list[str]) -> None:
    result = CliRunner().invoke(app(), [*command, "--target", NOBODY])
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    assert f"error: no gateway answers at {NOBODY}" in " ".join(result.output.split())


def test_status_says_where_it_looked(tmp_path: Path) -> None:
    result = CliRunner().invoke(app(), ["status", "--target", NOBODY])
    assert (result.exit_code, NOBODY in result.output) == (1, True)


def test_serve_refuses_an_unknown_key_before_it_starts_anything(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("gateway: {prt: 1}\n")
    result = CliRunner().invoke(app(), ["serve", "--config", str(config)])
    assert result.exit_code == 1
    assert "gateway.prt: unknown key" in " ".join(result.output.split())


def test_turn_is_printed_as_it_comes_and_summed_up_in_a_line() -> None:
    routing = RoutingDecision("decode-1", RoutingReason.HELD_PREFIX)
    finished = Finished(
        FinishReason.STOP,
        Usage(100, 96, 2),
        Timings(transfer_ms=1.5, transfer_bytes=2**20, first_token_ms=12.0, total_ms=40.0),
        "decode-1",
        (KvOrigin(KvSource.FETCHED, "decode-2", 96), KvOrigin(KvSource.COMPUTED, "decode-1", 4)),
    )
    out = io.StringIO()
    events = [Started("r", "s", 2, 100, 96, routing), Delta("Hi", (1,), 0), Delta(" you", (2,), 1), finished]
    turn = show_turn(events, out)
    assert (out.getvalue(), turn.text) == ("Hi you\n", "Hi you")
    line = summary(turn)
    for part in ("turn 2 on decode-1", "96 cached + 4 new", "96 fetched from decode-2", "1.00 MiB", "12 ms"):
        assert part in line


def test_panel_and_table_name_what_they_show() -> None:
    record = ReplicaRecord(Role.DECODE, "decode-1", "i", 0.0, "m", "l", 16, 100, 40, prefill_tokens_per_s=123.4)
    table = replica_table([record])
    assert table.row_count == 1
    out = Console(file=io.StringIO(), width=80)
    out.print(replica_table([dataclasses.replace(record, replica_id="prefill-a1b2c3d4", num_blocks=100_000)] * 2))
    out.print(ready_panel("127.0.0.1:9000", "127.0.0.1:40333"))
    shown = out.file.getvalue()
    for whole in ("prefill-a1b2c3d4", "40/100000", "--prompt 'Tell me a story.'"):  # not cut, and on one line
        assert whole in shown
    assert "127.0.0.1:9001" in str(ready_panel("127.0.0.1:9001", "127.0.0.1:8000").renderable)
