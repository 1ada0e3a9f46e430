"""graphopt.bisect on tiny real models with faults put into rewrites: rule and layer are found exactly."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable, Mapping

import pytest
import torch
from click.testing import Result
from torch import Tensor, fx, nn
from typer.testing import CliRunner

import graphopt
from graphopt import defaults, ops
from graphopt import graph as g
from graphopt.errors import BisectError, OptionError
from graphopt.passes import merge
from graphopt.passes.canonicalize import Canonicalize
from graphopt.rule import Rule
from graphopt.tools import cli
from graphopt.tools.bisect import Bisection, Culprit, bisect
from graphopt.tools.models import load
from graphopt.translate import Translation
from tests.models import zoo

MOST = 40  # runs of any bisection here

Arguments = dict[str, object]


def call(name: str, padding: str = "none", cache: bool = False) -> tuple[nn.Module, dict[str, object]]:
    """A model and the keyword arguments of one call."""
    model = zoo.model(name)
    given = zoo.inputs(model, zoo.Case(padding=padding))
    return model, {**given, **({} if name == "bert" else {"use_cache": cache})}


def put(
    monkeypatch: pytest.MonkeyPatch, **faults: Callable[[Rule | Translation], Rule | Translation]
) -> None:
    """Put a fault into each rule of these names."""
    rules = tuple(faults[r.name](r) if r.name in faults else r for r in defaults.RULES)
    assert rules != defaults.RULES
    monkeypatch.setattr(defaults, "RULES", rules)


def at(path: str, change: Callable[[Arguments], Arguments]) -> Callable[[Translation], Translation]:
    """A translation that is wrong in one module."""

    def fault(translation: Translation) -> Translation:
        def arguments(node: fx.Node) -> Mapping[str, object] | str:
            right = translation.arguments(node)
            if isinstance(right, str) or path not in g.module_path(node):
                return right
            return change(dict(right))

        return dataclasses.replace(translation, arguments=arguments)

    return fault


def one(found: Bisection, rule: str, path: str) -> Culprit:
    """The one culprit, which is this rule in this module."""
    assert found.runs <= MOST
    assert [(c.rule, c.module_path) for c in found.culprits] == [(rule, path)], str(found)
    return found.culprits[0]


DTYPES = {"f32": torch.float32, "bool": torch.bool}


def run(culprit: Culprit) -> tuple[Tensor, Tensor]:
    """Both functions of a culprit, on random values of the shapes that their comments say."""
    described = re.findall(r"^    # \w+: \[([\d,]*)\] (\w+)$", culprit.before, re.MULTILINE)
    shapes = [([int(n) for n in sizes.split(",") if n], DTYPES[dtype]) for sizes, dtype in described]
    inputs = [torch.randn(shape) > -1 if d == torch.bool else torch.randn(shape) for shape, d in shapes]
    names: dict[str, Callable[..., Tensor]] = {}
    exec(compile(culprit.code, "culprit", "exec"), names)
    return names["before"](*inputs), names["after"](*inputs)


# ------------------------------------------------------------------------------------------------ rewrites


def test_nothing_is_broken() -> None:
    model, kwargs = call("bert")
    found = bisect(model, kwargs=kwargs)
    assert found == Bisection() and str(found) == "nothing is broken"


def test_a_wrong_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = at("layer.1.", lambda a: {**a, "scale": 1.25 * float(a["scale"])})  # type: ignore[arg-type]  # a number
    put(monkeypatch, torch_sdpa=wrong)
    model, kwargs = call("bert")
    culprit = one(
        bisect(model, kwargs=kwargs, most=MOST), "torch_sdpa", "bert.encoder.layer.1.attention.self"
    )
    assert culprit.source.startswith("modeling_bert.py:") and culprit.pass_name == "recognise"
    before, after = run(culprit)
    assert before.shape == after.shape and not torch.allclose(before, after)


def test_keys_and_values_swapped(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, torch_sdpa=at("h.0.", lambda a: {**a, "k": a["v"], "v": a["k"]}))
    model, kwargs = call("gpt2", padding="left")
    one(bisect(model, kwargs=kwargs, most=MOST), "torch_sdpa", "transformer.h.0.attn")


def test_a_dropped_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, torch_sdpa=at("layers.1.", lambda a: {**a, "bias": None}))
    model, kwargs = call("llama", padding="left")
    one(bisect(model, kwargs=kwargs, most=MOST), "torch_sdpa", "model.layers.1.self_attn")


def own_eps(path: str) -> tuple[nn.Module, dict[str, object]]:
    """A Llama with one norm that has another eps than the others, whose eps is 0.01."""
    model, kwargs = call("llama")
    model = copy.deepcopy(model)
    model.get_submodule(path).variance_epsilon = 0.5
    return model, kwargs


def takes_no_eps(rule: Rule) -> Rule:
    return dataclasses.replace(rule, replacement=lambda x, weight, eps: ops.rms_norm(x, weight, 0.01))


def test_a_wrong_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, llama_rms_norm=takes_no_eps)
    path = "model.layers.1.post_attention_layernorm"
    model, kwargs = own_eps(path)
    found = bisect(model, kwargs=kwargs, most=MOST)
    culprit = one(found, "llama_rms_norm", path)
    assert "0.5" in culprit.before and "ops.rms_norm(" in culprit.after
    assert "rmse" in found.broken and found.candidates > 20
    before, after = run(culprit)
    assert before.shape == (3, 7, 48) and 0.01 < float((before - after).abs().max()) < 2
    again = json.loads(found.to_json())
    assert again["culprits"][0]["rule"] == "llama_rms_norm" and again["runs"] == found.runs


def test_two_rules_that_are_wrong_only_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each moves the logits by less than the tolerance, both by more."""
    path = "model.norm"
    put(
        monkeypatch,
        llama_rms_norm=takes_no_eps,
        torch_sdpa=at("layers.0.", lambda a: {**a, "scale": 1.1 * float(a["scale"])}),  # type: ignore[arg-type]  # a number
    )
    model, kwargs = own_eps(path)
    alone, both = apart(model, kwargs, ("llama_rms_norm", "torch_sdpa"))
    assert max(alone) < both
    found = bisect(model, kwargs=kwargs, tolerance=(max(alone) + both) / 2, most=2 * MOST)
    rules = {(c.rule, c.module_path) for c in found.culprits}
    assert rules == {("llama_rms_norm", path), ("torch_sdpa", "model.layers.0.self_attn")}, str(found)
    assert not found.needs and "2 rewrites together" in str(found) and "differs by" in found.broken


