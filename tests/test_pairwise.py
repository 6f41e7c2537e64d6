"""One value for each validation sample: against float64 gradients of single samples, and a target for each."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from models import MODELS, B, Scale, T, data, gradient, loss_of, make, sample_gradients
from torch import nn
from torch.utils.checkpoint import checkpoint

import inrun
from inrun import factors, pairwise
from inrun.factors import Factors
from inrun.tap import Layout

V, LR = 4, 0.3
IDS = [f"v{v}" for v in range(V)]


def close(found, expected, rtol=2e-4):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def oracle(model, train, validation, rule=lambda n, total, g: LR * g):
    """`<K g_v, g_z>`, `[B, V]`; the rule: a parameter's name, the whole validation gradient, one sample's -> K g_v."""
    ours, theirs = sample_gradients(model, *train), sample_gradients(model, *validation)
    total = gradient(model, *validation)
    return torch.stack([
        torch.stack([sum((rule(n, total[n], v[n]) * z[n]).sum() for n in z) for v in theirs]) for z in ours
    ])  # fmt: skip


def run(tracker, model, optimizer, train, validation, steps=1, ids=None):
    """So many steps by validation blocks, and one block after them."""
    for t in range(steps + 1):
        with tracker.validation():
            loss_of(model, *validation).backward()
        if t < steps:
            with tracker.step(range(len(train[0])) if ids is None else ids) as step:
                loss_of(model, *train).backward()
                optimizer.step()
                optimizer.zero_grad()
    return step


@pytest.mark.parametrize("name", list(MODELS))
def test_sgd_values_are_the_products_of_single_samples(name, monkeypatch):
    calls = []
    kernel = pairwise.ghost_dot_pairwise
    monkeypatch.setattr(pairwise, "ghost_dot_pairwise", lambda *a: calls.append(1) or kernel(*a))
    model = make(name)
    train, validation = data(name), data(name, V, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    expected = oracle(model, train, validation)
    tracker = inrun.track(model, optimizer, pairwise=IDS)
    step = run(tracker, model, optimizer, train, validation)
    assert step.values.shape == (B, V)
    close(step.values, expected)
    assert calls
    rows = tracker.ledger.rows().to_pylist()
    assert {row["target"] for row in rows} == set(IDS)
    close(torch.tensor([r["value"] for r in rows if r["target"] == "v2"]), expected[:, 2])


@pytest.mark.parametrize("targets", [1, 2])
def test_secant_in_adams_first_steps_adds_up_to_the_value_on_the_loss(targets):
    """Where a coordinate's direction is bounded by what Adam can make it, each validation sample's is."""

    def values(pairwise):
        model, train = make("mlp"), data("mlp")
        held = [data("mlp", V, 2 + k) for k in range(targets)]
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
        losses = {f"t{k}": lambda k=k: loss_of(model, *held[k]) for k in range(targets)}
        names = {name: IDS for name in losses} if pairwise else None
        tracker = inrun.track(model, optimizer, "secant", validation=losses, pairwise=names)
        found = []
        for _ in range(3):
            with tracker.step(range(B)) as step:
                loss_of(model, *train).backward()
                optimizer.step()
                optimizer.zero_grad()
            found.append(step.values.view(B, targets, -1).sum(2))
        return torch.stack(found)

    torch.testing.assert_close(values(True), values(False), rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["gpt_tied", "gpt_untied", "reused", "attention", "unknown"])
@pytest.mark.parametrize("form", ["gradients", "directions"])
def test_adam_in_its_second_step_and_in_parts_of_the_validation_samples(name, form, monkeypatch):
    lr, b1, b2, eps = 0.01, 0.9, 0.999, 1e-8
    model = make(name)
    train, validation = data(name), data(name, V, 2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    monkeypatch.setattr(pairwise, "CHUNK", 3 * 8 * 8 * 3)
    monkeypatch.setattr(pairwise, "rows_at_a_time", lambda elements, on_gpu: max(1, 3 * 8 * (B + V) // elements))
    by_gradients, seen = pairwise._by_gradients, []
    monkeypatch.setattr(pairwise, "_by_gradients", lambda *a: seen.append(1) or by_gradients(*a))
    if form == "directions":
        monkeypatch.setattr(pairwise, "_factors", lambda *a: None)
    tracker = inrun.track(model, optimizer, pairwise=IDS)
    run(tracker, model, optimizer, train, validation)
    states = {n: optimizer.state[p] for n, p in model.named_parameters() if p.requires_grad}

    def rule(n, total, g):
        moment = b2 * states[n]["exp_avg_sq"].double() + (1 - b2) * total**2
        return lr * (1 - b1) / (1 - b1**2) * g / ((moment / (1 - b2**2)).sqrt() + eps)

    tracker.close()
    expected = oracle(model, train, validation, rule)
    tracker = inrun.track(model, optimizer, pairwise=IDS)
    close(run(tracker, model, optimizer, train, validation).values, expected, 1e-3)
    assert bool(seen) == (form == "gradients")


@pytest.mark.parametrize("name", ["gpt_tied", "unknown", "loose", "attention"])
@pytest.mark.parametrize("method", ["secant", "path", "path_secant"])
def test_deferred_methods_equal_a_target_for_each_sample(name, method):
    def values(pairs):
        model = make(name)
        kind = torch.optim.SGD if method == "secant" else torch.optim.AdamW
        optimizer = kind(model.parameters(), lr=0.02)
        x, y = data(name, V, 2)
        options = {"pairwise": IDS} if pairs else {"targets": IDS}
        tracker = inrun.track(model, optimizer, method, **options)
        steps = []
        for t in range(4):
            if pairs:
                scale = 8.0 if t % 2 else 1.0
                with tracker.validation(scale=scale):
                    (scale * loss_of(model, x, y)).backward()
            else:
                for v, sample in enumerate(IDS):
                    with tracker.validation(sample):
                        (loss_of(model, x[v : v + 1], y[v : v + 1]) / V).backward()
            if t < 3:
                with tracker.step(range(B)) as step:
                    loss_of(model, *data(name, seed=t)).backward()
                    optimizer.step()
                    optimizer.zero_grad()
                steps.append(step)
        return torch.stack([step.values for step in steps])

    close(values(True), values(False).double(), 1e-3)


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.inner, self.reentrant = make("gpt_tied"), reentrant

    def forward(self, x):
        gpt = self.inner
        h = gpt.tokens(x) + gpt.positions(torch.arange(T)[None])
        for block in gpt.blocks:
            h = checkpoint(block, h, use_reentrant=self.reentrant)
        return gpt.head(gpt.norm(h))


@pytest.mark.parametrize("reentrant", [False, True])
def test_callable_targets_accumulation_checkpointing_and_a_kept_set(reentrant):
    model = Checkpointed(reentrant)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    (x, y), code, prose = data("gpt"), data("gpt", V, 2), data("gpt", 3, 3)
    losses = {"code": lambda: loss_of(model, *code), "prose": lambda: loss_of(model, *prose)}
    samples = {"prose": ["a", "b", "c"], "code": range(V)}
    tracker = inrun.track(model, optimizer, validation=losses, validate_every=2, pairwise=samples, keep="host")
    assert tracker.columns == ("code/0", "code/1", "code/2", "code/3", "prose/a", "prose/b", "prose/c")
    kept = [sample_gradients(model.inner, *v) for v in (code, prose)]
    for _ in range(2):  # the second step with the validation samples of the first
        rows = sample_gradients(model.inner, x, y)
        expected = [[LR * sum((v[n] * z[n]).sum() for n in z) for v in (*kept[0], *kept[1])] for z in rows]
        with tracker.step() as step:
            for part in (slice(0, 2), slice(2, B)):
                step.batch(range(B)[part])
                (loss_of(model, x[part], y[part]) * len(x[part]) / B).backward()
            optimizer.step()
            optimizer.zero_grad()
        close(step.values, torch.tensor(expected))


def test_with_documents_with_tokens_and_with_a_loss_scale():
    def values(scale=1.0, **layout):
        model = make("gpt_tied")
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        tracker = inrun.track(model, optimizer, pairwise=IDS)
        with tracker.validation(scale=scale):
            (scale * loss_of(model, *data("gpt", V, 2))).backward()
        ids = range(len(layout["segments"]) - 1) if "segments" in layout else range(B)
        with tracker.step(ids, **layout) as step:
            loss_of(model, *data("gpt")).backward()
            optimizer.step()
        return step.values

    whole = values().double()
    tokens = values(tokens=T)
    assert tokens.shape == (B, T, V)
    close(tokens.sum(1), whole)
    close(values(segments=[0, 2, 4 * T, 5 * T], tokens=T), torch.stack([
        tokens[0, :2].sum(0), tokens[0, 2:].sum(0) + tokens[1:4].sum((0, 1)), tokens[4].sum(0)]).double())  # fmt: skip
    close(values(scale=64.0), whole)


def test_autocast_and_half_precision_weights():
    train, validation = data("gpt"), data("gpt", V, 2)
    expected = oracle(make("gpt_tied"), train, validation)
    for half in (False, True):
        model = make("gpt_tied")
        model = model.bfloat16() if half else model
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        tracker = inrun.track(model, optimizer, pairwise=IDS)
        with torch.autocast("cpu", torch.bfloat16, enabled=not half):
            step = run(tracker, model, optimizer, train, validation)
        close(step.values, expected, 0.05)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["first", "path"])
def test_an_autocast_around_the_step_does_not_reach_the_products(method, dtype):
    """In float16 they would overflow with a loss scale; Adam's first steps turn, which takes squares as well."""

    def values(around):
        model = make("gpt_tied")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tracker = inrun.track(model, optimizer, method, pairwise=IDS)
        (x, y), validation = data("gpt_tied"), data("gpt_tied", V, 2)
        with tracker.validation():
            loss_of(model, *validation).backward()
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
        with torch.autocast("cpu", dtype, enabled=around), tracker.step(range(B)) as step:
            with torch.autocast("cpu", enabled=False):
                scaler.scale(loss_of(model, x, y)).backward()
            scaler.step(optimizer)
            scaler.update()
        return step.values

    plain = values(False)
    torch.testing.assert_close(values(True), plain, rtol=1e-5, atol=1e-6 * plain.abs().max().item())


