"""Paraphrase: a training sample is rewritten with growing distance; how high does it rank for its own rewriting?

A GPT is trained on the demo's sources. Of some Python samples, the originals, there are versions that rules have
rewritten: respaced (other quotes, tabs for indents), half of the names exchanged for names of other samples, all of
them, all of them with the lines in another order; then other text of the same file, and text of another file, where an
original means nothing. Each version is a validation target of its own, and all training samples are ranked by what
they did to it: 1 is the highest value. No version is trained on, nor is any text that is used as one.

Beside it: BM25 on words, which sees text alone; and the dot product and cosine of a sample's gradient with the
version's at the end of the run. A random order puts the original in the middle. The paper's ranks among some 320,000
samples, In-Run / influence function / BM25: paraphrase 1/1/1, significant paraphrase 32/39/1.6, similar topic
142-146/292/20917.

Sources: arXiv 2406.11011, section 5.3; BM25: Robertson and Zaragoza (2009), with k1 = 1.5 and b = 0.75.
"""

from __future__ import annotations

import keyword
import re
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .. import results
from ..config import GPTConfig
from ..data import Document, Samples, cut, join
from ..demo import demo_corpus
from . import Finding, panels, standard_error
from .textrun import loss, train

VERSIONS = ("exact copy", "respaced", "half the names", "all names", "names, lines", "same file", "other file")
_NAME = re.compile(r"[^\W\d]\w+")


def run(
    seed: int = 0, originals: int = 24, steps: int = 300, per_source: int = 200, config: GPTConfig | None = None
) -> Finding:
    """The rank of each original among all training samples, by version and by method."""
    config = config or GPTConfig(block_size=128, layers=2, heads=4, width=48)
    corpus, chosen, versions = texts(config.block_size, seed, originals, per_source)
    targets = {f"{i}": versions.take([i]) for i in range(len(versions))}
    record = train(corpus, seed=seed, steps=steps, targets=targets, method="first", validate_every=10, config=config)
    ours, theirs = _gradients(record.model, corpus), _gradients(record.model, versions)
    scores = {
        "In-Run, first order": record.totals(len(corpus)).T,
        "gradient dot, at the end": theirs @ ours.T,
        "gradient cosine, at the end": theirs @ (ours / np.linalg.norm(ours, axis=1, keepdims=True)).T,
        "BM25": bm25([_NAME.findall(corpus.text(i)) for i in range(len(corpus))],
                     [_NAME.findall(versions.text(i)) for i in range(len(versions))]),
    }  # fmt: skip
    wanted = np.tile(chosen, len(VERSIONS))  # versions are in the order of VERSIONS, then of originals
    ranks = {m: rank(s, wanted).reshape(len(VERSIONS), -1) for m, s in scores.items()}
    chance = (len(corpus) + 1) / 2
    rows = [[m, *(f"{r.mean():.1f} +-{standard_error(r):.1f}" for r in of)] for m, of in ranks.items()]
    rows += [[f"  median of {m}", *(f"{np.median(r):g}" for r in of)] for m, of in ranks.items()]
    rows.append(["random order", *[f"{chance:.1f}"] * len(VERSIONS)])
    text = (
        f"paraphrase: mean rank (+- standard error) of {len(chosen)} originals among {len(corpus)} training samples, "
        f"by what became of the text\n{results.table(['', *VERSIONS], rows)}"
    )
    example = {v: versions.text(i * len(chosen)) for i, v in enumerate(VERSIONS)}
    data = {"samples": len(corpus), "versions": VERSIONS, "ranks": {m: r.tolist() for m, r in ranks.items()}}
    return Finding(text, data | {"example": example}, _draw(ranks, chance))


