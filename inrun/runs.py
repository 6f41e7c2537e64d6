"""What the command line says of a run's ledger: its best and worst samples, two runs side by side, all totals."""

from __future__ import annotations

import functools
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, Literal

import numpy as np

from inrun import results, runfolder, shapley, shards
from inrun.errors import InRunError
from inrun.ledger import Ledger

if TYPE_CHECKING:
    import pyarrow as pa

TEXT = 40  # characters shown of a sample


@dataclass(frozen=True)
class Run:
    """A ledger, and the samples of the run where they are known."""

    ledger: Ledger
    samples: Path | None

    @classmethod
    def open(cls, folder: Path) -> Run:
        """Of a run folder (`inrun train`), or of a folder of ledger shards (`inrun.track(..., ledger=folder)`).

        Raises:
            InRunError: it is neither.
        """
        for path, samples in ((folder / "ledger", folder / "samples.parquet"), (folder, None)):
            if any(path.glob("*.parquet")) and not (path / "samples.parquet").exists():
                return cls(Ledger(path), samples if samples is not None and samples.exists() else None)
        raise InRunError(
            f"run: expected a run folder with values in it, or a folder of ledger shards, got {folder}, which "
            + ("holds neither" if folder.is_dir() else shards.not_a_folder(folder))
            + "; `inrun train` makes one under runs/, and so does `inrun.track(..., ledger=FOLDER)`"
        )

    def sources(self) -> pa.Table | None:
        """sample_id and source of every sample, what was planted among them apart, as in the report."""
        if self.samples is None:
            return None
        table = runfolder.read_samples(self.samples, self._id_type, text=False)
        groups = runfolder.groups(table["source"], table["planted"])
        return table.select(["sample_id"]).append_column("source", [groups])

    def describe(self, ids: list[Any]) -> dict[Any, tuple[str, str]]:
        """Source and the beginning of the text, in one line, of these samples."""
        if self.samples is None or not ids:
            return {}
        table = runfolder.read_samples(self.samples, self._id_type, among=ids)
        shown = {}
        groups = runfolder.groups(table["source"], table["planted"])
        for row, group in zip(table.to_pylist(), groups, strict=True):
            text = "".join(c if c.isprintable() else " " for c in " ".join(row["text"].split()))
            shown[row["sample_id"]] = (group, text if len(text) <= TEXT else text[: TEXT - 1] + "…")
        return shown

    @functools.cached_property
    def _id_type(self) -> pa.DataType:
        return self.ledger.dataset().schema.field("sample_id").type


def top(run: Run, k: int, *, worst: bool, source: str | None, target: str | None) -> str:
    """The k samples of highest (lowest) total value as a table.

    Raises:
        InRunError: `source` or `target` is not one of the run's, or it has several targets and none is named.
    """
    import pyarrow.compute as pc

    among = None
    if source is not None:
        groups = run.sources()
        if groups is None:
            raise InRunError(
                "source: expected a run folder with samples.parquet, which says the source of each sample, as `inrun "
                "train` makes; of another ledger, Ledger.by_source(...) and top(among=ids) take what you know of them"
            )
        among = groups.filter(pc.field("source") == source)["sample_id"]
        if not len(among):
            raise InRunError(f"source: expected one of {sorted(set(groups['source'].to_pylist()))}, got {source!r}")
    target = _one_target(target, run)
    rows = (run.ledger.bottom if worst else run.ledger.top)(k, target, among=among).to_pylist()
    described = run.describe([row["sample_id"] for row in rows])
    lines = []
    for row in rows:
        what = described.get(row["sample_id"])
        lines.append([f"{row['value']:+.3e}", f"{row['count']}", str(row["sample_id"]), *(what or ())])
    head = ["value", "times", "sample", *(["source", "text"] if described else [])]
    which = f"The {len(rows)} {'lowest' if worst else 'highest'} values" + (f" of {source}" if source else "")
    return f"{which}, in nats; above 0: the sample lowered the validation loss\n{_left(head, lines)}"


