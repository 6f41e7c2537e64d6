"""`nn.MultiheadAttention` with its rule: torch's own outputs and gradients, and the values of the float64 oracle."""

from __future__ import annotations

import contextlib
import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import inrun
from inrun import attention, path
from inrun.attention import AttentionRule, is_attention

B, L, S, E, HEADS, LR = 3, 4, 5, 8, 2, 0.01
CAUSAL = torch.ones(S, S).triu(1).bool()
PADDED = torch.arange(S) >= torch.tensor([[5], [3], [4]])
PER_HEAD = torch.arange(B * HEADS * S * S).view(B * HEADS, S, S) % 7 == 6

# How it is made; which of query, key and value are one tensor; how it is called.
CASES = {
    "self": ({}, "xxx", {}),
    "no weights": ({}, "xxx", {"need_weights": False}),
    "weights of each head": ({}, "xxx", {"average_attn_weights": False}),
    "keys are values": ({}, "qkk", {}),
    "queries are keys": ({}, "xxv", {}),
    "three inputs": ({"bias": False}, "qkv", {"need_weights": False}),
    "other widths": ({"kdim": 6, "vdim": 7}, "qkv", {}),
    "time first": ({"batch_first": False}, "xxx", {"need_weights": False}),
    "causal": ({}, "xxx", {"attn_mask": CAUSAL, "is_causal": True, "need_weights": False}),
    "causal and padded": ({}, "xxx", {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDED}),
    "causal and padded, no weights": (
        {},
        "xxx",
        {"attn_mask": CAUSAL, "is_causal": True, "key_padding_mask": PADDED, "need_weights": False},
    ),
    "a mask for each head": ({}, "xxx", {"attn_mask": PER_HEAD, "key_padding_mask": PADDED, "need_weights": False}),
    "added bias": ({"add_bias_kv": True}, "qkk", {}),  # by forward-mode AD, as is the next
    "added zeros": ({"add_zero_attn": True}, "qkk", {}),
}


class Attention(nn.Module):
    def __init__(self, made, call):
        super().__init__()
        self.attention, self.call = nn.MultiheadAttention(E, HEADS, **({"batch_first": True} | made)), call
        for p in self.parameters():
            nn.init.normal_(p, std=0.4)

    def forward(self, *inputs, rows=slice(None)):
        call = dict(self.call)
        if "key_padding_mask" in call:
            call["key_padding_mask"] = PADDED[rows]
        if "attn_mask" in call and call["attn_mask"].dim() == 3:
            call["attn_mask"] = PER_HEAD.unflatten(0, (B, HEADS))[rows].flatten(0, 1)
        return self.attention(*inputs, **call)


def data(made, kind, seed):
    g = torch.Generator().manual_seed(seed)
    widths = {"x": E, "q": E, "k": made.get("kdim", E), "v": made.get("vdim", E)}
    known = {n: torch.randn(B, L if n == "q" else S, widths[n], generator=g) for n in kind}
    if made.get("batch_first") is False:
        known = {n: x.transpose(0, 1) for n, x in known.items()}
    return [known[n] for n in kind]


def loss(model, inputs, rows=slice(None)):
    out, weights = model(*inputs, rows=rows)
    return out.square().sum() + (0 if weights is None else weights.square().sum())


@pytest.mark.parametrize("method", ["first", "path", "secant"])
@pytest.mark.parametrize("case", CASES)
def test_attention(case, method):
    made, kind, call = CASES[case]
    torch.manual_seed(0)
    model, train, validation = Attention(made, call), data(made, kind, 1), data(made, kind, 2)
    plain, double = copy.deepcopy(model), copy.deepcopy(model).double()
    params = list(double.parameters())
    wide = one_tensor([x.double() for x in validation], kind)
    ends = [torch.autograd.grad(loss(double, wide), params)]
    axis, gradients = 1 if made.get("batch_first") is False else 0, []
    for b in range(B):
        one = one_tensor([x.double().narrow(axis, b, 1) for x in train], kind)
        gradients.append(torch.autograd.grad(loss(double, one, slice(b, b + 1)), params))
    if method == "secant":
        with torch.no_grad():
            for p, *grads in zip(params, *gradients, strict=True):
                p.sub_(sum(grads), alpha=LR)
        ends.append(torch.autograd.grad(loss(double, wide), params))
    g_v = [sum(gs) / len(ends) for gs in zip(*ends, strict=True)]
    expected: list[Any] = [sum(LR * (d * g).sum() for d, g in zip(g_v, gs, strict=True)) for gs in gradients]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss(model, validation))
    known = "add_bias_kv" not in made and "add_zero_attn" not in made
    assert isinstance(model.attention, AttentionRule) == known
    with tracker.step(range(B)) as step:
        found = model(*train)
        loss(model, train).backward()
        loss(plain, train).backward()
        for name, p in plain.named_parameters():
            torch.testing.assert_close(dict(model.named_parameters())[name].grad, p.grad, rtol=1e-4, atol=1e-4)
        optimizer.step()
    torch.testing.assert_close(found, plain(*train))
    close(step.values, torch.stack(expected))


