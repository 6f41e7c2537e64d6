"""The tracker: its values are the oracle's, training is untouched, and what would be wrong is an error."""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import io
import math
import operator
import os
import random
import re
import shutil
import sys
import warnings
import weakref
from types import SimpleNamespace

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import MODELS, VOCAB, WIDTH, B, Bypass, Counting, data, gpt, gradient, loss_of, make, oracle_values
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import inrun
from inrun import inline, shards
from inrun.affine import AffineRule
from inrun.distributed import Ranks
from inrun.errors import Pending
from inrun.restoring import replaced, setting, undone
from inrun.updates import weights_moved

NAMES = list(MODELS)


def run_step(tracker, model, optimizer, train, validation, ids=None, before_update=None):
    x, y = train
    with tracker.validation():
        loss_of(model, *validation).backward()
    with tracker.step(range(len(x)) if ids is None else ids) as step:
        loss_of(model, x, y).backward()
        if before_update is not None:
            before_update()
        optimizer.step()
        optimizer.zero_grad()
    return step.values


def close(found, expected, rtol=2e-4):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("name", NAMES)
def test_values_are_the_oracles_and_the_model_is_given_back(name):
    model = make(name)
    train, validation = data(name), data(name, 4, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    keys, names = list(model.state_dict()), [n for n, _ in model.named_parameters()]
    classes = [type(m) for m in model.modules()]
    expected = oracle_values(model, lambda n, g: 0.3 * g, train, validation)

    tracker = inrun.track(model, optimizer)
    assert list(model.state_dict()) == keys
    assert sorted(tracker.coverage["tracked"]) == sorted(names)
    assert all(isinstance(m, c) for m, c in zip(model.modules(), classes, strict=True))
    state = copy.deepcopy(model.state_dict())
    model.load_state_dict(state)
    close(run_step(tracker, model, optimizer, train, validation), expected)
    # The second step has no checked sums, and one probe for all layers.
    again = oracle_values(model, lambda n, g: 0.3 * g, train, validation)
    close(run_step(tracker, model, optimizer, train, validation), again)

    tracker.close()
    assert [type(m) for m in model.modules()] == classes
    assert [n for n, _ in model.named_parameters()] == names
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert len(tracker.ledger) == 2 * B


def frozen_adam(lr, b1=0.9, b2=0.999, eps=1e-8):
    """The frozen-state direction from the states of the optimizer, written out for one parameter."""

    def rule(optimizer, param, g):
        state = optimizer.state.get(param, {})
        t = float(state["step"]) + 1 if state else 1
        v = (1 - b2) * g * g + (b2 * state["exp_avg_sq"].double() if state else 0)
        if "max_exp_avg_sq" in state:
            v = torch.maximum(v, state["max_exp_avg_sq"].double())
        return lr * (1 - b1) / (1 - b1**t) * g / ((v / (1 - b2**t)).sqrt() + eps)

    return rule


def sgd(lr, momentum=0.0, dampening=0.0, nesterov=False):
    def rule(optimizer, param, g):
        started = optimizer.state.get(param, {}).get("momentum_buffer") is not None
        entering = 1 - dampening if started and momentum else 1.0
        return lr * g * ((1 + momentum * entering) if nesterov else entering)

    return rule


OPTIMIZERS = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1), sgd(0.1)),
    "momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), sgd(0.1, 0.9)),
    "dampening": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.3), sgd(0.1, 0.9, 0.3)),
    "nesterov": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.8, nesterov=True), sgd(0.1, 0.8, 0, True)),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01), frozen_adam(0.01)),
    "adamw": (lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True), frozen_adam(0.01)),
    "amsgrad": (lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True), frozen_adam(0.01)),
    "forgetful": (lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.9, 0.9), amsgrad=True), frozen_adam(0.01, 0.9, 0.9)),
    "no_beta2": (lambda p: torch.optim.Adam(p, lr=0.01, betas=(0.5, 0.0), amsgrad=True), frozen_adam(0.01, 0.5, 0.0)),
    "fused": (lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), frozen_adam(0.01)),
    "tensor_lr": (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)), frozen_adam(0.01)),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_every_optimizer_and_its_state_over_three_steps(kind):
    model = make("gpt_tied")
    make_optimizer, rule = OPTIMIZERS[kind]
    optimizer = make_optimizer(model.parameters())
    tracker = inrun.track(model, optimizer)
    for t in range(3):
        train, validation = data("gpt", seed=10 + t), data("gpt", 4, seed=20 + t)
        params = dict(model.named_parameters())
        expected = oracle_values(model, lambda n, g, p=params: rule(optimizer, p[n], g), train, validation)
        close(run_step(tracker, model, optimizer, train, validation), expected, rtol=1e-3)


def test_a_step_against_the_real_drop_of_the_validation_loss():
    model = make("mlp").double()
    x, y = data("mlp")
    train, validation = (x.double(), y), (data("mlp", 4, 2)[0].double(), data("mlp", 4, 2)[1])
    gaps = []
    for lr in (1e-2, 1e-3):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.SGD(copied.parameters(), lr=lr)
        before = loss_of(copied, *validation).item()
        with inrun.track(copied, optimizer) as tracker:
            values = run_step(tracker, copied, optimizer, train, validation)
        drop = before - loss_of(copied, *validation).item()
        assert drop > 0 or values.sum() < 0
        gaps.append(abs(values.sum().item() - drop))
    assert gaps[1] < gaps[0] / 50  # first order: the gap is O(lr^2)


def test_maximize_turns_the_sign():
    def values(maximize):
        model = make("mlp")
        optimizer = torch.optim.Adam(model.parameters(), maximize=maximize)
        tracker = inrun.track(model, optimizer)
        return run_step(tracker, model, optimizer, data("mlp"), data("mlp", 4, 2))

    torch.testing.assert_close(values(True), -values(False))


def test_parameter_groups_keep_their_own_learning_rates():
    model = make("gpt_tied")
    decay = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    optimizer = torch.optim.SGD([{"params": decay, "lr": 0.1, "weight_decay": 0.1}, {"params": others}], lr=0.7)
    train, validation = data("gpt"), data("gpt", 4, 2)
    rates = {n: 0.1 if p.dim() > 1 else 0.7 for n, p in model.named_parameters()}
    expected = oracle_values(model, lambda n, g: rates[n] * g, train, validation)
    close(run_step(inrun.track(model, optimizer), model, optimizer, train, validation), expected)


@pytest.mark.parametrize("name", ["gpt_tied", "loose"])
@pytest.mark.parametrize("adam", [False, True])
def test_training_is_untouched(name, adam):
    def train(tracked):
        model = make(name)
        # An eps above rounding: attention's key biases have a zero gradient, whose noise Adam would blow up.
        params = model.parameters()
        optimizer = torch.optim.AdamW(params, lr=1e-2, eps=1e-4) if adam else torch.optim.SGD(params, lr=1e-2)
        tracker = inrun.track(model, optimizer) if tracked else None
        losses = []
        for t in range(6):
            x, y = data(name, seed=t)
            if tracker is not None:
                run_step(tracker, model, optimizer, (x, y), data(name, 4, 99))
            else:
                loss_of(model, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
            losses.append(loss_of(model, x, y).item())
        return losses, model.state_dict()

    losses, weights = train(False)
    tracked_losses, tracked_weights = train(True)
    assert tracked_losses == pytest.approx(losses, rel=1e-5)
    for key, value in weights.items():
        torch.testing.assert_close(tracked_weights[key], value, rtol=1e-4, atol=1e-5)


def test_permuting_permutes_and_duplicating_duplicates():
    x, y = data("gpt")
    order = torch.tensor([3, 0, 4, 1, 2])

    def values(x, y):
        model = make("gpt_tied")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return run_step(inrun.track(model, optimizer), model, optimizer, (x, y), data("gpt", 4, 2))

    plain = values(x, y)
    close(values(x[order], y[order]), plain[order].double(), 1e-5)
    twice = values(torch.cat([x, x[:1]]), torch.cat([y, y[:1]]))
    torch.testing.assert_close(twice[0], twice[-1], rtol=1e-5, atol=1e-8)
    assert torch.equal(plain, values(x, y))  # the same inputs, the same bits


@pytest.mark.parametrize("together", [False, True], ids=["in_turn", "both_forwards_first"])
def test_accumulation_equals_one_batch(together):
    x, y = data("gpt")
    validation = data("gpt", 4, 2)

    def prepared():
        model = make("gpt_tied")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = inrun.track(model, optimizer)
        with tracker.validation():
            loss_of(model, *validation).backward()
        return model, optimizer, tracker

    model, optimizer, tracker = prepared()
    with tracker.step(list("abcde")) as step:
        loss_of(model, x, y).backward()
        optimizer.step()
    expected = step.values

    model, optimizer, tracker = prepared()
    with tracker.step() as step:
        losses = []
        for part in (slice(0, 2), slice(2, 5)):
            step.batch(list("abcde")[part])
            losses.append(loss_of(model, x[part], y[part]) * y[part].numel() / y.numel())
            if not together:
                losses.pop().backward()
        for loss in losses:
            loss.backward()
        optimizer.step()
    assert step.ids == list("abcde")
    close(step.values, expected.double())


@pytest.mark.parametrize("method", ["first", "path"])
def test_gradients_emptied_between_the_batches_of_a_step_are_an_error(method):
    model, (x, y), validation = make("gpt_tied"), data("gpt"), data("gpt", 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method, check=False, validation=lambda: loss_of(model, *validation))
    for emptied in ([0], [0, 1]):
        error = pytest.raises(inrun.InRunError, match=r"the step's last backward .* got none; call .*zero_grad\(\)")
        with error if 1 in emptied else contextlib.nullcontext(), tracker.step() as step:
            for i, part in enumerate((slice(0, 2), slice(2, 5))):
                step.batch(range(B)[part])
                if i in emptied:
                    optimizer.zero_grad()
                loss_of(model, x[part], y[part]).backward()
            optimizer.step()
    assert len(tracker.ledger) == B


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("several", [False, True])
def test_gradients_that_an_update_has_taken_are_not_added_to(several, method):
    model, (x, y), validation = make("gpt_tied"), data("gpt"), data("gpt", 4, 2)
    halves = [list(model.parameters())[k::2] if several else list(model.parameters()) for k in range(1 + several)]
    optimizers = [torch.optim.SGD(half, lr=0.1) for half in halves]
    tracker = inrun.track(model, optimizers, method, check=False, validation=lambda: loss_of(model, *validation))

    def take_step():
        with tracker.step() as step:
            for part in (slice(0, 2), slice(2, 5)):
                step.batch(range(B)[part])
                loss_of(model, x[part], y[part]).backward()
            for optimizer in optimizers:
                optimizer.step()

    for set_to_none in (True, False, False):
        take_step()
        for optimizer in optimizers:
            optimizer.zero_grad(set_to_none)
    take_step()
    for optimizer in optimizers[1:]:
        optimizer.zero_grad()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(inrun.InRunError, match=r"an earlier step, whose update has taken it; call .*zero_grad\(\)"):
        take_step()
    assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    assert tracker.steps == 4 and len(tracker.ledger) == 4 * B
    model.zero_grad()
    take_step()
    assert tracker.steps == 5


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 13)
        self.reentrant = reentrant

    def block(self, h):
        return self.b(self.a(h).tanh())

    def forward(self, x):
        x = self.a(x)
        if self.reentrant is None:
            return self.head(self.block(x))
        return self.head(checkpoint(self.block, x, use_reentrant=self.reentrant))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant):
    model = Checkpointed(reentrant)
    train, validation = data("attention"), data("attention", 4, 2)
    expected = oracle_values(Checkpointed(None), lambda n, g: 0.1 * g, train, validation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    close(run_step(inrun.track(model, optimizer), model, optimizer, train, validation), expected)


def test_a_reentrant_checkpoint_that_would_score_the_wrong_batch_is_refused():
    x, y = data("attention")
    for reentrant in (False, True):
        model = Checkpointed(reentrant)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = inrun.track(model, optimizer, validation=lambda model=model: loss_of(model, x, y))

        def step(model=model, optimizer=optimizer, tracker=tracker):
            with tracker.step() as step:
                losses = []
                for part in (slice(0, 2), slice(2, 4)):
                    step.batch(range(2))
                    losses.append(loss_of(model, x[part], y[part]))
                sum(losses).backward()
                optimizer.step()

        if reentrant:
            with pytest.raises(inrun.InRunError, match="use_reentrant=False has no such limit"):
                step()
        else:
            step()


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
@pytest.mark.parametrize("name", ["loose", "gpt_tied"])
def test_a_copy_of_a_tracked_model_is_a_plain_model(name, copied, method):
    model = make(name)
    classes, names = [type(m) for m in model.modules()], [n for n, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train = data(name)
    tracker = inrun.track(model, optimizer, method, exclude=names[:1], validation=lambda: loss_of(model, *train))
    with tracker.step(range(B)) as step:
        loss_of(model, *train).backward()
        twin = copied(model)
        loss_of(twin, *data(name, 3)).backward()
        optimizer.step()
    assert [type(m) for m in twin.modules()] == classes and [n for n, _ in twin.named_parameters()] == names
    expected = oracle_values(twin, lambda n, g: 0.1 * g, train, train, set(names[1:]))
    close(step.values, expected)
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.1)
    optimizer.zero_grad()
    again = inrun.track(twin, optimizer, exclude=names[:1])
    close(run_step(again, twin, optimizer, train, train), expected)


def test_a_deep_copy_of_a_parametrized_module_is_plain():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, weight):
            return weight * self.scale

    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Scaled())
    classes, names = [type(m) for m in model.modules()], [n for n, _ in model.named_parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    inrun.track(model, optimizer, through={"0.parametrizations.*": "0"})
    twin = copy.deepcopy(model)
    assert [type(m) for m in twin.modules()] == classes and [n for n, _ in twin.named_parameters()] == names
    x = torch.randn(2, 4)
    assert torch.equal(twin(x), model(x))
    inrun.track(twin, torch.optim.SGD(twin.parameters(), lr=0.1), through={"0.parametrizations.*": "0"})


def test_compiled_whole_with_a_changing_batch():
    model = make("gpt_tied")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer)
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    for batch in (5, 5, 4, 3, 7):
        train, validation = data("gpt", batch), data("gpt", 4, 2)
        expected = oracle_values(model, lambda n, g: 0.1 * g, train, validation)
        close(run_step(tracker, compiled, optimizer, train, validation), expected)
    # Validation, the checked step, the steps after it, and those with a batch size left open.
    assert graphs.frame_count <= 5


def test_batches_that_wait_for_their_backward_take_no_graph_of_their_own():
    """Also those that lie otherwise than the ones before."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    optimizer, graphs = torch.optim.SGD(model.parameters(), lr=0.1), CompileCounterWithBackend("eager")
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=graphs)
    tracker = inrun.track(model, optimizer, validation=lambda: compiled(torch.ones(2, 4)).square().mean())
    for _ in range(3):
        with tracker.step() as step:
            losses = []
            for batch in (4, 5, 6):
                step.batch(range(batch))
                losses.append(compiled(torch.randn(batch, 4)).square().mean())
            sum(losses).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert graphs.frame_count <= 4  # validation, the checked step, the one after it, and a batch size left open


def test_a_compiled_update_takes_no_graph_for_what_sees_it():
    """Nor does the whole step, as torch's own documentation compiles it."""

    def graphs(tracked, whole):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, counter = nn.Sequential(*(nn.Linear(8, 8) for _ in range(9))), CompileCounterWithBackend("eager")
        optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.01))
        tracker = inrun.track(model, optimizer, check=False) if tracked else None
        x = torch.randn(3, 8)

        def backward():
            model(x).square().mean().backward()

        def update():
            optimizer.step()

        def step():
            backward()
            update()

        compiled = torch.compile(step if whole else update, backend=counter)
        for _ in range(3):
            if tracker:
                with tracker.validation():
                    backward()
            with tracker.step(range(3)) if tracker else contextlib.nullcontext():
                if not whole:
                    backward()
                compiled()
                optimizer.zero_grad()
        return counter.frame_count

    for whole in (False, True):
        assert graphs(True, whole) <= graphs(False, whole) + whole  # the forward once more, with its probe


@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="no C++ compiler for inductor")
def test_compiled_by_inductor():
    """Generated code, of one graph for every batch size; above, graphs are only captured."""
    torch.manual_seed(0)
    model = gpt(layers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, check=False)  # the checked step would be a graph of its own
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    counts = []
    for batch in (5, 3, 7):
        train, validation = data("gpt", batch), data("gpt", 4, 2)
        expected = oracle_values(model, lambda n, g: 0.1 * g, train, validation)
        with tracker.validation():
            loss_of(model, *validation).backward()  # not compiled: a graph less
        with tracker.step(range(batch)) as step:
            loss_of(compiled, *train).backward()
            optimizer.step()
            optimizer.zero_grad()
        close(step.values, expected)
        counts.append(graphs.frame_count)
    assert counts[0] > 0 and len(set(counts)) == 1


def test_clipping_by_norm_is_part_of_the_update():
    model = make("gpt_tied")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    train, validation = data("gpt"), data("gpt", 4, 2)
    norm = torch.stack([g.norm() for g in gradient(model, *train).values()]).norm()
    expected = oracle_values(model, lambda n, g: 0.1 * g * (0.01 / norm), train, validation)
    tracker = inrun.track(model, optimizer)
    clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.01)  # noqa: E731
    close(run_step(tracker, model, optimizer, train, validation, before_update=clip), expected)


