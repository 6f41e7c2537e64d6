"""The samples' squared gradients added up, and each one's squared norm: how far beside the path `turning.py` looks.

Linear layers have their gradients in factors, sum_t left_t right_t^T, from which one product (`ghost_square`) makes
both without a gradient of any sample; those of norms and biases are sums, which are squared. A table's left factors are
the one-hot rows of its ids: it is squared where a sample has been.

Where layers share a parameter, or one runs several times, a sample's gradient is the sum over all of its runs: factors
of one kind are joined, as if the sample had more tokens. A table that is a weight too (a tied head) has

    (E + H)^2 = H^2 + E (E + 2 H),

the last term only in the rows of the sample's own ids, for which H is a small product. Layers without factors are asked
for each sample's gradient.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from inrun_kernels import ghost_square

from .distributed import Ranks, gathered, shard_of
from .factors import Factors, ends_of, joined, owners_of, split, summed, sums
from .keep import Keeper, Kept
from .restoring import no_autocast
from .slots import components
from .tap import SUFFIX, Layout

Batches = Iterable[tuple[Keeper, Mapping[int, int]]]


@dataclass
class Squares:
    """Of a step's samples, their gradients as the backward made them.

    Attributes:
        of_slots: by number, the sum of the squared gradients of all processes' samples, of this process's shard. A slot
            has none where a layer of its own does not hold samples as rows.
        of_samples: by number of a batch, each sample's squared norm over those slots, `[count]`.
        players: how many samples of all processes have a gradient: one that has none joins no coalition. Single tokens
            count as their row.
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
    groups = [(members, list(dict.fromkeys(tap for slot in members for tap in slot.taps)))
                  for members in components(slots)]  # fmt: skip
    groups = [(members, taps) for members, taps in groups if all(tap.by_row for tap in taps)]
    for keeper, numbers in batches:
        counts = {b: layout.rows if layout.per_token else layout.count
                  for b, layout in enumerate(keeper.layouts) if b in numbers}  # fmt: skip
        found.of_samples |= {numbers[b]: torch.zeros(count, device=device) for b, count in counts.items()}
        runs: dict[Any, list[Kept]] = {}
        for kept in keeper.kept:
            runs.setdefault(kept.module._inrun, []).append(kept)
        for members, taps in groups:
            owners = dict.fromkeys(owner for tap in taps for owner, _ in tap.owned)
            # Frozen ones too: a layer without factors runs once more.
            names = [(owner, name) for owner in owners for name in owner._parameters if not name.endswith(SUFFIX)]
            with gathered(names):
                dtypes = [torch.promote_types(s.param.dtype, torch.float32) for s in members]
                totals = {id(s.sibling): torch.zeros_like(s.param, dtype=d, memory_format=torch.contiguous_format)
                        for s, d in zip(members, dtypes, strict=True)}  # fmt: skip
                shares = {id(s.sibling): s.share for s in members}
                for batch in counts:
                    here = [kept for tap in taps for kept in runs.get(tap, ()) if kept.batch == batch]
                    _add_runs(keeper, here, totals, shares, found.of_samples[numbers[batch]])
            for slot, total in zip(members, totals.values(), strict=True):
                i = number[id(slot)]
                part = shard_of(ranks.sum(total), slot) if ranks.sharded else total
                found.of_slots[i] = found.of_slots[i] + part if i in found.of_slots else part
    found.of_samples = {b: ranks.over_parts(norms) for b, norms in found.of_samples.items()}
    if not ranks.sharded:
        found.of_slots = {i: ranks.sum(total) for i, total in found.of_slots.items()}
    players = sum((norms.count_nonzero() for norms in found.of_samples.values()), torch.tensor(0, device=device))
    found.players = max(1, int(ranks.sum(players)))
    return found


@no_autocast()
def _add_runs(
    keeper: Keeper, runs: Sequence[Kept], totals: dict[int, Tensor], shares: dict[int, float], norms: Tensor
) -> None:
    """Add the squared gradients of a batch's samples, as these runs of layers gave them, to `totals`, by the `id` of a
    parameter's direction, and their squared norms, times its share, to `norms`, `[B]` or `[S]`."""
    found = [keeper.factors(kept) for kept in runs]
    known = [of_run for of_run in found if of_run is not None]
    if len(known) == len(runs):
        for name, total in totals.items():
            if factors := [of_run[name] for of_run in known if name in of_run]:
                norms += add_squares(factors, keeper.layouts[runs[0].batch], total).to(norms) * shares[name]
        return
    samples = [keeper.sample_gradients(kept, range(len(norms))) for kept in runs]
    for i, of_runs in enumerate(zip(*samples, strict=True)):
        for name, total in totals.items():
            if parts := [of_run[name] for of_run in of_runs if name in of_run]:
                squared = functools.reduce(torch.add, parts).to(total.dtype).square()
                total += squared
                norms[i] += squared.sum().to(norms) * shares[name]


def add_squares(runs: Sequence[Factors], layout: Layout, total: Tensor) -> Tensor:
    """Add the squared gradients of a batch's samples to `total`, shaped like the parameter, float32 or float64.

    Args:
        runs: of one parameter, whose gradient is their sum.
        layout: of the batch. Single tokens count as their row.

    Returns:
        Each sample's squared norm, `[B]` or `[S]`.
    """
    if runs[0].right is None:
        squared = sum(
            (sums(run.left, ends_of([run], layout), total.dtype) for run in runs), total.new_zeros(())
        ).square()
        total += squared.sum(0).view_as(total)
        return squared.sum(1)
    products = [run for run in runs if run.left.dim() == 3]
    lookups = [run for run in runs if run.left.dim() == 2]
    count, sides = layout.rows if layout.per_token else layout.count, None
    squares, norms = total.new_zeros(()), total.new_zeros(count)
    if products:
        (left, right), ends = joined(products, layout)
        assert right is not None
        squares, norms = ghost_square(right, left, segments=ends)
        sides = split(ends, left, right)
    if lookups:
        table, ends = joined(lookups, layout)
        assert table.right is not None
        # One row for each id of each sample, in the samples' order.
        keys, order = (owners_of(table, ends) * len(total) + table.left.flatten()).sort(stable=True)
        keys, met = keys.unique_consecutive(return_counts=True)
        starts = F.pad(met.cumsum(0), (1, 0))
        own = summed(table.right.flatten(0, 1).to(total.dtype), order, starts)
        owners, ids = keys // len(total), keys % len(total)
        of_sample = torch.searchsorted(owners, torch.arange(count + 1, device=owners.device))
        whole = own
        if sides is not None:
            parts = ids.tensor_split(of_sample[1:-1].tolist())
            theirs = [left[:, here].to(own.dtype).T @ right.to(own.dtype)
                      for left, right, here in zip(*sides, parts, strict=True)]  # fmt: skip
            whole = own + 2 * torch.cat(theirs)
        whole = whole * own
        ids, order = ids.sort(stable=True)
        of_row = torch.searchsorted(ids, torch.arange(len(total) + 1, device=ids.device))
        squares = squares + summed(whole, order, of_row)
        norms = norms + torch.segment_reduce(whole.sum(1), "sum", offsets=of_sample, initial=0, unsafe=True)
    total += squares.clamp_(min=0)  # where a table takes away what a head added, a rounding may be all that is left
    return norms.clamp_(min=0)
