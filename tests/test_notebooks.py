"""Every notebook runs, and shows what it says."""

from __future__ import annotations

import os
import runpy
from pathlib import Path

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.py"))


@pytest.fixture(autouse=True)
def _no_window(monkeypatch):
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.setitem(os.environ, "MPLBACKEND", "agg")


def test_there_are_notebooks():
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_runs(path, capsys):
    names = runpy.run_path(str(path))
    if path.stem == "01_quickstart":
        assert names["auroc"] > 0.7
        assert names["is_wrong"].sum() == 100
        assert set(names["worst"]["sample_id"].to_pylist()) <= set(names["wrong"].tolist())
