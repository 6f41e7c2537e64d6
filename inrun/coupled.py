"""Path values through an update that is not elementwise: Muon's, Adafactor's, or a user's own.

Where an update moves a coordinate by the gradient of others too, there is no K to multiply the validation gradient G
by. But a path value asks for the transpose of the update's Jacobian alone, and autograd gives that product as it is:

    value_z = <D, g_z>,    D = -integral over t from 0 to 1 of J(t g_B)^T G dt

by Gauss-Legendre nodes, each one forward and backward of the update. What the nodes miss of the update itself (Muon's
jumps where it has no momentum yet, and torch computes it in bfloat16) goes along g_B, so that the values of every
parameter add up to -<u(g_B) - u(0), G>, whatever the number of nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import formulas
from .errors import InRunError
from .updates import ELEMENTWISE, UpdateRule, chunks, copied, pinned, updates

NODES = 4  # of the integral


class Coupled:
    """Those parameters of a step whose update is not elementwise, as they were before it.

    Args:
        rule: what the user says of the update: a function, "elementwise", or None.
    """

    def __init__(self, rule: UpdateRule | str | None) -> None:
        self._rule = rule
        self._is: dict[str, bool] = {}  # name of a parameter -> whether its update is of this kind
        self.release()

    def __contains__(self, i: int) -> bool:
        return i in self._held

    def release(self) -> None:
        # Number of a slot -> its update; its gradient, what moves it, and what the update's function holds.
        self._held: dict[int, tuple[Callable[[Tensor], Tensor], list[Tensor]]] = {}

    def tensors(self) -> Iterator[Tensor]:
        """All that is held."""
        yield from (tensor for _, held in self._held.values() for tensor in held)

    def among(self, moving: Sequence[tuple[int, Any]], unscale: Any) -> list[tuple[int, Any]]:
        """Those of these numbered parameters whose update is of this kind.

        Where that is not known, it is tried: if an update is elementwise, then a coordinate moves by just as much when
        half of the other coordinates have no gradient. One that was found so is tried again in the next step: it may
        couple coordinates where they are large, as what bounds the norm of an update does.

        Raises:
            InRunError: an update that was said to be elementwise is not, and no function of it is known.
        """
        alone = {slot.name for _, slot in moving if slot.name in self._is and slot.param.numel() == 1}
        unsure = [(i, slot) for i, slot in moving if slot.name not in alone and not self._is.get(slot.name)]
        for part in chunks(unsure):
            kinds = {slot.name: self._known(slot) for _, slot in part}
            if unknown := [slot for _, slot in part if kinds[slot.name] is None]:
                kinds.update(zip((slot.name for slot in unknown), self._tried(unknown, unscale), strict=True))
            self._is.update({name: kind for name, kind in kinds.items() if kind is not None})
        return [(i, slot) for i, slot in moving if self._is.get(slot.name)]

    def _known(self, slot: Any) -> bool | None:
        if callable(self._rule):
            return None
        return False if type(slot.optimizer) in ELEMENTWISE else True if formulas.of(slot.optimizer) else None

    def _tried(self, slots: Sequence[Any], unscale: Any) -> list[bool | None]:
        """None where the gradient moves nothing, as at a rate of zero: a later step tells."""
        full = [slot.grad.double() * unscale for slot in slots]
        # A bit of a multiple of the square of each coordinate's number, as good as random: some of both, of two too.
        numbers = [torch.arange(1, 1 + g.numel(), device=g.device).view(g.shape) for g in full]
        kept = [n.square_().mul_(2654435761).bitwise_right_shift_(31).bitwise_and_(1).bool() for n in numbers]
        half = [torch.where(k, g, 0.0) for g, k in zip(full, kept, strict=True)]
        ends = zip(updates(slots, full, self._rule), updates(slots, half, self._rule), kept, strict=True)
        told = []  # of each, whether it moved, and whether a coordinate did so otherwise
        for a, b, k in ends:
            apart = ~torch.isclose(a, b, rtol=1e-9, atol=0.0, equal_nan=True) & k
            told.append(torch.stack([(a != b).any(), apart.any()]).to(full[0].device))
        answers = torch.stack(told).tolist()  # a GPU is waited for once
        found = [
            coupled if moved or k.numel() == 1 else None for (moved, coupled), k in zip(answers, kept, strict=True)
        ]
        if any(found) and not callable(self._rule):
            slot = slots[found.index(True)]
            raise InRunError(
                f"update: expected an elementwise one, as update='elementwise' says; that of {slot.name} by "
                f"{type(slot.optimizer).__name__} moves a coordinate by the gradients of others. Give it as a function "
                "that autograd can differentiate: update=lambda grad, param, state, group: <what it adds to param>"
            )
        for slot in (slot for slot, coupled in zip(slots, found, strict=True) if coupled):
            update, _, dtype = self._function(slot)
            with torch.enable_grad():
                if not update(slot.grad.to(dtype, copy=True).requires_grad_()).requires_grad:
                    raise InRunError(
                        f"update: expected a function that autograd differentiates, as that of {slot.name} is not "
                        "elementwise; got a result that does not depend on the gradient"
                    )
        return found

    def _function(self, slot: Any) -> tuple[Callable[[Tensor], Tensor], list[Tensor], torch.dtype]:
        """The update as a function of the gradient alone, copies of all else as it is now, and their dtype."""
        dtype = torch.promote_types(slot.param.dtype, torch.float32)
        rule: Any = self._rule if callable(self._rule) else formulas.of(slot.optimizer)
        param, state = slot.shard.detach().to(dtype, copy=True), copied(slot.state, slot.shard, dtype)
        group = pinned(slot.options)
        copies = [param, *(value for value in state.values() if isinstance(value, Tensor))]
        return lambda grad: rule(grad.clone(), param, state, group), copies, dtype

    def hold(self, i: int, slot: Any, grad: Tensor, moved: Tensor) -> None:
        """Hold a parameter, its state and its gradient, and what they will move it by, until G is known.

        Args:
            i: its number; slot: itself.
            grad: float64; moved: u(grad) - u(0), of the same shape.
        """
        update, copies, dtype = self._function(slot)
        self._held[i] = update, [grad.to(dtype), moved.to(dtype), *copies]

    def slope(self, i: int, validation: Tensor, at: float = 1.0) -> Tensor:
        """-J(at * g_B)^T G, of the parameter's shape."""
        update, (grad, *_) = self._held[i]
        with torch.enable_grad():
            leaf = (at * grad).requires_grad_()
            (product,) = torch.autograd.grad(update(leaf), leaf, -validation.to(leaf.dtype))
        return product

    def direction(self, i: int, validation: Tensor) -> Tensor:
        """D, of the parameter's shape."""
        _, (grad, moved, *_) = self._held[i]
        total = torch.zeros_like(grad)
        for x, weight in zip(*np.polynomial.legendre.leggauss(NODES), strict=True):
            total.add_(self.slope(i, validation, (x + 1) / 2), alpha=weight / 2)
        missed = -(moved * validation).sum(dtype=torch.float64) - (total * grad).sum(dtype=torch.float64)
        squared = grad.square().sum(dtype=torch.float64)
        return total.add_((missed / torch.where(squared == 0, 1.0, squared)).to(grad.dtype) * grad)
