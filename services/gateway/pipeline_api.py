"""What the edge (server.py) asks of what stands behind it. The cluster's pipeline and local.py's both fulfil it.

Every call may raise any AntiphonError; the edge maps it. Cancelling a call must end the work it started.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from services.common.messages import Explanation, Message, ModelInfo, SessionInfo, SessionPage, TurnEvent, TurnRequest


class Turns(Protocol):
    """Runs turns, and explains where one would run."""

    def generate(self, turn: TurnRequest) -> AsyncGenerator[TurnEvent]:
        """Started first, then Deltas, then Finished. Closing the generator, or cancelling it, ends the turn."""
        ...

    async def explain(self, turn: TurnRequest) -> Explanation:
        """Dry run of routing. Changes nothing: no lease is taken."""
        ...


class Sessions(Protocol):
    """A tenant's sessions. Another tenant's session is NotFound."""

    async def create(self, tenant: str, session: str | None, ttl_s: float | None) -> SessionInfo:
        """Makes a session; None: picks an id, or the default TTL. Raises AlreadyExists."""
        ...

    async def get(self, tenant: str, session: str) -> SessionInfo:
        """Raises NotFound."""
        ...

    async def list(self, tenant: str, page_size: int, page_token: str) -> SessionPage:
        """Raises InvalidRequest on a page token that is not ours."""
        ...

    async def delete(self, tenant: str, session: str) -> None:
        """Raises NotFound, SessionBusy while a turn runs."""
        ...


class Text(Protocol):
    """The model's vocabulary, chat template and card."""

    async def tokenize_chat(self, messages: Sequence[Message]) -> Sequence[int]:
        """Applies the chat template, up to where the reply begins."""
        ...

    async def tokenize(self, text: str, as_prompt: bool = False) -> Sequence[int]:
        """No template. as_prompt: begins as a text has to, and control tokens are what they say; else all is text."""
        ...

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Special tokens included. Raises InvalidRequest on an id outside the vocabulary."""
        ...

    async def model(self) -> ModelInfo:
        """The model that is served."""
        ...
