"""Which parameters of a model are scored by what, and how its modules become tracked ones.

Layers with a rule of their own: Linear, Embedding, LayerNorm, RMSNorm, convolutions, Hugging Face's Conv1D, subclasses
of these that call `super().forward()`, and every module that only scales and shifts (`affine.py`) or first of all
projects its input (`projection.py`); MultiheadAttention (`attention.py`), Hugging Face's fused experts (`experts.py`)
and T5's relative bias. Any other module that holds parameters directly is scored by forward-mode AD:
`dot_b = <dL/dout_b, JVP_D(out)_b>`, exact for every module whose output rows belong to samples, at the price of a
second forward through it.
"""

from __future__ import annotations

import contextlib
import fnmatch
import functools
import inspect
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils.hooks import RemovableHandle

from . import affine, attention, experts, projection, routing
from .borrowed import borrowers
from .errors import InRunError
from .forward_mode import sample_axis
from .layers import (
    HOOKED,
    SET_ON,
    TRACKED,
    Conv1dRule,
    ConvRule,
    EmbeddingRule,
    Float8Rule,
    ForwardModeRule,
    Holder,
    LayerNormRule,
    LinearRule,
    RelativeBiasRule,
    RMSNormRule,
    Rule,
    direction_names,
    give_forward_back,
)
from .restoring import undone
from .tap import SUFFIX, Tap

RULES: dict[type[nn.Module], type[Holder]] = {
    nn.Linear: LinearRule,
    nn.Embedding: EmbeddingRule,
    nn.LayerNorm: LayerNormRule,
    nn.RMSNorm: RMSNormRule,
    nn.Conv1d: ConvRule,
    nn.Conv2d: ConvRule,
    nn.Conv3d: ConvRule,
}

# By a class and a forward that was set on modules of it; none outlives these, as the forward may hold them.
_WITH_FORWARD: weakref.WeakValueDictionary[tuple[type, Callable], type] = weakref.WeakValueDictionary()
PACKS = "support_avx512bf16_for_cpu"  # of bitsandbytes' Linear4bit
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.modules.batchnorm._NormBase)
_BLOCKS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


@dataclass
class Plan:
    """Which module scores which parameters of a model; names are `named_parameters()`' own."""

    taps: list[Tap]  # of the modules that will be tracked
    tracked: list[str]
    excluded: list[str]
    frozen: list[str]


def plan(model: nn.Module, exclude: Sequence[str] = (), through: Mapping[str, str] | None = None) -> Plan:
    """Assign every trainable parameter of `model` to the module that will score it. Changes nothing.

    Args:
        model: any module.
        exclude: parameter names, or shell patterns of them (`"*.bias"`), that get no score.
        through: parameter names or patterns -> the name of an enclosing module ("" for the model) whose outputs are
            `[B, ...]`, and which scores them by forward-mode AD wherever inside it they are used.

    Raises:
        ValueError: a pattern matches no parameter; `through` names no module, or one that does not enclose.
        InRunError: a parameter that no rule can score, named, with the reason; or nothing is left to score.
    """
    with _in_classes(model):
        return _plan(model, exclude, through or {})


