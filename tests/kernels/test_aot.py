"""Ahead-of-time compilation: every kernel's default config uses tensor cores, spills nothing and fits the chip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia")
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
MATRIX_KERNELS = {"_wgrad_dot_kernel", "_dot_kernel", "_pairwise_kernel"}
TENSOR_CORES = {80: ["HMMA"], 90: ["HGMMA"]}
ALL_KERNELS = {*MATRIX_KERNELS, "_row_dot_kernel", "_column_sum_kernel", "_segment_sum_kernel"}


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_to_what_the_chip_wants(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    script = Path(__file__).with_name("compile_kernels.py")
    run = subprocess.run(
        [sys.executable, str(script), str(capability)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    reports = [json.loads(line) for line in run.stdout.splitlines()]
    assert {report["kernel"] for report in reports} == ALL_KERNELS
    for report in reports:
        on_tensor_cores = report["kernel"] in MATRIX_KERNELS and report["dtype"] != "float32"
        assert report["mma"] == (TENSOR_CORES[capability] if on_tensor_cores else []), report
        assert report["spills"] == 0, report
        assert report["shared"] <= SHARED_LIMIT[capability], report
