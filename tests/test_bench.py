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
