"""graphopt: a graph-rewriting compiler for transformer inference on PyTorch."""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

# The three rooms are symlinks to the repository's root (folders in a wheel); an archive may have lost them.
_here = Path(__file__).resolve().parent
if not (_here / "kernels").is_dir() and (_here.parent / "kernels").is_dir():
    __path__.append(str(_here.parent))

# The one eager name. The first import of the submodule binds the package's attribute `capture` to the module;
# as that happens here, before anybody else can do it, the function has the last word in any order of imports.
from graphopt.capture import capture  # noqa: E402

if TYPE_CHECKING:
    from graphopt.api import disable, enable, optimize, refresh, weight_bytes
    from graphopt.artifact import load, save
    from graphopt.lowering.module import Lower
    from graphopt.passes.canonicalize import Canonicalize
    from graphopt.passes.fuse import Fuse
    from graphopt.passes.merge import Merge
    from graphopt.passes.quantize import Quantize
    from graphopt.passes.recognise import Recognise
    from graphopt.passes.shard import Shard
    from graphopt.pipeline import Pipeline
    from graphopt.report import Report
    from graphopt.tools.bisect import bisect
    from graphopt.tools.compile import compile_for
    from graphopt.tools.diff import diff
    from graphopt.tools.explain import explain

    from . import errors, ops, passes

# Public name -> the module that defines it, imported when first asked for: `import graphopt` stays cheap.
_HOMES = {
    "Canonicalize": "graphopt.passes.canonicalize",
    "Fuse": "graphopt.passes.fuse",
    "Lower": "graphopt.lowering.module",
    "Merge": "graphopt.passes.merge",
    "Pipeline": "graphopt.pipeline",
    "Quantize": "graphopt.passes.quantize",
    "Recognise": "graphopt.passes.recognise",
    "Report": "graphopt.report",
    "Shard": "graphopt.passes.shard",
    "bisect": "graphopt.tools.bisect",
    "compile_for": "graphopt.tools.compile",
    "diff": "graphopt.tools.diff",
    "disable": "graphopt.api",
    "enable": "graphopt.api",
    "explain": "graphopt.tools.explain",
    "load": "graphopt.artifact",
    "optimize": "graphopt.api",
    "refresh": "graphopt.api",
    "save": "graphopt.artifact",
    "weight_bytes": "graphopt.api",
}
_SUBMODULES = ("errors", "ops", "passes")

__all__ = [
    "Canonicalize",
    "Fuse",
    "Lower",
    "Merge",
    "Pipeline",
    "Quantize",
    "Recognise",
    "Report",
    "Shard",
    "bisect",
    "capture",
    "compile_for",
    "diff",
    "disable",
    "enable",
    "errors",
    "explain",
    "load",
    "ops",
    "optimize",
    "passes",
    "refresh",
    "save",
    "weight_bytes",
]


def __getattr__(name: str) -> object:
    """Import a public name from its home and keep it; AttributeError for any other name."""
    if name in _SUBMODULES:
        return import_module(f"graphopt.{name}")
    if name not in _HOMES:
        raise AttributeError(f"module 'graphopt' has no attribute {name!r}; public are {', '.join(__all__)}")
    value = globals()[name] = getattr(import_module(_HOMES[name]), name)
    return value


def __dir__() -> list[str]:
    """The public names, imported or not."""
    return sorted({*globals(), *__all__})
