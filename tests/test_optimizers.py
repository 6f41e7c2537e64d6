"""Several optimizers over one model, and updates that are not elementwise: Muon's, Adafactor's, and a user's own."""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, WIDTH, B, data, gradient, loss_of, make, oracle_values, sample_gradients
from torch import nn

import inrun
from inrun import coupled, directions, formulas, inline, shapley, turning, updates
from inrun_kernels import adam, native


def close(found, expected, rtol=1e-4):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def double(name):
    """A model and its data in float64."""
    (x, y), (vx, vy) = data(name), data(name, 4, 2)
    return make(name).double(), (x.double(), y), (vx.double(), vy)


def train(model, optimizers, batch, before_update=lambda: None):
    loss_of(model, *batch).backward()
    before_update()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def matrices(model):
    return [p for p in model.parameters() if p.dim() == 2], [p for p in model.parameters() if p.dim() != 2]


def muon_and_adamw(model, lr=0.02):
    two, other = matrices(model)
    return [torch.optim.Muon(two, lr=lr), torch.optim.AdamW(other, lr=lr / 2)]


class Container(torch.optim.Optimizer):
    """As torchtitan's: an optimizer whose step is that of those it holds."""

    def __init__(self, optimizers):
        self.optimizers = optimizers
        super().__init__([p for o in optimizers for g in o.param_groups for p in g["params"]], {})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)


# ------------------------------------------------------------------ several optimizers


@pytest.mark.parametrize("method", ["first", "secant", "path_secant"])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_two_optimizers_are_as_two_groups_of_one(method, kind):
    def values(split):
        model, batch, validation = double("mlp")
        two, other = matrices(model)
        parts = [{"params": two, "lr": 0.02}, {"params": other, "lr": 0.3}]
        optimizers = [kind([part]) for part in parts] if split else [kind(parts)]
        given = {"list": optimizers, "container": Container(optimizers), "": optimizers[0]}[split]
        tracker = inrun.track(model, given, method, validation=lambda: loss_of(model, *validation))
        assert tracker.optimizers == tuple(optimizers)
        for _ in range(3):
            with tracker.step(range(B)) as step:
                train(model, [given] if split == "container" else optimizers, batch)
        return step.values, model.state_dict()

    expected, weights = values("")
    for split in ("list", "container"):
        found, same = values(split)
        assert torch.equal(found, expected)
        assert all(torch.equal(same[k], v) for k, v in weights.items())


def test_each_parameter_has_its_own_optimizers_direction():
    model, batch, validation = double("mlp")
    two, other = matrices(model)
    optimizers = [torch.optim.SGD(two, lr=0.3), torch.optim.SGD(other, lr=0.05)]
    names = {n for n, p in model.named_parameters() if p.dim() == 2}
    expected = oracle_values(model, lambda n, g: (0.3 if n in names else 0.05) * g, batch, validation)
    tracker = inrun.track(model, optimizers, validation=lambda: loss_of(model, *validation))
    with tracker.step(range(B)) as step:
        train(model, optimizers, batch, lambda: nn.utils.clip_grad_norm_(model.parameters(), 1e-3))
    norm = math.sqrt(sum(g.square().sum().item() for g in gradient(model, *batch).values()))
    assert norm > 1e-3
    close(step.values, expected * (step.values.sum() / expected.sum()).item())
    assert 0 < step.values.sum() < expected.sum()


def test_what_several_optimizers_cannot_do_is_said():
    model, batch, validation = double("mlp")
    two, other = matrices(model)
    make_two = lambda: [torch.optim.SGD(two, lr=0.1), torch.optim.SGD(other, lr=0.1)]  # noqa: E731
    with pytest.raises(inrun.InRunError, match=r"each parameter in one of them, one of shape .* is in two"):
        inrun.track(model, [*make_two(), torch.optim.SGD(other, lr=0.1)])
    with pytest.raises(inrun.InRunError, match="every trainable parameter in its groups, 5 are not"):
        inrun.track(model, make_two()[:1])
    with pytest.raises(inrun.InRunError, match=r"SGD, Adam, AdamW .*, got RMSprop"):
        inrun.track(model, [make_two()[0], torch.optim.RMSprop(other)])
    optimizers = make_two()
    tracker = inrun.track(model, optimizers, validation=lambda: loss_of(model, *validation))
    with pytest.raises(inrun.InRunError, match="got a second one"), tracker.step(range(B)):
        train(model, [*optimizers, optimizers[1]], batch)
    with pytest.warns(UserWarning, match="did not run in the step block for 1 of 2"), tracker.step(range(B)) as step:
        train(model, optimizers[:1], batch)
    assert step.values.tolist() == [0.0] * B
    with tracker.step(range(B)) as step:
        train(model, optimizers, batch)
    assert step.values.abs().min() > 0


# ------------------------------------------------------------------ updates that are not elementwise


def mix(size):
    noise = torch.randn(size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(size))
    return torch.eye(size, dtype=torch.float64) + 0.3 * noise


