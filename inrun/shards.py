"""The rows of a ledger and their files: Parquet shards that appear whole and say what they hold.

A shard is named ``rank00000-step000000000000.parquet`` after its writer's rank and its first step. It is
written under a name that does not end in ``.parquet``, fsynced and renamed. Its schema metadata holds, under
the key ``inrun``, a JSON object: schema version, sign, unit, rank, versions, and what the run adds.

Compaction makes ``rank00000-step000000000000-000000000999.parquet`` of a writer's shards of these steps. Whoever
sees it takes it in their place (`listing`), so what a kill left of them counts for nothing.
"""

from __future__ import annotations

import contextlib
import json
import operator
import os
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from inrun.errors import InRunError
from inrun_kernels.tuning import installed

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = 2
READABLE = (1, 2)  # 1 has no column `token`, which then reads as null
_KEY = "inrun"
_GROUP = 1 << 17  # rows of a row group: small, as whoever looks for some ids of a sorted shard reads them whole
_NAME = re.compile(r"(rank\d+)-step(\d+)(?:-(\d+))?")


def make_schema(id_type: pa.DataType | None) -> pa.Schema:
    """The columns of a shard; `id_type` is int64 (also while no id is known) or string."""
    import pyarrow as pa

    target = pa.dictionary(pa.int32(), pa.string())
    columns = {"step": pa.int64(), "sample_id": id_type or pa.int64(), "token": pa.int32(), "target": target}
    return pa.schema({**columns, "value": pa.float32()})


def as_int(value: Any, name: str) -> int:
    """`value` as an int, if it is an integer of any kind that 64 bits hold."""
    try:
        if isinstance(value, bool | np.bool_):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"expected {name} to be an integer, received {value!r}") from None
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"expected {name} to be an integer of 64 bits, received {number}")
    return number


def as_ids(ids: Any) -> pa.Array:
    """Sample ids as an int64 or string array with memory of its own."""
    import pyarrow as pa

    if hasattr(ids, "detach"):
        ids = ids.detach().cpu().numpy()
    if hasattr(ids, "to_pylist"):  # pyarrow's
        ids = ids.to_pylist()
    if isinstance(ids, np.ndarray):
        if ids.ndim != 1:
            raise ValueError(f"expected ids of shape [B], received shape {ids.shape}")
        if ids.dtype.kind in "iu" and (not ids.size or ids.max() < 2**63):
            return pa.array(ids.copy()).cast(pa.int64())
        ids = ids.tolist()
    if isinstance(ids, str | bytes) or not isinstance(ids, Iterable):
        raise TypeError(f"expected a sequence of ids, received the single {ids!r}")
    ids = list(ids)
    if ids and all(isinstance(each, str) for each in ids):
        try:
            return pa.array(ids, pa.string())
        except UnicodeEncodeError as error:
            raise ValueError(f"expected ids that UTF-8 can hold, received {error.object!r}") from error
    if ids and isinstance(ids[0], str):
        other = next(each for each in ids if not isinstance(each, str))
        raise TypeError(f"expected all ids to be str, as the first, received {other!r} among them")
    return pa.array([as_int(each, "each id (where not all are str)") for each in ids], pa.int64())


def of_kind(found: pa.DataType, id_type: pa.DataType) -> bool:
    """Whether ids of one type are of the other's kind, integers or strings, of any width, categories too."""
    import pyarrow as pa

    found = found.value_type if pa.types.is_dictionary(found) else found
    if pa.types.is_integer(id_type):
        return pa.types.is_integer(found)
    return found in (pa.string(), pa.large_string(), pa.string_view())


def make_rows(
    step: int, ids: pa.Array, values: np.ndarray, targets: tuple[str, ...], per_token: bool = False
) -> pa.RecordBatch:
    """The rows of one step, target by target.

    Args:
        step: of all rows.
        ids: [B], from `as_ids`.
        values: float32 [B] or [B, M]; [B, T] or [B, T, M] per token.
        targets: the M names.
        per_token: a row for each token.

    Raises:
        InRunError: values that are not finite, with the ids of their samples.
    """
    import pyarrow as pa

    tokens = values.shape[1] if per_token else 1
    values = values.reshape(len(ids), tokens, len(targets))
    finite = np.isfinite(values).all(axis=(1, 2))
    if not finite.all():
        bad = ids.filter(pa.array(~finite)).to_pylist()
        raise InRunError(
            f"step {step}: expected finite values, received NaN or infinity for {len(bad)} of {len(ids)} "
            f"samples, ids {bad[:10]}; the step was not recorded"
        )
    codes = np.repeat(np.arange(len(targets), dtype=np.int32), len(ids) * tokens)
    places = np.tile(np.arange(tokens, dtype=np.int32), len(ids) * len(targets))
    ids = ids.take(pa.array(np.repeat(np.arange(len(ids)), tokens))) if per_token else ids
    columns = [
        pa.array(np.full(values.size, step, dtype=np.int64)),
        pa.concat_arrays([ids] * len(targets)),
        pa.array(places) if per_token else pa.nulls(values.size, pa.int32()),
        pa.DictionaryArray.from_arrays(pa.array(codes), pa.array(targets, pa.string())),
        pa.array(np.moveaxis(values, 2, 0).reshape(-1)),
    ]
    return pa.record_batch(columns, schema=make_schema(ids.type))


