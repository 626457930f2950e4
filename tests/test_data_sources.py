"""Sources: how they are written, read from files and from datasets, and what a damaged or wrong one says; no network."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from fxprune.data import Source, documents, load_examples, parse_sources, rows, texts
from fxprune.data.sources import by_name, json_lines, text_lines
from fxprune.errors import UsageError

from .zoo import tokenizer


def error(call: Any, *args: Any, **kwargs: Any) -> str:
    with pytest.raises(UsageError) as raised:
        list(call(*args, **kwargs))
    return str(raised.value)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("a.jsonl", [("a.jsonl", 1.0, None)]),
        ("a.jsonl=0.7, b.txt=0.3", [("a.jsonl", 0.7, None), ("b.txt", 0.3, None)]),
        ("b.csv[body]", [("b.csv", 1.0, "body")]),
        ("owner/set:raw:test[the text]=2,c", [("owner/set:raw:test", 2.0, "the text"), ("c", 1.0, None)]),
        (Path("x/a.txt"), [("x/a.txt", 1.0, None)]),
        (["a=3", Source("b", 2, template="chat")], [("a", 3.0, None), ("b", 2, None)]),
        (Source("b"), [("b", 1.0, None)]),
        ({"a": 3, "b[x]": 1}, [("a", 3, None), ("b", 1, "x")]),
    ],
)
def test_how_sources_are_written(given: Any, expected: list[Any]) -> None:
    assert [(s.name, s.weight, s.column) for s in parse_sources(given)] == expected


def test_a_file_may_be_called_anything(tmp_path: Path) -> None:
    path = tmp_path / "a=1,b[2].txt"
    path.write_text("words")
    assert [s.name for s in parse_sources(str(path))] == [str(path)]
    assert list(texts(parse_sources(path)[0])) == ["words"]


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ("a=0", "the weight of 'a' must be a positive number, got 0.0"),
        ("a=-1", "the weight of 'a' must be a positive number, got -1.0"),
        ("a=nan", "the weight of 'a' must be a positive number, got nan"),
        ({"a": float("inf")}, "the weight of 'a' must be a positive number, got inf"),
        ({"a": "2"}, "the weight of 'a' must be a positive number, got 2"),
        ("a=much", "the weight of 'a' must be a positive number, got 'much'"),
        ("a,,b", "cannot read '' as a source of text: write name, name[column] or name=weight"),
        ("a[x]b", "cannot read 'a[x]b' as a source of text: write name, name[column] or name=weight"),
        ("a[]", "the column of 'a' has no name: write a[column]"),
        ("a,b=2,a=3", "'a' is given twice: give it once, with the weight of both"),
        (["a[x]", "a[x]"], "'a[x]' is given twice: give it once, with the weight of both"),
        ([], "no source of text is given: name a file, or a dataset as name, name:split or name:config:split"),
        ([3], "a source of text is a name or a Source, not a int"),
    ],
)
def test_what_is_no_source(given: Any, text: str) -> None:
    assert error(parse_sources, given) == text


LONG = "many words " * 50


@pytest.mark.parametrize(
    ("call", "given", "start"),
    [
        (parse_sources, "one line\nand another, with a comma", "one line\nand another, with a comma"),
        (parse_sources, LONG, LONG[:40]),
        (parse_sources, [LONG], LONG[:40]),
        (Source, LONG, LONG[:40]),
    ],
)
def test_a_text_is_no_source(call: Any, given: Any, start: str) -> None:
    assert error(call, given) == f"'{start}...' is a text, and not the name of one: write it to a file, and name that"


def test_a_mixture_may_be_longer_than_a_name() -> None:
    names = [f"owner{i:02}/a-set-with-a-name-of-some-length" for i in range(12)]
    assert [s.name for s in parse_sources(",".join(f"{n}=1" for n in names).replace("/", "_"))] == [
        n.replace("/", "_") for n in names
    ]


def test_fields_of_a_source_are_checked() -> None:
    assert error(Source, " ") == "a source of text needs a name: a file, or a dataset as name, name:split or name:config:split"
    assert error(Source, "a", template="alpacca") == (
        "unknown template 'alpacca' of 'a'; did you mean 'alpaca'? Choose from: alpaca, auto, chat, prompt, text"
    )
    assert error(Source, "a", column="x", template="alpaca") == (
        "the template alpaca reads the columns instruction, input and output: leave out [x] of 'a'"
    )


TABLE = [{"id": 1, "text": "one, two"}, {"id": 2, "text": 'say "three"'}]


@pytest.mark.parametrize(
    ("kind", "compress"), [(k, c) for k in ("json", "jsonl", "csv") for c in (False, True)] + [("parquet", False)]
)
def test_tables(tmp_path: Path, kind: str, compress: bool) -> None:
    from datasets import Dataset

    table = Dataset.from_list(TABLE)
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        table.to_parquet(path)
    elif kind == "csv":
        table.to_csv(path)
    else:
        path.write_text(json.dumps(TABLE) if kind == "json" else "\n".join(map(json.dumps, TABLE)))
    if compress:
        path = path.rename(f"{path}.gz")
        path.write_bytes(gzip.compress(path.read_bytes()))
    source = Source(str(path))
    assert [dict(row) for row in rows(source)] == TABLE
    assert list(texts(source)) == [row["text"] for row in TABLE]
    assert source.label == path.name


def test_nothing_is_written_outside(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text\nhello\n")
    before = sorted(p for p in tmp_path.rglob("*") if p.is_file())
    code = "import sys; from fxprune.data import *; print(list(texts(Source(sys.argv[1]))))"
    places = {"HF_HOME": str(tmp_path / "hub"), "HF_DATASETS_CACHE": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "a.csv")], env={**os.environ, **places}, capture_output=True, text=True
    )
    assert done.stdout == "['hello']\n", done.stderr
    assert sorted(p for p in tmp_path.rglob("*") if p.is_file()) == before


def test_rows_may_differ(tmp_path: Path) -> None:
    """A line is a string or a row; an absent value is an empty text; each row's own first column of text counts."""
    path = tmp_path / "a.jsonl"
    path.write_text('"bare"\n{"text": null, "n": 1}\n\n{"document": "d", "text": 3}\n{"content": "c", "document": "d"}\n')
    assert list(texts(Source(str(path)))) == ["bare", "", "d", "c"]
    (tmp_path / "plain.txt").write_bytes(b"a\r\n \r\n b \n\nc\x0bd")
    assert list(texts(Source(str(tmp_path / "plain.txt")))) == ["a", " b ", "c\x0bd"]