class Mixed(torch.optim.Optimizer):
    """SGD whose step mixes the coordinates of the first axis."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(mixed(p.grad, p, self.state[p], group).to(p.dtype))


def mixed(grad, param, state, group):
    return -group["lr"] * torch.tensordot(mix(len(param)).to(grad.dtype), grad, 1)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("warmed", [False, True])
def test_a_users_rule_that_mixes_coordinates_is_the_written_out_one(clip, recompute, warmed):
    lr = 0.3
    model, batch, validation = double("mlp")
    names = [n for n, _ in model.named_parameters()]
    rows, whole, val = sample_gradients(model, *batch), gradient(model, *batch), gradient(model, *validation)
    norm = math.sqrt(sum(whole[n].square().sum().item() for n in names))
    turned = {n: lr * torch.tensordot(mix(len(val[n])).T, val[n], 1) for n in names}
    if clip is None:
        direction = turned
    else:
        assert norm > 2 * clip
        unit = {n: whole[n] / norm for n in names}
        along = sum((unit[n] * turned[n]).sum() for n in names)
        log = math.log(norm / clip)
        direction = {n: clip / norm * (turned[n] + log * (turned[n] - unit[n] * along)) for n in names}
    expected = torch.stack([sum((direction[n] * row[n]).sum() for n in names) for row in rows])
    optimizer = Mixed(model.parameters(), lr)
    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *validation), update=mixed,
                          clip=clip)  # fmt: skip
    clipped = (lambda: nn.utils.clip_grad_norm_(model.parameters(), clip)) if clip else (lambda: None)
    if warmed:
        optimizer.param_groups[0]["lr"] = 0.0  # a warm-up's first step, which tells nothing of the rule
        with tracker.step(range(B)) as step:
            train(model, [optimizer], batch, clipped)
        assert step.values.tolist() == [0.0] * B
        optimizer.param_groups[0]["lr"] = lr
    with tracker.step(range(B), recompute=(lambda: loss_of(model, *batch)) if recompute else None) as step:
        train(model, [optimizer], batch, clipped)
    close(step.values, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [0.0, 1.0])
def test_a_coupled_direction_is_the_mean_slope_along_the_path(size, dtype):
    """Of an update that bends, writes into its gradient and goes by the weights; those move before it is asked for."""
    torch.manual_seed(0)
    param, grad = nn.Parameter(torch.randn(5).to(dtype)), (size * torch.randn(5)).to(dtype)
    before, g, along = param.detach().double().clone(), grad.double(), torch.randn(5, dtype=torch.float64)
    optimizer = torch.optim.SGD([param], lr=0.1)
    slot = SimpleNamespace(name="p", param=param, shard=param, grad=grad, optimizer=optimizer, group=0,
                           options=optimizer.param_groups[0], state={})  # fmt: skip

    def rule(grad, param, state, group):
        grad.mul_(-group["lr"])
        return grad * param / (0.01 + grad.square().sum())

    def update(at):
        return rule(at.clone(), before, {}, slot.options)

    held = coupled.Coupled(rule)
    assert held.among([(0, slot)], 1.0) == ([(0, slot)] if size else []) and not grad.requires_grad
    held.hold(0, slot, g, update(g))
    with torch.no_grad():
        param.zero_()
    times = (torch.arange(1000, dtype=torch.float64) + 0.5) / 1000
    slopes = [torch.autograd.functional.jacobian(update, t * g).T @ along for t in times]
    found = held.direction(0, along)
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    close(found, -torch.stack(slopes).mean(0), 2e-3)


def test_whether_an_update_couples_is_seen_at_the_size_of_the_gradient_and_past_what_is_no_number():
    param = nn.Parameter(torch.zeros(64))
    optimizer = torch.optim.SGD([param], lr=0.1)
    slot = SimpleNamespace(name="p", param=param, shard=param, grad=torch.ones(64), optimizer=optimizer, group=0,
                           options=optimizer.param_groups[0], state={})  # fmt: skip
    assert coupled.Coupled(bounded).among([(0, slot)], 1.0) and not coupled.Coupled(bounded).among([(0, slot)], 0.01)
    slot.grad[3] = math.nan
    assert not coupled.Coupled(lambda grad, *_: grad.sign() + grad).among([(0, slot)], 1.0)


class Signed(torch.optim.Optimizer):
    """Keeps what its step needs beside what `Optimizer` keeps."""

    def __init__(self, params, lr):
        super().__init__(params, {})
        self.rate, self.steps = {"lr": lr}, [0]

    @torch.no_grad()
    def step(self, closure=None):
        self.steps[0] += 1
        for p in self.param_groups[0]["params"]:
            p.sub_(self.rate["lr"] / self.steps[0] * p.grad.abs().sqrt() * p.grad.sign())


class Counted(Signed):
    """Keeps one count for all parameters in its state, as MADGRAD does, and may share its rate among them."""

    shares = False

    @torch.no_grad()
    def step(self, closure=None):
        self.steps[0] += 1
        self.state.setdefault("k", 0)
        self.state["k"] += 1
        params = self.param_groups[0]["params"]
        for p in params:
            by = self.state["k"] * (len(params) if self.shares else 1)
            p.sub_(self.rate["lr"] / by * p.grad.abs().sqrt() * p.grad.sign())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_few_coordinates_that_move_by_each_others_gradients_are_found(size):
    params = [nn.Parameter(torch.zeros(size, dtype=torch.float64)) for _ in range(16)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    slots = [
        SimpleNamespace(name=str(i), param=p, shard=p, grad=torch.randn(size).double(), optimizer=optimizer, group=0,
                        options=optimizer.param_groups[0], state={})
        for i, p in enumerate(params)
    ]  # fmt: skip
    rule, tries = lambda grad, *_: tries.append(0) or grad / (1 + grad.norm()), []
    found = coupled.Coupled(rule)
    for expected in (True, False):  # tried once
        tries.clear()
        assert len(found.among(list(enumerate(slots)), 1.0)) == (0 if size == 1 else 16)
        assert bool(tries) is expected


@pytest.mark.parametrize("dim", [0, 1])
@pytest.mark.parametrize("shape", [(2, 2), (2, 8), (8, 2), (2, 21), (2, 610), (64, 64)])
def test_coordinates_that_move_by_those_of_their_row_or_column_are_found(shape, dim):
    param = nn.Parameter(torch.zeros(shape))
    optimizer = torch.optim.SGD([param], lr=0.1)
    slot = SimpleNamespace(name="p", param=param, shard=param, grad=torch.zeros(shape), optimizer=optimizer, group=0,
                           options=optimizer.param_groups[0], state={})  # fmt: skip
    rule = lambda grad, *_: grad / (1 + grad.norm(dim=dim, keepdim=True))  # noqa: E731
    seen = 0  # rows or columns that tell: in a small one, some have all of theirs or none
    for k in range(shape[1 - dim]):
        slot.grad = torch.zeros(shape).index_fill_(1 - dim, torch.tensor([k]), 1.0)
        seen += len(coupled.Coupled(rule).among([(0, slot)], 1.0))
    assert seen >= shape[1 - dim] / 4


@pytest.mark.parametrize("stepped", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [*updates.ELEMENTWISE, torch.optim.Adafactor], ids=lambda kind: kind.__name__)
def test_an_update_in_pieces_is_the_whole_one(kind, dtype, stepped, monkeypatch):
    """To the bit, with the state of a first step and later; where memory lies apart, or rows count, it is not cut."""
    options = {torch.optim.SGD: {"momentum": 0.9, "nesterov": True}, torch.optim.Adam: {"amsgrad": True}}.get(kind, {})
    once = updates._step_twin
    for whole in (True, False):
        param = nn.Parameter(torch.randn(3, 5, dtype=dtype) if whole else torch.randn(5, 3, dtype=dtype).T)
        optimizer = kind([param], lr=0.1, **options)
        if stepped:
            param.grad = torch.randn_like(param)
            optimizer.step()
        slot = SimpleNamespace(
            param=param, optimizer=optimizer, group=0, options=optimizer.param_groups[0], state=optimizer.state[param]
        )
        gradient, steps = torch.randn(3, 5, dtype=torch.float64), []
        (expected,) = updates.updates([slot], [gradient])
        with monkeypatch.context() as patch:
            patch.setattr(updates, "_step_twin", lambda *a, steps=steps: steps.append(1) or once(*a))
            patch.setattr(updates, "CHUNK_OF_CPU", 7)
            (found,) = updates.updates([slot], [gradient])
        assert torch.equal(found, expected) and found.shape == gradient.shape
        assert len(steps) == (3 if whole and kind in updates.ELEMENTWISE else 1)


@pytest.mark.parametrize("steps", [0, 3])
def test_adams_largest_direction_is_that_without_old_squares(steps):
    param = nn.Parameter(torch.zeros(3))
    optimizer, zeros = torch.optim.Adam([param], lr=0.1, betas=(0.9, 0.99), eps=0.0), torch.zeros(3)
    state = {"step": torch.tensor(float(steps)), "exp_avg": zeros, "exp_avg_sq": zeros} if steps else {}
    slot = SimpleNamespace(optimizer=optimizer, options=optimizer.param_groups[0], state=state)
    along = torch.tensor([1.0, -2.0, 1e-3])
    found = (directions.coefficient(slot, [along]) * along).abs()
    torch.testing.assert_close(found, torch.full((3,), directions.largest(slot)))


class CountedInPlace(Counted):
    """In a tensor, which every step writes into."""

    def __init__(self, *args):
        super().__init__(*args)
        self.state["k"] = torch.zeros((), dtype=torch.int64)


class CountedInItsGroup(Signed):
    """In a tensor that is an option of its group, as torch-optimi's do."""

    def __init__(self, *args):
        super().__init__(*args)
        self.param_groups[0]["k"] = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def step(self, closure=None):
        self.steps[0] += 1
        (group,) = self.param_groups
        group["k"] += 1
        assert self.steps == [group["k"]]
        for p in group["params"]:
            p.sub_(self.rate["lr"] / group["k"] * p.grad.abs().sqrt() * p.grad.sign())


