"""What other libraries put in the place of a model's own: kernels set on modules, hooks, losses without logits, layers
in 8 bits, and optimizers whose state has 8 bits or 4."""

from __future__ import annotations

import copy
import dataclasses
import gc
import itertools
import types
import weakref

import pytest
import torch
import torch.nn.functional as F
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_submodules
from models import VOCAB, WIDTH, B, T, data, loss_of, make, oracle_values
from torch import nn

import inrun
from inrun import directions, slots, stand_ins, updates

METHODS = "first", "path"
LR = 0.1


def close(found, expected, rtol=1e-5):
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=rtol * expected.abs().max().item())


def values_of(model, batch, validation, method="first", optimizer=None, loss=loss_of, **options):
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss(model, *validation), **options)
    with tracker, tracker.step(range(len(batch[0]))) as step:
        loss(model, *batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return step.values


class _RMSNorm(torch.autograd.Function):
    """A norm as kernels have it: of one function, without a derivative forward, whose backward writes into what it
    was given."""

    @staticmethod
    def forward(ctx, x, weight, offset):
        rstd = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        ctx.save_for_backward(x, weight, rstd)
        ctx.offset = offset
        return x * rstd * (offset + weight)

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        normed = x * rstd
        of_weight = (grad * normed).flatten(0, -2).sum(0)
        along = grad.mul_(ctx.offset + weight)
        return (along - normed * (along * normed).mean(-1, keepdim=True)) * rstd, of_weight, None


def kernel_forward(self, hidden_states):
    return _RMSNorm.apply(hidden_states, self.weight, self.offset)


def with_kernels(model):
    """As Liger and Hugging Face's kernels replace norms."""
    for module in model.modules():
        if isinstance(module, nn.RMSNorm) or type(module).__name__ == "Scale":
            module.offset = 0.0 if isinstance(module, nn.RMSNorm) else 1.0
            module.eps = 1e-6
            module.__dict__["forward"] = kernel_forward.__get__(module, type(module))
    return model


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["gpt_untied", "unknown"])
def test_methods_that_are_set_on_modules_in_place_of_their_forward_are_scored(name, method):
    model, batch, validation = with_kernels(make(name)), data(name), data(name, 4, 2)
    found = [m for m in model.modules() if "forward" in vars(m)]
    assert found
    kinds, before = [type(m) for m in found], model(batch[0])
    expected = oracle_values(model, lambda n, g: LR * g, batch, validation)
    tracked = copy.deepcopy(model)
    close(values_of(tracked, batch, validation, method), expected)
    for module, kind in zip([m for m in tracked.modules() if "forward" in vars(m)], kinds, strict=True):
        assert type(module) is kind and vars(module)["forward"].__func__ is kernel_forward
        assert vars(module)["forward"].__self__ is module
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR), method)
    assert not [m for m in found if "forward" in vars(m)]
    assert torch.equal(model(batch[0]), before)
    copied = copy.deepcopy(model)
    tracker.close()
    for one in (model, copied):
        assert torch.equal(one(batch[0]), before)
        own = [m for m in one.modules() if "forward" in vars(m) and vars(m)["forward"].__self__ is m]
        assert len(own) == len(found)


def test_a_kernel_whose_backward_writes_into_what_it_was_given_has_second_order_by_differences():
    model, batch, validation = make("gpt_untied"), data("gpt"), data("gpt", 4, 2)
    found, expected = (values_of(m, batch, validation, "second") for m in (with_kernels(copy.deepcopy(model)), model))
    close(found, expected, 1e-3)


def test_a_model_that_cannot_be_tracked_keeps_the_methods_that_were_set_on_it():
    model = with_kernels(make("gpt_untied"))
    model.blocks[0].forward = lambda x: x
    held = [(m, type(m), vars(m)["forward"]) for m in model.modules() if "forward" in vars(m)]
    with pytest.raises(ValueError, match="expected names of parameters"):
        inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR), exclude=["nothing"])
    assert all(type(m) is kind and vars(m)["forward"] is forward for m, kind, forward in held)


