"""The drop-in layers: torch's gradients, the oracle's dots, honest second derivatives, compile and checkpointing."""

from __future__ import annotations

import contextlib
import os

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from inrun import functional as IF
from inrun.convolution import Geometry, _Convolution, convolution, convolution_dots
from inrun_kernels import forms

B, T, IN, OUT, VOCAB = 3, 5, 7, 6, 11


def layer_cases(dtype=torch.float64, shape=(B, T)):
    """name -> (input, parameters, plain(x, *params), probed(x, params, directions, probe))."""
    g = torch.Generator().manual_seed(0)

    def rand(*size):
        return torch.randn(*size, generator=g, dtype=torch.float64).to(dtype)

    ids = torch.randint(VOCAB, shape, generator=g)
    ids.view(-1)[-1] = 2
    cases = {
        "linear": (
            rand(*shape, IN),
            [rand(OUT, IN), rand(OUT)],
            lambda x, w, b: F.linear(x, w, b),
            lambda x, p, d, probe: IF.linear(x, p[0], p[1], (d[0], d[1]), probe),
        ),
        "linear_no_bias": (
            rand(*shape, IN),
            [rand(OUT, IN)],
            lambda x, w: F.linear(x, w),
            lambda x, p, d, probe: IF.linear(x, p[0], None, (d[0], None), probe),
        ),
        "conv1d": (
            rand(*shape, IN),
            [rand(IN, OUT), rand(OUT)],
            lambda x, w, b: x @ w + b,
            lambda x, p, d, probe: IF.conv1d(x, p[0], p[1], (d[0], d[1]), probe),
        ),
        "embedding": (
            ids,
            [rand(VOCAB, IN)],
            lambda x, w: F.embedding(x, w),
            lambda x, p, d, probe: IF.embedding(x, p[0], d[0], probe),
        ),
        "embedding_padding": (
            ids,
            [rand(VOCAB, IN)],
            lambda x, w: F.embedding(x, w, 2),
            lambda x, p, d, probe: IF.embedding(x, p[0], d[0], probe, padding_idx=2),
        ),
        "embedding_padding_from_the_end": (
            ids,
            [rand(VOCAB, IN)],
            lambda x, w: F.embedding(x, w, 2 - VOCAB),
            lambda x, p, d, probe: IF.embedding(x, p[0], d[0], probe, padding_idx=2 - VOCAB),
        ),
        "layer_norm": (
            rand(*shape, IN),
            [rand(IN), rand(IN)],
            lambda x, w, b: F.layer_norm(x, (IN,), w, b),
            lambda x, p, d, probe: IF.layer_norm(x, (IN,), p[0], p[1], 1e-5, (d[0], d[1]), probe),
        ),
        "layer_norm_of_a_large_eps": (
            rand(*shape, IN),
            [rand(IN), rand(IN)],
            lambda x, w, b: F.layer_norm(x, (IN,), w, b, 0.5),
            lambda x, p, d, probe: IF.layer_norm(x, (IN,), p[0], p[1], 0.5, (d[0], d[1]), probe),
        ),
        "rms_norm": (
            rand(*shape, IN),
            [rand(IN)],
            lambda x, w: F.rms_norm(x, [IN], w, 1e-5),
            lambda x, p, d, probe: IF.rms_norm(x, (IN,), p[0], 1e-5, d[0], probe),
        ),
        "affine": (
            rand(*shape, 2, 3),
            [rand(2, 3), rand(2, 3)],
            lambda x, w, b: x * w + b,
            lambda x, p, d, probe: IF.affine(x, p[0], p[1], (d[0], d[1]), probe),
        ),
        "bias": (
            rand(*shape, IN),
            [rand(IN)],
            lambda x, b: x + b,
            lambda x, p, d, probe: IF.bias(x, p[0], d[0], probe),
        ),
    }
    return cases


NAMES = list(layer_cases())


def directions_for(params, many=None, seed=1):
    g = torch.Generator().manual_seed(seed)
    lead = () if many is None else (many,)
    return [torch.randn(*lead, *p.shape, generator=g, dtype=torch.float64).to(p.dtype) for p in params]


def loss_weights(out, seed=2):
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(out.dtype)


def oracle(x, params, plain, directions, many):
    """One sample at a time in float64: <gradient of the sample's share of the loss, direction>."""
    params = [p.double().detach().requires_grad_() for p in params]
    x = x.double() if x.is_floating_point() else x
    weights = loss_weights(plain(x, *params).detach())
    rows = []
    for b in range(len(x)):
        y = plain(x[b : b + 1], *params)
        grads = torch.autograd.grad((y.sin() * weights[b : b + 1]).sum(), params)
        per_target = [
            sum((g * (d if many is None else d[m]).double()).sum() for g, d in zip(grads, directions, strict=True))
            for m in range(many or 1)
        ]
        rows.append(torch.stack(per_target))
    dots = torch.stack(rows)
    return dots[:, 0] if many is None else dots


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("many", [None, 2])
@pytest.mark.parametrize("shape", [(B, T), (B,), (B, 2, 3), (1, 1)])
def test_gradients_are_torchs_and_the_probes_are_the_dots(name, many, shape):
    if name.startswith("embedding") and len(shape) == 1:
        pytest.skip("one-dimensional ids have their own test")
    x, params, plain, probed = layer_cases(shape=shape)[name]
    directions = directions_for(params, many)
    probe = torch.zeros((len(x),) if many is None else (len(x), many), dtype=torch.float64, requires_grad=True)

    def grads_of(run):
        leaves = [p.clone().requires_grad_() for p in params]
        inputs = x.clone().requires_grad_() if x.is_floating_point() else x
        y = run(inputs, leaves).mul_(1.0)  # what follows may write into it
        (y.sin() * loss_weights(y)).sum().backward()
        return y.detach(), [inputs.grad if inputs.is_floating_point() else None, *(p.grad for p in leaves)]

    y, found = grads_of(lambda a, p: probed(a, p, directions, probe))
    y_plain, expected = grads_of(lambda a, p: plain(a, *p))
    torch.testing.assert_close(y, y_plain)
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e)
    torch.testing.assert_close(probe.grad, oracle(x, params, plain, directions, many))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "affine"])
