"""Second derivatives: the gradient of every product with respect to its inputs, in plain torch ops.

A dot is linear in each of its inputs, so with `u` the incoming gradient of the dots, spread over tokens,

    d/d acts = sum_m u_m (grads @ D_m)    d/d grads = sum_m u_m (acts @ D_m^T)    d/d D_m = (u_m grads)^T acts

Nothing is stored per sample here either. Gradients come back in the dtype of their input.
"""

from itertools import pairwise as neighbours
from typing import Any

import torch
from torch import Tensor


def ghost_dot(ctx: Any, grad_dots: Tensor | None) -> tuple:
    acts, grads, val_grad, segments = ctx.saved_tensors
    found = _linear(ctx.needs_input_grad, acts, grads, val_grad, segments, None, grad_dots)
    return (*_like(ctx.needs_input_grad, found, (acts, grads, val_grad)), None, None, None)


def ghost_wgrad_dot(ctx: Any, grad_weight: Tensor | None, grad_bias: Tensor | None, grad_dots: Tensor | None) -> tuple:
    *inputs, segments = ctx.saved_tensors
    acts, grads, val_grad, bias_val_grad = inputs
    of_acts, of_grads, of_direction = _linear(
        ctx.needs_input_grad, acts, grads, val_grad, segments, grad_weight, grad_dots
    )
    of_bias = None
    if bias_val_grad is not None:
        _, through_bias, of_bias = _rows(None, grads, bias_val_grad, segments, grad_bias, grad_dots)
        of_grads = through_bias if of_grads is None else of_grads + through_bias
    found = (of_acts, of_grads, of_direction, of_bias)
    return (*_like(ctx.needs_input_grad, found, tuple(inputs)), None, None, None, None)


def ghost_square(ctx: Any, of_squares: Tensor | None, of_norms: Tensor | None) -> tuple:
    """One sample's gradient at a time, times what its square's gradient is.

    Where segments end is not read on the host: each sample takes all tokens, those of others as zeros.
    """
    acts, grads, segments = ctx.saved_tensors
    flat_acts, flat_grads = _widen(acts).flatten(0, 1), _widen(grads).flatten(0, 1)
    if segments is None:
        samples = list(zip(_widen(acts).unbind(0), _widen(grads).unbind(0), strict=True))
    else:
        token = torch.arange(len(flat_acts), device=acts.device)[:, None]
        inside = [(token >= low) & (token < high) for low, high in neighbours(segments)]
        samples = [(flat_acts * here, flat_grads * here) for here in inside]
    found: list[tuple[Tensor, Tensor]] = []
    for s, (a, g) in enumerate(samples):
        weight = sum(x for x in (of_squares, None if of_norms is None else of_norms[s]) if x is not None)
        along = 2 * (g.T @ a) * weight
        found.append((g @ along, a @ along.T))
    if not found:
        both = flat_acts * 0, flat_grads * 0
    elif segments is None:
        both = tuple(torch.cat(x) for x in zip(*found, strict=True))
    else:
        both = tuple(torch.stack(x).sum(0) for x in zip(*found, strict=True))
    shaped = tuple(x.view(like.shape) for x, like in zip(both, (acts, grads), strict=True))
    return (*_like(ctx.needs_input_grad, shaped, (acts, grads)), None, None)


def pairwise(ctx: Any, grad_dots: Tensor | None) -> tuple:
    """One validation sample at a time: token-pair products `[B*T, S]`, weighted by that sample's gradient."""
    inputs = ctx.saved_tensors
    if grad_dots is None:
        return (None,) * 5
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


def embedding_dot(ctx: Any, grad_dots: Tensor | None) -> tuple:
    ids, grads, val_grad, segments = ctx.saved_tensors
    if grad_dots is None:
        return (None,) * 7
    weights = _per_token(grad_dots, ids.shape[0], ids.shape[1], segments)
    if ctx.options[1] is not None:
        weights = weights.masked_fill((ids == ctx.options[1])[..., None], 0)
    _, need_grads, need_direction, *_ = ctx.needs_input_grad
    grads_grad = direction_grad = None
    if need_grads:
        grads_grad = sum(weights[..., m : m + 1] * d[ids] for m, d in enumerate(_widen(val_grad).unbind(0)))
    if need_direction:
        zero = torch.zeros_like(_widen(val_grad)[0])
        flat_ids, wide = ids.flatten(), _widen(grads)
        direction_grad = torch.stack(
            [
                zero.index_add(0, flat_ids, (weights[..., m : m + 1] * wide).flatten(0, 1))
                for m in range(val_grad.shape[0])
            ]
        )
    found = _like((need_grads, need_direction), (grads_grad, direction_grad), (grads, val_grad))
    return (None, *found, None, None, None, None)


