"""Whether dimension 0 of what a layer is given, or returns, holds the samples: its size alone cannot tell.

`[T, ...]`, or outputs that are stacked layer by layer, look like `[B, ...]` where their number happens to be B. So
before the update of the first step with several samples the model is run again, without gradients:

    its last sample twice                    an output that has B rows still does not hold the samples
    as it was; all samples but one moved     an output with the same rows as before, which have not moved with the
    on; the first sample alone, B times      samples, has them in an order of its own (one process, eval mode)

Samples' tokens may be flattened to rows, as by `head(h.view(-1, W))` and in OPT's blocks. Such a `[B * T, W]` is scored
where a layer has as many rows for a sample as dimensions of an input say, and where these move on with the samples (in
eval mode). Later steps take the layer's rows for tokens where the same dimensions say how many there are.

All of this comes after the forward: the user's own contexts around it cannot be entered twice. Of several processes all
make the first run or none, as the model may exchange something in its forward.
"""

from __future__ import annotations

import traceback
import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, suppress
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .calls import Call, called, going_on
from .distributed import Ranks
from .errors import InRunError, few
from .forward_mode import sample_axis
from .layers import EmbeddingRule, Part
from .remedies import Shapes, as_code, remedies
from .restoring import as_it_was, drew_since, in_modes, random_state, setting
from .shared import as_plain, require_in_range

_INSTEAD = (
    "Name a module around it that returns [B, ...], track(..., through={parameter: module}), or exclude its parameters"
)
LEAST = 1e-5  # of the largest mark, by which rounding may change the others
SAME, OTHER = 1e-3, 1e-2  # of the largest mark: up to the former two are equal, from the latter on they differ


class _Taken(NamedTuple):
    """An output that has B rows."""

    module: Any
    of: int  # within which call, by the `id` of its kwargs; 0: of none that is to be made again
    number: int  # of the module's call within that one
    leaf: int | None  # of the call's outputs; None: of its input, whose rows are the tokens, flattened
    shape: tuple[int, ...]

    def is_square(self) -> bool:
        """Whether a dimension of positions has B rows as well."""
        positional = isinstance(self.module, EmbeddingRule) or getattr(self.module, "may_fold", False)
        known = self.module._inrun.tokens_first
        return positional and not known and len(self.shape) > 2 and self.shape[0] == self.shape[1] > 1


