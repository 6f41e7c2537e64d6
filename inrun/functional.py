"""Drop-in layer functions whose backward also returns per-sample gradient dots.

Every function here computes the ordinary layer, and is the honest derivative of one written with a *probe*:

    y[b] = f(x[b]; W + sum_m probe[b, m] * D[m])          at probe = 0

so the gradient of `probe` is the dot of each sample's own parameter gradient with the direction D,

    dL/dprobe[b, m] = <dL/dW through sample b, D[m]>.

Autograd itself then adds layers, reuses, tied weights and microbatches up. Nothing of size B x O x I is formed.

Shapes: `x` is `[B, ..., I]`, dimension 0 being the sample (a leading 1 is broadcast over the samples). With one
direction, `probe` is `[B]` and a direction has its parameter's shape; with M of them, `[B, M]` and `[M, *shape]`.
`directions` pairs the weight's with the bias's; either may be None. Gradients have the dtypes torch would give
them; the probe's is float32 (float64 for float64 layers). With `probe=None` each function is exactly torch's own.

Packed documents: with `segments`, int64 offsets `[S + 1]` into the B*T tokens of an `x` that is `[B, T, ...]`, the
probe is `[S]` (or `[S, M]`) and each document has a dot; offsets 0, 1, ..., B*T give every token its own.

Second derivatives and forward-mode AD go through the written-out expression above, in plain torch operations.

Source: In-Run Data Shapley, arXiv 2406.11011, section 4.2 (ghost dot-product), as one autograd function.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from torch import Tensor

from inrun_kernels import (
    bias_wgrad_dot,
    embedding_dot,
    ghost_dot,
    ghost_wgrad_dot,
    linear_wgrad_dot,
    norm_dot,
    norm_wgrad_dot,
    ops,
)
from inrun_kernels.norms import norm_backward

Directions = tuple[Tensor | None, Tensor | None]
_writing_out = False


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    directions: Directions | None = None,
    probe: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.linear` that scores its samples.

    Args:
        x: `[B, ..., I]` (or `[1, ..., I]`, shared by all samples).
        weight: `[O, I]`.
        bias: `[O]` or None.
        directions: `(weight_direction, bias_direction)`, each the parameter's shape (or `[M, *shape]`) or None.
        probe: `[B]` (or `[B, M]`) zeros with `requires_grad=True`; None computes the plain layer.
        segments: offsets of packed documents (see the module), of which the probe then has one entry each.

    Returns:
        `[B, ..., O]`, in the dtype torch (and autocast) would give.

    Raises:
        ValueError: the leading dimension of `x` is neither the probe's number of samples nor 1.

    Example:
        >>> probe = torch.zeros(len(x), requires_grad=True)
        >>> linear(x, weight, bias, (weight_direction, bias_direction), probe).square().sum().backward()
        >>> probe.grad                                      # [B]: <this sample's gradient, the direction>
    """
    if probe is None or directions is None:
        return F.linear(x, weight, bias)
    (x,) = _autocast(_placed(x, probe, segments))
    return _apply(_Linear, x, weight, bias, *directions, probe, segments)


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    directions: Directions | None = None,
    probe: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """Hugging Face's `Conv1D` layer, `x @ weight + bias`, that scores its samples.

    Args, returns and errors as in `linear`, but `weight` and its direction are `[I, O]` (`[M, I, O]`).
    """
    if directions is not None and directions[0] is not None:
        directions = (directions[0].mT, directions[1])
    return linear(x, weight.t(), bias, directions, probe, segments)