def describe(table: pa.Table, rank: int, metadata: dict[str, Any]) -> pa.Table:
    """`table` with the metadata of its shard; what is not JSON is written as str: no row is lost to it."""
    versions = {name: installed(name) for name in ("inrun", "torch", "triton", "numpy", "pyarrow")}
    facts = {
        "schema": SCHEMA_VERSION,
        "sign": "value > 0: the sample lowered the validation loss",
        "unit": "nats",
        "rank": rank,
        "versions": {name: found for name, found in versions.items() if found},
    }
    told = {str(name): _plain(fact) for name, fact in metadata.items()}
    return table.replace_schema_metadata({_KEY: json.dumps({**told, **facts}, default=str)})


def _plain(fact: Any) -> Any:
    """`fact`, or its str where it is not JSON by its keys or holds itself."""
    try:
        json.dumps(fact, default=str)
    except (TypeError, ValueError):
        return str(fact)
    return fact


def write(table: pa.Table, shard: Path) -> None:
    """Put `table` in the place of `shard` at once: readers see the old file or the new one, whole."""
    import pyarrow.parquet as pq

    columns: Any = ["step", "token", "target"]  # the other two hardly repeat within a shard
    encoding: Any = {"sample_id": "DELTA_BINARY_PACKED" if table["sample_id"].type == "int64" else "DELTA_BYTE_ARRAY"}

    def write_table(file: IO[bytes]) -> None:
        pq.write_table(
            table, file, compression="zstd", use_dictionary=columns, column_encoding=encoding, row_group_size=_GROUP
        )

    replace(shard, write_table)


def replace(path: Path, write: Callable[[IO[bytes]], Any]) -> None:
    """Write under a temporary name, sync and rename: a crash leaves the old content or the new."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def ranks_from(folder: Path, least: int) -> list[int]:
    """The ranks of this number or a higher one that have written into the folder."""
    found = {int(match[1].removeprefix("rank")) for file in folder.iterdir() if (match := _NAME.match(file.name))}
    return sorted(rank for rank in found if rank >= least)


def remove_leftovers(folder: Path, prefix: str) -> None:
    """Remove what a killed writer, whose shards begin with `prefix`, had not renamed yet."""
    for leftover in folder.glob(f"{prefix}*.tmp"):
        leftover.unlink()


def sync(folder: Path) -> None:
    """Make the renames and removals in `folder` outlive a crash of the machine."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def span(shard: Path) -> tuple[str, int, int]:
    """The writer of a shard, its first step, and the last step that it stands for in its writer's name.

    A shard as it was flushed names its first step alone.
    """
    match = _NAME.fullmatch(shard.stem)
    if match is None:  # not a writer's: `check` finds out what it is
        return shard.name, 0, 0
    writer, first, last = match.groups()
    return writer, int(first), int(last or first)


def listing(folder: Path | None, writer: str = "") -> list[Path]:
    """The shards that are the ledger (or the writer's part), by writer and step, as they were at one moment."""
    found, before = sorted(folder.glob(f"{writer}*.parquet")) if folder else [], None
    while folder and found != before:  # a listing is not made at one moment; two that agree are as good
        found, before = sorted(folder.glob(f"{writer}*.parquet")), found
    kept: list[Path] = []
    for shard in sorted(found, key=lambda each: (span(each)[:2], -span(each)[2], each.name)):
        name, _, last = span(shard)
        if not kept or span(kept[-1])[0] != name or last > span(kept[-1])[2]:
            kept.append(shard)
    return kept


@contextlib.contextmanager
def damage_told(found: list[Path]) -> Iterator[None]:
    """Where reading these shards fails in the block, raise `InRunError` with the one that is damaged."""
    import pyarrow as pa

    try:
        yield
    except FileNotFoundError:
        raise
    except (OSError, pa.ArrowException) as error:
        for shard in found:
            if not _is_whole(shard):
                raise InRunError(
                    f"expected shards that can be read, received {shard}, which is damaged: restore it, or move it "
                    "away (the values of its steps are then missing)"
                ) from error
        raise


