"""These tests compile, and Triton's interpreter leaves nothing to compile: it must be off."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET", "0") != "0":
    raise pytest.UsageError(
        "tests/kernels_compile needs a process without TRITON_INTERPRET; unset it (make test does)"
    )
