"""The efficiency check: for every parameter, the scores of its samples add up to `<p.grad, D>`.

It sees what scoring by layers could miss: a weight used past its module, gradients left over from before the step,
a batch that is not dimension 0.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .errors import InRunError

# Of the scores' absolute sum, and of |g * D| as if each product had been rounded once in bfloat16.
SUM_TOLERANCE = 1e-2
ROUNDING = 8 * 2.0**-8


@torch.no_grad()
def efficiency(
    slots: Sequence[Any],
    batches: Sequence[Mapping[Any, Tensor | None]],
    directions: Sequence[Tensor],
    factor: Tensor,
    unscale: Any,
) -> None:
    """Raise `InRunError` with names and sizes where scores and gradients disagree.

    Args:
        slots: parameters with `name`, `param` and `taps` (what scores them).
        batches: of each batch, tap -> its dots along the directions, `[B]` or `[B, M]`; None where it made none.
        directions: of each slot, the parameter's shape or `[M, *shape]`.
        factor: scalar; the dots times this belong to the gradients as they are now, unscaled.
        unscale: what a gradient as it stands must still be multiplied by (a fused optimizer's loss scale).
    """
    _require_every_batch(batches)
    direction_of = {id(s): d for s, d in zip(slots, directions, strict=True)}
    wrong = []
    for members in components(slots):
        taps = {tap for slot in members for tap in slot.taps}
        dots = [d for batch in batches for tap, d in batch.items() if tap in taps and d is not None]
        grads = [(s.param.grad, direction_of[id(s)]) for s in members if s.param.grad is not None]
        if not dots and not grads:
            continue
        device = factor.device
        scored = size = expected = noise = torch.zeros((), device=device)
        for d in dots:
            d = d.to(device, torch.float32) * factor
            scored, size = scored + d.sum(0), size + d.abs().sum(0)
        for grad, direction in grads:
            lead = direction.shape[: direction.dim() - grad.dim()]  # [M], with several targets
            product = direction.float() * (grad.float() * unscale)
            expected = expected + product.reshape(*lead, -1).sum(-1).to(device)
            noise = noise + product.reshape(*lead, -1).norm(dim=-1).to(device)
        if not bool(((scored - expected).abs() <= SUM_TOLERANCE * size + ROUNDING * noise).all()):
            shapes = ", ".join(f"{s.name} {tuple(s.param.shape)}" for s in members)
            wrong.append(f"{shapes}: scored {_shown(scored)}, its gradient gives {_shown(expected)}")
    if wrong:
        raise InRunError(
            "the scores do not add up to the gradients. Either something uses these parameters past their modules "
            "(call the module, track with through={parameter: the module that does}, or exclude the parameter), or "
            "gradients were left over from before the step, or "
            "dimension 0 of a layer's input is not the sample:\n  " + "\n  ".join(wrong)
        )


def _require_every_batch(batches: Sequence[Mapping[Any, Tensor | None]]) -> None:
    # A reentrant checkpoint that recomputes after the next batch was announced scores its layers for that batch.
    for tap in batches[0] if batches else ():
        scored = [batch[tap] is not None for batch in batches]
        if any(scored) and not all(scored):
            raise InRunError(
                f"{tap.name or 'model'}: expected a backward through it for each of the step's {len(batches)} batches, "
                f"batch {scored.index(False) + 1} had none. Reentrant checkpointing needs each backward before the "
                "next batch(ids); use_reentrant=False has no such limit"
            )


def components(slots: Sequence[Any]) -> list[list[Any]]:
    """Parameters that share a module, or modules that share a parameter, can only be compared together."""
    by_tap: dict[Any, list[Any]] = {}
    for slot in slots:
        for tap in slot.taps:
            by_tap.setdefault(tap, []).append(slot)
    found, seen = [], set()
    for slot in slots:
        if id(slot) in seen:
            continue
        component, queue = [], [slot]
        while queue:
            one = queue.pop()
            if id(one) not in seen:
                seen.add(id(one))
                component.append(one)
                queue.extend(other for tap in one.taps for other in by_tap[tap])
        found.append(component)
    return found


def _shown(x: Tensor) -> str:
    values = [f"{v:.4g}" for v in x.reshape(-1).tolist()]
    return values[0] if len(values) == 1 else f"[{', '.join(values)}]"
