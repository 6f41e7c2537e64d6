"""The kernels in C against their definitions, on every kind of processor that this machine can be taken for."""

import os
import platform
import subprocess
import sys
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_norm_close, norm
from test_norms import norms

import inrun_kernels as k
from inrun_kernels import adam, native, reference, torch_path

X86 = platform.machine() == "x86_64"
KINDS = ["native", *(["x86-64-v3", "x86-64"] if X86 else [])]
SIZES = st.sampled_from([1, 2, 11, 12, 13, 31, 32, 33, 47, 97, 192, 193, 385])
INTEGERS = [torch.int32, torch.int64]
WIDTHS = st.sampled_from([torch.float32, torch.bfloat16])


@pytest.fixture(autouse=True)
def _a_compiler():
    if native.library() is None:
        pytest.skip("needs a C compiler")


@pytest.fixture(scope="module", params=KINDS)
def kind(request, tmp_path_factory):
    """The kernels built for a kind of processor."""
    flags = tuple(f"-march={request.param}" if flag.startswith("-march") else flag for flag in native._FLAGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_FLAGS", flags)
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        native.library.cache_clear()
        if request.param == "x86-64-v3" and "avx2" not in native._processor():
            pytest.skip("needs AVX2")
        yield request.param
    native.library.cache_clear()


def assert_close(found, expected):
    assert found.dtype == torch.float32
    scale = expected.square().mean().sqrt()
    assert ((found.double() - expected).abs() <= 2e-5 * scale + 1e-30).all()


@settings(deadline=None, max_examples=30)
@given(st.data())
@pytest.mark.usefixtures("kind")
def test_products_match_their_definitions(data):
    """Ragged samples, empty ones, several panels, any mixture of dtypes, rows that lie apart, one to five threads."""
    inputs, outputs, directions = data.draw(SIZES), data.draw(SIZES), data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 33, 127, 128, 129, 300]), min_size=1, max_size=6))
    lengths[0] = max(1, lengths[0])
    ends = torch.tensor([0, *lengths]).cumsum(0).to(data.draw(st.sampled_from([torch.int32, torch.int64])))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    in_pairs = data.draw(st.booleans())  # both operands of bfloat16

    def draw(*shape, dtype=None):
        pad = data.draw(st.sampled_from([0, 3]))
        whole = torch.randn(*shape[:-1], shape[-1] + pad, generator=generator).to(dtype or data.draw(WIDTHS))
        return whole[..., : shape[-1]]

    dtype = torch.bfloat16 if in_pairs else None
    acts, grads = draw(1, sum(lengths), inputs, dtype=dtype), draw(1, sum(lengths), outputs, dtype=dtype)
    direction, of_bias = draw(directions, outputs, inputs), draw(directions, outputs)
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 5])))
    try:
        found = native.ghost_wgrad_dot(acts, grads, direction, of_bias, ends)
        without = native.ghost_wgrad_dot(acts, grads, direction, None, ends)
        squares = native.ghost_square(acts, grads, ends)
        of_rows = native.row_wgrad_dot(acts[..., :1].expand_as(grads), grads, of_bias, ends)
        of_bias_alone = native.row_wgrad_dot(None, grads, of_bias, ends)
    finally:
        torch.set_num_threads(before)
    for got, right in zip(
        found, reference.linear_wgrad_dot(acts, grads, direction, of_bias, segments=ends), strict=True
    ):
        assert_close(got, right)
    assert_close(without[2], reference.ghost_wgrad_dot(acts, grads, direction, segments=ends)[1])
    assert torch.equal(without[0], found[0]) and without[1].numel() == 0
    for got, right in zip(squares, reference.ghost_square(acts, grads, segments=ends), strict=True):
        assert_close(got, right)
    scaled = acts[..., :1].expand_as(grads)
    for got, right in zip(of_rows, reference.norm_wgrad_dot(scaled, grads, of_bias, segments=ends), strict=True):
        assert_close(got, right)
    for got, right in zip(of_bias_alone, reference.bias_wgrad_dot(grads, of_bias, segments=ends), strict=True):
        assert_close(got, right)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "lengths", [[1] * 200 + [300] + [0] * 140 + [12] + [3] * 150 + [1] * 5, [1, 0] * 64, [2] * 128, [1, 0, 2] * 70]
)
def test_many_samples_of_any_length(default, lengths):
    """More samples than a panel has, or as many, rows of one; whatever dtype torch makes of itself."""
    ends = torch.tensor([0, *lengths]).cumsum(0)
    acts, grads = torch.randn(1, int(ends[-1]), 47), torch.randn(1, int(ends[-1]), 25)
    directions, of_bias = torch.randn(3, 25, 47), torch.randn(3, 25)
    torch.set_default_dtype(default)
    try:
        squares = native.ghost_square(acts, grads, ends)
        products = native.ghost_wgrad_dot(acts, grads, directions, of_bias, ends)
    finally:
        torch.set_default_dtype(torch.float32)
    for got, right in zip(squares, reference.ghost_square(acts, grads, segments=ends), strict=True):
        assert_close(got, right)
    expected = reference.linear_wgrad_dot(acts, grads, directions, of_bias, segments=ends)
    for got, right in zip(products, expected, strict=True):
        assert_close(got, right)


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("tokens, outputs", [(1, 25), (20, 3), (20, 25), (300, 25)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_left_in_the_scratch_counts_for_nothing(dtype, tokens, outputs):
    """Zeros, and bytes that are no numbers."""
    acts, grads = torch.randn(3, tokens, 47).to(dtype), torch.randn(3, tokens, outputs).to(dtype)
    directions, of_bias, found = torch.randn(3, outputs, 47), torch.randn(3, outputs), []
    for byte in (0, 255):
        found.append([])
        for run, *arguments in (
            (native.ghost_wgrad_dot, acts, grads, directions, of_bias, None),
            (native.ghost_square, acts, grads, None),
            (native.row_wgrad_dot, None, grads, of_bias, None),
        ):
            native._kept.scratch = torch.full((1 << 22,), byte, dtype=torch.uint8)
            found[-1] += run(*arguments)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("lengths", [(4, 512), (513, 3)])
def test_squares_of_samples_too_long_for_a_panel_go_by_torch(lengths, monkeypatch):
    ends = torch.tensor([0, *lengths]).cumsum(0)
    acts, grads = torch.randn(1, sum(lengths), 33), torch.randn(1, sum(lengths), 18)
    kernel, taken = native.ghost_square, []
    monkeypatch.setattr(native, "ghost_square", lambda *a: taken.append(1) or kernel(*a))
    found = k.ghost_square(acts, grads, segments=ends)
    assert len(taken) == (max(lengths) <= 512)
    for got, right in zip(found, reference.ghost_square(acts, grads, segments=ends), strict=True):
        assert_close(got, right)


@settings(deadline=None, max_examples=30)
@given(st.data())
@pytest.mark.usefixtures("kind")
def test_rows_match_their_definitions(data):
    """Samples that end within a thread's rows or beyond them, wide rows, tokens, directions that lie side by side."""
    width, directions = data.draw(st.sampled_from([1, 31, 33, 64, 385, 1030])), data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 127, 128, 129, 300]), min_size=1, max_size=6))
    lengths[0], vocabulary = max(1, lengths[0]), 7
    ends, tokens = torch.tensor([0, *lengths]).cumsum(0), sum(lengths)
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(data.draw(WIDTHS))

    normed, grads, direction = draw(1, tokens, width), draw(1, tokens, width), draw(directions, width)
    table = draw(vocabulary, directions, width).transpose(0, 1) if data.draw(st.booleans()) else None
    table = draw(directions, vocabulary, width) if table is None else table
    ids = torch.randint(vocabulary, (1, tokens), generator=generator).to(data.draw(st.sampled_from(INTEGERS)))
    padding, per_token = data.draw(st.sampled_from([None, 0, 3])), data.draw(st.booleans())
    segments = None if per_token else ends
    groups = {"segments": segments, "per_token": per_token}
    before = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.sampled_from([1, 2, 5])))
    try:
        of_norm = native.row_dot(normed, grads, direction, segments, per_token)
        of_bias = native.row_dot(None, grads, direction, segments, per_token)
        of_table = native.embedding_dot(ids, grads, table, segments, per_token, padding)
        sums, dots = native.row_wgrad_dot(normed, grads, direction, ends)
    finally:
        torch.set_num_threads(before)
    pad = {"padding_idx": padding}
    for found, product, *operands, options in (
        (of_norm, reference.norm_dot, normed, grads, direction, {}),
        (of_bias, reference.bias_dot, grads, direction, {}),
        (of_table, reference.embedding_dot, ids, grads, table, pad),
    ):
        assert found.dtype == torch.float32
        terms = product(*(y.abs() for y in operands), **groups, **options)  # which may cancel
        assert ((found.double() - product(*operands, **groups, **options)).abs() <= 1e-6 * terms).all()
    for got, right in zip((sums, dots), reference.norm_wgrad_dot(normed, grads, direction, segments=ends), strict=True):
        assert_close(got, right)


