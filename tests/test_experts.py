"""Fused experts: grouped products against a loop, and rows' dots against one row at a time."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import inrun
from inrun import probing
from inrun.experts import _Grouped, _Product, _row_dots, is_experts
from inrun.tap import Layout, Tap
from inrun_kernels import grouped
from inrun_kernels.grouped import grouped_mm, grouped_wgrad

ENDS = [0, 3, 3, 7, 10]  # the first and the third group are empty


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("inputs", "outputs"), [(16, 24), (5, 7), (16, 7), (7, 16)])
def test_grouped_products(dtype, inputs, outputs):
    g = torch.Generator().manual_seed(0)
    shapes = ((10, inputs), (5, outputs, inputs), (10, outputs))
    x, weight, grads = (torch.randn(s, generator=g).to(dtype) for s in shapes)
    offsets = torch.tensor(ENDS, dtype=torch.int32)
    group = torch.tensor([sum(n >= end for end in ENDS) for n in range(10)])
    expected = torch.einsum("ni,noi->no", x.double(), weight.double()[group])
    bound = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 20 * torch.finfo(dtype).eps}
    assert_close(grouped_mm(x, weight.mT, offsets).double(), expected, **bound)
    apart = [y.repeat_interleave(2, 1)[:, ::2] for y in (x, grads)]
    assert_close(grouped_mm(apart[0], weight.mT, offsets).double(), expected, **bound)
    one_hot = torch.nn.functional.one_hot(group, 5).double()
    expected = torch.einsum("ne,no,ni->eoi", one_hot, grads.double(), x.double())
    assert_close(grouped_wgrad(x, grads, offsets).double(), expected, **bound)
    assert_close(grouped_wgrad(*apart, offsets).double(), expected, **bound)
    torch.library.opcheck(torch.ops.inrun.grouped_mm, (x, weight.mT, offsets))
    torch.library.opcheck(torch.ops.inrun.grouped_wgrad, (x, grads, offsets))


def test_groups_without_rows_have_no_gradient_where_torch_leaves_one(monkeypatch):
    product = grouped.F.grouped_mm

    def leaves_one(x, other, offs):
        out = product(x, other, offs=offs)
        out[[0, 2]] = torch.nan
        return out

    monkeypatch.setattr(grouped.F, "grouped_mm", leaves_one)
    monkeypatch.setattr(grouped, "_zeroes_empty_groups", lambda device: False)
    x, grads = torch.randn(10, 16), torch.randn(10, 24)
    found = grouped_wgrad(x, grads, torch.tensor(ENDS, dtype=torch.int32))
    assert not found[[0, 2]].any()
    assert_close(found.sum(0), grads.T @ x)
    found = grouped_wgrad(x, grads, torch.tensor([0, 1, 1, 7, 10], dtype=torch.int32))
    assert_close(found[1], grads[:1].T @ x[:1])


@pytest.mark.parametrize("many", [None, 2])
def test_the_rows_dots_and_second_derivatives(many):
    g = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(s, generator=g, dtype=torch.float64, requires_grad=True) for s in ((10, 5), (5, 7, 5)))
    direction = torch.randn(*([] if many is None else [many]), 5, 7, 5, generator=g, dtype=torch.float64)
    probe = torch.zeros(10, *([] if many is None else [many]), dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor(ENDS, dtype=torch.int32)
    group = torch.tensor([sum(n >= end for end in ENDS) for n in range(10)])

    def plain(x, weight, probe):
        along = probe[:, None] * direction[group].flatten(1) if many is None else (
            torch.einsum("nm,mnk->nk", probe, direction[:, group].flatten(2)))  # fmt: skip
        return torch.einsum("ni,noi->no", x, weight[group] + along.view(10, 7, 5))

    inputs = (x, weight, probe)
    found = probing.apply(_Grouped, x, weight, direction, probe, offsets)
    gradients = [torch.autograd.grad(y.sin().sum(), inputs) for y in (found, plain(*inputs))]
    for ours, theirs in zip(*gradients, strict=True):
        assert_close(ours, theirs)
    twice = []
    for y in (probing.apply(_Grouped, x, weight, direction, probe, offsets), plain(*inputs)):
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        twice.append(torch.autograd.grad(sum(f.square().sum() for f in first), inputs))
    for ours, theirs in zip(*twice, strict=True):
        assert_close(ours, theirs)


@pytest.mark.parametrize("kind", ["eager", "batched_mm", "grouped_mm"])
def test_autocast_reaches_the_products_that_it_reaches_untracked(kind):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_local_experts": 3, "num_experts_per_tok": 2}
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(8, 8), mixtral.MixtralSparseMoeBlock(mixtral.MixtralConfig(**sizes)))
    for p in plain.parameters():
        nn.init.normal_(p, std=0.3)
    plain[1].experts.config._experts_implementation = kind
    model, x, seen = copy.deepcopy(plain), torch.randn(5, 6, 8), []
    for each in (plain, model):
        each[1].experts.act_fn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))

    def backward(model):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).float().square().sum()
        loss.backward()
        return set(seen)

    untracked = backward(plain)
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with tracker.validation():
        backward(model)
    seen.clear()
    with tracker.step(range(5)):
        assert backward(model) == untracked


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("name", ["gate_up_proj", "down_proj"])
def test_a_frozen_weight_earns_nothing_beside_one_that_trains(name, method):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_local_experts": 3, "num_experts_per_tok": 2}
    config = mixtral.MixtralConfig(**sizes, _experts_implementation="eager")

    def values(frozen):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), mixtral.MixtralSparseMoeBlock(config))
        for p in model.parameters():
            nn.init.normal_(p, std=0.3)
        x, held, full = torch.randn(5, 6, 8), torch.randn(5, 6, 8), f"1.experts.{name}"
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        tracker = inrun.track(model, optimizer, method, exclude=[] if frozen else [full])
        model.get_parameter(full).requires_grad_(not frozen)
        with tracker.validation():
            model(held).square().mean().backward()
        with tracker.step(range(5)) as step:
            model(x).square().mean().backward()
            optimizer.step()
        return step.values

    assert_close(values(True), values(False))


def test_directions_of_experts_in_float16_may_be_large():
    g, offsets = torch.Generator().manual_seed(0), torch.tensor(ENDS, dtype=torch.int32)
    x, grad = torch.randn(10, 16, generator=g).half(), torch.full((10, 24), 1e-3, dtype=torch.float16)
    direction = 1e6 * torch.randn(5, 24, 16, generator=g)
    group = torch.tensor([sum(n >= end for end in ENDS) for n in range(10)])
    expected = torch.einsum("ni,noi,no->n", x.double(), direction.double()[group], grad.double())
    assert_close(_row_dots(x, grad, direction, offsets).double(), expected, rtol=1e-4, atol=1e-2)


def test_documents_of_other_tokens_than_experts_are_given_are_refused():
    like, rows = torch.empty(6, 0), torch.arange(6)
    product = SimpleNamespace(_inrun=Tap("experts", None, None), like=like, tokens=rows)
    layout = Layout(2, 3, torch.tensor([0, 2, 6]))
    _Product.placed(product, like, layout)
    assert product.count == 2 and product.owners.tolist() == [0, 0, 1, 1, 1, 1]
    with pytest.raises(inrun.InRunError, match=r"experts: expected its input and output to be \[B, T, ...\]"):
        _Product.placed(product, like, dataclasses.replace(layout, tokens=4))


def test_a_forward_around_that_of_transformers_is_another_module():
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    config = mixtral.MixtralConfig(hidden_size=8, intermediate_size=12, num_local_experts=3)

    class Residual(mixtral.MixtralExperts):
        def forward(self, x, *routes):
            return x + super().forward(x, *routes)

    assert is_experts(mixtral.MixtralExperts(config)) and is_experts(
        type("Mine", (mixtral.MixtralExperts,), {})(config)
    )
    assert not is_experts(Residual(config))
    for name in ("has_bias", "is_transposed", "has_post_expert_norm"):
        other = mixtral.MixtralExperts(config)
        setattr(other, name, True)
        assert not is_experts(other)
    other = mixtral.MixtralExperts(config)
    other.scale = nn.Parameter(torch.ones(8))
    assert not is_experts(other)
