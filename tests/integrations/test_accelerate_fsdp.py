"""Accelerate's FSDP2 in two processes: every recipe ends where one process ends on the joint batch, and resumes bit for bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from distributed.launching import in_two_processes
from integrations.table import RECIPES

pytest.importorskip("accelerate", reason="Accelerate is not installed: make integrations")

from integrations.fsdp_script import TWIN, ends

EACH = [*TWIN, *RECIPES]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_two_processes(Path(__file__).with_name("fsdp_script.py"), tmp_path_factory.mktemp("accelerate"), EACH)


@pytest.mark.parametrize("recipe", EACH)
def test_two_processes_end_where_one_ends(folder, recipe):
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    alone = ends(recipe)["params"]
    first, second = (torch.load(folder / f"{recipe}{rank}.pt") for rank in range(2))
    assert first["params"].keys() == alone.keys()
    for name, p in alone.items():
        assert torch.equal(first["params"][name], second["params"][name]), name
        assert torch.equal(first["params"][name], first["resumed"][name]), name
        # float64; sums of two halves are of another order
        torch.testing.assert_close(first["params"][name], p, rtol=0, atol=1e-10, msg=lambda m, name=name: f"{name}: {m}")
