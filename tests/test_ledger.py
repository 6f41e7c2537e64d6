"""The ledger: what was appended comes back, whole and once, whatever is killed, resumed or merged."""

import copy
import json
import os
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from inrun import InRunError, Ledger, queries, shards
from inrun.ledger import _SETTLE_STEPS
from inrun.reading import Reader

ROOT = Path(__file__).parents[1]


def fill(ledger: Ledger, steps: range, batch: int = 4, offset: int = 0) -> None:
    """Step s gives the samples offset.. the values s + id / 16, exact in float32."""
    for step in steps:
        ids = np.arange(offset, offset + batch)
        ledger.append(step, ids, step + ids / 16)


def steps_of(ledger: Ledger) -> list[int]:
    return sorted(ledger.rows()["step"].to_pylist())


def listing(folder: Path) -> dict[str, tuple[int, int]]:
    return {each.name: (each.stat().st_mtime_ns, each.stat().st_size) for each in folder.iterdir()}


def sums_by(rows: list[tuple], *functions) -> dict[tuple, tuple[float, int]]:
    """Sum of (step, id, token, target, value) rows by what the functions make of step, id and target, and how many
    samples they are of: tokens after a sample's first count for none."""
    sums: dict[tuple, list] = defaultdict(lambda: [0.0, 0])
    for step, sample, token, target, value in rows:
        columns = (step, sample, target)
        group = tuple(make(column) for make, column in zip(functions, columns, strict=True) if make)
        sums[group][0] += value
        sums[group][1] += not token
    return {group: tuple(found) for group, found in sums.items()}


def as_sums(table: pa.Table, *keys: str) -> dict[tuple, tuple[float, int]]:
    return {tuple(row[key] for key in keys): (row["value"], row["count"]) for row in table.to_pylist()}


def same(column):
    return column


@pytest.fixture(params=["duckdb", "pyarrow"])
def engine(request, monkeypatch):
    """What sums: DuckDB, or pyarrow as where DuckDB is not installed."""
    if request.param == "duckdb":
        pytest.importorskip("duckdb")
    else:
        monkeypatch.setitem(sys.modules, "duckdb", None)


