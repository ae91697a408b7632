"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from pathlib import Path

_REMEDIES = {
    errno.EFBIG: "raise the limit of ulimit -f",
    **dict.fromkeys((errno.EISDIR, errno.ENOTDIR, errno.EEXIST), "name another place"),
}


class WriteError(OSError):
    """A file could not be written; what was there before is intact."""

    def __str__(self) -> str:
        return str(self.strerror)


def write_atomically(path: Path, content: bytes | str) -> None:
    """Write a file so that a crash at any moment leaves either the old content or the new.

    The content goes to a temporary file beside it, to the disk, and then under the name. The temporary file has a name of its own, so that
    processes that write the same file do not meet in it; what a killed one leaves of it, :func:`sweep` removes.

    Args:
        path: the file; its folder is made.
        content: bytes, or text, in which what UTF-8 has no bytes for (halves of surrogate pairs) is escaped.

    Raises:
        WriteError: where it cannot be written (disk full, no permission); the old file is intact.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else error.strerror or str(error)
        remedy = "free some space" if full else _REMEDIES.get(error.errno or 0, "make it writable")
        kept = "; the one written before is intact" if os.path.isfile(path) else ""
        raise WriteError(
            error.errno,
            f"cannot write {path} ({len(content):,} bytes): {reason}{kept}; {remedy} and run the same command again",
        ) from error


def sweep(folder: Path) -> None:
    """Remove what killed processes left half written; for those who know that nobody writes there now."""
    for file in folder.glob(f".{'[0-9a-f]' * 16}.tmp"):
        with contextlib.suppress(OSError):
            file.unlink()


def _sync_folder(folder: Path) -> None:
    # Without it a rename may be lost with the power; not every file system can.
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
