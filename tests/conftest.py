"""Shared pytest settings: interpreted kernels or, with `-m gpu`, real ones; keep hypothesis and inductor honest."""

import contextlib
import functools
import os
from typing import Any

import numpy as np
import torch

# Inductor imports it, which fails in Python 3.11 once something has looked for pip, as huggingface_hub does.
with contextlib.suppress(ImportError):
    import setuptools  # noqa: F401

# Inductor's disk cache would go on serving a graph made with an older fake kernel.
os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")
# Without that cache each process would build ten programs to see what vectors the compiler knows of.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import hypothesis
import pytest

hypothesis.settings.register_profile("inrun", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("inrun")


def pytest_configure(config: pytest.Config) -> None:
    # Before anything imports triton: kernels are decorated as interpreted or compiled for good. So the tests marked gpu
    # run by themselves, and the others as on a machine without one.
    if config.option.markexpr != "gpu" or not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("TRITON_INTERPRET", "1")
    if os.environ.get("TRITON_INTERPRET") == "1":
        _interpret_quicker()


def _interpret_quicker() -> None:
    # The interpreter patches the language at every call of a function within a kernel, a third of its time. A launch
    # has done it for the kernel's own modules, and for triton's nobody takes it back. Another third goes to a table of
    # dtypes made anew at each look, and to sums of integers, made again in 64 bits as operations of the language.
    with contextlib.suppress(ImportError):
        from triton.language import uint64
        from triton.language.semantic import TritonSemantic
        from triton.runtime import interpreter
        from triton.runtime.interpreter import InterpretedFunction

        call, seen = InterpretedFunction.__call__, set()
        of_scalar = functools.cache(interpreter._get_np_dtype)
        interpreter._get_np_dtype = lambda dtype: of_scalar(uint64 if dtype.scalar.is_ptr() else dtype.scalar)
        TritonSemantic.binary_op_sanitize_overflow_impl = _refuse_overflow

        def once(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
            module = self.fn.__globals__["__name__"]
            if module in seen:
                return self.rewrite()(*args, **kwargs)
            seen.add(module)
            return call(self, *args, **kwargs)

        InterpretedFunction.__call__ = once


def _refuse_overflow(_: Any, left: Any, right: Any, operation: Any) -> None:
    if (dtype := left.type.scalar).int_bitwidth < 64:
        exact = getattr(np, {"add": "add", "sub": "subtract", "mul": "multiply"}[operation.__name__])
        found = exact(left.handle.data, right.handle.data, dtype=np.int64)
        low, high = dtype.get_int_min_value(), dtype.get_int_max_value()
        assert low <= found.min(initial=0) and found.max(initial=0) <= high, f"{dtype} overflows in {exact.__name__}"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords also hold the names of folders
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and -m gpu"))
