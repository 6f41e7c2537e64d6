"""The samples' squared gradients added up, and each one's squared norm: what `turning.py` looks beside the path by.

Linear layers, norms, biases and embeddings have their gradients in factors, sum_t left_t right_t^T, from which one
product (`ghost_square`) makes both without a gradient of any sample. A table's left factors are the one-hot rows of
its ids: it is squared where a sample has been.

Where layers share a parameter, or one runs several times, a sample's gradient is the sum over all of its runs: factors
of one kind are joined, as if the sample had more tokens. A table that is a weight too (a tied head) has

    (E + H)^2 = H^2 + E (E + 2 H),

the last term only in the rows of the sample's own ids, for which H is a small product. Layers without factors are asked
for each sample's gradient.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inrun_kernels import ghost_square

from . import check
from .distributed import Ranks, gathered, shard_of
from .layers import Factors

if TYPE_CHECKING:
    from .keep import Keeper, Kept
    from .tap import Layout

Batches = Iterable[tuple["Keeper", Mapping[int, int]]]


@dataclass
class Squares:
    """Of a step's samples, their gradients as the backward made them.

    Attributes:
        of_slots: by number, the sum of the squared gradients of all processes' samples, of this process's shard. A slot
            has none where a layer of its own does not hold samples as rows.
        of_samples: by number of a batch, each sample's squared norm over those slots, `[count]`.
        players: how many samples all processes have. Single tokens count as their row.
    """

    of_slots: dict[int, Tensor]
    of_samples: dict[int, Tensor]
    players: int


def squares(batches: Batches, slots: Sequence[Any], ranks: Ranks) -> Squares:
    """See `Squares`.

    Args:
        batches: keepers, and by the number of a batch there, its number in the step; as many keepers in every process
            where parameters are sharded.
    """
    found = Squares({}, {}, 0)
    number, device = {id(slot): i for i, slot in enumerate(slots)}, slots[0].param.device
    components = [(members, list(dict.fromkeys(tap for slot in members for tap in slot.taps)))
                  for members in check.components(slots)]  # fmt: skip
    components = [(members, taps) for members, taps in components if all(tap.by_row for tap in taps)]
    for keeper, numbers in batches:
        counts = {b: layout.rows if layout.per_token else layout.count
                  for b, layout in enumerate(keeper.layouts) if b in numbers}  # fmt: skip
        found.of_samples |= {numbers[b]: torch.zeros(count, device=device) for b, count in counts.items()}
        runs: dict[Any, list[Kept]] = {}
        for kept in keeper.kept:
            runs.setdefault(kept.module._inrun, []).append(kept)
        for members, taps in components:
            with gathered(place for tap in taps for place in tap.owned):
                dtypes = [torch.promote_types(s.param.dtype, torch.float32) for s in members]
                sums = {id(s.sibling): torch.zeros_like(s.param, dtype=d, memory_format=torch.contiguous_format)
                        for s, d in zip(members, dtypes, strict=True)}  # fmt: skip
                for batch in counts:
                    here = [kept for tap in taps for kept in runs.get(tap, ()) if kept.batch == batch]
                    _add_squares(keeper, here, sums, found.of_samples[numbers[batch]])
            for slot, total in zip(members, sums.values(), strict=True):
                i = number[id(slot)]
                part = shard_of(ranks.sum(total), slot.param) if ranks.sharded else total
                found.of_slots[i] = found.of_slots[i] + part if i in found.of_slots else part
    if not ranks.sharded:
        found.of_slots = {i: ranks.sum(total) for i, total in found.of_slots.items()}
    players = sum(len(norms) for norms in found.of_samples.values())
    found.players = max(1, int(ranks.sum(torch.tensor(players, device=device))))
    return found


def _add_squares(keeper: Keeper, runs: Sequence[Kept], sums: dict[int, Tensor], norms: Tensor) -> None:
    """Add the squared gradients of a batch's samples, as these runs of layers gave them, to `sums`, by the `id` of a
    parameter's direction, and their squared norms to `norms`, `[B]` or `[S]`."""
    found = [keeper.factors(kept) for kept in runs]
    known = [of_run for of_run in found if of_run is not None]
    if len(known) == len(runs):
        for name, total in sums.items():
            if factors := [of_run[name] for of_run in known if name in of_run]:
                norms += add_squares(factors, keeper.layouts[runs[0].batch], total).to(norms)
        return
    samples = [keeper.sample_gradients(kept, range(len(norms))) for kept in runs]
    for i, gradients in enumerate(zip(*samples, strict=True)):
        for name, gradient in _added(gradients).items():
            if name in sums:
                squared = gradient.to(sums[name].dtype).square()
                sums[name] += squared
                norms[i] += squared.sum().to(norms)


