"""TRL's SFTTrainer, DPOTrainer, KTOTrainer, RewardTrainer, GRPOTrainer and RLOOTrainer:

    values = attach(trainer, validation=held_out, ledger="run/ledger")
    trainer.train()
    values.ledger.bottom(10)

Of preferences each of a pair's two rows, chosen and rejected, has a value under the pair's id; the ledger adds them up.
With `padding_free=True` each document of the row has its value. Packing loses every column but the tokens, so a
dataset that is to be packed goes through `pack` first, and the trainer leaves it as it is:

    SFTTrainer(model, SFTConfig(packing=True, dataset_kwargs={"skip_prepare_dataset": True}), pack(dataset, 1024), ...)

With GRPO and RLOO a sample is one completion, and has its value under its prompt's id, in every step that uses it. The
validation loss is a callable: of reference answers, or the trainer's own on held-out rollouts, the surrogate that it
lowers to raise their reward:

    held = rollouts(trainer, held_out)
    attach(trainer, validation=lambda: trainer.compute_loss(trainer.model, held))
"""

from __future__ import annotations

import copy
import functools
import types
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from datasets import Dataset
from trl.data_utils import pack_dataset
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.reward_trainer import RewardTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_trainer import SFTTrainer
from trl.trainer.utils import FusedCausalLMOutput

from ..errors import InRunError
from ..restoring import in_eval_mode, setting
from . import huggingface

GENERATING = (GRPOTrainer, RLOOTrainer)
_IDS = "inrun_ids"  # beside the tensors of a batch of completions
TRAINERS = (SFTTrainer, DPOTrainer, KTOTrainer, RewardTrainer, *GENERATING)


def attach(
    trainer: SFTTrainer | DPOTrainer | KTOTrainer | RewardTrainer | GRPOTrainer | RLOOTrainer,
    validation: Any,
    *,
    id_column: str = "sample_id",
    **options: Any,
) -> Any:
    """As `huggingface.attach`, for one of these trainers; call it before `train()` and `evaluate()`.

    A validation dataset, or a list, is prepared (formatted, tokenized, cut, with `precompute_ref_log_probs` run through
    the reference model) as the trainer's own are, and not packed. Trainers that generate their samples take a callable.
    DPO's "sft", "aot" and "aot_unpaired" and KTO's "kto" losses couple the samples of a batch: of several batches the
    validation loss is the mean of theirs, and a warning says so.

    TRL computes the loss from the output layer's weight without calling the layer. Where that weight is trained, the
    layer is called instead, so that it is scored: the same loss, to rounding, from logits held in full.

    Raises:
        InRunError: the trainer packed its dataset by itself; it has been run already; as `huggingface.attach`.
        TypeError: another trainer; one that generates, with a validation dataset.
    """
    if not isinstance(trainer, TRAINERS):
        *most, last = (each.__name__ for each in TRAINERS)
        found = "TRL's others are not scored" if huggingface.is_of_trl(trainer) else "take huggingface.attach"
        raise TypeError(f"trainer: expected TRL's {', '.join(most)} or {last}, got {type(trainer).__name__}; {found}")
    columns = getattr(trainer.train_dataset, "column_names", None) or ()
    args: Any = trainer.args
    packed = isinstance(trainer, SFTTrainer) and args.packing and not trainer._skip_prepare_dataset
    if id_column not in columns and (packed or "seq_lengths" in columns):
        raise InRunError(
            f"id_column: expected {id_column!r} in the training set, which lost it in packing; pack it with "
            "inrun.adapters.trl.pack, tokenized, and set SFTConfig(packing_strategy='bfd', dataset_kwargs="
            "{'skip_prepare_dataset': True})"
        )
    model = huggingface.base_of(trainer.model)
    if hasattr(model, "_original_forward") or getattr(trainer, "_buffered_inputs", None) is not None:
        raise InRunError("attach: expected a trainer before its first train() or evaluate(), got one that has run")
    named = validation if isinstance(validation, Mapping) else {"validation": validation}
    generates = isinstance(trainer, GENERATING)
    for name, given in named.items() if generates else ():
        if not callable(given):
            raise TypeError(
                f"validation[{name!r}]: expected a callable with {type(trainer).__name__}, whose own loss is of "
                f"completions that the model has drawn; got {type(given).__name__}"
            )
    prepared = {name: _prepared(trainer, given, name) for name, given in named.items()}
    losses = huggingface.losses_of(trainer, prepared, id_column)
    for name, loss in losses.items():
        if isinstance(loss, huggingface.SetLoss):
            if _couples(trainer) and loss.loaded > 1:
                warnings.warn(
                    f"validation[{name!r}]: loss_type={args.loss_type!r} couples the samples of a batch, and there are "
                    f"{loss.loaded}: the validation loss is the mean of theirs. To have that of the whole, let "
                    "per_device_eval_batch_size hold all of it", stacklevel=2)  # fmt: skip
            loss.of_batch = _apart(trainer)(loss.of_batch)  # which a checkpoint runs in the backward
        else:
            losses[name] = _apart(trainer)(loss)
    mixin = _Generated if generates else None
    callback = huggingface.attached(trainer, losses, id_column=id_column, mixin=mixin, **options)
    if not isinstance(trainer, RewardTrainer) and model.get_output_embeddings().weight.requires_grad:
        temperature = trainer.temperature if isinstance(trainer, GENERATING) else 1.0
        _call_the_head(
            model,
            temperature,
            preferences=isinstance(trainer, DPOTrainer | KTOTrainer),
            bonus=getattr(trainer, "_entropy_bonus_enabled", False),
        )
    return callback


