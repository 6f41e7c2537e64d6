"""Deferred methods: against oracles written out here, the exact Shapley value, and training left to the bit."""

from __future__ import annotations

import contextlib
import copy
import itertools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, WIDTH, B, Bypass, Counting, T, data, gradient, loss_of, make, oracle_values, sample_gradients
from torch import nn
from torch.autograd import forward_ad
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import inrun
from inrun import forward_mode, hessian, shapley, turning
from inrun.deferred import METHODS
from inrun.tasks import Lion


def close(found, expected, rtol=1e-3):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def scored_step(name, method, make_optimizer, *, model=None, blocks=False, dtype=torch.float32, warm=1, **options):
    """A few warm-up steps, one tracked step; returns values, the step and the model."""
    model = (make(name) if model is None else model).to(dtype)
    train, validation = data(name), data(name, 4, 2)
    if train[0].is_floating_point():
        train, validation = (train[0].to(dtype), train[1]), (validation[0].to(dtype), validation[1])
    optimizer = make_optimizer(model.parameters())
    for t in range(warm):
        x, y = data(name, seed=50 + t)
        loss_of(model, x.to(dtype) if x.is_floating_point() else x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    target = {} if blocks else {"validation": lambda: loss_of(model, *validation)}
    tracker = inrun.track(model, optimizer, method, **target, **options)
    if blocks:
        with tracker.validation():
            loss_of(model, *validation).backward()
    with tracker.step(range(B)) as step:
        loss_of(model, *train).backward()
        optimizer.step()
        optimizer.zero_grad()
    if blocks and method in ("secant", "path_secant"):
        with pytest.raises(inrun.InRunError, match=r"after the next validation\(\) block"):
            _ = step.values
        with tracker.validation():
            loss_of(model, *validation).backward()
    tracker.close()
    assert len(tracker.ledger) == B
    return step, model, optimizer, before, train, validation


def at(model, weights, moved=None):
    """A float64 copy of the model at other weights."""
    other = copy.deepcopy(model).double()
    other.load_state_dict({k: v.double() for k, v in weights.items()})
    with torch.no_grad():
        for n, p in other.named_parameters():
            if moved is not None:
                p.add_(moved[n])
    return other


def adam_update(g, state, lr, b1=0.9, b2=0.999, eps=1e-8):
    t = float(state["step"]) + 1
    m = b1 * state["exp_avg"].double() + (1 - b1) * g
    v = b2 * state["exp_avg_sq"].double() + (1 - b2) * g * g
    return -lr / (1 - b1**t) * m / ((v / (1 - b2**t)).sqrt() + eps)


@pytest.mark.parametrize("name", ["mlp", "gpt_tied", "loose", "unknown"])
@pytest.mark.parametrize("blocks", [False, True])
def test_adam_path_secant_is_the_written_out_one(name, blocks, monkeypatch):
    monkeypatch.setattr(turning, "TURNS", 1.0)
    lr = 0.005
    step, model, _, (weights, state), train, validation = scored_step(
        name, "path_secant", lambda p: torch.optim.Adam(p, lr=lr), blocks=blocks, dtype=torch.float64
    )
    start = at(model, weights)
    names = [n for n, _ in start.named_parameters()]
    states = dict(zip(names, state["state"].values(), strict=True))
    g = gradient(start, *train)
    zero = {n: adam_update(torch.zeros_like(g[n]), states[n], lr) for n in names}
    full = {n: adam_update(g[n], states[n], lr) for n in names}
    first = gradient(start if blocks else at(model, weights, zero), *validation)
    last = gradient(at(model, weights, full), *validation)
    part = 0.5
    if not blocks:  # the gradient between them whose product with the move is the drop of the loss
        here, there = (-sum(((full[n] - zero[n]) * v[n]).sum().item() for n in names) for v in (first, last))
        losses = [loss_of(at(model, weights, moved), *validation).item() for moved in (zero, full)]
        part = (losses[0] - losses[1] - here) / (there - here)
        assert 0.0001 < abs(part - 0.5) < 1 / 6, part

    def direction(n, _):
        ratio = torch.where(g[n] == 0, 0.0, -(full[n] - zero[n]) / torch.where(g[n] == 0, 1.0, g[n]))
        return ratio * torch.lerp(first[n], last[n], part)

    close(step.values, oracle_values(start, direction, train, validation), 1e-4)


@pytest.mark.parametrize("name", ["gpt_tied", "loose"])
@pytest.mark.parametrize("method", ["second", "secant", "path"])
def test_sgd_methods_are_the_written_out_ones(name, method):
    lr = 0.3
    step, model, _, (weights, _), train, validation = scored_step(
        name, method, lambda p: torch.optim.SGD(p, lr=lr), dtype=torch.float64
    )
    start = at(model, weights)
    g, first = gradient(start, *train), gradient(start, *validation)
    if method == "second":  # H g by differences
        size = 1e-5
        up = gradient(at(model, weights, {n: size * v for n, v in g.items()}), *validation)
        down = gradient(at(model, weights, {n: -size * v for n, v in g.items()}), *validation)
        directions = {n: lr * first[n] - lr**2 / 2 * (up[n] - down[n]) / (2 * size) for n in g}
    elif method == "secant":
        last = gradient(at(model, weights, {n: -lr * v for n, v in g.items()}), *validation)
        directions = {n: lr / 2 * (first[n] + last[n]) for n in g}
    else:
        directions = {n: lr * first[n] for n in g}
    close(step.values, oracle_values(start, lambda n, _: directions[n], train, validation), 1e-4)


def test_second_order_and_secant_agree_to_the_third_order_of_the_learning_rate():
    gaps = []
    for lr in (0.4, 0.2, 0.1):
        found = [
            scored_step("mlp", m, lambda p, lr=lr: torch.optim.SGD(p, lr=lr), dtype=torch.float64, warm=0)[0].values
            for m in ("second", "secant")
        ]
        gaps.append((found[0] - found[1]).double().norm().item())
    slopes = [math.log2(a / b) for a, b in itertools.pairwise(gaps)]
    assert all(2.5 < slope < 3.6 for slope in slopes), (gaps, slopes)


class Configured(nn.Module):
    """Norms over two dimensions with an eps that counts, and padding in a table that is the head too."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head = nn.Embedding(VOCAB, WIDTH, padding_idx=0), nn.Linear(WIDTH, VOCAB)
        self.norm, self.rms = nn.LayerNorm((2, WIDTH // 2), eps=0.5), nn.RMSNorm((2, WIDTH // 2), eps=0.5)
        self.head.weight = self.embed.weight

    def forward(self, x):
        h = self.embed(x).unflatten(-1, (2, -1))
        return self.head(self.rms(self.norm(h).sin()).flatten(-2))


@pytest.mark.parametrize("method", ["first", "path", "monte_carlo"])
def test_layers_are_scored_with_the_options_that_they_have(method):
    model, ids = Configured().double(), torch.arange(12 * T).view(12, T) ** 2 % VOCAB
    model.embed.weight.data.mul_(0.5)
    (x, y), validation = (ids[:B], ids[:B].roll(1, 1)), (ids[B:].clamp(1), ids[B:].roll(1, 1))
    expected = oracle_values(model, lambda _, g: 1e-5 * g, (x, y), validation)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-5)  # at which all of them are of first order
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *validation))
    with tracker.step(range(B)) as step:
        loss_of(model, x, y).backward()
        optimizer.step()
    close(step.values, expected, 1e-5 if method == "first" else 1e-4)


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, foreach=True),
    "maximize": lambda p: torch.optim.AdamW(p, lr=0.01, maximize=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.005, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "lion": lambda p: Lion(p, lr=0.005, weight_decay=0.01),
}


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_path_secant_is_the_exact_shapley_value_of_the_real_update(kind):
    make_optimizer = OPTIMIZERS[kind]
    options = {"update": "elementwise"} if kind == "lion" else {}
    step, model, _, (weights, state), (x, y), validation = scored_step(
        "mlp", "path_secant", make_optimizer, dtype=torch.float64, warm=20, **options
    )
    copied = copy.deepcopy(model)

    def utility(members):
        copied.load_state_dict(weights)
        optimizer = make_optimizer(copied.parameters())
        optimizer.load_state_dict(copy.deepcopy(state))
        logits = copied(x[members])
        (F.cross_entropy(logits, y[members], reduction="sum") / len(y)).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            return -loss_of(copied, *validation).item()

    exact, total = shapley.exact(utility, B)
    exact = torch.from_numpy(exact)
    correlation = torch.corrcoef(torch.stack([step.values.double(), exact]))[0, 1]
    # A sign turns at once, which a path through the gradient's size sees in the mean only.
    assert correlation > (0.7 if kind == "lion" else 0.999)
    assert abs(step.values.sum() - total) < 0.03 * exact.abs().sum()
    assert step.drop["validation"].item() == pytest.approx(total, rel=1e-6)


class DecaysInPlace(torch.optim.Optimizer):
    """Writes into the gradients that it takes, as SGD with Nesterov's momentum does in its foreach form."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            along = p.grad.add_(p, alpha=0.3)
            p.sub_(along / (along.abs() + 0.01), alpha=self.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", ["nesterov", "its own", "a function"])
def test_an_update_that_writes_into_its_gradient_leaves_the_methods_theirs(kind):
    writes = False

    def function(grad, param, state, group):
        along = grad.add_(param, alpha=0.3) if writes else grad + 0.3 * param
        return -group["lr"] * along / (along.abs() + 0.01)

    def step(in_place):
        model, (x, y), validation = make("mlp").double(), data("mlp"), data("mlp", 4, 2)
        options = {}
        if kind == "nesterov":
            momentum = {"momentum": 0.9, "nesterov": True, "foreach": in_place}
            optimizer = torch.optim.SGD(model.parameters(), lr=0.05, **momentum)
        else:
            optimizer = DecaysInPlace(model.parameters(), lr=0.01)
            options["update"] = "elementwise" if in_place and kind == "its own" else function
        taken = contextlib.nullcontext()
        for i in range(3):
            if i == 2:
                loss = lambda: loss_of(model, validation[0].double(), validation[1])  # noqa: E731
                taken = inrun.track(model, optimizer, "path_secant", validation=loss, clip=0.05, **options).step(
                    range(B)
                )
            with taken as step:
                loss_of(model, x.double(), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()
        return step

    warnings.simplefilter("error")  # as of a function that is not what the optimizer does
    expected = step(False).values
    writes = True
    found = step(True)
    torch.testing.assert_close(found.values, expected, rtol=1e-6, atol=0)
    assert found.values.sum().item() == pytest.approx(found.drop["validation"].item(), rel=1e-4)


def test_a_validation_loss_of_zero_measures_nothing():
    """A margin that is met, of two targets."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2).double(), torch.randn(8, 4).double()
    y, optimizer = (x[:, 0] > 0).long(), torch.optim.SGD(model.parameters(), lr=0.1)
    targets = {
        "met": lambda: F.multi_margin_loss(1e3 * model(x[:2]), model(x[:2]).argmax(1)),
        "loss": lambda: F.cross_entropy(model(x), y),
    }
    tracker = inrun.track(model, optimizer, "path_secant", validation=targets)
    for _ in range(2):
        with tracker.step(range(8)) as step:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert (step.values[:, 0] == 0).all()
    assert step.values[:, 1].sum().item() == pytest.approx(step.drop["loss"].item(), rel=1e-4)


@pytest.mark.parametrize("lr", [0.05, 0.1])
def test_path_secant_adds_up_to_the_measured_drop(lr):
    gaps = {}
    for method in ("path", "secant", "path_secant", "path_simpson"):
        made = scored_step("mlp", method, lambda p: torch.optim.SGD(p, lr=lr), dtype=torch.float64, warm=0)
        step, model, _, (weights, _), _, validation = made
        drop = loss_of(at(model, weights), *validation) - loss_of(model, *validation)
        gaps[method] = abs(step.values.sum().item() / drop.item() - 1)
    assert gaps["path_secant"] < 1e-5 < gaps["path_simpson"] < gaps["secant"] / 3 < gaps["path"] / 9


class Normed(nn.Module):
    """Divides by the norm of its weight, as a constant where it is detached: DoRA does."""

    def __init__(self, detached):
        super().__init__()
        self.weight, self.detached = nn.Parameter(torch.randn(13, 8, dtype=torch.float64)), detached

    def forward(self, x):
        norm = self.weight.norm(dim=1)
        return F.linear(x, self.weight) * 3 / (norm.detach() if self.detached else norm)


@pytest.mark.parametrize("detached", [False, True])
def test_values_do_not_add_up_to_a_drop_of_which_a_part_is_detached(detached):
    torch.manual_seed(0)
    model, (x, y), (held, target) = Normed(detached), data("mlp"), data("mlp", 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    tracker = inrun.track(
        model, optimizer, "path_secant", validation=lambda: F.cross_entropy(model(held.double()), target)
    )
    with tracker.step(range(B)) as step:
        F.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
    gap = (step.values.double().sum() - step.drop["validation"]).abs() / step.drop["validation"].abs()
    assert gap > 1e-2 if detached else gap < 1e-4


@pytest.mark.parametrize("move", ["nothing", "a step of its own", "a clamp", "a checkpoint"])
@pytest.mark.parametrize("method", ["secant", "path_secant", "path_simpson"])
def test_weights_that_move_between_the_steps_begin_the_next_where_they_are(method, move):
    """The last step's end is where the next one begins only if nothing has moved the weights since."""
    model, other = make("mlp").double(), make("mlp").double()
    train, held = ([x.double(), y] for x, y in (data("mlp"), data("mlp", 4, 2)))

    def tracked(model):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *held))

        def scored():
            with tracker.step(range(B)) as step:
                loss_of(model, *train).backward()
                optimizer.step()
                optimizer.zero_grad()
            return step

        return optimizer, scored

    optimizer, scored = tracked(model)
    scored()
    if move == "a clamp":
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.1, 0.1)
    elif move == "a checkpoint":
        model.load_state_dict({name: value / 2 for name, value in model.state_dict().items()})
    elif move == "a step of its own":
        loss_of(model, *train).backward()
        optimizer.step()
        optimizer.zero_grad()
    other.load_state_dict(model.state_dict())
    found, expected = scored(), tracked(other)[1]()
    torch.testing.assert_close(found.values, expected.values, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.drop, expected.drop, rtol=1e-9, atol=0)


