"""More than one process: what a tracker exchanges so that values are those of one process with the whole batch.

Each process scores its own samples. The validation gradient is the mean over the processes, as DDP and FSDP take the
mean of training's gradients. Replicated parameters (DDP) have whole gradients in every process; sharded ones (FSDP2's
`fully_shard`) have a shard of the mean in each, and all work on them is done shard by shard. Processes of tensor
parallelism have the same samples, and each has a part of their layers and dots (`tensor_parallel.py`).

The sums and means here are collectives: every process must come to them. With one process they do nothing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .errors import InRunError, few
from .restoring import replaced, setting, undone


def local(tensor: Any) -> Any:
    """This process's shard of a sharded tensor; anything else as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def laid_alike(tensor: Any, param: Any) -> Any:
    """A parameter's gradient, or what an optimizer made of it, as the parameter lies on its mesh: tensor parallelism
    may leave it whole there, or a sum to be made."""
    if hasattr(tensor, "placements") and tensor.shape == param.shape and tensor.placements != param.placements:
        return tensor.redistribute(placements=param.placements)
    return tensor


def rank() -> int:
    """This process's number, by which it writes the ledger; torchrun tells it before there is a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else int(os.environ.get("RANK", "0"))


def writers() -> int:
    """How many processes write the ledger."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return int(os.environ.get("WORLD_SIZE", rank() + 1))


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DDP's wrapper."""
    return model.module if isinstance(model, DistributedDataParallel) else model


