"""Coverage: every architecture of the installed transformers, tiny and random: traced, grouped, pruned, compared, saved.

    python -m benchmarks.coverage                           # all causal LMs, and the other families: about an hour on two cores
    python -m benchmarks.coverage --tasks causal --only llama mamba2
    python -m benchmarks.coverage --shard 0/4               # a quarter; the shards fill one folder, --table joins it
    python -m benchmarks.coverage --table                   # docs/coverage.md and benchmarks/results/coverage.json again

Each model runs in a process of its own with a time limit, so that none can stop the others; what is there already is not run again.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

import fxprune
from benchmarks import coverage_table
from benchmarks.common import RESULTS, header, write
from benchmarks.zoo import inputs as zoo_inputs
from benchmarks.zoo import pool
from benchmarks.zoo import types as zoo_types
from fxprune.errors import CheckpointError
from fxprune.groups import Groups, PruneGroup
from fxprune.mode import quiet
from fxprune.passes.verify import relative_error

TOLERANCE = 1e-4
ROWS = Path(__file__).parent / "coverage_rows"


def examine(task: str, model_type: str, *, seeds: int = 2, save: bool = True) -> Iterator[dict[str, Any]]:
    """What is true of one architecture, step by step: each step yields what is known by then.

    Args:
        task: A key of `benchmarks.zoo.types.TASKS`.
        model_type: A model type.
        seeds: Random choices of kept units for every group alone, and for all together.
        save: For causal LMs: save and reload a uniform plan too.
    """
    row: dict[str, Any] = {"type": model_type, "task": task, "stage": "build"}
    yield row
    start = time.perf_counter()
    model = zoo_types.build(task, model_type)
    row |= {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters()), "stage": "run"}
    yield row
    traced = zoo_inputs.example(task, model, zoo_inputs.TRACED)
    with quiet(model), torch.no_grad():
        model(**traced)
    row["stage"] = "trace"
    yield row
    gm = fxprune.trace(model, traced)
    shapes = [_shape(node) for node in gm.graph.nodes if node.op == "placeholder"]
    free = [[isinstance(n, torch.SymInt) and not n.node.expr.is_number for n in shape] for shape in shapes if shape]
    symbolic = [all(dims[0] for dims in free), any(dims[1] for dims in free if len(dims) > 1)]
    inputs, actual = _elsewhere(task, model, gm, symbolic)
    row |= {"symbolic": symbolic, "trace_s": round(time.perf_counter() - start, 1), "stage": "compare"}
    yield row
    with quiet(model), torch.no_grad():
        expected = model(**inputs)
    row |= {"traced_error": relative_error(_plain(expected), _plain(actual)), "stage": "groups"}
    yield row
    groups = fxprune.find_groups(gm)
    row |= {**_coverage(gm, groups), "stage": "prune"}
    yield row
    row |= _exactness(gm, groups, inputs, seeds)
    row |= {"stage": "save" if save and task == "causal" else "done", "seconds": round(time.perf_counter() - start, 1)}
    yield row
    if row["stage"] == "save":
        row |= {**_reload(model, gm, groups, inputs), "stage": "done", "seconds": round(time.perf_counter() - start, 1)}
        yield row


def _elsewhere(task: str, model: nn.Module, gm: GraphModule, symbolic: list[bool]) -> tuple[dict[str, Tensor], Any]:
    """Inputs of other sizes than were traced, as far as the trace leaves them open, and the graph's output for them."""
    for length in (zoo_inputs.CHECKED[1], 5, zoo_inputs.TRACED[1]):
        new = (zoo_inputs.CHECKED[0], length)
        batch, sequence = (n if free else old for old, n, free in zip(zoo_inputs.TRACED, new, symbolic, strict=True))
        inputs = zoo_inputs.example(task, model, (batch, sequence), 1)
        try:
            with torch.no_grad():
                return inputs, gm(**inputs)
        except RuntimeError as error:
            if length == zoo_inputs.TRACED[1] or not str(error).startswith("Expected input at"):  # a size that the trace excludes
                raise
    raise AssertionError


def _shape(node: Node) -> tuple[Any, ...]:
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def _plain(output: Any) -> Any:
    """The tensors of an output, without caches."""
    return [v for k, v in output.items() if k != "past_key_values"] if isinstance(output, Mapping) else output


