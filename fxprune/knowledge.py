"""Where a model keeps what it knows: what one group, or one block, is worth to it; as rows, a table, a plot and a JSON file.

The numbers come from `fxprune.passes.knowledge`.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from .errors import UsageError, nearest
from .files import read_json, write_whole
from .groups import LAYERS, Groups, family_of
from .names import REPORT_FILE
from .plotting import check_plot, new_figure, save_figure

FORMAT = 1
WIDE = 10
"""How far above the middle the largest cost lies where a plot's scale is logarithmic."""

AXES = {"loss": "rise of the loss (nats)", "divergence": "divergence from the dense model (nats)"}


@dataclass(frozen=True)
class Removal:
    """What came of taking units of one group, or one block, away from an otherwise whole model.

    Attributes:
        name: The group's name, or the block's path.
        kind: The group's kind, or ``layers`` for a block.
        layer: Number of the layer that holds it; None for a group that reaches through several.
        units: Units of the group; 1 for a block.
        removed: How many of them were taken away.
        loss_change: By how much the mean loss rose (nats); infinite where it was no number any more.
        perplexity_before: exp(loss) of the whole model.
        perplexity_after: exp(loss) without these units.
        divergence: KL(dense || without), mean over tokens (nats); None where it was not measured.
        rank: 1 for what matters most; groups are ranked among groups and blocks among blocks.
    """

    name: str
    kind: str
    layer: int | None
    units: int
    removed: int
    loss_change: float
    perplexity_before: float
    perplexity_after: float
    divergence: float | None = None
    rank: int = 0


