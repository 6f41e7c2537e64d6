"""What a tracked module and its tracker share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

SUFFIX = "_direction"  # a parameter's direction stands beside it under this name


class Tap:
    """What a tracked module reads in its forward: the probe of the current batch; with neither, it runs plainly."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.probe: Tensor | None = None
        self.keep: Callable | None = None  # in a deferred step, runs the layer and keeps what will score it
        self.forward_mode: list[tuple[nn.Module, str]] = []
        self.affine: Any = None  # of a module that scales and shifts, how
        self.flat = False  # whether the module's rows are the tokens of [B, T], flattened


def together(dots: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of a batch's dots over its layers and devices, float32; None where there are none."""
    known = [d for d in dots if d is not None]
    return sum((d.to(known[0].device) for d in known[1:]), known[0]).float() if known else None


def random_state() -> tuple[Tensor, list[Tensor]]:
    """What a later forward needs to draw the same random numbers."""
    return torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []


def set_random_state(state: tuple[Tensor, list[Tensor]]) -> None:
    torch.set_rng_state(state[0])
    if state[1]:
        torch.cuda.set_rng_state_all(state[1])


def eagerly(function: Callable, *args: Any) -> Any:
    """Call a function that a compiled model must leave its graph for."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)(*args)
    return function(*args)