class Heads(nn.Module):
    """Two heads on one trunk that learns nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = nn.ModuleList([nn.Linear(8, 5), nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 3))])

    def forward(self, x, head):
        return self.heads[head](x)


@pytest.mark.parametrize("segments", [None, torch.tensor([0, 3, 3, 11, 24])])
@pytest.mark.parametrize("kind", ["weight", "table", "bias"])
def test_gradients_of_factors_in_half_precision_are_summed_in_float32(kind, segments):
    g = torch.Generator().manual_seed(0)
    left, right = (torch.randn(3, 8, n, generator=g).bfloat16() for n in (9, 4))
    if kind == "table":
        left = torch.randint(9, (3, 8), generator=g)
    rows, layout = torch.tensor([1, 2, 5, 6, 7]), Layout(3, None if segments is None else 8, segments)
    of_rows = F.one_hot(left, 9).double() if kind == "table" else left.double()
    tokens = of_rows if kind == "bias" else of_rows[..., None] * right.double()[:, :, None]
    ends = torch.arange(4) * 8 if segments is None else segments
    samples = [x.sum(0)[rows] for x in tokens.flatten(0, 1).tensor_split(ends[1:-1])]
    run = Factors(left, None if kind == "bias" else right)
    found = torch.cat(list(factors.gradients([run], layout, rows, 2, torch.float32)), 1)
    torch.testing.assert_close(found.double(), torch.stack(samples).flatten(1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_what_validation_reaches_no_part_of_is_worth_nothing(kind):
    torch.manual_seed(0)
    model = Heads()
    optimizer = kind(model.parameters(), lr=0.01)
    tracker = inrun.track(model, optimizer, pairwise=IDS)
    with tracker.validation():
        model(torch.randn(V, 8), 0).square().mean().backward()
    with tracker.step(range(B)) as step:
        model(torch.randn(B, 8), 1).square().mean().backward()
        optimizer.step()
    assert torch.equal(step.values, torch.zeros(B, V))


@pytest.mark.parametrize("method", ["first", "path"])
def test_batches_that_wait_on_the_host_are_scored_one_at_a_time(method, monkeypatch):
    """A path's first step under Adam turns: what its slope misses is counted once."""

    def values(keep):
        model = make("gpt_tied")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tracker = inrun.track(model, optimizer, method, pairwise=IDS, keep=keep)
        (x, y), validation = data("gpt_tied"), data("gpt_tied", V, 2)
        with tracker.validation():
            loss_of(model, *validation).backward()
        with tracker.step() as step:
            for rows in (slice(0, 2), slice(2, B)):
                step.batch(range(B)[rows])
                (loss_of(model, x[rows], y[rows]) * len(x[rows]) / B).backward()
            optimizer.step()
        return step.values

    together, at_once = pairwise._together, []
    monkeypatch.setattr(pairwise, "_together", lambda *a: at_once.append(len(together(*a))) or together(*a))
    whole = values("device")
    assert set(at_once) == {1}
    at_once.clear()
    torch.testing.assert_close(values("host"), whole, rtol=1e-6, atol=1e-7 * whole.abs().max().item())
    assert set(at_once) == {2}


