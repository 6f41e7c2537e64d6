"""An output that plain training has once for all samples, as of position embeddings: watched until a step had several.

A layer whose input is `[1, ...]`, or positions `[T]`, returns a row for each sample in a step, `[B, ...]`, so that each
has a gradient of its own. Where that is added to a batch, or goes row by row, it comes to the same. Where it does not
(`p[0]`, `p.sum(0)`, `p.norm()`), another model would train, or one sample would have the gradient of all. So each
operation on such an output is tried with rows that differ; one that mixes them is an error as soon as a gradient comes
through it, and where none will (`p.detach().norm()`), is warned of.
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from .errors import InRunError
from .restoring import drew_since, random_state
from .tap import will_have_a_graph

_MASKS = (torch.bool, torch.uint8)


def require_in_range(size: int, index: Tensor) -> None:
    """Raise `IndexError` where an index is out of range, as a CPU does, of what is tried: a GPU's kernel would end all
    that the process can do with it. The device is waited for."""
    if index.numel():
        low, high = (int(x) for x in torch.aminmax(index))
        if low < -size or high >= size:
            raise IndexError(f"expected indices below {size}, got {low} to {high}")


class InRange(TorchDispatchMode):
    """Of an operation on a GPU, `require_in_range`."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        aten, looked_up = torch.ops.aten, []
        if func is aten.embedding.default:
            looked_up = [(args[0].shape[0], args[1])]
        elif func in (aten.index_select.default, aten.gather.default) and args[0].dim():
            looked_up = [(args[0].shape[args[1]], args[2])]
        elif func is aten.index.Tensor and not any(x is not None and x.dtype in _MASKS for x in args[1]):
            looked_up = [pair for pair in zip(args[0].shape, args[1], strict=False) if pair[1] is not None]
        for size, index in looked_up:
            if index.is_cuda:
                require_in_range(size, index)
        return func(*args, **(kwargs or {}))


class Shared(Tensor):
    """`[B, ...]`, of which plain training has one row: `[1, ...]`, or without `_lead` `[...]`."""

    _layer = ""
    _lead = True
    _made: list[Any]

    @classmethod
    def of(cls, rows: Tensor, layer: str, lead: bool, made: list[Any]) -> Shared:
        """Of these rows; `made` refers to all that there are, for `as_plain`."""
        found = rows.as_subclass(cls)
        found._layer, found._lead, found._made = layer, lead, made
        made.append(weakref.ref(found))
        return found

    def __reduce_ex__(self, protocol: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return self.as_subclass(Tensor).__reduce_ex__(protocol)  # as it is once it is saved, or copied, in a step

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, before = kwargs or {}, random_state()
        with torch._C.DisableTorchFunctionSubclass():
            ours = [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, cls)]
            try:
                with InRange():
                    result = func(*args, **kwargs)
            except (NotImplementedError, torch.AcceleratorError, torch.OutOfMemoryError):
                raise
            except (RuntimeError, ValueError, IndexError) as error:  # as of a matrix that has become one for each
                if not ours:
                    raise
                raise _refused(ours[0]._layer, ours[0].shape[0], func) from error
            leaves, spec = pytree.tree_flatten(result)
            computed = [i for i, x in enumerate(leaves) if isinstance(x, Tensor) and not isinstance(x, cls)]
            computed = [i for i in computed if leaves[i].is_floating_point() or leaves[i].is_complex()]
            if not computed or not ours or (not torch.is_grad_enabled() and will_have_a_graph()):
                return result
            layer, size, lead = ours[0]._layer, ours[0].shape[0], ours[0]._lead
            drew = drew_since(before)
            runs = None if drew else _tried(func, args, kwargs, size)
            for i in computed:
                x, first = leaves[i], None
                if runs is not None and any(len(run) != len(leaves) for run in runs):  # one for each, as of unbind
                    kind = "mixed"
                elif runs is None or not all(isinstance(run[i], Tensor) for run in runs):
                    # Dropout, or what plain training cannot compute.
                    kind = lead if x.shape == ours[0].shape else "own"
                    if drew and x.shape[:1] == (size,) and not torch.equal(x[0], x[-1]):
                        _warn_of_numbers(layer, func)
                else:
                    whole, first, last = (run[i] for run in runs)
                    kind = _kind(whole, first, last, size)
                if isinstance(kind, bool):
                    leaves[i] = cls.of(x, layer, kind, ours[0]._made)
                elif kind != "own" and not x.requires_grad:
                    if first is None or first.shape != x.shape or _apart(x, first):
                        _warn_of_constant(layer, size, func)
                elif kind == "misplaced":
                    raise _refused(layer, size, func)
                elif kind == "mixed":
                    x.register_hook(lambda grad: _raise(_refused(layer, size, func)))
            return pytree.tree_unflatten(leaves, spec)