def texts(block_size: int, seed: int, originals: int, per_source: int) -> tuple[Samples, np.ndarray, Samples]:
    """The training samples, the originals' rows [originals], and the versions in the order of `VERSIONS`."""
    corpus, unseen = demo_corpus(block_size, seed, per_source, planted=0, validation=originals)
    pieces: dict[str, list[int]] = {}
    for i, (name, source) in enumerate(zip(corpus.ids, corpus.sources, strict=True)):
        if source == "python" and len(_names(corpus.text(i))) >= 4:
            pieces.setdefault(name.partition("#")[0], []).append(i)
    pairs = [rows[:2] for rows in pieces.values() if len(rows) > 1][:originals]  # an original, and text of its file
    if len(pairs) < originals:
        raise ValueError(f"originals: expected at most {len(pairs)}, of as many files, got {originals}")
    first, second = np.array(pairs).T
    rng = np.random.default_rng(seed)
    others = sorted({n for i, s in enumerate(corpus.sources) if s == "python" for n in _names(corpus.text(i))})
    made: dict[str, list[str]] = {v: [] for v in VERSIONS[:5]}
    for text in map(corpus.text, first):
        all_new = renamed(text, 1.0, others, rng)
        lines = all_new.split("\n")
        forms = text, respaced(text), renamed(text, 0.5, others, rng), all_new, "\n".join(rng.permutation(lines))
        for version, form in zip(made, forms, strict=True):
            made[version].append(form)
    rewritten = cut(
        [
            Document(f"{version}/{i}", "python", form.encode()[: block_size + 1])
            for version, forms in made.items()
            for i, form in enumerate(forms)
        ],
        block_size,
    )
    versions = join([rewritten, corpus.take(second), unseen])
    kept = np.setdiff1d(np.arange(len(corpus)), second)
    return corpus.take(kept), np.searchsorted(kept, first), versions


def respaced(text: str) -> str:
    """The same program, spaced and quoted otherwise."""
    return text.translate(str.maketrans("'\"", "\"'")).replace("    ", "\t")


def renamed(text: str, share: float, others: Sequence[str], rng: np.random.Generator) -> str:
    """The text with a share of its names, rounded up, exchanged for some of `others`, each always for the same."""
    names = _names(text)
    chosen = rng.permutation(names)[: int(np.ceil(share * len(names)))]
    new = dict(zip(chosen.tolist(), rng.choice(others, len(chosen), replace=False).tolist(), strict=True))
    return _NAME.sub(lambda found: new.get(found[0], found[0]), text)


def _names(text: str) -> list[str]:
    """The words that are no keywords of Python, sorted."""
    return sorted(set(_NAME.findall(text)) - set(keyword.kwlist))


def bm25(documents: list[list[str]], queries: list[list[str]], k1: float = 1.5, b: float = 0.75) -> np.ndarray:
    """How well each document answers each query, float64 [queries, documents]; both are lists of words."""
    counts = [Counter(words) for words in documents]
    holding = Counter(word for count in counts for word in count)
    lengths = np.array([len(words) for words in documents])
    scores = np.zeros((len(queries), len(documents)))
    for row, query in zip(scores, queries, strict=True):
        for word in query:
            often = np.array([count[word] for count in counts])
            rare = np.log(1 + (len(documents) - holding[word] + 0.5) / (holding[word] + 0.5))
            row += rare * often * (k1 + 1) / (often + k1 * (1 - b + b * lengths / lengths.mean()))
    return scores


def rank(scores: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """The place, from 1, of one wanted column in each row, the highest score first; ties share their mean place."""
    own = scores[np.arange(len(scores)), wanted][:, None]
    return (scores > own).sum(1) + ((scores == own).sum(1) + 1) / 2


def _gradients(model: torch.nn.Module, samples: Samples) -> np.ndarray:
    """The gradient of each sample's mean loss, [N, P]."""
    params = list(model.parameters())
    rows = []
    for i in range(len(samples)):
        parts = torch.autograd.grad(loss(model, *samples.batch([i])), params)
        rows.append(torch.cat([g.flatten() for g in parts]))
    return torch.stack(rows).numpy()


def _draw(ranks: dict[str, np.ndarray], chance: float) -> Any:
    figure, (axes,) = panels(9, 4.4)
    at = np.arange(len(VERSIONS))
    for i, (method, of) in enumerate(ranks.items()):
        colour = ("#d1495b", "#8d99ae", "#30638e", "#edae49")[i]
        low, middle, high = np.quantile(of, [0.25, 0.5, 0.75], axis=1)
        shift = at + 0.06 * (i - 1.5)
        axes.plot(shift, middle, marker="o", color=colour, label=method, linewidth=2 if i == 0 else 1.2)
        axes.vlines(shift, low, high, color=colour, linewidth=2.5, alpha=0.4)
    axes.axhline(chance, color="black", linewidth=0.8, linestyle=":", label="random order")
    axes.set_yscale("log")
    axes.set_xticks(at, VERSIONS)
    axes.set(ylabel="rank of the original\n(median; bars: quartiles)", xlabel="what the validation text is")
    axes.invert_yaxis()
    axes.legend(frameon=False)
    return figure