# A run is a list of steps: the samples of each, its tokens per sample (None: scored whole), and whether it was flushed.
ids_of_a_step = st.lists(st.integers(0, 5), max_size=5)
runs = st.lists(st.tuples(ids_of_a_step, st.sampled_from([None, 1, 3]), st.booleans()), min_size=1, max_size=12)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(run=runs, targets=st.integers(1, 3), strings=st.booleans(), disk=st.booleans(), bins=st.integers(1, 15))
def test_queries_equal_plain_python(tmp_path_factory, monkeypatch, engine, run, targets, strings, disk, bins):
    monkeypatch.setattr(shards, "_GROUP", 2)
    monkeypatch.setattr(queries, "_PART", 5)  # sorted shards are summed in many ranges of ids
    # A folder's name is no column, as it may be to readers of Parquet.
    folder = tmp_path_factory.mktemp("ledger") / "step=7" / "target=other" / "value=3"
    folder.mkdir(parents=True)
    ledger = Ledger(folder if disk else None)
    names = [f"target {index}" for index in range(targets)]
    rows = []
    for step, (numbers, tokens, flush) in enumerate(run):
        ids = [f"sample {number}" for number in numbers] if strings else numbers
        values = np.arange(len(ids) * (tokens or 1) * targets, dtype=np.float32).reshape(-1, tokens or 1, targets)
        values = values / 8 - step
        whole = values if tokens else values[:, 0]
        ledger.append(step, ids, torch.from_numpy(whole), names, per_token=tokens is not None)
        rows += [
            (step, ids[b], t if tokens else None, names[m], float(values[b, t, m]))
            for m in range(targets)
            for b in range(len(ids))
            for t in range(tokens or 1)
        ]
        if flush:
            ledger.flush()
    assert [tuple(row.values()) for row in ledger.rows().to_pylist()] == rows
    assert len(ledger) == len(rows)
    if bins % 2:
        ledger.compact(bins)
        assert sorted(map(repr, rows)) == sorted(repr(tuple(row.values())) for row in ledger.rows().to_pylist())

    totals = ledger.totals()
    assert totals.column_names == ["sample_id", "target", "value", "count"]
    assert as_sums(totals, "sample_id", "target") == sums_by(rows, None, same, same)
    assert totals["sample_id"].to_pylist() == sorted(totals["sample_id"].to_pylist())
    apart = defaultdict(list)
    for _, sample, token, target, value in rows:
        apart[sample, token, target].append(value)
    by_token = as_sums(ledger.totals(per_token=True), "sample_id", "token", "target")
    assert by_token == {group: (sum(values), len(values)) for group, values in apart.items()}

    sources = {each: ("even", "odd")[place % 2] for place, each in enumerate(sorted({row[1] for row in rows})[1:])}
    by_source = ledger.by_source(sources)
    assert as_sums(by_source, "source", "target") == sums_by(rows, None, sources.get, same)
    assert all(row["mean"] == row["value"] / row["count"] for row in by_source.to_pylist())
    if sources:
        assert by_source == ledger.by_source(pa.table([list(sources), list(sources.values())], ["sample_id", "source"]))
        assert by_source == ledger.by_source(sources.get) == ledger.by_source(lambda each: sources.get(each))
        assert ledger.over_time(sources.get) == ledger.over_time(sources)

    first, last = (rows[0][0], rows[-1][0]) if rows else (0, 0)
    width = -(-(last - first + 1) // bins)

    def stretch(step):
        return (step - first) // width * width + first

    assert as_sums(ledger.over_time(bins=bins), "step", "target") == sums_by(rows, stretch, None, same)
    over_time = as_sums(ledger.over_time(sources, bins=bins), "step", "source", "target")
    assert over_time == sums_by(rows, stretch, sources.get, same)

    for name in names if rows else []:
        sums = {
            sample: value for (sample, at), (value, _) in as_sums(totals, "sample_id", "target").items() if at == name
        }
        order = sorted(sums, key=lambda sample: (-sums[sample], sample))
        assert ledger.top(3, name)["sample_id"].to_pylist() == order[:3]
        assert ledger.bottom(100, name)["value"].to_pylist() == sorted(sums.values())
        among = order[::2]
        assert (
            ledger.bottom(3, name, among=among)["sample_id"].to_pylist()
            == sorted(among, key=lambda i: (sums[i], i))[:3]
        )


@settings(max_examples=40, deadline=None)
@given(flushed=st.lists(st.booleans(), min_size=1, max_size=12), at=st.integers(0, 14), disk=st.booleans())
def test_resume_leaves_exactly_the_steps_before(tmp_path_factory, flushed, at, disk):
    path = tmp_path_factory.mktemp("ledger") if disk else None
    ledger = Ledger(path, flush_rows=10**6)
    for step, flush in enumerate(flushed):
        fill(ledger, range(step, step + 1), batch=1)
        if flush:
            ledger.flush()
    left = [step for step in range(len(flushed)) if step < at]
    for _ in range(2):
        ledger.resume(at)
        assert steps_of(ledger) == left and ledger.last_step == (left[-1] if left else None)
    fill(ledger, range(at, at + 2), batch=1)
    ledger.close()
    assert steps_of(ledger) == [*left, at, at + 1]
    if path is not None:
        assert steps_of(Ledger(path)) == steps_of(ledger)
        assert pq.read_table(sorted(path.iterdir()))["step"].to_pylist() == steps_of(ledger)


def test_resume_says_which_steps_were_never_written(tmp_path):
    """As of a run that was killed with rows that no flush had written before its checkpoint."""
    with pytest.warns(UserWarning, match=r"it has no step and the run goes on at 4; .*flush\(\)"):
        Ledger(tmp_path).resume(4)
    with Ledger(tmp_path) as ledger:
        for step in range(3):
            ledger.append(step, [1, 2], torch.zeros(2))
    with pytest.warns(UserWarning, match="it ends at step 2 and the run goes on at 5"):
        Ledger(tmp_path).resume(5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Ledger(tmp_path).resume(3)
        Ledger(tmp_path, rank=1).resume(3)  # of whose samples none were in the last step
        Ledger(tmp_path).resume(2)
        Ledger(tmp_path).resume(0)
        Ledger().resume(7)


def test_resume_replaces_only_the_straddling_shard(tmp_path):
    with Ledger(tmp_path, flush_rows=12) as ledger:
        fill(ledger, range(10))  # shards of 3 steps: 0, 3, 6 and 9
    before = listing(tmp_path)
    assert len(before) == 4
    Ledger(tmp_path).resume(5)
    after = listing(tmp_path)
    assert list(sorted(after)) == sorted(before)[:2]
    first, straddling = sorted(after)
    assert after[first] == before[first] and after[straddling] != before[straddling]
    assert steps_of(Ledger(tmp_path)) == [step for step in range(5) for _ in range(4)]
    Ledger(tmp_path).resume(5)
    assert listing(tmp_path) == after


def killed_at(moment, monkeypatch):
    """What runs an action and kills it at that change of a file, counted over all it runs, or else at the end."""

    class Killed(BaseException):
        pass

    calls, unlink, replace = iter(range(100)), Path.unlink, os.replace

    def counted(change):
        def step(*arguments, **options):
            if next(calls) == moment:
                raise Killed
            return change(*arguments, **options)

        return step

    def run(act):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(Path, "unlink", counted(unlink))
            patch.setattr(os, "replace", counted(replace))
            act()
            raise Killed

    return run


def test_resume_stopped_at_any_moment_leaves_a_prefix(tmp_path, monkeypatch):
    for moment in range(8):
        path = tmp_path / str(moment)
        with Ledger(path, flush_rows=12) as ledger:
            fill(ledger, range(20))  # shards of 3 steps
        killed_at(moment, monkeypatch)(lambda ledger=ledger: ledger.resume(4))  # drops five shards, replaces one
        left = Ledger(path)
        found = set(steps_of(left))
        assert found == set(range(len(found))) and len(found) >= 4 and left.last_step == max(found)
        left.resume(4)
        assert set(steps_of(Ledger(path))) == set(range(4))


def test_several_writers_are_one_ledger(tmp_path):
    for rank in range(3):
        with Ledger(tmp_path, rank=rank, flush_rows=8) as ledger:
            fill(ledger, range(5), offset=4 * rank)
    assert len(Ledger(tmp_path)) == 60
    assert Ledger(tmp_path).totals()["sample_id"].to_pylist() == list(range(12))
    with Ledger(tmp_path, rank=1) as ledger:
        ledger.resume(2)
        assert ledger.last_step == 1
        fill(ledger, range(2, 5), offset=4)
    totals = Ledger(tmp_path).totals()
    assert totals["count"].to_pylist() == [5] * 12
    assert totals["value"].to_pylist() == [10 + 5 * sample / 16 for sample in range(12)]


def test_fewer_writers_go_on_and_lose_and_double_nothing(tmp_path, monkeypatch):
    """Three writers come to step 9 with a checkpoint of step 4; two of them go on, killed at any moment."""

    def write(path, ranks, steps):
        for rank in range(ranks):
            ledger = Ledger(path, rank=rank, flush_rows=12)
            fill(ledger, steps, offset=4 * rank)
            ledger.close()

    clean = tmp_path / "clean"
    write(clean, 3, range(4))
    write(clean, 2, range(4, 12))
    for compacted in (False, True):
        for moment in range(12):
            path = tmp_path / f"{compacted}{moment}"
            write(path, 3, range(10))
            if compacted:
                Ledger(path).compact()
            (path / "rank00002-step000000000009.parquet.tmp").touch()  # what it had begun to write

            def resumed(rank, path=path):
                ledger = Ledger(path, rank=rank)
                ledger.writers = 2
                ledger.resume(4)

            others = {name: held for name, held in listing(path).items() if name.startswith("rank00001")}
            killed_at(moment, monkeypatch)(lambda resumed=resumed: resumed(0))
            resumed(0)
            after = listing(path)
            assert {name: held for name, held in after.items() if name.startswith("rank00001")} == others
            resumed(1)
            assert steps_of(Ledger(path, rank=2)) == [step for step in range(4) for _ in range(12)]
            assert Ledger(path, rank=2).last_step == 3 and not list(path.glob("*.tmp"))
            write(path, 2, range(4, 12))
            assert Ledger(path).totals() == Ledger(clean).totals()
            assert len(pq.read_table(sorted(path.iterdir()))) == len(Ledger(clean))


def test_same_ledger_same_bits(tmp_path, engine):
    rng = np.random.default_rng(0)
    with Ledger(tmp_path, flush_rows=1 << 14) as ledger:
        for step in range(200):
            ledger.append(step, rng.integers(0, 50, 2048), rng.standard_normal(2048))
    sources = {number: str(number % 3) for number in range(50)}
    for query in (Ledger.totals, lambda each: each.by_source(sources), lambda each: each.over_time(sources)):
        assert all(query(Ledger(tmp_path)).equals(query(ledger)) for _ in range(5))


def merged(folder: Path, rows: int = 1 << 22) -> list[str]:
    """The names of the shards after a compaction."""
    Ledger(folder).compact(rows)
    return sorted(each.name for each in folder.iterdir())


def test_compaction_makes_few_sorted_shards_of_each_writer(tmp_path):
    for rank in range(2):
        with Ledger(tmp_path, rank=rank, flush_rows=8, metadata={"rank's": rank}) as ledger:
            fill(ledger, range(10), offset=4 * rank)  # five shards of 8 rows
    before = Ledger(tmp_path).totals()
    assert merged(tmp_path, 24) == [
        f"rank0000{rank}-step00000000000{a}-00000000000{b}.parquet" for rank in (0, 1) for a, b in ((0, 5), (6, 9))
    ]
    assert Ledger(tmp_path).totals() == before and len(Ledger(tmp_path)) == 80
    first = pq.read_table(sorted(tmp_path.iterdir())[0])
    assert first["sample_id"].to_pylist() == [sample for sample in range(4) for _ in range(6)]
    assert first["step"].to_pylist() == [*range(6)] * 4
    assert [Ledger(tmp_path, rank=rank).metadata["rank's"] for rank in (0, 1)] == [0, 1]
    unchanged = listing(tmp_path)
    assert merged(tmp_path, 24) == sorted(unchanged) and listing(tmp_path) == unchanged
    with Ledger(tmp_path, rank=1) as ledger:
        assert ledger.last_step == 9
        fill(ledger, range(10, 12), offset=4)
    names = merged(tmp_path)
    assert names[1:] == ["rank00001-step000000000000-000000000011.parquet"] and len(names) == 2
    assert steps_of(Ledger(tmp_path)) == sorted([*range(10)] * 8 + [10, 11] * 4)
    with pytest.raises(ValueError, match="rows >= 1, received 0"):
        ledger.compact(0)


def test_sorted_shards_are_summed_range_by_range(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "_GROUP", 10)
    with Ledger(tmp_path, flush_rows=100) as ledger:
        fill(ledger, range(10), batch=40)
    assert shards.id_ranges(sorted(tmp_path.iterdir()), 100) == [(None, None)]
    ledger.compact(200)  # two shards of 200 rows: five of each id, in row groups of two ids
    assert shards.id_ranges(sorted(tmp_path.iterdir()), 100) == [(None, 10), (10, 20), (20, 30), (30, None)]
    with Ledger(tmp_path / "long") as ledger:
        ledger.append(0, [*map(str, range(20)), *(f"{name:5000}" for name in range(20))], np.ones(40))
    ledger.compact()
    assert shards.id_ranges(sorted((tmp_path / "long").iterdir()), 1) == [
        (None, None)
    ]  # whose footers name no long ids


@settings(max_examples=15, deadline=None)
@given(
    flushes=st.lists(st.integers(1, 3), min_size=1, max_size=6),
    rows=st.integers(1, 20),
    at=st.integers(0, 12),
    strings=st.booleans(),
)
def test_resume_after_compaction_leaves_exactly_the_steps_before(tmp_path_factory, flushes, rows, at, strings):
    path = tmp_path_factory.mktemp("ledger")
    steps = iter(range(100))
    ledger = Ledger(path)

    def go_on(step: int) -> None:
        ledger.append(step, ["b", "a"] if strings else [2, 1], [step, step / 2])

    for count in flushes:
        for _ in range(count):
            go_on(next(steps))
        ledger.flush()
    for _ in range(2):
        ledger.compact(rows)
        left = [step for step in range(min(at, sum(flushes))) for _ in range(2)]
        ledger.resume(at)
        assert steps_of(Ledger(path)) == left and Ledger(path).last_step == (left[-1] if left else None)
        go_on(at)
        ledger.flush()
        assert steps_of(Ledger(path)) == [*left, at, at]
        assert pq.read_table(sorted(path.iterdir()))["value"].to_pylist().count(at) >= 1


def test_what_is_left_of_a_compacted_shard_stands_for_no_step_that_it_has_nothing_of(tmp_path):
    """As of a rank without samples in steps 3 and 4, which goes on from a checkpoint of 5, and then from one of 3."""
    with Ledger(tmp_path) as ledger:
        fill(ledger, [0, 1, 2, 5, 6], batch=1)
    ledger.compact()
    for step in (5, 3):
        ledger.resume(step)
        assert [each.name for each in tmp_path.iterdir()] == ["rank00000-step000000000000-000000000002.parquet"]
    fill(ledger, range(3, 5), batch=1)
    ledger.close()
    assert steps_of(ledger) == [0, 1, 2, 3, 4]
    ledger.compact()
    assert steps_of(Ledger(tmp_path)) == [0, 1, 2, 3, 4]


def test_compaction_and_resume_stopped_at_any_moment_lose_and_double_nothing(tmp_path, monkeypatch):
    for moment in range(14):
        path = tmp_path / str(moment)
        with Ledger(path, flush_rows=8) as ledger:
            fill(ledger, range(10))  # five shards of two steps
        expected = Ledger(path).totals()
        reader, change = Ledger(path), killed_at(moment, monkeypatch)
        change(lambda path=path: Ledger(path).compact(24))
        assert reader.totals() == Ledger(path).totals() == expected and Ledger(path).last_step == 9
        # The killed compaction is gone on with, or cut back, and that killed too.
        change(lambda path=path: Ledger(path).resume(3))
        found = set(steps_of(Ledger(path)))
        assert found == set(range(len(found))) and len(steps_of(Ledger(path))) == 4 * len(found) >= 12
        Ledger(path).resume(3)
        assert set(steps_of(Ledger(path))) == {0, 1, 2}
        assert len(pq.read_table(sorted(path.glob("*.parquet")))) == 12
        with Ledger(path) as ledger:
            fill(ledger, range(3, 10))
        ledger.compact()
        assert Ledger(path).totals() == expected and len(list(path.iterdir())) == 1


def test_a_compaction_clears_up_after_one_that_was_killed(tmp_path, monkeypatch):
    with Ledger(tmp_path, flush_rows=8) as ledger:
        fill(ledger, range(10))
    killed_at(3, monkeypatch)(ledger.compact)  # the large shard is there, and one of those that it stands for is gone
    assert len(list(tmp_path.iterdir())) == 5
    ledger.compact()
    assert len(list(tmp_path.iterdir())) == 1 and len(ledger) == 40


@pytest.mark.parametrize("query", [Ledger.totals, Ledger.rows, lambda each: each.top(3), Ledger.__len__])
def test_a_question_is_asked_again_where_the_ledger_was_compacted_meanwhile(tmp_path, monkeypatch, query, engine):
    path = tmp_path / "odd [name] *"
    with Ledger(path, flush_rows=8) as ledger:
        fill(ledger, range(10))
    expected = query(ledger)
    reader = Ledger(path)
    in_memory, calls = Reader._in_memory, []

    def late(self):  # the shards have been listed and checked, and not read yet
        if self is reader and not calls:
            calls.append(1)
            Ledger(path).compact()
        return in_memory(self)

    monkeypatch.setattr(Ledger, "_in_memory", late)
    found = query(reader)
    assert calls and len(list(path.iterdir())) == 1
    assert found == expected or found.sort_by("step") == expected
    next(path.iterdir()).unlink()
    monkeypatch.setattr(shards, "listing", lambda *_: [path / "rank00000-step000000000000.parquet"])
    with pytest.raises(FileNotFoundError):  # and not asked for ever
        query(reader)


def test_a_question_misses_no_row_that_another_thread_flushes_meanwhile(tmp_path, monkeypatch):
    ledger, check = Ledger(tmp_path), shards.check
    fill(ledger, range(3))
    writer = threading.Thread(target=ledger.flush)

    def late(*args):  # the shards have been listed, and the rows in memory not looked at yet
        if writer.ident is None:
            writer.start()
            writer.join(0.2)
        return check(*args)

    monkeypatch.setattr(shards, "check", late)
    assert len(ledger) == 12
    writer.join()
    assert len(ledger) == 12 and list(tmp_path.iterdir())


def test_opening_and_reading_change_nothing(tmp_path):
    with Ledger(tmp_path) as ledger:
        fill(ledger, range(3))
    mine, other = (tmp_path / f"rank0000{rank}-step000000000003.parquet.tmp" for rank in (0, 1))
    mine.write_bytes(b"half a shard")
    other.write_bytes(b"half a shard")
    before = listing(tmp_path)
    ledger = Ledger(tmp_path)
    assert len(ledger) == 12 and ledger.top(1).num_rows == 1 and ledger.last_step == 2
    ledger.close()
    assert listing(tmp_path) == before
    fill(ledger, range(3, 4))
    ledger.flush()
    assert not mine.exists() and other.exists()
    assert len(Ledger(tmp_path)) == 16


def test_shards_say_what_they_hold(tmp_path):
    ledger = Ledger(tmp_path, rank=2, metadata={"lr": 0.1, "path": Path("data"), "by": {("a", 1): 2}})
    ledger.metadata["coverage"] = ["head.weight"]
    fill(ledger, range(2))
    ledger.close()
    (shard,) = tmp_path.iterdir()
    assert shard.name == "rank00002-step000000000000.parquet"
    schema = pq.read_schema(shard)
    assert [(field.name, str(field.type)) for field in schema] == [
        ("step", "int64"),
        ("sample_id", "int64"),
        ("token", "int32"),
        ("target", "dictionary<values=string, indices=int32, ordered=0>"),
        ("value", "float"),
    ]
    stored = json.loads(schema.metadata[b"inrun"])
    assert stored["unit"] == "nats" and "lowered the validation loss" in stored["sign"]
    assert stored["versions"]["pyarrow"] == pa.__version__ and stored["rank"] == 2
    assert (stored["lr"], stored["path"], stored["coverage"]) == (0.1, "data", ["head.weight"])
    assert stored["by"] == "{('a', 1): 2}"
    assert Ledger(tmp_path).metadata == stored
    assert Ledger(tmp_path, metadata={"lr": 0.2}).metadata == {"lr": 0.2}
    given = {}
    ledger = Ledger(tmp_path, rank=2, metadata=given)
    assert ledger.metadata == {}
    ledger.metadata["lr"] = 0.3
    fill(ledger, [2])
    ledger.close()
    assert given == {} and Ledger(tmp_path).metadata["lr"] == 0.3  # the last shard's


def test_a_failed_write_loses_nothing(tmp_path, monkeypatch):
    ledger = Ledger(tmp_path)
    fill(ledger, range(3))

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.flush()
    assert not list(tmp_path.iterdir()) and len(ledger) == 12
    ledger.flush()
    assert len(Ledger(tmp_path)) == 12


def test_a_write_stopped_after_its_rename_is_not_written_twice(tmp_path, monkeypatch):
    replace = os.replace

    def stopped(*paths):
        replace(*paths)
        raise KeyboardInterrupt

    for at, left in ((None, range(5)), (3, range(5)), (2, [0, 1, 3, 4])):
        ledger = Ledger(tmp_path / str(at))
        fill(ledger, range(3))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(os, "replace", stopped)
            ledger.flush()
        if at is not None:
            ledger.resume(at)
        fill(ledger, range(3, 5))
        ledger.close()
        assert steps_of(ledger) == steps_of(Ledger(ledger.path)) == [step for step in left for _ in range(4)]


def test_the_folder_stays_where_the_process_changes_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ledger = Ledger("values")
    fill(ledger, range(2))
    ledger.flush()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    fill(ledger, range(2, 4))
    ledger.close()
    assert len(ledger) == len(Ledger(tmp_path / "values")) == 16 and not list(Path().iterdir())


def test_a_second_writer_of_one_rank_is_noticed(tmp_path):
    first, second = Ledger(tmp_path), Ledger(tmp_path)
    fill(first, range(2))
    fill(second, range(2))
    first.flush()
    with pytest.raises(InRunError, match="another process writes with rank 0"):
        second.flush()
    assert len(Ledger(tmp_path)) == 8


def test_a_step_is_recorded_once(tmp_path):
    with Ledger(tmp_path) as ledger:
        fill(ledger, range(6))
    for each in (ledger, Ledger(tmp_path)):
        for step in (3, 5):
            with pytest.raises(InRunError, match=rf"step {step} .* up to 5; call resume\({step}\)"):
                fill(each, [step])
    ledger.resume(3)
    fill(ledger, range(3, 4))
    assert steps_of(ledger) == [step for step in range(4) for _ in range(4)]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((0, [1, 2, 3], [1.0, 2.0]), ValueError, r"shape \(3,\) or \(3, 1\) for 3 ids .* received \(2,\)"),
        ((0, [1], [[1.0, 2.0]]), ValueError, r"received \(1, 2\)"),
        ((0, [1, 2], [1.0, 2.0], "v", True), ValueError, r"shape \(2, T\) or \(2, T, 1\) for .* received \(2,\)"),
        ((0, [1], [[1.0]], ("a", "b"), True), ValueError, r"shape \(1, T, 2\) for .* received \(1, 1\)"),
        ((0, [1, 2], [1.0, 2.0], ("a", "b")), ValueError, r"shape \(2, 2\)"),
        ((0, [1], [[1.0, 2.0]], ("a", "a")), ValueError, "distinct target names"),
        ((-1, [1], [1.0]), ValueError, "step=-1"),
        ((1.5, [1], [1.0]), TypeError, "step to be an integer, received 1.5"),
        ((True, [1], [1.0]), TypeError, "received True"),
        ((0, [1, "a"], [1.0, 2.0]), TypeError, "received 'a'"),
        ((0, ["a", "b", None], [1.0, 2.0, 3.0]), TypeError, "all ids to be str, as the first, received None among"),
        ((0, ["a", 7], [1.0, 2.0]), TypeError, "received 7 among them"),
        ((0, pa.array(["a", None]), [1.0, 2.0]), TypeError, "received None among them"),
        ((0, [0.5], [1.0]), TypeError, "received 0.5"),
        ((0, torch.tensor([0.5]), [1.0]), TypeError, "received 0.5"),
        ((0, torch.tensor([True]), [1.0]), TypeError, "received True"),
        ((0, "ab", [1.0, 2.0]), TypeError, "single 'ab'"),
        ((0, np.zeros((2, 1), dtype=int), [1.0, 2.0]), ValueError, r"\[B\], received shape \(2, 1\)"),
        ((0, np.array([2**63], dtype=np.uint64), [1.0]), ValueError, "9223372036854775808"),
        ((0, [2**63], [1.0]), ValueError, "each id .* to be an integer of 64 bits, received 9223372036854775808"),
        ((0, [1], [1.0], [7]), TypeError, r"target names to be str, received \(7,\)"),
        ((0, [5, 6, 7], [1.0, np.nan, np.inf]), InRunError, r"2 of 3 samples, ids \[6, 7\]"),
        ((0, ["x", "y"], torch.tensor([1e39, 1.0], dtype=torch.float64)), InRunError, r"ids \['x'\]"),
        ((0, [5, 6], [[1.0, 2.0], [1.0, np.nan]], ("a", "b")), InRunError, r"1 of 2 samples, ids \[6\]"),
    ],
)
def test_bad_input_is_an_error_and_records_nothing(tmp_path, arguments, error, message):
    ledger = Ledger(tmp_path)
    with pytest.raises(error, match=message):
        ledger.append(*arguments[:4], per_token=len(arguments) > 4)
    ledger.close()
    assert not list(tmp_path.iterdir()) and ledger.last_step is None
    ledger.append(0, ["strings", "still fit"], torch.ones(2, dtype=torch.bfloat16))
    assert len(ledger) == 2


