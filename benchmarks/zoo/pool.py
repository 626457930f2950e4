"""Many models, each in a forked process with a time limit: none can stop the others, and what has a row is not run again."""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import types

Job = tuple[str, str]
"""A task and a model type."""


def parser(doc: str | None, *, limit: float, workers: int) -> argparse.ArgumentParser:
    """The options of a benchmark over the zoo."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--tasks", nargs="+", default=list(types.TASKS), choices=types.TASKS)
    made.add_argument("--only", nargs="+", default=None, metavar="TYPE")
    made.add_argument("--shard", default="0/1", metavar="I/N", help="every N-th model, from the I-th")
    made.add_argument("--limit", type=float, default=limit, help="seconds for one model (default: %(default)s)")
    made.add_argument("--workers", type=int, default=workers, help="models at a time (default: %(default)s)")
    made.add_argument("--again", action="store_true", help="run models that have a row already")
    made.add_argument("--table", action="store_true", help="run nothing: join the rows that are there into the result")
    return made


def chosen(arguments: argparse.Namespace, path: Callable[[str, str], Path]) -> list[Job]:
    """The jobs that the options ask for; with ``--again`` their rows are removed."""
    index, parts = map(int, arguments.shard.split("/"))
    named = [(task, name) for task in arguments.tasks for name in types.types_of(task)]
    jobs = [job for job in named if not arguments.only or job[1] in arguments.only][index::parts]
    for job in jobs if arguments.again else ():
        path(*job).unlink(missing_ok=True)
    return jobs


@dataclass
class Finished:
    """A job that is over.

    Attributes:
        job: Which one.
        row: What its process had written by then; empty if nothing.
        end: How it ended: ``late`` if it was stopped, else the process's exit status.
        left: Jobs that are not over yet.
    """

    job: Job
    row: dict[str, Any]
    end: str
    left: int


def run(
    jobs: list[Job], path: Callable[[str, str], Path], work: Callable[[str, str, Path], None], *, limit: float, workers: int
) -> Iterator[Finished]:
    """Run every job that has no row yet.

    Args:
        jobs: Tasks and types.
        path: Where a job's row goes.
        work: Called in the forked process with task, type and a file that it may write the row to, more than once.
        limit: Seconds for one job.
        workers: Jobs at a time.
    """
    import transformers.models.auto.modeling_auto  # noqa: F401 - loaded once, before the forks

    context = multiprocessing.get_context("fork")
    waiting = [job for job in jobs if not path(*job).exists()]
    running: list[tuple[Any, Job, float]] = []
    while waiting or running:
        while waiting and len(running) < workers:
            job = waiting.pop(0)
            process = context.Process(target=_quietly, args=(work, *job, path(*job).with_suffix(".part")))
            process.start()
            running.append((process, job, time.monotonic()))
        time.sleep(0.05)
        for entry in list(running):
            process, job, since = entry
            late = time.monotonic() - since > limit
            if process.is_alive() and not late:
                continue
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
            process.join()
            running.remove(entry)
            part = path(*job).with_suffix(".part")
            row = json.loads(part.read_text()) if part.exists() else {}
            yield Finished(job, row, "late" if late else str(process.exitcode), len(waiting) + len(running))
            part.unlink(missing_ok=True)


def _quietly(work: Callable[[str, str, Path], None], task: str, model_type: str, part: Path) -> None:
    """In the forked process: one thread, and no warnings among the lines of progress."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    work(task, model_type, part)


def write(path: Path, row: Mapping[str, Any]) -> None:
    """Write a row in one step: whoever reads it finds a whole one."""
    beside = path.with_suffix(".new")
    beside.write_text(json.dumps(row, indent=1) + "\n")
    beside.replace(path)
