"""The checkpoint's chat template, and the token ids of one turn.

What the messages say is data: it never becomes a control token, and a session's history is never rendered again.
"""

from __future__ import annotations

import hashlib
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence

import jinja2
from jinja2.exceptions import SecurityError

from services.common.errors import InvalidCheckpoint, InvalidRequest, PromptTooLong, UnsupportedConfig
from services.common.messages import Message
from services.text.template_sandbox import TemplateSandbox
from services.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant", "tool")
_FILE = "chat template"


class ChatTemplate:
    """One compiled template. Safe to share between threads.

    Attributes: source, digest (SHA-256 of the source, hexadecimal).
    """

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        *,
        max_steps: int = 1_000_000,
        max_seconds: float = 5.0,
        max_chars: int = 16_000_000,
    ) -> None:
        """special_tokens: template variables such as bos_token and eos_token.

        A rendering may take `max_steps` loop rounds, calls and operations, `max_seconds`, and write or hold in one
        text `max_chars`. Raises InvalidCheckpoint if the source is not a template.
        """
        self.source = source
        self.digest = hashlib.sha256(source.encode("utf-8", errors="surrogatepass")).hexdigest()
        self._special_tokens = dict(special_tokens)
        self._max_chars = max_chars
        self._sandbox = TemplateSandbox(max_steps, max_seconds, max_chars)
        self._sandbox.start_budget()  # constants are computed while compiling
        try:
            self._template = self._sandbox.from_string(source)
        except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError) as error:
            raise InvalidCheckpoint(_FILE, f"is not a Jinja template: {error}") from error

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt's text.

        Raises InvalidRequest if the template refuses the messages or fails on them, InvalidCheckpoint if it does what
        no template may: touch unsafe attributes, or exceed its budget.
        """
        check_messages(messages)
        variables = {
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            "add_generation_prompt": add_generation_prompt,
            "tools": None,
            "documents": None,
        }
        self._sandbox.start_budget()
        try:
            return self._joined(self._template.generate({**self._special_tokens, **variables}))
        except (SecurityError, MemoryError, RecursionError, OverflowError) as error:
            raise InvalidCheckpoint(_FILE, f"does what is not allowed: {error or type(error).__name__}") from error
        except jinja2.TemplateError as error:
            raise InvalidRequest("messages", f"the chat template refuses them: {error}") from error
        except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
            raise InvalidRequest("messages", f"the chat template fails on them: {error}") from error

    def _joined(self, pieces: Iterable[str]) -> str:
        parts: list[str] = []
        num_chars = 0
        for piece in pieces:
            num_chars += len(piece)
            if num_chars > self._max_chars:
                raise SecurityError(f"more than {self._max_chars} characters written")
            parts.append(piece)
        return "".join(parts)


class ChatEncoder:
    """Token ids of a turn's new messages; the ids of earlier turns are in the session's journal and stay as they are.

    So what a template does to old answers (DeepSeek-R1's drops their thinking) does not happen in a session: the model
    sees its replies as it wrote them, and the KV cache stays valid.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self._tokenizer = tokenizer
        self._template = template

    @classmethod
    def from_tokenizer(cls, tokenizer: Tokenizer) -> ChatEncoder:
        """With the template that came beside the tokenizer. Raises InvalidCheckpoint if there is none."""
        if tokenizer.config.chat_template is None:
            raise InvalidCheckpoint(
                "tokenizer_config.json", "has no chat_template, and there is no chat_template.jinja"
            )
        return cls(tokenizer, ChatTemplate(tokenizer.config.chat_template, tokenizer.config.special_tokens))

    @property
    def template_digest(self) -> str:
        """SHA-256 of the template: a session must not be continued with another one."""
        return self._template.digest

    def encode_turn(
        self, new_messages: Sequence[Message], *, is_first_turn: bool, previous_turn_ended_with_eos: bool = True
    ) -> list[int]:
        """What to append to the journal before the reply is generated.

        First turn: the whole rendering. Later: what the template writes between the end of the last reply and the next
        one; its closing end-of-sequence token is left out if the journal has it (the reply ended by sampling one).
        Raises InvalidRequest (naming the message) for what cannot be rendered or would change the history,
        PromptTooLong, UnsupportedConfig for a template that cannot be continued turn by turn.
        """
        check_messages(new_messages)
        self._check_size(new_messages)
        if is_first_turn:
            return self._encode(new_messages, lambda messages: self._template.render(messages))
        ids = self._encode(new_messages, self._continuation)
        starts_with_eos = bool(ids) and ids[0] in self._tokenizer.eos_token_ids
        return ids[1:] if previous_turn_ended_with_eos and starts_with_eos else ids

    def _check_size(self, messages: Sequence[Message]) -> None:
        total = 0
        for i, message in enumerate(messages):
            total += len(self._tokenizer.check_text(message.content, f"messages[{i}].content"))
        if total > self._tokenizer.max_chars:
            raise PromptTooLong(
                "messages", f"at most {self._tokenizer.max_chars} characters are tokenized, got {total}"
            )

    def _continuation(self, messages: Sequence[Message]) -> str:
        """The rendering after the last placeholder reply; the same for one and for two earlier rounds, or refused."""
        name = secrets.token_hex(16)  # no message can contain it
        question, answer = f"{name}-question", f"{name}-answer"
        round_ = [Message("user", question), Message("assistant", answer)]
        head, tail = self._split(self._template.render([*round_, *messages]), answer, 1)
        _, longer_tail = self._split(self._template.render([*round_, *round_, *messages]), answer, 2)
        if tail != longer_tail:
            raise UnsupportedConfig("chat_template", "writes a turn differently depending on the turns before it")
        plain_head, _ = self._split(self._template.render(round_, add_generation_prompt=False), answer, 1)
        if head != plain_head:
            problem = "the chat template would change what came before (a system message can only begin a session)"
            raise InvalidRequest("messages", problem)
        return tail

    @staticmethod
    def _split(text: str, answer: str, num_answers: int) -> tuple[str, str]:
        pieces = text.split(answer)
        if len(pieces) != num_answers + 1:
            raise UnsupportedConfig("chat_template", "does not write every assistant message exactly once")
        return pieces[0], pieces[-1]

    def _encode(self, messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> list[int]:
        """Tokenize render(messages) with the contents as text and the template's control tokens as control tokens.

        Contents without anything that looks like a control token are the rule: the text is tokenized as it is.
        Otherwise each such place is put between two markers of its own, which are looked for in the result.
        """
        plain = render(messages)
        _require_written(messages, render)
        markers = _Markers()
        marked = self._marked(messages, markers)
        if not markers.num_pairs:
            return self._tokenizer.encode(plain, allow_control_tokens=True, field="messages")
        text, spans = markers.take_out(render(marked))
        if text != plain:
            problem = "holds the text of a control token, and the chat template changes it beyond recognition"
            raise InvalidRequest("messages", problem)
        return self._tokenizer.encode_mixed(text, spans, "messages")

    def _marked(self, messages: Sequence[Message], markers: _Markers) -> list[Message]:
        """The messages with markers around everything that looks like a control token or a part of one."""
        return [
            Message(m.role, markers.put_around(self._tokenizer.control_token_spans(m.content), m.content))
            for m in messages
        ]


class _Markers:
    """Pairs of markers around pieces of text, found again after the template has worked on it.

    They are made of private-use characters and of random digits, so that no message can contain one, and neither
    trimming nor changing case harms them.
    """

    def __init__(self) -> None:
        self._nonce = f"{secrets.randbits(128):039d}"
        self._pattern = re.compile(f"\ue000{self._nonce}([0-9]+)([\ue001\ue002])")
        self.num_pairs = 0

    def put_around(self, spans: Sequence[tuple[int, int]], text: str) -> str:
        pieces: list[str] = []
        done = 0
        for start, end in spans:
            name = f"\ue000{self._nonce}{self.num_pairs}"
            pieces += [text[done:start], name, "\ue001", text[start:end], name, "\ue002"]
            self.num_pairs += 1
            done = end
        return "".join([*pieces, text[done:]])

    def take_out(self, text: str) -> tuple[str, list[tuple[int, int]]]:
        """The text without markers, and the [start, end) between each opening marker and its own closing one.

        A marker whose partner the template has cut away marks nothing: the token it was part of is cut as well.
        """
        pieces: list[str] = []
        opened: dict[str, int] = {}
        spans: list[tuple[int, int]] = []
        done = position = 0
        for match in self._pattern.finditer(text):
            pieces.append(text[done : match.start()])
            position += match.start() - done
            done = match.end()
            name, kind = match.groups()
            if kind == "\ue001":
                opened[name] = position
            elif name in opened:
                spans.append((opened.pop(name), position))
        return "".join([*pieces, text[done:]]), spans


def check_messages(messages: Sequence[Message]) -> None:
    """Raise InvalidRequest if there are none, or one has an unknown role or content that is not text."""
    if not messages:
        raise InvalidRequest("messages", "at least one message is needed")
    for i, message in enumerate(messages):
        if message.role not in ROLES:
            raise InvalidRequest(f"messages[{i}].role", f"must be one of {', '.join(ROLES)}, got {message.role!r}")
        if not isinstance(message.content, str):
            raise InvalidRequest(f"messages[{i}].content", f"text is needed, got {type(message.content).__name__}")


def _require_written(messages: Sequence[Message], render: Callable[[Sequence[Message]], str]) -> None:
    """Raise InvalidRequest for a message that leaves no trace: templates are silent about roles they do not know."""
    names = [f"{secrets.randbits(128):039d}" for _ in messages]
    text = render([Message(message.role, name) for message, name in zip(messages, names, strict=True)])
    for i, (message, name) in enumerate(zip(messages, names, strict=True)):
        if name not in text:
            raise InvalidRequest(f"messages[{i}]", f"the chat template leaves out messages of role {message.role!r}")