def test_ids_are_of_one_kind(tmp_path):
    with Ledger(tmp_path) as ledger:
        fill(ledger, range(2))
    for each in (ledger, Ledger(tmp_path), Ledger(tmp_path, rank=1)):
        with pytest.raises(InRunError, match="int64 as in this ledger, received string"):
            each.append(2, ["a"], [1.0])
    # Two ranks that start together do not see each other's ids; the reader does.
    other = tmp_path / "other"
    with Ledger(other, rank=1) as strings:
        strings.append(0, ["a"], [1.0])
    (other / "rank00001-step000000000000.parquet").rename(tmp_path / "rank00001-step000000000000.parquet")
    with pytest.raises(InRunError, match=r"ids of type int64 in every shard, received string in .*rank00001"):
        Ledger(tmp_path)


def test_a_ledger_that_is_begun_anew_takes_ids_of_the_other_kind(tmp_path):
    for folder in (None, tmp_path):
        ledger = Ledger(folder)
        fill(ledger, range(2))
        ledger.flush()
        ledger.resume(0)
        ledger.append(0, ["a"], [1.0])
        ledger.close()
        assert ledger.totals()["sample_id"].to_pylist() == ["a"]


def test_foreign_files_and_versions_are_refused(tmp_path):
    shard = tmp_path / "rank00000-step000000000000.parquet"
    table = pa.table({"step": [0], "sample_id": [0]})
    newer = {"inrun": json.dumps({"schema": 99})}
    for metadata, found in ((None, "None in .*: no ledger"), (newer, "99 in .*: a newer inrun wrote it; upgrade")):
        pq.write_table(table.replace_schema_metadata(metadata), shard)
        with pytest.raises(InRunError, match=f"schema version 1 or 2, received {found}"):
            Ledger(tmp_path)
    pq.write_table(table.replace_schema_metadata({"inrun": json.dumps({"schema": 2})}), shard)
    copy = shard.rename(tmp_path / "copy.parquet")
    with pytest.raises(InRunError, match=r"expected a shard named .* received .*copy\.parquet"):
        Ledger(tmp_path)
    copy.unlink()
    shard.write_bytes(b"not Parquet")
    with pytest.raises(InRunError, match="which is not Parquet"):
        Ledger(tmp_path)
    with pytest.raises(InRunError, match="missing, which does not exist"):
        Ledger(tmp_path / "missing").totals()
    with pytest.raises(InRunError, match="which is a file"):
        Ledger(shard).targets()


