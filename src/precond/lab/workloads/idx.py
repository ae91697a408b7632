"""Reading IDX files, the format of MNIST and its relatives."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

# Third byte of the magic number: the type of the entries. All that these data sets use is unsigned bytes.
_UNSIGNED_BYTE = 0x08


class DataError(ValueError):
    """A data file is absent, damaged or not what it should be; the message names the file and the remedy."""


def read_idx(path: Path, ndim: int) -> Tensor:
    """The array of unsigned bytes in an IDX file.

    The file holds, big-endian, two zero bytes, the type (8), the number of dimensions, the dimensions as 32-bit integers, and
    the entries in row-major order.

    Args:
        path: the file; it is decompressed where its name ends in ``.gz``.
        ndim: the number of dimensions that it must have: 3 for images, 1 for labels.

    Returns:
        A uint8 tensor of the stated dimensions.

    Raises:
        DataError: where the file is damaged, naming it, what was expected and what was found.
    """
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: expected a complete gzip file, found a damaged one ({error}); fetch it again") from error
    magic = bytes((0, 0, _UNSIGNED_BYTE, ndim))
    if content[:4] != magic:
        raise DataError(
            f"{path}: expected an IDX file of unsigned bytes in {ndim} dimensions (magic number {magic.hex()}), "
            f"found {content[:4].hex() or 'an empty file'}; fetch it again, or check that it is the right file"
        )
    header = 4 + 4 * ndim
    if len(content) < header:
        raise DataError(f"{path}: expected a header of {header} bytes, found {len(content)} bytes in all; fetch it again")
    shape = struct.unpack(f">{ndim}I", content[4:header])
    expected, found = math.prod(shape), len(content) - header
    if found != expected:
        raise DataError(
            f"{path}: expected {expected} entries of shape {' x '.join(map(str, shape))}, found {found}; fetch it again"
        )
    return torch.frombuffer(bytearray(content[header:]), dtype=torch.uint8).reshape(shape)
