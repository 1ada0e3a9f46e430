"""A compilation with its graphs kept, and what to tell of it: calls of a layer, operators, a diff."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import fx

from graphopt import graph as g
from graphopt import torch_private
from graphopt.capture import from_dynamo
from graphopt.defaults import context, pipeline
from graphopt.report import Report
from graphopt.tools import demo_models as models
from graphopt.tools.diff import Hunk, diff
from graphopt.tools.snapshots import Snapshots

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import LlamaForCausalLM

# Torch-level calls that only say how to look at a tensor; slices are spelled as indexing.
VIEWS = ("reshape", "permute", "expand", "view", "transpose", "unsqueeze", "slice", "getitem", "alias")


@dataclass
class Watched:
    """A `torch.compile` backend that goes the default road and keeps what it saw.

    Attributes:
        graphs: stage -> graph, of the last compilation.
        report: of the last compilation.
        run: the last program; `arguments` are those of its last call.
    """

    graphs: dict[str, fx.GraphModule] = field(default_factory=dict)
    report: Report = field(default_factory=Report)
    run: Callable[..., object] | None = None
    arguments: tuple[object, ...] = ()

    def __call__(self, gm: fx.GraphModule, examples: Sequence[object]) -> Callable[..., object]:
        """Compile one Dynamo graph."""
        snapshots = Snapshots()
        program, self.report = pipeline().run(from_dynamo(gm, examples), context(observers=(snapshots,)))
        self.graphs = snapshots.graphs
        run = self.run = program.run or program.gm.forward

        def call(*arguments: object) -> object:
            self.arguments = arguments
            return run(*arguments)

        return call

    def again(self) -> object:
        """Call the last program on its last arguments, past Dynamo."""
        assert self.run is not None, "nothing was compiled yet"
        return self.run(*self.arguments)


def watched_step(model: LlamaForCausalLM) -> tuple[Watched, dict[str, object]]:
    """One decode step with a static cache, compiled and run, and the keyword arguments of its call."""
    prompt = models.prompts(1)[0]
    token = {
        "input_ids": prompt[:, :1],
        "attention_mask": torch.ones(1, models.PROMPT + 1, dtype=torch.long),
        "past_key_values": models.cache_after(model, prompt),
    }
    watched = Watched()
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=watched)(**token)
    return watched, token


def operators(call: Callable[[], object]) -> int:
    """How many ATen operators a call dispatches, views included; each costs about a microsecond or more."""
    with torch.no_grad():
        return len(torch_private.operators_run(call))


@dataclass(frozen=True)
class Calls:
    """Calls of one module in a graph; `views` of them move no data."""

    total: int
    views: int


def calls_in(gm: fx.GraphModule, path: str) -> Calls:
    """The calls of the module at a path and of those in it; picking one of several outputs is none."""
    inside = [
        n for n in gm.graph.nodes
        if g.is_call(n) and n.target not in g.SIZE_OPS and not _picks(n)
        and (g.module_path(n) == path or g.module_path(n).startswith(path + "."))
    ]  # fmt: skip
    return Calls(len(inside), sum(_name(n) in VIEWS for n in inside))


def _picks(node: fx.Node) -> bool:
    return _name(node) == "getitem" and isinstance(node.args[1], int)


def _name(node: fx.Node) -> str:
    return g.op_name(node).removeprefix("aten.").removeprefix("_").split(".")[0]


# ------------------------------------------------------------------------------------------- a layer's diff


def layer_diff(before: fx.GraphModule, after: fx.GraphModule, layer: str, layers: int) -> Iterator[Text]:
    """`graphopt.diff` of two graphs, of one layer only, one line for each change.

    Shown are changes of the first layer (at path `layer`) that happened alike in all `layers`, or in all but
    one (the first layer's norm has no residual in front). What went is told in numbers, what came in full.
    """
    from rich.text import Text

    for hunk in diff(before, after).hunks:
        times = len(hunk.places)
        if times < layers - 1 or not _in_layer(hunk, layer) or not (hunk.added or hunk.removed):
            continue
        yield Text(f"@@ {_place(hunk)}  x {times}  {hunk.rule}".rstrip(), style="bold cyan")
        if hunk.removed:
            yield Text(f"- {_tally(hunk.removed)}", style="red")
        yield from (Text(f"+ {_call(line)}", style="green") for line in hunk.added if "getitem(" not in line)


def _in_layer(hunk: Hunk, layer: str) -> bool:
    prefix = layer.rpartition(".")[0]
    return any(place.startswith(prefix + ".") for place in hunk.places)


def _place(hunk: Hunk) -> str:
    """The module's path inside its layer."""
    return hunk.places[0].rpartition("layers.")[2].partition(".")[2] or hunk.places[0]


def _tally(lines: Sequence[str]) -> str:
    names = Counter(re.sub(r".* = (?:aten\.)?(\w+).*", r"\1", _call(line)) for line in lines)
    return ", ".join(f"{name} x {n}" if n > 1 else name for name, n in names.items())


def _call(line: str) -> str:
    """A diff's line without its comment, and without the path in front of a weight's name."""
    code = line.split("  #", 1)[0].rstrip()
    return re.sub(r"w:[\w.]*?(\w+\.weight|\w+\.bias)", r"w:\1", code)
