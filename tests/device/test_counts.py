"""What a step launches, waits for and keeps on a device, of every recipe: no more than the table says."""

from __future__ import annotations

import pytest

from device.table import ROWS, cost_of


@pytest.mark.parametrize("name", ROWS)
def test_no_step_costs_more_than_its_limit(device, name):
    cost = device.run(cost_of, name)
    found = {what: cost.where(what).most_common(5) for what in ("launches", "reads", "mixed", "scattered")}
    assert not ROWS[name].now.passed(cost), found
    assert cost.mixed == 0, found
