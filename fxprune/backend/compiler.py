"""The backend that `torch.compile` calls for every graph that Dynamo captures."""

from __future__ import annotations

import logging
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from .._compat import current_graph
from ..errors import FxPruneError, UsageError, nearest
from ..passes.dependency import find_groups
from ..passes.rewrite import rewrite
from ..plan import PrunePlan
from ..wording import listed
from .aliasing import overlap
from .freezing import Slice, Slices
from .guards import guard, limit_reached
from .lowering import CannotLowerError, Lowered, lower
from .matching import Matched, match, touched
from .owner import find_owner
from .record import GraphRecord

log = logging.getLogger("fxprune")

Compiler = Callable[[GraphModule, list[Any]], Callable[..., Any]]


class Backend:
    """A `torch.compile` backend that prunes what it compiles; the module itself stays dense.

    ``torch.compile(model, backend=fxprune.Backend(plan))`` computes, without gradients, what the model pruned by the plan
    computes. Each graph that Dynamo captures is pruned where it holds a group whole, and runs dense elsewhere: a warning
    says what and why, and ``graphs`` holds it.

    Args:
        plan: A `PrunePlan`, or the path of one.
        inner: What compiles the pruned graphs: the name of another backend, or a callable like one.

    Attributes:
        plan: The plan.
        graphs: A `GraphRecord` for every graph compiled so far, recompiles included.

    Raises:
        UsageError: ``plan`` is no plan or path, or ``inner`` is no backend.
        PlanError: The file is missing or is no plan.
    """

    def __init__(self, plan: PrunePlan | str | os.PathLike[str], inner: str | Compiler = "inductor") -> None:
        check_plan(plan)
        self.__name__ = "fxprune"  # how torch names a backend
        self.plan = plan if isinstance(plan, PrunePlan) else PrunePlan.load(plan)
        self.graphs: list[GraphRecord] = []
        self._inner = _inner(inner)
        self._slices = Slices()
        # module -> group -> frame -> "pruned", "dense", or both in different compiles
        self._frames: weakref.WeakKeyDictionary[nn.Module, dict[str, dict[str, set[str]]]] = weakref.WeakKeyDictionary()
        self._module: Callable[[], nn.Module | None] = lambda: None

    @property
    def unseen(self) -> list[str]:
        """Groups and blocks of the plan that no graph so far has parameters of: where they run, they run dense."""
        seen = {name for graph in self.graphs for name in (*graph.pruned, *graph.dropped, *graph.dense)}
        return [name for name in [*self.plan.keep, *self.plan.drop] if name not in seen]

    def reset(self) -> None:
        """Forget every graph; `torch._dynamo.reset` calls it."""
        self.graphs.clear()
        self._frames.clear()

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Compile one graph.

        Args:
            gm: Dynamo's graph.
            example_inputs: Its inputs, parameters among them.

        Raises:
            UsageError: Gradients are wanted: the pruned computation has none.
            PlanError: The plan was made for another model.
            FxPruneError: A group is pruned in another graph, and this one uses it too but has to run it dense.
        """
        graph, example = current_graph(), list(example_inputs)
        tensors = [*(t for t in example if isinstance(t, Tensor)), *gm.parameters()]  # a graph's own, where torch freezes
        if not any(isinstance(t, nn.Parameter) for t in tensors):
            return self._dense(graph, gm, example, {})
        owner = find_owner(self.plan, tensors, self._module())
        if owner is None:
            log.warning("graph %s: its parameters are not of the model that the plan was made for: it runs dense", graph)
            return self._dense(graph, gm, example, {})
        self._module = weakref.ref(owner.module)
        here = touched(self.plan, owner, {owner.names[id(t)] for t in tensors if id(t) in owner.names})
        if not here:
            return self._dense(graph, gm, example, {})
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
            raise UsageError(
                "the pruned computation is for inference, and gradients are enabled: call the compiled model under "
                "torch.no_grad() or torch.inference_mode(); to train a pruned model, use fxprune.prune"
            )
        try:
            with torch.inference_mode(False), torch.no_grad():
                lowered = lower(gm, example, owner)
        except CannotLowerError as error:
            reasons = dict.fromkeys(here, str(error))
            self._settle(graph, Matched(dense=reasons), owner.module)
            return self._dense(graph, gm, example, reasons)
        groups = find_groups(lowered.gm)
        found = match(self.plan, owner, groups)
        self._settle(graph, found, owner.module)
        if not found.keep and not found.drop:
            return self._dense(graph, gm, example, found.dense)
        keep = {part: units for name, units in found.keep.items() for part in found.local[name]}
        local = PrunePlan.from_keep(groups, keep, drop=found.drop)
        with torch.inference_mode(False), torch.no_grad():
            small = rewrite(lowered.gm, local)
            slices = self._slices.freeze(small, groups, {groups[n].axis: units for n, units in local.keep.items()})
        _write_back(small, lowered)
        widths = {n: (self.plan.sizes[n], len(units)) for n, units in found.keep.items()}
        numbers = (groups.total, sum(p.numel() for p in small.parameters()))
        self._record(GraphRecord(graph, widths, tuple(found.drop), found.dense, numbers))
        return _Pruned(gm, self._inner(small, [example[i] for i in lowered.inputs]), lowered, example, slices)

    def _dense(self, graph: str, gm: GraphModule, example: list[Any], reasons: Mapping[str, str]) -> Callable[..., Any]:
        """Compile a graph as it is, for these parameters alone: those of the next layer may be the plan's."""
        parameters = {i: t for i, t in enumerate(example) if isinstance(t, nn.Parameter)}
        total = sum(t.numel() for t in {id(t): t for t in parameters.values()}.values())
        self._record(GraphRecord(graph, dense=reasons, parameters=(total, total)))
        compiled = self._inner(gm, example)
        guard(gm, parameters)
        return compiled

    def _record(self, record: GraphRecord) -> None:
        self.graphs.append(record)
        if record.dense:
            log.warning("%s", record.warning())
        if limit := limit_reached():
            unseen = self.unseen
            left = f"; {len(unseen)} of the plan's groups are in no graph so far: {listed(unseen, 2)}" if unseen else ""
            log.warning(
                "graph %s is the last that torch compiles of its code (torch._dynamo.config.%s is %s): what needs another one runs "
                "dense, and no record tells of it%s. Raise the limit before the first call",
                *(record.graph, *limit, left),
            )

    def _settle(self, graph: str, found: Matched, module: nn.Module) -> None:
        """A group whose parameters several frames use is pruned in all of them or in none."""
        frame, frames = graph.rpartition("/")[0], self._frames.setdefault(module, {})
        for name in [*found.keep, *found.drop]:
            if any("dense" in ways for other, ways in frames.get(name, {}).items() if other != frame):
                found.forget(name, "another graph uses its parameters too, and cannot prune them")
        for name in found.dense:
            pruned = [other for other, ways in frames.get(name, {}).items() if other != frame and "pruned" in ways]
            if pruned:
                raise FxPruneError(
                    f"'{name}' is pruned in frame {pruned[0]}, and graph {graph} uses its parameters too but has to run it dense "
                    f"({found.dense[name]}): a result of both would be neither. Leave it out of the plan, or remove the graph break"
                )
        for names, way in (([*found.keep, *found.drop], "pruned"), (found.dense, "dense")):
            for name in names:
                frames.setdefault(name, {}).setdefault(frame, set()).add(way)


