"""Scores of modules that no rule knows, by forward-mode AD: `dot_b = <dL/dout_b, JVP_D(out)_b>`.

The parameters' directions are carried through the module's own forward as tangents, so it is exact for every module
whose output rows belong to samples, at the price of a second forward through it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from . import functional
from .errors import InRunError
from .tap import SUFFIX, Layout, Tap


def forward_mode(module: Any, tap: Tap, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """One ordinary forward that carries tangents beside it, then the dots attached to each output."""
    probe = tap.probe
    assert probe is not None
    layout = tap.layout or Layout(probe.shape[0])
    if forward_ad._current_level >= 0:
        raise InRunError(f"{tap.name}: forward-mode scoring inside another forward-mode pass is not supported")
    single = probe.dim() == 1
    more = [] if single else [tangents_only(module, tap, forward, args, kwargs, m) for m in range(1, probe.shape[1])]
    with dual(tap, None if single else 0):
        leaves, spec = pytree.tree_flatten(_run(tap, forward, args, kwargs))
        pairs = [forward_ad.unpack_dual(x) if isinstance(x, Tensor) else (x, None) for x in leaves]
    outputs = []
    for i, (primal, tangent) in enumerate(pairs):
        if tangent is None:
            outputs.append(primal)
            continue
        require_rows(module, tap, primal, layout)
        tangents = tangent.detach() if single else torch.stack([tangent.detach(), *(t[i] for t in more)])
        outputs.append(functional.attach(primal, tangents, probe, layout.segments))
    return pytree.tree_unflatten(outputs, spec)


def require_rows(module: Any, tap: Tap, out: Tensor, layout: Layout) -> None:
    """Raise `InRunError` unless the rows of a module's output are the samples, or its tokens theirs."""
    if layout.segments is not None:
        layout.require(tap, out)
    elif out.dim() == 0 or out.shape[0] != layout.rows:
        raise InRunError(
            f"{tap.name or 'model'} ({type(module).__bases__[1].__name__}): expected every output to be [B, ...] "
            f"with B = {layout.rows}, got {tuple(out.shape)}; it holds parameters with no rule of their own "
            f"({', '.join(n for _, n in tap.forward_mode)}), which are scored by their module's output rows"
        )


def _run(tap: Tap, forward: Callable, args: tuple, kwargs: dict) -> Any:
    try:
        return forward(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "forward mode AD" not in str(error):
            raise
        raise InRunError(
            f"{tap.name or 'model'}: holds parameters with no rule of their own and uses an operation without "
            f"forward-mode AD; exclude them ({', '.join(n for _, n in tap.forward_mode)}). Torch says: {error}"
        ) from error


def tangents_only(module: Any, tap: Tap, forward: Callable, args: tuple, kwargs: dict, m: int | None) -> list[Any]:
    """The outputs' tangents along direction m (None: the only one), leaving random state and buffers as they were."""
    with torch.no_grad(), torch.random.fork_rng(), buffers_kept(module), dual(tap, m):
        leaves = pytree.tree_leaves(_run(tap, forward, args, kwargs))
        pairs = [forward_ad.unpack_dual(x) if isinstance(x, Tensor) else (x, None) for x in leaves]
    return [torch.zeros_like(x) if t is None and isinstance(x, Tensor) else t for x, t in pairs]


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Buffers that the block writes stand again after it."""
    buffers = [(b, b.clone()) for b in module.buffers()]
    yield
    with torch.no_grad():
        for buffer, saved in buffers:
            buffer.copy_(saved)


@contextlib.contextmanager
def dual(tap: Tap, target: int | None) -> Iterator[None]:
    # The fused attention kernels have no forward derivative; the written-out one does.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        plain = [(owner, local, owner._parameters[local]) for owner, local in tap.forward_mode]
        try:
            for owner, local, param in plain:
                direction: Any = owner._parameters[local + SUFFIX]
                tangent = direction if target is None else direction[target]
                owner._parameters[local] = forward_ad.make_dual(param, tangent)  # pyright: ignore
            yield
        finally:
            for owner, local, param in plain:
                owner._parameters[local] = param
