"""`make demo`: the whole cluster on this machine, a conversation of three turns, then a prompt if there is a terminal.

    python scripts/demo.py [--config deploy/serve/local.yaml]

Each turn is followed by a line of what happened: the replica, cached and new tokens, where their KV came from, what was
moved, the time to the first token. Everything that was started is stopped at the end.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path
from types import FrameType

from rich.console import Console

from services.cli_options import SamplingOptions
from services.client import Client, Session
from services.cluster_cli import Stages, ready_panel
from services.common.errors import AntiphonError
from services.common.sampling import SamplingParams
from services.common.settings import Settings
from services.ray_environment import prepare_environment
from services.remote_chat import chat_remote, show_turn, summary
from services.running_state import announced

CONFIG = Path(__file__).resolve().parents[1] / "deploy" / "serve" / "local.yaml"
SCRIPT = (
    "Tell me a short story about a fox who finds a lantern.",
    "Who helped the fox?",
    "What did the fox learn?",
)
SAMPLING = SamplingParams(temperature=0.6, top_p=0.9, seed=7, max_tokens=64)


def converse(session: Session, console: Console) -> None:
    """The scripted turns, and what `antiphon sessions show` would say in the end."""
    for line in SCRIPT:
        console.print(f"\n[bold]>>> {line}[/]", highlight=False)
        turn = show_turn(session.chat(line, sampling=SAMPLING))
        console.print(f"[dim]    {summary(turn)}[/]", highlight=False)
        console.print(f"[dim]    why there: {turn.started.routing.detail}[/]", highlight=False)
        if turn.finished.prefill_reason:
            console.print(f"[dim]    prefill: {turn.finished.prefill_reason}[/]", highlight=False)
    info = session.info()
    held_by = ", ".join(f"{each.replica} ({each.num_computed_tokens} tokens)" for each in info.holders)
    num_tokens = info.num_prompt_tokens + info.num_generated_tokens
    console.print(
        f"\n{info.num_turns} turns, {num_tokens} tokens in the journal; KV held by {held_by}", highlight=False
    )


def run(config: Path, console: Console) -> None:
    """Starts, converses, stops. Raises AntiphonError."""
    prepare_environment(os.environ)
    stages = Stages(console)
    stages.begin("Ray and Serve are being loaded")
    from services.app import serve_application  # imports Ray, which reads the environment then

    with (
        serve_application(Settings.from_yaml(config), stages.begin) as running,
        announced(running.target, running.settings.sessions),
    ):
        stages.end()
        console.print(ready_panel(running.target, running.metrics_address))
        with Client(running.target) as client:
            converse(client.create_session("demo"), console)
        if sys.stdin.isatty():
            console.print("\nYour turn. The session goes on:")
            chat_remote(running.target, "demo", SamplingOptions(temperature=0.6, top_p=0.9, seed=7, max_tokens=64))


def main() -> int:
    """Exit code 0 if all went well, 1 with a line that says what did not, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=CONFIG)
    console = Console()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run(parser.parse_args().config, console)
    except AntiphonError as error:
        console.print(f"[bold red]error:[/] {error}", highlight=False)
        return 1
    except KeyboardInterrupt:
        return 130
    console.print("stopped; nothing is left running")
    return 0


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