def _is_whole(shard: Path) -> bool:
    """Whether all rows of a shard can be read."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(shard) as file:
            for _ in file.iter_batches():
                pass
    except pa.ArrowException:
        return False
    except OSError as error:
        return error.errno is not None  # too many open files, say, or another process has compacted it
    return True


def not_a_folder(path: Path) -> str:
    """What a path is that is no folder, in words."""
    return "is a file" if path.exists() else "does not exist"


def check(found: list[Path], id_type: pa.DataType | None) -> pa.DataType | None:
    """The type of the ids in all of these shards.

    Raises:
        InRunError: a file is not a shard, of a schema version we do not know, or with ids not of `id_type`.
        FileNotFoundError: another process compacted or dropped a shard after it was listed.
    """
    for shard in found:
        schema = _read_schema(shard)
        if (version := _metadata(schema).get("schema")) not in READABLE:
            known = " or ".join(map(str, READABLE))
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            raise InRunError(
                f"expected a shard of schema version {known}, received {version} in {shard}: "
                + ("a newer inrun wrote it; upgrade with pip install -U inrun" if newer else "no ledger wrote it")
            )
        if _NAME.fullmatch(shard.stem) is None:  # in no writer's order, and perhaps a copy whose rows would count twice
            raise InRunError(
                f"expected a shard named rank00000-step000000000000.parquet by its writer, received {shard}"
            )
        type_here = schema.field("sample_id").type
        if id_type not in (None, type_here):
            raise InRunError(f"expected ids of type {id_type} in every shard, received {type_here} in {shard}")
        id_type = type_here
    return id_type


def read_metadata(shard: Path) -> dict[str, Any]:
    """The JSON object that `describe` put there."""
    return _metadata(_read_schema(shard))


def steps_of(found: list[Path]) -> tuple[int, int] | None:
    """First and last step of these shards, from the statistics in their footers; None where there is no row."""
    import pyarrow.parquet as pq

    steps: list[int] = []
    for footer in map(pq.read_metadata, found):
        for group in map(footer.row_group, range(footer.num_row_groups)):
            statistics = group.column(0).statistics  # `step`
            steps += [statistics.min, statistics.max]
    return (min(steps), max(steps)) if steps else None


def id_ranges(found: list[Path], rows: int) -> list[tuple[Any, Any]]:
    """Ranges (low, high) of ids, high not in it, that hold about so many rows each and all together; None: no bound.

    From the footers; one range of all where more than `rows` rows are in shards that are not sorted.
    """
    import pyarrow.parquet as pq

    groups, loose = [], 0
    for shard in found:
        footer = pq.read_metadata(shard)
        match = _NAME.fullmatch(shard.stem)
        if match is None or match[3] is None:
            loose += footer.num_rows
            continue
        for group in map(footer.row_group, range(footer.num_row_groups)):
            ids = group.column(1).statistics  # of `sample_id`; none of strings of 4 KB and more
            if ids.has_min_max:
                groups.append((ids.min, group.num_rows))
            else:
                loose += group.num_rows
    groups.sort()
    bounds, before = [None], 0
    for least, count in groups if loose <= rows else []:
        if before >= rows * len(bounds) and least not in (bounds[-1], groups[0][0]):
            bounds.append(least)
        before += count
    return list(pairwise([*bounds, None]))


def compact(folder: Path, rows: int, done: Callable[[int], object]) -> None:
    """Make of every writer's shards few large ones of at most `rows` rows, sorted by sample.

    Sorted ids take less space, and a large ledger's are summed range by range, in memory (`id_ranges`).

    Args:
        folder: of the shards.
        rows: larger shards stay alone. A group of shards is sorted in memory.
        done: told the rows of each group when it is finished.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    groups: list[tuple[str, int, list[Path]]] = []  # writer, rows, shards
    for shard in listing(folder):
        writer, count = span(shard)[0], pq.read_metadata(shard).num_rows
        if not groups or groups[-1][0] != writer or groups[-1][1] + count > rows:
            groups.append((writer, 0, []))
        _, before, members = groups.pop()
        groups.append((writer, before + count, [*members, shard]))
    remove_superseded(folder)
    for writer, count, members in groups:
        if len(members) > 1 or _NAME.fullmatch(members[0].stem)[3] is None:  # pyright: ignore[reportOptionalSubscript]
            facts, (first, last) = read_metadata(members[-1]), steps_of(members) or (0, 0)
            schema = make_schema(pq.read_schema(members[0]).field("sample_id").type)
            parts = [pq.read_table(member, schema=schema) for member in members]
            table = pa.concat_tables(parts).unify_dictionaries().combine_chunks().sort_by("sample_id")
            merged = folder / f"{writer}-step{first:012d}-{last:012d}.parquet"
            write(describe(table, int(writer.removeprefix("rank")), facts), merged)
            remove_superseded(folder, writer)
        done(count)


def remove_superseded(folder: Path, writer: str = "") -> None:
    """Remove the shards (of one writer) for which a compacted one stands."""
    kept = set(listing(folder, writer))
    for shard in set(folder.glob(f"{writer}*.parquet")) - kept:
        shard.unlink()
    sync(folder)


def _read_schema(shard: Path) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.read_schema(shard)
    except pa.ArrowInvalid as error:
        raise InRunError(f"expected a ledger shard, received {shard}, which is not Parquet: {error}") from error


def _metadata(schema: pa.Schema) -> dict[str, Any]:
    return json.loads((schema.metadata or {}).get(_KEY.encode(), b"{}"))
