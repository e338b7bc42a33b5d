"""`chat` and `generate` against a gateway (`--target host:port`): prints a turn as it comes, and what it took."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from services.cli_options import SamplingOptions
from services.client import Client, Session
from services.common.errors import AntiphonError
from services.common.messages import Delta, Finished, KvSource, Message, Started, TurnEvent
from services.common.sampling import SamplingParams
from services.terminal_text import shown

NOTHING_GIVEN = SamplingOptions()
QUIT_WORDS = ("/bye", "/quit", "/exit")
_SOURCES = {
    KvSource.LOCAL: "held by",
    KvSource.FETCHED: "fetched from",
    KvSource.PREFILL: "computed by",
    KvSource.COMPUTED: "computed by",
}


@dataclass(frozen=True, slots=True)
class ShownTurn:
    """A turn that was printed."""

    text: str
    started: Started
    finished: Finished


def show_turn(events: Iterable[TurnEvent], out: TextIO | None = None) -> ShownTurn:
    """Prints the reply while it comes. Raises what the turn raises."""
    out = sys.stdout if out is None else out
    pieces: list[str] = []
    started: Started | None = None
    for event in events:
        if isinstance(event, Delta):
            pieces.append(event.text)
            print(shown(event.text) if out.isatty() else event.text, end="", flush=True, file=out)
        elif isinstance(event, Started):
            started = event
        else:
            print(file=out)
            assert started is not None, "a turn begins with started"
            return ShownTurn("".join(pieces), started, event)
    raise AntiphonError("the turn ended without saying so")


def summary(turn: ShownTurn) -> str:
    """One line: the replica, its tokens, where their KV came from, times."""
    finished, timings = turn.finished, turn.finished.timings
    usage = finished.usage
    num_new = usage.num_prompt_tokens - usage.num_cached_tokens
    parts = [
        f"turn {turn.started.turn} on {finished.replica or 'no replica'}" if turn.started.turn else finished.replica,
        f"{usage.num_prompt_tokens} prompt tokens: {usage.num_cached_tokens} cached + {num_new} new",
    ]
    if finished.kv_origins:
        origins = (f"{each.num_tokens} {_SOURCES[each.source]} {each.replica}" for each in finished.kv_origins)
        parts.append("KV " + ", ".join(origins))
    if timings.transfer_bytes:
        parts.append(f"moved {timings.transfer_bytes / 2**20:.2f} MiB in {timings.transfer_ms:.1f} ms")
    parts.append(f"first token {timings.first_token_ms:.0f} ms")
    parts.append(f"{usage.num_generated_tokens} tokens in {timings.total_ms:.0f} ms")
    if finished.num_resumes:
        parts.append(f"resumed {finished.num_resumes}x")
    return " · ".join(parts)


def chat_remote(
    target: str,
    session: str | None = None,
    options: SamplingOptions = NOTHING_GIVEN,
    token: str | None = None,
    system: str | None = None,
) -> None:
    """A conversation at the terminal, with the session of that name (made if there is none). Ends at ^D or /bye.

    ^C stops a reply. What options leave open is the checkpoint's default. Raises the client's errors if the session
    cannot be opened.
    """
    with Client(target, token) as client:
        sampling = options.over(client.model().default_sampling)
        opened = client.open_session(session) if session else client.create_session()
        print(f"session {opened.id} at {target}; /bye or ^D ends")
        first = system if opened.info().num_turns == 0 else None
        for line in _lines(">>> "):
            given = [Message("system", first), Message("user", line)] if first else [Message("user", line)]
            if _one_turn(opened, given, sampling):
                first = None


def generate_remote(
    target: str,
    prompt: str,
    session: str | None = None,
    options: SamplingOptions = NOTHING_GIVEN,
    token: str | None = None,
    quiet: bool = False,
) -> ShownTurn:
    """The continuation of plain text, as without a cluster; with a session its reply to a message.

    Raises the client's errors.
    """
    with Client(target, token) as client:
        sampling = options.over(client.model().default_sampling)
        if session:
            events = client.open_session(session).chat(prompt, sampling=sampling)
        else:
            events = client.generate(client.tokenize(prompt, as_prompt=True), sampling=sampling)
        turn = show_turn(events)
    if not quiet:
        print(summary(turn), file=sys.stderr)
    return turn


def _one_turn(session: Session, given: Sequence[Message], sampling: SamplingParams) -> bool:
    """True if the turn ended well. What went wrong is said, and the conversation goes on."""
    events = session.chat(given, sampling=sampling)
    try:
        print(f"    {summary(show_turn(events))}")
    except KeyboardInterrupt:
        events.close()
        print("\n    stopped; the turn leaves nothing in the session")
        return False
    except AntiphonError as error:
        print(f"\n    {error.reason}: {error}")
        return False
    return True


def _lines(prompt: str) -> Iterator[str]:
    while True:
        try:
            line = input(prompt).strip()
        except (EOFError, KeyboardInterrupt):
            print()
            return
        if line in QUIT_WORDS:
            return
        if line:
            yield line
