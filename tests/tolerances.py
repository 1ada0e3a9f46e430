"""The one table of elementwise tolerances: what a result may miss an fp64 oracle by, per dtype of the run."""

import torch

# dtype -> (rtol, atol). Half precision: two roundings, each by up to 2^-8 (bf16) or 2^-11 (fp16) of a value,
# and half as much again for a sum that cancels. fp32 and fp64: sums of some hundred terms, in another order.
TOLERANCE = {
    torch.float64: (1e-12, 1e-12),
    torch.float32: (1e-5, 2e-6),
    torch.float16: (1.5e-3, 1e-4),
    torch.bfloat16: (1.2e-2, 1e-3),
}


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    """Assert that shapes are equal and values agree as closely as a run in that dtype can; nan equals nan.

    Both are compared in fp64, so that the oracle may be given in full precision. Raises AssertionError.
    """
    rtol, atol = TOLERANCE[dtype]
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, equal_nan=True, check_device=False
    )
