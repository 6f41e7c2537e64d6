"""Path values of updates that turn at once: against the formula written out here, and the exact Shapley value."""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import math
from types import SimpleNamespace

import models
import pytest
import torch
from models import B, data, gradient, loss_of, make, sample_gradients
from torch import nn

import inrun
from inrun import path, shapley, squares, turning
from inrun.distributed import Ranks
from inrun.factors import Factors
from inrun.keep import Keeper
from inrun.tap import Layout
from inrun.tasks import Lion

OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.0005),
    "fused": lambda p: torch.optim.Adam(p, lr=0.0005, fused=True),
    "lion": lambda p: Lion(p, lr=0.0005),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
}


def test_a_sample_without_a_gradient_earns_nothing_and_changes_nothing():
    """Where the rest is shared alike: an update that turns at once, and clipping; it is no player beside the others."""
    weights = torch.tensor([1.0, 0.0, 1.0, 0.5, 1.0], dtype=torch.float64) / B

    def found(kind, clip, rows):
        model, optimizer = start("mlp", kind, 0)
        x, y = of("mlp")
        update = "elementwise" if kind == "lion" else None
        held = of("mlp", size=4, seed=2)
        tracker = inrun.track(
            model, optimizer, "path", validation=lambda: loss_of(model, *held), clip=clip, update=update
        )
        with tracker.step(rows) as step:
            losses = nn.functional.cross_entropy(model(x[rows]), y[rows], reduction="none")
            (weights[rows] * losses).sum().backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return step.values.double()

    for kind, clip in (("adam", None), ("lion", None), ("sgd", 0.1), ("adam", 0.1)):
        every, others = found(kind, clip, [0, 1, 2, 3, 4]), found(kind, clip, [0, 2, 3, 4])
        assert every[1] == 0
        torch.testing.assert_close(every[[0, 2, 3, 4]], others, rtol=1e-5, atol=1e-9)


