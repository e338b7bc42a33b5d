"""The checkpoint's vocabulary: text to token ids, and token ids to bytes.

Control tokens (`<｜User｜>`, end of sequence, ...) are the tokenizer's added tokens, marked special or not: DeepSeek-V3
marks several of its own as not special. Text from a user is encoded by a second tokenizer that does not know them, so
that what looks like a control token stays text.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import tokenizers

from services.common.errors import InvalidCheckpoint, InvalidRequest, PromptTooLong

DEFAULT_MAX_CHARS = 2_000_000
_GENERATION_FIELDS = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_tokens",
}


@dataclass(frozen=True, slots=True)
class TokenizerConfig:
    """What the files beside tokenizer.json say.

    adds_bos: whether a bare prompt gets the begin-of-sentence token. chat_template: Jinja source, None if none is
    shipped. sampling_defaults: fields of SamplingParams by name, from generation_config.json.
    """

    bos_token: str | None = None
    eos_token: str | None = None
    adds_bos: bool | None = None
    extra_eos_token_ids: tuple[int, ...] = ()
    chat_template: str | None = None
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    sampling_defaults: Mapping[str, float | int] = field(default_factory=dict)


class Tokenizer:
    """Byte-level BPE of one checkpoint. Immutable and safe to share between threads.

    Attributes: vocab_size (added tokens included; a model may have more rows, whose ids have no text), bos_token_id,
    eos_token_ids, max_chars, config.
    """

    def __init__(self, tokenizer_json: str, config: TokenizerConfig, max_chars: int = DEFAULT_MAX_CHARS) -> None:
        """Raises InvalidCheckpoint if `tokenizer_json` is not a byte-level tokenizer, or lacks a token config names."""
        self.config = config
        self.max_chars = max_chars
        self._full = _load("tokenizer.json", tokenizer_json)
        added = self._full.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        # An added token of nothing but spaces is vocabulary, not control: text may hold it.
        control = {token.content: token_id for token_id, token in added.items() if token.content.strip()}
        self._control_ids = control
        self._control_values = frozenset(control.values())
        self._control_heads = frozenset(token[:n] for token in control for n in range(1, len(token)))
        self._control_tails = frozenset(token[n:] for token in control for n in range(1, len(token)))
        longest_first = sorted(control, key=len, reverse=True)
        self._control_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self._plain = _load("tokenizer.json", _without_added_tokens(tokenizer_json, control))
        self._bytes: dict[int, bytes] = {}
        self.vocab_size = self._full.get_vocab_size(with_added_tokens=True)
        self.bos_token_id = self._required_id(config.bos_token)
        eos_token_id = self._required_id(config.eos_token)
        own_eos = () if eos_token_id is None else (eos_token_id,)
        self.eos_token_ids = tuple(dict.fromkeys((*own_eos, *config.extra_eos_token_ids)))
        processed = self._full.encode("", add_special_tokens=True).ids
        adds_bos = processed[:1] == [self.bos_token_id] if config.adds_bos is None else config.adds_bos
        self._prefix = [self.bos_token_id] if adds_bos and self.bos_token_id is not None else []

    @classmethod
    def from_folder(cls, folder: str | Path, max_chars: int = DEFAULT_MAX_CHARS) -> Tokenizer:
        """Load tokenizer.json and tokenizer_config.json (required), generation_config.json and chat_template.jinja.

        Raises InvalidCheckpoint naming the file that is missing or cannot be read.
        """
        folder = Path(folder)
        text = _read(folder / "tokenizer.json")
        return cls(text, _read_config(folder), max_chars)

    def encode(
        self, text: str | bytes, *, allow_control_tokens: bool = False, add_bos: bool = False, field: str = "prompt"
    ) -> list[int]:
        """Token ids of `text`; bytes must be UTF-8.

        allow_control_tokens: `<｜User｜>` in the text becomes the control token instead of plain text. add_bos: begin
        with the begin-of-sentence token where the checkpoint wants one and the text does not have it.
        Raises InvalidRequest on text that is not Unicode, PromptTooLong above `max_chars`; `field` is named in both.
        """
        text = self.check_text(text, field)
        if allow_control_tokens:
            ids = list(self._full.encode(text, add_special_tokens=False).ids)
        else:
            ids = self._encode_plain(text, field)
        if add_bos and ids[:1] != self._prefix:
            return self._prefix + ids
        return ids

    def encode_mixed(self, text: str, text_spans: Sequence[tuple[int, int]], field: str = "prompt") -> list[int]:
        """Like `encode` with control tokens, but those that touch one of the [start, end) spans are text."""
        if not text_spans:
            return self.encode(text, allow_control_tokens=True, field=field)
        text = self.check_text(text, field)
        is_text = bytearray(len(text))
        for start, end in text_spans:
            is_text[start:end] = b"\1" * (end - start)
        ids: list[int] = []
        done = position = 0
        while match := self._control_pattern.search(text, position):
            start, end = match.span()
            if any(is_text[start:end]):
                position = start + 1
                continue
            ids += self._encode_plain(text[done:start], field)
            ids.append(self._control_ids[match.group()])
            done = position = end
        return ids + self._encode_plain(text[done:], field)

    def control_token_spans(self, text: str) -> list[tuple[int, int]]:
        """Where `text` holds a control token, or begins or ends with a part of one; sorted, disjoint [start, end).

        A part matters because the text that comes before or after may hold the rest.
        """
        spans = [match.span() for match in self._control_pattern.finditer(text)]
        longest = min(len(text), max(map(len, self._control_ids), default=0))
        head = next((n for n in range(longest, 0, -1) if text[:n] in self._control_tails), 0)
        tail = next((n for n in range(longest, 0, -1) if text[-n:] in self._control_heads), 0)
        spans += [(0, head)] if head else []
        spans += [(len(text) - tail, len(text))] if tail else []
        return _merged(spans)

    def decode(self, token_ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """Text of the ids; bytes that are not UTF-8 become U+FFFD. Ids that the tokenizer lacks have no text."""
        is_skipped = self._special_ids if skip_special_tokens else frozenset[int]()
        joined = b"".join(self.token_bytes(token_id) for token_id in token_ids if token_id not in is_skipped)
        return joined.decode("utf-8", errors="replace")

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes a token stands for, perhaps a part of a character; empty for an id that the tokenizer lacks."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._full.id_to_token(token_id) if token_id >= 0 else None
            known = self._bytes[token_id] = _to_bytes(token or "")
        return known

    def is_special(self, token_id: int) -> bool:
        """True for tokens that `skip_special_tokens` leaves out of the text."""
        return token_id in self._special_ids

    def check_text(self, text: str | bytes, field: str = "prompt") -> str:
        """The text as str, or InvalidRequest (not Unicode) or PromptTooLong (more than `max_chars`)."""
        if len(text) > self.max_chars * (4 if isinstance(text, bytes) else 1):
            raise PromptTooLong(field, f"at most {self.max_chars} characters are tokenized")
        try:
            if isinstance(text, bytes):
                text = text.decode("utf-8")
            else:
                text.encode("utf-8")
        except UnicodeError as error:
            raise InvalidRequest(field, f"not valid Unicode text at offset {_offset(error)}") from None
        if len(text) > self.max_chars:
            raise PromptTooLong(field, f"at most {self.max_chars} characters are tokenized, got {len(text)}")
        return text

    def _encode_plain(self, text: str, field: str) -> list[int]:
        ids: list[int] = self._plain.encode(text, add_special_tokens=False).ids
        if not self._control_values.isdisjoint(ids):
            raise InvalidRequest(field, "holds text that this tokenizer cannot tell from a control token")
        return ids

    def _required_id(self, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self._full.token_to_id(token)
        if token_id is None:
            raise InvalidCheckpoint("tokenizer_config.json", f"names the token {token!r}, which tokenizer.json lacks")
        return int(token_id)


def _load(file: str, tokenizer_json: str) -> tokenizers.Tokenizer:
    try:
        loaded = tokenizers.Tokenizer.from_str(tokenizer_json)
    except Exception as error:  # the library raises plain Exception
        raise InvalidCheckpoint(file, f"cannot be loaded: {error}") from error
    if not isinstance(loaded.decoder, tokenizers.decoders.ByteLevel):
        raise InvalidCheckpoint(file, "only byte-level tokenizers (decoder ByteLevel) are served")
    loaded.no_padding()
    loaded.no_truncation()
    return loaded


def _without_added_tokens(tokenizer_json: str, contents: Mapping[str, int]) -> str:
    parsed = json.loads(tokenizer_json)
    parsed["added_tokens"] = [token for token in parsed.get("added_tokens", ()) if token["content"] not in contents]
    parsed["post_processor"] = None
    return json.dumps(parsed)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidCheckpoint(path.name, f"missing in {path.parent.name!r}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidCheckpoint(path.name, f"cannot be read: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        parsed = json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise InvalidCheckpoint(path.name, f"not JSON: {error}") from error
    if not isinstance(parsed, dict):
        raise InvalidCheckpoint(path.name, "not a JSON object")
    return parsed


def _read_config(folder: Path) -> TokenizerConfig:
    config = _read_json(folder / "tokenizer_config.json")
    generation_path = folder / "generation_config.json"
    generation = _read_json(generation_path) if generation_path.exists() else {}
    template_path = folder / "chat_template.jinja"
    template = _read(template_path) if template_path.exists() else _template_of(config)
    names = ("bos_token", "eos_token", "pad_token", "unk_token")
    special = {name: content for name in names if (content := _token_content(config, name)) is not None}
    return TokenizerConfig(
        bos_token=special.get("bos_token"),
        eos_token=special.get("eos_token"),
        adds_bos=config.get("add_bos_token"),
        extra_eos_token_ids=_eos_ids(generation),
        chat_template=template,
        special_tokens=special,
        sampling_defaults=_sampling_defaults(generation),
    )


def _template_of(config: Mapping[str, Any]) -> str | None:
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = next((entry.get("template") for entry in template if entry.get("name") == "default"), None)
    if template is not None and not isinstance(template, str):
        raise InvalidCheckpoint("tokenizer_config.json", "chat_template is neither a text nor a list of named ones")
    return template


def _token_content(config: Mapping[str, Any], name: str) -> str | None:
    token = config.get(name)
    content = token.get("content") if isinstance(token, dict) else token
    if content is not None and not isinstance(content, str):
        raise InvalidCheckpoint("tokenizer_config.json", f"{name} is not a token")
    return content


def _eos_ids(generation: Mapping[str, Any]) -> tuple[int, ...]:
    value = generation.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token_id, int) and token_id >= 0 for token_id in ids):
        raise InvalidCheckpoint("generation_config.json", "eos_token_id is neither a token id nor a list of them")
    return tuple(ids)


def _sampling_defaults(generation: Mapping[str, Any]) -> dict[str, float | int]:
    defaults = {ours: generation[name] for name, ours in _GENERATION_FIELDS.items() if generation.get(name) is not None}
    if generation.get("do_sample") is False:
        defaults["temperature"] = 0.0
    return defaults


def _byte_of_char() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up, in order."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + i): byte for i, byte in enumerate(hidden)}


_BYTE_OF_CHAR = _byte_of_char()


def _to_bytes(token: str) -> bytes:
    # A token with any character outside of the alphabet is an added one: its text stands for itself.
    values = [_BYTE_OF_CHAR.get(char) for char in token]
    return token.encode("utf-8") if None in values else bytes(value for value in values if value is not None)


def _merged(spans: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    result: list[tuple[int, int]] = []
    for start, end in sorted(spans):
        if result and start < result[-1][1]:
            result[-1] = (result[-1][0], max(end, result[-1][1]))
        else:
            result.append((start, end))
    return result


def _offset(error: UnicodeError) -> int:
    return error.start if isinstance(error, UnicodeDecodeError | UnicodeEncodeError) else 0
