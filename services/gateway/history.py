"""What came before a turn: the tokens of its session's journal, and who holds their KV."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection
from dataclasses import dataclass
from typing import Self

from services.gateway.router import Route
from services.sessions.base import Acquired, Holder, SessionRecord

MAX_HOLDERS = 4
_MAX_NOTED_SESSIONS = 65536


@dataclass(frozen=True, slots=True)
class History:
    """The journal before a turn. ended_with_eos: its last reply ended with the model's end-of-sequence token."""

    token_ids: tuple[int, ...] = ()
    num_tokens: int = 0
    num_turns: int = 0
    holders: tuple[Holder, ...] = ()
    ended_with_eos: bool = True

    @classmethod
    def of(cls, acquired: Acquired, eos_token_ids: Collection[int]) -> Self:
        """From the journal that came with the lease."""
        assert acquired.num_known_turns == 0, "the whole journal was asked for"
        token_ids = tuple(
            token_id
            for turn in acquired.turns
            for part in (turn.prompt_token_ids, turn.generated_token_ids)
            for token_id in part
        )
        ended_with_eos = not token_ids or token_ids[-1] in eos_token_ids
        return cls(token_ids, len(token_ids), len(acquired.turns), acquired.session.holders, ended_with_eos)

    @classmethod
    def unread(cls, record: SessionRecord, ended_with_eos: bool) -> Self:
        """Its numbers alone, for a dry run."""
        return cls((), record.num_tokens, record.num_turns, record.holders, ended_with_eos)

    def holders_after(self, route: Route, num_computed_tokens: int) -> list[Holder]:
        """Who holds the session's KV once the turn has ended at this route's replica with so many tokens computed."""
        record = route.record
        others = [each.holder for each in route.live_holders if each.holder.replica_id != record.replica_id]
        if num_computed_tokens:
            others.insert(0, Holder(record.replica_id, record.incarnation, num_computed_tokens))
        return others[:MAX_HOLDERS]


class HistoryEnds:
    """How the last turn of recent sessions ended. A dry run needs it and does not read the journal for one token."""

    def __init__(self) -> None:
        self._noted: OrderedDict[tuple[str, str], tuple[int, bool]] = OrderedDict()

    def note(self, tenant: str, session: str, num_turns: int, ended_with_eos: bool) -> None:
        """After a commit."""
        self._noted[(tenant, session)] = (num_turns, ended_with_eos)
        self._noted.move_to_end((tenant, session))
        if len(self._noted) > _MAX_NOTED_SESSIONS:
            self._noted.popitem(last=False)

    def ended_with_eos(self, tenant: str, record: SessionRecord) -> bool:
        """What was noted; the usual end where another gateway ran the session's last turn."""
        num_turns, ended_with_eos = self._noted.get((tenant, record.session_id), (0, True))
        return ended_with_eos if num_turns == record.num_turns else True
