"""The yardstick: torch's own autograd, in float64, one sample at a time; and the bound every result must meet.

A weight is built, the layer is run on one sample's tokens, autograd returns that sample's gradient, and the
gradient is contracted with each direction. Nothing here shares code with the package.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

import inrun_kernels as k

PADDING = 1
LAYERS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "linear": lambda weight, x, grads: F.linear(x, weight),
    "embedding": lambda weight, ids, grads: F.embedding(ids, weight, padding_idx=PADDING),
    "norm": lambda weight, normed, grads: normed * weight,
    "bias": lambda weight, _, grads: weight.expand_as(grads),
}
DOTS = {
    "linear": k.ghost_dot,
    "embedding": lambda x, g, d, **kw: k.embedding_dot(x, g, d, padding_idx=PADDING, **kw),
    "norm": k.norm_dot,
    "bias": lambda x, g, d, **kw: k.bias_dot(g, d, **kw),
}
WGRAD_DOTS = {
    "linear": k.ghost_wgrad_dot,
    "norm": k.norm_wgrad_dot,
    "bias": lambda x, g, d, **kw: k.bias_wgrad_dot(g, d, **kw),
}


@dataclass(frozen=True)
class Case:
    """Inputs of one product. `x`: acts, ids, normed input, or (bias) unused; `segments` or `per_token` or neither."""

    layer: str
    x: Tensor
    grads: Tensor
    val_grad: Tensor
    segments: Tensor | None = None
    per_token: bool = False

    @property
    def n_directions(self) -> int | None:
        dims = 2 if self.layer in ("linear", "embedding") else 1
        return None if self.val_grad.dim() == dims else len(self.val_grad)

    def bounds(self) -> list[int]:
        batch, tokens = self.grads.shape[:2]
        if self.segments is not None:
            return self.segments.tolist()
        step = 1 if self.per_token else tokens
        return [step * i for i in range((batch * tokens if self.per_token else batch) + 1)]

    def shape(self) -> tuple[int, ...]:
        groups = self.grads.shape[:2] if self.per_token else (len(self.bounds()) - 1,)
        return (*groups, *(() if self.n_directions is None else (self.n_directions,)))


def gradients(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Each sample's weight gradient, from autograd in `dtype`."""
    flat_x = case.x.flatten(0, 1)
    flat_x = flat_x.to(dtype) if flat_x.is_floating_point() else flat_x
    flat_grads = case.grads.to(dtype).flatten(0, 1)
    shape = case.val_grad.shape if case.n_directions is None else case.val_grad.shape[1:]
    found = []
    for low, high in pairwise(case.bounds()):
        weight = flat_grads.new_zeros(shape).requires_grad_()
        g = flat_grads[low:high]
        found.append(torch.autograd.grad(LAYERS[case.layer](weight, flat_x[low:high], g), weight, g)[0])
    return found


def dots_of(case: Case, dtype: torch.dtype) -> Tensor:
    """`<gradient, direction>` per sample and direction, in `dtype`; returned in float64."""
    directions = (case.val_grad if case.n_directions is not None else case.val_grad[None]).to(dtype)
    rows = [torch.stack([(g * d).sum() for d in directions]) for g in gradients(case, dtype) if len(directions)]
    stacked = torch.stack(rows) if rows else directions.new_zeros(len(case.bounds()) - 1, len(directions))
    return stacked.double().reshape(case.shape())


def gradient_of(case: Case, dtype: torch.dtype) -> Tensor:
    """The whole batch's weight gradient by autograd in `dtype`; returned in float64."""
    whole = replace(case, segments=torch.tensor([0, case.grads.shape[0] * case.grads.shape[1]]), per_token=False)
    return gradients(whole, dtype)[0].double()


def squares_of(case: Case, dtype: torch.dtype) -> Tensor:
    """The samples' squared gradients added up, each by autograd in `dtype`; returned in float64."""
    found = [g.double().square() for g in gradients(case, dtype)]
    return torch.stack(found).sum(0) if found else gradient_of(case, torch.float64)


def norms_of(case: Case, dtype: torch.dtype) -> Tensor:
    """Each sample's squared norm, as in `squares_of`."""
    found = [g.double().square().sum() for g in gradients(case, dtype)]
    return torch.stack(found) if found else torch.zeros(0, dtype=torch.float64)


