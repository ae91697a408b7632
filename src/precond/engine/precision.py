"""In what precision kernels multiply matrices."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

WIDE = 128 * 128
"""Entries of a matrix from which on its products are faster in 16 bits than in 32, where the processor has instructions for them."""


def in_16_bits(weight: Tensor) -> bool:
    """Whether products with a matrix are to be taken in bfloat16: one of float32 and some size, on a processor that multiplies it."""
    return weight.dtype == torch.float32 and weight.numel() >= WIDE and multiplies_bfloat16()


@cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has instructions for products of bfloat16, and torch a library that uses them.

    Without them such products take up to 40 times as long as those of float32. What the processor says decides, not a measurement:
    replicas of a model must not differ.
    """
    has = torch.cpu.get_capabilities()
    return torch.backends.mkldnn.is_available() and any(has.get(name, False) for name in ("avx512_bf16", "amx_bf16", "bf16"))
