"""Modules that first of all project their input, `f(x @ W^T + b)`: the routers of mixtures of experts.

Which modules are of this kind is found out by running them on random input, whatever their class is called: given the
projection itself for their input (padded to its width), and for W the identity, they must return what they returned.
That is also how a tracked one runs: the projection scores as a linear layer, and the module's own forward makes the
rest of it. Products with 1 and 0 are exact, so that its output is what it always was.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .affine import OFF, another_output, own_output, run_with
from .layers import LinearRule, Rule
from .restoring import no_autocast, replaced, tried


@dataclass(frozen=True)
class Projection:
    """How the module rounds.

    Attributes:
        wide: whether the product is taken in float32, whatever the dtype of x and W.
        uncast: whether an autocast around the module is off for the product.
    """

    wide: bool = False
    uncast: bool = False

    def factors(self, module: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """x, W and b as they are multiplied."""
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        if not self.wide:
            return x.to(weight.dtype), weight, bias
        wide = torch.promote_types(weight.dtype, torch.float32)
        return x.to(wide), weight.to(wide), None if bias is None else bias.to(wide)

    def autocast(self) -> AbstractContextManager[None]:
        return no_autocast() if self.uncast else nullcontext()

    def rest(self, module: Any, projected: Tensor, dtype: torch.dtype) -> Any:
        """What the module makes of its projected input, which was given in `dtype`."""
        weight, bias = module._parameters["weight"], module._parameters.get("bias")
        values = {"weight": torch.eye(*weight.shape, dtype=weight.dtype, device=weight.device)}
        if bias is not None:
            values["bias"] = torch.zeros_like(bias)
        padded = F.pad(projected, (0, weight.shape[1] - weight.shape[0]))
        return run_with(module, padded.to(torch.promote_types(padded.dtype, dtype)), values)


class ProjectionRule(LinearRule):
    def forward(self: Any, *args, **kwargs):
        tap = self._inrun
        if not tap.scores():
            return self._inrun_class.forward(self, *args, **kwargs)
        x = args[0] if args else next(iter(kwargs.values()))
        # Before the rule leaves a mark or draws random numbers, as the rest of the module may.
        own = own_output(self, partial(self._inrun_class.forward, self), x)
        with tap.form.autocast():
            projected = self.scored(x)
        y = tap.form.rest(self, projected, x.dtype)
        if own is not None and not all(map(_near, pytree.tree_leaves(y), pytree.tree_leaves(own))):
            raise another_output(self, "project its input first of all")
        return y

    def plain(self, x):
        return F.linear(*self.operands(x))

    def operands(self: Any, x):
        return self._inrun.form.factors(self, x)

    directions = Rule.directions  # whose dtype the module may have widened


def recognise(module: nn.Module) -> Projection | None:
    """How `module` projects, if that is the first thing it does and all its parameters do; it is left as it was."""
    params = dict(module.named_parameters())
    weight = params.get("weight")
    if weight is None or weight.dim() != 2 or weight.is_meta or weight.shape[0] > weight.shape[1]:
        return None
    if set(params) - {"weight", "bias"}:
        return None
    if len(inspect.signature(type(module).forward).parameters) != 2:  # self and x
        return None
    try:
        with tried(module):
            values = {name: torch.randn_like(p, dtype=torch.float32) for name, p in params.items()}
            own = {name: p.float() for name, p in params.items()}
            x = torch.randn(2, 3, weight.shape[1], device=weight.device)
            for mode, size, each_values in (
                (True, 1, values),
                (False, 1, values),
                (False, 100, values),
                (True, 1, own),
            ):
                for each in module.modules():  # dropout, say, is a module of its own
                    each.training = mode
                if not _same(module, Projection(), size * x, each_values):
                    return None
            narrow = {name: p.bfloat16() for name, p in values.items()}
            for form in (Projection(wide, uncast) for wide in (False, True) for uncast in (False, True)):
                if _same(module, form, x.bfloat16(), narrow):
                    with torch.autocast(weight.device.type, torch.bfloat16):
                        if _same(module, form, x, values):
                            return form
            return None
    except Exception:  # a module that cannot be run like this is of another kind, whatever it says
        return None


def _same(module: Any, form: Projection, x: Tensor, values: dict[str, Tensor]) -> bool:
    """Whether the module returns the same by way of its projection."""
    outputs = []
    with replaced([(module, name, value) for name, value in values.items()]):
        for by_parts in (False, True):
            torch.manual_seed(0)
            if by_parts:
                with form.autocast():
                    projected = F.linear(*form.factors(module, x))
                out = form.rest(module, projected, x.dtype)
            else:
                out = run_with(module, x, {})
            outputs.append(pytree.tree_leaves(out))
    first, second = outputs
    return all(_equal(a, b) for a, b in zip(first, second, strict=True))


def _near(a: Any, b: Any) -> bool:
    """Whether the numbers of an output are another's, to what half precision rounds."""
    if not isinstance(a, Tensor) or not a.is_floating_point():
        return True
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    same = (a == b) | (a.isnan() & b.isnan())  # -inf, say, of what is masked
    apart = torch.where(same, 0.0, (a - b).float())
    return bool(apart.norm() <= OFF * torch.where(b.isfinite(), b, 0.0).float().norm())


def _equal(a: Any, b: Any) -> bool:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return a == b
    return a.shape == b.shape and a.dtype == b.dtype and torch.allclose(a, b, 1e-5, 1e-6, equal_nan=True)