def absolute(case: Case) -> Case:
    """The case with every number's sign removed: its result bounds the sum of the terms' magnitudes."""
    x = case.x.abs() if case.x.is_floating_point() else case.x
    return replace(case, x=x, grads=case.grads.abs(), val_grad=case.val_grad.abs())


def assert_close(found: Tensor, compute: Callable[[Case, torch.dtype], Tensor], case: Case) -> None:
    """Error against float64 at most twice that of the same computation in the inputs' dtype, plus rounding."""
    dtype = case.grads.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exact = compute(case, torch.float64)
    assert found.dtype == wide, f"result is {found.dtype}"
    assert found.shape == exact.shape and found.is_contiguous()
    if exact.numel():
        plain = (compute(case, dtype) - exact).abs().max().item()
        rounding = 4 * torch.finfo(wide).eps * compute(absolute(case), torch.float64).max().item()
        error = (found.double() - exact).abs().max().item()
        assert error <= 2 * plain + rounding, f"error {error:.3g}, plain {plain:.3g}, rounding {rounding:.3g}"


def check(case: Case, backend: str | None) -> None:
    """Every product of the case's layer, against autograd."""
    options = {"segments": case.segments, "backend": backend}
    dots = DOTS[case.layer](case.x, case.grads, case.val_grad, per_token=case.per_token, **options)
    assert_close(dots, dots_of, case)
    if case.layer in WGRAD_DOTS and not case.per_token:
        weight_grad, dots = WGRAD_DOTS[case.layer](case.x, case.grads, case.val_grad, **options)
        assert_close(dots, dots_of, case)
        assert_close(weight_grad, gradient_of, case)
    if case.layer == "linear" and not case.per_token:
        squares, norms = k.ghost_square(case.x, case.grads, **options)
        assert_close(squares, squares_of, case)
        assert_close(norms, norms_of, case)


def in_form(form: str, case: Case, backend: str | None = "triton") -> tuple[torch.Tensor, torch.Tensor]:
    return k.ghost_wgrad_dot(case.x, case.grads, case.val_grad, segments=case.segments, form=form, backend=backend)


def check_form(form: str, case: Case, backend: str | None = "triton") -> None:
    """The weight gradient and `two`'s dots as everywhere; `prefix` may round each sum of the whole batch's terms.

    With a bias they are the same to rounding, and what differs in the dots is the bias's own, by autograd.
    """
    weight_grad, dots = in_form(form, case, backend)
    assert_close(weight_grad, gradient_of, case)
    bias = replace(case, layer="bias", val_grad=case.val_grad[..., 0].contiguous())
    arguments = (case.x, case.grads, case.val_grad, bias.val_grad)
    options = {"segments": case.segments, "form": form, "backend": backend}
    same_weight_grad, bias_grad, both = k.linear_wgrad_dot(*arguments, **options)
    assert torch.equal(same_weight_grad, weight_grad)
    assert_close(bias_grad, gradient_of, bias)
    of_bias = dots_of(bias, torch.float64)
    rounding = dots_of(absolute(case), torch.float64).sum(0) + dots_of(absolute(bias), torch.float64).sum(0)
    assert ((both - dots - of_bias).abs() <= 4 * torch.finfo(torch.float32).eps * rounding).all()
    if case.x.dtype != torch.float32:
        *rounded, same_dots = k.linear_wgrad_dot(*arguments, **options, grad_dtype=case.x.dtype)
        assert torch.equal(same_dots, both)
        for gradient, wide in zip(rounded, (weight_grad, bias_grad), strict=True):
            assert gradient.dtype == case.x.dtype and gradient.is_contiguous()
            torch.testing.assert_close(gradient.float(), wide, rtol=torch.finfo(case.x.dtype).eps, atol=1e-6)
    if form != "prefix":
        return assert_close(dots, dots_of, case)
    exact, terms = dots_of(case, torch.float64), dots_of(absolute(case), torch.float64).sum(0)
    plain = (dots_of(case, case.grads.dtype) - exact).abs().max()
    assert ((dots - exact).abs() <= 2 * plain + 4 * torch.finfo(torch.float32).eps * terms).all()


