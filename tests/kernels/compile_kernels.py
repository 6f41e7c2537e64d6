"""Compile every kernel without a GPU, and show what the binaries contain.

    python compile_kernels.py                 a table for every chip
    python compile_kernels.py sm_90 wgrad     one chip, the launches whose name holds a word
    python compile_kernels.py --json --few    as JSON lines; one launch or two of each kernel (in float16 one), and in
                                              bfloat16 alone where a chip's other dtypes compile as an older one's

TRITON_INTERPRET must not be set, and the package must be importable (PYTHONPATH=.:kernels without an install).

The package's own launch code runs on CPU tensors, so the kernels are specialised as a real launch would have
them; only the launch itself is replaced by a compilation for the architecture asked for.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from inrun_kernels import adam, adam_kernel, dot, norms, norms_kernel, pairwise, rows, tiles, wgrad_dot
from inrun_kernels.config import Share

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
BATCH, TOKENS, INPUTS, OUTPUTS, VOCABULARY, DIRECTIONS = 4, 256, 1024, 512, 64, 2
CHIPS = ["sm_80", "sm_90", "sm_100", "sm_120", "gfx942"]
# Shared memory and registers of a multiprocessor, and the shared memory the system keeps for each program.
SHARED = {"sm_80": 164, "sm_90": 228, "sm_100": 228, "sm_120": 100}
REGISTERS, RESERVED = 65536, 1024
MATRIX_INSTRUCTIONS = re.compile(r"\b(UTC\w*MMA|HGMMA|HMMA|v_mfma_f32)")
FEW = (
    "wgrad two",
    "wgrad prefix, shared",
    "wgrad two, bias",
    "wgrad two, segments",
    "wgrad prefix, D float32",
    "wgrad two, TF32",
    "square",
    "dot",
    "pairwise",
    "embedding",
    "norm wgrad",
    "layer norm",
    "layer norm, wide",
    "layer norm, wide, M",
    "rms norm, wide",
    "adam",
)
VARIANTS = (*FEW[1:4], FEW[5], *FEW[-4:-1])  # of a kernel that is among the few already
EVERY_DTYPE = {"sm_80", "sm_90", "sm_100"}  # with --few
COLUMNS = ("call", "dtype", "kernel", "tile", "registers", "spills", "shared", "mma", "programs")


class CompileOnly:
    """What the JIT asks of a driver before it launches. Each chip is a device of its own: the JIT caches by device."""

    def __init__(self, chip: str):
        self.device = CHIPS.index(chip)
        nvidia = chip.startswith("sm_")
        self.target = GPUTarget("cuda", int(chip[3:]), 32) if nvidia else GPUTarget("hip", chip, 64)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int) -> int:
        return 0


def launches(dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """name -> a launch of one kernel, with inputs of `dtype` at sizes that fill its default tile."""
    acts, grads = torch.empty(BATCH, TOKENS, INPUTS, dtype=dtype), torch.empty(BATCH, TOKENS, OUTPUTS, dtype=dtype)
    wide, matrix = torch.empty(1, OUTPUTS, INPUTS), torch.empty(1, OUTPUTS, INPUTS, dtype=dtype)
    matrices, wides = (torch.empty(DIRECTIONS, OUTPUTS, INPUTS, dtype=x) for x in (dtype, torch.float32))
    widest = torch.empty(BATCH, TOKENS, norms.WIDEST // dtype.itemsize, dtype=dtype)
    along, alongs = (torch.empty(n, widest.shape[2]) for n in (1, 4 * DIRECTIONS))
    row, table = torch.empty(DIRECTIONS, INPUTS), torch.empty(1, VOCABULARY, INPUTS)
    vector = torch.empty(1, OUTPUTS)
    ids, segments = torch.zeros(BATCH, TOKENS, dtype=torch.int64), torch.zeros(9, dtype=torch.int32)
    odd = torch.empty(BATCH, TOKENS, OUTPUTS - 1, dtype=dtype)
    ragged = torch.empty(BATCH, TOKENS, INPUTS - 1, dtype=dtype), grads, matrix[..., 1:].contiguous()
    return {
        "wgrad two": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, matrix, None, None, "two", dtype),
        "wgrad two, shared": lambda: shared(acts, grads, matrix, None, None, "two", dtype),
        "wgrad prefix, shared": lambda: shared(acts, grads, matrix, None, None, "prefix", dtype),
        "wgrad two, shared, segments": lambda: shared(acts, grads, matrix, vector, segments, "two", dtype),
        "wgrad two, D float32": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, wide, None, None, "two"),
        "wgrad two, M": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, matrices, None, None, "two"),
        "wgrad two, segments": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, wide, None, segments, "two"),
        "wgrad two, ragged": lambda: wgrad_dot.launch_wgrad_dot(*ragged, None, None, "two"),
        "wgrad two, bias": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, wide, vector, None, "two", dtype),
        "wgrad two, bias, segments": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, wide, vector, segments, "two"),
        "wgrad prefix, bias": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, matrix, vector, None, "prefix"),
        "wgrad prefix": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, matrix, None, None, "prefix"),
        "wgrad prefix, D float32": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, wide, None, None, "prefix"),
        "wgrad prefix, M": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, matrices, None, None, "prefix"),
        "wgrad prefix, M, D float32": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, wides, None, None, "prefix"),
        "wgrad prefix, segments": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, wide, None, segments, "prefix"),
        "wgrad prefix, ragged": lambda: wgrad_dot.launch_wgrad_dot(*ragged, None, None, "prefix"),
        "wgrad two, TF32": lambda: in_tf32(wgrad_dot.launch_wgrad_dot, acts, grads, matrix, None, None, "two"),
        "wgrad prefix, TF32": lambda: in_tf32(wgrad_dot.launch_wgrad_dot, acts, grads, wide, None, None, "prefix"),
        "wgrad segments, TF32": lambda: in_tf32(wgrad_dot.launch_wgrad_dot, acts, grads, wide, None, segments, "two"),
        "square, TF32": lambda: in_tf32(wgrad_dot.launch_wgrad_dot, acts, grads, None, None, None, "two"),
        "pairwise, TF32": lambda: in_tf32(pairwise.launch_pairwise, acts, grads, acts, grads),
        "dot, TF32": lambda: in_tf32(dot.launch_dot, acts, grads, wide, None, False),
        "square": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, None, None, None, "two"),
        "square, segments": lambda: wgrad_dot.launch_wgrad_dot(acts, grads, None, None, segments, "two"),
        "dot": lambda: dot.launch_dot(acts, grads, wide, segments, False),
        "dot, O > I": lambda: dot.launch_dot(grads, acts, matrices.mT.contiguous(), None, True),
        "wgrad two, odd O": lambda: wgrad_dot.launch_wgrad_dot(acts, odd, matrix[:, 1:], vector[:, 1:], None, "two"),
        "dot, odd O": lambda: dot.launch_dot(acts, odd, matrix[:, 1:], None, False),
        "pairwise": lambda: pairwise.launch_pairwise(acts, grads, acts, grads),
        "embedding": lambda: rows.launch_embedding_dot(ids, acts, table, None, True, None),
        "norm": lambda: rows.launch_row_dot(acts, acts, row, None, True),
        "bias": lambda: rows.launch_row_dot(None, acts, row, None, True),
        "norm wgrad": lambda: rows.launch_row_wgrad_dot(acts, acts, row, None),
        "bias wgrad": lambda: rows.launch_row_wgrad_dot(None, acts, row, segments),
        "layer norm": lambda: norms_kernel.launch_norm_backward(
            acts, acts, acts[0, 0], (along[0], along[0]), row, row, segments, True
        ),
        "layer norm, wide": lambda: norms_kernel.launch_norm_backward(
            widest, widest, widest[0, 0], (along[0], along[0]), along, along, None, True
        ),
        "layer norm, wide, M": lambda: norms_kernel.launch_norm_backward(
            widest, widest, widest[0, 0], (along[0], along[0]), alongs, alongs, None, True
        ),
        "rms norm, wide": lambda: norms_kernel.launch_norm_backward(
            widest, widest, widest[0, 0], 1e-6, along, None, None, False
        ),
        "adam": lambda: adam_kernel.launch_adam_directions(
            [adam.AdamPart(*[matrix] * 3, 0.0, 1.0, (0.9, 0.99), 1e-8)] * 2
        ),
    }


def shared(*arguments: Any) -> None:
    """A weight gradient whose tiles several programs share."""
    plans = mock.patch.object(wgrad_dot, "_calls", {})
    with plans, mock.patch.object(wgrad_dot, "share", lambda tiles, units, *_: Share(1, 3, units, units, tiles + 3)):
        wgrad_dot.launch_wgrad_dot(*arguments)


def in_tf32(launch: Callable[..., object], *arguments: object) -> None:
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        launch(*arguments)
    finally:
        matmul.fp32_precision = before


def tool(name: str, *options: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout


def contents(kernel, chip: str) -> dict:
    """Registers, spills, shared bytes, matrix instructions and programs per multiprocessor of a compiled kernel."""
    shared, threads = kernel.metadata.shared, 32 * kernel.metadata.num_warps
    if chip == "gfx942":
        text = kernel.asm["amdgcn"]
        registers, spills = (int(re.search(rf"\.{n}:\s+(\d+)", text)[1]) for n in ("vgpr_count", "vgpr_spill_count"))
        programs = None
    else:
        usage = tool("cuobjdump", "-res-usage", cubin=kernel.asm["cubin"])
        registers, *local = (int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("REG", "STACK", "LOCAL"))
        # To disassemble takes as long as to compile: where there is something to find.
        to_read = any(local) or "mma" in kernel.asm["ptx"]
        text = tool("nvdisasm", "-c", "-ndf", cubin=kernel.asm["cubin"]) if to_read else ""
        spills = len(re.findall(r"\b(?:STL|LDL)\b", text))
        by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
        programs = min(by_registers, SHARED[chip] * 1024 // (shared + RESERVED), 2048 // threads)
    mma = sorted(set(MATRIX_INSTRUCTIONS.findall(text)))
    if mma == ["HGMMA"] and "WARPGROUP.DEPBAR.LE gsb0, 0x1" not in text:
        mma = ["HGMMA, each waited for"]  # ptxas found the accumulator touched while in flight
    buffers = [
        int(n)
        for n in re.findall(r"local_alloc : \(\) -> !ttg.memdesc<(\d+)x\d+x\d+x(?:b?f16|f32)", kernel.asm["ttgir"])
    ]
    if mma == ["HGMMA"] and min(buffers) < kernel.metadata.num_stages:
        mma = ["HGMMA, a buffer short"]  # a copy would overwrite what an instruction in flight still reads
    orders = re.findall(r"local_alloc : \(\) -> !ttg.memdesc<\d+x\d+x\d+xb?f16, (#\w+)", kernel.asm["ttgir"])
    if mma == ["HMMA"] and any(f"{x} = #ttg.swizzled_shared<{{vec = 1," in kernel.asm["ttgir"] for x in orders):
        mma = ["HMMA, banks in conflict"]  # an operand as it lies in memory, one row under the other
    return {"registers": registers, "spills": spills, "shared": shared, "mma": mma, "programs": programs}


def compiled(chip: str, dtypes: Sequence[torch.dtype], wanted: Callable[[str, torch.dtype], bool]) -> Iterator[dict]:
    """A report on each kernel that each launch of a wanted name compiles, for one chip."""
    kernels = []
    driver.set_active(CompileOnly(chip))  # type: ignore[arg-type]
    tiles.ON_CPU = chip

    def compile_only(self: JITFunction, grid: object) -> Callable:
        def run(*args, **kwargs):
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            tile = [value for name, value in kwargs.items() if name.startswith("BLOCK_")]
            tile += [kwargs.get("num_warps", 4), kwargs.get("num_stages", 3)]
            kernels.append((kernel, tile))

        return run

    JITFunction.__getitem__ = compile_only
    for dtype in dtypes:
        for name, launch in launches(dtype).items():
            if not wanted(name, dtype) or (name.endswith("TF32") and (dtype != torch.float32 or chip == "gfx942")):
                continue
            kernels.clear()
            launch()
            for kernel, tile in kernels:
                of_launch = {"call": name, "dtype": str(dtype).removeprefix("torch."), "kernel": kernel.metadata.name}
                yield {"chip": chip, **of_launch, "tile": "x".join(map(str, tile)), **contents(kernel, chip)}


def _is_one_of_few(name: str, dtype: torch.dtype) -> bool:
    return name in FEW and not (dtype == torch.float16 and name in VARIANTS)


def main(arguments: list[str]) -> None:
    options, words = ({x for x in arguments if x.startswith("--") == b} for b in (True, False))
    word = " ".join(words - set(CHIPS))
    few = "--few" in options
    for chip in [x for x in CHIPS if x in words] or CHIPS:
        dtypes = [torch.bfloat16, torch.float16, torch.float32][: 1 if few and chip not in EVERY_DTYPE else 3]
        for report in compiled(chip, dtypes, _is_one_of_few if few else lambda name, dtype: word in name):
            if "--json" in options:
                print(json.dumps(report), flush=True)
            else:
                print(chip, *(str(report[name]) for name in COLUMNS), sep=" | ", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
