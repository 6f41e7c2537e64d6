"""Checks of what a caller passes: metadata before the op is called, values inside the op.

Metadata checks (type, dtype, shape, device) read no data, so `torch.compile(fullgraph=True)` traces them.
Value checks (offsets, token ids) read data and therefore run inside the registered op, which a compiler does
not look into. On the CPU they raise `ValueError`; on a GPU they are asserted on the device, without
synchronisation.
"""

import operator
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from inrun_kernels.torch_path import accumulate_dtype

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
INTS = (torch.int32, torch.int64)
_last: tuple[Callable[[], Tensor | None], int, int] = (lambda: None, 0, 0)  # offsets, their version, tokens
_MOST_TOKENS = 2**31 - 2**12  # kernels number tokens in 32 bits (and elements in 64)


def check_tokens(name: str, x: Tensor, like: Tensor | None = None, like_name: str = "") -> None:
    """Require a floating-point `[B, T, features]` tensor, matching `like` in B, T, dtype and device."""
    _check_tensor(name, x, FLOATS)
    if x.dim() != 3:
        raise ValueError(f"{name}: expected 3 dimensions [batch, tokens, features], received {_shape(x)}")
    if x.shape[0] * x.shape[1] >= _MOST_TOKENS:
        raise ValueError(f"{name}: expected fewer than {_MOST_TOKENS} tokens in all, received {_shape(x)}")
    if like is None:
        return
    if x.shape[:2] != like.shape[:2]:
        raise ValueError(
            f"{name}: expected the batch and token sizes of {like_name} {_shape(like)}, received {_shape(x)}"
        )
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected the dtype of {like_name} ({like.dtype}), received {x.dtype}")
    check_device(name, x, like)


def check_width(name: str, x: Tensor, like_name: str, like: Tensor) -> None:
    """Require the two token tensors to agree in feature count, dtype and device."""
    if x.shape[2] != like.shape[2]:
        raise ValueError(f"{name}: expected {like.shape[2]} features, as {like_name}, received {x.shape[2]}")
    if x.dtype != like.dtype:
        raise TypeError(f"{name}: expected the dtype of {like_name} ({like.dtype}), received {x.dtype}")
    check_device(name, x, like)


def check_direction(
    val_grad: Tensor, like: Tensor, tail: tuple[int | None, ...], tail_name: str, name: str = "val_grad"
) -> None:
    """Require a direction to be `[*tail]` or `[M, *tail]` (None: any size), in the dtype of `like` or float32."""
    _check_tensor(name, val_grad, FLOATS)
    shape, n = val_grad.shape, len(tail)
    leads = val_grad.dim() == n or (val_grad.dim() == n + 1 and shape[0] > 0)
    sizes_agree = leads and all(want is None or want == got for want, got in zip(tail, shape[-n:], strict=True))
    if not sizes_agree:
        sizes = [("any" if size is None else size) for size in tail]
        raise ValueError(
            f"{name}: expected {tail_name} = {sizes}, or the same with a leading M >= 1 for M directions, "
            f"received {_shape(val_grad)}"
        )
    if val_grad.dtype != like.dtype and (val_grad.dtype != torch.float32 or like.dtype == torch.float64):
        wide = "" if like.dtype in (torch.float32, torch.float64) else " or torch.float32"
        raise TypeError(f"{name}: expected {like.dtype}{wide}, received {val_grad.dtype}")
    check_device(name, val_grad, like)


def agree(acts: Tensor, grads: Tensor, val_grad: Tensor, bias_val_grad: Tensor | None) -> bool:
    """Whether a layer's operands are as kernels have them: `acts [B,T,I]`, `grads [B,T,O]`, and directions `[O,I]` and
    `[O]`, or with a leading M, in rows of adjacent elements, of the layer's dtype or float32, on one device."""
    shape, dtypes, device = val_grad.shape, (acts.dtype, torch.float32), acts.device
    if shape[-2:] != (grads.shape[2], acts.shape[2]) or len(shape) > 3 or 0 in shape or val_grad.stride(-1) != 1:
        return False
    if acts.dtype is not grads.dtype or val_grad.dtype not in dtypes:
        return False
    if grads.device != device or val_grad.device != device:
        return False
    return bias_val_grad is None or (
        bias_val_grad.shape == shape[:-1] and bias_val_grad.dtype in dtypes and bias_val_grad.device == device
    )


def check_grouping(segments: Tensor | None, per_token: bool, like: Tensor) -> None:
    """Require `segments` to be a 1-D integer tensor of at least one offset, and not given with `per_token`."""
    if segments is None:
        return
    if per_token:
        raise ValueError("per_token: expected False when segments is given, received True")
    _check_tensor("segments", segments, INTS)
    if segments.dim() != 1 or segments.shape[0] == 0:
        raise ValueError(f"segments: expected 1 dimension [S + 1] of offsets, received {_shape(segments)}")
    check_device("segments", segments, like)