@contextmanager
def tf32() -> Iterator[None]:
    """Torch told to multiply float32 in TF32 on a GPU."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def make(
    layer: str,
    batch: int,
    tokens: int,
    inputs: int,
    outputs: int,
    *,
    directions: int | None = None,
    dtype: torch.dtype = torch.float32,
    wide_direction: bool = False,
    layout: Callable[[Tensor], Tensor] = lambda x: x,
    device: str = "cpu",
    seed: int = 0,
    **kwargs,
) -> Case:
    """A random case. The direction is representable in `dtype`, so that casting it costs nothing."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    vocabulary = max(outputs, PADDING + 1)
    shape = {"linear": (outputs, inputs), "embedding": (vocabulary, inputs)}.get(layer, (inputs,))
    grads = layout(rand(batch, tokens, outputs if layer == "linear" else inputs))
    x = layout(rand(batch, tokens, inputs))
    if layer == "embedding":
        x = layout(torch.randint(vocabulary, (batch, tokens, 1), generator=generator))[..., 0]
    val_grad = rand(*(shape if directions is None else (directions, *shape)))
    val_grad = val_grad.float() if wide_direction and dtype != torch.float64 else val_grad
    case = Case(layer, x, grads, val_grad, **kwargs)
    moved = {name: value.to(device) for name, value in vars(case).items() if isinstance(value, Tensor)}
    return replace(case, **moved) if device != "cpu" else case


def norm(
    lengths: list[int],
    width: int,
    directions: int,
    *,
    layer: bool,
    bias: bool,
    missing: int | None = None,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> tuple[tuple, list[Tensor | None]]:
    """Arguments of `norm_backward` for documents of these lengths in one row, and what autograd makes of them.

    Args:
        layer: layer norm, else RMS norm; `missing`: 0 without a direction of the weight, 1 without one of the bias.
    """
    generator, eps = torch.Generator().manual_seed(seed), 1e-5

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    # Features of different levels: in a row of three that are nearly alike float32 knows no variance.
    x = draw(1, sum(lengths), width) + torch.linspace(-3, 5, width, device=device, dtype=dtype)
    grads = draw(1, sum(lengths), width)
    weight, shift = draw(width), draw(width)
    pair = [None if i == missing else draw(directions, width).float() for i in (0, 1)]
    ends = torch.tensor([0, *lengths], device=device).cumsum(0)
    leaves = [y.double().requires_grad_() for y in (x, weight, shift)]

    def run(low: int, high: int) -> None:
        part = leaves[0][:, low:high]
        normed = F.layer_norm(part, (width,), eps=eps) if layer else F.rms_norm(part, (width,), eps=eps)
        (normed * leaves[1] + leaves[2]).backward(grads[:, low:high].double())

    dots = []
    for low, high in pairwise(ends.tolist()):
        leaves[1].grad = leaves[2].grad = None
        if high > low:
            run(low, high)
        of_sample = [torch.zeros_like(y) if y.grad is None else y.grad for y in leaves[1:]]
        terms = [d.double() @ g for d, g in zip(pair, of_sample, strict=True) if d is not None]
        dots.append(sum(terms[1:], terms[0]))
    for leaf in leaves:
        leaf.grad = None
    run(0, sum(lengths))
    wide = leaves[0].detach()
    mean, rstd = wide.mean(-1, keepdim=True), (wide.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    stats = (mean.float(), rstd.float()) if layer else eps
    grad_x, grad_weight, grad_bias = (leaf.grad for leaf in leaves)
    expected = [grad_x, grad_weight, grad_bias if bias else None, torch.stack(dots)]
    return (x, grads, weight, stats, *pair, ends, bias), expected


def assert_norm_close(found: tuple, expected: list[Tensor | None]) -> None:
    """Within float32's rounding of sums of some thousand terms; a gradient of the input in half is rounded once."""
    for got, right in zip(found, expected, strict=True):
        assert (got is None) == (right is None)
        if got is not None and right is not None:
            size = right.square().mean().sqrt()
            rounding = 0 if got.dtype == torch.float32 else torch.finfo(got.dtype).eps
            assert ((got.double() - right).abs() <= 2e-5 * size + rounding * right.abs() + 1e-30).all()