@dataclass(frozen=True)
class Knowledge:
    """The knowledge distribution of a model (LoRAShear, arXiv 2310.18356: knowledge distribution analysis).

    Attributes:
        rows: Groups in graph order, then blocks.
        unmeasured: Groups that could not be taken away, each with the reason.
        loss: Of the whole model, the mean over samples (nats).
        by: What the ranks are by: ``loss`` (its rise) or ``divergence``.
        share: Share of each group's units that was taken away.
        take: Which: the ``least`` or the ``most`` important ones.
        text: What was read.
        fingerprint: Of the model's groups; see `fxprune.Groups.fingerprint`.
    """

    rows: tuple[Removal, ...]
    unmeasured: Mapping[str, str]
    loss: float
    by: str
    share: float
    take: str
    text: str
    fingerprint: str

    def __post_init__(self) -> None:
        ranks = {
            row.name: rank + 1
            for blocks in (False, True)
            for rank, row in enumerate(sorted((r for r in self.rows if (r.kind == LAYERS) is blocks), key=lambda r: -self.cost(r)))
        }
        object.__setattr__(self, "rows", tuple(replace(row, rank=ranks[row.name]) for row in self.rows))

    def cost(self, row: Removal) -> float:
        """What a row is ranked by (nats)."""
        return row.loss_change if self.by == "loss" or row.divergence is None else row.divergence

    def ranked(self, kinds: Sequence[str] | None = None) -> list[Removal]:
        """Rows of some kinds with what matters most first; groups before blocks.

        Raises:
            UsageError: Nothing of such a kind was measured.
        """
        have = {row.kind for row in self.rows}
        for kind in kinds or ():
            if kind not in have:
                raise UsageError(f"nothing of kind '{kind}' was measured; {nearest(kind, have)}")
        found = [row for row in self.rows if kinds is None or row.kind in kinds]
        return sorted(found, key=lambda row: (row.kind == LAYERS, row.rank))

    def protected(self, share: float, kinds: Sequence[str] | None = None) -> tuple[str, ...]:
        """The names that may not be pruned, as ``Selection(protect=...)`` takes them: LoRAShear's unprunable share gamma.

        A protected group keeps all of its units; a protected block keeps all of its groups and is not dropped. Other groups
        of the same layer are not protected with a group: what was measured is one of them. With ``widths="uniform"`` no layer can
        keep a width of its own, so `fxprune.select` refuses a protected group of a kind that shrinks; protected blocks go with
        dropping other blocks (kind ``layers``), which leaves all widths as they are.

        Args:
            share: How many of those that were measured, rounded up: 0.1 protects the tenth that matters most, 0 nothing.
            kinds: Out of these kinds; of ``layers`` the share is taken by itself. By default all kinds but ``layers``, or that one
                where nothing else was measured.

        Raises:
            UsageError: The share does not lie between 0 and 1, or nothing of such a kind was measured.
        """
        if not 0 <= share <= 1:
            raise UsageError(f"the share to protect must lie between 0 and 1 (0.1 protects a tenth), got {share}")
        own = tuple(dict.fromkeys(row.kind for row in self.rows if row.kind != LAYERS)) or (LAYERS,)
        found = self.ranked(own if kinds is None else kinds)
        parts = ([r for r in found if r.kind != LAYERS], [r for r in found if r.kind == LAYERS])
        return tuple(row.name for part in parts for row in part[: math.ceil(share * len(part) - 1e-9)])

    def check(self, groups: Groups) -> None:
        """Raise `UsageError` unless these are groups of the model that was measured (one of the same parameters and shapes)."""
        if groups.fingerprint() != self.fingerprint:
            raise UsageError(
                f"the knowledge was measured on another model (fingerprint {self.fingerprint}, this one has {groups.fingerprint()})"
            )

    def table(self, protect: float = 0.0) -> Table:
        """What was measured, what matters most first; with a share to protect, which rows that protects."""
        kept = set(self.protected(protect))
        diverged = any(row.divergence is not None for row in self.rows)
        before = self.rows[0].perplexity_before if self.rows else math.exp(self.loss)
        caption = f"perplexity of the whole model {before:,.2f}, loss {self.loss:.4f}, on {self.text or 'batches given'}"
        families: dict[tuple[str, str], list[str]] = {}
        for name, reason in self.unmeasured.items():
            families.setdefault((family_of(name), reason), []).append(name)
        for (family, reason), names in families.items():
            caption += f"\nnot measured: {names[0] if len(names) == 1 else f'{family} ({len(names)} groups)'}: {reason}"
        table = Table(box=box.SIMPLE_HEAD, caption=Text(caption), caption_justify="left")
        for column in ("rank", "group or block", "kind", "layer", "removed", "loss", "perplexity"):
            table.add_column(column, justify="left" if column in ("group or block", "kind") else "right", overflow="fold")
        for column in [*(["divergence"] if diverged else []), *(["protected"] if kept else [])]:
            table.add_column(column, justify="right")
        for row in self.ranked():
            cells = [str(row.rank), row.name, row.kind, "-" if row.layer is None else str(row.layer)]
            cells += [f"{row.removed:,} of {row.units:,}", f"{row.loss_change:+.4f}", f"{row.perplexity_after:,.2f}"]
            cells += [f"{row.divergence:.4f}" if row.divergence is not None else ""] if diverged else []
            cells += ["yes" if row.name in kept else ""] if kept else []
            table.add_row(*map(Text, cells), style="bold" if row.name in kept else None)
        return table

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` reads it back. What is infinite is written as ``"inf"``: JSON has no number for it."""
        data = {"fxprune_knowledge": FORMAT, **asdict(self)}
        rows = [{key: plain(value) for key, value in row.items()} for row in data["rows"]]
        return {**data, "rows": rows, "unmeasured": dict(self.unmeasured)}

    @classmethod
    def from_json(cls, data: Any) -> Knowledge:
        """Read what `to_json` gave.

        Raises:
            UsageError: The data is something else, or of a later format.
        """
        if not isinstance(data, Mapping) or data.get("fxprune_knowledge") != FORMAT:
            raise UsageError(f"this is not knowledge of format {FORMAT}, as fxprune sensitivity writes it")
        try:
            rows = tuple(Removal(**{f.name: _read(f.name, row[f.name]) for f in fields(Removal)}) for row in data["rows"])
            if data["by"] not in AXES:
                raise ValueError(f"it is ranked by '{data['by']}'; {nearest(str(data['by']), AXES)}")
            rest = {f.name: data[f.name] for f in fields(cls)}
            return cls(**rest | {"rows": rows, "unmeasured": dict(data["unmeasured"]), "loss": float(data["loss"])})
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise UsageError(f"the knowledge is damaged: {reason}") from error

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON, whole or not at all.

        Raises:
            UsageError: The file cannot be written.
        """
        write_whole(path, json.dumps(self.to_json(), indent=1) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Knowledge:
        """Read a file that `save` wrote, or what a checkpoint that was sheared (a directory) says of the model it was made from.

        Raises:
            UsageError: The file is missing, is no JSON, or holds something else.
        """
        data = read_json(path) if not os.path.isdir(path) else _measured_for(path)
        try:
            return cls.from_json(data)
        except UsageError as error:
            raise UsageError(f"'{os.fspath(path)}' cannot be used: {error}") from error

    def plot(self, path: str | os.PathLike[str], protect: float = 0.0) -> None:
        """Draw what every group and block is worth over the depth, a line for each kind.

        Args:
            path: The picture; its suffix is the format, one of `fxprune.plotting.KINDS`.
            protect: Ring the rows that this share protects.

        Raises:
            UsageError: matplotlib (extra ``plot``) is missing, the file cannot be written, or no row lies in a numbered layer.
        """
        drawn = [row for row in self.rows if row.layer is not None and math.isfinite(self.cost(row))]
        if not drawn:
            raise UsageError("there is nothing to plot over the depth: no measured group lies in a numbered layer")
        check_plot(path)
        figure = new_figure(9, 5)
        axes: Any = figure.add_subplot()
        for label, points in _lines(drawn).items():
            axes.plot([r.layer for r in points], [self.cost(r) for r in points], marker="o", markersize=4, label=label)
        kept = set(self.protected(protect))
        if rings := [row for row in drawn if row.name in kept]:
            options = {"s": 90, "facecolors": "none", "edgecolors": "black", "label": f"protected by a share of {protect:g}"}
            axes.scatter([r.layer for r in rings], [self.cost(r) for r in rings], zorder=3, **options)
        costs = sorted(abs(self.cost(row)) for row in drawn)
        middle = costs[len(costs) // 2]
        if costs[-1] > WIDE * middle > 0:
            axes.set_yscale("symlog", linthresh=middle / 2)
        if any(self.cost(row) < 0 for row in drawn):
            axes.axhline(0, color="grey", linewidth=0.8)
        axes.xaxis.get_major_locator().set_params(integer=True)
        left = len(self.rows) - len(drawn)
        which = f"{self.share:.0%} of the units, the {self.take} important" if self.share < 1 else "all units that may go"
        title = f"Each taken away by itself: {which}" + (f"; {left} not shown" if left else "")
        axes.set(xlabel="layer", ylabel=AXES[self.by], title=title)
        axes.grid(alpha=0.3)
        axes.legend()
        save_figure(figure, path)


def _lines(rows: Sequence[Removal]) -> dict[str, list[Removal]]:
    """Rows by kind, or by role where a kind has several (as in an encoder and a decoder), in the order of their layers."""
    roles = {row.kind: {_role(r) for r in rows if r.kind == row.kind} for row in rows}
    lines: dict[str, list[Removal]] = {}
    for row in sorted(rows, key=lambda r: r.layer or 0):
        lines.setdefault(_role(row) if len(roles[row.kind]) > 1 else row.kind, []).append(row)
    return lines


def _role(row: Removal) -> str:
    """The group's family, or the list that a block is an entry of."""
    return row.name.rpartition(".")[0] if row.kind == LAYERS else family_of(row.name)


def _measured_for(directory: str | os.PathLike[str]) -> Any:
    """The part of a checkpoint's report that has the knowledge."""
    report = read_json(Path(directory, REPORT_FILE), called="the report of a shearing")
    for name in ("shearing", "knowledge"):
        report = report.get(name) if isinstance(report, Mapping) else None
    if report is None:
        raise UsageError(f"'{os.fspath(directory)}' holds no knowledge: one that was sheared with a protect_share does")
    return report


def plain(value: Any) -> Any:
    """A value that JSON has: an infinite number as text."""
    return "inf" if isinstance(value, float) and not math.isfinite(value) else value


def _read(name: str, value: Any) -> Any:
    """A field of a row, of its type."""
    if name in ("name", "kind"):
        if not isinstance(value, str):
            raise TypeError(f"'{name}' should be text, got {value!r:.80}")
        return value
    if value is None and name in ("layer", "divergence"):
        return None
    if name in ("layer", "units", "removed", "rank"):
        if type(value) is not int:
            raise TypeError(f"'{name}' should be a whole number, got {value!r:.80}")
        return value
    return float(value)