def test_a_parameter_of_no_dimensions_in_a_step_that_turns():
    """Adam's first step is a sign, of which validation samples share what no slope gives."""

    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.log = make("mlp"), nn.Parameter(torch.tensor(0.3))

        def forward(self, x):
            return self.inner(x) * self.log.exp()

    def values(pairwise):
        model, held = Tempered(), data("mlp", V, 2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        tracker = inrun.track(model, optimizer, "path", validation=lambda: loss_of(model, *held), pairwise=pairwise)
        with tracker.step(range(B)) as step:
            loss_of(model, *data("mlp")).backward()
            optimizer.step()
        return step.values

    torch.testing.assert_close(values(IDS).sum(1), values(None), rtol=2e-4, atol=1e-6)


def test_training_is_untouched_and_memory_is_bounded_and_reported():
    def trained(tracked=True, **options):
        model = make("unknown")
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        tracker = inrun.track(model, optimizer, "path", pairwise=IDS, **options) if tracked else None
        for _ in range(2):
            if tracker is None:
                loss_of(model, *data("unknown")).backward()
                optimizer.step()
                optimizer.zero_grad()
            else:
                run(tracker, model, optimizer, data("unknown"), data("unknown", V, 2))
        return model, tracker

    plain = trained(False)[0].state_dict()
    model, tracker = trained()
    assert all(torch.equal(v, plain[k]) for k, v in model.state_dict().items())
    memory = tracker.memory
    parameters = sum(p.numel() * 4 for p in model.parameters() if p.requires_grad)
    assert memory["directions"] == memory["validation"] == parameters
    assert memory["weights"] == 0 < memory["kept"] < memory["kept_peak"]  # the validation's; with the step's
    trained(keep_bytes=memory["kept_peak"])
    with pytest.raises(inrun.InRunError, match=f"keep_bytes={memory['kept_peak'] - 1:,} "):
        trained(keep_bytes=memory["kept_peak"] - 1)
    tracker.close()
    assert set(tracker.memory.values()) == {0, memory["kept_peak"]}


def test_one_input_of_several_layers_counts_once():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8, bias=False) for _ in range(3))

        def forward(self, x):
            return self.q(x) * self.k(x) + self.v(x)

    model, x = Three(), torch.randn(5, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, "path", validation=lambda: model(x).sum())
    with tracker.step(range(5)):
        model(x).square().sum().backward()
        optimizer.step()
    assert tracker.memory["kept_peak"] == 4 * x.numel() * 4  # x, and three output gradients


