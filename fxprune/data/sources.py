"""Where text comes from: local files and ``datasets`` names, read as rows, alone or as a weighted mixture."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TextIO, TypeAlias, cast

from ..errors import UsageError, nearest

TEXT_COLUMNS = ("text", "content", "document")
"""Columns that are read as text when none is named, in this order."""

WANTED = "text, content or document; instruction and output; prompt and completion; or turns in messages or conversations"
"""What a row should have."""

TEMPLATES = ("auto", "text", "alpaca", "prompt", "chat")

COLUMNS = {"alpaca": ("instruction", "input", "output"), "prompt": ("prompt", "completion")}
"""What templates that read several columns read, in this order."""

FILE_KINDS = (".txt", ".json", ".jsonl", ".csv", ".parquet")

Sources: TypeAlias = "str | os.PathLike[str] | Source | Iterable[str | os.PathLike[str] | Source] | Mapping[str, float]"

_HALF = re.compile(r"\\u[dD][89a-fA-F]")

_LONGEST = 255
"""Bytes that a part of a path may have on common file systems."""

_PART = re.compile(r"(?P<name>[^\[\]=]+)(?:\[(?P<column>[^\[\]]*)\])?(?:=(?P<weight>.*))?", re.DOTALL)


@dataclass(frozen=True)
class Source:
    """One source of rows.

    Attributes:
        name: A ``.txt``, ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file (``.gz`` too, but for parquet), or a ``datasets``
            name as ``name``, ``name:split`` or ``name:config:split``; the split is ``train`` by default.
        weight: Share of a mixture, relative to the other sources' weights.
        column: The column of text (of messages, for a chat); found by its name if None.
        template: How a row becomes text: ``auto`` (by its columns), ``text``, ``alpaca``, ``prompt`` or ``chat``; see `render`.

    Raises:
        UsageError: An empty name, an impossible weight, an unknown template, or a column beside a template that reads several.
    """

    name: str
    weight: float = 1.0
    column: str | None = None
    template: str = "auto"

    def __post_init__(self) -> None:
        if not self.name.strip():
            raise UsageError("a source of text needs a name: a file, or a dataset as name, name:split or name:config:split")
        named = "\n" not in self.name and max(len(part.encode()) for part in self.name.split("/")) <= _LONGEST
        if not named and not os.path.isfile(self.name):
            raise UsageError(f"'{self.name.strip()[:40]}...' is a text, and not the name of one: write it to a file, and name that")
        if self.column is not None and not self.column:
            raise UsageError(f"the column of '{self.name}' has no name: write {self.name}[column]")
        if not isinstance(self.weight, int | float) or not math.isfinite(self.weight) or self.weight <= 0:
            raise UsageError(f"the weight of '{self.name}' must be a positive number, got {self.weight}")
        if self.template not in TEMPLATES:
            raise UsageError(f"unknown template '{self.template}' of '{self.name}'; {nearest(self.template, TEMPLATES)}")
        if self.template in COLUMNS and self.column is not None:
            *most, last = COLUMNS[self.template]
            reads = f"{', '.join(most)} and {last}"
            raise UsageError(f"the template {self.template} reads the columns {reads}: leave out [{self.column}] of '{self.name}'")

    @property
    def label(self) -> str:
        """The name without folders, and the column if one was given; what messages and records call the source."""
        name = os.path.basename(self.name) if self.file is not None else self.name
        return name if self.column is None else f"{name}[{self.column}]"

    @property
    def file(self) -> Path | None:
        """The local file, None for a dataset.

        Raises:
            UsageError: The name can only be a file's, and there is none.
        """
        path = Path(self.name)
        if os.path.isfile(self.name):
            return path
        folder = Path(self.name.partition(":")[0])
        looks = path.suffix in (*FILE_KINDS, ".gz") or path.is_absolute() or self.name.startswith(".")
        if looks and not folder.is_dir():
            raise UsageError(f"there is no file '{self.name}'")
        return None

    @property
    def kind(self) -> str | None:
        """The file's format, one of `FILE_KINDS` (a file without a suffix is text); None for a dataset."""
        if self.file is None:
            return None
        suffixes = [s for s in self.file.suffixes if s != ".gz"]
        return suffixes[-1] if suffixes else ".txt"


