"""graphopt.tools.demo and its helpers: on small models every check passes, and each of them can fail."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
from rich.console import Console
from torch import nn

import graphopt
from graphopt.tools import demo, demo_clock, demo_models, demo_scale, demo_watch


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> demo.Show:
    """What the demo prints on; the models are made small and the timings short."""
    torch.compiler.reset()
    monkeypatch.setattr(demo_models, "LAYERS", 2)
    monkeypatch.setattr(demo_models, "NEW", 4)
    page = demo_models.sentences()[:6]
    monkeypatch.setattr(demo_models, "sentences", lambda: page)
    monkeypatch.setattr(demo, "BATCH", 2)
    monkeypatch.setattr(demo, "compare", lambda a, b, turns: demo_clock.compare(a, b, turns=1))
    return demo.Show(Console(file=io.StringIO(), width=120, highlight=False))


def text(show: demo.Show) -> str:
    assert isinstance(show.console.file, io.StringIO)
    return show.console.file.getvalue()


# --------------------------------------------------------------------------------------------- both parts


def test_the_encoder_passes(show: demo.Show) -> None:
    demo.encoder(show)
    assert not show.failed, text(show)
    assert "13 of 13 norms, 6 of 6 attentions" in text(show)
    assert "6 sentences, cosine" in text(show)


def test_another_encoder_fails(show: demo.Show, monkeypatch: pytest.MonkeyPatch) -> None:
    made = iter((demo_models.encoder(), _disturbed(demo_models.encoder())))
    monkeypatch.setattr(demo_models, "encoder", lambda: next(made))
    demo.encoder(show)
    assert show.failed == ["embeddings"]


def _disturbed(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("value.weight"):
                parameter.mul_(1.1)
    return model


def test_the_decoder_passes(show: demo.Show) -> None:
    demo.decoder(show)
    assert not show.failed, text(show)
    assert "1 call of the backend in 3 x generate" in text(show)
    assert "12 of 12 generated tokens are eager's" in text(show)
    assert "+ %attention" in text(show) and "- " in text(show)


def test_a_decoder_of_default_weights_fails(show: demo.Show, monkeypatch: pytest.MonkeyPatch) -> None:
    model = demo_models.llama()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.02)
    measured = demo_models.spread(model, demo_models.prompts(1)[0])
    assert max(measured.attention) < 0.5
    monkeypatch.setattr(demo_models, "llama", lambda: model)
    monkeypatch.setattr(demo, "_generation", lambda show, model: None)
    monkeypatch.setattr(demo, "_layer", lambda show, model: None)
    demo.decoder(show)
    assert show.failed == ["weights"]


def test_int8_weights_pass(show: demo.Show) -> None:
    demo.smaller(show)
    assert not show.failed, text(show)
    assert "15 weights: " in text(show) and "(26.6%)" in text(show)


def test_a_wrong_reference_of_int8_fails(show: demo.Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_scale, "fake_quantized", lambda model: model)
    demo.smaller(show)
    assert show.failed == ["logits"]


def test_two_processes_pass(show: demo.Show) -> None:
    demo.ranks(show)
    assert not show.failed, text(show)
    assert "on 2 of 2 ranks they are eager's" in text(show) and "5 all-reduces" in text(show)


def test_processes_that_do_not_start_fail(show: demo.Show, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo_scale.sys, "executable", "/bin/false")
    demo.ranks(show)
    assert show.failed == ["processes"]


def test_a_decode_step_compiled_for_a_gpu_passes(show: demo.Show) -> None:
    demo.elsewhere(show)
    assert not show.failed, text(show)
    assert "6 launches in a decoder layer" in text(show) and "_attention_split" in text(show)


def test_missing_ops_fail(show: demo.Show) -> None:
    report = graphopt.Report(counts={"attention": 1, "layer_norm": 2, "add_layer_norm": 1})
    parts = {"norms": ("layer_norm add_layer_norm", 3), "attentions": ("attention", 1)}
    demo._coverage(show, (report,), parts)
    assert not show.failed
    demo._coverage(show, (report, graphopt.Report(counts={"attention": 1})), parts)
    assert show.failed == ["recognised"]
    demo._coverage(show, (), parts)
    assert show.failed == ["recognised", "recognised", "unmatched"]


@pytest.mark.parametrize("ok", [True, False])
def test_the_exit_status_tells(
    show: demo.Show, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], ok: bool
) -> None:
    monkeypatch.setattr(demo, "encoder", lambda show: show.check("claim", ok, "a claim"))
    for part in ("decoder", "smaller", "ranks", "elsewhere"):
        monkeypatch.setattr(demo, part, lambda show: None)
    if ok:
        demo.main()
    else:
        with pytest.raises(SystemExit) as left:
            demo.main()
        assert left.value.code == 1
    assert ("all checks passed" if ok else "failed: claim") in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------- models


def test_the_page_is_of_unequal_sentences() -> None:
    lengths = [len(line.split()) for line in demo_models.sentences()]
    assert len(lengths) == 40
    assert min(lengths) == 1 and max(lengths) == 34


def test_the_weights_let_errors_show(show: demo.Show) -> None:
    measured = demo_models.spread(demo_models.llama(), demo_models.prompts(1)[0])
    assert len(measured.attention) == 2
    assert all(1 <= std <= 3 for std in measured.attention)
    assert 0.5 <= measured.outputs <= 2


def test_models_and_prompts_are_the_same_each_time(show: demo.Show) -> None:
    state = torch.get_rng_state()
    a, b = demo_models.llama(), demo_models.llama()
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    assert torch.equal(state, torch.get_rng_state())
    first, second = demo_models.prompts(2)
    assert torch.equal(first, demo_models.prompts(1)[0]) and not torch.equal(first, second)


# -------------------------------------------------------------------------------------------------- watch


class Block(nn.Module):
    """A layer with two linears of one input and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up, self.down = nn.Linear(6, 10), nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(nn.functional.silu(self.gate(x)) * self.up(x))


