"""The tracked classes: how each kind of layer scores its samples.

A tracked module changes class in place: to one of the same name, a `Linear` in every other respect, with the same
parameters, `state_dict()` and `isinstance`. Beside each covered parameter it holds a frozen sibling, its direction
(`weight_inrun_direction`), which is no parameter unless `fully_shard` is to split it. With neither a probe nor a
deferred step that keeps what it does, it runs its original forward.
"""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from inrun_kernels import bias_dot, embedding_dot, norm_dot

from . import functional, probing
from .convolution import Geometry, convolution, convolution_dots
from .errors import InRunError
from .factors import Factors
from .forward_mode import drawing_alike, forward_mode, split_samples
from .restoring import replaced, undone
from .shared import Shared
from .tap import SUFFIX, Layout, Tap, along, eagerly

SET_ON = "_inrun_set_on"  # of a class that has the forward which was set on a module: the module's own class
TRACKED = "_inrun_tracked"  # and what makes the classes that it is tracked as
HOOKED = "_old_forward"  # what accelerate's hooks call, in the forward that they set on a module


class Holder:
    """Mixin of every module that holds directions: they appear in no checkpoint, pickle or deep copy."""

    coarse = 1.0  # how many times further than others its scores may be from the gradient
    _inrun: Tap
    _inrun_class: type[nn.Module]  # the module's own
    # Directions, by their parameters' names and SUFFIX; the module's `_parameters` themselves while they may be sharded
    _siblings: dict[str, Any]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What a copy or a pickle is made of."""
        return self._untracked().__reduce_ex__(1)  # from 2 on, pickle requires the class of what it was given

    def deep_copied(self, memo: dict[int, Any]) -> Any:
        """The `__deepcopy__` of a module whose class has its own, as a parametrized one's has."""
        tracked, plain = (type(self), self.__dict__), self._untracked()

        def put_back() -> None:
            self.__class__, self.__dict__ = tracked

        with undone(put_back):  # itself, of which it may hold methods
            self.__class__, self.__dict__ = type(plain), plain.__dict__
            return copy.deepcopy(self, memo)

    def _untracked(self) -> Any:
        """The module as it is without its tracker."""
        plain: Any = object.__new__(vars(self._inrun_class).get(SET_ON, self._inrun_class))
        plain.__dict__.update(self.__dict__)
        give_forward_back(self, plain.__dict__)  # methods of this module, in whose place a copy has its own
        del plain.__dict__["_inrun"], plain.__dict__["_siblings"]
        without = direction_names(self)
        plain.__dict__["_parameters"] = {n: p for n, p in plain._parameters.items() if n not in without}
        return plain

    def _apply(self: Any, fn: Any, recurse: bool = True) -> Any:
        """As the module's own, of `to()` and its like; directions that are no parameters go along."""
        super()._apply(fn, recurse)  # pyright: ignore[reportAttributeAccessIssue]
        if self._siblings is not self._parameters:
            for direction in self._siblings.values():
                direction.data = fn(direction.data)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)  # pyright: ignore[reportAttributeAccessIssue]
        for name in direction_names(self):
            destination.pop(prefix + name, None)

    def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, unexpected, errors):
        load = super()._load_from_state_dict  # pyright: ignore[reportAttributeAccessIssue]
        load(state_dict, prefix, metadata, strict, missing, unexpected, errors)
        for name in direction_names(self):
            if prefix + name in missing:
                missing.remove(prefix + name)