def test_a_ledger_without_tokens_is_read_and_gone_on_with(tmp_path):
    """Shards as schema version 1 wrote them, with no column `token`."""
    names = pa.array(["v", "v"]).dictionary_encode()
    old = pa.table({"step": [0, 1], "sample_id": [7, 8], "target": names, "value": pa.array([1.0, 2.0], pa.float32())})
    facts = {"inrun": json.dumps({"schema": 1, "method": "first"})}
    pq.write_table(old.replace_schema_metadata(facts), tmp_path / "rank00000-step000000000000.parquet")
    with Ledger(tmp_path) as ledger:
        assert ledger.last_step == 1 and ledger.metadata["method"] == "first"
        ledger.append(2, [8], [[0.5, 0.25]], "v", per_token=True)
    reopened = Ledger(tmp_path)
    assert reopened.rows()["token"].to_pylist() == [None, None, 0, 1]
    assert as_sums(reopened.totals(), "sample_id") == {(7,): (1.0, 1), (8,): (2.75, 2)}
    reopened.resume(1)  # rewrites the old shard, as it was
    assert [row["value"] for row in Ledger(tmp_path).rows().to_pylist()] == [1.0]


def test_what_is_no_ledger_or_no_dataset(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InRunError, match=r"a folder of shards, or a new one, received .*file, which is a file"):
        Ledger(tmp_path / "file")
    with pytest.raises((TypeError, ValueError), match="rank"):
        Ledger(rank=1.5)
    ledger = Ledger()
    fill(ledger, range(1))
    with pytest.raises(TypeError, match="sources: expected a function, a mapping or a table, received None"):
        ledger.by_source(None)
    with pytest.raises(TypeError, match="dataset: expected a Hugging Face dataset, received list"):
        ledger.filter([1], column="id", unscored="drop")


