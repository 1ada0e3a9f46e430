"""No Triton kernel computes in half precision before an upcast, and none uses what the interpreter lacks."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.triton_lint import findings, jit_functions

ROOT = Path(__file__).resolve().parent.parent
FILES = (*sorted((ROOT / "kernels").glob("*_triton.py")), *sorted((ROOT / "graphopt").glob("triton_*.py")))


def tree_of(body: str, head: str = "x_ptr, y_ptr, i, m") -> dict[str, ast.Module]:
    indented = "\n".join(f"    {line}" for line in body.splitlines())
    return {"k.py": ast.parse(f"@triton.jit\ndef _k({head}):\n{indented}\n")}


def test_kernels_upcast_before_they_compute() -> None:
    trees = {str(p.relative_to(ROOT)): ast.parse(p.read_text()) for p in FILES}
    assert jit_functions(trees), "no jit function found"
    found = findings(trees)
    assert not found, "\n".join(found)


def test_every_file_with_a_jit_function_is_looked_at() -> None:
    shipped = [
        p for folder in ("graphopt", "kernels", "patterns", "lowering") for p in (ROOT / folder).rglob("*.py")
    ]
    with_jit = {p.resolve() for p in shipped if "@triton.jit" in p.read_text()}
    assert with_jit <= {p.resolve() for p in FILES}, "name a file of Triton code triton_*.py or *_triton.py"


BAD = {
    "a sum": "x = tl.load(x_ptr + i)\ny = x + 1.0",
    "a product in one expression": "y = tl.load(x_ptr + i) * 2.0",
    "a reduction": "y = tl.sum(tl.load(x_ptr + i), 0)",
    "an exponential": "y = tl.exp(tl.load(x_ptr + i))",
    "a method": "y = tl.load(x_ptr + i).sum(0)",
    "a comparison": "y = tl.load(x_ptr + i) > 0",
    "a comparison with a float": "y = tl.load(x_ptr + i) == 0.0",
    "a sum compared": "y = (tl.load(x_ptr + i) + 1.0) != 0",
    "a negative": "y = -tl.load(x_ptr + i)",
    "in place": "acc = tl.zeros((8,), tl.float32)\nacc += tl.load(x_ptr + i)",
    "cast to half": "x = tl.load(x_ptr + i).to(tl.float32)\ny = x.to(y_ptr.dtype.element_ty) * 2.0",
    "cast to bf16": "x = tl.load(x_ptr + i).to(tl.bfloat16)\ny = x * x",
    "a chosen value": "x = tl.where(m, tl.load(x_ptr + i), 0.0)\ny = x * x",
    "after a move": "x = tl.load(x_ptr + i).T\ny = tl.maximum(x, 0.0)",
    "one branch": "x = tl.load(x_ptr + i)\nif m:\n    x = x.to(tl.float32)\ny = x + 1.0",
    "around a loop": (
        "x = tl.zeros((8,), tl.float32)\nfor j in range(4):\n    y = x + 1.0\n    x = tl.load(x_ptr + j)"
    ),
    "an accumulator": "y = tl.dot(a, b, tl.load(x_ptr + i))",
    "a tuple": "a, b = tl.load(x_ptr + i), 1.0\ny = a * b",
    "two halves": "a, b = tl.split(tl.load(x_ptr + i))\ny = a * 2.0",
    "a descriptor": "y = x_desc.load([0, 0]) * 2.0",
    "an address": "y = tl.load(x_ptr + tl.load(y_ptr + i))",
    "a condition": "if tl.load(x_ptr + i):\n    y = 1",
    "asm": "y = tl.inline_asm_elementwise('', '', [], tl.int32, True, 1)",
    "libdevice": "y = libdevice.tanh(i)",
}
GOOD = {
    "at once": "y = tl.load(x_ptr + i).to(tl.float32) * 2.0",
    "at first use": "x = tl.load(x_ptr + i)\nx = x.to(tl.float32)\ny = x * x",
    "both branches": ("if m:\n    x = tl.load(x_ptr + i).to(tl.float32)\nelse:\n    x = 0.0\ny = x + 1.0"),
    "a copy": "tl.store(y_ptr + i, tl.load(x_ptr + i))",
    "a chosen copy": "tl.store(y_ptr + i, tl.where(m, tl.load(x_ptr + i), 0.0))",
    "dot": "a = tl.load(x_ptr + i)\nb = tl.load(y_ptr + i)\ny = tl.dot(a, b.T, i, input_precision='ieee')",
    "dot after moves": "a = tl.reshape(tl.load(x_ptr), (16, 16))\ny = tl.dot(a.to(tl.float16), tl.trans(a))",
    "an index": "y = tl.load(x_ptr + tl.load(y_ptr + i).to(tl.int64)).to(tl.float32)",
    "a stored mask": "keep = tl.load(y_ptr + i) != 0\ny = tl.where(keep & m, 1.0, 0.0)",
    "a mask": "keep = tl.load(y_ptr + i).to(tl.int1)\ny = tl.where(keep & m, 1.0, 0.0)",
    "rounded on the way": "x = i * 2.0\ny = x.to(y_ptr.dtype.element_ty).to(tl.float32) * 2.0",
    "its dtype": "x = tl.load(x_ptr + i)\ntl.store(y_ptr + i, i.to(x.dtype))",
    "rounded and stored": "x = i * 2.0\ntl.store(y_ptr + i, x.to(y_ptr.dtype.element_ty), mask=m)",
}


@pytest.mark.parametrize("name", BAD)
def test_arithmetic_on_a_loaded_value_is_found(name: str) -> None:
    found = findings(tree_of(BAD[name]))
    assert len(found) == 1 and found[0].startswith("k.py:"), found


@pytest.mark.parametrize("name", GOOD)
def test_what_is_right_is_let_pass(name: str) -> None:
    assert findings(tree_of(GOOD[name])) == []


def test_imports_of_libdevice_are_found() -> None:
    for text in (
        "from triton.language.extra import libdevice",
        "import triton.language.extra.libdevice as m",
        "from triton.language.extra.libdevice import tanh",
    ):
        assert findings({"k.py": ast.parse(text)}) == ["k.py:1: libdevice: the interpreter has none"]


def test_values_are_followed_into_and_out_of_other_functions() -> None:
    text = """
@triton.jit
def twice(x):
    return x + x

@triton.jit
def loaded(p):
    return tl.load(p)

@triton.jit(do_not_specialize=["n"])
def _k(x_ptr, y_ptr, n):
    a = twice(tl.load(x_ptr))
    b = loaded(y_ptr) * 2.0
    c = loaded(y_ptr).to(tl.float32) * 2.0
"""
    found = findings({"k.py": ast.parse(text)})
    assert [f.split(" as it")[0] for f in found] == [
        "k.py:13: _k computes on loaded(y_ptr)",
        "k.py:4: twice computes on x",
    ]
    wide = text.replace("twice(tl.load(x_ptr))", "twice(tl.load(x_ptr).to(tl.float32))")
    assert len(findings({"k.py": ast.parse(wide)})) == 1


def test_ordinary_functions_are_not_looked_at() -> None:
    assert findings({"k.py": ast.parse("def f(x):\n    return tl.load(x) + 1")}) == []
