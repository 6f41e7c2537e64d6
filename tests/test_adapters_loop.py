"""`Loop`: loops of one's own, with accelerate and by hand, and the figures that go to experiment trackers."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import Classifier, data, oracle_values
from torch import nn

import inrun
from inrun import InRunError
from inrun.adapters import Loop, TensorBoard
from inrun.adapters.loggers import Figures
from inrun.adapters.loop import with_clip

LR, N, BATCH = 0.2, 11, 3
X, Y = data("mlp", N, seed=5)
HELD_OUT = data("mlp", 4, seed=6)


def made():
    torch.manual_seed(0)
    model = Classifier()
    return model, torch.optim.SGD(model.parameters(), lr=LR), lambda: F.cross_entropy(model(HELD_OUT[0]), HELD_OUT[1])


def batches():
    """Of a shuffling loader, with ids of their own."""
    rows = [{"sample_id": f"s{i}", "x": X[i], "y": Y[i]} for i in range(N)]
    return torch.utils.data.DataLoader(rows, BATCH, shuffle=True, generator=torch.Generator().manual_seed(2))


def expected_values(weights, ids, divisor, autocast=None):
    model, rows = Classifier(), [int(i[1:]) for i in ids]
    model.load_state_dict(weights)
    return oracle_values(model, lambda n, g: LR * g, (X[rows], Y[rows]), HELD_OUT, autocast=autocast) / divisor


class Kept:
    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerate(precision):
    """Accumulated by `accumulate`, whose last batch of an epoch ends a step early."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # an earlier test's precision stays otherwise
    model, optimizer, held_out = made()
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=3, mixed_precision=precision, cpu=True)
    wrapped, optimizer, loader = accelerator.prepare(model, optimizer, batches())
    loop = Loop(wrapped, optimizer, held_out)
    before = {}
    for batch in loader:
        before.setdefault(loop.tracker.steps, {k: v.clone() for k, v in model.state_dict().items()})
        ids = batch.pop("sample_id")
        with accelerator.accumulate(wrapped), loop.batch(ids, last=accelerator.sync_gradients):
            accelerator.backward(F.cross_entropy(wrapped(batch["x"]), batch["y"]))
            optimizer.step()
            optimizer.zero_grad()
    loop.close()
    assert type(model.net[0]) is nn.Linear
    rows = loop.ledger.rows().to_pylist()
    assert [r["step"] for r in rows] == [0] * 9 + [1] * 2
    assert {r["sample_id"] for r in rows} == {f"s{i}" for i in range(N)}
    for step, divisor in ((0, 1), (1, 3)):  # a batch's mean over 3: of 3 batches, or of the last, of 2 samples, alone
        ids = [r["sample_id"] for r in rows if r["step"] == step]
        found = torch.tensor([r["value"] for r in rows if r["step"] == step]).double()
        expected = expected_values(before[step], ids, divisor)
        allowed = 2e-4 * expected.abs().max()
        if precision == "bf16":
            own = (expected_values(before[step], ids, divisor, torch.bfloat16) - expected).abs().max()
            allowed = torch.finfo(torch.bfloat16).eps * expected.abs().max() + 2 * own
        assert (found - expected).abs().max() <= allowed, step


def run(loop, model, optimizer, epochs=2):
    for _ in range(epochs):
        for batch in batches():
            with loop.batch(batch["sample_id"]):
                F.cross_entropy(model(batch["x"]), batch["y"]).backward()
                optimizer.step()
                optimizer.zero_grad()
    loop.close()


def test_optimizers_that_accelerate_has_prepared():
    """Several of them; the values are those of the plain ones."""
    accelerate, found = pytest.importorskip("accelerate"), []
    for prepared in (False, True):
        model, _, held_out = made()
        params = list(model.parameters())
        optimizers = [torch.optim.SGD(params[:2], lr=LR), torch.optim.SGD(params[2:], lr=LR / 4)]
        if prepared:
            accelerate.state.AcceleratorState._reset_state(True)
            optimizers = list(accelerate.Accelerator(cpu=True).prepare(*optimizers))
        loop = Loop(model, optimizers, held_out)
        with loop.batch(["a", "b"]):
            F.cross_entropy(model(X[:2]), Y[:2]).backward()
            for optimizer in optimizers:
                optimizer.step()
        found.append(loop.last.values)
        loop.close()
        if prepared:  # as `inrun.track` takes them too
            model.zero_grad()
            with inrun.track(model, optimizers, validation=held_out) as tracker, tracker.step(["a", "b"]) as step:
                F.cross_entropy(model(X[:2]), Y[:2]).backward()
                for optimizer in optimizers:
                    optimizer.step()
            assert step.values.any()
    assert torch.equal(*found) and found[0].any()


