"""The errors graphopt raises; each message names the value, the limit and the way out."""


class GraphoptError(Exception):
    """Base of every error that graphopt raises on purpose."""


class CaptureRefused(GraphoptError):
    """A program is out of scope as a whole; `reason` says why in one sentence."""

    def __init__(self, reason: str) -> None:
        super().__init__(f"graphopt does not optimise this program: {reason}")
        self.reason = reason


class OptionError(GraphoptError, ValueError):
    """An unknown option, or a value that an option does not take."""


class PipelineError(GraphoptError):
    """A pipeline whose passes contradict each other, or a pass that broke the graph."""


class RevertError(GraphoptError, RuntimeError):
    """A match that cannot be taken back: unknown, or of a program that is gone or cannot do without it."""


class RuleError(GraphoptError):
    """A rule that cannot be made: its pattern drops a parameter, or its replacement does not fit."""


class ShardError(OptionError):
    """A program that ranks cannot share as asked: sizes that do not divide, a plan that contradicts."""


class ExpectError(GraphoptError):
    """Fewer operators were recognised than `expect` says; what nearly matched is in the message."""


class BisectError(GraphoptError):
    """A bisection that has no answer: nothing breaks, everything does, or the same run has two answers."""


class StrictError(GraphoptError):
    """Under `strict=True`: what would otherwise be a warning and a fall-back to the original."""


class WeightError(GraphoptError):
    """A weight that cannot be prepared: missing, of another shape, or on meta."""


class ReleasedError(WeightError):
    """A weight is needed as it was, after its memory was released: the original program cannot run either."""


class ArtifactError(GraphoptError):
    """A saved model that cannot be loaded: cut off, of another version, or of another model."""
