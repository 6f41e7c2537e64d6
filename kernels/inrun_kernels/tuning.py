"""Opt-in tuning: the fastest of a launch's candidate tiles, measured once for each class of shapes and kept on disk.

Off, which is the default, every launch takes its first candidate and no file is looked at. On (`tune()`, or
INRUN_TUNE=1 in the environment), candidates that the static model puts far behind are left out, the others are timed,
and the best is written to a file of this device and these versions. Sums in a tile of another shape round otherwise:
results are the same bits for the same tile.
"""

import json
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from torch import Tensor

from inrun_kernels.config import Tile
from inrun_kernels.cost import CEILINGS, Sizes, predict

_BEHIND = 1.5  # times the best prediction, beyond which a candidate is not timed
_folder: Path | None = None  # None: off
_tables: dict[Path, dict[str, dict]] = {}


def tune(on: bool = True, folder: str | os.PathLike | None = None) -> None:
    """Time candidate tiles at the first launch of each class of shapes from now on, or (`on=False`) stop doing so.

    Args:
        folder: of the cache files; None: `inrun` in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).

    Example:
        >>> inrun_kernels.tune()
    """
    global _folder
    _folder = (Path(folder) if folder is not None else cache_folder()) if on else None
    _tables.clear()


def cache_folder() -> Path:
    """`inrun` in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "inrun"


def installed(package: str) -> str | None:
    """The version of a package; None without it, as of inrun itself where it is used uninstalled."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def is_on() -> bool:
    """Whether launches ask `choose`."""
    return _folder is not None


def choose(
    kernel: str,
    candidates: Sequence[Tile],
    sizes: Sizes,
    facts: str,
    x: Tensor,
    run: Callable[[Tile], object],
    form: str = "two",
) -> Tile:
    """The tile to launch with: the fastest of the candidates, or the first where tuning is off.

    Args:
        candidates: tiles that fit the chip, the default first.
        sizes: of the product, classed by the next powers of two.
        facts: what else decides which candidates there are, as text.
        x: an operand, for its dtype and device.
        run: launches with a tile; called for timing only.
    """
    if _folder is None or len(candidates) == 1 or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return candidates[0]
    from inrun_kernels.tiles import architecture

    device, chip = x.device, architecture(x.device)
    path = _folder / _file_name(torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu")
    if path not in _tables:
        _tables[path] = _read(path)
    table = _tables[path]
    classes = "x".join(str(1 << max(0, size - 1).bit_length()) for size in asdict(sizes).values())
    of_candidates = zlib.crc32(repr(candidates).encode())  # which also depend on what the classes leave out
    key = f"{kernel} {form} {str(x.dtype).removeprefix('torch.')} {classes} {facts} {of_candidates:08x}"
    if key not in table:
        kept = candidates
        if chip in CEILINGS:
            seconds = {c: predict(kernel, sizes, CEILINGS[chip], x.dtype, c, form).seconds for c in candidates}
            kept = [c for c in candidates if seconds[c] <= _BEHIND * min(seconds.values())]
        times = {tile: _time(run, tile) for tile in kept}
        table[key] = asdict(min(times, key=lambda tile: times[tile]))
        _write(path, table)
    return Tile(**table[key])


def _time(run: Callable[[Tile], object], tile: Tile) -> float:
    """Milliseconds, infinite where the tile needs more than the chip has."""
    import triton

    try:
        return triton.testing.do_bench(lambda: run(tile), return_mode="median")  # pyright: ignore[reportReturnType]
    except triton.runtime.errors.OutOfResources:
        return float("inf")


@cache
def _file_name(device: str) -> str:
    facts = device, torch.__version__, installed("triton") or "none", installed("inrun") or "none"
    return re.sub(r"[^\w.+-]+", "_", "-".join(facts)) + ".json"


def _read(path: Path) -> dict[str, dict]:
    try:
        return json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # no text, or no JSON
        return {}


def _write(path: Path, table: dict[str, dict]) -> None:
    """Whole or not at all, with what other processes wrote meanwhile."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".tmp", delete=False) as file:
        json.dump(_read(path) | table, file, indent=1)
    os.replace(file.name, path)


if os.environ.get("INRUN_TUNE") == "1":
    tune()