@pytest.mark.parametrize("case", ["self", "keys are values", "other widths"])
def test_squares_of_projections_are_those_of_single_samples(case, monkeypatch):
    """Which Adam's first step takes, as it turns."""
    (made, kind, call), found, step_squares = CASES[case], [], path.squares
    monkeypatch.setattr(path, "squares", lambda *a: found.append(step_squares(*a)) or found[-1])
    torch.manual_seed(0)
    model, train, validation = Attention(made, call), data(made, kind, 1), data(made, kind, 2)
    double, squared = copy.deepcopy(model).double(), []
    for b in range(B):
        one = one_tensor([x.double().narrow(0, b, 1) for x in train], kind)
        grads = torch.autograd.grad(loss(double, one), list(double.parameters()))
        squared.append([g.square() for g in grads])
    optimizer = torch.optim.Adam(model.parameters())
    tracker = inrun.track(model, optimizer, "path", validation=lambda: loss(model, validation))
    with tracker.step(range(B)):
        loss(model, train).backward()
        optimizer.step()
    for i, of_samples in enumerate(zip(*squared, strict=True)):
        close(found[0].of_slots[i], sum(of_samples))
    close(found[0].of_samples[0], torch.stack([sum(x.sum() for x in of_sample) for of_sample in squared]))


def close(found, expected):
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def one_tensor(inputs, kind):
    """Inputs of one name are one tensor again, after a copy."""
    return [inputs[kind.index(n)] for n in kind]


@pytest.mark.parametrize("method", ["first", "path"])
def test_documents_tokens_and_one_run(method, monkeypatch):
    """Documents packed into rows, each attending to itself, are worth what each is worth alone; tokens add up."""
    torch.manual_seed(0)
    ends, found = [0, 2, 6, 9, 12], []
    runs: list[str] = []
    x, x_val = torch.randn(2, 6, E), torch.randn(2, S, E)
    owner = torch.tensor([0, 0, 1, 1, 1, 1, 2, 2, 2, 3, 3, 3]).view(2, 6)
    mask = (owner[:, :, None] != owner[:, None, :]).repeat_interleave(HEADS, 0)
    model = nn.MultiheadAttention(E, HEADS, batch_first=True)
    for p in model.parameters():
        nn.init.normal_(p, std=0.4)
    double = copy.deepcopy(model).double()
    params = list(double.parameters())
    g_v = torch.autograd.grad(double(*[x_val.double()] * 3)[0].square().sum(), params)
    expected = []
    for a, b in itertools.pairwise(ends):
        one = x.double().flatten(0, 1)[None, a:b]
        grads = torch.autograd.grad(double(one, one, one)[0].square().sum(), params)
        expected.append(sum(LR * (d * g).sum() for d, g in zip(g_v, grads, strict=True)))
    for kind, name in ((F, "multi_head_attention_forward"), (attention, "_attend")):  # of validation, of the step
        whole = getattr(kind, name)
        monkeypatch.setattr(kind, name, lambda *a, f=whole, name=name, **k: runs.append(name) or f(*a, **k))
    for segments, count in ((torch.tensor(ends), 4), (None, 2)):
        again = copy.deepcopy(model)
        optimizer = torch.optim.SGD(again.parameters(), lr=LR)
        losses = lambda again=again: again(x_val, x_val, x_val)[0].square().sum()  # noqa: E731
        tracker = inrun.track(again, optimizer, method, validation=losses, check=False)  # which runs it more often
        with tracker.step(range(count), tokens=6, segments=segments) as step:
            again(x, x, x, attn_mask=mask)[0].square().sum().backward()
            optimizer.step()
        found.append(step.values)
    close(found[0], torch.stack(expected))
    assert found[1].shape == (2, 6) and runs == ["multi_head_attention_forward", "_attend"] * 2
    close(found[1].flatten()[owner.flatten() == 1].sum(), expected[1])


