"""The folder of a run, and files that a kill at any moment leaves whole.

run/config.json       settings, digest of the samples, versions
run/samples.parquet   sample_id, source, planted, text
run/ledger/           one value per sample and step
run/metrics.jsonl     one line per step
run/checkpoints/      the last two: weights, optimizer, step, random state
run/report.html, report.json, report.png
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from inrun.config import TrainConfig
from inrun.data import Samples
from inrun.errors import InRunError
from inrun.shards import replace


def choose(config: TrainConfig) -> Path:
    """`config.out`, or the next free runs/N, or with `resume` the last one."""
    if config.out is not None:
        return config.out
    numbers = [int(path.parent.name) for path in Path("runs").glob("*/config.json") if path.parent.name.isdigit()]
    if config.resume and not numbers:
        raise InRunError("resume: expected a run under runs/, found none; name its folder with --out")
    return Path("runs") / str(max(numbers, default=0) + (not config.resume))


def begin(folder: Path, config: TrainConfig, training: Samples, validation: Samples) -> None:
    """Create the run folder, or check that it is this run's.

    Raises:
        InRunError: the folder holds a run already; with `resume`, none, or one of other settings or text.
    """
    path = folder / "config.json"
    samples = {"training": training.fingerprint(), "validation": validation.fingerprint()}
    if path.exists() != config.resume:
        raise InRunError(
            f"resume: expected a run in {folder}, found none; start it without --resume"
            if config.resume
            else f"out: {folder} holds a run already; continue it with --resume, or choose another folder"
        )
    if config.resume:
        saved = json.loads(path.read_text())
        changed = _differences(saved["config"], config.to_json())
        if changed:
            raise InRunError(f"resume: expected the settings of {path}, got others: " + "; ".join(changed))
        if saved["samples"] != samples:
            raise InRunError(f"resume: the text has changed since the run in {folder} began; start a new run")
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    columns = {"sample_id": training.ids, "source": training.sources, "planted": training.planted}
    table = pa.table(columns | {"text": [training.text(i) for i in range(len(training))]})
    pq.write_table(table, folder / "samples.parquet")
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    run = {"config": config.to_json(), "samples": samples, "versions": versions}
    replace(path, lambda f: f.write(json.dumps(run, indent=2).encode()))


def _differences(saved: dict[str, Any], given: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for name in sorted(saved.keys() | given.keys()):
        a, b = saved.get(name), given.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            found += _differences(a, b, f"{prefix}{name}.")
        elif a != b:
            found.append(f"{prefix}{name} was {a!r}, is {b!r}")
    return found


class Metrics:
    """`metrics.jsonl`; rows wait in memory, as tensors, so that a step does not wait for the device."""

    def __init__(self, path: Path) -> None:
        self.path, self.waiting = path, []

    def add(self, **row: Any) -> dict[str, Any]:
        self.waiting.append(row)
        return row

    def flush(self) -> None:
        with self.path.open("a") as f:
            for row in self.waiting:
                plain = {k: v.item() if isinstance(v, Tensor) else v for k, v in row.items()}
                f.write(json.dumps(plain) + "\n")
            f.flush()
            os.fsync(f.fileno())
        self.waiting.clear()

    def resume(self, step: int) -> None:
        """Drop the rows of `step` and later, and a line that a kill cut short."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith(b"\n") and json.loads(line)["step"] < step]
        replace(self.path, lambda f: f.writelines(whole))


def checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    return sorted((folder / "checkpoints").glob("step-*.pt"))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of a step, whole or not at all, and drop all but the last two."""
    replace(folder / "checkpoints" / f"step-{step:08d}.pt", lambda f: torch.save(state, f))
    for old in checkpoints(folder)[:-2]:
        old.unlink()
