"""Random networks of generic operators, drawn by nnsmith (Liu et al., ASPLOS 2023) and its solver."""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tests.fuzz.script import NoProgram

OPERATORS = 8  # a network; a failure is to be read
ELEMENTS = 512  # a tensor, at most
DTYPES = ("float32", "float64", "int32", "int64", "bool")  # complex numbers are out of scope, and refused


class RandomModel(nn.Module):
    """A network as a list of calls: the inputs by position, its leaves as outputs."""

    def __init__(self, drawn: object, text: str) -> None:
        """`drawn` is nnsmith's SymbolNet, whose own forward looks at values; its operators are taken over."""
        super().__init__()
        self.calls = [(call, tuple(reads), tuple(gives)) for call, reads, gives, _ in drawn.instructions]  # type: ignore[attr-defined]
        self.parts = nn.ModuleList([call for call, _, _ in self.calls if isinstance(call, nn.Module)])
        self.takes = tuple(drawn.ir.input_var())  # type: ignore[attr-defined]  # nnsmith has no types
        self.gives = tuple(drawn.output_map)  # type: ignore[attr-defined]
        self.text = text

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """All leaves."""
        values = dict(zip(self.takes, inputs, strict=True))
        for call, reads, gives in self.calls:
            result = call(*(values[name] for name in reads))
            values.update(zip(gives, result if isinstance(result, list) else [result], strict=True))
        return tuple(values[name] for name in self.gives)

    def __str__(self) -> str:
        return self.text


def random_model(seed: int) -> tuple[RandomModel, Sequence[Tensor]]:
    """The network of a seed and its inputs.

    Raises:
        NoProgram: the solver found no such network, or eager does not run it.
    """
    from nnsmith.error import ConstraintError
    from nnsmith.graph_gen import model_gen

    operators, model_class = _nnsmith()
    state, numbers = torch.random.get_rng_state(), random.getstate()
    try:
        drawn = model_gen(
            opset=operators,
            method="symbolic-cinit",
            seed=seed,  # of torch, numpy and random too
            max_nodes=OPERATORS,
            max_elem_per_tensor=ELEMENTS,
            dtype_choices=DTYPES,
        ).make_concrete()
        net = model_class.from_gir(drawn).torch_model.eval().requires_grad_(False)
        inputs = tuple(net.get_random_inps().values())
        model = RandomModel(net, drawn.pretty())
        with torch.no_grad():
            model(*inputs)
    except (ConstraintError, RuntimeError) as error:
        raise NoProgram(str(error)) from error
    finally:
        torch.random.set_rng_state(state)
        random.setstate(numbers)
    return model, inputs


@functools.cache
def _nnsmith() -> tuple[list[type], type]:
    """Its operators and its class of torch models, for the CPU."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it draws no pictures without pygraphviz
        from nnsmith.abstract.extension import activate_ext
        from nnsmith.materialize import Model
    model_class = Model.init("torch", backend_target="cpu")
    model_class.add_seed_setter()
    operators = model_class.operators()
    activate_ext(opset=operators, factory=None)
    return operators, model_class
