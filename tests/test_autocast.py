"""Autocast's casts become explicit: each policy, regions in regions, autocast around, every door, real
models; what no cast of an argument can say is refused.
"""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from graphopt import autocast, backend, torch_private
from graphopt.capture import capture
from graphopt.errors import CaptureRefused
from tests.eager import as_eager, falls_back
from tests.tolerances import AUTOCAST

aten = torch.ops.aten
HALVES = (torch.bfloat16, torch.float16)


def lowered(dtype: torch.dtype = torch.bfloat16) -> torch.autocast:
    return torch.autocast("cpu", dtype)


def x44() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 4)


def casts(captured) -> list[torch.dtype]:
    return [n.args[1] for n in captured.gm.graph.nodes if n.target is aten.to.dtype]


CALLS = {
    "linear": lambda x: F.linear(x, x, x[0]),
    "matmul": lambda x: x @ x,
    "bmm": lambda x: torch.bmm(x[None], x[None]),
    "addmm": lambda x: torch.addmm(x[0], x, x),
    "baddbmm": lambda x: torch.baddbmm(x[None], x[None], x[None]),
    "einsum": lambda x: torch.einsum("ij,jk->ki", x, x),
    "convolution": lambda x: F.conv1d(x[None], x[:, :, None], x[0]),
    "attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None]),
    "masked attention": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], attn_mask=x),
    "raised to fp32": lambda x: torch.cdist(x.bfloat16(), x.bfloat16()),
    "prod": lambda x: torch.prod(x.bfloat16(), 0),
    "cat": lambda x: torch.cat([x @ x, x]),
    "stack": lambda x: torch.stack([x @ x, x]),
    "index_copy": lambda x: x.index_copy(0, torch.tensor([0]), (x @ x)[:1]),
    "norm and softmax": lambda x: torch.softmax(F.layer_norm(x @ x, (4,)), -1),
    "fp64 stays": lambda x: x.double() @ x.double(),
    "integers stay": lambda x: torch.cat([x.int(), x.int()]),
    "in place": lambda x: (x.clone().add_(x @ x), x.clone().clamp_(0).mul_(2)),
}


@pytest.mark.parametrize("half", HALVES, ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_each_policy(name: str, half: torch.dtype) -> None:
    def program(x):
        with lowered(half):
            return CALLS[name](x)

    as_eager(program, x44(), strict=False)


def test_the_casts_are_of_the_arguments() -> None:
    with lowered():
        captured = capture(lambda x, w: F.linear(x, w) + x, x44(), x44())
    assert [n.target for n in captured.gm.graph.nodes if n.op == "call_function"] == [
        *(aten.to.dtype, aten.to.dtype, aten.linear.default, aten.add.Tensor)
    ]
    assert casts(captured) == [torch.bfloat16] * 2
    assert not casts(capture(lambda x, w: F.linear(x, w), x44(), x44()))


def nested(x):
    before = x @ x
    with torch.autocast("cpu", enabled=False):
        off = x @ x
        with lowered(torch.float16):
            inner = x @ x
        off_again = x @ x
    with lowered():
        return before, off, inner, off_again, x @ x


@pytest.mark.parametrize("around", [contextlib.nullcontext, lowered], ids=["alone", "under autocast"])
def test_regions_in_regions(around) -> None:
    with around():
        as_eager(nested, x44(), strict=False)


def test_a_region_that_is_off_needs_nothing() -> None:
    def program(x):
        with torch.autocast("cpu", enabled=False):
            return x @ x

    with lowered():
        as_eager(program, x44(), strict=False)
        assert not casts(capture(program, x44()))


class TwoLinears(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        with lowered(torch.float16):
            y = self.a(x)
        return y, self.b(x)


@pytest.mark.parametrize("around", [contextlib.nullcontext, lowered], ids=["alone", "under autocast"])
@pytest.mark.parametrize(
    "door",
    [lambda m, x: capture(m, x), lambda m, x: capture(lambda x: m(x), x),
     lambda m, x: capture(torch.export.export(m, (x,)))],
    ids=["module", "function", "exported"],
)  # fmt: skip
def test_every_door(door, around) -> None:
    model, x = TwoLinears(), x44()
    with torch.no_grad(), around():
        captured = door(model, x)
        for got, want in zip(captured(x), model(x), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)
    assert all(p.dtype == torch.float32 for p in model.parameters())


def test_the_same_model_inside_and_outside() -> None:
    model, x = nn.Linear(4, 4), x44()
    torch.compiler.reset()
    backend.clear_reports()
    compiled = torch.compile(model, backend="graphopt", options={"strict": True})
    with torch.no_grad():
        for around in (lowered(), contextlib.nullcontext(), lowered(torch.float16)) * 2:
            with around:
                got, want = compiled(x), model(x)
            assert got.dtype == want.dtype and torch.equal(got, want)
    assert [r.fallback for r in backend.reports()] == [None] * 3


def test_a_program_under_inference_mode() -> None:
    def program(x):
        with lowered():
            return torch.einsum("ij,jk->ik", x, x), x @ x

    torch.compiler.reset()
    compiled = torch.compile(program, backend="graphopt")
    with torch.inference_mode():
        x = x44()
        for got, want in zip(compiled(x), program(x), strict=True):
            assert got.dtype == want.dtype and torch.equal(got, want)


@pytest.mark.parametrize("dynamic", [None, True])
def test_a_changed_weight_and_another_length(dynamic: bool | None) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 4))
    torch.compiler.reset()
    compiled = torch.compile(model, backend="graphopt", options={"strict": True}, dynamic=dynamic)
    with torch.no_grad(), lowered():
        for rows in (3, 5, 1):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(compiled(x), model(x))
            model[0].weight.mul_(2)
            torch.clear_autocast_cache()  # eager itself would go on with the old cast
            torch.testing.assert_close(compiled(x), model(x))


