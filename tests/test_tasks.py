"""Zero-shot tasks: log-likelihoods by hand in plain torch, lm-eval's own task definitions, what is read and what is refused."""

from __future__ import annotations

import gzip
import json
import logging
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import FxPruneError, UsageError
from fxprune.evaluation import AVERAGED, TASKS, TaskScore, score_tasks
from fxprune.evaluation.tasks import METRICS, read_rows

from .harness_rows import byte_pair_tokenizer, raw_rows, task_row
from .zoo import build
from .zoo import tokenizer as words

Row = Mapping[str, Any]


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("llama", tied=False, vocab_size=320, max_position_embeddings=2048)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_pair_tokenizer()


def write(directory: Path, task: str, rows: Sequence[Row]) -> None:
    (directory / f"{task}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- by hand ---------------------------------------------------------------------------------------------------------------------


def log_likelihood(model: Any, tokenizer: Any, context: str, answer: str) -> float:
    """log P(answer | context), in double precision, token by token; a space at the context's end belongs to the answer's tokens."""
    ids, given = tokenizer.encode(context + answer), len(tokenizer.encode(context.rstrip(" ")))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([ids])).logits[0].double()
    return sum(float(logits[i - 1, ids[i]] - logits[i - 1].logsumexp(0)) for i in range(given, len(ids)))


def by_hand(model: nn.Module, tokenizer: Any, task: str, rows: Sequence[Row]) -> tuple[float, float]:
    """(acc, acc_norm) of the harness's conventions."""
    right = [0, 0]
    for row in rows:
        if task == "winogrande":
            contexts = [row["context"] + choice for choice in row["choices"]]
            scores = [log_likelihood(model, tokenizer, context, " " + row["suffix"]) for context in contexts]
        else:
            scores = [log_likelihood(model, tokenizer, row["context"], " " + choice) for choice in row["choices"]]
        per_character = [s / len(choice) for s, choice in zip(scores, row["choices"], strict=True)]
        for i, ranked in enumerate((scores, per_character)):
            right[i] += ranked.index(max(ranked)) == row["label"]
    return right[0] / len(rows), right[1] / len(rows)


def agree(score: TaskScore, model: nn.Module, tokenizer: Any, rows: Sequence[Row]) -> None:
    acc, acc_norm = by_hand(model, tokenizer, score.task, rows)
    assert score.acc == pytest.approx(acc)
    assert score.acc_norm == (pytest.approx(acc_norm) if "acc_norm" in METRICS[score.task] else None)
    assert score.rows == len(rows)
    assert score.chance == pytest.approx(sum(1 / len(row["choices"]) for row in rows) / len(rows))
    labels = [row["label"] for row in rows]
    assert score.constant == (max(map(labels.count, labels)) / len(rows) if score.task == "boolq" else None)
    assert score.acc_stderr == pytest.approx((acc * (1 - acc) / (len(rows) - 1)) ** 0.5)


@pytest.mark.parametrize("bos", [False, True], ids=["plain", "bos"])
def test_scores_are_what_plain_torch_finds(model: nn.Module, tmp_path: Path, bos: bool) -> None:
    """All seven tasks, also with a tokenizer that puts a token before every text."""
    tokenizer = byte_pair_tokenizer(bos=bos)
    rows = {task: [task_row(task, raw) for raw in raw_rows(task, 12)] for task in TASKS}
    for task in TASKS:
        write(tmp_path, task, rows[task])
    found = score_tasks(model, tokenizer, data=tmp_path, batch_size=5)
    assert [s.task for s in found.tasks] == list(TASKS)
    for score in found.tasks:
        agree(score, model, tokenizer, rows[score.task])
        assert (score.source, score.metric) == (f"{score.task}.jsonl", AVERAGED[score.task])
        assert score.score == getattr(score, AVERAGED[score.task])
    assert (found.cut, found.special_tokens) == (0, bos)
    assert len({s.acc for s in found.tasks}) > 2, "scores that are all alike prove nothing"
    assert tokenizer.pad_token is None, "the tokenizer is not ours to change"


