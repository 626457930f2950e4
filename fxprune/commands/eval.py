"""``fxprune eval``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from ..checkpoint.source import load_source
from ..errors import UsageError
from ..evaluation import TASKS, Evaluation, evaluate
from ..evaluation.contamination import read_seen, warning
from ..evaluation.run import read_material
from ..evaluation.tasks import check_numbers, check_tasks
from ..evaluation.text import PROTOCOLS
from ..files import check_file, read_json, write_whole
from ..names import EVALUATION_FILE
from ..reporting.numbers import numbers, read_record
from ..reporting.page import write_pages
from ..wording import listed
from .common import console, dump, load_model, progress, quiet_libraries

OUTPUTS = (".json", ".md")


def run(arguments: argparse.Namespace) -> int:
    """Perplexities, zero-shot tasks, cost and latency of a model, beside its dense model if that is named."""
    quiet_libraries()
    options = _options(arguments)
    seen = read_seen(arguments.model)
    before = _before(arguments)
    model, tokenizer = load_model(arguments)
    if tokenizer is None and (options["texts"] or options["tasks"]):
        raise UsageError(
            f"there is no tokenizer beside '{arguments.model}': copy its files there (tokenizer.json, tokenizer_config.json)"
        )
    with progress() as advance:
        found = evaluate(model, tokenizer, **options, dense=before, seen=seen, progress=advance)
        if arguments.dense and before is None:
            del model
            dense, _ = load_source(arguments.dense, dtype=arguments.dtype)
            _check_dense(arguments, sum(p.numel() for p in dense.parameters()))
            found = found.against(evaluate(dense.to(arguments.device), tokenizer, **options, progress=advance))
    if arguments.output:
        _write(Path(arguments.output), found)
    if arguments.attach:
        _attach(Path(arguments.model), found)
    _show(arguments, found)
    return 0


def _options(arguments: argparse.Namespace) -> dict[str, Any]:
    """Arguments of `evaluate`, all that can be checked without the model checked."""
    texts = dict(arguments.texts or {})
    if arguments.text:
        name = Path(arguments.text).name
        if name in texts:
            raise UsageError(f"'{name}' is the name of the text in --texts and of that in --text: give one of them another")
        texts[name] = arguments.text
    tasks = check_tasks(TASKS if arguments.tasks == ["all"] else arguments.tasks or ())
    if arguments.data and not tasks:
        raise UsageError("--data names a directory of task files: say --tasks all, or which; perplexity is measured on --text FILE")
    if not (texts or tasks or arguments.latency):
        raise UsageError("say what to measure: one or more of --text FILE, --texts NAME=FILE, --tasks all (or which) and --latency")
    if arguments.limit is not None and not tasks:
        raise UsageError("--limit is of rows of tasks: say --tasks all, or which")
    if arguments.batch_size is not None and not (texts or tasks):
        raise UsageError("--batch-size is of texts and tasks: latency is measured one sequence at a time")
    for option in ("length", "stride", "max_windows", "protocol"):
        if getattr(arguments, option) is not None and not texts:
            raise UsageError(f"--{option.replace('_', '-')} is of a perplexity: name a text with --text FILE or --texts NAME=FILE")
    batch = 8 if arguments.batch_size is None else arguments.batch_size
    protocol = PROTOCOLS[0] if arguments.protocol is None else arguments.protocol
    counts = {"limit": arguments.limit, "batch_size": batch, "max_windows": arguments.max_windows}
    check_numbers(**counts)
    read_material(texts, tasks, protocol=protocol, data=arguments.data, limit=arguments.limit)
    if arguments.output:
        check_file(Path(arguments.output), "an evaluation", OUTPUTS)
    if arguments.attach:
        read_record(arguments.model)
    if arguments.dense and not arguments.dense.endswith((".gguf", ".json")):
        dense = load_source(arguments.dense, meta=True)[0]  # a wrong one is told before hours of measuring
        _check_dense(arguments, sum(p.numel() for p in dense.parameters()))
    elif arguments.dense and not Path(arguments.dense).is_file():
        raise UsageError(f"there is no file '{arguments.dense}'")
    return {
        "texts": texts,
        "tasks": tasks,
        "lengths": arguments.length,
        "stride": arguments.stride,
        "protocol": protocol,
        "data": arguments.data,
        "latency": arguments.latency,
        **counts,
    }


def _before(arguments: argparse.Namespace) -> Evaluation | None:
    """The evaluation of the dense model that a file named by ``--dense`` holds; None where a model is named, or nothing."""
    if not arguments.dense or not arguments.dense.endswith(".json"):
        return None
    if arguments.latency:
        raise UsageError("--latency is compared with the dense model's of the same run: name the model with --dense, not a file")
    try:
        found = Evaluation.from_json(read_json(arguments.dense))
    except UsageError as error:
        raise UsageError(f"cannot compare with '{arguments.dense}' (--dense): {error}") from error
    _check_dense(arguments, found.cost.parameters)
    return found


def _check_dense(arguments: argparse.Namespace, here: int) -> None:
    """Raise `UsageError` where numbers of a model that a checkpoint was not made from would stand in its report."""
    if not arguments.attach:
        return
    before = read_record(arguments.model).report.get("parameters_before")
    if before not in (None, here):
        raise UsageError(
            f"'{arguments.model}' was made from a model of {before:,} parameters, and '{arguments.dense}' (--dense) has {here:,}: "
            "name its own, or leave --attach out"
        )


def _attach(directory: Path, found: Evaluation) -> None:
    """Keep an evaluation with its checkpoint, together with what was measured before in the same way; say what of that goes."""
    before, why = read_record(directory), ""
    if before.evaluation is not None:
        try:
            found, why = found.with_earlier(Evaluation.from_json(before.evaluation))
        except UsageError as error:
            why = str(error)
    kept = {number.label for number in numbers(replace(before, evaluation=found.to_json()))}
    if gone := [number.label for number in numbers(before) if number.label not in kept]:
        otherwise = f", which was made otherwise ({why})" if why else ""
        note = f"this replaces the evaluation in '{directory}'{otherwise}: {listed(gone, 3)} of it are not measured again"
        console.print(f"note        {note}", markup=False)
    _write(directory / EVALUATION_FILE, found)
    write_pages(directory)


def _write(path: Path, found: Evaluation) -> None:
    write_whole(path, json.dumps(found.to_json(), indent=2) + "\n" if path.suffix.lower() == ".json" else found.markdown())


def _show(arguments: argparse.Namespace, found: Evaluation) -> None:
    only_text = bool(arguments.text) and not (arguments.texts or found.tasks or found.dense)
    out, warnings = Console(), [warning(overlap) for overlap in found.overlaps]
    if arguments.json or not out.is_terminal:  # else they stand among the notes, on the same screen
        for each in warnings:
            console.print(each, style="bold red", markup=False, highlight=False)
    if arguments.json:
        data = found.to_json()
        dump({"perplexity": data["perplexities"][0], **data} if only_text else data)
        return
    if not only_text and not out.is_terminal:
        print(found.markdown(), end="")
        return
    if not only_text:
        out.print(found.table())
    for note in found.notes():
        out.print(note, style="bold red" if note in warnings else None, markup=False, highlight=False, soft_wrap=True)
