"""How each layer class scores its samples, and which parameters of a model are covered by what.

A tracked module changes class in place: `TrackedLinear` is a `Linear` in every other respect, with the same
parameters, `state_dict()` and `isinstance`. Beside each covered parameter stands a frozen sibling, its direction
(`weight_direction`), which `state_dict()` leaves out and loading does not ask for. Without a probe a tracked module
runs its original forward.

Layers with a rule of their own: Linear, Embedding, LayerNorm, RMSNorm, and Hugging Face's Conv1D. Any other module
that holds parameters directly is scored by forward-mode AD: `dot_b = <dL/dout_b, JVP_D(out)_b>`, exact for every
module whose output rows belong to samples, at the price of a second forward through it.
"""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from inrun_kernels import bias_dot, embedding_dot, ghost_dot, norm_dot

from . import functional
from .errors import InRunError
from .forward_mode import forward_mode
from .tap import SUFFIX, Layout, Tap, eagerly


class Holder:
    """Mixin of every module that holds directions: they appear in no checkpoint."""

    _inrun: Tap

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # pyright: ignore[reportAttributeAccessIssue]
        for name in _direction_names(self):
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        load = super()._load_from_state_dict  # pyright: ignore[reportAttributeAccessIssue]
        load(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for name in _direction_names(self):
            if prefix + name in missing:
                missing.remove(prefix + name)


class Rule(Holder):
    """A layer with a rule: `probed` runs it with a probe, `dots` scores it from what a deferred step kept."""

    def forward(self, *args, **kwargs):
        x = args[0] if args else next(iter(kwargs.values()))
        tap = self._inrun
        plain: Any = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        if tap.keep is not None:
            return eagerly(tap.keep, self, plain, x)
        if tap.probe is None:
            return plain(x)
        if tap.layout is None:
            return self.probed(x, tap.probe, None)
        return self.probed(self.placed(x, tap.layout), tap.probe, tap.layout.segments)

    def placed(self, x: Tensor, layout: Layout) -> Tensor:
        """The input with its sample axis in front, `[B, ...]`, and where tokens count, `[B, T, ...]`."""
        x = self.by_sample(x, layout.rows)
        if layout.segments is not None:
            layout.require(self._inrun, x, self.feature_dims())
        return x

    def by_sample(self, x: Tensor, batch: int) -> Tensor:
        return functional.by_sample(x, batch)

    def feature_dims(self) -> int:
        """How many of the input's last dimensions are no position."""
        return 1

    def probed(self, x: Tensor, probe: Tensor, segments: Tensor | None) -> Tensor:
        """The layer's output, with the dots as the probe's gradient."""
        raise NotImplementedError

    def dots(self, x: Tensor, grad: Tensor, segments: Tensor | None) -> Tensor:
        """The dots `[B]` or `[B, M]` (`[S]` or `[S, M]`), from the layer's input and the gradient of its output."""
        raise NotImplementedError


class LinearRule(Rule):
    weight: Tensor
    bias: Tensor | None
    weight_direction: Tensor | None
    bias_direction: Tensor | None

    def probed(self, x, probe, segments):
        both = (self.weight_direction, self.bias_direction)
        return functional.linear(x, self.weight, self.bias, both, probe, segments)

    def dots(self, x, grad, segments):
        acts, grads = functional.rows(x.to(grad.dtype), 1), functional.rows(grad, 1)
        segments = functional.by_row(segments, x, acts)
        return _sum(
            None if self.weight_direction is None else self.weight_dots(acts, grads, self.weight_direction, segments),
            None if self.bias_direction is None else bias_dot(grads, self.bias_direction, segments=segments),
        )

    def weight_dots(self, acts: Tensor, grads: Tensor, direction: Tensor, segments: Tensor | None) -> Tensor:
        return ghost_dot(acts, grads, direction, segments=segments)


class Conv1dRule(LinearRule):
    def probed(self, x, probe, segments):
        both = (self.weight_direction, self.bias_direction)
        return functional.conv1d(x, self.weight, self.bias, both, probe, segments)

    def weight_dots(self, acts, grads, direction, segments):
        return ghost_dot(grads, acts, direction, segments=segments)  # the weight is [I, O]


class EmbeddingRule(Rule):
    weight: Tensor
    weight_direction: Tensor
    padding_idx: int | None

    def by_sample(self, x, batch):
        return functional.ids_by_sample(x, batch)

    def feature_dims(self):
        return 0

    def probed(self, x, probe, segments):
        return functional.embedding(x, self.weight, self.weight_direction, probe, self.padding_idx, segments)

    def dots(self, x, grad, segments):
        ids, grads = x.reshape(x.shape[0], -1), functional.rows(grad, 1)
        segments = functional.by_row(segments, x, ids)
        return embedding_dot(ids, grads, self.weight_direction, segments=segments, padding_idx=self.padding_idx)


class LayerNormRule(Rule):
    weight: Tensor
    bias: Tensor | None
    weight_direction: Tensor | None
    bias_direction: Tensor | None
    normalized_shape: tuple[int, ...]
    eps: float

    def feature_dims(self):
        return len(self.normalized_shape)

    def probed(self, x, probe, segments):
        both = (self.weight_direction, self.bias_direction)
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, both, probe, segments)

    def dots(self, x, grad, segments):
        return _affine_dots(
            torch.nn.functional.layer_norm(x, self.normalized_shape, None, None, self.eps),
            grad, len(self.normalized_shape), self.weight_direction, self.bias_direction, segments,
        )  # fmt: skip


