"""What is put back after a block: random numbers, modes, what takes gradients, parameters, buffers, autocast."""

from __future__ import annotations

import random
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Set
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def random_state() -> tuple[Any, ...]:
    """What a later forward needs to draw the same random numbers: torch's, Python's and numpy's."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.get_rng_state(), gpus, random.getstate(), np.random.get_state()


def set_random_state(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])
    random.setstate(state[2])
    np.random.set_state(state[3])


def drew_since(state: tuple[Any, ...]) -> bool:
    """Whether random numbers of torch's were drawn since that was the `random_state`."""
    return not all(map(torch.equal, *([cpu, *gpus] for cpu, gpus, *_ in (state, random_state()))))


def torch_random_kept() -> AbstractContextManager:
    """The block's random numbers, of torch's, are drawn once more after it. Torch warns where several GPUs are not
    named, and to ask one that nothing uses would start it."""
    if not torch.cuda.is_available():
        return torch.random.fork_rng()
    return torch.random.fork_rng(range(torch.cuda.device_count()) if torch.cuda.is_initialized() else [])


def random_kept() -> AbstractContextManager:
    """The block's random numbers, of torch's, Python's and numpy's, are drawn once more after it."""
    if torch.compiler.is_compiling():
        return torch_random_kept()
    state = random_state()
    return undone(lambda: set_random_state(state))


def modes_of(module: Any) -> list[tuple[Any, bool]]:
    """A module and those inside it, and whether each is in training mode."""
    return [(m, m.training) for m in module.modules()]


def in_modes(modes: Iterable[tuple[Any, bool]]) -> AbstractContextManager[None]:
    """Each module in the given mode for the block."""
    return setting("training", modes)


@contextmanager
def in_eval_mode(module: Any) -> Iterator[None]:
    """A module in eval mode for the block, and each of those inside it as it was afterwards."""
    with in_modes(modes_of(module)):
        module.eval()
        yield


def requiring(params: Iterable[tuple[Tensor, bool]]) -> AbstractContextManager[None]:
    """Each parameter takes a gradient in the block, or none, as it is said."""
    return setting("requires_grad", params)


@contextmanager
def setting(attribute: str, values: Iterable[tuple[Any, Any]]) -> Iterator[None]:
    """Each object has the given value of an attribute in the block."""
    values = list(values)
    before = [(one, getattr(one, attribute)) for one, _ in values]

    def assign(wanted: list[tuple[Any, Any]]) -> None:
        for one, value in wanted:
            if getattr(one, attribute) is not value:
                setattr(one, attribute, value)

    with undone(lambda: assign(before)):
        assign(values)
        yield


@contextmanager
def replaced(places: Iterable[tuple[Any, str, Tensor | None]]) -> Iterator[None]:
    """Other tensors in the place of parameters or buffers, by owner and name, for the block."""
    before = []

    def put_back() -> None:
        for held, name, tensor in reversed(before):
            held[name] = tensor

    with undone(put_back):
        for owner, name, tensor in places:
            held = owner._parameters if name in owner._parameters else owner._buffers
            before.append((held, name, held.get(name)))
            held[name] = tensor
        yield


@contextmanager
def undone(put_back: Callable[[], None]) -> Iterator[None]:
    """Called when the block ends, however it does, and once more where it is interrupted then, as by Ctrl-C."""
    try:
        yield
    finally:
        try:
            put_back()
        except BaseException:
            put_back()
            raise


def buffers_kept(module: nn.Module) -> AbstractContextManager:
    """Buffers that the block writes, or puts others in the place of, stand again after it."""
    return undone(buffers_of(module))


def buffers_of(module: nn.Module) -> Callable[[], None]:
    """What puts a module's buffers back, as they are now."""
    holders = [(m._buffers, dict(m._buffers)) for m in module.modules() if m._buffers]
    copies = [(b, b.clone()) for b in module.buffers()]

    def put_back() -> None:
        if not torch.compiler.is_compiling():
            for buffers, held in holders:
                buffers.update(held)
        with torch.no_grad():
            for buffer, saved in copies:  # past the count of changes: a graph may hold the buffer
                (buffer if torch.compiler.is_compiling() else buffer.data).copy_(saved)

    return put_back


