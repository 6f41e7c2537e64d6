"""What a step notices by itself: gradients that are not the scores', and layers that are not what they seemed."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import warnings
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inrun
from inrun.affine import recognise
from inrun.borrowed import borrowers
from inrun.check import APART, Agenda, efficiency

B, T, WIDTH, VOCAB, LR = 4, 6, 8, 11, 0.1


class Bypassed(nn.Module):
    """A weight that is used past its module, behind a gate or not at all by it."""

    def __init__(self, gated: bool, called: bool) -> None:
        super().__init__()
        self.a, self.low, self.up = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.head, self.called = nn.Linear(WIDTH, VOCAB), called
        if gated:
            nn.init.zeros_(self.up.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = self.a(x).tanh()
        low = F.linear(x, self.low.weight)
        return self.head(x + self.up(low + self.low(x) if self.called else low))


def batches(seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    g = torch.Generator().manual_seed(seed)
    while True:
        yield torch.randn(B, WIDTH, generator=g), torch.randint(VOCAB, (B,), generator=g)


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


@pytest.mark.parametrize("called", [True, False])
@pytest.mark.parametrize(
    ("gated", "warm", "method", "noticed"),
    [
        (False, 0, "first", 0),
        (False, 2, "first", 1),
        (True, 0, "first", 1),
        (True, 0, "path", 1),
        (True, 2, "first", 3),
    ],
)
def test_what_a_check_cannot_tell_is_asked_again(gated, warm, method, noticed, called):
    """A learning rate that starts at zero makes every direction zero, a gate that does makes gradients zero."""
    torch.manual_seed(0)
    model = Bypassed(gated, called)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: min(1.0, k / warm) if warm else 1.0)
    (x_val, y_val), steps = next(batches(1)), batches()
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x_val, y_val))

    def run(count: int) -> None:
        for _ in range(count):
            with tracker.step(range(B)):
                loss_of(model, *next(steps)).backward()
                optimizer.step()
                optimizer.zero_grad()
            schedule.step()

    if not called and not gated:
        noticed = 0  # that no layer scores it needs no direction
    run(noticed)
    with pytest.raises(inrun.InRunError, match=r"do not add up(.|\n)*low.weight"):
        run(1)


def test_checks_end_once_they_could_tell_of_all():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    (x_val, y_val), steps, checked = next(batches(1)), batches(), []
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x_val, y_val))
    for k in range(12):
        optimizer.param_groups[0]["lr"] = 0.01 if k >= 6 else 0.0
        with tracker.step(range(B)) as step:
            checked.append(tracker.check_due)
            loss_of(model, *next(steps)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert bool(step.values.any()) == (k >= 6)
    assert [k for k, due in enumerate(checked) if due] == [0, 1, 3, 7]


@pytest.mark.parametrize("check", [True, False])
@pytest.mark.parametrize("hooked", [False, True])
def test_which_steps_are_checked(check, hooked):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCAB))
    if hooked:
        model[0].weight.register_hook(lambda grad: grad)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    held, steps, checked = next(batches(1)), batches(), []
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *held), check=check)
    for k in range(20):
        with tracker.step(range(B)):
            checked += [k] if tracker.check_due else []
            loss_of(model, *next(steps)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert checked == (([*range(20)] if hooked else [0, 8, 16]) if check else [])


def test_three_checks_are_made_and_those_that_cannot_tell_are_soon_made_again():
    agenda, due = Agenda(), []
    for certain in ({"a"}, set(), set(), {"b"}):
        agenda.made_at(100, certain, ["a", "b"])
        due.append(agenda.due - 100)
    assert due == [1, 2, 4, math.inf]
    agenda, due = Agenda(), []
    for _ in range(3):
        agenda.made_at(100, {"a", "b"}, ["a", "b"])
        due.append(agenda.due - 100)
    assert due == [APART, APART, math.inf]


def test_a_sum_in_which_samples_nearly_cancel_tells_nothing():
    model = nn.Linear(2, 1, bias=False)
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR))
    (slot,) = tracker.slots
    for second, certain in ((-0.999, set()), (0.5, {"weight"})):
        slot.param.grad = torch.tensor([[1.0, second]])
        dots = [{slot.taps[0]: slot.param.grad[0]}]
        along = [torch.ones_like(slot.param)]
        assert efficiency([slot], dots, along, torch.ones(()), 1.0, tracker.ranks) == certain


class TiedAutoencoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(WIDTH, 4), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.inner(self.outer(x)).tanh(), self.inner.weight.T)


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_what_one_check_lets_pass_by_chance_another_sees(precision, monkeypatch):
    """What is missing of the samples' scores may nearly cancel in one batch; in full precision a warning says so."""
    monkeypatch.setattr(torch, "get_float32_matmul_precision", lambda: precision)
    passed, caught, told = 0, 0, 0
    for seed in range(24):
        torch.manual_seed(seed)
        model = TiedAutoencoder().double()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        held = torch.randn(B, 5, WIDTH).double(), torch.rand(B, 1, 1)
        tracker = inrun.track(
            model, optimizer, validation=lambda m=model, held=held: (m(held[0]) + held[1]).sin().mean()
        )
        try:
            for k in range(17):
                with warnings.catch_warnings(record=True) as said, tracker.step(range(8)):
                    (1.5 * model(torch.randn(8, 5, WIDTH).double()) + 6 * torch.rand(8, 1, 1)).sin().mean().backward()
                    optimizer.step()
                    optimizer.zero_grad()
                passed += k == 0
                told += any("less exactly than in float32" in str(each.message) for each in said)
        except inrun.InRunError as error:
            assert "do not add up" in str(error)
            caught += k > 0
    assert passed and caught == passed
    assert told == (passed if precision == "highest" else 0)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("after", [False, True], ids=["tensor hook", "after accumulation"])
