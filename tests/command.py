"""The command in this process: what it is given, and what it answers."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest

from fxprune.cli import main

ROOT = Path(__file__).resolve().parents[1]

PLAIN = ("--recipe", "magnitude", "--criterion", "l1")
"""Equal widths by magnitude, nothing measured and nothing made up for."""


@dataclass
class Ran:
    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Standard error on one line: rich breaks long ones."""
        return " ".join(self.err.split())


Run = Callable[..., Ran]
"""The command, with its arguments."""


def call(capsys: pytest.CaptureFixture[str], *arguments: str) -> Ran:
    """Run the command; what was printed before does not count."""
    capsys.readouterr()
    try:
        status = main(list(arguments))
    except SystemExit as exit:
        status = cast(int, exit.code)
    captured = capsys.readouterr()
    return Ran(status, captured.out, captured.err)


def everything(directory: Path) -> dict[str, bytes]:
    """What each file of a directory holds."""
    return {str(p): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def beside_links(
    place: Path, here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str
) -> Iterator[Run]:
    """The command with its first words, in an empty directory that shows the files of another: what a fixture yields."""
    monkeypatch.chdir(here)
    for path in place.iterdir():
        (here / path.name).symlink_to(path)
    yield lambda *arguments: call(capsys, *words, *arguments)
    logging.getLogger("fxprune").setLevel(logging.NOTSET)