@settings(deadline=None, max_examples=15)
@given(st.data())
@pytest.mark.usefixtures("kind")
def test_norms_match_their_definition(data):
    case = data.draw(norms(st.sampled_from([16, 48, 400])))
    arguments, expected = norm(**case)
    threads = torch.get_num_threads()
    torch.set_num_threads(data.draw(st.integers(1, 5)))
    try:
        assert native.norm_fits(*arguments[:3])
        assert_norm_close(native.norm_backward(*arguments), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [1, 2, 7, 100, 128, 129, 300])
def test_a_dot_has_the_same_bits_whatever_else_is_in_the_batch(tokens, dtype):
    generator = torch.Generator().manual_seed(0)
    acts, grads, direction, of_bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((6, tokens, 50), (6, tokens, 70), (1, 70, 50), (1, 70))
    )
    *_, dots = native.ghost_wgrad_dot(acts, grads, direction, of_bias, None)
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    assert torch.equal(native.ghost_wgrad_dot(acts[order], grads[order], direction, of_bias, None)[2], dots[order])
    assert torch.equal(native.ghost_wgrad_dot(acts[4:5], grads[4:5], direction, of_bias, None)[2], dots[4:5])
    wide = (torch.cat([x.new_ones(310, x.shape[2]), *x[:3], x.new_ones(50, x.shape[2]), *x[3:]]) for x in (acts, grads))
    ends = torch.tensor([0, 310, *[tokens] * 3, 50, *[tokens] * 3]).cumsum(0)
    *_, ragged = native.ghost_wgrad_dot(*(x[None] for x in wide), direction, of_bias, ends)
    if tokens > 1 or dtype == torch.float32:  # in pairs, single rows among others are taken otherwise than alone
        assert torch.equal(torch.cat([ragged[1:4], ragged[5:]]), dots)
    _, dots = native.row_wgrad_dot(grads, grads, of_bias, None)
    assert torch.equal(native.row_wgrad_dot(grads[order], grads[order], of_bias, None)[1], dots[order])