class Rule(Holder):
    """A layer with a rule: `probed` runs it with a probe, `dots` scores it from what a deferred step kept."""

    may_fold = True  # whether its rows may be flattened tokens
    param_names: tuple[str, str | None] = ("weight", "bias")

    def forward(self, *args, **kwargs):
        return self.scored(args[0] if args else next(iter(kwargs.values())))

    def plain(self, x: Tensor) -> Tensor:
        """The layer's output, without a probe."""
        return super().forward(x)  # pyright: ignore[reportAttributeAccessIssue]

    def scored(self, x: Tensor) -> Tensor:
        """The layer's output, in whatever way the tracker asks for."""
        tap = self._inrun
        if not tap.scores():
            return self.plain(x)
        return self.scored_here(x) if tap.in_parts is None else tap.in_parts(self, x)

    def scored_here(self, x: Tensor) -> Tensor:
        """The output of the layer as this process has it."""
        tap = self._inrun
        require_unmapped(tap, x)
        watched = not torch.compiler.is_compiling() and (
            tap.rows.watched or isinstance(x, Shared) or self._is_first_of_all(x)
        )
        run = self._watched if watched else self._scored
        if tap.tokens_first and x.dim() > 2:  # a dropout after it draws its numbers in the order of memory
            y = run(x.transpose(0, 1)).transpose(0, 1).contiguous()
            if watched:
                tap.rows.take(self, y)
            return y
        if self._is_given_heads_first(x):
            return run(x.transpose(1, 2)).transpose(1, 2)
        return run(x)

    def _is_given_heads_first(self, x: Tensor) -> bool:
        """Whether tokens that have values, or belong to documents, are dimension 2, `[B, H, T, ...]`, as of norms of
        queries and keys."""
        tap, layout = self._inrun, self._inrun.layout
        if layout is None or x.dim() < 4 or not self.may_fold:
            return False
        first, second = (size == layout.like.shape[1] for size in x.shape[1:3])
        if first and second and tap.heads_first is None:
            raise InRunError(
                f"{tap}: expected one dimension of {layout.tokens} tokens, got {tuple(x.shape)}: [B, T, H, ...] or "
                "[B, H, T, ...]. Make the first step with another number of tokens"
            )
        if first != second and tap.heads_first is not second:
            tap.heads_first = second
        return tap.heads_first is True and second

    def _watched(self, x: Tensor) -> Tensor:
        """The layer's output, and where all samples share it, what becomes of it."""
        lead, shared = True, isinstance(x, Shared)  # lead: whether plain training has the one row as [1, ...]
        if isinstance(x, Shared):
            lead, x = x._lead, x.as_subclass(Tensor)
        tap, rows = self._inrun, self._inrun.rows
        rows.note_call()
        if rows.rows > 1 and x.dim() > 1:
            tap.of_samples |= len(x) == rows.rows
            tap.of_all |= len(x) == 1
        y = self._scored(x)
        if not tap.tokens_first:
            rows.take(self, y)
        if not shared and len(y) > 1 and y.shape[:1] != x.shape[:1]:
            lead, shared = x.shape[:1] == (1,), True
        return Shared.of(y, tap.name, lead, rows.shared) if shared else y

    def _scored(self, x: Tensor) -> Tensor:
        tap = self._inrun
        if self.may_fold and not torch.compiler.is_compiling() and x.dim() > 1:
            tap.flat = tap.routed or tap.rows.are_tokens(self, x)
        if tap.keep is not None:
            y = eagerly(tap.keep, self, self.plain, x)
        else:
            assert tap.probe is not None
            layout, segments = tap.layout, None
            try:
                if layout is not None:
                    x, segments = self.placed(x, layout), layout.segments
                elif tap.flat:
                    x = split_samples(tap, x, tap.probe.shape[0])
                y = self.probed(x, tap.shared_probe(), segments)
            except ValueError as error:
                raise ValueError(f"{tap}: {error}") from None
        return y.flatten(0, 1) if tap.flat else y

    def _is_first_of_all(self, x: Tensor) -> bool:
        """Whether a layer that had a row for each sample is given one for the first time: it may be one of all samples,
        or one that was picked out, for which another model would train."""
        tap = self._inrun
        several = tap.rows.rows > 1 and not tap.tokens_first
        return several and tap.of_samples and not tap.of_all and x.dim() > 1 and len(x) == 1

    def placed(self, x: Tensor, layout: Layout) -> Tensor:
        """The input with its sample axis in front, `[B, ...]`, and where tokens count, `[B, T, ...]`."""
        x = self.by_sample(x, layout.like.shape[0])
        if layout.segments is not None:
            layout.require(self._inrun, x, self.feature_dims())
        return x

    def by_sample(self, x: Tensor, batch: int) -> Tensor:
        return split_samples(self._inrun, x, batch) if self._inrun.flat else probing.by_sample(x, batch)

    def feature_dims(self) -> int:
        """How many of the input's last dimensions are no position."""
        return 1

    def directions(self, dtype: torch.dtype | None = None) -> tuple[Tensor | None, Tensor | None]:
        """The weight's and the bias's, in their own dtype, or in this one if it is wider."""
        weight, bias = self.param_names
        return along(self, weight, dtype), along(self, bias, dtype) if bias else None

    def probed(self, x: Tensor, probe: Tensor, segments: Tensor | None) -> Tensor:
        """The layer's output, with the dots as the probe's gradient."""
        raise NotImplementedError

    def dots(self, x: Tensor, grad: Tensor, segments: Tensor | None) -> Tensor:
        """The dots `[B]` or `[B, M]` (`[S]` or `[S, M]`), from the layer's input and the gradient of its output."""
        raise NotImplementedError

    def gradient_factors(self, x: Tensor, grad: Tensor) -> dict[str, Factors] | None:
        """By a parameter's name, of what its gradient is made: from the layer's input and the gradient of its output.

        None where it is made of no such factors.
        """
        return None


