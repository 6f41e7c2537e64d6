"""Curation: leave out the samples with negative value and train again from the same seed.

A GPT is trained, the target being Python text, on a pool like an uncleaned corpus: 400 samples each of Python, C++,
documentation and licences, and for each of three kinds of harm 240 samples, 31% of the pool in all. The harmful ones
are copies of samples of any source with their bytes shuffled, their letters rotated by 13 (another language in the
same alphabet), or encoded in base64. One run gives every sample its value (method "first": what plain training can
afford). The samples whose value over the run is negative are left out and training starts again, with the same weights
and as many steps. Beside it: as many samples left out at random; the as many whose loss was the highest at the end;
and exactly the planted ones, the most that telling them apart could bring.

Every seed draws its own pool, harm, validation text, test text and weights. Validation and test text come from files
that give no training sample; the test text takes no part in the values. What is left out changes the order too, so
single runs leave the plateau of single-byte statistics some dozen steps sooner or later: look at means and errors.
The defaults were chosen on seeds from 100 to 103. The paper needs about 25% fewer steps on the Pile, where 16% of the
samples had negative value.

Source: arXiv 2406.11011, section 5.1.
"""

from __future__ import annotations

import base64
from dataclasses import replace
from typing import Any

import numpy as np

from .. import results
from ..data import Samples, join
from ..demo import demo_corpus
from ..shapley import auroc
from . import Finding, panels, standard_error
from .textrun import SMALL, sample_losses, smoothed, train

ARMS = ("nothing", "negative value", "random", "highest loss", "what was planted")
HARM = ("shuffled", "rot13", "base64")
VALIDATION = 32


def run(seed: int = 0, steps: int = 600, per_source: int = 400, test: int = 96, repeats: int = 6) -> Finding:
    """Steps to the test loss at which training on everything ends, and the test loss at the end."""
    looks: dict[str, list[dict[int, float]]] = {name: [] for name in ARMS}
    shares: dict[str, list[float]] = {}  # of each kind's samples that have negative value, by seed
    found: list[float] = []  # AUROC of the planted samples, by seed
    for s in range(seed, seed + repeats):
        one_seed, values, labels = _one_seed(s, steps, per_source, test)
        for name, look in one_seed.items():
            looks[name].append(look)
        for label in ("all", *np.unique(labels)):
            shares.setdefault(str(label), []).append(float((values[(labels == label) | (label == "all")] < 0).mean()))
        found.append(auroc(-values, np.isin(labels, HARM)))
    at = smoothed(looks["nothing"][0])[0]
    curves = {n: np.array([smoothed(look)[1] for look in looks[n]]) for n in ARMS}  # [repeats, looks]
    goals = curves["nothing"][:, -1]
    reached = {n: [_first(at, c, g) for c, g in zip(curves[n], goals, strict=True)] for n in ARMS}
    whole = {n: _first(at, curves[n].mean(0), goals.mean()) for n in ARMS}
    gained = {n: curves[n][:, -1] - goals for n in ARMS}
    rows = [
        [n, *map(_step, reached[n]), _step(whole[n]), f"{gained[n].mean():+.3f}", f"{standard_error(gained[n]):.3f}"]
        for n in ARMS
    ]
    head = [*(f"{s}: to {g:.2f}" for s, g in zip(range(seed, seed + repeats), goals, strict=True)), "mean curve"]
    kinds = ", ".join(f"{label} {np.mean(share):.0%}" for label, share in shares.items())
    text = (
        f"curation: share with negative value, mean over {repeats} seeds: {kinds}; AUROC of what was planted "
        f"{np.mean(found):.2f}\nby seed: steps to the test loss at which training on everything ends after {steps}; "
        f"then how much lower the loss ends\n"
        f"{results.table(['left out', *head, 'loss at the end', 'standard error'], rows)}"
    )
    data = {
        "goals": goals.tolist(),
        "steps_to_goal": reached,
        "steps_of_mean_curve": whole,
        "loss_at_end": {n: c[:, -1].tolist() for n, c in curves.items()},
        "negative": shares,
        "auroc_planted": found,
        "looks": looks,
    }
    return Finding(text, data, _draw(at, curves, shares))