def start(name, kind, steps, dtype=torch.float64):
    """A model and its optimizer after some steps."""
    model = make(name).to(dtype)
    optimizer = OPTIMIZERS[kind](model.parameters())
    for t in range(steps):
        loss_of(model, *of(name, dtype, seed=50 + t)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model, optimizer


def of(name, dtype=torch.float64, size=B, seed=1):
    x, y = data(name, size, seed)
    return x.to(dtype) if x.is_floating_point() else x, y


def values(name, kind, method="path", *, steps=0, clip=None, order=None, cuts=(B,), recompute=False, **options):
    """Of one step after `steps` others; the batch in another order, cut into several."""
    model, optimizer = start(name, kind, steps)
    x, y = of(name)
    order = list(range(B)) if order is None else order
    x, y = x[order], y[order]
    target = {"validation": lambda: loss_of(model, *of(name, size=4, seed=2)), **options}
    update = "elementwise" if kind == "lion" else None
    tracker = inrun.track(model, optimizer, method, update=update, clip=clip, **target)
    with tracker.step() as step:
        for low, high in itertools.pairwise((0, *cuts)):

            def loss(part=slice(low, high)):
                return loss_of(model, x[part], y[part]) * len(y[part]) / len(y)

            step.batch(order[low:high], recompute=loss if recompute else None)
            loss().backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    tracker.close()
    return step.values.double()


def moved_by(model, optimizer, g):
    """The optimizer's update for a gradient by names, on copies."""
    model, optimizer = copy.deepcopy((model, optimizer))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for n, p in model.named_parameters():
        p.grad = g[n].clone()
    optimizer.step()
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


def exact(name, kind, steps, clip=None):
    """The Shapley value of the real step, and its sum."""
    model, optimizer = start(name, kind, steps)
    samples = sample_gradients(model, *of(name))

    def utility(members):
        g = {n: sum(s[n] for s, here in zip(samples, members, strict=True) if here) for n in samples[0]}
        g = {n: torch.zeros_like(samples[0][n]) + v for n, v in g.items()}
        if clip is not None:
            norm = torch.stack([v.norm() for v in g.values()]).norm()
            g = {n: v * min(1.0, clip / (norm + 1e-6)) for n, v in g.items()}
        moved = moved_by(model, optimizer, g)
        other = copy.deepcopy(model)
        with torch.no_grad():
            for n, p in other.named_parameters():
                p.add_(moved[n])
            return -loss_of(other, *of(name, size=4, seed=2)).item()

    found, total = shapley.exact(utility, B)
    return torch.from_numpy(found), total


@pytest.mark.parametrize(("kind", "steps"), [("adam", 0), ("adam", 2), ("lion", 5), ("adam", 40)])
@pytest.mark.parametrize("clip", [None, 0.1, 0.75])
@pytest.mark.parametrize("name", ["gpt_tied", "gpt_untied", "unknown"])
def test_values_are_the_written_out_ones(name, kind, steps, clip):
    """All of `turning.py` in plain loops, from per-sample gradients and the optimizer's own step."""
    model, optimizer = start(name, kind, steps)
    along = gradient(model, *of(name, size=4, seed=2))
    samples = sample_gradients(model, *of(name))
    g = {n: sum(s[n] for s in samples) for n in along}
    norm = math.sqrt(sum(v.square().sum() for v in g.values()))
    shrunk = 1.0 if clip is None else clip / (norm + 1e-6)
    g, *samples = ({n: v * shrunk for n, v in each.items()} for each in (g, *samples))
    sizes = [sum(v.square().sum().item() for v in s.values()) for s in samples]
    beside = {n: (sum(s[n].square() for s in samples) * (1 - 1 / B)).sqrt() for n in g}
    part = {p: moved_by(model, optimizer, {n: p * v for n, v in g.items()}) for p in (0.0, 0.5, 1.0)}
    line = sum((part[1.0][n] - part[0.0][n]).square().sum() for n in g)
    turns = sum((part[0.5][n] - (part[0.0][n] + part[1.0][n]) / 2).square().sum() for n in g) > 0.02 * line
    assert turns or steps in (2, 40)
    whole = -sum(((part[1.0][n] - part[0.0][n]) * along[n]).sum() for n in g)
    if not turns and clip is None:
        directions = {n: -(part[1.0][n] - part[0.0][n]) / torch.where(g[n] == 0, 1.0, g[n]) * along[n] for n in g}
        earned = [0.0] * B
    else:

        def factor(t):
            """What the coalition's clipped share is multiplied by, and its squared norm where it is clipped."""
            if clip is None:
                return 1.0, math.inf
            # Of the others at t, in the mean over samples, and half of what the sample adds.
            alone, along_whole = sum(sizes) / B, (norm * shrunk) ** 2
            others = t**2 * (along_whole * (1 - 2 / B) + alone) + t * (1 - t) * (sum(sizes) - alone)
            squared = others + (2 * t * (along_whole - sum(sizes)) / B + alone) / 2
            return (clip / math.sqrt(squared), squared) if squared > (shrunk * clip) ** 2 else (1 / shrunk, math.inf)

        slope, a, b = {n: 0.0 for n in g}, 0.0, 0.0
        for k in range(4):
            t = (k + 0.5) / 4
            c, _ = factor(t)
            times = [t] if turns else [(k + (j + 0.5) / 64) / 4 for j in range(64)]
            c_near = sum(factor(near)[0] for near in times) / len(times)
            h = {n: 1.5 * math.sqrt(t * (1 - t)) * beside[n] for n in g}
            y = [{n: c * (t * g[n] + side * h[n]) for n in g} for side in (-1, 1)]
            low, high = (moved_by(model, optimizer, at) for at in y)
            for n in g:
                rate = torch.where(h[n] == 0, 0.0, (high[n] - low[n]) / (2 * torch.where(h[n] == 0, 1.0, h[n])))
                slope[n] = slope[n] - c_near / c * rate / 4
            shorter = [moved_by(model, optimizer, {n: 0.9 * v for n, v in at.items()}) for at in y]
            ends = zip((low, high), shorter, strict=True)
            radial = sum(((one[n] - less[n]) * along[n]).sum() / 0.1 / 2 for one, less in ends for n in g)
            for near in times:
                c_here, squared = factor(near)
                a += c_here / c * near / squared * radial / len(times) / 4
                b += c_here / c * (0.5 - near) / squared * radial / len(times) / 4
        directions = {n: slope[n] * along[n] + (a * g[n] if clip is not None else 0.0) for n in g}
        earned = [b * size for size in sizes]
    expected = torch.stack([sum((directions[n] * s[n]).sum() for n in g) for s in samples]) + torch.tensor(earned)
    expected = expected + (whole - expected.sum()) / B
    found = values(name, kind, steps=steps, clip=clip)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize(
    ("kind", "steps", "within"), [("adam", 1, 0.2), ("lion", 0, 0.35), ("adam", 40, 0.1), ("sgd", 5, 0.1)]
)
@pytest.mark.parametrize("clip", [None, 0.1])
def test_values_are_near_the_exact_shapley_value(kind, steps, within, clip, monkeypatch):
    expected, total = exact("gpt_tied", kind, steps, clip)
    found = values("gpt_tied", kind, "path_secant", steps=steps, clip=clip)
    assert found.sum().item() == pytest.approx(total, rel=0.02)
    error = ((found - expected).norm() / expected.norm()).item()
    assert error < within
    if steps < 2 and clip is None:
        monkeypatch.setattr("inrun.turning.TURNS", 1.0)
        found = values("gpt_tied", kind, "path_secant", steps=steps, clip=clip)
        of_path = ((found - expected).norm() / expected.norm()).item()
        assert of_path > 1.5 * error


@pytest.mark.parametrize("steps", [0, 40])
def test_a_fused_optimizer_divides_the_loss_scale_out_itself(steps):
    """Whether it turns, and its slope, are those of the gradients without it."""

    def found(scale):
        model, optimizer = start("mlp", "fused", steps)
        held, scaler = of("mlp", size=4, seed=2), torch.amp.GradScaler("cpu", init_scale=scale)
        tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *held))
        with tracker.step(range(B)) as step:
            scaler.scale(loss_of(model, *of("mlp"))).backward()
            scaler.step(optimizer)
            scaler.update()
        return step.values

    torch.testing.assert_close(found(1024.0), found(1.0), rtol=1e-5, atol=1e-9)


