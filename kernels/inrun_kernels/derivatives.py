"""Second derivatives: the gradient of every product with respect to its inputs.

By autograd of what an op computes, written out in plain torch operations; of squares and pairs by hand, one sample at a
time. Nothing is stored per sample here either. Gradients come back in the dtype of their input.
"""

from collections.abc import Callable
from itertools import pairwise as neighbours
from typing import Any

import torch
from torch import Tensor


def of(written_out: Callable[..., Any]) -> Callable[..., tuple]:
    """The backward of an op that computes this."""

    def backward(ctx: Any, *of_outputs: Tensor | None) -> tuple:
        saved, again = ctx.saved_tensors, torch.is_grad_enabled()
        needed = [i for i in range(len(saved)) if ctx.needs_input_grad[i]]
        found = dict.fromkeys(range(len(saved) + len(ctx.options)))
        with torch.enable_grad():
            inputs = list(saved)
            for i in needed:  # each by itself, should two of them be one tensor
                inputs[i] = inputs[i].view_as(inputs[i]) if again else inputs[i].detach().requires_grad_()
            outputs = written_out(*map(_widen, inputs), *ctx.options)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            pairs = [(y, g) for y, g in zip(outputs, of_outputs, strict=True) if y.requires_grad and g is not None]
        if pairs:
            moving, (ys, gs) = [inputs[i] for i in needed], zip(*pairs, strict=True)
            found |= zip(
                needed, torch.autograd.grad(ys, moving, gs, create_graph=again, allow_unused=True), strict=True
            )
        return tuple(found.values())

    return backward


def ghost_dot(acts, grads, val_grad, segments, per_token, _) -> Tensor:
    return _grouped(_of_tokens(acts, grads, val_grad), segments, per_token)


def ghost_wgrad_dot(acts, grads, val_grad, bias_val_grad, segments, *_) -> tuple[Tensor, Tensor, Tensor]:
    dots, bias_grad = _of_tokens(acts, grads, val_grad), grads.new_zeros(0)
    if bias_val_grad is not None:
        dots, bias_grad = dots + grads @ bias_val_grad.T, grads.sum((0, 1))
    return grads.flatten(0, 1).T @ acts.flatten(0, 1), bias_grad, _grouped(dots, segments)


def embedding_dot(ids, grads, val_grad, segments, per_token, padding_idx, _) -> Tensor:
    dots = torch.stack([(direction[ids] * grads).sum(-1) for direction in val_grad.unbind(0)], -1)
    dots = dots if padding_idx is None else dots.masked_fill((ids == padding_idx)[..., None], 0)
    return _grouped(dots, segments, per_token)


def row_dot(normed, grads, val_grad, segments, per_token, _) -> Tensor:
    return _grouped((grads if normed is None else normed * grads) @ val_grad.T, segments, per_token)


def row_wgrad_dot(normed, grads, val_grad, segments, _) -> tuple[Tensor, Tensor]:
    products = grads if normed is None else normed * grads
    return products.sum((0, 1)), _grouped(products @ val_grad.T, segments)


def _of_tokens(acts: Tensor, grads: Tensor, val_grad: Tensor) -> Tensor:
    """Dots of a linear layer's tokens, `[B, T, M]`."""
    return torch.stack([((acts @ direction.T) * grads).sum(-1) for direction in val_grad.unbind(0)], -1)


def _grouped(dots: Tensor, segments: Tensor | None, per_token: bool = False) -> Tensor:
    """`[B, T, M]` -> itself, `[S, M]` or `[B, M]`."""
    if per_token or segments is None:
        return dots if per_token else dots.sum(1)
    count, tokens = len(segments) - 1, dots.flatten(0, 1)
    owners = torch.arange(count, device=dots.device).repeat_interleave(segments.diff(), output_size=len(tokens))
    return dots.new_zeros(count, dots.shape[2]).index_add(0, owners, tokens)