def apart(model: nn.Module, kwargs: dict[str, object], rules: tuple[str, ...]) -> tuple[list[float], float]:
    """How far each rule alone moves the logits, and all of them together."""
    program = graphopt.capture(model, **kwargs)
    with torch.no_grad():
        want = model(**kwargs).logits

    def moved(names: tuple[str, ...]) -> float:
        context = defaults.context()
        context.rules = tuple(r for r in context.rules if r.name in names)
        done, _ = defaults.pipeline(until="recognise").run(program, context)
        with torch.no_grad():
            return float((done(**kwargs).logits - want).abs().max())  # type: ignore[attr-defined]  # an output

    return [moved((name,)) for name in rules], moved(rules)


# ------------------------------------------------------------------------------------- merge, passes, kernels


def test_a_wrong_merge_is_found_in_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pieces for k and v of one layer are exchanged; what it merges has to be recognised first."""
    right = merge._Merger.apply

    def wrong(self: merge._Merger, group: list[fx.Node]) -> None:
        right(self, group)
        pieces = [n for n in self.graph.nodes if g.is_call(n, torch.ops.aten.slice.Tensor)]
        pieces = [n for n in pieces if (o := g.origin(n)) and o.rule == merge.RULE and "layers.1" in o.match]
        ranges = [n.args[2:4] for n in pieces]
        if len(pieces) == 3 and not self.graph.owning_module.meta.get("exchanged"):
            self.graph.owning_module.meta["exchanged"] = True
            for node, (start, end) in zip(pieces[1:], reversed(ranges[1:]), strict=True):
                node.args = (*node.args[:2], start, end, *node.args[4:])

    monkeypatch.setattr(merge._Merger, "apply", wrong)
    model, kwargs = call("llama")
    found = bisect(model, kwargs=kwargs, most=2 * MOST)
    assert [(c.rule, c.module_path) for c in found.culprits] == [
        ("merge_siblings", "model.layers.1.self_attn")
    ]
    assert {name.split("@")[0] for name in found.needs} == {"torch_linear"}
    assert "aten.cat.default([" in found.culprits[0].after


def test_a_pass_without_matches_is_found_as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    right = Canonicalize.run

    def wrong(self: Canonicalize, gm: fx.GraphModule, ctx: object) -> None:
        right(self, gm, ctx)  # type: ignore[arg-type]  # a context
        node = next(n for n in gm.graph.nodes if g.is_call(n, torch.ops.aten.tanh.default))
        node.target = torch.ops.aten.sigmoid.default
        gm.recompile()

    monkeypatch.setattr(Canonicalize, "run", wrong)
    found = bisect(lambda x: torch.tanh(x) * x, (torch.randn(3, 5),), most=MOST)
    (culprit,) = found.culprits
    assert (culprit.pass_name, culprit.rule, culprit.match) == ("canonicalize", "", "")
    before, after = run(culprit)
    assert not torch.allclose(before, after)
    assert "aten.tanh.default(" in culprit.before and "aten.sigmoid.default(" in culprit.after


def half(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A kernel that is wrong."""
    return 0.5 * nn.functional.linear(x, weight, bias)


