"""The device itself: what it charges for, where results are, and that no one else hears of it."""

from __future__ import annotations

import pytest
import torch

from device import operations


@pytest.mark.parametrize("name", operations.OPERATIONS)
def test_what_an_operation_is_charged(device, name):
    expected = {kind: n for kind, n in vars(operations.OPERATIONS[name]).items() if kind != "run"}
    assert device.run(operations.charged, name) == expected


def test_bytes_at_the_peak_are_those_of_two_temporaries(device):
    assert device.run(operations.bytes_of_a_sum) == (800, 400)


def test_a_basis_follows_in_the_memory_it_is_given(device):
    """Another matrix and what goes with columns; or blocks of a quarter, pieces, and what goes with columns."""
    assert 1.0 < device.run(operations.bytes_of_a_basis_that_follows, 1.0) < 1.2
    assert device.run(operations.bytes_of_a_basis_that_follows, 0.0) < 0.5


def test_results_say_where_a_real_device_would_have_them(device):
    assert device.run(operations.places) == {
        "sum": "cuda:1",
        "list": "cuda:1 cuda:0",
        "itself": "True",
        "module": "cuda:1 True",
        "forward": "cuda:1",
        "moved": "cuda:1",
    }


def test_other_tests_see_no_device(device):
    if torch.backends.cuda.is_built():
        pytest.skip("this torch knows real ones")
    with pytest.raises((RuntimeError, AssertionError), match="CUDA"):
        torch.ones(1, device="cuda")
