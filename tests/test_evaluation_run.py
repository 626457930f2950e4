"""The whole evaluation: LLM-Pruner's perplexity by hand, costs, one table beside the dense model's, overlap, the command."""

from __future__ import annotations

import copy
import gzip
import json
import math
import random
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from rich.console import Console
from torch import nn
from transformers import PreTrainedModel

import fxprune
from fxprune import Evaluation
from fxprune.cli import named
from fxprune.cost import costs
from fxprune.data.overlap import Sketch
from fxprune.errors import CheckpointError, UsageError
from fxprune.evaluation import TASKS, Perplexity, TaskScore, measure_cost, perplexity, token_stream
from fxprune.evaluation.contamination import find_overlaps, read_seen, warning
from fxprune.evaluation.text import text_rows
from fxprune.plan import PrunePlan

from .command import call
from .harness_rows import byte_pair_tokenizer, raw_rows, task_row, words
from .scored import made, score
from .zoo import build, tokens

LINES = ["", " = A heading = ", " ", *(words(random.Random(i), 12, 6) for i in range(40)), "\t", "the end"]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return byte_pair_tokenizer(bos=True)


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return build("llama", tied=False, vocab_size=320, max_position_embeddings=256)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    return build("llama", tied=False, vocab_size=320, max_position_embeddings=256, intermediate_size=128)


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """Two texts and the files of all tasks."""
    (tmp_path / "wikitext2.txt").write_text("\n".join(LINES) + "\n")
    with gzip.open(tmp_path / "ptb.txt.gz", "wt") as file:
        file.write("\n".join(f" {line.strip()} " for line in LINES if line.strip()))
    for task in TASKS:
        (tmp_path / f"{task}.jsonl").write_text("\n".join(json.dumps(task_row(task, raw)) for raw in raw_rows(task, 6)))
    return tmp_path


# --- perplexity ------------------------------------------------------------------------------------------------------------------