def add_squares(runs: Sequence[Factors], layout: Layout, total: Tensor) -> Tensor:
    """Add the squared gradients of a batch's samples to `total`, shaped like the parameter, float32 or float64.

    Args:
        runs: of one parameter, whose gradient is their sum.
        layout: of the batch. Single tokens count as their row.

    Returns:
        Each sample's squared norm, `[B]` or `[S]`.
    """
    total = total.view(-1, runs[0].right.shape[2])
    segments = None if layout.per_token else layout.on(total.device).segments
    products = [run for run in runs if run.left.dim() == 3]
    lookups = [run for run in runs if run.left.dim() == 2]
    if not lookups:
        product, ends = _joined(products, layout, segments)
        squares, norms = ghost_square(product.right, product.left, segments=ends)
        total += squares
        return norms
    table, ends = _joined(lookups, layout, segments)
    samples = [_by_sample(table, ends)]
    squares, norms = torch.zeros_like(total), total.new_zeros(layout.rows if ends is None else len(ends) - 1)
    if products:
        product, ends = _joined(products, layout, segments)
        squares, norms = ghost_square(product.right, product.left, segments=ends)
        samples.append(_by_sample(product, ends))
    for norm, (ids, grads), *others in zip(norms, *samples, strict=True):
        ids, places = ids.unique(return_inverse=True)
        own = total.new_zeros(len(ids), total.shape[1]).index_add_(0, places, grads.to(total.dtype))
        whole = own
        for left, right in others:
            whole = whole + 2 * (left[:, ids].to(own.dtype).T @ right.to(own.dtype))
        here = own * whole
        squares.index_add_(0, ids, here)
        norm += here.sum()
    total += squares.clamp_(min=0)  # a rounding may be all that is left
    return norms.clamp_(min=0)


def _joined(runs: Sequence[Factors], layout: Layout, segments: Tensor | None) -> tuple[Factors, Tensor | None]:
    """Several runs as one in which a sample has the tokens of all, and the offsets of its documents."""
    if segments is None:
        return runs[0] if len(runs) == 1 else Factors(*(torch.cat(xs, 1) for xs in zip(*runs, strict=True))), None
    assert layout.tokens is not None
    times = [run.right.shape[1] // layout.tokens for run in runs]  # rows for each token
    if len(runs) == 1:
        return runs[0], segments * times[0]
    owners = torch.repeat_interleave(torch.arange(len(segments) - 1, device=segments.device), segments.diff())
    order = torch.cat([owners.repeat_interleave(many) for many in times]).argsort(stable=True)
    joined = (torch.cat([x.flatten(0, 1) for x in xs])[order].unsqueeze(0) for xs in zip(*runs, strict=True))
    return Factors(*joined), segments * sum(times)


def _by_sample(run: Factors, segments: Tensor | None) -> list[Factors]:
    """One run's factors of each sample, `[T, O]` (or ids `[T]`) and `[T, I]`."""
    if segments is None:
        return [Factors(*x) for x in zip(*run, strict=True)]
    left, right = (x.flatten(0, 1) for x in run)
    return [Factors(left[a:b], right[a:b]) for a, b in pairwise(segments.tolist())]


def _added(gradients: Iterable[dict[int, Tensor]]) -> dict[int, Tensor]:
    """What several runs of layers give one sample."""
    total: dict[int, Tensor] = {}
    for one in gradients:
        for name, gradient in one.items():
            total[name] = total[name] + gradient if name in total else gradient
    return total
