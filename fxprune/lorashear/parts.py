"""The parts of a shearing between the data and the pruned checkpoint: rehearse, measure, train, merge, remove."""

from __future__ import annotations

import hashlib
import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.fx import GraphModule

from ..api import PruneResult, example_inputs, prune
from ..capture import trace
from ..checkpoint.judge import call
from ..criteria import CRITERIA
from ..data import Batches
from ..data.sources import reason
from ..errors import CheckpointError, FxPruneError, PlanError, UsageError, VerificationError
from ..files import write_whole
from ..groups import Groups, Member, PruneGroup
from ..knowledge import Knowledge
from ..mode import quiet, without_cache
from ..passes.batches import Batch, Progress
from ..passes.consumers import find_consumers
from ..passes.dependency import groups_of
from ..passes.importance import score
from ..passes.knowledge import measure_knowledge
from ..passes.selection import Selection, absent_kinds, lanes_of, select
from ..passes.verify import relative_error
from ..plan import PrunePlan
from ..recovery.adapters import merged, prepare, trained
from ..recovery.objective import check_teacher
from ..recovery.run import RecoveryRun
from ..recovery.state import StateDirectory
from .adapters import factors_of, find_adapters
from .budget import Schedule
from .lhspg import LHSPG
from .settings import AUTO, FALLBACK, PREFERRED, SALIENCY, Shearing
from .training import ShearTraining
from .windows import windows
from .work import WorkDirectory

log = logging.getLogger("fxprune")