def test_the_metrics_of_the_tables() -> None:
    """Llama-7B has 67.45 on ARC-e in LLM-Pruner's table 1; the harness of its time gave 67.3 as acc and far less as acc_norm."""
    assert {t for t, metric in AVERAGED.items() if metric == "acc_norm"} == {"hellaswag", "arc_challenge", "openbookqa"}
    assert all(metric in METRICS[t] for t, metric in AVERAGED.items())


def test_a_graph_module_is_scored_as_its_model(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    rows = [task_row("piqa", raw) for raw in raw_rows("piqa", 6)]
    write(tmp_path, "piqa", rows)
    graph = fxprune.trace(model, {"input_ids": torch.randint(0, 320, (2, 16))})
    (score,) = score_tasks(graph, tokenizer, ["piqa"], data=tmp_path).tasks
    agree(score, model, tokenizer, rows)


def test_a_pruned_model_is_scored(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    """A subclass with a width of its own in each layer, as it is read back."""
    result = fxprune.prune(model, ratio=0.2, criterion="l1", widths="per-layer", ranking="global", tokenizer=tokenizer)
    result.save_pretrained(tmp_path / "small")
    small = fxprune.load(tmp_path / "small")
    rows = [task_row("hellaswag", raw) for raw in raw_rows("hellaswag", 6)]
    write(tmp_path, "hellaswag", rows)
    small.train()
    (score,) = score_tasks(small, tokenizer, ["hellaswag"], data=tmp_path).tasks
    assert small.training
    agree(score, small.eval(), tokenizer, rows)


# --- lm-eval's own definitions ---------------------------------------------------------------------------------------------------


def hub(monkeypatch: pytest.MonkeyPatch, raw: Mapping[str, Sequence[Row]]) -> list[str]:
    """Put rows where lm-eval's definitions look for their datasets; returns what was asked for."""
    named = {
        "boolq": ("aps/super_glue", "boolq"),
        "piqa": ("baber/piqa", None),
        "hellaswag": ("Rowan/hellaswag", None),
        "winogrande": ("allenai/winogrande", "winogrande_xl"),
        "arc_easy": ("allenai/ai2_arc", "ARC-Easy"),
        "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge"),
        "openbookqa": ("allenai/openbookqa", "main"),
    }
    asked = []

    def load_dataset(path: str, name: str | None = None, **_: Any) -> Any:
        (task,) = (t for t, where in named.items() if where == (path, name))
        asked.append(task)
        rows = datasets.Dataset.from_list([dict(row) for row in raw[task]])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), rows))

    monkeypatch.setattr("lm_eval.api.task.datasets.load_dataset", load_dataset)
    return asked


