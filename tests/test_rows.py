"""Rows that only look like a batch's samples, and what is proposed for layers whose rows are none."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import math
import pickle
import random
import re
import warnings
import weakref
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import inrun
from inrun.remedies import as_code
from inrun.shared import require_in_range as in_range

B, T, WIDTH, LR = 4, 4, 6, 0.1  # as many tokens as samples


class TokensFirst(nn.Module):
    """Layers that are given `[T, B, W]`."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)
        self.blocks = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x).transpose(0, 1)
        for block in self.blocks:
            h = block(h).tanh()
        return self.head(h.transpose(0, 1).cumsum(1))


class RelativePositions(nn.Module):
    """An embedding that is given distances, `[T, T]`."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.distance, self.head = nn.Embedding(11, WIDTH), nn.Embedding(2 * T, 1), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device)
        bias = self.distance(places[:, None] - places + T).squeeze(-1)
        return self.head(bias.softmax(-1) @ self.token(x))


class Remembering(nn.Module):
    """Torch's attention over as many memories as there are samples, which all of them see."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.register_buffer("memories", torch.randn(B, 3, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        seen = self.attention(self.memories, self.memories, self.memories)[0]
        return self.head(self.token(x) * seen.mean((0, 1)))


class Depths(nn.Module):
    """What each of B layers returns, stacked, beside the last one's; held by a parameter of the module's own."""

    def __init__(self) -> None:
        super().__init__()
        self.scales, self.token = nn.Parameter(torch.rand(B, WIDTH)), nn.Embedding(11, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        found = [self.token(x)]
        for scale in self.scales:
            found.append((found[-1] * scale).tanh())
        return found[-1], torch.stack(found[1:])


class Around(nn.Module):
    def __init__(self, which: int) -> None:
        super().__init__()
        self.depths, self.head, self.which = Depths(), nn.Linear(WIDTH, 2), which

    def forward(self, x: Tensor) -> Tensor:
        out = self.depths(x)[self.which]
        return self.head(out if self.which == 0 else out.mean(0))


class Learned(nn.Module):
    """As many learned queries as samples, which a layer projects."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.queries, self.head = (nn.Embedding(11, WIDTH), nn.Embedding(B, WIDTH), nn.Linear(WIDTH, 2))
        self.query = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h, q = self.token(x), self.query(self.queries.weight.detach())
        return self.head((q @ h.mT).softmax(-1) @ h)


def loss_of(model: nn.Module, x: Tensor) -> Tensor:
    return model(x).square().mean()


def ids(size: int, seed: int, tokens: int = T) -> Tensor:
    return torch.randint(11, (size, tokens), generator=torch.Generator().manual_seed(seed))


def made(kind: Any, *args: Any) -> nn.Module:
    torch.manual_seed(0)
    return kind(*args).double()


def expected(model: nn.Module, x: Tensor) -> Tensor:
    """A sample's gradient times the validation gradient, one sample at a time."""
    params = list(model.parameters())
    target = torch.autograd.grad(loss_of(model, ids(3, 2)), params, allow_unused=True)
    rows = [torch.autograd.grad(loss_of(model, row[None]), params, allow_unused=True) for row in x]
    pairs = [[(g, t) for g, t in zip(row, target, strict=True) if g is not None and t is not None] for row in rows]
    return torch.stack([sum((g * t).sum() for g, t in pair) for pair in pairs]) * LR / len(x)  # pyright: ignore


def step(model: nn.Module, x: Tensor, method: str = "first", **options: Any) -> Tensor:
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    held = ids(3, 2)
    if method == "pairwise":
        method, options, held = "first", {"pairwise": range(B), **options}, ids(B, 2)
    with inrun.track(model, optimizer, method, validation=lambda: loss_of(model, held), **options) as tracker:
        with tracker.step(range(len(x))) as taken:
            loss_of(model, x).backward()
            optimizer.step()
        return taken.values.double()


def proposed(error: Any) -> dict[str, str]:
    """What the error's note would have tracked."""
    (note,) = error.value.__notes__
    return eval(re.search(r"through=(.*)\)$", note)[1])  # pyright: ignore - what a user pastes


PROPOSED = {
    TokensFirst: {"blocks.*": ""},
    RelativePositions: {"distance.*": ""},
    Remembering: {"attention.*": ""},
    Learned: {"query.*": ""},
}


@pytest.mark.parametrize("method", ["first", "path", "pairwise", "monte_carlo"])
@pytest.mark.parametrize("kind", PROPOSED)
def test_as_many_rows_as_samples_that_are_something_else_are_refused(kind, method):
    """And what the error proposes scores them."""
    model, x = made(kind), ids(B, 1)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(
        inrun.InRunError, match=r"expected the samples at dimension 0; got 4 rows, .* still when"
    ) as error:
        step(model, x, method)
    assert proposed(error) == PROPOSED[kind]
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items() if name in before)
    if method in ("first", "path"):
        model = made(kind)
        want = expected(model, x)
        torch.testing.assert_close(step(model, x, method, through=proposed(error)), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["first", "path"])
def test_they_are_in_a_reentrant_checkpoint_too(method):
    """Its outputs have no gradient at first."""

    class Checkpointed(TokensFirst):
        def inner(self, h: Tensor) -> Tensor:
            for block in self.blocks:
                h = block(h).tanh()
            return h

        def forward(self, x: Tensor) -> Tensor:
            h = checkpoint(self.inner, self.token(x).transpose(0, 1), use_reentrant=True)
            return self.head(h.transpose(0, 1).cumsum(1))

    with pytest.raises(inrun.InRunError, match=r"blocks.0 .* got 4 rows, .* still when") as error:
        step(made(Checkpointed), ids(B, 1), method)
    assert proposed(error) == PROPOSED[TokensFirst]


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("kind", [TokensFirst, RelativePositions])
def test_other_sizes_are_errors_that_propose_the_same(kind, method):
    with pytest.raises(ValueError, match=r"(blocks.0|distance): input: expected shape") as error:
        step(made(kind), ids(B + 1, 1), method)
    assert proposed(error) == PROPOSED[kind]
    with pytest.raises(ValueError, match="input: expected shape") as error:
        step(made(kind), ids(B + 1, 1), method, through={"head.*": ""})
    assert proposed(error) == {"head.*": "", **PROPOSED[kind]}


class Steps(nn.Module):
    """An embedding of single numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.step, self.head = nn.Embedding(11, WIDTH), nn.Embedding(3, WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for k in range(3):
            h = (h + self.step(torch.tensor(k))).tanh()
        return self.head(h)


class Positions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(11, WIDTH), nn.Embedding(32, WIDTH)
        self.head = nn.Linear(WIDTH, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head((self.embed(x) + self.positions(torch.arange(x.shape[1]))).tanh())


class Mapped(nn.Module):
    """Samples one by one, beside a parameter that no module holds alone."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale, self.head = nn.Parameter(torch.rand(WIDTH)), nn.Linear(WIDTH, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.vmap(lambda one: self.inner(one * self.scale).tanh())(self.embed(x)))


class Picks(nn.Module):
    """Where ids are 0, as masked tokens are."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).cumsum(1).tanh()[x == 0])


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize(("two", "none"), [(0, 1), (1, 2), (1, 0), (B - 1, 0), (B - 1, 1), (0, B - 1)])
def test_tokens_that_are_picked_are_no_samples_though_as_many(two, none, method):
    """Two of a sample, none of another, and one of each other."""
    model, x = made(Picks), ids(B, 1).clamp(min=1)
    x[:, 1] = x[two, 0] = 0
    x[none, 1] = 1
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x).square().mean())
    with pytest.raises(inrun.InRunError, match="head"), tracker.step(range(B)):
        model(x).square().mean().backward()
        optimizer.step()


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight).tanh()


class MappedLoose(nn.Module):
    """A module without a rule, for samples one by one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.inner, self.head = nn.Embedding(11, WIDTH), Loose(), nn.Linear(WIDTH, 11)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.vmap(self.inner)(self.embed(x)))


