"""What the commands without a cluster do: load, converse, complete, score, plan."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from services.common.errors import InvalidRequest, InvalidSettings
from services.common.messages import Delta, Finished, Message, SamplingParams
from services.common.settings import EngineSettings, ModelSettings
from services.engine.config import ModelConfig
from services.engine.hub import resolve_model
from services.engine.loading import compute_dtype
from services.engine.plan import plan
from services.local import LocalPipeline, LocalRequest
from services.text.chat_template import ChatEncoder

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?B|B)?", re.IGNORECASE)
_UNITS = {"B": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
_ROLES = ("system", "user", "assistant", "tool")


def parse_bytes(text: str, field: str) -> int:
    """24GiB, 512 MB, 1000: in bytes. Raises InvalidRequest naming `field`."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or (size := int(float(match[1]) * _UNITS[(match[2] or "B").upper()])) < 1:
        raise InvalidRequest(field, f"{text!r} is not a size such as 24GiB or 512MB")
    return size


def load(
    model: str,
    device: str,
    dtype: str,
    cache_mode: str,
    kv_dtype: str,
    load_format: str,
    max_seq_len: int | None,
    kv_memory: str | None,
    console: Console,
) -> LocalPipeline:
    """The pipeline, with a progress bar while weights load."""
    kv_cache_bytes = None if kv_memory is None else parse_bytes(kv_memory, "--kv-memory")
    try:
        model_settings = ModelSettings.model_validate(
            {
                "path": model, "dtype": dtype, "cache_mode": cache_mode, "kv_dtype": kv_dtype,
                "load_format": load_format, "max_seq_len": max_seq_len,
            }
        )  # fmt: skip
        engine_settings = EngineSettings.model_validate({"device": device, "kv_cache_bytes": kv_cache_bytes})
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][-1] if first["loc"] else "kv_dtype").replace("_", "-")
        raise InvalidSettings(f"{option}: {first['msg']}") from None
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task("loading weights", total=None)
        return LocalPipeline.load(
            model_settings,
            engine_settings,
            lambda done, total: bar.update(task, completed=done, total=total),
        )