@pytest.mark.parametrize("kind", [Signed, Counted, CountedInPlace, CountedInItsGroup])
def test_an_elementwise_optimizer_may_keep_attributes_of_its_own(kind):
    def values(**options):
        model, batch, validation = double("mlp")
        optimizer = kind(model.parameters(), 0.1)
        tracker = inrun.track(
            model, optimizer, "path_secant", validation=lambda: loss_of(model, *validation), **options
        )
        for _ in range(2):
            with tracker.step(range(B)) as step:
                train(model, [optimizer], batch)
        assert optimizer.steps == [2] and optimizer.state.get("k", 2) == 2
        assert step.values.sum().item() == pytest.approx(step.drop["validation"].item(), rel=1e-5)
        return step.values.double()

    written_out = lambda g, p, s, o: -0.1 / 2 * g.abs().sqrt() * g.sign()  # noqa: E731 - of the second step
    close(values(update=written_out), values(update="elementwise"), 1e-6)
    with pytest.raises(ValueError, match="expected 'elementwise', a function or None, got 'elementwize'"):
        values(update="elementwize")


class Drawing(Signed):
    """Draws random numbers, as a rounding to bfloat16 may."""

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            p.addcmul_(p.grad, torch.rand_like(p), value=-self.rate["lr"])


@pytest.mark.parametrize("method, options", [("path_secant", {"update": "elementwise"}), ("monte_carlo", {})])
def test_a_step_that_draws_random_numbers_is_scored_with_those_and_draws_them_itself(method, options):
    def ended(tracked):
        model, batch, validation = double("mlp")
        optimizer = Drawing(model.parameters(), 0.1)
        loss = lambda: loss_of(model, *validation)  # noqa: E731
        torch.manual_seed(1)
        if not tracked:
            train(model, [optimizer], batch)
            return model, loss()
        before = loss()
        tracker = inrun.track(model, optimizer, method, validation=loss, **options)
        with tracker, tracker.step(range(B)) as step:
            train(model, [optimizer], batch)
        assert step.values.sum().item() == pytest.approx((before - loss()).item(), rel=1e-4)
        return model, loss()

    (tracked, after), (plain, expected) = ended(True), ended(False)
    assert after == expected
    assert all(map(torch.equal, tracked.parameters(), plain.parameters()))


def test_an_elementwise_update_that_is_another_for_some_parameters_alone_is_said(monkeypatch):
    def step(kind):
        model, batch, validation = double("mlp")
        optimizer = kind(model.parameters(), 0.1)
        losses = {"validation": lambda: loss_of(model, *validation)}
        tracker = inrun.track(model, optimizer, "path", validation=losses, update="elementwise")
        with tracker.step(range(B)):
            train(model, [optimizer], batch)

    class Narrow(Signed):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.lerp_(p.grad.float(), 0.1)

    with pytest.raises(inrun.InRunError, match=r"taken for copies .* in float64; that of Narrow says .*RuntimeError"):
        step(Narrow)
    monkeypatch.setattr(Counted, "shares", True)
    with pytest.warns(UserWarning, match="update: expected what the step adds to a parameter.* by Counted"):
        step(Counted)


def test_an_update_is_held_to_the_first_step_that_moves_something():
    model, batch, validation = double("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *validation),
                          update=lambda g, p, state, group: -3 * group["lr"] * g)  # fmt: skip
    for lr, expected in ((0.0, False), (0.0, False), (0.1, True), (0.1, False)):
        optimizer.param_groups[0]["lr"] = lr
        with warnings.catch_warnings(record=True) as said, tracker.step(range(B)):
            warnings.simplefilter("always")
            train(model, [optimizer], batch)
        assert any("update: expected" in str(each.message) for each in said) == expected


@pytest.mark.parametrize("error", [ZeroDivisionError, torch.OutOfMemoryError])
def test_what_a_users_rule_or_memory_says_is_said_as_it_is(error, monkeypatch):
    model, batch, validation = double("mlp")
    optimizer = Signed(model.parameters(), 0.1)

    def failing(*_):
        raise error

    if error is torch.OutOfMemoryError:
        monkeypatch.setattr(updates, "_step_twin", failing)
    update = "elementwise" if error is torch.OutOfMemoryError else failing
    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *validation), update=update)
    with pytest.raises(error), tracker.step(range(B)):
        train(model, [optimizer], batch)


def test_a_mixed_rule_scores_several_targets_as_each_alone():
    def values(names):
        model, batch, validation = double("mlp")
        losses = {"a": lambda: loss_of(model, *validation), "b": lambda: 2 * loss_of(model, *batch)}
        optimizer = Mixed(model.parameters(), 0.1)
        tracker = inrun.track(model, optimizer, "path_secant", validation={n: losses[n] for n in names}, update=mixed)
        with tracker.step(range(B)) as step:
            train(model, [optimizer], batch)
        assert tracker.memory["weights"] == 0
        return step.values.double()

    both = values(("a", "b"))
    for m, name in enumerate(("a", "b")):
        close(both[:, m], values((name,)), 1e-6)


def orthogonalized(x, steps):
    """Newton-Schulz by singular values."""
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.norm()
    for _ in range(steps):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
