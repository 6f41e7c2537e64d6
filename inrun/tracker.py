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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from . import check, directions, rules
from .errors import InRunError
from .factor import Watch
from .ledger import Ledger
from .step import Step

METHODS = ("first",)


@dataclass
class _Slot:
    """One distinct tracked parameter; looked up by owner and name, since sharding replaces the tensors."""

    name: str
    owner: nn.Module
    local: str
    taps: list[rules.Tap]
    group: int = -1

    @property
    def param(self) -> nn.Parameter:
        return self.owner._parameters[self.local]  # pyright: ignore[reportReturnType]

    @property
    def direction(self) -> nn.Parameter:
        return self.owner._parameters[self.local + rules.SUFFIX]  # pyright: ignore[reportReturnType]


def track(
    model: nn.Module,
    optimizer: Optimizer | None = None,
    method: str = "first",
    *,
    validation: Callable[[], Tensor] | Mapping[str, Callable[[], Tensor]] | None = None,
    validate_every: int = 1,
    targets: Sequence[str] = ("validation",),
    exclude: Sequence[str] = (),
    ledger: Ledger | str | Path | None = None,
    check: bool = True,
) -> Tracker:
    """Track what each training sample does to the validation loss.

    Args:
        model: trained in place as before; its layers change class until `Tracker.close()`.
        optimizer: SGD, Adam or AdamW over every tracked parameter; or later, by `Tracker.bind`.
        method: "first", the first-order value with the optimizer's state frozen.
        validation: returns the validation loss (a scalar); or a dict of names and such callables. The tracker runs
            it when it is due. Without it, validation losses are run in `Tracker.validation()` blocks.
        validate_every: a validation gradient serves this many steps.
        targets: names of the validation losses, when they come from blocks.
        exclude: names of parameters, or shell patterns, that get no score. Recorded with the scores.
        ledger: where the values go: a `Ledger`, the folder of one, or None for one in memory.
        check: on the first step, compare the sum of the scores with the parameters' gradients, and raise where
            they disagree.

    Returns:
        The `Tracker`.

    Raises:
        InRunError: a parameter that cannot be scored or is not in the optimizer; an unknown optimizer.
        ValueError: an unknown method, a bad `validate_every`, empty or repeated targets.
    """
    return Tracker(model, optimizer, method, validation, validate_every, targets, exclude, ledger, check)


