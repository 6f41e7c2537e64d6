"""A tracked run whose steps are opened by the first forward and closed by the optimizer: what every adapter drives.

    loop = Loop(model, optimizer, validation=validation_loss)
    for batch in loader:
        ids = batch.pop("sample_id")
        with accelerator.accumulate(model), loop.batch(ids, last=accelerator.sync_gradients):
            accelerator.backward(model(**batch).loss)
            optimizer.step()
            optimizer.zero_grad()
    loop.close()

An evaluation inside of a step goes into `torch.no_grad()` or `loop.tracker.paused()`.

A loop that has all batches of a step in one place, as torchtitan's, needs only `Tracker.step` and `Step.batch`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from ..errors import InRunError
from ..ledger import Ledger
from ..restoring import in_eval_mode
from ..step import Step
from ..tracker import as_ledger, track
from ..validation import as_losses
from .loggers import Figures, Logger


class Loop:
    """`inrun.track`, for loops that cannot hold a step in one block.

    Args:
        model, optimizer: as `inrun.track` takes them; or as an `Accelerator` prepared or torch compiled them.
        validation: returns the validation loss, a scalar; or a dict of names and such callables. Run in eval mode.
        logger: takes the figures of `Figures.due`; None for none.
        log_every: steps between two of them.
        source_of: sample id -> its source, for the mean value of each in the figures.
        start: the optimizer step that the run begins at. Above 0 it was resumed from a checkpoint: what the ledger
            holds of this step and later is dropped.
        ledger, options: `inrun.track`'s others: `method`, `validate_every`, `exclude`, ...

    Attributes:
        tracker, ledger: the `Tracker`, and where the values go.
        step: the step that is open, or None.
        last: the `Step` that ended last.

    Raises:
        InRunError: the run begins at 0 and the ledger holds another; and what `inrun.track` raises.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Any,
        validation: Callable[[], Tensor] | Mapping[str, Callable[[], Tensor]],
        *,
        logger: Logger | None = None,
        log_every: int = 10,
        source_of: Callable[[Any], str] | None = None,
        start: int = 0,
        ledger: Ledger | str | Path | None = None,
        **options: Any,
    ) -> None:
        if not as_losses(validation):
            raise TypeError(
                f"validation: expected a function that returns the loss, or a dict of such, got {validation!r}"
            )
        if logger is not None and not callable(getattr(logger, "log", None)):
            raise TypeError(f"logger: expected one with log(values, step), got {type(logger).__name__}")
        if source_of is not None and not callable(source_of):
            raise TypeError(f"source_of: expected a function of a sample id or None, got {source_of!r}")
        self.ledger = as_ledger(ledger)
        held = self.ledger.last_step
        if start == 0 and held is not None:
            remedy = "; resume the run from its checkpoint, or use a new folder"
            if self.ledger.path is None:
                remedy = (
                    " of an earlier run, in memory; take a new one: of a callback by values.ledger = inrun.Ledger()"
                )
            raise InRunError(
                f"ledger: expected an empty one for a run that begins at step 0, got steps up to {held}{remedy}"
            )
        model = getattr(model, "_orig_mod", model)  # of torch.compile
        several = isinstance(optimizer, (list, tuple))
        optimizer = [_held(each) for each in optimizer] if several else _held(optimizer)
        losses = {name: in_eval_mode(model)(loss) for name, loss in as_losses(validation).items()}
        self.tracker = track(model, optimizer, validation=losses, ledger=self.ledger, **options)
        self.step: Step | None = None
        self.last: Step | None = None
        try:
            self.tracker.steps = start
            self.ledger.resume(start)
            self._logger, self._figures = logger, Figures(self.tracker.columns, log_every, source_of)
        except BaseException:  # bad input: the model is as before
            self.tracker.close()
            raise

    def announce(self, ids: Any, **layout: Any) -> None:
        """The next forward sees these samples; a step begins if none is open. Arguments as `Step.batch`."""
        if self.step is None:
            step = self.tracker.step()
            step.__enter__()
            self.step = step
        self.step.batch(ids, **layout)

    def end(self) -> None:
        """The optimizer has made its update, or has skipped it: the step ends."""
        step, self.step = self.step, None
        if step is None:
            raise InRunError("end: expected a batch before it, there was none since the last step")
        step.__exit__(None, None, None)
        self.last = step
        if self._logger is not None:
            self._figures.add(step)
            if figures := self._figures.due(self.tracker.last_validation, self.tracker.seconds):
                self._logger.log(figures, step.number)

    @contextmanager
    def batch(self, ids: Any, *, last: bool = True, **layout: Any) -> Iterator[None]:
        """A block around the forward and backward of one batch, and if it is the step's last, around the update too.

        Args:
            ids, layout: as `Step.batch`.
            last: whether `optimizer.step()` in this block updates the weights.

        Raises:
            InRunError, TypeError, ValueError: what `Tracker.step` and `Step.batch` raise.
        """
        try:
            self.announce(ids, **layout)
            yield
        except BaseException as error:
            self.abandon()
            if isinstance(error, InRunError) and self.last is not None and self.last.factor is None:
                error.add_note(
                    "The step before ended without optimizer.step(): where gradients accumulate over batches, say "
                    "batch(ids, last=...), which is True by default"
                )
            raise
        if last:
            self.end()

    def abandon(self) -> None:
        """Forget the open step: an exception ended it."""
        step, self.step = self.step, None
        if step is not None:
            step.__exit__(InRunError, None, None)

    def close(self) -> None:
        """Give the model its classes back and flush the ledger."""
        self.abandon()
        self.tracker.close()


def _held(optimizer: Any) -> Any:
    """The optimizer that something holds which is none itself, as what sets its rate."""
    return optimizer if isinstance(optimizer, Optimizer) else getattr(optimizer, "optimizer", optimizer)


def with_clip(options: Mapping[str, Any], max_norm: float | None) -> dict[str, Any]:
    """`inrun.track`'s options, with the norm that a trainer clips to where a method asks for it and nobody has said it.

    Not where some parameters are excluded, which the trainer's norm is also of; nor (None) under a loss scaler, whose
    factor nobody tells here.
    """
    method = options.get("method", "first")
    asked = (method.startswith("path") or method == "monte_carlo") and not (
        options.get("pairwise") or options.get("exclude")
    )
    return {"clip": float(max_norm), **options} if asked and max_norm and max_norm > 0 else dict(options)