@pytest.mark.parametrize("options", [{}, {"nesterov": False}, {"adjust_lr_fn": "match_rms_adamw", "ns_steps": 3}])
def test_muons_update_is_torchs(shape, options):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = torch.optim.Muon([param], lr=0.1, **options)
    for _ in range(2):
        before, state = param.detach().clone(), copy.deepcopy(optimizer.state.get(param, {}))
        grad = torch.randn(shape, dtype=torch.float64)
        param.grad = grad.clone()
        optimizer.step()
        group = optimizer.param_groups[0]
        found = formulas.muon(grad, before, state, group)
        moved = param.detach() - before
        assert (found - moved).norm() < 0.03 * moved.norm()  # torch orthogonalizes in bfloat16
        average = 0.95 * state.get("momentum_buffer", 0.0) + 0.05 * grad
        x = 0.05 * grad + 0.95 * average if group["nesterov"] else average
        ratio = 0.2 * math.sqrt(6) if "adjust_lr_fn" in options else math.sqrt(max(1, shape[0] / shape[1]))
        exact = -0.1 * ratio * orthogonalized(x, group["ns_steps"]) - 0.01 * before
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-9)


def adafactor(params, lr=0.01, **options):
    return torch.optim.Adafactor(params, lr=lr, **options)


def adafactor_of_transformers(params, lr=0.01, **options):
    kind = pytest.importorskip("transformers").Adafactor
    return kind(params, lr=lr, **{"relative_step": False, "scale_parameter": False, **options})


@pytest.mark.parametrize("size", [1.0, 1e-9], ids=["", "tiny"])
@pytest.mark.parametrize("shape", [(6, 4), (5,), (3, 2, 4), ()], ids=str)
@pytest.mark.parametrize(
    "optimizer, options",
    [
        (adafactor, {}),
        (adafactor, {"weight_decay": 0.1, "maximize": True, "d": 1.5, "eps": (1e-3, 1e-2)}),
        (adafactor, {"foreach": True, "beta2_decay": -0.5}),
        (adafactor, {"lr": 10.0, "eps": (1e-30, 5.0)}),
        (adafactor_of_transformers, {}),
        (adafactor_of_transformers, {"scale_parameter": True, "beta1": 0.9, "weight_decay": 0.1}),
        (adafactor_of_transformers, {"lr": None, "relative_step": True, "warmup_init": True, "clip_threshold": 0.7}),
        (adafactor_of_transformers, {"scale_parameter": True, "eps": (1e-30, 5.0)}),
    ],
)
def test_adafactors_update_is_that_of_its_steps(optimizer, options, shape, size):
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(shape, dtype=torch.float64))
    optimizer = optimizer([param], **options)
    for _ in range(3):
        before, state = param.detach().clone(), copy.deepcopy(optimizer.state.get(param, {}))
        param.grad = size * torch.randn(shape, dtype=torch.float64)
        optimizer.step()
        group = updates.pinned(optimizer.param_groups[0])
        found = formulas.of(optimizer)(param.grad.clone(), before, state, group)
        torch.testing.assert_close(found, param.detach() - before, rtol=1e-9, atol=1e-12)


def test_an_eps_that_goes_by_the_dtype_is_that_of_the_real_parameters():
    torch.manual_seed(0)
    param = nn.Parameter(torch.randn(6, 4))
    optimizer = adafactor([param], lr=1.0)
    slot = SimpleNamespace(param=param, optimizer=optimizer, group=0, options=optimizer.param_groups[0], state={})
    param.grad = 1e-8 * torch.randn(6, 4)  # below float32's eps, above float64's
    (twin,) = updates.updates([slot], [param.grad.double()])
    (rule,) = updates.updates([slot], [param.grad.double()], formulas.adafactor)
    before = param.detach().clone()
    optimizer.step()
    for found in (twin, rule):
        torch.testing.assert_close(found.float(), param.detach() - before, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("shape", [(6, 4), (5,)], ids=str)
@pytest.mark.parametrize("kind", [adafactor, adafactor_of_transformers])
def test_adafactors_update_has_a_derivative_where_the_gradient_is_zero(kind, shape):
    param = nn.Parameter(torch.randn(shape))
    optimizer = kind([param])
    grad = torch.randn(shape).triu(1) if param.dim() == 2 else torch.zeros(shape)  # a row and a column of zeros
    grad.requires_grad_()
    moved = formulas.of(optimizer)(grad, param.detach(), {}, updates.pinned(optimizer.param_groups[0]))
    moved.backward(torch.ones(shape))
    assert moved.dtype == torch.float32 and moved.isfinite().all() and grad.grad.isfinite().all()


def test_steps_that_grow_relative_to_their_number_end_with_its_root():
    param = nn.Parameter(torch.randn(6, 4, dtype=torch.float64))
    optimizer = adafactor_of_transformers([param], lr=None, relative_step=True)
    for _ in range(2):
        before, state = param.detach().clone(), copy.deepcopy(optimizer.state.get(param, {}))
        param.grad = torch.randn(6, 4, dtype=torch.float64)
        optimizer.step()
        if state:
            found = formulas.of(optimizer)(param.grad.clone(), before, state, optimizer.param_groups[0])
            torch.testing.assert_close(found, param.detach() - before, rtol=1e-9, atol=1e-12)
        optimizer.state[param]["step"] = 20_000


@pytest.mark.parametrize("dtype, near", [(torch.float64, 0.999), (torch.float32, 0.999), (torch.bfloat16, None)])
@pytest.mark.parametrize("kind", [adafactor, adafactor_of_transformers])
def test_adafactors_values_are_near_the_exact_ones_and_leave_training_alone(kind, dtype, near):
    step, utility, model = exact_step("path_secant", lambda model: [kind(model.parameters(), 0.005)], dtype=dtype)
    assert step.values.isfinite().all() and step.values.any()
    if near is not None:  # else the update's own rounding is as large
        exact, total = shapley.exact(utility, 6)
        fidelity = shapley.fidelity(step.values.double().numpy(), exact, total)
        assert fidelity["efficiency_gap"] < (1e-5 if dtype == torch.float64 else 1e-2)
        assert fidelity["pearson"] > near, fidelity
    plain = exact_step(None, lambda model: [kind(model.parameters(), 0.005)], dtype=dtype)[2].state_dict()
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())


def test_an_update_of_another_shape_is_an_error():
    step = functools.partial(exact_step, "path", lambda model: [torch.optim.Adagrad(model.parameters())], warm=0)
    with pytest.raises(inrun.InRunError, match=r"update: expected what the step adds .* of its shape \(.*\), got \(1,"):
        step(update=lambda grad, param, state, group: grad[None])


def muon_step(method, warm=20, dtype=torch.float64, **options):
    """A tracked step of Muon and AdamW on a wider classifier, and the game it plays."""
    return exact_step(method, lambda model: muon_and_adamw(model, 0.01), warm, dtype, **options)


