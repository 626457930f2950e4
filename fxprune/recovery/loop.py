"""The training loop: a function of the settings, the data and the step, so that it can be left and entered at any step."""

from __future__ import annotations

import logging
import math
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..data import Batches
from ..data.examples import IGNORED
from ..errors import FxPruneError
from ..mode import evaluating
from ..passes.batches import Progress, logits_of
from .adapters import trained
from .objective import Inputs, Objective, inputs_of
from .settings import Recovery
from .state import Position, StateDirectory
from .world import World

log = logging.getLogger("fxprune")

UNTIMED = 2
"""Steps of each start that do not count for tokens per second: they compile and allocate."""


@dataclass
class Plan:
    """What the loop runs with.

    Attributes:
        settings: The recovery's.
        steps: Optimizer steps of the whole run.
        micro: Rows of a forward pass.
        bf16: Autocast to bfloat16.
        compiled: Compile the step.
    """

    settings: Recovery
    steps: int
    micro: int
    bf16: bool
    compiled: bool


@dataclass(frozen=True)
class Due:
    """What a step reads, and where it is on the learning rate's schedule.

    Attributes:
        batches: To train on.
        epoch: Of theirs.
        index: Step of the epoch.
        place: Step of the schedule.
        steps: Of the schedule.
    """

    batches: Batches
    epoch: int
    index: int
    place: int
    steps: int


@dataclass
class Training:
    """A run in progress.

    Attributes:
        model: What is trained, as `fxprune.recovery.adapters.prepare` made it, on the device (and sharded, if it is).
        wrapped: As it is called in training.
        teacher: The dense model or None.
        batches: To train on.
        held: To measure on, None for nothing.
        plan: Sizes and switches.
        world: The processes.
        state: Where to keep the state; None keeps it nowhere.
        progress: Called with (what, done, total).
    """

    model: nn.Module
    wrapped: nn.Module
    teacher: nn.Module | None
    batches: Batches
    held: Batches | None
    plan: Plan
    world: World
    state: StateDirectory | None = None
    progress: Progress | None = None
    position: Position = field(default_factory=Position)
    best: dict[str, Tensor] = field(default_factory=dict)
    timed: tuple[int, float] = (0, 0.0)
    begun: int = 0

    def __post_init__(self) -> None:
        settings = self.plan.settings
        self.named: dict[str, nn.Parameter] = trained(self.model)
        self.optimizer: torch.optim.Optimizer = torch.optim.AdamW(
            self.named.values(),
            lr=settings.lr,
            betas=(0.9, 0.999),
            weight_decay=settings.weight_decay,
            fused=self.world.device.type == "cuda",
        )
        self.takes = inputs_of(self.model)
        self.loss: Callable[[Mapping[str, Tensor]], Tensor] = Objective(self.wrapped, self.takes, self.teacher, settings).__call__
        if self.plan.compiled:
            self.loss = torch.compile(self.loss, dynamic=not self.batches.packing)

    def run(self) -> None:
        """Train from where the state is to the end; what was learnt is in `result` afterwards.

        Raises:
            FxPruneError: The loss is not finite, or memory ran out; says what to change. The state on disk stays.
            CheckpointError: A state could not be written.
        """
        if self.state is not None:
            self._resume()
        if self.held is not None and not self.position.validation:
            self._measure()
        while not self.position.stopped:
            if self.position.step >= self.plan.steps:
                self.position.stopped = "all steps done"
                break
            with room(self.plan, self.position.step + 1, self.state):
                self._step()
            self._after()
        if self.state is not None:
            self._write()

    def result(self) -> dict[str, Tensor]:
        """The best trained parameters if validation was measured, else the last ones, on the CPU."""
        return self.best or {name: self.world.whole(p) for name, p in self.named.items()}

    @property
    def pace(self) -> float:
        """Tokens per second of this start's steps but the first ones."""
        tokens, seconds = self.timed
        return tokens / seconds if seconds else 0.0

    def _due(self) -> Due:
        """Of the next step."""
        step = self.position.step
        return Due(self.batches, *divmod(step, len(self.batches)), step, self.plan.steps)

    def _step(self) -> None:
        settings, position = self.plan.settings, self.position
        start, step, due = time.perf_counter(), position.step, self._due()
        _seed(settings.seed, step, self.world.rank)
        batch = due.batches.batch(due.epoch, due.index)
        predicted = max(1, int((batch["labels"][:, 1:] != IGNORED).sum()))
        parts = self.world.share(batch, self.plan.micro)
        lr = settings.rate(due.place, due.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        total = torch.zeros((), device=self.world.device)
        for number, part in enumerate(parts):
            with self.world.gathering(self.wrapped, number == len(parts) - 1):
                with self._cast():
                    loss = self.loss(part) / predicted
                (loss * self.world.size).backward()  # the processes' gradients are meaned
            total += loss.detach()
        norm = nn.utils.clip_grad_norm_(self.named.values(), settings.max_grad_norm or math.inf)
        norm = getattr(norm, "full_tensor", lambda: norm)()
        lost, size = torch.stack([self.world.total(total), norm.to(total)]).tolist()  # the one wait for the device in a step
        if not (math.isfinite(lost) and math.isfinite(size)):
            raise _diverged(step + 1, lost, settings, self.state)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        tokens = int(due.batches.examples.lengths[due.batches.epoch(due.epoch)[due.index]].sum())
        seconds = time.perf_counter() - start
        position.step, position.tokens = step + 1, position.tokens + tokens
        position.seconds += seconds
        self.begun += 1
        if self.begun > UNTIMED:
            self.timed = self.timed[0] + tokens, self.timed[1] + seconds
        for key, value in (("step", step + 1), ("loss", lost), ("lr", lr), ("tokens", position.tokens)):
            position.history[key].append(value)

    def _after(self) -> None:
        settings, position = self.plan.settings, self.position
        last = position.step >= self.plan.steps
        if self.progress is not None and self.world.main:
            pace = f", {self.pace:,.0f} tokens/s" if self.pace else ""
            self.progress(f"recovery (loss {position.history['loss'][-1]:.3f}{pace})", position.step, self.plan.steps)
        every = settings.validation_every
        if self.held is not None and (last or (every and position.step % every == 0)):
            self._measure()
            if settings.patience and position.waited >= settings.patience and not last:
                position.stopped = f"validation perplexity has not fallen for {position.waited} measurements"
        every = settings.checkpoint_every
        if self.state is not None and not last and every and position.step % every == 0:
            self._write()

    def _measure(self) -> None:
        """Validation perplexity; the best weights so far are kept."""
        assert self.held is not None
        position = self.position
        found = self.perplexity(self.held)
        position.validation.append({"step": position.step, "perplexity": found})
        log.info("step %d of %d: validation perplexity %.3f", position.step, self.plan.steps, found)
        if position.best is None or found < position.best or math.isnan(position.best):
            position.best, position.best_step, position.waited = found, position.step, 0
            self.best = {name: self.world.whole(p) for name, p in self.named.items()}
        else:
            position.waited += 1

    def perplexity(self, batches: Batches) -> float:
        """The exponential of `mean_loss` of what is trained."""
        mean = self.mean_loss(self.model, self.takes, batches)
        return math.inf if mean >= 700 else math.exp(mean)

    @torch.no_grad()
    def mean_loss(self, model: nn.Module, takes: Inputs, batches: Batches) -> float:
        """The mean negative log-likelihood of every predicted token of the batches' first epoch, in nats.

        Args:
            model: What is trained, or the dense one.
            takes: What it takes, see `fxprune.recovery.objective.inputs_of`.
            batches: To measure on.
        """
        total = torch.zeros(2, dtype=torch.float64, device=self.world.device)
        with evaluating(model):
            for index in range(len(batches)):
                batch = batches.batch(0, index)
                for part in self.world.share(batch, self.plan.micro):
                    with room(self.plan, self.position.step, self.state), self._cast():
                        logits = logits_of(model(**takes.of(part)))[:, :-1].float()
                    labels = part["labels"][:, 1:].flatten()
                    lost = nn.functional.cross_entropy(logits.flatten(0, 1), labels, ignore_index=IGNORED, reduction="sum")
                    total += torch.stack([lost.double(), (labels != IGNORED).sum().double()])
        lost, count = self.world.total(total).tolist()
        return float(lost / max(count, 1))

    def _cast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.world.device.type, dtype=torch.bfloat16, enabled=self.plan.bf16)

    def _write(self) -> None:
        """All processes gather, the main one writes."""
        assert self.state is not None
        tensors = self._tensors()
        if self.world.main:
            self.state.write(self.position, tensors)

    def _tensors(self) -> dict[str, Tensor]:
        """All of the state that is a tensor, on the CPU."""
        tensors = {f"trained/{n}": self.world.whole(p) for n, p in self.named.items()}
        for name, parameter in self.named.items():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer/{key}/{name}"] = self.world.whole(value)
        return tensors | {f"best/{n}": t for n, t in self.best.items()}

    def _resume(self) -> None:
        assert self.state is not None
        self.world.wait()  # the main process has put the directory in order
        found = self.state.read()
        if found is None:
            return
        self.position, tensors = found
        log.info("continuing after step %d of %d", self.position.step, self.plan.steps)
        self._restore(tensors)

    def _restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `_tensors` gave."""
        for name, parameter in self.named.items():
            with torch.no_grad():
                parameter.copy_(self.world.place(tensors[f"trained/{name}"], parameter))
        for path, value in tensors.items():
            kind, _, rest = path.partition("/")
            if kind == "optimizer":
                key, _, name = rest.partition("/")
                self.optimizer.state[self.named[name]][key] = self.world.place(value, self.named[name])
            elif kind == "best":
                self.best[rest] = value


def _seed(seed: int, step: int, rank: int) -> None:
    """Every step draws (dropout) from a generator of its own: the step's number is all the random state there is."""
    torch.manual_seed(zlib.crc32(f"{seed} {step} {rank}".encode()))


