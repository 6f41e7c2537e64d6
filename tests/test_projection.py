"""Modules that project their input first: which are known as such, and their values beside the float64 oracle."""

from __future__ import annotations

import contextlib
import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import inrun
from inrun.projection import Projection, ProjectionRule, recognise
from inrun.routing import known

B, T, H, E, LR = 3, 4, 8, 5, 0.5


class Router(nn.Module):
    calls = 0

    def __init__(self, bias=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(E, H))
        if bias:
            self.bias = nn.Parameter(torch.randn(E))

    def forward(self, x):
        self.calls += 1
        logits = self.logits(x.reshape(-1, H))
        scores, chosen = logits.softmax(-1, dtype=torch.float32).topk(2)
        scores /= scores.sum(-1, keepdim=True)
        return logits, scores.to(logits.dtype), chosen

    def logits(self, x):
        return F.linear(x, self.weight, getattr(self, "bias", None))


class Wide(Router):
    def logits(self, x):
        bias = getattr(self, "bias", None)
        return F.linear(x.float(), self.weight.float(), None if bias is None else bias.float())


class WideThenRounded(Wide):
    """Its float32 projection would come back in float32."""

    def forward(self, x):
        return super().forward(x)[1].to(x.dtype)


class RoundedThenWide(Router):
    def logits(self, x):
        return F.linear(x, self.weight).float()


class Casting(Router):
    def logits(self, x):
        return F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)


class Uncast(Router):
    """Autocast around it is off in it."""

    def logits(self, x):
        with torch.autocast("cpu", enabled=False):
            return super().logits(x.to(self.weight.dtype))


class Masking(Router):
    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask)


class Noisy(Router):
    def logits(self, x):
        logits = super().logits(x)
        return logits + torch.randn_like(logits) if self.training else logits


class Jittered(Router):
    def logits(self, x):
        return super().logits(x * torch.rand_like(x) if self.training else x)


class Normed(Router):
    def logits(self, x):
        return super().logits(F.rms_norm(x, (H,)))


class Masked(Router):
    def logits(self, x):
        return F.linear(x, self.weight.tril())


class Residual(Router):
    def logits(self, x):
        return super().logits(x) + x[..., :E]


class Counting(Router):
    """Counts what it has seen."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(()))

    def logits(self, x):
        self.seen += len(x)
        return super().logits(x)


class Scored(Router):
    """Of an activation that is a module, as DeepSeek-V4's."""

    def __init__(self):
        super().__init__()
        self.act = nn.Softplus()

    def logits(self, x):
        return self.act(super().logits(x)).sqrt()


class Deep(Scored):
    def __init__(self):
        super().__init__()
        self.act = nn.Linear(E, E)

    def logits(self, x):
        return self.act(super(Scored, self).logits(x))


class Scaled(Router):
    """Has a parameter in a module of its own."""

    def __init__(self):
        super().__init__()
        self.inner = Router(bias=False)

    def logits(self, x):
        return super().logits(x) * self.inner.weight.sum().to(x.dtype)


class Dropping(Router):
    def __init__(self):
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def logits(self, x):
        return super().logits(self.drop(x))


class Sparse(Router):
    """Leaves small weights out: numbers that are drawn are larger."""

    def __init__(self):
        super().__init__()
        self.weight.data *= 1e-5

    def logits(self, x):
        return F.linear(x, torch.where(self.weight.abs() < 1e-5, 0.0, self.weight))


class Bounded(Router):
    def __init__(self, bound=20.0):
        super().__init__()
        self.bound = bound

    def logits(self, x):
        return super().logits(x.clamp(-self.bound, self.bound))


class Overflowing(Router):
    """Of large numbers it makes none."""

    def logits(self, x):
        return super().logits(x).exp() / super().logits(x).exp().sum(-1, keepdim=True)