def test_a_closure_is_run_before_the_update_begins():
    """As Lightning's, which zeroes the gradients, runs forward and backward, and clips."""
    model, (x, y), validation = make("mlp"), data("mlp"), data("mlp", 4, seed=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    norm = torch.stack([g.square().sum() for g in gradient(model, x, y).values()]).sum().sqrt()
    expected = oracle_values(model, lambda n, g: 0.3 * g, (x, y), validation) * 0.01 / norm
    tracker = inrun.track(model, optimizer)
    with tracker.validation():
        loss_of(model, *validation).backward()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, x, y)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.01)
        return loss

    with tracker.step(range(B)) as step:
        assert optimizer.step(closure) > 0
    close(step.values, expected)


def test_clipping_is_seen_where_the_beginnings_of_all_gradients_are_zeros():
    class Pairs(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Embedding(1001, 8), nn.Embedding(1001, 8)

        def forward(self, x):
            return torch.stack([self.left(x[:, 0]), self.right(x[:, 1])], 2).prod(2)

    model = Pairs()
    x, y = torch.arange(1000, 1000 - 2 * B, -1).view(B, 2), torch.arange(B)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    norm = torch.stack([g.norm() for g in gradient(model, x, y).values()]).norm()
    expected = oracle_values(model, lambda n, g: 0.1 * g * (0.01 / norm), (x, y), (x[:2], y[:2]))
    clip = lambda: nn.utils.clip_grad_norm_(model.parameters(), 0.01)  # noqa: E731
    close(
        run_step(inrun.track(model, optimizer), model, optimizer, (x, y), (x[:2], y[:2]), before_update=clip), expected
    )


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_model_on_the_cpu_leaves_the_gpus_of_its_machine_alone(method, monkeypatch):
    """They are not started, and torch does not warn of several."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: pytest.fail("a GPU was started"))
    model, x, y = make("unknown"), *data("unknown")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x, y))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with tracker.step(range(B)) as step:
            loss_of(model, x, y).backward()
            optimizer.step()
    assert step.values.isfinite().all()


def test_the_last_validation_loss_is_a_copy():
    """A captured CUDA graph writes its next loss where the last one stands."""
    model, losses = make("mlp"), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def validation():
        losses.append(loss_of(model, *data("mlp", 4, 2)))
        return losses[-1]

    tracker = inrun.track(model, optimizer, validation=validation, check=False)
    with tracker.step(range(B)):
        loss_of(model, *data("mlp")).backward()
        optimizer.step()
    loss = losses[-1].item()
    losses[-1].data.zero_()
    assert tracker.last_validation["validation"].item() == loss > 0


def test_clipping_by_value_is_refused():
    model = make("gpt_tied")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, check=False)
    clip = lambda: nn.utils.clip_grad_value_(model.parameters(), 1e-3)  # noqa: E731
    with pytest.raises(inrun.InRunError, match="element by element"):
        run_step(tracker, model, optimizer, data("gpt"), data("gpt", 4, 2), before_update=clip)


@pytest.mark.parametrize("wait", [False, True])
def test_a_gpus_answer_about_a_step_is_not_waited_for(wait):
    """Until it is there, or the tracker is closed; what was recorded meanwhile is no number."""

    class Event:
        there = False

        def query(self):
            return self.there

        def synchronize(self):
            self.there = True

    model = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *data("mlp", 4, 2)), check=False)
    event = Event()
    tracker._pending.ask = lambda wrong, error: tracker._pending._asked.append((wrong, event, error))
    tracker.ledger.append = lambda *args, **kwargs: None
    for clip in (True, False):
        with tracker.step(range(B)) as step:
            loss_of(model, *data("mlp")).backward()
            if clip:
                nn.utils.clip_grad_value_(model.parameters(), 1e-3)
            optimizer.step()
            optimizer.zero_grad()
        assert step.values.isnan().all() == clip
    event.there = not wait
    with pytest.raises(inrun.InRunError, match="in step 0 got gradients changed element by element"):
        tracker.close() if wait else tracker.step(range(B)).__enter__()


@pytest.mark.parametrize("alone", [False, True])
def test_a_gpus_answer_about_a_validation_gradient_is_not_waited_for(alone, monkeypatch):
    """The next step finds out, or the end."""
    there = []
    asked = []
    monkeypatch.setattr(Pending, "ask", lambda self, *question: asked.append((self, *question)))
    model = make("mlp")
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1), check=False)
    with tracker.validation():
        (loss_of(model, *data("mlp")) * (1.0 if alone else math.inf)).backward()
        if alone:
            model.net[0].weight.grad[0, 0] = math.inf
    ((pending, wrong, error),) = asked
    event = SimpleNamespace(query=lambda: bool(there))
    pending._asked.append((wrong, event, error))
    pending.answer()
    there.append(True)
    with pytest.raises(inrun.InRunError, match=r"expected a finite gradient, got NaN or infinity in net\.0"):
        tracker.step(range(B)).__enter__()
    tracker.close()


@pytest.mark.parametrize("fused", [False, True])
def test_loss_scale_divides_out_and_a_skipped_update_is_worth_nothing(fused):
    train, validation = data("gpt"), data("gpt", 4, 2)

    def prepared():
        model = make("gpt_tied")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=fused)
        return model, optimizer, inrun.track(model, optimizer)

    model, optimizer, tracker = prepared()
    expected = run_step(tracker, model, optimizer, train, validation)

    model, optimizer, tracker = prepared()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def step(spoil=False):
        with tracker.validation(scale=scaler.get_scale()):
            scaler.scale(loss_of(model, *validation)).backward()
        with tracker.step(range(B)) as step:
            scaler.scale(loss_of(model, *train)).backward()
            if spoil:
                next(model.parameters()).grad.view(-1)[0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return step.values

    close(step(), expected.double(), 1e-3)
    before = copy.deepcopy(model.state_dict())
    if fused:
        assert torch.equal(step(spoil=True), torch.zeros(B))
    else:
        with pytest.warns(UserWarning, match="did not run"):
            assert torch.equal(step(spoil=True), torch.zeros(B))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


class Annealed(nn.Module):
    """Without a rule; counts, lists, replaces a buffer and draws numbers in its forward."""

    def __init__(self):
        super().__init__()
        self.inner, self.scale, self.calls, self.seen = nn.Linear(6, 6), nn.Parameter(torch.randn(6)), 0, []
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x):
        y = self.inner(x) - self.mean
        if not self.training:
            return y * self.scale
        kept = torch.from_numpy(np.random.rand(6) < 0.7)
        self.mean, self.calls = 0.5 * (self.mean + y.detach().mean(0)), self.calls + 1
        self.seen.append(self.calls)
        return y * self.scale * kept * (random.random() + 1 / self.calls)


class CountedNorm(nn.Module):
    """Is found by running it."""

    def __init__(self):
        super().__init__()
        self.weight, self.bias, self.calls = nn.Parameter(torch.ones(6)), nn.Parameter(torch.zeros(6)), 0

    def forward(self, x):
        self.calls += self.training
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * self.weight + self.bias


def taken_steps(tracker, model, optimizer, x, y, recompute):
    """A step on each batch; those of the tracker, which is then closed, if there is one."""
    taken = []
    for each in x:
        loss = lambda each=each: loss_of(model, each, y)  # noqa: E731
        step = tracker.step(range(4), recompute=loss if recompute else None) if tracker else None
        with step or contextlib.nullcontext():
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()
        taken += [step] if tracker else []
    if tracker:
        tracker.close()
    return taken


def test_what_modules_hold_and_draw_is_what_it_is_without_a_tracker():
    x, y = torch.randn(3, 4, 6).double(), torch.tensor([0, 1, 2, 0])

    def train(method=None, targets=1, recompute=False):
        torch.manual_seed(0)
        np.random.seed(0)
        random.seed(0)
        model = nn.Sequential(Annealed(), CountedNorm(), nn.Linear(6, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def validation():
            model.eval()
            loss = loss_of(model, x[0], y)
            model.train()
            return loss

        tracker = method and inrun.track(
            model, optimizer, method, validation={str(i): validation for i in range(targets)}
        )  # fmt: skip
        taken = taken_steps(tracker, model, optimizer, x, y, recompute)
        values = [step.values.view(4, -1)[:, 0] for step in taken if method != "secant"]
        held = [model[0].calls, model[0].seen, model[1].calls, random.random(), np.random.rand()]
        return held, model.state_dict(), values

    held, state, _ = train()
    _, _, expected = train("first")
    for options in (("first",), ("first", 2), ("path",), ("secant",), ("path", 2), ("path", 1, True)):
        found = train(*options)
        assert found[0] == held, options
        for name, tensor in found[1].items():
            torch.testing.assert_close(tensor, state[name], msg=lambda m, o=options, n=name: f"{o}, {n}: {m}")
        for got, want in zip(found[2], expected, strict=False):  # of SGD the path's values are those of first order
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)


GENERATORS = {
    "torch": lambda: torch.Generator().manual_seed(0),
    "python": lambda: random.Random(0),
    "numpy": lambda: np.random.default_rng(0),
    "numpy's old": lambda: np.random.RandomState(0),
}


def test_a_module_may_hold_a_generator_without_a_state():
    class Holding(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.generator = nn.Parameter(torch.randn(3)), random.SystemRandom()

        def forward(self, x):
            return x * self.scale

    model, x = nn.Sequential(nn.Linear(6, 3), Holding()), torch.randn(4, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).square().mean())
    with tracker.step(range(4)):
        model(x).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", GENERATORS)
def test_generators_that_a_module_holds_draw_as_without_a_tracker(kind):
    class Dropping(nn.Module):
        """Drops samples, by a generator of its own."""

        def __init__(self):
            super().__init__()
            self.inner, self.scale, self.generator = nn.Linear(6, 6), nn.Parameter(torch.randn(6)), GENERATORS[kind]()

        def drawn(self):
            generator = self.generator
            return torch.rand((), generator=generator).item() if kind == "torch" else generator.random()

        def forward(self, x):
            kept = torch.tensor([float(self.training and self.drawn() > 0.5) for _ in x]).to(x)
            return x + kept.unsqueeze(1) * self.inner(x) * self.scale

    x, y = torch.randn(3, 4, 6).double(), torch.tensor([0, 1, 2, 0])

    def train(method=None, recompute=False):
        torch.manual_seed(0)
        model = nn.Sequential(Dropping(), nn.Linear(6, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def validation():
            with inrun.restoring.in_eval_mode(model):
                return loss_of(model, x[0], y)

        tracker = method and inrun.track(model, optimizer, method, validation=validation)
        values = [step.values for step in taken_steps(tracker, model, optimizer, x, y, recompute)]
        return list(model.parameters()), values

    params, _ = train()
    _, expected = train("first")
    for options in (("first",), ("path",), ("path", True)):
        found, values = train(*options)
        for got, want in zip([*found, *values], [*params, *expected], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("method", inrun.tracker.METHODS)
def test_a_validation_loss_leaves_running_statistics_to_training(method):
    x, y = torch.randn(3, 4, 6).double(), torch.tensor([0, 1, 2, 0])

    def train(tracked, counted=Counting):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 6), counted(), nn.Tanh(), nn.Linear(6, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = tracked and inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x[0] + 3, y))
        for each in x:
            with tracker.step(range(4)) if tracker else contextlib.nullcontext():
                loss_of(model, each, y).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()

    norm = lambda: nn.BatchNorm1d(6)  # noqa: E731
    if method == "monte_carlo":  # takes one sample's gradient at a time
        with pytest.raises(inrun.InRunError, match="by itself"):
            train(True, norm)
    for counted in (Counting, *([] if method == "monte_carlo" else [norm])):
        for found, expected in zip(train(True, counted).values(), train(False, counted).values(), strict=True):
            torch.testing.assert_close(found, expected)


def test_the_input_of_a_frozen_weight_is_not_kept():
    """Nor is it when only its bias trains: the model may write into it."""

    class Biases(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.head = nn.Linear(64, 64), nn.Linear(64, 2)
            for layer in (self.inner, self.head):
                layer.weight.requires_grad_(False)

        def forward(self, x):
            x = x * 2
            y = self.inner(x)
            x.add_(y.detach())
            return self.head(y + x)

    def saved(model):
        seen = {}
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: seen.update({t.data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t
        ):
            loss = loss_of(model, x, y)
        loss.backward()
        return sum(seen.values())

    torch.manual_seed(0)
    model, x, y = Biases(), torch.randn(500, 64), torch.zeros(500, dtype=torch.int64)
    plain = saved(model)
    model.zero_grad()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    want = oracle_values(model, lambda n, g: 0.1 * g, (x, y), (x[:9], y[:9]))
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x[:9], y[:9]))
    with tracker.step(range(500)) as step:
        tracked = saved(model)
        optimizer.step()
    close(step.values, want)
    assert tracked < plain + x.nbytes // 4


@pytest.mark.parametrize("overflow_at", [0, 2])
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("method", ["first", "secant", "path_secant"])
def test_of_several_optimizers_a_scaler_skips_one(method, first, overflow_at):
    """Torch's scaler decides for each by itself: training goes on, and the step has no values."""

    def train(tracked):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
        optimizers = [torch.optim.AdamW(model[i].parameters(), lr=1e-2) for i in (first * 2, 2 - first * 2)]
        scaler, x, y = torch.amp.GradScaler("cpu", init_scale=256.0), torch.randn(4, 4, 5), torch.tensor([0, 1, 2, 0])
        tracker = (
            inrun.track(model, optimizers, method, validation=lambda: loss_of(model, x[3], y)) if tracked else None
        )
        found = []
        for i in range(4):
            with tracker.step(range(4)) if tracker else contextlib.nullcontext() as step:
                hidden = model[1](model[0](x[i]))
                if i == overflow_at:
                    hidden.register_hook(lambda grad: grad * torch.inf)
                scaler.scale(F.cross_entropy(model[2](hidden), y)).backward()
                for each in optimizers:
                    scaler.unscale_(each)
                for each in optimizers:
                    scaler.step(each)
                scaler.update()
                for each in optimizers:
                    each.zero_grad()
            found.append(step)
        if tracker:
            tracker.close()
            return [step.values for step in found], model
        return model

    with pytest.warns(UserWarning, match="did not run"):
        values, model = train(tracked=True)
    assert [bool(v.any()) for v in values] == [i != overflow_at for i in range(4)]
    for name, weight in train(tracked=False).state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight)


