"""The routed experts of a mixture: each token passes through the K experts chosen for it.

T tokens, D model, E experts, K chosen ones, M an expert's width. FP8 weights have 128 x 128 block scales; gate and up
each have row blocks of their own: `gate_up_scale` is [E, 2 * ceil(M / 128), ceil(D / 128)], gate's first.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from services.engine.kernels.fp8_linear import dequantize, fake_quantize_activations


def moe_experts(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    round_scales_to_power_of_two: bool = False,
    added: torch.Tensor | None = None,
    is_added: torch.cuda.Event | None = None,
) -> torch.Tensor:
    """sum_k topk_weights[t, k] * down(silu(gate(x)) * up(x)) of expert topk_ids[t, k]: x [T, D] to [T, D] in x's dtype.

    `gate_up` is [E, 2M, D] (gate's rows first), `down` [E, D, M], `topk_ids` [T, K] int, `topk_weights` [T, K] fp32.
    Weights are x's dtype, or e4m3 with both scales given (`down_scale` [E, ceil(D / 128), ceil(M / 128)]); then
    activations are quantised as in `fp8_linear`. `added` [T, D], the shared experts' output, joins the sum over K,
    which is in fp32; `is_added`: what to wait for before it may be read, where another stream computes it.
    On CUDA nothing is read back to the host, so the call can be captured in a graph.
    """
    scales = (gate_up_scale, down_scale, round_scales_to_power_of_two)
    arguments = (x, gate_up, down, topk_ids, topk_weights, *scales, added)
    if x.is_cuda:
        from services.engine.kernels.moe_experts_triton import moe_experts_triton

        return moe_experts_triton(*arguments, is_added)
    return moe_experts_reference(*arguments)


def moe_experts_reference(
    x: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    gate_up_scale: torch.Tensor | None = None,
    down_scale: torch.Tensor | None = None,
    round_scales_to_power_of_two: bool = False,
    added: torch.Tensor | None = None,
) -> torch.Tensor:
    """`moe_experts` in plain PyTorch: a loop over the experts that have tokens."""
    if gate_up_scale is not None and down_scale is not None:
        dtype = x.dtype
        weights = _Fp8Weights(gate_up, down, gate_up_scale, down_scale, round_scales_to_power_of_two)
        quantized = fake_quantize_activations(x, round_scales_to_power_of_two)
        return _run(quantized, weights, topk_ids, topk_weights, dtype, added)
    return _run(x, _Weights(gate_up, down), topk_ids, topk_weights, x.dtype, added)


def _run(
    x: torch.Tensor,
    weights: _Weights,
    topk_ids: torch.Tensor,
    topk_weights: torch.Tensor,
    dtype: torch.dtype,
    added: torch.Tensor | None,
) -> torch.Tensor:
    num_tokens, num_chosen = topk_ids.shape
    if num_tokens == 1:
        experts = [(expert, row, row + 1) for row, expert in enumerate(topk_ids[0].tolist())]
        gathered = x.expand(num_chosen, -1)
    else:
        flat = topk_ids.flatten()
        order = flat.argsort()
        experts = _segments(torch.bincount(flat, minlength=weights.num_experts).tolist())
        gathered = x.index_select(0, order // num_chosen)
    width = weights.width
    hidden = torch.cat([F.linear(gathered[a:b], weights.gate_up(expert)) for expert, a, b in experts])
    activated = weights.prepare((F.silu(hidden[:, :width]) * hidden[:, width:]).to(dtype))
    outputs = torch.cat([F.linear(activated[a:b], weights.down(expert)) for expert, a, b in experts])
    if num_tokens > 1:
        outputs = torch.empty_like(outputs).index_copy_(0, order, outputs)
    # One small product a token: sums the K rows in fp32 without a temporary of their size for the weighting.
    rows = outputs.view(num_tokens, num_chosen, -1).to(topk_weights.dtype)
    total = torch.bmm(topk_weights.unsqueeze(1), rows).squeeze(1)
    return (total if added is None else total + added).to(dtype)


def _segments(counts: list[int]) -> list[tuple[int, int, int]]:
    """(expert, first row, end row) of each expert with tokens, given the number of tokens of each."""
    segments, start = [], 0
    for expert, count in enumerate(counts):
        if count:
            segments.append((expert, start, start + count))
            start += count
    return segments


class _Weights:
    """The experts' matrices as they are."""

    def __init__(self, gate_up: torch.Tensor, down: torch.Tensor) -> None:
        self._gate_up, self._down = gate_up, down
        self.num_experts, self.width = gate_up.shape[0], gate_up.shape[1] // 2

    def gate_up(self, expert: int) -> torch.Tensor:
        return self._gate_up[expert]

    def down(self, expert: int) -> torch.Tensor:
        return self._down[expert]

    def prepare(self, activated: torch.Tensor) -> torch.Tensor:
        """What `down` multiplies."""
        return activated


class _Fp8Weights(_Weights):
    """Block-scaled matrices, dequantised to fp32 one expert at a time."""

    def __init__(
        self,
        gate_up: torch.Tensor,
        down: torch.Tensor,
        gate_up_scale: torch.Tensor,
        down_scale: torch.Tensor,
        round_scales_to_power_of_two: bool,
    ) -> None:
        super().__init__(gate_up, down)
        self._gate_up_scale, self._down_scale = gate_up_scale, down_scale
        self._round_scales_to_power_of_two = round_scales_to_power_of_two

    def gate_up(self, expert: int) -> torch.Tensor:
        matrices = self._gate_up[expert].chunk(2)
        scales = self._gate_up_scale[expert].chunk(2)
        pairs = zip(matrices, scales, strict=True)
        return torch.cat([dequantize(matrix, scale, torch.float32) for matrix, scale in pairs])

    def down(self, expert: int) -> torch.Tensor:
        return dequantize(self._down[expert], self._down_scale[expert], torch.float32)

    def prepare(self, activated: torch.Tensor) -> torch.Tensor:
        return fake_quantize_activations(activated, self._round_scales_to_power_of_two)
