"""Examples: against LLM-Pruner's own tokenisation of Alpaca, cutting, mixtures, what is left out, and the same in every process."""

from __future__ import annotations

import collections
import gzip
import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.data import Examples, Source, load_examples, render
from fxprune.data.examples import IGNORED
from fxprune.errors import UsageError

EOS, BOS = 257, 256


def letters(*, start: bool = True, end: bool = True, merged: tuple[str, ...] = ()) -> Any:
    """A tokenizer with one token for each byte, and for each pair of bytes in ``merged``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {c: i for i, c in enumerate(alphabet)} | {"<s>": BOS, "</s>": EOS}
    vocabulary |= {pair: 258 + i for i, pair in enumerate(merged)}
    made = Tokenizer(models.BPE(vocab=vocabulary, merges=[(p[0], p[1]) for p in merged]))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    names = {"bos_token": "<s>"} if start else {}
    if end:
        names["eos_token"] = "</s>"
    if start:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=made, **names)


def write(path: Path, rows: list[Any]) -> str:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def ids_of(examples: Examples) -> list[list[int]]:
    return [examples[i][0].tolist() for i in range(len(examples))]


def in_order(examples: Examples) -> list[list[int]]:
    return sorted(ids_of(examples))


def error(sources: Any, tokenizer: Any = None, **options: Any) -> str:
    with pytest.raises(UsageError) as raised:
        load_examples(sources, tokenizer or letters(), **options)
    return str(raised.value)


ALPACA = [{"instruction": "Add.", "input": "2 3" * i, "output": "five" * (20 * i % 37 + 1)} for i in range(12)] + [
    {"instruction": "Sing" * 40, "input": "", "output": "La"},
    {"instruction": "Count", "input": "", "output": "one " * 60},
]


def llm_pruner(row: dict[str, str], tokenizer: Any, cutoff: int, train_on_inputs: bool) -> tuple[list[int], list[int]]:
    """(ids, labels) by ``tokenize`` and ``generate_and_tokenize_prompt`` of LLM-Pruner's ``post_training.py``, line for line."""

    def tokenize(prompt: str, add_eos_token: bool = True) -> dict[str, list[int]]:
        result = tokenizer(prompt, truncation=True, max_length=cutoff, padding=False)
        if result["input_ids"][-1] != tokenizer.eos_token_id and len(result["input_ids"]) < cutoff and add_eos_token:
            result["input_ids"].append(tokenizer.eos_token_id)
        return {"input_ids": result["input_ids"], "labels": result["input_ids"].copy()}

    example = render(row, Source("set"))
    full = tokenize(example.prompt + example.completion)
    if not train_on_inputs:
        length = len(tokenize(example.prompt, add_eos_token=False)["input_ids"])
        full["labels"] = [-100] * length + full["labels"][length:]
    return full["input_ids"], full["labels"]


@pytest.mark.parametrize("start", [False, True])
@pytest.mark.parametrize("completion_only", [False, True])
@pytest.mark.parametrize("cutoff", [200, 256, 300])
def test_alpaca_is_tokenised_as_llm_pruner_does(tmp_path: Path, completion_only: bool, cutoff: int, start: bool) -> None:
    tokenizer = letters(start=start)
    examples = load_examples(write(tmp_path / "a.jsonl", ALPACA), tokenizer, cutoff=cutoff, completion_only=completion_only)
    expected = [llm_pruner(row, tokenizer, cutoff, not completion_only) for row in ALPACA]
    expected = [(ids, labels) for ids, labels in expected if any(label != -100 for label in labels)]
    assert {len(ids) < cutoff for ids, _ in expected} == {False, True}
    for _, labels in expected:
        labels[0] = -100  # nothing comes before it: transformers' loss does not look at it
    found = [(ids.tolist(), labels.tolist()) for ids, labels in (examples[i] for i in range(len(examples)))]
    assert sorted(found) == sorted(expected)
    assert len(found) == (len(ALPACA) if not completion_only else sum(1 for _ in expected))


def test_a_token_across_the_boundary_is_learned(tmp_path: Path) -> None:
    row = {"instruction": "Sing.", "output": "\nLa"}
    tokenizer = letters(start=False, merged=("ĊĊ",))
    ids, labels = load_examples(write(tmp_path / "a.jsonl", [row]), tokenizer, completion_only=True)[0]
    prompt = render(row, Source("set")).prompt
    assert tokenizer.decode(ids[labels != -100]) == "\n\nLa</s>"
    assert tokenizer.decode(ids[labels == -100]) + "\n" == prompt