def row_dot(ctx: Any, grad_dots: Tensor | None) -> tuple:
    normed, grads, val_grad, segments = ctx.saved_tensors
    found = _rows(normed, grads, val_grad, segments, None, grad_dots)
    return (*_like(ctx.needs_input_grad, found, (normed, grads, val_grad)), None, None, None)


def row_wgrad_dot(ctx: Any, grad_weight: Tensor | None, grad_dots: Tensor | None) -> tuple:
    normed, grads, val_grad, segments = ctx.saved_tensors
    found = _rows(normed, grads, val_grad, segments, grad_weight, grad_dots)
    return (*_like(ctx.needs_input_grad, found, (normed, grads, val_grad)), None, None)


def _linear(
    needed: tuple, acts: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None,
    grad_weight: Tensor | None, grad_dots: Tensor | None,
) -> tuple:  # fmt: skip
    """Wide gradients of (acts, grads, val_grad), given those of the weight gradient and of the dots."""
    a, g, direction_grad = _widen(acts), _widen(grads), None
    terms = [] if grad_weight is None else [(a, g, _widen(grad_weight))]  # terms <y^T x, matrix>, as (x, y, matrix)
    if grad_dots is not None:
        weights = _per_token(grad_dots, acts.shape[0], acts.shape[1], segments)
        for m, direction in enumerate(_widen(val_grad).unbind(0)):
            terms.append((a * weights[..., m : m + 1], g * weights[..., m : m + 1], direction))
        if needed[2]:
            of_dots = terms[-val_grad.shape[0] :]
            direction_grad = torch.stack([g.flatten(0, 1).T @ x.flatten(0, 1) for x, _, _ in of_dots])
    acts_grad = sum(y @ matrix for _, y, matrix in terms) if terms and needed[0] else None
    grads_grad = sum(x @ matrix.T for x, _, matrix in terms) if terms and needed[1] else None
    return acts_grad, grads_grad, direction_grad


def _rows(
    normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None,
    grad_weight: Tensor | None, grad_dots: Tensor | None,
) -> tuple:  # fmt: skip
    """Wide gradients of (normed, grads, val_grad) of the norm (or, without `normed`, bias) products."""
    g = _widen(grads)
    row = g.new_zeros(grads.shape[2]) if grad_weight is None else _widen(grad_weight)  # what multiplies normed * grads
    product, direction_grad = g if normed is None else g * normed, None
    if grad_dots is not None:
        weights = _per_token(grad_dots, grads.shape[0], grads.shape[1], segments)
        row = row + weights @ _widen(val_grad)
        direction_grad = weights.flatten(0, 1).T @ product.flatten(0, 1)
    normed_grad, grads_grad = (None, row.expand_as(g)) if normed is None else (row * g, row * normed)
    return normed_grad, grads_grad, direction_grad


def _per_token(grad_dots: Tensor, batch: int, tokens: int, segments: Tensor | None) -> Tensor:
    """Spread the gradient of dots (`[B,T,M]`, `[B,M]` or `[S,M]`) over tokens: `[B, T, M]`."""
    if grad_dots.dim() == 3:
        return grad_dots
    if segments is None:
        return grad_dots[:, None].expand(-1, tokens, -1)
    spread = grad_dots.repeat_interleave(segments.diff(), 0, output_size=batch * tokens)
    return spread.view(batch, tokens, grad_dots.shape[1])


def save(tensors: int, ctx: Any, inputs: tuple, output: Any) -> None:
    """Of an op's inputs the first `tensors`, and its other options."""
    ctx.save_for_backward(*inputs[:tensors])
    ctx.options = inputs[tensors:]
    ctx.set_materialize_grads(False)


def _widen(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _like(needed: tuple, found: tuple, inputs: tuple) -> tuple:
    """Keep what is needed, in the dtype of its input."""
    return tuple(
        grad.to(x.dtype) if need and grad is not None else None
        for need, grad, x in zip(needed, found, inputs, strict=False)
    )
