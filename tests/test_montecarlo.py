"""Method "monte_carlo": against the Shapley value of real steps, taken one coalition at a time on copies."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from models import Bypass, data, loss_of, make, sample_gradients
from torch import nn

import inrun
from inrun import montecarlo, quadratic, shapley, updates
from inrun.tasks import Lion

N, T, VOCAB = 5, 3, 7


class Tied(nn.Module):
    """All of its weights are matrices, one of them used twice."""

    def __init__(self):
        super().__init__()
        self.embed, self.inner = nn.Embedding(VOCAB, 6), nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, VOCAB, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(torch.tanh(self.inner(self.embed(x))))


class Coupled(torch.optim.Optimizer):
    """One size for the whole step, and state beside `self.state`: in lists, and by the parameters it was given."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.held = list(self.param_groups[0]["params"])
        self.sums, self.seen = [torch.zeros_like(p) for p in self.held], 0

    @torch.no_grad()
    def step(self, closure=None):
        self.seen += 1
        size = torch.stack([p.grad.square().sum() for p in self.held]).sum().sqrt() + 1e-3
        for p, total in zip(self.held, self.sums, strict=True):
            total.mul_(0.5).add_(p.grad / size)
            p.sub_(total, alpha=self.param_groups[0]["lr"] / self.seen)


OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, lr=0.3, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "lion": lambda p: Lion(p, lr=0.02, weight_decay=0.1),
    "muon": lambda p: torch.optim.Muon(p, lr=0.05),
    "coupled": Coupled,
}


def tied(kind, dtype=torch.float64):
    torch.manual_seed(0)
    model = Tied().to(dtype)
    return model, OPTIMIZERS[kind](model.parameters())


def tokens(batch=N, seed=1):
    ids = torch.randint(VOCAB, (batch, T + 1), generator=torch.Generator().manual_seed(seed))
    return ids[:, :-1], ids[:, 1:]


LOSSES = {"code": tokens(4, 2), "prose": tokens(3, 3)}


def validation(model, names=("code",)):
    return {name: lambda name=name: loss_of(model, *LOSSES[name]) for name in names}


def warmed(model, optimizer, steps=2):
    for t in range(steps):
        loss_of(model, *tokens(seed=50 + t)).backward()
        optimizer.step()
        optimizer.zero_grad()


def truth(model, optimizer, x, y, losses, clip=None):
    """The Shapley value over real steps of copies, `[n, M]`, and the drop, `[M]`."""
    rows = sample_gradients(model, x, y)

    def worth(members):
        copied, its = copy.deepcopy((model, optimizer))
        if isinstance(its, Coupled):  # which forgets in a copy what torch does not know of
            its.__dict__.update(copy.deepcopy({k: vars(optimizer)[k] for k in ("sums", "seen")}))
            its.held = its.param_groups[0]["params"]
        for n, p in copied.named_parameters():
            p.grad = sum((rows[i][n] for i in np.flatnonzero(members)), torch.zeros_like(p))
        if clip is not None:
            nn.utils.clip_grad_norm_(copied.parameters(), clip)
        its.step()
        with torch.no_grad():
            return -np.array([loss_of(copied, *pair).item() for pair in losses])

    return shapley.exact(worth, len(x))


def close(found, expected, rtol=1e-5):
    expected = torch.as_tensor(expected)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
@pytest.mark.parametrize("clip", [None, 0.2])
def test_values_are_the_shapley_value_of_the_real_step(kind, clip):
    """Of two batches, two targets and a tied weight, in the middle of training."""
    model, optimizer = tied(kind)
    warmed(model, optimizer)
    x, y = tokens()
    expected, drop = truth(model, optimizer, x, y, LOSSES.values(), clip)
    tracker = inrun.track(model, optimizer, "monte_carlo", validation=validation(model, LOSSES), clip=clip)
    with tracker.step() as step:
        for part in (slice(0, 2), slice(2, N)):
            step.batch(range(N)[part])
            (loss_of(model, x[part], y[part]) * len(x[part]) / N).backward()
        if clip is not None:
            assert nn.utils.clip_grad_norm_(model.parameters(), clip) > 2 * clip
        optimizer.step()
    close(step.values, expected)
    assert torch.equal(step.standard_error, torch.zeros(N, 2))
    assert torch.stack([step.drop[name] for name in LOSSES]).numpy() == pytest.approx(drop)
    close(step.values.sum(0), drop)
    for name, pair in LOSSES.items():
        assert tracker.last_validation[name].item() == pytest.approx(loss_of(model, *pair).item())
    assert len(tracker.ledger) == 2 * N


