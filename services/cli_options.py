"""Options that several commands share, each group as one dataclass: a command that takes one takes all its options."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any

import typer

from services.common.errors import InvalidRequest
from services.common.sampling import SamplingParams


@dataclass(frozen=True, slots=True)
class LoadOptions:
    """The model that this process loads, and its cache."""

    model: Annotated[str, typer.Option(help="Folder of a checkpoint, id of a hub model, or `demo`.")] = "demo"
    device: Annotated[str, typer.Option(help="cpu, cuda or auto.")] = "auto"
    dtype: Annotated[str, typer.Option(help="float32, bfloat16, float16 or auto (float32 on a CPU).")] = "auto"
    cache_mode: Annotated[str, typer.Option(help="absorb (latents) or naive (keys and values of each head).")] = (
        "absorb"
    )
    kv_dtype: Annotated[str, typer.Option(help="Format of the cache: auto, float32, bfloat16, float16 or fp8.")] = (
        "auto"
    )
    load_format: Annotated[str, typer.Option(help="safetensors, or dummy for seeded random weights.")] = "safetensors"
    max_seq_len: Annotated[int | None, typer.Option(help="Most tokens of prompt and reply together.")] = None
    kv_memory: Annotated[str | None, typer.Option(help="Memory of the KV cache, such as 512MiB.")] = None


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How tokens are chosen; what is not given is the checkpoint's default."""

    temperature: Annotated[float | None, typer.Option(help="0 is greedy. Not set: the checkpoint's default.")] = None
    top_p: Annotated[float | None, typer.Option(help="Nucleus. Not set: the checkpoint's default.")] = None
    max_tokens: Annotated[int | None, typer.Option(help="Most tokens of a reply.")] = None
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None

    def over(self, defaults: SamplingParams) -> SamplingParams:
        """The defaults, with what was given in their place. Raises InvalidRequest."""
        given = {name: value for name in self.__slots__ if (value := getattr(self, name)) is not None}
        return dataclasses.replace(defaults, **given)


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """A cluster instead of this process."""

    target: Annotated[str | None, typer.Option(help="host:port of a cluster's gateway. Not set: this process.")] = None
    session: Annotated[str | None, typer.Option(help="Name of the cluster's session to go on with.")] = None
    token: Annotated[str | None, typer.Option(help="Bearer token for --target.", envvar="ANTIPHON_TOKEN")] = None


def check_target(context: typer.Context, options: ClusterOptions, local_options: tuple[str, ...] = ()) -> None:
    """Options that would be ignored are refused: those of LoadOptions and local_options, with a target."""
    if options.target is None:
        if options.session is not None:
            raise InvalidRequest("--session", "needs --target: sessions with a name live in a cluster")
        return
    for name in (*LoadOptions.__slots__, *local_options):
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise InvalidRequest(
                f"--{name.replace('_', '-')}", "is the cluster's to decide; leave it out with --target"
            )


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """A command for typer: each parameter that is annotated with a dataclass becomes that dataclass's options."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, Any] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        if not dataclasses.is_dataclass(parameter.annotation):
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        groups[parameter.name] = parameter.annotation
        hints = typing.get_type_hints(parameter.annotation, include_extras=True)
        for field in dataclasses.fields(parameter.annotation):
            parameters.append(
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=hints[field.name]
                )
            )

    @functools.wraps(command)
    def run(**given: Any) -> None:
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in dataclasses.fields(group)})
        command(**given)

    del run.__wrapped__  # typer would look there
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run
