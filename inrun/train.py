"""`inrun train`: a GPT trained on text while every sample gets its value, in a run that survives a kill.

A checkpoint of step n is renamed into place only after everything steps 0..n-1 wrote has reached the disk;
resuming cuts the ledger and the metrics back to n, so no step is lost or doubled, and the rest of the run is
the same, to the bit on a CPU, as if it had never stopped.
"""

from __future__ import annotations

import math
import pickle
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrun import data, report, runfolder
from inrun.check import Agenda
from inrun.clock import Clock, now
from inrun.config import TrainConfig
from inrun.errors import InRunError
from inrun.gpt import GPT
from inrun.ledger import Ledger
from inrun.restoring import in_eval_mode, random_kept, setting
from inrun.tracker import track
from inrun.updates import counts_read, updates


class Stopped(Exception):
    """A signal ended the run after `step` steps; its checkpoint is written."""

    def __init__(self, signum: int, step: int, folder: Path) -> None:
        super().__init__(f"stopped after {step} steps; continue with: inrun train --resume --out {folder}")
        self.signum = signum


def train(config: TrainConfig) -> dict[str, Any]:
    """Train, value every sample, and report.

    Args:
        config: the whole run; see `TrainConfig`.

    Returns:
        The figures of `report.json` (see `inrun.report.figures`), with the run folder under "run".

    Raises:
        FileNotFoundError, ValueError: text that is missing or unusable; a bad setting.
        InRunError: `out` holds a run already, or, with `resume`, none or one with other settings.
        Stopped: SIGINT or SIGTERM; the run can be resumed.
    """
    config.require_valid()
    device = find_device(config.device)
    folder = runfolder.choose(config)
    training, validation = load_samples(config)
    runfolder.begin(folder, config, training, validation)
    with _stop_signals() as stop:
        run = _Run(config, folder, device, training, validation)
        run.loop(stop)
    figures = report.write(folder)
    return {"run": str(folder), **figures}


def find_device(name: str) -> torch.device:
    """The device of that name; of "auto" a GPU where there is one.

    Raises:
        ValueError: torch has none of that name here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        reason = str(error).partition("\n")[0]
        raise ValueError(f"device: expected one that torch finds here, got {name!r}: {reason}") from None


def load_samples(config: TrainConfig) -> tuple[data.Samples, data.Samples]:
    """The run's training and validation samples."""
    block_size, n = config.model.block_size, config.validation_samples
    if not config.text:
        from inrun.demo import demo_corpus

        if config.tokenizer is not None:
            raise ValueError("tokenizer: expected --text with it; the demo corpus is made of bytes")
        return demo_corpus(block_size, config.seed, validation=n)
    codec = data.TokenizerCodec(config.tokenizer) if config.tokenizer else data.ByteCodec()
    documents = data.read_text(config.text)
    if config.holdout is not None:
        documents, chosen = data.split(documents, config.holdout, config.holdout_fraction, config.seed)
    else:
        chosen = data.read_text(config.validation)
    held_out = data.cut(chosen, block_size, codec)
    training = data.without(data.cut(documents, block_size, codec), held_out)
    drawn = np.random.default_rng(config.seed).permutation(len(held_out))[:n]
    return training, held_out.take(sorted(drawn))


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """The configured optimizer over the trainable parameters; weight decay on matrices only."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=config.momentum)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas)


def lr_at(step: int, config: TrainConfig) -> float:
    """The learning rate of a step: linear warm-up, then constant or a cosine down to a tenth."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.lr * (0.1 + 0.45 * (1 + math.cos(math.pi * done)))


