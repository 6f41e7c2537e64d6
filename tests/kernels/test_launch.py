"""A launch that is remembered is the one that Triton made: the same arguments, to the same binary."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# Without a device: kernels are compiled for a chip, and what would be launched is written down.
SCRIPT = """
import json, sys
import torch
import triton.compiler.compiler as compiler
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor
import compile_kernels
from inrun_kernels import norms_kernel, tiles, wgrad_dot

driver.set_active(compile_kernels.CompileOnly("sm_90"))
tiles.ON_CPU = "sm_90"
seen = []

def shown(x):
    if isinstance(x, torch.Tensor):
        return [str(x.dtype), *x.shape]
    if isinstance(x, TensorDescriptor):
        return [shown(x.base), list(x.shape), list(x.strides), list(x.block_shape), x.padding]
    return x if isinstance(x, (int, float, bool, str, type(None))) else str(x)

class Written:
    def __get__(self, kernel, owner):
        if kernel is None:
            return self
        def run(x, y, z, stream, function, metadata, launch_metadata, enter, leave, *arguments):
            assert kernel.metadata.enable_fp_fusion  # whatever Triton's default is
            seen.append([kernel.hash, x, y, z, *map(shown, arguments)])
        return run

compiler.CompiledKernel._init_handles = lambda self: None
compiler.CompiledKernel.function = None
compiler.CompiledKernel.run = Written()

def launches(turn):
    acts, grads = torch.empty(3, 64, 128, dtype=torch.bfloat16), torch.empty(3, 64, 256, dtype=torch.bfloat16)
    direction, bias = torch.empty(1, 256, 128, dtype=torch.bfloat16), torch.empty(1, 256)
    offset = torch.empty(1 + 3 * 64 * 128, dtype=torch.bfloat16)[1:].view(3, 64, 128)  # which no descriptor can have
    row, weight = torch.empty(128), torch.empty(128)
    stats = torch.empty(3, 64, 1), torch.empty(3, 64, 1)
    before = len(seen)
    wgrad_dot.launch_wgrad_dot(acts, grads, direction, bias, None, "prefix", torch.bfloat16)
    wgrad_dot.launch_wgrad_dot(offset if turn % 2 else acts, grads, direction, None, None, "two", torch.bfloat16)
    norms_kernel.launch_norm_backward(acts, acts, weight, stats, row, row, None, True)
    return seen[before:]

print(json.dumps([launches(turn) for turn in range(4)]))
"""


def test_a_remembered_launch_is_tritons_own():
    """Twice what differs in how an operand lies, which must not be taken for the other."""
    pytest.importorskip("triton.backends.nvidia")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "kernels")])
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second, again, second_again = json.loads(done.stdout.splitlines()[-1])
    assert len(first) >= 6 and first == again and second == second_again
    assert first[0] == second[0] and first != second
