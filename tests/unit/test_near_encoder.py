"""Short texts are tokenized at the gateway, long ones by the deployment, and nobody can tell."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from services.common.messages import Message
from services.engine.hub import resolve_model
from services.gateway.text import MAX_NEAR_CHARS, NearEncoder
from services.text.chat_template import ChatEncoder
from services.text.tokenizer import Tokenizer


class CountingEncoder:
    """The same, elsewhere."""

    def __init__(self, encoder: ChatEncoder, tokenizer: Tokenizer) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self.num_calls = 0

    async def encode_turn(
        self, messages: Sequence[Message], is_first_turn: bool, previous_turn_ended_with_eos: bool
    ) -> list[int]:
        self.num_calls += 1
        return self._encoder.encode_turn(
            messages, is_first_turn=is_first_turn, previous_turn_ended_with_eos=previous_turn_ended_with_eos
        )

    async def tokenize(self, text: str, as_prompt: bool = False) -> list[int]:
        self.num_calls += 1
        return self._tokenizer.encode(text)


@pytest.mark.parametrize(("num_chars", "num_calls"), [(100, 0), (MAX_NEAR_CHARS, 0), (MAX_NEAR_CHARS + 1, 1)])
async def test_only_long_texts_travel_and_the_tokens_are_the_same(num_chars: int, num_calls: int) -> None:
    tokenizer = Tokenizer.from_folder(resolve_model("demo"))
    encoder = ChatEncoder.from_tokenizer(tokenizer)
    far = CountingEncoder(encoder, tokenizer)
    near = NearEncoder(encoder, tokenizer, far)
    text = ("a fox and a lantern " * num_chars)[:num_chars]
    half = len(text) // 2
    messages = [Message("user", text[:half]), Message("user", text[half:])]
    for is_first, after_eos in ((True, True), (False, True), (False, False)):
        expected = encoder.encode_turn(messages, is_first_turn=is_first, previous_turn_ended_with_eos=after_eos)
        assert await near.encode_turn(messages, is_first, after_eos) == expected
    assert await near.tokenize(text) == tokenizer.encode(text)
    assert far.num_calls == 4 * num_calls
