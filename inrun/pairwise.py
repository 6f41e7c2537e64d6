"""One score per validation sample: `value[z, v] = <K * g_v, g_z>`, from what was kept of both.

K is what the method has written where the directions stand: how the optimizer turns a gradient into an update,
coordinate by coordinate. Three forms, layer by layer, all exact:

    pairs        K a number, a linear layer: `ghost_dot_pairwise`
    gradients    layers whose gradients come in factors (`factors.py`): some rows of every sample's gradient, on both
                 sides, and one product of them: 2*(B*T + V*S + B*V)*I*O FLOPs for a linear layer, as two weight
                 gradients (with keep="host" V's for each batch); `rows_at_a_time` stand together
    directions   all else, and a value for each token: the gradient of some validation samples at a time, times K, as
                 the layer's directions: 2*V*(B*T + 3*S)*I*O FLOPs; `CHUNK` elements, or one sample's, stand at a time

B*T training tokens, V validation samples of S tokens.

Source: arXiv 2406.11011, appendix D ("ghost dot-product" of pairs).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from inrun_kernels import ghost_dot_pairwise
from inrun_kernels.torch_path import rows_at_a_time

from . import probing
from .errors import InRunError
from .factors import Factors, gradients
from .keep import Budget, Keeper, Kept, moved
from .layers import LinearRule, Part
from .restoring import no_autocast, setting
from .slots import components
from .tap import Layout, targets_second, together

if TYPE_CHECKING:
    from .tracker import Tracker

CHUNK = 1 << 24  # elements of the validation samples' gradients that stand together


class Pairs:
    """The validation samples of a tracker's targets, kept until they are scored with a step's.

    Args:
        tracker: whose; its validation losses are kept from now on.
        budget: of what is kept.
    """

    def __init__(self, tracker: Tracker, budget: Budget) -> None:
        self.tracker, self.budget = tracker, budget
        self.kept: dict[str, tuple[Keeper, Any]] = {}  # target -> its samples' layers, what its loss was scaled by
        self.start: dict[str, tuple[Keeper, Any]] = {}  # those a step began with
        self.scalars: dict[int, Any] = {}  # id of a slot -> K, where that is a number
        tracker.validations.around = self.keep

    @contextlib.contextmanager
    def keep(self, target: str, scale: Any) -> Iterator[None]:
        """Keep what the layers do in a validation loss, whose samples are one batch."""
        keeper = Keeper(self.tracker.taps, self.budget, weights_move=True)
        keeper.begin_batch(Layout(len(self.tracker.samples[target])))
        try:
            yield
        finally:
            keeper.pause()
        self.kept[target] = (keeper, scale)

    def hold(self, scale: Any) -> Keeper:
        """A keeper for the validation samples that follow a batch's own, whose loss is scaled as the batch's is."""
        (target,) = self.tracker.targets
        if target in self.start:
            raise InRunError("batch: expected one in a step, with validation='batch'; got a second one")
        keeper = Keeper(self.tracker.taps, self.budget, weights_move=True)
        keeper.skip_batch(Layout(len(self.tracker.samples[target])))
        self.start[target] = (keeper, scale)
        return keeper

    def dots(
        self, train: Keeper, both_ends: bool, left: Mapping[int, Tensor]
    ) -> tuple[list[Tensor | None], Tensor | float]:
        """Of each batch, `[count, columns]`: the dots with every sample of every target, as K stands.

        Args:
            left: number of a slot -> what K * g_B misses of the update.

        Returns:
            The dots; and what all samples share, `[columns]` (0 without `left`).
        """
        ends = [self.start, self.kept] if both_ends else [self.start]
        slots = self.tracker.slots
        found: list[list[Tensor]] = [[] for _ in train.layouts]  # of each batch, the targets' columns
        surplus = []
        for target in self.tracker.targets:
            at_ends, shared = [], 0.0
            for keeper, scale in (kept[target] for kept in ends):
                parts, missed = dots(train, keeper, slots, self.scalars, {id(slots[i]): x for i, x in left.items()})
                at_ends.append([None if part is None else part / scale / len(ends) for part in parts])
                shared = shared + missed / scale / len(ends)
            for columns, parts in zip(found, zip(*at_ends, strict=True), strict=True):
                if (total := together(parts)) is not None:
                    columns.append(total)
            surplus.append(shared)
        return [torch.cat(columns, 1) if columns else None for columns in found], torch.cat(surplus) if left else 0.0


@torch.no_grad()
@no_autocast()
def dots(
    train: Keeper, validation: Keeper, slots: Sequence[Any], scalars: Mapping[int, Any], left: Mapping[int, Tensor]
) -> tuple[list[Tensor | None], Tensor]:
    """The dots of every value of the training batches with every validation sample.

    Args:
        train: keeps the step's batches.
        validation: keeps one batch, of V samples.
        slots: the tracked parameters, each with K in its `direction`, of the parameter's shape.
        scalars: `id` of a slot -> K, where K is a number; left: -> what else meets the validation samples' gradients.

    Returns:
        Of each batch, float32 `[count, V]`, None where no backward reached a tracked layer; and the dots of `left`,
        `[V]`.
    """
    many, device = validation.layouts[0].count, slots[0].param.device
    missed = torch.zeros(many, dtype=torch.float64, device=device)
    found = {kept.batch: torch.zeros(train.layouts[kept.batch].count, many, dtype=torch.float32, device=device)
             for kept in train.kept}  # fmt: skip
    by_token = any(layout.per_token for layout in train.layouts)

    def add(batch: int, part: slice, dots: Tensor) -> None:
        found[batch][:, part] += dots.to(device)

    for members in components(slots):
        taps = {tap for slot in members for tap in slot.taps}
        ours = [kept for kept in train.kept if kept.module._inrun in taps]
        theirs = [kept for kept in validation.kept if kept.module._inrun in taps]
        if _as_pairs(train, members, ours, theirs, scalars):
            for kept in ours:
                add(kept.batch, slice(0, many), _pairs(kept, theirs[0], members, scalars))
            continue
        unmet = {id(slot): left[id(slot)] for slot in members if id(slot) in left}
        of_theirs = None if by_token else _factors(validation, theirs)
        if of_theirs is not None:
            groups, ours = _together(ours, train.budget), []
            for group in groups:
                of_ours = _factors(train, group)
                if of_ours is None:
                    ours += group
                    continue
                for slot in members:
                    name = id(slot.sibling)
                    if runs := of_theirs.get(name, {}).get(0):
                        met = unmet.pop(id(slot), None)
                        found_here = _by_gradients(train, validation, slot, of_ours.get(name, {}), runs, met, add)
                        missed += found_here.to(device)
                del of_ours  # before those of another batch come to the device
            if not ours:
                continue
        size = max(1, CHUNK // sum(slot.param.numel() for slot in members))
        for low in range(0, many, size):
            samples = range(low, min(low + size, many))
            along = []  # the directions, by the place that K has
            for slot, gradient in zip(members, _gradients(validation, theirs, members, samples), strict=True):
                if id(slot) in unmet:
                    of_slot = (gradient * unmet[id(slot)]).reshape(len(samples), -1).sum(1, dtype=missed.dtype)
                    missed[samples.start : samples.stop] += of_slot.to(device)
                along.append((slot.sibling, targets_second(gradient.mul_(slot.sibling.data))))
            with setting("data", along):
                for kept in ours:
                    add(kept.batch, slice(samples.start, samples.stop), train.dots_of(kept, len(samples)))
    return [found.get(batch) for batch in range(len(train.layouts))], missed


def _together(runs: list[Kept], budget: Budget) -> list[list[Kept]]:
    """The runs whose factors stand on the device at a time: all, or where they wait on the host those of a batch. Of no
    runs one group: validation alone meets what K misses."""
    if budget.where == "device" or not runs:
        return [runs]
    batches: dict[int, list[Kept]] = {}
    for kept in runs:
        batches.setdefault(kept.batch, []).append(kept)
    return list(batches.values())


def _factors(keeper: Keeper, runs: Iterable[Kept]) -> dict[int, dict[int, list[Factors]]] | None:
    """By `id` of a parameter's direction, then by batch: what its gradients are made of. None where a run has none."""
    found: dict[int, dict[int, list[Factors]]] = {}
    for kept in runs:
        if (of_run := keeper.factors(kept)) is None:
            return None
        for name, factors in of_run.items():
            found.setdefault(name, {}).setdefault(kept.batch, []).append(factors)
    return found


