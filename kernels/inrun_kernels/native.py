"""The kernels in C (`c/`): built by the machine's compiler at their first use, and kept in the user's cache.

They need Linux and a compiler with OpenMP: $CC, else gcc, clang or cc. Without, the products run on plain torch
(`torch_path`), as they do in float16 and float64.
"""

import ctypes
import hashlib
import os
import platform
import shlex
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

from inrun_kernels.forms import cpuinfo
from inrun_kernels.tuning import cache_folder

SOURCES = sorted((Path(__file__).parent / "c").glob("*.[ch]"))
DTYPES = (torch.float32, torch.bfloat16)
_FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-Wno-psabi", "-shared", "-fPIC")
_ADDRESS, _SIZE, _COUNT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_SIGNATURES = {  # what a kernel returns, and takes
    "ghost_wgrad_dot": (_SIZE, *[_ADDRESS] * 4, _SIZE, _COUNT),
    "row_wgrad_dot": (_SIZE, *[_ADDRESS] * 4, _SIZE, _COUNT),
    "row_dot": (None, *[_ADDRESS] * 2, *[_SIZE] * 2, *[_ADDRESS] * 2, _COUNT),
    "norm_backward": (None, *[_ADDRESS] * 4, _COUNT),
    "adam_directions": (None, _ADDRESS, _SIZE, _COUNT),
    "pairs": (_COUNT,),
}
_DEPTH = 128  # as in `c/common.h`
_SHORT = 16  # tokens of a sample, below which its product is hardly more than its contraction
_DEEPEST = 512  # rows of a sample whose panel (1.2 MB) stays in a core's cache: of the Xeon's 2 MB
_KEPT = 1 << 26  # bytes of scratch at most that stay allocated
_kept = threading.local()