def test_compiled():
    model, optimizer, held_out = made()
    compiled = torch.compile(model, backend="eager")
    loop = Loop(compiled, optimizer, held_out, check=False)
    assert set(loop.tracker.coverage["tracked"]) == {name for name, _ in model.named_parameters()}
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    with loop.batch(["s0", "s1"]):
        F.cross_entropy(compiled(X[:2]), Y[:2]).backward()
        optimizer.step()
    torch.testing.assert_close(loop.last.values.double(), expected_values(weights, ["s0", "s1"], 1))
    loop.close()


def test_a_deferred_method():
    model, optimizer, held_out = made()
    optimizer.param_groups[0]["lr"] = 0.005  # relative to the measured drop, the values miss it by O(lr^2)
    kept = Kept()
    loop = Loop(model, optimizer, held_out, method="path_secant", logger=kept, log_every=4)
    run(loop, model, optimizer, epochs=1)
    assert kept.logged[0][0] == 3
    torch.testing.assert_close(loop.last.values.sum(), loop.last.drop["validation"], rtol=1e-3, atol=0)


def test_figures_are_those_of_the_ledger():
    model, optimizer, held_out = made()
    kept, losses = Kept(), []

    def source(i):
        return "even" if int(i[1:]) % 2 == 0 else "odd"

    def loss():
        losses.append(held_out())
        return losses[-1]

    loop = Loop(model, optimizer, loss, logger=kept, log_every=4, source_of=source)
    run(loop, model, optimizer)
    rows = loop.ledger.rows().to_pylist()
    assert [step for step, _ in kept.logged] == [3, 7]
    for (step, figures), first in zip(kept.logged, (0, 4), strict=True):
        mine = [r for r in rows if first <= r["step"] <= step]
        expected = {
            "inrun/value": [r["value"] for r in mine],
            "inrun/negative": [float(r["value"] < 0) for r in mine],
            "inrun/value/even": [r["value"] for r in mine if source(r["sample_id"]) == "even"],
            "inrun/value/odd": [r["value"] for r in mine if source(r["sample_id"]) == "odd"],
            "inrun/validation_loss": [float(losses[step])],
        }
        assert figures.pop("inrun/seconds") > 0
        assert figures == pytest.approx({k: sum(v) / len(v) for k, v in expected.items()}, rel=1e-5)


def test_samples_of_no_source_have_figures_too():
    model, optimizer, held_out = made()
    kept = Kept()
    run(
        Loop(model, optimizer, held_out, logger=kept, log_every=4, source_of={"s1": "a", "s2": "b"}.get),
        model,
        optimizer,
    )
    found = {name for _, figures in kept.logged for name in figures}
    assert {"inrun/value/a", "inrun/value/b", "inrun/value/(unknown)"} <= found


def test_several_targets_have_figures_of_their_own():
    model, optimizer, held_out = made()
    kept = Kept()
    losses = {"all": held_out, "first": lambda: F.cross_entropy(model(HELD_OUT[0][:1]), HELD_OUT[1][:1])}
    run(Loop(model, optimizer, losses, logger=kept, log_every=8), model, optimizer)
    kinds = ("validation_loss", "value", "negative")
    assert set(kept.logged[0][1]) == {"inrun/seconds", *(f"inrun/{k}/{t}" for k in kinds for t in losses)}


