"""Device code and launch facts that the kernels share."""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

INTERPRETED = knobs.runtime.interpret


@triton.jit
def sample_tokens(offsets_ptr, sample, tokens, HAS_OFFSETS: tl.constexpr):
    """(batch row, first token in it, tokens) of a sample: its row, or a segment of the only row."""
    if HAS_OFFSETS:
        start = tl.load(offsets_ptr + sample).to(tl.int64)
        row, length = tl.cast(0, tl.int64), tl.load(offsets_ptr + sample + 1).to(tl.int64) - start
    else:
        start = tl.cast(0, tl.int64)
        row, length = tl.cast(sample, tl.int64), tl.cast(tokens, tl.int64)
    return row, start, length


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
def contract(x, y, acc, WIDEN: tl.constexpr):
    """acc + x @ y with float32 products and sums (never TF32). WIDEN: the interpreter's bfloat16 dot is wrong."""
    if WIDEN:
        x = x.to(tl.float32)
        y = y.to(tl.float32)
    return tl.dot(x, y, acc, input_precision="ieee")


@triton.jit
def _segment_sum_kernel(
    x_ptr, offsets_ptr, out_ptr, n_tokens, tokens, n_samples, HAS_OFFSETS: tl.constexpr, BLOCK_N: tl.constexpr
):
    sample, m = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, start, length = sample_tokens(offsets_ptr, sample, tokens, HAS_OFFSETS)
    x_ptr += m * n_tokens + row * tokens + start
    total = tl.zeros([BLOCK_N], tl.float32)
    for low in range(0, length, BLOCK_N):
        offs_t = low + tl.arange(0, BLOCK_N)
        total += tl.load(x_ptr + offs_t, mask=offs_t < length, other=0.0)
    tl.store(out_ptr + m * n_samples + sample, tl.sum(total))


def aligned(*tensors: Tensor) -> bool:
    """Whether rows can be loaded 16 elements at a time: base, widths and strides are multiples of that."""
    return all(
        x.data_ptr() % 16 == 0 and x.shape[-1] % 16 == 0 and all(s == 1 or s % 16 == 0 for s in x.stride())
        for x in tensors
    )


def one_row(x: Tensor, segments: Tensor | None) -> Tensor:
    """`[B, T, X]`, seen as the one row `[1, B*T, X]` that segments cut (a copy only where strides forbid it)."""
    return x if segments is None else x.flatten(0, 1)[None]


def sum_tokens(per_token: Tensor, batch: int, tokens: int, segments: Tensor | None, keep: bool) -> Tensor:
    """Second stage of the dots: `[M, B*T]` -> `[B, T, M]` (keep), `[S, M]` (segments) or `[B, M]`, fixed order."""
    n_directions, n_tokens = per_token.shape
    if keep:
        return per_token.T.reshape(batch, tokens, n_directions).contiguous()
    n_samples = batch if segments is None else segments.shape[0] - 1
    out = per_token.new_empty(n_directions, n_samples)
    if out.numel():
        _segment_sum_kernel[(n_samples, n_directions)](
            per_token, segments, out, n_tokens, tokens, n_samples, HAS_OFFSETS=segments is not None, BLOCK_N=256
        )
    return out.T.contiguous()


def multiprocessors(device: torch.device) -> int:
    """Programs that run at once, for filling the device; 1 when interpreting."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
