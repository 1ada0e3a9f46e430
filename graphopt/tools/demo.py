"""The main job: a trained encoder and a generating decoder, compared with eager, all measured now; then the
decoder in int8, over two processes, and compiled for a GPU.
"""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING

import torch
from rich.padding import Padding
from rich.text import Text
from torch import nn

from graphopt import backend
from graphopt.errors import GraphoptError
from graphopt.report import Report
from graphopt.tools import demo_models as models
from graphopt.tools.demo_clock import Comparison, compare, processor, threads
from graphopt.tools.demo_scale import elsewhere, ranks, smaller
from graphopt.tools.demo_show import Show
from graphopt.tools.demo_watch import calls_in, layer_diff, operators, watched_step

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

COSINE = 0.9999
BATCH = 16  # sentences encoded at a time, longest first: the page becomes batches of three lengths
STRICT = {"strict": True}  # an internal failure or an unknown construct raises instead of running eagerly


def main() -> None:
    """Run all parts and print; exits with status 1 if a check fails."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # read when transformers is imported: the weights are in a package
    warnings.filterwarnings("ignore", message=".*lru_cache.*")  # torch's tracer, about transformers' code
    start = time.perf_counter()
    show = Show()
    try:
        title = f"graphopt {version('graphopt')} on torch {torch.__version__}, {processor()}"
        show.console.print(Text(title))
        encoder(show)
        decoder(show)
        smaller(show)
        ranks(show)
        elsewhere(show)
    except GraphoptError as error:
        show.check("error", False, f"{type(error).__name__}: {error}")
    show.title(f"{_verdict(show)} in {time.perf_counter() - start:.0f} s")
    if show.failed:
        sys.exit(1)


def _verdict(show: Show) -> str:
    return f"failed: {', '.join(show.failed)}" if show.failed else "all checks passed"


# ------------------------------------------------------------------------------------------- the encoder


def encoder(show: Show) -> None:
    """MiniLM through sentence-transformers: a page of sentences, against the unmodified model."""
    show.title("1  MiniLM, a trained sentence encoder, through sentence-transformers")
    plain, ours, page = models.encoder(), models.encoder(), models.sentences()
    ours.compile(backend="graphopt", dynamic=True, options=STRICT)
    backend.clear_reports()

    def encode(model: Callable[..., object]) -> torch.Tensor:
        return torch.as_tensor(model.encode(page, batch_size=BATCH))  # type: ignore[attr-defined]

    expected, (got, seconds) = encode(plain), _timed(lambda: encode(ours))
    reports = backend.reports()
    batches = -(-len(page) // BATCH)
    text = f"{_graphs(reports)} for {batches} batches of other sizes and lengths, in {seconds:.1f} s"
    show.check("compiled", 0 < len(reports) < batches and not _fallbacks(reports), text)
    _coverage(show, reports, _encoder_parts(plain))
    cosine = torch.cosine_similarity(expected.double(), got.double()).min().item()
    text = f"{len(page)} sentences, cosine with the unmodified model's at least {cosine:.9f}"
    show.check("embeddings", cosine >= COSINE, text)
    with threads(1):
        _speed(show, "a page", compare(lambda: encode(plain), lambda: encode(ours), turns=9))


def _encoder_parts(model: nn.Module) -> dict[str, tuple[str, int]]:
    """What the module tree of a BERT has: name -> (ops that it may become, how many)."""
    layers = sum(name.endswith("attention.self") for name, _ in model.named_modules())
    linears = [n for n, m in model.named_modules() if isinstance(m, nn.Linear) and "pooler" not in n]
    return {
        "norms": ("layer_norm add_layer_norm", sum(isinstance(m, nn.LayerNorm) for m in model.modules())),
        "attentions": ("attention", layers),
        "activations": ("activation", layers),
        "linears": ("linear", len(linears)),
    }


# ------------------------------------------------------------------------------------------- the decoder


def decoder(show: Show) -> None:
    """A Llama that generates with a static cache: the same tokens as eager, and what became of a layer."""
    model = models.llama()
    size = sum(p.numel() for p in model.parameters()) / 1e6
    show.title(f"2  A Llama of {models.LAYERS} layers, {size:.0f} M weights: HF generate with a static cache")
    measured = models.spread(model, models.prompts(1)[0])
    low, high = min(measured.attention), max(measured.attention)
    text = (
        f"standard deviation of attention logits {low:.1f} to {high:.1f}, of outputs {measured.outputs:.1f}"
    )
    show.check("weights", low >= 1 and high <= 3 and 0.5 <= measured.outputs <= 2, text)
    _generation(show, model)
    _layer(show, model)


def _generation(show: Show, model: LlamaForCausalLM) -> None:
    """Three prompts, greedily, eager and compiled."""
    from transformers import CompileConfig

    config = CompileConfig(backend="graphopt", mode=None, options=STRICT)
    config._compile_all_devices = True  # transformers compiles on accelerators only, unless told to

    def generate(prompt: torch.Tensor, **how: object) -> torch.Tensor:
        tokens = model.generate(
            prompt, max_new_tokens=models.NEW, do_sample=False, cache_implementation="static", **how
        )
        return torch.as_tensor(tokens)

    def eager(prompt: torch.Tensor) -> torch.Tensor:
        return generate(prompt, disable_compile=True)

    def ours(prompt: torch.Tensor) -> torch.Tensor:
        return generate(prompt, compile_config=config)

    prompts = models.prompts(3)
    backend.clear_reports()
    expected = [eager(p) for p in prompts]
    before = len(backend.reports())
    first, seconds = _timed(lambda: ours(prompts[0]))
    got = [first, *(ours(p) for p in prompts[1:])]
    reports = backend.reports()
    text = f"{len(reports)} call of the backend in {len(prompts)} x generate, {seconds:.1f} s the first time"
    show.check("compiled", len(reports) == 1 and before == 0 and not _fallbacks(reports), text)
    same = sum(int((a == b)[:, models.PROMPT :].sum()) for a, b in zip(expected, got, strict=True))
    different = len({tuple(tokens[0].tolist()) for tokens in got})
    text = f"{same} of {len(prompts) * models.NEW} generated tokens are eager's ({different} different texts)"
    show.check("tokens", same == len(prompts) * models.NEW and different == len(prompts), text)
    _coverage(show, reports, _decoder_parts(model))
    show.console.print(Padding(reports[0], (1, 0, 1, 3)))
    with threads(1):
        turns = compare(lambda: eager(prompts[0]), lambda: ours(prompts[0]), turns=7)
    _speed(show, f"{models.NEW} tokens", turns)


def _decoder_parts(model: LlamaForCausalLM) -> dict[str, tuple[str, int]]:
    """What the module tree of a Llama has."""
    layers = len(model.model.layers)
    norms = sum(type(m).__name__.endswith("RMSNorm") for m in model.modules())
    return {
        "norms": ("rms_norm add_rms_norm", norms),
        "ropes": ("rope", layers),
        "attentions": ("attention", layers),
        "gates": ("gated_activation", layers),
        "cache writes": ("cache_update", 2 * layers),
        "linears": ("linear", sum(isinstance(m, nn.Linear) for m in model.modules())),
    }


def _layer(show: Show, model: LlamaForCausalLM) -> None:
    """Calls of a decoder layer before and after, and its diff; identical layers are shown once."""
    watched, token = watched_step(model)
    middle = f"model.layers.{models.LAYERS // 2}"
    before, after = (calls_in(watched.graphs[stage], middle) for stage in ("captured", "lower"))
    text = (
        f"{before.total} calls captured ({before.views} views), {after.total} lowered ({after.views} views)"
    )
    show.check("a layer", after.total < before.total, text)
    eager, ours = operators(lambda: model(**token)), operators(watched.again)
    show.check("operators", ours < eager, f"{eager} run in a decode step of eager, {ours} in ours")
    show.console.print()
    show.console.print(
        Text("   A decoder layer before and after the rules (graphopt.diff, equal layers once):")
    )
    lines = list(layer_diff(watched.graphs["canonicalize"], watched.graphs["merge"], middle, models.LAYERS))
    for line in lines:
        line.truncate(show.console.width - 4, overflow="ellipsis")
        show.console.print(Padding(line, (0, 0, 0, 3)))
    show.check("diff", bool(lines), f"{len(lines)} lines for {models.LAYERS} layers")


# ---------------------------------------------------------------------------------------------- shared


def _coverage(show: Show, reports: tuple[Report, ...], parts: Mapping[str, tuple[str, int]]) -> None:
    """Whether each compiled graph has an op for every part of the module tree, and what it leaves."""
    complete = bool(reports)
    found: dict[str, int] = {}
    for report in reports:
        counts = report.counts
        found = {part: sum(counts.get(op, 0) for op in ops.split()) for part, (ops, _) in parts.items()}
        complete = complete and all(found[part] == number for part, (_, number) in parts.items())
    text = ", ".join(f"{found.get(part, 0)} of {number} {part}" for part, (_, number) in parts.items())
    show.check("recognised", complete, text)
    share = max((r.unmatched_share for r in reports), default=1.0)
    show.check("unmatched", share == 0, f"{share:.1%} of the FLOPs")


def _speed(show: Show, what: str, turns: Comparison) -> None:
    eager, ours = (1000 * s for s in turns.seconds)
    text = f"{what}: eager {eager:.0f} ms, graphopt {ours:.0f} ms, {turns.speedup:.2f} x as fast"
    show.note("time", f"{text} (medians of {len(turns.a)} turns, one thread)")


def _graphs(reports: tuple[Report, ...]) -> str:
    return f"{len(reports)} graph{'' if len(reports) == 1 else 's'}"


def _fallbacks(reports: tuple[Report, ...]) -> list[str]:
    return [r.fallback for r in reports if r.fallback]


def _timed(call: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


if __name__ == "__main__":
    main()
