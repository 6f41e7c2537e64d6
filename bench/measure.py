"""How everything is measured: correctness first, then interleaved cold-cache rounds, beside ceilings of the same run.

On a shared machine the load changes from second to second. So all providers of a case run once per round, in an
order that turns from round to round, and a ratio is the median over rounds of (this provider / plain, same round).
"""

import datetime
import gc
import itertools
import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from pytest_benchmark.utils import get_commit_info
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from inrun.results import processor
from inrun_kernels.cost import CEILINGS, Ceilings
from inrun_kernels.tuning import installed

SEED = 0
BASE = "plain"
AHEAD = 2e-3  # as in training: the flush alone takes less than the host needs to launch a product of several kernels
Row = dict[str, Any]
Run = TypeVar("Run")
Measured = tuple[list[float], Row] | Exception  # times of the rounds and what they come to, or why there are none


@dataclass(frozen=True)
class Work:
    """What a case needs at the least: floating point operations, and bytes read and written (None: not counted)."""

    flops: float
    nbytes: float | None = None


class Machine:
    """The device that is measured, its clock and its ceilings.

    On a CPU, OMP_NUM_THREADS sets the threads (all by default). One thread is timed by its own CPU time, which does
    not count its waiting for a core that others use; several threads, and `wall`, by the wall clock.
    """

    def __init__(self, wall: bool = False, dtype: torch.dtype | None = None) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.usual = torch.bfloat16 if self.on_gpu else torch.float32
        self.dtype = dtype or self.usual
        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 0)) or os.cpu_count() or 1)
        self.clock, self._now = "wall", time.perf_counter
        if not self.on_gpu and torch.get_num_threads() == 1 and not wall:
            self.clock, self._now = "CPU time", time.thread_time
        self._flushed = torch.zeros(2 * _last_cache_bytes(self.device) // 4, device=self.device)

    @cached_property
    def facts(self) -> Row:
        """What every row says of the machine."""
        commit = get_commit_info()
        return {
            "device": torch.cuda.get_device_name() if self.on_gpu else processor(),
            "threads": torch.get_num_threads(),
            "clock": self.clock,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": installed("triton"),
            "commit": f"{commit['id']}{'+' if commit['dirty'] else ''}",  # +: with changes not committed
            "date": datetime.date.today().isoformat(),
            "seed": SEED,
            "dtype": str(self.dtype).removeprefix("torch."),
            "ceiling_tflops": self.ceiling.flops / 1e12,
            "ceiling_gbps": (self.ceiling.nbytes or 0) / 1e9,
            "ceiling_cache_gbps": (self.ceilings.cache or 0) / 1e9,
        }

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def seconds(self, run: Callable[[], object], cold: bool = True, ahead: float = AHEAD) -> float:
        """One run; `cold`: with the last cache full of something else; `ahead`: seconds that a GPU leaves the host to
        launch what it can before the clock starts."""
        if cold:
            self._flushed.add_(1)
        if not self.on_gpu:
            start = self._now()
            run()
            return self._now() - start
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(int(ahead * 2e9))  # cycles, of two GHz
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def peak_bytes(self, run: Callable[[], object]) -> int:
        """The most that `run` held at once, beyond what was held before it."""
        found: list[int] = []
        with self.recording(found):
            run()
        return found[0]

    @contextmanager
    def recording(self, found: list[int]) -> Iterator[None]:
        """Append to `found` the most that the block held at once, beyond what was held before it."""
        gc.collect()
        if self.on_gpu:
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            yield
            found.append(torch.cuda.max_memory_allocated() - before)
            return
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            yield
        assert recorded.profiler is not None and recorded.profiler.kineto_results is not None
        # Every allocation and release of torch's, also inside operators: kineto's own type, unknown to the stubs.
        events: list[Any] = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
        changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
        found.append(max(itertools.accumulate(changes), default=0))

    @cached_property
    def ceiling(self) -> Work:
        """Per second: FLOPs of a large matrix product, bytes of a large copy; the best of several sizes and tries.

        On a busy machine only what ends within a time slice shows what the chip can do: hence the smaller sizes.
        """
        sizes, copies = ((4096, 8192), (1 << 30,)) if self.on_gpu else ((512, 1024, 2048), (1 << 26, 1 << 28))
        flops = nbytes = 0.0
        for n in sizes:
            a, b = (torch.randn(n, n, device=self.device, dtype=self.dtype) for _ in range(2))
            flops = max(flops, 2 * n**3 / min(self.seconds(partial(torch.mm, a, b), cold=False) for _ in range(12)))
        for count in copies:
            source, target = (torch.zeros(count // 4, device=self.device) for _ in range(2))
            fastest = min(self.seconds(partial(target.copy_, source), cold=False) for _ in range(12))
            nbytes = max(nbytes, 2 * count / fastest)
        return Work(flops, nbytes)

    @property
    def architecture(self) -> str:
        """Of a GPU, as `inrun_kernels.config.CHIPS` names it."""
        from inrun_kernels.tiles import architecture

        return architecture(self.device)

    @cached_property
    def ceilings(self) -> Ceilings:
        """For the static model: what was measured here, and of a GPU what its datasheet says beside."""
        flops, nbytes = self.ceiling.flops, self.ceiling.nbytes or 0.0
        if self.on_gpu:
            count = torch.cuda.get_device_properties(self.device).multi_processor_count
            known = CEILINGS.get(self.architecture, CEILINGS["sm_80"])
            return replace(known, matrix=flops, memory=nbytes, multiprocessors=count)
        source, target = (torch.zeros(1 << 18) for _ in range(2))  # together 2 MB, in a second or third cache
        fastest = min(self.seconds(partial(target.copy_, source), cold=False) for _ in range(50))
        return Ceilings(flops, flops, nbytes, cache=2 * source.nbytes / fastest)


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    machine: Machine,
    *,
    rounds: int,
    least: int,
    seconds: float,
    prepare: Callable[[str], object] = lambda name: None,
    ahead: float = AHEAD,
) -> dict[str, list[float]]:
    """Seconds of each run, round by round; element i of every list is of round i.

    Args:
        runs: what is timed; each has run before.
        rounds: at most so many; a run that has used up its `seconds` and has run `least` rounds is left out of
            further ones.
        prepare: called with the name of a run before it, not timed.
        ahead: as in `Machine.seconds`.
    """
    taken: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            turn = i % len(names)
            for name in names[turn:] + names[:turn]:
                if len(taken[name]) == i and (i < least or sum(taken[name]) < seconds):
                    prepare(name)
                    taken[name].append(machine.seconds(runs[name], ahead=ahead))
    finally:
        gc.enable()
    return taken


def rows_of(
    taken: Mapping[str, list[float]],
    peaks: Mapping[str, int],
    work: Mapping[str, Work],
    machine: Machine,
    predicted: Mapping[str, float],
    **facts: Any,
) -> list[Row]:
    """One self-contained row per provider: its figures, the case's `facts` and the machine's.

    `predicted` are the seconds of the static model, of what it models.
    """
    rows = []
    for name, times in taken.items():
        ratios = [t / base for t, base in zip(times, taken[BASE], strict=False)]
        median, need = statistics.median(times), work[name]
        bound = need.flops / machine.ceiling.flops
        if need.nbytes is not None and machine.ceiling.nbytes is not None:
            bound = max(bound, need.nbytes / machine.ceiling.nbytes)
        rows.append(
            {
                **facts,
                "provider": name,
                "rounds": len(times),
                "ms": median * 1e3,
                "ms_quartiles": [q * 1e3 for q in quartiles(times)],
                "predicted_ms": predicted[name] * 1e3 if name in predicted else None,
                "ratio": statistics.median(ratios),
                "ratio_quartiles": quartiles(ratios),
                "ratio_of_best": min(times) / min(taken[BASE]),
                "tflops": need.flops / median / 1e12,
                "gbps": None if need.nbytes is None else need.nbytes / median / 1e9,
                "flops_per_byte": None if need.nbytes is None else need.flops / need.nbytes,
                "percent_of_ceiling": 100 * bound / median,
                "peak_bytes": peaks[name],
                "load": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
                **machine.facts,
            }
        )
    return rows


def quartiles(values: list[float]) -> list[float]:
    """First and third."""
    if len(values) < 2:
        return [values[0], values[0]]
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return [q1, q3]


def require_close(what: str, found: Tensor | None, expected: Tensor, rtol: float) -> float | None:
    """The gate: raise unless `found` is within `rtol` of `expected`, relative to its root mean square; by how much it
    is off."""
    if found is None:
        return None
    if found.shape != expected.shape:
        raise ValueError(f"{what}: expected shape {tuple(expected.shape)}, got {tuple(found.shape)}")
    error = (found.double() - expected).square().mean().sqrt() / expected.square().mean().sqrt()
    if not error <= rtol:
        raise ValueError(f"{what}: expected the float64 reference to {rtol:g}, got a relative error of {error:.3g}")
    return float(error)


def gated(runs: Mapping[str, Run], check: Callable[[str, Run], None]) -> tuple[dict[str, Run], dict[str, Exception]]:
    """The runs that pass their `check`, and what peers raised that did not; the others are measured all the same."""
    passed, failed = {}, {}
    for name, run in runs.items():
        try:
            check(name, run)
            passed[name] = run
        except Exception as error:
            if name in (BASE, "inrun"):
                raise
            failed[name] = RuntimeError(f"{type(error).__name__}: {error}")  # itself it would hold its tensors
    return passed, failed


class Replay:
    """A clock that stands still, for pytest-benchmark: `replay` moves it by what a round took.

    So its statistics, comparison and JSON hold the interleaved rounds, and nothing is measured twice.
    """

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def replay(self, benchmark: Any, measured: Measured) -> None:
        if isinstance(measured, Exception):
            raise measured
        times, row = measured
        left = iter(times)

        def one_round() -> None:
            self.now += next(left)

        benchmark.pedantic(one_round, rounds=len(times))
        benchmark.extra_info.update(row)


CLOCK = Replay()


def _last_cache_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    known = [int(s[:-1]) << {"K": 10, "M": 20}[s[-1]] for s in sizes if re.fullmatch(r"\d+[KM]", s)]
    return max(known, default=64 << 20)
