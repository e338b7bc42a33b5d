"""The command `antiphon`.

chat, generate, score and plan run the pipeline in this process; serve starts a cluster, and chat and generate with
--target, sessions and status speak to one.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from services import cli_jsonl, cli_local, cluster_cli, remote_chat
from services.cli_options import ClusterOptions, LoadOptions, SamplingOptions, check_target, grouped
from services.common.errors import AntiphonError, InvalidRequest

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DeepSeek-architecture models for multi-turn chat: a turn costs what is new in it.",
)

app.command()(cluster_cli.serve)
app.command()(cluster_cli.status)
app.add_typer(cluster_cli.sessions_app, name="sessions")


@app.command()
@grouped
def chat(
    context: typer.Context,
    cluster: ClusterOptions,
    sampling: SamplingOptions,
    load: LoadOptions,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
) -> None:
    """A conversation in the terminal. Lines from a pipe work too; /reset starts anew, /exit or Ctrl-D ends."""
    with _errors_for_people():
        check_target(context, cluster)
        if cluster.target is not None:
            remote_chat.chat_remote(cluster.target, cluster.session, sampling, cluster.token, system)
            return
        pipeline = cli_local.load(load, Console(stderr=True))
        cli_local.converse(pipeline, cli_local.sampling(pipeline, sampling), system, Console())


@app.command()
@grouped
def generate(
    context: typer.Context,
    cluster: ClusterOptions,
    sampling: SamplingOptions,
    load: LoadOptions,
    prompt: Annotated[
        str | None,
        typer.Option(help="One prompt, as plain text without a chat template; with --session a message of it."),
    ] = None,
    input: Annotated[
        Path | None,
        typer.Option(help='JSONL: {"prompt": …} or {"token_ids": […]} or {"messages": […]}, and "sampling".'),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL. Not set: standard output.")] = None,
) -> None:
    """Replies to a prompt, or to each line of a JSONL file, all of them batched together.

    A line that cannot be served gets a record with its error, the others their replies; the exit code is 1 then.
    """
    with _errors_for_people():
        if (prompt is None) == (input is None):
            raise InvalidRequest("--prompt", "give exactly one of --prompt and --input")
        check_target(context, cluster, ("input", "output"))
        if cluster.target is not None and prompt is not None:
            remote_chat.generate_remote(cluster.target, prompt, cluster.session, sampling, cluster.token)
            return
        pipeline = cli_local.load(load, Console(stderr=True))
        params = cli_local.sampling(pipeline, sampling)
        if prompt is not None:
            cli_local.complete(pipeline, prompt, params)
        elif input is not None and (problems := cli_jsonl.complete_lines(pipeline, input, output, params)):
            more = f" (and {len(problems) - 1} lines more)" if len(problems) > 1 else ""
            cli_local.print_error(Console(stderr=True), problems[0] + more)
            raise typer.Exit(1)


@app.command()
@grouped
def score(
    load: LoadOptions,
    input: Annotated[Path, typer.Option(help='JSONL: {"token_ids": […]} or {"text": …}.')],
    output: Annotated[Path | None, typer.Option(help="JSONL. Not set: standard output.")] = None,
    logits: Annotated[Path | None, typer.Option(help="safetensors: logits.0, logits.1, … [T, vocab] fp32.")] = None,
) -> None:
    """Logprob of each token and perplexity of each line; with --logits all logits."""
    with _errors_for_people():
        cli_jsonl.score_lines(cli_local.load(load, Console(stderr=True)), input, output, logits)


@app.command()
def plan(
    model: Annotated[str, typer.Option(help="Folder of a checkpoint, id of a hub model, or `demo`.")] = "demo",
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU (or all that share the model), such as 24GiB.")] = (
        "80GiB"
    ),
    max_seq_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and reply together.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto.")] = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens of a KV block.", min=1)] = 16,
) -> None:
    """What fits into a GPU, from config.json alone: weights, cache bytes a token, blocks, sequences by length."""
    with _errors_for_people():
        cli_local.show_plan(model, gpu_memory, max_seq_len, dtype, block_size, Console())


@contextmanager
def _errors_for_people() -> Iterator[None]:
    """Errors raised on purpose become one line and exit code 1; Ctrl-C ends quietly."""
    try:
        yield
    except AntiphonError as error:
        cli_local.print_error(Console(stderr=True), error)
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except BrokenPipeError:
        sys.stderr.close()
        raise typer.Exit(0) from None


def main() -> None:
    """Entry point of the command."""
    app()
