"""Commands about a cluster: serve, sessions list|show|delete, status. services.cli mounts them."""

from __future__ import annotations

import asyncio
import datetime
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Column, Table
from rich.text import Text

from services.client import Client
from services.common.errors import AntiphonError
from services.common.messages import SessionInfo
from services.common.settings import SessionSettings, Settings
from services.ray_environment import prepare_environment
from services.running_state import announced, find_sessions
from services.sessions.connect import connect
from services.sessions.from_settings import keyspace_of, redis_settings
from services.sessions.registry import ReplicaRecord, ReplicaRegistry

DEFAULT_TARGET = "127.0.0.1:9000"

Target = Annotated[str, typer.Option(help="host:port of a gateway.", envvar="ANTIPHON_TARGET")]
Token = Annotated[str | None, typer.Option(help="Bearer token.", envvar="ANTIPHON_TOKEN")]
Config = Annotated[
    Path | None, typer.Option(help="Configuration file (see deploy/serve).", exists=True, dir_okay=False)
]

sessions_app = typer.Typer(no_args_is_help=True, help="The caller's sessions.")


@contextmanager
def _errors_for_people() -> Iterator[None]:
    """Errors raised on purpose become one line and exit code 1."""
    try:
        yield
    except AntiphonError as error:
        Console(stderr=True).print(Text.assemble(("error: ", "bold red"), f"{error}"), soft_wrap=True)
        raise typer.Exit(1) from None


@_errors_for_people()
def serve(
    model: Annotated[str | None, typer.Argument(help="Directory, hub id, or demo. Not given: the file's.")] = None,
    config: Config = None,
) -> None:
    """Start the whole cluster on this machine: session store, Ray and all deployments. Ctrl-C stops all of it."""
    settings = _settings(model, config)
    prepare_environment(os.environ)
    console = Console(stderr=True)
    stages = Stages(console)
    stages.begin("Ray and Serve are being loaded")
    from services.app import serve_application  # imports Ray, which reads the environment then

    def begin(stage: str) -> None:
        # Ray takes the signal for itself when it starts: it would abort, and leave the session store running.
        signal.signal(signal.SIGTERM, _interrupt)
        stages.begin(stage)

    try:
        with (
            serve_application(settings, begin) as running,
            announced(running.target, running.settings.sessions),
        ):
            stages.end()
            console.print(ready_panel(running.target, running.metrics_address))
            while True:
                signal.pause()
    except KeyboardInterrupt:
        stages.end()
        console.print("stopped")


@sessions_app.command("list")
@_errors_for_people()
def list_sessions(target: Target = DEFAULT_TARGET, token: Token = None) -> None:
    """All sessions of the caller, newest first."""
    with Client(target, token) as client:
        found: list[SessionInfo] = []
        page_token = ""
        while True:
            page = client.list_sessions(page_token=page_token)
            found += page.sessions
            page_token = page.next_page_token
            if not page_token:
                break
    table = Table("session", "turns", "tokens", "held by", "last used", "now")
    for info in found:
        num_tokens = info.num_prompt_tokens + info.num_generated_tokens
        held_by = ", ".join(f"{each.replica} ({each.num_computed_tokens})" for each in info.holders)
        running = f"turn {info.active_turn}" if info.active_turn else ""
        table.add_row(info.session, str(info.num_turns), str(num_tokens), held_by, _when(info.updated_at_s), running)
    Console().print(table)


