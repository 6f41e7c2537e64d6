"""What a tracked module and its tracker share."""

from __future__ import annotations

from collections.abc import Callable
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


def eagerly(function: Callable, *args: Any) -> Any:
    """Call a function that a compiled model must leave its graph for."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)(*args)
    return function(*args)
