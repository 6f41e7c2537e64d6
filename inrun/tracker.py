"""`inrun.track`: the In-Run Data Shapley value of every training sample, at every step of the user's own loop.

    tracker = inrun.track(model, optimizer)
    for ids, x, y in loader:
        with tracker.validation():                        # the validation gradient g_v
            loss(model(x_val), y_val).backward()
        with tracker.step(ids) as step:                   # the training step, unchanged
            loss(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        step.values                                       # [B], nats; > 0 lowered the validation loss

A value is `<d, g_z>`: d the step's direction (`directions.py`), g_z the gradient of the sample's share of the loss
as it was reduced. The dots come out of the ordinary backward as the gradient of a probe (`functional.py`).
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import directions, distributed, rules, stand_ins, tensor_parallel
from .check import Agenda, efficiency
from .deferred import METHODS as DEFERRED
from .deferred import Deferred
from .distributed import Ranks
from .errors import InRunError, Pending, few
from .inline import Inline
from .ledger import Ledger
from .method import Method, Options
from .montecarlo import MonteCarlo
from .restoring import setting
from .rows import Rows
from .slots import Slot, places, require_all, sibling, trainable
from .step import Step
from .tap import Layout, Tap, leave_as_they_are, size_of
from .updates import (
    COMPARED,
    Expected,
    UpdateRule,
    as_optimizers,
    called_with,
    compare,
    expected,
    groups_of,
    is_plain,
    of_scaler,
    within_another,
)
from .validation import Validation, as_losses, as_samples, as_targets, columns_of
from .watch import Watch, skipped

METHODS = ("first", *DEFERRED, "monte_carlo")


def as_ledger(ledger: Ledger | str | Path | None) -> Ledger:
    """A ledger as it is, or this process's of a folder (None: in memory)."""
    found = ledger if isinstance(ledger, Ledger) else Ledger(ledger, rank=distributed.rank())
    found.writers = distributed.writers()
    return found


