"""Offline compilation of the shipped configuration; ``make compile-check`` does all of them."""

import os
import subprocess
import sys
from pathlib import Path


def test_qwen3_8b_shape_compiles_without_spills():
    root = Path(__file__).parents[2]
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "benchmarks/kernels/compile_check.py", "--quick"],
        cwd=root,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    lines = result.stdout.splitlines()
    for kernel in (
        *("row_statistics", "candidate_scores", "select_and_move", "store_ring"),
        *("window_whitening", "token_distinctness"),
        *("window_scores", "remember_attention"),
    ):
        assert any(line.startswith(kernel) for line in lines), result.stdout
    for scoring in ("gumbel", "remembering", "uniform", "age"):
        assert any(line.startswith("select") and f" {scoring} " in line for line in lines)
    # Two programs share an SM, and two K tiles are in flight; the same beside the distinctness, and
    # where the first pass goes over the window as well.
    scored = [line.split() for line in lines if line.startswith(("row_stat", "candidate"))]
    assert [(cells[-5], cells[-2]) for cells in scored] == [("2", "1")] * 5
    for policy in ("vase", "distinct"):
        (prediction,) = (line for line in lines if line.startswith(policy) and "H200" in line)
        assert "candidate_scores" in prediction
        assert "select_and_move" in prediction
