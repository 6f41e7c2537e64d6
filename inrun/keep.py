"""What a deferred step keeps until its direction is known: each layer's input, and the gradient of its output.

Kept tensors stay on their device, or go to (pinned) host memory; their bytes are counted and bounded. Layers with a
rule need nothing else. A module scored by forward-mode AD is run again, with the random numbers, autocast state and
weights it had.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from . import forward_mode
from .errors import InRunError
from .tap import SUFFIX, Tap, random_state, set_random_state


@dataclass
class _Kept:
    module: Any
    batch: int
    x: Any  # the layer's input, or (args, kwargs)
    grads: dict[int, Tensor] = field(default_factory=dict)  # output leaf -> gradient
    random: Any = None
    autocast: tuple[str, torch.dtype, bool] | None = None


class Keeper:
    """Keeps the layers of a step's batches, and scores them.

    Args:
        taps: of the tracked modules.
        where: "device", or "host" for pinned host memory.
        limit: bytes that may be kept; None for no limit.
        weights_move: whether the weights will have changed before the scoring.
    """

    def __init__(self, taps: Sequence[Tap], where: str, limit: int | None, weights_move: bool) -> None:
        self.taps, self.where, self.limit, self.weights_move = taps, where, limit, weights_move
        self.peak = 0
        self.reset()

    def reset(self) -> None:
        """Forget what was kept."""
        self.kept: list[_Kept] = []
        self.bytes = 0
        self.sizes: list[int] = []
        self._weights: dict[int, Tensor] = {}

    def begin_batch(self, size: int) -> None:
        """The layers run from now on see a batch of `size` samples, and are kept."""
        self.sizes.append(size)
        for tap in self.taps:
            tap.keep = self._run_module if tap.forward_mode else self._run_layer

    def pause(self) -> None:
        """The layers run from now on are plain."""
        for tap in self.taps:
            tap.keep = None

    def skip_batch(self, size: int) -> None:
        """Count a batch that is not kept, since it will be computed again."""
        self.sizes.append(size)
        self.pause()

    def _run_layer(self, module: Any, plain: Callable, x: Tensor) -> Tensor:
        x = module.by_sample(x, self.sizes[-1])
        y = plain(x)
        if y.requires_grad:
            kept = _Kept(module, len(self.sizes) - 1, x.detach())
            y.register_hook(functools.partial(self._arrived, kept, 0))
        return y

    def _run_module(self, module: Any, plain: Callable, inputs: tuple[tuple, dict]) -> Any:
        args, kwargs = pytree.tree_map(lambda v: v.detach() if isinstance(v, Tensor) else v, inputs)
        kind = next(module.parameters()).device.type
        autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        kept = _Kept(module, len(self.sizes) - 1, (args, kwargs), {}, random_state(), autocast)
        if self.weights_move:
            for name, p in module.named_parameters():
                if not name.endswith(SUFFIX):
                    self._weights.setdefault(id(p), p.detach().clone())
        leaves, spec = pytree.tree_flatten(plain(*inputs[0], **inputs[1]))
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad:
                # An alias: where one output is made from another, each has the gradient that came from outside.
                leaves[i] = leaf.view_as(leaf)
                leaves[i].register_hook(functools.partial(self._arrived, kept, i))
        return pytree.tree_unflatten(leaves, spec)

    def _arrived(self, kept: _Kept, leaf: int, grad: Tensor) -> None:
        if not kept.grads:
            kept.x = pytree.tree_map(self._store, kept.x)
            self.kept.append(kept)
        # The engine may reuse a gradient's memory only when nobody else holds it, so a reference is enough.
        kept.grads[leaf] = self._store(grad.detach())

    def _store(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        self.bytes += x.numel() * x.element_size()
        self.peak = max(self.peak, self.bytes)
        if self.limit is not None and self.bytes > self.limit:
            raise InRunError(
                f"keep: the step's activations and output gradients exceed keep_bytes={self.limit:,} "
                f"({self.bytes:,} so far); allow more, use smaller batches, keep='host', or give "
                "recompute= to step() or batch(), which keeps nothing"
            )
        if self.where == "device" or not x.is_cuda:
            return x
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        return host.copy_(x, non_blocking=True)

    def dots(self, many: int | None) -> list[dict[Tap, Tensor | None]]:
        """Of each batch, tap -> `[B]` or `[B, M]`: the dots along the directions as they stand."""
        found: list[dict[Tap, Tensor | None]] = [dict.fromkeys(self.taps) for _ in self.sizes]
        with torch.no_grad():
            for kept in self.kept:
                tap = kept.module._inrun
                dots = self._module_dots(kept, many) if tap.forward_mode else self._layer_dots(kept)
                before = found[kept.batch][tap]
                found[kept.batch][tap] = dots if before is None else before + dots
        return found

    def _layer_dots(self, kept: _Kept) -> Tensor:
        device = next(kept.module.parameters()).device
        return kept.module.dots(kept.x.to(device), kept.grads[0].to(device))

    def _module_dots(self, kept: _Kept, many: int | None) -> Tensor:
        module, device = kept.module, next(kept.module.parameters()).device
        args, kwargs = pytree.tree_map(lambda v: v.to(device) if isinstance(v, Tensor) else v, kept.x)
        rule: Any = type(module).__mro__[1]
        plain = super(rule, module).forward
        kind, dtype, enabled = kept.autocast or (device.type, torch.float32, False)
        columns = []
        for m in [None] if many is None else range(many):
            with torch.random.fork_rng(), torch.autocast(kind, dtype, enabled), self._weights_of(module):
                set_random_state(kept.random)
                tangents = forward_mode.tangents_only(module, module._inrun, plain, args, kwargs, m)
            columns.append(self._contract(module, kept, tangents, device))
        return columns[0] if many is None else torch.stack(columns, 1)

    def _contract(self, module: Any, kept: _Kept, tangents: list[Any], device: torch.device) -> Tensor:
        size = self.sizes[kept.batch]
        total = torch.zeros(size, device=device)
        for leaf, grad in kept.grads.items():
            tangent = tangents[leaf]
            if tangent is not None and bool(tangent.any()):
                product = forward_mode.by_sample(module, module._inrun, leaf, grad.to(device) * tangent, size)
                total = total + product.flatten(1).sum(1, dtype=torch.float32)
        return total

    @contextlib.contextmanager
    def _weights_of(self, module: Any) -> Iterator[None]:
        """Run the module with the weights its step began with."""
        swapped = []
        for owner in module.modules():
            for local, p in owner._parameters.items():
                if p is not None and id(p) in self._weights:
                    swapped.append((owner, local, p))
        try:
            for owner, local, p in swapped:
                owner._parameters[local] = self._weights[id(p)]
            yield
        finally:
            for owner, local, p in swapped:
                owner._parameters[local] = p
