"""Scores of modules that no rule knows, by forward-mode AD: `dot_b = <dL/dout_b, JVP_D(out)_b>`.

The parameters' directions are carried through the module's own forward as tangents, so it is exact for every module
whose output rows belong to samples, at the price of a second forward through it.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.graph import get_gradient_edge
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from . import probing
from .errors import InRunError, few
from .restoring import (
    buffers_copied,
    random_kept,
    random_state,
    set_random_state,
    setting,
    state_kept,
    state_of,
    undone,
)
from .tap import Layout, Tap, along

_outside: Any = torch.compiler.disable  # of graphs; as a function of a function, which pyright takes for a decorator


def forward_mode(module: Any, args: tuple, kwargs: dict, uncaptured: bool = False) -> Any:
    """One ordinary forward that carries tangents beside it, then the dots attached to each output."""
    # A graph is neither entered nor left while tensors carry tangents. So all of this function is captured in one, or,
    # where it runs eagerly or takes several passes, nothing of it.
    tap = module._inrun
    probe = tap.shared_probe()
    if not uncaptured and (probe.dim() > 1 or tap.apart or not torch.compiler.is_compiling()):
        return _outside(forward_mode)(module, args, kwargs, True)
    layout = tap.layout or Layout(probe.shape[0])
    if forward_ad._current_level >= 0:
        raise InRunError(
            f"{tap}: expected a call outside of forward-mode AD (torch.func.jvp, jacfwd, dual_level), by which it is "
            "scored itself; got one within. Take what is detached there in torch.no_grad() or tracker.paused(), and "
            f"what the loss is made of from a call outside; or exclude its parameters ({few(tap.parameters, 20)})"
        )
    single = probe.dim() == 1
    more = [] if single else [tangents_only(module, args, kwargs, m) for m in range(1, probe.shape[1])]
    if uncaptured:
        pairs, spec = _with_tangents(module, args, kwargs, None if single else 0)
    else:  # here, since a frame with this block is captured whole, or runs once more and comes by above
        with dual(tap, None) as scale:
            # A graph may have ended before this block: what is called here would then be captured without its tangents.
            if captured := torch.compiler.is_compiling():
                leaves, spec = pytree.tree_flatten(_run(module, args, kwargs))
                pairs = [_unpacked(x, scale) for x in leaves]
        if not captured:
            return _outside(forward_mode)(module, args, kwargs, True)
    # Of several outputs one whose rows are not the samples' may be there unused.
    errors = _errors(module, pairs, layout) if uncaptured else {}
    outputs = []
    for i, (primal, tangent) in enumerate(pairs):
        if tangent is None or i in errors:
            outputs.append(primal if tangent is None else _without_gradient(primal, errors[i]))
            continue
        tangents = [by_sample(module, i, t, layout) for t in (tangent, *(t[i] for t in more))]
        scored = probing.attach(
            by_sample(module, i, primal, layout),
            tangents[0] if single else torch.stack(tangents), probe, layout.segments,
        )  # fmt: skip
        if uncaptured and scored.grad_fn is not None:  # whose tangents have no graph
            scored.grad_fn.register_prehook(functools.partial(_require_no_losses, tap, get_gradient_edge(probe).node))
        outputs.append(scored.flatten(0, 1) if tap.flat else scored.movedim(0, sample_axis(module, i)))
    return pytree.tree_unflatten(outputs, spec)


def _errors(module: Any, pairs: list[tuple[Any, Any]], layout: Layout) -> dict[int, InRunError]:
    """Why outputs cannot be scored, by their number; raised where none can, or a recurrent layer's."""
    errors, scored = {}, [i for i, (_, tangent) in enumerate(pairs) if tangent is not None]
    for i in scored:
        try:
            by_sample(module, i, pairs[i][0], layout)
        except InRunError as error:
            errors[i] = error.with_traceback(None)  # whose frames would hold the outputs that hold it
    if errors and (len(errors) == len(scored) or isinstance(module, nn.RNNBase)):
        raise next(iter(errors.values()))
    return errors


def _without_gradient(out: Tensor, error: InRunError) -> Tensor:
    """An output to which no gradient may come."""

    def refuse(_: Tensor) -> None:
        raise error

    if out.requires_grad:
        out = probing.Alias.apply(out)  # it may be used inside of the module as well
        out.register_hook(refuse)
    return out