@pytest.mark.parametrize("method", METHODS)
def test_modules_that_have_hooks_of_accelerates_are_scored(method):
    model, batch, validation = make("attention"), data("attention"), data("attention", 4, 2)
    expected = values_of(copy.deepcopy(model), batch, validation, method)
    before = model(batch[0])
    inside = [m for m in model.modules() if next(m.parameters(recurse=False), None) is not None]
    for module in inside:
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    copied = copy.deepcopy(model)
    close(values_of(copied, batch, validation, method), expected, 1e-6)
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR), method)
    remove_hook_from_submodules(model)
    tracker.close()
    for module in inside:  # taken away before or after
        assert module.forward.__func__ is type(module).forward
    assert torch.equal(model(batch[0]), before)
    remove_hook_from_submodules(copied)
    assert copied(batch[0]).shape == before.shape


def hooked(model):
    for module in model.modules():
        if next(module.parameters(recurse=False), None) is not None:
            add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    return model


@pytest.mark.parametrize("method", METHODS)
def test_hooks_around_methods_that_are_set_on_modules_leave_these(method):
    model, batch, validation = with_kernels(make("unknown")), data("unknown"), data("unknown", 4, 2)
    set_on = [m for m in model.modules() if "forward" in vars(m)]
    for module in set_on:
        module.offset = 0.0  # so that the class's forward would do something else
    before = model(batch[0])
    expected = oracle_values(model, lambda n, g: LR * g, batch, validation)
    hooked(model)
    copied = copy.deepcopy(model)
    close(values_of(copied, batch, validation, method), expected)
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR), method)
    assert torch.equal(model(batch[0]), before)
    copied = copy.deepcopy(model)
    tracker.close()
    for one in (model, copied):
        assert torch.equal(one(batch[0]), before)
        remove_hook_from_submodules(one)
        assert torch.equal(one(batch[0]), before)
    assert all(vars(m)["forward"].__func__ is kernel_forward for m in set_on)


def test_hooks_that_come_or_go_while_a_model_is_tracked_stay_so():
    model, batch = with_kernels(make("gpt_untied")), data("gpt")
    before = model(batch[0])
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR))
    hooked(model)
    copied = copy.deepcopy(model)
    tracker.close()
    for one in (model, copied):
        assert torch.equal(one(batch[0]), before)
        inside = [m for m in one.modules() if hasattr(m, "_old_forward")]
        assert inside and not [m for m in inside if isinstance(vars(m)["forward"], types.MethodType)]
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR))
    remove_hook_from_submodules(model)
    copied = copy.deepcopy(model)
    tracker.close()
    for one in (model, copied):
        assert torch.equal(one(batch[0]), before)


@pytest.mark.parametrize("hooks", [False, True])
def test_functions_that_are_set_on_modules_need_a_module_around_them_and_stay(hooks):
    torch.manual_seed(0)
    model, batch, validation = make("gpt_untied"), data("gpt"), data("gpt", 4, 2)
    block = model.blocks[0]
    inner = next(m for m in block.modules() if isinstance(m, nn.Linear))
    name = next(n for n, m in model.named_modules() if m is inner)
    inner.forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), inner)
    expected = oracle_values(model, lambda n, g: LR * g, batch, validation)
    holder = types.SimpleNamespace(inner=inner)
    function = types.MethodType(lambda self, x: 2 * F.linear(x, self.inner.weight, self.inner.bias), holder)
    inner.forward = function  # no method of its own
    if hooks:
        hooked(model)
    before = model(batch[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with pytest.raises(inrun.InRunError, match=f"{name}: expected Linear's own forward.*is no method of it"):
        inrun.track(model, optimizer)
    assert torch.equal(model(batch[0]), before)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = values_of(model, batch, validation, "first", optimizer, through={f"{name}.*": "blocks.0"})
    close(found, expected)
    model.load_state_dict(weights, strict=False)
    assert torch.equal(model(batch[0]), before)
    assert vars(inner)["_old_forward" if hooks else "forward"] is function


@pytest.mark.parametrize("hooks", [False, True])
def test_methods_and_hooks_of_modules_that_copy_themselves(hooks):
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(4, 3))
    model, x = nn.Sequential(layer), torch.randn(2, 4)
    if hooks:
        add_hook_to_module(layer, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    else:
        layer.forward = types.MethodType(lambda self, x: 2 * F.linear(x, self.weight, self.bias), layer)
    before = model(x)
    with inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR)):
        copied = copy.deepcopy(model)
        assert torch.equal(model(x), before)
    for one in (model, copied):
        assert torch.equal(one(x), before)
        assert vars(one[0])["_old_forward" if hooks else "forward"].__self__ is one[0]