def test_bad_questions(tmp_path):
    ledger = Ledger()
    assert ledger.targets() == []
    ledger.append(0, [1, 2], [[1.0, 2.0], [3.0, 4.0]], ("prose", "code"))
    assert ledger.targets() == ["code", "prose"]
    with pytest.raises(ValueError, match=r"one of \['code', 'prose'\]"):
        ledger.top(1)
    with pytest.raises(ValueError, match=r"one of \['code', 'prose'\], received 'maths'"):
        ledger.totals("maths")
    with pytest.raises(ValueError, match="k >= 0"):
        ledger.bottom(-1, "code")
    with pytest.raises(ValueError, match="bins >= 1"):
        ledger.over_time(bins=0)
    with pytest.raises(ValueError, match=r"names? each id once, received 1 twice: \[1\]"):
        ledger.by_source(pa.table({"sample_id": [1, 1, 2], "source": ["a", "b", "c"]}))
    with pytest.raises(ValueError, match=r"columns sample_id and source, received \['id'\]"):
        ledger.by_source(pa.table({"id": [1]}))
    with pytest.raises(TypeError, match="sources to name samples by int64, as the ledger, received string"):
        ledger.by_source({"1": "a"})
    with pytest.raises(TypeError, match="among to name samples by int64, as the ledger, received string"):
        ledger.top(1, "code", among=["1"])
    with pytest.raises(TypeError, match="among: expected a sequence of ids, received the single 3"):
        ledger.top(1, "code", among=3)
    with pytest.raises(ValueError, match="an integer of 64 bits"):
        ledger.top(1, "code", among=[2**70])
    with pytest.raises(TypeError, match="both of one type, or a table of sample_id and source, received dict"):
        ledger.by_source({1: "a", 2: 3})
    with pytest.raises(TypeError, match="or a table of sample_id and source, received list"):
        ledger.by_source([1, 2])
    with pytest.raises(TypeError, match="expected bins to be an integer, received '3'"):
        ledger.over_time(bins="3")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("wrong", [pa.array([1.5]), pa.array([True]), pa.array([1]).dictionary_encode()])
