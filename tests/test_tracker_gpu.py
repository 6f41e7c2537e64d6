"""A tracked model on a GPU has the values that it has on a CPU; on a simulated GPU where there is no other."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from models import B, T, data, loss_of, make
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import inrun
from inrun.shared import InRange
from inrun.tasks import Lion

V, STEPS = 4, 2
SGD, AdamW = torch.optim.SGD, torch.optim.AdamW
DOCUMENTS = {"segments": torch.tensor([0, 4, 4, 15, B * T]), "tokens": T}


@contextlib.contextmanager
def waiting_refused(refused):
    torch.cuda.set_sync_debug_mode("error" if refused else "default")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def values(device, name="gpt_tied", kind=AdamW, method="first", block=False, step=(), dtype=None, ids=B,
           batches=1, again=False, reentrant=None, schedule=False, by=(), **options):  # fmt: skip
    """Of so many steps of a model, one after the other.

    Args:
        by: options of the optimizer; step: of each step; options: of the tracker.
        block: whether validation is a block; again: whether batches are computed again; reentrant: of checkpoints.
        dtype: of autocast, with a gradient scaler where it is float16; schedule: whether the rate grows in the step.
    """
    model = make(name).to(device)
    by, lr = dict(by), 0.02
    if schedule:
        lr = torch.tensor(lr, device=device)
    if kind == "muon":
        tables = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        matrices = {p for p in model.parameters() if p.dim() == 2} - tables
        rest = [p for p in model.parameters() if p not in matrices]
        optimizers = [torch.optim.Muon(list(matrices), lr=lr), AdamW(rest, lr=lr, fused=True)]
    else:
        optimizers = [kind(model.parameters(), lr=lr, **by)]
        if kind == Lion:
            options["update"] = "elementwise"
    (x, y), (val_x, val_y) = ([t.to(device) for t in data(name, n, n)] for n in (B, V))
    if reentrant is not None:
        for layer in model.blocks:
            layer.forward = lambda *a, run=layer.forward: checkpoint(run, *a, use_reentrant=reentrant)

    def loss(x, y):
        with torch.autocast(torch.device(device).type, dtype, enabled=dtype is not None):
            return loss_of(model, x, y)

    if not block:
        options["validation"] = lambda: loss(val_x, val_y)
    tracker = inrun.track(model, optimizers if len(optimizers) > 1 else optimizers[0], method, **options)
    scaler = torch.amp.GradScaler(device, init_scale=2.0**10, enabled=dtype == torch.float16)
    found = []

    def validate():
        if block:
            with tracker.validation():
                loss(val_x, val_y).backward()

    for t in range(STEPS):
        validate()
        with tracker.step() as one:
            parts = [slice(k * B // batches, (k + 1) * B // batches) for k in range(batches)]
            for part in parts:
                whole = lambda part=part: scaler.scale(loss(x[part], y[part]) * (len(x[part]) / B))  # noqa: E731
                one.batch(range(ids)[part], whole if again else None, **dict(step))
                whole().backward()
            nn.utils.clip_grad_norm_(model.parameters(), options.get("clip") or 1e9)
            if schedule:
                lr.mul_(1 + t)
            for optimizer in optimizers:
                scaler.step(optimizer)
                optimizer.zero_grad()
            scaler.update()
        found.append(one)
    validate()
    tracker.close()
    found = torch.stack([one.values.cpu() for one in found])
    total = torch.tensor(sum(tracker.ledger.rows()["value"].to_pylist()))
    torch.testing.assert_close(total, found.sum(), rtol=1e-3, atol=1e-3 * found.abs().sum().item())
    return found


CASES = {
    **{name: {"name": name} for name in ("mlp", "gpt_tied", "gpt_untied", "reused", "unknown", "loose", "attention")},
    "fused": {"by": {"fused": True}},
    "capturable": {"by": {"capturable": True}},
    "sgd": {"kind": SGD, "by": {"momentum": 0.9, "nesterov": True}},
    "a rate on the device": {"kind": SGD, "schedule": True},
    "second": {"kind": SGD, "method": "second"},
    "secant": {"method": "secant", "block": True},
    "path": {"method": "path", "by": {"fused": True}},
    "path, capturable": {"method": "path", "by": {"foreach": True, "capturable": True}, "schedule": True},
    "path, unknown": {"method": "path", "name": "unknown"},
    "path, loose": {"method": "path", "name": "loose"},
    "path, clipped": {"method": "path", "clip": 0.05},
    "path, on the host": {"method": "path", "keep": "host", "batches": 2},
    "path, again": {"method": "path", "again": True, "batches": 2},
    "path_secant": {"method": "path_secant"},
    "path_secant, blocks": {"method": "path_secant", "block": True},
    "path_simpson": {"method": "path_simpson", "kind": SGD},
    "lion": {"method": "path_secant", "kind": Lion},
    "muon": {"method": "path_secant", "kind": "muon"},
    "monte_carlo": {"method": "monte_carlo", "permutations": 2, "kind": SGD, "by": {"momentum": 0.9}},
    "documents": {"step": DOCUMENTS, "ids": 4},
    "documents, path": {"step": DOCUMENTS, "ids": 4, "method": "path"},
    "tokens": {"step": {"tokens": T}},
    "pairs": {"pairwise": range(V)},
    "pairs, SGD": {"pairwise": range(V), "kind": SGD},
    "pairs, on the host": {"pairwise": range(V), "method": "path", "keep": "host", "batches": 2, "by": {"fused": True}},
    "pairs, unknown": {"pairwise": range(V), "name": "unknown"},
    "pairs, documents": {"pairwise": range(V), "step": DOCUMENTS, "ids": 4},
    "accumulation": {"batches": 2},
    "checkpoints": {"reentrant": False},
    "reentrant checkpoints": {"reentrant": True},
    "bfloat16": {"dtype": torch.bfloat16},
    "float16": {"dtype": torch.float16},
    "float16, path": {"dtype": torch.float16, "method": "path"},
}
SIMULATED = (
    "unknown",
    "a rate on the device",
    "path, capturable",
    "path, unknown",
    "documents",
    "pairs, on the host",
    "float16",
)


@pytest.mark.gpu
@pytest.mark.parametrize("case", list(CASES))
def test_values_are_those_of_a_cpu(case):
    options = CASES[case]
    on_cpu = {**options, "by": {}} if case.endswith("capturable") else options
    expected, found = values("cpu", **on_cpu), values("cuda", **options)
    half = "dtype" in options or options.get("kind") == "muon"  # torch's Muon computes in bfloat16
    rtol = 5e-2 if half else 2e-3 if options.get("kind") == Lion else 1e-3
    torch.testing.assert_close(found, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"method": "secant"},
        {"documents": True},
        {"method": "secant", "name": "loose"},
        {"method": "secant", "again": True},
    ],
    ids=["first", "secant", "documents", "loose", "again"],
)
@pytest.mark.parametrize("fused", [False, True])
def test_a_scored_step_waits_for_nothing_of_a_gpu(fused, options):
    """Validation, forward, backward and update are queued."""
    step = DOCUMENTS if options.get("documents") else {}
    name = options.get("name", "gpt_tied")
    model = make(name).cuda()
    optimizer = AdamW(model.parameters(), lr=0.01, fused=fused)
    (x, y), (val_x, val_y) = ([t.cuda() for t in data(name, size, size)] for size in (B, V))
    method = options.get("method", "first")
    tracker = inrun.track(model, optimizer, method, validation=lambda: loss_of(model, val_x, val_y), check=False)
    if options.get("again"):
        step = {"recompute": lambda: loss_of(model, x, y)}
    for asked in (False, False, True):
        with waiting_refused(asked), tracker.step(range(4 if "segments" in step else B), **step):
            loss_of(model, x, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    tracker.close()


@pytest.mark.gpu
@pytest.mark.parametrize("kinds", ["floats", "on the device", "one on the device"])
def test_rates_on_a_gpu_are_not_waited_for(kinds):
    """Raised within a step by one factor, as before it; by two, which is an error once that is known."""

    def raised(factors, within):
        model = make("gpt_tied").cuda()
        rates = [torch.tensor(0.01, device="cuda") if kinds.startswith(kind) else 0.01 for kind in ("on", "on the")]
        halves = list(model.parameters())[::2], list(model.parameters())[1::2]
        optimizers = [AdamW(half, lr=lr, fused=True) for half, lr in zip(halves, rates, strict=True)]
        (x, y), (val_x, val_y) = ([t.cuda() for t in data("gpt", size, size)] for size in (B, V))
        tracker = inrun.track(model, optimizers, validation=lambda: loss_of(model, val_x, val_y), check=False)

        def schedule():
            for optimizer, factor in zip(optimizers, factors, strict=True):
                optimizer.param_groups[0]["lr"] *= factor

        for t in range(2):
            if t and not within:
                schedule()
            with waiting_refused(t and len(set(factors)) == 1), tracker.step(range(B)) as step:
                loss_of(model, x, y).backward()
                if t and within:
                    schedule()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
        tracker.close()
        return step.values

    torch.testing.assert_close(raised((3, 3), within=True), raised((3, 3), within=False))
    with pytest.raises(inrun.InRunError, match="learning rates"):
        raised((1, 2), within=True)


class Recurrent(nn.Module):
    def __init__(self, kind):
        super().__init__()
        options = {"num_layers": 2, "bidirectional": True, "batch_first": True} if issubclass(kind, nn.RNNBase) else {}
        self.inner, self.head = kind(8, 6, **options), nn.Linear(12 if options else 6, 3)

    def forward(self, x):
        if isinstance(self.inner, nn.RNNBase):
            return self.head(self.inner(x)[0])
        state = self.inner(x[:, 0])
        state = self.inner(x[:, 1], state)
        return self.head(state[0] if isinstance(state, tuple) else state)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN, nn.LSTMCell, nn.GRUCell])
@pytest.mark.parametrize("method", ["first", "path"])
@pytest.mark.parametrize("half", [False, True])
def test_recurrent_layers(kind, method, half):
    """Those of a GPU have no forward derivative, cuDNN's or torch's own."""

    def found(device):
        torch.manual_seed(0)
        model, x, held = Recurrent(kind), torch.randn(B, T, 8).to(device), torch.randn(V, T, 8).to(device)
        model.to(device)
        optimizer = SGD(model.parameters(), lr=0.1)

        def loss(x):
            with torch.autocast(device, torch.bfloat16, enabled=half and device == "cuda"):
                out = model.inner(x) if isinstance(model.inner, nn.RNNBase) else model(x)
                dtypes.append(out[0].dtype)
                return model(x).float().square().mean()

        tracker = inrun.track(model, optimizer, method, validation=lambda: loss(held))
        for _ in range(STEPS):
            with tracker.step(range(B)) as step:
                loss(x).backward()
                optimizer.step()
                optimizer.zero_grad()
        tracker.close()
        return step.values.cpu()

    dtypes: list[torch.dtype] = []
    values = found("cuda")
    assert set(dtypes) == {torch.bfloat16 if half else torch.float32}
    expected = found("cpu")
    rtol = 5e-2 if half else 1e-3
    torch.testing.assert_close(values, expected, rtol=rtol, atol=rtol * expected.abs().max().item())


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences_are_refused(kind):
    class Packed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = kind(8, 6, batch_first=True)

        def forward(self, x):
            packed = nn.utils.rnn.pack_padded_sequence(x, torch.tensor([3, 2, 2]), batch_first=True)
            return nn.utils.rnn.pad_packed_sequence(self.inner(packed)[0], batch_first=True)[0]

    model, x = Packed().cuda(), torch.randn(3, 3, 8).cuda()
    tracker = inrun.track(model, SGD(model.parameters(), lr=0.1), validation=lambda: model(x).square().mean())
    with pytest.raises(inrun.InRunError, match="Pad sequences"), tracker.step(range(3)):
        model(x).square().mean().backward()


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRUCell])
def test_autocast_leaves_recurrent_layers_in_float64(kind):
    model, x = Recurrent(kind).double().cuda(), torch.randn(B, T, 8).double().cuda()
    tracker = inrun.track(model, SGD(model.parameters(), lr=0.1), validation=lambda: model(x).square().mean())
    with tracker.step(range(B)):
        with torch.autocast("cuda", torch.bfloat16):
            out = model(x)
        out.square().mean().backward()
        tracker.optimizers[0].step()
    assert out.dtype == torch.float64


class LookedUp(nn.Module):
    """Takes rows `first` and on of a table of 20 positions."""

    def __init__(self, first):
        super().__init__()
        self.positions, self.head, self.first = nn.Embedding(20, 8), nn.Linear(8, 8), first

    def forward(self, x):
        table = self.positions(torch.arange(20, device=x.device))
        return self.head(x + table[torch.arange(x.shape[1], device=x.device) + self.first])


@pytest.mark.gpu
def test_an_index_that_is_tried_is_not_the_end_of_a_gpu():
    """The table has a row for each sample while a step is scored, of which there are fewer: no kernel may see it."""
    x = torch.randn(B, T, 8, device="cuda")
    model = LookedUp(10).cuda()
    tracker = inrun.track(model, SGD(model.parameters(), lr=0.1), validation=lambda: model(x).square().mean())
    with pytest.raises(inrun.InRunError, match="added to the batch") as told, tracker.step(range(B)):
        model(x).square().mean().backward()
    assert re.search(f"indices below {B}, got 10 to", str(told.value.__cause__))
    assert torch.ones(2, device="cuda").sum().item() == 2


@pytest.mark.gpu
def test_each_operation_that_looks_something_up_is_asked_what():
    x, ids = torch.randn(4, 6, device="cuda"), torch.tensor([[4, 5]], device="cuda")
    with InRange():
        assert (x.index_select(1, ids[0]) == x[:, ids[0]]).all() and (x.gather(1, ids) == x[0, ids]).all()
        assert (x[:1][ids[0, :1] == 4] == x[0]).all()
        for refused in (
            lambda: F.embedding(ids, x),
            lambda: x.index_select(0, ids[0]),
            lambda: x.gather(0, ids),
            lambda: x[ids],
            lambda: x[:, ids + 2],
        ):
            with pytest.raises(IndexError, match="indices below"):
                refused()


@pytest.mark.skipif(torch.version.cuda or torch.version.hip, reason="needs torch's CPU build")
@pytest.mark.skipif(shutil.which(os.environ.get("CXX", "c++")) is None, reason="needs a C++ compiler")
def test_on_a_simulated_gpu():
    """Some of those above, and values on the ledger."""
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "simulated_gpu", "-m", "gpu", "-p", "no:cacheprovider"]
    paths = os.pathsep.join([str(here), str(here.parent), str(here.parent / "kernels")])
    here_too = [f"test_values_are_those_of_a_cpu[{case}]" for case in SIMULATED]
    cases = ("False-first", "True-secant", "True-documents", "False-loose", "True-again")
    here_too += [f"test_a_scored_step_waits_for_nothing_of_a_gpu[{case}]" for case in cases]
    here_too += ["test_rates_on_a_gpu_are_not_waited_for[one on the device]"]
    here_too += ["test_an_index_that_is_tried_is_not_the_end_of_a_gpu"]
    here_too += ["test_each_operation_that_looks_something_up_is_asked_what"]
    cases = ("False-first-LSTM", "True-first-GRU", "False-path-LSTMCell", "True-path-GRUCell")
    here_too += [f"test_recurrent_layers[{case}]" for case in cases]
    here_too += [f"test_packed_sequences_are_refused[{kind}]" for kind in ("LSTM", "GRU")]
    here_too += [f"test_autocast_leaves_recurrent_layers_in_float64[{kind}]" for kind in ("LSTM", "GRUCell")]
    run = subprocess.run(
        [*command, *(f"{here / 'test_tracker_gpu.py'}::{test}" for test in here_too), str(here / "test_ledger.py")],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    assert f"{len(here_too) + 1} passed" in run.stdout, run.stdout[-500:]