class Biases(nn.Module):
    """The same small net of positions in every block, whose rows are picked."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11)
        self.nets = nn.ModuleList(nn.Sequential(nn.Linear(1, 4), nn.ReLU(), nn.Linear(4, WIDTH)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for net in self.nets:
            table = net(torch.linspace(0, 1, x.shape[1], dtype=h.dtype)[None, :, None])
            h = (h + table.view(-1, WIDTH)[torch.arange(x.shape[1]).flip(0)]).tanh()
        return self.head(h)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize(
    "kind, layer",
    [(Steps, "step.*"), (Positions, "positions.*"), (Mapped, "inner.*"), (MappedLoose, "inner.*"), (Biases, "nets.*")],
)
def test_what_is_no_batch_proposes_a_module_that_is_given_one(kind, layer, method):
    """As many tokens as samples."""
    model, x = made(kind), ids(B, 1)
    want = expected(model, x)
    with pytest.raises((inrun.InRunError, ValueError)) as error:
        step(model, x, method)
    through = proposed(error)
    assert layer in through
    torch.testing.assert_close(step(kind().double(), x, method, through=through).shape, want.shape)
    torch.testing.assert_close(step(made(kind), x, method, through=through), want, rtol=1e-5, atol=1e-9)


class LossAlone(TokensFirst):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).square().mean()


@pytest.mark.parametrize("size", [B, B + 1])
def test_a_model_that_returns_no_samples_is_asked_to(size):
    with pytest.raises((inrun.InRunError, ValueError), match=r"blocks.0.*expected") as error:
        step(made(LossAlone), ids(size, 1))
    (note,) = error.value.__notes__
    assert "No module around blocks.0 returns [B, ...], nor does the model: let it return" in note


@pytest.mark.parametrize("method", ["first", "path"])
def test_one_id_too_few_is_not_taken_for_a_model_that_returns_no_samples(method):
    model = nn.Sequential(nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11))
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=0.1), method)
    with tracker.validation():
        loss_of(model, ids(B, 1)).backward()
    with pytest.raises(ValueError, match=f"B = {B - 1}, the number of sample ids") as error, tracker.step(range(B - 1)):
        loss_of(model, ids(B, 1, T + 3))
    assert error.value.__notes__ == [
        f"No input of the model has {B - 1} rows: expected an id for each sample it is given"
    ]


class Encoder(TokensFirst):
    """Is not called itself; or with what cannot be cut."""

    def encode(self, x: Tensor) -> Tensor:
        return super().forward(x)

    def forward(self, x: Tensor, sizes: list[int]) -> Tensor:
        assert len(sizes) == len(x)
        return self.encode(x)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("called", [False, True])
def test_one_is_told_where_nothing_tells(method, called):
    """At other sizes nothing need be said."""
    for tokens, turned in ((T, True), (T, False), (T + 1, False)):
        model = made(Encoder)
        if not turned:
            model.encode = lambda x, model=model: model.head(model.token(x))
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)

        def loss(x: Tensor, model: Any = model) -> Tensor:
            return (model(x, [1] * len(x)) if called else model.encode(x)).square().mean()

        told = pytest.warns(UserWarning, match=r"head \(4, 4, 2\), token \(4, 4, 6\): dimension 0 is taken for")
        tracker = inrun.track(model, optimizer, method, validation=lambda loss=loss, n=tokens: loss(ids(3, 2, n)))
        for t in range(2):
            expected = told if t == 0 and tokens == B else contextlib.nullcontext()
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                with expected, tracker.step(range(B)):
                    loss(ids(B, 1, tokens)).backward()
                    optimizer.step()
                    optimizer.zero_grad()


class LossOf(nn.Module):
    """Its own output is a loss, so that loops call the model inside."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x).square().mean()


@pytest.mark.parametrize("size", [B, B + 1])
@pytest.mark.parametrize("method", ["first", "path"])
def test_a_module_that_is_called_in_the_models_place_is_checked_as_it_is(method, size):
    """And what the error proposes scores it."""

    def values(through: dict[str, str]) -> Tensor:
        model = LossOf(made(RelativePositions))
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        held = lambda: loss_of(model.net, ids(3, 2))  # noqa: E731
        tracker = inrun.track(model, optimizer, method, validation=held, through=through)
        with tracker.step(range(size)) as taken:
            loss_of(model.net, ids(size, 1)).backward()
            optimizer.step()
        return taken.values.double()

    with pytest.raises((inrun.InRunError, ValueError), match=r"distance.*expected") as error:
        values({})
    assert proposed(error) == {"net.distance.*": "net"}
    want = expected(made(RelativePositions), ids(size, 1))
    torch.testing.assert_close(values(proposed(error)), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("method", ["first", "path"])
def test_of_modules_that_are_called_the_first_that_is_given_samples_is_checked(method, before):
    model = LossOf(made(RelativePositions))
    model.other = nn.Linear(2, 2).double()

    def loss(x: Tensor) -> Tensor:
        if before:  # without samples
            start = model.other(torch.ones(1, 1, 2).double())
            return (model.net(x) + start).square().mean()
        return model.other(model.net(x)).square().mean()

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss(ids(3, 2)))
    with pytest.raises(inrun.InRunError, match=r"distance.*as many still"), tracker.step(range(B)):
        loss(ids(B, 1)).backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["first", "path"])
def test_the_tokens_of_one_sample_may_be_what_a_module_is_called_with(method):
    """In the model's place: nothing else says what its rows are."""
    model = LossOf(nn.Linear(WIDTH, 2)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    x = torch.randn(2, T, WIDTH, generator=torch.Generator().manual_seed(1)).double()
    grad, target = (torch.autograd.grad(model(each), list(model.parameters())) for each in x)
    want = LR * torch.stack([(g * t).sum() for g, t in zip(grad, target, strict=True)]).sum()
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x[1]))
    with tracker.step([0]) as taken:
        model.net(x[0]).square().mean().backward()
        optimizer.step()
    torch.testing.assert_close(taken.values.double(), want[None], rtol=1e-5, atol=1e-9)


class FromEmbeddings(nn.Module):
    """May be given embeddings in the place of ids; its head is given flattened tokens."""

    def __init__(self, relative: bool) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)
        self.distance = nn.Embedding(2 * T, 1) if relative else None

    def forward(self, x: Tensor) -> Tensor:
        h = x if x.is_floating_point() else self.token(x)
        if self.distance is not None:
            places = torch.arange(h.shape[1])
            h = self.distance(places[:, None] - places + T).squeeze(-1).softmax(-1) @ h
        else:
            h = h + self.token(torch.arange(B + 1)[:, None]).detach().mean((0, 1))  # its first call within this one
        return self.head(h.flatten(0, 1)).tanh().view(*h.shape[:2], 2)


@pytest.mark.parametrize("method", ["first", "path"])
def test_the_model_is_checked_where_a_module_of_it_is_called_before_it(method):
    """As its embeddings'."""

    def values(model: nn.Module, size: int) -> Tensor:
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, ids(3, 2)))
        with tracker.step(range(size)) as taken:
            loss_of(model, model.token(ids(size, 1))).backward()
            optimizer.step()
        return taken.values.double()

    with pytest.raises(inrun.InRunError, match=r"distance.*as many still when the model's input had one sample more"):
        values(made(FromEmbeddings, True), B)
    want = expected(made(FromEmbeddings, False), ids(B + 1, 1))
    torch.testing.assert_close(values(made(FromEmbeddings, False), B + 1), want, rtol=1e-5, atol=1e-9)


def test_a_model_whose_input_has_the_samples_at_dimension_1_is_to_be_held_in_one_that_has_not():
    model, x = made(TokensFirst), ids(T + 1, 1, B)
    tracker = inrun.track(
        model, torch.optim.SGD(model.parameters(), lr=LR), validation=lambda: loss_of(model, ids(3, 2))
    )
    with pytest.raises(ValueError, match="token: input: expected shape") as error, tracker.step(range(B)):
        loss_of(model, x)
    (note,) = error.value.__notes__
    assert "samples at dimension 1: hold the model in a module that takes and returns [B, ...]" in note


class Packed(nn.Module):
    """Is given the tokens of one sample, `[T]`, and puts the sample axis in front itself."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) if x.dim() > 1 else self.token(x)[None]
        batch, tokens, width = h.shape
        return self.head(h.cumsum(1).tanh().view(batch, tokens, width))


@pytest.mark.parametrize("documents", [False, True])
@pytest.mark.parametrize("method", ["first", "path"])
def test_the_tokens_of_one_sample_are_looked_up_as_without_a_tracker(method, documents):
    model = made(Packed)
    want = torch.cat([expected(model, ids(2, 1)[[i]]) for i in range(2)]) / 2
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, ids(3, 2)))
    with tracker.step() as taken:
        for i, x in enumerate(ids(2, 1)):
            if documents:
                taken.batch([2 * i, 2 * i + 1], segments=[0, 1, T])
            else:
                taken.batch([i])
            (loss_of(model, x) / 2).backward()
        optimizer.step()
    found = taken.values.double().view(2, -1).sum(1)
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-9)


class TokenMajor(TokensFirst):
    """Its tokens are flattened in another order than sample after sample."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x).transpose(0, 1).flatten(0, 1)
        for block in self.blocks:
            h = block(h).tanh()
        return self.head(h.view(x.shape[1], len(x), WIDTH).transpose(0, 1).cumsum(1))


@pytest.mark.parametrize("method", ["first", "path"])
def test_tokens_in_another_order_are_scored_by_what_is_proposed(method):
    x = ids(B + 1, 1)
    with pytest.raises(inrun.InRunError, match=r"blocks.0: .* rows did not move on") as error:
        step(made(TokenMajor), x, method)
    assert proposed(error) == PROPOSED[TokensFirst]
    model = made(TokenMajor)
    want = expected(model, x)
    torch.testing.assert_close(step(model, x, method, through=proposed(error)), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("size", [B, B + 1])
def test_outputs_that_are_not_the_samples_may_be_there_unused(method, size):
    model, x = made(Around, 0), ids(size, 1)
    want = expected(model, x)
    torch.testing.assert_close(step(model, x, method), want, rtol=1e-5, atol=1e-9)
    with pytest.raises(inrun.InRunError, match=r"depths.*(expected every output|expected the samples)") as error:
        step(made(Around, 1), x, method)
    assert proposed(error) == {"depths.*": ""}
    model = made(Around, 1)
    want = expected(model, x)
    torch.testing.assert_close(step(model, x, method, through=proposed(error)), want, rtol=1e-5, atol=1e-9)


class Patches(nn.Module):
    """Images' patches are given flattened, with how many each has; a model of text beside them."""

    def __init__(self) -> None:
        super().__init__()
        self.vision = nn.Sequential(nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH))
        self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, pixels: Tensor, counts: Tensor) -> Tensor:
        seen = [one.mean(0) for one in self.vision(pixels).split(counts.tolist())]
        return self.head(self.token(x) + torch.stack(seen)[:, None])


