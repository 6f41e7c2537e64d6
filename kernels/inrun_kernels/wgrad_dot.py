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

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from inrun_kernels import forms, tuning
from inrun_kernels.config import (
    Chip,
    Tile,
    ceil_div,
    chip_named,
    matrix_tiles,
    resident_programs,
    share,
    wgrad_accumulators,
)
from inrun_kernels.cost import Sizes
from inrun_kernels.rows import by_columns, columns_launch, columns_of, launch_row_wgrad_dot
from inrun_kernels.tiles import (
    INTERPRETED,
    Launch,
    aligned,
    architecture,
    chip,
    copyable,
    descriptor,
    kind,
    multiprocessors,
    one_row,
    precision,
    remember,
    rounded,
)
from inrun_kernels.validation import agree
from inrun_kernels.wgrad_dot_kernel import second_stage_kernel, wgrad_dot_kernel

_COPIED = 1 << 26  # elements of the output gradients that are copied to aligned rows at a time: 128 MB
_COLUMNS = 128  # of them at least, and fewer are read as they are
_COLUMN_SUMS = 16  # of a bias, which a program of the second stage adds up
_ADDED = 4096  # elements of a tile that a program of the second stage adds up


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
    if not _in_parts(acts, grads, segments, len(weight_grad)):
        bias_grad, dots = _launch(acts, grads, unrounded, val_grad, bias_val_grad, segments, form, weight_grad)
        return weight_grad, bias_grad, dots
    # As of a head with an odd vocabulary: read an element at a time they would take several times the product. Copied,
    # some columns at a time, to where rows are aligned, they take by count a part of it (4 bytes for 2*I FLOPs).
    width = max(1, _COPIED // (_COLUMNS * max(1, grads[..., 0].numel()))) * _COLUMNS
    rows = grads.new_empty(*grads.shape[:2], min(width, ceil_div(len(weight_grad), _COLUMNS) * _COLUMNS))
    # Without descriptors the width has to be a multiple as well: the last columns are then read as they are.
    rest = len(weight_grad) if _copies(acts, segments) else len(weight_grad) // _COLUMNS * _COLUMNS
    found = []
    for part in (slice(*ends) for ends in pairwise(sorted({*range(0, rest, width), rest, len(weight_grad)}))):
        here = grads[..., part]
        here = rows[..., : here.shape[2]].copy_(here) if part.start < rest else here
        of_bias = None if bias_val_grad is None else bias_val_grad[:, part]
        along = None if val_grad is None else val_grad[:, part]
        found.append(_launch(acts, here, here, along, of_bias, segments, form, weight_grad[part]))
    bias_grads, dots = zip(*found, strict=True)
    return weight_grad, torch.cat(bias_grads), torch.stack(dots).sum(0)


def _in_parts(acts: Tensor, grads: Tensor, segments: Tensor | None, outputs: int) -> bool:
    """Whether the output gradients are better copied, some columns at a time."""
    readable = copyable if _copies(acts, segments) else aligned
    return acts.dtype != torch.float32 and outputs >= _COLUMNS and not readable(grads) and readable(acts)


def _copies(acts: Tensor, segments: Tensor | None) -> bool:
    return chip(acts.device).copies and segments is None


class _Facts(NamedTuple):
    """All that decides how a product is launched, but its tile."""

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
    unrounded: Any  # the `tiles.kind` of what a bias is summed from
    bias: Any  # and of its direction

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
    sums: tuple[int, int, int] | None
    columns: tuple[tuple[int], Launch] | None  # what writes them
    bias: int
    grid: tuple[int]
    launch: Launch
    second_grid: tuple[int]
    second: Launch


def _planned(facts: _Facts, tile: Tile) -> _Plan:
    # Registers of a thread beside the accumulators: of addresses, and operands on their way to what waits for them.
    beside = 64 if facts.chip.asynchronous or facts.copy_tokens else 112
    slots = facts.processors * resident_programs(tile, facts.accumulators, beside)
    tiles = ceil_div(facts.outputs, tile.block_m) * ceil_div(facts.inputs, tile.block_n)
    units = facts.n_samples * ceil_div(facts.tokens, tile.block_k) if facts.within else facts.n_samples
    filled = facts.outputs * facts.inputs / (tiles * tile.block_m * tile.block_n)
    plan = share(tiles, units, facts.n_samples, facts.batch * facts.tokens, slots, filled)
    rides, within, (chunks, parts) = facts.rides, facts.within, facts.sums
    n_samples, lanes, shared = facts.n_samples, max(1, facts.directions), plan.programs > 0
    in_row = 2 * tiles if within else tiles
    row_length = in_row + parts
    rows = min(tile.block_m, max(1, _ADDED // tile.block_n))
    programs = n_samples * lanes + (tiles - plan.whole if shared else 0) * (tile.block_m // rows)
    return _Plan(
        pieces=(plan.pieces, tile.block_m, tile.block_n) if plan.pieces else None,
        bias_pieces=(plan.pieces, tile.block_m) if plan.pieces and rides else None,
        partial=(n_samples, lanes, row_length),
        sums=(n_samples, chunks, facts.outputs) if chunks else None,
        columns=columns_launch(None, facts.unrounded, facts.bias, row_length, in_row) if chunks else None,
        bias=facts.outputs if rides or chunks else 0,
        grid=(plan.whole + plan.programs,),
        launch=Launch(
            wgrad_dot_kernel,
            (
                row_length,
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
            second_stage_kernel,
            (
                row_length,
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


class _Call(NamedTuple):
    """What operands of one kind are launched with."""

    facts: _Facts
    tiles: tuple[Tile, ...]  # that fit the chip, the default first
    plans: dict[Tile, _Plan]  # with those that were taken


_calls: dict[Any, _Call] = {}


def launch_layer(
    acts: Tensor, grads: Tensor, val_grad: Tensor, bias_val_grad: Tensor | None, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """`launch_wgrad_dot`, for directions with their leading M or without, of which the dots then have none either, in
    the form that the model of the chip takes. None for what is not launched as it is, once."""
    if acts.dtype.itemsize != 2 or val_grad.stride(-1) != 1:
        return None
    key = _key(None, acts, grads, None, val_grad, bias_val_grad, None, grad_dtype)
    if (call := _calls.get(key)) is None:
        if not agree(acts, grads, val_grad, bias_val_grad) or _in_parts(acts, grads, None, grads.shape[2]):
            return None
        directions, of_bias = val_grad, bias_val_grad
        if val_grad.dim() == 2:
            directions, of_bias = val_grad[None], None if bias_val_grad is None else bias_val_grad[None]
        form = forms.of_wgrad_dot(acts, grads, directions, None, True, False).form
        call = _arranged(key, form, acts, grads, grads, directions, of_bias, None)
    weight_grad = torch.empty(val_grad.shape[-2:], dtype=grad_dtype, device=acts.device)
    bias_grad, dots = _run(call, acts, grads, grads, val_grad, bias_val_grad, None, weight_grad)
    return weight_grad, bias_grad, dots if val_grad.dim() == 3 else dots.view(len(acts))


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
    if segments is not None:
        segments = segments.contiguous()
        if len(segments) == 1:  # offsets that the device has yet to refuse
            dots = weight_grad.zero_().new_empty(0, 1 if val_grad is None else len(val_grad), dtype=torch.float32)
            return weight_grad.new_zeros(0 if bias_val_grad is None else len(weight_grad)), dots
    apart = None if unrounded is grads else unrounded
    key = _key(form, acts, grads, apart, val_grad, bias_val_grad, segments, kind(weight_grad))
    call = _calls.get(key) or _arranged(key, form, acts, grads, unrounded, val_grad, bias_val_grad, segments)
    return _run(call, acts, grads, unrounded, val_grad, bias_val_grad, segments, weight_grad)


def _key(form: str | None, acts: Tensor, grads: Tensor, *others: Any) -> tuple[Any, ...]:
    """All that decides how these operands, and what else there is, are launched."""
    known = [kind(x) if isinstance(x, Tensor) else x for x in others]
    device = acts.device
    return form, architecture(device), multiprocessors(device), precision(acts), kind(acts), kind(grads), *known


def _arranged(
    key: Any,
    form: str,
    acts: Tensor,
    grads: Tensor,
    unrounded: Tensor,
    val_grad: Tensor | None,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
) -> _Call:
    """What these operands are launched with, remembered under their key."""
    (_, where, processors, how, *_), (batch, tokens, inputs) = key, acts.shape
    copies = chip(acts.device).copies and acts.dtype != torch.float32
    copy_tokens = copies and segments is None and copyable(acts, grads)
    facts = _Facts(
        architecture=where,
        processors=processors,
        dtype=acts.dtype,
        precision=how,
        form=form,
        batch=batch,
        tokens=tokens,
        inputs=inputs,
        outputs=grads.shape[2],
        n_samples=batch if segments is None else len(segments) - 1,
        directions=0 if val_grad is None else len(val_grad),
        of_d=None if val_grad is None else val_grad.dtype,
        documents=segments is not None,
        biased=bias_val_grad is not None,
        copy_tokens=copy_tokens,
        copy_d=copies and (copyable(val_grad) if val_grad is not None else copy_tokens),
        vectors=copy_tokens or aligned(acts, grads),
        strides=(
            *acts.stride(),
            *grads.stride(),
            *((0, 0, 0) if val_grad is None else val_grad.stride()),
            *((0, 0) if bias_val_grad is None else bias_val_grad.stride()),
        ),
        unrounded=kind(unrounded),
        bias=kind(bias_val_grad),
    )
    return remember(_calls, key, _Call(facts, _tiles(facts), {}))


def _run(
    call: _Call,
    acts: Tensor,
    grads: Tensor,
    unrounded: Tensor,
    val_grad: Tensor | None,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
    weight_grad: Tensor,
) -> tuple[Tensor, Tensor]:
    facts, device = call.facts, acts.device

    def run(tile: Tile) -> tuple[Tensor, Tensor]:
        plan = call.plans.get(tile) or call.plans.setdefault(tile, _planned(facts, tile))
        partial = torch.empty(plan.partial, dtype=torch.float32, device=device)
        dots = partial.new_empty(plan.partial[:2])
        sums, pieces, bias_pieces = (
            None if shape is None else partial.new_empty(shape) for shape in (plan.sums, plan.pieces, plan.bias_pieces)
        )
        bias = weight_grad.new_empty(plan.bias)
        operands: list[Any] = [acts, grads, val_grad]
        if facts.copy_tokens:
            operands[0] = descriptor(acts, [1, tile.block_k, tile.block_n])
            operands[1] = descriptor(grads, [1, tile.block_k, tile.block_m])
        if val_grad is not None and facts.copy_d:
            operands[2] = descriptor(val_grad, [1, tile.block_m, tile.block_n])
        results = weight_grad, bias, pieces, bias_pieces, partial
        plan.launch(plan.grid, *operands, bias_val_grad, segments, *results)
        if plan.columns is not None:
            columns_grid, columns = plan.columns
            columns(columns_grid, None, unrounded, bias_val_grad, sums, partial)
        plan.second(plan.second_grid, partial, sums, dots, pieces, weight_grad, bias_pieces, bias)
        return bias, dots

    tile = call.tiles[0]
    if tuning.is_on():
        of_sample = facts.batch * facts.tokens // max(1, facts.n_samples)
        sizes = Sizes(facts.n_samples, of_sample, facts.inputs, facts.outputs, facts.directions)
        known = (facts.precision, facts.copy_tokens, facts.copy_d, facts.documents, facts.rides, facts.of_d)
        tile = tuning.choose("wgrad_dot", call.tiles, sizes, " ".join(map(str, known)), acts, run, facts.form)
    bias_grad, dots = run(tile)
    if bias_val_grad is None or len(bias_grad):
        return bias_grad, dots
    directions = bias_val_grad if bias_val_grad.dim() == 2 else bias_val_grad[None]
    bias_grad, of_bias = launch_row_wgrad_dot(None, unrounded, directions, segments)
    return bias_grad.to(weight_grad.dtype), dots + of_bias
