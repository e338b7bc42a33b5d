"""What an FP8 cache costs a trained model: the perplexity of chats that it was not trained on.

chats_written.txt was written by hand, far from what the demo model knows; chats_sampled.txt are its own replies at
temperature 0.8. Lines alternate: user, assistant.
"""

from pathlib import Path

import pytest

from services.common.settings import EngineSettings, ModelSettings
from services.local import LocalPipeline

TEXTS = Path(__file__).parent.parent / "data" / "text"


def load(kv_dtype):
    engine = EngineSettings(device="cpu", num_blocks=256)
    return LocalPipeline.load(ModelSettings(dtype="bfloat16", kv_dtype=kv_dtype), engine)


def chat_ids(pipeline, path):
    lines = path.read_text().strip().split("\n")
    chat = "".join(
        f"<｜User｜>{question}<｜Assistant｜>{answer}<｜end▁of▁sentence｜>"
        for question, answer in zip(lines[::2], lines[1::2], strict=True)
    )
    return pipeline.text.encode(f"<｜begin▁of▁sentence｜>{chat}", allow_control_tokens=True)


@pytest.mark.parametrize("name", ["chats_written.txt", "chats_sampled.txt"])
def test_an_fp8_cache_moves_the_perplexity_by_less_than_half_a_percent(name):
    plain, rounded = load("bfloat16"), load("fp8")
    token_ids = chat_ids(plain, TEXTS / name)
    assert len(token_ids) > 800
    expected, measured = plain.score(token_ids).perplexity, rounded.score(token_ids).perplexity
    assert measured != expected  # the cache is read
    assert measured == pytest.approx(expected, rel=0.005)
