"""The validation side of a run: which losses there are, their gradients, and how long those have served."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .distributed import Ranks, local
from .errors import InRunError, Pending, few, require_scale
from .restoring import buffers_kept, requiring, torch_random_kept

Gradients = list[Tensor | None]


class Validation:
    """Gradients of the validation losses, one list per target in the order of `slots`.

    Args:
        model: whose gradients a block or callable makes; slots: of its tracked parameters, once these are known.
        excluded: names of the parameters that get no score; their share of the gradient is measured once.
        losses: target -> callable that returns its loss; empty where blocks are used.
        targets: names, in the order of the values' columns.
        every: steps that a gradient may serve.
        ranks: the processes whose gradients and losses are averaged.
        pending: errors of gradients that are not finite.
    """

    def __init__(
        self,
        model: nn.Module,
        slots: Sequence[Any],
        excluded: Sequence[str],
        losses: Mapping[str, Callable[[], Tensor]],
        targets: tuple[str, ...],
        every: int,
        ranks: Ranks,
        pending: Pending,
    ) -> None:
        self.model, self.slots, self.excluded, self.ranks = model, slots, bool(excluded), ranks
        self.outside: list[nn.Parameter] = []  # of the optimizers and not of the model; a loss may reach them
        self.losses, self.targets, self.every, self.pending = losses, targets, every, pending
        self.gradients: dict[str, Gradients] = {}
        self.age: dict[str, int | None] = dict.fromkeys(targets)
        self._weights: dict[str, list[int]] = {}  # of each callable's gradient: how often they had been written to
        self.norms: dict[str, Tensor] = {}  # of the last gradients, over the tracked parameters
        self.last_losses: dict[str, Tensor] = {}
        self.excluded_share: float | None = None
        self._told = False  # that a loss writes to the weights
        # What a block of a target, and of a loss so scaled, runs in.
        self.around: Callable[[str, Any], AbstractContextManager] = lambda name, scale: nullcontext()
        self.seconds = 0.0

    @contextmanager
    def block(self, target: str | None = None, scale: float | Tensor = 1.0) -> Iterator[None]:
        """Take the gradients that the block's backward passes leave; those that stood before stand again."""
        name = self.targets[0] if target is None and len(self.targets) == 1 else target
        if name is None or name not in self.targets:
            raise ValueError(f"target: expected one of {', '.join(self.targets)}, got {target!r}")
        require_scale(scale)
        with self.around(name, scale), self._gradients() as found:
            yield
        self.gradients[name] = self._checked(name, found, scale)
        self.age[name] = 0

    def here(self, name: str) -> tuple[Tensor, Gradients]:
        """The loss of a target's callable at the weights as they are, and its gradient, which serves no other step."""
        with self._gradients() as found:
            loss = self._backward(name)
        return loss, self._checked(name, found, 1.0)

    def loss_and_gradient(self, name: str) -> tuple[Tensor, Gradients]:
        """A target's loss at the weights as they are, and its gradient, whatever it is; without a graph none."""
        with self._gradients() as found, buffers_kept(self.model):
            loss = self.loss(name)
            if loss.requires_grad:
                loss.backward()
        return loss.detach(), found[: len(self.slots)]

    def run_due(self, step: int) -> None:
        """Run every callable that is due at this step, a multiple of `every`: also after a run has gone on at another;
        or whose gradient has served its steps, or was to begin this one and the weights moved."""
        for name in self.losses:
            age = self.age[name]
            if age is None and step % self.every:
                warnings.warn(
                    f"validate_every: the run goes on at step {step}, between two multiples of {self.every}; the "
                    f"validation gradient of {name!r} is taken here, and the values up to the next multiple are others "
                    "than those of a run without a stop. Checkpoint at multiples",
                    stacklevel=4,
                )
            if age == 0:
                due = not self.is_of_these_weights(name)
            else:
                due = age is None or age >= self.every or step % self.every == 0
            if due:
                self.run(name)

    def run(self, name: str) -> None:
        """Run a target's callable, as its block."""
        with self.block(name):
            self.last_losses[name] = self._backward(name)
        self._weights[name] = self._versions()

    def is_of_these_weights(self, name: str) -> bool:
        """Whether a target's callable need not run again: no step has used its gradient, and no weight has moved since
        (by a step outside of the blocks, say, or a clamp; what writes through `.data` is not seen)."""
        return self.age[name] == 0 and self._weights.get(name) == self._versions()

    def _versions(self) -> list[int]:
        return [local(p)._version for p in self.model.parameters()]

    def require_fresh(self) -> None:
        """Raise `InRunError` where a gradient is missing or has served its steps."""
        for name, age in self.age.items():
            if age is None:
                raise InRunError(f"step: expected a validation({name!r}) block before it, there was none")
            if age >= self.every:
                raise InRunError(
                    f"step: the validation gradient of {name!r} has served {age} step(s) and validate_every is "
                    f"{self.every}; run a validation({name!r}) block, or track with a larger validate_every"
                )

    def count_step(self) -> None:
        self.age = {name: None if age is None else age + 1 for name, age in self.age.items()}

    @contextmanager
    def _telling_of_writes(self) -> Iterator[None]:
        """Warn, once, where the block writes to the weights."""
        if self._told or not self.ranks.alone or self.ranks.sharded:  # fully_shard does so itself
            yield
            return
        before = [s.param._version for s in self.slots]
        yield
        written = [s.name for s, version in zip(self.slots, before, strict=True) if s.param._version != version]
        if written:
            self._told = True
            warnings.warn(
                f"validation: expected a loss that leaves the weights as they are, those of {len(written)} parameters "
                f"were written to: {few(written)}. Where others were put in their place, as by optimizer.eval() of a "
                "schedule-free optimizer, values are of those",
                stacklevel=6,
            )

    def loss(self, name: str) -> Tensor:
        """The scalar loss of a target's callable, with its graph; random numbers are left as they were."""
        with torch_random_kept(), self._telling_of_writes():
            loss = self.losses[name]()
        if (whole := getattr(loss, "full_tensor", None)) is not None:  # of logits in parts
            loss = whole()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise TypeError(f"validation loss {name!r}: expected a scalar tensor, got {got}")
        return loss

    def _backward(self, name: str) -> Tensor:
        with buffers_kept(self.model):  # of running statistics, say, which the training has from its own batches
            loss = self.loss(name)
            if not loss.requires_grad:
                raise InRunError(f"validation loss {name!r}: expected one with a graph, to be differentiated; got a "
                                 "tensor without (of a block under torch.no_grad(), or detached?)")  # fmt: skip
            loss.backward()
        # A copy: what a captured CUDA graph returned is overwritten by its next run.
        return self.ranks.mean(loss.detach().clone())

    @contextmanager
    def _gradients(self) -> Iterator[Gradients]:
        """The gradients that the block's backward passes leave, of the slots, and of excluded parameters until their
        share is known; filled in when it ends."""
        start = time.perf_counter()
        self.pending.answer()
        self.ranks.settle()
        tracked = [s.param for s in self.slots]
        ours = {id(p) for p in tracked}
        others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ours]
        wanted = [*tracked, *(others if self.excluded and self.excluded_share is None else [])]
        found: Gradients = []
        try:  # a parameter that is frozen for now may train again before the gradient has served
            with requiring((p, True) for p in tracked), self.ranks.aside([*tracked, *others, *self.outside]):
                with self.ranks.unseen([*tracked, *others, *self.outside]):
                    yield found
                grads = self.ranks.mean_gradients([p.grad for p in wanted], wanted)
                if "torch._inductor.cudagraph_trees" in sys.modules:  # what a captured graph made is its next run's
                    grads = [g if g is None else g.clone() for g in grads]
                found.extend(grads[: len(tracked)])
                for p, g in zip(wanted[len(tracked) :], grads[len(tracked) :], strict=True):  # whose norm alone counts
                    share = self.ranks.share(p)
                    found.append(g if g is None or share == 1.0 else g * share**0.5)
        finally:
            self.seconds += time.perf_counter() - start

    def _checked(self, name: str, found: Gradients, scale: float | Tensor) -> Gradients:
        ours = found[: len(self.slots)]
        grads = [g for g in ours if g is not None]
        if not grads:
            raise InRunError(
                f"validation({name!r}): no backward pass of the block reached a tracked parameter, or its gradients "
                "were taken away (by zero_grad(), or an optimizer's step within the backward)"
            )
        held = [s for s, g in zip(self.slots, ours, strict=True) if g is not None]
        names = [s.name for s in held]
        # Their norms are kept for the message, not they: a GPU's answer comes later.
        each = torch._foreach_norm(grads)  # pyright: ignore[reportPrivateImportUsage]
        norms = torch.stack([norm.to(grads[0].device) for norm in each])
        if any(s.share != 1.0 for s in held):
            norms = norms * norms.new_tensor([s.share**0.5 for s in held])
        norm = self.ranks.norm([norms])
        self.pending.ask(~torch.isfinite(norm), lambda: _not_finite(name, names, norms, scale))
        self.norms[name] = norm / scale
        if self.excluded and self.excluded_share is None:
            others = [g for g in found[len(ours) :] if g is not None]
            others = [g.coalesce().values() if g.is_sparse else g for g in others]
            squared = self.ranks.norm(others).square()
            share = float(squared / (squared + norm.square()))
            self.excluded_share = share if math.isfinite(share) else None
        if isinstance(scale, Tensor) or scale != 1.0:
            for g in grads:
                g.div_(scale)
        return ours


