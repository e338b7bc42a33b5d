"""How close the CUDA kernels come to what the card can do.

    python -m tests.bench.kernels [--only decode bound moe linear prefill]

Measures the card's copy and matrix rates first. Then each kernel is checked against its reference, captured in a CUDA
graph over rotated inputs (so that weights and latents come from memory, not from the L2 cache), and timed by device
events: the median of the replays. The limit is the larger of bytes over the copy rate and operations over the matrix
rate. Prints a table and writes tests/bench/results/kernels-CARD.json, where parts that did not run keep what they had.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from services.engine.kernels.fp8_linear import fp8_linear, fp8_linear_reference
from services.engine.kernels.mla_decode import mla_decode, mla_decode_reference
from services.engine.kernels.mla_decode_flash_mla import FEW_HEADS, flash_mla, mla_decode_flash_mla
from services.engine.kernels.mla_prefill import mla_prefill, mla_prefill_reference
from services.engine.kernels.moe_experts import moe_experts, moe_experts_reference
from tests.bench.commit import commit
from tests.kernel_inputs import decode_inputs, fp8_weight, pack_latents, relative_error

RESULTS = Path(__file__).parent / "results"
BFLOAT16 = torch.bfloat16
# More than the L2 cache holds, so that a replay finds none of its inputs there.
COLD_BYTES = 300_000_000
LATENT, ROPE = 512, 64


@dataclass(frozen=True)
class Rates:
    """What the card does in this run: bytes read and written a second, operations a second."""

    copy: float
    bfloat16: float
    fp8: float


@dataclass(frozen=True)
class Figure:
    """One kernel at one size."""

    name: str
    time_us: float
    limit_us: float
    fraction: float
    tb_per_s: float
    tflop_per_s: float
    error: float
    peer: str = ""
    peer_time_us: float | None = None


def time_ms(calls: list[Callable[[], object]], replays: int = 15) -> float:
    """Median time of one call, over replays of a graph of all calls."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    return statistics.median(_elapsed_ms(graph.replay) for _ in range(replays)) / len(calls)


def time_eager_ms(call: Callable[[], object], replays: int = 15) -> float:
    """Median time of one call by itself."""
    call()
    return statistics.median(_elapsed_ms(call) for _ in range(replays))


def _elapsed_ms(call: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end)


def measure_rates() -> Rates:
    """Copy of 2 GB; products of 8192 x 8192 matrices of random numbers."""
    source = torch.randn(2**30, device="cuda", dtype=BFLOAT16)
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / time_eager_ms(lambda: target.copy_(source)) * 1e3
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=BFLOAT16) for _ in range(2))
    bfloat16 = 2 * 8192**3 / time_eager_ms(lambda: a @ b) * 1e3
    a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device="cuda")
    product = time_eager_ms(lambda: torch._scaled_mm(a8, b8, scale_a=one, scale_b=one, out_dtype=BFLOAT16))
    return Rates(copy, bfloat16, 2 * 8192**3 / product * 1e3)


