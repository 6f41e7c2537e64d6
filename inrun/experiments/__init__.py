"""`inrun experiment NAME`: what the values are for, each with a seed, a table, a JSON file and a picture.

Small enough for two cores; what comes out is reported, favourable or not.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .. import results

NAMES = ("mislabel", "duplicates", "stages", "curation", "paraphrase")


@dataclass(frozen=True)
class Finding:
    """What an experiment found: as text, as JSON holds it, as a matplotlib figure."""

    text: str
    data: dict[str, Any]
    figure: Any


def standard_error(runs: Any) -> np.ndarray:
    """Of the mean over the first axis."""
    return np.std(runs, axis=0, ddof=1) / len(runs) ** 0.5


def panels(width: float, height: float, ratios: Sequence[float] = (1,)) -> tuple[Any, Any]:
    """A matplotlib figure, and its axes side by side, as wide as these are to each other."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    side_by_side = figure.subplots(1, len(ratios), width_ratios=ratios, squeeze=False)[0]
    for axes in side_by_side:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, side_by_side


def run(name: str, out: Path, seed: int = 0) -> None:
    """Run one experiment, print its table, and write `experiment-NAME.json` and `.png` into `out`.

    Raises:
        ValueError: an unknown name.
    """
    if name not in NAMES:
        raise ValueError(f"experiment: expected one of {', '.join(NAMES)}, got {name!r}")
    results.require_matplotlib()
    out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    found: Finding = importlib.import_module(f".{name}", __name__).run(seed=seed)
    seconds = round(time.perf_counter() - start, 1)
    print(found.text)
    everything = {**results.provenance(seed), "seconds": seconds, **found.data}
    for path in results.write(out, f"experiment-{name}", everything, {"": found.figure}):
        print(path)
