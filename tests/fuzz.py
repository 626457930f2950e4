"""The fuzzer: random networks, every prunable group of each pruned at random, compared with the masked dense network.

A network is a *program*, a list of steps that prints as text and reads back from it:

    t0 = input(width=8)
    t1 = linear(t0, out=12, bias=True)
    t2, t3 = chunk(t1, n=2, dim=-1)
    t4 = join(t2, t3, op='mul')
    t5 = linear(t4, out=3, bias=True)

Tensors that no step reads are the outputs. `fuzz_steps`, `fuzz_layouts` and `fuzz_routing` have the kinds of steps,
`fuzz_patterns` runs of them, `fuzz_draw` how they are drawn. `check` asks `fxprune.verify`, and, where the plan leaves normalised
axes alone, a reference that shares nothing with it: the eager module whose removed parameter slices are zeroed by plain indexing.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune.errors import CaptureError
from fxprune.groups import Groups, PruneGroup
from fxprune.passes.verify import relative_error

from . import fuzz_layouts, fuzz_routing, fuzz_steps
from .fuzz_draw import BATCH, KINDS, SEQUENCE, Chooser, Pool, Shape, kinds_by_weight, static, symbolic
from .fuzz_patterns import PATTERNS

TOLERANCE = 1e-9
"""For double precision: what is right is below 1e-12, what is wrong is rarely below 1e-3."""

TRACED, RUN = (2, 5), (3, 4)
_LARGEST, _DEEPEST = 96, 5

__all__ = [
    "KINDS",
    "Network",
    "Outcome",
    "Program",
    "check",
    "fuzz_layouts",
    "fuzz_routing",
    "fuzz_steps",
    "generate",
    "parse",
    "programs",
]


@dataclass(frozen=True)
class Step:
    """One line of a program: the kind, the numbers of the tensors that it reads and makes, and its options."""

    kind: str
    inputs: tuple[int, ...]
    options: Mapping[str, Any]
    outputs: tuple[int, ...]

    def __str__(self) -> str:
        arguments = [*(f"t{i}" for i in self.inputs), *(f"{k}={v!r}" for k, v in self.options.items())]
        return f"{', '.join(f't{i}' for i in self.outputs)} = {self.kind}({', '.join(arguments)})"


@dataclass(frozen=True)
class Program:
    """A network as data."""

    width: int
    steps: tuple[Step, ...]

    def __str__(self) -> str:
        return "\n".join([f"t0 = input(width={self.width})", *map(str, self.steps)])

    @property
    def outputs(self) -> list[int]:
        """The tensors that no step reads."""
        read = {i for s in self.steps for i in s.inputs}
        return [i for s in self.steps for i in s.outputs if i not in read]


def parse(text: str) -> Program:
    """Read a program as it prints; steps are made valid on the way, so that numbers of tensors must be in order."""
    builder: Builder | None = None
    for line in ast.parse(text).body:
        assert isinstance(line, ast.Assign)
        assert isinstance(line.value, ast.Call)
        assert isinstance(line.value.func, ast.Name)
        options = {str(k.arg): ast.literal_eval(k.value) for k in line.value.keywords}
        if builder is None:
            builder = Builder(options["width"])
            continue
        inputs = [int(ast.unparse(a).removeprefix("t")) for a in line.value.args]
        made = builder.add(line.value.func.id, inputs, **options)
        names = ast.unparse(line.targets[0]).strip("()").split(", ")
        assert names == [f"t{i}" for i in made], f"line {line.lineno} makes {made}"
    assert builder is not None
    return builder.program


class Builder:
    """Grows a program, running it on the meta device so that every shape is known."""

    def __init__(self, width: int) -> None:
        self.width = width
        self.steps: list[Step] = []
        self.pool = Pool([torch.empty(BATCH, SEQUENCE, width, device="meta", dtype=torch.float64)])
        self.own: dict[str, nn.Module] = {}

    @property
    def program(self) -> Program:
        """What has been built."""
        return Program(self.width, tuple(self.steps))

    def shape(self, i: int) -> Shape:
        """Of tensor ``i``."""
        return self.pool.shape(i)

    def add(self, kind: str, inputs: list[int], **options: Any) -> list[int]:
        """Append a step; returns the numbers of its outputs. Raises what torch raises if it does not fit."""
        tensors = [self.pool.tensors[i] for i in inputs]
        start = len(self.pool.tensors)
        make = KINDS[kind].make
        own = self.own.get(options.get("of", ""))
        if make is not None:
            with torch.device("meta"):
                own = make(tensors[0], **options).double().eval()
        result = KINDS[kind].run(own, *tensors, **options)
        made = list(result) if isinstance(result, tuple | list) else [result]
        if any(t.dim() > _DEEPEST or math.prod(t.shape[d] for d in static(t.shape)) > _LARGEST for t in made):
            raise ValueError("too large")
        outputs = list(range(start, start + len(made)))
        if own is not None and make is not None:
            self.own[f"t{start}"] = own
        if kind == "linear":
            self.pool.linears[start] = (tensors[0].shape[-1], made[0].shape[-1])
        self.pool.tensors += made
        self.steps.append(Step(kind, tuple(inputs), options, tuple(outputs)))
        return outputs

    def one(self, kind: str, *inputs: int, **options: Any) -> int:
        """Append a step with one output."""
        return self.add(kind, list(inputs), **options)[0]

    def draw(self, c: Chooser, kind: str) -> bool:
        """Append a step of a kind, if one fits."""
        drawn = KINDS[kind].draw(c, self.pool)
        return drawn is not None and bool(self.add(kind, drawn[0], **drawn[1]))

    def close(self) -> None:
        """Every output goes through a last Linear, so that its static dimensions are inner ones: outputs are pinned."""
        for i in self.program.outputs:
            while len(symbolic(self.shape(i))) > 1:
                i = self.one("average", i, dim=symbolic(self.shape(i))[-1], keepdim=False)
            shape = self.shape(i)
            if not static(shape):
                continue
            order = (0, *symbolic(shape), *static(shape))
            if order != tuple(range(len(shape))):
                i = self.one("permute", i, dims=order)
            if len(static(shape)) > 1:
                i = self.one("flatten", i, start=len(shape) - len(static(shape)), end=-1)
            self.one("linear", i, out=3, bias=True)


def generate(c: Chooser) -> Program:
    """A random program: patterns that models are full of, and single steps of every kind."""
    builder = Builder(c.choice((8, 6, 12)))
    kinds = list(kinds_by_weight())
    builder.one("linear", 0, out=c.choice((12, 8, 6, 16)), bias=c.choice((True, False)))
    for _ in range(c.choice((3, 2, 4, 5, 6, 7, 8))):
        try:
            if c.choice((False, True, False, False, False)):
                c.choice(PATTERNS)(c, builder)
            elif not any(builder.draw(c, c.choice(kinds)) for _ in range(4)):
                break
        except (RuntimeError, IndexError, ValueError):  # torch says that it does not fit: another step may
            continue
    builder.close()
    return builder.program


class Drawn:
    """Hypothesis behind the interface of `random.Random`."""

    def __init__(self, draw: Callable[[st.SearchStrategy[Any]], Any]) -> None:
        self._draw = draw

    def choice(self, seq: Any) -> Any:
        """One of the options."""
        return self._draw(st.sampled_from(seq))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random programs, as a strategy."""
    return generate(Drawn(draw))


