"""What the README says to type works: cheap commands run for real, the others name what exists."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from services.cli import app
from services.common.settings import Settings, markdown

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
COMMAND = typer.main.get_command(app)


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[str]:
    lines = (line.split("  #")[0].strip() for block in blocks("sh") for line in block.splitlines())
    return [line for line in lines if line and not line.startswith("#")]


def inline() -> list[str]:
    """Texts in backticks, outside of code blocks."""
    prose = re.sub(r"^```.*?^```", "", README, flags=re.MULTILINE | re.DOTALL)
    return re.findall(r"`([^`\n]+)`", prose)


def antiphon_commands() -> list[str]:
    lines = [line.removeprefix(".venv/bin/") for line in (*shell_lines(), *inline())]
    return sorted({line for line in lines if line.startswith("antiphon ")})


def make_targets() -> list[str]:
    texts = (*shell_lines(), *inline())
    return sorted({line.split()[1] for line in texts if re.fullmatch(r"make [a-z-]+.*", line)})


def mentioned_paths() -> list[str]:
    roots = "|".join(("services", "tests", "deploy", "scripts", "k8s", "protos", r"\.ci"))
    return sorted({text for text in inline() if re.fullmatch(rf"({roots})/[\w./-]+", text)})


def modules() -> list[str]:
    return sorted({match for text in inline() for match in re.findall(r"python -m ([\w.]+)", text)})


def test_the_first_commands_are_there() -> None:
    assert make_targets()[:1]
    assert {"demo", "test"} <= set(make_targets())
    assert any(line.startswith("antiphon chat") for line in antiphon_commands())
    assert blocks("python")


@pytest.mark.parametrize("target", make_targets())
def test_make_knows_the_target(target: str) -> None:
    assert re.search(rf"^{re.escape(target)}:", MAKEFILE, re.MULTILINE)


@pytest.mark.parametrize("line", antiphon_commands())
def test_the_command_line_has_the_command_and_its_options(line: str) -> None:
    words = [word for word in re.split(r"[\s\[\]]+", line) if word][1:]
    command: Any = COMMAND
    while words and hasattr(command, "commands"):
        name = words.pop(0)
        assert name in command.commands, line
        command = command.commands[name]
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("--")} <= known


def run(line: str, stdin: str = "") -> str:
    arguments = shlex.split(line)[1:]
    result = CliRunner().invoke(app, arguments, input=stdin)
    assert result.exit_code == 0, (line, result.output, result.exception)
    return result.output


def cheap_commands() -> Iterator[str]:
    for line in shell_lines():
        if line.startswith(".venv/bin/antiphon") and "--target" not in line and " serve" not in line:
            yield line.removeprefix(".venv/bin/")


@pytest.mark.parametrize("line", sorted(set(cheap_commands())))
def test_a_command_of_one_process_runs_as_it_is_written(line: str) -> None:
    assert run(line, stdin="Who are you?\n/exit\n").strip()


@pytest.mark.parametrize("code", blocks("python"))
def test_the_python_of_the_readme_runs(code: str) -> None:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(code, "README.md", "exec"), {})  # noqa: S102  (our own README)
    assert "Finished(" in out.getvalue()


def test_the_table_of_knobs_is_printed_by_the_command_that_is_said() -> None:
    (line,) = [text for text in inline() if text.startswith('.venv/bin/python -c "')]
    code = shlex.split(line)[2]
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert printed.strip() == markdown().strip()


@pytest.mark.parametrize("path", mentioned_paths())
def test_a_path_that_is_named_exists(path: str) -> None:
    assert (ROOT / path).exists()


@pytest.mark.parametrize("module", modules())
def test_a_module_that_is_to_be_run_exists(module: str) -> None:
    path = ROOT / module.replace(".", "/")
    assert path.with_suffix(".py").exists() or (path / "__main__.py").exists()


def test_an_override_that_is_shown_is_one() -> None:
    shown = [text for text in inline() if text.startswith("ANTIPHON__")]
    assert shown
    Settings.from_mapping({}, dict(text.split("=", 1) for text in shown))


def test_the_configurations_that_are_named_exist_and_are_valid() -> None:
    named = {text for text in inline() if re.fullmatch(r"[a-z-]+\.yaml", text)}
    assert {"one-gpu.yaml", "one-node.yaml"} <= named
    for name in named:
        Settings.from_yaml(ROOT / "deploy" / "serve" / name, {})