def _with_tangents(
    module: Any, args: tuple, kwargs: dict, m: int | None
) -> tuple[list[tuple[Any, Tensor | None]], Any]:
    """The outputs, each with its tangent along direction m (None: the only one), and how they were nested."""
    tap, mode = module._inrun, (module.training, torch.is_grad_enabled())
    if mode in tap.without and not tap.apart:
        try:
            return _carrying(module, args, kwargs, m, _stop)
        except _Met:
            raise InRunError(
                f"{tap}: expected checkpoints inside of it from the first step on, or none; track the model after "
                "they are switched on"
            ) from None
    if not tap.apart:
        random, put_back, versions = random_state(), state_of(module), versions_of(args, kwargs)
        uncount = tap.rows.counts()
        autograd: Any = torch._C._autograd  # pyright: ignore[reportAttributeAccessIssue]
        # An outer checkpoint counts what is saved: a run that stops is none of it.
        trial = autograd._top_saved_tensors_default_hooks(True) is not None
        try:
            with torch.no_grad() if trial else contextlib.nullcontext():
                found = _carrying(module, args, kwargs, m, _stop)
            tap.without.add(mode)
            if not trial:
                return found
        except _Met:
            tap.apart = True
        _require_unchanged(module, args, kwargs, versions)
        set_random_state(random)
        put_back()
        uncount()
        if not tap.apart:
            return _carrying(module, args, kwargs, m, _stop)
    # What a checkpoint computes again in the backward would carry no tangents, and save other tensors than it had.
    tangents = tangents_only(module, args, kwargs, m)
    leaves, spec = pytree.tree_flatten(module.plain(*args, **kwargs))
    return list(zip(leaves, tangents, strict=True)), spec


def _carrying(module: Any, args: tuple, kwargs: dict, m: int | None, met: Callable[[], None]) -> Any:
    """As `_with_tangents`, by one forward that carries them; `met` is called at each checkpoint inside. Compiled
    modules run eagerly, as their graphs take no tangents."""
    with checkpoints(met), torch.compiler.set_stance("force_eager"), dual(module._inrun, m) as scale:
        leaves, spec = pytree.tree_flatten(_run(module, args, kwargs))
        return [_unpacked(x, scale) for x in leaves], spec


class _Met(BaseException):
    """A forward-mode pass came to a checkpoint."""


def _stop() -> None:
    raise _Met


@contextlib.contextmanager
def checkpoints(met: Callable[[], None]) -> Iterator[None]:
    """What is checkpointed within is computed without a checkpoint, after a call of `met`."""
    module: Any = torch.utils.checkpoint
    generators = [name for name in vars(module) if name.startswith("_checkpoint_without_reentrant_generator")]

    class Plain:
        @staticmethod
        def apply(function: Callable, _: bool, *args: Any) -> Any:
            met()
            return function(*args)

    def plain(*_: Any, **__: Any) -> Iterator[None]:
        met()
        yield

    with contextlib.ExitStack() as stack:
        stack.enter_context(setting("CheckpointFunction", [(module, Plain)]))
        for name in generators:  # torch 2.14 has two of them
            stack.enter_context(setting(name, [(module, plain)]))
        yield