def ghost_square(ctx: Any, of_squares: Tensor | None, of_norms: Tensor | None) -> tuple:
    """One sample's gradient at a time, times what its square's gradient is.

    Where segments end is not read on the host: each sample takes all tokens, those of others as zeros.
    """
    acts, grads, segments = ctx.saved_tensors
    flat_acts, flat_grads = _widen(acts).flatten(0, 1), _widen(grads).flatten(0, 1)
    if segments is None:
        samples = ((a, g, None) for a, g in zip(_widen(acts).unbind(0), _widen(grads).unbind(0), strict=True))
    else:
        token = torch.arange(len(flat_acts), device=acts.device)[:, None]
        inside = ((token >= low) & (token < high) for low, high in neighbours(segments))
        samples = ((flat_acts.where(here, 0), flat_grads.where(here, 0), here) for here in inside)
    found: list[tuple[Tensor, ...]] = []
    for s, (a, g, here) in enumerate(samples):
        weight = sum(x for x in (of_squares, None if of_norms is None else of_norms[s]) if x is not None)
        along = 2 * (g.T @ a) * weight
        of_both = g @ along, a @ along.T
        found.append(of_both if here is None else tuple(x.where(here, 0) for x in of_both))  # 0 * nan is none
        if here is not None and s:
            found = [tuple(x + y for x, y in zip(*found, strict=True))]
    both = tuple(torch.cat(x) for x in zip(*found, strict=True)) if found else (flat_acts * 0, flat_grads * 0)
    shaped = tuple(x.view(like.shape) for x, like in zip(both, (acts, grads), strict=True))
    return (*_like(ctx.needs_input_grad, shaped, (acts, grads)), None, None)


def pairwise(ctx: Any, grad_dots: Tensor) -> tuple:
    """One validation sample at a time: token-pair products `[B*T, S]`, weighted by that sample's gradient."""
    inputs = ctx.saved_tensors
    acts, grads, val_acts, val_grads = inputs
    tokens = acts.shape[1]
    flat_acts, flat_grads = _widen(acts).flatten(0, 1), _widen(grads).flatten(0, 1)
    weights = grad_dots.repeat_interleave(tokens, 0)  # [B*T, V]
    acts_grad, grads_grad = torch.zeros_like(flat_acts), torch.zeros_like(flat_grads)
    val_acts_grad, val_grads_grad = [], []
    for v, (va, vg) in enumerate(zip(_widen(val_acts).unbind(0), _widen(val_grads).unbind(0), strict=True)):
        of_acts = (flat_acts @ va.T) * weights[:, v : v + 1]
        of_grads = (flat_grads @ vg.T) * weights[:, v : v + 1]
        acts_grad = acts_grad + of_grads @ va
        grads_grad = grads_grad + of_acts @ vg
        val_acts_grad.append(of_grads.T @ flat_acts)
        val_grads_grad.append(of_acts.T @ flat_grads)
    found = (
        acts_grad.view_as(acts),
        grads_grad.view_as(grads),
        torch.stack(val_acts_grad) if val_acts_grad else torch.zeros_like(val_acts),
        torch.stack(val_grads_grad) if val_grads_grad else torch.zeros_like(val_grads),
    )
    return (*_like(ctx.needs_input_grad, found, inputs), None)


def save(tensors: int, ctx: Any, inputs: tuple, output: Any) -> None:
    """Of an op's inputs the first `tensors`, and its other options."""
    ctx.save_for_backward(*inputs[:tensors])
    ctx.options = inputs[tensors:]
    ctx.set_materialize_grads(False)


def _widen(x: Any) -> Any:
    return x.float() if isinstance(x, Tensor) and x.dtype in (torch.float16, torch.bfloat16) else x


def _like(needed: tuple, found: tuple, inputs: tuple) -> tuple:
    """Keep what is needed, in the dtype of its input."""
    return tuple(
        grad.to(x.dtype) if need and grad is not None else None
        for need, grad, x in zip(needed, found, inputs, strict=False)
    )
