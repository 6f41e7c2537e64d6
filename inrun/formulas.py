"""Updates that are not elementwise, as functions that autograd differentiates: Muon's and Adafactor's.

Like any `update=`: what a step adds to a parameter, given its gradient, itself, its state before the step and the
options of its group.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, optim
from torch.optim import Optimizer

from .updates import UpdateRule


def muon(
    grad: Tensor, param: Tensor, state: dict[str, Any], group: dict[str, Any], dtype: torch.dtype | None = None
) -> Tensor:
    """`torch.optim.Muon`'s update of a matrix, or of each in a stack of them.

    Args:
        dtype: of the iteration, which torch has in bfloat16; None for the gradient's.

    Source: Jordan et al., Muon (2024), and torch.optim.Muon.
    """
    momentum, lr = group["momentum"], group["lr"]
    average = torch.lerp(state.get("momentum_buffer", torch.zeros_like(grad)), grad, 1 - momentum)
    x = torch.lerp(grad, average, momentum) if group["nesterov"] else average
    rows, columns = x.shape[-2:]
    x = x.mT if rows > columns else x
    x = x.reshape(-1, *x.shape[-2:]).to(dtype or x.dtype)
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=group["eps"])
    a, b, c = group["ns_coefficients"]
    for _ in range(group["ns_steps"]):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    x = x.mT if rows > columns else x
    if group["adjust_lr_fn"] in (None, "original"):
        ratio = math.sqrt(max(1, rows / columns))
    else:
        ratio = 0.2 * math.sqrt(max(rows, columns)) if group["adjust_lr_fn"] == "match_rms_adamw" else 1.0
    return -lr * ratio * x.reshape(grad.shape).to(grad.dtype) - lr * group["weight_decay"] * param


def adafactor(grad: Tensor, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """`torch.optim.Adafactor`'s update. Source: Shazeer and Stern, arXiv 1804.04235, and torch.optim.Adafactor."""
    grad = -grad if group["maximize"] else grad
    made, lr, (eps, least) = float(state.get("step", 0)) + 1, float(group["lr"]), group["eps"]
    entering = made ** group["beta2_decay"]

    def average(key: str, squared: Tensor) -> Tensor:
        return torch.lerp(state[key].to(squared) if key in state else torch.zeros_like(squared), squared, entering)

    squared = grad.double().square()
    if grad.dim() > 1:
        rows = average("row_var", squared.mean(-1, keepdim=True))
        columns = average("col_var", squared.mean(-2, keepdim=True))
        second = rows @ columns / rows.mean(-2, keepdim=True).clamp(min=eps)
    else:
        second = average("variance", squared)
    x = grad * second.clamp(min=eps * eps).rsqrt()
    rate = min(lr, made**-0.5) * max(least, _rms(param).item())
    x = x / (_rms(x) / group["d"]).clamp(min=1.0)
    return (-rate * x - lr * group["weight_decay"] * param).to(grad.dtype)


def adafactor_of_transformers(grad: Tensor, param: Tensor, state: dict[str, Any], group: dict[str, Any]) -> Tensor:
    """`transformers.Adafactor`'s update, which is what Hugging Face's Trainer has by that name. Source: as above."""
    made, lr, (eps, least) = state.get("step", 0) + 1, group["lr"], group["eps"]
    kept = 1 - made ** group["decay_rate"]
    if group["relative_step"]:
        lr = min(1e-6 * made if group["warmup_init"] else 1e-2, made**-0.5)
    if group["scale_parameter"]:
        lr = lr * max(least, _rms(param).item())

    def average(key: str, new: Tensor, kept: float = kept) -> Tensor:
        return torch.lerp(new, state[key].to(new) if key in state else torch.zeros_like(new), kept)

    squared = grad.double().square() + eps  # whose root has no derivative in float32 where the gradient is 0
    if grad.dim() > 1:
        rows, columns = average("exp_avg_sq_row", squared.mean(-1)), average("exp_avg_sq_col", squared.mean(-2))
        x = grad * (rows / rows.mean(-1, keepdim=True)).rsqrt().unsqueeze(-1) * columns.rsqrt().unsqueeze(-2)
    else:
        x = grad * average("exp_avg_sq", squared).rsqrt()
    x = lr * x / (_rms(x) / group["clip_threshold"]).clamp(min=1.0)
    if group["beta1"] is not None:
        x = average("exp_avg", x, group["beta1"])
    return (-x - group["weight_decay"] * lr * param).to(grad.dtype)


def _rms(x: Tensor) -> Tensor:
    return x.norm() / x.numel() ** 0.5


KNOWN: dict[type, UpdateRule] = {optim.Muon: muon, optim.Adafactor: adafactor}


def of(optimizer: Optimizer) -> UpdateRule | None:
    """The update of an optimizer that is known and not elementwise; None of any other."""
    kind = type(optimizer)
    if (kind.__module__, kind.__qualname__) == ("transformers.optimization", "Adafactor"):
        return adafactor_of_transformers
    return KNOWN.get(kind)
