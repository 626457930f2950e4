"""The one-call interface: trace, find groups, score, select, rewrite, verify, and the same surgery on the eager model."""

from __future__ import annotations

import copy
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule

from .calibration import Calibration, load_calibration
from .capture import quiet, trace
from .checkpoint.config import Unsolved, solve_config
from .checkpoint.eager import Surgery, call, judge, operate
from .checkpoint.save import save_pruned
from .criteria import Criterion, UserCriterion, find_criterion
from .errors import CheckpointError, UsageError, VerificationError
from .groups import Groups
from .passes.dependency import find_groups
from .passes.importance import Loss, score
from .passes.influence import block_influence
from .passes.rewrite import rewrite
from .passes.selection import LAYERS, Selection, select
from .passes.verify import VerifyReport, tolerance_of, verify
from .plan import PrunePlan

log = logging.getLogger("fxprune")

Progress = Callable[[str, int, int], None]


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
        model: The same network as an eager model of the dense model's class; None where that class cannot express it (the report's
            note says why).
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
    criterion: str | Criterion | UserCriterion = "taylor1",
    aggregation: str = "sum",
    selection: Selection | None = None,
    plan: PrunePlan | None = None,
    loss: Loss | None = None,
    samples: int = 10,
    length: int = 64,
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
        criterion: See `fxprune.criteria.CRITERIA`.
        aggregation: See `fxprune.criteria.AGGREGATIONS`.
        selection: Targets and constraints; or give fields of `fxprune.passes.selection.Selection` as keywords.
        plan: A ready plan to replay; nothing is scored or selected.
        loss: ``(outputs, batch) -> scalar`` for models without next-token loss.
        samples: Calibration samples.
        length: Tokens of each.
        seed: For calibration sampling and random scores.
        verify_inputs: What to verify on; by default the example inputs.
        check: Verify (on by default).
        tolerance: Largest relative error that verification accepts; by default by dtype.
        progress: Called with (what, done, total).
        **options: Fields of `Selection`.

    Returns:
        A `PruneResult`.

    Raises:
        UsageError: An argument that cannot be used.
        CaptureError: The model cannot be traced.
        VerificationError: The pruned graph differs from its reference.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module to prune, got {type(model).__name__}")
    find_criterion(criterion)
    chosen = selection
    if plan is None and selection is None:
        chosen = Selection(ratio=ratio, **options)
    clock = _Clock()
    example = inputs if inputs is not None else example_inputs(model)
    gm: GraphModule = clock("trace", trace, model, example)
    groups: Groups = clock("groups", find_groups, gm)
    if plan is None:
        assert chosen is not None
        plan = _make_plan(model, gm, groups, chosen, clock, criterion, aggregation, calibration, tokenizer, loss, samples, length, seed, progress)
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
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise UsageError(f"cannot guess example inputs for {type(model).__name__}: pass inputs={{...}}")
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    return {"input_ids": torch.randint(0, vocabulary, (2, 16), generator=generator).to(device)}


def _make_plan(
    model: nn.Module,
    gm: GraphModule,
    groups: Groups,
    chosen: Selection,
    clock: _Clock,
    criterion: str | Criterion | UserCriterion,
    aggregation: str,
    calibration: Calibration,
    tokenizer: Any,
    loss: Loss | None,
    samples: int,
    length: int,
    seed: int,
    progress: Progress | None,
) -> PrunePlan:
    found = find_criterion(criterion)
    only_layers = all(k == LAYERS for k, pace in chosen.pace.items() if pace > 0)
    wants_blocks = chosen.pace.get(LAYERS, 0) > 0
    needs_text = wants_blocks or not isinstance(found, Criterion) or found.gradient
    batches: Sequence[Mapping[str, torch.Tensor]] = []
    described = "none"
    if needs_text and not (only_layers and isinstance(found, Criterion) and found.name == "random"):
        batches, described = clock(
            "calibration", load_calibration, calibration, model=model, tokenizer=tokenizer, samples=samples, length=length, seed=seed
        )
    scores = {}
    if not only_layers:
        scores = clock(
            "importance",
            score,
            gm,
            groups,
            criterion=criterion,
            calibration=batches,
            aggregation=aggregation,
            loss=loss,
            seed=seed,
            progress=progress,
        )
    influence = clock("influence", block_influence, gm, groups, batches) if wants_blocks and batches else None
    recipe = {
        "criterion": found.name if isinstance(found, Criterion) else getattr(found, "__name__", "callable"),
        "aggregation": aggregation,
        "calibration": described,
        "samples": samples,
        "length": length,
        "seed": seed,
    }
    plan: PrunePlan = clock("selection", select, groups, scores, chosen, block_scores=influence, recipe=recipe)
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
            note = f"no stock configuration expresses the plan: its {type(model).__name__} differs from the pruned graph ({failure})"
        except (Unsolved, CheckpointError) as problem:
            note = f"no stock configuration expresses the plan: {problem}"
        form = "per-layer"
    else:
        form = "module"
    try:
        surgery = operate(model, groups, plan, same)
    except CheckpointError as problem:
        return "graph", None, None, str(problem)
    return form, surgery, _error(reference, surgery.model, probe), note


def _error(reference: Any, eager: nn.Module, probe: Any) -> float:
    from .passes.verify import relative_error

    with quiet(eager), torch.no_grad():
        return relative_error(reference, call(eager, probe))


def _stock(model: Any, config: Any, small: GraphModule, groups: Groups, plan: PrunePlan) -> nn.Module:
    """A model of the stock class and solved configuration, with the sliced weights."""
    from accelerate import init_empty_weights

    from .checkpoint.eager import sliced_state

    with init_empty_weights(include_buffers=False):
        stock = type(model)(config)
    state = sliced_state(model, groups, plan)
    missing, unexpected = stock.load_state_dict(state, strict=False, assign=True)
    stock.tie_weights()
    left = [n for n, p in stock.named_parameters() if p.is_meta]
    if left or unexpected:
        raise CheckpointError(f"stock {type(model).__name__} has parameters that the pruned model lacks: {(left or unexpected)[:3]}")
    first = next(model.parameters())
    stock.to(first.device)
    if getattr(model, "generation_config", None) is not None:
        stock.generation_config = copy.deepcopy(model.generation_config)
    return stock.eval()  # type: ignore[no-any-return]