@pytest.mark.parametrize("method", ["first", "secant", "path", "path_secant"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_gradient_that_is_no_number_is_told_of_in_its_step(method, count):
    """Without a scaler all optimizers take it."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    parts = [model] if count == 1 else [model[0], model[2]]
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in parts]
    x, y = torch.randn(4, 5), torch.tensor([0, 1, 2, 0])
    tracker = inrun.track(model, optimizers, method, validation=lambda: loss_of(model, x, y))
    with pytest.raises(inrun.InRunError, match="finite"):
        for i in range(3):
            with tracker.step(range(4)):
                hidden = model[1](model[0](x))
                if i == 1:
                    hidden.register_hook(lambda grad: grad * torch.nan)
                F.cross_entropy(model[2](hidden), y).backward()
                for each in optimizers:
                    each.step()
                    each.zero_grad()
    assert i == 1


def test_a_scaled_validation_loss_that_overflows_says_what_to_do():
    """A GradScaler begins at 65536 and backs off; a validation gradient that is lost is no step skipped."""
    model, train, validation = make("mlp"), data("mlp"), data("mlp", 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = oracle_values(model, lambda n, g: 0.1 * g, train, validation)
    tracker = inrun.track(model, optimizer)
    half = torch.finfo(torch.float16).max

    def overflowing(grad):  # a float16 activation's
        return torch.where(grad.abs() * 1e3 > half, torch.inf, grad)

    handle = model.head.register_forward_hook(lambda m, args, out: out.register_hook(overflowing) and None)
    scaler = torch.amp.GradScaler("cpu")
    message = r"got NaN or infinity .*The loss was scaled by 65536: scale it by less, and pass that as scale="
    with pytest.raises(inrun.InRunError, match=message), tracker.validation(scale=scaler.get_scale()):
        scaler.scale(loss_of(model, *validation)).backward()
    assert all(p.grad is None for p in model.parameters() if p.requires_grad)
    with tracker.validation(scale=16.0):
        (loss_of(model, *validation) * 16).backward()
    handle.remove()
    with tracker.step(range(B)) as step:
        loss_of(model, *train).backward()
        optimizer.step()
    close(step.values, expected)


def test_a_sample_axis_in_second_place_is_an_error_where_the_sizes_tell():
    """[T, B, H]: seen where T is not B. Where it is, nothing tells, and values are those of positions (README)."""
    for tokens in (B + 1, B):
        layer, x = nn.Linear(8, 3), torch.randn(tokens, B, 8)
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        tracker = inrun.track(layer, optimizer, validation=lambda layer=layer, x=x: layer(x).square().mean())
        refused = pytest.raises(ValueError, match=rf"with B = {B}.* got \({tokens}, {B}, 8\)")
        with refused if tokens != B else contextlib.nullcontext(), tracker.step(range(B)) as step:
            layer(x).square().mean().backward()
            optimizer.step()
    assert step.values.shape == (B,)


def test_several_targets_by_block_and_by_callable():
    train = data("gpt")
    code, prose = data("gpt", 4, 2), data("gpt", 3, 3)
    model = make("gpt_tied")
    expected = torch.stack([oracle_values(model, lambda n, g: 0.1 * g, train, v) for v in (code, prose)], dim=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, targets=("code", "prose"))
    with pytest.raises(ValueError, match="target: expected one of code, prose, got None"), tracker.validation():
        pass
    for name, validation in (("code", code), ("prose", prose)):
        with tracker.validation(name):
            loss_of(model, *validation).backward()
    with tracker.step(range(B)) as step:
        loss_of(model, *train).backward()
        optimizer.step()
    assert step.values.shape == (B, 2)
    close(step.values, expected)
    assert len(tracker.ledger) == 2 * B

    model = make("loose")
    train, code, prose = data("loose"), data("loose", 4, 2), data("loose", 3, 3)
    expected = torch.stack([oracle_values(model, lambda n, g: 0.1 * g, train, v) for v in (code, prose)], dim=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validation = {"code": lambda: loss_of(model, *code), "prose": lambda: loss_of(model, *prose)}
    tracker = inrun.track(model, optimizer, validation=validation)
    with tracker.step(range(B)) as step:
        loss_of(model, *train).backward()
        optimizer.step()
    close(step.values, expected)


def test_a_callable_runs_every_k_steps_and_leaves_random_numbers_alone():
    model = make("gpt_tied")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []

    def validation():
        calls.append(tracker.steps)
        torch.rand(3)
        return loss_of(model, *data("gpt", 4, 2))

    tracker = inrun.track(model, optimizer, validation=validation, validate_every=3)
    torch.manual_seed(3)
    kept = {}
    for lr in (0.1, 0.2, 0.1, 0.1):
        optimizer.param_groups[0]["lr"] = lr
        if tracker.steps == 1:  # the kept validation gradient, with today's learning rate
            expected = oracle_values(model, lambda n, g, kept=kept: 2 * kept[n], data("gpt"), data("gpt", 4, 2))
        with tracker.step(range(B)) as step:
            if step.number == 0:
                kept = {s.name: s.direction.detach().double().clone() for s in tracker.slots}
            loss_of(model, *data("gpt")).backward()
            optimizer.step()
            optimizer.zero_grad()
        if step.number == 1:
            close(step.values, expected)
    assert calls == [0, 3]
    assert set(tracker.last_validation) == {"validation"}
    drawn = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(1))


def test_a_run_that_goes_on_validates_at_the_steps_that_it_would_have():
    model = make("mlp")
    optimizer, calls = torch.optim.SGD(model.parameters(), lr=0.1), []
    validation = {name: lambda name=name: calls.append((name, tracker.steps)) or loss_of(model, *data("mlp", 4, 2))
                  for name in ("a", "b")}  # fmt: skip
    tracker = inrun.track(model, optimizer, validation=validation, validate_every=3)
    tracker.steps = 7
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(6):
            with tracker.step(range(B)):
                loss_of(model, *data("mlp")).backward()
                optimizer.step()
                optimizer.zero_grad()
    assert calls == [(name, step) for step in (7, 9, 12) for name in ("a", "b")]
    said = [str(w.message) for w in caught if w.filename == __file__]
    assert len(said) == 2 and "the run goes on at step 7, between two multiples of 3; the validation" in said[0]


class Gated(nn.Module):
    """A deep branch that may be closed, beside the input; which of its heads answers is said with it."""

    def __init__(self, heads=1):
        super().__init__()
        torch.manual_seed(0)
        self.open, self.which = 1.0, 0
        self.body = nn.Sequential(*[m for _ in range(10) for m in (nn.Linear(8, 8), nn.Tanh())])
        self.heads = nn.ModuleList(nn.Linear(8, 3, bias=False) for _ in range(heads))

    def forward(self, x):
        return self.heads[self.which](x + self.open * self.body(x))


@pytest.mark.parametrize("method", ["first", "path"])
def test_clipping_is_seen_where_a_branch_is_closed(method):
    """Its gradients are zeros, whatever they are multiplied by."""
    model, (x, y) = Gated(), (torch.randn(4, 8), torch.tensor([0, 1, 2, 0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method)
    for model.open in (0.0, 1.0, 0.0):
        params = list(model.parameters())
        along = torch.autograd.grad(F.cross_entropy(model(x.flip(0)), y), params)
        ones = [torch.autograd.grad(F.cross_entropy(model(x[[k]]), y[[k]]) / 4, params) for k in range(4)]
        size = torch.stack([sum(g).square().sum() for g in zip(*ones, strict=True)]).sum().sqrt()
        expected = torch.stack([0.1 * sum((a * g).sum() for a, g in zip(along, one, strict=True)) for one in ones])
        with tracker.validation():
            F.cross_entropy(model(x.flip(0)), y).backward()
        with tracker.step(range(4)) as step:
            F.cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.01)
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(step.values, expected * 0.01 / size, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("norm", [nn.GroupNorm, nn.BatchNorm2d, nn.InstanceNorm2d])
def test_norms_over_channels_in_bfloat16(norm, method):
    """Their kernels on a CPU take weights in float32 or in the input's dtype, and statistics so."""

    def values(dtype):
        torch.manual_seed(0)
        layer = norm(2, 4) if norm is nn.GroupNorm else norm(4, affine=True)
        model = nn.Sequential(nn.Conv2d(2, 4, 3), layer, nn.GELU(), nn.Flatten(), nn.Linear(64, 2)).to(dtype)
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(3, 2, 6, 6).to(dtype)
        tracker = inrun.track(model, optimizer, method)
        with tracker.validation():
            model(x).float().square().mean().backward()
        with tracker.step(range(3)) as step:
            model(x).float().square().mean().backward()
            optimizer.step()
        return step.values

    torch.testing.assert_close(values(torch.bfloat16), values(torch.float32), rtol=0.05, atol=0.02)


def test_steps_may_train_one_of_many_heads_each():
    model, x = Gated(12), torch.randn(4, 8)
    model.body.requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer)
    for model.which in range(12):
        with tracker.validation():
            model(x).square().mean().backward()
        with tracker.step(range(4)) as step:
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert (step.values > 0).all()


def test_a_step_without_an_update_leaves_the_next_nothing_to_wait_for():
    """Which trains another head."""
    model = nn.ModuleDict({"one": nn.Linear(4, 3), "other": nn.Linear(4, 3)})
    x, y = torch.randn(B, 4), torch.randint(3, (B,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer)
    for head, updated in (("one", False), ("other", True)):
        with tracker.validation():
            sum(F.cross_entropy(each(x), y) for each in model.values()).backward()
        told = contextlib.nullcontext() if updated else pytest.warns(UserWarning, match="did not run")
        with told, tracker.step(range(B)) as step:
            F.cross_entropy(model[head](x), y).backward()
            if updated:
                optimizer.step()
            optimizer.zero_grad()
    assert (step.values != 0).all()


@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.Adam])
def test_what_a_validation_gradient_no_longer_reaches_is_worth_nothing(kind, targets):
    """And not what it was worth in the step before."""
    torch.manual_seed(0)
    model, names = nn.ModuleDict({"one": nn.Linear(4, 3), "other": nn.Linear(4, 3)}), ["a", "b"][:targets]
    x, y = torch.randn(B, 4), torch.randint(3, (B,))
    optimizer = kind(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, targets=names)
    for reached in (("one", "other"), ("one",)):
        for name in names:
            with tracker.validation(name):
                sum(F.cross_entropy(model[head](x), y) for head in (reached if name == names[-1] else model)).backward()
        with tracker.step(range(B)) as step:
            F.cross_entropy(model["other"](x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        values = step.values.reshape(B, targets).abs().sum(0)
        assert (values[:-1] > 0).all() and bool(values[-1] > 0) == ("other" in reached)


def test_a_gradient_of_rounding_alone_is_none():
    """As of a bias that a layer norm takes off again, which Adam makes as large as any."""

    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x + self.bias

    for seed in range(10):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 16), Shift(), nn.LayerNorm(16), nn.Linear(16, 3))
        optimizer, x = torch.optim.AdamW(model.parameters(), lr=1e-3), torch.randn(4, 6, 4)
        tracker = inrun.track(model, optimizer)
        with tracker.validation():
            model(x[:2] * 2).square().mean().backward()
        with tracker.step(range(4)):
            (model(x).mean(1) ** 2).mean().backward()
            optimizer.step()
        tracker.close()


@pytest.mark.parametrize("called", [False, True])
def test_padding_has_no_part_in_a_table_that_is_the_head_too(called):
    """By forward-mode AD, or where the head is called by rules: its rows have a direction where the padding is."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(2)
            self.embed, self.inner = nn.Embedding(20, 8, padding_idx=0), nn.Linear(8, 8)
            if called:
                self.head = nn.Linear(8, 20)
                self.head.weight = self.embed.weight
            else:
                self.bias = nn.Parameter(torch.zeros(20))

        def forward(self, ids):
            h = self.inner(self.embed(ids)).tanh()
            return self.head(h) if called else F.linear(h, self.embed.weight, self.bias)

    def loss_of(model, ids):
        return F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten(), reduction="sum") / 40

    model = Tied().double()
    ids = torch.randint(1, 20, (5, 8))
    ids[1, 5:], ids[2, 2:] = 0, 0
    params = list(model.parameters())
    along = torch.autograd.grad(loss_of(model, ids[3:]), params)
    ones = [torch.autograd.grad(loss_of(model, ids[[k]]), params) for k in range(3)]
    expected = [0.5 * sum((a * g).sum() for a, g in zip(along, one, strict=True)) for one in ones]
    for method in ("first", "path"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        copied = copy.deepcopy(model)
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, ids[3:]))  # noqa: B023
        with tracker.step(range(3)) as step:
            loss_of(model, ids[:3]).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(step.values.double(), torch.stack(expected).detach(), rtol=1e-6, atol=1e-9)
        tracker.close()
        model = copied


def test_a_run_that_goes_on_unchecked_has_the_values_of_one_without_a_stop_to_the_bit():
    def values(first, last, state=None, check=True):
        model = make("gpt_tied")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        if state is not None:
            model.load_state_dict(state[0])
            optimizer.load_state_dict(copy.deepcopy(state[1]))
        tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *data("gpt", 4, 2)), check=check)
        tracker.steps, found = first, []
        for number in range(first, last):
            with tracker.step(range(B)) as step:
                loss_of(model, *data("gpt", B, number)).backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append(step.values)
        return torch.stack(found), copy.deepcopy((model.state_dict(), optimizer.state_dict()))

    whole, (_, state) = values(0, 8)[0], values(0, 5)
    assert torch.equal(values(5, 8, state, check=False)[0], whole[5:])
    torch.testing.assert_close(values(5, 8, state)[0], whole[5:])


def test_what_is_said_of_the_validation_side_is_looked_at():
    model = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(
        ValueError, match=r"targets: expected those of validation, \('code',\), or none; got \['prose'\]"
    ):
        inrun.track(model, optimizer, validation={"code": lambda: loss_of(model, *data("mlp"))}, targets=["prose"])
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *data("mlp")).detach())
    with pytest.raises(inrun.InRunError, match=r"'validation': expected one with a graph"), tracker.step(range(B)):
        pass


@pytest.mark.parametrize("tensor", [False, True])
def test_a_learning_rate_set_inside_the_block_counts(tensor):
    model = make("gpt_tied")
    train, validation = data("gpt"), data("gpt", 4, 2)
    still = list(model.parameters())[-1]
    moving = {n: p for n, p in model.named_parameters() if p is not still}
    optimizer = torch.optim.SGD(moving.values(), lr=torch.tensor(0.1) if tensor else 0.1)
    optimizer.add_param_group({"params": [still], "lr": 0.0})  # which any factor leaves as it is
    expected = oracle_values(model, lambda n, g: 0.4 * g * (n in moving), train, validation)
    tracker = inrun.track(model, optimizer)

    def warm():
        lr = optimizer.param_groups[0]["lr"]
        optimizer.param_groups[0]["lr"] = lr.fill_(0.4) if isinstance(lr, torch.Tensor) else 0.4

    close(run_step(tracker, model, optimizer, train, validation, before_update=warm), expected)
    optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(inrun.InRunError, match="learning rates"):
        run_step(tracker, model, optimizer, train, validation, before_update=warm)


@pytest.mark.parametrize(
    "now", [(0.1, 0.1), (0.0, 0.1), (0.1, 0.1001), (float("inf"), 0.1), (0.1, float("nan")), (0.2, 0.2, 0.1)]
)
@pytest.mark.parametrize("turned", [False, True])
def test_learning_rates_of_no_one_factor_are_an_error(now, turned):
    before = {(0.1, 0.1): (0.1, 0.0), (0.0, 0.1): (0.1, 0.1)}.get(now, (0.1,) * len(now))
    before, now = (side[::-1] if turned else side for side in (before, now))
    with pytest.raises(inrun.InRunError, match="learning rates"):
        inline.lr_change(before, now, Pending())


def test_learning_rates_that_a_schedule_scales_alike_are_of_one_factor():
    """As rounded: 0.1 * 0.7 / 0.1 is not 0.12 * 0.7 / 0.12."""
    model = make("mlp")
    groups = [{"params": [p], "lr": 0.1 + 0.02 * i} for i, p in enumerate(model.parameters())]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    train, validation = data("mlp"), data("mlp", 4, 2)
    rates = {n: 0.7 * g["lr"] for (n, _), g in zip(model.named_parameters(), groups, strict=True)}
    expected = oracle_values(model, lambda n, g: rates[n] * g, train, validation)
    tracker = inrun.track(model, optimizer)

    def warm():
        for group in optimizer.param_groups:
            group["lr"] *= 0.7

    close(run_step(tracker, model, optimizer, train, validation, before_update=warm), expected)


def test_excluded_and_frozen_parameters():
    model = make("gpt_untied")
    names = [n for n, p in model.named_parameters()]
    next(p for n, p in model.named_parameters() if n == names[-1]).requires_grad_(False)
    biases = [n for n in names if n.endswith("bias") and n != names[-1]]
    train, validation = data("gpt"), data("gpt", 4, 2)
    counted = set(names) - set(biases) - {names[-1]}
    expected = oracle_values(model, lambda n, g: 0.1 * g, train, validation, counted)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tracker = inrun.track(model, optimizer, exclude=["*bias"] if biases else [names[0]])
    close(run_step(tracker, model, optimizer, train, validation), expected)
    assert tracker.coverage["frozen"] == [names[-1]]
    assert set(tracker.coverage["excluded"]) == set(biases)
    assert 0 < tracker.ledger.metadata["excluded_share"] < 1


@pytest.mark.parametrize("method", ["first", "secant"])
def test_excluded_parameters_train_as_without_a_tracker(method):
    def train(tracked):
        model = make("mlp")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loss = lambda: loss_of(model, *data("mlp", 4, 2))  # noqa: E731
        tracker = tracked and inrun.track(model, optimizer, method, exclude=["net.0.*"], validation=loss)
        for _ in range(2):
            with tracker.step(range(B)) if tracker else contextlib.nullcontext():
                loss_of(model, *data("mlp")).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()

    for found, expected in zip(train(True).values(), train(False).values(), strict=True):
        torch.testing.assert_close(found, expected)


def test_a_parameter_that_trains_since_it_was_tracked_is_an_error():
    model, validation = make("mlp"), data("mlp", 4, 2)
    model.head.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    tracker = inrun.track(model, optimizer, exclude=["net.0.bias"], validation=lambda: loss_of(model, *validation))
    model.requires_grad_(True)
    with pytest.raises(inrun.InRunError, match=r"got 2 more.*: head\.weight, head\.bias"), tracker.step(range(B)):
        pass
    model.head.requires_grad_(False)
    with tracker.step(range(B)):
        loss_of(model, *data("mlp")).backward()
        optimizer.step()


def test_late_binding_strips_directions_from_the_optimizer():
    model, plain = make("gpt_tied"), make("gpt_tied")
    tracker = inrun.track(model)
    with pytest.raises(inrun.InRunError, match="bind"):
        tracker.step(range(B))
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [n for n, _ in copy.deepcopy(model).named_parameters()] == [n for n, _ in plain.named_parameters()]
    model.load_state_dict(plain.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker.bind(optimizer)
    assert len(optimizer.param_groups[0]["params"]) == len(tracker.coverage["tracked"])
    expected = oracle_values(model, lambda n, g: 0.1 * g, data("gpt"), data("gpt", 4, 2))
    close(run_step(tracker, model, optimizer, data("gpt"), data("gpt", 4, 2)), expected)


def test_paused_runs_plainly_in_the_middle_of_a_step():
    model = make("gpt_tied")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *data("gpt", 4, 2)))
    expected = oracle_values(model, lambda n, g: 0.1 * g, data("gpt"), data("gpt", 4, 2))
    with tracker.step(range(B)) as step:
        loss = loss_of(model, *data("gpt"))
        with tracker.paused(), torch.no_grad():
            loss_of(model, *data("gpt", 9, 5))
        loss.backward()
        optimizer.step()
    close(step.values, expected)


def test_the_efficiency_check_names_what_was_used_past_its_module():
    torch.manual_seed(0)
    model = Bypass()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    tracker = inrun.track(model, optimizer)
    with pytest.raises(inrun.InRunError, match=r"a\.weight \(8, 8\).*scored .* gradient gives") as caught:
        run_step(tracker, model, optimizer, data("attention"), data("attention", 4, 2))
    assert "b.weight" not in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # raised before the update
    assert len(tracker.ledger) == 0


def test_bad_input_is_one_clear_error_before_anything_changes():
    model = make("gpt_tied")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    classes = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match=r"method: expected one of first, .*, got 'third'"):
        inrun.track(model, optimizer, method="third")
    with pytest.raises(ValueError, match="validate_every"):
        inrun.track(model, optimizer, validate_every=0)
    with pytest.raises(ValueError, match="targets"):
        inrun.track(model, optimizer, targets=("a", "a"))
    with pytest.raises(ValueError, match="'nothing' matches none"):
        inrun.track(model, optimizer, exclude=["nothing"])
    with pytest.raises(inrun.InRunError, match=r"expected one of torch\.optim's SGD, Adam, AdamW"):
        inrun.track(model, torch.optim.Rprop(model.parameters()))
    with pytest.raises(inrun.InRunError, match="are not: "):
        inrun.track(model, torch.optim.SGD(list(model.parameters())[:2]))
    with pytest.raises(inrun.InRunError, match=r"max_norm=None, got 1\.0"):
        inrun.track(nn.Embedding(3, 2, max_norm=1.0))
    assert [type(m) for m in model.modules()] == classes

    tracker = inrun.track(model, optimizer)
    with pytest.raises(inrun.InRunError, match="is tracked already"):
        inrun.track(model, optimizer)
    with (
        pytest.raises(inrun.InRunError, match=r"expected a validation\('validation'\) block"),
        tracker.step([1]),
    ):
        pass
    with (
        pytest.raises(ValueError, match="target: expected one of validation, got 'code'"),
        tracker.validation("code"),
    ):
        pass
    with pytest.raises(inrun.InRunError, match="no backward pass"), tracker.validation():
        pass
    with pytest.raises(inrun.InRunError, match="NaN or infinity in"), tracker.validation():
        (loss_of(model, *data("gpt")) * float("nan")).backward()

    def validated():
        with tracker.validation():
            loss_of(model, *data("gpt")).backward()

    validated()
    with pytest.raises(TypeError, match="ids: expected"):
        tracker.step("abc")
    with pytest.raises(TypeError, match="int, str"):
        tracker.step([1, "a"])
    with pytest.raises(ValueError, match="got none"):
        tracker.step([])
    with pytest.raises(ValueError, match=r"B = 3, the number of sample ids"), tracker.step([1, 2, 3]):
        loss_of(model, *data("gpt"))
    validated()
    with pytest.raises(inrun.InRunError, match="expected ids"), tracker.step():
        pass
    validated()
    with pytest.raises(inrun.InRunError, match="no backward pass reached"), tracker.step(range(B)) as step:
        pass
    with pytest.raises(inrun.InRunError, match="asked for too early"):
        _ = step.values
    validated()
    trained = [p for p in model.parameters() if p.requires_grad]
    for given in ([], trained):
        with pytest.raises(inrun.InRunError, match=r"there was none.*use backward"), tracker.step(range(B)):
            for p, grad in zip(given, torch.autograd.grad(loss_of(model, *data("gpt")), trained), strict=False):
                p.grad = grad
            optimizer.step()
        optimizer.zero_grad()
        validated()
    with tracker.step(range(B)):
        loss_of(model, *data("gpt")).backward()
        optimizer.step()
        optimizer.zero_grad()
    with pytest.raises(inrun.InRunError, match="has served 1 step"), tracker.step(range(B)):
        pass
    validated()
    with pytest.raises(inrun.InRunError, match="a second one"), tracker.step(range(B)):
        loss_of(model, *data("gpt")).backward()
        optimizer.step()
        optimizer.step()
    validated()
    with pytest.raises(inrun.InRunError, match="inside one"), tracker.step(range(B)), tracker.validation():
        pass
    assert len(tracker.ledger) == B
    tracker.close()
    with pytest.raises(inrun.InRunError, match="is closed"):
        tracker.step(range(B))


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_step_that_an_exception_ended_has_used_its_validation_gradient(method):
    """Before its update or after it, as where a notebook's cell is stopped."""
    model, train, validation = make("mlp"), data("mlp"), data("mlp", 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *validation))
    for updates in (0, 1):
        with pytest.raises(KeyboardInterrupt), tracker.step(range(B)):
            loss_of(model, *train).backward()
            if updates:
                optimizer.step()
            raise KeyboardInterrupt
        optimizer.zero_grad()
        expected = oracle_values(model, lambda n, g: 0.3 * g, train, validation)
        with tracker.step(range(B)) as step:
            loss_of(model, *train).backward()
            optimizer.step()
            optimizer.zero_grad()
        close(step.values, expected)


