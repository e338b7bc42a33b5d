"""Jinja's immutable sandbox as chat templates expect it, with a budget of steps, seconds and sizes.

The budget is spent by every loop round, call and operator, so a template cannot run for ever or double a text until
memory is gone. It bounds mistakes and crude attacks; who does not trust a checkpoint at all must not load it.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

_MAX_INT = 2**128
_WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\*|[0-9]{5})|\{[^}]*[0-9]{5}")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """The environment of one template. `start_budget` before each rendering; budgets of threads are separate.

    Exceeding the budget raises jinja2.exceptions.SecurityError.
    """

    intercepted_binops = frozenset(["+", "-", "*", "**", "%"])

    def __init__(self, max_steps: int, max_seconds: float, max_chars: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock])
        self._max_steps, self._max_seconds, self._max_chars = max_steps, max_seconds, max_chars
        self._budget = threading.local()
        del self.globals["lipsum"]
        self.globals["range"] = self._range
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = lambda pattern: datetime.now().strftime(pattern)
        self.filters["tojson"] = _to_json
        self.filters["antiphon_rounds"] = self._rounds
        self.filters["antiphon_join"] = self._join
        for name in ("center", "indent", "format", "replace"):
            self.filters[name] = self._guarded(name, self.filters[name])

    def start_budget(self) -> None:
        """Give the calling thread a fresh budget."""
        self._budget.steps = self._max_steps
        self._budget.deadline = time.monotonic() + self._max_seconds

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """A call the template makes. (Jinja's interface.)"""
        self._spend()
        owner = getattr(obj, "__self__", None)
        if isinstance(owner, str):
            self._check_arguments(obj.__name__, (owner, *args), kwargs)
        return self._checked(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operator the template applies. (Jinja's interface.)"""
        self._spend()
        if operator == "**" and not (abs(left) <= 10**6 and abs(right) <= 20):
            raise SecurityError("too large a power")
        if operator == "%" and isinstance(left, str):
            self._check_arguments("format", (left,), {})
        if operator == "*":
            for repeated, times in ((left, right), (right, left)):
                if isinstance(repeated, str | list | tuple) and isinstance(times, int):
                    self._check_length(len(repeated) * times)
        return self._checked(super().call_binop(context, operator, left, right))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` as the template may call it. (Jinja's interface.)"""
        wrapped = super().wrap_str_format(value)
        if wrapped is None:
            return None

        def guarded(*args: Any, **kwargs: Any) -> str:
            self._check_arguments("format", (value.__self__, *args), kwargs)
            return wrapped(*args, **kwargs)

        return guarded

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        template: nodes.Template = _Metered().visit(super()._parse(source, name, filename))
        return template

    def _spend(self, num_steps: int = 1) -> None:
        self._budget.steps -= num_steps
        if self._budget.steps < 0:
            raise SecurityError(f"more than {self._max_steps} steps")
        if time.monotonic() > self._budget.deadline:
            raise SecurityError(f"more than {self._max_seconds:g} seconds")

    def _rounds(self, iterable: Iterable[Any]) -> Iterator[Any]:
        for item in iterable:
            self._spend()
            yield item

    def _join(self, values: Iterable[Any]) -> str:
        self._spend()
        joined: str = self._checked("".join(str(value) for value in values))
        return joined

    def _range(self, *args: int) -> range:
        numbers = range(*args)
        self._spend(len(numbers))
        return numbers

    def _guarded(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        takes_context = hasattr(function, "jinja_pass_arg")

        def guarded(*args: Any, **kwargs: Any) -> Any:
            self._check_arguments(name, args[1:] if takes_context else args, kwargs)
            return self._checked(function(*args, **kwargs))

        vars(guarded).update(vars(function))  # where Jinja marks what it has to pass as first argument
        return guarded

    def _check_arguments(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """args[0] is the text that the method or filter works on."""
        for value in (*args[1:], *kwargs.values()):
            if isinstance(value, int):
                self._check_length(abs(value))
        if name == "format" and _WIDE_FORMAT.search(str(args[0])):
            raise SecurityError("too wide a format")
        if name == "replace" and len(args) > 2:
            text, old, new = (str(value) for value in args[:3])
            self._check_length(len(text) + text.count(old) * len(new))

    def _checked(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            self._check_length(len(value))
        elif isinstance(value, int) and abs(value) > _MAX_INT:
            raise SecurityError("too large a number")
        return value

    def _check_length(self, length: int) -> None:
        if length > self._max_chars:
            raise SecurityError(f"a text or list longer than {self._max_chars}")


class _Metered(NodeTransformer):
    """Leads `for` and `~`, which Jinja's sandbox does not intercept, through filters of ours that spend the budget."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _filtered(node.iter, "antiphon_rounds", node)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(
            nodes.List(node.nodes, lineno=node.lineno, environment=node.environment), "antiphon_join", node
        )


def _filtered(value: nodes.Node, name: str, origin: nodes.Node) -> nodes.Filter:
    return nodes.Filter(value, name, [], [], None, None, lineno=origin.lineno, environment=origin.environment)


class _GenerationBlock(Extension):
    """`{% generation %}` marks the assistant's words for training; here it is transparent."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's interface)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own escapes HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
