"""lm-eval as the scorer of zero-shot tasks: our files as its tasks, any model as its model, in silence. Needs the extra `eval`."""

from __future__ import annotations

import copy
import functools
import importlib.metadata
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Self

import datasets
import lm_eval.api.task
import lm_eval.evaluator
import torch
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ..calibration import longest_input
from ..errors import FxPruneError, UsageError
from ..mode import evaluating
from ..passes.batches import Progress, logits_of
from .tasks import AVERAGED, METRICS, Row, Scores, TaskScore

VERSION = f"lm-eval {importlib.metadata.version('lm_eval')}"


def run(
    model: nn.Module,
    tokenizer: Any,
    names: Sequence[str],
    files: Mapping[str, tuple[list[Row], str]] | None,
    *,
    limit: int | None,
    batch_size: int,
    progress: Progress | None,
) -> Scores:
    """Score the tasks; see `fxprune.evaluation.tasks.score_tasks`, which checks the arguments."""
    with _quiet(), evaluating(model):
        scorer = Scorer(model, tokenizer, batch_size, progress)
        tasks = {n: LocalTask(n, files[n][0]) for n in names} if files is not None else _from_hub(names)
        found = lm_eval.evaluator.evaluate(scorer, {"tasks": tasks}, limit=limit, log_samples=False)["results"]
    scores = []
    for name, task in tasks.items():
        choices = Counter(instance.doc_id for instance in task.instances)
        keys = ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr")
        numbers = {key: _number(found[name].get(f"{key},none")) for key in keys}
        scores.append(
            TaskScore(
                task=name,
                **numbers,  # type: ignore[arg-type]
                metric=AVERAGED[name],
                chance=sum(1 / n for n in choices.values()) / len(choices),
                rows=len(choices),
                source=files[name][1] if files is not None else _hub_source(task),
                constant=_constant(task),
            )
        )
    return Scores(tuple(scores), scorer.cut, scorer.special_tokens, VERSION)


class LocalTask(ConfigurableTask):  # type: ignore[misc]
    """A task of lm-eval over rows of a local file; prompts, choices and metrics are those of its own definition of that name.

    Rows carry the whole prompt, so that nothing is left to a template.
    """

    def __init__(self, name: str, rows: Sequence[Row]) -> None:
        partial = name == "winogrande"  # every choice makes a context of its own, and what follows it is scored
        self._rows = [{**row, "choices": [row["context"] + c for c in row["choices"]]} for row in rows] if partial else list(rows)
        super().__init__(
            config={
                "task": name,
                "output_type": "multiple_choice",
                "test_split": "rows",
                "doc_to_text": "label" if partial else "context",
                "doc_to_choice": "choices",
                "doc_to_target": "suffix" if partial else "label",
                "num_fewshot": 0,
                "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in METRICS[name]],
            }
        )

    def download(self, dataset_kwargs: Any = None, **_: Any) -> None:
        """Hand over the rows; nothing is downloaded and nothing is cached."""
        self.dataset = {"rows": datasets.Dataset.from_list(self._rows)}