class InPlace(nn.Module):
    """Scales its input, and returns that."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(0.5, 1.5, 12))

    def forward(self, x):
        return x.mul_(self.weight)


def test_a_module_that_changes_its_input_in_place_is_run_once_or_refused():
    train, validation = data("mlp"), data("mlp", 4, 2)
    for method, targets in (("first", "a"), ("first", "ab"), ("path", "a")):
        model = make("mlp")
        model.net[1] = InPlace()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses = dict.fromkeys(targets, lambda model=model: loss_of(model, *validation))
        expected = oracle_values(model, lambda n, g: 0.1 * g, train, validation)
        tracker = inrun.track(model, optimizer, method, validation=losses)
        refused = pytest.raises(inrun.InRunError, match=r"net\.1.*: expected (a module that leaves )?its input")
        with (
            contextlib.nullcontext() if (method, targets) == ("first", "a") else refused,
            tracker.step(range(B)) as step,
        ):
            loss_of(model, *train).backward()
            optimizer.step()
        if (method, targets) == ("first", "a"):
            close(step.values, expected)


@pytest.mark.parametrize("method", ["first", "monte_carlo"])
def test_an_output_whose_rows_are_not_samples_is_refused(method):
    class SumsItsOutput(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(8))

        def forward(self, x):
            return (x + self.shift).square().mean()

    model = SumsItsOutput()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = data("mlp")[0]
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x))
    what = r"SumsItsOutput.*every output to be \[B, ...\].*shift.*loss outside of the model"
    with pytest.raises(inrun.InRunError, match=what), tracker.step(range(B)):
        model(x).backward()
        optimizer.step()


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    def backward(ctx, grad):
        return 2 * ctx.saved_tensors[0] * grad


def raises(_):
    raise RuntimeError("its own words")


@pytest.mark.parametrize(
    ("function", "error", "words"),
    [
        (Squared.apply, inrun.InRunError, r"without forward-mode AD; exclude them \(shift\).*the jvp function"),
        (lambda x: torch.cdist(x, x, p=1.5), inrun.InRunError, r"without forward-mode AD; .* _cdist_forward"),
        (raises, RuntimeError, "^its own words$"),
    ],
)
def test_what_a_forward_mode_pass_cannot_is_said_and_other_errors_come_as_they_are(function, error, words):
    class Shift(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.zeros(8))

        def forward(self, x):
            return function(x + self.shift)

    model, x = Shift(), data("mlp")[0]
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1), validation=lambda: model.shift.sum())
    with pytest.raises(error, match=words), tracker.step(range(B)):
        model(x)


def test_nothing_of_the_size_of_per_sample_gradients_is_allocated():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    self.numel = max(self.numel, x.numel())
            return out

    model = nn.Linear(40, 30)
    x, y = torch.randn(64, 3, 40), torch.randint(30, (64, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y))
    for rows in (65, 64):  # the first step runs the model on one sample more
        with Largest() as largest, tracker.step(range(64)):
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert largest.numel <= rows * 3 * 40


def test_resuming_with_fewer_processes_drops_what_the_others_left(tmp_path, monkeypatch):
    for writers, left in (("2", [0, 1, 2]), ("1", [0])):
        with inrun.Ledger(tmp_path / writers, rank=1) as other:
            for step in range(3):
                other.append(step, [step], [1.0])
        monkeypatch.setenv("WORLD_SIZE", writers)
        tracker = inrun.track(make("mlp"), ledger=tmp_path / writers)
        tracker.ledger.resume(1)
        assert inrun.Ledger(tmp_path / writers).rows()["step"].to_pylist() == left


class Positions(nn.Module):
    """Positions that all samples share, in whatever way `use` makes of them."""

    def __init__(self, use, ids):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.position = nn.Embedding(20, 8), nn.Embedding(6, 8)
        self.norm, self.out = nn.LayerNorm(8), nn.Linear(8, 20)
        self.use, self.ids = use, ids

    def forward(self, x):
        shared = self.use(self.norm(self.position(self.ids)), len(x))
        return self.out(torch.tanh(self.token(x) + shared))


ONE, BARE = torch.arange(6)[None], torch.arange(6)


@pytest.mark.parametrize("method", ["first", "secant"])
@pytest.mark.parametrize(
    "use, ids",
    [
        (lambda p, n: p, ONE),
        (lambda p, n: p, BARE),
        (lambda p, n: (2 * p.float() + 1).sin().view(p.shape), ONE),
        (lambda p, n: p.expand(n, -1, -1), ONE),
        (lambda p, n: p.squeeze(0), ONE),
        (lambda p, n: F.dropout(p, 0.0) / p.norm(dim=-1, keepdim=True), ONE),
        (lambda p, n: torch.einsum("btd,td->btd", p, p.detach()[0] * 0 + 1), ONE),
        (lambda p, n: torch.fft.ifft(torch.fft.fft(p)).real, ONE),
    ],
)
def test_what_all_samples_share_is_scored_for_each(use, ids, method):
    model, x, validation = Positions(use, ids), *(torch.randint(20, (n, 6)) for n in (B, 4))
    before = copy.deepcopy(model)

    def loss(model, x):
        return F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())

    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss(model, validation))
    with tracker.step(range(B)) as step:
        found = loss(model, x)
        found.backward()
        optimizer.step()
    assert type(found) is torch.Tensor
    torch.testing.assert_close(found, loss(before, x))
    first, last = (dict(zip(dict(m.named_parameters()), torch.autograd.grad(loss(m, validation), m.parameters()),
                            strict=False)) for m in (before, close_and_copy(tracker, model)))  # fmt: skip
    expected = []
    for row in x:
        one = torch.autograd.grad(loss(before, row[None]) / B, before.parameters())
        along = [g if method == "first" else (g + last[n]) / 2 for n, g in first.items()]
        expected.append(0.1 * sum((d * g).sum() for d, g in zip(along, one, strict=True)).double())
    close(step.values, torch.stack(expected))


def close_and_copy(tracker, model):
    tracker.close()
    return copy.deepcopy(model)


@pytest.mark.parametrize("method", ["first", "secant"])
@pytest.mark.parametrize(
    "use, ids, named",
    [
        (lambda p, n: p[0], ONE, "getitem"),
        (lambda p, n: p.sum(0), ONE, "sum"),
        (lambda p, n: p / p.norm(), ONE, "norm"),
        (lambda p, n: p.repeat(n, 1, 1), ONE, "repeat"),
        (lambda p, n: (p * 2).flip(0), ONE, "flip"),
        (lambda p, n: p[None], BARE, "getitem"),
        (lambda p, n: p.unbind()[0], ONE, "unbind"),
        (lambda p, n: F.dropout(p, 0.5)[0], ONE, "getitem"),
        (lambda p, n: torch.fft.ifft(torch.fft.fft(p).flip(0)).real, ONE, "flip"),
    ],
)
def test_what_mixes_the_rows_of_what_samples_share_is_an_error(use, ids, named, method):
    model, x = Positions(use, ids), torch.randint(20, (B, 6))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x).square().mean())
    with pytest.raises(inrun.InRunError, match=f"norm: expected its output.*{named}"), tracker.step(range(B)):
        model(x).square().mean().backward()


def test_a_models_parameters_are_its_own():
    """Averages of weights pair them with those of a copy; so do counts."""
    model, plain = make("gpt_tied"), make("gpt_tied")
    tracker = inrun.track(model, torch.optim.AdamW(model.parameters()))
    names = [n for n, _ in plain.named_parameters()]
    assert [n for n, _ in model.named_parameters()] == names
    average = torch.optim.swa_utils.AveragedModel(model)
    average.update_parameters(model)
    pickled = io.BytesIO()
    torch.save(model, pickled)
    assert b"inrun.rules" not in pickled.getvalue()
    pickled.seek(0)
    for other in (average.module, copy.deepcopy(model), torch.load(pickled, weights_only=False)):
        assert [n for n, _ in other.named_parameters()] == names
        assert all(torch.equal(a, b) for a, b in zip(other.parameters(), plain.parameters(), strict=True))
    model.requires_grad_(True)
    assert not any(slot.sibling.requires_grad for slot in tracker.slots)
    tracker.close()
    assert [n for n, _ in model.named_parameters()] == names and "named_parameters" not in vars(model)


def test_a_module_that_takes_the_place_of_a_tracked_one_is_an_error():
    model = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer)
    run_step(tracker, model, optimizer, data("mlp"), data("mlp", 4, 2))
    model.net[0] = nn.Linear(*reversed(model.net[0].weight.shape))
    optimizer.add_param_group({"params": model.net[0].parameters()})
    with tracker.validation():
        loss_of(model, *data("mlp", 4, 2)).backward()
    with pytest.raises(inrun.InRunError, match=r"got 2 more, which would have no score: net\.0\.weight, net\.0\.bias"):
        tracker.step(range(B)).__enter__()


def by_rows(model, x, validation):
    """Values of SGD at 0.1, of losses that are means over the model's cubed, or squared, outputs."""
    params = list(model.parameters())
    along = torch.autograd.grad(model(validation.double()).square().mean(), params)
    rows = [torch.autograd.grad(model(row[None].double()).pow(3).mean() / len(x), params) for row in x]
    return torch.stack([0.1 * sum((a * b).sum() for a, b in zip(along, row, strict=True)) for row in rows])


@pytest.mark.parametrize("parametrized", ["spectral_norm", "orthogonal", "weight_norm"])
def test_a_parametrized_layer_is_scored_by_its_output(parametrized):
    """Also where its weight has as many rows as the batch."""
    torch.manual_seed(0)
    change = getattr(nn.utils.parametrizations, parametrized)
    model = nn.Sequential(change(nn.Linear(B, B)), nn.Tanh(), nn.Linear(B, 3)).eval()
    x, other = torch.randn(B, B), torch.randn(4, B)
    before = copy.deepcopy(model).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer)
    with tracker.validation():
        model(other).square().mean().backward()
    with tracker.step(range(B)) as step:
        model(x).pow(3).mean().backward()
        optimizer.step()
    close(step.values, by_rows(before, x, other))


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize(
    ("change", "checkpointed"),
    [
        *((change, False) for change in ("spectral_norm", "weight_norm", "prune")),
        *(("parametrizations.spectral_norm", checkpointed) for checkpointed in (False, True)),
    ],
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_a_hook_makes_are_scored_as_they_were_in_the_forward(change, checkpointed, method):
    """Of torch's older norms, and of pruning; and of what writes where nothing takes a gradient, in training mode."""

    def made():
        torch.manual_seed(0)
        layers = nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)
        for layer in layers:
            if change == "prune":
                nn.utils.prune.l1_unstructured(layer, "weight", 0.5)
            elif isinstance(layer, nn.Linear):
                operator.attrgetter(change)(nn.utils)(layer)
        model = nn.Sequential(*layers).double()
        layers[1].eval()
        return model

    model, plain, x = made(), made(), torch.randn(B, 4).double()
    plain(x)  # which takes a step of the power iteration
    plain.eval()
    params = list(plain.parameters())
    ones = [torch.autograd.grad(plain(each).pow(3).mean() / B, params) for each in x.split(1)]
    along = torch.autograd.grad(plain(x).square().mean(), params)
    want = torch.stack([0.1 * sum((a * b).sum() for a, b in zip(along, one, strict=True)) for one in ones])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method)
    with tracker.validation():
        model(x).square().mean().backward()
    model.load_state_dict({**model.state_dict(), **dict(made().named_buffers())})
    with tracker.step(range(B)) as step:
        (checkpoint(model, x, use_reentrant=False) if checkpointed else model(x)).pow(3).mean().backward()
        optimizer.step()
    close(step.values, want)


