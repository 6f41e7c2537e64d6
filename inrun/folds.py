"""Layers whose rows are samples' tokens, flattened: `head(h.view(-1, W))`, OPT's blocks.

Such a layer's `[B * T, W]` can be scored where the samples' rows lie one after the other. Whether they do is found out
once, before the update of the step that met them first, of layers that have as many rows for a sample as an input has:
the model is run again, without gradients and in eval mode, on the batch and on the batch with its samples moved on by
one, when the layer's rows must have moved on by as many as belong to a sample. (Not within the forward: the user's own
contexts around it cannot be entered twice.)
"""

from __future__ import annotations

import math
import sys
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import InRunError
from .restoring import as_it_was, random_kept

_PLAIN = (Tensor, int, float, str, torch.dtype, torch.device)
SAME, OTHER = 1e-3, 1e-2  # of the largest mark: up to the former two are equal, from the latter on they differ


class Folds:
    """Which layers of a model hold several rows for each sample of a batch, sample after sample.

    Args:
        model: what it is called with has the samples in front.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._known: set[nn.Module] = set()
        self._asked: dict[Any, tuple[int, ...]] = {}  # layers, and their inputs' shapes
        self._call: tuple[Any, int, tuple[Any, ...]] | None = None  # the model's inputs, B, and autocast
        self.rows = 0  # B of the next forward; 0 where values belong to documents or tokens
        self._sizes: set[int] | None = None  # what a sample may have of rows there

    def begin(self, rows: int) -> None:
        """A forward of so many samples will come; 0 where values belong to documents or tokens."""
        self.rows, self._sizes = rows, None

    def are_in(self, layer: nn.Module, x: Tensor) -> bool:
        """Whether the layer's input is taken for flattened tokens, for now; `verify` raises where it is not."""
        if not self.rows or x.shape[0] in (1, self.rows) or x.shape[0] % self.rows:
            return False
        if self.rows == 1:
            return True
        if self._sizes is None:
            self._sizes = self._sizes_of(self._inputs())
        # As many as an input has: tokens that were picked out have as many only where each sample has all of its own.
        if x.shape[0] // self.rows not in self._sizes:
            return False
        if layer in self._known or layer in self._asked:
            return True
        if self._call is None:
            inputs, kind = self._inputs(), x.device.type
            leaves = pytree.tree_leaves(inputs)
            if not all(y is None or isinstance(y, _PLAIN) for y in leaves):  # a cache, say, would take each run in
                return False
            autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind), False
            self._call = inputs, self.rows, autocast
        self._asked[layer] = tuple(x.shape)
        return True

    def verify(self) -> None:
        """Raise `InRunError` where an input was taken for what it is not."""
        if self._call is None:
            return
        (inputs, self.rows, autocast), asked = self._call, self._asked
        self.forget()
        leaves, spec = pytree.tree_flatten(inputs)
        moved = [x.roll(1, 0) if self._has_samples(x) else x for x in leaves]
        if all(torch.equal(x, y) for x, y in zip(leaves, moved, strict=True) if isinstance(x, Tensor)):
            return  # samples that are all alike tell nothing: the next step is asked
        runs, why = [], None
        try:
            with as_it_was(self._model), torch.no_grad(), torch.autocast(*autocast):
                self._model.eval()
                for each in (leaves, moved):
                    with random_kept():
                        runs.append(self._marks(asked, *pytree.tree_unflatten(each, spec)))
        except Exception as error:  # of a model that does not run like this
            runs, why = [], error
        for layer, shape in asked.items():
            first, second = (run.get(layer, []) for run in runs) if runs else ([], [])
            if len(first) != len(second) or not all(map(self._moved_on, first, second)) or not first:
                raise InRunError(
                    f"{layer._inrun}: expected an input [B, ...], or [B * T, ...] of tokens, sample "
                    f"after sample, with B = {self.rows}; got {shape}, whose rows did not move on when the samples of "
                    "the model's input did. Name a module around it that returns [B, ...], track(..., "
                    "through={parameter: module}), or exclude its parameters"
                ) from why
        self._known.update(asked)

    def forget(self) -> None:
        """What was asked in a step that is over."""
        self._asked, self._call = {}, None

    def _has_samples(self, x: Any) -> bool:
        return isinstance(x, Tensor) and x.dim() > 0 and len(x) == self.rows

    def _sizes_of(self, inputs: Any) -> set[int]:
        """Products of sizes that the model's inputs have beside B."""
        shapes = [x.shape[1:] for x in pytree.tree_leaves(inputs) if self._has_samples(x)]
        picks = (pick for shape in shapes for n in range(1, len(shape) + 1) for pick in combinations(shape, n))
        return {math.prod(pick) for pick in picks}

    def _inputs(self) -> tuple[tuple, dict] | None:
        """What the model was called with, in the forward that is going on: looked up on the stack, as a hook would be
        copied and pickled with the model, and a graph be captured anew for it."""
        frame = sys._getframe()
        while frame is not None:
            if frame.f_code is nn.Module._call_impl.__code__ and frame.f_locals["self"] is self._model:
                return frame.f_locals["args"], frame.f_locals["kwargs"]
            frame = frame.f_back
        return None

    def _marks(self, layers: Any, args: tuple, kwargs: dict) -> dict[nn.Module, list[Tensor]]:
        """Two numbers for each row of each input that each layer is called with."""
        found: dict[nn.Module, list[Tensor]] = {}

        def note(layer: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            rows = x.detach().reshape(len(x), -1).float()
            weights = torch.arange(rows.shape[1], device=x.device, dtype=torch.float32).cos()
            found.setdefault(layer, []).append(torch.stack([rows @ weights, rows.norm(dim=1)]))

        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            self._model(*args, **kwargs)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def _moved_on(self, before: Tensor, after: Tensor) -> bool:
        if before.shape != after.shape or before.shape[1] % self.rows:
            return False
        expected, size = before.roll(before.shape[1] // self.rows, 1), before.abs().max()
        differs = (expected - before).abs().max() > OTHER * size
        return bool(differs & ((after - expected).abs().max() <= SAME * size))
