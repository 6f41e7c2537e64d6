"""A whole training step of a GPT, forward to AdamW update, with every sample's dot; the validation pass is counted in
`inrun_validated` and `ghostsuite` alone, of one sequence.

On a GPU also by the device's own time ("step, device time"): with a host that has launched all it can, some thousand
kernels, before the clock starts. A scored step's Python takes longer than plain training's; where it takes longer than
the device, that is what the other rows measure. One case is also measured under `torch.compile` ("step, compiled").
"""

import copy
import gc
import itertools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.measure import BASE, CLOCK, SEED, Machine, Measured, Row, Work, gated, interleaved, require_close, rows_of
from bench.peers import STEPS, GhostSuite, InRun, InRunValidated, Training, loss_of
from inrun.config import GPTConfig
from inrun.gpt import GPT

VALIDATED, GHOST = "inrun_validated", "ghostsuite"
ON_SEQUENCE = {VALIDATED: InRunValidated} | ({GHOST: GhostSuite} if find_spec("ghostEngines") else {})
PROVIDERS = [*STEPS, *ON_SEQUENCE]
COMPILED = {BASE: Training, "inrun": InRun, VALIDATED: InRunValidated}  # whole models; the peers' hooks have no graph
FAR_AHEAD = 0.25  # seconds
RTOL = {torch.float32: 1e-3, torch.bfloat16: 5e-2}  # of a root mean square, through all layers


@dataclass(frozen=True)
class Case:
    batch: int
    tokens: int
    width: int
    layers: int
    vocab: int
    tied: bool

    def __str__(self) -> str:
        head = "tied" if self.tied else "untied"
        return f"B{self.batch} T{self.tokens} d{self.width} L{self.layers} V{self.vocab} {head}"

    def model(self) -> GPT:
        """Layers as in GPT-2: LayerNorm, and biases everywhere."""
        config = GPTConfig(
            block_size=self.tokens,
            layers=self.layers,
            heads=self.width // 64,
            width=self.width,
            bias=True,
            norm="layer",
            tied=self.tied,
        )
        torch.manual_seed(SEED)
        return GPT(config, self.vocab)

    def work(self) -> Work:
        """Of plain training: three products per linear layer and token, and causal attention."""
        tokens = self.batch * self.tokens
        weights = 12 * self.layers * self.width**2 + self.vocab * self.width
        attention = self.layers * 2 * self.tokens * self.width  # per token, half of the square is masked
        return Work(3 * tokens * (2 * weights + attention))


