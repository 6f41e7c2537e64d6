"""The Hugging Face Trainer, and every trainer made from it:

    values = attach(trainer, validation=held_out, ledger="run/ledger")
    trainer.train()
    values.ledger.bottom(10)

Sample ids are a column of the training set (`id_column`). They go with their examples through sampler, shuffling and
collator (which has to leave the examples in their order), and are taken out before the forward, so a score has the id
of the example that earned it, whatever the trainer drops or reorders. A step is the trainer's own: accumulation,
clipping, mixed precision and its rescaling of the loss are in the gradients that are scored. The trainer's evaluation
is not scored; one of your own inside of a step (in `compute_loss`, say, or `on_substep_end`) goes into
`torch.no_grad()` or `values.loop.tracker.paused()`.

Where the collator flattens its examples into one row (`padding_free`), each document has its value. Rows that were
packed before hold a list in the id column, one id per token. TRL's trainers have an `attach` of their own
(`inrun.adapters.trl`).
"""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset
from transformers import Trainer, TrainerCallback

from ..errors import InRunError
from ..ledger import Ledger
from ..restoring import in_eval_mode, random_kept
from ..tracker import as_ledger
from .loop import Loop, with_clip


def attach(
    trainer: Trainer,
    validation: Any,
    *,
    id_column: str = "sample_id",
    ledger: Ledger | str | Path | None = None,
    **options: Any,
) -> InRunCallback:
    """Track what each training sample of `trainer.train()` does to the validation loss. Call it before `train()`.

    Args:
        trainer: of `transformers`, or a class made from it. It gets a callback, and carries the id column to the step.
        validation: a dataset like the training set. Every validation gradient is that of the whole of it, in every
            process, so it holds as many samples as a step may cost: a batch or two. Its loss is `trainer.compute_loss`
            over the trainer's own batches of `per_device_eval_batch_size`. Or a callable that returns the validation
            loss, a scalar; or a dict of names and either. Run in eval mode, in which transformers' layers checkpoint
            nothing: where they do in training, each batch of a dataset is computed again in the backward, which holds
            one batch's activations at a time (so take `per_device_eval_batch_size` small); a callable's are all held.
        id_column: column of the training set that holds each sample's id, integers or strings.
        ledger: where the values go, as in `inrun.track`. A resumed run (`resume_from_checkpoint`) needs the folder of
            the first one: what was written of the step to be resumed and later is dropped, and nothing else.
        options: `Loop`'s (`logger`, `source_of`, ...) and `inrun.track`'s (`method`, `validate_every`, ...) others.

    Returns:
        The callback, with `ledger`, and `loop` while training.

    Raises:
        InRunError: the training set has no such column; several GPUs in one process; attached already.
        TypeError, ValueError: one of TRL's trainers; a validation that is neither a dataset nor a callable; a dataset
            without samples, or without a label to predict, or of several batches with `pairwise`.
    """
    if is_of_trl(trainer):
        raise TypeError(
            f"trainer: expected a Trainer that is not TRL's, got {type(trainer).__name__}; take "
            "inrun.adapters.trl.attach, which takes the SFT, DPO, KTO, reward, GRPO and RLOO trainers; TRL's others "
            "are not scored"
        )
    return attached(trainer, validation, id_column=id_column, ledger=ledger, **options)


def is_of_trl(trainer: Any) -> bool:
    return any(cls.__module__.split(".")[0] == "trl" for cls in type(trainer).__mro__)


def attached(
    trainer: Trainer,
    validation: Any,
    *,
    id_column: str,
    ledger: Ledger | str | Path | None = None,
    mixin: type | None = None,
    **options: Any,
) -> InRunCallback:
    """`attach`, whatever the trainer; `mixin`: a `Tracked` of one that has other ways for the ids than its collator."""
    if isinstance(trainer, Tracked):
        raise InRunError("attach: expected a trainer without inrun, got one that has it")
    if trainer.args.n_gpu > 1:
        raise InRunError(
            f"attach: expected one GPU for each process, got {trainer.args.n_gpu} that the trainer would replicate the "
            "model on; make one visible with CUDA_VISIBLE_DEVICES"
        )
    dispatched: Any = trainer.accelerator.dispatch_batches
    if dispatched is None:  # accelerate's default
        dispatched = isinstance(trainer.train_dataset, IterableDataset)
    if dispatched and mixin is None and trainer.args.world_size > 1:
        raise InRunError(
            "attach: expected each process to load its own batches, got dispatch_batches (accelerate's default for an "
            "IterableDataset), which sends tensors only, and no ids; set TrainingArguments(accelerator_config="
            "{'dispatch_batches': False})"
        )
    columns = getattr(trainer.train_dataset, "column_names", None)
    if columns is not None and id_column not in columns:
        raise InRunError(f"id_column: expected a column of the training set ({', '.join(columns)}), got {id_column!r}")
    losses = losses_of(trainer, validation, id_column)
    for name, loss in losses.items():
        if options.get("pairwise") is not None and isinstance(loss, SetLoss) and loss.loaded > 1:
            raise ValueError(
                f"validation[{name!r}]: expected one batch of samples with pairwise, got {loss.loaded} of "
                f"per_device_eval_batch_size={trainer.args.per_device_eval_batch_size}; make it the size of the set"
            )
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = [*(trainer._signature_columns or ()), id_column]  # else it is dropped as unused
    if mixin is None:
        mixin, trainer.data_collator = _Carried, CarryIds(trainer.data_collator, id_column)
    callback = InRunCallback(id_column, ledger, {"validation": losses, **options})
    trainer.__class__ = type(type(trainer).__name__, (mixin, type(trainer)), {})
    trainer._inrun = callback  # pyright: ignore[reportAttributeAccessIssue]
    trainer.add_callback(callback)
    return callback


