"""Check a form by running it: the mask's graph against the formula, on random leaves and telling sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeAlias

import sympy
import torch
from torch import fx

from graphopt import graph as g
from graphopt.masks import realize
from graphopt.masks.expression import size_expr
from graphopt.masks.form import MaskForm
from graphopt.masks.term import Expr, Unreadable

Point: TypeAlias = "dict[sympy.Symbol, int]"

MAX_STATIC = 2**28  # elements of a mask with static sizes: what every eager forward pays, once
BUDGET = 2**26  # elements over all probe points; a 4096 window is seen at 2 x 4097 x 4097
ONE_DRAW = 2**24  # elements from which on leaves are drawn once
DRAWS = (1, 2, 0)  # seeds; 0 is all zeros, which is possible where random indices are out of range
DENSE = 64  # around literals up to it, three sizes are probed; beyond it L + 1 alone, which holds the others


def disagreement(form: MaskForm, opened: frozenset[fx.Node] = frozenset()) -> str | None:
    """Where the mask and its form differ, as a reason; None where they agree at every probe point.

    opened: nodes that the reading went through; one that it also kept as a leaf somewhere is computed.
    """
    if form.whole:
        return None
    leaves = [n for n in form.leaves if n not in opened]
    nodes = program([form.mask, *(n for n in form.leaves if n in opened)], frozenset(leaves))
    leaves = [n for n in leaves if n is form.mask or not set(nodes).isdisjoint(n.users)]
    points = list(probe_points(form, [*nodes, *leaves]))
    if not points:
        return "no probe point: every choice of sizes is too large or excluded by guards"
    ran, failure = 0, ""
    for point in points:
        elements = _numel(form.mask, point)
        if elements > MAX_STATIC:
            return f"mask of {elements} elements > {MAX_STATIC}: too large to probe"
        for draw in DRAWS:
            try:
                found = compare(form, nodes, leaves, point, draw)
            except Unreadable as e:
                return str(e)
            except (RuntimeError, IndexError, ValueError, TypeError, NotImplementedError) as e:
                failure = str(e).splitlines()[0] if str(e) else type(e).__name__
                continue  # these sizes or leaf values are not possible: an index out of range
            ran += 1
            if found is not None:
                return found
            if len(points) > 1 or elements > ONE_DRAW:
                break
    return None if ran else f"the probe cannot run: {failure}"


def program(ends: Sequence[fx.Node], leaves: frozenset[fx.Node]) -> list[fx.Node]:
    """The nodes that compute `ends` from `leaves` and sizes, in graph order, leaves and sizes excluded."""
    found: set[fx.Node] = set()
    queue = list(ends)
    while queue:
        node = queue.pop()
        if node in found or node in leaves or not g.is_tensor(node):
            continue
        found.add(node)
        queue.extend(node.all_input_nodes)
    return [n for n in ends[0].graph.nodes if n in found]


# --------------------------------------------------------------------------------------------- running


def compare(
    form: MaskForm, nodes: Sequence[fx.Node], leaves: Sequence[fx.Node], point: Point, draw: int
) -> str | None:
    """The first place where mask and formula differ at one point and one draw of leaves."""
    generator = torch.Generator().manual_seed(draw)
    values = {n: random_leaf(n, point, draw, generator) for n in leaves}
    run(nodes, values, point, frozenset([form.mask, *form.leaves]))
    want = ~values[form.mask] if form.inverted else values[form.mask]
    got = formula(form, values, point).to(want.dtype)
    sizes = [_at(s, point) for s in form.sizes]
    differ = (want != got).expand(sizes)
    if not differ.any():
        return None
    place = tuple(int(x) for x in differ.nonzero()[0])
    return f"probe disagrees at (b, h, i, j) = {place}" + (f" with {point}" if point else "")


def run(
    nodes: Sequence[fx.Node], values: dict[fx.Node, torch.Tensor], point: Point, kept: frozenset[fx.Node]
) -> None:
    """Execute nodes on CPU; sizes come from the point, not from the graph's own size arithmetic."""
    last = {n: node for node in nodes for n in node.all_input_nodes}

    def argument(a: g.Argument) -> g.Argument:
        if isinstance(a, fx.Node):
            return values[a] if g.is_tensor(a) else _at(size_expr(a), point)
        return torch.device("cpu") if isinstance(a, torch.device) else a

    for node in nodes:
        if node.op == "get_attr":
            values[node] = getattr(node.graph.owning_module, str(node.target)).cpu()
            continue
        args = fx.node.map_aggregate(node.args, argument)
        kwargs = {k: v for k, v in node.kwargs.items() if k != "pin_memory"}
        values[node] = node.target(*args, **fx.node.map_aggregate(kwargs, argument))  # type: ignore[operator]
        for n in node.all_input_nodes:
            if last[n] is node and n not in kept:
                values.pop(n, None)  # a mask of 2^28 elements should not be there ten times