class Part(Rule):
    """A part of a module, scored and kept as a layer is."""

    def __init__(self, tap: Tap, module: Any) -> None:
        self._inrun, self.module, self.parameters = tap, module, module.parameters

    def modules(self) -> tuple[()]:
        """It has no modes and no buffers of its own."""
        return ()

    buffers = modules


class LinearRule(Rule):
    weight: Tensor
    bias: Tensor | None

    def operands(self, x):
        """What is multiplied: the input, the weight and the bias."""
        return x, self.weight, self.bias

    def directions(self, dtype=None):
        """In their own dtype: products widen them."""
        return super().directions()

    def probed(self, x, probe, segments):
        x, weight, bias = self.operands(x)
        return functional.linear(x, weight, bias, self.directions(x.dtype), probe, segments)

    def gradient_factors(self, x, grad):
        weight, bias = self.param_names
        acts, grads = probing.rows(x.to(grad.dtype), 1), probing.rows(grad, 1)
        return {weight: self.weight_factors(acts, grads), bias: Factors(grads, None)}

    def weight_factors(self, acts: Tensor, grads: Tensor) -> Factors:
        return Factors(grads, acts)

    def dots(self, x, grad, segments):
        return functional.linear_dots(x, grad, *self.directions(grad.dtype), segments)


class Float8Rule(LinearRule):
    """torchao's `Float8Linear`, and layers whose weight is of a class that rounds too: it runs as it is, in products of
    numbers rounded to 8 bits."""

    coarse = 8.0

    def probed(self, x, probe, segments):
        return functional.scored_linear(self.plain(x), x, self.directions(x.dtype), probe, segments)


class Conv1dRule(LinearRule):
    """Hugging Face's, whose weight is `[I, O]`."""

    def operands(self, x):
        return x, self.weight.t(), self.bias

    def directions(self, dtype=None):
        weight, bias = super().directions()
        return None if weight is None else weight.mT, bias

    def weight_factors(self, acts, grads):
        return Factors(acts, grads)


class EmbeddingRule(Rule):
    may_fold = False
    weight: Tensor
    padding_idx: int | None

    def scored(self, x):
        tap = self._inrun
        like = tap.probe if tap.layout is None else tap.layout.like
        if x.dim() == 1 and (tap.rows.rows if like is None else like.shape[0]) == 1:  # sample, or row of documents
            return super().scored(x[None])[0]  # all ids are its: the output is what it is without a tracker
        return super().scored(x)

    def by_sample(self, x, batch):
        captured = torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        if x.dim() != 1 or batch == 1 or captured:
            return probing.ids_by_sample(x, batch)
        tap = self._inrun
        if len(x) != batch:
            tap.takes_positions = True
            return probing.ids_by_sample(x, batch)
        # Positions once are positions still, and ids that were no run of numbers once are the samples' own. A GPU tells
        # later, and goes on.
        found = probing.may_be_positions(x if tap.whole_ids is None else tap.whole_ids)

        def refused() -> InRunError:
            return InRunError(f"{tap}: ids: {probing.positions(batch)}", suspected={tap.name})

        if tap.takes_positions:
            tap.pending.ask(~found, refused)
            return probing.by_sample(x[None], batch)
        tap.positions = found if tap.positions is None else tap.positions & found
        tap.pending.ask(tap.positions, refused)
        return x

    def feature_dims(self):
        return 0

    def probed(self, x, probe, segments):
        direction = along(self, "weight")
        if x.dim() == 1 and segments is None:
            x = self.by_sample(x, len(probe))
        if x.dim() != 1 or segments is not None:
            return functional.embedding(x, self.weight, direction, probe, self.padding_idx, segments)
        x = x.unsqueeze(1)
        return functional.embedding(x, self.weight, direction, probe, self.padding_idx).squeeze(1)

    def dots(self, x, grad, segments):
        ids, grads = x.reshape(x.shape[0], -1), probing.rows(grad, 1)
        segments = probing.by_row(segments, x, ids)
        return embedding_dot(ids, grads, along(self, "weight"), segments=segments, padding_idx=self.padding_idx)

    def gradient_factors(self, x, grad):
        ids, grads = x.reshape(x.shape[0], -1), probing.rows(grad, 1)
        if self.padding_idx is not None:
            grads = grads.masked_fill((ids == self.padding_idx)[..., None], 0)
        return {"weight": Factors(ids, grads)}


