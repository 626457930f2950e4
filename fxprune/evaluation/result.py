"""What an evaluation found, as data, as one table, and as the sentences that say under which protocol."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

from rich import box
from rich.table import Table

from ..cost import Cost
from ..errors import UsageError
from ..reporting.blocks import table as markdown_table
from .contamination import warning
from .latency import Latency
from .perplexity import Perplexity
from .tasks import TASKS, TaskScore

FORMAT = 1
"""Of the JSON."""


@dataclass(frozen=True)
class Measure:
    """One line of the table.

    Attributes:
        key: Name in JSON.
        label: Name for people.
        value: The number.
        text: The number as it is shown.
        dense: The dense model's, as it is shown; empty without one.
        kept: ``value`` divided by the dense model's, None if there is none to divide by.
    """

    key: str
    label: str
    value: float
    text: str
    dense: str = ""
    kept: float | None = None


@dataclass(frozen=True)
class Evaluation:
    """A model in numbers, beside its dense model if there is one.

    Attributes:
        cost: Parameters, their bytes, multiply-accumulates per token.
        perplexities: One for each text and length.
        tasks: Zero-shot scores.
        latency: Prefill and decode, if asked for.
        settings: What else the numbers depend on; two evaluations are compared only where these agree.
        overlaps: Evaluation texts that share too much with what the model was calibrated or trained on.
        cut: Task requests longer than the model reads, whose first tokens were dropped.
        versions: Software and machine.
        dense: The same of the dense model.
    """

    cost: Cost
    perplexities: tuple[Perplexity, ...]
    tasks: tuple[TaskScore, ...]
    latency: Latency | None
    settings: Mapping[str, Any]
    versions: Mapping[str, str]
    overlaps: tuple[Mapping[str, Any], ...] = ()
    cut: int = 0
    dense: Evaluation | None = None

    @property
    def average(self) -> float | None:
        """Mean over the tasks of the metric that each is known by (`fxprune.evaluation.tasks.AVERAGED`)."""
        return sum(t.score for t in self.tasks) / len(self.tasks) if self.tasks else None

    @property
    def above_chance(self) -> float | None:
        """The average less what guessing scores."""
        average = self.average
        return None if average is None else average - sum(t.chance for t in self.tasks) / len(self.tasks)

    @classmethod
    def from_json(cls, data: Any) -> Evaluation:
        """An evaluation that was kept as JSON (`to_json`, ``fxprune eval -o FILE.json``).

        Raises:
            UsageError: The data is none.
        """
        if not isinstance(data, Mapping) or data.get("fxprune_evaluation") != FORMAT:
            raise UsageError("not an evaluation: fxprune eval -o FILE.json writes one")
        try:
            timed, dense = data["latency"], data["dense"]
            found = cls(
                Cost(**data["cost"]),
                tuple(Perplexity(**p) for p in data["perplexities"]),
                tuple(TaskScore(**t) for t in data["tasks"]),
                None if timed is None else Latency(**timed),
                dict(data["settings"]),
                dict(data["versions"]),
                tuple(dict(o) for o in data["overlaps"]),
                data["cut"],
                None if dense is None else cls.from_json(dense),
            )
            found.markdown()  # every number is one
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UsageError(f"a damaged evaluation: {type(error).__name__}: {error}") from error
        return found

    def against(self, dense: Evaluation) -> Evaluation:
        """The same evaluation beside that of the dense model; what only the dense model was measured on is left out.

        Raises:
            UsageError: The two were not measured alike, or the dense model not on all that this one was.
        """
        dense.check_covers([(p.text, p.length) for p in self.perplexities], [t.task for t in self.tasks], self.settings)
        perplexities = {(p.text, p.length): p for p in dense.perplexities}
        tasks = {t.task: t for t in dense.tasks}
        beside = replace(
            dense,
            perplexities=tuple(perplexities[p.text, p.length] for p in self.perplexities),
            tasks=tuple(tasks[t.task] for t in self.tasks),
            latency=dense.latency if self.latency else None,
            dense=None,
        )
        return replace(self, dense=beside)

    def check_covers(self, texts: Collection[tuple[str, int]], tasks: Collection[str], settings: Mapping[str, Any]) -> None:
        """Raise `UsageError` unless this, of a dense model, has all that another model is measured on, measured alike.

        Args:
            texts: Names and lengths of perplexities.
            tasks: Names of tasks.
            settings: Of the other's evaluation, as far as they are known.
        """
        for text, length in texts:
            if not any((p.text, p.length) == (text, length) for p in self.perplexities):
                raise UsageError(f"the dense model was not measured on the text '{text}' in windows of {length}")
        if missing := [task for task in tasks if not any(t.task == task for t in self.tasks)]:
            raise UsageError(f"the dense model was not measured on the task '{missing[0]}'")
        known = dict(_leaves(self.settings))
        for name, value in _leaves(settings):
            if name != "lengths" and known.get(name) != value:
                raise UsageError(f"the dense model was measured otherwise: {name} {known.get(name)}, here {value}")

    def with_earlier(self, earlier: Evaluation) -> tuple[Evaluation, str]:
        """This evaluation, with what an earlier one of the same model was measured on besides.

        What both have is this one's. Numbers of the dense model come along where they stand beside numbers that they can be
        compared with.

        Returns:
            (the two together, why it is this one alone: empty if it is not).
        """
        if unlike := self._unlike(earlier):
            return self, unlike
        if self.dense and earlier.dense and (unlike := self.dense._unlike(earlier.dense)):
            return self, f"the dense model: {unlike}"
        both = self._joined(earlier)
        if earlier.dense is not None:
            dense = self.dense._joined(earlier.dense) if self.dense else earlier.dense
            timed = (self if self.latency else earlier).dense  # clocks of two runs are not alike
            mine = {*map(_read, both.perplexities), *map(_read, both.tasks)}
            both = replace(
                both,
                dense=replace(
                    dense,
                    perplexities=tuple(p for p in dense.perplexities if _read(p) in mine),
                    tasks=tuple(t for t in dense.tasks if _read(t) in mine),
                    latency=timed.latency if timed else None,
                ),
            )
        return both, ""

    def _unlike(self, earlier: Evaluation) -> str:
        """What keeps two evaluations of a model from being one."""
        theirs, mine = (dict(_leaves({**e.cost.to_json(), **e.versions, **e.settings})) for e in (earlier, self))
        for name, value in mine.items():
            if name != "lengths" and theirs.get(name, value) != value:
                return f"{name} {theirs[name]}, here {value}"
        return ""

    def _joined(self, earlier: Evaluation) -> Evaluation:
        """This evaluation and what another has besides, the dense models left as they are."""
        texts, names = {(p.text, p.length) for p in self.perplexities}, {t.task for t in self.tasks}
        perplexities = [p for p in earlier.perplexities if (p.text, p.length) not in texts]
        tasks = [t for t in earlier.tasks if t.task not in names]
        if earlier.cut and 0 < len(tasks) < len(earlier.tasks):
            tasks = []  # whose requests were cut is not known
        settings = {**earlier.settings, **self.settings}
        for name, value in self.settings.items():
            if isinstance(value, Mapping):
                settings[name] = {**earlier.settings.get(name, {}), **value}
        if "lengths" in settings:
            settings["lengths"] = sorted({*earlier.settings.get("lengths", ()), *self.settings.get("lengths", ())})
        again = {*self.settings.get("texts", ()), *names}
        return replace(
            self,
            perplexities=(*perplexities, *self.perplexities),
            tasks=tuple(sorted((*tasks, *self.tasks), key=lambda t: TASKS.index(t.task) if t.task in TASKS else len(TASKS))),
            latency=self.latency or earlier.latency,
            settings=settings,
            overlaps=(*(o for o in earlier.overlaps if o["text"] not in again), *self.overlaps),
            cut=self.cut + (earlier.cut if tasks else 0),
        )

    def measures(self) -> list[Measure]:
        """Every line of the table."""
        mine, theirs = _measures(self), _measures(self.dense) if self.dense else {}
        if self.dense and [t.task for t in self.dense.tasks] != [t.task for t in self.tasks]:
            theirs = {key: line for key, line in theirs.items() if key not in ("average", "above_chance")}
        lines = []
        for key, line in mine.items():
            dense = theirs.get(key)
            kept = line.value / dense.value if dense is not None and dense.value > 0 else None
            lines.append(replace(line, dense=dense.text if dense else "", kept=kept))
        return lines

    def to_json(self) -> dict[str, Any]:
        """Plain data; ``kept`` has the share of the dense model's value for each line of the table."""
        lines = self.measures()
        return {
            "fxprune_evaluation": FORMAT,
            "cost": self.cost.to_json(),
            "perplexities": [p.to_json() for p in self.perplexities],
            "tasks": [t.to_json() for t in self.tasks],
            "average": self.average,
            "above_chance": self.above_chance,
            "latency": self.latency.to_json() if self.latency else None,
            "settings": dict(self.settings),
            "overlaps": [dict(o) for o in self.overlaps],
            "cut": self.cut,
            "versions": dict(self.versions),
            "dense": self.dense.to_json() if self.dense else None,
            "kept": {line.key: line.kept for line in lines} if self.dense else None,
        }

    def table(self) -> Table:
        """For a terminal."""
        table = Table(box=box.SIMPLE_HEAD)
        header, rows = self._cells()
        for i, name in enumerate(header):
            table.add_column(name, justify="right" if i else "left", overflow="fold")
        for row in rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        """The table and the sentences."""
        header, rows = self._cells()
        return markdown_table(header, rows) + "".join(f"\n{note}\n" for note in self.notes())

    def notes(self) -> list[str]:
        """What the numbers depend on, a sentence each."""
        notes = [warning(found) for found in self.overlaps]
        if self.tasks:
            notes += self._task_notes()
        for p in self.perplexities:
            rows = f", rows by protocol {p.protocol}" if p.protocol else ""
            notes.append(
                f"perplexity {p.perplexity:.3f}{rows}, on {p.text}: {p.tokens:,} tokens, {p.windows} windows of {p.length}, "
                f"stride {p.stride}"
            )
        if self.latency is not None:
            timed = self.latency
            notes.append(f"prefill {timed.prefill_ms} ms for {timed.prompt} tokens, decode {timed.decode_ms} ms/token")
        return notes

    def _task_notes(self) -> list[str]:
        rows = "; ".join(f"{t.task} {t.rows:,} rows of {t.source}, chance {t.chance:.1%}" for t in self.tasks)
        by = {metric: ", ".join(t.task for t in self.tasks if t.metric == metric) for metric in ("acc", "acc_norm")}
        parts = " and ".join(f"{metric} of {names}" for metric, names in by.items() if names)
        special = "with" if self.settings.get("special_tokens") else "without"
        theirs = self.dense.tasks if self.dense is not None else ()
        notes = [
            f"zero-shot by {self.settings.get('harness')}, {special} a special token before each prompt: {rows}",
            f"the average is of {parts}",
        ]
        notes += [
            _constant_note(t, next((d for d in theirs if d.task == t.task), None)) for t in self.tasks if t.constant is not None
        ]
        if self.cut:
            notes.append(f"{self.cut:,} requests were longer than the model reads: their first tokens were dropped")
        return notes

    def _cells(self) -> tuple[list[str], list[list[str]]]:
        lines = self.measures()
        if self.dense is None:
            return ["", "value"], [[line.label, line.text] for line in lines]
        kept = [f"{line.kept:.1%}" if line.kept is not None else "" for line in lines]
        return ["", "dense", "this model", "of dense"], [
            [line.label, line.dense, line.text, share] for line, share in zip(lines, kept, strict=True)
        ]


