"""What the paper's experiments share: options, texts, and results that are kept row by row."""

from __future__ import annotations

import argparse
import functools
import json
import os
import shutil
import sys
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, header
from fxprune.calibration import read_texts
from fxprune.data import check_overlap, parse_sources, rows
from fxprune.errors import FxPruneError, UsageError, nearest
from fxprune.evaluation.text import PROTOCOLS, text_rows
from fxprune.plotting import check_plot, new_figure, save_figure
from fxprune.reporting.blocks import table

Row = dict[str, Any]

PROTOCOL = PROTOCOLS[0]
HEADS = {"c4": 1500, "books": 14047}
"""Rows of these files that may be calibrated or trained on: pages, and the paragraphs of all novels but the last. The rest is
for evaluation."""

EVALUATION = {
    "wikitext2": "wikitext2_raw_valid.txt.gz",
    "ptb": "ptb_valid.txt.gz",
    "c4": "c4_sample.jsonl.gz",
    "books": "books.jsonl.gz",
}
TEXTS = ("wikitext2", "ptb", "c4")
"""What experiments measure on unless they say otherwise."""

TRAINING = {
    "c4": "c4_sample.jsonl.gz",
    "wikitext": "wikitext2_raw_train_first1MB.txt.gz",
    "books": "books.jsonl.gz",
    "alpaca": "alpaca.jsonl.gz",
}


def parser(doc: str | None, output: str) -> argparse.ArgumentParser:
    """The options that every experiment takes."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument(
        "--model", default=None, metavar="ID", help="hub id, directory or .gguf file (default: SmolLM2-135M-Instruct)"
    )
    made.add_argument("--device", default="cpu", help="where the model is put (default: cpu)")
    made.add_argument("--dtype", default="float32", help="of the weights (default: float32)")
    made.add_argument("--data", default=os.environ.get("FXPRUNE_DATA"), metavar="DIR", help="the texts (default: $FXPRUNE_DATA)")
    made.add_argument("--calibration", choices=("c4", "wikitext", "books"), default="c4", help="(default: c4)")
    made.add_argument("--samples", type=int, default=128, help="calibration samples (default: 128)")
    made.add_argument("--length", type=int, default=128, help="tokens of a sample and of an evaluation window (default: 128)")
    made.add_argument("--windows", type=int, default=128, help="evaluation windows of each text, 0 for all (default: 128)")
    made.add_argument("--batch", type=int, default=8, help="evaluation windows at a time (default: 8)")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads (default: all cores)")
    made.add_argument("--output", type=Path, default=RESULTS / output, help="where the JSON goes (default: %(default)s)")
    made.set_defaults(repeats=1, texts=TEXTS)
    return made


def run(main: Callable[[Sequence[str] | None], None], arguments: Sequence[str] | None = None) -> int:
    """Call a script; what is the user's mistake becomes one line."""
    try:
        main(arguments)
    except FxPruneError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def pick(typed: str | None, known: Sequence[str]) -> list[str]:
    """The names of a comma-separated list, in the order of ``known``; all of them without a list.

    Raises:
        UsageError: An unknown name.
    """
    names = list(known) if typed is None else [n.strip() for n in typed.split(",")]
    for name in names:
        if name not in known:
            raise UsageError(f"unknown row '{name}'; {nearest(name, known)}")
    return [n for n in known if n in names]


@dataclass
class Data:
    """The texts, out of a directory that holds the files `EVALUATION` and `TRAINING` name.

    Raises:
        UsageError: There is no such directory.
    """

    directory: Path
    texts: Sequence[str] = TEXTS
    scratch: Path = field(default_factory=lambda: Path(tempfile.mkdtemp(prefix="fxprune_paper_")), repr=False)

    def __post_init__(self) -> None:
        weakref.finalize(self, shutil.rmtree, self.scratch, ignore_errors=True)

    @classmethod
    def of(cls, directory: str | None, texts: Sequence[str] = TEXTS) -> Data:
        """From the option ``--data``; the texts are those to evaluate on."""
        if not directory:
            raise UsageError("where are the texts? Pass --data DIR or set FXPRUNE_DATA; benchmarks/README.md says which files")
        if not Path(directory).is_dir():
            raise UsageError(f"there is no directory '{directory}' (--data)")
        return cls(Path(directory), texts)

    def file(self, name: str) -> Path:
        """A file of the directory; an unpacked one will do."""
        for path in (self.directory / name, self.directory / name.removesuffix(".gz")):
            if path.is_file():
                return path
        raise UsageError(f"'{self.directory}' (--data) holds no {name}")

    def _rows(self, name: str, part: str) -> Path:
        """The head of a file that is both trained and evaluated on, or what is left."""
        path = self.scratch / f"{name}_{part}.jsonl"
        if not path.is_file():
            head = HEADS[name]
            found = list(read_texts(self.file(TRAINING[name])))[slice(head) if part == "head" else slice(head, None)]
            if not found:
                raise UsageError(f"{TRAINING[name]} has {head} rows or fewer: none is left to evaluate on")
            path.write_text("".join(json.dumps({"text": text}) + "\n" for text in found))
        return path

    def training(self, name: str) -> Path:
        """A text to calibrate or train on; of C4 and books the first rows only."""
        return self._rows(name, "head") if name in HEADS else self.file(TRAINING[name])

    @functools.cached_property
    def evaluation(self) -> dict[str, Path]:
        """The texts to measure perplexity on; of C4 and books the last rows only."""
        return {n: self._rows(n, "tail") if n in HEADS else self.file(EVALUATION[n]) for n in self.texts}

    def evaluation_rows(self) -> dict[str, list[str]]:
        """Rows of each, as the protocol wants them."""
        return {name: text_rows(path, name=name, protocol=PROTOCOL) for name, path in self.evaluation.items()}

    def check(self, training: Sequence[str]) -> None:
        """Refuse to evaluate on what is calibrated or trained on.

        Raises:
            UsageError: They overlap, or a file is missing.
        """
        check_overlap(self.evaluation_rows(), {name: _words(self.training(name)) for name in training})


