"""What a run found: its figures as JSON, a page for the eye, and lines for the terminal.

Everything is read from the run folder (`inrun.runfolder`), so a report can be made again at any time.
"""

from __future__ import annotations

import importlib.util
import json
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from inrun import runfolder, shapley, shards
from inrun.errors import InRunError
from inrun.ledger import Ledger

EXTREMES = 8  # best and worst samples shown


def write(folder: Path) -> dict[str, Any]:
    """Write `report.json`, and `report.html` and `report.png` where matplotlib is installed.

    Returns:
        `figures(folder)`, and under "report" the path of the page or None.

    Raises:
        InRunError: `folder` is not a run folder, or its run has not taken a step yet.
    """
    found = figures(folder)
    (folder / "report.json").write_text(json.dumps(found, indent=1))
    if importlib.util.find_spec("matplotlib") is None:
        return found | {"report": None}
    from inrun import page, pictures

    words = [*sentences(found), speed(found)]
    text = page.render(folder.name, found, words, pictures.svgs(found))
    (folder / "report.html").write_text(text, encoding="utf-8")
    pictures.save_png(found, folder / "report.png")
    return found | {"report": str(folder / "report.html")}


def figures(folder: Path) -> dict[str, Any]:
    """Everything the report shows, as plain numbers and strings.

    Values are in nats and > 0 where a sample lowered the validation loss. Planted samples are groups of their
    own ("python, shuffled"), beside the sources, and so are those that samples.parquet lacks ("(unknown)").

    Raises:
        InRunError: see `write`.
    """
    import pyarrow as pa

    if missing := [name for name in ("config.json", "samples.parquet") if not (folder / name).exists()]:
        raise InRunError(f"run: expected the folder of a run, got {folder}, which {_instead(folder, missing)}")
    metrics = [row for _, row in runfolder.metrics_of(folder / "metrics.jsonl")]
    steps = [row for row in metrics if "loss" in row]
    if not steps:
        raise InRunError(f"run: expected at least one checkpointed step in {folder / 'metrics.jsonl'}, found none")
    config = runfolder.settings(folder)["config"]
    ledger = Ledger(folder / "ledger")
    totals = ledger.totals()
    if not len(totals):
        raise InRunError(f"run: expected values in {folder / 'ledger'}, found none")
    table = runfolder.read_samples(folder / "samples.parquet", totals.schema.field("sample_id").type)
    known = set(table["sample_id"].to_pylist())
    rest = [{"sample_id": i} | runfolder.UNSAID for i in totals["sample_id"].to_pylist() if i not in known]
    table = pa.concat_tables([table, pa.Table.from_pylist(rest, table.schema)])
    planted = table["planted"].to_pylist()
    group = runfolder.groups(table["source"], planted)
    groups = table.select(["sample_id"]).append_column("source", [group])

    where = {name: i for i, name in enumerate(table["sample_id"].to_pylist())}
    seen = np.array([where[name] for name in totals["sample_id"].to_pylist()])
    value, count = totals["value"].to_numpy(), totals["count"].to_numpy()
    names, kinds = np.array(group)[seen], np.array(planted)[seen]
    order = np.argsort(-value, kind="stable")

    def sample(i: int) -> dict[str, Any]:
        row = table.slice(int(seen[i]), 1).to_pylist()[0]
        return row | {"value": float(value[i]), "count": int(count[i])}

    sources = ledger.by_source(groups).drop_columns("target").to_pylist()
    for row in sources:
        values = value[names == row["source"]]
        size, positive = len(values), float((values > 0).mean())
        row |= {"samples": size, "mean_per_sample": row["value"] / size, "positive_share": positive}
    sources.sort(key=lambda row: -row["mean_per_sample"])
    over_time = {(row["source"], row["step"]): row["value"] for row in ledger.over_time(groups, bins=100).to_pylist()}
    starts = sorted({step for _, step in over_time})
    cumulative = {}
    for row in sources:
        values = [over_time.get((row["source"], step), 0.0) for step in starts]
        cumulative[row["source"]] = (np.cumsum(values) / row["samples"]).tolist()
    last = steps[-1]
    shown = metrics[:: -(-len(metrics) // 500)]
    return {
        "unit": "nats of validation loss",
        "sign": "value > 0: the sample lowered the validation loss",
        "config": config,
        "steps": last["step"] + 1,
        "samples": len(table),
        "samples_seen": len(totals),
        **{name: last[name] for name in ("samples_per_second", "scoring_share", "validation_share")},
        "sources": sources,
        "over_time": {"step": [*starts[1:], last["step"] + 1], "cumulative_per_sample": cumulative},
        "planted": _planted(table["sample_id"].to_pylist(), seen, kinds, names, value),
        "efficiency": _efficiency(metrics),
        "distribution": _histogram(value, kinds),
        "losses": {k: [row.get(k) for row in shown] for k in ("step", "loss", "validation_loss")},
        "best": [sample(i) for i in order[:EXTREMES]],
        "worst": [sample(i) for i in order[::-1][:EXTREMES]],
        "worst_not_planted": [sample(i) for i in order[kinds[order] == ""][::-1][:EXTREMES]],
    }


def _instead(folder: Path, missing: list[str]) -> str:
    """What a path is that is no run's folder, and what to do about it."""
    what = f"holds no {' and no '.join(missing)}" if folder.is_dir() else shards.not_a_folder(folder)
    if any(folder.glob("rank*.parquet")) or any(folder.glob("ledger/rank*.parquet")):
        return f"{what} but a ledger: `inrun top` and `inrun export` answer it"
    return f"{what}; `inrun train` makes one under runs/"


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    """The probability that a positive scores higher than a negative, ties counting half (Mann-Whitney).

    Args:
        positive, negative: [N], [M] scores.
    """
    is_positive = np.arange(len(positive) + len(negative)) < len(positive)
    return shapley.auroc(np.concatenate([positive, negative]), is_positive)


def _planted(
    ids: list[str], seen: np.ndarray, kinds: np.ndarray, names: np.ndarray, value: np.ndarray
) -> dict[str, Any]:
    """How the planted samples fare beside the others, and copies beside their originals."""
    found: dict[str, Any] = {}
    total = {ids[i]: v for i, v in zip(seen, value, strict=True)}
    for kind in sorted(set(kinds) - {""}):
        source = names[kinds == kind][0].removesuffix(f", {kind}")
        mine, clean, peers = value[kinds == kind], value[kinds == ""], value[names == source]
        copied = [ids[i] for i in seen[kinds == kind] if ids[i].endswith(f"~{kind}")]
        pairs = [(total[i], total.get(i.removesuffix(f"~{kind}"))) for i in copied]
        pairs = [pair for pair in pairs if pair[1] is not None]
        if not pairs or not len(peers):  # a short run has not seen them yet
            continue
        copies, originals = np.array(pairs).T
        found[str(kind)] = {
            "samples": len(mine),
            "mean_per_sample": float(mine.mean()),
            "originals_mean_per_sample": float(originals.mean()),
            "source_mean_per_sample": float(peers.mean()),
            "correlation_with_original": _correlation(copies, originals),
            # Low values mark what is planted, so the sign is turned.
            "auroc": auroc(-mine, -clean),
            "auroc_within_source": auroc(-mine, -peers),
        }
    return found


def _efficiency(metrics: list[dict[str, Any]]) -> dict[str, Any]:
    """The sum of a step's values beside what its batch did to the validation loss when measured."""
    measured = [row for row in metrics if row.get("batch_drop") is not None]
    values = np.array([row["value_sum"] for row in measured])
    drops = np.array([row["batch_drop"] for row in measured])
    losses = [row["validation_loss"] for row in metrics if row.get("validation_loss") is not None]
    return {
        "step": [row["step"] for row in measured],
        "value_sum": values.tolist(),
        "batch_drop": drops.tolist(),
        "ratio": float(values.sum() / drops.sum()) if drops.sum() else None,
        "correlation": _correlation(values, drops),
        "run_value_sum": float(sum(row["value_sum"] for row in metrics if "value_sum" in row)),
        "run_validation_drop": losses[0] - losses[-1],
    }


def _correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and a.std() > 0 and b.std() > 0 else None


def _histogram(value: np.ndarray, kinds: np.ndarray, bins: int = 60) -> dict[str, Any]:
    edges = np.linspace(value.min(), value.max(), bins + 1)
    counts = {str(kind): np.histogram(value[kinds == kind], edges)[0].tolist() for kind in sorted({"", *kinds})}
    return {"edges": edges.tolist(), "counts": counts}


def findings(found: dict[str, Any]) -> str:
    """The figures in a table and words, for the terminal."""
    width = max(len(row["source"]) for row in found["sources"])
    lines = [
        f"Values of {found['samples_seen']} samples over {found['steps']} steps, in nats of validation loss;",
        "above 0: the sample lowered it.",
        "",
        f"  {'source':{width}}  samples       sum  mean per sample  above 0",
    ]
    for row in found["sources"]:
        numbers = f"{row['samples']:7d}  {row['value']:+8.4f}  {row['mean_per_sample']:+15.2e}"
        lines.append(f"  {row['source']:{width}}  {numbers}  {row['positive_share']:7.0%}")
    texts = [*sentences(found), speed(found)]
    return "\n".join([*lines, "", *(textwrap.fill(text, 100, subsequent_indent="  ") for text in texts)])


def speed(found: dict[str, Any]) -> str:
    """One sentence on the run's speed and what scoring costs."""
    return (
        f"Speed: {found['samples_per_second']:.0f} samples/s; scoring took {found['scoring_share']:.0%} of the time, "
        f"its validation passes {found['validation_share']:.0%}."
    )


def sentences(found: dict[str, Any]) -> list[str]:
    """What was planted and whether the values add up, in words."""
    lines = []
    for kind, row in found["planted"].items():
        if kind == "duplicate":
            earned = row["mean_per_sample"] + row["originals_mean_per_sample"]
            r = row["correlation_with_original"]
            lines.append(
                f"Duplicates: a pair together earns {earned / row['source_mean_per_sample']:.2f} times what one "
                "sample of its source does: to first order, copies do not share what one of them would have earned"
                + ("." if r is None else f" (copy and original: r = {r:.2f}).")
            )
        else:
            lines.append(
                f"Planted corruption ({kind}): AUROC {row['auroc']:.3f} by low value among all samples, "
                f"{row['auroc_within_source']:.3f} within its own source."
            )
    efficiency = found["efficiency"]
    if efficiency["ratio"] is not None:
        r = efficiency["correlation"]
        lines.append(
            f"Efficiency: on {len(efficiency['step'])} measured steps the values sum to {efficiency['ratio']:.2f} "
            "times what the batches took off the validation loss, with the optimizer's real update against its "
            "update without the batch" + ("." if r is None else f" (r = {r:.2f}).")
        )
    drop, total = efficiency["run_validation_drop"], efficiency["run_value_sum"]
    lines.append(
        f"Whole run: the values sum to {total:.2f} and the validation loss fell by {drop:.2f}; what lies between is "
        "the work of old momentum and weight decay, which belong to no sample of a step, and what first-order values "
        "leave out: how the loss bends, clipping, and how its gradient changes until it is taken again."
    )
    return lines