def sampling(
    pipeline: LocalPipeline, temperature: float | None, top_p: float | None, max_tokens: int | None, seed: int | None
) -> SamplingParams:
    """The checkpoint's defaults, overridden by what was given."""
    values: dict[str, Any] = {}
    if pipeline.tokenizer is not None:
        values |= pipeline.tokenizer.config.sampling_defaults
    given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    return SamplingParams(**(values | {name: value for name, value in given.items() if value is not None}))


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
                    console.print(event.text, end="", markup=False, highlight=False, soft_wrap=True)
                else:
                    console.print(f"\n[dim]{figures(event)}[/]", highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            turn.close()
            console.print("\n[dim]interrupted; what was said so far is remembered[/]")
        except InvalidRequest as error:
            console.print(f"[bold red]error:[/] {error}", highlight=False)


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
            sys.stdout.write(event.text)
            sys.stdout.flush()
    sys.stdout.write("\n")


def complete_lines(pipeline: LocalPipeline, source: Path, target: Path | None, params: SamplingParams) -> None:
    """JSONL in, JSONL out: one reply a line, in the order of the input."""
    requests = [_request(pipeline, number, line, params) for number, line in _lines(source)]
    replies = [_empty_reply() for _ in requests]
    for index, event in pipeline.run(requests):
        reply = replies[index]
        if isinstance(event, Delta):
            reply["text"] += event.text
            reply["token_ids"] += event.token_ids
            reply["logprobs"] += [asdict(each) for each in event.logprobs]
            reply["prompt_logprobs"] += [asdict(each) for each in event.prompt_logprobs]
        else:
            reply["finish_reason"] = event.reason.value
            reply["usage"] = asdict(event.usage)
    with _writer(target) as out:
        for reply in replies:
            out.write(json.dumps({name: value for name, value in reply.items() if value or name == "text"}) + "\n")


def score_lines(pipeline: LocalPipeline, source: Path, target: Path | None, logits_file: Path | None) -> None:
    """JSONL in, JSONL out: logprobs and perplexity; with logits_file all logits as well."""
    tensors: dict[str, Tensor] = {}
    with _writer(target) as out:
        for index, (number, line) in enumerate(_lines(source)):
            if set(line) not in ({"text"}, {"token_ids"}):
                raise InvalidRequest(f"line {number}", "needs exactly one of text and token_ids, and nothing else")
            token_ids = _token_ids(number, line) if "token_ids" in line else _text_ids(pipeline, number, line["text"])
            parts: dict[int, Tensor] = {}

            def keep(first: int, rows: Tensor, parts: dict[int, Tensor] = parts) -> None:
                parts[first] = rows.float().cpu().clone()

            score = pipeline.score(token_ids, on_logits=None if logits_file is None else keep)
            if logits_file is not None:
                tensors[f"logits.{index}"] = torch.cat([parts[first] for first in sorted(parts)])
            record = {
                "token_ids": list(score.token_ids),
                "logprobs": [None, *(each.logprob for each in score.logprobs)],
                "perplexity": score.perplexity if score.logprobs else None,
            }
            out.write(json.dumps(record) + "\n")
    if logits_file is not None:
        save_file(tensors, logits_file)


def show_plan(model: str, memory: str, max_seq_len: int | None, dtype: str, block_size: int, console: Console) -> None:
    """The table of what fits."""
    config = ModelConfig.from_folder(resolve_model(model))
    number_format = compute_dtype(dtype, config, torch.device("cuda"))
    result = plan(
        config, parse_bytes(memory, "--gpu-memory"), number_format, block_size=block_size, max_seq_len=max_seq_len
    )
    console.print(
        f"{result.num_parameters / 1e9:,.2f} B parameters, {_gib(result.weight_bytes)} of weights as"
        f" {str(number_format).removeprefix('torch.')}; {_gib(max(0, result.left_bytes))} left for the KV cache"
        f" of {memory}, 2 GiB kept free",
        highlight=False,
    )
    if result.left_bytes <= 0:
        console.print(f"does not fit: {_gib(-result.left_bytes)} more are needed before the first block")
    lengths = [length for length, _ in result.caches[0].sequences]
    table = Table("cache", "bytes a token", f"blocks of {block_size}", *(f"{length:,}" for length in lengths))
    for cache in result.caches:
        table.add_row(
            f"{cache.cache_mode} {cache.kv_dtype}",
            f"{cache.bytes_per_token:,}",
            f"{cache.num_blocks:,}",
            *(f"{count:,}" for _, count in cache.sequences),
        )
    table.caption = "sequences of each length that fit at once"
    console.print(table)


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
        line = raw.decode("utf-8").rstrip("\n")
    except UnicodeDecodeError as error:
        raise InvalidRequest("input", "not valid UTF-8") from error
    console.print(f"[bold]> [/]{line}", highlight=False)
    return line


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file; empty lines are passed over."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidRequest("--input", f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("--input", "not valid UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                value = json.loads(line)
            except ValueError as error:
                raise InvalidRequest(f"line {number}", f"not JSON: {error}") from error
            if not isinstance(value, dict):
                raise InvalidRequest(f"line {number}", "not a JSON object")
            yield number, value


def _request(pipeline: LocalPipeline, number: int, line: Mapping[str, Any], params: SamplingParams) -> LocalRequest:
    unknown = set(line) - {"prompt", "token_ids", "messages", "sampling"}
    inputs = [name for name in ("prompt", "token_ids", "messages") if name in line]
    if unknown or len(inputs) != 1:
        problem = f"unknown field {min(unknown)!r}" if unknown else "needs one of prompt, token_ids and messages"
        raise InvalidRequest(f"line {number}", problem)
    overrides = line.get("sampling", {})
    if not isinstance(overrides, dict):
        raise InvalidRequest(f"line {number}", "sampling is an object")
    names = set(SamplingParams.__dataclass_fields__)
    if extra := set(overrides) - names:
        raise InvalidRequest(f"line {number}", f"sampling has no field {min(extra)!r}")
    values = dict(overrides)
    for name in ("stop", "stop_token_ids"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    if isinstance(values.get("logit_bias"), dict):
        values["logit_bias"] = {int(token): bias for token, bias in values["logit_bias"].items()}
    return LocalRequest(_prompt_ids(pipeline, number, line), replace(params, **values))


def _prompt_ids(pipeline: LocalPipeline, number: int, line: Mapping[str, Any]) -> list[int]:
    if "token_ids" in line:
        return _token_ids(number, line)
    if "prompt" in line:
        return _text_ids(pipeline, number, line["prompt"])
    messages = line["messages"]
    if not isinstance(messages, list) or not all(_is_message(each) for each in messages):
        raise InvalidRequest(f"line {number}", 'messages is a list of {"role": …, "content": …}')
    encoder = ChatEncoder.from_tokenizer(pipeline.text)
    return encoder.encode_turn([Message(each["role"], each["content"]) for each in messages], is_first_turn=True)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"role", "content"}
        and value["role"] in _ROLES
        and isinstance(value["content"], str)
    )


def _token_ids(number: int, line: Mapping[str, Any]) -> list[int]:
    ids = line["token_ids"]
    if not isinstance(ids, list) or not all(isinstance(each, int) and not isinstance(each, bool) for each in ids):
        raise InvalidRequest(f"line {number}", "token_ids is a list of whole numbers")
    return ids


def _text_ids(pipeline: LocalPipeline, number: int, text: Any) -> list[int]:
    if not isinstance(text, str):
        raise InvalidRequest(f"line {number}", "text is a string")
    return pipeline.text.encode(text, add_bos=True, allow_control_tokens=True)


def _empty_reply() -> dict[str, Any]:
    return {"text": "", "token_ids": [], "logprobs": [], "prompt_logprobs": [], "finish_reason": None, "usage": None}


@contextmanager
def _writer(path: Path | None) -> Iterator[IO[str]]:
    if path is None:
        yield sys.stdout
    else:
        with path.open("w", encoding="utf-8") as file:
            yield file
