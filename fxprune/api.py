"""The one-call interface: trace, find groups, score, select, rewrite, verify, and the same surgery on the eager model."""

from __future__ import annotations

import copy
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from dataclasses import fields as dataclass_fields
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .calibration import BATCH, LENGTH, SAMPLES, Calibration, load_calibration, vocabulary_of
from .capture import quiet, trace
from .checkpoint.config import Unsolved, solve_config
from .checkpoint.eager import Surgery, call, judge, operate
from .checkpoint.save import save_pruned
from .criteria import Criterion, UserCriterion, check_aggregation, find_criterion
from .errors import CheckpointError, UsageError, VerificationError, nearest
from .groups import Groups
from .passes.dependency import groups_of
from .passes.importance import Loss, score
from .passes.influence import block_influence
from .passes.rewrite import rewrite
from .passes.selection import LAYERS, Selection, select
from .passes.verify import VerifyReport, relative_error, tolerance_of, verify
from .plan import PrunePlan

log = logging.getLogger("fxprune")

Progress = Callable[[str, int, int], None]

LAYERS_BY = ("influence", "first")

CRITERION = "taylor2"
"""The default criterion; see `fxprune.criteria.CRITERIA`."""


@dataclass(frozen=True)
class PruneReport:
    """What a prune did, in numbers.

    Attributes:
        parameters_before: Of the dense model, tied ones counted once.
        parameters_after: Of the pruned one.
        bytes_before: Parameter memory of the dense model.
        bytes_after: Parameter memory of the pruned one.
        widths: For each pruned group ``[before, after]``.
        dropped: Blocks removed whole.
        verify: What verification measured, or None if it was switched off.
        eager_error: Relative error of the eager pruned model against the rewritten graph, on the example inputs.
        form: ``uniform`` (a stock class), ``per-layer``, ``module`` (no Hugging Face model), or ``graph``: the eager class computes
            something from a pruned size, so only the rewritten graph exists.
        note: Why the form is not uniform, where the target was missed, and other things to know.
        recipe: Settings that made the plan.
        seconds: Time of each stage.
        versions: Software and machine.
    """

    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int
    widths: dict[str, list[int]]
    dropped: list[str]
    verify: VerifyReport | None
    eager_error: float | None
    form: str
    note: str
    recipe: dict[str, Any]
    seconds: dict[str, float]
    versions: dict[str, str]
    verify_tolerance: float

    @property
    def removed(self) -> float:
        """Share of the parameters that went."""
        return 1 - self.parameters_after / self.parameters_before

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        data = asdict(self)
        data["verify"] = self.verify.to_json() if self.verify else None
        return {"fxprune_report": 1, "removed": round(self.removed, 6), **data}


@dataclass
class PruneResult:
    """A pruned model in all its shapes.

    Attributes:
        graph_module: The rewritten ``torch.fx.GraphModule``.
        model: The same network, with the same parameter objects, as an eager model of the dense model's class; None where that
            class cannot express it (the report's note says why).
        plan: What was kept.
        report: Numbers, the verify result among them.
        groups: The dense model's prune groups.
        tokenizer: As given.
        example_inputs: What the verification ran on.
        form: As in the report.
    """

    graph_module: GraphModule
    model: nn.Module | None
    plan: PrunePlan
    report: PruneReport
    groups: Groups
    tokenizer: Any
    example_inputs: Any
    form: str
    surgery: dict[str, Any] = field(default_factory=dict)
    dense_config: Any = None
    dense_model: nn.Module | None = None

    def run(self, module: nn.Module) -> Any:
        """Call a module on the example inputs."""
        return call(module, self.example_inputs)

    def save_pretrained(self, directory: str | os.PathLike[str], *, overwrite: bool = False, max_shard_size: str = "5GB") -> None:
        """Write a checkpoint, read it back and compare before it appears; see `fxprune.checkpoint.save.save_pruned`."""
        save_pruned(self, directory, overwrite=overwrite, max_shard_size=max_shard_size)