def test_ids_that_are_no_strings_are_not_looked_for_among_strings(wrong):
    ledger = Ledger()
    ledger.append(0, ["1.5", "true", "1"], [1.0, 2.0, 3.0])
    with pytest.raises(TypeError, match="among to name samples by string, as the ledger, received"):
        ledger.top(1, among=wrong)
    with pytest.raises(TypeError, match="sources to name samples by string, as the ledger, received"):
        ledger.by_source(pa.table({"sample_id": wrong, "source": ["web"]}))


def test_stretches_begin_at_the_first_step_and_a_target_may_have_no_row_among_those_asked_for(engine):
    ledger = Ledger()
    fill(ledger, range(5, 11), batch=1)
    assert ledger.over_time(bins=2)["step"].to_pylist() == [5, 8]
    assert len(ledger.top(0, "validation")) == len(ledger.top(1, "validation", among=[])) == 0


def test_sources_come_from_any_library(engine):
    ledger = Ledger()
    ledger.append(0, ["a", "b"], [1.0, 2.0])
    of_numbers = Ledger()
    of_numbers.append(0, [1, 2], [1.0, 2.0])
    for kind in (pa.string_view(), pa.large_string(), pa.dictionary(pa.int32(), pa.string())):
        table = pa.table({"sample_id": pa.array(["a", "b"], kind), "source": pa.array(["x", "y"], kind)})
        assert as_sums(ledger.by_source(table), "source") == {("x",): (1.0, 1), ("y",): (2.0, 1)}
    table = pa.table({"sample_id": pa.array([1, 2]).dictionary_encode(), "source": ["x", "y"]})
    assert as_sums(of_numbers.by_source(table), "source") == {("x",): (1.0, 1), ("y",): (2.0, 1)}


@pytest.mark.parametrize("ids", [torch.tensor([3, 1]), np.array([3, 1]), pa.chunked_array([[3], [1]]), (3, 1)])
def test_samples_are_named_among_others_in_any_kind_of_sequence(ids):
    ledger = Ledger()
    ledger.append(0, [1, 2, 3], [0.1, 0.3, 0.2])
    assert ledger.top(5, among=ids)["sample_id"].to_pylist() == [3, 1]


def test_an_empty_ledger_is_asked_by_ids_of_either_kind():
    datasets = pytest.importorskip("datasets")
    ledger, rows = Ledger(), datasets.Dataset.from_dict({"id": ["a", "b"]})
    assert len(ledger.filter(rows, column="id", unscored="keep")) == 2
    assert len(ledger.filter(rows, column="id", unscored="drop")) == 0
    for ids in (["a"], [1]):
        assert len(ledger.top(1, among=ids)) == len(ledger.by_source(dict.fromkeys(ids, "web"))) == 0


def test_a_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    with Ledger("~/values") as ledger:
        ledger.append(0, [1], [1.0])
    assert len(Ledger(tmp_path / "values")) == 1