def test_hooks_on_gradients_are_held_to_the_scores_in_every_step(method, after):
    """A mask is a part of both gradients; a clamp is not, in the step in which it does something."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCAB)).double()
    bound, masks = [1e9], {p: torch.rand(p.shape) < 0.5 for p in model[2].parameters()}

    def change(p):
        p.grad.mul_(masks[p]).clamp_(-bound[0], bound[0])

    for p, mask in masks.items():
        if after:
            p.register_post_accumulate_grad_hook(change)
        else:
            p.register_hook(lambda g, mask=mask: (g * mask).clamp(-bound[0], bound[0]))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    held, steps = next(batches(1)), batches()
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, held[0].double(), held[1]))
    params = list(model.parameters())

    def gradient(x, y):
        found = torch.autograd.grad(F.cross_entropy(model(x.double()), y), params)
        return [g * masks[p] if p in masks else g for p, g in zip(params, found, strict=True)]

    def step(x, y):
        with tracker.step(range(B)) as step:
            loss_of(model, x.double(), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step.values.double()

    for _ in range(4):
        x, y = next(steps)
        with tracker.paused():
            rows = [gradient(x[z : z + 1], y[z : z + 1]) for z in range(B)]
            target = gradient(*held)
        dots = [sum((g * t).sum() for g, t in zip(row, target, strict=True)) for row in rows]
        torch.testing.assert_close(step(x, y), torch.stack(dots) * LR / B, rtol=1e-5, atol=1e-9)
    bound[0] = 0.01
    with pytest.raises(inrun.InRunError, match=r"do not add up to the gradients|changed element by element"):
        step(*next(steps))


class Words(nn.Module):
    """An embedding of which a batch sees few rows, none of the first."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.inner, self.head = nn.Embedding(2048, 32), nn.Linear(32, 32), nn.Linear(32, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.embedding(x)).tanh())


def words(seed: int) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return torch.randint(700, 760, (B, T), generator=g), torch.randint(VOCAB, (B, T), generator=g)


def clip_others(model: Words) -> None:
    nn.utils.clip_grad_norm_([p for n, p in model.named_parameters() if not n.startswith("embedding")], 1e-3)


def clip_values(model: Words) -> None:
    nn.utils.clip_grad_value_(model.embedding.parameters(), 1e-3)


def clip_all(model: Words) -> None:
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("change", "even"), [(clip_others, False), (clip_values, False), (clip_all, True)])
def test_gradients_of_which_some_are_changed_are_an_error(change, even, dtype):
    torch.manual_seed(0)
    model = Words().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *words(0)), check=False)

    def step(changed: Callable[[Words], None] | None, seed: int) -> None:
        with tracker.step(range(B)):
            loss_of(model, *words(seed)).backward()
            if changed is not None:
                changed(model)
            optimizer.step()
            optimizer.zero_grad()

    step(None, 1)
    if even:
        step(change, 2)
        return
    with pytest.raises(inrun.InRunError, match="one common factor"):
        step(change, 2)


@pytest.mark.parametrize("method", ["first", "pairwise", "secant", "path", "path_secant"])
def test_a_gradient_set_to_none_moves_nothing_and_earns_nothing(method):
    found = []
    for exclude in ((), ("0.*",)):
        torch.manual_seed(0)
        found.append(_values_without(method, exclude))
        if method == "first":
            return
    torch.testing.assert_close(*found)


