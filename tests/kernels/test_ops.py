"""The registered ops: schema and fake kernels, second derivatives, compilation, autocast, backends, laziness."""

import subprocess
import sys

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.library import opcheck
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import inrun_kernels as k
from inrun_kernels import ops

BATCH, TOKENS, IN, OUT, N_VAL, DIRECTIONS, VOCABULARY = 3, 4, 5, 6, 2, 2, 7
SEGMENTS = torch.tensor([0, 2, 2, 9, 12])


def tensors(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "acts": (BATCH, TOKENS, IN),
        "grads": (BATCH, TOKENS, OUT),
        "val_acts": (N_VAL, TOKENS, IN),
        "val_grads": (N_VAL, TOKENS, OUT),
        "matrices": (DIRECTIONS, OUT, IN),
        "tables": (DIRECTIONS, VOCABULARY, OUT),
        "rows": (DIRECTIONS, OUT),
        "normed": (BATCH, TOKENS, OUT),
    }
    return {n: torch.randn(*s, generator=generator).to(dtype).requires_grad_() for n, s in shapes.items()}


def calls(dtype: torch.dtype, backend: str | None) -> dict[str, tuple]:
    """name -> (op, arguments): every op with and without segments, per_token and optional tensors."""
    x = tensors(dtype)
    ids = torch.randint(VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    linear, row = (x["acts"], x["grads"], x["matrices"]), (x["normed"], x["grads"], x["rows"])
    bias = (None, *row[1:])
    pairs = (x["acts"], x["grads"], x["val_acts"], x["val_grads"])
    return {
        "dot": (ops.ghost_dot, (*linear, None, False, backend)),
        "dot, segments": (ops.ghost_dot, (*linear, SEGMENTS, False, backend)),
        "dot, tokens": (ops.ghost_dot, (*linear, None, True, backend)),
        "wgrad": (ops.ghost_wgrad_dot, (*linear, None, None, "two", dtype, backend)),
        "wgrad, bias": (ops.ghost_wgrad_dot, (*linear, x["rows"], None, "two", None, backend)),
        "wgrad, bias, segments": (ops.ghost_wgrad_dot, (*linear, x["rows"], SEGMENTS, "prefix", dtype, backend)),
        "square": (ops.ghost_square, (*linear[:2], None, backend)),
        "square, segments": (ops.ghost_square, (*linear[:2], SEGMENTS, backend)),
        "pairwise": (ops.ghost_dot_pairwise, (*pairs, backend)),
        "embedding": (ops.embedding_dot, (ids, x["grads"], x["tables"], SEGMENTS, False, 1, backend)),
        "embedding, tokens": (ops.embedding_dot, (ids, x["grads"], x["tables"], None, True, None, backend)),
        "norm": (ops.row_dot, (*row, SEGMENTS, False, backend)),
        "bias, tokens": (ops.row_dot, (*bias, None, True, backend)),
        "norm wgrad": (ops.row_wgrad_dot, (*row, None, backend)),
        "bias wgrad": (ops.row_wgrad_dot, (*bias, SEGMENTS, backend)),
    }


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", list(calls(torch.float32, None)))
def test_schema_fake_and_autograd_registration(name, dtype, backend):
    op, arguments = calls(dtype, backend)[name]
    opcheck(op, arguments)


@pytest.mark.parametrize("name", list(calls(torch.float32, None)))
def test_derivatives_of_every_order(name):
    op, arguments = calls(torch.float64, None)[name]
    moving = [i for i, x in enumerate(arguments) if isinstance(x, torch.Tensor) and x.requires_grad]

    def run(*inputs: torch.Tensor) -> torch.Tensor | tuple[torch.Tensor, ...]:
        full = list(arguments)
        for i, x in zip(moving, inputs, strict=True):
            full[i] = x
        return op(*full)

    inputs = tuple(arguments[i] for i in moving)
    assert gradcheck(run, inputs) and gradgradcheck(run, inputs, fast_mode=True)


def test_derivatives_of_padding_and_of_a_tensor_that_stands_twice():
    ids, grads = torch.tensor([[0, 1, 3], [2, 1, 1]]), torch.randn(2, 3, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    kept = (ids != 1)[..., None]
    of_grads, of_table = torch.autograd.grad(k.embedding_dot(ids, grads, table, padding_idx=1).sum(), (grads, table))
    torch.testing.assert_close(of_grads, table.detach()[ids] * kept)
    expected = torch.zeros_like(table).index_add(0, ids.flatten(), (grads.detach() * kept).flatten(0, 1))
    torch.testing.assert_close(of_table, expected)

    square = torch.randn(4, 4, dtype=torch.float64)
    (found,) = torch.autograd.grad(k.ghost_dot(grads, grads, square).sum(), grads, create_graph=True)
    torch.testing.assert_close(found, grads @ (square + square.T))


def test_derivatives_within_a_checkpoint():
    acts, grads = torch.randn(2, 3, 4), torch.randn(2, 3, 5, requires_grad=True)
    run = lambda g: k.ghost_dot(acts, g, torch.ones(5, 4))  # noqa: E731
    found = [
        torch.autograd.grad(f(grads).sum(), grads)[0] for f in (run, lambda g: checkpoint(run, g, use_reentrant=False))
    ]
    torch.testing.assert_close(*found)


def test_derivatives_without_tokens_are_zero():
    acts, grads = (torch.randn(3, 0, n, requires_grad=True) for n in (IN, OUT))
    matrix, row, segments = (
        torch.randn(OUT, IN).requires_grad_(),
        torch.randn(OUT).requires_grad_(),
        torch.zeros(3).int(),
    )
    for dots in (
        k.ghost_dot(acts, grads, matrix, segments=segments),
        k.linear_wgrad_dot(acts, grads, matrix, row, segments=segments)[2],
        k.embedding_dot(torch.zeros(3, 0).int(), grads, matrix.T, segments=segments),
        k.norm_dot(grads * 2, grads, row, segments=segments),
    ):
        assert dots.shape == (2,)
        for given in torch.autograd.grad(dots.sum(), (acts, grads, matrix, row), allow_unused=True):
            assert given is None or not given.any()


def test_derivatives_without_samples_are_empty_or_zero():
    acts, grads = (torch.randn(0, TOKENS, n, requires_grad=True) for n in (IN, OUT))
    val_acts, val_grads = (torch.randn(N_VAL, TOKENS, n, requires_grad=True) for n in (IN, OUT))
    for outputs, inputs in (
        (k.ghost_square(acts, grads), (acts, grads)),
        ((k.ghost_dot_pairwise(acts, grads, val_acts, val_grads),), (acts, grads, val_acts, val_grads)),
        ((k.ghost_dot_pairwise(val_acts, val_grads, acts, grads),), (acts, grads, val_acts, val_grads)),
    ):
        found = torch.autograd.grad(sum(y.sum() for y in outputs), inputs)
        assert all(y.shape == x.shape and not y.any() for y, x in zip(found, inputs, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", list(calls(torch.float32, None)))
def test_half_precision_derivatives_follow_float64(name, dtype):
    op, arguments = calls(dtype, None)[name]

    def gradients(arguments: tuple) -> list[torch.Tensor]:
        outputs = op(*arguments)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        inputs = [x for x in arguments if isinstance(x, torch.Tensor) and x.requires_grad]
        return list(torch.autograd.grad(outputs, inputs, [torch.ones_like(y) for y in outputs]))

    moving = [isinstance(x, torch.Tensor) and x.requires_grad for x in arguments]
    wide = tuple(x.detach().double().requires_grad_() if m else x for x, m in zip(arguments, moving, strict=True))
    wide = tuple(torch.float64 if isinstance(x, torch.dtype) else x for x in wide)
    for found, exact in zip(gradients(arguments), gradients(wide), strict=True):
        assert found.dtype == dtype
        torch.testing.assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_who_watches_calls_sees_them():
    """A dispatch mode, a transform and autograd get the registered op; without them its body runs alone."""
    acts, grads, matrix = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(4, 5)
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        k.ghost_wgrad_dot(acts, grads, matrix)
    assert any(func.namespace == "inrun" for func in seen)
    assert all(x.grad_fn is None for x in k.ghost_wgrad_dot(acts, grads, matrix))
    assert k.ghost_dot(acts.requires_grad_(), grads, matrix).grad_fn is not None
    assert all(x.grad_fn is not None for x in k.ghost_wgrad_dot(acts, grads, matrix))
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU]) as recorded:
        k.ghost_dot(acts, grads, matrix)
    assert not any(event.name.startswith("inrun::") for event in recorded.events() or [])


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_a_view_that_turns_the_sign_of_its_memory(backend):
    acts, grads, matrix = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(4, 5)
    turned = torch.complex(acts, -acts).conj().imag
    assert turned.is_neg() and torch.equal(turned, acts)
    assert torch.equal(
        k.ghost_dot(turned, grads, matrix, backend=backend), k.ghost_dot(acts, grads, matrix, backend=backend)
    )


def test_zeros_without_memory_and_a_trace():
    """What has the class of a tensor and no memory, and who records the operations in place of values."""
    acts, grads, direction = torch.randn(3, 40, 33), torch.randn(3, 40, 17), torch.randn(17, 33)
    zero = torch._efficientzerotensor(acts.shape)
    for product in (k.ghost_wgrad_dot, k.ghost_dot):
        found = product(zero, grads, direction)
        assert not any(x.any() for x in (found if isinstance(found, tuple) else (found,)))
    traced = torch.jit.trace(lambda *x: k.ghost_wgrad_dot(*x)[1], (acts, grads, direction), check_trace=False)
    torch.testing.assert_close(traced(acts + 1, grads, direction), k.ghost_wgrad_dot(acts + 1, grads, direction)[1])


def test_shapes_are_known_without_data():
    offsets = SEGMENTS.to("meta")
    acts, grads, matrix = (torch.empty(*shape, device="meta") for shape in ((3, 4, 5), (3, 4, 6), (6, 5)))
    weight_grad, dots = k.ghost_wgrad_dot(acts, grads, matrix, segments=offsets)
    assert weight_grad.shape == (6, 5) and dots.shape == (4,) and dots.is_meta


def test_forward_mode_is_refused():
    """A registered op without a rule for it would give tangents of zero."""
    acts, grads, matrix = torch.randn(2, 3, 5), torch.randn(2, 3, 4), torch.randn(4, 5)
    for derivative in (lambda f, x: torch.func.jvp(f, (x,), (x,)), lambda f, x: torch.func.jacfwd(f)(x)):
        with pytest.raises(NotImplementedError, match="expected reverse-mode derivatives"):
            derivative(lambda x: k.ghost_dot(x, grads, matrix), acts)


def test_compiles_whole_with_changing_batch_size():
    torch._dynamo.reset()

    def step(acts, grads, normed, ids, matrix, table, segments):
        weight_grad, dots = k.ghost_wgrad_dot(acts, grads, matrix, segments=segments)
        total = k.ghost_dot(acts, grads, matrix) + k.norm_dot(normed, grads, matrix[:, 0])
        total = total + k.bias_dot(grads, matrix[:, 0]) + k.embedding_dot(ids, grads, table)
        norm, of_norm = k.norm_wgrad_dot(normed, grads, matrix[:, 0])
        _, bias, of_bias = k.linear_wgrad_dot(acts, grads, matrix, matrix[:, 0])
        pairs = k.ghost_dot_pairwise(acts, grads, acts, grads)
        squares = *k.ghost_square(acts, grads), *k.ghost_square(acts, grads, segments=segments)
        return weight_grad, dots, total + of_norm + of_bias, norm + bias, pairs, *squares

    compiled = torch.compile(step, fullgraph=True)
    for batch in (3, 5, 4):
        acts, grads, normed = (
            torch.randn(batch, TOKENS, IN),
            torch.randn(batch, TOKENS, OUT),
            torch.randn(batch, TOKENS, OUT),
        )
        ids = torch.randint(VOCABULARY, (batch, TOKENS))
        directions = (torch.randn(OUT, IN), torch.randn(VOCABULARY, OUT))
        arguments = (acts, grads, normed, ids, *directions, torch.tensor([0, 5, batch * TOKENS]))
        for got, want in zip(compiled(*arguments), step(*arguments), strict=True):
            torch.testing.assert_close(got, want)


@pytest.mark.parametrize("segments", [None, SEGMENTS])
def test_the_backward_of_squares_compiles(segments):
    acts, grads = (x.requires_grad_() for x in (torch.randn(BATCH, TOKENS, IN), torch.randn(BATCH, TOKENS, OUT)))

    def step(acts, grads):
        squares, norms = k.ghost_square(acts, grads, segments=segments)
        return squares.sqrt().sum() + norms.sum()

    found = torch.autograd.grad(torch.compile(step)(acts, grads), (acts, grads))
    torch.testing.assert_close(found, torch.autograd.grad(step(acts, grads), (acts, grads)))


@pytest.mark.parametrize("where", [0, 1])
def test_a_document_that_is_not_finite_leaves_the_derivatives_of_others(where):
    acts, grads = torch.randn(1, 9, 4), torch.randn(1, 9, 3)
    (acts, grads)[where][0, 4, 1] = torch.inf
    segments = torch.tensor([0, 3, 7, 9])
    inputs = acts.requires_grad_(), grads.requires_grad_()
    squares, norms = k.ghost_square(*inputs, segments=segments)
    for of in (squares, norms):
        for x in torch.autograd.grad(of.sum(), inputs, retain_graph=True):
            assert x.isfinite().all(2).tolist() == [[True] * 3 + [False] * 4 + [True] * 2]


def test_autocast_does_not_round_the_products():
    acts, grads, matrix = torch.randn(2, 64, 32), torch.randn(2, 64, 16), torch.randn(16, 32)
    outside = k.ghost_wgrad_dot(acts, grads, matrix)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = k.ghost_wgrad_dot(acts, grads, matrix)
    for a, b in zip(outside, inside, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_nor_does_it_round_what_other_ops_compute(backend):
    for name, (op, arguments) in calls(torch.float32, backend).items():
        found = []
        for enabled in (False, True):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                outputs = ops.call(op, *arguments)
                found.append(outputs if isinstance(outputs, tuple) else (outputs,))
        assert all(map(torch.equal, *found)), name


@pytest.mark.parametrize(
    "code",
    [
        "import sys, inrun_kernels; assert 'triton' not in sys.modules",
        "import sys; sys.modules['triton'] = None  # as if not installed\n"
        "import torch, inrun_kernels as k\n"
        "weight_grad, dots = k.ghost_wgrad_dot(torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.ones(4, 3))\n"
        "assert dots.item() == weight_grad.sum().item() == 24",
    ],
    ids=["import", "use"],
)
def test_triton_is_not_needed(code):
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": ":".join(filter(None, sys.path))})


def test_the_triton_backend_is_never_replaced_in_silence(monkeypatch):
    acts, grads, matrix = torch.ones(1, 2, 3), torch.ones(1, 2, 4), torch.ones(4, 3)
    with pytest.raises(TypeError, match=r"backend: expected 'torch' for torch.float64 input"):
        k.ghost_dot(acts.double(), grads.double(), matrix.double(), backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="backend: expected 'torch' for tensors on cpu"):
        k.ghost_dot(acts, grads, matrix, backend="triton")
    monkeypatch.setattr(ops, "_HAS_TRITON", False)
    with pytest.raises(RuntimeError, match="expected triton to be installed"):
        k.ghost_dot(acts, grads, matrix, backend="triton")
    assert k.ghost_dot(acts, grads, matrix).item() == 24


def test_derivatives_under_autocast_are_those_without():
    g = torch.Generator().manual_seed(0)
    acts, grads, val_grad = (torch.randn(*shape, generator=g) for shape in ((2, 3, 8), (2, 3, 5), (5, 8)))
    found = []
    for enabled in (False, True):
        a = acts.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            dots = k.ghost_dot(a, grads, val_grad).sum() + k.ghost_square(a, grads)[1].sum()
            found.append(torch.autograd.grad(dots, a)[0])
    assert torch.equal(*found)


@pytest.mark.parametrize("tokens", [1, 2])
@pytest.mark.parametrize("sizes", [(1e8, 1e-23), (1e25, 1e-25), (1e20, 1e-5), (1e-5, 1e22), (2e38, 2e-38)])
def test_squares_are_of_gradients_not_of_factors(sizes, tokens):
    """Whose squares may have no float32."""
    acts, grads = (torch.full((2, tokens, width), size) for width, size in zip((3, 1), sizes, strict=True))
    acts[:, 1:] = 0
    squares, norms = k.ghost_square(acts, grads)
    exact = (sizes[0] * sizes[1]) ** 2
    torch.testing.assert_close(squares.double() / exact, torch.full((1, 3), 2.0).double(), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(norms.double() / exact, torch.full((2,), 3.0).double(), rtol=1e-5, atol=0.0)


def test_a_single_token_of_zeros_has_no_square():
    acts, grads = torch.randn(3, 1, 5), torch.randn(3, 1, 4)
    acts[1] = 0
    squares, norms = k.ghost_square(acts, grads)
    exact = (grads.mT @ acts).double().square()
    torch.testing.assert_close(squares.double(), exact.sum(0), rtol=1e-5, atol=0.0)
    torch.testing.assert_close(norms.double(), exact.sum((1, 2)), rtol=1e-5, atol=0.0)


def test_single_tokens_of_no_width_have_no_squares():
    for inputs, outputs in ((0, 4), (5, 0)):
        squares, norms = k.ghost_square(torch.ones(3, 1, inputs), torch.ones(3, 1, outputs))
        assert squares.shape == (outputs, inputs) and norms.tolist() == [0, 0, 0]


def test_a_bias_product_without_a_bias_is_told_so():
    acts, grads, val_grad = torch.ones(2, 3, 8), torch.ones(2, 3, 5), torch.ones(5, 8)
    with pytest.raises(TypeError, match=r"bias_val_grad: expected .*, received None; without a bias: ghost_wgrad_dot"):
        k.linear_wgrad_dot(acts, grads, val_grad, None)
