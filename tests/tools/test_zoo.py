"""graphopt.tools.zoo: the shrink, the census, the judge beside a compiler, workers, tables, comparisons."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from typer.testing import CliRunner

from graphopt import backend
from graphopt.errors import OptionError
from graphopt.tools import cli
from graphopt.tools.zoo import run
from graphopt.tools.zoo.build import build, kinds, tiny_config, tiny_model, zoo_types
from graphopt.tools.zoo.census import normalises, watching
from graphopt.tools.zoo.command import update_golden
from graphopt.tools.zoo.row import TOKENS, Row, Run
from graphopt.tools.zoo.shrink import HEAD_DIM, VOCABULARY, shrink
from graphopt.tools.zoo.sizes import SIZES_OF
from graphopt.tools.zoo.table import details, lost, miscounted, read, table, totals, write, wrong
from graphopt.tools.zoo.weights import fill, in_dtype, scale
from graphopt.tools.zoo.workers import Worker, examined
from tests.tolerances import DRAWN

ROOT = Path(__file__).resolve().parents[2]

# ------------------------------------------------------------------------------------------------ shrink


def test_sizes_are_small_and_ugly() -> None:
    config = shrink(transformers.LlamaConfig(num_key_value_heads=8))
    assert config.num_key_value_heads < config.num_attention_heads
    assert config.head_dim * config.num_attention_heads != config.hidden_size
    assert config.vocab_size == VOCABULARY and config.pad_token_id in (0, None)


def test_sub_configs_are_shrunk_and_changes_reach_them() -> None:
    config = shrink(transformers.CLIPConfig(), {"text_config.num_hidden_layers": 1, "projection_dim": 8})
    assert config.text_config.num_hidden_layers == 1 and config.vision_config.num_hidden_layers == 2
    assert config.vision_config.image_size == 24 and config.projection_dim == 8


def test_one_layer_of_each_kind_stays() -> None:
    kinds_of = ["sliding_attention"] * 5 + ["full_attention"]
    config = shrink(transformers.Gemma3TextConfig(num_hidden_layers=12, layer_types=kinds_of * 2))
    assert config.num_hidden_layers == 2 and set(config.layer_types) == set(kinds_of)


def test_tokens_are_inside_the_vocabulary() -> None:
    config = shrink(transformers.Gemma3Config())
    assert config.image_token_id < VOCABULARY
    assert config.text_config.eos_token_id == 2


def test_rotary_sections_fit_the_head() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [16, 24, 24]}
    config = shrink(transformers.AutoConfig.for_model("qwen2_vl_text", rope_parameters=rope))
    assert sum(config.rope_parameters["mrope_section"]) <= HEAD_DIM // 2


def test_mel_bins_are_more_than_the_subsampling_swallows() -> None:
    config = shrink(transformers.AutoConfig.for_model("parakeet_ctc")).encoder_config
    assert config.num_mel_bins == 2 * config.subsampling_factor


def test_sizes_that_differ_from_layer_to_layer_are_never_read_as_one() -> None:
    config = shrink(transformers.AutoConfig.for_model("dots3_note_text"), SIZES_OF["dots3_note_text"])
    latent, local = config.per_layer_config[0], config.per_layer_config[2]
    assert latent.num_key_value_heads == latent.num_attention_heads == 4
    assert local.kv_lora_rank > latent.kv_lora_rank


def test_a_type_with_several_classes_of_a_head_gets_its_first() -> None:
    assert type(build(tiny_config("deit"))).__name__ == kinds()["deit"].architecture


def test_the_size_table_names_types_that_exist() -> None:
    newest = tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 24)
    unknown = SIZES_OF.keys() - kinds().keys()
    assert not unknown or not newest, "types that transformers does not have; remove their rows"


def test_types_have_heads_and_image_types_attend() -> None:
    types = zoo_types()
    assert {"llama", "bert", "t5", "whisper", "vit", "clip"} <= set(types) and len(types) == len(set(types))
    assert "resnet" not in types
    with pytest.raises(OptionError, match="no model of type 'none'"):
        build(_typed("none"))


def _typed(name: str) -> transformers.PretrainedConfig:
    config = transformers.PretrainedConfig()
    config.model_type = name
    return config


# ------------------------------------------------------------------------------------------------ census


class Scores(nn.Module):
    """Attention by hand; with `values` off, the softmax is read by a weight only."""

    def __init__(self, values: bool, weight: bool = False) -> None:
        super().__init__()
        self.values, self.w = values, nn.Parameter(torch.randn(6, 6)) if weight else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = x @ (x.mT if self.w is None else self.w.t())
        probabilities = F.dropout(torch.softmax(scores / 2, -1), 0.0)
        return probabilities.contiguous() @ x if self.values else probabilities


@pytest.mark.parametrize(
    ("model", "wanted"), [(Scores(True), 1), (Scores(False), 0), (Scores(True, weight=True), 0)]
)
def test_an_attention_is_a_softmax_between_two_products(model: nn.Module, wanted: int) -> None:
    with torch.no_grad(), watching(model) as seen:
        model(torch.randn(2, 6, 6))
    assert seen.counts["attention"] == wanted == len(seen.logits)


class Scaled(nn.Module):
    """Called a norm, but an affine map."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * 2


