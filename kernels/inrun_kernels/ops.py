"""The registered ops: schema, fake, second derivative and dispatch of every product.

Ops are canonical: `val_grad` always carries its leading M, dots always end in M, outputs are fresh contiguous
tensors. `api.py` holds the public functions. Derivatives are plain torch ops, hence differentiable again.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from inrun_kernels import derivatives, forms, native, torch_path
from inrun_kernels.torch_path import accumulate_dtype
from inrun_kernels.validation import agree, check_id_values, check_segment_values

_HAS_TRITON = importlib.util.find_spec("triton") is not None


def call(op: Any, *args: Any) -> Any:
    """Call a registered op; only its body where nothing else has to see the call.

    Passing through the dispatcher costs as much as the products of a small layer.
    """
    if forward_ad._current_level >= 0 and not torch.compiler.is_compiling():
        _refuse_tangents(args)
    return op._init_fn(*args) if unseen(*args) else op(*args)


def unseen(*args: Any) -> bool:
    """Whether no compiler, tracer, transform or derivative has to see what is done with these arguments.

    Only the dispatcher turns the sign of a view whose memory has the other one (`z.conj().imag`), fills zeros that have
    no memory, and answers without data (on meta).
    """
    if torch.compiler.is_compiling() or forward_ad._current_level >= 0 or torch._C._get_tracing_state() is not None:
        return False
    if torch._C._len_torch_dispatch_stack() or torch._C._are_functorch_transforms_active():
        return False
    recording = torch.is_grad_enabled()
    for x in args:
        if isinstance(x, Tensor) and (
            (recording and x.requires_grad)
            or type(x) not in (Tensor, torch.nn.Parameter)
            or x.is_neg()
            or x.is_meta
            or x._is_zerotensor()
        ):
            return False
    return True


def _refuse_tangents(args: tuple) -> None:
    """Torch would drop them without a word."""
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in args):
        raise NotImplementedError(
            "expected reverse-mode derivatives of these products, received a forward-mode tangent (jvp, jacfwd)"
        )


@torch.library.custom_op("inrun::ghost_dot", mutates_args=())
def ghost_dot(
    acts: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool, backend: str | None
) -> Tensor:
    check_segment_values(segments, acts.shape[0] * acts.shape[1])
    with launch_context(acts):
        if use_triton(backend, acts, grads):
            from inrun_kernels.dot import launch_dot

            return launch_dot(acts, grads, val_grad, segments, per_token)
        in_c = not per_token and use_native(backend, acts, grads, val_grad)
        if in_c and _dots_in_c(acts, grads, val_grad, segments):
            return native.ghost_wgrad_dot(acts, grads, val_grad, None, segments)[2]
        return torch_path.ghost_dot(acts, grads, val_grad, segments, per_token)


def _dots_in_c(acts: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None) -> bool:
    if acts.dtype != torch.float32:
        return native.dots_fit(acts, grads, segments)
    samples = acts.shape[0] if segments is None else segments.shape[0] - 1
    sizes = acts.shape[0] * acts.shape[1], samples, acts.shape[2], grads.shape[2], len(val_grad)
    return min(sizes) > 0 and forms.dots_in_c(*sizes)


@torch.library.custom_op("inrun::ghost_wgrad_dot", mutates_args=())
def ghost_wgrad_dot(
    acts: Tensor,
    grads: Tensor,
    val_grad: Tensor,
    bias_val_grad: Tensor | None,
    segments: Tensor | None,
    form: str | None,
    grad_dtype: torch.dtype | None,
    backend: str | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Weight gradient, bias gradient (empty without a direction for it), and the dots of both together."""
    check_segment_values(segments, acts.shape[0] * acts.shape[1])
    with launch_context(acts):
        triton = use_triton(backend, acts, grads)
        built = forms.for_c(acts, segments) and use_native(backend, acts, grads, val_grad, bias_val_grad)
        form = form or forms.of_wgrad_dot(acts, grads, val_grad, segments, triton, built).form
        if triton and form != "direct":
            from inrun_kernels.wgrad_dot import launch_wgrad_dot

            return launch_wgrad_dot(acts, grads, val_grad, bias_val_grad, segments, form, grad_dtype)
        if triton:
            from inrun_kernels.dot import launch_dot

            weight_grad = torch_path.weight_grad(acts, grads, grad_dtype or accumulate_dtype(acts))
            dots = launch_dot(acts, grads, val_grad, segments, False)
        elif built and form == "two":
            weight_grad, bias_grad, dots = native.ghost_wgrad_dot(acts, grads, val_grad, bias_val_grad, segments)
            dtype = grad_dtype or weight_grad.dtype
            return weight_grad.to(dtype), bias_grad.to(dtype), dots
        else:
            weight_grad, dots = torch_path.ghost_wgrad_dot(acts, grads, val_grad, segments, form, grad_dtype)
        if bias_val_grad is None:
            return weight_grad, weight_grad.new_empty(0), dots
        run = _of_rows("row_wgrad_dot", backend, grads, bias_val_grad)
        bias_grad, of_bias = run(None, grads, bias_val_grad, segments)
        return weight_grad, bias_grad.to(weight_grad.dtype), dots + of_bias


