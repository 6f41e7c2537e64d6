"""Rows as text and as JSON."""

import json
import re
from itertools import groupby
from pathlib import Path
from statistics import median

from bench.measure import Row

_COLUMNS = (
    "provider",
    "ratio",
    "quartiles",
    "of best",
    "ms",
    "quartiles",
    "model",
    "rounds",
    "TFLOP/s",
    "GB/s",
    "%ceil",
    "peak MB",
)


ROOT = Path(__file__).resolve().parent.parent


def folder(committed: bool) -> Path:
    """Where rows go: bench/results, which is committed, or runs/bench."""
    found = ROOT / ("bench/results" if committed else "runs/bench")
    found.mkdir(parents=True, exist_ok=True)
    return found


def write(rows: list[Row], committed: bool, suffix: str = "") -> Path:
    """Write the rows as JSON, in a file named after device and day."""
    slug = re.sub(r"[^a-z0-9]+", "-", rows[0]["device"].lower()).strip("-")
    path = folder(committed) / f"{slug}-{rows[0]['date']}{suffix}.json"
    path.write_text(as_json(rows))
    return path


def publish(rows: list[Row], name: str, text: str, between: tuple[str, str], committed: bool) -> None:
    """Print the rows and `text`, and write the rows as `name`.json; what is committed, into README.md here as well.

    Args:
        text: Markdown, which takes the place of what stands between these two lines there.
    """
    path = folder(committed) / f"{name}.json"
    path.write_text(as_json(rows))
    print(f"{as_text(rows)}\n\n{text}\n\n{path.relative_to(ROOT)}")
    if committed:
        (start, end), readme = between, ROOT / "bench" / "README.md"
        before = readme.read_text()
        assert start in before and end in before
        readme.write_text(re.sub(f"(?s){start}.*{end}", lambda _: f"{start}\n{text}\n{end}", before))


def as_json(rows: list[Row]) -> str:
    """A JSON array, one row to a line."""
    return "[\n" + ",\n".join(json.dumps(row) for row in rows) + "\n]\n"


def as_text(rows: list[Row]) -> str:
    """Per case all figures; then one table of ratios to plain per suite. Providers are sorted by ratio."""
    first = rows[0]
    parts = [
        "{device}, {threads} threads, {dtype}; torch {torch}, commit {commit:.9}, seed {seed}, {clock}\n"
        "ceilings measured here: {ceiling_tflops:.3g} TFLOP/s (matmul), {ceiling_gbps:.3g} GB/s (copy). Cold cache, "
        "rounds interleaved; ratio: median over rounds of time / plain in the same round.".format(**first)
    ]
    for (suite, case), group in groupby(rows, key=lambda r: (r["suite"], r["case"])):
        of_case = sorted(group, key=lambda r: r["ratio"])
        parts.append(
            f"{suite}: {case}   (load {of_case[0]['load']:.1f})\n{_aligned([_COLUMNS, *map(_figures, of_case)])}"
        )
    for suite, group in groupby(rows, key=lambda r: r["suite"]):
        parts.append(f"{suite}: ratio to plain\n{_ratios(list(group))}")
    return "\n\n".join(parts)


def _ratios(rows: list[Row]) -> str:
    by_key = {(r["provider"], r["case"]): r["ratio"] for r in rows}
    providers, cases = (list(dict.fromkeys(r[key] for r in rows)) for key in ("provider", "case"))
    found = {p: [by_key.get((p, case)) for case in cases] for p in providers}
    providers.sort(key=lambda p: median(r for r in found[p] if r is not None))
    return _aligned(
        [("", *providers), *((case, *(_number(found[p][i], ".2f") for p in providers)) for i, case in enumerate(cases))]
    )


def _figures(row: Row) -> tuple[str, ...]:
    low, high = row["ratio_quartiles"]
    ms_low, ms_high = row["ms_quartiles"]
    return (
        row["provider"],
        f"{row['ratio']:.2f}",
        f"{low:.2f}-{high:.2f}",
        f"{row['ratio_of_best']:.2f}",
        f"{row['ms']:.4g}",
        f"{ms_low:.4g}-{ms_high:.4g}",
        _number(row.get("predicted_ms"), ".4g"),
        str(row["rounds"]),
        f"{row['tflops']:.3g}",
        _number(row["gbps"], ".3g"),
        f"{row['percent_of_ceiling']:.0f}",
        f"{row['peak_bytes'] / 1e6:.1f}",
    )


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _aligned(lines: list[tuple[str, ...]]) -> str:
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    return "\n".join(
        "  "
        + "  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    )
