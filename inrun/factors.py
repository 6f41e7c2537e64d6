"""Gradients in factors: what a layer with a rule keeps of its parameters' gradients is enough to make any of them.

A sample's gradient is the sum over its tokens, and over the runs of all layers that share the parameter.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from inrun_kernels.torch_path import sample_gradients

from .tap import Layout


class Factors(NamedTuple):
    """A parameter's gradient, as a sum over tokens of left_t right_t^T, shaped `[O, I]`, or of left_t, shaped `[O]`.

    Attributes:
        left: `[B, T, O]`; of a table ids `[B, T]`, in the place of their one-hot rows.
        right: `[B, T, I]`, or None.
    """

    left: Tensor
    right: Tensor | None


def gradients(runs: Sequence[Factors], layout: Layout, rows: Tensor, size: int, wide: torch.dtype) -> Iterator[Tensor]:
    """Some rows of each sample's gradient at a time, side by side: `[B, size * I]`, or `[S, size * I]`; of the last
    rows what is left.

    Args:
        runs: of one parameter, whose gradient is their sum.
        layout: of the batch. Single tokens count as their row.
        rows: int64, growing.
        size: how many of them at a time.
        wide: the result's dtype, float32 or float64.
    """
    of_runs = [_of_run(run, layout, rows, size, wide) for run in runs]
    return (functools.reduce(torch.add, parts) for parts in zip(*of_runs, strict=True))


def _of_run(run: Factors, layout: Layout, rows: Tensor, size: int, wide: torch.dtype) -> Iterator[Tensor]:
    left, right = run
    ends = ends_of([run], layout)
    if right is not None and left.dim() == 2:
        samples = layout.rows if ends is None else len(ends) - 1
        yield from _of_table(left, right.to(wide), owners_of(run, ends), rows, size, samples)
        return
    sides = None if ends is None or right is None else split(ends, left, right)
    for part in rows.split(size):
        if right is None:
            yield sums(left[..., part], ends, wide)
        elif sides is None:
            yield sample_gradients(right, left[..., part], wide).flatten(1)
        else:
            of_samples = [a[:, part].to(wide).T @ b.to(wide) for a, b in zip(*sides, strict=True)]
            yield torch.stack(of_samples).flatten(1)


def _of_table(ids: Tensor, right: Tensor, owners: Tensor, rows: Tensor, size: int, samples: int) -> Iterator[Tensor]:
    """Tokens are sorted by the part that holds their row, then by sample and row."""
    ids, right, every = ids.flatten().to(rows.dtype), right.flatten(0, 1), samples * size
    place = torch.searchsorted(rows, ids).clamp_(max=len(rows) - 1)
    key = (place // size * samples + owners) * size + place % size
    parts = rows.split(size)
    key = torch.where(rows[place] == ids, key, len(parts) * every)  # that of no row comes last
    key, order = key.sort(stable=True)
    starts = torch.searchsorted(key, every * torch.arange(len(parts) + 1, device=key.device)).tolist()
    for i, (part, (a, b)) in enumerate(zip(parts, pairwise(starts), strict=True)):
        ends = torch.searchsorted(key[a:b], torch.arange(i * every, (i + 1) * every + 1, device=key.device))
        yield summed(right, order[a:b], ends).view(samples, size, right.shape[1])[:, : len(part)].flatten(1)


def summed(x: Tensor, order: Tensor, ends: Tensor) -> Tensor:
    """Of every k, the sum of the rows `x[order[ends[k] : ends[k + 1]]]`, in this order whatever the device."""
    return F.embedding_bag(order, x, ends, mode="sum", include_last_offset=True)


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


def split(ends: Tensor | None, *tensors: Tensor) -> list[Sequence[Tensor]]:
    """Each sample's parts of tensors `[B, T, ...]`; the offsets of documents are read once."""
    if ends is None:
        return [x.unbind(0) for x in tensors]
    inner = ends.tolist()[1:-1]
    return [x.flatten(0, 1).tensor_split(inner) for x in tensors]


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