def test_tokens_share_what_their_row_earns_by_its_norm():
    def found(**layout):
        model, optimizer = start("gpt_tied", "adam", 2)
        held = of("gpt_tied", size=4, seed=2)
        tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *held), clip=0.1)
        with tracker.step(range(B), **layout) as step:
            loss_of(model, *of("gpt_tied")).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        return step.values

    torch.testing.assert_close(found(tokens=models.T).sum(1), found(), rtol=1e-4, atol=1e-8)


class Recurrent(nn.Module):
    """An LSTM holds no sample in a row; with a head, which does."""

    def __init__(self, head):
        super().__init__()
        self.lstm = nn.LSTM(models.WIDTH, models.VOCAB, batch_first=True)
        self.head = nn.Linear(models.VOCAB, models.VOCAB) if head else nn.Identity()

    def forward(self, x):
        return self.head(self.lstm(x)[0])


@pytest.mark.parametrize(("kind", "steps"), [("sgd", 0), ("adam", 40)])
def test_layers_that_hold_no_sample_in_a_row_are_clipped_along_the_path(kind, steps, monkeypatch):
    monkeypatch.setitem(models.MODELS, "attention", lambda: Recurrent(False))
    clip = 0.05
    model, optimizer = start("attention", kind, steps)
    along, samples = gradient(model, *of("attention", size=4, seed=2)), sample_gradients(model, *of("attention"))
    g = {n: sum(s[n] for s in samples) for n in along}
    norm = math.sqrt(sum(v.square().sum() for v in g.values()))
    assert norm > 2 * clip
    moved, at_rest, less, more = (
        moved_by(model, optimizer, {n: t * clip / norm * v for n, v in g.items()}) for t in (1.0, 0.0, 0.999, 1.001)
    )
    k = {n: -(moved[n] - at_rest[n]) / (clip / norm * v) * along[n] for n, v in g.items()}
    slope = {n: -(more[n] - less[n]) / (0.002 * clip / norm * v) * along[n] for n, v in g.items()}
    off = sum((slope[n] * v).sum() for n, v in g.items()) / norm**2
    grown = math.log(norm / clip)
    d = {n: clip / norm * (k[n] + grown * (slope[n] - off * v)) for n, v in g.items()}
    expected = torch.stack([sum((d[n] * s[n]).sum() for n in d) for s in samples])
    found = values("attention", kind, steps=steps, clip=clip)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())

    monkeypatch.setitem(models.MODELS, "attention", lambda: Recurrent(True))  # of which a part is beside the path
    expected, total = exact("attention", kind, steps, clip)
    found = values("attention", kind, "path_secant", steps=steps, clip=clip)
    assert found.sum().item() == pytest.approx(total, rel=0.02)
    assert (found - expected).norm() < 0.4 * expected.norm()