def test_our_files_are_what_lm_eval_defines(
    model: nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same rows through lm-eval's task definitions and through our files: the same scores, for every task."""
    raw = {task: raw_rows(task, 9, seed=1) for task in TASKS}
    for task in TASKS:
        write(tmp_path, task, [task_row(task, row) for row in raw[task]])
    asked = hub(monkeypatch, raw)
    theirs = score_tasks(model, tokenizer, limit=7)
    assert asked == list(TASKS)
    ours = score_tasks(model, tokenizer, data=tmp_path, limit=7)
    assert [replace(s, source="") for s in ours.tasks] == [replace(s, source="") for s in theirs.tasks]
    assert [s.source for s in theirs.tasks][:2] == ["aps/super_glue:boolq:validation", "baber/piqa:validation"]
    assert {s.rows for s in theirs.tasks} == {7}


def test_prompts_are_lm_evals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every request, context and answer, letter by letter."""
    from lm_eval.tasks import TaskManager

    from fxprune.evaluation.harness import LocalTask

    raw = {task: raw_rows(task, 9, seed=2) for task in TASKS}
    hub(monkeypatch, raw)
    manager = TaskManager()
    for task in TASKS:
        theirs, ours = manager.load([task])["tasks"][task], LocalTask(task, [task_row(task, row) for row in raw[task]])
        for made in (theirs, ours):
            made.build_all_requests()
        assert [r.args for r in ours.instances] == [r.args for r in theirs.instances], task
        assert len(ours.instances) > 9


# --- silence, limits, progress ---------------------------------------------------------------------------------------------------


def test_nothing_is_printed_written_or_fetched(
    model: nn.Module,
    tokenizer: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    import lm_eval.api.task

    write(tmp_path, "boolq", [task_row("boolq", raw) for raw in raw_rows("boolq", 3)])
    home, empty = tmp_path / "home", tmp_path / "empty"
    home.mkdir()
    empty.mkdir()
    monkeypatch.chdir(empty)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("something asked the network"))
    bar, state = lm_eval.api.task.tqdm, torch.get_rng_state()
    seen: list[tuple[str, int, int]] = []
    with caplog.at_level(logging.INFO):
        score_tasks(model, tokenizer, ["boolq"], data=tmp_path, progress=lambda *a: seen.append(a))
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""
    assert caplog.records == []
    assert list(home.iterdir()) == list(empty.iterdir()) == []
    assert seen == [("zero-shot requests", n, 6) for n in range(1, 7)]
    assert lm_eval.api.task.tqdm is bar
    assert torch.equal(torch.get_rng_state(), state)


def test_long_requests_lose_their_beginning_and_are_counted(tokenizer: Any, tmp_path: Path) -> None:
    short = build("llama", tied=False, vocab_size=320, max_position_embeddings=24)
    rows = [task_row("piqa", raw) for raw in raw_rows("piqa", 8)]
    write(tmp_path, "piqa", rows)
    lengths = [len(tokenizer.encode(f"{row['context']} {choice}")) for row in rows for choice in row["choices"]]
    found = score_tasks(short, tokenizer, ["piqa"], data=tmp_path)
    assert found.cut == sum(n > 25 for n in lengths) > 0
    write(tmp_path, "piqa", [{"context": "a", "choices": ["b", "c " * 40], "label": 0}])
    with pytest.raises(UsageError, match=r"the model reads at most 24 tokens, and the answer 'c c c .*\.\.\.' has \d\d"):
        score_tasks(short, tokenizer, ["piqa"], data=tmp_path)


def test_one_row_has_no_standard_error(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    write(tmp_path, "arc_easy", [task_row("arc_easy", raw) for raw in raw_rows("arc_easy", 4)])
    (score,) = score_tasks(model, tokenizer, ["arc_easy", "arc_easy"], data=tmp_path, limit=1).tasks
    assert (score.rows, score.acc_stderr, score.acc_norm_stderr) == (1, None, None)
    assert TaskScore(**score.to_json()) == score


def test_rows_are_read_from_plain_and_packed_files(tmp_path: Path) -> None:
    rows = [task_row("winogrande", raw) for raw in raw_rows("winogrande", 5)]
    write(tmp_path, "winogrande", rows)
    wanted = [{k: v for k, v in row.items() if k != "id"} for row in rows]
    assert read_rows(tmp_path, "winogrande") == (wanted, "winogrande.jsonl")
    with gzip.open(tmp_path / "winogrande.jsonl.gz", "wt") as file:
        file.write("\n" + "\n\n".join(json.dumps(row) for row in rows[:3]))
    assert read_rows(tmp_path, "winogrande") == (wanted[:3], "winogrande.jsonl.gz")
    assert read_rows(tmp_path, "winogrande", 2) == (wanted[:2], "winogrande.jsonl.gz")


# --- what is refused -------------------------------------------------------------------------------------------------------------

GOOD = {"context": "a", "choices": ["b", "c"], "label": 0, "suffix": "d"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"context": "a", "choices": ["b"', "cannot read 'winogrande.jsonl' as jsonl: ValueError: line 2, column 33: "),
        ("[1]", "'winogrande.jsonl', line 2: a row must be an object with fields, not a list"),
        ("{}", "'winogrande.jsonl', line 2: there is no field 'context'; it has none"),
        ({"label": ...}, "'winogrande.jsonl', line 2: there is no field 'label'; it has context, choices, suffix"),
        ({"suffix": ...}, "'winogrande.jsonl', line 2: there is no field 'suffix'; it has context, choices, label"),
        ({"suffix": 3}, "'winogrande.jsonl', line 2: 'suffix' must be a text, not a int"),
        ({"context": None}, "'winogrande.jsonl', line 2: 'context' must be a text, not a NoneType"),
        ({"choices": ["b"]}, "'winogrande.jsonl', line 2: 'choices' must be a list of two texts or more"),
        ({"choices": ["b", ""]}, "'winogrande.jsonl', line 2: 'choices' must be a list of two texts or more"),
        ({"choices": "bc"}, "'winogrande.jsonl', line 2: 'choices' must be a list of two texts or more"),
        ({"label": 2}, "'winogrande.jsonl', line 2: 'label' must be an index into the 2 choices, got 2"),
        ({"label": "b"}, "'winogrande.jsonl', line 2: 'label' must be an index into the 2 choices, got 'b'"),
        ({"label": True}, "'winogrande.jsonl', line 2: 'label' must be an index into the 2 choices, got True"),
    ],
)
def test_rows_that_are_refused(tmp_path: Path, row: Any, message: str) -> None:
    bad = row if isinstance(row, str) else json.dumps({k: v for k, v in {**GOOD, **row}.items() if v is not ...})
    (tmp_path / "winogrande.jsonl").write_text(f"{json.dumps(GOOD)}\n{bad}\n")
    with pytest.raises(UsageError) as refused:
        read_rows(tmp_path, "winogrande")
    assert str(refused.value).startswith(message)


def test_files_that_are_refused(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no boolq\.jsonl\.gz \(nor boolq\.jsonl\) in '"):
        score_tasks(model, tokenizer, data=tmp_path)
    with pytest.raises(UsageError, match=r"there is no directory '.*/nowhere' with task files"):
        score_tasks(model, tokenizer, data=tmp_path / "nowhere")
    (tmp_path / "boolq.jsonl").write_text("\n")
    with pytest.raises(UsageError, match=r"'boolq\.jsonl' holds no rows"):
        score_tasks(model, tokenizer, data=tmp_path)
    (tmp_path / "boolq.jsonl.gz").write_bytes(gzip.compress(b"{}")[:-4])
    with pytest.raises(UsageError, match=r"cannot read 'boolq\.jsonl\.gz' as jsonl: EOFError: "):
        score_tasks(model, tokenizer, data=tmp_path)
    (tmp_path / "boolq.jsonl.gz").write_bytes(b"not packed")
    with pytest.raises(UsageError, match=r"cannot read 'boolq\.jsonl\.gz' as jsonl: BadGzipFile: "):
        score_tasks(model, tokenizer, data=tmp_path)


def test_arguments_that_are_refused(model: nn.Module, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="unknown task 'arc_esy'; did you mean 'arc_easy'"):
        score_tasks(model, tokenizer, ["boolq", "arc_esy"], data=tmp_path)
    with pytest.raises(UsageError, match="limit must be a whole number of at least 1, got 0"):
        score_tasks(model, tokenizer, data=tmp_path, limit=0)
    with pytest.raises(UsageError, match="batch_size must be a whole number of at least 1, got 0"):
        score_tasks(model, tokenizer, data=tmp_path, batch_size=0)
    write(tmp_path, "boolq", [task_row("boolq", raw) for raw in raw_rows("boolq", 3)])
    with pytest.raises(UsageError, match="lm-eval needs a Hugging Face tokenizer, got SimpleNamespace"):
        score_tasks(model, SimpleNamespace(), ["boolq"], data=tmp_path)
    bare = byte_pair_tokenizer()
    bare.bos_token = bare.eos_token = None
    with pytest.raises(UsageError, match="lm-eval needs a tokenizer with a bos or an eos token, and this one has neither"):
        score_tasks(model, bare, ["boolq"], data=tmp_path)
    monkeypatch.setattr(model.config, "is_encoder_decoder", True, raising=False)
    with pytest.raises(UsageError, match="scored with causal language models, and LlamaForCausalLM is none"):
        score_tasks(model, tokenizer, ["boolq"], data=tmp_path)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(UsageError, match=r"zero-shot tasks need lm-eval \(.*\): pip install 'fxprune\[eval\]'"):
        score_tasks(model, tokenizer, ["boolq"], data=tmp_path)


def test_a_damaged_model(tokenizer: Any, tmp_path: Path) -> None:
    damaged: Any = build("llama", tied=False, vocab_size=320)
    damaged.lm_head.weight.data[7] = torch.nan
    write(tmp_path, "piqa", [{"context": "a", "choices": ["b", "c"], "label": 0}])
    with pytest.raises(FxPruneError, match="the model's log-likelihoods are NaN: it is damaged"):
        score_tasks(damaged, tokenizer, ["piqa"], data=tmp_path)


def test_an_answer_without_tokens(model: nn.Module, tmp_path: Path) -> None:
    blind = words()  # words and no spaces: nothing follows the context's tokens
    write(tmp_path, "piqa", [{"context": "w1", "choices": [" ", "w2"], "label": 0}])
    with pytest.raises(UsageError, match="the tokenizer reads the answer '  ' as no tokens at all"):
        score_tasks(model, blind, ["piqa"], data=tmp_path)


def test_without_the_network_the_hub_is_refused(model: nn.Module, tokenizer: Any) -> None:
    with pytest.raises(UsageError) as refused:
        score_tasks(model, tokenizer, ["boolq"])
    assert str(refused.value).startswith("cannot load the task 'boolq' from the hub (Couldn't reach 'aps/super_glue' on the Hub")
    assert str(refused.value).endswith("; with data=DIR (--data DIR) its rows are read from DIR/boolq.jsonl.gz")


# --- real rows -------------------------------------------------------------------------------------------------------------------


def raw_of(task: str, row: Row) -> Row:
    """A row of the data's own fields as the hub's dataset has it."""
    if task == "boolq":
        return {"passage": f"{row['title']} -- {row['passage']}", "question": row["question"], "label": row["label"]}
    if task == "piqa":
        return {k: row[k] for k in ("goal", "sol1", "sol2", "label")}
    if task == "winogrande":
        return {k: row[k] for k in ("sentence", "option1", "option2")} | {"answer": str(row["label"] + 1)}
    labels = row.get("choice_labels") or list("ABCDE"[: len(row["choices"])])
    asked = {"question_stem" if task == "openbookqa" else "question": row["question"]}
    return {**asked, "choices": {"text": row["choices"], "label": labels}, "answerKey": labels[row["label"]]}


@pytest.mark.data
def test_real_rows(model: nn.Module, tokenizer: Any, corpora: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The first rows of the files against the computation by hand, and against lm-eval's definitions over the rows' raw fields."""
    directory = corpora(*(f"{task}.jsonl.gz" for task in TASKS))
    rows = {}
    for task in TASKS:
        with gzip.open(directory / f"{task}.jsonl.gz", "rt", encoding="utf-8") as file:
            rows[task] = [json.loads(next(file)) for _ in range(5)]
    ours = score_tasks(model, tokenizer, data=directory, limit=5)
    for score in ours.tasks:
        agree(score, model, tokenizer, rows[score.task])
    others = [task for task in TASKS if task != "hellaswag"]  # its raw fields are not in the file
    hub(monkeypatch, {task: [raw_of(task, row) for row in rows[task]] for task in others})
    theirs = score_tasks(model, tokenizer, others)
    mine = [replace(s, source="") for s in ours.tasks if s.task in others]
    assert mine == [replace(s, source="") for s in theirs.tasks]
