"""Fuzzing: random networks (tests/fuzz.py), every prunable group of each pruned to random units, alone and all at once.

    python -m benchmarks.fuzz --programs 2000 --seed 0

Each plan is compared with the masked dense graph (`fxprune.verify`) and, where no normalised axis is cut, with the eager module
whose removed parameter slices were zeroed by plain indexing, in double precision. Program number i is made from the seed and i
alone, so any one can be made again: `--first i --programs 1`. Writes benchmarks/results/fuzz.json. Nothing that is reported is
timed, so the machine need not be idle.
"""

from __future__ import annotations

import argparse
import logging
import time
import traceback
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch

from benchmarks.common import RESULTS, header, write
from tests.fuzz import KINDS, TOLERANCE, Outcome, Program, check, generate


def measure(seed: int, number: int) -> tuple[Program, Outcome]:
    """Make and check one program; whatever goes wrong is part of the outcome."""
    program = generate(Random(f"{seed} {number}"))
    try:
        return program, check(program, number)
    except Exception:  # noqa: BLE001 - one program must not end the run
        return program, Outcome(problems=[f"crash: {traceback.format_exc(limit=-2)}"])


def main() -> None:
    """Run the programs and write what was found."""
    parser = argparse.ArgumentParser(description="random networks, pruned and compared")
    parser.add_argument("--programs", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0, help="number of the first program")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, default=RESULTS / "fuzz.json")
    arguments = parser.parse_args()
    arguments.repeats = 1
    torch.set_num_threads(arguments.threads)
    logging.getLogger("fxprune").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    totals: Counter[str] = Counter()
    kinds: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    worst, found, start = 0.0, [], time.perf_counter()
    for number in range(arguments.first, arguments.first + arguments.programs):
        program, outcome = measure(arguments.seed, number)
        kinds.update(step.kind for step in program.steps)
        totals.update(_counts(outcome))
        reasons.update([outcome.untraced.splitlines()[0]] if outcome.untraced else [])
        worst = max(worst, outcome.worst)
        if outcome.problems:
            found.append({"program": number, "text": str(program).splitlines(), "problems": outcome.problems})
            print(f"program {number}:", *outcome.problems, str(program), sep="\n  ", flush=True)
        if totals["programs"] % 50 == 0:
            print(f"{totals['programs']} programs, {time.perf_counter() - start:.0f} s, {dict(totals)}", flush=True)
    summary = {
        **totals,
        "wrong": len(found),
        "worst_error": worst,
        "tolerance": TOLERANCE,
        "share_with_prunable_groups": round(totals["with_prunable_groups"] / max(totals["programs"], 1), 4),
    }
    print(summary)
    result: dict[str, Any] = {**header(arguments), "summary": summary, "untraced": dict(reasons), "problems": found}
    write(arguments.output, {**result, "steps": {kind: kinds[kind] for kind in sorted(KINDS)}})


def _counts(outcome: Outcome) -> dict[str, int]:
    return {
        "programs": 1,
        "not_traced": int(bool(outcome.untraced)),
        "traced_at_fixed_sizes": int(outcome.fixed),
        "with_prunable_groups": int(outcome.prunable > 0),
        "groups": outcome.groups,
        "prunable_groups": outcome.prunable,
        "checks_with_verify": outcome.verified,
        "checks_with_zeroed_eager_module": outcome.masked,
    }


if __name__ == "__main__":
    main()