def embedding(
    ids: Tensor,
    weight: Tensor,
    direction: Tensor | None = None,
    probe: Tensor | None = None,
    padding_idx: int | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.embedding` that scores its samples.

    Args:
        ids: `[B, ...]` integers in `[0, V)`. Position ids that lack the sample axis (`[1, T]`, or `[T]` with T
            other than B) are expanded to `[B, T]`.
        weight: `[V, I]`; `direction`: `[V, I]` (or `[M, V, I]`).
        probe, segments: as in `linear`; None computes the plain layer.
        padding_idx: this row gets no gradient and no score, as in torch.

    Returns:
        `[B, ..., I]` in the dtype of `weight`.

    Raises:
        ValueError: the leading dimension of `ids` is neither the number of samples nor 1.
        RuntimeError: `ids` is `0, 1, ..., B-1`, or of four or more another run of numbers, which could be positions or
            one id for each sample.
    """
    if probe is None or direction is None:
        return F.embedding(ids, weight, padding_idx)
    ids = ids_by_sample(ids, probe.shape[0]) if segments is None else ids
    return _apply(_Embedding, ids, weight, direction, probe, segments, padding_idx)


def layer_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...] | list[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    directions: Directions | None = None,
    probe: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.layer_norm` that scores its samples; `x` is `[B, ..., *normalized_shape]`.

    Args, returns and errors as in `linear`; weight, bias and their directions are `normalized_shape`-shaped.
    """
    shape = tuple(normalized_shape)
    if probe is None or directions is None or weight is None:
        return F.layer_norm(x, shape, weight, bias, eps)
    x = _placed(x, probe, segments)
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:  # the cast autocast makes
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    return _apply(_LayerNorm, x, weight, bias, *directions, probe, segments, eps)


def rms_norm(
    x: Tensor,
    normalized_shape: tuple[int, ...] | list[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    direction: Tensor | None = None,
    probe: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """`torch.nn.functional.rms_norm` that scores its samples; `x` is `[B, ..., *normalized_shape]`.

    Args, returns and errors as in `linear`; `weight` and `direction` are `normalized_shape`-shaped.
    """
    shape = list(normalized_shape)
    if probe is None or direction is None or weight is None or list(weight.shape) != shape:
        return F.rms_norm(x, shape, weight, eps)  # of another shape, an error
    return _apply(_RMSNorm, _placed(x, probe, segments), weight, direction, probe, segments, eps)


def affine(
    normed: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    directions: Directions,
    probe: Tensor,
    segments: Tensor | None = None,
) -> Tensor:
    """`normed * weight + bias` over the last dimensions, that scores its samples.

    Args, returns and errors as in `linear`; `normed` is `[B, ..., *weight.shape]`, and weight, bias and their
    directions are of one shape (or `[M, *shape]`).
    """
    return _apply(_Affine, _placed(normed, probe, segments), weight, bias, *directions, probe, segments)


def bias(
    x: Tensor,
    bias: Tensor,
    direction: Tensor | None = None,
    probe: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """`x + bias` over the last dimensions, that scores its samples; `x` is `[B, ..., *bias.shape]`.

    Args, returns and errors as in `linear`; `direction` has the bias's shape (or `[M, *shape]`).
    """
    if probe is None or direction is None:
        return x + bias
    return _apply(_Bias, _placed(x, probe, segments), bias, direction, probe, segments)


def attach(out: Tensor, tangents: Tensor, probe: Tensor, segments: Tensor | None = None) -> Tensor:
    """Score samples by forward-mode tangents: `out`, with `dL/dprobe[b] = <dL/dout[b], tangents[b]>`.

    Args:
        out: `[B, ...]`, any layer's output whose rows belong to samples.
        tangents: the derivative of `out` along the direction: `out`'s shape (or `[M, *out.shape]`).
        probe, segments: as in `linear`.

    Returns:
        `out` itself, with the dots added to its backward.
    """
    return _apply(_Attach, out, tangents, probe, segments)


# Each layer is one autograd function. `written_out` is the layer with its probe in place, in plain torch operations:
# the fast backward is its gradient at probe = 0, and what a derivative of the backward goes through. (Forwards take
# `ctx`: with `setup_context` torch binds the arguments by inspection at every call, which costs as much as a layer.)


class _Linear(torch.autograd.Function):
    """Under autocast the parameters are cast here, so that their gradients are not rounded to half on the way."""

    @staticmethod
    def forward(ctx, x, weight, bias, direction, bias_direction, probe, segments):
        _, cast = _autocast(x, weight)
        ctx.save_for_backward(x, weight, bias, direction, bias_direction, probe, segments, cast)
        return F.linear(x, cast, bias).detach()  # with a bias a view, which could not be changed in place

    @staticmethod
    def written_out(x, weight, bias, direction, bias_direction, probe, segments):
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        if direction is not None:
            y = y + _shifted(probe, lambda d: F.linear(x, d), direction, weight.dim(), segments)
        if bias_direction is not None:
            y = y + _shifted(probe, lambda d: d.expand(y.shape), bias_direction, 1, segments)
        return y

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return _written_out_backward(_Linear.written_out, ctx.saved_tensors[:-1], ctx.needs_input_grad, grad)
        x, weight, bias, direction, bias_direction, probe, segments, cast = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _, need_probe, _ = ctx.needs_input_grad
        direction, bias_direction = (direction, bias_direction) if need_probe else (None, None)
        acts, grads = rows(x, 1), rows(grad, 1)
        segments = by_row(segments, x, acts)
        grad_x = grad @ cast if need_x else None
        bias_dtype = None if bias is None else bias.dtype
        if direction is not None and need_weight and (bias is None or (need_bias and bias_direction is not None)):
            found = ops.layer_wgrad_dot(acts, grads, direction, bias_direction, segments, weight.dtype)
            if found is not None:
                grad_weight, grad_bias, dots = found
                grad_weight = grad_weight if grad_weight.dtype is weight.dtype else grad_weight.to(weight.dtype)
                if grad_bias.dtype is not bias_dtype:
                    grad_bias = None if bias is None else grad_bias.to(bias_dtype)
                dots = dots if probe.dtype is torch.float32 else dots.to(probe.dtype)
                return grad_x, grad_weight, grad_bias, None, None, dots, None
        if not (direction is None or bias_direction is None) and need_weight and direction.stride(-1) == 1:
            grad_weight, grad_bias, dots = linear_wgrad_dot(
                acts, grads, direction, bias_direction, segments=segments, grad_dtype=weight.dtype
            )
            grad_bias, bias_dots = grad_bias.to(bias_dtype) if need_bias else None, None
        else:
            grad_weight, dots = _weight_gradient(acts, grads, direction, need_weight, weight.dtype, segments)
            grad_bias, bias_dots = _bias_gradient(grads, bias_direction, need_bias, bias_dtype, segments)
        return grad_x, grad_weight, grad_bias, None, None, _add(dots, bias_dots, probe), None


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, direction, probe, segments, padding_idx):
        ctx.padding_idx = padding_idx
        ctx.save_for_backward(ids, weight, direction, probe, segments)
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    def written_out(ids, weight, direction, probe, segments, padding_idx):
        moved = _shifted(probe, lambda d: F.embedding(ids, d), direction, 2, segments)
        if padding_idx is not None:
            moved = moved * (ids != padding_idx).unsqueeze(-1)
        return F.embedding(ids, weight, padding_idx) + moved

    @staticmethod
    def backward(ctx, grad):
        ids, weight, direction, probe, segments = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (ids, weight, direction, probe, segments, ctx.padding_idx)
            return _written_out_backward(_Embedding.written_out, inputs, ctx.needs_input_grad, grad)
        _, need_weight, _, need_probe, _, _ = ctx.needs_input_grad
        pad = -1 if ctx.padding_idx is None else ctx.padding_idx % weight.shape[0]
        grad_weight = dots = None
        if need_weight:
            grad_weight = torch.ops.aten.embedding_dense_backward(grad, ids, weight.shape[0], pad, False)
        if need_probe:
            tokens, pad_row = ids.reshape(ids.shape[0], -1), None if pad < 0 else pad
            segments = by_row(segments, ids, tokens)
            dots = embedding_dot(tokens, rows(grad, 1), direction, segments=segments, padding_idx=pad_row)
        return None, grad_weight, None, _add(dots, None, probe), None, None


class _LayerNorm(torch.autograd.Function):
    """Torch's own layer norm. Where there is no kernel for its backward and the dots together: it is linear in its
    parameters, so its derivative along the direction is the layer norm with the direction for parameters, and a
    sample's dot contracts that with the output's gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, direction, bias_direction, probe, segments, eps):
        y, mean, rstd = torch.native_layer_norm(x, weight.shape, weight, bias, eps)
        ctx.eps = eps
        ctx.save_for_backward(x, weight, bias, direction, bias_direction, probe, segments, mean, rstd)
        return y

    @staticmethod
    def written_out(x, weight, bias, direction, bias_direction, probe, segments, eps):
        normed = F.layer_norm(x, weight.shape, None, None, eps)
        return _Affine.written_out(normed, weight, bias, direction, bias_direction, probe, segments)

    @staticmethod
    def backward(ctx, grad):
        *inputs, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _written_out_backward(_LayerNorm.written_out, (*inputs, ctx.eps), ctx.needs_input_grad, grad)
        x, weight, bias, direction, bias_direction, probe, segments = inputs
        needs = list(ctx.needs_input_grad)
        dots = None
        if needs[5]:
            along, stats = (direction, bias_direction), (mean, rstd)
            *found, dots = _norm_backward(x, grad, weight, bias, stats, along, segments)
            if dots is not None:
                return *found, None, None, dots, None, None
        grads = torch.ops.aten.native_layer_norm_backward(grad, x, weight.shape, mean, rstd, weight, bias, needs[:3])
        if needs[5]:
            wide = x.to(probe.dtype)
            scales = torch.zeros_like(weight).expand_as(bias_direction) if direction is None else direction
            if probe.dim() == 1:
                dots = output_dots(grad, _layer_norm_along(wide, scales, bias_direction, ctx.eps), segments)
            else:
                shifts = [None] * probe.shape[1] if bias_direction is None else bias_direction
                pairs = zip(scales, shifts, strict=True)
                along = (_layer_norm_along(wide, *pair, ctx.eps) for pair in pairs)
                dots = torch.stack([output_dots(grad, one, segments) for one in along], 1)
            dots = dots.to(probe.dtype)
        return *grads, None, None, dots, None, None