def test_flattened_inputs_are_cut_too():
    model, optimizer = (m := made(Patches)), torch.optim.SGD(m.parameters(), lr=LR)
    x, counts = ids(B, 1), torch.tensor([5, 2, 7, 6])
    pixels = torch.randn(20, 3, dtype=torch.float64)
    with inrun.track(model, optimizer) as tracker:
        with tracker.validation():
            model(x, pixels, counts).square().mean().backward()
        with pytest.raises(ValueError, match="input: expected shape") as error, tracker.step(range(B)):
            model(x, pixels, counts)
    assert proposed(error) == {"vision.0.*": "", "vision.2.*": ""}  # of uneven samples too
    counts = torch.tensor([5, 5, 5, 5])
    with inrun.track(model, optimizer) as tracker:
        with tracker.validation():
            model(x, pixels, counts).square().mean().backward()
        with pytest.raises(ValueError, match="input: expected shape") as error, tracker.step(range(B)):
            model(x, pixels, counts)
    assert proposed(error) == {"vision.0.*": "", "vision.2.*": ""}


class Images(Patches):
    """A sample may have several images, or none."""

    def forward(self, x: Tensor, pixels: Tensor, counts: Tensor, mask: Tensor | None = None) -> Tensor:
        seen = self.vision(pixels) if mask is None else self.vision(pixels) * mask[:, None]
        return self.head(self.token(x) + torch.stack([one.sum(0) for one in seen.split(counts.tolist())])[:, None])


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize(("counts", "refused"), [([2, 0, 1, 1], True), ([1, 0, 1, 2], True), ([1, 1, 1, 1], False)])
def test_as_many_images_as_samples_may_be_several_of_some_and_none_of_others(counts, refused, method):
    edges = itertools.pairwise(torch.tensor([0, *counts]).cumsum(0).tolist())
    mask = None if refused else torch.tensor([1, 0, 1, 1])  # a sample may have one that nothing looks at
    train = ids(B, 1), torch.randn(B, 3, dtype=torch.float64), torch.tensor(counts), mask
    held = ids(3, 2), torch.randn(3, 3, dtype=torch.float64), torch.tensor([1, 2, 0])

    def loss(model: nn.Module, *of: Any) -> Tensor:
        return model(*of).square().mean()

    def gradient(*of: Any) -> Tensor:
        loss(model := made(Images), *of).backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    def values(**options: Any) -> Tensor:
        optimizer = torch.optim.SGD((model := made(Images)).parameters(), lr=LR)
        tracker = inrun.track(model, optimizer, method, validation=lambda: loss(model, *held), **options)
        with tracker.step(range(B)) as taken:
            loss(model, *train).backward()
            optimizer.step()
        return taken.values.double()

    through = {}
    if refused:
        with pytest.raises(inrun.InRunError, match=r"vision.0 .*as many still when the model's input had") as error:
            values()
        through = proposed(error)
        assert through == {"vision.0.*": "", "vision.2.*": ""}
    parts = [[v if v is None else v[a:b] for v in train[1::2]] for a, b in edges]
    alone = [gradient(train[0][[i]], one, train[2][[i]], of_one) for i, (one, of_one) in enumerate(parts)]
    want = LR * torch.stack(alone) @ gradient(*held) / B
    torch.testing.assert_close(values(through=through), want, rtol=1e-5, atol=1e-9)


class Once(TokensFirst):
    """Its samples are in front, or in a list; of what it draws, counts and keeps nothing may be left of another run."""

    def __init__(self, sizes: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))
        self.sizes, self.calls, self.dropout, self.mean = sizes, [], nn.Dropout(0.5), torch.zeros(())
        self.runs: Any = ([],)  # a tuple's, which nobody puts back

    def forward(self, x: Tensor | list[Tensor]) -> Tensor:
        self.runs[0].append(len(x))
        x = x if isinstance(x, Tensor) else torch.stack(x)
        if len(x) not in self.sizes:
            raise NotImplementedError("another size of batch")
        self.calls.append(len(x))
        self.seen += len(x)
        self.mean.mul_(0.5).add_(len(x))
        h = self.token(x) * random.random() + np.random.rand()
        for block in self.blocks:
            h = self.dropout(block(h).tanh())
        return self.head(h)


@pytest.mark.parametrize("listed", [True, False])
@pytest.mark.parametrize("sizes", [(3, B), (3, B, B + 1)])
def test_nothing_stays_of_the_run_with_one_sample_more(sizes, listed):
    """Nor is it an error where a model takes no such batch."""
    model, plain, x = made(Once, sizes), made(Once, sizes), ids(B, 1, T + 1)
    x = list(x) if listed else x

    def seed() -> None:
        torch.manual_seed(7)
        random.seed(7)
        np.random.seed(7)

    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with inrun.track(model, optimizer) as tracker:
        with tracker.validation():
            loss_of(model, ids(3, 2)).backward()
        seed()
        with tracker.step(range(B)):
            loss_of(model, x).backward()
            optimizer.step()
    drawn = torch.rand(2), random.random(), np.random.rand()
    assert set(model.runs[0][:3]) == {3, B, B + 1}
    assert model.calls == [3, B] and int(model.seen) == 3 + B and model.training and model.dropout.training
    assert float(model.mean) == 3 / 2 + B
    seed()
    loss_of(plain, x).backward()
    assert torch.equal(drawn[0], torch.rand(2)) and drawn[1:] == (random.random(), np.random.rand())
    for p, trained in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(trained, p - LR * p.grad)


