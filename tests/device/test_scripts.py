"""The scripts that measure devices run where there is none, so that they run where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    paths = os.pathsep.join(filter(None, [str(ROOT / "src"), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True, timeout=400
    )


def rows_of_gpu(folder: Path, *arguments: str) -> tuple[dict, dict]:
    out = folder / "gpu.json"
    done = run("benchmarks/gpu.py", "--device", "cpu", "--size", "small", "--backend", "eager", "--out", str(out), *arguments)
    assert done.returncode == 0, done.stderr
    assert [p.name for p in folder.iterdir()] == ["gpu.json"]  # nothing half-written is left
    found = json.loads(out.read_text())
    return found, {(row["optimizer"], row["mode"]): row for row in found["rows"]}


def test_gpu_times_every_optimizer(tmp_path):
    one = "tests/contract/test_torch.py::test_adamw_state_is_eight_bytes_a_parameter"
    found, rows = rows_of_gpu(tmp_path, "--modes", "eager", "--tests", one)
    assert found["contract"]["passed"] == 1 and not found["contract"]["failures"]
    for (name, _), row in rows.items():
        if name == "pytorch-optimizer SOAP" and "ModuleNotFoundError" in row.get("error", ""):
            continue  # need not be installed
        assert "error" not in row and row["finite"] and 0 < row["step_ms"] < row["ms"], row
    assert len(rows) > 12 and not found["unreached"]


def test_an_optimizer_that_fails_is_a_row(tmp_path):
    _, rows = rows_of_gpu(tmp_path, "--modes", "captured,compiled", "--only", "torch AdamW, fused", "--tests")
    assert "CUDA graphs need a GPU" in rows["torch AdamW, fused", "captured"]["error"]
    assert rows["torch AdamW, fused", "compiled"]["finite"]


def test_what_the_budget_does_not_reach_is_listed(tmp_path):
    found, rows = rows_of_gpu(tmp_path, "--budget", "1", "--only", "adamw", "--modes", "eager", "--tests")
    assert not rows and found["unreached"] == ["adamw, eager"]


def test_launches_prints_the_limits(device):
    pytest.importorskip("rich")
    done = run("benchmarks/launches.py", "sgd", "--where", "launches")
    assert done.returncode == 0, done.stderr
    assert "sgd" in done.stdout and "_fused_sgd_" in done.stdout
