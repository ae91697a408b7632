"""One thread; and torchvision, which timm imports, where its compiled part does not fit the torch that is installed."""

import importlib
import importlib.util

import pytest
import torch


def _declare_operators() -> torch.library.Library | None:
    """Declare what torchvision's Python asks for by name and no test calls, where "operator torchvision::nms does not exist"."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        declared = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        return declared
    return None


_declared = _declare_operators()  # as long as this lives


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)
    torch.manual_seed(0)