@torch.library.custom_op("inrun::ghost_square", mutates_args=())
def ghost_square(acts: Tensor, grads: Tensor, segments: Tensor | None, backend: str | None) -> tuple[Tensor, Tensor]:
    check_segment_values(segments, acts.shape[0] * acts.shape[1])
    with launch_context(acts):
        if use_triton(backend, acts, grads):
            from inrun_kernels.wgrad_dot import launch_wgrad_dot

            squares, _, norms = launch_wgrad_dot(acts, grads, None, None, segments, "two")
            return squares, norms.squeeze(1)
        if use_native(backend, acts, grads) and native.squares_fit(acts, segments):
            return native.ghost_square(acts, grads, segments)
        return torch_path.ghost_square(acts, grads, segments)


@torch.library.custom_op("inrun::ghost_dot_pairwise", mutates_args=())
def ghost_dot_pairwise(acts: Tensor, grads: Tensor, val_acts: Tensor, val_grads: Tensor, backend: str | None) -> Tensor:
    with launch_context(acts):
        form = forms.of_pairwise(acts, grads, val_acts, backend).form
        if form == "pairwise" and use_triton(backend, acts, grads, val_acts, val_grads):
            from inrun_kernels.pairwise import launch_pairwise

            return launch_pairwise(acts, grads, val_acts, val_grads)
        return torch_path.ghost_dot_pairwise(acts, grads, val_acts, val_grads, form)


@torch.library.custom_op("inrun::embedding_dot", mutates_args=())
def embedding_dot(
    ids: Tensor,
    grads: Tensor,
    val_grad: Tensor,
    segments: Tensor | None,
    per_token: bool,
    padding_idx: int | None,
    backend: str | None,
) -> Tensor:
    check_segment_values(segments, ids.numel())
    check_id_values(ids, val_grad.shape[1])
    with launch_context(grads):
        run = _of_rows("embedding_dot", backend, grads, val_grad)
        return run(ids, grads, val_grad, segments, per_token, padding_idx)


@torch.library.custom_op("inrun::row_dot", mutates_args=())
def row_dot(
    normed: Tensor | None,
    grads: Tensor,
    val_grad: Tensor,
    segments: Tensor | None,
    per_token: bool,
    backend: str | None,
) -> Tensor:
    check_segment_values(segments, grads.shape[0] * grads.shape[1])
    with launch_context(grads):
        run = _of_rows("row_dot", backend, grads, normed, val_grad)
        return run(normed, grads, val_grad, segments, per_token)


@torch.library.custom_op("inrun::row_wgrad_dot", mutates_args=())
def row_wgrad_dot(
    normed: Tensor | None, grads: Tensor, val_grad: Tensor, segments: Tensor | None, backend: str | None
) -> tuple[Tensor, Tensor]:
    check_segment_values(segments, grads.shape[0] * grads.shape[1])
    with launch_context(grads):
        run = _of_rows("row_wgrad_dot", backend, grads, normed, val_grad)
        return run(normed, grads, val_grad, segments)


@ghost_dot.register_fake
@embedding_dot.register_fake
@row_dot.register_fake
def _(x, grads, val_grad, segments, per_token, *_):
    return _fake_dots(grads, val_grad, segments, per_token)


@ghost_wgrad_dot.register_fake
def _(acts, grads, val_grad, bias_val_grad, segments, form, grad_dtype, backend):
    weight_grad = acts.new_empty(val_grad.shape[1:], dtype=grad_dtype or accumulate_dtype(acts))
    bias_grad = weight_grad.new_empty(0 if bias_val_grad is None else val_grad.shape[1])
    return weight_grad, bias_grad, _fake_dots(acts, val_grad, segments, False)


@ghost_square.register_fake
def _(acts, grads, segments, backend):
    count, dtype = acts.shape[0] if segments is None else segments.shape[0] - 1, accumulate_dtype(acts)
    return acts.new_empty(grads.shape[2], acts.shape[2], dtype=dtype), acts.new_empty(count, dtype=dtype)


@ghost_dot_pairwise.register_fake
def _(acts, grads, val_acts, val_grads, backend):
    return acts.new_empty(acts.shape[0], val_acts.shape[0], dtype=accumulate_dtype(acts))


@row_wgrad_dot.register_fake
def _(normed, grads, val_grad, segments, backend):
    weight_grad = grads.new_empty(val_grad.shape[1], dtype=accumulate_dtype(grads))
    return weight_grad, _fake_dots(grads, val_grad, segments, False)


def _fake_dots(x: Tensor, val_grad: Tensor, segments: Tensor | None, per_token: bool) -> Tensor:
    if per_token:
        groups = x.shape[:2]
    else:
        groups = (x.shape[0] if segments is None else segments.shape[0] - 1,)
    return x.new_empty((*groups, val_grad.shape[0]), dtype=accumulate_dtype(x))


