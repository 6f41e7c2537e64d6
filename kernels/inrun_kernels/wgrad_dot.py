"""Scores riding on the weight-gradient GEMM.

    weight_grad = sum_b grads_b^T acts_b        dots[b, m] = <grads_b^T acts_b, D_m>

Source: arXiv 2406.11011, section 4.2; here the per-sample gradient lives one tile at a time in registers.
A program owns a tile of the weight and walks the tokens sample by sample with two accumulators. At each sample
boundary the per-sample tile is contracted with the same tile of every direction, then added to the total.

FLOPs: 2*B*T*I*O + 2*S*M*I*O.  Bytes: acts and grads once per row or column of tiles, S*M*I*O of directions
(mostly from L2), I*O*4 out, and S*M*tiles*4 partial dots, which a second stage sums in a fixed order. For a
small weight the samples are split among programs, whose totals are then summed in order.
"""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from inrun_kernels.config import ceil_div, matrix_tile, sample_splits
from inrun_kernels.tiles import INTERPRETED, aligned, contract, multiprocessors, one_row, sample_tokens


@triton.jit
def _wgrad_dot_kernel(
    acts_ptr,
    grads_ptr,
    val_grad_ptr,
    offsets_ptr,
    weight_ptr,  # [splits, O, I]
    partial_ptr,  # [tiles, S, M]
    tokens,
    inputs,
    outputs,
    n_samples,
    n_directions,
    samples_per_split,
    stride_ab,
    stride_at,
    stride_ai,
    stride_gb,
    stride_gt,
    stride_go,
    stride_dm,
    stride_do,
    stride_di,
    HAS_OFFSETS: tl.constexpr,
    WIDEN: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pid_tile, pid_split = tl.program_id(0), tl.program_id(1)
    tiles_i = tl.cdiv(inputs, BLOCK_I)
    offs_o = (pid_tile // tiles_i).to(tl.int64) * BLOCK_O + tl.arange(0, BLOCK_O)
    offs_i = (pid_tile % tiles_i).to(tl.int64) * BLOCK_I + tl.arange(0, BLOCK_I)
    mask_o, mask_i = offs_o < outputs, offs_i < inputs
    mask_w = mask_o[:, None] & mask_i[None, :]
    val_grad_ptrs = val_grad_ptr + offs_o[:, None] * stride_do + offs_i[None, :] * stride_di

    offs_t = tl.arange(0, BLOCK_T).to(tl.int64)[:, None]
    offs_a = offs_t * stride_at + offs_i[None, :] * stride_ai  # [T, I]
    offs_g = offs_t * stride_gt + offs_o[None, :] * stride_go  # [T, O]
    total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
    first = pid_split * samples_per_split
    for sample in range(first, tl.minimum(first + samples_per_split, n_samples)):
        row, start, length = sample_tokens(offsets_ptr, sample, tokens, HAS_OFFSETS)
        a_ptr = acts_ptr + row * stride_ab + start * stride_at
        g_ptr = grads_ptr + row * stride_gb + start * stride_gt
        of_sample = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        for low in range(0, length, BLOCK_T):
            mask_t = offs_t < length - low
            a = tl.load(a_ptr + low * stride_at + offs_a, mask=mask_t & mask_i[None, :], other=0.0)
            g = tl.load(g_ptr + low * stride_gt + offs_g, mask=mask_t & mask_o[None, :], other=0.0)
            of_sample = contract(tl.trans(g), a, of_sample, WIDEN)
        dots_ptr = partial_ptr + (pid_tile.to(tl.int64) * n_samples + sample) * n_directions
        for m in range(n_directions):
            d = tl.load(val_grad_ptrs + tl.cast(m, tl.int64) * stride_dm, mask=mask_w, other=0.0)  # [O, I]
            tl.store(dots_ptr + m, tl.sum(tl.sum(of_sample * d.to(tl.float32), 1), 0))
        total += of_sample
    split_ptr = weight_ptr + pid_split.to(tl.int64) * outputs * inputs
    tl.store(split_ptr + offs_o[:, None] * inputs + offs_i[None, :], total, mask=mask_w)


def launch_wgrad_dot(acts: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None) -> tuple[Tensor, Tensor]:
    """`acts [B,T,I]`, `grads [B,T,O]`, `val_grad [M,O,I]` -> `(weight_grad [O,I], dots [S,M])`, float32."""
    n_samples = acts.shape[0] if segments is None else segments.shape[0] - 1
    acts, grads = one_row(acts, segments), one_row(grads, segments)
    batch, tokens, inputs = acts.shape
    n_directions, outputs, _ = val_grad.shape
    mean_tokens = batch * tokens // max(1, n_samples)
    vectors = aligned(acts, grads, val_grad)
    tile = matrix_tile(acts.dtype, outputs, inputs, mean_tokens, accumulators=2, aligned=vectors)
    tiles = ceil_div(outputs, tile.block_m) * ceil_div(inputs, tile.block_n)
    splits = sample_splits(tiles, n_samples, multiprocessors(acts.device))
    weight = torch.empty(splits, outputs, inputs, dtype=torch.float32, device=acts.device)
    partial = torch.empty(tiles, n_samples, n_directions, dtype=torch.float32, device=acts.device)
    _wgrad_dot_kernel[(tiles, splits)](
        acts,
        grads,
        val_grad,
        segments,
        weight,
        partial,
        tokens,
        inputs,
        outputs,
        n_samples,
        n_directions,
        ceil_div(n_samples, splits),
        *acts.stride(),
        *grads.stride(),
        *val_grad.stride(),
        HAS_OFFSETS=segments is not None,
        WIDEN=INTERPRETED and acts.dtype == torch.bfloat16,
        BLOCK_O=tile.block_m,
        BLOCK_I=tile.block_n,
        BLOCK_T=tile.block_k,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return weight[0] if splits == 1 else weight.sum(0), partial.sum(0)