class Counting(nn.Module):
    """Changes its input in place."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.token(x.add_(1).remainder_(11)).cumsum(1))


def test_an_input_that_the_model_changes_is_changed_by_the_step_alone():
    x, given = ids(B, 1), ids(B, 1)
    step(made(Counting), x)
    assert torch.equal(x, (given + 1) % 11)


@pytest.mark.parametrize("method", ["first", "path"])
def test_no_input_outlives_its_step(method):
    model, held = made(Counting), ids(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    with inrun.track(model, optimizer, method, validation=lambda: loss_of(model, held)) as tracker:
        for seed in range(2):
            x = ids(B, seed)
            there = weakref.ref(x)
            with tracker.step(range(B)):
                loss_of(model, x).backward()
                optimizer.step()
                optimizer.zero_grad()
            del x
            gc.collect()
            assert there() is None


class Ordinary(nn.Module):
    """What has as many rows as samples, and is none of theirs, beside what is."""

    def __init__(self, kind: str, size: int) -> None:
        super().__init__()
        self.kind, self.size = kind, size
        self.token, self.place, self.scale = nn.Embedding(11, WIDTH), nn.Embedding(size, WIDTH), nn.Linear(WIDTH, 1)
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
        self.register_buffer("bank", torch.randn(size, WIDTH))
        self.state: Any = None

    def forward(self, x: Any, *_: Any) -> Tensor:
        if self.kind == "list of samples":
            x = torch.stack(x)
        elif self.kind == "list of inputs":
            x = x[0]
        h = self.token(x)
        if self.kind == "no gradient":
            with torch.no_grad():
                h = h + self.inner(self.bank).mean(0)
        elif self.kind == "detached":
            h = h + self.inner(self.bank).detach().mean(0)
        elif self.kind == "eval mode" and not self.training:
            h = h + self.inner(self.bank).mean(0)
        elif self.kind == "padded":
            h = torch.cat([h, torch.zeros(-len(h) % self.size, *h.shape[1:])])
        elif self.kind == "state":
            h = h + self.inner(self.state)
        elif self.kind == "squeezed":
            h = h + self.inner(h.mean(1)).squeeze().unsqueeze(-2).view(len(h), 1, -1)
        elif self.kind == "positions [1, T]":
            h = h + self.place(torch.arange(self.size)[None].expand(1, -1))[:, : x.shape[1]]
        h = h + self.inner(h)
        if self.kind in ("list of inputs", "sizes", "flattened"):
            h = (h.view(-1, WIDTH) * 1.5).tanh()
            return self.head(h).view(*x.shape, 2)
        return self.head(h[: len(x)].tanh())


KINDS = ["no gradient", "detached", "eval mode", "padded", "state", "squeezed", "positions [1, T]", "flattened"]


@pytest.mark.parametrize("size", [2, B])
@pytest.mark.parametrize("kind", [*KINDS, "list of samples", "list of inputs", "sizes", "hook"])
def test_models_that_may_do_so_are_let_pass(kind, size):
    torch.manual_seed(0)
    model = Ordinary(kind, size).double()
    x = ids(size, 1, T + 1 if kind in ("list of inputs", "flattened") else size)

    def arguments(x: Tensor) -> tuple:
        model.state = torch.linspace(-1, 1, len(x) * WIDTH, dtype=torch.float64).view(len(x), 1, WIDTH)
        more = {"list of samples": (list(x),), "list of inputs": ([x, *[x] * (size - 1)],), "sizes": (x, (3,) * size)}
        return more.get(kind, (x.t(),) if kind == "hook" else (x,))

    if kind == "hook":
        model.register_forward_pre_hook(lambda _, args: (args[0].t(),))

    def loss(x: Tensor) -> Tensor:
        return model(*arguments(x)).square().mean()

    def gradients(x: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss(x), list(model.parameters()), materialize_grads=True, allow_unused=True))

    held = ids(size, 2, x.shape[1])
    rows = gradients(x) if kind == "state" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    target = gradients(held)
    if rows is None:
        rows = [[g / size for g in gradients(one[None])] for one in x]
        want = torch.stack([sum((g * t).sum() for g, t in zip(row, target, strict=True)) for row in rows]) * LR
    else:
        want = sum((g * t).sum() for g, t in zip(rows, target, strict=True)) * LR
    tracker = inrun.track(model, optimizer, validation=lambda: loss(held))
    with tracker.step(range(size)) as taken:
        loss(x).backward()
        optimizer.step()
    got = taken.values.double()
    torch.testing.assert_close(got.sum() if kind == "state" else got, want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("kind", ["no gradient", "detached"])
def test_what_takes_no_gradient_in_a_reentrant_checkpoint_is_let_pass_too(kind, method):
    class Checkpointed(Ordinary):
        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(lambda x, _: Ordinary.forward(self, x), x, self.scale.weight, use_reentrant=True)

    found, want = (step(made(cls, kind, B), ids(B, 1), method) for cls in (Checkpointed, Ordinary))
    torch.testing.assert_close(found, want, rtol=1e-5, atol=1e-9)


def test_what_all_samples_share_in_a_reentrant_checkpoint_is_looked_at_when_it_is_run_again(recwarn):
    class Measuring(Ordinary):
        def block(self, h: Tensor) -> Tensor:
            places = self.place(torch.arange(h.shape[1])[None])
            self.size = places.norm()  # for nothing
            return self.head(h + places)

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, self.token(x), use_reentrant=True)

    step(made(Measuring, "", T + 1), ids(B, 1, T + 1))
    assert not [each for each in recwarn if "norm()" in str(each.message)]


class Beside(Ordinary):
    """Flattened tokens, and features of each sample beside them."""

    def __init__(self) -> None:
        super().__init__("flattened", B)

    def forward(self, x: Tensor, features: Tensor) -> Tensor:
        return super().forward(x) * features.to_dense().mean(1)[:, None, None]


@pytest.mark.parametrize("sparse", [False, True])
def test_tokens_are_told_where_only_the_last_sample_has_others(sparse):
    model, x = made(Beside), ids(1, 1, T + 1).repeat(B, 1)
    x[-1] = ids(1, 2, T + 1)
    features = torch.randn(B, 3, dtype=torch.float64)

    def loss(*rows: int) -> Tensor:
        f = features[list(rows)]
        return model(x[list(rows)], f.to_sparse() if sparse else f).square().mean()

    params = [*model.token.parameters(), *model.inner.parameters(), *model.head.parameters()]
    target, *each = (torch.autograd.grad(loss(*rows), params) for rows in ((0, 3), *((i,) for i in range(B))))
    want = LR / B * torch.stack([sum((g * t).sum() for g, t in zip(one, target, strict=True)) for one in each])
    tracker = inrun.track(model, torch.optim.SGD(model.parameters(), lr=LR), validation=lambda: loss(0, 3))
    with tracker.step(range(B)) as taken:
        loss(*range(B)).backward()
        tracker.optimizers[0].step()
    torch.testing.assert_close(taken.values.double(), want, rtol=1e-5, atol=1e-9)


class Optional(Ordinary):
    def __init__(self) -> None:
        super().__init__("flattened", B)

    def forward(self, *, x: Tensor, features: Tensor | None = None) -> Tensor:
        h = super().forward(x)
        return h if features is None else h * features.mean(1)[:, None, None]


def test_an_input_is_the_same_one_where_another_before_it_is_not_given():
    model, optimizer = (m := made(Optional)), torch.optim.SGD(m.parameters(), lr=LR)
    features, given = torch.randn(B, 3, dtype=torch.float64), [ids(B, 1, T + 1), ids(B, 2, T + 1)]
    tracker = inrun.track(model, optimizer, validation=lambda: model(x=given[0]).square().mean())
    with tracker.step() as taken:
        for number, inputs in enumerate(({"features": features, "x": given[0]}, {"x": given[1]})):
            taken.batch(range(number * B, number * B + B))
            model(**inputs).square().mean().backward()
        optimizer.step()
    assert taken.values.shape == (2 * B,)


class Pair:
    """Of which torch knows the parts, and no names of them."""

    def __init__(self, *parts: Any) -> None:
        self.parts = parts


pytree.register_pytree_node(Pair, lambda pair: (list(pair.parts), None), lambda parts, _: Pair(*parts))


@pytest.mark.parametrize("kind", [Pair, torch.nested.nested_tensor])
@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_tokens_are_told_whatever_else_the_model_is_given(kind):
    class Given(Beside):
        def forward(self, x: Tensor, other: Any) -> Tensor:
            return super().forward(x, torch.stack(other.parts if isinstance(other, Pair) else other.unbind()))

    features = list(torch.randn(B, 3, dtype=torch.float64))
    other, x = Pair(*features) if kind is Pair else kind(features), ids(B, 1, T + 1)
    model, optimizer = (m := made(Given)), torch.optim.SGD(m.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x, other).square().mean())
    for _ in range(2):
        with tracker.step(range(B)) as taken:
            model(x, other).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert taken.values.all()


def test_what_all_samples_share_may_be_saved_and_copied_in_the_step():
    class Saving(Ordinary):
        def forward(self, x: Tensor) -> Tensor:
            places = self.place(torch.arange(x.shape[1])[None])
            self.state = copy.copy(places.detach()), pickle.loads(pickle.dumps(places.detach()))
            return self.head(self.token(x) + places)

    step(model := made(Saving, "", T), ids(B, 1))
    assert all(type(each) is Tensor for each in model.state)


def test_complex_numbers_beside_the_samples_are_taken_whole():
    class Spectrum(Beside):
        def forward(self, x: Tensor, features: Tensor) -> tuple[Tensor, Tensor]:
            return (h := super().forward(x, features)), torch.fft.fft(h).conj()

    model, optimizer = (m := made(Spectrum)), torch.optim.SGD(m.parameters(), lr=LR)
    features = torch.randn(B, 3, dtype=torch.float64)
    tracker = inrun.track(model, optimizer, validation=lambda: model(ids(B, 2), features)[0].square().mean())
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings(record=True) as told, tracker.step(range(B)):
            model(ids(B, 1), features)[0].square().mean().backward()
            optimizer.step()
    finally:
        torch.set_warn_always(False)
    assert not [str(each.message) for each in told if "imaginary" in str(each.message)]


class Crossed(nn.Module):
    """A scale of the block's own; its layer of positions is given `[1, T, W]`, and its output is split by heads."""

    def __init__(self, heads: bool) -> None:
        super().__init__()
        self.scale, self.positions = nn.Parameter(torch.rand(WIDTH)), nn.Linear(WIDTH, WIDTH)
        self.register_buffer("places", torch.randn(1, T, WIDTH))
        self.heads = heads

    def forward(self, x: Tensor) -> Tensor:
        places = self.positions(self.places)
        if self.heads:  # B rows have B times as many
            places = places.view(1, T, -1, 2).permute(0, 2, 3, 1)
            seen = x.unflatten(-1, (3, 2)).transpose(1, 2) @ places
            return x * self.scale * seen.mean((1, 3))[..., None]
        return x * self.scale + x @ (places[0].mT @ places[0])


class Crossing(nn.Module):
    def __init__(self, heads: bool) -> None:
        super().__init__()
        self.token, self.block, self.head = nn.Embedding(11, WIDTH), Crossed(heads), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.block(self.token(x)))


@pytest.mark.parametrize("heads", [True, False])
def test_what_a_shared_input_makes_fail_is_scored_by_the_module_around(heads):
    """Torch's own error, or this library's of the operation that mixes rows, ends with the same proposal."""
    model, x = made(Crossing, heads), ids(B, 1)
    with pytest.raises(RuntimeError) as error:
        step(model, x)
    assert isinstance(error.value, inrun.InRunError) is not heads
    assert proposed(error) == {"block.positions.*": "block"}
    model = made(Crossing, heads)
    want = expected(model, x)
    torch.testing.assert_close(step(model, x, through=proposed(error)), want, rtol=1e-5, atol=1e-9)