def test_a_method_that_holds_its_module_goes_with_it():
    model = nn.Sequential(nn.Linear(4, 3))
    for module in model.modules():
        module.forward = types.MethodType(lambda self, x, plain=module.forward: plain(x), module)
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR))
    tracker.close()
    weight = weakref.ref(model[0].weight)
    del model, module, tracker
    gc.collect()  # the class it had
    gc.collect()  # and so the method
    assert weight() is None


class Headed(nn.Module):
    """A language model that by default uses its output layer's weight past the layer, as Liger's do in training."""

    def __init__(self):
        super().__init__()
        self.embed, self.lm_head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)

    def get_output_embeddings(self):
        return self.lm_head

    def forward(self, ids, labels=None, skip_logits=None):
        x = self.embed(ids).tanh()
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        logits = _past(self.lm_head, x) if skip_logits else self.lm_head(x)
        return (None if skip_logits else logits), F.cross_entropy(logits.flatten(0, 1), labels.flatten())


def _past(head, x):
    return x @ head.weight.t()


def test_a_loss_without_logits_calls_the_output_layer_while_it_is_scored():
    torch.manual_seed(0)
    model, batch, validation = Headed(), data("gpt"), data("gpt", 4, 2)
    logits = types.SimpleNamespace(model=copy.deepcopy(model).eval())
    plain = nn.Sequential(logits.model.embed, nn.Tanh(), logits.model.lm_head)
    expected = oracle_values(plain, lambda n, g: LR * g, batch, validation)
    close(values_of(model, batch, validation, loss=lambda m, x, y: m(x, labels=y)[1]), expected)
    assert model(batch[0], labels=batch[1])[0] is None
    with inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR)):
        copied = copy.deepcopy(model)
    assert copied(batch[0], labels=batch[1])[0] is None
    assert not model._forward_pre_hooks
    frozen = Headed()
    frozen.lm_head.requires_grad_(False)
    tracker = inrun.track(frozen, torch.optim.SGD(frozen.embed.parameters(), lr=LR))
    assert frozen(batch[0], labels=batch[1])[0] is None
    tracker.close()


