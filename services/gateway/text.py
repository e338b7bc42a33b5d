"""Text at the gateway: what it asks of the tokenizer deployment, and what it does itself.

Detokenizing happens here, beside the client's stream: a call to another process for each token would cost more than the
token. So would a call for a short message. Long texts, which would hold up the other streams, are tokenized there.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from services.common.errors import InvalidRequest
from services.common.messages import Message, ModelInfo
from services.common.settings import ModelSettings
from services.text.chat_template import ChatEncoder
from services.text.tokenizer import Tokenizer

MAX_NEAR_CHARS = 4096  # about a millisecond's work


class Encoder(Protocol):
    """Text to token ids. All methods raise InvalidRequest, PromptTooLong, and Unavailable if nobody can do it now."""

    async def encode_turn(
        self, messages: Sequence[Message], is_first_turn: bool, previous_turn_ended_with_eos: bool
    ) -> list[int]:
        """What a turn's new messages add to the journal."""
        ...

    async def tokenize(self, text: str, as_prompt: bool = False) -> list[int]:
        """Token ids of text as it is, or as a raw prompt."""
        ...


class NearEncoder:
    """Implements Encoder: short texts are encoded here, in less time than a call takes; long ones by `far`.

    near: of the same model as far.
    """

    def __init__(self, near: ChatEncoder, tokenizer: Tokenizer, far: Encoder) -> None:
        self._near = near
        self._tokenizer = tokenizer
        self._far = far

    async def encode_turn(
        self, messages: Sequence[Message], is_first_turn: bool, previous_turn_ended_with_eos: bool
    ) -> list[int]:
        """See Encoder."""
        if sum(len(message.content) for message in messages) > MAX_NEAR_CHARS:
            return await self._far.encode_turn(messages, is_first_turn, previous_turn_ended_with_eos)
        return self._near.encode_turn(
            messages, is_first_turn=is_first_turn, previous_turn_ended_with_eos=previous_turn_ended_with_eos
        )

    async def tokenize(self, text: str, as_prompt: bool = False) -> list[int]:
        """See Encoder."""
        if len(text) > MAX_NEAR_CHARS:
            return await self._far.tokenize(text, as_prompt)
        return self._tokenizer.encode(text, allow_control_tokens=as_prompt, add_bos=as_prompt, field="text")


class GatewayText:
    """Implements pipeline_api.Text."""

    def __init__(self, encoder: Encoder, tokenizer: Tokenizer, model: ModelInfo) -> None:
        self._encoder = encoder
        self._tokenizer = tokenizer
        self._model = model

    async def tokenize_chat(self, messages: Sequence[Message]) -> Sequence[int]:
        """The first turn of a session."""
        return await self._encoder.encode_turn(messages, True, True)

    async def tokenize(self, text: str, as_prompt: bool = False) -> Sequence[int]:
        """No template."""
        return await self._encoder.tokenize(text, as_prompt)

    async def detokenize(self, token_ids: Sequence[int]) -> str:
        """Special tokens included."""
        for index, token_id in enumerate(token_ids):
            if token_id >= self._model.vocab_size:
                raise InvalidRequest(f"token_ids[{index}]", f"must be below {self._model.vocab_size}, got {token_id}")
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)

    async def model(self) -> ModelInfo:
        """The model's card."""
        return self._model


def served_name(settings: ModelSettings) -> str:
    """The model's name, as clients see it."""
    return settings.served_name or Path(settings.path).name
