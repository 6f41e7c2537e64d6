"""Several processes: values, weights and ledger are those of one process with the whole batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

import inrun

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


@pytest.mark.parametrize("method", ["first", "path_secant"])
def test_fully_shard_in_one_process_is_as_without_it(method):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def values(sharded: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 2))
        x, held = torch.randn(7, 6).split([4, 3])
        tracker = inrun.track(model, method=method, validation=lambda: model(held).square().mean())
        for module in (model[0], model) if sharded else ():
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        tracker.bind(optimizer := torch.optim.AdamW(model.parameters()))
        for _ in range(2):
            with tracker.step(range(4)) as step:
                (model(x) - 1).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        return step.values

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        torch.testing.assert_close(values(True), values(False))
    finally:
        dist.destroy_process_group()


def test_four_processes_of_two_meshes(tmp_path):
    assert failures(tmp_path, names=("four_tensor_parallel_under_fully_shard",), processes=4) == ""


def test_a_killed_rank_is_restarted_and_the_ledger_ends_whole(tmp_path):
    assert failures(tmp_path, ("--max-restarts=1",), ("restart",)) == ""
