"""An optimizer's update as a function of the gradient: `u(g)`, with the state it has before the step.

What the path methods need is `u` at a few gradients, for optimizers whose update is elementwise: coordinate by
coordinate it depends on that coordinate's gradient, weight and state alone (of others see `coupled.py`). No formula is
written down for any of them: a twin of the optimizer, with copies of its state in float64, takes the step. So amsgrad,
maximize, weight decay, foreach and fused variants, and optimizers yet to be written, are what they are. In float64 the
difference of two updates keeps its digits although both are far below the weights. Other optimizers have a twin of
another kind, which steps all parameters together in their own dtypes (`joint_updates`).
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn, optim
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from torch.utils.hooks import RemovableHandle

from .distributed import Ranks, local
from .errors import InRunError
from .restoring import random_kept, setting, undone

# Exactly these classes: a subclass may override what its base does coordinate by coordinate.
ELEMENTWISE = (
    optim.SGD,
    optim.Adam,
    optim.AdamW,
    optim.Adamax,
    optim.NAdam,
    optim.RAdam,
    optim.RMSprop,
    optim.Adagrad,
    optim.Adadelta,
    optim.Rprop,
    optim.ASGD,
)
_PREPARED = ("AcceleratedOptimizer", "_FabricOptimizer")  # by their class, whose update is another's
_SCALARS = ("step", "mu_product", "eta", "mu")  # state that, as a number, does not belong to a coordinate
COMPARED = 2  # steps that what is taken for an update is held to: without a state, and with one
_COMPARED_IN = 1 << 16  # coordinates of each parameter
CHUNK, CHUNK_OF_CPU = 1 << 22, 1 << 18  # elements of the parameters whose update is computed together

# update(grad, param, state, group) -> what the step adds to param; all in float64, nothing changed.
UpdateRule = Callable[[Tensor, Tensor, dict[str, Any], dict[str, Any]], Tensor]


def as_optimizers(given: Any) -> tuple[Optimizer, ...]:
    """The optimizers of one, of several, or of a container that holds them as its `optimizers` (as torchtitan's); of
    those that accelerate or Fabric has prepared, what is inside.

    Raises:
        TypeError: no optimizer of torch's kind; InRunError: one of DeepSpeed's, or a wrapper without hooks.
    """
    if given is None:
        return ()
    if type(given).__name__.startswith("DeepSpeed"):
        raise InRunError(
            f"optimizer: expected one over the model's own parameters and gradients, got {type(given).__name__}, which "
            "holds parts of its own, flattened; take fully_shard, or DDP (DeepSpeed without ZeRO has torch's)"
        )
    given = getattr(given, "optimizers", given)
    held = given if isinstance(given, Iterable) else (given,)
    found = tuple(each.optimizer if _is_prepared(each) else each for each in held)
    if others := [each for each in found if not isinstance(each, Optimizer)]:
        raise TypeError(f"optimizer: expected a torch.optim.Optimizer, or several, got {type(others[0]).__name__}")
    if others := [each for each in found if not hasattr(each, "_optimizer_step_pre_hooks")]:
        raise InRunError(
            f"optimizer: expected one whose step takes torch's hooks, got {type(others[0]).__name__}, which wraps "
            "another without them; give the one it wraps"
        )
    return found


def _is_prepared(optimizer: Any) -> bool:
    return any(cls.__name__ in _PREPARED for cls in type(optimizer).__mro__)


def groups_of(optimizers: Iterable[Optimizer]) -> list[dict[str, Any]]:
    """The `param_groups` of all of them, one after the other."""
    return [group for optimizer in optimizers for group in optimizer.param_groups]


def is_known(optimizer: Optimizer, rule: UpdateRule | str | None, known: Sequence[type]) -> bool:
    """Whether `updates` has the update of some parameters without the others; `known`: such classes."""
    return callable(rule) or rule == "elementwise" or type(optimizer) in known


def require_known(optimizer: Optimizer, rule: UpdateRule | str | None, known: Sequence[type]) -> None:
    """Raise `InRunError` unless the update of this optimizer as a function of the gradient is known."""
    if is_known(optimizer, rule, known):
        return
    names = ", ".join(c.__name__ for c in known)
    raise InRunError(
        f"optimizer: expected one of torch.optim's {names}, whose update is known, got {named(optimizer, known)}. If "
        "it updates weights coordinate by coordinate, track with update='elementwise'; else give its update, "
        "differentiable: update=lambda grad, param, state, group: <what the step adds to param>; or use method="
        "'monte_carlo', which takes any"
    )


def named(optimizer: Optimizer, known: Sequence[type]) -> str:
    """The name of an optimizer's class, and where that is also the name of one of these, whose it is."""
    kind = type(optimizer)
    alike = kind not in known and kind.__name__ in [c.__name__ for c in known]
    return f"{kind.__name__} of {kind.__module__}" if alike else kind.__name__


def require_no_closure(optimizer: Optimizer) -> None:
    """Raise `InRunError` unless the optimizer's step is a function of the gradients that stand."""
    closure = inspect.signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise InRunError(f"optimizer: expected one whose step() needs no closure, got {type(optimizer).__name__}")


def of_scaler(optimizer: Any, name: str) -> Tensor | None:
    """The `grad_scale` or `found_inf` that a gradient scaler gives an optimizer that heeds them, as fused ones do; what
    another has by that name is its own."""
    found = getattr(optimizer, name, None)
    return found if isinstance(found, Tensor) and getattr(optimizer, "_step_supports_amp_scaling", False) else None


def within_another(optimizer: Optimizer) -> bool:
    """Whether the step of the optimizer that hooks are told of runs within another one of its own, as that of the class
    it inherits from: torch tells hooks of both where both classes have been used in the process."""
    frame, count = sys._getframe(), 0
    while frame is not None:
        hooked = frame.f_code.co_qualname == "Optimizer.profile_hook_step.<locals>.wrapper"
        count += hooked and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return count > 1


def chunks(slots: Sequence[tuple[int, Any]]) -> Iterator[list[tuple[int, Any]]]:
    """Numbered parameters in runs of at most `CHUNK` elements (or one parameter); fewer of a CPU, which takes longer to
    be given larger memory than to compute there."""
    part: list[tuple[int, Any]] = []
    size = 0
    for i, slot in slots:
        if part and size + slot.param.numel() > (CHUNK_OF_CPU if slot.param.is_cpu else CHUNK):
            yield part
            part, size = [], 0
        part.append((i, slot))
        size += slot.param.numel()
    if part:
        yield part


@torch.no_grad()
def updates(slots: Sequence[Any], grads: Sequence[Tensor], rule: UpdateRule | str | None = None) -> list[Tensor]:
    """What the next `optimizer.step()` would add to each parameter if its gradient were the given one.

    Args:
        slots: parameters (with `param`, and the `optimizer`, `group`, `options` and `state` that they have there);
            neither they, the optimizers nor their state change.
        grads: float64, each the parameter's shape (or that of this process's shard, whose update is then meant).
        rule: a user's own update function; None or "elementwise" takes the optimizer's own step.

    Returns:
        float64 tensors, the gradients' shapes.

    Raises:
        InRunError: the step of an optimizer that was said to be elementwise cannot be taken so, or a user's function
            returns no tensor of the parameter's shape.
    """
    if not callable(rule) and len(slots) == 1 and _is_long(slots[0], grads[0]):
        moved = torch.empty_like(grads[0])
        for start in range(0, moved.numel(), CHUNK_OF_CPU):
            here = slice(start, start + CHUNK_OF_CPU)
            part = _reshaped(slots[0], lambda x, here=here: x.view(-1)[here])
            moved.view(-1)[here] = updates([part], [grads[0].view(-1)[here]], rule)[0]
        return [moved]
    params = [local(s.param).detach().to(torch.float64, copy=True) for s in slots]
    states = [copied(s.state, local(s.param), torch.float64) for s in slots]
    grads = [grad.clone() for grad in grads]  # an update may write into them, as foreach SGD with nesterov does
    if callable(rule):
        options = [pinned(s.options) for s in slots]
        found = [rule(*args) for args in zip(grads, params, states, options, strict=True)]
        for slot, moved, p in zip(slots, found, params, strict=True):
            if not isinstance(moved, Tensor) or moved.shape != p.shape:
                got = tuple(moved.shape) if isinstance(moved, Tensor) else moved
                raise InRunError(
                    "update: expected what the step adds to the parameter, a tensor of its shape "
                    f"{tuple(slot.param.shape)}, got {got}"
                )
        return found
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    for optimizer in {id(s.optimizer): s.optimizer for s in slots}.values():
        held = [each for each in zip(slots, params, states, strict=True) if each[0].optimizer is optimizer]
        try:
            _step_twin(optimizer, held)
        except Exception as error:
            if rule != "elementwise" or isinstance(error, (InRunError, torch.OutOfMemoryError)):
                raise
            raise InRunError(
                "update: expected an elementwise one, as update='elementwise' says, whose step can be taken for copies "
                f"of some parameters in float64; that of {type(optimizer).__name__} says {error!r}. Give it as a "
                "function: update=lambda grad, param, state, group: <what it adds to param>"
            ) from error
    for p in params:
        p.grad = None  # or what holds the result would hold the gradient
    return [p.sub_(local(s.param).detach()) for p, s in zip(params, slots, strict=True)]


def _is_long(slot: Any, grad: Tensor) -> bool:
    """Whether a CPU had better compute the update piece by piece, and may: what a user says of one has to be tried."""
    alike = [x for x in (local(x) for x in slot.state.values() if isinstance(x, Tensor)) if x.shape == grad.shape]
    whole = all(x.is_contiguous() for x in (local(slot.param), grad, *alike))
    return grad.is_cpu and grad.numel() > CHUNK_OF_CPU and type(slot.optimizer) in ELEMENTWISE and whole


def repeated(slot: Any, count: int) -> Any:
    """`count` times a parameter, along a new first dimension, for the `updates` of an elementwise optimizer."""
    return _reshaped(slot, lambda x: x.expand(count, *x.shape))


def in_blocks(slot: Any) -> bool:
    """Whether a parameter's state is not to be taken apart or repeated with it: it has tensors of another shape, or is
    bitsandbytes', which `copied` leaves as it lies."""
    shape = local(slot.param).shape
    others = any(isinstance(x, Tensor) and x.numel() > 1 and local(x).shape != shape for x in slot.state.values())
    return others or "state1" in slot.state


def counts_read(slots: Iterable[Any]) -> contextlib.AbstractContextManager[None]:
    """Counts of steps that an optimizer (fused, capturable) holds on a device are read once, together, for all updates
    of the block: a twin would wait for each by itself."""
    counted = [slot for slot in slots if isinstance(step := slot.state.get("step"), Tensor) and step.is_cuda]
    steps = [local(slot.state["step"]).flatten()[0] for slot in counted]
    read = torch.stack([step.to(steps[0].device) for step in steps]).cpu() if steps else ()
    return setting("count", [(slot, count.clone()) for slot, count in zip(counted, read, strict=True)])


def sampled(slot: Any, most: int, rule: UpdateRule | str | None) -> tuple[Any, slice]:
    """At most so many coordinates of a parameter, for the `updates` of an elementwise optimizer; and which they are.

    All of them, in their shape, for a user's function, which may look at the shape, and where the state has scales of
    blocks of them.
    """
    here = _some(local(slot.param).numel(), most)
    if callable(rule) or in_blocks(slot) or here.step == 1:
        return _reshaped(slot, lambda x: x), slice(None)
    return _reshaped(slot, lambda x: x.flatten()[here]), here


def _some(size: int, most: int) -> slice:
    """At most so many of this many coordinates."""
    return slice(None, None, -(-size // most) | 1)  # odd: no column of a matrix is seen alone


def _reshaped(slot: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """What `updates` needs of a slot, its parameter and the state of the parameter's shape changed alike."""
    like = local(slot.param).detach()
    state = {key: local(value) for key, value in slot.state.items()}
    shaped = {key: change(value) for key, value in state.items()
              if isinstance(value, Tensor) and value.shape == like.shape and not _is_scalar(key, value)}  # fmt: skip
    return SimpleNamespace(
        param=change(like), whole=_whole(slot), optimizer=slot.optimizer, group=slot.group, options=slot.options,
        state={**state, **shaped},
    )  # fmt: skip


def _whole(slot: Any) -> Tensor:
    """The parameter that the optimizer holds."""
    return getattr(slot, "whole", slot.param)


def pinned(group: dict[str, Any]) -> dict[str, Any]:
    """A copy of a group's options; what an eps of None takes from the parameters' dtype is that of the real ones."""
    eps = group.get("eps")
    if not isinstance(eps, (tuple, list)) or eps[0] is not None:
        return dict(group)
    return {**group, "eps": (torch.finfo(group["params"][0].dtype).eps, *eps[1:])}


def _step_twin(optimizer: Optimizer, held: Sequence[tuple[Any, Tensor, dict[str, Any]]]) -> None:
    """Take the optimizer's step with other parameters: for each slot one, with its state.

    They are in the slots' places wherever the optimizer holds those, so that its step writes to no real one.
    """
    nothing = torch.empty(0, device="meta")
    instead = {id(p): nothing for group in optimizer.param_groups for p in group["params"]}
    instead |= {id(_whole(slot)): p for slot, p, _ in held}
    twin = _twin(optimizer, instead, ("state", "param_groups"))
    twin.param_groups = []
    for i, group in enumerate(optimizer.param_groups):
        options = {k: v for k, v in pinned(group).items() if k != "params"}
        for name, value in options.items():
            numbers = isinstance(value, tuple) and {*map(type, value)} <= {int, float}  # betas: most groups' only one
            if isinstance(value, (Tensor, list, tuple, dict)) and not numbers:  # counts of steps, say
                options[name] = pytree.tree_map_only(Tensor, Tensor.clone, value)
        options |= {k: False for k in ("fused", "capturable", "differentiable") if k in group}
        if any(isinstance(rate, Tensor) for rate in (group.get("lr"), *group.get("betas", ()))):
            options["foreach"] = False  # which takes rates that are tensors of a capturable optimizer alone
        twin.param_groups.append({**options, "params": [p for slot, p, _ in held if slot.group == i]})
    # What it keeps for all parameters, as MADGRAD's count, is under other keys.
    of_all = {k: copy.deepcopy(optimizer.state[k]) for k in optimizer.state if not isinstance(k, Tensor)}
    twin.state = defaultdict(dict, {p: state for _, p, state in held if state} | of_all)
    _renumber(twin.state, instead)
    with contextlib.nullcontext() if type(optimizer) in ELEMENTWISE else random_kept():
        _step_as(optimizer, twin)


_called_with: dict[int, tuple[tuple, dict[str, Any]]] = {}  # `id` of an optimizer -> what its step is given


@contextlib.contextmanager
def called_with(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> Iterator[None]:
    """In the block the steps of an optimizer's twins are given what its own is, as Sophia's `step(bs=...)`."""
    _called_with[id(optimizer)] = args, kwargs
    try:
        yield
    finally:
        del _called_with[id(optimizer)]


def _step_as(optimizer: Optimizer, twin: Any) -> None:
    args, kwargs = _called_with.get(id(optimizer), ((), {}))
    twin.step(*args, **kwargs)


def is_plain(param: Tensor) -> bool:
    """Whether a parameter is as it was written: of another class it may be rounded."""
    return type(param) in (Tensor, nn.Parameter)


# A slot, some of its coordinates, what its step is to make of them, and the norm of what that adds.
Expected = tuple[Any, slice, Tensor, Tensor]


@torch.no_grad()
def expected(moves: Iterable[tuple[Any, Tensor]]) -> list[Expected]:
    """Of slots and their updates."""
    found = []
    for slot, moved in moves:
        here = _some(moved.numel(), _COMPARED_IN)
        moved = moved.flatten()[here]
        after = slot.shard.detach().flatten()[here].clone().add_(moved)
        found.append((slot, here, after, moved.norm()))
    return found


@torch.no_grad()
def compare(found: Sequence[Expected], rule: UpdateRule | str | None) -> int:
    """Warn where an optimizer's own step, which has been taken, has not added what its update was said, or taken, to
    be. Returns how many comparisons that was worth: none at a rate of zero, which tells nothing; all after a warning.
    """
    told = False
    for slot, here, after, norm in found:
        param, size = slot.shard.detach().flatten()[here], norm.item()
        off = (param.double() - after.double()).norm().item()
        rounding = 4 * torch.finfo(param.dtype).eps * after.double().norm().item()
        told = told or size > 0 or off > rounding
        if off > 0.1 * size + rounding:
            of = "the update that was given" if rule is not None else (
                "the latter, a copy's step, which has no hooks. Give the update as a function: update=lambda grad, "
                "param, state, group: <what it adds to param>; or change weights outside of the step block"
            )  # fmt: skip
            warnings.warn(
                f"update: expected what the step adds to a parameter, to {slot.name} by "
                f"{type(slot.optimizer).__name__} a tensor that is {off:.4g} away; got one of norm {size:.4g}. Values "
                f"are of {of}",
                stacklevel=2,
            )
            return COMPARED
    return int(told)


@torch.no_grad()
def joint_updates(optimizer: Optimizer, slots: Sequence[Any], grads: Sequence[Tensor]) -> list[Tensor]:
    """As `updates`, of any optimizer: the parameters take one step together, in dtypes of their own.

    The twin is a copy of all that the optimizer holds, with copies of the parameters wherever it holds those.

    Raises:
        InRunError: the optimizer holds something that cannot be copied.
    """
    copies = [nn.Parameter(s.param.detach().clone()) for s in slots]
    for p, grad in zip(copies, grads, strict=True):
        p.grad = grad.to(p.dtype, copy=True)
    twin = _twin(optimizer, {id(s.param): p for s, p in zip(slots, copies, strict=True)})
    with random_kept():  # which a step may draw, and will draw itself
        try:
            _step_as(optimizer, twin)
        except Exception as error:
            if isinstance(error, (InRunError, torch.OutOfMemoryError)):
                raise
            raise InRunError(
                "optimizer: expected one of which a copy can take the step, for other gradients; that of "
                f"{type(optimizer).__name__} says {error!r}"
            ) from error
    return [p.detach() - s.param.detach() for p, s in zip(copies, slots, strict=True)]


def _twin(optimizer: Any, instead: dict[int, Tensor], without: tuple[str, ...] = ()) -> Any:
    """A copy of an optimizer that shares nothing which a step writes, and has no hooks.

    Args:
        instead: `id` of a tensor -> what the copy has in its place.
        without: attributes that it has none of; nor a gradient scaler's, nor the `step` that a scheduler counts by.
    """
    try:
        return _copied(optimizer, instead, dict[int, Any](instead), without)
    except torch.OutOfMemoryError:  # which the loop may know what to do about
        raise
    except (TypeError, RuntimeError) as error:
        raise InRunError(
            f"optimizer: expected one that can be copied, to take its step for other gradients, got "
            f"{type(optimizer).__name__}, which cannot: {error}"
        ) from error


def _copied(optimizer: Any, instead: dict[int, Tensor], memo: dict[int, Any], without: tuple[str, ...] = ()) -> Any:
    """`_twin`; `memo` is that of `copy.deepcopy`."""
    left_out = (*without, "step", *(k for k in ("grad_scale", "found_inf") if of_scaler(optimizer, k) is not None))
    held = {k: v for k, v in vars(optimizer).items() if k not in left_out}
    # Torch's own: what else is called so belongs to the update.
    held |= {k: OrderedDict() for k in held if k.startswith("_optimizer_") and k.endswith("_hooks")}
    twin = memo[id(optimizer)] = object.__new__(type(optimizer))
    for each in pytree.tree_leaves(held):
        if isinstance(each, RemovableHandle):  # which cannot be copied
            memo[id(each)] = each
        elif isinstance(each, Optimizer) and id(each) not in memo:  # which would lose what it has of its own
            _copied(each, instead, memo)
    twin.__dict__.update(copy.deepcopy(held, memo))
    for value in vars(twin).values():
        _renumber(value, instead)
    return twin


def _renumber(held: Any, instead: dict[int, Tensor]) -> None:
    """Put what is held by the `id` of a tensor under that of the one in its place."""
    if isinstance(held, (dict, set)):
        for key in [key for key in held if type(key) is int and key in instead]:
            number = id(instead[key])
            if isinstance(held, set):
                held.remove(key)
                held.add(number)
            else:
                held[number] = held.pop(key)


@contextlib.contextmanager
def weights_moved(
    slots: Sequence[Any], ranks: Ranks, moves: Iterable[tuple[int, Tensor]], before: dict[int, Tensor]
) -> Iterator[None]:
    """Add to the weights for the block; after it they are what they were, to the bit, and not counted as changed.

    Args:
        slots: the parameters; ranks: the processes that hold them.
        moves: numbers of slots, and what their weights move by.
        before: takes copies of the weights that it has none of.
    """

    def put_back() -> None:
        ranks.settle()
        for i, weight in before.items():
            slots[i].shard.data.copy_(weight)

    with undone(put_back):
        for i, move in moves:
            if i not in before:
                before[i] = slots[i].shard.detach().clone()
            slots[i].shard.data.add_(move)
        yield


def _is_scalar(key: str, value: Tensor) -> bool:
    return key in _SCALARS and value.numel() == 1


def copied(state: dict[str, Any], param: Tensor, dtype: torch.dtype) -> dict[str, Any]:
    """A copy of a parameter's state, in this dtype what numbers are of the parameter's shape, or of its rows or
    columns; codes and masks stay as they are, and all of bitsandbytes' state, which its steps know in its dtypes alone.
    """
    if "state1" in state:
        return {key: copy.deepcopy(local(value)) for key, value in state.items()}

    def widened(key: str, value: Any) -> Any:
        numbers = isinstance(value, Tensor) and value.is_floating_point() and not _is_scalar(key, value)
        if numbers and (value.dim() or value.shape == param.shape):
            return value.to(dtype, copy=True)
        return copy.deepcopy(value)

    return {key: widened(key, local(value)) for key, value in state.items()}