class Ranks:
    """The processes that train a model together.

    Args:
        model: DDP's wrapper tells its process group; with any other it is the default group, until `bind`.
        alike: whether each of them must run the whole validation set, as scores on each of its samples need.

    Attributes:
        sharded: whether each process holds a shard of every parameter.
        parts: the mesh of tensor parallelism, whose processes have the same samples, and parts of the layers.
    """

    def __init__(self, model: nn.Module, alike: bool = False) -> None:
        self._model, self._alike = model, alike
        self._groups: list[Any] = [model.process_group if isinstance(model, DistributedDataParallel) else None]
        self.parts: Any = None
        self._in_parts: set[str] = set()  # names of parameters on that mesh
        self.sharded = False
        self.are_aside = False  # whether gradients are, so that those that come are no step's

    @property
    def size(self) -> int:
        if not (dist.is_available() and dist.is_initialized()):
            return 1
        return math.prod(dist.get_world_size(group) for group in self._groups)

    def begin(self, params: Iterable[tuple[str, Any]]) -> None:
        """See which parameters are spread over processes before they are tracked.

        Raises:
            InRunError: in any other way than by `parallelize_module`, over one mesh of one dimension.
        """
        for name, param in params:
            _require_no_flat(name, param)
            if hasattr(param, "placements"):
                mesh = param.device_mesh
                if mesh.ndim > 1 or self.parts not in (None, mesh) or self.fully_sharded():
                    raise InRunError(
                        f"{name}: expected a whole parameter, or one that parallelize_module has spread over one mesh "
                        f"of one dimension, got one with placements {param.placements} on {mesh}; call track before "
                        "fully_shard, and bind(optimizer) after it"
                    )
                self.parts = mesh
                self._in_parts.add(name)
        if self.parts is not None:
            self.sharded, self._groups = True, []

    def bind(self, slots: Sequence[Any]) -> None:
        """See how the tracked parameters (`name`, `param`, `sibling`) are spread over the processes.

        Raises:
            InRunError: in any other way than by `begin`'s, DDP or `fully_shard`, or not all in the same way, or inside
                of a module that forward-mode AD scores.
        """
        for slot in slots:
            if (param := slot.owner._parameters.get(slot.local)) is None:
                raise InRunError(
                    f"{slot.name}: expected the parameter where it was tracked, got none there: it was taken away, or "
                    "went into a parametrization (track after that) or into FullyShardedDataParallel (use fully_shard)"
                )
            _require_no_flat(slot.name, param)
        sharded = [s for s in slots if hasattr(s.param, "placements") and s.name not in self._in_parts]
        if self.fully_sharded() and (sharded or self._in_parts):
            self._groups = self._data_groups(slots[0])
            for slot in slots:
                self._require_fully_sharded(slot)
            self._require_none_inside({tap for slot in slots for tap in slot.taps if tap.forward_mode})
            self.sharded = True
        elif sharded:
            raise InRunError(
                f"{sharded[0].name}: expected a whole parameter, or one sharded by fully_shard, got the placements "
                f"{sharded[0].param.placements}. Call parallelize_module before track"
            )
        elif self.parts is not None and self.parts.size() < dist.get_world_size():
            raise InRunError(
                f"parallelize_module: expected a mesh of all {dist.get_world_size()} processes, or fully_shard over "
                f"the others, got {self.parts} alone"
            )
        for slot in slots:
            slot.share = self.share(slot.param)

    def fully_sharded(self) -> list[Any]:
        """The modules that `fully_shard` was called with."""
        return [module for module in self._model.modules() if hasattr(module, "set_requires_gradient_sync")]

    def _data_groups(self, slot: Any) -> list[Any]:
        """Of each dimension of a mesh along which `fully_shard` has spread a parameter, the processes."""
        mesh = getattr(slot.param, "device_mesh", None)
        return [] if mesh is None else [mesh.get_group(i) for i in range(mesh.ndim - (slot.name in self._in_parts))]

    def _require_fully_sharded(self, slot: Any) -> None:
        def members(groups: Sequence[Any]) -> list[list[int]]:
            return [dist.get_process_group_ranks(group) for group in groups]

        param, sibling, groups = slot.param, slot.sibling, self._data_groups(slot)
        placements: Any = getattr(param, "placements", ())
        split = [not p.is_replicate() for p in placements[: len(groups)]]
        if members(groups) != members(self._groups) or split != [False] * (len(groups) - 1) + [True]:
            raise InRunError(
                f"{slot.name}: expected a parameter sharded by fully_shard along the last axis of its mesh and by "
                f"nothing else (parallelize_module comes before track), got "
                f"{f'placements {placements}' if placements else 'a whole one'}"
            )
        several = sibling.dim() > param.dim()  # targets, along dimension 1
        there = [*placements[: len(groups)], *beside(placements[len(groups) :], several)]
        along_0 = not several or placements[len(groups) - 1].dim == 0
        if list(getattr(sibling, "placements", ())) != there or not along_0:
            raise InRunError(
                f"{slot.name}: expected its direction, {tuple(sibling.shape)}, to be sharded alike, {placements}"
                f"{' and along dimension 0, as of several targets' if several else ''}; got "
                f"{getattr(sibling, 'placements', 'a whole one')}. A shard_placement_fn must see to it"
            )

    def _require_none_inside(self, taps: Iterable[Any]) -> None:
        """Raise `InRunError` where `fully_shard` would gather weights within a forward that carries tangents."""
        sharded = set(self.fully_sharded())
        for tap in taps:
            module = self._model.get_submodule(tap.name)
            if inside := [name for name, m in module.named_modules() if name and m in sharded]:
                raise InRunError(
                    f"{tap}: expected no fully_shard inside of a module that is scored by forward-mode AD, got "
                    f"{few(inside)}. Call fully_shard on that module as a whole, exclude what has no rule of its own "
                    f"({few(tap.parameters, 20)}), or hold it in a module whose output is [B, ...]"
                )

    @property
    def divisor(self) -> float:
        """What the sum of the processes' gradients is divided by: how many they are, unless the user has set another
        number for the shards (`set_gradient_divide_factor`, as torchtitan does).

        Raises:
            InRunError: modules divide by different numbers.
        """
        if not self.sharded:
            return self.size
        states = [module._get_fsdp_state() for module in self.fully_sharded()]
        groups = [g for s in states for g in getattr(s, "_fsdp_param_groups", None) or [s._fsdp_param_group] if g]
        groups = [g for g in groups if any(p.sharded_param.requires_grad for p in g.fsdp_params)]  # others reduce none
        found = {self.size if g.gradient_divide_factor is None else float(g.gradient_divide_factor) for g in groups}
        if len(found) > 1:
            raise InRunError(
                "set_gradient_divide_factor: expected one number for all modules that fully_shard was called with, got "
                f"{few(sorted(map(str, found)))}; call it on each of them"
            )
        return found.pop() if found else self.size

    def settle(self) -> None:
        """Put the shards in place, where a forward or the user's settings left gathered parameters."""
        if self.sharded:
            for module in self.fully_sharded():
                module.reshard()

    def require_all(self) -> None:
        """Raise `InRunError` within `join()` of the DDP wrapper that `track` was given: some processes have stopped."""
        if isinstance(self._model, DistributedDataParallel) and self._model._join_config.enable:
            raise InRunError(
                "step: expected every process to take part until the last step, got model.join(); where no samples "
                "are left, use step([]) and multiply the loss by 0"
            )

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes."""
        return _reduce(tensor, self._groups) if self.size > 1 else tensor

    def over_parts(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of tensor parallelism, each of which has a part of the same samples' dots."""
        return tensor if self.parts is None else _reduce(tensor, [self.parts.get_group()])

    def over_shards(self, tensor: Tensor) -> Tensor:
        """The sum over the shards of a parameter of what belongs to each shard; of one that several processes of tensor
        parallelism hold alike, each gives its `share`."""
        return self.over_parts(_reduce(tensor, self._groups[-1:])) if self.sharded else tensor

    @property
    def writes(self) -> bool:
        """Whether this process is the one that writes its samples' values, of those that have them."""
        return self.parts is None or self.parts.get_local_rank() == 0

    @property
    def alone(self) -> bool:
        """Whether no other process has a part in the model, or samples of the step."""
        return self.size == 1 and self.parts is None

    @property
    def holders(self) -> int:
        """How many processes have the same samples, and parts of their layers."""
        return 1 if self.parts is None else self.parts.size()

    def share(self, param: Any) -> float:
        """One over how many processes of tensor parallelism hold the same of a parameter."""
        placements: Any = getattr(param, "placements", ())
        apart = len(placements) > len(self._groups) and placements[-1].is_shard()
        return 1.0 if apart else 1 / self.holders

    def total(self, numbers: Iterable[Tensor], device: torch.device) -> float:
        """The sum of scalar tensors, over the shards too; a GPU is waited for once."""
        found = [x.double().to(device) for x in numbers]
        sum_here = torch.stack(found).sum() if found else torch.zeros((), dtype=torch.float64, device=device)
        return float(self.over_shards(sum_here))

    def added(self, grad: Tensor) -> Tensor:
        """What the processes' gradients add up to, given this one's as the backward left it."""
        return grad * self.divisor if self.sharded else self.sum(grad)

    def mean(self, tensor: Tensor) -> Tensor:
        """The mean over the processes."""
        return self.sum(tensor) / self.size if self.size > 1 else tensor

    def norm(self, grads: Sequence[Tensor]) -> Tensor:
        """The norm of gradients, all their shards together."""
        norm = nn.utils.get_total_norm(grads)
        return self.over_shards(norm.square()).sqrt() if self.sharded and grads else norm

    def total_norm(self, tensors: Iterable[tuple[Tensor, float]]) -> float:
        """The float64 norm of tensors, given with their parameters' `share`, all their shards together; a GPU is waited
        for once."""
        squares = [x.square().sum() * share for x, share in tensors]  # one at a time: they may be made on the way
        return math.sqrt(self.total(squares, squares[0].device if squares else torch.device("cpu")))

    @torch.no_grad()
    def mean_gradients(self, grads: Sequence[Tensor | None], like: Sequence[Tensor]) -> list[Tensor | None]:
        """The mean over the processes of each parameter's gradient; None where no process has one.

        Args:
            grads: this process's own, or DDP's mean, which the mean of equals leaves as it is. Shards are means.
            like: the parameters.

        Returns:
            The gradients, or this process's shards of them; several replicated ones in memory of their own, since
            DDP may use that of `grads` for the next.

        Raises:
            InRunError: some processes have gradients and others have none, or theirs must be alike and are not.
        """
        if self.size == 1 or self.sharded:
            times = self.divisor / self.size  # 1 where shards hold the mean
            found = [local(laid_alike(g, p)) for g, p in zip(grads, like, strict=True)]
            return [g if g is None or times == 1 else g * times for g in found]
        count = self.sum(torch.tensor([any(g is not None for g in grads), *(g is not None for g in grads)],
                                      dtype=torch.int32, device=like[0].device)).tolist()  # fmt: skip
        if 0 < count[0] < self.size:
            raise InRunError(f"validation: expected a backward pass in each of {self.size} processes, got {count[0]}")
        found = [None if n == 0 else _copied(torch.zeros_like(p) if g is None else g)
                 for n, p, g in zip(count[1:], like, grads, strict=True)]  # fmt: skip
        known = [g for g in found if g is not None]
        for work in [dist.all_reduce(g, group=self._groups[0], async_op=True) for g in known]:
            if work is not None:
                work.wait()
        for g in known:
            g.div_(self.size)
        if self._alike:
            off = [m if g is None else m - g for m, g in zip(found, grads, strict=True) if m is not None]
            gap = self.sum(nn.utils.get_total_norm(off))
            if bool(gap > 1e-2 * nn.utils.get_total_norm(known)):
                raise InRunError("pairwise: expected every process to run all of the validation samples, got gradients "
                                 "that differ between them")  # fmt: skip
        return found

    @contextmanager
    def aside(self, params: Iterable[nn.Parameter]) -> Iterator[None]:
        """Take the parameters' gradients away for the block; afterwards those that stood stand again."""
        params = list(params)
        # DDP writes its next gradients where the last ones stand (gradient_as_bucket_view).
        replicated = self.size > 1 and not self.sharded
        copies = [(p.grad, p.grad.clone()) for p in params if replicated and p.grad is not None]

        def put_back() -> None:
            for grad, copy in copies:
                grad.copy_(copy)

        with undone(put_back), setting("grad", ((p, None) for p in params)), setting("are_aside", [(self, True)]):
            yield

    @contextmanager
    def unseen(self, params: Iterable[nn.Parameter]) -> Iterator[None]:
        """Backward passes of the block past DDP's wrapper leave no mark in it.

        DDP counts every parameter whose gradient stands when it comes as used, as between `no_sync()` and the next
        synchronised backward; with `find_unused_parameters=True` it would then wait in vain for the gradient of one
        that the step itself does not use. So gradients that come here wait elsewhere until the block ends.
        """
        if self.size == 1 or self.sharded:
            yield
            return
        apart: dict[Tensor, Tensor] = {}  # parameter -> its gradients so far
        wrapped = False  # whether the block has called a wrapper, which reduces the gradients that stand
        forward = DistributedDataParallel._pre_forward

        def called(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> Any:
            nonlocal wrapped
            wrapped = True
            return forward(self, *args, **kwargs)

        def take(param: Tensor) -> None:
            if not wrapped and param.grad is not None:
                apart[param] = apart[param] + param.grad if param in apart else param.grad
                param.grad = None

        handles = [p.register_post_accumulate_grad_hook(take) for p in params if p.requires_grad]
        try:
            with setting("_pre_forward", [(DistributedDataParallel, called)]):
                yield
        finally:
            for handle in handles:
                handle.remove()
            for param, grad in apart.items():
                param.grad = grad if param.grad is None else param.grad + grad


@contextmanager
def gathered(places: Iterable[tuple[Any, str]]) -> Iterator[None]:
    """Sharded parameters, by owner (a tracked module) and name, are whole ones for the block, or of those on the mesh
    of tensor parallelism this process's part; every process comes to it."""
    found: list[Any] = [(owner, name, owner._parameters.get(name)) for owner, name in places]
    shards = [(owner, name, p) for owner, name, p in found if hasattr(p, "placements")]
    with replaced((o, n, _gathered(o, p).detach().requires_grad_(p.requires_grad)) for o, n, p in shards):
        yield


def _gathered(owner: Any, param: Any) -> Tensor:
    if owner._inrun.in_parts is None:
        return param.full_tensor()
    if (mesh := _data_mesh(param)) is None:
        return param.to_local()
    whole, place, parts = list(param.shape), param.placements[-1], param.device_mesh
    if place.is_shard():
        rank = parts.get_local_rank(parts.ndim - 1)
        whole[place.dim] = place.local_shard_size_and_offset(whole[place.dim], parts.size(parts.ndim - 1), rank)[0]
    return of_part(param.to_local(), mesh, _data_placements(param), whole).full_tensor()


def _data_mesh(param: Any) -> Any:
    """Where a parameter on the mesh of tensor parallelism is sharded by `fully_shard` too, the mesh of that."""
    mesh = param.device_mesh
    return None if mesh.ndim == 1 else mesh[mesh.mesh_dim_names[:-1]]


def _data_placements(param: Any) -> list[Any]:
    """How its part is sharded there."""
    from torch.distributed.tensor import Replicate, Shard

    return [Replicate() if p.is_replicate() else Shard(p.dim) for p in param.placements[:-1]]


def shard_of(whole: Tensor, slot: Any) -> Tensor:
    """Of a tensor of the shape that a parameter has when it is `gathered`, what belongs to this process's shard."""
    param = slot.param
    if not hasattr(param, "placements"):
        return whole
    from torch.distributed.tensor import DTensor, Replicate

    mesh, placements = param.device_mesh, param.placements
    if slot.taps[0].in_parts is not None:
        if (mesh := _data_mesh(param)) is None:
            return whole
        placements = _data_placements(param)
    return DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim).redistribute(mesh, placements).to_local()


