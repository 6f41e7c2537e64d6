"""The fidelity suite: its Shapley values against closed forms, its game against the tracker, its verdicts."""

from __future__ import annotations

import copy
import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import inrun
from inrun import cli, fidelity, results, shapley
from inrun.deferred import METHODS
from inrun.tasks import OPTIMIZERS, Lion, digits_task, gpt_task, loss


def test_the_exact_value_is_the_mean_over_all_orders():
    worth = dict(zip(itertools.product((False, True), repeat=4), np.random.default_rng(0).normal(size=16), strict=True))
    utility = lambda s: worth[tuple(bool(i) for i in s)]  # noqa: E731
    expected = np.zeros(4)
    for order in itertools.permutations(range(4)):
        members = np.zeros(4, bool)
        for i in order:
            before = utility(members)
            members[i] = True
            expected[i] += (utility(members) - before) / math.factorial(4)
    values, total = shapley.exact(utility, 4)
    np.testing.assert_allclose(values, expected, atol=1e-12)
    assert values.sum() == pytest.approx(total)
    sampled, half_width, again = shapley.monte_carlo(utility, 4, 4000)
    assert again == total and sampled.sum() == pytest.approx(total)
    assert (np.abs(sampled - expected) < 2 * half_width).all() and half_width.max() < 0.1


@given(st.lists(st.integers(0, 3), min_size=2, max_size=12), st.data())
def test_auroc_is_the_share_of_pairs_in_order(scores, data):
    positive = np.array(data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores))))
    if positive.all() or not positive.any():
        return
    s = np.array(scores, float)
    pairs = [(a > b) + (a == b) / 2 for a in s[positive] for b in s[~positive]]
    assert shapley.auroc(s, positive) == pytest.approx(np.mean(pairs))


def test_fidelity_of_a_known_distance():
    truth = np.array([1.0, 2.0, 3.0, -2.0])
    found = shapley.fidelity(2 * truth, truth, 4.0)
    assert found["pearson"] == pytest.approx(1) and found["spearman"] == pytest.approx(1)
    assert found["relative_error"] == pytest.approx(1) and found["efficiency_gap"] == pytest.approx(1)
    assert found["rmse"] == pytest.approx(math.sqrt(18 / 4))
    assert shapley.fidelity(truth**3, truth, 4.0)["spearman"] == pytest.approx(1)
    with pytest.raises(ValueError, match="players: expected from 1 to 20, got 21"):
        shapley.exact(lambda s: 0.0, 21)
    with pytest.raises(ValueError, match="permutations: expected at least 2, got 1"):
        shapley.monte_carlo(lambda s: 0.0, 3, 1)


@pytest.fixture(scope="module")
def digits():
    task = digits_task(64)
    return task, task.start(0)


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_the_games_whole_batch_is_the_training_step_itself(digits, kind):
    task, start = digits
    model, optimizer = fidelity.continued(task, start, kind, OPTIMIZERS[kind][1], 5, 6, 0)
    x, y = task.batch(2000, 6, 0)
    utility = fidelity.StepUtility(task, model, optimizer, x, y)
    members = np.array([True, False, True, True, False, True])
    worth = [utility(m) for m in (np.ones(6, bool), members, np.ones(6, bool))]
    assert worth[0] == worth[2]
    for chosen, found in ((np.ones(6, bool), worth[0]), (members, worth[1])):
        net, own = copy.deepcopy((model, optimizer))
        before = task.validation_loss(net).item()
        loss(net, x[chosen], y[chosen], 6).backward()
        own.step()
        assert found == pytest.approx(before - task.validation_loss(net).item(), rel=1e-9)


