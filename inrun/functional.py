"""Drop-in layer functions whose backward also returns per-sample gradient dots.

Every function here computes the ordinary layer, with the true derivative of one written with a *probe*:

    y[b] = f(x[b]; W + sum_m probe[b, m] * D[m])          at probe = 0

so the gradient of `probe` is the dot of each sample's own parameter gradient with the direction D,

    dL/dprobe[b, m] = <dL/dW through sample b, D[m]>.

Autograd itself then adds layers, reuses, tied weights and microbatches up. Nothing of size B x O x I is formed.

Shapes: `x` is `[B, ..., I]`, dimension 0 being the sample (a leading 1 is broadcast over the samples). With one
direction, `probe` is `[B]` and a direction has its parameter's shape; with M of them, `[B, M]` and `[M, *shape]`.
`directions` pairs the weight's with the bias's; either may be None. Gradients have the dtypes torch would give them;
the probe's has its own dtype: float32 or float64 lose nothing. With `probe=None` each function but `affine` and
`attach` is exactly torch's own.

Packed documents: with `segments`, int64 offsets `[S + 1]` into the B*T tokens of an `x` that is `[B, T, ...]`, the
probe is `[S]` (or `[S, M]`) and each document has a dot; offsets 0, 1, ..., B*T give every token its own.

Second derivatives and forward-mode AD go through the written-out expression above, in plain torch operations.

Source: In-Run Data Shapley, arXiv 2406.11011, section 4.2 (ghost dot-product), as one autograd function.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from inrun_kernels import bias_dot, embedding_dot, ghost_dot, ghost_wgrad_dot, linear_wgrad_dot, ops

from .norm_layers import affine, layer_norm, rms_norm
from .probing import (
    Directions,
    added,
    apply,
    attach,
    autocast,
    autocasts,
    bias_gradient,
    by_row,
    ids_by_sample,
    placed,
    require_like,
    require_probe,
    rows,
    shifted,
    written_out_backward,
)

__all__ = ["Directions", "affine", "attach", "bias", "conv1d", "embedding", "layer_norm", "linear", "rms_norm"]


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
        ValueError: the leading dimension of `x` is neither the probe's number of samples nor 1; a direction of another
            shape, or of a bias that is not there; the probe has another number of documents or directions.

    Example:
        >>> probe = torch.zeros(len(x), requires_grad=True)
        >>> linear(x, weight, bias, (weight_direction, bias_direction), probe).square().sum().backward()
        >>> probe.grad                                      # [B]: <this sample's gradient, the direction>
    """
    if probe is None or directions is None:
        return F.linear(x, weight, bias)
    require_probe(probe, segments, (directions[0], 2), (directions[1], 1))
    require_like(directions[0], weight, "weight", "directions[0]")
    require_like(directions[1], bias, "bias", "directions[1]")
    (x,) = autocast(placed(x, probe, segments, 1))
    return apply(_Linear, x, weight, bias, *directions, probe, segments)


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
        ValueError: the leading dimension of `ids` is neither the number of samples nor 1; a direction of another shape,
            or a probe of another number of documents or directions.
        RuntimeError: `ids` is `0, 1, ..., B-1`, or with B of 4 or more any consecutive run: positions and one id per
            sample look alike.
    """
    if probe is None or direction is None:
        return F.embedding(ids, weight, padding_idx)
    require_probe(probe, segments, (direction, 2))
    require_like(direction, weight, "weight")
    ids = ids_by_sample(ids, probe.shape[0]) if segments is None else placed(ids, probe, segments, 0, "ids")
    return apply(_Embedding, ids, weight, direction, probe, segments, padding_idx)


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
    require_probe(probe, segments, (direction, bias.dim()))
    require_like(direction, bias, "bias")
    y, lead = placed(x, probe, segments, min(1, bias.dim())) + bias, direction.shape[: direction.dim() - bias.dim()]
    tangents = direction.view(*lead, *[1] * (y.dim() - bias.dim()), *bias.shape).expand(*lead, *y.shape)
    return attach(y, tangents, probe, segments)


def scored_linear(
    y: Tensor, x: Tensor, directions: Directions, probe: Tensor, segments: Tensor | None = None
) -> Tensor:
    """`y`, which a layer has made of `x` nearly as `linear` does and by a backward of its own, that scores its samples
    by `x` and the gradient of `y`, as they are before the layer rounds them."""
    (x,) = autocast(placed(x, probe, segments, 1))
    return apply(_Scored, placed(y, probe, segments, 1), x.detach(), *directions, probe, segments)


# Each layer but `bias` is one autograd function. `written_out` is the layer with its probe in place, in plain torch
# operations: the fast backward is its gradient at probe = 0, and what a derivative of the backward goes through.
# (Forwards take `ctx`: with `setup_context` torch binds the arguments by inspection at every call, which costs as much
# as a layer.)


class _Linear(torch.autograd.Function):
    """Under autocast the parameters are cast here, so that their gradients are not rounded to half on the way."""

    @staticmethod
    def forward(ctx, x, weight, bias, direction, bias_direction, probe, segments):
        cast = weight if weight.dtype is x.dtype or not autocasts(x) else weight.to(x.dtype)  # as `linear` cast x
        y = F.linear(x, cast, bias)
        if direction is None and not ctx.needs_input_grad[1]:  # of a frozen weight: its size is all that is asked for
            x = x.new_zeros(()).expand(x.shape)
        ctx.save_for_backward(x, weight, bias, direction, bias_direction, probe, segments, cast)
        return y.detach()  # with a bias a view, which could not be changed in place

    @staticmethod
    def written_out(x, weight, bias, direction, bias_direction, probe, segments):
        y = F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return _Scored.written_out(y, x, direction, bias_direction, probe, segments)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            x, *others = ctx.saved_tensors[:-1]
            if ctx.needs_input_grad[0] and not x.requires_grad:  # the stand-in
                x = x.detach().requires_grad_()
            return written_out_backward(_Linear.written_out, (x, *others), ctx.needs_input_grad, grad)
        x, weight, bias, direction, bias_direction, probe, segments, cast = ctx.saved_tensors
        need_x, need_weight, need_bias, _, _, need_probe, _ = ctx.needs_input_grad
        direction, bias_direction = (direction, bias_direction) if need_probe else (None, None)
        acts, grads = rows(x, 1), rows(grad, 1)
        segments = by_row(segments, x, acts)
        grad_x = grad @ cast if need_x else None
        bias_dtype = None if bias is None else bias.dtype
        whole = bias is None or bias_direction is not None
        if direction is not None and need_weight and whole and segments is None:
            wide = weight.dtype if weight.dtype is acts.dtype else torch.float32
            found = ops.layer_wgrad_dot(acts, grads, direction, bias_direction, wide)
            if found is not None:
                grad_weight, grad_bias, dots = found
                grad_weight = grad_weight if grad_weight.dtype is weight.dtype else grad_weight.to(weight.dtype)
                if grad_bias.dtype is not bias_dtype:
                    grad_bias = None if bias is None else grad_bias.to(bias_dtype)
                dots = dots if probe.dtype is torch.float32 else dots.to(probe.dtype)
                return grad_x, grad_weight, grad_bias, None, None, dots, None
        # As products return it; autocast's is another half precision than the weight's.
        dtype = weight.dtype if weight.dtype in (acts.dtype, torch.float32) else None
        if not (direction is None or bias_direction is None) and need_weight and direction.stride(-1) == 1:
            grad_weight, grad_bias, dots = linear_wgrad_dot(
                acts, grads, direction, bias_direction, segments=segments, grad_dtype=dtype
            )
            grad_bias, bias_dots = grad_bias.to(bias_dtype) if need_bias else None, None
        else:
            grad_weight, dots = _weight_gradient(acts, grads, direction, need_weight, dtype, segments)
            grad_bias, bias_dots = bias_gradient(grads, bias_direction, need_bias, bias_dtype, segments)
        grad_weight = None if grad_weight is None else grad_weight.to(weight.dtype)
        return grad_x, grad_weight, grad_bias, None, None, added(dots, bias_dots, probe), None


class _Scored(torch.autograd.Function):
    """The output of a linear layer that computes its gradients itself; its dots are of the input as it is given, and of
    the output's gradient."""

    @staticmethod
    def forward(ctx, y, x, direction, bias_direction, probe, segments):
        ctx.save_for_backward(x, direction, bias_direction, probe, segments)
        return y.detach()

    @staticmethod
    def written_out(y, x, direction, bias_direction, probe, segments):
        y = shifted(y, probe, lambda d: F.linear(x.to(d.dtype), d), direction, 2, segments)
        return shifted(y, probe, lambda d: d.expand(y.shape), bias_direction, 1, segments)

    @staticmethod
    def backward(ctx, grad):
        if torch.is_grad_enabled():
            y = grad.detach().requires_grad_(ctx.needs_input_grad[0])  # what it is itself does not matter
            inputs = (y, *ctx.saved_tensors)
            return written_out_backward(_Scored.written_out, inputs, ctx.needs_input_grad, grad)
        x, direction, bias_direction, probe, segments = ctx.saved_tensors
        return grad, None, None, None, linear_dots(x, grad, direction, bias_direction, segments).to(probe.dtype), None