def _values_without(method: str, exclude: tuple[str, ...]) -> Tensor:
    """Of three steps, in which the first layer's gradients are set to None."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    held, steps, made = next(batches(1)), batches(), []
    options: dict[str, Any] = {"pairwise": range(B)} if method == "pairwise" else {}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR) if options else optimizer
    tracker = inrun.track(
        model,
        optimizer,
        "first" if options else method,
        validation=lambda: loss_of(model, *held),
        exclude=exclude,
        **options,
    )
    for _ in range(3):
        with tracker.step(range(B)) as step:
            loss_of(model, *next(steps)).backward()
            for param in model[0].parameters():
                param.grad = None
            if method == "first":
                with pytest.raises(inrun.InRunError, match=r"those of 2 parameters are gone: 0.weight, 0.bias"):
                    optimizer.step()
                break
            optimizer.step()
            optimizer.zero_grad()
        made.append(step)
    return torch.stack([step.values for step in made]) if made else torch.zeros(0)


class Scaling(nn.Module):
    def __init__(self, weight: float = 1.0) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.full((WIDTH,), weight)), nn.Parameter(torch.full((WIDTH,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight + self.bias


class Dropping(Scaling):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.5, self.training)


class Clamped(Scaling):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-10, 10)


class ClampedWeight(Scaling):
    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight.clamp(-10, 10) + self.bias


class Gated(Scaling):
    def forward(self, x: Tensor, gate: Any = None) -> Tensor:
        return super().forward(x if gate is None else x * gate)


class OneShift(Scaling):
    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.full((1,), 3.0))


class FarClamped(Scaling):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(-1e4, 1e4)


@pytest.mark.parametrize(
    "module",
    [Dropping().eval(), Dropping(), Clamped(), Clamped(20.0), ClampedWeight(20.0), Gated(), OneShift()],
)
def test_what_scales_in_one_mode_or_for_small_numbers_alone_is_not_taken_for_a_scale(module):
    assert recognise(Scaling(20.0)) is not None and recognise(module) is None
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), copy.deepcopy(module), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    (x, y), plain = next(batches()), copy.deepcopy(model.train())
    tracker = inrun.track(model.eval(), optimizer, validation=lambda: loss_of(model, x, y))
    model.train()
    with tracker.step(range(B)):
        torch.manual_seed(1)
        loss = loss_of(model, x, y)
        loss.backward()
        optimizer.step()
    torch.manual_seed(1)
    torch.testing.assert_close(loss, loss_of(plain, x, y))


@pytest.mark.parametrize(
    ("method", "said"),
    [("first", "1: expected FarClamped to scale and shift"), ("path", r"do not add up(.|\n)*1.weight")],
)
def test_a_scale_that_turns_out_to_be_another_module_is_an_error(method, said):
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), FarClamped(0.5), nn.Linear(WIDTH, VOCAB))
    assert recognise(model[1]) is not None
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = next(batches())
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x, y))
    with pytest.raises(inrun.InRunError, match=said), tracker.step(range(B)):
        loss_of(model, 3e4 * x, y).backward()
        optimizer.step()


def test_as_many_parameters_as_were_excluded_are_not_for_that_without_need_of_a_score():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = next(batches())
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y), exclude=["1.*"])

    def step() -> None:
        with tracker.step(range(B)):
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()

    step()
    model[0].requires_grad_(True)
    model[1].requires_grad_(False)
    for _ in range(2):
        with pytest.raises(inrun.InRunError, match=r"got 2 more, which would have no score: 0.weight, 0.bias"):
            step()
    model[0].requires_grad_(False)
    step()


class Positioned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.head = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Embedding(32, WIDTH),
            nn.Linear(WIDTH, VOCAB),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.token(x) + self.position(torch.arange(x.shape[1]) + 2))


@pytest.mark.parametrize("method", ["first", "path"])
def test_as_many_positions_as_samples(method):
    torch.manual_seed(0)
    model = Positioned()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def tokens(count: int) -> tuple[Tensor, Tensor]:
        return torch.randint(VOCAB, (B, count)), torch.randint(VOCAB, (B, count))

    held = tokens(T)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *held))
    with pytest.raises(RuntimeError, match=r"ids: .* another run of numbers"), tracker.step(range(B)):
        loss_of(model, *tokens(B)).backward()
    for count in (T, T - 1, B):  # as many as samples are positions by now
        before, (x, y) = copy.deepcopy(model), tokens(count)
        with tracker.step(range(B)) as step:
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(step.values, one_at_a_time(before, before, held, x, y), rtol=1e-4, atol=1e-7)


def test_as_many_ids_as_samples_are_refused_where_others_were_positions():
    """A run of numbers would be positions too."""

    class Placed(Positioned):
        def forward(self, x: Tensor, at: Tensor) -> Tensor:
            return self.head(self.token(x) + self.position(at))

    model, x = Placed(), torch.randint(VOCAB, (B, T))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x, torch.arange(T)).square().mean())
    refused = pytest.raises(inrun.InRunError, match=r"^position: ids: expected")
    for tokens, at, told in ((T, range(T), None), (B, range(2, B + 2), None), (B, [3, 1, 0, 2], refused)):
        with told or contextlib.nullcontext(), tracker.step(range(B)):
            model(x[:, :tokens], torch.tensor(at)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


@pytest.mark.parametrize("method", ["first", "path"])
def test_labels_that_are_a_run_of_numbers_by_chance(method):
    """What could be positions is refused only while ids never were anything else."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(10, WIDTH), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def label_loss(labels: list[int]) -> Tensor:
        return F.cross_entropy(model(torch.tensor(labels)), torch.tensor(labels))

    def values(tracker: inrun.Tracker, labels: list[int]) -> Tensor:
        with tracker.step(range(len(labels))) as step:
            label_loss(labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step.values

    for later in ([3, 4, 5, 6], [0, 1], [0, 1, 2]):
        refused = pytest.raises(inrun.InRunError, match=r"^0: ids: expected .* run of numbers, for \d samples")
        with inrun.track(model, optimizer, method, validation=lambda: label_loss([7, 2, 5])) as tracker, refused:
            values(tracker, later)
        optimizer.zero_grad()
        with inrun.track(model, optimizer, method, validation=lambda: label_loss([7, 2, 5])) as tracker:
            values(tracker, [5, 2, 7, 1])
            before = copy.deepcopy(model)
            found = values(tracker, later)
        target = torch.autograd.grad(
            F.cross_entropy(before(x := torch.tensor([7, 2, 5])), x), list(before.parameters())
        )
        for b, label in enumerate(later):
            y = torch.tensor([label])
            own = torch.autograd.grad(F.cross_entropy(before(y), y) / len(later), list(before.parameters()))
            expected = LR * sum((g * t).sum() for g, t in zip(own, target, strict=True))
            torch.testing.assert_close(found[b], expected, rtol=1e-4, atol=1e-7)


def test_a_label_that_is_padding_has_no_part_in_its_table():
    model = nn.Sequential(nn.Embedding(10, WIDTH, padding_idx=2), nn.Linear(WIDTH, VOCAB))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=LR), torch.tensor([5, 2, 7, 2])
    grad = torch.autograd.grad(F.cross_entropy(model(x), x), model[0].weight)[0]
    tracker = inrun.track(model, optimizer, validation=lambda: model[1](model[0].weight).square().mean())
    with tracker.step(range(B)):
        F.cross_entropy(model(x), x).backward()
        torch.testing.assert_close(model[0].weight.grad, grad)
        optimizer.step()


