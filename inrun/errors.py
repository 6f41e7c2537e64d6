"""The error of this library for what a single argument cannot explain, and how it waits for a device's answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor


class InRunError(RuntimeError):
    """A training run, model or ledger is in a state in which a score would be wrong or lost.

    A wrong argument is a ``ValueError`` or a ``TypeError``; this is for what depends on what came before: a
    parameter that no rule covers, a validation pass that is missing, a step that was recorded already.
    """

    def __init__(self, *args: object, suspected: Collection[str] = ()) -> None:
        super().__init__(*args)
        self.suspected = suspected  # names of layers or parameters that are to be scored otherwise


def require_scale(scale: Any) -> None:
    """Raise `ValueError` unless a loss can have been multiplied by this (a GPU's number is not waited for)."""
    if isinstance(scale, Tensor):
        scale = scale.item() if scale.is_cpu and scale.numel() == 1 else 1.0
    if not (isinstance(scale, Real) and 0 < float(scale) < math.inf):
        raise ValueError(f"scale: expected a finite number above 0, or a tensor of one, got {scale!r}")


def few(names: Sequence[object], most: int = 5) -> str:
    """The first of many names for a message, and how many more there are."""
    shown = ", ".join(map(str, names[:most]))
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class Pending:
    """Errors that a GPU has yet to tell of: they come some steps later, and nothing waits for them."""

    def __init__(self) -> None:
        self._asked: list[tuple[Tensor, Any, Callable[[], InRunError]]] = []

    def ask(self, wrong: Tensor, error: Callable[[], InRunError]) -> None:
        """Raise `error` where `wrong`, a scalar: at once on a CPU, at an `answer` to come on a GPU."""
        event = None
        if wrong.is_cuda:
            event, stream = torch.cuda.Event(), torch.cuda.current_stream(wrong.device)
            wrong = torch.empty_like(wrong, device="cpu", pin_memory=True).copy_(wrong, non_blocking=True)
            event.record(stream)
        self._asked.append((wrong, event, error))
        self.answer()

    def answer(self, wait: bool = False) -> None:
        """Raise what is known by now.

        Args:
            wait: for the answers that are on their way.
        """
        while self._asked:
            wrong, event, error = self._asked[0]
            if event is not None and not event.query():
                if not wait:
                    return
                event.synchronize()
            del self._asked[0]
            if wrong:
                if wait:
                    self._asked.clear()
                raise error()