class Bypassing(nn.Module):
    """Uses a weight past its module, in a module inside."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low, self.up = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            layer = [self.low][0]  # hidden from who reads the source
            return self.up(x @ layer.weight + self.low(x))

    def __init__(self) -> None:
        super().__init__()
        self.token, self.inner, self.head = nn.Embedding(11, WIDTH), Bypassing.Inner(), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(self.token(x)))


@pytest.mark.parametrize("method", ["first", "path"])
def test_parameters_used_past_their_modules_come_with_the_module_that_does(method):
    model, x = made(Bypassing), ids(B, 1)
    with pytest.raises(inrun.InRunError, match="the scores do not add up") as error:
        step(model, x, method)
    assert proposed(error) == {"inner.low.*": "inner"}
    model = made(Bypassing)
    want = expected(model, x)
    torch.testing.assert_close(step(model, x, method, through=proposed(error)), want, rtol=1e-5, atol=1e-9)


class Lent(nn.Module):
    """The weight of a layer that is given tokens first, inside, is another layer's too."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.low = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            return self.low(x.transpose(0, 1)).tanh().transpose(0, 1).cumsum(1)

    def __init__(self) -> None:
        super().__init__()
        self.token, self.out, self.inner = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH), Lent.Inner()
        self.inner.low.weight, self.head = self.out.weight, nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.out(self.inner(self.token(x))))


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_weight_that_is_lent_comes_with_the_module_around_all_its_uses(method):
    x = ids(B, 1)
    with pytest.raises(inrun.InRunError, match="expected the samples at dimension 0") as error:
        step(made(Lent), x, method)
    model = made(Lent)
    want = expected(model, x)
    torch.testing.assert_close(step(model, x, method, through=proposed(error)), want, rtol=1e-5, atol=1e-9)


def test_a_module_is_proposed_where_half_of_the_scores_are_wrong_and_none_where_more_are():
    model, x = made(Bypassing), ids(B, 1)
    with pytest.raises(inrun.InRunError, match="the scores do not add up") as error:
        step(model, x, exclude=["token.*", "head.*"])
    assert proposed(error) == {"inner.low.*": "inner"}
    model = made(Bypassing)
    loss_of(model, ids(B, 3)).backward()
    with pytest.raises(inrun.InRunError, match="gradients were left over from before the step") as error:
        step(model, x)
    assert not hasattr(error.value, "__notes__")


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("method", ["first", "path"])
def test_what_takes_no_gradient_in_a_step_may_be_any_batch(method, checkpointed):
    """An evaluation of one row, as generating makes it, or of others; a reentrant checkpoint takes none at first."""

    class Tabled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = nn.Embedding(11, WIDTH), nn.Embedding(T + 2, WIDTH)
            self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2)
            self.checkpointed = False

        def block(self, h: Tensor) -> Tensor:
            return h + self.inner(h).tanh() + self.place(torch.arange(h.shape[1])[None])

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                seen = self.inner(self.place.weight[:1]).mean()
            h = self.token(x) + seen
            return self.head(checkpoint(self.block, h, use_reentrant=True) if self.checkpointed else self.block(h))

    model, x = made(Tabled), ids(B, 1, T + 1)
    want = expected(model, x)
    model.checkpointed = checkpointed
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, ids(3, 2)))
    with tracker.step(range(B)) as taken:
        with torch.no_grad():
            for rows in (1, B, B + 3):
                assert len(model(ids(rows, 5, T + 1))) == rows
        loss_of(model, x).backward()
        with torch.inference_mode():
            assert model(ids(1, 6, T)).shape == (1, T, 2)
        optimizer.step()
    torch.testing.assert_close(taken.values.double(), want, rtol=1e-5, atol=1e-9)


class Inline(torch.autograd.Function):
    """A checkpoint of one's own, whose forward is not given what it keeps."""

    @staticmethod
    def forward(run: Any, x: Tensor, seed: int) -> Tensor:
        torch.manual_seed(seed)
        return run(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.run, x, ctx.seed = inputs
        ctx.save_for_backward(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        x = ctx.saved_tensors[0].detach().requires_grad_()
        torch.manual_seed(ctx.seed)
        with torch.enable_grad():
            ctx.run(x).backward(grad)
        return None, x.grad, None


class Later(Inline):
    """Made from another, as of any class."""

    @staticmethod
    def forward(run: Any, *others: Any) -> Tensor:
        return Inline.forward(run, *others)


class Starred(Inline):
    @staticmethod
    def forward(*given: Any) -> Tensor:
        run, x, seed = given
        torch.manual_seed(seed)
        return run(x)


OWN = {"of one's own": Inline, "of another's": Later, "of starred arguments": Starred}


@pytest.mark.parametrize("how", ["nested", *OWN])
def test_forwards_that_will_have_a_graph_are_scored(how):
    """Their random numbers are those of the one that has it: positions, which all samples share, have rows there."""

    class Placed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.place = nn.Embedding(11, WIDTH), nn.Embedding(T + 1, WIDTH)
            self.head, self.dropout, self.plain = nn.Linear(WIDTH, 2), nn.Dropout(0.5), False

        def block(self, h: Tensor) -> Tensor:
            return h + self.dropout(self.place(torch.arange(h.shape[1])[None]))

        def forward(self, x: Tensor) -> Tensor:
            h = self.token(x)
            if self.plain:
                torch.manual_seed(3)
                return self.head(self.block(h))
            if how == "nested":
                torch.manual_seed(3)
                inner = lambda z: checkpoint(self.block, z * 1, use_reentrant=True)  # noqa: E731
                return self.head(checkpoint(inner, h, use_reentrant=True))
            return self.head(OWN[how].apply(self.block, h, 3))

    found = []
    for plain in (True, False):
        model = made(Placed)
        model.plain = plain
        found.append(step(model, ids(B, 1, T + 1)))
    torch.testing.assert_close(*found)


def test_an_evaluation_of_what_has_a_gradient_is_none_of_a_functions():
    """Its forwards are a module's, which may put what they like in the place of their arguments, and one's own."""

    class Starred(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, *given: Any) -> Tensor:
            x, given = given[0], 3  # pyright: ignore
            return self.head(x if x.is_floating_point() else self.token(x).mean(1))

    model, x = made(Starred), ids(B, 1, T + 1)

    def forward(h: Tensor) -> Tensor:
        return model(h)

    want = expected(model, x)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, ids(3, 2)))
    with tracker.step(range(B)) as taken:
        loss_of(model, x).backward()
        with torch.no_grad():
            assert len(forward(torch.randn(B + 2, WIDTH, dtype=torch.float64, requires_grad=True))) == B + 2
        optimizer.step()
    torch.testing.assert_close(taken.values.double(), want, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("run", [lambda m, x: checkpoint(m, x, use_reentrant=True), lambda m, x: Inline.apply(m, x, 3)])
def test_an_evaluation_in_a_reentrant_checkpoint_is_no_forward_of_the_step(run):
    model, x = made(nn.Linear, WIDTH, 2), torch.randn(B, WIDTH, dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).square().mean())
    with tracker.step(range(B)) as taken:
        model(x).square().mean().backward()
        with torch.no_grad():
            assert len(run(model, torch.cat([x, x]))) == 2 * B
        optimizer.step()
    assert taken.values.abs().min() > 0


@pytest.mark.parametrize("given", ["a list of one", "how many there are"])
def test_a_batch_may_be_a_list_of_one_or_come_with_its_size(given):
    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.head = nn.Linear(3, WIDTH), nn.Linear(WIDTH, 2)

        def forward(self, x: Any, count: int = 1) -> Tensor:
            x = x[0] if isinstance(x, list) else x[:count]
            return self.head(self.inner(x).tanh())

    model = made(Given)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    size = 1 if given == "a list of one" else B
    x = torch.randn(size, T, 3, dtype=torch.float64)
    call = (lambda x: model([x[0]])) if size == 1 else (lambda x: model(x, len(x)))
    tracker = inrun.track(model, optimizer, validation=lambda: call(2 * x).square().mean())
    target = torch.autograd.grad(call(2 * x).square().mean(), list(model.parameters()))
    rows = [
        torch.autograd.grad(call(x[i : i + 1]).square().mean() / size, list(model.parameters())) for i in range(size)
    ]
    with tracker.step(range(size)) as taken:
        call(x).square().mean().backward()
        optimizer.step()
    want = torch.stack([LR * sum((g * t).sum() for g, t in zip(row, target, strict=True)) for row in rows])
    torch.testing.assert_close(taken.values.double(), want, rtol=1e-5, atol=1e-9)


def test_layers_that_are_given_tokens_first_elsewhere_are_not_taken_for_them():
    class Parts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)
            self.layer = nn.TransformerEncoderLayer(WIDTH, 2, WIDTH, 0.0)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.layer.linear1(self.layer.norm1(self.token(x))).cumsum(1))

    with pytest.raises(inrun.InRunError, match=r"layer.linear1 \(Linear\), layer.norm1 .* as many still when"):
        step(made(Parts), ids(B, 1))


@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_checked_where_it_is_made_to_run_eagerly(in_place):
    model = made(TokensFirst)
    if in_place:
        model.compile(backend="eager")
        compiled = model
    else:
        compiled = torch.compile(model, backend="eager")
    with torch.compiler.set_stance("force_eager"), pytest.raises(inrun.InRunError, match="as many still") as error:
        step(compiled, ids(B, 1))
    assert proposed(error) == ({"blocks.*": ""} if in_place else {"_orig_mod.blocks.*": "_orig_mod"})