def test_what_was_appended_is_a_copy():
    ledger, ids, values = Ledger(), np.array([1, 2]), torch.tensor([1.0, 2.0])
    ledger.append(0, ids, values)
    ids[:], values[:] = 9, 9.0
    assert ledger.rows()["sample_id"].to_pylist() == [1, 2] and ledger.rows()["value"].to_pylist() == [
        1.0,
        2.0,
    ]


class OnDevice:
    """Stands for a tensor on a GPU: counts how often its values are read back."""

    reads = 0

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor, self.shape, self.device = tensor, tensor.shape, torch.device("cuda")

    def detach(self):
        return self

    clone = float = detach

    def cpu(self):
        OnDevice.reads += 1
        return self.tensor


def test_values_on_a_device_are_read_back_seldom(tmp_path):
    ledger = Ledger(tmp_path)
    OnDevice.reads = 0
    for step in range(_SETTLE_STEPS):
        ledger.append(step, [1, 2], OnDevice(torch.tensor([step, torch.nan if step == 7 else 1.0])))
    assert OnDevice.reads == 0
    with pytest.raises(InRunError, match=r"step 7: .* ids \[2\]"):
        ledger.append(_SETTLE_STEPS, [1, 2], OnDevice(torch.ones(2)))
    ledger.append(_SETTLE_STEPS, [1, 2], OnDevice(torch.ones(2)))
    for step, value in enumerate((torch.nan, torch.nan, 1.0), _SETTLE_STEPS + 1):
        ledger.append(step, [1, 2], OnDevice(torch.tensor([1.0, value])))
    with pytest.raises(InRunError, match=r"step 33: .* ids \[2\].*\nstep 34: "):  # named, and all others written
        ledger.close()
    left = [each for each in range(_SETTLE_STEPS + 4) if each not in (7, 33, 34)]
    assert sorted(set(steps_of(Ledger(tmp_path)))) == left and len(ledger) == 2 * len(left)


def test_values_still_on_a_device_are_resumed_and_written_like_others(tmp_path):
    good, bad = (OnDevice(torch.tensor([1.0, value])) for value in (1.0, torch.nan))
    ledger = Ledger(tmp_path)
    for step, values in enumerate((good, good, good, bad)):
        ledger.append(step, [1, 2], values)
    ledger.resume(2)
    assert steps_of(ledger) == [0, 0, 1, 1] and ledger.last_step == 1
    ledger.append(2, [1, 2], bad)
    with pytest.raises(InRunError, match=r"step 2: .* ids \[2\]"):
        fill(ledger, [3], batch=2)
    fill(ledger, [3], batch=2)
    assert steps_of(ledger) == [0, 0, 1, 1, 3, 3]
    ledger.flush()
    ledger.append(4, [1, 2], good)
    del ledger
    assert steps_of(Ledger(tmp_path)) == [0, 0, 1, 1, 3, 3, 4, 4]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_values_on_a_gpu():
    ledger = Ledger()
    for step in range(3):
        values = torch.full((2,), float(step), device="cuda")
        ledger.append(step, torch.tensor([1, 2], device="cuda"), values)
        values.zero_()
    assert ledger.totals()["value"].to_pylist() == [3.0, 3.0]


def test_data_frames(monkeypatch):
    ledger = Ledger()
    fill(ledger, range(2), batch=2)
    for name in ("polars", "pandas"):
        pytest.importorskip(name)
        frame = getattr(ledger, f"to_{name}")()
        assert type(frame).__module__.split(".")[0] == name
        assert list(frame.columns) == ["step", "sample_id", "token", "target", "value"]
        assert frame["value"].to_list() == [0, 1 / 16, 1, 17 / 16] and list(frame["target"]) == ["validation"] * 4
        monkeypatch.setitem(sys.modules, name, None)
        with pytest.raises(InRunError, match=f"pip install {name}"):
            getattr(ledger, f"to_{name}")()


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("form", [None, "numpy"])
def test_a_dataset_filtered_by_value(streaming, form):
    datasets = pytest.importorskip("datasets")
    ledger = Ledger()
    ledger.append(0, [1, 2, 3], [1.0, -1.0, 0.5])
    ledger.append(1, [2, 3], [3.0, -0.5])  # totals: 1, 2, 0; 4 is never scored
    dataset = datasets.Dataset.from_dict({"text": ["a", "b", "c", "d"], "id": [1, 2, 3, 4]}).with_format(form)
    dataset = dataset.to_iterable_dataset() if streaming else dataset

    def left(**choice):
        return "".join(row["text"] for row in ledger.filter(dataset, column="id", **choice))

    assert left(unscored="drop") == "abc" and left(unscored="keep") == "abcd"
    assert left(unscored="drop", at_least=0.5) == "ab" and left(unscored="keep", at_least=1.5) == "bd"
    with pytest.raises(TypeError, match="unscored"):
        left()
    with pytest.raises(ValueError, match="'keep' or 'drop', received True"):
        left(unscored=True)
    with pytest.raises(TypeError, match="int64 ids in 'text', as in the ledger, received string"):
        list(ledger.filter(dataset, column="text", unscored="keep"))
    ledger.append(2, [1], [[1.0, 2.0]], ("code", "prose"))
    with pytest.raises(ValueError, match=r"one of \['code', 'prose', 'validation'\]"):
        left(unscored="drop")
    assert left(unscored="drop", target="validation") == "abc"


def test_duckdb_reads_the_folder_and_the_dataset(tmp_path):
    duckdb = pytest.importorskip("duckdb")
    with Ledger(tmp_path, flush_rows=8) as ledger:
        fill(ledger, range(7))
    ledger.resume(4)
    fill(ledger, range(4, 9))
    ledger.close()
    query = "select sample_id, sum(value), count(*) from {} group by sample_id order by sample_id"
    expected = [tuple(row.values()) for row in ledger.totals().select(["sample_id", "value", "count"]).to_pylist()]
    assert duckdb.sql(query.format(f"'{tmp_path}/*.parquet'")).fetchall() == expected
    rows = ledger.dataset()  # DuckDB finds it by its name
    assert duckdb.sql(query.format("rows")).fetchall() == expected
    del rows


