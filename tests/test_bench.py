"""The bench of whole steps, with its gate and without its clock: it must run when a machine is at hand."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_whole_steps_pass_their_gate():
    """Ours and every peer, at the short case; each is held to float64."""
    command = [sys.executable, "-m", "pytest", "bench/bench_step.py", "-q", "--benchmark-disable", "-k", "T32"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "kernels"]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "passed" in done.stdout and "skipped" not in done.stdout


def test_the_hosts_work_is_measured_on_a_gpus_way():
    """Every layer's launches, which do nothing: of what took another way there would be fewer."""
    command = [sys.executable, "-m", "bench.bench_host", "--steps", "2", "--layers", "1"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([".", "kernels"])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    linears, norms, embeddings, adam = 4 * 3 + 2, 3 * 2, 2, 1  # a bias has a pass of its own; the head has none
    assert f"{linears + norms + embeddings + adam} launches" in done.stdout, done.stdout
