"""The kernels of `native.c`: built by the machine's C compiler at their first use, and kept in the user's cache.

Where there is no compiler, the products run on plain torch (`torch_path`).
"""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from inrun_kernels.tuning import cache_folder

SOURCE = Path(__file__).with_suffix(".c")
DTYPES = (torch.float32, torch.bfloat16)
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")


_kept = threading.local()


class _Matrix(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("stride", ctypes.c_int64), ("bfloat16", ctypes.c_int64)]


class _Product(ctypes.Structure):
    _fields_ = [
        *((name, _Matrix) for name in ("acts", "grads", "dirs", "bias_dirs")),
        *((name, ctypes.c_void_p) for name in ("bias", "ends")),
        *((name, ctypes.c_int64) for name in ("samples", "inputs", "outputs", "directions")),
        *((name, ctypes.c_int64) for name in ("threads", "block_inputs", "block_outputs", "scratch")),
    ]


class _AdamPart(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("out", "grad", "moment")),
        ("count", ctypes.c_int64),
        *((name, ctypes.c_float) for name in ("share", "keep", "add", "eps")),
    ]


def runs(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: on a CPU, of `DTYPES`, none empty, on a machine that can build them."""
    return all(x is None or (x.is_cpu and x.dtype in DTYPES and x.numel()) for x in tensors) and library() is not None


def ghost_wgrad_dot(
    acts: Tensor, grads: Tensor, val_grad: Tensor, bias_val_grad: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight gradient `[O, I]`, the bias gradient (empty without a direction for it) and dots `[S, M]`, in float32.

    Each sample has accumulators of its own, as in the form "two". Args: as the registered op has them.
    """
    total = torch.empty(val_grad.shape[1:], dtype=torch.float32)
    bias = torch.empty(0 if bias_val_grad is None else len(total), dtype=torch.float32)
    return total, bias, _dots("ghost_wgrad_dot", acts, grads, val_grad, segments, total, bias_val_grad, bias)


def row_wgrad_dot(
    normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient `[I]` of a norm's weight, or of a bias, and dots `[S, M]`, both float32.

    Args: as `torch_path.row_wgrad_dot`, where `runs` says so.
    """
    total = torch.empty(val_grad.shape[1:], dtype=torch.float32)
    return total, _dots("row_wgrad_dot", normed, grads, val_grad, segments, total)


def adam_directions(parts: Sequence[Any]) -> None:
    """Write the direction of every `AdamPart`, each of which `adam.fits`."""
    kernels = library()
    assert kernels is not None, "`runs` was not asked"
    table = (_AdamPart * len(parts))()
    for row, part in zip(table, parts, strict=True):
        (beta1, beta2), steps = part.betas, part.step + 1
        unbias = 1 / (1 - beta2**steps)
        row.out, row.grad = part.out.data_ptr(), part.val_grad.data_ptr()
        row.moment, row.count = None if part.moment is None else part.moment.data_ptr(), part.out.numel()
        row.share, row.eps = part.gain / (1 - beta1**steps), part.eps
        row.keep, row.add = beta2 * unbias, (1 - beta2) * unbias
    kernels.inrun_adam_directions(table, ctypes.c_int64(len(parts)), torch.get_num_threads())


def _dots(
    name: str,
    acts: Tensor | None,
    grads: Tensor,
    val_grad: Tensor,
    segments: Tensor | None,
    total: Tensor,
    bias_val_grad: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """Call a kernel: it writes `total`, `bias` and the dots, which are returned."""
    kernels = library()
    assert kernels is not None, "`runs` was not asked"
    batch, tokens, outputs = grads.shape
    ends = _even_ends(batch, tokens) if segments is None else segments.to(torch.int64).contiguous()
    rows = [None if x is None else _rows(x) for x in (acts, grads, val_grad, bias_val_grad)]
    dots = torch.empty(len(ends) - 1, len(val_grad), dtype=torch.float32)
    product = _Product(
        *map(_matrix, rows),
        None if bias_val_grad is None or bias is None else bias.data_ptr(),
        ends.data_ptr(),
        *(len(dots), total.shape[-1], outputs, len(val_grad)),
    )
    scratch = _scratch(getattr(kernels, f"inrun_plan_{name}")(ctypes.byref(product), torch.get_num_threads()))
    addresses = (ctypes.c_void_p(x.data_ptr()) for x in (scratch, total, dots))
    getattr(kernels, f"inrun_{name}")(ctypes.byref(product), *addresses)
    return dots


@lru_cache(64)
def _even_ends(batch: int, tokens: int) -> Tensor:
    return torch.arange(0, batch * tokens + 1, tokens)


def _scratch(size: int) -> Tensor:
    """Bytes that stay allocated: malloc would give them back to the system and have their pages cleared each time."""
    kept = getattr(_kept, "scratch", None)
    if kept is None or len(kept) < size:
        kept = _kept.scratch = torch.empty(size, dtype=torch.uint8)
    return kept


def _rows(x: Tensor) -> Tensor:
    """`[..., F]` as `[N, F]` with features beside each other, copied only where they are not."""
    flat = x if x.dim() == 2 else x.flatten(0, -2)
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _matrix(rows: Tensor | None) -> _Matrix:
    return _Matrix() if rows is None else _Matrix(rows.data_ptr(), rows.stride(0), rows.dtype == torch.bfloat16)


@lru_cache(1)
def library() -> ctypes.CDLL | None:
    """The built kernels; None without a compiler, and with a warning where it failed."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        return None
    source = SOURCE.read_bytes()
    key = hashlib.sha256(b"\0".join((source, compiler.encode(), " ".join(_FLAGS).encode(), _processor().encode())))
    path = cache_folder() / f"native-{key.hexdigest()[:16]}.so"
    try:
        if not path.exists():
            _build(compiler, path)
        kernels = ctypes.CDLL(str(path))
    except (OSError, subprocess.CalledProcessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"expected {compiler} to build {SOURCE.name}, the products run on plain torch instead; it said: "
            f"{said.strip()[-500:]}",
            stacklevel=2,
        )
        return None
    for plan in (kernels.inrun_plan_ghost_wgrad_dot, kernels.inrun_plan_row_wgrad_dot):
        plan.restype = ctypes.c_int64
    return kernels


def _build(compiler: str, path: Path) -> None:
    """Whole or not at all: other processes may build it at the same time."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        command = [*compiler.split(), *_FLAGS, str(SOURCE), "-o", str(made)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        os.replace(made, path)


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by machines."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    names = ("model name", "flags", "Features", "CPU part")
    return platform.machine() + "".join(sorted({line for line in lines if line.startswith(names)}))