def parse_sources(given: Sources) -> tuple[Source, ...]:
    """Sources from what a user writes.

    Args:
        given: ``"a.jsonl"``; ``"a.jsonl=0.7,b.txt=0.3"``, a mixture with weights; ``"b.csv[body]"``, with the column of text.
            A list of such strings or of sources, or a mapping of names to weights. A string that is a file's name is that file.

    Raises:
        UsageError: Nothing, a source twice, a weight that is no positive number, or something that cannot be read as a source.
    """
    if isinstance(given, Source):
        found = [given]
    elif isinstance(given, str | os.PathLike):
        found = list(_parse(os.fspath(given)))
    elif isinstance(given, Mapping):
        found = [replace(source, weight=weight) for name, weight in given.items() for source in _parse(os.fspath(name))]
    else:
        found = []
        for item in given:
            if not isinstance(item, str | os.PathLike | Source):
                raise UsageError(f"a source of text is a name or a Source, not a {type(item).__name__}")
            found += [item] if isinstance(item, Source) else _parse(os.fspath(item))
    if not found:
        raise UsageError("no source of text is given: name a file, or a dataset as name, name:split or name:config:split")
    seen = set()
    for source in found:
        if (key := (os.path.realpath(source.name) if os.path.isfile(source.name) else source.name, source.column)) in seen:
            raise UsageError(f"'{source.label}' is given twice: give it once, with the weight of both")
        seen.add(key)
    return tuple(found)


def by_name(sources: Iterable[Source]) -> dict[str, Source]:
    """Sources by the name that reports give them: the label, or the whole name where two labels are the same."""
    chosen = list(sources)
    labels = [s.label for s in chosen]
    return {s.label if labels.count(s.label) == 1 else _whole(s): s for s in chosen}


def _whole(source: Source) -> str:
    column = "" if source.column is None else f"[{source.column}]"
    return f"{source.name}{column}" if source.template == "auto" else f"{source.name}{column} ({source.template})"


def _parse(text: str) -> Iterator[Source]:
    if os.path.isfile(text) or "\n" in text:  # a path that is too long is no file, and no error
        yield Source(text)
        return
    for part in text.split(","):
        match = _PART.fullmatch(part.strip())
        if match is None:
            raise UsageError(f"cannot read '{part.strip()}' as a source of text: write name, name[column] or name=weight")
        weight = match["weight"]
        try:
            share = 1.0 if weight is None else float(weight)
        except ValueError:
            raise UsageError(f"the weight of '{match['name']}' must be a positive number, got '{weight}'") from None
        yield Source(match["name"], share, match["column"])


def rows(source: Source) -> Iterator[Mapping[str, Any]]:
    """Rows of a source, as they come; a line of a text file is a row with the one column ``text``.

    Text and JSON lines are read here, line by line, so that an error names the line; the rest is read by ``datasets``, streaming:
    nothing is written, and nothing outside the source's split is fetched.

    Raises:
        UsageError: There is no such file, or not of a known kind (at once); the file is damaged, the dataset cannot be loaded
            (when it is read).
    """
    path, kind = source.file, source.kind
    if path is None:
        return _dataset(source)
    if kind not in FILE_KINDS:
        raise UsageError(f"'{path.name}' is none of {', '.join(FILE_KINDS)} (.gz allowed)")
    return _mappings(_READERS[kind](path), path)


def _mappings(items: Iterable[Any], path: Path) -> Iterator[Mapping[str, Any]]:
    for item in items:
        if isinstance(item, str):
            yield {"text": item}
        elif isinstance(item, Mapping):
            yield item
        else:
            raise UsageError(f"'{path.name}' must hold texts or rows with a column of text, not a {type(item).__name__}")


def text_lines(path: Path) -> Iterator[str]:
    """The lines of a text file (``.gz`` too), empty ones as well, without their ends.

    Raises:
        UsageError: The file cannot be read.
    """
    with _reading(path, ".txt") as file:
        for line in file:
            yield line.removesuffix("\n")