class Tracker:
    """A tracked model; made by `track`, which describes the arguments.

    Attributes:
        coverage: names of the parameters: `{"tracked": [...], "excluded": [...], "frozen": [...]}`.
        ledger: the `Ledger` that holds the values.
        steps: number of the next step; set it when resuming a run.
        last_validation: target -> last loss of its validation callable (a detached scalar tensor).
        seconds: wall seconds spent so far in "validation", "direction" and "harvest" (no device synchronisation).
    """

    def __init__(self, model, optimizer, method, validation, validate_every, targets, exclude, ledger, checked):
        if method not in METHODS:
            raise ValueError(f"method: expected one of {', '.join(METHODS)}, got {method!r}")
        if not isinstance(validate_every, int) or validate_every < 1:
            raise ValueError(f"validate_every: expected an integer of at least 1, got {validate_every!r}")
        self._losses = _losses(validation)
        self.targets = tuple(self._losses) if self._losses else tuple(targets)
        if not self.targets or len(set(self.targets)) < len(self.targets) or isinstance(targets, str):
            raise ValueError(f"targets: expected a sequence of distinct names, got {targets!r}")
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise InRunError(f"track: expected one process, got a group of {dist.get_world_size()}")
        if any(isinstance(m, rules.Holder) for m in model.modules()):
            raise InRunError("model: is tracked already; close its tracker first")
        plan = rules.plan(model, exclude)
        if optimizer is not None:
            directions.require_supported(optimizer)
        self.model = model
        self.method = method
        self.coverage = {"tracked": plan.tracked, "excluded": plan.excluded, "frozen": plan.frozen}
        self.ledger = ledger if isinstance(ledger, Ledger) else Ledger(ledger)
        self.steps = 0
        self.last_validation: dict[str, Tensor] = {}
        self.seconds = dict.fromkeys(("validation", "direction", "harvest"), 0.0)
        self._every = validate_every
        self._age: dict[str, int | None] = dict.fromkeys(self.targets)
        self._val_grads: dict[str, list[Tensor | None]] = {}
        self._check_due = checked
        self._step: Step | None = None
        self._closed = False
        self._optimizer: Optimizer | None = None
        if optimizer is not None:
            held = {id(p) for group in optimizer.param_groups for p in group["params"]}
            params = dict(model.named_parameters())
            _require_all([n for n in plan.tracked if id(params[n]) not in held])
        self._install(plan)
        if optimizer is not None:
            self.bind(optimizer)
        self.ledger.metadata.update(
            sign="value > 0: the sample lowered the validation loss (the paper's phi is -value)",
            unit="nats of validation loss",
            method=method,
            targets=list(self.targets),
            tracked_parameters=len(plan.tracked),
            excluded_parameters=plan.excluded,
        )

    def _install(self, plan: rules.Plan) -> None:
        params = dict(self.model.named_parameters())
        many = len(self.targets) if len(self.targets) > 1 else None
        siblings = {name: _sibling(params[name], many) for name in plan.tracked}
        self._taps: list[rules.Tap] = []
        slots: dict[str, _Slot] = {}
        for site in plan.sites:
            tap = rules.install(site, siblings)
            self._taps.append(tap)
            for owner, local, full in site.owned:
                slots.setdefault(full, _Slot(full, owner, local, [])).taps.append(tap)
        self._slots = list(slots.values())
        self._excluded = set(plan.excluded)

    def bind(self, optimizer: Optimizer) -> None:
        """Use this optimizer: for one that is made after `track`, as sharding needs.

        Raises:
            InRunError: it is of an unknown class, lacks a tracked parameter, or another one is bound.
        """
        if self._optimizer is not None:
            raise InRunError("optimizer: one is bound already; close the tracker and track again")
        directions.require_supported(optimizer)
        siblings = {id(s.direction) for s in self._slots}
        for group in optimizer.param_groups:
            group["params"] = [p for p in group["params"] if id(p) not in siblings]
        where = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        missing = [s.name for s in self._slots if id(s.param) not in where]
        _require_all(missing)
        for slot in self._slots:
            slot.group = where[id(slot.param)]
        self._optimizer = optimizer
        self._handle = optimizer.register_step_pre_hook(self._before_update)
        self._watch = Watch(self._slots, len(optimizer.param_groups))

    @contextmanager
    def validation(self, target: str | None = None, *, scale: float | Tensor = 1.0) -> Iterator[None]:
        """Take the gradients of the block's backward passes as the validation gradient of `target`.

        Gradients that stood before the block stand after it again.

        Args:
            target: one of the tracker's targets; may be left out when there is only one.
            scale: what the loss was multiplied by (a loss scaler's factor), divided out of the gradient.

        Raises:
            InRunError: inside a step; no backward reached a tracked parameter; a gradient is not finite.
            ValueError: an unknown target.
        """
        self._require_open()
        if self._step is not None:
            raise InRunError("validation: expected outside of a step block, got inside one")
        name = self.targets[0] if target is None and len(self.targets) == 1 else target
        if name not in self.targets:
            raise ValueError(f"target: expected one of {', '.join(self.targets)}, got {target!r}")
        start = time.perf_counter()
        params = [p for p in self.model.parameters() if p.requires_grad]
        before = [p.grad for p in params]
        for p in params:
            p.grad = None
        try:
            yield
            found = [s.param.grad for s in self._slots]
            excluded = [p.grad for n, p in self.model.named_parameters() if n in self._excluded]
        finally:
            for p, grad in zip(params, before, strict=True):
                p.grad = grad
        self._keep_validation(name, found, excluded, scale)
        self.seconds["validation"] += time.perf_counter() - start

    def _keep_validation(self, name: str, found: list[Tensor | None], excluded: list, scale: float | Tensor) -> None:
        grads = [g for g in found if g is not None]
        if not grads:
            raise InRunError(f"validation({name!r}): no backward pass of the block reached a tracked parameter")
        norm = torch.stack(torch._foreach_norm(grads)).norm()
        if not torch.isfinite(norm):
            bad = [s.name for s, g in zip(self._slots, found, strict=True) if g is not None and not g.isfinite().all()]
            raise InRunError(
                f"validation({name!r}): expected a finite gradient, got NaN or infinity in {', '.join(bad[:5])}"
                f"{'' if len(bad) <= 5 else f' and {len(bad) - 5} more'}"
            )
        left_out = [g for g in excluded if g is not None]
        if self._excluded and "excluded_share" not in self.ledger.metadata:
            squared = torch.stack(torch._foreach_norm(left_out)).square().sum() if left_out else norm.new_zeros(())
            self.ledger.metadata["excluded_share"] = float(squared / (squared + norm.square()))
        if isinstance(scale, Tensor) or scale != 1.0:
            torch._foreach_div_(grads, scale)
        self._val_grads[name] = found
        self._age[name] = 0

    def step(self, ids: Any = None) -> Step:
        """A block that holds one training step, from its forward to `optimizer.step()`.

        Args:
            ids: one id per sample of the batch, integers or strings, in batch order. Left out under gradient
                accumulation, where `Step.batch(ids)` comes before each forward.

        Raises:
            InRunError: no optimizer is bound; inside another step; the validation gradient is missing or too old.
        """
        self._require_open()
        if self._optimizer is None:
            raise InRunError("step: expected an optimizer, none is bound; call tracker.bind(optimizer)")
        return Step(self, ids)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Run the tracked layers plainly inside the block: evaluation or sampling in the middle of a step."""
        probes = {tap: tap.probe for tap in self._taps}
        self._set_probes({})
        try:
            yield
        finally:
            self._set_probes(probes)

    def close(self) -> None:
        """Give the model its own classes back, drop directions and hooks, and flush the ledger."""
        if self._closed:
            return
        self._closed = True
        if self._optimizer is not None:
            self._handle.remove()
            self._watch.close()
        for module in self.model.modules():
            if isinstance(module, rules.Holder):
                rules.remove(module)
        self._val_grads.clear()
        self.ledger.flush()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def _require_open(self) -> None:
        if self._closed:
            raise InRunError("tracker: is closed")

    def begin(self, step: Step) -> None:
        """Make the directions of a step; for `Step`."""
        if self._step is not None:
            raise InRunError("step: expected outside of a step block, got inside one")
        for name, loss_of in self._losses.items():
            age = self._age[name]
            if age is None or age >= self._every:
                self._validate(name, loss_of)
        for name, age in self._age.items():
            if age is None:
                raise InRunError(f"step: expected a validation({name!r}) block before it, there was none")
            if age >= self._every:
                raise InRunError(
                    f"step: the validation gradient of {name!r} has served {age} step(s) and validate_every is "
                    f"{self._every}; run a validation({name!r}) block, or track with a larger validate_every"
                )
        start = time.perf_counter()
        self._write_directions()
        self.seconds["direction"] += time.perf_counter() - start
        self._watch.begin()
        self._step = step

    def new_probes(self, step: Step, batch: int) -> dict[Any, Tensor]:
        """Fresh probes for the next forward, one for all layers of a device; for `Step`.

        While the sums are to be checked, every layer has its own.
        """
        if self._step is not step:
            raise InRunError("batch: expected inside the step block, got outside of it")
        shape = (batch,) if len(self.targets) == 1 else (batch, len(self.targets))
        probes: dict[Any, Tensor] = {}
        by_tap: dict[rules.Tap, Tensor] = {}
        for slot in self._slots:
            for tap in slot.taps:
                key = tap if self._check_due else slot.param.device
                if key not in probes:
                    dtype = torch.float64 if slot.param.dtype == torch.float64 else torch.float32
                    probes[key] = torch.zeros(shape, dtype=dtype, device=slot.param.device, requires_grad=True)
                by_tap[tap] = probes[key]
        self._set_probes(by_tap)
        return probes

    def end(self, step: Step) -> None:
        """Take the probes away; for `Step`."""
        self._step = None
        self._watch.active = False
        self._set_probes({})

    def record(self, step: Step, values: Tensor) -> None:
        """Count the step and store its values; for `Step`."""
        for name, age in self._age.items():
            self._age[name] = (age or 0) + 1
        self.ledger.append(step.number, step.ids, values, self.targets)
        self.steps = step.number + 1

    def _set_probes(self, probes: Mapping[rules.Tap, Tensor | None]) -> None:
        for tap in self._taps:
            tap.probe = probes.get(tap)

    def _validate(self, name: str, loss_of: Callable[[], Tensor]) -> None:
        # Random numbers drawn for validation are not missing in training.
        with torch.random.fork_rng(), self.validation(name):
            loss = loss_of()
            if not isinstance(loss, Tensor) or loss.numel() != 1:
                got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
                raise TypeError(f"validation loss {name!r}: expected a scalar tensor, got {got}")
            loss.backward()
        self.last_validation[name] = loss.detach()

    def _write_directions(self) -> None:
        assert self._optimizer is not None
        groups = self._optimizer.param_groups
        self._lr = [g["lr"] for g in groups]
        for m, name in enumerate(self.targets):
            target = m if len(self.targets) > 1 else None
            if name not in self._val_grads:
                continue
            grads = self._val_grads[name]
            for i, slot in enumerate(self._slots):
                grad = grads[i]
                if grad is None:
                    value = torch.zeros_like(slot.param)
                else:
                    value = directions.first_order(self._optimizer, groups[slot.group], slot.param, grad)
                directions.write(slot.direction, value, target)
                if self._every == 1:
                    grads[i] = None  # the direction takes its place
            if self._every == 1:
                del self._val_grads[name]

    def _before_update(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        step = self._step
        if step is None:
            return
        if len(args) > 1 or kwargs.get("closure") is not None:  # args[0] is the optimizer
            raise InRunError("optimizer.step(closure): expected the backward pass before it; call step() without one")
        if step.factor is not None:
            raise InRunError("step: expected one optimizer.step() in the block, got a second one")
        factor, step.uneven = self._watch.factor(optimizer)
        if self._check_due:
            scale = getattr(optimizer, "grad_scale", None)
            check.efficiency(self._slots, step.probes, factor, 1.0 if scale is None else 1.0 / scale)
            self._check_due = False
        step.factor = factor * self._lr_change(optimizer)

    def _lr_change(self, optimizer: Optimizer) -> float:
        """The factor by which the learning rates have changed since the directions were written."""
        ratios = set()
        for before, group in zip(self._lr, optimizer.param_groups, strict=False):
            lr = group["lr"]
            unchanged = isinstance(lr, Tensor) or lr == before
            ratios.add(1.0 if unchanged else lr / before if before else float("inf"))
        if len(ratios) > 1 or float("inf") in ratios:
            raise InRunError(
                f"lr: expected the learning rates the step began with, {self._lr}, or all of them changed by one "
                f"factor; got {[g['lr'] for g in optimizer.param_groups]}. Set them before the step block"
            )
        return ratios.pop()


def _losses(validation: Any) -> dict[str, Callable[[], Tensor]]:
    if validation is None:
        return {}
    losses = dict(validation) if isinstance(validation, Mapping) else {"validation": validation}
    for name, loss_of in losses.items():
        if not callable(loss_of):
            raise TypeError(f"validation[{name!r}]: expected a callable that returns the loss, got {loss_of!r}")
    return losses


def _sibling(param: nn.Parameter, many: int | None) -> nn.Parameter:
    # float16 has no range for a direction; every other dtype keeps its parameter's, so that they shard alike.
    dtype = torch.float32 if param.dtype == torch.float16 else param.dtype
    shape = param.shape if many is None else (many, *param.shape)
    return nn.Parameter(torch.zeros(shape, dtype=dtype, device=param.device), requires_grad=False)


def _require_all(missing: list[str]) -> None:
    if missing:
        raise InRunError(
            f"optimizer: expected every trainable parameter in its groups, {len(missing)} are not: "
            f"{', '.join(missing[:5])}{'...' if len(missing) > 5 else ''}; exclude or freeze them"
        )
