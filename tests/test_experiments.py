"""The experiments at small size, and the methods they compare against, against brute force."""

from __future__ import annotations

import base64
import codecs
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from inrun import cli, experiments, results, shapley
from inrun.demo import demo_corpus
from inrun.experiments import curation, duplicates, mislabel, paraphrase, stages, textrun
from inrun.experiments.textrun import SMALL


def test_knn_shapley_is_the_exact_value_of_the_vote():
    rng = np.random.default_rng(0)
    x, y, points, labels = (
        rng.normal(size=(7, 2)),
        rng.integers(0, 2, 7),
        rng.normal(size=(5, 2)),
        rng.integers(0, 2, 5),
    )

    def accuracy(members, k=3):
        votes = 0.0
        for point, label in zip(points, labels, strict=True):
            near = np.argsort(((x[members] - point) ** 2).sum(1), kind="stable")[:k]
            votes += (y[members][near] == label).sum() / k
        return votes / len(points)

    for k in (3, 9):
        expected, _ = shapley.exact(lambda s, k=k: accuracy(s, k), 7)
        np.testing.assert_allclose(mislabel.knn_shapley(x, y, points, labels, k), expected, atol=1e-12)


def test_the_influence_function_of_a_linear_model_is_newtons():
    """There the Gauss-Newton matrix is the Hessian."""
    torch.manual_seed(0)
    x, y, model = torch.randn(30, 4), torch.randint(0, 3, (30,)), torch.nn.Linear(4, 3)

    def of(flat):
        return F.cross_entropy(x @ flat[:12].view(3, 4).T + flat[12:], y)

    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    hessian = torch.autograd.functional.hessian(of, flat)
    gradients, toward = mislabel.gradients_of(model, x, y), torch.randn(15)
    expected = gradients @ torch.linalg.solve(hessian + 0.01 * torch.eye(15), toward)
    found = mislabel.influence(model, x, gradients, toward)
    np.testing.assert_allclose(found, expected.numpy(), rtol=1e-3, atol=1e-3)


def test_mislabel_ranks_by_every_method():
    found = mislabel.run(seeds=1, samples=300, epochs=12)
    scores = {m: a[0] for m, a in found.data["auroc"].items()}
    assert scores["loss, checkpoints"] > 0.85 and scores["KNN-Shapley (pixels)"] > 0.9
    assert scores["In-Run first"] > 0.5 and scores["In-Run path_secant"] > 0.5
    assert all(method in found.text for method in scores)


def test_copies_share_in_path_values_as_in_truth_and_not_in_first_order():
    found = duplicates.run(samples=2, copies=(1, 3))
    for setting, means in found.data["value_of_one_copy"].items():
        left = {m: v[1] / v[0] for m, v in means.items()}
        assert left["first"] == pytest.approx(1, abs=0.01)
        assert left["exact Shapley"] < 0.95
        assert left["path_simpson"] == pytest.approx(left["exact Shapley"], abs=0.05), setting
        if "second" in left:
            assert left["second"] < left["first"]


