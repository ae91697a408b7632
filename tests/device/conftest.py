from __future__ import annotations

from collections.abc import Iterator

import pytest

from device.building import Unavailable
from device.process import Process


@pytest.fixture(scope="session")
def device() -> Iterator[Process]:
    try:
        process = Process()
    except Unavailable as why:
        pytest.skip(f"no pretended device: {why}")
    yield process
    process.stop()