def by_sample(module: Any, leaf: int, out: Tensor, layout: Layout) -> Tensor:
    """A module's output with its sample axis in front, `[B, ...]`, and where tokens count, `[B, T, ...]`.

    Raises:
        InRunError: its rows are not the samples, or its tokens not theirs.
    """
    tap, axis = module._inrun, sample_axis(module, leaf)
    packed = isinstance(module, nn.RNNBase) and leaf == 0 and out.dim() < 3  # or of one sequence, without a batch
    if tap.flat:
        out = split_samples(tap, out, layout.rows)
    elif packed or out.dim() <= axis or (out.shape[axis] != layout.rows and layout.segments is None):
        expected = "[B, ...]" if axis == 0 else "[N, B, ...]"
        instead = "Name an enclosing module whose outputs are [B, ...] with track(..., through={parameter: module})"
        if out.dim() > 0 and not tap.name:
            instead = "Let the model return a row of it for each sample, as by expand()"
        elif not tap.name:
            instead = "Compute the loss outside of the model, from its [B, ...] outputs"
            params = zip(tap.parameters, tap.owned, strict=True)
            if numbers := [full for full, (owner, local) in params if owner._parameters[local].numel() == 1]:
                instead += f" ({few(numbers)}: multiply these by it inside of the model, or exclude it)"
        if packed:
            instead = f"Pad sequences in place of packing them. {instead}"
        raise InRunError(
            f"{tap} ({module._inrun_class.__name__}): expected every output to be {expected} with "
            f"B = {layout.rows}, got {tuple(out.shape)}; it holds parameters with no rule of their own "
            f"({few(tap.parameters, 20)}), which are scored by their module's output. {instead}, or "
            "exclude them, or those of them that this output is made of"
        )
    else:
        out = out.movedim(axis, 0)
    if layout.segments is not None:
        layout.require(tap, out)
    return out


def split_samples(tap: Tap, x: Tensor, batch: int) -> Tensor:
    """`[B * T, ...]` as `[B, T, ...]`."""
    if x.dim() == 0 or x.shape[0] % batch:
        raise InRunError(
            f"{tap}: expected the flattened tokens of {batch} samples, of equal length, got {tuple(x.shape)}"
        )
    return x.unflatten(0, (batch, -1))


def sample_axis(module: Any, leaf: int | None) -> int:
    """Of an output, counted in the order of `pytree`, or of the input (None). A recurrent layer's states are
    `[layers, B, H]`; torch's transformers without `batch_first` have layers of `[T, B, W]`."""
    if isinstance(module, nn.RNNBase):
        return 0 if leaf == 0 and module.batch_first else 1
    if isinstance(module, nn.MultiheadAttention):
        return 0 if leaf != 0 or module.batch_first else 1
    tap = getattr(module, "_inrun", None)
    return int(tap is not None and tap.tokens_first)


def _run(module: Any, args: tuple, kwargs: dict) -> Any:
    tap = module._inrun
    try:
        return module.plain(*args, **kwargs)
    except (NotImplementedError, RuntimeError) as error:
        if "forward AD" not in str(error) and "forward mode AD" not in str(error):
            raise
        raise InRunError(
            f"{tap}: holds parameters with no rule of their own and uses an operation without "
            f"forward-mode AD; exclude them ({few(tap.parameters, 20)}). Torch says: {str(error).splitlines()[0]}"
        ) from error


def tangents_only(module: Any, args: tuple, kwargs: dict, m: int | None) -> list[Any]:
    """The outputs' tangents along direction m (None: the only one), or None of those without, leaving random state and
    buffers as they were."""
    tap, versions = module._inrun, versions_of(args, kwargs)

    def run() -> list[Any]:
        # With a graph, which takes memory, only where what is under `no_grad` inside must be told from the rest.
        grad_mode = torch.set_grad_enabled(tap.sets_grad_mode)
        # Modules inside that forward-mode AD scores too run plainly: theirs is a pass of their own.
        others = {getattr(each, "_inrun", tap) for each in module.modules()} - {tap}
        muted = setting("probe", [(other, None) for other in others if other.forward_mode])
        with grad_mode, random_kept(), state_kept(module), muted, undone(tap.rows.counts()):
            pairs, _ = _carrying(module, args, kwargs, m, lambda: None)
            return [tangent for _, tangent in pairs]

    told, uncaptured = tap.sets_grad_mode, _outside(run)
    tangents: list[Any] = []
    try:
        tangents = uncaptured()
    except RuntimeError:  # of a derivative taken inside, for which there is no graph yet
        if told or not tap.sets_grad_mode:
            raise
    if tap.sets_grad_mode and not told:  # which this run has found
        tangents = uncaptured()
    _require_unchanged(module, args, kwargs, versions)
    return tangents


