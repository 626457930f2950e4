"""A directory that is whole at any time: made beside its place, put there when it is done, with nothing else lost for it."""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from ..errors import CheckpointError, UsageError
from ..names import CONFIG_FILE, PLAN_FILE

PART, OLD = ".part", ".old"


@contextmanager
def new_directory(target: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """A temporary directory beside ``target`` that takes its place when the block ends well, and vanishes when it does not.

    What a process that was killed left of such directories of the same target vanishes too.

    Raises:
        UsageError: The target exists (and may not be overwritten), or its parent cannot be written to.
        CheckpointError: The disk is full, or writing failed otherwise. An old directory is then as it was.
    """
    typed, target = target, Path(os.path.abspath(target))
    check_target(typed, overwrite=overwrite)
    made = [p for p in target.parents if not p.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _sweep(target)
        work, lock = _beside(target, PART)
    except OSError as error:
        _remove_empty(made)
        raise UsageError(f"cannot write beside '{typed}': {error.strerror}") from error
    try:
        yield work
        _let_read(work)
        _put_in_place(work, target)
        _sweep(target)
    except Exception as error:
        trouble = None if isinstance(error, CheckpointError) else _disk_trouble(error)
        if trouble is None:
            raise
        raise CheckpointError(f"could not write '{typed}': {trouble}; nothing was left behind") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)
        _remove_empty(made)


def check_apart(output: str | os.PathLike[str], **read: Iterable[str | os.PathLike[str] | None]) -> None:
    """Refuse to replace what a run reads.

    Args:
        output: The directory that would be replaced.
        **read: For each argument the files and directories that it names; None is none.

    Raises:
        UsageError: One of them is in the output.
    """
    place = Path(os.path.realpath(output))
    for argument, given in read.items():
        for name in given if place.is_dir() else ():
            found = None if name is None else Path(os.path.realpath(name))
            if found is not None and found.exists() and place in (found, *found.parents):
                raise UsageError(
                    f"'{name}' ({argument}=) is in the output directory '{output}', which would be replaced: choose another output"
                )


def check_not_model(output: str | os.PathLike[str], model: str | os.PathLike[str]) -> None:
    """Refuse to replace what a model is read from.

    Args:
        output: The directory that would be replaced.
        model: A directory, a file, or a hub id.

    Raises:
        UsageError: They are the same, or the model is in the output.
    """
    if not Path(output).exists() or not Path(model).exists():
        return
    if os.path.samefile(output, model):
        raise UsageError(f"the output '{os.fspath(output)}' is the model itself; choose another directory")
    if Path(os.path.realpath(output)) in Path(os.path.realpath(model)).parents:
        raise UsageError(f"the output '{os.fspath(output)}' holds the model '{os.fspath(model)}'; choose another directory")


def _beside(target: Path, suffix: str) -> tuple[Path, int]:
    """A new directory beside the target, and the descriptor that holds the lock on it: as long as that is open, none sweeps it."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=suffix, dir=target.parent))
        if (lock := _locked(path, needed=False)) is not None:
            return path, lock


def _locked(path: Path, *, needed: bool) -> int | None:
    """A descriptor with the lock on a directory; None where another process has it or has removed the directory.

    On a file system without locks None too if one is needed, and the bare descriptor if not.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except (FileNotFoundError, PermissionError):  # gone, or another user's
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        held = True
    except OSError as error:
        held = not needed and not isinstance(error, BlockingIOError)
    if held and path.exists():
        return descriptor
    os.close(descriptor)
    return None


def _sweep(target: Path) -> None:
    """Remove what killed processes left beside a target: parts of it, and, where it stands, what stood there before."""
    for suffix in (PART, OLD) if target.exists() else (PART,):
        for path in target.parent.glob(f".{glob.escape(target.name)}.????????{suffix}"):
            if (lock := _locked(path, needed=True)) is not None:
                shutil.rmtree(path, ignore_errors=True)
                os.close(lock)


def _let_read(work: Path) -> None:
    """Permissions as the user's umask has them: temporary directories, and files that safetensors writes, are private."""
    mask = os.umask(0)
    os.umask(mask)
    for path in (work, *work.rglob("*")):
        path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def _put_in_place(work: Path, target: Path) -> None:
    """Rename ``work`` to ``target``; what was there goes only once the new one stands."""
    if not target.exists():
        work.rename(target)
        return
    old, lock = _beside(target, OLD)
    try:
        target.rename(old / "was")
        try:
            work.rename(target)
        except BaseException:
            (old / "was").rename(target)
            raise
    finally:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        os.close(lock)


def _remove_empty(made: list[Path]) -> None:
    """Remove the directories that were made on the way, unless something is in them."""
    for path in made:
        with contextlib.suppress(OSError):
            path.rmdir()


def _disk_trouble(error: BaseException | None) -> str | None:
    """What the operating system said, from wherever it was wrapped; None for an error of another kind."""
    while error is not None:
        if isinstance(error, OSError | SafetensorError):
            return getattr(error, "strerror", None) or str(error)
        error = error.__cause__
    return None


def check_target(target: str | os.PathLike[str], *, overwrite: bool = False) -> None:
    """Raise `UsageError` if an output directory may not be written; called early, before anything is computed.

    Only a directory that holds a checkpoint is ever overwritten: a mistyped name must not cost anybody's files.
    """
    path = Path(target)
    if path.exists() and not path.is_dir():
        raise UsageError(f"the output '{path}' is a file; name a directory")
    if path.is_dir() and any(path.iterdir()):
        if not overwrite:
            raise UsageError(
                f"the output directory '{path}' exists and is not empty; choose another, or say overwrite=True (--overwrite)"
            )
        if not any((path / name).is_file() for name in (CONFIG_FILE, PLAN_FILE)):
            raise UsageError(f"the output directory '{path}' holds no checkpoint: it will not be replaced; choose another")
        within = sorted(p.name for p in path.iterdir() if p.is_dir() and not p.name.startswith("."))
        if within:
            raise UsageError(
                f"the output directory '{path}' holds other directories ('{within[0]}'): it will not be replaced; choose another"
            )
    nearest = next(p for p in Path(os.path.abspath(path)).parents if p.exists())
    if not nearest.is_dir():
        raise UsageError(f"cannot write '{path}': '{nearest}' is a file")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UsageError(f"cannot write '{path}': no permission to write in '{nearest}'")
