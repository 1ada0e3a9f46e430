"""Find arithmetic in half precision in Triton source, by `ast`: the interpreter is silently wrong for bf16.

A value is *raw* from where it is loaded, or cast to a dtype that may be half, until it is cast to a wide one.
Raw values may be moved, selected, stored and multiplied by `tl.dot`; anything else is found.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

WIDE = frozenset(
    {"tl.float32", "tl.float64", "tl.int1"}
    | {f"tl.{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)}
)
# What only moves elements. tl.where chooses between its last two.
MOVES = frozenset(
    {"trans", "permute", "reshape", "view", "ravel", "broadcast_to", "expand_dims", "flip"}
    | {"join", "cat", "split", "interleave", "where"}
)
NEVER = frozenset({"libdevice", "inline_asm_elementwise", "inline_asm"})


@dataclass
class Function:
    """A jit function, and what is known of its raw values.

    Attributes:
        raw_parameters: parameters that some caller passes a raw value.
        returns_raw: whether it may return one.
    """

    node: ast.FunctionDef
    file: str
    raw_parameters: set[str] = field(default_factory=set)
    returns_raw: bool = False


def jit_functions(trees: Mapping[str, ast.Module]) -> dict[str, Function]:
    """Name -> every function under `triton.jit`, of all files."""
    return {
        node.name: Function(node, file)
        for file, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef) and any("jit" in ast.unparse(d) for d in node.decorator_list)
    }


def findings(trees: Mapping[str, ast.Module]) -> list[str]:
    """What is wrong in the jit functions of some files, with its place. Calls among them are followed."""
    functions = jit_functions(trees)
    while True:
        before = {name: (set(f.raw_parameters), f.returns_raw) for name, f in functions.items()}
        found = [text for f in functions.values() for text in Walk(f, functions).run()]
        if before == {name: (f.raw_parameters, f.returns_raw) for name, f in functions.items()}:
            return sorted({*found, *_forbidden(trees)})


def _forbidden(trees: Mapping[str, ast.Module]) -> Iterator[str]:
    """Uses of what the interpreter does not have."""
    for file, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                words = {w for a in node.names for w in a.name.split(".")}
                words |= set((getattr(node, "module", None) or "").split("."))
            else:
                words = {getattr(node, "attr", None) or getattr(node, "id", None) or ""}
            for word in sorted(words & NEVER):
                yield f"{file}:{node.lineno}: {word}: the interpreter has none"  # type: ignore[attr-defined]


class Walk:
    """One function's statements in order, with the names that hold raw values."""

    def __init__(self, function: Function, functions: Mapping[str, Function]) -> None:
        self.function = function
        self.functions = functions
        self.raw = set(function.raw_parameters)
        self.found: list[str] = []

    def run(self) -> list[str]:
        """The findings; what callers need to know is kept in the function."""
        self.block(self.function.node.body)
        return self.found

    def block(self, body: Sequence[ast.stmt]) -> None:
        for statement in body:
            self.statement(statement)

    def statement(self, s: ast.stmt) -> None:
        if isinstance(s, ast.Assign):
            for target in s.targets:
                self.assign(target, s.value)
        elif isinstance(s, ast.AnnAssign) and s.value is not None:
            self.assign(s.target, s.value)
        elif isinstance(s, ast.AugAssign):
            self.wide(s.target, s)
            self.wide(s.value, s)
        elif isinstance(s, ast.Return) and s.value is not None:
            self.function.returns_raw |= any(self.is_raw(part) for part in parts(s.value))
        elif isinstance(s, ast.If):
            self.wide(s.test, s)
            before = set(self.raw)
            self.block(s.body)
            after, self.raw = self.raw, before
            self.block(s.orelse)
            self.raw |= after
        elif isinstance(s, ast.For | ast.While):
            if isinstance(s, ast.While):
                self.wide(s.test, s)
            for _ in range(2):  # what the body leaves raw is raw when it starts again
                before = set(self.raw)
                self.block(s.body)
                self.raw |= before
        elif isinstance(s, ast.With):
            self.block(s.body)
        elif isinstance(s, ast.Expr):
            self.is_raw(s.value)

    def assign(self, target: ast.expr, value: ast.expr) -> None:
        if isinstance(target, ast.Tuple):
            values = value.elts if isinstance(value, ast.Tuple) else [value] * len(target.elts)
            kinds = [self.is_raw(v) for v in values]
            for one, raw in zip(target.elts, kinds, strict=True):
                self.mark(one, raw)
        else:
            self.mark(target, self.is_raw(value))

    def mark(self, target: ast.expr, raw: bool) -> None:
        if isinstance(target, ast.Name):
            (self.raw.add if raw else self.raw.discard)(target.id)

    # ------------------------------------------------------------------------------------- expressions

    def is_raw(self, e: ast.expr) -> bool:
        """Whether an expression's value is raw; on the way, what is wrong inside it is found."""
        if isinstance(e, ast.Name):
            return e.id in self.raw
        if isinstance(e, ast.Call):
            return self.call(e)
        if isinstance(e, ast.Attribute):
            # Of x.T the values; x.dtype and x.shape are no values of x.
            return e.attr == "T" and self.is_raw(e.value)
        if isinstance(e, ast.Subscript):
            return self.is_raw(e.value)
        if isinstance(e, ast.Compare) and _is_mask(e):
            self.is_raw(e.left)
            return False
        if isinstance(e, ast.IfExp):
            self.wide(e.test, e)
            return bool(self.is_raw(e.body) | self.is_raw(e.orelse))
        if isinstance(e, ast.Tuple | ast.List):
            return bool(sum(self.is_raw(part) for part in e.elts))
        for child in ast.iter_child_nodes(e):
            if isinstance(child, ast.expr):
                self.wide(child, e)
        return False

    def call(self, e: ast.Call) -> bool:
        called = ast.unparse(e.func)
        _, _, last = called.rpartition(".")
        values = [*e.args, *(k.value for k in e.keywords)]
        holder = e.func.value if isinstance(e.func, ast.Attribute) else None
        of_tl = re.fullmatch(r"tl(\.\w+)+", called) is not None
        if last == "to" and holder is not None:
            self.is_raw(holder)
            return ast.unparse(e.args[0]) not in WIDE
        if last in ("load", "load_tensor_descriptor"):  # a pointer, or a descriptor's own
            for v in values:
                self.wide(v, e)
            return True
        if last == "dot" and of_tl:
            for v in e.args[:2]:
                self.is_raw(v)
            for v in [*e.args[2:], *(k.value for k in e.keywords)]:
                self.wide(v, e)
            return False
        if last == "store":
            for v in values:
                self.is_raw(v)
            return False
        if last in MOVES:
            moved = [holder] if holder is not None and not of_tl else []
            kinds = [self.is_raw(v) for v in [*moved, *values]]
            return any(kinds)
        if called in self.functions:
            return self.local(e, self.functions[called])
        for v in values:
            self.wide(v, e)
        if holder is not None and not of_tl:
            self.wide(holder, e)
        return False

    def local(self, e: ast.Call, callee: Function) -> bool:
        """A call of another jit function: raw arguments are its affair."""
        names = [a.arg for a in callee.node.args.args]
        for name, value in [*zip(names, e.args, strict=False), *((k.arg, k.value) for k in e.keywords)]:
            if self.is_raw(value) and name is not None:
                callee.raw_parameters.add(name)
        return callee.returns_raw

    def wide(self, e: ast.expr, where: ast.AST) -> None:
        """Find an expression that must not be raw and is."""
        if self.is_raw(e):
            place = f"{self.function.file}:{where.lineno}"  # type: ignore[attr-defined]  # a statement or expression
            self.found.append(
                f"{place}: {self.function.node.name} computes on {ast.unparse(e)} as it was loaded; "
                "cast it first, .to(tl.float32)"
            )


def _is_mask(e: ast.Compare) -> bool:
    """`x != 0` with an int 0: how a stored mask is read, whatever its dtype."""
    other = e.comparators[0]
    plain = len(e.ops) == 1 and isinstance(e.ops[0], ast.Eq | ast.NotEq)
    return plain and isinstance(other, ast.Constant) and other.value == 0 and type(other.value) is int


def parts(e: ast.expr) -> list[ast.expr]:
    """The elements of a tuple, or the expression."""
    return list(e.elts) if isinstance(e, ast.Tuple) else [e]