def test_figures_of_tokens_and_of_several_targets():
    """Those of steps whose values wait come with the next; nothing is not below zero."""

    class Step:
        ids, per_token, found = ["a", "b"], False, None

        @property
        def values(self):
            if self.found is None:
                raise InRunError
            return torch.tensor(self.found)

    figures, step = Figures(["x", "y"], 1, None), Step()
    figures.add(step)
    assert figures.due({"code": 1.5}, {}) == {}
    step.found = [[1.0, -2.0], [3.0, 0.0]]
    expected = {"value/x": 2.0, "negative/x": 0.0, "value/y": -1.0, "negative/y": 0.5, "validation_loss": 1.5}
    found = figures.due({"code": 1.5}, {"direction": 0.0})
    assert found == {f"inrun/{name}": value for name, value in expected.items()} | {"inrun/seconds": 0.0}
    figures = Figures(["x"], 1, None)
    figures.add(SimpleNamespace(ids=["a", "b"], per_token=True, values=torch.tensor([[1.0, -2.0], [3.0, 4.0]])))
    assert figures.due({}, {}) == {"inrun/seconds": 0, "inrun/value": 3.0, "inrun/negative": 0.5}
    figures = Figures(["x"], 2, None)
    for found in ([1.0], [2.0], None):  # the last waits, and then there are more than are due
        step = Step()
        step.found = found
        figures.add(step)
    assert figures.due({}, {}) == {}
    step.found = [6.0]
    assert figures.due({}, {}) == {"inrun/seconds": 0, "inrun/value": 3.0, "inrun/negative": 0.0}


def test_the_validation_loss_is_taken_in_eval_mode_and_a_failed_batch_leaves_no_step():
    model, optimizer, _ = made()
    model.net[1].eval()
    modes = []

    def loss():
        modes.append(any(m.training for m in model.modules()))
        return F.cross_entropy(model(HELD_OUT[0]), HELD_OUT[1])

    loop = Loop(model, optimizer, loss)
    with pytest.raises(KeyError), loop.batch(range(3)):
        raise KeyError
    assert modes == [False] and model.training and not model.net[1].training
    with pytest.raises(InRunError, match="end: expected a batch before it"):
        loop.end()
    run(loop, model, optimizer, epochs=1)
    assert len(loop.ledger) == N


def test_a_validation_loss_that_fails_leaves_no_step():
    model, optimizer, _ = made()
    loop = Loop(model, optimizer, lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        loop.announce(range(3))
    assert loop.step is None


@pytest.mark.filterwarnings("ignore:.*did not run in the step block")
def test_a_forgotten_last_is_named():
    model, optimizer, held_out = made()
    loop = Loop(model, optimizer, held_out)
    with pytest.raises(InRunError, match=r"where gradients accumulate over batches, say batch\(ids, last=...\)"):
        for k, batch in enumerate(batches()):
            with loop.batch(batch["sample_id"]):
                F.cross_entropy(model(batch["x"]), batch["y"]).backward()
                if k % 2:
                    optimizer.step()
                    optimizer.zero_grad()


def test_an_error_after_a_whole_step_says_nothing_of_last():
    model, optimizer, held_out = made()
    loop = Loop(model, optimizer, held_out)
    with loop.batch(["a", "b"]):
        F.cross_entropy(model(X[:2]), Y[:2]).backward()
        optimizer.step()
    with pytest.raises(InRunError) as raised, loop.batch(["c", "d"]):
        raise InRunError
    assert not hasattr(raised.value, "__notes__")


def test_a_loop_is_closed_in_the_middle_of_a_step():
    model, optimizer, held_out = made()
    classes = [type(m) for m in model.modules()]
    loop = Loop(model, optimizer, held_out)
    loop.announce(["a", "b"])
    loop.close()
    assert loop.step is None and [type(m) for m in model.modules()] == classes and not len(loop.ledger)


def test_a_run_that_starts_late(tmp_path):
    model, optimizer, held_out = made()
    run(Loop(model, optimizer, held_out, ledger=tmp_path), model, optimizer)  # steps 0 to 7
    with pytest.raises(InRunError, match="expected an empty one for a run that begins at step 0, got steps up to 7"):
        Loop(model, optimizer, held_out, ledger=tmp_path)
    run(Loop(model, optimizer, held_out, ledger=tmp_path, start=6), model, optimizer, epochs=1)
    assert sorted(set(inrun.Ledger(tmp_path).rows()["step"].to_pylist())) == list(range(10))
    with pytest.warns(UserWarning, match="ends at step 9 and the run goes on at 12"):
        Loop(model, optimizer, held_out, ledger=tmp_path, start=12).close()
    with pytest.raises(ValueError, match="log_every"):
        Loop(model, optimizer, held_out, log_every=0)


def test_tensorboard(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    model, optimizer, held_out = made()
    with SummaryWriter(tmp_path) as writer:
        run(Loop(model, optimizer, held_out, logger=TensorBoard(writer), log_every=4), model, optimizer)
    read = EventAccumulator(str(tmp_path)).Reload()
    assert [e.step for e in read.Scalars("inrun/value")] == [3, 7]


def test_wandb(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    model, optimizer, held_out = made()
    quick = wandb.Settings(console="off", x_disable_stats=True, x_disable_machine_info=True, disable_git=True)
    with wandb.init(mode="offline", dir=tmp_path, settings=quick) as logger:
        run(Loop(model, optimizer, held_out, logger=logger, log_every=4), model, optimizer)
        assert logger.step == 7 and "inrun/value" in logger.summary.keys()  # noqa: SIM118
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"validation": None}, "validation: expected a function that returns the loss, or a dict of such, got None"),
        ({"logger": "x"}, r"logger: expected one with log\(values, step\), got str"),
        ({"source_of": {"a": "b"}}, "source_of: expected a function of a sample id or None"),
    ],
)
def test_what_a_loop_cannot_use_is_said_at_once(options, message):
    model, optimizer, validation = made()
    classes = [type(m) for m in model.modules()]
    with pytest.raises(TypeError, match=message):
        Loop(model, optimizer, **{"validation": validation, **options})
    assert [type(m) for m in model.modules()] == classes


