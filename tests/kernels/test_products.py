"""Every product on every backend against one-sample-at-a-time autograd, over shapes, dtypes, strides, groupings."""

import itertools
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import (
    DOTS,
    LAYERS,
    PADDING,
    WGRAD_DOTS,
    Case,
    absolute,
    assert_close,
    check,
    check_form,
    dots_of,
    gradient_of,
    in_form,
    make,
    norms_of,
    squares_of,
)

import inrun_kernels as k
from inrun_kernels import config, reference, torch_path

SIZES = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65])
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "triton"]
LAYOUTS = {
    "contiguous": lambda x: x,
    "tokens first": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "features first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "every other": lambda x: x.repeat_interleave(2, 2)[..., ::2],
    "one row expanded": lambda x: x[:1].expand_as(x),
    "one token expanded": lambda x: x[:, :1].expand_as(x),
}


@st.composite
def cases(draw, layer: str, dtypes: list[torch.dtype]) -> Case:
    batch, tokens = draw(st.integers(0, 4)), draw(st.sampled_from([0, 1, 2, 5, 16, 17, 40]))
    grouping = draw(st.sampled_from(["rows", "segments", "tokens"]))
    segments = None
    if grouping == "segments":
        cuts = draw(st.lists(st.integers(0, batch * tokens), max_size=4))
        integer = draw(st.sampled_from([torch.int32, torch.int64]))
        step = draw(st.sampled_from([1, 2]))  # offsets may be a column of a table
        segments = torch.tensor([0, *sorted(cuts), batch * tokens], dtype=integer).repeat_interleave(step)[::step]
    return make(
        layer,
        batch,
        tokens,
        draw(SIZES),
        draw(SIZES),
        directions=draw(st.sampled_from([None, None, 1, 3])),
        dtype=draw(st.sampled_from(dtypes)),
        wide_direction=draw(st.booleans()),
        layout=LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))],
        seed=draw(st.integers(0, 1000)),
        segments=segments,
        per_token=grouping == "tokens",
    )


@pytest.mark.parametrize("layer", list(LAYERS))
@settings(max_examples=60)
@given(data=st.data())
def test_torch_path_matches_autograd(layer, data):
    check(data.draw(cases(layer, [*DTYPES, torch.float64])), "torch")


@pytest.mark.parametrize("layer", list(LAYERS))
@settings(max_examples=40)
@given(data=st.data())
def test_kernels_match_autograd(layer, data):
    check(data.draw(cases(layer, DTYPES)), "triton")


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=30)
@given(data=st.data())
def test_pairwise_matches_autograd(backend, data):
    dtype = data.draw(st.sampled_from(DTYPES))
    layout = LAYOUTS[data.draw(st.sampled_from(list(LAYOUTS)))]
    inputs, outputs = data.draw(SIZES), data.draw(SIZES)
    batch, n_val = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    tokens, val_tokens = (data.draw(st.sampled_from([0, 1, 5, 17])) for _ in range(2))
    train = make("linear", batch, tokens, inputs, outputs, dtype=dtype, layout=layout)
    val = make("linear", n_val, val_tokens, inputs, outputs, dtype=dtype, layout=layout, seed=1)

    def by_autograd(case: Case, compute: torch.dtype) -> torch.Tensor:
        signs = (lambda x: x) if case is train else torch.abs
        columns = []
        for x, grads in zip(val.x, val.grads, strict=True):
            of_sample = gradient_of(replace(val, x=signs(x[None]), grads=signs(grads[None])), compute)
            columns.append(dots_of(replace(case, val_grad=of_sample), compute))
        return torch.stack(columns, 1) if columns else train.grads.new_zeros(batch, 0, dtype=torch.float64)

    tensors = (train.x, train.grads, val.x, val.grads)
    assert_close(k.ghost_dot_pairwise(*tensors, backend=backend), by_autograd, train)
    if backend == "torch":
        for form in ("pairwise", "direct", "gradients"):
            assert_close(torch_path.ghost_dot_pairwise(*tensors, form), by_autograd, train)