def test_a_drop_that_two_ends_cannot_explain_takes_simpsons_mean():
    """Noise in the losses themselves, as dropout's, is not taken for a bend."""

    def values(method, offset=0.0, ends=2, **options):
        model, looks = make("mlp").double(), [0.0] * (ends - 1) + [offset]
        (x, y), (vx, vy) = data("mlp"), data("mlp", 4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        losses = {"validation": lambda: loss_of(model, vx.double(), vy) + looks.pop()}
        tracker = inrun.track(model, optimizer, method, validation=losses, **options)
        with tracker.step(range(B)) as step:
            loss_of(model, x.double(), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert not looks
        return step.values.double()

    half, bent, simpson = values("secant"), values("path_secant"), values("path_simpson", ends=3)
    assert (half - bent).norm() > 1e-3 * half.norm() < (simpson - bent).norm() * 1e4
    for offset in (-1.0, 1.0):
        close(values("path_secant", offset, ends=3), simpson, 1e-9)


@pytest.mark.parametrize("targets", [1, 2])
def test_where_the_loss_bends_more_path_secant_takes_the_gradient_in_the_middle(targets):
    """One of the targets does."""
    torch.manual_seed(0)
    model = nn.Linear(4, 1, bias=False).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    x, y, held = torch.randn(B, 4).double(), torch.randn(B, 1).double(), torch.randn(4).double()
    bends = {"steep": lambda: (8 * model(held)).cos().sum(), "flat": lambda: (0.1 * model(held)).exp().sum()}
    losses = dict(itertools.islice(bends.items(), targets))
    tracker, runs, missed = inrun.track(model, optimizer, "path_secant", validation=losses), 0, 0
    run, tracker.validations.here = tracker.validations.here, lambda name: counted.append(name) or run(name)
    for t in range(6):
        counted: list[str] = []
        with tracker.step(range(B)) as step:
            (model(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        runs += len(counted) - (t > 0) * targets  # at w + u(0), but for the first step's, which is w
        off = step.values.double().reshape(B, -1).sum(0) - torch.stack(list(step.drop.values()))
        missed += bool(off.abs().max() > 1e-6)
    assert runs > 0 and missed <= 2  # Simpson's mean, where even the middle does not explain it


@pytest.mark.parametrize("method", ["path_secant", "path_simpson"])
def test_the_drop_is_at_the_excluded_weights_that_the_step_makes(method):
    """Which move by their momentum, too; the run is that of no other weights."""
    model = make("mlp").double()
    (x, y), held = data("mlp"), data("mlp", 4, 2)
    x, held = x.double(), (held[0].double(), held[1])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9, weight_decay=0.2)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *held), exclude=["net.0.*"])
    for _ in range(3):
        before, buffers = copy.deepcopy(model), {p: s["momentum_buffer"].clone() for p, s in optimizer.state.items()}
        with tracker.step(range(B)) as step:
            loss_of(model, x, y).backward()
            optimizer.step()
            optimizer.zero_grad()
        nobody, last = copy.deepcopy(model), loss_of(model, *held)
        with torch.no_grad():
            for (name, p), old in zip(nobody.named_parameters(), before.parameters(), strict=True):
                if not name.startswith("net.0."):
                    buffer = buffers.get(model.get_parameter(name), torch.zeros_like(old))
                    p.copy_(old - 0.3 * (0.9 * buffer + 0.2 * old))
        drop = loss_of(nobody, *held) - last
        torch.testing.assert_close(step.drop["validation"], drop.detach(), rtol=1e-9, atol=0)
        assert tracker.last_validation["validation"] == last
        close(step.values.double().sum(), drop.detach(), 1e-5 if method == "path_secant" else 2e-2)


@pytest.mark.parametrize("clip", [None, 0.1])
@pytest.mark.parametrize("method", ["path", "path_secant", "path_simpson"])
def test_an_update_that_a_fused_optimizer_skips_is_worth_nothing(method, clip):
    """Its gradients overflowed; no validation loss is looked at there."""
    model = make("mlp")
    (x, y), held = data("mlp"), data("mlp", 4, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *held), clip=clip,
                          exclude=["head.bias"] if clip is None else [])  # fmt: skip
    for factor in (1.0, math.inf, 1.0):
        before = model.head.weight.detach().clone()
        with tracker.step(range(B)) as step:
            scaler.scale(loss_of(model, x, y) * factor).backward()
            if clip is not None:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        moved = not torch.equal(model.head.weight, before)
        assert moved == bool(step.values.abs().sum() > 0) == math.isfinite(factor)
        assert bool(step.drop) == (moved and method != "path")


