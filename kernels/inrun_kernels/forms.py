"""What each form of a product costs on a device, and which form is the quickest.

"native" is the form "two" in C; where it runs, it takes the place of "two" and "prefix". Its contractions and sums are
counted twice: their operands come from the cache, not from registers. Single tokens it contracts without a product of
their own, at two thirds of a matrix product's rate. (In bfloat16 it may multiply at twice the rate, the others do not.)

    seconds = call + sample * S + flop * FLOPs + weight * (elements of weights passed over) + row * (elements of rows)

The coefficients are fitted to measured times (`python -m bench.regret --fit`). FLOPs and passes over memory are
shared among a CPU's threads, the calls themselves are not. Of a GPU's kernels the static model of `cost` says it, which
counts what their tiles read from the cache: one accumulator has room for a tile twice as large as two, which an H100's
tensor cores wait less for.

    product         form        FLOPs, N tokens in S samples   passes over a weight   rows
    wgrad_dot       two         2*N*I*O                        S*(3 + M) - 2 + M      N*(I + O)
                    prefix      2*N*I*O                        S*(1 + M) + M          N*(I + O)
                    native      2*N*I*O + 4*S*(1 + M)*I*O      1 + M                  N*(I + O)
                      (S = N)   2*N*I*O*(1 + 1.5*M)            1 + M                  N*(I + O)
                    direct      2*N*I*O*(1 + M)                1 + M                  N*(I + O)
    dot_pairwise    pairwise    2*N*V*S_v*(I + O)              0                      N*V*S_v
                    direct      2*(N + S_v)*V*I*O              2*V                    N*V*(I + O)
                    gradients   2*(N + V*S_v + S*V)*I*O        S + V                  (N + V*S_v)*(I + O)
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from inrun_kernels.cost import CEILINGS, Sizes, default_tile, predict


@dataclass(frozen=True)
class Cost:
    """Seconds of one form, in proportion to each kind of work; on one thread of a CPU."""

    call: float
    sample: float
    flop: float
    weight: float
    row: float

    def seconds(self, work: tuple[float, ...], threads: int) -> float:
        samples, flops, weights, rows = work
        shared = self.flop * flops + self.weight * weights + self.row * rows
        return self.call + self.sample * samples + shared / threads


# Two cores of an AMD EPYC (Zen 3, and with AVX-512 Zen 4), of an Intel Xeon (Sapphire Rapids), and Zen 3 and Xeon
# together for any other CPU: torch 2.13 with MKL, float32, cold caches. Each is: call, sample, flop, weight, row. Left
# out are the Xeon's times of one token a sample in C, from before these had a way of their own; the "gradients" of
# pairs were timed on Zen 3 alone, whose pairs serve Zen 4 and 5 as well. On Zen 5 (family 26) MKL's products take two
# and a half times as long as those in C.
COSTS: dict[str, dict[str, dict[str, Cost]]] = {
    "AuthenticAMD": {
        "ghost_wgrad_dot": {
            "native": Cost(86.9e-6, 0.0385e-6, 10.6e-12, 0.334e-9, 0.353e-9),
            "two": Cost(206e-6, 18.2e-6, 11.7e-12, 0.22e-9, 0.5e-9),
            "prefix": Cost(218e-6, 13.7e-6, 11.6e-12, 0.283e-9, 0.402e-9),
            "direct": Cost(107e-6, 0.0918e-6, 11.2e-12, 0.496e-9, 0.754e-9),
        },
        "ghost_dot_pairwise": {
            "pairwise": Cost(202e-6, 0, 12.5e-12, 0, 1.15e-9),
            "direct": Cost(107e-6, 52.8e-6, 10.5e-12, 0.767e-9, 0.534e-9),
            "gradients": Cost(108e-6, 0, 14.4e-12, 0.635e-9, 0.141e-9),
        },
    },
    "GenuineIntel": {
        "ghost_wgrad_dot": {
            "native": Cost(205e-6, 1.12e-6, 9.83e-12, 0.797e-9, 0.832e-9),
            "two": Cost(559e-6, 14.6e-6, 11.5e-12, 0.426e-9, 1.20e-9),
            "prefix": Cost(600e-6, 11.9e-6, 11.4e-12, 0.452e-9, 1.18e-9),
            "direct": Cost(309e-6, 1.43e-6, 10.2e-12, 0.689e-9, 1.90e-9),
        },
        "ghost_dot_pairwise": {
            "pairwise": Cost(558e-6, 0, 12.8e-12, 0, 3.39e-9),
            "direct": Cost(389e-6, 55.4e-6, 8.91e-12, 0.896e-9, 1.62e-9),
            "gradients": Cost(389e-6, 0, 14.4e-12, 0.635e-9, 0.141e-9),
        },
    },
    "cpu": {
        "ghost_wgrad_dot": {
            "native": Cost(101e-6, 0, 10.6e-12, 0.373e-9, 0.509e-9),
            "two": Cost(259e-6, 19e-6, 12.3e-12, 0.259e-9, 0.679e-9),
            "prefix": Cost(275e-6, 14.2e-6, 12.1e-12, 0.326e-9, 0.593e-9),
            "direct": Cost(132e-6, 0.0122e-6, 10.9e-12, 0.584e-9, 1.15e-9),
        },
        "ghost_dot_pairwise": {
            "pairwise": Cost(214e-6, 0.616e-6, 12.8e-12, 0, 1.01e-9),
            "direct": Cost(113e-6, 56.7e-6, 11.1e-12, 0.696e-9, 0.382e-9),
            "gradients": Cost(113e-6, 0, 14.4e-12, 0.635e-9, 0.141e-9),
        },
    },
}
COSTS["AuthenticAMD avx512f"] = COSTS["AuthenticAMD"] | {
    "ghost_wgrad_dot": {
        "native": Cost(85.2e-6, 0.00363e-6, 8.35e-12, 0.32e-9, 0.53e-9),
        "two": Cost(197e-6, 10.1e-6, 10.6e-12, 0.187e-9, 0.635e-9),
        "prefix": Cost(201e-6, 8.53e-6, 9.56e-12, 0.247e-9, 0.717e-9),
        "direct": Cost(110e-6, 0.079e-6, 10.3e-12, 0.532e-9, 0.921e-9),
    },
}
COSTS["AuthenticAMD 26"] = COSTS["AuthenticAMD"] | {
    "ghost_wgrad_dot": {
        "native": Cost(68.8e-6, 0.0318e-6, 3.84e-12, 0.175e-9, 0.341e-9),
        "two": Cost(132e-6, 7.74e-6, 9.92e-12, 0.177e-9, 0.418e-9),
        "prefix": Cost(129e-6, 7.14e-6, 10.1e-12, 0.249e-9, 0.351e-9),
        "direct": Cost(76.2e-6, 0.113e-6, 9.74e-12, 0.395e-9, 0.749e-9),
    },
}
_EXACT = 1.05  # "prefix" rounds at the size of the whole batch's dots; it has to be so much quicker than "two"
_MODELLED = 1.1  # the same where a model says it that was not fitted
_FORMED = 1.25  # times quicker that C has to be for dots alone, as it forms a weight's gradient
_LARGE = 1 << 20  # elements of a weight that is better not read again for one token's dot
_STORED = 2  # times fewer FLOPs that make up for gradients which are written and read again on a GPU
_FEW_TOKENS = 32  # of a document, below which a GPU's tiles are mostly empty


@dataclass(frozen=True)
class Choice:
    """Which form a product takes, and why.

    Attributes:
        form: as the argument of `ghost_wgrad_dot`; of `ghost_dot_pairwise`, "pairwise",
            "direct" or "gradients".
        seconds: of each form, as the device's costs predict them; empty where a rule decided.
        reason: in words.
    """

    form: str
    seconds: dict[str, float]
    reason: str


def of_wgrad_dot(
    acts: Tensor, grads: Tensor, val_grad: Tensor, segments: Tensor | None, triton: bool, native: bool
) -> Choice:
    """The form of `ghost_wgrad_dot` for these inputs, `val_grad` with its leading M, and kernels in Triton or C."""
    tokens = acts.shape[0] * acts.shape[1]
    samples = acts.shape[0] if segments is None else segments.shape[0] - 1
    if triton:
        if segments is not None and tokens < _FEW_TOKENS * samples:
            return Choice("direct", {}, f"direct: fewer than {_FEW_TOKENS} tokens to a document")
        from inrun_kernels.tiles import architecture

        sizes = (samples, tokens // max(1, samples), acts.shape[2], grads.shape[2], val_grad.shape[0])
        return of_gpu_sizes(architecture(acts.device), acts.dtype, val_grad.dtype, segments is not None, *sizes)
    if acts.is_cuda:
        return Choice("direct", {}, "direct: a launch for every sample would cost more")
    return of_cpu_sizes(native, tokens, samples, acts.shape[2], grads.shape[2], val_grad.shape[0])


def of_cpu_sizes(native: bool, *sizes: int) -> Choice:
    """The same on a CPU; `sizes` as `wgrad_work` takes them."""
    return _wgrad_dot(cpu_vendor(), torch.get_num_threads(), native, *sizes)


def for_c(acts: Tensor, segments: Tensor | None) -> bool:
    """Whether the kernels in C are worth asking for: of one sample in float32, BLAS has the plain product, which is
    contracted once."""
    return acts.dtype == torch.bfloat16 or (acts.shape[0] if segments is None else segments.shape[0] - 1) > 1


def of_pairwise(acts: Tensor, grads: Tensor, val_acts: Tensor, backend: str | None) -> Choice:
    """The form of `ghost_dot_pairwise` for these inputs."""
    if backend == "triton":
        return Choice("pairwise", {}, "pairwise: what there is in triton")
    (batch, tokens, inputs), (val_samples, val_tokens) = acts.shape, val_acts.shape[:2]
    sizes = (batch * tokens, batch, val_samples, val_tokens, inputs, grads.shape[2])
    if acts.is_cuda:
        flops = {form: work[1] for form, work in pairwise_work(*sizes).items()}
        form = "gradients" if _STORED * flops["gradients"] < flops["pairwise"] else "pairwise"
        counted = ", ".join(f"{name} {flops[name] / 1e9:.3g}" for name in ("pairwise", "gradients"))
        return Choice(form, {}, f"{form}: GFLOPs {counted}")
    return _pairwise(cpu_vendor(), torch.get_num_threads(), *sizes)


def dots_in_c(*sizes: int) -> bool:
    """Whether a CPU has float32 dots alone sooner by `ghost_wgrad_dot` in C than by a product of BLAS; `sizes` as
    `wgrad_work` takes them."""
    return _dots_in_c(cpu_vendor(), torch.get_num_threads(), *sizes)


@lru_cache(4096)
def _dots_in_c(cpu: str, threads: int, *sizes: int) -> bool:
    costs, work = COSTS.get(cpu, COSTS["cpu"])["ghost_wgrad_dot"], wgrad_work(*sizes)
    samples, flops, weights, rows = work["direct"]
    alone = sizes[-1] / (1 + sizes[-1])  # of the products of "direct", those that are not the weight's gradient
    dots = costs["direct"].seconds((samples, alone * flops, alone * weights, alone * rows), threads)
    return _FORMED * costs["native"].seconds(work["native"], threads) < dots


@lru_cache(1)
def cpu_vendor() -> str:
    """The key of this processor's costs: the name that it gives its maker, with its family or "avx512f" where those
    differ by that; "" where Linux does not tell."""
    vendor, family, flags = (next(iter(cpuinfo(field)), "") for field in ("vendor_id", "cpu family", "flags"))
    if f"{vendor} {family}" in COSTS:
        return f"{vendor} {family}"
    with_vectors = f"{vendor} avx512f"
    return with_vectors if with_vectors in COSTS and "avx512f" in flags.split() else vendor


def cpuinfo(*fields: str) -> list[str]:
    """What Linux says of every core under these names; nothing elsewhere."""
    listing = Path("/proc/cpuinfo")
    lines = listing.read_text().splitlines() if listing.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(fields)]


@lru_cache(4096)
def of_gpu_sizes(
    architecture: str, dtype: torch.dtype, direction: torch.dtype, documents: bool, *of_product: int
) -> Choice:
    """The same in Triton, by the model of the chip; `of_product` as `Sizes` takes them."""
    if architecture not in CEILINGS:
        return Choice("two", {}, "two: no model of this chip")
    sizes, seconds = Sizes(*of_product), {}
    for form in ("two", "prefix"):
        tile = default_tile("wgrad_dot", sizes, architecture, dtype, form, direction=direction, documents=documents)
        seconds[form] = predict("wgrad_dot", sizes, CEILINGS[architecture], dtype, tile, form).seconds
    return _least(seconds, _MODELLED)


@lru_cache(4096)
def _wgrad_dot(cpu: str, threads: int, native: bool, *sizes: int) -> Choice:
    return quickest_wgrad(COSTS.get(cpu, COSTS["cpu"])["ghost_wgrad_dot"], threads, native, *sizes)


@lru_cache(4096)
def _pairwise(cpu: str, threads: int, *sizes: int) -> Choice:
    return quickest(COSTS.get(cpu, COSTS["cpu"])["ghost_dot_pairwise"], threads, pairwise_work(*sizes))


def quickest_wgrad(costs: dict[str, Cost], threads: int, native: bool, *sizes: int) -> Choice:
    """The form of `ghost_wgrad_dot`; `sizes` as `wgrad_work` takes them. Of several samples never "prefix": it is at
    most a quarter quicker than "two", and one large sample takes the digits of all that come after it."""
    tokens, samples, inputs, outputs, _ = sizes
    if tokens == 1 and inputs * outputs >= _LARGE:
        return Choice("direct", {}, "direct: one token, and a large weight")
    work = wgrad_work(*sizes)
    if native:
        costs, work = {**costs, "two": costs["native"]}, {"two": work["native"], "direct": work["direct"]}
    else:
        work.pop("native")
    return quickest(costs, threads, work, math.inf if samples > 1 else _EXACT)


def wgrad_work(tokens: int, samples: int, inputs: int, outputs: int, directions: int) -> dict[str, tuple[float, ...]]:
    """(samples, FLOPs, elements of weights, elements of rows) of each form of `ghost_wgrad_dot`."""
    weight, rows = inputs * outputs, tokens * (inputs + outputs)
    flops = 2 * tokens * weight
    others = max(0, samples - 1)  # the first is written, and read with each direction
    contracted = 1.5 * directions * flops if tokens <= samples else 4 * (1 + directions) * samples * weight
    return {
        "two": (samples, flops, (1 + 2 * directions + others * (3 + directions)) * weight, rows),
        "prefix": (samples, flops, (1 + 2 * directions + others * (1 + directions)) * weight, rows),
        "native": (samples, flops + contracted, (1 + directions) * weight, rows),
        "direct": (samples, flops * (1 + directions), (1 + directions) * weight, rows),
    }


def pairwise_work(
    tokens: int, samples: int, val_samples: int, val_tokens: int, inputs: int, outputs: int
) -> dict[str, tuple[float, ...]]:
    """The same of `ghost_dot_pairwise`: `tokens` in all `samples`, `val_tokens` in each of `val_samples`."""
    weight, both, val_total = inputs * outputs, inputs + outputs, val_samples * val_tokens
    direct = 2 * (tokens * val_samples + val_total) * weight
    gradients = 2 * (tokens + val_total + samples * val_samples) * weight
    stored = samples + val_samples
    return {
        "pairwise": (val_samples, 2 * tokens * val_total * both, 0, tokens * val_total),
        "direct": (val_samples, direct, 2 * val_samples * weight, tokens * val_samples * both),
        "gradients": (stored, gradients, stored * weight, (tokens + val_total) * both),
    }


def quickest(
    costs: dict[str, Cost], threads: int, work: dict[str, tuple[float, ...]], margin: float = _EXACT
) -> Choice:
    """The form of the least predicted time; "prefix" has to be so many times quicker than "two"."""
    return _least({form: costs[form].seconds(of_form, threads) for form, of_form in work.items()}, margin)


def _least(seconds: dict[str, float], margin: float) -> Choice:
    rounds = "prefix" in seconds and seconds["prefix"] * margin > seconds["two"]
    best = min((form for form in seconds if not (rounds and form == "prefix")), key=seconds.__getitem__)
    others = ", ".join(f"{form} {s * 1e3:.3g}" for form, s in seconds.items() if form != best)
    return Choice(best, seconds, f"{best}: predicted {seconds[best] * 1e3:.3g} ms, others {others}")
