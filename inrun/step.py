"""One training step: its batches, the factor that its update gives the dots, and the values that come out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .errors import InRunError, require_scale
from .tap import Layout
from .validation import as_ids

if TYPE_CHECKING:
    from .tracker import Tracker


class Step:
    """One training step, made by `Tracker.step`.

    Attributes:
        number: the step's number in the ledger.
        ids: the ids of the step's samples, all its batches in order.
        values: `[B]`, or `[B, M]` for M targets, float32 on the model's device, nats; ready when the block has ended;
            with "secant" and "path_secant" over validation blocks, after the next of those. > 0: the sample lowered the
            validation loss. Zero where the optimizer made no update. `[S]` or `[S, M]` for S documents, `[B, T]` or
            `[B, T, M]` for tokens (see `batch`).
        drop: target -> what this step's batch took off the validation loss, measured (path methods with a
            validation callable and true ends, and "monte_carlo"): the loss at `w + u(0)` less that at `w + u(g_B)`, a
            scalar tensor. Excluded parameters are at both ends what the step makes of them ("monte_carlo": what they
            were before it).
        standard_error: of "monte_carlo", the values' own, float32, their shape and unit; 0 where they are exact. From
            pairs of an order and its reverse, as if pairs were drawn independently: a little too large; NaN with one
            pair. None with the other methods.
    """

    def __init__(
        self,
        tracker: Tracker,
        ids: Any,
        recompute: Callable[[], Tensor] | None,
        scale: float | Tensor,
        segments: Any,
        tokens: int | None,
    ) -> None:
        require_scale(scale)
        self._tracker, self.scale = tracker, scale
        self._first = None
        self._idle = ids is not None and tracker.ranks.size > 1 and hasattr(ids, "__len__") and len(ids) == 0
        if ids is not None and not self._idle:
            ids = as_ids(ids)
            self._first = (ids, _layout(len(ids), segments, tokens), recompute)
        elif not self._idle and (recompute is not None or segments is not None or tokens is not None):
            raise ValueError("step: expected recompute, segments and tokens with their ids, or in batch(); got no ids")
        self._tokens: int | None = None  # per row, where each has a value
        self.drop: dict[str, Tensor] = {}
        self.standard_error: Tensor | None = None
        self._values: Tensor | None = None
        self.number = tracker.steps
        self.ids: list[int | str] = []
        self.factor: Tensor | None = None  # of the dots; set when the (first) optimizer begins its update
        self.uneven: Tensor | None = None  # whether there is no such factor
        self.lost: Tensor | None = None  # with several optimizers, whether the gradients were not finite

    def __enter__(self) -> Step:
        self._tracker.begin(self)
        try:
            if self._first is not None:
                self._announce(*self._first)
        except BaseException:
            self._tracker.end(self, failed=True)
            raise
        return self

    def batch(
        self,
        ids: Any,
        recompute: Callable[[], Tensor] | None = None,
        *,
        segments: Any = None,
        tokens: int | None = None,
    ) -> None:
        """Announce the samples of the next forward.

        Every layer must then see its tokens as `[B, T, ...]`. A document's value is the share that its tokens have in
        the gradients: each layer's input and output gradient at them.

        Args:
            ids: one id per sample, in batch order: integers or strings; a sequence, 1-D array or tensor.
            recompute: as in `Tracker.step`.
            segments: where the samples are documents packed into rows: `[S + 1]` offsets into the B*T tokens of the
                batch (as `cu_seqlens`), integers from 0 to B*T, on the host for speed; one id per document. A
                document may run over the end of a row; padding is a document too.
            tokens: T, the tokens of a row. With `segments`, None means one row of all tokens. Without them, every
                token of every row has a value, `[B, T]`, and they add up to the sample's.

        Raises:
            InRunError: outside the step block; tokens and samples in one step.
            TypeError, ValueError: ids that are none of these, or of no sample; offsets or tokens that do not fit.
        """
        ids = as_ids(ids)
        self._announce(ids, _layout(len(ids), segments, tokens), recompute)

    def _announce(self, ids: list[int | str], layout: Layout, recompute: Callable[[], Tensor] | None) -> None:
        if recompute is not None and not callable(recompute):
            raise TypeError(f"recompute: expected a function that returns the batch's loss, got {recompute!r}")
        tokens = layout.tokens if layout.per_token else None
        if self.ids and tokens != self._tokens:
            raise InRunError(f"tokens: expected {self._tokens} as in this step's other batches, got {tokens}")
        self._tracker.ledger.require(self.number, [*self.ids[:1], *ids])  # each batch has ids of one kind
        self._tracker.batch(self, layout, recompute)
        self._tokens = tokens
        self.ids = [*self.ids, *ids]

    @property
    def per_token(self) -> bool:
        return self._tokens is not None

    @property
    def values(self) -> Tensor:
        if self._values is None:
            raise InRunError(
                "values: asked for too early; expected after the step block, and where they need the next validation "
                "gradient, after the next validation() block"
            )
        return self._values

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        self._tracker.end(self, error, failed=kind is not None)
        if kind is None:
            self._tracker.finish(self)

    def settle(self, values: Tensor, drop: dict[str, Tensor], standard_error: Tensor | None) -> None:
        """Take the values; for `Tracker`."""
        self._values, self.drop, self.standard_error = values, dict(drop), standard_error

    def require_ids(self) -> None:
        """Raise `InRunError` where no samples were announced."""
        if not (self.ids or self._idle):
            raise InRunError("step: expected ids, by step(ids) or by batch(ids) before each forward; got neither")

    def scaled(self, dots: Sequence[Tensor | None]) -> Tensor:
        """The batches' dots as values: together, and as the update used their gradients."""
        self.require_ids()
        if not dots:
            dots = [torch.zeros(0, *self._tracker.tail, device=self._tracker.device)]
        for i, part in enumerate(dots):
            if part is None:
                raise InRunError(
                    f"step: no backward pass reached the tracked layers for batch {i + 1} of {len(dots)} "
                    "(torch.autograd.grad does so only with the probe among its inputs; use backward())"
                )
        together = torch.cat([part for part in dots if part is not None])
        if self._tokens is not None:
            together = together.unflatten(0, (-1, self._tokens))
        if self.factor is None:
            warnings.warn(
                f"step {self.number}: optimizer.step() did not run in the step block (that of the optimizer that was "
                "tracked; a new one needs a new tracker); its values are zero",
                stacklevel=5,
            )
            return torch.zeros_like(together)
        assert self.uneven is not None  # it is found with the factor
        factor = self.factor.to(together.device)
        values = torch.where(factor == 0, torch.zeros_like(together), together * factor)
        return values.masked_fill(self.uneven.to(values.device), torch.nan)


def _layout(count: int, segments: Any, tokens: int | None) -> Layout:
    """What a batch of so many ids looks like."""
    if tokens is not None and (isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1):
        raise ValueError(f"tokens: expected an integer of at least 1, got {tokens!r}")
    if segments is None:
        if tokens is None:
            return Layout(count)
        return Layout(count, tokens, torch.arange(count * tokens + 1), per_token=True)
    offsets = torch.as_tensor(segments).cpu()
    if offsets.dtype not in (torch.int32, torch.int64) or offsets.shape != (count + 1,):
        raise ValueError(
            f"segments: expected {count + 1} integer offsets, one more than ids, got {tuple(offsets.shape)} of "
            f"{offsets.dtype}"
        )
    end = int(offsets[-1])
    tokens = tokens or end
    if offsets[0] != 0 or (offsets.diff() < 0).any() or end == 0 or end % tokens:
        raise ValueError(
            f"segments: expected offsets from 0 to a multiple of {tokens} tokens that never decrease, got "
            f"{offsets.tolist() if len(offsets) <= 16 else f'{int(offsets[0])}, ..., {end}'}"
        )
    return Layout(end // tokens, tokens, offsets.long())
