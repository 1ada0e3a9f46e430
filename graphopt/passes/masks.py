"""Masks as arguments: attention(…, bias=mask) -> attention(…, causal, offset, window, key_padding, bias)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.ledger import Ledger
from graphopt.masks import MaskArguments, MaskForm, arguments, classify, describe
from graphopt.observe import Matched, Observer, Refused, emit
from graphopt.rewrite import DENIED, Match, Refusal

RULE = "mask"


def read_masks(
    gm: fx.GraphModule,
    observers: Sequence[Observer],
    deny: frozenset[str],
    ledger: Ledger | None = None,
) -> int:
    """Classify the mask of every attention and move what is certain into arguments; returns how many.

    A mask that layers share is classified, proved and rebuilt once. The caller recompiles the module.
    """
    known: dict[object, MaskForm | str] = {}
    made: dict[MaskForm, MaskArguments] = {}
    seen: dict[str, int] = {}
    read = 0
    for node in list(gm.graph.nodes):
        if not g.is_call(node, ops.attention.overload):
            continue
        mask = g.arg(node, "bias")
        if not isinstance(mask, fx.Node) or g.arg(node, "causal") or g.arg(node, "key_padding") is not None:
            continue
        q, k = g.arg(node, "q"), g.arg(node, "k")
        assert isinstance(q, fx.Node) and isinstance(k, fx.Node)
        batch, heads, queries, _ = g.shape(q)
        form = classify(mask, (batch, heads, queries, g.shape(k)[2]), known)  # type: ignore[arg-type]  # its own cache
        if isinstance(form, str) or form.whole:
            _refuse(node, form if isinstance(form, str) else form.note, classify.__name__, observers)
            continue
        identity = _identify(node, form, seen)
        if identity in deny:
            _refuse(node, "denied", DENIED, observers)
            continue
        # How the mask is computed is a part of it: the same attention may read another mask.
        before = (*ledger.above(mask), *ledger.took((node,))) if ledger else ()
        _apply(node, arguments(form, made))
        read += 1
        found = Match(
            identity,
            RULE,
            g.module_path(node),
            f"{describe(form)}  {g.source(mask)}",
            (mask.name,),
            (node.name,),
        )
        if ledger:
            ledger.changed(found, (classify, arguments), before, node)
        emit(observers, Matched(found))
    if read:
        g.eliminate_dead_code(gm.graph)
    return read


def _identify(node: fx.Node, form: MaskForm, seen: dict[str, int]) -> str:
    """A stable id: rule @ module # hash of what the mask is (~ ordinal), but for its leaves' names.

    The names of nodes depend on how many rewrites came before.
    """
    about = re.sub(r"\w+(?=\[)|(?<=offset=)[^)]*", "", describe(form))
    digest = hashlib.sha1(about.encode(), usedforsecurity=False).hexdigest()[:6]
    base = f"{RULE}@{g.module_path(node) or '-'}#{digest}"
    ordinal = seen[base] = seen.get(base, 0) + 1
    return base if ordinal == 1 else f"{base}~{ordinal}"


def _refuse(node: fx.Node, reason: str, guard: str, observers: Sequence[Observer]) -> None:
    """Tell why a mask stays a tensor."""
    mask, path = g.arg(node, "bias"), g.module_path(node)
    assert isinstance(mask, fx.Node)
    told = Refusal(RULE, node.name, path, g.source(mask), reason, 1, "", "", guard, node.name, path)
    emit(observers, Refused(told))


def _apply(node: fx.Node, given: MaskArguments) -> None:
    """Set the attention's arguments. A row without keys stays what it was in eager."""
    changed = {
        "causal": given.causal,
        "offset": given.offset,
        "offset_tensor": given.offset_tensor,
        "window": given.window,
        "key_padding": given.key_padding,
        "bias": given.bias,
        "empty_rows_mean": given.empty_rows_mean or g.arg(node, "empty_rows_mean"),
    }
    names = g.argument_names(ops.attention.overload)
    node.args = tuple(changed.get(name, value) for name, value in zip(names, node.args, strict=True))