def _couples(trainer: Any) -> bool:
    """Whether the loss of a batch is no mean over its rows: of its tokens, with a divergence estimated from all, or of
    sorted log ratios."""
    args: Any = trainer.args
    kinds = args.loss_type if isinstance(trainer, DPOTrainer | KTOTrainer) else []
    return not {"sft", "kto", "aot", "aot_unpaired"}.isdisjoint([kinds] if isinstance(kinds, str) else kinds)


@torch.no_grad()
def rollouts(trainer: GRPOTrainer | RLOOTrainer, prompts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Completions that the model draws now, and their rewards: a batch for `trainer.compute_loss`.

    The trainer's loss measures a later model by these, where it keeps near to this one; draw others from time to time.

    Args:
        trainer: of `GENERATING`.
        prompts: held-out samples, as the training set's; each gets `num_generations_eval` completions.
    """
    model: Any = trainer.model
    count: Any = trainer.num_generations_eval
    repeated = [dict(prompt) for prompt in prompts for _ in range(count)]
    with _apart(trainer), in_eval_mode(model):
        with setting("_logs", [(trainer, copy.deepcopy(trainer._logs))]):
            batch = trainer._generate_and_score_completions(repeated)
        if isinstance(trainer, GRPOTrainer) and batch.get("old_per_token_logps") is None:
            # Else every model would be compared with itself: a loss that is the same for all.
            ids, mask = (torch.cat([batch[f"{part}_{what}"] for part in ("prompt", "completion")], 1)
                         for what in ("ids", "mask"))  # fmt: skip
            kept = batch["completion_ids"].shape[1]
            batch["old_per_token_logps"], *_ = trainer._get_per_token_logps_and_entropies(model, ids, mask, kept)
    return batch


def pack(dataset: Any, max_length: int, *, id_column: str = "sample_id", strategy: str = "bfd") -> Any:
    """`trl.pack_dataset`, with the ids.

    Args:
        dataset: a `datasets.Dataset` with `input_ids`, the id column, and perhaps `labels` (-100 where a mask is 0).
        max_length: tokens of a row; a longer document is cut ("bfd") or split into pieces of one id ("bfd_split").

    Returns:
        The packed rows, with one id for each token in the id column.

    Raises:
        ValueError: a column that is missing, labels where there are masks; a strategy that mixes documents.
    """
    missing = {"input_ids", id_column} - set(dataset.column_names)
    if missing:
        raise ValueError(
            f"dataset: expected the columns input_ids, of tokens, and {id_column}, got "
            f"{', '.join(dataset.column_names)}"
        )
    masks = [name for name in ("completion_mask", "assistant_masks") if name in dataset.column_names]
    if masks and "labels" not in dataset.column_names:  # the trainer's own refusal cannot see them any more
        raise ValueError(
            f"dataset: expected labels (-100 where a mask is 0) beside {' and '.join(masks)}, got none: every token "
            "would be trained on"
        )
    if strategy not in ("bfd", "bfd_split"):
        raise ValueError(f"strategy: expected 'bfd' or 'bfd_split', got {strategy!r}")
    spread = dataset.map(lambda row: {id_column: [row[id_column]] * len(row["input_ids"])})
    columns = [name for name in ("input_ids", "labels", id_column) if name in dataset.column_names]
    return pack_dataset(spread.select_columns(columns), max_length, strategy)


class _Generated(huggingface.Tracked):
    """The ids of the prompts stay with their completions, which the trainer shuffles, splits and uses again."""

    def _generate_and_score_completions(self: Any, inputs):
        batch = super()._generate_and_score_completions(inputs)  # pyright: ignore
        return {**batch, _IDS: [example.get(self._inrun.column) for example in inputs]}

    def _prepare_inputs(self: Any, inputs):
        batch = super()._prepare_inputs(inputs)  # pyright: ignore
        if self.model.training:
            ids = batch[_IDS]
            self._inrun.announce(None if None in ids else {"ids": ids, "segments": None})
        return batch


def _prepared(trainer: Any, validation: Any, name: str) -> Any:
    if isinstance(validation, list | tuple) and validation and all(isinstance(each, Mapping) for each in validation):
        validation = Dataset.from_list([*validation])
    if not hasattr(validation, "column_names"):
        return validation
    if getattr(trainer, "_skip_prepare_dataset", False):
        if (reject := getattr(trainer, "_reject_skip_prepare_without_labels", None)) is not None:
            reject({name: validation}, trainer.data_collator)
        return validation
    args: Any = trainer.args
    prepare, precompute = trainer._prepare_dataset, getattr(trainer, "_precompute_ref_logps", None)
    formatting = (False, trainer._formatting_func) if isinstance(trainer, SFTTrainer) else ()
    prepared = prepare(validation, trainer.processing_class, args, *formatting, name)
    known = {"ref_chosen_logps", "ref_logps"} & set(prepared.column_names or ())
    if precompute is not None and args.precompute_ref_log_probs and not known:
        prepared = precompute(prepared, name, args.precompute_ref_batch_size or args.per_device_eval_batch_size)
    return prepared


@contextmanager
def _apart(trainer: Any) -> Iterator[None]:
    """The block's losses are kept out of the metrics that the trainer gathers for its own evaluations."""
    before = trainer._metrics["eval"]
    trainer._metrics["eval"] = defaultdict(list)
    try:
        yield
    finally:
        trainer._metrics["eval"] = before


def _call_the_head(model: Any, temperature: float, preferences: bool, bonus: bool) -> None:
    """Give `model(fused_lm_head=True)`, which TRL has added, an output layer that is called as a module.

    Args:
        temperature: what it divides logits by.
        preferences: whether statistics of the logits are asked for too; bonus: whether the loss has the entropy in it.
    """
    own = type(model).forward

    @functools.wraps(own)
    def forward(
        self, *args, fused_lm_head=False, labels: Any = None, shift_labels=None, num_items_in_batch=None, **kwargs
    ):
        if not fused_lm_head:
            given = {"shift_labels": shift_labels, "num_items_in_batch": num_items_in_batch}
            given = {name: value for name, value in given.items() if value is not None}
            return own(self, *args, labels=labels, **given, **kwargs)
        outputs = own(self, *args, **{**kwargs, "use_cache": False})
        logits = outputs.logits.float() / temperature
        logits, labels = (logits[:, :-1], labels[:, 1:]) if shift_labels is None else (logits, shift_labels)
        mask = labels != -100
        every = logits.log_softmax(-1)
        with torch.set_grad_enabled(torch.is_grad_enabled() and bonus):
            entropy = -(every.exp() * every).sum(-1).masked_fill(~mask, 0.0)
        log_probs = every.gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1).masked_fill(~mask, 0.0)
        with torch.no_grad():
            more = (
                {"mean_logits": logits.mean(-1), "log_sum_sq_probs": (2 * every).logsumexp(-1)} if preferences else {}
            )
            more = {name: x.masked_fill(~mask, 0.0) for name, x in more.items()}
        count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        return FusedCausalLMOutput(
            loss=-log_probs.sum() / count, log_probs=log_probs, entropy=entropy, label_mask=mask,
            is_top1=(logits.argmax(-1) == labels) & mask, aux_loss=outputs.get("aux_loss"), **more,
        )  # fmt: skip

    model.forward = types.MethodType(forward, model)
