"""Small models that between them use every rule, and a one-sample-at-a-time float64 oracle of their values."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inrun.gpt import GPT, GPTConfig

B, T, VOCAB, WIDTH = 5, 6, 13, 8


class Scale(nn.Module):
    """A norm as models write it themselves: `x * weight / rms`, its weight offset by one as Gemma's is."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(width) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)


class Classifier(nn.Module):
    """An MLP over continuous inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(WIDTH, 12), nn.GELU(), nn.LayerNorm(12), nn.Linear(12, 12, bias=False), nn.RMSNorm(12)
        )
        self.head = nn.Linear(12, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.net(x))


class Reused(nn.Module):
    """One Linear applied twice."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.head = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.inner(torch.tanh(self.inner(x))))


class Counting(nn.Module):
    """Counts its forwards."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


class Bypass(nn.Module):
    """Uses a weight past its module."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 13)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.linear(self.a(x), self.a.weight))


class Unknown(nn.Module):
    """Leaf modules that are no plain layer of torch: a convolution and an offset norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = (
            nn.Conv1d(3, 4, 3),
            Scale(WIDTH - 2),
            nn.Linear(4 * (WIDTH - 2), VOCAB),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(x)).flatten(1))


class Loose(nn.Module):
    """A vision-transformer-like model: class token and position table are loose parameters of the root."""

    def __init__(self) -> None:
        super().__init__()
        self.cls = nn.Parameter(torch.randn(1, 1, WIDTH) * 0.1)
        self.pos = nn.Parameter(torch.randn(T + 1, WIDTH) * 0.1)
        self.embed, self.norm, self.scale = nn.Linear(WIDTH, WIDTH), nn.LayerNorm(WIDTH), Scale(WIDTH)
        self.qkv, self.head = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), -1, -1), self.embed(x)], 1) + self.pos
        q, k, v = self.qkv(self.norm(x)).view(len(x), T + 1, 3, 2, WIDTH // 2).permute(2, 0, 3, 1, 4)
        x = x + F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
        return self.head(self.scale(x)[:, 0])


class Attention(nn.Module):
    """torch's own encoder layer: `nn.MultiheadAttention` uses its projection without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(WIDTH, 2, 12, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layer(x))


def gpt(tied: bool = True, layers: int = 2) -> GPT:
    norm = "layer" if tied else "rms"
    config = GPTConfig(block_size=T, layers=layers, heads=2, width=WIDTH, bias=True, norm=norm, tied=tied)
    return GPT(config, vocab_size=VOCAB)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": Classifier,
    "gpt_tied": gpt,
    "gpt_untied": lambda: gpt(tied=False),
    "reused": Reused,
    "unknown": Unknown,
    "loose": Loose,
    "attention": Attention,
}


def make(name: str, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name]()


def data(name: str, batch: int = B, seed: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs and targets; targets are `[B]` or `[B, T]` classes."""
    g = torch.Generator().manual_seed(seed)
    if name.startswith(("gpt", "hf")):
        ids = torch.randint(VOCAB, (batch, T + 1), generator=g)
        return ids[:, :-1], ids[:, 1:]
    shapes = {"mlp": (batch, WIDTH), "reused": (batch, T, WIDTH), "unknown": (batch, 3, WIDTH)}
    x = torch.randn(shapes.get(name, (batch, T, WIDTH)), generator=g)
    y = torch.randint(VOCAB, (batch, T) if name in ("reused", "attention") else (batch,), generator=g)
    return x, y


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """The mean over all targets of the batch, as training uses it."""
    return F.cross_entropy(model(x).flatten(0, -2), y.flatten())


def sample_gradients(
    model: nn.Module, x: Tensor, y: Tensor, autocast: torch.dtype | None = None
) -> list[dict[str, Tensor]]:
    """Each sample's gradient of its share of `loss_of` the batch, one sample at a time: float64, or autocast."""
    model = copy.deepcopy(model) if autocast else copy.deepcopy(model).double()
    x = x.double() if x.is_floating_point() and not autocast else x
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    rows = []
    for b in range(len(x)):
        with torch.autocast("cpu", autocast, enabled=autocast is not None):
            out = model(x[b : b + 1]).flatten(0, -2)
            share = F.cross_entropy(out, y[b : b + 1].flatten(), reduction="sum") / y.numel()
        rows.append(dict(zip(params, torch.autograd.grad(share, list(params.values())), strict=True)))
    return rows


def gradient(model: nn.Module, x: Tensor, y: Tensor, autocast: torch.dtype | None = None) -> dict[str, Tensor]:
    """The gradient of `loss_of`, as `sample_gradients`."""
    rows = sample_gradients(model, x, y, autocast)
    return {n: sum((r[n] for r in rows[1:]), rows[0][n]) for n in rows[0]}


def oracle_values(
    model: nn.Module,
    rule: Callable[[str, Tensor], Tensor],
    train: Any,
    validation: Any,
    names: set[str] | None = None,
    autocast: torch.dtype | None = None,
) -> Tensor:
    """`<direction, g_z>` of every training sample, before the step.

    Args:
        rule: name and validation gradient of a parameter -> its direction, in float64.
        names: the parameters that count; None for all.
        autocast: compute as plain training in this dtype does, in place of float64.
    """
    val = gradient(model, *validation, autocast)
    directions = {n: rule(n, g) for n, g in val.items() if names is None or n in names}
    rows = sample_gradients(model, *train, autocast)
    return torch.stack([sum((directions[n] * row[n]).sum() for n in directions) for row in rows])
