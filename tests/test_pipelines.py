"""Hugging Face `pipeline()` and sentence-transformers `encode` give through us what they give in eager."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
import torch
import transformers
from sentence_transformers import SentenceTransformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn

import graphopt
from graphopt import backend
from graphopt.tools import demo_models
from graphopt.tools.zoo.weights import fill
from tests.block import agree
from tests.generating import clean
from tests.models import encoder, zoo

STRICT = {"strict": True}
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[MASK]", "[UNK]")
TEXTS = ("w5 w9 w30 w12", "w77", "w61 w8 w8 w33 w20 w41 w19")
MASKED = ("w5 [MASK] w30 w12", "w77 w8 w9 [MASK]")


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """A clean start, and no traces."""
    with clean():
        yield


def tokenizer(size: int, frame: bool) -> transformers.PreTrainedTokenizerFast:
    """Words w5 to w<size - 1> are their numbers; `frame` puts [CLS] and [SEP] around them and pads right."""
    words = [*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), size))]
    built = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if frame:
        built.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=built, pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]",
        unk_token="[UNK]", padding_side="right" if frame else "left", model_max_length=64,
    )  # fmt: skip


def llama() -> nn.Module:
    """A Llama that never ends a text."""
    model = copy.deepcopy(zoo.model("llama"))
    model.generation_config.eos_token_id = None
    return model


def bert(kind: type[nn.Module], **fields: object) -> nn.Module:
    """The tiny BERT with another head."""
    trunk = zoo.model("bert")
    config = copy.deepcopy(trunk.config)
    config.update(fields)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(config).eval().requires_grad_(False)
        fill(model)
    model.base_model.load_state_dict(trunk.base_model.state_dict(), strict=False)
    return model


@dataclass(frozen=True)
class Task:
    """A pipeline's name, its model, what it is given, and how often attention is in one call (its layers)."""

    name: str
    model: Callable[[], nn.Module]
    texts: Sequence[str] = TEXTS
    how: Mapping[str, object] = field(default_factory=dict)


TASKS = (
    Task("text-generation", llama, how={"max_new_tokens": 6, "do_sample": False, "batch_size": 3}),
    Task(
        "text-classification",
        lambda: bert(transformers.BertForSequenceClassification, num_labels=4),
        how={"top_k": None, "batch_size": 2},
    ),
    Task("feature-extraction", lambda: bert(transformers.BertModel)),
    Task("fill-mask", lambda: copy.deepcopy(zoo.model("bert")), MASKED, {"top_k": 3}),
)


def compiled(model: nn.Module) -> None:
    """In place, by torch."""
    model.compile(backend="graphopt", options=STRICT)


def optimized(model: nn.Module) -> None:
    """In place, by us."""
    graphopt.optimize(model, strict=True)


@pytest.mark.parametrize(
    ("task", "how"),
    [(TASKS[0], optimized), (TASKS[1], compiled), (TASKS[2], optimized), (TASKS[3], compiled)],
    ids=[task.name for task in TASKS],
)
def test_a_pipeline_gives_what_it_gives_in_eager(task: Task, how: Callable[[nn.Module], None]) -> None:
    model = task.model()
    words = tokenizer(model.config.vocab_size, frame=model.config.model_type == "bert")

    def results() -> object:
        run = transformers.pipeline(task.name, model=model, tokenizer=words, device="cpu")
        return run(list(task.texts), **task.how)

    eager = results()
    assert not backend.reports()
    how(model)
    same(results(), eager)
    reports = backend.reports()
    assert 1 <= len(reports) <= 3 and not [r.fallback for r in reports if r.fallback]
    assert all(r.counts["attention"] == 2 and r.unmatched_share == 0 for r in reports)
    same(results(), eager)
    assert len(backend.reports()) == len(reports), "nothing is compiled twice"


def same(ours: object, eager: object) -> None:
    """Equal words and numbers; floats as close as fp32 is."""
    if isinstance(eager, dict):
        assert isinstance(ours, dict) and ours.keys() == eager.keys()
        same(list(ours.values()), list(eager.values()))
    elif isinstance(eager, list):
        assert isinstance(ours, list) and len(ours) == len(eager)
        for one, other in zip(ours, eager, strict=True):
            same(one, other)
    elif isinstance(eager, float):
        assert isinstance(ours, float)
        agree(torch.tensor(ours), torch.tensor(eager))
    else:
        assert ours == eager


# ------------------------------------------------------------------------------------ sentence-transformers


def optimize_whole(model: SentenceTransformer) -> SentenceTransformer:
    """All its modules: transformer, pooling, normalisation."""
    return graphopt.optimize(model, strict=True)


def compile_trunk(model: SentenceTransformer) -> SentenceTransformer:
    """Its transformer alone, by whoever `enable` says."""
    model[0].compile()
    return model


@pytest.mark.parametrize("how", [optimize_whole, compile_trunk])
def test_sentence_transformers_encode(how: Callable[[SentenceTransformer], SentenceTransformer]) -> None:
    sentences = [*encoder.SENTENCES, *encoder.SENTENCES[:2]]
    plain, ours = demo_models.encoder(), how(demo_models.encoder())
    eager = plain.encode(sentences, batch_size=3, convert_to_tensor=True)
    with graphopt.enable(strict=True):
        agree(ours.encode(sentences, batch_size=3, convert_to_tensor=True), eager)
        reports = backend.reports()
        ours.encode(sentences, batch_size=3)
    assert 1 <= len(reports) == len(backend.reports()) <= 3
    assert not [r.fallback for r in reports if r.fallback]
    assert all(r.counts["attention"] == 6 and r.unmatched_share == 0 for r in reports)
