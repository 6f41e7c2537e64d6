"""Dots along a direction without a weight gradient.

    dots[b, m] = sum_{t,o} (acts @ D_m^T)[b,t,o] * grads[b,t,o]

Source: arXiv 2406.11011, appendix D. A GEMM whose product never leaves its tile: the epilogue multiplies it by
the tile of the other operand and sums along the row. By symmetry the roles of (acts, I) and (grads, O) may be
exchanged; the larger of I and O becomes the reduction of the GEMM, unless tensor descriptors can read the other operand
alone: its width then is.

FLOPs: 2*B*T*I*O per direction.  Bytes: operands and directions as in a GEMM, B*T*M*tiles*4 partial dots, summed
over tiles and then over each sample's tokens in a fixed order. The direction is first cast to the dtype of
acts for the tensor cores (one weight in that dtype); for float16 it is scaled by a power of two that puts its
largest element near 2^14, so that small directions do not underflow, and the dots are scaled back in float32.
"""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from inrun_kernels import tuning
from inrun_kernels.config import Tile, ceil_div, matrix_tiles
from inrun_kernels.cost import Sizes
from inrun_kernels.tiles import (
    aligned,
    chip,
    contract,
    copyable,
    descriptor,
    flattens,
    launch,
    load_columns,
    precision,
    rounded,
    sum_tokens,
    tile_order,
    token_starts,
)


