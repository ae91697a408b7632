"""Steps in CUDA graphs: nothing that changes from step to step is on the host, but for which program a step is."""

from __future__ import annotations

import pytest

from contract.table import TWINS, rounding
from device import training
from distributed.pool import Failed

WHOLE = [
    *map(str, TWINS), "plain", "RMS from the first gradient", "RMS, proximal L1", "composition", "route",
    "momentum of tangents, amsgrad", "muon",
]  # fmt: skip


@pytest.mark.parametrize("name", WHOLE)
def test_one_graph_repeats_every_step(device, name):
    found = device.run(training.captured, name)
    assert found.programs == 1
    assert found.distance <= rounding(name)
    assert found.counts == {24.0}
    assert not found.count.reads and not found.count.copies_in and not found.count.copies_out


@pytest.mark.parametrize("finds", ["scaler", "optimizer"])
@pytest.mark.parametrize("name", WHOLE)
def test_a_graph_skips_what_is_not_finite(device, name, finds):
    """Also the first step, of which bias corrections and first gradients must know nothing."""
    found = device.run(training.captured, name, 24, 3, (0, 5, 11), finds)
    assert found.programs == 1
    assert found.distance <= rounding(name)
    assert found.counts == {21.0}
    assert not found.count.reads and not found.count.copies_in and not found.count.copies_out


@pytest.mark.parametrize("name", ["soap", "soap, rank", "shampoo"])
def test_a_graph_for_each_program_repeats_its_steps(device, name):
    found = device.run(training.captured, name, 34, 16)
    assert 1 < found.programs <= 12
    assert found.distance <= 1e-9  # of some thousand roundings, through roots of matrices that are not well conditioned
    assert found.counts == {34.0}
    assert not found.count.reads and not found.count.copies_in and not found.count.copies_out


@pytest.mark.parametrize("name", [str(TWINS[-3]), "muon"])
def test_counts_go_where_they_are_asked_for(device, name):
    where, alike = device.run(training.where_steps_are_counted, name)
    assert where == ["cuda:0", "cpu", "cuda:0"] and alike


def test_what_is_not_capturable_says_so(device):
    with pytest.raises(Failed, match="is not capturable: make it with capturable=True"):
        device.run(training.uncapturable)