class _RMSNorm(torch.autograd.Function):
    """Torch's own RMS norm, in whatever dtype it answers."""

    @staticmethod
    def forward(ctx, x, weight, direction, probe, segments, eps):
        ctx.eps = eps
        ctx.save_for_backward(x, weight, direction, probe, segments)
        return F.rms_norm(x, weight.shape, weight, eps)

    @staticmethod
    def written_out(x, weight, direction, probe, segments, eps):
        normed = F.rms_norm(x, weight.shape, None, eps)
        return _Affine.written_out(normed, weight, None, direction, None, probe, segments).to(_norm_dtype(x, normed))

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            x, *others = ctx.saved_tensors
            inputs = (x.to(torch.promote_types(x.dtype, grad.dtype)), *others, ctx.eps)  # autocast may have widened it
            return _written_out_backward(_RMSNorm.written_out, inputs, ctx.needs_input_grad, grad)
        x, weight, direction, probe, segments = ctx.saved_tensors
        need_x, need_weight, _, need_probe, _, _ = ctx.needs_input_grad
        wide = torch.promote_types(x.dtype, torch.float32)
        eps = torch.finfo(wide).eps if ctx.eps is None else ctx.eps  # torch's default, in half precision too
        if need_probe:
            grad_x, grad_weight, _, dots = _norm_backward(x, grad, weight, None, eps, (direction, None), segments)
            if dots is not None:
                return grad_x, grad_weight, None, dots, None, None
        last = weight.dim()
        axes = tuple(range(-last, 0))
        rstd = torch.rsqrt(x.to(wide).square().mean(axes, keepdim=True) + eps)
        normed, along = x.to(wide) * rstd, grad.to(wide) * weight
        grad_x = (along - normed * (along * normed).mean(axes, keepdim=True)) * rstd if need_x else None
        normed, grads = rows(normed.to(grad.dtype), last), rows(grad, last)
        dots = grad_weight = None
        if need_probe:
            segments = by_row(segments, x, grads)
            grad_weight, dots = norm_wgrad_dot(normed, grads, flat(direction, last), segments=segments)
            dots = _add(dots, None, probe)
        elif need_weight:
            grad_weight = (normed * grads).flatten(0, 1).sum(0)
        grad_x = None if grad_x is None else grad_x.to(x.dtype)
        grad_weight = None if grad_weight is None else grad_weight.view(weight.shape).to(weight.dtype)
        return grad_x, grad_weight, None, dots, None, None