def as_plain(made: Iterable[Any]) -> None:
    """What a model has kept of them, as without a gradient, is a tensor as any other, to be saved and loaded."""
    for found in (each() for each in made):
        if found is not None:
            found.__class__ = Tensor
            for name in ("_layer", "_lead", "_made"):
                vars(found).pop(name, None)


def _tried(func: Any, args: Any, kwargs: Any, size: int) -> list[list[Any]] | None:
    """The outputs for rows that differ, and for the first and the last of them alone as plain training has them."""

    def changed(x: Any, row: int | None) -> Any:
        if not isinstance(x, Tensor):
            return x
        rows = x.as_subclass(Tensor).detach().clone()
        if not isinstance(x, Shared):
            return rows
        rows *= 1 + 0.1 * torch.arange(size, device=rows.device).view(-1, *[1] * (rows.dim() - 1))
        return rows if row is None else rows[[row]] if x._lead else rows[row]

    found = []
    for row in (None, 0, size - 1):
        try:
            with torch.no_grad():
                here = pytree.tree_map(lambda x, row=row: changed(x, row), (args, kwargs))
                with InRange():
                    found.append(pytree.tree_leaves(func(*here[0], **here[1])))
        except Exception:  # of whatever plain training could not do
            return None
    return found


def _kind(whole: Tensor, first: Tensor, last: Tensor, size: int) -> bool | str:
    """Of an output: if it is shared still, whether it has a leading 1; "own", if rows are the samples'; else "mixed",
    or "misplaced", on which something else will fail."""
    if whole.dim() == 0 or whole.shape[0] != size:
        repeated = first.shape[:1] == (size,) and whole.shape[1:] == first.shape[1:]
        return "misplaced" if repeated or (whole.dim() > first.dim() > 0 and size in whole.shape[1:]) else "mixed"
    if first.shape == whole.shape:
        kind, rows = "own", (first[0], last[-1])
    elif first.shape == whole.shape[1:]:
        kind, rows = False, (first, last)
    elif first.shape == (1, *whole.shape[1:]):
        kind, rows = True, (first[0], last[0])
    else:
        return "mixed"
    return "mixed" if _apart(whole[0], rows[0]) or _apart(whole[-1], rows[1]) else kind


def _apart(a: Tensor, b: Tensor) -> bool:
    wide = torch.complex128 if a.is_complex() else torch.float64
    return bool((a.to(wide) - b.to(wide)).norm() > 1e-2 * b.to(wide).norm() + 1e-6)


def _warn_of_numbers(layer: str, func: Any) -> None:
    warnings.warn(
        f"{layer or 'model'}: {getattr(func, '__name__', func)}() draws random numbers on its output, which belongs to "
        "all samples together: for each of them in a step, where plain training draws once for all. To train as "
        "without a tracker, draw them on what each sample has of its own", stacklevel=5)  # fmt: skip


def _warn_of_constant(layer: str, size: int, func: Any) -> None:
    warnings.warn(
        f"{layer or 'model'}: {getattr(func, '__name__', func)}() takes, without a gradient, all rows of its output, "
        f"which belongs to no sample alone: in a step there are {size} of them, one for each, and what is found is not "
        "what it is without a tracker. If a loss depends on it, give the layer an input that has the samples, [B, ...]",
        stacklevel=5)  # fmt: skip


def _raise(error: Exception) -> None:
    raise error


def _refused(layer: str, size: int, func: Any) -> InRunError:
    return InRunError(
        f"{layer or 'model'}: expected its output, which belongs to no sample alone, to be added to the batch or to be "
        f"worked on row by row, got {getattr(func, '__name__', func)}(). In a step it has a row for each of the {size} "
        "samples. Give the layer an input that has them, [B, ...]; or score it by an enclosing module whose outputs "
        "are [B, ...], track(..., through={parameter: module}); or exclude its parameters. (A penalty on it belongs "
        "to no sample: check=False lets it pass.)",
        suspected={layer},
    )