# --------------------------------------------------------------------------------------------- real models


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=64, use_cache=False)
    return transformers.LlamaForCausalLM(config)


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    return transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=64))


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=64, use_cache=False)
    return transformers.GPT2LMHeadModel(config)


@pytest.mark.parametrize(
    ("make", "recognised"),
    [
        (llama, {"attention": 2, "rms_norm": 5, "gated_activation": 2}),
        (bert, {"attention": 2, "activation": 2}),
        (gpt2, {"attention": 2, "activation": 2}),
    ],
    ids=["llama", "bert", "gpt2"],
)
def test_real_models(make, recognised: dict[str, int]) -> None:
    torch.manual_seed(0)
    model, ids = make().eval(), torch.randint(0, 64, (2, 7))
    torch.compiler.reset()
    backend.clear_reports()
    with torch.no_grad(), lowered():
        want = model(ids)[0]
        got = torch.compile(model, backend="graphopt", options={"strict": True})(ids)[0]
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, **AUTOCAST)
    (report,) = backend.reports()
    assert report.fallback is None and recognised.items() <= report.counts.items(), report


# ------------------------------------------------------------------------------------------------- refusals


REFUSED = {
    "_trilinear": lambda x: F.bilinear(x, x, x.expand(2, 4, 4)),
    "linalg_pinv": lambda x: torch.linalg.pinv(x),
    "linalg_matrix_exp": lambda x: torch.linalg.matrix_exp(x),
    "affine_grid_generator": lambda x: F.affine_grid(x[:2, :3][None], [1, 1, 2, 2]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_kernel_that_may_cast_is_refused(name: str) -> None:
    with (
        lowered(),
        pytest.raises(CaptureRefused, match=rf"inside the kernel of aten.{name}.*model.to\(dtype"),
    ):
        capture(REFUSED[name], x44())


def test_a_custom_operator_is_refused() -> None:
    with torch.library._scoped_library("autocast_test", "FRAGMENT") as library:
        library.define("product(Tensor x) -> Tensor")
        library.impl("product", lambda x: x @ x, "CompositeExplicitAutograd")
        with lowered(), pytest.raises(CaptureRefused, match=r"inside the kernel of autocast_test.product"):
            capture(lambda x: torch.ops.autocast_test.product(x), x44())


def test_a_cast_in_the_middle_is_refused() -> None:
    """The cell's second product takes what the first has made."""
    cell = nn.GRUCell(4, 4)
    with (
        lowered(),
        pytest.raises(CaptureRefused, match=r"bfloat16 casts inside aten.gru_cell.*model.to\(dtype"),
    ):
        capture(lambda x: cell(x, x), x44())


def test_another_device_is_refused() -> None:
    with pytest.raises(CaptureRefused, match=r"autocast\('cuda', torch.float16\); convert"):
        autocast.region("cuda", torch.float16)
    autocast.region("cuda", torch.float16, False)


def test_the_state_is_what_it_was_after_a_refusal() -> None:
    def program(x):
        with lowered():
            return F.bilinear(x, x, x.expand(2, 4, 4))

    for _ in range(2):
        falls_back(program, x44(), why="_trilinear")
        assert autocast.ambient() is None and torch.is_autocast_cache_enabled()
    with lowered(torch.float16):
        falls_back(program, x44(), why="_trilinear")
        assert autocast.ambient() == torch.float16


def test_what_is_made_explicit_runs_without_autocast() -> None:
    seen = []
    with lowered():
        autocast.outside(lambda: seen.append(autocast.ambient()))()
        assert seen == [None] and autocast.ambient() == torch.bfloat16


def test_a_mode_of_ours_is_left_as_it_was() -> None:
    mode = torch_private.new_fake_mode()
    (fake,) = torch_private.faked([x44()], mode)
    with lowered():
        capture(lambda x: x @ x, fake)
    assert fake.dtype == torch.float32 and fake.shape == (4, 4)
