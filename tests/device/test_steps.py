"""On a device every step is the CPU's, and nothing of it happens elsewhere."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from contract.table import EVERY, OWN, TWINS, rounding
from device import training

each = pytest.mark.parametrize("name", EVERY)
PLAIN = [n for n in EVERY if "SAM" not in n and "gradient norm" not in n]


def but(names: Iterable[str], failing: Iterable[str], reason: str) -> pytest.MarkDecorator:
    """All names; of those that fail today it is known, and news if they do not."""
    mark = pytest.mark.xfail(reason=reason, raises=AssertionError, strict=True)
    return pytest.mark.parametrize("name", [pytest.param(n, marks=mark) if n in failing else n for n in names])


ROOTS = {
    "whitening", "muon with whitening", "soap with whitening", "shampoo", "shampoo, sums, tiles, adaptive SAM in z",
    "KFAC on whitening", "auto, SAM in p", "auto, hyperball, SAM in p", "Polar, gradient norm in z, clipped", "BNP with Polar, heavy ball",
    "muon after whitening of power 1/2, SAM in z", "muon of power 1/2",
}  # fmt: skip


def tolerance(name: str) -> float:
    """How far a training may be from the CPU's, relative to its parameters: some thousand roundings, but for what does not wait.

    Roots are sums of inverses there, up to 1e-4 of the exact ones; leading eigenvectors follow by a few orthogonal iterations, and the
    one that the rank of ``auto``'s row asks for is not yet found then.
    """
    return 0.1 if name == "auto" else 1e-3 if name in ROOTS else rounding(name)


@each
def test_a_training_is_the_cpu_s(device, name):
    found = device.run(training.followed, name)
    assert found.distance <= tolerance(name)
    assert not found.strayed and not found.count.mixed and not found.count.scattered


WAITS = {
    "Muon, exact root, L2 in p", "shampoo, sums, tiles, adaptive SAM in z", "Shampoo, one side, qr, proximal L1",
    "Polar, gradient norm in z, clipped", "muon after whitening of power 1/2, SAM in z",
}  # fmt: skip


@but(EVERY, WAITS, "roots of maps are taken by eigendecompositions, which report on themselves")
def test_nothing_is_read_after_warm_up(device, name):
    count = device.run(training.followed, name).warm
    assert not count.reads and not count.copies_out


@each
def test_resume_from_the_host(device, name):
    same, strayed = device.run(training.resumed, name)
    assert same and not strayed


@pytest.mark.parametrize("name", OWN)
def test_parameters_may_be_on_several_devices(device, name):
    found = device.run(training.spread, name)
    assert found.distance <= tolerance(name)
    assert not found.strayed and not found.count.mixed


@pytest.mark.parametrize("name", OWN)
def test_each_device_is_stepped_by_itself(device, name):
    assert not device.run(training.spread, name).count.scattered


@pytest.mark.parametrize("name", PLAIN)
def test_a_loss_scale_and_an_overflow_come_as_tensors(device, name):
    distance, nothing_changed, _ = device.run(training.scaled, name)
    assert distance <= tolerance(name) and nothing_changed


TORCH_NAMED = [str(twin) for twin in TWINS]


@pytest.mark.parametrize("name", TORCH_NAMED)
def test_they_are_used_as_such(device, name):
    *_, reads = device.run(training.scaled, name)
    assert reads == 0


@pytest.mark.parametrize("where", ["cuda", "cpu"])
@pytest.mark.parametrize("name", PLAIN)
def test_a_learning_rate_may_be_a_tensor_of_either(device, name, where):
    distance, reads = device.run(training.tensor_lr, name, where)
    assert distance <= tolerance(name)
    assert not reads or name in WAITS


def test_compensated_16_bit_parameters(device):
    same, strayed = device.run(training.kahan)
    assert same and not strayed


@pytest.mark.parametrize("recipe", ["bnp", "whitening", "auto"])
def test_parameters_may_stand_on_the_device_in_the_forward_alone(device, recipe):
    distance, count = device.run(training.offloaded, recipe)
    assert distance <= 1e-4  # float32, of which roots take half the digits
    assert not count.mixed and not count.scattered
