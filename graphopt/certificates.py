"""Certificates: rewrites and whole graphs that have been verified, by what they did; kept on disk, so that
none is run again.

A certificate covers one shape class: the same calls with the same literals on tensors of the same dtypes, of
which the same dimensions are 0, 1, fixed or symbolic.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
import logging
import os
import threading
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import fx

from graphopt import graph as g
from graphopt import records
from graphopt.ledger import Call, Rewrite, call_of
from graphopt.torch_private import OpOverload

log = logging.getLogger(__name__)


class Certificates:
    """What has been verified: in this process, and in a folder of JSON records (None: in this process only).

    Threads and processes may share it: a record is replaced as a whole, under a lock.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._known: dict[str, Mapping[str, object]] = {}
        self._lock = threading.Lock()

    def get(self, key: str, what: str = "rewrite") -> Mapping[str, object] | None:
        """The certificate of that key. A damaged record is as good as none, and a warning: of what it was."""
        with self._lock:
            known = self._known.get(key)
        path = self._path(key)
        if known is not None or path is None:
            return known
        found = records.read(path)
        if found is None or found.get("key") != key:
            if path.exists():
                warnings.warn(
                    f"graphopt: the certificate {path.name} in {path.parent} is damaged; its {what} is "
                    "verified again",
                    stacklevel=2,
                )
            return None
        with self._lock:
            self._known[key] = found
        return found

    def keep(self, key: str, fields: Mapping[str, object]) -> None:
        """Certify. A folder that cannot be written costs a log line."""
        certificate = {**fields, "key": key}
        with self._lock:
            self._known[key] = certificate
        path = self._path(key)
        if path is not None:
            records.write(path, certificate)

    def revoke(self, key: str) -> None:
        """What was certified has failed on other values."""
        with self._lock:
            self._known.pop(key, None)
        path = self._path(key)
        if path is not None:
            path.unlink(missing_ok=True)

    def forget(self) -> None:
        """Forget what is in memory; the folder stays."""
        with self._lock:
            self._known.clear()

    def _path(self, key: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{key}.json"


def default_folder() -> Path:
    """The folder for certificates of this user. Needs platformdirs; writing them needs filelock."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("graphopt")) / "verified"


# ---------------------------------------------------------------------------------------------------- keys


def key_of(rewrite: Rewrite) -> str:
    """What a rewrite did, as a hash: calls of both sides, literals, dtypes, shape classes, rule, versions."""
    about = (shape_of(rewrite), *map(source_of, rewrite.functions), versions(device_of(rewrite)))
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:32]


def shape_of(rewrite: Rewrite) -> str:
    """Both sides as text, without names: equal for identical layers."""
    numbers: dict[fx.Node, str] = {}
    lines = []
    for i, leaf in enumerate(rewrite.leaves()):
        numbers[leaf] = f"%{i}"
        lines.append(f"%{i}: {_class(g.val(leaf))}")
    for side, calls in (("-", rewrite.before), ("+", rewrite.after)):
        env = dict(numbers)
        for i, call in enumerate(calls):
            env[call.node] = f"{side}{i}"
            lines.append(f"{side}{i} = {_call(call, env)}: {_class(g.val(call.node))}")
        lines += [env[pair[side == "+"]] for pair in rewrite.outputs]
    return "\n".join(lines)


def key_of_graph(captured: fx.Graph, lowered: fx.Graph, functions: Iterable[Callable[..., object]]) -> str:
    """What was made of a whole graph, as a hash: both graphs, the source of what made and runs it, versions.

    Args:
        functions: of the rewrites that were applied.
    """
    called = (n.target for n in lowered.nodes if n.op == "call_function")
    plain = (target for target in called if callable(target) and not isinstance(target, OpOverload))
    sources = sorted({source_of(f) for f in (*functions, *plain)})
    values = (g.tensor(n) for n in captured.nodes)
    devices = dict.fromkeys(v.device for v in values if v is not None and v.device.type != "cpu")
    versions_there = versions(next(iter(devices), torch.device("cpu")))
    about = ("whole graph", _text(captured), _text(lowered), *sources, versions_there)
    return hashlib.sha256("\n".join(about).encode()).hexdigest()[:32]


def _text(graph: fx.Graph) -> str:
    """A graph without the names of its nodes, with what a certificate covers of each value."""
    env: dict[fx.Node, str] = {}
    lines = []
    for i, node in enumerate(graph.nodes):
        if node.op == "call_function":
            about = _call(call_of(node), env)
        else:
            about = f"{node.op} {node.target if node.op == 'get_attr' else ''} {_spelled(node.args, env)}"
        env[node] = f"%{i}"
        lines.append(f"{about}: {_class(g.val(node))}")
    return "\n".join(lines)


def _call(call: Call, env: Mapping[fx.Node, str]) -> str:
    target = call.target
    name = str(target) if isinstance(target, OpOverload) else _name(target)
    kwargs = sorted(call.kwargs.items())
    return f"{name}({_spelled(call.args, env)}, {_spelled([v for pair in kwargs for v in pair], env)})"


def _name(target: object) -> str:
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__qualname__', type(target).__qualname__)}"


def _spelled(value: object, env: Mapping[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return env[value]
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(_spelled(v, env) for v in value)}]"
    return repr(value)


def _class(value: object) -> str:
    """What a certificate covers of a value: a tensor's dtype, device and classes of sizes; else its kind."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype} {value.device.type} [{', '.join(map(_size, value.shape))}]"
    if isinstance(value, (list, tuple)):
        return f"({', '.join(map(_class, value))})"
    return type(value).__name__


def _size(size: object) -> str:
    if not isinstance(size, int):
        return "symbolic"
    return str(size) if size < 2 else "n"


def device_of(rewrite: Rewrite) -> torch.device:
    """Where a rewrite computes."""
    values = [g.tensor(call.node) for call in (*rewrite.after, *rewrite.before)]
    return next((v.device for v in values if v is not None), torch.device("cpu"))


# ------------------------------------------------------------------------------------------------- sources


@functools.cache
def source_of(function: Callable[..., object]) -> str:
    """A function's source; its code where it has none (a notebook, `exec`)."""
    function = inspect.unwrap(function)
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        return _code(code) if code is not None else _name(function)


def _code(code: types.CodeType) -> str:
    constants = [_code(c) if isinstance(c, types.CodeType) else repr(c) for c in code.co_consts]
    return f"{code.co_code.hex()} {code.co_names} {constants}"


@functools.cache
def versions(device: torch.device) -> str:
    """Everything else that a result depends on: graphopt's own source, torch, the processor."""
    if device.type == "cuda":
        processor = torch.cuda.get_device_name(device)
    else:
        processor = torch.backends.cpu.get_cpu_capability()
    return f"{source_hash()} torch {torch.__version__} {processor}"


@functools.cache
def source_hash() -> str:
    """Of all of graphopt: a rewrite means what the references of its ops mean, and runs in its kernels."""
    digest = hashlib.sha256()
    for path in sorted(_files(Path(__file__).parent)):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _files(folder: Path) -> Iterable[Path]:
    """Python files; the rooms may be links."""
    for at, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if name != "__pycache__"]
        yield from (Path(at, name) for name in names if name.endswith(".py"))
