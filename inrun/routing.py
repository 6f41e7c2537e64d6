"""Mixtures of experts: which modules inside one are given the tokens of all samples as rows `[B * T, ...]`.

A block that holds `experts` flattens its `[B, T, H]` input for the router, the fused experts and the shared expert, or
for some of them. Which see the tokens of the samples in order is found out by running the block on two random samples
and changing the second: the first T rows of such a module's input must stay as they were, and all others change. A
module that is given other rows (an expert called with the tokens routed to it) is scored by the block's own output.
That a batch's rows are as those were, the first step of several samples sees (`rows.py`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .restoring import tried

_FLOATING = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def known(block: nn.Module) -> dict[nn.Module, bool]:
    """The modules inside `block` that see its tokens, sample after sample, and whether as rows `[B * T, ...]`.

    The block is left as it was.
    """
    params = list(block.parameters())
    if any(p.is_meta for p in params):
        return {}
    widths = sorted({size for p in params for size in p.shape if p.dim() > 1}, reverse=True)
    # Codes of a quantised weight are no kind of input.
    dtype = next((p.dtype for p in params if p.dtype in _FLOATING), torch.float32)
    with tried(block):
        block.eval()
        for width in widths:
            x = torch.randn(2, 3, width, dtype=dtype, generator=torch.Generator().manual_seed(0), device="cpu")
            x = x.to(params[0].device)
            try:
                first, second = _inputs(block, x), _inputs(block, torch.cat([x[:1], -x[1:]]))
            except Exception:  # another width, or a block that takes more than hidden states
                continue
            return {m: first[m][0].dim() == 2 for m in first if m in second and _in_order(first[m], second[m])}
    return {}


def _inputs(block: nn.Module, x: Tensor) -> dict[nn.Module, list[Tensor]]:
    """What each module inside `block` is called with, when the block is given x."""
    seen: dict[nn.Module, list[Tensor]] = {}

    def note(module: nn.Module, args: tuple[Any, ...]) -> None:
        seen.setdefault(module, []).append(args[0].clone() if args and isinstance(args[0], Tensor) else x[:0])

    handles = [m.register_forward_pre_hook(note) for m in block.modules() if m is not block]
    try:
        type(block).forward(block, x)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _in_order(first: list[Tensor], second: list[Tensor]) -> bool:
    if len(first) != 1 or len(second) != 1 or first[0].shape != second[0].shape:
        return False
    if first[0].shape[:-1] not in ((6,), (2, 3)):
        return False
    changed = ~torch.isclose(first[0], second[0]).all(-1)
    return changed.flatten().tolist() == [False] * 3 + [True] * 3
