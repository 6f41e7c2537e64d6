"""The report: its figures are right, its page stands alone, and text is shown as text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import inrun
from inrun import report
from inrun.config import TrainConfig
from inrun.report import auroc

VALUES = {  # id: (source, planted, text, values at steps 0, 1, ...)
    "a": ("good", "", "plain text", [0.5, 0.25]),
    "b": ("good", "", "<script>alert('&')</script>\x07", [0.25, 0.5]),
    "a~duplicate": ("good", "duplicate", "plain text", [0.5, 0.125]),
    "b~shuffled": ("good", "shuffled", "<>", [-0.5, -0.25]),
    "c": ("bad", "", "ünïcode", [-0.125, 0.0625]),
}


@pytest.fixture
def run(tmp_path) -> Path:
    """A finished run of two steps with values chosen by hand."""
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"config": TrainConfig().to_json()}))
    source, planted, text, _ = zip(*VALUES.values(), strict=True)
    pq.write_table(
        pa.table({"sample_id": list(VALUES), "source": source, "planted": planted, "text": text}),
        folder / "samples.parquet",
    )
    with inrun.Ledger(folder / "ledger") as ledger:
        for step in range(2):
            ledger.append(step, list(VALUES), [row[3][step] for row in VALUES.values()])
    speed = {"samples_per_second": 10.0, "scoring_share": 0.5, "validation_share": 0.25}
    sums = [sum(row[3][step] for row in VALUES.values()) for step in range(2)]
    rows = [
        {"step": 0, "loss": 3.0, "validation_loss": 2.0, "value_sum": sums[0], "batch_drop": 0.5} | speed,
        {"step": 1, "loss": 2.5, "validation_loss": 1.5, "value_sum": sums[1], "batch_drop": 0.75} | speed,
        {"step": 2, "validation_loss": 1.0},
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_auroc_equals_the_share_of_pairs_in_order_with_ties_for_half():
    rng = np.random.default_rng(0)
    for n, m in ((1, 1), (3, 5), (20, 7)):
        a, b = rng.integers(0, 6, n) / 2, rng.integers(0, 6, m) / 2
        pairs = np.subtract.outer(a, b)
        assert auroc(a, b) == pytest.approx(((pairs > 0) + 0.5 * (pairs == 0)).mean())


def test_figures_of_a_run_known_by_hand(run):
    found = report.figures(run)
    by_source = {row["source"]: row for row in found["sources"]}
    assert list(by_source) == ["good", "good, duplicate", "bad", "good, shuffled"]
    assert by_source["good"] == {
        "source": "good",
        "samples": 2,
        "value": 1.5,
        "mean": 0.375,
        "count": 4,
        "mean_per_sample": 0.75,
        "positive_share": 1.0,
    }
    assert found["over_time"]["step"] == [1, 2]
    assert found["over_time"]["cumulative_per_sample"]["good"] == [0.375, 0.75]
    assert found["over_time"]["cumulative_per_sample"]["bad"] == [-0.125, -0.0625]
    shuffled, duplicate = found["planted"]["shuffled"], found["planted"]["duplicate"]
    assert shuffled["auroc"] == shuffled["auroc_within_source"] == 1.0
    assert duplicate["mean_per_sample"] == 0.625 and duplicate["originals_mean_per_sample"] == 0.75
    assert duplicate["source_mean_per_sample"] == 0.75
    efficiency = found["efficiency"]
    assert efficiency["value_sum"] == [0.625, 0.6875] and efficiency["batch_drop"] == [0.5, 0.75]
    assert efficiency["ratio"] == pytest.approx(1.3125 / 1.25) and efficiency["correlation"] == pytest.approx(1)
    assert efficiency["run_value_sum"] == 1.3125 and efficiency["run_validation_drop"] == 1.0
    assert [row["sample_id"] for row in found["best"]] == ["a", "b", "a~duplicate", "c", "b~shuffled"]
    assert [row["sample_id"] for row in found["worst"]] == ["b~shuffled", "c", "a~duplicate", "b", "a"]
    assert [row["sample_id"] for row in found["worst_not_planted"]] == ["c", "b", "a"]
    assert found["worst"][1]["text"] == "ünïcode" and found["worst"][1]["count"] == 2
    assert sum(map(sum, found["distribution"]["counts"].values())) == 5


def test_json_holds_the_figures_and_nothing_that_is_not_json(run):
    found = report.write(run)
    text = (run / "report.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) | {"report": found["report"]} == found
    assert found["report"] == str(run / "report.html")


def test_batches_that_moved_nothing_have_no_ratio(run):
    path = run / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row | {"batch_drop": 0.0} if "loss" in row else row) + "\n" for row in rows))
    efficiency = report.write(run)["efficiency"]
    assert efficiency["ratio"] is efficiency["correlation"] is None and efficiency["batch_drop"] == [0.0, 0.0]
    json.loads((run / "report.json").read_text(), parse_constant=pytest.fail)


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags, self.links, self.words, self.headings = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.links += [value for name, value in attrs if name in ("src", "href", "xlink:href")]

    def handle_data(self, data):
        if self.tags[-1:] == ["h2"]:
            self.headings.append(data)
        self.words.append(data)


def test_page_stands_alone_and_shows_samples_as_text(run):
    report.write(run)
    text = (run / "report.html").read_text(encoding="utf-8")
    page = Page(text)
    assert page.tags.count("svg") == 4 and "script" not in page.tags and "link" not in page.tags
    assert all(link.startswith("#") for link in page.links) and "url(http" not in text and "@import" not in text
    assert "<script>alert('&')</script>\ufffd" in page.words
    assert "ünïcode" in page.words
    for heading in ("Value per source over training", "Most helpful samples", "Most harmful samples"):
        assert heading in page.headings
    assert "currentColor" in text and "prefers-color-scheme: dark" in text
    # Every source is named at the end of its line, in the first picture.
    picture = text[text.index("<svg") : text.index("</svg>")]
    assert all(f">{name}</text>" in picture for name in ("good", "bad", "good, shuffled", "good, duplicate"))
    assert (run / "report.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_of_one_planted_sample_and_a_line_of_metrics_cut_short(run):
    """A source's name is no formula, either."""
    columns = {"sample_id": ["a"], "source": ["$x^{$"], "planted": ["shuffled"], "text": ["text"]}
    pq.write_table(pa.table(columns), run / "samples.parquet")
    ledger = inrun.Ledger(run / "ledger")
    ledger.resume(0)
    ledger.append(0, ["a"], [1.0])
    ledger.close()
    with (run / "metrics.jsonl").open("a") as metrics:
        metrics.write('{"step": 3, "lo')
    found = report.write(run)
    assert [row["source"] for row in found["sources"]] == ["$x^{$, shuffled"] and found["steps"] == 2
    assert ">$x^{$, shuffled</text>" in (run / "report.html").read_text(encoding="utf-8")


