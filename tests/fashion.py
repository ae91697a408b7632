"""Files of Fashion-MNIST's format."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import torch


def idx(values: torch.Tensor) -> bytes:
    """An IDX file of unsigned bytes."""
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.numpy().tobytes()


def written(folder: Path, images: torch.Tensor, labels: torch.Tensor) -> Path:
    """The same images and labels for training and for testing, plain and compressed."""
    for prefix in ("train", "t10k"):
        (folder / f"{prefix}-images-idx3-ubyte").write_bytes(idx(images))
        (folder / f"{prefix}-labels-idx1-ubyte.gz").write_bytes(gzip.compress(idx(labels), mtime=0))
    return folder


def noise(folder: Path, amount: int = 2000) -> Path:
    """Images of noise, as dark as the real ones, of ten classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (amount, 28, 28), generator=generator) * (
        torch.rand(amount, 28, 28, generator=generator) < 0.5
    )
    return written(folder, images.to(torch.uint8), torch.arange(amount, dtype=torch.uint8) % 10)
