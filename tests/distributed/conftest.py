from __future__ import annotations

from collections.abc import Iterator

import pytest

from distributed.pool import Pool


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("ranks"))
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Four ranks."""
    pool = Pool(tmp_path_factory.mktemp("four"), 4)
    yield pool
    pool.stop()
