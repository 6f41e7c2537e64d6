"""Several processes: values, weights and ledger are those of one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

HERE = Path(__file__).parent
pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def launch(script: str, folder: Path, *options: str) -> subprocess.CompletedProcess:
    """Run a script of this folder by torchrun, in two processes of one thread."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *options]
    here = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "kernels")])
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*command, str(HERE / script), str(folder)], capture_output=True, text=True, timeout=240, env=environment
    )


def test_two_processes_are_one(tmp_path):
    """Every `check_*` of the worker; one launch for all, since starting torch takes longer than they do."""
    done = launch("distributed_worker.py", tmp_path)
    found = {f"{rank}: {name}": trace for rank in (0, 1) if (tmp_path / f"{rank}.json").exists()
             for name, trace in json.loads((tmp_path / f"{rank}.json").read_text()).items()}  # fmt: skip
    wrong = "\n".join(f"--- rank {name}\n{trace}" for name, trace in found.items() if trace)
    assert not wrong, wrong
    assert done.returncode == 0 and len(found) >= 2, done.stderr[-5000:]
