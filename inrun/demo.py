"""A demo corpus made of text that every install already holds, so that `inrun train` needs no download.

Sources: Python's standard library ("python", also the domain of the validation text, which comes from files
of their own), its language reference ("docs"), torch's C++ headers ("cpp") and licence texts ("licenses").
Two kinds of known answers are planted among the Python samples: copies with their bytes shuffled, and exact
duplicates.
"""

from __future__ import annotations

import importlib.util
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from inrun.data import Document, Samples, cut, join, without

# Left out of "python": tests, prose in string form, and tables of code points and other generated text.
_NOT_CODE = {"test", "tests", "idle_test", "lib2to3", "pydoc_data", "encodings", "site-packages", "dist-packages"}


_LONGEST = 20_000  # bytes taken of one file


def _python_files() -> Iterator[tuple[str, Path]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root)
        if not _NOT_CODE.intersection(inside.parts) and not path.name.startswith("_sysconfigdata"):
            yield f"python/{inside.as_posix()}", path


def _docs() -> list[Document]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # a system Python may ship without it
        return []
    return [Document(f"docs/{name}", "docs", text.encode()) for name, text in sorted(topics.items())]


def _cpp_files() -> Iterator[tuple[str, Path]]:
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None
    root = Path(spec.origin).parent / "include"
    for path in sorted(root.glob("c10/**/*.h")) + sorted(root.glob("torch/**/*.h")):
        yield f"cpp/{path.relative_to(root).as_posix()}", path


def _license_files() -> Iterator[tuple[str, Path]]:
    site = Path(sysconfig.get_paths()["purelib"])
    for path in sorted(site.glob("*.dist-info/**/*")):
        if path.is_file() and path.name.upper().startswith(("LICEN", "COPYING", "NOTICE", "THIRD")):
            yield f"licenses/{path.relative_to(site).as_posix()}", path


def some(documents: Iterable[Document], n: int, block_size: int, rng: np.random.Generator) -> Samples:
    """n different full-length samples drawn from everything `documents` hold (all of them where fewer)."""
    samples = cut(documents, block_size)
    first_with_key = {key: i for i, key in reversed(list(enumerate(samples.keys())))}
    full = [i for i in sorted(first_with_key.values()) if samples.lengths[i] == block_size + 1]
    return samples.take(sorted(rng.choice(full, size=min(n, len(full)), replace=False)))


def _read(files: Iterable[tuple[str, Path]], source: str, rng: np.random.Generator, limit: int = 200) -> list[Document]:
    """The beginnings of at most `limit` files, drawn at random: long files are not to make up a source."""
    listed = list(files)
    chosen = rng.choice(len(listed), size=min(limit, len(listed)), replace=False)
    return [Document(listed[i][0], source, listed[i][1].read_bytes()[:_LONGEST]) for i in chosen]


def plant(samples: Samples, source: str, count: int, rng: np.random.Generator) -> Samples:
    """Add `count` byte-shuffled copies and `count` exact duplicates of different samples of one source.

    The copies keep the source's name; `planted` says "shuffled" or "duplicate", and a copy's id is its
    original's id followed by "~shuffled" or "~duplicate".
    """
    mine = [i for i, name in enumerate(samples.sources) if name == source]
    chosen = rng.choice(mine, size=2 * count, replace=False)
    copies = []
    for kind, originals in (("shuffled", chosen[:count]), ("duplicate", chosen[count:])):
        copy = samples.take(originals)
        copies.append(replace(copy, ids=[f"{i}~{kind}" for i in copy.ids], planted=[kind] * count))
    copies[0] = replace(copies[0], tokens=rng.permuted(copies[0].tokens, axis=1))
    return join([samples, *copies])


def demo_corpus(
    block_size: int = 256, seed: int = 0, per_source: int = 180, planted: int = 45, validation: int = 16
) -> tuple[Samples, Samples]:
    """The demo's training and validation samples, the same on every call on one machine.

    Args:
        block_size: predicted bytes per sample.
        seed: draws the files, the samples and what is planted.
        per_source: samples drawn from each source, before planting.
        planted: byte-shuffled copies, and as many exact duplicates, of Python samples.
        validation: samples of the validation text, from Python files that give no training sample.

    Returns:
        (training, validation)
    """
    # A generator for each source: what is drawn from one does not hang on what another one holds.
    rngs = [np.random.default_rng((seed, i)) for i in range(5)]
    python = _read(_python_files(), "python", rngs[0])
    target = some(python[:50], validation, block_size, rngs[0])
    cpp, licenses = _read(_cpp_files(), "cpp", rngs[2]), _read(_license_files(), "licenses", rngs[3])
    parts = [
        without(some(texts, per_source, block_size, rng), target)
        for texts, rng in zip((python[50:], _docs(), cpp, licenses), rngs, strict=False)
        if texts
    ]
    return plant(join(parts), "python", planted, rngs[4]), target
