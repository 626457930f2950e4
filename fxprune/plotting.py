"""What every plot needs: matplotlib (extra ``plot``), a place that can be written, a figure without a screen."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from .errors import UsageError
from .files import check_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KINDS = (".pdf", ".png", ".svg")


def check_plot(path: str | os.PathLike[str]) -> None:
    """See that a plot can be written, before there is anything to draw.

    Raises:
        UsageError: matplotlib is not there (extra ``plot``), or no file of one of `KINDS` can be written there.
    """
    check_file(Path(path), "a plot", KINDS)
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise UsageError(f"a plot needs matplotlib ({error}): pip install 'fxprune[plot]'") from error


def new_figure(width: float, height: float) -> Figure:
    """An empty figure (inches) that needs no screen; call `check_plot` first."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write a figure; the kind of file is by its name.

    Raises:
        UsageError: The file cannot be written.
    """
    try:
        figure.savefig(path, dpi=120)
    except OSError as error:
        raise UsageError(f"cannot write '{os.fspath(path)}': {error.strerror}") from error
