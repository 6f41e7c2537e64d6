"""What a wrong argument gets: an error that names it, says what was expected and what came."""

import numpy as np
import pytest
import torch

import inrun_kernels as k
from inrun_kernels import reference, validation

ACTS, GRADS, MATRIX, ROW = torch.zeros(2, 3, 4), torch.zeros(2, 3, 5), torch.zeros(5, 4), torch.zeros(5)
IDS, TABLE = torch.zeros(2, 3, dtype=torch.int64), torch.zeros(7, 5)


def offsets(*values: int) -> torch.Tensor:
    return torch.tensor(values)


BAD = {
    "not a tensor": (
        lambda: k.ghost_dot([1.0], GRADS, MATRIX),
        TypeError,
        "acts: expected a torch.Tensor, received list",
    ),
    "integers": (lambda: k.ghost_dot(ACTS.int(), GRADS, MATRIX), TypeError, "acts: expected .* received torch.int32"),
    "sparse": (
        lambda: k.ghost_dot(ACTS.to_sparse(), GRADS, MATRIX),
        TypeError,
        "acts: expected a dense tensor, received one of layout torch.sparse_coo",
    ),
    "sparse direction": (
        lambda: k.ghost_wgrad_dot(ACTS, GRADS, MATRIX.to_sparse()),
        TypeError,
        "val_grad: expected a dense tensor, received one of layout torch.sparse_coo",
    ),
    "nested": (
        lambda: k.ghost_dot_pairwise(ACTS, torch.nested.as_nested_tensor([*GRADS]), ACTS, GRADS),
        TypeError,
        "grads: expected a dense tensor, received a nested one",
    ),
    "no token axis": (lambda: k.ghost_dot(ACTS[0], GRADS, MATRIX), ValueError, r"acts: expected 3 dim.* \[3, 4\]"),
    "tokens differ": (
        lambda: k.ghost_dot(ACTS, GRADS[:, :2], MATRIX),
        ValueError,
        r"grads: expected .* of acts \[2, 3, 4\], received \[2, 2, 5\]",
    ),
    "dtypes differ": (
        lambda: k.ghost_dot(ACTS, GRADS.half(), MATRIX),
        TypeError,
        r"grads: expected the dtype of acts \(torch.float32\), received torch.float16",
    ),
    "devices differ": (
        lambda: k.ghost_dot(ACTS, GRADS.to("meta"), MATRIX),
        ValueError,
        "grads: expected device cpu, received meta",
    ),
    "squares of tokens that differ": (
        lambda: k.ghost_square(ACTS, GRADS[:, :2]),
        ValueError,
        r"grads: expected .* of acts \[2, 3, 4\], received \[2, 2, 5\]",
    ),
    "squares of segments that end early": (
        lambda: k.ghost_square(ACTS, GRADS, segments=torch.tensor([0, 5])),
        ValueError,
        "segments: expected",
    ),
    "direction shape": (
        lambda: k.ghost_wgrad_dot(ACTS, GRADS, MATRIX.T),
        ValueError,
        r"val_grad: expected \[outputs, inputs\] = \[5, 4\], .* received \[4, 5\]",
    ),
    "no direction": (
        lambda: k.bias_dot(GRADS, ROW[None][:0]),
        ValueError,
        r"val_grad: expected .* leading M >= 1 .* received \[0, 5\]",
    ),
    "direction dtype": (
        lambda: k.ghost_dot(ACTS, GRADS, MATRIX.double()),
        TypeError,
        "val_grad: expected torch.float32, received torch.float64",
    ),
    "direction of a half": (
        lambda: k.ghost_dot(ACTS.half(), GRADS.half(), MATRIX.bfloat16()),
        TypeError,
        "val_grad: expected torch.float16 or torch.float32, received torch.bfloat16",
    ),
    "directions differ in number": (
        lambda: k.linear_wgrad_dot(ACTS, GRADS, MATRIX, ROW.expand(2, 5)),
        ValueError,
        "bias_val_grad: expected M = 1, as val_grad, got 2",
    ),
    "bias direction": (
        lambda: k.linear_wgrad_dot(ACTS, GRADS, MATRIX, ROW[1:]),
        ValueError,
        r"bias_val_grad: expected \[outputs\] = \[5\], .* received \[4\]",
    ),
    "gradient dtype": (
        lambda: k.ghost_wgrad_dot(ACTS, GRADS, MATRIX, grad_dtype=torch.float16),
        TypeError,
        "grad_dtype: expected None, torch.float32, received torch.float16",
    ),
    "segments dtype": (
        lambda: k.ghost_dot(ACTS, GRADS, MATRIX, segments=torch.zeros(2)),
        TypeError,
        "segments: expected one of torch.int32, torch.int64, received torch.float32",
    ),
    "segments shape": (
        lambda: k.ghost_dot(ACTS, GRADS, MATRIX, segments=offsets(0, 6)[None]),
        ValueError,
        r"segments: expected 1 dimension .* received \[1, 2\]",
    ),
    "segments beside per_token": (
        lambda: k.ghost_dot(ACTS, GRADS, MATRIX, segments=offsets(0, 6), per_token=True),
        ValueError,
        "per_token: expected False when segments is given, received True",
    ),
    "segments start": (
        lambda: k.ghost_dot(ACTS, GRADS, MATRIX, segments=offsets(1, 6)),
        ValueError,
        r"segments: expected non-decreasing offsets from 0 to batch \* tokens = 6, received \[1, 6\]",
    ),
    "segments end": (
        lambda: k.norm_dot(GRADS, GRADS, ROW, segments=offsets(0, 7)),
        ValueError,
        r"segments: expected .* = 6, received \[0, 7\]",
    ),
    "segments decrease": (
        lambda: k.ghost_wgrad_dot(ACTS, GRADS, MATRIX, segments=offsets(0, 4, 3, 6)),
        ValueError,
        r"segments: expected non-decreasing .* received \[0, 4, 3, 6\]",
    ),
    "segments whose difference overflows": (
        lambda: k.ghost_wgrad_dot(ACTS, GRADS, MATRIX, segments=offsets(0, 2**31 - 1, -2, 6).int()),
        ValueError,
        r"segments: expected non-decreasing .* received \[0, 2147483647, -2, 6\]",
    ),
    "many segments": (
        lambda: k.bias_dot(GRADS, ROW, segments=torch.arange(20)),
        ValueError,
        "segments: .* received 20 values from 0 to 19",
    ),
    "id too large": (
        lambda: k.embedding_dot(IDS + 7, GRADS, TABLE),
        ValueError,
        r"ids: expected values from 0 to 6, received \[\[7, 7, 7\], \[7, 7, 7\]\]",
    ),
    "negative id": (lambda: k.embedding_dot(IDS - 1, GRADS, TABLE), ValueError, "ids: expected values from 0 to 6"),
    "ids shape": (
        lambda: k.embedding_dot(IDS[:1], GRADS, TABLE),
        ValueError,
        r"ids: expected \[batch, tokens\] = \[2, 3\], received \[1, 3\]",
    ),
    "table width": (
        lambda: k.embedding_dot(IDS, GRADS, TABLE[:, 1:]),
        ValueError,
        r"val_grad: expected \[vocabulary, features\] = \['any', 5\], .* received \[7, 4\]",
    ),
    "padding outside": (
        lambda: k.embedding_dot(IDS, GRADS, TABLE, padding_idx=-1),
        ValueError,
        "padding_idx: expected None or a value from 0 to 6, received -1",
    ),
    "padding of no kind": (
        lambda: k.embedding_dot(IDS, GRADS, TABLE, padding_idx=1.5),  # pyright: ignore[reportArgumentType]
        TypeError,
        "padding_idx: expected None or an int, received float 1.5",
    ),
    "explained too little": (
        lambda: k.explain(k.ghost_wgrad_dot, ACTS, GRADS),
        TypeError,
        "args: expected the 3 tensors of ghost_wgrad_dot, received 2",
    ),
    "pairs of documents": (
        lambda: k.explain(k.ghost_dot_pairwise, ACTS, GRADS, ACTS, GRADS, segments=torch.tensor([0, 2])),
        ValueError,
        "segments: expected None for ghost_dot_pairwise",
    ),
    "norm widths": (
        lambda: k.norm_wgrad_dot(ACTS, GRADS, ROW),
        ValueError,
        "normed: expected 5 features, as grads, received 4",
    ),
    "row direction": (
        lambda: k.bias_wgrad_dot(GRADS, ROW[1:]),
        ValueError,
        r"val_grad: expected \[features\] = \[5\], .* received \[4\]",
    ),
    "pairwise widths": (
        lambda: k.ghost_dot_pairwise(ACTS, GRADS, GRADS, GRADS),
        ValueError,
        "val_acts: expected 4 features, as acts, received 5",
    ),
    "pairwise dtypes": (
        lambda: k.ghost_dot_pairwise(ACTS, GRADS, ACTS.half(), GRADS.half()),
        TypeError,
        r"val_acts: expected the dtype of acts \(torch.float32\), received torch.float16",
    ),
    "nested, of the plainest call": (
        lambda: k.ghost_wgrad_dot(torch.nested.nested_tensor([ACTS[0], ACTS[1]]), GRADS, MATRIX),
        TypeError,
        "acts: expected a dense tensor, received a nested one",
    ),
    "backend": (
        lambda: k.ghost_dot(ACTS, GRADS, MATRIX, backend="cuda"),
        ValueError,
        "backend: expected None, 'triton' or 'torch', received 'cuda'",
    ),
    "form": (
        lambda: k.ghost_wgrad_dot(ACTS, GRADS, MATRIX, form="one"),
        ValueError,
        "form: expected None, 'two', 'prefix' or 'direct', received 'one'",
    ),
    "tokens differ, of the plainest call": (
        lambda: k.ghost_wgrad_dot(ACTS, GRADS[:, :2], MATRIX),
        ValueError,
        r"grads: expected .* of acts \[2, 3, 4\], received \[2, 2, 5\]",
    ),
    "directions of directions": (
        lambda: k.ghost_wgrad_dot(ACTS, GRADS, MATRIX[None, None]),
        ValueError,
        r"val_grad: expected \[outputs, inputs\] = \[5, 4\], .* received \[1, 1, 5, 4\]",
    ),
    "gradient dtype beside a bias": (
        lambda: k.linear_wgrad_dot(ACTS, GRADS, MATRIX, ROW, grad_dtype=torch.float16),
        TypeError,
        "grad_dtype: expected None, torch.float32, received torch.float16",
    ),
    "form beside a bias": (
        lambda: k.linear_wgrad_dot(ACTS, GRADS, MATRIX, ROW, form="one"),
        ValueError,
        "form: expected None, 'two', 'prefix' or 'direct', received 'one'",
    ),
    "tokens of pairs differ": (
        lambda: k.ghost_dot_pairwise(ACTS, GRADS, ACTS, GRADS[:, :2]),
        ValueError,
        r"val_grads: expected .* of val_acts \[2, 3, 4\], received \[2, 2, 5\]",
    ),
    "widths of pairs' gradients": (
        lambda: k.ghost_dot_pairwise(ACTS, GRADS, ACTS, ACTS),
        ValueError,
        "val_grads: expected 5 features, as grads, received 4",
    ),
    "direction elsewhere": (
        lambda: k.ghost_dot(ACTS, GRADS, MATRIX.to("meta")),
        ValueError,
        "val_grad: expected device cpu, received meta",
    ),
    "segments elsewhere": (
        lambda: k.ghost_dot(ACTS, GRADS, MATRIX, segments=offsets(0, 6).to("meta")),
        ValueError,
        "segments: expected device cpu, received meta",
    ),
    "ids elsewhere": (
        lambda: k.embedding_dot(IDS.to("meta"), GRADS, TABLE),
        ValueError,
        "ids: expected device cpu, received meta",
    ),
    "segments beside per_token, of embeddings": (
        lambda: k.embedding_dot(IDS, GRADS, TABLE, segments=offsets(0, 6), per_token=True),
        ValueError,
        "per_token: expected False when segments is given, received True",
    ),
    "segments beside per_token, of norms": (
        lambda: k.norm_dot(GRADS, GRADS, ROW, segments=offsets(0, 6), per_token=True),
        ValueError,
        "per_token: expected False when segments is given, received True",
    ),
    "segments beside per_token, of biases": (
        lambda: k.bias_dot(GRADS, ROW, segments=offsets(0, 6), per_token=True),
        ValueError,
        "per_token: expected False when segments is given, received True",
    ),
    "segments end, of embeddings": (
        lambda: k.embedding_dot(IDS, GRADS, TABLE, segments=offsets(0, 7)),
        ValueError,
        r"segments: expected .* = 6, received \[0, 7\]",
    ),
    "segments end, of norms' gradients": (
        lambda: k.norm_wgrad_dot(GRADS, GRADS, ROW, segments=offsets(0, 7)),
        ValueError,
        r"segments: expected .* = 6, received \[0, 7\]",
    ),
    "segments end, of biases' gradients": (
        lambda: k.bias_wgrad_dot(GRADS, ROW, segments=offsets(0, 7)),
        ValueError,
        r"segments: expected .* = 6, received \[0, 7\]",
    ),
    "backend of embeddings": (
        lambda: k.embedding_dot(IDS, GRADS, TABLE, backend="cuda"),
        ValueError,
        "backend: expected None, 'triton' or 'torch', received 'cuda'",
    ),
    "backend of squares": (
        lambda: k.ghost_square(ACTS, GRADS, backend="cuda"),
        ValueError,
        "backend: expected None, 'triton' or 'torch', received 'cuda'",
    ),
    "backend of biases": (
        lambda: k.bias_dot(GRADS, ROW, backend="cuda"),
        ValueError,
        "backend: expected None, 'triton' or 'torch', received 'cuda'",
    ),
    "backend of pairs": (
        lambda: k.ghost_dot_pairwise(ACTS, GRADS, ACTS, GRADS, backend="cuda"),
        ValueError,
        "backend: expected None, 'triton' or 'torch', received 'cuda'",
    ),
    "no normalised input": (
        lambda: k.norm_dot(None, GRADS, ROW),  # pyright: ignore[reportArgumentType]
        TypeError,
        "normed: expected a torch.Tensor, received NoneType",
    ),
    "no normalised input, of gradients": (
        lambda: k.norm_wgrad_dot(None, GRADS, ROW),  # pyright: ignore[reportArgumentType]
        TypeError,
        "normed: expected a torch.Tensor, received NoneType",
    ),
    "pairs explained of what triton has not": (
        lambda: k.explain(k.ghost_dot_pairwise, *[ACTS.double()] * 4, backend="triton"),
        TypeError,
        "backend: expected 'torch' for torch.float64 input, received 'triton'",
    ),
    "too many tokens": (
        lambda: k.bias_dot(torch.zeros(1, 1, 1).expand(2**16, 2**15, 1), ROW[:1]),
        ValueError,
        "grads: expected fewer than .* tokens in all",
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_says_what_was_expected_and_what_came(name):
    call, error, message = BAD[name]
    with pytest.raises(error, match=message):
        call()


def test_nothing_in_nothing_out():
    for batch, tokens in ((0, 3), (2, 0)):
        acts, grads, ids = ACTS[:batch, :tokens], GRADS[:batch, :tokens], IDS[:batch, :tokens]
        for backend in ("torch", "triton"):
            for form in (None, "two", "prefix", "direct"):
                weight_grad, dots = k.ghost_wgrad_dot(acts, grads, MATRIX + 1, form=form, backend=backend)
                assert weight_grad.shape == (5, 4) and not weight_grad.any()
                assert dots.shape == (batch,) and not dots.any()
            assert k.ghost_dot_pairwise(acts, grads, ACTS, GRADS, backend=backend).shape == (batch, 2)
            assert k.embedding_dot(ids, grads, TABLE, per_token=True, backend=backend).shape == (batch, tokens)
        assert reference.embedding_dot(ids, grads, TABLE, per_token=True).shape == (batch, tokens)


def test_offsets_are_checked_again_when_they_change():
    segments = offsets(0, 2, 6)
    asked = [segments, segments, segments.clone(), segments, segments]
    assert [validation._as_before(x, 6) for x in asked] == [False, True, False, False, True]
    assert not validation._as_before(segments, 7)
    segments[1] = 3
    assert not validation._as_before(segments, 7) and validation._as_before(segments, 7)
    with torch.inference_mode():
        inside = offsets(0, 6)
        assert not validation._as_before(inside, 6) and not validation._as_before(inside, 6)


def test_launches_come_through_offsets_that_the_device_has_yet_to_refuse():
    """A GPU checks offsets without being waited for: none at all must not end in an error of another kind here."""
    wgrad_dot = pytest.importorskip("inrun_kernels.wgrad_dot")
    weight_grad, _, dots = wgrad_dot.launch_wgrad_dot(ACTS, GRADS, MATRIX[None], None, offsets(0), "two")
    assert weight_grad.shape == MATRIX.shape and not weight_grad.any() and dots.shape == (0, 1)


def test_no_direction_at_all_is_not_launched_as_squares(monkeypatch):
    wgrad_dot = pytest.importorskip("inrun_kernels.wgrad_dot")
    monkeypatch.setattr("inrun_kernels.tiles.ON_CPU", "sm_80")
    acts, grads, none = ACTS.bfloat16(), GRADS.bfloat16(), MATRIX[None][:0].bfloat16()
    assert wgrad_dot.launch_layer(acts, grads, none, None, torch.float32) is None


def test_a_padding_index_of_another_integer_kind_is_that_integer():
    ids = torch.tensor([[3, 1, 0]])
    grads, table = torch.randn(1, 3, GRADS.shape[2]), torch.randn(TABLE.shape[-2:])
    for backend in ("torch", "triton"):
        plain = k.embedding_dot(ids, grads, table, padding_idx=3, backend=backend)
        for given in (np.int64(3), torch.tensor(3)):
            found = k.embedding_dot(ids, grads, table, padding_idx=given, backend=backend)  # pyright: ignore[reportArgumentType]
            assert torch.equal(found, plain)