def _norm_backward(x, grad, weight, bias, stats, directions, segments):
    """The gradients of a norm's input, weight and bias, and the dots; all None where no kernel has them at once."""
    scale, shift = directions
    acts, grads, last = x, grad, weight.dim()
    if last > 1:
        if any(d is not None and d.shape[-last:] != weight.shape for d in directions):
            return None, None, None, None  # torch's operations will say so
        weight, scale, shift = weight.flatten(), *(None if d is None else d.flatten(-last) for d in directions)
    if last > 1 or x.dim() != 3:
        acts, grads = rows(x, last), rows(grad, last)
        segments = by_row(segments, x, acts)
    found = norm_backward(acts, grads, weight, stats, scale, shift, segments, bias is not None)
    if found is None:
        return None, None, None, None
    grad_x, grad_weight, grad_bias, dots = found
    if last > 1 or x.dim() != 3:
        grad_x, shape = grad_x.view(x.shape), x.shape[-last:]
        grad_weight, grad_bias = grad_weight.view(shape), None if grad_bias is None else grad_bias.view(shape)
    if weight.dtype is not torch.float32:
        grad_weight = grad_weight.to(weight.dtype)
    if grad_bias is not None and bias.dtype is not torch.float32:
        grad_bias = grad_bias.to(bias.dtype)
    return grad_x, grad_weight, grad_bias, dots


