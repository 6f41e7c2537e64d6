"""Modules that scale (and shift) what they computed: RMSNorm and LayerNorm as models write them themselves, LayerScale,
and torch's batch, group and instance norms.

Such a module is `f(x; w, b) = n(x) * (offset + w) + b`, elementwise along one dimension, with w (and b) its only
parameters; the offset is 0, or 1 as in Gemma. Which modules are of this kind is found out by running them on random
input, whatever their class is called. `n(x)` is then the module's own forward with `w = 1 - offset` and `b = 0`, so
that its output is what it always was, and no second forward is needed.

Where n mixes the samples of a batch (batch norm in training), a sample's dot is its gradient through its own rows of
the output, as everywhere: they still add up to the parameter's gradient.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from . import functional
from .distributed import local
from .errors import InRunError
from .layers import ScalingRule, require_whole_rows
from .restoring import random_kept, state_kept, tried
from .tap import Layout

OFF = 1e-2  # of an output, by which that of a module which is found by running it may be off in half precision
_CHANNEL_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d)


@dataclass(frozen=True)
class Affine:
    """The names of w and b, the dimension they lie along, and how the module rounds.

    Attributes:
        wide: whether the product with w is taken in float32, and rounded to x's dtype after it.
    """

    weight: str
    bias: str | None = None
    offset: float = 0.0
    wide: bool = False
    axis: int = -1

    def normed(self, module: Any, x: Tensor) -> Tensor:
        """`n(x)`, with `axis` last."""
        weight = module._parameters[self.weight]
        # Statistics in 16 bits take an input in those alone.
        widened = self.wide and x.dtype.itemsize == 2 and not any(
            b.is_floating_point() and b.dtype.itemsize == 2 for b in module._buffers.values() if b is not None
        )  # fmt: skip
        dtype = torch.promote_types(weight.dtype, torch.float32) if widened else weight.dtype
        values = {self.weight: torch.full_like(weight, 1 - self.offset, dtype=dtype)}
        if self.bias is not None:
            values[self.bias] = torch.zeros_like(weight, dtype=dtype)
        x = x.float() if widened else x
        normed = run_with(module, x, values).movedim(self.axis, -1)
        return normed.float() if self.wide and normed.dtype.itemsize == 2 else normed

    def factor(self, weight: Tensor) -> Tensor:
        weight = weight.float() if self.wide and weight.dtype.itemsize == 2 else weight
        return weight + self.offset if self.offset else weight


class AffineRule(ScalingRule):
    @property
    def param_names(self: Any) -> tuple[str, str | None]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._inrun.form.weight, self._inrun.form.bias

    @property
    def may_fold(self: Any) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._inrun.form.axis == -1

    def placed(self: Any, x: Tensor, layout: Layout) -> Tensor:
        if self._inrun.form.axis != -1:
            require_whole_rows(self, layout)
        return super().placed(x, layout)

    def probed(self: Any, x: Tensor, probe: Tensor, segments: Tensor | None) -> Tensor:
        affine: Affine = self._inrun.form
        normed = affine.normed(self, x)
        weight, bias = affine.factor(self._parameters[affine.weight]), self._parameters.get(affine.bias)
        y = functional.affine(normed, weight, bias, self.directions(normed.dtype), probe, segments)
        y = y.movedim(-1, affine.axis)
        y = y.to(x.dtype) if affine.wide else y
        own = own_output(self, self.plain, x) if affine.axis == -1 else None
        if own is not None and (y - own.float()).norm() > OFF * own.float().norm():
            raise another_output(self, "scale and shift what it computes")
        return y

    def rescaled(self: Any, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        affine: Affine = self._inrun.form
        with state_kept(self):  # running statistics have taken this input in already
            normed = affine.normed(self, x)
        return normed, grad.movedim(affine.axis, -1).to(normed.dtype)


def own_output(module: Any, forward: Callable[[Tensor], Any], x: Tensor) -> Any:
    """What the own forward of a module that was recognised by running it makes of this batch; None in steps that do not
    compare it with the rule's. It leaves no mark and draws no random numbers."""
    if torch.compiler.is_compiling() or not module._inrun.rows.compared:
        return None
    with torch.no_grad(), random_kept(), state_kept(module):
        return forward(x)