def compare(a: Run, b: Run, k: int, *, target: str | None) -> str:
    """How far two runs agree: rank correlation, sums per source, and the k samples whose value differs most.

    Args:
        a, b: the runs.
        k: how many samples.
        target: by this target, of both; None: by the only one that either has.

    Raises:
        InRunError: they have no sample in common; no target, or several and none is named.
        ValueError: k is negative.
    """
    if k < 0:
        raise ValueError(f"expected k >= 0, received {k}")
    target = _one_target(target, a, b)
    ours, theirs = a.ledger.totals(target), b.ledger.totals(target)
    if ours.schema.field("sample_id").type != theirs.schema.field("sample_id").type:
        raise InRunError("compare: expected runs on the same samples; one has integer ids, the other strings")
    both = ours.join(theirs, "sample_id", join_type="inner", right_suffix=" of b").sort_by("sample_id")
    if not len(both):
        raise InRunError(
            f"compare: expected samples in both runs, got {len(ours)} and {len(theirs)} with none in common"
        )
    x, y = both["value"].to_numpy(), both["value of b"].to_numpy()
    lines = [
        f"A: {a.ledger.path} ({len(ours)} samples)   B: {b.ledger.path} ({len(theirs)} samples)   in both: {len(both)}",
        f"Target: {target}. Values in nats; above 0: the sample lowered the validation loss.",
        f"Correlation over the samples in both: {_correlation(shapley.ranks(x), shapley.ranks(y))} of ranks, "
        f"{_correlation(x, y)} of values; {np.mean((x > 0) == (y > 0)):.0%} have the same sign.",
    ]
    per_source: dict[Any, list[str]] = {}
    for place, run in enumerate((a, b)):
        sources = run.sources()
        for row in run.ledger.by_source(sources, target).to_pylist() if sources is not None else []:
            cells = per_source.setdefault(row["source"], ["-"] * 4)
            cells[place], cells[place + 2] = f"{row['value']:+.4f}", f"{row['mean']:+.2e}"
    if per_source:
        head = ["source", "sum, A", "sum, B", "mean per time seen, A", "B"]
        lines += ["", results.table(head, [[results.in_line(str(name)), *cells] for name, cells in per_source.items()])]
    most = np.argsort(-np.abs(y - x), kind="stable")[:k]
    ids = both["sample_id"].take(most).to_pylist()
    described = a.describe(ids) or b.describe(ids)
    rows = [
        [f"{y[i] - x[i]:+.3e}", f"{x[i]:+.3e}", f"{y[i]:+.3e}", str(name), *described.get(name, ())]
        for i, name in zip(most, ids, strict=True)
    ]
    head = ["B - A", "A", "B", "sample", *(["source", "text"] if described else [])]
    return "\n".join([*lines, "", f"The {len(rows)} samples that changed most", _left(head, rows)])


# Suffix of a file -> how rows are written into it.
FORMS = {
    "": "jsonl",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".txt": "jsonl",
    ".csv": "csv",
    ".parquet": "parquet",
}


