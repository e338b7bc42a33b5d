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
from services.common.errors import AntiphonError, InvalidRequest
from services.common.messages import SamplingParams

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="DeepSeek-architecture models for multi-turn chat: a turn costs what is new in it.",
)

Model = Annotated[str, typer.Option(help="Folder of a checkpoint, id of a hub model, or `demo`.")]
Device = Annotated[str, typer.Option(help="cpu, cuda or auto.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (float32 on a CPU).")]
CacheMode = Annotated[str, typer.Option(help="absorb (latents) or naive (keys and values of each head).")]
KvDtype = Annotated[str, typer.Option(help="Format of the cache: auto, float32, bfloat16, float16 or fp8.")]
LoadFormat = Annotated[str, typer.Option(help="safetensors, or dummy for seeded random weights.")]
MaxSeqLen = Annotated[int | None, typer.Option(help="Most tokens of prompt and reply together.")]
Memory = Annotated[str | None, typer.Option(help="Memory of the KV cache, such as 512MiB.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy. Not set: the checkpoint's default.")]
TopP = Annotated[float | None, typer.Option(help="Nucleus. Not set: the checkpoint's default.")]
MaxTokens = Annotated[int | None, typer.Option(help="Most tokens of a reply.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling reproducible.")]
Target = Annotated[str | None, typer.Option(help="host:port of a cluster's gateway. Not set: this process.")]
Session = Annotated[str | None, typer.Option(help="Name of the cluster's session to go on with.")]
Token = Annotated[str | None, typer.Option(help="Bearer token for --target.", envvar="ANTIPHON_TOKEN")]

# What only means something in this process.
_LOCAL_OPTIONS = (
    "model", "device", "dtype", "cache_mode", "kv_dtype", "load_format", "max_seq_len", "kv_memory", "input", "output",
)  # fmt: skip

app.command()(cluster_cli.serve)
app.command()(cluster_cli.status)
app.add_typer(cluster_cli.sessions_app, name="sessions")


@app.command()
def chat(
    context: typer.Context,
    target: Target = None,
    session: Session = None,
    token: Token = None,
    model: Model = "demo",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cache_mode: CacheMode = "absorb",
    kv_dtype: KvDtype = "auto",
    load_format: LoadFormat = "safetensors",
    max_seq_len: MaxSeqLen = None,
    kv_memory: Memory = None,
) -> None:
    """A conversation in the terminal. Lines from a pipe work too; /reset starts anew, /exit or Ctrl-D ends."""
    with _errors_for_people():
        _check_target(context, target, session)
        if target is not None:
            given = _given_sampling(temperature, top_p, max_tokens, seed)
            remote_chat.chat_remote(target, session, given, token, system)
            return
        pipeline = cli_local.load(
            model, device, dtype, cache_mode, kv_dtype, load_format, max_seq_len, kv_memory, Console(stderr=True)
        )
        sampling = cli_local.sampling(pipeline, temperature, top_p, max_tokens, seed)
        cli_local.converse(pipeline, sampling, system, Console())


@app.command()
def generate(
    context: typer.Context,
    target: Target = None,
    session: Session = None,
    token: Token = None,
    model: Model = "demo",
    prompt: Annotated[str | None, typer.Option(help="One prompt, as plain text without a chat template.")] = None,
    input: Annotated[
        Path | None,
        typer.Option(help='JSONL: {"prompt": …} or {"token_ids": […]} or {"messages": […]}, and "sampling".'),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="JSONL. Not set: standard output.")] = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    max_tokens: MaxTokens = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cache_mode: CacheMode = "absorb",
    kv_dtype: KvDtype = "auto",
    load_format: LoadFormat = "safetensors",
    max_seq_len: MaxSeqLen = None,
    kv_memory: Memory = None,
) -> None:
    """Replies to a prompt, or to each line of a JSONL file, all of them batched together."""
    with _errors_for_people():
        if (prompt is None) == (input is None):
            raise InvalidRequest("--prompt", "give exactly one of --prompt and --input")
        _check_target(context, target, session)
        if target is not None and prompt is not None:
            given = _given_sampling(temperature, top_p, max_tokens, seed)
            remote_chat.generate_remote(target, prompt, session, given, token)
            return
        pipeline = cli_local.load(
            model, device, dtype, cache_mode, kv_dtype, load_format, max_seq_len, kv_memory, Console(stderr=True)
        )
        sampling = cli_local.sampling(pipeline, temperature, top_p, max_tokens, seed)
        if prompt is not None:
            cli_local.complete(pipeline, prompt, sampling)
        elif input is not None:
            cli_jsonl.complete_lines(pipeline, input, output, sampling)


@app.command()
def score(
    input: Annotated[Path, typer.Option(help='JSONL: {"token_ids": […]} or {"text": …}.')],
    model: Model = "demo",
    output: Annotated[Path | None, typer.Option(help="JSONL. Not set: standard output.")] = None,
    logits: Annotated[Path | None, typer.Option(help="safetensors: logits.0, logits.1, … [T, vocab] fp32.")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    cache_mode: CacheMode = "absorb",
    kv_dtype: KvDtype = "auto",
    load_format: LoadFormat = "safetensors",
    max_seq_len: MaxSeqLen = None,
    kv_memory: Memory = None,
) -> None:
    """Logprob of each token and perplexity of each line; with --logits all logits."""
    with _errors_for_people():
        pipeline = cli_local.load(
            model, device, dtype, cache_mode, kv_dtype, load_format, max_seq_len, kv_memory, Console(stderr=True)
        )
        cli_jsonl.score_lines(pipeline, input, output, logits)


@app.command()
def plan(
    model: Model = "demo",
    gpu_memory: Annotated[str, typer.Option(help="Memory of one GPU (or all that share the model), such as 24GiB.")] = (
        "80GiB"
    ),
    max_seq_len: MaxSeqLen = None,
    dtype: Dtype = "auto",
    block_size: Annotated[int, typer.Option(help="Tokens of a KV block.", min=1)] = 16,
) -> None:
    """What fits into a GPU, from config.json alone: weights, cache bytes a token, blocks, sequences by length."""
    with _errors_for_people():
        cli_local.show_plan(model, gpu_memory, max_seq_len, dtype, block_size, Console())


def _check_target(context: typer.Context, target: str | None, session: str | None) -> None:
    """Options that would be ignored are refused."""
    if target is None:
        if session is not None:
            raise InvalidRequest("--session", "needs --target: sessions with a name live in a cluster")
        return
    for name in _LOCAL_OPTIONS:
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidRequest(
                f"--{name.replace('_', '-')}", "is the cluster's to decide; leave it out with --target"
            )


def _given_sampling(
    temperature: float | None, top_p: float | None, max_tokens: int | None, seed: int | None
) -> SamplingParams | None:
    """What was given; None leaves all to the cluster's defaults."""
    given = {"temperature": temperature, "top_p": top_p, "max_tokens": max_tokens, "seed": seed}
    given = {name: value for name, value in given.items() if value is not None}
    return SamplingParams(**given) if given else None  # type: ignore[arg-type]


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