@pytest.mark.parametrize("kind", list(OPTIMIZERS))
def test_path_secant_is_nearest_to_the_truth_at_a_rate_that_trains(digits, kind):
    task, start = digits
    lr = OPTIMIZERS[kind][1] / 4
    row = fidelity.measure(task, start, kind, lr, steps=20, size=6, seed=1)
    found = row["fidelity"]
    assert set(found) == set(fidelity.applicable(kind, 6))
    assert np.sum(row["truth"]) == pytest.approx(row["total"])
    assert found["path_secant"]["efficiency_gap"] < 0.02
    assert found["monte_carlo"]["efficiency_gap"] < 1e-6 and found["monte_carlo"]["pearson"] > 0.99
    if kind == "muon":
        assert found["path_secant"]["relative_error"] < 0.5 * found["sgd_proxy"]["relative_error"]
    elif kind != "lion":  # a sign turns at once, which no linear function of a sample's gradient follows
        others = [
            v["relative_error"]
            for method, v in found.items()
            if method in (*METHODS, "first") and method != "path_simpson"
        ]
        assert found["path_secant"]["relative_error"] == min(others) < 0.02
        assert found["path_secant"]["pearson"] > 0.999


def test_first_order_is_good_at_small_rates_and_not_at_large(digits):
    task, start = digits
    rows = [fidelity.measure(task, start, "sgd", lr, steps=10, size=6, seed=0) for lr in (0.0005, 0.8)]
    first = [row["fidelity"]["first"] for row in rows]
    assert first[0]["pearson"] > 0.999 > 0.99 > first[1]["pearson"]
    assert first[0]["efficiency_gap"] < 0.02 < 0.2 < first[1]["efficiency_gap"]


def test_the_largest_stable_rate_is_below_one_that_does_not_train(digits):
    task, start = digits
    for kind in ("sgd", "lion"):
        top = fidelity.largest_stable(task, [start], kind, 40, 8)
        assert fidelity.trains_stably(task, [start], kind, top, 40, 8)
        assert not fidelity.trains_stably(task, [start], kind, 2 * top, 40, 8)
    broken = copy.deepcopy(start)
    with torch.no_grad():
        broken[0].weight.mul_(float("nan"))
    with pytest.raises(inrun.InRunError, match=r"digits, sgd: no learning rate from 4\.88\S+ to 0\.05 trains stably"):
        fidelity.largest_stable(task, [broken], "sgd", 40, 8)


def test_stability_is_judged_by_what_is_trained_on_and_not_by_the_target(digits):
    task, start = digits
    backwards = replace(task, validation=(task.validation[0], 9 - task.validation[1]))
    rates = [fidelity.largest_stable(t, [start], "adam", 40, 8) for t in (task, backwards)]
    assert rates[0] == rates[1]


def test_the_gpts_text_does_not_hang_on_what_is_installed(monkeypatch):
    config = inrun.config.GPTConfig(block_size=8, layers=1, heads=1, width=8)
    first = gpt_task(config, training=40)

    def fail(*args):
        raise AssertionError("a folder was searched")

    for name in ("glob", "rglob", "iterdir"):
        monkeypatch.setattr(Path, name, fail)
    again = gpt_task(config, training=40)
    assert torch.equal(first.train[0], again.train[0]) and torch.equal(first.validation[0], again.validation[0])
    assert len(first.train[0]) == 40 and len(first.validation[0]) == 8
    assert not {bytes(r.tolist()) for r in first.train[0]} & {bytes(r.tolist()) for r in first.validation[0]}


def utility_of(validation_loss, make_optimizer):
    """Of a step of three weights with four samples' random shares."""
    model = torch.nn.Linear(3, 1, bias=False, dtype=torch.float64)
    torch.nn.init.constant_(model.weight, 0.1)
    task: Any = SimpleNamespace(validation_loss=validation_loss)
    utility = fidelity.StepUtility.__new__(fidelity.StepUtility)
    optimizer = make_optimizer(model.parameters())
    vars(utility).update(task=task, model=model, optimizer=optimizer, params=[model.weight], clip=None)
    vars(utility).update(_states=[optimizer.state], _before=[{}])
    utility._weights = [model.weight.detach().clone()]
    utility.shares = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    utility.before = float(task.validation_loss(model).detach())
    return utility