def test_chats_keep_the_marks_of_their_template(tmp_path: Path) -> None:
    """No second end token where the template wrote one, and no second start token."""
    row = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]}
    path = write(tmp_path / "a.jsonl", [row])
    tokenizer = letters()
    body = "{% for m in messages %}{{ m['role'] }}:{{ m['content'] }}END\n{% endfor %}"
    body += "{% if add_generation_prompt %}assistant:{% endif %}"
    for start, end, text, learned in (
        ("", "", "<s>user:Hi\nassistant:Ho\n</s>", "Ho\n</s>"),
        ("<s>", "</s>", "<s>user:Hi</s>\nassistant:Ho</s>\n", "Ho</s>\n"),
    ):
        tokenizer.chat_template = start + body.replace("END", end)
        ids, labels = load_examples(path, tokenizer, completion_only=True)[0]
        assert tokenizer.decode(ids) == text
        assert tokenizer.decode(ids[labels != -100]) == learned


def test_long_documents_are_cut(tmp_path: Path) -> None:
    tokenizer = letters()
    text = "".join(chr(97 + i % 26) for i in range(23))
    path = write(tmp_path / "a.jsonl", [{"text": text}])
    whole = [BOS, *tokenizer(text, add_special_tokens=False)["input_ids"], EOS]
    assert len(whole) == 25
    found = ids_of(load_examples(path, tokenizer, cutoff=10))
    assert sorted(map(len, found)) == [5, 10, 10]
    assert sorted(found) == sorted([whole[:10], whole[10:20], whole[20:]])
    assert sorted(ids_of(load_examples(path, tokenizer, cutoff=12))) == sorted([whole[:12], whole[12:24]])  # EOS alone is nothing
    assert ids_of(load_examples(path, tokenizer, cutoff=25)) == [whole]
    assert ids_of(load_examples(path, letters(start=False, end=False))) == [whole[1:-1]]


def test_lines_of_a_text_file_are_running_text(tmp_path: Path) -> None:
    """No token is lost between pieces or between chunks of lines; one start and one end."""
    lines = [f"line {i} é" for i in range(700)]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress("\n".join([*lines[:5], "", " ", *lines[5:]]).encode()))
    tokenizer = letters()
    whole = [BOS, *tokenizer("\n\n".join(lines), add_special_tokens=False)["input_ids"], EOS]
    examples = load_examples(path, tokenizer, cutoff=64)
    assert in_order(examples) == sorted(whole[i : i + 64] for i in range(0, len(whole), 64))
    assert ids_of(examples) != [whole[i : i + 64] for i in range(0, len(whole), 64)]  # shuffled
    assert examples.tokens == len(whole)


def test_rows_without_text_are_left_out_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [*ALPACA[:5], {"instruction": "x", "input": "", "output": ""}, {"instruction": "x", "output": " \n"}]
    path = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.INFO, "fxprune"):
        assert len(load_examples(path, letters(), cutoff=300)) == 5
    assert caplog.messages == ["a.jsonl: 5 examples taken, 7 rows read, 2 without text to learn"]
    assert len(load_examples(path, letters(), cutoff=300, skip_empty=False)) == 7
    long = write(tmp_path / "b.jsonl", ALPACA)
    caplog.clear()
    with caplog.at_level(logging.INFO, "fxprune"):
        few = load_examples(long, letters(), cutoff=172, completion_only=True)
    rest = len(ALPACA) - len(few)
    told = f"{len(ALPACA)} rows read, {rest} with nothing to learn within 172 tokens"
    assert caplog.messages == [f"b.jsonl: {len(few)} examples taken, {told}"]
    assert 0 < len(few) < len(ALPACA)


@pytest.mark.parametrize(
    ("content", "options", "text"),
    [
        ("", {}, "'a.jsonl' is empty: it has no rows"),
        ("\n \n", {}, "'a.jsonl' is empty: it has no rows"),
        ('{"text": ""}\n{"text": null}', {}, "'a.jsonl' has nothing to learn from: 2 rows read, 2 without text to learn"),
        (
            '{"instruction": "a", "output": "b"}\n{"instruction": "a", "output": ""}',
            {"completion_only": True, "cutoff": 9},
            "'a.jsonl' has nothing to learn from: 2 rows read, 1 without text to learn and 1 with nothing to learn within 9 tokens",
        ),
        (
            '{"title": "b", "body": "c"}',
            {},
            (
                "'a.jsonl' has no column of text; it has title, body, wanted text, content or document; "
                "instruction and output; prompt and completion; or turns in messages or conversations; rename them, or name one as "
                "a.jsonl[column]"
            ),
        ),
        (
            '{"text": "a"}',
            {"cutoff": 1},
            "examples need a cutoff of at least 2 tokens and at least 1 sample, got cutoff=1, samples=None",
        ),
        (
            '{"text": "a"}',
            {"samples": 0},
            "examples need a cutoff of at least 2 tokens and at least 1 sample, got cutoff=256, samples=0",
        ),
    ],
)
def test_nothing_to_learn(tmp_path: Path, content: str, options: dict[str, Any], text: str) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    assert error(str(tmp_path / "a.jsonl"), **options) == text


