"""Stored references of transformers, and the measures by which an engine is held against them.

A row's error is |ours - theirs| / |theirs| over the vocabulary; a prompt's is the same over all its rows together.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

CHECKPOINTS = Path(__file__).parent.parent / "data" / "checkpoints"
STORED = ("v2lite", "v3", "v3_fp8")

# transformers itself is up to 6e-6 from an evaluation of the same weights in fp64; one wrong epsilon gives 1.2e-5.
MAX_PROMPT_ERROR = 1e-5
MAX_ROW_ERROR = 3e-5
# In bf16 a rounding flips a router choice now and then, so the yardstick is transformers' own bf16 error.
BF16_SLACK = 1.5
BF16_TOP1_SLACK = 0.05


@dataclass(frozen=True)
class Reference:
    """Prompts, their logits [T, vocab] in fp32 and bf16, and 32 greedy tokens after each in fp32."""

    folder: Path
    prompts: list[list[int]]
    logits: list[Tensor]
    bf16_logits: list[Tensor]
    greedy: list[list[int]]


def stored(name: str) -> Reference:
    """The reference beside a checkpoint of tests/data."""
    folder = CHECKPOINTS / name
    text = json.loads((folder / "ref.json").read_text())
    tensors = load_file(folder / "ref.safetensors")
    indices = range(len(text["prompts"]))
    return Reference(
        folder,
        text["prompts"],
        [tensors[f"logits_fp32.{i}"] for i in indices],
        [tensors[f"logits_bf16.{i}"] for i in indices],
        text["greedy_fp32"],
    )


def row_errors(ours: Tensor, theirs: Tensor) -> Tensor:
    """[T] relative errors of logits [T, vocab], in fp64."""
    ours, theirs = ours.double(), theirs.double()
    return (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)


def prompt_error(ours: Tensor, theirs: Tensor) -> float:
    """The relative error of all rows taken together."""
    ours, theirs = ours.double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def assert_close(ours: Tensor, theirs: Tensor) -> None:
    """Both limits of fp32."""
    assert ours.shape == theirs.shape
    assert prompt_error(ours, theirs) <= MAX_PROMPT_ERROR
    assert float(row_errors(ours, theirs).max()) <= MAX_ROW_ERROR


def top1_agreement(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """The share of rows with the same best token."""
    return float((torch.cat(ours).argmax(-1) == torch.cat(theirs).argmax(-1)).float().mean())


def assert_no_worse_than_bf16(ours: list[Tensor], reference: Reference) -> None:
    """Median, upper quartile and best tokens, against fp32, are about as good as those of transformers in bf16."""
    errors = row_errors(torch.cat(ours), torch.cat(reference.logits))
    yardstick = row_errors(torch.cat(reference.bf16_logits), torch.cat(reference.logits))
    for quantile in (0.5, 0.75):
        assert errors.quantile(quantile) <= BF16_SLACK * yardstick.quantile(quantile)
    theirs = top1_agreement(reference.bf16_logits, reference.logits)
    assert top1_agreement(ours, reference.logits) >= theirs - BF16_TOP1_SLACK
