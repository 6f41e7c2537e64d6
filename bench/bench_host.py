"""What the host does for a scored step on a GPU, measured without one.

    python -m bench.bench_host

A small GPU step in eager mode waits for Python. Here a GPU's way through the library is taken on the CPU, with launches
that do nothing: all is as on a GPU (forms, plans, descriptors, memory for results) but the launches themselves, some
five microseconds each, and the products. What plain training of the same model takes is measured beside it, and taken
off. Values are what the memory happens to hold.
"""

import argparse
import contextlib
import copy
import itertools
import statistics
import time
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import inrun
from bench.measure import SEED
from bench.peers import LR
from inrun.config import GPTConfig
from inrun.errors import Pending
from inrun.gpt import GPT
from inrun.step import Step
from inrun.watch import Watch
from inrun_kernels import adam, native, norms, norms_kernel, ops, tiles, wgrad_dot

PHASES = ("begin", "forward", "backward", "update", "end")
BATCH, TOKENS, VOCABULARY = 2, 32, 256  # small: what torch computes here is no part of the question
launches = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--layers", type=int, default=12, help="of a GPT with biases and layer norms (default: 12)")
    parser.add_argument("--steps", type=int, default=60, help="that are measured (default: 60)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    config = GPTConfig(block_size=TOKENS, layers=args.layers, heads=1, width=64, bias=True, norm="layer", tied=True)
    model = GPT(config, VOCABULARY)
    with _as_on_a_gpu():
        taken = _measure(model, args.steps)
    plain, ours = ({p: statistics.median(t[p] for t in taken[name]) * 1e3 for p in PHASES} for name in taken)
    print(f"GPT of {args.layers} layers, bf16 autocast, fused AdamW; ms of the host, median of {args.steps} steps; "
          f"{launches} launches of kernels of ours in each")  # fmt: skip
    for name, ms in (("plain", plain), ("scored", ours), ("more", {p: ours[p] - plain[p] for p in PHASES})):
        print(f"{name:>8}  " + "  ".join(f"{p} {ms[p]:.2f}" for p in PHASES) + f"  all {sum(ms.values()):.2f}")


def _as_on_a_gpu() -> Any:
    """Tensors of the CPU take the way of a GPU's, up to the launch."""

    def launch(self: Any, grid: tuple[int, ...], *tensors: Any) -> None:
        global launches
        launches += 1
        _nothing(*tensors, *self._numbers, *self._constants.values())

    def use_triton(backend: str | None, *tensors: Tensor) -> bool:
        return backend != "torch" and all(x.numel() for x in tensors)

    scaled = Step.scaled
    stack = contextlib.ExitStack()
    for place, name, other in [
        (tiles.Launch, "__call__", launch),
        (native, "runs", lambda *tensors: False),
        *((module, "use_triton", use_triton) for module in (ops, norms, adam)),
        *((module, "multiprocessors", lambda device: 132) for module in (wgrad_dot, norms_kernel)),
        (Step, "scaled", lambda step, dots: torch.zeros_like(scaled(step, dots))),
        (Watch, "require_even", lambda *args: None),
        (Pending, "ask", lambda *args: None),
    ]:
        stack.enter_context(mock.patch.object(place, name, other))
    return stack


def _nothing(*arguments: Any) -> None: ...


def _measure(model: nn.Module, steps: int) -> dict[str, list[dict[str, float]]]:
    """Seconds of each phase of each step, plain and scored in turn."""
    global launches
    x, y = torch.randint(VOCABULARY, (2, BATCH, TOKENS))
    models = {"plain": model, "scored": copy.deepcopy(model)}
    optimizers = {name: torch.optim.AdamW(each.parameters(), lr=LR, fused=True) for name, each in models.items()}
    tracker = inrun.track(models["scored"], optimizers["scored"], check=False)
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in models}
    for i in range(steps + 10):  # the first ones plan the launches
        with tracker.validation():
            for p in models["scored"].parameters():
                if p.requires_grad:
                    p.grad = torch.ones_like(p)
        for name, each in models.items():
            launches = 0
            step = tracker.step(range(BATCH)) if name == "scored" else contextlib.nullcontext()
            marks = [time.perf_counter()]
            step.__enter__()
            marks.append(time.perf_counter())
            optimizers[name].zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(each(x).flatten(0, 1).float(), y.flatten())
            marks.append(time.perf_counter())
            loss.backward()
            marks.append(time.perf_counter())
            optimizers[name].step()
            marks.append(time.perf_counter())
            step.__exit__(None, None, None)
            marks.append(time.perf_counter())
            if i >= 10:
                taken[name].append({p: b - a for p, (a, b) in zip(PHASES, itertools.pairwise(marks), strict=True)})
    return taken


if __name__ == "__main__":
    main()
