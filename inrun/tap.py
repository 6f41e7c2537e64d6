"""What a tracked module and its tracker share."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from . import distributed, probing
from .errors import InRunError

SUFFIX = "_inrun_direction"  # a parameter's direction stands beside it under this name, which no model has


class Tap:
    """What a tracked module reads in its forward.

    With a `probe` the module scores its samples in its backward; with `keep` it is stored, and scored later; with
    neither it runs as if it were not tracked.
    """

    def __init__(
        self, name: str, module: Any, rule: Any, under: type[nn.Module] | None = None, form: Any = None
    ) -> None:
        # What the module is.
        self.name, self.module, self.rule = name, module, rule
        self.under = under  # the class of layer beneath the module's own that the rule stands for
        self.owned: list[tuple[nn.Module, str]] = []  # the parameters that it scores: owner and local name
        self.parameters: list[str] = []  # their full names
        self.forward_mode = False  # whether by forward-mode AD
        self.form = form  # of a module known by running it, what it computes
        self.names: tuple[str, ...] = ()  # of the module's attributes
        self.norms = False  # whether any of torch's norms is inside
        self.apart = False  # whether its tangents have a pass of their own, as checkpoints and others inside need
        self.without: set[Any] = set()  # modes in which it was found to have no checkpoints inside
        self.made: list[Any] = []  # weights that hooks make of parameters it scores: owner, name, and what makes one
        self.sets_grad_mode = False  # whether it does so inside, as by torch.no_grad(), or differentiates
        self.configs: list[Any] = []  # of Hugging Face's experts inside
        self.by_row = True  # whether it computes each row of a batch by itself, and holds it at dimension 0
        self.routed = False  # whether its rows are always the tokens of [B, T], flattened
        self.tokens_first = False  # whether it is given [T, B, ...]
        self.heads_first: bool | None = None  # whether it was given [B, H, T, ...], where that counts
        # Of tensor parallelism.
        self.in_parts: Callable | None = None  # computes the module where its parameters are on the mesh
        self.share = 1.0  # of its dots, where other processes compute the same
        self.bias_share = 1.0  # of its bias, and of that one's direction
        self.whole_rows: Callable = as_it_is  # of an input or output gradient, of which it may have some tokens' alone
        self.whole_ids: Tensor | None = None  # of an embedding of which this process has some rows
        # This batch.
        self.probe: Tensor | None = None
        self.layout: Layout | None = None  # where values belong to documents or tokens
        self.keep: Callable | None = None
        self.behind = False  # whether one that lies differently still waits for its backward
        self.flat = False  # whether its rows are the tokens of [B, T], flattened, here
        self.met = False  # whether a forward has come to it, in eager mode
        self.passed_by = False  # whether, in one of the step's forwards, none came, or all of it was frozen
        # The tracker's.
        self.pending: Any = None
        self.rows: Any = None  # tells whether a layer's rows are the samples, or their tokens, flattened
        self.of_samples = self.of_all = False  # whether, while watched, it was given a row for each sample, one for all
        self.in_full: bool | None = None  # whether all that it returned, while watched, was in float32 or wider
        self.positions: Tensor | None = None  # whether all ids so far, one for each sample, could be positions
        self.takes_positions = False  # whether ids were positions: a run of numbers as long as there are samples is too

    def __str__(self) -> str:
        return self.name or "model"

    def shared_probe(self) -> Tensor:
        """The probe, whose gradient is then this process's share."""
        assert self.probe is not None
        return self.probe if self.share == 1.0 else self.probe * self.share

    def scores(self) -> bool:
        """Whether a forward that begins now is to be scored; notes that it has come, or that all its parameters are
        frozen for it."""
        if self.keep is None and self.probe is None:
            return False
        eager = not torch.compiler.is_compiling()
        if not torch.is_grad_enabled() and eager and not will_have_a_graph():
            if self.rows.watched:
                self.rows.pass_by(self)
            return False  # an evaluation, of any batch
        if eager and self.behind and torch._C._current_graph_task_id() != -1:  # a graph is not captured anew for it
            raise InRunError(
                f"{self}: expected the backward of each batch before the next batch(ids), as a checkpoint computes its "
                "part again in it, and the step's batches have other sizes or documents; got it after"
            )
        for owner, local in self.owned:  # asked of every layer: a loop is cheaper than `any`
            if (param := owner._parameters.get(local)) is None or param.requires_grad:
                if eager:
                    self.met = True
                return True
        self.passed_by = True
        return False


def as_it_is(x: Tensor) -> Tensor:
    return x


def will_have_a_graph() -> bool:
    """Whether what runs without one now is a forward that counts: of an autograd function with a gradient to come, as a
    reentrant checkpoint's, which has a graph when it is run again; or one that carries directions as tangents."""
    if probing.writes_out():
        return True
    frame: Any = sys._getframe()
    while frame is not None:
        if frame.f_code.co_name == "forward" and not isinstance(frame.f_locals.get("self"), nn.Module):
            names, others, _, values = inspect.getargvalues(frame)
            given = [values.get(name) for name in names]
            if isinstance(more := values.get(others or ""), tuple):  # or the forward has put another thing in its place
                given += more
            if given and isinstance(given[0], torch.autograd.function.BackwardCFunction):
                if any(given[0].needs_input_grad):
                    return True
            elif any(isinstance(x, Tensor) and x.requires_grad for x in given) and _is_a_functions(frame.f_code):
                return True
        frame = frame.f_back
    return False


