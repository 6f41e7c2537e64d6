"""Compile every kernel for one GPU architecture, without a GPU, and print what the binaries contain as JSON.

    python compile_kernels.py 90        (TRITON_INTERPRET must not be set)

The package's own launch code runs on CPU tensors, so the kernels are specialised as a real launch would have
them; only the launch itself is replaced by a compilation for the architecture asked for.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from inrun_kernels import dot, pairwise, rows, wgrad_dot

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BATCH, TOKENS, INPUTS, OUTPUTS, VOCABULARY, DIRECTIONS = 4, 256, 1024, 512, 64, 2


class CompileOnly:
    """What the JIT asks of a driver before it launches."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def disassemble(cubin: bytes, what: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(TOOLS / "cuobjdump"), what, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def launches(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """name -> a launch of one kernel, with inputs of `dtype` at sizes that fill its default tile."""
    acts, grads = torch.empty(BATCH, TOKENS, INPUTS, dtype=dtype), torch.empty(BATCH, TOKENS, OUTPUTS, dtype=dtype)
    matrix, matrices = torch.empty(1, OUTPUTS, INPUTS), torch.empty(DIRECTIONS, OUTPUTS, INPUTS, dtype=dtype)
    row, table = torch.empty(DIRECTIONS, INPUTS), torch.empty(1, VOCABULARY, INPUTS)
    ids, segments = torch.zeros(BATCH, TOKENS, dtype=torch.int64), torch.zeros(9, dtype=torch.int32)
    return {
        "ghost_wgrad_dot": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, matrix, None),
        "ghost_wgrad_dot, segments": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, matrices, segments),
        "ghost_dot": lambda: dot.launch_dot(acts, grads, matrix, segments, False),
        "ghost_dot, O > I": lambda: dot.launch_dot(grads, acts, matrices.mT.contiguous(), None, True),
        "ghost_dot_pairwise": lambda: pairwise.launch_pairwise(acts, grads, acts, grads),
        "embedding_dot": lambda: rows.launch_embedding_dot(ids, acts, table, None, True, None),
        "norm_dot": lambda: rows.launch_row_dot(acts, acts, row, None, True),
        "bias_dot": lambda: rows.launch_row_dot(None, acts, row, None, True),
        "norm_wgrad_dot": lambda: rows.launch_row_wgrad_dot(acts, acts, row, None),
        "bias_wgrad_dot": lambda: rows.launch_row_wgrad_dot(None, acts, row, segments),
    }


def main(capability: int) -> None:
    compiled = []
    driver.set_active(CompileOnly(capability))  # type: ignore[arg-type]
    JITFunction.__getitem__ = lambda self, grid: (
        lambda *args, **kwargs: compiled.append(self.run(*args, grid=grid, warmup=True, **kwargs))
    )
    for dtype in (torch.bfloat16, torch.float32):
        for name, launch in launches(dtype).items():
            compiled.clear()
            launch()
            for kernel in compiled:
                sass, usage = (disassemble(kernel.asm["cubin"], what) for what in ("-sass", "-res-usage"))
                registers = re.search(r"REG:(\d+)", usage)
                assert registers is not None, usage
                report = {
                    "call": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "kernel": kernel.metadata.name,
                    "registers": int(registers[1]),
                    "shared": kernel.metadata.shared,
                    "spills": len(re.findall(r"\b(?:STL|LDL)\b", sass)),
                    "mma": sorted(set(re.findall(r"\b(HGMMA|HMMA)\b", sass))),
                }
                print(json.dumps(report), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