class Headless(nn.Module):
    """Of modules that take `skip_logits`: one whose output layer is elsewhere, or that is not asked for it."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, skip_logits=None):
        return self.linear(x) if skip_logits is None else None


class Tokenless(Headless):
    def get_output_embeddings(self):
        return None


class Written(nn.Module):
    """Its forward is not written in Python, and has no signature."""

    forward = staticmethod(torch.tanh)


def test_modules_that_take_the_argument_of_a_loss_without_logits_and_have_no_output_layer():
    for kind in (Headless, Tokenless):
        model = nn.Sequential(kind(), Written())
        with inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR)):
            assert model(torch.ones(2, 4)).shape == (2, 3)


# ------------------------------------------------------------------ layers in 8 bits


def test_a_float8_layer_has_no_second_order():
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    config = Float8LinearConfig(emulate=True)
    model = convert_to_float8_training(nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 16)), config=config)
    x = torch.randn(B, 16)
    with pytest.raises(inrun.InRunError, match=r"method 'second'.*got torchao's Float8Linear"):
        values_of(model, (x, x), (x, x), "second", loss=lambda m, x, y: (m(x) - y).square().mean())


@pytest.mark.parametrize("recipe", ["tensorwise", "rowwise", "rowwise_with_gw_hp"])
@pytest.mark.parametrize("method", METHODS)
def test_float8_layers_are_scored_by_their_inputs_and_output_gradients(method, recipe):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16))
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name(recipe), emulate=True)
    model = convert_to_float8_training(model, config=config)
    layers = {name: m for name, m in model.named_modules() if type(m).__name__ == "Float8Linear"}
    assert len(layers) == 2
    x, y, vx, vy = (torch.randn(n, T, 16) for n in (B, B, 4, 4))

    def loss(model, x, y):
        return (model(x) - y).square().mean()

    kept = {}

    def keep(layer, args, out):
        kept[layer] = [args[0].detach()]
        out.register_hook(kept[layer].append)

    own = copy.deepcopy(model)
    names = {own.get_submodule(name): name for name in layers}
    for layer in names:
        layer.register_forward_hook(keep)
    loss(own, vx, vy).backward()
    direction = {n: LR * p.grad.clone() for n, p in own.named_parameters()}
    own.zero_grad()
    kept.clear()
    loss(own, x, y).backward()
    expected = torch.zeros(B)
    for layer, (acts, grads) in kept.items():
        expected += torch.einsum("bti,bto,oi->b", acts, grads, direction[f"{names[layer]}.weight"])
        expected += grads.sum(1) @ direction[f"{names[layer]}.bias"]
    norm = {n: direction[n] for n in direction if n.startswith("2.")}
    exact = sum((direction[n] * p.grad).sum() for n, p in own.named_parameters() if n not in norm)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    exclude = list(norm)
    found = values_of(model, (x, y), (vx, vy), method, optimizer, loss, exclude=exclude)
    close(found, expected, 1e-4)
    rounded = 1e-4 if recipe.endswith("hp") else 0.05
    assert abs(found.sum() - exact) < rounded * found.abs().sum()


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("of", ["samples", "tokens", "documents"])
def test_float8_layers_by_tokens_documents_and_targets(of, autocast):
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
    model = convert_to_float8_training(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), config=config)
    x = torch.randn(B, T, 16)

    def loss(x):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return model(x).float().square().mean()

    inputs = {"a": torch.randn(3, T, 16), "b": torch.randn(2, T, 16)}
    held_by = {k: torch.autograd.grad(loss(v), list(model.parameters())) for k, v in inputs.items()}
    own, kept = copy.deepcopy(model), []

    def keep(layer, args, out):
        x = args[0].detach()
        out.register_hook(lambda g: kept.append((x, g)))

    for layer in model:
        layer.register_forward_hook(keep)
    expected = torch.zeros(B, T, 2)
    loss(x).backward()
    for (a, g), w in zip(reversed(kept), (0, 2), strict=True):
        for k, held in enumerate(held_by.values()):
            a, g = a.to(torch.bfloat16).float() if autocast else a, g.float()
            expected[..., k] += LR * (torch.einsum("bti,bto,oi->bt", a, g, held[w]) + g @ held[w + 1])
    model, ends = own, [0, 3, T, B * T - 1, B * T]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation={k: lambda v=v: loss(v) for k, v in inputs.items()})
    shape, many = {"samples": {}, "tokens": {"tokens": T}}, B
    if of == "documents":
        shape[of], many = {"segments": torch.tensor(ends), "tokens": T}, len(ends) - 1
        flat = expected.flatten(0, 1)
        expected = torch.stack([flat[i:j].sum(0) for i, j in itertools.pairwise(ends)])
    elif of == "samples":
        expected = expected.sum(1)
    with tracker, tracker.step(range(many), **shape[of]) as step:
        loss(x).backward()
        optimizer.step()
    close(step.values, expected, 5e-3 if autocast else 1e-5)


def test_float8_layers_take_a_backward_that_can_be_differentiated():
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    torch.manual_seed(0)
    config = dataclasses.replace(Float8LinearConfig.from_recipe_name("rowwise"), emulate=True)
    model = convert_to_float8_training(nn.Sequential(nn.Linear(16, 32), nn.Linear(32, 16)), config=config)
    x, found = torch.randn(B, T, 16), []
    for create_graph in (False, True):
        own = copy.deepcopy(model)
        optimizer = torch.optim.SGD(own.parameters(), lr=LR)
        tracker = inrun.track(own, optimizer, validation=lambda own=own: own(x[:2]).square().mean())
        with tracker, tracker.step(range(B)) as step:
            own(x).square().mean().backward(create_graph=create_graph)
            optimizer.step()
        found.append(step.values)
    close(*found)


@pytest.mark.parametrize("kind", ["bitnet", "int8_mixed_precision", "int8_weight_only_quantized"])
@pytest.mark.parametrize("method", METHODS)
def test_weights_of_classes_that_round_in_products_train_as_ever_and_are_scored(method, kind):
    from torchao import quantize_
    from torchao.prototype import quantized_training

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    quantize_(model, getattr(quantized_training, f"{kind}_training")())
    x, y, vx, vy = (torch.randn(n, T, 16) for n in (B, B, 4, 4))

    def loss(model, x, y):
        return (model(x) - y).square().mean()

    def gradients(x, y):
        own.zero_grad()
        loss(own, x, y).backward()
        return [p.grad.clone() for p in own.parameters()]

    own = copy.deepcopy(model)
    held, total = gradients(vx, vy), gradients(x, y)
    shares = [sum((g * d).sum() for g, d in zip(gradients(*one), held, strict=True)) * LR / B
              for one in zip(x.split(1), y.split(1), strict=True)]  # fmt: skip
    found = values_of(model, (x, y), (vx, vy), method, loss=loss)
    close(found, torch.stack(shares), 2e-2)
    for p, was, g in zip(model.parameters(), own.parameters(), total, strict=True):
        if kind != "int8_weight_only_quantized" or p.dim() == 1:  # which is rounded at random when it is written
            close((was - p).detach() / LR, g, 1e-3)


def test_adapters_beside_weights_of_four_bits_are_scored():
    import bitsandbytes
    import peft

    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(VOCAB, 64), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, VOCAB))
    four = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    four.weight = bitsandbytes.nn.Params4bit(base[1].weight.data.clone(), requires_grad=False, quant_type="nf4")
    base[1] = four.to("cpu")
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["1"], init_lora_weights=False))
    batch, validation = data("gpt"), data("gpt", 4, 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    assert len(trained) == 2

    def gradients(x, y):
        shares = (loss_of(model, x[b : b + 1], y[b : b + 1]) / len(x) for b in range(len(x)))
        return [torch.autograd.grad(share, trained) for share in shares]

    held = [sum(of) for of in zip(*gradients(*validation), strict=True)]
    expected = [sum(LR * (g * d).sum() for g, d in zip(one, held, strict=True)) for one in gradients(*batch)]
    optimizer = bitsandbytes.optim.PagedAdamW8bit(trained, lr=1e-3)
    with inrun.track(model, optimizer, validation=lambda: loss_of(model, *validation)) as tracker:
        assert len(tracker.coverage["tracked"]) == 2
    close(values_of(model, batch, validation, optimizer=torch.optim.SGD(trained, lr=LR)), torch.stack(expected))


@pytest.mark.parametrize("method", METHODS)
def test_adapters_that_scale_weights_of_four_bits_are_scored(method):
    import bitsandbytes
    import peft

    torch.manual_seed(0)
    four = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    four.weight = bitsandbytes.nn.Params4bit(four.weight.data, requires_grad=False, quant_type="nf4")
    base = nn.Sequential(nn.Embedding(VOCAB, 64), four.to("cpu"), nn.Tanh(), nn.Linear(64, VOCAB))
    config = peft.LoraConfig(r=2, target_modules=["1"], use_dora=True, init_lora_weights=False)
    model, batch, validation = peft.get_peft_model(base, config), data("gpt"), data("gpt", 4, 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    held = torch.autograd.grad(loss_of(model, *validation), trained)
    shares = [
        torch.autograd.grad(loss_of(model, x, y) / B, trained)
        for x, y in zip(*(v.split(1) for v in batch), strict=True)
    ]
    expected = [sum(LR * (g * d).sum() for g, d in zip(share, held, strict=True)) for share in shares]
    found = values_of(model, batch, validation, method, torch.optim.SGD(trained, lr=LR))
    close(found, torch.stack(expected), 1e-4)


def test_weights_of_four_bits_are_not_packed_for_inference_while_a_model_is_tracked():
    import bitsandbytes

    torch.manual_seed(0)
    four = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4")
    model = nn.Sequential(nn.Embedding(VOCAB, 64), nn.LayerNorm(64), four.to("cpu"), nn.Linear(64, VOCAB))
    model[0].requires_grad_(False)
    model[2].requires_grad_(False)
    model[2].support_avx512bf16_for_cpu = True  # whatever this CPU has
    batch, held = data("gpt"), data("gpt", 4, 2)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=LR)

    def evaluated():
        with torch.no_grad():
            return loss_of(model.eval(), *held)

    before = model[2].weight.data.clone()
    with inrun.track(model, optimizer, "path", validation=lambda: loss_of(model.eval(), *held)) as tracker:
        for _ in range(2):
            model.train()
            with tracker.step(range(B)) as step:
                loss_of(model, *batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            assert step.values.abs().min() > 0
            evaluated()
        assert torch.equal(model[2].weight.data, before)
    assert model[2].support_avx512bf16_for_cpu


# ------------------------------------------------------------------ optimizers


def _torchao(name, **options):
    from torchao import optim

    return lambda params: getattr(optim, name)(params, lr=1e-3, weight_decay=0.1, **options)


def _bitsandbytes(name, **options):
    from bitsandbytes import optim

    return lambda params: getattr(optim, name)(params, lr=1e-3, weight_decay=0.1, **options)


OPTIMIZERS = {
    "torchao 8 bits": (_torchao, "AdamW8bit", {}),
    "torchao 8 bits, L2": (_torchao, "Adam8bit", {}),
    "torchao 4 bits": (_torchao, "AdamW4bit", {}),
    "torchao float8": (_torchao, "AdamWFp8", {}),
    "bitsandbytes": (_bitsandbytes, "AdamW", {}),
    "bitsandbytes 8 bits": (_bitsandbytes, "AdamW8bit", {"betas": (0.8, 0.95)}),
    "bitsandbytes paged": (_bitsandbytes, "PagedAdamW8bit", {}),
    "bitsandbytes Adam": (_bitsandbytes, "Adam8bit", {}),
}


@pytest.fixture
def eagerly():
    """Not compiled, as torchao's optimizers would be."""
    with torch.compiler.set_stance("force_eager"):
        yield