@pytest.mark.parametrize("method", ["first", "path"])
def test_one_id_for_several_rows_is_refused(method):
    """Where the model's input has one row, several are its tokens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(0, 1), nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2)).double()
    x, held = torch.randn(1, T, 3, dtype=torch.float64), torch.randn(2, T, 3, dtype=torch.float64)
    for batch, refused in ((x, False), (x[0], True), (held[:, 0], True)):
        layers = model[1:] if refused else model
        optimizer = torch.optim.SGD(layers.parameters(), lr=LR)
        tracker = inrun.track(layers, optimizer, method, validation=lambda m=layers, h=held: m(h).square().mean())
        expected = pytest.raises(ValueError, match=r"with B = 1, .* Give each row an id") if refused else None
        with tracker, expected or contextlib.nullcontext(), tracker.step(["a"]):
            layers(batch).square().mean().backward()
            optimizer.step()
        assert len(tracker.ledger) == (0 if refused else 1)


def test_one_id_for_several_rows_is_refused_in_a_later_step_too():
    model = nn.Sequential(nn.Flatten(0, -2), nn.Linear(3, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 2))
    optimizer, x = torch.optim.SGD(model.parameters(), lr=LR), torch.randn(1, T, 3)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).square().mean())
    for batch, expected in ((x, contextlib.nullcontext()), (x[0], pytest.raises(ValueError, match="Give each row an"))):
        with expected, tracker.step(["a"]):
            model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_call_that_is_given_a_cache_is_not_made_again():
    """It would take the other batch in."""

    class Cached(Packed):
        def forward(self, x: Tensor, cache: Any) -> Tensor:
            cache.rows.append(len(x))
            return super().forward(x)

    model, cache = made(Cached), SimpleNamespace(rows=[])
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: model(ids(3, 2), cache).square().mean())
    with tracker.step(range(B)):
        model(ids(B, 1, T + 1), cache).square().mean().backward()
        optimizer.step()
    assert cache.rows == [3, B]


def test_a_number_that_is_not_the_samples_is_the_same_with_one_sample_more():
    class Counted(Learned):
        def forward(self, x: Tensor, count: int = B, last: int = B) -> Tensor:
            h, q = self.token(x[:count]), self.query(self.queries.weight.detach()[-last - 1 :])
            return self.head((q @ h.mT).softmax(-1) @ h)

    model, x = made(Counted), ids(B, 1)
    model.queries = nn.Embedding(2 * B, WIDTH).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, ids(3, 2)))
    with pytest.raises(inrun.InRunError, match=r"query .* as many still"), tracker.step(range(B)):
        model(x, B, B - 1).square().mean().backward()
        optimizer.step()


def test_an_error_of_ones_own_is_left_as_it_is():
    model, x = made(Once, (3, B, B + 1)), ids(B, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: loss_of(model, ids(3, 2)))
    for own in (ZeroDivisionError(), KeyboardInterrupt()):
        with pytest.raises(type(own)) as caught, tracker.step(range(B)):
            loss_of(model, x)
            raise own
        assert caught.value is own and not hasattr(own, "__notes__")


def test_code_of_many_names():
    pairs = [(f"a.layers.{i}.b.{k}.*", f"a.layers.{i}.b") for i in range(3) for k in ("q", "k")]
    pairs += [(f"c.{i}.{j}.*", f"c.{i}.{j}") for i, j in ((0, 1), (2, 0))] + [("d.*", ""), ("e.weight", "e")]
    pairs += [(f"f.{i}.bias", f"f.{i}") for i in (1, 3)]
    assert eval(as_code(pairs)) == dict(pairs)
    assert as_code(pairs[:2]) == '{"a.layers.0.b.q.*": "a.layers.0.b", "a.layers.0.b.k.*": "a.layers.0.b"}'
    named = [(f"f.{i}.w.*", "f") for i in range(3)] + [("g{}.0.*", ""), ("g{}.1.*", ""), ("h.0", "k.0"), ("h.1", "k.1")]
    assert eval(as_code(named)) == dict(named)


class Placed(nn.Module):
    """Tokens come first: `[T, B, W]`; of positions there are as many as tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.positions, self.head = nn.Embedding(T, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.positions(torch.arange(len(x)))[:, None])


def test_a_run_on_one_sample_more_looks_nothing_up_that_is_not_there(monkeypatch):
    """A GPU would not raise: it would be of no use to the process any more."""
    looked_up, lookup, asked = [], torch.embedding, []

    def embedding(table: Tensor, ids: Tensor, *args: Any) -> Tensor:
        looked_up.append((len(table), int(ids.max())))
        return lookup(table, ids, *args)

    monkeypatch.setattr(torch, "embedding", embedding)
    monkeypatch.setattr(inrun.rows, "require_in_range", lambda n, i: asked.append(int(i.max()) >= n) or in_range(n, i))
    model, x = Placed(), torch.randn(T, B, WIDTH)
    optimizer = torch.optim.SGD(model.parameters(), LR)
    through = {"positions.weight": ""}
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).square().mean(), through=through)
    with tracker.step(range(B)):
        model(x).square().mean().backward()
        optimizer.step()
    assert any(asked) and looked_up and all(last < size for size, last in looked_up)
    for wrong in (torch.tensor([0, 4]), torch.tensor([[-5]])):
        with pytest.raises(IndexError, match="indices below 4"):
            in_range(4, wrong)
    in_range(4, torch.tensor([-4, 3]))
    in_range(4, torch.tensor([], dtype=torch.int64))


class Sorted(nn.Module):
    """Takes the samples in an order of its own, as by length."""

    def __init__(self, back=True):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.out, self.back = nn.Linear(4, 5), nn.Linear(5, 3), back

    def forward(self, x):
        order = x[:, 0].argsort()
        return self.out(self.inner(x[order]).tanh()[order.argsort() if self.back else slice(None)])


@pytest.mark.parametrize("method", ["first", "path", "monte_carlo"])
def test_a_model_that_sorts_its_samples_is_refused_or_scored_around(method):
    x, y = torch.randn(B, 4), torch.randint(3, (B,))

    def values(**kwargs):
        model = Sorted()
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        tracker = inrun.track(model, optimizer, method, validation=lambda: F.cross_entropy(model(x), y), **kwargs)
        with tracker.step(range(B)) as step:
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
        return step.values

    with pytest.raises(
        inrun.InRunError, match=r"inner \(Linear\): expected the samples .* in the order of the model's"
    ):
        values()
    model = Sorted()
    params = list(model.parameters())
    along = torch.autograd.grad(F.cross_entropy(model(x), y), params)
    ones = [torch.autograd.grad(F.cross_entropy(model(x[[k]]), y[[k]]) / B, params) for k in range(B)]
    expected = torch.stack([1e-3 * sum((d * g).sum() for d, g in zip(along, one, strict=True)) for one in ones])
    torch.testing.assert_close(values(through={"inner.*": ""}), expected, rtol=2e-2, atol=1e-7)