def test_without_a_probe_a_layer_is_torchs(name):
    x, params, plain, probed = layer_cases()[name]
    torch.testing.assert_close(probed(x, params, (*params, None), None), plain(x, *params))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_exact_as_its_own_gradients(name, dtype):
    x, params, plain, probed = layer_cases(dtype)[name]
    directions = directions_for(params)
    probe = torch.zeros(B, requires_grad=True)
    leaves = [p.clone().requires_grad_() for p in params]
    y = probed(x, leaves, directions, probe)
    assert y.dtype == plain(x, *params).dtype
    (y.float().sin() * loss_weights(y)).sum().backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in leaves)
    exact = oracle(x, params, plain, directions, None)
    # The same computation one sample at a time in the same dtype, by torch alone.
    naive = []
    for b in range(B):
        own = [p.clone().requires_grad_() for p in params]
        row = plain(x[b : b + 1], *own)
        (row.float().sin() * loss_weights(y)[b : b + 1]).sum().backward()
        naive.append(sum((p.grad.double() * d.double()).sum() for p, d in zip(own, directions, strict=True)))
    bound = 2 * (torch.stack(naive) - exact).abs().max() + 4 * torch.finfo(dtype).eps * exact.abs().max()
    assert (probe.grad.double() - exact).abs().max() <= bound


# Torch's own embedding gives its padding row no gradient, which differences see as wrong.
@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("embedding_padding")])
@pytest.mark.parametrize("many", [None, 2])
def test_first_and_second_derivatives(name, many):
    x, params, _, probed = layer_cases()[name]
    directions = directions_for(params, many)
    probe = torch.zeros((B,) if many is None else (B, many), dtype=torch.float64, requires_grad=True)
    leaves = [p.clone().requires_grad_() for p in params]
    floating = x.is_floating_point()
    inputs = (x.clone().requires_grad_(), *leaves, probe) if floating else (*leaves, probe)

    def run(*args):
        *rest, pr = args
        return probed(rest[0] if floating else x, rest[1:] if floating else rest, directions, pr).sin()

    # At probe = 0 the forward leaves the probe out, so gradcheck's differences may not move it.
    assert torch.autograd.gradcheck(lambda *a: run(*a, probe.detach()), inputs[:-1])
    assert torch.autograd.gradgradcheck(lambda *a: run(*a, probe.detach()), inputs[:-1])

    # The dots, as a function of everything else, have true derivatives.
    def dots(*args):
        pr = torch.zeros_like(probe, requires_grad=True)
        return torch.autograd.grad(run(*args, pr).sum(), pr, create_graph=True)[0]

    assert torch.autograd.gradcheck(dots, inputs[:-1])


@pytest.mark.parametrize("name", [*NAMES, "convolution"])
@pytest.mark.parametrize("many", [None, 2])
def test_a_backward_that_makes_a_graph_has_the_same_gradients_and_dots(name, many):
    if name == "convolution":
        g = torch.Generator().manual_seed(0)
        x, *params = (torch.randn(s, generator=g, dtype=torch.float64) for s in ((B, IN, T), (OUT, IN, 2), (OUT,)))

        def probed(x, p, d, probe):
            return convolution(x, *p, d, probe, Geometry((1,), (0,), (1,), 1))
    else:
        x, params, _, probed = layer_cases()[name]
    params, directions = [p.requires_grad_() for p in params], directions_for(params, many)
    found = []
    for again in (False, True):
        probe = torch.zeros((B,) if many is None else (B, many), dtype=torch.float64, requires_grad=True)
        y = probed(x, params, directions, probe)
        found.append(torch.autograd.grad((y.sin() * loss_weights(y)).sum(), (*params, probe), create_graph=again))
    torch.testing.assert_close(found[0], found[1])


@pytest.mark.parametrize("padding", [2, 2 - VOCAB])
def test_padding_has_no_dot_where_a_second_derivative_may_follow_either(padding):
    ids, (table,), _, _ = layer_cases()["embedding"]
    ids, table = torch.where(ids == 1, 2, ids), table.requires_grad_()
    (direction,) = directions_for([table])
    found = []
    for again in (False, True):
        probe = torch.zeros(B, dtype=torch.float64, requires_grad=True)
        out = IF.embedding(ids, table, direction, probe, padding_idx=padding)
        found.append(torch.autograd.grad(out.square().sum(), (probe, table), create_graph=again))
    torch.testing.assert_close(found[0], found[1])


