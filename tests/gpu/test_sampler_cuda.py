"""The sampler on CUDA: the same tokens as on the CPU, whatever the batch."""

from __future__ import annotations

import math

import pytest
import torch

from services.common.sampling import SamplingParams
from services.engine.kernels.draw_tokens import Draws, draw_tokens
from services.engine.noise import gumbel, stream_key_array
from services.engine.sampler import Sampler, SamplingRow, draw_arrays

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

KINDS = [
    SamplingParams(temperature=0.0),
    SamplingParams(),
    SamplingParams(temperature=0.6, top_p=0.9),
    SamplingParams(temperature=1.5, top_p=0.95),
    SamplingParams(top_k=50),
    SamplingParams(min_p=0.05, repetition_penalty=1.2, presence_penalty=0.5, logit_bias={5: 3.0}),
    SamplingParams(temperature=0.0, logprobs=5),
    SamplingParams(top_k=1000, top_p=0.8),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_on_cuda_are_those_of_the_cpu_in_a_batch_and_alone(dtype: torch.dtype) -> None:
    logits = (torch.randn(64, 129_280, generator=torch.Generator().manual_seed(1)) * 2.5).to(dtype)
    logits[9, 3] = math.nan
    rows = [SamplingRow(KINDS[i % 8], list(range(300)), list(range(i)), i, i * 31) for i in range(64)]
    expected = [sampled.token_id for sampled in Sampler().sample(logits, rows)]
    on_cuda = logits.cuda()
    assert [sampled.token_id for sampled in Sampler().sample(on_cuda, rows)] == expected
    assert [Sampler().sample(on_cuda[i : i + 1], [rows[i]])[0].token_id for i in range(64)] == expected
    assert expected[9] == -1


def test_noise_on_cuda_is_that_of_the_cpu() -> None:
    keys = torch.from_numpy(stream_key_array(range(64), [seed % 9 for seed in range(64)])).unsqueeze(-1)
    on_cuda = gumbel(keys.cuda(), torch.arange(5000, device="cuda"))
    torch.testing.assert_close(on_cuda.cpu(), gumbel(keys, torch.arange(5000)), rtol=0, atol=1e-14)


def test_ties_go_to_the_lower_id_on_cuda() -> None:
    tied = torch.zeros(64, 129_280, device="cuda")
    greedy = [SamplingRow(KINDS[0], [], [], 0, seed) for seed in range(64)]
    top_three = [SamplingRow(SamplingParams(top_k=3), [], [], 0, seed) for seed in range(64)]
    assert {sampled.token_id for sampled in Sampler().sample(tied, greedy)} == {0}
    assert {sampled.token_id for sampled in Sampler().sample(tied, top_three)} == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale", [0.2, 2.5, 12.0])
@pytest.mark.parametrize("vocab_size", [129_280, 5000])
def test_a_whole_step_is_sampled_on_cuda_as_on_the_cpu(dtype: torch.dtype, scale: float, vocab_size: int) -> None:
    kinds = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(temperature=0.6, top_p=0.95),
        SamplingParams(temperature=1.5, top_p=0.3),
        SamplingParams(top_k=50),
        SamplingParams(top_k=1),
        SamplingParams(top_k=1000, top_p=0.8, temperature=0.7),
        SamplingParams(min_p=0.05, top_p=0.9),
        SamplingParams(min_p=0.2),
    ]
    num_rows = 8 * len(kinds)
    logits = (torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(3)) * scale).to(dtype)
    logits[10, 7] = math.nan
    logits[11] = -math.inf
    logits[12, 9] = math.inf
    logits[13] = 1.5
    logits[22, 100:] = -math.inf
    rows = [SamplingRow(kinds[i % len(kinds)], (), (), i, i * 77) for i in range(num_rows)]
    expected = [sampled.token_id for sampled in Sampler().sample(logits, rows)]
    on_cuda = logits.cuda()

    def drawn(chosen: list[int]) -> list[int]:
        arrays = draw_arrays([rows[i] for i in chosen], vocab_size)
        draws = Draws(**{name: torch.from_numpy(array).cuda() for name, array in arrays.items()})
        out = torch.full((len(chosen),), -7, dtype=torch.int32, device="cuda")
        draw_tokens(on_cuda[chosen], draws, out)
        return out.tolist()

    assert drawn(list(range(num_rows))) == expected
    assert [drawn([i])[0] for i in range(0, num_rows, 5)] == expected[::5]
    assert expected[10:13] == [-1, -1, -1]