class _Pruned:
    """What Dynamo calls in place of its graph."""

    def __init__(
        self, gm: GraphModule, compiled: Callable[..., Any], lowered: Lowered, example: Sequence[Any], slices: list[Slice]
    ) -> None:
        guard(gm, lowered.held)
        self._gm, self._compiled, self._inputs, self._slices = gm, compiled, lowered.inputs, slices
        self._held = [(i, example[i]) for i in lowered.held]
        self._written = {lowered.inputs[number] for number in lowered.written}

    def __call__(self, *args: Any) -> Any:
        if not all(args[i] is tensor for i, tensor in self._held):  # Dynamo guards it; no result may hang on that
            log.warning("a pruned graph was called with other parameters than it was compiled for: it ran dense")
            return self._gm(*args)
        if self._written and overlap(args, self._written):
            log.warning("a pruned graph was called with inputs that share memory, and it writes to one: it ran dense")
            return self._gm(*args)
        for part in self._slices:
            part.refresh()
        return self._compiled(*[args[i] for i in self._inputs])


def _write_back(small: GraphModule, lowered: Lowered) -> None:
    """Copy the first outputs into the inputs that the dense graph writes to, and return the others."""
    graph = small.graph
    output = next(n for n in reversed(graph.nodes) if n.op == "output")
    inputs = [n for n in graph.nodes if n.op == "placeholder"]
    results = list(output.args[0])
    with graph.inserting_before(output):
        for number, value in zip(lowered.written, results, strict=False):
            graph.call_function(torch.ops.aten.copy_.default, (inputs[number], value))
    results = results[len(lowered.written) :]
    for position, number in lowered.returned.items():
        results[position] = inputs[number]
    output.args = (tuple(results),)
    small.recompile()


def check_plan(plan: object) -> None:
    """Raise `UsageError` unless it can be a plan or the path of one."""
    if not isinstance(plan, PrunePlan | str | os.PathLike):
        raise UsageError(f"plan must be a PrunePlan or the path of one, got {type(plan).__name__}")


def _inner(inner: str | Compiler) -> Compiler:
    from torch._dynamo.backends.registry import list_backends, lookup_backend

    if callable(inner):
        return inner
    known = [n for n in list_backends(exclude_tags=()) if n != "fxprune"]
    if inner not in known:
        raise UsageError(f"there is no backend '{inner}' to compile the pruned graphs with; {nearest(str(inner), known)}")
    found: Compiler = lookup_backend(inner)
    return found
