"""The Triton kernel of `adam.py`: all parameters in one launch and one pass over memory.

Bytes: the second moment and the validation gradient read once, the direction written once; tables of pointers and
numbers go with the launch, as torch's own multi-tensor optimizers have it.
"""

# Launches go through triton's JIT, whose signature pyright cannot see.
# pyright: reportCallIssue=false, reportArgumentType=false, reportGeneralTypeIssues=false

import math
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from inrun_kernels.config import ceil_div
from inrun_kernels.tiles import launch

_BLOCK = 2048
_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@triton.jit
def _write(out_ptr, grad_ptr, moment_ptr, offs, mask, has_moment, keep, add, share, eps):
    g = tl.load(grad_ptr + offs, mask=mask).to(tl.float32)
    v = tl.zeros_like(g)
    if has_moment:
        v = tl.load(moment_ptr + offs, mask=mask).to(tl.float32)
    root = tl.sqrt_rn(keep * v + add * g * g) + eps
    tl.store(out_ptr + offs, tl.div_rn(share * g, root).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _adam_direction_kernel(
    pointers_ptr,  # int64 [N, 6]: direction, gradient, moment or 0, step or 0, elements, first block
    numbers_ptr,  # float64 [N, 7]: steps made, log beta1, log beta2, beta2, 1 - beta2, gain, eps
    n_parts,
    POINTERS: tl.constexpr,
    NUMBERS: tl.constexpr,
    OUT: tl.constexpr,
    GRAD: tl.constexpr,
    MOMENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pid = tl.program_id(0)
    part, beyond = tl.cast(0, tl.int32), n_parts  # the last part whose first block is no later than this one
    while beyond - part > 1:
        middle = (part + beyond) // 2
        later = tl.load(pointers_ptr + middle * POINTERS + 5) > pid
        part, beyond = tl.where(later, part, middle), tl.where(later, middle, beyond)
    row, numbers = pointers_ptr + part * POINTERS, numbers_ptr + part * NUMBERS
    moment, step = tl.load(row + 2), tl.load(row + 3)
    out_ptr = tl.multiple_of(tl.load(row).to(tl.pointer_type(OUT)), 16)
    grad_ptr = tl.multiple_of(tl.load(row + 1).to(tl.pointer_type(GRAD)), 16)
    moment_ptr = tl.multiple_of(moment.to(tl.pointer_type(MOMENT)), 16)
    step_ptr = step.to(tl.pointer_type(tl.float32))
    count, first = tl.load(row + 4), tl.load(row + 5)

    made = tl.load(numbers) + tl.load(step_ptr, mask=step != 0, other=0.0).to(tl.float64)
    now = made + 1.0  # this step's number
    share = (tl.load(numbers + 5) / (1.0 - tl.exp(now * tl.load(numbers + 1)))).to(tl.float32)
    unbias = 1.0 / (1.0 - tl.exp(now * tl.load(numbers + 2)))
    keep, add = (tl.load(numbers + 3) * unbias).to(tl.float32), (tl.load(numbers + 4) * unbias).to(tl.float32)
    eps = tl.load(numbers + 6).to(tl.float32)

    offs = (pid - first) * BLOCK + tl.arange(0, BLOCK)
    if (pid - first + 1) * BLOCK <= count:  # without a mask loads are vectors
        _write(out_ptr, grad_ptr, moment_ptr, offs, None, moment != 0, keep, add, share, eps)
    else:
        _write(out_ptr, grad_ptr, moment_ptr, offs, offs < count, moment != 0, keep, add, share, eps)


def launch_adam_directions(parts: Sequence[Any]) -> None:
    """Write the direction of every `AdamPart`, each of which `adam.fits` and none is empty."""
    groups: dict[tuple[Any, ...], list[Any]] = {}
    for part in parts:
        moment = part.val_grad if part.moment is None else part.moment
        groups.setdefault((part.out.device, part.out.dtype, part.val_grad.dtype, moment.dtype), []).append(part)
    for (device, out, grad, moment), members in groups.items():
        # Python's own arrays: torch takes long over lists, and this is for every parameter at every step.
        pointers, numbers, first = array("q"), array("d"), 0
        of_rates: dict[tuple[Any, ...], tuple[float, ...]] = {}
        for part in members:
            step, count = part.step, part.out.numel()
            steps_at, made = (step.data_ptr(), 0.0) if isinstance(step, Tensor) else (0, step)
            moment_at = 0 if part.moment is None else part.moment.data_ptr()
            pointers.extend((part.out.data_ptr(), part.val_grad.data_ptr(), moment_at, steps_at, count, first))
            rates = made, part.betas, part.gain, part.eps
            if rates not in of_rates:
                logs = (math.log(beta) if beta else -math.inf for beta in part.betas)
                of_rates[rates] = (made, *logs, part.betas[1], 1 - part.betas[1], part.gain, part.eps)
            numbers.extend(of_rates[rates])
            first += ceil_div(count, _BLOCK)
        columns = len(pointers) // len(members), len(numbers) // len(members)
        tables = [torch.frombuffer(pointers, dtype=torch.int64), torch.frombuffer(numbers, dtype=torch.float64)]
        if device.type == "cuda":
            tables = [table.pin_memory().to(device, non_blocking=True) for table in tables]
        with torch.cuda.device_of(members[0].out):
            launch(
                _adam_direction_kernel,
                (first,),
                tables,
                (len(members),),
                POINTERS=columns[0],
                NUMBERS=columns[1],
                OUT=_TYPES[out],
                GRAD=_TYPES[grad],
                MOMENT=_TYPES[moment],
                BLOCK=_BLOCK,
                num_warps=8,
            )
