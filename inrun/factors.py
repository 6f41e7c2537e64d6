"""Gradients in factors: what a layer with a rule keeps of its parameters' gradients is enough to make any of them.

A sample's gradient is the sum over its tokens, and over the runs of all layers that share the parameter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .tap import Layout


class Factors(NamedTuple):
    """A parameter's gradient, as a sum over tokens of left_t right_t^T, shaped `[O, I]`, or of left_t, shaped `[O]`.

    Attributes:
        left: `[B, T, O]`; of a table ids `[B, T]`, in the place of their one-hot rows.
        right: `[B, T, I]`, or None.
    """

    left: Tensor
    right: Tensor | None


def gradients(runs: Sequence[Factors], layout: Layout, rows: Tensor, wide: torch.dtype) -> Tensor:
    """Some rows of each sample's gradient, side by side: `[B, rows * I]`, or `[S, rows * I]`.

    Args:
        runs: of one parameter, whose gradient is their sum.
        layout: of the batch. Single tokens count as their row.
        rows: int64, growing.
        wide: the result's dtype, float32 or float64.
    """
    total: Tensor | float = 0.0
    for run in runs:
        ends = ends_of([run], layout)
        if run.right is None:
            total = total + sums(run.left[..., rows], ends, wide)
        elif run.left.dim() == 2:
            # Other rows' ids meet in one more, which is left out: to select would have the host wait for a device.
            size = len(rows)
            ids, right, owners = run.left.flatten(), run.right.flatten(0, 1).to(wide), owners_of(run, ends)
            here = torch.searchsorted(rows, ids.to(rows.dtype)).clamp_(max=size - 1)
            here = torch.where(rows[here] == ids, here, size)
            samples = layout.rows if ends is None else len(ends) - 1
            table = right.new_zeros(samples * (size + 1), right.shape[1])
            table.index_add_(0, owners * (size + 1) + here, right)
            total = total + table.view(samples, size + 1, -1)[:, :size].flatten(1)
        elif ends is None:
            left, right = run.left[..., rows].mT, run.right
            if left.is_cuda and left.dtype == right.dtype != wide:
                total = total + torch.bmm(left, right, out_dtype=wide).flatten(1)
            else:
                total = total + torch.bmm(left.to(wide), right.to(wide)).flatten(1)
        else:
            pairs = zip(split(run.left[..., rows], ends), split(run.right, ends), strict=True)
            total = total + torch.stack([(left.to(wide).T @ right.to(wide)).flatten() for left, right in pairs])
    assert isinstance(total, Tensor)
    return total


def sums(tokens: Tensor, ends: Tensor | None, wide: torch.dtype) -> Tensor:
    """Each sample's sum over its tokens of `[B, T, O]`: `[B, O]`, or of documents that `ends` cut `[S, O]`."""
    if ends is None:
        return tokens.sum(1, dtype=wide)
    return torch.segment_reduce(tokens.flatten(0, 1).to(wide), "sum", offsets=ends, initial=0, unsafe=True)


def ends_of(runs: Sequence[Factors], layout: Layout) -> Tensor | None:
    """Offsets of a batch's documents into the tokens of all these runs; None where rows are samples."""
    segments = None if layout.per_token else layout.on(runs[0].left.device).segments
    if segments is None or layout.tokens is None:
        return None
    return segments * (sum(run.left.shape[1] for run in runs) // layout.tokens)


def owners_of(run: Factors, ends: Tensor | None) -> Tensor:
    """Of each of a run's tokens, the number of its sample."""
    batch, tokens = run.left.shape[:2]
    if ends is None:
        return torch.arange(batch, device=run.left.device).repeat_interleave(tokens)
    documents = torch.arange(len(ends) - 1, device=ends.device)
    return documents.repeat_interleave(ends.diff(), output_size=batch * tokens)


def split(x: Tensor, ends: Tensor | None) -> Sequence[Tensor]:
    """Each sample's part of `[B, T, ...]`."""
    if ends is None:
        return x.unbind(0)
    flat = x.flatten(0, 1)
    return [flat[a:b] for a, b in pairwise(ends.tolist())]


def joined(runs: Sequence[Factors], layout: Layout) -> tuple[Factors, Tensor | None]:
    """Several runs with right factors as one in which a sample has the tokens of all, and its documents' offsets."""
    ends = ends_of(runs, layout)
    if len(runs) == 1:
        return runs[0], ends
    lefts, rights = [run.left for run in runs], [run.right for run in runs if run.right is not None]
    if ends is None:
        return Factors(torch.cat(lefts, 1), torch.cat(rights, 1)), None
    order = torch.cat([owners_of(run, ends_of([run], layout)) for run in runs]).argsort(stable=True)
    both = (torch.cat([x.flatten(0, 1) for x in xs])[order].unsqueeze(0) for xs in (lefts, rights))
    return Factors(*both), ends