@sessions_app.command("show")
@_errors_for_people()
def show_session(session: str, target: Target = DEFAULT_TARGET, token: Token = None) -> None:
    """One session."""
    with Client(target, token) as client:
        info = client.get_session(session)
    table = Table(show_header=False)
    rows = {
        "session": info.session,
        "model": info.model,
        "made": _when(info.created_at_s),
        "last used": _when(info.updated_at_s),
        "lives for": f"{info.ttl_s:.0f} s after its last turn",
        "turns": str(info.num_turns),
        "prompt tokens": str(info.num_prompt_tokens),
        "reply tokens": str(info.num_generated_tokens),
        "bytes in the store": str(info.held_bytes),
        "runs now": f"turn {info.active_turn}" if info.active_turn else "nothing",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for each in info.holders:
        table.add_row("held by", f"{each.replica}: {each.num_computed_tokens} tokens ({each.tier})")
    Console().print(table)


@sessions_app.command("delete")
@_errors_for_people()
def delete_session(session: str, target: Target = DEFAULT_TARGET, token: Token = None) -> None:
    """Forget a session and its history."""
    with Client(target, token) as client:
        client.delete_session(session)
    typer.echo(f"deleted {session}")


@_errors_for_people()
def status(target: Target = DEFAULT_TARGET, config: Config = None, token: Token = None) -> None:
    """Replicas, their blocks and load, and the caller's sessions, at a glance.

    The registry is found by the configuration, or by what `antiphon serve` on this machine has left.
    """
    settings = Settings.from_yaml(config).sessions if config is not None else find_sessions(target)
    records = asyncio.run(_replicas(settings))
    console = Console()
    console.print(replica_table(records))
    with Client(target, token) as client:
        page = client.list_sessions(page_size=1000)
    num_running = sum(info.active_turn is not None for info in page.sessions)
    more = "at least " if page.next_page_token else ""
    console.print(f"gateway {target} · {more}{len(page.sessions)} sessions, {num_running} with a turn running")


class Stages:
    """A line a stage, with the time it took."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._stage: str | None = None
        self._began_s = 0.0

    def begin(self, stage: str) -> None:
        """The stage before has ended."""
        self.end()
        self._stage, self._began_s = stage, time.monotonic()
        self._console.print(f"  … {stage}")

    def end(self) -> None:
        """Says how long the stage took."""
        if self._stage is not None:
            self._console.print(f"  ✓ {self._stage} ({time.monotonic() - self._began_s:.1f} s)")
        self._stage = None


def ready_panel(target: str, metrics_address: str) -> Panel:
    """Where to go next."""
    option = "" if target == DEFAULT_TARGET else f" --target {target}"
    lines = (
        f"gRPC      {target}  (antiphon.v1, health, reflection)",
        f"metrics   http://{metrics_address}/metrics",
        "",
        "In another terminal:",
        f"  antiphon chat --target {target} --session first",
        f"  antiphon generate --target {target} --prompt 'Tell me a story.'",
        f"  antiphon status{option}",
    )
    return Panel(Text("\n".join(lines)), title="ready", subtitle="Ctrl-C stops everything", expand=False)


def replica_table(records: Sequence[ReplicaRecord]) -> Table:
    """One row a replica, whose name begins with its role. Fits into 80 columns."""
    whole = [Column(name, no_wrap=True) for name in ("replica", "blocks free")]
    table = Table(*whole, "runs", "waiting tokens", "prefill tok/s", "decode tok/s", "transfer MiB/s")
    for record in records:
        rate = record.transfer_bytes_per_s
        table.add_row(
            record.replica_id + (" (drains)" if record.is_draining else ""),
            f"{record.num_free_blocks}/{record.num_blocks}",
            str(record.num_running),
            str(record.num_waiting_tokens),
            _number(record.prefill_tokens_per_s),
            _number(record.decode_tokens_per_s),
            _number(None if rate is None else rate / 2**20),
        )
    return table


async def _replicas(settings: SessionSettings) -> tuple[ReplicaRecord, ...]:
    client = connect(redis_settings(settings))
    try:
        return await ReplicaRegistry(client, keyspace_of(settings)).list()
    finally:
        await client.aclose()


def _settings(model: str | None, config: Path | None) -> Settings:
    settings = Settings.from_yaml(config) if config is not None else Settings.from_mapping({})
    if model is None:
        return settings
    return settings.model_copy(update={"model": settings.model.model_copy(update={"path": model})})


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _when(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds).strftime("%Y-%m-%d %H:%M:%S")


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