def _plan(model: nn.Module, exclude: Sequence[str], through: Mapping[str, str]) -> Plan:
    # Each path in `owned`, of a module that holds parameters, has one scorer: `taps[path]`, or that of a module around
    # it which `via` names, or of the attention which `tables` does.
    names = {id(p): n for n, p in model.named_parameters()}
    excluded = _matching("exclude", list(names.values()), exclude)
    modules = dict(model.named_modules())
    owned: dict[str, list[tuple[nn.Module, str, str]]] = {}
    for path, module in modules.items():
        params = [(local, p) for local, p in module._parameters.items() if p is not None and p.requires_grad]
        owned[path] = [(module, k, names[id(p)]) for k, p in params if names[id(p)] not in excluded]
    owned = {path: found for path, found in owned.items() if found}
    for owner, local, full in (one for found in owned.values() for one in found):
        if (param := getattr(owner, local)).is_complex():
            raise InRunError(f"{full}: expected a parameter of real numbers, got {param.dtype}; exclude it")
    via = _via(modules, owned, list(names.values()), through)
    tokens_first = {m for block in modules.values() for m in _given_tokens_first(block)}
    flat: set[nn.Module] = set()
    for path, block in modules.items():
        if isinstance(getattr(block, "experts", None), nn.Module) and path not in via:
            known = {} if block in tokens_first else routing.known(block)
            flat |= {m for m, flattened in known.items() if flattened}
            others = [p for p in owned if is_inside(p, path) and modules[p] not in known]
            via |= {p: path for p in others if p not in via}
    tables = {p: p.rpartition(".")[0] for p in owned if p not in via and _is_relative_bias(p, modules)}
    for path, around in [*tables.items()]:
        if around in owned or around in via.values():  # which scores more than its bias
            via[path] = tables.pop(path)
    taps = {
        path: _tap(path, modules[path], {local for _, local, _ in found})
        for path, found in owned.items()
        if path not in via and path not in tables
    }
    for path in [p for p, found in taps.items() if found.rule is ForwardModeRule]:
        if _is_held_by_a_child(path, owned, taps):
            del owned[path], taps[path]
        else:
            via[path] = path
    wholes, whole_of = _wholes(via, owned, modules, flat)
    taps = {path: tap for path, tap in taps.items() if path not in via} | wholes
    taps |= {path: Tap(path, modules[path], RelativeBiasRule) for path in tables.values()}
    for path, tap in taps.items():
        tap.forward_mode = tap.rule is ForwardModeRule
        tap.flat = tap.routed = tap.module in flat
        tap.tokens_first = tap.module in tokens_first
        tap.by_row = _takes_one_sample(tap)
        if "forward" in vars(tap.module) and _method_set_on(tap.module) is None:
            raise InRunError(
                f"{path or 'model'}: expected {type(tap.module).__name__}'s own forward, got one that was set on the "
                "module and is no method of it, which no rule sees. Track the model before that, or name a module "
                "around it, track(..., through={parameter: module})"
            )
    for path, found in owned.items():
        tap = taps[whole_of.get(path, tables.get(path, path))]
        tap.owned += [(owner, local) for owner, local, _ in found]
        tap.parameters += [full for _, _, full in found]
    tracked = list(dict.fromkeys(full for found in owned.values() for _, _, full in found))
    if not tracked:
        raise InRunError("model: expected at least one trainable parameter that is not excluded, found none")
    frozen = [n for n, p in model.named_parameters() if not p.requires_grad]
    return Plan([taps[path] for path in modules if path in taps], tracked, sorted(excluded), frozen)


def _given_tokens_first(block: nn.Module) -> list[nn.Module]:
    """What torch's transformers without `batch_first` give `[T, B, W]`; their attention sees to that itself."""
    stacked = isinstance(block, nn.TransformerEncoder | nn.TransformerDecoder)
    layer = next(iter(block.layers), None) if stacked else block
    if not isinstance(layer, _BLOCKS) or layer.self_attn.batch_first:
        return []
    if stacked:
        return [] if block.norm is None else [block.norm]
    inside = [m for m in block.children() if not isinstance(m, nn.MultiheadAttention)]
    return [m for child in inside for m in child.modules()]


def _wholes(
    via: dict[str, str], owned: dict[str, Any], modules: dict[str, nn.Module], flat: set[nn.Module]
) -> tuple[dict[str, Tap], dict[str, str]]:
    """The modules that score parameters inside them, and by the owners of those which of them does.

    One forward-mode pass, the outermost's, carries the tangents of all that lies inside it; but not of what has a
    rule, and not that of single numbers, which may multiply products of different samples' rows (CLIP's logit_scale).
    """
    params = ((path, getattr(owner, local)) for path, found in owned.items() for owner, local, _ in found)
    numbers = set(via.values()) - {via.get(path) for path, param in params if param.numel() != 1}
    kinds = {p: _whole_rule(modules[p], flat) for p in via.values()}
    taking = [p for p, kind in kinds.items() if kind is ForwardModeRule and p not in numbers]
    outermost = [
        p
        for p, kind in kinds.items()
        if kind is not ForwardModeRule or not any(is_inside(p, other) for other in taking)
    ]
    taps = {path: Tap(path, modules[path], kinds[path]) for path in outermost}
    for path in numbers.intersection(outermost):
        taps[path].apart = any(is_inside(p, path) and kinds[p] is ForwardModeRule for p in outermost)
    return taps, {
        path: via[path] if via[path] in taps else next(p for p in taps if p in taking and is_inside(via[path], p))
        for path in owned
        if path in via
    }


def install(tap: Tap, directions: dict[str, nn.Parameter]) -> None:
    """Change a tap's module into its tracked class and put the directions beside their parameters."""
    for (owner, local), full in zip(tap.owned, tap.parameters, strict=True):
        if not isinstance(owner, Holder):
            _adopt(owner, Holder if owner is not tap.module else tap.rule, tap, tap.under)
        owner._siblings[local + SUFFIX] = directions[full]  # pyright: ignore
    if not isinstance(tap.module, tap.rule):
        _adopt(tap.module, tap.rule, tap, None)
    if tap.forward_mode:
        tap.norms = any(isinstance(m, _NORMS) for m in tap.module.modules())
        owners = dict.fromkeys(owner for owner, _ in tap.owned)
        tap.made = [(owner, *weight) for owner in owners for weight in _made_by_hooks(owner)]
        configs = (getattr(m, "config", None) for m in tap.module.modules())
        tap.configs = list({id(c): c for c in configs if hasattr(c, "_experts_implementation")}.values())
    tap.names = tuple(name for name in tap.module.__dict__ if name != "_siblings")


def _made_by_hooks(module: nn.Module) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """The weights that hooks of torch's (pruning, the older weight and spectral norm) make before each forward, and
    what makes them as they are then."""
    for hook in module._forward_pre_hooks.values():
        if isinstance(hook, WeightNorm):
            yield hook.name, partial(hook.compute_weight, module)
        elif isinstance(hook, SpectralNorm):
            yield hook.name, partial(hook.compute_weight, module, do_power_iteration=False)
        elif isinstance(hook, BasePruningMethod):
            yield hook._tensor_name, partial(hook.apply_mask, module)


def call_heads(model: nn.Module) -> list[RemovableHandle]:
    """Let models of Liger's call their output layers where these are scored: for a loss without logits they take the
    weight past the layer. Returns the hooks that see to it."""
    modules = [module for module in model.modules() if _may_skip_logits(module)]
    return [module.register_forward_pre_hook(_with_logits, with_kwargs=True) for module in modules]


def leave_unpacked(model: nn.Module) -> list[Any]:
    """Let bitsandbytes not pack weights of four bits for inference, as it does on some CPUs in eval mode: they stay so,
    and no gradient goes through them. Returns the modules that did."""
    found: list[Any] = [module for module in model.modules() if vars(module).get(PACKS, False)]
    for module in found:
        setattr(module, PACKS, False)
    return found


def _may_skip_logits(module: nn.Module) -> bool:
    with contextlib.suppress(TypeError, ValueError):  # of what is not written in Python
        takes_it = "skip_logits" in inspect.signature(module.forward).parameters
        return takes_it and hasattr(module, "get_output_embeddings")
    return False


