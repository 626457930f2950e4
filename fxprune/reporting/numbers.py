"""The numbers of a checkpoint, each beside the dense model's and with all that it depends on, read from its JSON files."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from ..files import read_json
from ..names import CONFIG_FILE, EVALUATION_FILE, REPORT_FILE
from .blocks import Table

PARAMETERS, MEMORY, MACS = "parameters", "parameter memory (MB)", "MACs per token"


@dataclass(frozen=True)
class Record:
    """What a checkpoint's directory says of itself.

    Attributes:
        name: Of the directory.
        report: `fxprune_report.json`.
        evaluation: `eval.json`, or None.
        auto: The auto class that the configuration binds to a modelling file of ours, the commonest of several; empty without one.
    """

    name: str
    report: Mapping[str, Any]
    evaluation: Mapping[str, Any] | None = None
    auto: str = ""


@dataclass(frozen=True)
class Number:
    """One number.

    Attributes:
        label: What it is, for people.
        protocol: What it depends on; numbers of one label are compared only where this agrees.
        value: Of the checkpoint; None if it was not measured.
        dense: Of the dense model; None if it was not measured.
        form: How it is written.
        better: ``lower``, ``higher``, or empty.
        group: ``size``, ``perplexity``, ``task`` or ``latency``.
        stale: It was measured before the weights were trained again.
    """

    label: str
    protocol: str
    value: float | None
    dense: float | None
    form: str = "{:,.2f}"
    better: str = "lower"
    group: str = "size"
    stale: bool = False

    @property
    def kept(self) -> float | None:
        """The value divided by the dense model's."""
        if self.value is None or self.dense is None or not self.dense > 0 or not math.isfinite(self.value / self.dense):
            return None
        return self.value / self.dense

    def text(self, value: float | None) -> str:
        """A value as it is written; empty for None."""
        return "" if value is None else self.form.format(value)

    @property
    def change(self) -> str:
        """Against the dense model: a share of its number, of scores in per cent the difference in points."""
        if self.kept is None or self.value is None or self.dense is None:
            return ""
        return f"{self.value - self.dense:+.1f} points" if self.group == "task" else f"{self.kept - 1:+.1%}"


def read_record(directory: str | os.PathLike[str]) -> Record:
    """Read what a checkpoint says of itself.

    Raises:
        UsageError: There is no such directory, or no report of ours in it.
        CheckpointError: A file in it is damaged.
    """
    path = Path(directory)
    if not path.is_dir():
        raise UsageError(f"there is no directory '{os.fspath(directory)}'")
    if not (path / REPORT_FILE).is_file():
        raise UsageError(f"'{os.fspath(directory)}' holds no {REPORT_FILE}: fxprune prune and fxprune recover write one")
    report = _mapping(path / REPORT_FILE)
    evaluation = _mapping(path / EVALUATION_FILE) if (path / EVALUATION_FILE).is_file() else None
    bound = _mapping(path / CONFIG_FILE).get("auto_map") if (path / CONFIG_FILE).is_file() else None
    return Record(path.resolve().name, report, evaluation, _told(bound) if isinstance(bound, Mapping) else "")


def _told(bound: Mapping[str, Any]) -> str:
    """The auto class that users are told of, where several load a model."""
    first = ("AutoModelForCausalLM", "AutoModelForSeq2SeqLM", "AutoModelForMaskedLM")
    return min(bound, key=lambda name: first.index(name) if name in first else len(first), default="")


def _mapping(path: Path) -> dict[str, Any]:
    data = read_json(path, error=CheckpointError)
    if not isinstance(data, dict):
        raise CheckpointError(f"'{path}' is damaged: it holds no object, but {json.dumps(data)[:40]}")
    return data