class Scaled(nn.MultiheadAttention):
    def forward(self, *args, **kwargs):
        out, weights = super().forward(*args, **kwargs)
        return 2 * out, weights


def test_a_forward_around_torchs_is_another_module():
    assert is_attention(nn.MultiheadAttention(E, HEADS)) and not is_attention(Scaled(E, HEADS))


def test_what_torch_refuses_and_an_input_without_samples_are_errors():
    model, x = nn.MultiheadAttention(E, HEADS, batch_first=True), torch.randn(B, S, E)
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR), validate_every=2)
    with tracker.validation():
        model(x, x, x)[0].square().sum().backward()
    with pytest.raises(RuntimeError, match="Need attn_mask"), tracker.step(range(B)):
        model(x, x, x, is_causal=True)
    one = x[0, :B]  # as many tokens as samples
    refused = pytest.raises(inrun.InRunError, match=r"expected a query with a batch axis, got \(3, 8\)")
    with refused, tracker.step(range(B)):
        model(one, one, one)


@pytest.mark.parametrize("train", [True, False])
def test_dropout_draws_what_torch_draws(train):
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(E, HEADS, dropout=0.5, batch_first=True).train(train), torch.randn(B, S, E)
    plain, optimizer = copy.deepcopy(model), torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x, x, x)[0].square().sum())
    with tracker.step(range(B)):
        for need_weights in (False, True):
            torch.manual_seed(1)
            found = model(x, x, x, need_weights=need_weights)
            torch.manual_seed(1)
            torch.testing.assert_close(found, plain(x, x, x, need_weights=need_weights))
        found[0].square().sum().backward()
        optimizer.step()


def test_half_of_it_frozen_and_a_direction_for_each_target():
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(E, HEADS, batch_first=True), torch.randn(B, S, E)
    model.in_proj_weight.requires_grad_(False)
    plain, optimizer = copy.deepcopy(model).double(), torch.optim.SGD(model.out_proj.parameters(), lr=LR)
    losses = {"a": lambda: model(x, x, x)[0].square().sum(), "b": lambda: model(x[:2], x[:2], x[:2])[0].sum()}
    tracker = inrun.track(model, optimizer, validation=losses, exclude=["in_proj_bias"])
    with tracker.step(range(B)) as step:
        model(x, x, x)[0].square().sum().backward()
        optimizer.step()
    params, wide = list(plain.out_proj.parameters()), x.double()
    ends = [plain(wide, wide, wide)[0].square().sum(), plain(wide[:2], wide[:2], wide[:2])[0].sum()]
    for m, end in enumerate(ends):
        g_v = torch.autograd.grad(end, params)
        for b in range(B):
            one = wide[b : b + 1]
            grads = torch.autograd.grad(plain(one, one, one)[0].square().sum(), params)
            expected = sum(LR * (d * g).sum() for d, g in zip(g_v, grads, strict=True))
            torch.testing.assert_close(step.values[b, m].double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("frozen", ["in_proj", "out_proj"])
def test_pairs_within_the_batch_with_half_of_it_frozen(frozen):
    torch.manual_seed(0)
    model, x = nn.MultiheadAttention(E, HEADS, batch_first=True), torch.randn(B + 2, S, E)
    for name, p in model.named_parameters():
        nn.init.normal_(p, std=0.4).requires_grad_(not name.startswith(frozen))
    double = copy.deepcopy(model).double()
    params = [p for p in double.parameters() if p.requires_grad]
    gradients = []
    for one in x.double()[:, None]:
        loss = double(one, one * 2, one * 3)[0].square().sum()
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=LR)
    tracker = inrun.track(model, optimizer, pairwise=["a", "b"], validation="batch")
    with tracker.step(range(B)) as step:
        model(x, x * 2, x * 3)[0].square().sum().backward()
        optimizer.step()
    close(step.values, LR * torch.stack(gradients[:B]) @ torch.stack(gradients[B:]).T)


class Tower(nn.Module):
    """Parameters of its own, and attention inside."""

    def __init__(self):
        super().__init__()
        self.token, self.out = (nn.Parameter(torch.randn(shape)) for shape in ((1, 1, E), (E, 3)))
        self.block = nn.TransformerEncoderLayer(E, HEADS, 2 * E, 0.0, batch_first=True)

    def forward(self, x):
        return self.block(torch.cat([self.token.expand(len(x), -1, -1), x], 1))[:, 0] @ self.out


