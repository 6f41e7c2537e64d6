"""Path values of updates that turn at once (Lion's sign; Adam's first steps, which are one), and of clipped gradients.

Along the straight path from no gradient to g_B an update of the first kind jumps, in a coordinate once or not at all.
Which samples turn it is seen by the coalitions beside the path: one that every sample joins with chance t has, in each
coordinate, a gradient around t * g_B with the variance t (1 - t) * sum_z g_z^2; the Shapley value is the mean over t
of what a sample adds to it (Owen, 1972). So K is taken as the mean slope of the update between gradients on both sides,

    K = -mean over t of (u(t g_B + h) - u(t g_B - h)) / 2h,      h = 1.5 sqrt(t (1 - t) (1 - 1/n) sum_z g_z^2),

1 - 1/n as none of the n samples is beside itself, and one and a half standard deviations by trial on Lion's steps in
`inrun fidelity`. That takes two updates for each t, and the sum of the samples' squared gradients (`squares.py`). What
no slope can give, -(u(g_B) - u(0)) - K g_B, all samples that have a gradient share alike, so that values add up to what
they do along the path.

Clipping by norm is part of the update, u(c_S g_S) with a factor c for each coalition, which goes by the squared norm

    N(t)^2 = t^2 |g_B|^2 + t (1 - t) sum_z |g_z|^2,      to which a sample adds 2t <g_B, g_z> + (1 - 2t) |g_z|^2:

by half of that part c shrinks, and with it all of the coalition's gradient y, which moves u by its derivative along y.
So values have two terms more, <A, G> <g_B, g_z> and <B, G> |g_z|^2 with G the validation gradient along the step,

    A = E[u'(y) y t / N^2],      B = E[u'(y) y (1/2 - t) / N^2],      over the t at which a coalition is clipped.

The N^2 of a sample's coalition is that of the others at t and half of what it adds, in the mean over samples. Where the
update does not turn, factors are means around each t.

Source: multilinear extension, Owen, Management Science 18 (1972); equal shares of what is left, the least square values
of Ruiz, Valenciano and Zarzuelo (1998). To take the slope for the update, and clipping, are this library's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .distributed import Ranks
from .squares import Squares
from .updates import UpdateRule, chunks, sampled, updates

TURNS = 0.02  # of the squared update: how far from the middle of its ends the update of g_B / 2 lies where it turns
LENGTH = 0.1  # the part of a gradient by which it is shortened, to see how the update changes along it
FINE = 64  # values of t for the mean around one
LOOKED_AT = 1 << 12  # coordinates of each parameter, to see whether it turns
POINTS, ASIDE = 4, 1.5  # values of t, and how many standard deviations beside the path


def turns(slots: Sequence[Any], unscale: Any, update: UpdateRule | str | None, ranks: Ranks) -> bool:
    """Whether these slots' update turns too suddenly for the path; the device is waited for.

    Some coordinates of each slot tell: without a turn, the update of g_B / 2 is half way between those of 0 and g_B.
    """
    if not slots:
        return False
    total = torch.zeros(2, dtype=torch.float64, device=slots[0].param.device)
    numbered = list(enumerate(slots))
    for part in chunks(numbered) if callable(update) else [numbered]:  # a user's function has all coordinates
        some = [sampled(slot, LOOKED_AT, update) for _, slot in part]
        grads = [slot.grad.flatten()[here].double().view_as(few.param) * unscale
                 for (_, slot), (few, here) in zip(part, some, strict=True)]  # fmt: skip
        ends = [updates([few for few, _ in some], [t * g for g in grads], update) for t in (0.0, 0.5, 1.0)]
        for (_, slot), zero, half, full in zip(part, *ends, strict=True):
            squared = [(half - (zero + full) / 2).square().sum(), (full - zero).square().sum()]
            total += torch.stack(squared).to(total.device) * (slot.shard.numel() * slot.share / max(1, zero.numel()))
    aside, moved = ranks.over_parts(ranks.sum(total)).tolist()  # of all processes, so that all decide alike
    return aside > TURNS * moved


def slopes(
    of: Squares,
    slots: Sequence[Any],
    only: Set[int],
    unscale: Any,
    factor: Tensor,
    clipped: tuple[float, float] | None,
    turning: bool,
    update: UpdateRule | str | None,
    ranks: Ranks,
) -> Iterator[tuple[int, Tensor, tuple[Tensor, Tensor] | None]]:
    """Of each slot that has squares, its number, K, and where the gradient was clipped A and B; float64, and not finite
    where no sample has a gradient.

    Args:
        slots: those of `of`, whose gradients are g_B; only: the numbers of those that are meant.
        unscale: what those must still be multiplied by; factor: what the kept gradients must.
        clipped: by what g_B was multiplied when it was clipped, and its norm since; None if it was not.
        turning: whether the update turns; update: as of `updates`.
    """
    points = _points(of, slots, unscale, factor, clipped, turning, ranks)
    for part in chunks([(i, slots[i]) for i in of.of_slots if i in only]):
        here, full = [slot for _, slot in part], [slot.grad.double() * unscale for _, slot in part]
        beside = [(of.of_slots[i].double() * (1 - 1 / of.players)).sqrt() * factor.to(g.device)
                  for (i, _), g in zip(part, full, strict=True)]  # fmt: skip
        k = [torch.zeros_like(g) for g in full]
        a, b = ([torch.zeros_like(g) for g in full] if clipped is not None else [] for _ in range(2))
        for point in points:
            ends = []  # the updates at both sides of the path
            for side in (-point.x, point.x):
                at = [point.c * (point.t * g + side * h) for g, h in zip(full, beside, strict=True)]
                ends.append(updates(here, at, update))
                if point.along_g or point.along_self:
                    shorter = updates(here, [(1 - LENGTH) * y for y in at], update)
                    for i, (whole, short) in enumerate(zip(ends[-1], shorter, strict=True)):
                        a[i].add_(whole - short, alpha=point.along_g / LENGTH)
                        b[i].add_(whole - short, alpha=point.along_self / LENGTH)
            for i, (low, high) in enumerate(zip(*ends, strict=True)):
                k[i].sub_(high - low, alpha=point.weight / (2 * point.x))
        for i, (number, _) in enumerate(part):
            yield number, k[i] / beside[i], None if clipped is None else (a[i], b[i])


@dataclass
class _Point:
    """At one t, the gradients `c * (t * g_B +- x * sqrt(sum_z g_z^2))`, and what their updates count."""

    t: float
    x: float
    c: float
    weight: float  # of the slope, times what a sample's part is multiplied by at this t
    along_g: float  # of the derivative along the gradient itself, in A
    along_self: float  # in B


def _points(
    of: Squares,
    slots: Sequence[Any],
    unscale: Any,
    factor: Tensor,
    clipped: tuple[float, float] | None,
    turning: bool,
    ranks: Ranks,
) -> list[_Point]:
    """The t at which slopes are taken. What a sample's part is multiplied by is that at t itself where the update
    turns, else its mean around t."""
    shrunk, norm = (1.0, 0.0) if clipped is None else clipped
    spread, others = 0.0, 1.0
    if clipped is not None:
        parts = torch.zeros(2, dtype=torch.float64, device=factor.device)
        for i, squared in of.of_slots.items():
            g = slots[i].grad.double() * unscale
            both = torch.stack([squared.sum(dtype=g.dtype), g.square().sum()])
            parts += both.to(parts.device) * slots[i].share
        spread, here = ranks.over_shards(parts).tolist()
        others = norm**2 / here if here else 1.0  # slots without squares, taken to be as the others
        spread *= others * float(factor) ** 2

    def at(t: float) -> tuple[float, float]:
        """By how much a coalition is less shrunk than g_B was, and (where it is clipped) one over its squared norm."""
        n = of.players
        squared = t * (t + (1 - 2 * t) / n) * norm**2 + (t * (1 - t) * (1 - 2 / n) + 0.5 / n) * spread  # of shrunk ones
        if squared <= (shrunk * norm) ** 2:
            return 1 / shrunk, 0.0
        return norm / math.sqrt(squared), 1 / squared

    found = []
    for k in range(POINTS):
        t = (k + 0.5) / POINTS
        c, _ = at(t)
        near = [t] if turning else [(k + (j + 0.5) / FINE) / POINTS for j in range(FINE)]
        around = [(s, *at(s)) for s in near]  # with what the coalitions there are multiplied by
        times = c * len(near)
        less = sum(by for _, by, _ in around) / times
        along_g = sum(by * s * w for s, by, w in around) / times
        along_self = sum(by * (0.5 - s) * w for s, by, w in around) / times
        weights = less / POINTS, along_g / (2 * POINTS), others * along_self / (2 * POINTS)
        found.append(_Point(t, ASIDE * math.sqrt(t * (1 - t)), c, *weights))
    return found


class Beside:
    """What the samples of a step earn besides K, where that is not the path's.

    Args:
        factor: what the dots are multiplied by to be values.
        of_samples: as in `Squares`.
        norm: of g_B, where it was clipped.
        shares: of each slot, what counts here of a sum over it.

    Attributes:
        left: number of a slot -> -(u(g_B) - u(0)) - K g_B.
        along: -> A and B, where g_B was clipped.
    """

    def __init__(self, factor: Tensor, of_samples: dict[int, Tensor], norm: float, shares: Mapping[int, float]) -> None:
        self.left: dict[int, Tensor] = {}
        self.along: dict[int, tuple[Tensor, Tensor]] = {}
        self._factor, self._of_samples, self._norm, self._shares = factor, of_samples, norm, shares

    def tensors(self) -> Iterator[Tensor]:
        yield from self.left.values()
        yield from (x for pair in self.along.values() for x in pair)

    def along_gradients(self, gradients: Sequence[Tensor | None], ranks: Ranks) -> tuple[Tensor, Tensor, Tensor]:
        """Along a validation gradient, float64 scalars: what samples share; what one earns by its squared norm; and by
        its product with g_B of unit length."""
        sums = torch.zeros(3, dtype=torch.float64, device=self._factor.device)
        for i, left in self.left.items():
            if (g := gradients[i]) is not None:
                for k, x in enumerate((left, *self.along.get(i, ()))):
                    sums[k] += (x * g).sum(dtype=torch.float64).to(sums.device) * self._shares[i]
        left, a, b = ranks.over_shards(sums)
        squared = sum((norms.double().sum().to(sums) for norms in self._of_samples.values()), sums[0] * 0)
        squared = ranks.sum(squared) * self._factor.double() ** 2
        return left - a * self._norm**2 - b * squared, b, a * self._norm

    def shared(
        self, found: list[Tensor | None], surplus: Tensor | float, by_size: Tensor | float, ranks: Ranks
    ) -> list[Tensor | None]:
        """The dots of each batch, with equal parts of `surplus`, where a sample has a gradient, and by their squares of
        `by_size`.

        Args:
            found: `[count]` or `[count, columns]`; surplus, by_size: numbers, or `[columns]`.
        """
        factor = self._factor.double()
        squares: dict[int, Tensor] = {}
        for batch, dots in enumerate(found):
            if dots is not None:
                of_rows = self._of_samples[batch].to(factor)
                tokens = len(dots) // max(1, len(of_rows))  # that share their row's
                squares[batch] = of_rows.repeat_interleave(tokens) / max(1, tokens)
        count = ranks.sum(sum(((of > 0).sum() for of in squares.values()), torch.zeros_like(factor)))
        surplus, by_size = (torch.as_tensor(x, device=factor.device) for x in (surplus, by_size))
        surplus, by_size = surplus / ranks.holders, by_size / ranks.holders
        share = surplus / (factor * count)
        result = list(found)
        for batch, of in squares.items():
            dots = result[batch]
            assert dots is not None
            of = of if dots.dim() == 1 else of[:, None]
            result[batch] = dots + torch.where(of > 0, share + by_size * of * factor, 0.0).to(dots)
        return result
