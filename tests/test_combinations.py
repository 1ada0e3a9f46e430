"""Merged x sharded x int8, in every combination, on real tiny models: equal to the model of the kept weights.

The reference is the eager model whose quantized weights are replaced by what their int8 form stands for.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Collection, Sequence

import pytest
import torch
import transformers
from torch import nn

import graphopt
from graphopt import backend
from graphopt.capture import Captured, capture
from graphopt.defaults import context
from graphopt.errors import OptionError
from graphopt.lowering.module import Lower
from graphopt.ops import pack_int8, scales_int8
from graphopt.ops.quantized import dequantized
from graphopt.passes.canonicalize import Canonicalize
from graphopt.passes.merge import Merge
from graphopt.passes.quantize import Quantize
from graphopt.passes.recognise import Recognise
from graphopt.passes.shard import Shard
from graphopt.pipeline import Pass, Pipeline
from graphopt.report import Report
from graphopt.sharding.lockstep import lockstep
from graphopt.tools.zoo.weights import fill, scale
from tests.models import zoo
from tests.tolerances import INT8_COSINE, SAME_PRODUCTS

BYTES = 0.28  # of fp32: 8 bits and a scale of 32 for 64 weights are 0.266
SIZES = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 2}


@pytest.fixture(autouse=True)
def no_memory() -> None:
    """Torch compiles one function 8 times, then runs it as it is: here each test has its own."""
    torch.compiler.reset()


def _llama(case: zoo.Case) -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES, num_key_value_heads=2, vocab_size=167, tie_word_embeddings=case.tied, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, max_position_embeddings=64, mlp_bias=True,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def _gpt2(case: zoo.Case) -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=128, n_head=4, n_inner=256, n_layer=2, n_positions=64, vocab_size=167, bos_token_id=1,
        eos_token_id=2, pad_token_id=0, tie_word_embeddings=case.tied,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


def _bert(case: zoo.Case) -> nn.Module:
    config = transformers.BertConfig(
        **SIZES, vocab_size=167, max_position_embeddings=64, pad_token_id=0, tie_word_embeddings=case.tied
    )
    return transformers.AutoModelForMaskedLM.from_config(config)


BUILDS = {"llama": _llama, "gpt2": _gpt2, "bert": _bert}


@functools.cache
def _model(name: str, tied: bool) -> nn.Module:
    case = zoo.Case(tied=tied)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sum(map(ord, name)))
        built = BUILDS[name](case).eval().requires_grad_(False)
        fill(built)
        scale(built, zoo.inputs(built, case))
    return built


def model(name: str, tied: bool = True) -> nn.Module:
    """A tiny model whose sizes 64 divides, by 2 ranks too; the caller's own."""
    return copy.deepcopy(_model(name, tied))


def fake_quantized(built: nn.Module, group: int = 64, keep: Collection[str] = ()) -> nn.Module:
    """A copy in which each linear's weight is what its int8 form stands for; a tied table keeps its own."""
    built = copy.deepcopy(built)
    for name, module in built.named_modules():
        conv = type(module).__name__ == "Conv1D"
        if name in keep or not (conv or isinstance(module, nn.Linear)):
            continue
        rows = module.weight.T if conv else module.weight
        scales = scales_int8(rows, group)
        kept = dequantized(pack_int8(rows, scales), scales).to(rows.dtype)
        module.weight = nn.Parameter(kept.T.contiguous() if conv else kept, requires_grad=False)
    return built


def differ(one: Sequence[object], two: Sequence[object]) -> float:
    """The largest difference between the logits of two runs."""
    return max(
        float((a - b).abs().max())
        for a, b in zip(one, two, strict=True)
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    )


# -------------------------------------------------------------------------------------------- real models

WAYS = [
    ("llama", True, "static"), ("llama", True, "none"), ("llama", False, "dynamic"),
    ("gpt2", True, "dynamic"), ("gpt2", False, "static"), ("bert", True, "none"), ("bert", False, "none"),
]  # fmt: skip


