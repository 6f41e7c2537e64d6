"""What `test_distributed.py` runs in several processes at once: every function named `check_*`, by torchrun.

    torchrun --nproc-per-node 2 distributed_worker.py <folder> [<check> ...]

Each process writes `<folder>/<rank>.json`: the check's name -> its traceback, or "". The runs with one process that
the checks compare with are made before the process group is.
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import functools
import importlib.util
import itertools
import json
import os
import re
import signal
import sys
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from models import MODELS, data, make
from real_models import CASES, error
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.checkpoint import checkpoint

import inrun
from inrun.watch import WATCHED_ELEMENTS

RANK, WORLD = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
FOLDER = Path(sys.argv[1])
SPLITS = ((4, 2), (1, 5), (3, 3))  # samples of each rank, by step
IDLE = ((4, 2), (3, 0))  # the second rank runs out of samples
EVEN = ((3, 3), (3, 3))  # which a compiler captures once; it takes the changing ones of a smaller model
CLIP = 0.3
HUGGING_FACE = importlib.util.find_spec("transformers") is not None
ONE, TWO = ("validation",), ("code", "prose")  # targets
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "plain": lambda p: torch.optim.SGD(p, lr=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, eps=1e-4, weight_decay=0.1),
}


class Logits(nn.Module):
    """A Hugging Face model of token ids."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.model = CASES[name].built()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.model.layers

    def forward(self, x: Tensor) -> Tensor:
        return self.model(input_ids=x).logits


class Turned(nn.Module):
    """Its layer is given `[B * T, W]`, sample after sample; or tokens first, `[T, B, W]`."""

    def __init__(self, tokens_first: bool = False) -> None:
        super().__init__()
        self.token, self.inner, self.head = nn.Embedding(13, 8), nn.Linear(8, 8), nn.Linear(8, 13)
        self.tokens_first = tokens_first

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x)
        if self.tokens_first:
            h = self.inner(h.transpose(0, 1)).tanh().cumsum(0).transpose(0, 1)
        else:
            h = self.inner(h.reshape(-1, 8)).tanh().view_as(h).cumsum(1)
        return self.head(h)


class Spread(nn.Module):
    """Layers of every kind that tensor parallelism spreads, of an odd vocabulary."""

    def __init__(self, tied: bool = False, own: bool = False) -> None:
        super().__init__()
        self.token, self.norm, self.head = nn.Embedding(13, 8), nn.LayerNorm(8), nn.Linear(8, 13, bias=False)
        self.blocks = nn.ModuleList(SpreadBlock() for _ in range(2))
        self.norm = OwnNorm() if own else self.norm
        self.tied, self.checkpointed = tied, None
        self.tie()

    def tie(self) -> None:
        if self.tied:
            self.head.weight = self.token.weight

    def embedded(self, x: Tensor) -> Tensor:
        return self.token(x)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embedded(x)
        for block in self.blocks:
            h = block(h) if self.checkpointed is None else checkpoint(block, h, use_reentrant=self.checkpointed)
        return self.head(self.norm(h))


class OwnNorm(nn.Module):
    """As models write it themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 8))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6))


class SpreadBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 14), nn.Linear(14, 8)
        self.rms, self.q, self.o = nn.RMSNorm(8), nn.Linear(8, 8, bias=False), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(self.up(self.norm(x)).tanh())
        return x + self.o(self.q(self.rms(x)).sigmoid())


MODELS |= {"gpt_spread": Spread, "gpt_spread_tied": lambda: Spread(tied=True)}
MODELS |= {"gpt_spread_own": lambda: Spread(own=True)}
MODELS |= {"gpt_flat": Turned, "gpt_turned": lambda: Turned(tokens_first=True)}
MODELS |= {"hf_llama": lambda: Logits("Llama"), "hf_mixtral": lambda: Logits("Mixtral")}


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def whole_loss(model: nn.Module, x: Tensor, y: Tensor, split: tuple[int, ...]) -> Tensor:
    """The mean over ranks of the mean over each rank's targets, from one forward of all samples."""
    outs, ys = model(x).split(split), y.split(split)
    means = (F.cross_entropy(o.flatten(0, -2), t.flatten()) for o, t in zip(outs, ys, strict=True) if len(o))
    return sum(means) / len(split)


def mine(x: Tensor, split: tuple[int, ...]) -> Tensor:
    return x.split(split)[RANK]


def batches(name: str, splits: tuple[tuple[int, ...], ...]) -> list[tuple[Tensor, Tensor]]:
    return [data(name, sum(split), seed=10 + t) for t, split in enumerate(splits)]


Run = tuple[list[Tensor], dict[str, Tensor], list[dict[str, Tensor]]]


def alone(name: str, kind: str, splits=SPLITS, method: str = "first", by_callable: bool = False, targets=ONE) -> Run:
    """Values of every step, weights at the end, and measured drops, in one process that holds the whole batch."""
    return _alone(name, kind, splits, method, by_callable, targets)


@functools.cache
def _alone(name: str, kind: str, splits: Any, method: str, by_callable: bool, targets: tuple[str, ...]) -> Run:
    model = make(name)
    optimizer = OPTIMIZERS[kind](model.parameters())
    losses = {target: lambda k=k: whole_loss(model, *data(name, 4, seed=2 + k), (2, 2))
              for k, target in enumerate(targets)}  # fmt: skip
    tracker = inrun.track(model, optimizer, method, **options_of(method, losses if by_callable else None, targets))
    steps = []

    def validate():
        for target in () if by_callable else targets:
            with tracker.validation(target):
                losses[target]().backward()

    for (x, y), split in zip(batches(name, splits), splits, strict=True):
        validate()
        with tracker.step(range(len(x))) as step:
            whole_loss(model, x, y, split).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        steps.append(step)
    if method in ("secant", "path_secant"):
        validate()
    tracker.close()
    return [s.values for s in steps], model.state_dict(), [s.drop for s in steps]


def options_of(method: str, losses: Any, targets: tuple[str, ...]) -> dict[str, Any]:
    """What `track` is told of a method: the clipping, and validation callables or the names of the targets."""
    sides = {"targets": targets} if losses is None else {"validation": losses}
    return {**sides, **({"clip": CLIP} if method.startswith("path") else {})}


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


def validation_loss(model, name="gpt_tied", k=0):
    """Of this rank's samples of the k-th target."""
    return loss_of(model, *(mine(v, (2, 2)) for v in data(name, 4, seed=2 + k)))


def validate(tracker, model, name="gpt_tied"):
    for k, target in enumerate(tracker.targets):
        with tracker.validation(target):
            validation_loss(model, name, k).backward()


