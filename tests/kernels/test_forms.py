"""Which form a product takes: the clear cases, and that it is the one that runs."""

import itertools
from unittest.mock import patch

import pytest
import torch

import inrun_kernels as k
from inrun_kernels import forms, native, torch_path


def pair(batch: int, tokens: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.ones(batch, tokens, inputs), torch.ones(batch, tokens, outputs)


@pytest.fixture(params=itertools.product([*forms.COSTS, "another"], [True, False]), ids=str)
def cpu(request, monkeypatch):
    """Each processor whose costs are known, and one that is not; with and without a C compiler."""
    vendor, compiler = request.param
    monkeypatch.setattr(forms, "cpu_vendor", lambda: vendor)
    monkeypatch.setattr(native, "runs", lambda *tensors: compiler)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    return vendor


ALIKE = "AuthenticAMD avx512f", "AuthenticAMD 26"  # there "two" takes single tokens in no more time, to a hundredth


@pytest.mark.parametrize(
    "batch, tokens, inputs, outputs, quick, in_c",
    [
        (64, 1, 384, 384, {"direct"}, {"two", "direct"}),  # a weight's passes for each token
        (512, 1, 768, 3072, {"direct"}, {"direct"}),
        (8, 1, 384, 384, {"direct"}, {"two"}),  # in C without passes
        (8, 4, 768, 3072, {"direct"}, {"two", "direct"}),
        (8, 8, 768, 3072, {"direct"}, {"two"}),
        (8, 128, 768, 3072, {"two", "prefix"}, {"two"}),
        (8, 1024, 768, 768, {"two", "prefix"}, {"two"}),  # the passes are nothing beside the product
        (1, 1, 3072, 768, {"direct"}, {"direct"}),  # an outer product, whose dot need not read it
        (1, 256, 768, 3072, {"two", "prefix"}, {"two", "prefix"}),  # of one sample both are the plain product
    ],
)
def test_the_form_of_the_weight_gradient_in_clear_cases(batch, tokens, inputs, outputs, quick, in_c, cpu):
    """`in_c`: where there is the kernel in C, which takes the place of "two" for more than one sample."""
    in_c = in_c | {"two"} if cpu in ALIKE and (batch, tokens) == (512, 1) else in_c
    choice = k.explain(k.ghost_wgrad_dot, *pair(batch, tokens, inputs, outputs), torch.ones(outputs, inputs))
    assert choice.form in (in_c if native.runs() else quick)
    assert choice.reason.startswith(choice.form)
    forms_known = {"two", "direct"} if native.runs() and batch > 1 else {"two", "prefix", "direct"}
    assert set(choice.seconds) in (forms_known, set())


def test_a_little_quicker_is_not_enough_for_the_rounding_of_prefix():
    costs = dict.fromkeys(("two", "direct"), forms.Cost(1.0, 0, 0, 0, 0))
    for prefix, form in ((0.97, "two"), (0.9, "prefix")):
        work = dict.fromkeys(("two", "prefix", "direct"), (1, 1, 1, 1))
        choice = forms.quickest({**costs, "prefix": forms.Cost(prefix, 0, 0, 0, 0)}, 1, work)
        assert choice.form == form


@pytest.mark.parametrize("backend", [None, "torch"])
def test_a_large_sample_takes_no_digits_of_others_unless_prefix_is_asked_for(backend):
    dtype, generator = torch.float16 if backend is None else torch.float32, torch.Generator().manual_seed(0)
    acts, grads, direction = (
        torch.randn(shape, generator=generator).to(dtype) for shape in ((4, 512, 128), (4, 512, 1024), (1024, 128))
    )
    grads *= torch.tensor([1e3, 1e-2, 1e-2, 1e-2], dtype=dtype).view(4, 1, 1)
    exact = torch.einsum("bto,bti,oi->b", grads.double(), acts.double(), direction.double())
    _, dots = k.ghost_wgrad_dot(acts, grads, direction, backend=backend)
    assert ((dots - exact).abs() < 1e-4 * exact.abs()).all()


@pytest.mark.parametrize("directions", [1, 3])
def test_dots_alone_are_made_in_c_where_that_multiplies_quicker_or_once_for_several(directions, cpu):
    sizes = [(8 * 256, 8, 768, 3072), (8 * 32, 8, 384, 384), (256, 1, 768, 768)]
    assert {forms.dots_in_c(*each, directions) for each in sizes} == {directions > 1 or cpu == "AuthenticAMD 26"}


@pytest.mark.parametrize("directions", [1, 3])
@pytest.mark.parametrize("segments", [None, torch.tensor([0, 0, 7, 40, 63])])
def test_dots_in_c_are_those_of_a_product(segments, directions, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    acts, grads, direction = (
        torch.randn(shape, generator=generator) for shape in ((7, 9, 33), (7, 9, 20), (directions, 20, 33))
    )
    asked = []
    monkeypatch.setattr(forms, "dots_in_c", lambda *sizes: asked.append(sizes) or True)
    found = k.ghost_dot(acts, grads, direction, segments=segments)
    expected = k.ghost_dot(acts.double(), grads.double(), direction.double(), segments=segments)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-4)
    if native.runs(acts):
        assert asked == [(63, 7 if segments is None else 4, 33, 20, directions)]
    empty = k.ghost_dot(acts[:0], grads[:0], direction)
    assert empty.shape == (0, directions) and (len(asked) == 1 or not native.runs(acts))


def test_documents_count_as_samples(cpu):
    acts, grads = pair(2, 512, 768, 768)
    direction = torch.ones(768, 768)
    every_token = torch.arange(1025)
    of_tokens = k.explain(k.ghost_wgrad_dot, acts, grads, direction, segments=every_token)
    assert of_tokens.form == "direct" or (cpu in ALIKE and native.runs())
    assert k.explain(k.ghost_wgrad_dot, acts, grads, direction).form != "direct"
    interpreted = {"backend": "triton"}
    assert k.explain(k.ghost_wgrad_dot, acts, grads, direction, segments=every_token, **interpreted).form == "direct"
    assert k.explain(k.ghost_wgrad_dot, acts, grads, direction, **interpreted).form == "two"


@pytest.mark.parametrize(
    "chip, dtype, batch, tokens, width, form",
    [
        ("sm_90", torch.bfloat16, 4, 2048, 4096, "prefix"),  # two accumulators' tiles wait for the cache
        ("sm_90", torch.float16, 16, 1024, 768, "prefix"),
        ("sm_90", torch.bfloat16, 2, 64, 256, "two"),  # a launch, and little else
        ("sm_90", torch.float32, 4, 2048, 4096, "two"),  # the same tile in both
        ("sm_100", torch.bfloat16, 4, 2048, 4096, "two"),  # results lie in tensor memory: the same tile again
        ("sm_70", torch.float16, 4, 2048, 4096, "two"),
    ],
)
def test_the_form_on_a_gpu_is_the_one_whose_tiles_are_quicker(chip, dtype, batch, tokens, width, form, monkeypatch):
    from inrun_kernels import tiles

    monkeypatch.setattr(tiles, "ON_CPU", chip)
    acts = torch.empty(batch, tokens, width, dtype=dtype)
    offsets = torch.arange(0, batch * tokens + 1, tokens)
    for segments in (None, offsets):
        choice = k.explain(k.ghost_wgrad_dot, acts, acts, acts[0, :1].expand(width, -1), segments=segments,
                           backend="triton")  # fmt: skip
        assert choice.form == form and choice.reason.startswith(form)
        assert set(choice.seconds) in ({"two", "prefix"}, set())


@pytest.mark.usefixtures("cpu")
@pytest.mark.parametrize(
    "val, tokens, width, form", [(1, 16, 2048, "pairwise"), (1, 1024, 768, "direct"), (8, 1024, 64, "gradients")]
)
def test_the_form_of_pairs_in_clear_cases(val, tokens, width, form):
    assert (
        k.explain(k.ghost_dot_pairwise, *pair(8, tokens, width, width), *pair(val, tokens, width, width)).form == form
    )


@pytest.mark.parametrize("tokens", [1, 24, 300])
@pytest.mark.parametrize("compiler", [True, False])
def test_what_is_explained_is_what_runs(tokens, compiler, monkeypatch):
    if compiler and native.library() is None:
        pytest.skip("needs a C compiler")
    monkeypatch.setattr(native, "runs", lambda *tensors: compiler)
    acts, grads = pair(4, tokens, 96, 128)
    direction = torch.ones(128, 96)
    expected = k.explain(k.ghost_wgrad_dot, acts, grads, direction).form
    with (
        patch.object(torch_path, "ghost_wgrad_dot", wraps=torch_path.ghost_wgrad_dot) as ran,
        patch.object(native, "ghost_wgrad_dot", wraps=native.ghost_wgrad_dot) as ran_native,
    ):
        k.ghost_wgrad_dot(acts, grads, direction)
    if compiler and expected == "two":
        assert ran_native.called and not ran.called
    else:
        assert ran.call_args.args[4] == expected and not ran_native.called
    with patch.object(torch_path, "ghost_dot_pairwise", wraps=torch_path.ghost_dot_pairwise) as ran:
        k.ghost_dot_pairwise(acts, grads, acts, grads)
    assert ran.call_args.args[-1] == k.explain(k.ghost_dot_pairwise, acts, grads, acts, grads).form


def test_more_threads_share_the_work_but_not_the_calls():
    cost = forms.Cost(call=1.0, sample=0.5, flop=8.0, weight=4.0, row=4.0)
    work = (2, 1, 1, 1)
    assert cost.seconds(work, threads=1) == 18 and cost.seconds(work, threads=4) == 6


def test_another_product_is_refused():
    acts, grads = pair(1, 2, 3, 4)
    with pytest.raises(ValueError, match="product: expected ghost_wgrad_dot or ghost_dot_pairwise, received"):
        k.explain(k.ghost_dot, acts, grads, torch.ones(4, 3))
