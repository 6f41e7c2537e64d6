"""Lightning:

    values = InRun(validation=lambda: model.loss(held_out), ids="sample_id", ledger="run/ledger")
    Trainer(callbacks=[values]).fit(model, loader)
    values.ledger.bottom(10)

A step is Lightning's, its number `trainer.global_step` before it: automatic or manual optimization, accumulation,
clipping by norm and mixed precision are in the gradients that are scored. Several optimizers update together, after all
backward passes of the step. Lightning's validation loop is not scored; an evaluation of your own in `training_step`
goes into `torch.no_grad()` or `values.loop.tracker.paused()`.

A batch that is skipped, by a `training_step` that returns None (in automatic optimization) or an `on_train_batch_start`
that returns -1, has no values; where batches of an accumulated step came before it, neither have these, nor the step's
others.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback
from torch import Tensor

from ..distributed import rank
from ..errors import InRunError
from ..ledger import Ledger
from ..tracker import as_ledger
from .loop import Loop, with_clip


class InRun(Callback):
    """Tracks what each training sample of `fit` does to the validation loss.

    Args:
        validation: returns the validation loss, a scalar; or a dict of names and such callables. Run in eval mode.
        ids: key of the ids in a batch, or a function of the batch that returns them: a list, or a tensor (which on a
            GPU every step waits for).
        ledger: where the values go, as in `inrun.track`. A resumed fit (`ckpt_path`) needs the folder of the first
            one: what was written of the step to be resumed and later is dropped, and nothing else.
        options: `Loop`'s (`logger`, `source_of`, ...) and `inrun.track`'s (`method`, `validate_every`, ...) others.

    Attributes:
        ledger: the `Ledger` that holds the values.
        loop: the `Loop` with its tracker, while fitting; else None.

    Raises:
        InRunError: at the start of `fit`: the ledger holds another run; and what `inrun.track` raises. At a batch: it
            has no ids.
    """

    def __init__(
        self,
        validation: Callable[[], Tensor] | Mapping[str, Callable[[], Tensor]],
        *,
        ids: str | Callable[[Any], Any] = "sample_id",
        ledger: Ledger | str | Path | None = None,
        **options: Any,
    ) -> None:
        self.ids, self.options = ids, {"validation": validation, **options}
        self.ledger, self._opened = as_ledger(ledger), not isinstance(ledger, Ledger)
        self.loop: Loop | None = None
        self._steps_before = 0
        self._batches, self._ran = 0, True  # of the open step; whether the last of them had its backward
        self._lost = False  # whether the trainer is in a step of no values
        self._evaluating = ExitStack()

    def on_train_start(self, trainer, pl_module):
        self._ran, self._lost = True, False
        if self._opened and self.ledger.rank != rank():  # Lightning's own launcher tells a process its rank by now
            self.ledger = as_ledger(self.ledger.path)
        start = trainer.global_step
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        by_norm = trainer.gradient_clip_algorithm in (None, "norm") and not scaled
        options = with_clip(self.options, trainer.gradient_clip_val if by_norm else None)
        self.loop = Loop(pl_module, trainer.optimizers, start=start, ledger=self.ledger, **options)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        assert self.loop is not None
        if callable(self.ids):
            ids = self.ids(batch)
        elif isinstance(batch, Mapping) and self.ids in batch:
            ids = batch[self.ids]
        else:
            got = ", ".join(map(str, batch)) if isinstance(batch, Mapping) else type(batch).__name__
            raise InRunError(f"ids: expected {self.ids!r} among a batch's keys, got {got}; or give ids=<function>")
        self._lost = self._lost and trainer.global_step == self._steps_before
        if self._lost:
            return
        if self.loop.step is None:
            self._batches, self._steps_before = 0, trainer.global_step
            self.loop.tracker.steps = trainer.global_step  # which counts those that were skipped
        self.loop.announce(ids)
        self._batches, self._ran = self._batches + 1, False

    def on_after_backward(self, trainer, pl_module):
        self._ran = True

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if pl_module.automatic_optimization:
            self._skip()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if pl_module.automatic_optimization:
            self._skip()
        self._ran = True  # by a backward that Lightning was not told of
        if self.loop is not None and self.loop.step is not None and trainer.global_step > self._steps_before:
            self.loop.end()

    def on_train_epoch_end(self, trainer, pl_module):
        if self.loop is not None and pl_module.automatic_optimization:  # the next batch drops the gradients so far
            self.loop.abandon()
            self._lost = False
        self._skip()

    def _skip(self) -> None:
        """Take the batch back if it had no backward: with its step, of which it is not always the first."""
        if self._ran or self.loop is None or self.loop.step is None:
            return
        self._ran, self._lost = True, self._batches > 1
        if self._lost:
            warnings.warn(
                f"training_step: expected a backward for each batch of an accumulated step, batch {self._batches} had "
                f"none; the step's samples, {len(self.loop.step.ids)} of them so far, have no values",
                stacklevel=2,
            )
        self.loop.abandon()

    def on_validation_start(self, trainer, pl_module):
        if self.loop is not None:  # perhaps in the middle of an accumulated step
            self._evaluating.enter_context(self.loop.tracker.paused())

    def on_validation_end(self, trainer, pl_module):
        self._evaluating.close()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint):
        self.ledger.flush()  # the checkpoint must not be ahead of it, of any process
        trainer.strategy.barrier()

    def on_train_end(self, trainer, pl_module):
        loop, self.loop = self.loop, None
        if loop is not None:
            loop.close()

    def on_exception(self, trainer, pl_module, exception):
        self._evaluating.close()
        self.on_train_end(trainer, pl_module)
