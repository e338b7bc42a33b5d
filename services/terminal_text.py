"""Text of a model or of another user, for a terminal: it is shown, and can never command."""

from __future__ import annotations

import re

# All that a terminal may act on: C0 but for tab and newline, DEL, C1 (0x9B begins a sequence in 8 bits), and the marks
# that turn the direction of what follows.
_COMMANDS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def shown(text: str) -> str:
    """The text with every such character as a visible one: ESC is ␛."""
    return _COMMANDS.sub(_visible, text)


def _visible(match: re.Match[str]) -> str:
    code = ord(match[0])
    if code < 0x20:
        return chr(0x2400 + code)
    return "␡" if code == 0x7F else "�"