@pytest.mark.parametrize("layer", list(LAYERS))
@pytest.mark.parametrize("grouping", [{}, {"segments": torch.tensor([0, 0, 4, 15])}, {"per_token": True}])
@pytest.mark.parametrize("directions", [None, 2])
def test_reference_matches_autograd(layer, grouping, directions):
    case = make(layer, 3, 5, 4, 6, directions=directions, dtype=torch.float64, **grouping)
    named = {"linear": "ghost_dot"}.get(layer, f"{layer}_dot")
    arguments = (case.grads,) if layer == "bias" else (case.x, case.grads)
    extra = {"padding_idx": PADDING} if layer == "embedding" else {}
    assert_close(getattr(reference, named)(*arguments, case.val_grad, **grouping, **extra), dots_of, case)
    if layer in WGRAD_DOTS and not case.per_token:
        named = {"linear": "ghost_wgrad_dot"}.get(layer, f"{layer}_wgrad_dot")
        weight_grad, dots = getattr(reference, named)(*arguments, case.val_grad, **grouping)
        assert_close(weight_grad, gradient_of, case)
        assert_close(dots, dots_of, case)
    if layer == "linear" and not grouping:
        direct = reference.ghost_dot(case.x, case.grads, reference.ghost_wgrad_dot(*arguments, case.val_grad)[0])
        pairs = reference.ghost_dot_pairwise(case.x, case.grads, case.x, case.grads)
        torch.testing.assert_close(pairs.sum(1), direct)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_direction_finer_than_the_activations(backend, dtype):
    """A float32 direction beside half-precision activations costs no more than casting it would."""
    case = make("linear", 8, 33, 48, 40, dtype=dtype)
    case = replace(case, val_grad=torch.randn(40, 48, generator=torch.Generator().manual_seed(7)))
    check(case, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", [1e-12, 1e12, 1e35])
def test_float16_scores_survive_directions_outside_its_range(backend, size):
    case = make("linear", 4, 17, 33, 20, dtype=torch.float16, directions=2, wide_direction=True)
    case = replace(case, val_grad=case.val_grad * torch.tensor([size, 0.0])[:, None, None])
    dots = DOTS["linear"](case.x, case.grads, case.val_grad, backend=backend)
    exact = dots_of(case, torch.float64)
    assert (dots[:, 1] == 0).all()
    torch.testing.assert_close(dots[:, 0].double(), exact[:, 0], rtol=0, atol=1e-3 * exact.norm().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layer", list(WGRAD_DOTS))
@pytest.mark.parametrize("segments", [None, torch.tensor([0, 3, 3, 60, 200])])
def test_invariants(layer, backend, segments):
    """Dots sum to <weight_grad, D>; same bits twice; permuted samples permute; a duplicate scores the same."""
    case = make(layer, 5, 40, 48, 33, segments=segments)
    form = {"form": "two"} if layer == "linear" else {}

    def run(order: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        x, grads = case.x[order], case.grads[order]
        return WGRAD_DOTS[layer](x, grads, case.val_grad, segments=segments, backend=backend, **form)

    weight_grad, dots = run([0, 1, 2, 3, 4])
    scale = dots_of(absolute(case), torch.float64).sum().item()
    total = (weight_grad.double() * case.val_grad).sum()
    torch.testing.assert_close(dots.sum().double(), total, rtol=0, atol=1e-6 * scale)
    for first, second in zip((weight_grad, dots), run([0, 1, 2, 3, 4]), strict=True):
        assert torch.equal(first, second)
    if segments is None:
        order = [3, 1, 4, 0, 2]
        assert torch.equal(run(order)[1], dots[order])
        repeated = run([0, 1, 1, 1, 2])[1]
        assert torch.equal(repeated, dots[[0, 1, 1, 1, 2]])


@pytest.mark.parametrize("form", ["two", "prefix", "direct"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forms_on_the_torch_path(form, dtype, monkeypatch):
    """In one block of the weight's rows, and in several."""
    for block, segments in itertools.product((1 << 21, 24 * 7), (None, torch.tensor([0, 0, 3, 40, 40, 200]))):
        monkeypatch.setattr(torch_path, "_BLOCK", block)
        check_form(form, make("linear", 5, 40, 24, 40, directions=2, dtype=dtype, segments=segments), "torch")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", list(LAYERS))
@pytest.mark.parametrize("grouping", [{}, {"segments": torch.tensor([0, 0, 4, 30])}, {"per_token": True}])
def test_the_torch_path_in_many_pieces(grouping, layer, dtype, monkeypatch):
    """Temporaries of a few tokens, samples, rows or columns, the last piece a shorter one."""
    for name, elements in (("_CHUNK", 60), ("_ROWS", 60), ("_BLOCK", 24), ("_DOT", 7)):
        monkeypatch.setattr(torch_path, name, elements)
    for tokens, inputs in ((10, 12), (2, 9)):
        segments = grouping.get("segments")
        options = grouping if segments is None else {"segments": segments.clamp(max=3 * tokens)}
        check(make(layer, 3, tokens, inputs, 7, directions=2, dtype=dtype, **options), "torch")


@pytest.mark.parametrize("form", ["pairwise", "direct", "gradients"])
def test_pairs_on_the_torch_path_in_many_pieces(form, monkeypatch):
    for name, elements in (("_CHUNK", 700), ("_GRADIENTS", (1, 1)), ("_FEWEST", 3)):
        monkeypatch.setattr(torch_path, name, elements)
    for dtype in (torch.float32, torch.bfloat16):
        case, val = (make("linear", n, 5, 9, 7, dtype=dtype, seed=n) for n in (40, 5))
        of_samples = torch.stack([gradient_of(replace(val, x=x[None], grads=g[None]), torch.float64)
                                  for x, g in zip(val.x, val.grads, strict=True)])  # fmt: skip
        found = torch_path.ghost_dot_pairwise(case.x, case.grads, val.x, val.grads, form)
        assert_close(found, dots_of, replace(case, val_grad=of_samples))


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_operands_lie_each_in_a_way_of_its_own(layer, backend):
    """Input, gradient, direction and offsets."""
    layouts = [layout for name, layout in LAYOUTS.items() if name != "one token expanded"]  # equal terms round alike
    for turn, of_x in enumerate(layouts):
        of_grads, of_direction = layouts[turn - 1], layouts[turn - 2]
        for segments, directions in ((None, 2), (torch.tensor([0, 0, 4, 4, 50, 50, 99, 99])[::2], 3)):
            case = make(layer, 3, 33, 17, 20, directions=directions)
            x = of_x(case.x[..., None])[..., 0] if layer == "embedding" else of_x(case.x)
            direction = case.val_grad if case.val_grad.dim() == 3 else case.val_grad[:, None]
            direction = of_direction(direction).view_as(case.val_grad)
            check(replace(case, x=x, grads=of_grads(case.grads), val_grad=direction, segments=segments), backend)


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", list(LAYERS))
def test_products_of_halves_are_not_rounded(layer, dtype, backend):
    """An error as in float32: the oracle's own rounding in half allows for much more."""
    case = make(layer, 4, 40, 33, 20, directions=2, dtype=dtype)
    exact, terms = dots_of(case, torch.float64), dots_of(absolute(case), torch.float64)
    found = [DOTS[layer](case.x, case.grads, case.val_grad, backend=backend)]
    if layer in WGRAD_DOTS:
        weight_grad, dots = WGRAD_DOTS[layer](case.x, case.grads, case.val_grad, backend=backend)
        found.append(dots)
        of_gradient = gradient_of(case, torch.float64), gradient_of(absolute(case), torch.float64)
        assert ((weight_grad - of_gradient[0]).abs() <= 2e-6 * of_gradient[1]).all()
    for dots in found:
        assert ((dots - exact).abs() <= 2e-6 * terms).all()


@pytest.mark.parametrize("backend", [None, *BACKENDS])
@pytest.mark.parametrize("padding", [0, 4])
def test_padding_may_be_the_first_row_or_the_last(padding, backend):
    ids, grads, table = torch.tensor([[0, 4, 1], [4, 0, 0]]), torch.randn(2, 3, 7), torch.randn(2, 5, 7)
    kept = grads * (ids != padding)[..., None]
    found = k.embedding_dot(ids, grads, table, padding_idx=padding, backend=backend)
    torch.testing.assert_close(found, k.embedding_dot(ids, kept, table, backend=backend))


@pytest.mark.parametrize(("form", "digits"), [("two", 2e-6), ("prefix", 6e-6), ("direct", 2e-6)])
def test_a_large_weight_costs_no_digits(form, digits):
    """A float32 dot of millions of terms has an error of its own, some 1e-5 of a sample's dot."""
    generator = torch.Generator().manual_seed(0)
    acts, grads, direction = (
        torch.randn(shape, generator=generator) for shape in ((8, 4, 1536), (8, 4, 2048), (2048, 1536))
    )
    _, dots = k.ghost_wgrad_dot(acts + 1, grads, direction, form=form, backend="torch")
    exact = ((grads.double() @ direction.double()) * (acts + 1).double()).sum((1, 2))
    assert (dots - exact).square().mean().sqrt() < digits * exact.square().mean().sqrt()


@pytest.mark.parametrize("tokens", [1, 2])
def test_terms_of_one_sign_cost_no_digits(tokens):
    """As of a sample along its own gradient, of which a few inputs make the most: BLAS's dot product loses three."""
    generator = torch.Generator().manual_seed(0)
    acts, grads = (torch.randn(1, tokens, width, generator=generator) for width in (768, 1024))
    acts[..., :3] *= 1e3
    case = Case("linear", acts, grads, grads[0].T @ acts[0])
    for form in ("two", "prefix"):
        assert_close(in_form(form, case, "torch")[1], dots_of, case)
    _, norms = k.ghost_square(acts, grads, backend="torch")
    assert_close(norms, norms_of, case)


@pytest.mark.parametrize("backend", [None, "torch"])
@pytest.mark.parametrize("layer", ["bias", "norm"])
def test_many_rows_cost_no_digits(layer, backend):
    """Alike, as of a mean loss, so that each addition to a running sum would round the same way."""
    rows = torch.full((1, 1 << 17, 3), 1.3e-3)
    check(Case(layer, torch.full_like(rows, 0.7), rows, torch.ones(3)), backend)


@pytest.mark.parametrize(("form", "digits"), [("two", 5e-6), ("prefix", 1.2e-5)])
def test_several_directions_of_an_odd_weight_cost_no_digits(form, digits):
    """MKL's dot product of what begins between 16 bytes loses two."""
    generator = torch.Generator().manual_seed(0)
    shapes = (8, 4, 1535), (8, 4, 2047), (4, 2047, 1535)
    acts, grads, directions = (torch.randn(shape, generator=generator) for shape in shapes)
    _, dots = k.ghost_wgrad_dot(acts + 1, grads, directions, form=form, backend="torch")
    projected = torch.einsum("bto,moi->mbti", grads.double(), directions.double())
    exact = (projected * (acts + 1).double()).sum((2, 3)).T
    errors = (dots - exact).square().mean(0).sqrt() / exact.square().mean(0).sqrt()
    assert (errors < digits).all(), errors


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
def test_one_token_whose_rows_are_padded(chip, monkeypatch):
    """Flattened, it lies otherwise: one row is adjacent to any."""
    from inrun_kernels import tiles

    monkeypatch.setattr(tiles, "ON_CPU", chip)
    acts, grads = torch.randn(1, 1, 24).bfloat16()[..., :17], torch.randn(1, 1, 24).bfloat16()[..., :20]
    direction = torch.randn(20, 24).bfloat16()[:, :17]
    expected = (grads[0].float().T @ acts[0].float() * direction.float()).sum()
    for form in ("two", "prefix", "direct"):
        _, dots = k.ghost_wgrad_dot(acts, grads, direction, form=form, backend="triton")
        torch.testing.assert_close(dots[0], expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(k.ghost_dot(acts, grads, direction, backend="triton")[0], expected, rtol=1e-4, atol=1e-4)
    squared = acts.float().square().sum() * grads.float().square().sum()
    pairs = k.ghost_dot_pairwise(acts, grads, acts, grads, backend="triton")
    torch.testing.assert_close(pairs[0, 0], squared, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("segments", [None, torch.tensor([0, 0, 3, 40, 40, 140])])
def test_a_product_of_its_own_beside_the_kernel(segments):
    check_form("direct", make("linear", 7, 20, 24, 40, directions=2, segments=segments))


@pytest.mark.parametrize("form", ["two", "prefix"])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("segments", [None, torch.tensor([0, 0, 3, 40, 40, 140])])
def test_forms_on_every_kind_of_chip(form, chip, segments, monkeypatch):
    """Descriptors, directions that wait in shared memory and pointer loads; samples shared unevenly by programs."""
    from inrun_kernels import tiles, wgrad_dot

    monkeypatch.setattr(tiles, "ON_CPU", chip)
    monkeypatch.setattr(wgrad_dot, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(wgrad_dot, "resident_programs", lambda *tile: 1)
    case = partial(make, "linear", 7, 20, outputs=40, segments=segments)
    for directions, inputs in ((None, 24), (2, 136), (2, 17)):
        check_form(form, case(inputs=inputs, directions=directions, dtype=torch.bfloat16))
    check_form(form, case(inputs=24, directions=2))
    monkeypatch.setattr(wgrad_dot, "_COLUMNS", 16)
    monkeypatch.setattr(wgrad_dot, "_COPIED", 32 * 140)
    launched = []
    launch = wgrad_dot._launch
    monkeypatch.setattr(
        wgrad_dot, "_launch", lambda x, grads, *rest: launched.append(grads.shape[2]) or launch(x, grads, *rest)
    )
    check_form(form, case(inputs=32, outputs=75, directions=2, dtype=torch.bfloat16))
    assert launched[:3] == [32, 32, 11]


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("inputs, outputs", [(16, 75), (13, 48), (21, 75), (16, 56)])
def test_pairs_of_rows_that_are_not_aligned(chip, inputs, outputs, monkeypatch):
    """Copied to rows that are, some samples of each side at a time; a few tokens, and float32, are read as they are."""
    from inrun_kernels import pairwise, tiles

    monkeypatch.setattr(tiles, "ON_CPU", chip)
    monkeypatch.setattr(pairwise, "_FEW", 30)
    monkeypatch.setattr(pairwise, "_COPIED", 20 * inputs)
    readable = pairwise.copyable if chip == "sm_90" else pairwise.aligned
    launched, launch = [], pairwise._launch
    monkeypatch.setattr(pairwise, "_launch", lambda *sides: launched.append(sides) or launch(*sides))
    wide = chip == "sm_90" and outputs == 56  # in steps of 16 bytes, of which its copies are made
    for dtype, val_samples in ((torch.bfloat16, 5), (torch.bfloat16, 3), (torch.bfloat16, 2), (torch.float32, 5)):
        train, val = (make("linear", b, 10, inputs, outputs, dtype=dtype) for b in (7, val_samples))
        launched.clear()
        found = k.ghost_dot_pairwise(train.x, train.grads, val.x, val.grads, backend="triton")
        sides = [x.double() for x in (train.x, train.grads, val.x, val.grads)]
        scale = k.ghost_dot_pairwise(*(x.abs() for x in sides)).float()
        assert ((found - k.ghost_dot_pairwise(*sides)).abs() <= 1e-5 * scale).all()
        if dtype == torch.bfloat16 and val_samples >= 3 and not wide:
            assert len(launched) > (4 if val_samples == 5 else 1) and all(readable(*sides) for sides in launched)
        else:
            assert len(launched) == 1


@pytest.mark.parametrize("slots", [3, 7])
@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("form", ["two", "prefix"])
def test_forms_however_programs_share_the_tiles(form, chip, slots, monkeypatch):
    """Whole tiles, equal parts of each and of all: programs begin and end within a tile, and within a sample."""
    from inrun_kernels import tiles, wgrad_dot

    plans = []

    def share(*arguments: int) -> config.Share:
        plans.append(config.share.__wrapped__(*arguments[:5]))
        return plans[-1]

    monkeypatch.setattr(config, "_PIECE", 0)
    monkeypatch.setattr(wgrad_dot, "share", share)
    monkeypatch.setattr(tiles, "ON_CPU", chip)
    monkeypatch.setattr(wgrad_dot, "multiprocessors", lambda device: slots)
    monkeypatch.setattr(wgrad_dot, "resident_programs", lambda *tile: 1)
    for segments in (None, torch.tensor([0, 0, 3, 40, 40, 140])):
        for directions, inputs in ((None, 24), (2, 136)):
            case = make("linear", 7, 20, inputs, 40, segments=segments, directions=directions, dtype=torch.bfloat16)
            check_form(form, case)
    check_form(form, make("linear", 7, 70, 136, 140, directions=2, dtype=torch.bfloat16))
    assert any(plan.programs for plan in plans)


def test_tiles_are_shared_where_that_is_quicker_and_memory_stays_clear_of_samples_gradients():
    """H100's 132 programs at a time. Tiles, samples of 1024 tokens in 16 blocks, how many of them a program has."""
    for tiles, within, whole, programs, per in (
        (512, 16, 396, 132, 225),  # of 256, of the 116 beyond three each
        (525, 16, 525, 0, 0),  # 129 beyond three each: a piece would cost more
        (72, 16, 0, 132, 140),  # of 256, across tiles
        (18, 16, 0, 126, 37),  # seven to each
        (144, 1, 132, 96, 2),  # 12 beyond one each, of 16 samples
    ):
        found = config.share.__wrapped__(tiles, 16 * within, 16, 16 * 1024, 132)
        assert (found.whole, found.programs, found.per) == (whole, programs, per)
    for tiles, samples, slots in itertools.product((1, 7, 100, 150), (1, 2, 3, 8, 64), (1, 8, 132, 10_000)):
        for units in (samples, 9 * samples):
            plan = config.share.__wrapped__(tiles, units, samples, samples << 20, slots)
            shared = tiles - plan.whole
            assert plan.programs == 0 or shared * units <= plan.programs * plan.per
            assert plan.pieces <= shared * samples * 5 / 8 and plan.whole % slots in (0, tiles % slots)


@pytest.mark.parametrize("chip", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("segments", [None, torch.tensor([0, 0, 3, 40, 40, 140])])
def test_squares_on_every_kind_of_chip(chip, segments, monkeypatch):
    """As the forms; and a sample's norm is its own, to the bit, whatever else is in the batch."""
    from inrun_kernels import tiles, wgrad_dot

    monkeypatch.setattr(tiles, "ON_CPU", chip)
    monkeypatch.setattr(wgrad_dot, "multiprocessors", lambda device: 3)
    monkeypatch.setattr(wgrad_dot, "resident_programs", lambda *tile: 1)
    monkeypatch.setattr(wgrad_dot, "_COLUMNS", 16)
    for dtype, inputs, outputs in ((torch.bfloat16, 136, 40), (torch.bfloat16, 32, 75), (torch.float32, 24, 40)):
        case = make("linear", 7, 20, inputs, outputs, segments=segments, dtype=dtype)
        squares, norms = k.ghost_square(case.x, case.grads, segments=segments, backend="triton")
        assert_close(squares, squares_of, case)
        assert_close(norms, norms_of, case)
        torch.testing.assert_close(norms.sum(), squares.sum())
        if segments is None:
            order = [3, 1, 1, 0, 6]
            assert torch.equal(k.ghost_square(case.x[order], case.grads[order], backend="triton")[1], norms[order])


@pytest.mark.parametrize("chip", ["sm_80", "sm_90"])
@pytest.mark.parametrize("inputs, outputs", [(136, 72), (72, 136), (72, 17), (72, 137), (137, 72)])
def test_dots_on_every_kind_of_chip(chip, inputs, outputs, monkeypatch):
    """Descriptors of either orientation of the direction, and pointer loads; several tiles and their tails."""
    from inrun_kernels import tiles

    monkeypatch.setattr(tiles, "ON_CPU", chip)
    for dtype in (torch.bfloat16, torch.float16):
        case = make("linear", 5, 29, inputs, outputs, directions=2, dtype=dtype)
        check(case, "triton")
        val = make("linear", 2, 37, inputs, outputs, dtype=dtype, seed=1)
        found = k.ghost_dot_pairwise(case.x, case.grads, val.x, val.grads, backend="triton")
        of_samples = torch.stack([gradient_of(replace(val, x=x[None], grads=g[None]), torch.float64)
                                  for x, g in zip(val.x, val.grads, strict=True)])  # fmt: skip
        pairs = replace(case, val_grad=of_samples)
        assert_close(found, dots_of, pairs)


@pytest.mark.parametrize("slots", [1, 6, 40])
@pytest.mark.parametrize("n_val, val_tokens", [(3, 100), (7, 5), (2, 1)])
def test_pairs_however_programs_share_the_validation_samples(slots, n_val, val_tokens, monkeypatch):
    """Many samples to a program, one, or a part of one; several samples to a tile, or several tiles to a sample."""
    from inrun_kernels import pairwise

    monkeypatch.setattr(pairwise, "multiprocessors", lambda device: slots)
    monkeypatch.setattr(pairwise, "resident_programs", lambda *tile: 1)
    case = make("linear", 3, 29, 20, 33)
    val = make("linear", n_val, val_tokens, 20, 33, seed=1)
    found = k.ghost_dot_pairwise(case.x, case.grads, val.x, val.grads, backend="triton")
    of_samples = torch.stack([gradient_of(replace(val, x=x[None], grads=g[None]), torch.float64)
                              for x, g in zip(val.x, val.grads, strict=True)])  # fmt: skip
    assert_close(found, dots_of, replace(case, val_grad=of_samples))
    order = [2, 0, 1]
    # numpy interprets `tl.dot`, by a BLAS that may round the rows of a tile each in its own way: not of float64.
    multiply = np.matmul
    monkeypatch.setattr(np, "matmul", lambda a, b, dtype: multiply(a, b, dtype=np.float64).astype(dtype))
    found, permuted = (
        k.ghost_dot_pairwise(case.x[i], case.grads[i], val.x, val.grads, backend="triton") for i in (slice(None), order)
    )
    assert torch.equal(permuted, found[order])


def test_the_two_form_keeps_a_small_sample_beside_a_large_one():
    """After a sample 1e6 times as large, `two` is as exact as alone, bit for bit; `prefix` keeps what it promises."""
    case = make("linear", 2, 33, 24, 16)
    loud = replace(case, x=case.x * torch.tensor([1e6, 1.0])[:, None, None])
    alone = in_form("two", replace(case, x=case.x[1:], grads=case.grads[1:]))[1]
    assert torch.equal(in_form("two", loud)[1][1:], alone)
    check_form("prefix", loud)
    error = (in_form("prefix", loud)[1][1] - alone[0]).abs()
    assert error > 1e3 * torch.finfo(torch.float32).eps * alone.abs()
