"""A tiny random model of any transformers type, with the head that the type is known for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from graphopt.errors import OptionError
from graphopt.tools.zoo.inputs import configs, example
from graphopt.tools.zoo.shrink import shrink
from graphopt.tools.zoo.sizes import SIZES_OF
from graphopt.tools.zoo.weights import fill, scale

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MOST_PARAMETERS = 8_000_000  # of a tiny model; more means that a size escaped the shrink
# Head's mapping in transformers -> the class that builds it, in the order in which a type looks for its own.
HEADS = (
    ("masked LM", "MODEL_FOR_MASKED_LM_MAPPING_NAMES", "AutoModelForMaskedLM"),
    ("encoder-decoder", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES", "AutoModelForSeq2SeqLM"),
    ("speech", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES", "AutoModelForSpeechSeq2Seq"),
    ("causal LM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES", "AutoModelForCausalLM"),
    ("speech", "MODEL_FOR_CTC_MAPPING_NAMES", "AutoModelForCTC"),
    (
        "image",
        "MODEL_FOR_ZERO_SHOT_IMAGE_CLASSIFICATION_MAPPING_NAMES",
        "AutoModelForZeroShotImageClassification",
    ),
    ("image", "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES", "AutoModelForImageClassification"),
    ("other", "MODEL_MAPPING_NAMES", "AutoModel"),
)
GROUPS = ("causal LM", "masked LM", "encoder-decoder", "speech", "image")


@dataclass(frozen=True)
class Kind:
    """What a type is built as: its head's group, transformers' names of the head's and the model's class."""

    group: str
    auto: str
    architecture: str


def kinds() -> dict[str, Kind]:
    """Model type -> what it is built as, for every type with one of these heads."""
    from transformers.models.auto import modeling_auto

    found: dict[str, Kind] = {}
    for group, mapping, auto in HEADS:
        for name, architecture in getattr(modeling_auto, mapping, {}).items():
            first = architecture if isinstance(architecture, str) else architecture[0]
            found.setdefault(name, Kind(group, auto, first))
    return found


def zoo_types() -> tuple[str, ...]:
    """The zoo's types: all with a head, by group and name; of the image models those that have attention."""
    found = [(GROUPS.index(kind.group), t) for t, kind in kinds().items() if kind.group in GROUPS]
    image = GROUPS.index("image")
    return tuple(t for group, t in sorted(found) if group != image or _attends(t))


def _attends(model_type: str) -> bool:
    """Whether a type's config, or one inside it, has attention heads; one without defaults counts as if."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(model_type)
    except Exception:
        return True  # its row says why it does not build
    return any(isinstance(getattr(c, "num_attention_heads", None), int) for c in configs(config))


def tiny_config(model_type: str) -> PretrainedConfig:
    """The config of a type, shrunk. Raises what transformers raises for a type without defaults."""
    from transformers import AutoConfig

    config = shrink(AutoConfig.for_model(model_type), SIZES_OF.get(model_type))
    for part in configs(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    return config


def build(config: PretrainedConfig) -> torch.nn.Module:
    """A model of a config, with torch's random weights, in eval mode and without gradients.

    Raises OptionError for a type without a head, and for a model that is not tiny (on a real device).
    """
    import transformers

    kind = kinds().get(config.model_type)
    if kind is None:
        raise OptionError(f"transformers has no model of type {config.model_type!r} to build")
    auto = getattr(transformers, kind.auto)
    if config.architectures is None:
        config.architectures = [kind.architecture]  # as a checkpoint has it; chosen by it among several
    try:
        model = auto.from_config(config)
    except AttributeError:  # a composite whose head takes the decoder's config
        inner = config.get_text_config(decoder=True)
        if inner is config:
            raise
        model = getattr(transformers, kind.architecture)(inner)
    return model.eval().requires_grad_(False)


def tiny_model(model_type: str) -> torch.nn.Module:
    """A tiny fp32 model of a type with weights that let errors show; the same weights in every process.

    All parameters are bf16 numbers, so that they are the same in every dtype.

    Raises whatever the type's classes raise; ValueError where a size escaped the shrink.
    """
    config = tiny_config(model_type)
    with torch.device("meta"):
        shapes = build(config)
    if (size := sum(p.numel() for p in shapes.parameters())) > MOST_PARAMETERS:
        path, largest = max(shapes.named_parameters(), key=lambda item: item[1].numel())
        raise ValueError(
            f"{size / 1e6:.0f}M parameters ({path} is {list(largest.shape)}); give its size in zoo/sizes.py"
        )
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(sum(map(ord, model_type)))
        model = build(config)
        fill(model)
        scale(model, example(model))
        for parameter in model.parameters():
            parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return model
