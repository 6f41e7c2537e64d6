"""What the layer functions of `functional.py` have in common: how a probe enters a layer, whose rows are whose, and the
derivative that is written out in plain torch operations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from inrun_kernels import bias_wgrad_dot, norm_dot

Directions = tuple[Tensor | None, Tensor | None]
_writing_out = False


def attach(out: Tensor, tangents: Tensor, probe: Tensor, segments: Tensor | None = None) -> Tensor:
    """Score samples by forward-mode tangents: `out`, with `dL/dprobe[b] = <dL/dout[b], tangents[b]>`.

    Args:
        out: `[B, ...]`, any layer's output whose rows belong to samples.
        tangents: the derivative of `out` along the direction: `out`'s shape (or `[M, *out.shape]`).
        probe, segments: as in `linear`.

    Returns:
        `out` itself, with the dots added to its backward.

    Raises:
        ValueError: the probe has another number of documents or directions.
    """
    require_probe(probe, segments, (tangents, out.dim()))
    if segments is not None:
        placed(out, probe, segments, 0, "out")
    if tangents.shape[-out.dim() :] != out.shape or (segments is None and len(probe) != len(out)):
        raise ValueError(
            f"attach: expected an entry of the probe for each of {len(out)} samples, and tangents [..., "
            f"{', '.join(map(str, out.shape))}]; got {tuple(probe.shape)} and {tuple(tangents.shape)}"
        )
    return apply(_Attach, out, tangents, probe, segments)


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, tangents, probe, segments):
        ctx.save_for_backward(tangents, probe, segments)
        return out.detach()  # no view of `out`, so that what follows may write into it

    @staticmethod
    def written_out(out, tangents, probe, segments):
        return shifted(out, probe, lambda d: d, tangents, out.dim(), segments)

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

    @staticmethod
    def jvp(ctx, tangent):
        return tangent.view_as(tangent)


def written_out_backward(written_out, inputs, needs_input_grad, grad):
    wanted = [i for i, needed in enumerate(needs_input_grad) if needed]
    # Views: an input may come from the same probe, or weight, by earlier layers, to which autograd would go on.
    inputs = [x.view_as(x) if needed else x for x, needed in zip(inputs, needs_input_grad, strict=True)]
    y = written_out(*inputs)
    found = torch.autograd.grad(y, [inputs[i] for i in wanted], grad, create_graph=True, materialize_grads=True)
    by_index = dict(zip(wanted, found, strict=True))
    return tuple(by_index.get(i) for i in range(len(inputs)))


def write_out(on: bool) -> None:
    """Whether layers are written out from now on. A forward-mode pass says so: a graph being captured does not see
    torch's own count of such passes change."""
    global _writing_out
    _writing_out = on


def writes_out() -> bool:
    """Whether a forward-mode pass of ours is going on."""
    return _writing_out


def apply(function: Any, *inputs: Any) -> Tensor:
    # Inside a forward-mode pass the written-out layer carries tangents through torch's own formulas.
    if _writing_out or forward_ad._current_level >= 0:
        return function.written_out(*inputs)
    return function.apply(*inputs)


def placed(x: Tensor, probe: Tensor, segments: Tensor | None, last: int, name: str = "x") -> Tensor:
    """`x` with the axis in front that the probe counts; documents say nothing of rows, their `x` has all of them, and
    tokens before its `last` dimensions."""
    if segments is None:
        return by_sample(x, probe.shape[0])
    if x.dim() < 2 + last:
        raise ValueError(f"{name}: expected [B, T, ...{', I' * (last > 0)}] with segments, got {tuple(x.shape)}")
    return x


def require_probe(probe: Tensor, segments: Tensor | None, *directions: tuple[Tensor | None, int]) -> None:
    """Raise `ValueError` unless the probe has an entry for each document and direction: autograd would add dots up to
    its shape.

    Args:
        directions: each one, and the dimensions of what it is the direction of.
    """
    for direction, dims in directions:
        if direction is None:
            continue
        if probe.dim() == 0 or probe.shape[1:] != direction.shape[: max(0, direction.dim() - dims)]:
            wanted = f"[B, {len(direction)}], as there are {len(direction)} directions" if direction.dim() > dims else (
                "[B], as there is one direction")  # fmt: skip
            raise ValueError(f"probe: expected {wanted}; got {tuple(probe.shape)}")
    if segments is not None and len(probe) != len(segments) - 1:
        raise ValueError(
            f"probe: expected an entry for each of {len(segments) - 1} documents, got {tuple(probe.shape)}"
        )