class Both:
    """Two optimizers, each of one weight."""

    def __init__(self, model):
        self.of_each = torch.optim.SGD([model.embed.weight], lr=0.3), torch.optim.AdamW([model.inner.weight], lr=0.05)

    def step(self):
        for optimizer in self.of_each:
            optimizer.step()


def test_optimizers_that_update_together():
    model, _ = tied("momentum")
    both, (x, y) = Both(model), tokens()
    expected, _ = truth(model, both, x, y, [LOSSES["code"]])
    tracker = inrun.track(model, [*both.of_each], "monte_carlo", validation=validation(model))
    with tracker.step(range(N)) as step:
        loss_of(model, x, y).backward()
        both.step()
    close(step.values, expected[:, 0])


def test_a_layer_in_front_that_has_no_gradient():
    class Idle(nn.Module):
        def __init__(self):
            super().__init__()
            self.idle, self.rest = nn.Linear(6, 6, bias=False).double(), tied("adamw")[0]

        def forward(self, x):
            return self.rest(x)

    found = []
    for model in (tied("adamw")[0], Idle()):
        optimizer = OPTIMIZERS["adamw"](model.parameters())
        tracker = inrun.track(model, optimizer, "monte_carlo", validation=validation(model))
        with tracker.step(range(N)) as step:
            loss_of(model, *tokens()).backward()
            optimizer.step()
        found.append(step.values.double())
    close(found[1], found[0])


@pytest.mark.parametrize("options", [{}, {"permutations": 2}])
def test_buffers_are_those_of_the_loops_own_forwards(options):
    model, optimizer = tied("adamw")
    model.register_buffer("seen", torch.zeros(()))
    model.register_forward_pre_hook(lambda module, _: module.seen.add_(1) and None)
    tracker = inrun.track(model, optimizer, "monte_carlo", validation=validation(model), **options)
    with tracker.step(range(N)):
        loss_of(model, *tokens()).backward()
        optimizer.step()
    assert model.seen == 1


@pytest.mark.parametrize("name", ["loose", "attention", "unknown", "reused"])
def test_layers_of_every_kind(name):
    model = make(name).double()
    (x, y), (val_x, val_y) = data(name, 4), data(name, 3, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    expected, _ = truth(model, optimizer, x.double(), y, [(val_x.double(), val_y)])
    losses = {"validation": lambda: loss_of(model, val_x.double(), val_y)}
    tracker = inrun.track(model, optimizer, "monte_carlo", validation=losses)
    with tracker.step(range(4)) as step:
        loss_of(model, x.double(), y).backward()
        optimizer.step()
    close(step.values, expected[:, 0])


def test_a_factor_that_the_loop_applied_a_loss_scale_and_a_rule_of_the_users():
    x, y = tokens()

    def values(scale=1.0, clip=None, **options):
        model, optimizer = tied("momentum")
        tracker = inrun.track(model, optimizer, "monte_carlo", validation=validation(model), clip=clip, **options)
        with tracker.step(range(N), scale=scale if clip else 1.0) as step:
            (scale * loss_of(model, x, y)).backward()
            for p in model.parameters():
                if p.grad is not None:
                    p.grad.div_(scale)
            if clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), clip)
            optimizer.step()
        return step.values.double()

    plain, clipped = values(), values(clip=0.2)
    close(values(scale=8.0), plain)
    close(values(scale=8.0, clip=0.2), clipped)
    close(values(scale=8.0, clip=100.0), plain)
    assert (plain - clipped).abs().max() > 0.1 * plain.abs().max()
    close(values(update=lambda grad, param, state, group: -group["lr"] * (grad + 0.1 * param)), plain)
    with pytest.raises(inrun.InRunError, match=r"clip: expected .* norm 0\.2 .* multiplied by 0\.\d+ .* got 8"):
        model, optimizer = tied("momentum")
        tracker = inrun.track(model, optimizer, "monte_carlo", validation=validation(model), clip=0.2)
        with tracker.step(range(N)):
            loss_of(model, x, y).backward()
            model.inner.weight.grad.mul_(8)
            model.head.weight.grad.mul_(8)
            optimizer.step()
    with pytest.raises(inrun.InRunError, match=r"clip: expected .* norm 0\.2 "):
        values_of("momentum", N, lambda model: loss_of(model, *LOSSES["code"]), clip=0.2, clipped_to=0.1)