class Counting(Scale):
    """A module with no rule, and a buffer that every forward writes."""

    def __init__(self):
        super().__init__(8)
        self.register_buffer("runs", torch.zeros(()))

    def forward(self, x):
        self.runs += 1
        return super().forward(x)


def test_a_module_that_is_run_again_keeps_its_buffers_and_its_copied_weights_count():
    model, x = Counting(), torch.randn(5, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, "path", pairwise=range(5))
    with tracker.validation():
        model(x).square().sum().backward()
    assert tracker.memory["kept"] == (2 * 40 + 8 + 1) * 4  # input, output gradient, weight and buffer as they were
    with tracker.step(range(5)):
        model(x).square().sum().backward()
        optimizer.step()
    assert model.runs == 2


def test_bad_input_is_one_clear_error():
    model = make("mlp")
    sgd = torch.optim.SGD(model.parameters(), lr=LR)
    loss = lambda: loss_of(model, *data("mlp", V, 2))  # noqa: E731
    for method, options in (("second", {}), ("path_simpson", {}), ("path", {"clip": 1.0})):
        with pytest.raises(inrun.InRunError, match=f"pairwise: expected a method of .* got '{method}'"):
            inrun.track(model, sgd, method, validation=loss, pairwise=IDS, **options)
    with pytest.raises(ValueError, match="expected distinct ids for 'validation', got 1 repeated"):
        inrun.track(model, sgd, pairwise=["a", "a"])
    with pytest.raises(ValueError, match="expected distinct names of target and id together, got a/b/c twice"):
        inrun.track(model, sgd, targets=("a", "a/b"), pairwise={"a": ["b/c"], "a/b": ["c"]})
    with pytest.raises(ValueError, match="pairwise: expected ids for each of a, b, got a"):
        inrun.track(model, sgd, targets=("a", "b"), pairwise=IDS)
    with pytest.raises(TypeError, match="pairwise: expected a sequence"):
        inrun.track(model, sgd, pairwise="abc")

    tracker = inrun.track(model, sgd, validation=loss, pairwise=["a", "b", "c"])
    with pytest.raises(ValueError, match=r"B = 3, the number of sample ids"), tracker.step(range(B)):
        pass
    tracker.close()
    tracker = inrun.track(model, sgd, validation=loss, pairwise=IDS)
    with pytest.raises(inrun.InRunError, match="recompute: expected None"), tracker.step(range(B), recompute=loss):
        pass
    with pytest.warns(UserWarning, match="did not run"), tracker.step(range(B)) as step:
        F.cross_entropy(model(data("mlp")[0]), data("mlp")[1]).backward()
    assert torch.equal(step.values, torch.zeros(B, V))