def _not_finite(target: str, names: list[str], norms: Tensor, scale: float | Tensor) -> InRunError:
    bad = [name for name, finite in zip(names, norms.isfinite().tolist(), strict=True) if not finite]
    remedy = ""
    if float(scale) != 1.0:  # from which the overflow may be
        remedy = (f". The loss was scaled by {float(scale):g}: scale it by less, and pass that as scale=; it need not "
                  "be the training loss's, and a GradScaler's grows until it overflows")  # fmt: skip
    where = few(bad) or "the shards of another process"
    return InRunError(f"validation({target!r}): expected a finite gradient, got NaN or infinity in {where}{remedy}")


def as_losses(validation: Any) -> dict[str, Callable[[], Tensor]]:
    """The `validation` argument of `track` as target -> callable."""
    if validation is None:
        return {}
    losses = dict(validation) if isinstance(validation, Mapping) else {"validation": validation}
    for name, loss_of in losses.items():
        if not callable(loss_of):
            raise TypeError(f"validation[{name!r}]: expected a callable that returns the loss, got {loss_of!r}")
    return losses


def as_targets(losses: Mapping[str, Any], targets: Any) -> tuple[str, ...]:
    """The names of the targets: those of the callables, or the `targets` argument of `track`."""
    named = tuple(targets) if isinstance(targets, Iterable) and not isinstance(targets, str) else ()
    found = tuple(losses) or named
    if losses and named not in (("validation",), found):
        raise ValueError(f"targets: expected those of validation, {found}, or none; got {targets!r}")
    if not found or len({name for name in found if isinstance(name, str)}) < len(found):
        got = found if losses else targets
        raise ValueError(f"targets: expected a sequence of distinct names, got {got!r}")
    return found


