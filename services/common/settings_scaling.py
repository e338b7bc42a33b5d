"""Settings of how many replicas there are."""

from __future__ import annotations

import math
from typing import Self

from pydantic import Field, model_validator

from services.common.settings_section import Fraction, PositiveInt, Seconds, Section


class ReplicaBounds(Section):
    """How many replicas of a deployment there may be."""

    min: PositiveInt = Field(default=1, description="Fewest replicas.")
    max: PositiveInt = Field(default=1, description="Most replicas.")

    @model_validator(mode="after")
    def _is_a_range(self) -> Self:
        if self.min > self.max:
            raise ValueError("min must not exceed max")
        return self


class AutoscalingSettings(Section):
    """How many replicas there are, by load. Off: each deployment's num_replicas, for good."""

    enabled: bool = Field(
        default=False,
        description="Follow the load; num_replicas is the start. A Serve config needs its autoscaling_policy, too.",
    )
    gateway: ReplicaBounds = ReplicaBounds()
    tokenizer: ReplicaBounds = ReplicaBounds()
    prefill: ReplicaBounds = ReplicaBounds()
    decode: ReplicaBounds = ReplicaBounds()
    interval_s: Seconds = Field(default=1.0, description="Time between two decisions, in seconds.")
    target_queue_s: Seconds = Field(
        default=1.0, description="Longest that waiting prompt tokens may take at the measured speed, in seconds."
    )
    max_prefill_busy: Fraction = Field(default=0.8, description="Part of the time that prefill replicas may compute.")
    target_inter_token_s: Seconds = Field(
        default=0.05, description="Time between two tokens of a reply that decode aims at, in seconds."
    )
    max_kv_usage: Fraction = Field(default=0.8, description="Part of the KV blocks that running turns may use.")
    max_cpu: Fraction = Field(default=0.7, description="Part of one core that a gateway or tokenizer replica may use.")
    max_turns: PositiveInt = Field(default=256, description="Turns, or calls of a tokenizer, at once in one replica.")
    min_prefill_per_decode: float = Field(default=0.0, ge=0, description="Least prefill replicas a decode replica.")
    max_prefill_per_decode: float = Field(default=8.0, gt=0, description="Most prefill replicas a decode replica.")
    up_window_s: float = Field(
        default=0.0, ge=0, description="More replicas only if wanted for so long, in seconds. 0: at the first sight."
    )
    down_window_s: Seconds = Field(
        default=300.0, description="Fewer replicas only if enough for so long, and so long after a change, in seconds."
    )
    down_margin: Fraction = Field(
        default=0.7, description="Part of their targets that the replicas left over may be loaded to."
    )
    session_keep_s: Seconds = Field(
        default=600.0, description="KV of a session without a turn for longer is not worth keeping, in seconds."
    )

    @model_validator(mode="after")
    def _ratio_can_be_kept(self) -> Self:
        least, most = self.min_prefill_per_decode, self.max_prefill_per_decode
        for num_decode in range(self.decode.min, self.decode.max + 1):
            fewest = max(self.prefill.min, math.ceil(least * num_decode - 1e-9))
            if fewest <= min(self.prefill.max, math.floor(most * num_decode + 1e-9)):
                return self
        raise ValueError("no number of prefill and decode replicas within their bounds keeps the ratio")