def _outside_autocast(backward: Callable[..., tuple]) -> Callable[..., tuple]:
    """A derivative in the dtypes that it is written in, wherever it is asked for."""

    def run(ctx: Any, *grads: Tensor | None) -> tuple:
        given = next((x for x in grads if x is not None), None)  # what is saved a checkpoint gives out once
        if given is None:
            return (None,) * len(ctx.needs_input_grad)
        with launch_context(given):
            return backward(ctx, *grads)

    return run


for _op, _tensors, _backward in (
    (ghost_dot, 4, derivatives.of(derivatives.ghost_dot)),
    (ghost_wgrad_dot, 5, derivatives.of(derivatives.ghost_wgrad_dot)),
    (ghost_square, 3, derivatives.ghost_square),
    (ghost_dot_pairwise, 4, derivatives.pairwise),
    (embedding_dot, 4, derivatives.of(derivatives.embedding_dot)),
    (row_dot, 4, derivatives.of(derivatives.row_dot)),
    (row_wgrad_dot, 4, derivatives.of(derivatives.row_wgrad_dot)),
):
    _op.register_autograd(_outside_autocast(_backward), setup_context=partial(derivatives.save, _tensors))


def launch_context(x: Tensor) -> AbstractContextManager[None]:
    """x's GPU current, and no autocast: active inside an op too, it would round float32 products to half."""
    elsewhere = x.is_cuda and x.device.index != torch.cuda.current_device()
    needed = elsewhere or torch.is_autocast_enabled(x.device.type)  # to set both costs as much as a launch
    return _on_its_device_without_autocast(x) if needed else nullcontext()


@contextmanager
def _on_its_device_without_autocast(x: Tensor) -> Iterator[None]:
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        yield


def use_triton(backend: str | None, *tensors: Tensor) -> bool:
    """Whether to run the Triton kernels. Empty input needs no kernel; what is asked for and impossible raises."""
    x = tensors[0]
    if backend == "torch":
        return False
    if backend is None and (not x.is_cuda or not _HAS_TRITON or x.dtype == torch.float64):
        return False
    if not _HAS_TRITON:
        raise RuntimeError("backend: expected triton to be installed for backend='triton', found no such package")
    if x.dtype == torch.float64:
        raise TypeError("backend: expected 'torch' for torch.float64 input, received 'triton'")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"backend: expected 'torch' for tensors on {x.device} (or TRITON_INTERPRET=1 in the environment "
            "before triton is imported, to interpret the kernels), received 'triton'"
        )
    return all(tensor.numel() for tensor in tensors)


def _of_rows(name: str, backend: str | None, grads: Tensor, *others: Tensor | None) -> Callable[..., Any]:
    """The product of this name in `rows` (Triton), `native` (C) or `torch_path`, whichever is to run."""
    if use_triton(backend, grads):
        from inrun_kernels import rows

        return getattr(rows, f"launch_{name}")
    return getattr(native if use_native(backend, grads, *others) else torch_path, name)


def layer_wgrad_dot(
    acts: Tensor, grads: Tensor, val_grad: Tensor, bias_val_grad: Tensor | None, grad_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """The op for whole samples and a layer's own operands, on a GPU or a CPU that has the kernels in C; None for all
    others.

    Directions may lack their leading M, of which the dots then have none either; gradients come in float32 or in
    `grad_dtype`. After each large product on a CPU the caches hold nothing of the interpreter's, and a GPU may be
    through before the next launch: every Python function and every tensor's method that is not called here saves
    microseconds.
    """
    if use_triton(None, acts, grads):
        operands = (acts, grads, val_grad) if bias_val_grad is None else (acts, grads, val_grad, bias_val_grad)
        if not unseen(*operands):
            return None
        from inrun_kernels.wgrad_dot import launch_layer

        with launch_context(acts):
            return launch_layer(acts, grads, val_grad, bias_val_grad, grad_dtype)
    if not (forms.for_c(acts, None) and unseen() and native.runs(acts, grads, val_grad, bias_val_grad)):
        return None
    if not agree(acts, grads, val_grad, bias_val_grad):
        return None
    (batch, tokens, inputs), shape = acts.shape, val_grad.shape
    sizes = batch * tokens, batch, inputs, shape[-2], shape[0] if len(shape) == 3 else 1
    if forms.of_cpu_sizes(True, *sizes).form == "two":
        return native.ghost_wgrad_dot(acts, grads, val_grad, bias_val_grad, None)
    directions = val_grad if len(shape) == 3 else val_grad[None]
    with launch_context(acts):
        weight_grad, dots = torch_path.ghost_wgrad_dot(acts, grads, directions, None, "direct", grad_dtype)
    dots = dots if len(shape) == 3 else dots.squeeze(1)
    if bias_val_grad is None:
        return weight_grad, weight_grad.new_empty(0), dots
    bias_grad, of_bias = native.row_wgrad_dot(None, grads, bias_val_grad, None)
    return weight_grad, bias_grad, dots + of_bias


def use_native(backend: str | None, *tensors: Tensor | None) -> bool:
    """Whether to run the kernels in C: on a CPU, unless a backend was named."""
    return backend is None and native.runs(*tensors)
