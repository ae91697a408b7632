"""What tests of all folders share."""

from pathlib import Path

import pytest

import fashion
from precond.workloads.fashion_mnist import FOLDER


@pytest.fixture(scope="session")
def fashion_mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of Fashion-MNIST, or where it is not installed, of noise in its format."""
    return FOLDER if FOLDER.is_dir() else fashion.noise(tmp_path_factory.mktemp("fashion-mnist"))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "fashion_mnist" in getattr(item, "fixturenames", ()):
            item.add_marker("fashion_mnist")
