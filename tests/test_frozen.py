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
