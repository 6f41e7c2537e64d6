"""What became of the gradients between the backward and the update: clipping, unscaling, averaging.

The dots are taken in the backward; the optimizer sees `c * gradient` for one common factor c. It is found by
remembering a few gradients, small ones and large ones and the first that comes (those of a closed branch are zeros), as
the backward left them, the large ones by sums over parts of them (of an embedding, most rows are zeros), and comparing
when the update begins, so the user's loop needs no change and nothing need be declared. One that is written to by
itself is remembered from the next step on. Gradients changed element by element, or some and not others, have no such
factor. Of several processes' gradients, the optimizer sees c times their sum.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .distributed import Ranks
from .errors import InRunError, Pending, few
from .restoring import requiring
from .tap import leave_as_they_are
from .updates import of_scaler

WATCHED_PER_GROUP, WATCHED = 8, 64  # parameters, the latter of all groups, but one of each
# Of a parameter. A prime: elements so far apart lie in all columns of a weight, whose sums may cancel along a row
# (behind a layer norm) or a column (of logits).
WATCHED_ELEMENTS = 4093
EVEN = 1e-4  # of a gradient's square
SAME = 2.5e-3  # the same of one that is computed again, by kernels that need not add up in one order


class Watch:
    """Remembers some gradients of `slots` (`name`, `param`, `grad`, `optimizer`, `group`) while `active` is True, and
    of all of them that there was one; `scored`: whether gradients are scored as they come."""

    def __init__(self, ranks: Ranks, pending: Pending, scored: bool) -> None:
        self.active, self._ranks, self._pending, self._scored = False, ranks, pending, scored
        self._raw: dict[str, Tensor] = {}
        self._reached: dict[str, Any] = {}  # slots, since the step or its last update began
        self._due: dict[str, Any] = {}  # slots whose gradients an update to come is to take
        self.begun: list[Optimizer] = []  # of the step, whose updates have
        self._to_clear: set[int] = set()  # `id` of optimizers of earlier steps, to whose gradients none has come since
        self._factor = torch.ones(())  # of the first
        self._watched: dict[str, Any] = {}  # those that are watched, by name
        # Of each gradient when it last came, its `id` and how often it had been written to.
        self._written: dict[str, tuple[int, int]] = {}
        self._first: dict[int, Any] = {}  # `id` of an optimizer -> its slot whose gradient came first in the step
        self._handles: list[Any] = []

    def watch(self, slots: Sequence[Any]) -> None:
        """Begin, once it is known which optimizers the slots are in."""
        groups: dict[Any, list[Any]] = {}
        for slot in slots:
            groups.setdefault((id(slot.optimizer), slot.group), []).append(slot)
        most = max(1, min(WATCHED_PER_GROUP, WATCHED // max(1, len(groups))))
        for members in groups.values():
            members.sort(key=lambda s: s.param.numel(), reverse=True)
            every = max(1, (len(members) - 1) / max(1, most - 1))
            some = [members[round(k * every)] for k in range(min(len(members), most))]
            self._watched |= {slot.name: slot for slot in some}
        if not self._ranks.alone and slots:  # the ends of the model: what comes first may be another in each process
            for optimizer in {id(s.optimizer): s.optimizer for s in slots}.values():
                held = [s for s in slots if s.optimizer is optimizer]
                self._watched |= {end.name: end for end in (held[0], held[-1])}
        leave_as_they_are(Watch._remember, Watch._require_kept)
        with requiring((slot.param, True) for slot in slots):  # one may be frozen for now
            self._handles = [s.param.register_post_accumulate_grad_hook(partial(self._remember, s)) for s in slots]
            self._handles += [s.param.register_hook(partial(self._require_kept, s)) for s in self._watched.values()]

    @property
    def hooks(self) -> set[int]:
        """The numbers of its hooks on gradients."""
        return {handle.id for handle in self._handles}

    def _remember(self, slot: Any, param: Tensor) -> None:
        if self.active and param.grad is not None:
            self._reached[slot.name] = self._due[slot.name] = slot
            self._written[slot.name] = id(param.grad), param.grad._version
            if self._ranks.alone:  # else the first may be another in each
                self._first.setdefault(id(slot.optimizer), slot)
            if slot.name in self._watched or self._first.get(id(slot.optimizer)) is slot:
                grad = slot.grad
                seen = self._seen(grad)
                self._raw[slot.name] = seen.clone() if grad.numel() < WATCHED_ELEMENTS else seen

    def _require_kept(self, slot: Any, _: Tensor) -> None:
        """Raise `InRunError` where a gradient that comes finds that of the step's last backward gone, or one that an
        update has taken already."""
        if not (self.active or self._ranks.are_aside) and slot.param.grad is None:  # cleared, and another loss's comes
            self._to_clear.discard(id(slot.optimizer))
        if not self.active or slot.optimizer in self.begun:
            return
        if slot.name in self._raw and slot.param.grad is None:
            raise InRunError(
                f"{slot.name}: expected the gradient of the step's last backward when the next one adds to it, got "
                "none; call optimizer.zero_grad() before the step's first backward or after optimizer.step()"
            )
        if id(slot.optimizer) in self._to_clear:
            self._to_clear.discard(id(slot.optimizer))
            if slot.param.grad is not None:  # zeros, or forgotten: of all the optimizer's, and one tells
                message = (
                    f"{slot.name}: expected no gradient, or zeros, when the step's first backward adds to it, got that "
                    "of an earlier step, whose update has taken it; call optimizer.zero_grad() in every step"
                )
                self._pending.ask(self._seen(slot.grad).any(), lambda: InRunError(message))

    def _seen(self, grad: Tensor) -> Tensor:
        """At most `WATCHED_ELEMENTS` numbers, linear in the gradient: itself, or sums over all of it."""
        flat = grad.detach().flatten()
        count = len(flat) // WATCHED_ELEMENTS
        if not count:
            return flat
        sums = flat[: WATCHED_ELEMENTS * count].view(count, WATCHED_ELEMENTS).sum(0, dtype=torch.float32)
        rest = flat[WATCHED_ELEMENTS * count :]
        sums[: len(rest)] += rest
        return sums

    def seen(self) -> dict[str, Tensor]:
        """What now stands in the gradients of watched parameters, by name."""
        grads = {name: slot.grad for name, slot in self._watched.items() if slot.param.grad is not None}
        return {name: self._seen(grad).to(torch.float64, copy=True) for name, grad in grads.items()}

    def require_same(self, again: Sequence[Mapping[str, Tensor]]) -> None:
        """Raise `InRunError` (on a GPU later) where what was `seen` as each of a step's batches was computed again does
        not add up to the step's."""
        device = next((raw.device for raw in self._raw.values()), None)  # to bring zeros there would be to wait for it
        apart, size = torch.zeros(2, dtype=torch.float64, device=device)
        for name, raw in self._raw.items():
            if parts := [seen[name] for seen in again if name in seen]:
                raw = raw.double()
                apart = apart.to(raw.device) + (sum(parts) - raw).square().sum()
                size = size.to(raw.device) + raw.square().sum()
        self._pending.ask(apart > SAME * size, lambda: InRunError(
            "recompute: expected the loss of the batch as the step computed it, got one with other "
            "gradients. It is called after the block (with 'secant' and 'path_secant' perhaps in the next validation "
            "block): names that it uses must not have been given to the next batch by then, as a loop's variables are "
            "(lambda x=x, y=y: ...), nor the loss another scale (scaler.update())"
        ))  # fmt: skip

    def begin(self) -> None:
        self._raw.clear()
        self._due.clear()
        self._first.clear()
        self._to_clear.update(map(id, self.begun))
        self.begun, self.active = [], True

    def updated(self, optimizer: Optimizer) -> None:
        """An update has begun, the first from all the gradients that have come."""
        self.begun.append(optimizer)
        self._due = {n: s for n, s in self._due.items() if s.optimizer not in self.begun and s.param.grad is not None}
        self._reached.clear()

    def require_in_time(self) -> None:
        """Raise `InRunError` where gradients came that an update which has begun takes no part of; where they are
        scored as they come, those of other optimizers count."""
        if not self.begun:
            return
        late = [name for name, slot in self._reached.items() if not self._scored or slot.optimizer in self.begun]
        self._reached.clear()
        if late:
            first = ", of several optimizers before the first" if len(self.begun) > 1 else ""
            raise InRunError(
                f"optimizer.step(): expected all of the step's backward passes before it{first}; after it came "
                f"gradients of {len(late)} parameters, whose scores would be in the step's values: {few(late)}. Run "
                "that backward before, or outside of the step block"
            )

    def lost(self, optimizer: Optimizer | None = None) -> list[str]:
        """Parameters (of one optimizer) whose gradient of this step's backward is gone, so that the update to come
        passes them by."""
        gone = {n: s for n, s in self._due.items() if s.param.grad is None}
        return [n for n, s in gone.items() if optimizer is None or s.optimizer is optimizer]

    def require_even(self, number: int, uneven: Tensor) -> None:
        """Raise `InRunError` where step `number` had no common factor; of a GPU the answer comes some steps later."""
        others = " of all processes together (as DDP adds them)" if self._ranks.size > 1 else ""
        message = (
            f"optimizer.step(): expected the gradients of the backward{others} up to one common factor "
            f"(clipping by norm, unscaling); in step {number} got gradients changed element by element, or some of "
            "them and not others"
        )
        self._pending.ask(uneven, lambda: InRunError(message))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()

    @torch.no_grad()
    def factor(self, optimizer: Optimizer) -> tuple[Tensor, Tensor]:
        """The common factor c (0 where a fused optimizer will skip the update), and whether there is none.

        Returns:
            Two scalar tensors on the gradients' device, float32 and bool; nothing is synchronised.

        Raises:
            InRunError: no backward pass since `begin`.
        """
        slots = self._came()
        if not slots:
            raise InRunError(
                "optimizer.step(): expected a backward pass in the step block, there was none (torch.autograd.grad is "
                "none, and makes no scores; use backward())"
            )
        self._factor, uneven = self._compared(optimizer, slots, None)
        if self._ranks.alone:  # else what averages gradients may write to some more often
            self._watch_written()
        return self._factor, uneven

    def _watch_written(self) -> None:
        """From the next step on, watch the gradients that were written to more or less often than most since they came,
        or that another tensor has taken the place of: those may have been changed alone."""
        came = [(slot, grad) for slot in self._due.values() if (grad := slot.param.grad) is not None]
        times = []
        for slot, grad in came:
            which, before = self._written[slot.name]
            times.append((id(grad) == which, grad._version - (before if id(grad) == which else 0)))
        usual = max(set(times), key=times.count, default=None)
        for (slot, _), count in zip(came, times, strict=True):
            if count != usual and slot.name not in self._watched:
                self._watched[slot.name] = slot
                self._handles.append(slot.param.register_hook(partial(self._require_kept, slot)))

    @torch.no_grad()
    def uneven(self, optimizer: Optimizer) -> Tensor:
        """Whether the gradients of one more optimizer are not those of the backward times the first's factor.

        Raises:
            InRunError: they are gone.
        """
        if gone := self.lost(optimizer):
            raise InRunError(
                f"optimizer.step(): expected the gradients of the step's backward, those of {len(gone)} parameters are "
                f"gone since the first optimizer's step: {few(sorted(gone))}"
            )
        slots, factor = [s for s in self._came() if s.optimizer is optimizer], self._factor
        if not slots:
            return torch.zeros_like(factor, dtype=torch.bool)
        return self._compared(optimizer, slots, factor)[1].to(factor.device) & (factor != 0)

    def _came(self) -> list[Any]:
        """Watched slots with a gradient of the step."""
        # Another process may have had a backward through a parameter that had none here.
        watched = self._watched | {s.name: s for s in self._first.values()}
        held = [s for s in watched.values() if s.param.grad is not None]
        return held if self._ranks.size > 1 else [s for s in held if s.name in self._raw]

    def _compared(self, optimizer: Optimizer, slots: Sequence[Any], factor: Tensor | None) -> tuple[Tensor, Tensor]:
        """The common factor, if it is not known yet, and whether there is none."""
        ranks, scale = self._ranks, of_scaler(optimizer, "grad_scale")
        device = slots[0].param.device
        parts = {s.name: self._seen(s.grad) for s in slots}
        now = _together(parts.values(), device)
        raw = [torch.zeros_like(part) if (r := self._raw.get(n)) is None else r for n, part in parts.items()]
        raw = ranks.added(_together(raw, device))
        largest = raw.abs().max()
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        now, raw = now / largest, raw / largest  # no overflow under a loss scale
        squared, along = ranks.over_shards(torch.stack([raw.square().sum(), (now * raw).sum()]))
        scale = 1.0 if scale is None else scale.to(device)  # which a fused optimizer divides out itself
        if factor is None:
            # Of nothing but zeros, what averages the processes' gradients makes of their sum.
            change = torch.where(squared == 0, torch.full_like(squared, 1 / ranks.divisor), along / squared)
        else:
            change = factor.to(device) * scale
        lengths = [len(part) for part in parts.values()]
        of_params = [part for x in (now - change * raw, now) for part in x[1:].split(lengths)]
        norms = torch.stack(torch._foreach_norm(of_params))  # pyright: ignore[reportPrivateImportUsage]
        apart, size = ranks.over_shards(norms.square().view(2, -1))
        # Numbers of float16 end at 6e-8, by which small ones may be off.
        halves = [slot.param.numel() for slot in slots if slot.param.dtype == torch.float16]
        least = max(halves) * (6e-8 / largest).square() if halves else 0.0
        uneven = (apart > EVEN * size + least).any() & change.isfinite()  # of an overflow the optimizer will see itself
        return skipped(optimizer, change / scale), uneven


def skipped(optimizer: Optimizer, factor: Tensor) -> Tensor:
    """The factor, or 0 where a fused optimizer will skip its update."""
    if (overflow := of_scaler(optimizer, "found_inf")) is None:
        return factor
    return torch.where(overflow.to(factor.device).squeeze() > 0, torch.zeros_like(factor), factor)


def _together(parts: Iterable[Tensor], device: torch.device) -> Tensor:
    return torch.cat([torch.zeros(1, device=device), *(g.to(device, torch.float32) for g in parts)])  # never empty