@pytest.mark.parametrize("name", ["mlp", "gpt_tied", "reused", "checkpointed"])
@pytest.mark.parametrize("method", ["first", "path"])
def test_validation_samples_in_the_batch_itself_do_not_train(name, method):
    def made():
        return Checkpointed(False) if name == "checkpointed" else make(name)

    data_name = "gpt" if name == "checkpointed" else name
    (x, y), (x_val, y_val) = data(data_name), data(data_name, V, 2)
    model, plain = made(), made()
    expected = oracle(plain, (x, y), (x_val, y_val))
    optimizer, other = (torch.optim.SGD(m.parameters(), lr=LR) for m in (model, plain))
    tracker = inrun.track(model, optimizer, method, validation="batch", pairwise=IDS)
    scale = 8.0
    with tracker.step(range(B), scale=scale) as step:
        out = model(torch.cat([x, x_val]))
        losses = [F.cross_entropy(o.flatten(0, -2), t.flatten()) for o, t in ((out[:B], y), (out[B:], y_val))]
        (scale * sum(losses)).backward()
        for p in model.parameters():
            if p.grad is not None:
                p.grad.div_(scale)
        nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        optimizer.step()
    close(step.values, expected)
    loss_of(plain, x, y).backward()
    other.step()
    for p, q in zip([p for p in model.parameters() if p.requires_grad], plain.parameters(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(8), nn.LSTM(8, 8, batch_first=True)], ids=lambda m: type(m).__name__)
def test_a_layer_whose_rows_cannot_be_had_one_by_one_is_refused(layer):
    model = nn.Sequential(nn.Linear(8, 8), layer)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(inrun.InRunError, match=r"pairwise: expected layers that compute each row .* got 1\.\w+"):
        inrun.track(model, optimizer, pairwise=IDS)
    assert type(model[0]) is nn.Linear  # nothing was changed


def test_what_cannot_hold_validation_samples_in_its_batches_says_so():
    model = make("mlp")
    sgd, adam = torch.optim.SGD(model.parameters(), lr=LR), torch.optim.Adam(model.parameters())
    for method, options in (("first", {}), ("secant", {"pairwise": IDS})):
        with pytest.raises(inrun.InRunError, match=f"expected pairwise= and method 'first' or 'path'.*{method}"):
            inrun.track(model, sgd, method, validation="batch", **options)
    with pytest.raises(inrun.InRunError, match=r"expected torch\.optim\.SGD with method 'first', got Adam"):
        inrun.track(model, adam, validation="batch", pairwise=IDS)
    with pytest.raises(inrun.InRunError, match=r"do not train it; head\.bias is not, or is excluded"):
        inrun.track(model, sgd, validation="batch", pairwise=IDS, exclude=["head.bias"])
    loose = make("loose")
    with pytest.raises(inrun.InRunError, match=r"do not train it; cls, pos is not, or is excluded"):
        inrun.track(loose, torch.optim.SGD(loose.parameters()), validation="batch", pairwise=IDS)
    tracker = inrun.track(model, sgd, validation="batch", pairwise=IDS)
    with pytest.raises(inrun.InRunError, match="validation: expected in the batches"), tracker.validation():
        pass
    with pytest.raises(ValueError, match=r"expected shape \[B, ...\] with B = 9"), tracker.step(range(B)):
        model(data("mlp")[0])
    with pytest.raises(inrun.InRunError, match="batch: expected one in a step"), tracker.step(range(B)) as step:
        step.batch(range(B))