def test_samples_that_are_described_nowhere_are_a_group_without_text(run):
    with inrun.Ledger(run / "ledger") as ledger:
        ledger.append(2, ["x", "y"], [2.0, 1.0])
    found = report.write(run)
    first = found["sources"][0]
    assert (first["source"], first["samples"], first["mean_per_sample"]) == ("(unknown)", 2, 1.5)
    assert found["best"][0] == {
        "sample_id": "x", "source": "(unknown)", "planted": "", "text": "", "value": 2.0, "count": 1,
    }  # fmt: skip
    assert found["samples_seen"] == 7 and ">(unknown)</text>" in (run / "report.html").read_text(encoding="utf-8")


def test_sources_are_in_order_of_what_one_of_their_samples_is_worth(run):
    with inrun.Ledger(run / "ledger") as ledger:
        ledger.append(2, ["c", "a~duplicate"], [1.0625, -0.625])
    found = report.figures(run)["sources"]
    assert [(row["source"], row["mean_per_sample"], row["positive_share"]) for row in found] == [
        ("bad", 1.0, 1.0), ("good", 0.75, 1.0), ("good, duplicate", 0.0, 0.0), ("good, shuffled", -0.75, 0.0),
    ]  # fmt: skip


def test_planted_samples_are_held_to_clean_ones_of_all_sources_and_of_their_own(run):
    with inrun.Ledger(run / "ledger") as ledger:
        ledger.append(2, ["A", "c"], [5.0, -1.9375])  # A is described nowhere
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows.insert(2, rows[1] | {"step": 2, "value_sum": 3.0625, "batch_drop": None})
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = report.figures(run)
    shuffled = found["planted"]["shuffled"]  # -0.75, of good: 0.75 twice; of others: 5 and -2
    assert (shuffled["auroc"], shuffled["auroc_within_source"]) == (0.75, 1.0)
    assert shuffled["source_mean_per_sample"] == 0.75
    assert found["efficiency"]["step"] == [0, 1] and found["efficiency"]["run_value_sum"] == 4.375
    edges, counts = found["distribution"]["edges"], found["distribution"]["counts"]
    assert (edges[0], edges[-1], len(edges)) == (-2.0, 5.0, 61)
    assert {kind: sum(each) for kind, each in counts.items()} == {"": 4, "duplicate": 1, "shuffled": 1}