def refuse_losses_of(grad: Tensor, tap: Tap, nodes: Sequence[Any]) -> Any:
    """Have a backward raise `InRunError` that comes through this gradient of a layer's output (made by
    `create_graph=True`) to `nodes`: it brings weights a part that no gradient of the output shows."""

    def came(_: Tensor) -> None:
        if any(runs(node) for node in nodes):
            raise InRunError(
                f"{tap}: expected a loss of the model's outputs, got one of their gradients too (a gradient penalty, "
                "create_graph=True, or tangents), which goes with method 'first' without pairwise= only, and with "
                "layers that have a rule of their own; or detach them, or let a module return the gradients, named by "
                "track(..., through={parameter: module})"
            )

    return grad.register_hook(came)


def _require_no_losses(tap: Tap, node: Any, grads: Sequence[Tensor | None]) -> None:
    if grads[0] is not None and grads[0].requires_grad:
        refuse_losses_of(grads[0], tap, [node])


def runs(node: Any) -> bool:
    """Whether the backward that is going on comes to a node of a parameter, to add to its gradient."""
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # torch.autograd.grad with the parameter among its inputs
        return False


def versions_of(*inputs: Any) -> list[int]:
    """How often each input has been changed in place."""
    return [x._version for x in pytree.tree_leaves(inputs) if isinstance(x, Tensor) and not x.is_inference()]


def _require_unchanged(module: Any, args: tuple, kwargs: dict, versions: list[int]) -> None:
    if versions_of(args, kwargs) != versions:
        raise InRunError(
            f"{module._inrun} ({module._inrun_class.__name__}): expected a module that leaves its input as it "
            "is, since it is run on it more than once to score "
            f"{few(module._inrun.parameters, 20)}; got one that changes it in place. Let it work on a copy, "
            "exclude them, or take method 'first' with one target and no checkpoints inside, which runs it once"
        )


def _unpacked(x: Any, scale: Tensor | None) -> tuple[Any, Tensor | None]:
    """An output and its tangent, the latter without its graph and its scale."""
    primal, tangent = forward_ad.unpack_dual(x) if isinstance(x, Tensor) else (x, None)
    if tangent is None:
        return primal, None
    return primal, tangent.detach() if scale is None else tangent.detach().float() * scale


@contextlib.contextmanager
def dual(tap: Tap, target: int | None) -> Iterator[Tensor | None]:
    """The parameters carry their directions as tangents; yields what those were divided by, if anything."""
    # Fused attention, recurrent layers and grouped products have no forward derivative; written out they have one.
    experts = setting("_experts_implementation", [(config, "eager") for config in tap.configs])
    recurrent = any(isinstance(owner, nn.RNNBase) for owner, _ in tap.owned)
    layers = _no_fused_recurrence() if recurrent else contextlib.nullcontext()
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH), experts, layers, _as_backward(tap):
        held: list[Any] = [(owner, local, owner._parameters[local]) for owner, local in tap.owned]
        plain = [(owner, local, param) for owner, local, param in held if param.requires_grad]
        tangents: list[Any] = [along(owner, local) for owner, local, _ in plain]
        tangents = tangents if target is None else [t[target] for t in tangents]
        scale = None
        device, dtype = tangents[0].device.type, plain[0][2].dtype
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else dtype
        if dtype == torch.float16:  # which has no range for a direction
            scale = torch.stack([t.abs().max() for t in tangents]).max().clamp(min=torch.finfo(torch.float32).tiny)
            tangents = [(t / scale).to(p.dtype) for t, (_, _, p) in zip(tangents, plain, strict=True)]
        try:
            for (owner, local, param), tangent in zip(plain, tangents, strict=True):
                owner._parameters[local] = moving = forward_ad.make_dual(param, tangent)  # pyright: ignore
                if moving.requires_grad and not torch.compiler.is_compiling():
                    # Its gradient passes a node on the way, past which autograd does not see who else has its memory.
                    moving.register_hook(torch.clone)
                _refresh(owner)
            probing.write_out(True)
            with remade(tap):
                yield scale
        finally:
            probing.write_out(False)
            for owner, local, param in plain:
                owner._parameters[local] = param
                _refresh(owner)


