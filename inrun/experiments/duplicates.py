"""Copies: n copies of a sample in one batch share what one would earn, where the step is no longer linear.

A batch holds four samples and n copies of a fifth, each with the share of the loss it has in a batch of five (the
paper's theory sums over the batch). The model gets the fifth wrong, and is judged on images of its class. First-order
values pay every copy as if it were alone. What the optimizer really does for one more copy shrinks with every copy,
which the exact Shapley value, second order and path values see.

Source: arXiv 2406.11011, section 4.2; the truth is enumerated over all coalitions.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn, optim

from .. import results, shapley
from ..deferred import METHODS
from ..fidelity import StepUtility, continued, tracked_values
from ..tasks import Task, digits_task
from . import Finding, panels

OTHERS = 4
COPIES = (1, 2, 4, 8)
SETTINGS = (("sgd", 0.0125), ("sgd", 0.05), ("adam", 0.01))  # optimizer, learning rate


def run(seed: int = 0, samples: int = 10, copies: tuple[int, ...] = COPIES) -> Finding:
    """The value of one copy among n, over that of a lone one; ratio of means over `samples` different samples, with the
    standard error that drawing them again makes."""
    task = digits_task()
    start = task.start(seed)
    data: dict[str, Any] = {"copies": list(copies), "value_of_one_copy": {}, "ratio_standard_error": {}}
    tables = []
    for kind, lr in SETTINGS:
        model, optimizer = continued(task, start, kind, lr, 20, 8, seed)
        methods = ["first", *METHODS] if kind == "sgd" else ["first", *(m for m in METHODS if m != "second")]
        useful = _useful(task, model, samples, seed)
        paid = {m: np.zeros((len(useful), len(copies))) for m in ("exact Shapley", *methods)}
        for i, (x, y) in enumerate(useful):
            about = task.validation[1] == y[-1]
            narrow = replace(task, validation=(task.validation[0][about], task.validation[1][about]))
            for k, n in enumerate(copies):
                for method, values in _values(narrow, model, optimizer, x, y, n, methods).items():
                    paid[method][i, k] = values[OTHERS:].mean()
        setting, means = f"{kind}, lr {lr:g}", {m: v.mean(0) for m, v in paid.items()}
        data["value_of_one_copy"][setting] = {m: v.tolist() for m, v in means.items()}
        errors = data["ratio_standard_error"][setting] = {m: _errors(v, seed).tolist() for m, v in paid.items()}
        body = [
            [m, f"{v[0]:.4f}", *(f"{r:.2f} +-{e:.2f}" for r, e in zip(v / v[0], errors[m], strict=True))]
            for m, v in means.items()
        ]
        head = [setting, "nats, alone", *(f"n={n}" for n in copies)]
        tables.append(results.table(head, body))
    sharing = ", ".join(f"{1 / n:.2f}" for n in copies)
    text = f"duplicates: what one copy among n earns, over what it earns alone (equal shares: {sharing})\n"
    return Finding(text + "\n\n".join(tables), data, _draw(data))


def _errors(paid: np.ndarray, seed: int) -> np.ndarray:
    """By bootstrap over samples `[samples, copies]`, of the means over that of a lone copy."""
    drawn = np.random.default_rng(seed).integers(len(paid), size=(1000, len(paid)))
    means = paid[drawn].mean(1)
    return (means / means[:, :1]).std(0)


def _useful(task: Task, model: nn.Module, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of `OTHERS` samples and one more, which the model gets wrong: it has something to teach."""
    found = []
    x, y = task.train
    with torch.no_grad():
        wrong = torch.nonzero(model(x).argmax(1) != y)[:, 0].numpy()
    rng = np.random.default_rng(seed)
    for z in rng.choice(wrong, count, replace=False):
        chosen = [*rng.choice(len(x), OTHERS, replace=False), z]
        found.append((x[chosen], y[chosen]))
    return found


def _values(
    task: Task, model: nn.Module, optimizer: optim.Optimizer, x: Tensor, y: Tensor, n: int, methods: list[str]
) -> dict[str, np.ndarray]:
    """The values of the batch with its last sample n times, by every method and by enumeration."""
    many = torch.cat([x, x[-1:].expand(n - 1, -1)]), torch.cat([y, y[-1:].expand(n - 1)])
    out_of = OTHERS + 1
    truth, _ = shapley.exact(StepUtility(task, model, optimizer, *many, out_of), OTHERS + n)
    values = {"exact Shapley": truth}
    for method in methods:
        values[method] = tracked_values(method, task, model, optimizer, *many, out_of)[0]
    return values


def _draw(data: dict[str, Any]) -> Any:
    figure, of_settings = panels(13, 4, [1] * len(SETTINGS))
    copies = np.array(data["copies"])
    for axes, (setting, means) in zip(of_settings, data["value_of_one_copy"].items(), strict=True):
        for method, values in means.items():
            exact = method == "exact Shapley"
            colour = "black" if exact else f"C{('first', *METHODS).index(method)}"  # the same in every panel
            style = {"linewidth": 3, "alpha": 0.5} if exact else {"marker": "o", "markersize": 4}
            axes.plot(copies, copies * np.array(values), label=method, color=colour, **style)
        axes.set(xscale="log", xlabel="copies n", title=setting)
        axes.set_xticks(copies, [str(n) for n in copies])
        axes.minorticks_off()
        axes.axhline(0, color="black", linewidth=0.6)
        axes.set_ylabel("value of all copies together (nats)")
        axes.legend(fontsize=8, frameon=False)
    return figure
