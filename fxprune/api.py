"""The one-call interface: trace, find groups, score, select, rewrite, verify, and the same surgery on the eager model."""

from __future__ import annotations

import copy
import logging
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .calibration import Calibration, vocabulary_of
from .capture import trace
from .checkpoint.config import Unsolved, solve_config
from .checkpoint.eager import Surgery, new_biases, operate, sliced_state
from .checkpoint.judge import caches, call, judge, padded
from .checkpoint.per_layer import save_itself
from .checkpoint.save import save_pruned
from .criteria import Criterion, UserCriterion
from .errors import CheckpointError, UsageError, VerificationError, is_number
from .groups import Groups
from .mode import quiet
from .passes.batches import Loss, Progress
from .passes.compensation import Compensation, compensate
from .passes.dependency import groups_of
from .passes.rewrite import rewrite
from .passes.selection import Selection
from .passes.verify import VerifyReport, relative_error, tolerance_of, verify
from .plan import PrunePlan
from .planning import Material, Planner, Planning, check_stock, settle
from .recipes import RecipeLike
from .report import account
from .wording import counted

log = logging.getLogger("fxprune")


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
        verify: What verification measured (before any compensation), or None if it was switched off.
        compensation: What was done to make up for the units that went, or None.
        data: Calibration text that was read: ``use``, ``name`` and ``sketch`` (`fxprune.data.overlap`).
        eager_error: Relative error of the eager pruned model against the rewritten graph, on the example inputs.
        form: ``uniform`` (a stock class), ``per-layer``, ``module`` (no Hugging Face model), or ``graph``: the eager class computes
            something from a pruned size, so only the rewritten graph exists.
        note: Why the form is not uniform, where the target was missed, and other things to know.
        recipe: Settings that made the plan.
        seconds: Time of each stage.
        versions: Software and machine.
        verify_tolerance: Largest relative error that was allowed.
        dense: The model that was pruned: ``name`` (a hub id, a file's or a folder's name), ``hub`` (whether the name is a hub
            id), ``class``, ``dtype``, ``fingerprint``; ``license`` where its card says one, ``base_model`` (a hub id) where its
            own report or `fxprune.render_report` says one.
        macs_before: Multiply-accumulates per token of the dense model, see `fxprune.cost.Cost`.
        macs_after: Of the pruned one.
        whole: Groups of the kinds that were pruned which lost nothing, with their units.
        importance: How the scores of each group's units spread; see `fxprune.report.account`.
        curves: What the loss of each lane was measured to be; see `fxprune.PrunePlan`.
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
    compensation: dict[str, Any] | None = None
    data: list[dict[str, Any]] = field(default_factory=list)
    dense: dict[str, Any] = field(default_factory=dict)
    macs_before: int | None = None
    macs_after: int | None = None
    whole: dict[str, int] = field(default_factory=dict)
    importance: dict[str, dict[str, Any]] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)

    def __repr__(self) -> str:
        checked = f", verified to {self.verify.max_rel_error:.1e}" if self.verify else ""
        return f"PruneReport({self._sizes()}, {self.form}{checked})"

    def _sizes(self) -> str:
        return f"{self.parameters_before:,} -> {self.parameters_after:,} parameters ({-self.removed:+.1%})"

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

    def __repr__(self) -> str:
        kind = type(self.graph_module if self.model is None else self.model).__name__
        return f"PruneResult({kind}, {self.report._sizes()}, {self.form})"

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
        "machine": f"{platform.machine()}, {counted(os.cpu_count() or 1, 'core')}, {counted(torch.get_num_threads(), 'thread')}",
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
    recipe: RecipeLike = None,
    calibration: Calibration = None,
    tokenizer: Any = None,
    inputs: Any = None,
    graph: GraphModule | None = None,
    criterion: str | Criterion | UserCriterion | None = None,
    aggregation: str | None = None,
    compensation: str | None = None,
    selection: Selection | None = None,
    plan: PrunePlan | str | os.PathLike[str] | None = None,
    loss: Loss | None = None,
    layers_by: str | None = None,
    samples: int | None = None,
    length: int | None = None,
    batch_size: int | None = None,
    levels: int | None = None,
    sensitivity_samples: int | None = None,
    rounds: int | None = None,
    stock: bool | None = None,
    seed: int = 0,
    verify_inputs: Any = None,
    check: bool = True,
    tolerance: float | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> PruneResult:
    """Prune a model: trace, find groups, score, select, rewrite, verify, compensate, operate on the eager model.

    Args:
        model: A Hugging Face model or any module; it is not changed.
        ratio: Share of all parameters to remove, 0.2 for 20 %. Or give ``selection`` / ``plan`` / ``units``.
        recipe: A name from `fxprune.recipes.RECIPES`, a YAML file, or a mapping: what the arguments below are where they are not
            given. None is ``default``, or with a criterion that needs no calibration a prune that needs none.
        calibration: Text to score with: None (the model samples its own, seeded), a file, a ``datasets`` name, a list of strings,
            or ready batches; see `fxprune.calibration.load_calibration`.
        tokenizer: For calibration text; saved with the checkpoint.
        inputs: Example inputs to trace with; by default token ids for a model with a vocabulary.
        graph: What `fxprune.trace` made of this model already, to prune it several ways for one trace. If its sizes are fixed,
            give the ``inputs`` that it was traced with.
        criterion: See `fxprune.criteria.CRITERIA`.
        aggregation: See `fxprune.criteria.AGGREGATIONS`.
        compensation: See `fxprune.passes.compensation`.
        selection: Targets and constraints; or give fields of `fxprune.passes.selection.Selection` as keywords.
        plan: A ready plan to replay, its file, or a checkpoint that holds one; nothing is scored or selected, and nothing
            compensated unless ``compensation`` says so, then on as many samples as the plan was made with.
        loss: ``(outputs, batch) -> scalar`` for models without next-token loss.
        layers_by: For kind ``layers``: ``influence`` (least measured influence goes first) or ``first`` (the first ones stay, as in
            LLM-Pruner's layer-wise baseline).
        samples: Calibration samples.
        length: Tokens of each.
        batch_size: Samples at a time.
        levels: For ``measured`` ranking: into how many steps each group is cut.
        sensitivity_samples: For ``measured`` ranking: how many of the samples the loss is measured on.
        rounds: For ``measured`` ranking: into how many equal parts the budget is cut; the loss is measured before each is spent,
            beside what is gone by then.
        stock: With uniform widths: leave whole what no configuration of the model's class can have fewer of, so that stock
            classes load the checkpoint.
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
    given = {
        "criterion": criterion,
        "aggregation": aggregation,
        "compensation": compensation,
        "layers_by": layers_by,
        "samples": samples,
        "length": length,
        "batch_size": batch_size,
        "levels": levels,
        "sensitivity_samples": sensitivity_samples,
        "rounds": rounds,
        "stock": stock,
    }
    if isinstance(plan, str | os.PathLike):
        plan = PrunePlan.load(plan)
    how, chosen = settle(recipe, given, ratio, selection, plan, options, seed)
    check_stock(stock, model)
    replayed = plan is not None
    if replayed and how.compensation == "none" and calibration is not None:
        raise UsageError("plan= is replayed as it is, and reads no text: leave out calibration=, or give compensation= with it")
    clock = _Clock()
    example = inputs if inputs is not None else example_inputs(model)
    if graph is not None and not isinstance(graph, GraphModule):
        raise UsageError(f"graph= is what fxprune.trace returned, not {graph!r:.80}")
    if tolerance is not None and not (is_number(tolerance) and tolerance >= 0):
        raise UsageError(f"tolerance is the largest relative error, a number from 0 on, got {tolerance!r}")
    if graph is not None and {id(p) for p in graph.parameters()} - {id(p) for p in model.parameters()}:
        raise UsageError("graph= is the trace of another model: its parameters are not this model's")
    gm: GraphModule = graph if graph is not None else clock("trace", trace, model, example)
    groups: Groups = clock("groups", groups_of, gm)
    material = Material(calibration, model, tokenizer, how, clock)
    if plan is None:
        assert chosen is not None
        plan = Planner(chosen, how, material, loss, clock, progress).plan(gm, groups)
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
    made_up: Compensation | None = None
    if how.compensation != "none":
        made_up = clock("compensation", compensate, gm, small, plan, material.batches(), method=how.compensation, progress=progress)
    form, eager, error, note = clock("eager", _eager, model, groups, plan, small, probe, allowed, made_up.added if made_up else ())
    if eager is not None and form == "per-layer" and not hasattr(model, "merge_and_unload"):  # peft saves adapters
        save_itself(eager.model, eager.spec)
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
        note="; ".join(filter(None, [str(plan.recipe.get("note", "")), _left_out(plan, how) if replayed else "", note])),
        recipe={**plan.recipe, **({"replayed": True, **_made_up_by(how, material)} if replayed else {})},
        seconds=clock.seconds,
        versions=versions(),
        verify_tolerance=allowed,
        compensation=made_up.to_json() if made_up else None,
        data=material.seen(),
        **account(model, groups, plan),
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


def _eager(
    model: nn.Module, groups: Groups, plan: PrunePlan, small: GraphModule, probe: Any, tolerance: float, added: Sequence[str]
) -> tuple[str, Surgery | None, float | None, str]:
    """The eager pruned model: a stock class with a solved configuration if there is one, else resized modules."""
    with torch.no_grad():
        reference = call(small, probe)
    same = judge(reference, probe, tolerance, padded(model, probe), cached=caches(model, probe, tolerance), exact=small)
    note = ""
    if hasattr(model, "config") and hasattr(model, "save_pretrained"):
        try:
            shapes = {n: tuple(p.shape) for n, p in new_biases(small, plan, added).items()}
            stock = _stock(model, solve_config(model, groups, plan, shapes), small, groups, plan, added)
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
        surgery = operate(model, small, groups, plan, same, added)
    except CheckpointError as problem:
        return "graph", None, None, str(problem)
    return form, surgery, _error(reference, surgery.model, probe), note


def _left_out(plan: PrunePlan, how: Planning) -> str:
    """What to say of a plan that is replayed without the compensation that it was made with."""
    before = plan.recipe.get("compensation", "none")
    if before == "none" or how.compensation != "none":
        return ""
    return (
        f"the plan was made with compensation ({before}), which a replay leaves out unless it is asked for "
        f"(compensation='{before}', --compensation {before}): these are slices of the dense weights"
    )


def _made_up_by(how: Planning, material: Material) -> dict[str, Any]:
    """How a replayed plan was compensated: that is not what its recipe says."""
    if how.compensation == "none":
        return {"compensation": "none"}
    read = {name: getattr(how, name) for name in ("compensation", "samples", "length", "batch_size", "seed")}
    return {**read, "calibration": material.described}


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


def _stock(model: Any, config: Any, small: GraphModule, groups: Groups, plan: PrunePlan, added: Sequence[str]) -> nn.Module:
    """A model of the stock class and solved configuration, with the sliced weights."""
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):
        stock = type(model)(config)
    state = sliced_state(model, small, groups, plan, added)
    frozen = {n for n, t in state.items() if isinstance(t, nn.Parameter) and not t.requires_grad}
    try:
        _, unexpected = stock.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:  # a buffer that the traced path does not read, and the class sizes by the configuration
        raise CheckpointError(str(error).replace("\n\t", " ").strip()[:300]) from error
    stock.tie_weights()
    for name in frozen:  # load_state_dict thaws them
        stock.get_parameter(name).requires_grad_(False)
    if added:  # the switch that brought our biases may have brought others
        for name, parameter in list(stock.named_parameters()):
            if parameter.is_meta and name.endswith(".bias"):
                owner, beside = stock.get_submodule(name.rpartition(".")[0]), next(iter(state.values()))
                zeros = torch.zeros(parameter.shape, dtype=beside.dtype, device=beside.device)
                owner._parameters["bias"] = nn.Parameter(zeros, parameter.requires_grad)
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