@pytest.mark.parametrize("through", [{}, {"*": ""}], ids=["", "through the model"])
@pytest.mark.parametrize("method", ["first", "path"])
def test_a_model_that_returns_its_samples_sorted_is_refused_where_it_scores_itself(method, through):
    """As by a parameter of its own: the model's rows are compared too."""

    class Model(Sorted):
        def __init__(self):
            super().__init__(back=False)
            self.scale = nn.Parameter(torch.ones(3))

        def forward(self, x):
            y = self.out(self.inner(x).tanh())
            return y[y[:, 0].argsort()] * self.scale.abs() + self.scale.sin()

    model, x = Model(), torch.randn(B, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x).square().mean(), through=through)
    with (
        pytest.raises(inrun.InRunError, match=r"model \(Model\): expected the samples .* in the order of the model's"),
        tracker.step(range(B)),
    ):
        (model(x) * torch.arange(B)[:, None]).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize(
    "aux, named", [(nn.Linear(4, 1), "aux"), (nn.Sequential(nn.Linear(4, 2), nn.Linear(2, 1)), "aux.1")]
)
def test_a_layer_that_is_given_one_row_in_a_later_step_is_an_error(method, aux, named):
    """It would be a row of all samples, and another model would train: so of what mixes them."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"first": nn.Linear(3, 4), "aux": copy.deepcopy(aux)})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, others = torch.randn(4, 3), torch.randn(5, 3)
    tracker = inrun.track(
        model, optimizer, method, validation=lambda: model["aux"](model["first"](others).tanh()).square().mean()
    )

    def train(picked):
        with tracker.step(range(4)):
            model["aux"](model["first"](x).tanh()[picked]).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()

    train(torch.tensor([True] * 4))
    with pytest.raises(
        inrun.InRunError, match=rf"{named}: expected its output, which belongs to no sample alone, .* got sum"
    ):
        train(torch.tensor([False, True, False, False]))


def test_a_layer_that_had_one_row_for_all_may_have_it_again():
    model = Positioned()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: model(torch.ones(3, 2)).square().mean())
    for _ in range(2):
        with tracker.step(range(4)):
            model(torch.randn(4, 2)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


class Positioned(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.mix = nn.Parameter(torch.randn(1, 2), requires_grad=False), nn.Linear(2, 2)

    def forward(self, x):
        return self.mix(x) + self.mix(self.table)


def test_random_numbers_on_what_all_samples_share_are_told_of():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.out = nn.Embedding(5, 8), nn.Linear(8, 3)

        def forward(self, x):
            return self.out(x + F.dropout(self.place(torch.arange(5)[None]), 0.5, self.training)).mean(1)

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: model(torch.ones(2, 5, 8)).square().mean())
    with pytest.warns(UserWarning, match=r"place: dropout\(\) draws random numbers"), tracker.step(range(4)):
        model(torch.randn(4, 5, 8)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("graded", [True, False])
def test_numbers_that_take_no_gradient_from_what_all_samples_share_are_told_of(graded):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.place, self.out, self.by_row = nn.Embedding(5, 8), nn.Linear(8, 3), True

        def forward(self, x):
            places = self.place(torch.arange(5)[None])
            with torch.set_grad_enabled(graded):
                still = places.detach()
                size = still.norm(dim=-1, keepdim=True) + still.mean() if self.by_row else still.norm()
            return self.out(x + F.dropout(places, 1e-9) / size).mean(1)

    model, x = Model(), torch.randn(4, 5, 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for by_row in (True, False):
        model.by_row = by_row
        tracker = inrun.track(model, optimizer, validation=lambda: model(torch.ones(2, 5, 8)).square().mean())
        told = pytest.warns(UserWarning, match=r"place: norm\(\) takes, without a gradient, all rows of its output")
        with contextlib.nullcontext() if by_row else told, warnings.catch_warnings():
            warnings.simplefilter("error" if by_row else "always")
            with tracker.step(range(4)):
                model(x).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        tracker.close()


@pytest.mark.parametrize("method", ["first", "path"])
def test_a_layer_that_had_a_row_for_each_sample_may_have_one_for_all_later(method):
    class Conditioned(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.inner, self.place, self.out = nn.Linear(4, 5), nn.Embedding(6, 5), nn.Linear(5, 3)

        def forward(self, x, condition, places):
            return self.out((self.inner(x) + self.inner(condition) + self.place(places)[:, 0]).tanh())

    def values(shared):
        torch.manual_seed(1)
        model, x, y = Conditioned(), torch.randn(2, 4, 4), torch.randint(3, (4,))
        one, place = torch.ones(1, 4), torch.full((1, 1), 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss(x, shared):
            ones = (one, place) if shared else (one.expand(len(x), -1), place.expand(len(x), -1))
            return F.cross_entropy(model(x, *ones), y)

        tracker = inrun.track(model, optimizer, method, validation=lambda: loss(x[1], False))
        for k in range(3):
            with tracker.step(range(4)) as step:
                loss(x[0], shared and k > 0).backward()
                optimizer.step()
                optimizer.zero_grad()
        return step.values

    torch.testing.assert_close(values(True), values(False))


@pytest.mark.parametrize("drawn", ["times", "noise", "positions"])
def test_rows_that_do_not_depend_on_the_samples_are_in_no_other_order(drawn):
    class Drawing(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.time, self.out = nn.Linear(4, 5), nn.Linear(1, 5), nn.Linear(5, 3)

        def forward(self, x):
            n = len(x)
            if drawn == "positions":
                t = torch.arange(n)[:, None] / n
            else:
                t = torch.randint(9, (n, 1)) / 9 if drawn == "times" else torch.randn(n, 1)
            return self.out((self.inner(x) + self.time(t)).tanh())

    model, x = Drawing(), torch.randn(6, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).square().mean())
    with tracker.step(range(6)) as step:
        model(x).square().mean().backward()
        optimizer.step()
    assert (step.values != 0).all()


def test_inputs_of_several_rows_to_a_sample_beside_those_of_one():
    class Clips(nn.Module):
        def __init__(self):
            super().__init__()
            self.frame, self.word, self.out = nn.Linear(6, 5), nn.Embedding(9, 5), nn.Linear(5, 3)

        def forward(self, frames, words):
            return self.out(self.frame(frames.unflatten(0, (len(words), -1)).mean(1)) + self.word(words).mean(1))

    model, frames, words = Clips(), torch.randn(20, 6), torch.randint(9, (5, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    tracker = inrun.track(model, optimizer, validation=lambda: model(frames, words).square().mean())
    with tracker.step(range(5)) as step:
        model(frames, words).square().mean().backward()
        optimizer.step()
    assert (step.values != 0).all()


@pytest.mark.parametrize("method", ["path", "secant"])
def test_flattened_tokens_may_be_computed_again(method):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.token, self.out = nn.Embedding(9, 6), nn.Linear(6, 9)

        def forward(self, x):
            return self.out(self.token(x).view(-1, 6)).view(*x.shape, 9)

    def values(again):
        model, x = Flat(), torch.arange(20).view(4, 5) * 7 % 9
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

        def loss():
            return F.cross_entropy(model(x)[:, :-1].flatten(0, 1), x[:, 1:].flatten())

        tracker = inrun.track(model, optimizer, method, validation=loss)
        for _ in range(2):
            with tracker.step(range(4), recompute=loss if again else None) as step:
                loss().backward()
                optimizer.step()
                optimizer.zero_grad()
        return step.values

    torch.testing.assert_close(values(True), values(False))


class Features(nn.Module):
    """Returns a factor beside what it belongs to, as CLIP's models do."""

    def __init__(self):
        super().__init__()
        self.place, self.scale = nn.Parameter(torch.ones(4)), nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return x + self.place, self.scale.exp()


def test_an_output_that_is_a_number_names_what_is_enough_to_exclude():
    def take(**kwargs):
        model, x = Features(), torch.randn(B, 4)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        tracker = inrun.track(model, optimizer, validation=lambda: math.prod(model(x)).square().mean(), **kwargs)
        with tracker.step(range(B)):
            math.prod(model(x)).square().mean().backward()
            optimizer.step()

    with pytest.raises(
        inrun.InRunError, match=r"got \(\); .*exclude them, or those of them that this output is made of"
    ):
        take()
    take(exclude=["scale"])


class Moving(nn.Module):
    """Gives each sample's place to another one, half a batch further."""

    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.out(self.inner(x).tanh().roll(len(x) // 2, 0))


def test_a_model_that_moves_its_samples_on_is_refused_as_one_that_sorts_them():
    model, x = Moving(), torch.randn(B, 4)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x).square().mean())
    with (
        pytest.raises(inrun.InRunError, match=r"out \(Linear\): expected .* in the order of the model's input"),
        tracker.step(range(B)),
    ):
        model(x).square().mean().backward()
        optimizer.step()


class Latents(nn.Module):
    """Its own parameter's rows, as many as samples, go through a layer inside, beside the batch's."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.of_q = nn.Parameter(torch.randn(B, WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("tw,bsw->bts", self.of_q(self.q), x).softmax(-1) @ x


class WithLatents(nn.Module):
    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        self.token, self.latents, self.head = nn.Embedding(11, WIDTH), Latents(), nn.Linear(WIDTH, 2)
        self.checkpointed = checkpointed

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x)
        h = checkpoint(self.latents, h, use_reentrant=False) if self.checkpointed else self.latents(h)
        return self.head(h)


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("targets", [1, 2])
@pytest.mark.parametrize("method", ["first", "path"])
def test_rows_inside_of_a_module_that_runs_several_times_are_those_of_one_run(method, targets, checkpointed):
    """For each of several targets, or to find out whether there are checkpoints inside of it."""
    model, x, held = made(WithLatents, checkpointed), ids(B, 1), ids(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    losses = {str(m): lambda: loss_of(model, held) for m in range(targets)}
    tracker = inrun.track(model, optimizer, method, validation=losses)
    refused = pytest.raises(inrun.InRunError, match=r"^latents.of_q \(Linear\): expected the samples at dimension 0")
    with refused, tracker.step(range(B)):
        loss_of(model, x).backward()
        optimizer.step()


class MovingTokens(nn.Module):
    """The same for a head of flattened tokens, or of the samples' own rows, which a mask weighs; all are put back."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat, self.token, self.out = flat, nn.Embedding(11, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, *masks: Tensor) -> Tensor:
        h = self.token(x).roll(1, 0)
        h = self.out(h.flatten(0, 1)).view_as(h) if self.flat else self.out(h)
        return h.roll(-1, 0) * math.prod(masks)[..., None]


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("size", "padded"), [(2, [-1]), (2, [0]), (3, [-1]), (3, [0]), (4, [-1]), (4, [0, -1]), (5, [-1, -2, 0])]
)
def test_samples_that_a_model_moves_on_are_seen_where_one_alone_is_padded(size, padded, flat):
    model, x, masks = made(MovingTokens, flat), ids(size, 1, T + 2), torch.ones(len(padded), size, T + 2)
    masks[range(len(padded)), padded, T:] = 0
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, validation=lambda: model(x, *masks).square().mean())
    refused = pytest.raises(inrun.InRunError, match=r"^out.*(in the order of the|rows did not move on)")
    with refused, tracker.step(range(size)):
        model(x, *masks).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("segments", [None, [0, 2, 3, 7, 12, 16]], ids=["tokens", "documents"])
