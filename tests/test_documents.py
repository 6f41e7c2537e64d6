"""Packed documents and single tokens: their values against float64 oracles that take one of them at a time."""

from __future__ import annotations

import copy
import itertools
import os
from types import SimpleNamespace

os.environ.setdefault("TORCHINDUCTOR_FORCE_DISABLE_CACHES", "1")

import pytest
import torch
import torch.nn.functional as F
from models import VOCAB, WIDTH, B, Scale, T, data, gradient, loss_of, make, oracle_values
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import inrun
from inrun import forward_mode, functional
from inrun.tap import Layout, Tap
from inrun_kernels import forms

LR = 0.3
OFFSETS = [0, 4, 5, 11, 11, 16, 18]  # of the documents of three rows of six tokens: over a row's end, and an empty one
ROWS = 3


class Packed(nn.Module):
    """Attention within a document only; norms over heads, a module with no rule, a tied head."""

    def __init__(self, checkpointing=None):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(T, WIDTH)
        self.norm, self.head_norm = nn.LayerNorm(WIDTH), nn.RMSNorm(WIDTH // 2)
        self.qkv, self.scale = nn.Linear(WIDTH, 3 * WIDTH), Scale(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)
        self.head.weight = self.tokens.weight
        self.checkpointing = checkpointing

    def embedded(self, x):
        return self.tokens(x)

    def attention(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, 2, WIDTH // 2).unbind(2)
        q, k, v = (z.transpose(1, 2) for z in (self.head_norm(q), self.head_norm(k), v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).reshape(x.shape)

    def forward(self, x, documents):
        mask = (documents[:, :, None] == documents[:, None, :]).tril()[:, None]
        h = self.embedded(x) + self.positions(torch.arange(x.shape[1])[None])
        if self.checkpointing is None:
            h = h + self.attention(h, mask)
        else:
            h = h + checkpoint(self.attention, h, mask, use_reentrant=self.checkpointing)
        return self.head(self.scale(h))


def packed_model(**options):
    torch.manual_seed(0)
    return Packed(**options)


def packed_data(rows=ROWS, seed=1):
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(VOCAB, (rows, T + 1), generator=g)
    return ids[:, :-1], ids[:, 1:]


def documents_of(offsets, tokens=T):
    lengths = torch.tensor(offsets).diff()
    return torch.arange(len(lengths)).repeat_interleave(lengths).view(-1, tokens)


def packed_loss(model, x, y, documents):
    return F.cross_entropy(model(x, documents).flatten(0, 1), y.flatten())


def validation_loss(model):
    x, y = packed_data(2, seed=5)
    return packed_loss(model, x, y, torch.zeros_like(x))


def document_oracle(model, offsets, x, y, loss=validation_loss):
    """`<lr * g_v, g_s>` of each document s, whose own loss terms alone make g_s."""
    model = copy.deepcopy(model).double()
    model.checkpointing = None
    params = [p for p in model.parameters() if p.requires_grad]
    directions = torch.autograd.grad(loss(model), params)
    documents, found = documents_of(offsets, x.shape[1]), []
    for s in range(len(offsets) - 1):
        terms = F.cross_entropy(model(x, documents).flatten(0, 1), y.flatten(), reduction="none")
        share = terms[documents.flatten() == s].sum() / y.numel()
        grads = torch.autograd.grad(share, params)
        found.append(LR * sum((d * g).sum() for d, g in zip(directions, grads, strict=True)))
    return torch.stack(found)


def close(found, expected, rtol=2e-4):
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=rtol * expected.abs().max().item())


def packed_step(model, method="first", losses=validation_loss, cuts=(0, ROWS), run=None, recompute=False, **options):
    """One tracked step over batches of rows `cuts[i]:cuts[i + 1]`, which must not cut a document."""
    x, y = packed_data()
    documents, run = documents_of(OFFSETS), model if run is None else run
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    if not isinstance(losses, dict):
        losses = {"validation": losses}
    validation = {name: lambda loss=loss: loss(model) for name, loss in losses.items()}
    tracker = inrun.track(model, optimizer, method, validation=validation, **options)
    for _ in range(1 if method == "path" else 2):  # the first step is the one with its sums checked
        before = copy.deepcopy(model)
        with tracker.step() as step:
            for low, high in itertools.pairwise(cuts):
                inside = [o for o in OFFSETS if low * T <= o <= high * T]
                segments = torch.tensor(inside) - low * T

                def loss(rows=slice(low, high)):
                    share = len(x[rows]) / len(x)
                    return packed_loss(run, x[rows], y[rows], documents[rows]) * share

                ids = [f"d{OFFSETS.index(o)}" for o in inside[:-1]]
                step.batch(ids, loss if recompute else None, segments=segments, tokens=T)
                loss().backward()
            optimizer.step()
            optimizer.zero_grad()
    tracker.close()
    return step, before, tracker


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_a_document_is_worth_what_it_is_alone(method, checkpointing):
    step, before, tracker = packed_step(packed_model(checkpointing=checkpointing), method)
    expected = document_oracle(before, OFFSETS, *packed_data())
    assert step.values.shape == (6,) and step.values[3] == 0
    close(step.values, expected)
    rows = tracker.ledger.rows().to_pylist()[-6:]
    assert [row["token"] for row in rows] == [None] * 6
    assert [row["value"] for row in rows] == pytest.approx(expected.tolist(), rel=1e-3, abs=1e-7)


class HeadsFirst(Packed):
    """Norms and projects what attention has transposed, `[B, heads, T, W]`, as Gemma 3 and DeepSeek-V3 do; and what is
    `[B, T, heads, W]` again. Looks two ids of each token up."""

    def __init__(self, heads=2):
        super().__init__()
        self.heads, self.low = heads, nn.Linear(WIDTH // heads, WIDTH // heads)
        self.head_norm, self.out = Scale(WIDTH // heads), nn.Linear(WIDTH // heads, WIDTH // heads)

    def embedded(self, x):
        return self.tokens(torch.stack((x, x * x % VOCAB), 2)).sum(2)

    def attention(self, x, mask):
        q, k, v = self.qkv(self.norm(x)).view(*x.shape[:2], 3, self.heads, -1).transpose(1, 3).unbind(2)
        q, k, v = self.head_norm(q), self.head_norm(k), self.low(v[:, :1]) + v
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)).reshape(x.shape)


@pytest.mark.parametrize("times", [1, 2])
@pytest.mark.parametrize("others", [[0, 10, 12], [0, 4, 12], [0, 2, 4, 12], [0, 6]])
def test_a_checkpoint_that_waits_for_its_backward_while_a_batch_that_lies_differently_comes_is_refused(others, times):
    """It would split its own documents as the next batch's lie."""

    def step_of(checkpointing):
        model = packed_model(checkpointing=checkpointing)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        tracker = inrun.track(model, optimizer, validation=lambda: packed_loss(model, *packed_data(1), first[:1]))
        with tracker.step() as step:
            losses = []
            for k, offsets in enumerate(([0, 4, 12], *[others] * times)):
                step.batch(range(len(offsets) - 1), segments=offsets, tokens=T)
                losses.append(packed_loss(model, *packed_data(offsets[-1] // T, seed=5 + k), documents_of(offsets)))
            sum(losses).backward()
            optimizer.step()
        return step.values

    first = documents_of([0, 6])
    expected = step_of(None)
    if others == [0, 4, 12]:
        torch.testing.assert_close(step_of(False), expected)
    else:
        with pytest.raises(inrun.InRunError, match=r"expected the backward of each batch before the next batch\(ids\)"):
            step_of(False)


@pytest.mark.parametrize("method", ["first", "path", "compiled", "recompute"])
def test_tokens_may_follow_the_heads(method):
    torch.manual_seed(0)
    model = HeadsFirst()
    run = torch.compile(model, backend="eager") if method == "compiled" else None
    options = {"recompute": True} if method == "recompute" else {}
    name = {"compiled": "first", "recompute": "path"}.get(method, method)
    step, before, tracker = packed_step(model, name, run=run, **options)
    close(step.values, document_oracle(before, OFFSETS, *packed_data()))
    assert {tap.name for tap in tracker.taps if tap.heads_first} == {"head_norm", "low"}


class Pairs(nn.Module):
    """Looks up two ids of each token with each, `[B, T, T, 2]`."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, x):
        pairs = x[:, :, None] * x[:, None]
        return self.table(torch.stack((pairs, pairs + 1), 3) % VOCAB).sum((2, 3))


@pytest.mark.parametrize("made", [lambda: nn.Sequential(nn.Embedding(VOCAB, T), nn.Linear(T, VOCAB)), Pairs])
def test_as_many_features_as_tokens_are_no_heads(made):
    torch.manual_seed(0)
    model, (x, y) = made(), packed_data()

    def values(tokens):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.SGD(copied.parameters(), lr=LR)
        tracker = inrun.track(copied, optimizer, validation=lambda: F.cross_entropy(copied(x).mT, y))
        with tracker.step(range(ROWS), tokens=tokens) as step:
            F.cross_entropy(copied(x).mT, y).backward()
            optimizer.step()
        return step.values

    close(values(T).sum(1), values(None).double())


def test_as_many_tokens_as_heads_are_refused_until_it_is_known_which_is_which():
    torch.manual_seed(0)
    model = HeadsFirst(heads=4).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x, y = packed_data()
    tracker = inrun.track(model, optimizer, validation=lambda: validation_loss(model))

    def step(tokens):
        before, offsets = copy.deepcopy(model), [0, 2, *range(tokens, (ROWS + 1) * tokens, tokens)]
        with tracker.step(range(ROWS + 1), segments=offsets, tokens=tokens) as step:
            packed_loss(model, x[:, :tokens], y[:, :tokens], documents_of(offsets, tokens)).backward()
            optimizer.step()
            optimizer.zero_grad()
        return step.values, document_oracle(before, offsets, x[:, :tokens], y[:, :tokens])

    with pytest.raises(inrun.InRunError, match=r"head_norm: expected one dimension of 4 tokens, got \(3, 4, 4, 2\)"):
        step(4)
    optimizer.zero_grad()
    for tokens in (6, 4):
        close(*step(tokens))


@pytest.mark.parametrize("method", ["first", "path"])
def test_documents_with_targets_accumulation_and_recomputing(method):
    def other(model):
        x, y = packed_data(1, seed=7)
        return packed_loss(model, x, y, torch.zeros_like(x))

    losses = {"a": validation_loss, "b": other}
    options = [{"cuts": (0, 3)}, *([{"recompute": True}] if method == "path" else [])]
    for each in options:
        step, before, _ = packed_step(packed_model(), method, losses, **each)
        expected = [document_oracle(before, OFFSETS, *packed_data(), loss) for loss in losses.values()]
        assert step.values.shape == (6, 2)
        close(step.values, torch.stack(expected, 1))


@pytest.mark.parametrize("form", ["two", "direct"])
def test_rows_in_batches_of_their_own(form, monkeypatch):
    monkeypatch.setattr(forms, "of_wgrad_dot", lambda *args: forms.Choice(form, {}, ""))
    x, y = packed_data()
    model, offsets = packed_model(), [[0, 2, 6], [0, 12]]
    whole = [0, 2, 6, 18]
    expected = document_oracle(model, whole, x, y)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: validation_loss(model))
    documents = documents_of(whole)
    with tracker.step() as step:
        for rows, part in zip((slice(0, 1), slice(1, 3)), offsets, strict=True):
            step.batch(range(len(part) - 1), segments=part, tokens=T)
            (packed_loss(model, x[rows], y[rows], documents[rows]) * len(x[rows]) / 3).backward()
        optimizer.step()
    close(step.values, expected)


def test_documents_under_a_compiler():
    torch._dynamo.reset()
    model = packed_model()
    model.scale = nn.RMSNorm(WIDTH)  # forward-mode rules leave the graph
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    step, before, _ = packed_step(model, run=compiled)
    close(step.values, document_oracle(before, OFFSETS, *packed_data()))


@pytest.mark.parametrize("kind", ["tokens", "segments"])
def test_a_graph_serves_all_lengths(kind):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(17, 8), nn.LayerNorm(8), nn.Linear(8, 17))
    optimizer, graphs = torch.optim.SGD(model.parameters(), lr=0.1), CompileCounterWithBackend("eager")
    tracker = inrun.track(model, optimizer, check=False)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=graphs)
    for rows, tokens in ((3, 4), (5, 7), (2, 9), (7, 6)):
        x = torch.randint(17, (rows, tokens))
        with tracker.validation():
            F.cross_entropy(model(x).flatten(0, 1), x.flatten()).backward()
        ids = range(rows) if kind == "tokens" else range(rows + 1)
        cuts = None if kind == "tokens" else [0, 1, *range(tokens, rows * tokens + 1, tokens)]
        with tracker.step(ids, tokens=tokens, segments=cuts) as step:
            F.cross_entropy(compiled(x).flatten(0, 1), x.flatten()).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert step.values.shape == ((rows, tokens) if kind == "tokens" else (rows + 1,))
    assert graphs.frame_count <= 2


class ByPosition(nn.Module):
    """A layer with parameters of its own at every position, so that autograd tells the positions apart."""

    def __init__(self, layer, tokens=T):
        super().__init__()
        self.at = nn.ModuleList(copy.deepcopy(layer) for _ in range(tokens))

    def forward(self, x):
        return torch.cat([layer(x[:, t : t + 1]) for t, layer in enumerate(self.at)], 1)


def token_oracle(model, directions, x, loss_of_row):
    """`<D, g>` of the pairs of input and output gradient at each token, `[B, T]`, one sample at a time in float64."""
    model = copy.deepcopy(model).double()
    names = {id(p): n for n, p in model.named_parameters()}
    split: list[tuple[ByPosition, list]] = []
    for path, layer in list(model.named_modules()):
        if next(layer.parameters(recurse=False), None) is not None:
            found = [directions[names[id(p)]] for p in layer.parameters()]
            split.append((ByPosition(layer), found))
            parent, _, local = path.rpartition(".")
            setattr(model.get_submodule(parent), local, split[-1][0])
    rows = []
    for b in range(len(x)):
        model.zero_grad()
        loss_of_row(model, b).backward()
        pairs = [[zip(layer.parameters(), d, strict=True) for layer in split_.at] for split_, d in split]
        rows.append([sum((p.grad * d).sum() for layer in pairs for p, d in layer[t] if p.grad is not None)
                     for t in range(T)])  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("name", ["gpt_tied", "gpt_untied", "reused"])
def test_a_token_is_worth_its_own_pairs(name, method):
    model = make(name)
    (x, y), validation = data(name), data(name, 4, 2)
    wide = x.double() if x.is_floating_point() else x

    def loss_of_row(model, b):
        return F.cross_entropy(model(wide[b : b + 1])[0], y[b], reduction="sum") / y.numel()

    directions = {n: LR * g for n, g in gradient(model, *validation).items()}
    expected = token_oracle(model, directions, x, loss_of_row)
    sums = oracle_values(model, lambda n, g: LR * g, (x, y), validation)
    close(expected.sum(1), sums, 1e-9)  # the oracles agree

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, *validation))
    with tracker.step(list("abcde"), tokens=T) as step:
        loss_of(model, x, y).backward()
        optimizer.step()
    assert step.values.shape == (B, T)
    close(step.values, expected)

    by_token = tracker.ledger.totals(per_token=True)
    assert by_token["token"].to_pylist() == [*range(T)] * B
    close(torch.tensor(by_token["value"].to_pylist()).view(B, T), expected)
    totals = tracker.ledger.totals()
    assert totals["count"].to_pylist() == [1] * B
    close(torch.tensor(totals["value"].to_pylist()), sums)


def test_tokens_with_several_targets_and_accumulation():
    model, optimizer = make("gpt_tied"), None
    x, y = data("gpt")
    losses = {n: (lambda v=v: loss_of(model, *v)) for n, v in (("a", data("gpt", 4, 2)), ("b", data("gpt", 3, 3)))}

    def loss_of_row(model, b):
        return F.cross_entropy(model(x[b : b + 1])[0], y[b], reduction="sum") / y.numel()

    expected = []
    for val in (data("gpt", 4, 2), data("gpt", 3, 3)):
        directions = {n: LR * g for n, g in gradient(model, *val).items()}
        expected.append(token_oracle(model, directions, x, loss_of_row))
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=losses)
    with tracker.step() as step:
        for part in (slice(0, 2), slice(2, B)):
            step.batch(range(B)[part], tokens=T)
            (loss_of(model, x[part], y[part]) * len(x[part]) / B).backward()
        optimizer.step()
    close(step.values, torch.stack(expected, 2))
    assert len(tracker.ledger) == B * T * 2


def test_a_layer_that_keeps_no_tokens_is_refused_by_name():
    for name, layer in (("loose", r"norm: expected its input and output to be \[B, T, ...\].*6 tokens"),
                        ("mlp", r"net\.0: .*B = 5 rows of T = 6 tokens.* got \(5, 8\)")):  # fmt: skip
        for method in ("first", "path"):
            model = make(name)
            x, y = data(name)
            optimizer = torch.optim.SGD(model.parameters(), lr=LR)
            tracker = inrun.track(model, optimizer, method, validation=lambda model=model, v=(x, y): loss_of(model, *v))
            with pytest.raises(inrun.InRunError, match=layer), tracker.step(range(B), tokens=T):
                loss_of(model, x, y).backward()
                optimizer.step()

    # A pooled input as wide as a row is long does not pass for tokens.
    head = nn.Linear(T, VOCAB)
    optimizer = torch.optim.SGD(head.parameters(), lr=LR)
    pooled, classes = torch.randn(B, T), torch.randint(VOCAB, (B,))
    tracker = inrun.track(head, optimizer, validation=lambda: loss_of(head, pooled, classes))
    with pytest.raises(inrun.InRunError, match=r"got \(5, 6\)"), tracker.step(range(B), tokens=T):
        loss_of(head, pooled, classes)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("kind, sizes", [(nn.Conv1d, (T, T, 1)), (nn.BatchNorm1d, (T,))])
def test_a_layer_that_does_not_go_token_by_token_is_refused(kind, sizes, method):
    """Even where its channels pass for tokens: its input is [B, C, L] with C = T."""
    model, x = nn.Sequential(kind(*sizes)), torch.randn(B, T, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x).square().mean())
    refused = pytest.raises(inrun.InRunError, match=rf"0 \({kind.__name__}\): expected a layer that goes token by")
    with refused, tracker.step(range(B), tokens=T):
        model(x).square().mean().backward()
        optimizer.step()


def test_outputs_of_tokens_first_are_not_cut_into_documents():
    """Of which there are as many."""
    module, layout = SimpleNamespace(_inrun=Tap("scale", None, None)), Layout(2, 6, torch.tensor([0, 4, 12]))
    assert forward_mode.by_sample(module, 0, torch.ones(2, 6, 3), layout).shape == (2, 6, 3)
    with pytest.raises(inrun.InRunError, match=r"scale: expected its input and output to be \[B, T, ...\]"):
        forward_mode.by_sample(module, 0, torch.ones(6, 2, 3), layout)


def test_the_sample_axis_of_a_recurrent_layers_states_is_the_second():
    for first in (False, True):
        axes = [forward_mode.sample_axis(nn.LSTM(2, 2, batch_first=first), leaf) for leaf in range(3)]
        assert axes == [0 if first else 1, 1, 1]


def test_bad_offsets_and_tokens_are_one_clear_error():
    model = packed_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: validation_loss(model))
    for segments, tokens, message in (
        ([0, 6], None, r"expected 3 integer offsets, one more than ids, got \(2,\)"),
        ([0.0, 1.0, 6.0], None, "float32"),
        ([0, 4, 3], None, r"never decrease, got \[0, 4, 3\]"),
        ([1, 4, 6], None, r"offsets from 0"),
        ([0, 4, 7], T, r"a multiple of 6 tokens .* got \[0, 4, 7\]"),
        (None, 0, r"tokens: expected an integer of at least 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            tracker.step(["a", "b"], segments=segments, tokens=tokens)
    with pytest.raises(ValueError, match="with their ids"):
        tracker.step(segments=[0, 6])
    x, y = packed_data()
    refused = pytest.raises(
        ValueError, match=r"B = 1, the number of sample ids or packed rows.* got \(3, 6\).* tokens= tells"
    )
    with refused, tracker.step(["a"], segments=[0, 18]):
        packed_loss(model, x, y, torch.zeros_like(x))
    with pytest.raises(inrun.InRunError, match="tokens: expected None as in"), tracker.step() as step:
        step.batch(["a"], segments=[0, 6])
        step.batch(["b"], tokens=T)


def test_second_derivatives_go_through_documents():
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 3, 4), torch.randn(5, 4), torch.randn(5)
    x, weight, bias = (t.double().requires_grad_() for t in (x, weight, bias))
    directions = (torch.randn(5, 4).double(), torch.randn(5).double())
    segments = torch.tensor([0, 2, 6])
    probe = torch.zeros(2, dtype=torch.float64, requires_grad=True)

    def dots(x, weight, bias):
        y = functional.linear(x, weight, bias, directions, probe, segments)
        return torch.autograd.grad(y.sin().sum(), probe, create_graph=True)[0]

    assert torch.autograd.gradcheck(dots, (x, weight, bias))
    with torch.no_grad():  # the written-out dots are the kernels'
        grads = F.linear(x, weight, bias).cos().flatten(0, 1)
    each = [(g.T @ a * directions[0]).sum() + (g @ directions[1]).sum()
            for g, a in zip(grads.split([2, 4]), x.flatten(0, 1).split([2, 4]), strict=True)]  # fmt: skip
    torch.testing.assert_close(dots(x, weight, bias), torch.stack(each))


@pytest.mark.parametrize("shape", [(16,), (4, 8), (2, 3)])
@pytest.mark.parametrize("missing", [None, 0, 1])
@pytest.mark.parametrize("directions", [(), (2,)])
def test_layer_norms_of_float32_score_documents_and_refuse_bad_offsets(shape, missing, directions):
    """As in float64, which has no kernel of its own."""
    generator = torch.Generator().manual_seed(0)
    x, out = (torch.randn(2, 6, *shape, generator=generator) for _ in range(2))
    weight, bias = (torch.randn(shape, generator=generator) for _ in range(2))
    pair = [torch.randn(*directions, *shape, generator=generator) for _ in range(2)]
    if missing is not None:
        pair[missing] = None

    def dots(dtype, segments):
        probe = torch.zeros(len(segments) - 1, *directions, dtype=dtype, requires_grad=True)
        known = [None if d is None else d.to(dtype) for d in pair]
        layer = (x.to(dtype).requires_grad_(), shape, weight.to(dtype).requires_grad_(), bias.to(dtype))
        y = functional.layer_norm(*layer, directions=tuple(known), probe=probe, segments=segments)
        (y * out.to(dtype)).sum().backward()
        return probe.grad.double()

    good = torch.tensor([0, 2, 2, 12])
    torch.testing.assert_close(dots(torch.float32, good), dots(torch.float64, good), rtol=1e-5, atol=1e-5)
    for bad in ([0, 10**9], [0, 3], [2, 12]):
        with pytest.raises(ValueError, match="segments: expected non-decreasing offsets from 0 to"):
            dots(torch.float32, torch.tensor(bad))