def require_like(direction: Tensor | None, parameter: Tensor | None, of: str, name: str = "direction") -> None:
    """Raise `ValueError` unless a direction has the shape of its parameter, or `[M, *shape]`: the kernels have both
    flattened, and would pair what does not belong together."""
    if direction is None or (parameter is not None and direction.shape == parameter.shape):
        return
    if parameter is None:
        raise ValueError(f"{name}: expected None, as there is no {of}, got {tuple(direction.shape)}")
    if direction.shape[direction.dim() - parameter.dim() :] != parameter.shape:
        raise ValueError(f"{name}: expected {tuple(parameter.shape)}, as the {of}, got {tuple(direction.shape)}")


def by_row(segments: Tensor | None, x: Tensor, x_rows: Tensor) -> Tensor | None:
    """Offsets into the tokens of `x [B, T, ..., I]` as offsets into its rows `[B, T * ..., I]`."""
    if segments is None or x_rows.shape[1] == x.shape[1]:
        return segments
    return segments * (x_rows.shape[1] // x.shape[1])


def output_dots(grad: Tensor, tangents: Tensor, segments: Tensor | None) -> Tensor:
    """`<grad, tangents>` of each row of two `[B, ...]` tensors, or of each document of two `[B, T, ...]`."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    if segments is None:  # products of half precision would overflow
        products = grad.to(dtype) * tangents
        return products.sum(tuple(range(1, products.dim()))) if products.dim() > 1 else products
    grads, shifts = ((x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)).to(dtype) for x in (grad, tangents))
    return norm_dot(shifts, grads, grads.new_ones(grads.shape[2]), segments=segments)


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
        return ". Give each row an id; of documents packed into several rows, tokens= tells how long a row is"
    if rows % batch:
        return (
            ". Where a step has several forwards, step.batch(ids) comes before each; an evaluation within the step "
            "goes into tracker.paused(); a layer that sees some of the samples is scored by a module around it that "
            "returns [B, ...], track(..., through={parameter: module})"
        )
    return (
        f". {rows // batch} rows to a sample: where they are samples, as of pairs, give each an id and add their "
        "values up; where they are parts of it, as tokens or windows, name a module around the layer that returns "
        "[B, ...], track(..., through={parameter: module})"
    )


def autocast(x: Tensor, *others: Any) -> tuple[Any, ...]:
    """The casts autocast makes of tensors (or None) before a matrix product of `x`, made where autograd sees them."""
    if not autocasts(x):
        return x, *others
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(None if y is None else y.to(dtype) for y in (x, *others))


def autocasts(x: Tensor) -> bool:
    """Whether autocast makes any of a matrix product of `x`."""
    return torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64


def rows(x: Tensor, last: int) -> Tensor:
    """`[B, ..., *last dims]` as `[B, T, I]`: the layout of the kernels."""
    x = x.flatten(-last) if last > 1 else x
    return x if x.dim() == 3 else x.reshape(x.shape[0], math.prod(x.shape[1:-1]), x.shape[-1])


def flat(direction: Tensor, last: int) -> Tensor:
    """A direction of `last` dimensions (and perhaps a leading M) as `[I]` or `[M, I]`."""
    return direction.flatten(-last) if last > 1 else direction


def shifted(out: Tensor, probe: Tensor, layer, direction: Tensor | None, ndim: int, segments: Tensor | None) -> Tensor:
    """`out + sum_m probe[b, m] * layer(direction[m])`, in the dtype of `out`; without a direction `out` itself."""
    if direction is None:
        return out
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
    return out + sum(terms[1:], terms[0]).to(out.dtype)


def bias_gradient(grads, direction, need_bias, dtype, segments):
    """The bias's gradient in `dtype` and its dots, each None where it is not due; `grads` is `[B, T, O]`."""
    if direction is None:
        return (grads.flatten(0, 1).sum(0).to(dtype) if need_bias else None), None
    grad_bias, dots = bias_wgrad_dot(grads, direction, segments=segments)
    return (grad_bias.to(dtype) if need_bias else None), dots


def added(a: Tensor | None, b: Tensor | None, probe: Tensor) -> Tensor | None:
    """Two layers' dots as one gradient of the probe; None where there are none."""
    total = b if a is None else a if b is None else a + b
    return None if total is None else total.to(probe.dtype)
