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

import contextlib
import fnmatch
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from . import functional
from .errors import InRunError

SUFFIX = "_direction"


class Tap:
    """What a tracked module reads in its forward: the probe of the current batch, or None for a plain forward."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.probe: Tensor | None = None
        self.forward_mode: list[tuple[nn.Module, str]] = []


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


class LinearRule(Holder):
    def forward(self, input):
        probe = self._inrun.probe
        if probe is None:
            return super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
        m: Any = self
        return functional.linear(input, m.weight, m.bias, (m.weight_direction, m.bias_direction), probe)


class Conv1dRule(Holder):
    def forward(self, x):
        probe = self._inrun.probe
        if probe is None:
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        m: Any = self
        return functional.conv1d(x, m.weight, m.bias, (m.weight_direction, m.bias_direction), probe)


class EmbeddingRule(Holder):
    def forward(self, input):
        probe = self._inrun.probe
        if probe is None:
            return super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
        m: Any = self
        return functional.embedding(input, m.weight, m.weight_direction, probe, m.padding_idx)


class LayerNormRule(Holder):
    def forward(self, input):
        probe = self._inrun.probe
        if probe is None:
            return super().forward(input)  # pyright: ignore[reportAttributeAccessIssue]
        m: Any = self
        directions = (m.weight_direction, m.bias_direction)
        return functional.layer_norm(input, m.normalized_shape, m.weight, m.bias, m.eps, directions, probe)


class RMSNormRule(Holder):
    def forward(self, x):
        probe = self._inrun.probe
        if probe is None:
            return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]
        m: Any = self
        return functional.rms_norm(x, m.normalized_shape, m.weight, m.eps, m.weight_direction, probe)


class ForwardModeRule(Holder):
    def forward(self, *args, **kwargs):
        forward: Any = super().forward  # pyright: ignore[reportAttributeAccessIssue]
        if self._inrun.probe is None:
            return forward(*args, **kwargs)
        module: Any = self
        return _forward_mode(module, self._inrun, forward, args, kwargs)


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


@torch._dynamo.disable
def _forward_mode(module: nn.Module, tap: Tap, forward: Callable, args: tuple, kwargs: dict) -> Any:
    """One ordinary forward that carries tangents beside it, then the dots attached to each output."""
    probe = tap.probe
    assert probe is not None
    if forward_ad._current_level >= 0:
        raise InRunError(f"{tap.name}: forward-mode scoring inside another forward-mode pass is not supported")
    single = probe.dim() == 1
    more = [] if single else [_tangents_only(module, tap, forward, args, kwargs, m) for m in range(1, probe.shape[1])]
    with _dual(tap, None if single else 0):
        leaves, spec = pytree.tree_flatten(_run(tap, forward, args, kwargs))
        pairs = [forward_ad.unpack_dual(x) if isinstance(x, Tensor) else (x, None) for x in leaves]
    outputs = []
    for i, (primal, tangent) in enumerate(pairs):
        if tangent is None:
            outputs.append(primal)
            continue
        if primal.dim() == 0 or primal.shape[0] != probe.shape[0]:
            raise InRunError(
                f"{tap.name or 'model'} ({type(module).__bases__[1].__name__}): expected every output to be [B, ...] "
                f"with B = {probe.shape[0]}, got {tuple(primal.shape)}; it holds parameters with no rule of their "
                f"own ({', '.join(n for _, n in tap.forward_mode)}), which are scored by their module's output rows"
            )
        tangents = tangent.detach() if single else torch.stack([tangent.detach(), *(t[i] for t in more)])
        outputs.append(functional.attach(primal, tangents, probe))
    return pytree.tree_unflatten(outputs, spec)


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


def _tangents_only(module, tap: Tap, forward: Callable, args: tuple, kwargs: dict, m: int) -> list[Any]:
    """The outputs' tangents along direction m, leaving random state and buffers as they were."""
    buffers = [(b, b.clone()) for b in module.buffers()]
    with torch.no_grad(), torch.random.fork_rng(), _dual(tap, m):
        leaves = pytree.tree_leaves(_run(tap, forward, args, kwargs))
        pairs = [forward_ad.unpack_dual(x) if isinstance(x, Tensor) else (x, None) for x in leaves]
        for buffer, saved in buffers:
            buffer.copy_(saved)
    return [torch.zeros_like(x) if t is None and isinstance(x, Tensor) else t for x, t in pairs]


@contextlib.contextmanager
def _dual(tap: Tap, target: int | None) -> Iterator[None]:
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
