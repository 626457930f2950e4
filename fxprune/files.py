"""Files that are whole at any time."""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from .errors import FxPruneError, UsageError
from .names import CONFIG_FILE, PLAN_FILE, REPORT_FILE, SPEC_FILE

PARTS = {
    *(CONFIG_FILE, PLAN_FILE, REPORT_FILE, "report.html", "report.md", "README.md", "generation_config.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "model.safetensors.index.json", SPEC_FILE),
}
"""Files of a checkpoint with endings that other things are written with too."""


def write_whole(
    path: str | os.PathLike[str], text: str | bytes, *, called: str = "", error: type[FxPruneError] = UsageError
) -> None:
    """Write a file in one step: beside it, flushed to the disk, then renamed.

    Args:
        path: The file; its directory must exist.
        text: All that is to be in it; written in UTF-8, bytes as they are.
        called: What it is, for the message: ``the plan``.
        error: What to raise.

    Raises:
        FxPruneError: The given kind: it cannot be written; what was there before is as it was.
    """
    target = Path(path)
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        try:
            with beside.open("wb") as file:
                file.write(text.encode() if isinstance(text, str) else text)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(target)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as failure:
        raise error(f"cannot write {called and called + ' '}'{os.fspath(path)}': {failure.strerror}") from failure


def check_file(path: Path, what: str, suffixes: Collection[str]) -> None:
    """Raise `UsageError` unless a file of one of these suffixes, in small or capital letters, can be written there."""
    if path.suffix.lower() not in suffixes:
        ending = f"{'one of ' * (len(suffixes) > 1)}{', '.join(sorted(suffixes))}"
        raise UsageError(f"cannot write {what} as '{path}': its name must end in {ending}")
    if not path.parent.is_dir():
        raise UsageError(f"there is no directory '{path.parent}' to write '{path.name}' to")
    if path.is_dir():
        raise UsageError(f"'{path}' is a directory; name a file")
    if path.is_file() and path.name in PARTS and (path.parent / CONFIG_FILE).is_file():
        raise UsageError(f"'{path}' is a part of the checkpoint '{path.parent}': it will not be replaced; name another file")


def read_json(path: str | os.PathLike[str], *, called: str = "", error: type[FxPruneError] = UsageError) -> Any:
    """Plain data out of a JSON file.

    Raises:
        FxPruneError: The given kind: it cannot be read, or is no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as failure:
        raise error(f"cannot read {called and called + ' '}'{os.fspath(path)}': {failure.strerror}") from failure
    except ValueError as failure:
        raise error(f"'{os.fspath(path)}' is not JSON: {failure}") from failure