def test_a_validation_gradient_takes_no_operation_more_for_each_parameter():
    """But the norms', which are found together."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Products(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func.overloadpacket is torch.ops.aten.mul
            return func(*args, **(kwargs or {}))

    def products(layers):
        model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(layers)))
        tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with Products() as counted, tracker.validation():
            model(torch.ones(2, 4)).sum().backward()
        return counted.count

    assert products(5) == products(1)


def test_a_weight_that_a_hook_makes_may_be_made_again_before_the_backward():
    """A later forward's power iteration writes what this one's weight was made of."""
    model = nn.Sequential(nn.utils.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(2 * B, 4)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).square().mean())
    with tracker.step() as step:
        losses = []
        for rows in (range(B), range(B, 2 * B)):
            step.batch(rows)
            losses.append(model(x[list(rows)]).pow(3).mean())
        sum(losses).backward()
        optimizer.step()
    assert step.values.isfinite().all() and step.values.any()


def test_a_weight_that_a_hook_inside_makes_is_the_forwards_own_after_it():
    """For a penalty on it, say, which needs the graph of this forward."""

    def train(tracked):
        torch.manual_seed(0)
        inner, x = nn.utils.spectral_norm(nn.Linear(4, 5)), torch.randn(B, 4)
        model = nn.Sequential(nn.Sequential(inner, nn.Tanh()), nn.Linear(5, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = tracked and inrun.track(model, optimizer, through={"0.*": "0"}, check=False)
        for _ in range(2):
            with tracker.validation() if tracker else contextlib.nullcontext():
                model(x).square().mean().backward()
            optimizer.zero_grad()
            with tracker.step(range(B)) if tracker else contextlib.nullcontext():
                (model(x).pow(3).mean() + inner.weight.square().mean()).backward()
                optimizer.step()
                optimizer.zero_grad()
        return model.state_dict()

    for found, expected in zip(train(True).values(), train(False).values(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("method", ["first", "second", "path", "monte_carlo"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_the_older_weight_norm_has_the_values_of_the_newer(method):
    """Also where each sample's own gradient is asked for, as in Adam's first step."""

    def values(norm):
        torch.manual_seed(0)
        model, x = nn.Sequential(norm(nn.Linear(4, 5)), nn.Tanh(), norm(nn.Linear(5, 3))), torch.randn(B, 4)
        make = torch.optim.SGD if method == "second" else torch.optim.AdamW
        optimizer = make(model.parameters(), lr=0.01)
        tracker = inrun.track(model, optimizer, method, validation=lambda: model(x[:4]).square().mean())
        with tracker.step(range(B)) as step:
            model(x).pow(3).mean().backward()
            optimizer.step()
        return step.values.double()

    close(values(nn.utils.weight_norm), values(nn.utils.parametrizations.weight_norm))


def test_bad_input_that_came_late_is_clear_at_once(tmp_path):
    model = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="keep: expected 'device' or 'host', got 'disk'"):
        inrun.track(model, optimizer, keep="disk")
    complex_one = nn.Linear(3, 2, dtype=torch.complex64)
    with pytest.raises(inrun.InRunError, match=r"weight: expected a parameter of real numbers, got torch\.complex64"):
        inrun.track(complex_one, torch.optim.SGD(complex_one.parameters(), lr=0.1))
    tracker = inrun.track(model, optimizer, ledger=tmp_path)
    run_step(tracker, model, optimizer, data("mlp"), data("mlp", 4, 2))
    tracker.close()
    with pytest.warns(UserWarning, match="ledger: its steps so far have values of method and targets .*first"):
        inrun.track(model, optimizer, "path", ledger=tmp_path).close()
    classes, held = [type(m) for m in model.modules()], list(optimizer.param_groups[0]["params"])
    with warnings.catch_warnings(), pytest.raises(UserWarning, match="ledger: its steps so far"):
        warnings.simplefilter("error")
        inrun.track(model, optimizer, "path", ledger=tmp_path)
    assert [type(m) for m in model.modules()] == classes
    assert [id(p) for p in model.parameters()] == [id(p) for p in held]
    tracker = inrun.track(model, optimizer)
    with pytest.raises(TypeError, match="ids: expected a sequence, array or tensor of integers or strings, got b'ab'"):
        tracker.step(b"ab")
    tracker.close()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"model": None}, TypeError, r"model: expected a torch\.nn\.Module, got NoneType"),
        ({"optimizer": 3}, TypeError, "optimizer: expected a torch.optim.Optimizer, or several, got int"),
        ({"optimizer": ["sgd"]}, TypeError, "optimizer: expected .* got str"),
        ({"targets": None}, ValueError, "targets: expected a sequence of distinct names, got None"),
        ({"targets": (1, 2)}, ValueError, r"targets: expected a sequence of distinct names, got \(1, 2\)"),
        ({"validation": {3: lambda: None}}, ValueError, r"targets: expected .* distinct names, got \(3,\)"),
        ({"keep_bytes": "1GB"}, ValueError, "keep_bytes: expected a number of at least 0 or None, got '1GB'"),
        ({"keep_bytes": -1}, ValueError, "keep_bytes: expected a number of at least 0 or None, got -1"),
    ],
)
def test_arguments_that_are_none_of_what_track_takes(arguments, error, message):
    model = make("mlp")
    given = {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1), **arguments}
    classes = [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        inrun.track(**given)
    assert [type(m) for m in model.modules()] == classes


def test_a_parameter_that_is_gone_when_the_optimizer_is_bound():
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    tracker = inrun.track(model)
    model[0].bias = None
    with pytest.raises(inrun.InRunError, match=r"0\.bias: expected the parameter where it was tracked, got none there"):
        tracker.bind(torch.optim.SGD(model.parameters(), lr=0.1))


@pytest.mark.parametrize("scale", [0, -1.0, torch.tensor(-2.0), torch.tensor(0.0), math.inf, math.nan, None, "2"])
def test_a_scale_that_no_loss_was_multiplied_by(scale):
    model = make("mlp")
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="scale: expected a finite number above 0"), tracker.validation(scale=scale):
        raise AssertionError
    with pytest.raises(ValueError, match="scale: expected a finite number above 0"):
        tracker.step([1], scale=scale)


def test_functions_of_the_user_that_return_nothing_are_named():
    model, (x, y), held = make("mlp"), data("mlp"), data("mlp", 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(recompute=None, **options):
        optimizer.zero_grad()
        with (
            inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *held), **options) as tracker,
            tracker.step(range(len(x)), recompute=recompute),
        ):
            loss_of(model, x, y).backward()
            optimizer.step()

    with pytest.raises(TypeError, match="recompute: expected a function that returns the batch's loss, got 3"):
        step(recompute=3)
    with pytest.raises(TypeError, match=r"recompute: expected .* got one that gave None"):
        step(recompute=lambda: None)
    with pytest.raises(inrun.InRunError, match=r"update: expected what the step adds .* shape \(.*\), got None"):
        step(update=lambda *args: None)


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_first_loss_that_is_no_number_is_said(method):
    model, (x, y), held = make("mlp"), data("mlp"), data("mlp", 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *held))
    with (
        pytest.raises(inrun.InRunError, match="the loss or its gradients: expected finite numbers, got NaN"),
        tracker.step(range(len(x))),
    ):
        (loss_of(model, x, y) * torch.nan).backward()
        optimizer.step()


@pytest.mark.parametrize("wrap", ["submodule", "compile", "ddp-like"])
def test_a_teacher_that_follows_a_module_or_wrapper_sees_weights_and_no_directions(wrap):
    """As a mean teacher's loop, or an AveragedModel, pairs parameters: by their order."""
    model = nn.ModuleDict({"student": make("mlp"), "other": nn.Linear(2, 2)})
    followed = model["student"]
    if wrap == "compile":
        followed = torch.compile(followed, backend="eager")
    elif wrap == "ddp-like":
        followed = nn.Sequential(followed)
    teacher = copy.deepcopy(followed)
    averaged = torch.optim.swa_utils.AveragedModel(followed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, exclude=["other.*"])
    assert len(list(followed.parameters())) == len(list(teacher.parameters()))
    x, y = data("mlp")
    for _ in range(2):
        with tracker.validation():
            loss_of(followed, x, y).backward()
        with tracker.step(range(B)):
            loss_of(followed, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            for theirs, ours in zip(teacher.parameters(), followed.parameters(), strict=True):
                theirs.copy_(ours)
        averaged.update_parameters(followed)
    tracker.close()
    for theirs, ours in zip(teacher.parameters(), followed.parameters(), strict=True):
        assert torch.equal(theirs, ours)
    assert averaged.module(x).shape == followed(x).shape
    assert not any("direction" in name for name, _ in averaged.named_parameters())


@pytest.mark.parametrize("bound", [True, False])
def test_directions_go_where_their_module_goes(bound):
    model = make("mlp")
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1) if bound else None)
    model.double()
    assert all(slot.sibling.dtype == torch.float64 == slot.param.dtype for slot in tracker.slots)
    assert bool(sum("direction" in name for name, _ in model.named_parameters())) != bound
    if not bound:
        tracker.bind(torch.optim.SGD(model.parameters(), lr=0.1))
    model.requires_grad_(True)
    assert not any(slot.sibling.requires_grad for slot in tracker.slots)
    assert not any("direction" in name for name, _ in model.named_parameters())
    tracker.close()
    assert not any("_siblings" in vars(m) for m in model.modules())


def test_an_excluded_sparse_embedding_trains_beside():
    model = nn.Sequential(nn.Embedding(7, 4, sparse=True), nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, exclude=["0.*"])
    ids, plain = torch.randint(7, (B, 3)), copy.deepcopy(model)
    table, *others = torch.autograd.grad(plain(ids).square().mean(), list(plain.parameters()))
    squares = [g.square().sum() for g in (table.to_dense(), *others)]
    with tracker.validation():
        model(ids).square().mean().backward()
    with tracker.step(range(B)) as step:
        model(ids).square().mean().backward()
        optimizer.step()
    assert step.values.sum() > 0 and 0 < tracker.ledger.metadata["excluded_share"] < 1
    assert tracker.ledger.metadata["excluded_share"] == pytest.approx(float(squares[0] / sum(squares)))


@pytest.mark.parametrize("method", ["first", "secant"])
def test_a_validation_gradient_that_is_far_larger_than_a_batchs_is_said(method):
    for scale, optimizer_of in ((1000.0, torch.optim.AdamW), (1.0, torch.optim.AdamW), (1000.0, torch.optim.SGD)):
        model = make("mlp")
        optimizer = optimizer_of(model.parameters(), lr=0.01)
        tracker = inrun.track(model, optimizer, method, targets=("a", "b"))
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            for _ in range(2):
                for name, times in (("a", 1.0), ("b", scale)):
                    by = 1024.0 if name == "a" else 1.0  # which is no gradient's size
                    with tracker.validation(name, scale=by):
                        (by * times * loss_of(model, *data("mlp", 4, 2))).backward()
                with tracker.step(range(B)):
                    loss_of(model, *data("mlp")).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        told = [str(each.message) for each in said if "in Adam's second moment" in str(each.message)]
        assert len(told) == (scale > 1 and optimizer_of is torch.optim.AdamW)
        assert not told or told[0].startswith("validation('b'): its gradient has")


@pytest.mark.parametrize("method", ["first", "secant"])
def test_one_that_is_far_larger_than_a_clipped_gradient_is_said_so(method):
    model = make("mlp")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    tracker = inrun.track(model, optimizer, method)
    with tracker.validation():
        loss_of(model, *data("mlp", 4, 2)).backward()
    with pytest.warns(UserWarning, match=r"the batch's as the update takes it.*where gradients are clipped, clip="):  # noqa: SIM117
        with tracker.step(range(B)):
            loss_of(model, *data("mlp")).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
            optimizer.step()


@pytest.mark.parametrize("beside", [0, 1])  # parameters that SGD has
@pytest.mark.parametrize("steps", [0, 3])
def test_one_that_is_far_smaller_is_said_while_there_are_no_old_squares(steps, beside):
    model = make("mlp")
    params = list(model.parameters())
    optimizer, other = torch.optim.AdamW(params[beside:], lr=0.01), torch.optim.SGD(params[:beside] or [torch.zeros(1)])
    for _ in range(steps):
        loss_of(model, *data("mlp")).backward()
        optimizer.step()
        optimizer.zero_grad()
    tracker = inrun.track(
        model, [optimizer, other] if beside else optimizer, validation=lambda: loss_of(model, *data("mlp", 4, 2)) / 100
    )
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        with tracker.step(range(B)):
            loss_of(model, *data("mlp")).backward()
            optimizer.step()
            other.step()
    assert ["too large in the first steps" in str(each.message) for each in said] == [True] * (steps == 0)


class LowRank(nn.Module):
    """A weight, for whoever wants it."""

    def __init__(self, rows, columns):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(rows, 2)), nn.Parameter(torch.randn(2, columns))

    def forward(self):
        return self.a @ self.b


class Made(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight, self.out = LowRank(B, 4), nn.Linear(B, 3)

    def forward(self, x):
        return self.out(torch.tanh(x @ self.weight().T))


@pytest.mark.parametrize("method", ["first", "secant"])
def test_a_module_without_an_input_is_scored_by_what_encloses_it_or_not_at_all(method):
    """Also where what it returns has as many rows as the batch."""
    x, other = torch.randn(B, 4), torch.randn(3, 4)
    model = Made()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(other).square().mean())
    with pytest.raises(inrun.InRunError, match=r"weight \(LowRank\): expected an input"), tracker.step(range(B)):
        model(x)
    tracker.close()
    before = copy.deepcopy(model).double()
    tracker = inrun.track(model, optimizer, validation=lambda: model(other).square().mean(), through={"weight.*": ""})
    with tracker.step(range(B)) as step:
        model(x).pow(3).mean().backward()
        optimizer.step()
    close(step.values, by_rows(before, x, other))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_compiled_blocks_take_what_all_samples_share(fullgraph):
    model, x = Positions(lambda p, n: p, ONE), torch.randint(20, (B, 6))
    model.norm.compile(backend="eager", fullgraph=fullgraph)
    plain = Positions(lambda p, n: p, ONE)
    values = []
    for each in (plain, model):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        tracker = inrun.track(each, optimizer, validation=lambda each=each: each(x[:2]).square().mean())
        with tracker.step(range(B)) as step:
            each(x).square().mean().backward()
            optimizer.step()
        values.append(step.values.double())
    close(values[1], values[0])


class Batch:
    """As a dataclass, which torch's trees of tensors do not open."""

    def __init__(self, x):
        self.x = x


def test_inputs_may_come_in_containers_that_torch_does_not_open():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.out = nn.Parameter(torch.ones(4)), nn.Linear(4, 2)

        def forward(self, batch):
            return self.out(batch.x.sin() * self.scale)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    batch = Batch(torch.randn(B, 4))
    tracker = inrun.track(model, optimizer, validation=lambda: model(batch).square().mean())
    with tracker.step(range(B)) as step:
        model(batch).square().mean().backward()
        optimizer.step()
    assert step.values.sum() > 0


class Normed(nn.Module):
    """A parameter of its own, and a size that no gradient passes."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.head = nn.Parameter(torch.randn(WIDTH, WIDTH)), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ self.weight
        with torch.no_grad():
            size = y.abs().mean(-1, keepdim=True)
            with torch.enable_grad():
                passed = y.mean(-1, keepdim=True)
        return self.head(y / (size + passed.exp()))


def classifying(*layers):
    """A model of these layers, its optimizer, samples to train and to validate on, and a step's values as it is."""
    torch.manual_seed(0)
    model = nn.Sequential(*(layer() for layer in layers))
    x, y = torch.randn(2, B, WIDTH), torch.randint(VOCAB, (2, B))

    def expected():
        return oracle_values(model, lambda name, g: 0.1 * g, (x[0], y[0]), (x[1], y[1]))

    return model, torch.optim.SGD(model.parameters(), lr=0.1), x, y, expected


@pytest.mark.parametrize("targets", [("one",), ("one", "two")])
@pytest.mark.parametrize("method", ["first", "path"])
def test_what_a_module_computes_without_gradients_carries_no_tangents(method, targets):
    model, optimizer, x, y, expected_now = classifying(lambda: nn.Linear(WIDTH, WIDTH), Normed)
    expected = expected_now()
    tracker = inrun.track(model, optimizer, method, targets=targets, check=False)
    for target in targets:
        with tracker.validation(target):
            loss_of(model, x[1], y[1]).backward()
    with tracker.step(range(B)) as step:
        loss_of(model, x[0], y[0]).backward()
        optimizer.step()
    for values in step.values.view(B, -1).unbind(1):
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-7)


class Gain(nn.Module):
    """One number scales all features, as in ReZero."""

    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gain


@pytest.mark.parametrize("method", ["first", "path"])
def test_one_number_that_scales_all_features_and_forwards_without_gradients_in_between(method):
    """A metric under `no_grad`, within a step, leaves the steps to come as they are."""
    model, optimizer, x, y, expected_now = classifying(lambda: nn.Linear(WIDTH, WIDTH), Gain, Normed)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x[1], y[1]))
    for _ in range(2):
        expected = expected_now()
        with tracker.step(range(B)) as step:
            loss_of(model, x[0], y[0]).backward()
            with torch.no_grad():
                model(x[0])
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(step.values.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bags", ["rows", "offsets", "last offset too"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
@pytest.mark.parametrize("method", ["first", "path"])
def test_bags_of_embeddings(method, mode, bags):
    class Bags(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            pad, last = (0 if bags == "rows" else None), bags == "last offset too"
            kind = mode if mode != "weighted" else "sum"
            self.bag = nn.EmbeddingBag(VOCAB, WIDTH, mode=kind, padding_idx=pad, include_last_offset=last)
            self.scores, self.head = nn.Parameter(torch.rand(VOCAB)), nn.Linear(WIDTH, VOCAB)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside = x > 0
            ids = x if bags == "rows" else x[inside]
            ends = F.pad(inside.sum(1).cumsum(0), (1, 0))
            offsets = {"rows": None, "offsets": ends[:-1], "last offset too": ends}[bags]
            weights = self.scores[ids] if mode == "weighted" else None
            return self.head(self.bag(ids, offsets, per_sample_weights=weights).tanh() + self.scores.sum())

    torch.manual_seed(0)
    model = Bags()
    x, y = torch.randint(1, VOCAB, (B + 4, 5)), torch.randint(VOCAB, (B + 4,))
    x[0, 2:], x[1], x[B, 4:] = 0, 0, 0  # short ones, and one of nothing
    train, validation = (x[:B], y[:B]), (x[B:], y[B:])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    expected = oracle_values(model, lambda n, g: 0.3 * g, train, validation)
    close(run_step(inrun.track(model, optimizer, method), model, optimizer, train, validation), expected)


@pytest.mark.parametrize("mode", ["sum", "mean", "max", "weighted"])
@pytest.mark.parametrize("of_nothing", [False, True])
def test_bags_of_embeddings_leave_out_what_they_do_not_hold(mode, of_nothing):
    """Rows of padding and of other bags, whatever they are; and every bag may be of nothing."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.EmbeddingBag(VOCAB, WIDTH, mode="sum" if mode == "weighted" else mode, padding_idx=0))
    model[0].padding_idx = -VOCAB  # as a function may be given it
    with torch.no_grad():
        model[0].weight[0] = torch.nan
    ids, offsets = torch.tensor([0, 3, 4, 2, 0, 1]), torch.tensor([0, 2, 2])
    if of_nothing:
        ids, offsets = ids[:0], offsets * 0
    weights = None
    if mode == "weighted":
        weights = torch.where(ids == 0, torch.inf, torch.arange(len(ids)) + 1.0)

    optimizer, found = torch.optim.SGD(model.parameters(), lr=0.3), []
    tracker = inrun.track(model, optimizer)
    with tracker.validation():
        model[0](torch.tensor([[3, 2], [4, 1]])).square().mean().backward()
    for scored in (tracker.paused(), tracker.step(range(3))):
        with scored as step:
            out = model[0](ids, offsets, per_sample_weights=weights)
            out.square().mean().backward()
            found.append((out.detach(), model[0].weight.grad.clone()))
            if step is not None:
                optimizer.step()
            optimizer.zero_grad()
    assert step.values.isfinite().all() and step.values.any() != of_nothing
    for plain, with_values in zip(*found, strict=True):
        torch.testing.assert_close(with_values, plain)


@pytest.mark.parametrize("option", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}, {"sparse": True}])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_whose_gradient_is_another_are_refused(kind, option):
    model = nn.Sequential(kind(VOCAB, WIDTH, **option), nn.Linear(WIDTH, VOCAB))
    ((name, value),) = option.items()
    with pytest.raises(inrun.InRunError, match=rf"0.weight: expected an {kind.__name__} with {name}=.*got {value}"):
        inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1))


def test_packed_sequences_are_refused_whatever_their_width():
    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.head = nn.LSTM(WIDTH, B), nn.Linear(B, VOCAB)  # as many features as samples

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([1, 2, 3, 3, 2]), enforce_sorted=False)
            return self.head(nn.utils.rnn.pad_packed_sequence(self.rnn(packed)[0])[0].sum(0))

    torch.manual_seed(0)
    model, x, y = Tagger(), torch.randn(3, B, WIDTH), torch.randint(VOCAB, (B,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y))
    with pytest.raises(inrun.InRunError, match=r"Pad sequences in place of packing"), tracker.step(range(B)):
        loss_of(model, x, y)


class Positioned(nn.Module):
    """As vision transformers are: a table of positions at the root, and blocks that may be checkpointed."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        self.reentrant, self.pos = reentrant, nn.Parameter(torch.randn(1, 3, WIDTH))
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Dropout(0.2), nn.BatchNorm1d(3).eval())
            for _ in range(2)
        )
        self.head = nn.Linear(WIDTH, VOCAB)
        self.register_buffer("forwards", torch.zeros(()))
        self.register_buffer("again", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.forwards += 1
        self.again = self.again + 1
        x = x + self.pos
        for block in self.blocks:
            run = block if self.reentrant is None else lambda x, b=block: checkpoint(b, x, use_reentrant=self.reentrant)
            x = x + run(x)
        return self.head(x.mean(1))


@pytest.mark.parametrize("targets", [("one",), ("one", "two")])
@pytest.mark.parametrize("method", ["first", "path"])
def test_checkpoints_inside_of_what_is_scored_by_forward_mode_change_nothing(method, targets):
    found = {}
    for reentrant in (None, False, True):
        torch.manual_seed(0)
        model = Positioned(reentrant)
        x, y = torch.randn(2, B, 3, WIDTH), torch.randint(VOCAB, (2, B))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = inrun.track(model, optimizer, method, targets=targets)
        values = []
        for _ in range(2):
            for target in targets:
                with tracker.validation(target):
                    loss_of(model, x[1], y[1]).backward()
            with tracker.step(range(B)) as step:
                loss_of(model, x[0], y[0]).backward()
                optimizer.step()
                optimizer.zero_grad()
            values.append(step.values)
        found[reentrant] = (torch.stack(values), dict(model.state_dict()))
    assert found[None][0].abs().min() > 0
    for reentrant in (False, True):
        torch.testing.assert_close(found[reentrant], found[None])


def test_an_input_that_is_changed_before_a_checkpoint_inside_is_refused():
    class Adds(Positioned):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += 1
            return super().forward(x)

    model, x = Adds(False), torch.randn(B, 3, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x.clone()).square().mean())
    with pytest.raises(inrun.InRunError, match="leaves its input as it is"), tracker.step(range(B)):
        model(x)


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_checkpoint_around_a_checkpoint(method):
    values = []
    for outer in (False, True):
        torch.manual_seed(0)
        inner = Positioned(False if outer else None)
        run = (lambda x, m=inner: checkpoint(m, x, use_reentrant=False)) if outer else inner
        x, y = torch.randn(2, B, 3, WIDTH), torch.randint(VOCAB, (2, B))
        optimizer = torch.optim.SGD(inner.parameters(), lr=0.1)
        tracker = inrun.track(inner, optimizer, method, validation=lambda f=run, x=x, y=y: loss_of(f, x[1], y[1]))
        with tracker.step(range(B)) as step:
            loss_of(run, x[0], y[0]).backward()
            optimizer.step()
        values.append(step.values)
    torch.testing.assert_close(*values)


