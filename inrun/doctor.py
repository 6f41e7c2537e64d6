"""`inrun doctor`: what this machine is, and whether every kernel gives the right numbers on it.

Each product runs on every backend that works here, in every dtype, for samples, packed documents and tokens, along one
direction and two, and is held to its definition in float64, one sample at a time (`inrun_kernels.reference`).
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import platform
from typing import Any

import torch
from torch import Tensor

import inrun_kernels
from inrun import results
from inrun_kernels import grouped, native, reference
from inrun_kernels.tuning import installed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of the root mean square of the exact result; half precision may round a product once more.
ALLOWED = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 3e-2}
FORMS: dict[str, tuple[str | None, ...]] = dict.fromkeys(
    ("ghost_wgrad_dot", "linear_wgrad_dot"), ("two", "prefix", "direct")
)
GROUPED = ("grouped_mm", "grouped_wgrad")  # torch's own kernels, or a loop over them
BUILT = {("ghost_wgrad_dot", "two"), ("linear_wgrad_dot", "two"), ("ghost_square", None)}
BUILT |= {(name, None) for name in ("norm_dot", "norm_wgrad_dot", "bias_dot", "bias_wgrad_dot", "embedding_dot")}
PRODUCTS = [*(name for name in inrun_kernels.__all__ if name not in ("explain", "tune")), *GROUPED]
PACKAGES = ("torch", "triton", "numpy", "pyarrow", "duckdb", "matplotlib", "transformers")
STACKS = ("accelerate", "trl", "lightning", "peft", "datasets", "polars")  # named where they are installed


def main() -> bool:
    """Print what was found.

    Returns:
        Whether every product passed on every backend.
    """
    from tqdm import tqdm

    device = "cuda" if torch.cuda.is_available() else "cpu"
    has_triton = importlib.util.find_spec("triton") is not None
    if has_triton and device == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported, which they are when first used
    print(f"{_describe(device, has_triton)}\n")
    columns = [("torch", dtype) for dtype in DTYPES]
    columns += [("C", dtype) for dtype, kind in DTYPES.items() if kind in native.DTYPES and native.library()]
    columns += [("triton", dtype) for dtype in DTYPES if has_triton]
    rows, failed, total, complaints = [], 0, 0, []
    names = [(name, form) for name in PRODUCTS for form in FORMS.get(name, (None,))]
    for name, form in tqdm(names, desc="self-test", leave=False, disable=None):
        cells = []
        for backend, dtype in columns:
            if (backend == "triton" and name in GROUPED) or (backend == "C" and (name, form) not in BUILT):
                cells.append("-")
                continue
            try:
                error = worst_error(name, backend, dtype, "cpu" if backend == "C" else device, form)
            except Exception as raised:  # whatever a compiler or a driver comes up with is a finding
                error = float("nan")
                complaints.append(f"{name}, {backend}, {dtype}: {type(raised).__name__}: {raised}")
            passed = error <= ALLOWED[dtype]
            failed, total = failed + (not passed), total + 1
            cells.append(f"{error:.0e}" + ("" if passed else " FAIL"))
        rows.append([name if form is None else f"{name}, {form}", *cells])
    rows.append(["allowed", *(f"{ALLOWED[dtype]:.0e}" for _, dtype in columns)])
    print("Self-test: largest error against float64, relative to the root mean square of the exact result")
    print(results.table(["", *(f"{backend} {dtype}" for backend, dtype in columns)], rows))
    for complaint in complaints:
        print(complaint)
    print(f"{failed} of {total} FAILED: do not trust values from this machine" if failed else f"All {total} passed.")
    return not failed


def worst_error(name: str, backend: str, dtype: str, device: str, form: str | None = None) -> float:
    """The largest error of one product over its groupings, relative to the root mean square of the exact result.

    Args:
        name: of a function of `inrun_kernels`, or one of `GROUPED`.
        backend: "torch", "triton" or "C"; of `GROUPED`, only the first, and the last for `BUILT`.
        dtype: a key of `DTYPES`.
        device: "cpu" or "cuda".
        form: of `ghost_wgrad_dot` and `linear_wgrad_dot`.
    """
    exact = getattr(reference, name)
    takes = inspect.signature(exact).parameters
    options = {} if form is None else {"form": form}
    if name not in GROUPED and backend != "C":  # which is what a CPU takes of itself
        options["backend"] = backend
    worst = 0.0
    for directions in [(), (2,)] if "val_grad" in takes else [()]:
        arguments, offsets = _arguments(name, directions, DTYPES[dtype], device)
        groupings: list[dict[str, Any]] = [{}]
        groupings += [{"segments": offsets}] if "segments" in takes else []
        groupings += [{"per_token": True}] if "per_token" in takes else []
        for grouping in groupings:
            found = getattr(grouped if name in GROUPED else inrun_kernels, name)(*arguments, **grouping, **options)
            expected = exact(*arguments, **grouping)
            pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
            for got, right in pairs:
                error = (got.double() - right).abs().max() / right.square().mean().sqrt()
                worst = max(worst, error.item()) if error == error else float("nan")
    return worst


def _arguments(
    name: str, directions: tuple[int, ...], dtype: torch.dtype, device: str
) -> tuple[tuple[Tensor, ...], Tensor]:
    """Random inputs of a product, its direction with `directions` in front, and offsets of packed documents."""
    # Odd sizes, so that tiles are partly filled; small ones where kernels are interpreted or on the CPU.
    batch, tokens, inputs, outputs = (5, 129, 257, 130) if device == "cuda" else (3, 17, 33, 18)
    generator = torch.Generator().manual_seed(0)

    def rand(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device, dtype)

    acts, grads = rand(batch, tokens, inputs), rand(batch, tokens, outputs)
    offsets = torch.tensor([0, tokens // 2, 2 * tokens, batch * tokens], device=device)
    if name == "ghost_dot_pairwise":
        return (acts, grads, rand(2, tokens, inputs), rand(2, tokens, outputs)), offsets
    if name == "embedding_dot":
        ids = torch.randint(inputs, (batch, tokens), generator=generator).to(device)
        return (ids, grads, rand(*directions, inputs, outputs)), offsets
    if name in GROUPED:
        rows, inputs, outputs = batch * tokens, inputs // 8 * 8, outputs // 8 * 8  # torch's kernel takes whole 16 bytes
        ends = torch.tensor([rows // 3, rows // 3, rows], dtype=torch.int32, device=device)
        other = rand(len(ends), inputs, outputs) if name == "grouped_mm" else rand(rows, outputs)
        return (rand(rows, inputs), other, ends), offsets
    if name == "ghost_square":
        return (acts, grads), offsets
    if name in ("ghost_dot", "ghost_wgrad_dot", "linear_wgrad_dot"):
        of_bias = (rand(*directions, outputs),) if name == "linear_wgrad_dot" else ()
        return (acts, grads, rand(*directions, outputs, inputs), *of_bias), offsets
    vectors = (grads, rand(*directions, outputs))
    return ((rand(batch, tokens, outputs), *vectors) if name.startswith("norm") else vectors), offsets


def _describe(device: str, has_triton: bool) -> str:
    from inrun import __version__

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    if not has_triton:
        triton = "not installed, so GPUs take the torch path; pip install triton"
    elif device == "cpu" or os.environ.get("TRITON_INTERPRET") == "1":
        triton = "interpreted only" + (
            ": no CUDA device here; tested below, too slow to train with" if not gpus else ""
        )
    else:
        triton = "compiled; taken for CUDA tensors"
    lines = [
        ("inrun", f"{__version__}, Python {platform.python_version()}, {platform.platform()}"),
        ("device", f"{', '.join(gpus) or 'no CUDA device'}; CPU: {results.processor()}, {os.cpu_count()} cores"),
        ("versions", ", ".join(f"{name} {installed(name) or 'not installed'}" for name in PACKAGES)),
        ("stacks", ", ".join(f"{name} {found}" for name in STACKS if (found := installed(name))) or "none installed"),
        ("torch path", "works everywhere; taken for CPU tensors where there is no kernel in C"),
        ("C", "built for this processor" if native.library() else "no compiler, or it failed: taken for none"),
        ("triton", triton),
    ]
    return "\n".join(f"{name:12}{text}" for name, text in lines)