class Rows:
    """Which layers of a model hold a batch's samples at dimension 0, or several rows for each, sample after sample.

    Args:
        model: what it is called with has the samples in front.
        through: what `track` was given.
        folding: whether rows may be flattened tokens.
        paused: in this context tracked layers run plainly.
        ranks: the processes, of which each calls the model itself.
    """

    def __init__(
        self,
        model: nn.Module,
        through: Mapping[str, str],
        folding: bool,
        paused: Callable[[], AbstractContextManager],
        ranks: Ranks,
    ) -> None:
        self._model, self._through, self._folding, self._paused, self._ranks = model, through, folding, paused, ranks
        self._agreed = False  # whether several processes have been asked for the run with one sample more
        self._known: dict[nn.Module, set] = {}  # layers of flattened tokens, and what sizes these were
        self._drew = False  # whether the last run drew random numbers
        self.watched = False  # whether to see what becomes of outputs that all samples share
        self.compared = False  # whether a module known by running it is to be compared with itself
        self.shared: list[Any] = []  # outputs of this step that all samples share
        self.begin(0)
        self.forget()

    def begin(self, rows: int, flat: bool = False) -> None:
        """A forward of so many samples will come, in which rows may be `flat` tokens; 0 where nothing is to be told
        from sizes: none is expected, or parameters are shards."""
        self.rows, self._flat = rows, flat and self._folding
        self._sizes: dict[int, set] | None = None  # what a sample may have of rows there
        self._lone: bool | None = None  # whether an input has the one sample, or none is known

    def note_call(self) -> bool:
        """The call of the model that is going on may have to be made again; whether it is the one."""
        call, known = self._looked_up(), self._call
        if self.rows > 1 and call is not None and (known is None or not self._is_whole(known)):
            # The model's own takes the place of a module's that came before it, as its embeddings'.
            wanted = self._is_whole(call) or (known is None and call.has_samples())
            self._call = call if wanted and call.is_plain() else known
        return self._call is not None and call is not None and call.kwargs is self._call.kwargs

    def _is_whole(self, call: Call) -> bool:
        """Whether it is the model that is called, and not one of its modules."""
        return call.module is self._model

    def take(self, module: Any, outputs: Any) -> None:
        """Outputs of a module's call with B rows, to which a gradient comes, are taken for `[B, ...]`; `verify` raises
        where they are not."""
        ours, tap = self.note_call(), module._inrun
        tap.in_full = tap.in_full is not False and _are_in_full(outputs)
        known = ours or self._call is None or not self._is_whole(self._call)
        if isinstance(module, Part) or not (known or self._later):
            return
        of, number = (id(self._call.kwargs), self._count(tap, self._call)) if ours and self._call else (0, 0)
        if tap.routed and known:  # by what a run on other numbers found
            self._taken.add(_Taken(module, of, number, None, ()))
        for leaf, y in enumerate(pytree.tree_leaves(outputs)):
            axis = sample_axis(module, leaf)
            if not isinstance(y, Tensor) or y.shape[axis : axis + 1] != (self.rows,):
                continue
            key = module, leaf, tuple(y.shape)
            taken = {_Taken(module, of, number, leaf, tuple(y.shape))} if known else set()
            if y.requires_grad:
                taken |= set() if ours else self._later.get(key, set())
                y.register_hook(lambda _, taken=taken: self._taken.update(taken))
            elif not torch.is_grad_enabled():  # of a reentrant checkpoint: its gradient comes when it is run again
                self._later.setdefault(key, set()).update(taken)

    def pass_by(self, tap: Any) -> None:
        """A module runs plainly, which `_shapes` will not tell from its other calls."""
        if (call := self._looked_up()) is not None:
            self._count(tap, call)

    def _count(self, tap: Any, call: Any) -> int:
        _, of_call = self._calls.setdefault(id(call.kwargs), (call, {}))
        of_call[tap] = number = of_call.get(tap, -1) + 1
        return number

    def counts(self) -> Callable[[], None]:
        """What puts the numbers of calls back to what they are now: calls in between will come again."""
        before = {key: (call, dict(of_call)) for key, (call, of_call) in self._calls.items()}

        def put_back() -> None:
            self._calls = before

        return put_back

    def are_tokens(self, layer: Any, x: Tensor) -> bool:
        """Whether the layer's input is taken for flattened tokens, for now; `verify` raises where it is not."""
        if not (self._flat and self.rows) or x.shape[0] == self.rows or x.shape[0] % self.rows:
            return False
        if self.rows == 1:
            if self._lone is None:
                call = self._looked_up()
                self._lone = call is None or not self._is_whole(call) or call.has_samples()
            return self._lone
        if self._sizes is None:
            call = self._looked_up()
            self._sizes = call.sizes() if call is not None else {}
        # As many as an input has: tokens that were picked out have as many only where each sample has all of its own.
        sizes = self._sizes.get(x.shape[0] // self.rows)
        if sizes is None:
            return False
        shape, asked = self._asked.get(layer, (tuple(x.shape), set()))
        if sizes & (self._known.get(layer, set()) | asked):
            return True
        ours = self.note_call()
        if found := self._call is not None and (ours or (self._is_whole(self._call) and not asked)):
            self._asked[layer] = shape, asked | sizes
        return found

    def verify(self) -> None:
        """Raise `InRunError` where an input or output was taken for what it is not; warn where nothing tells."""
        self._verify_samples()
        if self._asked and self._call is not None:
            self._verify_tokens(self._call)
        self._taken, self._asked = set(), {}

    def _verify_samples(self) -> None:
        call, told = self._call, False
        ours = [one for one in self._taken if call is not None and one.of == id(call.kwargs)]
        if self._all_can(bool(ours)) and call is not None:
            modules, alone = {one.module for one in ours}, self._ranks.size == 1
            self._beside = self._with_nothing_beside(call) if alone else None
            more, which = self._of_one_more(modules, call)
            wrong = _with_as_many_rows(ours, more)  # name -> what it is
            if which == "flattened" and {one.module._inrun.name for one in ours} <= wrong.keys():
                more, wrong = {}, {}  # what says whose the rows are, as nodes of graphs, knew of no sample more
            raised = call.of_numbers_raised() if wrong and alone else None
            if raised is not None and (again := self._of_one_more(modules, raised)[0]):
                still = _with_as_many_rows(ours, again)
                wrong = {name: what for name, what in wrong.items() if name in still}
            if wrong:
                raise InRunError(
                    f"{few(sorted(wrong.values()))}: expected the samples at dimension 0; got {call.rows} rows, as "
                    "many as there are samples, and as many still when the model's input had one sample more. "
                    f"{_INSTEAD}",
                    suspected=wrong,
                )
            if more and alone and (elsewhere := self._in_another_order(ours, call, more, which)):
                raise InRunError(
                    f"{few(elsewhere)}: expected the samples at dimension 0, in the order of the model's input; got "
                    "rows that did not move on when those samples did, as of a batch that the model sorts, or of tokens"
                    f" it picks: other samples would have their values. {_INSTEAD}"
                )
            told = bool(more) and self._is_whole(call)  # what a module of it is given may be [T, B]
        squares = sorted({f"{one.module._inrun} {one.shape}" for one in self._taken if one.is_square()})
        if squares and not told:
            warnings.warn(
                f"{few(squares)}: dimension 0 is taken for the samples, and dimension 1 has as many rows. Were those "
                "the samples, values would be wrong, and nothing could tell: the model was not run with one sample "
                "more (for which it is called in the step block, as model(x), and takes such a batch). To be sure, "
                "make the first step with another number of samples or tokens", stacklevel=6)  # fmt: skip

    def _in_another_order(self, taken: Iterable[_Taken], call: Call, more: Shapes, which: str) -> list[str]:
        """Names of modules whose outputs have the samples' rows, but elsewhere, in a run on the samples moved on: the
        same rows as before, not all moved on. Nothing tells of a model that draws random numbers in eval mode; nor of
        modules that are called otherwise in eval mode than they were (`more`), or whose rows are the same ones whatever
        the samples are."""
        order, runs = [], []
        with suppress(Exception):  # of a model that does not run like this
            order = call.order()
            for each in (call, call.of(order, which), call.of([0] * call.rows, which)):
                runs.append(self._marks(each, {one.module for one in taken}))
                if self._drew:
                    return []
        found, swapped = set(), {}
        for module, _, number, leaf, _ in taken if len(runs) == 3 else ():
            each = [
                calls[number] for run in runs if number < len(calls := run.get(module, [])) == len(more.get(module, ()))
            ]
            marks = [of_call[leaf] for of_call in each if leaf in of_call]
            if len(marks) == 3:
                before, after, of_one = marks
                name = f"{module._inrun} ({module._inrun_class.__name__})"
                if _in_disorder(before, after, of_one, order, leaf is None):
                    found.add(name)
                swapped.setdefault(name, []).append(call.rows == 2 and _in_each_others_place(before, of_one))
        return sorted(found | {name for name, each in swapped.items() if all(each)})

    def _with_nothing_beside(self, call: Call) -> tuple[int, Tensor] | None:
        """A sample that has nothing in an input of as many rows as there are samples, where others have several, and
        this input: as of images, where some samples have none.

        In eval mode other numbers in all of its rows leave what the model returns for some samples as it was; other
        numbers in the rows that would be theirs change what it returns for others.
        """
        with suppress(Exception):  # of a model that does not run like this
            inputs = call.beside_samples()
            before = self._outputs(call) if inputs else {}
            for x in inputs if not self._drew else ():
                every = torch.ones(call.rows, dtype=torch.bool, device=x.device)
                for leaf, marks in self._outputs(call.of_other(x, every)).items():
                    without = ~_changed(before[leaf], marks, LEAST)
                    if leaf is None or len(without) != call.rows or without.all() or not without.any():
                        continue
                    reached = _changed(before[leaf], self._outputs(call.of_other(x, without))[leaf], SAME)
                    if reached.any() and not (reached & without).any():
                        return int(without.nonzero()[0]), x
        return None

    def _outputs(self, call: Call) -> dict[Any, Tensor]:
        """Marks of what it returns."""
        return self._marks(call, {call.module})[call.module][0]

    def _verify_tokens(self, call: Call) -> None:
        order = call.order()
        moved = call.mapped(lambda x: x[order] if call.is_of_samples(x) else x)
        pairs = zip(call.leaves(), moved.leaves(), strict=True)
        if all(x is y or torch.equal(x, y) for x, y in pairs if isinstance(x, Tensor)):
            return  # samples that are all alike tell nothing: the next step is asked
        why, runs, alone = None, ({}, {}), {}
        try:
            runs = [self._marks(each, self._asked) for each in (call, moved)]
        except Exception as error:  # of a model that does not run like this
            why = error
        if call.rows == 2:  # which move on by changing places
            with suppress(Exception):  # of a model that takes no sample twice
                alone = self._marks(call.mapped(lambda x: x[[0, 0]] if call.is_of_samples(x) else x), self._asked)
        failed = {}
        for layer, (shape, _) in self._asked.items():
            before, after, of_one = ([marks[None] for marks in run.get(layer, [])] for run in (*runs, alone))
            alike = len(before) == len(after) and all(
                _moved_on(x, y, order) for x, y in zip(before, after, strict=True)
            )
            # One sample alone may not call all layers, as experts.
            swapped = len(before) == len(of_one) and all(map(_in_each_others_place, before, of_one))
            if not alike or swapped or not before:
                failed[layer._inrun] = shape
        if failed:
            tap, shape = next(iter(failed.items()))
            raise InRunError(
                f"{tap}: expected an input [B, ...], or [B * T, ...] of tokens, sample after sample, with "
                f"B = {call.rows}; got {shape}, whose rows did not move on when the samples of the model's input did. "
                f"{_INSTEAD}",
                suspected={other.name for other in failed},
            ) from why
        for layer, (_, sizes) in self._asked.items():
            self._known.setdefault(layer, set()).update(sizes)

    def _all_can(self, ready: bool) -> bool:
        """Whether the model is to be run with one sample more. Several processes are asked at their first update."""
        if self._ranks.size == 1:
            return ready
        asked, self._agreed = self._agreed, True
        device = next(self._model.parameters()).device
        return not asked and int(self._ranks.sum(torch.tensor(int(ready), device=device))) == self._ranks.size

    def forget(self) -> None:
        """What was asked in a step that is over."""
        self._asked: dict[Any, tuple[tuple[int, ...], set]] = {}  # as `_known`, and their inputs' shapes
        self._calls: dict[int, tuple[Call, dict[Any, int]]] = {}  # of the model, and of modules' taps within each
        self._call: Call | None = None  # that is made again
        self._taken: set[_Taken] = set()
        self._later: dict[tuple, set[_Taken]] = {}  # those to which a gradient may come when they are computed again
        self._inside: set[nn.Module] = set()  # the model's modules, once they are asked for
        self._beside: tuple[int, Tensor] | None = None  # a sample that has nothing in an input, and this input
        as_plain(self.shared)
        self.shared.clear()

    def explain(self, error: Exception) -> None:
        """Add to an error of this library, or one within the model, what would score the layers whose rows are not the
        samples, if there are any, and the model runs by itself."""
        call, ours = self._call, isinstance(error, InRunError)
        trace = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
        inside = isinstance(error, RuntimeError | ValueError) and any(call and called(f) is call.module for f in trace)
        if call is None or not (ours or inside) or isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError):
            return
        if not call.has_samples() and any(x.shape[1:2] == (call.rows,) for x in call.leaves() if isinstance(x, Tensor)):
            error.add_note("Inputs have the samples at dimension 1: hold the model in a module that takes and returns "
                           "[B, ...], as by x.transpose(0, 1), and call and track that one")  # fmt: skip
            return
        # What is given [1, ...] runs on B rows, which is told from what comes after, or makes torch fail there.
        every = dict(self._model.named_modules())
        suspected = error.suspected if isinstance(error, InRunError) else () if isinstance(error, ValueError) else every
        with suppress(Exception):  # of a model that does not run like this
            whole = self._shapes(every.values(), call, torch.enable_grad)
            (more, which), count = self._of_one_more(every.values(), call, torch.enable_grad), call.rows + 1
            if not more:  # as of images with a row for each patch, and not as many of each
                more, count = self._shapes(every.values(), call.twice(), torch.enable_grad), 2 * call.rows
            returned = ([{**one, None: ()} for one in run.get(call.module, ())] for run in (whole, more))
            if (which == "flattened" or count > call.rows + 1) and next(returned) == next(returned):
                return  # what says whose the rows are knew of no sample more
            sizes = call.sizes() if self._folding else ()
            try:
                found = remedies(self._model, whole, more, (call.rows, count), sizes, suspected)
            except LookupError as layer:
                error.add_note(
                    f"No module around {layer} returns [B, ...], nor does the model: let it return what has the "
                    "samples in front, as logits, and take the loss outside of it; through= can then name "
                    "it. Or exclude its parameters"
                    if call.has_samples()
                    else f"No input of the model has {call.rows} rows: expected an id for each sample it is given"
                )
                return
            if found:
                wanted = as_code(list({**self._through, **dict(found)}.items()))
                error.add_note('To score such layers by modules around them ("": the model), each of which then runs '
                               f"once more in a step: track(..., through={wanted})")  # fmt: skip

    def _looked_up(self) -> Call | None:
        """What the model, or the outermost of its modules, is being called with."""
        self._inside = self._inside or set(self._model.modules())
        device = next(self._model.parameters()).device.type
        return going_on(self._model, self._inside, self.rows, device)

    def _run(self, call: Call, grad_mode: Callable[[], Any]) -> Any:
        given = call.mapped(lambda x: x.clone() if isinstance(x, Tensor) else x)
        with self._paused(), as_it_was(self._model), grad_mode(), torch.autocast(*call.autocast), _ids_in_range():
            before = random_state()
            out = call.module.forward(*given.args, **given.kwargs)  # past hooks that have changed these already
            self._drew = drew_since(before)
            return out

    def _shapes(self, modules: Iterable[Any], call: Call, grad_mode: Callable[[], Any] = torch.no_grad) -> Shapes:
        """What modules are given and return in a run; with gradients, those outputs that take one."""

        def shapes_of(_: Any, inputs: list[Any], outputs: list[Any]) -> dict[Any, tuple[int, ...]]:
            x = next((x for x in inputs if isinstance(x, Tensor)), None)
            found: dict[Any, tuple[int, ...]] = {} if x is None else {None: tuple(x.shape)}
            known = ((i, y) for i, y in enumerate(outputs) if isinstance(y, Tensor))
            return found | {i: tuple(y.shape) for i, y in known if y.requires_grad or grad_mode is torch.no_grad}

        return self._noted(shapes_of, modules, call, grad_mode)

    def _noted(
        self, note: Callable[..., Any], modules: Iterable[Any], call: Call, grad_mode: Callable[[], Any]
    ) -> dict[Any, list[Any]]:
        """What `note(module, inputs, outputs)` makes of each of the modules' calls in a run, those in no structure."""
        found: dict[Any, list[Any]] = {}

        def hook(module: Any, args: tuple, kwargs: dict, out: Any) -> None:
            inputs, outputs = pytree.tree_leaves((args, kwargs)), pytree.tree_leaves(out)
            found.setdefault(module, []).append(note(module, inputs, outputs))

        handles = [m.register_forward_hook(hook, with_kwargs=True) for m in modules if m is not call.module]
        try:
            out = self._run(call, grad_mode)
        finally:
            for handle in handles:
                handle.remove()
        if call.module in modules:  # whose hooks `_run` goes past
            hook(call.module, call.args, call.kwargs, out)
        return found

    def _of_one_more(
        self, modules: Iterable[Any], call: Call, grad_mode: Callable[[], Any] = torch.no_grad
    ) -> tuple[Shapes, str]:
        """With one sample more, and which of the inputs had it; nothing of a model that takes no other number of
        samples. Several processes try once: they might not all try again."""
        last, but = self._beside or (call.rows - 1, None)
        for which in ("all", "first", "flattened") if self._ranks.size == 1 else ("all",):
            with suppress(Exception):
                return self._shapes(modules, call.of([*range(call.rows), last], which, but), grad_mode), which
        return {}, "all"

    def _marks(self, call: Call, modules: Iterable[Any]) -> dict[Any, list[dict[Any, Tensor]]]:
        """Two numbers for each row of what modules are called with (None) and of their outputs, in eval mode."""

        def of_rows(x: Tensor, axis: int) -> Tensor:
            numbers = torch.view_as_real(x.resolve_conj()) if x.is_complex() else x
            rows = numbers.detach().movedim(axis, 0)[:, None].flatten(1).float()  # there may be none
            weights = torch.arange(rows.shape[1], device=x.device, dtype=torch.float32).cos()
            return torch.stack([rows @ weights, rows.norm(dim=1)])

        def marks_of(module: Any, inputs: list[Any], outputs: list[Any]) -> dict[Any, Tensor]:
            x = next((x for x in inputs if isinstance(x, Tensor) and x.dim()), None)
            axes = {leaf: sample_axis(module, leaf) for leaf in range(len(outputs))}
            known = {i: y for i, y in enumerate(outputs) if isinstance(y, Tensor) and y.dim() > axes[i]}
            return ({} if x is None else {None: of_rows(x, 0)}) | {i: of_rows(y, axes[i]) for i, y in known.items()}

        with in_modes((module, False) for module in self._model.modules()):
            return self._noted(marks_of, modules, call, torch.no_grad)


