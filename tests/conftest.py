"""Shared pytest settings: interpreted kernels or, with `-m gpu`, real ones; keep hypothesis and inductor honest."""

import contextlib
import os

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
        _patch_the_language_once()


def _patch_the_language_once() -> None:
    # The interpreter does so at every call of a function within a kernel, a third of its time. A launch has done it for
    # the kernel's own modules, and for triton's nobody takes it back.
    with contextlib.suppress(ImportError):
        from triton.runtime.interpreter import InterpretedFunction

        call, seen = InterpretedFunction.__call__, set()

        def once(self: InterpretedFunction, *args: object, **kwargs: object) -> object:
            module = self.fn.__globals__["__name__"]
            if module in seen:
                return self.rewrite()(*args, **kwargs)
            seen.add(module)
            return call(self, *args, **kwargs)

        InterpretedFunction.__call__ = once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):  # keywords also hold the names of folders
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and -m gpu"))
