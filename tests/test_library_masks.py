"""The masks that the model library makes, on the whole road: what attention is told, and eager's numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeAlias

import pytest
import torch
import transformers
from torch import nn
from torch.nn import functional as F
from transformers import masking_utils as library

from graphopt import backend, ops
from graphopt import graph as g
from graphopt.accuracy import Verdict, judge, raise_to_fp64
from graphopt.masks import MaskArguments, MaskForm, arguments
from graphopt.masks.classification import sorted_form
from graphopt.masks.term import Space, Truth
from graphopt.observe import Event, PassEnded, Refused
from graphopt.steering import Steering
from graphopt.tools.zoo.weights import fill
from tests.models import zoo

if TYPE_CHECKING:
    from transformers import PretrainedConfig


BATCH, LENGTH, HEADS, DIM = 4, 7, 3, 12
Masks: TypeAlias = "Callable[..., torch.Tensor | None]"

Call: TypeAlias = "tuple[int, *tuple[torch.Tensor | None, ...]]"  # length and what is given

# Left, right, in between; the last row has no token at all.
PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 0, 1, 1], [0] * LENGTH])
PACKED = torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 0, 1, 0, 1], [3, 4, 5, 6, 7, 8, 9], [0] * LENGTH])


@dataclass
class Watch:
    """What each attention of each graph was told, and why masks stayed tensors."""

    told: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def on_event(self, event: Event) -> None:
        if isinstance(event, Refused) and event.refusal.rule == "mask":
            self.refused.append(event.refusal.reason)
        if isinstance(event, PassEnded) and event.name == "recognise":
            calls = [n for n in event.gm.graph.nodes if g.is_call(n, ops.attention.overload)]
            self.told += [said(n) for n in calls]


def said(node: torch.fx.Node) -> str:
    """The mask arguments of an attention: `causal(2) window(5) padding bias(bool) mean`."""
    given = {name: g.arg(node, name) for name in g.argument_names(node.target)}
    tensor = given["offset_tensor"] is not None
    offset = ", ".join([str(given["offset"])] * (given["offset"] != 0) + ["tensor"] * tensor)
    parts = ["causal" + (f"({offset})" if offset else "")] if given["causal"] else []
    parts += [f"window({given['window']})"] if given["window"] is not None else []
    parts += ["padding"] if given["key_padding"] is not None else []
    bias = given["bias"]
    parts += [f"bias({str(g.dtype(bias)).removeprefix('torch.')})"] if isinstance(bias, torch.fx.Node) else []
    return " ".join([*parts, *(["mean"] if given["empty_rows_mean"] else [])])


@pytest.fixture
def watch() -> Iterator[Watch]:
    seen = Watch()
    torch.compiler.reset()
    backend.steer(Steering(observers=(seen,)))
    yield seen
    backend.steer(Steering())
    torch.compiler.reset()


class Attend(nn.Module):
    """Attention under the mask that `masks` makes of its config, of embeddings and of what is given.

    causal: what it means to the library that there is no mask.
    """

    def __init__(self, masks: Masks, implementation: str = "sdpa", causal: bool = True, **sizes: int) -> None:
        super().__init__()
        self.masks, self.implementation, self.causal = masks, implementation, causal
        self.config = transformers.LlamaConfig(num_hidden_layers=1, **sizes)
        self.config._attn_implementation = implementation

    def forward(self, x: torch.Tensor, *given: torch.Tensor | None) -> torch.Tensor:
        """x [batch, length, 3 * HEADS * DIM] -> [batch, HEADS, length, DIM]"""
        q, k, v = x.view(*x.shape[:2], 3 * HEADS, DIM).transpose(1, 2).split(HEADS, 1)
        mask = self.masks(self.config, x, *given)
        if self.implementation == "sdpa":
            return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None and self.causal)
        scores = q @ k.transpose(2, 3) * DIM**-0.5
        return torch.softmax(scores if mask is None else scores + mask, -1) @ v


def embeddings(length: int) -> torch.Tensor:
    """x of an `Attend`; its logits have a standard deviation of about 2."""
    generator = torch.Generator().manual_seed(length)
    return 1.4 * torch.randn(BATCH, length, 3 * HEADS * DIM, generator=generator)


def outcomes(program: Attend, calls: Sequence[Call], dynamic: bool = False) -> list[Verdict]:
    """Compile once; the accuracy rule on each call. Nothing is cast in it: fp64 inputs are the oracle."""
    torch.compiler.reset()
    compiled = torch.compile(
        program, backend="graphopt", fullgraph=True, dynamic=dynamic, options={"strict": True}
    )
    found = []
    for length, *given in calls:
        x = embeddings(length)
        wide = [y.double() if y is not None and y.is_floating_point() else y for y in given]
        with torch.no_grad():
            results = program(x.double(), *wide), program(x, *given), compiled(x, *given)
        found.append(judge(*results, torch.float32))
    return found


def told(watch: Watch, program: Attend, calls: Sequence[Call], dynamic: bool = False) -> set[str]:
    """What attention was told in all graphs of these calls, each of which is compared with eager."""
    for (length, *_), verdict in zip(calls, outcomes(program, calls, dynamic), strict=True):
        assert verdict.ok, f"length {length}: {verdict}, told {watch.told}"
    return set(watch.told)


# ------------------------------------------------------------------------------------- the library's masks


def causal(
    config: PretrainedConfig,
    x: torch.Tensor,
    padding: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor | None:
    return library.create_causal_mask(config, x, padding, None, positions)


def sliding(
    config: PretrainedConfig,
    x: torch.Tensor,
    padding: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor | None:
    return library.create_sliding_window_causal_mask(config, x, padding, None, positions)


def chunked(
    config: PretrainedConfig,
    x: torch.Tensor,
    padding: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> torch.Tensor | None:
    return library.create_chunked_causal_mask(config, x, padding, None, positions)


def bidirectional(
    config: PretrainedConfig, x: torch.Tensor, padding: torch.Tensor | None = None
) -> torch.Tensor | None:
    return library.create_bidirectional_mask(config, x, padding)


def both_sides(config: PretrainedConfig, x: torch.Tensor, padding: torch.Tensor) -> torch.Tensor | None:
    return library.create_bidirectional_sliding_window_mask(config, x, padding)


def blocks(
    config: PretrainedConfig, x: torch.Tensor, padding: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor | None:
    """Causal, but the tokens of a block see each other; -1 is no block."""
    return library.create_causal_mask(config, x, padding, None, block_sequence_ids=ids)


def padded(length: int) -> torch.Tensor:
    """PADDING at another length."""
    return PADDING.repeat(1, -(-length // LENGTH))[:, :length].clone()


def around(size: int) -> tuple[int, int, int]:
    """Where two masks that differ from `size` on must not be taken for one."""
    return size - 1, size, size + 1


# ---------------------------------------------------------------------------------- causal, padding, window


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("implementation", "empty"), [("sdpa", ""), ("eager", " mean")])
@pytest.mark.parametrize(
    ("masks", "given", "expected"),
    [
        (causal, (), "causal"),
        (causal, (PADDING,), "causal padding"),
        (sliding, (PADDING,), "causal window(4) padding"),
        (bidirectional, (PADDING,), "padding"),
        (both_sides, (PADDING,), "causal(4) window(9) padding"),
    ],
)
def test_what_is_certain_becomes_arguments(
    watch: Watch,
    masks: Masks,
    given: tuple[torch.Tensor, ...],
    expected: str,
    implementation: str,
    empty: str,
    dynamic: bool,
) -> None:
    program = Attend(masks, implementation, sliding_window=4)
    assert told(watch, program, [(LENGTH, *given)], dynamic) == {expected + empty}


def test_no_mask_is_no_argument(watch: Watch) -> None:
    assert told(watch, Attend(bidirectional, causal=False), [(LENGTH,)]) == {""}


@pytest.mark.parametrize("row", range(BATCH), ids=["left", "right", "holes", "all masked"])
def test_each_kind_of_padding_for_a_whole_batch(watch: Watch, row: int) -> None:
    calls = [(LENGTH, PADDING[row].expand(BATCH, -1).clone())]
    assert told(watch, Attend(causal), calls) == {"causal padding"}


@pytest.mark.parametrize("window", [3, 7, 8, 12])
def test_a_window_shorter_and_longer_than_the_length(watch: Watch, window: int) -> None:
    program = Attend(sliding, sliding_window=window)
    seen = f" window({window})" if window < LENGTH else ""
    assert told(watch, program, [(LENGTH, PADDING)]) == {f"causal{seen} padding"}
    watch.told.clear()
    calls = [(length, padded(length)) for length in around(window)]
    assert told(watch, program, calls, dynamic=True) == {f"causal window({window}) padding"}


# ------------------------------------------------------------------------------------------- what is a rest


@pytest.mark.parametrize("chunk", [3, 7, 8, 12])
def test_chunks_stay_a_tensor_where_they_can_tell(watch: Watch, chunk: int) -> None:
    """Without padding, a chunk that holds a static length is no term; padded rows count from their start."""
    program = Attend(chunked, attention_chunk_size=chunk)
    rest = " bias(bool)" if chunk < LENGTH else ""
    assert told(watch, program, [(LENGTH,)]) == {f"causal{rest}"}
    watch.told.clear()
    assert told(watch, program, [(LENGTH, PADDING)]) == {"causal padding bias(bool)"}


@pytest.mark.parametrize("chunk", [3, 8])
@pytest.mark.parametrize("with_padding", [False, True], ids=["full", "padded"])
def test_chunks_of_changing_lengths(watch: Watch, chunk: int, with_padding: bool) -> None:
    """Compiled at a length where they are causal, they are chunks at the next.

    For scores that are added to, the library never leaves its mask out by itself.
    """
    program = Attend(chunked, "eager", attention_chunk_size=chunk)
    calls = [(n, padded(n)) if with_padding else (n,) for n in (*around(chunk), 2 * chunk + 1)]
    padding = " padding" if with_padding else ""
    assert told(watch, program, calls, dynamic=True) == {f"causal{padding} bias(bool) mean"}


class Chunks(nn.Module):
    """A model of 2 layers that is given a chunked mask whole, made in the same graph."""

    def __init__(self) -> None:
        super().__init__()
        config = transformers.LlamaConfig(
            hidden_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=12,
            intermediate_size=20, vocab_size=31, max_position_embeddings=64, attention_chunk_size=3,
        )  # fmt: skip
        self.model = transformers.LlamaModel(config).eval()
        fill(self.model)

    def forward(self, tokens: torch.Tensor, padding: torch.Tensor) -> torch.Tensor:
        x = self.model.embed_tokens(tokens)
        mask = chunked(self.model.config, x, padding)
        return self.model(inputs_embeds=x, attention_mask=mask, use_cache=False).last_hidden_state


def test_layers_share_chunks(watch: Watch) -> None:
    torch.manual_seed(0)
    model, tokens = Chunks(), torch.randint(3, 31, (BATCH, LENGTH))
    compiled = torch.compile(model, backend="graphopt", fullgraph=True, options={"strict": True})
    oracle = raise_to_fp64(zoo.trace(model, {"tokens": tokens, "padding": PADDING}))
    with torch.no_grad():
        ours, eager = (call(tokens, PADDING) for call in (compiled, model))
        assert judge(oracle(tokens, PADDING), eager, ours, torch.float32).ok
    assert watch.told == ["causal padding bias(bool)"] * 2


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("masks", "given", "expected"),
    [
        (causal, (None, PACKED), "bias(bool)"),
        (sliding, (None, PACKED), "bias(bool)"),
        (chunked, (None, PACKED), "bias(bool)"),
        (blocks, (PADDING, PACKED // 3 - 1), "padding bias(bool)"),
    ],
)
def test_a_packed_batch_and_blocks_stay_a_tensor(
    watch: Watch, masks: Masks, given: tuple[torch.Tensor | None, ...], expected: str, dynamic: bool
) -> None:
    program = Attend(masks, sliding_window=2, attention_chunk_size=3)
    assert told(watch, program, [(LENGTH, *given)], dynamic) == {expected}


@pytest.mark.parametrize("values", [PACKED, torch.arange(LENGTH).expand(BATCH, -1)], ids=["packed", "plain"])
def test_positions_of_another_call_may_be_packed(watch: Watch, values: torch.Tensor) -> None:
    """Positions that happen to be plain in the first call prove nothing about the next."""
    calls = [(LENGTH, None, values.clone()), (LENGTH, None, PACKED)]
    assert told(watch, Attend(causal), calls) == {"bias(bool)"}


def test_positions_made_in_the_graph_are_known(watch: Watch) -> None:
    def masks(config: PretrainedConfig, x: torch.Tensor) -> torch.Tensor | None:
        return causal(config, x, None, torch.arange(x.shape[1])[None])

    assert told(watch, Attend(masks), [(LENGTH,)]) == {"causal"}


TRIANGLE = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(BATCH, 1, -1, -1).clone()
RANDOM = torch.rand(BATCH, HEADS, LENGTH, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.6
LOWEST = torch.finfo(torch.float32).min


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    ("first", "implementation", "expected"),
    [
        (TRIANGLE, "sdpa", "bias(bool)"),
        (torch.zeros(()).where(TRIANGLE, LOWEST), "sdpa", "bias(float32)"),
        (torch.zeros(()).where(TRIANGLE, LOWEST), "eager", "bias(float32)"),
    ],
)
def test_a_mask_given_whole_stays_what_it_is(
    watch: Watch, first: torch.Tensor, implementation: str, expected: str, dynamic: bool
) -> None:
    """That a caller's mask is causal in one call is nothing that the graph says."""
    other = RANDOM[:, :1] if first.dtype == torch.bool else torch.zeros(()).where(RANDOM[:, :1], LOWEST)
    calls = [(LENGTH, first), (LENGTH, other)]
    assert told(watch, Attend(causal, implementation), calls, dynamic) == {expected}


