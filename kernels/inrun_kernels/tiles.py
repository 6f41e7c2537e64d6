"""Device code and launch facts that the kernels share."""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Sequence
from functools import cache
from typing import Any, TypeVar

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

from inrun_kernels.config import Chip, ceil_div, chip_named

INTERPRETED = knobs.runtime.interpret
ON_CPU = "sm_90"


@triton.jit
def token_starts(x_ptr, offs_n, tokens, stride_b, stride_t):
    """Where the rows of tokens `offs_n`, numbered through the batch, start in a strided [B, T, X]."""
    row = offs_n // tokens  # token numbers fit 32 bits (validated), element offsets need not
    return x_ptr + row.to(tl.int64) * stride_b + (offs_n - row * tokens).to(tl.int64) * stride_t


@triton.jit
def load_columns(row_ptrs, mask_rows, offs, mask, stride):
    """[rows, columns] tile: columns `offs` of the rows that start at `row_ptrs`; zero outside the masks."""
    pointers = row_ptrs[:, None] + offs.to(tl.int64)[None, :] * stride
    return tl.load(pointers, mask=mask_rows[:, None] & mask[None, :], other=0.0)


@triton.jit
def contract(x, y, acc, PRECISION: tl.constexpr):
    """acc + x @ y, summed in float32. PRECISION: as of `precision`."""
    if PRECISION == "widened":
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="tf32" if PRECISION == "tf32" else "ieee")


@triton.jit
def _round_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs, mask=offs < size)
    x = tl.inline_asm_elementwise("cvt.rna.tf32.f32 $0, $1;", "=r,r", [x], dtype=tl.float32, is_pure=True, pack=1)
    tl.store(out_ptr + offs, x, mask=offs < size)


@triton.jit
def tile_order(pid, tiles_m, tiles_n, GROUP: tl.constexpr = 8):
    """(row, column) of the pid-th tile: programs that run together cover a near-square patch, for reuse in L2."""
    group = pid // (GROUP * tiles_n)
    rows = tl.minimum(tiles_m - group * GROUP, GROUP)
    within = pid % (GROUP * tiles_n)
    return group * GROUP + within % rows, within // rows


@triton.jit(do_not_specialize=["n_samples"])
def _segment_sum_kernel(x_ptr, offsets_ptr, out_ptr, n_tokens, n_samples, BLOCK_N: tl.constexpr):
    sample, m = tl.program_id(0), tl.program_id(1).to(tl.int64)
    start = tl.load(offsets_ptr + sample).to(tl.int64)
    length = tl.load(offsets_ptr + sample + 1).to(tl.int64) - start
    x_ptr += m * n_tokens + start
    total = tl.zeros([BLOCK_N], tl.float32)
    for low in range(0, length, BLOCK_N):
        offs_t = low + tl.arange(0, BLOCK_N)
        total += tl.load(x_ptr + offs_t, mask=offs_t < length, other=0.0)
    tl.store(out_ptr + m * n_samples + sample, tl.sum(total))


class Launch:
    """A kernel with its numbers and constants, the latter in its own order and then its options, for tensors that are
    always of one kind each: dtype, device and what `placed` says.

    Triton works out for every launch what it is to be compiled for, which takes the host longer than many a kernel
    takes the device: here once.
    """

    def __init__(self, kernel: Any, numbers: tuple[int | float, ...], **constants: Any) -> None:
        self._kernel, self._numbers = kernel, numbers
        self._constants = constants | {"enable_fp_fusion": True}  # Triton 3.9 warns of its default, which is to change
        self._compiled: CompiledKernel | None = None
        self._others: tuple[Any, ...] = ()

    def __call__(self, grid: tuple[int, ...], *tensors: Any) -> None:
        if self._compiled is not None:
            self._compiled[grid + (1,) * (3 - len(grid))](*tensors, *self._others)
            return
        compiled = self._kernel[grid](*tensors, *self._numbers, **self._constants)
        if isinstance(compiled, CompiledKernel):  # and not when interpreting
            names = self._kernel.arg_names[len(tensors) + len(self._numbers) :]
            self._others = (*self._numbers, *(self._constants[name] for name in names))
            self._compiled = compiled  # last: another thread may look for it


_launches: dict[tuple[Any, ...], Launch] = {}
_REMEMBERED = 4096  # of sizes that change at every step there is no end
T = TypeVar("T")


def remember(known: dict[Any, T], key: Any, value: T) -> T:
    """Put the value where `known.get(key)` finds it from now on."""
    if len(known) >= _REMEMBERED:
        known.clear()
    known[key] = value
    return value


