"""In what precision matrices are multiplied, and what is zero to rounding."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


@cache
def rounding(n: int, dtype: torch.dtype) -> float:
    """What is zero to rounding in a matrix of n rows, relative to the largest."""
    return n * torch.finfo(dtype).eps


WIDE = 128 * 128
"""Entries of a matrix from which on its products are faster in 16 bits than in 32, where the processor has instructions for them."""


def in_16_bits(weights: Tensor, members: int = 1) -> bool:
    """Whether products with a weight, or with several side by side, are to be taken in bfloat16.

    They are where weights are of float32 and some size, and there are instructions for such products.
    """
    return weights.dtype == torch.float32 and weights.numel() // members >= WIDE and _multiplies(weights.device)


def _multiplies(device: torch.device) -> bool:
    return multiplies_bfloat16() if device.type == "cpu" else _on(device)


@cache
def _on(device: torch.device) -> bool:
    """Whether an accelerator has instructions for products of bfloat16."""
    if device.type != "cuda":
        return False
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16, and torch a library that uses them.

    Without them such products take up to 40 times as long as those of float32. What the processor says decides, not a measurement:
    replicas of a model must not differ.
    """
    has = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