def train(model, optimizer, tracker, name="gpt_tied", after=None, validated=None):
    """The values of each step; validation runs `validated`, or the model as it is trained."""
    found = []
    for (x, y), split in zip(batches(name, SPLITS), SPLITS, strict=True):
        validate(tracker, validated or model, name)
        x, y = mine(x, split), mine(y, split)
        with tracker.step(range(len(x))) as step:
            loss_of(model, x, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        found.append(step.values)
        if after is not None:
            after()
    return found


# ---------------------------------------------------------------------- DDP


def train_ddp(name, kind, wrap_first, bare_validation, transposed=False, **ddp_options):
    model = make(name)
    for p in model.parameters() if transposed else ():
        p.data = p.data.mT.contiguous().mT if p.dim() == 2 else p.data
    if wrap_first:
        wrapped = DDP(model, **ddp_options)
        optimizer = OPTIMIZERS[kind](wrapped.parameters())
        tracker = inrun.track(wrapped, optimizer)
    else:
        optimizer = OPTIMIZERS[kind](model.parameters())
        tracker = inrun.track(model, optimizer)
        wrapped = DDP(model, **ddp_options)
    found = train(wrapped, optimizer, tracker, name, validated=model if bare_validation else None)
    tracker.close()
    same_run(found, model.state_dict(), alone(name, kind))


def check_ddp_sgd():
    train_ddp("gpt_tied", "sgd", wrap_first=False, bare_validation=True)


def check_ddp_adamw():
    train_ddp("gpt_tied", "adamw", wrap_first=True, bare_validation=False, gradient_as_bucket_view=True)


def check_ddp_of_weights_that_lie_transposed():
    train_ddp("gpt_tied", "adamw", wrap_first=True, bare_validation=True, transposed=True)


def check_ddp_forward_mode():
    train_ddp("loose", "adamw", wrap_first=True, bare_validation=False, static_graph=True)


class Branches(nn.Module):
    """A branch of many layers that may be closed, and one that is open."""

    def __init__(self):
        super().__init__()
        widths = (5, 6, 7, 8, 9, 10, 11, 1, 1, 2, 2, 3, 3, 3)
        self.branch = nn.ModuleList(nn.Linear(4, width, bias=False) for width in widths)
        self.open, self.gate = nn.Linear(4, 4, bias=False), 1.0

    def forward(self, x):
        return self.open(x) + self.gate * sum(layer(x).tanh().sum(1, keepdim=True) for layer in self.branch)


def check_ddp_sees_clipping_where_a_branch_is_closed():
    """Whose gradients are zeros, whatever they are multiplied by."""
    x, held = (torch.randn(8, 4, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    mine = slice(4 * RANK, 4 * RANK + 4)
    for method in ("first", "path"):
        torch.manual_seed(0)
        model = Branches()
        called, optimizer = DDP(model), torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = inrun.track(called, optimizer, method)
        params = list(model.parameters())
        for model.gate in (1.0, 0.0, 0.0):
            along = torch.autograd.grad(model(held).square().mean(), params)
            ones = [torch.autograd.grad(model(x[[k]]).square().mean() / 8, params) for k in range(8)]
            size = torch.stack([sum(g).square().sum() for g in zip(*ones, strict=True)]).sum().sqrt()
            dots = [sum((a * g).sum() for a, g in zip(along, one, strict=True)) for one in ones]
            with tracker.validation():
                model(held).square().mean().backward()
            with tracker.step(range(4)) as step:
                called(x[mine]).square().mean().backward()
                nn.utils.clip_grad_norm_(params, 0.05)
                optimizer.step()
                optimizer.zero_grad()
            close(step.values, torch.stack(dots)[mine] * 0.1 * 0.05 / size, 1e-3)


class Heads(nn.Module):
    """Each step trains one of its heads."""

    def __init__(self):
        super().__init__()
        self.body, self.heads = nn.Linear(4, 4), nn.ModuleList(nn.Linear(4, 1) for _ in range(2))

    def forward(self, x, which):
        return self.heads[which](self.body(x).tanh())


def check_ddp_that_finds_unused_parameters():
    """A validation loss that reaches both heads, past DDP's wrapper or through it, leaves no mark in it."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))[4 * RANK : 4 * RANK + 4]

    def trained(how, view, to_none, whole=True):
        torch.manual_seed(0)
        model = Heads()
        called = DDP(model, find_unused_parameters=True, gradient_as_bucket_view=view)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)

        def loss(module, which):
            return module(x, which).square().mean()

        both = (lambda: loss(model, 0) + loss(model, 1)) if how == "callable" else None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "optimizer: has 4 parameters that the model has not")
            tracker = inrun.track(model if whole else model.body, optimizer, validation=both) if how else None
        for number in range(3):
            if how == "bare":
                with tracker.validation():
                    (loss(model, 0) + loss(model, 1)).backward()
            if how == "wrapper":
                with tracker.validation():
                    loss(called, 0).backward()
                    loss(called, 1).backward()
            with tracker.step(range(4)) if how else contextlib.nullcontext() as step:
                loss(called, number % 2).backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=to_none)
            assert how is None or (step.values != 0).all()
        return [p.detach().clone() for p in model.parameters()]

    for view, to_none in ((False, True), (True, False)):
        plain = trained(None, view, to_none)
        for how, whole in itertools.product(("callable", "bare", "wrapper"), (True, False)):
            for a, b in zip(trained(how, view, to_none, whole), plain, strict=True):
                close(a, b, 1e-6)


def check_a_compiled_ddp_reduces_the_gradients_of_every_step():
    """A graph that was captured in a validation block, or for a batch that is computed again, is the step's too."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(3))[4 * RANK : 4 * RANK + 4]
    for again in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))
        called = torch.compile(DDP(model), backend="eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tracker = inrun.track(model, optimizer, "path")

        def loss(called=called):
            return called(x).square().mean()

        for _ in range(2):
            with tracker.validation():
                loss().backward()
            with tracker.step(range(4), recompute=loss) if again else tracker.paused():
                loss().backward()
                for p in model.parameters():
                    dist.all_reduce(total := p.grad.clone())
                    close(p.grad, total / WORLD)
                if again:
                    optimizer.step()
                optimizer.zero_grad()


def prepared(name="gpt_tied", kind="sgd", **options):
    model = make(name)
    optimizer = OPTIMIZERS[kind](model.parameters())
    tracker = inrun.track(model, optimizer, **options)
    return model, optimizer, tracker, DDP(model)


def check_accumulation_without_synchronisation():
    model, optimizer, tracker, wrapped = prepared(kind="adamw")
    found = []
    for (x, y), split in zip(batches("gpt_tied", SPLITS), SPLITS, strict=True):
        validate(tracker, model)
        x, y = mine(x, split), mine(y, split)
        parts = (slice(0, 1), slice(1, None)) if len(x) > 1 else (slice(0, 1),)
        with tracker.step() as step:
            for i, part in enumerate(parts):
                step.batch([f"{RANK}-{k}" for k in range(len(x))][part])
                with wrapped.no_sync() if i < len(parts) - 1 else contextlib.nullcontext():
                    (loss_of(wrapped, x[part], y[part]) * len(x[part]) / len(x)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        assert step.ids == [f"{RANK}-{k}" for k in range(len(x))]
        found.append(step.values)
    same_run(found, model.state_dict(), alone("gpt_tied", "adamw"))


def check_a_rank_without_samples_and_one_ledger():
    """The second rank runs out of samples before the last step; both write into one folder."""
    folder = FOLDER / "ledger"
    model, optimizer, tracker, wrapped = prepared(ledger=folder)
    found = []
    for t, ((x, y), split) in enumerate(zip(batches("gpt_tied", IDLE), IDLE, strict=True)):
        validate(tracker, model)
        ids = mine(torch.arange(len(x)) + 100 * t, split)
        x, y = mine(x, split), mine(y, split)
        with tracker.step(ids) as step:
            loss = loss_of(wrapped, x, y) if len(x) else 0 * loss_of(wrapped, *data("gpt_tied", 1))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        assert step.values.shape == (len(ids),)
        found.append(step.values)
    tracker.close()
    same_run(found, model.state_dict(), alone("gpt_tied", "sgd", IDLE))
    dist.barrier()
    rows = inrun.Ledger(folder).rows().sort_by([("step", "ascending"), ("sample_id", "ascending")])
    assert rows["step"].to_pylist() == [0] * 6 + [1] * 3
    assert rows["sample_id"].to_pylist() == [*range(6), *range(100, 103)]
    close(torch.tensor(rows["value"].to_pylist()), torch.cat(alone("gpt_tied", "sgd", IDLE)[0]))
    raises("rank=", lambda: inrun.track(make("mlp"), None, ledger=inrun.Ledger(folder, rank=RANK + 1)))


def check_a_rank_without_samples_of_tokens():
    model, optimizer, tracker, wrapped = prepared()
    for (x, y), split in zip(batches("gpt_tied", IDLE), IDLE, strict=True):
        validate(tracker, model)
        x, y = mine(x, split), mine(y, split)
        with tracker.step(range(len(x)), tokens=y.shape[1]) as step:
            (loss_of(wrapped, x, y) if len(x) else 0 * loss_of(wrapped, *data("gpt_tied", 1))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        values = step.values
    tracker.close()
    assert len(values) == IDLE[1][RANK]
    if len(values):
        close(values.sum(-1), mine(alone("gpt_tied", "sgd", IDLE)[0][1], IDLE[1]))


def check_targets_callables_and_validation_that_serves_two_steps():
    """Two named callables, one of them of an equal loss in every rank; the accumulated p.grad stands through it."""
    model = make("gpt_tied")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    val = data("gpt_tied", 4, seed=2)
    losses = {"parts": lambda: loss_of(model, *(mine(v, (2, 2)) for v in val)), "whole": lambda: loss_of(model, *val)}
    tracker = inrun.track(model, optimizer, validation=losses, validate_every=2)
    wrapped = DDP(model, gradient_as_bucket_view=True)
    for (x, y), split in zip(batches("gpt_tied", SPLITS), SPLITS, strict=True):
        x, y = mine(x, split), mine(y, split)
        with tracker.step(range(len(x))) as step:
            loss_of(wrapped, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        close(step.values[:, 0], step.values[:, 1])
    close(tracker.last_validation["parts"], tracker.last_validation["whole"])
    loss_of(wrapped, x, y).backward()
    params = [p for p in model.parameters() if p.requires_grad]
    before = [p.grad.clone() for p in params]
    with tracker.validation("whole"):
        loss_of(wrapped, *val).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(params, before, strict=True))


def check_checks_of_later_steps():
    """At a learning rate of zero no process can tell; the next check is the same one in all."""
    model, optimizer, tracker, wrapped = prepared()
    rates, due = iter((0.0, 0.0, 0.01, 0.01, 0.01)), []
    for (x, y), rate in zip(batches("gpt_tied", ((2, 1),) * 5), rates, strict=True):
        optimizer.param_groups[0]["lr"] = rate
        validate(tracker, model)
        x, y = mine(x, (2, 1)), mine(y, (2, 1))
        with tracker.step(range(len(x))):
            due.append(tracker.check_due)
            loss_of(wrapped, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert due == [True, True, False, True, False]
    agenda = gathered(torch.tensor([float(tracker.agenda.made), float(len(tracker.agenda.certain))]))
    assert torch.equal(agenda[:2], agenda[2:]) and agenda[1] > 0


def check_hooks_on_gradients_in_one_process_alone():
    """As one that only the first process has, to log gradients."""

    def run(hooked):
        model, optimizer, tracker, wrapped = prepared("mlp", "plain")
        if hooked and RANK == 0:
            next(model.parameters()).register_hook(lambda grad: None)
        checked, values = [], []
        for t in range(11):
            validate(tracker, model, "mlp")
            with tracker.step(range(3)) as step:
                checked += [t] if tracker.check_due else []
                loss_of(wrapped, *data("mlp", 3, seed=RANK + 2 * t)).backward()
                optimizer.step()
                optimizer.zero_grad()
            values.append(step.values)
        tracker.close()
        return checked, torch.stack(values)

    (plain, expected), (hooked, found) = run(False), run(True)
    assert plain == [0, 8] and hooked == [*range(11)]
    close(found, expected)


def check_a_communication_hook_that_leaves_the_sum():
    """With "first", of a loss that is divided by the processes instead."""

    def run(summed):
        model, optimizer, tracker, wrapped = prepared("mlp", "adamw")
        if summed:
            wrapped.register_comm_hook(None, lambda _, bucket: dist.all_reduce(
                bucket.buffer(), async_op=True).get_future().then(lambda done: done.value()[0]))  # fmt: skip
        values = []
        for t in range(3):
            validate(tracker, model, "mlp")
            with tracker.step(range(3)) as step:
                (loss_of(wrapped, *data("mlp", 3, seed=RANK + 2 * t)) / (WORLD if summed else 1)).backward()
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
                optimizer.step()
                optimizer.zero_grad()
            values.append(step.values)
        tracker.close()
        return torch.stack(values)

    close(run(True), run(False))


def check_rows_of_flattened_tokens():
    train_ddp("gpt_flat", "adamw", wrap_first=True, bare_validation=False)
    options = {"through": {"inner.*": ""}}
    close(*(gathered(torch.cat(turned("gpt_flat", 6, **each))) for each in ({}, options)))


def turned(name: str, *sizes: int, **options: Any) -> list[Tensor]:
    """The values of a step with as many samples as given in each process."""
    model, optimizer, tracker, wrapped = prepared(name, **options)
    found = []
    for t, size in enumerate(sizes):
        x, y = data(name, size, seed=RANK + 2 * t)
        validate(tracker, model, name)
        with tracker.step(range(size)) as step:
            (loss_of(wrapped, x, y) if size else 0 * loss_of(wrapped, *data(name, 1))).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(step.values)
    tracker.close()
    return found


def check_rows_that_are_tokens():
    """Where all of them have as many samples as tokens, every process finds out; where one has none, they are told."""
    for method in ("first", "path"):
        raises("as many still when the model's input had one", lambda m=method: turned("gpt_turned", 6, method=m))
        close(*turned("gpt_turned", 6, method=method, through={"inner.*": ""})[:1], turned("gpt_flat", 6)[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        turned("gpt_turned", 6 * RANK)
    told = [w for w in caught if "inner (6, 6, 8), token (6, 6, 8): dimension 0 is taken" in str(w.message)]
    assert len(told) == RANK and all(w.filename == __file__ for w in told)


def check_excluded_share():
    model, _, tracker, _ = prepared(exclude=["positions.weight"])
    validate(tracker, model)
    shares = gathered(torch.tensor([tracker.validations.excluded_share]))
    assert shares[0] == shares[1] and 0 < shares[0] < 1


def check_what_is_refused():
    x, y = data("gpt_tied", 2)

    def step(model, tracker, optimizer):
        with tracker.step(range(2)):
            loss_of(model, x * (RANK + 1) % 13, y).backward()
            optimizer.step()

    # Nobody wraps the model: its gradients are not a mean over the ranks.
    model = make("gpt_tied")
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    tracker = inrun.track(model, optimizer, check=False)
    validate(tracker, model)
    raises("DDP", lambda: step(model, tracker, optimizer))
    # The sums of scores, over all ranks, are compared with the gradient.
    model, optimizer, tracker, wrapped = prepared()
    validate(tracker, model)
    loss_of(wrapped, x, y).backward()
    raises("do not add up", lambda: step(wrapped, tracker, optimizer))

    def only_first():
        with tracker.validation():
            if RANK == 0:
                loss_of(model, x, y).backward()

    raises("in each of 2 processes, got 1", only_first)
    tracker.close()
    model = make("gpt_tied")
    spread = ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW)
    for method, options in (("first", {}), ("path", {"update": lambda grad, param, state, group: -grad})):
        raises("got ZeroRedundancyOptimizer", lambda m=method, o=options: inrun.track(DDP(model), spread, m, **o))
    samples = {"validation": "batch", "pairwise": [0]}
    model, optimizer, tracker, wrapped = prepared(kind="plain", **samples)
    raises("expected one process, got 2", lambda: step(wrapped, tracker, optimizer))
    tracker.close()
    wrapped = DDP(make("gpt_tied"))
    tracker = inrun.track(wrapped, OPTIMIZERS["sgd"](wrapped.parameters()), check=False)
    validate(tracker, wrapped.module)
    with wrapped.join():
        raises("join()", lambda: tracker.step([]).__enter__())


def train_deferred(model, trained, optimizer, tracker, name="gpt_tied", splits=SPLITS, recompute=False):
    """The steps, with values; a rank without samples takes part in each."""
    steps = []
    for (x, y), split in zip(batches(name, splits), splits, strict=True):
        if not tracker.validations.losses:
            validate(tracker, model, name)
        x, y = mine(x, split), mine(y, split)
        again = (lambda x=x, y=y: loss_of(model, x, y)) if recompute else None
        with tracker.step(range(len(x)), recompute=again) as step:
            (loss_of(trained, x, y) if len(x) else 0 * loss_of(trained, *data(name, 1))).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        steps.append(step)
    if not tracker.validations.losses and tracker.ledger.metadata["method"] in ("secant", "path_secant"):
        validate(tracker, model, name)
    tracker.close()
    return steps


def same_steps(steps, weights, expected, tolerance=1e-3):
    same_run([s.values for s in steps], weights, expected, tolerance)
    for step, drop in zip(steps, expected[2], strict=True):
        assert step.drop.keys() == drop.keys()
        for target, value in drop.items():
            close(step.drop[target], value, tolerance)


def deferred(method, kind, by_callable, **keep):
    """A deferred method, whose direction needs the mean gradient and, for true ends, losses along the step."""
    model = make("gpt_tied")
    optimizer = OPTIMIZERS[kind](model.parameters())
    losses = {"validation": lambda: validation_loss(model)} if by_callable else None
    tracker = inrun.track(model, optimizer, method, **options_of(method, losses, ONE))
    steps = train_deferred(model, DDP(model, gradient_as_bucket_view=True), optimizer, tracker, **keep)
    same_steps(steps, model.state_dict(), alone("gpt_tied", kind, SPLITS, method, by_callable))


def check_deferred_second():
    deferred("second", "plain", True)


def check_deferred_secant():
    deferred("secant", "adamw", False)


def check_deferred_path_computed_again():
    deferred("path", "adamw", False, recompute=True)


def check_deferred_path_secant():
    deferred("path_secant", "adamw", True)


def pairs(group: bool, splits: tuple[tuple[int, ...], ...] = SPLITS) -> list[Tensor]:
    """Values on each validation sample, with the whole batch or this rank's samples of it."""
    model = make("gpt_tied")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    tracker = inrun.track(model, optimizer, "secant", pairwise=["a", "b", "c", "d"])
    wrapped = DDP(model) if group else model
    val = data("gpt_tied", 4, seed=2)
    found = []
    for (x, y), split in zip(batches("gpt_tied", splits), splits, strict=True):
        with tracker.validation():
            loss_of(model, *val).backward()
        if group:
            x, y = mine(x, split), mine(y, split)
        with tracker.step(range(len(x))) as step:
            if not group:
                loss = whole_loss(model, x, y, split)
            else:
                loss = loss_of(wrapped, x, y) if len(x) else 0 * loss_of(wrapped, *data("gpt_tied", 1))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(step)
    with tracker.validation():
        loss_of(model, *val).backward()
    if group:

        def others():
            with tracker.validation():
                loss_of(model, *data("gpt_tied", 4, seed=2 + RANK)).backward()

        raises("every process to run all", others)
    tracker.close()
    return [step.values for step in found]


def check_pairwise():
    for splits, references in PAIRS.items():
        for values, reference, split in zip(pairs(True, splits), references, splits, strict=True):
            assert values.shape == (split[RANK], 4)
            close(gathered(values), reference)


# ---------------------------------------------------------------------- FSDP2


def sharded(
    name="gpt_tied", kind="adamw", method="first", by_callable=False, targets=ONE, policy=None, change=None, mesh=None,
    placement=None, **options
):  # fmt: skip
    """A tracked model, its blocks and itself sharded, and its optimizer bound."""
    model = make(name)
    losses = {target: lambda k=k: validation_loss(model, name, k) for k, target in enumerate(targets)}
    options |= options_of(method, losses if by_callable else None, targets)
    tracker = inrun.track(model, method=method, **options)
    kwargs = {"mesh": mesh or init_device_mesh("cpu", (WORLD,)), **({"mp_policy": policy} if policy else {})}
    kwargs["shard_placement_fn"] = placement
    blocks = getattr(model, "blocks", ())
    for i, block in enumerate(blocks):
        if change is not None:
            blocks[i] = block = change(block)
        fully_shard(block, **kwargs)
    fully_shard(model, **kwargs)
    optimizer = OPTIMIZERS[kind](model.parameters())
    tracker.bind(optimizer)
    return model, optimizer, tracker


def whole(state: dict[str, Any]) -> dict[str, Tensor]:
    return {key: value.full_tensor() if hasattr(value, "full_tensor") else value for key, value in state.items()}


def check_fully_shard():
    for name, kind in (("gpt_tied", "adamw"), ("gpt_tied", "sgd"), ("loose", "adamw")):
        model, optimizer, tracker = sharded(name, kind)
        x_val, _ = data(name, 4, seed=2)

        def evaluate(model=model, x_val=x_val):  # leaves the root's parameters gathered
            with torch.no_grad():
                model(x_val)

        found = train(model, optimizer, tracker, name, evaluate)
        same_run(found, whole(model.state_dict()), alone(name, kind))
        # No checkpoint holds a direction, nor the optimizer, and one can be loaded.
        state, moments = get_state_dict(model, optimizer)
        assert not [key for key in (*state, *moments["state"]) if "direction" in key]
        set_state_dict(model, optimizer, model_state_dict=state, optim_state_dict=moments)
        tracker.close()
        loss_of(model, *data(name, 2)).backward()
        assert not [key for key in model.state_dict() if "direction" in key]
        assert isinstance(model, FSDPModule)


def check_fully_shard_clips_a_weight_whose_shards_are_small():
    """Watched whole in each process, where one process would watch sums of it; in a later step than the checked one."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(72, 72, bias=False), nn.Tanh(), nn.Linear(72, 72, bias=False))
    assert 72 * 72 / WORLD < WATCHED_ELEMENTS < 72 * 72
    plain, clip, ours = copy.deepcopy(model), 1e-3, slice(RANK, None, WORLD)
    tracker = inrun.track(model)
    for layer in (model[0], model[2], model):
        fully_shard(layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker.bind(optimizer)
    for seed in range(2):
        x, held = (torch.randn(8, 72, generator=torch.Generator().manual_seed(s)) for s in (seed, 9))
        target, total, *rows = (
            torch.autograd.grad(plain(part).square().mean(), list(plain.parameters()))
            for part in (held, x, *x.split(1))
        )
        factor = clip / torch.stack([g.norm() for g in total]).norm()
        dots = [sum((0.1 * factor * g * t).sum() for g, t in zip(row, target, strict=True)) / 8 for row in rows]
        with torch.no_grad():
            for p, g in zip(plain.parameters(), total, strict=True):
                p -= 0.1 * factor * g
        with tracker.validation():
            model(held[ours]).square().mean().backward()
        optimizer.zero_grad()
        with tracker.step(range(8)[ours]) as step:
            model(x[ours]).square().mean().backward()
            nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
            optimizer.zero_grad()
        close(step.values, torch.stack(dots)[ours])


def check_fully_shard_that_divides_gradients_by_another_number():
    """As where losses are divided by the tokens of all processes: values are those of the mean."""

    def values(method, clip, divisor):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
        tracker = inrun.track(model, method=method, clip=clip if method == "path" else None)
        for layer in (model[0], model[2], model):
            fully_shard(layer)
            if divisor is not None:
                layer.set_gradient_divide_factor(divisor)
                layer.set_force_sum_reduction_for_comms(True)  # gloo has no other
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tracker.bind(optimizer)
        found = []
        for seed in range(3):
            x, held = (torch.randn(4, 8, generator=torch.Generator().manual_seed(s + RANK)) for s in (2 * seed, 9))
            with tracker.validation():
                model(held).square().mean().backward()
            optimizer.zero_grad()
            with tracker.step(range(4)) as step:
                (model(x).square().mean() * ((divisor or WORLD) / WORLD)).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
            found.append(step.values)
        return torch.cat(found)

    for method, clip in (("first", None), ("first", 0.05), ("path", None), ("path", 0.05)):
        expected = values(method, clip, None)
        for divisor in (1.0, 3.0):
            close(values(method, clip, divisor), expected)
    for frozen in (False, True):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
        model[0].requires_grad_(not frozen)
        tracker = inrun.track(model)
        for layer, divisor in ((model[0], 1.0), (model, 3.0)):
            fully_shard(layer)
            layer.set_gradient_divide_factor(divisor)
            layer.set_force_sum_reduction_for_comms(True)
        tracker.bind(torch.optim.SGD([p for p in model.parameters() if p.requires_grad]))

        def validated(model=model, tracker=tracker):
            with tracker.validation():
                model(torch.randn(2, 8)).sum().backward()

        if frozen:
            validated()
        else:
            raises("expected one number for all modules", validated)


def check_fully_shard_where_a_rank_has_a_batch_less():
    """It runs some other samples first, so that all are in step."""
    held, (x, y) = data("gpt_tied", 4, seed=2), data("gpt_tied", 10)
    plain, parts = make("gpt_tied"), ([[0, 1], [2, 3], [4, 5]], [None, [6, 7], [8, 9]])  # each process's batches
    rows = [(x[z : z + 1], y[z : z + 1]) for z in range(10)]
    target, *each = (torch.autograd.grad(loss_of(plain, *row), list(plain.parameters())) for row in (held, *rows))
    expected = torch.stack([sum((g * t).sum() for g, t in zip(row, target, strict=True)) / 100 for row in each])
    for method in ("first", "path"):
        model, optimizer, tracker = sharded("gpt_tied", "plain", method)
        with tracker.validation():
            loss_of(model, *held).backward()
        with tracker.step() as step:
            for k, ids in enumerate(parts[RANK]):
                model.set_requires_gradient_sync(k == 2)
                if ids is None:
                    with tracker.paused():
                        (0 * loss_of(model, *data("gpt_tied", 1))).backward()
                else:
                    step.batch(ids)
                    (loss_of(model, x[ids], y[ids]) * (len(ids) / 10 * WORLD)).backward()
            optimizer.step()
            optimizer.zero_grad()
        close(step.values, expected[[i for ids in parts[RANK] if ids for i in ids]])


def check_fully_shard_of_several_targets():
    for name in ("gpt_tied", "loose"):
        model, optimizer, tracker = sharded(name, targets=TWO)
        found = train(model, optimizer, tracker, name)
        same_run(found, whole(model.state_dict()), alone(name, "adamw", targets=TWO))


def sharded_deferred(name, kind, method, by_callable, targets=ONE, splits=SPLITS, mesh=None, **keep):
    model, optimizer, tracker = sharded(name, kind, method, by_callable, targets, mesh=mesh)
    steps = train_deferred(model, model, optimizer, tracker, name, splits, **keep)
    same_steps(steps, whole(model.state_dict()), alone(name, kind, splits, method, by_callable, targets))


def check_fully_shard_secant_of_several_targets():
    sharded_deferred("gpt_tied", "adamw", "secant", False, TWO)


def check_fully_shard_secant_by_forward_mode():
    sharded_deferred("loose", "adamw", "secant", False)


def check_fully_shard_path_where_a_rank_has_no_samples():
    sharded_deferred("gpt_tied", "adamw", "path", False, splits=IDLE)


def check_fully_shard_path_computed_again_in_replicas_of_shards():
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    sharded_deferred("gpt_tied", "adamw", "path", False, recompute=True)
    sharded_deferred("gpt_tied", "adamw", "path", False, recompute=True, mesh=mesh)


def check_fully_shard_path_between_true_ends():
    sharded_deferred("gpt_tied", "adamw", "path_secant", True)
    sharded_deferred("gpt_tied", "sgd", "path_simpson", True, TWO)


def check_fully_shard_second():
    sharded_deferred("gpt_tied", "plain", "second", True)


def check_fully_shard_second_by_forward_mode():
    sharded_deferred("loose", "plain", "second", True)


def check_fully_shard_beside_the_path_of_convolutions_that_are_frozen_in_part():
    """Adam's first step, as under DDP."""

    def values(shard, frozen):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(64, 2))
        model.get_parameter(frozen).requires_grad_(False)
        x = torch.randn(6, 2, 6, 6)[RANK * 3 : RANK * 3 + 3]
        tracker = inrun.track(model, method="path")
        called = fully_shard(model) if shard else DDP(model)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        tracker.bind(optimizer)
        with tracker.validation():
            called(x).square().mean().backward()
        with tracker.step(range(3)) as step:
            called(x).square().mean().backward()
            optimizer.step()
        return step.values

    for frozen in ("0.bias", "0.weight"):
        close(values(True, frozen), values(False, frozen))


def check_fully_shard_deferred_attention():
    sharded_deferred("attention", "adamw", "path_secant", True)
    in_half("attention", "sgd", "secant", False)


def check_fully_shard_with_mixed_precision_checkpointing_and_compile():
    in_half("gpt_tied", "sgd", "first", False, compiled=True)
    in_half("gpt_tied", "sgd", "path_secant", False)
    in_half("loose", "sgd", "secant", False)


def check_fully_shard_of_hugging_face_models():
    if not HUGGING_FACE:
        return
    model, optimizer, tracker = sharded("hf_llama")
    same_run(train(model, optimizer, tracker, "hf_llama"), whole(model.state_dict()), alone("hf_llama", "adamw"))
    in_half("hf_llama", "sgd", "first", False, compiled=True, splits=EVEN)
    sharded_deferred("hf_mixtral", "adamw", "path_secant", True)
    in_half("hf_mixtral", "sgd", "secant", False)


def in_half(name, kind, method, by_callable, compiled=False, splits=SPLITS):
    """In bfloat16, every block checkpointed as a whole, and compiled: values are at most twice as far from float32's as
    plain training's own products are. Not Adam's, whose first update is a sign: bfloat16 gets it wrong where a gradient
    is small; nor path_secant's with losses, of whose bend float32's drop tells what bfloat16's is too coarse for."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")

    def change(block):
        block = checkpoint_wrapper(block)
        if compiled:
            block.compile(backend=graphs, fullgraph=True)
        return block

    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    model, optimizer, tracker = sharded(name, kind, method, by_callable, policy=policy, change=change)
    steps = train_deferred(model, model, optimizer, tracker, name, splits)
    assert compiled == (graphs.frame_count > 0)
    exact, half = (products(name, dtype, splits) for dtype in (torch.float32, torch.bfloat16))
    allowed = torch.finfo(torch.bfloat16).eps + 2 * error(half, exact)
    for step, reference in zip(steps, alone(name, kind, splits, method, by_callable)[0], strict=True):
        found = error(gathered(step.values), reference)
        assert found <= allowed, f"{name}, {method}: {found}, of {allowed} allowed"


def products(name: str, dtype: torch.dtype, splits: tuple[tuple[int, ...], ...]) -> Tensor:
    """Of the samples of all steps, each one's gradient times the validation gradient, as plain training has them."""
    model = make(name).to(dtype)

    def gradient(x: Tensor, y: Tensor) -> Tensor:
        loss = loss_of(model, x.to(dtype) if x.is_floating_point() else x, y)
        return torch.cat([g.float().flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])

    g_v = gradient(*data(name, 4, seed=2))
    each = [(x[i : i + 1], y[i : i + 1]) for x, y in batches(name, splits) for i in range(len(x))]
    return torch.stack([g_v @ gradient(*one) for one in each])


def check_fully_shard_of_replicas_and_accumulation():
    """Replicas of shards (here of one), gradients reduced with the last microbatch only."""
    mesh = init_device_mesh("cpu", (WORLD, 1), mesh_dim_names=("replicate", "shard"))
    model, optimizer, tracker = sharded(mesh=mesh)
    found = []
    for (x, y), split in zip(batches("gpt_tied", SPLITS), SPLITS, strict=True):
        validate(tracker, model)
        x, y = mine(x, split), mine(y, split)
        with tracker.step() as step:
            for i, part in enumerate((slice(0, 1), slice(1, None)) if len(x) > 1 else (slice(0, 1),)):
                model.set_requires_gradient_sync(i == 1 or len(x) == 1)
                step.batch(range(len(x[part])))
                (loss_of(model, x[part], y[part]) * len(x[part]) / len(x)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        found.append(step.values)
    same_run(found, whole(model.state_dict()), alone("gpt_tied", "adamw"))


def check_a_rank_without_any_shard():
    """One output: the first rank holds all of the weight, the second nothing, and both must come to the same."""
    torch.manual_seed(0)
    model, x, x_val = nn.Linear(8, 1), torch.randn(3 * WORLD, 8), torch.randn(4, 8)
    per_sample = torch.autograd.functional.jacobian(
        lambda w: (x @ w.T + model.bias).square()[:, 0] / len(x), model.weight.detach())[:, 0]  # fmt: skip
    offsets = 2 * (x @ model.weight.T + model.bias).detach() / len(x)
    g = torch.cat([per_sample, offsets], 1)  # of the weight and the bias
    errors = (x_val @ model.weight.T + model.bias).detach()
    g_val = torch.cat([2 * errors * x_val, 2 * errors], 1).mean(0)
    shrink = min(1.0, CLIP / g.sum(0).norm().item())
    assert shrink < 0.5
    ours = x.chunk(WORLD)[RANK]
    for method in ("first", "path"):  # which of plain SGD are the same
        trained = copy.deepcopy(model)
        tracker = inrun.track(trained, method=method)
        fully_shard(trained)
        optimizer = torch.optim.SGD(trained.parameters(), lr=0.1)
        tracker.bind(optimizer)
        with tracker.validation():
            trained(x_val).square().mean().backward()
        with tracker.step(range(len(ours))) as step:
            trained(ours).square().mean().backward()
            nn.utils.clip_grad_norm_(trained.parameters(), CLIP)
            optimizer.step()
        close(gathered(step.values), 0.1 * shrink * g @ g_val)

    def spoiled():
        with tracker.validation():
            (trained(x_val).sum() * float("nan")).backward()

    raises("NaN", spoiled)


def flattened(model, original):
    return FullyShardedDataParallel(model, use_orig_params=original, device_id=torch.device("cpu"))


def check_what_is_refused_of_shards():
    raises("pairwise", lambda: sharded(method="secant", pairwise=["a"]))

    def within(block):
        fully_shard(block.up)
        return block

    inside = {"through": {"blocks.0.up.weight": "blocks.0"}, "change": within}
    for method in ("first", "secant"):
        raises("blocks.0: expected no fully_shard inside", lambda method=method: sharded(method=method, **inside))
    model, optimizer, tracker = sharded(method="path")
    validate(tracker, model)
    x, y = data("gpt_tied", 2)

    def computed_again_by_one():
        with tracker.step(range(2), recompute=(lambda: loss_of(model, x, y)) if RANK else None):
            loss_of(model, x, y).backward()
            optimizer.step()

    raises("for as many batches in every process", computed_again_by_one)

    def by_columns(param):
        return Shard(param.dim() - 1 if param.dim() == 2 else 0)

    for original in (False, True):
        model = make("gpt_tied")
        raises(
            "use fully_shard",
            lambda o=original: inrun.track(flattened(make("gpt_tied"), o)),
        )
    tracker = inrun.track(model)
    flat = flattened(model, True)
    raises("use fully_shard", lambda: tracker.bind(OPTIMIZERS["sgd"](flat.parameters())))

    raises("sharded alike", lambda: sharded(targets=TWO, placement=by_columns))
    model = make("gpt_tied")
    fully_shard(model)
    raises("before fully_shard", lambda: inrun.track(model, OPTIMIZERS["sgd"](model.parameters())))


# ---------------------------------------------------------------------- tensor parallelism


def by_layers(model: Any, mesh: Any) -> None:
    """Linear layers and the embedding are spread; every process has all of the norms and of what is between."""
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel(), "q": ColwiseParallel(), "o": RowwiseParallel()}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    whole = {"token": RowwiseParallel(input_layouts=Replicate()), "head": ColwiseParallel(output_layouts=Replicate())}
    parallelize_module(model, mesh, whole)
    model.tie()


def by_sequence(model: Any, mesh: Any, local: bool = True) -> None:
    """Between the linear layers each process has some tokens of every row: as many, where outputs are `local`."""
    here, norm = Shard(1), SequenceParallel(use_local_output=local)
    up, down = ColwiseParallel(input_layouts=here), RowwiseParallel(output_layouts=here, use_local_output=local)
    plan = {"norm": norm, "rms": norm, "up": up, "down": down, "q": up, "o": down}
    for block in model.blocks:
        parallelize_module(block, mesh, plan)
    token = RowwiseParallel(input_layouts=Replicate(), output_layouts=here, use_local_output=local)
    head = ColwiseParallel(input_layouts=here, output_layouts=Replicate())
    parallelize_module(model, mesh, {"token": token, "norm": norm, "head": head})
    model.tie()


def by_width(model: Any, mesh: Any) -> None:
    """The embedding's columns are spread."""
    parallelize_module(model, mesh, {"token": ColwiseParallel(output_layouts=Replicate())})
    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})


def in_every_process(model: Any, mesh: Any, dim: int | None = None) -> None:
    """Whole layers of every kind are on the mesh too, and their inputs, which may be spread along a dimension."""

    def come(_, inputs, mesh):
        x = DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)
        return x if dim is None or dim >= x.dim() else x.redistribute(placements=[Shard(dim)])

    for block in model.blocks:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    inside = [m for block in model.blocks for m in (block.norm, block.q, block.o)]
    for layer in (model.token, model.norm, model.head, *inside):
        distribute_module(layer, mesh, None, come, lambda _, y, mesh: y.full_tensor())


def clip(model: nn.Module) -> None:
    """As `clip_grad_norm_`, which takes no gradients on different meshes."""
    grads: list[Any] = [p.grad for p in model.parameters() if p.grad is not None]
    wholes = [g.full_tensor() if hasattr(g, "full_tensor") else g for g in grads]
    norm = nn.utils.get_total_norm(wholes)
    for grad in grads:
        grad.mul_((CLIP / norm).clamp(max=1).item())


def spread(
    plan, kind, method="first", by_callable=False, targets=ONE, name="gpt_spread", data_mesh=None, mesh=None, step=None,
    prepare=lambda model: None, around=contextlib.nullcontext, **options,
):  # fmt: skip
    """A run by tensor parallelism, where there is a `data_mesh` with samples of its own in each of its processes, held
    to the run in one process."""
    mesh, model = mesh or init_device_mesh("cpu", (WORLD,)), make(name)
    plan(model, mesh)
    prepare(model)
    part = None if data_mesh is None else data_mesh.get_local_rank()

    def mine(x: Tensor) -> Tensor:
        return x if part is None else x.tensor_split(2)[part]

    losses = {target: lambda k=k: loss_of(model, *(mine(v) for v in data(name, 4, seed=2 + k)))
              for k, target in enumerate(targets)}  # fmt: skip
    options |= options_of(method, losses if by_callable else None, targets)
    if part is None:
        optimizer = OPTIMIZERS[kind](model.parameters())
        tracker = inrun.track(model, optimizer, method, **options)
    else:
        tracker = inrun.track(model, method=method, **options)
        for block in model.blocks:
            fully_shard(block, mesh=data_mesh)
        fully_shard(model, mesh=data_mesh)
        optimizer = OPTIMIZERS[kind](model.parameters())
        tracker.bind(optimizer)
    steps = []

    def validate():
        for target in () if by_callable else targets:
            with tracker.validation(target):
                losses[target]().backward()

    for x, y in batches(name, EVEN):
        x, y = mine(x), mine(y)
        with around():
            validate()
            steps.append((step or plain_step)(tracker, model, optimizer, x, y))
    if method in ("secant", "path_secant"):
        validate()
    tracker.close()
    weights = {n: w.full_tensor() if hasattr(w, "full_tensor") else w for n, w in model.state_dict().items()}
    expected = alone(name, kind, EVEN, method, by_callable, targets)
    assert weights.keys() == expected[1].keys()
    for key, value in expected[1].items():
        close(weights[key], value)
    for found, reference in zip(steps, expected[0], strict=True):
        values: list[Any] = [None] * WORLD
        dist.all_gather_object(values, found.values)
        for k in range(0, WORLD, 2):  # those that have the same samples have the same values
            assert torch.equal(values[k], values[k + 1])
        close(torch.cat(values[::2]), reference)
    return tracker


def plain_step(
    tracker: Any, model: Any, optimizer: Any, x: Tensor, y: Tensor, again: bool = False, tokens: int | None = None
) -> Any:
    recompute = (lambda: loss_of(model, x, y)) if again else None
    with tracker.step(range(len(x)), recompute=recompute, tokens=tokens) as step:
        loss_of(model, x, y).backward()
        clip(model)
        optimizer.step()
        optimizer.zero_grad()
    return step


def step_of_tokens(tracker: Any, model: Any, optimizer: Any, x: Tensor, y: Tensor) -> Any:
    values = plain_step(tracker, model, optimizer, x, y, tokens=x.shape[1]).values
    assert values.shape == x.shape
    return SimpleNamespace(values=values.sum(1))


SPREAD = [
    ("adamw", "first"), ("sgd", "first", False, TWO), ("adamw", "secant"), ("plain", "second", True),
    ("adamw", "path", False, TWO), ("adamw", "path_secant", True), ("sgd", "path_simpson", True, TWO),
]  # fmt: skip


def check_tensor_parallel():
    for run in SPREAD:
        for plan in (by_layers, by_sequence):
            spread(plan, *run)


def check_tensor_parallel_in_other_ways():
    for method in ("first", "path"):
        spread(by_width, "adamw", method)
        spread(by_layers, "adamw", method, step=step_of_tokens)
        for dim in (None, 0, 2) if torch.__version__ < "2.12" else (None, 0, 1, 2):  # torch 2.11 flattens no sequence
            spread(functools.partial(in_every_process, dim=dim), "adamw", method, name="gpt_spread_own")
        for plan in (by_layers, by_sequence):
            spread(plan, "adamw", method, name="gpt_spread_tied")
            spread(plan, "adamw", method, name="gpt_spread_own")
            for reentrant in (False, True):
                spread(plan, "adamw", method, prepare=lambda m, r=reentrant: setattr(m, "checkpointed", r))
            spread(plan, "adamw", method, step=functools.partial(plain_step, again=method == "path"))


def check_tensor_parallel_with_the_loss_in_parts():
    """Logits of which each process has some columns."""

    def columns(model, mesh):
        parallelize_module(model, mesh, {"head": ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)})

    for method in ("first", "path"):
        spread(columns, "adamw", method, around=loss_parallel)
    spread(columns, "adamw", "path_secant", True, around=loss_parallel)


def values_by(plan, method, model, lengths):
    """Values of steps of two batches, each of so many tokens."""
    plan(model, init_device_mesh("cpu", (WORLD,)))
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    tracker = inrun.track(model, optimizer, method, **options_of(method, None, ONE))
    found = []
    for of_batches in lengths:
        with tracker.validation():
            loss_of(model, *data("gpt_spread", 4, seed=2)).backward()
        with tracker.step() as step:
            for k, tokens in enumerate(of_batches):
                x, y = (v[:, :tokens] for v in data("gpt_spread", 4, seed=10 + k))
                step.batch(range(4 * k, 4 * k + 4))
                loss_of(model, x, y).backward()
            clip(model)
            optimizer.step()
            optimizer.zero_grad()
        found.append(step.values)
    tracker.close()
    return torch.stack(found)


def check_tensor_parallel_of_batches_of_other_lengths():
    for method in ("first", "path"):
        one, other = (values_by(plan, method, make("gpt_spread"), [(4, 2)]) for plan in (by_layers, by_sequence))
        close(one, other)
        uneven = functools.partial(by_sequence, local=False)
        one, other = (values_by(plan, method, make("gpt_spread"), [(5, 3)]) for plan in (by_layers, uneven))
        close(one, other)


class Placed(Spread):
    """With learned positions, and an embedding of one id for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.places, self.kinds = nn.Embedding(8, 8), nn.Embedding(8, 8)

    def embedded(self, x: Tensor) -> Tensor:
        kinds = self.kinds(torch.tensor([6, 1, 2, 3]))
        return self.token(x) + self.places(torch.arange(x.shape[1])) + kinds[:, None]


def check_ids_of_which_each_process_has_some_rows_are_looked_at_whole():
    """As many positions as samples, in a later step, and ids that are a run of numbers only in part."""

    def rows_too(model, mesh):
        by_layers(model, mesh)
        rows = RowwiseParallel(input_layouts=Replicate())
        parallelize_module(model, mesh, {"places": rows, "kinds": rows})

    for method in ("first", "path"):
        found = []
        for plan in (by_layers, rows_too):
            torch.manual_seed(0)
            found.append(values_by(plan, method, Placed(), [(3, 3), (4, 4)]))
        close(*found)


def check_a_sample_of_tensor_parallelism_is_written_once():
    folder = FOLDER / "spread"
    tracker = spread(by_layers, "adamw", ledger=folder)
    dist.barrier()
    rows = inrun.Ledger(folder).rows()
    assert len(rows) == sum(map(sum, EVEN)), len(rows)
    tracker = spread(by_layers, "adamw")
    assert len(tracker.ledger.rows()) == len(rows)  # where each process has its own


def four_tensor_parallel_under_fully_shard():
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    for run in SPREAD:
        for plan in (by_layers, by_sequence):
            spread(plan, *run, mesh=mesh["tensor"], data_mesh=mesh["data"])
    model = make("gpt_spread")
    by_layers(model, mesh["tensor"])
    raises("expected a mesh of all 4 processes", lambda: inrun.track(model, OPTIMIZERS["sgd"](model.parameters())))


def check_what_is_refused_of_tensor_parallelism():
    mesh = init_device_mesh("cpu", (1, WORLD), mesh_dim_names=("data", "tensor"))
    plan = {"up": ColwiseParallel(), "down": RowwiseParallel()}
    for shard in (False, True):
        model = make("gpt_tied")
        tracker = inrun.track(model)
        parallelize_module(model.blocks[0], mesh["tensor"], plan)
        if shard:
            fully_shard(model, mesh=mesh["data"])
        raises("blocks.0.up.weight: expected", lambda: tracker.bind(OPTIMIZERS["sgd"](model.parameters())))  # noqa: B023
    raises("pairwise", lambda: spread(by_layers, "adamw", "path", pairwise=["a"]))
    raises("monte_carlo", lambda: spread(by_layers, "adamw", "monte_carlo", True))
    model = nn.Sequential(nn.Embedding(13, 8, padding_idx=0), nn.Linear(8, 13))
    parallelize_module(model, mesh["tensor"], {"0": RowwiseParallel(input_layouts=Replicate())})
    raises("0: expected a linear layer, an embedding or a norm, all of it", lambda: inrun.track(model))
    model = nn.Sequential(nn.Embedding(13, 8, padding_idx=0), nn.Linear(8, 13))
    inrun.track(parallelize_module(model, mesh["tensor"], {"0": ColwiseParallel(output_layouts=Replicate())})).close()
    model = nn.Sequential(nn.Embedding(1, 8), nn.Linear(8, 13))
    parallelize_module(model, mesh["tensor"], {"0": RowwiseParallel(input_layouts=Replicate())})
    raises("got Embedding of 1 rows, of which some of 2 processes hold none", lambda: inrun.track(model))
    model = nn.Sequential(nn.LayerNorm(8, bias=False))
    model[0].weight = nn.Parameter(distribute_tensor(torch.ones(8), mesh["tensor"], [Shard(0)]))
    raises("0: expected a linear layer, an embedding or a norm, all of it", lambda: inrun.track(model))

    model = make("gpt_spread")
    by_layers(model, mesh["tensor"])
    parallelize_module(model, mesh["data"], {"norm": SequenceParallel()})
    raises("expected a whole parameter, or one that parallelize_module has spread over", lambda: inrun.track(model))
    model = nn.Sequential(nn.LayerNorm(8, bias=False))
    model[0].weight = nn.Parameter(distribute_tensor(torch.ones(8), mesh, [Replicate(), Replicate()]))
    raises("expected a whole parameter, or one that parallelize_module has spread over", lambda: inrun.track(model))
    model = nn.Sequential(nn.GroupNorm(2, 8))
    parallelize_module(model, mesh["tensor"], {"0": SequenceParallel()})
    raises("0: expected a linear layer, an embedding or a norm, all of it", lambda: inrun.track(model))
    model = nn.Sequential(nn.LayerNorm(8))
    model[0].weight = nn.Parameter(distribute_tensor(torch.ones(8), mesh["tensor"], [Replicate()]))
    raises("0: expected a linear layer, an embedding or a norm, all of it", lambda: inrun.track(model))

    def by_tokens(tracker, model, optimizer, x, y):
        with tracker.step(range(len(x)), tokens=x.shape[1]):
            loss_of(model, x, y).backward()

    def in_a_graph(tracker, model, optimizer, x, y):
        with tracker.step(range(len(x))):
            loss_of(torch.compile(model, backend="eager"), x, y).backward()

    for method in ("first", "path"):
        raises("expected whole rows", lambda m=method: spread(by_sequence, "adamw", m, step=by_tokens))
        raises("without torch.compile", lambda m=method: spread(by_layers, "adamw", m, step=in_a_graph))


def check_the_trainer():
    """Under DDP a step has the samples of both processes, and the values of its whole. Accelerate fills an epoch's last
    batch with its first sample, which is trained on twice, and has a value each time."""
    if not (HUGGING_FACE and importlib.util.find_spec("accelerate")):
        return
    from test_adapters_huggingface import build, compare, samples

    trainset, folder = samples(11), FOLDER / "trainer"
    trainer, values, before = build(
        folder / str(RANK), trainset, options={"validation": samples(5), "ledger": folder / "ledger"},
        per_device_train_batch_size=2, ddp_backend="gloo", save_strategy="epoch",
    )  # fmt: skip
    trainer.train()
    assert isinstance(trainer.model_wrapped, DDP)
    dist.barrier()
    values.ledger = inrun.Ledger(folder / "ledger")
    found = compare(values, before, trainset, held=samples(5))
    assert [len(scored) for scored in found.values()] == [8, 4, 8, 4]
    for epoch in (0, 2):
        assert {*found[epoch], *found[epoch + 1]} == {s["sample_id"] for s in trainset}


def check_the_readme():
    section = (Path(__file__).parents[1] / "inrun" / "README.md").read_text().partition("## More than one process")[2]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)[:2]
    for block in blocks:
        model = make("gpt_tied")
        names = {"inrun": inrun, "torch": torch, "DDP": DDP, "fully_shard": fully_shard, "model": model}
        names["optimizer"] = OPTIMIZERS["adamw"](model.parameters())
        names["OPTIMIZER"] = OPTIMIZERS["adamw"]
        block = block.replace("runs/1/ledger", str(FOLDER / "readme")).replace("torch.optim.AdamW", "OPTIMIZER")
        exec(block, names)
        values = train(names["model"], names["tracker"].optimizers[0], names["tracker"])
        same_run(values, {}, (alone("gpt_tied", "adamw")[0], {}))


# ---------------------------------------------------------------------- torchrun --max-restarts=1

LONG = (*SPLITS, *SPLITS)


def restart():
    """The second rank kills itself after steps that the last checkpoint does not hold; the group starts again."""
    model = make("gpt_tied")
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    tracker = inrun.track(model, optimizer, ledger=FOLDER / "ledger")
    wrapped = DDP(model)
    saved = FOLDER / "checkpoint.pt"
    if saved.exists():
        state = torch.load(saved)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        tracker.steps = state["step"]
    tracker.ledger.resume(tracker.steps)
    attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    first = tracker.steps
    assert first == (0 if attempt == 0 else 2)
    for t in range(first, len(LONG)):
        if t == 4 and RANK == 1 and attempt == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        x, y = data("gpt_tied", sum(LONG[t]), seed=10 + t)
        ids = mine(torch.arange(len(x)), LONG[t])
        x, y = mine(x, LONG[t]), mine(y, LONG[t])
        validate(tracker, model)
        with tracker.step(ids):
            loss_of(wrapped, x, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
            optimizer.zero_grad()
        tracker.ledger.flush()  # before the checkpoint that counts on it, and here beyond it too
        dist.barrier()
        if t == 1 and RANK == 0:
            torch.save({"step": t + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    tracker.close()
    dist.barrier()
    assert attempt == 1
    rows = inrun.Ledger(FOLDER / "ledger").rows().sort_by([("step", "ascending"), ("sample_id", "ascending")])
    assert rows["step"].to_pylist() == [t for t, split in enumerate(LONG) for _ in range(sum(split))]
    assert rows["sample_id"].to_pylist() == [i for split in LONG for i in range(sum(split))]
    values, weights, _ = alone("gpt_tied", "adamw", LONG)
    close(torch.tensor(rows["value"].to_pylist()), torch.cat(values))
    same_run([], model.state_dict(), ([], weights))


# ----------------------------------------------------------------------


PAIRS: dict[tuple[tuple[int, ...], ...], list[Tensor]] = {}  # with one process
REFERENCES = [("gpt_tied", "sgd"), ("gpt_tied", "adamw"), ("loose", "adamw"), ("gpt_tied", "sgd", IDLE),
    ("gpt_tied", "adamw", SPLITS, "first", False, TWO), ("loose", "adamw", SPLITS, "first", False, TWO),
    ("gpt_tied", "plain", SPLITS, "second", True), ("gpt_tied", "adamw", SPLITS, "secant"),
    ("gpt_tied", "adamw", SPLITS, "secant", False, TWO), ("loose", "adamw", SPLITS, "secant"),
    ("gpt_tied", "adamw", SPLITS, "path"), ("gpt_tied", "adamw", IDLE, "path"),
    ("gpt_tied", "adamw", SPLITS, "path_secant", True), ("gpt_tied", "sgd", SPLITS, "path_secant", True),
    ("loose", "sgd", SPLITS, "secant"), ("loose", "plain", SPLITS, "second", True),
    ("gpt_flat", "adamw"), ("gpt_tied", "sgd", SPLITS, "path_secant"),
    ("attention", "adamw", SPLITS, "path_secant", True), ("attention", "sgd", SPLITS, "secant"),
    ("gpt_tied", "sgd", SPLITS, "path_simpson", True, TWO)]  # fmt: skip

SPREADS = [("gpt_spread", kind, EVEN, *more) for kind, *more in SPREAD]
REFERENCES += SPREADS
REFERENCES += [(name, "adamw", EVEN, m) for name in ("gpt_spread", "gpt_spread_tied", "gpt_spread_own")
               for m in ("first", "path")]  # fmt: skip

if HUGGING_FACE:
    REFERENCES += [("hf_llama", "adamw"), ("hf_llama", "sgd", EVEN),
        ("hf_mixtral", "adamw", SPLITS, "path_secant", True), ("hf_mixtral", "sgd", SPLITS, "secant")]  # fmt: skip


def all_reduce(tensor: Tensor, *args: Any, reduce: Any = dist.all_reduce, **options: Any) -> Any:
    """Gloo's, of what NCCL takes as well."""
    assert tensor.is_contiguous() or tensor.is_contiguous(memory_format=torch.channels_last), "expected it in order"
    return reduce(tensor, *args, **options)


def main() -> None:
    dist.all_reduce = all_reduce
    torch.set_num_threads(1)
    names = sys.argv[2:] or [name for name in globals() if name.startswith("check_")]
    four = WORLD == 4
    for reference in [("gpt_tied", "adamw", LONG)] if names == ["restart"] else SPREADS if four else REFERENCES:
        alone(*reference)
    PAIRS.update({splits: pairs(False, splits) for splits in (() if four else (SPLITS, IDLE))})
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=120))
    results = {}
    for name in names:
        try:
            globals()[name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    (FOLDER / f"{RANK}.json").write_text(json.dumps(results))
    dist.barrier()  # or threads of one may find the other gone, and abort
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