def launch(
    kernel: Any, grid: tuple[int, ...], tensors: Sequence[Any], numbers: tuple[int | float, ...], **constants: Any
) -> None:
    """Launch with tensors of any kind. A number is always an integer, or always a float."""
    key: list[Any] = [id(kernel), numbers, *constants.values()]
    for x in tensors:
        if x is None:
            key.append(None)
        elif type(x) is TensorDescriptor:
            key += (x.base.dtype, *x.block_shape)
        else:
            key += (x.dtype, x.device, placed(x))
    if (found := _launches.get(remembered := tuple(key))) is not None:
        found(grid, *tensors)
        return
    found = Launch(kernel, numbers, **constants)
    found(grid, *tensors)  # one that fails is not kept
    remember(_launches, remembered, found)


def placed(x: Tensor) -> Any:
    """What a kernel that takes the tensor's address is compiled for beside its dtype."""
    if torch.version.hip:  # whose offsets have 32 bits where they suffice
        return x.data_ptr() % 16, x.untyped_storage().nbytes() < 1 << 31
    return x.data_ptr() % 16


def kind(x: Tensor | None) -> Any:
    """All of an operand that a launch depends on."""
    return None if x is None else (x.dtype, x.device, x.shape, x.stride(), placed(x))


def precision(x: Tensor) -> str:
    """How operands of `x`'s dtype are multiplied: "ieee", exactly; "tf32" where torch is told to do so with float32;
    "widened", exactly, where the interpreter would not (its bfloat16 product is wrong)."""
    if x.dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" and not torch.version.hip:
        return "tf32"
    return "widened" if INTERPRETED and x.dtype == torch.bfloat16 else "ieee"


def rounded(*tensors: Tensor) -> list[Tensor]:
    """Operands of a product; of TF32 copies rounded to it, as torch's own are: tensor cores cut off what is beyond."""
    if INTERPRETED or precision(tensors[0]) != "tf32":
        return list(tensors)
    found = []
    for x in tensors:
        found.append(torch.empty(x.shape, dtype=x.dtype, device=x.device))
        if x.numel():
            launch(_round_kernel, (ceil_div(x.numel(), 4096),), [x.contiguous(), found[-1]], (x.numel(),), BLOCK=4096)
    return found


def aligned(*tensors: Tensor) -> bool:
    """Whether rows can be loaded 16 elements at a time: base, widths and strides are multiples of that."""
    return all(
        x.data_ptr() % 16 == 0 and x.shape[-1] % 16 == 0 and all(s == 1 or s % 16 == 0 for s in x.stride())
        for x in tensors
    )


def architecture(device: torch.device) -> str:
    """What kernels for `device` are made for; when interpreting or only compiling, what a test asks for."""
    return _architecture(device) if device.type == "cuda" else ON_CPU


@cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def chip(device: torch.device) -> Chip:
    """The chip of that architecture."""
    return chip_named(architecture(device))


def copyable(*tensors: Tensor) -> bool:
    """Whether a tensor descriptor can describe each: rows of adjacent elements, base and strides in 16-byte steps."""
    for x in tensors:
        *strides, last = x.stride()
        size = x.element_size()
        if last != 1 or x.data_ptr() % 16:
            return False
        for stride in strides:
            if stride <= 0 or stride * size % 16:
                return False
    return True


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor:
    """What the copy engine needs to read blocks of a `copyable` x that is not empty; elements outside it are zero.

    An x of fewer dimensions than the block has ones in front.
    """
    made = object.__new__(TensorDescriptor)  # without its own checks of the same, which take as long as a launch
    shape, strides = list(x.shape), list(x.stride())
    for _ in range(len(block) - len(shape)):
        shape, strides = [1, *shape], [shape[0] * strides[0], *strides]
    made.base, made.shape, made.strides, made.block_shape = x, shape, strides, block
    return made


def flattens(*tensors: Tensor) -> bool:
    """Whether each `[B, T, X]` is `[B*T, X]` as it lies in memory."""
    return all(x.shape[0] == 1 or x.stride(0) == x.shape[1] * x.stride(1) for x in tensors)


def one_row(x: Tensor, segments: Tensor | None) -> Tensor:
    """`[B, T, X]`, seen as the one row `[1, B*T, X]` that segments cut (a copy only where strides forbid it)."""
    return x if segments is None else x.flatten(0, 1)[None]


def sum_tokens(per_token: Tensor, batch: int, tokens: int, segments: Tensor | None, keep: bool) -> Tensor:
    """Second stage of the dots: `[M, B*T]` -> `[B, T, M]` (keep), `[S, M]` (segments) or `[B, M]`, fixed order."""
    n_directions, n_tokens = per_token.shape
    if keep:
        return per_token.T.reshape(batch, tokens, n_directions).contiguous()
    if segments is None:
        return per_token.view(n_directions, batch, tokens).sum(2).T.contiguous()
    n_samples = segments.shape[0] - 1
    out = per_token.new_empty(n_directions, n_samples)
    if out.numel():
        tensors = [per_token, segments.contiguous(), out]
        launch(_segment_sum_kernel, (n_samples, n_directions), tensors, (n_tokens, n_samples), BLOCK_N=1024)
    return out.T.contiguous()


@cache
def multiprocessors(device: torch.device) -> int:
    """Programs that run at once, for filling the device; 1 when interpreting."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