def test_a_finding_is_written_with_where_it_was_found(tmp_path: Path, capsys, monkeypatch):
    small = duplicates.run(samples=1, copies=(1, 2))
    monkeypatch.setattr(duplicates, "run", lambda seed: small)
    cli.main(["experiment", "duplicates", "--out", str(tmp_path), "--seed", "3"])
    written = json.loads((tmp_path / "experiment-duplicates.json").read_text())
    assert written["seed"] == 3 and written["commit"] and written["value_of_one_copy"]
    assert (tmp_path / "experiment-duplicates.png").read_bytes()[:4] == b"\x89PNG"
    assert small.text in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"experiment: expected one of mislabel, .*, got 'x'"):
        experiments.run("x", tmp_path)
    monkeypatch.setattr(results.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        cli.main(["experiment", "duplicates", "--out", str(tmp_path)])
    assert "pip install 'inrun[report]'" in capsys.readouterr().err


def test_stages_average_the_visits_to_each_source():
    found = stages.run(steps=40, windows=3, per_source=20, repeats=2)
    assert found.data["stages"] == [(0, 10), (10, 20), (20, 40)]
    means = found.data["value_per_visit"]
    assert {"python", "docs", "cpp", "python, shuffled"} <= means.keys()
    first = {name: np.mean(v, axis=0)[0] for name, v in means.items()}
    assert all(len(v) == 2 for v in means.values())
    assert max(first.values()) > 0  # an untrained model learns from its first batches
    assert all(look[40] < 5.6 for look in found.data["validation_loss"])


def test_curation_retrains_without_what_had_negative_value():
    found = curation.run(steps=20, per_source=20, test=8, repeats=2)
    assert set(found.data["steps_to_goal"]) == set(curation.ARMS)
    assert found.data["steps_to_goal"]["nothing"] == [20, 20] and found.data["steps_of_mean_curve"]["nothing"] == 20
    ends = found.data["loss_at_end"]
    assert ends["nothing"] == found.data["goals"] and len({ends[arm][0] for arm in curation.ARMS}) == 5
    assert {"all", "python", *curation.HARM} <= found.data["negative"].keys()
    assert all(0 <= share <= 1 for shares in found.data["negative"].values() for share in shares)
    assert "steps to" in found.text


def test_planted_harm_is_what_it_says():
    clean, _ = demo_corpus(SMALL.block_size, 0, 20, planted=0, validation=2)
    pool = curation._harmed(clean, 5, np.random.default_rng(0))
    original = dict(zip(clean.ids, clean.tokens, strict=True))
    for i in range(len(clean), len(pool)):
        name, _, kind = pool.ids[i].rpartition("~")
        made, of = pool.tokens[i].tobytes(), original[name].tobytes()
        if kind == "shuffled":
            assert made != of and sorted(made) == sorted(of)
        elif kind == "rot13":
            assert codecs.encode(made.decode("latin1"), "rot13").encode("latin1") == of
        else:
            assert of.startswith(base64.b64decode(made[: len(made) // 4 * 4]))
    assert pool.planted[len(clean) :] == [kind for kind in curation.HARM for _ in range(5)]


def test_paraphrase_ranks_every_original_for_every_version():
    config = replace(SMALL, block_size=64, layers=1, width=16)
    found = paraphrase.run(originals=3, steps=20, per_source=40, config=config)
    ranks = {method: np.array(r) for method, r in found.data["ranks"].items()}
    assert all(r.shape == (len(paraphrase.VERSIONS), 3) for r in ranks.values())
    for method in ("gradient cosine, at the end", "BM25"):
        assert ranks[method][0].tolist() == [1, 1, 1]  # its own copy
    assert ranks["In-Run, first order"][0].mean() < found.data["samples"] / 4
    assert "random order" in found.text


def test_versions_of_an_original_and_their_text_is_not_trained_on():
    corpus, chosen, versions = paraphrase.texts(64, 0, 3, 40)
    exact, spaced, half, every, moved = (versions.take(range(3 * k, 3 * k + 3)) for k in range(5))
    for i, row in enumerate(chosen):
        text = corpus.text(row)
        assert exact.text(i) == text and spaced.text(i) == paraphrase.respaced(text)[:65]
        words = [set(paraphrase._NAME.findall(v.text(i)[:50])) for v in (exact, half, every)]
        assert len(words[0] & words[1]) > len(words[0] & words[2])
        assert len(moved.text(i)) > 10
    assert not set(corpus.ids) & set(versions.ids)
    rng = np.random.default_rng(0)
    assert paraphrase.renamed("if ab: cd(ab)", 1.0, ["xx", "yy"], rng) in ("if xx: yy(xx)", "if yy: xx(yy)")


def test_rank_and_bm25():
    scores = np.array([[3.0, 1.0, 2.0], [1.0, 1.0, 0.0]])
    assert paraphrase.rank(scores, np.array([2, 0])).tolist() == [2, 1.5]
    documents = [["a", "b"], ["a", "a", "c"], ["d"]]
    found = paraphrase.bm25(documents, [["a"], ["c", "d"]])
    # "a" is in two of three documents of mean length 2: log(1 + 1.5 / 2.5) times its saturated count.
    assert found[0] == pytest.approx([np.log(1.6), np.log(1.6) * 2 * 2.5 / (2 + 1.5 * (0.25 + 0.75 * 1.5)), 0])
    assert found[1, 0] == 0 and found[1, 2] > found[1, 1] > 0


def test_a_text_run_is_a_function_of_its_seed_and_is_not_changed_by_values():
    corpus, validation = demo_corpus(SMALL.block_size, 0, 10, planted=1, validation=4)
    options = {"steps": 6, "batch": 4, "test": validation, "look_every": 3}
    plain, again = (textrun.train(corpus, seed=1, **options) for _ in range(2))
    valued = textrun.train(corpus, seed=1, targets={"a": validation}, **options)
    assert plain.looks == again.looks
    assert plain.looks == pytest.approx(valued.looks, rel=1e-5)
    totals = valued.totals(len(corpus))
    assert totals.sum() == pytest.approx(valued.values.sum())
    assert np.flatnonzero(totals[:, 0]).tolist() == sorted(set(valued.ids.ravel().tolist()))
    kept = textrun.train(corpus, seed=1, keep=np.array([2, 3, 5, 7]), steps=2, batch=4)
    assert set(kept.ids.ravel().tolist()) == {2, 3, 5, 7}
