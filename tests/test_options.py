"""Options: plain values, checked by name, type and value, with the nearest right one in the error."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from graphopt.defaults import pipeline
from graphopt.errors import OptionError
from graphopt.options import VALUES, OneOf, Options
from graphopt.passes.quantize import Quantize


def test_nothing_given_is_the_defaults() -> None:
    assert Options.parse(None) == Options.parse({}) == Options() == Options(False, True, "auto", True)


def test_each_value_of_each_option_is_taken() -> None:
    for name, values in VALUES.items():
        for value in values.known if isinstance(values, OneOf) else (values.default,):
            assert getattr(Options.parse({name: value}), name) == value


def test_the_table_of_values_names_every_option_and_its_default_first() -> None:
    assert {f.name: f.default for f in dataclasses.fields(Options)} == {
        k: v.default for k, v in VALUES.items()
    }


def test_options_are_plain_comparable_values() -> None:
    assert Options.parse({"strict": True}) == Options.parse({"strict": True}) != Options()
    assert hash(Options.parse({"merge": False})) == hash(Options(merge=False))
    with pytest.raises(dataclasses.FrozenInstanceError):
        Options().strict = True  # type: ignore[misc]  # that it cannot be set is the point


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strikt": True}, "no option 'strikt'; did you mean 'strict'?"),
        ({"Merge": True}, "no option 'Merge'; did you mean 'merge'?"),
        ({"triton.cudagraphs": True}, "no option 'triton.cudagraphs'; did you mean 'cuda_graphs'?"),
        ({3: True}, "no option 3; known are"),
        ({"strict": "True"}, "'strict' is 'True'; did you mean True?"),
        ({"strict": 1}, "'strict' is 1; known are False, True"),
        ({"strict": None}, "'strict' is None; known are"),
        ({"merge": torch.ones(2)}, r"'merge' is tensor\(\[1., 1.\]\); known are True, False"),
        ({"target": "gpu"}, "'target' is 'gpu'; did you mean 'cpu'?"),
        ({"target": "cuda:91"}, "'target' is 'cuda:91'; did you mean 'cuda:90'?"),
        ({"target": True}, "'target' is True; known are 'auto', 'cpu', 'cuda:80'"),
        ({"quantize": "int9"}, "'quantize' is 'int9'; did you mean 'int8'?"),
        ({"quantize": True}, "'quantize' is True; known are None, 'int8'"),
        ({"quantize": "int8", "quantize_group": 0}, "'quantize_group' is 0; it takes a whole number, 1 or"),
        ({"quantize": "int8", "quantize_group": True}, "'quantize_group' is True; it takes a whole number"),
        ({"quantize": "int8", "quantize_group": 64.0}, "'quantize_group' is 64.0; it takes a whole number"),
        ({"quantize": "int8", "quantize_exclude": "lm_head"}, "is 'lm_head'; it takes a tuple of names, as"),
        ({"quantize": "int8", "quantize_exclude": (1,)}, r"is \(1,\); it takes a tuple of names"),
        ({"quantize": "int8", "quantize_exclude": ("",)}, r"is \('',\); it takes a tuple of names"),
        ({"quantize_group": 32}, "'quantize_group' does nothing alone; give quantize='int8' with it"),
        ({"quantize_exclude": ["lm_head"]}, "'quantize_exclude' does nothing alone; give quantize='int8'"),
        ("strict", "options is 'strict'; it takes a dict"),
    ],
)
def test_what_is_wrong_is_named_with_what_is_right(given: object, message: str) -> None:
    with pytest.raises(OptionError, match=message.replace("?", r"\?")):
        Options.parse(given)  # type: ignore[arg-type]  # that is what is tested


def test_an_option_error_is_a_value_error() -> None:
    with pytest.raises(ValueError):
        Options.parse({"strict": "no"})


def test_a_list_of_names_is_kept_as_a_tuple() -> None:
    options = Options.parse({"quantize": "int8", "quantize_exclude": ["lm_head", "*.gate"]})
    assert options.quantize_exclude == ("lm_head", "*.gate") and hash(options) != hash(Options())


def test_quantize_is_there_on_request_and_before_lowering() -> None:
    assert "quantize" not in [p.name for p in pipeline().passes]
    steps = pipeline(Options(quantize="int8", quantize_group=32, quantize_exclude=("lm_head",))).passes
    names = [p.name for p in steps]
    assert names.index("merge") < names.index("quantize") < names.index("lower")
    assert Quantize("int8", 32, ("lm_head",)) in steps
    assert pipeline(Options(quantize="int8"), until="quantize").exactness == "lossy"


def test_merge_is_left_out_on_request() -> None:
    names = [p.name for p in pipeline(Options(merge=False)).passes]
    assert names == [p.name for p in pipeline().passes if p.name != "merge"] and "lower" in names
