"""The report as one HTML page that needs nothing from outside, in the reader's light or dark."""

from __future__ import annotations

import html
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2329; --soft: #5d6771; --line: #dde1e6; --paper: #ffffff; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --soft: #9aa4ae; --line: #343b42; --paper: #14181c; }
}
body { margin: 0 auto; max-width: 60rem; padding: 2.5rem 1.25rem 4rem; background: var(--paper);
       color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .25rem; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; }
p { margin: .5rem 0; max-width: 46rem; } .soft { color: var(--soft); }
figure { margin: .5rem 0 0; } svg { width: 100%; height: auto; font-family: inherit; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin-top: .75rem; }
th, td { text-align: right; padding: .3rem 0 .3rem 1.8rem; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: normal; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
.sample { border-top: 1px solid var(--line); padding: .7rem 0; }
.sample b { font-variant-numeric: tabular-nums; margin-right: .6rem; } .tag { color: #d0452f; }
pre { margin: .4rem 0 0; white-space: pre-wrap; overflow-wrap: anywhere;
      font: 13px/1.45 ui-monospace, Menlo, Consolas, monospace; }
"""


def render(name: str, found: dict[str, Any], sentences: list[str], svgs: dict[str, str]) -> str:
    """The page of one run.

    Args:
        name: of the run.
        found: `report.figures`.
        sentences: what it found, in words.
        svgs: `pictures.svgs`.
    """
    rows = "".join(
        f"<tr><td>{html.escape(row['source'])}</td><td>{row['samples']}</td><td>{row['value']:+.4f}</td>"
        f"<td>{row['mean_per_sample']:+.2e}</td><td>{row['positive_share']:.0%}</td></tr>"
        for row in found["sources"]
    )
    lists = [("Most helpful samples", found["best"]), ("Most harmful samples", found["worst"])]
    if found["worst_not_planted"] != found["worst"]:
        lists.append(("Most harmful samples, apart from planted ones", found["worst_not_planted"]))
    samples = "".join(f"<h2>{title}</h2>{''.join(map(_sample, which))}" for title, which in lists)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>inrun: {html.escape(name)}</title><style>{_STYLE}</style></head><body>
<h1>What each training sample did</h1>
<p class="soft">Run {html.escape(name)}: {found["steps"]} steps, {found["samples_seen"]} of {found["samples"]} samples
seen. In-Run Data Shapley values, in nats of validation loss; above 0, the sample lowered it.</p>
{"".join(f"<p>{html.escape(line)}</p>" for line in sentences)}
<h2>Value per source over training</h2><figure>{svgs["sources"]}</figure>
<table><tr><th>source</th><th>samples</th><th>sum</th><th>mean per sample</th><th>above 0</th></tr>{rows}</table>
<h2>Distribution of the values</h2><figure>{svgs["distribution"]}</figure>
<h2>Efficiency: do the values add up?</h2>
<p>A measured step is taken twice from the same weights and optimizer state: with its batch's gradient and with none.
The difference in validation loss is what the values of its samples should sum to.</p>
<figure>{svgs["efficiency"]}</figure>
<h2>Losses</h2><figure>{svgs["losses"]}</figure>
{samples}
</body></html>
"""


def _sample(row: dict[str, Any]) -> str:
    tag = f' <span class="tag">{html.escape(row["planted"])}</span>' if row["planted"] else ""
    text = "".join(c if c.isprintable() or c in "\n\t" else "\N{REPLACEMENT CHARACTER}" for c in row["text"])
    return (
        f'<div class="sample"><b>{row["value"]:+.2e}</b><span class="soft">{html.escape(row["sample_id"])}, '
        f"{html.escape(row['source'])}, seen {row['count']} times</span>{tag}<pre>{html.escape(text)}</pre></div>"
    )