def test_a_layer_that_sees_no_samples_is_named():
    class AllButOne(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(0, 1)[1:]

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), AllButOne(), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = torch.randn(B, T, WIDTH), torch.randint(VOCAB, (B * T - 1,))
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y))
    with pytest.raises(ValueError, match=r"2: input: expected shape \[B, ...\] with B = 4"), tracker.step(range(B)):
        loss_of(model, x, y).backward()


class Flattened(nn.Module):
    """Layers that are given the tokens of all samples as rows, in one order or another."""

    def __init__(self, order: str = "samples") -> None:
        super().__init__()
        self.inner, self.norm, self.head = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCAB)
        self.order, self.autocast = order, torch.autocast("cpu", torch.bfloat16, enabled=False)

    def forward(self, x: Tensor) -> Tensor:
        with self.autocast:  # which cannot be entered twice at once
            rows = self.inner(x) if self.order == "samples" else self.inner(x).movedim(1, 0)
            rows = self.norm(rows.flatten(0, 1))
            y = self.head(rows)
        return y.view(len(x), -1, VOCAB)


def one_at_a_time(start: nn.Module, end: nn.Module, held: Any, x: Tensor, y: Tensor) -> Tensor:
    """The values of a step of SGD, by the mean of the validation gradients at two weights."""
    ends = [torch.autograd.grad(loss_of(each, *held), list(each.parameters())) for each in (start, end)]
    target = [(a + b) / 2 for a, b in zip(*ends, strict=True)]
    rows = [torch.autograd.grad(loss_of(start, x[[b]], y[[b]]), list(start.parameters())) for b in range(len(x))]
    return torch.stack([sum(LR * (g * t).sum() / len(x) for g, t in zip(row, target, strict=True)) for row in rows])


