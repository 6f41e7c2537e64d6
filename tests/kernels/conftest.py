"""What a test says of the device is no other test's: launches are planned anew after each. Where kernels are
interpreted, memory that none has written to is NaN, as it may be on a GPU.
"""

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def _planned_anew() -> Iterator[None]:
    yield
    with contextlib.suppress(ImportError):
        from inrun_kernels import norms_kernel, wgrad_dot

        wgrad_dot._calls.clear()
        norms_kernel._plans.clear()


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(os.environ.get("TRITON_INTERPRET") == "1", warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