_CONTAINERS = (list, deque, dict, OrderedDict, defaultdict, Counter, set)
_OWN = frozenset(vars(nn.Module())) | {"_inrun", "_siblings"}  # of every module, and of those that are tracked


def attributes_of(module: nn.Module, tensors: bool = True, apart: Set[str] = _OWN) -> Callable[[], None]:
    """What puts back what a module and those inside it hold beside parameters and buffers, as it is now: a count of its
    calls, say, what stands in its lists, queues, dicts and sets, and what its generators of random numbers draw next.

    Args:
        tensors: whether attributes that are tensors are put back too, and held until then; and those that are new go.
        apart: names of attributes that are left alone.
    """
    if torch.compiler.is_compiling():
        return lambda: None
    before = [
        (m, {k: v for k, v in vars(m).items() if k not in apart and (tensors or not isinstance(v, Tensor))})
        for m in module.modules()
    ]
    values = [x for _, found in before for x in found.values()]
    contents = [(x, x.copy()) for x in values if type(x) in _CONTAINERS]
    drawn = [redraw for x in values if (redraw := _state_of(x))]

    def put_back() -> None:
        for m, found in before:
            if tensors:
                for name in vars(m).keys() - apart - found.keys():
                    del vars(m)[name]
            vars(m).update(found)
        for x, copied in contents:
            x.clear()
            (x.update if isinstance(x, (dict, set)) else x.extend)(copied)
        for redraw in drawn:
            redraw()

    return put_back


def _state_of(generator: Any) -> Callable[[], Any] | None:
    """What makes a generator of random numbers draw again what it will draw from now on; None of anything else."""
    if isinstance(generator, torch.Generator | np.random.RandomState):
        return partial(generator.set_state, generator.get_state())
    if isinstance(generator, np.random.Generator):
        return partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)
    if isinstance(generator, random.Random) and not isinstance(generator, random.SystemRandom):  # which has no state
        return partial(generator.setstate, generator.getstate())
    return None


def state_of(module: nn.Module, tensors: bool = True) -> Callable[[], None]:
    """What puts back all that a module and those inside it hold beside parameters: `buffers_of` and `attributes_of`."""
    put_back = buffers_of(module), attributes_of(module, tensors)

    def both() -> None:
        for each in put_back:
            each()

    return both


def state_kept(module: nn.Module) -> AbstractContextManager:
    """What the block does to all that is not a parameter of a module, and of those inside it, is undone."""
    return undone(state_of(module))


def buffers_copied(module: nn.Module) -> AbstractContextManager[None]:
    """Copies stand in the places of buffers for the block; a graph may hold them after it, as they are then."""
    copies = {id(b): b.clone() for b in module.buffers()}
    held = ((m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None)
    return replaced([(m, name, copies[id(b)]) for m, name, b in held])


@contextmanager
def as_it_was(module: nn.Module) -> Iterator[None]:
    """What the block does to a module's attributes, modes and buffers is undone, and random numbers are drawn again."""
    values = [x for m in module.modules() for x in vars(m).values()]
    tensors = [(x, x._version, x.detach().clone()) for x in values if isinstance(x, Tensor) and not x.is_inference()]
    try:
        with random_kept(), buffers_kept(module), undone(attributes_of(module, apart=frozenset())):
            yield
    finally:
        for x, version, kept in tensors:
            if x._version != version:
                x.data.copy_(kept)


@contextmanager
def tried(module: nn.Module) -> Iterator[None]:
    """For the block a module may be run on numbers of ours, to find out what it does; then it is as it was."""
    with as_it_was(module), torch.no_grad(), no_autocast():
        yield


@contextmanager
def no_autocast() -> Iterator[None]:
    """Autocast is off in the block, or the function it decorates: that of a loop around the step block would round."""
    with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
        yield
