"""Every dimension and dtype of a pattern counts: where a tensor has another, the rule refuses or is right.

The mutants of test_rules.py change calls and their literals; these change the tensors that a pattern reads.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from graphopt.accuracy import raise_to_fp64
from graphopt.rule import Rule
from tests.rewriting import canonical, outputs, rewritten
from tests.rule_cases import (
    SQUARE,
    TIDY,
    Point,
    arguments,
    by_rule,
    pattern_of,
    small,
    table_of,
    tensors,
)
from tests.tolerances import IN_FP64

OTHER = {torch.float32: torch.bfloat16, torch.bool: torch.float32, torch.int64: torch.int32}


def retensored(rule: Rule, at: Point) -> Iterator[tuple[str, dict[str, object]]]:
    """The arguments with one tensor's dimension 1, doubled or gone, or of another dtype."""
    values = arguments(rule, at)
    for name in tensors(rule):
        x = values[name]
        assert isinstance(x, Tensor)
        for dim in range(x.dim()):
            yield f"{name}'s dimension {dim} is 1", {**values, name: x.narrow(dim, 0, 1)}
            yield f"{name}'s dimension {dim} is doubled", {**values, name: torch.cat([x, x.flip(dim)], dim)}
            yield f"{name} has no dimension {dim}", {**values, name: x.select(dim, 0)}
        yield f"{name} has one more dimension", {**values, name: x[None]}
        if x.dtype in OTHER:
            yield f"{name} is {OTHER[x.dtype]}", {**values, name: x.to(OTHER[x.dtype])}


@by_rule
@pytest.mark.filterwarnings("ignore")
def test_another_tensor_is_refused_or_right(rule: Rule) -> None:
    tried = 0
    for sizes in (TIDY, SQUARE):
        for label, values in retensored(rule, small(rule, sizes)):
            model, inputs = pattern_of(rule, values)
            try:
                eager = outputs(model(*inputs))
            except (RuntimeError, ValueError, IndexError, TypeError):
                continue  # no model looks so
            tried += 1
            before = canonical(model, *inputs)
            after, seen = rewritten(before, (rule,) if sizes is TIDY else table_of(rule))
            if not seen.matches:
                continue
            for want, have in zip(eager, after(*inputs), strict=True):
                assert (want.shape, want.dtype) == (have.shape, have.dtype), label
            pairs = zip(raise_to_fp64(before)(*inputs), raise_to_fp64(after)(*inputs), strict=True)
            for want, have in pairs:
                worst = f"{label}\n{before.graph}\n{after.graph}"
                torch.testing.assert_close(have, want, equal_nan=True, msg=worst, **IN_FP64)
    assert tried
