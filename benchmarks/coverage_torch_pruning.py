"""Torch-Pruning on the architectures of the coverage benchmark: built, pruned by half, run, compared.

    python -m benchmarks.coverage_torch_pruning --torch-pruning DIR                 # everything; resumes where it was stopped
    python -m benchmarks.coverage_torch_pruning --torch-pruning DIR --tasks causal --only llama mixtral
    python -m benchmarks.coverage_torch_pruning --table                             # benchmarks/results/coverage_torch_pruning.json

It is used as in its examples (examples/LLMs/prune_llm.py, examples/transformers/prune_hf_bert.py and prune_hf_vit.py):
``MetaPruner`` on a dict of inputs, an output transform ``logits.sum()``, ``MagnitudeImportance(p=2, group_reduction="mean")``,
local pruning of half of the channels and a third of the heads, ``num_heads`` of every query, key and value layer found by its
usual name (a fused layer alone stands for all three), ``out_channel_groups`` of 2 for ``gate_up_proj`` and its like, output layers
ignored; then head counts and sizes of attention modules and configuration set by hand. No customized pruners: its Swin example has
one, a new model has none. Each model is tried in several ways: whole heads (as for LLMs and BERT) and head dimensions (as for ViT
and Swin), with the default attention and with eager attention, where keys are repeated in the open. The way with the best result
counts, the one with the largest share among equals.

What is compared: only groups without a normalisation over channels (LayerNorm, RMSNorm, GroupNorm; not BatchNorm) and without an
embedding are pruned (such layers are ignored, other such groups skipped), because zeros would change a mean or a variance. That
leaves out the residual stream of transformers; heads, FFN channels and all channels of a BatchNorm network stay. The reference is
the dense model with the removed slices at zero: rows and bias of an output-pruned layer, columns of an input-pruned one, entries of
BatchNorm and of bare parameters. ``whole`` says what came of pruning every group, as the examples do, where only running is asked
for.

Results: exact (relative error of the logits below 1e-4), wrong, crash after pruning (in forward), crash while pruning, nothing
pruned (no group of this kind was offered), build failed, timeout; "no model" if the benchmark cannot build or run the model itself.
``without_attention``, tried where no way is exact: the same with everything in attention and sequence mixers ignored.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import math
import re
import time
import traceback
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.common import INSTALL_HINT, RESULTS, TORCH_PRUNING, header, torch_pruning, write
from benchmarks.coverage import ROWS, TOLERANCE
from benchmarks.zoo import inputs as zoo_inputs
from benchmarks.zoo import pool
from benchmarks.zoo import types as zoo_types
from fxprune.passes.verify import relative_error

NAMES = (
    "q_proj k_proj v_proj|query key value|q k v|q_lin k_lin v_lin|query_proj key_proj value_proj|to_q to_k to_v|wq wk wv|Wq Wk Wv|"
    "linear_q linear_k linear_v|query_layer key_layer value_layer|qkv_proj|qkv|query_key_value|Wqkv"
)
HEADS = ["num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "num_attn_heads"]
KV_HEADS = ["num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_head_kv"]
REPEATS = ["num_key_value_groups", "n_rep"]
WIDTHS = ["head_dim", "attention_head_size", "dim_head", "key_value_proj_dim", "head_size", "dim_per_head"]
TOTALS = ["all_head_size", "hidden_size", "embed_dim", "inner_dim", "dim", "attention_size"]
OUTPUTS = ["lm_head", "classifier", "score", "head", "fc", "embed_out", "proj_out", "visual_projection", "text_projection"]
GATED = ("gate_up_proj", "input_linear", "gate_and_up_proj", "Wi")
HEAD_RATIO = 0.33
"""With half, 6 heads on 2 key-value heads become one each, which 1.6.1 then takes for plain heads and does not offer."""
MIXER = re.compile("Attention|Attn|Mixer|Mamba|SSM|DeltaNet|Recurrent")


class Attention:
    """An attention module as the examples treat it: which layers share heads, and what to set by hand afterwards."""

    def __init__(self, module: nn.Module, layers: list[nn.Linear], config: Any) -> None:
        self.module, self.layers, self.fused = module, layers, len(layers) == 1
        self.config = getattr(module, "config", None) or config.get_text_config()
        q, k = layers[0], layers[-2:][0]
        self.total = q.out_features // (3 if self.fused else 1)
        width = _first(module, WIDTHS)
        self.heads = _first(module, HEADS) or _first(self.config, HEADS) or (self.total // width if width else 0)
        self.kv_heads = _first(module, KV_HEADS) or _first(self.config, KV_HEADS) or self.heads
        if self.heads and k.out_features % self.kv_heads:
            self.kv_heads = k.out_features * self.heads // q.out_features
        self.usable = bool(self.heads and self.kv_heads and (self.fused or not self.total % self.heads))

    def num_heads(self) -> dict[nn.Linear, int]:
        """The pruner's argument of that name."""
        return {layer: self.heads if i == 0 else self.kv_heads for i, layer in enumerate(self.layers)}

    def update(self, whole_heads: bool) -> None:
        """Set head counts and sizes, as the examples do by hand."""
        total = self.layers[0].out_features // (3 if self.fused else 1)
        heads = max(total * self.heads // self.total, 1) if whole_heads else self.heads
        kv_heads = self.kv_heads if self.kv_heads != self.heads else heads
        repeats = self.heads // self.kv_heads, max(heads // kv_heads, 1)
        changes = [
            (HEADS, self.heads, heads),
            (KV_HEADS, self.kv_heads, kv_heads),
            (REPEATS, *repeats),
            (TOTALS, self.total, total),
        ]
        for names, old, new in [*changes, (WIDTHS, self.total // self.heads, total // heads)]:
            for name in names:
                if getattr(self.module, name, None) == old:
                    setattr(self.module, name, new)
                if names in (HEADS, KV_HEADS) and getattr(self.config, name, None) == old:
                    setattr(self.config, name, new)


def _first(owner: Any, names: list[str]) -> int:
    found = (getattr(owner, name, None) for name in names)
    return next((n for n in found if isinstance(n, int) and n > 0), 0)


def attentions(model: nn.Module) -> list[Attention]:
    """Every module whose query, key and value layers (or fused layer) are Linear and have one of the usual names."""
    found = []
    for module in model.modules():
        for names in NAMES.split("|"):
            layers = [getattr(module, name, None) for name in names.split()]
            if all(isinstance(layer, nn.Linear) for layer in layers):
                found.append(Attention(module, [layer for layer in layers if isinstance(layer, nn.Linear)], model.config))
                break
    return [a for a in found if a.usable]


class Mask:
    """The dense reference: removed slices at zero, whatever the pruned model has made of its indices since."""

    def __init__(self, dense: nn.Module, pruner: Any) -> None:
        self.dense, self.graph = dense, pruner.DG
        self.left: dict[tuple[str, str], list[int]] = {}
        self.touched: set[str] = set()

    def name(self, dep: Any) -> str:
        """Of the module or parameter that a dependency prunes; empty for operations."""
        target = dep.target.module
        known = self.graph._param_to_name if isinstance(target, nn.Parameter) else self.graph._module2name
        return str(known.get(target, ""))

    def outputs(self, dep: Any) -> bool:
        """Whether a dependency removes what a layer gives, not what it takes."""
        return bool(self.graph.is_out_channel_pruning_fn(dep.handler))

    def apart(self, group: Any) -> bool:
        """Whether a group has a normalisation over channels, an embedding, or a layer that has no slices to mask."""
        for dep, _ in group:
            target, name = dep.target.module, self.name(dep)
            if isinstance(target, nn.Parameter):
                target = self.dense.get_submodule(name.rpartition(".")[0])
            kind = type(target).__name__ + str(getattr(target, "_grad_fn", ""))
            if isinstance(target, nn.Embedding | nn.LSTM | nn.MultiheadAttention) or re.search(
                "Embed|LayerNorm|GroupNorm|Rsqrt|StdBackward|VarBackward", kind
            ):
                return True
            if "norm" in (kind + name.rpartition(".")[2]).lower() and not isinstance(target, nn.modules.batchnorm._BatchNorm):
                return True
        return False

    @torch.no_grad()
    def remove(self, dep: Any, indices: list[int], *, zero: bool) -> None:
        """Note, and if asked zero, what a dependency is about to remove."""
        name, target = self.name(dep), dep.target.module
        if not name or not indices:
            return
        bare = isinstance(target, nn.Parameter)
        self.touched |= {name} if bare else {f"{name}.{n}" for n, _ in target.named_parameters(recurse=False)}
        if not zero:
            return
        if bare:
            parameter, dim = self.dense.get_parameter(name), dep.target.pruning_dim
            self._zero(parameter, dim, self._original(name, "", parameter.shape[dim], indices))
            return
        layer: Any = self.dense.get_submodule(name)
        depthwise = isinstance(layer, nn.modules.conv._ConvNd) and 1 < layer.groups == layer.out_channels
        if isinstance(layer, nn.modules.batchnorm._BatchNorm) or depthwise or self.outputs(dep):
            dim = int(bool(getattr(layer, "transposed", False)))
            rows = self._original(name, "out", layer.weight.shape[dim], indices)
            self._zero(layer.weight, dim, rows)
            if layer.bias is not None:
                self._zero(layer.bias, 0, rows)
        elif getattr(layer, "groups", 1) > 1:
            width, rows_each = layer.in_channels // layer.groups, layer.out_channels // layer.groups
            for i in self._original(name, "in", layer.in_channels, indices):
                layer.weight[i // width * rows_each : (i // width + 1) * rows_each, i % width] = 0
        else:
            dim = int(not getattr(layer, "transposed", False))
            self._zero(layer.weight, dim, self._original(name, "in", layer.weight.shape[dim], indices))

    def _original(self, name: str, side: str, size: int, indices: list[int]) -> list[int]:
        left = self.left.setdefault((name, side), list(range(size)))
        gone = [left[i] for i in indices if 0 <= i < len(left)]
        self.left[name, side] = [i for i in left if i not in set(gone)]
        return gone

    @staticmethod
    def _zero(parameter: Tensor, dim: int, indices: list[int]) -> None:
        parameter.index_fill_(dim, torch.tensor(indices, dtype=torch.long), 0)


def logits(output: Any) -> Tensor:
    """The tensor that the output transform sums, and that is compared."""
    named = (getattr(output, name, None) for name in ("logits", "logits_per_image", "last_hidden_state"))
    return next(value for value in named if isinstance(value, Tensor))


def attempt(
    tp: Any, model: nn.Module, task: str, *, heads: bool = True, attention: bool = True, whole: bool = False
) -> dict[str, Any]:
    """One way of pruning a copy of a model.

    Args:
        tp: The torch_pruning package.
        model: The dense model.
        task: Its task.
        heads: Remove whole heads, not dimensions of each.
        attention: Prune attention and sequence mixers too.
        whole: Prune every group and only ask whether the model runs.
    """
    pruned, dense = copy.deepcopy(model), copy.deepcopy(model)
    layers = attentions(pruned)
    answer: dict[str, Any] = {"result": "build failed", "attention_modules": len(layers)}
    ignored = [m for n, m in pruned.named_children() if n in OUTPUTS] + _last_layers(pruned, task)
    if not whole:  # or it would weigh, and might fail at, groups that are left out anyway
        ignored += [m for m in pruned.modules() if isinstance(m, nn.Embedding | nn.LayerNorm | nn.GroupNorm)]
    ignored += [m for m in pruned.modules() if MIXER.search(type(m).__name__) and not attention]
    try:
        start = time.perf_counter()
        pruner = tp.pruner.MetaPruner(
            pruned,
            zoo_inputs.example(task, pruned, (1, zoo_inputs.TRACED[1])),
            importance=tp.importance.MagnitudeImportance(p=2, group_reduction="mean"),
            global_pruning=False,
            pruning_ratio=0.5,
            ignored_layers=ignored,
            num_heads={layer: n for a in layers for layer, n in a.num_heads().items()},
            prune_num_heads=heads,
            prune_head_dims=not heads,
            head_pruning_ratio=HEAD_RATIO,
            in_channel_groups={},
            out_channel_groups={m: 2 for n, m in pruned.named_modules() if n.endswith(GATED) and isinstance(m, nn.Linear)},
            output_transform=lambda output: logits(output).sum(),
        )
        answer |= {"build_s": round(time.perf_counter() - start, 2), "result": "crash while pruning"}
        mask = Mask(dense, pruner)
        count = Counter({"groups": 0, "attention_groups": 0, "groups_left_out": 0})
        for group in pruner.step(interactive=True):
            if not whole and mask.apart(group):
                count["groups_left_out"] += 1
                continue
            count["groups"] += 1
            count["attention_groups"] += any(mask.outputs(dep) and dep.target.module in pruner.num_heads for dep, _ in group)
            for dep, indices in group:
                mask.remove(dep, indices, zero=not whole)
            group.prune()
        answer |= {**count, "share": _share(model, mask.touched), "result": "nothing pruned"}
        if not count["groups"]:
            return answer
        answer["result"] = "crash after pruning"
        for a in layers:
            a.update(heads)
        actual = _run_once(pruned, task)
        if whole:
            return answer | {"result": "runs"}
        error = relative_error(_run_once(dense, task), actual)
        for key, value in (("relative_error", error), ("change", relative_error(_run_once(model, task), actual))):
            answer[key] = float(f"{value:.2g}") if math.isfinite(value) else str(value)
        answer["result"] = "exact" if error < TOLERANCE else "wrong"
    except Exception as error:  # noqa: BLE001 - a crash is a result here
        answer["error"] = _text(error)
    return answer


def _last_layers(model: nn.Module, task: str) -> list[nn.Module]:
    """The output embeddings and the layer that runs last: what makes the logits."""
    called: list[nn.Module] = []
    hooks = [
        m.register_forward_hook(lambda m, *_: called.append(m)) for m in model.modules() if isinstance(m, nn.Linear | nn.Conv2d)
    ]
    _run_once(model, task)
    for hook in hooks:
        hook.remove()
    try:
        output = model.get_output_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):  # no such method, or transformers' "this class has none"
        output = None
    return called[-1:] + [output] * isinstance(output, nn.Module)


def _run_once(model: nn.Module, task: str) -> Tensor:
    torch.manual_seed(0)
    with torch.no_grad():
        return logits(model(**zoo_inputs.example(task, model, zoo_inputs.TRACED, 1)))


def _share(model: nn.Module, touched: set[str]) -> float:
    """The share of the parameters outside the embeddings that lies in some pruned group."""
    tables = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    sizes = {n: p.numel() for n, p in model.named_parameters() if id(p) not in tables}
    return round(sum(size for name, size in sizes.items() if name in touched) / max(sum(sizes.values()), 1), 4)


def _text(error: BaseException) -> str:
    """An error in one line, with the function that raised it and without the machine's paths."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = re.sub(r"(/[\w.+-]+){2,}/", "", " ".join(str(error).split()))[:300]
    return f"{type(error).__name__}: {message} ({Path(frame.filename).name}, {frame.name})"


ORDER = ("timeout", "build failed", "crash while pruning", "crash after pruning", "wrong", "nothing pruned", "runs", "exact")
"""Results from the worst to the best."""


def _merit(answer: Mapping[str, Any]) -> tuple[int, float]:
    return ORDER.index(answer["result"]), answer.get("share", 0.0)


def examine(tp: Any, task: str, model_type: str) -> Iterator[dict[str, Any]]:
    """What Torch-Pruning makes of one architecture; yields what is known after every attempt."""
    row: dict[str, Any] = {"type": model_type, "task": task, "result": "no model"}
    yield row
    start = time.perf_counter()
    model: Any = zoo_types.build(task, model_type)
    for config in {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}.values():
        config.use_cache = False
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    _run_once(model, task)
    eager = copy.deepcopy(model)
    try:
        eager.set_attn_implementation("eager")
        _run_once(eager, task)
    except Exception:  # noqa: BLE001 - no such attention in this model
        eager = None
    models = {"default": model, **({} if eager is None else {"eager": eager})}
    row |= {"class": type(model).__name__, "parameters": sum(p.numel() for p in model.parameters()), "result": "timeout"}
    yield row

    def best(**options: Any) -> dict[str, Any]:
        tries = [{"attention": name, **attempt(tp, m, task, **options)} for name, m in models.items()]
        return max(tries, key=_merit)

    found: dict[str, Any] = {"ways": []}
    for heads in (True, False):
        found["ways"].append({"heads": "whole" if heads else "dimensions", **best(heads=heads)})
        way = max(found["ways"], key=_merit)
        yield row | way | found
        if not way["attention_modules"]:
            break
    found["whole"] = best(heads=way["heads"] == "whole", whole=True)
    yield row | way | found
    if way["result"] != "exact":
        found["without_attention"] = best(attention=False)
    yield row | way | found | {"seconds": round(time.perf_counter() - start, 1)}


def _run(task: str, model_type: str, path: Path, *, directory: Path) -> None:
    """One model in this process; the row on disk is renewed after every attempt."""
    row: dict[str, Any] = {}
    try:
        for row in examine(torch_pruning(directory), task, model_type):
            pool.write(path, row)
    except BaseException as error:  # noqa: BLE001 - whatever happens to one model is that model's result
        pool.write(path, row | {"error": _text(error)} | ({"result": "no model"} if row.get("result") == "timeout" else {}))


def measure(jobs: list[pool.Job], directory: Path, *, limit: float, workers: int) -> None:
    """Run every job that has no row yet, each in a forked process with a time limit."""
    ROWS.mkdir(exist_ok=True)
    for done in pool.run(jobs, _path, functools.partial(_run, directory=directory), limit=limit, workers=workers):
        row, late = done.row or {"type": done.job[1], "task": done.job[0], "result": "no model"}, done.end == "late"
        if "seconds" not in row:  # it ends early only in a model of ours, by the limit, or with its process
            row["stopped"] = f"not finished after {limit:.0f} s" if late else row.get("error", f"exit status {done.end}")
            if row["result"] == "timeout" and not late:
                row["result"] = "build failed"
        pool.write(_path(*done.job), row)
        print(f"[{done.left} left] {summary_line(row)}", flush=True)


def _path(task: str, model_type: str) -> Path:
    return ROWS / f"torch_pruning.{task}.{model_type}.json"


def summary_line(row: Mapping[str, Any]) -> str:
    """One model in one line."""
    details = f"{row['groups']} groups ({row['attention_groups']} attention), {row['share']:.0%}; " if "groups" in row else ""
    others = "; ".join(f"{k} {row[k]['result']}" for k in ("whole", "without_attention") if k in row)
    return f"{row['task']} {row['type']}: {row['result']}; {details}{others} {row.get('error', row.get('stopped', ''))[:110]}"


def table(arguments: argparse.Namespace) -> None:
    """Join the rows into a result."""
    rows = [json.loads(path.read_text()) for path in sorted(ROWS.glob("torch_pruning.*.json"))]
    tasks = [task for task in zoo_types.TASKS if any(row["task"] == task for row in rows)]
    head = header(arguments)
    head["versions"]["torch_pruning"] = TORCH_PRUNING
    head["command"] = "python -m benchmarks.coverage_torch_pruning --torch-pruning DIR, then --table"
    counts = {task: Counter(row["result"] for row in rows if row["task"] == task) for task in tasks}
    whole = {task: Counter(row["whole"]["result"] for row in rows if row["task"] == task and "whole" in row) for task in tasks}
    again = {
        task: sum(row.get("without_attention", row)["result"] == "exact" for row in rows if row["task"] == task) for task in tasks
    }
    write(arguments.output, {**head, "results": counts, "exact_even_if_without_attention": again, "whole": whole, "models": rows})


def main() -> None:
    parser = pool.parser(__doc__, limit=60, workers=1)
    parser.add_argument("--torch-pruning", type=Path, default=None, metavar="DIR", help=INSTALL_HINT)
    parser.add_argument("--output", type=Path, default=RESULTS / "coverage_torch_pruning.json", help="(default: %(default)s)")
    parser.set_defaults(seed=0, threads=1, repeats=1)
    arguments = parser.parse_args()
    if arguments.table:
        table(arguments)
        return
    if arguments.torch_pruning is None:
        parser.error(INSTALL_HINT)
    jobs = pool.chosen(arguments, _path)
    measure(jobs, arguments.torch_pruning, limit=arguments.limit, workers=arguments.workers)


if __name__ == "__main__":
    main()
