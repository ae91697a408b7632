"""Hugging Face's Trainer in two processes: replicas end alike, work on matrices is divided, and a checkpoint resumes bit for bit."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed: make integrations")
pytest.importorskip("accelerate", reason="Accelerate is not installed: make integrations")

from integrations.ddp_script import kept, trainer
from integrations.test_transformers import inside

RECIPES = ["adamw", "auto", "soap", "SAM in z"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trainer")
    script = Path(__file__).with_name("ddp_script.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script), str(folder)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([*command, *RECIPES], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("recipe", RECIPES)
def test_two_processes(folder, tmp_path, recipe):
    first, second = (torch.load(folder / f"{recipe}{rank}.pt") for rank in range(2))
    for name, p in first["params"].items():
        assert torch.equal(p, second["params"][name]), name
        assert torch.equal(p, first["resumed"][name]), name
        assert torch.equal(p, second["resumed"][name]), name
    if recipe in ("auto", "soap"):
        alone = trainer(tmp_path, recipe, max_steps=1)
        alone.train()
        whole = kept(inside(alone))
        assert max(first["kept"], second["kept"]) < 0.75 * whole <= 0.75 * (first["kept"] + second["kept"])