@pytest.mark.parametrize("model", [partial(MovingTokens, False), TokensFirst])
def test_tokens_and_documents_are_those_of_the_rows_they_are_taken_for(model, segments, method):
    """In another order, or with the tokens in front, as many as rows."""
    model, x = made(model), ids(B, 1)
    named = range(B if segments is None else len(segments) - 1)
    given = (x, torch.ones(B, T)) if isinstance(model, MovingTokens) else (x,)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation=lambda: model(*given).square().mean())
    refused = pytest.raises(inrun.InRunError, match=r"^(out|blocks.0) \(Linear\).*: expected the samples at dim")
    with refused, tracker.step(named, tokens=T, segments=segments):
        model(*given).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("method", ["path", "secant", "second"])
@pytest.mark.parametrize("model", [partial(MovingTokens, False), partial(MovingTokens, True), TokensFirst])
def test_rows_of_a_batch_that_is_computed_again_are_checked_too(model, method):
    model, x = made(model), ids(B, 1)
    given = (x, torch.ones(B, T)) if isinstance(model, MovingTokens) else (x,)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def loss() -> Tensor:
        return model(*given).square().mean()

    tracker = inrun.track(model, optimizer, method, validation=loss)
    refused = pytest.raises(inrun.InRunError, match=r"^(out|blocks.0).*: expected (the samples at dim|an input \[B, )")
    with refused, tracker.step(range(B), recompute=loss):
        loss().backward()
        optimizer.step()


@pytest.mark.parametrize("flat", [False, True])
def test_rows_of_a_batch_are_refused_before_the_update_also_where_it_is_computed_again(flat):
    """No step is counted, and what would score them is said alike."""
    model, x = made(MovingTokens, flat), ids(B, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def loss() -> Tensor:
        return model(x, torch.ones(B, T)).square().mean()

    notes = []
    for again in (None, loss):
        tracker = inrun.track(model, optimizer, "path", validation=loss)
        with (
            pytest.raises(inrun.InRunError, match=r"^out.*: expected") as error,
            tracker.step(range(B), recompute=again),
        ):
            loss().backward()
            optimizer.step()
        notes.append(getattr(error.value, "__notes__", []))
        assert tracker.steps == 0
        tracker.close()
        optimizer.zero_grad()
    assert notes[0] == notes[1]


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("model", [partial(MovingTokens, False), TokensFirst])
def test_validation_rows_of_a_batch_are_where_they_are_taken_for(model, method):
    model, x = made(model), ids(B, 1)
    given = (x, torch.ones(B, T)) if isinstance(model, MovingTokens) else (x,)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    tracker = inrun.track(model, optimizer, method, validation="batch", pairwise=["a", "b"])
    refused = pytest.raises(inrun.InRunError, match=r"^(out|blocks.0) \(Linear\).*: expected the samples at dim")
    with refused, tracker.step(range(B - 2)):
        out = model(*given).square().mean((1, 2))
        (out[:-2].mean() + out[-2:].mean()).backward()
        optimizer.step()


class Unpadded(nn.Module):
    """Its head is given the tokens that count."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.inner, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x, counts):
        return self.head(self.inner(x).tanh()[counts])


@pytest.mark.parametrize("method", ["first", "path"])
def test_tokens_that_were_picked_out_are_refused_in_a_later_step_too(method):
    """There are as many as samples times features then, which were not what the layer was known to be given."""
    model, x = Unpadded(), torch.randn(B, 5, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)

    def counts(*lengths):
        return torch.arange(5) < torch.tensor(lengths)[:, None]

    tracker = inrun.track(model, optimizer, method, validation=lambda: model(x, counts(5, 5, 5, 5)).square().mean())
    for lengths in ((5, 5, 5, 5), (5, 5, 5, 5), (1, 5, 2, 4)):
        refused = pytest.raises(inrun.InRunError, match=r"head: expected an input .* got \(12, 5\), whose rows did not")
        with refused if lengths[0] == 1 else contextlib.nullcontext(), tracker.step(range(B)):
            model(x, counts(*lengths)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()


class Pooled(nn.Module):
    """Given the nodes of graphs, and which graph each is of."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.node, self.head = nn.Linear(3, 5), nn.Linear(5, 2)

    def forward(self, x, graph):
        h = self.node(x).tanh()
        return self.head(h.new_zeros(int(graph.max()) + 1, 5).index_add(0, graph, h))


@pytest.mark.parametrize("sizes", [(2, 4, 3, 3), (3, 3, 3, 3), (2, 4, 3, 4)])
def test_graphs_of_any_sizes_are_scored_around_their_nodes(sizes):
    """Also where there are some nodes for each: a run with one sample more is then not to be had."""
    graph = torch.arange(B).repeat_interleave(torch.tensor(sizes))
    x = torch.randn(len(graph), 3)

    def values(**kwargs):
        model = Pooled()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        tracker = inrun.track(model, optimizer, validation=lambda: model(x, graph).square().mean(), **kwargs)
        with tracker.step(range(B)) as taken:
            model(x, graph).square().mean().backward()
            optimizer.step()
        return taken.values

    with pytest.raises((ValueError, inrun.InRunError), match=r"node: (input: )?expected") as error:
        values()
    assert not hasattr(error.value, "__notes__")  # the model does return the samples
    model = Pooled()
    params = list(model.parameters())
    along = torch.autograd.grad(model(x, graph).square().mean(), params)
    lone = (model(x[graph == k], 0 * graph[graph == k]).square().mean() / B for k in range(B))
    ones = (torch.autograd.grad(each, params) for each in lone)
    want = torch.stack([LR * sum((d * g).sum() for d, g in zip(along, one, strict=True)) for one in ones])
    torch.testing.assert_close(values(through={"node.*": ""}), want, rtol=1e-4, atol=1e-7)


class Timed(nn.Module):
    """A layer of it is given a time, in a dimension of its own."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.head = nn.Linear(1, 3), nn.Linear(3, 2)

    def forward(self, x):
        return self.head((x + self.time(torch.full((1,), 0.5))).tanh())


class Whole(nn.Module):
    """Uses weights past all but one of its modules."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.low, self.up, self.bias = nn.Linear(3, 4), nn.Linear(4, 2, bias=False), nn.Embedding(2, 1)

    def forward(self, x):
        up, bias = self.up, self.bias  # hidden from who reads the source
        return self.low(x).tanh() @ up.weight.T + bias.weight.T


@pytest.mark.parametrize("kind, found", [(Timed, {"time.*": ""}), (Whole, {"up.*": "", "bias.*": ""})])
def test_what_is_given_no_rows_is_proposed_to_the_module_around(kind, found):
    x = torch.randn(B, 3)

    def values(**kwargs):
        model = kind()
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        tracker = inrun.track(model, optimizer, validation=lambda: model(x).square().mean(), **kwargs)
        with tracker.step(range(B)) as taken:
            model(x).square().mean().backward()
            optimizer.step()
        return taken.values

    with pytest.raises((ValueError, inrun.InRunError)) as error:
        values()
    assert proposed(error) == found
    model = kind()
    params = list(model.parameters())
    along = torch.autograd.grad(model(x).square().mean(), params)
    ones = (torch.autograd.grad(model(each).square().mean() / B, params) for each in x.split(1))
    want = torch.stack([LR * sum((d * g).sum() for d, g in zip(along, one, strict=True)) for one in ones])
    torch.testing.assert_close(values(through=found), want, rtol=1e-4, atol=1e-7)


class Ways(nn.Module):
    """All tokens, flattened, go each way that any is routed to."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)
        self.ways = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        h, to, out = self.token(x).flatten(0, 1), x.flatten() % 3, 0.0
        for i, way in enumerate(self.ways):
            if (chosen := to == i).any():
                out = out + torch.where(chosen[:, None], way(h), 0.0)
        return self.head(torch.tanh(h + out)).view(*x.shape, 2)


class Unlike(nn.Module):
    """Takes no sample twice."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        assert len(x.unique(dim=0)) == len(x), "expected samples that differ"
        return self.head(self.token(x).flatten(0, 1)).view(*x.shape, 2).cumsum(1)


@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("kind", [Ways, Unlike])
def test_two_samples_may_be_more_than_one_of_them_twice(kind, method):
    """The first goes no third way."""
    x = torch.tensor([[0, 3, 4, 1, 6], [2, 5, 8, 1, 3]])
    want = expected(made(kind), x)
    torch.testing.assert_close(step(made(kind), x, method), want, rtol=1e-5, atol=1e-9)


class Negatives(nn.Module):
    """A layer is given the samples, and what each is held against: of two, each other."""

    def __init__(self) -> None:
        super().__init__()
        self.token, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x).tanh()
        return self.head(h) - self.head(h.flip(0))


@pytest.mark.parametrize("method", ["first", "path"])
def test_two_samples_may_be_held_against_each_other(method):
    assert step(made(Negatives), ids(2, 1), method).isfinite().all()
