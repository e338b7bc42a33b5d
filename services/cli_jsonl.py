"""The commands that read and write JSONL: many prompts at once, and scores."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from services.common.errors import InvalidRequest
from services.common.messages import Delta, Finished, Message, SamplingParams
from services.local import LocalPipeline, LocalRequest
from services.text.chat_template import ROLES, ChatEncoder


def complete_lines(pipeline: LocalPipeline, source: Path, target: Path | None, params: SamplingParams) -> None:
    """JSONL in, JSONL out: one reply a line, in the order of the input."""
    requests = [_request(pipeline, number, line, params) for number, line in _lines(source)]
    replies = [_empty_reply() for _ in requests]
    num_written = 0
    with _writer(target) as out:
        for index, event in pipeline.run(requests):
            _add(replies[index], event)
            while num_written < len(replies) and replies[num_written]["usage"] is not None:
                reply = {name: value for name, value in replies[num_written].items() if value or name == "text"}
                out.write(json.dumps(reply) + "\n")
                num_written += 1


def _add(reply: dict[str, Any], event: Delta | Finished) -> None:
    if isinstance(event, Delta):
        reply["text"] += event.text
        reply["token_ids"] += event.token_ids
        reply["logprobs"] += [asdict(each) for each in event.logprobs]
        reply["prompt_logprobs"] += [asdict(each) for each in event.prompt_logprobs]
    else:
        reply["finish_reason"] = event.reason.value
        reply["usage"] = asdict(event.usage)


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

            with _naming_line(number):
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
        try:
            save_file(tensors, logits_file)
        except (OSError, SafetensorError) as error:
            raise InvalidRequest("--logits", f"cannot be written: {error}") from error


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a JSONL file; empty lines are passed over."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidRequest("--input", f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("--input", "not valid UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 inside a string
        if line.strip():
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
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
    return LocalRequest(_prompt_ids(pipeline, number, line), _sampling(number, line.get("sampling", {}), params))


def _sampling(number: int, overrides: Any, params: SamplingParams) -> SamplingParams:
    """The line's own sampling over that of the command line."""
    if not isinstance(overrides, dict):
        raise InvalidRequest(f"line {number}", "sampling is an object")
    if extra := set(overrides) - set(SamplingParams.__dataclass_fields__):
        raise InvalidRequest(f"line {number}", f"sampling has no field {min(extra)!r}")
    values = dict(overrides)
    for name, kind, what in (("stop", str, "strings"), ("stop_token_ids", int, "whole numbers")):
        if name in values:
            if not isinstance(values[name], list) or not all(isinstance(each, kind) for each in values[name]):
                raise InvalidRequest(f"line {number}", f"sampling.{name} is a list of {what}")
            values[name] = tuple(values[name])
    if not isinstance(values.get("ignore_eos", False), bool):
        raise InvalidRequest(f"line {number}", "sampling.ignore_eos is true or false")
    if "logit_bias" in values:
        bias = values["logit_bias"]
        if not isinstance(bias, dict) or not all(token.isascii() and token.isdigit() for token in bias):
            raise InvalidRequest(f"line {number}", "sampling.logit_bias is an object of token ids and numbers")
        values["logit_bias"] = {int(token): number for token, number in bias.items()}
    with _naming_line(number):
        return replace(params, **values)


@contextmanager
def _naming_line(number: int) -> Iterator[None]:
    """Complaints about what stands in a line say which line."""
    try:
        yield
    except InvalidRequest as error:
        raise InvalidRequest(f"line {number}: {error.field}", error.problem) from error


def _prompt_ids(pipeline: LocalPipeline, number: int, line: Mapping[str, Any]) -> list[int]:
    if "token_ids" in line:
        return _token_ids(number, line)
    if "prompt" in line:
        return _text_ids(pipeline, number, line["prompt"])
    messages = line["messages"]
    if not isinstance(messages, list) or not all(_is_message(each) for each in messages):
        raise InvalidRequest(f"line {number}", 'messages is a list of {"role": …, "content": …}')
    encoder = ChatEncoder.from_tokenizer(pipeline.text)
    with _naming_line(number):
        return encoder.encode_turn([Message(each["role"], each["content"]) for each in messages], is_first_turn=True)


def _is_message(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and set(value) == {"role", "content"}
        and value["role"] in ROLES
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
        try:
            file = path.open("w", encoding="utf-8")
        except OSError as error:
            raise InvalidRequest("--output", f"cannot be written: {error.strerror}") from error
        with file:
            yield file
