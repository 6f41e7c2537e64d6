"""Dots of every training sample with every validation sample, from activations alone.

    dots[b, v] = sum_{t,s} (acts[b,t] . val_acts[v,s]) * (grads[b,t] . val_grads[v,s])

Source: arXiv 2406.11011, appendix D. Tiled like attention: for a tile of token pairs both inner products are
accumulated in registers, multiplied and summed; no matrix of token pairs is stored.

FLOPs: 2*B*T*V*S*(I+O).  Bytes: acts and grads once per validation tile (from L2), V times B*tiles*4 partials,
summed in a fixed order.
"""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from inrun_kernels.config import ceil_div, matrix_tiles
from inrun_kernels.tiles import INTERPRETED, aligned, chip, contract, copyable, descriptor, load_columns


@triton.jit
def _inner_products(
    x,  # pointers to the rows [T], or descriptor of [B, T, K]
    y,  # pointers to the rows [S], or descriptor of [V, S, K]
    b,
    v,
    first_t,
    first_s,
    mask_t,
    mask_s,
    width,
    stride_x,
    stride_y,
    COPIES: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """x_t . y_s for a tile of tokens [T, S]."""
    tl.assume(width > 0)  # else ptxas waits for each matrix instruction
    acc = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
    for low in range(0, width, BLOCK_K):
        if COPIES:
            x_tile = x.load([b, first_t, low]).reshape(BLOCK_T, BLOCK_K)
            y_tile = tl.trans(y.load([v, first_s, low]).reshape(BLOCK_S, BLOCK_K))
        else:
            offs_k = low + tl.arange(0, BLOCK_K)
            mask_k = offs_k < width
            x_tile = load_columns(x, mask_t, offs_k, mask_k, stride_x)
            y_tile = tl.trans(load_columns(y, mask_s, offs_k, mask_k, stride_y))
        acc = contract(x_tile, y_tile, acc, WIDEN)  # [T, K] x [K, S]
    return acc


@triton.jit
def _pairwise_kernel(
    acts,  # pointer or descriptor, as the next three; [B, T, I]
    grads,  # [B, T, O]
    val_acts,  # [V, S, I]
    val_grads,  # [V, S, O]
    partial_ptr,  # [tiles, B, V]
    tokens,
    val_tokens,
    inputs,
    outputs,
    stride_ab,
    stride_at,
    stride_ai,
    stride_gb,
    stride_gt,
    stride_go,
    stride_vab,
    stride_vat,
    stride_vai,
    stride_vgb,
    stride_vgt,
    stride_vgo,
    COPIES: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b, v, pid_t = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first_t = pid_t * BLOCK_T
    offs_t = first_t.to(tl.int64) + tl.arange(0, BLOCK_T)
    mask_t = offs_t < tokens
    a, g = acts, grads
    if not COPIES:
        a += b.to(tl.int64) * stride_ab + offs_t * stride_at
        g += b.to(tl.int64) * stride_gb + offs_t * stride_gt
    dots = tl.zeros([BLOCK_T], tl.float32)
    for low in range(0, val_tokens, BLOCK_S):
        offs_s = low + tl.arange(0, BLOCK_S)
        mask_s = offs_s < val_tokens
        if COPIES:
            va, vg = val_acts, val_grads
        else:
            va = val_acts + v.to(tl.int64) * stride_vab + offs_s.to(tl.int64) * stride_vat
            vg = val_grads + v.to(tl.int64) * stride_vgb + offs_s.to(tl.int64) * stride_vgt
        of_acts = _inner_products(
            a, va, b, v, first_t, low, mask_t, mask_s, inputs, stride_ai, stride_vai,
            COPIES, WIDEN, BLOCK_T, BLOCK_S, BLOCK_K,
        )  # fmt: skip
        of_grads = _inner_products(
            g, vg, b, v, first_t, low, mask_t, mask_s, outputs, stride_go, stride_vgo,
            COPIES, WIDEN, BLOCK_T, BLOCK_S, BLOCK_K,
        )  # fmt: skip
        dots += tl.sum(of_acts * of_grads, 1)
    out = (pid_t.to(tl.int64) * tl.num_programs(0) + b) * tl.num_programs(1) + v
    tl.store(partial_ptr + out, tl.sum(dots))


def launch_pairwise(acts: Tensor, grads: Tensor, val_acts: Tensor, val_grads: Tensor) -> Tensor:
    """`acts [B,T,I]`, `grads [B,T,O]`, `val_acts [V,S,I]`, `val_grads [V,S,O]` -> `[B,V]`, float32."""
    (batch, tokens, inputs), outputs = acts.shape, grads.shape[2]
    n_val, val_tokens, _ = val_acts.shape
    operands, where = (acts, grads, val_acts, val_grads), chip(acts.device)
    strides = [stride for x in operands for stride in x.stride()]
    copies = where.copies and acts.dtype != torch.float32 and copyable(*operands)
    vectors, sizes = copies or aligned(*operands), (tokens, val_tokens, max(inputs, outputs))
    tile = matrix_tiles(where, acts.dtype, *sizes, accumulators=2, copies=copies, aligned=vectors)[0]
    if copies:
        rows = (tile.block_m, tile.block_m, tile.block_n, tile.block_n)
        operands = tuple(descriptor(x, [1, n, tile.block_k]) for x, n in zip(operands, rows, strict=True))
    tiles = ceil_div(tokens, tile.block_m)
    partial = torch.empty(tiles, batch, n_val, dtype=torch.float32, device=acts.device)
    _pairwise_kernel[(batch, n_val, tiles)](
        *operands,
        partial,
        tokens,
        val_tokens,
        inputs,
        outputs,
        *strides,
        COPIES=copies,
        WIDEN=INTERPRETED and acts.dtype == torch.bfloat16,
        BLOCK_T=tile.block_m,
        BLOCK_S=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return partial.sum(0)
