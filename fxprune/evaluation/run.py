"""The whole evaluation of a model: cost, perplexities, zero-shot tasks, latency, each beside the dense model's."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..api import versions
from ..calibration import check_known, longest_input, vocabulary_of, warn_of_unknown
from ..data import parse_sources
from ..errors import UsageError
from ..passes.batches import Progress
from .contamination import find_overlaps
from .latency import check_latency, measure_latency
from .perplexity import perplexity, window_starts
from .result import Evaluation
from .size import measure_cost
from .tasks import TASKS, Row, Scores, check_numbers, check_tasks, read_tasks, score_tasks
from .text import PROTOCOLS, text_rows, token_stream

NEW = 16
"""Tokens that are decoded to measure latency."""


def evaluate(
    model: nn.Module,
    tokenizer: Any = None,
    *,
    texts: Mapping[str, str | os.PathLike[str]] | None = None,
    lengths: Sequence[int] | None = None,
    stride: int | None = None,
    max_windows: int | None = None,
    protocol: str = PROTOCOLS[0],
    tasks: Sequence[str] = TASKS,
    data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    latency: bool = False,
    dense: nn.Module | Evaluation | None = None,
    seen: Sequence[Mapping[str, Any]] = (),
    progress: Progress | None = None,
) -> Evaluation:
    """Measure a causal LM, and say with every number what it depends on.

    Everything that can be refused is refused before a model is run.

    Args:
        model: A Hugging Face causal LM, or one that `fxprune.load` gave. (A traced graph knows no vocabulary: `perplexity` and
            `fxprune.evaluation.score_tasks` take it.)
        tokenizer: Its tokenizer; needed for texts and tasks.
        texts: For each name a file or a ``datasets`` name to measure perplexity on, such as
            ``{"wikitext2": "wikitext2_raw_test.txt", "ptb": "ptb_valid.txt"}``.
        lengths: Tokens of the windows; a perplexity for each text and each length. None is 128, or what the model reads if that is
            less.
        stride: Tokens between window starts; by default the length: windows do not overlap.
        max_windows: Stop after so many of each text.
        protocol: How a text's rows become tokens, see `fxprune.evaluation.text.PROTOCOLS`.
        tasks: Names out of `fxprune.evaluation.tasks.TASKS`; none with ``()``.
        data: A directory with ``boolq.jsonl.gz`` and so on, see `fxprune.evaluation.tasks.read_rows`; by default from the hub.
        limit: Only the first rows of each task.
        batch_size: Requests at a time, and windows of up to 128 tokens; of longer ones fewer, so that memory stays the same.
        latency: Measure prefill and decode too.
        dense: The dense model, measured in the same way, or an evaluation of it from before (`Evaluation.from_json`), which may
            have been measured on more.
        seen: What the model was calibrated or trained on: the entries ``data`` of its report, see
            `fxprune.evaluation.contamination.read_seen`. Texts and task files that overlap with it are named in the result.
        progress: Called with (what, done, total).

    Returns:
        An `Evaluation`: ``print(evaluation.markdown())`` is the table.

    Raises:
        UsageError: An argument, text or file that cannot be used; lm-eval is missing and a task is wanted; ``dense`` was measured
            otherwise, or not on all of this.
    """
    if texts is not None and not isinstance(texts, Mapping):
        raise UsageError(f"texts are a mapping from names to files, got {texts!r}")
    if lengths is not None and not isinstance(lengths, Sequence):
        raise UsageError(f"lengths are numbers of tokens in a list, got {lengths!r}")
    if dense is not None and not isinstance(dense, nn.Module | Evaluation):
        raise UsageError(f"the dense model is a module or an evaluation of it, got {dense!r}")
    names, texts = check_tasks(tasks), texts or {}
    lengths = tuple(dict.fromkeys((min(128, longest_input(model) or 128),) if lengths is None else lengths))
    check_numbers(limit=limit, batch_size=batch_size)
    if (texts or names) and tokenizer is None:
        raise UsageError("texts and tasks need a tokenizer: pass tokenizer=")
    if texts and not lengths:
        raise UsageError("a perplexity needs a window length: lengths is empty")
    if vocabulary_of(model) is None:
        raise UsageError(f"an evaluation runs on token ids, and {type(model).__name__} has no vocabulary")
    rows, files = read_material(texts, names, protocol=protocol, data=data, limit=limit, tokenizer=tokenizer)
    windows: dict[str, Any] = {"stride": stride, "max_windows": max_windows}
    ids = {name: token_stream(tokenizer, text, protocol=protocol) for name, text in rows.items()}
    for name, stream in ids.items():
        warn_of_unknown(tokenizer, stream, f"the text '{name}'")
    read = _reading(texts, ids, lengths, stride, max_windows, protocol, names, limit)
    if isinstance(dense, Evaluation):
        dense.check_covers([(name, length) for name in texts for length in lengths], names, read)
    models = [model, dense] if isinstance(dense, nn.Module) else [model]
    for measured in models:
        if any(p.device.type == "meta" for p in measured.parameters()):
            raise UsageError(f"weights of this {type(measured).__name__} are on the meta device, or offloaded: load it whole")
        if latency:
            check_latency(measured, prompt=_prompt(measured), new_tokens=NEW)
        for name, stream in ids.items():
            check_known(stream, measured, f"the text '{name}'")
        for name, stream in ids.items():
            for length in lengths:
                window_starts(measured, stream, length=length, text=name, **windows)
    contexts = {name: [row["context"] for row in found] for name, (found, _) in (files or {}).items()}
    overlaps = find_overlaps({**rows, **contexts}, seen)

    def one(measured: nn.Module) -> Evaluation:
        scores = Scores((), 0, False, "")
        perplexities = [
            perplexity(
                measured,
                stream,
                length=length,
                batch_size=max(1, batch_size * 128 // max(length, 128)),
                text=name,
                protocol=protocol,
                source=_label(texts[name]),
                progress=_named(progress, f"perplexity {name}, {length}"),
                **windows,
            )
            for name, stream in ids.items()
            for length in lengths
        ]
        if names:
            options: dict[str, Any] = {"data": data, "limit": limit, "batch_size": batch_size, "progress": progress}
            scores = score_tasks(measured, tokenizer, names, **options)
        timed = measure_latency(measured, prompt=_prompt(measured), new_tokens=NEW) if latency else None
        return Evaluation(
            cost=measure_cost(measured),
            perplexities=tuple(perplexities),
            tasks=scores.tasks,
            latency=timed,
            settings={**read, **_scoring(scores)},
            versions={**versions(), **_place(measured)},
            cut=scores.cut,
        )

    found = replace(one(model), overlaps=overlaps)
    if dense is None:
        return found
    return found.against(dense if isinstance(dense, Evaluation) else one(dense))


def read_material(
    texts: Mapping[str, str | os.PathLike[str]],
    tasks: Sequence[str],
    *,
    protocol: str = PROTOCOLS[0],
    data: str | os.PathLike[str] | None = None,
    limit: int | None = None,
    tokenizer: Any = None,
) -> tuple[dict[str, list[str]], Mapping[str, tuple[list[Row], str]] | None]:
    """Rows of the texts, and of the task files if there is a directory of them.

    Raises:
        UsageError: One of them is missing or damaged; nothing has been run yet.
    """
    rows = {name: text_rows(source, name=name, protocol=protocol, tokenizer=tokenizer) for name, source in texts.items()}
    return rows, read_tasks(data, tasks, limit)


def _reading(
    texts: Mapping[str, Any],
    ids: Mapping[str, Tensor],
    lengths: Sequence[int],
    stride: int | None,
    max_windows: int | None,
    protocol: str,
    tasks: Sequence[str],
    limit: int | None,
) -> dict[str, Any]:
    """What is read, and how much of it: two evaluations must share it to be compared."""
    found: dict[str, Any] = {"limit": limit} if tasks else {}
    if texts:
        found |= {
            "texts": {name: {"source": _label(source), "tokens": len(ids[name])} for name, source in texts.items()},
            "lengths": list(lengths),
            "stride": stride,
            "max_windows": max_windows,
            "protocol": protocol,
        }
    return found


def _scoring(scores: Scores) -> dict[str, Any]:
    """How tasks were scored: the rest of what two evaluations must share."""
    if not scores.tasks:
        return {}
    tasks = {t.task: {"source": t.source, "rows": t.rows, "metric": t.metric} for t in scores.tasks}
    return {"tasks": tasks, "harness": scores.harness, "special_tokens": scores.special_tokens}


def _place(model: nn.Module) -> dict[str, str]:
    """The device that a model is on, and the dtype that it is in."""
    parameter = next(model.parameters())
    cuda = parameter.device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(parameter.device) if cuda else parameter.device.type,
        "dtype": str(parameter.dtype).removeprefix("torch."),
    }


def _prompt(model: nn.Module) -> int:
    """Tokens of the prompt that latency is measured with."""
    return min(128, (longest_input(model) or 128 + NEW) - NEW)


def _label(source: str | os.PathLike[str]) -> str:
    """A file without its folders, a dataset's name as it is."""
    return ", ".join(s.label for s in parse_sources(source))


def _named(progress: Progress | None, what: str) -> Progress | None:
    return None if progress is None else lambda _, done, total: progress(what, done, total)
