"""The methods whose direction is known only after the backward: second order, secant, and path values.

All of them are `value_z = <K * G, g_z>`, coordinate by coordinate: K says how the optimizer turns this step's gradient
into an update, G is the validation gradient along the step. K is written where the direction will stand when the
update begins, G multiplied in when its last part is known, and then each kept layer is scored once.

    secant        K = the frozen-state coefficient      G = (g_v(w_t) + g_v(w_{t+1})) / 2; with Adam K * G is no larger
                                                        than `directions.largest`
    path          K = -(u(g_B) - u(0)) / g_B: path.py   G = g_v(w_t)
    path_secant   K as path                             G = between g_v at w + u(0) and g_v at w + u(g_B)
    path_simpson  K as path                             G = Simpson's mean of both ends and the middle
    second        K as secant, SGD only                 G = g_v + H_v (u(0) + u(g_B)) / 2, at w_t
    first         K as secant                           G = g_v(w_t); scored inline unless each validation sample
                                                        has a score of its own (`pairwise.py`)

The Shapley value that all of these approach, exact or sampled, and for any optimizer: `montecarlo.py`.

Path values are Aumann-Shapley values: every sample's gradient grows from 0 to full together, and each is paid what
its growth changed. With G exact along the path they add up to the loss change net of u(0), which belongs to nobody.
Where `path_secant` knows the loss at both ends, it takes the G between theirs by which they do: a mean value that
sees the bend of the loss along the step (Simpson's nearly) for the cost of the two ends. Where the loss bends more than
two ends can tell, it takes the gradient in the middle too.

`secant` has one end at w_t, as it needs no pass of its own: with momentum or weight decay, where u(0) is a move, it is
first order in that. Excluded parameters are at both ends what the step makes of them.

Source: second order, arXiv 2406.11011, theorem 4, which is that of plain SGD; the others are this library's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from . import directions, formulas, hessian
from .distributed import local
from .errors import InRunError
from .inline import Inline
from .keep import Budget, Keeper
from .method import Method, Options
from .pairwise import Pairs
from .path import Path
from .restoring import (
    in_modes,
    modes_of,
    random_kept,
    random_state,
    requiring,
    set_random_state,
    state_kept,
    state_of,
    undone,
)
from .tap import Layout, size_of, together
from .updates import ELEMENTWISE, counts_read, is_plain, require_known, require_no_closure, updates, weights_moved
from .validation import Gradients

if TYPE_CHECKING:
    from .tracker import Tracker

METHODS = ("second", "secant", "path", "path_secant", "path_simpson")
TWO_ENDS = ("secant", "path_secant", "path_simpson")
PAIRWISE = ("first", "secant", "path", "path_secant")

Weighted = tuple[float | dict[str, Tensor], dict[str, Gradients]]  # of each target, a gradient, and its weight in G


class _Again(NamedTuple):
    """How a batch is computed once more; and the random state, the modules' modes, what trained, and what puts back all
    else that the modules hold, as they were in its forward."""

    run: Callable[[], Tensor]
    random: Any
    modes: list[tuple[Any, bool]]
    trained: list[tuple[nn.Parameter, bool]]
    put_back: Callable[[], None]

    def backward(self) -> None:
        if not isinstance(loss := self.run(), Tensor):
            raise TypeError(f"recompute: expected a function that returns the batch's loss, got one that gave {loss!r}")
        loss.backward()


class Deferred(Method):
    """Keeps a step until its direction is known, then scores it.

    Args:
        tracker: whose step.
        name: one of `METHODS`; of `PAIRWISE`, where the tracker scores each validation sample.
        options: where activations wait, and the update.
    """

    def __init__(self, tracker: Tracker, name: str, options: Options) -> None:
        update, clip = options.update, options.clip
        pairwise = bool(tracker.samples)
        if pairwise and (name not in PAIRWISE or clip is not None):
            raise InRunError(
                f"pairwise: expected a method of {', '.join(PAIRWISE)} and no clip, whose values are sums over the "
                f"validation samples of products; got {name!r} and clip={clip}"
            )
        if tracker.in_batch and (not pairwise or name not in ("first", "path")):
            raise InRunError(
                "validation='batch': expected pairwise= and method 'first' or 'path', whose direction needs no "
                f"validation gradient beforehand; got method {name!r}{'' if pairwise else ' without pairwise'}"
            )
        by_callable = bool(tracker.validations.losses)
        if name in ("second", "path_simpson") and not by_callable:
            raise InRunError(f"method {name!r}: expected validation=<callable>, got validation blocks")
        if name in TWO_ENDS and tracker.validations.every != 1:
            raise ValueError(f"validate_every: expected 1 with method {name!r}, which takes a validation gradient at "
                             f"the end of each step, got {tracker.validations.every}")  # fmt: skip
        self.tracker, self.name, self.update = tracker, name, update
        self.true_ends = by_callable and name in ("path_secant", "path_simpson") and not pairwise
        self.starts_with_validation = not self.true_ends and not tracker.in_batch
        self.ends_with_validation = name in TWO_ENDS
        self.budget = Budget(options.keep, options.keep_bytes)
        self.keeper = Keeper(tracker.taps, self.budget, weights_move=name != "second")
        self.pairs = Pairs(tracker, self.budget) if pairwise else None
        self._path = Path(tracker, update, clip)
        self.drop: dict[str, Tensor] = {}  # target -> loss at w + u(0) less the loss at w + u(g_B)
        self._forget()

    def _forget(self) -> None:
        """Forget the last step, which an exception may have ended."""
        self.keeper.reset()
        self._path.release()
        if self.pairs is not None:
            self.pairs.start = {}
        self._again: list[_Again | None] = []  # of each batch, if it is computed again
        self._weights: list[tuple[Tensor, Tensor]] = []  # each, and what they were, if its loss will be computed again
        self._start: dict[str, Gradients] = {}
        self._parts: list[Weighted] = []
        self._bounds: dict[int, Any] = {}  # slot -> what Adam's direction is at most
        self._rest: dict[int, Tensor] = {}  # slot -> u(g_B) - u(0), where both ends' losses will be known
        self._along: list[dict[str, Gradients]] = []  # of true ends, at w + u(0) and for Simpson in the middle
        self._early: list[Tensor | None] | None = None
        self.updated = False

    def require_supported(self, optimizer: Optimizer) -> None:
        if self.name == "second" and type(optimizer) is not SGD:
            raise InRunError(f"method 'second': expected torch.optim.SGD, got {type(optimizer).__name__}; "
                             "path_secant is exact to higher order for any elementwise optimizer")  # fmt: skip
        if self.tracker.in_batch and self.name == "first" and not isinstance(optimizer, SGD):
            raise InRunError(f"validation='batch': expected torch.optim.SGD with method 'first', got "
                             f"{type(optimizer).__name__}, whose direction needs the validation gradient beforehand; "
                             "take method 'path', or validation blocks")  # fmt: skip
        if self.name in ("first", "secant"):
            directions.require_supported(optimizer)
        if self.name.startswith("path"):
            if formulas.of(optimizer) is None:
                require_known(optimizer, self.update, (*ELEMENTWISE, *formulas.KNOWN))
            require_no_closure(optimizer)

    def require_shards_do(self) -> None:
        """Raise `InRunError` where samples cannot be paired under `fully_shard`."""
        if self.pairs is not None:
            raise InRunError("pairwise: expected parameters that every process holds whole, as under DDP; got shards")
        self.keeper.weights_move = True  # also of "second": modules hold shards when they are scored

    def begin(self, scale: float | Tensor) -> None:
        self._forget()
        self._scale, self.drop = scale, {}
        if self.pairs is not None:
            self.pairs.start = dict(self.pairs.kept)
        if self.starts_with_validation:
            self._start = dict(self.tracker.validations.gradients)
        elif self.tracker.in_batch:
            self._start = {name: [None] * len(self.tracker.slots) for name in self.tracker.targets}

    def batch(self, layout: Layout, recompute: Callable[[], Tensor] | None) -> None:
        if recompute is not None and self.pairs is not None:
            raise InRunError("recompute: expected None with pairwise, whose scores need what the step keeps")
        if recompute is None:
            self._again.append(None)
            held = self.pairs.hold(self._scale) if self.pairs is not None and self.tracker.in_batch else None
            self.keeper.begin_batch(layout, held)
        else:
            model = self.tracker.model
            trained = [(p, p.requires_grad) for p in model.parameters()]
            put_back = state_of(model, tensors=False)
            self._again.append(_Again(recompute, random_state(), modes_of(model), trained, put_back))
            self.keeper.skip_batch(layout)

    def end(self, failed: bool = False) -> None:
        self.keeper.pause()
        if failed:  # what it kept is not to stand in the way of a smaller batch
            self.keeper.reset()
            if self.pairs is not None:
                self.pairs.start = {}

    def memory(self) -> dict[str, int]:
        """Bytes kept now and at most, and those of copied weights and what stands for the update."""
        copies = size_of([*(before for _, before in self._weights), *self._path.tensors(), *self._rest.values()])
        return {"kept": self.budget.bytes, "kept_peak": self.budget.peak, "weights": copies}

    def release(self) -> None:
        """Forget all that waits."""
        self._forget()
        if self.pairs is not None:
            self.pairs.kept = {}

    @torch.no_grad()
    def before_update(self, factor: Tensor, unscale: Any) -> Tensor:
        if self.tracker.ranks.sharded:
            self._require_alike()
        if self.tracker.check_due:
            self._check(factor, unscale)
        if self.true_ends and not bool(factor):
            return factor  # a fused optimizer will skip the update
        if self.name != "second" and any(self._again):
            # Excluded ones as well, and the optimizer's own.
            others = self.tracker.validations.outside
            moving = [local(p) for p in (*self.tracker.model.parameters(), *others) if p.grad is not None]
            self._weights = [(p, p.detach().clone()) for p in moving]
        if self.name == "second":
            self._write_second_order(unscale)
        elif self.name in ("first", "secant"):
            self._write_coefficients()
            self._parts = [(0.5 if self.name == "secant" else 1.0, self._start)]
        else:
            with counts_read(self.tracker.slots):
                moves = self._path.write(factor, unscale, self._scale, self._batches(), self.true_ends)
            if self.true_ends:
                self._rest = {i: rest for i, (_, rest) in moves.items()}
                if not (self.tracker.validations.excluded or self.tracker.validations.outside):
                    self._run_along(moves)  # else after the update: what becomes of others is known then
            else:
                self._parts = [(0.5 if self.name == "path_secant" else 1.0, self._start)]
        for slot in self.tracker.slots:  # one may be passed by in this step
            if slot.grad is None:
                slot.direction.zero_()
                if self.pairs is not None:
                    self.pairs.scalars.pop(id(slot), None)
        if self.name == "second":
            self._early = self._scored()
            self.keeper.reset()
        self.updated = True
        return factor

    def moves(self, unscale: Any, optimizers: Collection[Any]) -> Iterator[tuple[Any, Tensor]]:
        for slot in self.tracker.slots:
            if slot.optimizer in optimizers and (grad := slot.grad) is not None and is_plain(slot.shard):
                yield slot, updates([slot], [grad.double() * unscale], self.update)[0]

    def finish(self) -> list[Tensor | None]:
        """The dots of each batch, once everything the direction needs is there."""
        if not self.updated:
            layouts, device = self.keeper.layouts, self.tracker.device
            dots: list[Tensor | None] = [torch.zeros(x.count, *self.tracker.tail, device=device) for x in layouts]
        elif self._early is not None:
            dots = self._early
        elif self.pairs is not None:
            self._bound_coefficients()
            dots, surplus = self.pairs.dots(self.keeper, self.ends_with_validation, self._path.left)
            dots = self._path.shared(dots, surplus)
        else:
            if self.ends_with_validation:
                self._take_ends()
            self._multiply_in()
            dots = self._path.shared(self._scored())
        self._forget()
        return dots

    # ------------------------------------------------------------------ scoring

    def _scored(self) -> list[Tensor | None]:
        return [together(dots.values()) for dots in self._dots()]

    def _dots(self) -> list[Mapping[Any, Tensor | None]]:
        """Of each batch, the dots by tap; of one that is computed again as `Inline` has them."""
        kept = self.keeper.dots(self.tracker.many)
        batches = zip(kept, self._again, self.keeper.layouts, strict=True)
        seen: list[Mapping[str, Tensor]] = []  # of each batch that was computed again, some gradients
        found: list[Mapping[Any, Tensor | None]] = [
            dots if again is None else self._recomputed(again, layout, seen) for dots, again, layout in batches
        ]
        if seen and len(seen) == len(self._again):  # else the step's gradients are not of these alone
            self.tracker.require_same(seen)
        return found

    def _recomputed(self, again: _Again, layout: Layout, seen: list[Mapping[str, Tensor]]) -> dict[Any, Tensor | None]:
        """Score a batch by computing its loss and backward once more, with probes; `seen` takes some of its gradients,
        where no other process has a part in the step's."""
        inline = Inline(self.tracker)
        with self._computed_again(again, layout, inline.end):
            inline.batch(layout)
            again.backward()
            if self.tracker.ranks.alone:
                seen.append(self.tracker.seen())
        if self.tracker.first_check:
            self.tracker.note_unmet()
        return {key: probe.grad for key, probe in inline.probes[0].items()}

    def _batches(self) -> Iterator[tuple[Keeper, dict[int, int]]]:
        """Keepers of the batches' layers, and by their numbers there, those in the step; one to be computed again is
        kept when it comes."""
        yield self.keeper, {i: i for i, again in enumerate(self._again) if again is None}
        for i, again in enumerate(self._again):
            if again is None:
                continue
            keeper = Keeper(self.tracker.taps, self.budget, weights_move=self.tracker.ranks.sharded)
            try:
                with self._computed_again(again, self.keeper.layouts[i], keeper.pause):
                    keeper.begin_batch(self.keeper.layouts[i])
                    again.backward()
                yield keeper, {0: i}
            finally:
                keeper.reset()

    @contextlib.contextmanager
    def _computed_again(self, batch: _Again, layout: Layout, end: Callable[[], None]) -> Iterator[None]:
        """Compute a batch again with the weights, random numbers and modes that it had, until `end`; no gradient or
        buffer stays."""
        tracker = self.tracker
        after = [(p, p.detach().clone()) for p, _ in self._weights]
        params = [*(p for p, _ in batch.trained), *tracker.validations.outside]
        aside, unseen = tracker.ranks.aside(params), tracker.ranks.unseen(params)
        tracker.expect(layout)

        def put_back() -> None:
            end()
            tracker.expect(None)
            tracker.ranks.settle()
            for tensor, value in after:
                tensor.data.copy_(value)

        with undone(put_back):
            for shard, weight in self._weights:
                shard.data.copy_(weight)
            with (
                aside, torch.enable_grad(), random_kept(), state_kept(tracker.model), in_modes(batch.modes),
                requiring(batch.trained), unseen,
            ):  # fmt: skip
                set_random_state(batch.random)
                batch.put_back()
                yield

    def _require_alike(self) -> None:
        """Raise `InRunError` where one process computes other batches again than another, which would wait for it."""
        ranks, count = self.tracker.ranks, sum(again is not None for again in self._again)
        total, squares = ranks.sum(torch.tensor([count, count**2], device=self.tracker.device)).tolist()
        if total**2 != squares * ranks.size:
            raise InRunError(f"recompute: expected for as many batches in every process under fully_shard, got {count} "
                             f"here and {total - count} in {ranks.size - 1} others")  # fmt: skip

    def _check(self, factor: Tensor, unscale: Any) -> None:
        """Along the batch's own gradient, whose dots must add up to its square."""
        tracker = self.tracker
        for slot in tracker.slots:
            if slot.grad is None:
                slot.direction.zero_()
            else:
                slot.direction.copy_(slot.grad * unscale)  # every target's slice, by broadcasting
        along = [s.direction for s in tracker.slots]
        tracker.check(self._dots(), along, factor, unscale)

    # ------------------------------------------------------------------ directions

    def _write_coefficients(self) -> None:
        for i, slot in enumerate(self.tracker.slots):
            grads = [g for name in self.tracker.targets if (g := self._start[name][i]) is not None]
            like = grads or [torch.zeros_like(slot.shard)]
            for part in directions.parts(like[0]):
                factor = directions.coefficient(slot, like, part)
                for slice_ in slot.slices:
                    slice_[part] = factor
            if self.pairs is not None and (not isinstance(factor, Tensor) or factor.dim() == 0):
                self.pairs.scalars[id(slot)] = factor
            if self.name == "secant" and (bound := directions.largest(slot)) is not None:
                self._bounds[i] = bound

    def _take_ends(self) -> None:
        """The gradients along the step that were not known before its end, and what it took off the losses."""
        gradients = self.tracker.validations.gradients
        if not self.true_ends:
            self._parts.append((0.5, gradients))
            return
        along = self._along or [self._run_back(at) for at in self._points]
        for name, loss in self.tracker.validations.last_losses.items():
            self.drop[name] = self.drop[name] - loss
        if self.name == "path_simpson":
            self._parts = list(zip((1 / 6, 4 / 6, 1 / 6), (*along, gradients), strict=True))
        else:
            self._parts = self._mean_values(along[0], gradients)

    @property
    def _points(self) -> tuple[float, ...]:
        """How far along the step validation gradients are taken before its end."""
        return (0.0, 0.5) if self.name == "path_simpson" else (0.0,)

    def _run_along(self, moves: dict[int, tuple[Tensor, Tensor]]) -> None:
        """Validation gradients at w + u(0) and, for Simpson, in the middle; the weights are restored to the bit."""
        validations = self.tracker.validations
        moved = self.tracker.ranks.total((u0.any() for u0, _ in moves.values()), self.tracker.device)
        for at in self._points:
            still = at == 0.0 and not moved
            if still and all(validations.is_of_these_weights(name) for name in validations.losses):
                gradients = dict(validations.gradients)  # the last step's end is where this one starts
                self.drop = dict(validations.last_losses)
            else:
                gradients = self._moved_by(at, ((i, u0 + at * rest) for i, (u0, rest) in moves.items()))
            self._along.append(gradients)

    @torch.no_grad()
    def _run_back(self, at: float) -> dict[str, Gradients]:
        """Validation gradients `at` a part of the way from w + u(0) to where the weights are now, w + u(g_B)."""
        return self._moved_by(at, ((i, (at - 1) * rest) for i, rest in self._rest.items()))

    def _moved_by(self, at: float, along: Iterable[tuple[int, Tensor]]) -> dict[str, Gradients]:
        """Validation gradients where slots' weights are moved by so much, for as long as that takes: to `at` a part of
        the step, whose start's losses are those that its drop is from."""
        with weights_moved(self.tracker.slots, self.tracker.ranks, along, {}), torch.enable_grad():
            found = {name: self.tracker.validations.here(name) for name in self.tracker.targets}
        if at == 0.0:
            self.drop = {name: loss for name, (loss, _) in found.items()}
        return {name: g for name, (_, g) in found.items()}

    @torch.no_grad()
    def _multiply_in(self) -> None:
        """D = K * G, of every target."""
        slots = self.tracker.slots
        for m, name in enumerate(self.tracker.targets):
            parts = [(w[name] if isinstance(w, dict) else w, gradients[name]) for w, gradients in self._parts]
            mean = [_mean([(w, gradients[i]) for w, gradients in parts]) for i in range(len(slots))]
            self._path.multiply_in([slot.slices[m] for slot in slots], mean)
        for i, bound in self._bounds.items():
            slices = slots[i].slices
            _shorten(slices, slices, len(slices), bound)

    @torch.no_grad()
    def _bound_coefficients(self) -> None:
        """K itself, which all validation samples have, where K * G of their targets is too large."""
        end, targets = self.tracker.validations.gradients, self.tracker.targets
        for i, bound in self._bounds.items():
            k = self.tracker.slots[i].direction
            means = (_mean([(0.5, self._start[name][i]), (0.5, end[name][i])]) for name in targets)
            _shorten([k], (k * g for g in means if g is not None), len(targets), bound)

    def _mean_values(self, start: dict[str, Gradients], end: dict[str, Gradients]) -> list[Weighted]:
        """The gradients at both ends, and where the loss bends in the middle, with the weights that give the measured
        drop.

        Of the ends half each where the loss is quadratic along the step; else a third to two thirds. Where that is not
        enough, the middle's is a third to all of the mean, the ends in equal parts; Simpson's two thirds where that is
        not enough either (or the loss has noise, as of dropout). Where rounding hides the difference, the ends alone.
        """
        ranks, losses, slots = self.tracker.ranks, self.tracker.validations.last_losses, self.tracker.slots
        noise = {name: 16 * torch.finfo(loss.dtype).eps * loss.double() for name, loss in losses.items()}
        drop = {name: self.drop[name].double() for name in start}
        zero = torch.zeros((), dtype=torch.float64, device=self.tracker.device)

        def predicted(gradients: Gradients) -> Tensor:
            """The drop, were the gradient this one all along the step."""
            moves = ((g * rest, slots[i]) for i, rest in self._rest.items() if (g := gradients[i]) is not None)
            parts = [move.sum(dtype=zero.dtype).to(zero.device) * slot.share for move, slot in moves]
            return -ranks.over_shards(torch.stack([zero, *parts]).sum())

        def how_much(name: str, of: Tensor, more: Tensor) -> Tensor:
            """The x at which `of + x * more` is the drop; 0 where rounding hides it, or the loss is the same whatever
            its gradient says (as of a surrogate that is compared with itself)."""
            found = (drop[name] - of) * more / (more.square() + noise[name].square())
            untold = (more == 0) | (drop[name] == 0) & (of.abs() > noise[name])  # a loss of 0 has no noise
            return torch.where(untold, 0.0, found)

        means: dict[str, Tensor] = {}  # of what both ends predict
        tilts: dict[str, Tensor] = {}  # how much more than half the end counts, and the start less
        for name in start:
            a, b = predicted(start[name]), predicted(end[name])
            means[name] = (a + b) / 2
            tilts[name] = how_much(name, means[name], b - a)
        at, weights = (start, end), {name: [0.5 - x, 0.5 + x] for name, x in tilts.items()}
        bent = torch.stack([x.abs() > 1 / 6 for x in tilts.values()])
        if ranks.sum(bent.int()).any():
            middle = self._run_back(0.5)
            at = start, middle, end
            for (name, x), over in zip(tilts.items(), bent, strict=True):
                w = how_much(name, means[name], predicted(middle[name]) - means[name])
                w = torch.where(over, torch.where((w >= 1 / 3) & (w <= 1), w, 2 / 3), 0.0)
                x = torch.where(over, 0.0, x)
                weights[name] = [(1 - w) / 2 - x, w, (1 - w) / 2 + x]
        return [({name: w[k] for name, w in weights.items()}, g) for k, g in enumerate(at)]

    def _write_second_order(self, unscale: Any) -> None:
        tracker = self.tracker
        coefficients = []
        steps: list[Tensor] = []  # -(u(0) + u(g_B)), what H takes to the middle of the step
        for slot in tracker.slots:
            scalar = directions.sgd_coefficient(slot)
            grad = slot.grad
            coefficients.append(scalar)
            steps.append(torch.zeros_like(slot.shard) if grad is None else grad * unscale * scalar)
            if grad is not None and (slot.options["momentum"] or slot.options["weight_decay"]):
                (at_zero,) = updates([slot], [torch.zeros_like(slot.shard, dtype=torch.float64)])
                steps[-1].sub_(at_zero, alpha=2)
        for m, name in enumerate(tracker.targets):
            curved = hessian.product(tracker, name, steps)
            for i, slot in enumerate(tracker.slots):
                g = self._start[name][i]
                value = torch.zeros_like(slot.shard) if g is None else g
                if (bend := curved[i]) is not None:
                    value = value - bend / 2
                slot.slices[m].copy_(value).mul_(coefficients[i])  # a product in float16 would have no range


def _shorten(directions: Sequence[Tensor], moves: Iterable[Tensor], count: int, bound: Any) -> None:
    """Make directions shorter, coordinate by coordinate, by what the mean square of `count` moves is above the bound's:
    where the gradient was small at the start of the step, Adam's K is large."""
    size = torch.zeros_like(directions[0])
    for move in moves:
        size.addcmul_(move, move)
    size.div_(count).sqrt_()
    bound = bound * (1 + max(3e-5, 4 * torch.finfo(size.dtype).eps))  # and what rounding may have added
    shorter = torch.where(size > bound, bound / size, torch.ones_like(size))
    for direction in directions:
        direction.mul_(shorter)


def _mean(parts: list[tuple[float | Tensor, Tensor | None]]) -> Tensor | None:
    known = [(w.to(g) if isinstance(w, Tensor) else g.new_full((), w), g) for w, g in parts if g is not None]
    if not known:
        return None
    total = known[0][1] * known[0][0]
    for w, g in known[1:]:
        total.addcmul_(g, w)
    return total