class Sieved(Router):
    """Leaves all but two scores out."""

    def logits(self, x):
        logits = super().logits(x)
        return logits.masked_fill(logits < logits.topk(2)[0][..., -1:], float("-inf"))


class SievedBounded(Sieved, Bounded):
    pass


class Voided(Router):
    def forward(self, x):
        logits, scores, chosen = super().forward(x)
        return logits, scores.masked_fill(scores < 0.5, float("nan")), chosen


NARROW, WIDE = Projection(), Projection(wide=True)


@pytest.mark.parametrize(
    ("made", "form"),
    [(Router, NARROW), (Wide, WIDE), (RoundedThenWide, NARROW), (Noisy, NARROW), (Counting, NARROW), (Jittered, None),
     (WideThenRounded, None), (Normed, None), (Masked, None), (Residual, None), (lambda: Router(bias=True), NARROW),
     (Scored, NARROW), (Deep, None), (Scaled, None), (Sparse, None), (Bounded, None), (Overflowing, NARROW),
     (Sieved, NARROW), (lambda: Wide(bias=True), WIDE), (Masking, None),
     (Uncast, Projection(uncast=True))],
)  # fmt: skip
def test_which_modules_project_first(made, form):
    module = made()
    before, random = copy.deepcopy(module), torch.get_rng_state()
    assert recognise(module) == form
    assert torch.equal(torch.get_rng_state(), random) and module.training
    for name, x in before.state_dict().items():
        assert torch.equal(module.state_dict()[name], x)


@pytest.mark.parametrize("training", [True, False])
def test_what_modules_inside_do_in_training_counts_though_they_are_not_in_training_yet(training):
    assert recognise(Dropping().train(training)) is None
    assert recognise(Scored().train(training)) == NARROW


class Model(nn.Module):
    def __init__(self, router):
        super().__init__()
        self.router, self.last = router, nn.Linear(2 + E, 3)

    def forward(self, x):
        logits, scores, _ = self.router(x)
        return self.last(torch.cat([logits, scores], -1).to(x.dtype).view(*x.shape[:2], -1))


@pytest.mark.parametrize("method", ["first", "secant"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("made", [Router, Wide, Counting, Scored, lambda: Router(bias=True)])
def test_values_without_a_second_forward(made, dtype, method):
    torch.manual_seed(0)
    model: Any = Model(made()).to(dtype)
    x_val, x = torch.randn(B, T, H).to(dtype), torch.randn(B, T, H).to(dtype)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=LR), copy.deepcopy(model)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x_val).float().square().sum())
    assert isinstance(model.router, ProjectionRule)
    with tracker.step(range(B)) as one:
        model.router.calls = 0
        out = model(x)
        assert torch.equal(out, before(x))
        out.float().square().sum().backward()
        assert model.router.calls == 1
        optimizer.step()
    tracker.close()
    ends = [before] if method == "first" else [before, model]
    rows, val_rows = gradients(before, x), [row for end in ends for row in gradients(end, x_val)]
    along = [LR / len(ends) * sum(gs) for gs in zip(*val_rows, strict=True)]
    expected = torch.stack(
        [torch.stack([(d * g).sum() for d, g in zip(along, row, strict=True)]).sum() for row in rows]
    )
    apart = (one.values.double() - expected).abs().max() / expected.abs().max()
    assert apart < (1e-4 if dtype == torch.float32 else 3e-2)


