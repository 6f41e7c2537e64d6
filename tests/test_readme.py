"""What the README shows runs as it stands."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest
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
            tracker.optimizers[0].step()
            tracker.optimizers[0].zero_grad()
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


def block(word: str) -> str:
    """The README's code that holds a word."""
    (found,) = [code for code in BLOCKS if word in code]
    return found


def rows(count: int = 12) -> list[dict]:
    torch.manual_seed(0)
    return [{"sample_id": f"s{i}", "x": torch.randn(4), "y": i % 3} for i in range(count)]


def setting() -> dict:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 3))
    x_val, y_val = torch.randn(6, 4), torch.randint(3, (6,))
    return {"inrun": inrun, "torch": torch, "model": model, "loss": F.cross_entropy, "x_val": x_val, "y_val": y_val}


def test_a_loop_like_torchtitans():
    names = setting()
    names["optimizer"] = torch.optim.AdamW(names["model"].parameters())
    batches = [([r["sample_id"]], r["x"][None], torch.tensor([r["y"]])) for r in rows()]
    names["steps"] = [batches[:6], batches[6:]]
    exec(block("microbatches"), names)
    assert names["tracker"].ledger.rows()["step"].to_pylist() == [0] * 6 + [1] * 6


def test_stopping_and_going_on(tmp_path):
    def begun():
        names = setting() | {"path": tmp_path / "checkpoint.pt"}
        names["optimizer"] = torch.optim.AdamW(names["model"].parameters())
        batches = [([r["sample_id"]], r["x"][None], torch.tensor([r["y"]])) for r in rows()]
        names["steps"] = [batches[:6], batches[6:]]
        return names

    loop = block("microbatches").replace(
        "optimizer, validation", f"optimizer, ledger={str(tmp_path / 'l')!r}, validation"
    )
    names = begun()
    exec(loop, names)
    exec(block("torch.save"), names)
    names = begun()
    head, _, body = loop.partition("\n")
    exec(head, names)
    exec(block("torch.load"), names)
    exec(body, names)
    names["tracker"].close()
    assert inrun.Ledger(tmp_path / "l").rows()["step"].to_pylist() == [t for t in range(4) for _ in range(6)]


def test_accelerate():
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)
    names = setting()
    accelerator = accelerate.Accelerator(gradient_accumulation_steps=2, cpu=True)
    made = (names["model"], torch.optim.AdamW(names["model"].parameters()), torch.utils.data.DataLoader(rows(), 3))
    names |= dict(zip(("model", "optimizer", "loader"), accelerator.prepare(*made), strict=True))
    names["accelerator"] = accelerator
    exec(block("accelerator"), names)
    assert names["loop"].ledger.rows()["step"].to_pylist() == [0] * 6 + [1] * 6


@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch")

    class Net(lightning.LightningModule):
        def __init__(self, net):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["x"]), batch["y"])

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    names = setting()
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    settings = {"accelerator": "cpu", "logger": False, "default_root_dir": tmp_path, **quiet}
    names |= {"model": Net(names["model"]), "loader": torch.utils.data.DataLoader(rows(), 3)}
    names["Trainer"] = functools.partial(lightning.Trainer, **settings)
    exec(block("adapters.lightning"), names)
    assert len(names["values"].ledger) == 12


@pytest.mark.parametrize("kind", ["huggingface", "trl"])
@pytest.mark.filterwarnings("ignore")
def test_the_trainer_and_trls(kind, tmp_path, monkeypatch):
    from test_adapters_huggingface import build, samples, sft

    monkeypatch.chdir(tmp_path)
    held_out = samples(4)
    if kind == "trl":
        datasets = pytest.importorskip("datasets")
        trainset, held_out = (
            datasets.Dataset.from_list(rows).remove_columns("extra") for rows in (samples(), held_out)
        )
        trainer, _, _ = sft(tmp_path / "out", trainset, False, max_length=20)
    else:
        trainer, _, _ = build(tmp_path / "out", options=None)
    names = {"trainer": trainer, "held_out": held_out}
    exec(block("adapters.huggingface").replace("huggingface", kind), names)
    assert len(inrun.Ledger("runs/ledger")) == 22


@pytest.mark.parametrize("folder", [".", "bench", "inrun"])
def test_every_picture_and_link_exists(folder):
    found = re.findall(r"\]\(([^)#]+)(#[^)]*)?\)", (ROOT / folder / "README.md").read_text())
    assert found
    for path, heading in found:
        assert path.startswith("http") or (ROOT / folder / path).exists(), path
        if heading:
            lines = (ROOT / folder / path).read_text().splitlines()
            named = [line.strip("# ").lower().replace(" ", "-") for line in lines if line.startswith("#")]
            assert heading.strip("#") in named