class FakeNorm(Scaled):
    """Its name ends in norm."""


@pytest.mark.parametrize(
    ("module", "wanted"),
    [
        (nn.LayerNorm(8), True),
        (nn.RMSNorm(8), True),
        (FakeNorm(), False),
        (nn.BatchNorm1d(5).eval(), False),
        (nn.GroupNorm(5, 5), False),  # forgets each row's scale, too; its weights lie along the channels
        (nn.GroupNorm(1, 5), False),
    ],
)
def test_a_norm_forgets_the_scale_of_each_row(module: nn.Module, wanted: bool) -> None:
    assert normalises(module, (torch.randn(3, 5, 8),), {}) is wanted


def test_functions_count_like_modules() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.act, self.up = nn.LayerNorm(4), nn.SiLU(), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.layer_norm(self.norm(x + x), (4,)) + F.gelu(self.up(x)) + self.act(x)

    counts = _counts(Both(), torch.randn(2, 4))
    assert counts == {"norm": 2, "norm of a sum": 1, "mlp": 2, "linear": 1}


class MatrixExperts(nn.Module):
    """Called experts, but one product."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.weight


class StackedExperts(nn.Module):
    """Experts on stacked weights."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(2, 4, 4)) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.silu(x @ self.up[0]) @ self.down[0]


class NamedExperts(nn.ModuleDict):
    """Experts by their names."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(expert(x) for expert in self.values())  # type: ignore[return-value]


class ListOfExperts(nn.Module):
    """Experts in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.SiLU()) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(expert(x) for expert in self.experts)  # type: ignore[return-value]


