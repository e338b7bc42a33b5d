"""Model text on a terminal is shown and commands nothing."""

from __future__ import annotations

import io

import pytest

from services.common.messages import Delta, Finished, RoutingDecision, RoutingReason, Started, Timings, Usage
from services.common.sampling import FinishReason
from services.remote_chat import show_turn
from services.terminal_text import shown

CLEAR_SCREEN = "\x1b[2J"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("two\nlines\tand a tab, ü, 漢, 🦊", "two\nlines\tand a tab, ü, 漢, 🦊"),
        (CLEAR_SCREEN, "␛[2J"),
        ("\x1b]0;title\x07", "␛]0;title␇"),
        ("over\rwritten\x08\x7f", "over␍written␈␡"),
        ("\x9b31m", "�31m"),
        ("abc\u202ecba", "abc�cba"),
    ],
)
def test_what_a_terminal_would_obey_is_made_visible(text: str, expected: str) -> None:
    assert shown(text) == expected


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("out", "expected"), [(Terminal(), "␛[2J\n"), (io.StringIO(), CLEAR_SCREEN + "\n")])
def test_a_turn_is_filtered_on_a_terminal_and_exact_in_a_pipe(out: io.StringIO, expected: str) -> None:
    decision = RoutingDecision("a", RoutingReason.NO_HOLDER)
    turn = [
        Started("r", None, 0, 1, 0, decision),
        Delta(CLEAR_SCREEN, (1,), 0),
        Finished(FinishReason.STOP, Usage(1, 0, 1), Timings(), "a"),
    ]
    assert show_turn(iter(turn), out).text == CLEAR_SCREEN
    assert out.getvalue() == expected
