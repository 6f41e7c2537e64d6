"""The first-order directions of Adam for all parameters in one call and one pass over memory.

    d = gain / (1 - beta1^t) * g / (sqrt((beta2 * v + (1 - beta2) * g^2) / (1 - beta2^t)) + eps)

with g the validation gradient, v the second moment as the last step left it and t the number of this step. Source:
arXiv 2602.00329; g^2 stands in for the batch's own.

FLOPs: some 10 an element.  Bytes: v and g read once, d written once.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from inrun_kernels import native
from inrun_kernels.ops import use_triton

_GPU_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(slots=True)  # one for every parameter at every step: frozen ones take longer to make
class AdamPart:
    """One parameter's part of the call.

    Attributes:
        out: where its direction goes.
        val_grad: its validation gradient.
        moment: its `exp_avg_sq`; None before its first step.
        step: how many steps it has made: a number, or a float32 tensor on its device.
        gain: `lr * (1 - beta1)`, negative where the optimizer maximises.
        betas, eps: of its group.
    """

    out: Tensor
    val_grad: Tensor
    moment: Tensor | None
    step: float | Tensor
    gain: float
    betas: tuple[float, float]
    eps: float


def fits(part: AdamPart) -> bool:
    """Whether a kernel can read and write the part's tensors: dense and of one size; on a GPU aligned, and float32 or
    half of it; on a CPU float32."""
    out, step = part.out, part.step
    tensors = (out, part.val_grad) if part.moment is None else (out, part.val_grad, part.moment)
    for x in tensors:
        if not x.is_contiguous() or x.shape != out.shape:
            return False
    if not use_triton(None, out):
        return native.runs_float32(*tensors)
    for x in tensors:
        if x.dtype not in _GPU_DTYPES or x.data_ptr() % 16:
            return False
    return not isinstance(step, Tensor) or (step.dtype == torch.float32 and step.device == out.device)


def write_adam_directions(parts: Sequence[AdamPart]) -> None:
    """Write the direction of every part, each of which `fits`."""
    torch.autograd.graph.increment_version([part.out for part in parts])
    launched = [part for part in parts if use_triton(None, part.out)]  # not the empty ones
    if launched:
        from inrun_kernels.adam_kernel import launch_adam_directions

        launch_adam_directions(launched)
    if len(launched) < len(parts):
        native.adam_directions([part for part in parts if part.out.is_cpu])