class Network(nn.Module):
    """The module that a program describes: double precision, random weights, biases and buffers."""

    def __init__(self, program: Program, seed: int = 0) -> None:
        super().__init__()
        self.program = program
        builder = Builder(program.width)
        for step in program.steps:
            builder.add(step.kind, list(step.inputs), **step.options)
        for name, own in builder.own.items():
            self.add_module(name, own)
        self.to_empty(device="cpu")
        torch.manual_seed(seed)
        for name, weight in (*self.named_parameters(), *self.named_buffers()):
            if weight.is_floating_point():
                fan_in = math.prod(weight.shape[1:])
                weight.data = torch.randn_like(weight) * (1.5 / math.sqrt(fan_in))
                if name.endswith("running_var"):
                    weight.data = weight.data.abs() + 0.3
        self.eval()

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        values: dict[int, Tensor] = {0: x}
        for step in self.program.steps:
            own = self._modules.get(step.options.get("of", f"t{step.outputs[0]}"))
            made = KINDS[step.kind].run(own, *(values[i] for i in step.inputs), **step.options)
            values.update(zip(step.outputs, made if isinstance(made, tuple | list) else (made,), strict=True))
        return tuple(values[i] for i in self.program.outputs)


def silent(program: Program) -> bool:
    """True if zero parameters are all it takes to take a unit out.

    That fails where a step takes the best of some units, and where one makes something else than zero of a unit (a sigmoid, a
    softmax, a broadcast sum) and a later one sums over it with no parameter in between; `fxprune.verify` then leaves the unit out,
    and plain zeros cannot say the same.
    """
    builder, leaky = Builder(program.width), set[int]()
    for step in program.steps:
        kind, shapes = KINDS[step.kind], [builder.shape(i) for i in step.inputs]
        builder.add(step.kind, list(step.inputs), **step.options)
        wide = len(shapes[0]) > 3
        if kind.picks or (kind.sums and any(i in leaky for i in step.inputs)):
            return False
        if step.kind in ("linear", "fan", "again", "tied") and not wide:
            continue
        leaks = kind.leaks or (wide and (step.kind == "again" or step.options.get("bias", False)))
        if step.kind == "join":
            leaks = shapes[0] != shapes[1]
        elif step.kind == "weigh":
            covered = math.prod(step.options["shape"]) == math.prod(shapes[0][d] for d in static(shapes[0]))
            leaks = step.options["op"] == "mask" or (step.options["op"] == "add" and not covered)
        if leaks or any(i in leaky for i in step.inputs):
            leaky.update(step.outputs)
    return True