@pytest.mark.parametrize("kind", [Casting, Wide])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)])
def test_a_weight_of_another_dtype_than_the_input(dtypes, kind):
    class Named(Model):
        def forward(self, x):
            logits, scores, _ = self.router(x=x)
            return self.last(torch.cat([logits, scores], -1).to(x.dtype).view(*x.shape[:2], -1))

    of_weight, given = dtypes
    model: Any = Named(kind()).to(given)
    model.router.to(of_weight)
    x, before = torch.randn(B, T, H).to(given), copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).float().square().sum())
    assert isinstance(model.router, ProjectionRule)
    refused = pytest.raises(inrun.InRunError, match="router: expected Casting to project its input first of all")
    rounds = kind is Casting and given is torch.bfloat16  # to what the projection itself has not
    with refused if rounds else contextlib.nullcontext(), tracker.step(range(B)):
        out = model(x)
        out.float().square().sum().backward()
        optimizer.step()
        assert torch.equal(out, before(x))


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("made", [Router, Wide, Uncast])
def test_an_autocast_reaches_the_product_that_it_reaches_untracked(made, method):
    torch.manual_seed(0)
    model, x = Model(made()), torch.randn(B, T, H)
    optimizer, before = torch.optim.SGD(model.parameters(), lr=LR), copy.deepcopy(model)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x).square().sum())
    assert isinstance(model.router, ProjectionRule)
    with tracker.step(range(B)):
        with torch.autocast("cpu", torch.bfloat16):
            logits, out = model.router(x)[0], model(x)
            torch.testing.assert_close(logits, before.router(x)[0])
        (out.float().square().sum() + 0 * logits.sum()).backward()
        optimizer.step()


def gradients(model, x):
    """Each sample's, in float64, one sample at a time."""
    model = copy.deepcopy(model).double()
    params = list(model.parameters())
    return [torch.autograd.grad(model(x[b : b + 1].double()).square().sum(), params) for b in range(len(x))]


def test_what_is_tried_is_left_as_it_was():
    """A module counts its calls in an attribute, a buffer in place and one that it replaces, draws, and may fail."""

    class Counting(nn.Module):
        def __init__(self, fails=False):
            super().__init__()
            self.weight, self.experts = nn.Parameter(torch.randn(3, 8)), nn.ModuleList([nn.Linear(8, 8)])
            self.calls, self.fails = 0, fails
            self.register_buffer("seen", torch.zeros(()))
            self.register_buffer("tokens", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            self.seen += len(x)
            self.tokens = self.tokens + x.numel()
            torch.rand(())
            self.last = self.experts[0](x.flatten(0, 1))
            if self.fails:
                raise RuntimeError("not like this")
            return self.last.view(x.shape)

    for fails in (False, True):
        module = Counting(fails)
        buffers, attributes, state = dict(module._buffers), dict(vars(module)), torch.get_rng_state()
        found = known(module)
        assert fails or found == {module.experts[0]: True}
        module.experts = nn.ModuleList()
        recognise(module)
        assert dict(module._buffers) == buffers and not module.seen and not module.tokens
        assert module.calls == 0 and vars(module).keys() == attributes.keys() and module.training
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("kind", [Bounded, SievedBounded])
def test_a_module_that_does_more_to_a_batch_than_to_what_was_tried_is_refused(kind, method):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.head = kind(1e4), nn.Linear(E, E)

        def forward(self, x):
            return self.head(self.router(x)[0].softmax(-1))

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(torch.randn(2, H)).square().sum())
    for size in (1.0, 1e5):
        said = f"router: expected {kind.__name__} to project its input first of all"
        refused = pytest.raises(inrun.InRunError, match=said)
        with contextlib.nullcontext() if size == 1.0 else refused, tracker.step(range(B)):
            tracker._rows.compared = True
            model(size * torch.randn(B, H)).square().sum().backward()
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("kind", [Noisy, Sieved, Voided])
def test_a_module_that_draws_or_masks_is_compared_with_what_it_returns(kind, method):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.router, self.head = kind(), nn.Linear(E, E)

        def forward(self, x):
            return self.head(self.router(x)[0].softmax(-1))

    model, x = Model(), torch.randn(B, H)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    torch.manual_seed(0)
    expected = model(x)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(torch.randn(2, H)).square().sum())
    assert isinstance(model.router, ProjectionRule)
    with tracker.step(range(B)):
        torch.manual_seed(0)
        y = model(x)
        y.square().sum().backward()
        optimizer.step()
    torch.testing.assert_close(y, expected)