def test_layers_without_squares_are_taken_to_be_as_the_others():
    """In how far a coalition is clipped, and what a sample earns by the squared norm that is known of it."""

    def points(some, unscale):
        slots = [SimpleNamespace(grad=torch.full((4,), 0.5 / unscale), share=1.0) for _ in range(2)]
        of, clipped = squares.Squares({i: torch.full((4,), 0.3) for i in some}, {}, 5), (0.5, math.sqrt(2))
        return turning._points(of, slots, unscale, torch.tensor(0.5), clipped, False, Ranks(nn.Module()))

    for both, one in zip(points((0, 1), 1.0), points((0,), 0.25), strict=True):
        expected = dataclasses.replace(both, along_self=2 * both.along_self)
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(expected))
    assert both.along_self != 0


def test_a_parameter_of_which_some_coordinates_are_looked_at_stands_for_all(monkeypatch):
    small, large = nn.Parameter(torch.zeros(500)), nn.Parameter(torch.zeros(10 * turning.LOOKED_AT))
    optimizers = Lion([small], lr=1.0), torch.optim.SGD([large], lr=1.0)
    slots = [
        SimpleNamespace(param=p, shard=p, grad=torch.ones_like(p), optimizer=o, group=0, options=o.param_groups[0],
                        state={}, share=1.0)
        for p, o in zip((small, large), optimizers, strict=True)
    ]  # fmt: skip
    of = functools.partial(turning.turns, unscale=1.0, update="elementwise", ranks=Ranks(nn.Module()))
    assert of(slots[:1]) and not of(slots)  # a quarter of it, and hardly a hundredth
    monkeypatch.setattr(turning, "TURNS", 1e-6)
    assert not of(slots[1:])


@pytest.mark.parametrize("kind", ["adam", "lion"])
def test_they_depend_neither_on_order_nor_on_microbatches_nor_on_what_is_kept(kind):
    expected = values("gpt_tied", kind)
    order = [3, 0, 4, 1, 2]
    changed = [
        values("gpt_tied", kind, order=order)[[order.index(i) for i in range(B)]],
        values("gpt_tied", kind, cuts=(2, B)),
        values("gpt_tied", kind, recompute=True),
        values("gpt_tied", kind, cuts=(2, B), recompute=True),
        values("gpt_tied", kind, keep="host"),
    ]
    for found in changed:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def test_a_batch_that_is_computed_again_is_kept_within_the_bound():
    expected = values("gpt_tied", "adam", recompute=True)
    with pytest.raises(inrun.InRunError, match="keep_bytes=1,000 "):
        values("gpt_tied", "adam", recompute=True, keep_bytes=1000)
    assert torch.equal(values("gpt_tied", "adam", recompute=True, keep_bytes=10**7), expected)


