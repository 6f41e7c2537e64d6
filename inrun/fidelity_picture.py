"""The fidelity suite as a picture: a row for each optimizer and learning rate, a column for each method."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np


def draw(task: str, cells: dict[Any, list], columns: Sequence[str], figure_of: Callable[..., float | None]) -> Any:
    """Pearson on the left, the efficiency gap on the right; colour by the distance from perfect, on a log scale.

    Args:
        cells: (optimizer, lr, batch) -> rows; figure_of: `figure_of(rows, method, metric)`, None for no such method.

    Returns:
        A matplotlib figure.
    """
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 1.9 + 0.26 * len(cells)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, metric, title, limits in (
        (panels[0], "pearson", "Pearson r with the Shapley value (colour: 1 - r)", (1e-5, 1)),
        (panels[1], "efficiency_gap", "efficiency gap: |sum of values - drop| / |drop|", (1e-4, 1)),
    ):
        found = [[figure_of(rows, method, metric) for method in columns] for rows in cells.values()]
        far = np.array([[np.nan if v is None else (1 - v if metric == "pearson" else v) for v in row] for row in found])
        norm = LogNorm(*limits, clip=True)
        image = axes.imshow(np.clip(far, *limits), cmap="RdYlGn_r", norm=norm, aspect="auto")
        for (i, j), distance in np.ndenumerate(far):
            if np.isnan(distance):
                axes.text(j, i, "-", ha="center", va="center", fontsize=7, color="#888888")
                continue
            share = f"{distance:.2%}" if distance < 10 else ">999%"
            text = _correlation(1 - distance) if metric == "pearson" else share
            dark = not 0.12 < float(norm(np.clip(distance, *limits))) < 0.88
            axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
        axes.set_xticks(range(len(columns)), [c.replace("_", "\n") for c in columns], fontsize=7)
        axes.xaxis.tick_top()
        axes.set_title(title, fontsize=10)
        axes.set_yticks(range(len(cells)), [_label(key, rows) for key, rows in cells.items()], fontsize=7)
        kinds = [kind for kind, *_ in cells]
        for i in range(1, len(kinds)):
            if kinds[i] != kinds[i - 1]:
                axes.axhline(i - 0.5, color="black", linewidth=0.8)
        axes.tick_params(length=0)
        figure.colorbar(image, ax=axes, shrink=0.6, pad=0.01).ax.tick_params(labelsize=7)
    figure.suptitle(f"{task}, one step; medians over seeds", fontsize=11)
    return figure


def beyond(rows: Sequence[dict[str, Any]]) -> str:
    """Marks a rate above the largest that trains stably."""
    return " (unstable)" if rows[0]["of_largest"] > 1 else ""


def _label(key: tuple[str, float, int], rows: list[dict[str, Any]]) -> str:
    kind, lr, batch = key
    sampled = "" if rows[0]["half_width"] is None else f", {batch} sampled"
    return f"{kind} {lr:.3g}{beyond(rows)}{sampled}"


def _correlation(r: float) -> str:
    """.9987 for 0.9987; digits up to the first that is not a nine, from four to six."""
    places = next((p for p in (4, 5) if round(r, p) < 1), 6)
    return f"{r:.{places}f}".replace("0.", ".", 1)
