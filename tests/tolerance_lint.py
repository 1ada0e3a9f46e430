"""Where a test judges numbers by a literal: tolerances come from tests/tolerances.py, by name."""

from __future__ import annotations

import ast
from collections.abc import Iterator

HOME = "tests.tolerances"
# As torch, numpy and pytest call what may be missed; without a keyword it is the third argument or later.
KEYWORDS = frozenset({"rtol", "atol", "rel"})
CLOSENESS = {"allclose": 2, "isclose": 2, "assert_close": 2, "assert_allclose": 2, "approx": 1}
# Above a number like these, a limit is no rounding error: shares of bytes, probabilities of a random mask.
SMALL = 0.1
# What is so near to 1 is the least similarity of two results.
SIMILAR = 0.99


def own_tolerances(tree: ast.Module, name: str) -> list[str]:
    """Literals given as rtol or atol, and small ones that a result has to stay below, directly or by name."""
    if name == HOME:
        return []
    named = small_names(tree)
    wrong = {}
    for node in ast.walk(tree):
        limits = asked(node) if isinstance(node, ast.Call) else ()
        for limit in limits:
            if any(literals(limit)) or names(limit) & named:
                wrong[limit.lineno] = "judges by its own tolerance"
        for limit in compared(node) if isinstance(node, ast.Compare) else ():
            if any(map(judges, literals(limit))) or names(limit) & named:
                wrong[limit.lineno] = "compares with its own tolerance"
    return [f"{name}:{line} {what}; name it in tests/tolerances.py" for line, what in sorted(wrong.items())]


def asked(call: ast.Call) -> Iterator[ast.expr]:
    """What a call says may be missed."""
    yield from (k.value for k in call.keywords if k.arg in KEYWORDS)
    for spread in (k.value for k in call.keywords if k.arg is None and isinstance(k.value, ast.Dict)):
        for key, value in zip(spread.keys, spread.values, strict=True):  # type: ignore[attr-defined]  # a Dict
            if isinstance(key, ast.Constant) and key.value in KEYWORDS:
                yield value
    function = getattr(call.func, "attr", getattr(call.func, "id", ""))
    if function in CLOSENESS:
        yield from (a for a in call.args[CLOSENESS[function] :] if not isinstance(a, ast.Starred))


def compared(comparison: ast.Compare) -> Iterator[ast.expr]:
    """What something has to stay below; of a similarity, what it has to reach."""
    sides = [comparison.left, *comparison.comparators]
    for left, operator, right in zip(sides, comparison.ops, sides[1:], strict=False):
        if isinstance(operator, ast.Lt | ast.LtE):
            yield right
        elif isinstance(operator, ast.Gt | ast.GtE):
            yield left
            if any(SIMILAR <= value < 1 for value in literals(right)):
                yield right


def literals(expression: ast.expr) -> Iterator[float]:
    """The numbers in an expression, without 0 and without those that say which: `x[1]`, `sum(x, 1)`."""
    value = getattr(expression, "value", None)
    if isinstance(expression, ast.Constant) and isinstance(value, int | float) and value:
        yield float(value)
    elif isinstance(expression, ast.BinOp | ast.UnaryOp | ast.IfExp | ast.Dict | ast.Tuple):
        for part in ast.iter_child_nodes(expression):
            if isinstance(part, ast.expr):
                yield from literals(part)


def judges(value: float) -> bool:
    """Whether a number that something is compared with is a tolerance by its size."""
    return 0 < value < SMALL or SIMILAR <= value < 1


def names(expression: ast.expr) -> set[str]:
    """The names that an expression reads."""
    return {n.id for n in ast.walk(expression) if isinstance(n, ast.Name)}


def small_names(tree: ast.Module) -> set[str]:
    """The names that a file gives to small literals: `CLOSE = 1e-4`, `atol = 1e-5 if precise else 0.05`."""
    found = set()
    for node in ast.walk(tree):
        value = node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None
        if value is None or not any(map(judges, literals(value))):
            continue
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]  # type: ignore[attr-defined]  # known to be there
        found |= {t.id for t in targets if isinstance(t, ast.Name)}
    return found