def exact_step(method, make_optimizers, warm=20, dtype=torch.float64, **options):
    """A tracked step (untracked, if `method` is None) on a wider classifier, and the game it plays."""
    torch.manual_seed(0)
    x, mixing = torch.randn(200, 16, dtype=dtype), torch.randn(16, 10, dtype=dtype)
    y = (x @ mixing).argmax(1)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 10)).to(dtype)
    optimizers = make_optimizers(model)
    for t in range(warm):
        train(model, optimizers, (x[4 * t : 4 * t + 4], y[4 * t : 4 * t + 4]))
    if method is None:
        train(model, optimizers, (x[100:106], y[100:106]))
        return None, None, model
    before = copy.deepcopy((model.state_dict(), [o.state_dict() for o in optimizers]))
    held = (x[110:], y[110:])
    tracker = inrun.track(model, optimizers, method, validation=lambda: loss_of(model, *held), **options)
    with tracker.step(range(6)) as step:
        train(model, optimizers, (x[100:106], y[100:106]))
    tracker.close()
    again = copy.deepcopy(model)

    def utility(members):
        again.load_state_dict(before[0])
        others = make_optimizers(again)
        for optimizer, state in zip(others, copy.deepcopy(before[1]), strict=True):
            optimizer.load_state_dict(state)
        chosen = torch.arange(100, 106)[torch.from_numpy(members)]
        (F.cross_entropy(again(x[chosen]), y[chosen], reduction="sum") / 6).backward()
        for optimizer in others:
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():
            return -loss_of(again, *held).item()

    return step, utility, model


def test_muon_adds_up_to_the_measured_drop_and_is_near_the_exact_value():
    step, utility, _ = muon_step("path_secant")
    exact, total = shapley.exact(utility, 6)
    fidelity = shapley.fidelity(step.values.double().numpy(), exact, total)
    assert step.drop["validation"].item() == pytest.approx(total, rel=1e-9)
    assert fidelity["efficiency_gap"] < 1e-5
    assert fidelity["pearson"] > 0.97, fidelity


def test_muons_values_hardly_depend_on_the_nodes(monkeypatch):
    found = {}
    for nodes in (1, 4, 24):
        monkeypatch.setattr(coupled, "NODES", nodes)
        found[nodes] = muon_step("path")[0].values.double()
    off = {nodes: ((found[nodes] - found[24]).norm() / found[24].norm()).item() for nodes in (1, 4)}
    assert off[4] < 0.1 < off[1], off
    assert found[4].sum().item() == pytest.approx(found[24].sum().item(), rel=1e-5)


def test_training_with_muon_is_untouched_to_the_bit():
    plain = muon_step("path_secant", dtype=torch.float32)[2].state_dict()
    for method in ("path", "path_simpson"):
        other = muon_step(method, dtype=torch.float32)[2].state_dict()
        assert all(torch.equal(v, plain[k]) for k, v in other.items())
    torch.manual_seed(0)
    x, mixing = torch.randn(200, 16), torch.randn(16, 10)
    y = (x @ mixing).argmax(1)
    model = nn.Sequential(nn.Linear(16, 48), nn.GELU(), nn.Linear(48, 48), nn.GELU(), nn.Linear(48, 10))
    optimizers = muon_and_adamw(model, 0.01)
    for part in [*(slice(4 * t, 4 * t + 4) for t in range(20)), slice(100, 106)]:
        train(model, optimizers, (x[part], y[part]))
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())


def test_all_that_stands_for_an_update_is_counted():
    """A gradient, what it moves, the parameter and its momentum."""
    model, batch, validation = double("mlp")
    optimizers, loss = muon_and_adamw(model), lambda: loss_of(model, *validation)
    tracker = inrun.track(model, optimizers, "path", validation=loss)
    with tracker.step(range(B)):
        train(model, optimizers, batch)
    slot = next(s for s in tracker.slots if s.optimizer is optimizers[0])
    held, grad = coupled.Coupled(None), torch.ones_like(slot.param)
    held.hold(0, slot, grad, grad.clone())
    assert sum(x.nbytes for x in held.tensors()) == 4 * grad.nbytes
    held.release()
    assert not list(held.tensors())


def test_a_step_that_an_exception_ended_leaves_nothing_behind():
    model, batch, validation = double("mlp")
    optimizer = Mixed(model.parameters(), 0.1)
    losses = {"validation": lambda: loss_of(model, *validation)}
    tracker = inrun.track(model, optimizer, "path_secant", validation=losses, update=mixed)
    with pytest.raises(KeyError), tracker.step(range(B)):
        train(model, [optimizer], batch)
        raise KeyError
    assert tracker.memory["weights"] > 0
    with tracker.step(range(B)) as step:
        assert tracker.memory["weights"] == 0
        train(model, [optimizer], batch)
    assert step.values.sum().item() == pytest.approx(step.drop["validation"].item(), rel=1e-5)


def test_a_step_of_its_own_is_said_and_one_that_needs_a_closure_is_refused(recwarn):
    class Counting(torch.optim.AdamW):
        def step(self, closure=None):
            self.count = getattr(self, "count", 0) + 1
            return super().step(closure)

    class Renamed(torch.optim.SGD):
        pass

    model = make("mlp")
    for kind in (torch.optim.SGD, torch.optim.AdamW, Renamed):
        inrun.track(model, kind(model.parameters(), lr=0.1)).close()
    assert not [w for w in recwarn if "optimizer" in str(w.message)]
    for method in ("first", "secant"):
        with pytest.warns(
            UserWarning, match=r"Counting has a step\(\) of its own, and is taken for AdamW.*path_secant"
        ):
            inrun.track(model, Counting(model.parameters()), method).close()
    lbfgs = torch.optim.LBFGS(model.parameters())
    with pytest.raises(inrun.InRunError, match=r"step\(\) needs no closure, got LBFGS"):
        inrun.track(model, lbfgs, "path", update="elementwise")


@pytest.mark.parametrize("closure", [False, True])
def test_a_step_that_calls_that_of_its_class_is_one(closure):
    """Torch tells hooks of both where both classes have been used."""

    class Inheriting(torch.optim.SGD):
        def step(self, closure=None):
            return super().step(closure)

    model, batch, validation = double("mlp")
    torch.optim.SGD(model.parameters())
    optimizer = Inheriting(model.parameters(), lr=0.1)
    expected = oracle_values(model, lambda n, g: 0.1 * g, batch, validation)
    with pytest.warns(UserWarning, match="taken for SGD"):
        tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *validation))

    def loss():
        optimizer.zero_grad()
        loss = loss_of(model, *batch)
        loss.backward()
        return loss

    with tracker.step(range(B)) as step:
        optimizer.step(loss) if closure else (loss(), optimizer.step())
    close(step.values, expected)
    with pytest.raises(inrun.InRunError, match="got a second one"), tracker.step(range(B)):
        for _ in range(2):
            loss()
            optimizer.step()


