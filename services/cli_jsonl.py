"""The commands that read and write JSONL: many prompts at once, and scores."""

from __future__ import annotations

import json
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import IO, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from services.common.errors import AntiphonError, InvalidRequest
from services.common.messages import Delta, Finished, Message
from services.common.sampling import SamplingParams
from services.local import LocalPipeline, LocalRequest
from services.text.chat_template import ROLES, ChatEncoder


def complete_lines(pipeline: LocalPipeline, source: Path, target: Path | None, params: SamplingParams) -> list[str]:
    """JSONL in, JSONL out: one record a line, in the order of the input. Returns what was wrong with which lines.

    A line that cannot be served has `error` in its record, with the line's number; the other lines are served.
    """
    records: list[_Record] = []
    requests: list[LocalRequest] = []
    asked: list[_Record] = []  # one a request
    for number, text in _texts(source):
        records.append(record := _Record(number))
        try:
            requests.append(_request(pipeline, number, _object(number, text), params))
            asked.append(record)
        except InvalidRequest as error:
            record.failed(error)
    waiting = deque(records)
    with _writer(target) as out:
        for index, event in pipeline.run(requests, lambda index, error: asked[index].failed(error)):
            asked[index].add(event)
            _write_those_that_are_done(out, waiting)
        _write_those_that_are_done(out, waiting)
    return [record.problem for record in records if record.error is not None]


class _Record:
    """What becomes of one line of the input."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._reply: dict[str, Any] = {"text": "", "token_ids": [], "logprobs": [], "prompt_logprobs": []}
        self._is_finished = False
        self.error: AntiphonError | None = None

    @property
    def is_done(self) -> bool:
        return self._is_finished or self.error is not None

    def add(self, event: Delta | Finished) -> None:
        reply = self._reply
        if isinstance(event, Delta):
            reply["text"] += event.text
            reply["token_ids"] += event.token_ids
            reply["logprobs"] += [asdict(each) for each in event.logprobs]
            reply["prompt_logprobs"] += [asdict(each) for each in event.prompt_logprobs]
        else:
            reply |= {"finish_reason": event.reason.value, "usage": asdict(event.usage)}
            self._is_finished = True

    def failed(self, error: AntiphonError) -> None:
        self.error = error

    @property
    def problem(self) -> str:
        message = str(self.error)
        return message if message.startswith("line ") else f"line {self._number}: {message}"

    def as_json(self) -> str:
        if self.error is not None:
            return json.dumps({"error": {"line": self._number, "reason": self.error.reason, "message": self.problem}})
        return json.dumps({name: value for name, value in self._reply.items() if value or name == "text"})


def _write_those_that_are_done(out: IO[str], waiting: deque[_Record]) -> None:
    while waiting and waiting[0].is_done:
        out.write(waiting.popleft().as_json() + "\n")


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
    for number, text in _texts(path):
        yield number, _object(number, text)


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    """(line number, text) of the lines that are not empty. Raises InvalidRequest if the file cannot be read as text."""
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise InvalidRequest("--input", f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InvalidRequest("--input", "not valid UTF-8") from error
    for number, line in enumerate(text.split("\n"), start=1):  # splitlines would also cut at U+2028 inside a string
        if line.strip():
            yield number, line


def _object(number: int, line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"line {number}", f"not JSON: {error}") from error
    if not isinstance(value, dict):
        raise InvalidRequest(f"line {number}", "not a JSON object")
    return value


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
