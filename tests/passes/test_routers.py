"""A router is found by where its outputs go, and is kept as it is whatever its name."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.observe import Event, Refused
from graphopt.passes.quantize import LINEAR, Quantize
from graphopt.pipeline import Context
from tests.graphs import Builder, calls
from tests.models.zoo import reports_of

aten = torch.ops.aten
INT8 = ops.linear_int8.overload


class Reasons(list[str]):
    """Why linears were kept."""

    def on_event(self, event: Event) -> None:
        if isinstance(event, Refused):
            self.append(event.refusal.reason)


def routed(choose: str, experts: int = 70, merged: bool = False) -> fx.GraphModule:
    """A linear whose outputs choose experts, beside one whose outputs do not."""
    build = Builder()
    x = build.input("x", 5, 64)
    rows = experts + (64 if merged else 0)
    scores = build.call(LINEAR, x, build.weight("m.any.weight", rows, 64), None, path="m.any")
    if merged:
        scores = build.call(aten.slice.Tensor, scores, -1, 0, experts, 1)
    if choose in ("softmax", "argmax"):
        scores = build.call(aten.softmax.int, scores, -1)
    if choose == "sigmoid":  # DeepSeek: a bias on the scores, groups of experts
        scores = build.call(ops.activation.overload, scores, "sigmoid")
        scores = build.call(aten.add.Tensor, scores, build.weight("m.bias", experts))
        scores = build.call(aten.reshape.default, scores, [5, 2, experts // 2])
    if choose == "argmax":
        chosen = build.call(aten.argmax.default, scores, -1, False)
    else:
        chosen = build.call(aten.topk.default, scores, 2, -1, True, True)
    other = build.call(LINEAR, x, build.weight("m.up.weight", 64, 64), None, path="m.up")
    return build.done(chosen, other)


@pytest.mark.parametrize("choose", ["topk", "softmax", "sigmoid", "argmax"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_router_is_kept_whatever_its_name(choose: str, merged: bool) -> None:
    gm, reasons = routed(choose, merged=merged), Reasons()
    Quantize().run(gm, Context(observers=(reasons,)))
    (linear,) = calls(gm, LINEAR)
    assert g.module_path(linear) == "m.any" and len(calls(gm, INT8)) == 1
    op, among = ("aten.argmax" if choose == "argmax" else "aten.topk"), 35 if choose == "sigmoid" else 70
    assert reasons == [f"router: {op} chooses among {among} of its outputs"]


def test_what_chooses_among_a_vocabulary_is_no_router() -> None:
    gm = routed("softmax", experts=1500)
    Quantize().run(gm, Context())
    assert not calls(gm, LINEAR)


def test_what_a_linear_or_a_norm_parts_from_the_choice_is_no_router() -> None:
    build = Builder()
    h = build.call(LINEAR, build.input("x", 5, 64), build.weight("up", 64, 64), None)
    h = build.call(ops.rms_norm.overload, h, None, 1e-6, 0.0, True)
    h = build.call(LINEAR, h, build.weight("gate", 64, 64), None)
    gm = build.done(build.call(aten.topk.default, h, 2, -1, True, True))
    reasons = Reasons()
    Quantize().run(gm, Context(observers=(reasons,)))
    assert len(calls(gm, INT8)) == 1 and calls(gm, LINEAR)[0].args[1].name == "gate"  # type: ignore[union-attr]  # a node
    assert reasons == ["router: aten.topk chooses among 64 of its outputs"]


# Each with 64 experts, so that the size of a router's weight is no reason to keep it.
SIZES = {
    "hidden_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
    "intermediate_size": 128, "moe_intermediate_size": 64, "vocab_size": 160, "pad_token_id": 0,
}  # fmt: skip
MIXTURES = {
    "Mixtral": {"num_local_experts": 64, "head_dim": 32},
    "Qwen2Moe": {"num_experts": 64, "shared_expert_intermediate_size": 64},
    "GptOss": {"num_local_experts": 64, "head_dim": 32, "layer_types": ["full_attention"]},
    "DeepseekV3": {
        "n_routed_experts": 64, "first_k_dense_replace": 0, "n_group": 2, "topk_group": 1, "q_lora_rank": 64,
        "kv_lora_rank": 64, "qk_rope_head_dim": 32, "qk_nope_head_dim": 32, "v_head_dim": 32,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", MIXTURES)
def test_the_routers_of_real_mixtures_are_kept(name: str) -> None:
    torch.compiler.reset()
    config = getattr(transformers, f"{name}Config")(**SIZES, **MIXTURES[name])
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    compiled = torch.compile(model, backend="graphopt", options={"strict": True, "quantize": "int8"})
    with torch.no_grad():
        _, reports = reports_of(lambda: compiled(torch.arange(3, 13).reshape(2, 5), use_cache=False))
    kept = {r.module_path: r.reason for report in reports for r in report.kept}
    ((path, reason),) = [(p, r) for p, r in kept.items() if r.startswith("router: ")]
    assert path.startswith("model.layers.0.mlp") and reason.startswith("router: aten.topk chooses among")
    assert all(r == "128 weights < 4096" for p, r in kept.items() if p != path)  # the gate of a shared expert
    assert sum(report.quantized or 0 for report in reports) >= 5