def _coverage(gm: GraphModule, groups: Groups) -> dict[str, Any]:
    """Which groups there are, and which share of the parameters outside the embeddings lies in a prunable one."""
    tables = {
        str(n.args[0].target)
        for n in gm.graph.nodes
        if n.op == "call_function" and "embedding" in str(n.target) and isinstance(n.args[0], Node)
    }
    free = [g for g in groups.values() if g.prunable]
    sizes = {n: math.prod(v.shape) for n, v in groups.parameters.items() if n not in tables}

    def share(chosen: list[PruneGroup]) -> float:
        inside = _inside(chosen)
        return round(sum(n for name, n in sizes.items() if name in inside) / max(sum(sizes.values()), 1), 4)

    return {
        "groups": dict(Counter(g.kind for g in free)),
        "share": share(free),
        "share_without_hidden": share([g for g in free if g.kind != "hidden"]),
        "pinned": [[g.name, g.kind, g.size, g.reason] for g in groups.values() if not g.prunable],
        "uncovered": sorted(sizes.keys() - _inside(free), key=lambda n: -sizes[n])[:20],
    }


def _inside(groups: list[PruneGroup]) -> set[str]:
    return {m.name for g in groups for m in g.members}


def _exactness(gm: GraphModule, groups: Groups, inputs: dict[str, Tensor], seeds: int) -> dict[str, Any]:
    """Worst relative error of every prunable group pruned alone and of all together, for several choices of units."""
    free = [g for g in groups.values() if g.prunable and g.size > 1]
    generator = torch.Generator().manual_seed(0)

    def some(group: PruneGroup) -> Tensor:
        count = int(torch.randint(group.least, group.size, (1,), generator=generator))
        return torch.randperm(group.size, generator=generator)[:count]

    def error(keep: dict[str, Tensor]) -> tuple[float, str]:
        plan = fxprune.PrunePlan.from_keep(groups, keep)
        try:
            return fxprune.verify(gm, fxprune.rewrite(gm, plan), plan, inputs).max_rel_error, ""
        except Exception as trouble:  # noqa: BLE001 - a crash is a result here
            return math.inf, f"{type(trouble).__name__}: {str(trouble)[:200]}"

    worst, wrong, checks = {"alone": 0.0, "together": 0.0}, [], 0
    for _ in range(seeds):
        for name, keep in [*((g.name, {g.name: some(g)}) for g in free), ("", {g.name: some(g) for g in free})]:
            if not keep:
                continue
            found, why = error(keep)
            checks += 1
            how = "alone" if name else "together"
            worst[how] = max(worst[how], found) if found == found else math.inf
            if not found < TOLERANCE:
                wrong.append([name or "all together", {n: sorted(u.tolist()) for n, u in keep.items()} if name else {}, found, why])
    return {"checks": checks, "worst": {k: float(f"{v:.2g}") for k, v in worst.items()}, "wrong": wrong}


PLANS = (("kv_heads", "ffn"), ("ffn",), ("kv_heads",), ("channels", "head_dim", "other"))
"""Kinds of the uniform plans that are tried until stock transformers can express one."""