def losses_of(trainer: Trainer, validation: Any, id_column: str) -> dict[str, Any]:
    """The `validation` argument of `attach` as target -> callable."""
    named: Any = validation if isinstance(validation, Mapping) else {"validation": validation}
    return {name: loss if callable(loss) else SetLoss(trainer, loss, name, id_column) for name, loss in named.items()}


def base_of(model: Any) -> Any:
    """The model itself, or what PEFT has wrapped."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


_LOOKED_AT = 8  # first batches of each worker, held to their examples' order
# Their losses leave out the first label of each row: of decoders alone, and by any name of a class made from these.
_SHIFTING = ("ForCausalLM", "ForConditionalGeneration", "GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "BertLMHeadModel",
             "CTRLLMHeadModel")  # fmt: skip


def _shifts_labels(trainer: Any) -> bool:
    """Whether the first label of a row is of no token that is predicted. Not all trainers count so."""
    model = base_of(trainer.accelerator.unwrap_model(trainer.model))
    if getattr(trainer, "_loss_shifts_labels", False):  # transformers asks the loss
        return True
    named = any(cls.__name__.endswith(_SHIFTING) for cls in type(model).__mro__)
    return named and not getattr(getattr(model, "config", None), "is_encoder_decoder", False)


class SetLoss:
    """The loss of a whole dataset: its batches' mean losses, each weighted by the terms that it is the mean of.

    A batch of none, whose mean is NaN, is left out. In eval mode transformers' layers keep all activations; where they
    checkpoint in training, each batch is a checkpoint here.
    """

    def __init__(self, trainer: Trainer, dataset: Any, name: str, id_column: str) -> None:
        samples = hasattr(dataset, "__iter__") or hasattr(dataset, "__getitem__")
        if isinstance(dataset, str | DataLoader) or not samples:
            raise TypeError(f"validation[{name!r}]: expected a dataset or a callable, got {dataset!r}")
        collator = trainer._get_collator_with_removed_columns(trainer.data_collator, description="validation")

        def collate(examples: list[Any]) -> Any:
            if others := [example for example in examples if not hasattr(example, "items")]:
                raise TypeError(f"validation[{name!r}]: expected samples with named columns, got {others[0]!r}")
            return collator([{k: v for k, v in example.items() if k != id_column} for example in examples])

        self.trainer: Any = trainer
        self._shifts_labels = _shifts_labels(trainer)
        loader: Any = DataLoader(dataset, trainer.args.per_device_eval_batch_size, collate_fn=collate)
        with random_kept():  # of which a loader, and perhaps the collator, draws
            self.batches = list(loader)
        self.loaded = len(self.batches)
        if not self.batches:
            raise ValueError(f"validation[{name!r}]: expected a dataset of at least one sample, got none")
        terms = [self._terms(batch) for batch in self.batches]
        if not any(terms):
            raise ValueError(
                f"validation[{name!r}]: expected labels to predict (other than -100, and than a row's first where the "
                "model shifts them), got none"
            )
        weighed = [(batch, count / sum(terms)) for batch, count in zip(self.batches, terms, strict=True) if count]
        self.batches, self.weights = zip(*weighed, strict=True)

    def __call__(self) -> Tensor:
        loss_of = self.of_batch
        if any(getattr(module, "gradient_checkpointing", False) for module in self.trainer.model.modules()):
            loss_of = functools.partial(checkpoint, loss_of, use_reentrant=False)
        weighed = zip(self.batches, self.weights, strict=True)
        return sum(weight * loss_of(batch) for batch, weight in weighed)  # pyright: ignore[reportReturnType]

    def of_batch(self, batch: Any) -> Tensor:
        """A batch's mean loss, in eval mode in a backward too that computes it again."""
        trainer = self.trainer
        with in_eval_mode(trainer.model), trainer.compute_loss_context_manager():
            inputs, counted = trainer._prepare_inputs(copy.deepcopy(batch)), {}  # a loss may write into its batch
            if trainer.compute_loss_func is not None:  # which may divide by it, and has it in an evaluation too
                _, counted["num_items_in_batch"] = trainer.get_batch_samples(iter([inputs]), 1, trainer.args.device)
            return trainer.compute_loss(trainer.model, inputs, **counted)

    def _terms(self, batch: Any) -> float:
        """Labels that count, as the trainer counts them where it does; or rows."""
        labels, divides = batch.get("labels"), self.trainer.compute_loss_func is not None
        if self._shifts_labels and isinstance(labels, Tensor) and not divides and "shift_labels" not in batch:
            return float((labels[..., 1:] != -100).sum())
        _, count = self.trainer.get_batch_samples(iter([batch]), 1, self.trainer.args.device)
        labels = batch.get("shift_labels", labels)
        if count is None and isinstance(labels, Tensor):
            count = (labels != -100).sum()
        return float(count) if count is not None else len(next(v for v in batch.values() if isinstance(v, Tensor)))


