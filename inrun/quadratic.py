"""The game of a quadratic loss: its updates alone give the worth of all coalitions, and orders need find only the rest.

    Q(S) = -(<g_0, d_S> + <d_S, H d_S> / 2),    d_S = u(c * g_S) - u(0)

u being the optimizer's update, g_0 the validation gradient at w + u(0), and H the symmetric matrix of least norm that
takes every d_J to what the validation gradient has changed by at w + u(c * g_J) (the multi-secant form of Powell's
symmetric Broyden update), for J all samples together and, where there is room, each one alone. `monte_carlo` adds the
exact Shapley value of Q to what random orders find of U - Q; they are unbiased whatever Q is. Most of their noise is
the votes of a sign update or the norm that a coalition is clipped by, and then the bend of the loss: Q has the former,
and of the bend what the samples alone show.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, optim

from .coalitions import gray
from .formulas import muon
from .updates import ELEMENTWISE, UpdateRule, in_blocks, is_known, repeated, updates

# Beyond so many samples the 2^B updates take longer than all the losses of a few orders. Those that are had one at a
# time cost more: a signed, coupled or clipped update's have two samples less, and the others' small error is let stand.
PLAYERS = 10
SMOOTH = tuple(kind for kind in ELEMENTWISE if kind is not optim.Rprop)
STACK = 1 << 18  # elements of the gradients whose updates are found together: what a core's cache holds
MUON = functools.partial(muon, dtype=torch.bfloat16)
HELD = 1 << 24  # elements of the samples' own steps, and of the gradients at their ends

GradientOf = Callable[[Any], Tensor]  # of a slot


def most_players(moving: Sequence[tuple[int, Any]], update: UpdateRule | str | None, clip: float | None) -> int:
    """Samples of a step up to which this game is worth its updates."""
    kinds = {type(slot.optimizer) for _, slot in moving} if update is None and clip is None else set()
    if kinds == {optim.SGD}:  # an order and its reverse find as much, as the update is linear
        return 0
    if any(slot.shard.element_size() == 2 for _, slot in moving):  # the weights' own rounding is most of the noise
        return 0
    if _together(moving, update) > 1:
        return PLAYERS
    return 0 if kinds and kinds <= set(SMOOTH) else PLAYERS - 2


def points(players: int, moving: Sequence[tuple[int, Any]], many: int) -> list[int]:
    """The coalitions at which gradients tell of the bend: nobody, everybody, and each alone where they have room."""
    alone = [1 << z for z in range(players)]
    held = (1 + many) * (players + 1) * sum(slot.shard.numel() for _, slot in moving)
    return [0, (1 << players) - 1, *(alone if players > 1 and held <= HELD else [])]


def worth(
    players: int,
    moving: Sequence[tuple[int, Any]],
    slopes: dict[int, dict[int, Tensor]],
    gradient_of: Callable[[int], GradientOf],
    moves: Callable[[GradientOf], Iterable[tuple[int, Tensor]]],
    update: UpdateRule | str | None,
) -> np.ndarray:
    """What every coalition's update takes off the quadratic losses.

    Args:
        players: B samples.
        moving: numbered slots that the update moves.
        slopes: of each of `points`, slot -> the gradients of the M losses there, `[M, numel]`. Emptied.
        gradient_of: of a coalition, until the next one's is asked for.
        moves: numbers of slots, and what they move by with these gradients.
        update: the user's, as of `updates`.

    Returns:
        float64 `[2^B, M]`, nats; zero throughout for a loss whose gradient is not finite.
    """
    start, known = slopes.pop(0), list(slopes)
    many = next(iter(start.values())).shape[0]
    steps = [{i: move.flatten().to(start[i]) for i, move in moves(gradient_of(members))} for members in (0, *known)]
    along: dict[int, Tensor] = {}  # slot -> rows whose products with every move are asked for: g_0, each d_J and H d_J
    for i in list(start):
        first, still, *taken = start.pop(i), *(step.pop(i) for step in steps)
        along[i] = torch.cat([first, torch.stack(taken) - still, *(slopes[J].pop(i) - first for J in known)])

    together = 1 if any(in_blocks(slot) for _, slot in moving) else _together(moving, update)
    every, found = gray(players), []
    for at in range(0, len(every), together):
        part = every[at : at + together]
        if together == 1:
            here = moves(gradient_of(part[0]))
        else:
            stack: dict[int, list[Tensor]] = {i: [] for i, _ in moving}
            for members in part:
                gradient = gradient_of(members)
                for i, slot in moving:
                    stack[i].append(gradient(slot))
            here = _stacked_moves(moving, stack, update)
        rows = [(move.reshape(len(part), -1).to(along[i]) @ along[i].T).double() for i, move in here]
        found.append(sum((row.to(rows[0]) for row in rows[1:]), rows[0]))
    table = np.empty((len(every), found[0].shape[1]))
    table[every] = torch.cat(found).cpu().numpy()
    slope, with_steps, with_bends = np.split(table - table[0], [many, many + len(known)], axis=1)
    taken_off = np.zeros((len(every), many))
    for m in range(many):
        parts = slope[:, m], with_steps, with_bends[:, m::many]
        if all(np.isfinite(x).all() for x in parts):
            taken_off[:, m] = -(parts[0] + _bend(*parts[1:], known) / 2)
    return taken_off


def _bend(with_steps: np.ndarray, with_bends: np.ndarray, known: list[int]) -> np.ndarray:
    """<d_S, H d_S>, `[2^B]`, from the products of every d_S with each d_J and with each H d_J, `[2^B, J]`."""
    gram, bends = with_steps[known], with_bends[known]
    # Of d_J in d_S, by least squares; what is smaller is the rounding of float32 products.
    share = with_steps @ np.linalg.pinv(gram, rcond=1e-6, hermitian=True)
    return (share * (2 * with_bends - share @ bends)).sum(1)


def _together(moving: Sequence[tuple[int, Any]], update: UpdateRule | str | None) -> int:
    """How many updates are found at once: several, of small models, coordinate by coordinate or Muon's."""
    if callable(update) or not all(is_known(s.optimizer, update, (*ELEMENTWISE, optim.Muon)) for _, s in moving):
        return 1
    return max(1, STACK // max(1, sum(slot.shard.numel() for _, slot in moving)))


def _stacked_moves(
    moving: Sequence[tuple[int, Any]], gradients: dict[int, list[Tensor]], update: UpdateRule | str | None
) -> Iterator[tuple[int, Tensor]]:
    """Of each slot, float64 `[count, *shape]`: what it moves by with each of its gradients."""
    for i, slot in moving:
        stack = torch.stack(gradients[i])
        rule = MUON if type(slot.optimizer) is optim.Muon else update
        yield i, updates([repeated(slot, len(stack))], [stack], rule)[0]
