"""``fxprune explore``."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..calibration import read_texts
from ..criteria import find_criterion
from ..errors import UsageError
from ..explorer.explore import check_reads, explore
from ..files import check_file
from ..plan import PrunePlan
from .common import console, load_model, progress


def run(arguments: argparse.Namespace) -> int:
    """Write a page about a model's prune groups."""
    check_file(Path(arguments.output), "an explorer", (".html",))
    plan = PrunePlan.load(arguments.plan) if arguments.plan else None
    if arguments.criterion is not None:
        find_criterion(arguments.criterion)
        if arguments.meta:
            raise UsageError("--criterion needs weights, and --meta reads none: leave one of them out")
    if arguments.calibration:
        check_reads(arguments.criterion)
        read_texts(arguments.calibration)
    model, tokenizer = load_model(arguments, meta=arguments.meta)
    with progress() as advance:
        page = explore(
            model,
            plan=plan,
            criterion=arguments.criterion,
            calibration=arguments.calibration,
            tokenizer=tokenizer,
            samples=arguments.samples,
            length=arguments.length,
            batch_size=arguments.batch_size,
            seed=arguments.seed,
            title=Path(arguments.model).stem if arguments.model.endswith(".gguf") else None,
            progress=advance,
        )
    page.save(arguments.output)
    console.print(f"wrote {arguments.output} ({len(page.html.encode()) / 1e6:.2f} MB); open it in any browser", markup=False)
    return 0