def _by_gradients(
    train: Keeper,
    validation: Keeper,
    slot: Any,
    ours: Mapping[int, list[Factors]],
    theirs: list[Factors],
    left: Tensor | None,
    add: Callable[[int, slice, Tensor], None],
) -> Tensor:
    """Add one parameter's dots to those of each batch; returns the dots of `left`, float64 `[V]`."""
    many, inputs = validation.layouts[0].count, 1 if theirs[0].right is None else theirs[0].right.shape[2]
    k = slot.direction.reshape(-1, inputs)
    missed = torch.zeros(many, dtype=torch.float64, device=k.device)
    wide = torch.promote_types(k.dtype, torch.float32)
    of_left = None if left is None else left.reshape(-1, inputs)
    samples = many + max((train.layouts[batch].count for batch in ours), default=0)
    size = rows_at_a_time(samples * inputs, k.is_cuda)
    for rows, kinds in _rows(len(k), k.device, theirs, [run for of_batch in ours.values() for run in of_batch]):
        if not len(rows):
            continue
        of_ours = _parts(train, ours, kinds, rows, size, wide)
        of_theirs = _parts(validation, {0: theirs}, kinds, rows, size, wide)[0]
        for part, of_validation in zip(rows.split(size), of_theirs, strict=True):
            if of_left is not None:
                missed += (of_validation * of_left[part].flatten()).sum(1, dtype=missed.dtype)
            of_validation *= k[part].flatten()
            for batch, of_batch in of_ours.items():
                add(batch, slice(0, many), next(of_batch) @ of_validation.T)
    return missed


