"""Scores riding on the weight-gradient GEMM.

    weight_grad = sum_b grads_b^T acts_b        dots[b, m] = <grads_b^T acts_b, D_m>

Source: arXiv 2406.11011, section 4.2; here the per-sample gradient lives one tile at a time in registers.
A program owns a tile of the weight and walks the tokens of its samples in one loop of blocks, so that loads run ahead
over the samples' boundaries. After a sample's last block the tile is contracted with the same tile of every
direction. Two forms:

    two     the accumulator holds one sample, is added to a second one and starts again. Errors are relative to the
            sample's own terms, and a sample's dot does not depend on the rest of the batch.
    prefix  one accumulator runs on, and a dot is the difference of two contractions of it: registers for a tile
            twice as large. Errors are relative to the sum of the samples before it in its program: a sample makes a
            float32 rounding of that for each 16 of its tokens. Tensor cores round towards zero, so these add up.

Where tiles are copied by tensor descriptors and there is one direction, its tile waits in shared memory: Triton sinks
the load of a loop-invariant operand to its use.

Without a direction the same loop has the samples' squares (`ghost_square`, form "two"): a tile is squared before it is
added, and its sum is the sample's share of its squared norm.

A bias rides along: its gradient is the sum of the rows of grads, of which the programs of the weight's first column of
tiles have each in hand. They keep it as they keep the tile, in either form, and add its dots to the tile's. They sum by
the narrowest matrix product with ones there is, whose columns are all alike: for a tile that is also summed otherwise,
Triton gives up the order in shared memory that the tensor cores read without conflicts. Not in float32, and not where
matrix instructions run on while the program does: of a tile that such an instruction and the program both read, Triton
3.7.1 holds one buffer too few, and the next copy would overwrite what the instruction still reads. There the bias is a
pass of its own, whose column sums and parts of dots the second stage adds up with the others.

FLOPs: 2*B*T*I*O + 2*S*M*I*O.  Bytes: acts and grads once per row or column of tiles, M*I*O of directions (S times,
mostly from L2, where they do not wait in shared memory), I*O*4 out, and S*M*tiles*4 partial dots (twice that
where a sample may be cut in two), which a second stage sums in a fixed order.

Tiles that fill the device have a program each. Those that are left over share all programs (`config.share`), which walk
them unit by unit: a unit is a sample, or with "prefix" in half precision, without offsets, a block of tokens. A tile
that several programs had is left in pieces, which the second stage adds up in order.
"""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from inrun_kernels import tuning
from inrun_kernels.config import (
    Chip,
    Share,
    Tile,
    ceil_div,
    chip_named,
    matrix_tiles,
    resident_programs,
    share,
    wgrad_accumulators,
)
from inrun_kernels.cost import Sizes
from inrun_kernels.rows import by_columns, columns_of, launch_columns, launch_row_wgrad_dot
from inrun_kernels.tiles import (
    INTERPRETED,
    Launch,
    aligned,
    architecture,
    chip,
    contract,
    copyable,
    descriptor,
    multiprocessors,
    one_row,
    placed,
    precision,
    rounded,
    tile_order,
)

_ALIKE = tl.constexpr(16)  # columns of a product with ones
_COPIED = 1 << 26  # elements of the output gradients that are copied to aligned rows at a time: 128 MB
_COLUMNS = 128  # of them at least, and fewer are read as they are
_COLUMN_SUMS = 16  # of a bias, which a program of the second stage adds up
_ADDED = 4096  # elements of a tile that a program of the second stage adds up


