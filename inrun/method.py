"""What a tracker asks of the method by which values come about."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from numbers import Real
from typing import Any, Protocol

from torch import Tensor
from torch.optim import Optimizer

from .tap import Layout


@dataclass(frozen=True)
class Options:
    """What a method that scores a step later is told (see `inrun.track`).

    Attributes:
        keep: where activations wait, "device" or "host"; keep_bytes: how much may wait.
        update: a user's update rule, "elementwise", or None.
        clip: the `max_norm` of the user's clipping by norm, or None.
    """

    keep: str
    keep_bytes: int | None
    update: Any
    clip: float | None

    def __post_init__(self) -> None:
        if isinstance(self.update, str) and self.update != "elementwise":
            raise ValueError(f"update: expected 'elementwise', a function or None, got {self.update!r}")
        if self.keep not in ("device", "host"):
            raise ValueError(f"keep: expected 'device' or 'host', got {self.keep!r}")
        bound = self.keep_bytes
        if bound is not None and not (isinstance(bound, Real) and not isinstance(bound, bool) and float(bound) >= 0):
            raise ValueError(f"keep_bytes: expected a number of at least 0 or None, got {bound!r}")
        if self.clip is not None and not (isinstance(self.clip, int | float) and self.clip > 0):
            raise ValueError(f"clip: expected a number above 0 or None, got {self.clip!r}")


class Method(Protocol):
    """One of `Inline`, `Deferred`, `MonteCarlo`.

    In a step come `begin`, `batch` before each forward, `before_update` when the optimizer begins, `end` when the block
    is over, and `finish` once the values are due.

    Attributes:
        drop: target -> what the step took off the validation loss, where the method measures it.
        standard_error: of the values, where the method draws samples.
        update: the user's update rule, "elementwise", or None.
        starts_with_validation, ends_with_validation: whether a step needs the validation gradient at the weights it
            begins with; whether its values wait for that at the weights it ends with.
    """

    drop: dict[str, Tensor]
    standard_error: Tensor | None = None
    update: Any = None
    starts_with_validation: bool
    ends_with_validation = False

    def require_supported(self, optimizer: Optimizer) -> None:
        """Raise `InRunError` unless the method knows what this optimizer does."""

    def require_shards_do(self) -> None:
        """Raise `InRunError` where the method cannot do with parameters under `fully_shard`."""

    def begin(self, scale: float | Tensor) -> None:
        """A step begins, whose loss is multiplied by `scale`."""

    def batch(self, layout: Layout, recompute: Callable[[], Tensor] | None) -> None: ...

    def before_update(self, factor: Tensor, unscale: Any) -> Tensor:
        """What the dots must be multiplied by to be values.

        Args:
            factor: the dots times this belong to the gradients as the optimizer uses them; 0 where it skips the update.
            unscale: what a gradient as it stands must still be multiplied by (a fused optimizer's loss scale).
        """
        ...

    def moves(self, unscale: Any, optimizers: Collection[Any]) -> Iterable[tuple[Any, Tensor]]:
        """Slots of these optimizers, and what an update that is taken for what it is adds to them."""
        return ()

    def end(self, failed: bool = False) -> None:
        """The block is over; of one that failed no activations are held any longer."""

    def finish(self) -> list[Tensor | None]:
        """The dots of each batch, `[count]` or `[count, M]`; None where no backward reached a tracked layer."""
        ...

    def memory(self) -> dict[str, int]:
        """Bytes held, by what for: nothing, where nothing is kept."""
        return {"kept": 0, "kept_peak": 0, "weights": 0}

    def release(self) -> None:
        """Forget all that waits."""