def formula(form: MaskForm, values: dict[fx.Node, torch.Tensor], point: Point) -> torch.Tensor:
    """The form's own definition, dense: [B|1, H|1, Q, K]."""
    maker = realize.Maker(
        form,
        torch.device("cpu"),
        call=lambda target, *args, **kwargs: target(*args, **kwargs),
        tensor=values.__getitem__,
        size=lambda e: _at(e, point),
    )
    q, k = _at(form.sizes[2], point), _at(form.sizes[3], point)
    i, j = torch.arange(q)[:, None], torch.arange(k)
    offset = torch.tensor(_at(sympy.sympify(form.offset), point))
    if form.offset_tensor is not None:
        offset = offset + values[form.offset_tensor].reshape(())
    keep = torch.ones(1, 1, q, k, dtype=torch.bool)
    if form.causal:
        keep = keep & (j <= i + offset)
    if form.window is not None:
        keep = keep & (j > i + offset - _at(sympy.sympify(form.window), point))
    padding = realize.key_padding(form, maker)
    if isinstance(padding, torch.Tensor):
        keep = keep & padding[:, None, None, :]
    tensor = realize.bias(form, maker)
    if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.bool:
        keep = keep & tensor
    dtype = g.dtype(form.mask)
    if dtype == torch.bool:
        return keep
    fill = float("-inf") if form.additive_fill is None else form.additive_fill
    added = torch.zeros(keep.shape, dtype=dtype).masked_fill(~keep, fill)
    return added + tensor if isinstance(tensor, torch.Tensor) and tensor.dtype != torch.bool else added


def random_leaf(node: fx.Node, point: Point, draw: int, generator: torch.Generator) -> torch.Tensor:
    """A leaf's values: all zeros (draw 0), or coin flips (bool), small numbers (int), normal ones (float)."""
    sizes = [_at(size_expr(s), point) for s in g.shape(node)]
    dtype = g.dtype(node)
    if draw == 0:
        return torch.zeros(sizes, dtype=dtype)
    if dtype.is_floating_point:
        return torch.randn(sizes, generator=generator).to(dtype)
    numbers = 2 if dtype == torch.bool else 3 if sizes else 6
    return torch.randint(numbers, sizes, generator=generator, dtype=torch.uint8).to(dtype)


def _at(expr: Expr, point: Point) -> int:
    return int(expr.subs(point))


def _numel(node: fx.Node, point: Point) -> int:
    return int(sympy.prod(_at(size_expr(s), point) for s in g.shape(node)))


# ----------------------------------------------------------------------------------------- probe points


def probe_points(form: MaskForm, nodes: Sequence[fx.Node]) -> Iterator[Point]:
    """Sizes to run at: nothing to choose where all are static, else around every literal, cheapest first."""
    symbols = symbols_of(form, nodes)
    if not symbols:
        yield {}
        return
    names = sorted(symbols, key=str)
    base = {s: symbols[s][0] + 1 + 2 * n for n, s in enumerate(names)}  # all different
    least = {s: max(low, 1) for s, (low, _) in symbols.items()}
    candidates = [base, {s: v for s in names if (v := symbols[s][1]) is not None}]
    for size in probe_sizes(nodes):
        candidates.append({s: max(size, symbols[s][0]) for s in names})
        candidates += [{**(base if size <= DENSE else least), s: max(size, symbols[s][0])} for s in names]
    possible = [p for p in candidates if len(p) == len(names) and allowed(p, nodes)]
    spent = 0
    for point in sorted({tuple(p.items()): p for p in possible}.values(), key=lambda p: _numel(form.mask, p)):
        spent += _numel(form.mask, point)
        if spent > BUDGET:
            return
        yield point


def probe_sizes(nodes: Sequence[fx.Node]) -> list[int]:
    """L - 1, L, L + 1 for every literal L in the arguments of the nodes."""
    calls = [n for n in nodes if n.op == "call_function"]
    literals = {abs(a) for n in calls for a in g.flat_arguments(n) if type(a) is int}
    near = {5} | {x + 1 for x in literals} | {s for x in literals if x <= DENSE for s in (x - 1, x)}
    return sorted(s for s in near if s <= BUDGET)


def symbols_of(form: MaskForm, nodes: Sequence[fx.Node]) -> dict[sympy.Symbol, tuple[int, int | None]]:
    """The free sizes of a mask, each with its least value and its size in the captured example if known."""
    found: dict[sympy.Symbol, tuple[int, int | None]] = {}
    for size in _symbolic_sizes(nodes):
        for symbol in size.node.expr.free_symbols:
            low, hint = found.get(symbol, (_low(size, symbol), None))
            if size.node.expr == symbol and size.node.has_hint():
                hint = int(size.node.hint)
            found[symbol] = low, hint
    for expr in form.sizes:
        for symbol in expr.free_symbols:
            found.setdefault(symbol, (2, None))
    return found


def _symbolic_sizes(nodes: Sequence[fx.Node]) -> Iterator[torch.SymInt]:
    for node in nodes:
        for n in (node, *node.all_input_nodes):
            if g.is_tensor(n):
                yield from (s for s in g.shape(n) if isinstance(s, torch.SymInt))
            elif isinstance(value := g.val(n), torch.SymInt):
                yield value


def _low(size: torch.SymInt, symbol: sympy.Symbol) -> int:
    bounds = size.node.shape_env.var_to_range.get(symbol)
    return max(int(bounds.lower), 0) if bounds is not None and bounds.lower.is_Integer else 2


def allowed(point: Point, nodes: Sequence[fx.Node]) -> bool:
    """Whether sizes are possible: within their ranges, true to the captured guards, no dimension negative."""
    shapes = [size_expr(s) for n in nodes if g.is_tensor(n) for s in g.shape(n)]
    if any(s.subs(point).is_negative for s in shapes):
        return False
    environment = next((s.node.shape_env for s in _symbolic_sizes(nodes)), None)
    if environment is None:
        return True
    ranges = environment.var_to_range
    if any(s in ranges and not ranges[s].lower <= v <= ranges[s].upper for s, v in point.items()):
        return False
    return all(guard.expr.subs(point) is not sympy.false for guard in environment.guards)
