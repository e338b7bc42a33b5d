"""A checkpoint that costs next to nothing to compute: the demo model's vocabulary over two layers of random numbers."""

from __future__ import annotations

import shutil
from pathlib import Path

from services.engine.hub import DEMO_MODEL
from tests.unit.tiny_model import v3_config, write_checkpoint, yarn

_TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def write_small_checkpoint(folder: Path) -> Path:
    """Writes it; returns the folder. Prompts of up to 8,192 tokens."""
    scaling = yarn(original_max_position_embeddings=2048)
    write_checkpoint(
        folder, v3_config(vocab_size=8192, eos_token_id=1, max_position_embeddings=8192, rope_scaling=scaling)
    )
    for name in _TEXT_FILES:
        shutil.copyfile(DEMO_MODEL / name, folder / name)
    return folder
