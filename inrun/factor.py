"""What became of the gradients between the backward and the update: clipping, unscaling, averaging.

The dots are taken in the backward; the optimizer sees `c * gradient` for one common factor c. It is found by
remembering the beginnings of a few gradients, small ones and large ones, as the backward left them, and comparing
when the update begins, so the user's loop needs no change and nothing need be declared. Gradients changed element by
element have no such factor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from .errors import InRunError

WATCHED_PER_GROUP = 8
WATCHED_ELEMENTS = 4096


class Watch:
    """Remembers some gradients of `slots` (objects with `name`, `param`, `group`) while `active` is True."""

    def __init__(self, slots: Sequence[Any], groups: int) -> None:
        self.active = False
        self._raw: dict[str, Tensor] = {}
        self._slots = []
        for i in range(groups):
            members = sorted((s for s in slots if s.group == i), key=lambda s: s.param.numel())
            every = max(1, (len(members) - 1) / (WATCHED_PER_GROUP - 1))
            self._slots += [members[round(k * every)] for k in range(min(len(members), WATCHED_PER_GROUP))]
        self._handles = [s.param.register_post_accumulate_grad_hook(self._hook(s.name)) for s in self._slots]

    def _hook(self, name: str) -> Callable[[Tensor], None]:
        def remember(param: Tensor) -> None:
            if self.active and param.grad is not None:
                self._raw[name] = _beginning(param.grad).clone()

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
        known = [(s.param.grad, self._raw[s.name]) for s in self._slots if s.name in self._raw]
        pairs = [(_beginning(grad), raw) for grad, raw in known if grad is not None]
        if not pairs:
            raise InRunError("optimizer.step(): expected a backward pass in the step block, there was none")
        device = pairs[0][1].device
        now = torch.cat([n.to(device, torch.float32) for n, _ in pairs])
        raw = torch.cat([r.to(device, torch.float32) for _, r in pairs])
        largest = raw.abs().max()
        largest = torch.where(largest > 0, largest, torch.ones_like(largest))
        unit = raw / largest  # no overflow under a loss scale
        squared = unit.square().sum()
        factor = torch.where(squared > 0, (now * unit).sum() / (squared * largest), torch.ones_like(squared))
        uneven = (now - factor * raw).norm() > 1e-2 * now.norm()
        if (scale := getattr(optimizer, "grad_scale", None)) is not None:
            factor = factor / scale.to(device)  # a fused optimizer divides the loss scale out itself
        if (overflow := getattr(optimizer, "found_inf", None)) is not None:
            factor = torch.where(overflow.to(device).squeeze() > 0, torch.zeros_like(factor), factor)
        return factor, uneven


def _beginning(grad: Tensor) -> Tensor:
    return grad.detach().flatten()[:WATCHED_ELEMENTS]
