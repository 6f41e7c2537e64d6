"""What became of the gradients between the backward and the update: clipping, unscaling, averaging.

The dots are taken in the backward; the optimizer sees `c * gradient` for one common factor c. It is found by
remembering the beginnings of a few gradients, small ones and large ones, as the backward left them, and comparing
when the update begins, so the user's loop needs no change and nothing need be declared. Gradients changed element by
element have no such factor. Of several processes' gradients, the optimizer sees c times their sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .distributed import Ranks, local
from .errors import InRunError

WATCHED_PER_GROUP = 8
WATCHED_ELEMENTS = 4096


class Watch:
    """Remembers some gradients of `slots` (`name`, `param`, `grad`, `optimizer`, `group`) while `active` is True."""

    def __init__(self, slots: Sequence[Any], ranks: Ranks) -> None:
        self.active, self._ranks = False, ranks
        self._raw: dict[str, Tensor] = {}
        self._slots = []
        groups: dict[Any, list[Any]] = {}
        for slot in slots:
            groups.setdefault((id(slot.optimizer), slot.group), []).append(slot)
        for members in groups.values():
            members.sort(key=lambda s: s.param.numel())
            every = max(1, (len(members) - 1) / (WATCHED_PER_GROUP - 1))
            self._slots += [members[round(k * every)] for k in range(min(len(members), WATCHED_PER_GROUP))]
        self._handles = [s.param.register_post_accumulate_grad_hook(self._hook(s.name)) for s in self._slots]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def remember(param: Tensor) -> None:
            if self.active and param.grad is not None:
                self._raw[name] = _beginning(local(param.grad)).clone()

        return remember

    def begin(self) -> None:
        self._raw.clear()
        self.active = True

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
        ranks = self._ranks
        # Another process may have had a backward through a parameter that had none here.
        slots = [s for s in self._slots if s.grad is not None and (s.name in self._raw or ranks.size > 1)]
        if not slots:
            raise InRunError("optimizer.step(): expected a backward pass in the step block, there was none")
        device = slots[0].param.device
        now = _together([s.grad for s in slots], slots, device)
        raw = ranks.added(_together([self._raw.get(s.name) for s in slots], slots, device))
        largest = raw.abs().max()
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        now, raw = now / largest, raw / largest  # no overflow under a loss scale
        products = torch.stack([raw.square().sum(), (now * raw).sum(), now.square().sum()])
        squared, along, size = ranks.over_shards(products)
        factor = torch.where(squared > 0, along / squared, torch.ones_like(squared))
        uneven = size - along * factor > 1e-4 * size
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            factor = factor / scale.to(device)  # a fused optimizer divides the loss scale out itself
        return skipped(optimizer, factor), uneven


def skipped(optimizer: Optimizer, factor: Tensor) -> Tensor:
    """The factor, or 0 where a fused optimizer will skip its update."""
    if (overflow := getattr(optimizer, "found_inf", None)) is None:
        return factor
    return torch.where(overflow.to(factor.device).squeeze() > 0, torch.zeros_like(factor), factor)


def _together(grads: Sequence[Tensor | None], slots: Sequence[Any], device: torch.device) -> Tensor:
    """The beginnings of the slots' gradients (0 for None), float32."""
    begun = [
        torch.zeros_like(_beginning(local(s.param))) if g is None else _beginning(g)
        for g, s in zip(grads, slots, strict=True)
    ]
    return torch.cat([torch.zeros(1, device=device), *(g.to(device, torch.float32) for g in begun)])  # never empty


def _beginning(grad: Tensor) -> Tensor:
    return grad.detach().flatten()[:WATCHED_ELEMENTS]
