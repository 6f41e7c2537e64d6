"""Products with a vector or a table row: norm weights, biases, embeddings.

    embedding  dots[b] = sum_t <D[ids[b,t]], grads[b,t]>
    norm       dots[b] = sum_{t,i} normed[b,t,i] * grads[b,t,i] * D[i]        weight_grad = sum_{b,t} normed * grads
    bias       dots[b] = sum_{t,o} grads[b,t,o] * D[o]                        weight_grad = sum_{b,t} grads

Source: arXiv 2406.11011, section 4.2, for layers whose per-sample gradient is a sum of rows. 2 to 3 FLOPs per
element and direction, bound by memory: one pass reads every operand once, whatever is due and however many the
directions. A program owns whole rows and walks their columns: a row's dots with all directions stay in registers, and
where the gradient is due each column's sum over the program's rows is written on the way. A second stage adds the
programs' sums, `rows / BLOCK_N` of them, and the dots of each sample's tokens, in a fixed order. Where the gradient is
due and rows are samples, a program has some columns of a part of one sample, and contracts their sums, not each token.
"""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inrun_kernels.config import ceil_div, column_tile, row_tile
from inrun_kernels.tiles import Launch, kind, launch, load_columns, sum_tokens, token_starts


@triton.jit
def _rows_kernel(
    ids_ptr,  # [B, T]
    normed_ptr,  # [B, T, I]
    grads_ptr,  # [B, T, I]
    val_grad_ptr,  # [M, I]; with ids [M, V, I]
    sums_ptr,  # [programs, I]
    dots_ptr,  # [M, B*T]
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
    DIRECTIONS: tl.constexpr,
    LANES: tl.constexpr,  # directions, rounded up to a power of two
    HAS_IDS: tl.constexpr,
    HAS_NORMED: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_n = pid * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_tokens
    counts = mask_n  # tokens that count
    if HAS_IDS:
        ids_ptrs = token_starts(ids_ptr, offs_n, tokens, stride_ib, stride_it)
        ids = tl.load(ids_ptrs, mask=mask_n, other=0)
        counts = mask_n & (ids != padding_idx)
        d_rows = val_grad_ptr + ids.to(tl.int64) * stride_dv  # [N]
    g_rows = token_starts(grads_ptr, offs_n, tokens, stride_gb, stride_gt)
    if HAS_NORMED:
        n_rows = token_starts(normed_ptr, offs_n, tokens, stride_nb, stride_nt)
    lanes = tl.arange(0, LANES)[None, :]
    dots = tl.zeros([BLOCK_N, LANES], tl.float32)
    for low in range(0, width, BLOCK_I):
        offs_i = low + tl.arange(0, BLOCK_I)
        mask_i = offs_i < width
        product = load_columns(g_rows, counts, offs_i, mask_i, stride_gi).to(tl.float32)  # [N, I]
        if HAS_NORMED:
            product *= load_columns(n_rows, counts, offs_i, mask_i, stride_ni).to(tl.float32)
        if SUMS:
            tl.store(sums_ptr + pid.to(tl.int64) * width + offs_i, tl.sum(product, 0), mask=mask_i)
        for m in tl.static_range(DIRECTIONS):
            of_direction = tl.cast(m, tl.int64) * stride_dm
            if HAS_IDS:
                d = load_columns(d_rows + of_direction, counts, offs_i, mask_i, stride_di)  # [N, I]
            else:
                d_ptrs = val_grad_ptr + of_direction + offs_i.to(tl.int64) * stride_di
                d = tl.load(d_ptrs, mask=mask_i, other=0.0)[None, :]
            dots += tl.where(lanes == m, tl.sum(product * d.to(tl.float32), 1)[:, None], 0.0)
    dots_ptrs = dots_ptr + lanes.to(tl.int64) * n_tokens + offs_n[:, None]
    tl.store(dots_ptrs, dots, mask=mask_n[:, None] & (lanes < DIRECTIONS))


@triton.jit
def _columns_kernel(
    normed_ptr,  # [B, T, I]
    grads_ptr,  # [B, T, I]
    val_grad_ptr,  # [M, I]
    sums_ptr,  # [B, chunks, I]
    partial_ptr,  # [B, M, row_length]: of these chunks * columns / BLOCK_I
    row_length,  # of partial, M of them for each sample
    before,  # parts of a row that are others'
    chunks,
    tokens,
    width,
    stride_nb,
    stride_nt,
    stride_ni,
    stride_gb,
    stride_gt,
    stride_gi,
    stride_dm,
    stride_di,
    DIRECTIONS: tl.constexpr,
    HAS_NORMED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    columns = tl.cdiv(width, BLOCK_I)
    pid_i, row = tl.program_id(0) % columns, tl.program_id(0) // columns
    chunk, sample = row % chunks, row // chunks
    offs_i = pid_i * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_i = offs_i < width
    of_sample = sample.to(tl.int64)
    total = tl.zeros([BLOCK_T, BLOCK_I], tl.float32)
    for low in tl.static_range(0, CHUNK, BLOCK_T):
        offs_t = chunk * CHUNK + low + tl.arange(0, BLOCK_T)
        mask_t = offs_t < tokens
        g_rows = grads_ptr + of_sample * stride_gb + offs_t.to(tl.int64) * stride_gt
        product = load_columns(g_rows, mask_t, offs_i, mask_i, stride_gi).to(tl.float32)
        if HAS_NORMED:
            n_rows = normed_ptr + of_sample * stride_nb + offs_t.to(tl.int64) * stride_nt
            product *= load_columns(n_rows, mask_t, offs_i, mask_i, stride_ni).to(tl.float32)
        total += product
    sums = tl.sum(total, 0)
    tl.store(sums_ptr + (of_sample * chunks + chunk) * width + offs_i, sums, mask=mask_i)
    for m in tl.static_range(DIRECTIONS):
        d_ptrs = val_grad_ptr + tl.cast(m, tl.int64) * stride_dm + offs_i.to(tl.int64) * stride_di
        d = tl.load(d_ptrs, mask=mask_i, other=0.0)
        out = (of_sample * DIRECTIONS + m) * row_length + before + chunk * columns + pid_i
        tl.store(partial_ptr + out, tl.sum(sums * d.to(tl.float32)))


def launch_embedding_dot(
    ids: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool, padding_idx: int | None
) -> Tensor:
    """`ids [B,T]`, `grads [B,T,I]`, `val_grad [M,V,I]` -> `[B,M]`, `[S,M]` or `[B,T,M]`, float32."""
    dots, _ = _launch(ids, None, grads, val_grad, -1 if padding_idx is None else padding_idx, sums=False)
    return sum_tokens(dots, ids.shape[0], ids.shape[1], segments, per_token)


def launch_row_dot(
    normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool
) -> Tensor:
    """`normed [B,T,I]` or None, `grads [B,T,I]`, `val_grad [M,I]` -> `[B,M]`, `[S,M]` or `[B,T,M]`, float32."""
    dots, _ = _launch(None, normed, grads, val_grad[:, None], -1, sums=False)
    return sum_tokens(dots, grads.shape[0], grads.shape[1], segments, per_token)


def launch_row_wgrad_dot(
    normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`normed [B,T,I]` or None, `grads [B,T,I]`, `val_grad [M,I]` -> `(weight_grad [I], dots [S,M])`, float32."""
    if by_columns(grads.shape[1], segments is not None):
        chunks, parts = columns_of(grads.shape[1], grads.shape[2], grads.element_size())
        sums = torch.empty(len(grads), chunks, grads.shape[2], dtype=torch.float32, device=grads.device)
        partial = torch.empty(len(grads), len(val_grad), parts, dtype=torch.float32, device=grads.device)
        grid, launched = columns_launch(kind(normed), kind(grads), kind(val_grad), parts)
        launched(grid, normed, grads, val_grad, sums, partial)
        return sums.sum((0, 1)), partial.sum(2)
    dots, sums = _launch(None, normed, grads, val_grad[:, None], -1, sums=True)
    return sums.sum(0), sum_tokens(dots, grads.shape[0], grads.shape[1], segments, False)


def by_columns(tokens: int, documents: bool) -> bool:
    """Whether `columns_launch` serves: samples are rows, long enough that their sums are few beside them."""
    return not documents and tokens >= 32


def columns_of(tokens: int, width: int, element_size: int) -> tuple[int, int]:
    """Of `columns_launch`: how many rows of sums it writes for each sample, and how many parts of a dot."""
    chunk, block_i = column_tile(tokens, width, element_size)
    chunks = ceil_div(tokens, chunk)
    return chunks, chunks * ceil_div(width, block_i)


@lru_cache(1024)
def columns_launch(
    normed: Any, grads: Any, val_grad: Any, row_length: int, before: int = 0
) -> tuple[tuple[int], Launch]:
    """Grid and launch of a pass over columns, with operands of such a `tiles.kind` (`normed`'s None, of a bias).

    It takes them, and writes `sums [B, chunks, I]`, to be added up, and `partial [B, M, row_length]`, whose rows hold
    as many parts of a dot, of which so many `before` are others'.
    """
    dtype, _, (batch, tokens, width), strides, _ = grads
    chunk, block_i = column_tile(tokens, width, dtype.itemsize)
    chunks = ceil_div(tokens, chunk)
    launched = Launch(
        _columns_kernel,
        (
            row_length,
            before,
            chunks,
            tokens,
            width,
            *((0, 0, 0) if normed is None else normed[3]),
            *strides,
            *val_grad[3],
        ),
        DIRECTIONS=val_grad[2][0],
        HAS_NORMED=normed is not None,
        CHUNK=chunk,
        BLOCK_T=32,
        BLOCK_I=block_i,
        num_warps=4,
    )
    return (ceil_div(width, block_i) * chunks * batch,), launched


def _launch(
    ids: Tensor | None, normed: Tensor | None, grads: Tensor, val_grad: Tensor, skip: int, *, sums: bool
) -> tuple[Tensor, Tensor]:
    """`val_grad [M, V or 1, I]` -> dots of each token `[M, B*T]`, sums of each program `[programs or 0, I]`."""
    (batch, tokens, width), n_directions = grads.shape, val_grad.shape[0]
    block_n, block_i, warps = row_tile(batch * tokens, width, grads.element_size(), sums=sums)
    programs = ceil_div(batch * tokens, block_n)
    dots = torch.empty(n_directions, batch * tokens, dtype=torch.float32, device=grads.device)
    column_sums = torch.empty(programs if sums else 0, width, dtype=torch.float32, device=grads.device)
    launch(
        _rows_kernel,
        (programs,),
        [ids, normed, grads, val_grad, column_sums, dots],
        (
            batch * tokens,
            tokens,
            width,
            skip,
            *((0, 0) if ids is None else ids.stride()),
            *((0, 0, 0) if normed is None else normed.stride()),
            *grads.stride(),
            *val_grad.stride(),
        ),
        DIRECTIONS=n_directions,
        LANES=triton.next_power_of_2(n_directions),
        HAS_IDS=ids is not None,
        HAS_NORMED=normed is not None,
        SUMS=sums,
        BLOCK_N=block_n,
        BLOCK_I=block_i,
        num_warps=warps,
    )
    return dots, column_sums
