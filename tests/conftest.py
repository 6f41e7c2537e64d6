"""Shared pytest settings: interpret Triton kernels where there is no GPU, keep hypothesis and inductor honest."""

import os

import torch

# Before anything imports triton: kernels are decorated as interpreted or compiled for good.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
# Inductor's disk cache would go on serving a graph made with an older fake kernel.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import hypothesis
import pytest

hypothesis.settings.register_profile("inrun", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("inrun")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords also hold the names of folders
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