def _words(path: Path) -> list[str]:
    """All text in a file's rows, whatever the columns."""
    return ["\n".join(str(value) for value in row.values()) for row in rows(parse_sources(path)[0])]


class Book:
    """A result file that grows row by row: ``{"runs": [headers], "rows": [...]}``.

    A row has a ``key``, the settings that it depends on, and ``run``, the number of the header it was measured under.
    """

    def __init__(self, path: Path, arguments: argparse.Namespace, script: str) -> None:
        self.path, self.rows, self.runs = path, list[Row](), list[dict[str, Any]]()
        if path.is_file():
            try:
                kept = json.loads(path.read_text())
                self.rows, self.runs = list(kept["rows"]), list(kept["runs"])
            except (ValueError, KeyError, TypeError) as error:
                raise UsageError(f"'{path.name}' holds no results of this kind; name another file with --output") from error
        self.current = {**header(arguments), "command": _command(script, arguments)}
        self.used = False

    def find(self, key: Mapping[str, Any]) -> Row | None:
        """The row of these settings, if it was measured; one that failed counts as not measured."""
        wanted = json.loads(json.dumps(key))
        return next((r for r in self.rows if r["key"] == wanted and "error" not in r), None)

    def add(self, row: Row) -> None:
        """Keep a row, in place of an earlier one with the same key, and write the file."""
        if not self.used:
            self.runs.append(self.current)
            self.used = True
        row = json.loads(json.dumps({**row, "run": len(self.runs) - 1}))
        places = [i for i, r in enumerate(self.rows) if r["key"] == row["key"]]
        if places:
            self.rows[places[0]] = row
        else:
            self.rows.append(row)
        self.write()

    def write(self) -> None:
        """Write the file in one step."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".part")
        beside.write_text(json.dumps({"runs": self.runs, "rows": self.rows}, indent=1) + "\n")
        beside.replace(self.path)


def _command(script: str, arguments: argparse.Namespace) -> str:
    """The command with the machine's own paths left out."""
    words = [f"python -m benchmarks.paper.{script}"]
    for name, value in sorted(vars(arguments).items()):
        if name in ("output", "threads", "seed", "repeats", "texts") or value in (None, False, []):
            continue
        shown = {"data": "DIR", "torch_pruning": "DIR", "work": "DIR"}.get(name, value)
        words.append(f"--{name.replace('_', '-')}")
        if name == "model":
            shown = Path(value).name if Path(value).exists() else value
        if value is not True:
            several = shown if isinstance(shown, list | tuple) else [shown]
            words += ["=".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in several]
    return " ".join(words)


def show(columns: Mapping[str, Callable[[Row], Any]], rows: Sequence[Row]) -> None:
    """Print a table, numbers as they are meant to be read; columns that no row has are left out."""

    def cell(row: Row, column: Callable[[Row], Any]) -> str:
        try:
            value = column(row)
        except KeyError:
            return ""
        return f"{value:,.2f}" if isinstance(value, float) else str(value)

    cells = {name: [cell(row, column) for row in rows] for name, column in columns.items()}
    cells = {name: column for name, column in cells.items() if any(column)}
    print(table(list(cells), list(zip(*cells.values(), strict=True))))


def plot(path: Path, lines: Mapping[str, Sequence[tuple[float, float]]], *, x: str, y: str, scale: str = "linear") -> Path:
    """A line plot as a PNG file.

    Args:
        path: The result file; the plot is put beside it.
        lines: For each label its points.
        x: Of the axis.
        y: Of the axis.
        scale: Of the y axis: ``linear``, ``log``, or ``symlog``, which is linear below 0.01 and takes what is negative.

    Returns:
        Where it is.
    """
    target = path.with_suffix(".png")
    check_plot(target)
    figure = new_figure(8, 4.5)
    axes: Any = figure.add_subplot()
    for label, points in lines.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=3, label=label)
    axes.set(xlabel=x, ylabel=y)
    axes.set_yscale(scale, **({"linthresh": 0.01} if scale == "symlog" else {}))
    axes.grid(alpha=0.3)
    axes.legend()
    save_figure(figure, target)
    print(target)
    return target
