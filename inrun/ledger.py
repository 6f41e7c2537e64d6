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
will do again. ``compact()`` makes few large shards of many.

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

import atexit
import functools
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

import numpy as np

from inrun import shards
from inrun.errors import InRunError
from inrun.reading import Reader

if TYPE_CHECKING:
    from pathlib import Path

    import pyarrow as pa

    from inrun.queries import Rows

_SETTLE_STEPS = 32  # values on a GPU are read back once in so many steps: no synchronisation at each step
_WRITING = threading.RLock()  # of any ledger: to open one writes what others of its folder hold, from any thread


def _one_at_a_time(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with _WRITING:
            return method(*args, **kwargs)

    return alone


class Ledger(Reader):
    """Append-only record of values, with the queries that a run needs.

    Args:
        path: folder of shards, made at the first flush; None keeps everything in memory. Opening a folder
            reads the footers of its shards and changes nothing; the shards of all writers are read as one.
        rank: this writer's number, >= 0. Two processes must not write with one rank.
        flush_rows: at so many rows in memory, a shard is written unasked.
        metadata: what to record beside the values (run config, coverage), JSON-like. `self.metadata`, which
            may be added to, goes into every shard written from then on; without this argument it starts as
            what this writer's last shard holds.

    Attributes:
        writers: how many processes write now, of ranks below it; `inrun.track` sets it. Where it is known, `resume` of
            rank 0 sees to what others left, of a run with more processes. None: every writer sees to itself.

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
        if shards.as_int(rank, "rank") < 0 or flush_rows < 1:
            raise ValueError(f"expected rank >= 0 and flush_rows >= 1, received {rank=}, {flush_rows=}")
        super().__init__(path)
        if self.path is not None and self.path.exists() and not self.path.is_dir():
            what = shards.not_a_folder(self.path)
            raise InRunError(f"expected a folder of shards, or a new one, received {self.path}, which {what}")
        self.rank = rank
        self.writers: int | None = None
        self.flush_rows = flush_rows
        self.metadata: dict[str, Any] = {}
        self.last_step: int | None = None  # of this writer
        self._pending: list[tuple[int, pa.Array, Any, tuple[str, ...], bool]] = []  # values perhaps on a GPU
        self._buffer: list[pa.RecordBatch] = []
        self._buffered_rows = 0
        self._kept: list[pa.Table] = []  # what an in-memory ledger flushed
        self._process: int | None = os.getpid()  # whose rows to write these are; of a copy nobody's
        for other in list(_OPEN):
            if self.path is not None and other.path == self.path:
                _flush_forgotten(other)
        _OPEN.add(self)
        if self.path is not None and self.path.is_dir():
            self.metadata, self.last_step = self._ask(self._left_off)
        if metadata is not None:
            self.metadata = dict(metadata)

    # ------------------------------------------------------------------ writing

    @_one_at_a_time
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
        id_array = self.require(step, ids)
        step, count = shards.as_int(step, "step"), len(id_array)
        names = (targets,) if isinstance(targets, str) else tuple(targets)
        if not all(isinstance(name, str) for name in names):
            raise TypeError(f"expected target names to be str, received {names}")
        if not names or len(set(names)) < len(names):
            raise ValueError(f"expected distinct target names, received targets={names}")
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

    def require(self, step: int, ids: Any) -> pa.Array:
        """Raise what `append` would of this step and these ids; returns the ids as they are kept."""
        step = shards.as_int(step, "step")
        if step < 0:
            raise ValueError(f"expected step >= 0, received {step=}")
        if self.last_step is not None and step <= self.last_step:
            raise InRunError(
                f"step {step} was to be appended, but this writer (rank {self.rank}) holds steps up to "
                f"{self.last_step}; call resume({step}) only where step {step} and later are to be dropped, or use a "
                "new folder. A run that goes on from a checkpoint of step n sets tracker.steps = n and calls resume(n)"
            )
        found = shards.as_ids(ids)
        if len(found) and self._id_type not in (None, found.type):
            raise InRunError(f"expected ids of type {self._id_type} as in this ledger, received {found.type}")
        return found

    @_one_at_a_time
    def flush(self) -> None:
        """Commit what was appended: one new shard, whole and on disk when this returns.

        Raises:
            InRunError: values of a GPU that are not finite, as in `append`; all other steps are committed.
        """
        try:
            self._settle()
        except InRunError:
            self.flush()  # nothing is pending now
            raise
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
                raise InRunError(f"{shard} exists already: another process writes with rank {self.rank}, or "
                                 "another tracker of this one; take a folder for each run")  # fmt: skip
            try:
                shards.write(shards.describe(table, self.rank, self.metadata), shard)
            except BaseException:
                if shard.exists():  # stopped after the rename: the rows are there
                    self._buffer, self._buffered_rows = [], 0
                raise
        self._buffer, self._buffered_rows = [], 0

    def close(self) -> None:
        """Flush; a closed ledger can still be read."""
        self.flush()

    @_one_at_a_time
    def compact(self, rows: int = 1 << 22, *, progress: bool = False) -> None:
        """Make of each writer's many shards few large ones, sorted by sample: smaller, and summed faster.

        Readers see every row once all the while, also where this is killed; the next call, or a `resume`, clears up.
        (What reads ``folder/*.parquet`` by itself sees rows twice for the moment in which old shards are removed, or
        until they are where a kill came in between.) Not while another process appends or resumes.

        Args:
            rows: in a shard, at most; so many are sorted in memory (about 150 bytes each).
            progress: show a bar, on stderr.
        """
        from tqdm import tqdm

        if rows < 1:
            raise ValueError(f"expected rows >= 1, received {rows}")
        self.flush()
        if self.path is not None and self.path.is_dir():
            bar = tqdm(total=len(self), unit="row", unit_scale=True, desc="compacting", disable=not progress)
            with bar, shards.damage_told(shards.listing(self.path)):
                shards.compact(self.path, rows, bar.update)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_process": None}

    def __del__(self) -> None:
        _flush_forgotten(self)

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @_one_at_a_time
    def resume(self, step: int) -> None:
        """Drop every row of this writer at `step` or later, where `step` is the next step to be run.

        On disk and in memory; for rank 0, also rows of writers that are gone (`writers`). It may be killed at any
        moment and called again: shards go from the last to the first, and a shard that straddles `step` is replaced by
        its first part in one rename. Warns where a folder has nothing of the step before: what was not flushed when a
        checkpoint was made is lost.
        """
        import pyarrow.compute as pc

        step = shards.as_int(step, "step")
        if step < 0:
            raise ValueError(f"expected the next step to be run, 0 or more, received {step=}")
        before = pc.field("step") < step
        self._pending = [entry for entry in self._pending if entry[0] < step]
        self._settle()
        self._buffer = self._buffered().filter(before).to_batches()
        self._buffered_rows = sum(batch.num_rows for batch in self._buffer)
        self._kept = [rest for table in self._kept if (rest := table.filter(before)).num_rows]
        self.last_step = None
        if self.path is not None and self.path.is_dir():
            gone = [] if self.rank or self.writers is None else shards.ranks_from(self.path, self.writers)
            for rank in gone:
                self._drop(_prefix_of(rank), step)
            self.last_step = self._last_of(self._drop(self._prefix, step))
        for part in (*self._kept, *self._buffer):
            self.last_step = part["step"][-1].as_py()
        if self.last_step is None:
            self._id_type = None
        if self.path is not None and step and self.last_step != step - 1:
            # Another process may have had all of the last samples.
            held = self._ask(lambda rows: shards.steps_of(rows.files)) if self.path.is_dir() else None
            last = max((each for each in (self.last_step, held and held[1]) if each is not None), default=-1)
            if last < step - 1:
                end = f"ends at step {last}" if last >= 0 else "has no step"
                warnings.warn(
                    f"ledger {self.path}: it {end} and the run goes on at {step}; what was not flushed when the "
                    "checkpoint was made is lost (ledger.flush() comes before it)",
                    stacklevel=2,
                )

    # ------------------------------------------------------------------ shards and memory

    @property
    def _prefix(self) -> str:
        return _prefix_of(self.rank)

    def _left_off(self, rows: Rows) -> tuple[dict[str, Any], int | None]:
        """What this writer's last shard (or another's) holds beside the values, and this writer's last step."""
        own = [shard for shard in rows.files if shard.name.startswith(self._prefix)]
        facts = shards.read_metadata((own or rows.files)[-1]) if rows.files else {}
        return facts, self._last_of(own) if own else None

    @staticmethod
    def _last_of(own: list[Path]) -> int | None:
        steps = shards.steps_of(own[-1:])  # of the last shard: each has later steps than the one before
        return steps[1] if steps else None

    def _drop(self, prefix: str, step: int) -> list[Path]:
        """Drop a writer's rows at `step` or later; the shards that are left."""
        assert self.path is not None
        shards.remove_leftovers(self.path, prefix)
        shards.remove_superseded(self.path, prefix)
        own = shards.listing(self.path, prefix)
        while own and shards.span(own[-1])[1] >= step:
            own.pop().unlink()
        shards.sync(self.path)
        if own and (self._last_of(own) or 0) >= step:
            own[-1] = self._cut(own[-1], step)
        return own

    @staticmethod
    def _cut(shard: Path, step: int) -> Path:
        """Replace a shard by its rows before `step`."""
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        writer, first, last = shards.span(shard)
        left = pq.read_table(shard).filter(pc.field("step") < step)
        # A compacted one gives its name up, as it stands for steps that will come again; until it is gone, readers
        # take it and not its first part. That stands for no step it has nothing of: one may come again as well.
        end = pc.call_function("max", [left["step"]]).as_py()
        rest = shard if last == first else shard.with_name(f"{writer}-step{first:012d}-{end:012d}.parquet")
        shards.write(left, rest)
        if rest != shard:
            shard.unlink()
            shards.sync(shard.parent)
        return rest

    def _still(self) -> AbstractContextManager[Any]:
        return _WRITING

    @_one_at_a_time
    def _in_memory(self) -> pa.Table:
        import pyarrow as pa

        self._settle()
        return pa.concat_tables([*self._kept, self._buffered()])

    def _settle(self) -> None:
        """Move the pending values to the buffer, checked: all that are finite, before an error names the others."""
        wrong: list[str] = []
        while self._pending:
            step, ids, values, names, per_token = self._pending.pop(0)
            if not isinstance(values, np.ndarray):
                values = values.float().cpu().numpy()
            try:
                rows = shards.make_rows(step, ids, values, names, per_token)
            except InRunError as error:
                wrong.append(str(error))
                continue
            if rows.num_rows:
                self._buffer.append(rows)
                self._buffered_rows += rows.num_rows
        if wrong:
            raise InRunError("\n".join(wrong))

    def _buffered(self) -> pa.Table:
        import pyarrow as pa

        return pa.Table.from_batches(self._buffer, shards.make_schema(self._id_type))


_OPEN: weakref.WeakSet[Ledger] = weakref.WeakSet()


def _flush_forgotten(ledger: Ledger) -> None:
    """Commit what nobody has flushed, in the process that appended it."""
    vars_of = vars(ledger)
    if vars_of.get("path") is None or vars_of.get("_process") != os.getpid():
        return
    if vars_of.get("_pending") or vars_of.get("_buffer"):
        try:
            ledger.flush()
        except Exception as error:
            warnings.warn(f"ledger {ledger.path}: not all that was appended could be written: {error}", stacklevel=2)


@atexit.register
def _flush_all_forgotten() -> None:
    for ledger in list(_OPEN):
        _flush_forgotten(ledger)


def _prefix_of(rank: int) -> str:
    return f"rank{rank:05d}-step"
