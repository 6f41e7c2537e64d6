"""What the README shows runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import inrun

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_the_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    x, y = torch.randn(12, 4), torch.randint(3, (12,))
    names = {
        "model": model,
        "optimizer": torch.optim.AdamW(model.parameters()),
        "loader": [([f"a{i}" for i in range(6)], x[:6], y[:6])] * 3,
        "loss": F.cross_entropy,
        "x_val": x[6:],
        "y_val": y[6:],
    }
    exec(BLOCKS[0], names)
    assert names["step"].values.shape == (6,)
    assert len(names["tracker"].ledger) == 18
    assert not any(torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_what_has_a_value_of_its_own():
    model, x = nn.Linear(4, 3), torch.randn(2, 3, 4)
    tracked = nn.Linear(4, 3)
    tracker = inrun.track(tracked, torch.optim.SGD(tracked.parameters()), validation=lambda: tracked(x).sum())
    names = {"inrun": inrun, "tracker": tracker, "ids": ["a", "b"], "offsets": [0, 4, 6], "x": x}
    names |= {"model": model, "optimizer": torch.optim.SGD(model.parameters()), "val_ids": range(5)}
    exec(BLOCKS[1], names)
    for line, shape in zip(BLOCKS[1].splitlines(), [(2,), (2, 3)], strict=False):
        with eval(line.partition("#")[0], names) as step:
            tracked(x).square().sum().backward()
            tracker.optimizer.step()
        assert step.values.shape == shape


def test_the_layers_and_the_kernels():
    def direction(*shape):
        return torch.randn(*shape)

    names = {
        "torch": torch,
        "x": direction(5, 4),
        "weight": direction(3, 4).requires_grad_(),
        "bias": direction(3).requires_grad_(),
        "weight_direction": direction(3, 4),
        "bias_direction": direction(3),
    }
    exec(BLOCKS[2], names)
    total = (names["weight"].grad * names["weight_direction"]).sum() + (
        names["bias"].grad * names["bias_direction"]
    ).sum()
    torch.testing.assert_close(names["probe"].grad.sum(), total)

    names = {"acts": direction(2, 6, 4), "grads": direction(2, 6, 3), "val_grad": direction(3, 4)}
    names |= {"val_acts": direction(3, 5, 4), "val_grads": direction(3, 5, 3)}
    exec(BLOCKS[3], names)
    torch.testing.assert_close(names["dots"].sum(), (names["weight_grad"] * names["val_grad"]).sum())
    assert names["pairs"].shape == (2, 3)


def test_every_picture_and_link_exists():
    for path in re.findall(r"\]\(([^)#]+)\)", README):
        assert path.startswith("http") or (ROOT / path).exists(), path