def _layer_norm_along(x: Tensor, scale: Tensor, shift: Tensor | None, eps: float) -> Tensor:
    shift = None if shift is None else shift.to(x.dtype)
    return F.layer_norm(x, scale.shape, scale.to(x.dtype), shift, eps)


class _Affine(torch.autograd.Function):
    """`normed * weight + bias`, the learned part of a norm layer."""

    @staticmethod
    def forward(ctx, normed, weight, bias, direction, bias_direction, probe, segments):
        ctx.save_for_backward(normed, weight, bias, direction, bias_direction, probe, segments)
        return normed * weight if bias is None else torch.addcmul(bias, normed, weight)

    @staticmethod
    def written_out(normed, weight, bias, direction, bias_direction, probe, segments):
        y = normed * weight if bias is None else normed * weight + bias
        if direction is not None:
            y = y + _shifted(probe, lambda d: normed * d, direction, weight.dim(), segments)
        if bias_direction is not None:
            y = y + _shifted(probe, lambda d: d.expand(y.shape), bias_direction, weight.dim(), segments)
        return y

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return _written_out_backward(_Affine.written_out, ctx.saved_tensors, ctx.needs_input_grad, grad)
        normed, weight, bias, direction, bias_direction, probe, segments = ctx.saved_tensors
        need_normed, need_weight, need_bias, _, _, need_probe, _ = ctx.needs_input_grad
        last = weight.dim()
        grad_normed = (grad * weight).to(normed.dtype) if need_normed else None
        grads = rows(grad, last)
        segments = by_row(segments, grad, grads)
        grad_weight = grad_bias = dots = bias_dots = None
        if direction is not None and need_probe:
            normed_rows = rows(normed, last).to(grads.dtype)
            grad_weight, dots = norm_wgrad_dot(normed_rows, grads, flat(direction, last), segments=segments)
            grad_weight = grad_weight.view(weight.shape).to(weight.dtype) if need_weight else None
        elif need_weight:
            grad_weight = (normed * grad).flatten(0, -last - 1).sum(0).to(weight.dtype)
        if bias is not None:
            along = None if bias_direction is None or not need_probe else flat(bias_direction, last)
            grad_bias, bias_dots = _bias_gradient(grads, along, need_bias, bias.dtype, segments)
            grad_bias = None if grad_bias is None else grad_bias.view(bias.shape)
        return grad_normed, grad_weight, grad_bias, None, None, _add(dots, bias_dots, probe), None