def test_two_steps_within_that_of_another_optimizer_are_two():
    class Around(torch.optim.SGD):
        def step(self, closure=None):
            for _ in range(2):
                self.inner.step()

    model, batch, validation = double("mlp")
    around = Around(model.parameters())
    around.inner = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, around.inner, validation=lambda: loss_of(model, *validation))
    with pytest.raises(inrun.InRunError, match="got a second one"), tracker.step(range(B)):
        loss_of(model, *batch).backward()
        around.step()


def test_what_an_update_that_is_not_elementwise_cannot_do_is_said():
    def stepped(**options):
        model, batch, validation = double("mlp")
        optimizer = Mixed(model.parameters(), 0.1)
        tracker = inrun.track(
            model, optimizer, "path", **{"validation": lambda: loss_of(model, *validation), **options}
        )
        before = copy.deepcopy(model.state_dict())
        try:
            with tracker.step(range(B)):
                train(model, [optimizer], batch)
        finally:
            assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())

    with pytest.raises(inrun.InRunError, match=r"an elementwise one.* by Mixed moves a coordinate by the gradients of"):
        stepped(update="elementwise")
    with pytest.raises(inrun.InRunError, match="a function that autograd differentiates"):
        stepped(update=lambda *args: mixed(*args).detach())
    with pytest.raises(inrun.InRunError, match=r"got Mixed\. If it updates weights"):
        stepped()
    model, batch, validation = double("mlp")
    optimizer = Mixed(model.parameters(), 0.1)
    losses = {"validation": lambda: loss_of(model, *validation)}
    tracker = inrun.track(model, optimizer, "path", validation=losses, update=mixed, pairwise=range(4))
    message = "pairwise: expected an optimizer that updates coordinate by coordinate"
    with pytest.raises(inrun.InRunError, match=message), tracker.step(range(B)):
        train(model, [optimizer], batch)
    with pytest.raises(inrun.InRunError, match=r"path_secant' knows .* Muon"):
        inrun.track(make("mlp"), [torch.optim.Muon([nn.Parameter(torch.zeros(2, 2))])])


# ------------------------------------------------------------------ Adam's directions in one launch


@pytest.mark.parametrize("kernel", ["native", "triton", "triton, steps on the device"])
def test_one_call_writes_what_torch_writes_parameter_by_parameter(kernel, monkeypatch):
    """Groups with rates of their own, maximising, from the first step on; what does not fit is left to torch."""
    if kernel == "native" and native.library() is None:
        pytest.skip("needs a C compiler")
    if kernel != "native":
        pytest.importorskip("triton")

    def directions_of(fits):
        written = []
        monkeypatch.setattr(adam, "fits", fits)
        monkeypatch.setattr(inline, "write_adam_directions", lambda parts: written.extend(parts) or write(parts))
        model, batch, validation = make("gpt_tied"), data("gpt_tied"), data("gpt_tied", 4, 2)
        first, *rest = model.parameters()
        groups = [{"params": [first], "lr": 0.3, "maximize": True}, {"params": rest, "eps": 1e-3, "betas": (0.0, 0.9)}]
        amsgrad = groups[1]["params"].pop()
        optimizer = torch.optim.AdamW([*groups, {"params": [amsgrad], "amsgrad": True}], lr=0.01)
        tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *validation), check=False)
        found = []
        for _ in range(3):
            with tracker.step(range(B)) as step:
                found += [slot.direction.double() for slot in tracker.slots]
                train(model, [optimizer], batch)
            found.append(step.values.double())
        assert len(written) == (3 * (len(tracker.slots) - 1) if fits is fit else 0)
        return found

    fit, write = adam.fits, adam.write_adam_directions
    expected = directions_of(lambda part: False)
    monkeypatch.setattr(adam, "use_triton", lambda backend, x: kernel != "native")
    if kernel.endswith("device"):  # as fused and capturable optimizers have them
        part = adam.AdamPart
        monkeypatch.setattr(adam, "AdamPart", lambda step, **kw: part(step=torch.tensor(step), **kw))
    for found, right in zip(directions_of(fit), expected, strict=True):
        torch.testing.assert_close(found, right, rtol=3e-6, atol=1e-9)


def test_directions_written_by_their_addresses_are_seen_by_autograd():
    out, grad = torch.zeros(3), torch.tensor([1.0, -2.0, 0.0])
    kept = (torch.ones(3, requires_grad=True) * out).sum()
    part = adam.AdamPart(out, grad, None, 0.0, 0.1, (0.9, 0.99), 1e-8)
    if not adam.fits(part):
        pytest.skip("needs a C compiler")
    assert not adam.fits(adam.AdamPart(out[::2], grad[::2], None, 0.0, 0.1, (0.9, 0.99), 1e-8))
    adam.write_adam_directions([part])
    torch.testing.assert_close(out, torch.tensor([1.0, -1.0, 0.0]))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


def test_gradients_that_come_or_change_between_two_optimizers_steps():
    """Scored as they come by "first", where they are the second's own; else the values would not be the step's."""
    torch.manual_seed(0)
    models = [nn.ModuleList([nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)]) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    x, y = torch.randn(2, B, WIDTH), torch.randint(VOCAB, (2, B))
    tracked, plain = models

    def losses(model, x, y):
        return model[0](x).square().mean(), F.cross_entropy(model[1](x), y)

    def whole(model):
        return sum(losses(model, x[1], y[1]))

    def stepped(method, between, together):
        parts = [list(layer.parameters()) for layer in tracked]
        optimizers = [torch.optim.SGD(part, lr=0.1) for part in parts]
        tracker = inrun.track(tracked, optimizers, method, validation=lambda: whole(tracked))
        step = tracker.step(range(B))
        try:
            with step:
                first, second = losses(tracked, x[0], y[0])
                (first + second if together else first).backward()
                optimizers[0].step()
                between(second)
                optimizers[1].step()
        finally:
            tracked.zero_grad()
            tracker.close()
            tracked.load_state_dict(plain.state_dict())
        return step.values

    params = list(plain.parameters())
    g_v = torch.autograd.grad(whole(plain), params)
    rows = [torch.autograd.grad(sum(losses(plain, x[0, b : b + 1], y[0, b : b + 1])) / B, params) for b in range(B)]
    expected = torch.stack([0.1 * sum((a * b).sum() for a, b in zip(g_v, row, strict=True)) for row in rows])
    torch.testing.assert_close(stepped("first", lambda second: second.backward(), False), expected)
    for method in ("first", "path"):
        torch.testing.assert_close(stepped(method, lambda second: None, True), expected)
        with pytest.raises(inrun.InRunError, match="one common factor"):
            stepped(method, lambda second: nn.utils.clip_grad_norm_(tracked[1].parameters(), 1e-3), True)
    with pytest.raises(inrun.InRunError, match="before it; after it came gradients of 2"):
        stepped("path", lambda second: second.backward(), False)
    for method in ("first", "path"):
        with pytest.raises(inrun.InRunError, match=r"those of 2 parameters are gone since .* step: 1\.bias, 1\.weight"):
            stepped(method, lambda second: tracked[1].zero_grad(), True)
    with pytest.raises(inrun.InRunError, match=r"after it came gradients of 2 .*0\.weight, 0\.bias"):
        stepped("first", lambda second: losses(tracked, x[0], y[0])[0].backward(), True)