@dataclass
class Parts:
    """A model on its way to a smaller one.

    Attributes:
        settings: Of the shearing.
        ratio: Share of all parameters to remove.
        run: The training's parts: a copy of the dense model whose weights may change, the data, the device.
        dense: The model that is sheared; it is not changed.
        batches: What LHSPG reads.
        schedule: Its steps.
        work: Where everything is kept.
        progress: Called with (what, done, total).
    """

    settings: Shearing
    ratio: float
    run: RecoveryRun
    dense: nn.Module
    batches: Batches
    schedule: Schedule
    work: WorkDirectory
    progress: Progress | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def copied(self) -> nn.Module:
        """The copy that is sheared."""
        return self.run.subject.model

    @cached_property
    def bare(self) -> tuple[GraphModule, Groups]:
        """Its trace and groups."""
        gm = trace(self.copied, example_inputs(self.copied))
        return gm, groups_of(gm)

    @cached_property
    def adapted(self) -> tuple[nn.Module, GraphModule, Groups]:
        """The copy with adapters, its trace and groups: base weights and adapters in the same ones."""
        student = prepare(self.copied, self.run.settings, wide=not self.run.bf16).to(self.run.world.device)
        gm = trace(student, example_inputs(student))
        return student, gm, groups_of(gm)

    def lhspg(self, optimizer: torch.optim.Optimizer, selection: Selection, scores: Mapping[str, Tensor] | None = None) -> LHSPG:
        """LHSPG around the adapters' optimizer; scores are those of the groups of the model without adapters."""
        _, gm, groups = self.adapted
        names = {} if scores is None else self._adapted_names
        settings, schedule = self.settings, self.schedule
        return LHSPG(
            optimizer,
            gm,
            groups,
            selection=selection,
            warmup=schedule.warmup,
            periods=schedule.periods,
            period_steps=schedule.period_steps,
            projection=settings.projection,
            penalty=settings.penalty,
            epsilon=settings.epsilon,
            saliency=settings.saliency if scores is None else None,
            scores=None if scores is None else {names[name]: own for name, own in scores.items() if name in names},
        )

    def _trial(self, protect: Sequence[str] = ()) -> LHSPG:
        """See that the target can be reached; nothing is trained."""
        student, _, _ = self.adapted
        return self.lhspg(torch.optim.SGD(trained(student).values(), lr=0.0), self.settings.selection(self.ratio, protect))

    def absent(self) -> list[str]:
        """A note on each kind that was asked for and of which something, or everything, cannot be brought to zero."""
        trial, groups = self._trial(), self.adapted[2]
        notes = absent_kinds(trial.bare, self.settings.selection(self.ratio))
        for kind, names in trial.idle().items():
            if any(f"kind '{kind}'" in note for note in notes):
                continue
            there = sum(group.kind == kind for name, group in groups.items() if name in trial.eligible)
            some = f"{len(names)} of {len(names) + there} groups" if there else "all groups"
            notes.append(f"{some} of kind '{kind}' stay whole ('{names[0]}': {trial.left_out[names[0]]})")
        return notes

    def rehearse(self, given: Knowledge | None) -> None:
        """Refuse what would go wrong after hours of training: a target out of reach, no text to measure on, no form to save in.

        Args:
            given: Knowledge that was measured already.

        Raises:
            UsageError: The last two, knowledge of another model, or a criterion that cannot rank what may go.
            PlanError: The first.
        """
        gm, groups = self.bare
        if given is not None:
            given.check(groups)
        eligible, share = self._trial().eligible, self.settings.protect_share
        self._check_criterion(eligible)
        if share:
            if given is None:
                self._windows()
                smallest = sorted((self.adapted[2][name] for name in eligible), key=_removable)
                names = [group.name for group in smallest[: math.ceil(share * len(smallest) - 1e-9)]]
            else:
                names = list(given.protected(share, self._kinds(given)))
            self._reachable(names)
        theirs = self._adapted_names
        idle = [name for name, group in groups.items() if group.prunable and theirs.get(name) not in eligible]
        selection = self.settings.selection(self.ratio, idle)
        ones = {name: torch.ones(groups[name].size) for names in lanes_of(groups, selection).values() for name in names}
        trial = prune(self.copied, plan=select(groups, ones, selection), graph=gm, check=False)
        if trial.model is None:
            raise UsageError(f"what is left could not be saved as a checkpoint: {trial.report.note}")

    def _reachable(self, protected: Sequence[str]) -> None:
        """See that the target can be reached beside what knowledge protects."""
        try:
            self._trial(protected)
        except (PlanError, UsageError) as error:
            share = self.settings.protect_share
            raise PlanError(f"with a share of {share:g} of all groups left whole (protect_share), {error}") from error

    def _windows(self) -> tuple[list[dict[str, Tensor]], str]:
        settings = self.settings
        held = self.run.data.stages[0].held
        return windows(held, samples=settings.knowledge_samples, length=settings.knowledge_length, held=True)

    def weigh(self) -> dict[str, Tensor] | None:
        """Importance of the units by the criterion, measured only if it was not before; None where saliency ranks.

        Raises:
            UsageError: No source has text enough.
            CheckpointError: The disk is full.
        """
        file = self.work.scores
        if self.criterion == SALIENCY:
            return None
        if file.is_file():
            try:
                return load_file(file)
            except (SafetensorError, OSError) as error:
                log.warning("'%s' is damaged (%s): importance is measured again", file.name, reason(error))
        start, (gm, groups) = time.perf_counter(), self.bare
        options: dict[str, Any] = {"calibration": self._read(), "seed": self.settings.training.seed, "progress": self.progress}
        found = score(gm, groups, self.criterion, **options)
        write_whole(file, save(found), called="the scores", error=CheckpointError)
        self.work.record("importance", {"seconds": round(time.perf_counter() - start, 3)})
        return load_file(file)

    def _read(self) -> list[Batch]:
        """The text that the criterion reads; nothing for one that reads none."""
        settings, stage = self.settings, self.run.data.stages[0].train
        if not CRITERIA[self.criterion].calibrated:
            return []
        texts = {name: stage.select((stage.source == i).nonzero().flatten().tolist()) for i, name in enumerate(stage.names)}
        return list(windows(texts, samples=settings.criterion_samples, length=settings.knowledge_length, held=False)[0])

    @cached_property
    def criterion(self) -> str:
        """What ranks units: what the settings say, or what ``auto`` comes to."""
        name = self.settings.criterion
        if name != AUTO:
            return name
        unread = self._unread(self._trial().eligible)
        if unread:
            self.notes.append(f"{FALLBACK} ranks units, not {PREFERRED}: no linear map contracts those of '{unread[0]}'")
        return FALLBACK if unread else PREFERRED

    def _unread(self, eligible: Sequence[str]) -> list[str]:
        """Groups whose units no linear map contracts, of those that LHSPG may take units of."""
        gm, groups = self.bare
        names, read = self._adapted_names, {own for consumer in find_consumers(gm, groups) for own in consumer.groups}
        return sorted(set(eligible) - {names[own] for own in read if own in names})

    def _check_criterion(self, eligible: Sequence[str]) -> None:
        """Refuse a criterion that has no text, or nothing to say of a group that LHSPG may take units of."""
        name = self.criterion
        if name == SALIENCY:
            return
        self._read()
        missing = [] if CRITERIA[name].feature is None else self._unread(eligible)
        if missing:
            raise UsageError(
                f"criterion '{name}' looks at what linear maps read, and none contracts the units of '{missing[0]}': leave kind "
                f"'{self.adapted[2][missing[0]].kind}' out, or take another criterion, such as {FALLBACK}"
            )

    @cached_property
    def _adapted_names(self) -> dict[str, str]:
        """For each group of the model without adapters the name of the same one with them."""
        _, gm, groups = self.adapted
        factors = factors_of(find_adapters(gm))
        theirs = {_key(group, factors): name for name, group in groups.items()}
        return {name: theirs[key] for name, group in self.bare[1].items() if (key := _key(group, frozenset())) in theirs}

    def _kinds(self, knowledge: Knowledge | None = None) -> list[str]:
        """Kinds that LHSPG may take units of; of knowledge, those that were measured."""
        _, _, groups = self.adapted
        kinds = sorted({groups[name].kind for name in self._trial().eligible})
        found = [kind for kind in kinds if knowledge is None or any(row.kind == kind for row in knowledge.rows)]
        if not found:
            raise UsageError(f"the knowledge has nothing of kind {', '.join(kinds)}: measure that with fxprune sensitivity --kinds")
        return found

    def measure(self, given: Knowledge | None) -> tuple[Knowledge, tuple[str, ...], float]:
        """(the knowledge distribution, the groups that it protects, seconds), measured only if it was not before.

        Raises:
            PlanError: What it protects puts the target out of reach.
        """
        gm, groups = self.bare
        start, file = time.perf_counter(), self.work.knowledge
        if given is not None:
            found = given
        elif file.is_file():
            found = Knowledge.load(file)
        else:
            batches, text = self._windows()
            beside = file.with_name(f"{file.name}.measuring")
            options: dict[str, Any] = {"by": self.settings.knowledge_by, "text": text, "state": beside, "progress": self.progress}
            found = measure_knowledge(gm, groups, batches, kinds=self._kinds(), **options)
            found.save(file)
            self.work.record("knowledge", {"seconds": round(time.perf_counter() - start, 3)})
            beside.unlink(missing_ok=True)
        seconds = float(self.work.stages.get("knowledge", {}).get("seconds", 0.0))
        protected = found.protected(self.settings.protect_share, self._kinds(found))
        self._reachable(protected)
        return found, protected, seconds

    def train(self, protect: Sequence[str], scores: Mapping[str, Tensor] | None) -> ShearTraining:
        """Run LHSPG to its end, from where its state is.

        Args:
            protect: Names that stay whole.
            scores: As `weigh` returned them.
        """
        run, settings = self.run, self.run.settings
        student, _, _ = self.adapted
        teacher = self.dense.to(run.world.device) if settings.distils else None
        identity = {"the shearing": self.work.run}
        state = StateDirectory(self.work.lhspg, identity, suffix="", of="shearing")
        try:
            parts = (student, student, teacher, self.batches, None, run.fit(student, self.schedule.steps), run.world, state)
            selection = self.settings.selection(self.ratio, protect)
            training = ShearTraining(
                *parts, self.progress, wrap=lambda optimizer: self.lhspg(optimizer, selection, scores), schedule=self.schedule
            )
            with without_cache(student), nullcontext() if teacher is None else quiet(teacher):
                if teacher is not None:
                    check_teacher(student, teacher, settings)
                training.run()
        finally:
            state.close()
        return training

    def remove(self, training: ShearTraining, recipe: Mapping[str, Any]) -> tuple[PruneResult, dict[str, Any]]:
        """Merge the adapters, and take out what is zero.

        Args:
            training: That is over.
            recipe: What else the plan says of how it was made.

        Returns:
            (the pruned model, how exact it is).

        Raises:
            VerificationError: What goes is not exactly zero, or the pruned model computes something else.
        """
        student, _, _ = self.adapted
        inputs = example_inputs(student)
        with quiet(student), torch.no_grad():
            expected = call(student, inputs)
            for name, parameter in self.copied.named_parameters():
                parameter.copy_(_base(student, name))
            whole = merged(self.copied, training.result(), self.run.settings)
            for parameter, other in zip(self.copied.parameters(), whole.parameters(), strict=True):
                parameter.data = other.data
        plan = self._plan(training.lhspg, recipe)
        zeros = _zeros(self.copied, self.bare[1], plan)
        result = prune(self.copied, plan=plan, graph=self.bare[0], tokenizer=self.run.subject.tokenizer)
        assert result.model is not None
        with quiet(result.model), torch.no_grad():
            error = relative_error(expected, call(result.model, inputs))
        report = result.report
        verified = None if report.verify is None else report.verify.to_json()
        return result, {"zeros": zeros, "verify": verified, "eager_error": report.eager_error, "merged_error": error}

    def _plan(self, lhspg: LHSPG, recipe: Mapping[str, Any]) -> PrunePlan:
        """The plan of the model without adapters: its groups are the same, but for theirs."""
        bare = {theirs: name for name, theirs in self._adapted_names.items()}
        made = dict(lhspg.plan().recipe)
        removed = float(made["removed"])
        if abs(removed - self.ratio) > 1e-3:
            note = f"asked for {self.ratio:.2%} of the parameters: the nearest that the units allow is {removed:.2%}"
            made["note"] = note
            self.notes.append(note)
        try:
            gone = {bare[name]: units for name, units in lhspg.zero.items()}
        except KeyError as error:
            raise FxPruneError("the groups of the model with adapters are not those of the model without") from error
        return PrunePlan.from_removed(self.bare[1], gone, recipe={**made, **recipe})


