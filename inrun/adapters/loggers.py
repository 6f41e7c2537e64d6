"""Where a run's figures go: anything with `log(values, step)`, as a wandb run and an `Accelerator` have it already."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from ..errors import InRunError
from ..step import Step


class Logger(Protocol):
    """What takes figures: `wandb.init(...)`, an `Accelerator`, `TensorBoard`, or one method of your own."""

    def log(self, values: dict[str, float], step: int, /) -> Any:
        """Record figures, by name, of an optimizer step (from 0)."""


class TensorBoard:
    """A `torch.utils.tensorboard.SummaryWriter` as a `Logger`."""

    def __init__(self, writer: Any) -> None:
        self.writer = writer

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)


class Figures:
    """The figures of the steps since the last ones: values are read back from the device only when they are due.

    Args:
        columns: names of the values' last axis.
        every: steps between two of them.
        source_of: sample id -> its source, for a mean value of each; None for one mean.
    """

    def __init__(self, columns: Sequence[str], every: int, source_of: Callable[[Any], str] | None) -> None:
        if not isinstance(every, int) or every < 1:
            raise ValueError(f"log_every: expected an integer of at least 1, got {every!r}")
        self.columns, self.every, self.source_of = columns, every, source_of
        self._steps: list[Step] = []

    def add(self, step: Step) -> None:
        self._steps.append(step)

    def due(self, losses: Mapping[str, Any], seconds: Mapping[str, float]) -> dict[str, float]:
        """The figures, if `every` steps have passed and have their values; else none.

        Returns:
            "inrun/validation_loss", "inrun/value" (the mean, nats; also "inrun/value/SOURCE"), "inrun/negative" (share
            of samples below zero) and "inrun/seconds" (spent so far). With several targets each but the last is
            followed by the target's name.
        """
        if len(self._steps) < self.every:
            return {}
        try:
            of_steps = [step.values.sum(1) if step.per_token else step.values for step in self._steps]
        except InRunError:  # values that wait for the next validation block
            return {}
        values = torch.cat(of_steps).cpu().reshape(-1, len(self.columns))
        ids = [i for step in self._steps for i in step.ids]
        self._steps = []
        figures = {"inrun/seconds": sum(seconds.values())}
        for name, loss in losses.items():
            suffix = f"/{name}" if len(losses) > 1 else ""
            figures[f"inrun/validation_loss{suffix}"] = float(loss)
        for name, column in zip(self.columns, values.unbind(1), strict=True):
            suffix = f"/{name}" if len(self.columns) > 1 else ""
            figures[f"inrun/value{suffix}"] = float(column.mean())
            figures[f"inrun/negative{suffix}"] = float((column < 0).float().mean())
            if self.source_of is not None:
                sources = [str(source) if (source := self.source_of(i)) is not None else "(unknown)" for i in ids]
                for source in sorted(set(sources)):
                    mine = torch.tensor([s == source for s in sources])
                    figures[f"inrun/value{suffix}/{source}"] = float(column[mine].mean())
        return figures