def _leaves(settings: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Every value of nested settings, with its name: ``texts, wikitext2, tokens``."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{path}{name}, ")
        else:
            yield path + name, value


def _read(line: Perplexity | TaskScore) -> tuple[Any, ...]:
    """What was read for a number: two numbers are compared only where this agrees."""
    if isinstance(line, TaskScore):
        return line.task, line.rows, line.source, line.metric
    return line.text, line.source, line.protocol, line.tokens, line.windows, line.length, line.stride


def _constant_note(mine: TaskScore, dense: TaskScore | None) -> str:
    constant = cast(float, mine.constant)
    no_better = [name for name, t in (("this model", mine), ("the dense model", dense)) if t is not None and t.score <= constant]
    verb = "scores" if len(no_better) == 1 else "score"
    more = f"; {' and '.join(no_better)} {verb} no better" if no_better else ""
    return f"{mine.task}: one answer given to every row scores {constant:.1%}{more}"


def _measures(found: Evaluation) -> dict[str, Measure]:
    lines: dict[str, Measure] = {}

    def add(key: str, label: str, value: float, form: str | Callable[[float], str]) -> None:
        lines[key] = Measure(key, label, value, form.format(value) if isinstance(form, str) else form(value))

    add("parameters", "parameters", found.cost.parameters, "{:,}")
    add("bytes", "parameter memory (MB)", found.cost.bytes, lambda n: f"{n / 1e6:,.1f}")
    add("macs", "MACs per token", found.cost.macs, "{:,}")
    if found.latency is not None:
        add("prefill_ms", f"prefill of {found.latency.prompt} tokens (ms)", found.latency.prefill_ms, "{:,.2f}")
        add("decode_ms", "decode (ms/token)", found.latency.decode_ms, "{:,.2f}")
    for p in found.perplexities:
        add(f"perplexity/{p.text}/{p.length}", f"perplexity, {p.text}, {p.length} tokens", p.perplexity, "{:,.2f}")
    for t in found.tasks:
        for metric, value, spread in (("acc", t.acc, t.acc_stderr), ("acc_norm", t.acc_norm, t.acc_norm_stderr)):
            if value is not None:
                star = " *" if metric == t.metric else ""
                more = f" ± {100 * spread:.1f}" if spread is not None else ""
                add(f"{t.task}/{metric}", f"{t.task} {metric} (%){star}", value, lambda n, more=more: f"{100 * n:.1f}{more}")  # type: ignore[misc]
    average, above = found.average, found.above_chance
    if average is not None and above is not None:
        add("average", "average of * (%)", average, lambda n: f"{100 * n:.1f}")
        add("above_chance", "average above chance (%)", above, lambda n: f"{100 * n:.1f}")
    return lines