def _with_logits(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
    head = module.get_output_embeddings()
    scored = head is not None and any(isinstance(m, Holder) for m in head.modules())  # a copy has the hook too
    return (args, {**kwargs, "skip_logits": False}) if scored else None


def set_apart(model: nn.Module) -> None:
    """Take the directions out of the parameters, where `fully_shard` has not come to split them alike: what averages,
    counts or copies parameters is to see none."""
    for module in model.modules():
        if isinstance(module, Holder):
            module._siblings = {name: module._parameters.pop(name) for name in direction_names(module)}


def remove(module: Any) -> None:
    """Give a tracked module its own class back and take its directions away."""
    for name in direction_names(module):
        del module._parameters[name]
    del module.__dict__["_inrun"], module.__dict__["_siblings"]
    give_forward_back(module, module.__dict__)
    own = module._inrun_class
    module.__class__ = vars(own).get(SET_ON, own)


@contextlib.contextmanager
def _in_classes(model: nn.Module) -> Iterator[None]:
    """Modules on which a method was set in place of their forward, as Liger and other libraries of kernels do, are for
    the block of classes that have it."""
    found = [(m, type(m), vars(m)["forward"], _class_of(m)) for m in model.modules() if _class_of(m) is not type(m)]

    def put_back() -> None:
        for module, cls, forward, _ in found:
            module.__class__, module.forward = cls, forward

    with undone(put_back):
        for module, _, _, with_forward in found:
            del module.__dict__["forward"]
            module.__class__ = with_forward
        yield


def _class_of(module: nn.Module) -> type[nn.Module]:
    """The class of a module, or where a method was set on it in place of its forward, one that has this."""
    forward = _method_set_on(module)
    if forward is None or (HOOKED in vars(module) and forward is type(module).forward):
        return type(module)
    return _with_forward(type(module), forward)


def _method_set_on(module: nn.Module) -> Callable | None:
    """What was set on a module in place of its forward, beneath accelerate's hooks, where it is a method of it."""
    held = vars(module)
    forward = held.get(HOOKED, held["forward"]) if "forward" in held else None
    return forward.__func__ if isinstance(forward, MethodType) and forward.__self__ is module else None


def _with_forward(cls: type[nn.Module], forward: Callable) -> type[nn.Module]:
    if (found := _WITH_FORWARD.get((cls, forward))) is None:
        tracked = functools.cache(_tracked_class.__wrapped__)
        namespace = {"forward": forward, SET_ON: cls, "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        found = _WITH_FORWARD[cls, forward] = type(cls.__name__, (cls,), namespace | {TRACKED: tracked})
    return found


def _adopt(module: nn.Module, mixin: type[Holder], tap: Tap, under: type[nn.Module] | None) -> None:
    # Its own, also where a module around it scores a part of it.
    cls = getattr(module, "_inrun_class", None) or _class_of(module)
    module.__dict__.update(_inrun=tap, _siblings=module._parameters)
    module.__class__ = vars(cls).get(TRACKED, _tracked_class)(mixin, cls, under)
    if _method_set_on(module) is None:  # a function, in what is run as it is
        return
    if HOOKED in vars(module):
        module.__dict__[HOOKED] = MethodType(type(module).forward, module)
    else:
        del module.__dict__["forward"]


@functools.cache
def _tracked_class(mixin: type[Holder], cls: type[nn.Module], under: type[nn.Module] | None) -> type[nn.Module]:
    # Beneath a subclass, the rule stands between it and the layer that its super().forward() means.
    bases = (mixin, cls) if under is None else (cls, type(f"Tracked{under.__name__}", (mixin, under), {}))
    # Others go by a class's name and module, as transformers' records of outputs do; Dynamo looks into none of torch's.
    module = __name__ if cls.__module__.partition(".")[0] == "torch" else cls.__module__
    namespace = {"__module__": module, "__qualname__": cls.__qualname__, "__doc__": cls.__doc__, "_inrun_class": cls}
    if hasattr(cls, "__deepcopy__"):
        namespace["__deepcopy__"] = mixin.deep_copied
    return type(cls.__name__, bases, namespace)


def _via(
    modules: dict[str, nn.Module], owned: dict[str, Any], names: list[str], through: Mapping[str, str]
) -> dict[str, str]:
    """Owner -> the module that scores all of its parameters by forward-mode AD, where that is not the owner."""
    wholes = [p for p, m in modules.items() if _is_whole(m)]
    via, whole_of = borrowers(modules, owned), {}
    for path in owned:
        whole = next((p for p in wholes if p == path or is_inside(path, p)), None)
        if whole is not None:
            via[path] = whole_of[path] = whole
        elif _is_container(modules[path]):  # whose parameters the module around it uses
            around = path
            while around and _is_container(modules[around]):
                around = around.rpartition(".")[0]
            via[path] = around
    for pattern, target in through.items():
        if target not in modules:
            raise ValueError(f"through[{pattern!r}]: expected the name of a module, got {target!r}")
        hits = _matching("through", names, [pattern])
        for path, found in owned.items():
            if any(full in hits for _, _, full in found):
                if path != target and not is_inside(path, target):
                    raise ValueError(f"through[{pattern!r}]: expected a module that encloses {path!r}, got {target!r}")
                whole = whole_of.get(path, path)
                together = whole_of if is_inside(whole, target) else ()  # all that a whole holds, or this alone
                via |= dict.fromkeys([path, *(q for q in together if whole_of[q] == whole)], target)
    return via


def _tap(path: str, module: nn.Module, scored: set[str]) -> Tap:
    """How a module scores these parameters, which it holds directly."""
    cls = type(module)
    if isinstance(module, nn.EmbeddingBag):  # as any other module, by what is written out of it
        _require_plain_embedding(module, path)
    if cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils":
        return Tap(path, module, Conv1dRule)
    if (cls.__name__ == "Float8Linear" and cls.__module__.partition(".")[0] == "torchao") or _multiplies_itself(module):
        return Tap(path, module, Float8Rule)
    for base, rule in RULES.items():
        if isinstance(module, base) and scored <= {"weight", "bias"} and not _convolves_otherwise(module, base):
            under = None if cls.forward is base.forward else base
            if under is None or _calls_super(cls, base):
                if base is nn.Embedding:
                    _require_plain_embedding(module, path)
                return Tap(path, module, rule, under=under)
    for kind, rule in ((affine, affine.AffineRule), (projection, projection.ProjectionRule)):
        if (form := kind.recognise(module)) is not None:
            return Tap(path, module, rule, form=form)
    return Tap(path, module, ForwardModeRule)


def _multiplies_itself(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight says what a product with it is, as those of torchao's trained in 8 bits
    and BitNet do."""
    weight = module._parameters.get("weight")
    if weight is None or hasattr(weight, "placements"):  # of a DTensor, what is whole
        return False
    own = type(weight).__torch_function__ is not nn.Parameter.__torch_function__
    return own and type(module).forward is nn.Linear.forward


def _whole_rule(module: nn.Module, flat: set[nn.Module]) -> type[Holder]:
    """How a module scores all parameters inside it."""
    if attention.is_attention(module):
        return attention.AttentionRule
    return experts.ExpertsRule if module in flat and experts.is_experts(module) else ForwardModeRule


def _takes_one_sample(tap: Tap) -> bool:
    """Whether the module computes each row of a batch by itself, and holds it at dimension 0."""
    if tap.rule is RelativeBiasRule or tap.flat or isinstance(tap.module, nn.modules.batchnorm._BatchNorm):
        return False
    return sample_axis(tap.module, 0) == 0 and not isinstance(tap.module, nn.RNNBase)


def _is_container(module: nn.Module) -> bool:
    return type(module).forward is nn.Module.forward


def _is_whole(module: Any) -> bool:
    """Whether it uses its children's parameters without calling the children; so do those of PEFT's layers that scale
    their adapted weight's columns."""
    scales = getattr(module, "lora_magnitude_vector", None)
    scaled = isinstance(scales, nn.ModuleDict) and len(scales) > 0
    return scaled or isinstance(module, nn.MultiheadAttention) or is_parametrized(module)


def _is_relative_bias(path: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a table is the relative position bias of T5's attention, and of what descends from it."""
    parent, _, name = path.rpartition(".")
    return name == "relative_attention_bias" and hasattr(modules[parent], "compute_bias")


def _calls_super(cls: type, base: type) -> bool:
    """Whether every forward between a subclass and a layer goes through `super().forward()`."""
    between = [c for c in cls.__mro__[: cls.__mro__.index(base)] if "forward" in c.__dict__]
    codes = [getattr(inspect.unwrap(c.__dict__["forward"]), "__code__", None) for c in between]
    return all(code and "__class__" in code.co_freevars and "forward" in code.co_names for code in codes)


def _is_held_by_a_child(path: str, owned: dict[str, Any], taps: dict[str, Tap]) -> bool:
    """Whether a module's own parameters are biases that layers inside it hold too, and score (BERT's prediction head).

    Should the module use them itself as well, the efficiency check says so.
    """
    inside = [taps[p] for p in taps if is_inside(p, path) and issubclass(taps[p].rule, Rule)]
    theirs = {full for tap in inside for _, _, full in owned[tap.name]}
    return all(full in theirs and owner._parameters[local].dim() == 1 for owner, local, full in owned[path])


def is_inside(path: str, ancestor: str) -> bool:
    """Whether a name is below that of a module."""
    return path != ancestor and path.startswith(f"{ancestor}." if ancestor else "")


def _convolves_otherwise(module: Any, base: Any) -> bool:
    """Whether a convolution pads as its rule does not, or its `forward` calls a method that is not torch's own."""
    if not hasattr(base, "_conv_forward"):
        return False
    own = getattr(module._conv_forward, "__func__", None) is base._conv_forward
    return not own or isinstance(module.padding, str) or module.padding_mode != "zeros"


def _require_plain_embedding(module: nn.Module, path: str) -> None:
    unsupported = {"max_norm": None, "scale_grad_by_freq": False, "sparse": False}
    for option, plain in unsupported.items():
        if getattr(module, option) != plain:
            raise InRunError(
                f"{path}.weight: expected an {type(module).__name__} with {option}={plain}, got "
                f"{getattr(module, option)}, which no rule knows; exclude the parameter or change the option"
            )


def _matching(argument: str, names: list[str], patterns: Sequence[str]) -> set[str]:
    if isinstance(patterns, str):
        raise TypeError(f"{argument}: expected a sequence of names, got the string {patterns!r}")
    found: set[str] = set()
    for pattern in patterns:
        hits = fnmatch.filter(names, pattern)
        if not hits:
            raise ValueError(f"{argument}: expected names of parameters, {pattern!r} matches none of {len(names)}")
        found.update(hits)
    return found