class ScalingRule(Rule):
    """A layer that scales, and may shift, what it has made of its input."""

    def rescaled(self, x: Tensor, grad: Tensor) -> tuple[Tensor, Tensor]:
        """What it scales, and the gradient of its output, with the features last."""
        raise NotImplementedError

    def dots(self, x, grad, segments):
        normed, grad = self.rescaled(x, grad)
        direction, bias_direction = self.directions(normed.dtype)
        wide, last, found = torch.promote_types(normed.dtype, grad.dtype), self.feature_dims(), []
        normed, grads = probing.rows(normed, last).to(wide), probing.rows(grad, last).to(wide)
        segments = probing.by_row(segments, grad, grads)
        if direction is not None:
            found.append(norm_dot(normed, grads, probing.flat(direction, last), segments=segments))
        if bias_direction is not None:
            found.append(bias_dot(grads, probing.flat(bias_direction, last), segments=segments))
        return sum(found[1:], found[0])

    def gradient_factors(self, x, grad):
        normed, grad = self.rescaled(x, grad)
        weight, bias = self.param_names
        wide, last = torch.promote_types(grad.dtype, torch.float32), self.feature_dims()
        normed, grads = probing.rows(normed, last).to(wide), probing.rows(grad, last)
        return {weight: Factors(normed * grads, None)} | ({bias: Factors(grads, None)} if bias else {})


class LayerNormRule(ScalingRule):
    weight: Tensor
    bias: Tensor | None
    normalized_shape: tuple[int, ...]
    eps: float

    def feature_dims(self):
        return len(self.normalized_shape)

    def probed(self, x, probe, segments):
        both = self.directions(x.dtype)
        return functional.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps, both, probe, segments)

    def rescaled(self, x, grad):
        return torch.nn.functional.layer_norm(_wide(x), self.normalized_shape, None, None, self.eps), grad


class RMSNormRule(LayerNormRule):
    def probed(self, x, probe, segments):
        shape, (direction, _) = self.normalized_shape, self.directions(x.dtype)
        return functional.rms_norm(x, shape, self.weight, self.eps, direction, probe, segments)

    def rescaled(self, x, grad):
        return torch.nn.functional.rms_norm(_wide(x), list(self.normalized_shape), None, self.eps), grad


class ConvRule(Rule):
    may_fold = False
    weight: Tensor
    bias: Tensor | None

    def placed(self, x, layout):
        require_whole_rows(self, layout)
        return super().placed(x, layout)

    def probed(self, x, probe, segments):
        return convolution(x, self.weight, self.bias, self.directions(), probe, self._geometry())

    def dots(self, x, grad, segments):
        return convolution_dots(x.to(grad.dtype), grad, self.directions(), self._geometry())

    def _geometry(self: Any) -> Geometry:
        return Geometry(self.stride, self.padding, self.dilation, self.groups)


class RelativeBiasRule(Rule):
    """T5's attention, whose position bias `[1, heads, Q, K]` has no sample axis: it is given one, and scored there."""

    relative_attention_bias: nn.Embedding

    def forward(self, *args, **kwargs):
        return self._inrun_class.forward(self, *args, **kwargs)

    def compute_bias(self, *args, **kwargs):
        one = _RelativeBias(self, args, kwargs)
        return one.scored(one.computed())


class _RelativeBias(Part):
    """One bias that an attention computes, `[1, ..., heads, Q, K]`, scored and kept as a layer is.

    Args:
        module: the attention; args, kwargs: what its bias is computed for.
    """

    may_fold = False

    def __init__(self, module: Any, args: tuple, kwargs: dict) -> None:
        super().__init__(module._inrun, module)
        self.call = args, kwargs

    def plain(self, x):
        return x

    def scored(self, x):
        return self._scored(x) if self._inrun.scores() else x

    def placed(self, x, layout):
        require_whole_rows(self.module, layout)
        return self.by_sample(x, layout.like.shape[0])

    def probed(self, x, probe, segments):
        x, tangents = probing.by_sample(x, len(probe)), self.tangents()
        return functional.attach(x, tangents.expand(*tangents.shape[: tangents.dim() - x.dim()], *x.shape), probe)

    def dots(self, x, grad, segments):
        tangents = self.tangents()
        first = tangents.dim() - x.dim()  # 1 where there are several targets
        return grad.flatten(1).to(tangents.dtype) @ tangents.flatten(first + 1).squeeze(first).t()

    def computed(self) -> Tensor:
        return self.module._inrun_class.compute_bias(self.module, *self.call[0], **self.call[1])

    def tangents(self) -> Tensor:
        """The bias along the table's direction, or the directions of several targets."""
        table = self.module.relative_attention_bias
        direction, found = along(table, "weight"), []
        many = direction.dim() > table.weight.dim()
        for one in direction if many else [direction]:
            with replaced([(table, "weight", one)]):
                found.append(self.computed())
        return torch.stack(found) if many else found[0]