def test_lines_as_they_are(tmp_path: Path) -> None:
    """Empty lines are lines of a text; of JSON they are none, and count."""
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b" a \r\n\n \nb"))
    assert list(text_lines(path)) == [" a ", "", " ", "b"]
    (tmp_path / "empty.txt").touch()
    assert list(text_lines(tmp_path / "empty.txt")) == []
    (tmp_path / "a.jsonl").write_text('[1]\n\n  {"a": null}\n')
    assert list(json_lines(tmp_path / "a.jsonl")) == [(1, [1]), (3, {"a": None})]


def test_lines_are_read_as_they_are_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n{"text": bad}\n')
    read = texts(Source(str(path)))
    assert next(read) == "good"
    assert error(list, read) == "cannot read 'a.jsonl' as jsonl: ValueError: line 2, column 10: Expecting value"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.csv", b"text,b\n1,2\n3,4,5,6\n", "cannot read 'a.csv' as csv: ParserError: Error tokenizing data."),
        ("a.csv", b"", "cannot read 'a.csv' as csv: EmptyDataError: No columns to parse from file"),
        ("a.csv.gz", b"junk", "cannot read 'a.csv.gz' as csv: "),
        ("a.parquet", b"junk", "cannot read 'a.parquet' as parquet: ArrowInvalid: Parquet file size is 4 bytes"),
        ("a.jsonl", b'{"text": "a"\n', "cannot read 'a.jsonl' as jsonl: ValueError: line 1, column 13: Expecting ',' delimiter"),
        ("a.jsonl.gz", gzip.compress(b'"a b c"' * 100, mtime=0)[:-9], "cannot read 'a.jsonl.gz' as jsonl: EOFError: "),
        ("a.txt.gz", gzip.compress(b"a b c" * 100, mtime=0)[:10] + b"\xff" * 20, "cannot read 'a.txt.gz' as txt: error: "),
        ("a.jsonl", b'{"text": "a"}\n[1]\n', "'a.jsonl' must hold texts or rows with a column of text, not a list"),
        ("a.json", b'{"data": []}', "'a.json' must hold a list of texts or of rows with a column of text, not a dict"),
        ("a.pdf", b"%PDF", "'a.pdf' is none of .txt, .json, .jsonl, .csv, .parquet (.gz allowed)"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert error(texts, Source(str(tmp_path / name))).startswith(text)


def test_missing_files_are_told_at_once() -> None:
    for name in ("none.csv", "none.jsonl.gz", "./none", "/none/none"):
        with pytest.raises(UsageError) as raised:
            rows(Source(name))
        assert str(raised.value) == f"there is no file '{name}'"


def test_half_letters_and_byte_order_marks(tmp_path: Path) -> None:
    """A cut emoji, which no tokenizer takes, and the mark that Windows writes in front of a text."""
    for name, content in (
        ("a.jsonl", '{"text": "w1 \\ud83d w2"}\n{"text": "\\ud83d\\ude00"}'),
        ("a.json", '["w1 \\uD83D w2", "\\ud83d\\ude00"]'),
    ):
        (tmp_path / name).write_text(content)
        assert [row["text"] for row in rows(Source(str(tmp_path / name)))] == ["w1 \ufffd w2", "\U0001f600"]
    for name, content in (("b.txt", "w1 w2"), ("b.jsonl", '{"text": "w1 w2"}')):
        (tmp_path / name).write_text(content, encoding="utf-8-sig")
        assert [row["text"] for row in rows(Source(str(tmp_path / name)))] == ["w1 w2"]


def test_one_file_spelt_in_two_ways(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "w1"}')
    with pytest.raises(UsageError, match=r"'a\.jsonl' is given twice"):
        parse_sources([f"{tmp_path}/a.jsonl", f"{tmp_path}/./a.jsonl"])
    (source,) = parse_sources({tmp_path / "a.jsonl": 2.0})  # paths are names, too
    assert (source.weight, list(by_name([source]))) == (2.0, ["a.jsonl"])


@pytest.mark.parametrize(
    ("column", "text"),
    [
        ("bodi", "'a.jsonl' has no column 'bodi'; did you mean 'body'? Choose from: body, id"),
        ("id", "the column 'id' of 'a.jsonl' holds a int, not text"),
        (
            None,
            (
                "'a.jsonl' has no column of text; it has id, body, wanted text, content or document; "
                "instruction and output; prompt and completion; or turns in messages or conversations; rename them, or name one as "
                "a.jsonl[column]"
            ),
        ),
    ],
)
def test_wrong_columns(tmp_path: Path, column: str | None, text: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "body": "words"}\n')
    assert error(texts, Source(str(path), column=column)) == text
    assert list(texts(Source(str(path), column="body"))) == ["words"]


def test_the_row_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "w1"}\n\n{"text": "w2"}\n{"text": 3}\n')
    said = "the column 'text' of 'a.jsonl' holds a int, not text (in row 3)"
    for read in (texts, documents, partial(load_examples, tokenizer=tokenizer())):
        assert error(read, Source(str(path))) == said


def test_unknown_datasets_offline() -> None:
    for name in ("no-such-owner/no-such-set", "no-such-owner/no-such-set:plain:test", "a:b:c:d", "a::c"):
        text = error(texts, Source(name))
        assert text.startswith(f"'{name}' is neither a file nor a dataset that can be loaded (")
        assert text.endswith("); write name, name:split or name:config:split")


def test_datasets_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the real library: a folder is a dataset, its split and its column are found, and a wrong split is told."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "train.jsonl").write_text('{"text": "a"}\n{"text": "b"}\n')
    (folder / "test.jsonl").write_text('{"text": "c"}\n')
    assert list(texts(Source(str(folder)))) == ["a", "b"]
    assert list(texts(Source(f"{folder}:test"))) == ["c"]
    assert "Bad split: dev. Available splits: ['train', 'test']" in error(texts, Source(f"{folder}:dev"))
