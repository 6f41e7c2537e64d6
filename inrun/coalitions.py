"""The gradient g_S of one coalition of a step's samples after the other, each made from the one before.

A sample's gradient is computed again from what was kept, as storing them all would take B times the weights; those of
the first samples are stored, as many as `CHUNK` elements hold: all of a small model's, and of a large one those that a
Gray code takes up and lays down most often.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .keep import Keeper
from .updates import CHUNK


def gray(players: int) -> list[int]:
    """All coalitions, each of which differs by one player from the one before; bit z is set where z belongs to it."""
    return [k ^ k >> 1 for k in range(1 << players)]


class Coalitions:
    """The gradient of a coalition, which is nobody at first.

    Args:
        keeper: of the step's layers; rows: samples of each of its batches.
        slots: of the parameters whose gradient is meant.

    Attributes:
        gradient: `id` of a slot's sibling -> g_S, float64.
        runs: of each batch, what was kept of it.
    """

    def __init__(self, keeper: Keeper, rows: Sequence[int], slots: Sequence[Any]) -> None:
        self._keeper = keeper
        self.gradient = {id(s.sibling): torch.zeros_like(s.shard, dtype=torch.float64) for s in slots}
        self.runs = [[kept for kept in keeper.kept if kept.batch == b] for b in range(len(rows))]
        self._players = [(b, row) for b, count in enumerate(rows) for row in range(count)]
        self._members = 0
        self._stored: dict[int, list[tuple[int, Tensor]]] = {}
        self._wide = any(s.shard.dtype == torch.float64 for s in slots)  # float64 has all digits of sums of others
        self.size = sum(g.numel() for g in self.gradient.values())

    def gather(self, members: int) -> None:
        """Make the gradient that of these; bit z is set where sample z, of all batches, is one of them."""
        leaving, joining = self._members & ~members, members & ~self._members
        if leaving and (self._wide or joining or leaving.bit_count() > 1):
            # Afresh: what is subtracted again leaves rounding behind, of which a sign makes a step.
            for gradient in self.gradient.values():
                gradient.zero_()
            leaving, joining = 0, members
        for z in range(len(self._players)):
            if (leaving | joining) >> z & 1:
                for name, gradient in self._of(z):
                    self.gradient[name].add_(gradient, alpha=1 if joining else -1)
        self._members = members

    def tensors(self) -> Iterator[Tensor]:
        """All that is held."""
        yield from self.gradient.values()
        for pairs in self._stored.values():
            yield from (gradient for _, gradient in pairs)

    def _of(self, z: int) -> Iterable[tuple[int, Tensor]]:
        if z in self._stored:
            return self._stored[z]
        if (z + 1) * self.size <= CHUNK:
            return self._stored.setdefault(z, list(self._computed(z)))
        return self._computed(z)

    def _computed(self, z: int) -> Iterator[tuple[int, Tensor]]:
        batch, row = self._players[z]
        for kept in self.runs[batch]:
            for one in self._keeper.sample_gradients(kept, [row]):
                yield from ((name, gradient) for name, gradient in one.items() if name in self.gradient)
