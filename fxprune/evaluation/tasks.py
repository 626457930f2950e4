"""The seven zero-shot tasks of LLM-Pruner's tables: which there are, rows from local files, scores through lm-eval."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn

from ..data.sources import json_lines
from ..errors import UsageError, check_whole, nearest
from ..passes.batches import Progress

AVERAGED = {
    "boolq": "acc",
    "piqa": "acc",
    "hellaswag": "acc_norm",
    "winogrande": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "openbookqa": "acc_norm",
}
"""The metric that enters the average: the one in LLM-Pruner's tables (its issue 25 compares them with both metrics)."""

TASKS = tuple(AVERAGED)

METRICS = {name: ("acc",) if name in ("boolq", "winogrande") else ("acc", "acc_norm") for name in TASKS}
"""What lm-eval reports for a task; ``acc_norm`` divides a choice's log-likelihood by its characters."""

Row = dict[str, Any]


@dataclass(frozen=True)
class TaskScore:
    """How a model does on one task.

    Attributes:
        task: lm-eval's name.
        acc: Share of the rows whose right choice is the likeliest.
        acc_stderr: Its standard error; None for a single row.
        acc_norm: The same with log-likelihoods per character; None where lm-eval reports none.
        acc_norm_stderr: Its standard error.
        metric: ``acc`` or ``acc_norm``: which of them enters the average.
        chance: What guessing scores on these rows: the mean of 1 / choices.
        rows: Rows scored.
        source: File, or dataset and split.
        constant: What one answer, given to every row, scores; None where choices differ from row to row.
    """

    task: str
    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    metric: str
    chance: float
    rows: int
    source: str
    constant: float | None = None

    @property
    def score(self) -> float:
        """What enters the average."""
        return float(getattr(self, self.metric))

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


@dataclass(frozen=True)
class Scores:
    """What `score_tasks` found.

    Attributes:
        tasks: One score for each task, in the order asked for.
        cut: Requests that were longer than the model reads; lm-eval drops their first tokens.
        special_tokens: Whether the tokenizer put special tokens (a BOS) before each request.
        harness: Name and version of what scored.
    """

    tasks: tuple[TaskScore, ...]
    cut: int
    special_tokens: bool
    harness: str


def check_tasks(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each once.

    Raises:
        UsageError: There is no such task, or lm-eval is missing.
    """
    for name in names:
        if name not in TASKS:
            raise UsageError(f"unknown task '{name}'; {nearest(str(name), TASKS)}")
    if names:
        try:
            import lm_eval  # noqa: F401
        except ImportError as error:
            raise UsageError(f"zero-shot tasks need lm-eval ({error}): pip install 'fxprune[eval]'") from error
    return tuple(dict.fromkeys(names))


def score_tasks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] = TASKS,
    *,
    data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    progress: Progress | None = None,
) -> Scores:
    """Score a causal LM on multiple-choice tasks, zero-shot, through lm-eval.

    Prompts and metrics are lm-eval's own. It lets the tokenizer add its special tokens; the harness that LLM-Pruner's tables were
    made with added none, so a model whose tokenizer puts a BOS scores otherwise here than there.

    Args:
        model: A Hugging Face model, or anything that takes ``input_ids [batch, length]`` and returns logits.
        tokenizer: A Hugging Face tokenizer; it is not changed.
        tasks: Names out of `TASKS`.
        data: A directory with a file ``TASK.jsonl.gz`` or ``TASK.jsonl`` for each task, see `read_rows`; by default the datasets of
            lm-eval's own definitions, from the hub.
        limit: Only so many rows of each task, the first ones.
        batch_size: Requests at a time.
        progress: Called with (what, done, total).

    Raises:
        UsageError: lm-eval is missing, an unknown task, a missing or damaged file, a dataset that cannot be loaded, a number below
            1, a tokenizer that lm-eval cannot use.
        FxPruneError: The model's log-likelihoods are NaN.
    """
    names = check_tasks(tasks)
    check_numbers(limit=limit, batch_size=batch_size)
    files = read_tasks(data, names, limit)
    from .harness import run

    return run(model, tokenizer, names, files, limit=limit, batch_size=batch_size, progress=progress)


def check_numbers(**numbers: int | None) -> None:
    """Raise `UsageError` for a number that is given and below 1."""
    for name, number in numbers.items():
        if number is not None:
            check_whole(name, number, 1)


def read_tasks(
    data: str | os.PathLike[str] | None, names: Sequence[str], limit: int | None = None
) -> Mapping[str, tuple[list[Row], str]] | None:
    """For each task its rows and the name of the file; None if there is no directory to read from."""
    if data is None:
        return None
    if not Path(data).is_dir():
        raise UsageError(f"there is no directory '{os.fspath(data)}' with task files")
    return {name: read_rows(Path(data), name, limit) for name in names}


def read_rows(directory: Path, name: str, limit: int | None = None) -> tuple[list[Row], str]:
    """Rows of a task from ``NAME.jsonl.gz`` or ``NAME.jsonl``.

    A row has ``context`` (the whole prompt), ``choices`` (two texts or more) and ``label`` (the index of the right one), and in
    ``winogrande`` a ``suffix``: there the choices follow the context, and the suffix is what is scored (partial evaluation,
    Trinh & Le, 2018).

    Returns:
        (rows with just these fields, the file's name).

    Raises:
        UsageError: There is no such file, it cannot be read or holds no rows, or a row is not of this form.
    """
    path = next((p for p in (directory / f"{name}.jsonl.gz", directory / f"{name}.jsonl") if p.is_file()), None)
    if path is None:
        raise UsageError(f"there is no {name}.jsonl.gz (nor {name}.jsonl) in '{directory}'")
    rows: list[Row] = []
    for number, row in json_lines(path):
        rows.append(_checked(row, name, f"'{path.name}', line {number}"))
        if len(rows) == limit:
            break
    if not rows:
        raise UsageError(f"'{path.name}' holds no rows")
    return rows, path.name


def _checked(row: Any, name: str, where: str) -> Row:
    if not isinstance(row, dict):
        raise UsageError(f"{where}: a row must be an object with fields, not a {type(row).__name__}")
    wanted = ("context", "choices", "label", *(["suffix"] if name == "winogrande" else []))
    for field in wanted:
        if field not in row:
            raise UsageError(f"{where}: there is no field '{field}'; it has {', '.join(row) or 'none'}")
    choices, label = row["choices"], row["label"]
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(c, str) and c for c in choices):
        raise UsageError(f"{where}: 'choices' must be a list of two texts or more")
    if type(label) is not int or not 0 <= label < len(choices):
        raise UsageError(f"{where}: 'label' must be an index into the {len(choices)} choices, got {label!r}")
    for field in {"context", *wanted} - {"choices", "label"}:
        if not isinstance(row[field], str):
            raise UsageError(f"{where}: '{field}' must be a text, not a {type(row[field]).__name__}")
    return {field: row[field] for field in wanted}
