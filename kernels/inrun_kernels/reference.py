"""The products by definition: float64, one sample at a time, each per-sample gradient written out.

Deliberately naive: the yardstick for tests and benchmarks, never a path that training takes. Arguments and
results are those of the functions of the same name in `api.py` and `grouped.py`; results are float64.
"""

from itertools import pairwise

import torch
from torch import Tensor


def ghost_dot(acts, grads, val_grad, *, segments=None, per_token=False) -> Tensor:
    return _dots([g.T @ a for a, g in _samples(acts, grads, segments, per_token)], val_grad, 2, acts, per_token)


def ghost_wgrad_dot(acts, grads, val_grad, *, segments=None) -> tuple[Tensor, Tensor]:
    return _gradient(acts, grads), ghost_dot(acts, grads, val_grad, segments=segments)


def linear_wgrad_dot(acts, grads, val_grad, bias_val_grad, *, segments=None) -> tuple[Tensor, Tensor, Tensor]:
    weight_grad, dots = ghost_wgrad_dot(acts, grads, val_grad, segments=segments)
    bias_grad, of_bias = bias_wgrad_dot(grads, bias_val_grad, segments=segments)
    return weight_grad, bias_grad, dots + of_bias


def ghost_square(acts, grads, *, segments=None) -> tuple[Tensor, Tensor]:
    gradients = [g.T @ a for a, g in _samples(acts, grads, segments, False)]
    squares = acts.new_zeros(grads.shape[2], acts.shape[2], dtype=torch.float64)
    norms = acts.new_zeros(len(gradients), dtype=torch.float64)
    for s, gradient in enumerate(gradients):
        squares += gradient.square()
        norms[s] = gradient.square().sum()
    return squares, norms


def ghost_dot_pairwise(acts, grads, val_acts, val_grads) -> Tensor:
    dots = acts.new_zeros(acts.shape[0], val_acts.shape[0], dtype=torch.float64)
    for b in range(acts.shape[0]):
        for v in range(val_acts.shape[0]):
            of_sample = _gradient(acts[b : b + 1], grads[b : b + 1])
            dots[b, v] = (of_sample * _gradient(val_acts[v : v + 1], val_grads[v : v + 1])).sum()
    return dots


def embedding_dot(ids, grads, val_grad, *, segments=None, per_token=False, padding_idx=None) -> Tensor:
    tables = []
    for i, g in _samples(ids[..., None], grads, segments, per_token):
        table = g.new_zeros(val_grad.shape[-2:])
        for token, gradient in zip(i[:, 0].long().tolist(), g, strict=True):
            if token != padding_idx:
                table[token] += gradient
        tables.append(table)
    return _dots(tables, val_grad, 2, grads, per_token)


def norm_dot(normed, grads, val_grad, *, segments=None, per_token=False) -> Tensor:
    rows = [(n * g).sum(0) for n, g in _samples(normed, grads, segments, per_token)]
    return _dots(rows, val_grad, 1, grads, per_token)


def norm_wgrad_dot(normed, grads, val_grad, *, segments=None) -> tuple[Tensor, Tensor]:
    weight_grad = (normed.double() * grads.double()).sum((0, 1))
    return weight_grad, norm_dot(normed, grads, val_grad, segments=segments)


def bias_dot(grads, val_grad, *, segments=None, per_token=False) -> Tensor:
    return norm_dot(torch.ones_like(grads), grads, val_grad, segments=segments, per_token=per_token)


def bias_wgrad_dot(grads, val_grad, *, segments=None) -> tuple[Tensor, Tensor]:
    return norm_wgrad_dot(torch.ones_like(grads), grads, val_grad, segments=segments)


def grouped_mm(x, weight, offsets) -> Tensor:
    return torch.stack([row @ weight[g].double() for row, g in zip(x.double(), _groups_of(x, offsets), strict=True)])


def grouped_wgrad(x, grads, offsets) -> Tensor:
    found = x.new_zeros(len(offsets), grads.shape[1], x.shape[1], dtype=torch.float64)
    for row, grad, g in zip(x.double(), grads.double(), _groups_of(x, offsets), strict=True):
        found[g] += grad[:, None] * row
    return found


def _groups_of(x: Tensor, offsets: Tensor) -> list[int]:
    """The group of each row."""
    ends = offsets.tolist()
    return [sum(n >= end for end in ends) for n in range(len(x))]


def _gradient(acts: Tensor, grads: Tensor) -> Tensor:
    return grads.double().flatten(0, 1).T @ acts.double().flatten(0, 1)


def _samples(x: Tensor, grads: Tensor, segments: Tensor | None, per_token: bool) -> list[tuple[Tensor, Tensor]]:
    """The tokens of each sample, segment or token: pairs `[n, features]` in float64."""
    batch, tokens = grads.shape[:2]
    step = 1 if per_token else tokens
    bounds = [b * step for b in range(batch * (tokens if per_token else 1) + 1)]
    if segments is not None:
        bounds = segments.tolist()
    x, grads = x.double().flatten(0, 1), grads.double().flatten(0, 1)
    return [(x[low:high], grads[low:high]) for low, high in pairwise(bounds)]


def _dots(gradients: list[Tensor], val_grad: Tensor, dims: int, tokens: Tensor, per_token: bool) -> Tensor:
    directions = val_grad.double() if val_grad.dim() > dims else val_grad.double()[None]
    dots = tokens.new_zeros(len(gradients), len(directions), dtype=torch.float64)
    for s, gradient in enumerate(gradients):
        for m, direction in enumerate(directions):
            dots[s, m] = (gradient * direction).sum()
    if per_token:
        dots = dots.view(*tokens.shape[:2], len(directions))
    return dots if val_grad.dim() > dims else dots[..., 0]