# One writer after another is killed with SIGKILL at a moment of chance, in appends, flushes and resumes; after
# each, the folder is read as any reader would.
CRASH = """
import os, random, signal, sys, time
from collections import Counter
from pathlib import Path
import pyarrow.parquet as pq
from inrun import Ledger

folder, random = Path(sys.argv[1]), random.Random(0)
committed, kills_seen = -1, 0
for round in range(40):
    start = random.randint(max(0, committed - 7), committed + 1)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        ledger = Ledger(folder, flush_rows=10**6)
        ledger.resume(start)
        os.write(writer, f"R{start - 1}\\n".encode())
        for step in range(start, start + 400):
            ledger.append(step, [step, step + 1], [1.0, 2.0])
            if random.random() < 0.4:
                ledger.flush()
                os.write(writer, f"F{step}\\n".encode())
        os._exit(0)
    os.close(writer)
    time.sleep(random.expovariate(40))
    os.kill(child, signal.SIGKILL)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    said = os.read(reader, 1 << 20).decode().split()
    os.close(reader)
    # Before the child said that it had resumed, it may have dropped any of the steps from `start` on.
    committed = int(said[-1][1:]) if said else start - 1
    shards = sorted(folder.glob("*.parquet"))
    steps = Counter(step for shard in shards for step in pq.read_table(shard)["step"].to_pylist())
    assert sorted(steps) == list(range(len(steps))), (round, said, "a step is missing", sorted(steps))
    assert len(steps) > committed, (round, said, "a committed step is lost", len(steps), committed)
    assert set(steps.values()) <= {2}, (round, said, "a step is doubled", steps)
    assert len(Ledger(folder)) == 2 * len(steps)
    kills_seen += killed
    committed = len(steps) - 1
ledger = Ledger(folder)
ledger.resume(0)
assert len(ledger) == 0 and not list(folder.iterdir())
print(kills_seen)
"""


def run_python(script: str, *arguments: object) -> str:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kill_9_loses_and_doubles_nothing(tmp_path):
    assert int(run_python(CRASH, tmp_path)) > 25


def test_two_million_rows_in_bounded_time_and_memory(tmp_path):
    steps, batch = 1000, 2000
    rng = np.random.default_rng(0)
    ids, values = (
        rng.integers(0, 10_000, (steps, batch)),
        rng.standard_normal((steps, batch), dtype=np.float32),
    )
    start = time.perf_counter()
    with Ledger(tmp_path, flush_rows=1 << 15) as ledger:
        for step in range(steps):
            ledger.append(step, ids[step], values[step])
    wrote = time.perf_counter() - start
    script = """
        import sys, time
        import pyarrow as pa
        from inrun import Ledger
        ledger = Ledger(sys.argv[1])
        start = time.perf_counter()
        totals = ledger.totals()
        ledger.over_time({number: str(number % 7) for number in range(10_000)})
        seconds, peak = time.perf_counter() - start, pa.default_memory_pool().max_memory()
        print(seconds, peak, *totals["value"].to_pylist())
    """
    read, peak, *totals = map(float, run_python(script, tmp_path).split())
    np.testing.assert_allclose(totals, np.bincount(ids.ravel(), values.ravel()), atol=1e-9)
    assert wrote < 20 and read < 20, (wrote, read)  # about 0.5 s each on two idle cores
    assert peak < 24 * steps * batch / 2  # half of what the rows take in memory


def test_what_nobody_flushed_is_written_when_its_ledger_or_the_process_goes(tmp_path):
    script = f"""
        import os
        import numpy as np
        from inrun import Ledger

        def inside():
            ledger = Ledger({str(tmp_path / "inside")!r})
            ledger.append(0, np.arange(3), np.ones(3))

        inside()
        assert len(Ledger({str(tmp_path / "inside")!r})) == 3
        ledger = Ledger({str(tmp_path / "at_exit")!r})
        ledger.append(0, np.arange(3), np.ones(3))
        if not os.fork():  # a child has copies of what is its parent's to write
            raise SystemExit
        os.wait()
        assert not ledger.path.exists()
        ledger.append(1, np.arange(3), np.ones(3))
        raise KeyError("the run")
    """
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.stderr.splitlines()[-1] == "KeyError: 'the run'"
    assert steps_of(Ledger(tmp_path / "inside")) == [0, 0, 0]
    assert steps_of(Ledger(tmp_path / "at_exit")) == [0, 0, 0, 1, 1, 1]


def test_a_resume_before_the_first_step_is_refused(tmp_path):
    ledger = Ledger(tmp_path)
    fill(ledger, range(3))
    with pytest.raises(ValueError, match=r"0 or more, received step=-1"):
        ledger.resume(-1)
    assert len(ledger) == 12


def test_a_second_ledger_of_a_folder_sees_what_the_first_has_not_written(tmp_path):
    first = Ledger(tmp_path)
    fill(first, range(2))
    second = Ledger(tmp_path)
    assert second.last_step == 1 and len(second) == 8
    other = Ledger(tmp_path, rank=1)
    fill(other, range(1), offset=4)
    assert len(Ledger(tmp_path)) == 12
    other.resume(0)
    fill(second, range(2, 4))
    second.flush()
    copied = copy.deepcopy(second)
    fill(copied, range(4, 5))
    del copied  # nobody's
    del first
    assert steps_of(Ledger(tmp_path)) == sorted([*range(4)] * 4)


@pytest.mark.parametrize("done", ["compacted", "resumed"])
def test_shards_that_go_while_a_ledger_is_opened_or_resumed_are_looked_for_again(tmp_path, monkeypatch, done):
    """As another process drops or compacts its own at the same moment."""
    first = Ledger(tmp_path, rank=0)
    for step in range(4):
        fill(first, [step])
        first.flush()
    others = {"compacted": lambda: first.compact(), "resumed": lambda: first.resume(3)}
    held, plain = 3 if done == "resumed" else 4, {name: getattr(shards, name) for name in ("read_metadata", "steps_of")}

    def meanwhile(name):
        def read(*args):
            if args[0]:  # some shards
                for each, function in plain.items():
                    monkeypatch.setattr(shards, each, function)
                others[done]()
            return plain[name](*args)

        monkeypatch.setattr(shards, name, read)

    meanwhile("read_metadata")
    opened = Ledger(tmp_path, rank=1)
    assert steps_of(opened) == sorted([*range(held)] * 4) and opened.metadata["rank"] == 0
    first.resume(held)
    for step in range(held, 5):
        fill(first, [step])
        first.flush()
    held = 3 if done == "resumed" else 5
    meanwhile("steps_of")
    opened.resume(held)
    assert steps_of(opened) == sorted([*range(held)] * 4)
