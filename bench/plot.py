"""Draw a bench's JSON: ratios to plain per case, and a roofline of the kernels.

python -m bench.plot runs/bench/DEVICE-DATE.json      # writes DEVICE-DATE-ratios.png and -roofline.png beside it
"""

import argparse
import itertools
import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from bench.measure import BASE, Row

# Ours in one colour family, the peers in quiet ones; a provider keeps its colour in every panel.
_COLOURS = {
    "inrun": "#d1495b",
    "inrun_validated": "#f2a7a0",
    "inrun_two": "#e07a5f",
    "inrun_prefix": "#b23a48",
    "inrun_pairwise": "#edae49",
    "two_gemms": "#30638e",
    "two_gemms_compiled": "#7ea8be",
    "two_steps": "#30638e",
    "two_steps_compiled": "#7ea8be",
    "gemm_rowsum": "#30638e",
    "gemm_rowsum_compiled": "#7ea8be",
    "stored": "#5f7367",
    "stored_compiled": "#8aa093",
    "vmap": "#a9b4a2",
    "opacus": "#8a6f9e",
    "ghostsuite": "#54457f",
    "loop": "#c9b79c",
    BASE: "#222222",
}
_SHOWN = 5.0  # ratios beyond this are cut off and written out


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("json", type=Path, help="the rows that `make bench` wrote")
    path = parser.parse_args().json
    rows = json.loads(path.read_text())
    counted = any(r["flops_per_byte"] is not None for r in rows)  # of whole steps bytes are not
    for name, draw in (("ratios", draw_ratios), *([("roofline", draw_roofline)] if counted else [])):
        figure = draw(rows)
        figure.savefig(target := path.with_name(f"{path.stem}-{name}.png"), dpi=150)
        plt.close(figure)
        print(target)


def draw_ratios(rows: list[Row]) -> Figure:
    """One panel per suite: a bar per case and provider, quartiles as whiskers."""
    suites = {s: [r for r in rows if r["suite"] == s and r["provider"] != BASE] for s in _unique(rows, "suite")}
    heights = [max(len(_unique(of_suite, "case")), 2) for of_suite in suites.values()]
    figure, panels = plt.subplots(
        len(suites),
        1,
        figsize=(9, 1.2 + 0.75 * sum(heights)),
        height_ratios=heights,
        layout="constrained",
        squeeze=False,
    )
    for axes, (suite, of_suite) in zip(panels[:, 0], suites.items(), strict=True):
        _ratio_panel(axes, suite, of_suite)
    figure.suptitle(_machine(rows[0]), fontsize=9)
    return figure


def _ratio_panel(axes: Axes, suite: str, rows: list[Row]) -> None:
    cases, providers = _unique(rows, "case"), _unique(rows, "provider")
    thick = 0.84 / len(providers)
    for k, provider in enumerate(providers):
        mine = [r for r in rows if r["provider"] == provider]
        at = np.array([cases.index(r["case"]) for r in mine]) + (k - (len(providers) - 1) / 2) * thick
        ratios = np.array([r["ratio"] for r in mine])
        shown = np.minimum(ratios, _SHOWN)
        spread = np.clip([r["ratio_quartiles"] for r in mine], 0, _SHOWN).T
        whiskers = np.clip(np.stack([shown - spread[0], spread[1] - shown]), 0, None)
        axes.barh(at, shown, thick * 0.9, xerr=whiskers, label=provider, color=_COLOURS[provider], ecolor="#888888")
        for y, ratio, end in zip(at, ratios, np.maximum(shown, spread[1]), strict=True):
            axes.text(end + 0.05, y, f"{ratio:.2f}", va="center", fontsize=6)
    axes.axvline(1, color=_COLOURS[BASE], linewidth=1)
    end = min(_SHOWN, max(r["ratio_quartiles"][1] for r in rows)) + 0.5
    axes.set(yticks=range(len(cases)), yticklabels=cases, xlim=(0, end), xlabel="time / plain", title=suite)
    axes.invert_yaxis()
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)


def draw_roofline(rows: list[Row]) -> Figure:
    """FLOP rate against FLOPs per byte of what counts bytes, under the ceilings measured in the same run."""
    counted = [r for r in rows if r["flops_per_byte"] is not None]
    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    peak, bandwidth = counted[0]["ceiling_tflops"], counted[0]["ceiling_gbps"] / 1e3
    found = [r["flops_per_byte"] for r in counted]
    intensity = np.geomspace(min(found), max(found), 200)
    axes.plot(intensity, np.minimum(peak, bandwidth * intensity), color=_COLOURS[BASE], label="measured ceiling")
    suites = zip(_unique(counted, "suite"), itertools.cycle("o^sDvPX"), strict=False)
    for suite, marker in suites:
        for provider in _unique(counted, "provider"):
            mine = [r for r in counted if r["provider"] == provider and r["suite"] == suite]
            x, y = ([r[key] for r in mine] for key in ("flops_per_byte", "tflops"))
            axes.scatter(x, y, s=22, marker=marker, color=_COLOURS[provider], alpha=0.8)
        axes.scatter([], [], marker=marker, color="#888888", label=suite)
    of_colour: dict[str, list[str]] = {}
    for provider in _unique(counted, "provider"):
        of_colour.setdefault(_COLOURS[provider], []).append(provider)
    for colour, providers in of_colour.items():
        axes.scatter([], [], marker="s", color=colour, label="\n".join(providers))
    axes.set(xscale="log", yscale="log", xlabel="FLOPs needed / bytes needed", ylabel="TFLOP/s (needed / time)")
    axes.set_title(_machine(rows[0]), fontsize=9)
    axes.legend(fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    return figure


def _unique(rows: list[Row], key: str) -> list[str]:
    return list(dict.fromkeys(r[key] for r in rows))


def _machine(row: Row) -> str:
    return f"{row['device']}, {row['threads']} threads, {row['dtype']}, torch {row['torch']}, {row['date']}"


if __name__ == "__main__":
    main()