class Bench:
    """Turns times into figures against the rates of this run."""

    def __init__(self, rates: Rates) -> None:
        self.rates = rates

    def figure(
        self,
        name: str,
        ms: float,
        num_bytes: float,
        flops: float,
        error: float,
        peer: tuple[str, float | None],
        fp8: bool = False,
    ) -> Figure:
        matrix = self.rates.fp8 if fp8 else self.rates.bfloat16
        limit_ms = max(num_bytes / self.rates.copy, flops / matrix) * 1e3
        return Figure(
            name,
            round(ms * 1e3, 1),
            round(limit_ms * 1e3, 1),
            round(limit_ms / ms, 3),
            round(num_bytes / ms / 1e9, 2),
            round(flops / ms / 1e9, 1),
            float(f"{error:.2g}"),
            peer[0],
            round(peer[1] * 1e3, 1) if peer[1] is not None else None,
        )

    def decode(self) -> Iterator[Figure]:
        """Latents read once are the bytes; 2 x heads x (2C + R) a token the operations."""
        sizes = [(64, 8192, heads, is_fp8) for is_fp8 in (False, True) for heads in (16, 64, 128)]
        sizes += [(1, 1024, 16, False), (1, 65536, 16, False), (256, 2048, 16, False)]
        sizes += [(256, 2048, 16, True), (64, 32768, 16, False), (64, 32768, 16, True)]
        for rows, context, num_heads, is_fp8 in sizes:
            copies = max(1, min(16, COLD_BYTES // (rows * context * 1152)))
            inputs = [
                decode_inputs([context] * rows, num_heads, LATENT, ROPE, 64, BFLOAT16, "cuda", num_layers=1)
                for _ in range(copies)
            ]
            if is_fp8:
                inputs = [(q, pack_latents(cache, LATENT), *rest) for q, cache, *rest in inputs]
            out = mla_decode(*inputs[0], 0.1, LATENT, context)
            q, cache, tables, lens = inputs[0]
            error = relative_error(
                out[:2], mla_decode_reference(q[:2].float(), cache, tables[:2], lens[:2], 0.1, LATENT)
            )
            calls = [lambda i=i, n=context: mla_decode(*i, 0.1, LATENT, n) for i in inputs]
            ms = time_ms(calls * (3 if copies == 1 else 1))
            flops = 2 * rows * context * num_heads * (2 * LATENT + ROPE)
            num_bytes = rows * context * (656 if is_fp8 else 1152)
            name = f"decode {rows} x {context}, {num_heads} heads, {'fp8' if is_fp8 else 'bf16'}"
            peer = ("", None) if is_fp8 else _decode_peer(inputs, num_heads, context)
            yield self.figure(name, ms, num_bytes, flops, error, peer)

    def bound(self) -> Iterator[Figure]:
        """What holds decode of many heads up: the same with one context for all, which the L2 cache serves."""
        rows, context, num_heads = 64, 8192, 128
        for is_shared in (False, True):
            q, cache, tables, lens = decode_inputs(
                [context] * rows, num_heads, LATENT, ROPE, 64, BFLOAT16, "cuda", num_layers=1
            )
            if is_shared:
                tables = tables[:1].expand(rows, -1).contiguous()
            out = mla_decode(q, cache, tables, lens, 0.1, LATENT, context)
            expected = mla_decode_reference(q[:2].float(), cache, tables[:2], lens[:2], 0.1, LATENT)
            inputs = (q, cache, tables, lens)
            ms = time_ms([lambda i=inputs: mla_decode(*i, 0.1, LATENT, context)] * 3)
            flops = 2 * rows * context * num_heads * (2 * LATENT + ROPE)
            num_bytes = (1 if is_shared else rows) * context * 1152
            name = f"decode {rows} x {context}, {num_heads} heads" + ", one context" * is_shared
            error = relative_error(out[:2], expected)
            yield self.figure(name, ms, num_bytes, flops, error, _decode_peer([inputs], num_heads, context))

    def moe(self) -> Iterator[Figure]:
        """The weights of the experts touched are the bytes."""
        for tokens in (1, 8, 64, 256, 8192):
            yield self._experts(tokens, 6, 64, 1408, 2048, is_fp8=False)
        for tokens in (1, 32, 128, 4096):
            yield self._experts(tokens, 8, 256, 2048, 7168, is_fp8=True)

    def _experts(self, tokens: int, chosen: int, experts: int, width: int, model: int, is_fp8: bool) -> Figure:
        gate_up, gate_up_scale = _expert_weights(experts, 2 * width, model, is_fp8)
        down, down_scale = _expert_weights(experts, model, width, is_fp8)
        x = torch.randn(tokens, model, device="cuda", dtype=BFLOAT16)
        weights = torch.rand(tokens, chosen, device="cuda")
        choices = [
            torch.rand(tokens, experts, device="cuda").topk(chosen).indices for _ in range(8 if tokens < 64 else 2)
        ]

        def run(ids: torch.Tensor) -> torch.Tensor:
            return moe_experts(x, gate_up, down, ids, weights, gate_up_scale, down_scale)

        few = slice(0, min(tokens, 16))
        expected = moe_experts_reference(
            x[few], gate_up, down, choices[0][few], weights[few], gate_up_scale, down_scale
        )
        error = relative_error(run(choices[0])[few], expected)
        ms = time_ms([lambda ids=ids: run(ids) for ids in choices])
        touched = statistics.mean(int(ids.unique().numel()) for ids in choices)
        num_bytes = touched * 3 * width * model * gate_up.element_size()
        flops = 6 * tokens * chosen * width * model
        peer = ("", None)
        if not is_fp8 and tokens >= 64:
            peer = ("eager torch grouped_mm", time_eager_ms(lambda: _grouped_mm(x, gate_up, down, choices[0], weights)))
        name = f"experts {tokens} tokens, {chosen} of {experts}, {'fp8' if is_fp8 else 'bf16'}"
        return self.figure(name, ms, num_bytes, flops, error, peer, is_fp8)

    def linear(self) -> Iterator[Figure]:
        """FP8 linear layers of a 671B model."""
        for outputs, inputs in ((2112, 7168), (24576, 1536), (7168, 16384)):
            for tokens in (1, 64, 4096):
                copies = max(1, COLD_BYTES // (outputs * inputs)) if tokens < 4096 else 1
                layers = [fp8_weight(outputs, inputs, "cuda") for _ in range(copies)]
                x = torch.randn(tokens, inputs, device="cuda", dtype=BFLOAT16)
                error = relative_error(fp8_linear(x, *layers[0]), fp8_linear_reference(x.double(), *layers[0]))
                ms = time_ms([lambda layer=layer, x=x: fp8_linear(x, *layer) for layer in layers])
                num_bytes = outputs * inputs + 2 * tokens * (inputs + outputs)
                name = f"fp8 linear {tokens} x {inputs} -> {outputs}"
                yield self.figure(name, ms, num_bytes, 2 * tokens * inputs * outputs, error, ("", None), fp8=True)

    def prefill(self) -> Iterator[Figure]:
        """Causal: half the square of scores; with a prefix, its rectangle as well."""
        for new, prefix, num_heads in ((8192, 0, 16), (2048, 0, 16), (2048, 14336, 16), (4096, 0, 128)):
            total = new + prefix
            q = torch.randn(new, num_heads, 192, device="cuda", dtype=BFLOAT16)
            expanded = torch.randn(total, num_heads, 256, device="cuda", dtype=BFLOAT16)
            k, v = expanded[..., :128], expanded[..., 128:]
            rope = torch.randn(total, 64, device="cuda", dtype=BFLOAT16)
            arguments = (0.07, [0, new], [0, total])
            out = mla_prefill(q, k, rope, v, *arguments)
            first = (part[:, :1].float() for part in (q, k))
            expected = mla_prefill_reference(*first, rope.float(), v[:, :1].float(), *arguments)
            ms = time_ms([lambda q=q, k=k, r=rope, v=v, a=arguments: mla_prefill(q, k, r, v, *a)])
            flops = 2 * num_heads * (192 + 128) * (new * prefix + new * new / 2)
            num_bytes = 2 * num_heads * (new * 320 + total * 320)
            peer = (
                ("cuDNN SDPA", _cudnn_ms(q, torch.cat((k, rope.unsqueeze(1).expand(-1, num_heads, -1)), dim=-1), v))
                if prefix == 0
                else ("", None)
            )
            name = f"prefill {new} after {prefix}, {num_heads} heads"
            yield self.figure(name, ms, num_bytes, flops, relative_error(out[:, :1], expected), peer)


def _decode_peer(inputs: list[tuple[torch.Tensor, ...]], num_heads: int, context: int) -> tuple[str, float | None]:
    """Of FlashMLA and our own kernel the one that `mla_decode` does not take."""
    from services.engine.kernels.mla_decode_triton import mla_decode_triton

    if flash_mla() is None:
        return "", None
    repeats = 3 if len(inputs) == 1 else 1
    if num_heads > FEW_HEADS:
        return "own kernel", time_ms(
            [lambda i=i: mla_decode_triton(*i, 0.1, LATENT, context) for i in inputs] * repeats
        )
    return "FlashMLA", time_ms([lambda i=i: mla_decode_flash_mla(*i, 0.1, LATENT) for i in inputs] * repeats)


def _expert_weights(experts: int, rows: int, columns: int, is_fp8: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    if not is_fp8:
        return torch.randn(experts, rows, columns, device="cuda", dtype=BFLOAT16) / columns**0.5, None
    weight = torch.empty(experts, rows, columns, device="cuda", dtype=torch.float8_e4m3fn)
    for expert in weight:
        expert.copy_(torch.randn(rows, columns, device="cuda") * 60)
    return weight, (torch.rand(experts, -(-rows // 128), -(-columns // 128), device="cuda") + 0.5) / 60 / columns**0.5


def _grouped_mm(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """The same by PyTorch's grouped product."""
    flat = ids.flatten()
    order = flat.argsort()
    ends = torch.bincount(flat, minlength=len(gate_up)).cumsum(0).to(torch.int32)
    hidden = torch._grouped_mm(x[order // ids.shape[1]], gate_up.transpose(1, 2), offs=ends)
    gate, up = hidden.chunk(2, dim=-1)
    outputs = torch._grouped_mm(F.silu(gate) * up, down.transpose(1, 2), offs=ends)
    back = torch.empty_like(outputs).index_copy_(0, order, outputs).view(*ids.shape, -1)
    return torch.bmm(weights.unsqueeze(1), back.float()).squeeze(1).to(x.dtype)


def _cudnn_ms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> float:
    query, key, value = (part.transpose(0, 1).unsqueeze(0) for part in (q, k, v))
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return time_ms([lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=0.07)])


def main() -> None:
    """Run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = ["decode", "bound", "moe", "linear", "prefill"]
    parser.add_argument("--only", nargs="+", choices=parts, default=parts)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rates = measure_rates()
    print(f"copy {rates.copy / 1e12:.2f} TB/s; TFLOP/s: {rates.bfloat16 / 1e12:.0f} bf16, {rates.fp8 / 1e12:.0f} fp8")
    bench = Bench(rates)
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / f"kernels-{torch.cuda.get_device_name().lower().replace(' ', '-')}.json"
    results = json.loads(path.read_text())["parts"] if path.exists() else {}
    for part in arguments.only:
        figures = []
        for figure in getattr(bench, part)():
            figures.append(asdict(figure))
            peer = f"{figure.peer} {figure.peer_time_us} us" if figure.peer else ""
            print(
                f"{figure.name:44} {figure.time_us:9.1f} us  limit {figure.limit_us:8.1f}  {figure.fraction:6.1%}"
                f"  {figure.tb_per_s:5.2f} TB/s {figure.tflop_per_s:6.1f} TFLOP/s  error {figure.error:.1e}  {peer}",
                flush=True,
            )
        key = f"{part} beside FlashMLA" if part in ("decode", "bound") and flash_mla() is not None else part
        results[key] = {
            "commit": commit(),
            "torch": torch.__version__,
            "rates": asdict(rates),
            "figures": figures,
        }
    command = "python -m tests.bench.kernels"
    result = {"card": torch.cuda.get_device_name(), "command": command, "parts": results}
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
