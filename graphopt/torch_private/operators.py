"""torch's operators: their schemas and kernels, and which of them a call runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
from torch._ops import OpOverload
from torch.utils._pytree import tree_flatten


def same_schema(overload: OpOverload, schema: str) -> bool:
    """Whether an operator's schema is the one that a text as `ns::name(Tensor x) -> Tensor` spells."""
    return str(overload._schema) == str(torch._C.parse_schema(schema))


def operators_run(call: Callable[[], object]) -> tuple[OpOverload, ...]:
    """The ATen operators that a call dispatches, in order, views included."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Log(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.ran: list[OpOverload] = []

        def __torch_dispatch__(
            self, function: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
        ) -> object:
            if function.namespace != "prim":  # questions about fake tensors
                self.ran.append(function)
            return function(*args, **(kwargs or {}))

    with Log() as log:
        call()
    return tuple(log.ran)


def has_kernel(op: OpOverload, key: str) -> bool:
    """Whether torch registers a kernel of an operator's own under a dispatch key, as "AutocastCPU"."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), key)


class OperatorLog:
    """What calls compute below autograd and autocast. Calls whose logs are equal compute the same.

    Values are numbered by how they were computed. Casts are told by what takes their results, since torch
    orders them as it likes; the view of a cast and the cast of a view are the same.

    Attributes:
        ran: the operators. Autocast may cast in their kernels too, and no log shows that.
    """

    def __init__(self) -> None:
        self.ran: set[OpOverload] = set()
        self._numbers: dict[object, int] = {}

    def of(self, call: Callable[..., object], values: Sequence[object]) -> tuple[object, ...]:
        """The operators that a call on some values runs, in order, each with what it takes; and the results.

        Values at one place of `values` count as equal from one log to the next.
        """
        from torch.utils._python_dispatch import TorchDispatchMode

        names: dict[int, _Name] = {}
        alive: list[object] = []  # or an id would be given again
        calls: list[int] = []

        def name(value: object, key: object, casts: tuple[torch.dtype, ...] = ()) -> None:
            for i, one in enumerate(tree_flatten(value)[0]):
                if isinstance(one, torch.Tensor):
                    alive.append(one)
                    names[id(one)] = self._number((key, i)), casts

        def spell(value: object) -> object:
            if not isinstance(value, torch.Tensor):
                return repr(value)
            return names.get(id(value)) or ("constant", value.dtype, str(tuple(value.shape)))

        class Log(TorchDispatchMode):
            def __torch_dispatch__(
                log, function: OpOverload, types: object, args: tuple = (), kwargs: dict | None = None
            ) -> object:
                kwargs = kwargs or {}
                if function.namespace == "prim":
                    return function(*args, **kwargs)
                self.ran.add(function)
                result = function(*args, **kwargs)
                source, casts = (names.get(id(args[0])) if args else None) or (-1, ())
                if function is torch.ops.aten._to_copy.default and source >= 0 and kwargs.keys() == {"dtype"}:
                    alive.append(result)
                    names[id(result)] = source, (*casts, kwargs["dtype"])
                    return result
                moved = source >= 0 and function in _MOVES
                flat, spec = tree_flatten((args[1:], kwargs) if moved else (args, kwargs))
                key = str(function), str(spec), source if moved else None, *(spell(v) for v in flat)
                calls.append(self._number(key))
                name(result, key, casts if moved else ())
                return result

        name(list(values), "given")
        with Log():
            result = call(*values)
        return tuple(calls), tuple(spell(v) for v in tree_flatten(result)[0])

    def _number(self, key: object) -> int:
        return self._numbers.setdefault(key, len(self._numbers))


_Name: TypeAlias = "tuple[int, tuple[torch.dtype, ...]]"  # what was computed, and what it was then cast to
# Views that choose by position only: they may change places with a cast.
_MOVES = frozenset(
    getattr(getattr(torch.ops.aten, name), overload)
    for name, overload in (
        ("permute", "default"),
        ("transpose", "int"),
        ("t", "default"),
        ("unsqueeze", "default"),
        ("squeeze", "dim"),
        ("squeeze", "default"),
        ("expand", "default"),
        ("view", "default"),
        ("select", "int"),
        ("slice", "Tensor"),
    )
)
