"""What a deferred step keeps until its direction is known: each layer's input, and the gradient of its output.

Kept tensors stay on their device, or go to (pinned) host memory; their bytes are counted and bounded. Layers with a
rule need nothing else. A module scored by forward-mode AD is run again, with the random numbers, autocast state,
weights, buffers and training mode it had. For one score per validation sample, the layers of the validation losses are
kept too (`pairwise.py`).
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.utils import _pytree as pytree

from . import forward_mode, probing
from .distributed import gathered
from .errors import InRunError
from .factors import Factors
from .restoring import (
    attributes_of,
    buffers_copied,
    buffers_kept,
    in_modes,
    modes_of,
    random_kept,
    random_state,
    replaced,
    requiring,
    set_random_state,
    undone,
)
from .tap import SUFFIX, Layout, Tap, size_of


class _Buffer(NamedTuple):
    """A module's buffer at a moment."""

    owner: Any
    name: str
    itself: Tensor
    versions: list[int]
    copy: Tensor

    def changed(self) -> bool:
        """Whether it has been written since, or another one stands in its place."""
        now = self.owner._buffers.get(self.name)
        return now is not self.itself or forward_mode.versions_of(now) != self.versions


@dataclass
class Kept:
    module: Any
    batch: int
    x: Any  # the layer's input, or (args, kwargs)
    grads: dict[int, Tensor] = field(default_factory=dict)  # output leaf -> gradient
    random: Any = None  # of a module that runs once more to be scored; as is the next
    autocast: Any = None  # as `torch.autocast` takes it
    buffers: list[_Buffer] = field(default_factory=list)  # of it, as they were before its forward
    put_attributes_back: Any = None
    share: float = field(init=False)  # of its dots
    whole_rows: Callable = field(init=False)  # of its tensors
    modes: list[tuple[Any, bool]] = field(init=False)  # modules, and whether they were in training mode
    trained: list[tuple[Any, str, bool]] = field(init=False)  # owner and name of its parameters, and whether they were
    accumulators: list[Any] = field(init=False)  # nodes of the graph that add to the gradients of its parameters
    versions: list[int] = field(init=False)  # of the input

    def __post_init__(self) -> None:
        self.modes, tap = modes_of(self.module), self.module._inrun
        self.share, self.whole_rows = tap.share, tap.whole_rows
        held = [(owner, local, owner._parameters[local]) for owner, local in self.module._inrun.owned]
        self.trained = [(owner, local, p.requires_grad) for owner, local, p in held if p is not None]
        self.accumulators = [get_gradient_edge(p).node for *_, p in held if p is not None and p.requires_grad]
        self.versions = forward_mode.versions_of(self.x)

    @contextlib.contextmanager
    def as_it_ran(self) -> Iterator[None]:
        """The modules' modes, and which parameters train, are what they were in its forward."""
        trained = ((owner._parameters[local], trains) for owner, local, trains in self.trained)
        with in_modes(self.modes), requiring(trained):
            yield

    def require_unchanged(self) -> None:
        """Raise `InRunError` where something has written into the input since."""
        if forward_mode.versions_of(self.x) != self.versions:
            raise InRunError(
                f"{self.module._inrun}: expected its input to stay as it was until the step is scored, "
                "got one that was changed in place. Let it be changed in a copy, take method 'first', or score its "
                "parameters by a module around it, track(..., through={parameter: module})"
            )


class Budget:
    """The bytes that a tracker's keepers hold together.

    Args:
        where: keeps "device", or "host" for pinned host memory.
        limit: bytes that may be kept; None for no limit.
    """

    def __init__(self, where: str, limit: int | None) -> None:
        self.where, self.limit, self.peak = where, limit, 0
        self.keepers: weakref.WeakSet[Keeper] = weakref.WeakSet()

    @property
    def bytes(self) -> int:
        return sum(keeper.bytes for keeper in self.keepers)

    def check(self) -> None:
        """Raise `InRunError` where there is more than the limit."""
        held = self.bytes
        self.peak = max(self.peak, held)
        if self.limit is not None and held > self.limit:
            raise InRunError(
                f"keep: the step's activations and output gradients exceed keep_bytes={self.limit:,} "
                f"({held:,} so far); allow more, use smaller batches, keep='host', or give recompute= to step() or "
                "batch(), which keeps a batch at a time where the update turns or was clipped, and else nothing"
            )


