"""The report's pictures, by matplotlib: inline SVG that follows the page's light or dark, and one PNG."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

# Distinct in both schemes and to colour-blind readers; what is planted is always red or grey.
_COLOURS = ("#2f7fc1", "#d98324", "#2a9d76", "#a4589f", "#8c7a4f", "#4fa3b5")
_SHUFFLED, _DUPLICATE, _REST = "#d0452f", "#7f8892", "#b3bac2"
_INK = "#1a2b3c"  # a placeholder: `currentColor` in the SVG
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "text.parse_math": False,  # a source's name may hold "$"
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.alpha": 0.18,
    "grid.linewidth": 0.7,
    "lines.linewidth": 1.9,
} | dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), _INK)


def svgs(found: dict[str, Any]) -> dict[str, str]:
    """The pictures of `report.figures`, each as one <svg> element."""
    return {
        "sources": _svg("sources", 4.2, _draw_sources, found),
        "distribution": _svg("distribution", 3.6, _draw_distribution, found),
        "efficiency": _svg("efficiency", 3.8, _draw_efficiency, found, panels=2),
        "losses": _svg("losses", 3.2, _draw_losses, found),
    }


def save_png(found: dict[str, Any], path: Path) -> None:
    """Value per source over training beside the distribution of the values."""
    with matplotlib.rc_context({**_STYLE, "axes.titlesize": 11, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        left, right = figure.subplots(1, 2, width_ratios=(3, 2))
        _draw_sources(left, found)
        left.set_title("Value per source over training")
        _draw_distribution(right, found)
        right.set_title("Value of each sample")
        figure.savefig(path, dpi=160, facecolor="white")


def _svg(name: str, height: float, draw: Any, found: dict[str, Any], panels: int = 1) -> str:
    with matplotlib.rc_context({**_STYLE, "svg.hashsalt": name}):
        figure = Figure(figsize=(9, height), layout="constrained")
        draw(figure.subplots(1, panels), found)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")


def _draw_sources(axes: Axes, found: dict[str, Any]) -> None:
    """One line per source, its name at the end; of many sources the five best and three worst."""
    steps = found["over_time"]["step"]
    curves = found["over_time"]["cumulative_per_sample"]
    names = list(curves)  # best first
    named = names if len(names) <= 8 else names[:5] + names[-3:]
    colours = iter(_COLOURS * 2)
    ends = []
    for name in names:
        if name not in named:
            axes.plot(steps, curves[name], color=_REST, linewidth=0.8)
            continue
        planted = {"shuffled": _SHUFFLED, "duplicate": _DUPLICATE}.get(name.rpartition(", ")[2])
        colour = planted or next(colours)
        axes.plot(steps, curves[name], color=colour, linestyle="--" if planted else "-")
        ends.append((curves[name][-1], name, colour))
    axes.axhline(0, color=_INK, linewidth=0.7)
    low, high = axes.get_ylim()
    for y, (_, name, colour) in zip(_apart([e[0] for e in ends], 0.055 * (high - low)), ends, strict=True):
        axes.annotate(
            name, (1, y), xycoords=axes.get_yaxis_transform(), xytext=(5, 0), textcoords="offset points",
            color=colour, va="center",
        )  # fmt: skip
    axes.set(xlabel="step", ylabel="cumulative value per sample (nats)", xlim=(0, steps[-1]))


def _apart(heights: list[float], gap: float) -> list[float]:
    """Move label heights (given in falling order of their lines) apart until `gap` lies between any two."""
    order = np.argsort(heights)
    placed = np.array(heights, dtype=float)[order]
    for _ in range(100):
        for i in range(len(placed) - 1):
            short = gap - (placed[i + 1] - placed[i])
            if short > 1e-12:
                placed[i] -= short / 2
                placed[i + 1] += short / 2
    result = np.empty_like(placed)
    result[order] = placed
    return result.tolist()


def _draw_distribution(axes: Axes, found: dict[str, Any]) -> None:
    """Counts on a log scale: the planted samples as outlines over the filled rest."""
    edges, counts = found["distribution"]["edges"], found["distribution"]["counts"]
    axes.stairs(counts[""], edges, baseline=0.5, fill=True, alpha=0.45, color=_COLOURS[0], label="not planted")
    for kind, colour in (("duplicate", _DUPLICATE), ("shuffled", _SHUFFLED)):
        if kind in counts:
            auroc = found["planted"].get(kind, {}).get("auroc")
            label = f"{kind} (AUROC {auroc:.3f})" if kind == "shuffled" and auroc else kind
            axes.stairs(counts[kind], edges, baseline=0.5, linewidth=1.6, color=colour, label=label)
    axes.axvline(0, color=_INK, linewidth=0.7)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.set(xlabel="total value of a sample (nats)", ylabel="samples", ylim=(0.5, 12 * max(map(max, counts.values()))))
    if len(counts) > 1:  # above the bars: that is what the room is for
        axes.legend(frameon=False, loc="upper right")


def _draw_efficiency(panels: Sequence[Axes], found: dict[str, Any]) -> None:
    efficiency, (left, right) = found["efficiency"], panels
    values, drops = np.array(efficiency["value_sum"]), np.array(efficiency["batch_drop"])
    left.scatter(drops, values, s=14, color=_COLOURS[0], alpha=0.8, linewidths=0)
    both = np.concatenate([values, drops, [0.0]])
    ends = [both.min(), both.max()]
    left.plot(ends, ends, color=_INK, linewidth=0.8)
    left.text(0.97, 0.05, "on the line: equal", transform=left.transAxes, ha="right")
    left.set(xlabel="measured drop of one step (nats)", ylabel="sum of its values (nats)")
    for series, label, colour in (
        (values, "sum of values", _COLOURS[0]),
        (drops, "measured drop", _COLOURS[1]),
    ):
        right.plot(efficiency["step"], np.cumsum(series), color=colour, label=label)
    right.set(xlabel="step", ylabel="cumulative, measured steps (nats)")
    right.legend(frameon=False, labelcolor="linecolor")


def _draw_losses(axes: Axes, found: dict[str, Any]) -> None:
    losses = found["losses"]
    for name, label, colour in (
        ("loss", "training batch", _REST),
        ("validation_loss", "validation", _COLOURS[0]),
    ):
        points = [(s, v) for s, v in zip(losses["step"], losses[name], strict=True) if v is not None]
        axes.plot(*zip(*points, strict=True), color=colour, label=label, linewidth=1.2)
    axes.set(xlabel="step", ylabel="loss (nats per token)")
    axes.legend(frameon=False)