class Contrastive(nn.Module):
    """Returns `[B, B]`, each sample's rows times every other's, as CLIP does."""

    def __init__(self):
        super().__init__()
        self.one, self.other = Tower(), Tower()
        self.scale, self.shift = nn.Parameter(torch.tensor(0.5)), nn.Parameter(torch.tensor([0.1]))

    def forward(self, x):
        return self.matched(self.one(x), self.other(2 * x))

    def matched(self, one, other):
        return self.scale.exp() * one @ other.T + self.shift


@pytest.mark.parametrize("named", ["0.block.self_attn.in_proj*", "0.block.self_attn.out*"])
def test_an_attention_of_which_a_part_is_named_goes_there_whole(named):
    torch.manual_seed(0)
    start, x = nn.Sequential(Tower(), nn.Linear(3, 2)), torch.randn(B, S, E)
    found = []
    for through in (None, {named: "0"}):
        model = copy.deepcopy(start)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        tracker = inrun.track(model, optimizer, through=through)
        with tracker.validation():
            model(x + 1).square().mean().backward()
        with tracker.step(range(B)) as step:
            model(x).square().mean().backward()
            optimizer.step()
        found.append(step.values.double())
        assert all(tap.parameters for tap in tracker.taps)
    close(found[1], found[0])


def test_an_attention_of_which_a_part_is_named_goes_there_without_others():
    taps = []
    for through in ({}, {"0.block.self_attn.in_proj*": "0"}):
        tracker = inrun.track(nn.Sequential(Tower(), Tower()), through=through)
        taps.append({tap.name: tap.parameters for tap in tracker.taps if tap.name.startswith("1")})
    assert taps[0] == taps[1]


class Tied(nn.Module):
    """Positions of its own, attention, and a head that is the embedding's weight."""

    def __init__(self):
        super().__init__()
        self.position, self.embed = nn.Parameter(torch.randn(S, E)), nn.Embedding(7, E)
        self.attention = nn.MultiheadAttention(E, HEADS, batch_first=True)

    def forward(self, ids):
        x = self.embed(ids) + self.position
        return F.linear(x + self.attention(x, x, x, need_weights=False)[0], self.embed.weight)


@pytest.mark.parametrize("method", ["first", "path"])
def test_an_attention_within_what_uses_a_childs_weight_keeps_its_rule(method):
    torch.manual_seed(0)
    model, ids, held = Tied(), torch.randint(7, (B, S)), torch.randint(7, (B, S))
    classes, double = [type(m) for m in model.modules()], copy.deepcopy(model).double()
    gradient = lambda x: torch.autograd.grad(double(x).square().sum(), list(double.parameters()))  # noqa: E731
    direction = gradient(held)
    expected = [sum((LR * g * d).sum() for g, d in zip(gradient(x), direction, strict=True)) for x in ids.split(1)]
    tracker = inrun.track(model, optimizer := torch.optim.SGD(model.parameters(), lr=LR), method)
    assert {tap.name: len(tap.parameters) for tap in tracker.taps} == {"": 2, "attention": 4}
    with tracker.validation():
        model(held).square().sum().backward()
    with tracker.step(range(B)) as step:
        model(ids).square().sum().backward()
        copied = copy.deepcopy(model)
        optimizer.step()
    close(step.values, torch.stack(expected))
    tracker.close()
    assert [type(m) for m in copied.modules()] == [type(m) for m in model.modules()] == classes
    inrun.track(model, optimizer).close()


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_number_of_the_models_own_leaves_what_is_inside_its_own_rows(method, compiled):
    """A sample's are its rows of each tower; of the numbers, for which there are no others, the rows of the logits."""
    torch.manual_seed(0)
    model, x, held = Contrastive().double(), torch.randn(B, S, E).double(), torch.randn(B + 1, S, E).double()
    params = list(model.parameters())
    loss = lambda logits: F.cross_entropy(logits, torch.arange(len(logits)))  # noqa: E731
    direction = torch.autograd.grad(loss(model(held)), params)
    rows = [tower(y).detach().requires_grad_() for tower, y in ((model.one, x), (model.other, 2 * x))]
    grads = torch.autograd.grad(loss(model.matched(*rows)), rows)
    expected = []
    for z in range(B):
        own = (model.one(x[z : z + 1]) * grads[0][z]).sum() + (model.other(2 * x[z : z + 1]) * grads[1][z]).sum()
        of_logits = F.cross_entropy(model.matched(*(r.detach() for r in rows))[z : z + 1], torch.tensor([z])) / B
        found = torch.autograd.grad(own + of_logits, params)
        expected.append(sum((LR * g * d).sum() for g, d in zip(found, direction, strict=True)))
    run = torch.compile(model, backend="aot_eager") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method)
    with tracker.validation():
        loss(run(held)).backward()
    with tracker.step(range(B)) as step:
        loss(run(x)).backward()
        optimizer.step()
    close(step.values, torch.stack(expected))
    assert {tap.name for tap in tracker.taps if tap.forward_mode} == {"", "one", "other"}


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_follows_sees_the_memory_that_it_sees_untracked(batch_first):
    """A dropout draws its numbers as they lie there, and a view may need them so."""
    torch.manual_seed(0)
    layer = nn.MultiheadAttention(E, HEADS, batch_first=batch_first)
    x = torch.randn(B, S, E) if batch_first else torch.randn(S, B, E)
    tracked = nn.Sequential(copy.deepcopy(layer))
    inrun.track(tracked, torch.optim.SGD(tracked.parameters(), lr=LR))
    for need_weights in (True, False):
        expected, found = (each(x, x, x, need_weights=need_weights)[0] for each in (layer, tracked[0]))
        assert found.stride() == expected.stride()
        torch.manual_seed(1)
        dropped = F.dropout(expected)
        torch.manual_seed(1)
        torch.testing.assert_close(F.dropout(found), dropped)


