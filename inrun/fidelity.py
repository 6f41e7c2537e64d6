"""`inrun fidelity`: how near each method's values come to the Shapley value of the real optimizer step.

The game: the players are the samples of one batch, in the middle of training. A coalition's worth is the validation
loss that the optimizer's own next step takes off (its class, its state at that moment, weight decay and all) when the
batch loss holds the coalition's shares alone, the reduction being that of the full batch. Every coalition's step is
taken for real. Up to `ENUMERATED` players the Shapley value is exact, above it is sampled and has confidence intervals.

Learning rates go up to the largest that trains stably, found by short runs, and then to four times that. `sgd_proxy`,
lr * <g_v, g_z>, is what is published for every optimizer (arXiv 2406.11011); `first` on Adam is the fixed-state form of
arXiv 2602.00329. Two columns that are no methods say what is to be had: `path_integral` is what the path methods
approximate, the Aumann-Shapley value, with many nodes: what it misses, no quadrature along the path can be counted on
to find. `coordinates` is the exact Shapley value of every coordinate's own update, at the validation gradient's mean
along the step: what it misses is the bend of the loss between coalitions, which no method that takes one mean sees.

AdamW's rates have two rows more: its first step from no state, and a step clipped to a quarter of its gradient's norm.

Where path values fall short: Lion's sign turns at once, in every coordinate, when one coalition is large enough: a game
of votes, whose Shapley value (`coordinates`) is not a linear function of a sample's gradient. `path` and those after it
take the line that fits it best (`turning.py`). Muon's orthogonalization is such a sign of the whole matrix, and they
do not know one that fits it.
"""

from __future__ import annotations

import copy
import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from . import results, shapley
from .deferred import METHODS as DEFERRED
from .errors import InRunError
from .fidelity_picture import beyond, draw
from .tasks import OPTIMIZERS, Lion, Task, digits_task, gpt_task, loss, predictions, take_steps
from .tracker import track
from .updates import as_optimizers

COLUMNS = ("sgd_proxy", "first", *DEFERRED, "monte_carlo", "path_integral", "coordinates")
KINDS = {
    "digits": tuple(OPTIMIZERS),
    "gpt": ("sgd", "momentum", "adam", "adamw", "lion", "muon"),
}  # fewer where steps are slow
ENUMERATED = 12
FIRST = 1000  # number of the first step after a task's warm start
FRACTIONS = (1 / 16, 1 / 4, 1.0, 4.0)  # of the largest stable learning rate
OTHER_STEPS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {  # of which optimizers, and how `measure` takes them
    "first step": (("adamw", "rmsprop", "adagrad", "muon"), {"steps": 0}),
    "clipped": (("adamw",), {"clipped_to": 1 / 4}),
}
NODES = 16  # of the integral along the path


