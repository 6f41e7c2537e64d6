"""Method "first": the direction is known before the step, so the scores ride on its ordinary backward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from inrun_kernels.adam import write_adam_directions

from . import directions
from .errors import InRunError, Pending, few
from .method import Method
from .tap import Layout, Tap, together
from .updates import groups_of

if TYPE_CHECKING:
    from .tracker import Tracker

MADE_OF = ("momentum", "dampening", "nesterov", "betas", "eps", "amsgrad", "maximize")
NEAR = 1e-6  # relative difference up to which the factors of two groups count as one


class Inline(Method):
    """Directions are written when a step begins; probes collect the dots; nothing is kept."""

    starts_with_validation = True

    def __init__(self, tracker: Tracker) -> None:
        self.tracker = tracker
        self.probes: list[dict[Any, Tensor]] = []  # of each batch: tap or device -> probe
        self._last: Layout | None = None  # of those that have had no backward, the last
        self._behind = False  # whether they lie differently
        self._lr: list[Any] = []
        self._options: list[dict[str, Any]] = []  # of each group, what else the directions depend on
        self.drop: dict[str, Tensor] = {}

    def require_supported(self, optimizer: Optimizer) -> None:
        directions.require_supported(optimizer)

    def begin(self, scale: float | Tensor) -> None:
        """Write the step's directions, from the validation gradients and the optimizer's state as it is."""
        tracker = self.tracker
        gradients, every = tracker.validations.gradients, tracker.validations.every
        self.probes = []
        self._lr, self._options = learning_rates(tracker.updates), options(tracker.updates)
        launched, rates = [], {}
        for each in tracker.updates if len(tracker.targets) == 1 else ():
            rates |= {(each, k): directions.adam_rates(each, group) for k, group in enumerate(each.param_groups)}
        for i, slot in enumerate(tracker.slots):
            found = [gradients[name][i] for name in tracker.targets]
            part, of_group = None, rates.get((slot.optimizer, slot.group))
            if of_group is not None and found[0] is not None:
                part = directions.adam_part(slot, found[0], of_group)
            if part is not None:
                launched.append(part)
            else:
                write_direction(slot, found)
            if every == 1:
                for name in tracker.targets:
                    gradients[name][i] = None  # the direction takes its place in memory
        if launched:
            write_adam_directions(launched)

    def batch(self, layout: Layout, recompute: Any = None) -> None:
        """Fresh probes for the next forward: one for all layers of a device; while the sums are to be checked,
        one for every layer. Nothing is kept, so nothing need be computed again."""
        tracker = self.tracker
        waits = self.probes and all(probe.grad is None for probe in self.probes[-1].values())
        self._behind = bool(waits and (self._behind or self._last is None or not layout.is_like(self._last)))
        self._last = layout
        shape = (layout.count, *tracker.tail)
        probes: dict[Any, Tensor] = {}
        by_tap: dict[Tap, Tensor] = {}
        layouts: dict[torch.device, Layout] = {}  # none where values belong to rows
        if layout.segments is not None:
            layouts = {device: layout.on(device) for device in {slot.param.device for slot in tracker.slots}}
        for slot in tracker.slots:
            for tap in slot.taps:
                key = tap if tracker.check_due else slot.param.device
                if key not in probes:
                    dtype = torch.float64 if slot.param.dtype == torch.float64 else torch.float32
                    probes[key] = torch.zeros(shape, dtype=dtype, device=slot.param.device, requires_grad=True)
                by_tap[tap] = probes[key]
        for tap, probe in by_tap.items():
            tap.probe, tap.behind, tap.layout = probe, self._behind, layouts.get(probe.device)
        self.probes.append(probes)

    def before_update(self, factor: Tensor, unscale: Any) -> Tensor:
        """Check the sums where that is due; returns what the dots must be multiplied by."""
        tracker = self.tracker
        if lost := tracker.lost():
            raise InRunError(
                f"optimizer.step(): expected the gradients of the step's backward, those of {len(lost)} parameters are "
                f"gone: {few(lost)}. Method 'first' has scored them already: freeze or exclude what is not "
                "to train, or take a path method"
            )
        if tracker.check_due:
            dots = [{tap: probe.grad for tap, probe in probes.items()} for probes in self.probes]
            along = [s.direction for s in tracker.slots]
            tracker.check(dots, along, factor, unscale)
        now = options(tracker.updates)
        if changed := [was for was, group in zip(self._options, now, strict=False) if was != group]:
            raise InRunError(
                f"optimizer: expected the options the step began with, {changed[0]}, which the scores of its backward "
                "are made with; got others. Set them before the step block"
            )
        change = lr_change(self._lr, learning_rates(tracker.updates), tracker.validations.pending)
        return factor * (change.to(factor) if isinstance(change, Tensor) else change)

    def release(self) -> None:
        self.probes = []

    def end(self, failed: bool = False) -> None:
        for tap in self.tracker.taps:
            tap.probe = tap.layout = None

    def finish(self) -> list[Tensor | None]:
        """The dots of each batch, `[count]` or `[count, M]`; None where no backward reached a tracked layer."""
        return [together(p.grad for p in probes.values()) for probes in self.probes]


@torch.no_grad()
def write_direction(slot: Any, val_grads: list[Tensor | None]) -> None:
    """Write a parameter's first-order direction, one slice for each target's validation gradient."""
    slices = slot.slices
    val_grads = [None if g is None else g.to(slices[0].dtype) for g in val_grads]  # float16 has no range for them
    known = [g for g in val_grads if g is not None]
    if not known:
        slot.direction.zero_()
        return
    for part in directions.parts(known[0]):
        place = slices[0][part] if len(slices) == 1 else None  # of one direction, its own memory will do
        factor = directions.coefficient(slot, known, part, out=place)
        for slice_, grad in zip(slices, val_grads, strict=True):
            if grad is None:
                slice_[part].zero_()
            else:
                torch.mul(grad[part], factor, out=slice_[part])


def learning_rates(optimizers: Iterable[Optimizer]) -> list[Any]:
    """Of each group; one on a GPU as a tensor, which nothing waits for."""
    found = [group["lr"] for group in groups_of(optimizers)]
    return [lr.clone() if isinstance(lr, Tensor) and lr.is_cuda else float(lr) for lr in found]


def options(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    """Of each group, the numbers beside its learning rate that its directions are made of."""
    found = []
    for group in groups_of(optimizers):
        found.append({k: v for k in MADE_OF if not isinstance(v := group.get(k), Tensor)})
        if group.get("momentum") is not None and not group["nesterov"]:
            found[-1]["momentum"] = bool(group["momentum"])  # by how much counts in steps to come
    return found


def lr_change(before: Sequence[Any], now: Sequence[Any], pending: Pending) -> float | Tensor:
    """The factor by which the learning rates have changed; a group that stands still fits any.

    Raises:
        InRunError: there is no one factor. Of rates on a GPU `pending` says so, some steps later.
    """
    held, known = [], []
    for pair in zip(before, now, strict=False):
        (held if any(isinstance(lr, Tensor) for lr in pair) else known).append(pair)

    def error() -> InRunError:
        rates = [[float(lr) for lr in side] for side in (before, now)]
        return InRunError(
            f"lr: expected the learning rates the step began with, {rates[0]}, or all of them changed by one factor; "
            f"got {rates[1]}. Set them before the step block"
        )

    ratios = [lr / old if old else math.inf for old, lr in known if old or lr]
    if any(not math.isfinite(r) or abs(r - ratios[0]) > NEAR * abs(ratios[0]) for r in ratios):
        raise error()
    if not held:
        return ratios[0] if ratios else 1.0
    device = next(lr.device for lr in held[0] if isinstance(lr, Tensor))
    old, new = (torch.stack([torch.as_tensor(lr, device=device).reshape(()) for lr in side])
                for side in zip(*held, strict=True))  # fmt: skip
    moves = (old != 0) | (new != 0)
    changes = torch.where(moves, new / old, 1.0)
    ratio = ratios[0] if ratios else changes.take(moves.int().argmax())
    even = torch.isfinite(changes) & ((changes - ratio).abs() <= NEAR * abs(ratio))
    pending.ask((moves & ~even).any(), error)
    return ratio