def test_an_empty_source_of_a_mixture_is_told(tmp_path: Path) -> None:
    full = write(tmp_path / "full.jsonl", [{"text": "word"}] * 9)
    (tmp_path / "none.txt").write_text(" \n")
    assert error(f"{full}=9,{tmp_path / 'none.txt'}=1") == "'none.txt' is empty: it has no rows"


def mixture(tmp_path: Path, counts: dict[str, int]) -> dict[str, str]:
    return {name: write(tmp_path / f"{name}.jsonl", [{"text": f"{name}{i}"} for i in range(n)]) for name, n in counts.items()}


def test_mixtures_keep_their_proportions_all_the_way(tmp_path: Path) -> None:
    paths = mixture(tmp_path, {"a": 700, "b": 700, "c": 700})
    shares = {"a": 0.5, "b": 0.3, "c": 0.2}
    examples = load_examples({paths[n]: 7 * share for n, share in shares.items()}, letters(), samples=500)
    assert examples.names == ("a.jsonl", "b.jsonl", "c.jsonl")
    assert examples.source.bincount().tolist() == [250, 150, 100]
    for n in range(1, 501):
        for taken, share in zip(examples.source[:n].bincount(minlength=3).tolist(), shares.values(), strict=True):
            assert abs(taken - n * share) <= 1
    tokenizer = letters()
    assert all(tokenizer.decode(ids)[3] == "abc"[s] for ids, s in zip(ids_of(examples), examples.source.tolist(), strict=True))
    assert len({tuple(ids) for ids in ids_of(examples)}) == 500  # nothing twice


def test_a_mixture_ends_with_the_first_source_that_ends(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    paths = mixture(tmp_path, {"a": 10, "b": 300})
    assert load_examples({paths["a"]: 1, paths["b"]: 4}, letters()).source.bincount().tolist()[0] == 10
    assert 40 <= len(load_examples({paths["a"]: 1, paths["b"]: 4}, letters())) - 10 <= 44
    told = (
        "'a.jsonl' has no more examples, and the mixture ends with it: the rest of 'b.jsonl' is not read; to read more, give the "
        "sources weights by their sizes"
    )
    assert caplog.messages == [told, told]
    caplog.clear()
    load_examples({paths["a"]: 1, paths["b"]: 28}, letters())  # all but a few are read
    load_examples({paths["a"]: 1, paths["b"]: 4}, letters(), samples=20)  # it ends where it was told to
    assert not caplog.messages
    load_examples(paths["a"], letters(), samples=11)
    assert caplog.messages == ["a.jsonl has only 10 examples: 10 are taken of the 11 asked for"]


def test_shuffling_is_seeded_and_grows(tmp_path: Path) -> None:
    path = mixture(tmp_path, {"a": 900})["a"]
    all_of_them = ids_of(load_examples(path, letters(), cutoff=16))
    assert ids_of(load_examples(path, letters(), cutoff=16)) == all_of_them
    assert ids_of(load_examples(path, letters(), cutoff=16, samples=50)) == all_of_them[:50]
    other = ids_of(load_examples(path, letters(), cutoff=16, seed=1))
    assert other != all_of_them
    assert sorted(other) == sorted(all_of_them)


def test_a_long_stream_is_shuffled_within_a_buffer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxprune.data.examples.SHUFFLED_TOKENS", 300 * 16)
    path = write(tmp_path / "a.jsonl", [{"text": f"{i:04}"} for i in range(1000)])
    tokenizer = letters()
    order = [int(tokenizer.decode(ids, skip_special_tokens=True)) for ids in ids_of(load_examples(path, tokenizer, cutoff=16))]
    assert sorted(order) == list(range(1000))
    assert all(number < place + 300 for place, number in enumerate(order))
    assert sum(a < b for a, b in pairwise(order)) < 600  # a run in order has 999


def test_progress_is_told(tmp_path: Path) -> None:
    told: list[Any] = []
    path = mixture(tmp_path, {"a": 900})["a"]
    load_examples(path, letters(), samples=600, progress=lambda *what: told.append(what))
    assert told == [("reading examples", 256, 600), ("reading examples", 512, 600)]


def test_what_examples_are(tmp_path: Path) -> None:
    examples = load_examples(write(tmp_path / "a.jsonl", ALPACA), letters(), cutoff=300, completion_only=True)
    assert (examples.ids.dtype, examples.starts.dtype) == (torch.int32, torch.int64)
    assert examples.tokens == int(examples.starts[-1]) == sum(map(len, ids_of(examples)))
    assert examples[-1][0].tolist() == examples[len(examples) - 1][0].tolist()
    assert [len(ids) for ids in ids_of(examples)] == examples.lengths.tolist()
    with pytest.raises(IndexError, match=f"example {len(examples)} of {len(examples)}"):
        examples[len(examples)]
    prints = {
        examples.fingerprint,
        load_examples(tmp_path / "a.jsonl", letters(), cutoff=300).fingerprint,
        load_examples(tmp_path / "a.jsonl", letters(), cutoff=299, completion_only=True).fingerprint,
        load_examples(tmp_path / "a.jsonl", letters(), cutoff=300, completion_only=True, seed=1).fingerprint,
    }
    assert len(prints) == 4


def test_ready_ids() -> None:
    made = Examples.of_ids([[5, 6, 7], torch.tensor([8, 9])], "mine")
    assert [(ids.tolist(), labels.tolist()) for ids, labels in (made[0], made[1])] == [
        ([5, 6, 7], [IGNORED, 6, 7]),
        ([8, 9], [IGNORED, 9]),
    ]
    assert (made.names, made.ids.dtype, made.tokens) == (("mine",), torch.int32, 5)
    assert made.fingerprint == Examples.of_ids(torch.tensor(row) for row in ([5, 6, 7], [8, 9])).fingerprint
    assert made.fingerprint != Examples.of_ids([[5, 6], [7, 8, 9]]).fingerprint


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "'mine' is empty: it has no rows"),
        ([[1, 2], [3]], "row 1 of 'mine' is no list of at least two token ids"),
        ([[1.5, 2.5]], "row 0 of 'mine' is no list"),
        ([[[1, 2], [3, 4]]], "row 0 of 'mine' is no list"),
    ],
)
def test_what_are_no_ids(rows: list[Any], said: str) -> None:
    with pytest.raises(UsageError, match=re.escape(said)):
        Examples.of_ids(rows, "mine")


