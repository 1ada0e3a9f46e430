"""These tests run in Triton's interpreter, chosen before Triton is imported: in a process of their own."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError(
        "tests/kernels_interpret needs TRITON_INTERPRET=1 from the start of the process: "
        "TRITON_INTERPRET=1 python -m pytest tests/kernels_interpret (make test does it)"
    )
