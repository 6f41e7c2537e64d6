"""Convolutions of any dimension whose backward also returns per-sample gradient dots.

    dot_b = <dL/dy[b], conv(x[b], D)> + <sum of dL/dy[b] over positions, D_bias>

One convolution more than the layer's own three, by torch's own kernels: nothing is unfolded, and nothing larger than
the layer's output is formed. See `functional.py` for probes and directions.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import probing
from .probing import Directions


class Geometry(NamedTuple):
    """How a convolution moves, as torch's layers hold it."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, directions: Directions, probe: Tensor, geometry: Geometry
) -> Tensor:
    """`torch.nn.functional.conv1d`, `conv2d` or `conv3d`, zero-padded, that scores its samples.

    Args:
        x: `[B, C, *size]`; weight: `[O, C / groups, *kernel]`; bias: `[O]` or None.
        directions: `(weight_direction, bias_direction)`, each the parameter's shape (or `[M, *shape]`) or None.
        probe: `[B]` (or `[B, M]`) zeros with `requires_grad=True`.

    Raises:
        ValueError: `x` has no sample axis, or another number of samples than the probe.
    """
    if x.dim() != weight.dim():
        raise ValueError(f"input: expected shape [B, C, ...] of {weight.dim()} dimensions, got {tuple(x.shape)}")
    x = probing.by_sample(x, probe.shape[0])
    x, weight, bias = probing.autocast(x, weight, bias)
    return probing.apply(_Convolution, x, weight, bias, *directions, probe, geometry)


def convolution_dots(x: Tensor, grad: Tensor, directions: Directions, geometry: Geometry) -> Tensor:
    """The dots, `[B]` or `[B, M]`, from a convolution's input and the gradient of its output."""
    direction, bias_direction = directions
    total: Any = 0.0
    if direction is not None:
        x = x.float() if x.dtype == torch.float16 else x  # float16 has no range for a direction
        slices = [direction] if direction.dim() == x.dim() else direction.unbind(0)
        dots = [probing.output_dots(grad, _convolve(x, d.to(x.dtype), geometry), None) for d in slices]
        total = dots[0] if direction.dim() == x.dim() else torch.stack(dots, 1)
    if bias_direction is not None:
        bias_direction = bias_direction.to(torch.promote_types(bias_direction.dtype, torch.float32))
        sums = grad.flatten(2).sum(2, dtype=bias_direction.dtype)  # [B, O]
        total = total + (sums @ bias_direction.mT if bias_direction.dim() > 1 else sums @ bias_direction)
    return total


def _convolve(x: Tensor, weight: Tensor, geometry: Geometry, bias: Tensor | None = None) -> Tensor:
    stride, padding, dilation, groups = geometry
    return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0] * len(stride), groups)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, direction, bias_direction, probe, geometry):
        ctx.geometry = geometry
        ctx.save_for_backward(x, weight, bias, direction, bias_direction, probe)
        return _convolve(x, weight, geometry, bias)

    @staticmethod
    def written_out(x, weight, bias, direction, bias_direction, probe, geometry):
        y = _convolve(x, weight, geometry, bias)
        shape = (1, -1, *[1] * (y.dim() - 2))
        y = probing.shifted(y, probe, lambda d: _convolve(x, d.to(x.dtype), geometry), direction, weight.dim(), None)
        return probing.shifted(y, probe, lambda d: d.view(shape).expand(y.shape), bias_direction, 1, None)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            inputs = (*ctx.saved_tensors, ctx.geometry)
            return probing.written_out_backward(_Convolution.written_out, inputs, ctx.needs_input_grad, grad)
        x, weight, bias, direction, bias_direction, probe = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.geometry
        need_x, need_weight, need_bias, _, _, need_probe, _ = ctx.needs_input_grad
        sizes = None if bias is None else list(bias.shape)
        grads = torch.ops.aten.convolution_backward(
            grad, x, weight, sizes, stride, padding, dilation, False, [0] * len(stride), groups,
            [need_x, need_weight, need_bias],
        )  # fmt: skip
        dots = None
        if need_probe:
            dots = convolution_dots(x, grad, (direction, bias_direction), ctx.geometry).to(probe.dtype)
        return *grads, None, None, dots, None