def llm_pruner(model: Any, tokenizer: Any, rows: list[str], length: int) -> tuple[float, int]:
    """LLM-Pruner's computation: rows joined by blank lines, tokenised at once, whole windows, the mean over all of their losses."""
    ids = tokenizer("\n\n".join(rows), return_tensors="pt").input_ids[0]
    losses = []
    for i in range(ids.numel() // length):
        window = ids[None, i * length : (i + 1) * length]
        with torch.no_grad():
            logits = model(window).logits
        losses.append(nn.CrossEntropyLoss(reduction="none")(logits[0, :-1], window[0, 1:]))
    flat = torch.cat(losses)
    return math.exp(flat.double().mean()), flat.numel()


@pytest.mark.parametrize("length", [16, 100])
def test_perplexity_is_llm_pruners(model: nn.Module, tokenizer: Any, files: Path, length: int) -> None:
    wikitext = [line + "\n" if line.strip() else "" for line in LINES]  # as the hub's dataset has them
    ptb = [line.strip() for line in LINES if line.strip()]
    texts: dict[str, str | Path] = {"wikitext2": files / "wikitext2.txt", "ptb": str(files / "ptb.txt.gz")}
    found = fxprune.evaluate(model, tokenizer, texts=texts, lengths=(length,), tasks=())
    for measured, name, rows in zip(found.perplexities, ("wikitext2", "ptb"), (wikitext, ptb), strict=True):
        value, count = llm_pruner(model, tokenizer, rows, length)
        assert measured.perplexity == pytest.approx(value, rel=1e-5)
        assert (measured.tokens, measured.length, measured.stride) == (count, length, length)
        assert (measured.text, measured.protocol, measured.source) == (name, "llm-pruner", Path(texts[name]).name)


def test_the_stream_protocol_is_what_fxprune_encodes(tokenizer: Any, files: Path) -> None:
    rows = text_rows(files / "wikitext2.txt", protocol="stream")
    ids = token_stream(tokenizer, rows, protocol="stream")
    joined = "\n\n".join(line for line in LINES if line.strip())
    assert ids.tolist() == tokenizer(joined, add_special_tokens=False)["input_ids"]
    whole = token_stream(tokenizer, text_rows(files / "wikitext2.txt"))
    assert whole[0] == tokenizer.bos_token_id
    assert len(whole) > len(ids) + 1


def test_rows(tmp_path: Path) -> None:
    (tmp_path / "some.txt").write_text(" a \n\n b")
    assert text_rows(tmp_path / "some.txt") == ["a", "", "b"]
    assert text_rows(tmp_path / "some.txt", name="WikiText-2") == [" a \n", "", " b\n"]
    (tmp_path / "wikitext.txt").write_text(" a \n \n")
    assert text_rows(tmp_path / "wikitext.txt") == [" a \n", ""]
    assert text_rows(tmp_path / "wikitext.txt", protocol="stream") == [" a "]
    (tmp_path / "rows.jsonl").write_text('{"text": " a\\n"}\n{"text": ""}\n')
    assert text_rows(tmp_path / "rows.jsonl", name="wikitext") == [" a\n", ""]


def test_texts_that_are_refused(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    def evaluate(name: str, **options: Any) -> None:
        fxprune.evaluate(model, tokenizer, texts={"mine": tmp_path / name}, tasks=(), **options)

    with pytest.raises(UsageError, match=r"there is no file '.*/none\.txt'"):
        evaluate("none.txt")
    for content in ("", "\n \n"):
        (tmp_path / "empty.txt").write_text(content)
        with pytest.raises(UsageError, match="the text 'mine' is empty: there is nothing to predict"):
            evaluate("empty.txt")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(UsageError, match=r"cannot read 'bad\.txt' as txt: UnicodeDecodeError: "):
        evaluate("bad.txt")
    (tmp_path / "short.txt").write_text("a")
    with pytest.raises(UsageError, match="mine: the text has 2 tokens, fewer than one window of 128"):
        evaluate("short.txt")
    with pytest.raises(UsageError, match="unknown protocol 'steam'; did you mean 'stream'"):
        evaluate("short.txt", protocol="steam")
    with pytest.raises(UsageError, match="the model reads at most 256 tokens, fewer than one window of 257"):
        evaluate("short.txt", lengths=(257,))
    with pytest.raises(UsageError, match="a perplexity needs a window length: lengths is empty"):
        evaluate("short.txt", lengths=())


# --- cost ------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2", "falcon_new", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_counted_costs_are_the_traced_ones(name: str, attention: str) -> None:
    """What torch counts in a run against what `fxprune.cost` reads from the graph, attention left out, two of four experts."""
    if name == "gpt_oss" and attention == "sdpa":
        attention = "eager"  # it has no other
    model = build(name, attention=attention)
    model.train()
    measured = measure_cost(model)
    assert model.training
    model.eval()
    groups = fxprune.find_groups(fxprune.trace(model, {"input_ids": tokens(2, 16)}))
    assert measured == costs(groups, PrunePlan({}))[0]


def test_cost_needs_a_vocabulary() -> None:
    with pytest.raises(UsageError, match="an evaluation runs on token ids, and Linear has no vocabulary"):
        measure_cost(nn.Linear(2, 2))


# --- one table -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def found(model: nn.Module, small: nn.Module, tokenizer: Any, files: Path) -> Evaluation:
    texts = {"wikitext2": files / "wikitext2.txt"}
    return fxprune.evaluate(small, tokenizer, texts=texts, lengths=(16, 32), data=files, limit=5, latency=True, dense=model)


def test_all_beside_the_dense_model(found: Evaluation, model: nn.Module, small: nn.Module, tokenizer: Any, files: Path) -> None:
    dense = found.dense
    assert dense is not None
    assert dense.dense is None
    assert [t.task for t in found.tasks] == list(TASKS)
    assert {t.rows for t in found.tasks} == {5}
    lines = {line.key: line for line in found.measures()}
    before, after = (sum(p.numel() for p in m.parameters()) for m in (model, small))
    assert lines["parameters"].kept == pytest.approx(after / before)
    assert (lines["parameters"].text, lines["parameters"].dense) == (f"{after:,}", f"{before:,}")
    assert lines["bytes"].value == 4 * after
    assert lines["macs"].value == after - 320 * 48 - 5 * 48  # all but the embedding and the norms
    ids = token_stream(tokenizer, text_rows(files / "wikitext2.txt"))
    for length in (16, 32):
        values = [perplexity(m, ids, length=length).perplexity for m in (small, model)]
        assert lines[f"perplexity/wikitext2/{length}"].value == pytest.approx(values[0])
        assert lines[f"perplexity/wikitext2/{length}"].kept == pytest.approx(values[0] / values[1])
    for key in ("prefill_ms", "decode_ms"):
        assert lines[key].value > 0
    scores = [t.acc_norm if t.task in ("hellaswag", "arc_challenge", "openbookqa") else t.acc for t in found.tasks]
    average = sum(cast(list[float], scores)) / 7
    chance = sum(t.chance for t in found.tasks) / 7
    assert found.average == lines["average"].value == pytest.approx(average)
    assert found.above_chance == lines["above_chance"].value == pytest.approx(average - chance)
    assert {t.task: t.chance for t in found.tasks}["boolq"] == 0.5


def test_the_json_says_it_all(found: Evaluation) -> None:
    data = json.loads(json.dumps(found.to_json()))
    assert data["fxprune_evaluation"] == 1
    assert data["settings"]["limit"] == 5
    assert data["settings"]["protocol"] == "llm-pruner"
    assert data["settings"]["special_tokens"] is True
    assert data["settings"]["harness"].startswith("lm-eval 0.")
    assert [Perplexity(**p) for p in data["perplexities"]] == list(found.perplexities)
    assert [TaskScore(**t) for t in data["tasks"]] == list(found.tasks)
    assert data["kept"]["parameters"] == pytest.approx(data["cost"]["parameters"] / data["dense"]["cost"]["parameters"])
    assert set(data["kept"]) == {line.key for line in found.measures()}
    assert data["dense"]["kept"] is None
    assert data["versions"]["torch"] == torch.__version__
    assert data["latency"]["prompt"] == 128


def test_the_share_that_is_kept() -> None:
    dense = made(score("arc_challenge", 0.3, 0.45), score("boolq", 0.75, chance=0.5))
    pruned = made(score("arc_challenge", 0.3, 0.35), score("boolq", 0.65, chance=0.5)).against(dense)
    kept = pruned.to_json()["kept"]
    assert kept["average"] == pytest.approx(0.5 / 0.6)
    assert kept["above_chance"] == pytest.approx((0.5 - 0.375) / (0.6 - 0.375))
    assert kept["arc_challenge/acc"] == 1
    assert kept["boolq/acc"] == pytest.approx(0.65 / 0.75)
    by_chance = made(score("boolq", 0.5, chance=0.5))
    assert made(score("boolq", 0.6, chance=0.5)).against(by_chance).to_json()["kept"]["above_chance"] is None
    assert (made().average, made().above_chance) == (None, None)


def test_one_answer_to_every_row_is_what_a_score_is_held_against() -> None:
    dense, weak = made(score("boolq", 0.7, constant=0.62)), made(score("boolq", 0.62, constant=0.62))
    start = "boolq: one answer given to every row scores 62.0%"
    assert start in dense.notes()
    assert f"{start}; this model scores no better" in weak.notes()
    assert f"{start}; this model scores no better" in weak.against(dense).notes()
    assert f"{start}; the dense model scores no better" in dense.against(weak).notes()
    assert f"{start}; this model and the dense model score no better" in weak.against(weak).notes()
    assert not any("one answer" in note for note in made(score("piqa", 0.5)).notes())


def test_what_was_measured_otherwise_is_not_compared() -> None:
    with pytest.raises(UsageError, match="the dense model was measured otherwise: limit 100, here 20"):
        made(limit=20).against(made(limit=100))


def test_the_table_in_markdown_and_on_a_terminal(found: Evaluation) -> None:
    text = found.markdown()
    assert text.startswith("|  | dense | this model | of dense |\n")
    rows = {line.split(" | ")[0].strip("| "): line for line in text.splitlines() if line.startswith("| ")}
    assert "boolq acc (%) *" in rows
    assert "arc_easy acc (%) *" in rows
    assert "arc_easy acc_norm (%)" in rows
    assert "hellaswag acc_norm (%) *" in rows
    assert "average above chance (%)" in rows
    assert "MACs per token" in rows
    assert "the average is of acc of boolq, piqa, winogrande, arc_easy and acc_norm of hellaswag, arc_challenge, openbookqa" in text
    assert "with a special token before each prompt: boolq 5 rows of boolq.jsonl, chance 50.0%; piqa" in text
    assert ", rows by protocol llm-pruner, on wikitext2: " in text
    assert " windows of 32, stride 32" in text
    console = Console(file=StringIO(), width=160)
    console.print(found.table())
    shown = cast(StringIO, console.file).getvalue()
    assert all(label in shown for label in rows if label and label != "---")
    alone = made(score("boolq", 0.5), harness="lm-eval 1").markdown()
    assert alone.startswith("|  | value |\n")
    assert "| boolq acc (%) * | 50.0 ± 1.0 |" in alone
    assert "zero-shot by lm-eval 1, without a special token" in alone


def test_where_and_in_what_it_was_measured(model: nn.Module, tokenizer: Any) -> None:
    half = fxprune.evaluate(copy.deepcopy(model).bfloat16(), tokenizer, tasks=(), latency=True)
    assert (half.versions["dtype"], half.versions["device"]) == ("bfloat16", "cpu")
    with pytest.raises(UsageError, match="weights of this LlamaForCausalLM are on the meta device, or offloaded: load it whole"):
        fxprune.evaluate(copy.deepcopy(model).to("meta"), tokenizer, tasks=(), latency=True)


def test_an_earlier_evaluation_serves_as_dense(model: nn.Module, small: nn.Module, tokenizer: Any, files: Path) -> None:
    seen: list[str] = []
    options: dict[str, Any] = {"texts": {"ptb": files / "ptb.txt.gz"}, "lengths": (16, 16), "tasks": ["piqa"], "data": files}
    earlier = fxprune.evaluate(model, tokenizer, **options)
    found = fxprune.evaluate(small, tokenizer, **options, dense=earlier, progress=lambda what, *_: seen.append(what))
    assert found.dense == earlier
    assert len(found.perplexities) == 1
    assert list(dict.fromkeys(seen)) == ["perplexity ptb, 16", "zero-shot requests"]


def test_arguments_that_are_refused(model: nn.Module, tokenizer: Any, files: Path) -> None:
    with pytest.raises(UsageError, match="unknown task 'bolq'; did you mean 'boolq'"):
        fxprune.evaluate(model, tokenizer, tasks=["bolq"])
    with pytest.raises(UsageError, match="texts and tasks need a tokenizer: pass tokenizer="):
        fxprune.evaluate(model, tasks=["boolq"], data=files)
    with pytest.raises(UsageError, match="limit must be a whole number of at least 1, got 0"):
        fxprune.evaluate(model, tokenizer, data=files, limit=0)
    with pytest.raises(UsageError, match="an evaluation runs on token ids, and Linear has no vocabulary"):
        fxprune.evaluate(nn.Linear(2, 2), tasks=())
    (files / "piqa.jsonl").unlink()
    with pytest.raises(UsageError, match=r"there is no piqa\.jsonl\.gz \(nor piqa\.jsonl\) in "):
        fxprune.evaluate(model, tokenizer, data=files)


# --- what was seen before --------------------------------------------------------------------------------------------------------


def prose(seed: int, lines: int = 400) -> list[str]:
    """Lines of words that hardly repeat."""
    chosen = random.Random(seed)
    return [" ".join(f"w{chosen.randrange(10_000)}" for _ in range(20)) for _ in range(lines)]


def entry(rows: list[str], use: str = "recovery", name: str = "alpaca.jsonl") -> dict[str, Any]:
    return {"use": use, "name": name, "sketch": Sketch(rows).to_json()}


def test_overlap_is_found_from_both_sides() -> None:
    text = prose(0)
    assert find_overlaps({"text": text}, [entry(prose(1))]) == ()
    assert find_overlaps({"text": text}, []) == ()
    few = [*prose(1, 4000), *text[:80]]  # a fifth of the text, and 2 % of the training data
    (found,) = find_overlaps({"other": prose(2), "text": text}, [entry(few), entry(prose(3), "calibration")])
    assert (found["text"], found["use"], found["name"], found["words"]) == ("text", "recovery", "alpaca.jsonl", 13)
    assert found["of_text"] == pytest.approx(0.2, abs=0.06)
    (found,) = find_overlaps({"text": text}, [entry(text[:3], "calibration")])  # little of the text, all of what was seen
    assert found["of_text"] < 0.01
    assert found["of_data"] == 1
    assert warning(found) == (
        f"WARNING: the evaluation text 'text' was seen in calibration (data 'alpaca.jsonl'): {found['of_text']:.1%} of the text's "
        "13-word sequences are in the data, 100.0% of the data's in the text; a score on it says little about other text"
    )
    with pytest.raises(UsageError, match="the recovery data 'x': this is no sketch of a text: KeyError: 'limit'"):
        find_overlaps({"text": text}, [{"use": "recovery", "name": "x", "sketch": {}}])


def test_what_a_report_says_was_seen(tmp_path: Path) -> None:
    assert read_seen(tmp_path) == read_seen(tmp_path / "nowhere") == []
    report = tmp_path / "fxprune_report.json"
    report.write_text("{}")
    assert read_seen(tmp_path) == []
    own = {"use": "calibration", "name": "sampled from the model"}
    report.write_text(json.dumps({"data": [own, entry(["a b"])]}))
    assert read_seen(tmp_path) == [{**own, "sketch": None}, entry(["a b"])]
    assert find_overlaps({"text": prose(0)}, [{**own, "sketch": None}]) == ()
    for damaged in ("{", '{"data": [{"use": "recovery"}]}', "[]", '{"data": 3}'):
        report.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"cannot read what '.*fxprune_report\.json' says of its data: "):
            read_seen(tmp_path)


def test_overlap_with_texts_and_tasks_is_in_the_evaluation(model: nn.Module, tokenizer: Any, tmp_path: Path) -> None:
    text, asked = prose(0, 40), prose(1, 20)
    (tmp_path / "ptb.txt").write_text("\n".join(text))
    (tmp_path / "piqa.jsonl").write_text("\n".join(json.dumps({"context": c, "choices": ["a", "b"], "label": 0}) for c in asked))
    options: dict[str, Any] = {"texts": {"ptb": tmp_path / "ptb.txt"}, "lengths": (16,), "tasks": ["piqa"], "data": tmp_path}
    found = fxprune.evaluate(model, tokenizer, **options, seen=[entry([*text, *asked])])
    assert [o["text"] for o in found.overlaps] == ["ptb", "piqa"]
    assert found.to_json()["overlaps"][0]["of_text"] == 1
    beside = fxprune.evaluate(model, tokenizer, **options, seen=[entry(text)], dense=model)
    assert beside.dense is not None
    assert (len(beside.overlaps), beside.dense.overlaps) == (1, ())
    assert found.notes()[0].startswith(
        "WARNING: the evaluation text 'ptb' was seen in recovery (data 'alpaca.jsonl'): 100.0% of the text's "
    )
    assert fxprune.evaluate(model, tokenizer, **options, seen=[entry(prose(5))]).overlaps == ()


# --- the command -----------------------------------------------------------------------------------------------------------------

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(
    model: nn.Module,
    small: nn.Module,
    tokenizer: Any,
    files: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> Run:
    for name, saved in (("dense", model), ("small", small)):
        cast(PreTrainedModel, saved).save_pretrained(files / name)
        tokenizer.save_pretrained(files / name)
    monkeypatch.chdir(files)

    def command(*arguments: str) -> tuple[int, str, str]:
        ran = call(capsys, "eval", *arguments)
        return ran.status, ran.out, ran.said

    return command


TEXTS = ("--texts", "wikitext2=wikitext2.txt,ptb=ptb.txt.gz", "--length", "16", "--length", "32")


def test_the_command_prints_one_table(run: Run, files: Path) -> None:
    status, out, err = run("small", "--dense", "dense", *TEXTS, "--tasks", "all", "--data", ".", "--limit", "4", "-o", "out.md")
    assert (status, err) == (0, "")
    assert out.startswith("|  | dense | this model | of dense |\n| --- | ---: | ---: | ---: |\n| parameters | ")
    assert out.count("\n| perplexity, ") == 4
    assert "boolq 4 rows of boolq.jsonl" in out
    assert (files / "out.md").read_text() == out
    assert not list(files.glob(".out*"))


def test_the_command_in_json(run: Run, files: Path) -> None:
    (files / "small" / "fxprune_report.json").write_text(json.dumps({"data": [entry(LINES)]}))
    options = (*TEXTS[:4], "--tasks", "piqa,boolq", "--data", ".", "--latency", "--protocol", "stream", "--stride", "8")
    status, out, err = run("small", *options, "--max-windows", "3", "--batch-size", "2", "--json", "-o", "out.json")
    assert status == 0
    told = json.loads(out)
    assert json.loads((files / "out.json").read_text()) == told
    assert [t["task"] for t in told["tasks"]] == ["piqa", "boolq"]
    assert [(p["protocol"], p["windows"], p["stride"]) for p in told["perplexities"]] == [("stream", 3, 8)] * 2
    assert told["latency"]["prompt"] == 128
    assert told["dense"] is told["kept"] is None
    assert {o["text"] for o in told["overlaps"]} == {"wikitext2", "ptb"}
    assert "WARNING: the evaluation text 'ptb' was seen in recovery (data 'alpaca.jsonl'): " in err


def test_one_text_is_told_in_a_line(run: Run) -> None:
    status, out, _ = run("small", "--text", "ptb.txt.gz", "--length", "16", "--length", "32")
    lines = out.split("\n\n") if "\n\n" in out else out.splitlines()
    assert status == 0
    assert len(lines) == 2
    assert all(line.startswith("perplexity ") and "rows by protocol llm-pruner, on ptb.txt.gz: " in line for line in lines)
    told = json.loads(run("small", "--text", "ptb.txt.gz", "--length", "16", "--json")[1])
    assert told["perplexity"] == told["perplexities"][0]
    assert told["cost"]["parameters"] > 0


def test_latency_alone(run: Run) -> None:
    status, out, _ = run("small", "--latency")
    assert status == 0
    assert "| prefill of 128 tokens (ms) | " in out


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (("small",), 2, "say what to measure: one or more of --text FILE, --texts NAME=FILE, --tasks"),
        (("small", "--tasks", "boolq,pica"), 2, "unknown task 'pica'; did you mean 'piqa'"),
        (("small", "--tasks", "all", "--data", "none"), 2, "there is no directory 'none' with task files"),
        (("small", "--tasks", "all", "--data", "small"), 2, "there is no boolq.jsonl.gz (nor boolq.jsonl) in 'small'"),
        (("small", "--tasks", "all", "--data", ".", "--limit", "0"), 2, "limit must be a whole number of at least 1, got 0"),
        (("small", "--text", "ptb.txt.gz", "--data", "."), 2, "--data names a directory of task files: say --tasks all"),
        (("small", "--text", "ptb.txt.gz", "--protocol", "gptq"), 2, "unknown protocol 'gptq'; choose from: llm-pruner, stream"),
        (("small", "--latency", "--batch-size", "4"), 2, "--batch-size is of texts and tasks: latency is measured one sequence at"),
        (("small", "--latency", "--protocol", "stream"), 2, "--protocol is of a perplexity: name a text with --text FILE"),
        (("small", "--texts", "ptb"), 2, "'ptb' is not of the form name=FILE,name=FILE with a different name for each"),
        (("small", "--texts", "ptb=none.txt"), 2, "there is no file 'none.txt'"),
        (("small", *TEXTS, "-o", "out.csv"), 2, "cannot write an evaluation as 'out.csv': its name must end in one of .json, .md"),
        (("small", *TEXTS, "-o", "none/out.md"), 2, "there is no directory 'none' to write 'out.md' to"),
        (("small", *TEXTS, "-o", "dir.md"), 2, "'dir.md' is a directory; name a file"),
        (("small", *TEXTS, "--dense", "./none"), 2, "there is no directory './none'"),
        (("small", *TEXTS, "--dense", "none.gguf"), 2, "there is no file 'none.gguf'"),
        (("damaged", *TEXTS), 1, "cannot read what 'damaged/fxprune_report.json' says of its data: JSONDecodeError: "),
    ],
)
def test_what_the_command_refuses(
    run: Run, files: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], status: int, message: str
) -> None:
    """Before the model is loaded."""
    (files / "dir.md").mkdir()
    (files / "damaged").mkdir()
    (files / "damaged" / "fxprune_report.json").write_text("{")
    monkeypatch.setattr("fxprune.commands.common.load_source", lambda *_, **__: pytest.fail("a model was loaded"))
    ended, out, err = run(*arguments)
    assert (ended, out) == (status, "")
    assert message in err


def test_a_disk_that_fails_leaves_nothing(run: Run, files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fxprune.files.os.fsync", full)
    status, _, err = run("small", "--latency", "-o", "out.md")
    assert (status, err) == (2, "fxprune: cannot write 'out.md': No space left on device")
    assert not list(files.glob("*out.md*"))


def test_names_of_texts() -> None:
    assert named("a=b.txt, c = x:y=z") == {"a": "b.txt", "c": "x:y=z"}