def json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    """The values of a file with one JSON value a line (``.gz`` too), each with its line's number from 1 on; blank lines are none.

    Raises:
        UsageError: The file cannot be read, or a line is no JSON.
    """
    with _reading(path, ".jsonl") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                value = _whole_letters(line, json.loads(line.removesuffix("\n")))
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error
            yield number, value


def _list(path: Path) -> Iterator[Any]:
    with _reading(path, ".json") as file:
        written = file.read()
        items = _whole_letters(written, json.loads(written))
        if not isinstance(items, list):
            raise UsageError(
                f"'{path.name}' must hold a list of texts or of rows with a column of text, not a {type(items).__name__}"
            )
        yield from items


def _whole_letters(written: str, value: Any) -> Any:
    """JSON with half letters (an escaped surrogate without its other half, which no tokenizer takes) replaced by U+FFFD."""
    return _replaced(value) if _HALF.search(written) else value


def _replaced(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, list):
        return [_replaced(item) for item in value]
    return {_replaced(k): _replaced(v) for k, v in value.items()} if isinstance(value, dict) else value


def _table(kind: str, path: Path) -> Iterator[Mapping[str, Any]]:
    import datasets

    with _guarded(path, kind), tempfile.TemporaryDirectory() as cache:  # for the lock files of datasets
        yield from datasets.load_dataset(kind[1:], data_files=str(path), split="train", streaming=True, cache_dir=cache)


_READERS: Mapping[str, Callable[[Path], Iterator[Any]]] = {
    ".txt": lambda path: (line for line in text_lines(path) if line.strip()),
    ".jsonl": lambda path: (value for _, value in json_lines(path)),
    ".json": _list,
    ".csv": partial(_table, ".csv"),
    ".parquet": partial(_table, ".parquet"),
}


@contextmanager
def _reading(path: Path, kind: str) -> Iterator[TextIO]:
    with (
        _guarded(path, kind),
        cast(TextIO, (gzip.open if path.suffix == ".gz" else open)(path, "rt", encoding="utf-8-sig")) as file,
    ):
        yield file


@contextmanager
def _guarded(path: Path, kind: str) -> Iterator[None]:
    """Whatever a library raises on a damaged file becomes a word for the user."""
    try:
        yield
    except UsageError:
        raise
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UsageError(f"cannot read '{path.name}' as {kind[1:]}: {reason(error)}") from error


def _dataset(source: Source) -> Iterator[Mapping[str, Any]]:
    import datasets

    repo, *rest = source.name.split(":")
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    try:
        if len(rest) > 2 or not all((repo, *rest)):
            raise ValueError("too many or empty parts")
        yield from datasets.load_dataset(repo, config, split=split, streaming=True)
    except Exception as error:
        raise UsageError(
            f"'{source.name}' is neither a file nor a dataset that can be loaded ({reason(error)}); "
            "write name, name:split or name:config:split"
        ) from error


def reason(error: BaseException) -> str:
    """The kind of an error and the first line of what it says."""
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def text_of(row: Mapping[str, Any], source: Source) -> str:
    """The text in a row; an absent value (None) is an empty text.

    Raises:
        UsageError: The row has no such column, or something else than text in it.
    """
    if source.column is not None:
        if source.column not in row:
            raise UsageError(f"'{_plain(source)}' has no column '{source.column}'; {nearest(source.column, row)}")
        value = row[source.column]
        if not isinstance(value, str | None):
            raise UsageError(f"the column '{source.column}' of '{_plain(source)}' holds a {type(value).__name__}, not text")
        return value or ""
    found = next((row[c] for c in TEXT_COLUMNS if isinstance(row.get(c), str)), None)
    if found is None:
        if any(c in row and row[c] is None for c in TEXT_COLUMNS):
            return ""
        name = _plain(source)
        other = next((c for c in TEXT_COLUMNS if c in row), None)
        if other is not None:
            raise UsageError(f"the column '{other}' of '{name}' holds a {type(row[other]).__name__}, not text")
        raise UsageError(
            f"'{name}' has no column of text; it has {', '.join(row) or 'none'}, wanted {WANTED}; rename them, or name one as "
            f"{name}[column]"
        )
    return str(found)


def _plain(source: Source) -> str:
    return replace(source, column=None).label