def with_conv1d():
    """A GPT whose inner layers hold their weights as `[I, O]`."""
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D
    model = models.gpt(tied=False)
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear) and child.bias is not None:
                setattr(parent, name, conv1d(child.out_features, child.in_features))
    return model


def with_shared():
    """One block run twice, a norm that models write themselves, a tied head, and a token that is padding."""
    model = models.gpt(tied=True)
    model.blocks[1], model.tokens.padding_idx, model.norm = model.blocks[0], 3, models.Scale(models.WIDTH)
    return model


class Norms(nn.Module):
    """Norms over several dimensions and of several rows to a token, one of them shared by layers of more and fewer."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(models.VOCAB, 8), nn.Linear(8, models.VOCAB)
        self.whole, self.part, self.again = nn.LayerNorm((2, 4)), nn.RMSNorm(4), nn.RMSNorm(4)
        self.again.weight = self.part.weight
        self.mix = nn.Linear(4, 4)

    def forward(self, x):
        x = self.whole(self.tokens(x).unflatten(-1, (2, 4)))
        x = self.mix(torch.tanh(self.mix(self.part(x)))) + self.again(x[:, :, 0])[:, :, None]
        return self.head(x.flatten(2))


class Grouped(nn.Module):
    """A norm whose features are not the last dimension."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(8, 8), nn.GroupNorm(2, 6), nn.Linear(48, models.VOCAB)

    def forward(self, x):
        return self.head(self.norm(torch.tanh(self.embed(x))).flatten(1))