def laid_as(param: Any, part: Tensor, shape: Sequence[int]) -> Tensor:
    """This process's part of a parameter's direction as one of the whole shape, on the parameter's mesh."""
    if not hasattr(param, "placements"):
        return part
    return of_part(part, param.device_mesh, beside(param.placements, len(shape) > param.dim()), shape)


def of_part(part: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int]) -> Any:
    """The `DTensor` of this shape, in order, of which this process holds a part; parts may be of unequal sizes."""
    from torch.distributed.tensor import DTensor

    like = torch.empty(shape, device="meta")
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=like.shape, stride=like.stride())


def beside(placements: Sequence[Any], several: bool) -> list[Any]:
    """How the direction of a parameter that lies so on the mesh of tensor parallelism lies there: with several targets
    along dimension 1."""
    return [type(p)(p.dim + 1) if several and p.is_shard() and p.dim > 0 else p for p in placements]


def _require_no_flat(name: str, param: Any) -> None:
    """Raise `InRunError` where a parameter has gone into one of FullyShardedDataParallel's, or is one."""
    if getattr(param, "_fsdp_flattened", False) or hasattr(param, "_is_flat_param"):
        raise InRunError(
            f"{name}: expected a parameter of its own, got a part of one of FullyShardedDataParallel's; use fully_shard"
        )


def _copied(tensor: Tensor) -> Tensor:
    """A copy in order: NCCL takes no other (of a weight that lies transposed the gradient does too)."""
    return tensor.clone() if tensor.is_sparse else tensor.clone(memory_format=torch.contiguous_format)


def _reduce(tensor: Tensor, groups: Sequence[Any]) -> Tensor:
    tensor = _copied(tensor)
    for group in groups:
        dist.all_reduce(tensor, group=group)
    return tensor
