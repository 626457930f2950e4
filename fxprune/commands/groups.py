"""``fxprune groups``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ..api import example_inputs
from ..capture import trace
from ..coupling import shared_groups, why
from ..errors import UsageError
from ..graph_files import check_graph, write_graph
from ..groups import Groups
from ..passes.dependency import find_groups
from ..pictures import check_picture, draw_block
from ..table import group_rows, group_table, wide_console
from .common import console, dump, load_model


def run(arguments: argparse.Namespace) -> int:
    """Show the prune groups of a model."""
    if arguments.picture:
        check_picture(Path(arguments.picture))
    elif arguments.block:
        raise UsageError("--block says what --picture draws: give --picture FILE with it")
    if arguments.export:
        check_graph(Path(arguments.export))
    idle = ("export", "picture", "json", "prunable", "expand")
    if arguments.why and (other := next((name for name in idle if getattr(arguments, name)), "")):
        raise UsageError(f"--why says what couples two parameters, and nothing else: leave out --{other}")
    if arguments.json and arguments.expand:
        raise UsageError("--json lists every group by itself, as --expand does in the table: leave out --expand")
    model, _ = load_model(arguments, meta=arguments.meta)
    found: Groups = find_groups(trace(model, example_inputs(model)))
    if arguments.why:
        why(found, *arguments.why)  # says so if they share no group
        for name in shared_groups(found, *arguments.why):
            print(f"{name}:")
            for step in why(found, *arguments.why, group=name):
                print(f"  {step}")
        return 0
    if arguments.export:
        write_graph(found.to_networkx(), arguments.export)
        console.print(f"wrote {arguments.export}", markup=False)
    if arguments.picture:
        draw_block(found, arguments.picture, arguments.block)
        console.print(f"wrote {arguments.picture}", markup=False)
    if arguments.json:
        dump([asdict(row) for row in group_rows(found, only_prunable=arguments.prunable)])
    if arguments.json or arguments.export or arguments.picture:
        return 0
    wide_console().print(group_table(found, only_prunable=arguments.prunable, expand=arguments.expand))
    return 0