def test_a_module_that_has_an_attribute_of_any_name_is_left_alone():
    class Anything(nn.Identity):
        def __getattr__(self, name):
            if name.startswith("_"):
                raise AttributeError(name)
            return torch.ones(2)

    model = nn.Sequential(nn.Linear(8, 8), Anything())
    before = dict(vars(model[1]))
    inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1)).close()
    assert vars(model[1]) == before


def test_what_is_drawn_before_a_checkpoint_inside_is_drawn_once():
    class Drops(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.inner = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

        def forward(self, x):
            return checkpoint(self.inner, F.dropout(x * self.scale), use_reentrant=False)

    losses, x = [], torch.randn(3, 8)
    for tracked in (False, True):
        torch.manual_seed(0)
        model = Drops()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = tracked and inrun.track(model, optimizer, validation=lambda m=model: m(x).square().mean())
        torch.manual_seed(1)
        with tracker.step(range(3)) if tracker else contextlib.nullcontext():
            losses.append(model(x).square().mean())
            losses[-1].backward()
            optimizer.step()
    torch.testing.assert_close(*losses)


def test_a_checkpoint_around_a_forward_mode_pass_has_the_gradients_that_it_has_untracked():
    gradients, x = [], torch.randn(3, 8)
    for tracked in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.PReLU(8))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = tracked and inrun.track(model, optimizer, validation=lambda m=model: m(x).square().mean())
        with tracker.step(range(3)) if tracker else contextlib.nullcontext():
            checkpoint(model, x, use_reentrant=False).square().mean().backward()
            optimizer.step()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_a_checkpoint_that_comes_later_is_said():
    model, x = Positioned(None), torch.randn(B, 3, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).square().mean())
    with tracker.step(range(B)):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.reentrant = False
    with pytest.raises(inrun.InRunError, match="expected checkpoints inside of it from the first step"):
        tracker.step(range(B)).__enter__()
        model(x)


class Differentiates(nn.Module):
    """Energies, and forces from them."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = (x @ self.weight).tanh().sum()
            return torch.autograd.grad(energy, x, create_graph=True)[0]


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_module_that_differentiates_within(method):
    model, optimizer, x, y, expected_now = classifying(Differentiates, lambda: nn.Linear(WIDTH, VOCAB))
    expected = expected_now()
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x[1], y[1]))
    with tracker.step(range(B)) as step:
        loss_of(model, x[0], y[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
        with tracker.paused():
            loss_of(model, x[1], y[1]).backward()  # no part of the step
    torch.testing.assert_close(step.values.double(), expected, rtol=1e-4, atol=1e-7)


class Forces(Differentiates):
    """As of models that leave it to their caller that gradients are on."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.detach().requires_grad_()
        return torch.autograd.grad((x @ self.weight).tanh().sum(), x, create_graph=True)[0]


@pytest.mark.parametrize("targets", [("one",), ("one", "two")])
@pytest.mark.parametrize("method", ["first", "path"])
def test_a_module_that_differentiates_where_gradients_are_on(method, targets):
    model, optimizer, x, y, expected_now = classifying(Forces, lambda: nn.Linear(WIDTH, VOCAB))
    expected = expected_now()
    tracker = inrun.track(model, optimizer, method, targets=targets)
    for target in targets:
        with tracker.validation(target):
            loss_of(model, x[1], y[1]).backward()
    with tracker.step(range(B)) as step:
        loss_of(model, x[0], y[0]).backward()
        optimizer.step()
        optimizer.zero_grad()
    for values in step.values.view(B, -1).unbind(1):
        torch.testing.assert_close(values.double(), expected, rtol=1e-4, atol=1e-7)


class Repeated(nn.Module):
    """One layer so many times."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.a, self.b, self.times = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), times

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.a(x).tanh()
        for _ in range(self.times):
            x = self.b(x).tanh()
        return x


def penalised(loss, params):
    gradients = torch.autograd.grad(loss, params, create_graph=True)
    return loss + 0.1 * sum(g.square().sum() for g in gradients)


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("kind", ["graph", "penalty"])
def test_gradients_and_scores_of_a_backward_that_makes_a_graph(kind, times, check):
    model, _, x, y, _ = classifying(lambda: Repeated(times), lambda: nn.Linear(WIDTH, VOCAB))
    model, x = model.double(), x.double()
    plain = copy.deepcopy(model)
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=0.1) for m in (model, plain))
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x[1], y[1]), check=check)

    def backward(m):
        loss = loss_of(m, x[0], y[0])
        if kind == "graph":
            loss.backward(create_graph=True)
        else:
            penalised(loss, list(m.parameters())).backward()

    for _ in range(3):
        params = list(plain.parameters())
        held = torch.autograd.grad(loss_of(plain, x[1], y[1]), params)
        backward(plain)
        grads = [p.grad.detach().clone() for p in params]
        expected = 0.1 * sum((g * d).sum() for g, d in zip(grads, held, strict=True))
        if kind == "graph":
            each = [loss_of(plain, x[0, z : z + 1], y[0, z : z + 1]) / B for z in range(B)]
            rows = [torch.autograd.grad(loss, params) for loss in each]
            expected = torch.stack([0.1 * sum((g * d).sum() for g, d in zip(r, held, strict=True)) for r in rows])
        other.step()
        other.zero_grad()
        with tracker.step(range(B)) as step:
            backward(model)
            for p, g in zip(model.parameters(), grads, strict=True):
                torch.testing.assert_close(p.grad.detach(), g, rtol=1e-9, atol=1e-12)
            optimizer.step()
            optimizer.zero_grad()
        found = step.values.double() if kind == "graph" else step.values.double().sum()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["path", "path_secant", "monte_carlo", "first"])
def test_a_gradient_penalty_is_refused_in_its_step_where_scores_would_miss_it(method):
    """However small, and however late it begins; gradients that are only looked at, or multiplied, are none."""
    inner = (lambda: Differentiates()) if method == "first" else (lambda: Repeated(1))  # one without a rule
    model, optimizer, x, y, _ = classifying(inner, lambda: nn.Linear(WIDTH, VOCAB))
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x[1], y[1]))
    params = list(model.parameters())

    def step(backward):
        with tracker.step(range(B)) as step:
            backward(loss_of(model, x[0], y[0]))
            optimizer.step()
            optimizer.zero_grad()
        return step.values

    def logged(loss):
        torch.autograd.grad(loss, params, create_graph=True)
        loss.backward()

    def hessian(loss):
        loss.backward(create_graph=True)
        torch.autograd.grad(sum(p.grad.square().sum() for p in params), params)

    values = [step(backward) for backward in (torch.Tensor.backward, logged, hessian)]
    assert all(v.isfinite().all() and v.any() for v in values)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(inrun.InRunError, match="got one of their gradients too"):
        step(lambda loss: (loss + 1e-3 * (penalised(loss, params) - loss)).backward())
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, before[name])


class Ruleless(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x * self.weight).tanh().cumsum(-1)


def along_input(model, x, way):
    """Each sample's loss, of the model's outputs and of how they move with its inputs: a target, or a term."""
    if way.startswith("func"):
        with torch.no_grad() if way == "func, no gradients" else contextlib.nullcontext():
            out, moves = torch.func.jvp(model, (x,), (x.cos(),))
    else:
        with forward_ad.dual_level():
            out, moves = forward_ad.unpack_dual(model(forward_ad.make_dual(x, x.cos())))
    out = model(x) if way == "func, no gradients" else out
    if way == "term":
        return out.square().sum(1) + 1e-3 * moves.square().sum(1)
    return (out - moves.detach()).square().sum(1)


@pytest.mark.parametrize("way", ["func", "func, no gradients", "target", "term"])
@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("kind", [lambda: nn.Linear(WIDTH, WIDTH), Ruleless])
def test_a_loss_with_derivatives_along_inputs(kind, method, way):
    """Scored, or refused in its step, however small its part of the gradient."""
    model, _, x, _, _ = classifying(lambda: nn.Linear(WIDTH, WIDTH), nn.Tanh, kind)
    model, x = model.double(), x.double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def gradient_of(rows):
        return torch.autograd.grad(along_input(model, rows, way).sum() / B, [*model.parameters()])

    held = gradient_of(x[1])
    each = [gradient_of(x[0, z : z + 1]) for z in range(B)]
    expected = [0.1 * sum((g * d).sum() for g, d in zip(one, held, strict=True)) for one in each]
    tracker = inrun.track(model, optimizer, method)
    with tracker.validation():
        along_input(model, x[1], way).mean().backward()

    def step():
        with tracker.step(range(B)) as step:
            along_input(model, x[0], way).mean().backward()
            optimizer.step()
        return step.values

    has_rule = kind is not Ruleless
    if way == "func, no gradients" or (has_rule if method == "first" else way == "target"):
        torch.testing.assert_close(step().double(), torch.stack(expected), rtol=1e-5, atol=1e-9)
        return
    without = (
        "outside of forward-mode AD" if method == "first" else {"func": "a plain call", "term": "gradients too"}[way]
    )
    with pytest.raises(inrun.InRunError, match=without):
        step()


class Field(nn.Module):
    """The gradient of a net, by a transform of `torch.func`."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 1, bias=False))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.way == "grad":
            return torch.func.grad(lambda x: self.net(x).sum())(x)
        if self.way == "mapped":
            return torch.vmap(torch.func.jacrev(lambda one: self.net(one[None])[0, 0]))(x)
        if self.way == "forward":
            return torch.vmap(torch.func.jacfwd(lambda one: self.net(one[None])[0, 0]))(x)
        params = dict(self.net.named_parameters())
        loss = lambda p: torch.func.functional_call(self.net, p, (x,)).square().mean()  # noqa: E731
        step = torch.func.grad(loss)(params)
        return torch.func.functional_call(self.net, {n: p - 0.1 * step[n] for n, p in params.items()}, (x,))


@pytest.mark.parametrize("way", ["grad", "mapped", "forward", "of parameters"])
@pytest.mark.parametrize("method", ["first", "path"])
def test_layers_within_transforms_of_torch_func_are_refused(method, way):
    """A module around them takes them along, where its rows are the samples."""
    model, optimizer, x, y, expected_now = classifying(lambda: Field(way), lambda: nn.LazyLinear(VOCAB))
    model(x[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def step(through=None):
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x[1], y[1]), through=through)
        with tracker, tracker.step(range(B)) as step:
            loss_of(model, x[0], y[0]).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step.values.double()

    with pytest.raises(inrun.InRunError, match=r"torch\.vmap" if way in ("mapped", "forward") else r"torch\.func"):
        step()
    optimizer.zero_grad()
    if way in ("grad", "mapped"):
        expected = expected_now()
        torch.testing.assert_close(step({"0.*": "0"}), expected, rtol=1e-4, atol=1e-7)


def test_what_the_ledger_would_refuse_is_said_before_the_update(tmp_path):
    torch.manual_seed(0)
    model, x, y = nn.Linear(WIDTH, VOCAB), torch.randn(2, WIDTH), torch.randint(VOCAB, (2,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):  # the second time without resume()
        tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y), ledger=tmp_path)
        before = copy.deepcopy(model.state_dict())
        for ids, error in (([1, 2], None), (["a", "b"], "expected ids of type int64"), ([1 << 63, 2], "64 bits")):
            held = tracker.ledger.last_step is not None and tracker.steps == 0
            refused = pytest.raises((inrun.InRunError, ValueError), match="holds steps up to 0" if held else error)
            with refused if held or error else contextlib.nullcontext(), tracker.step(ids):
                loss_of(model, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
        if tracker.steps == 0:
            torch.testing.assert_close(dict(model.state_dict()), dict(before), rtol=0, atol=0)
        tracker.close()


def in_loop(method="first", groups=1, optimizer=torch.optim.SGD, **options):
    """A model, its optimizer of so many groups, a tracker, and what takes a step."""
    model, (x, y), validation = make("gpt_tied"), data("gpt"), data("gpt", 4, 2)
    params = list(model.parameters())
    optimizer = optimizer([{"params": params[k::groups]} for k in range(groups)], lr=0.1)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *validation), **options)

    def take_step(before_update=lambda: None):
        with tracker.step(range(B)) as step:
            loss_of(model, x, y).backward()
            before_update()
            optimizer.step()
            optimizer.zero_grad()
        return step

    return model, optimizer, tracker, take_step


@pytest.mark.parametrize("method", ["first", "path"])
def test_groups_may_change_between_steps(method):
    """A parameter gets another rate than its group, by a group of its own; one is taken out; groups are put in one."""
    model, optimizer, tracker, take_step = in_loop(method, groups=2)
    take_step()
    moved = optimizer.param_groups[1]["params"].pop(0)
    optimizer.add_param_group({"params": [moved], "lr": 0.7})
    (x, y), validation = data("gpt"), data("gpt", 4, 2)
    name = next(n for n, p in model.named_parameters() if p is moved)
    expected = oracle_values(model, lambda n, g: (0.7 if n == name else 0.1) * g, (x, y), validation)
    close(take_step().values, expected)
    first, *others = optimizer.param_groups
    first["params"] += [p for group in others for p in group["params"]]
    del optimizer.param_groups[1:]
    expected = oracle_values(model, lambda n, g: 0.1 * g, (x, y), validation)
    close(take_step().values, expected)
    first["params"] = [p for p in first["params"] if p is not moved]
    with pytest.raises(inrun.InRunError, match=rf"1 are not any more: {re.escape(name)}\. .* track again"):
        take_step()
    moved.requires_grad_(False)
    take_step()
    assert tracker.steps == 4


def test_parameters_that_others_took_the_place_of_are_named():
    model, _, _, take_step = in_loop()
    take_step()
    model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True)
    with pytest.raises(inrun.InRunError, match=r"are not any more: tokens\.weight.*load_state_dict\(assign=True\)"):
        take_step()
    model, _, _, take_step = in_loop()
    take_step()
    torch.nn.utils.parametrizations.weight_norm(model.blocks[0].up)
    with pytest.raises(inrun.InRunError, match=r"1 are not any more: blocks\.0\.up\.weight.*a parametrization"):
        take_step()
    model, _, _, take_step = in_loop()
    take_step()
    other = nn.LayerNorm(model.norm.normalized_shape)
    other.weight, other.bias = model.norm.weight, model.norm.bias
    model.norm = other
    with pytest.raises(inrun.InRunError, match=r"2 are not any more: norm\.weight, norm\.bias.*that was exchanged"):
        take_step()


