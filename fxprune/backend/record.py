"""What became of the plan in one compiled graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from ..wording import listed


@dataclass(frozen=True)
class GraphRecord:
    """What became of the plan in one compiled graph.

    Attributes:
        graph: Dynamo's name for it, ``frame/compile``: recompiles of one frame count up behind the slash.
        pruned: For each group that is pruned in this graph ``(units before, units after)``.
        dropped: Residual blocks that this graph leaves out.
        dense: Groups and blocks of the plan whose parameters the graph reads, but that run dense in it, each with the reason.
        parameters: Numbers that the graph's parameters hold ``(before, after)``.
    """

    graph: str
    pruned: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    dropped: tuple[str, ...] = ()
    dense: Mapping[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)

    def __str__(self) -> str:
        """The record in lines."""
        before, after = self.parameters
        lines = [f"graph {self.graph}: {before:,} -> {after:,} parameters"]
        lines += [f"  pruned {name}: {old} -> {new}" for name, (old, new) in self.pruned.items()]
        lines += [f"  dropped {path}" for path in self.dropped]
        lines += [f"  dense {name}: {reason}" for name, reason in self.dense.items()]
        return "\n".join(lines if len(lines) > 1 else [f"graph {self.graph}: nothing of the plan is in it"])

    def warning(self) -> str:
        """What runs dense in one sentence, groups of one reason together; empty if nothing does."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in self.dense.items():
            by_reason.setdefault(reason, []).append(name)
        said = "; ".join(f"{listed(names, 2)}: {reason}" for reason, names in by_reason.items())
        return f"graph {self.graph}: {len(self.dense)} of the plan's groups run dense here: {said}" if said else ""