def test_a_backward_after_the_update_is_no_part_of_the_step():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(WIDTH, VOCAB))
    x, y = torch.randn(B, WIDTH), torch.randint(VOCAB, (B,))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for method in ("first", "path"):
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, x, y))
        with pytest.raises(inrun.InRunError, match="after it came gradients of 2"), tracker.step(range(B)):
            loss_of(model, x, y).backward()
            optimizer.step()
            loss_of(model, x, y).backward()
        model.zero_grad()
        tracker.close()


def test_a_gradient_that_is_zero_but_for_rounding_is_no_miss():
    """Of a bias that what follows takes away again."""
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Conv1d(3, 8, 3), nn.InstanceNorm1d(8), nn.ReLU(), nn.Flatten(), nn.Linear(48, VOCAB))
        model.requires_grad_(False)
        model[0].bias.requires_grad_(True)
        x, y = torch.randn(2, B, 3, 8), torch.randint(VOCAB, (2, B))
        optimizer = torch.optim.SGD([model[0].bias], lr=0.1)
        tracker = inrun.track(model, optimizer, validation=lambda m=model, x=x, y=y: loss_of(m, x[1], y[1]))
        with tracker.step(range(B)) as step:
            loss_of(model, x[0], y[0]).backward()
            optimizer.step()
        assert step.values.abs().max() < 1e-12
        tracker.close()


class Named(torch.optim.Optimizer):
    """Calls what it keeps as a gradient scaler, torch's hooks and its averages are called."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})
        self.grad_scale, self.found_inf, self.grad_hooks = 0.5, False, [lambda grad: 3 * grad]

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state, grad = self.state[p], p.grad * self.grad_scale
            for hook in self.grad_hooks:
                grad = hook(grad)
            state.setdefault("mu", torch.zeros_like(p)).mul_(0.5).add_(grad)
            p.sub_(self.param_groups[0]["lr"] * state["mu"])


def test_names_that_others_have_too_are_the_optimizers_own(monkeypatch):
    monkeypatch.setattr(turning, "LOOKED_AT", 16)  # coordinates of each parameter, and not all
    found = []
    for kind in (Named, lambda params, lr: torch.optim.SGD(params, lr=1.5 * lr, momentum=0.5)):
        model, batch, validation = double("mlp")
        optimizer = kind(model.parameters(), 0.1)
        tracker = inrun.track(model, optimizer, "path", validation=lambda m=model, v=validation: loss_of(m, *v),
                              update="elementwise")  # fmt: skip
        for _ in range(2):
            with tracker.step(range(B)) as step:
                train(model, [optimizer], batch)
        found.append(step.values.double())
    close(*found)


def test_an_optimizer_may_keep_handles_of_hooks_on_gradients():
    class Hooked(torch.optim.SGD):
        def __init__(self, params, lr):
            super().__init__(params, lr)
            self.seen, params = [], self.param_groups[0]["params"]
            self.grad_hooks = [
                p.register_post_accumulate_grad_hook(lambda p: self.seen.append(p.shape)) for p in params
            ]

        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.sub_(self.param_groups[0]["lr"] * p.grad)

    found = []
    for kind in (Hooked, torch.optim.SGD):
        model, batch, validation = double("mlp")
        optimizer = kind(model.parameters(), 0.1)
        tracker = inrun.track(model, optimizer, "path", validation=lambda m=model, v=validation: loss_of(m, *v),
                              update="elementwise")  # fmt: skip
        with tracker.step(range(B)) as step:
            train(model, [optimizer], batch)
        found.append(step.values.double())
    close(*found)


@pytest.mark.parametrize("in_place", [True, False])
def test_a_gradient_that_is_changed_alone_in_a_late_step_is_seen_in_the_next(in_place):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(30)), nn.Linear(WIDTH, VOCAB))
    optimizer, (batch, validation) = torch.optim.SGD(model.parameters(), lr=0.1), (data("mlp"), data("mlp", 4, 2))
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, *validation), check=False)
    param = model[3].weight

    def change():
        param.grad = param.grad.mul_(0.1) if in_place else param.grad * 0.1

    with tracker.step(range(B)):
        train(model, [optimizer], batch)
    with tracker.step(range(B)):  # that it is not among those watched
        train(model, [optimizer], batch, change)
    with pytest.raises(inrun.InRunError, match="one common factor"), tracker.step(range(B)):
        train(model, [optimizer], batch, change)


def bounded(grad, param, state, group):
    return -group["lr"] * grad / (grad.norm() / 0.3).clamp(min=1.0)


@pytest.mark.parametrize("update", [bounded, "elementwise"])
def test_an_update_whose_norm_is_bounded_couples_coordinates_where_it_is_large(update):
    class Bounded(torch.optim.Optimizer):
        @torch.no_grad()
        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                p.add_(bounded(p.grad, p, {}, self.param_groups[0]))

    values = []
    for sizes in ((5.0,), (1e-2, 5.0)):
        model, batch, validation = double("mlp")
        before, optimizer = copy.deepcopy(model.state_dict()), Bounded(model.parameters(), {"lr": 0.5})
        tracker = inrun.track(model, optimizer, "path", validation=lambda m=model, v=validation: loss_of(m, *v),
                              update=update)  # fmt: skip
        for size in sizes:
            model.load_state_dict(before)
            refused = pytest.raises(inrun.InRunError, match="moves a coordinate by the gradients of others")
            with contextlib.nullcontext() if callable(update) or size < 1 else refused, tracker.step(range(B)) as step:
                (size * loss_of(model, *batch)).backward()
                optimizer.step()
            optimizer.zero_grad()
        values.append(step)
    if callable(update):
        close(values[1].values.double(), values[0].values.double())


# ------------------------------------------------------------------ optimizers as others write them


class Squares(torch.optim.Optimizer):
    """Divides by the root of past squares, which it keeps where torch's do, by `id`, or for a list of its own."""

    def __init__(self, params, where="state"):
        super().__init__(params, {"lr": 0.1})
        self.where, self.mine, self.own = where, {}, list(self.param_groups[0]["params"])

    @torch.no_grad()
    def step(self, closure=None, times=1.0):
        for p in self.own if self.where == "list" else self.param_groups[0]["params"]:
            if p.grad is not None:
                state = self.mine.setdefault(id(p), {}) if self.where == "id" else self.state[p]
                squares = state.setdefault("squares", torch.zeros_like(p)).mul_(0.9).addcmul_(p.grad, p.grad, value=0.1)
                p.sub_(times * self.param_groups[0]["lr"] * p.grad / (squares.sqrt() + 0.1))


