from __future__ import annotations

from collections.abc import Iterator

import pytest

from distributed.pool import Pool


def _pool(factory: pytest.TempPathFactory, world: int) -> Iterator[Pool]:
    pool = Pool(factory.mktemp("ranks"), world)
    yield pool
    pool.stop()


@pytest.fixture(scope="session")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """One rank."""
    yield from _pool(tmp_path_factory, 1)


@pytest.fixture(scope="session")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Two ranks."""
    yield from _pool(tmp_path_factory, 2)


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Three ranks."""
    yield from _pool(tmp_path_factory, 3)


@pytest.fixture(scope="session")
def four(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Four ranks."""
    yield from _pool(tmp_path_factory, 4)