@pytest.mark.parametrize("change", [{"momentum": 0.5}, {"dampening": 0.9}, {"nesterov": False}])
def test_options_that_the_scores_are_made_with_are_set_before_the_block(change):
    """Without Nesterov's, momentum counts for the steps to come."""
    for nesterov in (False, True):
        model, optimizer, tracker, take_step = in_loop(
            optimizer=functools.partial(torch.optim.SGD, momentum=0.9, nesterov=nesterov), groups=2
        )
        take_step()
        before = [p.detach().clone() for p in model.parameters()]
        told = pytest.raises(inrun.InRunError, match=r"the options the step began with, .*'momentum': .* before the")
        with told if nesterov or "dampening" in change else contextlib.nullcontext():
            take_step(lambda group=optimizer.param_groups[1]: group.update(change))
        if nesterov:
            assert all(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
        optimizer.zero_grad()
        take_step()
    assert tracker.steps == 2


@pytest.mark.parametrize("change", [{"betas": (0.5, 0.999)}, {"eps": 1e-2}, {"amsgrad": True}, {"maximize": True}])
def test_and_so_are_those_of_adam(change):
    _, optimizer, _, take_step = in_loop(optimizer=torch.optim.Adam, groups=2)
    take_step()
    with pytest.raises(inrun.InRunError, match="expected the options the step began with"):
        take_step(lambda: optimizer.param_groups[1].update(change))


@pytest.mark.parametrize("block", [False, True])
def test_a_backward_that_is_not_scored_is_no_forgotten_gradient(block):
    model, (x, y), validation = make("gpt_tied"), data("gpt"), data("gpt", 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = {} if block else {"validation": lambda: loss_of(model, *validation)}
    tracker = inrun.track(model, optimizer, check=False, **losses)

    def take_step(clear=True):
        if block:
            with tracker.validation():
                loss_of(model, *validation).backward()
        with tracker.step(range(B)):
            with tracker.paused():
                sum(p.square().sum() for p in model.parameters()).backward()
            loss_of(model, x, y).backward()
            optimizer.step()
            if clear:
                optimizer.zero_grad()

    for clear in (True, True, False):
        take_step(clear)
    with pytest.raises(inrun.InRunError, match="an earlier step"):
        take_step()


def test_a_step_that_fails_after_its_update_is_counted():
    model, _, tracker, take_step = in_loop()
    take_step()
    with pytest.raises(ZeroDivisionError), tracker.step(range(B)):
        loss_of(model, *data("gpt")).backward()
        tracker.optimizers[0].step()
        1 / 0  # noqa: B018
    model.zero_grad()
    assert tracker.steps == 2
    assert take_step().number == 2
    assert tracker.ledger.rows()["step"].unique().to_pylist() == [0, 2]
    with pytest.raises(ZeroDivisionError), tracker.step(range(B)):
        1 / 0  # noqa: B018
    assert tracker.steps == 3


def test_a_tracker_is_not_closed_within_a_step():
    _, _, tracker, take_step = in_loop()
    with pytest.raises(inrun.InRunError, match="close: expected outside of a step block"):
        take_step(tracker.close)
    tracker.close()
    assert len(tracker.ledger) == 0


@pytest.mark.parametrize("change", [lambda g: g.zero_(), lambda g: g.mul_(0.5), lambda g: g.copy_(2 * g)])
def test_a_gradient_that_is_changed_alone_is_told_of_by_the_next_step(change):
    """Of any parameter, though some are watched alone."""
    names, later = [n for n, _ in make("gpt_tied").named_parameters()], 0
    for name in names:
        model, _, tracker, take_step = in_loop(check=False)
        take_step(lambda model=model: nn.utils.clip_grad_norm_(model.parameters(), 0.1))
        gradient_of = functools.partial(getattr, model.get_parameter(name), "grad")
        told = pytest.raises(inrun.InRunError, match="some of them and not others")
        if name in tracker._watch._watched or name in [s.name for s in tracker._watch._first.values()]:
            with told:
                take_step(lambda of=gradient_of: change(of()))
        else:
            later += 1
            take_step(lambda of=gradient_of: change(of()))
            with told:
                take_step(lambda of=gradient_of: change(of()))
    assert 0 < later < len(names)


class Twice(nn.Module):
    """Its second output has other rows than there are samples, and is not used."""

    def __init__(self):
        super().__init__()
        self.inner, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x):
        self.seen = weakref.ref(h := self.inner(x))
        return h @ self.weight, 2 * self.weight[:3]


@pytest.mark.parametrize("method", ["first", "path"])
def test_no_activations_outlive_a_step(method):
    """Nor those that its scores were made of, where the loop still holds its loss."""
    torch.manual_seed(0)
    twice, head, x = Twice(), nn.Linear(8, 1), torch.randn(B, 8)
    model = nn.Sequential()
    model.twice, model.head = twice, head
    model.forward = lambda x: head(twice(x)[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x[:2]).square().mean())
    for _ in range(2):
        with tracker.step(range(B)):
            loss = model(x).square().mean()
            seen = twice.seen
            loss.backward()
            kept = [weakref.ref(k.grads[0]) for k in tracker._method.keeper.kept] if method == "path" else []
            optimizer.step()
            optimizer.zero_grad()
        gc.collect()
        assert bool(kept) == (method == "path") and all(ref() is None for ref in kept)
        del loss
        gc.collect()
        assert seen() is None


def test_validation_gradients_are_no_memory_of_a_captured_graph(monkeypatch):
    """Whose next run writes over what its last one made; torch's module is there once something was captured."""
    name = "torch._inductor.cudagraph_trees"
    for captured in (False, True):
        model, held, made = make("gpt_tied"), data("gpt", 4, 2), []
        if captured:
            monkeypatch.setitem(sys.modules, name, SimpleNamespace())
        else:
            monkeypatch.delitem(sys.modules, name, raising=False)
        tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1))
        with tracker.validation():
            loss_of(model, *held).backward()
            made = [p.grad.data_ptr() for p in model.parameters()]
        kept = [g.data_ptr() for g in tracker.validations.gradients["validation"]]
        assert set(kept).isdisjoint(made) == captured
        tracker.close()


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_norm_of_half_precision_takes_inputs_in_float32(method):
    def values(dtype):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCAB))
        model[1].weight.data.copy_(torch.rand(WIDTH).bfloat16())
        model[1].to(dtype)
        optimizer = torch.optim.SGD([model[1].weight], lr=1.0)
        tracker = inrun.track(model, optimizer, method, exclude=["0.*", "2.*"])
        x, y = torch.randn(2, 4, WIDTH), torch.randint(VOCAB, (2, 4))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch has no kernel for both at once
            with tracker.validation():
                F.cross_entropy(model(x[0]), y[0]).backward()
            with tracker.step(range(4)) as step:
                F.cross_entropy(model(x[1]), y[1]).backward()
                optimizer.step()
        return step.values

    close(values(torch.bfloat16), values(torch.float32).double(), rtol=2e-2)


def test_a_norm_of_half_precision_rounds_as_it_does_itself():
    class OffsetNorm(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(0.003 * torch.randn(WIDTH))

        def forward(self, x):
            return (F.rms_norm(x.float(), (WIDTH,)) * (1 + self.weight.float())).type_as(x)

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), OffsetNorm(), nn.Linear(WIDTH, VOCAB)).bfloat16()
    optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(4, WIDTH).bfloat16()
    expected = model(x)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).float().square().mean())
    assert isinstance(model[1], AffineRule)
    with tracker.step(range(4)):
        found = model(x)
        found.float().square().mean().backward()
        optimizer.step()
    assert torch.equal(found, expected)


class WithScale:
    """A model, and beside it what a criterion trains with it."""

    def __init__(self):
        torch.manual_seed(0)
        self.model, self.scale = nn.Linear(4, 3), nn.Parameter(torch.zeros(()))
        self.optimizer = torch.optim.SGD([*self.model.parameters(), self.scale], lr=0.1)
        self.x, self.y = torch.randn(2, B, 4), torch.randint(3, (2, B))

    def loss(self, i=0):
        return F.cross_entropy(self.model(self.x[i]) * self.scale.exp(), self.y[i])

    def train(self):
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def track(self, *args, **kwargs):
        with pytest.warns(UserWarning, match=r"has 1 parameters that the model has not, of shapes \(\)") as warned:
            tracker = inrun.track(self.model, self.optimizer, *args, **kwargs)
        assert warned[0].filename == __file__
        return tracker


@pytest.mark.parametrize(
    "method, blocks",
    [("first", False), ("first", True), ("path_secant", False), ("path_secant", True), ("second", False)],
)
def test_what_an_optimizer_has_beside_the_model_trains_as_ever(method, blocks):
    plain, found = WithScale(), WithScale()
    tracker = found.track(method, validation=None if blocks else lambda: found.loss(1))
    for _ in range(3):
        plain.train()
        if blocks:
            with tracker.validation():
                found.loss(1).backward()
        with tracker.step(range(B)):
            found.train()
    assert torch.equal(found.scale, plain.scale) and plain.scale != 0
    assert torch.equal(found.model.weight, plain.model.weight)


@pytest.mark.parametrize("method", ["path", "secant"])
def test_a_batch_that_is_computed_again_leaves_that_its_gradient(method):
    plain, found = WithScale(), WithScale()
    tracker = found.track(method, validation=lambda: found.loss(1))
    for _ in range(3):
        plain.train()
        with tracker.step(range(B), recompute=found.loss):
            found.train()
    assert torch.equal(found.scale, plain.scale)


def test_a_batch_is_computed_again_with_what_the_optimizer_had_beside_the_model():
    def values(again):
        case = WithScale()
        case.optimizer = torch.optim.Adam([*case.model.parameters(), case.scale], lr=0.1)
        tracker = case.track("path", validation=lambda: case.loss(1))
        for _ in range(2):
            with tracker.step(range(B), recompute=case.loss if again else None) as step:
                case.train()
        return step.values.double()

    close(values(True), values(False))


def test_clipping_what_an_optimizer_has_beside_the_model_as_well_is_an_error():
    case = WithScale()
    tracker = case.track("path", clip=0.05, validation=lambda: case.loss(1))
    case.loss().backward()
    assert nn.utils.get_total_norm([p.grad for p in case.model.parameters()]) > 0.05
    case.optimizer.zero_grad()
    named = r"with the excluded ones and those that are not the model's"
    with pytest.raises(inrun.InRunError, match=named), tracker.step(range(B)):
        (case.loss() + case.scale).backward()
        nn.utils.clip_grad_norm_([*case.model.parameters(), case.scale], 0.05)
        case.optimizer.step()


def test_what_an_optimizer_has_beside_the_model_is_at_both_ends_as_the_step_leaves_it():
    case = WithScale()
    tracker = case.track("path_secant", validation=lambda: case.loss(1))
    before = copy.deepcopy(case.model.state_dict())
    with tracker.step(range(B)) as step:
        case.train()
    after = case.loss(1)
    tracker.close()
    case.model.load_state_dict(before)
    torch.testing.assert_close(step.drop["validation"], (case.loss(1) - after).detach())
    torch.testing.assert_close(step.values.sum(), step.drop["validation"], rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["first", "path"])
def test_hooks_on_the_step_that_come_after_the_trackers_count(method):
    def values(scaled, late):
        model, (x, y), validation = make("mlp"), data("mlp"), data("mlp", 4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def hook(optimizer, args, kwargs):
            for p in optimizer.param_groups[0]["params"]:
                p.grad *= 0.25

        if scaled and not late:
            optimizer.register_step_pre_hook(hook)
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *validation))
        if scaled and late:
            optimizer.register_step_pre_hook(hook)
        with tracker.step(range(B)) as step:
            loss_of(model, x, y).backward()
            optimizer.step()
        return step.values.double()

    for late in (False, True):
        close(values(True, late), 0.25 * values(False, late))


class Dropping(nn.Module):
    """A layer that some of its forwards leave out."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.out, self.drop = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 3), False

    def forward(self, x):
        h = self.a(x).tanh()
        return self.out(h if self.drop else h + self.b(h).tanh())


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("dropped", [(0, 1), (1, 0)])
def test_a_layer_may_be_left_out_of_some_of_a_steps_batches(method, dropped):
    model, x, y = Dropping(), torch.randn(2, 4, 4), torch.randint(3, (2, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def gradient(x, y, drop, share=1.0):
        model.drop = bool(drop)
        params = list(model.parameters())
        found = torch.autograd.grad(share * F.cross_entropy(model(x), y), params, allow_unused=True)
        return torch.cat(
            [torch.zeros_like(p).flatten() if g is None else g.flatten() for p, g in zip(params, found, strict=True)]
        )

    along = gradient(x.flatten(0, 1), y.flatten(), 0)
    expected = [0.1 * along @ gradient(x[i, [k]], y[i, [k]], dropped[i], 1 / 8) for i in range(2) for k in range(4)]

    def validation():
        model.drop, before = False, model.drop
        loss = F.cross_entropy(model(x.flatten(0, 1)), y.flatten())
        model.drop = before
        return loss

    tracker = inrun.track(model, optimizer, method, validation=validation)
    with tracker.step() as step:
        for i, drop in enumerate(dropped):
            step.batch(range(4 * i, 4 * i + 4))
            model.drop = bool(drop)
            (F.cross_entropy(model(x[i]), y[i]) / 2).backward()
        optimizer.step()
    close(step.values, torch.stack(expected).double())


def test_a_step_without_ids_is_an_error_before_its_update():
    model, (x, y) = make("mlp"), data("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, x, y))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(inrun.InRunError, match=r"expected ids, by step\(ids\) or by batch\(ids\)"), tracker.step():
        loss_of(model, x, y).backward()
        optimizer.step()
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())


class Patches(nn.Module):
    """A class token and positions, as a vision transformer's embeddings hold them: scored by forward-mode AD."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.token, self.places = nn.Parameter(torch.randn(1, 1, 4)), nn.Parameter(torch.randn(1, 4, 4))

    def forward(self, x):
        return torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.places


def test_gradients_of_a_module_without_a_rule_have_memory_of_their_own():
    """Of one sample, plain training adds up what is another's gradient, or a part of it, in a copy."""
    model, x = nn.Sequential(Patches(), nn.Linear(4, 2)), torch.randn(3, 1, 3, 4)
    plain = copy.deepcopy(model)
    tracker = inrun.track(
        model, torch.optim.SGD(model.parameters(), lr=0.1), validation=lambda: model(x[0]).square().mean()
    )
    with tracker.step() as step:
        for i, one in enumerate(x):
            step.batch([i])
            model(one).square().mean().backward()
            plain(one).square().mean().backward()
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        tracker.optimizers[0].step()


def test_secants_direction_is_bounded_where_the_gradient_was_small():
    """In Adam's first step a coordinate is divided by its own validation gradient, which may have been next to none."""
    model = nn.Linear(2, 1, bias=False)
    model.weight.data.copy_(torch.tensor([[1e-6, 1.0]]))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    tracker = inrun.track(model, optimizer, "secant", validation=lambda: model.weight.square().sum())
    with tracker.step(range(2)) as step:
        model(torch.tensor([[-1.0, 0.5], [-0.5, 1.0]])).sum().backward()
        optimizer.step()
    assert tracker.slots[0].direction.abs().max() <= 0.01 * (1 + 1e-4)
    assert step.values.abs().max() < 0.1


def stepped(model, tracker, number=0):
    with tracker.step(range(B * number, B * number + B)) as step:
        loss_of(model, *data("mlp")).backward()
        tracker.optimizers[0].step()
        tracker.optimizers[0].zero_grad()
    return step


def validated_mlp(method="first", **options):
    model, validation = make("mlp"), data("mlp", 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    return model, inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *validation), **options)


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_a_step_that_fails_as_it_begins_has_used_its_validation_gradient(monkeypatch):
    """The directions that were written have taken the place of gradients by then."""
    model, tracker = validated_mlp(check=False)
    expected = oracle_values(model, lambda n, g: 0.3 * g, data("mlp"), data("mlp", 4, 2))
    written, write = [], inline.write_direction

    def out_of_memory(slot, gradients):
        written.append(slot)
        if len(written) == 3:
            raise torch.OutOfMemoryError
        write(slot, gradients)

    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(inline, "write_direction", out_of_memory)
        stepped(model, tracker)
    close(stepped(model, tracker).values, expected)
    assert tracker.steps == 1


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_step_whose_values_cannot_be_written_is_counted_and_has_them(method, tmp_path, monkeypatch):
    model, tracker = validated_mlp(method, ledger=inrun.Ledger(tmp_path, flush_rows=1))
    stepped(model, tracker)
    failing = tracker.step(range(B))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(shards, "write", no_space)
        with failing:
            loss_of(model, *data("mlp")).backward()
            tracker.optimizers[0].step()
            tracker.optimizers[0].zero_grad()
    assert failing.values.shape == (B,) and tracker.steps == 2
    stepped(model, tracker)
    tracker.close()
    assert inrun.Ledger(tmp_path).rows()["step"].to_pylist() == [0] * B + [1] * B + [2] * B


def test_a_second_close_writes_what_the_first_could_not(tmp_path, monkeypatch):
    model, tracker = validated_mlp(ledger=tmp_path)
    stepped(model, tracker)
    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
        patch.setattr(shards, "write", no_space)
        tracker.close()
    assert not list(tmp_path.glob("*.parquet"))
    tracker.close()
    assert len(list(tmp_path.glob("*.parquet"))) == 1


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("method", ["first", "path", "path_secant", "monte_carlo"])
def test_a_failed_step_holds_no_activations(method, recomputed, stepped):
    model, tracker = validated_mlp(method)
    loss = lambda: loss_of(model, *data("mlp"))  # noqa: E731
    again = loss if recomputed and method.startswith("path") else None
    with pytest.raises(torch.OutOfMemoryError), tracker.step(range(B), recompute=again):
        loss().backward()
        if stepped:
            tracker.optimizers[0].step()
        raise torch.OutOfMemoryError
    assert tracker.memory["kept"] == 0


