"""The Triton kernel of `norms.py`.

A program holds whole rows, a tile of them at a time: what a row's gradient takes from all of its columns, and its dots
with all directions, are reductions within the tile, and the gradients of weight and bias stay in registers from tile
to tile. As many programs as run at once share the rows evenly; a second stage adds their gradients, and the dots of
each sample's tokens, in a fixed order.
"""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inrun_kernels.config import ceil_div, norm_tile
from inrun_kernels.tiles import Launch, kind, multiprocessors, remember, sum_tokens

_COLUMNS = 16  # that a program of the second stage adds up


@triton.jit(do_not_specialize=["n_rows", "rows_each"])
def _norm_backward_kernel(
    x_ptr,  # [N, I]
    grads_ptr,  # [N, I]
    weight_ptr,  # [I]
    mean_ptr,  # [N]; of RMS norm, none
    rstd_ptr,  # [N]; of RMS norm, none
    val_grad_ptr,  # [M, I] or none
    bias_val_grad_ptr,  # [M, I] or none
    grad_x_ptr,  # [N, I]
    sums_ptr,  # [2, programs, I]: of the weight, of the bias
    dots_ptr,  # [M, N]
    n_rows,
    width,
    rows_each,  # of a program, a multiple of BLOCK_N
    eps,
    DIRECTIONS: tl.constexpr,
    LAYER: tl.constexpr,  # layer norm, else RMS norm
    HAS_SCALE: tl.constexpr,
    HAS_SHIFT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    pid = tl.program_id(0)
    offs_i = tl.arange(0, BLOCK_I)
    mask_i = offs_i < width
    weight = tl.load(weight_ptr + offs_i, mask=mask_i, other=0.0).to(tl.float32)[None, :]
    weight_sum = tl.zeros([BLOCK_I], tl.float32)
    bias_sum = tl.zeros([BLOCK_I], tl.float32)
    start = pid * rows_each
    for low in range(start, tl.minimum(start + rows_each, n_rows), BLOCK_N):
        offs_n = low + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n_rows
        mask = mask_n[:, None] & mask_i[None, :]
        at = offs_n.to(tl.int64)[:, None] * width + offs_i[None, :]
        x = tl.load(x_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [N, I]
        grads = tl.load(grads_ptr + at, mask=mask, other=0.0).to(tl.float32)  # [N, I]; 0 where normed means nothing
        if LAYER:
            rstd = tl.load(rstd_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            mean = tl.load(mean_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)
            normed = (x - mean[:, None]) * rstd[:, None]
        else:
            rstd = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(x * x, 1) / width + eps))
            rstd = tl.where(mask_n, rstd, 0.0)  # with an eps of 0, infinite beyond the last row
            normed = x * rstd[:, None]
        product = grads * normed
        weight_sum += tl.sum(product, 0)
        if HAS_BIAS:
            bias_sum += tl.sum(grads, 0)
        grad_x = grads * weight - normed * (tl.sum(product * weight, 1) / width)[:, None]
        if LAYER:
            grad_x -= (tl.sum(grads * weight, 1) / width)[:, None]
        grad_x *= rstd[:, None]
        tl.store(grad_x_ptr + at, grad_x.to(grad_x_ptr.dtype.element_ty), mask=mask)
        for m in range(DIRECTIONS):  # not unrolled: several would take more registers than there are
            along = tl.zeros([BLOCK_N, BLOCK_I], tl.float32)
            if HAS_SCALE:
                scale = tl.load(val_grad_ptr + m * width + offs_i, mask=mask_i, other=0.0)
                along += product * scale.to(tl.float32)[None, :]
            if HAS_SHIFT:
                shift = tl.load(bias_val_grad_ptr + m * width + offs_i, mask=mask_i, other=0.0)
                along += grads * shift.to(tl.float32)[None, :]
            tl.store(dots_ptr + tl.cast(m, tl.int64) * n_rows + offs_n, tl.sum(along, 1), mask=mask_n)
    sums = sums_ptr + pid.to(tl.int64) * width + offs_i
    tl.store(sums, weight_sum, mask=mask_i)
    if HAS_BIAS:
        tl.store(sums + tl.num_programs(0).to(tl.int64) * width, bias_sum, mask=mask_i)


@triton.jit(do_not_specialize=["n_programs", "n_rows", "tokens", "n_dots"])
def _norm_sums_kernel(
    sums_ptr,  # [1 or 2, programs, I]
    dots_ptr,  # [M, N]
    gradients_ptr,  # [1 or 2, I]
    found_ptr,  # [B, M]
    n_programs,
    n_rows,
    tokens,
    n_dots,  # B * M, or of documents none
    width,
    DIRECTIONS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid < n_dots:
        of_sample = dots_ptr + (pid % DIRECTIONS).to(tl.int64) * n_rows + (pid // DIRECTIONS).to(tl.int64) * tokens
        total = tl.zeros([BLOCK_N], tl.float32)
        for low in range(0, tokens, BLOCK_N):
            offs_t = low + tl.arange(0, BLOCK_N)
            total += tl.load(of_sample + offs_t, mask=offs_t < tokens, other=0.0)
        tl.store(found_ptr + pid, tl.sum(total))
    else:
        blocks = tl.cdiv(width, BLOCK_I)
        which, block = (pid - n_dots) // blocks, (pid - n_dots) % blocks
        offs_i = block * BLOCK_I + tl.arange(0, BLOCK_I)
        of_rows = tl.zeros([BLOCK_P, BLOCK_I], tl.float32)  # many rows, so that few loads follow upon each other
        for low in range(0, n_programs, BLOCK_P):
            row = low + tl.arange(0, BLOCK_P)
            at = (which * n_programs + row).to(tl.int64)[:, None] * width + offs_i[None, :]
            of_rows += tl.load(sums_ptr + at, mask=(row < n_programs)[:, None] & (offs_i < width)[None, :], other=0.0)
        tl.store(gradients_ptr + which * width + offs_i, tl.sum(of_rows, 0), mask=offs_i < width)


@dataclass(frozen=True)
class _Plan:
    """The launches of one norm's backward, and what they write."""

    grid: tuple[int]
    rows: Launch
    sums: tuple[int, int, int]
    second_grid: tuple[int]
    second: Launch


_plans: dict[Any, _Plan] = {}


def launch_norm_backward(
    x: Tensor,
    grads: Tensor,
    weight: Tensor,
    stats: tuple[Tensor, Tensor] | float,
    val_grad: Tensor | None,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
    has_bias: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Arguments and results as `norms.norm_backward`."""
    (batch, tokens, width), n_rows, device = x.shape, x.shape[0] * x.shape[1], x.device
    directions = bias_val_grad if val_grad is None else val_grad
    assert directions is not None
    n_directions = directions.shape[0] if directions.dim() == 2 else 1
    mean, rstd = stats if isinstance(stats, tuple) else (None, None)
    operands = [None if y is None else y.contiguous() for y in (x, grads, weight, mean, rstd, val_grad, bias_val_grad)]
    shape = (batch, n_directions) if directions.dim() == 2 else (batch,)
    found = x.new_empty(shape if segments is None else (0,), dtype=torch.float32)
    processors, eps = multiprocessors(device), 0.0 if isinstance(stats, tuple) else float(stats)
    key = (processors, *map(kind, operands), found.numel(), has_bias, eps)
    if (plan := _plans.get(key)) is None:
        block_n, block_i, warps = norm_tile(width)
        most = processors * 16 // warps
        rows_each = ceil_div(ceil_div(n_rows, block_n), most) * block_n
        programs = ceil_div(n_rows, rows_each)
        plan = _Plan(
            grid=(programs,),
            rows=Launch(
                _norm_backward_kernel,
                (n_rows, width, rows_each, eps),
                DIRECTIONS=n_directions,
                LAYER=mean is not None,
                HAS_SCALE=val_grad is not None,
                HAS_SHIFT=bias_val_grad is not None,
                HAS_BIAS=has_bias,
                BLOCK_N=block_n,
                BLOCK_I=block_i,
                num_warps=warps,
            ),
            sums=(1 + has_bias, programs, width),
            second_grid=(found.numel() + ceil_div(width, _COLUMNS) * (1 + has_bias),),
            second=Launch(
                _norm_sums_kernel,
                (programs, n_rows, tokens, found.numel(), width),
                DIRECTIONS=n_directions,
                BLOCK_N=1024,
                BLOCK_P=64,
                BLOCK_I=_COLUMNS,
            ),
        )
        remember(_plans, key, plan)
    grad_x = torch.empty(x.shape, dtype=x.dtype, device=device)
    sums = found.new_empty(plan.sums)
    dots = found.new_empty(n_directions, n_rows)
    plan.rows(plan.grid, *operands, grad_x, sums, dots)
    gradients = found.new_empty(1 + has_bias, width)
    plan.second(plan.second_grid, sums, dots, gradients, found)
    if segments is not None:
        found = sum_tokens(dots, batch, tokens, segments, False)
        found = found if directions.dim() == 2 else found.squeeze(1)
    weight_grad, *bias_grad = gradients.unbind(0)
    return grad_x, weight_grad, bias_grad[0] if has_bias else None, found
