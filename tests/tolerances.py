"""The one table of tolerances: what a result may miss its oracle by; every exception has its reason."""

from typing import TypedDict

import torch

# dtype -> (rtol, atol), elementwise against an fp64 oracle. Half precision: two roundings, each by up to
# 2^-8 (bf16) or 2^-11 (fp16) of a value, and half as much again for a sum that cancels. fp32 and fp64: sums
# of some hundred terms, in another order.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 2e-6),
    torch.float16: (1.5e-3, 1e-4),
    torch.bfloat16: (1.2e-2, 1e-3),
}


class Miss(TypedDict):
    """How `torch.testing.assert_close` is told what may be missed: `assert_close(ours, expected, **MISS)`."""

    rtol: float
    atol: float


# ----------------------------------------------------------------------------------- whole programs in fp64

IN_FP64 = Miss(rtol=1e-9, atol=1e-9)  # a program of any depth and its rewritten form: sums in other orders
NORM_IN_FP64 = 1e-13  # one norm of values near 1: some roundings of 2^-53 each

# --------------------------------------------------------------- logits of a standard deviation near 1, fp32

LOGITS = 1e-4  # a model with its products split over ranks, merged or cached: sums in other orders
SAME_PRODUCTS = 1e-5  # both sides multiply the same numbers and add them in other orders
ANOTHER_DEVICE = Miss(rtol=1e-4, atol=1e-4)  # as LOGITS: eager and we by different kernels of a GPU
LARGEST_OUTPUT = 1e-4  # of the largest output of 8 layers: both sides round differently
BF16_LOGITS = 0.05  # of the logits' standard deviation, in bf16: rounding over 16 layers is 0.01 to 0.02
COSINE = 0.9999  # of two embeddings of a trained encoder at least; the elements are judged besides

# ---------------------------------------------------------------------------------------- parts of a model

# By whether a layer runs in fp32 or fp64. Seven linears in half; the accuracy rule judges in tests/models.
LAYER = {True: Miss(rtol=1e-4, atol=1e-5), False: Miss(rtol=0.05, atol=0.05)}
AUTOCAST = Miss(rtol=1.6e-2, atol=1e-2)  # products rounded to bf16 in an fp32 program: a few steps of it at 1
FLOAT_BIAS = 4  # times atol, where attention has a bias: one element of 320, near 0, is off by 2.1 in fp16
EXPERTS_SUMMED = Miss(rtol=1e-5, atol=1e-5)  # in fp32, a row's experts added in another order
INNER_VALUES = Miss(rtol=1e-4, atol=1e-4)  # the same of values inside, which are up to ten times as large
LARGE_MEAN = Miss(rtol=0, atol=1e-4)  # rows of mean 1000 in fp32: half a step there is 3e-5
DRAWN = 0.1  # mean and deviation of weights or logits drawn at random: their own noise

# ---------------------------------------------------------------------------------------------------- int8

HALF_A_STEP = 0.5 + 1e-4  # the quotient is rounded in fp32, 2^-24 of up to 127; the scale's own adds nothing
INT8 = 0.05  # outputs near 1 against those of exact weights: half a step of each of some hundred weights
INT8_COSINE = 0.999  # 0.9996 was measured; with steps twice as large 1 - cosine is 4 times as large, 0.0016
INT8_IN_BF16 = Miss(rtol=2e-2, atol=2e-2)  # the weight is rounded to bf16, too: 96 terms, each by 2^-9 of 0.1
INT8_ON_ANOTHER_DEVICE = Miss(rtol=1e-3, atol=1e-3)  # fp32 on a GPU and on a CPU, through two layers

# ------------------------------------------------------------------------------------------- share of FLOPs

ROUTER = 0.05  # unmatched: a router's choice, beside experts that are matched
ROPE_ANGLES = 1e-4  # unmatched: where rope's angles are an outer product, a matmul, they are 5e-5 to 7e-5


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that shapes are equal and values agree as closely as a run in that dtype can; nan equals nan.

    Both are compared in fp64, so that the oracle may be given in full precision. Raises AssertionError.
    """
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True, check_device=False
    )