def test_fewer_threads_than_torch_has():
    """As a limit allows, or within a team of others: a thread then has several blocks."""
    code = """
import torch
from inrun_kernels import native, reference
torch.set_num_threads(5)
acts, grads, direction = torch.randn(3, 9, 40), torch.randn(3, 9, 97), torch.randn(97, 40)
weight_grad, _, dots = native.ghost_wgrad_dot(acts, grads, direction, None, None)
for got, right in zip((weight_grad, dots), reference.ghost_wgrad_dot(acts, grads, direction), strict=True):
    torch.testing.assert_close(got.double(), right, rtol=1e-4, atol=1e-3)
"""
    environment = os.environ | {"PYTHONPATH": ":".join(filter(None, sys.path)), "OMP_THREAD_LIMIT": "1"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_a_large_weight_costs_no_digits():
    """A float32 dot of millions of terms has an error of its own, some 1e-5 of a sample's dot."""
    generator = torch.Generator().manual_seed(0)
    acts, grads, direction = (
        torch.randn(shape, generator=generator) for shape in ((8, 4, 1536), (8, 4, 2048), (1, 2048, 1536))
    )
    *_, dots = native.ghost_wgrad_dot(acts + 1, grads, direction, None, None)
    exact = ((grads.double() @ direction[0].double()) * (acts + 1).double()).sum((1, 2))
    assert (dots[:, 0] - exact).square().mean().sqrt() < 1e-6 * exact.square().mean().sqrt()


def test_the_ops_take_them_where_they_run_and_nothing_else_does():
    acts, grads, direction = torch.randn(4, 64, 33), torch.randn(4, 64, 17), torch.randn(17, 33)
    assert k.explain(k.ghost_wgrad_dot, acts, grads, direction).form == "two"
    weight_grad, dots = k.ghost_wgrad_dot(acts, grads, direction)
    expected = native.ghost_wgrad_dot(acts, grads, direction[None], None, None)
    assert torch.equal(weight_grad, expected[0]) and torch.equal(dots, expected[2][:, 0])
    one = acts[:1].bfloat16(), grads[:1].bfloat16()  # a single sample too, of which BLAS has no product in float32
    assert torch.equal(k.ghost_wgrad_dot(*one, direction)[0], native.ghost_wgrad_dot(*one, direction, None, None)[0])
    half = acts.bfloat16(), grads.bfloat16()  # in pairs, where the processor does that, without a product in float32
    dots, of_pairs = k.ghost_dot(*half, direction), native.dots_fit(*half, None)
    assert_close(dots, reference.ghost_dot(*half, direction))
    assert torch.equal(dots, native.ghost_wgrad_dot(*half, direction, None, None)[2]) or not of_pairs
    assert not native.dots_fit(acts, grads, None) and not native.dots_fit(*(x[:, :2] for x in half), None)
    by_torch = k.ghost_wgrad_dot(acts, grads, direction, form="two", backend="torch")
    assert torch.equal(by_torch[0], torch_path.ghost_wgrad_dot(acts, grads, direction[None], None, "two")[0])
    for dtype in (torch.float16, torch.float64):
        assert (
            not native.runs(acts.to(dtype))
            and k.ghost_wgrad_dot(acts.to(dtype), grads.to(dtype), direction.to(dtype))[1].isfinite().all()
        )
    assert not native.runs(acts[:0]) and not native.runs(acts.to("meta"))
    rounded, _ = k.ghost_wgrad_dot(acts.bfloat16(), grads.bfloat16(), direction, grad_dtype=torch.bfloat16)
    assert rounded.dtype == torch.bfloat16
    biased = k.linear_wgrad_dot(*half, direction, direction[:, 0].contiguous(), grad_dtype=torch.bfloat16)
    assert [x.dtype for x in biased] == [torch.bfloat16, torch.bfloat16, torch.float32]


@pytest.mark.usefixtures("kind")
@pytest.mark.parametrize("steps", [0, 3])
@pytest.mark.parametrize("count", [1, 1000, 100_000])
def test_adams_direction_is_its_formula(steps, count):
    generator = torch.Generator().manual_seed(0)
    parts = []
    for gain, skipped in ((0.1, 0), (-0.3, 1)):  # the second where no vector begins
        grad, moment = torch.randn(count, generator=generator), torch.rand(count, generator=generator)
        grad[0] = 0.0
        out = torch.full((skipped + count,), torch.nan)[skipped:]
        parts.append(adam.AdamPart(out, grad, moment if steps else None, float(steps), gain, (0.9, 0.99), 1e-8))
    assert all(map(adam.fits, parts))
    adam.write_adam_directions(parts)
    for part in parts:
        grad = part.val_grad.double()
        old = torch.zeros_like(grad) if part.moment is None else part.moment.double()
        second = (0.99 * old + 0.01 * grad.square()) / (1 - 0.99 ** (steps + 1))
        expected = part.gain / (1 - 0.9 ** (steps + 1)) * grad / (second.sqrt() + 1e-8)
        torch.testing.assert_close(part.out.double(), expected, rtol=1e-6, atol=0.0)


def test_without_a_compiler_the_products_run_on_torch(monkeypatch, tmp_path):
    acts, grads, direction = torch.randn(4, 64, 33), torch.randn(4, 64, 17), torch.randn(17, 33)
    expected = k.ghost_wgrad_dot(acts, grads, direction, backend="torch")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for compiler, complaint in ((None, None), ("false", "expected false to build the kernels in C")):
        monkeypatch.setattr(native.shutil, "which", lambda name: None)
        monkeypatch.delenv("CC", raising=False) if compiler is None else monkeypatch.setenv("CC", compiler)
        native.library.cache_clear()
        try:
            with warnings.catch_warnings(record=True) as said:
                warnings.simplefilter("always")
                found = k.ghost_wgrad_dot(acts, grads, direction)
                k.ghost_wgrad_dot(acts, grads, direction)
            assert [complaint in str(w.message) for w in said] == ([] if complaint is None else [True])
            assert all(map(torch.equal, found, expected))
            assert not adam.fits(adam.AdamPart(*[torch.ones(3)] * 3, 0.0, 0.1, (0.9, 0.99), 1e-8))
        finally:
            native.library.cache_clear()


def test_the_sources_have_no_warning(tmp_path):
    if native.shutil.which("gcc") is None:
        pytest.skip("needs gcc")
    sources = [str(source) for source in native.SOURCES if source.suffix == ".c"]
    command = ["gcc", "-Wall", "-Wextra", "-Werror", *native._FLAGS, *sources, "-lm", "-o", str(tmp_path / "x.so")]
    subprocess.run(command, check=True)


def test_a_cache_that_cannot_be_written_or_read_is_no_obstacle(monkeypatch, tmp_path):
    acts, grads, direction = torch.randn(4, 64, 33), torch.randn(4, 64, 17), torch.randn(17, 33)
    expected = k.ghost_wgrad_dot(acts, grads, direction)
    (tmp_path / "file").write_text("")
    good, damaged = tmp_path / "good", tmp_path / "damaged"
    try:
        for cache in (tmp_path / "file", good, damaged):
            monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
            native.library.cache_clear()
            if cache == damaged:
                (damaged / "inrun").mkdir(parents=True)
                (built,) = (good / "inrun").iterdir()
                (damaged / "inrun" / built.name).write_text("no library")
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                assert all(map(torch.equal, k.ghost_wgrad_dot(acts, grads, direction), expected))
        (mended,) = (damaged / "inrun").iterdir()
        assert mended.read_bytes()[:4] == b"\x7fELF"
    finally:
        native.library.cache_clear()


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_the_default_device_does_not_matter(device):
    acts, grads, direction = torch.randn(4, 63, 33), torch.randn(4, 63, 17), torch.randn(17, 33)
    expected = k.ghost_wgrad_dot(acts, grads, direction, backend="torch", form="two")
    native._even_ends.cache_clear()
    with torch.device(device):
        found = k.ghost_wgrad_dot(acts, grads, direction)
        bias = k.bias_wgrad_dot(grads, direction[:, 0].contiguous())
        of_tokens = k.bias_dot(grads, direction[:, 0].contiguous(), per_token=True)
    expected = *expected, grads.sum((0, 1)), grads @ direction[:, 0]
    for got, right in zip((*found, bias[0], of_tokens), expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_nor_does_it_for_adams_directions_in_triton(device):
    from inrun_kernels import adam, adam_kernel

    val_grad, moment, out = torch.randn(9, 7), torch.rand(9, 7), torch.empty(9, 7)
    part = adam.AdamPart(out, val_grad, moment, 3.0, 0.1, (0.9, 0.99), 1e-8)
    with torch.device(device):
        adam_kernel.launch_adam_directions([part])
    seconds = (0.99 * moment + 0.01 * val_grad.square()) / (1 - 0.99**4)
    torch.testing.assert_close(out, 0.1 / (1 - 0.9**4) * val_grad / (seconds.sqrt() + 1e-8), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("counts", [(5,), (2048, 1, 4097, 2047, 3000)])
def test_adams_directions_in_triton_are_their_formula(counts):
    """Parts of one block, of several and of less; moments and steps that are there or not."""
    from inrun_kernels import adam_kernel

    parts = []
    for i, count in enumerate(counts):
        moment, step = torch.rand(count) if i % 2 else None, torch.tensor(6.0 + i) if i % 3 else 3.0
        out, betas = torch.full((count,), torch.nan), (0.9, 0.0 if i == 3 else 0.99)
        parts.append(adam.AdamPart(out, torch.randn(count), moment, step, 0.1 * (i + 1), betas, 1e-8))
    adam_kernel.launch_adam_directions(parts)
    for part in parts:
        (beta1, beta2), made, grad = part.betas, float(part.step) + 1, part.val_grad.double()
        second = (beta2 * (0 if part.moment is None else part.moment.double()) + (1 - beta2) * grad.square()) / (
            1 - beta2**made
        )
        expected = part.gain / (1 - beta1**made) * grad / (second.sqrt() + part.eps)
        torch.testing.assert_close(part.out.double(), expected, rtol=1e-6, atol=0.0)


def test_adam_takes_tensors_of_one_size_that_lie_whole():
    x = torch.ones(4, 3)
    for out, val_grad, moment in ((x.mT, x.mT, x.mT), (x, x[:2], x), (x, x, x[:2]), (x, x.double(), x)):
        assert not adam.fits(adam.AdamPart(out, val_grad, moment, 0.0, 0.1, (0.9, 0.99), 1e-8))
    part = adam.AdamPart(torch.ones(4, 3), x, None, 0.0, 0.1, (0.9, 0.99), 1e-8)
    before = part.out._version
    assert adam.fits(part)
    adam.write_adam_directions([part])
    assert part.out._version > before  # autograd knows what it saved of it to be gone


def test_what_has_no_memory_of_its_own_is_left_to_torch():
    """Batched tensors have the class of plain ones, and a view may have the sign of its memory turned."""
    x = torch.randn(3, 5, 8)
    plain = []
    torch._vmap_internals._vmap(lambda y: plain.append(native.runs(y)) or y)(x)
    assert plain == [False] and not native.runs(torch._neg_view(x)) and native.runs(x)


@pytest.mark.parametrize("tokens", [1, 20])
def test_a_sample_that_is_not_finite_keeps_that_to_itself(tokens):
    acts, grads, direction = torch.randn(5, tokens, 33), torch.randn(5, tokens, 17), torch.randn(17, 33)
    acts[2, tokens // 2, 4] = torch.nan
    grads[3, 0, 0] = torch.inf
    _, dots = k.ghost_wgrad_dot(acts, grads, direction, form="two")
    assert dots.isfinite().tolist() == [True, True, False, False, True]
