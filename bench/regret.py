"""How well `auto` picks: the time of the form it takes over the best form's, on a grid of shapes.

    python -m bench.regret                    # some minutes; rows to runs/bench/<device>-<date>-regret.json
    python -m bench.regret --save-results     # to bench/results/, which is committed
    python -m bench.regret --fit              # also prints the costs that these times say, for inrun_kernels/forms.py
    python -m bench.regret --refit JSON       # costs from the rows of an earlier run, nothing is timed

Every form of a cell is held to float64, then timed round by round with cold caches; the best round counts. A cell where
a form would take more than FLOPS or BYTES is left out, for the time it would take.
"""

import argparse
import dataclasses
import itertools
import json
import statistics
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench import table
from bench.measure import SEED, Machine, Row, interleaved, require_close
from inrun_kernels import forms, native, torch_path

FLOPS, BYTES, RTOL = 4e10, 2e9, 1e-4
TOKENS, BATCHES = (1, 4, 16, 64, 256, 1024, 4096), (1, 8, 64, 512)
MANY = 64  # samples at most of more than a few tokens
WIDTHS = ((64, 64), (64, 8192), (8192, 64), (384, 384), (768, 3072), (3072, 768), (2048, 2048), (8192, 8192))
FORMS = {
    "ghost_wgrad_dot": ("native", "two", "prefix", "direct"),
    "ghost_dot_pairwise": ("pairwise", "direct", "gradients"),
}


def cells() -> Iterator[Row]:
    """Both products; pairs of 8 samples with one or eight of the validation, all of the same length."""
    for (inputs, outputs), tokens, batch, val in itertools.product(WIDTHS, TOKENS, BATCHES, (None, 1, 8)):
        cell: Row = dict(batch=batch, tokens=tokens, inputs=inputs, outputs=outputs, val=val)
        cell["product"] = "ghost_wgrad_dot" if val is None else "ghost_dot_pairwise"
        flops = max(flops for _, flops, *_ in work_of(cell).values())
        elements = tokens * (batch + (val or 0)) * (inputs + outputs) + 4 * inputs * outputs
        if flops <= FLOPS and 4 * elements <= BYTES and (val is None or batch == 8) and (batch <= MANY or tokens <= 4):
            yield cell


def sizes_of(cell: Row) -> tuple[int, ...]:
    """What `forms` wants to know of a cell."""
    tokens, widths = cell["batch"] * cell["tokens"], (cell["inputs"], cell["outputs"])
    if cell["val"] is None:
        return (tokens, cell["batch"], *widths, 1)
    return (tokens, cell["batch"], cell["val"], cell["tokens"], *widths)


def work_of(cell: Row) -> dict[str, tuple[float, ...]]:
    """What each form of a cell has to do."""
    return (forms.wgrad_work if cell["val"] is None else forms.pairwise_work)(*sizes_of(cell))


def chosen(cell: Row, costs: dict[str, dict[str, forms.Cost]], threads: int) -> forms.Choice:
    """What these costs choose, of the forms that were timed."""
    of_product = costs[cell["product"]]
    if cell["val"] is None:
        return forms.quickest_wgrad(of_product, threads, "native" in cell["seconds"], *sizes_of(cell))
    return forms.quickest(of_product, threads, {f: w for f, w in work_of(cell).items() if f in cell["seconds"]})


def measure(cell: Row, machine: Machine) -> Row:
    """The cell with the best time of each form, the form `auto` takes and its regret."""
    generator = torch.Generator().manual_seed(SEED)

    def draw(*shape: int) -> Tensor:  # of one sign, so that a dot is no small difference of large sums
        return torch.rand(shape, generator=generator)

    batch, tokens, inputs, outputs, val = (cell[k] for k in ("batch", "tokens", "inputs", "outputs", "val"))
    acts, grads = draw(batch, tokens, inputs), draw(batch, tokens, outputs)
    if val is None:
        direction = draw(1, outputs, inputs)
        run = partial(torch_path.ghost_wgrad_dot, acts, grads, direction, None)
        built = forms.for_c(acts, None) and native.runs(acts, grads, direction)
        choice = forms.of_wgrad_dot(acts, grads, direction, None, False, built)
        weight_grad = grads.flatten(0, 1).T.double() @ acts.flatten(0, 1).double()
    else:
        val_acts, val_grads = draw(val, tokens, inputs), draw(val, tokens, outputs)
        run = partial(torch_path.ghost_dot_pairwise, acts, grads, val_acts, val_grads)
        choice, built = forms.of_pairwise(acts, grads, val_acts, None), False
        direction, weight_grad = val_grads.mT.double() @ val_acts.double(), None
    dots = torch.stack([((grads.double() @ d.double()) * acts).sum((1, 2)) for d in direction], 1)
    runs = {form: partial(run, form) for form in FORMS[cell["product"]] if form != "native"}
    if built:
        runs = {"native": partial(native.ghost_wgrad_dot, acts, grads, direction, None, None), **runs}
    for form, run_form in runs.items():
        found: Any = run_form()
        if weight_grad is not None:
            require_close(f"{form}, weight gradient", found[0], weight_grad, RTOL)
            found = found[-1]
        require_close(f"{form}, dots", found, dots, RTOL)
    taken = interleaved(runs, machine, rounds=12, least=3, seconds=0.15)
    best = {form: min(times) for form, times in taken.items()}
    return {**cell, "seconds": best, "auto": choice.form, "predicted": choice.seconds, "regret": regret(best, choice)}


