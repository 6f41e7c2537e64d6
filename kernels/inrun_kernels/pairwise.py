"""Dots of every training sample with every validation sample, from activations alone.

    dots[b, v] = sum_{t,s} (acts[b,t] . val_acts[v,s]) * (grads[b,t] . val_grads[v,s])

Source: arXiv 2406.11011, appendix D. Tiled like attention: for a tile of token pairs both inner products are
accumulated in registers, multiplied and summed; no matrix of token pairs is stored.

Training tokens are numbered through the batch, and a tile of validation tokens holds several short samples or a part
of a long one, so that neither short samples nor their ends leave a tile empty. A program walks all blocks of all its
tiles in one loop: first those of acts, then those of grads, so that loads run ahead from one product into the next.

FLOPs: 2*B*T*V*S*(I+O).  Bytes: acts and grads once per validation tile (from L2), splits*V*B*T*4 partial dots, which
a second stage sums in a fixed order.
"""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from inrun_kernels import tuning
from inrun_kernels.config import Tile, ceil_div, matrix_tiles, resident_programs, sample_splits
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
    multiprocessors,
    precision,
    rounded,
    sum_tokens,
    token_starts,
)

_CACHED = 32 << 20  # bytes that a last cache keeps, beside what passes through
_COPIED = 1 << 27  # elements of either side that are copied to aligned rows at a time: 256 MB
_FEW = 256  # tokens of a side, for which the other's are read as they are


