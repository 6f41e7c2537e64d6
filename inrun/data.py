"""Text to fixed-length training samples, each with a stable id and a source, in an order that is a pure
function of (seed, epoch).

A sample is a piece of one document: `block_size + 1` tokens, of which the last `block_size` are predicted.
Neighbouring pieces share one token, so every token but a document's first is predicted exactly once.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from inrun.errors import InRunError

IGNORE = -100  # target of a padded position, as in torch's cross_entropy


@dataclass(frozen=True)
class Document:
    """One text: a file, or one line of a JSONL file."""

    id: str
    source: str
    data: bytes


class Codec(Protocol):
    vocab_size: int

    def encode(self, data: bytes) -> np.ndarray: ...

    def decode(self, tokens: np.ndarray) -> str: ...


class ByteCodec:
    """A token is a byte, so text in any encoding, or in none, is kept as it is."""

    vocab_size = 256

    def encode(self, data: bytes) -> np.ndarray:
        return np.frombuffer(data, dtype=np.uint8)

    def decode(self, tokens: np.ndarray) -> str:
        return tokens.astype(np.uint8).tobytes().decode("utf-8", errors="replace")


class TokenizerCodec:
    """Tokens of a Hugging Face `tokenizer.json`; bytes that are not UTF-8 become U+FFFD."""

    def __init__(self, path: Path) -> None:
        try:
            from tokenizers import Tokenizer  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise InRunError("tokenizer: needs the package `tokenizers`: pip install tokenizers") from None
        if not path.is_file():
            raise FileNotFoundError(f"tokenizer: no such file: {path}")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # it raises no other kind
            raise ValueError(f"tokenizer: expected a tokenizer.json, got {path}: {error}") from None
        self.vocab_size = self._tokenizer.get_vocab_size()

    def encode(self, data: bytes) -> np.ndarray:
        text = data.decode("utf-8", errors="replace")
        return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def decode(self, tokens: np.ndarray) -> str:
        return self._tokenizer.decode(tokens.tolist(), skip_special_tokens=False)


@dataclass(frozen=True)
class Samples:
    """N samples: tokens [N, block_size + 1] (padded with 0), lengths [N], and per sample an id, the name of
    its source and what was planted in it ("" for nothing)."""

    tokens: np.ndarray
    lengths: np.ndarray
    ids: list[str]
    sources: list[str]
    planted: list[str]
    codec: Codec

    def __len__(self) -> int:
        return len(self.ids)

    def text(self, index: int) -> str:
        """The text of one sample."""
        return self.codec.decode(self.tokens[index, : self.lengths[index]])

    def take(self, indices: Sequence[int] | np.ndarray) -> Samples:
        """The samples at `indices`, in that order."""
        ids, sources, planted = ([column[i] for i in indices] for column in (self.ids, self.sources, self.planted))
        return Samples(self.tokens[indices], self.lengths[indices], ids, sources, planted, self.codec)

    def batch(self, indices: Sequence[int] | np.ndarray, device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:
        """Inputs and targets of some samples, int64 [B, block_size] each; padding has target `IGNORE`."""
        tokens = torch.from_numpy(self.tokens[indices].astype(np.int64))
        x, y = tokens[:, :-1], tokens[:, 1:].clone()
        y[torch.arange(y.shape[1]) >= torch.from_numpy(self.lengths[indices] - 1)[:, None]] = IGNORE
        return x.to(device), y.to(device)

    def keys(self) -> list[bytes]:
        """What is equal for two samples exactly when their tokens are."""
        return [row[:n].tobytes() for row, n in zip(self.tokens, self.lengths, strict=True)]

    def fingerprint(self) -> str:
        """A digest of all tokens and ids, in order."""
        digest = hashlib.sha256("\0".join(self.ids).encode())
        digest.update(np.ascontiguousarray(self.tokens).tobytes() + self.lengths.tobytes())
        return digest.hexdigest()


def join(parts: Sequence[Samples]) -> Samples:
    """All samples of `parts`, in order."""
    ids, sources, planted = (
        [x for part in parts for x in getattr(part, name)] for name in ("ids", "sources", "planted")
    )
    tokens, lengths = (np.concatenate([getattr(p, name) for p in parts]) for name in ("tokens", "lengths"))
    return Samples(tokens, lengths, ids, sources, planted, parts[0].codec)


def cut(documents: Iterable[Document], block_size: int, codec: Codec | None = None) -> Samples:
    """Cut documents into samples; the k-th piece of document `d` has the id `d` (k = 0) or `d#k`.

    Raises:
        ValueError: if two documents share an id, or no document holds two tokens.
    """
    codec = codec or ByteCodec()
    pieces: list[np.ndarray] = []
    ids: list[str] = []
    sources: list[str] = []
    for document in documents:
        tokens = codec.encode(document.data)
        for k, start in enumerate(range(0, len(tokens) - 1, block_size)):
            pieces.append(tokens[start : start + block_size + 1])
            ids.append(document.id if k == 0 else f"{document.id}#{k}")
            sources.append(document.source)
    if not pieces:
        raise ValueError("text: expected at least two tokens, got none or one")
    if len(set(ids)) < len(ids):
        seen: set[str] = set()
        twice = next(i for i in ids if i in seen or seen.add(i))
        raise ValueError(f"text: expected every sample id once, got {twice!r} more than once")
    lengths = np.array([len(piece) for piece in pieces])
    rows = np.zeros((len(pieces), block_size + 1), dtype=pieces[0].dtype)
    for row, piece in zip(rows, pieces, strict=True):
        row[: len(piece)] = piece
    return Samples(rows, lengths, ids, sources, [""] * len(ids), codec)


def _read_jsonl(path: Path, name: str, source: str) -> Iterator[Document]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8", errors="replace"))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: expected JSON, got {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get("text"), str):
                raise ValueError(f'{path}, line {number}: expected an object with a string "text"')
            id_ = record.get("id")
            id_ = f"{name}:{number}" if id_ is None else _plain(id_)
            text = record["text"].encode("utf-8", errors="replace")  # "replace": JSON can hold lone surrogates
            named = record.get("source")
            yield Document(id_, source if named is None else _plain(named), text)


def _read_file(path: Path, name: str, source: str) -> Iterator[Document]:
    name, source = _plain(name), _plain(source)
    if path.suffix == ".jsonl":
        yield from _read_jsonl(path, name, source)
    else:
        yield Document(name, source, path.read_bytes())


def _plain(name: Any) -> str:
    """An id or a source as UTF-8 can hold it: file names and JSON may have lone surrogates, shown as escapes."""
    return str(name).encode("utf-8", errors="backslashreplace").decode()


def read_text(paths: Sequence[Path]) -> list[Document]:
    """Read text files, JSONL files and folders of them (hidden, empty and binary files are left out).

    The source is the "source" field of a JSONL line; else, inside a given folder, the sub-folder directly
    below it that holds the file; else the name of the given folder or file. Ids are a JSONL line's "id" or
    `file:line`, and a file's path below (and with the name of) the given folder.

    Raises:
        FileNotFoundError: if a path does not exist.
        ValueError: if a path holds no text, or a JSONL line is not an object with a string "text".
    """
    documents: list[Document] = []
    for given in paths:
        path = Path(given)
        before = len(documents)
        if path.is_dir():
            root = path.resolve()
            for file in sorted(root.rglob("*")):
                inside = file.relative_to(root)
                if file.is_file() and not any(part.startswith(".") for part in inside.parts):
                    with file.open("rb") as f:
                        if b"\0" in f.read(8192):
                            continue
                    source = inside.parts[0] if len(inside.parts) > 1 else root.name
                    documents += _read_file(file, f"{root.name}/{inside.as_posix()}", source)
        elif path.exists():
            documents += _read_file(path, path.name, path.name)
        else:
            raise FileNotFoundError(f"text: no such file or folder: {path}")
        if not any(document.data for document in documents[before:]):
            raise ValueError(f"text: expected some text in {path}, got none")
    return documents


def split(
    documents: Sequence[Document], source: str, fraction: float, seed: int
) -> tuple[list[Document], list[Document]]:
    """Hold out a fraction (by bytes) of the documents of one source; returns (training, held out).

    The documents held out are drawn with `seed`; the last one drawn is divided so that the fraction is met,
    which also lets a source of one single document be split.

    Raises:
        ValueError: if `source` is not among the sources or `fraction` is not strictly between 0 and 1.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"holdout_fraction: expected a number between 0 and 1, got {fraction}")
    mine = [i for i, document in enumerate(documents) if document.source == source]
    if not mine:
        known = ", ".join(sorted({document.source for document in documents}))
        raise ValueError(f"holdout: expected one of the sources {known}; got {source!r}")
    left = round(fraction * sum(len(documents[i].data) for i in mine))
    training, held_out = list(documents), []
    for i in np.random.default_rng(seed).permutation(mine):
        document = documents[i]
        at = max(len(document.data) - left, 0)
        held_out.append(Document(f"{document.id}@{at}" if at else document.id, source, document.data[at:]))
        training[i] = Document(document.id, source, document.data[:at])
        left -= len(document.data) - at
        if left <= 0:
            break
    return training, held_out


def without(training: Samples, validation: Samples) -> Samples:
    """The training samples that are not also, token for token, validation samples."""
    chosen = set(validation.keys())
    keep = [i for i, key in enumerate(training.keys()) if key not in chosen]
    if not keep:
        raise ValueError("text: every training sample is also validation text; choose other validation text")
    return training.take(keep)


@functools.lru_cache(maxsize=2)
def epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    """The order of n samples in one epoch: a permutation that depends on nothing but the arguments."""
    return np.random.default_rng((seed, epoch)).permutation(n)


def batch_at(step: int, batch_size: int, n: int, seed: int) -> np.ndarray:
    """Indices [batch_size] of the samples of one step; epochs follow one another without a gap."""
    positions = np.arange(step * batch_size, (step + 1) * batch_size)
    return np.array([epoch_order(n, seed, int(p // n))[p % n] for p in positions])
