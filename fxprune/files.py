"""Text files that are whole at any time."""

from __future__ import annotations

import os
from pathlib import Path

from .errors import UsageError


def write_whole(path: str | os.PathLike[str], text: str) -> None:
    """Write a file in one step: beside it, flushed to the disk, then renamed.

    Args:
        path: The file; its directory must exist.
        text: All that is to be in it, in UTF-8.

    Raises:
        UsageError: It cannot be written; what was there before is as it was.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            with beside.open("w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UsageError(f"cannot write '{os.fspath(path)}': {error.strerror}") from error
