"""The efficiency check: for every parameter, the scores of its samples add up to `<p.grad, D>`.

It sees what scoring by layers could miss: a weight used past its module, gradients left over from before the step,
a batch that is not dimension 0. What it cannot tell, as along a direction of zeros, is looked at again in later steps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .directions import parts
from .distributed import Ranks
from .errors import InRunError, few
from .slots import components

# How far a sum of scores may be from what the gradient gives: a part of the scores' absolute sum, and a part of |g * D|
# (eight times what rounding each product once to bfloat16 would make).
SUM_TOLERANCE = 1e-2
ROUNDING = 8 * 2.0**-8
IN_FULL = 0.1  # of these, from where on a warning says so, if layers with a rule computed in float32 or wider
NOTHING = 1e-14  # what rounding alone leaves of a gradient that is zero
BESIDE = 1e-6  # the same where the optimizer has made it large, as a part of the largest layer's scores
CHECKS, APART = 3, 8  # at least so many, so many steps apart: in one alone, what samples' scores miss may cancel
_BLOCK = 1 << 24  # elements
_SHOWN = 10  # lines of a message


@torch.no_grad()
def efficiency(
    slots: Sequence[Any],
    batches: Sequence[Mapping[Any, Tensor | None]],
    directions: Sequence[Tensor],
    factor: Tensor,
    unscale: Any,
    ranks: Ranks,
    first: bool = True,
) -> set[str]:
    """Raise `InRunError` with names and sizes where scores and gradients disagree.

    Args:
        slots: parameters with `name`, `param`, `grad`, `share` and `taps` (what scores them).
        batches: of each batch, tap -> its dots along the directions, `[B]` or `[B, M]`; None where it made none.
        directions: of each slot, the parameter's shape or `[M, *shape]`.
        factor: scalar; the dots times this belong to the gradients as they are now, unscaled.
        unscale: what a gradient as it stands must still be multiplied by (a fused optimizer's loss scale).
        ranks: the processes whose scores add up to the gradients.
        first: whether every batch must have been scored by the same layers.

    Returns:
        The names of the parameters of which it could tell in every process: scores of zero would have been refused.
    """
    if first:
        _require_every_batch(batches)
    lead = directions[0].shape[: directions[0].dim() - slots[0].param.dim()]  # [M], with several targets
    none = torch.zeros(lead, dtype=torch.float32, device=factor.device)
    expected = []  # of each slot: <p.grad, D>, |p.grad * D|^2 and |p.grad|^2
    for slot, direction in zip(slots, directions, strict=True):
        found = [none] * 3 if (grad := slot.grad) is None else _along(grad, direction, unscale, len(lead))
        expected.append(torch.stack([x.to(none) * slot.share for x in found]))
    groups = [(members, {tap for slot in members for tap in slot.taps}) for members in components(slots)]
    scored = []  # of each group: the sum of its scores, of their sizes, and how many there are
    for _, taps in groups:
        dots = [d.to(none) * factor for batch in batches for tap, d in batch.items() if tap in taps and d is not None]
        sums = (sum((d.sum(0) for d in dots), none), sum((d.abs().sum(0) for d in dots), none))
        scored.append(torch.stack([*sums, none + len(dots)]))
    scores = ranks.over_parts(ranks.sum(torch.stack(scored))).cpu()
    of_slot, none = dict(zip(map(id, slots), ranks.over_shards(torch.stack(expected)).cpu(), strict=True)), none.cpu()
    sizes = torch.stack([size for _, size, _ in scores])
    beside = BESIDE * torch.where(sizes.isfinite(), sizes, torch.zeros_like(sizes)).amax(0)
    if numbers := [s.name for s in slots if s.param.grad is not None and not of_slot[id(s)][2].isfinite().all()]:
        raise InRunError(f"the loss or its gradients: expected finite numbers, got NaN or infinity for {few(numbers)}")
    wrong: dict[str, list[Any]] = {}  # what is, of which slots
    nearly = []  # what may be
    met = False  # whether a layer of theirs made scores
    in_full = first and ranks.alone and _multiplied_in_full()
    tells = []
    for (members, taps), (total, size, count) in zip(groups, scores, strict=True):
        gradient = sum((of_slot[id(s)][0] for s in members), none)
        rounding = sum((of_slot[id(s)][1].sqrt() for s in members), none)
        shapes = few([f"{s.name} {tuple(s.param.shape)}" for s in members], 20)
        coarse = max((tap.rule.coarse for tap in taps), default=1.0)
        tolerance, off = coarse * (SUM_TOLERANCE * size + ROUNDING * rounding) + NOTHING, (total - gradient).abs()
        full = coarse == 1.0 and all(tap.in_full and not tap.forward_mode for tap in taps)
        what = f"{shapes}: scored {_shown(total)}, its gradient gives {_shown(gradient)}"
        if not bool((off <= tolerance + beside).all()):
            wrong[what] = members
            met = met or bool(count.any())
        elif not count.any() and any(bool(of_slot[id(s)][2].any()) for s in members):
            wrong[f"{shapes}: not scored, though it has a gradient"] = members
        elif in_full and full and bool((off > IN_FULL * tolerance + beside).any()):
            nearly.append(what)
        tells.append(float((gradient.abs() > 2 * tolerance).any()))
    if wrong:
        more = [] if len(wrong) <= _SHOWN else [f"and {len(wrong) - _SHOWN} more"]
        of_all = met and 2 * len(wrong) > len(groups)  # then it is another reason
        raise InRunError(
            "the scores do not add up to the gradients. Either something uses these parameters past their modules "
            "(call the module, track with through={parameter: the module that does}, or exclude the parameter), or "
            "gradients were left over from before the step, or were changed since element by element (clipping by "
            "value) or of one optimizer and not yet of another (scaler.unscale_ each before the first step), or the "
            "loss has a term of the parameters alone (a penalty, which belongs to no sample: take weight_decay, or "
            "check=False), or is no number, or dimension 0 of a layer's input is not the sample:\n  "
            + "\n  ".join([*list(wrong)[:_SHOWN], *more]),
            suspected=() if of_all else {s.name for members in wrong.values() for s in members},
        )
    if nearly:
        warnings.warn(
            "the scores add up to the gradients less exactly than in float32. Something may use these parameters past "
            "their modules (call the module, or track with through={parameter: the module that does}), or the loss has "
            "a term of the parameters alone (a penalty, which belongs to no sample), or it is chance:\n  "
            + "\n  ".join(nearly[:_SHOWN]),
            stacklevel=7,
        )
    everywhere = ranks.sum(torch.tensor(tells, device=factor.device)).tolist()
    return {s.name for (members, _), n in zip(groups, everywhere, strict=True) if n == ranks.size for s in members}


def _multiplied_in_full() -> bool:
    """Whether products of float32 are told to be no coarser."""
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # what torch says where `fp32_precision` of a backend tells otherwise
        return False


@dataclass
class Agenda:
    """When there is a check again: after one that could not tell of every parameter (by a learning rate or a gradient
    of zero, or a layer that had nothing to do) one step later, then two, four; else `APART`, until there were `CHECKS`.

    Attributes:
        certain: the parameters of which a check could tell.
        made: checks so far.
        due: the step of the next one.
    """

    certain: set[str] = field(default_factory=set)
    made: int = 0
    due: float = math.inf

    def made_at(self, step: int, certain: set[str], every: Iterable[str]) -> None:
        self.certain |= certain
        self.made += 1
        if self.certain.issuperset(every):
            self.due = step + APART if self.made < CHECKS else math.inf
        else:
            self.due = step + (1 << min(self.made - 1, 30))


def _require_every_batch(batches: Sequence[Mapping[Any, Tensor | None]]) -> None:
    # A reentrant checkpoint that recomputes after the next batch was announced scores its layers for that batch.
    for tap in batches[0] if batches else ():
        scored = [batch[tap] is not None for batch in batches]
        if any(scored) and not all(scored) and not tap.passed_by:
            raise InRunError(
                f"{tap}: expected a backward through it for each of the step's {len(batches)} batches, "
                f"batch {scored.index(False) + 1} had none. Reentrant checkpointing needs each backward before the "
                "next batch(ids); use_reentrant=False has no such limit"
            )


def _along(grad: Tensor, direction: Tensor, unscale: Any, leading: int) -> tuple[Tensor, Tensor, Tensor]:
    """`<g, D>`, `|g * D|^2` and `|g|^2` of a gradient, the direction's leading dimensions kept; a block at a time, as
    the optimizer's state may fill the device by now."""
    found, lead = [], direction.shape[:leading]
    for here in parts(grad, _BLOCK):
        g = grad[here].float() * unscale
        product = direction[(slice(None),) * leading + (here,)].float().mul(g).reshape(*lead, -1)
        found.append((product.sum(-1), product.square_().sum(-1), g.square_().sum().expand(lead)))
    first, second, third = zip(*found, strict=True)
    return sum(first), sum(second), sum(third)  # pyright: ignore[reportReturnType]


def _shown(x: Tensor) -> str:
    values = [f"{v:.4g}" for v in x.reshape(-1).tolist()]
    return values[0] if len(values) == 1 else f"[{', '.join(values)}]"
