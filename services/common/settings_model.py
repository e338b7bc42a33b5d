"""Settings of the model and of one engine: also what a process without a cluster needs."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from services.common.settings_section import Fraction, PositiveInt, Seconds, Section


class ModelSettings(Section):
    """Which model is served, and in which number formats."""

    path: str = Field(default="demo", description="Directory of a checkpoint, model id of a hub, or `demo`.")
    served_name: str | None = Field(default=None, description="Name that clients see. Not set: last part of `path`.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Number format of weights and activations. auto: the checkpoint's, float32 on a CPU.",
    )
    cache_mode: Literal["absorb", "naive"] = Field(
        default="absorb",
        description="What the cache holds: the latent (absorb), or keys and values of each head (naive).",
    )
    kv_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = Field(
        default="auto", description="Number format of the cache. auto: as `dtype`. fp8 needs absorb."
    )
    load_format: Literal["safetensors", "dummy"] = Field(
        default="safetensors", description="Where weights come from: the files, or a seeded random generator (dummy)."
    )
    max_seq_len: PositiveInt | None = Field(
        default=None, description="Most tokens of prompt and reply together. Not set: the model's own limit."
    )
    seed: int = Field(default=0, ge=0, description="Seed of dummy weights.")

    @model_validator(mode="after")
    def _fp8_needs_absorb(self) -> Self:
        if self.kv_dtype == "fp8" and self.cache_mode != "absorb":
            raise ValueError("kv_dtype fp8 needs cache_mode absorb")
        return self


class EngineSettings(Section):
    """One engine: its block pool, and how much it does in one step."""

    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="Where it runs. auto: cuda if there is one."
    )
    block_size: PositiveInt = Field(default=16, description="Tokens of one KV block.")
    memory_fraction: Fraction = Field(
        default=0.9, description="Part of the GPU's memory for weights, activations and blocks together (GPU only)."
    )
    kv_cache_bytes: PositiveInt | None = Field(
        default=None, description="Bytes of the block pool. Not set: what memory_fraction leaves; 256 MiB on a CPU."
    )
    num_blocks: PositiveInt | None = Field(default=None, description="Blocks of the pool; overrides both fields above.")
    max_num_batched_tokens: PositiveInt = Field(default=2048, description="Most tokens computed in one step.")
    max_num_sequences: PositiveInt = Field(default=64, description="Most sequences that run at once.")
    max_num_waiting: PositiveInt = Field(default=256, description="Most sequences that wait; more are refused.")
    max_step_s: Seconds = Field(
        default=120.0,
        description="A step that takes longer counts as hung: the replica is given up and replaced, in seconds.",
    )
    prefix_caching: bool = Field(
        default=True, description="Reuse blocks of prompts seen before. Off: every turn is cold."
    )
    cuda_graphs: bool = Field(
        default=True, description="Capture steps as CUDA graphs when the model is loaded (GPU only)."
    )
    num_threads: PositiveInt | None = Field(
        default=None, description="CPU threads of PyTorch. Not set: PyTorch's choice."
    )
