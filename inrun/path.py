"""K of the path methods: how the optimizer's own update turns this step's gradient into a move of the weights.

    along the path      K = -(u(g_B) - u(0)) / g_B, coordinate by coordinate
    beside it           where the update turns at once or the gradient was clipped: `turning.py`
    not elementwise     a Jacobian in the place of K: `coupled.py`

Samples whose gradients cancel have a K too: of SGD its one coefficient; of others, where g_B is nothing beside the
largest parameter's gradient and moves nothing beside what that would, the slope of the update over as much as that
one is large. (What the samples' own gradients are there, the path does not know.)

Where the gradient was clipped, an update that is not elementwise and layers whose samples are no rows stay on the path:
the gradient grows until its norm is `clip`, and from there on only its direction can change, of which a sample's own
part is `g_z` less its component along `g_B`.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD

from . import directions
from .coupled import Coupled
from .distributed import laid_alike, local
from .errors import InRunError
from .squares import Batches, squares
from .turning import Beside, slopes, turns
from .updates import UpdateRule, chunks, updates

if TYPE_CHECKING:
    from .tracker import Tracker

# A coordinate's gradient counts as none below this part of the root mean square of the parameter whose is largest, and
# its move as none below this part of what a gradient as large as that would move it.
NOTHING = 1e-6
STILL = 1e-3


class Path:
    """Of one step at a time; `release` forgets it.

    Args:
        tracker: whose slots have K, and then K * G, written where their directions stand.
        update: a user's update rule, "elementwise", or None.
        clip: the `max_norm` of the user's clipping by norm, or None.
    """

    def __init__(self, tracker: Tracker, update: UpdateRule | str | None, clip: float | None) -> None:
        self.tracker, self.update = tracker, update
        self._clip, self._warned = clip, False
        self._coupled = Coupled(update)
        self.release()

    def release(self) -> None:
        """Forget the step."""
        self._coupled.release()
        self._log = 0.0  # log(1 / what clipping multiplied the gradient by)
        self._slopes: dict[int, Tensor] = {}  # slot -> -u'(g_B), where it was clipped along the path
        self._units: dict[int, Tensor] = {}  # slot -> g_B / |g_B|, where it was clipped
        self._beside: Beside | None = None
        self._earned: list[tuple[Tensor, Tensor]] = []  # of each target, what `Beside.shared` shares

    def tensors(self) -> Iterator[Tensor]:
        """All that is held."""
        yield from self._coupled.tensors()
        yield from (*self._slopes.values(), *self._units.values())
        if self._beside is not None:
            yield from self._beside.tensors()

    @property
    def left(self) -> dict[int, Tensor]:
        """Slot -> what K * g_B misses of the update, where that is not all."""
        return {} if self._beside is None else self._beside.left

    def write(
        self, factor: Tensor, unscale: Any, scale: float | Tensor, batches: Batches, ends: bool
    ) -> dict[int, tuple[Tensor, Tensor]]:
        """Write K of this step; returns slot -> u(0), u(g_B) - u(0), if `ends` are asked for.

        Args:
            factor: what dots are multiplied by to be values.
            unscale: what the gradients must still be multiplied by; scale: what the loss was.
            batches: as of `squares.squares`.

        Raises:
            InRunError: gradients clipped to another norm, or an update that is not what was said of it.
        """
        tracker, moves = self.tracker, {}
        moving = [(i, s) for i, s in enumerate(tracker.slots) if s.param.grad is not None]
        held = [slot for _, slot in moving]
        clipped = self._clipped(held, factor, unscale, scale)
        coupled = {i for i, _ in self._among_coupled(moving, unscale)}
        linear = self.update is None and all(type(slot.optimizer) is SGD for slot in held)
        size = _size_of_gradients(held, unscale)
        cancelled = set() if linear else _cancelled(moving, unscale, size)
        whole = ends or not linear  # whether u is to be known, as of all that is coupled
        for part in chunks(moving):
            here = [slot for _, slot in part]
            full = [slot.grad.double() * unscale for slot in here]
            at_zero = updates(here, [torch.zeros_like(g) for g in full], self.update) if whole else []
            at_full = updates(here, full, self.update) if whole else []
            for k, (i, slot) in enumerate(part):
                g, dtype = full[k], slot.param.dtype
                if ends:
                    moves[i] = (at_zero[k].to(dtype), (at_full[k] - at_zero[k]).to(dtype))
                if clipped is not None:
                    self._units[i] = (g / clipped[1]).to(dtype)
                if i in coupled:
                    self._coupled.hold(i, slot, g, at_full[k] - at_zero[k])
                elif linear:
                    slot.direction[...] = directions.sgd_coefficient(slot)
                else:
                    over = size.to(g.device) if i in cancelled else None
                    slot.direction[...] = self._ratio(slot, g, at_zero[k], at_full[k], over)
        alone = [(i, slot) for i, slot in moving if i not in coupled]
        turning = turns([] if linear else [slot for _, slot in alone], unscale, self.update, tracker.ranks)
        if moving and (turning or clipped is not None):
            self._write_beside(moving, factor, unscale, clipped, turning, batches)
        if clipped is not None:
            self._log = math.log(1 / clipped[0])
            self._add_slopes([(i, slot) for i, slot in alone if i not in self.left], unscale, size)
        return moves

    def multiply_in(self, slices: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
        """Make K in one target's slices K * G, and take off what clipping takes of g_B's own direction.

        Args:
            slices: of each slot; gradients: G there, None where the loss has none.
        """
        ranks, along = self.tracker.ranks, []
        for i, (slice_, g) in enumerate(zip(slices, gradients, strict=True)):
            if g is None:
                slice_.zero_()
                continue
            slope = self._slopes[i] * g if i in self._slopes else None
            if i in self._coupled:
                slice_.copy_(self._coupled.direction(i, g))
                if i in self._units:
                    slope = self._coupled.slope(i, g)
                    slice_.add_(slope, alpha=self._log)
            else:
                slice_.mul_(g)
            if slope is not None:
                along.append((slope * self._units[i]).sum() * self.tracker.slots[i].share)
        taken_off = 0.0
        if self._log:  # sums over the processes, to which all of them come
            taken_off = self._log * ranks.total(along, slices[0].device)
        if self._beside is not None:
            surplus, by_size, by_unit = self._beside.along_gradients(gradients, ranks)
            self._earned.append((surplus, by_size))
            taken_off = taken_off - float(by_unit) if self._units else 0.0
        for i, unit in self._units.items():
            slices[i].sub_(unit, alpha=taken_off)

    def shared(self, found: list[Tensor | None], surplus: Tensor | float | None = None) -> list[Tensor | None]:
        """The dots of each batch, `[count]` or `[count, columns]`, and what samples earn besides.

        Args:
            surplus: of each column, in the place of what `multiply_in` found.
        """
        if self._beside is None:
            return found
        by_size: Tensor | float = 0.0
        if surplus is None:
            both = [torch.stack(of_targets) for of_targets in zip(*self._earned, strict=True)]
            surplus, by_size = both if self.tracker.many is not None else (both[0][0], both[1][0])
        return self._beside.shared(found, surplus, by_size, self.tracker.ranks)

    def _clipped(
        self, slots: Sequence[Any], factor: Tensor, unscale: Any, scale: float | Tensor
    ) -> tuple[float, float] | None:
        """What the gradient was multiplied by when it was clipped, and its norm since; None where it was not.

        Args: of the parameters that have a gradient; as in `write`.

        Raises:
            InRunError: clipped to another norm, or that of other parameters too.
        """
        rounding = 4 * max([0.0, *(torch.finfo(s.grad.dtype).eps for s in slots)])
        if self._clip is None:
            others = self.tracker.coverage["excluded"] or self.tracker.validations.outside
            if self.tracker.first_check and not (self.tracker.samples or others):
                self._warn_of_none(float(factor) * float(scale) * self.tracker.ranks.divisor, max(1e-4, rounding))
            return None
        ranks = self.tracker.ranks
        norm = ranks.total_norm((s.grad.double() * unscale, s.share) for s in slots)
        shrunk = float(factor) * float(scale) * ranks.divisor  # of the mean over the processes
        if not 0 < shrunk < 1 - 1e-6:  # 0: a fused optimizer will skip the update
            return None
        if norm > self._clip * (1 + 1e-2 + rounding):
            raise InRunError(
                f"clip: expected gradients of at most the norm {self._clip}, got {norm:.4g} after they were made "
                f"{shrunk:.4g} of what they were"
            )
        if norm > self._clip * (1 - 1e-3 - rounding):
            return shrunk, norm
        params = *self.tracker.model.parameters(), *self.tracker.validations.outside
        grads = [(local(laid_alike(p.grad, p)), ranks.share(p)) for p in params if p.grad is not None]
        every = ranks.total_norm((g.double() * unscale, share) for g, share in grads)
        if every > self._clip * (1 - 1e-3 - rounding):
            raise InRunError(
                f"clip: expected gradients clipped to the norm {self._clip} over the tracked parameters together, "
                f"got their norm {norm:.4g}, and {every:.4g} with the excluded ones and those that are not the model's"
            )
        if norm / shrunk > self._clip:  # else it was something else that made them smaller
            self._warn(f"clip: gradients of the norm {norm / shrunk:.4g} were made {shrunk:.4g} of that, which is not "
                       f"the norm {self._clip}. If they were clipped to another one, say to which")  # fmt: skip
        return None

    def _warn_of_none(self, shrunk: float, rounding: float) -> None:
        """A loss scaler's factor is one over a power of two, and that of a mean over batches over their number."""
        times = 1 / max(shrunk, 1e-30)
        if times > 1 and abs(times - round(times)) > rounding * times:
            self._warn(f"gradients were made {shrunk:.4g} of what they were before the update. If they were clipped by "
                       "norm, say to which: track(..., clip=max_norm)")  # fmt: skip

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{what}. Clipping is a part of the update; here it is taken for a constant", stacklevel=3)

    def _ratio(self, slot: Any, g: Tensor, at_zero: Tensor, at_full: Tensor, over: Tensor | None) -> Tensor:
        """-(u(g) - u(0)) / g; where g is nothing beside `over`, and moves nothing, the slope over that."""
        moved = at_full - at_zero
        ratio = torch.where(g == 0, 0.0, -moved / torch.where(g == 0, 1.0, g))
        if over is None:
            return ratio
        (start,) = updates([slot], [g - over], self.update)
        beyond = at_full - start
        nothing = (g.abs() <= NOTHING * over) & (moved.abs() <= STILL * beyond.abs())
        return torch.where(nothing, -beyond / over, ratio)

    def _write_beside(
        self,
        moving: Sequence[tuple[int, Any]],
        factor: Tensor,
        unscale: Any,
        clipped: tuple[float, float] | None,
        turning: bool,
        batches: Batches,
    ) -> None:
        """K from beside the path in the place of the path's, and what it misses of the update."""
        numbers, slots = zip(*moving, strict=True)
        ranks = self.tracker.ranks
        of = squares(batches, slots, ranks)
        only = {k for k, i in enumerate(numbers) if i not in self._coupled}
        shares = {i: slot.share for i, slot in moving}
        self._beside = Beside(factor, of.of_samples, 0.0 if clipped is None else clipped[1], shares)
        for k, slope, by_clipping in slopes(of, slots, only, unscale, factor, clipped, turning, self.update, ranks):
            i, slot = numbers[k], slots[k]
            of_path = slot.slices[0]
            wide = torch.promote_types(of_path.dtype, torch.float32)
            written = torch.where(slope.isfinite(), slope, of_path).to(of_path.dtype)
            self._beside.left[i] = (of_path.to(wide) - written) * slot.grad * unscale
            if by_clipping is not None:
                a, b = by_clipping
                self._beside.along[i] = a.to(wide), b.to(wide)
            slot.direction[...] = written

    def _among_coupled(self, moving: list[tuple[int, Any]], unscale: Any) -> list[tuple[int, Any]]:
        found = self._coupled.among(moving, unscale)
        if found and (self.tracker.samples or self.tracker.ranks.sharded):
            raise InRunError(
                f"{'pairwise' if self.tracker.samples else 'parameters in shards'}: expected an optimizer that updates "
                f"coordinate by coordinate, got {type(found[0][1].optimizer).__name__}"
            )
        return found

    def _add_slopes(self, numbered: Sequence[tuple[int, Any]], unscale: Any, size: Tensor) -> None:
        """Add to K what the path has beyond where clipping begins: -u'(g_B), by differences."""
        for part in chunks(numbered):
            slots = [slot for _, slot in part]
            grads = [slot.grad.double() * unscale for slot in slots]
            steps = [1e-3 * g.abs() + 0.1 * NOTHING * size.to(g.device) + 1e-12 for g in grads]
            low = updates(slots, [g - h for g, h in zip(grads, steps, strict=True)], self.update)
            high = updates(slots, [g + h for g, h in zip(grads, steps, strict=True)], self.update)
            for (i, slot), a, b, h in zip(part, low, high, steps, strict=True):
                self._slopes[i] = (-(b - a) / (2 * h)).to(slot.param.dtype)
                slot.direction.add_(self._slopes[i], alpha=self._log)


def _size_of_gradients(slots: Sequence[Any], unscale: Any) -> Tensor:
    """The root mean square of the gradient of the parameter that has the largest; float64."""
    if not slots:
        return torch.zeros((), dtype=torch.float64)
    sizes = []
    for slot in slots:
        dtype = torch.promote_types(slot.grad.dtype, torch.float32)
        norm = torch.linalg.vector_norm(slot.grad, dtype=dtype).double() * unscale
        sizes.append((norm / max(1, slot.grad.numel()) ** 0.5).to(slots[0].grad.device))
    return torch.stack(sizes).max()


def _cancelled(moving: Sequence[tuple[int, Any]], unscale: Any, size: Tensor) -> set[int]:
    """Numbers of the parameters of whose gradients some coordinate is nothing beside `size`; the device is waited
    for."""
    bound = NOTHING * size / unscale
    found = [(slot.grad.abs() <= bound.to(slot.grad.device)).any().to(size.device) for _, slot in moving]
    told = (torch.stack(found) & (bound > 0).to(size.device)).tolist() if found else []
    return {i for (i, _), some in zip(moving, told, strict=True) if some}