class _Run:
    """Everything one run holds: model, optimizer, tracker, samples, and the step it is at."""

    def __init__(
        self, config: TrainConfig, folder: Path, device: torch.device, training: data.Samples, validation: data.Samples
    ) -> None:
        self.config, self.folder, self.device, self.samples = config, folder, device, training
        self.bf16 = device.type == "cuda" if config.bf16 is None else config.bf16
        torch.manual_seed(config.seed)
        self.model = GPT(config.model, training.codec.vocab_size).to(device)
        self.params = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(self.model, config)
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.target = validation.batch(range(len(validation)), device)
        self.target_tokens = int((validation.lengths - 1).sum())
        self.ledger = Ledger(folder / "ledger")
        self.tracker = track(
            self.model,
            self.optimizer,
            validation=self.validation_loss,
            validate_every=config.validate_every,
            ledger=self.ledger,
        )
        self.metrics = runfolder.Metrics(folder / "metrics.jsonl")
        self.clock = Clock()
        self.step = self.saved = 0  # the next step to run, and that of the last checkpoint
        if config.resume:
            self.restore()

    def loss(self, x: Tensor, y: Tensor, count: int) -> Tensor:
        """The loss of a batch's tokens, summed, over `count`: all tokens of the step, so a mean over them."""
        with torch.autocast(self.device.type, torch.bfloat16) if self.bf16 else nullcontext():
            logits = self.forward(x)
        flat = logits.float().flatten(0, 1)
        return F.cross_entropy(flat, y.flatten(), ignore_index=data.IGNORE, reduction="sum") / count

    def validation_loss(self) -> Tensor:
        with in_eval_mode(self.model):
            return self.loss(*self.target, self.target_tokens)

    def loop(self, stop: list[int]) -> None:
        """Take the steps that are left; after a signal in `stop`, end where the run can be resumed."""
        from tqdm import tqdm

        config = self.config
        with tqdm(total=config.steps, initial=self.step, unit="step", smoothing=0.1) as bar:
            while self.step < config.steps:
                # Between validations the direction stems from weights that are gone: checkpoints are at one.
                resumable = self.step % config.validate_every == 0
                if stop and resumable:
                    self.save()
                    raise Stopped(stop[0], self.step, self.folder)
                if resumable and self.step - self.saved >= config.checkpoint_every:
                    self.save()
                row = self.train_step()
                if self.step % 10 == 0 or self.step == config.steps:
                    shown = {k: f"{row[k]:.3f}" for k in ("loss", "validation_loss") if row[k] is not None}
                    speed, share = row["samples_per_second"], row["scoring_share"]
                    bar.set_postfix(shown | {"samples/s": f"{speed:.0f}", "scoring": f"{share:.0%}"})
                bar.update()
        with torch.no_grad():
            self.metrics.add(step=self.step, validation_loss=self.validation_loss())
        self.save()
        self.tracker.close()
        self.ledger.close()

    def train_step(self) -> dict[str, Any]:
        config, tracker, clock = self.config, self.tracker, self.clock
        indices = data.batch_at(self.step, config.batch_size, len(self.samples), config.seed)
        parts = [
            ([self.samples.ids[i] for i in part], *self.samples.batch(part, self.device))
            for part in np.array_split(indices, config.accumulation)
        ]
        count = int((self.samples.lengths[indices] - 1).sum())
        for group in self.optimizer.param_groups:
            group["lr"] = lr_at(self.step, config)
        calibrating = clock.due(self.step)
        measuring = bool(config.measure_every) and self.step % config.measure_every == config.measure_every - 1
        without = self.without_batch() if measuring else None

        wait = self.device if calibrating else None  # waiting at every step would slow training
        start = now(wait)
        with tracker.step() as scored:
            validated = now(wait)
            losses = []
            for ids, x, y in parts:
                scored.batch(ids)
                loss = self.loss(x, y, count)
                loss.backward()
                losses.append(loss.detach())
            passed = now(wait)
            if config.clip:
                nn.utils.clip_grad_norm_(self.params, config.clip)
            self.optimizer.step()
            self.optimizer.zero_grad()
        clock.add(now(wait) - start, passed - validated, len(indices))
        if calibrating:
            clock.calibrate(passed - validated, self.plain_seconds(parts, count))
        row = self.metrics.add(
            step=self.step,
            loss=torch.stack(losses).sum(),
            validation_loss=tracker.last_validation["validation"] if self.step % config.validate_every == 0 else None,
            value_sum=scored.values.sum(),
            batch_drop=None if without is None else self.batch_drop(without),
            **clock.figures(tracker.seconds),
        )
        self.step += 1
        return row

    def plain_seconds(self, parts: list, count: int) -> float:
        """Seconds the same forward and backward take untracked; leaves gradients and random state alone."""
        with self.tracker.paused(), random_kept():
            start = now(self.device)
            for _, x, y in parts:
                torch.autograd.grad(self.loss(x, y, count), self.params)
            return now(self.device) - start

    @torch.no_grad()
    def without_batch(self) -> list[Tensor]:
        """The weights w + u(0) that the coming step would reach with a gradient of zero.

        u is the optimizer's update as a function of the gradient; u(0) is old momentum and weight decay.
        """
        slots = self.tracker.slots
        nothing = [torch.zeros_like(s.param, dtype=torch.float64) for s in slots]
        with counts_read(slots):
            moves = updates(slots, nothing)
        return [s.param + u.to(s.param.dtype) for s, u in zip(slots, moves, strict=True)]

    @torch.no_grad()
    def batch_drop(self, without: list[Tensor]) -> Tensor:
        """What the last step's batch took off the validation loss: loss(w + u(0)) - loss(w + u(g_B))."""
        with_batch = self.validation_loss()
        with setting("data", [(s.param, w) for s, w in zip(self.tracker.slots, without, strict=True)]):
            return self.validation_loss() - with_batch

    def save(self) -> None:
        """Write a checkpoint, after everything it stands on is on disk."""
        self.ledger.flush()
        self.metrics.flush()
        if self.step == self.saved:
            return
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
            "checks": (sorted(self.tracker.agenda.certain), self.tracker.agenda.made, self.tracker.agenda.due),
        }
        runfolder.save_checkpoint(self.folder, self.step, state)
        self.saved = self.step

    def restore(self) -> None:
        """Load the last checkpoint (without one, begin anew) and cut ledger and metrics back to it."""
        if (state := self._last_whole()) is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"].cpu())
            if state["cuda_rng"]:
                torch.cuda.set_rng_state_all([s.cpu() for s in state["cuda_rng"]])
            # A check adds up in another order: a resumed run makes those that are to come, and repeats none.
            certain, *others = state.get("checks", ((),))
            self.tracker.agenda, self.tracker.check_due = Agenda(set(certain), *others), False
            self.step = self.saved = self.tracker.steps = state["step"]
        self.ledger.resume(self.step)
        self.metrics.resume(self.step)

    def _last_whole(self) -> dict[str, Any] | None:
        """The last checkpoint that can be read; None where the run has none. Those after it go out of the way."""
        found, damaged = runfolder.checkpoints(self.folder), {}
        for path in reversed(found):
            try:
                state = torch.load(path, map_location="cpu", weights_only=True)
            except (EOFError, RuntimeError, pickle.UnpicklingError) as error:
                damaged[path] = repr(error).splitlines()[0]
                continue
            for each, why in damaged.items():
                print(f"inrun: going on from {path}; {each} cannot be read: {why}", file=sys.stderr)
                each.rename(each.with_suffix(".damaged"))
            return state
        if damaged:
            told = "; ".join(f"{path} ({why})" for path, why in damaged.items())
            raise InRunError(f"resume: expected a checkpoint that can be read, got {told}")
        return None


@contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Note SIGINT and SIGTERM in a list instead of dying of them; the second one acts as usual."""
    caught: list[int] = []
    usual = {}

    def note(signum: int, frame: Any) -> None:
        caught.append(signum)
        for s, handler in usual.items():
            signal.signal(s, handler)

    try:
        for signum in (signal.SIGINT, signal.SIGTERM):
            usual[signum] = signal.signal(signum, note)
    except ValueError:  # not in the main thread, where signals never arrive
        pass
    try:
        yield caught
    finally:
        for signum, handler in usual.items():
            signal.signal(signum, handler)
