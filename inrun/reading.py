"""What can be asked of a ledger: rows, sums per sample, per source and over time, a dataset filtered by value."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from inrun import shards
from inrun.errors import InRunError
from inrun.queries import Rows, stretches, sum_values, targets_of

if TYPE_CHECKING:
    import pandas
    import polars
    import pyarrow as pa
    from pyarrow.dataset import Dataset

T = TypeVar("T")


class Reader:
    """The queries of a ledger, over the shards of a folder and what its writer still holds in memory.

    Args:
        path: the folder, or None.

    Raises:
        InRunError: the folder holds other Parquet files, another schema version or ids of both kinds.
    """

    def __init__(self, path: str | os.PathLike[str] | None) -> None:
        # Absolute, for a process that changes its folder.
        self.path = None if path is None else Path(path).expanduser().absolute()
        self._id_type: pa.DataType | None = None

    def dataset(self) -> Dataset:
        """All rows as a pyarrow Dataset, for queries of one's own: DuckDB and Polars take it as it is.

        It names the shards of this moment; after a compaction or a resume ask for it again.

        Raises:
            InRunError: the folder does not exist and nothing was appended.
        """
        return self._ask(lambda rows: rows.dataset())

    def __len__(self) -> int:
        """Number of rows, of all writers."""
        return self._ask(lambda rows: rows.dataset().count_rows())

    def rows(self) -> pa.Table:
        """All rows (step, sample_id, token, target, value): writer by writer, each in order of steps.

        What was compacted is in order of samples within its steps.
        """
        return self._ask(lambda rows: rows.dataset().to_table())

    def to_polars(self) -> polars.DataFrame:
        """All rows as a polars DataFrame, as `rows`; needs polars."""
        try:
            import polars  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InRunError("to_polars: needs the package `polars`: pip install polars") from None
        return polars.from_arrow(self.rows())  # pyright: ignore[reportReturnType]

    def to_pandas(self) -> pandas.DataFrame:
        """All rows as a pandas DataFrame, as `rows`, target a categorical; needs pandas."""
        try:
            import pandas  # noqa: F401  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InRunError("to_pandas: needs the package `pandas`: pip install pandas") from None
        return self.rows().to_pandas()

    def targets(self) -> list[str]:
        """The names of the targets, sorted."""
        return self._ask(targets_of)

    def totals(self, target: str | None = None, *, per_token: bool = False) -> pa.Table:
        """Sum over the run: sample_id, target, value (float64, nats), count (times seen), ordered by id.

        Tokens are summed into their sample; with `per_token` they stay apart, and a column token follows the id.
        """
        keys = ["sample_id", *(["token"] if per_token else []), "target"]
        return self._ask(lambda rows: sum_values(rows, keys, target))

    def top(self, k: int, target: str | None = None, *, among: Any = None) -> pa.Table:
        """The k samples of highest total value, highest first; columns as `totals`.

        Args:
            k: how many.
            target: by this target.
            among: only these ids: integers (tensor, array or sequence) or a sequence of str.

        Raises:
            ValueError: the ledger has several targets and none is named.
            TypeError: `among` is no sequence of ids, or has ids of the other kind.
        """
        return self._ranked(k, target, among, "descending")

    def bottom(self, k: int, target: str | None = None, *, among: Any = None) -> pa.Table:
        """The k samples of lowest total value, lowest first; as `top`."""
        return self._ranked(k, target, among, "ascending")

    def by_source(self, sources: Any, target: str | None = None) -> pa.Table:
        """Sum per source: source, target, value (float64, nats), mean (per time seen), count (times seen).

        Args:
            sources: function of a sample id that returns its source (which is asked of every id in the ledger), mapping
                from ids to sources, or a table with the columns sample_id and source (pyarrow, pandas, polars: what
                `pyarrow.table` takes).
            target: only this target; None keeps them apart.

        Samples that `sources` does not name are summed under the source null, so that nothing goes missing.

        Raises:
            ValueError, TypeError: `sources` is none of these, lacks a column, has ids of the other kind or names an id
                twice.
        """
        if sources is None:
            raise TypeError("sources: expected a function, a mapping or a table, received None")
        sources = self._named(sources)
        table = self._ask(lambda rows: sum_values(rows, ["source", "target"], target, sources=sources))
        mean = table["value"].to_numpy() / table["count"].to_numpy()
        return table.add_column(3, "mean", [mean])

    def over_time(self, sources: Any = None, *, bins: int = 50, target: str | None = None) -> pa.Table:
        """Sum per stretch of steps: step (first of the stretch), source if given, target, value, count.

        Args:
            sources: as in `by_source`; None sums over all samples.
            bins: at most so many stretches, all of one length.
            target: only this target; None keeps them apart.
        """
        if shards.as_int(bins, "bins") < 1:
            raise ValueError(f"expected bins >= 1, received {bins}")
        sources = self._named(sources)
        keys = ["step", "target"] if sources is None else ["step", "source", "target"]
        return self._ask(lambda rows: sum_values(rows, keys, target, sources=sources, stretch=stretches(rows, bins)))

    def filter(
        self,
        dataset: Any,
        *,
        column: str,
        unscored: Literal["keep", "drop"],
        at_least: float = 0.0,
        target: str | None = None,
    ) -> Any:
        """The rows of a Hugging Face dataset whose samples have a total value of `at_least` or more.

        Args:
            dataset: a `datasets.Dataset`, `IterableDataset` (streaming: rows are looked at as they pass) or
                `DatasetDict`: anything with their `filter`.
            column: the column with the sample ids.
            unscored: what becomes of rows whose id is not in this ledger.
            at_least: nats; 0 leaves out what raised the validation loss.
            target: by this target.

        Returns:
            What `dataset.filter` returns.

        Raises:
            ValueError: no such target, or the ledger has several and none is named; another `unscored`.
            TypeError: ids of the other kind than the ledger's, when a row is looked at.

        Example:
            kept = ledger.filter(dataset, column="id", unscored="drop")
        """
        import pyarrow.compute as pc

        if unscored not in ("keep", "drop"):
            raise ValueError(f"expected unscored to be 'keep' or 'drop', received {unscored!r}")
        if not hasattr(dataset, "filter"):
            raise TypeError(f"dataset: expected a Hugging Face dataset, received {type(dataset).__name__}")
        self._require_one_target(target)
        totals = self.totals(target)
        good, keep = pc.field("value") >= at_least, unscored == "keep"
        # The one set that is needed: those to leave out where all others stay, else those to keep.
        named = set(totals.filter(~good if keep else good)["sample_id"].to_pylist())
        id_type, known = totals.schema.field("sample_id").type, self._id_type is not None

        def wanted(ids: Any) -> list[bool]:
            found = shards.as_ids(ids)
            if len(found) and known and found.type != id_type:
                raise TypeError(
                    f"column: expected {id_type} ids in {column!r}, as in the ledger, received {found.type}"
                )
            return [(each in named) != keep for each in found.to_pylist()]

        return dataset.filter(wanted, batched=True, input_columns=[column])

    def _ranked(self, k: int, target: str | None, among: Any, order: str) -> pa.Table:
        if shards.as_int(k, "k") < 0:
            raise ValueError(f"expected k >= 0, received {k}")
        self._require_one_target(target)
        return self._ask(lambda rows: sum_values(rows, ["sample_id", "target"], target, among=among, best=(k, order)))

    def _named(self, sources: Any) -> Any:
        """`sources`, a function as the mapping that it is over the ids of this ledger."""
        if not callable(sources):
            return sources
        ids = self.totals()["sample_id"].unique().to_pylist()
        return {each: source for each in ids if (source := sources(each)) is not None}

    def _require_one_target(self, target: str | None) -> None:
        names = self.targets() if target is None else [target]
        if len(names) > 1:
            raise ValueError(f"expected target to be one of {names}, received None")

    def _in_memory(self) -> pa.Table:
        """The rows that are in no shard."""
        return shards.make_schema(self._id_type).empty_table()

    def _still(self) -> AbstractContextManager[Any]:
        """In its block no row goes from memory into a shard."""
        return nullcontext()

    def _ask(self, question: Callable[[Rows], T]) -> T:
        """The answer to a question about the rows, asked again where another process compacted them meanwhile."""
        found: list[Path] | None = None
        while True:
            before = found
            try:
                with self._still():
                    found = shards.listing(self.path)
                    self._id_type = shards.check(found, self._id_type)
                    table = self._in_memory()
                if self.path is not None and not table.num_rows and not self.path.is_dir():
                    what = shards.not_a_folder(self.path)
                    raise InRunError(f"expected a folder of shards, received {self.path}, which {what}")
                with shards.damage_told(found):
                    return question(Rows(found, table))
            except FileNotFoundError:
                if found == before:
                    raise
