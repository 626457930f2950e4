"""Latency of a model pruned in four ways by the same share of its parameters, beside the dense model and beside the ideal.

    python -m benchmarks.latency                    # SmolLM2-135M-Instruct (after `make demo`); needs an idle machine
    python -m benchmarks.latency --shape tiny --ratio 0.4 --multiple 8 --prompt 8 --backend eager --output FILE    # to try it

The ways: one FFN width for all layers (``uniform``), the same rounded to a multiple of 64 (``rounded``), every layer its own FFN
width (``per-layer``), whole layers (``depth``). Which units go makes no difference to the time, so there is no calibration: units
go by their L2 norm, in ``per-layer`` whatever their layer, and of the layers the last ones go.

Each is measured at batch 1, a prompt and then tokens one by one with a KV cache, in two ways. ``eager``: stock transformers and
its growing cache, as `fxprune eval --latency` measures it. ``compiled``: ``torch.compile(model, dynamic=False)``, a graph for the
prompt and one for a token, over transformers' static cache. Both compute the logits of every prompt token. All cases take turns
in one process, ``--repeats`` times, and each turn begins with an untimed run (of a compiled model: the prompt, and one token).
Compilation is reported apart, without inductor's cache; the first case pays for what inductor does on first use.

The ideal is time in proportion to the work (`benchmarks.gpu.arithmetic`): operations for the prompt; for a token the bytes of
the weights (an untied input embedding is read by the row, a tied one whole as it is the output embedding too) and of the cache.
Writes benchmarks/results/latency.json.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import fxprune
from benchmarks.common import RESULTS, SHAPES, header, write
from benchmarks.gpu.arithmetic import Gain, Work
from benchmarks.gpu.replay import Decoder
from benchmarks.paper.common import run
from fxprune.api import example_inputs
from fxprune.calibration import vocabulary_of
from fxprune.checkpoint.source import load_source
from fxprune.demo import model_file
from fxprune.errors import UsageError, nearest
from fxprune.evaluation import measure_cost, measure_latency

Times = tuple[float, float]
"""Milliseconds of the prompt, and of a token after it."""
PHASES = {"prefill": "prefill_flops", "decode": "decode_bytes"}
"""What is timed, and the work that its ideal is counted in."""
WAYS = ("eager", "compiled")
PLANS: dict[str, dict[str, Any]] = {
    "uniform": {"kinds": "ffn"},
    "rounded": {"kinds": "ffn"},  # with --multiple
    "per-layer": {"kinds": "ffn", "widths": "per-layer", "ranking": "global"},
    "depth": {"kinds": "layers", "layers_by": "first"},
}


def main(words: Sequence[str] | None = None) -> None:
    """Prune, compile, take turns, write."""
    arguments = _parser().parse_args(words)
    for name in ("repeats", "threads", "multiple"):
        if getattr(arguments, name) < 1:
            raise UsageError(f"--{name} must be at least 1, got {getattr(arguments, name)}")
    if arguments.backend not in (known := torch.compiler.list_backends(exclude_tags=())):
        raise UsageError(f"unknown --backend '{arguments.backend}'; {nearest(arguments.backend, known)}")
    torch.set_num_threads(arguments.threads)
    start, about = time.perf_counter(), header(arguments)
    name, models, rows = prepare(arguments)
    turns: dict[tuple[str, str], Callable[[], Times]] = {}
    with torch.no_grad(), _compiling():
        for plan, model in models.items():
            turns[plan, "eager"] = partial(eager, model, arguments)
        for plan, model in models.items():
            decoder, rows[plan]["compiled"] = compiled(model, arguments)
            print(plan, "compiled", rows[plan]["compiled"], flush=True)
            if decoder is not None:
                turns[plan, "compiled"] = partial(replay, decoder, _prompt(model, arguments), arguments.new_tokens)
        before = _graphs()
        times = take_turns(turns, arguments.repeats)
    for (plan, way), runs in times.items():
        rows[plan][way] = {**rows[plan].get(way, {}), **summary(runs)}
        if plan != "dense" and ("dense", way) in times:
            rows[plan][way]["gain"] = gains(rows["dense"], rows[plan], way)
    result = {
        **about,
        "model": name,
        "dtype": "float32",
        "batch": 1,
        **{key: getattr(arguments, key) for key in ("prompt", "new_tokens", "ratio", "multiple", "backend")},
        "units_by": "l2, no calibration: which units go makes no difference to the time",
        "unit": "milliseconds (decode: for each token), median of the runs; compile_seconds: the first call",
        "graphs_while_timing": _graphs() - before,
        "seconds": round(time.perf_counter() - start),
        "plans": rows,
    }
    show(rows)
    write(arguments.output, result)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--model", metavar="ID", help="hub id, directory or .gguf file (default: SmolLM2-135M-Instruct)")
    made.add_argument("--shape", choices=SHAPES, help="instead of a model: random weights of this shape")
    made.add_argument("--ratio", type=float, default=0.2, help="share of all parameters to remove (default: 0.2)")
    made.add_argument("--multiple", type=int, default=64, help="of the FFN width in the plan 'rounded' (default: 64)")
    made.add_argument("--only", nargs="+", choices=PLANS, default=list(PLANS), help="measure only these, and the dense model")
    made.add_argument("--prompt", type=int, default=128, help="prompt tokens (default: 128)")
    made.add_argument("--new-tokens", type=int, default=16, help="tokens decoded in a run (default: 16)")
    made.add_argument("--repeats", type=int, default=5, help="timed runs of each case (default: 5)")
    made.add_argument("--backend", default="inductor", help="of torch.compile (default: inductor)")
    made.add_argument("--seed", type=int, default=0, help="of the prompt, and of random weights")
    made.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="torch threads (default: all cores)")
    made.add_argument("--output", type=Path, default=RESULTS / "latency.json", help="where the JSON goes (default: %(default)s)")
    return made


def prepare(arguments: argparse.Namespace) -> tuple[str, dict[str, Any], dict[str, dict[str, Any]]]:
    """(What the dense model is called, all models by plan, what is known of each before it is timed).

    Raises:
        UsageError: Both a model and a shape are named, or the model's work cannot be counted.
    """
    if arguments.model and arguments.shape:
        raise UsageError("--model and --shape contradict each other: leave one out")
    dense: Any
    if arguments.shape:
        name = f"Llama, shape of {arguments.shape}, random weights"
        dense = SHAPES[arguments.shape].build(seed=arguments.seed)
        dense.config.use_cache = True
    else:
        name = Path(arguments.model).name if arguments.model else "SmolLM2-135M-Instruct"
        dense, _ = load_source(arguments.model or model_file(), dtype="float32")
    models, rows = {"dense": dense}, {"dense": {**facts(dense, arguments), "removed": 0.0}}
    gm = fxprune.trace(dense, example_inputs(dense))
    for plan in arguments.only:
        more = {"multiple": arguments.multiple} if plan == "rounded" else {}
        result = fxprune.prune(dense, arguments.ratio, graph=gm, criterion="l2", **PLANS[plan], **more)
        report, kept = result.report, [after for _, after in result.report.widths.values()]
        models[plan] = result.model
        rows[plan] = {
            **facts(result.model, arguments),
            "removed": round(report.removed, 5),
            "form": report.form,
            "widths": [min(kept), max(kept)] if kept else None,
            "layers_dropped": len(report.dropped),
        }
        print(plan, rows[plan], flush=True)
    return name, models, rows


def facts(model: Any, arguments: argparse.Namespace) -> dict[str, Any]:
    """Parameters and work of a model.

    Raises:
        UsageError: Its work is not that of a Llama.
    """
    work = Work.of(model)
    if work.linear != measure_cost(model).macs or not (work.attention and work.cache):
        raise UsageError(
            f"the work of {type(model).__name__} cannot be counted: its products must be nn.Linear, with k_proj, v_proj and o_proj "
            "for attention, as in Llama"
        )
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "prefill_flops": work.prefill_flops(1, arguments.prompt),
        "decode_bytes": work.decode_bytes(1, arguments.prompt + arguments.new_tokens),
    }


def _prompt(model: Any, arguments: argparse.Namespace) -> Tensor:
    vocabulary = vocabulary_of(model)
    assert vocabulary is not None  # or its latency would not be measured
    return torch.randint(0, vocabulary[0], (1, arguments.prompt), generator=torch.Generator().manual_seed(arguments.seed))


def eager(model: Any, arguments: argparse.Namespace) -> Times:
    """One timed run of stock transformers, after an untimed one."""
    found = measure_latency(model, prompt=arguments.prompt, new_tokens=arguments.new_tokens, repeats=1, seed=arguments.seed)
    return found.prefill_ms, found.decode_ms


def compiled(model: Any, arguments: argparse.Namespace) -> tuple[Decoder | None, dict[str, Any]]:
    """Compile for the prompt and for a token.

    Returns:
        (What decodes, what compiling took and whether the tokens are those of the eager model); None and the error where it cannot
        be compiled.
    """
    ids, graphs = _prompt(model, arguments), _graphs()
    decoder = Decoder(model, ids, arguments.new_tokens)  # the eager model makes the cache, so that no graph has to
    wanted = _written(decoder, arguments.new_tokens)
    decoder.model = torch.compile(model, backend=arguments.backend, dynamic=False)
    try:
        start = time.perf_counter()
        first = _read(decoder, ids)
        middle = time.perf_counter()
        decoder.rewind()
        decoder.step()
        end = time.perf_counter()
    except Exception as error:  # noqa: BLE001 - whatever the compiler says is this case's result, and eager is measured without it
        return None, {"error": f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:400]}"}
    return decoder, {
        "compile_seconds": {"prefill": round(middle - start, 1), "decode": round(end - middle, 1)},
        "graphs": _graphs() - graphs,
        "same_tokens": torch.equal(first, decoder.first) and _written(decoder, arguments.new_tokens) == wanted,
    }


def _read(decoder: Decoder, ids: Tensor) -> Tensor:
    """Read the prompt into an empty cache; the token after it."""
    decoder.cache.reset()
    output = decoder.model(input_ids=ids, past_key_values=decoder.cache, use_cache=True)
    found: Tensor = output.logits[:, -1:].argmax(-1)
    return found


def _written(decoder: Decoder, new_tokens: int) -> list[int]:
    decoder.rewind()
    found = []
    for _ in range(new_tokens):
        decoder.step()
        found.append(int(decoder.token))
    return found


def replay(decoder: Decoder, ids: Tensor, new_tokens: int) -> Times:
    """One timed run of a compiled model, after an untimed one of each graph, so that dynamo has it at hand."""
    read = 0.0
    for _ in range(2):
        decoder.cache.reset()
        start = time.perf_counter()
        decoder.model(input_ids=ids, past_key_values=decoder.cache, use_cache=True)
        read = time.perf_counter() - start
    decoder.rewind()
    decoder.step()
    decoder.rewind()
    start = time.perf_counter()
    for _ in range(new_tokens):
        decoder.step()
    return 1e3 * read, 1e3 * (time.perf_counter() - start) / new_tokens


def take_turns(turns: dict[tuple[str, str], Callable[[], Times]], repeats: int) -> dict[tuple[str, str], list[Times]]:
    """Every case once, then every case again: what disturbs the machine for a while disturbs all alike."""
    times: dict[tuple[str, str], list[Times]] = {case: [] for case in turns}
    for _ in range(repeats):
        for case, turn in turns.items():
            times[case].append(turn())
    return times


def summary(runs: Sequence[Times]) -> dict[str, Any]:
    """Medians, the least and the most of each phase, and every run."""
    found: dict[str, Any] = {}
    for phase, values in zip(PHASES, zip(*runs, strict=True), strict=True):
        found[f"{phase}_ms"] = round(statistics.median(values), 3)
        found[f"{phase}_range"] = [round(min(values), 3), round(max(values), 3)]
        found[f"{phase}_runs"] = [round(v, 3) for v in values]
    return found


def gains(dense: dict[str, Any], pruned: dict[str, Any], way: str) -> dict[str, Any]:
    """The speed-up of both phases beside the ideal one, and the range of the speed-ups of single turns."""
    found = {}
    for phase, work in PHASES.items():
        both = [(row[way][f"{phase}_ms"], row[way][f"{phase}_runs"]) for row in (dense, pruned)]
        gain = Gain.of((both[0][0], both[1][0]), (dense[work], pruned[work]))
        turns = [d / p for d, p in zip(both[0][1], both[1][1], strict=True)]
        found[phase] = {**vars(gain), "speedup_range": [round(min(turns), 4), round(max(turns), 4)]}
    return found


def show(rows: dict[str, dict[str, Any]]) -> None:
    """A table: milliseconds, and the speed-up over the ideal one."""
    for way in WAYS:
        for phase in PHASES:
            for plan, row in rows.items():
                found = row.get(way, {})
                gain = found.get("gain", {}).get(phase)
                time_of = found.get("error") or f"{found[f'{phase}_ms']:9.2f} ms"
                beside = f"  {gain['speedup']:.2f} of {gain['ideal']:.2f} times as fast" if gain else ""
                print(f"{way:9} {phase:8} {plan:10} {time_of}{beside}")


def _graphs() -> int:
    """How many graphs dynamo has compiled so far."""
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


@contextmanager
def _compiling() -> Iterator[None]:
    """Room for two graphs of each model (after eight dynamo would run the rest eagerly), and no cache of earlier runs."""
    from torch._inductor.utils import fresh_cache

    torch.compiler.reset()
    gc.collect()
    gc.freeze()  # or compilation spends a fifth of its time looking at old objects
    try:
        with fresh_cache(), torch._dynamo.config.patch(recompile_limit=2 * (len(PLANS) + 1), fail_on_recompile_limit_hit=True):
            yield
    finally:
        gc.unfreeze()


if __name__ == "__main__":
    sys.exit(run(main))
