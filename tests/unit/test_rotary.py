import math

import pytest
import torch

from services.engine.config import ModelConfig
from services.engine.rotary import RotaryEmbedding, rotate, softmax_scale
from tests.unit.tiny_model import v3_config, yarn

CPU = torch.device("cpu")


def config_with(scaling, **changes):
    return ModelConfig.from_dict(v3_config(rope_scaling=scaling, **changes))


def test_turns_neighbouring_elements_by_position_times_frequency():
    rotary = RotaryEmbedding(config_with(None, qk_rope_head_dim=4), 16, CPU)
    cos, sin = rotary.at(torch.tensor([3]))
    x = torch.tensor([[1.0, 0.0, 0.0, 1.0]])
    fast, slow = 3.0, 3.0 * 10000**-0.5
    wanted = torch.tensor([[math.cos(fast), math.sin(fast), -math.sin(slow), math.cos(slow)]])
    torch.testing.assert_close(rotate(x, cos, sin), wanted)


def test_position_zero_changes_nothing():
    cos, sin = RotaryEmbedding(config_with(None), 4, CPU).at(torch.tensor([0, 0]))
    x = torch.randn(2, 8)
    assert torch.equal(rotate(x, cos, sin), x)


def test_products_depend_on_the_distance_alone():
    rotary = RotaryEmbedding(config_with(None), 64, CPU)
    q, k = torch.randn(8, dtype=torch.float32), torch.randn(8)

    def product(at_q, at_k):
        cos, sin = rotary.at(torch.tensor([at_q, at_k]))
        turned = rotate(torch.stack((q, k)), cos, sin)
        return turned[0] @ turned[1]

    torch.testing.assert_close(product(7, 2), product(55, 50), rtol=1e-4, atol=1e-5)


def test_heads_share_the_angles_and_bf16_stays_bf16():
    cos, sin = RotaryEmbedding(config_with(None), 8, CPU).at(torch.tensor([1, 5]))
    x = torch.randn(2, 3, 8)
    for head in range(3):
        assert torch.equal(rotate(x, cos, sin)[:, head], rotate(x[:, head], cos, sin))
    assert rotate(x.bfloat16(), cos, sin).dtype == torch.bfloat16


@pytest.mark.parametrize("scaling", [None, yarn(), yarn(beta_fast=1)])
def test_a_longer_table_begins_with_the_shorter(scaling):
    config = config_with(scaling)
    short, long = RotaryEmbedding(config, 4096, CPU), RotaryEmbedding(config, 8192, CPU)
    assert torch.equal(long.cos[:4096], short.cos)
    assert torch.equal(long.sin[:4096], short.sin)


def test_yarn_keeps_the_fast_dimensions_and_stretches_the_slow_ones():
    plain = RotaryEmbedding(config_with(None, qk_rope_head_dim=64), 2, CPU)
    scaling = yarn(factor=40.0, original_max_position_embeddings=4096)
    stretched = RotaryEmbedding(config_with(scaling, qk_rope_head_dim=64), 2, CPU)
    before, after = plain.sin[1].asin(), stretched.sin[1].asin()
    torch.testing.assert_close(after[1:10], before[1:10])  # element 0 turns by a whole radian: asin is fine, but skip
    torch.testing.assert_close(after[24:], before[24:] / 40)
    assert ((after[11:22] < before[11:22]) & (after[11:22] > before[11:22] / 40)).all()


def test_yarn_with_equal_betas_is_a_step_and_stays_finite():
    rotary = RotaryEmbedding(config_with(yarn(beta_fast=1, beta_slow=1), qk_rope_head_dim=64), 8, CPU)
    assert rotary.cos.isfinite().all()
    assert rotary.sin.isfinite().all()


def test_equal_mscales_leave_the_amplitude_and_scale_the_scores():
    config = config_with(yarn(factor=40.0))
    assert RotaryEmbedding(config, 2, CPU).cos[0].tolist() == [1.0] * 4
    assert softmax_scale(config) == pytest.approx(16**-0.5 * (0.1 * math.log(40) + 1) ** 2)


def test_different_mscales_give_an_amplitude():
    config = config_with(yarn(factor=40.0, mscale=0.707, mscale_all_dim=1.0))
    amplitude = (0.0707 * math.log(40) + 1) / (0.1 * math.log(40) + 1)
    assert RotaryEmbedding(config, 2, CPU).cos[0].tolist() == pytest.approx([amplitude] * 4)


def test_without_scaling_the_scores_are_divided_by_the_root_of_the_head_size():
    assert softmax_scale(config_with(None)) == 16**-0.5
