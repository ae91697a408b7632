"""Steps in CUDA graphs: nothing that changes from step to step is on the host, but for which program a step is."""

from __future__ import annotations

import pytest

from contract.table import TWINS, rounding
from device import training

TORCH_NAMED = [str(twin) for twin in TWINS]
WHOLE = [
    *TORCH_NAMED, "plain", "RMS from the first gradient", "RMS, proximal L1", "composition", "route", "momentum of tangents, amsgrad",
    "muon",
]  # fmt: skip
PERIODIC = ["soap", "soap, rank", "shampoo"]


@pytest.mark.parametrize("name", WHOLE)
def test_one_graph_repeats_every_step(device, name):
    found = device.run(training.captured_row, name)
    assert found.programs == 1
    assert found.distance <= rounding(name)
    assert found.counts == {30.0}
    assert not found.count.reads and not found.count.copies_in and not found.count.copies_out


@pytest.mark.parametrize("name", WHOLE)
def test_a_graph_may_skip_a_step(device, name):
    found = device.run(training.captured_row, name, 30, 3, (0, 5, 11))
    assert found.programs == 1
    assert found.distance <= rounding(name)
    assert found.counts == {27.0}


@pytest.mark.parametrize("name", PERIODIC)
def test_a_graph_for_each_program_repeats_its_steps(device, name):
    found = device.run(training.captured_row, name, 40, 16)
    assert 1 < found.programs <= 12
    assert found.distance <= 1e-9
    assert found.counts == {40.0}
    assert not found.count.reads and not found.count.copies_in and not found.count.copies_out
