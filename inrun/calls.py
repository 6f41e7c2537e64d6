"""What a model was called with, which is called so again on others of its samples."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Collection, Sequence
from itertools import combinations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

_PLAIN = (Tensor, int, float, str, torch.dtype, torch.device)


class Call(NamedTuple):
    """What the model, or a module of it that the loop calls itself, was called with, of how many samples, and its
    autocast. It is told from other calls by `kwargs` itself: each call has a dict of its own, which is held here."""

    module: nn.Module
    args: tuple
    kwargs: dict
    rows: int
    autocast: tuple

    def of(self, order: Sequence[int], which: str = "all", but: Tensor | None = None) -> Call:
        """The call of these of its samples.

        Args:
            order: their numbers.
            which: inputs that have them. "all": tensors of B rows, and lists of B. "first": the first tensor of B rows
                alone, should another one have B of something else. "flattened": tokens as well, as many of each.
            but: an input that stays as it is.

        Raises:
            LookupError: nothing has them.
            ValueError: a list of B has tensors of B rows: either could be the samples; or a sparse tensor has B.
        """
        count = 0

        def changed(x: Any, top: bool = False) -> Any:
            nonlocal count
            if isinstance(x, Tensor) and x is but:
                return x
            if isinstance(x, Tensor) and _is_no_array(x) and x.dim() and len(x) == self.rows:
                raise ValueError("a sparse or nested tensor of as many rows as there are samples")
            if self.is_of_samples(x, parts=which == "flattened") and not (which == "first" and count):
                count += 1
                return x.unflatten(0, (self.rows, -1))[list(order)].flatten(0, 1)
            if isinstance(x, dict):
                return {name: changed(value) for name, value in x.items()}
            if type(x) not in (list, tuple):
                return x
            leaves = [] if top or len(x) != self.rows else pytree.tree_leaves(x)
            if not any(isinstance(leaf, Tensor) for leaf in leaves):
                return type(x)(map(changed, x))
            if any(map(self.is_of_samples, leaves)):
                raise ValueError("a list of as many tensors as each has rows")
            count += 1
            return type(x)(x[i] for i in order)

        args, kwargs = changed(self.args, top=True), changed(self.kwargs)
        if not count:
            raise LookupError("no input has samples")
        return self._replace(args=args, kwargs=kwargs)

    def is_of_samples(self, x: Any, parts: bool = False) -> bool:
        if not isinstance(x, Tensor) or _is_no_array(x) or x.dim() == 0 or len(x) == 0:
            return False
        return len(x) == self.rows or (parts and len(x) % self.rows == 0)

    def has_samples(self) -> bool:
        """Whether an input has them, as of `of`."""
        try:
            self.of(range(self.rows))
        except LookupError:
            return False
        except ValueError:  # of inputs of which either could
            pass
        return True

    def mapped(self, change: Callable[[Any], Any], is_leaf: Callable[[Any], bool] | None = None) -> Call:
        """The call with what `change` makes of each of its inputs."""
        args, kwargs = pytree.tree_map(change, (self.args, self.kwargs), is_leaf=is_leaf)
        return self._replace(args=args, kwargs=kwargs)

    def twice(self) -> Call:
        """The call of all its samples and again all of them, however many rows each has of a tensor."""

        def doubled(x: Any) -> Any:
            if isinstance(x, Tensor) and x.dim():
                return torch.cat([x, x])
            return x + x if type(x) is list else x

        return self.mapped(doubled, is_leaf=lambda x: type(x) is list and len(x) == self.rows)

    def order(self) -> list[int]:
        """Its samples moved on by one, but one stays: else a model that moves its own on, as by half a batch, would
        give the same rows, moved on. Where only one is another in an input, as padded, it is one that moves."""
        every = [self.rows - 1, *range(self.rows - 1)]
        inputs = [x for x in self.leaves() if self.is_of_samples(x) and not torch.equal(x[every], x)]
        for stays in reversed(range(self.rows if self.rows > 2 else 0)):
            others = [i for i in range(self.rows) if i != stays]
            order = [*others[-1:], *others[:-1]]
            order.insert(stays, stays)
            if not any(torch.equal(x[order], x) for x in inputs):
                return order
        return every

    def leaves(self) -> list[Any]:
        return pytree.tree_leaves((self.args, self.kwargs))

    def of_numbers_raised(self) -> Call | None:
        """The call with the numbers that are B, which might be how many samples there are, raised by one; None where
        there are none."""
        if not any(type(x) is int and x == self.rows for x in self.leaves()):
            return None
        return self.mapped(lambda x: x + 1 if type(x) is int and x == self.rows else x)

    def beside_samples(self) -> list[Tensor]:
        """Inputs of B rows and of floating-point numbers, as images, where another one has B rows as well."""
        tensors = [x for x in self.leaves() if self.is_of_samples(x)]
        return [x for x in tensors if x.is_floating_point() and x.dim() > 1] if len(tensors) > 1 else []

    def of_other(self, x: Tensor, rows: Tensor) -> Call:
        """The call with numbers of other rows of one input in these of its rows."""
        mixed = torch.where(rows.view(-1, *[1] * (x.dim() - 1)), x.roll(1, 0), x)
        return self.mapped(lambda y: mixed if y is x else y)

    def is_plain(self) -> bool:
        """Whether it can be made again: a cache, say, would take each run in."""
        return all(x is None or isinstance(x, _PLAIN) for x in self.leaves())

    def sizes(self) -> dict[int, set[tuple[Any, tuple[int, ...]]]]:
        """Products of sizes that the inputs have beside B, and of which inputs and dimensions each is."""
        found, inputs = {}, (self.args, self.kwargs)
        given, _ = pytree.tree_flatten_with_path(inputs, is_leaf=lambda x: type(x) not in (tuple, list, dict))
        for path, x in (((*path, i), x) for path, one in given for i, x in enumerate(pytree.tree_leaves(one))):
            axes = range(1, x.dim()) if self.is_of_samples(x) else ()
            for pick in (pick for n in range(1, len(axes) + 1) for pick in combinations(axes, n)):
                found.setdefault(math.prod(x.shape[axis] for axis in pick), set()).add((path, pick))
        return found


def going_on(model: nn.Module, inside: Collection[nn.Module], rows: int, device: str) -> Call | None:
    """The model's call that is going on, or where it is not called itself, the outermost of its modules', `inside`:
    looked up on the stack, as a hook would be copied and pickled with the model, and a graph be captured anew for it.

    Args:
        rows: its samples.
        device: type of the model's.
    """
    frame: Any = sys._getframe()
    found: Any = None
    while frame is not None and (found is None or called(found) is not model):
        if called(frame) in inside:
            found = frame
        frame = frame.f_back
    if found is None:
        return None
    autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device), False
    given = found.f_locals
    return Call(given["self"], given["args"], given["kwargs"], rows, autocast)


def called(frame: Any) -> nn.Module | None:
    """The module whose call a frame is, if it is one's."""
    return frame.f_locals["self"] if frame.f_code is nn.Module._call_impl.__code__ else None


def _is_no_array(x: Tensor) -> bool:
    return x.layout != torch.strided or x.is_nested