class Around(torch.optim.Optimizer):
    """Takes the step of one that it holds."""

    def __init__(self, params):
        self.inner = Squares(params)
        super().__init__(self.inner.param_groups, {})
        self.param_groups, self.state = self.inner.param_groups, self.inner.state

    def step(self, closure=None):
        self.inner.step()


def squares_step(make, method, take=lambda optimizer, loss: (loss(), optimizer.step()), **options):
    """The last of three tracked steps and the weights after it; without a method, the weights alone."""
    model, batch, validation = double("mlp")
    optimizer = make(model.parameters())
    tracker = method and inrun.track(
        model, optimizer, method, validation=lambda: loss_of(model, *validation), permutations=2, **options
    )

    def loss():
        loss = loss_of(model, *batch)
        loss.backward()
        return loss

    for _ in range(3):
        with tracker.step(range(B)) if tracker else contextlib.nullcontext() as step:
            take(optimizer, loss)
        optimizer.zero_grad()
    return step, list(model.parameters())


@pytest.mark.parametrize("method, options", [("path_secant", {"update": "elementwise"}), ("monte_carlo", {})])
@pytest.mark.parametrize(
    "make", [lambda p: Squares(p, "list"), lambda p: Squares(p, "id"), Around], ids=["list", "id", "around"]
)
def test_an_optimizer_that_holds_parameters_or_state_elsewhere_has_its_values_and_weights(make, method, options):
    expected, _ = squares_step(Squares, method, **options)
    step, weights = squares_step(make, method, **options)
    torch.testing.assert_close(step.values, expected.values)
    torch.testing.assert_close(step.drop, expected.drop)
    assert all(map(torch.equal, weights, squares_step(make, None)[1]))


@pytest.mark.parametrize("method, options", [("path_secant", {"update": "elementwise"}), ("monte_carlo", {})])
@pytest.mark.parametrize(
    "take",
    [
        lambda optimizer, loss: (loss(), optimizer.step(times=0.2)),
        lambda optimizer, loss: (loss(), optimizer.step(None, 0.2)),
        lambda optimizer, loss: optimizer.step(loss, 0.2),
        lambda optimizer, loss: optimizer.step(closure=loss, times=0.2),
    ],
    ids=["named", "in order", "with a closure", "all named"],
)
def test_what_a_step_is_given_is_a_part_of_the_update(take, method, options):
    class Closing(Squares):
        def step(self, closure=None, times=1.0):
            if closure is not None:
                closure()
            super().step(None, times)

    def slower(params):
        optimizer = Squares(params)
        optimizer.param_groups[0]["lr"] *= 0.2
        return optimizer

    expected, _ = squares_step(slower, method, **options)
    step, weights = squares_step(Closing, method, take, **options)
    torch.testing.assert_close(step.values, expected.values)
    torch.testing.assert_close(step.drop, expected.drop)
    assert all(map(torch.equal, weights, squares_step(Closing, None, take)[1]))


@pytest.mark.parametrize("method", ["path", "path_secant", "monte_carlo"])
def test_weights_that_a_hook_on_the_step_changes_are_said(method):
    def make(params):
        optimizer = torch.optim.AdamW(params, lr=0.01)

        @torch.no_grad()
        def shrink(*_):
            for p in optimizer.param_groups[0]["params"]:
                p.mul_(0.9)

        optimizer.register_step_post_hook(shrink)
        return optimizer

    with pytest.warns(UserWarning, match=r"update: expected what the step adds .* by AdamW .*; got .* has no hooks"):
        squares_step(make, method)


def test_an_optimizer_that_prepares_its_gradients_otherwise_is_said():
    class Prepared(torch.optim.AdamW):
        def _init_group(self, group, params, grads, *others):
            found = super()._init_group(group, params, grads, *others)
            grads[:] = [grad.sign() for grad in grads]
            return found

    with pytest.warns(UserWarning, match="Prepared has a step.* of its own, and is taken for AdamW"):
        squares_step(Prepared, "first")


def test_an_optimizer_without_hooks_or_whose_step_no_copy_can_take_is_said():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer, self.param_groups = optimizer, optimizer.param_groups

    class Closed(torch.optim.SGD):
        def step(self, closure=None):
            assert closure is not None
            super().step(closure)

    for method in ("first", "path", "monte_carlo"):
        with pytest.raises(inrun.InRunError, match=r"takes torch's hooks, got Wrapper, .*give the one it wraps"):
            squares_step(lambda params: Wrapper(torch.optim.SGD(params)), method)
    with pytest.raises(inrun.InRunError, match=r"of which a copy can take the step, .* of Closed says AssertionError"):
        squares_step(Closed, "monte_carlo", lambda optimizer, loss: optimizer.step(loss))


@pytest.mark.parametrize("method", ["first", "path_secant", "monte_carlo"])
def test_a_validation_loss_that_writes_to_weights_is_said(method):
    model, batch, validation = double("mlp")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    first = next(model.parameters())

    def loss():
        with torch.no_grad():
            first.mul_(0.5)
        return loss_of(model, *validation)

    message = "expected a loss that leaves the weights as they are, those of 1 parameters were written to: net.0.weight"
    tracker = inrun.track(model, optimizer, method, validation=loss)
    with pytest.warns(UserWarning, match=message), tracker.step(range(B)):
        train(model, [optimizer], batch)


@pytest.mark.parametrize("method", ["path", "monte_carlo"])
def test_the_updates_of_an_optimizer_that_moves_are_compared_in_two_steps(method, monkeypatch):
    """Beside one that never moves and one without parameters that are scored."""
    model, batch, validation = double("mlp")
    first, *others = model.parameters()
    last = others.pop()
    optimizers = [torch.optim.SGD([p], lr=lr) for p, lr in ((first, 0.0), (last, 0.1))]
    optimizers.append(torch.optim.SGD(others, lr=0.1))
    excluded = [name for name, p in model.named_parameters() if p is last]
    options = {"permutations": 2} if method == "monte_carlo" else {}
    tracker = inrun.track(
        model, optimizers, method, validation=lambda: loss_of(model, *validation), exclude=excluded, **options
    )
    compared, expected = [], inrun.tracker.expected

    def counted(moves):
        found = expected(moves)
        compared[-1] = len(found)
        return found

    monkeypatch.setattr(inrun.tracker, "expected", counted)
    for _ in range(4):
        compared.append(0)
        with tracker.step(range(B)):
            train(model, optimizers, batch)
    assert compared == [1 + len(others), 1 + len(others), 1, 1]