@pytest.mark.parametrize("method", ["first", *METHODS])
def test_a_fused_sgd_divides_the_loss_scale_out_itself(method):
    def values(scale):
        model, (x, y), held = make("mlp").double(), data("mlp"), data("mlp", 4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, held[0].double(), held[1]))
        with tracker.step(range(B)) as step:
            scaler.scale(loss_of(model, x.double(), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return step.values.double()

    close(values(1024.0), values(1.0), 1e-6)


def test_second_order_holds_with_momentum_and_decay():
    """Against the drop from w + u(0), its error falls with the square of the learning rate."""
    for options in ({"momentum": 0.9}, {"weight_decay": 0.5}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}):
        errors = []
        for lr in (0.04, 0.01):
            model = make("mlp").double()
            (x, y), held = data("mlp"), data("mlp", 4, 2)
            x, held = x.double(), (held[0].double(), held[1])
            optimizer = torch.optim.SGD(model.parameters(), lr=lr, **options)
            for p in model.parameters():
                optimizer.state[p] = {"momentum_buffer": 2 * p.detach()} if "momentum" in options else {}
            still = copy.deepcopy(model)
            moved = torch.optim.SGD(still.parameters(), lr=lr, **options)
            for p, q in zip(model.parameters(), still.parameters(), strict=True):
                moved.state[q] = copy.deepcopy(optimizer.state[p])
                q.grad = torch.zeros_like(q)
            moved.step()
            tracker = inrun.track(model, optimizer, "second", validation=lambda m=model, h=held: loss_of(m, *h))
            with tracker.step(range(B)) as step:
                loss_of(model, x, y).backward()
                optimizer.step()
            drop = float(loss_of(still, *held).detach() - loss_of(model, *held).detach())
            errors.append(abs(float(step.values.double().sum()) / drop - 1))
        assert errors[1] < errors[0] / 10 and errors[1] < 1e-2, (options, errors)


@pytest.mark.parametrize("method", METHODS)
def test_training_is_untouched_to_the_bit(method):
    def trained(tracked):
        model = make("gpt_tied")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.5)
        validation = data("gpt", 4, 2)
        options = {"validation": lambda: loss_of(model, *validation)}
        tracker = inrun.track(model, optimizer, method, **options) if tracked else None
        for t in range(3):
            x, y = data("gpt", seed=t)
            if tracker is None:
                loss_of(model, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                with tracker.step(range(B)):
                    loss_of(model, x, y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return model.state_dict()

    plain = trained(False)
    assert all(torch.equal(v, plain[k]) for k, v in trained(True).items())


@pytest.mark.parametrize("name", ["gpt_tied", "unknown", "loose"])
@pytest.mark.parametrize("method", ["second", "path_secant"])
def test_accumulation_recomputing_and_host_memory_change_nothing(name, method):
    def values(accumulate=False, recompute=(), **options):
        model = make(name)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
        x, y = data(name)
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *data(name, 4, 2)), **options)
        parts = (slice(0, 2), slice(2, B)) if accumulate else (slice(0, B),)
        for _ in range(2):
            with tracker.step() as step:
                for part in parts:

                    def loss(part=part):
                        return loss_of(model, x[part], y[part]) * len(y[part]) / len(y)

                    step.batch(range(B)[part], recompute=loss if part.start in recompute else None)
                    loss().backward()
                optimizer.step()
                optimizer.zero_grad()
        return step.values, tracker.memory

    expected, memory = values()
    assert memory["kept_peak"] > memory["kept"] == 0
    close(values(accumulate=True)[0], expected.double())
    again, nothing = values(recompute=(0,))
    close(again, expected.double())
    assert nothing["kept_peak"] == 0
    for recomputed in ((0, 2), (2,)):
        close(values(accumulate=True, recompute=recomputed)[0], expected.double())
    assert torch.equal(values(keep="host")[0], expected)
    assert torch.equal(values(keep_bytes=memory["kept_peak"])[0], expected)
    with pytest.raises(inrun.InRunError, match="keep_bytes="):
        values(keep_bytes=memory["kept_peak"] - 1)


class AsCuDNN(TorchFunctionMode):
    """An LSTM draws its dropout from a state of its own, which no seed sets back."""

    def __init__(self):
        super().__init__()
        self.own = torch.Generator().manual_seed(9)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not torch.lstm or not torch.backends.cudnn.enabled:
            return func(*args, **(kwargs or {}))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(1 << 30, (), generator=self.own)))
            return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", ["first", "path"])
def test_a_recurrent_layer_draws_the_same_dropout_again(method, checkpointed, recwarn):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm, self.scale = nn.LSTM(8, 6, 2, dropout=0.5, batch_first=True), nn.Parameter(torch.ones(6))

        def forward(self, x):
            run = lambda x: self.lstm(x)[0] * self.scale  # noqa: E731
            return checkpoint(run, x, use_reentrant=False) if checkpointed else run(x)

    model, (x, held) = Model(), torch.randn(2, 4, 5, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method, check=False)
    model.eval()
    with tracker.validation():
        model(held).square().mean().backward()
    along = tracker.validations.gradients["validation"].copy()
    model.train()
    with AsCuDNN(), tracker.step(range(4)) as step:
        model(x).square().sum().backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.step()
    expected = 0.1 * sum((grads[slot.name] * g).sum() for slot, g in zip(tracker.slots, along, strict=True))
    torch.testing.assert_close(step.values.sum(), expected, rtol=1e-4, atol=1e-6)
    assert not [w for w in recwarn if "TF32" in str(w.message)]


def test_a_batch_is_computed_again_in_its_own_mode_and_counts_once():
    """Secant's is, within the next validation block."""

    def found(recompute):
        torch.manual_seed(0)
        model, held = nn.Sequential(nn.Linear(8, 13), nn.Dropout(0.5), Counting()), data("mlp", 4, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
        loss, tracker = lambda: loss_of(model, *data("mlp")), inrun.track(model, optimizer, "secant")
        for training in (True, False):
            model.eval()
            with tracker.validation():
                loss_of(model, *held).backward()
            if training:
                model.train()
                with tracker.step(range(B), recompute=loss if recompute else None) as step:
                    loss().backward()
                    optimizer.step()
                    optimizer.zero_grad()
        return step.values, model[2].calls

    (again, runs), (kept, expected) = found(True), found(False)
    close(again, kept.double(), 1e-6)
    assert runs == expected


def test_recomputing_is_at_the_excluded_weights_of_the_step_too():
    def values(recompute):
        model, (x, y) = make("mlp").double(), data("mlp")
        loss = lambda: loss_of(model, x.double(), y)  # noqa: E731
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        tracker = inrun.track(model, optimizer, "path", validation=loss, exclude=["head.*"])
        with tracker.step(range(B), recompute=loss if recompute else None) as step:
            loss().backward()
            optimizer.step()
        return step.values.double()

    close(values(True), values(False), 1e-6)


@pytest.mark.parametrize("grads_in_between", [False, True])
def test_two_backward_passes_through_one_graph_add_up(grads_in_between):
    model, (x, y), validation = make("unknown"), data("unknown"), data("unknown", 4, 2)
    expected = oracle_values(model, lambda n, g: 0.3 * g, (x, y), validation)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *validation))
    with tracker.step(range(B)) as step:
        loss = loss_of(model, x, y)
        (2 * loss).backward(retain_graph=True)
        if grads_in_between:  # whose gradients go nowhere
            torch.autograd.grad(loss, model.head.weight, retain_graph=True)
        loss.backward()
        optimizer.step()
    close(step.values, expected)


class Queries(nn.Module):
    """Its output is its parameter, whose gradient is the output's where there is one sample."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.linspace(-1, 1, 8).view(1, 1, 8))

    def forward(self, x):
        return self.query.expand(len(x), -1, -1)


def test_a_parameters_gradient_takes_no_memory_of_what_is_kept():
    torch.manual_seed(0)
    model = nn.Sequential(Queries(), nn.Linear(8, 5), nn.Flatten()).double()
    x, y = torch.zeros(3, 1), torch.arange(3)
    rows = sample_gradients(model, x, y)
    norm = math.sqrt(sum(sum(row[n] for row in rows).square().sum().item() for n in rows[0]))
    val = gradient(model, x[:1], y[:1])
    expected = torch.stack([sum((0.05 / norm * val[n] * row[n]).sum() for n in row) for row in rows])
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, x[:1].double(), y[:1]))
    with tracker.step() as step:
        for i in range(3):
            step.batch([i])
            (loss_of(model, x[i : i + 1].double(), y[i : i + 1]) / 3).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    close(step.values, expected)


@pytest.mark.parametrize("clip", [None, 0.01])
def test_a_device_is_asked_for_numbers_no_oftener_in_deeper_models(clip):
    class Asked(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    def asked(depth):
        torch.manual_seed(0)
        model = nn.Sequential(*[layer for _ in range(depth) for layer in (nn.Linear(6, 6), nn.Tanh())])
        x, y = torch.randn(4, 6), torch.tensor([0, 1, 2, 3])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        validation = {"validation": lambda: loss_of(model, x, y)}
        tracker = inrun.track(model, optimizer, "path_secant", **validation, clip=clip, check=False)
        for _ in range(2):
            with Asked() as mode, tracker.step(range(4)):
                loss_of(model, x, y).backward()
                if clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()
                optimizer.zero_grad()
        return mode.count

    assert asked(5) == asked(2)


class Dropped(nn.Module):
    """No rule knows it, and it is another function in evaluation."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(2, 12))

    def forward(self, x):
        return F.dropout(x.tanh(), 0.5, self.training) * self.scale.sum(0)