class RMSNormRule(Rule):
    weight: Tensor
    weight_direction: Tensor
    normalized_shape: tuple[int, ...]
    eps: float | None

    def feature_dims(self):
        return len(self.normalized_shape)

    def probed(self, x, probe, segments):
        shape, direction = self.normalized_shape, self.weight_direction
        return functional.rms_norm(x, shape, self.weight, self.eps, direction, probe, segments)

    def dots(self, x, grad, segments):
        normed = torch.nn.functional.rms_norm(x, list(self.normalized_shape), None, self.eps)
        return _affine_dots(normed, grad, len(self.normalized_shape), self.weight_direction, None, segments)


class ForwardModeRule(Holder):
    """Any other module: `dot_b = <dL/dout_b, JVP_D(out)_b>`."""

    def forward(self, *args, **kwargs):
        tap = self._inrun
        plain: Any = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        if tap.keep is not None:
            return eagerly(tap.keep, self, plain, (args, kwargs))
        if tap.probe is not None:
            return eagerly(forward_mode, self, tap, plain, args, kwargs)
        return plain(*args, **kwargs)


RULES: dict[type[nn.Module], type[Holder]] = {
    nn.Linear: LinearRule,
    nn.Embedding: EmbeddingRule,
    nn.LayerNorm: LayerNormRule,
    nn.RMSNorm: RMSNormRule,
}

# Modules that use their children's parameters without calling the children.
_WHOLE = (nn.MultiheadAttention,)


@dataclass
class Site:
    """A module that will be tracked: its rule, and where the parameters it covers live."""

    name: str
    module: nn.Module
    rule: type[Holder]
    owned: list[tuple[nn.Module, str, str]] = field(default_factory=list)  # (owner, local name, full name)


@dataclass
class Plan:
    """Which module scores which parameters of a model; names are `named_parameters()`' own."""

    sites: list[Site]
    tracked: list[str]
    excluded: list[str]
    frozen: list[str]