class Tower(nn.Module):
    """Three equal layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@pytest.fixture
def watched() -> demo_watch.Watched:
    torch.compiler.reset()
    backend, model, x = demo_watch.Watched(), Tower().eval(), torch.randn(4, 6)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), model(x))
    return backend


def test_a_watched_compilation_is_kept(watched: demo_watch.Watched) -> None:
    assert list(watched.graphs) == ["captured", "canonicalize", "recognise", "merge", "lower"]
    assert watched.report.counts["gated_activation"] == 3
    (result,) = watched.again()  # type: ignore[misc]  # a tuple of one tensor
    assert result.shape == (4, 6)


def test_calls_of_a_layer_are_counted(watched: demo_watch.Watched) -> None:
    captured = watched.graphs["captured"]
    assert demo_watch.calls_in(captured, "layers.1") == demo_watch.Calls(6, 0)
    assert demo_watch.calls_in(captured, "layers.1.down") == demo_watch.Calls(1, 0)
    assert demo_watch.calls_in(captured, "layers") == demo_watch.Calls(18, 0)
    assert demo_watch.calls_in(captured, "layers.3") == demo_watch.Calls(0, 0)
    lowered = demo_watch.calls_in(watched.graphs["lower"], "layers.1")
    assert lowered.total - lowered.views < 6


def test_operators_are_counted() -> None:
    x = torch.randn(3, 4)
    assert demo_watch.operators(lambda: x + 1) == 1
    assert demo_watch.operators(lambda: (x + 1).t().neg()) == 3
    assert demo_watch.operators(lambda: None) == 0


def test_a_layer_is_shown_once(watched: demo_watch.Watched) -> None:
    before, after = watched.graphs["canonicalize"], watched.graphs["merge"]
    lines = [line.plain for line in demo_watch.layer_diff(before, after, "layers.1", 3)]
    assert sum("gated_activation(" in line for line in lines) == 1
    assert "- linear x 2, silu, mul" in lines
    assert all(line.startswith(("@@ ", "- ", "+ ")) for line in lines)
    assert any("x 3" in line for line in lines)
    assert not list(demo_watch.layer_diff(before, before, "layers.1", 3))


# -------------------------------------------------------------------------------------------------- clock


def clock(*costs: float) -> tuple[Callable[[], float], Callable[[], None], Callable[[], None]]:
    """A clock, and two calls that take `costs[0]` and `costs[1]` seconds on it."""
    now = [0.0]

    def spend(seconds: float) -> Callable[[], None]:
        return lambda: now.__setitem__(0, now[0] + seconds)

    return lambda: now[0], spend(costs[0]), spend(costs[1])


def test_turns_are_compared() -> None:
    read, a, b = clock(2.0, 0.5)
    found = demo_clock.compare(a, b, turns=5, clock=read)
    assert found.a == (2.0,) * 5 and found.b == (0.5,) * 5
    assert found.seconds == (2.0, 0.5) and found.speedup == 4.0


def test_a_busy_moment_does_not_count() -> None:
    assert demo_clock.Comparison((2.0, 90.0, 2.0), (1.0, 45.0, 1.0)).speedup == 2.0
    assert demo_clock.Comparison((2.0, 90.0, 2.0), (1.0, 1.0, 1.0)).seconds == (2.0, 1.0)


def test_turns_alternate_who_is_first() -> None:
    order: list[str] = []
    demo_clock.compare(lambda: order.append("a"), lambda: order.append("b"), turns=3)
    assert "".join(order) == "ab" + "ab" + "ba" + "ab"


def test_threads_are_set_back() -> None:
    before = torch.get_num_threads()
    with pytest.raises(ValueError, match="stop"), demo_clock.threads(1):
        assert torch.get_num_threads() == 1
        raise ValueError("stop")
    assert torch.get_num_threads() == before


def test_the_processor_has_a_name_and_cores() -> None:
    assert "core" in demo_clock.processor()