def test_scoring_runs_modules_in_the_mode_of_their_step_and_writes_no_statistics():
    def trained(method="secant", leaves_eval=False):
        model, (x, y), validation = make("mlp"), data("mlp"), data("mlp", 4, 2)
        model.net[1], model.net[2] = Dropped(), nn.BatchNorm1d(12)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2)

        def held():
            loss = loss_of(model.eval(), *validation)
            model.train(not leaves_eval)
            return loss

        tracker = inrun.track(model, optimizer, method, validation=held)
        with tracker.step(range(B)) as step:
            torch.manual_seed(5)
            loss_of(model.train(), x, y).backward()
            optimizer.step()
        return step.values.double(), model.state_dict()

    plain, expected = trained("first")[1], trained()[0]
    found, after = trained(leaves_eval=True)
    assert all(
        torch.equal(v, plain[k]) for k, v in after.items() if k.startswith("net.2.running") or "num_batches" in k
    )
    close(found, expected, 1e-6)


def test_several_targets_score_as_each_alone():
    def values(names):
        model = make("gpt_tied")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = {
            "code": lambda: loss_of(model, *data("gpt", 4, 2)),
            "prose": lambda: loss_of(model, *data("gpt", 3, 3)),
        }
        tracker = inrun.track(model, optimizer, "path_secant", validation={n: losses[n] for n in names})
        for _ in range(2):
            with tracker.step(range(B)) as step:
                loss_of(model, *data("gpt")).backward()
                optimizer.step()
                optimizer.zero_grad()
        return step.values

    both = values(("code", "prose"))
    assert both.shape == (B, 2)
    for m, name in enumerate(("code", "prose")):
        close(both[:, m], values((name,)).double())


def test_coefficients_are_written_block_by_block_for_every_target(monkeypatch):
    def values(names):
        model = make("gpt_tied")
        loss = lambda: loss_of(model, *data("gpt", 4, 2))  # noqa: E731
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tracker = inrun.track(model, optimizer, "secant", validation=dict.fromkeys(names, loss))
        with tracker.step(range(B)) as step:
            loss_of(model, *data("gpt")).backward()
            optimizer.step()
        return step.values

    whole = values(["code"])
    monkeypatch.setattr("inrun.directions._BLOCK", 16)
    close(values(["code", "same"]), torch.stack([whole, whole], 1).double())


@pytest.mark.parametrize("method", ["first", "second", "path", "path_secant", "monte_carlo"])
def test_a_parameter_that_is_frozen_for_a_step_earns_nothing_in_it_and_has_its_part_after_it(method):
    """Its gradient is left over, of zeros, with which its optimizer may move it."""
    model, (x, y), (vx, vy) = make("mlp").double(), data("mlp"), data("mlp", 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
    every = 3 if method in ("first", "path") else 1
    tracker = inrun.track(
        model, optimizer, method, validation=lambda: loss_of(model, vx.double(), vy), validate_every=every
    )
    val: dict[str, torch.Tensor] = {}
    for free in (True, False, True):
        model.net[0].weight.requires_grad_(free)
        model.head.bias.requires_grad_(free)
        plain = make("mlp")
        plain.load_state_dict(model.state_dict())
        val = val or gradient(plain, vx, vy)
        plain.net[0].weight.requires_grad_(free)
        plain.head.bias.requires_grad_(free)
        rows = sample_gradients(plain, x, y)
        before = loss_of(model, vx.double(), vy)
        with tracker.step(range(B)) as step:
            loss_of(model, x.double(), y).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=False)
        if every > 1:
            close(step.values, torch.stack([sum((0.02 * val[n] * row[n]).sum() for n in row) for row in rows]))
        else:
            drop = (before - loss_of(model, vx.double(), vy)).detach()
            torch.testing.assert_close(step.values.double().sum(), drop, rtol=2e-2, atol=0.0)


def test_clipping_is_part_of_the_path():
    """Values are the Shapley value of the clipped step, to the rounding of few samples, and add up to the move."""
    model = make("mlp").double()
    x, y = data("mlp")
    x = x.double()
    validation = (data("mlp", 4, 2)[0].double(), data("mlp", 4, 2)[1])
    rows = sample_gradients(model, x, y)
    flat = torch.stack([torch.cat([g.flatten() for g in row.values()]) for row in rows])
    whole = flat.sum(0)
    norm, clip, lr = whole.norm(), 0.05, 0.4
    assert norm > 2 * clip
    validation_gradient = torch.cat([g.flatten() for g in gradient(model, *validation).values()])

    def worth(members):
        g = torch.from_numpy(members).double() @ flat
        return (lr * g * min(1.0, clip / (g.norm() + 1e-9)) @ validation_gradient).item()

    expected = torch.from_numpy(shapley.exact(worth, B)[0])

    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *validation), clip=clip)
    with tracker.step(range(B)) as step:
        loss_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    close(step.values, expected, 0.04)
    torch.testing.assert_close(step.values.sum().double(), expected.sum(), rtol=1e-4, atol=1e-9)
    tracker.close()

    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *validation), clip=clip,
                          exclude=["net.*"])  # fmt: skip
    refused = pytest.raises(inrun.InRunError, match=r"over the tracked parameters together, got .* 0\.05 with the excl")
    with refused, tracker.step(range(B)):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()


def test_a_users_update_rule_stands_for_its_optimizer():
    def rule(grad, param, state, group):
        m = state.get("exp_avg", torch.zeros_like(param))
        b1 = group["betas"][0]
        sign = torch.sign(b1 * m + (1 - b1) * grad)
        return -group["lr"] * (sign + group["weight_decay"] * param)

    found = [
        scored_step("mlp", "path", lambda p: Lion(p, lr=0.01, weight_decay=0.01), update=update)[0].values
        for update in ("elementwise", rule)
    ]
    close(found[0], found[1].double(), 1e-3)


def test_the_check_names_what_bypasses_its_module():
    model = Bypass()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = data("attention")
    tracker = inrun.track(model, optimizer, "secant", validation=lambda: loss_of(model, x, y))
    with pytest.raises(inrun.InRunError, match=r"a\.weight"), tracker.step(range(B)):
        loss_of(model, x, y).backward()
        optimizer.step()


def test_bad_input_and_what_is_not_supported_is_clear():
    model = make("mlp")
    sgd, lion = torch.optim.SGD(model.parameters(), lr=0.1), Lion(model.parameters())
    adam = torch.optim.Adam(model.parameters())
    loss = lambda: loss_of(model, *data("mlp"))  # noqa: E731
    with pytest.raises(inrun.InRunError, match="expected validation=<callable>"):
        inrun.track(model, sgd, "second")
    with pytest.raises(inrun.InRunError, match=r"expected torch\.optim\.SGD, got Adam"):
        inrun.track(model, adam, "second", validation=loss)
    with pytest.raises(inrun.InRunError, match="update='elementwise'"):
        inrun.track(model, lion, "path", validation=loss)
    with pytest.raises(ValueError, match="validate_every: expected 1"):
        inrun.track(model, sgd, "secant", validate_every=2)
    with pytest.raises(ValueError, match="keep: expected 'device' or 'host', got 'disk'"):
        inrun.track(model, sgd, "secant", keep="disk")
    for clip in (0.0, -1.0, math.nan, "1"):
        with pytest.raises(ValueError, match=r"clip: expected a number above 0 or None, got"):
            inrun.track(model, sgd, "path", clip=clip)

    tracker = inrun.track(model, sgd, "secant")
    with tracker.validation():
        loss().backward()
    x, y = data("mlp")
    with tracker.step(range(B)):
        loss_of(model, x, y).backward()
        sgd.step()
        sgd.zero_grad()
    x.zero_()  # as a loop does that has one buffer for all of its batches
    refused = pytest.raises(inrun.InRunError, match=r"net\.0: expected its input to stay as it was")
    with refused, tracker.validation():
        loss().backward()
    with tracker.step(range(B)):
        loss().backward()
        sgd.step()
        sgd.zero_grad()
    with pytest.warns(UserWarning, match="step 1 has no values"):
        tracker.close()


def test_a_hessian_by_differences_stands_in_where_an_operation_has_no_second_derivative(monkeypatch):
    def attention(kernel):
        def run(x):
            q = x.view(len(x), 1, 3, -1)
            return kernel(q, q, q).reshape(x.shape)

        return run

    def fused(q, k, v):  # whose backward has no derivative
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v)[0]

    calls = []
    original = hessian._by_differences
    monkeypatch.setattr(hessian, "_by_differences", lambda *a: calls.append(a[3:]) or original(*a))

    def values(function):
        model = make("mlp")
        model.net[1] = Apply(function)
        made = scored_step("mlp", "second", lambda p: torch.optim.SGD(p, lr=0.3), model=model, dtype=torch.float64)
        return made[0].values

    found = values(attention(fused))
    assert calls == [()]
    close(found, values(attention(F.scaled_dot_product_attention)).double(), 1e-5)
    assert calls[1:] == [(0.05,), (0.2,)]  # the first step's check