def _parts(
    keeper: Keeper, batches: Mapping[int, list[Factors]], kinds: set[int], rows: Tensor, size: int, wide: torch.dtype
) -> dict[int, Iterator[Tensor]]:
    """Of each batch that has runs of these kinds: `gradients`."""
    here = {batch: [run for run in runs if run.left.dim() in kinds] for batch, runs in batches.items()}
    return {batch: gradients(runs, keeper.layouts[batch], rows, size, wide) for batch, runs in here.items() if runs}


def _rows(
    count: int, device: torch.device, theirs: Sequence[Factors], ours: Sequence[Factors]
) -> Iterator[tuple[Tensor, set[int]]]:
    """A parameter's `count` rows, in parts, without those in which no validation sample has a gradient; and which runs
    each part concerns, by the dimensions of their left factors.

    A table has gradients in the rows of the ids it has met. One that is a weight too has them in all rows: those of the
    ids come apart.
    """
    rows = torch.arange(count, device=device)
    tables = [x.left.flatten().long() for x in (*theirs, *ours) if x.left.dim() == 2]
    if not tables:
        yield rows, {3}
        return
    whole = any(x.left.dim() == 3 for x in theirs)
    met = torch.zeros(count, dtype=torch.bool, device=device)
    met.index_fill_(0, torch.cat(tables if whole else [x.left.flatten().long() for x in theirs]), True)
    yield rows[met], {2, 3}
    if whole:
        yield rows[~met], {3}


def _gradients(validation: Keeper, runs: list[Kept], members: Sequence[Any], samples: range) -> list[Tensor]:
    """Of each parameter, its gradients by these samples of one batch, `[m, *shape]`."""
    total = [torch.zeros((len(samples), *s.param.shape), dtype=s.direction.dtype, device=s.param.device)
             for s in members]  # fmt: skip
    place = {id(slot.sibling): gradient for slot, gradient in zip(members, total, strict=True)}
    for kept in runs:
        for i, one in enumerate(validation.sample_gradients(kept, samples)):
            for name, gradient in one.items():
                if name in place:
                    place[name][i] += gradient
    return total


def _as_pairs(train: Keeper, members: Sequence[Any], ours: list[Kept], theirs: list[Kept], scalars: Mapping) -> bool:
    """Whether this is one linear layer that runs once in each batch, with none of it frozen, of which K is a number."""
    modules = {id(kept.module): kept.module for kept in (*ours, *theirs)}
    if not all(trains for kept in (*ours, *theirs) for *_, trains in kept.trained):
        return False
    once = len({kept.batch for kept in ours}) == len(ours) and len(theirs) == 1
    if len(modules) != 1 or not once or any(id(slot) not in scalars for slot in members):
        return False
    (module,) = modules.values()
    layer = isinstance(module, LinearRule) and not isinstance(module, Part)
    return layer and all(layout.segments is None for layout in train.layouts)


def _pairs(kept: Kept, other: Kept, members: Sequence[Any], scalars: Mapping[int, Any]) -> Tensor:
    """`[B, V]` of one run of a linear layer with another."""
    device = kept.module.weight.device
    grads, val_grads = (probing.rows(moved(k.grads[0], device), 1) for k in (kept, other))
    acts, val_acts = (probing.rows(moved(k.x, device).to(grads.dtype), 1) for k in (kept, other))
    val_grads = val_grads.to(grads.dtype)
    total = torch.zeros((), device=device)
    for slot in members:
        if slot.param is kept.module.weight:
            dots = ghost_dot_pairwise(acts, grads, val_acts, val_grads)
        else:
            wide = torch.promote_types(grads.dtype, torch.float32)
            dots = grads.sum(1, dtype=wide) @ val_grads.sum(1, dtype=wide).T
        total = total + scalars[id(slot)] * dots
    return total