@pytest.mark.parametrize("overflow", [False, True])
def test_a_fused_optimizer_that_divides_the_loss_scale_out_itself(overflow):
    x, y = tokens()
    found = []
    for fused in (False, True):
        model, _ = tied("momentum", torch.float32)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=fused)
        tracker = inrun.track(model, optimizer, "monte_carlo", validation=validation(model))
        with tracker.step(range(N)) as step:
            scaler.scale(loss_of(model, x, y)).backward()
            if fused and overflow:
                model.inner.weight.grad[0, 0] = torch.inf
            scaler.step(optimizer)
        found.append(step.values.double())
    if overflow:
        assert torch.equal(found[1], torch.zeros_like(found[0])) and torch.equal(step.standard_error.double(), found[1])
    else:
        close(found[1], found[0], 1e-3)


def visited(n, permutations, number=0):
    """The coalitions that random orders meet, nobody and all of them included."""
    orders = shapley.orders(n, permutations, (montecarlo.SEED, number))
    return {frozenset(order[:k].tolist()) for order in orders for k in range(n + 1)}


@pytest.mark.parametrize(("kind", "players"), [("adamw", 10), ("lion", 10), ("lion", 0)])
def test_sampled_values_add_up_and_lie_within_their_errors_of_the_exact_ones(kind, players, monkeypatch):
    """With a quadratic loss's values taken off, and without (of more samples than that is done for)."""
    monkeypatch.setattr(quadratic, "PLAYERS", players)
    alone = {frozenset([z]) for z in range(8 if players else 0)}
    n = 8
    x, y = tokens(n)
    model, optimizer = tied(kind)
    warmed(model, optimizer)
    expected, drop = truth(model, optimizer, x, y, LOSSES.values())
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    calls = []

    def counted(name):
        calls.append(name)
        return loss_of(model, *LOSSES[name])

    def step_of(number, permutations=8):
        model.load_state_dict(before[0])
        optimizer.load_state_dict(copy.deepcopy(before[1]))
        losses = {name: lambda name=name: counted(name) for name in LOSSES}
        update = "elementwise" if kind == "lion" else None
        options = {"validation": losses, "permutations": permutations, "update": update}
        with inrun.track(model, optimizer, "monte_carlo", **options) as tracker:
            tracker.steps = number
            calls.clear()
            with tracker.step(range(n)) as step:
                loss_of(model, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
        assert len(calls) == 2 * len(visited(n, permutations, number) | alone)
        close(step.values.sum(0), drop)
        assert step.values.shape == step.standard_error.shape == (n, 2)
        return step.values.double(), step.standard_error.double()

    values, errors = step_of(7)
    again, other = step_of(7), step_of(8)
    assert torch.equal(values, again[0]) and torch.equal(errors, again[1])
    assert not torch.equal(values, other[0])
    exact = torch.from_numpy(expected)
    more = step_of(7, 24)
    for found, error in ((values, errors), other, more):
        assert 0.4 * error.norm() < (found - exact).norm() < 1.3 * error.norm() and error.min() > 0
    assert more[1].norm() < 0.8 * errors.norm()
    one = step_of(7, 2)
    assert one[1].isnan().all() and one[0].isfinite().all()


def values_of(kind, n, loss, clip=None, dtype=torch.float64, twice=False, clipped_to=None, **options):
    """The step of n samples; `twice`: of half as many, each there twice."""
    model, optimizer = tied(kind, dtype)
    warmed(model, optimizer)
    tracker = inrun.track(model, optimizer, "monte_carlo", validation=lambda: loss(model), clip=clip, **options)
    with tracker.step(range(n)) as step:
        loss_of(model, *(x.repeat(2, 1) for x in tokens(n // 2)) if twice else tokens(n)).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clipped_to or clip)
        optimizer.step()
    return step


@pytest.mark.parametrize(
    ("kind", "clip", "stack"),
    [
        ("lion", None, quadratic.STACK),
        ("lion", 0.2, 1),
        ("adamw", 0.2, quadratic.STACK),
        ("muon", None, 1),
        ("muon", None, quadratic.STACK),
        ("coupled", None, 1),
    ],
)
def test_of_a_loss_linear_in_the_weights_one_order_and_its_reverse_find_the_exact_values(
    kind, clip, stack, monkeypatch
):
    """Whether updates are found together or one at a time."""
    monkeypatch.setattr(quadratic, "STACK", stack)
    along = torch.randn(VOCAB, 6, generator=torch.Generator().manual_seed(5), dtype=torch.float64)

    def loss(model):
        return (model.head.weight * along).sum() + (model.inner.weight * along[1:]).sum()

    update = "elementwise" if kind == "lion" else None
    exact, few, more = (values_of(kind, 6, loss, clip, permutations=p, update=update) for p in (14, 2, 4))
    assert torch.equal(exact.standard_error, torch.zeros(6))
    close(few.values, exact.values.double())
    assert more.standard_error.norm() < 1e-5 * exact.values.norm()


@pytest.mark.parametrize(
    ("kind", "clip", "held", "dtype", "twice", "part"),
    [
        ("lion", None, quadratic.HELD, torch.float64, False, 1 / 15),
        ("lion", None, 0, torch.float64, False, 1 / 4),
        ("coupled", None, quadratic.HELD, torch.float32, False, 1 / 100),
        ("momentum", 0.2, quadratic.HELD, torch.float64, False, 1 / 300),
        ("momentum", 0.2, quadratic.HELD, torch.float32, True, 1 / 100),
    ],
)
def test_a_quadratic_losss_values_leave_a_small_part_of_the_error(kind, clip, held, dtype, twice, part, monkeypatch):
    """Through the samples' own steps, and where those have no room; of steps that lie in each other's span."""
    options = {"update": "elementwise" if kind == "lion" else None, "clip": clip, "dtype": dtype, "twice": twice}
    n = 8

    def loss(model):
        return loss_of(model, *LOSSES["code"])

    def errors():
        return [(values_of(kind, n, loss, permutations=p, **options).values - exact).norm() for p in (2, 4, 8)]

    exact = values_of(kind, n, loss, permutations=38, **options).values
    monkeypatch.setattr(quadratic, "PLAYERS", 0)
    without = errors()
    monkeypatch.undo()
    monkeypatch.setattr(quadratic, "HELD", held)
    assert all(a < part * b for a, b in zip(errors(), without, strict=True))


def test_of_several_losses_each_has_the_bends_of_its_own(monkeypatch):
    def values(permutations):
        model, optimizer = tied("lion")
        warmed(model, optimizer)
        options = {"update": "elementwise", "permutations": permutations}
        tracker = inrun.track(model, optimizer, "monte_carlo", validation=validation(model, LOSSES), **options)
        with tracker.step(range(8)) as step:
            loss_of(model, *tokens(8)).backward()
            optimizer.step()
        return step.values

    exact, few = values(38), values(4)
    monkeypatch.setattr(quadratic, "PLAYERS", 0)
    errors, without = ((found - exact).norm(dim=0) for found in (few, values(4)))
    assert (errors < without / 15).all(), (errors, without)


def test_of_a_quadratic_loss_two_orders_are_exact_where_clipping_bends_the_update():
    """As every coalition's step lies among the samples' own."""

    def loss(model):
        return sum(p.square().sum() * (k + 1) for k, p in enumerate(model.parameters()))

    exact, few = (values_of("momentum", 6, loss, 0.2, permutations=p) for p in (14, 2))
    close(few.values, exact.values.double())


def test_large_models_have_it_where_updates_jump():
    """As their updates are had one at a time, and the other ones' values are known well enough without."""

    def most(kind, width, update=None, clip=None, dtype=torch.float32):
        layer = torch.nn.Linear(width, width, bias=False)
        slot = SimpleNamespace(optimizer=kind(layer.parameters(), lr=0.1), shard=layer.weight.detach().to(dtype))
        return quadratic.most_players([(0, slot)], update, clip)

    sgd, adamw, rprop, muon = torch.optim.SGD, torch.optim.AdamW, torch.optim.Rprop, torch.optim.Muon
    assert most(adamw, 8) == most(muon, 8) == most(sgd, 8, clip=1.0) == quadratic.PLAYERS
    assert most(sgd, 8) == most(adamw, 1024) == most(muon, 8, dtype=torch.bfloat16) == 0
    assert most(rprop, 1024) == most(muon, 1024) == most(adamw, 1024, clip=1.0) == most(adamw, 8, lambda *a: a[0]) == 8


def test_a_loss_without_a_finite_gradient_has_the_values_that_orders_find(monkeypatch):
    def plain(model):
        return loss_of(model, *LOSSES["code"]).detach()

    def infinite(model):
        root = (model.inner.weight.sum() * 0).sqrt()  # 0, and its slope 0 / 0
        return loss_of(model, *LOSSES["code"]) + root

    def infinite_later(model):
        graphs.append(torch.is_grad_enabled())
        return infinite(model) if sum(graphs) > 1 else loss_of(model, *LOSSES["code"])

    graphs = []
    found = [values_of("adamw", 6, loss).values for loss in (plain, infinite, infinite_later)]
    assert found[0].isfinite().all() and torch.equal(*found[:2]) and torch.equal(found[2], found[0])
    monkeypatch.setattr(quadratic, "PLAYERS", 0)
    assert torch.equal(values_of("adamw", 6, plain).values, found[0])


@pytest.mark.parametrize(("n", "permutations"), [(4, 4), (4, 6), (2, 2), (1, 2)])
def test_coalitions_are_enumerated_where_those_are_no_more_than_sampling_visits(n, permutations):
    looks = []
    step = values_of(
        "adamw", n, lambda model: looks.append(1) or loss_of(model, *LOSSES["code"]), permutations=permutations
    )
    sampled = (n, permutations) == (4, 4)
    assert len(looks) == (len(visited(n, permutations)) if sampled else 2**n)
    assert bool(step.standard_error.any()) == sampled


def test_orders_come_in_pairs_of_which_every_second_is_half_a_turn_of_the_one_before():
    found = shapley.orders(8, 10, 3)
    assert found.shape == (10, 8) and np.array_equal(np.sort(found), np.tile(np.arange(8), (10, 1)))
    assert np.array_equal(found[::2], found[1::2, ::-1])
    assert np.array_equal(np.roll(found[:8:4], 4, 1), found[2:8:4])
    assert len({tuple(order) for order in found}) == 10
    assert len({tuple(order) for order in shapley.orders(3, 40, 3)}) == 6
    assert shapley.orders(1, 2, 0).tolist() == [[0], [0]]
    assert not np.array_equal(shapley.orders(8, 8, (0, 1)), shapley.orders(8, 8, (0, 2)))


def test_a_game_of_pairs_is_known_from_one_order_and_its_reverse_and_any_game_from_many():
    rng = np.random.default_rng(0)
    pairs, three = np.triu(rng.normal(size=(6, 6))), rng.normal(size=(64, 2))

    def along(orders, utility):
        members = [[np.isin(np.arange(6), order[:k]) for k in range(7)] for order in orders]
        return np.array([[utility(m) for m in row] for row in members])

    of_pairs = lambda m: m @ pairs @ m  # noqa: E731
    orders = shapley.orders(6, 2, 1)
    np.testing.assert_allclose(shapley.from_orders(orders, along(orders, of_pairs))[0], shapley.exact(of_pairs, 6)[0])
    anything = lambda m: three[(m * 2 ** np.arange(6)).sum()]  # noqa: E731
    exact, total = shapley.exact(anything, 6)
    draws = []
    for seed in range(200):
        orders = shapley.orders(6, 4, seed)
        draws.append(shapley.from_orders(orders, along(orders, anything)))
        np.testing.assert_allclose(draws[-1][0].sum(0), total)
    values, errors = (np.array(v) for v in zip(*draws, strict=True))
    spread = values.std(0, ddof=1)
    assert (np.abs(values.mean(0) - exact) < 4 * spread / 200**0.5).all()
    assert (np.sqrt((errors**2).mean(0)) > 0.9 * spread).all()  # rather too large than too small


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_training_is_untouched_to_the_bit(kind):
    def trained(tracked):
        model, optimizer = tied(kind, torch.float32)
        warmed(model, optimizer, 1)
        tracker = inrun.track(model, optimizer, "monte_carlo", validation=validation(model)) if tracked else None
        for t in range(2):
            x, y = tokens(6, t)
            if tracker is None:
                loss_of(model, x, y).backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                with tracker.step(range(6)) as step:
                    loss_of(model, x, y).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                assert step.standard_error.any()
        own = [optimizer.seen, *optimizer.sums] if kind == "coupled" else []
        return [*model.state_dict().values(), *own, *(v for s in optimizer.state.values() for v in s.values())]

    plain = trained(False)
    assert all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in zip(trained(True), plain, strict=True))


def test_memory_is_reported_while_coalitions_are_gone_through_and_bounded():
    model, optimizer = tied("coupled", torch.float32)
    x, y = tokens()
    seen = []

    def loss():
        seen.append(tracker.memory)
        return loss_of(model, *LOSSES["code"])

    tracker = inrun.track(model, optimizer, "monte_carlo", validation={"a": loss, "b": loss})
    with tracker.step(range(N)):
        loss_of(model, x, y).backward()
        optimizer.step()
    numel = sum(p.numel() for p in model.parameters() if p.requires_grad)
    kept = seen[0]["kept"]
    expected = {"kept": kept, "kept_peak": kept, "weights": 4 * numel, "coalition": 8 * numel}
    twice = sum(p.numel() for p in (*model.parameters(), model.head.weight) if p.requires_grad)  # the head is tied
    stored = [(m["coalition"] - 8 * numel) / (4 * twice) for m in seen]
    assert stored == sorted(stored) and stored[0] == 0 and stored[-1] == N
    expected["coalition"] = seen[-1]["coalition"]
    assert {k: seen[-1][k] for k in expected} == expected and len(seen) == 2 * 2**N
    assert tracker.memory == dict.fromkeys(expected, 0) | {"kept_peak": kept, "directions": 4 * numel, "validation": 0}
    tracker.close()
    tracker = inrun.track(model, optimizer, "monte_carlo", validation=loss, keep_bytes=kept - 1)
    with pytest.raises(inrun.InRunError, match=f"keep_bytes={kept - 1:,} "), tracker.step(range(N)):
        loss_of(model, x, y).backward()


def test_a_validation_loss_that_fails_leaves_the_weights_as_they_were():
    model, optimizer = tied("adamw")
    looks = []

    def loss():
        looks.append(1)
        if len(looks) == 7:
            raise KeyboardInterrupt
        return loss_of(model, *LOSSES["code"])

    tracker = inrun.track(model, optimizer, "monte_carlo", validation=loss)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyboardInterrupt), tracker.step(range(N)):
        loss_of(model, *tokens()).backward()
        optimizer.step()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert len(tracker.ledger) == tracker.memory["kept"] == 0


def test_the_check_names_what_bypasses_its_module_before_any_value():
    model, (x, y) = Bypass(), data("attention")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    calls = []
    tracker = inrun.track(model, optimizer, "monte_carlo", validation=lambda: calls.append(1) or loss_of(model, x, y))
    with pytest.raises(inrun.InRunError, match=r"do not add up .*\n.*a\.weight"), tracker.step(range(len(x))):
        loss_of(model, x, y).backward()
        optimizer.step()
    assert len(tracker.ledger) == len(calls) == 0


def test_a_step_without_an_update_or_a_backward():
    model, optimizer = tied("adamw")
    tracker = inrun.track(model, optimizer, "monte_carlo", validation=validation(model, LOSSES))
    with pytest.warns(UserWarning, match="did not run"), tracker.step(range(N)) as step:
        loss_of(model, *tokens()).backward()
    assert torch.equal(step.values, torch.zeros(N, 2)) and torch.equal(step.standard_error, torch.zeros(N, 2))

    def half_a_step():
        with tracker.step() as step:
            step.batch(range(2))
            loss_of(model, *tokens(2)).backward()
            step.batch(range(2, 4))
            optimizer.step()

    with pytest.raises(inrun.InRunError, match=r"a backward through it for each of .* 2 batches, batch 2 had none"):
        half_a_step()
    tracker.check_due = False
    with pytest.raises(inrun.InRunError, match=r"no backward pass reached .* batch 2 of 2"):
        half_a_step()
    optimizer.zero_grad()
    with pytest.raises(inrun.InRunError, match="expected ids"), tracker.step():
        loss_of(model, *tokens()).backward()
        optimizer.step()


def test_what_is_not_supported_is_one_clear_error(monkeypatch):
    model, optimizer = tied("adamw")
    loss = lambda: loss_of(model, *LOSSES["code"])  # noqa: E731
    for got, options in (
        ("validation blocks", {}),
        ("pairwise", {"validation": loss, "pairwise": range(4)}),
        ("pairwise", {"validation": "batch", "pairwise": range(4)}),
        ("validation='batch'", {"validation": "batch"}),
    ):
        with pytest.raises(inrun.InRunError, match=f"'monte_carlo': expected validation=<callable> .* got {got}"):
            inrun.track(model, optimizer, "monte_carlo", **options)
    for permutations in (0, 3, 8.0):
        with pytest.raises(ValueError, match=rf"permutations: expected an even integer .* got {permutations}"):
            inrun.track(model, optimizer, "monte_carlo", validation=loss, permutations=permutations)
    with pytest.raises(ValueError, match=r"validate_every: expected 1 with method 'monte_carlo'.* got 2"):
        inrun.track(model, optimizer, "monte_carlo", validation=loss, validate_every=2)
    with pytest.raises(ValueError, match="keep: expected 'device' or 'host', got 'disk'"):
        inrun.track(model, optimizer, "monte_carlo", validation=loss, keep="disk")
    with pytest.raises(inrun.InRunError, match="step\\(\\) needs no closure, got LBFGS"):
        inrun.track(model, torch.optim.LBFGS(model.parameters()), "monte_carlo", validation=loss)
    rows = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    with pytest.raises(inrun.InRunError, match=r"'monte_carlo': expected layers that compute each row .* got 1\.\w+"):
        inrun.track(rows, torch.optim.SGD(rows.parameters()), "monte_carlo", validation=lambda: rows(rows[0].weight))

    tracker = inrun.track(model, optimizer, "monte_carlo", validation=loss)
    for got, options in (
        ("recompute", {"recompute": loss}),
        ("tokens", {"tokens": T}),
        ("segments", {"segments": [0, 2, 4, 6, 9, 15], "tokens": T}),
    ):
        with (
            pytest.raises(inrun.InRunError, match=f"{got}: expected None with method"),
            tracker.step(range(N), **options),
        ):
            pass
    with pytest.raises(inrun.InRunError, match="expected one process, got parameters sharded"):
        tracker._method.require_shards_do()
    monkeypatch.setattr(type(tracker.ranks), "size", 2)
    with pytest.raises(inrun.InRunError, match="expected one process, got 2"), tracker.step(range(N)):
        pass


def test_an_optimizer_that_cannot_be_copied_says_so():
    model, optimizer = tied("coupled")
    optimizer.lock = (i for i in range(3))
    tracker = inrun.track(model, optimizer, "monte_carlo", validation=validation(model))
    with pytest.raises(inrun.InRunError, match=r"can be copied.* got Coupled, .*generator"), tracker.step(range(N)):
        loss_of(model, *tokens()).backward()
        optimizer.step()


def test_a_sample_without_a_gradient_is_worth_nothing_in_float64_too():
    """What is subtracted again would leave rounding behind, of which Lion's sign would make a step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 4).double(), torch.randint(3, (5,))
    other = torch.randn(6, 4).double(), torch.randint(3, (6,))
    optimizer = Lion(model.parameters(), lr=0.02)
    tracker = inrun.track(
        model, optimizer, "monte_carlo", validation=lambda: F.cross_entropy(model(other[0]), other[1])
    )
    with tracker.step(range(5)) as step:
        losses = F.cross_entropy(model(x), y, reduction="none")
        (losses[:2].sum() + losses[3:].sum()).div(5).backward()
        optimizer.step()
    assert step.values[2] == 0 and (step.values[[0, 1, 3, 4]] != 0).all()


def test_memory_that_runs_out_in_a_copy_of_the_optimizer_is_told_as_such(monkeypatch):
    """A loop that takes a smaller batch then waits for that error."""

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    parameter = torch.nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adafactor([parameter])
    monkeypatch.setattr(copy, "deepcopy", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        updates._twin(optimizer, {})