def regret(seconds: dict[str, float], choice: forms.Choice) -> float:
    """The time of what was chosen, over the best; the form "two" is the kernel in C where there is one."""
    ran = "native" if choice.form == "two" and "native" in seconds else choice.form
    return seconds[ran] / min(seconds.values())


def fit(rows: list[Row], threads: int) -> dict[str, dict[str, forms.Cost]]:
    """Per product and form the costs, none negative, with the least sum of squared relative errors."""
    from scipy.optimize import nnls

    found: dict[str, dict[str, forms.Cost]] = {}
    for product, names in FORMS.items():
        for form in names:
            of_product = [row for row in rows if row["product"] == product and form in row["seconds"]]
            if not of_product:  # no compiler, or rows from before
                continue
            times = np.array([row["seconds"][form] for row in of_product])
            samples, *shared = np.array([work_of(row)[form] for row in of_product], float).T
            columns = np.stack([np.ones_like(times), samples, *(x / threads for x in shared)], 1) / times[:, None]
            scale = columns.max(0) + 1e-300
            found.setdefault(product, {})[form] = forms.Cost(
                *map(float, nnls(columns / scale, np.ones_like(times))[0] / scale)
            )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--save-results", action="store_true", help="write the JSON to bench/results, to commit")
    parser.add_argument("--fit", action="store_true", help="print the costs that the times say")
    parser.add_argument("--refit", type=Path, metavar="JSON", help="costs from an earlier run's rows")
    args = parser.parse_args()
    if args.refit:
        rows = json.loads(args.refit.read_text())
        return print_fit(rows, rows[0]["threads"])
    machine, rows, started = Machine(), [], time.monotonic()
    grid = list(cells())
    for i, cell in enumerate(grid):
        row = {**measure(cell, machine), **machine.facts}
        rows.append(row)
        times = ", ".join(f"{form} {s * 1e3:.3g}" for form, s in row["seconds"].items())
        said = f"{name_of(row)}: ms {times}; {row['auto']}, regret {row['regret']:.2f}"
        print(f"[{i + 1}/{len(grid)}, {time.monotonic() - started:.0f} s] {said}", flush=True)
    print(summary(rows))
    path = table.write(rows, args.save_results, "-regret")
    print(f"{len(rows)} rows in {path.relative_to(table.ROOT)}")
    if args.fit:
        print_fit(rows, rows[0]["threads"])


def print_fit(rows: list[Row], threads: int) -> None:
    """The fitted costs as source, and the regret with them on the same rows."""
    fitted = fit(rows, threads)
    for product, by_form in fitted.items():
        print(f'"{product}": {{')
        for form, cost in by_form.items():
            print(f'    "{form}": Cost({", ".join(f"{x:.3g}" for x in dataclasses.astuple(cost))}),')
        print("},")
    refitted = [{**row, "regret": regret(row["seconds"], chosen(row, fitted, threads))} for row in rows]
    print(f"with these costs:\n{summary(refitted)}")


def summary(rows: list[Row]) -> str:
    """Median, worst and the worst cells of each product."""
    lines = []
    for product in FORMS:
        of_product = sorted((r for r in rows if r["product"] == product), key=lambda r: -r["regret"])
        middle = statistics.median(r["regret"] for r in of_product)
        worst = "; ".join(f"{r['regret']:.2f} {name_of(r)}" for r in of_product[:5])
        lines.append(f"{product}: regret of {len(of_product)} cells: median {middle:.3f}; the worst: {worst}")
    return "\n".join(lines)


def name_of(row: Row) -> str:
    val = "" if row["val"] is None else f" V{row['val']}"
    return f"B{row['batch']} T{row['tokens']}{val} {row['inputs']}x{row['outputs']}"


if __name__ == "__main__":
    main()
