"""The bench of whole steps, with its gate and without its clock: it must run when a machine is at hand."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_whole_steps_pass_their_gate():
    """Ours and every peer, at the short case; each is held to float64."""
    options = ["-q", "--benchmark-disable", "-k", "T32", "-p", "no:cacheprovider"]
    said = _python("-m", "pytest", "bench/bench_step.py", *options, OMP_NUM_THREADS="1")
    assert "passed" in said and "skipped" not in said


def test_the_hosts_work_is_measured_on_a_gpus_way():
    """Every layer's launches, which do nothing: of what took another way there would be fewer."""
    said = _python("-m", "bench.bench_host", "--steps", "2", "--layers", "1")
    linears, norms, embeddings, adam = 4 * 3 + 2, 3 * 2, 2, 1  # a bias has a pass of its own; the head has none
    assert f"{linears + norms + embeddings + adam} launches" in said, said


@pytest.mark.parametrize("path", sorted((ROOT / "bench/results").glob("*-regret.json")), ids=lambda p: p.stem)
def test_costs_are_fitted_from_what_is_committed(path):
    done = _python("-m", "bench.regret", "--refit", str(path))
    found = re.findall(r"regret of (\d+) cells: median ([\d.]+)", done)
    assert sum(int(cells) for cells, _ in found) == len(json.loads(path.read_text()))
    assert len(found) == 2 and all(float(median) <= 1.1 for _, median in found)


def test_every_products_time_is_predicted():
    said = _python(
        "-c",
        "from bench.bench_kernels import Case, SUITES; from bench.measure import Machine; machine = Machine();"
        "print(all(Case(2, 8, 16, 32).predicted(s, machine)['inrun'] > 0 for s in SUITES))",
    )
    assert said.split() == ["True"]


def test_directions_count_as_memory_that_is_held():
    said = _python(
        "-c",
        "from bench.bench_step import Case; from bench.peers import InRun;"
        "step = InRun(Case(2, 8, 64, 1, 32, tied=True).model(), {}); held = {id(x) for x in step.resident()};"
        "print(all(id(slot.direction) in held for slot in step.tracker.slots))",
    )
    assert said.split() == ["True"]


def _python(*arguments: str, **variables: str) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "kernels"]), **variables}
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout
