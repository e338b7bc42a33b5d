"""The turn of a repeated idempotency key: it was committed before, and its reply comes from the journal."""

from __future__ import annotations

from services.common.messages import (
    Delta,
    Finished,
    RoutingDecision,
    RoutingReason,
    Started,
    Timings,
    TurnEvent,
    TurnRequest,
    Usage,
)
from services.gateway.watch import Watch
from services.sessions.base import AlreadyCommitted
from services.text.detokenizer import Detokenizer
from services.text.tokenizer import Tokenizer


def replayed(turn: TurnRequest, old: AlreadyCommitted, tokenizer: Tokenizer, watch: Watch) -> list[TurnEvent]:
    """The events of a turn that has been committed: its tokens as one delta, and no work."""
    watch.lap("session_ms")
    detokenizer = Detokenizer(tokenizer, turn.sampling.stop)
    token_ids = old.record.generated_token_ids
    text = detokenizer.push(token_ids) + detokenizer.finish()
    # Exact for the last turn, the one that is retried; of an earlier one the journal's length then is not at hand.
    is_last = old.turn == old.session.num_turns
    num_prompt = old.session.num_tokens - len(token_ids) if is_last else len(old.record.prompt_token_ids)
    decision = RoutingDecision("", RoutingReason.NO_HOLDER, "replayed from the journal: nothing runs")
    watch.saw_token()
    usage = Usage(num_prompt, num_prompt, len(token_ids))
    return [
        Started(turn.request_id, turn.session, old.turn, num_prompt, num_prompt, decision),
        Delta(text, token_ids, 0),
        Finished(old.record.finish_reason, usage, watch.timings(Timings()), ""),
    ]
