"""Running a graph piece by piece: from any node to any other, with the values that are still needed kept in between.

Layer by layer over all batches, or the rest of the network again and again from one place: neither keeps more than what is alive
between two nodes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeAlias

from torch.fx import GraphModule, Interpreter, Node

from .batches import Batch, flat_arguments

Compute: TypeAlias = Callable[[Mapping[Node, Any]], Any]


class Stepper(Interpreter):
    """Runs a traced module from one node to another.

    The state of a run is a dictionary from nodes to values; a shallow copy of it is a fork.

    Args:
        gm: What `fxprune.trace` or `fxprune.rewrite` returned.
    """

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm)
        self.nodes: list[Node] = list(gm.graph.nodes)
        self.place = {node: i for i, node in enumerate(self.nodes)}
        self._dying: list[list[Node]] = [[] for _ in self.nodes]
        for node in self.nodes:
            last = max((self.place[user] for user in node.users), default=self.place[node])
            self._dying[last].append(node)

    @cached_property
    def first_use(self) -> dict[str, int]:
        """For each parameter the place of the first node that reads it."""
        found: dict[str, int] = {}
        for node in self.nodes:
            if node.op == "get_attr":
                first = min((self.place[user] for user in node.users), default=self.place[node])
                name = str(node.target)
                found[name] = min(found.get(name, first), first)
        return found

    def begin(self, batch: Batch) -> dict[Node, Any]:
        """The state before the first node, with the inputs that the module takes out of a batch (moved to its device)."""
        device = next(self.module.parameters()).device
        moved = {k: v.to(device) for k, v in batch.items()}
        inputs = [node for node in self.nodes if node.op == "placeholder"]
        return dict(zip(inputs, flat_arguments(self.module, moved), strict=True))  # type: ignore[arg-type]

    def advance(self, state: dict[Node, Any], start: int, stop: int, instead: Mapping[Node, Compute] | None = None) -> Any:
        """Run nodes ``start`` to ``stop`` (not included) and forget what no later node reads.

        Args:
            state: From `begin` or an earlier call; changed in place.
            start: Place of the first node to run.
            stop: Place of the first one not to run.
            instead: For some nodes, what computes their value out of the state instead.

        Returns:
            The module's output if the last node was among them.
        """
        self.env = state
        out: Any = None
        for place in range(start, stop):
            node = self.nodes[place]
            if node.op == "placeholder":
                continue
            value = instead[node](state) if instead and node in instead else self.run_node(node)
            if node.op == "output":
                out = self.module.graph.process_outputs(value)  # type: ignore[union-attr, operator]
            state[node] = value
            self.forget(state, place)
        return out

    def forget(self, state: dict[Node, Any], place: int) -> None:
        """Drop the values that the node at a place was the last to read."""
        for gone in self._dying[place]:
            state.pop(gone, None)