def _is_a_functions(code: Any, cls: type = torch.autograd.Function) -> bool:
    """Whether this is the forward of an autograd function, which is given what it keeps in `setup_context`."""
    return any(
        getattr(each.forward, "__code__", None) is code or _is_a_functions(code, each) for each in cls.__subclasses__()
    )


@dataclass(frozen=True)
class Layout:
    """How a batch lies in its layers' tensors, and what has a value of its own.

    Attributes:
        rows: B, dimension 0 of every layer's tensors; each row has a value where `segments` is None.
        tokens: T, dimension 1; None where values belong to rows.
        segments: int64 `[S + 1]`, offsets of what has a value into the B*T tokens: documents, or single tokens.
        per_token: whether those are the tokens, one by one.
    """

    rows: int
    tokens: int | None = None
    segments: Tensor | None = None
    per_token: bool = False
    # `[rows, tokens]` as the sizes of a tensor without memory, which a graph may leave open where it fixes numbers.
    like: Tensor = field(init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        device = None if self.segments is None else self.segments.device
        object.__setattr__(self, "like", torch.empty(self.rows, self.tokens or 0, 0, device=device))

    @property
    def count(self) -> int:
        """How many values there are, for one target."""
        return self.rows if self.segments is None else len(self.segments) - 1

    def on(self, device: torch.device) -> Layout:
        """The layout with its offsets on the device; a GPU takes them in its turn, unwaited for."""
        segments = self.segments
        if segments is None or segments.device == device:
            return self
        if device.type == "cuda" and segments.device.type == "cpu":
            segments = segments.pin_memory()
        return replace(self, segments=segments.to(device, non_blocking=device.type == "cuda"))

    def is_like(self, other: Layout) -> bool:
        """Whether values belong to the same rows, documents or tokens of a batch."""
        if self != replace(other, segments=self.segments):
            return False
        a, b = self.segments, other.segments
        return a is b or (a is not None and b is not None and (self.per_token or torch.equal(a, b)))

    def require(self, tap: Tap, x: Tensor, feature_dims: int = 0) -> None:
        """Raise `InRunError` unless `x`, of a layer whose values belong to tokens or documents, is `[B, T, ...]`."""
        if x.shape[: max(0, x.dim() - feature_dims)][:2] != self.like.shape[:2]:
            raise InRunError(
                f"{tap}: expected its input and output to be [B, T, ...] with B = {self.rows} rows of "
                f"T = {self.tokens} tokens, to score tokens or documents; got {tuple(x.shape)}. Exclude its "
                "parameters, or score whole rows"
            )


def along(module: Any, name: str, dtype: torch.dtype | None = None) -> Any:
    """The direction of a module's parameter, its shape or of M targets `[M, *shape]`, and in this dtype if that is
    wider; None where it has none, or is frozen now."""
    direction = module._siblings.get(name + SUFFIX)
    if direction is None or not (param := module._parameters[name]).requires_grad:
        return None
    direction = targets_first(distributed.local(direction), param)
    if name == "bias" and module._inrun.bias_share != 1.0:
        direction = direction * module._inrun.bias_share
    return direction if dtype is None else direction.to(torch.promote_types(direction.dtype, dtype))


def targets_first(direction: Tensor, param: Tensor) -> Tensor:
    """A parameter's direction as `[M, *shape]`. What stands beside the parameter has M behind the dimension that
    `fully_shard` splits, so that both are split alike; of one target it is the parameter's shape."""
    return direction if direction.dim() == param.dim() else direction.movedim(min(1, param.dim()), 0)


def targets_second(direction: Tensor) -> Tensor:
    """`[M, *shape]` as it stands beside its parameter."""
    return direction.movedim(0, min(1, direction.dim() - 1))


def size_of(tensors: Iterable[Tensor | None]) -> int:
    """Bytes of the tensors."""
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def together(dots: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of a batch's dots over its layers and devices, float32; None where there are none."""
    known = [d for d in dots if d is not None]
    return sum((d.to(known[0].device) for d in known[1:]), known[0]).float() if known else None


def eagerly(function: Callable, *args: Any, **kwargs: Any) -> Any:
    """Call a function that a compiled model must leave its graph for."""
    if torch.compiler.is_compiling():
        return torch.compiler.disable(function)(*args, **kwargs)
    return function(*args, **kwargs)


def leave_as_they_are(*functions: Any) -> None:
    """Have Dynamo compile neither these functions nor what they call, also where a compiled function calls them: a
    backward and an update in it call their hooks."""
    from torch._C._dynamo import eval_frame

    skip = eval_frame._FrameAction.SKIP
    for function in functions:
        eval_frame.set_code_exec_strategy(function.__code__, eval_frame._FrameExecStrategy(skip, skip))
