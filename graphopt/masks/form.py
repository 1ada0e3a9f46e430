"""The result of reading a mask: its form, and the form in words."""

from __future__ import annotations

from dataclasses import dataclass

import sympy
from sympy.core.function import AppliedUndef
from torch import fx

from graphopt.masks.term import KEY, QUERY, All, AtLeast, Entry, Expr, Known, Not, Some, Truth, Zero


@dataclass(frozen=True)
class MaskForm:
    """Query i sees key j iff all parts hold; a part that is None (or `causal` False) always holds.

    causal:        j <= i + off, off = offset + offset_tensor (a tensor of one element)
    window:        j > i + off - window
    key_padding:   a truth over (batch, key) and leaves; `arguments` builds its [B, K] tensor
    rest:          any other truth, over the whole index; `arguments` builds its tensor
    bias:          a float tensor that is added to the scores where the parts hold
    additive_fill: the finite number that an additive mask holds where they do not: a row without keys is then
                   the mean over all keys, not zeros. None for a bool mask and for -inf.
    note:          why a part (or all) stays a tensor; empty where all was understood
    """

    mask: fx.Node
    sizes: tuple[Expr, Expr, Expr, Expr]  # B, H, Q, K of the scores
    inverted: bool = False  # a bool mask whose True hides, as `masked_fill` takes it
    causal: bool = False
    offset: int | Expr = 0
    offset_tensor: fx.Node | None = None
    window: int | Expr | None = None
    key_padding: Truth | None = None
    rest: Truth | None = None
    bias: Entry | None = None
    additive_fill: float | None = None
    note: str = ""
    leaves: tuple[fx.Node, ...] = ()  # the tensors at which reading stopped

    def leaf(self, name: str) -> fx.Node:
        """The leaf called `name`. Raises KeyError."""
        return {n.name: n for n in self.leaves}[name]

    @property
    def whole(self) -> bool:
        """Whether nothing was understood: the mask itself is the bias."""
        return self.bias is not None and self.bias.node is self.mask


def describe(form: MaskForm) -> str:
    """The form in one line: `causal(offset=s1) & window(4096) & padding[b, j]`; `all keys` for no mask."""
    offset = [str(form.offset)] if form.offset != 0 else []
    offset += [form.offset_tensor.name] if form.offset_tensor is not None else []
    parts = [f"causal(offset={' + '.join(offset)})" if offset else "causal"] if form.causal else []
    parts += [f"window({form.window})"] if form.window is not None else []
    parts += [said(t) for t in (form.key_padding, form.rest) if t is not None]
    text = " & ".join(parts) or "all keys"
    text += f" + {said(form.bias)}" if form.bias is not None else ""
    return text + (f" (hidden: {form.additive_fill})" if form.additive_fill is not None else "")


def said(truth: Truth) -> str:
    """A truth in words: `padding[b, j]`, `(i - j >= 0 | prefix[b, j])`."""
    if isinstance(truth, Known):
        return str(truth.value)
    if isinstance(truth, Entry):
        return f"{truth.node.name}[{', '.join(map(_expr, truth.index))}]"
    if isinstance(truth, AtLeast):
        return f"{_expr(truth.expr)} >= 0"
    if isinstance(truth, Zero):
        return _same(truth.expr) or f"{_expr(truth.expr)} == 0"
    if isinstance(truth, Not):
        return f"not {said(truth.of)}"
    assert isinstance(truth, (All, Some))
    return f"({(' & ' if isinstance(truth, All) else ' | ').join(map(said, truth.of))})"


def _same(expr: Expr) -> str | None:
    """`chunks of 4` for i // 4 == j // 4, `blocks of ids` for ids[b, i] == ids[b, j]; None for another."""
    terms = sympy.Add.make_args(expr)
    bare = [term if term.could_extract_minus_sign() else -term for term in terms]
    if len(terms) != 2 or bare[0] == bare[1]:
        return None
    one, two = (-term for term in bare)
    if {one, two} != {one, one.subs({QUERY: KEY, KEY: QUERY}, simultaneous=True)}:
        return None
    if isinstance(one, sympy.floor):
        return f"chunks of {sympy.fraction(sympy.together(one.args[0]))[1]}"
    return f"blocks of {one.func.__name__}" if isinstance(one, AppliedUndef) else None


def _expr(expr: Expr) -> str:
    return str(expr).replace("_index", "")