class _AdamPart(ctypes.Structure):
    _fields_ = [
        *((name, _ADDRESS) for name in ("out", "grad", "moment")),
        ("count", _SIZE),
        *((name, ctypes.c_float) for name in ("share", "keep", "add", "eps")),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [
        *((name, _ADDRESS) for name in ("weight", "mean", "rstd", "grad_x", "sums", "row_dots")),
        ("eps", ctypes.c_double),
    ]


def runs(*tensors: Tensor | None) -> bool:
    """Whether the kernels take these tensors: plain ones on a CPU, of `DTYPES`, none empty, where they can be built."""
    for x in tensors:
        if x is None:
            continue
        if not (x.is_cpu and x.dtype in DTYPES and type(x) in (Tensor, Parameter) and x.numel()):
            return False
        # A batched tensor has the class of a plain one.
        if x.is_neg() or x._is_zerotensor() or not torch._C._has_storage(x):
            return False
    return library() is not None


def runs_float32(*tensors: Tensor) -> bool:
    """Whether those kernels take them that are for float32 alone."""
    for x in tensors:
        if x.dtype is not torch.float32:
            return False
    return runs(*tensors)


def ghost_wgrad_dot(
    acts: Tensor, grads: Tensor, val_grad: Tensor, bias_val_grad: Tensor | None, segments: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The weight gradient `[O, I]`, the bias gradient (empty without a direction for it) and dots, in float32.

    A sample's dots do not depend on the others', as in the form "two". Args: as the registered op has them; directions
    may lack their leading M, of which the dots `[S, M]` then have none either.
    """
    total = val_grad.new_empty(val_grad.shape[-2:], dtype=torch.float32)
    bias = total.new_empty(0 if bias_val_grad is None else total.shape[0])
    product = _product(acts, grads, val_grad, bias_val_grad, segments, None if bias_val_grad is None else bias, 2)
    return total, bias, _call("inrun_ghost_wgrad_dot", product, total)


def dots_fit(acts: Tensor, grads: Tensor, segments: Tensor | None) -> bool:
    """Whether `ghost_wgrad_dot` has the dots alone sooner than a product in float32, as it takes bfloat16 in pairs."""
    if acts.dtype != torch.bfloat16 or grads.dtype != torch.bfloat16 or not _built().inrun_pairs():
        return False
    samples = acts.shape[0] if segments is None else segments.shape[0] - 1
    return acts.shape[0] * acts.shape[1] >= _SHORT * samples


def ghost_square(acts: Tensor, grads: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """The samples' squared weight gradients added up `[O, I]`, and each one's squared norm `[S]`, in float32."""
    total = grads.new_empty(grads.shape[2], acts.shape[2], dtype=torch.float32)
    return total, _call("inrun_ghost_wgrad_dot", _product(acts, grads, None, None, segments), total)


def squares_fit(acts: Tensor, segments: Tensor | None) -> bool:
    """Whether to take `ghost_square`: each sample is one panel, and not one token, of which torch has a GEMM."""
    if segments is None:
        return 1 < acts.shape[1] <= _DEEPEST
    return int(segments.diff().max()) <= _DEEPEST


def row_wgrad_dot(
    normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The gradient `[I]` of a norm's weight, or of a bias, and dots `[S, M]`, both in float32.

    Args: as `torch_path.row_wgrad_dot`; the direction may lack its M, and the dots then do.
    """
    total = val_grad.new_empty(val_grad.shape[-1:], dtype=torch.float32)
    return total, _call("inrun_row_wgrad_dot", _product(normed, grads, val_grad, None, segments), total)


def row_dot(normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool) -> Tensor:
    """Dots `[S, M]` or `[B, T, M]` along `[M, I]` of a norm's weight, or of a bias. Args: as `torch_path.row_dot`."""
    return _row_dot(normed, grads, val_grad[:, None], segments, per_token, None, -1)


def embedding_dot(
    ids: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool, padding_idx: int | None
) -> Tensor:
    """Dots `[S, M]` or `[B, T, M]` along `[M, V, I]` of an embedding. Args: as `torch_path.embedding_dot`."""
    ids = ids.to(torch.int64).contiguous()
    return _row_dot(None, grads, val_grad, segments, per_token, ids, -1 if padding_idx is None else padding_idx)


def _row_dot(
    normed: Tensor | None,
    grads: Tensor,
    val_grad: Tensor,
    segments: Tensor | None,
    per_token: bool,
    ids: Tensor | None,
    padding: int,
) -> Tensor:
    """With `val_grad [M, V, I]`; each token is a sample of its own with `per_token`."""
    if val_grad.stride(2) != 1:
        val_grad = val_grad.contiguous()
    batch, tokens, _ = grads.shape
    if per_token:
        segments = torch.arange(batch * tokens + 1, device="cpu")
    product, dots, _held = _product(normed, grads, val_grad[:, 0], None, segments)
    row_dots = grads.new_empty(batch * tokens, dots.shape[1], dtype=torch.float64)
    at = 0 if ids is None else ids.data_ptr()
    addresses = row_dots.data_ptr(), dots.data_ptr()
    _built().inrun_row_dot(
        product.buffer_info()[0], at, val_grad.stride(1), padding, *addresses, torch.get_num_threads()
    )
    return dots.view(batch, tokens, -1) if per_token else dots


def norm_fits(x: Tensor, *others: Tensor) -> bool:
    """Whether `norm_backward` takes these tensors: all of float32, rows of whole vectors."""
    return x.shape[-1] % 16 == 0 and runs_float32(x, *others)


def norm_backward(
    x: Tensor,
    grads: Tensor,
    weight: Tensor,
    stats: tuple[Tensor, Tensor] | float,
    val_grad: Tensor | None,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Arguments and results as `norms.norm_backward`; all operands float32."""
    (batch, tokens, width), weight = x.shape, weight.contiguous()
    weight_grad, bias_grad = torch.empty_like(weight), torch.empty_like(weight) if has_bias else None
    product, dots, _held = _product(x, grads, val_grad, bias_val_grad, segments, bias_grad)
    grad_x, pieces = torch.empty_like(x, memory_format=torch.contiguous_format), -(-batch * tokens // _DEPTH)
    directions = 1 if dots.dim() == 1 else dots.shape[1]
    scratch = dots.new_empty(2 * (batch * tokens * directions + pieces * width))
    mean, rstd = (stats[0].contiguous(), stats[1].contiguous()) if isinstance(stats, tuple) else (None, None)
    at = scratch.data_ptr()
    norm = _Norm(
        weight.data_ptr(),
        None if mean is None else mean.data_ptr(),
        None if rstd is None else rstd.data_ptr(),
        grad_x.data_ptr(),
        at,
        at + 8 * pieces * width,
        0.0 if isinstance(stats, tuple) else stats,
    )
    addresses = product.buffer_info()[0], ctypes.addressof(norm), weight_grad.data_ptr(), dots.data_ptr()
    _built().inrun_norm_backward(*addresses, torch.get_num_threads())
    return grad_x, weight_grad, bias_grad, dots


def adam_directions(parts: Sequence[Any]) -> None:
    """Write the direction of every `AdamPart`, each of which `adam.fits`."""
    table = (_AdamPart * len(parts))()
    for row, part in zip(table, parts, strict=True):
        (beta1, beta2), steps = part.betas, part.step + 1
        unbias = 1 / (1 - beta2**steps)
        moment = part.val_grad if part.moment is None or not beta2 else part.moment  # any that is at hand: it counts 0
        row.out, row.grad, row.moment = part.out.data_ptr(), part.val_grad.data_ptr(), moment.data_ptr()
        row.count, row.share, row.eps = part.out.numel(), part.gain / (1 - beta1**steps), part.eps
        row.keep = 0.0 if moment is part.val_grad else beta2 * unbias
        row.add = (1 - beta2) * unbias
    _built().inrun_adam_directions(ctypes.addressof(table), len(parts), torch.get_num_threads())


def _call(name: str, made: tuple[array, Tensor, tuple], total: Tensor) -> Tensor:
    """Run a kernel, which writes `total` and the dots; returns the dots."""
    product, dots, _held = made
    kernel = getattr(_built(), name)
    operands = product.buffer_info()[0], total.data_ptr(), dots.data_ptr()
    # Scratch stays allocated: malloc would give it back to the system, and have its pages cleared each time.
    scratch = getattr(_kept, "scratch", None)
    while True:
        size, place = (0, 0) if scratch is None else (scratch.numel(), scratch.data_ptr())
        needed = kernel(*operands, place, size, torch.get_num_threads())
        if needed <= size:
            return dots
        scratch = dots.new_empty(needed, dtype=torch.uint8)
        if needed <= _KEPT:
            _kept.scratch = scratch


def _product(
    acts: Tensor | None,
    grads: Tensor,
    val_grad: Tensor | None,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
    bias: Tensor | None = None,
    last: int = 1,
) -> tuple[array, Tensor, tuple]:
    """`product` of `c/common.h`, field by field, memory for the dots, and the tensors whose addresses are in it.

    `last`: the dimensions of a direction of `val_grad`, of which there are M where it has one more.
    """
    batch, tokens, outputs = grads.shape
    ends = _even_ends(batch, tokens) if segments is None else segments.to(torch.int64).contiguous()
    samples, inputs = ends.shape[0] - 1, outputs if acts is None else acts.shape[2]
    many = val_grad.shape[:-last] if val_grad is not None else () if bias_val_grad is None else bias_val_grad.shape[:-1]
    held = _matrix(acts), _matrix(grads), _matrix(val_grad), _matrix(bias_val_grad)
    fields = array("q", [field for _, *fields in held for field in fields])
    bias_at = 0 if bias is None else bias.data_ptr()
    fields.extend((bias_at, ends.data_ptr(), samples, inputs, outputs, many[0] if many else 1, *[0] * 7))
    return fields, grads.new_empty((samples, *many), dtype=torch.float32), (held, ends)


def _matrix(x: Tensor | None) -> tuple[Tensor | None, int, int, int]:
    """What the fields of a `matrix` are of, and they."""
    if x is None:
        return None, 0, 0, 0
    if x.is_contiguous():
        return x, x.data_ptr(), x.shape[-1], x.dtype is torch.bfloat16
    rows = x.flatten(0, -2) if x.dim() == 3 else x
    if rows.stride(-1) != 1 and rows.shape[-1] != 1:
        rows = rows.contiguous()
    return rows, rows.data_ptr(), rows.stride(0), rows.dtype is torch.bfloat16


@lru_cache(64)
def _even_ends(batch: int, tokens: int) -> Tensor:
    return torch.arange(0, batch * tokens + 1, tokens, device="cpu")


def _built() -> Any:
    kernels = library()
    assert kernels is not None, "`runs` was not asked"
    return kernels


@lru_cache(1)
def library() -> ctypes.CDLL | None:
    """The built kernels; None without a compiler, and with a warning where it failed."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None or platform.system() != "Linux":
        return None
    try:
        kernels = _load(compiler)
    except (OSError, RuntimeError, ValueError, subprocess.SubprocessError) as error:
        said = getattr(error, "stderr", None) or str(error)
        warnings.warn(
            f"expected {compiler} to build the kernels in C, the products run on plain torch instead; it said: "
            f"{said.strip()[-500:]}",
            stacklevel=2,
        )
        return None
    for name, (returned, *arguments) in _SIGNATURES.items():
        kernel = getattr(kernels, f"inrun_{name}")
        kernel.argtypes, kernel.restype = arguments, returned
    return kernels


def _load(compiler: str) -> ctypes.CDLL:
    """From the cache, or built into it; for this process alone where there is no cache to write."""
    facts = *(source.read_text() for source in SOURCES), compiler, *_FLAGS, _processor(), *platform.libc_ver()
    name = f"kernels-{hashlib.sha256(chr(0).join(facts).encode()).hexdigest()[:16]}.so"
    try:
        folder = cache_folder()
        if (folder / name).exists():
            try:
                return ctypes.CDLL(str(folder / name))
            except OSError:
                pass  # it is damaged: built again
        folder.mkdir(parents=True, exist_ok=True)
        return _build(compiler, folder, name)
    except (OSError, RuntimeError, subprocess.SubprocessError):
        # There is no home, or it is read-only, full or not for code.
        with tempfile.TemporaryDirectory() as own:
            return _build(compiler, Path(own), name)


def _build(compiler: str, folder: Path, name: str) -> ctypes.CDLL:
    """Whole or not at all: other processes may be building it at the same time."""
    with tempfile.TemporaryDirectory(dir=folder) as new:
        made = Path(new) / name
        sources = [str(source) for source in SOURCES if source.suffix == ".c"]
        command = [*shlex.split(compiler), *_FLAGS, *sources, "-o", str(made), "-lm"]
        subprocess.run(command, check=True, capture_output=True, text=True, errors="replace")
        kernels = ctypes.CDLL(str(made))
        os.replace(made, folder / name)
    return kernels


def _processor() -> str:
    """What `-march=native` depends on: a cache may be shared by machines."""
    return platform.machine() + "".join(sorted(set(cpuinfo("model name", "flags", "Features", "CPU part"))))
