"""No per-sample gradient and no matrix of token pairs is ever in memory."""

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from inrun_kernels import config, torch_path

BATCH, IN, OUT = 8, 150, 160
TOKENS = 64


class LargestTensor(TorchDispatchMode):
    """Remembers the size in bytes of the largest storage behind any operation's result."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


def largest(run, *arguments, **named) -> int:
    with LargestTensor() as watch:
        run(*arguments, **named)
    return watch.bytes


@pytest.fixture
def plans(monkeypatch) -> list[config.Share]:
    """How programs share tiles, of which they leave as many pieces as they may."""
    from inrun_kernels import wgrad_dot

    found = []

    def share(*arguments: Any) -> config.Share:
        found.append(config.share.__wrapped__(*arguments))
        return found[-1]

    monkeypatch.setattr(wgrad_dot, "multiprocessors", lambda device: 10_000)
    monkeypatch.setattr(config, "_PIECE", 0)
    monkeypatch.setattr(wgrad_dot, "share", share)
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("form", ["two", "prefix", "direct"])
def test_no_per_sample_gradient_is_stored(dtype, packed, form, plans):
    from inrun_kernels import dot, wgrad_dot

    acts, grads = torch.randn(BATCH, TOKENS, IN, dtype=dtype), torch.randn(BATCH, TOKENS, OUT, dtype=dtype)
    matrix = torch.randn(1, OUT, IN, dtype=dtype)
    segments = torch.arange(0, BATCH * TOKENS + 1, TOKENS) if packed else None
    launch = partial(wgrad_dot.launch_wgrad_dot, bias_val_grad=matrix[..., 0])
    for run in (torch_path.ghost_wgrad_dot, *([launch] if form != "direct" else [])):
        found = largest(run, acts, grads, matrix, segments=segments, form=form)
        assert 4 * OUT * IN <= found < 4 * BATCH * OUT * IN
    assert form == "direct" or any(plan.pieces for plan in plans)
    for run in (torch_path.ghost_dot, dot.launch_dot):
        assert largest(run, acts, grads, matrix, segments, False) < 4 * BATCH * OUT * IN


@pytest.mark.parametrize("packed", [False, True])
def test_no_squared_gradient_of_a_sample_is_stored(packed, plans):
    from inrun_kernels import wgrad_dot

    acts, grads = torch.randn(BATCH, TOKENS, IN), torch.randn(BATCH, TOKENS, OUT)
    segments = torch.arange(0, BATCH * TOKENS + 1, TOKENS) if packed else None
    launch = partial(wgrad_dot.launch_wgrad_dot, val_grad=None, bias_val_grad=None, form="two")
    for run in (torch_path.ghost_square, launch):
        assert 4 * OUT * IN <= largest(run, acts, grads, segments=segments) < 4 * BATCH * OUT * IN
    assert any(plan.pieces for plan in plans)


def test_nor_is_the_batch_once_for_each_document_in_the_derivative_of_squares():
    acts, grads = (torch.randn(BATCH, TOKENS, width, requires_grad=True) for width in (IN, OUT))
    squares, norms = torch.ops.inrun.ghost_square(acts, grads, torch.arange(0, BATCH * TOKENS + 1, TOKENS), None)
    assert largest((squares.sum() + norms.sum()).backward) <= 4 * max(acts.numel(), grads.numel())


def test_no_matrix_of_token_pairs_is_stored(monkeypatch):
    from inrun_kernels import pairwise

    monkeypatch.setattr(torch_path, "_CHUNK", 4096)
    acts, grads = torch.randn(BATCH, TOKENS, 5), torch.randn(BATCH, TOKENS, 6)
    for run in (partial(torch_path.ghost_dot_pairwise, form="pairwise"), pairwise.launch_pairwise):
        assert 0 < largest(run, acts, grads, acts, grads) <= 4 * 4096 < 4 * (BATCH * TOKENS) ** 2


@pytest.mark.parametrize("product, due", [("norm", "dots"), ("norm", "both"), ("bias", "both"), ("embedding", "dots")])
def test_rows_are_read_once_whatever_is_due(product, due, monkeypatch):
    """Every element of the layer's operands by one load, for the gradient and the dots with three directions."""
    from triton.runtime import interpreter

    from inrun_kernels import rows

    rows_shape, width, load = (3, 50), 136, interpreter.InterpreterBuilder.create_masked_load
    grads, normed = torch.randn(*rows_shape, width), torch.randn(*rows_shape, width)
    directions, ids, segments = torch.randn(3, width), torch.randint(7, rows_shape), torch.tensor([0, 33, 33, 150])
    read = []

    def counted(self, ptrs, mask, *rest):
        read.append(ptrs.data[mask.data].astype("int64"))
        return load(self, ptrs, mask, *rest)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counted)
    if product == "embedding":
        rows.launch_embedding_dot(ids, grads, torch.randn(3, 7, width), segments, False, None)
    elif due == "both":
        rows.launch_row_wgrad_dot(normed if product == "norm" else None, grads, directions, segments)
    else:
        rows.launch_row_dot(normed if product == "norm" else None, grads, directions, segments, False)
    addresses = torch.from_numpy(np.concatenate(read))
    for operand in (grads, *([normed] if product == "norm" else []), *([ids] if product == "embedding" else [])):
        start = operand.data_ptr()
        mine = addresses[(addresses >= start) & (addresses < start + operand.nbytes)]
        assert len(mine) == operand.numel() == len(mine.unique())
