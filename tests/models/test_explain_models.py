"""Questions about tiny real models: places that the report has cut, and the lines of the modelling files."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import fx

import graphopt
from graphopt import graph as g
from graphopt.capture import Captured, from_dynamo
from graphopt.errors import OptionError
from graphopt.report import Report
from graphopt.tools.explain import captured
from graphopt.tracing import source_line
from tests.models import zoo

LAYERS = {"llama": "layers.1", "qwen3": "layers.1", "gemma2": "layers.1", "gpt2": "h.1", "bert": "layer.1"}


def explained(name: str) -> Report:
    model = zoo.model(name)
    given = zoo.inputs(model, zoo.Case(padding="left"))
    return graphopt.explain(model, **given, **({} if name == "bert" else {"use_cache": False}))


def lines_of(name: str) -> list[str]:
    """The modelling file of a family, as it is on disk."""
    module = __import__(f"transformers.models.{name}.modeling_{name}", fromlist=["*"])
    return Path(module.__file__).read_text().splitlines()


@pytest.mark.parametrize("name", zoo.FAMILIES)
def test_what_matched_and_missed_in_a_layer_is_told_with_the_modelling_files_lines(name: str) -> None:
    told = explained(name).explain(module=LAYERS[name])
    rules = {m.rule for m in told.matches}
    assert rules & {"torch_sdpa", "weighted_values"}, "attention"
    assert len(told.misses) > 5 and all(r.expected or r.guard for r in told.misses)
    text = lines_of(name)
    for source in [m.source.split("  ")[-1] for m in told.matches] + [
        r.source for r in told.misses if r.source
    ]:
        place, _, code = source.partition(" ")
        file, _, number = place.partition(":")
        assert file == f"modeling_{name}.py", source
        assert text[int(number) - 1].strip() == code.strip(), source
    assert json.loads(told.to_json())["question"]["module"] == LAYERS[name]


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_through_dynamo_lines_are_the_modelling_files_too(name: str) -> None:
    seen: list[Captured] = []

    def hand_over(gm: fx.GraphModule, examples: list[torch.Tensor]) -> Callable[..., object]:
        seen.append(from_dynamo(gm, examples))
        return gm.forward

    model = zoo.model(name)
    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(model, backend=hand_over)(**zoo.inputs(model, zoo.Case()))
    heavy = [n for n in seen[0].gm.graph.nodes if g.op_name(n) in ("aten.linear", "aten.matmul")]
    heavy += [n for n in seen[0].gm.graph.nodes if g.op_name(n) == "aten.scaled_dot_product_attention"]
    assert len(heavy) > 8 and {g.source(n).split(":")[0] for n in heavy} == {f"modeling_{name}.py"}


TRACE = """  File "/x/modeling_a.py", line 7, in forward
    y = self.act(x)
  File "/x/activations.py", line 3, in forward
    return gelu(x)
  File "/x/helper.py", line 9, in gelu
    return x * 2
"""


def test_the_file_of_most_modules_is_the_models(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    for name in ("modeling_a", "activations"):
        module = types.ModuleType(name)
        module.__file__ = f"/x/{name}.py"
        monkeypatch.setitem(sys.modules, name, module)
    outer = {str(i): ("", f"modeling_a.Part{i}") for i in range(2)}
    act = {"act": ("act", "activations.Gelu"), "linear": ("act.linear", "torch.nn.modules.linear.Linear")}
    assert source_line(TRACE, {**outer, **act}) == "modeling_a.py:7 y = self.act(x)"
    assert source_line(TRACE, act) == "activations.py:3 return gelu(x)"
    assert source_line(TRACE, {}) == "helper.py:9 return x * 2"
    assert source_line("", outer) == ""


def test_a_place_that_the_report_has_cut_is_answered() -> None:
    """A product that is nothing like a norm is no near miss; asked for, it says what stands there instead."""
    report = explained("llama")
    mine = [r for r in report.refusals if r.rule == "llama_rms_norm" and "layers.1.mlp" in r.module_path]
    assert not mine
    told = report.explain(rule="llama_rms_norm", module="layers.1.mlp")
    (miss,) = told.misses
    assert not told.matches and miss.depth == 1 and miss.anchor_path == "model.layers.1.mlp"
    assert miss.expected == "aten.mul" and miss.found.startswith("linear (")
    assert miss.source.startswith("modeling_llama.py:")


def test_a_question_by_node_finds_the_match_that_took_it() -> None:
    report = explained("llama")
    match = next(m for m in report.matches if m.rule == "llama_rms_norm" and "layers.1." in m.module_path)
    told = report.explain(node=match.nodes[-1])
    assert match.id in [m.id for m in told.matches]
    wrong_rule = report.explain(rule="gpt2_gelu", node=match.nodes[-1])
    assert not wrong_rule.matches
    assert any("llama_rms_norm took" in note for note in wrong_rule.notes)
    assert any("gpt2_gelu was tried nowhere: no aten." in note for note in wrong_rule.notes)


def test_passes_after_recognition_answer_too() -> None:
    told = explained("llama").explain(rule="merge_siblings", module="layers.1")
    assert {m.module_path.rpartition(".")[2] for m in told.matches} == {"self_attn", "mlp"}
    assert any(r.node for r in told.misses) or told.matches


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"rule": "lama_rms_norm"}, "no rule 'lama_rms_norm'; did you mean 'llama_rms_norm'"),
        ({"module": "layers.9.mlp"}, r"no module 'layers.9.mlp' has nodes in the graph; did you mean"),
        ({"node": "no_such_node_at_all"}, "no node 'no_such_node_at_all'; "),
    ],
)
def test_what_is_not_there_is_named_with_the_nearest(asked: dict[str, str], message: str) -> None:
    with pytest.raises(OptionError, match=message):
        explained("llama").explain(**asked)


def test_export_and_dynamo_give_the_same_places() -> None:
    model = zoo.model("bert")
    program = captured(model, (), zoo.inputs(model, zoo.Case()))
    assert all(g.source(n) for n in program.gm.graph.nodes if g.is_call(n) and g.is_tensor(n))
