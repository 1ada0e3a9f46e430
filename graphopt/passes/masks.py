"""Masks as arguments: attention(…, bias=mask) -> attention(…, causal, offset, window, key_padding, bias)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from graphopt import graph as g
from graphopt import ops
from graphopt.ledger import Ledger
from graphopt.masks import MaskArguments, MaskForm, arguments, classify, describe
from graphopt.observe import Matched, Observer, Refused, emit
from graphopt.rewrite import Match, Refusal

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
        identity = f"{RULE}@{g.module_path(node) or '-'}#{mask.name}"
        reason = (
            form
            if isinstance(form, str)
            else "denied"
            if identity in deny
            else form.note
            if form.whole
            else ""
        )
        if reason or isinstance(form, str):
            emit(observers, Refused(Refusal(RULE, node.name, g.module_path(node), g.source(mask), reason, 1)))
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
