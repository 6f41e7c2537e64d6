"""What `test_distributed.py` runs in several processes at once: every function named `check_*`, by torchrun.

    torchrun --nproc-per-node 2 distributed_worker.py <folder> [<check> ...]

Each process writes `<folder>/<rank>.json`: the check's name -> its traceback, or "". The runs with one process that
the checks compare with are made before the process group is.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from models import data, make
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP

import inrun

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(sys.argv[1])
SPLITS = ((4, 2), (1, 5), (3, 3))  # samples of each rank, by step
CLIP = 0.3
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.1),
}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def whole_loss(model: nn.Module, x: Tensor, y: Tensor, split: tuple[int, ...]) -> Tensor:
    """The mean over ranks of the mean over each rank's targets, from one forward of all samples."""
    outs, ys = model(x).split(split), y.split(split)
    return sum(F.cross_entropy(o.flatten(0, -2), t.flatten()) for o, t in zip(outs, ys, strict=True) if len(o)) / WORLD


def mine(x: Tensor, split: tuple[int, ...]) -> Tensor:
    return x.split(split)[RANK]


def batches(name: str, splits: tuple[tuple[int, ...], ...]) -> list[tuple[Tensor, Tensor]]:
    return [data(name, sum(split), seed=10 + t) for t, split in enumerate(splits)]


@functools.cache
def alone(
    name: str, kind: str, splits: tuple[tuple[int, ...], ...] = SPLITS, method: str = "first", by_callable: bool = False
) -> tuple[list[Tensor], dict[str, Tensor], list[Tensor]]:
    """Values of every step, weights at the end, and measured drops, in one process that holds the whole batch."""
    model = make(name)
    optimizer = OPTIMIZERS[kind](model.parameters())
    validation = data(name, 4, seed=2)
    options: dict[str, Any] = {"clip": CLIP} if method.startswith("path") else {}
    if by_callable:
        options["validation"] = lambda: whole_loss(model, *validation, (2, 2))
    tracker = inrun.track(model, optimizer, method, **options)
    steps = []
    for (x, y), split in zip(batches(name, splits), splits, strict=True):
        if not by_callable:
            with tracker.validation():
                whole_loss(model, *validation, (2, 2)).backward()
        with tracker.step(range(len(x))) as step:
            whole_loss(model, x, y, split).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        steps.append(step)
    if method in ("secant", "path_secant") and not by_callable:
        with tracker.validation():
            whole_loss(model, *validation, (2, 2)).backward()
    tracker.close()
    return [s.values for s in steps], model.state_dict(), [s.drop.get("validation") for s in steps]


def gathered(values: Tensor) -> Tensor:
    """The values of all ranks, in order of ranks."""
    everywhere: list[Any] = [None] * WORLD
    dist.all_gather_object(everywhere, values)
    return torch.cat(everywhere)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-4) -> None:
    scale = expected.abs().max().item()
    torch.testing.assert_close(found.float(), expected.float(), rtol=tolerance, atol=tolerance * scale)


def same_run(found: list[Tensor], weights: dict[str, Tensor], expected: Any, tolerance: float = 2e-4) -> None:
    assert weights.keys() == expected[1].keys()
    for key, value in expected[1].items():
        close(weights[key], value, tolerance)
    for values, reference in zip(found, expected[0], strict=True):
        close(gathered(values), reference, tolerance)


def raises(message: str, function: Callable[[], Any]) -> None:
    try:
        function()
    except inrun.InRunError as error:
        assert message in str(error), str(error)
    else:
        raise AssertionError(f"expected an InRunError with {message!r}, got none")


# ---------------------------------------------------------------------- DDP


def train_ddp(name, kind, wrap_first, bare_validation, **ddp_options):
    model = make(name)
    if wrap_first:
        wrapped = DDP(model, **ddp_options)
        optimizer = OPTIMIZERS[kind](wrapped.parameters())
        tracker = inrun.track(wrapped, optimizer)
    else:
        optimizer = OPTIMIZERS[kind](model.parameters())
        tracker = inrun.track(model, optimizer)
        wrapped = DDP(model, **ddp_options)
    x_val, y_val = (mine(v, (2, 2)) for v in data(name, 4, seed=2))
    found = []
    for (x, y), split in zip(batches(name, SPLITS), SPLITS, strict=True):
        with tracker.validation():
            loss_of(model if bare_validation else wrapped, x_val, y_val).backward()
        x, y = mine(x, split), mine(y, split)
        with tracker.step(range(len(x))) as step:
            loss_of(wrapped, x, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        found.append(step.values)
    tracker.close()
    same_run(found, model.state_dict(), alone(name, kind))


def check_ddp_sgd():
    train_ddp("gpt_tied", "sgd", wrap_first=False, bare_validation=True)


def check_ddp_adamw():
    train_ddp("gpt_tied", "adamw", wrap_first=True, bare_validation=False, gradient_as_bucket_view=True)


def check_ddp_forward_mode():
    train_ddp("loose", "adamw", wrap_first=True, bare_validation=True, find_unused_parameters=True)


# ----------------------------------------------------------------------


REFERENCES = [("gpt_tied", "sgd"), ("gpt_tied", "adamw"), ("loose", "adamw")]


def main() -> None:
    torch.set_num_threads(1)
    for reference in REFERENCES:
        alone(*reference)
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    results = {}
    checks = {name: check for name, check in globals().items() if name.startswith("check_")}
    for name in sys.argv[2:] or checks:
        try:
            checks[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    (FOLDER / f"{RANK}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
