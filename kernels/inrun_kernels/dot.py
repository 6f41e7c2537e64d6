"""Dots along a direction without a weight gradient.

    dots[b, m] = sum_{t,o} (acts @ D_m^T)[b,t,o] * grads[b,t,o]

Source: arXiv 2406.11011, appendix D. A GEMM whose product never leaves its tile: the epilogue multiplies it by
the tile of the other operand and sums along the row. By symmetry the roles of (acts, I) and (grads, O) may be
exchanged; the larger of I and O becomes the reduction of the GEMM.

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

from inrun_kernels.config import ceil_div, matrix_tiles
from inrun_kernels.tiles import INTERPRETED, aligned, chip, contract, load_columns, sum_tokens, token_starts


@triton.jit
def _dot_kernel(
    x_ptr,  # the operand multiplied by the direction, [B, T, K]
    y_ptr,  # the operand of the epilogue, [B, T, Y]
    direction_ptr,  # [M, K, Y] by its strides
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
    WIDEN: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_Y: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    pid_n, pid_y, pid_m = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_y = pid_y.to(tl.int64) * BLOCK_Y + tl.arange(0, BLOCK_Y)
    mask_n, mask_y = offs_n < n_tokens, offs_y < width_y
    d_ptrs = direction_ptr + pid_m.to(tl.int64) * stride_dm + offs_y[None, :] * stride_dy

    x_rows = token_starts(x_ptr, offs_n, tokens, stride_xb, stride_xt)
    product = tl.zeros([BLOCK_N, BLOCK_Y], tl.float32)
    for low in range(0, width_k, BLOCK_K):
        offs_k = low + tl.arange(0, BLOCK_K)
        mask_k = offs_k < width_k
        x = load_columns(x_rows, mask_n, offs_k, mask_k, stride_xk)  # [N, K]
        mask_d = mask_k[:, None] & mask_y[None, :]
        d = tl.load(d_ptrs + offs_k.to(tl.int64)[:, None] * stride_dk, mask=mask_d, other=0.0)  # [K, Y]
        product = contract(x, d, product, WIDEN)
    y_rows = token_starts(y_ptr, offs_n, tokens, stride_yb, stride_yt)
    y = load_columns(y_rows, mask_n, offs_y, mask_y, stride_yy)  # [N, Y]
    out_ptr = partial_ptr + (pid_y.to(tl.int64) * tl.num_programs(2) + pid_m) * n_tokens
    tl.store(out_ptr + offs_n, tl.sum(product * y.to(tl.float32), 1), mask=mask_n)


def launch_dot(acts: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool) -> Tensor:
    """`acts [B,T,I]`, `grads [B,T,O]`, `val_grad [M,O,I]` -> `[B,M]`, `[S,M]` or `[B,T,M]`, float32."""
    batch, tokens, _ = acts.shape
    n_tokens, n_directions = batch * tokens, val_grad.shape[0]
    direction, scale = _cast(val_grad, acts.dtype)
    x, y, direction = (acts, grads, direction.mT) if acts.shape[2] > grads.shape[2] else (grads, acts, direction)
    width_k, width_y = x.shape[2], y.shape[2]
    tile = matrix_tiles(chip(acts.device), acts.dtype, n_tokens, width_y, width_k, aligned=aligned(x, y, direction))[0]
    tiles_y = ceil_div(width_y, tile.block_n)
    partial = torch.empty(tiles_y, n_directions, n_tokens, dtype=torch.float32, device=acts.device)
    _dot_kernel[(ceil_div(n_tokens, tile.block_m), tiles_y, n_directions)](
        x,
        y,
        direction,
        partial,
        n_tokens,
        tokens,
        width_k,
        width_y,
        *x.stride(),
        *y.stride(),
        *direction.stride(),
        WIDEN=INTERPRETED and acts.dtype == torch.bfloat16,
        BLOCK_N=tile.block_m,
        BLOCK_Y=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    per_token_dots = partial.sum(0) if scale is None else partial.sum(0) / scale[:, None]
    return sum_tokens(per_token_dots, batch, tokens, segments, per_token)


def _cast(val_grad: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """The directions in `dtype`, and for float16 the power of two `[M]` each was multiplied by."""
    if val_grad.dtype == dtype or dtype != torch.float16:
        return val_grad.to(dtype), None
    exponent = torch.frexp(val_grad.abs().amax((1, 2))).exponent
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), (14 - exponent).clamp(-100, 100))
    return (val_grad * scale[:, None, None]).to(dtype), scale
