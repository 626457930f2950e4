"""A pipeline of passes, ours and anyone's, that says what each did: seconds, nodes and parameters before and after."""

from __future__ import annotations

import inspect
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple, TypeAlias

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import nn
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from .api import example_inputs
from .calibration import Calibration
from .errors import FxPruneError, UsageError
from .passes.base import Pass
from .passes.batches import Loss, Progress, call_arguments
from .passes.compensation import CompensationPass
from .passes.dependency import PLAN, DependencyPass, groups_of
from .passes.importance import SCORES
from .passes.rewrite import RewritePass
from .passes.verify import VerifyPass
from .planning import Material, Planner, Planning, check_stock, settle
from .recipes import RecipeLike
from .wording import counted

AnyPass: TypeAlias = Callable[[GraphModule], Any]
"""Our passes, torch's `PassBase`, a `PassManager`, another pipeline, or a function that gives a GraphModule, or works in place."""

WEIGHED = "fxprune.weighed"


@dataclass(frozen=True)
class PassRow:
    """What one pass did.

    Attributes:
        name: Its class, or the function's name.
        seconds: Time taken.
        nodes: Nodes of the graph before and after.
        parameters: Parameters of the module before and after, tied ones counted once.
        modified: As the pass says; of a function that does not say, whether module, graph or parameters are others than before.
    """

    name: str
    seconds: float
    nodes: tuple[int, int]
    parameters: tuple[int, int]
    modified: bool


@dataclass(frozen=True)
class PipelineResult:
    """What a pipeline made of a module.

    Attributes:
        graph_module: What the last pass gave. Its ``meta`` holds what our passes left there, the plan among it.
        rows: A row for each pass, in order.
    """

    graph_module: GraphModule
    rows: tuple[PassRow, ...] = field(repr=False)

    @property
    def modified(self) -> bool:
        """Whether any pass changed something."""
        return any(row.modified for row in self.rows)

    @property
    def seconds(self) -> float:
        """Time of all passes."""
        return sum(row.seconds for row in self.rows)

    def table(self) -> Table:
        """A numbered row for each pass."""
        table = Table(box=box.SIMPLE_HEAD, caption=f"{self.seconds:.2f} seconds", caption_justify="left")
        for column in ("", "pass", "seconds", "nodes", "parameters", "modified"):
            table.add_column(column, justify="left" if column in ("pass", "modified") else "right", no_wrap=True)
        for number, row in enumerate(self.rows, 1):
            cells = [str(number), row.name, f"{row.seconds:.2f}", _change(*row.nodes), _change(*row.parameters)]
            table.add_row(*map(Text, [*cells, "yes" if row.modified else "no"]))
        return table

    def __str__(self) -> str:
        console = Console(width=132, color_system=None, force_terminal=False)
        with console.capture() as capture:
            console.print(self.table())
        return capture.get()


def _change(before: int, after: int) -> str:
    return f"{before:,}" if before == after else f"{before:,} -> {after:,}"


