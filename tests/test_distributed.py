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


def failures(folder: Path, options: tuple[str, ...] = (), names: tuple[str, ...] = (), processes: int = 2) -> str:
    """Run the worker by torchrun in processes of one thread; the tracebacks of what failed."""
    here = os.pathsep.join([str(HERE), str(HERE.parent), str(HERE.parent / "kernels")])
    environment = {**os.environ, "PYTHONPATH": here, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Else a restarted group finds its predecessor's addresses in torchrun's store (torch 2.13, gloo).
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", *options]
    command += [str(HERE / "distributed_worker.py"), str(folder), *names]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    if done.returncode != 0:
        return done.stdout + done.stderr
    found = {rank: json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)}
    assert found[0] and all(of_rank.keys() == found[0].keys() for of_rank in found.values())
    return "\n".join(f"rank {rank}, {name}: {trace}" for rank in found for name, trace in found[rank].items() if trace)


def test_two_processes_are_one(tmp_path):
    """Every `check_*` of the worker; one launch for all, since starting torch takes longer than they do."""
    assert failures(tmp_path) == ""


def test_four_processes_of_two_meshes(tmp_path):
    assert failures(tmp_path, names=("four_tensor_parallel_under_fully_shard",), processes=4) == ""


def test_a_killed_rank_is_restarted_and_the_ledger_ends_whole(tmp_path):
    assert failures(tmp_path, ("--max-restarts=1",), ("restart",)) == ""
