"""What a test says of the device is no other test's: launches are planned anew after each."""

import contextlib
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _planned_anew() -> Iterator[None]:
    yield
    with contextlib.suppress(ImportError):
        from inrun_kernels import norms_kernel, wgrad_dot

        wgrad_dot._calls.clear()
        norms_kernel._plans.clear()
