"""One option for all tests: where the contract's nets are."""

from __future__ import annotations

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default=None, help="run the contract's tests (tests/contract) there, say on cuda")


def pytest_configure(config: pytest.Config) -> None:
    """By the environment, which workers and the tables of cases read when they are imported."""
    if device := config.getoption("--device"):
        os.environ["PRECOND_DEVICE"] = device
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # equal bits in equal runs