@dataclass
class CarryIds:
    """A collator that leaves the ids of its examples in the batch, beside what `collator` makes of the rest.

    `batch[column]` is then `{"ids": [...], "segments": None}`, or with documents in one row their `[S + 1]` offsets.
    """

    collator: Callable[[list[Any]], Any]
    column: str
    looked_at: int = 0  # batches, of which the first are held to their examples' order

    def __getattr__(self, name: str) -> Any:
        """What trainers ask of their collators, as sentence-transformers' do."""
        if name.startswith("__"):
            raise AttributeError(name)  # as where it is copied
        return getattr(self.collator, name)

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> Any:
        if not all(hasattr(example, "items") for example in examples):
            return self.collator(examples)  # pyright: ignore  # of tuples, say: as without ids
        batch = self.collator([{k: v for k, v in example.items() if k != self.column} for example in examples])
        if not all(self.column in example for example in examples):
            return batch  # an evaluation set needs no ids; a training batch without them is refused
        found = [example[self.column] for example in examples]
        found = [i.tolist() if hasattr(i, "tolist") else i for i in found]
        packed = isinstance(found[0], list)
        kinds = [(cls.__module__.partition(".")[0], cls.__name__) for cls in type(self.collator).__mro__]
        pairs = ("trl", "DataCollatorForPreference") in kinds  # all chosen, then all rejected
        # Not patches of all images, perhaps.
        named = [batch["input_ids"]] if isinstance(batch.get("input_ids"), Tensor) else batch.values()
        tensors = [v for v in named if isinstance(v, Tensor) and v.dim() > 0]
        rows = next((v for v in tensors if len(v) == len(examples) * (1 + pairs)), tensors[0]).shape[:2]
        if not packed and rows[0] == len(examples) * (1 + pairs):
            if self.looked_at < _LOOKED_AT and not pairs:
                self._require_order(examples, batch)
                self.looked_at += 1
            batch[self.column] = {"ids": found * (1 + pairs), "segments": None}
            return batch
        if rows[0] != 1 or not _joined(examples, batch):
            raise InRunError(
                f"{self.column}: expected one id for each row, or a batch that is one row of documents (padding_free); "
                f"got {'one id per token in' if packed else f'{len(examples)} ids and'} {rows[0]} rows"
                f"{'' if rows[0] != 1 else ', which is not the examples one after another'}"
            )
        if packed:  # one id for each token; a document is a run of them
            runs = [(i, len(list(run))) for row in found for i, run in itertools.groupby(row)]
        else:
            runs = [(i, torch.as_tensor(e["input_ids"]).numel()) for i, e in zip(found, examples, strict=True)]
        offsets = [0, *itertools.accumulate(length for _, length in runs)]
        offsets[-1] = max(offsets[-1], rows[1])  # padding at the row's end, which has no gradient
        batch[self.column] = {"ids": [i for i, _ in runs], "segments": offsets}
        return batch

    def _require_order(self, examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> None:
        """Raise `InRunError` where the rows are plainly the examples, whole and perhaps padded, in another order."""
        for name, rows in batch.items():
            if not isinstance(rows, Tensor) or rows.dim() < 2 or len(rows) != len(examples):
                continue  # of single numbers, as labels are, others may be right in another order
            if any(name not in example for example in examples):
                continue
            try:
                values = [torch.as_tensor(example[name], dtype=rows.dtype, device=rows.device) for example in examples]
            except (TypeError, ValueError, RuntimeError):
                continue  # of text, say
            if all(map(_holds, rows, values)):
                continue
            order: list[int] = []
            for row in rows:
                whose = [i for i, value in enumerate(values) if _holds(row, value)]
                if len(whose) != 1:
                    break
                order += whose
            if sorted(order) == list(range(len(examples))):
                raise InRunError(
                    f"{self.column}: expected a collator that leaves its examples in their order, got {name!r} with "
                    f"those of examples {', '.join(map(str, order))}; let the sampler order them"
                )


def _holds(row: Tensor, value: Tensor) -> bool:
    """Whether a batch's row is the value, padded at either end or not at all."""
    if value.dim() != row.dim() or value.shape[1:] != row.shape[1:] or not 0 < len(value) <= len(row):
        return False
    return torch.equal(row[: len(value)], value) or torch.equal(row[len(row) - len(value) :], value)


def _joined(examples: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]) -> bool:
    """Whether the tokens of a batch's only row, where they are known, are its examples', or positions begin anew, or
    offsets (as `cu_seqlens`) are, where those do: none was left out or cut, and only the row's end is padded."""
    row = batch.get("input_ids")
    if not isinstance(row, Tensor) or any("input_ids" not in example for example in examples):
        return True
    each = [torch.as_tensor(example["input_ids"], dtype=row.dtype, device=row.device).flatten() for example in examples]
    tokens, positions = torch.cat(each), batch.get("position_ids")
    if torch.equal(row[0, : len(tokens)], tokens):
        return True
    offsets = [0, *itertools.accumulate(map(len, each))]
    if any(isinstance(x, Tensor) and x.dim() == 1 and x[: len(offsets)].tolist() == offsets for x in batch.values()):
        return True
    # They may begin at another number than 0, as RoBERTa's.
    begun = positions.eq(positions[..., :1]).nonzero() if isinstance(positions, Tensor) else None
    return begun is not None and begun[: len(each), -1].tolist() == offsets[:-1]


