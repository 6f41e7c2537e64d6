"""The training run that the experiments on text share: a small GPT, AdamW, float32, a value for every sample."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import GPTConfig
from ..data import IGNORE, Samples, batch_at
from ..gpt import GPT
from ..tracker import track

SMALL = GPTConfig(block_size=64, layers=2, heads=4, width=48)


@dataclass
class Record:
    """A finished run.

    Attributes:
        model: as it ended.
        ids: [steps, batch], each step's samples as rows of the whole corpus.
        values: [steps, batch, targets], nats; empty where no target was given.
        looks: step -> loss on the test text.
    """

    model: nn.Module
    ids: np.ndarray
    values: np.ndarray
    looks: dict[int, float] = field(default_factory=dict)

    def totals(self, samples: int) -> np.ndarray:
        """Each sample's value over the run, [samples, targets]."""
        total = np.zeros((samples, self.values.shape[2]))
        np.add.at(total, self.ids.ravel(), self.values.reshape(-1, self.values.shape[2]))
        return total


def train(
    corpus: Samples,
    *,
    seed: int,
    steps: int,
    batch: int = 16,
    keep: np.ndarray | None = None,
    targets: Mapping[str, Samples] | None = None,
    method: str = "path_secant",
    validate_every: int = 1,
    test: Samples | None = None,
    look_every: int = 20,
    config: GPTConfig = SMALL,
    lr: float = 3e-3,
) -> Record:
    """Train from weights and in an order that hang on `seed` alone.

    Args:
        keep: the rows of `corpus` to train on; None for all.
        targets: validation texts that the samples are valued for; None for plain training.
        test: text on which the loss is looked at every `look_every` steps.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = GPT(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.1)
    rows = np.arange(len(corpus)) if keep is None else keep
    ids = np.stack([rows[batch_at(t, batch, len(rows), seed)] for t in range(steps)])
    tracker = None
    if targets is not None:
        held = {name: s.batch(range(len(s))) for name, s in targets.items()}
        losses = {name: lambda xy=xy: loss(model, *xy) for name, xy in held.items()}
        tracker = track(model, optimizer, method, validation=losses, validate_every=validate_every)
    record = Record(model, ids, np.zeros((steps, batch, len(targets or ()))))
    looking = None if test is None else test.batch(range(len(test)))
    for t, chosen in enumerate(ids):
        with nullcontext() if tracker is None else tracker.step(chosen) as step:
            loss(model, *corpus.batch(chosen)).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step is not None:
            record.values[t] = step.values.view(batch, -1).numpy()
        if looking is not None and (t + 1) % look_every == 0:
            with torch.no_grad(), nullcontext() if tracker is None else tracker.paused():
                record.looks[t + 1] = float(loss(model, *looking))
    if tracker is not None:
        tracker.close()
    return record


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, 1), y.flatten(), ignore_index=IGNORE)


def sample_losses(model: nn.Module, samples: Samples) -> np.ndarray:
    """The mean loss of each sample, [N]."""
    found = []
    with torch.no_grad():
        for part in np.array_split(np.arange(len(samples)), max(len(samples) // 64, 1)):
            x, y = samples.batch(part)
            each = F.cross_entropy(model(x).transpose(1, 2), y, ignore_index=IGNORE, reduction="none")
            found.append(each.sum(1) / (y != IGNORE).sum(1))
    return torch.cat(found).numpy()


def smoothed(looks: Mapping[int, float], width: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Steps and the mean of the last `width` looks up to each."""
    steps, losses = np.array(list(looks)), np.array(list(looks.values()))
    mean = [losses[max(i - width + 1, 0) : i + 1].mean() for i in range(len(losses))]
    return steps, np.array(mean)