def test_the_second_derivative_in_the_probe_is_that_of_the_written_out_layer():
    x, params, _, probed = layer_cases()["linear"]
    directions = directions_for(params)

    def second(layer):
        probe = torch.zeros(B, dtype=torch.float64, requires_grad=True)
        first = torch.autograd.grad(layer(probe).pow(3).sum(), probe, create_graph=True)[0]
        return torch.autograd.grad(first.sum(), probe)[0]

    def written(probe):
        shift = F.linear(x, directions[0], directions[1])
        return F.linear(x, params[0], params[1]) + probe[:, None, None] * shift

    torch.testing.assert_close(second(lambda p: probed(x, params, directions, p)), second(written))


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_runs_through(name):
    x, params, plain, probed = layer_cases()[name]
    if not x.is_floating_point():
        params = [p.clone() for p in params]
    directions = directions_for(params)
    probe = torch.zeros(B, dtype=torch.float64, requires_grad=True)
    tangents = directions_for(params, seed=5)
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(p, t) for p, t in zip(params, tangents, strict=True)]
        found = forward_ad.unpack_dual(probed(x, duals, directions, probe)).tangent
        expected = forward_ad.unpack_dual(plain(x, *duals)).tangent
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_compiles_whole_and_checkpoints(name):
    x, params, _, probed = layer_cases(torch.float32)[name]
    directions = directions_for(params)

    def dots(wrap):
        probe = torch.zeros(B, requires_grad=True)
        leaves = [p.clone().requires_grad_() for p in params]
        y = wrap(lambda a, *p: probed(a, list(p[:-1]), directions, p[-1]))(x, *leaves, probe)
        y.square().sum().backward()
        return [probe.grad, *(p.grad for p in leaves)]

    expected = dots(lambda f: f)
    torch._dynamo.reset()
    for wrap in (
        lambda f: torch.compile(f, fullgraph=True, backend="aot_eager"),
        lambda f: lambda *a: checkpoint(f, *a, use_reentrant=False),
        lambda f: lambda *a: checkpoint(f, *a, use_reentrant=True),
    ):
        for found, e in zip(dots(wrap), expected, strict=True):
            torch.testing.assert_close(found, e, rtol=1e-5, atol=1e-5)


