"""The public functions: each validates what it was given and makes one call of its registered op.

Throughout, B is the batch size, T tokens per sample, I inputs, O outputs, M directions, S segments; inputs are
float32, float16, bfloat16, or float64 (torch path only). Sums are kept in float32 (float64 for float64) and
results come in that type; products of float32 are exact, but on a GPU for which torch is told to take TF32
(`torch.set_float32_matmul_precision`). The unit of a dot is the loss's unit times the direction's: with the direction
`lr * g_v`, a dot is the sample's first-order contribution in nats, positive where it lowered the loss.
Any strides are accepted. An empty batch gives an empty result, a sample without tokens zero.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from inrun_kernels import forms, ops
from inrun_kernels.validation import (
    as_padding,
    check_backend,
    check_direction,
    check_form,
    check_grad_dtype,
    check_grouping,
    check_ids,
    check_tokens,
    check_width,
)


def ghost_dot(
    acts: Tensor,
    grads: Tensor,
    val_grad: Tensor,
    *,
    segments: Tensor | None = None,
    per_token: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Dot of every sample's linear-layer weight gradient with a direction, without forming that gradient.

        dots[b] = <grads_b^T acts_b, val_grad> = sum_{t,o} (acts @ val_grad^T)[b,t,o] * grads[b,t,o]

    2*B*T*I*O FLOPs per direction; reads acts, grads and val_grad once, writes B (or B*T) numbers. (In C on a CPU
    2*B*T*I*O for all directions, and a scratch weight.)

    Args:
        acts: `[B, T, I]`, the layer's input.
        grads: `[B, T, O]`, the loss's gradient at the layer's output; dtype of `acts`.
        val_grad: `[O, I]`, the direction, shaped like the weight; or `[M, O, I]` for M directions. Dtype of
            `acts`, or float32 with 16-bit ones, which in Triton is rounded to them (of float16 after scaling).
        segments: int32 or int64 `[S + 1]` offsets into the B*T flattened tokens, from 0 to B*T, never
            decreasing (as `cu_seqlens`): one dot per segment in place of one per row.
        per_token: one dot per token. Excludes `segments`.
        backend: "triton", "torch", or None: triton for CUDA tensors where it is installed; on a CPU the kernels in C
            where they can be built (`native`; `ghost_dot` in bfloat16, of several directions, which take one product
            there, and on AMD's Zen 5, where they multiply quicker than BLAS; no pairs); else torch.

    Returns:
        `[B]`, `[S]` with segments, `[B, T]` with per_token; one more trailing axis M where val_grad has it.

    Raises:
        TypeError, ValueError: names the argument, what was expected and what was received.

    Source: arXiv 2406.11011, section 4.2 and appendix D ("ghost dot-product").

    Example:
        >>> dots = ghost_dot(torch.randn(8, 256, 64), torch.randn(8, 256, 32), torch.randn(32, 64))
        >>> dots.shape
        torch.Size([8])
    """
    _check_linear(acts, grads, val_grad, segments, per_token, backend)
    dots = ops.call(ops.ghost_dot, acts, grads, _with_m(val_grad, 3), segments, per_token, backend)
    return dots if val_grad.dim() == 3 else dots.squeeze(-1)


