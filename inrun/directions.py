"""The direction of an optimizer step: one tensor per parameter, so that a sample's value is `<direction, g_z>`.

First order, with the optimizer's state frozen at what it was before the step, every direction here is

    d = lr * (share of this step's gradient that is applied at once) * P g_v

where `g_v` is the validation gradient and P the optimizer's frozen preconditioner: 1 for SGD and
`1 / (sqrt(v_hat) + eps)` for Adam, with v_hat as this step will make it, `g_v^2` standing in for the batch's `g_B^2`.
A value is the validation loss removed, in nats; the paper's phi is its negative.
Weight decay and momentum of earlier steps belong to no sample of this batch and do not enter.

Source: SGD, arXiv 2406.11011 (equation 7); Adam with frozen state, arXiv 2602.00329.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from inrun_kernels import adam

from .distributed import local
from .errors import InRunError
from .updates import named

SUPPORTED = (SGD, Adam, AdamW)
LARGE = 10.0  # times a batch's gradient, or a part of it: another square is no part of a second moment any more
_BLOCK = 1 << 20  # elements that are worked on at a time on a CPU, so that temporaries stay in its cache


def require_supported(optimizer: Optimizer) -> None:
    """Raise `InRunError` unless first-order directions of this optimizer are known."""
    if not isinstance(optimizer, SUPPORTED):
        names = ", ".join(c.__name__ for c in SUPPORTED)
        raise InRunError(
            f"optimizer: expected one of torch.optim's {names} (or a subclass), got {named(optimizer, SUPPORTED)}; "
            "method 'path_secant' knows every elementwise optimizer, Muon, Adafactor, and any whose update you give it"
        )


def warn_of_own_step(optimizers: Sequence[Optimizer]) -> None:
    """Say where a subclass of one of `SUPPORTED` has a step of its own."""

    def steps_of(kind: Any) -> tuple[Any, Any]:
        return inspect.unwrap(kind.step), kind._init_group

    known_steps = [steps_of(c) for c in SUPPORTED]
    for optimizer in optimizers:
        if steps_of(type(optimizer)) not in known_steps:
            known = next(c.__name__ for c in reversed(SUPPORTED) if isinstance(optimizer, c))
            warnings.warn(
                f"optimizer: {type(optimizer).__name__} has a step() of its own, and is taken for {known}. Where its "
                "update is another, take method 'path_secant', with update='elementwise' or its update as a function",
                stacklevel=3,
            )


def warn_of_sizes(optimizers: Sequence[Optimizer], validation: Mapping[str, Tensor], batch: Tensor) -> None:
    """Say where the square of a validation gradient cannot stand in for that of the batch's, as under Adam it has to.

    Args:
        validation: target -> norm of its gradient; batch: norm of the batch's. The device is waited for.
    """
    adams = [each for each in optimizers if not isinstance(each, SGD)]
    if not adams:
        return
    sizes, size = {name: float(norm) for name, norm in validation.items()}, float(batch)
    target = max(sizes, key=sizes.__getitem__)
    ratio = sizes[target] / size if size > 0 else 1.0
    if ratio > LARGE:
        off = "too small"
    elif 0 < ratio < 1 / LARGE and not all(each.state for each in adams):  # old squares outweigh small ones
        off = "too large in the first steps"
    else:
        return
    warnings.warn(
        f"validation({target!r}): its gradient has {ratio:.3g} times the norm of the batch's as the update takes it, "
        f"whose square it stands in for in Adam's second moment: values of methods 'first' and 'secant' are {off}. "
        "Take a mean loss, of a batch's samples or more, and for several targets losses of one scale; or 'path', and "
        "where gradients are clipped, clip=",
        stacklevel=2,
    )


def parts(param: Tensor, most: int | None = None) -> Iterator[Any]:
    """Indices that cut a parameter, or a shard of one, into blocks along its first dimension: of `most` elements or so,
    or of what a CPU's cache holds (on a GPU: the whole)."""
    most = most or (param.numel() if param.is_cuda else _BLOCK)
    if param.numel() <= most:
        yield ...
        return
    step = max(1, most * len(param) // param.numel())
    yield from (slice(low, low + step) for low in range(0, len(param), step))


def coefficient(slot: Any, val_grads: Sequence[Tensor], part: Any = ..., out: Tensor | None = None) -> Any:
    """What turns a validation gradient into the first-order, frozen-state direction, coordinate by coordinate.

    Args:
        slot: the parameter, with the `optimizer` (one of `SUPPORTED`) that updates it, its `options` and its `state`
            there, which are read, never changed.
        val_grads: its validation gradients (or this process's shards of them), one per target. Under Adam the mean
            of their squares stands in for the square of the batch's own gradient, which the second moment is about
            to take in.
        part: which part of all these tensors, one of `parts(param)`.
        out: where to compute a tensor, of the part's shape.

    Returns:
        A number (SGD), or a tensor of the part's shape. `<coefficient * val_grad, g_z>` is in nats.
    """
    if isinstance(slot.optimizer, SGD):
        return sgd_coefficient(slot)
    group, state = slot.options, {name: local(value) for name, value in slot.state.items()}
    beta1, beta2 = group["betas"]
    step = state.get("step", 0) + 1
    if isinstance(step, Tensor) and not step.is_cuda:
        step = step.item()
    unbias = 1 / (1 - beta2**step)
    # With the state alone, a coordinate whose few past gradients happened to be small would count without bound.
    # In units that save passes over memory: the second moment is `unit` times what is added up.
    first = val_grads[0][part]
    old, unit = (state["exp_avg_sq"][part], beta2) if state and beta2 else (first.new_zeros(()), 1 - beta2)
    scale = torch.empty_like(first) if out is None else out
    for grad in val_grads:
        old = torch.addcmul(old, grad[part], grad[part], value=(1 - beta2) / (unit * len(val_grads)), out=scale)
    if state and group["amsgrad"]:
        torch.maximum(scale, state["max_exp_avg_sq"][part] / unit, out=scale)
    root = (unit * unbias) ** 0.5
    scale.sqrt_().add_(group["eps"] / root)
    share = group["lr"] * (1 - beta1) / (1 - beta1**step) / root
    if isinstance(share, Tensor):
        share = share.to(scale.device, scale.dtype)
    else:
        share = torch.tensor(share, dtype=torch.float64, device="cpu")  # of no dimensions: it leaves the dtype alone
    return torch.div(-share if group["maximize"] else share, scale, out=scale)


def largest(slot: Any) -> Any:
    """What a coordinate's direction is at most, in the mean square over targets, as `coefficient` makes it of any
    validation gradients: lr, in Adam's first step. None of SGD, which has no such bound; else a number, or a tensor on
    a GPU."""
    group, step = slot.options, slot.state.get("step", 0) + 1
    if isinstance(slot.optimizer, SGD):
        return None
    if isinstance(step, Tensor):
        step = step.double() if step.is_cuda else step.item()
    beta1, beta2 = group["betas"]
    found = group["lr"] * (1 - beta1) / (1 - beta1**step) * ((1 - beta2**step) / (1 - beta2)) ** 0.5
    return found if isinstance(found, Tensor) and found.is_cuda else float(found)


AdamRates = tuple[float, tuple[float, float], float]


def adam_rates(optimizer: Optimizer, group: Mapping[str, Any]) -> AdamRates | None:
    """Gain, betas and eps of a group whose directions `inrun_kernels.adam` can write; None where `coefficient` has
    more to say: another optimizer, amsgrad, learning rates or betas on the device; and of a stand-in, whose moments
    are there one at a time."""
    if isinstance(optimizer, SGD) or group["amsgrad"] or not isinstance(optimizer.state, dict):
        return None
    lr, (beta1, beta2) = group["lr"], group["betas"]
    for number in (lr, beta1, beta2):
        if isinstance(number, Tensor) and number.is_cuda:
            return None
    lr, beta1, beta2 = float(lr), float(beta1), float(beta2)
    return (-lr if group["maximize"] else lr) * (1 - beta1), (beta1, beta2), group["eps"]


def adam_part(slot: Any, grad: Tensor, rates: AdamRates) -> adam.AdamPart | None:
    """The parameter's part in the one call that writes the directions of Adam; None where there is no kernel for it."""
    if not (grad.is_cuda or grad.is_cpu):
        return None
    state, (gain, betas, eps) = slot.state, rates
    step = state.get("step", 0.0)
    step = step if isinstance(step, Tensor) and step.is_cuda else float(step)
    moment = local(state.get("exp_avg_sq"))
    part = adam.AdamPart(out=slot.direction, val_grad=grad, moment=moment, step=step, gain=gain, betas=betas, eps=eps)
    return part if adam.fits(part) else None


def sgd_coefficient(slot: Any) -> Any:
    """The learning rate times the part of a gradient that SGD applies in the step it arrives in."""
    group = slot.options
    share, momentum = 1.0, group["momentum"]
    if momentum != 0:
        # The first gradient fills the momentum buffer undamped.
        entering = 1.0 if slot.state.get("momentum_buffer") is None else 1.0 - group["dampening"]
        share = 1.0 + momentum * entering if group["nesterov"] else entering
    return (-1.0 if group["maximize"] else 1.0) * group["lr"] * share