CPU_CASES = [
    Case(8, 256, 384, 6, 256, tied=True),
    Case(8, 256, 384, 6, 256, tied=False),
    Case(8, 256, 384, 6, 8192, tied=True),
    Case(8, 32, 384, 6, 256, tied=True),
    Case(8, 256, 768, 12, 256, tied=True),
]
GPU_CASES = [
    Case(16, 1024, 768, 12, 50257, tied=True),
    Case(16, 1024, 768, 12, 50257, tied=False),
    Case(16, 1024, 768, 12, 50304, tied=True),  # rows of logits that cuBLAS reads at its best
]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES
CASE_COMPILED = CASES[-1] if torch.cuda.is_available() else CASES[0]


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, machine: Machine, rows: list[Row]) -> dict[str, Measured]:
    """Every provider of one case: its first step held to float64, then timed side by side."""
    case = request.param
    if machine.dtype != machine.usual:
        pytest.skip("steps are measured in the device's usual dtype")
    torch.compiler.reset()
    gc.collect()  # the case before
    model = case.model().to(machine.device)
    x, y, val_x, val_y = torch.randint(case.vocab, (4, case.batch, case.tokens), device=machine.device)
    val_grads = _gradients(model, val_x, val_y)

    def made(name: str, make: Any, directions: dict[str, Tensor]) -> Training:
        of_model = copy.deepcopy(model)
        if name in ON_SEQUENCE:
            return make(of_model, val_x[:1], val_y[:1])
        return make(of_model, val_grads if name == "inrun" else directions)

    ours = InRun(copy.deepcopy(model), val_grads)
    ours.prepare()
    values = ours(x, y)
    directions = ours.written_directions()
    steps = {n: ours if make is InRun else made(n, make, directions) for n, make in STEPS.items()}
    for name, make in ON_SEQUENCE.items():
        if name == VALIDATED or not case.tied:
            steps[name] = made(name, make, directions)
    gradients, dots, along_sequence = _reference(model, [directions, _gradients(model, val_x[:1], val_y[:1])], x, y)

    errors: dict[str, float | None] = {}  # of the dots, relative

    def require_right(name: str, step: Training) -> None:
        if step is not ours:
            step.prepare()
        found = values if step is ours else step(x, y)
        if name == GHOST:  # it rounds what it multiplies to bfloat16
            errors[name] = require_close(f"{name}, dots", found, along_sequence, RTOL[torch.bfloat16])
        elif name != VALIDATED:  # along another direction
            errors[name] = require_close(f"{name}, dots", found, dots, RTOL[machine.dtype])
        _require_gradients(name, step, gradients, RTOL[machine.dtype])
        step.optimizer.zero_grad()

    steps, failed = gated(steps, require_right)
    if request.config.getoption("benchmark_disable"):
        return {name: ([0.0], {}) for name in steps} | failed

    def measure(suite: str, steps: dict[str, Training], peaks: dict[str, int], **how: Any) -> Any:
        def prepare(name: str) -> None:
            for step in steps.values():
                step.optimizer.zero_grad()  # else each holds its gradients while it waits
            steps[name].prepare()

        runs = {name: partial(step, x, y) for name, step in steps.items()}
        taken = interleaved(runs, machine, least=3, prepare=prepare, **how)
        work = {name: case.work() for name in steps}
        found = rows_of(taken, peaks, work, machine, {}, suite=suite, case=str(case))
        return taken, [row | {"dots_error": errors.get(row["provider"])} for row in found]

    peaks = {name: _peak_bytes(step, machine, x, y) for name, step in steps.items()}
    taken, found = measure("step", steps, peaks, rounds=15, seconds=8)
    rows += found
    if machine.on_gpu:
        rows += measure("step, device time", steps, peaks, rounds=7, seconds=2, ahead=FAR_AHEAD)[1]
    if case == CASE_COMPILED:
        steps.clear()
        compiled = {name: made(name, make, directions) for name, make in COMPILED.items()}
        for step in compiled.values():
            step.model.compile()
        compiled, without = gated(compiled, require_right)
        for name, error in without.items():
            warnings.warn(f"step, compiled: no {name}: {error}", stacklevel=2)
        for _, step in itertools.product(range(3), compiled.values()):  # the checked step's graph is another one
            step.prepare()
            step(x, y)
        peaks = {name: _peak_bytes(step, machine, x, y) for name, step in compiled.items()}
        rows += measure("step, compiled", compiled, peaks, rounds=15, seconds=8)[1]
    return {row["provider"]: (taken[row["provider"]], row) for row in found} | failed


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("measured", CASES, indirect=True, ids=str)
def test_step(measured, provider, benchmark):
    if provider not in measured:
        pytest.skip("GhostSuite keeps one module's dots for each parameter: not those of tied weights")
    CLOCK.replay(benchmark, measured[provider])


def _peak_bytes(step: Training, machine: Machine, x: Tensor, y: Tensor) -> int:
    def run() -> None:
        step.prepare()
        step(x, y)

    step.optimizer.zero_grad()
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in step.resident()}
    return sum(held.values()) + machine.peak_bytes(run)


def _gradients(model: nn.Module, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    params = dict(model.named_parameters())
    return dict(zip(params, torch.autograd.grad(loss_of(model, x, y), list(params.values())), strict=True))


def _reference(
    model: nn.Module, directions: Sequence[dict[str, Tensor]], x: Tensor, y: Tensor
) -> tuple[dict[str, Tensor], *tuple[Tensor, ...]]:
    """Gradients, and dots along each of the directions, in float64, one sample at a time."""
    model = copy.deepcopy(model).double()
    params = dict(model.named_parameters())
    total = {n: torch.zeros_like(p) for n, p in params.items()}
    dots = []
    for one_x, one_y in zip(x, y, strict=True):
        share = F.cross_entropy(model(one_x[None])[0], one_y) / len(x)
        grads = dict(zip(params, torch.autograd.grad(share, list(params.values())), strict=True))
        dots.append(torch.stack([torch.stack([(g * d[n]).sum() for n, g in grads.items()]).sum() for d in directions]))
        for n, g in grads.items():
            total[n] += g
    return total, *torch.stack(dots).unbind(1)


def _require_gradients(name: str, step: Training, expected: dict[str, Tensor], rtol: float) -> None:
    grads = {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}
    found = torch.cat([grads[n].flatten() for n in expected])
    require_close(f"{name}, gradients", found, torch.cat([g.flatten() for g in expected.values()]), rtol)
