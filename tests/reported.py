"""Reports made by hand: what the JSON files of a checkpoint can hold, without a model."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from fxprune.reporting.numbers import Record

LAYERS = 4


def report(**changes: Any) -> dict[str, Any]:
    """A per-layer prune of four layers, measured, compensated and verified; with what the demo adds."""
    widths = {f"model.layers.{i}.mlp.ffn": [64, 64 - 7 * i] for i in range(1, LAYERS)}
    spread = {"units": 64, "quantiles": [0.001, 0.01, 0.1, 0.5, 0.9, 2.0, 8.0], "cut": 0.75}
    made: dict[str, Any] = {
        "fxprune_report": 1,
        "removed": 0.25,
        "parameters_before": 102_400,
        "parameters_after": 76_800,
        "bytes_before": 409_600,
        "bytes_after": 307_200,
        "macs_before": 96_816,
        "macs_after": 71_216,
        "widths": widths,
        "whole": {"model.layers.0.mlp.ffn": 64},
        "dropped": ["model.layers.9"],
        "verify": {
            "max_rel_error": 1.5e-7,
            "tolerance": 1e-4,
            "reference": "masked dense",
            "outputs": 1,
            "seconds": 0.1,
            "ok": True,
        },
        "verify_tolerance": 1e-4,
        "eager_error": 2.5e-7,
        "form": "per-layer",
        "note": "a first note; a second note",
        "recipe": {
            "ratio": 0.25,
            "units": None,
            "kinds": {"ffn": 1.0},
            "ranking": "measured",
            "widths": "per-layer",
            "criterion": "kfac",
            "compensation": "least-squares",
            "samples": 16,
            "length": 32,
            "seed": 3,
            "calibration": "16 x 32 tokens of text.txt, seed 3",
            "measured": "divergence",
            "block_scores": {"model.layers.8": 0.25, "model.layers.9": 0.125},
        },
        "seconds": {"trace": 1.25, "verify": 0.5},
        "versions": {"fxprune": "0.1.0", "torch": "2.13.0", "machine": "x86_64, 2 cores", "device": "cpu"},
        "compensation": {
            "method": "least-squares",
            "maps": {f"model.layers.{i}.mlp.down_proj.weight": [0.2, 0.1 + i / 100] for i in range(LAYERS)},
            "ridges": {},
            "added": [],
            "tokens": 512,
        },
        "data": [],
        "dense": {"name": "org/dense", "hub": True, "class": "LlamaForCausalLM", "dtype": "float32", "fingerprint": "f00d"},
        "importance": {f"model.layers.{i}.mlp.ffn": {**spread, "cut": spread["cut"] if i else None} for i in range(LAYERS)},
        "curves": {f"model.layers.{i}.mlp.ffn": [[0, 0.0], [32, 0.01 * (i + 1)], [63, 0.1 * (i + 1)]] for i in range(LAYERS)},
        "perplexity": {
            "a text": {
                "before": {"perplexity": 20.125, "tokens": 127, "windows": 1, "length": 128, "stride": 128},
                "after": {"perplexity": 25.5, "tokens": 127, "windows": 1, "length": 128, "stride": 128},
            }
        },
        "latency": {"before": timed(10.0, 4.0), "after": timed(8.0, 0.0)},
        "samples": [{"prompt": "Once", "before": "upon\n a  time", "after": ""}],
        "stock_load": "a LlamaForCausalLM",
    }
    return {**made, **changes}


def timed(prefill: float, decode: float) -> dict[str, Any]:
    return {"prefill_ms": prefill, "decode_ms": decode, "prompt": 128, "new_tokens": 16, "repeats": 3, "batch": 1}


def recovery(**changes: Any) -> dict[str, Any]:
    """A recovery of twelve steps through a curriculum of two sources."""
    from fxprune.recovery.settings import Recovery

    steps, names = list(range(1, 13)), ["a.txt", "b.jsonl"]

    def record(turn: int, step: int, ended: str) -> dict[str, Any]:
        lost = {n: 0.5 / turn + i for i, n in enumerate(names)}
        place = {"stage": 1, "round": turn, "step": step, "loss": {n: 3 + v for n, v in lost.items()}, "degradation": lost}
        weights = {"weights": {"a.txt": 0.25, "b.jsonl": 0.75}, "mean": 1.0, "ended": ended, "steps": 0 if ended else 6}
        return {**place, **weights, "rows": {}, "tokens": {} if ended else {"a.txt": 100, "b.jsonl": 300}}

    made: dict[str, Any] = {
        "recipe": "default",
        "settings": Recovery(max_steps=12, lr=1e-3).to_json(),
        "steps": 12,
        "best_step": 8,
        "stopped": "all steps done",
        "history": {"step": steps, "loss": [4 - s / 10 for s in steps], "lr": [1e-3] * 12, "tokens": steps},
        "validation": [{"step": 0, "perplexity": 40.25}, {"step": 8, "perplexity": 31.5}, {"step": 12, "perplexity": 32.0}],
        "tokens": 800,
        "tokens_per_second": 1000.0,
        "seconds": 0.8,
        "trained_parameters": 7_680,
        "parameters": 76_800,
        "data": {
            "training": {"sources": "a.txt (20 examples), b.jsonl (40 examples)", "examples": 60, "tokens": 900},
            "validation": {"sources": "held out of a.txt, b.jsonl", "examples": 6, "tokens": 90},
            "sketches": {"a.txt": {}, "b.jsonl": {}},
        },
        "teacher": "LlamaForCausalLM, 102,400 parameters",
        "choices": {},
        "notes": ["not packed"],
        "versions": {"peft": "0.21"},
        "curriculum": {
            "weights": "dynamic",
            "rounds": 2,
            "floor": 0.05,
            "patience": 1,
            "threshold": 0.0,
            "shares": None,
            "stages": [{"a.txt": 1.0, "b.jsonl": 2.0}],
            "dense": dict.fromkeys(names, 3.0),
            "measurements": [record(1, 0, ""), record(2, 6, ""), record(3, 12, "all rounds done")],
            "final": {n: {"loss": 3.1, "degradation": 0.125} for n in names},
        },
    }
    return {**made, **changes}


def shearing() -> dict[str, Any]:
    """A shearing of two periods."""
    periods = [{"step": s, "target": 0.5, "units": 10 * s, "removed": 0.125 * (i + 1), "tokens": 64} for i, s in enumerate((4, 8))]
    return {
        "recipe": "default",
        "settings": {"periods": 2},
        "ratio": 0.25,
        "removed": 0.25,
        "knowledge": {
            "text": "32 x 16 tokens",
            "rows": [
                {"name": f"model.layers.{i}.mlp.ffn", "kind": "ffn", "rank": i + 1, "loss_change": 0.5 - i / 10} for i in range(3)
            ],
            "protected": ["model.layers.0.mlp.ffn"],
        },
        "lhspg": {"periods": periods, "history": {"step": [1, 2, 3], "loss": [3.0, 2.5, 2.25]}},
        "prune": {"zeros": 25_600},
        "tokens": {"warm-up": 32, "periods": [64, 64], "after the periods": 16, "total": 176},
        "notes": ["sheared with care"],
    }


def evaluation(**changes: Any) -> dict[str, Any]:
    """As ``fxprune eval --json`` gives it, beside the dense model's."""

    def one(perplexity: float, score: float, prefill: float) -> dict[str, Any]:
        windows = {"tokens": 8128, "windows": 64, "length": 128, "stride": 128, "protocol": "llm-pruner", "source": "wiki.txt"}
        task = {
            "task": "boolq",
            "metric": "acc",
            "acc": score,
            "acc_norm": None,
            "rows": 500,
            "source": "boolq.jsonl",
            "chance": 0.5,
        }
        return {
            "perplexities": [{**windows, "perplexity": perplexity, "text": "wiki"}],
            "tasks": [task],
            "average": score,
            "latency": timed(prefill, 3.0),
            "settings": {"harness": "lm-eval 0.4.9", "special_tokens": False},
            "versions": {"machine": "x86_64, 8 cores", "device": "cpu"},
            "overlaps": [],
        }

    seen = {"text": "wiki", "use": "calibration", "name": "text.txt", "of_text": 0.25, "of_data": 0.5, "words": 13}
    return {**one(50.0, 0.6, 9.0), "overlaps": [seen], "dense": one(40.0, 0.75, 12.0), **changes}