def check_ids(ids: Tensor, grads: Tensor) -> None:
    """Require integer `ids [B, T]` beside `grads [B, T, I]`."""
    _check_tensor("ids", ids, INTS)
    if ids.shape != grads.shape[:2]:
        raise ValueError(f"ids: expected [batch, tokens] = {_shape(grads)[:2]}, received {_shape(ids)}")
    check_device("ids", ids, grads)


def as_padding(padding_idx: int | None, vocabulary: int) -> int | None:
    """`padding_idx`, required to be inside the vocabulary, as a Python integer; or None."""
    if padding_idx is None:
        return None
    try:
        padding_idx = operator.index(padding_idx)
    except TypeError:
        received = f"{type(padding_idx).__name__} {padding_idx!r}"
        raise TypeError(f"padding_idx: expected None or an int, received {received}") from None
    if not 0 <= padding_idx < vocabulary:
        raise ValueError(f"padding_idx: expected None or a value from 0 to {vocabulary - 1}, received {padding_idx}")
    return padding_idx


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """Require the two tensors on one device."""
    if x.device != like.device:
        raise ValueError(f"{name}: expected device {like.device}, received {x.device}")


def check_backend(backend: str | None) -> None:
    """Require a known backend name."""
    if backend not in (None, "triton", "torch"):
        raise ValueError(f"backend: expected None, 'triton' or 'torch', received {backend!r}")


def check_form(form: str | None) -> None:
    """Require a known form of the weight-gradient kernel."""
    if form not in (None, "two", "prefix", "direct"):
        raise ValueError(f"form: expected None, 'two', 'prefix' or 'direct', received {form!r}")


def check_grad_dtype(grad_dtype: torch.dtype | None, acts: Tensor) -> None:
    """Require a dtype that a gradient of `acts` can be rounded to, or None."""
    wide = accumulate_dtype(acts)
    if grad_dtype not in (None, acts.dtype, wide):
        allowed = " or ".join(map(str, dict.fromkeys((wide, acts.dtype))))
        raise TypeError(f"grad_dtype: expected None, {allowed}, received {grad_dtype}")


def check_segment_values(segments: Tensor | None, n_tokens: int) -> None:
    """Require offsets that begin at 0, never decrease and end at `n_tokens` (reads data: only inside an op)."""
    if segments is None or (segments.is_cuda and _as_before(segments, n_tokens)):
        return
    # Compared, not subtracted: a difference could overflow.
    rising = (segments[1:] >= segments[:-1]).all()
    good = (segments[0] == 0) & (segments[-1] == n_tokens) & rising
    _require(
        good,
        segments,
        f"segments: expected non-decreasing offsets from 0 to batch * tokens = {n_tokens}, received {{values}}",
    )


def check_id_values(ids: Tensor, vocabulary: int) -> None:
    """Require token ids inside the vocabulary (reads data: only inside an op)."""
    if ids.numel():
        good = ((ids >= 0) & (ids < vocabulary)).all()
        _require(good, ids, f"ids: expected values from 0 to {vocabulary - 1}, received {{values}}")


def _as_before(segments: Tensor, n_tokens: int) -> bool:
    """Whether these offsets came last too, and torch has not written to them since: every layer of a step brings the
    same, and each check is eight launches."""
    global _last
    if segments.is_inference():  # has no version
        return False
    of_tensor, *facts = _last
    if of_tensor() is segments and facts == [segments._version, n_tokens]:
        return True
    _last = weakref.ref(segments), segments._version, n_tokens
    return False


def _require(good: Tensor, values: Tensor, message: str) -> None:
    if good.is_cuda:
        torch.ops.aten._assert_async.msg(good, message.format(values="values outside this range"))
    elif not good:
        low, high = int(values.min()), int(values.max())
        shown = values.tolist() if values.numel() <= 16 else f"{values.numel()} values from {low} to {high}"
        raise ValueError(message.format(values=shown))


def _check_tensor(name: str, x: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, received {type(x).__name__}")
    # A backward that is being captured may not ask for the layout; what is no dense tensor is not captured.
    if not torch.compiler.is_compiling() and (x.layout is not torch.strided or x.is_nested):
        kind = "a nested one" if x.is_nested else f"one of layout {x.layout}"
        raise TypeError(f"{name}: expected a dense tensor, received {kind}")
    if x.dtype not in dtypes:
        raise TypeError(f"{name}: expected one of {', '.join(map(str, dtypes))}, received {x.dtype}")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