@contextlib.contextmanager
def remade(tap: Tap) -> Iterator[None]:
    """Weights that hooks made of the parameters, before a forward, are made of these as they now are."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in tap.made]
    ours = [weight for _, _, weight in before]
    try:
        for i, (owner, name, make) in enumerate(tap.made):
            with buffers_copied(owner):
                ours[i] = make()
            setattr(owner, name, ours[i])
        yield
    finally:
        for (owner, name, weight), put in zip(before, ours, strict=True):
            if getattr(owner, name, None) is put:  # a hook inside has made it anew otherwise, for what comes after
                setattr(owner, name, weight)


@contextlib.contextmanager
def _as_backward(tap: Tap) -> Iterator[None]:
    if torch.compiler.is_compiling():  # then the mode is not free: each operation is traced through it
        with _AsBackward(None) if tap.norms else contextlib.nullcontext():
            yield
        return
    with forward_ad._set_fwd_grad_enabled(True), _AsBackward(tap):  # and as it was after, whatever ran inside
        yield


class _AsBackward(TorchFunctionMode):
    """Tangents go where gradients do: torch's own also pass `torch.no_grad()`. (Under one outside of the module they go
    no further than another; then `tap.sets_grad_mode` says that there is one. In a graph nothing does.)

    And torch's norms scale and shift by operations of their own. By theirs, an output in half precision has a float32
    tangent, which the next product refuses; and where the scale carries none, a graph cannot be captured."""

    def __init__(self, tap: Tap | None) -> None:
        super().__init__()
        self.tap = tap

    def __torch_function__(self, func, types, args=(), kwargs=None):
        args, kwargs, pair = list(args), dict(kwargs or {}), []
        if func is torch._C._set_grad_enabled and self.tap is not None:
            self.tap.sets_grad_mode = True
            torch._C._set_fwd_grad_enabled(*args)
        if func is torch.autograd.grad and self.tap is not None:  # of a graph that is to be there
            self.tap.sets_grad_mode = True
        if func is Tensor.unflatten:  # whose Python code a graph cannot capture
            func = torch.unflatten
        if func is WEIGHT_NORM:  # without a forward derivative
            return weight_norm(*args, **kwargs)
        if func in _RECURRENT and getattr(args[0], "is_cuda", False):
            return _recurrent(func, *args, **kwargs)
        if func is _EMBEDDING:  # whose forward derivative knows no padding
            return self._embedding(*args, **kwargs)
        if func is F.embedding_bag:  # without a forward derivative
            return _embedding_bag(*args, **kwargs)
        if func not in _NORMS:
            return func(*args, **kwargs)
        place, by_channel = _NORMS[func]
        for i, name in ((place, "weight"), (place + 1, "bias")):
            if i < len(args):
                pair.append(args[i])
                args[i] = None
            else:
                pair.append(kwargs.pop(name, None))
        if func is F.group_norm and args:  # whose forward derivative takes no transposed input
            args[0] = args[0].contiguous()
        narrow = func in (F.layer_norm, F.group_norm) and args and args[0].dtype is torch.float16
        if narrow and not torch.is_autocast_enabled(args[0].device.type):  # whose forward derivative cubes 1 / std
            normed = func(args[0].float(), *args[1:], **kwargs).half()
        else:
            normed = func(*args, **kwargs)
        scale, shift = (p.view(-1, *[1] * (normed.dim() - 2)) if by_channel and p is not None else p for p in pair)
        y = normed if scale is None else normed * scale
        return (y if shift is None else y + shift).to(normed.dtype)

    @staticmethod
    def _embedding(input: Tensor, weight: Tensor, padding_idx: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        y = _EMBEDDING(input, weight, padding_idx, *args, **kwargs)
        if padding_idx is None:
            return y
        pads = (input == padding_idx % len(weight)).unsqueeze(-1)
        return torch.where(pads, y.detach(), y)


def weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    """`torch._weight_norm`, written out."""
    over = [i for i in range(v.dim()) if dim == -1 or i != dim % v.dim()]
    norm = torch.linalg.vector_norm(v, dim=over, keepdim=True) if over else v.abs()  # of no dimension: of all
    return v * (g / norm)


def _embedding_bag(
    ids: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """`F.embedding_bag`, written out, with the memory of all rows at once."""
    counts = torch.ones_like(ids, dtype=torch.bool)
    if offsets is not None:  # bags one behind the other, as rows of the longest one's length
        ends = offsets if include_last_offset else F.pad(offsets, (0, 1), value=len(ids))
        at = ends[:-1, None] + torch.arange(int(ends.diff().max()) if len(ends) > 1 else 0, device=ids.device)
        counts, at = at < ends[1:, None], at.clamp(max=len(ids) - 1)
        ids, per_sample_weights = ids[at], None if per_sample_weights is None else per_sample_weights[at]
    if padding_idx is not None:
        counts = counts & (ids != padding_idx % len(weight))
    counts = counts.unsqueeze(-1)
    rows = _EMBEDDING(ids, weight).masked_fill(~counts, -torch.inf if mode == "max" else 0.0)
    if mode == "max" and ids.shape[1]:  # else every bag is of nothing, as below
        return torch.where(counts.any(1), rows.max(1).values, 0.0)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.unsqueeze(-1).masked_fill(~counts, 0.0)
    total = rows.sum(1).to(weight.dtype)  # which a GPU's autocast widens
    return total if mode == "sum" else total / counts.sum(1).clamp(min=1)


def _recurrent(func: Any, x: Tensor, hx: Any, params: Any, *args: Any) -> Any:
    """LSTMs, GRUs and their cells, written out: a GPU's have no forward derivative, without cuDNN either."""
    from torch._decomp import decompositions as written  # pyright: ignore[reportPrivateImportUsage]

    if torch.is_autocast_enabled("cuda"):  # as it has them
        to = torch.get_autocast_dtype("cuda")
        x, hx, params, args = pytree.tree_map(
            lambda y: y.to(to) if isinstance(y, Tensor) and y.dtype in _ROUNDED else y, (x, hx, params, args)
        )
    whole = {torch.lstm: (written.lstm_impl, written.lstm_data_impl),
             torch.gru: (written.gru_impl, written.gru_impl_data)}  # fmt: skip
    if func in whole:  # of packed sequences weights come later
        return whole[func][isinstance(args[0], (list, tuple))](x, hx, params, *args)
    biases = args[1:] or (None, None)
    inner = F.linear(x, params, biases[0])
    if func is torch.gru_cell:
        (r, z, n), (hr, hz, hn) = inner.chunk(3, -1), F.linear(hx, args[0], biases[1]).chunk(3, -1)
        new = (n + (r + hr).sigmoid() * hn).tanh()
        return new + (z + hz).sigmoid() * (hx - new)
    enters, stays, cell, leaves = (inner + F.linear(hx[0], args[0], biases[1])).chunk(4, -1)
    kept = stays.sigmoid() * hx[1] + enters.sigmoid() * cell.tanh()
    return leaves.sigmoid() * kept.tanh(), kept


