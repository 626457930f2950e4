"""``fxprune compare``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from rich.console import Console

from ..files import check_file, write_whole
from ..reporting.compare import Comparison, compare


def _json(found: Comparison) -> str:
    return json.dumps(found.to_json(), indent=1) + "\n"


OUTPUTS = {".html": Comparison.html, ".md": Comparison.markdown, ".json": _json}


def run(arguments: argparse.Namespace) -> int:
    """Put checkpoints side by side."""
    output = None if arguments.output is None else Path(arguments.output)
    if output is not None:
        check_file(output, "a comparison", OUTPUTS)
    found = compare(*arguments.directories)
    if output is not None:
        write_whole(output, OUTPUTS[output.suffix.lower()](found))
        print(output)
        return 0
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(found.table())
    return 0
