"""Complex numbers inside of a graph, from which only real ones come out: which calls may read or make them.

No op of ours and no kernel takes them. They pass through as ATen calls, all of them functional, so that what
is around them (a Fourier transform, a rope that turns pairs as complex numbers) can still be recognised.
"""

from __future__ import annotations

import math
import operator

import torch
from torch import fx

from graphopt import graph as g
from graphopt.aliasing import viewed, written_arguments

# By name, all overloads: none of them writes, sets a conjugate bit, or has another meaning in fp64.
_MAKES = ("polar", "complex", "view_as_complex")
_READS = ("view_as_real", "real", "imag", "abs", "angle")
_COMPUTES = ("mul", "add", "sub", "div", "neg", "exp")
_TRANSFORMS = tuple(
    f"fft_{inverse}{kind}{n}" for inverse in ("", "i") for kind in ("fft", "rfft") for n in ("", "2", "n")
)
_MOVES = (
    *("view", "reshape", "_unsafe_view", "flatten", "unflatten", "permute", "transpose", "t", "expand"),
    *("unsqueeze", "squeeze", "slice", "select", "narrow", "split", "split_with_sizes", "chunk", "unbind"),
    *("cat", "stack", "repeat", "repeat_interleave", "index", "index_select", "clone", "contiguous"),
    *("to", "_to_copy", "type_as", "detach", "alias", "expand_as", "view_as", "reshape_as"),
)
KNOWN = frozenset((*_MAKES, *_READS, *_COMPUTES, *_TRANSFORMS, *_MOVES))


def is_complex(node: object) -> bool:
    """Whether a node holds a complex tensor, or a list with one."""
    value = g.val(node) if isinstance(node, fx.Node) else None
    several = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(x, torch.Tensor) and x.dtype.is_complex for x in several)


def complex_refusal(node: fx.Node) -> str | None:
    """Why a node may not stand where it does among complex numbers; None where it may, or has none."""
    odd = next((x for x in g.flat_arguments(node) if isinstance(x, complex) and not _is_spelt(x)), None)
    if odd is not None:
        return f"the complex literal {odd} of {node.name} is not one in Python, as which a graph spells it"
    read = next((n for n in node.all_input_nodes if is_complex(n)), None)
    if read is None and not is_complex(node):
        return _through_complex(node)
    if node.op == "output":
        return f"an output ({read}) has dtype {_dtype(read)}; complex outputs are not supported"
    if node.op == "get_attr":
        return f"a constant ({node.name}) has dtype {_dtype(node)}; complex constants are not supported"
    if node.op != "call_function" or node.target is operator.getitem:
        return None
    name = g.base_name(node.target)
    if name in KNOWN and node.target._schema.name.startswith("aten::") and not g.is_mutable(node.target):  # type: ignore[union-attr]  # an overload
        return None
    kind = f"dtype {_dtype(node)}" if is_complex(node) else f"an argument of dtype {_dtype(read)}"
    return f"{node.name} ({node.target}) has {kind}, which no pass understands"


def _is_spelt(x: complex) -> bool:
    """Whether Python's spelling of a complex number is that number: of `-0j` and `infj` it is not."""
    return all(math.isfinite(part) and (part or math.copysign(1, part) > 0) for part in (x.real, x.imag))


def _through_complex(node: fx.Node) -> str | None:
    """Why a real view of complex memory may not be written, or returned in place of an input's memory."""
    ends = node.all_input_nodes if node.op == "output" else written_arguments(node)
    for end in ends:
        passed, below = False, viewed(end)
        while below is not None:
            passed, last = passed or is_complex(below), below
            below = viewed(below)
        if passed and (node.op != "output" or last.op == "placeholder"):
            what = "is returned" if node.op == "output" else f"is written ({node.target})"
            return f"{end.name}, a view of the parts of complex numbers, {what}"
    return None


def _dtype(node: fx.Node | None) -> torch.dtype | None:
    value = g.val(node) if node is not None else None
    several = value if isinstance(value, (list, tuple)) else (value,)
    return next((x.dtype for x in several if isinstance(x, torch.Tensor) and x.dtype.is_complex), None)
