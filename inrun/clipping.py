"""Whether a step's gradient was clipped by norm: what the path methods, of whose update clipping is a part, go by."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .distributed import local
from .errors import InRunError

if TYPE_CHECKING:
    from .tracker import Tracker


class Clipping:
    """Of every step of a tracker.

    Args:
        clip: the `max_norm` of the user's clipping by norm, or None.
    """

    def __init__(self, tracker: Tracker, clip: float | None) -> None:
        self.tracker, self.clip = tracker, clip
        self._warned = False

    def of(
        self, slots: Sequence[Any], factor: Tensor, unscale: Any, scale: float | Tensor
    ) -> tuple[float, float] | None:
        """What the gradient was multiplied by when it was clipped, and its norm since; None where it was not.

        Args:
            slots: the parameters that have a gradient; factor: what dots are multiplied by to be values.
            unscale: what the gradients must still be multiplied by; scale: what the loss was.

        Raises:
            InRunError: clipped to another norm, or that of other parameters too.
        """
        rounding = 4 * max([0.0, *(torch.finfo(s.grad.dtype).eps for s in slots)])
        if self.clip is None:
            others = self.tracker.coverage["excluded"] or self.tracker.validations.outside
            if self.tracker.first_check and not (self.tracker.samples or others):
                self._warn_of_none(float(factor) * float(scale) * self.tracker.ranks.divisor, max(1e-4, rounding))
            return None
        norm = self.tracker.ranks.total_norm(s.grad.double() * unscale for s in slots)
        shrunk = float(factor) * float(scale) * self.tracker.ranks.divisor  # of the mean over the processes
        if not 0 < shrunk < 1 - 1e-6:  # 0: a fused optimizer will skip the update
            return None
        if norm > self.clip * (1 + 1e-2 + rounding):
            raise InRunError(
                f"clip: expected gradients of at most the norm {self.clip}, got {norm:.4g} after they were made "
                f"{shrunk:.4g} of what they were"
            )
        if norm > self.clip * (1 - 1e-3 - rounding):
            return shrunk, norm
        params = *self.tracker.model.parameters(), *self.tracker.validations.outside
        grads = [local(p.grad) for p in params if p.grad is not None]
        every = self.tracker.ranks.total_norm(g.double() * unscale for g in grads)
        if every > self.clip * (1 - 1e-3 - rounding):
            raise InRunError(
                f"clip: expected gradients clipped to the norm {self.clip} over the tracked parameters together, "
                f"got their norm {norm:.4g}, and {every:.4g} with the excluded ones and those that are not the model's"
            )
        if norm / shrunk > self.clip:  # else it was something else that made them smaller
            self._warn(f"clip: gradients of the norm {norm / shrunk:.4g} were made {shrunk:.4g} of that, which is not "
                       f"the norm {self.clip}. If they were clipped to another one, say to which")  # fmt: skip
        return None

    def _warn_of_none(self, shrunk: float, rounding: float) -> None:
        """A loss scaler's factor is one over a power of two, and that of a mean over batches over their number."""
        times = 1 / max(shrunk, 1e-30)
        if times > 1 and abs(times - round(times)) > rounding * times:
            self._warn(f"gradients were made {shrunk:.4g} of what they were before the update. If they were clipped by "
                       "norm, say to which: track(..., clip=max_norm)")  # fmt: skip

    def _warn(self, what: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(f"{what}. Clipping is a part of the update; here it is taken for a constant", stacklevel=3)