@triton.jit
def _pairwise_kernel(
    acts,  # pointer to [B, T, I], or descriptor of [B*T, I]
    grads,  # pointer to [B, T, O], or descriptor of [B*T, O]
    val_acts,  # pointer or descriptor, [V, S, I]
    val_grads,  # pointer or descriptor, [V, S, O]
    partial_ptr,  # [splits, V, B*T]
    n_tokens,
    tokens,
    n_val,
    val_tokens,
    inputs,
    outputs,
    splits,
    tiles_per_split,
    pieces_per_program,
    programs,  # of a tile of training tokens
    carry,
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
    ASYNCHRONOUS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    # A piece is a part, of tiles_per_split tiles, of the tokens of BLOCK_V validation samples.
    pid_piece, pid_t = tl.program_id(0) % programs, tl.program_id(0) // programs
    first_piece = pid_piece * pieces_per_program
    n_pieces = tl.minimum(pieces_per_program, tl.cdiv(n_val, BLOCK_V) * splits - first_piece)
    blocks_i = tl.cdiv(inputs, BLOCK_K)
    blocks = blocks_i + tl.cdiv(outputs, BLOCK_K)

    first_t = pid_t * BLOCK_T
    offs_t = first_t + tl.arange(0, BLOCK_T)
    mask_t = offs_t < n_tokens
    offs_v = tl.arange(0, BLOCK_V)
    offs_y = tl.arange(0, BLOCK_V * BLOCK_S)  # validation tokens of a tile

    dots = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    of_acts = tl.zeros([BLOCK_T, BLOCK_V * BLOCK_S], tl.float32)
    product = tl.zeros([BLOCK_T, BLOCK_V * BLOCK_S], tl.float32)
    n_blocks = n_pieces * tiles_per_split * blocks
    tl.assume(n_blocks > 0)  # else ptxas waits for each matrix instruction
    block, of_split = tl.cast(-1, tl.int32), tl.cast(0, tl.int32)  # the tile's, and the split's tile
    split, group = first_piece % splits, first_piece // splits
    for step in range(n_blocks):
        if COPIES:  # counted: to divide takes as many instructions as all else in a block
            block += 1
            of_split += tl.where(block == blocks, 1, 0)
            block = tl.where(block == blocks, 0, block)
            split += tl.where(of_split == tiles_per_split, 1, 0)
            of_split = tl.where(of_split == tiles_per_split, 0, of_split)
            group += tl.where(split == splits, 1, 0)
            split = tl.where(split == splits, 0, split)
        else:  # counters would take registers that float32 has not
            tile, block = step // blocks, step % blocks
            piece, of_split = first_piece + tile // tiles_per_split, tile % tiles_per_split
            group, split = piece // splits, piece % splits
        first_v, first_s = group * BLOCK_V, (split * tiles_per_split + of_split) * BLOCK_S
        on_acts = block < blocks_i
        low = tl.where(on_acts, block, block - blocks_i) * BLOCK_K
        if COPIES:
            if on_acts:
                x, y = acts, val_acts
            else:
                x, y = grads, val_grads
            x_tile = x.load([first_t, low])
            y_tile = tl.trans(y.load([first_v, first_s, low]).reshape(BLOCK_V * BLOCK_S, BLOCK_K))
        else:
            offs_k = low + tl.arange(0, BLOCK_K)
            mask_k = offs_k < tl.where(on_acts, inputs, outputs)
            v, s = first_v + offs_y // BLOCK_S, first_s + offs_y % BLOCK_S
            mask_y = (v < n_val) & (s < val_tokens)
            x = tl.where(on_acts, acts, grads)
            stride_xb, stride_xt = tl.where(on_acts, stride_ab, stride_gb), tl.where(on_acts, stride_at, stride_gt)
            x_rows = token_starts(x, offs_t, tokens, stride_xb, stride_xt)
            x_tile = load_columns(x_rows, mask_t, offs_k, mask_k, tl.where(on_acts, stride_ai, stride_go))
            stride_yv, stride_ys = tl.where(on_acts, stride_vab, stride_vgb), tl.where(on_acts, stride_vat, stride_vgt)
            y_rows = tl.where(on_acts, val_acts, val_grads) + v.to(tl.int64) * stride_yv + s.to(tl.int64) * stride_ys
            y_ptrs = y_rows[None, :] + offs_k.to(tl.int64)[:, None] * tl.where(on_acts, stride_vai, stride_vgo)
            y_tile = tl.load(y_ptrs, mask=mask_k[:, None] & mask_y[None, :], other=0.0)
        product = contract(x_tile, y_tile, product, PRECISION)  # [T, K] x [K, V * S]
        if (block == blocks_i - 1) | (block == blocks - 1):
            pairs = tl.sum(tl.reshape(of_acts * product, [BLOCK_T, BLOCK_V, BLOCK_S]), 2)
            dots += tl.where(on_acts, 0.0, pairs)
            of_acts = tl.where(on_acts, product, 0.0)
            if ASYNCHRONOUS:  # as in wgrad_dot.py: a choice at run time keeps this out of the other blocks
                product = tl.where(carry > 0, product, 0.0)
            else:
                product = tl.zeros([BLOCK_T, BLOCK_V * BLOCK_S], tl.float32)
            if (block == blocks - 1) & (of_split == tiles_per_split - 1):
                of_v = first_v + offs_v
                out = (split * n_val + of_v).to(tl.int64)[None, :] * n_tokens + offs_t[:, None]
                tl.store(partial_ptr + out, dots, mask=mask_t[:, None] & (of_v < n_val)[None, :])
                dots = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)


def launch_pairwise(acts: Tensor, grads: Tensor, val_acts: Tensor, val_grads: Tensor) -> Tensor:
    """`acts [B,T,I]`, `grads [B,T,O]`, `val_acts [V,S,I]`, `val_grads [V,S,O]` -> `[B,V]`, float32."""
    readable = copyable if chip(acts.device).copies else aligned
    copied = [not readable(*of_both) for of_both in ((acts, val_acts), (grads, val_grads))]
    few = min(len(x) * x.shape[1] for x in (acts, val_acts)) < _FEW
    if acts.dtype == torch.float32 or few or not any(copied):
        return _launch(acts, grads, val_acts, val_grads)
    # As of a head with an odd vocabulary, which read an element at a time has less than half the rate. A copy of one
    # side's element (6 bytes) takes by count a part of its product with the other's tokens (2 FLOPs with each).
    columns = []
    for val in _copies(val_acts, val_grads, copied):
        columns.append(torch.cat([_launch(*train, *val) for train in _copies(acts, grads, copied)]))
    return torch.cat(columns, 1)