class TwoProducts(nn.Module):
    """Experts of two products."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = MatrixExperts(), MatrixExperts()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.up(x)))


@pytest.mark.parametrize(
    ("make", "experts"),
    [
        (StackedExperts, 1),
        (lambda: NamedExperts({"a": nn.Sequential(nn.Linear(4, 4), nn.SiLU())}), 1),
        (ListOfExperts, 1),
        (TwoProducts, 1),
        (MatrixExperts, 0),
        (lambda: nn.Sequential(ListOfExperts(), StackedExperts(), nn.SiLU()), 2),
    ],
)
def test_experts_are_counted_by_blocks(make: Callable[[], nn.Module], experts: int) -> None:
    """A block once, however its experts are kept; what is inside is no MLP besides."""
    model = make()
    counts = _counts(model, torch.randn(2, 4))
    assert counts.get("experts", 0) == experts
    assert counts.get("mlp", 0) == isinstance(model, nn.Sequential)


def _counts(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    with torch.no_grad(), watching(model) as seen:
        model(x)
    return {name: n for name, n in seen.counts.items() if n}


def test_watching_leaves_the_model_as_it_was() -> None:
    model = build(tiny_config("llama"))
    file = sys.modules[type(model).__module__]
    before = file.apply_rotary_pos_emb
    with watching(model):
        assert file.apply_rotary_pos_emb is not before
    assert file.apply_rotary_pos_emb is before
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


# ------------------------------------------------------------------------------------------------ weights


def test_norms_keep_their_constant_and_matrices_have_unit_gain() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.LayerNorm(400), nn.Linear(400, 300))
    with torch.no_grad():
        fill(model)
    norm, linear = model
    assert abs(float(norm.weight.mean()) - 1) < DRAWN < float(norm.weight.std())
    assert abs(float(linear.weight.std()) * 20 - 1) < DRAWN and abs(float(linear.bias.std()) - 0.3) < DRAWN


def test_scaling_finds_the_weight_that_logits_are_proportional_to() -> None:
    class Attend(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.q, self.out = nn.LayerNorm(16), nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            x = self.norm(x)
            return {"y": self.out(F.scaled_dot_product_attention(self.q(x), x, x))}

    torch.manual_seed(0)
    model, given = Attend().eval().requires_grad_(False), {"x": 9 * torch.randn(1, 2, 7, 16)}
    norm = model.norm.weight.clone()
    with torch.no_grad():
        scale(model, given)
        with watching(model) as seen:
            output = model(**given)["y"]
    assert abs(float(seen.logits[0].std()) - 2) < DRAWN and abs(float(output.std()) - 1) < DRAWN
    assert torch.equal(model.norm.weight, norm)
    assert not any(p.requires_grad for p in model.parameters())


def test_what_has_no_gradient_keeps_unit_gain() -> None:
    class Reversible(torch.autograd.Function):
        @staticmethod
        def forward(_: object, x: torch.Tensor) -> torch.Tensor:
            return x * 9

        @staticmethod
        def backward(_: object, *__: torch.Tensor) -> torch.Tensor:
            raise AssertionError("only in training")

    class Layers(nn.Linear):
        def forward(self, input: torch.Tensor) -> dict[str, torch.Tensor]:
            return {"y": Reversible.apply(super().forward(input))}

    model = Layers(4, 4).requires_grad_(False)
    weight = model.weight.clone()
    scale(model, {"input": torch.randn(3, 4)})
    assert torch.equal(model.weight, weight) and not model.weight.requires_grad


def test_what_a_model_keeps_in_fp32_stays() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model._keep_in_fp32_modules_strict = {"1.weight"}  # type: ignore[assignment]
    in_dtype(model, torch.bfloat16)
    assert [p.dtype for p in model.parameters()] == [
        torch.bfloat16,
        torch.bfloat16,
        torch.float32,
        torch.bfloat16,
    ]


def test_buffers_are_in_the_dtype_that_their_class_makes_them_in() -> None:
    class Tables(nn.Module):
        def __init__(self, config: transformers.PretrainedConfig) -> None:
            super().__init__()
            self.config = config
            self.register_buffer("positions", torch.ones(2))
            self.register_buffer("frequencies", torch.ones(2, dtype=torch.float32))
            self.register_buffer("places", torch.ones(2, dtype=torch.int64))
            self.register_buffer("codec", torch.ones(2))

    model = Tables(transformers.PretrainedConfig())
    model._keep_in_fp32_modules_strict = ["codec"]  # type: ignore[assignment]
    in_dtype(model, torch.bfloat16)
    dtypes = {name: buffer.dtype for name, buffer in model.named_buffers()}
    assert dtypes == {
        "positions": torch.bfloat16,
        "frequencies": torch.float32,
        "places": torch.int64,
        "codec": torch.float32,
    }
    assert model.positions.tolist() == [1, 1] and torch.get_default_dtype() == torch.float32
    assert model.config.dtype == torch.bfloat16


# ------------------------------------------------------------------------------------------------ judging


class Doubled(nn.Module):
    """A graph of one linear."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2 * self.linear(x)


def judged(model: nn.Module, x: torch.Tensor) -> Run:
    return run._run(model.eval().requires_grad_(False), {"x": x}, None, torch.float32)


def test_a_right_graph_is_right() -> None:
    found = judged(Doubled(), torch.randn(2, 4))
    assert found.right and found.graphs == found.judged == 1 and found.found["linear"] == 1


def test_a_wrong_graph_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = backend.graphopt

    def broken(gm: torch.fx.GraphModule, examples: list[object], **kwargs: object) -> Callable[..., object]:
        inner = real(gm, examples, **kwargs)  # type: ignore[arg-type]
        return lambda *args: tuple(1.01 * x for x in inner(*args))  # type: ignore[attr-defined]

    monkeypatch.setattr(backend, "graphopt", broken)
    found = judged(Doubled(), torch.randn(2, 4))
    assert not found.right and "rmse" in found.wrong[0]