class InPartsRule(Holder):
    """A module that uses parameters past layers: with a probe, or in a deferred step, its `in_parts` does what its own
    forward does, by `Part`s."""

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        tap = self._inrun
        if not tap.scores():
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        out = self.in_parts(*args, **kwargs) if tap.keep is None else eagerly(self.in_parts, *args, **kwargs)
        if tap.rows.watched and not torch.compiler.is_compiling():
            tap.rows.take(self, out)
        return out


class ForwardModeRule(Holder):
    """Any other module: `dot_b = <dL/dout_b, JVP_D(out)_b>`."""

    def forward(self, *args, **kwargs):
        tap, rows = self._inrun, self._inrun.rows
        if not tap.scores():
            return self.plain(*args, **kwargs)
        require_unmapped(tap, args, kwargs)
        watched = rows.watched and not torch.compiler.is_compiling()
        if watched:
            rows.note_call()
            self._require_samples(args, kwargs)
        if tap.keep is not None:
            out = eagerly(tap.keep, self, self.plain, (args, kwargs))
        else:
            out = forward_mode(self, args, kwargs)
        if watched:
            rows.take(self, out)
        return out

    def plain(self: Any, *args, **kwargs) -> Any:
        with drawing_alike(self._inrun):
            return super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]

    def _require_samples(self, *inputs: Any) -> None:
        plain = (bool, int, float, str, torch.dtype, torch.device, type(None))
        if all(isinstance(x, plain) for x in pytree.tree_leaves(inputs)):
            raise InRunError(
                f"{self._inrun} ({self._inrun_class.__name__}): expected an input that holds samples, "
                "got none, so its output has no rows of theirs. Name an enclosing module whose outputs are [B, ...] "
                "with track(..., through={parameter: module}), or exclude its parameters"
            )


def require_unmapped(tap: Tap, *inputs: Any) -> None:
    """Raise `InRunError` within `torch.vmap`, which takes an axis away: dimension 0 is another one there. And within
    other transforms of `torch.func`, whose tensors have no graph to score by, nor do they take autograd functions."""
    functorch: Any = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    if torch.compiler.is_compiling() or functorch.maybe_current_level() is None:
        return
    params = [owner._parameters.get(local) for owner, local in tap.owned]
    given = [x for x in (*pytree.tree_leaves(inputs), *params) if isinstance(x, Tensor)]
    transformed = any(functorch.is_functorch_wrapped_tensor(x) for x in given)
    while wrapped := [x for x in given if functorch.is_functorch_wrapped_tensor(x)]:
        if any(functorch.is_batchedtensor(x) for x in wrapped):
            raise InRunError(
                f"{tap}: expected to be called with a batch, got one of its slices within torch.vmap. Name the module "
                "that calls it so, or one around it, track(..., through={parameter: module}), or exclude its parameters"
            )
        given = [functorch.get_unwrapped(x) for x in wrapped]
    if transformed if tap.keep is not None else forward_ad._current_level < 0:
        raise InRunError(
            f"{tap}: expected a plain call, got one within a transform of torch.func (grad, jacrev, ...). Take what is "
            "detached there in tracker.paused(); else let a module make that transform, and name it or one around it, "
            "track(..., through={parameter: module}), or exclude its parameters"
        )


def require_whole_rows(module: Any, layout: Layout) -> None:
    """Raise `InRunError` where values belong to documents or tokens, in a layer that does not go token by token."""
    if layout.segments is not None:
        raise InRunError(
            f"{module._inrun} ({module._inrun_class.__name__}): expected a layer that goes token by "
            "token, to score tokens or documents. Exclude its parameters, or score whole rows"
        )


def give_forward_back(module: Any, attributes: dict[str, Any]) -> None:
    """In a tracked module's attributes its own forward stands again where its tracked one does, or where one was set on
    it."""
    own = module._inrun_class
    for name in ("forward", HOOKED):
        if getattr(attributes.get(name), "__func__", None) is type(module).forward:
            attributes[name] = MethodType(own.forward, module)
    if SET_ON in vars(own):
        attributes.setdefault("forward", MethodType(own.forward, module))


def direction_names(module: Any) -> list[str]:
    """Directions among a module's parameters."""
    return [name for name in module._parameters if name.endswith(SUFFIX)]


def _wide(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