@dataclass
class Outcome:
    """What checking one program found.

    Attributes:
        untraced: Why it could not be traced; empty if it could.
        fixed: True if the trace fell back to fixed sizes.
        groups: Number of prune groups.
        prunable: Number of those that may be pruned.
        verified: Plans checked with `fxprune.verify`.
        masked: Plans checked with the zeroed eager module.
        worst: Largest relative error of either.
        problems: What is wrong, in words.
    """

    untraced: str = ""
    fixed: bool = False
    groups: int = 0
    prunable: int = 0
    verified: int = 0
    masked: int = 0
    worst: float = 0.0
    problems: list[str] = field(default_factory=list)

    def judge(self, what: str, error: float) -> None:
        """Record an error of a check."""
        self.worst = max(self.worst, error) if error == error else error
        if not error < TOLERANCE:
            self.problems.append(f"{what}: relative error {error:.2e}")


def example(shape: tuple[int, int], width: int, seed: int) -> Tensor:
    """A random input."""
    return torch.randn(*shape, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check(program: Program, seed: int = 0) -> Outcome:
    """Prune every group of a program alone, and all together, to random units; compare with both references."""
    outcome = Outcome()
    module = Network(program, seed)
    try:
        gm = fxprune.trace(module, (example(TRACED, program.width, seed),))
    except CaptureError as error:
        outcome.untraced = str(error)
        return outcome
    placeholder = next(n for n in gm.graph.nodes if n.op == "placeholder")
    outcome.fixed = all(isinstance(n, int) for n in placeholder.meta["val"].shape)
    x = example(TRACED if outcome.fixed else RUN, program.width, seed + 1)
    with torch.no_grad():
        outcome.judge("the trace", relative_error(module(x), gm(x)))
    try:
        groups = fxprune.find_groups(gm)
    except Exception as error:  # noqa: BLE001 - a crash is a finding
        outcome.problems.append(f"find_groups: {error!r}")
        return outcome
    outcome.groups = len(groups)
    free = [g for g in groups.values() if g.prunable]
    outcome.prunable = len(free)
    zeros_suffice = silent(program)
    for keep in _choices(free, torch.Generator().manual_seed(seed + 2)):
        masked = zeros_suffice and not any(groups[n].normalised for n in keep)
        _check_plan(outcome, module, gm, groups, keep, x, masked=masked)
    return outcome


def _choices(free: list[PruneGroup], generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """Random units of every group alone, of all, of all that are not normalised, of some; and as few as can be of all."""

    def some(group: PruneGroup) -> Tensor:
        count = int(torch.randint(group.least, max(group.size, group.least + 1), (1,), generator=generator))
        return torch.randperm(group.size, generator=generator)[:count].sort().values

    yield from ({g.name: some(g)} for g in free)
    if len(free) > 1:
        yield {g.name: some(g) for g in free}
        yield {g.name: torch.randperm(g.size, generator=generator)[: g.least].sort().values for g in free}
        half = torch.randperm(len(free), generator=generator)[: max(2, len(free) // 2)].tolist()
        yield {free[i].name: some(free[i]) for i in half}
        plain = [g for g in free if not g.normalised]
        if 1 < len(plain) < len(free):
            yield {g.name: some(g) for g in plain}


def _check_plan(
    outcome: Outcome, module: nn.Module, gm: GraphModule, groups: Groups, keep: dict[str, Tensor], x: Tensor, *, masked: bool
) -> None:
    what = ", ".join(f"{n} to {units.tolist()} of {groups[n].size}" for n, units in keep.items())
    try:
        plan = fxprune.PrunePlan.from_keep(groups, keep)
        small = fxprune.rewrite(gm, plan)
        outcome.judge(f"verify, {what}", fxprune.verify(gm, small, plan, (x,)).max_rel_error)
        outcome.verified += 1
        if masked:
            with torch.no_grad():
                expected = torch.func.functional_call(module, zeroed(module, groups, keep), (x,))
                outcome.judge(f"zeroed eager module, {what}", relative_error(expected, small(x)))
            outcome.masked += 1
    except Exception as error:  # noqa: BLE001 - a crash is a finding
        outcome.problems.append(f"crash, {what}: {error!r:.300}")


def zeroed(module: nn.Module, groups: Groups, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameters and buffers of an eager module, with what the removed units own at zero."""
    state = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    changed: dict[str, Tensor] = {}
    for name, units in keep.items():
        removed = sorted(set(range(groups[name].size)) - set(units.tolist()))
        for member in groups[name].members:
            if member.name in state:
                tensor = changed.setdefault(member.name, state[member.name].detach().clone())
                tensor[(slice(None),) * member.dim + (member.indices(removed),)] = 0
    return changed
