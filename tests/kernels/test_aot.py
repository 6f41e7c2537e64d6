"""Ahead-of-time compilation: every kernel's default config uses tensor cores, spills nothing and fits the chip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from inrun_kernels.config import CHIPS

pytest.importorskip("triton.backends.nvidia")
MATRIX_KERNELS = {"wgrad_dot_kernel", "_dot_kernel", "_pairwise_kernel"}
TENSOR_CORES = {"sm_80": ["HMMA"], "sm_90": ["HGMMA"], "sm_100": ["UTCHMMA"], "sm_120": ["HMMA"],
                "gfx942": ["v_mfma_f32"]}  # fmt: skip
ALL_KERNELS = {
    *MATRIX_KERNELS,
    "_rows_kernel",
    "_columns_kernel",
    "_segment_sum_kernel",
    "second_stage_kernel",
    "_adam_direction_kernel",
    "_norm_backward_kernel",
    "_norm_sums_kernel",
}
SCRIPT = Path(__file__).with_name("compile_kernels.py")


@pytest.mark.parametrize("chip", list(TENSOR_CORES))
def test_kernels_compile_to_what_the_chip_wants(chip, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, str(SCRIPT), "--json", "--few", chip]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    dtypes = {report["dtype"] for report in reports}
    assert dtypes >= ({"bfloat16"} if chip in ("sm_120", "gfx942") else {"bfloat16", "float16", "float32"})
    for dtype in dtypes:
        rounds = {"_round_kernel"} if dtype == "float32" and chip != "gfx942" else set()  # to TF32
        assert {report["kernel"] for report in reports if report["dtype"] == dtype} == ALL_KERNELS | rounds
    for report in reports:
        # AMD's matrix cores multiply float32 as it is.
        exact = chip != "gfx942" and report["dtype"] == "float32" and not report["call"].endswith("TF32")
        on_tensor_cores = report["kernel"] in MATRIX_KERNELS and not exact
        assert report["mma"] == (TENSOR_CORES[chip] if on_tensor_cores else []), report
        assert report["spills"] == 0, report
        assert report["shared"] <= CHIPS[chip].shared and report["programs"] != 0, report