def test_a_name_that_ends_as_those_of_copies_do_is_no_copys(run):
    before = report.figures(run)["planted"]["duplicate"]
    with inrun.Ledger(run / "ledger") as ledger:
        ledger.append(2, ["c~duplicate"], [5.0])
    found = report.figures(run)["planted"]["duplicate"]
    for name in ("samples", "originals_mean_per_sample", "correlation_with_original"):
        assert found[name] == before[name]


def test_losses_of_a_long_run_are_thinned_evenly(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [rows[0] | {"step": step, "loss": float(step)} for step in range(1001)] + [rows[-1] | {"step": 1001}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    losses = report.figures(run)["losses"]
    assert losses["step"] == losses["loss"] == list(range(0, 1001, 3))


def test_many_sources_are_drawn_and_only_the_extremes_named(run):
    from inrun import pictures

    found = report.figures(run)
    curves = {f"source {i}": [1.0 - i, 2.0 - i] for i in range(20)}
    found["over_time"]["cumulative_per_sample"] = curves
    named = set(re.findall(r">(source \d+)</text>", pictures.svgs(found)["sources"]))
    assert named == {f"source {i}" for i in (0, 1, 2, 3, 4, 17, 18, 19)}


def test_labels_are_moved_apart():
    from inrun.pictures import _apart

    placed = _apart([0.0, 0.01, 5.0, 0.02], gap=1.0)
    assert np.diff(np.sort(placed)).min() >= 1.0 - 1e-9
    assert np.argsort(placed).tolist() == [0, 1, 3, 2] and placed[2] == pytest.approx(5.0, abs=0.5)


def test_findings_name_every_source_and_what_was_planted(run):
    printed = report.findings(report.figures(run))
    for line in ("good, shuffled", "bad", "AUROC 1.000 by low value", "a pair together earns 1.83 times"):
        assert line in printed
    assert "values sum to 1.05 times" in printed and "values sum to 1.31 and" in printed


def test_without_matplotlib_the_figures_are_still_written(run, monkeypatch):
    monkeypatch.setattr(report.importlib.util, "find_spec", lambda name: None)
    assert report.write(run)["report"] is None
    assert (run / "report.json").exists() and not (run / "report.html").exists()


def test_a_folder_without_a_run_or_without_a_step_is_an_error(run, tmp_path):
    with pytest.raises(inrun.InRunError, match="expected the folder of a run"):
        report.figures(tmp_path)
    (run / "metrics.jsonl").unlink()
    with pytest.raises(inrun.InRunError, match="expected at least one checkpointed step"):
        report.figures(run)
