"""What every method and option costs in a whole training step, in time and memory, as a ratio to plain training.

    python -m bench.bench_variants                   # prints the table; rows to runs/bench/variants.json
    python -m bench.bench_variants --save-results    # rows to bench/results, and the table into README.md

Every validation pass that a variant needs is in its time; the validation batch is as large as the training batch. One
such pass is timed by itself, so that the table can show what is left without them.
"""

import copy
import functools
import gc
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import inrun
from bench import table
from bench.bench_step import GPU_CASES, RTOL, Case
from bench.measure import BASE, Machine, Row, interleaved, require_close, rows_of
from bench.peers import LR, Training, loss_of
from inrun import turning

START, END = "<!-- variants: python -m bench.bench_variants --save-results -->", "<!-- variants end -->"
PASS = "validation pass"
DOCUMENTS = 4  # in a row
ORDERS = 8
# Held to each other in the second step: in its first Adam moves each coordinate at its full rate, be its gradient the
# rounding of bfloat16, and there `path` differs from itself, run again.
TWICE = ("path", "path, recompute")
TOGETHER = 4  # variants whose models a GPU holds at a time
CPU_CASE = Case(8, 256, 384, 3, 256, tied=True)  # half the layers of bench_step's, to end within five minutes


@dataclass(frozen=True)
class Variant:
    """A method with its options: of `inrun.track`, and of `Tracker.step`."""

    method: str = "first"
    track: dict[str, Any] = field(default_factory=dict)
    layout: dict[str, Any] = field(default_factory=dict)
    documents: int = 1  # in a row
    targets: int = 1
    sgd: bool = False
    recompute: bool = False
    turns: bool = False  # whether the update is taken for one that turns at once, as Adam's first are