def test_a_wrong_kernel_is_found_with_the_match_that_it_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    (kernel,) = [k for k in defaults.KERNELS if k.op == "linear" and k.target == "cpu"]
    kernels = tuple(dataclasses.replace(k, launch=half) if k is kernel else k for k in defaults.KERNELS)
    monkeypatch.setattr(defaults, "KERNELS", kernels)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 4)).eval()
    found = bisect(model, (torch.randn(3, 4),), most=MOST)
    (culprit,) = found.culprits
    assert culprit.rule == f"linear/{kernel.name}" and culprit.pass_name == "lower"
    assert [name.split("@")[0] for name in found.needs] == ["torch_linear"]
    assert "ops.linear(" in culprit.before and "half(" in culprit.after


def test_a_rule_that_raises_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(arguments: Arguments) -> Arguments:
        raise RuntimeError("by purpose")

    put(monkeypatch, torch_linear=at("1", fails))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).eval()
    found = bisect(model, (torch.randn(3, 4),), most=MOST)
    assert [c.pass_name for c in found.culprits] == ["recognise"] and "by purpose" in found.broken


# -------------------------------------------------------------------------------------------- inputs, errors


def test_a_cache_that_a_step_writes_is_judged_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A decode step on a static cache, which torch.export refuses: a written value is twice what it was."""

    def doubled(rule: Rule) -> Rule:
        def replacement(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
            return ops.cache_update(cache, new + new, position)

        return dataclasses.replace(rule, replacement=replacement)

    example = load("llama", batch=1, length=5, decode=True)
    assert bisect(example.model, example.args, example.kwargs) == Bisection()
    put(monkeypatch, static_cache=doubled)
    found = bisect(example.model, example.args, example.kwargs, most=MOST)
    assert [c.rule for c in found.culprits] == ["static_cache"]


def test_inputs_stay_as_they_are_and_shards_are_refused() -> None:
    x = torch.zeros(3)
    bisect(lambda x: x.add_(1), (x,))
    assert torch.equal(x, torch.zeros(3))
    with pytest.raises(BisectError, match="option shard is 2; bisect one process"):
        bisect(lambda x: x + 1, (x,), options={"shard": 2})
    with pytest.raises(OptionError, match="did you mean 'quantize'"):
        bisect(lambda x: x + 1, (x,), options={"quantise": "int8"})


def test_int8_weights_break_the_accuracy_rule_and_each_is_found() -> None:
    """What is lossy by intention is a rewrite too: the smallest set is one weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    found = bisect(model, (torch.randn(3, 64),), options={"quantize": "int8"}, most=MOST)
    (culprit,) = found.culprits
    assert culprit.rule == "int8_linear" and culprit.pass_name == "quantize" and culprit.match in str(found)
    loose = bisect(model, (torch.randn(3, 64),), options={"quantize": "int8"}, tolerance=1.0)
    assert not loose.culprits


# ------------------------------------------------------------------------------------------ the command line


def command(*words: str) -> Result:
    return CliRunner().invoke(cli.app, ["bisect", *words])


def test_the_command_finds_it_and_says_so_by_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    put(monkeypatch, torch_sdpa=at("layer.1.", lambda a: {**a, "k": a["v"]}))
    shown = command("bert", "--length", "5")
    assert shown.exit_code == 1 and "torch_sdpa in encoder.layer.1" in shown.stdout.replace("bert.", "")
    assert "def before(" in shown.stdout and "def after(" in shown.stdout
    told = json.loads(command("bert", "--length", "5", "--json").stdout)
    assert [c["rule"] for c in told["culprits"]] == ["torch_sdpa"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give a model or a --command"),
        (("bert", "--command", "x"), "give a model or a --command"),
        (("--command", "no_such_program_here"), "cannot be started"),
    ],
)
def test_mistakes_get_one_line(words: tuple[str, ...], message: str) -> None:
    result = command(*words)
    assert result.exit_code == 2 and message in result.stderr and len(result.stderr.splitlines()) == 1