class _Bias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, direction, probe, segments):
        ctx.save_for_backward(x, bias, direction, probe, segments)
        return x + bias

    @staticmethod
    def written_out(x, bias, direction, probe, segments):
        y = x + bias
        return y + _shifted(probe, lambda d: d.expand(y.shape), direction, bias.dim(), segments)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return _written_out_backward(_Bias.written_out, ctx.saved_tensors, ctx.needs_input_grad, grad)
        x, bias, direction, probe, segments = ctx.saved_tensors
        need_x, need_bias, _, need_probe, _ = ctx.needs_input_grad
        last = bias.dim()
        along = flat(direction, last) if need_probe else None
        grads = rows(grad, last)
        grad_bias, dots = _bias_gradient(grads, along, need_bias, bias.dtype, by_row(segments, grad, grads))
        grad_bias = None if grad_bias is None else grad_bias.view(bias.shape)
        return grad.to(x.dtype) if need_x else None, grad_bias, None, _add(dots, None, probe), None


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, tangents, probe, segments):
        ctx.save_for_backward(tangents, probe, segments)
        return out.detach()  # no view of `out`, so that what follows may write into it

    @staticmethod
    def written_out(out, tangents, probe, segments):
        return out + _shifted(probe, lambda d: d, tangents, out.dim(), segments)

    @staticmethod
    def backward(ctx, grad):
        tangents, probe, segments = ctx.saved_tensors
        if probe.dim() == 1:
            dots = output_dots(grad, tangents, segments)
        else:
            dots = torch.stack([output_dots(grad, t, segments) for t in tangents], 1)
        return grad, None, dots.to(probe.dtype), None


class Alias(torch.autograd.Function):
    """A tensor as an output of its own, whose gradient is what came before it is changed in place."""

    @staticmethod
    def forward(ctx, out):
        return out.detach()

    @staticmethod
    def backward(ctx, grad):
        return grad


def _written_out_backward(written_out, inputs, needs_input_grad, grad):
    wanted = [i for i, needed in enumerate(needs_input_grad) if needed]
    y = written_out(*inputs)
    found = torch.autograd.grad(y, [inputs[i] for i in wanted], grad, create_graph=True, materialize_grads=True)
    by_index = dict(zip(wanted, found, strict=True))
    return tuple(by_index.get(i) for i in range(len(inputs)))


def write_out(on: bool) -> None:
    """Whether layers are written out from now on. A forward-mode pass says so: a graph being captured does not see
    torch's own count of such passes change."""
    global _writing_out
    _writing_out = on


def _apply(function: Any, *inputs: Any) -> Tensor:
    # Inside a forward-mode pass the written-out layer carries tangents through torch's own formulas.
    if _writing_out or forward_ad._current_level >= 0:
        return function.written_out(*inputs)
    return function.apply(*inputs)


def _placed(x: Tensor, probe: Tensor, segments: Tensor | None) -> Tensor:
    """`x` with the axis in front that the probe counts; documents say nothing of rows, their `x` has all of them."""
    return by_sample(x, probe.shape[0]) if segments is None else x


