"""One training step: the probes of its batches, and the values that come out of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InRunError

if TYPE_CHECKING:
    from .tracker import Tracker


class Step:
    """One training step, made by `Tracker.step`.

    Attributes:
        number: the step's number in the ledger.
        ids: the ids of the step's samples, all its batches in order.
        values: `[B]`, or `[B, M]` for M targets, float32 on the model's device, nats; ready when the block has
            ended, with "secant" and "path_secant" over validation blocks when the next of those have.
            > 0: the sample lowered the validation loss. Zero where the optimizer made no update.
        drop: target -> what this step's batch took off the validation loss, measured (path methods with a
            validation callable and true ends): the loss at `w + u(0)` less that at `w + u(g_B)`, a scalar tensor.
    """

    def __init__(
        self, tracker: Tracker, ids: Any, recompute: Callable[[], Tensor] | None, scale: float | Tensor
    ) -> None:
        self._tracker, self._recompute, self.scale = tracker, recompute, scale
        self._first = None if ids is None else _as_ids(ids)
        self.drop: dict[str, Tensor] = {}
        self._values: Tensor | None = None
        self.number = tracker.steps
        self.ids: list[int | str] = []
        self.factor: Tensor | None = None  # of the dots; set when the optimizer begins its update
        self.uneven: Tensor | None = None  # whether there is no such factor

    def __enter__(self) -> Step:
        self._tracker.begin(self)
        if self._first is not None:
            self.batch(self._first, self._recompute)
        return self

    def batch(self, ids: Any, recompute: Callable[[], Tensor] | None = None) -> None:
        """Announce the samples of the next forward.

        Args:
            ids: one id per sample, in batch order: integers or strings; a sequence, 1-D array or tensor.
            recompute: as in `Tracker.step`.

        Raises:
            InRunError: outside the step block.
            TypeError, ValueError: ids that are none of these, or of no sample.
        """
        ids = _as_ids(ids)
        self._tracker.batch(self, len(ids), recompute)
        self.ids = [*self.ids, *ids]

    @property
    def values(self) -> Tensor:
        if self._values is None:
            raise InRunError(
                "values: asked for too early; expected after the step block, and where they need the next validation "
                "gradient, after the next validation() block"
            )
        return self._values

    def __exit__(self, kind: type[BaseException] | None, *exc: object) -> None:
        self._tracker.end(self)
        if kind is None:
            self._tracker.finish(self)

    def settle(self, values: Tensor, drop: dict[str, Tensor]) -> None:
        """Take the values; for `Tracker`."""
        self._values, self.drop = values, dict(drop)

    def scaled(self, dots: Sequence[Tensor | None]) -> Tensor:
        """The batches' dots as values: together, and as the update used their gradients."""
        if not dots:
            raise InRunError("step: expected ids, by step(ids) or by batch(ids) before each forward; got neither")
        for i, part in enumerate(dots):
            if part is None:
                raise InRunError(
                    f"step: no backward pass reached the tracked layers for batch {i + 1} of {len(dots)} "
                    "(torch.autograd.grad does so only with the probe among its inputs; use backward())"
                )
        together = torch.cat([part for part in dots if part is not None])
        if self.factor is None:
            warnings.warn("optimizer.step() did not run in the step block; its values are zero", stacklevel=5)
            return torch.zeros_like(together)
        if self.uneven is not None and bool(self.uneven):
            raise InRunError(
                "optimizer.step(): expected the gradients of the backward up to one common factor (clipping by norm, "
                "unscaling); got gradients changed element by element"
            )
        return torch.where(self.factor == 0, torch.zeros_like(together), together * self.factor)


def _as_ids(ids: Any) -> list[int | str]:
    """Sample ids as a list of integers or of strings."""
    if hasattr(ids, "tolist"):
        ids = ids.tolist()
    if isinstance(ids, str) or not isinstance(ids, Sequence):
        raise TypeError(f"ids: expected a sequence, array or tensor of integers or strings, got {ids!r}")
    if not ids:
        raise ValueError("ids: expected one id per sample, got none")
    kinds = {type(i) for i in ids}
    if kinds != {int} and kinds != {str}:
        raise TypeError(
            f"ids: expected all integers or all strings, got {', '.join(sorted(k.__name__ for k in kinds))}"
        )
    return list(ids)