class Pipeline:
    """Passes in order; called with a GraphModule it runs them and prints what each did (on stderr, if that is a terminal).

    A pipeline is a pass itself: another pipeline, or torch's `PassManager`, takes it. It keeps every module that a pass gave alive
    until it is done, since a `VerifyPass` and a `CompensationPass` look back at the dense one.

    Attributes:
        passes: As given; ``Pipeline([*pipeline.passes[:2], mine, *pipeline.passes[2:]])`` puts another one in.

    Raises:
        UsageError: There is no pass, or one cannot be called.
    """

    def __init__(self, passes: Sequence[AnyPass]) -> None:
        self.passes = tuple(passes)
        if not self.passes:
            raise UsageError("a pipeline needs at least one pass")
        for number, each in enumerate(self.passes, 1):
            if not callable(each) or isinstance(each, type):
                raise UsageError(f"pass {number} of {len(self.passes)} is no pass, but {each!r}")

    def __repr__(self) -> str:
        passes = "".join(f"\n    {number}. {name_of(each)}" for number, each in enumerate(self.passes, 1))
        return f"Pipeline of {counted(len(self.passes), 'pass', 'passes')}:{passes}"

    def __call__(self, graph_module: GraphModule) -> PipelineResult:
        """Run every pass on what the pass before it gave.

        Args:
            graph_module: What `fxprune.trace` returned, or any GraphModule if the passes take one.

        Returns:
            A `PipelineResult`.

        Raises:
            FxPruneError: A pass failed: the message names it. What our passes raise keeps its class; the cause of anything else is
                in ``__cause__``, also where torch's `PassManager` had put a bare ``Exception`` around it.
        """
        if not isinstance(graph_module, GraphModule):
            raise UsageError(f"a pipeline runs on a GraphModule, got {type(graph_module).__name__}: trace the model first")
        alive, rows = [graph_module], []
        for number, each in enumerate(self.passes, 1):
            before = _look(alive[-1])
            start = time.perf_counter()
            try:
                module, modified = _outcome(each(alive[-1]), before)
            except Exception as error:  # noqa: BLE001 - raised again, with the pass named
                raise _named(error, number, len(self.passes), name_of(each)) from _cause(error)
            seconds, after = time.perf_counter() - start, _look(module)
            nodes, parameters = (before.nodes, after.nodes), (before.parameters, after.parameters)
            rows.append(PassRow(name_of(each), seconds, nodes, parameters, before != after if modified is None else modified))
            alive.append(module)
        result = PipelineResult(alive[-1], tuple(rows))
        console = Console(stderr=True)
        if console.is_terminal:
            console.print(result.table())
        return result

    @classmethod
    def from_recipe(
        cls,
        recipe: RecipeLike,
        ratio: float | None = None,
        *,
        calibration: Calibration = None,
        tokenizer: Any = None,
        model: nn.Module | None = None,
        inputs: Any = None,
        loss: Loss | None = None,
        seed: int = 0,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Pipeline:
        """The passes that `fxprune.prune` runs for a recipe: the same plan and the same weights come out.

        Args:
            recipe: As for `fxprune.prune`: a name, a YAML or JSON file, a mapping, or None.
            ratio: Share of all parameters to remove; or give ``units=``.
            calibration: As for `fxprune.prune`. The text is read when a pass first needs it.
            tokenizer: For calibration text.
            model: The eager model: it samples its own calibration text where none is given.
            inputs: What to verify on; by default example inputs for ``model``, else the first calibration batch.
            loss: As for `fxprune.prune`.
            seed: Of calibration and random scores.
            progress: Called with (what, done, total).
            **settings: Any setting of a recipe, and fields of `fxprune.Selection`; they go before what the recipe says.

        Raises:
            UsageError: Settings that `fxprune.prune` refuses too, or nothing to verify on.
        """
        given = {f.name: settings.pop(f.name) for f in fields(Planning) if f.name in settings}
        how, chosen = settle(recipe, given, ratio, None, None, settings, seed)
        check_stock(given.get("stock"), model)
        assert chosen is not None
        if inputs is None and model is None and calibration is None:
            raise UsageError("there is nothing to verify the pruned module on: give inputs=, model= or calibration=")
        material = Material(calibration, model, tokenizer, how)
        planner = Planner(chosen, how, material, loss, progress=progress)
        probe = inputs if inputs is not None or model is None else example_inputs(model)
        passes: list[AnyPass] = [DependencyPass(), RecipeImportance(planner), RecipeSelection(planner), RewritePass()]
        passes.append(VerifyPass(inputs=probe) if probe is not None else RecipeVerification(material))
        if how.compensation != "none":
            passes.append(CompensationPass(material, method=how.compensation))
        return cls(passes)


class RecipeImportance(Pass):
    """Score units, and blocks, as a recipe says; left where an `ImportancePass` leaves scores."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self.planner = planner

    def call(self, graph_module: GraphModule) -> PassResult:
        """Score and annotate; the graph is not modified."""
        groups = groups_of(graph_module)
        fixed, said = self.planner.fixed(groups)
        planner = self.planner.leaving(fixed)
        influence = planner.weigh_blocks(graph_module, groups)
        scores, notes = planner.weigh_units(graph_module, groups)
        graph_module.meta[SCORES], graph_module.meta[WEIGHED] = scores, (fixed, influence, [*said, *notes])
        return PassResult(graph_module, False)


class RecipeSelection(Pass):
    """Choose units as a recipe says, measuring the loss first if its ranking asks for that; the plan goes where the others go."""

    def __init__(self, planner: Planner) -> None:
        super().__init__()
        self.planner = planner

    def call(self, graph_module: GraphModule) -> PassResult:
        """Select and annotate; the graph is not modified."""
        meta = graph_module.meta
        if SCORES not in meta or WEIGHED not in meta:
            raise UsageError("no scores of the recipe on the graph: run its RecipeImportance pass before the RecipeSelection pass")
        fixed, influence, notes = meta[WEIGHED]
        planner = self.planner.leaving(fixed)
        meta[PLAN] = planner.choose(graph_module, groups_of(graph_module), meta[SCORES], influence, notes)
        return PassResult(graph_module, False)


class RecipeVerification(Pass):
    """A `VerifyPass` on the first calibration batch."""

    def __init__(self, material: Material) -> None:
        super().__init__()
        self.material = material

    def call(self, graph_module: GraphModule) -> PassResult:
        """Measure, annotate, and raise `VerificationError` above tolerance."""
        positional, keywords = call_arguments(graph_module, self.material[0])
        return VerifyPass(inputs=keywords if not positional else tuple(positional)).call(graph_module)


class _Look(NamedTuple):
    """A module as it is now; a later look is equal if neither graph nor tensors changed in between."""

    module: GraphModule
    nodes: int
    parameters: int
    graph: str
    tensors: list[tuple[str, int, int]]


def _look(module: GraphModule) -> _Look:
    tensors = [(name, id(tensor), tensor._version) for name, tensor in (*module.named_parameters(), *module.named_buffers())]
    parameters = sum(p.numel() for p in module.parameters())
    return _Look(module, len(module.graph.nodes), parameters, str(module.graph), tensors)


def name_of(each: AnyPass) -> str:
    """What a pass is called in tables and messages."""
    return each.__name__ if inspect.isroutine(each) else type(each).__name__


def _outcome(made: Any, before: _Look) -> tuple[GraphModule, bool | None]:
    """(the module that a pass gave, whether it says that it changed something)."""
    if made is None:  # torch's PassBase says so where nothing was changed, a function where it works in place
        return before.module, None
    module, modified = (made.graph_module, bool(made.modified)) if hasattr(made, "graph_module") else (made, None)
    if not isinstance(module, GraphModule):
        raise UsageError(f"it gave a {type(module).__name__}, and not a GraphModule or PassResult")
    return module, modified


def _cause(error: Exception) -> Exception:
    """What really went wrong: torch's `PassManager` puts a bare ``Exception`` around it."""
    return _cause(error.__cause__) if type(error) is Exception and isinstance(error.__cause__, Exception) else error


def _named(error: Exception, number: int, total: int, name: str) -> FxPruneError:
    """The error with the name of the pass that failed."""
    cause, inner = _cause(error), error
    while inner is not cause:
        found = re.search(r"when running the '(.+?)' pass", str(inner))
        name = f"{name}: {found[1]}" if found else name
        assert isinstance(inner.__cause__, Exception)
        inner = inner.__cause__
    if isinstance(cause, FxPruneError):
        return type(cause)(f"pass {number} of {total} ({name}): {cause}")
    return FxPruneError(f"pass {number} of {total} ({name}) failed: {type(cause).__name__}: {cause}")
