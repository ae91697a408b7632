"""Methods of an optimizer stay out of the graphs of ``torch.compile``: they read numbers, and look at the model."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Given = ParamSpec("Given")
Made = TypeVar("Made")


def out_of_graphs(method: Callable[Given, Made]) -> Callable[Given, Made]:
    """A method at which graphs break; called by code that is not compiled it is called as it is, which costs less than torch's decorator."""
    outside: Callable[Given, Made] = torch._disable_dynamo(method)

    @wraps(method)
    def call(*args: Given.args, **kwargs: Given.kwargs) -> Made:
        return outside(*args, **kwargs) if torch.compiler.is_compiling() else method(*args, **kwargs)

    return call
