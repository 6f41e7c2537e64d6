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
from inrun_kernels.tiles import INTERPRETED, aligned, chip, contract


@triton.jit
def _inner_products(x_ptrs, y_ptrs, mask_x, mask_y, width, stride_x, stride_y, acc, WIDEN, BLOCK_K: tl.constexpr):
    """acc[t, s] + x_t . y_s, for rows at x_ptrs [N] and y_ptrs [S]."""
    for low in range(0, width, BLOCK_K):
        offs_k = low + tl.arange(0, BLOCK_K)
        mask_k = offs_k < width
        offs_k = offs_k.to(tl.int64)
        x = tl.load(x_ptrs[:, None] + offs_k[None, :] * stride_x, mask=mask_x[:, None] & mask_k[None, :], other=0.0)
        y = tl.load(y_ptrs[None, :] + offs_k[:, None] * stride_y, mask=mask_y[None, :] & mask_k[:, None], other=0.0)
        acc = contract(x, y, acc, WIDEN)  # [T, K] x [K, S]
    return acc


@triton.jit
def _pairwise_kernel(
    acts_ptr,
    grads_ptr,
    val_acts_ptr,
    val_grads_ptr,
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
    WIDEN: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    b, v, pid_t = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2)
    offs_t = pid_t.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    mask_t = offs_t < tokens
    acts_ptrs = acts_ptr + b * stride_ab + offs_t * stride_at
    grads_ptrs = grads_ptr + b * stride_gb + offs_t * stride_gt
    dots = tl.zeros([BLOCK_T], tl.float32)
    for low in range(0, val_tokens, BLOCK_S):
        offs_s = low + tl.arange(0, BLOCK_S)
        mask_s = offs_s < val_tokens
        offs_s = offs_s.to(tl.int64)
        val_acts_ptrs = val_acts_ptr + v * stride_vab + offs_s * stride_vat
        val_grads_ptrs = val_grads_ptr + v * stride_vgb + offs_s * stride_vgt
        zeros = tl.zeros([BLOCK_T, BLOCK_S], tl.float32)
        of_acts = _inner_products(
            acts_ptrs, val_acts_ptrs, mask_t, mask_s, inputs, stride_ai, stride_vai, zeros, WIDEN, BLOCK_K
        )
        of_grads = _inner_products(
            grads_ptrs, val_grads_ptrs, mask_t, mask_s, outputs, stride_go, stride_vgo, zeros, WIDEN, BLOCK_K
        )
        dots += tl.sum(of_acts * of_grads, 1)
    out = (pid_t.to(tl.int64) * tl.num_programs(0) + b) * tl.num_programs(1) + v
    tl.store(partial_ptr + out, tl.sum(dots))


def launch_pairwise(acts: Tensor, grads: Tensor, val_acts: Tensor, val_grads: Tensor) -> Tensor:
    """`acts [B,T,I]`, `grads [B,T,O]`, `val_acts [V,S,I]`, `val_grads [V,S,O]` -> `[B,V]`, float32."""
    (batch, tokens, inputs), outputs = acts.shape, grads.shape[2]
    n_val, val_tokens, _ = val_acts.shape
    vectors = aligned(acts, grads, val_acts, val_grads)
    tile = matrix_tiles(
        chip(acts.device), acts.dtype, tokens, val_tokens, max(inputs, outputs), accumulators=2, aligned=vectors
    )[0]
    tiles = ceil_div(tokens, tile.block_m)
    partial = torch.empty(tiles, batch, n_val, dtype=torch.float32, device=acts.device)
    _pairwise_kernel[(batch, n_val, tiles)](
        acts,
        grads,
        val_acts,
        val_grads,
        partial,
        tokens,
        val_tokens,
        inputs,
        outputs,
        *acts.stride(),
        *grads.stride(),
        *val_acts.stride(),
        *val_grads.stride(),
        WIDEN=INTERPRETED and acts.dtype == torch.bfloat16,
        BLOCK_T=tile.block_m,
        BLOCK_S=tile.block_n,
        BLOCK_K=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return partial.sum(0)
