"""Which modules would score the parameters of layers whose rows are not the samples: the `through=` that says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import nn

from .forward_mode import sample_axis
from .layers import EmbeddingRule, Rule

Shape = tuple[int, ...]
# Of each call of each module: the shape of its first input (None), if any, and of each of its outputs, by number.
Shapes = dict[Any, list[dict[int | None, Shape]]]


def remedies(
    model: nn.Module,
    whole: Shapes,
    fewer: Shapes,
    rows: int,
    tokens: Collection[int],
    suspected: Collection[str] = (),
) -> list[tuple[str, str]] | None:
    """Names of parameters, or patterns -> the module around them whose outputs have the samples in front.

    Args:
        model: with tracked modules.
        whole, fewer: of a run on B samples, and on one fewer; outputs that take a gradient.
        rows: B.
        tokens: as many rows for a sample are scored as its tokens, flattened, in layers that know these.
        suspected: layers that are to be scored otherwise if their input is shared by all samples, `[1, ...]`; and
            parameters that are to be.

    Returns:
        None where the model does not return any `[B, ...]`.
    """
    modules = dict(model.named_modules())

    def outputs_follow(path: str, enough: Callable[[Iterable[bool]], bool] = all) -> bool:
        for one, other in _pairs(whole, fewer, module := modules[path]):
            leaves = {i: (shape, other.get(i, ())) for i, shape in one.items() if i is not None}
            if not enough(_follow(pair, sample_axis(module, i), rows) for i, pair in leaves.items()) or not leaves:
                return False
        return module in whole and len(whole[module]) == len(fewer.get(module, ()))

    def is_scored(path: str, layer: Rule) -> bool:
        for one, other in _pairs(whole, fewer, layer):
            before, after = shapes = one[None], other[None]
            shared = all(shape[:1] == (1,) or len(shape) < 1 + isinstance(layer, EmbeddingRule) for shape in shapes)
            shared = shared and path not in suspected
            each, rest = divmod(before[0] if before else 0, rows)
            folded = layer.may_fold and not rest and each in tokens and after[:1] == (each * (rows - 1),)
            if not (shared or folded or _follow(shapes, 0, rows)):
                return False
        return len(whole[layer]) == len(fewer.get(layer, ()))

    owners: dict[str, list[str]] = {}  # of each parameter, what scores it: several where it is tied
    for path, module in modules.items():
        if (tap := getattr(module, "_inrun", None)) is not None and tap.name == path:
            for name in tap.parameters:
                owners.setdefault(name, []).append(path)
    found: dict[str, dict[str, str]] = {}  # module -> patterns, and what is scored so far by what they name
    for path, module in modules.items():
        tap = getattr(module, "_inrun", None)
        if not path or tap is None or tap.name != path or tap.routed:
            continue
        if module not in whole:
            known = True
        elif isinstance(module, Rule):
            known = is_scored(path, module)
        else:
            known = None in whole[module][0] and outputs_follow(path)
        if known and not any(name in suspected for name in tap.parameters):
            continue
        around = path
        while around:
            around = around.rpartition(".")[0]
            if outputs_follow(around) and all(_is_inside(p, around) for name in tap.parameters for p in owners[name]):
                break
        if not around and not outputs_follow("", any):  # the others might not be used
            return None
        names = tap.parameters
        own = all(_is_inside(name, path) for name in names)
        found.setdefault(around, {}).update(dict.fromkeys([f"{path}.*"] if own else names, path))
    pairs = []
    for around, patterns in found.items():
        common = _common([*patterns.values()]) if len(patterns) > 2 else ""
        inside = {n for n, paths in owners.items() if any(_is_inside(p, common) for p in paths)}
        if common and all(_is_inside(p, around) for n in inside for p in owners[n]):
            patterns = [f"{common}.*"]
        pairs += [(pattern, around) for pattern in patterns]
    return pairs


def _common(paths: Sequence[str]) -> str:
    """The innermost module around all of them."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def _pairs(whole: Shapes, fewer: Shapes, module: Any) -> Any:
    return zip(whole.get(module, ()), fewer.get(module, ()), strict=False)


def _follow(shapes: tuple[Shape, Shape], axis: int, rows: int) -> bool:
    return [shape[axis : axis + 1] for shape in shapes] == [(rows,), (rows - 1,)]


def _is_inside(name: str, path: str) -> bool:
    return not path or f"{name}.".startswith(f"{path}.")


def as_code(pairs: Sequence[tuple[str, str]]) -> str:
    """A dict of names, in Python; of those that differ in numbers, of a list's layers, one comprehension.

    >>> as_code([("a.0.b.*", "a.0"), ("a.1.b.*", "a.1"), ("c.*", "")])
    '{"c.*": ""} | {f"a.{i}.b.*": f"a.{i}" for i in range(2)}'
    """
    groups: dict[tuple[str, str], list[tuple[int, ...]]] = {}
    for name, target in pairs:
        numbers = [int(part) for part in target.split(".") if part.isdigit()]
        lead = target if name.startswith(target) else ""
        parts = name.removeprefix(lead).split(".")
        rest = ".".join("*" if part.isdigit() else part for part in parts)
        groups.setdefault((_template(lead) + rest, _template(target)), []).append(tuple(numbers))
    single, many = [], []
    for (name, target), found in groups.items():
        numbers = sorted(set(found))
        if len(numbers) == 1:
            single.append(f'"{name.format(*numbers[0])}": "{target.format(*numbers[0])}"')
            continue
        letters = "ijklmn"[: len(numbers[0])]
        name, target = (text.format(*(f"{{{letter}}}" for letter in letters)) for text in (name, target))
        flat = [one for (one,) in numbers] if len(letters) == 1 else numbers
        over = f"range({len(flat)})" if flat == list(range(len(flat))) else str(flat)
        many.append(f'{{f"{name}": f"{target}" for {", ".join(letters)} in {over}}}')
    return " | ".join(([f"{{{', '.join(single)}}}"] if single else []) + many)


def _template(path: str) -> str:
    return ".".join("{}" if part.isdigit() else part for part in path.split("."))