class Translator(nn.Module):
    """`[B, S, E]` -> `[B, L, E]`, by torch's transformer, whose halves end with a norm, given tokens first or not."""

    def __init__(self, batch_first, dropout=0.0, norm_first=False):
        super().__init__()
        sizes = {"d_model": E, "nhead": HEADS, "num_encoder_layers": 1, "num_decoder_layers": 1, "dim_feedforward": 9}
        self.inner = nn.Transformer(**sizes, dropout=dropout, batch_first=batch_first, norm_first=norm_first)
        self.batch_first = batch_first

    def forward(self, x):
        inputs = [x, x[:, :L].cos()]
        out = self.inner(*inputs if self.batch_first else [i.transpose(0, 1) for i in inputs])
        return out if self.batch_first else out.transpose(0, 1)


@pytest.mark.parametrize(
    ("how", "batch"),
    [("compiled", S), *itertools.product(["first", "path", "norm first", "nested", "checkpointed"], [B, S])],
)
def test_transformers_that_are_given_tokens_first(how, batch):
    """As torch's are by default; where there are as many tokens as samples too."""
    found = []
    for batch_first in (True, False):
        torch.manual_seed(0)
        model = Translator(batch_first, norm_first=how == "norm first").double()
        if how == "nested":  # as adapters are
            model.inner.encoder.layers[0].linear2 = nn.Sequential(nn.Linear(9, 2), nn.Linear(2, E)).double()
        x, held = torch.randn(batch, S, E).double(), torch.randn(B + 1, S, E).double()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        run = torch.compile(model, backend="eager") if how == "compiled" else model
        if how == "checkpointed":
            run = lambda x, model=model: checkpoint(model, x, use_reentrant=False)  # noqa: E731
        tracker = inrun.track(model, optimizer, "path" if how == "path" else "first")
        with tracker.validation():
            run(held).square().mean().backward()
        with tracker.step(range(batch)) as step:
            run(x).square().mean().backward()
            optimizer.step()
        assert not any(tap.forward_mode for tap in tracker.taps)
        found.append((step.values.double(), *model.parameters()))
    for one, other in zip(*found, strict=True):
        close(one, other.detach())


def test_dropout_of_transformers_that_are_given_tokens_first_is_as_untracked():
    torch.manual_seed(0)
    model, x = Translator(False, dropout=0.4), torch.randn(B, S, E)
    plain, outs = copy.deepcopy(model), []
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with inrun.track(model, optimizer, validation=lambda: model(x + 1).square().mean()) as tracker:
        for one in (model, plain):
            with tracker.step(range(B)) if one is model else contextlib.nullcontext():
                torch.manual_seed(1)
                outs.append(one(x))
                outs[-1].square().mean().backward()
                if one is model:
                    optimizer.step()
    torch.testing.assert_close(*outs)