class InRunCallback(TrainerCallback):
    """Opens and closes the tracked run where the trainer says so; made by `attach`.

    Attributes:
        ledger: the `Ledger` that holds the values.
        loop: the `Loop` with its tracker, while training; else None.
    """

    def __init__(self, column: str, ledger: Ledger | str | Path | None, options: dict[str, Any]) -> None:
        self.column, self.options = column, options
        self.ledger = as_ledger(ledger)
        self.loop: Loop | None = None

    def on_train_begin(self, args, state, control, **kwargs):
        if self.loop is not None:  # the last attempt ended with an exception
            self.on_train_end(args, state, control)
            if args.auto_find_batch_size:  # and this one takes its place
                self.ledger.resume(state.global_step)
        options = with_clip(self.options, None if args.fp16 else args.max_grad_norm)
        self.loop = Loop(kwargs["model"], kwargs["optimizer"], start=state.global_step, ledger=self.ledger, **options)

    def on_optimizer_step(self, args, state, control, **kwargs):
        assert self.loop is not None
        self.loop.end()

    def on_train_end(self, args, state, control, **kwargs):
        loop, self.loop = self.loop, None
        if loop is not None:
            loop.close()

    def announce(self, carried: Any) -> None:
        """The ids that came with a training batch, before its forward."""
        if carried is None:
            raise InRunError(f"{self.column}: expected in every example of the training set, a batch came without it")
        assert self.loop is not None
        self.loop.announce(carried["ids"], segments=carried["segments"])


class Tracked:
    """Mixin of an attached trainer, whose checkpoints wait for the ledger."""

    _inrun: InRunCallback

    def _save_checkpoint(self: Any, *args, **kwargs):
        self._inrun.ledger.flush()  # the checkpoint must not be ahead of the ledger, of any process
        self.accelerator.wait_for_everyone()
        return super()._save_checkpoint(*args, **kwargs)  # pyright: ignore


class _Carried(Tracked):
    """Takes the ids out of the batches, where `CarryIds` has put them."""

    def training_step(self: Any, model, inputs, *args, **kwargs):
        self._inrun.announce(inputs.pop(self._inrun.column, None))
        return super().training_step(model, inputs, *args, **kwargs)  # pyright: ignore

    def prediction_step(self: Any, model, inputs, *args, **kwargs):
        inputs.pop(self._inrun.column, None)
        return super().prediction_step(model, inputs, *args, **kwargs)  # pyright: ignore