def another_output(module: Any, does: str) -> InRunError:
    """The error where the two differ."""
    return InRunError(
        f"{module._inrun}: expected {module._inrun_class.__name__} to {does}, as it did when it was run on random "
        "numbers, got another output for this batch; score it by an enclosing module, "
        "track(..., through={parameter: module}), or exclude its parameters"
    )


def recognise(module: nn.Module) -> Affine | None:
    """How `module` scales and shifts, if that is all its parameters do; it is left as it was."""
    params = {name: local(p) for name, p in module._parameters.items() if p is not None}
    if any(isinstance(module, c) and type(module).forward is c.forward for c in _CHANNEL_NORMS) and "weight" in params:
        return Affine("weight", "bias", wide=True, axis=1)
    if len(inspect.signature(type(module).forward).parameters) != 2:  # self and x: a gate would be lost
        return None
    like = next(iter(params.values()), None)
    if like is None or like.dim() != 1 or like.is_meta or any(p.shape != like.shape for p in params.values()):
        return None
    if len(like) == 1:  # of one feature, or a number for however many
        return None
    if len(params) > 2 or any(module.children()) or any(True for _ in module.buffers()):
        return None
    try:
        with tried(module):
            forms = (_found(module, params, weight, offset) for weight in params for offset in (0.0, 1.0))
            return next((form for form in forms if form is not None), None)
    except Exception:  # a module that cannot be run like this is of another kind, whatever it says
        return None


def _found(module: nn.Module, params: dict[str, nn.Parameter], weight: str, offset: float) -> Affine | None:
    """What the module is, if `weight` with this offset is what it scales by: in both modes, by random parameters and
    by its own, and for large numbers too."""
    bias, width = next((name for name in params if name != weight), None), len(params[weight])
    device = params[weight].device
    own = {name: p.float() for name, p in params.items()}
    for values in ({name: torch.randn(width, device=device) for name in params}, own):
        ones = {weight: torch.full_like(values[weight], 1 - offset)}
        if bias is not None:
            ones[bias] = torch.zeros_like(ones[weight])
        for mode, size in ((True, 1.0), (False, 1.0), (False, 100.0)):
            module.training = mode
            x = size * torch.randn(2, 3, width, device=device)
            y, normed = run_with(module, x, values), run_with(module, x, ones)
            if x._version:  # changed in place, so that the input of the second run was not that of the first
                return None
            expected = normed * (offset + values[weight]) + (0.0 if bias is None else values[bias])
            if y.shape != x.shape or not torch.allclose(y, expected, rtol=1e-4, atol=1e-5 * size):
                return None
    mixed = run_with(module, torch.randn(2, 3, width, device=device).bfloat16(), own)
    return Affine(weight, bias, offset, wide=mixed.dtype == torch.bfloat16)


def run_with(module: Any, x: Tensor, values: dict[str, Tensor]) -> Tensor:
    """The module's own forward with other values for its parameters, past its hooks."""
    # Run by a stand-in: within a checkpoint, a graph lets no module's parameters change, not even for a while.
    stand_in = object.__new__(getattr(module, "_inrun_class", type(module)))
    # No torch traces all that a dictionary of attributes can do: their names are taken outside of the graph.
    compiling = torch.compiler.is_compiling()
    for name in module._inrun.names if compiling else module.__dict__:
        object.__setattr__(stand_in, name, getattr(module, name))
    object.__setattr__(stand_in, "_parameters", module._parameters | values)
    y = type(stand_in).forward(stand_in, x)
    for name in module._inrun.names if compiling else stand_in.__dict__:  # what the forward left on its module
        value = getattr(stand_in, name)
        if name != "_parameters" and value is not getattr(module, name, None):
            object.__setattr__(module, name, value)
    return y