def test_autocast_matches_plain_autocast_and_scores():
    x, params, plain, probed = layer_cases(torch.float32)["linear"]
    directions = directions_for(params)
    probe = torch.zeros(B, requires_grad=True)
    results = []
    for run in (lambda a, p: probed(a, p, directions, probe), lambda a, p: plain(a, *p)):
        leaves = [p.clone().requires_grad_() for p in params]
        with torch.autocast("cpu", torch.bfloat16):
            y = run(x, leaves)
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        results.append([y.detach(), *(p.grad for p in leaves)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-1)
    total = sum((p * d).sum() for p, d in zip(results[0][1:], directions, strict=True))
    # The parameters' gradients are float32 from the product on, where plain autocast rounds them to bfloat16.
    torch.testing.assert_close(probe.grad.sum(), total, rtol=1e-5, atol=1e-5)


def test_autocast_leaves_float64_as_it_is():
    x, params, plain, probed = layer_cases()["linear"]
    with torch.autocast("cpu", torch.bfloat16):
        y = probed(x, params, directions_for(params), torch.zeros(B, dtype=torch.float64, requires_grad=True))
        torch.testing.assert_close(y, plain(x, *params))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize("batch", [1, B])
def test_weights_of_another_half_precision_than_autocasts(batch, has_bias):
    x, params, _, _ = layer_cases(torch.float32)["linear"]
    x, params = x[:batch], params[: 1 + has_bias]
    directions = directions_for(params)
    found = []
    for probe in (torch.zeros(batch, requires_grad=True), None):
        leaves = [p.half().requires_grad_() for p in params]
        both = (*directions, None)[:2]
        with torch.autocast("cpu", torch.bfloat16):
            y = IF.linear(x, leaves[0], leaves[1] if has_bias else None, both, probe)
        y.float().square().sum().backward()
        assert all(p.grad.dtype == torch.float16 for p in leaves)
        found.append([p.grad for p in leaves])
        if probe is not None:
            total = sum((p.grad.float() * d).sum() for p, d in zip(leaves, directions, strict=True))
            torch.testing.assert_close(probe.grad.sum(), total, rtol=1e-2, atol=1e-1)
    for ours, torchs in zip(*found, strict=True):
        torch.testing.assert_close(ours, torchs, rtol=2e-2, atol=2e-1)


@pytest.mark.parametrize("lead", [(1, T), (T,)])
def test_position_ids_without_the_sample_axis_are_expanded(lead):
    _, params, _, _ = layer_cases()["embedding"]
    directions = directions_for(params)
    probe = torch.zeros(B, dtype=torch.float64, requires_grad=True)
    leaf = params[0].clone().requires_grad_()
    ids = torch.arange(T).view(lead)
    y = IF.embedding(ids, leaf, directions[0], probe)
    assert y.shape == (B, T, IN)
    (y * loss_weights(y)).sum().backward()
    expected = torch.einsum("bti,ti->b", loss_weights(y), directions[0][:T])
    torch.testing.assert_close(probe.grad, expected)


def test_ambiguous_positions_are_refused_and_labels_are_not():
    _, params, _, _ = layer_cases()["embedding"]
    directions = directions_for(params)
    probe = torch.zeros(B, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"could be either"):
        IF.embedding(torch.arange(B), params[0], directions[0], probe)
    assert IF.embedding(torch.tensor([4, 0, 4]), params[0], directions[0], probe).shape == (B, IN)


@pytest.mark.parametrize("ids", [[0, 1], [0, 1, 2], [2, 3, 4, 5], [1], [1, 2], [2, 3, 4], [0, 1, 2, 4], [3, 2, 1, 0]])
def test_of_four_samples_or_more_any_run_of_numbers_could_be_positions(ids):
    table, probe = torch.randn(6, IN), torch.zeros(len(ids), requires_grad=True)
    refused = ids in ([0, 1], [0, 1, 2], [2, 3, 4, 5])
    with pytest.raises(RuntimeError, match=r"could be either") if refused else contextlib.nullcontext():
        IF.embedding(torch.tensor(ids), table, table, probe)


def test_a_wrong_leading_dimension_says_what_was_expected():
    x, params, _, probed = layer_cases()["linear"]
    probe = torch.zeros(B + 1, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=r"B = 4.*got \(3, 5, 7\)"):
        probed(x, params, directions_for(params), probe)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_frozen_and_unscored_parameters(dtype):
    x, params, _, _ = layer_cases()["linear"]
    x, params = x.to(dtype), [p.to(dtype) for p in params]
    d = directions_for(params)
    cases = [((False, True), (None, d[1])), ((True, False), (d[0], None)), ((False, False), (d[0], d[1]))]
    cases += [((True, True), (None, d[1])), ((True, True), (d[0], None)), ((True, False), (d[0], d[1]))]
    for needs, directions in cases:
        leaves = [p.clone().requires_grad_(n) for p, n in zip(params, needs, strict=True)]
        probe = torch.zeros(B, dtype=dtype, requires_grad=True)
        y = IF.linear(x, leaves[0], leaves[1], directions, probe)
        input_kept = y.grad_fn.saved_tensors[0].untyped_storage().nbytes() >= x.nbytes
        assert input_kept == (needs[0] or directions[0] is not None)
        (y * loss_weights(y)).sum().backward()
        per_weight = torch.einsum("bto,bti,oi->b", loss_weights(y), x, d[0])
        per_bias = torch.einsum("bto,o->b", loss_weights(y), d[1])
        expected = sum(p for p, one in zip((per_weight, per_bias), directions, strict=True) if one is not None)
        torch.testing.assert_close(probe.grad, expected)
        assert [p.grad is not None for p in leaves] == list(needs)
        wanted = torch.einsum("bto,bti->oi", loss_weights(y), x), loss_weights(y).sum((0, 1))
        for leaf, grad in zip(leaves, wanted, strict=True):
            if leaf.requires_grad:
                torch.testing.assert_close(leaf.grad, grad)


@pytest.mark.parametrize("name", ["layer_norm", "affine"])
@pytest.mark.parametrize("many", [None, 2])
@pytest.mark.parametrize("alone", [0, 1])
def test_a_layer_norm_may_have_one_of_both_scored(alone, many, name):
    x, params, plain, probed = layer_cases()[name]
    directions = directions_for(params, many)
    probe = torch.zeros((B,) if many is None else (B, many), dtype=torch.float64, requires_grad=True)
    leaves = [p.clone().requires_grad_() for p in params]
    y = probed(x, leaves, [d if i == alone else None for i, d in enumerate(directions)], probe)
    (y.sin() * loss_weights(y)).sum().backward()
    expected = torch.autograd.grad((plain(x, *leaves).sin() * loss_weights(y)).sum(), leaves)
    torch.testing.assert_close(tuple(p.grad for p in leaves), expected)
    directions[1 - alone] = torch.zeros_like(directions[1 - alone])
    torch.testing.assert_close(probe.grad, oracle(x, params, plain, directions, many))


def test_a_kernel_has_the_gradient_of_a_bias_that_is_not_scored():
    x, weight, bias = torch.randn(3, 5, 16), torch.rand(16), torch.zeros(16, requires_grad=True)
    y = IF.layer_norm(x, (16,), weight, bias, 1e-5, (weight, None), torch.zeros(3, requires_grad=True))
    y.backward(x)
    torch.testing.assert_close(bias.grad, x.sum((0, 1)))


@pytest.mark.parametrize("shape", [(16,), (4, 6), (2, 3, 9), (1, 5)])
@pytest.mark.parametrize("directions", [(), (3,)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_have_kernels_agree_with_float64(shape, directions, dtype):
    """A single token to a sample, several, several axes, one sample; of float64 no layer has a kernel."""
    generator = torch.Generator().manual_seed(0)
    rand = [torch.randn(size, generator=generator).to(dtype) for size in ((*shape, 16), (OUT, 16), (16,), (OUT,))]
    x, weight, scale, bias = rand
    along = [torch.randn(*directions, *p.shape, generator=generator).to(dtype) for p in (weight, bias, scale, scale)]
    probe_shape = (shape[0], *directions)
    layers = {
        "linear": lambda y, p, d, probe: IF.linear(y, p[0], p[1], (d[0], d[1]), probe),
        "linear without bias": lambda y, p, d, probe: IF.linear(y, p[0], None, (d[0], None), probe),
        "layer norm": lambda y, p, d, probe: IF.layer_norm(y, (16,), p[2], p[2], 1e-5, (d[2], d[3]), probe),
        "rms norm": lambda y, p, d, probe: IF.rms_norm(y, (16,), p[2], 1e-5, d[2], probe),
    }

    def run(layer, dtype):
        leaves = [y.detach().clone().to(dtype).requires_grad_() for y in (x, weight, bias, scale)]
        probe = torch.zeros(probe_shape, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
        probe.requires_grad_()
        y = layer(leaves[0], leaves[1:], [d.to(dtype) for d in along], probe)
        y.backward(loss_weights(y))
        assert all(p.grad is None or (p.grad.dtype, p.grad.shape) == (p.dtype, p.shape) for p in leaves)
        return [None if y.grad is None else y.grad.double() for y in (probe, *leaves)]

    for name, layer in layers.items():
        for found, exact in zip(run(layer, dtype), run(layer, torch.float64), strict=True):
            assert (found is None) == (exact is None), name
            if found is not None:
                allowed = (1e-5 if dtype == torch.float32 else 3e-2) * exact.square().mean().sqrt()
                assert (found - exact).abs().max() <= allowed + 3e-2 * (dtype != torch.float32), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("frozen", [False, True])
def test_the_rms_norm_of_small_inputs_has_torchs_default_eps(dtype, frozen):
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(3, 5, 16, generator=generator) * 1e-3).to(dtype)
    weight, direction = (torch.randn(16, generator=generator).to(dtype) for _ in range(2))
    found = []
    for probe in (None, torch.zeros(3, dtype=torch.promote_types(dtype, torch.float32), requires_grad=not frozen)):
        leaf, scale = x.clone().requires_grad_(), weight.clone().requires_grad_()
        y = IF.rms_norm(leaf, (16,), scale, None, direction, probe)
        y.backward(torch.ones_like(y))
        found.append((y, leaf.grad, scale.grad))
    for ours, torchs in zip(found[1], found[0], strict=True):
        assert ours.dtype == torchs.dtype
        tolerance = 4 * torch.finfo(dtype).eps
        torch.testing.assert_close(ours, torchs, rtol=tolerance, atol=tolerance * torchs.abs().max().item())


@pytest.mark.parametrize("kind", ["layer", "rms"])
@pytest.mark.parametrize(("size", "eps"), [(1e15, 1e-6), (1e-14, 1e-30), (1e-14, 0.0)])
def test_a_norm_of_very_large_or_small_inputs_is_as_exact(kind, size, eps):
    generator = torch.Generator().manual_seed(0)
    x, weight, grad = (torch.randn(s, dtype=torch.float64, generator=generator) for s in ((2, 4, 64), 64, (2, 4, 64)))
    x, along = (x * size).float(), torch.ones(64)

    def run(dtype):
        leaf, probe = x.to(dtype).requires_grad_(), torch.zeros(2, dtype=dtype, requires_grad=True)
        scale = weight.float().to(dtype).requires_grad_()
        if dtype == torch.float64:
            y = F.rms_norm(leaf, (64,), scale, eps) if kind == "rms" else F.layer_norm(leaf, (64,), scale, None, eps)
        elif kind == "rms":
            y = IF.rms_norm(leaf, (64,), scale, eps, along, probe)
        else:
            y = IF.layer_norm(leaf, (64,), scale, None, eps, (along, None), probe)
        y.backward(grad.float().to(dtype))
        return leaf.grad.double()

    exact = run(torch.float64)
    assert (run(torch.float32) - exact).norm() < 1e-6 * exact.norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_rms_norm_of_halves_is_not_rounded_before_its_dots(dtype):
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(4, 8, 64, generator=g).to(dtype) for _ in range(2))
    weight, direction = torch.ones(64, dtype=dtype), torch.randn(64, generator=g)
    probe = torch.zeros(4, requires_grad=True)
    IF.rms_norm(x, (64,), weight, 1e-5, direction, probe).backward(grad)
    exact = (F.rms_norm(x.double(), (64,), None, 1e-5) * grad.double() * direction.double()).sum((1, 2))
    assert (probe.grad - exact).abs().max() < 1e-6 * exact.abs().max()


def test_an_rms_norm_of_another_shape_than_its_weight_is_torchs_error():
    probe = torch.zeros(2, requires_grad=True)
    with pytest.raises(RuntimeError, match="weight"):
        IF.rms_norm(torch.randn(2, 3, 4, 8), (4, 8), torch.ones(8), 1e-5, torch.ones(8), probe)


@pytest.mark.parametrize("form", ["two", "direct"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_backward_inside_autocast_keeps_the_products_of_float32(form, has_bias, monkeypatch):
    monkeypatch.setattr(forms, "of_cpu_sizes", lambda *sizes: forms.Choice(form, {}, form))
    generator = torch.Generator().manual_seed(0)
    x, weight, direction = (torch.randn(shape, generator=generator) for shape in ((8, 256), (128, 256), (128, 256)))
    bias, along_bias = torch.randn(2, 128, generator=generator) if has_bias else (None, None)
    probe, leaves = torch.zeros(8, requires_grad=True), [p for p in (weight, bias) if p is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    y = IF.linear(x, weight, bias, (direction, along_bias), probe)
    with torch.autocast("cpu", torch.bfloat16):
        y.backward(loss_weights(y))
    g = loss_weights(y).double().expand(y.shape)
    dots = ((g @ direction.double()) * x).sum(1) + (0 if along_bias is None else g @ along_bias.double())
    exact = (dots, g.T @ x.double(), g.sum(0))[: 1 + len(leaves)]
    for found, right in zip((probe.grad, *(leaf.grad for leaf in leaves)), exact, strict=True):
        assert (found - right).abs().max() <= 1e-4 * right.square().mean().sqrt()


@pytest.mark.parametrize("many", [None, 2])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_convolutions_of_any_dimension_in_groups(dims, many):
    """Against one convolution of each sample; the second derivatives are those of the written-out layer."""
    g = torch.Generator().manual_seed(0)
    lead = [] if many is None else [many]
    shapes = (3, 4, *[5] * dims), (6, 2, *[3] * dims), (6,), (*lead, 6, 2, *[3] * dims), (*lead, 6)
    x, weight, bias, d, along_bias = (torch.randn(s, generator=g, dtype=torch.float64) for s in shapes)
    probe = torch.zeros(3, *lead, dtype=torch.float64)
    geometry = Geometry((2,) * dims, (1,) * dims, (1,) * dims, 2)
    inputs = [t.requires_grad_() for t in (x, weight, bias, probe)]

    def plain(x, weight, bias, probe):
        conv, rows = (F.conv1d, F.conv2d, F.conv3d)[dims - 1], []
        for one, p in zip(x, probe.view(3, -1), strict=True):
            moved = [v + torch.tensordot(p, a.view(-1, *v.shape), 1) for v, a in ((weight, d), (bias, along_bias))]
            rows.append(conv(one[None], *moved, geometry.stride, geometry.padding, geometry.dilation, 2))
        return torch.cat(rows)

    found = []
    for y in (convolution(x, weight, bias, (d, along_bias), probe, geometry), plain(*inputs)):
        first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
        twice = torch.autograd.grad(sum(f.square().sum() for f in first), inputs)
        found.append([y, *first, *twice])
    with torch.no_grad():
        ones = convolution_dots(x, found[0][0].cos(), (d, along_bias), geometry)
    for ours, theirs in zip([*found[0], ones], [*found[1], found[1][4]], strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_convolution_of_one_input_for_all_under_autocast_and_of_large_directions_in_float16():
    g, geometry = torch.Generator().manual_seed(0), Geometry((1,), (0,), (1,), 1)
    x, weight, d = torch.randn(1, 3, 8, generator=g), *torch.randn(2, 4, 3, 3, generator=g)
    probe = torch.zeros(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, plain = convolution(x, weight, d[:, 0, 0], (d, d[:, 0, 0]), probe, geometry), F.conv1d(x, weight, d[:, 0, 0])
        written_out = _Convolution.written_out(
            x.bfloat16(), weight.bfloat16(), None, d, d[:, 0, 0], probe[:1], geometry
        )
    torch.testing.assert_close(y, plain.expand(2, -1, -1))
    assert written_out.dtype == torch.bfloat16
    y.float().sum().backward()
    expected = (F.conv1d(x, d, d[:, 0, 0])).sum().expand(2)
    torch.testing.assert_close(probe.grad, expected, rtol=2e-2, atol=2e-2)
    large, grad = 1e6 * d, torch.full((1, 4, 6), 1e-3, dtype=torch.float16)
    found = convolution_dots(x.half(), grad, (large, None), geometry)
    torch.testing.assert_close(found, (F.conv1d(x.half().float(), large) * grad).sum((1, 2)))


@pytest.mark.parametrize("many", [None, 2])
def test_a_convolutions_bias_is_summed_in_float32(many):
    """In bfloat16, where sums over positions would lose what makes samples differ."""
    g = torch.Generator().manual_seed(0)
    x, weight = torch.randn(8, 3, 32, generator=g).bfloat16(), torch.randn(64, 3, 1, generator=g).bfloat16()
    bias, grad = torch.zeros(64).bfloat16(), torch.randn(8, 64, 32, generator=g).bfloat16()
    direction = torch.randn(*(() if many is None else (many,)), 64, generator=g).bfloat16()
    probe = torch.zeros(8, *(() if many is None else (many,)), requires_grad=True)
    geometry = Geometry((1,), (0,), (1,), 1)
    convolution(x, weight, bias, (None, direction), probe, geometry).backward(grad)
    expected = grad.double().sum(2) @ direction.double().mT if many else grad.double().sum(2) @ direction.double()
    torch.testing.assert_close(probe.grad.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("scale", [1e-9, 1e3])
@pytest.mark.parametrize("segments", [None, torch.tensor([0, 4, 8])])
def test_directions_of_half_precision_layers_may_be_small_or_large(scale, segments):
    g = torch.Generator().manual_seed(0)
    x, grad, tangents = (torch.randn(2, 4, 8, generator=g) for _ in range(3))
    weight, direction = torch.ones(8, requires_grad=True), scale * torch.randn(8, generator=g)
    probe = torch.zeros(2, requires_grad=True)
    half = IF.layer_norm(x.half(), (8,), weight, weight, 1e-5, (direction, direction), probe, segments)
    half.backward(grad.half())
    along = F.layer_norm(x.half().double(), (8,)) * direction + direction
    torch.testing.assert_close(probe.grad.double(), (grad.half() * along).sum((1, 2)), rtol=2e-3, atol=2e-3 * scale)
    out, probe = torch.zeros(2, 4, 8, dtype=torch.half, requires_grad=True), torch.zeros(2, requires_grad=True)
    IF.attach(out, scale * tangents, probe, segments).backward(grad.half())
    expected = (grad.half().double() * (scale * tangents)).sum((1, 2))
    torch.testing.assert_close(probe.grad.double(), expected, rtol=1e-4, atol=1e-4 * scale)


@pytest.mark.parametrize("scale", [1e-9, 1e3])
def test_and_where_a_backward_makes_a_graph(scale):
    g = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 4, 8, generator=g).half(), torch.randn(2, 4, 5, generator=g).half()
    weight, direction = torch.ones(5, 8, dtype=torch.half, requires_grad=True), scale * torch.randn(5, 8, generator=g)
    probe = torch.zeros(2, requires_grad=True)
    found = torch.autograd.grad(IF.linear(x, weight, None, (direction, None), probe), probe, grad, create_graph=True)
    expected = torch.einsum("bto,bti,oi->b", grad.double(), x.double(), direction.double())
    torch.testing.assert_close(found[0].double(), expected, rtol=2e-3, atol=2e-3 * scale)


@pytest.mark.filterwarnings("ignore:overflow")
def test_attach_adds_products_up_in_float32():
    for size in (1e-4, 1e3):
        out, probe = torch.zeros(2, 8, dtype=torch.half, requires_grad=True), torch.zeros(2, requires_grad=True)
        half = torch.full_like(out, size).detach()
        IF.attach(out, half, probe).backward(half)
        torch.testing.assert_close(probe.grad, 8 * half[0, 0].float().square().expand(2))


def test_what_follows_may_write_into_what_was_attached():
    out, probe = torch.ones(3, 4, requires_grad=True), torch.zeros(3, requires_grad=True)
    IF.attach(out, torch.ones(3, 4), probe).mul_(2.0).sum().backward()
    assert probe.grad.tolist() == [8.0] * 3 and (out.grad == 2.0).all()


def test_a_probe_has_an_entry_for_each_direction_and_document():
    x, w, d = torch.randn(3, 4, 8), torch.randn(5, 8), torch.randn(5, 8)
    probe, three, table = torch.zeros(3, requires_grad=True), torch.randn(3, 8), torch.randn(9, 8)
    of_three = r"probe: expected \[B, 3\], as there are 3 directions; got \(3,\)"
    with pytest.raises(ValueError, match=of_three):
        IF.linear(x, w, None, (torch.stack([d, d, d]), None), probe)
    with pytest.raises(ValueError, match=of_three):
        IF.linear(x, w, w[:, 0], (None, torch.randn(3, 5)), probe)
    with pytest.raises(ValueError, match=of_three):
        IF.layer_norm(x, (8,), x[0, 0], None, 1e-5, (three, None), probe)
    with pytest.raises(ValueError, match=of_three):
        IF.rms_norm(x, (8,), x[0, 0], None, three, probe)
    with pytest.raises(ValueError, match=of_three):
        IF.bias(x, x[0, 0], three, probe)
    with pytest.raises(ValueError, match=of_three):
        IF.attach(x, torch.stack([x, x, x]), probe)
    with pytest.raises(ValueError, match=r"expected \[B\], as there is one direction; got \(3, 2\)"):
        IF.linear(x, w, None, (d, None), torch.zeros(3, 2, requires_grad=True))
    with pytest.raises(ValueError, match=r"for each of 2 documents, got \(3,\)"):
        IF.linear(x, w, None, (d, None), probe, torch.tensor([0, 5, 12]))
    with pytest.raises(ValueError, match=r"direction: expected \(8,\), as the bias, got \(5,\)"):
        IF.bias(torch.ones(3, 2, 8), torch.ones(8), torch.ones(5), probe)
    with pytest.raises(ValueError, match=r"direction: expected \(5, 8\), as the weight, got \(9, 8\)"):
        IF.embedding(torch.zeros(3, 2, dtype=torch.int64), d, table, probe)
    with pytest.raises(ValueError, match=r"expected \[B, T, ..., I\] with segments"):
        IF.linear(x[0], w, None, (d, None), probe, torch.tensor([0, 1, 2, 4]))


def test_nothing_to_score_has_no_dots():
    """Of a batch of no samples, and documents of no tokens."""
    w, table = torch.ones(8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    for rows, segments, count in ((0, None, 0), (0, torch.tensor([0, 0]), 1), (2, None, 2)):
        for layer in (
            lambda x, p, s: IF.layer_norm(x, (8,), w, w, 1e-5, (w.detach(), w.detach()), p, s),
            lambda x, p, s: IF.attach(x.clone().requires_grad_(), x, p, s),
            lambda x, p, s: IF.embedding(x[..., 0].long(), table, table.detach(), p, None, s),
        ):
            probe = torch.zeros(count, requires_grad=True)
            layer(torch.zeros(rows, 3 if rows == 0 else 0, 8), probe, segments).sum().backward()
            assert torch.equal(probe.grad, torch.zeros(count))


@pytest.mark.parametrize(("size", "of_grads"), [(1e-3, 1e5), (1e3, 1e-8)])
def test_a_half_precision_weight_under_another_autocast(size, of_grads):
    g = torch.Generator().manual_seed(0)
    x, grad = (
        size * torch.randn(16, 2, 1024, generator=g),
        (of_grads * torch.randn(16, 2, 1024, generator=g)).bfloat16(),
    )
    found = []
    for scored in (True, False):
        weight = torch.zeros(1024, 1024, dtype=torch.float16, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            directions = torch.zeros(1024, 1024), None
            probe = torch.zeros(16, requires_grad=True) if scored else None
            IF.linear(x, weight, None, directions, probe).backward(grad)
        found.append(weight.grad.double())
    torch.testing.assert_close(*found, rtol=2e-2, atol=1e-2 * found[1].abs().max().item())


def test_a_second_derivative_where_autocast_ran_the_layer():
    x, w, d = torch.randn(2, 3, 8), torch.randn(5, 8, requires_grad=True), torch.randn(5, 8)
    found = []
    for again in (False, True):
        probe = torch.zeros(2, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            loss = IF.linear(x, w, None, (d, None), probe).float().square().sum()
        found.append(torch.autograd.grad(loss, probe, create_graph=again)[0])
    torch.testing.assert_close(found[1], found[0], rtol=2e-2, atol=2e-2 * float(found[0].detach().abs().max()))


def test_a_probe_direction_or_shape_of_another_size_is_said_in_the_forward():
    x, weight, shape = torch.randn(5, 6), torch.randn(3, 6), torch.ones(6)
    with pytest.raises(ValueError, match=r"directions\[0\]: expected \(3, 6\), as the weight, got \(6, 3\)"):
        IF.linear(x, weight, None, (weight.T, None), torch.zeros(5, requires_grad=True))
    for probe, tangents in ((torch.zeros(1), x), (torch.zeros(7), x), (torch.zeros(5), torch.randn(5, 4))):
        with pytest.raises(ValueError, match=r"attach: expected an entry of the probe for each of 5 samples"):
            IF.attach(x, tangents, probe.requires_grad_())
    probe = torch.zeros(5, requires_grad=True)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        IF.layer_norm(x, (7,), shape, None, directions=(shape, None), probe=probe)
    with pytest.raises(RuntimeError, match="dtype"):
        IF.linear(x.double(), weight, None, (weight, None), probe)


@pytest.mark.parametrize("of", ["weight", "bias"])
def test_a_direction_of_another_shape_than_its_parameter_is_said_in_the_forward(of):
    """Of as many elements it would be scored, each against another one's gradient."""
    x, shape, probe = torch.randn(3, 4, 2, 8), torch.ones(2, 8), torch.zeros(3, requires_grad=True)
    both = (torch.ones(8, 2), None) if of == "weight" else (shape, torch.ones(8, 2))
    wrong = rf"directions\[\d\]: expected \(2, 8\), as the {of}, got \(8, 2\)"
    with pytest.raises(ValueError, match=wrong):
        IF.layer_norm(x, (2, 8), shape, shape, 1e-5, both, probe)
    with pytest.raises(ValueError, match=wrong):
        IF.affine(x, shape, shape, both, probe)
    with pytest.raises(ValueError, match=r"direction: expected \(2, 8\), as the weight, got \(8, 2\)"):
        IF.rms_norm(x, (2, 8), shape, None, torch.ones(8, 2), probe)
    with pytest.raises(ValueError, match=r"directions\[1\]: expected \(5,\), as the bias, got \(1,\)"):
        IF.linear(x, torch.ones(5, 8), torch.ones(5), (None, torch.ones(1)), probe)


def test_a_direction_of_a_bias_that_is_not_there_is_refused():
    x, w, probe = torch.randn(3, 4, 8), torch.ones(8), torch.zeros(3, requires_grad=True)
    missing = r"directions\[1\]: expected None, as there is no bias, got \(8,\)"
    with pytest.raises(ValueError, match=missing):
        IF.linear(x, torch.ones(8, 8), None, (torch.ones(8, 8), w), probe)
    with pytest.raises(ValueError, match=missing):
        IF.layer_norm(x, (8,), w, None, 1e-5, (w, w), probe)
    with pytest.raises(ValueError, match=missing):
        IF.affine(x, w, None, (w, w), probe)


def test_documents_of_an_input_without_tokens_and_a_probe_without_samples_are_refused():
    x, w, segments = torch.randn(3, 8), torch.ones(8), torch.tensor([0, 1, 3])
    probe = torch.zeros(2, requires_grad=True)
    without = r"expected \[B, T, ..., I\] with segments, got \(3, 8\)"
    with pytest.raises(ValueError, match=without):
        IF.layer_norm(x, (8,), w, w, 1e-5, (w, w), probe, segments)
    with pytest.raises(ValueError, match=without):
        IF.rms_norm(x, (8,), w, None, w, probe, segments)
    with pytest.raises(ValueError, match=without):
        IF.bias(x, w, w, probe, segments)
    with pytest.raises(ValueError, match=r"ids: expected \[B, T, ...\] with segments, got \(3,\)"):
        IF.embedding(torch.arange(3), torch.ones(5, 8), torch.ones(5, 8), probe, segments=segments)
    with pytest.raises(ValueError, match=r"out: expected \[B, T, ...\] with segments, got \(3,\)"):
        IF.attach(x[:, 0], x[:, 0], probe, segments)
    with pytest.raises(ValueError, match=r"probe: expected \[B\], as there is one direction; got \(\)"):
        IF.linear(x, torch.ones(5, 8), None, (torch.ones(5, 8), None), torch.zeros((), requires_grad=True))


@pytest.mark.parametrize("shape", [(5, 8), (1, 8), (1, 1, 8)])
def test_a_bias_of_positions_scores_documents(shape):
    x, grad = torch.randn(2, 2, 5, 8).double()
    bias, probe = torch.randn(shape).double(), torch.zeros(3, requires_grad=True)
    (IF.bias(x, bias, bias, probe, torch.tensor([0, 2, 5, 10])) * grad).sum().backward()
    of_tokens = (grad * bias).sum(2).flatten()
    expected = torch.stack([of_tokens[:2].sum(), of_tokens[2:5].sum(), of_tokens[5:].sum()]).float()
    torch.testing.assert_close(probe.grad, expected)


def test_documents_of_tokens_that_a_norm_takes_together_are_refused():
    x, w, segments = torch.randn(3, 2, 8), torch.ones(2, 8), torch.tensor([0, 1, 3])
    probe = torch.zeros(2, requires_grad=True)
    together = r"x: expected \[B, T, ..., I\] with segments, got \(3, 2, 8\)"
    with pytest.raises(ValueError, match=together):
        IF.layer_norm(x, (2, 8), w, w, 1e-5, (w, w), probe, segments)
    with pytest.raises(ValueError, match=together):
        IF.rms_norm(x, (2, 8), w, None, w, probe, segments)
    with pytest.raises(ValueError, match=together):
        IF.affine(x, w, w, (w, w), probe, segments)
