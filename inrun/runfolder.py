"""The folder of a run, and files that a kill at any moment leaves whole.

run/config.json       settings, digest of the samples, versions
run/samples.parquet   sample_id, source, planted, text
run/ledger/           one value per sample and step
run/metrics.jsonl     one line per step
run/checkpoints/      the last two: weights, optimizer, step, random state
run/report.html, report.json, report.png

The commands that ask a ledger take any folder with ledger/ and a samples.parquet of sample_id, source and text; the
latter two, and planted, may be left out.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from inrun.config import TrainConfig
from inrun.data import Samples
from inrun.errors import InRunError
from inrun.shards import of_kind, replace

if TYPE_CHECKING:
    import pyarrow as pa

UNSAID = {"source": "(unknown)", "planted": "", "text": ""}  # of a sample of which nothing is said
OWN = ("config.json", "samples.parquet", "ledger", "metrics.jsonl", "checkpoints",
       "report.html", "report.json", "report.png")  # fmt: skip


def choose(config: TrainConfig) -> Path:
    """`config.out`, or the next free runs/N, or with `resume` the last one."""
    if config.out is not None:
        return config.out
    found = Path("runs").glob("*/config.json" if config.resume else "*/*")  # what holds anything is not free
    numbers = [int(path.parent.name) for path in found if path.parent.name.isdecimal()]
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
        saved = settings(folder)
        changed = _differences(saved["config"], config.to_json())
        if changed:
            raise InRunError(f"resume: expected the settings of {path}, got others: " + "; ".join(changed))
        if saved.get("samples") != samples:
            raise InRunError(f"resume: the text has changed since the run in {folder} began; start a new run")
        return
    for name in ("ledger", "metrics.jsonl"):
        if (folder / name).exists():  # of no run that stopped before its config.json
            raise InRunError(f"out: expected a new folder, got {folder}, which holds {name} already; choose another")
    import pyarrow as pa
    import pyarrow.parquet as pq

    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    columns = {"sample_id": training.ids, "source": training.sources, "planted": training.planted}
    table = pa.table(columns | {"text": [training.text(i) for i in range(len(training))]})
    pq.write_table(table, folder / "samples.parquet")
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    run = {"config": config.to_json(), "samples": samples, "versions": versions}
    replace(path, lambda f: f.write(json.dumps(run, indent=2).encode()))


def settings(folder: Path) -> dict[str, Any]:
    """What `config.json` says.

    Raises:
        InRunError: it is no run's, or was cut short.
    """
    path = folder / "config.json"
    try:
        found = json.loads(path.read_text())
        found["config"].keys()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InRunError(
            f"run: expected the settings of a run in {path}, which lacks them or was cut: {error}"
        ) from None
    return found


def read_samples(path: Path, id_type: pa.DataType, text: bool = True, among: list[Any] | None = None) -> pa.Table:
    """Of every sample, or those among, sample_id (of the ledger's type), source, planted and perhaps text; "(unknown)"
    for a source, and "" for what there is none of.

    Raises:
        InRunError: there are no ids, ids of the other kind, or one of them twice.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    instead = {name: value for name, value in UNSAID.items() if text or name != "text"}
    schema = pq.read_schema(path)
    has = schema.names
    if "sample_id" not in has:
        raise InRunError(f"samples: expected a column sample_id in {path}, got {', '.join(has)}")
    if not of_kind(kind := schema.field("sample_id").type, id_type):
        raise InRunError(f"samples: expected {id_type} ids in {path}, as in the ledger, got {kind}")
    only = None if among is None else pc.field("sample_id").cast(id_type).isin(pa.array(among, id_type))
    table = pq.read_table(path, columns=["sample_id", *(name for name in instead if name in has)], filters=only)
    ids = table["sample_id"].cast(id_type)
    if len(ids.unique()) < len(ids):
        twice = [each["values"] for each in ids.value_counts().to_pylist() if each["counts"] > 1]
        raise InRunError(f"samples: expected each sample once in {path}, got {len(twice)} twice: {twice[:10]}")
    columns = {"sample_id": ids}
    for name, otherwise in instead.items():
        column = table[name] if name in table.column_names else pa.nulls(len(table))
        columns[name] = pc.fill_null(column.cast(pa.string()), otherwise)
    return pa.table(columns)


def groups(sources: Iterable[Any], planted: Iterable[Any]) -> list[str]:
    """Of each sample its source, what is planted apart: "python, shuffled"."""
    pairs = zip(map(str, sources), map(str, planted), strict=True)
    return [f"{source}, {kind}" if kind else source for source, kind in pairs]


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
        kept = [line for line, row in metrics_of(self.path) if row["step"] < step]
        replace(self.path, lambda f: f.writelines(kept))


def metrics_of(path: Path) -> list[tuple[bytes, dict[str, Any]]]:
    """The lines of `metrics.jsonl`, in order of steps, and what they say; not the one that a kill, or this moment, cut.

    Raises:
        InRunError: a line before it is none of a run's.
    """
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        if line.endswith(b"\n"):
            try:
                row = json.loads(line)
                int(row["step"])
            except (ValueError, KeyError, TypeError) as error:
                raise InRunError(f"run: expected a step's figures in line {number} of {path}: {error}") from None
            found.append((line, row))
    return found


def checkpoints(folder: Path) -> list[Path]:
    """The run's checkpoints, oldest first."""
    found = (folder / "checkpoints").glob("step-*.pt")
    return sorted(path for path in found if re.fullmatch(r"step-\d+", path.stem))


def save_checkpoint(folder: Path, step: int, state: dict[str, Any]) -> None:
    """Write the checkpoint of a step, whole or not at all, and drop all but the last two."""
    replace(folder / "checkpoints" / f"step-{step:08d}.pt", lambda f: torch.save(state, f))
    for old in checkpoints(folder)[:-2]:
        old.unlink()