def plan(model: nn.Module, exclude: Sequence[str] = ()) -> Plan:
    """Assign every trainable parameter of `model` to the module that will score it. Changes nothing.

    Args:
        model: any module.
        exclude: parameter names, or shell patterns of them (`"*.bias"`), that get no score.

    Raises:
        ValueError: a pattern of `exclude` matches no parameter.
        InRunError: a parameter that no rule can score, named, with the reason; or nothing is left to score.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    excluded = _matching(list(names.values()), exclude)
    result = Plan([], [], sorted(excluded), [n for n, p in model.named_parameters() if not p.requires_grad])
    outermost: Site | None = None
    whole: str | None = None
    for path, module in model.named_modules():
        if outermost is not None and not _inside(path, outermost.name):
            outermost = None
        if whole is None or not _inside(path, whole):
            whole = path if isinstance(module, _WHOLE) else None
        owned = []
        for local, param in module._parameters.items():
            if param is not None and param.requires_grad and names[id(param)] not in excluded:
                owned.append((module, local, names[id(param)]))
        if not owned and path != whole:
            continue
        rule = _rule_of(module, path) if whole is None else None
        if outermost is not None and rule is None:
            # One forward-mode pass, the outermost's, carries the tangents of all that lies inside it.
            outermost.owned.extend(owned)
            continue
        site = Site(path, module, rule or ForwardModeRule, owned)
        result.sites.append(site)
        if rule is None:
            outermost = site
    result.sites = [site for site in result.sites if site.owned]
    result.tracked = list(dict.fromkeys(full for site in result.sites for _, _, full in site.owned))
    if not result.tracked:
        raise InRunError("model: expected at least one trainable parameter that is not excluded, found none")
    return result


def install(site: Site, directions: dict[str, nn.Parameter]) -> Tap:
    """Change a site's module into its tracked class and put the directions beside their parameters."""
    tap = Tap(site.name)
    for owner, local, full in site.owned:
        if not isinstance(owner, Holder):
            _adopt(owner, Holder if owner is not site.module else site.rule, tap)
        owner._parameters[local + SUFFIX] = directions[full]
    if not isinstance(site.module, site.rule):
        _adopt(site.module, site.rule, tap)
    if site.rule is ForwardModeRule:
        tap.forward_mode = [(owner, local) for owner, local, _ in site.owned]
    return tap


def remove(module: Any) -> None:
    """Give a tracked module its own class back and take its directions away."""
    for name in _direction_names(module):
        del module._parameters[name]
    del module.__dict__["_inrun"]
    module.__class__ = type(module).__bases__[1]


def _adopt(module: nn.Module, mixin: type[Holder], tap: Tap) -> None:
    module.__dict__["_inrun"] = tap
    # A parameter that is frozen or excluded has a None for its direction.
    for local in list(module._parameters):
        module._parameters[local + SUFFIX] = None
    module.__class__ = _tracked_class(mixin, type(module))


@functools.cache
def _tracked_class(mixin: type[Holder], cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"Tracked{cls.__name__}", (mixin, cls), {"__module__": cls.__module__, "__doc__": cls.__doc__})


def _direction_names(module: Any) -> list[str]:
    return [n for n in module._parameters if n.endswith(SUFFIX) and n.removesuffix(SUFFIX) in module._parameters]


def _affine_dots(normed, grad, last: int, direction: Tensor | None, bias_direction: Tensor | None, segments) -> Tensor:
    normed, grads = functional.rows(normed, last).to(grad.dtype), functional.rows(grad, last)
    segments = functional.by_row(segments, grad, grads)
    return _sum(
        None if direction is None else norm_dot(normed, grads, functional.flat(direction, last), segments=segments),
        None if bias_direction is None else bias_dot(grads, functional.flat(bias_direction, last), segments=segments),
    )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor:
    found = [x for x in (a, b) if x is not None]
    return found[0] if len(found) == 1 else found[0] + found[1]


def _inside(path: str, ancestor: str) -> bool:
    return path.startswith(f"{ancestor}." if ancestor else "")


def _rule_of(module: nn.Module, path: str) -> type[Holder] | None:
    cls = type(module)
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return Conv1dRule
    for base, rule in RULES.items():
        if isinstance(module, base) and cls.forward is base.forward:
            if isinstance(module, nn.Embedding):
                _require_plain_embedding(module, path)
            return rule
    return None


def _require_plain_embedding(module: nn.Embedding, path: str) -> None:
    unsupported = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}
    for option, plain in unsupported.items():
        if getattr(module, option) != plain:
            raise InRunError(
                f"{path}.weight: expected an Embedding with {option}={plain}, got {getattr(module, option)}, "
                "with which a gradient is not a sum over samples; exclude the parameter or change the option"
            )


def _matching(names: list[str], patterns: Sequence[str]) -> set[str]:
    if isinstance(patterns, str):
        raise TypeError(f"exclude: expected a sequence of names, got the string {patterns!r}")
    found: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise ValueError(f"exclude: expected names of parameters, {pattern!r} matches none of {len(names)}")
        found.update(hits)
    return found