def wide():
    """A model with a weight of the size from which optimizers take 8 bits, and others."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB, 64), nn.LayerNorm(64), nn.Linear(64, 80), nn.Tanh(), nn.Linear(80, VOCAB))


def trained(model, optimizer, steps):
    for i in range(steps):
        loss_of(model, *data("gpt", 4, 10 + i)).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_with_a_state_of_few_bits_make_the_update_of_what_stands_for_them(eagerly, name, steps):
    library, kind, options = OPTIMIZERS[name]
    model = wide()
    optimizer = library(kind, **options)(model.parameters())
    trained(model, optimizer, steps)
    loss_of(model, *data("gpt")).backward()
    stands = stand_ins.of(optimizer)
    assert steps or not optimizer.state[model[0].weight]  # which makes an empty one
    assert directions.adam_rates(stands, stands.param_groups[0]) is None  # its moments are there one at a time
    assert type(stands) in (torch.optim.Adam, torch.optim.AdamW) and type(optimizer) is not type(stands)
    held = {n: slots.Slot(n, *_owner(model, n), [], stands, 0) for n, _ in model.named_parameters()}
    state = {p: dict(s) for p, s in optimizer.state.items()}
    assert stands.state.get(torch.zeros(3), "none") == "none" and len(stands.state) == len(state)
    moved = updates.updates(list(held.values()), [p.grad.double() for p in model.parameters()])
    assert {p: dict(s) for p, s in optimizer.state.items()} == state  # the same tensors
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    for p, was, u in zip(model.parameters(), before, moved, strict=True):
        assert ((p - was) - u).norm() < 1e-3 * u.norm()


def _owner(model, name):
    path, _, local = name.rpartition(".")
    return model.get_submodule(path), local


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_their_steps_are_scored_from_their_state(eagerly, name):
    library, kind, options = OPTIMIZERS[name]
    model, batch, validation = wide(), data("gpt"), data("gpt", 4, 2)
    optimizer = library(kind, **options)(model.parameters())
    trained(model, optimizer, 2)

    def direction(n, g):
        p = dict(model.named_parameters())[n]
        group, moments = optimizer.param_groups[0], stand_ins.of(optimizer).state[p]
        (beta1, beta2), t = group["betas"], int(moments["step"]) + 1
        v = beta2 * moments["exp_avg_sq"].double() + (1 - beta2) * g.square()
        v = torch.maximum(v, moments["max_exp_avg_sq"].double()) if "max_exp_avg_sq" in moments else v
        return float(group["lr"]) * (1 - beta1) / (1 - beta1**t) * g / ((v / (1 - beta2**t)).sqrt() + group["eps"])

    expected = oracle_values(model, direction, batch, validation)
    close(values_of(model, batch, validation, "first", optimizer), expected, 1e-4)
    losses = {"validation": lambda: loss_of(model, *validation)}
    with inrun.track(model, optimizer, "path_secant", validation=losses) as tracker, tracker.step(range(B)) as step:
        loss_of(model, *batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert step.values.sum().item() == pytest.approx(step.drop["validation"].item(), rel=1e-3)
    assert step.values.abs().min() > 0


def test_states_of_few_bits_are_read_once_for_each_parameter_of_an_update(monkeypatch):
    import bitsandbytes

    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(6)))
    optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
    model(torch.randn(2, 64)).square().sum().backward()
    optimizer.step()
    stands, read = stand_ins.of(optimizer), []
    of = stand_ins._of_eight_bits
    monkeypatch.setattr(stands.state, "_moments", lambda state: (read.append(state), of(state))[1])
    held = [slots.Slot(n, *_owner(model, n), [], stands, 0) for n, _ in model.named_parameters()]
    for slot in held:
        updates.updates([slot], [slot.param.grad.double()])
    assert len(read) <= 3 * len(held)


def test_options_of_single_parameters_are_refused():
    from bitsandbytes import optim

    manager, model = optim.GlobalOptimManager.get_instance(), wide()
    try:
        manager.register_module_override(model[0], "weight", {"optim_bits": 32})
        optimizer = optim.AdamW8bit(model.parameters())
        trained(model, optimizer, 1)
        assert type(stand_ins.of(optimizer)) is torch.optim.AdamW
        for override in ("register_module_override", "override_config"):
            manager.initialize()
            where = (model[2], "weight") if override == "register_module_override" else (model[2].weight,)
            getattr(manager, override)(*where, **_named(override, {"lr": 0.1}))
            for method in ("first", "path"):
                with pytest.raises(inrun.InRunError, match="got AdamW8bit"):
                    inrun.track(model, optimizer, method)
    finally:
        manager.initialize()


def _named(override, options):
    return {"config" if override == "register_module_override" else "key_value_dict": options}


def test_an_update_that_is_given_as_a_function_gets_the_options_and_state_of_the_optimizer_itself():
    import bitsandbytes

    model, batch, validation = wide(), data("gpt"), data("gpt", 4, 2)
    optimizer = bitsandbytes.optim.AdamW8bit([{"params": list(model.parameters()), "of": "all"}])
    trained(model, optimizer, 1)
    given = []

    def update(grad, param, state, group):
        given.append((set(state), group["of"]))
        return -group["lr"] * grad

    with pytest.warns(UserWarning, match="by AdamW8bit"):
        values_of(model, batch, validation, "path", optimizer, update=update)
    assert all({"state1", "state2"} <= names and of == "all" for names, of in given)


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
@pytest.mark.parametrize("method", ["path", "monte_carlo"])
def test_an_update_that_is_given_as_a_function_gets_the_moments_of_torchaos_optimizers_as_numbers(
    eagerly, kind, method
):
    from torchao import optim

    def adamw(grad, param, state, group):
        assert group["of"] == "all"
        (a, b), step = group["betas"], state["step"] + 1
        mean = torch.lerp(grad, state["exp_avg"], a) / (1 - a**step)
        root = (torch.lerp(grad.square(), state["exp_avg_sq"], b) / (1 - b**step)).sqrt()
        return -group["lr"] * (mean / (root + group["eps"]) + group["weight_decay"] * param)

    values = []
    for options in {}, {"update": adamw}:
        model, batch, validation = wide(), data("gpt"), data("gpt", 4, 2)
        optimizer = getattr(optim, kind)([{"params": list(model.parameters()), "of": "all"}], lr=1e-2)
        trained(model, optimizer, 2)
        values.append(values_of(model, batch, validation, method, optimizer, **options))
    close(*values)


@pytest.mark.parametrize("method", ["first", "secant"])
def test_a_method_that_asks_for_no_update_takes_bitsandbytes_optimizers_beside_a_function_of_it(method):
    import bitsandbytes

    values = []
    for options in {}, {"update": lambda grad, *_: -grad}:
        model, batch, validation = wide(), data("gpt"), data("gpt", 4, 2)
        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
        trained(model, optimizer, 1)
        values.append(values_of(model, batch, validation, method, optimizer, **options))
    assert torch.equal(*values)


@pytest.mark.parametrize("kind", ["Lion8bit", "PagedLion", "RMSprop8bit"])
def test_coalitions_of_an_elementwise_optimizer_of_bitsandbytes_move_as_its_own_steps_do(kind):
    import bitsandbytes

    values, samples = [], 7
    for options in {}, {"update": "elementwise"}:
        model, batch, validation = wide(), data("gpt", samples), data("gpt", 4, 2)
        optimizer = getattr(bitsandbytes.optim, kind)(model.parameters(), lr=1e-3)
        trained(model, optimizer, 2)
        values.append(values_of(model, batch, validation, "monte_carlo", optimizer, **options))
    close(*values)


def test_bitsandbytes_optimizers_of_another_update_are_refused_by_name():
    import bitsandbytes

    model = wide()
    for option, value in {"max_unorm": 0.1, "skip_zeros": True, "percentile_clipping": 5, "block_wise": False}.items():
        optimizer = bitsandbytes.optim.AdamW8bit(model.parameters())
        setattr(optimizer.args, option, value)
        with pytest.raises(inrun.InRunError, match="got AdamW8bit"):
            inrun.track(model, optimizer)
    for kind, options in (("LAMB8bit", {}), ("AdEMAMix8bit", {}), ("Lion8bit", {})):
        optimizer = getattr(bitsandbytes.optim, kind)(model.parameters(), **options)
        with pytest.raises(inrun.InRunError, match=f"got {kind};"):
            inrun.track(model, optimizer)
    optimizer = bitsandbytes.optim.RMSprop(model.parameters(), lr=1e-3)
    with pytest.raises(inrun.InRunError, match=r"got RMSprop of bitsandbytes\.optim\.rmsprop\."):
        inrun.track(model, optimizer, "path")


@pytest.mark.parametrize("base", [object, torch.optim.SGD])
def test_deepspeeds_optimizers_are_refused(base):
    """Which are no torch.optim.Optimizer; accelerate's wrapper of them is one."""
    kind = type("DeepSpeedZeroOptimizer", (base,), {"__init__": lambda self: None})
    with pytest.raises(inrun.InRunError, match="got DeepSpeedZeroOptimizer, which holds parts of its own"):
        inrun.track(make("mlp"), kind())


