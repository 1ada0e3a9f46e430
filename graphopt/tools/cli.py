"""The command `graphopt`: explain, compile, diff and bisect a model, run the demo and the zoo."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.console import Console
from torch import fx

from graphopt.errors import OptionError
from graphopt.options import Options
from graphopt.question import ALL
from graphopt.targets import CPU, NAMES, TARGETS, target_named
from graphopt.tools.culprits import MOST
from graphopt.tools.diff import GraphDiff, diff
from graphopt.tools.exits import or_error
from graphopt.tools.explain import explain, road, stages
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
    rule: Annotated[str, typer.Option(help="Tell of this rule: a name or a pattern with *.")] = ALL,
    module: Annotated[str, typer.Option(help="Tell of this module and what is below: *.layers.1.mlp.")] = ALL,
    node: Annotated[str, typer.Option(help="Tell of this node of the graph: mul_14.")] = ALL,
    expect: Annotated[
        list[str] | None, typer.Option(help="OPERATOR=NUMBER: fail where fewer are recognised.")
    ] = None,
    json: AsJson = False,
) -> None:
    """Say what is recognised in a model, what is not, and why; or answer one question of these."""

    def run() -> None:
        wanted = dict(number_of(text) for text in expect or ())
        Options.parse({"expect": wanted})  # before a model is built
        example = load(model, batch=batch, length=length, dtype=dtype, cache=cache)
        kwargs: dict[str, Any] = dict(example.kwargs)
        report = explain(example.model, *example.args, expect=wanted, **kwargs)
        if (rule, module, node) != (ALL, ALL, ALL):
            found = report.explain(rule, module, node)
            typer.echo(found.to_json(indent=2) if json else str(found))
        elif json:
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


@app.command("bisect")
def bisect_command_line(
    model: Annotated[
        str | None, typer.Argument(help="As for `explain`; weights are needed. Or give --command.")
    ] = None,
    command: Annotated[
        str | None, typer.Option(help="A command instead: what makes its exit status another than 0.")
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest difference that is right; without it, the accuracy rule.")
    ] = None,
    most: Annotated[int, typer.Option(min=1, help="How many runs it may take.")] = MOST,
    timeout: Annotated[float | None, typer.Option(help="Seconds for one run of the command.")] = None,
    batch: Batch = 2,
    length: Length = 7,
    dtype: Dtype = "float32",
    cache: Cache = "none",
    decode: Decode = False,
    quantize: Bits = None,
    json: AsJson = False,
) -> None:
    """Find the smallest set of rewrites that breaks a model or a command, and print each as functions.

    The exit status is 0 where nothing is broken, 1 where the culprits were found, 2 where there is no answer.
    """
    from graphopt.tools.bisect import Bisection, bisect
    from graphopt.tools.bisect_command import bisect_command

    def found() -> Bisection:
        if (model is None) == (command is None):
            raise OptionError("give a model or a --command, one of them")
        if command is not None:
            return bisect_command(shlex.split(command), most=most, timeout=timeout)
        example = load(str(model), batch=batch, length=length, dtype=dtype, cache=cache, decode=decode)
        options = {"quantize": quantize}
        return bisect(
            example.model, example.args, example.kwargs, options=options, tolerance=tolerance, most=most
        )

    def run() -> None:
        told = found()
        typer.echo(told.to_json(indent=2) if json else str(told))
        if told.culprits:
            raise typer.Exit(1)

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


def number_of(text: str) -> tuple[str, int]:
    """`attention=32` -> ("attention", 32). OptionError for anything else."""
    name, _, number = text.partition("=")
    if not number.isdecimal():
        raise OptionError(f"{text!r} is no expectation; give OPERATOR=NUMBER, as attention=32")
    return name, int(number)


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