def test_a_folder_is_written_by_this_process(tmp_path, monkeypatch):
    """Each process of several has shards of its own, whoever opens the ledger."""
    monkeypatch.setenv("RANK", "3")
    model, optimizer, validation = made()
    loop = Loop(model, optimizer, validation, ledger=tmp_path)
    with loop.batch(["a", "b"]):
        F.cross_entropy(model(X[:2]), Y[:2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    loop.close()
    assert [shard.name.split("-")[0] for shard in tmp_path.iterdir()] == ["rank00003"]


def test_a_loop_that_cannot_begin_leaves_the_model_as_it_was():
    model, optimizer, held_out = made()
    with pytest.raises(ValueError, match="log_every"):
        Loop(model, optimizer, held_out, log_every=0)
    Loop(model, optimizer, held_out).close()


def test_a_trainers_norm_is_taken_where_a_method_asks_for_it_and_nobody_has_said_it():
    for method in ("path", "path_secant", "monte_carlo"):
        assert with_clip({"method": method}, 1) == {"method": method, "clip": 1.0}
        for said in ({"clip": 0.5}, {"pairwise": [0]}, {"exclude": ["a"]}):
            assert with_clip({"method": method, **said}, 1) == {"method": method, **said}
        for none in (None, 0, -1):
            assert with_clip({"method": method}, none) == {"method": method}
    assert with_clip({}, 1) == {}


def test_an_optimizer_around_another_is_not_taken_for_that():
    class Lookahead(torch.optim.SGD):
        """Goes half of the way that another goes."""

        def __init__(self, optimizer):
            super().__init__(optimizer.param_groups[0]["params"], lr=LR / 2)
            self.optimizer = optimizer

    model, inner, held_out = made()
    weights, ids = {n: p.clone() for n, p in model.state_dict().items()}, ["s0", "s1", "s2"]
    optimizer = Lookahead(inner)
    loop = Loop(model, optimizer, held_out)
    with loop.batch(ids):
        F.cross_entropy(model(X[:3]), Y[:3]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(loop.last.values.double(), expected_values(weights, ids, 2), rtol=1e-4, atol=1e-7)
    loop.close()


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_fabrics_optimizer_is_the_one_that_it_has_wrapped(method):
    fabric = pytest.importorskip("lightning.fabric").Fabric(accelerator="cpu", devices=1)
    model, optimizer, held_out = made()
    weights, ids = {n: p.clone() for n, p in model.state_dict().items()}, ["s0", "s1", "s2"]
    wrapped, optimizer = fabric.setup(model, optimizer)
    loop = Loop(model, optimizer, held_out, method=method)
    with loop.batch(ids):
        F.cross_entropy(wrapped(X[:3]), Y[:3]).backward()
        optimizer.step()
        optimizer.zero_grad()
    torch.testing.assert_close(loop.last.values.double(), expected_values(weights, ids, 1), rtol=1e-4, atol=1e-7)
    loop.close()