def as_samples(pairwise: Any, targets: Sequence[str]) -> dict[str, list[str]]:
    """The `pairwise` argument of `track` as target -> names of its validation samples; empty where there are none."""
    if pairwise is None:
        return {}
    by_target = pairwise if isinstance(pairwise, Mapping) else dict.fromkeys(targets[:1], pairwise)
    if set(by_target) != set(targets):
        raise ValueError(f"pairwise: expected ids for each of {', '.join(targets)}, got {', '.join(by_target)}")
    found = {name: [str(i) for i in as_ids(by_target[name], "pairwise")] for name in targets}
    for name, ids in found.items():
        if len(set(ids)) < len(ids):
            raise ValueError(f"pairwise: expected distinct ids for {name!r}, got {len(ids) - len(set(ids))} repeated")
    columns = columns_of(found, tuple(targets))
    if repeated := sorted({c for c in columns if columns.count(c) > 1}):
        raise ValueError(f"pairwise: expected distinct names of target and id together, got {few(repeated)} twice")
    return found


def columns_of(samples: Mapping[str, Sequence[str]], targets: tuple[str, ...]) -> tuple[str, ...]:
    """The names under which values are recorded: the targets, or their samples (`target/id`, of several targets)."""
    if len(samples) > 1:
        return tuple(f"{name}/{i}" for name in targets for i in samples[name])
    return tuple(i for ids in samples.values() for i in ids) or targets


def as_ids(ids: Any, name: str = "ids") -> list[int | str]:
    """Sample ids as a list of integers or of strings, whatever kind of integers they are."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Sequence):
        raise TypeError(f"{name}: expected a sequence, array or tensor of integers or strings, got {ids!r}")
    if not ids:
        raise ValueError(f"{name}: expected one id per sample, got none")
    ids = [i.item() if hasattr(i, "item") and getattr(i, "ndim", None) == 0 else i for i in ids]  # of numpy or torch
    kinds = {type(i) for i in ids}
    if kinds != {int} and kinds != {str}:
        raise TypeError(
            f"{name}: expected all integers or all strings, got {', '.join(sorted(k.__name__ for k in kinds))}"
        )
    return ids
