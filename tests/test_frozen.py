"""Parameters that are frozen for one of a step's forwards, as a GAN's discriminator is while its generator learns."""

import pytest
import torch
import torch.nn.functional as F
from models import WIDTH, Scale
from torch import nn

import inrun

LR, LABELS, LENGTH, NOISE = 0.01, 5, 3, 4


class Gate(nn.Module):
    """Two loose parameters, which forward-mode AD scores."""

    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Parameter(torch.randn(WIDTH)), nn.Parameter(torch.randn(WIDTH, WIDTH) / 3)

    def forward(self, x):
        return torch.sin(x * self.inner) @ self.outer


class Discriminator(nn.Module):
    """One module of each kind of rule."""

    def __init__(self):
        super().__init__()
        self.label, self.inner, self.norm = nn.Embedding(LABELS, WIDTH), nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.conv, self.scale = nn.Conv1d(LENGTH, LENGTH, 3, padding=1), Scale(WIDTH)
        self.gate, self.rms, self.head = Gate(), nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 1)

    def forward(self, x, label):
        x = self.norm(torch.tanh(self.inner(x + self.label(label)[:, None])))
        x = self.scale(self.conv(x + self.attention(x, x, x, need_weights=False)[0]))
        return self.head(self.rms(self.gate(x))).mean((1, 2))


class GAN(nn.Module):
    def __init__(self):
        super().__init__()
        self.judge = Discriminator()
        self.maker = nn.Sequential(nn.Linear(NOISE, 16), nn.GELU(), nn.Linear(16, LENGTH * WIDTH))

    def made(self, noise):
        return self.maker(noise).unflatten(1, (LENGTH, WIDTH))

    def discriminator_loss(self, x, label, noise):
        made = self.made(noise).detach()
        return F.softplus(-self.judge(x, label)).sum() + F.softplus(self.judge(made, label)).sum()

    def generator_loss(self, x, label, noise):
        return F.softplus(-self.judge(self.made(noise), label)).sum()

    def validation_loss(self, x, label, noise):
        return F.softplus(-self.judge(x, label)).sum() + self.generator_loss(x, label, noise)


def samples(count, seed):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, LENGTH, WIDTH, generator=g, dtype=torch.float64)
    return x, torch.randint(LABELS, (count,), generator=g), torch.randn(count, NOISE, generator=g, dtype=torch.float64)


def frozen_of(model, which):
    found = list(model.judge.named_parameters())
    return [p for name, p in found if which == "all" or name.endswith(("bias", "inner")) == (which == "biases")]


def freeze(params, frozen):
    for p in params:
        p.requires_grad_(not frozen)


def step(tracker, model, optimizer, batch, which, order):
    """One step of both losses; `order` says when the discriminator is frozen and when no longer."""
    frozen = frozen_of(model, which)
    optimizer.zero_grad()
    with tracker.step(range(len(batch[0]))) as found:
        freeze(frozen, False)  # where it was left frozen
        model.discriminator_loss(*batch).backward()
        freeze(frozen, True)
        loss = model.generator_loss(*batch)
        freeze(frozen, order != "before the backward")
        loss.backward()
        freeze(frozen, order in ("after the update", "never"))
        optimizer.step()
        freeze(frozen, order == "never")
    return found


ORDERS = ["before the backward", "before the update", "after the update", "never"]


def expected(model, batch, validation, which):
    params, frozen = list(model.parameters()), {id(p) for p in frozen_of(model, which)}
    freeze(params, False)
    direction = torch.autograd.grad(model.validation_loss(*validation), params)
    values = []
    for one in zip(*(x.split(1) for x in batch), strict=True):
        known = torch.autograd.grad(model.discriminator_loss(*one), params, allow_unused=True)
        made = torch.autograd.grad(model.generator_loss(*one), params, allow_unused=True)
        made = [None if id(p) in frozen else g for p, g in zip(params, made, strict=True)]
        pairs = [(g, d) for grads in (known, made) for g, d in zip(grads, direction, strict=True) if g is not None]
        values.append(LR * sum((g * d).sum() for g, d in pairs))
    return torch.stack(values)


def tracked(method, optimizer=torch.optim.SGD):
    torch.manual_seed(0)
    model, batch = GAN().double(), samples(3, 9)
    optimizer = optimizer(model.parameters(), lr=LR)
    return model, optimizer, inrun.track(model, optimizer, method, validation=lambda: model.validation_loss(*batch))


def require_expected(method, which, order, backend=None):
    model, optimizer, tracker = tracked(method)
    plain = GAN().double()
    if backend:
        model.judge.compile(backend=backend)
    with tracker:
        for k in range(2):
            plain.load_state_dict(model.state_dict())
            batch = samples(4, k)
            found = step(tracker, model, optimizer, batch, which, order)
            values = expected(plain, batch, samples(3, 9), which)
            torch.testing.assert_close(found.values.double(), values, rtol=1e-5, atol=1e-7 * float(values.abs().max()))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("which", ["all", "weights", "biases"])
@pytest.mark.parametrize("method", ["first", "path"])
def test_a_forward_scores_what_is_not_frozen_in_it(method, which, order):
    require_expected(method, which, order)


def test_a_graph_scores_what_is_not_frozen_in_it():
    torch.compiler.reset()
    require_expected("first", "weights", "never", "eager")