class StepUtility:
    """U(S): the validation loss that the optimizer's next step takes off with the shares of S alone.

    Args:
        task: whose validation loss; model, optimizer: at the step's beginning; they are copied, not changed.
        x, y: the step's batch, n samples; out_of: what its loss is divided by, None for its mean.
        clipped_to: the part of the batch gradient's norm that gradients are clipped to, None for no clipping.

    Attributes:
        clip: the norm that they are clipped to, or None.
        shares: each sample's share of the batch gradient, float64 [n, P], by one backward pass for each.
    """

    def __init__(
        self,
        task: Task,
        model: nn.Module,
        optimizer: optim.Optimizer,
        x: Tensor,
        y: Tensor,
        out_of: int | None = None,
        clipped_to: float | None = None,
    ) -> None:
        self.task = task
        self.model, self.optimizer = copy.deepcopy((model, optimizer))
        held = [(each, p) for each in as_optimizers(self.optimizer) for g in each.param_groups for p in g["params"]]
        self._states, self.params = [each.state for each, _ in held], [p for _, p in held]
        whole = predictions(y) if out_of is None else out_of
        parts = [loss(self.model, x[i : i + 1], y[i : i + 1], whole) for i in range(len(x))]
        self.shares = torch.stack([self.gradient(part) for part in parts])
        self.clip = None if clipped_to is None else clipped_to * float(self.shares.sum(0).norm())
        self.validation_gradient = self.gradient(task.validation_loss(self.model))
        self.before = float(task.validation_loss(self.model).detach())
        self._weights = [p.detach().clone() for p in self.params]
        self._before = [copy.deepcopy(states[p]) for states, p in zip(self._states, self.params, strict=True)]

    def gradient(self, scalar: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(scalar, self.params)])

    @torch.no_grad()
    def __call__(self, members: np.ndarray) -> float:
        self.stepped(torch.from_numpy(members).to(self.shares.dtype) @ self.shares)
        return self.before - float(self.task.validation_loss(self.model))

    @torch.no_grad()
    def stepped(self, gradient: Tensor) -> Tensor:
        """The weights after the step with this gradient, [P], where the model then stands."""
        if self.clip is not None:
            gradient = gradient * (self.clip / (gradient.norm() + 1e-6)).clamp(max=1.0)
        parts = gradient.split([p.numel() for p in self.params])
        held = zip(self.params, self._weights, self._states, self._before, parts, strict=True)
        for p, weight, states, before, part in held:
            p.copy_(weight)
            p.grad = part.view_as(p)
            states[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in before.items()}
        self.optimizer.step()
        return parameters_to_vector(self.params).detach()

    def path_integral(self, nodes: int = NODES) -> np.ndarray:
        """The Aumann-Shapley value, [n]: all shares grow from 0 to full together, by the midpoint rule."""
        whole = self.shares.sum(0)
        ends = [self.stepped(whole * (k / nodes)) for k in range(nodes + 1)]
        removed = torch.zeros_like(whole)
        for a, b in itertools.pairwise(ends):
            removed -= (b - a) * self.validation_gradient_at((a + b) / 2)
        return (self.shares @ (removed / whole).masked_fill(whole == 0, 0.0)).numpy()

    def coordinates(self, nodes: int = NODES) -> np.ndarray:
        """The Shapley value of each coordinate's update, at the validation gradient's mean along the step, [n]."""
        nobody, everybody = self.stepped(0 * self.shares[0]), self.stepped(self.shares.sum(0))
        along = [torch.lerp(nobody, everybody, (k + 0.5) / nodes) for k in range(nodes)]
        mean = torch.stack([self.validation_gradient_at(weights) for weights in along]).mean(0)

        def weights(members: np.ndarray) -> np.ndarray:
            return self.stepped(torch.from_numpy(members).to(self.shares.dtype) @ self.shares).numpy()

        return -shapley.exact(weights, len(self.shares))[0] @ mean.numpy()

    def validation_gradient_at(self, weights: Tensor) -> Tensor:
        vector_to_parameters(weights, self.params)
        return self.gradient(self.task.validation_loss(self.model))


def continued(
    task: Task, start: nn.Module, kind: str, lr: float, steps: int, size: int, seed: int
) -> tuple[nn.Module, optim.Optimizer]:
    """A copy of `start` after some steps of an optimizer, and that optimizer with the state it has by then."""
    model = copy.deepcopy(start)
    optimizer = OPTIMIZERS[kind][0](model.parameters(), lr)
    take_steps(task, model, optimizer, range(FIRST, FIRST + steps), size, seed)
    return model, optimizer


def trains_stably(task: Task, starts: Sequence[nn.Module], kind: str, lr: float, steps: int, size: int) -> bool:
    """Whether the training loss falls by more than it ever rises: looked at ten times in `steps` steps from `starts`.

    The fall is from the start to the mean of the last five looks. The training loss, as the validation text may be of
    another kind, which may get worse while training goes well; over the same samples at every look, and the mean over
    starts. Some batches raise the loss at every rate, however small: rise and fall are then both in proportion to it.
    """
    runs = [continued(task, start, kind, lr, 0, size, 0) for start in starts]
    before = _mean_training_loss(task, starts)
    looks = []
    for part in np.array_split(np.arange(FIRST, FIRST + steps), 10):
        for seed, (model, optimizer) in enumerate(runs):
            take_steps(task, model, optimizer, part.tolist(), size, seed)
        looks.append(_mean_training_loss(task, [model for model, _ in runs]))
    return bool(max(looks) - before < before - np.mean(looks[5:]))


@torch.no_grad()
def _mean_training_loss(task: Task, models: Sequence[nn.Module]) -> float:
    return float(np.mean([float(task.training_loss(m)) for m in models]))


def largest_stable(task: Task, starts: Sequence[nn.Module], kind: str, steps: int, size: int) -> float:
    """The largest learning rate, on a grid of factor 2, at which training is stable (see `trains_stably`)."""
    usual = lr = OPTIMIZERS[kind][1]
    while not trains_stably(task, starts, kind, lr, steps, size):
        lr /= 2
        if lr < usual / 1000:
            raise InRunError(f"{task.name}, {kind}: no learning rate from {lr:g} to {usual:g} trains stably")
    while trains_stably(task, starts, kind, 2 * lr, steps, size):
        lr *= 2
    return lr


