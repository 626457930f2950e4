"""Prune, evaluate and recover one model many times: the trace, scores and curves that several rows need are made once."""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxprune
from benchmarks.paper.common import PROTOCOL, Data, Row
from fxprune.api import PruneResult, example_inputs
from fxprune.calibration import load_calibration
from fxprune.checkpoint.source import load_source
from fxprune.commands.common import quiet_libraries
from fxprune.data import Examples
from fxprune.demo import model_file
from fxprune.evaluation import perplexity
from fxprune.evaluation.text import token_stream
from fxprune.passes.dependency import groups_of
from fxprune.planning import Material, Planner, settle
from fxprune.recovery.settings import settings_of


class Bench:
    """A model with its trace and texts.

    Attributes:
        name: Of the model, without the machine's folders.
        dense_above_chance: The dense model's zero-shot average less what guessing scores, once it was measured.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.data = arguments, Data.of(arguments.data, arguments.texts)
        self.data.check([arguments.calibration])
        torch.set_num_threads(arguments.threads)
        quiet_libraries()
        source = arguments.model or model_file()
        self.name = Path(source).stem if Path(source).exists() else str(source)
        loaded, self.tokenizer = load_source(source, dtype=arguments.dtype)
        self.model: Any = loaded.to(arguments.device)
        self.gm = fxprune.trace(self.model, example_inputs(self.model))
        self.groups = groups_of(self.gm)
        self.streams = {n: token_stream(self.tokenizer, r, protocol=PROTOCOL) for n, r in self.data.evaluation_rows().items()}
        self._kept: dict[str, tuple[Any, float]] = {}
        self.dense_above_chance: float | None = None

    def settings(self, recipe: Mapping[str, Any]) -> dict[str, Any]:
        """What a row depends on; the dense model (no recipe) on no calibration."""
        a = self.arguments
        evaluated = {"model": self.name, "dtype": a.dtype, "length": a.length, "windows": a.windows}
        calibrated = {"samples": a.samples, "calibration": a.calibration, "seed": a.seed, "recipe": dict(recipe)}
        return {**evaluated, **(calibrated if recipe else {})}

    def batches(self, batch_size: int = 8) -> tuple[Sequence[Mapping[str, torch.Tensor]], str]:
        """The calibration batches, and what they are in words."""
        a = self.arguments
        options = {"samples": a.samples, "length": a.length, "batch_size": batch_size, "seed": a.seed}
        path = self.data.training(a.calibration)
        return load_calibration(path, model=self.model, tokenizer=self.tokenizer, **options)

    def prune(self, recipe: Mapping[str, Any], ratio: float) -> tuple[PruneResult, Row]:
        """Prune by a recipe with this run's calibration.

        Args:
            recipe: Settings of `fxprune.prune`; samples and length are this run's, so that every row reads the same tokens.
            ratio: Share of all parameters.

        Returns:
            (the result, what the row says of it).
        """
        a = self.arguments
        recipe = {**recipe, "samples": a.samples, "length": a.length}
        how, chosen = settle(recipe, {}, ratio, None, None, {}, a.seed)
        assert chosen is not None
        clock = _Clock(self._kept, json.dumps([how.to_json(), sorted(chosen.pace)], default=str))
        material = Material(self.data.training(a.calibration), self.model, self.tokenizer, how, clock)
        plan = Planner(chosen, how, material, clock=clock).plan(self.gm, self.groups)
        result = fxprune.prune(
            self.model,
            plan=plan,
            graph=self.gm,
            recipe=recipe if how.compensation != "none" else None,
            compensation=how.compensation,
            calibration=material.batches() if how.compensation != "none" else None,
            tokenizer=self.tokenizer,
            seed=a.seed,
        )
        seconds = {**clock.seconds, **{k: round(v, 2) for k, v in result.report.seconds.items() if k not in clock.seconds}}
        tokens = a.samples * a.length if material.described != "none" else 0
        return result, {
            "ratio": ratio,
            "removed": round(result.report.removed, 5),
            "parameters": result.report.parameters_after,
            "form": result.form,
            "calibration": material.described,
            "calibration_tokens": tokens,
            "batch_size": how.batch_size,
            "verify_error": result.report.verify.max_rel_error if result.report.verify else None,
            "note": result.report.note,
            "seconds": seconds,
        }

    def perplexities(self, model: nn.Module) -> Row:
        """Of each text by LLM-Pruner's protocol, with everything that it depends on."""
        a = self.arguments
        found = {}
        for name, ids in self.streams.items():
            options: dict[str, Any] = {"length": a.length, "batch_size": a.batch, "max_windows": a.windows or None}
            source = self.data.evaluation[name].name
            found[name] = perplexity(model, ids, text=name, protocol=PROTOCOL, source=source, **options).to_json()
        return found

    def tasks(self, model: nn.Module) -> Row:
        """Zero-shot scores, with the share of the dense model's that is kept, above chance, once those are known."""
        a = self.arguments
        if a.task_dtype is not None:
            model = copy.deepcopy(model).to(getattr(torch, a.task_dtype))
        found = fxprune.evaluate(model, self.tokenizer, tasks=a.tasks, data=self.data.directory, limit=a.limit, batch_size=a.batch)
        above = found.above_chance
        kept = above / self.dense_above_chance if above is not None and self.dense_above_chance else None
        return {
            "average": found.average,
            "above_chance": above,
            "above_chance_kept": kept,
            "tasks": [t.to_json() for t in found.tasks],
            **{name: found.settings.get(name) for name in ("harness", "special_tokens", "limit")},
        }

    def windows(self, text: str) -> Examples:
        """What `perplexities` reads of a text, window by window: a recovery that is measured on it has the same perplexity."""
        a = self.arguments
        ids = self.streams[text]
        whole = ids[: len(ids) // a.length * a.length].view(-1, a.length)
        return Examples.of_ids(whole[: a.windows or None], text)

    def recover(self, target: Any, data: str, *, validation: Examples | None = None, **overrides: Any) -> tuple[nn.Module, Row]:
        """Train a pruned model.

        Args:
            target: What `fxprune.recover` takes.
            data: A name of `benchmarks.paper.common.TRAINING`.
            validation: What to measure on; by default some of the data is held out.
            **overrides: Settings of the recovery.

        Returns:
            (the recovered model, what the row says of it).
        """
        a = self.arguments
        start = time.perf_counter()
        settings = settings_of(a.recover_recipe, {**dict(a.recover_set), "seed": a.seed, **overrides})
        source = str(self.data.training(data))
        result = fxprune.recover(target, source, tokenizer=self.tokenizer, recipe=settings, validation=validation)
        report = result.report
        return result.model, {
            "data": data,
            "tokens": report.tokens,
            "steps": report.steps,
            "best_step": report.best_step,
            "stopped": report.stopped,
            "trained_parameters": report.trained_parameters,
            "settings": report.settings,
            "choices": report.choices,
            "validation": report.validation,
            "loss": report.history["loss"],
            "seconds": round(time.perf_counter() - start, 1),
        }


def eager(result: PruneResult) -> nn.Module:
    """What a result is evaluated as: the eager model, which holds the same parameters as the graph; the graph if there is none."""
    return result.graph_module if result.model is None else result.model


class _Clock:
    """Runs the stages of planning.

    One that reads neither a selection nor a plan, and so does not depend on the ratio, is run once for all rows with the same
    settings (and the same lanes, where sensitivity is measured); its seconds are those of that one run.
    """

    def __init__(self, kept: dict[str, tuple[Any, float]], settings: str) -> None:
        self.kept, self.settings = kept, settings
        self.seconds: dict[str, float] = {}

    def __call__(self, name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        key = f"{name} {self.settings} {json.dumps(kwargs.get('lanes'))}"
        if key not in self.kept:
            start = time.perf_counter()
            made = function(*args, **kwargs)
            self.seconds[name] = round(time.perf_counter() - start, 2)
            if any(isinstance(value, fxprune.Selection | fxprune.PrunePlan) for value in (*args, *kwargs.values())):
                return made
            self.kept[key] = made, self.seconds[name]
        made, self.seconds[name] = self.kept[key]
        return dict(made) if isinstance(made, dict) else made  # the scores are added to where some fell back