def ghost_wgrad_dot(
    acts: Tensor,
    grads: Tensor,
    val_grad: Tensor,
    *,
    segments: Tensor | None = None,
    form: str | None = None,
    grad_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The weight gradient of a linear layer and, from the same pass, every sample's dot with a direction.

        weight_grad = sum_b grads_b^T acts_b        dots[b] = <grads_b^T acts_b, val_grad>

    2*B*T*I*O FLOPs for the gradient, 2*S*M*I*O more for the dots (T times fewer); the bytes of the weight
    gradient GEMM, and val_grad once per sample, mostly from cache. A tile of one sample's gradient exists at a
    time, in registers (on the torch path, one scratch weight).

    Args, Raises, Source: as `ghost_dot`; there is no per_token.
        form: how samples are kept apart. "two" accumulators: a dot's error is relative to the sample's own terms,
            whatever else is in the batch. "prefix", faster on large tiles: a dot is the difference of two running sums,
            so its error is relative to the terms of all samples up to it: one float32 rounding (6e-8) of those for each
            16 of the sample's tokens (on the CPU 2e-6 to 1e-5 of a typical dot where they are alike), on tensor cores
            towards zero, so that they add up; and a sample that is not finite makes all later dots NaN. "direct": one
            GEMM and a `ghost_dot`, for samples of few tokens; errors as in "two", and from rounding a float32
            direction. The weight gradient is equally exact in all. None: what `explain` says. On a GPU "two", or
            "prefix" where its larger tiles are 10 % quicker by a model (never in float32); "direct" for documents of
            fewer than 32 tokens. On a CPU the quicker of "two" and "direct"; of one sample, "prefix" is the plain
            product and a dot as well.
        grad_dtype: of the weight gradient: float16 or bfloat16 for float16 and bfloat16 `acts`, rounded once as it
            is written; None: float32, or float64 for float64 `acts`.

    Returns:
        `(weight_grad [O, I], dots)`, dots as in `ghost_dot`.

    Example:
        >>> weight_grad, dots = ghost_wgrad_dot(acts, grads, val_grad)
        >>> torch.testing.assert_close(dots.sum(), (weight_grad * val_grad).sum())
    """
    if (found := _short(acts, grads, val_grad, None, segments, form, grad_dtype, backend)) is not None:
        return found[0], found[2]
    _check_linear(acts, grads, val_grad, segments, False, backend)
    check_form(form)
    check_grad_dtype(grad_dtype, acts)
    operands = acts, grads, _with_m(val_grad, 3), None
    weight_grad, _, dots = ops.call(ops.ghost_wgrad_dot, *operands, segments, form, grad_dtype, backend)
    return weight_grad, dots if val_grad.dim() == 3 else dots.squeeze(-1)


def linear_wgrad_dot(
    acts: Tensor,
    grads: Tensor,
    val_grad: Tensor,
    bias_val_grad: Tensor,
    *,
    segments: Tensor | None = None,
    form: str | None = None,
    grad_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`ghost_wgrad_dot` of a layer with a bias: both gradients, and dots that count both parameters.

    Args: as `ghost_wgrad_dot`; `bias_val_grad` `[O]`, or `[M, O]` for M directions: the bias's direction; `grad_dtype`
        of both gradients.

    Returns: `(weight_grad [O, I], bias_grad [O], dots)`.

    Example:
        >>> weight_grad, bias_grad, dots = linear_wgrad_dot(acts, grads, val_grad, bias_val_grad)
    """
    if bias_val_grad is None:
        raise TypeError("bias_val_grad: expected a torch.Tensor, received None; without a bias: ghost_wgrad_dot")
    if (found := _short(acts, grads, val_grad, bias_val_grad, segments, form, grad_dtype, backend)) is not None:
        return found
    _check_linear(acts, grads, val_grad, segments, False, backend)
    check_direction(bias_val_grad, acts, (grads.shape[2],), "[outputs]", "bias_val_grad")
    check_form(form)
    check_grad_dtype(grad_dtype, acts)
    directions = _with_m(val_grad, 3), _with_m(bias_val_grad, 2)
    if len(directions[0]) != len(directions[1]):
        raise ValueError(f"bias_val_grad: expected M = {len(directions[0])}, as val_grad, got {len(directions[1])}")
    operands = acts, grads, *directions
    weight_grad, bias_grad, dots = ops.call(ops.ghost_wgrad_dot, *operands, segments, form, grad_dtype, backend)
    return weight_grad, bias_grad, dots if val_grad.dim() == 3 else dots.squeeze(-1)


def ghost_square(
    acts: Tensor, grads: Tensor, *, segments: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The samples' squared weight gradients added up, and each one's squared norm, in one pass.

        squares = sum_b (grads_b^T acts_b)^2, each element squared        norms[b] = |grads_b^T acts_b|^2

    2*B*T*I*O FLOPs, those of the weight gradient, and 3*S*I*O to square and add; the bytes of its GEMM. A tile of one
    sample's gradient exists at a time, in registers (on the torch path, a block of one that stays in cache). They are
    the second moment of the samples' gradients (the diagonal of the empirical Fisher matrix, and what a gradient noise
    scale is made of), and the norms that clipping by sample goes by.

    Args, Raises: as `ghost_dot`; there is neither a direction nor per_token.
        backend: None takes on a CPU the kernels in C for samples of 2 to 512 tokens, else torch.

    Returns:
        `(squares [O, I], norms [B], or [S] with segments)`, float32, or float64 for float64 input. A norm's error is
        relative to the sample's own terms.

    Source: norms by sample, Goodfellow, arXiv 1510.01799, where tokens are one; to square tile by tile is this
    library's.

    Example:
        >>> squares, norms = ghost_square(acts, grads)
        >>> torch.testing.assert_close(norms.sum(), squares.sum())
    """
    check_tokens("acts", acts)
    check_tokens("grads", grads, acts, "acts")
    check_grouping(segments, False, acts)
    check_backend(backend)
    return ops.call(ops.ghost_square, acts, grads, segments, backend)


def ghost_dot_pairwise(
    acts: Tensor, grads: Tensor, val_acts: Tensor, val_grads: Tensor, *, backend: str | None = None
) -> Tensor:
    """Dot of every sample's weight gradient with every validation sample's, from activations alone.

        dots[b, v] = sum_{t,s} (acts[b,t] . val_acts[v,s]) * (grads[b,t] . val_grads[v,s])

    2*B*T*V*S*(I+O) FLOPs: cheaper than `ghost_dot` where V*S < I*O/(I+O). Tiled like attention: no matrix of
    token pairs is stored. Where samples are too long for that, gradients are formed (`explain` says which way is
    taken): a validation sample's and its `ghost_dot`, or those of all samples on both sides, some rows of the weight at
    a time, and one product of them, 2*(B*T + V*S + B*V)*I*O FLOPs.

    Args:
        acts: `[B, T, I]`.  grads: `[B, T, O]`.
        val_acts: `[V, S, I]`.  val_grads: `[V, S, O]`. All of one dtype.
        backend: as in `ghost_dot`.

    Returns:
        `[B, V]`.

    Raises, Source: as `ghost_dot`.

    Example:
        >>> dots = ghost_dot_pairwise(acts, grads, val_acts, val_grads)
        >>> dots.sum(1)      # equals ghost_dot with the summed validation gradient
    """
    _check_pairs(acts, grads, val_acts, val_grads, backend)
    return ops.call(ops.ghost_dot_pairwise, acts, grads, val_acts, val_grads, backend)


def explain(
    product: Callable, *args: Tensor, segments: Tensor | None = None, backend: str | None = None
) -> forms.Choice:
    """Which form a product takes of itself for these arguments, and why.

    Args:
        product: `ghost_wgrad_dot` or `ghost_dot_pairwise`.
        args, segments, backend: as it would be called. Only shapes, dtypes and devices are looked at.

    Returns:
        The `form`, the predicted `seconds` of each, and the `reason` in words.

    Raises:
        TypeError, ValueError: as the product; another product.

    Example:
        >>> explain(ghost_wgrad_dot, acts, grads, val_grad).reason
        'two: predicted 15.4 ms, others direct 29.8'
    """
    if product is ghost_wgrad_dot:
        acts, grads, val_grad = _arguments(product, args, 3)
        _check_linear(acts, grads, val_grad, segments, False, backend)
        triton = ops.use_triton(backend, acts, grads)
        built = forms.for_c(acts, segments) and ops.use_native(backend, acts, grads, val_grad)
        return forms.of_wgrad_dot(acts, grads, _with_m(val_grad, 3), segments, triton, built)
    if product is ghost_dot_pairwise:
        acts, grads, val_acts, val_grads = _arguments(product, args, 4)
        if segments is not None:
            raise ValueError("segments: expected None for ghost_dot_pairwise, which takes none, received a tensor")
        _check_pairs(acts, grads, val_acts, val_grads, backend)
        ops.use_triton(backend, acts, grads, val_acts, val_grads)  # what is impossible raises
        return forms.of_pairwise(acts, grads, val_acts, backend)
    raise ValueError(f"product: expected ghost_wgrad_dot or ghost_dot_pairwise, received {product!r}")


def embedding_dot(
    ids: Tensor,
    grads: Tensor,
    val_grad: Tensor,
    *,
    segments: Tensor | None = None,
    per_token: bool = False,
    padding_idx: int | None = None,
    backend: str | None = None,
) -> Tensor:
    """Dot of every sample's embedding-table gradient with a direction.

        dots[b] = sum_t <val_grad[ids[b,t]], grads[b,t]>       (tokens equal to padding_idx count for nothing)

    2*B*T*I FLOPs per direction; reads grads once and one row of val_grad per token.

    Args:
        ids: int32 or int64 `[B, T]`, from 0 to V - 1.
        grads: `[B, T, I]`, the loss's gradient at the embedding's output.
        val_grad: `[V, I]` or `[M, V, I]`; dtype of `grads`, or float32 with 16-bit ones.
        padding_idx: the id, from 0 to V - 1, whose row gets no gradient, as in `torch.nn.Embedding`.
        segments, per_token, backend: as in `ghost_dot`.

    Returns, Raises: as `ghost_dot`.

    Example:
        >>> dots = embedding_dot(ids, grads, val_grad, padding_idx=0)
    """
    check_tokens("grads", grads)
    check_ids(ids, grads)
    check_direction(val_grad, grads, (None, grads.shape[2]), "[vocabulary, features]")
    padding_idx = as_padding(padding_idx, val_grad.shape[-2])
    check_grouping(segments, per_token, grads)
    check_backend(backend)
    table = _with_m(val_grad, 3)
    dots = ops.call(ops.embedding_dot, ids, grads, table, segments, per_token, padding_idx, backend)
    return dots if val_grad.dim() == 3 else dots.squeeze(-1)


def norm_dot(
    normed: Tensor,
    grads: Tensor,
    val_grad: Tensor,
    *,
    segments: Tensor | None = None,
    per_token: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Dot of every sample's norm-weight gradient (LayerNorm, RMSNorm) with a direction.

        dots[b] = sum_{t,i} normed[b,t,i] * grads[b,t,i] * val_grad[i]

    3*B*T*I FLOPs per direction; reads normed and grads once.

    Args:
        normed: `[B, T, I]`, the normalised input before the affine map.
        grads: `[B, T, I]`, the loss's gradient at the norm's output; dtype of `normed`.
        val_grad: `[I]` or `[M, I]`; dtype of `grads`, or float32 with 16-bit ones.
        segments, per_token, backend: as in `ghost_dot`.

    Returns, Raises: as `ghost_dot`.

    Example:
        >>> dots = norm_dot(normed, grads, val_grad)
    """
    _check_rows(grads, val_grad, segments, per_token, backend, normed)
    dots = ops.call(ops.row_dot, normed, grads, _with_m(val_grad, 2), segments, per_token, backend)
    return dots if val_grad.dim() == 2 else dots.squeeze(-1)


def norm_wgrad_dot(
    normed: Tensor, grads: Tensor, val_grad: Tensor, *, segments: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The norm-weight gradient `[I]`, and from the same pass the dots of `norm_dot`.

    Example:
        >>> weight_grad, dots = norm_wgrad_dot(normed, grads, val_grad)
    """
    _check_rows(grads, val_grad, segments, False, backend, normed)
    weight_grad, dots = ops.call(ops.row_wgrad_dot, normed, grads, _with_m(val_grad, 2), segments, backend)
    return weight_grad, dots if val_grad.dim() == 2 else dots.squeeze(-1)


def bias_dot(
    grads: Tensor,
    val_grad: Tensor,
    *,
    segments: Tensor | None = None,
    per_token: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Dot of every sample's bias gradient with a direction: `dots[b] = sum_{t,o} grads[b,t,o] * val_grad[o]`.

    2*B*T*O FLOPs per direction; reads grads once.

    Args:
        grads: `[B, T, O]`, the loss's gradient where the bias is added.
        val_grad: `[O]` or `[M, O]`; dtype of `grads`, or float32 with 16-bit ones.
        segments, per_token, backend: as in `ghost_dot`.

    Returns, Raises: as `ghost_dot`.

    Example:
        >>> dots = bias_dot(grads, val_grad)
    """
    _check_rows(grads, val_grad, segments, per_token, backend)
    dots = ops.call(ops.row_dot, None, grads, _with_m(val_grad, 2), segments, per_token, backend)
    return dots if val_grad.dim() == 2 else dots.squeeze(-1)


def bias_wgrad_dot(
    grads: Tensor, val_grad: Tensor, *, segments: Tensor | None = None, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """The bias gradient `[O]`, and from the same pass the dots of `bias_dot`.

    Example:
        >>> bias_grad, dots = bias_wgrad_dot(grads, val_grad)
    """
    _check_rows(grads, val_grad, segments, False, backend)
    bias_grad, dots = ops.call(ops.row_wgrad_dot, None, grads, _with_m(val_grad, 2), segments, backend)
    return bias_grad, dots if val_grad.dim() == 2 else dots.squeeze(-1)


def _short(acts, grads, val_grad, bias_val_grad, segments, form, grad_dtype, backend):
    """What `ops.layer_wgrad_dot` has for the plainest of calls; None for all others, and where anything is wrong."""
    operands = (acts, grads, val_grad) if bias_val_grad is None else (acts, grads, val_grad, bias_val_grad)
    for x in operands:
        if not (isinstance(x, Tensor) and x.is_cpu) or x.is_nested:
            return None
    if not (segments is form is backend is None and grad_dtype in (None, torch.float32) and ops.unseen(*operands)):
        return None
    if acts.dim() != 3 or grads.dim() != 3 or acts.shape[:2] != grads.shape[:2] or acts.dtype is not grads.dtype:
        return None
    return ops.layer_wgrad_dot(acts, grads, val_grad, bias_val_grad, torch.float32)


def _arguments(product: Callable, args: tuple[Tensor, ...], count: int) -> tuple[Tensor, ...]:
    if len(args) != count:
        raise TypeError(f"args: expected the {count} tensors of {product.__name__}, received {len(args)}")
    return args


def _check_linear(acts, grads, val_grad, segments, per_token, backend) -> None:
    check_tokens("acts", acts)
    check_tokens("grads", grads, acts, "acts")
    check_direction(val_grad, acts, (grads.shape[2], acts.shape[2]), "[outputs, inputs]")
    check_grouping(segments, per_token, acts)
    check_backend(backend)


def _check_pairs(acts, grads, val_acts, val_grads, backend) -> None:
    check_tokens("acts", acts)
    check_tokens("grads", grads, acts, "acts")
    check_tokens("val_acts", val_acts)
    check_tokens("val_grads", val_grads, val_acts, "val_acts")
    check_width("val_acts", val_acts, "acts", acts)
    check_width("val_grads", val_grads, "grads", grads)
    check_backend(backend)


def _check_rows(grads, val_grad, segments, per_token, backend, *of_norm) -> None:
    check_tokens("grads", grads)
    for normed in of_norm:
        check_tokens("normed", normed, grads, "grads")
        check_width("normed", normed, "grads", grads)
    check_direction(val_grad, grads, (grads.shape[2],), "[features]")
    check_grouping(segments, per_token, grads)
    check_backend(backend)


def _with_m(val_grad: Tensor, dims: int) -> Tensor:
    return val_grad if val_grad.dim() == dims else val_grad.unsqueeze(0)