def _one_seed(
    seed: int, steps: int, per_source: int, test: int
) -> tuple[dict[str, dict[int, float]], np.ndarray, np.ndarray]:
    """Each arm's looks at the test loss; the samples' values [N]; what they are [N]: a source or a kind of harm."""
    clean, unseen = demo_corpus(SMALL.block_size, seed, per_source, planted=0, validation=VALIDATION + test)
    # In the order of their files, so that the two share no file, but perhaps one.
    validation, judged = unseen.take(range(VALIDATION)), unseen.take(range(VALIDATION, len(unseen)))
    rng = np.random.default_rng(seed)
    pool = _harmed(clean, per_source * 3 // 5, rng)
    full = train(pool, seed=seed, steps=steps, targets={"python": validation}, method="first", test=judged)
    values = full.totals(len(pool))[:, 0]
    negative = np.flatnonzero(values < 0)
    left_out = {
        "negative value": negative,
        "random": rng.choice(len(pool), len(negative), replace=False),
        "highest loss": np.argsort(-sample_losses(full.model, pool))[: len(negative)],
        "what was planted": np.arange(len(clean), len(pool)),
    }
    looks = {"nothing": full.looks}
    for name, rows in left_out.items():
        keep = np.setdiff1d(np.arange(len(pool)), rows)
        looks[name] = train(pool, seed=seed, steps=steps, keep=keep, test=judged).looks
    return looks, values, np.array([p or s for s, p in zip(pool.sources, pool.planted, strict=True)])


def _harmed(clean: Samples, count: int, rng: np.random.Generator) -> Samples:
    """The samples, and of each kind of harm `count` copies with it."""
    parts = [clean]
    for kind in HARM:
        copy = clean.take(rng.choice(len(clean), count, replace=False))
        if kind == "shuffled":
            tokens = rng.permuted(copy.tokens, axis=1)
        elif kind == "rot13":
            letters = bytes(range(65, 91)), bytes(range(97, 123))
            turned = bytes.maketrans(b"".join(letters), b"".join(part[13:] + part[:13] for part in letters))
            tokens = np.frombuffer(turned, np.uint8)[copy.tokens]
        else:
            width = copy.tokens.shape[1]
            tokens = np.array([list(base64.b64encode(row.tobytes())[:width]) for row in copy.tokens], np.uint8)
        parts.append(replace(copy, tokens=tokens, ids=[f"{i}~{kind}" for i in copy.ids], planted=[kind] * count))
    return join(parts)


def _first(at: np.ndarray, curve: np.ndarray, goal: float) -> int | None:
    """The first look at which the loss is no higher than `goal`; None for never."""
    below = np.flatnonzero(curve <= goal)
    return int(at[below[0]]) if len(below) else None


def _step(at: int | None) -> str:
    return "never" if at is None else str(at)


def _draw(at: np.ndarray, curves: dict[str, np.ndarray], shares: dict[str, list[float]]) -> Any:
    figure, (axes, bars) = panels(11.5, 4, (1.6, 1))
    colours: dict[str, str] = dict(zip(ARMS, ("black", "#d1495b", "#8d99ae", "#30638e", "#66a182"), strict=True))
    everything = curves["nothing"].mean(0)
    for name, curve in curves.items():
        middle, style = curve.mean(0), "--" if name == "what was planted" else "-"
        axes.plot(at, middle, style, color=colours[name], label=f"left out: {name}")
        # A pool is easy or hard for every arm: the error is that of the difference from leaving out nothing.
        error = standard_error(curve - curves["nothing"])
        axes.fill_between(at, middle - error, middle + error, color=colours[name], alpha=0.15, linewidth=0)
    axes.axhline(everything[-1], color="black", linewidth=0.6, linestyle=":")
    shown = everything[at >= 0.1 * at[-1]]
    axes.set(xlabel="step", ylabel="test loss (nats per byte)", xlim=(0.1 * at[-1], at[-1]))
    axes.set_ylim(min(c.mean(0)[-1] for c in curves.values()) - 0.05, shown[0] + 0.05)
    axes.set_title(f"mean of {len(curves['nothing'])} seeds; band: standard error beside 'nothing'", fontsize=10)
    axes.legend(frameon=False)
    order = sorted(shares, key=lambda n: np.mean(shares[n]))
    for i, name in enumerate(order):
        colour = "#d1495b" if name in HARM else "#8d99ae"
        bars.barh(i, 100 * np.mean(shares[name]), color=colour, alpha=0.6)
        bars.scatter(100 * np.array(shares[name]), [i] * len(shares[name]), s=10, color=colour)
    bars.set_yticks(range(len(order)), order)
    bars.set(xlabel="samples with negative value (%); dots: seeds", xlim=(0, 100))
    bars.set_title("red: planted harm", fontsize=10)
    return figure
