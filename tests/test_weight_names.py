"""Weights of the Dynamo door: each tensor stays itself, whatever it is called and however it is reached."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from torch import fx, nn

from graphopt import backend
from graphopt import graph as g
from graphopt.capture import _weight_names, from_dynamo
from tests.tolerances import close

A, B = nn.Sequential(nn.Linear(8, 8)), nn.Sequential(nn.Linear(8, 8))


class Listed(nn.Module):
    """Layers in a plain list and a plain dict, and one that hides from `_modules`."""

    def __init__(self) -> None:
        super().__init__()
        self.ls = [nn.Linear(8, 8), nn.Linear(8, 8)]
        self.by_name = {"x": nn.Linear(8, 8), "y": nn.Linear(8, 8)}
        self.weight = nn.Parameter(torch.randn(8, 8))
        object.__setattr__(self, "hidden", nn.Linear(8, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in (*self.ls, *self.by_name.values(), self.hidden):
            x = layer(x)
        return x @ self.weight


class Holder:
    """No module, but holds two."""

    def __init__(self) -> None:
        self.enc, self.dec = nn.Linear(8, 8), nn.Linear(8, 8)


LISTED, HOLDER = Listed(), Holder()
PROGRAMS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "two globals": lambda x: B(A(x)),
    "lists and dicts": LISTED,
    "default arguments": lambda x, m=A, n=B: n(m(x)),
    "a plain holder": lambda x: HOLDER.dec(HOLDER.enc(x)),
}


@pytest.mark.parametrize("name", PROGRAMS)
def test_weights_of_one_name_stay_apart(name: str) -> None:
    torch.compiler.reset()
    program, x = PROGRAMS[name], torch.randn(3, 8)
    with torch.no_grad():
        compiled = torch.compile(program, backend="graphopt", options={"strict": True})
        close(compiled(x), program(x), torch.float32)
    assert backend.reports()[-1].fallback is None


def test_a_real_model_that_reaches_modules_through_dict_is_right() -> None:
    """Swin's second norm took the first one's weights when both were named alike."""
    from transformers import SwinConfig, SwinModel

    torch.manual_seed(0)
    config = SwinConfig(image_size=16, patch_size=4, embed_dim=16, depths=[1], num_heads=[2], window_size=4)
    model = SwinModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
        pixels = torch.randn(2, 3, 16, 16)
        compiled = torch.compile(model, backend="graphopt", options={"strict": True})
        close(compiled(pixels).last_hidden_state, model(pixels).last_hidden_state, torch.float32)


def decorated(forward: Callable[..., object]) -> Callable[..., object]:
    """As libraries wrap `forward`: Dynamo then knows the module as an item of `args`."""

    @functools.wraps(forward)
    def wrapped(*args: object, **kwargs: object) -> object:
        return forward(*args, **kwargs)

    return wrapped


class Decorated(nn.Module):
    """A module whose paths begin with its only child's."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(8, 8))

    @decorated
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


def test_a_decorated_forward_changes_no_name() -> None:
    found: list[tuple[set[str], set[str]]] = []

    def names(gm: fx.GraphModule, examples: list[object]) -> Callable[..., object]:
        graph = from_dynamo(gm, examples).gm.graph
        weights = {g.weight_names(n)[0] for n in g.placeholders(graph) if g.is_weight(n)}
        found.append((weights, {g.module_path(n) for n in graph.nodes if n.op == "call_function"}))
        return gm.forward

    torch.compiler.reset()
    with torch.no_grad():
        torch.compile(Decorated(), backend=names)(torch.randn(3, 8))
    assert found == [({"inner.0.weight", "inner.0.bias"}, {"inner.0"})]


FC = "._modules['fc']._parameters['weight']"


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        ([f"L['self']{FC}", "L['x']", "L['self'].scale"], [("fc.weight",), (), ()]),
        ([f"L['fn']._orig_mod{FC}"], [("fc.weight",)]),
        ([f"L['args'][0]{FC}", f"L['args'][0].ls[1]{FC}"], [("fc.weight",), ("ls.1.fc.weight",)]),
        ([f"L['ms'][0]{FC}", f"L['ms'][1]{FC}"], [("ms.0.fc.weight",), ("ms.1.fc.weight",)]),
        ([f"G['a']{FC}", f"G['b']{FC}"], [("a.fc.weight",), ("b.fc.weight",)]),
        (["L['self'].ls[1]._parameters['bias']"], [("ls.1.bias",)]),
        (["L['self'].__dict__['norm']._buffers['mean']"], [("norm.mean",)]),
        ([f"L['self']{FC}", f"L['self'].__dict__['fc']{FC[13:]}"], [("fc.weight",), ("fc.weight#2",)]),
    ],
)
def test_names_say_the_whole_way(sources: list[str], names: list[tuple[str, ...]]) -> None:
    assert _weight_names(sources) == names
