"""Calibration data: texts, files, ready batches, and text that the model samples itself; no network."""

from __future__ import annotations

import gzip
import json
import re
from collections import UserDict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from fxprune.calibration import encode, load_calibration, read_texts, sample_from, warn_of_unknown
from fxprune.errors import FxPruneError, UsageError

TEXTS = ["one two three four five", "six seven", " ", "eight nine ten eleven twelve thirteen"]


class Words:
    """A tokenizer: one token a word, numbered as they come; a paragraph break is a token of its own."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {"\n\n": 0}
        self.calls = 0

    def __call__(self, text: str, *, add_special_tokens: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        self.calls += 1
        words = re.findall(r"\n\n|[^ \n]+", text)
        return {"input_ids": [self.numbers.setdefault(w, len(self.numbers)) for w in words]}


class Untouched(nn.Module):
    """Text that is given needs no model."""

    def forward(self, *args: Any) -> Tensor:
        raise AssertionError("the model was called")


def load(source: Any, **options: Any) -> tuple[Tensor, str]:
    batches, label = load_calibration(source, **{"model": Untouched(), "tokenizer": Words(), "samples": 4, "length": 3, **options})
    assert all(list(batch) == ["input_ids"] for batch in batches)
    return torch.cat([batch["input_ids"] for batch in batches]), label


def error(source: Any, kind: type[Exception] = UsageError, **options: Any) -> str:
    with pytest.raises(kind) as raised:
        load_calibration(source, **{"model": Untouched(), "tokenizer": Words(), "samples": 4, "length": 3, **options})
    return str(raised.value)


def windows(ids: list[int], length: int) -> set[tuple[int, ...]]:
    return {tuple(ids[i : i + length]) for i in range(len(ids) - length + 1)}


def test_strings_are_cut_at_seeded_places() -> None:
    ids = encode(Words(), TEXTS).tolist()
    assert ids == [1, 2, 3, 4, 5, 0, 6, 7, 0, 8, 9, 10, 11, 12, 13]
    batch, label = load(TEXTS)
    assert batch.shape == (4, 3)
    assert batch.dtype == torch.long
    assert {tuple(row) for row in batch.tolist()} <= windows(ids, 3)
    assert label == "4 x 3 tokens of 4 given texts, seed 0"
    assert torch.equal(batch, load(TEXTS)[0])
    assert not torch.equal(batch, load(TEXTS, seed=1)[0])
    many, _ = load(TEXTS, samples=500)
    assert {tuple(row) for row in many.tolist()} == windows(ids, 3)  # the last place too
    state = torch.get_rng_state()
    load(TEXTS)
    assert torch.equal(torch.get_rng_state(), state)


def test_batches_hold_so_many_samples() -> None:
    options: dict[str, Any] = {"model": Untouched(), "tokenizer": Words(), "samples": 7, "length": 3}
    batches, _ = load_calibration(TEXTS, **options, batch_size=3)
    assert [tuple(b["input_ids"].shape) for b in batches] == [(3, 3), (3, 3), (1, 3)]
    assert torch.equal(torch.cat([b["input_ids"] for b in batches]), load(TEXTS, samples=7)[0])
    assert error(TEXTS, batch_size=0) == "batch_size must be a whole number of at least 1, got 0"


def test_text_of_just_one_sample() -> None:
    batch, _ = load(["a b c"], samples=2)
    assert batch.tolist() == [[1, 2, 3], [1, 2, 3]]
    assert error(["a b"]) == "the calibration text '1 given text' has 2 tokens, fewer than one sample of 3"
    assert error(["", "  "]) == "the calibration text '2 given texts' has 0 tokens, fewer than one sample of 3"


def test_reading_stops_when_there_is_enough() -> None:
    tokenizer = Words()
    assert len(encode(tokenizer, (f"word{i}" for i in range(10_000)), wanted=100)) >= 100
    assert tokenizer.calls == 1


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", "one two three four five\nsix seven\n\n  \neight nine ten eleven twelve thirteen\n"),
        ("plain", "one two three four five\nsix seven\n\neight nine ten eleven twelve thirteen"),
        ("a.b.jsonl", "\n".join(json.dumps({"id": i, "text": t}) for i, t in enumerate(TEXTS)) + "\n\n"),
        ("a.json", json.dumps([{"title": 1, "content": t} for t in TEXTS])),
        ("strings.json", json.dumps(TEXTS)),
    ],
)
def test_files(tmp_path: Path, name: str, content: str, compress: bool) -> None:
    path = tmp_path / f"{name}{'.gz' if compress else ''}"
    path.write_bytes(gzip.compress(content.encode()) if compress else content.encode())
    for source in (path, str(path)):
        batch, label = load(source)
        assert torch.equal(batch, load(TEXTS)[0])
        assert label == f"4 x 3 tokens of {path.name}, seed 0"
    assert [t for t in read_texts(path) if t.strip()] == [t for t in TEXTS if t.strip()]


@pytest.mark.parametrize("name", ["none.txt", "none.json", "none.jsonl.gz", "none.gz", "none.parquet", "./none", "/none/none"])
def test_missing_files(name: str) -> None:
    assert error(name) == f"there is no file '{name}'"


@pytest.mark.parametrize(
    ("name", "content", "text"),
    [
        ("a.json", b'{"text": "a b c"}', "'a.json' must hold a list of texts or of rows with a column of text, not a dict"),
        ("a.json", b"[1, 2]", "'a.json' must hold texts or rows with a column of text, not a int"),
        (
            "a.json",
            b'[{"text": "a"',
            "cannot read 'a.json' as json: JSONDecodeError: Expecting ',' delimiter: line 1 column 14 (char 13)",
        ),
        ("a.jsonl", b'{"text": "a"}\n{"text":}\n', "cannot read 'a.jsonl' as jsonl: ValueError: line 2, column 9: Expecting value"),
        (
            "a.jsonl",
            b'{"id": 3, "body": "a"}',
            "'a.jsonl' has no column of text; it has id, body, wanted text, content or document; ",
        ),
        (
            "a.jsonl",
            b'{"text": 3}',
            "the column 'text' of 'a.jsonl' holds a int, not text",
        ),
        ("a.xml", b"<a/>", "'a.xml' is none of .txt, .json, .jsonl, .csv, .parquet (.gz allowed)"),
        ("a.txt", b"\xff\xfe", "cannot read 'a.txt' as txt: UnicodeDecodeError: "),
        ("a.txt.gz", b"plain", "cannot read 'a.txt.gz' as txt: BadGzipFile: Not a gzipped file (b'pl')"),
        ("a.txt.gz", gzip.compress(b"a b c" * 100, mtime=0)[:-9], "cannot read 'a.txt.gz' as txt: EOFError: "),
        ("a.txt", b"a b", "the calibration text 'a.txt' has 2 tokens, fewer than one sample of 3"),
        ("a.txt", b"", "the calibration text 'a.txt' has 0 tokens, fewer than one sample of 3"),
    ],
)
def test_damaged_files(tmp_path: Path, name: str, content: bytes, text: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert error(tmp_path / name).startswith(text)


def test_unknown_datasets_offline() -> None:
    for name in ("no-such-owner/no-such-set", "no-such-owner/no-such-set:plain:test"):
        text = error(name)
        assert re.match(rf"'{name}' is neither a file nor a dataset that can be loaded \(\w+: ", text)
        assert text.endswith("); write name, name:split or name:config:split")


def test_datasets(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    asked: list[Any] = []

    def load_dataset(repo: str, config: str | None, *, split: str, streaming: bool) -> Any:
        asked.append((repo, config, split, streaming))
        if repo == "lost":
            return iter_and_fail()
        return [{"id": 0, "text" if repo != "wrong" else "body": t} for t in TEXTS]

    def iter_and_fail() -> Any:
        yield {"text": "a b"}
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("owner/set", "owner/set:test", "owner/set:raw:test"):
        batch, label = load(name)
        assert torch.equal(batch, load(TEXTS)[0])
        assert label == f"4 x 3 tokens of {name}, seed 0"
    assert asked == [("owner/set", c, s, True) for c, s in ((None, "train"), (None, "test"), ("raw", "test"))]
    assert error("wrong") == (
        "'wrong' has no column of text; it has id, body, wanted text, content or document; "
        "instruction and output; prompt and completion; or turns in messages or conversations; rename them, or name one as "
        "wrong[column]"
    )
    assert torch.equal(load("wrong[body]")[0], load(TEXTS)[0])
    assert error("a,b=2") == "one source of text is read here, and 'a,b=2' names 2: put them into one file, or name one"
    assert error("lost") == (
        "'lost' is neither a file nor a dataset that can be loaded (ConnectionError: no message); "
        "write name, name:split or name:config:split"
    )


def test_ready_batches_are_used_as_they_are() -> None:
    ids = torch.arange(6).reshape(2, 3)
    one, two = {"input_ids": ids}, UserDict({"input_ids": ids, "attention_mask": ids > 0})
    for source, wanted, label in (
        ([one, two], [one, two], "2 batches given"),
        (one, [one], "1 batch given"),
        (two, [two], "1 batch given"),
    ):
        batches, text = load_calibration(source, model=Untouched())
        assert batches == wanted
        assert all(a is b for a, b in zip(batches, wanted, strict=True))
        assert text == label


@pytest.mark.parametrize(
    "source", [[], [1], ["a", {"input_ids": torch.ones(1, 2)}], [{}], [{"input_ids": [1, 2]}], {"input_ids": [[1]]}, ()]
)
def test_neither_texts_nor_batches(source: Any) -> None:
    assert error(source) == "calibration is a list of strings or of batches (mappings of tensors), and must not be empty"


def test_text_needs_a_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a b c d")
    for source in (TEXTS, tmp_path / "a.txt", "owner/set"):
        assert error(source, tokenizer=None) == "calibration text needs a tokenizer: pass tokenizer=, or leave calibration out"


def test_sizes_are_checked() -> None:
    assert error(TEXTS, samples=0) == "samples must be a whole number of at least 1, got 0"
    assert error(None, length=1) == "length must be a whole number of at least 2, got 1"


def llama(**options: Any) -> LlamaForCausalLM:
    sizes: dict[str, Any] = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 37,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, "bos_token_id": 5, "attention_dropout": 0.5, **options}))


def test_text_that_the_tokenizer_does_not_know(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = SimpleNamespace(unk_token_id=3)
    warn_of_unknown(tokenizer, torch.tensor([[3, 3], [3, 5]]), "the text 'a.txt'")
    said = "the text 'a.txt': 75 % of its tokens are unknown to the tokenizer; is it this model's, and is this its language?"
    assert [r.message for r in caplog.records] == [said]
    caplog.clear()
    warn_of_unknown(tokenizer, torch.tensor([3, 3, 5, 5]), "half")
    warn_of_unknown(tokenizer, torch.tensor([], dtype=torch.long), "nothing")
    warn_of_unknown(SimpleNamespace(unk_token_id=None), torch.tensor([3, 3]), "bytes have no unknown")
    assert not caplog.records
    words = Words()
    words.unk_token_id = 1  # type: ignore[attr-defined]
    load_calibration(["a a a a"] * 4, model=Untouched(), tokenizer=words, samples=2, length=3)
    (record,) = caplog.records
    assert record.message.startswith("the calibration text '4 given texts': 84 % of its tokens are unknown to the tokenizer")


def test_self_sampling_is_seeded_and_leaves_no_trace() -> None:
    model = llama()
    model.train()
    model.model.layers[0].mlp.eval()
    modes = {n: m.training for n, m in model.named_modules()}
    state = torch.get_rng_state()
    batch, label = load(None, model=model, tokenizer=None, samples=5, length=7)
    assert torch.equal(torch.get_rng_state(), state)
    assert {n: m.training for n, m in model.named_modules()} == modes
    assert model.config.use_cache
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert label == "5 x 7 tokens sampled from the model, seed 0"
    assert batch.shape == (5, 7)
    assert int(batch.min()) >= 0
    assert int(batch.max()) < 37
    torch.manual_seed(99)
    assert torch.equal(batch, load(None, model=model, tokenizer=None, samples=5, length=7)[0])
    assert not torch.equal(batch, load(None, model=model, tokenizer=None, samples=5, length=7, seed=1)[0])


def test_self_sampling_draws_from_the_model() -> None:
    """Token by token from the start token, each from the softmax of the stock model's last logits; with and without a cache."""
    model = llama()
    model.eval()
    generator = torch.Generator().manual_seed(3)
    ids = torch.full((4, 1), 5)
    with torch.no_grad():
        for _ in range(6):
            logits = model(input_ids=ids, use_cache=False).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=generator)], 1)
    assert torch.equal(sample_from(model, 4, 6, 3), ids[:, 1:])
    model.config.use_cache = False
    assert torch.equal(sample_from(model, 4, 6, 3), ids[:, 1:])