@pytest.mark.parametrize("merge", [True, False], ids=["merged", "apart"])
@pytest.mark.parametrize(("name", "tied", "cache"), WAYS)
def test_a_model_in_int8_is_the_model_of_the_kept_weights(
    name: str, tied: bool, cache: str, merge: bool
) -> None:
    built = model(name, tied)
    given = zoo.inputs(built, zoo.Case(padding="left", cache=cache))
    with torch.no_grad():
        expected, exact = zoo.run(fake_quantized(built), given, cache), zoo.run(built, given, cache)
        options = {"strict": True, "quantize": "int8", "merge": merge}
        compiled = torch.compile(built, backend="graphopt", options=options)
        found, reports = zoo.reports_of(lambda: zoo.run(compiled, given, cache))
    assert differ(found, expected) <= SAME_PRODUCTS
    assert differ(found, exact) > 100 * SAME_PRODUCTS, "int8 would be seen to be int8"
    for report in reports:
        require_all_int8(report)


def require_all_int8(report: Report) -> None:
    """No linear is left, and the bytes are what int8 and its scales take."""
    before, after = report.quantized_bytes
    assert report.quantized and 0 < after <= BYTES * before
    assert "linear" not in report.kernels and list(report.kernels["linear_int8"]) == ["linear_int8_tiled"]
    assert not report.kept and not report.warnings


def test_names_are_kept() -> None:
    built = model("llama")
    given, keep = zoo.inputs(built, zoo.Case()), ("lm_head", "model.layers.1.mlp.down_proj")
    options = {"strict": True, "quantize": "int8", "quantize_group": 32, "quantize_exclude": keep}
    with torch.no_grad():
        compiled = torch.compile(built, backend="graphopt", options=options)
        found, (report, *_) = zoo.reports_of(lambda: zoo.run(compiled, given, "none"))
        assert differ(found, zoo.run(fake_quantized(built, 32, keep), given, "none")) <= SAME_PRODUCTS
    assert [r.module_path for r in report.kept] == ["model.layers.1.mlp.down_proj", "lm_head"]
    assert "kept model.layers.1.mlp.down_proj (" in str(report)


@pytest.mark.parametrize("by", ["optimize", "enable"])
def test_other_doors_quantize_too(by: str) -> None:
    built, exact = model("llama"), model("llama")
    given = zoo.inputs(built, zoo.Case())
    with torch.no_grad():
        expected = zoo.run(fake_quantized(exact), given, "none")
        if by == "optimize":
            found = zoo.run(graphopt.optimize(built, quantize="int8"), given, "none")
        else:
            with graphopt.enable(quantize="int8"):
                found = zoo.run(torch.compile(built), given, "none")
    assert differ(found, expected) <= SAME_PRODUCTS


def test_weights_that_change_are_quantized_again() -> None:
    built, other = model("gpt2"), model("gpt2")
    given = zoo.inputs(built, zoo.Case())
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        compiled = torch.compile(built, backend="graphopt", options={"strict": True, "quantize": "int8"})

        def same() -> bool:
            return (
                differ(zoo.run(compiled, given, "none"), zoo.run(fake_quantized(built), given, "none"))
                <= SAME_PRODUCTS
            )

        assert same()
        built.transformer.h[1].mlp.c_fc.weight.mul_(1.5)
        assert same()
        built.load_state_dict(other.state_dict())
        assert same()
        attn = built.transformer.h[0].attn.c_attn
        attn.weight = nn.Parameter(attn.weight.flip(0), requires_grad=False)
        assert same()
        built.transformer.wte.weight.mul_(0.5)  # tied: the table and the int8 head
        assert same()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"quantize_group": 96},
            "OptionError: quantize: group 96 does not divide the inputs of .* group 32 divides",
        ),
        ({"quantize_group": 512}, "group 512 does not divide .* quantize_exclude="),
    ],
)
def test_a_group_that_does_not_fit_is_an_error(options: dict[str, object], message: str) -> None:
    built = model("llama")
    before = copy.deepcopy(built.state_dict())
    compiled = torch.compile(built, backend="graphopt", options={"quantize": "int8", **options})
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        compiled(**zoo.inputs(built, zoo.Case()))
    assert all(torch.equal(v, before[n]) for n, v in built.state_dict().items())


