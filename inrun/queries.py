"""Sums over the rows of a ledger: memory goes with the groups, not with the rows.

DuckDB, where it is installed, is as fast as the same sums streamed with pyarrow, takes less memory, and moves to disk
what exceeds its limit. Both add float64 numbers in one thread, so the same ledger gives the same bits.
"""

from __future__ import annotations

import atexit
import functools
import glob
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from inrun import shards

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.dataset import Dataset

# Small steps: shards are read no faster than they are summed.
_SCAN: Any = {"batch_size": 1 << 15, "batch_readahead": 1, "fragment_readahead": 1}
_MEMORY = "2GB"  # DuckDB's; beyond it goes to disk
_PART = 1 << 24  # rows; sorted shards are summed in so large ranges of ids, whose sums fit into that memory


@dataclass(frozen=True)
class Rows:
    """The rows of a ledger: those of the shards, and a table (with the schema of all) of what is in none."""

    files: list[Path]
    table: pa.Table

    def dataset(self) -> Dataset:
        import pyarrow.dataset as ds

        parts = [ds.dataset(self.table)]
        if self.files:
            names = [str(file) for file in self.files]
            parts.insert(0, ds.dataset(names, schema=self.table.schema, format="parquet"))
        return ds.dataset(parts)


def sum_values(
    rows: Rows,
    keys: list[str],
    target: str | None,
    *,
    sources: Any = None,
    stretch: tuple[int, int] | None = None,
    among: Any = None,
    best: tuple[int, str] | None = None,
) -> pa.Table:
    """Sum and count the values of each group.

    Args:
        rows: step, sample_id, token, target, value.
        keys: columns that make a group, among step, sample_id, token, target and (with `sources`) source.
        target: only this target.
        sources: mapping from sample id to source, or a table with the columns sample_id and source.
        stretch: (first, width): the first step of its stretch stands in the place of the step.
        among: only these sample ids.
        best: (k, "ascending" or "descending"): only the first k by value, then by sample_id.

    Returns:
        The keys, value (float64), count (int64: a sample's tokens count once, unless they are apart), ordered by the
        keys, or as `best` says.

    Raises:
        ValueError: there is no such target, or `sources` lacks a column or names an id twice.
        TypeError: `sources` or `among` is of another kind than it should be, or has ids of another.
    """
    import pyarrow as pa

    id_type = rows.table.schema.field("sample_id").type
    if not rows.files and not rows.table.num_rows:  # where ids of either kind may be asked for
        sources, among = None if sources is None else {}, None if among is None else []
    if sources is not None:
        sources = _source_table(sources, id_type)
    if among is not None:
        try:
            among = among if isinstance(among, pa.Array | pa.ChunkedArray) else shards.as_ids(among)
        except TypeError as error:
            raise TypeError(f"among: {error}") from None
        among = pa.table({"sample_id": _ids(among, id_type, "among").unique()})
    if best is not None:
        order = [("value", best[1]), ("sample_id", "ascending")]
    else:
        order = [(key, "ascending") for key in keys]
    try:
        import duckdb  # noqa: F401
    except ImportError:
        engine = _stream
    else:
        engine = _duckdb
    found = engine(rows, keys, target, sources, stretch, among, order, best[0] if best else None)
    if target is not None and not found.num_rows and (names := targets_of(rows)) and target not in names:
        raise ValueError(f"expected target to be one of {names}, received {target!r}")
    return found


def targets_of(rows: Rows) -> list[str]:
    """The names of the targets, sorted."""
    names: set[str] = set()
    for batch in rows.dataset().to_batches(columns=["target"], batch_readahead=1, fragment_readahead=1):
        names.update(batch["target"].unique().to_pylist())
    return sorted(names)