def part(data: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """A part that is a mapping; an empty one where it is missing, or something else."""
    found = data.get(key)
    return found if isinstance(found, Mapping) else {}


def base_model(dense: Mapping[str, Any]) -> str | None:
    """The hub id that a model comes from: the one that was stated, or what the dense model was loaded by; None if neither is known.

    Args:
        dense: As `fxprune.PruneReport` has it.
    """
    return dense.get("base_model") or (dense.get("name") if dense.get("hub") else None) or None


def numbers(record: Record) -> list[Number]:
    """Every number of a checkpoint that stands beside one of the dense model, or could; in the order of the table."""
    return [*sizes(record.report), *_reported(record.report), *_evaluated(record.evaluation or {})]


def numbers_table(found: Sequence[Number]) -> Table:
    """The numbers of a checkpoint beside the dense model's."""
    rows = [[n.label, n.text(n.dense) or "-", n.text(n.value), n.change] for n in found]
    return Table(["", "dense", "this model", "change"], rows)


def widths_of(report: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """Units before and after, of the groups that kept all and of those that did not."""
    whole = {name: (size, size) for name, size in (report.get("whole") or {}).items()}
    return whole | {name: (before, after) for name, (before, after) in (report.get("widths") or {}).items()}


def sizes(report: Mapping[str, Any]) -> Iterator[Number]:
    """Parameters, memory and multiply-accumulates."""
    for label, key, unit, form in (
        (PARAMETERS, "parameters", 1, "{:,.0f}"),
        (MEMORY, "bytes", 1e6, "{:,.1f}"),
        (MACS, "macs", 1, "{:,.0f}"),
    ):
        before, after = report.get(f"{key}_before"), report.get(f"{key}_after")
        if before is not None and after is not None:
            yield Number(label, "", after / unit, before / unit, form)


def _reported(report: Mapping[str, Any]) -> Iterator[Number]:
    """What the demo measures: of the pruned model, whose weights a recovery has changed since."""
    stale = bool(report.get("recovery"))
    for name, both in (report.get("perplexity") or {}).items():
        before, after = both["before"], both["after"]
        label = f"perplexity, {name}{', before recovery' if stale else ''}"
        found = (after["perplexity"], before["perplexity"])
        yield Number(label, _windows(after), *found, group="perplexity", stale=stale)
    if both := report.get("latency"):
        yield from _latency(both["after"], both["before"], report)


def _evaluated(evaluation: Mapping[str, Any]) -> Iterator[Number]:
    dense = evaluation.get("dense") or {}
    theirs = {(p["text"], _windows(p)): p["perplexity"] for p in dense.get("perplexities") or ()}
    for p in evaluation.get("perplexities") or ():
        label, known = f"perplexity, {p['text']}, {p['length']} tokens", theirs.get((p["text"], _windows(p)))
        yield Number(label, _windows(p) + _in_dtype(evaluation), p["perplexity"], known, group="perplexity")
    if timed := evaluation.get("latency"):
        yield from _latency(timed, dense.get("latency"), evaluation)
    yield from _tasks(evaluation, dense)


def _tasks(evaluation: Mapping[str, Any], dense: Mapping[str, Any]) -> Iterator[Number]:
    settings = evaluation.get("settings") or {}
    how = f"{settings.get('harness', 'lm-eval')}, {'with' if settings.get('special_tokens') else 'without'} a special token"
    how += _in_dtype(evaluation)
    theirs = {t["task"]: t for t in dense.get("tasks") or ()}
    tasks = evaluation.get("tasks") or ()
    for t in tasks:
        protocol = f"{t['rows']:,} rows of {t['source']}, {how}"
        for metric in ("acc", "acc_norm"):
            if t.get(metric) is not None:
                known = theirs.get(t["task"], {}).get(metric)
                yield _percent(f"{t['task']}, {metric} (%)", protocol, t[metric], known)
    if evaluation.get("average") is not None:
        names = "; ".join(f"{t['task']} {t['metric']}, {t['rows']:,} rows of {t['source']}" for t in tasks)
        known = dense.get("average") if [*theirs] == [t["task"] for t in tasks] else None
        yield _percent("average of tasks (%)", f"{names}; {how}", evaluation["average"], known)


def _percent(label: str, protocol: str, value: float, dense: float | None) -> Number:
    return Number(label, protocol, 100 * value, None if dense is None else 100 * dense, "{:.1f}", "higher", "task")


def _latency(mine: Mapping[str, Any], dense: Mapping[str, Any] | None, where: Mapping[str, Any]) -> Iterator[Number]:
    versions = where.get("versions") or {}
    protocol = f"prompt of {mine['prompt']}, {mine['new_tokens']} new tokens, batch {mine.get('batch', 1)}"
    machine = ", ".join(str(versions[k]) for k in ("machine", "device") if versions.get(k))
    protocol += re.sub(r"(^|, )1 (core|thread)s\b", r"\g<1>1 \2", f", {machine}") if machine else ""
    protocol += _in_dtype(where)
    for label, key in ((f"prefill of {mine['prompt']} tokens (ms)", "prefill_ms"), ("decode (ms/token)", "decode_ms")):
        yield Number(label, protocol, mine[key], None if dense is None else dense[key], "{:,.2f}", group="latency")


def _in_dtype(where: Mapping[str, Any]) -> str:
    """What was measured in another dtype than float32 is not measured alike."""
    dtype = part(where, "versions").get("dtype", "float32")
    return "" if dtype == "float32" else f", in {dtype}"


def _windows(p: Mapping[str, Any]) -> str:
    """Text, length, windows and stride: what two perplexities must share."""
    rows = f", rows by protocol {p['protocol']}" if p.get("protocol") else ""
    source = f" of {p['source']}" if p.get("source") else ""
    return f"{p['tokens']:,} tokens{source}{rows}, {p['windows']:,} windows of {p['length']}, stride {p['stride']}"


def overlap_warning(overlap: Mapping[str, Any]) -> str:
    """What to tell people of an evaluation text that was seen before."""
    mine, theirs = (f"{overlap[key]:.1%}" for key in ("of_text", "of_data"))
    return (
        f"the evaluation text '{overlap['text']}' was seen in {overlap['use']} (data '{overlap['name']}'): {mine} of the text's "
        f"{overlap['words']}-word sequences are in the data, {theirs} of the data's in the text; a score on it says little about "
        "other text"
    )