@pytest.mark.parametrize("method", ["first", "secant", "path"])
def test_tokens_flattened_over_samples(method):
    """Tried once, in the first step of several samples; a batch of one has nothing to mix up."""
    torch.manual_seed(0)
    model = Flattened()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    held = torch.randn(3, T, WIDTH), torch.randint(VOCAB, (3, T))
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *held))
    for size, tokens in ((1, T), (B, T), (B + 1, 2), (1, T)):
        x, y = torch.randn(size, tokens, WIDTH), torch.randint(VOCAB, (size, tokens))
        before = copy.deepcopy(model)
        with tracker.step(range(size)) as step:
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        expected = one_at_a_time(before, model if method == "secant" else before, held, x, y)
        torch.testing.assert_close(step.values, expected, rtol=1e-3, atol=1e-6)
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("method", ["first", "path"])
def test_tokens_flattened_before_a_batch_norm_are_refused(method):
    """As `[B, T, ...]` they would be normed over samples alone, where there are as many tokens as features."""
    model = Flattened()
    model.norm = nn.BatchNorm1d(WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = torch.randn(B, WIDTH, WIDTH), torch.randint(VOCAB, (B, WIDTH))
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x, y))
    with pytest.raises(ValueError, match=r"norm: input: expected shape \[B, ...\]"), tracker.step(range(B)):
        loss_of(model, x, y).backward()
        optimizer.step()


def test_samples_that_are_all_alike_tell_nothing_of_their_order():
    """The next step is asked, and a model that cannot be run again is refused."""
    torch.manual_seed(0)
    for order in ("samples", "tokens"):
        model = Flattened(order)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        x, y = torch.randn(B, T, WIDTH), torch.randint(VOCAB, (B, T))
        tracker = inrun.track(model, optimizer, validation=lambda m=model: loss_of(m, x, y), check=False)  # noqa: B023

        def take(x: Tensor, y: Tensor, model=model, optimizer=optimizer, tracker=tracker) -> None:
            with tracker.step(range(B)):
                loss_of(model, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()

        take(x[:1].expand(B, -1, -1), y)
        if order == "samples":
            take(x, y)
            continue
        with pytest.raises(inrun.InRunError, match="rows did not move on"):
            take(x, y)

    class Once(Flattened):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            Once.runs += self.training
            if Once.runs and not self.training:
                raise NotImplementedError("trains only")
            return super().forward(x)

    model = Once()
    tracker = inrun.track(model, torch.optim.SGD(model.parameters()), check=False)
    with tracker.validation():
        loss_of(model, x, y).backward()
    with pytest.raises(inrun.InRunError, match="rows did not move on") as caught, tracker.step(range(B)):
        loss_of(model, x, y).backward()
        tracker.optimizers[0].step()
    assert isinstance(caught.value.__cause__, NotImplementedError)


@pytest.mark.parametrize("method", ["first", "path"])
def test_tokens_flattened_in_another_order_are_refused(method):
    torch.manual_seed(0)
    model = Flattened("tokens")
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = torch.randn(B, T, WIDTH), torch.randint(VOCAB, (B, T))
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x, y), check=False)
    before = copy.deepcopy(model.state_dict())
    refused = pytest.raises(inrun.InRunError, match=r"norm: expected an input \[B, ...\], or .* rows did not move on")
    for _ in range(2):
        with refused, tracker.step(range(B)):
            loss_of(model, x, y).backward()
            optimizer.step()
        optimizer.zero_grad()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items() if name in before)


class FirstOfShared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position, self.head = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Embedding(T, WIDTH),
            nn.Linear(WIDTH, VOCAB),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.token(x) + self.position(torch.arange(x.shape[1])[None])[0])


def test_a_batch_of_one_tells_nothing_of_what_samples_share():
    model = FirstOfShared()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = torch.randint(VOCAB, (B, T)), torch.randint(VOCAB, (B, T))
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y))

    def step(count: int) -> None:
        with tracker.step(range(count)):
            loss_of(model, x[:count], y[:count]).backward()
            optimizer.step()
            optimizer.zero_grad()

    step(1)
    with pytest.raises(inrun.InRunError, match=r"position: expected its output.*getitem"):
        step(B)