class Keeper:
    """Keeps the layers of a step's batches, and scores them.

    Args:
        taps: of the tracked modules.
        budget: where they are kept, and how many.
        weights_move: whether the weights will have changed before the scoring.
    """

    def __init__(self, taps: Sequence[Tap], budget: Budget, weights_move: bool) -> None:
        self.taps, self.budget, self.weights_move = taps, budget, weights_move
        self._hooks: list[Any] = []  # on the nodes of the batches' graphs
        self.reset()
        budget.keepers.add(self)

    def reset(self) -> None:
        """Forget what was kept."""
        self.kept: list[Kept] = []
        self.bytes = 0
        self._counted: set[tuple] = set()
        self.layouts: list[Layout] = []  # of the step's batches
        self._ends: dict[int, list[int]] = {}
        self.held: Keeper | None = None  # of the batch's last rows, where those are validation samples
        self._weights: dict[tuple[Any, str], Tensor] = {}  # by the module that holds them, and their name there
        self._buffers: dict[tuple[Any, str], _Buffer] = {}  # the last ones, so
        for hook in self._hooks:  # a loss that the user holds on to holds the nodes of its graph
            hook.remove()
        self._hooks.clear()

    def begin_batch(self, layout: Layout, held: Keeper | None = None) -> None:
        """The layers run from now on see a batch that lies so, and are kept.

        With `held`, another keeper's samples follow in the same tensors: they are kept there, and the weights they
        meet take no gradient from them.
        """
        self.layouts.append(layout)
        self.held = held
        for tap in self.taps:
            tap.keep = self._run_module if tap.forward_mode else self._run_layer
            tap.layout = None if layout.segments is None else layout

    def pause(self) -> None:
        """The layers run from now on are plain."""
        for tap in self.taps:
            tap.keep = tap.layout = None

    def skip_batch(self, layout: Layout) -> None:
        """Count a batch whose layers are not kept from here: it will be computed again, or `held` as another's rows."""
        self.layouts.append(layout)
        self.pause()

    def _run_layer(self, module: Any, plain: Callable, x: Tensor) -> Tensor:
        layout, held = self.layouts[-1], self.held
        if held is None:
            x = _placed(module, x, layout)
            y = plain(x)
            if y.requires_grad and y._is_view():
                y = probing.Alias.apply(y)
            self._await(y, module, x, slice(None))
            return y
        ours, theirs = slice(layout.rows), slice(layout.rows, None)
        x = _placed(module, x, replace(layout, rows=layout.rows + held.layouts[0].rows))
        y = torch.cat([plain(x[ours]), _without_gradients(module, plain, x[theirs])])
        self._await(y, module, x, ours)
        held._await(y, module, x, theirs)
        return y

    def _await(self, y: Tensor, module: Any, x: Tensor, rows: slice) -> None:
        """Keep these rows of a layer's input, and of the gradient of its output when it comes."""
        if y.requires_grad:
            kept = Kept(module, len(self.layouts) - 1, _unaliased(x)[rows].detach())
            self._hooks.append(_when_it_comes(y, lambda grad: self._arrived(kept, 0, grad, rows)))
            self._refuse_losses_of_tangents(kept, y)

    def _refuse_losses_of_tangents(self, kept: Kept, y: Tensor) -> None:
        """As of gradients: a tangent that a forward-mode pass of the user's gives an output is made of weights too."""
        tangent = forward_ad.unpack_dual(y).tangent if forward_ad._current_level >= 0 else None
        if tangent is not None and tangent.requires_grad:
            self._hooks.append(forward_mode.refuse_losses_of(tangent, kept.module._inrun, kept.accumulators))

    def _run_module(self, module: Any, plain: Callable, inputs: tuple[tuple, dict]) -> Any:
        if cache := [v for v in pytree.tree_leaves(inputs) if hasattr(v, "get_seq_length")]:
            raise InRunError(
                f"{module._inrun}: expected inputs that it leaves as they are, since it is run on them "
                f"once more to be scored; got a {type(cache[0]).__name__}, which grows. Call the model with "
                "use_cache=False, or take method 'first'"
            )
        args, kwargs = pytree.tree_map(lambda v: _unaliased(v).detach() if isinstance(v, Tensor) else v, inputs)
        kind = next(module.parameters()).device.type
        autocast = (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        kept = Kept(module, len(self.layouts) - 1, (args, kwargs), {}, random_state(), autocast)
        if self.weights_move:
            self._copy_weights(module)
        held = ((m, name, b) for m in module.modules() for name, b in m._buffers.items() if b is not None)
        kept.buffers = [self._copied(*each) for each in held]
        kept.put_attributes_back = attributes_of(module, tensors=False)
        leaves, spec = pytree.tree_flatten(plain(*inputs[0], **inputs[1]))
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and leaf.requires_grad and torch.is_grad_enabled():
                # An alias: where one output is made from another, each has the gradient that came from outside.
                leaves[i] = leaf.view_as(leaf) if _is_parameter(leaf) else probing.Alias.apply(leaf)
                hook = _when_it_comes(leaves[i], lambda grad, i=i: self._arrived(kept, i, grad))
                self._hooks.append(hook)
                self._refuse_losses_of_tangents(kept, leaves[i])
        return pytree.tree_unflatten(leaves, spec)

    def _copy_weights(self, module: Any) -> None:
        """Keep those of a module, and of those inside it, that are not kept yet."""
        copies: dict[int, Tensor] = {}
        held = ((owner, local, p) for owner in module.modules() for local, p in owner._parameters.items())
        for owner, local, p in held:
            if p is None or local.endswith(SUFFIX) or (owner, local) in self._weights:
                continue
            # A frozen one of another class that holds more than numbers, as bitsandbytes', stays as it is.
            if not (p.requires_grad or type(p) is torch.nn.Parameter or not vars(p)):
                continue
            if id(p) not in copies:
                # A parameter: a module that takes its own away for a while (PEFT's, of fused experts) would give
                # another tensor back as a buffer.
                copies[id(p)] = torch.nn.Parameter(p.detach().clone(), requires_grad=False)
                self._count(p)
            self._weights[owner, local] = copies[id(p)]

    def _copied(self, owner: Any, name: str, buffer: Tensor) -> _Buffer:
        known = self._buffers.get((owner, name))
        if known is None or known.changed():
            known = self._buffers[owner, name] = _Buffer(
                owner, name, buffer, forward_mode.versions_of(buffer), buffer.clone()
            )
            self._count(buffer)
        return known

    def _arrived(self, kept: Kept, leaf: int, grad: Tensor, rows: slice | None = None) -> None:
        if grad.requires_grad:
            self._hooks.append(forward_mode.refuse_losses_of(grad, kept.module._inrun, kept.accumulators))
        if not any(forward_mode.runs(node) for node in kept.accumulators):  # torch.autograd.grad leaves no gradients
            return
        # A copy: a parameter that is an output, or a term of one, may take this memory for its own gradient; and a
        # module of its own code, as Liger's norms, may write the gradient of its input there.
        grad = grad.clone() if rows is None or kept.module._inrun.form is not None else grad
        grad = grad if rows is None else grad[rows]
        if not kept.grads:
            if kept.module._inrun.forward_mode:  # of any other, autograd has looked at what it needs
                kept.require_unchanged()
            kept.x = pytree.tree_map(self._store, kept.x)
            kept.versions = forward_mode.versions_of(kept.x)
            self.kept.append(kept)
        if (before := kept.grads.get(leaf)) is not None:  # of an earlier backward through the same graph
            grad = grad + before.to(grad.device)
        # The engine may reuse a gradient's memory only when nobody else holds it, so a reference is enough.
        kept.grads[leaf] = self._store(grad.detach())

    def _store(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if self.budget.where == "device" or not x.is_cuda:
            same = (x.data_ptr(), x.shape, x.stride(), x.dtype)  # one input of several layers is one tensor
            if same not in self._counted:
                self._counted.add(same)
                self._count(x)
            return x
        self._count(x)
        host = torch.empty(x.shape, dtype=x.dtype, device="cpu", pin_memory=True)
        return host.copy_(x, non_blocking=True)

    def _count(self, x: Tensor) -> None:
        self.bytes += size_of([x])
        self.budget.check()

    def dots(self, many: int | None) -> list[dict[Tap, Tensor | None]]:
        """Of each batch, tap -> `[B]` or `[B, M]`: the dots along the directions as they stand."""
        found: list[dict[Tap, Tensor | None]] = [dict.fromkeys(self.taps) for _ in self.layouts]
        by_tap: dict[Tap, list[Kept]] = {}
        for kept in self.kept:
            by_tap.setdefault(kept.module._inrun, []).append(kept)
        for tap in self.taps:  # all of them: processes that kept nothing gather with the others
            names = ("", SUFFIX) if tap.form else (SUFFIX,)  # a module that scales and shifts runs once more
            with torch.no_grad(), gathered((owner, local + n) for owner, local in tap.owned for n in names):
                for kept in by_tap.get(tap, ()):
                    dots, before = self.dots_of(kept, many), found[kept.batch][tap]
                    found[kept.batch][tap] = dots if before is None else before + dots
        return found

    def dots_of(self, kept: Kept, many: int | None) -> Tensor:
        """`[B]` or `[B, M]`: what one run of a layer adds to its batch's dots."""
        dots = self._dots_of(kept, many)
        return dots if kept.share == 1.0 else dots * kept.share

    def _dots_of(self, kept: Kept, many: int | None) -> Tensor:
        kept.require_unchanged()
        module, device = kept.module, next(kept.module.parameters()).device
        if not module._inrun.forward_mode:
            segments = self.layouts[kept.batch].on(device).segments
            with kept.as_it_ran():
                return module.dots(moved(kept.x, device), moved(kept.grads[0], device), segments)
        args, kwargs = moved(kept.x, device)
        columns = []
        for m in [None] if many is None else range(many):
            with self._as_in_its_step(kept):
                tangents = forward_mode.tangents_only(module, args, kwargs, m)
            columns.append(self._contract(kept, tangents, device))
        return columns[0] if many is None else torch.stack(columns, 1)

    def factors(self, kept: Kept) -> dict[int, Factors] | None:
        """Of one run of a layer, by `id` of a parameter's direction, of what its gradient is made; None where the
        layer has to be asked for `sample_gradients`."""
        module = kept.module
        if module._inrun.forward_mode:
            return None
        kept.require_unchanged()
        device = next(module.parameters()).device
        with kept.as_it_ran():
            x, grad = (kept.whole_rows(moved(each, device)) for each in (kept.x, kept.grads[0]))
            found = module.gradient_factors(x, grad)
            if found is None:
                return None
            return {id(direction): factors for name, factors in found.items()
                    if (direction := module._siblings.get(name + SUFFIX)) is not None
                    and module._parameters[name].requires_grad}  # fmt: skip

    def sample_gradients(self, kept: Kept, samples: Iterable[int]) -> Iterator[dict[int, Tensor]]:
        """Of each sample, by `id` of a parameter's direction: the gradient that one run of a layer gave it.

        Samples are rows, or documents where the batch has those; single tokens are not told apart.
        """
        kept.require_unchanged()
        module, device = kept.module, next(kept.module.parameters()).device
        grads, ends = moved(kept.grads, device), self._document_ends(kept.batch)
        rows = {leaf: grad if ends is None else grad.flatten(0, 1) for leaf, grad in grads.items()}

        def of(x: Tensor, v: int) -> Tensor:
            return x[v : v + 1] if ends is None else x[ends[v] : ends[v + 1]].unsqueeze(0)

        if not module._inrun.forward_mode:
            with kept.as_it_ran():
                params = {n: p for n, p in module._parameters.items() if p is not None and p.requires_grad
                          and module._siblings.get(n + SUFFIX) is not None}  # fmt: skip
            names = [id(module._siblings[n + SUFFIX]) for n in params]
            x = moved(kept.x, device)
            x = x if ends is None else x.flatten(0, 1)
            dtype = next(iter(params.values())).dtype
            for v in samples:
                inputs = [p.detach().requires_grad_() for p in params.values()]  # a user's hooks are not theirs
                standing_in = replaced([(module, n, p) for n, p in zip(params, inputs, strict=True)])
                with standing_in, in_modes(kept.modes), buffers_kept(module), torch.enable_grad():
                    one_x = of(x, v)
                    y = module.plain(one_x.to(dtype) if one_x.is_floating_point() else one_x)
                    one = torch.autograd.grad(y, inputs, of(rows[0], v).to(y.dtype), materialize_grads=True)
                yield dict(zip(names, one, strict=True))
            return
        args, kwargs = moved(kept.x, device)
        places = [(owner, local) for owner, local, trained in kept.trained if trained]
        # A checkpoint would compute its part again in the backward, where all of this is as it is now.
        uncheckpointed = forward_mode.checkpoints(lambda: None)
        remade = forward_mode.remade(module._inrun)
        with self._as_in_its_step(kept), buffers_copied(module), uncheckpointed, torch.enable_grad(), remade:
            params = [get_gradient_edge(owner._parameters[local]) for owner, local in places]
            leaves = pytree.tree_leaves(module.plain(*args, **kwargs))
        grads = {leaf: grad for leaf, grad in grads.items() if leaves[leaf].requires_grad}  # by its own parameters
        for leaf in [*grads]:
            y = leaves[leaf]
            try:
                forward_mode.by_sample(module, leaf, y.detach(), self.layouts[kept.batch])
            except InRunError:
                ones = torch.ones_like(y)
                reached = torch.autograd.grad(y, params, ones, retain_graph=True, allow_unused=True)
                if any(g is not None for g in reached):
                    raise
                del grads[leaf]  # what no parameter that is scored is in
        names = [id(owner._siblings[local + SUFFIX]) for owner, local in places]
        ys = [leaves[leaf] for leaf in grads]
        for v in samples:
            only = [torch.zeros_like(grad, memory_format=torch.contiguous_format) for grad in grads.values()]
            for zeros, leaf in zip(only, grads, strict=True):
                of(zeros if ends is None else zeros.flatten(0, 1), v).copy_(of(rows[leaf], v))
            one = torch.autograd.grad(ys, params, only, retain_graph=True, allow_unused=True)
            yield {name: g for name, g in zip(names, one, strict=True) if g is not None}

    def _document_ends(self, batch: int) -> list[int] | None:
        """Offsets of a batch's documents into its tokens, read from the device once; None where rows are samples."""
        layout = self.layouts[batch]
        if layout.segments is None or layout.per_token:
            return None
        if batch not in self._ends:
            self._ends[batch] = layout.segments.tolist()
        return self._ends[batch]

    @contextlib.contextmanager
    def _as_in_its_step(self, kept: Kept) -> Iterator[None]:
        """Run a module with the random numbers, autocast state, weights, buffers and training mode of its step."""
        places = ((owner, name) for owner in kept.module.modules() for name in owner._parameters)
        weights = ((*place, self._weights[place]) for place in places if place in self._weights)
        buffers = ((b.owner, b.name, b.copy) for b in kept.buffers if b.changed())
        with (
            random_kept(),
            undone(attributes_of(kept.module)),
            torch.autocast(*kept.autocast),
            replaced([*weights, *buffers]),
            kept.as_it_ran(),
        ):
            set_random_state(kept.random)
            kept.put_attributes_back()
            yield

    def _contract(self, kept: Kept, tangents: list[Any], device: torch.device) -> Tensor:
        layout = self.layouts[kept.batch].on(device)
        total = torch.zeros(layout.count, device=device)
        for leaf, grad in kept.grads.items():
            if (tangent := tangents[leaf]) is None:
                continue
            both = moved(grad, device), tangent
            try:
                here, along = (forward_mode.by_sample(kept.module, leaf, x, layout) for x in both)
            except InRunError:
                if bool(tangent.any()):  # asked here alone, as a device would be waited for
                    raise
                continue
            total = total + probing.output_dots(here, along, layout.segments)
        return total


def _placed(module: Any, x: Tensor, layout: Layout) -> Tensor:
    try:
        return module.placed(x, layout)
    except ValueError as error:
        raise ValueError(f"{module._inrun}: {error}") from None


def _when_it_comes(y: Tensor, arrived: Callable[[Tensor], None]) -> Any:
    """Call with the gradient of `y` once its backward begins: as hooks of the tensor, also later ones, have left it."""
    node, place = y.grad_fn, y.output_nr
    assert node is not None
    return node.register_prehook(lambda grads: None if grads[place] is None else arrived(grads[place]))


def _unaliased(x: Tensor) -> Tensor:
    """A layer's input; of a parameter, or a view of one, a copy, since the update will change it."""
    return x.clone() if _is_parameter(x) else x


def _is_parameter(x: Tensor) -> bool:
    """Whether it is a parameter, or a view of one."""
    return isinstance(x if x._base is None else x._base, torch.nn.Parameter)


def moved(x: Any, device: torch.device) -> Any:
    """Tensors, of any structure, on the device; a GPU takes them from pinned memory in its turn, unwaited for."""
    queued = device.type == "cuda"
    return pytree.tree_map(lambda v: v.to(device, non_blocking=queued) if isinstance(v, Tensor) else v, x)


def _without_gradients(module: Any, plain: Callable, x: Tensor) -> Tensor:
    """The layer's output, from which its own parameters get no gradient."""
    with replaced([(module, n, None if p is None else p.detach()) for n, p in module._parameters.items()]):
        return plain(x)