def _reload(model: nn.Module, gm: GraphModule, groups: Groups, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """A uniform plan (half of the units of each group), saved, and read back by stock transformers.

    The first plan that a stock class can express counts; if there is none, the first that has an eager form at all.
    """
    free = [g for g in groups.values() if g.prunable and g.size > 1]
    answers: list[dict[str, Any]] = []
    for kinds in PLANS:
        chosen = [g for g in free if g.kind in kinds]
        if not chosen or any(a["plan"] == sorted({g.kind for g in chosen}) for a in answers):
            continue
        plan = fxprune.PrunePlan.from_keep(groups, {g.name: torch.arange(max(g.least, g.size - g.size // 2)) for g in chosen})
        answer = {
            "plan": sorted({g.kind for g in chosen}),
            **_saved(fxprune.prune(model, plan=plan, inputs=inputs, graph=gm), inputs),
        }
        answers.append(answer)
        if answer["form"] == "uniform":
            break
    order = ("uniform", "per-layer", "graph", "refused")
    best = min(answers, key=lambda a: order.index(a["form"]), default={"form": "none", "form_note": "nothing to prune"})
    return {**best, "first_plan": answers[0] if answers else None}


def _saved(result: fxprune.PruneResult, inputs: dict[str, Tensor]) -> dict[str, Any]:
    import transformers

    answer: dict[str, Any] = {"form": result.form, "form_note": result.report.note}
    if result.model is None:
        return answer
    own = result.form != "uniform"
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "pruned"
        try:
            result.save_pretrained(path)
        except CheckpointError as error:
            return {"form": "refused", "form_note": f"{error}{_own_round_trip(result.dense_model, Path(directory) / 'dense')}"}
        auto: Any = transformers.AutoModelForCausalLM
        if not own and type(result.model.config) not in auto._model_mapping:  # a part of a larger model has no auto class
            auto = getattr(transformers, type(result.model).__name__)
        again = auto.from_pretrained(path, trust_remote_code=own).eval()
        with quiet(again), torch.no_grad():
            expected, actual = result.graph_module(**inputs), again(**inputs)
    return {**answer, "reload_error": relative_error(_plain(expected), _plain(actual))}


def _own_round_trip(dense: Any, path: Path) -> str:
    """What to add if transformers does not even read the dense model back as it was."""
    dense.save_pretrained(path)
    again = type(dense).from_pretrained(path).state_dict()
    lost = [n for n, t in dense.state_dict().items() if n not in again or not torch.equal(t, again[n])]
    return f"; the dense model itself is read back by transformers with other values of {lost[0]}" if lost else ""


def _run(task: str, model_type: str, path: Path, *, seeds: int) -> None:
    """One model in this process; the row on disk is renewed after every stage."""
    row: dict[str, Any] = {}
    try:
        for row in examine(task, model_type, seeds=seeds):
            pool.write(path, row)
    except BaseException as error:  # noqa: BLE001 - whatever happens to one model is that model's result
        lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
        pool.write(path, row | {"error": f"{type(error).__name__}: {' '.join(lines)[:400]}"})


def measure(jobs: list[pool.Job], *, seeds: int, limit: float, workers: int) -> None:
    """Run every job that has no row yet, each in a forked process with a time limit."""
    ROWS.mkdir(exist_ok=True)
    for done in pool.run(jobs, _path, functools.partial(_run, seeds=seeds), limit=limit, workers=workers):
        row = done.row or {"type": done.job[1], "task": done.job[0], "stage": "build"}
        if row["stage"] != "done" and "error" not in row:
            row["error"] = f"not finished after {limit:.0f} s" if done.end == "late" else f"the process died (status {done.end})"
        pool.write(_path(*done.job), row)
        print(f"[{done.left} left] {summary_line(row)}", flush=True)


def _path(task: str, model_type: str) -> Path:
    return ROWS / f"{task}.{model_type}.json"


def summary_line(row: Mapping[str, Any]) -> str:
    """One model in one line."""
    if "error" in row:
        return f"{row['task']} {row['type']}: failed at {row['stage']}: {row['error'][:150]}"
    kinds = " ".join(f"{n} {k}" for k, n in row["groups"].items())
    wrong = f" WRONG {len(row['wrong'])}" if row["wrong"] else ""
    shares = f"{row['share']:.0%} ({row['share_without_hidden']:.0%})"
    checks = f"{row['checks']} checks{wrong}, worst {max(row['worst'].values()):.0e}"
    return f"{row['task']} {row['type']}: {shares} {kinds}; {checks}; {row.get('form', '-')}; {row['seconds']:.0f} s"


def _write_tables(arguments: argparse.Namespace) -> None:
    rows = coverage_table.read(ROWS, zoo_types.TASKS)
    arguments.seed, arguments.threads, arguments.repeats = 0, 1, arguments.seeds
    made = {**header(arguments), "command": "python -m benchmarks.coverage"}
    write(RESULTS / "coverage.json", {**made, "tolerance": TOLERANCE, "summary": coverage_table.summary(rows), "models": rows})
    measured = RESULTS / "coverage_torch_pruning.json"
    theirs = json.loads(measured.read_text())["models"] if measured.exists() else []
    others = {f"{row['task']}.{row['type']}": row for row in theirs}
    document = Path(__file__).parents[1] / "docs" / "coverage.md"
    document.write_text(coverage_table.markdown(made, rows, others))
    print(document)


def main() -> None:
    """Measure what is asked for."""
    parser = pool.parser(__doc__, limit=300, workers=os.cpu_count() or 1)
    parser.add_argument("--seeds", type=int, default=2, help="random choices of units for every group (default: 2)")
    arguments = parser.parse_args()
    if arguments.table:
        _write_tables(arguments)
        return
    jobs = pool.chosen(arguments, _path)
    measure(jobs, seeds=arguments.seeds, limit=arguments.limit, workers=arguments.workers)


if __name__ == "__main__":
    main()