def test_what_a_model_keeps_of_shared_outputs_is_saved_and_loaded_as_any_tensor():
    class Keeping(FirstOfShared):
        def forward(self, x: Tensor) -> Tensor:
            h = self.position(torch.arange(x.shape[1])[None])
            self.register_buffer("seen", h.detach())
            self.twice = 2 * h.detach()
            return self.head(self.token(x) + h)

    model = Keeping()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = torch.randint(VOCAB, (B, T)), torch.randint(VOCAB, (B, T))
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y))
    with tracker.step(range(B)):
        loss_of(model, x, y).backward()
        optimizer.step()
    torch.save([model.state_dict(), model.twice], file := io.BytesIO())
    file.seek(0)
    found, twice = torch.load(file)
    assert torch.equal(2 * found["seen"], twice) and torch.equal(copy.deepcopy(model.twice), twice)
    assert type(model.seen) is type(model.twice) is Tensor


class Prototypes(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.prototypes = nn.Linear(WIDTH, WIDTH), nn.Embedding(VOCAB, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) @ self.prototypes(torch.arange(VOCAB)).t()


def test_what_cannot_be_computed_of_rows_for_each_sample_names_the_layer():
    model = Prototypes()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = next(batches())
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y))
    with pytest.raises(inrun.InRunError, match=r"prototypes: expected its output.*got t\(\)"), tracker.step(range(B)):
        loss_of(model, x, y).backward()


@pytest.mark.parametrize("ids", [np.array([3, 4, 5, 6]), torch.tensor([3, 4, 5, 6])])
def test_ids_may_be_integers_of_any_kind(ids):
    model = nn.Linear(WIDTH, VOCAB)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = next(batches())
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y))
    with tracker.step(list(ids)):
        loss_of(model, x, y).backward()
        optimizer.step()
    assert tracker.ledger.rows()["sample_id"].to_pylist() == [3, 4, 5, 6]


@pytest.mark.parametrize("method", ["first", "secant", "path"])
def test_a_later_check_leaves_out_what_does_not_move(method):
    """A gate that begins at zero has a second check, before which a weight is frozen and its bias is not."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB))
    nn.init.zeros_(model[2].weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    held, steps = next(batches(1)), batches()
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *held))
    for k in range(4):
        model[3].weight.requires_grad_(k == 0)
        with tracker.step(range(B)):
            assert tracker.check_due == (k in (0, 1))
            loss_of(model, *next(steps)).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert tracker.agenda.made == 2


def test_checks_of_batches_of_one_end():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    held, steps, checked = next(batches(1)), batches(), []
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *held))
    for k in range(3):
        with tracker.step([k]):
            checked.append(tracker.check_due)
            loss_of(model, *(t[:1] for t in next(steps))).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert checked == [True, False, False]


def test_an_overflow_in_the_step_of_a_check_puts_it_off():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    held, steps, checked = next(batches(1)), batches(), []
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *held))
    for k in range(3):
        with tracker.step(range(B)) as step:
            checked.append(tracker.check_due)
            scaler.scale(loss_of(model, *next(steps)) * (torch.inf if k == 0 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        assert bool(step.values.any()) == (k > 0)
    assert checked == [True, True, False]


class Scaled(nn.Linear):
    """A linear layer by `super().forward()`, with a parameter of its own beside it."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.gate = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.gate