def export(
    run: Run,
    out: Path | None,
    *,
    form: Literal["jsonl", "csv", "parquet"] | None,
    keep_positive: bool,
    target: str | None,
) -> str:
    """Write every sample's total by every target: sample_id, target, value, count, and source where it is known.

    Args:
        run: whose.
        out: the file; None: standard output.
        form: of the rows; None: as the suffix of `out` says, jsonl without one.
        keep_positive: only rows with a value above 0.
        target: only this target.

    Returns:
        How much was written, in words.

    Raises:
        InRunError: the folder of `out` does not exist, or `out` would be taken for the run's own; its suffix says
            nothing; no such target; Parquet was asked for on a terminal.
    """
    import pyarrow.compute as pc

    if out is not None and not out.parent.is_dir():
        raise InRunError(f"out: expected a file in a folder, got {out}; {out.parent} {shards.not_a_folder(out.parent)}")
    if out is not None and _is_of(run, out.resolve()):
        raise InRunError(f"out: expected a file that is no part of the run, got {out}; its values are kept there")
    suffix = out.suffix.lower() if out is not None else ""
    kind = form or FORMS.get(suffix)
    if kind is None:
        raise InRunError(
            f"out: expected a name that ends in one of {', '.join(filter(None, FORMS))}, or --format; got {out}"
        )
    if target is not None:
        target = _one_target(target, run)
    if out is None and kind == "parquet" and sys.stdout.isatty():
        raise InRunError("format: parquet is binary; name a file with -o FILE, or send the output to one")
    table = run.ledger.totals(target)
    if keep_positive:
        table = table.filter(pc.field("value") > 0)
    if (sources := run.sources()) is not None:
        table = table.join(sources, "sample_id").sort_by([("sample_id", "ascending"), ("target", "ascending")])
    if out is None:
        _write(table, sys.stdout.buffer, kind)
    else:
        there = out.resolve()  # not the link
        if there.exists() and not there.is_file():  # a pipe, or a device
            with there.open("wb") as file:
                _write(table, file, kind)
        else:
            shards.replace(there, lambda file: _write(table, file, kind))
    rows, targets = len(table), sorted(table["target"].unique().to_pylist())
    if len(targets) > 1:
        samples = pc.call_function("count_distinct", [table["sample_id"]]).as_py()
        return f"{rows} rows, one for each sample and target: {samples} samples, targets {', '.join(targets)}"
    return f"{rows} samples"


def _is_of(run: Run, out: Path) -> bool:
    """Whether a file of this path is, or would be taken for, the run's own."""
    assert run.ledger.path is not None
    ledger = run.ledger.path.resolve()
    if out == ledger or (out.suffix == ".parquet" and out.parent == ledger):
        return True
    folder = ledger.parent
    is_run = ledger.name == "ledger" and any((folder / name).exists() for name in ("config.json", "samples.parquet"))
    own = [folder / name for name in runfolder.OWN] if is_run else []
    return any(path == out or path in out.parents for path in own)


def _one_target(target: str | None, *asked: Run) -> str:
    """The target that runs are asked by: `target`, or the only one that there is.

    Raises:
        InRunError: a run does not have it, or there are several and none is named.
    """
    has = {run.ledger.path: run.ledger.targets() for run in asked}
    shared = sorted(set.intersection(*map(set, has.values())))
    if target is None and len(shared) == 1 and all(names == shared for names in has.values()):
        return shared[0]
    if target is not None and target in shared:
        return target
    each = "; ".join(f"{path} has {names}" for path, names in has.items())
    if not shared:
        raise InRunError(f"target: expected one that all runs have, got none: {each}")
    got = f"{target!r}" if target is not None else "none"
    raise InRunError(f"target: expected one of {shared}, named with --target, got {got}; {each}")


def _write(table: pa.Table, file: IO[bytes], form: str) -> None:
    if form == "csv":
        from pyarrow import csv

        csv.write_csv(table, file)
    elif form == "parquet":
        import pyarrow.parquet as pq

        pq.write_table(table, file)
    else:
        from tqdm import tqdm

        with tqdm(total=len(table), unit="row", unit_scale=True, disable=None if len(table) > 10**6 else True) as bar:
            for batch in table.to_batches(max_chunksize=1 << 14):
                file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in batch.to_pylist()).encode())
                bar.update(len(batch))


def _correlation(a: np.ndarray, b: np.ndarray) -> str:
    return f"{shapley.correlation(a, b):.3f}" if len(a) > 1 and a.std() > 0 and b.std() > 0 else "undefined"


def _left(head: list[str], rows: list[list[str]]) -> str:
    """A table with columns of numbers first and words after them, flush left; a row may lack its last cells."""
    rows = [[*map(results.in_line, row), *[""] * (len(head) - len(row))] for row in rows]
    return results.table(head, rows, left=True)
