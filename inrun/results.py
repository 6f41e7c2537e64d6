"""What every published figure comes with: the machine, the versions, the commit; a table, a JSON file, a picture."""

from __future__ import annotations

import importlib.util
import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from inrun_kernels.forms import cpuinfo
from inrun_kernels.tuning import installed

from .errors import InRunError


def provenance(seed: int) -> dict[str, Any]:
    """Device, threads, versions, commit (with "+" where files were changed since) and seed."""
    names = ("torch", "numpy", "scikit-learn", "inrun")
    versions = {name: installed(name) or "not installed" for name in names}
    return {
        "device": processor(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), **versions},
        "commit": _commit(),
        "seed": seed,
    }


def processor() -> str:
    """The name of the CPU."""
    names = cpuinfo("model name")
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str:
    here = Path(__file__).parent

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):  # an installed wheel is no checkout
        return "unknown"


def require_matplotlib() -> None:
    """Raise `InRunError` where pictures cannot be drawn, before the minutes that lead up to them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise InRunError("pictures: need matplotlib: pip install 'inrun[report]'")


def in_line(text: str) -> str:
    """A name as one line of a terminal can show it: what is not printable by its escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def table(head: Sequence[str], rows: Sequence[Sequence[str]], left: bool = False) -> str:
    """Columns as wide as their widest cell, the first one flush left, the others right, or with `left` all left."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for first, *others in [head, *rows]:
        cells = zip(others, widths[1:], strict=True)
        aligned = [first.ljust(widths[0]), *(c.ljust(w) if left else c.rjust(w) for c, w in cells)]
        lines.append("  ".join(aligned).rstrip())
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def write(out: Path, name: str, found: dict[str, Any], figures: dict[str, Any]) -> list[Path]:
    """Write `name`.json, and each matplotlib figure as `name` + its key + `.png`, into the folder `out`.

    Returns:
        What was written.
    """
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{name}.json", *(out / f"{name}{suffix}.png" for suffix in figures)]
    paths[0].write_text(json.dumps(found, indent=1) + "\n")
    for path, figure in zip(paths[1:], figures.values(), strict=True):
        figure.savefig(path, dpi=130)
    return paths
