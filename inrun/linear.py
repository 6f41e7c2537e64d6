"""The game of a linear loss: known for all coalitions by their updates alone, so that orders need find the rest alone.

    L(S) = -<G, u(c * g_S)>

G being the mean of the validation gradients at the step's two ends, u the optimizer's update. `monte_carlo` adds the
exact Shapley value of L to what random orders find of U - L. Both are unbiased whatever L is, so that an L which is a
little off (Muon's by its formula, in float64) costs a little noise. What U - L keeps is the bend of the loss between
coalitions, and not the votes of a sign update, which are most of the noise otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, optim

from .coalitions import gray
from .coupled import KNOWN
from .updates import ELEMENTWISE, UpdateRule, is_known, repeated, updates

# Beyond so many samples the 2^B updates take longer than all the losses of a few orders. Those that are had one at a
# time cost more: a signed or coupled update's have two samples less, and the others' small error is let stand.
PLAYERS = 10
SMOOTH = tuple(kind for kind in ELEMENTWISE if kind is not optim.Rprop)
STACK = 1 << 18  # elements of the gradients whose updates are found together: what a core's cache holds

GradientOf = Callable[[Any], Tensor]  # of a slot


def most_players(moving: Sequence[tuple[int, Any]], update: UpdateRule | str | None) -> int:
    """Samples of a step up to which this game is worth its updates."""
    if _together(moving, update) > 1:
        return PLAYERS
    smooth = update is None and all(type(slot.optimizer) in SMOOTH for _, slot in moving)
    return 0 if smooth else PLAYERS - 2


def worth(
    players: int,
    moving: Sequence[tuple[int, Any]],
    slopes: dict[int, Tensor],
    gradient_of: Callable[[int], GradientOf],
    moves: Callable[[GradientOf], Iterable[tuple[int, Tensor]]],
    update: UpdateRule | str | None,
) -> np.ndarray:
    """What every coalition's update takes off the linear losses.

    Args:
        players: B samples.
        moving: numbered slots that the update moves.
        slopes: slot -> G of the M losses, `[M, numel]`; none where a loss has no gradient.
        gradient_of: of a coalition, until the next one's is asked for.
        moves: numbers of slots, and what they move by with these gradients.
        update: the user's, as of `updates`.

    Returns:
        float64 `[2^B, M]`, nats; zero throughout for a loss whose gradient is not finite.
    """
    many = next(iter(slopes.values())).shape[0]
    together = _together(moving, update)
    every, found = gray(players), []
    for start in range(0, len(every), together):
        part = every[start : start + together]
        if together == 1:
            here = moves(gradient_of(part[0]))
        else:
            stack: dict[int, list[Tensor]] = {i: [] for i, _ in moving}
            for members in part:
                gradient = gradient_of(members)
                for i, slot in moving:
                    stack[i].append(gradient(slot))
            here = _stacked_moves(moving, stack, update)
        total = torch.zeros(len(part), many, dtype=torch.float64, device=moving[0][1].param.device)
        for i, move in here:
            if i in slopes:
                total -= (move.reshape(len(part), -1).double() @ slopes[i].double().T).to(total)
        found.append(total)
    table = np.empty((len(every), many))
    table[every] = torch.cat(found).cpu().numpy()
    table[:, ~np.isfinite(table).all(0)] = 0.0
    return table


def _together(moving: Sequence[tuple[int, Any]], update: UpdateRule | str | None) -> int:
    """How many updates are found at once: several, of small models, coordinate by coordinate or by a known formula."""
    if callable(update) or not all(is_known(s.optimizer, update, (*ELEMENTWISE, *KNOWN)) for _, s in moving):
        return 1
    return max(1, STACK // max(1, sum(slot.shard.numel() for _, slot in moving)))


def _stacked_moves(
    moving: Sequence[tuple[int, Any]], gradients: dict[int, list[Tensor]], update: UpdateRule | str | None
) -> Iterator[tuple[int, Tensor]]:
    """Of each slot, float64 `[count, *shape]`: what it moves by with each of its gradients."""
    for i, slot in moving:
        stack = torch.stack(gradients[i])
        rule = KNOWN.get(type(slot.optimizer), update)
        yield i, updates([repeated(slot, len(stack))], [stack], rule)[0]
