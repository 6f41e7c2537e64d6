"""A ledger of many rows: how fast it is written, compacted and asked, in how many bytes and how much memory.

    python -m bench.bench_ledger                                    # ten million rows, JSON under runs/bench
    python -m bench.bench_ledger --rows 100000000 --save-results    # to bench/results, which is committed

Epochs of random permutations over rows / 10 samples, 4096 to a step, in eight sources, written by two ranks. Every
part runs in a process of its own, whose peak memory is its own; answers are held to sums added up while writing.
"""

from __future__ import annotations

import datetime
import multiprocessing
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import tyro
from tqdm import tqdm

from bench import table
from inrun import Ledger, results

EPOCHS, BATCH, RANKS, SOURCES, K, SEED = 10, 4096, 2, 8, 100, 0


@dataclass(frozen=True)
class Args:
    """Time a large ledger."""

    rows: int = 10_000_000
    """Rows of the ledger; each takes some 16 bytes of disk while it is compacted."""
    save_results: bool = False
    """Write the JSON to bench/results."""
    folder: Path | None = None
    """Where the ledger is made (and removed); None: the system's folder for temporary files."""


def write(folder: Path, rows: int) -> None:
    """The ledger, and `sums.npy`: float64 [samples], each sample's sum, from NumPy."""
    rng, samples = np.random.default_rng(SEED), rows // EPOCHS
    sums, step = np.zeros(samples), 0
    writers = [Ledger(folder / "ledger", rank=rank) for rank in range(RANKS)]
    with tqdm(total=rows, unit="row", unit_scale=True, desc="writing") as bar:
        for _ in range(EPOCHS):
            order = rng.permutation(samples)
            for start in range(0, samples, BATCH):
                ids = order[start : start + BATCH]
                values = rng.standard_normal(len(ids), dtype=np.float32) * np.float32(1e-3)
                sums[ids] += values
                for rank, part in enumerate(np.array_split(np.arange(len(ids)), RANKS)):
                    writers[rank].append(step, ids[part], values[part])
                step += 1
                bar.update(len(ids))
    for ledger in writers:
        ledger.close()
    np.save(folder / "sums.npy", sums)


def compact(folder: Path) -> None:
    Ledger(folder / "ledger").compact(progress=True)


def top(folder: Path) -> None:
    found, sums = Ledger(folder / "ledger").top(K), np.load(folder / "sums.npy")
    best = np.argpartition(-sums, K)[:K]
    _require_close("top", found["value"].to_numpy(), np.sort(sums[best])[::-1])
    _require_close("top ids", sums[found["sample_id"].to_numpy()], np.sort(sums[best])[::-1])


def by_source(folder: Path) -> None:
    sums = np.load(folder / "sums.npy")
    ids = np.arange(len(sums))
    names = pa.DictionaryArray.from_arrays(pa.array(ids % SOURCES), [f"source {i}" for i in range(SOURCES)])
    found = Ledger(folder / "ledger").by_source(pa.table({"sample_id": ids, "source": names}))
    _require_close("by_source", found["value"].to_numpy(), np.bincount(ids % SOURCES, sums))


def totals(folder: Path) -> None:
    _require_close("totals", Ledger(folder / "ledger").totals()["value"].to_numpy(), np.load(folder / "sums.npy"))


def over_time(folder: Path) -> None:
    found = Ledger(folder / "ledger").over_time(bins=50)
    _require_close("over_time", found["value"].to_numpy().sum(), np.load(folder / "sums.npy").sum())


def timed(run: Callable[..., None], engine: str, *arguments: Any) -> dict[str, float]:
    """Seconds of the wall and of the CPU (which other users' load does not stretch), and this process's peak memory."""
    if engine == "pyarrow":
        sys.modules["duckdb"] = None  # pyright: ignore[reportArgumentType]  # as where it is not installed
    start, cpu = time.perf_counter(), time.process_time()
    run(*arguments)
    seconds, cpu = time.perf_counter() - start, time.process_time() - cpu
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"seconds": seconds, "cpu_seconds": cpu, "peak_rss_bytes": peak, "load": os.getloadavg()[0]}


def main(args: Args) -> None:
    """Write, compact, ask; print a table and write JSON."""
    spawn = multiprocessing.get_context("spawn")
    rows = args.rows // (EPOCHS * BATCH) * EPOCHS * BATCH  # whole steps
    if not rows:
        raise SystemExit(f"rows: expected at least {EPOCHS * BATCH}, got {args.rows}")
    found: list[dict[str, Any]] = []
    run = results.provenance(SEED)
    run["versions"] = {**run["versions"], **{name: version(name) for name in ("pyarrow", "duckdb")}}
    run["date"] = datetime.date.today().isoformat()
    out = table.folder(args.save_results)
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:

        def measure(part: Callable[..., None], engine: str, shape: str, *more: Any) -> None:
            with ProcessPoolExecutor(1, mp_context=spawn) as alone:
                figures = alone.submit(timed, part, engine, Path(folder), *more).result()
            shards = list(Path(folder, "ledger").iterdir())
            size = sum(shard.stat().st_size for shard in shards)
            facts = {"part": part.__name__, "engine": engine, "ledger": shape, "rows": rows, "samples": rows // EPOCHS}
            found.append({**facts, **figures, "shards": len(shards), "bytes_per_row": size / rows})
            (path,) = results.write(out, "ledger", run | {"results": found}, {})  # whatever becomes of the next part
            print(f"{part.__name__}, {engine}: {figures['seconds']:.1f} s, in {path}")

        measure(write, "-", "as written", rows)
        measure(compact, "-", "compacted")
        for engine, parts in (("duckdb", (top, by_source, over_time, totals)), ("pyarrow", (by_source, top))):
            for part in parts:
                measure(part, engine, "compacted")
    head = ("part", "ledger", "engine", "seconds", "of the CPU", "rows/s", "bytes/row", "peak RSS, MB")
    lines = []
    for r in found:
        speed = [f"{r['seconds']:.1f}", f"{r['cpu_seconds']:.1f}", f"{rows / r['seconds']:.2g}"]
        size = [f"{r['bytes_per_row']:.2f}", f"{r['peak_rss_bytes'] / 1e6:.0f}"]
        lines.append([r["part"], r["ledger"], r["engine"], *speed, *size])
    print(f"{rows} rows of {rows // EPOCHS} samples; {run['device']}\n{results.table(head, lines)}")


def _require_close(what: str, values: Any, expected: Any) -> None:
    np.testing.assert_allclose(values, expected, rtol=1e-6, atol=1e-9, err_msg=what)


if __name__ == "__main__":
    main(tyro.cli(Args))
