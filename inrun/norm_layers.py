"""Layer norm, RMS norm, and layers that scale and shift, as `functional.py` has layers."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inrun_kernels import norm_wgrad_dot
from inrun_kernels.norms import norm_backward

from .probing import (
    Directions,
    added,
    apply,
    bias_gradient,
    by_row,
    flat,
    output_dots,
    placed,
    require_like,
    require_probe,
    rows,
    shifted,
    written_out_backward,
)


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
    if probe is None or directions is None or weight is None or weight.shape != shape:
        return F.layer_norm(x, shape, weight, bias, eps)  # of another shape, torch's error
    require_probe(probe, segments, (directions[0], weight.dim()), (directions[1], weight.dim()))
    require_like(directions[0], weight, "weight", "directions[0]")
    require_like(directions[1], bias, "bias", "directions[1]")
    x = placed(x, probe, segments, weight.dim())
    if x.is_cuda and torch.is_autocast_enabled("cuda") and x.dtype != torch.float64:  # the cast autocast makes
        x, weight, bias = x.float(), weight.float(), None if bias is None else bias.float()
    return apply(_LayerNorm, x, weight, bias, *directions, probe, segments, eps)


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
    require_probe(probe, segments, (direction, weight.dim()))
    require_like(direction, weight, "weight")
    return apply(_RMSNorm, placed(x, probe, segments, weight.dim()), weight, direction, probe, segments, eps)


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
    require_probe(probe, segments, (directions[0], weight.dim()), (directions[1], weight.dim()))
    require_like(directions[0], weight, "weight", "directions[0]")
    require_like(directions[1], bias, "bias", "directions[1]")
    return apply(_Affine, placed(normed, probe, segments, weight.dim()), weight, bias, *directions, probe, segments)


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
        y = _Affine.written_out(normed, weight, bias, direction, bias_direction, probe, segments)
        return y.to(normed.dtype)  # as torch's, whatever the weight's is

    @staticmethod
    def backward(ctx, grad):
        *inputs, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled():
            return written_out_backward(_LayerNorm.written_out, (*inputs, ctx.eps), ctx.needs_input_grad, grad)
        x, weight, bias, direction, bias_direction, probe, segments = inputs
        *of_layer, _, _, need_probe, _, _ = ctx.needs_input_grad
        dots = None
        if need_probe:
            along, stats = (direction, bias_direction), (mean, rstd)
            *found, dots = _norm_backward(x, grad, weight, bias, stats, along, segments)
            if dots is not None:
                return *found, None, None, dots, None, None
        grads = torch.ops.aten.native_layer_norm_backward(grad, x, weight.shape, mean, rstd, weight, bias, of_layer)
        if need_probe:
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
        # Torch's norms keep the input's dtype, or the one autocast normalised in, whatever the weight's is.
        dtype = normed.dtype if torch.is_autocast_enabled(x.device.type) else x.dtype
        return _Affine.written_out(normed, weight, None, direction, None, probe, segments).to(dtype)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            x, *others = ctx.saved_tensors
            inputs = (x.to(torch.promote_types(x.dtype, grad.dtype)), *others, ctx.eps)  # autocast may have widened it
            return written_out_backward(_RMSNorm.written_out, inputs, ctx.needs_input_grad, grad)
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
        normed, grads = x.to(wide) * rstd, grad.to(wide)
        along = grads * weight
        grad_x = (along - normed * (along * normed).mean(axes, keepdim=True)) * rstd if need_x else None
        normed, grads = rows(normed, last), rows(grads, last)
        dots = grad_weight = None
        if need_probe:
            segments = by_row(segments, x, grads)
            grad_weight, dots = norm_wgrad_dot(normed, grads, flat(direction.to(wide), last), segments=segments)
            dots = added(dots, None, probe)
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
        y = shifted(y, probe, lambda d: normed * d, direction, weight.dim(), segments)
        return shifted(y, probe, lambda d: d.expand(y.shape), bias_direction, weight.dim(), segments)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            return written_out_backward(_Affine.written_out, ctx.saved_tensors, ctx.needs_input_grad, grad)
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
            grad_bias, bias_dots = bias_gradient(grads, along, need_bias, bias.dtype, segments)
            grad_bias = None if grad_bias is None else grad_bias.view(bias.shape)
        return grad_normed, grad_weight, grad_bias, None, None, added(dots, bias_dots, probe), None