@contextmanager
def room(plan: Plan, step: int, state: StateDirectory | None) -> Iterator[None]:
    """Turn what an allocator says into what to lower."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        if not memory:
            raise
        settings = plan.settings
        checkpointing = "" if settings.gradient_checkpointing == "on" else " or set gradient_checkpointing=on,"
        kept = _kept(state)
        raise FxPruneError(
            f"out of memory at step {step}: lower micro_batch_size (it is {plan.micro}),{checkpointing} and run again{kept}; "
            f"if that does not help, lower length and cutoff (they are {settings.length} and {settings.cutoff})"
        ) from error


def _diverged(step: int, loss: float, settings: Recovery, state: StateDirectory | None) -> FxPruneError:
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradient is not finite"
    if step == 1 and not math.isfinite(loss):
        return FxPruneError(
            f"{what} at step 1, before anything was trained: the model is damaged, or its numbers are too large for its dtype"
        )
    last = state.last_step() if state is not None else None
    kept = f"; the last good state, of step {last}, is kept in '{state.typed}'" if state is not None and last is not None else ""
    again = " and start over with --restart (restart=True)" if last is not None else ""
    return FxPruneError(f"{what} at step {step}: training diverged; lower lr (it is {settings.lr:g}){again}{kept}")


def _kept(state: StateDirectory | None) -> str:
    if state is None or state.last_step() is None:
        return ""
    return f" (it goes on from step {state.last_step()}: the state in '{state.typed}' is kept)"
