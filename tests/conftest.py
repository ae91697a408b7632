"""What tests of all folders share, and one option: where the contract's nets are."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import fashion
from precond.lab.workloads.fashion_mnist import FOLDER


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default=None, help="run the contract's tests (tests/contract) there, say on cuda")


def pytest_configure(config: pytest.Config) -> None:
    """By the environment, which workers and the tables of cases read when they are imported."""
    if device := config.getoption("--device"):
        os.environ["PRECOND_DEVICE"] = device
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # equal bits in equal runs


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of Fashion-MNIST, or where it is not installed, of noise in its format."""
    return FOLDER if FOLDER.is_dir() else fashion.noise(tmp_path_factory.mktemp("fashion-mnist"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "fashion_mnist" in getattr(item, "fixturenames", ()):
            item.add_marker("fashion_mnist")
