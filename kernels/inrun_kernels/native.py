"""The kernels of `native.c`: built by the machine's C compiler at their first use, and kept in the user's cache.

Where there is no compiler, the products run on plain torch (`torch_path`). Compilers: $CC, else gcc, clang or cc.
Sums are in float32, or wider; float16 and float64 stay with torch.
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
from array import array
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from inrun_kernels.tuning import cache_folder

SOURCE = Path(__file__).with_suffix(".c")
DTYPES = (torch.float32, torch.bfloat16)
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
_ADDRESS, _SIZE, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_TAKE = {
    "ghost_wgrad_dot": (*[_ADDRESS] * 4, _SIZE, _COUNT),
    "row_wgrad_dot": (*[_ADDRESS] * 4, _SIZE, _COUNT),
    "layer_norm_dot": (*[_ADDRESS] * 4, _COUNT),
    "adam_directions": (_ADDRESS, _SIZE, _COUNT),
}
_kept = threading.local()


class _AdamPart(ctypes.Structure):
    _fields_ = [
        *((name, _ADDRESS) for name in ("out", "grad", "moment")),
        ("count", _SIZE),
        *((name, ctypes.c_float) for name in ("share", "keep", "add", "eps")),
    ]


def runs(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: plain ones on a CPU, of `DTYPES`, none empty, where they can be built."""
    for x in tensors:
        if x is not None and not (x.is_cpu and x.dtype in DTYPES and type(x) in (Tensor, Parameter) and x.numel()):
            return False
    return library() is not None


def ghost_wgrad_dot(
    acts: Tensor, grads: Tensor, val_grad: Tensor, bias_val_grad: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight gradient `[O, I]`, the bias gradient (empty without a direction for it) and dots `[S, M]`, in float32.

    Each sample has accumulators of its own, as in the form "two". Args: as the registered op has them.
    """
    total = torch.empty(val_grad.shape[1:], dtype=torch.float32)
    bias = torch.empty(0 if bias_val_grad is None else total.shape[0], dtype=torch.float32)
    product = _product(acts, grads, val_grad, bias_val_grad, segments, bias)
    return total, bias, _call("ghost_wgrad_dot", product, total)


def row_wgrad_dot(
    normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient `[I]` of a norm's weight, or of a bias, and dots `[S, M]`, both in float32.

    Args: as `torch_path.row_wgrad_dot`.
    """
    total = torch.empty(val_grad.shape[1:], dtype=torch.float32)
    return total, _call("row_wgrad_dot", _product(normed, grads, val_grad, None, segments), total)


def layer_norm_dot(
    x: Tensor,
    grads: Tensor,
    mean: Tensor,
    rstd: Tensor,
    val_grad: Tensor | None,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
) -> Tensor:
    """Dots `[S, M]` of a layer norm's weight and bias, along `[M, I]` of each (None: not of that one).

    Args:
        x, grads: `[B, T, I]`, the norm's input and its output's gradient. All operands float32.
        mean, rstd: of each row, as torch's layer norm returns them.
        segments: as in `ghost_wgrad_dot`.
    """
    product, dots, _held = _product(x, grads, val_grad, bias_val_grad, segments)
    mean, rstd = mean.contiguous(), rstd.contiguous()
    addresses = product.buffer_info()[0], mean.data_ptr(), rstd.data_ptr(), dots.data_ptr()
    _built().inrun_layer_norm_dot(*addresses, torch.get_num_threads())
    return dots


def adam_directions(parts: Sequence[Any]) -> None:
    """Write the direction of every `AdamPart`, each of which `adam.fits`."""
    table = (_AdamPart * len(parts))()
    for row, part in zip(table, parts, strict=True):
        (beta1, beta2), steps = part.betas, part.step + 1
        unbias = 1 / (1 - beta2**steps)
        row.out, row.grad = part.out.data_ptr(), part.val_grad.data_ptr()
        row.moment, row.count = None if part.moment is None else part.moment.data_ptr(), part.out.numel()
        row.share, row.eps = part.gain / (1 - beta1**steps), part.eps
        row.keep, row.add = beta2 * unbias, (1 - beta2) * unbias
    _built().inrun_adam_directions(ctypes.addressof(table), len(parts), torch.get_num_threads())


def _call(name: str, made: tuple[array, Tensor, list[Tensor]], total: Tensor) -> Tensor:
    """Run a kernel, which writes `total` and the dots; returns the dots."""
    product, dots, _held = made
    kernel = getattr(_built(), f"inrun_{name}")
    operands = product.buffer_info()[0], total.data_ptr(), dots.data_ptr()
    # Scratch stays allocated: malloc would give it back to the system, and have its pages cleared each time.
    scratch = getattr(_kept, "scratch", None)
    while True:
        size, place = (0, 0) if scratch is None else (scratch.numel(), scratch.data_ptr())
        needed = kernel(*operands, place, size, torch.get_num_threads())
        if needed <= size:
            return dots
        scratch = _kept.scratch = torch.empty(needed, dtype=torch.uint8)


def _product(
    acts: Tensor | None,
    grads: Tensor,
    val_grad: Tensor | None,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
    bias: Tensor | None = None,
) -> tuple[array, Tensor, list[Tensor]]:
    """`product` of `native.c`, memory for the dots, and the tensors whose addresses are in it."""
    batch, tokens, outputs = grads.shape
    ends = _even_ends(batch, tokens) if segments is None else segments.to(torch.int64).contiguous()
    fields, held, directions = [], [ends], 0
    for x in (acts, grads, val_grad, bias_val_grad):
        if x is None:
            fields += 0, 0, 0
            continue
        directions = x.shape[0]  # the last ones are directions
        rows = x.flatten(0, -2) if x.dim() == 3 else x
        if rows.stride(1) != 1 and rows.shape[1] != 1:
            rows = rows.contiguous()
        held.append(rows)
        fields += rows.data_ptr(), rows.stride(0), rows.dtype == torch.bfloat16
    samples, inputs = ends.shape[0] - 1, outputs if acts is None else acts.shape[2]
    fields += 0 if bias is None or bias_val_grad is None else bias.data_ptr(), ends.data_ptr()
    fields += samples, inputs, outputs, directions, 0, 0, 0, 0
    return array("q", fields), torch.empty(samples, directions, dtype=torch.float32), held


@lru_cache(64)
def _even_ends(batch: int, tokens: int) -> Tensor:
    return torch.arange(0, batch * tokens + 1, tokens)


def _built() -> Any:
    kernels = library()
    assert kernels is not None, "`runs` was not asked"
    return kernels


@lru_cache(1)
def library() -> ctypes.CDLL | None:
    """The built kernels; None without a compiler, and with a warning where it failed."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None:
        return None
    facts = SOURCE.read_text(), compiler, *_FLAGS, _processor()
    path = cache_folder() / f"native-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:16]}.so"
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
    for name, arguments in _TAKE.items():
        kernel = getattr(kernels, f"inrun_{name}")
        kernel.argtypes, kernel.restype = arguments, ctypes.c_int64
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
