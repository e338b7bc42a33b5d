"""What the commands without a cluster do: load, converse, complete, plan; cli_jsonl does files of many lines."""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from services.cli_options import LoadOptions, SamplingOptions
from services.common.errors import InvalidRequest, InvalidSettings
from services.common.messages import Delta, Finished, Message
from services.common.sampling import SamplingParams
from services.common.settings import EngineSettings, ModelSettings
from services.engine.config import ModelConfig
from services.engine.hub import resolve_model
from services.engine.loading import compute_dtype
from services.engine.plan import Plan, plan
from services.local import LocalPipeline, LocalRequest
from services.terminal_text import shown

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def parse_bytes(text: str, field: str) -> int:
    """24GiB, 512 MB, 1000: in bytes. Raises InvalidRequest naming `field`."""
    match = _SIZE.fullmatch(text.strip())
    size = 0.0 if match is None else float(match[1]) * _UNITS[(match[2] or "B").upper()]
    if not 1 <= size < 2**63:
        raise InvalidRequest(field, f"{text!r} is not a size such as 24GiB or 512MB")
    return int(size)


def load(options: LoadOptions, console: Console) -> LocalPipeline:
    """The pipeline, with a progress bar while weights load."""
    kv_memory = options.kv_memory
    kv_cache_bytes = None if kv_memory is None else parse_bytes(kv_memory, "--kv-memory")
    try:
        model_settings = ModelSettings.model_validate(
            {
                "path": options.model, "dtype": options.dtype, "cache_mode": options.cache_mode,
                "kv_dtype": options.kv_dtype, "load_format": options.load_format, "max_seq_len": options.max_seq_len,
            }
        )  # fmt: skip
        engine_settings = EngineSettings.model_validate({"device": options.device, "kv_cache_bytes": kv_cache_bytes})
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][-1] if first["loc"] else "kv_dtype").replace("_", "-")
        raise InvalidSettings(f"{option}: {first['msg']}") from None
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("loading weights", total=None)
        return LocalPipeline.load(
            model_settings,
            engine_settings,
            lambda done, total: bar.update(task, completed=done, total=total),
        )


def sampling(pipeline: LocalPipeline, options: SamplingOptions) -> SamplingParams:
    """The checkpoint's defaults, overridden by what was given."""
    defaults: dict[str, Any] = {} if pipeline.tokenizer is None else dict(pipeline.tokenizer.config.sampling_defaults)
    return options.over(SamplingParams(**defaults))


def converse(pipeline: LocalPipeline, params: SamplingParams, system: str | None, console: Console) -> None:
    """Reads messages, prints replies as they come and a line of figures after each."""
    session = pipeline.session()
    while (line := _read_line(console)) is not None:
        if line in ("/exit", "/quit"):
            return
        if line == "/reset":
            session = pipeline.session()
            continue
        if not line.strip():
            continue
        messages = [Message("user", line)]
        if system is not None and session.num_turns == 0:
            messages.insert(0, Message("system", system))
        turn = session.turn(messages, params)
        try:
            for event in turn:
                if isinstance(event, Delta):
                    console.out(shown(event.text), end="", highlight=False)
                else:
                    console.print(f"\n[dim]{figures(event)}[/]", highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            turn.close()
            console.print("\n[dim]interrupted; what was said so far is remembered[/]")
        except InvalidRequest as error:
            print_error(console, error)


def print_error(console: Console, error: Exception | str) -> None:
    """One line. The message may hold anything a user wrote: it is shown as it is, never as markup or command."""
    console.print("[bold red]error:[/] ", end="")
    console.out(shown(str(error)), highlight=False)


def figures(event: Finished) -> str:
    """One line: new and cached tokens, time to first token, speed."""
    usage, timings = event.usage, event.timings
    new = usage.num_prompt_tokens - usage.num_cached_tokens
    speed = ""
    if usage.num_generated_tokens > 1 and timings.decode_ms > 0:
        speed = f" · {(usage.num_generated_tokens - 1) * 1e3 / timings.decode_ms:.1f} tokens/s"
    return (
        f"{new} new + {usage.num_cached_tokens} cached tokens · first token {timings.first_token_ms:.0f} ms ·"
        f" {usage.num_generated_tokens} tokens{speed} · {event.reason.value}"
    )


def complete(pipeline: LocalPipeline, prompt: str, params: SamplingParams) -> None:
    """Prints the continuation of plain text."""
    token_ids = pipeline.text.encode(prompt, add_bos=True, allow_control_tokens=True)
    for _, event in pipeline.run([LocalRequest(token_ids, params)]):
        if isinstance(event, Delta):
            sys.stdout.write(shown(event.text) if sys.stdout.isatty() else event.text)
            sys.stdout.flush()
    sys.stdout.write("\n")


def show_plan(model: str, memory: str, max_seq_len: int | None, dtype: str, block_size: int, console: Console) -> None:
    """The table of what fits."""
    if max_seq_len is not None and max_seq_len < 1:
        raise InvalidRequest("--max-seq-len", f"must be at least 1, got {max_seq_len}")
    config = ModelConfig.from_folder(resolve_model(model))
    number_format = compute_dtype(dtype, config, torch.device("cuda"))
    result = plan(
        config, parse_bytes(memory, "--gpu-memory"), number_format, block_size=block_size, max_seq_len=max_seq_len
    )
    weights = ("FP8 and " if config.is_fp8 else "") + str(number_format).removeprefix("torch.")
    console.print(
        f"{result.num_parameters / 1e9:,.2f} B parameters, {_gib(result.weight_bytes)} of weights as {weights};"
        f" {_gib(max(0, result.left_bytes))} left for the KV cache of {memory}",
        highlight=False,
        soft_wrap=True,
    )
    if result.left_bytes <= 0:
        console.print(f"does not fit: {_gib(-result.left_bytes)} more are needed before the first block")
    console.print(_table(result, block_size))


def _table(result: Plan, block_size: int) -> Table:
    """One column a cache, so that it fits into 80 characters."""
    table = Table("", *(f"{cache.cache_mode} {cache.kv_dtype}" for cache in result.caches))
    table.add_row("bytes a token", *(f"{cache.bytes_per_token:,}" for cache in result.caches))
    table.add_row(f"blocks of {block_size}", *(f"{cache.num_blocks:,}" for cache in result.caches))
    for row in zip(*(cache.sequences for cache in result.caches), strict=True):
        table.add_row(f"sequences of {row[0][0]:,}", *(f"{count:,}" for _, count in row))
    return table


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:,.2f} GiB"


def _read_line(console: Console) -> str | None:
    """The next message; None at the end of input."""
    if sys.stdin.isatty():
        try:
            return console.input("[bold]> [/]")
        except (EOFError, KeyboardInterrupt):
            return None
    raw = sys.stdin.buffer.readline()
    if not raw:
        return None
    try:
        line = raw.decode("utf-8").rstrip("\r\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest("input", "not valid UTF-8") from error
    console.print("[bold]> [/]", end="")
    console.out(shown(line), highlight=False)
    return line
