"""Optimizers of other libraries that make the update of one of torch's, with options or state of another form:
bitsandbytes' and torchao's Adam and AdamW, whose moments have 8 bits or 4.

Whatever asks for an update asks a stand-in: an optimizer of torch's class over the same parameters, whose options and
state are made of the other's when they are asked for, and left as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from .distributed import local

_BLOCK = 256  # elements that share a scale, of bitsandbytes' moments in 8 bits


def of(optimizer: Optimizer, for_function: bool = False) -> Optimizer:
    """What stands for an optimizer: itself, unless it is one of these. For a user's function bitsandbytes' stand for
    themselves, as it knows their state by their names."""
    found = (None if for_function else _of_bitsandbytes(optimizer)) or _of_torchao(optimizer)
    if found is None:
        return optimizer
    kind, moments = found
    make: Any = kind
    stand_in = make([torch.zeros(())])
    stand_in.param_groups = _Groups(optimizer, stand_in.param_groups[0])
    stand_in.state = _State(optimizer, moments)
    return stand_in


def _of_bitsandbytes(optimizer: Any) -> tuple[type[Optimizer], Callable] | None:
    if _library(optimizer) != "bitsandbytes" or getattr(optimizer, "optimizer_name", None) != "adam":
        return None
    plain = {"max_unorm": 0.0, "skip_zeros": False, "percentile_clipping": 100, "block_wise": True}
    if any(getattr(optimizer.args, name, value) != value for name, value in plain.items()):
        return None
    said = optimizer.mng  # of single parameters, by all of the process
    for options in (*said.pid2config.values(), *(options for _, _, options in said.module_weight_config_triple)):
        if options.keys() - {"optim_bits"}:
            return None
    return AdamW, _of_eight_bits  # its Adam too takes the weight decay off the weights


def _of_eight_bits(state: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {"step": state["step"]}
    for i, name in (1, "exp_avg"), (2, "exp_avg_sq"):
        moment = local(state[f"state{i}"])
        if moment.dtype == torch.uint8:
            from bitsandbytes.functional import dequantize_blockwise  # pyright: ignore[reportMissingImports]

            code, scales = state[f"qmap{i}"], state[f"absmax{i}"]
            moment = dequantize_blockwise(moment, absmax=scales, code=code, blocksize=_BLOCK)
        found[name] = moment
    return found


def _of_torchao(optimizer: Any) -> tuple[type[Optimizer], Callable] | None:
    if _library(optimizer) != "torchao" or not hasattr(optimizer, "is_adamw"):
        return None
    return AdamW if optimizer.is_adamw else Adam, _of_subclasses


def _of_subclasses(state: Mapping[str, Any]) -> dict[str, Any]:
    return {name: x.dequantize() if hasattr(x := local(value), "codes") else x for name, value in state.items()}


def _library(optimizer: Optimizer) -> str:
    return type(optimizer).__module__.partition(".")[0]


class _Groups(Sequence):
    """An optimizer's groups, with all options that one of torch's class has."""

    def __init__(self, optimizer: Optimizer, plain: Mapping[str, Any]) -> None:
        self._optimizer, self._plain = optimizer, plain

    def __len__(self) -> int:
        return len(self._optimizer.param_groups)

    def __getitem__(self, index: Any) -> Any:
        return {**self._plain, **self._optimizer.param_groups[index]}


class _State(Mapping):
    """An optimizer's state, as one of torch's class has it."""

    def __init__(self, optimizer: Optimizer, moments: Callable[[Mapping[str, Any]], dict[str, Any]]) -> None:
        self._optimizer, self._moments = optimizer, moments

    def __len__(self) -> int:
        return len(self._optimizer.state)

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self._optimizer.state)

    def __getitem__(self, param: Tensor) -> dict[str, Any]:
        if param not in self._optimizer.state:  # which would make it
            raise KeyError(param)
        held = self._optimizer.state[param]
        if not held:
            return {}
        moments = self._moments(held)
        step = moments["step"]
        return {**moments, "step": step if isinstance(step, Tensor) else torch.tensor(float(step), device="cpu")}
