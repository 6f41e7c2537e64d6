"""The Shapley value of a game of few players, and how near an estimate of it comes.

    phi_i = sum over S without i of |S|! (n - |S| - 1)! / n! * (U(S + i) - U(S))

Exact over all 2^n subsets; above a dozen players, the mean over random orders of what a player adds to those before
it, which is unbiased, with its standard error. Nothing here knows of models or gradients, so it can judge them.

Source: Shapley (1953); sampling of orders: Castro, Gomez and Tejada (2009).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

Utility = Callable[[np.ndarray], float]  # of a coalition, bool [n]
Vector = Callable[[np.ndarray], np.ndarray]  # several games at once


def exact(utility: Utility | Vector, players: int) -> tuple[np.ndarray, Any]:
    """The Shapley value by enumeration.

    Args:
        utility: of a coalition, bool [players], a number or an array of numbers; called 2^players times.
        players: from 1 to 20.

    Returns:
        The values, float64 [players, *shape of the utility], and what they add up to: U(all) - U(none).

    Raises:
        ValueError: more players than can be enumerated.

    Example:
        exact(lambda s: float(s.sum()), 3)      # (array([1., 1., 1.]), 3.0)
    """
    if not 1 <= players <= 20:
        raise ValueError(f"players: expected from 1 to 20, got {players}")
    worth = np.array([utility(row) for row in _members(players)])
    return from_coalitions(worth), worth[-1] - worth[0]


def from_coalitions(worth: np.ndarray) -> np.ndarray:
    """The Shapley value of a game whose coalitions are all known.

    Args:
        worth: float64 [2^n, ...]; at k, of the coalition that player i belongs to where bit i of k is set.

    Returns:
        float64 [n, ...].
    """
    players = len(worth).bit_length() - 1
    masks, members = np.arange(1 << players), _members(players)
    size = members.sum(1)
    weight = np.array([1 / (players * math.comb(players - 1, k)) for k in range(players)])
    values = np.empty((players, *worth.shape[1:]))
    for i in range(players):
        without = masks[~members[:, i]]
        values[i] = weight[size[without]] @ (worth[without | 1 << i] - worth[without])
    return values


def _members(players: int) -> np.ndarray:
    """Of every coalition, who belongs to it: bool [2^players, players]."""
    return (np.arange(1 << players)[:, None] >> np.arange(players)) & 1 == 1


def orders(players: int, count: int, seed: int | tuple[int, ...]) -> np.ndarray:
    """Random orders, each followed by its reverse: int [count, players], count even.

    An order and its reverse give pairs of players what they do together in equal parts. Every second pair of orders is
    the one before, turned half way round, so that a player stands early, late and between. Each order is uniform, and a
    mean over them unbiased.
    """
    rng, found = np.random.default_rng(seed), []
    order = np.arange(players)
    for k in range(count // 2):
        order = np.roll(order, players // 2) if k % 2 else rng.permutation(players)
        found += [order, order[::-1]]
    return np.stack(found)


def from_orders(found: np.ndarray, worth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The Shapley value as the mean over `orders` of what a player adds to those before it.

    Args:
        found: the orders, [count, n].
        worth: of the players of each order up to a place, from none of them to all, [count, n + 1, ...].

    Returns:
        The values, float64 [n, ...], and their standard errors, as if each order and its reverse were drawn by
        themselves: a little too large, as a half turn is better than that. NaN where there is one such pair.
    """
    added = np.empty((*found.shape, *worth.shape[2:]))
    for row, order, along in zip(added, found, np.diff(worth, axis=1), strict=True):
        row[order] = along
    pairs = (added[::2] + added[1::2]) / 2
    if len(pairs) == 1:
        return pairs[0], np.full_like(pairs[0], np.nan)
    return pairs.mean(0), pairs.std(0, ddof=1) / math.sqrt(len(pairs))


def monte_carlo(
    utility: Utility, players: int, permutations: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray, float]:
    """The Shapley value by random orders of the players.

    Args:
        utility: of a coalition, bool [players]; called about permutations * players times.
        permutations: orders, at least 2.
        seed: draws them.

    Returns:
        The values, float64 [players]; half the width of each one's 95% confidence interval, [players]; their sum.
    """
    if permutations < 2:
        raise ValueError(f"permutations: expected at least 2, got {permutations}")
    rng = np.random.default_rng(seed)
    nobody, everybody = utility(np.zeros(players, bool)), utility(np.ones(players, bool))
    added = np.empty((permutations, players))
    for row in added:
        order = rng.permutation(players)
        some = (utility(np.isin(np.arange(players), order[:k])) for k in range(1, players))
        row[order] = np.diff([nobody, *some, everybody])
    return added.mean(0), 1.96 * added.std(0, ddof=1) / math.sqrt(permutations), float(everybody - nobody)


def fidelity(values: np.ndarray, truth: np.ndarray, total: float) -> dict[str, float]:
    """How near `values` come to the Shapley value.

    Args:
        values: [n]; truth: the Shapley value, [n]; total: U(all) - U(none).

    Returns:
        pearson, spearman; rmse (the values' unit); relative_error `|values - truth| / |truth|`; and
        efficiency_gap `|sum(values) - total| / |total|`.
    """
    difference = np.linalg.norm(values - truth)
    return {
        "pearson": correlation(values, truth),
        "spearman": correlation(ranks(values), ranks(truth)),
        "rmse": float(difference / math.sqrt(len(truth))),
        "relative_error": float(difference / np.linalg.norm(truth)),
        "efficiency_gap": float(abs(values.sum() - total) / abs(total)),
    }


def auroc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The chance that a positive scores above a negative, ties counting half; scores [n], positive bool [n]."""
    placed = ranks(scores)
    n = int(positive.sum())
    return float((placed[positive].sum() - n * (n - 1) / 2) / (n * (len(scores) - n)))


def ranks(x: np.ndarray) -> np.ndarray:
    """From 0; ties share their mean rank."""
    _, where, counts = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts + 1) / 2)[where]


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])