def _ids_in_range() -> AbstractContextManager[None]:
    """As there are positions to `len(x)`, which the run with one sample more may have one of too many."""
    embedding = F.embedding

    def looked_up(ids: Tensor, table: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            require_in_range(len(table), ids)
        return embedding(ids, table, *args, **kwargs)

    return setting("embedding", [(F, looked_up)])


def _with_as_many_rows(taken: Iterable[_Taken], more: Shapes) -> dict[str, str]:
    """Names of modules that have as many rows in a run on one more sample, and what they are."""
    found = {}
    for module, _, number, leaf, shape in taken:
        calls, axis = more.get(module, ()), sample_axis(module, leaf)
        if number < len(calls) and calls[number].get(leaf, ())[axis : axis + 1] == shape[axis : axis + 1]:
            found[module._inrun.name] = f"{module._inrun} ({module._inrun_class.__name__})"
    return found


def _are_in_full(outputs: Any) -> bool:
    """Whether they were computed in float32 or wider."""
    numbers = [y for y in pytree.tree_leaves(outputs) if isinstance(y, Tensor) and y.is_floating_point()]
    return not any(y.dtype.itemsize < 4 or torch.is_autocast_enabled(y.device.type) for y in numbers)


def _with_samples_moved(marks: Tensor, order: list[int]) -> Tensor:
    return marks.unflatten(1, (len(order), -1))[:, order].flatten(1)


def _in_disorder(before: Tensor, after: Tensor, of_one: Tensor, order: list[int], tokens: bool) -> bool:
    """Whether rows are those they were before the samples moved on, and not all moved on; `of_one`: of the first sample
    alone, as often.

    Each sample has as many: with another number of them where all are one, they were picked out.
    """
    rows = len(order)
    if before.shape != after.shape or before.shape[1] % rows or (before.shape[1] != rows and not tokens):
        return False
    if of_one.shape != before.shape:
        return True
    size = before.abs().amax(1, keepdim=True)
    same = (after.sort(1).values - before.sort(1).values).abs() <= SAME * size
    elsewhere = ((after - _with_samples_moved(before, order)).abs() > OTHER * size).any()
    differs = ((of_one - before).abs() > OTHER * size).any()
    return bool(same.all() & elsewhere & differs)


def _in_each_others_place(before: Tensor, of_one: Tensor) -> bool:
    """Of two samples, whether the second one's rows are the first one's, and the first one's are others."""
    if before.shape != of_one.shape or before.shape[1] % 2:
        return False
    first, second, one = *before.chunk(2, 1), of_one.chunk(2, 1)[0]
    size = before.abs().amax(1, keepdim=True)
    same, other = (second - one).abs() <= SAME * size, (first - one).abs() > OTHER * size
    return bool(same.all() & other.any() & (one.abs() > OTHER * size).any())


def _changed(before: Tensor, after: Tensor, least: float) -> Tensor:
    """Which rows have other marks than before."""
    return ((after - before).abs() > least * before.abs().amax(1, keepdim=True)).any(0)


def _moved_on(before: Tensor, after: Tensor, order: list[int]) -> bool:
    if before.shape != after.shape or before.shape[1] % len(order):
        return False
    expected, size = _with_samples_moved(before, order), before.abs().max()
    differs = (expected - before).abs().max() > OTHER * size
    return bool(differs & ((after - expected).abs().max() <= SAME * size))
