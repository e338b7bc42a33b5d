"""The tokenizer deployment: chat template and vocabulary behind a Serve handle. Holds no state between calls."""

from __future__ import annotations

from collections.abc import Sequence

from ray import serve

from services.common.messages import Message
from services.common.process_load import ProcessLoad
from services.common.settings import Settings
from services.common.telemetry import configure_logging
from services.engine.hub import resolve_model
from services.text.chat_template import ChatEncoder
from services.text.tokenizer import Tokenizer


@serve.deployment(name="tokenizer", max_ongoing_requests=64, ray_actor_options={"num_cpus": 0.1})
class TokenizerDeployment:
    """Text to token ids, for gateways. Raises InvalidCheckpoint at start if the model has no chat template."""

    def __init__(self, settings: Settings) -> None:
        configure_logging(settings.telemetry.log_level, "tokenizer", serve.get_replica_context().replica_id.unique_id)
        self._load = ProcessLoad()
        self._tokenizer = Tokenizer.from_folder(resolve_model(settings.model.path))
        self._encoder = ChatEncoder.from_tokenizer(self._tokenizer)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Its load, for the scaling policy. Calls run one after another, so its CPU time says it all."""
        return {"num_cpus": self._load.num_cpus(), "num_calls": 0.0}

    def template_digest(self) -> str:
        """SHA-256 of the chat template; a session is never continued with another one."""
        return self._encoder.template_digest

    def encode_turn(
        self, messages: Sequence[Message], is_first_turn: bool, previous_turn_ended_with_eos: bool
    ) -> list[int]:
        """What a turn's new messages add to the journal. Raises as ChatEncoder.encode_turn does."""
        return self._encoder.encode_turn(
            messages, is_first_turn=is_first_turn, previous_turn_ended_with_eos=previous_turn_ended_with_eos
        )

    def tokenize(self, text: str, as_prompt: bool = False) -> list[int]:
        """Token ids of text as it is, or as a raw prompt. Raises InvalidRequest, PromptTooLong."""
        return self._tokenizer.encode(text, allow_control_tokens=as_prompt, add_bos=as_prompt, field="text")
