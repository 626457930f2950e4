"""``fxprune report``."""

from __future__ import annotations

import argparse

from ..reporting.page import render_report


def run(arguments: argparse.Namespace) -> int:
    """Render the pages of a checkpoint again from its JSON."""
    for path in render_report(arguments.directory, base_model=arguments.base_model):
        print(path)
    return 0