# -------------------------------------------------------------------------------------------------- faults


def without_rest(form: MaskForm, made: dict[MaskForm, MaskArguments] | None = None) -> MaskArguments:
    return replace(arguments(form, made), bias=None)


FAULTS: tuple[tuple[Masks, Call], ...] = (
    (chunked, (LENGTH,)),
    (chunked, (LENGTH, PADDING)),
    (causal, (LENGTH, None, PACKED)),
    (blocks, (LENGTH, PADDING, PACKED // 3 - 1)),
)


@pytest.mark.parametrize(("masks", "call"), FAULTS)
def test_a_lost_rest_shows_in_the_numbers(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, masks: Masks, call: Call
) -> None:
    monkeypatch.setattr("graphopt.passes.masks.arguments", without_rest)
    (verdict,) = outcomes(Attend(masks, attention_chunk_size=3), [call])
    assert not verdict.ok and "bias" not in watch.told[0]


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(("masks", "call"), FAULTS)
def test_a_lost_rest_is_seen_by_the_probe(
    watch: Watch, monkeypatch: pytest.MonkeyPatch, masks: Masks, call: Call, dynamic: bool
) -> None:
    """The mask then stays the tensor that it is. The dynamic one is compiled where chunks are causal."""

    def sorter(keep: Truth, empty: MaskForm, space: Space) -> MaskForm | str:
        form = sorted_form(keep, empty, space)
        return form if isinstance(form, str) else replace(form, rest=None)

    monkeypatch.setattr("graphopt.masks.classification.sorted_form", sorter)
    program = Attend(masks, attention_chunk_size=3)
    length = 3 if dynamic else LENGTH
    first: Call = (length, *(x if x is None else x[:, :length].clone() for x in call[1:]))
    assert told(watch, program, [first, call], dynamic) == {"bias(bool)"}
    assert watch.refused and all(r.startswith("probe disagrees at ") for r in watch.refused)
