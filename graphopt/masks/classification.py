"""What a mask means: `causal & window & key_padding & rest`, read from the graph, then run to check."""

from __future__ import annotations

from collections.abc import MutableMapping, Sequence
from dataclasses import replace
from typing import TypeAlias

import sympy
import torch
from torch import fx

from graphopt import graph as g
from graphopt.masks import probe
from graphopt.masks.expression import Reading, coordinates, size_expr
from graphopt.masks.form import MaskForm, said
from graphopt.masks.spellings import RULES
from graphopt.masks.term import (
    AXES,
    BATCH,
    FALSE,
    KEY,
    QUERY,
    AtLeast,
    Choice,
    Entry,
    Expr,
    Known,
    Space,
    Sum,
    Truth,
    Unreadable,
    Value,
    all_of,
    as_float,
    axes_of,
    coefficient,
    conjuncts,
    either,
    elements,
    is_truth,
    literal,
    negate,
    rounded,
)

Results: TypeAlias = "MutableMapping[tuple[fx.Node, tuple[Expr, ...], bool], MaskForm | str]"

FILL = -1e9  # in fp32 its spacing is 64: added to it, scores vanish, and a row without keys becomes a mean


def classify(
    mask: fx.Node, sizes: Sequence[g.Size], known: Results | None = None, *, inverted: bool = False
) -> MaskForm | str:
    """The form of a mask that is broadcast to scores of sizes (B, H, Q, K), or why it has none.

    mask: rank <= 4; bool (True keeps) or float (added: 0 keeps; -inf, finfo.min or below -1e9 drops).
    known: results so far; pass one dict for all layers, then a mask that they share is read once.
    inverted: a bool mask whose True hides, as `masked_fill(scores, mask, -inf)` takes it.
    A caller that gets a reason keeps the mask as the tensor that it is.
    """
    key = (mask, tuple(size_expr(s) for s in sizes), inverted)
    if known is None:
        known = {}
    if key not in known:
        b, h, q, k = key[1]
        known[key] = _classified(MaskForm(mask, (b, h, q, k), inverted))
    return known[key]


def _classified(empty: MaskForm) -> MaskForm | str:
    mask, space = empty.mask, Space(empty.sizes)
    reason = unfit(empty)
    if reason is not None:
        return reason
    reading = Reading(space, RULES)
    try:
        value = reading.at(mask, coordinates(g.rank(mask)))
    except Unreadable as e:
        return str(e)
    form = form_of(value, replace(empty, leaves=tuple(reading.leaves.values())), space)
    if isinstance(form, str):
        return form
    return probe.disagreement(form, frozenset(reading.opened)) or form


def unfit(form: MaskForm) -> str | None:
    """Why a tensor can be no mask of these scores."""
    mask, dtype = form.mask, g.dtype(form.mask)
    if form.inverted and dtype != torch.bool:
        return f"mask dtype {dtype} is not bool, so it cannot be inverted"
    if dtype != torch.bool and not dtype.is_floating_point:
        return f"mask dtype {dtype} is neither bool nor float"
    if g.rank(mask) > 4:
        return f"mask rank {g.rank(mask)} > 4"
    wanted = form.sizes[4 - g.rank(mask) :]
    for d, (size, want) in enumerate(zip(g.shape(mask), wanted, strict=True)):
        if g.expression(size) not in (1, want):
            return f"mask dimension {d} is {size}, neither 1 nor {want}"
    return None


# ---------------------------------------------------------------------------------------- additive masks


def form_of(value: Value, empty: MaskForm, space: Space) -> MaskForm | str:
    """Sort a value into the parts of a form; what none can say becomes `rest`, or all stays as bias."""
    if is_truth(value):
        keep: Truth = value  # type: ignore[assignment]  # is_truth
        return sorted_form(negate(keep) if empty.inverted else keep, empty, space)
    whole = Entry(empty.mask, coordinates(g.rank(empty.mask)))
    if isinstance(value, Entry):
        return replace(empty, bias=value, note="a float tensor")
    cases, leaf = (value.cases, value.leaf) if isinstance(value, Sum) else (value, None)
    fill = fill_of(cases, g.dtype(empty.mask))
    if isinstance(fill, str):
        return replace(empty, bias=whole, note=fill)
    form = sorted_form(kept(cases), replace(empty, additive_fill=fill), space)
    if isinstance(form, str) or leaf is None:
        return form
    if fill is not None:  # where the bias hides too, keys hidden by either compete in empty rows
        return replace(empty, bias=whole, note=f"adds {said(leaf)} to a mask that hides by {fill}")
    if form.rest is not None:  # one tensor can carry both, and it is there already
        return replace(empty, bias=whole, note=f"a bias and {form.note}")
    return replace(form, bias=leaf, note=f"adds {said(leaf)}")


