"""The backward of layer norm and RMS norm with every sample's dot, in one pass over memory.

    normed = (x - mean) * rstd                  (RMS norm: mean = 0, rstd = 1 / sqrt(mean_i(x^2) + eps))
    grad_x = rstd * (h - mean_i(h) - normed * mean_i(h * normed)),  h = grads * weight      (RMS norm: no mean_i(h))
    weight_grad = sum_{b,t} grads * normed      bias_grad = sum_{b,t} grads
    dots[b] = sum_{t,i} grads * (normed * D + D_bias)

FLOPs: some 15 an element, and 4 for each direction.  Bytes: x and grads read once, grad_x written once, as in the
backward alone. Source: arXiv 2406.11011, section 4.2, for layers whose per-sample gradient is a sum of rows.
"""

import torch
from torch import Tensor

from inrun_kernels import native
from inrun_kernels.ops import launch_context, unseen, use_triton
from inrun_kernels.validation import check_grouping, check_segment_values

WIDEST = 16384  # bytes of a row: a Triton program holds it in registers

Gradients = tuple[Tensor, Tensor, Tensor | None, Tensor]


def norm_backward(
    x: Tensor,
    grads: Tensor,
    weight: Tensor,
    stats: tuple[Tensor, Tensor] | float,
    val_grad: Tensor | None,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
    has_bias: bool,
) -> Gradients | None:
    """All gradients of a norm layer, and its dots.

    Args:
        x, grads: `[B, T, I]`, the norm's input and its output's gradient.
        weight: `[I]`.
        stats: of layer norm `(mean, rstd)` of each row, as torch's returns them; of RMS norm its eps.
        val_grad, bias_val_grad: `[I]` or `[M, I]`, directions of weight and bias; either may be None, not both.
        segments: as in `ghost_wgrad_dot`.
        has_bias: whether the layer has one, of which a gradient is due.

    Returns:
        `(grad_x [B, T, I] in the dtype of x, weight_grad [I], bias_grad [I] or None, dots [S] or [S, M])`, the last
        three in float32; None where there is no kernel for these tensors.
    """
    assert val_grad is not None or bias_val_grad is not None, "a direction of either"
    known = [d for d in (val_grad, bias_val_grad) if d is not None]
    shape = known[0].shape
    if known[-1].shape != shape or shape[-1:] != weight.shape or len(shape) > 2 or not unseen():
        return None
    layer = stats if isinstance(stats, tuple) else ()
    if native.norm_fits(x, grads, weight, *known, *layer):
        run = native.norm_backward
    elif use_triton(None, x, grads) and unseen(x, grads, weight, *known):
        widest = max(x.element_size(), grads.element_size()) * x.shape[2]
        if widest > WIDEST or torch.float64 in (x.dtype, grads.dtype, weight.dtype):
            return None
        from inrun_kernels.norms_kernel import launch_norm_backward as run
    else:
        return None
    check_grouping(segments, False, x)
    check_segment_values(segments, x.shape[0] * x.shape[1])
    with launch_context(x):
        return run(x, grads, weight, stats, val_grad, bias_val_grad, segments, has_bias)