class Scorer(HFLM):  # type: ignore[misc]
    """lm-eval's Hugging Face model over any module that returns logits, with our progress instead of its bars.

    Raises:
        UsageError: lm-eval cannot use the tokenizer or the model.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, batch_size: int, progress: Progress | None = None) -> None:
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            raise UsageError(f"lm-eval needs a Hugging Face tokenizer, got {type(tokenizer).__name__}")
        if tokenizer.bos_token_id is None and tokenizer.eos_token_id is None:
            raise UsageError("lm-eval needs a tokenizer with a bos or an eos token, and this one has neither")
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            raise UsageError(f"zero-shot tasks are scored with causal language models, and {type(model).__name__} is none")
        super().__init__(
            pretrained=model if isinstance(model, PreTrainedModel) else _Shell(model),
            tokenizer=copy.deepcopy(tokenizer),  # lm-eval gives it a pad token
            backend="causal",
            batch_size=batch_size,
            max_length=longest_input(model),
        )
        self.cut = 0
        self.special_tokens = len(tokenizer("a")["input_ids"]) > len(tokenizer("a", add_special_tokens=False)["input_ids"])
        self._progress = progress

    def loglikelihood(self, requests: Any, disable_tqdm: bool = True) -> Any:
        """As lm-eval does it, without its bars."""
        if self._progress is not None:
            self.cache_hook = _Count(self._progress, len(requests))
        return super().loglikelihood(requests, disable_tqdm=True)

    def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
        for texts, context, answer in requests:
            if not answer:
                raise UsageError(f"the tokenizer reads the answer '{texts[1]}' as no tokens at all")
            if len(answer) > self.max_length:
                told = f"'{texts[1][:40].strip()}...' has {len(answer)}"
                raise UsageError(f"the model reads at most {self.max_length} tokens, and the answer {told}")
            self.cut += len(context) + len(answer) > self.max_length + 1
        found = super()._loglikelihood_tokens(requests, *args, **kwargs)
        if any(math.isnan(score) for score, _ in found):
            raise FxPruneError("the model's log-likelihoods are NaN: it is damaged")  # lm-eval would take the first choice
        return found

    def _model_call(self, inps: Tensor, attn_mask: Any = None, labels: Any = None) -> Tensor:
        with torch.no_grad():
            return logits_of(self.model(input_ids=inps))


class _Shell(nn.Module):
    """What lm-eval asks of a model beside calling it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.config = getattr(model, "config", None)
        self.device = next(model.parameters()).device

    def tie_weights(self) -> None:
        """Nothing: the model is used as it is."""

    def train(self, mode: bool = True) -> Self:
        """Nothing: `run` has seen to it, and a traced graph module refuses it."""
        return self

    def forward(self, input_ids: Tensor) -> Any:
        return self.inner(input_ids=input_ids)


class _Count:
    """lm-eval tells its cache of every answer: the place to count them."""

    def __init__(self, progress: Progress, total: int) -> None:
        self.progress, self.total, self.done = progress, total, 0

    def add_partial(self, *_: Any) -> None:
        self.done += 1
        self.progress("zero-shot requests", self.done, self.total)


def _from_hub(names: Sequence[str]) -> dict[str, Any]:
    manager, found = _manager(), {}
    for name in names:
        try:
            found[name] = manager.load([name])["tasks"][name]
        except Exception as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UsageError(
                f"cannot load the task '{name}' from the hub ({reason}); with data=DIR (--data DIR) its rows are read from "
                f"DIR/{name}.jsonl.gz"
            ) from error
    return found


@functools.cache
def _manager() -> Any:
    """lm-eval's index of its definitions: thousands of files, so read once."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def _hub_source(task: Any) -> str:
    split = task.config.test_split or task.config.validation_split
    return ":".join(filter(None, [task.DATASET_PATH, task.DATASET_NAME, split]))


def _constant(task: Any) -> float | None:
    """The share of the commonest right answer, where all of several rows have the same choices."""
    rows = {instance.doc_id: instance.doc for instance in task.instances}
    if len(rows) == 1 or len({tuple(task.doc_to_choice(row)) for row in rows.values()}) > 1:
        return None
    answers = Counter(task.doc_to_target(row) for row in rows.values())
    return max(answers.values()) / len(rows)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) else None


@contextmanager
def _quiet() -> Iterator[None]:
    """No log lines and no bars of lm-eval and datasets."""
    log = logging.getLogger("lm_eval")
    level, bars, bar = log.level, datasets.are_progress_bars_disabled(), lm_eval.api.task.tqdm
    log.setLevel(logging.CRITICAL)
    datasets.disable_progress_bars()
    lm_eval.api.task.tqdm = functools.partial(bar, disable=True)  # lm-eval 0.4.13 has no option for this one
    try:
        yield
    finally:
        log.setLevel(level)
        lm_eval.api.task.tqdm = bar
        if not bars:
            datasets.enable_progress_bars()
