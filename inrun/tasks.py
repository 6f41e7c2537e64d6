"""Small real training tasks with a known answer at hand: an MLP on handwritten digits, a GPT on text.

Everything is float64 on the CPU and drawn from a seed. The digits are scikit-learn's (1797 images of 8 x 8 pixels,
which its install holds); the text is the source of a few modules of Python's standard library, named here, so that it
is the same wherever that Python is, whatever else is installed.
"""

from __future__ import annotations

import functools
import sysconfig
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn, optim

from .config import GPTConfig
from .data import IGNORE, Document
from .demo import some
from .errors import InRunError
from .gpt import GPT

TRAINING_TEXT = ("argparse", "ast", "calendar", "configparser", "csv", "difflib", "gettext", "heapq", "inspect",
                 "mailbox", "pdb", "shlex", "statistics", "tarfile", "threading", "typing")  # fmt: skip
VALIDATION_TEXT = ("fractions", "textwrap")


@dataclass(frozen=True)
class Task:
    """A model and its data: x [N, ...], y [N] or [N, T] (classes, or `IGNORE`)."""

    name: str
    make: Callable[[], nn.Module]
    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    warm_steps: int

    def model(self, seed: int) -> nn.Module:
        """A fresh model."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self.make().double()

    def start(self, seed: int) -> nn.Module:
        """A model in the middle of training: `warm_steps` steps of Adam at 4e-3, batch 16, behind it."""
        model = self.model(seed)
        take_steps(self, model, optim.Adam(model.parameters(), lr=4e-3), range(self.warm_steps), 16, seed)
        return model

    def batch(self, step: int, size: int, seed: int) -> tuple[Tensor, Tensor]:
        """A batch drawn without replacement, a function of (seed, step)."""
        chosen = np.random.default_rng((seed, step)).choice(len(self.train[0]), size, replace=False)
        return self.train[0][chosen], self.train[1][chosen]

    def validation_loss(self, model: nn.Module) -> Tensor:
        return loss(model, *self.validation)

    def training_loss(self, model: nn.Module) -> Tensor:
        """Over some 100 of the training samples, always the same ones."""
        every = max(1, len(self.train[0]) // 100)
        return loss(model, self.train[0][::every], self.train[1][::every])


def loss(model: nn.Module, x: Tensor, y: Tensor, out_of: int | None = None) -> Tensor:
    """Cross-entropy, the mean over all predictions; or their sum divided by `out_of`, the share in a larger batch."""
    total = F.cross_entropy(model(x).flatten(0, -2), y.flatten(), ignore_index=IGNORE, reduction="sum")
    return total / (predictions(y) if out_of is None else out_of)


def take_steps(
    task: Task, model: nn.Module, optimizer: optim.Optimizer, steps: Iterable[int], size: int, seed: int
) -> None:
    """Train on the batches of these step numbers."""
    for t in steps:
        loss(model, *task.batch(t, size, seed)).backward()
        optimizer.step()
        optimizer.zero_grad()


def predictions(y: Tensor) -> int:
    return int((y != IGNORE).sum())


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's digits in a fixed shuffled order: pixels from 0 to 1, float64 [1797, 64]; classes [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InRunError("digits: needs scikit-learn: pip install scikit-learn") from None
    bunch: Any = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    return bunch.data[order] / 16.0, bunch.target[order].astype(np.int64)


def mlp(hidden: int = 32) -> nn.Module:
    return nn.Sequential(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(), nn.Linear(hidden, 10))


def digits_task(validation: int = 200) -> Task:
    x, y = (torch.from_numpy(a) for a in digits())
    return Task("digits", mlp, (x[validation:], y[validation:]), (x[:validation], y[:validation]), warm_steps=80)


def library(modules: Iterable[str]) -> list[Document]:
    """The source of modules of Python's standard library."""
    root = Path(sysconfig.get_paths()["stdlib"])
    return [Document(name, "python", (root / f"{name}.py").read_bytes()) for name in modules]


def gpt_task(config: GPTConfig | None = None, validation: int = 8, training: int = 960) -> Task:
    """So many samples of each text."""
    config = config or GPTConfig(block_size=32, layers=2, heads=2, width=32)
    texts = ((TRAINING_TEXT, training), (VALIDATION_TEXT, validation))
    parts = [some(library(names), n, config.block_size, np.random.default_rng(0)) for names, n in texts]
    return Task("gpt", lambda: GPT(config), *(part.batch(range(len(part))) for part in parts), warm_steps=600)


class Lion(optim.Optimizer):
    """The sign of an interpolation of momentum and gradient; torch has none.

    Source: Chen et al., arXiv 2302.06675, algorithm 2.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                average = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                b1, b2 = group["betas"]
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.add_(torch.sign(b1 * average + (1 - b1) * p.grad), alpha=-group["lr"])
                average.mul_(b2).add_(p.grad, alpha=1 - b2)


class Muon:
    """`torch.optim.Muon` for matrices and AdamW, at a twentieth of its rate, for all else."""

    def __init__(self, params: Iterable[Tensor], lr: float = 1e-2) -> None:
        held = list(params)
        matrices, others = [p for p in held if p.dim() == 2], [p for p in held if p.dim() != 2]
        self.optimizers = [optim.Muon(matrices, lr=lr), optim.AdamW(others, lr=lr / 20)]

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad()


# name -> how to make it, given parameters and lr; and a rate that most models bear.
OPTIMIZERS: dict[str, tuple[Callable[[Any, float], Any], float]] = {
    "sgd": (lambda p, lr: optim.SGD(p, lr=lr), 0.05),
    "momentum": (lambda p, lr: optim.SGD(p, lr=lr, momentum=0.9), 0.005),
    "nesterov": (lambda p, lr: optim.SGD(p, lr=lr, momentum=0.9, nesterov=True), 0.005),
    "adam": (lambda p, lr: optim.Adam(p, lr=lr), 5e-4),
    "adamw": (lambda p, lr: optim.AdamW(p, lr=lr, weight_decay=0.1), 5e-4),
    "rmsprop": (lambda p, lr: optim.RMSprop(p, lr=lr), 2e-4),
    "adagrad": (lambda p, lr: optim.Adagrad(p, lr=lr), 2e-3),
    "lion": (lambda p, lr: Lion(p, lr=lr, weight_decay=0.1), 1e-4),
    "muon": (lambda p, lr: Muon(p, lr=lr), 5e-3),
}
