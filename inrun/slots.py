"""A tracked parameter: where it lives, what scores it, and the optimizer that updates it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from . import distributed
from .errors import InRunError, few
from .tap import SUFFIX, Tap, targets_first


@dataclass
class Slot:
    """One distinct tracked parameter; looked up by owner and name, since sharding replaces the tensors."""

    name: str
    owner: nn.Module
    local: str
    taps: list[Tap]
    optimizer: Any = None  # that updates it, and the number of its group there
    group: int = -1
    share: float = 1.0  # one over how many processes of tensor parallelism hold the same of it
    count: Tensor | None = None  # its steps, on the host, while `updates.counts_read` holds what it read from a device

    @property
    def param(self) -> nn.Parameter:
        return self.owner._parameters[self.local]  # pyright: ignore[reportReturnType]

    @property
    def sibling(self) -> nn.Parameter:
        return self.owner._siblings[self.local + SUFFIX]  # pyright: ignore

    @property
    def shard(self) -> Tensor:
        """This process's part of the parameter, or all of it."""
        return distributed.local(self.param)

    @property
    def direction(self) -> Tensor:
        """This process's part of it, as of the gradient; of M targets `[M, *shape]`.

        Before it is known, deferred methods have other tensors there: K, and what the kept layers are scored along to
        check them, or for some validation samples at a time.
        """
        return targets_first(distributed.local(self.sibling), self.param)

    @property
    def slices(self) -> list[Tensor]:
        """The direction, one slice for each target."""
        direction = self.direction
        return [direction] if direction.dim() == self.param.dim() else list(direction.unbind(0))

    @property
    def grad(self) -> Tensor | None:
        return distributed.local(distributed.laid_alike(self.param.grad, self.param))

    @property
    def options(self) -> dict[str, Any]:
        """Its entry in the optimizer's `param_groups`."""
        return self.optimizer.param_groups[self.group]

    @property
    def state(self) -> dict[str, Any]:
        """What the optimizer holds for it; empty before its first step."""
        state = self.optimizer.state.get(self.param, {})
        if any(tap.in_parts is not None for tap in self.taps):
            state = {key: distributed.laid_alike(value, self.param) for key, value in state.items()}
        return state if self.count is None else {**state, "step": self.count}


def components(slots: Sequence[Any]) -> list[list[Any]]:
    """Parameters that share a module, or modules that share a parameter, can only be compared together."""
    by_tap: dict[Any, list[Any]] = {}
    for slot in slots:
        for tap in slot.taps:
            by_tap.setdefault(tap, []).append(slot)
    found, seen = [], set()
    for slot in slots:
        component, queue = [], [slot]
        while queue:
            if id(one := queue.pop()) not in seen:
                seen.add(id(one))
                component.append(one)
                queue.extend(other for tap in one.taps for other in by_tap[tap])
        if component:
            found.append(component)
    return found


def trainable(model: nn.Module) -> tuple[dict[int, nn.Parameter], set[nn.Module]]:
    """Parameters that train, by their `id`, and all modules. Asked once a step, so without the names that
    `model.parameters()` makes on its way, or a tensor's own hash, which is Python."""
    found, seen, modules = {}, set(), [model]
    while modules:
        module = modules.pop()
        if module not in seen:
            seen.add(module)
            if module._modules:
                modules += [child for child in module._modules.values() if child is not None]
            for p in module._parameters.values():
                if p is not None and p.requires_grad:
                    found[id(p)] = p
    return found, seen


def sibling(param: nn.Parameter, many: int | None) -> nn.Parameter:
    # float16 has no range for a direction; every other dtype keeps its parameter's, so that they shard alike.
    dtype = torch.float32 if param.dtype == torch.float16 else param.dtype
    targets = [] if many is None else [many]
    part, whole = ([*x.shape[:1], *targets, *x.shape[1:]] for x in (distributed.local(param), param))
    zeros = torch.zeros(part, dtype=dtype, device=param.device)
    return nn.Parameter(distributed.laid_as(param, zeros, whole), requires_grad=False)


def places(optimizers: Iterable[Optimizer]) -> dict[int, tuple[Optimizer, int]]:
    """`id` of a parameter -> its optimizer and the number of its group there.

    Raises:
        InRunError: two of the optimizers hold one parameter.
    """
    found: dict[int, tuple[Optimizer, int]] = {}
    for optimizer in optimizers:
        for i, group in enumerate(optimizer.param_groups):
            for p in group["params"]:
                if id(p) in found:
                    raise InRunError(f"optimizer: expected each parameter in one of them, one of shape "
                                     f"{tuple(p.shape)} is in two")  # fmt: skip
                found[id(p)] = (optimizer, i)
    return found


def require_all(missing: list[str]) -> None:
    if missing:
        raise InRunError(
            f"optimizer: expected every trainable parameter in its groups, {len(missing)} are not: {few(missing)}; "
            "exclude or freeze them"
        )