class Contained(nn.Module):
    """Parameters in a list inside a dictionary, and a child whose weight is used without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleDict({"a": nn.ParameterList([torch.randn(WIDTH, WIDTH), torch.randn(WIDTH)])})
        self.proj, self.tied = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        weight, shift = self.parts["a"]
        if self.proj.weight.dtype is not x.dtype or isinstance(self.tied.weight, int):
            raise TypeError
        return self.tied(F.linear(x @ weight, self.proj.weight, bias=self.proj.bias) + shift)


class InPlace(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.norm, self.loose = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Scaled()

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        y[:, 0] = 0.0
        y += x
        z = self.loose(self.norm(F.relu(y, inplace=True)))
        z *= 2.0
        return z


@pytest.mark.parametrize("method", ["first", "secant", "path"])
@pytest.mark.parametrize("block", [Scaled, Contained, InPlace])
def test_blocks_as_people_write_them(block, method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), block(), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    held = torch.randn(3, T, WIDTH), torch.randint(VOCAB, (3, T))
    x, y = torch.randn(B, T, WIDTH), torch.randint(VOCAB, (B, T))
    before = copy.deepcopy(model)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *held))
    with tracker.step(range(B)) as step:
        loss_of(model, x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(tracker.coverage["tracked"]) == len(list(before.parameters()))
    expected = one_at_a_time(before, model if method == "secant" else before, held, x, y)
    torch.testing.assert_close(step.values, expected, rtol=1e-3, atol=1e-6)


def test_what_no_rule_can_see_is_said_with_what_to_do():
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB))
    model[0].forward = lambda x: F.linear(x, model[0].weight, model[0].bias)
    with pytest.raises(inrun.InRunError, match=r"0: expected Linear's own forward, got one that was set on the module"):
        inrun.track(model, torch.optim.SGD(model.parameters()))

    class Losing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.positions, self.head = nn.Parameter(torch.randn(T, WIDTH)), nn.Linear(WIDTH, VOCAB)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return F.cross_entropy(self.head(x + self.positions).flatten(0, -2), y.flatten())

    model = Losing()
    x, y = torch.randn(B, T, WIDTH), torch.randint(VOCAB, (B, T))
    tracker = inrun.track(model, torch.optim.SGD(model.parameters()), validation=lambda: model(x, y))
    with (
        pytest.raises(inrun.InRunError, match=r"got \(\);.*Compute the loss outside of the model"),
        tracker.step(range(B)),
    ):
        model(x, y)


def test_tokens_that_are_picked_out_are_refused_however_many_there_are():
    """Theirs could be any samples', though sums are right; all of every sample's are its own."""

    class Picked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.head(self.inner(x)[mask])

    model = Picked()
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR), check=False)
    x, full = torch.randn(B, T, WIDTH), torch.ones(B, T, dtype=torch.bool)
    some = full.clone()
    some[:, T // 2 :] = False
    uneven = some.clone()
    uneven[0, T // 2], uneven[1, 0] = True, False
    for mask in (full, some, uneven, full):
        with tracker.validation():
            model(x, full).square().mean().backward()
        refused = pytest.raises(ValueError, match="head: input: expected shape")
        with contextlib.nullcontext() if mask is full else refused, tracker.step(range(B)) as step:
            model(x, mask).square().mean().backward()
            tracker.optimizers[0].step()
        model.zero_grad()
        assert mask is not full or step.values.shape == (B,)


def test_windows_of_an_attention_are_refused_by_name():
    model = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR))
    x = torch.randn(B, 4, WIDTH)
    with tracker.validation():
        model(x, x, x)[0].square().mean().backward()
    windows = x.reshape(-1, 2, WIDTH)
    with pytest.raises(ValueError, match=r"model: input: expected shape .* 2 rows to a sample"), tracker.step(range(B)):
        model(windows, windows, windows)


class Handed(nn.Module):
    """Children that are called in ways that a reader of source may miss, and one that is not called at all."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.used = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.listed, self.unread = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.stored, self.present = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.a.weight).type_as(self.b.weight) + self.c.weight.new_zeros(())
        x = torch.utils.checkpoint.checkpoint(self.a, x, use_reentrant=False)
        layer = self.b
        x = self.c.forward(layer(x)) + 0 * self.b.weight.sum().detach()
        for other in [self.listed]:
            x = other(x) * self.listed.weight.mean().detach()
        self.stored.bias = None
        return self.tail(x) if self.present.weight is not None else x

    def tail(self, x: Tensor) -> Tensor:
        return F.linear(x, self.used.weight, self.used.bias) if self.used.weight is not None else x

    def other(self) -> Tensor:
        return self.unread.weight


class Heir(Handed):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


@pytest.mark.parametrize("kind", [Handed, Heir])
def test_which_children_are_used_without_being_called(kind):
    modules = dict(kind().named_modules())
    assert borrowers(modules, {name: [] for name in modules if name}) == {"used": ""}
    assert not borrowers(dict(nn.MultiheadAttention(WIDTH, 2).named_modules()), {"out_proj": []})  # torch's own
    with_own = {name: [] for name in modules}  # the parent is run by forward-mode AD then
    assert borrowers(modules, with_own).keys() == {"used", "b", "listed"}


