"""The engine against transformers, live, on checkpoints shaped like each published family."""

import pytest
import torch

from services.engine.config import ModelConfig
from tests.parity.checkpoints import CONFIGS, make
from tests.parity.engines import GREEDY_32, Tap, engine_of, logits_of, run
from tests.parity.reference import assert_close


@pytest.fixture(scope="module", params=CONFIGS)
def made(request, tmp_path_factory):
    return make(tmp_path_factory.mktemp(request.param), CONFIGS[request.param])


def prompts_for(made):
    generator = torch.Generator().manual_seed(3)
    return [
        torch.randint(3, made.model.config.vocab_size, (length,), generator=generator).tolist()
        for length in (1, 6, 33, 150)
    ]


@pytest.mark.parametrize(("cache_mode", "chunk"), [("absorb", None), ("absorb", 7), ("naive", 64)])
def test_logits_and_greedy_tokens_are_those_of_transformers(made, cache_mode, chunk):
    prompts = prompts_for(made)
    engine = engine_of(made.folder, cache_mode=cache_mode, chunk=chunk)
    for ours, prompt in zip(logits_of(engine, prompts), prompts, strict=True):
        assert_close(ours, made.logits(prompt))
    tap = Tap(engine)
    replies = run(engine, prompts, GREEDY_32)
    for i, (prompt, reply) in enumerate(zip(prompts, replies, strict=True)):
        assert reply == made.greedy(prompt, 32)
        assert_close(tap.logits(str(i)), made.logits(prompt + reply[:-1])[len(prompt) - 1 :])


@pytest.mark.parametrize("cache_mode", ["absorb", "naive"])
def test_a_sharded_checkpoint_gives_the_same_numbers(tmp_path, cache_mode):
    whole = make(tmp_path / "whole", CONFIGS["kimi"])
    sharded = make(tmp_path / "sharded", CONFIGS["kimi"], max_shard_size="200KB")
    assert len(list(sharded.folder.glob("*.safetensors"))) > 2
    assert (sharded.folder / "model.safetensors.index.json").exists()
    assert not (sharded.folder / "model.safetensors").exists()
    prompts = prompts_for(whole)
    one, many = (logits_of(engine_of(made.folder, cache_mode=cache_mode), prompts) for made in (whole, sharded))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(one, many, strict=True))


def test_kimi_s_own_model_type_is_the_same_architecture(tmp_path):
    made = make(tmp_path, CONFIGS["kimi"])
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace("deepseek_v3", "kimi_k2"))
    assert ModelConfig.from_folder(tmp_path).model_type == "kimi_k2"
    prompt = prompts_for(made)[-1]
    assert_close(logits_of(engine_of(tmp_path), [prompt])[0], made.logits(prompt))
