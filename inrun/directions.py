"""The direction of an optimizer step: one tensor per parameter, so that a sample's value is `<direction, g_z>`.

First order, with the optimizer's state frozen at what it was before the step, every direction here is

    d = lr * (share of this step's gradient that is applied at once) * P g_v

where `g_v` is the validation gradient and P the optimizer's frozen preconditioner: 1 for SGD and
`1 / (sqrt(v_hat) + eps)` for Adam. A value is the validation loss removed, in nats; the paper's phi is its negative.
Weight decay and momentum of earlier steps belong to no sample of this batch and do not enter.

Source: SGD, arXiv 2406.11011 (equation 7); Adam with frozen state, arXiv 2602.00329.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from .errors import InRunError

SUPPORTED = (SGD, Adam, AdamW)


def require_supported(optimizer: Optimizer) -> None:
    """Raise `InRunError` unless first-order directions of this optimizer are known."""
    if not isinstance(optimizer, SUPPORTED):
        names = ", ".join(c.__name__ for c in SUPPORTED)
        raise InRunError(
            f"optimizer: expected one of torch.optim's {names} (or a subclass), got {type(optimizer).__name__}"
        )


def first_order(optimizer: Optimizer, group: dict[str, Any], param: Tensor, val_grad: Tensor) -> Tensor:
    """The frozen-state, first-order direction of one parameter: `coefficient * val_grad`.

    Args:
        optimizer: one of `SUPPORTED`; its state is read, never changed.
        group: the entry of `optimizer.param_groups` that holds `param`.
        param: the parameter, whose state is looked up.
        val_grad: gradient of the validation loss, the parameter's shape.

    Returns:
        The direction, the parameter's shape and `val_grad`'s dtype. `<direction, g_z>` is in nats.
    """
    if isinstance(optimizer, SGD):
        return val_grad * sgd_coefficient(group, optimizer.state.get(param, {}))
    return coefficient(optimizer, group, param, val_grad).mul_(val_grad)


def coefficient(optimizer: Optimizer, group: dict[str, Any], param: Tensor, val_grad: Tensor) -> Tensor:
    """What a coordinate's gradient is multiplied by, and subtracted, in this step; the parameter's shape.

    Args, Returns: as `first_order`.
    """
    state = optimizer.state.get(param, {})
    if isinstance(optimizer, SGD):
        return torch.ones_like(val_grad).mul_(sgd_coefficient(group, state))
    beta1, beta2 = group["betas"]
    step = state.get("step", 0) + 1
    variance = state.get("max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq")
    if variance is None:
        # Before its first step Adam has no second moment to freeze: it will divide by |g_B|, for which the size
        # of the validation gradient stands in.
        variance = val_grad.square()
    else:
        # v_hat of the finished steps: what this step's is when its own g_B^2 is replaced by their estimate.
        variance = variance / (1 - beta2 ** (step - 1))
    scale = variance.sqrt_().to(val_grad.dtype).add_(group["eps"])
    share = group["lr"] * (1 - beta1) / (1 - beta1**step)
    if isinstance(share, Tensor):
        share = share.to(val_grad.device, val_grad.dtype)
    return scale.reciprocal_().mul_(-share if group["maximize"] else share)


def sgd_coefficient(group: dict[str, Any], state: dict[str, Any]) -> Any:
    """The learning rate times the part of a gradient that SGD applies in the step it arrives in."""
    return (-1.0 if group["maximize"] else 1.0) * group["lr"] * _sgd_share(group, state)


def _sgd_share(group: dict[str, Any], state: dict[str, Any]) -> float:
    """The part of a gradient that SGD applies in the step it arrives in."""
    momentum = group["momentum"]
    if momentum == 0:
        return 1.0
    # The first gradient fills the momentum buffer undamped.
    entering = 1.0 if state.get("momentum_buffer") is None else 1.0 - group["dampening"]
    return 1.0 + momentum * entering if group["nesterov"] else entering


@torch.no_grad()
def write(direction: Tensor, value: Tensor, target: int | None) -> None:
    """Store a direction in its parameter's sibling: the whole of it, or the slice of one target."""
    (direction if target is None else direction[target]).copy_(value)