class Tracked(Training):
    """Training with values; counts the validation passes, those with a backward of the last step in `passes`."""

    def __init__(self, model: nn.Module, variant: Variant, x: Tensor, y: Tensor) -> None:
        super().__init__(model, {})
        if variant.sgd:
            self.optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        self.variant, self.passes = variant, 0

        def validation() -> Tensor:
            self.passes += torch.is_grad_enabled()
            return loss_of(model, x, y)

        losses = {f"target {i}": validation for i in range(variant.targets)}
        options = dict(variant.track)
        if "pairwise" in options:
            options["pairwise"] = {name: range(len(x)) for name in losses}
        self.tracker = inrun.track(model, self.optimizer, variant.method, validation=losses, **options)
        self.drops: list[Tensor] = []  # of each step, where it is measured
        self.untracked = functools.partial(loss_of, model, x, y)

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        turning.TURNS = -1.0 if self.variant.turns else 1.0
        recompute = functools.partial(loss_of, self.model, x, y) if self.variant.recompute else None
        count, self.passes = len(x) * self.variant.documents, 0
        with self.tracker.step(range(count), recompute=recompute, **self.variant.layout) as step:
            super().__call__(x, y)
            self.optimizer.zero_grad()
        self.drops += step.drop.values()
        return step.values

    def with_slopes(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Values of a step; and what its move, net of weight decay, takes off the validation loss by the gradients at
        either end, `[2]`, from the weights before it and after."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        (group,) = self.optimizer.param_groups
        before = torch.autograd.grad(self.untracked(), params)
        start = [p.detach() * (1 - group["lr"] * group["weight_decay"]) for p in params]
        values = self(x, y)
        after = torch.autograd.grad(self.untracked(), params)
        move = [p.detach() - s for p, s in zip(params, start, strict=True)]
        ends = ([(g * m).sum(dtype=torch.float64) for g, m in zip(end, move, strict=True)] for end in (before, after))
        return values, -torch.stack([torch.stack(parts).sum() for parts in ends])


def variants(batch: int, tokens: int, on_gpu: bool) -> dict[str, Variant]:
    ends = torch.arange(0, batch * tokens + 1, tokens // DOCUMENTS)
    found = {
        "first": Variant(),
        "first, documents": Variant(layout={"tokens": tokens, "segments": ends}, documents=DOCUMENTS),
        "first, tokens": Variant(layout={"tokens": tokens}),
        "first, 3 targets": Variant(targets=3),
        "first, pairwise": Variant(track={"pairwise": True}),
        "second (SGD)": Variant("second", sgd=True),
        "secant": Variant("secant"),
        "path": Variant("path"),
        "path, recompute": Variant("path", recompute=True),
        "path_secant": Variant("path_secant"),
        "path_secant, turning": Variant("path_secant", turns=True),
        "path_simpson": Variant("path_simpson"),
        f"monte_carlo, {ORDERS} orders": Variant("monte_carlo", {"permutations": ORDERS}),
    }
    if on_gpu:
        found["path, keep='host'"] = Variant("path", {"keep": "host"})
    return found


def require_right(values: dict[str, Tensor], drops: dict[str, Tensor], slopes: dict[str, Tensor], rtol: float) -> None:
    """The gate: each kind of value against the one it is a part of, or against the drop of the loss that was measured.
    Where that is not in the middle third of the two ends' `slopes`, as in a deep model's first step, path_secant takes
    their mean.

    `first` itself is held to float64 in bench_step, all of them in the tests.
    """
    first = values["first"].double()
    sums = {
        "first, documents": lambda found: found.view(len(first), -1).sum(1),
        "first, tokens": lambda found: found.sum(1),
        "first, 3 targets": lambda found: found.mean(1),
        "first, pairwise": lambda found: found.sum(1),
    }
    for name, summed in sums.items():
        if name in values:
            require_close(name, summed(values[name]), first, rtol)
    if "path, recompute" in values:
        require_close("path, recompute", values["path, recompute"], values["path"].double(), rtol)
    for name in ("path_secant", "path_secant, turning", "path_simpson", f"monte_carlo, {ORDERS} orders"):
        if name not in values:
            continue
        allowed = [drops[name]]
        if name in slopes:
            a, b = slopes[name]
            if abs(drops[name] - (a + b) / 2) > abs(b - a) / 7:  # a seventh: it is a sixth but for rounding
                allowed.append((a + b) / 2)
        if min(abs(values[name].sum() - total) for total in allowed) > 1e-2 * values[name].abs().sum():
            said = " or ".join(f"{total:.4g}" for total in allowed)
            raise ValueError(f"{name}: expected the drop, {said}, as a sum, got {values[name].tolist()}")


def measured(machine: Machine, case: Case) -> list[Row]:
    """Every variant of one case, some at a time beside plain training."""
    model = case.model().to(machine.device)
    batches = torch.randint(case.vocab, (4, case.batch, case.tokens), device=machine.device)
    every = list(variants(case.batch, case.tokens, machine.on_gpu).items())
    together = TOGETHER if machine.on_gpu else len(every)
    values: dict[str, Tensor] = {}
    drops: dict[str, Tensor] = {}
    slopes: dict[str, Tensor] = {}
    found = []
    for at in range(0, len(every), together):
        rows = group(machine, case, model, batches, dict(every[at : at + together]), values, drops, slopes)
        found += rows[2 * bool(found) :]  # plain training and the pass of the first group
        gc.collect()  # trackers and their losses hold each other
    return found


def group(
    machine: Machine,
    case: Case,
    model: nn.Module,
    batches: Tensor,
    some: dict[str, Variant],
    values: dict[str, Tensor],
    drops: dict[str, Tensor],
    slopes: dict[str, Tensor],
) -> list[Row]:
    """Values of the first steps (of TWICE the second), from one model, checked, then peak bytes, then timed side by
    side. `values`, `drops` and `slopes` grow. A variant that a GPU has no memory for is left out, but for those that
    others are held to."""
    x, y, val_x, val_y = batches
    runs: dict[str, Any] = {BASE: Training(copy.deepcopy(model), {}), PASS: Pass(copy.deepcopy(model), val_x, val_y)}
    peaks, passes = {}, {}
    for name, variant in {BASE: None, PASS: None, **some}.items():
        print(f"{name}: memory", file=sys.stderr, flush=True)
        try:
            if variant is not None:
                runs[name] = Tracked(copy.deepcopy(model), variant, val_x, val_y)
                if variant.method == "path_secant":
                    values[name], slopes[name] = runs[name].with_slopes(x, y)
                else:
                    values[name] = runs[name](x, y)  # it also checks its own sums
                if runs[name].drops:
                    drops[name] = runs[name].drops[0]
                if name in TWICE:
                    values[name] = runs[name](x, y)
            peaks[name] = peak_bytes(runs[name], machine, x, y)
        except torch.OutOfMemoryError as error:
            if name in (BASE, PASS, "first", "path"):
                raise
            print(f"{name}: {error}", file=sys.stderr, flush=True)
            runs.pop(name, None)
            continue
        passes[name] = 0 if variant is None else runs[name].passes
    require_right(values, drops, slopes, RTOL[machine.dtype])
    calls: dict[str, Callable[[], object]] = {name: functools.partial(run, x, y) for name, run in runs.items()}
    taken = interleaved(calls, machine, rounds=9, least=3, seconds=5)
    rows = rows_of(taken, peaks, dict.fromkeys(runs, case.work()), machine, {}, suite="variants", case=str(case))
    one = next(row["ratio"] for row in rows if row["provider"] == PASS)
    for row in rows:
        row["passes"] = passes[row["provider"]]
        row["ratio_without_passes"] = row["ratio"] - row["passes"] * one
        row["memory_ratio"] = row["peak_bytes"] / peaks[BASE]
    return rows


class Pass(Training):
    """A validation pass alone: forward and backward."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor) -> None:
        super().__init__(model, {})
        self.x, self.y = x, y

    def __call__(self, x: Tensor, y: Tensor) -> None:
        self.optimizer.zero_grad()
        loss_of(self.model, self.x, self.y).backward()


def peak_bytes(run: Any, machine: Machine, x: Tensor, y: Tensor) -> int:
    """The most that is held in two steps, the first of which makes all that the second one finds and frees."""
    run.optimizer.zero_grad()
    if isinstance(run, Tracked):
        validations = run.tracker.validations
        validations.gradients.clear()
        validations.age = dict.fromkeys(validations.targets)
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in run.resident()}
    return sum(held.values()) + machine.peak_bytes(lambda: (run(x, y), run(x, y)))


def as_markdown(rows: list[Row]) -> str:
    by_name = {row["provider"]: row for row in rows}
    plain, one = by_name.pop(BASE), by_name.pop(PASS)
    lines = [
        "What each variant costs (`python -m bench.bench_variants`), with every validation pass that it needs:",
        "",
    ]
    lines += ["| | time | of it without validation passes | validation passes | peak memory |", "|---|---|---|---|---|"]
    for name, row in by_name.items():
        figures = (f"{row[key]:.2f}" for key in ("ratio", "ratio_without_passes"))
        lines.append(f"| {name} | {' | '.join(figures)} | {row['passes']} | {row['memory_ratio']:.2f} |")
    note = (
        f"Ratios to plain training ({plain['ms']:.0f} ms, and {plain['peak_bytes'] / 1e6:.0f} MB, weights and AdamW's "
        f"state included); {plain['case']}, {plain['device']}, {plain['threads']} threads, {plain['dtype']}. A "
        f"validation pass over as many samples takes {one['ratio']:.2f}. monte_carlo's "
        "own, one for each coalition that its orders meet, have no backward and are left in. `turning`: a step whose "
        "update turns at once."
    )
    return "\n".join([*lines, "", note])


def main() -> None:
    warnings.simplefilter("ignore")
    save = "--save-results" in sys.argv
    machine = Machine()
    rows = measured(machine, GPU_CASES[0] if machine.on_gpu else CPU_CASE)
    table.publish(rows, "variants", as_markdown(rows), (START, END), save)


if __name__ == "__main__":
    main()