class Experts(nn.Module):
    """A mixture of experts, which every token goes to: its rows are tokens, flattened."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = nn.Linear(WIDTH, 2), nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, WIDTH)
        shares = self.gate(rows).softmax(-1)
        return sum(shares[:, i : i + 1] * each(rows) for i, each in enumerate(self.experts)).view(x.shape)


class Mixed(nn.Module):
    """Gives its experts the samples' tokens in their order, time first, or those of some samples."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.moe, self.head = kind, Experts(), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "whole":
            return self.head(self.moe(x))
        if self.kind == "time first":
            return self.head(self.moe(x.transpose(0, 1)).transpose(0, 1))
        picked = torch.zeros(x.shape[:2], dtype=torch.bool)
        picked[x[:, 0, 0] > 0, :4] = True
        return self.head(x.masked_scatter(picked[..., None], self.moe(x[picked])))


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("kind", ["whole", "time first", "picked"])
def test_experts_of_other_rows_than_each_samples_tokens_are_refused(kind, method):
    torch.manual_seed(0)
    model = Mixed(kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = torch.randn(B, T, WIDTH), torch.randint(VOCAB, (B, T))
    x[:, 0, 0] = torch.tensor([1.0, -1.0, 2.0, -2.0])
    expected = values_of(model, x, y)
    for through in ({}, {"moe.*": ""}):
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x, y), through=through)
        fits = kind == "whole" or through
        refused = pytest.raises(inrun.InRunError, match=r"moe.gate \(Linear\).*: expected the samples .* in the order")
        with contextlib.nullcontext() if fits else refused, tracker.step(range(B)) as step:
            loss_of(model, x, y).backward()
            optimizer.step()
        optimizer.zero_grad()
        tracker.close()
        if fits:
            break
    torch.testing.assert_close(step.values, expected, rtol=1e-4, atol=1e-7)


class Sharing(Experts):
    """With a layer beside the experts, whose rows are the samples."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.shared(x)


def test_tokens_beside_experts_have_their_own_values():
    torch.manual_seed(0)
    model = Mixed("whole")
    model.moe = Sharing()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = torch.randn(B, T, WIDTH), torch.randint(VOCAB, (B, T))
    expected = values_of(model, x, y)
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y))
    with tracker.step(range(B), tokens=T) as step:
        loss_of(model, x, y).backward()
        optimizer.step()
    torch.testing.assert_close(step.values.sum(1), expected, rtol=1e-4, atol=1e-7)


def values_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Of a step whose batch is validation too, one sample at a time."""
    params = list(model.parameters())
    rows = [torch.autograd.grad(loss_of(model, x[[b]], y[[b]]) / B, params) for b in range(B)]
    whole = torch.autograd.grad(loss_of(model, x, y), params)
    return torch.stack([sum((g * v).sum() for g, v in zip(row, whole, strict=True)) * LR for row in rows])


def test_a_layer_of_torchs_transformer_may_hold_experts():
    """Their tokens come `[T, B, W]`, of which no run on other numbers tells."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, dropout=0.0)
    layer.linear1 = Experts()
    model = nn.Sequential(Transposed(), layer, Transposed(), nn.Linear(WIDTH, VOCAB))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = torch.randn(B, T, WIDTH), torch.randint(VOCAB, (B, T))
    expected = values_of(model, x, y)
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y))
    with tracker.step(range(B)) as step:
        loss_of(model, x, y).backward()
        optimizer.step()
    torch.testing.assert_close(step.values, expected, rtol=1e-4, atol=1e-7)


class Transposed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1)


def test_what_a_check_runs_leaves_no_mark_in_containers():
    class Counted(nn.Linear):
        def __init__(self) -> None:
            super().__init__(WIDTH, VOCAB)
            self.counter, self.numbers, self.ordered = Counter(), defaultdict(int), OrderedDict()
            self.queue, self.plain, self.list = deque(maxlen=9), {}, []

        def forward(self, x: Tensor) -> Tensor:
            for each in (self.counter, self.numbers, self.ordered, self.plain):
                each[len(each)] = 1
            self.queue.append(1)
            self.list.append(1)
            return super().forward(x)

    model = Counted()
    optimizer, (x, y) = torch.optim.SGD(model.parameters(), lr=LR), next(batches())
    tracker = inrun.track(model, optimizer, validation=lambda: model.weight.square().sum())
    with tracker.step(range(B)):
        loss_of(model, x, y).backward()
        optimizer.step()
    kept = (model.counter, model.numbers, model.ordered, model.queue, model.plain, model.list)
    assert [len(each) for each in kept] == [1] * 6


def test_a_precision_that_a_backend_is_told_is_known():
    """By torch's newer setting, beside which it does not answer for the older one."""
    model, (x, y) = nn.Linear(WIDTH, VOCAB), next(batches())
    optimizer, matmul = torch.optim.SGD(model.parameters(), lr=LR), torch.backends.cuda.matmul
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, x, y))
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        with tracker.step(range(B)) as step:
            loss_of(model, x, y).backward()
            optimizer.step()
    finally:
        matmul.fp32_precision = before
    assert step.values.isfinite().all()
