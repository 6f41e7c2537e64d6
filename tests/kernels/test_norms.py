"""The backward of norms with dots in one pass, against autograd, one document at a time."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import assert_norm_close, norm

from inrun_kernels import native, norms_kernel
from inrun_kernels import norms as of_norms


@st.composite
def norms(draw, widths):
    lengths = draw(st.lists(st.sampled_from([0, 1, 7, 40, 129]), min_size=1, max_size=5))
    return {
        "lengths": [max(1, lengths[0]), *lengths[1:]],
        "width": draw(widths),
        "directions": draw(st.integers(1, 3)),
        "layer": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "missing": draw(st.sampled_from([None, 0, 1])),
        "seed": draw(st.integers(0, 99)),
    }


@settings(max_examples=15)
@given(case=norms(st.sampled_from([3, 16, 33, 64, 700])), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
def test_the_triton_kernel_matches_autograd(case, dtype):
    arguments, expected = norm(**case, dtype=dtype)
    assert_norm_close(norms_kernel.launch_norm_backward(*arguments), expected)


def test_rows_of_many_programs_and_of_a_batch(monkeypatch):
    """More tiles than programs that run at once; dots of each row where there are no documents."""
    monkeypatch.setattr(norms_kernel, "multiprocessors", lambda device: 2)
    arguments, (*gradients, _) = norm([1200], 300, 1, layer=True, bias=True)
    x, grads, weight, stats, *pair, _, _ = arguments
    batch = (x.view(8, 150, 300), grads.view(8, 150, 300), weight, stats, *pair, None, True)
    grad_x, *found, dots = norms_kernel.launch_norm_backward(*batch)
    _, (*_, by_row) = norm([150] * 8, 300, 1, layer=True, bias=True)
    assert_norm_close((grad_x.view(1, 1200, 300), *found, dots), [*gradients, by_row])


@pytest.mark.parametrize("directions", [1, 3])
def test_sums_of_more_programs_than_a_second_stage_adds_at_once(directions, monkeypatch):
    monkeypatch.setattr(norms_kernel, "multiprocessors", lambda device: 300)
    arguments, (*gradients, _) = norm([600], 1000, directions, layer=True, bias=True)
    x, grads, weight, stats, *pair, _, _ = arguments
    batch = (x.view(3, 200, 1000), grads.view(3, 200, 1000), weight, stats, *pair, None, True)
    grad_x, *found, dots = norms_kernel.launch_norm_backward(*batch)
    _, (*_, by_row) = norm([200] * 3, 1000, directions, layer=True, bias=True)
    assert_norm_close((grad_x.view(1, 600, 1000), *found, dots), [*gradients, by_row])


@pytest.mark.parametrize("change", [{"dtype": torch.float64}, {"width": 17}, {"width": 24}, {"directions": 2}])
def test_what_has_no_kernel_is_told(change):
    """On a CPU: float64, a width that is no whole vectors, directions of different numbers."""
    (x, grads, weight, stats, scale, shift, ends, bias), _ = norm(
        [3, 4],
        **{"width": 16, "directions": 1, **{k: v for k, v in change.items() if k != "dtype"}},
        layer=True,
        bias=True,
    )
    if "dtype" in change:
        x, grads, weight = (y.double() for y in (x, grads, weight))
    shift = shift[:1] if "directions" in change else shift
    assert of_norms.norm_backward(x, grads, weight, stats, scale, shift, ends, bias) is None


def test_what_does_not_belong_together_is_told():
    (x, grads, weight, stats, scale, shift, _, bias), _ = norm([3, 4], 16, 1, layer=True, bias=True)
    wide = scale.repeat(1, 2), shift.repeat(1, 2)
    assert of_norms.norm_backward(x, grads, weight, stats, *wide, None, bias) is None
    if native.library() is not None:
        with pytest.raises(ValueError, match=r"segments: expected .* = 7, received \[0, 8\]"):
            of_norms.norm_backward(x, grads, weight, stats, scale, shift, torch.tensor([0, 8]), bias)


@pytest.mark.parametrize("layer", [True, False])
@pytest.mark.parametrize("run", [native.norm_backward, norms_kernel.launch_norm_backward])
def test_operands_that_lie_apart(run, layer):
    """Features or tokens first, numbers beside each other's, as views leave them."""
    if run is native.norm_backward and native.library() is None:
        pytest.skip("needs a C compiler")
    (x, grads, weight, stats, scale, shift, ends, bias), expected = norm([5, 0, 7], 48, 2, layer=layer, bias=layer)
    weight, scale, shift = (y.repeat_interleave(2, -1)[..., ::2] for y in (weight, scale, shift))
    stats = tuple(y.repeat_interleave(2, 1)[:, ::2] for y in stats) if isinstance(stats, tuple) else stats
    x, grads = x.mT.contiguous().mT, grads.repeat_interleave(2, 1)[:, ::2]
    assert_norm_close(run(x, grads, weight, stats, scale, shift, ends.repeat_interleave(2)[::2], bias), expected)


def test_a_launch_that_is_remembered_is_of_the_same_eps_and_documents():
    (x, grads, weight, _, scale, *_), expected = norm([5, 7], 64, 1, layer=False, bias=False, missing=1)
    for eps, ends in ((1.0, None), (1e-5, torch.tensor([0, 5, 12])), (1e-5, None)):
        found = norms_kernel.launch_norm_backward(x, grads, weight, eps, scale, None, ends, False)
    right = [*expected[:3], expected[3].sum(0, keepdim=True)]
    assert_norm_close(found, right)
    found = norms_kernel.launch_norm_backward(x, grads, weight, 1e-5, scale, None, torch.tensor([0, 5, 12]), False)
    assert_norm_close(found, expected)


def test_an_eps_of_zero_says_nothing_beyond_the_last_row():
    (x, grads, weight, _, scale, *_), _ = norm([5], 64, 1, layer=False, bias=False, missing=1)
    found = norms_kernel.launch_norm_backward(x, grads, weight, 0.0, scale, None, None, False)
    assert all(y is None or y.isfinite().all() for y in found)


@pytest.mark.parametrize("tokens", [1, 7, 130])
def test_a_dot_has_the_same_bits_whatever_else_is_in_the_batch(tokens):
    """In C, of norms and of rows; a sample by itself and behind others."""
    if native.library() is None:
        pytest.skip("needs a C compiler")
    (x, grads, weight, stats, scale, shift, ends, _), _ = norm([40, tokens, 200], 48, 2, layer=True, bias=True)
    alone = slice(40, 40 + tokens)
    own_stats = tuple(y[:, alone] for y in stats)
    together = native.norm_backward(x, grads, weight, stats, scale, shift, ends, True)[3][1]
    apart = native.norm_backward(x[:, alone], grads[:, alone], weight, own_stats, scale, shift, None, True)[3][0]
    assert torch.equal(together, apart)
    for run in (native.row_wgrad_dot, lambda *given: (None, native.row_dot(*given, False))):
        assert torch.equal(run(x, grads, scale, ends)[1][1], run(x[:, alone], grads[:, alone], scale, None)[1][0])
