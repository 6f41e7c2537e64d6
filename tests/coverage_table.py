"""The table of models by stack, measured: every cell is a comparison with the float64 oracle.

python tests/coverage_table.py            # print it (some minutes)
python tests/coverage_table.py --write    # and put it into inrun/README.md, between its markers
"""

from __future__ import annotations

import re
import sys
import warnings
from pathlib import Path

import torch
from real_models import CASES, STACKS, NotOffered, compare

from inrun import InRunError

README = Path(__file__).parents[1] / "inrun" / "README.md"
START, END = "<!-- coverage: python tests/coverage_table.py --write -->", "<!-- coverage end -->"
NOTES = """
`ok`: every trainable parameter is scored, and the values are those of the one-sample-at-a-time float64 oracle, in half
precision to twice the plain computation's own error. `breaks`: so too, but the compiled graph breaks: torch captures no
LSTM, with inrun or without, and no forward-mode AD of experts that are given as many tokens as the data say. `-`: the
model, or torch on the CPU, has no such stack. Slow: what is scored by forward-mode AD. Measured on the CPU; compiled by
`aot_eager`, as capturing the graph is what can fail."""


def cell(name: str, stack: str, fullgraph: bool = True) -> tuple[str, list[str]]:
    """What the comparison says, and which modules fell back to forward-mode AD."""
    try:
        found, allowed, slow = compare(CASES[name], STACKS[stack], fullgraph)
    except NotOffered:
        return "-", []
    except (torch._dynamo.exc.Unsupported, torch._dynamo.exc.UserError):
        word, slow = cell(name, stack, False)
        return ("breaks" if word == "ok" else word), slow
    except InRunError:
        return "refused", []
    except RuntimeError as error:
        if STACKS[stack].autocast is torch.float16 and "primitive" in str(error):
            return "-", []  # torch has no such kernel on the CPU
        raise
    return ("ok" if found <= allowed else f"WRONG {found:.0e}"), slow


def table() -> str:
    heads = ["", *STACKS, "slow"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name in CASES:
        cells = {stack: cell(name, stack) for stack in STACKS}
        row = [name, *(word for word, _ in cells.values()), ", ".join(f"`{c}`" for c in cells["float32"][1])]
        print(f"| {' | '.join(row)} |", file=sys.stderr, flush=True)
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join([*lines, NOTES])


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    text = table()
    print(text)
    if "--write" in sys.argv:
        before = README.read_text()
        assert START in before and END in before
        README.write_text(re.sub(f"(?s){START}.*{END}", lambda _: f"{START}\n{text}\n{END}", before))