@pytest.mark.parametrize("start", [None, 37, -1])
def test_self_sampling_without_a_start_token(start: int | None) -> None:
    model = llama()
    model.config.bos_token_id = start
    zero = llama()
    zero.config.bos_token_id = 0
    assert torch.equal(sample_from(model, 2, 3, 0), sample_from(zero, 2, 3, 0))


def test_self_sampling_puts_the_mode_back_after_an_error() -> None:
    model = llama()
    model.train()
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    assert error(None, FxPruneError, model=model) == (
        "the logits of LlamaForCausalLM are NaN or infinite: the model is damaged, nothing was pruned"
    )
    assert all(m.training for m in model.modules())


def test_models_that_cannot_sample() -> None:
    small: dict[str, Any] = {
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 8,
        "vocab_size": 11,
    }
    assert error(None, model=nn.Linear(2, 2)) == (
        "Linear cannot sample its own calibration text (it has no vocabulary): pass calibration="
    )
    assert error(None, model=BertModel(BertConfig(**small))) == "BertModel returns no logits of the next token: pass calibration="
    encoder_decoder = T5ForConditionalGeneration(T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2))
    assert re.fullmatch(
        r"T5ForConditionalGeneration cannot sample its own calibration text \(ValueError: .*\): pass calibration=",
        error(None, model=encoder_decoder),
    )
    sizes: dict[str, Any] = {
        "n_embd": 8,
        "n_head": 2,
        "n_layer": 1,
        "vocab_size": 11,
        "n_positions": 4,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    short = GPT2LMHeadModel(GPT2Config(**sizes))
    assert load(None, model=short, length=4)[0].shape == (4, 4)
    batches, label = load_calibration(None, model=short, samples=3, length=5)
    assert batches[0]["input_ids"].shape == (3, 4)
    assert label == "3 x 4 tokens sampled from the model, seed 0", "no more than it reads"
    short.transformer.wpe = nn.Embedding(2, 8)  # fewer positions than the configuration says
    assert error(None, model=short, length=4) == (
        "GPT2LMHeadModel cannot sample its own calibration text (IndexError: index out of range in self): pass calibration="
    )
    with torch.device("meta"):
        empty = llama()
    assert (
        error(None, model=empty) == "the model is on the meta device and cannot sample its own calibration text: it has no weights"
    )

    class Flat(nn.Linear):
        config = SimpleNamespace(vocab_size=2)

        def forward(self, input_ids: Tensor) -> Any:
            return SimpleNamespace(logits=torch.zeros(len(input_ids), 2))

    assert error(None, model=Flat(2, 2)) == "Flat returns no logits of the next token: pass calibration="
