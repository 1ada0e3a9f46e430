"""The command `graphopt`: explain a model, compile it, show what a pass changed, run the demo and the zoo."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Annotated

import typer
from rich.console import Console
from torch import fx

from graphopt.options import Options
from graphopt.report import RECOGNISED
from graphopt.targets import CPU, NAMES, TARGETS, target_named
from graphopt.tools.diff import GraphDiff, diff
from graphopt.tools.exits import or_error
from graphopt.tools.explain import road, stages
from graphopt.tools.models import Example, choice, load
from graphopt.tools.snapshots import CAPTURED, Snapshots
from graphopt.tools.zoo.command import zoo

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__, pretty_exceptions_enable=False)

Batch = Annotated[int, typer.Option(min=1, help="Rows of the example input.")]
Length = Annotated[int, typer.Option(min=1, help="Tokens of a row.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16 or float64.")]
Cache = Annotated[str, typer.Option(help="KV cache: none, dynamic or static.")]
Decode = Annotated[bool, typer.Option("--decode", help="One token after LENGTH, on a static cache.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Shards = Annotated[int, typer.Option("--shard", min=1, help="Processes; what is shown is the first one's.")]
Bits = Annotated[str | None, typer.Option("--quantize", help="int8, or leave the weights as they are.")]
For = Annotated[str, typer.Option("--target", help=f"One of {', '.join(NAMES)}.")]
Model = Annotated[
    str,
    typer.Argument(
        help="A transformers model type (tiny and random), a directory or file with a config, or "
        "package.module:function, which returns (model, args, kwargs)."
    ),
]
Stage = Annotated[
    str, typer.Argument(help="MODEL@STAGE; STAGE is captured (if left out) or the pass after which to look.")
]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"graphopt {version('graphopt')}")
        raise typer.Exit


@app.callback()
def options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A graph-rewriting compiler for transformer inference on PyTorch."""


@app.command("explain")
def explain_command(
    model: Model,
    batch: Batch = 2,
    length: Length = 7,
    dtype: Dtype = "float32",
    cache: Cache = "none",
    json: AsJson = False,
) -> None:
    """Say what is recognised in a model, what is not, and why."""

    def run() -> None:
        example = load(model, batch=batch, length=length, dtype=dtype, cache=cache)
        report = road(example.model, example.args, example.kwargs, until=RECOGNISED)
        if json:
            typer.echo(report.to_json(indent=2))
        elif sys.stdout.isatty():
            Console().print(report)
        else:
            typer.echo(str(report))

    or_error(run)


@app.command("diff")
def diff_command(
    a: Stage,
    b: Stage,
    batch: Batch = 2,
    length: Length = 7,
    dtype: Dtype = "float32",
    cache: Cache = "none",
    shard: Shards = 1,
    quantize: Bits = None,
    target: For = CPU,
    json: AsJson = False,
) -> None:
    """Show how two graphs differ: `graphopt diff bert@recognise bert@shard --shard 2`."""

    def run() -> None:
        options = Options.parse({"shard": shard, "quantize": quantize, "target": target})
        asked = [split(spec, options) for spec in (a, b)]
        example = partial(load, batch=batch, length=length, dtype=dtype, cache=cache)
        found: GraphDiff = diff(*graphs(asked, example, options))
        if json:
            typer.echo(found.to_json(indent=2))
        elif sys.stdout.isatty():
            Console().print(found, soft_wrap=True)
        else:
            typer.echo(str(found))

    or_error(run)


@app.command("compile")
def compile_command(
    model: Model,
    target: Annotated[str, typer.Option(help=f"One of {', '.join(TARGETS)}.")],
    batch: Batch = 1,
    length: Length = 128,
    dtype: Dtype = "bfloat16",
    cache: Cache = "none",
    decode: Annotated[
        bool, typer.Option("--decode", help="One token after LENGTH, on a static cache.")
    ] = False,
    quantize: Bits = None,
    code: Annotated[bool, typer.Option(help="Print the program, one line a call.")] = True,
    json: AsJson = False,
) -> None:
    """Compile a model for a GPU that need not be there: its program, and a table of its kernels."""
    from graphopt.aot import default_cache
    from graphopt.tools.compile import compile_for

    def run() -> None:
        target_named(target)  # before a model is built
        example = load(model, batch=batch, length=length, dtype=dtype, cache=cache, decode=decode)
        options = {} if quantize is None else {"quantize": quantize}
        found = compile_for(
            example.model, example.args, example.kwargs, target=target, options=options, cache=default_cache()
        )
        if json:
            typer.echo(found.to_json(indent=2))
            return
        if code:
            typer.echo(found.code)
        if sys.stdout.isatty():
            Console().print(found)
        else:
            typer.echo(str(found))

    or_error(run)


@app.command("demo")
def demo_command() -> None:
    """Run the demonstration: a sentence encoder and a generating decoder, against the unmodified models."""
    from graphopt.tools.demo import main

    main()


app.command("zoo")(zoo)


def split(spec: str, options: Options | None = None) -> tuple[str, str]:
    """`bert@merge` -> ("bert", "merge"); no stage: the captured graph. OptionError for an unknown one."""
    name, at, stage = spec.rpartition("@")
    return (name, choice(stage, stages(options), "stage")) if at else (spec, CAPTURED)


def graphs(
    asked: list[tuple[str, str]], load: Callable[[str], Example], options: Options | None = None
) -> list[fx.GraphModule]:
    """The graphs of (model, stage) pairs; a model that is asked for twice goes down the road once."""
    order = stages(options)
    kept: dict[str, dict[str, fx.GraphModule]] = {}
    for name in dict.fromkeys(name for name, _ in asked):
        example = load(name)
        if isinstance(example.model, fx.GraphModule) and not example.args and not example.kwargs:
            kept[name] = dict.fromkeys(order, example.model)  # a graph already: shown as it is
            continue
        snapshots = Snapshots()
        last = max((stage for other, stage in asked if other == name), key=order.index)
        road(example.model, example.args, example.kwargs, until=last, observers=(snapshots,), options=options)
        kept[name] = snapshots.graphs
    return [kept[name][stage] for name, stage in asked]


if __name__ == "__main__":
    app()