@pytest.mark.filterwarnings("error:update")
@pytest.mark.parametrize("kind", ["Lion8bit", "PagedLion", "SGD8bit", "RMSprop8bit", "Adagrad8bit", "AdEMAMix8bit"])
def test_elementwise_optimizers_of_bitsandbytes_are_scored_by_their_own_steps(kind):
    import bitsandbytes

    model, batch, validation = wide(), data("gpt"), data("gpt", 4, 2)
    options = {"momentum": 0.9} if kind == "SGD8bit" else {}
    optimizer = getattr(bitsandbytes.optim, kind)(model.parameters(), lr=1e-3, **options)
    trained(model, optimizer, 2)
    losses, unmoved = {"validation": lambda: loss_of(model, *validation)}, copy.deepcopy(model)
    aside = getattr(bitsandbytes.optim, kind)(unmoved.parameters(), lr=1e-3, **options)
    aside.load_state_dict(optimizer.state_dict())
    for p in unmoved.parameters():
        p.grad = torch.zeros_like(p)
    aside.step()
    tracker = inrun.track(model, optimizer, "path_secant", validation=losses, update="elementwise")
    with tracker, tracker.step(range(B)) as step:
        loss_of(model, *batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    drop = (loss_of(unmoved, *validation) - loss_of(model, *validation)).item()
    assert step.values.sum().item() == pytest.approx(drop, rel=1e-2)


class Picky(torch.optim.Optimizer):
    """Knows of one dtype, as kernels do, once it has a state: 1 / count in codes of 8 bits for one in three rows."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["average"], state["codes"] = torch.zeros_like(p), torch.zeros(p.shape, dtype=torch.uint8)
                elif state["codes"].dtype != torch.uint8:
                    raise RuntimeError("codes")
                elif state["average"].dtype != torch.float32:
                    continue
                state["codes"] += 1
                state["average"].lerp_(p.grad, 0.1)
                p -= group["lr"] * state["average"]


def test_what_is_said_of_an_update_is_held_to_a_step_with_a_state_too():
    model, batch, validation = make("mlp"), data("mlp"), data("mlp", 4, 2)
    optimizer = Picky(model.parameters())
    tracker = inrun.track(
        model, optimizer, "path", validation=lambda: loss_of(model, *validation), update="elementwise"
    )

    def stepped():
        with tracker.step(range(B)) as step:
            loss_of(model, *batch).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step.values

    assert stepped().abs().min() > 0
    with pytest.warns(UserWarning, match=r"update: expected what the step adds.*got one of norm 0"):
        stepped()
