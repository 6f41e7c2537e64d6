"""The real kernels on a real GPU: autograd's numbers at real sizes, the same bits twice, no synchronisation."""

from dataclasses import replace

import pytest
import torch
from oracle import (
    LAYERS,
    WGRAD_DOTS,
    assert_close,
    assert_norm_close,
    check,
    check_form,
    make,
    norm,
    norms_of,
    squares_of,
    tf32,
)

import inrun_kernels as k

pytestmark = pytest.mark.gpu
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 1, 1), (3, 17, 33, 65), (4, 128, 256, 128), (5, 100, 129, 257), (8, 512, 768, 1024)]
GROUPINGS = {"rows": {}, "tokens": {"per_token": True}, "segments": {}}


@pytest.mark.parametrize("grouping", list(GROUPINGS))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", list(LAYERS))
def test_kernels_match_autograd(layer, dtype, shape, grouping):
    batch, tokens, inputs, outputs = shape
    if grouping == "tokens" and batch * tokens > 500:
        tokens = 500 // batch
    options = dict(GROUPINGS[grouping])
    if grouping == "segments":
        n = batch * tokens
        options["segments"] = torch.tensor([0, n // 3, n // 3, n // 3 + 1 if n > 1 else n, n])
    for layout in (lambda x: x, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)):
        case = make(layer, *shape[:1], tokens, inputs, outputs, directions=2, dtype=dtype, layout=layout,
                    wide_direction=True, device="cuda", **options)  # fmt: skip
        check(case, "triton")
        check(case, "torch")


@pytest.mark.parametrize("segments", [None, torch.tensor([0, 0, 700, 900, 2048])])
@pytest.mark.parametrize("directions", [None, 2])
@pytest.mark.parametrize("outputs", [384, 257])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", ["two", "prefix", "direct"])
def test_forms_match_autograd(form, dtype, outputs, directions, segments):
    """With biases and half-precision gradients; directions that wait in shared memory, odd widths that are copied."""
    for wide in (False, True):
        case = make("linear", 8, 256, 256, outputs, directions=directions, dtype=dtype, wide_direction=wide,
                    segments=segments, device="cuda")  # fmt: skip
        check_form(form, case)


@pytest.mark.parametrize("segments", [None, torch.tensor([0, 0, 700, 900, 2048])])
@pytest.mark.parametrize("outputs", [384, 257])
@pytest.mark.parametrize("dtype", DTYPES)
def test_squares_match_autograd(dtype, outputs, segments):
    case = make("linear", 8, 256, 256, outputs, dtype=dtype, segments=segments, device="cuda")
    squares, norms = k.ghost_square(case.x, case.grads, segments=case.segments)
    assert_close(squares, squares_of, case)
    assert_close(norms, norms_of, case)


@pytest.mark.parametrize("val_tokens", [5, 60, 200])
@pytest.mark.parametrize("inputs, outputs", [(129, 257), (256, 384)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pairwise_matches_ghost_dot(dtype, inputs, outputs, val_tokens):
    train = make("linear", 5, 100, inputs, outputs, dtype=dtype, device="cuda")
    val = make("linear", 3, val_tokens, inputs, outputs, dtype=dtype, device="cuda", seed=1)
    exact = k.ghost_dot_pairwise(*(x.double() for x in (train.x, train.grads, val.x, val.grads)))
    scale = k.ghost_dot_pairwise(*(x.double().abs() for x in (train.x, train.grads, val.x, val.grads)))
    for backend in (None, "triton"):  # gradients may be formed; and the kernel
        found = k.ghost_dot_pairwise(train.x, train.grads, val.x, val.grads, backend=backend)
        assert ((found - exact).abs() <= 1e-6 * scale).all()


@pytest.mark.parametrize("form", ["two", "prefix", "direct"])
def test_tf32_where_torch_is_told_to(form):
    """As exact as torch's own product then is, and not more."""
    case = make("linear", 8, 256, 256, 384, device="cuda")
    exact = k.ghost_wgrad_dot(case.x.double(), case.grads.double(), case.val_grad.double())
    with tf32():
        plain = case.grads.flatten(0, 1).T @ case.x.flatten(0, 1)
        weight_grad, dots = k.ghost_wgrad_dot(case.x, case.grads, case.val_grad, form=form)
    torch.testing.assert_close((weight_grad - exact[0]).norm(), (plain - exact[0]).norm(), rtol=0.5, atol=0)
    with tf32():
        bias_grad = k.linear_wgrad_dot(case.x, case.grads, case.val_grad, case.val_grad[:, 0], form=form)[1]
    assert 1e-5 < (dots - exact[1]).norm() / exact[1].norm() < 1e-2
    torch.testing.assert_close(bias_grad.double(), case.grads.double().sum((0, 1)), rtol=1e-5, atol=1e-4)  # no product


@pytest.mark.parametrize("layer", list(WGRAD_DOTS))
@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_no_synchronisation_and_no_stored_gradient(layer, dtype):
    segments = torch.tensor([0, 700, 900, 900, 2048])
    case = make(layer, 8, 256, 384, 768, dtype=dtype, device="cuda", segments=segments)
    run = WGRAD_DOTS[layer]
    first = run(case.x, case.grads, case.val_grad, segments=case.segments)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run(case.x, case.grads, case.val_grad, segments=case.segments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)
    if layer == "linear":
        assert torch.cuda.max_memory_allocated() - before < 4 * 8 * 768 * 384
    order = torch.tensor([3, 1, 0, 2, 7, 6, 5, 4], device="cuda")
    rows = replace(case, segments=None)
    assert torch.equal(
        run(rows.x[order], rows.grads[order], rows.val_grad)[1], run(rows.x, rows.grads, rows.val_grad)[1][order]
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("width", [3, 33, 768, 4096, 8192])
def test_norms_match_autograd_without_synchronisation(width, layer, dtype):
    from inrun_kernels.norms import norm_backward

    arguments, expected = norm([700, 0, 1, 1347], width, 2, layer=layer, bias=layer, dtype=dtype, device="cuda")
    first = norm_backward(*arguments)
    if first is None:
        assert width * dtype.itemsize > 16384
        return
    assert_norm_close(first, expected)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = norm_backward(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert second is not None
    assert all(a is None or torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adams_directions_are_one_launch_without_synchronisation(dtype):
    from inrun_kernels import adam

    made = torch.Generator("cuda").manual_seed(0)
    parts = []
    for size, step in ((1, 0.0), (5000, 3.0), (1 << 20, torch.tensor(7.0, device="cuda")), (2048, 2.0)):
        grad, moment = (torch.randn(size, device="cuda", generator=made) for _ in range(2))
        moment = None if step == 0.0 else moment.square().to(dtype)
        out = torch.full_like(grad, torch.nan, dtype=dtype)
        parts.append(adam.AdamPart(out, grad.to(dtype), moment, step, 1e-4, (0.9, 0.999), 1e-8))
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        adam.write_adam_directions(parts)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for part in parts:
        t, g = float(part.step) + 1, part.val_grad.double()
        second = (0.999 * (0 if part.moment is None else part.moment.double()) + 0.001 * g * g) / (1 - 0.999**t)
        expected = part.gain / (1 - 0.9**t) * g / (second.sqrt() + part.eps)
        torch.testing.assert_close(part.out.double(), expected, rtol=8 * torch.finfo(dtype).eps, atol=1e-12)