def test_split(tmp_path: Path) -> None:
    paths = mixture(tmp_path, {"a": 60, "b": 60})
    examples = load_examples(list(paths.values()), letters())
    train, validation = examples.split(20, seed=3)
    assert (len(train), len(validation)) == (len(examples) - 20, 20)
    assert collections.Counter(map(tuple, ids_of(train) + ids_of(validation))) == collections.Counter(map(tuple, ids_of(examples)))
    for part in (train, validation):  # each with its own source, in the old order
        where = [ids_of(examples).index(ids) for ids in ids_of(part)]
        assert where == sorted(where)
        assert part.source.tolist() == examples.source[where].tolist()
    again, other = examples.split(20, seed=3)[1], examples.split(20, seed=4)[1]
    assert again.fingerprint == validation.fingerprint != other.fingerprint
    everything, nothing = examples.split(0)
    assert (everything.fingerprint, len(nothing), nothing.tokens) == (examples.fingerprint, 0, 0)
    for count in (-1, len(examples)):
        with pytest.raises(UsageError) as raised:
            examples.split(count)
        n = len(examples)
        assert str(raised.value) == f"validation takes between 0 and {n - 1} of the {n} examples, got {count}"


def test_the_same_in_every_process(tmp_path: Path) -> None:
    paths = mixture(tmp_path, {"a": 300, "b": 300})
    given = f"{paths['a']}=2,{paths['b']}=1"
    code = (
        "import sys; from tests.test_data_examples import letters; from fxprune.data import *;"
        "e = load_examples(sys.argv[1], letters(), samples=200, cutoff=8); b = Batches(e.split(20, 5)[0], batch_size=4, length=16,"
        "packing=True, pad_id=0, seed=7, weights={'a.jsonl': 1, 'b.jsonl': 3});"
        "print(e.fingerprint, b.epoch(3)); print(Sketch(f'word{i} ' * 20 for i in range(200)).to_json()['ngrams'])"
    )
    printed = set()
    for seed in ("0", "1"):
        done = subprocess.run(
            [sys.executable, "-c", code, given],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        printed.add(done.stdout)
    assert len(printed) == 1
    assert load_examples(given, letters(), samples=200, cutoff=8).fingerprint in printed.pop()


@pytest.mark.slow
@pytest.mark.data
def test_the_whole_of_alpaca(corpora: Callable[..., Path]) -> None:
    examples = load_examples(corpora("alpaca.jsonl.gz") / "alpaca.jsonl.gz", letters(), cutoff=256)
    assert len(examples) == 52002 - 28