def linear_dots(
    x: Tensor, grad: Tensor, direction: Tensor | None, bias_direction: Tensor | None, segments: Tensor | None
) -> Tensor:
    """The dots of a linear layer, from its input and the gradient of its output."""
    acts, grads = rows(x.to(grad.dtype), 1), rows(grad, 1)
    segments, found = by_row(segments, x, acts), []
    if direction is not None and direction.stride(-1) != 1:  # a transposed weight (conv1d), as in `_weight_gradient`
        found.append(ghost_dot(grads, acts, direction.mT, segments=segments))
    elif direction is not None:
        found.append(ghost_dot(acts, grads, direction, segments=segments))
    if bias_direction is not None:
        found.append(bias_dot(grads, bias_direction, segments=segments))
    return sum(found[1:], found[0])


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, direction, probe, segments, padding_idx):
        ctx.padding_idx = padding_idx
        ctx.save_for_backward(ids, weight, direction, probe, segments)
        return F.embedding(ids, weight, padding_idx)

    @staticmethod
    def written_out(ids, weight, direction, probe, segments, padding_idx):
        counts = 1 if padding_idx is None else (ids != padding_idx % weight.shape[0]).unsqueeze(-1)
        y = F.embedding(ids, weight, padding_idx)
        return shifted(y, probe, lambda d: F.embedding(ids, d) * counts, direction, 2, segments)

    @staticmethod
    def backward(ctx, grad):
        ids, weight, direction, probe, segments = ctx.saved_tensors
        if torch.is_grad_enabled():
            inputs = (ids, weight, direction, probe, segments, ctx.padding_idx)
            return written_out_backward(_Embedding.written_out, inputs, ctx.needs_input_grad, grad)
        _, need_weight, _, need_probe, _, _ = ctx.needs_input_grad
        pad = -1 if ctx.padding_idx is None else ctx.padding_idx % weight.shape[0]
        grad_weight = dots = None
        if need_weight:
            grad_weight = torch.ops.aten.embedding_dense_backward(grad, ids, weight.shape[0], pad, False)
        if need_probe:
            tokens, pad_row = ids.flatten(1) if ids.dim() > 1 else ids.unsqueeze(1), None if pad < 0 else pad
            segments = by_row(segments, ids, tokens)
            dots = embedding_dot(tokens, rows(grad, 1), direction, segments=segments, padding_idx=pad_row)
        return None, grad_weight, None, added(dots, None, probe), None, None


def _weight_gradient(acts, grads, direction, need_weight, dtype, segments):
    if direction is None:
        return grads.flatten(0, 1).t() @ acts.flatten(0, 1) if need_weight else None, None
    if not need_weight:
        return None, ghost_dot(acts, grads, direction, segments=segments)
    if direction.stride(-1) != 1:  # a transposed weight (conv1d): exchange the factors, keep memory in order
        grad_weight, dots = ghost_wgrad_dot(grads, acts, direction.mT, segments=segments, grad_dtype=dtype)
        return grad_weight.t(), dots
    return ghost_wgrad_dot(acts, grads, direction, segments=segments, grad_dtype=dtype)
