"""Layers whose parameters `parallelize_module` has spread over processes, scored by the parts that each of them holds.

A process computes its part of such a layer as if that were the layer: with its part of the weight and of the direction,
and of the input or the output. Its dots are then a part of every sample's, and the processes' parts add up. Where all
of them compute the same, each has its share of it: one over how many they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .affine import AffineRule
from .distributed import of_part
from .errors import InRunError
from .layers import Conv1dRule, EmbeddingRule, LayerNormRule, LinearRule
from .restoring import replaced
from .tap import as_it_is, eagerly


class _Way(NamedTuple):
    """How a layer's tensors lie on the mesh."""

    x: Any  # placement of the input
    x_grad: Any  # of its gradient
    y: Any  # of the output
    whole_grad: Any = None  # of the gradients of parameters that every process holds whole
    share: float = 1.0  # of the dots, where they are the same in every process
    bias_share: float = 1.0  # of the bias, where the processes' outputs add up


def prepare(tap: Any, size: int) -> None:
    """Have a module with parameters on the mesh scored in parts; any other is the same in all of its `size` processes.

    Raises:
        InRunError: it is none of which that is known.
    """
    held = [owner._parameters[name] for owner, name in tap.owned]
    placements = [p.placements for p in held if hasattr(p, "placements")]
    if not placements:
        tap.share = 1 / size
        return
    norm = issubclass(tap.rule, LayerNormRule) or (issubclass(tap.rule, AffineRule) and tap.form.axis == -1)
    whole = norm and all(p.is_replicate() for (p,) in placements)
    known = issubclass(tap.rule, LinearRule | EmbeddingRule) or whole
    got = type(tap.module).__name__
    if known and len(placements) == len(tap.owned):
        rows = issubclass(tap.rule, EmbeddingRule) and placements[0][0].is_shard(0)
        if rows and tap.module.padding_idx is not None:
            got += f" with padding_idx={tap.module.padding_idx}, of which each process holds some rows"
        elif rows and _part(count := tap.module.num_embeddings, size) * (size - 1) >= count:
            got += f" of {count} rows, of which some of {size} processes hold none"
        else:
            tap.in_parts = scored
            return
    raise InRunError(
        f"{tap}: expected a linear layer, an embedding or a norm, all of it on the tensor-parallel mesh, got {got}. "
        f"Exclude its parameters ({', '.join(tap.parameters)}), or leave it out of the plan of parallelize_module"
    )


def scored(layer: Any, x: Any) -> Any:
    """The output of a layer on the mesh, a `DTensor` as its input, in whatever way the tracker asks for."""
    from torch.distributed.tensor import DTensor

    tap = layer._inrun
    eagerly(_require_no_graph, tap, torch.compiler.is_compiling())
    if not isinstance(x, DTensor):
        raise InRunError(f"{tap}: expected an input on the tensor-parallel mesh, a DTensor, got {type(x).__name__}")
    mesh, way = x.device_mesh, _way(layer, x)
    tap.share, tap.bias_share = way.share, way.bias_share
    of_sequence = way.x.is_shard() and way.x == way.y
    if of_sequence and tap.layout is not None:
        raise InRunError(f"{tap}: expected whole rows, to score tokens or documents; got {way.x} of {tuple(x.shape)}")
    tap.whole_rows = partial(_gathered, mesh, way.x, x.shape[way.x.dim]) if of_sequence else as_it_is
    here = _Come.apply(x.redistribute(placements=[way.x]).to_local(grad_placements=[way.x_grad]))
    with replaced(_parts(layer, way)):
        if issubclass(tap.rule, EmbeddingRule) and way.y.is_partial():
            tap.whole_ids = here
            here = here - _part(tap.module.num_embeddings, mesh.size()) * mesh.get_local_rank()
            others = (here < 0) | (here >= len(layer._parameters["weight"]))
            y = layer.scored_here(here.masked_fill(others, 0)).masked_fill(others.unsqueeze(-1), 0.0)
        else:
            y = layer.scored_here(here)
    y, shape = _Come.apply(y), list(y.shape)
    if way.y.is_shard():
        shape[way.y.dim] = x.shape[way.y.dim] if way.x.is_shard() else _outputs(layer)
    return of_part(y, mesh, [way.y], shape)


def _require_no_graph(tap: Any, is_compiling: bool) -> None:
    """Raise `InRunError` where the step is captured; called out of the graph, where some versions would go on."""
    if is_compiling:
        raise InRunError(f"{tap}: expected tensor parallelism without torch.compile, got a graph being captured")


def _part(count: int, size: int) -> int:
    """How many rows the first process holds, as torch.chunk cuts them; the last may hold fewer."""
    return -(-count // size)


def _gathered(mesh: Any, place: Any, size: int, x: Tensor) -> Tensor:
    return of_part(x, mesh, [place], [*x.shape[: place.dim], size, *x.shape[place.dim + 1 :]]).full_tensor()


def _way(layer: Any, x: Any) -> _Way:
    from torch.distributed.tensor import Partial, Replicate, Shard

    (split,) = next(p for p in layer._parameters.values() if p is not None).placements
    (spread,), size = x.placements, x.device_mesh.size()
    if split.is_replicate():
        if spread.is_shard() and 0 < spread.dim < x.dim() - layer.feature_dims():  # of a sequence
            return _Way(spread, spread, spread, Partial())
        return _Way(Replicate(), Replicate(), Replicate(), Replicate(), share=1 / size)
    if split.dim == _output_dim(layer):
        return _Way(Replicate(), Partial(), Shard(x.dim() - layer.feature_dims()))
    inputs = Replicate() if isinstance(layer, EmbeddingRule) else Shard(x.dim() - 1)
    return _Way(inputs, inputs, Partial(), Replicate(), bias_share=1 / size)


def _output_dim(layer: Any) -> int:
    """The dimension of its weight that the output has."""
    return 1 if isinstance(layer, Conv1dRule | EmbeddingRule) else 0


def _outputs(layer: Any) -> int:
    return layer._parameters["weight"].shape[_output_dim(layer)]


def _parts(layer: Any, way: _Way) -> Iterator[tuple[Any, str, Tensor]]:
    """What this process holds of the layer's parameters, as `replaced` takes it."""
    for name, p in list(layer._parameters.items()):
        if not hasattr(p, "placements"):
            continue
        (split,) = p.placements
        part = p.to_local(grad_placements=[split if split.is_shard() else way.whole_grad])
        yield layer, name, _Share.apply(part, way.bias_share) if name == "bias" and way.bias_share != 1 else part


class _Come(torch.autograd.Function):
    """A tensor and its gradient, once they have come from other processes: kernels do not wait for that, as operators
    of torch do."""

    @staticmethod
    def forward(ctx, x):
        x = _come(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return _come(grad)


def _come(x: Any) -> Any:
    return x.trigger_wait() if hasattr(x, "trigger_wait") else x


class _Share(torch.autograd.Function):
    """A process's share of a bias, all of whose gradient it has."""

    @staticmethod
    def forward(ctx, bias, share):
        return bias * share

    @staticmethod
    def backward(ctx, grad):
        return grad, None
