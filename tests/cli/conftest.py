"""Small tensors: more than one thread only waits for the others."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages without figures, where a test is about files and numbers: to draw them is most of a small run. ``whole`` runs draw theirs."""
    monkeypatch.setattr("precond.lab.report.style.svg_panels", lambda *_, **__: "<svg></svg>")