def test_a_failed_step_holds_no_validation_samples_of_its_batch():
    model = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    tracker = inrun.track(model, optimizer, "path", validation="batch", pairwise=["v"])
    with pytest.raises(torch.OutOfMemoryError), tracker.step(range(B - 1)):
        loss_of(model, *data("mlp")).backward()
        raise torch.OutOfMemoryError
    assert tracker.memory["kept"] == 0


def test_a_step_that_waits_is_forgotten_where_the_loop_goes_back_before_it():
    model = make("mlp")
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.3), "secant")

    def validated():
        with tracker.validation():
            loss_of(model, *data("mlp", 4, 2)).backward()

    for number in range(3):
        validated()
        stepped(model, tracker, number)
    tracker.steps = 1
    tracker.ledger.resume(1)
    for number in (1, 2):
        validated()
        stepped(model, tracker, number)
    validated()
    assert tracker.ledger.rows()["step"].to_pylist() == [0] * B + [1] * B + [2] * B


def test_a_step_that_waits_has_values_where_the_loop_counts_on():
    """As one that counts batches which it skips."""
    model = make("mlp")
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.3), "secant")
    for number in (0, 2, 3):
        tracker.steps = number
        with tracker.validation():
            loss_of(model, *data("mlp", 4, 2)).backward()
        step = stepped(model, tracker, number)
    tracker.steps = 5
    with tracker.validation():
        loss_of(model, *data("mlp", 4, 2)).backward()
    assert step.values.shape == (B,)
    assert tracker.ledger.rows()["step"].to_pylist() == [0] * B + [2] * B + [3] * B


def test_weights_are_put_back_where_that_is_interrupted():
    moved = []

    class Slot:
        weight = torch.zeros(3)

        @property
        def shard(self):
            if moved == ["back"]:
                moved.append("again")
                raise KeyboardInterrupt
            return self.weight

    slots = [Slot(), Slot()]
    slots[1].weight = torch.zeros(3)
    with pytest.raises(KeyboardInterrupt):  # noqa: SIM117
        with weights_moved(slots, Ranks(nn.Linear(1, 1)), [(0, torch.ones(3)), (1, torch.ones(3))], {}):
            assert slots[0].weight.all() and slots[1].weight.all()
            moved.append("back")
    assert "again" in moved and not slots[0].weight.any() and not slots[1].weight.any()


def test_a_step_is_over_though_it_is_interrupted_as_its_error_is_explained(monkeypatch):
    model, tracker = validated_mlp()

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tracker._rows, "explain", interrupted)
        with tracker.step(range(B)):
            raise KeyError
    assert stepped(model, tracker).values.shape == (B,)


def test_weights_are_put_back_where_a_batch_that_was_computed_again_is_interrupted(monkeypatch):
    model, tracker = validated_mlp("path", check=False)
    plain, again, expect = copy.deepcopy(model), [], tracker.expect
    loss_of(plain, *data("mlp")).backward()
    torch.optim.SGD(plain.parameters(), lr=0.3).step()

    def expect_or_stop(layout):
        if layout is None and again:
            again.clear()
            raise KeyboardInterrupt
        expect(layout)

    def recompute():
        again.append("computed")
        return loss_of(model, *data("mlp"))

    monkeypatch.setattr(tracker, "expect", expect_or_stop)
    with pytest.raises(KeyboardInterrupt), tracker.step(range(B), recompute=recompute):
        loss_of(model, *data("mlp")).backward()
        tracker.optimizers[0].step()
    for p, q in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_a_step_whose_values_are_refused_is_counted(monkeypatch):
    model, tracker = validated_mlp()

    def late():
        raise inrun.InRunError("late")

    monkeypatch.setattr(tracker._watch, "require_in_time", late)
    with pytest.raises(inrun.InRunError, match="late"):
        stepped(model, tracker)
    assert tracker.steps == 1


def test_what_stands_in_for_others_is_put_back_where_that_is_interrupted():
    class Interrupted(dict):
        def __setitem__(self, name, value):
            super().__setitem__(name, value)
            if value is held and not calls:
                calls.append(name)
                raise KeyboardInterrupt

    held, calls = torch.zeros(()), []
    owner = SimpleNamespace(_parameters=Interrupted(a=held, b=held), _buffers={})
    with pytest.raises(KeyboardInterrupt), replaced([(owner, "a", None), (owner, "b", None)]):
        assert owner._parameters == {"a": None, "b": None}
    assert calls and owner._parameters["a"] is owner._parameters["b"] is held

    class Mode:
        def __setattr__(self, name, value):
            object.__setattr__(self, name, value)
            if value == "before" and not calls:
                calls.append(name)
                raise KeyboardInterrupt

    modes = [Mode(), Mode()]
    for each in modes:
        each.mode = "before"
    calls.clear()
    with pytest.raises(KeyboardInterrupt), setting("mode", [(each, "within") for each in modes]):
        pass
    assert [each.mode for each in modes] == ["before"] * 2
    calls.clear()

    def put_back():
        calls.append("back")
        if len(calls) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), undone(put_back):
        pass
    assert calls == ["back"] * 2


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_validation_gradient_of_several_steps_does_not_serve_one_that_failed_before_its_update(method):
    model = make("mlp")
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.3), method, validate_every=4)
    for number in range(9):
        if tracker.steps % 4 == 0:
            with tracker.validation():
                loss_of(model, *data("mlp", 4, 2)).backward()
        if number == 1:
            with pytest.raises(KeyError), tracker.step(range(B)):
                raise KeyError
        else:
            stepped(model, tracker)
    assert tracker.steps == 8


def test_a_validation_gradient_of_several_steps_does_not_serve_one_whose_ids_are_refused():
    model = make("mlp")
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.3), validate_every=2)
    with tracker.validation():
        loss_of(model, *data("mlp", 4, 2)).backward()
    stepped(model, tracker)
    with pytest.raises(inrun.InRunError), tracker.step(list("abcdefghijkl"[:B])):
        pass
    stepped(model, tracker)


def test_a_validation_gradient_of_several_steps_has_served_one_that_failed_after_its_update():
    model = make("mlp")
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.3), validate_every=2)
    with tracker.validation():
        loss_of(model, *data("mlp", 4, 2)).backward()
    with pytest.raises(KeyError), tracker.step(range(B)):
        loss_of(model, *data("mlp")).backward()
        tracker.optimizers[0].step()
        raise KeyError
    model.zero_grad()
    stepped(model, tracker)
    with pytest.raises(inrun.InRunError, match=r"has served 2 step"):
        stepped(model, tracker)


class Chosen(nn.Module):
    """Experts that are called one by one, with the tokens that the data send them."""

    def __init__(self):
        super().__init__()
        self.router, self.experts = nn.Linear(6, 3), nn.ModuleList(nn.Linear(6, 6) for _ in range(3))

    def forward(self, x):
        flat = x.flatten(0, 1)
        share, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for k, expert in enumerate(self.experts):
            at = (chosen == k).nonzero()[:, 0]
            out = out.index_add(0, at, expert(flat[at]) * share[at, None])
        return out.view_as(x)


class Scaled(nn.Module):
    """A parameter of the model's own, whose pass carries what is inside."""

    def __init__(self, table=False):
        super().__init__()
        self.scale, self.block = nn.Parameter(torch.rand(6)), nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.table = nn.Embedding(4, 6) if table else None

    def forward(self, x):
        if self.table is not None:
            x = x + self.table((x[..., 0] > 0).long())
        return self.block(x * self.scale)


def values_compiled(model, part, method, **options):
    """Values of a step, and of one whose `part` is compiled."""
    x, held = torch.randn(3, 4, 6), torch.randn(5, 4, 6)
    found = []
    for each in (copy.deepcopy(model), model):
        torch._dynamo.reset()
        optimizer = torch.optim.SGD(each.parameters(), lr=0.1)
        tracker = inrun.track(each, optimizer, method)
        if each is model:
            part(model).compile(**options)
        with tracker.validation():
            each(held).square().mean().backward()
        with tracker.step(range(3)) as step:
            each(x).square().mean().backward()
            optimizer.step()
        found.append(step.values.double())
        tracker.close()
    return found


def test_a_graph_that_ends_before_a_forward_mode_pass_captures_nothing_of_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), Chosen(), nn.Linear(6, 6))
    close(*values_compiled(model, lambda m: m[1], "first", backend="eager", dynamic=True))


@pytest.mark.parametrize("table", [False, True])
@pytest.mark.parametrize("method", ["first", "path"])
def test_compiled_modules_within_a_forward_mode_pass_run_eagerly(method, table):
    torch.manual_seed(0)
    model = nn.Sequential(Scaled(table), nn.Linear(6, 6))
    close(*values_compiled(model, lambda m: m[0].block, method, backend="aot_eager"))
    close(*values_compiled(Scaled(table), lambda m: m.table or m.block, method, backend="aot_eager"))


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_step_within_a_compiled_function(method):
    """Where a pass may come within the update."""

    torch.manual_seed(0)
    made, found, (x, held) = nn.Sequential(nn.Linear(6, 6), Scaled()), [], torch.randn(8, 6).split([3, 5])
    for compiled in (False, True):
        model = copy.deepcopy(made)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = inrun.track(model, optimizer, method)
        with tracker.validation():
            model(held).square().mean().backward()

        def step(model=model, optimizer=optimizer, tracker=tracker):
            with tracker.step(range(3)) as step:
                model(x).square().mean().backward()
                optimizer.step()
            return step

        torch._dynamo.reset()
        found.append((torch.compile(step, backend="eager") if compiled else step)().values.double())
    close(*found)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 6),
        nn.LayerNorm(6),
        nn.RMSNorm(6),
        nn.GRU(6, 6, batch_first=True),
        nn.Conv1d(4, 4, 3, padding=1),
        nn.MultiheadAttention(6, 2, batch_first=True),
    ],
)
def test_a_forward_mode_pass_in_float16_weights(layer):
    """What is inside keeps its dtype, whose products take no other."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.scale, self.layer = nn.Embedding(5, 6), nn.Parameter(torch.rand(6)), copy.deepcopy(layer)
            self.out = nn.Parameter(torch.randn(6, 6) / 3)

        def forward(self, ids):
            h = self.table(ids) * self.scale
            h = self.layer(h, h, h) if isinstance(layer, nn.MultiheadAttention) else self.layer(h)
            return (h[0] if isinstance(h, tuple) else h) @ self.out

    torch.manual_seed(0)
    half, ids, held = Half().half(), torch.randint(5, (3, 4)), torch.randint(5, (5, 4))
    values = []
    for model in (half, copy.deepcopy(half).float()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = inrun.track(model, optimizer)
        with tracker.validation():
            model(held).float().square().mean().backward()
        with tracker.step(range(3)) as step:
            model(ids).float().square().mean().backward()
            optimizer.step()
        values.append(step.values.double())
    close(*values, rtol=2e-2)


@pytest.mark.parametrize("autocast", [False, True])
def test_directions_of_a_forward_mode_pass_may_be_larger_than_float16(autocast):
    class Products(nn.Module):
        def __init__(self):
            super().__init__()
            self.near, self.far = nn.Parameter(torch.ones(6)), nn.Parameter(torch.rand(6, 6))

        def forward(self, x):
            return x.to(self.far.dtype) @ self.far + 1e-6 * self.near  # of which the first has a small direction

    torch.manual_seed(0)
    whole, x, held, values = Products().half().float(), torch.rand(3, 6).half(), torch.rand(5, 6).half(), []
    for model, within in (
        (copy.deepcopy(whole) if autocast else copy.deepcopy(whole).half(), autocast),
        (whole, False),
    ):
        tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=6e4))
        with torch.autocast("cpu", torch.float16, enabled=within):
            with tracker.validation():
                (1e3 * model(held).float().square().mean()).backward()
            with tracker.step(range(3)) as step:
                model(x).float().square().mean().backward()
                tracker.optimizers[0].step()
        values.append(step.values.double())
    close(*values, rtol=2e-2)


@pytest.mark.parametrize("method", ["first", "secant", "second", "path"])
def test_directions_of_float16_weights_have_a_range_that_they_have_not(method):
    """Times a small learning rate a gradient is below float16's least number."""

    def values(dtype):
        torch.manual_seed(0)
        model, (x, held) = nn.Linear(8, 4).half().to(dtype), torch.randn(2, 6, 8).half().to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-7)
        tracker = inrun.track(model, optimizer, method, validation=lambda: model(held).float().square().mean())
        for ids in (range(6), range(6)):
            with tracker.step(ids):
                model(x).float().square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return tracker.ledger.totals().sort_by("sample_id")["value"].to_numpy()

    found, expected = values(torch.float16), values(torch.float32)
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


@pytest.mark.parametrize("layer", [nn.LayerNorm(6), functools.partial(F.group_norm, num_groups=2)])
def test_a_forward_mode_pass_normalises_rows_that_hardly_differ_in_float16_weights(layer):
    """As of an embedding that has just begun, or of padding: torch's own derivative is no number of theirs."""

    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.shift = nn.Embedding(5, 6, padding_idx=0), nn.Parameter(torch.rand(6) / 100)
            self.layer, self.scale = copy.deepcopy(layer), nn.Parameter(torch.rand(6))

        def forward(self, ids):
            return self.layer(self.table(ids) + self.shift) * self.scale

    torch.manual_seed(0)
    half, ids, held = Half().half(), torch.randint(5, (3, 4)), torch.randint(5, (5, 4))
    half.table.weight.data *= 0.01
    ids[0] = held[0] = 0
    values = []
    for model in (half, copy.deepcopy(half).float()):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = inrun.track(model, optimizer)
        with tracker.validation():
            (model(held).float().tanh() - 0.5).square().mean().backward()
        with tracker.step(range(3)) as step:
            (model(ids).float().tanh() - 0.5).square().mean().backward()
            optimizer.step()
        values.append(step.values.double())
    close(*values, rtol=2e-2)


def test_an_output_of_a_forward_mode_pass_is_the_modules_own():
    """Of a padding row that is not 0, of norms with weights wider than their input, and without a version count."""

    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.norm = nn.Embedding(5, 6, padding_idx=0), nn.LayerNorm(6)
            self.other, self.scale = nn.Parameter(torch.randn(5, 6)), nn.Parameter(torch.rand(6))
            nn.init.normal_(self.table.weight)

        def forward(self, ids, x):
            other = F.embedding(ids, self.other, padding_idx=0).bfloat16()
            return self.norm(self.table(ids).bfloat16()) + F.layer_norm(other, (6,), self.scale) + x

    torch.manual_seed(0)
    model, ids = Mixed(), torch.arange(B * 3).view(B, 3) % 5
    with torch.inference_mode():
        x = torch.randn(B, 3, 6).bfloat16()
    expected = model(ids, x).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: model(ids, x).mean())
    with tracker.step(range(B)):
        found = model(ids, x)
        found.mean().backward()
        optimizer.step()
    torch.testing.assert_close(found, expected)


class Standardised(nn.Conv1d):
    """As subclasses of convolutions are, in the method that their forward calls."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean((1, 2), keepdim=True), bias)


def standardised(x, weight, bias):
    return F.conv1d(x, weight - weight.mean((1, 2), keepdim=True), bias)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("patched", [False, True])
def test_a_convolution_that_does_something_to_its_weight_is_what_it_is(patched, method):
    model = make("unknown")
    bias, weight = model.conv.bias, model.conv.weight
    model.conv = nn.Conv1d(3, 4, 3) if patched else Standardised(3, 4, 3)
    model.conv.weight, model.conv.bias = weight, bias
    if patched:
        model.conv._conv_forward = standardised
    train, validation = data("unknown"), data("unknown", 4, seed=2)
    expected = oracle_values(model, lambda n, g: 0.1 * g, train, validation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    close(run_step(inrun.track(model, optimizer, method), model, optimizer, train, validation), expected)


class Relative(nn.Module):
    """Calls its table and what makes a bias of it as T5 does, and has parameters of its own."""

    def __init__(self):
        super().__init__()
        self.relative_attention_bias, self.gain = nn.Embedding(9, 1), nn.Parameter(torch.rand(WIDTH))
        self.query, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def compute_bias(self, length):
        at = torch.arange(length)
        return self.relative_attention_bias((at[:, None] - at).clamp(-4, 4) + 4).permute(2, 0, 1)[None]

    def forward(self, x):
        scores = self.query(x) @ x.mT + self.compute_bias(x.shape[1])[:, 0]
        return self.head(self.gain * (scores.softmax(-1) @ x))


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("through", [{}, {"query.weight": ""}])
def test_an_attention_with_a_relative_bias_may_have_other_parameters(method, through):
    torch.manual_seed(0)
    model, (train, validation) = Relative(), (data("attention"), data("attention", 4, seed=2))
    model.gain.requires_grad_(not through)  # then it scores what is named, and no parameter of its own
    expected = oracle_values(model, lambda n, g: 0.1 * g, train, validation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method, through=through)
    close(run_step(tracker, model, optimizer, train, validation), expected)


def test_a_block_of_experts_may_begin_with_codes_of_a_quantised_weight():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.codes = nn.Parameter(torch.zeros(4, 4, dtype=torch.uint8), requires_grad=False)
            self.experts = nn.ModuleList([nn.Linear(WIDTH, WIDTH)])
            self.lora_magnitude_vector = 1.0  # no layer of PEFT's

        def forward(self, x):
            return self.experts[0](x.flatten(0, 1)).view(x.shape)

    tracker = inrun.track(nn.Sequential(Block(), nn.Linear(WIDTH, VOCAB)))
    assert [tap.flat for tap in tracker.taps] == [True, False]
    tracker.close()
