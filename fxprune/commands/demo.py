"""``fxprune demo``."""

from __future__ import annotations

import argparse
from pathlib import Path

from .. import demo


def run(arguments: argparse.Namespace) -> int:
    """Prune a real model and show everything."""
    demo.run(Path(arguments.output), ratio=arguments.ratio)
    return 0
