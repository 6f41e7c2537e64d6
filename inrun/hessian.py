"""The Hessian of a validation loss times a vector, at the present weights, for method "second"."""

from __future__ import annotations

from contextlib import nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from .errors import InRunError
from .forward_mode import WEIGHT_NORM, weight_norm
from .restoring import buffers_kept, requiring
from .updates import weights_moved

if TYPE_CHECKING:
    from .tracker import Tracker


def product(tracker: Tracker, name: str, vector: list[Tensor]) -> list[Tensor | None]:
    """By double backward; by differences of gradients where an operation, or FSDP, has none.

    Args:
        tracker: of the model; name: the target.
        vector: of each of the tracker's parameters, or of its shard here.

    Returns:
        The same, None where the loss does not depend on the parameter.

    Raises:
        InRunError: double backward and differences disagree (looked at while the tracker's check is due).
    """
    if tracker.ranks.sharded:
        return _by_differences(tracker, name, vector)
    params = [s.param for s in tracker.slots]
    try:
        normed = any(type(m).__name__ == "_WeightNorm" for m in tracker.model.modules())
        written_out = _WrittenOut() if normed else nullcontext()
        trained, buffers = requiring((p, True) for p in params), buffers_kept(tracker.model)
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), trained, buffers, written_out:
            loss = tracker.validations.loss(name)
            first = torch.autograd.grad(loss, params, create_graph=True, allow_unused=True)
            pairs = [(g, v) for g, v in zip(first, vector, strict=True) if g is not None and g.requires_grad]
            bent = torch.autograd.grad([g for g, _ in pairs], params, [v for _, v in pairs], allow_unused=True)
    except (RuntimeError, NotImplementedError) as error:
        # Then: checkpoints that take no autograd.grad or run again without `_WrittenOut`, and what is compiled.
        known = ("not implemented", "not differentiable", "use_reentrant", "number of tensors was saved",
                 "donated buffers", "double backward", "modified by an inplace operation")  # fmt: skip
        if not any(each in str(error) for each in known):
            raise
        return _by_differences(tracker, name, vector)
    except AssertionError as error:
        if "Float8" not in str(error):
            raise
        raise InRunError(
            f"method 'second': expected operations with a second derivative in {name!r}, got torchao's Float8Linear, "
            "which has none, and rounds away what differences would see; take method 'secant'"
        ) from error
    found = tracker.ranks.mean_gradients(list(bent), params)
    if tracker.first_check:
        _check(tracker, name, vector, found)
    return found


class _WrittenOut(TorchFunctionMode):
    """Weight norms, whose double backward torch 2.13 has wrong."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return (weight_norm if func is WEIGHT_NORM else func)(*args, **(kwargs or {}))


def _check(tracker: Tracker, name: str, vector: list[Tensor], found: list[Tensor | None]) -> None:
    """Against differences, where two sizes of them agree: an operation may hide its second derivative."""

    def flat(parts: list[Tensor | None]) -> Tensor:
        filled = [torch.zeros_like(v) if p is None else p for p, v in zip(parts, vector, strict=True)]
        return torch.cat([p.flatten().double().to(filled[0].device) for p in filled])

    near, far = (flat(_by_differences(tracker, name, vector, size)) for size in (0.05, 0.2))
    apart, size = float((flat(found) - near).norm()), float(near.norm())
    if apart > 0.2 * size + 4 * float((near - far).norm()):
        off = f"{apart / size:.0%}" if size else "all"
        raise InRunError(
            f"method 'second': the Hessian of {name!r} by double backward is {off} off differences of "
            "gradients. An operation of the loss has a backward that hides its own derivative (once_differentiable or "
            "with gradients made in the forward), or a part of it is under no_grad; take method 'secant', which needs "
            "no Hessian"
        )


def _by_differences(tracker: Tracker, name: str, vector: list[Tensor], times: float = 0.02) -> list[Tensor | None]:
    slots = tracker.slots
    size = tracker.ranks.total_norm((v, s.share) for v, s in zip(vector, slots, strict=True))
    weight = tracker.ranks.total_norm((s.shard, s.share) for s in slots)
    if size == 0:
        return [None] * len(slots)
    dtypes = {s.param.dtype for s in slots}

    def noted(x: Tensor) -> Tensor:
        if x.is_floating_point() and x.element_size() > 1:
            dtypes.add(x.dtype)
        return x.detach()

    def eps() -> float:
        """What autocast or FSDP computes in half precision sees no smaller move. All processes' have the same."""
        coarsest = torch.tensor(max(torch.finfo(d).eps for d in dtypes), dtype=torch.float64)
        return times * tracker.ranks.mean(coarsest.to(slots[0].shard.device)).item() ** (1 / 3) * (1 + weight) / size

    def end(move: float) -> list[Tensor | None]:
        moves = ((i, move * v) for i, v in enumerate(vector))
        with weights_moved(slots, tracker.ranks, moves, {}), torch.enable_grad():
            return tracker.validations.here(name)[1]

    here = eps()
    try:
        with torch.autograd.graph.saved_tensors_hooks(noted, lambda x: x):
            far = end(here)
    except RuntimeError as error:
        if "saved tensor hooks" not in str(error):  # which torch.func's derivatives do not take
            raise
        far = end(here)
    if (coarser := eps()) > here:
        here, far = coarser, end(coarser)
    pairs = zip(far, end(-here), strict=True)
    return [None if a is None or b is None else (a - b) / (2 * here) for a, b in pairs]
