"""Products with a vector or a table row: norm weights, biases, embeddings.

    embedding  dots[b] = sum_t <D[ids[b,t]], grads[b,t]>
    norm       dots[b] = sum_{t,i} normed[b,t,i] * grads[b,t,i] * D[i]
    bias       dots[b] = sum_{t,o} grads[b,t,o] * D[o]

Source: arXiv 2406.11011, section 4.2, for layers whose per-sample gradient is a sum of rows. 2 to 3 FLOPs per
element and direction, bound by memory: each operand is read once (once per direction for the dots alone).
`_row_dot_kernel` writes one dot per token; `_column_sum_kernel` writes the column sums of each sample, `[S, I]`,
whose sum is the weight gradient, and contracts them with every direction while they are in registers.
"""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from inrun_kernels.config import ceil_div, row_tile
from inrun_kernels.tiles import load_columns, one_row, sample_tokens, sum_tokens, token_starts


@triton.jit
def _row_dot_kernel(
    ids_ptr,
    normed_ptr,
    grads_ptr,
    val_grad_ptr,
    out_ptr,  # [M, B*T]
    n_tokens,
    tokens,
    width,
    padding_idx,
    stride_ib,
    stride_it,
    stride_nb,
    stride_nt,
    stride_ni,
    stride_gb,
    stride_gt,
    stride_gi,
    stride_dm,
    stride_dv,
    stride_di,
    HAS_IDS: tl.constexpr,
    HAS_NORMED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    m = tl.program_id(1).to(tl.int64)
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_tokens
    counts = mask_n  # tokens that count
    d_rows = val_grad_ptr + m * stride_dm + tl.zeros([BLOCK_N], tl.int64)
    if HAS_IDS:
        ids_ptrs = token_starts(ids_ptr, offs_n, tokens, stride_ib, stride_it)
        ids = tl.load(ids_ptrs, mask=mask_n, other=0)
        counts = mask_n & (ids != padding_idx)
        d_rows += ids.to(tl.int64) * stride_dv
    g_rows = token_starts(grads_ptr, offs_n, tokens, stride_gb, stride_gt)
    if HAS_NORMED:
        n_rows = token_starts(normed_ptr, offs_n, tokens, stride_nb, stride_nt)
    dots = tl.zeros([BLOCK_N], tl.float32)
    for low in range(0, width, BLOCK_I):
        offs_i = low + tl.arange(0, BLOCK_I)
        mask_i = offs_i < width
        product = load_columns(g_rows, counts, offs_i, mask_i, stride_gi).to(tl.float32)  # [N, I]
        if HAS_NORMED:
            product *= load_columns(n_rows, counts, offs_i, mask_i, stride_ni).to(tl.float32)
        d = load_columns(d_rows, counts, offs_i, mask_i, stride_di)
        dots += tl.sum(product * d.to(tl.float32), 1)
    tl.store(out_ptr + m * n_tokens + offs_n, dots, mask=mask_n)


@triton.jit
def _column_sum_kernel(
    normed_ptr,
    grads_ptr,
    val_grad_ptr,
    offsets_ptr,
    sums_ptr,  # [S, I]
    partial_ptr,  # [tiles, S, M]
    tokens,
    width,
    n_samples,
    n_directions,
    stride_nb,
    stride_nt,
    stride_ni,
    stride_gb,
    stride_gt,
    stride_gi,
    stride_dm,
    stride_di,
    HAS_NORMED: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    sample, pid_i = tl.program_id(0), tl.program_id(1).to(tl.int64)
    offs_i = pid_i * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < width
    row, start, length = sample_tokens(offsets_ptr, sample, tokens, HAS_OFFSETS)
    grads_ptr += row * stride_gb + start * stride_gt
    if HAS_NORMED:
        normed_ptr += row * stride_nb + start * stride_nt
    total = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
    for low in range(0, length, BLOCK_N):
        offs_t = low + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_t = offs_t < length
        product = load_columns(grads_ptr + offs_t * stride_gt, mask_t, offs_i, mask_i, stride_gi).to(tl.float32)
        if HAS_NORMED:
            n = load_columns(normed_ptr + offs_t * stride_nt, mask_t, offs_i, mask_i, stride_ni)
            product *= n.to(tl.float32)
        total += product
    sums = tl.sum(total, 0)  # [I]
    tl.store(sums_ptr + sample.to(tl.int64) * width + offs_i, sums, mask=mask_i)
    dots_ptr = partial_ptr + (pid_i * n_samples + sample) * n_directions
    for m in range(n_directions):
        d_ptrs = val_grad_ptr + tl.cast(m, tl.int64) * stride_dm + offs_i * stride_di
        d = tl.load(d_ptrs, mask=mask_i, other=0.0)
        tl.store(dots_ptr + m, tl.sum(sums * d.to(tl.float32)))


def launch_embedding_dot(
    ids: Tensor,
    grads: Tensor,
    val_grad: Tensor,
    segments: Tensor | None,
    per_token: bool,
    padding_idx: int | None,
) -> Tensor:
    """`ids [B,T]`, `grads [B,T,I]`, `val_grad [M,V,I]` -> `[B,M]`, `[S,M]` or `[B,T,M]`, float32."""
    strides = (*ids.stride(), 0, 0, 0, *grads.stride(), *val_grad.stride())
    skip = -1 if padding_idx is None else padding_idx
    dots = _launch_row_dot(ids, None, grads, val_grad, skip, strides)
    return sum_tokens(dots, ids.shape[0], ids.shape[1], segments, per_token)


def launch_row_dot(
    normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool
) -> Tensor:
    """`normed [B,T,I]` or None, `grads [B,T,I]`, `val_grad [M,I]` -> `[B,M]`, `[S,M]` or `[B,T,M]`, float32."""
    of_normed = (0, 0, 0) if normed is None else normed.stride()
    strides = (0, 0, *of_normed, *grads.stride(), val_grad.stride(0), 0, val_grad.stride(1))
    dots = _launch_row_dot(None, normed, grads, val_grad, -1, strides)
    return sum_tokens(dots, grads.shape[0], grads.shape[1], segments, per_token)


def _launch_row_dot(
    ids: Tensor | None, normed: Tensor | None, grads: Tensor, val_grad: Tensor, skip: int, strides: tuple
) -> Tensor:
    batch, tokens, width = grads.shape
    block_n, block_i = row_tile(width)
    dots = torch.empty(val_grad.shape[0], batch * tokens, dtype=torch.float32, device=grads.device)
    _row_dot_kernel[(ceil_div(batch * tokens, block_n), val_grad.shape[0])](
        ids,
        normed,
        grads,
        val_grad,
        dots,
        batch * tokens,
        tokens,
        width,
        skip,
        *strides,
        HAS_IDS=ids is not None,
        HAS_NORMED=normed is not None,
        BLOCK_N=block_n,
        BLOCK_I=block_i,
    )
    return dots


def launch_row_wgrad_dot(
    normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`normed [B,T,I]` or None, `grads [B,T,I]`, `val_grad [M,I]` -> `(weight_grad [I], dots [S,M])`, float32."""
    n_samples = grads.shape[0] if segments is None else segments.shape[0] - 1
    grads, normed = one_row(grads, segments), None if normed is None else one_row(normed, segments)
    _, tokens, width = grads.shape
    block_n, block_i = row_tile(width, 128)  # few columns: more programs, and more rows to sum in registers
    tiles = ceil_div(width, block_i)
    sums = torch.empty(n_samples, width, dtype=torch.float32, device=grads.device)
    partial = torch.empty(tiles, n_samples, val_grad.shape[0], dtype=torch.float32, device=grads.device)
    _column_sum_kernel[(n_samples, tiles)](
        normed,
        grads,
        val_grad,
        segments,
        sums,
        partial,
        tokens,
        width,
        n_samples,
        val_grad.shape[0],
        *((0, 0, 0) if normed is None else normed.stride()),
        *grads.stride(),
        *val_grad.stride(),
        HAS_NORMED=normed is not None,
        HAS_OFFSETS=segments is not None,
        BLOCK_N=block_n,
        BLOCK_I=block_i,
    )
    return sums.sum(0), partial.sum(0)
