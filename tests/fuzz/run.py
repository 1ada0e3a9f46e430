"""Random programs, compiled against eager: all kinds for some seconds, or one program again.

python -m tests.fuzz.run --seconds 600 --seed 1000     # make fuzz SECONDS=600
python -m tests.fuzz.run block 1234
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from tests.fuzz.attention_programs import fused_attention, spelled_attention
from tests.fuzz.block_programs import block, norm_of_norm, siblings, written_cache
from tests.fuzz.random_models import random_model
from tests.fuzz.script import Body, NoProgram, Script, by_seed
from tests.fuzz.verdict import check

BODIES: dict[str, Body] = {
    body.__name__: body
    for body in (spelled_attention, fused_attention, block, norm_of_norm, siblings, written_cache)
}
KINDS = (*BODIES, "operators")
DTYPES = (torch.float32, torch.bfloat16, torch.float32, torch.float16, torch.float64)


def drawn(kind: str, seed: int) -> tuple[nn.Module, Sequence[Tensor], torch.dtype]:
    """The program of a kind and a seed, its inputs and the dtype that it is judged by.

    Raises:
        NoProgram: these choices do not run in eager.
    """
    if kind == "operators":
        return *random_model(seed), torch.float32
    dtype = DTYPES[seed % len(DTYPES)]
    script = Script(BODIES[kind], by_seed(seed), dtype)
    return script, script.inputs, dtype


def failure(kind: str, seed: int) -> tuple[str | None, Counter[str]]:
    """What is wrong with a program, with the command that shows it again, or None; the ops it became.

    Raises:
        NoProgram: there is none.
    """
    program, inputs, dtype = drawn(kind, seed)
    try:
        return None, check(program, inputs, dtype)
    except Exception as error:  # a compiler that raises is wrong, too
        again = f"python -m tests.fuzz.run {kind} {seed}"
        return f"{type(error).__name__}: {error}\n{program}\nagain: {again}", Counter()


def search(seconds: float, first: int, kinds: Sequence[str], say: Callable[[str], None]) -> int:
    """Programs of all kinds in turn; how many failed."""
    end, run, bad, recognised = time.monotonic() + seconds, 0, 0, Counter[str]()
    for seed in itertools.count(first):
        for kind in kinds:
            if time.monotonic() > end:
                say(f"{run} programs, seeds {first} to {seed}, {bad} wrong; {_shares(recognised)}")
                return bad
            try:
                wrong, ops = failure(kind, seed)
            except NoProgram:
                continue
            run += 1
            recognised.update(name for name in ops if not name.startswith("aten."))
            if wrong:
                bad += 1
                say(wrong + "\n")
    raise AssertionError("count() has no end")


def _shares(counts: Counter[str]) -> str:
    return ", ".join(f"{name} in {n}" for name, n in counts.most_common())


def say(text: str) -> None:
    """A line, at once: a search may be ended from outside."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 1 where a program was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kind", nargs="?", choices=KINDS)
    parser.add_argument("number", nargs="?", type=int, help="the seed of one program")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if given.number is None:
        return int(search(given.seconds, given.seed, [given.kind] if given.kind else KINDS, say) > 0)
    program, _, _ = drawn(given.kind, given.number)
    wrong, ops = failure(given.kind, given.number)
    say(wrong or f"{program}\nright; it became {dict(ops)}")
    return int(wrong is not None)


if __name__ == "__main__":
    sys.exit(main())