@pytest.mark.parametrize(
    ("name", "dtype", "autocast", "layout"),
    [
        *((*case, layout)
          for layout in ("rows", "documents", "tokens")
          for case in (
              ("gpt_untied", torch.float64, False),
              ("gpt_untied", torch.float32, False),
              ("gpt_untied", torch.float32, True),
              ("gpt_conv1d", torch.float64, False),
              ("gpt_tied", torch.float64, False),
              ("gpt_tied", torch.float32, True),
              ("gpt_shared", torch.float64, False),
              ("gpt_shared", torch.float32, False),
              ("gpt_norms", torch.float64, False),
              ("gpt_norms", torch.bfloat16, False),
          )),
        ("grouped", torch.float64, False, "rows"),
        ("mlp", torch.float64, False, "rows"),
        ("reused", torch.float64, False, "rows"),
        ("loose", torch.float64, False, "rows"),
        ("attention", torch.float64, False, "rows"),
    ],
)  # fmt: skip
def test_squares_in_one_product_are_those_of_single_samples(name, dtype, autocast, layout, monkeypatch):
    """Of linear layers, Hugging Face's Conv1D, attention, norms and tables, with biases; however often they run and
    whatever they share. Of a frozen weight none is computed."""
    monkeypatch.setitem(models.MODELS, "gpt_conv1d", with_conv1d)
    monkeypatch.setitem(models.MODELS, "gpt_shared", with_shared)
    monkeypatch.setitem(models.MODELS, "gpt_norms", Norms)
    monkeypatch.setitem(models.MODELS, "grouped", Grouped)
    x, y = of(name)
    tokens = x.shape[1]
    options = {
        "rows": {},
        "documents": {"tokens": tokens, "segments": torch.tensor([0, tokens // 2, 2 * tokens, B * tokens])},
        "tokens": {"tokens": tokens},
    }[layout]
    product, in_factors, step_squares = squares.ghost_square, Keeper.factors, squares.squares

    def squares_of(frozen, one_product=True):
        products, found = [], []
        monkeypatch.setattr(squares, "ghost_square", lambda *a, **k: products.append(1) or product(*a, **k))
        monkeypatch.setattr(Keeper, "factors", in_factors if one_product else lambda *a: None)
        monkeypatch.setattr(path, "squares", lambda *a: found.append(step_squares(*a)) or found[-1])
        model, optimizer = start(name, "adam", 0, dtype)
        tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, x, y))
        layers = (m for m in model.modules() if getattr(m, "bias", None) is not None and m.weight.dim() == 2)
        next(layers).weight.requires_grad_(not frozen)
        with tracker.step(range(3 if layout == "documents" else B), **options):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = loss_of(model, x, y)
            loss.backward()
            optimizer.step()
        tracker.close()
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        alone = tables - {m.weight for m in model.modules() if isinstance(m, nn.Linear)}
        loose = {p for n, p in model.named_parameters() if n in ("cls", "pos")}  # of no layer
        kinds = nn.LayerNorm, nn.RMSNorm, nn.GroupNorm
        norms = {p for m in model.modules() if isinstance(m, kinds) for p in m.parameters()}
        return found[0], len(products), len({p for p in model.parameters() if p.dim() == 2} - alone - loose - norms)

    rtol, atol = (
        (1e-9, 0.0) if dtype == torch.float64 else (3e-2, 1e-2) if autocast or dtype == torch.bfloat16 else (1e-4, 1e-5)
    )
    atol = max(atol, 1e-15) if name == "gpt_shared" else atol  # where a table's part takes the head's away
    for frozen in (False, True):
        (here, count, several), (expected, none, _) = squares_of(frozen), squares_of(frozen, one_product=False)
        assert count == several - frozen and none == 0 and here.of_slots.keys() == expected.of_slots.keys()
        for i, squared in expected.of_slots.items():
            close = {"rtol": rtol, "atol": atol * squared.max().item()}
            torch.testing.assert_close(here.of_slots[i], squared, **close)
            assert here.of_slots[i].dtype == torch.promote_types(dtype, torch.float32)
        for i, norms in expected.of_samples.items():
            torch.testing.assert_close(here.of_samples[i], norms, rtol=max(rtol, 1e-6), atol=0)


def squares_of_a_step(model, monkeypatch, autocast=False):
    """By names of parameters."""
    found, of_step = [], squares.squares
    monkeypatch.setattr(path, "squares", lambda *a: found.append(of_step(*a)) or found[-1])
    x, y = of("mlp" if isinstance(model, nn.Sequential) else "gpt_tied", torch.float32)
    tracker = inrun.track(model, OPTIMIZERS["adam"](model.parameters()), "path",
                          validation=lambda: loss_of(model, x, y))  # fmt: skip
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), tracker.step(range(B)):
        with torch.autocast("cpu", enabled=False):
            loss_of(model, x, y).backward()
        tracker.optimizers[0].step()
    monkeypatch.setattr(path, "squares", of_step)
    return {tracker.slots[i].name: squared for i, squared in found[0].of_slots.items()}


def test_an_autocast_around_the_step_does_not_round_squares(monkeypatch):
    plain, within = (squares_of_a_step(make("gpt_tied"), monkeypatch, autocast) for autocast in (False, True))
    for name, squared in plain.items():
        torch.testing.assert_close(within[name], squared, rtol=1e-5, atol=1e-12)


def test_what_layers_of_samples_share_with_others_has_no_squares(monkeypatch):
    model = nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.LayerNorm(6), nn.Linear(6, models.VOCAB))
    model[3].weight = model[1].weight
    assert squares_of_a_step(model, monkeypatch).keys() == {"0.weight", "0.bias", "4.weight", "4.bias"}


def test_gradients_in_halves_are_squared_in_float32():
    keeper = SimpleNamespace(
        factors=lambda kept: None, sample_gradients=lambda kept, rows: [{0: torch.tensor([1e-4 * (1 + i)]).half()}
                                                                        for i in rows])  # fmt: skip
    totals, norms = {0: torch.zeros(1)}, torch.zeros(2)
    squares._add_runs(keeper, [None, None], totals, {0: 1.0}, norms)
    torch.testing.assert_close(norms, torch.tensor([4e-8, 16e-8]), rtol=1e-2, atol=0.0)
    torch.testing.assert_close(totals[0], norms.sum()[None])