def applicable(kind: str, size: int, clipped: bool = False) -> list[str]:
    """The columns that are defined for an optimizer and a batch of this size, and where gradients are clipped."""
    if clipped:
        without = ("sgd_proxy", "path_integral")  # the one knows nothing of it, the other goes coordinate by coordinate
        return [m for m in applicable(kind, size) if m not in without]
    always = [m for m in COLUMNS if m.startswith("path") or m == "monte_carlo"]
    if size <= ENUMERATED:
        always.append("coordinates")
    if kind in ("sgd", "momentum", "nesterov"):
        return ["first", "second", "secant", *always]
    if kind == "muon":  # coordinate by coordinate there is no integral
        always.remove("path_integral")
    return ["sgd_proxy", *(["first", "secant"] if kind in ("adam", "adamw") else []), *always]


def tracked_values(
    method: str,
    task: Task,
    model: nn.Module,
    optimizer: optim.Optimizer,
    x: Tensor,
    y: Tensor,
    out_of: int | None = None,
    clip: float | None = None,
) -> tuple[np.ndarray, float | None]:
    """The tracker's values of this step, and the drop it measured (where the method does); on copies."""
    model, optimizer = copy.deepcopy((model, optimizer))
    update = "elementwise" if isinstance(optimizer, Lion) else None
    options: dict[str, Any] = {"clip": clip} if method.startswith("path") or method == "monte_carlo" else {}
    tracker = track(model, optimizer, method, validation=lambda: task.validation_loss(model), update=update, **options)
    with tracker.step(range(len(x))) as step:
        loss(model, x, y, out_of).backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
    tracker.close()
    drop = step.drop.get("validation")
    return step.values.double().numpy(), None if drop is None else float(drop)


def measure(
    task: Task,
    start: nn.Module,
    kind: str,
    lr: float,
    *,
    steps: int,
    size: int,
    seed: int,
    permutations: int = 60,
    clipped_to: float | None = None,
) -> dict[str, Any]:
    """One step's Shapley value, and every method's distance from it; `clipped_to` as of `StepUtility`.

    Returns:
        A row: task, optimizer, lr, seed, batch, total (the step's drop net of u(0), nats), truth (the Shapley value),
        half_width (of its 95% confidence interval; None where exact), values and fidelity by method.
    """
    model, optimizer = continued(task, start, kind, lr, steps, size, seed)
    x, y = task.batch(FIRST + steps, size, seed)
    utility = StepUtility(task, model, optimizer, x, y, clipped_to=clipped_to)
    half_width = None
    if size <= ENUMERATED:
        truth, total = shapley.exact(utility, size)
    else:
        truth, half_width, total = shapley.monte_carlo(utility, size, permutations, seed)
    values: dict[str, np.ndarray] = {}
    for method in applicable(kind, size, clipped_to is not None):
        if method == "sgd_proxy":
            values[method] = lr * (utility.shares @ utility.validation_gradient).numpy()
            continue
        if method in ("path_integral", "coordinates"):
            values[method] = getattr(utility, method)()
            continue
        values[method], drop = tracked_values(method, task, model, optimizer, x, y, clip=utility.clip)
        if drop is not None and not math.isclose(drop, total, rel_tol=1e-6, abs_tol=1e-9):
            raise InRunError(f"{task.name}, {kind}, lr {lr:g}: the tracker's drop is {drop:g}, the game's {total:g}")
    return {
        "task": task.name,
        "optimizer": kind,
        "lr": lr,
        "seed": seed,
        "batch": size,
        "total": float(total),
        "truth": truth.tolist(),
        "half_width": None if half_width is None else half_width.tolist(),
        "values": {m: v.tolist() for m, v in values.items()},
        "fidelity": {m: shapley.fidelity(v, truth, total) for m, v in values.items()},
    }