def versions() -> dict[str, str]:
    """Software and machine, for reports."""
    import transformers

    from ._version import __version__

    return {
        "fxprune": __version__,
        "torch": str(torch.__version__),
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        out = function(*args, **kwargs)
        self.seconds[name] = round(time.perf_counter() - start, 3)
        log.info("%s: %.1f s", name, self.seconds[name])
        return out


def prune(
    model: nn.Module,
    ratio: float | None = None,
    *,
    calibration: Calibration = None,
    tokenizer: Any = None,
    inputs: Any = None,
    graph: GraphModule | None = None,
    criterion: str | Criterion | UserCriterion = CRITERION,
    aggregation: str = "sum",
    selection: Selection | None = None,
    plan: PrunePlan | None = None,
    loss: Loss | None = None,
    layers_by: str = "influence",
    samples: int = SAMPLES,
    length: int = LENGTH,
    batch_size: int = BATCH,
    seed: int = 0,
    verify_inputs: Any = None,
    check: bool = True,
    tolerance: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a model: trace, find groups, score, select, rewrite, verify, operate on the eager model.

    Args:
        model: A Hugging Face model or any module; it is not changed.
        ratio: Share of all parameters to remove, 0.2 for 20 %. Or give ``selection`` / ``plan`` / ``units``.
        calibration: Text to score with: None (the model samples its own, seeded), a file, a ``datasets`` name, a list of strings,
            or ready batches; see `fxprune.calibration.load_calibration`.
        tokenizer: For calibration text; saved with the checkpoint.
        inputs: Example inputs to trace with; by default token ids for a model with a vocabulary.
        graph: What `fxprune.trace` made of this model already, to prune it several ways for one trace. If its sizes are fixed,
            give the ``inputs`` that it was traced with.
        criterion: See `fxprune.criteria.CRITERIA`.
        aggregation: See `fxprune.criteria.AGGREGATIONS`.
        selection: Targets and constraints; or give fields of `fxprune.passes.selection.Selection` as keywords.
        plan: A ready plan to replay; nothing is scored or selected.
        loss: ``(outputs, batch) -> scalar`` for models without next-token loss.
        layers_by: For kind ``layers``: ``influence`` (least measured influence goes first) or ``first`` (the first ones stay, as in
            LLM-Pruner's layer-wise baseline).
        samples: Calibration samples.
        length: Tokens of each.
        batch_size: Samples at a time.
        seed: For calibration sampling and random scores.
        verify_inputs: What to verify on; by default the example inputs.
        check: Verify (on by default).
        tolerance: Largest relative error that verification accepts; by default by dtype.
        progress: Called with (what, done, total).
        **options: Fields of `Selection`.

    Returns:
        A `PruneResult`.

    Raises:
        UsageError: An argument that cannot be used, or two that contradict each other.
        CaptureError: The model cannot be traced.
        VerificationError: The pruned graph differs from its reference.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module to prune, got {type(model).__name__}")
    scoring = _Scoring(criterion, aggregation, calibration, layers_by, samples, length, batch_size, seed)
    scoring.check()
    chosen = _target(ratio, selection, plan, options)
    clock = _Clock()
    example = inputs if inputs is not None else example_inputs(model)
    if graph is not None and {id(p) for p in graph.parameters()} - {id(p) for p in model.parameters()}:
        raise UsageError("graph= is the trace of another model: its parameters are not this model's")
    gm: GraphModule = graph if graph is not None else clock("trace", trace, model, example)
    groups: Groups = clock("groups", groups_of, gm)
    if plan is None:
        assert chosen is not None
        plan = _make_plan(model, gm, groups, chosen, scoring, tokenizer=tokenizer, loss=loss, clock=clock, progress=progress)
    small: GraphModule = clock("rewrite", rewrite, gm, plan)
    probe = verify_inputs if verify_inputs is not None else example
    checked: VerifyReport | None = None
    allowed = tolerance if tolerance is not None else tolerance_of(gm)
    if check:
        checked = clock("verify", verify, gm, small, plan, probe, tolerance=allowed)
        if not checked.ok:
            raise VerificationError(
                f"the pruned network differs from its reference ({checked.reference}): relative error "
                f"{checked.max_rel_error:.2e}, allowed {checked.tolerance:.0e}; nothing was written"
            )
    form, eager, error, note = clock("eager", _eager, model, groups, plan, small, probe, allowed)
    if form == "graph":
        note += _trace_differs(model, gm, probe, allowed)
    after = sum(p.numel() for p in small.parameters())
    report = PruneReport(
        parameters_before=groups.total,
        parameters_after=after,
        bytes_before=sum(p.numel() * p.element_size() for p in gm.parameters()),
        bytes_after=sum(p.numel() * p.element_size() for p in small.parameters()),
        widths={n: [groups[n].size, len(u)] for n, u in plan.keep.items()},
        dropped=list(plan.drop),
        verify=checked,
        eager_error=error,
        form=form,
        note="; ".join(filter(None, [str(plan.recipe.get("note", "")), note])),
        recipe=dict(plan.recipe),
        seconds=clock.seconds,
        versions=versions(),
        verify_tolerance=allowed,
    )
    return PruneResult(
        graph_module=small,
        model=eager.model if eager else None,
        plan=plan,
        report=report,
        groups=groups,
        tokenizer=tokenizer,
        example_inputs=probe,
        form=form,
        surgery=eager.spec if eager else {},
        dense_config=copy.deepcopy(getattr(model, "config", None)),
        dense_model=model,
    )


def example_inputs(model: nn.Module) -> dict[str, torch.Tensor]:
    """Seeded token ids ``[2, 16]`` for a model with a vocabulary.

    Raises:
        UsageError: The model has none: its inputs cannot be guessed.
    """
    vocabulary = vocabulary_of(model)
    if vocabulary is None:
        raise UsageError(f"cannot guess example inputs for {type(model).__name__}: pass inputs={{...}}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, vocabulary[0], (2, 16), generator=generator).to(device)}


def _target(
    ratio: float | None, selection: Selection | None, plan: PrunePlan | None, options: Mapping[str, Any]
) -> Selection | None:
    """The selection to make, None where a plan is replayed; contradictions are refused."""
    fields = [f.name for f in dataclass_fields(Selection)]
    for name in options:
        if name not in fields:
            raise UsageError(f"unknown option '{name}'; {nearest(name, fields)}")
    given = [*(["ratio"] if ratio is not None else []), *options]
    if plan is not None and (given or selection is not None):
        raise UsageError(f"plan= is replayed as it is: leave out {(given or ['selection'])[0]}=")
    if selection is not None and given:
        raise UsageError(f"selection= says what to remove: leave out {given[0]}=")
    return selection if plan is not None or selection is not None else Selection(ratio=ratio, **options)


def check_layers_by(layers_by: str) -> None:
    """Raise `UsageError` unless blocks can be ranked that way."""
    if layers_by not in LAYERS_BY:
        raise UsageError(f"unknown layers_by '{layers_by}'; {nearest(str(layers_by), LAYERS_BY)}")


@dataclass(frozen=True)
class _Scoring:
    """How `prune` scores: the arguments that belong together."""

    criterion: str | Criterion | UserCriterion
    aggregation: str
    calibration: Calibration
    layers_by: str
    samples: int
    length: int
    batch_size: int
    seed: int

    def check(self) -> None:
        find_criterion(self.criterion)
        check_aggregation(self.aggregation)
        check_layers_by(self.layers_by)

    def recipe(self, calibration: str) -> dict[str, Any]:
        found = find_criterion(self.criterion)
        return {
            "criterion": found.name if isinstance(found, Criterion) else getattr(found, "__name__", "callable"),
            "aggregation": self.aggregation,
            "layers_by": self.layers_by,
            "calibration": calibration,
            "samples": self.samples,
            "length": self.length,
            "seed": self.seed,
        }


def _make_plan(
    model: nn.Module,
    gm: GraphModule,
    groups: Groups,
    chosen: Selection,
    how: _Scoring,
    *,
    tokenizer: Any,
    loss: Loss | None,
    clock: _Clock,
    progress: Progress | None,
) -> PrunePlan:
    """Calibrate what needs it, score, select."""
    found = find_criterion(how.criterion)
    units = any(pace > 0 for kind, pace in chosen.pace.items() if kind != LAYERS)
    measured = chosen.pace.get(LAYERS, 0) > 0 and how.layers_by == "influence"
    batches: Sequence[Mapping[str, torch.Tensor]] = []
    described = "none"
    if measured or (units and (not isinstance(found, Criterion) or found.gradient)):
        shape = {"samples": how.samples, "length": how.length, "batch_size": how.batch_size, "seed": how.seed}
        batches, described = clock("calibration", load_calibration, how.calibration, model=model, tokenizer=tokenizer, **shape)
    scores = {}
    if units:
        options = {"aggregation": how.aggregation, "loss": loss, "seed": how.seed, "progress": progress}
        scores = clock("importance", score, gm, groups, criterion=how.criterion, calibration=batches, **options)
    influence = clock("influence", block_influence, gm, groups, batches) if measured else None
    plan: PrunePlan = clock("selection", select, groups, scores, chosen, block_scores=influence, recipe=how.recipe(described))
    return plan


def _eager(
    model: nn.Module, groups: Groups, plan: PrunePlan, small: GraphModule, probe: Any, tolerance: float
) -> tuple[str, Surgery | None, float | None, str]:
    """The eager pruned model: a stock class with a solved configuration if there is one, else resized modules."""
    with torch.no_grad():
        reference = call(small, probe)
    same = judge(reference, probe, tolerance)
    note = ""
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        try:
            stock = _stock(model, solve_config(model, groups, plan), small, groups, plan)
            failure = same(stock)
            if failure is None:
                return "uniform", Surgery(stock), _error(reference, stock, probe), ""
            note = (
                f"no stock configuration expresses the plan: its {type(model).__name__} differs from the pruned graph ({failure})"
            )
        except (Unsolved, CheckpointError) as problem:
            note = f"no stock configuration expresses the plan: {problem}"
        form = "per-layer"
    else:
        form = "module"
    try:
        surgery = operate(model, small, groups, plan, same)
    except CheckpointError as problem:
        return "graph", None, None, str(problem)
    return form, surgery, _error(reference, surgery.model, probe), note


def _trace_differs(model: nn.Module, gm: GraphModule, probe: Any, tolerance: float) -> str:
    """What to add to the note where even the dense trace is not the dense model."""
    with quiet(model), torch.no_grad():
        error = relative_error(call(model, probe), call(gm, probe))
    if error <= tolerance:
        return ""
    return (
        f"; and the trace computes something else than the dense model on these inputs (relative error {error:.1e}): "
        "pass every input that the model's processor gives"
    )


def _error(reference: Any, eager: nn.Module, probe: Any) -> float:
    with quiet(eager), torch.no_grad():
        return relative_error(reference, call(eager, probe))


def _stock(model: Any, config: Any, small: GraphModule, groups: Groups, plan: PrunePlan) -> nn.Module:
    """A model of the stock class and solved configuration, with the sliced weights."""
    from accelerate import init_empty_weights

    from .checkpoint.eager import sliced_state

    with init_empty_weights(include_buffers=False):
        stock = type(model)(config)
    state = sliced_state(model, small, groups, plan)
    frozen = {n for n, t in state.items() if isinstance(t, nn.Parameter) and not t.requires_grad}
    try:
        _, unexpected = stock.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # a buffer that the traced path does not read, and the class sizes by the configuration
        raise CheckpointError(str(error).replace("\n\t", " ").strip()[:300]) from error
    stock.tie_weights()
    for name in frozen:  # load_state_dict thaws them
        stock.get_parameter(name).requires_grad_(False)
    left = [n for n, p in stock.named_parameters() if p.is_meta]
    if left or unexpected:
        raise CheckpointError(
            f"stock {type(model).__name__} has parameters that the pruned model lacks: {(left or unexpected)[:3]}"
        )
    first = next(model.parameters())
    stock.to(first.device)
    if getattr(model, "generation_config", None) is not None:
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()  # type: ignore[no-any-return]