def test_nan_weights_are_an_error_that_names_them() -> None:
    built = model("bert")
    built.bert.encoder.layer[1].intermediate.dense.weight[3, 5] = torch.nan
    compiled = torch.compile(built, backend="graphopt", options={"quantize": "int8"})
    with (
        torch.no_grad(),
        pytest.raises(graphopt.errors.WeightError, match=r"layer\.1\.intermediate\.dense\.weight"),
    ):
        compiled(**zoo.inputs(built, zoo.Case()))


# -------------------------------------------------------------------------------------- every combination


def rank(captured: Captured, merge: bool, world: int, number: int, int8: bool) -> Captured:
    """What one rank runs."""
    chosen: list[Pass] = [Canonicalize(), Recognise()]
    chosen += [Merge()] if merge else []
    chosen += [Shard(world, number)] if world > 1 else []
    chosen += [Quantize(least=1)] if int8 else []
    program, _ = Pipeline((*chosen, Lower())).run(captured, context())
    return program


@pytest.mark.parametrize("int8", [True, False], ids=["int8", "fp32"])
@pytest.mark.parametrize("world", [2, 1], ids=["sharded", "whole"])
@pytest.mark.parametrize("merge", [True, False], ids=["merged", "apart"])
@pytest.mark.parametrize(
    ("name", "tied"), [("llama", True), ("llama", False), ("gpt2", True), ("bert", True)]
)
def test_merged_sharded_and_int8(name: str, tied: bool, merge: bool, world: int, int8: bool) -> None:
    built = model(name, tied)
    given = zoo.inputs(built, zoo.Case())
    options = {"use_cache": False} if name != "bert" else {}
    with torch.no_grad():
        expected = (fake_quantized(built) if int8 else built)(**given, **options).logits
        captured = capture(built, **given, **options)
        programs = [rank(captured, merge, world, number, int8) for number in range(world)]
        values = captured.bind((), {**given, **options})
        outputs = lockstep([p.gm for p in programs], [values] * world)
    for flat in outputs:
        found = captured.unflatten(flat)
        logits = found.logits if hasattr(found, "logits") else found[0]
        assert differ([logits], [expected]) <= SAME_PRODUCTS


def test_groups_have_to_divide_a_ranks_part() -> None:
    built = model("bert")
    given = zoo.inputs(built, zoo.Case())
    with torch.no_grad():
        captured = capture(built, **given)
        expected = fake_quantized(built, 32)(**given).logits
        steps = (Canonicalize(), Recognise(), Merge(), Shard(4, 1))
        with pytest.raises(
            OptionError, match=r"group 64 does not divide .* with 32 inputs .* group 32 divides"
        ):
            Pipeline((*steps, Quantize())).run(captured, context())
        programs = [
            Pipeline((*steps[:3], Shard(4, number), Quantize(group=32, least=1), Lower())).run(
                captured, context()
            )
            for number in range(4)
        ]
        outputs = lockstep([p.gm for p, _ in programs], [captured.bind((), given)] * 4)
    assert all(differ([captured.unflatten(flat).logits], [expected]) <= SAME_PRODUCTS for flat in outputs)  # type: ignore[attr-defined]  # a model's output


# ---------------------------------------------------------------------------------------- a trained model


def test_a_trained_encoder_keeps_its_embeddings() -> None:
    from graphopt.tools.demo_models import encoder, sentences

    page = sentences()
    trained = encoder()
    exact = trained.encode(page, convert_to_tensor=True)
    backend.clear_reports()
    trained.compile(backend="graphopt", dynamic=True, options={"strict": True, "quantize": "int8"})
    found = trained.encode(page, convert_to_tensor=True)
    (report,) = backend.reports()
    require_all_int8(report)
    assert report.quantized == 6 * 6  # of 6 layers: Q, K, V, output, up, down
    cosine = torch.nn.functional.cosine_similarity(found, exact)
    assert cosine.min() >= INT8_COSINE
