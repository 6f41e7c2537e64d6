"""Products of groups of rows, each with a matrix of its own: the layers of a mixture of experts.

    y[n] = x[n] @ w[g]  for offsets[g - 1] <= n < offsets[g]        grouped_mm        [N, I] x [G, I, O] -> [N, O]
    w[g] = sum over the group's rows of grads[n]^T x[n]             grouped_wgrad     -> [G, O, I]

FLOPs: 2 N I O each; the sizes of the groups stay on the device. Torch's grouped product where it has one; a loop over
groups, which reads the offsets on the host, for float64 and for rows that are no multiple of 16 bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("inrun::grouped_mm", mutates_args=())
def grouped_mm(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """Rows `[N, I]`, sorted by group, times their group's matrix `[G, I, O]`.

    Args:
        x: `[N, I]`; weight: `[G, I, O]`, of the same dtype.
        offsets: int32 `[G]`, where each group ends; the last is N.

    Returns:
        `[N, O]`, in the dtype of `x`.

    Raises:
        RuntimeError: dtypes differ.

    Example:
        >>> grouped_mm(x, weight, torch.tensor([2, 2, 7], dtype=torch.int32))  # two rows, none, and five
    """
    if _has_kernel(x, weight):
        return F.grouped_mm(x.contiguous(), weight, offs=offsets)
    return by_groups(x, weight, offsets)


@grouped_mm.register_fake
def _(x, weight, offsets):
    return x.new_empty(x.shape[0], weight.shape[2])


@torch.library.custom_op("inrun::grouped_wgrad", mutates_args=())
def grouped_wgrad(x: Tensor, grads: Tensor, offsets: Tensor) -> Tensor:
    """The gradient of `grouped_mm`'s matrices, transposed as linear layers hold them.

    Args:
        x: `[N, I]`; grads: `[N, O]`, of the same dtype; both sorted by group.
        offsets: as in `grouped_mm`.

    Returns:
        `[G, O, I]`, in the dtype of `x`; zero for a group without rows.

    Raises:
        RuntimeError: dtypes differ.

    Example:
        >>> grouped_wgrad(x, grads, offsets)
    """
    if _has_kernel(x, grads):
        product = F.grouped_mm(grads.contiguous().t(), x.contiguous(), offs=offsets)
        if _zeroes_empty_groups(x.device):
            return product
        empty = offsets.diff(prepend=offsets.new_zeros(1)) == 0
        return product.masked_fill_(empty[:, None, None], 0)
    return torch.stack([grads[start:end].t() @ x[start:end] for start, end in _groups(offsets)])


@grouped_wgrad.register_fake
def _(x, grads, offsets):
    return x.new_empty(offsets.shape[0], grads.shape[1], x.shape[1])


def by_groups(x: Tensor, weight: Tensor, offsets: Tensor) -> Tensor:
    """`grouped_mm` in plain torch operations, group by group."""
    return torch.cat([x[start:end] @ weight[g] for g, (start, end) in enumerate(_groups(offsets))])


def _groups(offsets: Tensor) -> list[tuple[int, int]]:
    """Where each group of rows starts and ends, on the host."""
    ends = offsets.tolist()
    return list(zip([0, *ends[:-1]], ends, strict=True))


def _zeroes_empty_groups(device: torch.device) -> bool:
    """Whether torch's kernel does. On Blackwell it stores an accumulator that nothing was written to
    (NVIDIA/cutlass issue 2674), on AMD nothing."""
    if device.type != "cuda":
        return True
    return not torch.version.hip and torch.cuda.get_device_capability(device) < (10, 0)


def _has_kernel(x: Tensor, other: Tensor) -> bool:
    widths = (x.shape[1], other.shape[-1])
    return x.dtype != torch.float64 and all(w * x.element_size() % 16 == 0 for w in widths)
