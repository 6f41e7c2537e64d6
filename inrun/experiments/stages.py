"""Stages: what each source of text is worth, per sample, as training goes on.

A GPT is trained on the demo's four sources, and every step's samples are valued (path_secant, AdamW) for validation
text of one source, Python. The paper finds general text leading early and the target's domain late.

Source: arXiv 2406.11011, section 5.2.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .. import results
from ..demo import demo_corpus
from . import Finding
from .textrun import SMALL, train


def run(seed: int = 0, steps: int = 800, windows: int = 8, per_source: int = 240) -> Finding:
    """The mean value of a visit to a sample, by source and stage (thousandths of a nat)."""
    corpus, validation = demo_corpus(SMALL.block_size, seed, per_source, planted=max(per_source // 4, 1))
    record = train(corpus, seed=seed, steps=steps, targets={"python": validation}, test=validation)
    labels = [f"{s}, {p}" if p else s for s, p in zip(corpus.sources, corpus.planted, strict=True)]
    names = sorted(set(labels))
    of = np.array([names.index(label) for label in labels])[record.ids]  # [steps, batch]
    # The first stages are short: most of what can be learnt is learnt there.
    edges = np.unique(np.round(np.geomspace(max(steps // 2 ** (windows - 1), 1), steps, windows)).astype(int))
    bounds = list(zip([0, *edges[:-1].tolist()], edges.tolist(), strict=True))
    means: dict[str, list[float]] = {}
    for i, name in enumerate(names):
        means[name] = []
        for low, high in bounds:
            mine = of[low:high] == i
            means[name].append(float(record.values[low:high, :, 0][mine].mean()) if mine.any() else 0.0)
    order = sorted(means, key=lambda n: -means[n][-1])
    head = ["value per visit, 1e-3 nats", *(f"to {high}" for _, high in bounds)]
    rows = [[n, *(f"{1e3 * v:+.2f}" for v in means[n])] for n in order]
    looks = [[f"{v:.2f}" for s, v in record.looks.items() if s <= high][-1:] or ["-"] for _, high in bounds]
    rows.append(["validation loss at the end", *(cell for (cell,) in looks)])
    data = {"stages": bounds, "value_per_visit": means, "validation_loss": record.looks}
    text = f"stages: value of a sample for Python text, by source and steps of training\n{results.table(head, rows)}"
    return Finding(text, data, _draw(order, means, bounds))


def _draw(order: list[str], means: dict[str, list[float]], bounds: list[tuple[int, int]]) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    middle = [np.sqrt(max(low, 1) * high) for low, high in bounds]
    for name in order:
        axes.plot(
            middle, 1e3 * np.array(means[name]), "--" if "," in name else "-", marker="o", markersize=4, label=name
        )
    axes.axhline(0, color="black", linewidth=0.7)
    axes.set(xscale="log", xlabel="step (middle of a stage)", ylabel="value per visit (1e-3 nats)")
    axes.set_yscale("symlog", linthresh=0.1)
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