def _removable(group: PruneGroup) -> float:
    return group.parameters_per_unit * (group.size - group.least)


def _key(group: PruneGroup, factors: frozenset[str] | set[str]) -> frozenset[tuple[str, int, str]]:
    """What a group owns: parameter dimensions, under the names that they have without adapters, and whose each position is.

    Dimensions alone would not do: in a fused projection heads and the dimensions of heads have the same ones.
    """
    own = (m for m in group.members if m.trainable and m.name not in factors)
    return frozenset((m.name.replace(".base_layer.", "."), m.dim, _owners(m)) for m in own)


def _owners(member: Member) -> str:
    """Which unit owns which positions, in short."""
    return hashlib.sha256(torch.stack(member.incidence).numpy().tobytes()).hexdigest()


def _base(student: nn.Module, name: str) -> Tensor:
    """The base weight of that name in a model with adapters."""
    path, _, leaf = name.rpartition(".")
    owner = student.get_submodule(path)
    return cast(nn.Module, getattr(owner, "base_layer", owner)).get_parameter(leaf)


def _zeros(model: nn.Module, groups: Groups, plan: PrunePlan) -> int:
    """How many numbers of a model go with a plan, all of them zero.

    Raises:
        VerificationError: One is not.
    """
    named, count = dict(model.named_parameters(remove_duplicate=False)), 0
    for name, units in plan.removed().items():
        for member in (m for m in groups[name].members if m.trainable):
            values = named[member.name].detach().index_select(member.dim, member.indices(units).to(named[member.name].device))
            if bool(values.count_nonzero()):
                raise VerificationError(f"a unit of '{name}' that goes is not zero in '{member.name}': nothing was removed")
            count += values.numel()
    return count