@pytest.mark.parametrize("tied", [False, True])
def test_factors_in_halves_are_added_up_and_multiplied_in_float32(tied):
    ids, ups, downs = (torch.tensor([[0, 2, 0]]), *(torch.full((1, 3, n), 250.0).half() for n in (4, 3)))
    expected = torch.tensor([500.0, 0.0, 250.0])[:, None] + (3 * 250.0**2 if tied else 0.0)
    total = torch.zeros(3, 4)
    runs = [Factors(ids, ups), *([Factors(downs, ups)] if tied else [])]
    norms = squares.add_squares(runs, Layout(1), total)
    torch.testing.assert_close(total, (expected**2).expand(3, 4))
    torch.testing.assert_close(norms, total.sum()[None])


def test_targets_documents_tokens_and_pairs_score_as_whole_samples_do():
    expected = values("gpt_tied", "adam")
    halves = {k: (lambda k=k: loss_of(MODEL[0], *of("gpt_tied", size=4, seed=2)) * k / 4) for k in (1, 3)}
    MODEL = []

    def scored(layout, **options):
        model, optimizer = start("gpt_tied", "adam", 0)
        MODEL[:] = [model]
        x, y = of("gpt_tied")
        tracker = inrun.track(model, optimizer, "path", **options)
        if tracker.samples:
            with tracker.validation():
                loss_of(model, *of("gpt_tied", size=4, seed=2)).backward()
        with tracker.step(range(B) if "segments" not in layout else range(2 * B), **layout) as step:
            loss_of(model, x, y).backward()
            optimizer.step()
        tracker.close()
        return step.values.double()

    def close(found, whole=expected):
        torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-4 * expected.abs().max().item())

    one = {"validation": lambda: loss_of(MODEL[0], *of("gpt_tied", size=4, seed=2))}
    targets = scored({}, validation={f"of {k}": loss for k, loss in halves.items()})
    close(targets, torch.stack([expected / 4, expected * 3 / 4], 1))
    tokens = of("gpt_tied")[0].shape[1]
    close(scored({"tokens": tokens}, **one).sum(1))
    halved = torch.arange(0, 2 * B + 1) * tokens // 2
    documents = scored({"segments": halved, "tokens": tokens}, **one)
    assert documents.shape == (2 * B,) and not torch.allclose(documents.view(B, 2).sum(1), expected, rtol=1e-2)
    torch.testing.assert_close(documents.sum(), expected.sum(), rtol=1e-4, atol=1e-9)
    close(scored({}, pairwise=range(4)).sum(1))


class Scaling(nn.Module):
    """Returns a number of its own beside its samples, as OpenCLIP's CLIP does."""

    def __init__(self):
        super().__init__()
        self.table, self.scale = nn.Parameter(torch.randn(8, models.VOCAB)), nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return x @ self.table, self.scale.exp()


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_number_without_a_score_may_be_returned_beside_the_samples(method):
    def values(frozen=False, exclude=()):
        torch.manual_seed(0)
        model = Scaling().double()
        model.scale.requires_grad_(not frozen)
        optimizer = OPTIMIZERS["adam"](model.parameters())

        def loss(x, y):
            out, scale = model(x)
            return nn.functional.cross_entropy(scale * out, y)

        tracker = inrun.track(
            model, optimizer, method, validation=lambda: loss(*of("mlp", size=4, seed=2)), exclude=exclude
        )
        with tracker.step(range(B)) as step:
            loss(*of("mlp")).backward()
            optimizer.step()
        return step.values

    torch.testing.assert_close(values(exclude=["scale"]), values(frozen=True))
    with pytest.raises(inrun.InRunError, match=r"got \(\).* \(scale: multiply these by it inside of the model"):
        values()
