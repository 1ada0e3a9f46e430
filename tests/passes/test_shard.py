"""Real models, shared by two and four ranks in one process: the same logits and tokens, less weights each."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import pytest
import torch
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.capture import Captured, capture
from graphopt.defaults import context
from graphopt.lowering.module import Lower
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.merge import Merge
from graphopt.passes.recognise import Recognise
from graphopt.passes.shard import SHARED, Shard, Shared
from graphopt.pipeline import Pass, Pipeline
from graphopt.sharding.lockstep import lockstep
from tests.graphs import calls
from tests.sharding.drawing import gathers, reductions
from tests.sharding.models import LAYERS, captured, given, model
from tests.tolerances import LOGITS

FAMILIES = ("llama", "qwen3", "gemma2", "gpt2", "bert")
LINEAR = ops.linear.overload
KV_HEADS = {"llama": 2, "qwen3": 2, "gemma2": 2, "gpt2": 4, "bert": 4}


@functools.cache
def recognised(name: str, tied: bool = True) -> Captured:
    return Pipeline((Canonicalize(), Recognise())).run(captured(name, tied=tied), context())[0]


def ranks_of(
    name: str, world: int, *, tied: bool = True, order: Sequence[Pass | str] = ("shard",)
) -> list[Captured]:
    """The program of each rank; `order` is what runs after recognition, "shard" among it."""
    passes: list[list[Pass]] = [
        [Shard(world, rank) if step == "shard" else step for step in order]  # type: ignore[misc]  # passes
        for rank in range(world)
    ]
    start = captured(name, tied=tied)
    return [Pipeline((Canonicalize(), Recognise(), *steps)).run(start, context())[0] for steps in passes]


def flat(program: Captured, name: str, inputs: Mapping[str, torch.Tensor]) -> list[object]:
    return program.bind((), {**inputs, **({} if name == "bert" else {"use_cache": False})})


def run(programs: Sequence[Captured], name: str, inputs: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
    """The logits of all ranks."""
    with torch.no_grad():
        outputs = lockstep([p.gm for p in programs], [flat(p, name, inputs) for p in programs])
    return [o[0] for o in outputs]  # type: ignore[index]  # a tuple


def expected(name: str, inputs: Mapping[str, torch.Tensor], tied: bool = True) -> torch.Tensor:
    with torch.no_grad():
        return model(name, tied=tied)(**inputs).logits


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_ranks_together_give_the_logits_of_one(name: str, world: int, tied: bool) -> None:
    programs = ranks_of(name, world, tied=tied)
    inputs = given(name, tied=tied)
    for logits in run(programs, name, inputs):
        assert (logits - expected(name, inputs, tied)).abs().max() < LOGITS
    for program in programs:
        assert reductions(program.gm) == 2 * LAYERS + 1  # two a block, one for the embedding
        assert gathers(program.gm) == 1  # the logits


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    "order", [(Merge(), "shard"), ("shard", Merge()), (Merge(), "shard", Lower())], ids=str
)
def test_before_and_after_other_passes(name: str, world: int, order: Sequence[Pass | str]) -> None:
    programs = ranks_of(name, world, order=order)
    inputs = given(name)
    for logits in run(programs, name, inputs):
        assert (logits - expected(name, inputs)).abs().max() < LOGITS


def bytes_of(program: Captured, module: str) -> int:
    """The bytes of the weights of the linears below modules of that name."""
    linears = [n for n in calls(program.gm, LINEAR) if module in g.module_path(n).split(".")]
    values = {v: g.val(v) for n in linears if isinstance(v := n.args[1], fx.Node)}
    return sum(v.numel() * v.element_size() for v in values.values())  # type: ignore[attr-defined]  # tensors


def kv_bytes(program: Captured) -> int:
    """The bytes of the key and value projections."""
    return sum(bytes_of(program, name) for name in ("k_proj", "v_proj"))


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_each_rank_has_its_share_of_the_weights(name: str, world: int) -> None:
    whole = recognised(name)
    attention = {"gpt2": "attn", "bert": "attention"}.get(name, "self_attn")
    for program in ranks_of(name, world):
        copied = max(world // KV_HEADS[name], 1)  # ranks that hold the same kv head
        assert kv_bytes(program) * world == kv_bytes(whole) * copied
        for module in (attention, "mlp") if name != "bert" else (attention, "intermediate", "layer"):
            mine, all_of_it = bytes_of(program, module), bytes_of(whole, module)
            assert all_of_it > 0
            if module == attention:
                mine, all_of_it = mine - kv_bytes(program), all_of_it - kv_bytes(whole)
            assert mine <= all_of_it / world * 1.01
        told = program.gm.meta[SHARED]
        assert isinstance(told, Shared)
        assert told.bytes[1] < told.bytes[0] * (1 / world + 0.2)


GREEDY = 6  # tokens


def greedy(name: str, programs: Sequence[Captured]) -> list[list[int]]:
    """Tokens chosen one after the other, in a row of fixed length: later positions are not seen."""
    start, length = 3, 3 + GREEDY
    ids = torch.zeros(1, length, dtype=torch.long)
    ids[0, :start] = torch.tensor([5, 17, 33])
    rows = [ids.clone() for _ in programs] or [ids]
    for at in range(start, length):
        inputs = {"input_ids": rows[0], "attention_mask": torch.ones_like(ids)}
        logits = run(programs, name, inputs) if programs else [expected(name, inputs, tied=False)]
        for row, found in zip(rows, logits, strict=True):
            row[0, at] = found[0, at - 1].argmax()
    return [row[0].tolist() for row in rows]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_same_greedy_tokens(name: str) -> None:
    ones = torch.ones(1, 3 + GREEDY, dtype=torch.long)
    example = {"input_ids": ones, "attention_mask": ones.clone()}
    extra = {} if name == "bert" else {"use_cache": False}
    program = capture(model(name, tied=False), **example, **extra)
    (tokens,) = greedy(name, [])
    for world in (2, 4):
        steps = [(Canonicalize(), Recognise(), Merge(), Shard(world, rank)) for rank in range(world)]
        programs = [Pipeline(s).run(program, context())[0] for s in steps]
        assert greedy(name, programs) == [tokens] * world
    assert len(set(tokens[3:])) > 1, "all tokens are one: nothing is compared"


def test_a_fault_in_a_ranks_weights_shows() -> None:
    """That the comparison can fail: the ranks' graphs in the wrong order."""
    programs = ranks_of("llama", 2)[::-1]
    inputs = given("llama")
    assert (run(programs, "llama", inputs)[0] - expected("llama", inputs)).abs().max() > 100 * LOGITS