def run(
    tasks: Sequence[Task],
    *,
    kinds: Mapping[str, Sequence[str]] = KINDS,
    seeds: int = 2,
    size: int = 8,
    sampled: int = 24,
    steps: int = 40,
    permutations: int = 60,
) -> dict[str, Any]:
    """The suite.

    Args:
        tasks: see `inrun.tasks`; kinds: task -> names among its `OPTIMIZERS`.
        seeds: runs for each optimizer and rate; size: their batch.
        sampled: size of the larger batches, whose Shapley value is sampled (adamw alone); 0 for none.
        steps: of training before the step that is measured; permutations: orders that are sampled.

    Returns:
        provenance; `largest`: task -> optimizer -> the largest stable rate; and `rows` as `measure` gives them, each
        with its rate as a part of that (`of_largest`). Progress goes to stderr.
    """
    rows: list[dict[str, Any]] = []
    largest: dict[str, dict[str, float]] = {}
    for task in tasks:
        starts = [task.start(seed) for seed in range(seeds)]
        largest[task.name] = {}
        for kind in kinds[task.name]:
            top = largest[task.name][kind] = largest_stable(task, starts, kind, steps, size)
            print(f"{task.name}, {kind}: trains stably up to a rate of {top:g}", file=sys.stderr, flush=True)
            cases = [(part, size, s) for part in FRACTIONS for s in range(seeds)]
            if kind == "adamw" and sampled:
                cases.append((1 / 4, sampled, 0))
            for part, batch, s in cases:
                options = {"steps": steps, "size": batch, "seed": s, "permutations": permutations}
                rows.append({**measure(task, starts[s], kind, top * part, **options), "of_largest": part})
            for name, (of_kinds, other) in OTHER_STEPS.items():
                for s in range(seeds) if kind in of_kinds else ():
                    options = {"steps": steps, "size": size, "seed": s, "permutations": permutations, **other}
                    row = measure(task, starts[s], kind, top / 4, **options)
                    rows.append({**row, "optimizer": f"{kind}, {name}", "of_largest": 1 / 4})
    return {**results.provenance(0), "steps": steps, "seeds": seeds, "largest": largest, "rows": rows}


def medians(rows: Sequence[dict[str, Any]], method: str, metric: str) -> float | None:
    """The median of one figure over seeds; None where the method is not defined."""
    found = [row["fidelity"][method][metric] for row in rows if method in row["fidelity"]]
    return float(np.median(found)) if found else None


def cells(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str, float, int], list[dict[str, Any]]]:
    """The rows of each (task, optimizer, lr, batch), one for each seed."""
    grouped: dict[tuple[str, str, float, int], list[dict[str, Any]]] = {}
    for row in rows:
        grouped.setdefault((row["task"], row["optimizer"], row["lr"], row["batch"]), []).append(row)
    return grouped


def as_text(found: dict[str, Any]) -> str:
    """Per task: Pearson / relative error / efficiency gap, medians over seeds; then where the aim is missed, with the
    lowest Pearson of a seed."""
    parts = []
    for task in found["largest"]:
        lines = []
        for (name, kind, lr, batch), rows in cells(found["rows"]).items():
            if name != task:
                continue
            width = rows[0]["half_width"]
            noise = "" if width is None else f" +-{np.mean(width) / np.std(rows[0]['truth']):.2f}sd"
            figures = [_figures(rows, m) for m in COLUMNS]
            lines.append([f"{kind} {lr:.3g}{beyond(rows)}", f"{batch}{noise}", *figures])
        body = results.table(["", "batch", *COLUMNS], lines)
        parts.append(f"{task}: Pearson / relative error / efficiency gap\n{body}")
    for method in ("path_secant", "path_simpson", "path_integral", "coordinates"):
        missed = []
        for (task, kind, lr, _), rows in cells(found["rows"]).items():
            r, gap = (medians(rows, method, metric) for metric in ("pearson", "efficiency_gap"))
            if rows[0]["half_width"] is None and r is not None and gap is not None and (r < 0.999 or gap > 0.01):
                name = f"{task}, {kind}, lr {lr:.3g}{beyond(rows)}"
                lowest = min(row["fidelity"][method]["pearson"] for row in rows)
                missed.append(f"  {name}: Pearson {r:.4f} (lowest {lowest:.4f}), efficiency gap {gap:.1%}")
        parts.append(f"{method} below Pearson .999 or above a gap of 1%:\n" + ("\n".join(missed) or "  none"))
    return "\n\n".join(parts)


def _figures(rows: Sequence[dict[str, Any]], method: str) -> str:
    r, error, gap = (medians(rows, method, m) for m in ("pearson", "relative_error", "efficiency_gap"))
    return "-" if r is None or error is None or gap is None else f"{r:.4f}/{error:.3f}/{gap:.3f}"


def main(out: Path, seeds: int = 2) -> None:
    """The whole suite: prints the table, writes fidelity.json and a picture of each task into `out`."""
    results.require_matplotlib()
    if seeds < 1:
        raise ValueError(f"seeds: expected at least 1, got {seeds}")
    found = run([digits_task(), gpt_task()], seeds=seeds)
    print(as_text(found))
    figures = {}
    for task in found["largest"]:
        of_task = {key[1:]: rows for key, rows in cells(found["rows"]).items() if key[0] == task}
        figures[f"-{task}"] = draw(task, of_task, COLUMNS, medians)
    for path in results.write(out, "fidelity", found, figures):
        print(path)