@triton.jit
def _dot_kernel(
    x,  # the operand multiplied by the direction: pointer to [B, T, K], or descriptor of [B*T, K]
    y,  # the operand of the epilogue: pointer to [B, T, Y], or descriptor of [B*T, Y]
    direction,  # pointer to [M, K, Y] by its strides, or descriptor of [M, K, Y], with D_TRANSPOSED [M, Y, K]
    partial_ptr,  # [tiles, M, B*T]
    n_tokens,
    tokens,
    width_k,
    width_y,
    stride_xb,
    stride_xt,
    stride_xk,
    stride_yb,
    stride_yt,
    stride_yy,
    stride_dm,
    stride_dk,
    stride_dy,
    COPIES: tl.constexpr,
    COPY_Y: tl.constexpr,
    D_TRANSPOSED: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_m = tl.program_id(1)
    pid_n, pid_y = tile_order(tl.program_id(0), tl.cdiv(n_tokens, BLOCK_N), tl.cdiv(width_y, BLOCK_Y))
    first_n, first_y = pid_n * BLOCK_N, pid_y * BLOCK_Y
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_tokens
    tl.assume(width_k > 0)  # else ptxas waits for each matrix instruction
    product = tl.zeros([BLOCK_N, BLOCK_Y], tl.float32)
    offs_y = first_y.to(tl.int64) + tl.arange(0, BLOCK_Y)
    mask_y = offs_y < width_y
    if COPIES:
        for low in range(0, width_k, BLOCK_K):
            if D_TRANSPOSED:
                d = tl.trans(direction.load([pid_m, first_y, low]).reshape(BLOCK_Y, BLOCK_K))
            else:
                d = direction.load([pid_m, low, first_y]).reshape(BLOCK_K, BLOCK_Y)
            product = contract(x.load([first_n, low]), d, product, PRECISION)  # [N, K] x [K, Y]
    else:
        d_ptrs = direction + pid_m.to(tl.int64) * stride_dm + offs_y[None, :] * stride_dy
        x_rows = token_starts(x, offs_n, tokens, stride_xb, stride_xt)
        for low in range(0, width_k, BLOCK_K):
            offs_k = low + tl.arange(0, BLOCK_K)
            mask_k = offs_k < width_k
            x_tile = load_columns(x_rows, mask_n, offs_k, mask_k, stride_xk)  # [N, K]
            mask_d = mask_k[:, None] & mask_y[None, :]
            d = tl.load(d_ptrs + offs_k.to(tl.int64)[:, None] * stride_dk, mask=mask_d, other=0.0)  # [K, Y]
            product = contract(x_tile, d, product, PRECISION)
    if COPY_Y:
        of_epilogue = y.load([first_n, first_y])  # [N, Y]
    else:
        y_rows = token_starts(y, offs_n, tokens, stride_yb, stride_yt)
        of_epilogue = load_columns(y_rows, mask_n, offs_y, mask_y, stride_yy)  # [N, Y]
    out_ptr = partial_ptr + (pid_y.to(tl.int64) * tl.num_programs(1) + pid_m) * n_tokens
    tl.store(out_ptr + offs_n, tl.sum(product * of_epilogue.to(tl.float32), 1), mask=mask_n)


def launch_dot(acts: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool) -> Tensor:
    """`acts [B,T,I]`, `grads [B,T,O]`, `val_grad [M,O,I]` -> `[B,M]`, `[S,M]` or `[B,T,M]`, float32."""
    batch, tokens, _ = acts.shape
    n_tokens, n_directions, where = batch * tokens, val_grad.shape[0], chip(acts.device)
    direction, scale = _cast(val_grad, acts.dtype)
    transposed = direction.stride(2) != 1
    rows_d = direction.mT if transposed else direction
    copies = where.copies and acts.dtype != torch.float32 and copyable(rows_d)
    copied = [copies and flattens(operand) and copyable(operand.flatten(0, 1)) for operand in (acts, grads)]
    x_is_acts = acts.shape[2] > grads.shape[2] if copied[0] == copied[1] else copied[0]
    x, y, direction = (acts, grads, direction.mT) if x_is_acts else (grads, acts, direction)
    x, direction = rounded(x, direction)
    copies, copy_y = any(copied), all(copied)
    transposed = transposed != x_is_acts
    width_k, width_y = x.shape[2], y.shape[2]
    vectors = copies or aligned(x, y, direction)
    tiles_that_fit = matrix_tiles(
        where,
        acts.dtype,
        n_tokens,
        width_y,
        width_k,
        accumulators=2 if copies and not copy_y else 1,  # addresses take registers
        copies=copies,
        aligned=vectors,
    )

    def run(tile: Tile) -> Tensor:
        tiles_y = ceil_div(width_y, tile.block_n)
        partial = torch.empty(tiles_y, n_directions, n_tokens, dtype=torch.float32, device=acts.device)
        operands = [x, y, direction]
        if copies:
            block_d = [tile.block_n, tile.block_k] if transposed else [tile.block_k, tile.block_n]
            operands[0] = descriptor(x.flatten(0, 1), [tile.block_m, tile.block_k])
            operands[2] = descriptor(rows_d, [1, *block_d])
        if copy_y:
            operands[1] = descriptor(y.flatten(0, 1), [tile.block_m, tile.block_n])
        launch(
            _dot_kernel,
            (ceil_div(n_tokens, tile.block_m) * tiles_y, n_directions),
            [*operands, partial],
            (n_tokens, tokens, width_k, width_y, *x.stride(), *y.stride(), *direction.stride()),
            COPIES=copies,
            COPY_Y=copy_y,
            D_TRANSPOSED=transposed,
            PRECISION=precision(acts),
            BLOCK_N=tile.block_m,
            BLOCK_Y=tile.block_n,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return partial[0] if tiles_y == 1 else partial.sum(0)

    tile = tiles_that_fit[0]
    if tuning.is_on():
        sizes = Sizes(batch, tokens, acts.shape[2], grads.shape[2], n_directions)
        tile = tuning.choose(
            "dot", tiles_that_fit, sizes, f"{precision(acts)} {copies} {copy_y} {transposed} {vectors}", acts, run
        )
    dots = run(tile)
    return sum_tokens(dots if scale is None else dots / scale[:, None], batch, tokens, segments, per_token)


def _cast(val_grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The directions in `dtype`, and for float16 the power of two `[M]` each was multiplied by."""
    if val_grad.dtype == dtype or dtype != torch.float16:
        return val_grad.to(dtype), None
    exponent = torch.frexp(val_grad.abs().amax((1, 2))).exponent
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), (14 - exponent).clamp(max=100))
    return (val_grad * scale[:, None, None]).to(dtype), scale