def by_row(segments: Tensor | None, x: Tensor, x_rows: Tensor) -> Tensor | None:
    """Offsets into the tokens of `x [B, T, ..., I]` as offsets into its rows `[B, T * ..., I]`."""
    if segments is None or x_rows.shape[1] == x.shape[1]:
        return segments
    return segments * (x_rows.shape[1] // x.shape[1])


def output_dots(grad: Tensor, tangents: Tensor, segments: Tensor | None) -> Tensor:
    """`<grad, tangents>` of each row of two `[B, ...]` tensors, or of each document of two `[B, T, ...]`."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if segments is None:
        return (grad * tangents).reshape(len(grad), -1).sum(1, dtype=dtype)
    grads, shifts = (x.reshape(*x.shape[:2], -1) for x in (grad, tangents))
    return norm_dot(shifts.to(grads.dtype), grads, grads.new_ones(grads.shape[2]), segments=segments)


def ids_by_sample(ids: Tensor, batch: int) -> Tensor:
    """Token ids with the sample axis in front: `[B, ...]`, from `[B, ...]`, `[1, ...]` or positions `[T]`.

    As many positions as samples look like an id for each: 0, 1, ... is refused, and of four or more any run of numbers.
    """
    if ids.dim() == 1:
        if ids.shape[0] != batch:
            ids = ids.unsqueeze(0)
        elif batch > 1:
            apart = ~may_be_positions(ids)
            torch._assert_async(apart, f"ids: {positions(batch)}")  # pyright: ignore[reportPrivateImportUsage]
    return by_sample(ids, batch)


def may_be_positions(ids: Tensor) -> Tensor:
    """Whether ids `[B]` could be positions: a scalar."""
    batch = ids.shape[0]
    return (ids.diff() == 1 if batch > 3 else ids == torch.arange(batch, device=ids.device)).all()


def positions(batch: int) -> str:
    """What is wrong with such ids; shorter than the 255 characters that a GPU takes."""
    return (
        f"expected [B, ...], or positions [T] with T other than B; got 0..{batch - 1}, or another run of numbers, for "
        f"{batch} samples, which could be either. Pass positions as [1, T], one id for each sample as [B, 1]."
    )


def by_sample(x: Tensor, batch: int) -> Tensor:
    """`x` with the sample axis in front: itself if it is `[B, ...]`, expanded if it is `[1, ...]`."""
    if x.dim() >= 1 and x.shape[0] == batch:
        return x
    if x.dim() >= 2 and x.shape[0] == 1:
        return x.expand(batch, *x.shape[1:])
    raise ValueError(
        f"input: expected shape [B, ...] with B = {batch}, the number of sample ids or packed rows (or 1, "
        f"shared by all); got {tuple(x.shape)}" + (_of_rows(x.shape[0], batch) if x.dim() > 1 else "")
    )


def _of_rows(rows: int, batch: int) -> str:
    if batch == 1:
        return "; of documents packed into several rows, tokens= tells how long a row is"
    if rows % batch:
        return ""
    return (
        f". {rows // batch} rows to a sample: where they are samples, as of pairs, give each an id and add their "
        "values up; where they are its tokens, flattened, name a module around the layer that returns [B, ...], "
        "track(..., through={parameter: module})"
    )


def _autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """The casts autocast makes of tensors (or None) before a matrix product of `x`, made where autograd sees them."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        return tuple(None if y is None else y.to(dtype) for y in (x, *others))
    return x, *others


def _norm_dtype(x: Tensor, normed: Tensor) -> torch.dtype:
    """Torch's norms keep the input's dtype, or the one autocast normalised in, whatever the weight's is."""
    return normed.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype


def rows(x: Tensor, last: int) -> Tensor:
    """`[B, ..., *last dims]` as `[B, T, I]`: the layout of the kernels."""
    x = x.flatten(-last) if last > 1 else x
    return x if x.dim() == 3 else x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def flat(direction: Tensor, last: int) -> Tensor:
    """A direction of `last` dimensions (and perhaps a leading M) as `[I]` or `[M, I]`."""
    return direction.flatten(-last) if last > 1 else direction


def _shifted(probe: Tensor, layer, direction: Tensor, ndim: int, segments: Tensor | None) -> Tensor:
    """`sum_m probe[b, m] * layer(direction[m])`."""
    if direction.dim() == ndim:
        pairs = [(probe, direction)]
    else:
        pairs = list(zip(probe.unbind(1), direction.unbind(0), strict=True))
    terms = []
    for weights, one in pairs:
        y = layer(one)
        if segments is not None:  # a document's probe at each of its tokens
            weights = weights.repeat_interleave(segments.diff(), output_size=y.shape[0] * y.shape[1])
            weights = weights.view(y.shape[:2])
        terms.append(weights.to(y.dtype).view(*weights.shape, *[1] * (y.dim() - weights.dim())) * y)
    return sum(terms[1:], terms[0])


def _weight_gradient(acts, grads, direction, need_weight, dtype, segments):
    if direction is None:
        return (grads.flatten(0, 1).t() @ acts.flatten(0, 1)).to(dtype) if need_weight else None, None
    if not need_weight:
        return None, ghost_dot(acts, grads, direction, segments=segments)
    if direction.stride(-1) != 1:  # a transposed weight (conv1d): exchange the factors, keep memory in order
        grad_weight, dots = ghost_wgrad_dot(grads, acts, direction.mT, segments=segments, grad_dtype=dtype)
        return grad_weight.t(), dots
    return ghost_wgrad_dot(acts, grads, direction, segments=segments, grad_dtype=dtype)


def _bias_gradient(grads, direction, need_bias, dtype, segments):
    if direction is None:
        return (grads.flatten(0, 1).sum(0).to(dtype) if need_bias else None), None
    grad_bias, dots = bias_wgrad_dot(grads, direction, segments=segments)
    return (grad_bias.to(dtype) if need_bias else None), dots


def _add(a: Tensor | None, b: Tensor | None, probe: Tensor) -> Tensor | None:
    total = b if a is None else a if b is None else a + b
    return None if total is None else total.to(probe.dtype)
