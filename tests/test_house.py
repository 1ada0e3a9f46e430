"""The house's rules, read off the source by `ast`: import arrows, tables, first lines, private torch."""

import ast
from pathlib import Path

import pytest

from tests.house_checks import (
    FOLDERS,
    ROOMS,
    ROOT,
    SHIPPED,
    Check,
    abstract_values,
    chains,
    class_names,
    first_line,
    hugging_face_imports,
    model_names,
    module_name,
    module_paths,
    prints,
    private_torch,
    sources,
    wrong_arrows,
)
from tests.tolerance_lint import own_tolerances

CHECKS: dict[Check, tuple[str, ...]] = {
    wrong_arrows: SHIPPED,
    hugging_face_imports: SHIPPED,
    private_torch: SHIPPED,
    prints: (*SHIPPED, "tests"),
    model_names: SHIPPED,
    module_paths: SHIPPED,
    class_names: SHIPPED,
    abstract_values: SHIPPED,
    first_line: FOLDERS,
    own_tolerances: ("tests", "bench"),
}

# Each check, a file that it must reject and one that it must let pass.
SNIPPETS = {
    wrong_arrows: (
        ("graphopt.ops.norm", "from graphopt.passes import canonicalize"),
        ("graphopt.match", "import graphopt.api"),
        ("graphopt.match", "from graphopt import optimize"),
        ("graphopt.rule", "def f():\n    from graphopt.passes.merge import Merge"),
        ("graphopt.patterns.norm", "from graphopt.kernels import rms_norm"),
        ("graphopt.lowering.select", "from graphopt import kernels"),
        ("graphopt.lowering.select", "import kernels.rms_norm"),
        ("graphopt.api", "from graphopt.tools.diff import diff"),
        ("graphopt.tools.diff", "from tests.helpers import f"),
        ("graphopt.ops.norm", "from ..passes import canonicalize"),
        (
            "graphopt.ops.norm",
            "import typing\nif typing:\n    pass\nelse:\n    from graphopt import defaults",
        ),
    ),
    hugging_face_imports: (
        ("graphopt.api", "import transformers"),
        ("graphopt.api", "def f():\n    from transformers.models.llama import x"),
    ),
    private_torch: (
        ("graphopt.capture", "import torch\ntorch._dynamo.reset()"),
        ("graphopt.capture", "from torch import _guards"),
        ("graphopt.capture", "from torch._subclasses import FakeTensorMode"),
        ("graphopt.capture", "import torch.fx.experimental.proxy_tensor as p"),
        ("graphopt.capture", "from torch import fx\nfx.experimental.proxy_tensor.make_fx"),
        ("graphopt.capture", "from torch.utils import _pytree"),
        ("graphopt.rule", "import torch\nisinstance(1, torch._ops.OpOverload)"),
        ("graphopt.graph", "import torch\nisinstance(1, torch._ops.HigherOrderOperator)"),
    ),
    prints: (("graphopt.api", "def f():\n    print(1)"),),
    model_names: (
        ("graphopt.passes.merge", "if name == 'LlamaAttention':\n    pass"),
        ("graphopt.passes.merge", "def bert_qkv(): ..."),
        ("graphopt.match", "x = node.gpt2"),
        ("graphopt.patterns.norm", "if path == 'LlamaRMSNorm':\n    pass"),
        ("graphopt.passes.merge", "x = kind == 'DeepseekV3MoE'"),
        ("graphopt.passes.merge", "x = kind in ('opt', 'granite')"),
        ("graphopt.tools.explain", "def of_bert(): ..."),
    ),
    module_paths: (
        ("graphopt.passes.merge", "if g.module_path(a) != g.module_path(b):\n    pass"),
        ("graphopt.match", "x = 1 if module_path(a) else 2"),
        ("graphopt.match", "while node.meta['module_path'] in seen: ..."),
    ),
    class_names: (
        ("graphopt.passes.merge", "if type(m).__name__ == kind:\n    pass"),
        ("graphopt.match", "x = m.__class__.__name__ in names"),
    ),
    abstract_values: (
        ("graphopt.match", "node.meta['val']"),
        ("graphopt.match", "node.meta.get('val')"),
    ),
    first_line: (
        ("graphopt.match", "import os"),
        ("graphopt.match", "# a comment\n'''A sentence.'''"),
        ("graphopt.match", "'''no full stop'''"),
    ),
    own_tolerances: (
        ("tests.test_ops", "assert_close(x, y, rtol=0, atol=2e-2)"),
        ("tests.test_ops", "assert torch.allclose(x, y, 1e-3)"),
        ("tests.test_ops", "assert_close(x, y, **{'rtol': 1, 'atol': 0})"),
        ("tests.test_ops", "assert x == approx(y, rel=0.5)"),
        ("tests.test_ops", "assert_close(x, y, rtol=1e-4 if half else 0, atol=0)"),
        ("tests.test_ops", "CLOSE = 1e-9\nassert_close(x, y, rtol=CLOSE, atol=CLOSE)"),
        ("tests.test_ops", "def f():\n    most: float = 1e-4\n    assert 2 * most >= (x - y).abs().max()"),
        ("tests.test_ops", "assert (x - y).abs().max() < 1e-4 * y.std()"),
        ("bench.bench_ops", "if not difference <= 0.05:\n    fail()"),
        ("tests.test_ops", "assert (missed <= 0.5 + 1e-4).all()"),
        ("tests.test_ops", "assert cosine.min() >= 0.999"),
    ),
}
INNOCENT = {
    wrong_arrows: (
        ("graphopt.ops.norm", "from graphopt.graph import val\nimport torch"),
        (
            "graphopt.match",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from graphopt.api import x",
        ),
        ("graphopt.patterns.norm", "from graphopt import ops\nimport graphopt.ops as o"),
        ("graphopt.defaults", "from graphopt.kernels import rms_norm\nfrom graphopt.patterns import norm"),
        ("graphopt.tools.diff", "from graphopt import api"),
    ),
    hugging_face_imports: (("graphopt.tools.demo", "import transformers"),),
    private_torch: (
        ("graphopt.torch_private", "import torch._guards"),
        ("graphopt.graph", "import torch\nisinstance(1, torch._ops.OpOverload)"),
        (
            "graphopt.rule",
            "import torch\ntorch._check(x)\ntorch.ops._c10d_functional.wait_tensor\ntorch.__version__",
        ),
        ("graphopt.rule", "from torch import fx\nfx.Node.args\nx = y._private"),
    ),
    prints: (("graphopt.tools.cli", "print(1)"), ("graphopt.api", "console.print(1)")),
    model_names: (
        ("graphopt.ops.norm", "'''As Llama writes it.'''"),
        ("graphopt.patterns.norm", "def llama_rms_norm(): ...\nRULES = (llama_rms_norm,)"),
        ("graphopt.match", "optimize = at5 = 'option'"),
    ),
    module_paths: (
        ("graphopt.match", "Refusal(rule, g.module_path(node) or node.name)"),
        ("graphopt.match", "new.meta['module_path'] = g.module_path(old)"),
        ("graphopt.question", "if fnmatch(g.module_path(node), pattern):\n    pass"),
    ),
    class_names: (
        ("graphopt.match", "raise TypeError(type(x).__name__)"),
        ("graphopt.match", "x = target.__name__ == 'topk'"),
    ),
    abstract_values: (
        ("graphopt.graph", "node.meta['val']"),
        ("graphopt.match", "node.meta['origin']; d['val']"),
    ),
    first_line: (("graphopt.match", "'''Say what it is: clearly,\non two lines at most.\n\nMore\n'''"),),
    own_tolerances: (
        ("tests.tolerances", "MOST = Miss(rtol=1e-3, atol=0.1)"),
        ("tests.test_ops", "assert_close(x, y, rtol=0, atol=0)\nassert_close(x, y, **LAYER[2])"),
        ("tests.test_ops", "rtol, atol = TOLERANCE[dtype]\nassert_close(x, y, rtol=rtol, atol=atol)"),
        ("tests.test_ops", "assert (x - y).abs().max() < LOGITS * y.std()"),
        ("tests.test_ops", "ops.rms_norm(x, w, 1e-6)\nassert node.eps == 1e-6 and len(x) < 5"),
        ("tests.test_ops", "assert (x - y).abs().max() > 1e-2, 'the change cannot be seen'"),
        ("tests.test_ops", "keep = torch.rand(2, 3) < 0.6\nassert held <= whole / 2 * 1.01"),
        ("tests.test_ops", "assert x[..., 1] < y.mean(-1)"),
    ),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_source(check: Check) -> None:
    found = [
        w for p in sources(*CHECKS[check]) for w in check(ast.parse(p.read_text(), p.name), module_name(p))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_check_can_fail(check: Check) -> None:
    for name, text in SNIPPETS[check]:
        assert check(ast.parse(text), name), f"{check.__name__} let pass, as {name}:\n{text}"


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_each_check_lets_good_code_pass(check: Check) -> None:
    for name, text in INNOCENT[check]:
        assert not check(ast.parse(text), name), text


def test_sources_are_found_once_each() -> None:
    files = sources(*FOLDERS)
    assert len({p.resolve() for p in files}) == len(files)
    assert ROOT / "graphopt" / "graph.py" in files and Path(__file__).resolve() in files


# ------------------------------------------------------------------------------------------------- tables


def has_table(tree: ast.Module, table: str) -> bool:
    """Whether a file assigns its table (`RULES`, `KERNELS`) at top level."""
    targets = [t for n in tree.body if isinstance(n, ast.Assign) for t in n.targets]
    targets += [n.target for n in tree.body if isinstance(n, ast.AnnAssign)]
    return any(isinstance(t, ast.Name) and t.id == table for t in targets)


def forgotten(defaults: ast.Module, folder: str, table: str, files: dict[str, ast.Module]) -> set[str]:
    """The files of a room with a table that `defaults.py` never reads."""
    read = {dotted for _, dotted in chains(defaults, "graphopt.defaults")}
    offered = {stem for stem, tree in files.items() if has_table(tree, table)}
    return {stem for stem in offered if f"graphopt.{folder}.{stem}.{table}" not in read}


@pytest.mark.parametrize(("folder", "table"), [("patterns", "RULES"), ("kernels", "KERNELS")])
def test_no_file_is_forgotten_in_defaults(folder: str, table: str) -> None:
    files = {p.stem: ast.parse(p.read_text()) for p in sources(folder)}
    defaults = ROOT / "graphopt" / "defaults.py"
    tree = ast.parse(defaults.read_text() if defaults.exists() else "")
    missing = forgotten(tree, folder, table, files)
    assert not missing, f"graphopt/defaults.py does not read {table} of {sorted(missing)} in {folder}/"


def test_a_forgotten_file_is_seen() -> None:
    files = {
        "norm": ast.parse("RULES = ()"),
        "rope": ast.parse("RULES: tuple = ()"),
        "masks": ast.parse("x = 1"),
    }
    by_module = "from graphopt.patterns import norm, rope\nRULES = (*norm.RULES,)"
    by_name = (
        "from graphopt.patterns.norm import RULES as NORM\nfrom graphopt.patterns.rope import RULES as ROPE"
    )
    assert forgotten(ast.parse(by_module), "patterns", "RULES", files) == {"rope"}
    assert forgotten(ast.parse(by_name), "patterns", "RULES", files) == set()


# -------------------------------------------------------------------------------------------------- files


def test_five_folders_are_namespaces() -> None:
    found = [str(p) for folder in (*ROOMS, "tests", "bench") for p in (ROOT / folder).rglob("__init__.py")]
    assert not found, f"{found}: with an __init__.py the folder shadows a real package of its name"


def test_rooms_are_reached_by_relative_links() -> None:
    for name in ROOMS:
        link = ROOT / "graphopt" / name
        assert link.is_symlink() and link.readlink() == Path("..") / name


def test_names_of_files() -> None:
    files = sources(*FOLDERS)
    assert not [p for p in files if p.name == "utils.py"], "name a file by what is in it"
    assert not [
        p for p in files if p.name == "kernels.py" and p.relative_to(ROOT).parts[0] in ("tests", "bench")
    ]
