"""Sums over the rows of a ledger, streamed with pyarrow: memory goes with the groups, not with the rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pyarrow as pa
    from pyarrow.compute import Expression
    from pyarrow.dataset import Dataset

# Small steps: shards are read no faster than they are summed.
_SCAN: Any = {"batch_size": 1 << 15, "batch_readahead": 1, "fragment_readahead": 1}


def sum_values(
    rows: Dataset, keys: list[str], target: str | None, sources: Any = None, step: Expression | None = None
) -> pa.Table:
    """Sum and count the values of each group.

    It runs in one thread, shard by shard, so the same ledger gives the same bits.

    Args:
        rows: step, sample_id, token, target, value.
        keys: columns that make a group, among step, sample_id, token, target and (with `sources`) source.
        target: only this target.
        sources: mapping from sample id to source, or a table with the columns sample_id and source.
        step: what stands in the place of the step.

    Returns:
        The keys, value (float64), count (int64: a sample's tokens count once, unless they are apart), ordered by the
        keys.

    Raises:
        ValueError: there is no such target, or `sources` lacks a column or names an id twice.
        TypeError: `sources` has ids of another kind.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    from pyarrow import acero
    from pyarrow.acero import Declaration

    columns = {name: pc.field(name) for name in ("step", "sample_id", "token", "target", "value")}
    columns["target"] = columns["target"].cast(pa.string())  # shards differ in their dictionaries
    if step is not None:
        columns["step"] = step
    token = pc.field("token")
    columns["seen"] = pc.scalar(1) if "token" in keys else (token.is_null() | (token == 0)).cast(pa.int64())
    plan = Declaration("scan", acero.ScanNodeOptions(rows, **_SCAN))
    plan = Declaration("project", acero.ProjectNodeOptions(list(columns.values()), list(columns)), [plan])
    if target is not None:
        plan = Declaration("filter", acero.FilterNodeOptions(pc.field("target") == target), [plan])
    if sources is not None:
        table = _source_table(sources, rows.schema.field("sample_id").type)
        outputs = [name for name in columns if name != "sample_id"]
        options = acero.HashJoinNodeOptions("left outer", "sample_id", "sample_id", outputs, ["source"])
        plan = Declaration(
            "hashjoin", options, [plan, Declaration("table_source", acero.TableSourceNodeOptions(table))]
        )
    sums: Any = [("value", "hash_sum", None, "sum"), ("seen", "hash_sum", None, "count")]
    plan = Declaration("aggregate", acero.AggregateNodeOptions(sums, keys), [plan])
    found = plan.to_table(use_threads=False).select([*keys, "sum", "count"])
    if target is not None and not found.num_rows and rows.count_rows():
        raise ValueError(f"expected the name of a target of this ledger, received {target!r}")
    return found.rename_columns([*keys, "value", "count"]).sort_by([(key, "ascending") for key in keys])


def stretches(rows: Dataset, bins: int) -> Expression:
    """The first step of the stretch in which a step lies: at most `bins` stretches, all of one length."""
    import numpy as np
    import pyarrow.compute as pc

    first, last = np.iinfo(np.int64).max, -1
    for batch in rows.to_batches(columns=["step"], **_SCAN):
        if batch.num_rows:
            steps = batch["step"].to_numpy()
            first, last = min(first, int(steps.min())), max(last, int(steps.max()))
    width = max(1, -(-(last - first + 1) // bins))
    return (pc.field("step") - first) / width * width + first


def _source_table(sources: Any, id_type: pa.DataType) -> pa.Table:
    """`sources` as a table of sample_id (of the ledger's type) and source."""
    import pyarrow as pa

    if isinstance(sources, Mapping):
        sources = {"sample_id": list(sources.keys()), "source": list(sources.values())}
    table = pa.table(sources)
    if not {"sample_id", "source"} <= set(table.column_names):
        raise ValueError(f"expected sources with columns sample_id and source, received {table.column_names}")
    ids, source = table["sample_id"], table["source"]
    if len(ids) and pa.types.is_integer(ids.type) != pa.types.is_integer(id_type):
        raise TypeError(f"expected sources to name samples by {id_type}, as the ledger, received {ids.type}")
    if pa.types.is_dictionary(source.type):
        source = source.cast(source.type.value_type)
    elif pa.types.is_null(source.type):
        source = source.cast(pa.string())
    twice = [each["values"] for each in ids.value_counts().to_pylist() if each["counts"] > 1]
    if twice:
        raise ValueError(f"expected sources to name each id once, received {len(twice)} twice: {twice[:10]}")
    return pa.table({"sample_id": ids.cast(id_type), "source": source})