class HidesItsDerivative(torch.autograd.Function):
    """A loss that makes its gradient in its forward, as fused cross-entropies do."""

    @staticmethod
    def forward(ctx, logits, y):
        ctx.save_for_backward((logits.softmax(1) - F.one_hot(y, logits.shape[1])) / len(y))
        return F.cross_entropy(logits, y)

    @staticmethod
    def backward(ctx, grad):
        return ctx.saved_tensors[0] * grad, None


class IsDifferentiatedOnce(HidesItsDerivative):
    backward = staticmethod(once_differentiable(lambda ctx, grad: (ctx.saved_tensors[0] * grad, None)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("loss", [HidesItsDerivative, IsDifferentiatedOnce, None])
def test_a_hidden_second_derivative_is_an_error(loss, dtype):
    model = make("mlp").to(dtype)
    (x, y), (val_x, val_y) = data("mlp"), data("mlp", 4, 2)
    function = F.cross_entropy if loss is None else loss.apply
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    tracker = inrun.track(model, optimizer, "second", validation=lambda: function(model(val_x.to(dtype)), val_y))
    refused = pytest.raises(inrun.InRunError, match="method 'second': the Hessian of 'validation' by double backward")
    with contextlib.nullcontext() if loss is None else refused, tracker.step(range(B)):
        F.cross_entropy(model(x.to(dtype)), y).backward()
        optimizer.step()


class TanhOnce(torch.autograd.Function):
    """Whose backward has no derivative."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.tanh())
        return x.tanh()

    @staticmethod
    def backward(ctx, grad):
        return Times.apply(grad, 1 - ctx.saved_tensors[0].square())


class Times(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        return x * y

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError("not implemented")


@pytest.mark.parametrize("half", ["autocast", "a layer's weights", "nothing"])
def test_differences_are_as_large_as_half_precision_sees(half):
    """Smaller ones are rounded away, and with them the second order: what is left of it is noise."""
    x, y = torch.randn(14, 16, generator=torch.Generator().manual_seed(1)), torch.arange(14) % 8

    def values(method, twice=True, dtype=torch.float64, autocast=False, halved=False):
        torch.manual_seed(0)
        layers = nn.ModuleList([nn.Linear(16, 64), nn.Linear(64, 64), nn.Linear(64, 8)]).to(dtype)
        layers[1].to(torch.bfloat16 if halved else dtype)

        def loss(rows):
            h = x[rows].to(dtype)
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                for layer in layers:
                    h = layer((h.tanh() if twice else TanhOnce.apply(h)).to(layer.weight.dtype))
            bend = torch.func.grad(lambda h: h.sum())(h)  # takes no hooks
            return F.cross_entropy(h.to(dtype) * (bend if half == "nothing" else 1), y[rows])

        optimizer = torch.optim.SGD(layers.parameters(), lr=1.0)
        tracker = inrun.track(layers, optimizer, method, validation=lambda: loss(slice(6, 14)))
        with tracker.step(range(6)) as step:
            loss(slice(6)).backward()
            optimizer.step()
        return step.values.double()

    exact, first = values("second"), values("first")
    found = values("second", False, torch.float32, half == "autocast", half == "a layer's weights")
    assert (found - exact).norm() < (0.01 if half == "nothing" else 0.3) * (first - exact).norm()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("times", [0.02, 0.2])
def test_differences_are_the_cube_root_of_rounding_apart_whatever_the_size_of_the_step(times, dtype, monkeypatch):
    model, (x, y), moves, moved = make("mlp").to(dtype), data("mlp"), [], hessian.weights_moved
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1), "second",
                          validation=lambda: loss_of(model, x.to(dtype), y))  # fmt: skip

    def noted(slots, ranks, found, buffers):
        found = list(found)
        moves.append(math.sqrt(sum(move.square().sum().item() for _, move in found)))
        return moved(slots, ranks, found, buffers)

    monkeypatch.setattr(hessian, "weights_moved", noted)
    weight = math.sqrt(sum(p.detach().square().sum().item() for p in model.parameters()))
    with torch.no_grad():
        for size in (1e-3, 7.0):
            vector = [torch.full_like(slot.shard, size) for slot in tracker.slots]
            hessian._by_differences(tracker, "validation", vector, times)
    assert moves == pytest.approx([times * torch.finfo(dtype).eps ** (1 / 3) * (1 + weight)] * 4, rel=1e-4)
    still = [torch.zeros_like(slot.shard) for slot in tracker.slots]
    assert hessian._by_differences(tracker, "validation", still, times) == [None] * len(still)


def test_differences_that_do_not_agree_themselves_tell_nothing_of_the_hessian(monkeypatch):
    of_sizes = {0.05: [torch.tensor([1.0, 0.0])], 0.2: [torch.tensor([1.0, 0.3])]}
    monkeypatch.setattr(hessian, "_by_differences", lambda tracker, name, vector, times: of_sizes[times])
    vector, found = [torch.zeros(2)], [torch.tensor([2.0, 0.0])]
    hessian._check(None, "validation", vector, found)
    of_sizes[0.2] = of_sizes[0.05]
    with pytest.raises(inrun.InRunError, match="is 100% off differences"):
        hessian._check(None, "validation", vector, found)


class Apply(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def cancelling(kind):
    """A head of zeros and balanced labels: the bias's gradient is zero, each sample's is not."""
    torch.manual_seed(0)
    model = nn.Linear(5, 2).double()
    for p in model.parameters():
        nn.init.zeros_(p)
    x, y = torch.randn(4, 5, dtype=torch.float64), torch.tensor([0, 1, 0, 1])
    validation = torch.randn(6, 5, dtype=torch.float64), torch.tensor([0, 0, 0, 0, 0, 1])
    if kind != "sgd":  # whose slope at no gradient is that of the steps before
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=kind == "rest")
        for t in range(20):
            generator = torch.Generator().manual_seed(t)
            for p in model.parameters():
                p.grad = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64)
            optimizer.step()
        optimizer.zero_grad()
        for p in model.parameters():
            nn.init.zeros_(p)
        if kind == "rest":  # there were no gradients of the bias, and now there is the rounding of one
            for name in ("exp_avg", "exp_avg_sq"):
                optimizer.state[model.bias][name].zero_()
            nn.init.constant_(model.bias[:1], 1e-13)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)
    return model, optimizer, x, y, validation


@pytest.mark.parametrize("method", ["path", "path_secant", "path_simpson"])
@pytest.mark.parametrize("kind", ["sgd", "adam", "rest"])
def test_samples_whose_gradients_cancel_have_the_value_that_each_has(kind, method):
    model, optimizer, x, y, validation = cancelling(kind)
    copied, held = copy.deepcopy((model, optimizer))

    def utility(members):
        other, stepped = copy.deepcopy((copied, held))
        (F.cross_entropy(other(x[members]), y[members], reduction="sum") / len(y)).backward()
        stepped.step()
        return -F.cross_entropy(other(validation[0]), validation[1]).item()

    exact = torch.from_numpy(shapley.exact(utility, 4)[0])
    tracker = inrun.track(
        model, optimizer, method, validation=lambda: F.cross_entropy(model(validation[0]), validation[1])
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, enabled=kind == "rest")
    with tracker.step(range(4)) as step:
        scaler.scale(F.cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)
    error = (step.values.double() - exact).norm() / exact.norm()
    within = {"adam": 0.05, "rest": 0.4}  # of the vote on a sign the path knows little
    assert error < within.get(kind, 0.2 if method == "path" else 0.05)
    if method == "path" and kind == "sgd":  # along the gradient at the start, exact
        start = torch.autograd.grad(F.cross_entropy(copied(validation[0]), validation[1]), list(copied.parameters()))
        rows = [
            torch.autograd.grad(F.cross_entropy(copied(x[[i]]), y[[i]]) / 4, list(copied.parameters()))
            for i in range(4)
        ]
        lr = 0.5 * 1.9  # Nesterov's first step
        close(step.values, torch.stack([lr * sum((d * g).sum() for d, g in zip(start, row, strict=True))
                                        for row in rows]), 1e-6)  # fmt: skip


def clipped_step(norm, **options):
    model, (x, y), validation = make("mlp"), data("mlp"), data("mlp", 4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *validation), **options)
    for _ in range(2):
        with tracker.step(range(B)) as step:
            loss_of(model, x, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), *norm)
            optimizer.step()
            optimizer.zero_grad()
    return step.values


def test_clipping_to_another_norm_or_without_a_word_is_seen():
    clipped_step((0.05,), clip=0.05)
    with pytest.warns(UserWarning, match=r"clip: gradients of the norm .* not the norm 0\.06\. .* say to which"):
        clipped_step((0.05,), clip=0.06)
    with pytest.warns(UserWarning, match=r"say to which: track\(\.\.\., clip=max_norm\)") as said:
        clipped_step((0.05,))
    assert len(said) == 1
    for norm in ((0.05,), (0.05, math.inf)):
        with pytest.raises(inrun.InRunError, match=r"clip: expected gradients of at most the norm 0\.0\d, got"):
            clipped_step(norm, clip=0.05 if len(norm) > 1 else 0.04)


@pytest.mark.filterwarnings("error")
def test_what_is_no_clipping_needs_no_word():
    clipped_step((1e6,))
    clipped_step((1e6,), clip=1e6)
    model, (x, y), validation = make("mlp"), data("mlp"), data("mlp", 4, 2)
    for clip, scale, times in ((None, 3, 1 / 3), (None, 1, 1 / 3), (1e6, 1, 1 / 3), (None, 1, 2.5)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *validation), clip=clip)
        with tracker.step(range(B)):
            (scale * loss_of(model, x, y)).backward()
            for p in model.parameters():
                p.grad *= times
            optimizer.step()
            optimizer.zero_grad()
        tracker.close()


def test_an_update_that_is_not_the_optimizers_is_seen():
    def values(update):
        step = scored_step("mlp", "path", lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), update=update)[0]
        return step.values.double()

    def right(grad, param, state, group):
        return -group["lr"] * (group["momentum"] * state["momentum_buffer"] + grad)

    expected = values(None)
    with pytest.warns(UserWarning, match="update: expected what the step adds to a parameter, to net.0.weight by SGD"):
        assert not torch.allclose(values(lambda *given: -right(*given)), expected)
    with pytest.warns(UserWarning, match="update: expected what the step adds"):
        values(lambda grad, param, *rest: param + right(grad, param, *rest))
    close(values(right), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [nn.LayerNorm, nn.RMSNorm])
def test_a_norm_in_halves_is_scored_as_exactly_as_in_the_backward(kind, dtype):
    torch.manual_seed(0)
    x, grad, of_validation = (torch.randn(4, 8, 64).to(dtype) for _ in range(3))
    found = []
    for method in ("first", "path"):
        model = nn.Sequential(kind(64)).to(dtype)
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        loss = lambda m=model: (m(x).float() * of_validation.float()).sum()  # noqa: E731
        tracker = inrun.track(model, optimizer, method, validation=loss)
        with tracker.step(range(4)) as step:
            (model(x) * grad).sum().backward()
            optimizer.step()
        tracker.close()
        found.append(step.values)
    assert (found[0] - found[1]).abs().max() < 1e-5 * found[0].abs().max()


@pytest.mark.parametrize("warm", [0, 20])
def test_a_parameter_of_tiny_gradients_moves_as_adam_has_it(warm, monkeypatch):
    """Nothing cancels there: its values are those of its own update."""
    monkeypatch.setattr(turning, "TURNS", 1.0)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.large, self.small = nn.Linear(4, 2), nn.Linear(4, 2)

        def forward(self, x, times=1e-7):
            return self.large(x) + times * self.small(x)

    model = Two()
    x, y = torch.randn(B, 4, dtype=torch.float64), torch.randint(2, (B,))
    model = model.double()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, eps=1e-30)
    for _ in range(warm):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    tracker = inrun.track(model, optimizer, "path_secant", validation=lambda: F.cross_entropy(model(x[:3], 1.0), y[:3]))
    with tracker.step(range(B)) as step:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    assert step.values.sum().item() == pytest.approx(step.drop["validation"].item(), rel=1e-4)


def test_rounding_to_16_bits_is_no_other_clipping():
    model = make("mlp").bfloat16()
    x, y = data("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    validation = data("mlp", 4, 2)
    tracker = inrun.track(model, optimizer, "path", clip=0.05,
                          validation=lambda: loss_of(model, validation[0].bfloat16(), validation[1]))  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(8):
            with tracker.step(range(B)):
                loss_of(model, x.bfloat16(), y).backward()
                nn.utils.clip_grad_norm_(model.parameters(), 0.05)
                optimizer.step()
                optimizer.zero_grad()


def test_a_hook_that_changes_an_outputs_gradient_is_seen():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    x, y, others = torch.randn(B, 4), torch.randint(3, (B,)), (torch.randn(3, 4), torch.randint(3, (3,)))

    def loss(x, y, reduction="mean"):
        hidden = model[0](x)
        if hidden.requires_grad:
            hidden.register_hook(lambda g: g.clamp(-0.02, 0.01))
        return F.cross_entropy(model[2](model[1](hidden)), y, reduction=reduction)

    params = list(model.parameters())
    g_v = torch.autograd.grad(loss(*others), params)
    rows = [torch.autograd.grad(loss(x[[b]], y[[b]], "sum") / B, params) for b in range(B)]
    expected = torch.stack([0.1 * sum((a * b).sum() for a, b in zip(g_v, row, strict=True)) for row in rows])
    optimizer = torch.optim.SGD(params, lr=0.1)
    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss(*others))
    with tracker.step(range(B)) as step:
        loss(x, y).backward()
        optimizer.step()
        optimizer.zero_grad()
    close(step.values, expected.double())


@pytest.mark.parametrize("method", ["path_secant", "path_simpson"])
def test_a_target_that_the_step_moves_nothing_of_is_worth_nothing(method):
    torch.manual_seed(0)
    model = nn.ModuleDict({"one": nn.Linear(4, 3), "other": nn.Linear(4, 3)})
    x, y = torch.randn(B, 4), torch.randint(3, (B,))
    losses = {name: lambda head=head: F.cross_entropy(head(x), y) for name, head in model.items()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, method, validation=losses)
    with tracker.step(range(B)) as step:
        losses["one"]().backward()
        optimizer.step()
    assert step.drop["one"] > 0 and step.drop["other"] == 0
    assert step.values[:, 0].sum().item() == pytest.approx(step.drop["one"].item(), rel=1e-3)
    assert (step.values[:, 1] == 0).all()


@pytest.mark.parametrize("method", ["path", "path_secant", "path_simpson"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Muon, torch.optim.Adafactor])
def test_a_batch_whose_loss_counts_nothing_is_worth_nothing(kind, method):
    model, (x, y), validation = nn.Linear(8, 13, bias=False), data("mlp"), data("mlp", 4, 2)
    optimizer = kind(model.parameters(), lr=0.01)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *validation))
    with tracker.step(range(B)) as step:
        (0 * loss_of(model, x, y)).backward()
        optimizer.step()
    assert step.values.tolist() == [0.0] * B


@pytest.mark.parametrize("method", ["path", "monte_carlo"])
@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.Adafactor])
def test_a_schedule_is_no_part_of_the_update(kind, method):
    def values(scheduled):
        model, (x, y), validation = make("mlp"), data("mlp"), data("mlp", 4, 2)
        optimizer = kind(model.parameters(), lr=0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0) if scheduled else None
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *validation))
        with tracker.step(range(B)) as step:
            loss_of(model, x, y).backward()
            optimizer.step()
        del schedule
        return step.values

    assert values(False).abs().min() > 0
    assert torch.equal(values(True), values(False))


def test_the_last_validation_loss_of_second_is_that_of_the_weights_the_step_began_with():
    model = make("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, "second", validation=lambda: loss_of(model, *data("mlp", 4, 2)))
    for _ in range(2):
        with torch.no_grad():
            before = loss_of(model, *data("mlp", 4, 2))
        with tracker.step(range(B)):
            loss_of(model, *data("mlp")).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert tracker.last_validation["validation"] == before


@pytest.mark.parametrize("method", ["second", "secant", "path", "path_secant"])
def test_a_batch_that_is_computed_again_is_checked_as_well(method):
    model, (x, y) = Bypass(), data("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = lambda: loss_of(model, x, y)  # noqa: E731
    tracker = inrun.track(model, optimizer, method, validation=loss, through={})
    with (
        pytest.raises(inrun.InRunError, match=r"do not add up .*\n  a\.weight"),
        tracker.step(range(B), recompute=loss),
    ):
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["path", "path_secant"])
def test_batches_of_any_size_may_be_computed_again(method):
    """The second step's first batch is of one sample, which is no row of all the others."""

    def values(again):
        model = make("mlp")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *data("mlp", 4, 2)))
        found = []
        for sizes in ((3, 3), (1, 3)):
            with tracker.step() as step:
                for k, size in enumerate(sizes):
                    x, y = data("mlp", size, k)
                    loss = lambda x=x, y=y: loss_of(model, x, y) / 2  # noqa: E731
                    step.batch([f"{k}-{i}" for i in range(size)], recompute=loss if again else None)
                    loss().backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append(step.values)
        return torch.cat(found)

    close(values(True), values(False).double())