def test_a_refused_graph_is_named_and_not_judged() -> None:
    class Complex(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (torch.view_as_complex(x) * 1j).conj().abs()

    found = judged(Complex(), torch.randn(2, 4, 2))
    assert found.refused and found.handed_back == found.graphs == 1 and found.judged == 0


@pytest.fixture(scope="module")
def writer() -> nn.Module:
    return tiny_model("gpt2")


def decoded(model: nn.Module) -> Row:
    row = Row("gpt2", "causal LM")
    with torch.no_grad():
        run._decode(row, model)
    torch.compiler.reset()
    assert model._compiled_call_impl is None
    return row


def test_greedy_tokens_are_compared_and_each_call_is_judged(writer: nn.Module) -> None:
    row = decoded(writer)
    assert row.decoded is not None and row.decoded.right and row.undecoded is None
    assert row.decoded.graphs == row.decoded.judged == TOKENS
    assert row.decoded.tokens == TOKENS * 3, "of each row of the prompt"
    assert row.decoded.found["attention"] == TOKENS * 2, "layers"


def test_another_greedy_token_is_wrong(writer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    real = backend.graphopt

    def negated(gm: torch.fx.GraphModule, examples: list[object], **kwargs: object) -> Callable[..., object]:
        inner = real(gm, examples, **kwargs)  # type: ignore[arg-type]
        return lambda *args: tuple(-x if x.shape[-1] > 64 else x for x in inner(*args))  # type: ignore[attr-defined]

    monkeypatch.setattr(backend, "graphopt", negated)
    row = decoded(writer)
    assert row.decoded is not None and any(text.startswith("greedy tokens") for text in row.decoded.wrong)
    assert row.decoded.tokens < TOKENS * 3
    assert any("float32 decoded" in text for text in wrong([row]))


def test_what_eager_cannot_decode_is_told(writer: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**given: object) -> torch.Tensor:
        raise ValueError("no tokens here")

    monkeypatch.setattr(writer, "generate", refuse)
    row = decoded(writer)
    assert row.decoded is None and row.undecoded == "ValueError: no tokens here"
    assert details([row]) == ["gpt2 (float32): not decoded, for eager raises ValueError: no tokens here"]


def test_what_a_cache_loses_is_told() -> None:
    row = a_row(decoded=Run(graphs=2, judged=2, found={"norm": 3}))
    assert details([row]) == ["llama: decoding recognises less: norm 3 of 4"]


def test_what_fails_to_build_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> nn.Module:
        raise ValueError(f"no {name} here")

    monkeypatch.setattr(run, "tiny_model", refuse)
    row = run.examine("llama", [torch.float32])
    assert row.broken == "ValueError: no llama here" and not row.right


# ------------------------------------------------------------------------------------------- rows, tables


def a_row(norms: int = 2, **changes: object) -> Row:
    found = Run(
        graphs=1, judged=1, found={"norm": norms}, matched={"some_rms_norm": norms}, unmatched={"a": 0.5}
    )
    return Row(
        **{"type": "llama", "group": "causal LM", "there": {"norm": 2}, "runs": {"fp32": found}} | changes
    )  # type: ignore[arg-type]


def test_rows_are_kept_in_json(tmp_path: Path) -> None:
    rows = [a_row(decoded=Run(graphs=2, tokens=6)), Row("x", "causal LM", broken="no", undecoded="no head")]
    write(rows, tmp_path / "zoo.json", {"torch": "2"})
    assert read(tmp_path / "zoo.json") == tuple(rows)
    (tmp_path / "odd.json").write_text("[]")
    with pytest.raises(OptionError, match="make one with graphopt zoo --json"):
        read(tmp_path / "odd.json")


def test_the_short_row_has_what_all_runs_have() -> None:
    row = a_row()
    row.runs["bf16"] = Run(graphs=1, judged=1, found={"norm": 1}, matched={}, unmatched={"a": 0.7})
    short = row.short()
    (whole,) = short.runs.values()
    assert short.right and short.found("norm") == row.found("norm") == 1
    assert whole.unmatched == {"a": 0.7}
    row.runs["bf16"].wrong.append("rmse")
    assert not row.short().right


def test_what_an_equal_call_compiles_again_must_be_judged_too() -> None:
    row = a_row()
    row.runs["fp32"].recompiled = 1
    assert not row.right and not row.short().right
    row.runs["fp32"].judged = 2
    assert row.right and row.short().right


def test_lost_matches_are_told_with_their_rules() -> None:
    assert lost([a_row()], [a_row()]) == [] == lost([a_row()], [])
    fewer = a_row(1)
    fewer.runs["fp32"].misses = {"some_rms_norm": "at layers.0: eps differs"}
    (told,) = lost([fewer], [a_row().short()])
    assert told.splitlines() == [
        "llama: norm 2 -> 1; nearest misses now:",
        "    some_rms_norm at layers.0: eps differs",
    ]
    assert lost([Row("llama", "causal LM", broken="no")], [a_row()]) == ["llama is broken: no"]
    off = a_row()
    off.runs["fp32"].wrong = ["rmse"]
    assert lost([off], [a_row()]) == ["llama is no longer right: rmse"] and wrong([off])


def test_other_counts_than_the_golden_ones_are_told() -> None:
    assert not miscounted([a_row()], {"llama": {"norm": 2}}) and not miscounted([a_row()], {})
    assert "counts {'norm': 2}" in miscounted([a_row()], {"llama": {"norm": 3}})[0]


def test_the_golden_table_is_updated_by_type(tmp_path: Path) -> None:
    path = tmp_path / "golden.json"
    path.write_text('{"bert": {"norm": 1}}')
    update_golden([a_row(), Row("x", "causal LM", broken="no")], path)
    assert json.loads(path.read_text()) == {"bert": {"norm": 1}, "llama": {"norm": 2}}


def test_the_table_and_its_details_say_what_is_missing() -> None:
    from rich.console import Console

    row = a_row(1)
    row.runs["fp32"].misses = {"other_norm": "at layers.0: eps differs"}
    row.runs["fp32"].ends = ["nonzero's shape depends on data (model.py:3)"]
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(table([row, Row("x", "causal LM", broken="no such size")]))
    text = console.export_text()
    assert "1/2" in text and "50%" in text and "broken: no such size" in text
    assert details([row]) == [
        "llama: short of norm; nearest misses:",
        "    other_norm at layers.0: eps differs",
        "    graph break: nonzero's shape depends on data (model.py:3)",
    ]
    assert "norm 50.0% of 2" in str(totals([row]))


# ------------------------------------------------------------------------------------- workers, command


def task(name: str) -> dict[str, object]:
    return {"type": name, "group": "image", "dtypes": ["float32"], "paddings": ["none"]}


def test_a_process_examines_types_and_survives_a_dead_one(tmp_path: Path) -> None:
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\necho broken pipe of dreams >&2\nexit 3\n")
    dead.chmod(0o755)
    (row,) = examined([task("vit")], [Worker(python=str(dead))])
    assert row.broken == "the process ended: status 3, broken pipe of dreams"
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o755)
    (row,) = examined([task("vit")], [Worker(python=str(slow), limit=0.2)])
    assert row.broken == "not done in 0 s"


def started(words: list[str]) -> subprocess.CompletedProcess[str]:
    """The command as a user starts it: a process of its own, with its own streams."""
    command = [sys.executable, "-m", "graphopt.tools.cli", *words]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)


def test_the_command_writes_compares_and_fails(tmp_path: Path) -> None:
    full, golden = tmp_path / "zoo.json", tmp_path / "golden.json"
    words = ["zoo", "vit", "--dtype", "float32", "--json", str(full), "--golden", str(golden), "--update"]
    done = started(words)
    assert done.returncode == 0, done.stderr
    assert "1 types, 1 built, 1 right" in done.stdout
    (row,) = read(full)
    assert (
        row.right
        and list(row.runs) == ["float32 none"]
        and json.loads(golden.read_text())["vit"] == row.there
    )
    row.there["norm"] += 1
    row.runs["float32 none"].found["norm"] += 1
    write([row], full, {})
    golden.write_text(json.dumps({"vit": {**row.there}}))
    words = ["zoo", "vit", "--dtype", "float32", "--baseline", str(full), "--golden", str(golden)]
    done = started(words)
    assert done.returncode == 1 and "an eager run counts" in done.stderr, done.stderr


def test_an_unknown_type_is_named() -> None:
    done = CliRunner().invoke(cli.app, ["zoo", "lama"])
    assert done.exit_code == 2 and "did you mean 'llama'?" in done.output