def _copies(acts: Tensor, grads: Tensor, copied: list[bool]) -> Iterator[list[Tensor]]:
    """The samples of one side, some at a time; of what is `copied` rows are aligned, with zeros at the ends."""
    elements = sum(x[0].numel() for x, copy in zip((acts, grads), copied, strict=True) if copy)
    for part in zip(*(x.split(max(1, _COPIED // elements)) for x in (acts, grads)), strict=True):
        yield [_aligned_copy(x) if copy else x for x, copy in zip(part, copied, strict=True)]


def _aligned_copy(x: Tensor) -> Tensor:
    out = x.new_zeros(*x.shape[:2], ceil_div(x.shape[2], 16) * 16)
    out[..., : x.shape[2]] = x
    return out


def _launch(acts: Tensor, grads: Tensor, val_acts: Tensor, val_grads: Tensor) -> Tensor:
    (batch, tokens, inputs), outputs = acts.shape, grads.shape[2]
    (n_val, val_tokens, _), n_tokens = val_acts.shape, batch * tokens
    operands, where = rounded(acts, grads, val_acts, val_grads), chip(acts.device)
    strides = [stride for x in operands for stride in x.stride()]
    copies = where.copies and acts.dtype != torch.float32 and flattens(acts, grads)
    copies = copies and copyable(acts.flatten(0, 1), grads.flatten(0, 1), val_acts, val_grads)
    padded = triton.next_power_of_2(val_tokens)
    sizes = n_tokens, padded * triton.next_power_of_2(n_val), max(inputs, outputs)
    vectors = copies or aligned(*operands)
    tiles_that_fit = matrix_tiles(where, acts.dtype, *sizes, accumulators=2, copies=copies, aligned=vectors)

    def run(tile: Tile) -> Tensor:
        block_s = min(tile.block_n, padded)
        block_v = tile.block_n // block_s
        passed = operands
        if copies:
            passed = (
                *(descriptor(x.flatten(0, 1), [tile.block_m, tile.block_k]) for x in operands[:2]),
                *(descriptor(x, [block_v, block_s, tile.block_k]) for x in operands[2:]),
            )
        # Programs walk as many validation samples as leave the device full; where those are few, a part of one.
        tiles_t, groups, tiles_s = (
            ceil_div(n_tokens, tile.block_m),
            ceil_div(n_val, block_v),
            ceil_div(val_tokens, block_s),
        )
        slots = multiprocessors(acts.device) * resident_programs(tile, 2)
        wanted = sample_splits(max(1, tiles_t), groups * tiles_s, slots)
        # What the training tokens that are read at once take of the cache: each program reads its own anew for each of
        # its tiles.
        rows = slots * tile.block_m * (inputs + outputs) * acts.element_size()
        wanted = min(groups * tiles_s, max(wanted, ceil_div(rows, _CACHED)))
        tiles_per_split = ceil_div(tiles_s, max(1, wanted // groups))
        splits = ceil_div(tiles_s, tiles_per_split)
        pieces_per_program = ceil_div(groups * splits, wanted)
        partial = torch.empty(splits, n_val, n_tokens, dtype=torch.float32, device=acts.device)
        programs = ceil_div(groups * splits, pieces_per_program)
        launch(
            _pairwise_kernel,
            (tiles_t * programs,),
            [*passed, partial],
            (
                n_tokens,
                tokens,
                n_val,
                val_tokens,
                inputs,
                outputs,
                splits,
                tiles_per_split,
                pieces_per_program,
                programs,
                0.0,
                *strides,
            ),
            COPIES=copies,
            ASYNCHRONOUS=where.asynchronous,
            PRECISION=precision(acts),
            BLOCK_T=tile.block_m,
            BLOCK_V=block_v,
            BLOCK_S=block_s,
            BLOCK_K=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )
        return partial[0] if splits == 1 else partial.sum(0)

    tile = tiles_that_fit[0]
    if tuning.is_on():
        shapes = Sizes(batch, tokens, inputs, outputs, 1, n_val, val_tokens)
        tile = tuning.choose("pairwise", tiles_that_fit, shapes, f"{precision(acts)} {copies} {vectors}", acts, run)
    return sum_tokens(run(tile), batch, tokens, None, False)