def fill_of(value: Value, dtype: torch.dtype) -> float | str | None:
    """The finite number of an additive mask's dropped places, None for -inf, or (text) why it is no mask."""
    numbers = _literals(value)
    if None in numbers:
        return "adds numbers that are no literals"
    drops = {rounded(v, dtype) for v in numbers if v is not None} - {0.0}
    for v in sorted(drops):
        if not (v <= FILL or v == torch.finfo(dtype).min):
            return f"adds {v}, which is neither 0, -inf, finfo.min nor below {FILL}"
    if len(drops) > 1:
        return f"adds {min(drops)} here and {max(drops)} there: rows without keys differ"
    return next((v for v in drops if v != float("-inf")), None)


def _literals(value: Value) -> list[float | None]:
    if isinstance(value, Choice):
        return _literals(value.then) + _literals(value.other)
    return [as_float(value)]


def kept(value: Value) -> Truth:
    """Where an additive mask of literals is 0."""
    if isinstance(value, Choice):
        return either(value.when, kept(value.then), kept(value.other))
    return Known(value == literal(0))


# ----------------------------------------------------------------------------------------------- sorting


def sorted_form(keep: Truth, empty: MaskForm, space: Space) -> MaskForm | str:
    """Sort the conjuncts of a truth: causal first, because the window is measured from its offset."""
    if keep == FALSE:
        return "the mask hides every key"
    form, terms = empty, list(conjuncts(keep))
    causal = _least([(t, edge(t, -1, space)) for t in terms if offset_of(t, form, space) is not None])
    if causal is not None:
        terms.remove(causal[0])
        offset, tensor = offset_of(causal[0], form, space) or (0, None)
        form = replace(form, causal=True, offset=offset, offset_tensor=tensor)
    window = _least([(t, width(t, causal[1] if causal else sympy.Integer(0), space)) for t in terms])
    if window is not None and (causal is not None or space.sizes[2] != 1):
        terms.remove(window[0])
        form = replace(form, window=_plain(window[1]))
    padding = [t for t in terms if axes_of(t) <= {BATCH, KEY}]
    rest = [t for t in terms if t not in padding]
    return replace(
        form,
        key_padding=all_of(*padding) if padding else None,
        rest=all_of(*rest) if rest else None,
        note=f"a tensor for {' & '.join(map(said, rest))}" if rest else "",
    )


def _least(bounds: Sequence[tuple[Truth, Expr | None]]) -> tuple[Truth, Expr] | None:
    """The least of the bounds that are there; those that cannot be compared with the first do not count."""
    best: tuple[Truth, Expr] | None = None
    for term, bound in bounds:
        if bound is not None and (best is None or (bound - best[1]).is_negative):
            best = (term, bound)
    return best


def edge(term: Truth, sign: int, space: Space) -> Expr | None:
    """c where the term says `j <= i + c` (sign -1) or `j >= i - c` (sign 1); None where it says neither.

    With one query, i is 0 and does not occur.
    """
    if not isinstance(term, AtLeast) or coefficient(term.expr, KEY) != sign:
        return None
    of_query = coefficient(term.expr, QUERY)
    if of_query != -sign and not (of_query == 0 and space.sizes[2] == 1):
        return None
    c = sympy.expand(term.expr - sign * KEY - of_query * QUERY)
    return None if c.free_symbols & set(AXES) else c


def offset_of(term: Truth, form: MaskForm, space: Space) -> tuple[int | Expr, fx.Node | None] | None:
    """(sizes, tensor) whose sum is the offset of a causal term; None for other terms and for other sums."""
    c = edge(term, -1, space)
    if c is None:
        return None
    read = list(elements(c))
    if not read:
        return _plain(c), None
    node = form.leaf(read[0].func.__name__)
    sizes = sympy.expand(c - read[0])
    if elements(sizes) or any(g.expression(s) != 1 for s in g.shape(node)):
        return None
    return _plain(sizes), node


def width(term: Truth, off: Expr, space: Space) -> Expr | None:
    """w where the term says `j > i + off - w`, w a number from 1 or an expression of sizes; else None."""
    c = edge(term, 1, space)
    if c is None:
        return None
    w = sympy.expand(off + c + 1)
    return None if elements(w) or w.is_nonpositive else w


def _plain(expr: Expr) -> int | Expr:
    return int(expr) if expr.is_number else expr
