"""The Lightning callback: scores beside the one-sample-at-a-time oracle, by the ids of a shuffling loader."""

from __future__ import annotations

import copy
from collections import UserDict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from models import Classifier, data

import inrun
from inrun import InRunError

lightning = pytest.importorskip("lightning.pytorch")
from inrun.adapters.lightning import InRun  # noqa: E402

LR, N, BATCH = 0.2, 11, 3
X, Y = data("mlp", N, seed=5)
HELD_OUT = data("mlp", 4, seed=6)


class Net(lightning.LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        torch.manual_seed(0)
        self.net, self.before = Classifier(), {}
        self.automatic_optimization = not manual

    def training_step(self, batch, batch_idx):
        self.before.setdefault(self.global_step, {n: p.detach().clone() for n, p in self.net.state_dict().items()})
        loss = F.cross_entropy(self.net(batch["x"]), batch["y"])
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        return loss

    def validation_step(self, batch, batch_idx):
        self.log("val", F.cross_entropy(self.net(batch["x"][:1]), batch["y"][:1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=LR)


def loader(keys=("sample_id", "x", "y"), shuffle=True):
    rows = [{"sample_id": f"s{i}", "x": X[i], "y": Y[i]} for i in range(N)]
    generator = torch.Generator().manual_seed(2)
    rows = [{k: r[k] for k in keys} for r in rows]
    return torch.utils.data.DataLoader(rows, BATCH, shuffle=shuffle, generator=generator)


def fit(folder, net, train=None, ckpt=None, **settings):
    trainer = lightning.Trainer(
        default_root_dir=folder, accelerator="cpu", logger=False, enable_progress_bar=False,
        enable_model_summary=False, **({"max_epochs": 2, "enable_checkpointing": False} | settings),
    )  # fmt: skip
    trainer.fit(net, train or loader(), loader() if settings.get("val_check_interval") else None, ckpt_path=ckpt)


def held_out_loss(net):
    x, y = HELD_OUT
    return lambda: F.cross_entropy(net.net(x), y)


def oracle(weights, ids, accumulated, clip, autocast=None):
    """A step's values, one sample at a time, in float64 or as plain training in half precision has them.

    Lightning divides each batch's mean by the number of batches that a step should have.
    """
    net, rows = Classifier(), [int(i[1:]) for i in ids]
    net.load_state_dict(weights)
    dtype = torch.float32 if autocast else torch.float64
    params = list(net.to(dtype).parameters())
    target = torch.autograd.grad(F.cross_entropy(net(HELD_OUT[0].to(dtype)), HELD_OUT[1]), params)
    each = []
    for k, i in enumerate(rows):
        size = len(rows[k // BATCH * BATCH :][:BATCH])
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            loss = F.cross_entropy(net(X[i : i + 1].to(dtype)), Y[i : i + 1]) / (size * accumulated)
        each.append(torch.autograd.grad(loss, params))
    norm = torch.stack([sum(g).square().sum() for g in zip(*each, strict=True)]).sum().sqrt()
    assert norm > clip
    dots = torch.stack([sum((a * b).sum() for a, b in zip(target, g, strict=True)) for g in each])
    return (LR * clip / norm * dots).double()


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_every_score_has_the_id_of_its_sample(precision, tmp_path):
    """Shuffled, accumulated, clipped, with a validation loop in the middle of steps."""
    net = Net()
    logged = {}
    logger = SimpleNamespace(log=lambda values, step: logged.update({step: values["inrun/value"]}))
    values = InRun(held_out_loss(net), logger=logger, log_every=2)
    fit(
        tmp_path, net, callbacks=[values], accumulate_grad_batches=2, gradient_clip_val=0.05,
        val_check_interval=1, precision=precision,
    )  # fmt: skip
    rows = values.ledger.rows().to_pylist()
    assert [r["step"] for r in rows] == [0] * 6 + [1] * 5 + [2] * 6 + [3] * 5
    assert {r["sample_id"] for r in rows[:11]} == {r["sample_id"] for r in rows[11:]} == {f"s{i}" for i in range(N)}
    means = {i: sum(r["value"] for r in rows if r["step"] in (i - 1, i)) / N for i in (1, 3)}
    assert logged == pytest.approx(means, rel=1e-4)
    for step, weights in net.before.items():
        mine = [r for r in rows if r["step"] == step]
        ids, found = [r["sample_id"] for r in mine], torch.tensor([r["value"] for r in mine]).double()
        expected = oracle(weights, ids, 2, 0.05)
        allowed = 2e-4 * expected.abs().max()
        if precision == "bf16-mixed":
            plain = oracle(weights, ids, 2, 0.05, torch.bfloat16)
            rounding = torch.finfo(torch.bfloat16).eps * expected.abs().max()
            allowed = rounding + 2 * (plain - expected).abs().max()
        assert (found - expected).abs().max() <= allowed


@pytest.mark.parametrize("manual", [False, True])
def test_training_is_untouched(manual, tmp_path):
    trained = []
    for callbacks in ([], None):
        net = Net(manual)
        values = InRun(held_out_loss(net))
        fit(tmp_path, net, callbacks=[values] if callbacks is None else callbacks)
        trained.append(list(net.parameters()))
    assert len(values.ledger) == 2 * N
    for a, b in zip(*trained, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("algorithm", [None, "norm"])
def test_the_norm_that_lightning_clips_to_is_known_to_the_methods_that_ask_for_it(algorithm, tmp_path):
    found, clipping = [], {"gradient_clip_val": 0.05, "gradient_clip_algorithm": algorithm}
    for options in ({}, {"clip": 0.05}):
        net = Net()
        values = InRun(held_out_loss(net), method="path", **options)
        fit(tmp_path, net, loader(shuffle=False), callbacks=[values], max_epochs=1, **clipping)
        found.append(values.ledger.rows()["value"].to_pylist())
    assert found[0] == found[1] and len(found[0]) == N


@pytest.mark.parametrize(
    ("algorithm", "scaler", "known"),
    [("norm", None, 0.05), (None, None, 0.05), ("value", None, None), ("norm", object(), None)],
)
def test_a_norm_is_known_where_lightning_clips_to_one_and_scales_no_loss(algorithm, scaler, known, monkeypatch):
    values = InRun(lambda: None, method="path")
    monkeypatch.setattr("inrun.adapters.lightning.Loop", lambda *_, **options: options)
    trainer = SimpleNamespace(
        global_step=0, optimizers=[], gradient_clip_val=0.05, gradient_clip_algorithm=algorithm,
        precision_plugin=SimpleNamespace(scaler=scaler),
    )  # fmt: skip
    values.on_train_start(trainer, None)
    assert values.loop.get("clip") == known


class Graded(Net):
    """Takes gradients in its validation."""

    def validation_step(self, batch, batch_idx):
        with torch.enable_grad():
            x = batch["x"].clone().requires_grad_()
            torch.autograd.grad(self.net(x).sum(), x)


def test_a_validation_loop_that_takes_gradients_is_not_scored(tmp_path):
    """In the middle of an accumulated step."""
    found = []
    for interval in (1, None):
        net = Graded()
        values = InRun(held_out_loss(net))
        fit(
            tmp_path, net, loader(shuffle=False), callbacks=[values], accumulate_grad_batches=2, inference_mode=False,
            val_check_interval=interval,
        )  # fmt: skip
        found.append(values.ledger.rows()["value"].to_pylist())
    assert found[0] == pytest.approx(found[1], rel=1e-5, abs=1e-8)


class Two(Net):
    """An optimizer for the first layer and one for the rest, which update after every second batch."""

    def __init__(self):
        super().__init__(manual=True)

    def training_step(self, batch, batch_idx):
        self.before.setdefault(self.global_step, {n: p.detach().clone() for n, p in self.net.state_dict().items()})
        self.manual_backward(F.cross_entropy(self.net(batch["x"]), batch["y"]))
        if batch_idx % 2:
            for optimizer in self.optimizers():
                optimizer.step()
                optimizer.zero_grad()

    def configure_optimizers(self):
        params = list(self.parameters())
        return [torch.optim.SGD(params[:2], lr=LR), torch.optim.SGD(params[2:], lr=LR / 4)]


def test_two_optimizers_that_update_together(tmp_path):
    net = Two()
    values = InRun(held_out_loss(net))
    fit(tmp_path, net, loader(shuffle=False), callbacks=[values], max_epochs=1)
    rows = values.ledger.rows().to_pylist()
    assert [r["step"] for r in rows] == [0] * 6 + [2] * 5  # as Lightning counts
    rates = [LR, LR, *[LR / 4] * (len(list(net.parameters())) - 2)]
    for step in (0, 2):
        plain = Classifier()
        plain.load_state_dict(net.before[step])
        params = list(plain.double().parameters())
        target = torch.autograd.grad(F.cross_entropy(plain(HELD_OUT[0].double()), HELD_OUT[1]), params)
        mine = [r for r in rows if r["step"] == step]
        for k, row in enumerate(mine):
            i, size = int(row["sample_id"][1:]), len(mine[k // BATCH * BATCH :][:BATCH])
            each = torch.autograd.grad(F.cross_entropy(plain(X[i : i + 1].double()), Y[i : i + 1]) / size, params)
            exact = sum(lr * (a * b).sum() for lr, a, b in zip(rates, target, each, strict=True))
            assert row["value"] == pytest.approx(exact.item(), rel=1e-3, abs=1e-6)


class Over(Net):
    """Updates after every third batch of any epoch, by backward passes that Lightning is not told of."""

    def __init__(self):
        super().__init__(manual=True)
        self.taken = 0

    def training_step(self, batch, batch_idx):
        self.before.setdefault(self.global_step, {n: p.detach().clone() for n, p in self.net.state_dict().items()})
        (F.cross_entropy(self.net(batch["x"]), batch["y"]) / 3).backward()
        self.taken += 1
        if self.taken % 3 == 0:
            self.optimizers().step()
            self.optimizers().zero_grad()


def test_a_step_of_manual_optimization_goes_on_over_the_end_of_an_epoch(tmp_path):
    net = Over()
    values = InRun(held_out_loss(net))
    fit(tmp_path, net, loader(shuffle=False), callbacks=[values], max_epochs=3)
    rows, batches = values.ledger.rows().to_pylist(), [range(N)[k : k + BATCH] for k in range(0, N, BATCH)] * 3
    for step in range(4):
        plain = Classifier().double()
        plain.load_state_dict(net.before[step])
        params = list(plain.parameters())
        target = torch.autograd.grad(F.cross_entropy(plain(HELD_OUT[0].double()), HELD_OUT[1]), params)
        expected = {}
        for batch in batches[3 * step : 3 * step + 3]:
            for i in batch:
                loss = F.cross_entropy(plain(X[i : i + 1].double()), Y[i : i + 1]) / (3 * len(batch))
                dots = (a * b for a, b in zip(target, torch.autograd.grad(loss, params), strict=True))
                expected[f"s{i}"] = LR * sum(dot.sum() for dot in dots).item()
        found = {r["sample_id"]: r["value"] for r in rows if r["step"] == step}
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-6)


def test_a_resumed_fit_neither_loses_nor_doubles_a_step(tmp_path):
    class Killed(lightning.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 6:
                values.ledger.flush()
                raise RuntimeError("killed")

    def run(folder, *more, ckpt=None):
        net = Net()
        values = InRun(held_out_loss(net), ledger=folder / "ledger")
        saved = lightning.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=4, save_top_k=-1)
        return net, values, {"callbacks": [values, saved, *more], "enable_checkpointing": True, "ckpt": ckpt}

    net, values, settings = run(tmp_path / "whole")
    fit(tmp_path, net, loader(shuffle=False), **settings)
    expected = values.ledger.rows().to_pylist()
    net, values, settings = run(tmp_path / "run", Killed())
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, net, loader(shuffle=False), **settings)
    assert inrun.Ledger(tmp_path / "run/ledger").last_step == 5
    net, values, settings = run(tmp_path / "run", ckpt=tmp_path / "run/step=4.ckpt")
    fit(tmp_path, net, loader(shuffle=False), **settings)
    found = inrun.Ledger(tmp_path / "run/ledger").rows().to_pylist()
    assert [(r["step"], r["sample_id"]) for r in found] == [(r["step"], r["sample_id"]) for r in expected]
    assert [r["value"] for r in found] == pytest.approx([r["value"] for r in expected], rel=1e-5, abs=1e-7)


class Skipping(Net):
    """Has no loss for some batches, after their forward, and ends each epoch at another."""

    def __init__(self, skipped, last=None):
        super().__init__()
        self.skipped, self.last = skipped, last

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return None if batch_idx in self.skipped else loss

    def on_train_batch_start(self, batch, batch_idx):
        return -1 if batch_idx == self.last else None


@pytest.mark.parametrize(
    "skipped, last, accumulated, expected",
    [
        ([1], None, 1, {0: "012", 2: "678", 3: "9x", 4: "012", 6: "678", 7: "9x"}),
        ([3], None, 1, {0: "012", 1: "345", 2: "678", 4: "012", 5: "345", 6: "678"}),
        ([0], None, 2, {0: "345", 1: "6789x", 2: "345", 3: "6789x"}),
        ([1], None, 2, {1: "6789x", 3: "6789x"}),
        ([1], None, 3, {1: "9x", 3: "9x"}),
        ([], 2, 1, {0: "012", 1: "345", 2: "012", 3: "345"}),
        ([], 3, 2, {0: "012345", 1: "012345"}),
        ([], 0, 1, {}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*training_step. returned .None.")
def test_a_skipped_batch_has_no_values_and_the_others_have_theirs(skipped, last, accumulated, expected, tmp_path):
    net = Skipping(skipped, last)
    values = InRun(held_out_loss(net))
    settings = {"accumulate_grad_batches": accumulated, "gradient_clip_val": 0.005}
    with pytest.warns(UserWarning) as caught:
        fit(tmp_path, net, loader(shuffle=False), callbacks=[values], **settings)
    lost = accumulated > 1 and skipped == [1]
    assert lost == any("expected a backward for each batch of an accumulated step" in str(w.message) for w in caught)
    found = {}
    for row in values.ledger.rows().to_pylist():
        found.setdefault(row["step"], {})[row["sample_id"]] = row["value"]
    assert {s: list(v) for s, v in found.items()} == {
        s: [f"s{'0123456789x'.index(c)}" for c in ids] for s, ids in expected.items()
    }
    for step, of_ids in found.items():
        exact = oracle(net.before[step], list(of_ids), accumulated, 0.005)
        assert (torch.tensor(list(of_ids.values())) - exact).abs().max() <= 2e-4 * exact.abs().max()


@pytest.mark.parametrize("manual", [False, True])
def test_an_epoch_that_a_module_ends_leaves_no_batch_for_the_next(manual, tmp_path):
    net = Skipping([], 2)
    net.automatic_optimization = not manual
    values = InRun(held_out_loss(net))
    fit(tmp_path, net, loader(shuffle=False), callbacks=[values])
    rows = [(r["step"], r["sample_id"]) for r in values.ledger.rows().to_pylist()]
    assert rows == [(step, f"s{3 * (step % 2) + i}") for step in range(4) for i in range(3)]
    assert values.loop is None


@pytest.mark.filterwarnings("ignore:.*training_step")
def test_a_fit_after_one_that_failed_begins_anew(tmp_path):
    """In a step that has lost a batch; and in a validation loop within one."""

    class Failing(Skipping):
        def training_step(self, batch, batch_idx):
            if batch_idx == self.fails:
                raise RuntimeError("failed")
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch, batch_idx):
            assert not self.fails, "failed"

    net = Failing([])
    values, fresh = InRun(held_out_loss(net)), InRun(held_out_loss(net))
    classes, weights = [type(m) for m in net.modules()], copy.deepcopy(net.state_dict())

    def train(callback, skipped=(), fails=None, interval=None):
        net.load_state_dict(weights)
        net.skipped, net.fails, callback.ledger = skipped, fails, inrun.Ledger()
        settings = {"accumulate_grad_batches": 4, "max_epochs": 1, "num_sanity_val_steps": 0}
        fit(tmp_path, net, loader(shuffle=False), callbacks=[callback], val_check_interval=interval, **settings)
        return callback.ledger.rows().to_pylist()

    for failing in ({"skipped": [1], "fails": 2}, {"fails": "in validation", "interval": 1}):
        with pytest.raises((RuntimeError, AssertionError), match="failed"):
            train(values, **failing)
        assert values.loop is None and [type(m) for m in net.modules()] == classes and not len(values.ledger)
    expected = train(fresh)
    assert train(values) == expected and len(expected) == N


class Cut(Skipping):
    """Its first epoch ends after a batch and one without a loss."""

    def __init__(self):
        super().__init__([1], 2)

    def on_train_epoch_start(self):
        if self.current_epoch:
            self.skipped, self.last = [], None


@pytest.mark.filterwarnings("ignore:.*training_step")
def test_a_step_that_an_epoch_cut_short_takes_nothing_from_the_next(tmp_path):
    net = Cut()
    values = InRun(held_out_loss(net), ids=lambda batch: batch["sample_id"])
    fit(tmp_path, net, loader(shuffle=False), callbacks=[values], accumulate_grad_batches=3)
    rows = values.ledger.rows().to_pylist()
    assert [(r["step"], r["sample_id"]) for r in rows] == [(i // 9, f"s{i}") for i in range(N)]


def test_a_checkpoint_waits_for_the_ledger_of_every_process(tmp_path, monkeypatch):
    """Each writes its own part."""
    waited, folder, net = [], tmp_path / "ledger", Net()
    monkeypatch.setattr(
        lightning.strategies.SingleDeviceStrategy, "barrier", lambda *_: waited.append([*folder.glob("*.parquet")])
    )
    values = InRun(held_out_loss(net), ledger=folder)
    save, saved = values.on_save_checkpoint, []

    def on_save_checkpoint(*given):
        waited.clear()
        save(*given)
        saved.append(len(waited) == 1 and len(waited[0]))

    values.on_save_checkpoint = on_save_checkpoint
    fit(tmp_path, net, callbacks=[values], enable_checkpointing=True, max_epochs=1)
    assert saved and all(saved)


def test_a_folder_is_the_ledger_of_the_rank_that_a_process_has_when_training_begins(tmp_path, monkeypatch):
    """Lightning's own launcher tells it after the callback was made; one that was made by hand is an error."""
    net = Net()
    made = [
        InRun(held_out_loss(net), ledger=ledger) for ledger in (tmp_path / "ledger", inrun.Ledger(tmp_path / "own"))
    ]
    for module in ("inrun.distributed", "inrun.adapters.lightning"):
        monkeypatch.setattr(f"{module}.rank", lambda: 1)
    fit(tmp_path, net, callbacks=made[:1])
    assert made[0].ledger.rank == 1 and [p.name[:9] for p in (tmp_path / "ledger").iterdir()] == ["rank00001"]
    with pytest.raises(InRunError, match=r"expected Ledger\(path, rank=1\), the number of this process, got rank=0"):
        fit(tmp_path, net, callbacks=made[1:])


def test_ids_are_a_key_of_any_mapping(tmp_path):
    net, train = Net(), loader(shuffle=False)
    collate = train.collate_fn
    train = torch.utils.data.DataLoader(train.dataset, BATCH, collate_fn=lambda rows: UserDict(collate(rows)))
    values = InRun(held_out_loss(net))
    fit(tmp_path, net, train, callbacks=[values], max_epochs=1)
    assert [r["sample_id"] for r in values.ledger.rows().to_pylist()] == [f"s{i}" for i in range(N)]


def test_a_batch_without_ids_is_refused(tmp_path):
    net = Net()
    values = InRun(held_out_loss(net))
    classes = [type(m) for m in net.modules()]
    with pytest.raises(InRunError, match="expected 'sample_id' among a batch's keys, got x, y"):
        fit(tmp_path, net, loader(("x", "y")), callbacks=[values])
    assert [type(m) for m in net.modules()] == classes


def test_a_second_fit_in_memory_takes_a_ledger_of_its_own(tmp_path):
    net = Net()
    values = InRun(held_out_loss(net))
    fit(tmp_path, net, callbacks=[values])
    with pytest.raises(InRunError, match=r"of an earlier run, in memory; .*values.ledger = inrun.Ledger\(\)"):
        fit(tmp_path, net, callbacks=[values])
    values.ledger = inrun.Ledger()
    fit(tmp_path, net, callbacks=[values])
    assert len(values.ledger) == 2 * N