def write(directory: Path, data: dict[str, Any], measured: dict[str, Any] | None = None) -> Path:
    """A directory that holds them."""
    directory.mkdir()
    (directory / "fxprune_report.json").write_text(json.dumps(data))
    if measured is not None:
        (directory / "eval.json").write_text(json.dumps(measured))
    return directory


def full() -> Record:
    """Everything at once."""
    sheared = shearing()
    sheared["tokens"] |= {"recovery": 800, "total": 976}
    return Record("full", report(recovery=recovery(), shearing=sheared), evaluation())


def changed(value: Any, change: Callable[[str], str]) -> Any:
    """Every text in a structure changed; names of fields stay."""
    if isinstance(value, dict):
        return {k: changed(v, change) for k, v in value.items()}
    if isinstance(value, list):
        return [changed(v, change) for v in value]
    return change(value) if isinstance(value, str) else value


class Tables(HTMLParser):
    """The tables of a page as rows of cells, and the tags that were opened and not closed."""

    VOID = ("meta", "img", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.open: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open, tag
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if any(tag in ("th", "td") for tag in self.open):
            self.rows[-1][-1] += data

    def row(self, label: str) -> list[str]:
        """The cells behind a label."""
        return next(row[1:] for row in self.rows if row and row[0] == label)


def unreadable(directory: Path) -> list[str]:
    """What the pages of a checkpoint say of parts that they could not read: nothing, where all is well."""
    pages = [directory / name for name in ("report.html", "report.md", "README.md")]
    return [
        f"{page.name}: {said}"
        for page in pages
        for said in re.findall(r"(?i).*this part of the report cannot be read.*", page.read_text())
    ]
