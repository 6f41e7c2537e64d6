"""Every notebook runs, and shows what it says."""

from __future__ import annotations

import json
import os
import re
import runpy
from pathlib import Path

import numpy as np
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
    elif path.stem == "02_fidelity":
        assert max(names["errors"]["path_secant"]) < 0.02 < min(names["errors"]["first"])
    elif path.stem == "03_curation":
        end = {name: np.mean(losses) for name, losses in names["best"].items()}
        assert end["low in its label"] < end["nothing"] < end["random"] < end["negative value"]
    elif path.stem == "04_kernels":
        ratio = names["ratios"](names["measured"])
        assert ratio["ghost_wgrad_dot"] < ratio["two products"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_the_executed_notebook_holds_the_same_cells(path):
    """After a change: jupytext --to ipynb --execute notebooks/NAME.py"""
    parts = re.split(r"^# %%(?: \[markdown\])?\n", path.read_text(), flags=re.M)[1:]
    cells = json.loads(path.with_suffix(".ipynb").read_text())["cells"]
    executed = ["".join(cell["source"]) for cell in cells]
    prose = [cell["cell_type"] == "markdown" for cell in cells]
    written = [re.sub(r"^# ?", "", p, flags=re.M) if m else p for p, m in zip(parts, prose, strict=True)]
    assert [p.strip() for p in written] == [p.strip() for p in executed]
    shown = [output for cell in cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in shown)
    assert not any(output["output_type"] == "error" for output in shown)
