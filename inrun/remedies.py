"""Which modules would score the parameters of layers whose rows are not the samples: the `through=` that says so."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

from torch import nn

from .forward_mode import sample_axis
from .layers import EmbeddingRule, Rule
from .rules import is_inside

Shape = tuple[int, ...]
# Of each call of each module: the shape of its first input (None), if any, and of each of its outputs, by number.
Shapes = dict[Any, list[dict[int | None, Shape]]]


def remedies(
    model: nn.Module,
    whole: Shapes,
    more: Shapes,
    rows: tuple[int, int],
    tokens: Collection[int],
    suspected: Collection[str] = (),
) -> list[tuple[str, str]]:
    """Names of parameters, or patterns -> the module around them whose outputs have the samples in front.

    Args:
        model: with tracked modules.
        whole, more: of a run on B samples, and on more; outputs that take a gradient.
        rows: how many those are.
        tokens: as many rows for a sample are scored as its tokens, flattened, in layers that know these.
        suspected: layers that are to be scored otherwise if their input is shared by all samples, `[1, ...]`, or
            seems to be their tokens; and parameters that are to be.

    Raises:
        LookupError: a layer is to be scored by the model itself, which returns nothing of `[B, ...]`.
    """
    modules = dict(model.named_modules())
    alike = {_template(name) for name in suspected}  # the same layer of other blocks will be so too

    def outputs_follow(path: str, enough: Callable[[Iterable[bool]], bool] = all) -> bool:
        for one, other in _pairs(whole, more, module := modules[path]):
            leaves = {i: (shape, other.get(i, ())) for i, shape in one.items() if i is not None}
            if not enough(_follow(pair, sample_axis(module, i), rows) for i, pair in leaves.items()) or not leaves:
                return False
        return module in whole and len(whole[module]) == len(more.get(module, ()))

    def is_scored(path: str, layer: Rule) -> bool:
        trusted = _template(path) not in alike
        for one, other in _pairs(whole, more, layer):
            before, after = shapes = one.get(None, ()), other.get(None, ())  # subclasses may take other things
            ids = isinstance(layer, EmbeddingRule)  # `[T]`; a single one has no rows
            shared = all(shape[:1] == (1,) if len(shape) > 1 else ids and len(shape) == 1 for shape in shapes)
            each, rest = divmod(before[0] if before else 0, rows[0])
            folded = layer.may_fold and not rest and each in tokens and after[:1] == (each * rows[1],)
            known = trusted and (shared or folded or None not in one)
            if not (known or _follow(shapes, sample_axis(layer, 0), rows)):
                return False
        return len(whole[layer]) == len(more.get(layer, ()))

    owners: dict[str, list[str]] = {}  # of each parameter, what scores it: several where it is tied
    for path, module in modules.items():
        if (tap := getattr(module, "_inrun", None)) is not None and tap.name == path:
            for name in tap.parameters:
                owners.setdefault(name, []).append(path)

    def may_take(path: str, around: str) -> bool:
        """Whether all uses of all parameters in it are inside of the module around."""
        tied = (paths for name, paths in owners.items() if any(_is_within(p, path) for p in [name, *paths]))
        return all(_is_within(p, around) for paths in tied for p in paths)

    found: dict[str, dict[str, list[str]]] = {}  # module -> modules inside that it would score, and their parameters
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
            if outputs_follow(around) and all(_is_within(p, around) for name in tap.parameters for p in owners[name]):
                break
        if not around and not outputs_follow("", any):  # the others might not be used
            raise LookupError(path)
        found.setdefault(around, {})[path] = tap.parameters
    pairs = []
    for around, paths in found.items():
        common = _common(list(paths))
        if len(paths) > 2 and common and may_take(common, around):
            pairs.append((f"{common}.*", around))
            continue
        for path, names in paths.items():
            whole_path = may_take(path, around) and all(_is_within(name, path) for name in names)
            pairs += [(name, around) for name in ([f"{path}.*"] if whole_path else names)]
    return pairs


def _common(paths: Sequence[str]) -> str:
    """The innermost module around all of them."""
    levels = zip(*(path.split(".") for path in paths), strict=False)
    return ".".join(level[0] for level in itertools.takewhile(lambda level: len(set(level)) == 1, levels))


def _pairs(whole: Shapes, more: Shapes, module: Any) -> Any:
    return zip(whole.get(module, ()), more.get(module, ()), strict=False)


def _follow(shapes: tuple[Shape, Shape], axis: int, rows: tuple[int, int]) -> bool:
    return tuple(shape[axis] if len(shape) > axis else None for shape in shapes) == rows


def _is_within(name: str, path: str) -> bool:
    """Or the same."""
    return name == path or is_inside(name, path)


def as_code(pairs: Sequence[tuple[str, str]]) -> str:
    """A dict of names, in Python; of those that differ in numbers, of a list's layers, one comprehension.

    >>> as_code([("a.0.b.*", "a.0"), ("a.1.b.*", "a.1"), ("c.*", "")])
    '{"c.*": ""} | {f"a.{i}.b.*": f"a.{i}" for i in range(2)}'
    """
    groups: dict[tuple[str, str], dict[tuple[int, ...], tuple[str, str]]] = {}
    for name, target in pairs:
        numbers = tuple(int(part) for part in name.split(".") if part.isdigit())
        alike = _is_within(name, target) and len(numbers) <= len(_LETTERS) and "{" not in name
        key = (_template(name), _template(target)) if alike else (name, target)
        groups.setdefault(key, {})[numbers] = name, target
    single, many = [], []
    for (name, target), found in groups.items():
        if len(found) == 1:
            single += ['"{}": "{}"'.format(*one) for one in found.values()]
            continue
        numbers = sorted(found)
        letters = _LETTERS[: len(numbers[0])]
        flat = [one for (one,) in numbers] if len(letters) == 1 else numbers
        over = f"range({len(flat)})" if flat == list(range(len(flat))) else str(flat)
        value = f'f"{target}"' if "{" in target else f'"{target}"'
        many.append(f'{{f"{name}": {value} for {", ".join(letters)} in {over}}}')
    return " | ".join(([f"{{{', '.join(single)}}}"] if single else []) + many)


_LETTERS = "ijklmn"


def _template(path: str) -> str:
    """Letters in braces for its numbers."""
    letters = iter(_LETTERS)
    return ".".join(f"{{{next(letters)}}}" if part.isdigit() else part for part in path.split("."))
