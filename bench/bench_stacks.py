"""What scoring adds to a training step in each training stack: the same small Llama, scored and plain side by side.

    python -m bench.bench_stacks                   # prints the table; rows to runs/bench/stacks.json
    python -m bench.bench_stacks --save-results    # rows to bench/results, and the table into README.md
    python -m bench.bench_stacks --quick           # a tiny model and few rounds: whether it runs

Every stack makes a plain and a scored step in turn, in one process, and its ratio is relative to its own plain step. A
validation gradient serves several steps; the tracker's own seconds say what its pass took, so that it can be left out.
"""

import functools
import json
import os
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn.parallel import DistributedDataParallel as DDP

from bench import table
from bench.measure import BASE, Machine, Row, interleaved, require_close, rows_of
from bench.stacks import EVERY, STACKS, Llama, Run, Setup, Turn, loop

START, END = "<!-- stacks: python -m bench.bench_stacks --save-results -->", "<!-- stacks end -->"
SCORED, PROCESSES = "scored", 2
DISTRIBUTED = f"DDP, {PROCESSES} processes"
CASE, GPU_CASE, QUICK = (
    Llama(8, 256, 384, 3, 256, True),
    Llama(16, 1024, 768, 12, 32000, True),
    Llama(4, 16, 64, 1, 64, True),
)
RTOL = {"bf16 autocast": 1e-1}  # of a first step's values, beside the plain loop's; else 1e-3
Figures = dict[str, Any]


def measured(stack: Any, case: Llama, machine: Machine, rounds: int) -> Figures:
    """A stack's seconds and peak bytes, plain and scored, seconds of its validation passes, values of a first step."""
    runs = {name: Run(stack, Setup(case, machine.device, name == SCORED), machine) for name in (BASE, SCORED)}
    spent: list[float] = []  # in validation, step by step

    def scored() -> None:
        before = runs[SCORED].tracker.seconds["validation"]
        runs[SCORED]()
        spent.append(runs[SCORED].tracker.seconds["validation"] - before)

    for _ in range(2):  # the first step checks its sums; graphs are compiled
        runs[BASE]()
        scored()
    values = runs[SCORED].tracker.ledger.rows().to_pylist()
    peaks = {name: run.peak_bytes() for name, run in runs.items()}
    taken = interleaved({BASE: runs[BASE], SCORED: scored}, machine, rounds=rounds, least=rounds, seconds=0)
    for run in runs.values():
        run.close()
    passes = spent[-rounds:]
    taken[SCORED] = [t - p for t, p in zip(taken[SCORED], passes, strict=True)]
    first = [row["value"] for row in values if row["step"] == 0]
    return {"taken": taken, "peaks": peaks, "passes": [p for p in passes if p > 0], "values": first}


def distributed(case: Llama, machine: Machine, rounds: int) -> Figures:
    """The same of DDP in processes of one thread each, as the first of them has it."""
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (folder, case, rounds), nprocs=PROCESSES)  # pyright: ignore[reportPrivateImportUsage]
        found = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(PROCESSES)]
    return found[0] | {"values": [v for each in found for v in each["values"]]}


def _process(rank: int, folder: str, case: Llama, rounds: int) -> None:
    warnings.simplefilter("ignore")
    os.environ["OMP_NUM_THREADS"] = "1"
    machine = Machine(wall=True)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=PROCESSES)
    share = case.batch // PROCESSES
    rows = slice(rank * share, (rank + 1) * share)

    def stack(setup: Setup, turn: Turn) -> None:
        loop(setup, turn, wrapped=DDP, rows=rows)

    found = measured(stack, case, machine, rounds)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def rows(machine: Machine, case: Llama, rounds: int) -> list[Row]:
    """Two rows of every stack: its first values checked, then timed."""
    runs: dict[str, Callable[..., Figures]] = {
        name: functools.partial(measured, stack) for name, stack in STACKS.items()
    }
    if not machine.on_gpu:
        runs[DISTRIBUTED] = distributed
    found: list[Row] = []
    expected = None
    for name, run in runs.items():
        print(name, file=sys.stderr, flush=True)
        figures = run(case, machine, rounds)
        values = torch.tensor(figures["values"], dtype=torch.float64)
        expected = values if expected is None else expected
        require_close(name, values, expected, RTOL.get(name, 1e-3))
        facts = {"suite": "stacks", "case": name, "model": f"Llama {case}", "validate_every": EVERY}
        of_stack = rows_of(
            figures["taken"], figures["peaks"], {n: case.work() for n in (BASE, SCORED)}, machine, {}, **facts
        )
        plain, scored = of_stack
        scored["pass_ms"] = statistics.median(figures["passes"]) * 1e3
        scored["ratio_with_passes"] = scored["ratio"] + scored["pass_ms"] / plain["ms"] / EVERY
        scored["memory_ratio"] = scored["peak_bytes"] / plain["peak_bytes"]
        found += of_stack
    return found


def as_markdown(rows: list[Row]) -> str:
    pairs = list(zip(rows[::2], rows[1::2], strict=True))
    first = rows[0]
    lines = [
        "What scoring adds in each training stack (`python -m bench.bench_stacks`), beside the same stack without it:",
        "",
        f"| | plain, ms | scored | quartiles | with a validation pass every {EVERY} steps | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for plain, scored in pairs:
        low, high = scored["ratio_quartiles"]
        lines.append(
            f"| {plain['case']} | {plain['ms']:.0f} | {scored['ratio']:.2f} | {low:.2f}-{high:.2f} | "
            f"{scored['ratio_with_passes']:.2f} | {scored['memory_ratio']:.2f} |"
        )
    note = (
        f"Ratios to the stack's own plain step; {first['model']}, fused AdamW, {first['device']}, {first['threads']} "
        f"threads ({DISTRIBUTED}: one each), {first['dtype']}. `scored` leaves validation passes out, as many samples "
        "as a batch has. torch.compile is inductor; SFTTrainer has TRL's fused output layer when plain, and calls the "
        "layer when scored."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    warnings.simplefilter("ignore")
    save, quick = "--save-results" in sys.argv, "--quick" in sys.argv
    machine = Machine(wall=True)
    case = QUICK if quick else GPU_CASE if machine.on_gpu else CASE
    found = rows(machine, case, EVERY if quick else 2 * EVERY)
    table.publish(found, "stacks", as_markdown(found), (START, END), save)


if __name__ == "__main__":
    main()