class Tracker:
    """A tracked model: what each training sample does to the validation loss, by `step`.

    Args:
        model: trained in place as before; its layers change class until `Tracker.close()`. DDP may wrap it before
            or after (before, if on another process group than the default one); `fully_shard` comes after,
            `parallelize_module` before.
        optimizer: over every tracked parameter; or several that together are, each stepping once in a step's block; or
            later, by `Tracker.bind`, as with `fully_shard`. "first" and "secant" know SGD, Adam and AdamW, "second"
            SGD, the path methods every optimizer that updates coordinate by coordinate, Muon and Adafactor (torch's and
            transformers'), and "monte_carlo" every one whose `step()` needs no closure.
        method: "first": the first-order value with the optimizer's state frozen, scored within the backward. Of Adam
            the validation gradient's square stands in for the batch's in the second moment, also for "secant": the
            validation loss has to be a mean, and several targets of one scale.
            The others are scored when their direction is known, from activations kept until then: "second",
            "secant", "path", "path_secant", "path_simpson" (see `inrun.deferred`). "monte_carlo": the Shapley value
            of the real step, which is taken for coalitions of the samples, with a validation loss for each: what the
            others can be held to (see `inrun.montecarlo`).
        validation: returns the validation loss (a scalar); or a dict of names and such callables. The tracker runs
            it when it is due, with the model as it then is: in training mode, unless it calls `model.eval()` itself
            (and `model.train()` after). Buffers and torch's random numbers are then as before it. Without it,
            validation losses are run in `Tracker.validation()` blocks.
            "batch", with `pairwise`: the validation samples are the last rows of every batch, after those that
            `step(ids)` names; the loop adds their loss to the batch's, and the parameters get no gradient from it.
        validate_every: a validation gradient serves this many steps; a callable runs at their multiples.
        targets: names of the validation losses, when they come from blocks.
        exclude: names of parameters, or shell patterns, that get no score. Recorded with the scores.
        through: names of parameters, or patterns -> the module ("" for the model) that scores them, slowly, by its
            outputs, which must be `[B, ...]`: for parameters that something inside it uses past their own module.
        ledger: where the values go: a `Ledger`, the folder of one, or None for one in memory. Of several processes
            each writes those of its own samples.
        check: on the first step, compare the sum of the scores with the parameters' gradients, and raise where they
            disagree; on some later ones for parameters that the first could not check. On the first of several samples
            also run the model a few times more, without gradients, to tell samples from equally many rows of something
            else, or in another order.
        keep: where a deferred method's activations wait: "device", or "host" for pinned host memory.
        keep_bytes: bytes that may wait; None for no limit.
        update: for path methods and an optimizer of another class: "elementwise" says that its step is (which is tried
            at the first); or its update as a function, `update(grad, param, state, group)`, of what the step adds to
            the parameter, which autograd must be able to differentiate where it is not elementwise. It is held to the
            optimizer's first two steps that move something (with `check`, of whole parameters), as is any other update
            of path methods and "monte_carlo". Of several optimizers a function is asked for the parameters of each,
            which `group` tells apart.
        clip: for path methods and "monte_carlo": the `max_norm` that the loop clips the gradient's norm to. Without it
            the clip coefficient is taken as constant.
        pairwise: ids of the validation samples (of each target, where there are several): one value for each of them,
            in place of one for their loss, as a target of its own in the ledger. Every forward of a validation loss
            must then see all of its samples, in this order. Both sides' activations are kept until the update.
        permutations: for "monte_carlo": random orders of the samples, an even number; a step of B samples then takes at
            most `permutations * (B - 1) + 2` validation losses, and all 2^B where those are no more. Errors fall with
            the root of it. For up to ten samples, losses after each single sample's step may be taken too, and
            differentiated as both ends' are (`inrun.quadratic`).

    Attributes:
        coverage: names of the parameters: `{"tracked": [...], "excluded": [...], "frozen": [...]}`.
        ledger: the `Ledger` that holds the values.
        columns: names of the values' last axis: the targets, or with `pairwise` the validation samples.
        tail: the values' shape after the sample: `()`, or `(number of columns,)`.
        many: number of targets, where directions have an axis for them; else None.
        optimizers: those that are bound.
        steps: number of the next step; set it when resuming a run.
        last_validation: target -> last loss of its validation callable (a detached scalar tensor).
        seconds: wall seconds spent so far in "validation", "direction" and "harvest" (no device synchronisation).

    Raises:
        InRunError: a parameter that cannot be scored or is not in the optimizer; an unknown optimizer.
        ValueError: an unknown method, a bad `validate_every` or `permutations`, empty or repeated targets or
            validation ids.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer | Iterable[Optimizer] | None = None,
        method: str = "first",
        *,
        validation: Callable[[], Tensor] | Mapping[str, Callable[[], Tensor]] | str | None = None,
        validate_every: int = 1,
        targets: Sequence[str] = ("validation",),
        exclude: Sequence[str] = (),
        through: Mapping[str, str] | None = None,
        ledger: Ledger | str | Path | None = None,
        check: bool = True,
        keep: str = "device",
        keep_bytes: int | None = None,
        update: UpdateRule | str | None = None,
        clip: float | None = None,
        pairwise: Sequence[Any] | Mapping[str, Sequence[Any]] | None = None,
        permutations: int = 8,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
        options, through = Options(keep, keep_bytes, update, clip), through or {}
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if not isinstance(validate_every, int) or validate_every < 1:
            raise ValueError(f"validate_every: expected an integer of at least 1, got {validate_every!r}")
        self.in_batch = isinstance(validation, str) and validation == "batch"
        losses = {} if self.in_batch else as_losses(validation)
        self.targets = as_targets(losses, targets)
        self.samples = as_samples(pairwise, self.targets)
        self.columns = columns_of(self.samples, self.targets)
        self.tail = (len(self.columns),) if self.samples or len(self.columns) > 1 else ()
        sampled = method == "monte_carlo"
        self.many = len(self.targets) if len(self.targets) > 1 and not self.samples and not sampled else None
        self.ranks = Ranks(model, alike=bool(self.samples))
        model = distributed.unwrapped(model)
        self.ranks.begin(model.named_parameters())
        if isinstance(ledger, Ledger) and ledger.path is not None and ledger.rank != distributed.rank():
            raise InRunError(f"ledger: expected Ledger(path, rank={distributed.rank()}), the number of this process, "
                             f"got rank={ledger.rank}")  # fmt: skip
        self.taps: list[Tap] = []
        self.slots: list[Slot] = []
        if any(isinstance(m, rules.Holder) for m in model.modules()):
            raise InRunError("model: is tracked already; close its tracker first")
        planned = rules.plan(model, exclude, through)
        if self.samples or sampled:
            _require_one_by_one(planned, "method 'monte_carlo'" if sampled else "pairwise")
        if self.in_batch:
            _require_rules(planned)
        self._pending = Pending()
        self.validations = Validation(
            model, self.slots, planned.excluded, losses, self.targets, validate_every, self.ranks, self._pending
        )
        self._frozen = method in ("first", "secant")  # whether the optimizer's state is taken as frozen
        self._given = callable(update) and not self._frozen  # whether a user's function has the optimizer's state
        inline = method == "first" and not self.samples and not self.in_batch
        self._method: Method
        if inline:
            self._method = Inline(self)
        elif sampled:
            self._method = MonteCarlo(self, options, permutations)
        else:
            self._method = Deferred(self, method, options)
        optimizers = as_optimizers(optimizer)
        if optimizers:
            self._stand_ins(optimizers)
            held, params = places(optimizers), dict(model.named_parameters())
            require_all([n for n in planned.tracked if id(params[n]) not in held])
        self.model = model
        self.coverage = {"tracked": planned.tracked, "excluded": planned.excluded, "frozen": planned.frozen}
        self.ledger = as_ledger(ledger)
        self.steps = 0
        self._checked = check
        self.check_due = check  # in this step, or the next one
        self.first_check = False  # whether this step's is the first
        self.agenda = Agenda()
        self._shared_due = check  # whether outputs that samples share are still watched: until a batch has several
        self._compares = sampled or method.startswith("path")  # whether an update is taken for what it is
        self._to_compare: dict[Any, int] = {}  # optimizer -> its steps that this is still to be held to
        self._expected: list[Expected] = []  # of the step
        self._largest = 0  # rows of this step's largest batch
        self._unscored: dict[int, nn.Parameter] = {}  # excluded ones that train, by `id`
        self._watch = Watch(self.ranks, self._pending, scored=inline)
        self._rows = Rows(model, through, not (self.samples or sampled), self.paused, self.ranks)
        self._install(planned)
        self._step: Step | None = None
        self._waiting: Step | None = None  # a step that ended and whose values still wait for a validation gradient
        self._seconds = {"direction": 0.0, "harvest": 0.0}
        self._closed = False
        self.optimizers: tuple[Optimizer, ...] = ()
        self.updates: tuple[Optimizer, ...] = ()  # what stands for them
        self._handles: list[Any] = []
        try:
            if optimizers:
                self.bind(optimizers)
            self._say_of_other_values(method)
        except BaseException:  # bad input, or a warning that is made one: the model is as before
            self._let_go()
            raise
        self.ledger.metadata.update(
            sign="value > 0: the sample lowered the validation loss (the paper's phi is -value)",
            unit="nats of validation loss",
            method=method,
            targets=list(self.columns),
            tracked_parameters=len(planned.tracked),
            excluded_parameters=planned.excluded,
        )

    def _say_of_other_values(self, method: str) -> None:
        """Warn where the ledger has values of another kind."""
        before, now = [self.ledger.metadata.get(name) for name in ("method", "targets")], [method, list(self.columns)]
        if self.ledger.last_step is not None and before[0] is not None and before != now:
            before, now = (f"{of} ({few(names or [], 20)})" for of, names in (before, now))
            warnings.warn(f"ledger: its steps so far have values of method and targets {before}, those to come of "
                          f"{now}; sums will add them up", stacklevel=3)  # fmt: skip

    def _install(self, plan: rules.Plan) -> None:
        for tap in plan.taps if self.ranks.parts is not None else ():
            tensor_parallel.prepare(tap, self.ranks.holders)
        params = dict(self.model.named_parameters())
        siblings = {name: sibling(params[name], self.many) for name in plan.tracked}
        slots: dict[str, Slot] = {}
        for tap in plan.taps:
            rules.install(tap, siblings)
            tap.pending = self._pending
            tap.rows = self._rows
            self.taps.append(tap)
            for (owner, local), full in zip(tap.owned, tap.parameters, strict=True):
                slots.setdefault(full, Slot(full, owner, local, [])).taps.append(tap)
        self.slots.extend(slots.values())
        self._of_heads = rules.call_heads(self.model)
        self._unpacked = rules.leave_unpacked(self.model)

    @property
    def device(self) -> torch.device:
        """Where the values are: with the first tracked parameter."""
        return self.slots[0].param.device

    @property
    def last_validation(self) -> dict[str, Tensor]:
        return self.validations.last_losses

    @property
    def memory(self) -> dict[str, int]:
        """Bytes that the tracker holds now, beside the model's and the optimizer's own.

        "directions" and "validation" (gradients of the validation losses); and of deferred methods "kept", the
        activations and output gradients that wait (in host memory with `keep="host"`, bounded by `keep_bytes`),
        "kept_peak", the most there ever were, and "weights", copies for a batch that is computed again, or while
        "monte_carlo" goes through coalitions, beside the gradients of a "coalition" and of samples.
        """
        gradients = [g for each in self.validations.gradients.values() for g in each]
        return {
            "directions": size_of(slot.direction for slot in self.slots),
            "validation": size_of(gradients),
            **self._method.memory(),
        }

    @property
    def seconds(self) -> dict[str, float]:
        return {"validation": self.validations.seconds, **self._seconds}

    def bind(self, optimizer: Optimizer | Iterable[Optimizer]) -> None:
        """Use this optimizer, or these together: for those that are made after `track`, as sharding needs.

        Raises:
            InRunError: it is of an unknown class, lacks a tracked parameter, or another one is bound; parameters are
                spread over processes by other means than DDP or `fully_shard`, or the method cannot do with shards.
        """
        if self.optimizers:
            raise InRunError("optimizer: one is bound already; close the tracker and track again")
        optimizers = as_optimizers(optimizer)
        updates = self._stand_ins(optimizers)
        self.ranks.bind(self.slots)
        if self.ranks.sharded:
            self._method.require_shards_do()
        siblings = {id(s.sibling) for s in self.slots}
        for group in groups_of(optimizers):
            group["params"] = [p for p in group["params"] if id(p) not in siblings]
        self.updates = updates
        where = places(updates)
        require_all([s.name for s in self.slots if id(s.param) not in where])
        for slot in self.slots:
            slot.optimizer, slot.group = where[id(slot.param)]
        if self._frozen:
            directions.warn_of_own_step(self.updates)
        self.optimizers = optimizers
        self._come_last()
        leave_as_they_are(Tracker._before_update, Tracker._after_update)
        if not self.ranks.fully_sharded():
            rules.set_apart(self.model)
        self._watch.watch(self.slots)
        if outside := self._note_outside(trainable(self.model)[0]):
            warnings.warn(
                f"optimizer: has {len(outside)} parameters that the model has not, of shapes "
                f"{few([tuple(p.shape) for p in outside])}: they train as ever, and have no score. To score them, hold "
                "them in one module with the model and track that", stacklevel=3)  # fmt: skip

    def _come_last(self) -> None:
        """Be told of an update after the loop's own hooks on it, which may change gradients, rates and weights."""
        for handle in self._handles:
            handle.remove()
        self._handles = [each.register_step_pre_hook(self._before_update) for each in self.optimizers]
        self._handles += [each.register_step_post_hook(self._after_update) for each in self.optimizers]

    def _note_outside(self, training: Mapping[int, nn.Parameter]) -> list[nn.Parameter]:
        """Parameters of the optimizers that are not the model's, to which a validation loss may have gradients too."""
        params = (p for group in groups_of(self.optimizers) for p in group["params"])
        found = [p for p in params if p.requires_grad and id(p) not in training]
        self.validations.outside = found
        return found

    def _stand_ins(self, optimizers: Sequence[Optimizer]) -> tuple[Optimizer, ...]:
        """What stands for them, of which the method must know what they do."""
        found = tuple(stand_ins.of(optimizer, self._given) for optimizer in optimizers)
        for optimizer in found:
            if type(optimizer).__name__ == "ZeroRedundancyOptimizer":
                raise InRunError(
                    "optimizer: expected one that holds the state of all its process's parameters, got "
                    "ZeroRedundancyOptimizer, which spreads it over the processes; take fully_shard in its place"
                )
            self._method.require_supported(optimizer)
        return found

    @contextmanager
    def validation(self, target: str | None = None, *, scale: float | Tensor = 1.0) -> Iterator[None]:
        """Take the gradients of the block's backward passes as the validation gradient of `target`.

        Gradients that stood before the block stand after it again. Of several processes the mean is taken, whether
        the model is called through DDP or not.

        Args:
            target: one of the tracker's targets; may be left out when there is only one.
            scale: what the loss was multiplied by, divided out of the gradient. A number of your own, such as 1024, is
                better than a GradScaler's, which grows until it overflows: here that is an error, not a step skipped.

        Raises:
            InRunError: inside a step; no backward reached a tracked parameter; a gradient is not finite (on a GPU that
                is found out later, by a step or validation to come or by close(): nothing waits for it).
            ValueError: an unknown target.
        """
        self._require_open()
        if self._step is not None:
            raise InRunError("validation: expected outside of a step block, got inside one")
        if self.in_batch:
            raise InRunError("validation: expected in the batches, as validation='batch' says; got a block")
        with self.validations.block(target, scale):
            yield
        if self._waiting is not None and self._waiting.number >= self.steps:
            self._waiting = None  # the loop has gone back to a checkpoint before it
        if self._waiting is not None and all(age == 0 for age in self.validations.age.values()):
            self._record(self._waiting)

    def step(
        self,
        ids: Any = None,
        *,
        segments: Any = None,
        tokens: int | None = None,
        recompute: Callable[[], Tensor] | None = None,
        scale: float | Tensor = 1.0,
    ) -> Step:
        """A block that holds one training step, from its forward to `optimizer.step()`.

        Args:
            ids: one id per sample of the batch, integers or strings, in batch order. Left out under gradient
                accumulation, where `Step.batch(ids)` comes before each forward. `[]` in one of several processes that
                has no samples left, and only takes part.
            segments, tokens: one value for each document of packed rows, or for each token; see `Step.batch`.
            recompute: for deferred methods: returns the batch's loss once more, exactly as the block computes
                it (times a loss scaler's factor as it was then: `scaler.update()` comes before the callable does), so
                that nothing need be kept. Path methods call it twice, and keep that batch for as long, in
                steps whose gradient was clipped or whose update turns at once (see `inrun.turning`).
            scale: for path methods and "monte_carlo" with `clip`, and for validation="batch": what the loss is
                multiplied by (a loss scaler's factor).

        Raises:
            InRunError: no optimizer is bound; inside another step; the validation gradient is missing or too old.
        """
        self._require_open()
        if not self.optimizers:
            raise InRunError("step: expected an optimizer, none is bound; call tracker.bind(optimizer)")
        return Step(self, ids, recompute, scale, segments, tokens)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the tracked layers plainly inside the block: evaluation or sampling in the middle of a step. (Under
        `torch.no_grad()` they do so by themselves, but for those of a compiled graph.)"""
        with ExitStack() as stack:
            stack.enter_context(setting("active", [(self._watch, False)]))
            for what in ("probe", "layout", "keep"):
                stack.enter_context(setting(what, ((tap, None) for tap in self.taps)))
            yield

    def close(self) -> None:
        """Give the model its own classes back, drop directions and hooks, and flush the ledger.

        After `fully_shard` its modules stay as they are, since the directions are a part of the shards.
        """
        if self._closed:
            self.ledger.flush()  # of which the first call may have failed, as on a full disk
            return
        if self._step is not None:
            raise InRunError("close: expected outside of a step block, got inside one")
        self._closed = True
        if self._waiting is not None:
            warnings.warn(
                f"step {self._waiting.number} has no values: method {self.ledger.metadata['method']!r} needs one more "
                "validation block before close()",
                stacklevel=2,
            )
        self._let_go()
        self._method.release()
        self.validations.gradients.clear()
        self.slots.clear()
        try:
            self._pending.answer(wait=True)
        except InRunError:
            with suppress(Exception):  # values that are no numbers for the same reason
                self.ledger.flush()
            raise
        self.ledger.flush()

    def _let_go(self) -> None:
        """Give the model its own classes back, without directions and hooks."""
        for handle in (*self._handles, *self._of_heads):
            handle.remove()
        for module in self._unpacked:
            setattr(module, rules.PACKS, True)
        self._watch.close()
        for module in [] if self.ranks.fully_sharded() else self.model.modules():
            if isinstance(module, rules.Holder):
                rules.remove(module)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise InRunError("tracker: is closed")

    # What a Step asks of its tracker.

    def begin(self, step: Step) -> None:
        if self._step is not None:
            raise InRunError("step: expected outside of a step block, got inside one")
        self._pending.answer()
        self.ranks.require_all()
        if self.in_batch and self.ranks.size > 1:
            raise InRunError(f"validation='batch': expected one process, got {self.ranks.size}; use validation blocks")
        self.ranks.settle()
        training, modules = trainable(self.model)
        self._find_places(training, modules)
        self._note_outside(training)
        self._come_last()
        self._require_no_others(training)
        if self._method.starts_with_validation:
            self.validations.run_due(self.steps)
            self.validations.require_fresh()
        self._largest = 0
        self.check_due = self.check_due or (
            self._checked and (self.steps >= self.agenda.due or (self.ranks.alone and self._has_company))
        )
        self.first_check = self.check_due and not self.agenda.made
        self._step = step
        try:
            with self._timed("direction"):
                self._method.begin(step.scale)
            self._watch.begin()
            self._rows.forget()  # what was computed again since the last step's end
            eager = (self.check_due or self._shared_due) and _runs_eagerly(self.model)
            self._rows.watched, self._rows.compared = eager and self._shared_due, eager and self.check_due
            for tap in self.taps:
                tap.passed_by = tap.met = False
        except BaseException:  # the directions may have taken the place of some validation gradients
            self.end(step, failed=True)
            raise

    def _require_no_others(self, training: Mapping[int, nn.Parameter]) -> None:
        """Raise `InRunError` where a parameter trains that did not when they were tracked: it would have no score."""
        known = {id(slot.param) for slot in self.slots}
        if training.keys() <= known | self._unscored.keys():
            return
        known.update(id(slot.sibling) for slot in self.slots)  # which shards hold among the parameters
        unknown = {i: p for i, p in training.items() if i not in known}
        excluded = set(self.coverage["excluded"])
        others = [n for n, p in self.model.named_parameters() if id(p) in unknown and n not in excluded]
        if others:
            raise InRunError(
                f"model: expected the parameters that were trainable when they were tracked, got {len(others)} more, "
                f"which would have no score: {few(others)}. Close the tracker and track again, or freeze them"
            )
        self._unscored = unknown

    def _find_places(self, training: Mapping[int, nn.Parameter], modules: set[nn.Module]) -> None:
        """Look up again which group of which optimizer each parameter is in: the loop may have changed that, or the
        model, whose parameters that train and modules are given."""
        where, gone = places(self.updates), []
        for slot in self.slots:
            param = slot.owner._parameters.get(slot.local)
            if id(param) in where and slot.owner in modules:
                slot.optimizer, slot.group = where[id(param)]
            elif param is None or param.requires_grad or slot.group >= len(slot.optimizer.param_groups):
                gone.append(slot.name)
        if gone:
            if any(slot.owner not in modules for slot in self.slots):
                self._require_no_others(training)  # those of a layer in the place of one
            raise InRunError(
                f"optimizer: expected every parameter that was tracked in its groups, and in the model where it was, "
                f"{len(gone)} are not any more: {few(gone)}. One that is to stay as it is keeps its place and has "
                "requires_grad_(False); where the model has others in their place (load_state_dict(assign=True), a "
                "parametrization, a layer that was exchanged), close the tracker and track again"
            )

    def batch(self, step: Step, layout: Layout, recompute: Callable[[], Tensor] | None) -> None:
        if self._step is not step:
            raise InRunError("batch: expected inside the step block, got outside of it")
        if self.first_check and step.ids:
            self.note_unmet()
        self._largest = max(self._largest, layout.rows)
        self.expect(layout)
        self._method.batch(layout.on(self.device), recompute)  # once for all layers

    def expect(self, layout: Layout | None) -> None:
        """A forward of a batch that lies so will come; None: none will."""
        if layout is None or self.ranks.sharded:
            self._rows.begin(0)
        else:
            beside = sum(map(len, self.samples.values())) if self.in_batch else 0
            self._rows.begin(layout.rows + beside, flat=layout.segments is None)

    def note_unmet(self) -> None:
        """Note the modules to which none of a batch's forwards came, as where layers are dropped."""
        for tap in self.taps if any(tap.met for tap in self.taps) else ():
            tap.passed_by |= not tap.met
            tap.met = False

    def _before_update(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict) -> tuple[tuple, dict] | None:
        """The optimizer's step begins; with a closure, its update only after that."""
        first = args[1] if len(args) > 1 else None  # args[0] is the optimizer
        closure = kwargs.get("closure", first)
        others = {k: v for k, v in kwargs.items() if k != "closure"}
        if self._step is None or not callable(closure):
            return self._update_begins(optimizer, args[1:], others)

        def closed() -> Any:
            loss = closure()
            self._update_begins(optimizer, (None, *args[2:]) if args[1:] else (), others)
            return loss

        if closure is first:
            return (optimizer, closed, *args[2:]), kwargs
        return args, {**kwargs, "closure": closed}

    def _update_begins(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Its step has these arguments, without a closure."""
        step = self._step
        if step is None:
            return
        real, optimizer = optimizer, self.updates[self.optimizers.index(optimizer)]
        if any(optimizer is other for other in self._watch.begun):
            if within_another(real):
                return
            raise InRunError("step: expected one optimizer.step() in the block, got a second one")
        if step.factor is not None:  # another optimizer's step, whose gradients and state were taken before the first
            self._watch.require_in_time()
            assert step.uneven is not None
            step.uneven = step.uneven | self._watch.uneven(optimizer)
            step.factor = skipped(optimizer, step.factor)
            step.lost = None if step.lost is None else skipped(optimizer, step.lost)
            self._watch.updated(optimizer)
            return
        step.require_ids()
        self.ranks.settle()
        factor, step.uneven = self._watch.factor(optimizer)
        if len(self.optimizers) > 1:  # of which a loss scaler skips those that overflow: the step has no values
            step.lost = ~factor.isfinite()
            factor = torch.where(step.lost, torch.zeros_like(factor), factor)
        scale = of_scaler(optimizer, "grad_scale")  # of a fused optimizer, which divides it out itself
        unscale = 1.0 if scale is None else 1.0 / scale
        put_off = self.check_due and not bool(factor)  # an update that will be skipped tells nothing
        if put_off:
            self.check_due = self.first_check = False
        if self.check_due:
            params = (p for group in groups_of(self.optimizers) for p in group["params"])
            self._require_no_others({id(p): p for p in params if p.grad is not None})
            self.note_unmet()
        if self.first_check and self._compares and not self.ranks.sharded:
            self._to_compare = {s.optimizer: COMPARED for s in self.slots if is_plain(s.shard)}
        with self.paused(), called_with(optimizer, args, kwargs):  # what runs here is no batch
            self._rows.verify()
            found = self._method.before_update(factor, unscale)
            self._rows.verify()  # what was computed again
            step.factor = found
            due = [each for each, left in self._to_compare.items() if left > 0]
            if due and bool(factor):
                self._expected = expected(self._method.moves(unscale, due))
        if self.first_check and self._frozen and self.validations.norms:
            grads = [g if s.share == 1.0 else g * s.share**0.5 for s in self.slots if (g := s.grad) is not None]
            directions.warn_of_sizes(self.updates, self.validations.norms, self.ranks.norm(grads) * unscale)
        self._watch.updated(optimizer)
        self.check_due, self.first_check = put_off, False
        self._shared_due = self._shared_due and self._largest < 2

    def _after_update(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """The optimizer's step has been taken: was it what the method took it for?"""
        if not self._expected or within_another(optimizer):
            return
        optimizer = self.updates[self.optimizers.index(optimizer)]
        ours = [each for each in self._expected if each[0].optimizer is optimizer]
        self._expected = [each for each in self._expected if each[0].optimizer is not optimizer]
        if ours:
            self._to_compare[optimizer] -= compare(ours, self._method.update)

    def seen(self) -> dict[str, Tensor]:
        """What now stands in some parameters' gradients, by name."""
        return self._watch.seen()

    def require_same(self, again: Sequence[Mapping[str, Tensor]]) -> None:
        """Of a step whose batches were all computed again, each with these gradients: their sums must be the step's."""
        self._watch.require_same(again)

    def lost(self) -> list[str]:
        """Parameters whose gradient of this step's backward is gone before the update."""
        return self._watch.lost()

    def check(
        self, dots: Sequence[Mapping[Any, Tensor | None]], along: list[Tensor], factor: Any, unscale: Any
    ) -> None:
        """The check of `check.efficiency`, which says when the next one is due."""
        certain = efficiency(self.slots, dots, along, factor, unscale, self.ranks, self.first_check)
        self.agenda.made_at(self.steps, certain, [s.name for s in self.slots if s.param.requires_grad])
        if not self.ranks.alone:  # all of them check, or none
            company = torch.tensor(float(self._has_company), device=self.device)
            self.agenda.due = self.steps + 1 if self.ranks.over_parts(self.ranks.sum(company)) else self.agenda.due

    @property
    def _has_company(self) -> bool:
        """Whether others have hooks on gradients too. A mask, which they make of the validation gradient too, leaves
        values right; of what else they may do, only a check of the step can tell."""
        ours = self._watch.hooks
        hooks = (on for s in self.slots for on in (s.param._backward_hooks, s.param._post_accumulate_grad_hooks) if on)
        return any(not on.keys() <= ours for on in hooks)

    def end(self, step: Step, error: BaseException | None = None, failed: bool = False) -> None:
        """The block is over, whatever ended it; a validation gradient has served it even if an exception did."""
        try:
            if isinstance(error, Exception) and step.factor is None and self.ranks.alone:  # no update has begun
                self._rows.explain(error)
        finally:
            if failed and step.factor is not None:
                self.steps = step.number + 1  # its update has begun: a step without values
            self._step = None
            self._expected = []
            self._watch.active = False
            self.expect(None)
            self._rows.forget()
            self._method.end(failed)
            if not failed or step.factor is not None or self.validations.every == 1:  # else it is as if it had not been
                self.validations.count_step()

    def finish(self, step: Step) -> None:
        """Record and count a step that has ended; its values may wait for their last validation gradient."""
        self.steps = step.number + 1  # whatever becomes of its values: a full disk, say
        self._watch.require_in_time()
        if step.factor is not None and (missing := len(self.optimizers) - len(self._watch.begun)):
            warnings.warn(f"step {step.number}: optimizer.step() did not run in the step block for {missing} of "
                          f"{len(self.optimizers)} optimizers; its values are zero", stacklevel=4)  # fmt: skip
            step.factor = torch.zeros_like(step.factor)
        elif step.lost is not None:
            self._pending.ask(step.lost, lambda: InRunError(
                f"step {step.number}: expected finite gradients, or a loss scaler that skips an optimizer for them; "
                "got NaN or infinity, and all optimizers ran"
            ))  # fmt: skip
        one_more = self._method.ends_with_validation and step.factor is not None
        for name in self.validations.losses if one_more else ():
            self.validations.run(name)
        if one_more and not self.validations.losses:
            self._waiting = step
        else:
            self._record(step)

    def _record(self, step: Step) -> None:
        self._waiting = None
        with self._timed("harvest"):
            self.ranks.settle()
            values = self.ranks.over_parts(step.scaled(self._method.finish()))
            if step.uneven is not None:
                self._watch.require_even(step.number, step.uneven)
            if self.validations.excluded_share is not None:
                self.ledger.metadata["excluded_share"] = self.validations.excluded_share
            step.settle(values, self._method.drop, self._method.standard_error)
            mine = len(step.ids) if self.ranks.writes or self.ledger.path is None else 0
            self.ledger.append(step.number, step.ids[:mine], values[:mine], self.columns, per_token=step.per_token)

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self._seconds[name] += time.perf_counter() - start


track = Tracker


def _runs_eagerly(model: nn.Module) -> bool:
    """Whether nothing inside is compiled, which takes plain tensors alone; or runs as it is all the same, by
    `torch.compiler.set_stance`."""
    compiled = any(
        module._compiled_call_impl is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
    return not compiled or torch._dynamo.eval_frame._stance.stance == "force_eager"


def _require_one_by_one(plan: rules.Plan, what: str) -> None:
    """Raise `InRunError` unless one sample's gradient can be had of each layer alone."""
    others = [full for tap in plan.taps if not tap.by_row for full in tap.parameters]
    if others:
        raise InRunError(
            f"{what}: expected layers that compute each row of a batch by itself, with the sample axis in front; got "
            f"{few(others)}. Exclude them, or "
            f"{'give every validation sample a target of its own' if what == 'pairwise' else 'take another method'}"
        )


def _require_rules(plan: rules.Plan) -> None:
    """Raise `InRunError` unless the validation rows of a batch can be kept from every trainable parameter."""
    others = [full for tap in plan.taps if tap.forward_mode for full in tap.parameters]
    if others or plan.excluded:
        raise InRunError(
            "validation='batch': expected every trainable parameter in a layer with a rule of its own, so that the "
            f"validation rows do not train it; {few(others + plan.excluded)} "
            "is not, or is excluded. Use validation blocks"
        )
