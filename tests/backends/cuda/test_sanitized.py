"""Kernels of each kind read and write what is theirs, and do not race: compute-sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[3]
KINDS = (
    "quantize_kernels.py::test_blocks_along_both_axes[nvfp4-float32]",
    "quantize_kernels.py::test_blocks_along_both_axes[mxfp6-float32]",
    "quantize_kernels.py::test_drawn_bits_are_those_of_the_stream[mxfp4-8]",
    "quantize_kernels.py::test_rotated_numbers_are_near_the_reference",
    "quantize_kernels.py::test_rows_and_tensors[int8[tensor]*f32+zp-float32]",
    "lines_kernel.py::test_many_tiles_of_any_strides[False-e2m3[row]*f32]",
    "dequantize_kernel.py::test_narrower_results_are_rounded_once[mxfp6-dtype0]",
    "fused_kernels.py::test_rounded_between[nvfp4-dtype0]",
    "product_kernels.py::test_ranges_of_k_add_up[nvfp4-nvfp4]",
    "product_kernels.py::test_sums_of_bytes_are_exact",
    "words_kernel.py::test_as_near_as_sums_of_float32[nvfp4-sizes0]",
    "attention_kernel.py::test_shares_agree[3]",
)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_kernel_of_each_kind_is_clean(tool):
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        pytest.skip("compute-sanitizer is not on the path")
    run = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", "--target-processes", "all",
         sys.executable, "-m", "pytest", "-n", "0", "-p", "no:cacheprovider",
         *(f"tests/backends/cuda/test_{name}" for name in KINDS)],
        # every allocation by itself, so that what lies behind it is nobody's
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, cwd=ROOT,
        capture_output=True, text=True, check=False)
    assert run.returncode == 0, (run.stdout + run.stderr)[-3000:]


def test_the_names_are_of_tests(request: pytest.FixtureRequest):
    """One that is gone would leave the sanitizer with less to look at."""
    found = {item.nodeid for item in request.session.items}
    files = {name.partition("::")[0] for name in KINDS}
    if not all(any(f"test_{file}" in nodeid for nodeid in found) for file in files):
        pytest.skip("some tests were chosen")
    assert {f"tests/backends/cuda/test_{name}" for name in KINDS} <= found