def test_a_layer_may_be_left_out_of_a_batch_that_is_computed_again():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    x, optimizer = torch.randn(2, 3, 4), torch.optim.SGD(model.parameters(), lr=0.1)

    def loss(i):
        h = model["a"](x[i])
        return (h if i == 0 else model["b"](h.tanh())).square().mean()

    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss(1))
    with tracker.step() as step:
        for i in range(2):
            step.batch(range(3 * i, 3 * i + 3), recompute=lambda i=i: loss(i))
            loss(i).backward()
        optimizer.step()
    assert (step.values != 0).all()


class Centred(nn.Module):
    """Centres by a running mean, or one that it is given, and scales."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(4))
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x, given=None):
        if given is None and self.training:
            with torch.no_grad():
                self.mean.lerp_(x.mean(0), 0.5)
        return (x - (self.mean if given is None else given)) * self.gain


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("path", torch.optim.SGD, {}),
        ("path", torch.optim.AdamW, {}),
        ("path", torch.optim.SGD, {"clip": 0.05}),
        ("path_secant", torch.optim.SGD, {"pairwise": range(4)}),
        ("monte_carlo", torch.optim.SGD, {}),
    ],
)
def test_a_module_runs_again_with_the_buffers_that_it_had(method, kind, options):
    """In each of the step's batches, and in the validation loss: as where they come with its input."""

    def values(given):
        torch.manual_seed(0)
        model = nn.ModuleDict({"in": nn.Linear(4, 4), "centred": Centred(), "out": nn.Linear(4, 3)}).double()
        x, y, mean = torch.randn(4, 4).double() + 1, torch.tensor([0, 1, 2, 0]), torch.zeros(4).double()

        def loss(rows, targets):
            h = model["in"](rows)
            if given and model.training:
                mean.lerp_(h.detach().mean(0), 0.5)
            h = model["centred"](h, mean.expand(len(rows), -1).clone() if given else None)
            return F.cross_entropy(model["out"](h.tanh()), targets)

        def validation():
            model.eval()
            found = loss(x.flip(1), y)
            model.train()
            return found

        optimizer = kind(model.parameters(), lr=1e-2)
        tracker = inrun.track(model, optimizer, method, validation=validation, **options)
        found = []
        for _ in range(2):
            with tracker.step() as step:
                for part in torch.arange(4).split(2):
                    step.batch(part)
                    (loss(x[part], y[part]) / 2).backward()
                if options.get("clip"):
                    nn.utils.clip_grad_norm_(model.parameters(), options["clip"])
                optimizer.step()
                optimizer.zero_grad()
            found.append(step.values)
        return torch.stack(found), model["centred"].mean if not given else mean

    for own, given in zip(values(False), values(True), strict=True):
        torch.testing.assert_close(own, given, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(
    ("method", "optimizer", "options"),
    [
        ("path", torch.optim.AdamW, {}),
        ("path", torch.optim.SGD, {"clip": 0.1}),
        ("first", torch.optim.SGD, {"pairwise": [0, 1]}),
        ("path_secant", torch.optim.SGD, {"pairwise": [0, 1]}),
        ("monte_carlo", torch.optim.SGD, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_gradients_of_samples_where_parts_are_checkpointed_or_have_no_parameters(method, optimizer, options, reentrant):
    """Of a class token beside a checkpointed block, which returns its input too."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.inner = nn.Parameter(torch.ones(4)), nn.Linear(4, 4)

        def forward(self, x):
            return x + F.gelu(self.inner(x)) * self.gain, x

    class Model(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.token, self.block, self.head = nn.Parameter(torch.randn(1, 1, 4)), Block(), nn.Linear(4, 3)
            self.how = how

        def forward(self, x):
            z = torch.cat([self.token.expand(len(x), -1, -1), x], 1)
            z, skip = self.block(z) if self.how is None else checkpoint(self.block, z, use_reentrant=self.how)
            return self.head((z + skip.tanh()).mean(1))

    def values(how):
        torch.manual_seed(0)
        model = Model(how).double()
        updates = optimizer(model.parameters(), lr=0.05)
        x, y = torch.randn(5, 2, 4).double(), torch.tensor([0, 1, 2, 0, 1])
        tracker = inrun.track(
            model, updates, method, validation=lambda: F.cross_entropy(model(x[3:]), y[3:]), **options
        )
        with tracker.step(range(3)) as step:
            F.cross_entropy(model(x[:3]), y[:3]).backward()
            if "clip" in options:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            updates.step()
        return step.values

    found = values(reentrant)
    assert (found != 0).all()
    torch.testing.assert_close(found, values(None))


@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("path", torch.optim.AdamW, {}),
        ("path", torch.optim.SGD, {"clip": 0.1}),
        ("first", torch.optim.SGD, {"pairwise": [0, 1]}),
        ("monte_carlo", torch.optim.SGD, {}),
    ],
)
def test_gradients_of_samples_through_a_module_that_returns_its_input_too(method, kind, options):
    class Mix(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain = nn.Parameter(torch.full((4,), 0.7))

        def forward(self, x, both):
            y = (x.sin() * self.gain).cumsum(-1)
            return (y, x) if both else y

    def values(both):
        torch.manual_seed(0)
        model = nn.ModuleDict({"in": nn.Linear(4, 4), "mix": Mix(), "out": nn.Linear(4, 3)}).double()
        optimizer = kind(model.parameters(), lr=0.05)
        x, y = torch.randn(5, 4).double(), torch.tensor([0, 1, 2, 0, 1])

        def loss(rows):
            z = model["in"](x[rows])
            h, skip = model["mix"](z, True) if both else (model["mix"](z, False), z)
            return F.cross_entropy(model["out"](h + skip.tanh()), y[rows])

        tracker = inrun.track(model, optimizer, method, validation=lambda: loss(slice(3, 5)), **options)
        with tracker.step(range(3)) as step:
            loss(slice(3)).backward()
            if "clip" in options:
                nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        return step.values

    torch.testing.assert_close(values(True), values(False))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_secant_in_a_warm_up_from_a_rate_of_zero(kind):
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3), torch.randn(5, 4)
    optimizer = kind(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    tracker = inrun.track(model, optimizer, "secant", validation=lambda: model(x[3:]).square().mean())
    for number in range(2):
        with tracker.step(range(3)) as step:
            model(x[:3]).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
        assert step.values.isfinite().all() and (step.values != 0).all() == bool(number)


@pytest.mark.filterwarnings("ignore:None of the inputs")
def test_second_order_of_a_loss_with_a_reentrant_checkpoint():
    """By differences."""

    def values(how):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        optimizer, x = torch.optim.SGD(model.parameters(), lr=0.1), torch.randn(5, 4).double()

        def loss(rows):
            h = model[0](rows)
            return model[2](model[1](h) if how is None else checkpoint(model[1], h, use_reentrant=how)).square().mean()

        tracker = inrun.track(model, optimizer, "second", validation=lambda: loss(x[3:]))
        with tracker.step(range(3)) as step:
            loss(x[:3]).backward()
            optimizer.step()
        return step.values

    torch.testing.assert_close(values(True), values(None), rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_second_order_of_a_weight_norm(seed):
    """Whose double backward is wrong in torch."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(8, 3))).double()
    optimizer, x, y = torch.optim.SGD(model.parameters(), lr=0.5), torch.randn(6, 4).double(), torch.arange(6) % 3
    params = list(model.parameters())

    def slopes(rows, reduction="mean"):
        return torch.autograd.grad(F.cross_entropy(model(x[rows]), y[rows], reduction=reduction), params)

    ones = [[g / 3 for g in slopes([k])] for k in range(3)]
    middle = [-0.25 * sum(g) for g in zip(*ones, strict=True)]  # halfway along the step
    ends = []
    for sign in (1, -1):
        with torch.no_grad():
            for p, d in zip(params, middle, strict=True):
                p.add_(sign * 1e-4 * d)
        ends.append(slopes([3, 4, 5]))
        with torch.no_grad():
            for p, d in zip(params, middle, strict=True):
                p.sub_(sign * 1e-4 * d)
    along = [g + (a - b) / 2e-4 for g, a, b in zip(slopes([3, 4, 5]), *ends, strict=True)]
    expected = torch.stack([0.5 * sum((d * g).sum() for d, g in zip(along, one, strict=True)) for one in ones])
    tracker = inrun.track(model, optimizer, "second", validation=lambda: F.cross_entropy(model(x[3:]), y[3:]))
    with tracker.step(range(3)) as step:
        F.cross_entropy(model(x[:3]), y[:3]).backward()
        optimizer.step()
    torch.testing.assert_close(step.values.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("shape", "dim"), [((5,), 0), ((5,), -1), ((4, 3), 0), ((4, 3), 1), ((4, 3), -1), ((2, 3, 4), 1), ((2, 3, 4), -2)]
)
def test_a_weight_norm_written_out_is_torchs(shape, dim):
    v = torch.randn(shape, dtype=torch.float64)
    g = 1 + torch.norm_except_dim(v, 2, dim)
    torch.testing.assert_close(forward_mode.weight_norm(v, g, dim), torch._weight_norm(v, g, dim))


@pytest.mark.parametrize("method", ["path", "monte_carlo"])
@pytest.mark.parametrize("kind", [nn.Parameter, type("Target", (nn.Parameter,), {})])
def test_a_frozen_weight_that_moves_after_the_update_is_scored_as_it_was(kind, method):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.target, self.scale = kind(torch.randn(8, 8), requires_grad=False), nn.Parameter(torch.ones(8))

        def forward(self, x):
            return torch.tanh(x @ self.target * self.scale)

    values, x = [], torch.randn(5, 8)
    for moves in (False, True):
        torch.manual_seed(0)
        model = Scaled()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = inrun.track(model, optimizer, method, validation=lambda m=model: m(x[:2]).square().mean())
        with tracker.step(range(5)) as step:
            model(x).square().mean().backward()
            optimizer.step()
            if moves:
                with torch.no_grad():
                    model.target.mul_(2.0)
        values.append(step.values)
    torch.testing.assert_close(*values)


def test_padding_counted_from_the_end_has_no_tangent():
    with forward_ad.dual_level(), forward_mode._AsBackward(None):
        table = forward_ad.make_dual(torch.ones(5, 2), torch.ones(5, 2))
        tangent = forward_ad.unpack_dual(F.embedding(torch.tensor([0, 3]), table, -2)).tangent
    assert tangent.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_second_order_of_a_compiled_model():
    """Whose graphs have no second derivative."""
    found, x, y = [], torch.randn(6, 8).double(), torch.arange(6) % 3
    for compiled in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        runs = torch.compile(model, backend="aot_eager") if compiled else model
        tracker = inrun.track(model, optimizer, "second", validation=lambda r=runs: F.cross_entropy(r(x[3:]), y[3:]))
        for _ in range(2):
            with tracker.step(range(3)) as step:
                F.cross_entropy(runs(x[:3]), y[:3]).backward()
                optimizer.step()
                optimizer.zero_grad()
        found.append(step.values)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_second_order_of_a_weight_norm_in_a_checkpoint():
    """Which runs again as torch has it, while differences tell of the Hessian."""
    found = []
    for through in (lambda part, x: part(x), lambda part, x: checkpoint(part, x, use_reentrant=False)):
        torch.manual_seed(0)
        normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)).double()
        head = nn.Linear(8, 3).double()
        model = nn.ModuleList([normed, head])
        optimizer, x, y = torch.optim.SGD(model.parameters(), lr=0.5), torch.randn(6, 8).double(), torch.arange(6) % 3

        def loss(rows, normed=normed, head=head, x=x, y=y, through=through):
            return F.cross_entropy(head(through(normed, x[rows]).tanh()), y[rows])

        tracker = inrun.track(model, optimizer, "second", validation=lambda loss=loss: loss(slice(3, 6)))
        with tracker.step(range(3)) as step:
            loss(slice(3)).backward()
            optimizer.step()
        found.append(step.values)
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-7)


def test_a_step_whose_loss_bends_leaves_its_last_validation_gradient_to_the_next():
    """The weights were elsewhere meanwhile, and are what they were."""
    torch.manual_seed(0)
    model, (x, held) = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), torch.randn(8, 4).split([3, 5])
    optimizer, calls, found = torch.optim.SGD(model.parameters(), lr=0.5), [], []

    def validation():
        calls.append(len(found))
        return (model(held).square() - 1).square().mean()

    tracker = inrun.track(model, optimizer, "path_secant", validation=validation)
    for _ in range(2):
        with tracker.step(range(3)) as step:
            model(x).exp().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append(step.values)
    assert calls == [0, 0, 0, 1]  # of the first step both ends and the middle


