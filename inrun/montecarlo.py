"""Method "monte_carlo": the Shapley value of the real step, of any optimizer at all, by taking the step for coalitions.

The players are the samples of the step, of all its batches; a coalition S is worth

    U(S) = loss(w + u(0)) - loss(w + u(c * g_S)),   g_S = sum of g_z over S

u being the optimizer's own update with its state before the step, c what the loop multiplied the gradients by. With
`clip`, g_S is clipped by its own norm, as the loop would clip it. So u may be elementwise or not, and turn at once (a
sign) or not; the other methods' values can be held to these, on one's own model. Excluded parameters stand still.

Where all 2^B coalitions are no more than random orders could meet, `permutations * (B - 1) + 2`, they are gone through
one sample more or less at a time, and values are exact. Else they are means over random orders (`shapley.orders`) of
what a sample adds to those before it: unbiased, with a standard error. Both add up to U(all), the measured drop. The
orders are a function of the step's number, so that a resumed run draws the same. No coalition is evaluated twice.

In small batches the orders need only find what a quadratic loss leaves, whose values are known exactly
(`quadratic.py`; it takes the gradient of every validation loss at both ends of the step and, of models that are not
large, after each sample's own step, where a loss has one, and 2^B updates). The standard error is then that of what is
left.

Each coalition costs one sample's weight gradients (`coalitions.py`), one update and one forward of every validation
loss. An elementwise update is had in float64 and a few parameters at a time; any other is that of all parameters
together, in their dtypes.

Noise: a value is a mean of differences of losses, each known to the rounding of the loss itself: about 1e-7 of it in
float32, 4e-3 where it is a bfloat16, and between them under autocast. Most samples do less than the latter two: let the
validation loss be computed in float32. Weights of 16 bits round the step of every coalition, as they do the real one.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from . import quadratic, shapley
from .coalitions import Coalitions, gray
from .errors import InRunError
from .keep import Budget, Keeper
from .method import Method, Options
from .restoring import buffers_kept
from .tap import Layout, size_of
from .updates import (
    ELEMENTWISE,
    chunks,
    counts_read,
    is_known,
    is_plain,
    joint_updates,
    require_no_closure,
    updates,
    weights_moved,
)

if TYPE_CHECKING:
    from .tracker import Tracker

SEED = 0  # of the orders, with the step's number


class MonteCarlo(Method):
    """Keeps a step's layers, and when the update begins takes it for one coalition after the other.

    Args:
        tracker: whose step.
        options: where activations wait, and the update.
        permutations: orders that are sampled, even.
    """

    starts_with_validation = False

    def __init__(self, tracker: Tracker, options: Options, permutations: int) -> None:
        update, clip = options.update, options.clip
        if not isinstance(permutations, int) or permutations < 2 or permutations % 2:
            raise ValueError(f"permutations: expected an even integer of at least 2, got {permutations!r}")
        if tracker.samples or not tracker.validations.losses:
            got = "pairwise" if tracker.samples else "validation='batch'" if tracker.in_batch else "validation blocks"
            raise InRunError(f"method 'monte_carlo': expected validation=<callable> and no pairwise, got {got}")
        if tracker.validations.every != 1:
            raise ValueError(f"validate_every: expected 1 with method 'monte_carlo', which takes the validation loss "
                             f"anew for every coalition, got {tracker.validations.every}")  # fmt: skip
        self.tracker, self.update, self.clip, self.permutations = tracker, update, clip, permutations
        self.budget = Budget(options.keep, options.keep_bytes)
        self.keeper = Keeper(tracker.taps, self.budget, weights_move=False)  # back in place whenever a layer is scored
        self.release()

    @property
    def rows(self) -> list[int]:
        """Samples of each batch."""
        return [layout.rows for layout in self.keeper.layouts]

    def require_supported(self, optimizer: Optimizer) -> None:
        require_no_closure(optimizer)

    def require_shards_do(self) -> None:
        raise InRunError("method 'monte_carlo': expected one process, got parameters sharded over several")

    def begin(self, scale: float | Tensor) -> None:
        if (size := self.tracker.ranks.size) > 1:
            raise InRunError(f"method 'monte_carlo': expected one process, got {size}")
        self.release()
        self._scale = scale

    def batch(self, layout: Layout, recompute: Callable[[], Tensor] | None) -> None:
        if recompute is not None or layout.segments is not None:
            got = "recompute" if recompute is not None else "tokens" if layout.per_token else "segments"
            raise InRunError(f"{got}: expected None with method 'monte_carlo', whose players are whole samples, kept")
        self.keeper.begin_batch(layout)

    def end(self, failed: bool = False) -> None:
        self.keeper.pause()
        if failed:
            self.release()

    def memory(self) -> dict[str, int]:
        """Bytes kept now and at most; while coalitions are gone through, also of the weights' copies and of g_S."""
        held = {
            "weights": self._weights.values(),
            "coalition": [] if self._coalitions is None else self._coalitions.tensors(),
            "validation": [g for gradients in self._slopes.values() for g in gradients.values()],
        }
        return {"kept": self.budget.bytes, "kept_peak": self.budget.peak, **{k: size_of(v) for k, v in held.items()}}

    def release(self) -> None:
        """Forget the last step."""
        self.keeper.reset()
        self.drop: dict[str, Tensor] = {}
        self.standard_error = None
        self._values: list[Tensor | None] | None = None
        self._coalitions: Any = None  # `Coalitions`
        self._moving: list[tuple[int, Any]] = []  # numbered slots that the update moves
        self._weights: dict[int, Tensor] = {}  # slot -> the weight before the step
        self._slopes: dict[int, dict[int, Tensor]] = {}  # coalition -> slot -> the losses' gradients, `[M, numel]`

    @torch.no_grad()
    def before_update(self, factor: Tensor, unscale: Any) -> Tensor:
        """Go through the coalitions; returns what the values must be multiplied by: 0 where the update is skipped."""
        if not self.rows or not factor:
            return factor
        tracker, c = self.tracker, float(factor)
        self._moving = [(i, s) for i, s in enumerate(tracker.slots) if s.grad is not None]
        self._coalitions = Coalitions(self.keeper, self.rows, [s for _, s in self._moving])
        if tracker.check_due:
            self._check(factor, unscale)
        if self.clip is not None:
            expected = self._clipped(s.grad.double() * (unscale / c) for _, s in self._moving)
            if abs(expected / c - 1) > 1e-2:
                raise InRunError(
                    f"clip: expected gradients clipped to the norm {self.clip} over the tracked parameters together, "
                    f"so multiplied by {expected:.4g} (of a loss scaled by {float(self._scale):g}); got {c:.4g}"
                )
        players = sum(self.rows)
        nobody, everybody = 0, (1 << players) - 1
        exact = everybody < self.permutations * (players - 1) + 2
        if self._moving and not exact and players <= quadratic.most_players(self._moving, self.update, self.clip):
            points = quadratic.points(players, self._moving, len(tracker.targets))
            self._slopes = {members: {} for members in points}
        found: dict[int, Tensor] = {}
        with counts_read(tracker.slots):
            for members in (nobody, everybody, *self._slopes):
                if members not in found:
                    whole = members == everybody
                    gradient_of = (lambda s: s.grad.double() * unscale) if whole else self._gradient_of(members, c)
                    found[members] = self._losses(gradient_of, self._slopes.get(members))
            values, errors = self._exact(players, found, c) if exact else self._sampled(players, found, c)
        self.drop = dict(zip(tracker.targets, found[nobody] - found[everybody], strict=True))
        tracker.validations.last_losses.update(zip(tracker.targets, found[everybody], strict=True))
        device = found[nobody].device
        values, errors = (torch.from_numpy(x).to(device, torch.float32) for x in (values, errors))
        single = len(tracker.targets) == 1
        self.standard_error = errors[:, 0] if single else errors
        parts = (values[:, 0] if single else values).split(self.rows)
        self._values = [part if runs else None for part, runs in zip(parts, self._coalitions.runs, strict=True)]
        self._coalitions, self._weights, self._slopes = None, {}, {}
        return torch.ones_like(factor)

    def moves(self, unscale: Any, optimizers: Collection[Any]) -> Iterator[tuple[Any, Tensor]]:
        for i, moved in self._moves(lambda slot: slot.grad.double() * unscale, optimizers):
            if is_plain((slot := self.tracker.slots[i]).shard):
                yield slot, moved

    def finish(self) -> list[Tensor | None]:
        """The values of each batch, `[rows]` or `[rows, M]`."""
        if self._values is None:
            tail, device = self.tracker.tail, self.tracker.device
            self._values = [torch.zeros(rows, *tail, device=device) for rows in self.rows]
            self.standard_error = torch.zeros(sum(self.rows), *tail, device=device)
        self.keeper.reset()
        return self._values

    # ------------------------------------------------------------------ coalitions

    def _exact(self, players: int, found: dict[int, Tensor], c: float) -> tuple[np.ndarray, np.ndarray]:
        self._visit(gray(players), found, c)
        values = shapley.from_coalitions(-_stacked([found[members] for members in range(1 << players)]))
        return values, np.zeros_like(values)

    def _sampled(self, players: int, found: dict[int, Tensor], c: float) -> tuple[np.ndarray, np.ndarray]:
        orders = shapley.orders(players, self.permutations, (SEED, self.tracker.steps))
        along = [[0, *itertools.accumulate(1 << z for z in order)] for order in orders.tolist()]
        self._visit(itertools.chain(*along), found, c)
        place = {members: k for k, members in enumerate(found)}
        worth, known = -_stacked(list(found.values())), np.zeros(1)
        if self._slopes:
            here = functools.partial(self._gradient_of, c=c)
            game = quadratic.worth(players, self._moving, self._slopes, here, self._moves, self.update)
            worth, known = worth - game[list(found)], shapley.from_coalitions(game)
        values, errors = shapley.from_orders(orders, worth[[[place[members] for members in row] for row in along]])
        return known + values, errors

    def _visit(self, coalitions: Iterable[int], found: dict[int, Tensor], c: float) -> None:
        """Add to `found`, coalition -> losses, those that it has none of."""
        for members in coalitions:
            if members not in found:
                found[members] = self._losses(self._gradient_of(members, c))

    def _gradient_of(self, members: int, c: float) -> Callable[[Any], Tensor]:
        """A coalition's gradient of a slot, as its update would find it; until the next one's is asked for."""
        coalitions = self._coalitions
        coalitions.gather(members)
        by = c if self.clip is None else self._clipped(coalitions.gradient.values())
        return lambda s: coalitions.gradient[id(s.sibling)] * by

    def _losses(self, gradient_of: Callable[[Any], Tensor], slopes: dict[int, Tensor] | None = None) -> Tensor:
        """`[M]`, float64: the validation losses after the step with these gradients.

        An empty `slopes` takes up the losses' gradients there, slot -> `[M, numel]`; zero where a loss has none.
        """
        tracker, validations = self.tracker, self.tracker.validations
        with weights_moved(tracker.slots, tracker.ranks, self._moves(gradient_of), self._weights):
            if slopes is None:
                with buffers_kept(tracker.model):
                    found = [validations.loss(name) for name in tracker.targets]
            else:
                found = []
                for i, slot in self._moving:
                    dtype = torch.promote_types(slot.shard.dtype, torch.float32)
                    slopes[i] = torch.zeros(
                        len(tracker.targets), slot.shard.numel(), dtype=dtype, device=slot.shard.device
                    )
                for m, name in enumerate(tracker.targets):
                    with torch.enable_grad():
                        loss, gradients = validations.loss_and_gradient(name)
                    found.append(loss)
                    for i, slope in slopes.items():
                        if (g := gradients[i]) is not None:
                            slope[m] = g.flatten()
        return torch.stack([loss.double().reshape(()).to(found[0].device) for loss in found])

    def _moves(
        self, gradient_of: Callable[[Any], Tensor], optimizers: Collection[Any] | None = None
    ) -> Iterator[tuple[int, Tensor]]:
        for optimizer in self.tracker.updates if optimizers is None else optimizers:
            moving = [(i, slot) for i, slot in self._moving if slot.optimizer is optimizer]
            alone = is_known(optimizer, self.update, ELEMENTWISE)
            for part in chunks(moving) if alone else [moving]:
                slots = [slot for _, slot in part]
                grads = [gradient_of(slot) for slot in slots]
                found = updates(slots, grads, self.update) if alone else joint_updates(optimizer, slots, grads)
                yield from zip((i for i, _ in part), found, strict=True)

    def _clipped(self, gradient: Iterable[Tensor]) -> float:
        """What the loop multiplies a gradient by: it divides by the loss scale, then clips by the norm."""
        assert self.clip is not None
        scale = float(self._scale)
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradient)) / scale
        return min(1.0, self.clip / (norm + 1e-6)) / scale  # as `clip_grad_norm_` has it

    def _check(self, factor: Tensor, unscale: Any) -> None:
        """The samples' gradients must add up to the parameters': along these, whose square they then add up to."""
        tracker = self.tracker
        whole = {id(s.sibling): s.grad for _, s in self._moving}
        dots: list[dict[Any, Tensor | None]] = [dict.fromkeys(tracker.taps) for _ in self.rows]
        for batch, runs in enumerate(self._coalitions.runs):
            for kept in runs:
                samples = self.keeper.sample_gradients(kept, range(self.rows[batch]))
                found = torch.stack([_dot(one, whole, factor) for one in samples])
                before = dots[batch][kept.module._inrun]
                dots[batch][kept.module._inrun] = found if before is None else before + found
        along = [whole.get(id(s.sibling), torch.zeros_like(s.shard)) for s in tracker.slots]
        tracker.check(dots, along, factor, unscale)


def _dot(a: dict[int, Tensor], b: dict[int, Tensor], like: Tensor) -> Tensor:
    parts = [(a[k].float() * b[k].float()).sum().to(like) for k in a if k in b]
    return sum(parts, torch.zeros_like(like))


def _stacked(losses: list[Tensor]) -> np.ndarray:
    """`[n, M]`, read back from the device at once."""
    return torch.stack(losses).cpu().numpy()