_ROUNDED = {torch.float32, torch.float16, torch.bfloat16}  # by autocast
_RECURRENT = {torch.lstm, torch.gru, torch.lstm_cell, torch.gru_cell}
WEIGHT_NORM = torch._weight_norm  # pyright: ignore[reportPrivateImportUsage]
_EMBEDDING = F.embedding
# Where the weight stands among the arguments, the bias behind it, and whether they belong to dimension 1.
_NORMS = {F.layer_norm: (2, False), F.group_norm: (2, True), F.batch_norm: (3, True), F.instance_norm: (3, True)}


def drawing_alike(tap: Tap) -> contextlib.AbstractContextManager[None]:
    """A module that may run again draws torch's numbers: cuDNN has a recurrent layer's dropout from a state of its own,
    which no seed sets back."""
    if torch.compiler.is_compiling():
        return contextlib.nullcontext()
    layers = [owner for owner, _ in tap.owned if isinstance(owner, nn.RNNBase)]
    drops = any(layer.dropout and layer.training for layer in layers)
    return torch.backends.cudnn.flags(enabled=False) if drops else contextlib.nullcontext()


@contextlib.contextmanager
def _no_fused_recurrence() -> Iterator[None]:
    tf32: Any = None  # as it is: to set it makes torch warn where there is no Intel GPU
    with torch.backends.cudnn.flags(enabled=False), torch.backends.mkldnn.flags(enabled=False, allow_tf32=tf32):
        yield


def _refresh(owner: Any) -> None:
    if isinstance(owner, nn.RNNBase):  # which reads its parameters from a list of its own
        owner._flat_weights = [getattr(owner, name, None) for name in owner._flat_weights_names]