def stretches(rows: Rows, bins: int) -> tuple[int, int]:
    """First step, and the length of at most `bins` stretches that hold all steps."""
    import pyarrow.compute as pc

    ends = [*(shards.steps_of(rows.files) or ()), *pc.call_function("min_max", [rows.table["step"]]).as_py().values()]
    steps = [step for step in ends if step is not None]
    return (min(steps), -(-(max(steps) - min(steps) + 1) // bins)) if steps else (0, 1)


def _duckdb(rows: Rows, keys, target, sources, stretch, among, order, k) -> pa.Table:
    import duckdb
    import pyarrow as pa

    schema = rows.table.schema
    names = pa.schema([field.with_type(pa.string()) if field.name == "target" else field for field in schema])
    columns = {key: f'"{key}"' for key in keys}
    if stretch is not None:
        columns["step"] = f"(step - {stretch[0]}) // {stretch[1]} * {stretch[1]} + {stretch[0]}"
    seen = "1" if "token" in keys else "(token is null or token = 0)::int"
    selected = ", ".join(f"{column} as {key}" for key, column in columns.items())
    options = "union_by_name = true, hive_partitioning = false"  # a folder `step=9` is only a folder's name
    read = f"select * from read_parquet($files, {options}) union all by name" if rows.files else ""
    ordered = ", ".join(f"{name} {direction.removesuffix('ending')}" for name, direction in order)
    limit = "" if k is None else f"limit {k}"

    def part(low: Any, high: Any) -> pa.Table:
        given = {"files": [glob.escape(str(file)) for file in rows.files]} if rows.files else {}
        named = {"low": low, "high": high, "target": target}
        given |= {name: value for name, value in named.items() if value is not None}
        query = f"""
            select {selected}, sum("value"::double) as "value", sum({seen})::bigint as "count"
            from ({read} select * from memory)
            {"semi join among using (sample_id)" if among is not None else ""}
            {"left join sources using (sample_id)" if sources is not None else ""}
            where true {"and target = $target" if target is not None else ""}
            {"and sample_id >= $low" if low is not None else ""} {"and sample_id < $high" if high is not None else ""}
            group by {", ".join(columns.values())} order by {ordered} {limit}
        """
        return cursor.sql(query, params=given).to_arrow_table()

    with _connection()[0].cursor() as cursor:
        for name, table in (("memory", rows.table.cast(names)), ("sources", sources), ("among", among)):
            if table is not None:
                cursor.register(name, table)
        try:
            ranges = shards.id_ranges(rows.files, _PART) if keys[0] == "sample_id" else [(None, None)]
            parts = [part(low, high) for low, high in ranges]
        except duckdb.Error as error:
            if type(error) not in (duckdb.Error, duckdb.IOException):  # of files, damaged ones are of the first
                raise
            missing = [file for file in rows.files if not file.exists()]
            raise (FileNotFoundError(str(missing[0])) if missing else OSError(str(error))) from error
    found = pa.concat_tables(parts)  # in order of ids, unless the best are asked for
    return found if len(parts) == 1 or k is None else found.sort_by(order).slice(0, k)


@functools.cache
def _connection() -> Any:
    """A database without tables, and the folder for what exceeds its memory, gone with the process: 50 ms to start."""
    import duckdb

    spill = tempfile.TemporaryDirectory(prefix="inrun-")
    config: Any = {"threads": 1, "memory_limit": _MEMORY, "temp_directory": spill.name}
    atexit.register(_connection.cache_clear)  # before modules go: duckdb's says that it was leaked, line by line
    return duckdb.connect(config=config), spill


def _stream(rows: Rows, keys, target, sources, stretch, among, order, k) -> pa.Table:
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import acero
    from pyarrow.acero import Declaration

    columns = {name: pc.field(name) for name in ("step", "sample_id", "token", "target", "value")}
    columns["target"] = columns["target"].cast(pa.string())  # shards differ in their dictionaries
    if stretch is not None:
        columns["step"] = (pc.field("step") - stretch[0]) / stretch[1] * stretch[1] + stretch[0]
    token = pc.field("token")
    columns["seen"] = pc.scalar(1) if "token" in keys else (token.is_null() | (token == 0)).cast(pa.int64())
    plan = Declaration("scan", acero.ScanNodeOptions(rows.dataset(), **_SCAN))
    plan = Declaration("project", acero.ProjectNodeOptions(list(columns.values()), list(columns)), [plan])
    if target is not None:
        plan = Declaration("filter", acero.FilterNodeOptions(pc.field("target") == target), [plan])
    if among is not None:
        plan = Declaration("filter", acero.FilterNodeOptions(pc.field("sample_id").isin(among["sample_id"])), [plan])
    if sources is not None:
        outputs = [name for name in columns if name != "sample_id"]
        options = acero.HashJoinNodeOptions("left outer", "sample_id", "sample_id", outputs, ["source"])
        plan = Declaration(
            "hashjoin", options, [plan, Declaration("table_source", acero.TableSourceNodeOptions(sources))]
        )
    sums: Any = [("value", "hash_sum", None, "sum"), ("seen", "hash_sum", None, "count")]
    plan = Declaration("aggregate", acero.AggregateNodeOptions(sums, keys), [plan])
    found = plan.to_table(use_threads=False).select([*keys, "sum", "count"]).rename_columns([*keys, "value", "count"])
    if k is None:
        return found.sort_by(order)
    return found.take(pc.call_function("select_k_unstable", [found], pc.SelectKOptions(k, order)))


def _source_table(sources: Any, id_type: pa.DataType) -> pa.Table:
    """`sources` as a table of sample_id (of the ledger's type) and source."""
    import pyarrow as pa

    if isinstance(sources, Mapping):
        sources = {"sample_id": list(sources.keys()), "source": list(sources.values())}
    try:
        table = pa.table(sources)
    except (TypeError, ValueError) as error:  # pyarrow's own are of these
        raise TypeError(
            "expected sources to be a function of a sample id, a mapping from ids to sources, both of one type, or a "
            f"table of sample_id and source, received {type(sources).__name__}: {error}"
        ) from None
    if not {"sample_id", "source"} <= set(table.column_names):
        raise ValueError(f"expected sources with columns sample_id and source, received {table.column_names}")
    ids, source = table["sample_id"], table["source"]
    ids = _ids(ids, id_type, "sources")
    if pa.types.is_dictionary(source.type):
        source = source.cast(source.type.value_type)
    if pa.types.is_null(source.type) or pa.types.is_string_view(source.type):  # polars' strings, which are not joined
        source = source.cast(pa.string())
    if len(ids.unique()) < len(ids):
        twice = [each["values"] for each in ids.value_counts().to_pylist() if each["counts"] > 1]
        raise ValueError(f"expected sources to name each id once, received {len(twice)} twice: {twice[:10]}")
    return pa.table({"sample_id": ids, "source": source})


def _ids(ids: Any, id_type: pa.DataType, name: str) -> Any:
    """Ids (an array) in the ledger's type."""
    if len(ids) and not shards.of_kind(ids.type, id_type):
        raise TypeError(f"expected {name} to name samples by {id_type}, as the ledger, received {ids.type}")
    return ids.cast(id_type)
