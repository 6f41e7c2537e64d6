"""The ledger: every value of a run, in append-only Parquet shards that any reader of Parquet understands.

One row per step, sample and target (and token, where tokens are scored):

    step       int64               optimizer step, from 0
    sample_id  int64 or string     the user's id (one kind per ledger)
    token      int32               position in the sample, from 0; null where the value is the whole sample's
    target     dictionary(string)  name of the validation target, or of one validation sample
    value      float32             > 0: the sample lowered the validation loss; unit: nats (the paper's phi is
                                   the loss change, so phi = -value)

Shards are written whole by one writer per rank (`shards.py`), so ``folder/*.parquet`` is the ledger, each row
once, at any moment. A killed run loses what was not flushed; ``resume(step)`` then drops what the resumed run
will do again.

Example:
    >>> from inrun import Ledger
    >>> ledger = Ledger()                                   # in memory; Ledger("run/ledger") keeps shards
    >>> ledger.append(0, ["a", "b"], [0.5, -0.25])
    >>> ledger.append(1, ["b", "c"], [0.5, 0.125])
    >>> ledger.totals().to_pydict()["value"]                # a, b, c
    [0.5, 0.25, 0.125]
    >>> ledger.by_source({"a": "web", "b": "web"}).to_pydict()["source"]
    ['web', None]
    >>> ledger.top(1).to_pydict()["sample_id"]
    ['a']
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from inrun import shards
from inrun.errors import InRunError
from inrun.queries import stretches, sum_values

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.dataset import Dataset

_SETTLE_STEPS = 32  # values on a GPU are read back once in so many steps: no synchronisation at each step


class Ledger:
    """Append-only record of values, with the queries that a run needs.

    Args:
        path: folder of shards, made at the first flush; None keeps everything in memory. Opening a folder
            reads the footers of its shards and changes nothing; the shards of all writers are read as one.
        rank: this writer's number, >= 0. Two processes must not write with one rank.
        flush_rows: so many rows in memory are written as a shard without being asked.
        metadata: what to record beside the values (run config, coverage), JSON-like. `self.metadata`, which
            may be added to, goes into every shard written from then on; without this argument it starts as
            what this writer's last shard holds.

    Raises:
        InRunError: the folder holds other Parquet files, another schema version or ids of both kinds.
    """

    def __init__(
        self,
        path: str | os.PathLike[str] | None = None,
        *,
        rank: int = 0,
        flush_rows: int = 1 << 18,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if rank < 0 or flush_rows < 1:
            raise ValueError(f"expected rank >= 0 and flush_rows >= 1, received {rank=}, {flush_rows=}")
        self.path = None if path is None else Path(path)
        self.rank = rank
        self.flush_rows = flush_rows
        self.metadata: dict[str, Any] = {}
        self.last_step: int | None = None  # of this writer
        self._id_type: pa.DataType | None = None
        self._pending: list[tuple[int, pa.Array, Any, tuple[str, ...], bool]] = []  # values perhaps on a GPU
        self._buffer: list[pa.RecordBatch] = []
        self._buffered_rows = 0
        self._kept: list[pa.Table] = []  # what an in-memory ledger flushed
        found, own = self._shards(), self._own_shards()
        if metadata is not None:
            self.metadata = dict(metadata)
        elif found:
            self.metadata = shards.read_metadata((own or found)[-1])
        if own:
            self.last_step = shards.last_step(own[-1])

    # ------------------------------------------------------------------ writing

    def append(
        self, step: int, ids: Any, values: Any, targets: Sequence[str] = ("validation",), *, per_token: bool = False
    ) -> None:
        """Record the values of one step.

        Args:
            step: the optimizer step, beyond every step that this writer holds.
            ids: [B] sample ids: integers (tensor, array or sequence) or a sequence of str. May repeat.
            values: [B], or [B, M] with one column per target: tensor, array or sequence; kept as float32.
            targets: the M names.
            per_token: values are [B, T] or [B, T, M], one for each token of every sample.

        Raises:
            ValueError, TypeError: counts, shapes or types that do not fit; nothing is recorded.
            InRunError: a step not beyond the last one, ids of the other kind, or a value that is not finite,
                named with its samples (values on a GPU are looked at some steps later, or at the flush).
        """
        step = shards.as_int(step, "step")
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        if step < 0 or not names or len(set(names)) < len(names):
            raise ValueError(f"expected step >= 0 and distinct target names, received {step=}, targets={names}")
        if self.last_step is not None and step <= self.last_step:
            raise InRunError(
                f"step {step} was appended, but this writer (rank {self.rank}) holds steps up to "
                f"{self.last_step}; call resume({step}) first, which drops step {step} and later, or use a "
                "new folder"
            )
        id_array = shards.as_ids(ids)
        count = len(id_array)
        if count and self._id_type not in (None, id_array.type):
            raise InRunError(f"expected ids of type {self._id_type} as in this ledger, received {id_array.type}")
        values = values.detach().clone() if hasattr(values, "detach") else np.array(values, dtype=np.float32)
        shape = tuple(values.shape)
        lead = (count, *(shape[1:2] or (None,))) if per_token else (count,)
        if shape != (*lead, len(names)) and (shape != lead or len(names) > 1):
            shown = f"{count}, T" if per_token else f"{count}"
            flat = f"({shown}{'' if per_token else ','}) or " if len(names) == 1 else ""
            expected = f"{flat}({shown}, {len(names)})"
            raise ValueError(
                f"expected values of shape {expected} for {count} ids and targets {names}, received {shape}"
            )
        at_hand = isinstance(values, np.ndarray) or values.device.type == "cpu"
        if at_hand or len(self._pending) >= _SETTLE_STEPS:
            self._settle()
        self._pending.append((step, id_array, values, names, per_token))
        if at_hand:
            self._settle()
        self.last_step = step
        self._id_type = id_array.type if count else self._id_type
        if self._buffered_rows >= self.flush_rows:
            self.flush()

    def flush(self) -> None:
        """Commit what was appended: one new shard, whole and on disk when this returns."""
        self._settle()
        if not self._buffer:
            return
        table = self._buffered().unify_dictionaries().combine_chunks()
        if self.path is None:
            self._kept.append(table)
        else:
            self.path.mkdir(parents=True, exist_ok=True)
            shards.remove_leftovers(self.path, self._prefix)
            shard = self.path / f"{self._prefix}{table['step'][0].as_py():012d}.parquet"
            if shard.exists():
                raise InRunError(f"{shard} exists already: another process writes with rank {self.rank}")
            shards.write(shards.describe(table, self.rank, self.metadata), shard)
        self._buffer, self._buffered_rows = [], 0

    def close(self) -> None:
        """Flush; a closed ledger can still be read."""
        self.flush()

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def resume(self, step: int) -> None:
        """Drop every row of this writer at `step` or later, where `step` is the next step to be run.

        On disk and in memory. It may be killed at any moment and called again: shards go from the last to the
        first, and a shard that straddles `step` is replaced by its first part in one rename.
        """
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        step = shards.as_int(step, "step")
        before = pc.field("step") < step
        self._pending = [entry for entry in self._pending if entry[0] < step]
        self._settle()
        self._buffer = self._buffered().filter(before).to_batches()
        self._buffered_rows = sum(batch.num_rows for batch in self._buffer)
        self._kept = [rest for table in self._kept if (rest := table.filter(before)).num_rows]
        self.last_step = None
        if self.path is not None and self.path.is_dir():
            shards.remove_leftovers(self.path, self._prefix)
            own = self._own_shards()
            while own and int(own[-1].stem.removeprefix(self._prefix)) >= step:
                own.pop().unlink()
            shards.sync(self.path)
            if own and shards.last_step(own[-1]) >= step:
                shards.write(pq.read_table(own[-1]).filter(before), own[-1])
            if own:
                self.last_step = shards.last_step(own[-1])
        for part in (*self._kept, *self._buffer):
            self.last_step = part["step"][-1].as_py()
        if self.last_step is None:
            self._id_type = None

    # ------------------------------------------------------------------ queries

    def dataset(self) -> Dataset:
        """All rows as a pyarrow Dataset, for queries of one's own: DuckDB and Polars take it as it is.

        Raises:
            InRunError: the folder does not exist and nothing was appended.
        """
        import pyarrow.dataset as ds

        self._settle()
        if self.path is not None and not self._buffer and not self.path.is_dir():
            raise InRunError(f"expected a folder of shards, received {self.path}, which does not exist")
        files = [str(shard) for shard in self._shards()]
        parts = [ds.dataset(table) for table in (*self._kept, self._buffered())]
        if files:
            parts.insert(0, ds.dataset(files, schema=shards.make_schema(self._id_type), format="parquet"))
        return ds.dataset(parts)

    def __len__(self) -> int:
        """Number of rows, of all writers."""
        return self.dataset().count_rows()

    def rows(self) -> pa.Table:
        """All rows (step, sample_id, token, target, value): writer by writer, each in order of steps."""
        return self.dataset().to_table()

    def totals(self, target: str | None = None, *, per_token: bool = False) -> pa.Table:
        """Sum over the run: sample_id, target, value (float64, nats), count (times seen), ordered by id.

        Tokens are summed into their sample; with `per_token` they stay apart, and a column token follows the id.
        """
        return sum_values(self.dataset(), ["sample_id", *(["token"] if per_token else []), "target"], target)

    def top(self, k: int, target: str | None = None) -> pa.Table:
        """The k samples of highest total value, highest first; columns as `totals`.

        Raises:
            ValueError: the ledger has several targets and none is named.
        """
        return self._ranked(k, target, "descending")

    def bottom(self, k: int, target: str | None = None) -> pa.Table:
        """The k samples of lowest total value, lowest first; as `top`."""
        return self._ranked(k, target, "ascending")

    def by_source(self, sources: Any, target: str | None = None) -> pa.Table:
        """Sum per source: source, target, value (float64, nats), mean (per time seen), count (times seen).

        Args:
            sources: mapping from sample id to source, or a table with the columns sample_id and source
                (pyarrow, pandas, polars: what `pyarrow.table` takes).
            target: only this target; None keeps them apart.

        Samples that `sources` does not name are summed under the source null, so that nothing goes missing.

        Raises:
            ValueError, TypeError: `sources` lacks a column, has ids of the other kind or names an id twice.
        """
        table = sum_values(self.dataset(), ["source", "target"], target, sources)
        mean = table["value"].to_numpy() / table["count"].to_numpy()
        return table.add_column(3, "mean", [mean])

    def over_time(self, sources: Any = None, *, bins: int = 50, target: str | None = None) -> pa.Table:
        """Sum per stretch of steps: step (first of the stretch), source if given, target, value, count.

        Args:
            sources: as in `by_source`; None sums over all samples.
            bins: at most so many stretches, all of one length.
            target: only this target; None keeps them apart.
        """
        if bins < 1:
            raise ValueError(f"expected bins >= 1, received {bins}")
        rows = self.dataset()
        keys = ["step", "target"] if sources is None else ["step", "source", "target"]
        return sum_values(rows, keys, target, sources, stretches(rows, bins))

    def _ranked(self, k: int, target: str | None, order: str) -> pa.Table:
        import pyarrow.compute as pc

        if k < 0:
            raise ValueError(f"expected k >= 0, received {k}")
        table = self.totals(target)
        names = table["target"].unique().to_pylist()
        if len(names) > 1:
            raise ValueError(f"expected target to be one of {names}, received None")
        options = pc.SelectKOptions(k, [("value", order), ("sample_id", "ascending")])
        return table.take(pc.call_function("select_k_unstable", [table], options))

    # ------------------------------------------------------------------ shards and memory

    @property
    def _prefix(self) -> str:
        return f"rank{self.rank:05d}-step"

    def _own_shards(self) -> list[Path]:
        return [] if self.path is None else sorted(self.path.glob(f"{self._prefix}*.parquet"))

    def _shards(self) -> list[Path]:
        found, self._id_type = shards.inspect(self.path, self._id_type)
        return found

    def _settle(self) -> None:
        """Move the pending values to the buffer, checked."""
        while self._pending:
            step, ids, values, names, per_token = self._pending.pop(0)
            if not isinstance(values, np.ndarray):
                values = values.float().cpu().numpy()
            rows = shards.make_rows(step, ids, values, names, per_token)
            if rows.num_rows:
                self._buffer.append(rows)
                self._buffered_rows += rows.num_rows

    def _buffered(self) -> pa.Table:
        import pyarrow as pa

        return pa.Table.from_batches(self._buffer, shards.make_schema(self._id_type))