@triton.jit
def _count_blocks(offsets_ptr, first, last, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """Blocks of tokens in segments first to last; an empty segment has one, of no tokens."""
    blocks = tl.zeros([BLOCK_S], tl.int32)
    for low in range(first, last, BLOCK_S):
        offs_s = low + tl.arange(0, BLOCK_S)
        mask_s = offs_s < last
        starts = tl.load(offsets_ptr + offs_s, mask=mask_s, other=0)
        ends = tl.load(offsets_ptr + offs_s + 1, mask=mask_s, other=0)
        counts = tl.maximum(tl.cdiv(ends - starts, BLOCK_T), 1)
        blocks += tl.where(mask_s, counts, 0).to(tl.int32)
    return tl.sum(blocks, 0)


# How many documents a batch holds changes from step to step, and nothing is gained by a kernel for each kind of number.
@triton.jit(do_not_specialize=["n_samples", "whole", "units", "span", "per"])
def _wgrad_dot_kernel(
    acts,  # pointer or descriptor, [B, T, I]
    grads,  # pointer or descriptor, [B, T, O]
    val_grad,  # pointer or descriptor, [M, O, I]; None for squares
    bias_val_grad_ptr,  # [M, O]
    offsets_ptr,
    weight_ptr,  # [O, I]
    bias_ptr,  # [O]
    pieces_ptr,  # [pieces, BLOCK_O, BLOCK_I], float32
    bias_pieces_ptr,  # [pieces, BLOCK_O], float32
    partial_ptr,  # [S, M or 1, row_length]: in a row, of each tile, and with WITHIN of each cut one's second part
    row_length,
    tokens,
    inputs,
    outputs,
    n_samples,
    whole,  # tiles, the first, that have a program each
    units,  # of a tile's work: samples, or with WITHIN blocks of tokens
    span,  # units from a shared tile's first to the next one's, of which those beyond `units` are empty
    per,  # units of each of the programs that share the other tiles
    carry,
    stride_ab,
    stride_at,
    stride_ai,
    stride_gb,
    stride_gt,
    stride_go,
    stride_dm,
    stride_do,
    stride_di,
    stride_bm,
    stride_bo,
    DIRECTIONS: tl.constexpr,  # 0: squares
    LANES: tl.constexpr,  # directions, rounded up to a power of two
    HAS_BIAS: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    COPY_TOKENS: tl.constexpr,
    COPY_D: tl.constexpr,
    KEEP_D: tl.constexpr,
    PREFIX: tl.constexpr,
    WITHIN: tl.constexpr,  # whether a program may begin and end within a sample
    SHARED: tl.constexpr,  # whether there are tiles that programs share
    ASYNCHRONOUS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    tiles = tiles_o * tiles_i
    blocks = tl.cdiv(tokens, BLOCK_T)
    first_tile, last_tile = pid + 0, pid + 1
    begin, end = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
    if SHARED:  # noqa: SIM102 (known when compiling)
        if pid >= whole:
            begin = (pid - whole).to(tl.int64) * per  # unit by unit, through the tiles that are shared
            end = tl.minimum(begin + per, (tiles - whole).to(tl.int64) * span)
            first_tile = whole + (begin // span).to(tl.int32)
            last_tile = whole + tl.cdiv(end, span).to(tl.int32)
    offs_t = tl.arange(0, BLOCK_T)[:, None]
    offs_tokens = tl.arange(0, BLOCK_T)[None, :]
    lanes = tl.arange(0, LANES)
    # The last tile first: of programs that have the end of one tile and the beginning of another, all are then at the
    # same samples at the same time, or all as far behind, and share what they read in the cache.
    for back in range(last_tile - first_tile):
        tile = last_tile - 1 - back
        low, high = 0, units
        if SHARED:  # noqa: SIM102
            if pid >= whole:
                of_tile = (tile - whole).to(tl.int64) * span
                low = tl.maximum(begin - of_tile, 0).to(tl.int32)
                high = tl.minimum(end - of_tile, units).to(tl.int32)
        pid_o, pid_i = tile_order(tile, tiles_o, tiles_i)
        first_o, first_i = pid_o * BLOCK_O, pid_i * BLOCK_I
        offs_o = first_o.to(tl.int64) + tl.arange(0, BLOCK_O)
        offs_i = first_i.to(tl.int64) + tl.arange(0, BLOCK_I)
        mask_o, mask_i = offs_o < outputs, offs_i < inputs
        mask_w = mask_o[:, None] & mask_i[None, :]
        offs_d = offs_o[:, None] * stride_do + offs_i[None, :] * stride_di
        offs_a = offs_t.to(tl.int64) * stride_at + offs_i[None, :] * stride_ai  # [T, I]
        # The transposed tile itself: what is transposed after it was loaded passes through registers before Hopper.
        offs_g = offs_o[:, None] * stride_go + offs_tokens.to(tl.int64) * stride_gt  # [O, T]

        first = low // blocks if WITHIN else low
        at = low % blocks * BLOCK_T if WITHIN else low * 0  # as token, without offsets; counted, which is quicker
        part = tl.where(at > 0, 1, 0)  # of the first sample, which another program began
        if HAS_OFFSETS:
            n_blocks = _count_blocks(offsets_ptr, low, high, BLOCK_T, 128)
        elif WITHIN:
            n_blocks = high - low
        else:
            n_blocks = (high - low) * blocks
        tl.assume(n_blocks > 0)
        if KEEP_D:
            d = val_grad.load([0, first_o, first_i]).reshape(BLOCK_O, BLOCK_I)
        total = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
        product = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)  # of this sample; with PREFIX of all so far
        before = tl.zeros([LANES], tl.float32)  # with PREFIX: contractions of all before this sample
        if HAS_BIAS:
            mask_b = offs_o < tl.where(pid_i == 0, outputs, 0)
            total_b, product_b = tl.zeros([BLOCK_O, _ALIKE], tl.float32), tl.zeros([BLOCK_O, _ALIKE], tl.float32)
        sample, row = first - 1 if HAS_OFFSETS else first + 0, tl.cast(0, tl.int64)
        token, left = tl.cast(0, tl.int64), tl.cast(0, tl.int64)
        for block in range(n_blocks):
            # Where the block starts, and how many tokens of its sample are left there.
            if HAS_OFFSETS:
                if left <= 0:
                    sample += 1
                    token = tl.load(offsets_ptr + sample).to(tl.int64)
                    left = tl.load(offsets_ptr + sample + 1).to(tl.int64) - token
            else:
                ended = at >= tokens
                sample += tl.where(ended, 1, 0)
                part = tl.where(ended, 0, part)
                at = tl.where(ended, 0, at)
                row, token = sample.to(tl.int64), at.to(tl.int64)
                left = tokens - token
            if COPY_TOKENS:
                a = acts.load([sample, at, first_i]).reshape(BLOCK_T, BLOCK_I)
                g = tl.trans(grads.load([sample, at, first_o]).reshape(BLOCK_T, BLOCK_O))
            else:
                mask_t = offs_t < left
                a_ptr = acts + row * stride_ab + token * stride_at
                g_ptr = grads + row * stride_gb + token * stride_gt
                a = tl.load(a_ptr + offs_a, mask=mask_t & mask_i[None, :], other=0.0)
                g = tl.load(g_ptr + offs_g, mask=mask_o[:, None] & (offs_tokens < left), other=0.0)
            product = contract(g, a, product, PRECISION)
            if HAS_BIAS:  # noqa: SIM102 (known when compiling)
                if pid_i == 0:
                    ones = tl.full([BLOCK_T, _ALIKE], 1.0, tl.float32).to(g.dtype)
                    product_b = contract(g, ones, product_b, PRECISION)
            ends = left <= BLOCK_T
            if WITHIN:
                ends = ends | (block == n_blocks - 1)
            if ends:
                dots_ptr = partial_ptr + sample.to(tl.int64) * max(DIRECTIONS, 1) * row_length + part * tiles + tile
                if DIRECTIONS == 0:
                    squares = product * product
                    total += squares
                    tl.store(dots_ptr, tl.sum(squares))
                for m in tl.static_range(DIRECTIONS):
                    if COPY_D and not KEEP_D:
                        d = val_grad.load([m, first_o, first_i]).reshape(BLOCK_O, BLOCK_I)
                    elif not COPY_D:
                        d_ptrs = val_grad + tl.cast(m, tl.int64) * stride_dm + offs_d
                        d = tl.load(d_ptrs, mask=mask_w, other=0.0)  # [O, I]
                    dot = tl.sum(product * d.to(tl.float32))
                    if HAS_BIAS:
                        b_ptrs = bias_val_grad_ptr + tl.cast(m, tl.int64) * stride_bm + offs_o * stride_bo
                        b = tl.load(b_ptrs, mask=mask_b, other=0.0)
                        dot += tl.sum(tl.max(product_b, 1) * b.to(tl.float32))
                    if PREFIX:
                        here = lanes == m
                        of_this = dot - tl.sum(tl.where(here, before, 0.0))
                        before = tl.where(here, dot, before)
                        dot = of_this
                    tl.store(dots_ptr + m * row_length, dot)
                if not PREFIX and DIRECTIONS:
                    total += product
                    if HAS_BIAS:
                        total_b += product_b
                        product_b = tl.zeros([BLOCK_O, _ALIKE], tl.float32)
                # Were it known what becomes of the product, the compiler would take the tile out of this branch and
                # read it at every block while the tensor cores write it: hence a choice at run time, or what it cannot
                # look into. n_blocks is known to be positive for the same reason.
                if ASYNCHRONOUS and PREFIX:
                    product = tl.inline_asm_elementwise("", "=r,0", [product], dtype=tl.float32, is_pure=False, pack=1)
                elif ASYNCHRONOUS:
                    product = tl.where(carry > 0, product, 0.0)
                elif not PREFIX:
                    product = tl.zeros([BLOCK_O, BLOCK_I], tl.float32)
            token += BLOCK_T
            left -= BLOCK_T
            at += BLOCK_T
        if PREFIX:
            total = product
            if HAS_BIAS:
                total_b = product_b
        alone = True
        if SHARED:
            alone = (low == 0) & (high == units)
        if alone:
            if HAS_BIAS:
                bias = tl.max(total_b, 1).to(bias_ptr.dtype.element_ty)
                tl.store(bias_ptr + offs_o, bias, mask=mask_b)
            weight = total.to(weight_ptr.dtype.element_ty)
            tl.store(weight_ptr + offs_o[:, None] * inputs + offs_i[None, :], weight, mask=mask_w)
        elif SHARED:
            piece = (pid + tile - 2 * whole).to(tl.int64)  # another number for each
            rows = tl.arange(0, BLOCK_O)
            if HAS_BIAS:
                tl.store(bias_pieces_ptr + piece * BLOCK_O + rows, tl.max(total_b, 1))
            columns = tl.arange(0, BLOCK_I)[None, :]
            tl.store(pieces_ptr + (piece * BLOCK_O + rows)[:, None] * BLOCK_I + columns, total)


@triton.jit(do_not_specialize=["whole", "units", "span", "per", "n_dots"])
def _second_stage_kernel(
    partial_ptr,  # [S, M, row_length]
    sums_ptr,  # [n_sums, O]
    dots_ptr,  # [S, M]
    pieces_ptr,  # [pieces, BLOCK_O, BLOCK_I]
    weight_ptr,  # [O, I]
    bias_pieces_ptr,  # [pieces, BLOCK_O]
    bias_ptr,  # [O]
    row_length,
    n_sums,
    n_dots,
    outputs,
    inputs,
    blocks,
    whole,
    units,
    span,
    per,
    DIRECTIONS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SUMS: tl.constexpr,  # of a bias that did not ride along
    WITHIN: tl.constexpr,
    SHARED: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    ROWS: tl.constexpr,  # of a tile, which one program adds up
    BLOCK_N: tl.constexpr,
    BLOCK_B: tl.constexpr,
):
    pid = tl.program_id(0)
    tiles_o, tiles_i = tl.cdiv(outputs, BLOCK_O), tl.cdiv(inputs, BLOCK_I)
    tiles = tiles_o * tiles_i
    n_columns = tl.cdiv(outputs, BLOCK_B) if HAS_SUMS else 0
    if pid < n_dots:
        of_dot = partial_ptr + pid.to(tl.int64) * row_length
        total = tl.zeros([BLOCK_N], tl.float32)
        for low in range(0, tiles, BLOCK_N):
            tile = low + tl.arange(0, BLOCK_N)
            total += tl.load(of_dot + tile, mask=tile < tiles, other=0.0)
            if WITHIN:
                start = (tile - whole).to(tl.int64) * span + pid // DIRECTIONS * blocks
                cut = (tile >= whole) & (start // per != (start + blocks - 1) // per)
                total += tl.load(of_dot + tiles + tile, mask=cut & (tile < tiles), other=0.0)
        if HAS_SUMS:
            for low in range(tiles * (2 if WITHIN else 1), row_length, BLOCK_N):
                offs = low + tl.arange(0, BLOCK_N)
                total += tl.load(of_dot + offs, mask=offs < row_length, other=0.0)
        tl.store(dots_ptr + pid, tl.sum(total))
    elif pid < n_dots + n_columns:
        if HAS_SUMS:
            columns = (pid - n_dots) * BLOCK_B + tl.arange(0, BLOCK_B)
            mask_b = columns < outputs
            of_rows = tl.zeros([BLOCK_B, BLOCK_B], tl.float32)
            for low in range(0, n_sums, BLOCK_B):
                rows = low + tl.arange(0, BLOCK_B)
                sums_ptrs = sums_ptr + rows.to(tl.int64)[:, None] * outputs + columns[None, :]
                of_rows += tl.load(sums_ptrs, mask=(rows < n_sums)[:, None] & mask_b[None, :], other=0.0)
            tl.store(bias_ptr + columns, tl.sum(of_rows, 0).to(bias_ptr.dtype.element_ty), mask=mask_b)
    elif SHARED:
        here = pid - n_dots - n_columns
        shared_tile, first_row = here // (BLOCK_O // ROWS), here % (BLOCK_O // ROWS) * ROWS
        start = shared_tile.to(tl.int64) * span
        first, last = start // per, (start + units - 1) // per
        if last > first:
            pid_o, pid_i = tile_order(whole + shared_tile, tiles_o, tiles_i)
            rows, columns = first_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_I)
            total = tl.zeros([ROWS, BLOCK_I], tl.float32)
            total_b = tl.zeros([ROWS], tl.float32)
            for program in range(first, last + 1):
                of_piece = (program + shared_tile) * BLOCK_O + rows
                total += tl.load(pieces_ptr + of_piece[:, None] * BLOCK_I + columns[None, :])
                if HAS_BIAS:
                    total_b += tl.load(bias_pieces_ptr + of_piece)
            offs_o, offs_i = pid_o * BLOCK_O + rows, pid_i * BLOCK_I + columns
            offs_w = offs_o.to(tl.int64)[:, None] * inputs + offs_i[None, :]
            mask_w = (offs_o < outputs)[:, None] & (offs_i < inputs)[None, :]
            tl.store(weight_ptr + offs_w, total.to(weight_ptr.dtype.element_ty), mask=mask_w)
            if HAS_BIAS:
                total_b = total_b.to(bias_ptr.dtype.element_ty)
                tl.store(bias_ptr + offs_o, total_b, mask=offs_o < tl.where(pid_i == 0, outputs, 0))


def launch_wgrad_dot(
    acts: Tensor,
    grads: Tensor,
    val_grad: Tensor | None,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
    form: str,
    grad_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`acts [B,T,I]`, `grads [B,T,O]`, `val_grad [M,O,I]`, `bias_val_grad [M,O]` or None -> `(weight_grad [O,I],
    bias_grad [O or 0], dots [S,M])`: gradients in `grad_dtype` or float32; float32 dots of weight and bias together.

    With None for `val_grad`, and form "two": the samples' squared gradients added up, and squared norms `[S,1]`."""
    assert val_grad is not None or (form == "two" and bias_val_grad is None)
    acts, unrounded = one_row(acts, segments), one_row(grads, segments)
    acts, grads = rounded(acts, unrounded)
    weight_grad = torch.empty(grads.shape[2], acts.shape[2], dtype=grad_dtype or torch.float32, device=acts.device)
    copies = chip(acts.device).copies and segments is None
    readable = copyable if copies else aligned
    if acts.dtype == torch.float32 or readable(grads) or not readable(acts) or len(weight_grad) < _COLUMNS:
        bias_grad, dots = _launch(acts, grads, unrounded, val_grad, bias_val_grad, segments, form, weight_grad)
        return weight_grad, bias_grad, dots
    # As of a head with an odd vocabulary: read an element at a time they would take several times the product. Copied,
    # some columns at a time, to where rows are aligned, they take by count a part of it (4 bytes for 2*I FLOPs).
    width = max(1, _COPIED // (_COLUMNS * max(1, grads[..., 0].numel()))) * _COLUMNS
    rows = grads.new_empty(*grads.shape[:2], min(width, ceil_div(len(weight_grad), _COLUMNS) * _COLUMNS))
    # Without descriptors the width has to be a multiple as well: the last columns are then read as they are.
    rest = len(weight_grad) if copies else len(weight_grad) // _COLUMNS * _COLUMNS
    found = []
    for part in (slice(*ends) for ends in pairwise(sorted({*range(0, rest, width), rest, len(weight_grad)}))):
        here = grads[..., part]
        here = rows[..., : here.shape[2]].copy_(here) if part.start < rest else here
        of_bias = None if bias_val_grad is None else bias_val_grad[:, part]
        along = None if val_grad is None else val_grad[:, part]
        found.append(_launch(acts, here, here, along, of_bias, segments, form, weight_grad[part]))
    bias_grads, dots = zip(*found, strict=True)
    return weight_grad, torch.cat(bias_grads), torch.stack(dots).sum(0)


class _Facts(NamedTuple):
    """All that decides how a product is launched, but its tile."""

    device: torch.device
    architecture: str
    processors: int
    dtype: torch.dtype
    precision: str
    form: str
    batch: int
    tokens: int
    inputs: int
    outputs: int
    n_samples: int
    directions: int  # 0: squares
    of_d: torch.dtype | None  # of directions
    documents: bool
    biased: bool
    copy_tokens: bool  # whether operands are copied by tensor descriptors
    copy_d: bool
    vectors: bool  # whether they can be loaded 16 elements at a time
    strides: tuple[int, ...]  # of acts, grads, and the directions of weight and bias
    kinds: tuple[Any, ...]  # of all that a kernel takes the address of, but what is made here

    @property
    def chip(self) -> Chip:
        return chip_named(self.architecture)

    @property
    def rides(self) -> bool:
        """Whether the bias rides along."""
        where = self.chip
        return self.biased and self.dtype != torch.float32 and not (where.asynchronous or where.accumulates_apart)

    @property
    def sums(self) -> tuple[int, int]:
        """Of a bias whose pass of its own the second stage adds up: rows of sums and parts of a dot for each sample."""
        apart = self.biased and not self.rides and by_columns(self.tokens, self.documents)
        return columns_of(self.tokens, self.outputs, self.dtype.itemsize) if apart else (0, 0)

    @property
    def within(self) -> bool:
        """Whether a program may begin and end within a sample (in float32 there are no registers for that)."""
        return self.form == "prefix" and not self.documents and self.dtype != torch.float32

    @property
    def in_shared(self) -> int:
        """Bytes of each of a direction's elements in shared memory: to wait, or on the way there."""
        kept = 0 if self.of_d is None else self.of_d.itemsize
        return kept if self.copy_d or self.form != "prefix" else min(kept, 2)

    @property
    def accumulators(self) -> int:
        return wgrad_accumulators(self.form, self.in_shared, self.directions)


@lru_cache(1024)
def _tiles(facts: _Facts) -> tuple[Tile, ...]:
    """Tiles that fit the chip, the default first."""
    return matrix_tiles(
        facts.chip,
        facts.dtype,
        facts.outputs,
        facts.inputs,
        facts.batch * facts.tokens // max(1, facts.n_samples),
        accumulators=facts.accumulators,
        copies=facts.copy_d and facts.copy_tokens,
        aligned=facts.vectors,
        kept=facts.in_shared,
    )


@dataclass(frozen=True)
class _Plan:
    """The launches of one product with one tile, and what they write."""

    pieces: tuple[int, int, int] | None
    bias_pieces: tuple[int, int] | None
    partial: tuple[int, int, int]
    in_row: int  # of `partial`, before the bias's own parts
    sums: tuple[int, int, int] | None
    bias: int
    grid: tuple[int]
    launch: Launch
    second_grid: tuple[int]
    second: Launch


@lru_cache(1024)
def _plan(facts: _Facts, tile: Tile, tiles: int, units: int, plan: Share) -> _Plan:
    """`tiles` of `units` each, as `plan` shares them out."""
    rides, within, (chunks, parts) = facts.rides, facts.within, facts.sums
    n_samples, lanes, shared = facts.n_samples, max(1, facts.directions), plan.programs > 0
    in_row = 2 * tiles if within else tiles
    rows = min(tile.block_m, max(1, _ADDED // tile.block_n))
    programs = n_samples * lanes + (tiles - plan.whole if shared else 0) * (tile.block_m // rows)
    return _Plan(
        pieces=(plan.pieces, tile.block_m, tile.block_n) if plan.pieces else None,
        bias_pieces=(plan.pieces, tile.block_m) if plan.pieces and rides else None,
        partial=(n_samples, lanes, in_row + parts),
        in_row=in_row,
        sums=(n_samples, chunks, facts.outputs) if chunks else None,
        bias=facts.outputs if rides or chunks else 0,
        grid=(plan.whole + plan.programs,),
        launch=Launch(
            _wgrad_dot_kernel,
            (
                in_row + parts,
                facts.tokens,
                facts.inputs,
                facts.outputs,
                n_samples,
                plan.whole,
                units,
                plan.span,
                plan.per,
                0.0,
                *facts.strides,
            ),
            DIRECTIONS=facts.directions,
            LANES=1 << (lanes - 1).bit_length(),
            HAS_BIAS=rides,
            HAS_OFFSETS=facts.documents,
            COPY_TOKENS=facts.copy_tokens,
            COPY_D=facts.copy_d and facts.directions > 0,
            KEEP_D=facts.copy_d and facts.directions == 1 and not facts.chip.accumulates_apart,
            PREFIX=facts.form == "prefix",
            WITHIN=within,
            SHARED=shared,
            ASYNCHRONOUS=facts.chip.asynchronous and not INTERPRETED,
            PRECISION=facts.precision,
            BLOCK_O=tile.block_m,
            BLOCK_I=tile.block_n,
            BLOCK_T=tile.block_k,
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        ),
        second_grid=(programs + (ceil_div(facts.outputs, _COLUMN_SUMS) if chunks else 0),),
        second=Launch(
            _second_stage_kernel,
            (
                in_row + parts,
                n_samples * chunks,
                n_samples * lanes,
                facts.outputs,
                facts.inputs,
                ceil_div(facts.tokens, tile.block_k),
                plan.whole,
                units,
                plan.span,
                max(1, plan.per),
            ),
            DIRECTIONS=lanes,
            HAS_BIAS=rides,
            HAS_SUMS=chunks > 0,
            WITHIN=within,
            SHARED=shared,
            BLOCK_O=tile.block_m,
            BLOCK_I=tile.block_n,
            ROWS=rows,
            BLOCK_N=1024,
            BLOCK_B=_COLUMN_SUMS,
        ),
    )


def _launch(
    acts: Tensor,
    grads: Tensor,
    unrounded: Tensor,
    val_grad: Tensor | None,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
    form: str,
    weight_grad: Tensor,
) -> tuple[Tensor, Tensor]:
    """Writes `weight_grad`, `[O,I]` of adjacent elements; returns `(bias_grad, dots)`. `unrounded`: for biases."""
    (batch, tokens, inputs), outputs, device = acts.shape, grads.shape[2], acts.device
    n_samples, n_directions = batch if segments is None else len(segments) - 1, 0 if val_grad is None else len(val_grad)
    if n_samples == 0:  # offsets that the device has yet to refuse
        bias_grad = weight_grad.new_zeros(0 if bias_val_grad is None else outputs)
        return bias_grad, weight_grad.zero_().new_empty(0, max(1, n_directions), dtype=torch.float32)
    copies = chip(device).copies and acts.dtype != torch.float32
    copy_tokens = copies and segments is None and copyable(acts, grads)
    segments = None if segments is None else segments.contiguous()
    copy_d = copies and (copyable(val_grad) if val_grad is not None else copy_tokens)
    addressed = bias_val_grad, segments, *(() if copy_d else (val_grad,)), *(() if copy_tokens else (acts, grads))
    facts = _Facts(
        device,
        architecture(device),
        multiprocessors(device),
        acts.dtype,
        precision(acts),
        form,
        batch,
        tokens,
        inputs,
        outputs,
        n_samples,
        n_directions,
        None if val_grad is None else val_grad.dtype,
        segments is not None,
        bias_val_grad is not None,
        copy_tokens,
        copy_d,
        copy_tokens or aligned(acts, grads),
        (
            *acts.stride(),
            *grads.stride(),
            *((0, 0, 0) if val_grad is None else val_grad.stride()),
            *((0, 0) if bias_val_grad is None else bias_val_grad.stride()),
        ),
        tuple(None if x is None else (x.dtype, placed(x)) for x in (weight_grad, *addressed)),
    )

    def run(tile: Tile) -> tuple[Tensor, Tensor]:
        # Registers of a thread beside the accumulators: of addresses, and operands on their way to what waits for them.
        beside = 64 if facts.chip.asynchronous or copy_tokens else 112
        slots = facts.processors * resident_programs(tile, facts.accumulators, beside)
        tiles = ceil_div(outputs, tile.block_m) * ceil_div(inputs, tile.block_n)
        units = n_samples * ceil_div(tokens, tile.block_k) if facts.within else n_samples
        filled = outputs * inputs / (tiles * tile.block_m * tile.block_n)
        plan = _plan(facts, tile, tiles, units, share(tiles, units, n_samples, batch * tokens, slots, filled))
        partial = torch.empty(plan.partial, dtype=torch.float32, device=device)
        dots = torch.empty(plan.partial[:2], dtype=torch.float32, device=device)
        sums, pieces, bias_pieces = (
            None if shape is None else torch.empty(shape, dtype=torch.float32, device=device)
            for shape in (plan.sums, plan.pieces, plan.bias_pieces)
        )
        bias = weight_grad.new_empty(plan.bias)
        operands: list[Any] = [acts, grads, val_grad]
        if copy_tokens:
            operands[0] = descriptor(acts, [1, tile.block_k, tile.block_n])
            operands[1] = descriptor(grads, [1, tile.block_k, tile.block_m])
        if val_grad is not None and facts.copy_d:
            operands[2] = descriptor(val_grad, [1, tile.block_m, tile.block_n])
        results = weight_grad, bias, pieces, bias_pieces, partial
        plan.launch(plan.grid, *operands, bias_val_grad, segments, *results)
        if sums is not None:
            launch_columns(None, unrounded, bias_val_grad, sums, partial[:, :, plan.in_row :])
        plan.second(plan.second_grid, partial, sums, dots, pieces, weight_grad, bias_pieces, bias)
        return bias, dots

    candidates = _tiles(facts)
    tile = candidates[0]
    if tuning.is_on():
        sizes = Sizes(n_samples, batch * tokens // max(1, n_samples), inputs, outputs, n_directions)
        known = (facts.precision, copy_tokens, facts.copy_d, facts.documents, facts.rides, facts.of_d)
        tile = tuning.choose("wgrad_dot", candidates, sizes, " ".join(map(str, known)), acts, run, form)
    bias_grad, dots = run(tile)
    if bias_val_grad is None or len(bias_grad):
        return bias_grad, dots
    bias_grad, of_bias = launch_row_wgrad_dot(None, unrounded, bias_val_grad, segments)
    return bias_grad.to(weight_grad.dtype), dots + of_bias