def test_path_integral_and_coordinates_are_the_shapley_value_where_the_loss_is_a_square():
    """A quadratic loss under SGD: Aumann-Shapley and Shapley agree, and more nodes change nothing."""
    x = torch.randn(5, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    utility = utility_of(lambda model: (model(x) - x.sum(1)).square().mean(), lambda p: torch.optim.SGD(p, lr=0.3))
    truth, _ = shapley.exact(utility, 4)
    for nodes in (1, 7):
        np.testing.assert_allclose(utility.path_integral(nodes), truth, rtol=1e-9)
        np.testing.assert_allclose(utility.coordinates(nodes), truth, rtol=1e-9)


def test_coordinates_see_the_vote_on_a_sign_and_the_path_does_not():
    slope = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    utility = utility_of(lambda model: (model.weight * slope).sum(), lambda p: Lion(p, lr=0.3, betas=(0.0, 0.9)))
    utility._before = [{"exp_avg": torch.zeros(1, 3, dtype=torch.float64)}]
    truth, total = shapley.exact(utility, 4)
    np.testing.assert_allclose(utility.coordinates(1), truth, rtol=1e-9)
    assert utility.path_integral(7).sum() == pytest.approx(total)
    assert np.abs(utility.path_integral(7) - truth).max() > 0.1 * np.abs(truth).max()


def test_errors_shrink_with_the_powers_of_the_rate_that_the_theory_says(digits):
    """First order leaves O(lr^2); second order, secant and the difference of the two are O(lr^3)."""
    task, start = digits
    rates = np.array([0.001, 0.002, 0.004, 0.008])
    errors: dict[str, list[float]] = {"first": [], "second": [], "secant": [], "second - secant": []}
    for lr in rates:
        row = fidelity.measure(task, start, "sgd", lr, steps=0, size=4, seed=0)
        v = {name: np.array(found) for name, found in row["values"].items()}
        for name in ("first", "second", "secant"):
            errors[name].append(float(np.linalg.norm(v[name] - row["truth"])))
        errors["second - secant"].append(float(np.linalg.norm(v["second"] - v["secant"])))
    slopes = {name: np.polyfit(np.log(rates), np.log(e), 1)[0] for name, e in errors.items()}
    assert slopes == pytest.approx({"first": 2, "second": 3, "secant": 3, "second - secant": 3}, abs=0.2)


def test_the_suite_writes_its_table_json_and_picture(tmp_path: Path):
    task = gpt_task(inrun.config.GPTConfig(block_size=8, layers=1, heads=1, width=8), training=80)
    task = replace(task, warm_steps=20)
    found = fidelity.run(
        [task], kinds={"gpt": ("adamw", "lion")}, seeds=1, size=3, sampled=13, steps=10, permutations=2
    )
    assert len(found["rows"]) == 11 and found["largest"]["gpt"].keys() == {"adamw", "lion"}
    assert sum(row["half_width"] is not None for row in found["rows"]) == 1
    others = {row["optimizer"]: row["fidelity"].keys() for row in found["rows"] if "," in row["optimizer"]}
    assert others.keys() == {"adamw, first step", "adamw, clipped"}
    assert others["adamw, first step"] - others["adamw, clipped"] == {"sgd_proxy", "path_integral"}
    text = fidelity.as_text(found)
    assert "path_secant below Pearson .999 or above a gap of 1%:" in text and "13 +-" in text
    rows = {key[1:]: rows for key, rows in fidelity.cells(found["rows"]).items()}
    figure = fidelity.draw("gpt", rows, fidelity.COLUMNS, fidelity.medians)
    paths = results.write(tmp_path, "x", found, {"": figure})
    assert json.loads(paths[0].read_text())["rows"] == found["rows"]
    assert paths[1].read_bytes()[:4] == b"\x89PNG"
    assert {"device", "versions", "commit", "seed"} <= found.keys()


def test_the_command_prints_the_table_and_writes_its_files(tmp_path: Path, capsys, monkeypatch):
    small = fidelity.run([digits_task(64)], kinds={"digits": ("lion",)}, seeds=1, size=3, sampled=0, steps=10)
    monkeypatch.setattr(fidelity, "run", lambda tasks, seeds: small)
    cli.main(["fidelity", "--out", str(tmp_path)])
    assert {p.name for p in tmp_path.iterdir()} == {"fidelity.json", "fidelity-digits.png"}
    assert fidelity.as_text(small) in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        cli.main(["fidelity", "--seeds", "0"])
    assert "seeds: expected at least 1, got 0" in capsys.readouterr().err
