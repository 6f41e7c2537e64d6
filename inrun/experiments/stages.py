"""Stages: what each source of text is worth, per sample, as training goes on.

A GPT is trained on the demo's four sources, and every step's samples are valued (path_secant, AdamW) for validation
text of one source, Python. The paper finds general text leading early and the target's domain late.

Source: arXiv 2406.11011, section 5.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import results, runfolder
from ..demo import demo_corpus
from . import Finding, panels, standard_error
from .textrun import SMALL, train


def run(seed: int = 0, steps: int = 800, windows: int = 8, per_source: int = 240, repeats: int = 3) -> Finding:
    """The mean value of a visit to a sample, by source and stage (thousandths of a nat); its standard error over seeds.

    Each seed draws other files, samples, weights and order.
    """
    # The first stages are short: most of what can be learnt is learnt there.
    edges = np.unique(np.round(np.geomspace(max(steps // 2 ** (windows - 1), 1), steps, windows)).astype(int))
    bounds = list(zip([0, *edges[:-1].tolist()], edges.tolist(), strict=True))
    means: dict[str, list[list[float]]] = {}  # source -> seed -> stage
    looks: list[dict[int, float]] = []
    for s in range(seed, seed + repeats):
        corpus, validation = demo_corpus(SMALL.block_size, s, per_source, planted=max(per_source // 4, 1))
        record = train(corpus, seed=s, steps=steps, targets={"python": validation}, test=validation)
        labels = np.array(runfolder.groups(corpus.sources, corpus.planted))
        for name in np.unique(labels):
            mine = (labels == name)[record.ids]  # [steps, batch]
            each = [record.values[low:high, :, 0][mine[low:high]] for low, high in bounds]
            means.setdefault(str(name), []).append([float(v.mean()) if v.size else 0.0 for v in each])
        looks.append(record.looks)
    order = sorted(means, key=lambda n: -np.mean(means[n], axis=0)[-1])
    head = ["value per visit, 1e-3 nats", *(f"to {high}" for _, high in bounds)]
    rows = [[n, *(f"{1e3 * v:+.2f}" for v in np.mean(means[n], axis=0))] for n in order]
    rows += [[f"  standard error, {n}", *(f"{1e3 * v:.2f}" for v in standard_error(means[n]))] for n in order]
    losses = {t: np.mean([look[t] for look in looks]) for t in looks[0]}
    at_end = [[f"{v:.2f}" for s, v in losses.items() if s <= high][-1:] or ["-"] for _, high in bounds]
    rows.append(["validation loss at the end", *(cell for (cell,) in at_end)])
    data = {"stages": bounds, "value_per_visit": means, "validation_loss": looks}
    text = (
        f"stages: value of a sample for Python text, by source and steps of training, mean of {repeats} seeds\n"
        f"{results.table(head, rows)}"
    )
    return Finding(text, data, _draw(order, means, bounds))


def _draw(order: list[str], means: dict[str, list[list[float]]], bounds: list[tuple[int, int]]) -> Any:
    figure, (axes,) = panels(8, 4.2)
    middle = [np.sqrt(max(low, 1) * high) for low, high in bounds]
    for i, name in enumerate(order):
        mean, error = 1e3 * np.mean(means[name], axis=0), 1e3 * standard_error(means[name])
        style = "--" if "," in name else "-"
        axes.plot(middle, mean, style, color=f"C{i}", marker="o", markersize=4, label=name)
        axes.fill_between(middle, mean - error, mean + error, color=f"C{i}", alpha=0.15, linewidth=0)
    axes.axhline(0, color="black", linewidth=0.7)
    axes.set(xscale="log", xlabel="step (middle of a stage)", ylabel="value per visit (1e-3 nats)")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.set_title(f"value for Python text, mean and standard error of {len(means[order[0]])} seeds", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure
