"""The products of one layer: gradient with dots, and of linear layers dots alone, at the shapes of real layers."""

from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.measure import BASE, CLOCK, SEED, Machine, Measured, Row, Work, gated, interleaved, require_close, rows_of
from bench.peers import DOT, ROWS, SQUARES, WGRAD_DOT
from inrun_kernels import cost, forms

SUITES = {"weight gradient + dots": WGRAD_DOT, "dots alone": DOT, "squares": SQUARES, **ROWS}
RTOL = {torch.float32: 1e-4, torch.bfloat16: 3e-2}  # of a root mean square; a peer rounds its products once more


@dataclass(frozen=True)
class Case:
    batch: int
    tokens: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"B{self.batch} T{self.tokens} {self.inputs}x{self.outputs}"

    def work(self, provider: str, itemsize: int, directions: int = 1) -> Work:
        tokens, weight = self.batch * self.tokens, self.inputs * self.outputs
        if provider == "inrun_pairwise":  # one validation sample of T tokens stands for the direction
            wide = (tokens + self.tokens) * (self.inputs + self.outputs)
            return Work(2 * tokens * self.tokens * (self.inputs + self.outputs), itemsize * wide)
        return Work(2 * tokens * weight, itemsize * (tokens * (self.inputs + self.outputs) + (1 + directions) * weight))

    def row_work(self, layer: str, itemsize: int) -> Work:
        """Of a norm's, bias's or embedding's product over `inputs`, whose vocabulary is `outputs`."""
        elements, table = self.batch * self.tokens * self.inputs, self.inputs * self.outputs
        nbytes = {
            "norm": 2 * elements,
            "layer norm": 5 * elements,
            "bias": elements,
            "embedding": 2 * elements + table,
        }[layer] * itemsize
        return Work({"norm": 3, "layer norm": 27}.get(layer, 2) * elements, nbytes)

    def predicted(self, suite: str, machine: Machine) -> dict[str, float]:
        """Seconds of our products by the static model; on a CPU in the cheapest of their forms."""
        sizes = cost.Sizes(self.batch, self.tokens, self.inputs, self.outputs, 1, 1, self.tokens)

        def seconds(kernel: str, sizes: cost.Sizes = sizes, form: str = "two") -> float:
            tile = None
            if machine.on_gpu and kernel != "rows":
                tile = cost.default_tile(kernel, sizes, machine.architecture, machine.dtype, form)
            return cost.predict(kernel, sizes, machine.ceilings, machine.dtype, tile, form).seconds

        if suite == "dots alone":
            return {"inrun": seconds("dot"), "inrun_pairwise": seconds("pairwise")}
        if suite in ROWS:
            # Passes over the tokens: of a layer norm with its forward, of an embedding beside one over the table.
            passes = {"norm": 2, "layer norm": 5, "embedding": 2}.get(suite, 1)
            rows = passes * self.batch * self.tokens + (self.outputs if suite == "embedding" else 0)
            return {"inrun": seconds("rows", cost.Sizes(1, rows, 0, self.inputs))}
        if suite == "squares":
            return {"inrun": seconds("wgrad_dot", replace(sizes, directions=0))}
        if machine.on_gpu:
            of_forms = {f"inrun_{form}": seconds("wgrad_dot", form=form) for form in ("two", "prefix")}
            taken = forms.of_gpu_sizes(machine.architecture, machine.dtype, machine.dtype, False, *astuple(sizes)).form
            return {"inrun": of_forms[f"inrun_{taken}"], **of_forms}
        whole = cost.Sizes(1, self.batch * self.tokens, self.inputs, self.outputs)
        apart = seconds("wgrad_dot", whole, "prefix") + seconds("dot")
        return {"inrun": min(seconds("wgrad_dot"), seconds("wgrad_dot", form="prefix"), apart)}


WIDTHS = [(768, 3072), (384, 1536), (384, 384)]
CPU_CASES = [Case(8, tokens, *width) for tokens in (256, 32, 1) for width in WIDTHS]
LLAMA = [(4096, 4096), (4096, 14336), (14336, 4096)]
GPT2 = [(768, 768), (768, 3072), (768, 50257)]
GPU_CASES = [Case(batch, 2048, *width) for width in LLAMA for batch in (4, 16)]
GPU_CASES += [Case(16, 1024, *width) for width in GPT2]
CASES = GPU_CASES if torch.cuda.is_available() else CPU_CASES
ROW_CASES = [Case(16, 2048, 4096, 32768)] if torch.cuda.is_available() else [Case(8, 256, 768, 8192)]


def _id(param: tuple[str, Case]) -> str:
    return str(param[1])