@pytest.mark.parametrize("which", ["all", "weights"])
@pytest.mark.parametrize("method", ["first", "second", "secant", "path_secant", "path_simpson", "monte_carlo"])
def test_what_is_frozen_when_the_update_comes_is_scored_by_the_gradient_it_has(method, which):
    values = []
    for order in ORDERS:
        kind = torch.optim.SGD if method in ("second", "secant") else torch.optim.AdamW
        model, optimizer, tracker = tracked(method, kind)
        with tracker:
            before = model.validation_loss(*samples(3, 9)).detach()
            one = step(tracker, model, optimizer, samples(4, 0), which, order)
            drop = before - model.validation_loss(*samples(3, 9)).detach()
            two = step(tracker, model, optimizer, samples(4, 1), which, order)
        if method == "monte_carlo":  # of the update itself, and nothing else moves in a first step
            torch.testing.assert_close(one.values.double().sum(), drop, rtol=1e-2, atol=0.0)
        values.append(torch.stack([one.values, two.values]))
    for other in values[1:]:
        torch.testing.assert_close(other, values[0], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("which", ["0.weight", "2.bias"])
@pytest.mark.parametrize("method", ["first", "path"])
def test_pairs_of_what_is_frozen_for_one_batch(method, which):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    params, frozen = list(model.parameters()), model.get_parameter(which)
    optimizer = torch.optim.SGD(params, LR)
    held, batches = torch.randn(3, 4).double(), [torch.randn(n, 4).double() for n in (3, 2)]

    def gradients(x, loss, without=None):
        rows = [torch.autograd.grad(loss(model(one)), params) for one in x.split(1)]
        return torch.stack([torch.cat([g.flatten() * (p is not without) for g, p in zip(row, params, strict=True)])
                            for row in rows])  # fmt: skip

    def loss(y):
        return (y - 1).square().sum()

    tracker = inrun.track(model, optimizer, method, pairwise=list("abc"), validation=lambda: model(held).square().sum())
    for _ in range(2):
        rows = torch.cat([gradients(batches[0], loss), gradients(batches[1], loss, frozen)])
        values = LR * rows @ gradients(held, lambda y: y.square().sum()).T
        optimizer.zero_grad()
        with tracker.step() as found:
            for k, x in enumerate(batches):
                freeze([frozen], k == 1)
                found.batch(range(10 * k, 10 * k + len(x)))
                loss(model(x)).backward()
            freeze([frozen], False)
            optimizer.step()
        torch.testing.assert_close(found.values.double(), values, rtol=1e-5, atol=1e-6 * float(values.abs().max()))


class Twice(nn.Module):
    """One parameter under two names, by forward-mode AD."""

    def __init__(self):
        super().__init__()
        self.a = self.b = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        return torch.sin(x * self.a) * self.b


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("method", ["first", "second", "path", "monte_carlo"])
def test_what_requires_a_gradient_does_so_after_the_step(method, frozen):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(WIDTH, WIDTH), Twice()), torch.randn(4, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x).square().sum(), check=False)
    with tracker.step(range(4)):
        freeze([model[1].a], not frozen)
        loss = model(x).sum()
        freeze([model[1].a], frozen)
        loss.backward()
        optimizer.step()
    assert model[1].a.requires_grad is not frozen


@pytest.mark.parametrize("method", ["second", "path"])
def test_a_loss_that_is_computed_again_leaves_nothing_on_what_it_thaws(method):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1)), torch.randn(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    freeze([model[1].bias], True)
    tracker = inrun.track(model, optimizer, method, exclude=["1.bias"], validation=lambda: model(x).square().sum())

    def loss():
        freeze([model[1].bias], False)
        return model(x).sum()

    with tracker.step(range(3), recompute=loss):
        freeze([model[1].bias], True)
        model(x).sum().backward()
        optimizer.step()
    assert model[1].bias.grad is None and not model[1].bias.requires_grad


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_layer_that_is_frozen_for_one_batch_and_when_it_was_bound(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
    held, batches = torch.randn(3, 4).double(), [torch.randn(n, 4).double() for n in (3, 2)]
    tracker = inrun.track(model, method=method, validation=lambda: model(held).square().sum())
    optimizer = torch.optim.SGD(model.parameters(), LR)
    freeze(model[0].parameters(), True)
    tracker.bind(optimizer)
    for _ in range(2):
        freeze(model[0].parameters(), False)
        params, values = list(model.parameters()), []
        direction = torch.autograd.grad(model(held).square().sum(), params)
        for k, x in enumerate(batches):
            for one in x.split(1):
                grads = torch.autograd.grad((model(one) - 1).square().sum(), params)
                values.append(LR * sum((g * d).sum() for g, d in list(zip(grads, direction, strict=True))[2 * k :]))
        optimizer.zero_grad()
        with tracker.step() as found:
            for k, x in enumerate(batches):
                freeze(model[0].parameters(), k == 1)
                found.batch(range(10 * k, 10 * k + len(x)))
                (model(x) - 1).square().sum().backward()
            optimizer.step()
        torch.testing.assert_close(found.values.double(), torch.stack(values), rtol=1e-5, atol=1e-8)
    freeze(model[0].parameters(), False)
    optimizer.zero_grad()
    with pytest.raises(inrun.InRunError, match="before it"), tracker.step(range(3)):
        (model(batches[0]) - 1).square().sum().backward()
        optimizer.step()
        model(batches[0]).sum().backward()


def test_what_was_frozen_when_it_was_tracked_and_trains_within_the_step_is_an_error():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 1)), torch.randn(3, 4)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    freeze(model[0].parameters(), True)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).square().sum())
    said = r"got 2 more, which would have no score: 0\.weight, 0\.bias"
    with pytest.raises(inrun.InRunError, match=said), tracker.step(range(3)):
        freeze(model[0].parameters(), False)
        model(x).sum().backward()
        freeze(model[0].parameters(), True)
        optimizer.step()
