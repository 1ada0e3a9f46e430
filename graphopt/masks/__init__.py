"""Read what an attention mask means: `causal & window & key_padding & rest`, proved by running it."""

from graphopt.masks.classification import classify as classify
from graphopt.masks.form import MaskForm as MaskForm
from graphopt.masks.form import describe as describe
from graphopt.masks.realize import MaskArguments as MaskArguments
from graphopt.masks.realize import arguments as arguments