@pytest.fixture(scope="module")
def measured(request: pytest.FixtureRequest, machine: Machine, rows: list[Row]) -> dict[str, Measured]:
    """Every provider of one case: held to float64, then timed side by side."""
    suite, case = request.param
    if suite == "layer norm" and machine.dtype == torch.bfloat16 and not machine.on_gpu:
        pytest.skip("torch's own is too far from float64 there")
    torch.compiler.reset()
    inputs = _row_inputs(suite, case, machine) if suite in ROWS else _inputs(case, machine)
    runs = {name: partial(kernel, *inputs) for name, kernel in SUITES[suite].items()}
    gradient = (_row_reference if suite in ROWS else _reference)(*_exact(suite, *inputs[:3]))
    expected = dict.fromkeys(runs, _squares(*inputs[:2]) if suite == "squares" else gradient) | {BASE: gradient}

    def require_right(name: str, run: Callable[[], tuple[Tensor | None, Tensor | None]]) -> None:
        (weight_grad, dots), (found_grad, found_dots) = expected[name], run()
        require_close(f"{name}, weight gradient", found_grad, weight_grad, RTOL[machine.dtype])
        require_close(f"{name}, dots", found_dots, dots, RTOL[machine.dtype])

    runs, failed = gated(runs, require_right)
    expected.clear()
    del gradient
    if request.config.getoption("benchmark_disable"):
        return {name: ([0.0], {}) for name in runs} | failed
    peaks = {name: machine.peak_bytes(run) for name, run in runs.items()}
    taken = interleaved(runs, machine, rounds=25, least=5, seconds=0.4)
    item = inputs[1].element_size()
    count = int(suite != "squares")
    work = {name: case.row_work(suite, item) if suite in ROWS else case.work(name, item, count) for name in runs}
    found = rows_of(taken, peaks, work, machine, case.predicted(suite, machine), suite=suite, case=str(case))
    rows += found
    return {row["provider"]: (taken[row["provider"]], row) for row in found} | failed


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", WGRAD_DOT)
@pytest.mark.parametrize("measured", [("weight gradient + dots", case) for case in CASES], indirect=True, ids=_id)
def test_wgrad_dot(measured, provider, benchmark):
    CLOCK.replay(benchmark, measured[provider])


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", DOT)
@pytest.mark.parametrize("measured", [("dots alone", case) for case in CASES], indirect=True, ids=_id)
def test_dot(measured, provider, benchmark):
    CLOCK.replay(benchmark, measured[provider])


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", SQUARES)
@pytest.mark.parametrize("measured", [("squares", case) for case in CASES], indirect=True, ids=_id)
def test_squares(measured, provider, benchmark):
    CLOCK.replay(benchmark, measured[provider])


@pytest.mark.benchmark(timer=CLOCK)
@pytest.mark.parametrize("provider", ROWS["norm"])
@pytest.mark.parametrize(
    "measured", [(layer, case) for layer in ROWS for case in ROW_CASES], indirect=True, ids=lambda p: f"{p[0]} {p[1]}"
)
def test_rows(measured, provider, benchmark):
    CLOCK.replay(benchmark, measured[provider])


def _row_inputs(layer: str, case: Case, machine: Machine) -> tuple[Tensor, Tensor, Tensor]:
    """The normalised input (of a bias nothing that is read) or token ids, grads, and the direction."""
    generator = torch.Generator(machine.device).manual_seed(SEED)
    options = {"generator": generator, "device": machine.device}
    shape = (case.batch, case.tokens, case.inputs)
    normed, grads = (torch.randn(shape, **options).to(machine.dtype) for _ in range(2))
    if layer == "embedding":
        ids = torch.randint(case.outputs, shape[:2], **options)
        return ids, grads, torch.randn(case.outputs, case.inputs, **options).to(machine.dtype)
    return torch.ones_like(normed) if layer == "bias" else normed, grads, torch.randn(shape[2], **options).to(grads)


def _exact(suite: str, x: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The factors of the products, where the layer norm has yet to normalise its input."""
    return F.layer_norm(x.double(), direction.shape) if suite == "layer norm" else x, grads, direction


def _row_reference(x: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """float64, one sample at a time."""
    total = torch.zeros_like(direction, dtype=torch.float64)
    dots = torch.zeros(len(grads), dtype=torch.float64, device=grads.device)
    for b, (one, g) in enumerate(zip(x, grads.double(), strict=True)):
        if x.is_floating_point():
            gradient = (one * g).sum(0)
        else:
            gradient = torch.zeros_like(total).index_add_(0, one, g)
        dots[b] = (gradient * direction).sum()
        total += gradient
    return total, dots


def _inputs(case: Case, machine: Machine) -> tuple[Tensor, ...]:
    """acts, grads, the direction, and the validation sample whose gradient the direction is."""
    generator = torch.Generator(machine.device).manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=machine.device).to(machine.dtype)

    acts, grads = normal(case.batch, case.tokens, case.inputs), normal(case.batch, case.tokens, case.outputs)
    val_acts, val_grads = normal(1, case.tokens, case.inputs), normal(1, case.tokens, case.outputs)
    direction = (val_grads[0].T.float() @ val_acts[0].float()).to(machine.dtype)
    return acts, grads, direction, val_acts, val_grads


def _reference(acts: Tensor, grads: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """float64, one sample at a time."""
    total = torch.zeros_like(direction, dtype=torch.float64)
    dots = torch.zeros(len(acts), dtype=torch.float64, device=acts.device)
    for b, (a, g) in enumerate(zip(acts, grads, strict=True)):
        gradient = g.double().T @ a.double()
        dots[b] = (gradient * direction).sum()
        total += gradient
    return total, dots


def _squares(acts: Tensor, grads: Tensor) -> tuple[Tensor, Tensor]:
    """float64, one sample at a time."""
    total, norms = 0.0, []
    for a, g in zip(acts, grads, strict=True):
        square = (g.double().T @ a.double()).square()
        total, norms = total + square, [*norms, square.sum()]
    return torch.as_tensor(total), torch.stack(norms)