@pytest.mark.parametrize("many", [1, 2, 4])
def test_the_bound_on_secants_direction_takes_nothing_from_losses_that_do_not_bend(many):
    """There it is the first order's."""

    def values(method):
        torch.manual_seed(0)
        model, x = nn.Linear(3, many, bias=False), torch.randn(4, 3)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = {str(m): lambda m=m: model(x)[:, m].sum() for m in range(many)}
        tracker = inrun.track(model, optimizer, method, validation=losses)
        for _ in range(3):
            with tracker.step(range(4)) as step:
                model(x).sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        return step.values

    torch.testing.assert_close(values("secant"), values("first"))


@pytest.mark.parametrize("method", ["path", "secant", "path_secant"])
def test_a_batch_that_is_another_when_it_is_computed_again_is_an_error(method):
    """A name that the loop has given to the next batch by then, as where values wait for the next validation block."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    xs, y, held = torch.randn(4, 6, 5), torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 5)

    def run(late):
        tracker = inrun.track(model, optimizer, method)
        for k in range(3):
            x = xs[k]
            again = (lambda: F.cross_entropy(model(x), y)) if late else lambda x=x: F.cross_entropy(model(x), y)  # noqa: B023
            with tracker.validation():
                F.cross_entropy(model(held), y).backward()
            with tracker.step(range(6), recompute=again):
                F.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                if late and method == "path" and k == 1:
                    x = xs[3]
        tracker.close()

    run(late=False)
    with pytest.raises(inrun.InRunError, match="recompute: expected the loss of the batch as the step computed it"):
        run(late=True)


def test_a_loss_scale_that_grows_before_the_batch_is_computed_again_is_an_error():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y, held = torch.randn(6, 5), torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 5)

    def run(fixed):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        tracker = inrun.track(model, optimizer, "path", validation=lambda: F.cross_entropy(model(held), y))
        for _ in range(4):
            scale = scaler.get_scale()

            def again(scale=scale, scaler=scaler):
                loss = F.cross_entropy(model(x), y)
                return loss * scale if fixed else scaler.scale(loss)

            with tracker.step(range(6), recompute=again):
                scaler.scale(F.cross_entropy(model(x), y)).backward()
                scaler.step(optimizer)
                scaler.update()
                optimizer.zero_grad()
        tracker.close()

    run(fixed=True)
    with pytest.raises(inrun.InRunError, match=r"another scale \(scaler.update"):
        run(fixed=False)


def test_weights_that_the_block_moves_after_the_update_count_as_the_steps():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y, held = torch.randn(6, 5).double(), torch.tensor([0, 1, 2, 0, 1, 2]), torch.randn(6, 5).double()
    before = F.cross_entropy(model(held), y).item()
    tracker = inrun.track(model, optimizer, "path_secant", validation=lambda: F.cross_entropy(model(held), y))
    with tracker.step(range(6)) as step:
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        updated = F.cross_entropy(model(held).detach(), y).item()
        with torch.no_grad():
            for p in model.parameters():
                p.clamp_(-0.05, 0.05)
    tracker.close()
    after = F.cross_entropy(model(held), y).item()
    assert abs(after - updated) > 1e-3
    assert step.drop["validation"].item() == pytest.approx(before - after, rel=1e-9)


class Turned(nn.Module):
    """A loose matrix of the given name, and another."""

    def __init__(self, name):
        super().__init__()
        self.a, self.name = nn.Parameter(torch.randn(WIDTH, WIDTH) / 3), name
        self.register_parameter(name, nn.Parameter(torch.randn(WIDTH, WIDTH) / 3))

    def forward(self, x):
        return torch.tanh(x @ self.a) @ getattr(self, self.name)


@pytest.mark.parametrize("method", ["secant", "path"])
def test_a_parameter_may_be_called_a_direction(method):
    found = []
    for name in ("b", "b_direction"):
        torch.manual_seed(0)
        model, x, y = Turned(name).double(), *torch.randn(2, 7, WIDTH, dtype=torch.float64)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        tracker = inrun.track(model, optimizer, method, validation=lambda m=model, y=y: m(y).square().mean())
        with tracker.step(range(7)) as step:
            model(x).square().mean().backward()
            optimizer.step()
        found.append(step.values)
    assert found[0].abs().min() > 0 and torch.equal(*found)


@pytest.mark.parametrize("kind", ["trained", "frozen", "excluded", "buffer"])
@pytest.mark.parametrize("method", ["first", "secant"])
def test_a_direction_takes_nobodys_name(kind, method):
    found = []
    for name in ("b", "a_direction"):
        torch.manual_seed(0)
        model, x, y = Turned(name).double(), *torch.randn(2, 7, WIDTH, dtype=torch.float64)
        own = getattr(model, name)
        own.requires_grad_(kind != "frozen")
        if kind == "buffer":
            delattr(model, name)
            model.register_buffer(name, own.detach())
        expected, optimizer = list(model.state_dict()), torch.optim.SGD(model.parameters(), lr=0.5)
        exclude = [name] if kind == "excluded" else []
        loss = lambda m=model, y=y: m(y).square().mean()  # noqa: E731
        tracker = inrun.track(model, optimizer, method, validation=loss, exclude=exclude)
        with tracker.step(range(7)) as step:
            model(x).square().mean().backward()
            optimizer.step()
        found.append(step.values)
        assert list(model.state_dict()) == expected and getattr(model, name).shape == (WIDTH, WIDTH)
        tracker.close()
        assert list(model.state_dict()) == expected
    assert found[0].abs().min() > 0 and torch.equal(*found)


class Scaled(nn.Module):
    """Its model uses its number, and it that of a container inside."""

    def __init__(self):
        super().__init__()
        self.scale, self.inner = nn.Parameter(torch.tensor([1.5])), nn.ParameterList([torch.randn(WIDTH, WIDTH) / 3])

    def forward(self, x):
        return torch.tanh(x @ self.inner[0])


class Scaling(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = Scaled()

    def forward(self, x):
        return self.body(x) * self.body.scale


@pytest.mark.parametrize("method", ["first", "secant"])
def test_a_module_scores_what_is_inside_it_and_one_around_it_its_number(method):
    torch.manual_seed(0)
    model, x, y = Scaling().double(), *torch.randn(2, 7, WIDTH, dtype=torch.float64)
    names, classes, found = list(model.state_dict()), [type(m) for m in model.modules()], []
    for through in ({"body.scale": ""}, {"body.*": ""}):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.5)
        loss = lambda m=copied: (m(x) - y).square().mean()  # noqa: E731
        tracker = inrun.track(copied, optimizer, method, validation=loss, through=through)
        assert [tap.name for tap in tracker.taps] == (["", "body"] if len(found) == 0 else [""])
        assert list(copied.state_dict()) == names and list(copy.deepcopy(copied).state_dict()) == names
        with tracker.step(range(7)) as step:
            loss().backward()
            optimizer.step()
        found.append(step.values)
        tracker.close()
        assert list(copied.state_dict()) == names and [type(m) for m in copied.modules()] == classes
    torch.testing.assert_close(*found)


def test_what_is_inside_of_two_is_scored_by_the_one_that_is_not_there_for_its_number_alone():
    class Loose(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.weight, self.inner = nn.Parameter(torch.randn(WIDTH, WIDTH)), inner

        def forward(self, x):
            return self.inner((x @ self.weight).tanh())

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.scale, self.body = nn.Parameter(torch.ones(())), Loose(Loose(nn.Identity()))

        def forward(self, x):
            return self.scale * self.body(x)

    tracker = inrun.track(Model())
    found = {tap.name: tap.parameters for tap in tracker.taps}
    assert found == {"": ["scale"], "body": ["body.weight", "body.inner.weight"]}
