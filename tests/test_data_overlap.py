"""Sketches: their estimate against the exact share by plain sets, what they do not depend on, and the refusal."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from fxprune.data import Sketch, Source, check_overlap, documents
from fxprune.data.overlap import overlap
from fxprune.errors import UsageError

WORDS = [f"w{i}" for i in range(500)]


def lines(count: int, seed: int, words: int = 30) -> list[str]:
    chosen = random.Random(seed)
    return [" ".join(chosen.choices(WORDS, k=words)) for _ in range(count)]


def exact(of: list[str], within: list[str]) -> float:
    """The share of 13-grams, by sets of tuples."""
    grams = []
    for texts in (of, within):
        split = [t.split() for t in texts]
        grams.append({tuple(w[i : i + 13]) for w in split for i in range(len(w) - 12)})
    return len(grams[0] & grams[1]) / len(grams[0])


@pytest.mark.parametrize("shared", [0, 1, 50, 700, 1000])
def test_the_estimate_is_near_the_exact_share(shared: int) -> None:
    one, other = lines(1000, 1), lines(3000, 2)
    other = lines(1000, 1)[:shared] + other
    true = exact(one, other)
    assert true == pytest.approx(shared / 1000, abs=1e-3)
    sketch, within = Sketch(one), Sketch(other)
    kept = sum(h % within.modulus == 0 for h in sketch.kept)
    assert 100 < kept < len(sketch) <= 2000
    assert overlap(sketch, within) == pytest.approx(true, abs=4 * 0.5 / kept**0.5)
    assert overlap(Sketch(one, limit=10**6), Sketch(other, limit=10**6)) == pytest.approx(true, abs=1e-12)


def test_a_sketch_is_small_and_depends_on_the_text_only() -> None:
    texts = lines(2000, 1)
    sketch = Sketch(texts)
    assert 1000 <= len(sketch) <= 2000
    assert sketch.modulus == 32  # 36,000 n-grams
    assert all(h % 32 == 0 for h in sketch.kept)
    shuffled = random.Random(0).sample(texts, len(texts))
    for same in (shuffled, texts + texts, ["\n\n".join(texts)], [t.upper().replace(" ", " ,  ") + " ." for t in texts]):
        assert Sketch(same).to_json() == sketch.to_json()
    assert Sketch(lines(2000, 2)).to_json() != sketch.to_json()


def test_hashes_stay_what_they_are() -> None:
    """Sketches are kept in reports: the numbers are part of the format."""
    text = "the quick brown fox jumps over the lazy dog and runs far away"
    assert Sketch([text]).to_json() == {"limit": 2000, "modulus": 1, "ngrams": ["ec570e0421e5ab58"]}


def test_short_lines() -> None:
    eight = "a b c d e f g h"
    assert len(Sketch(["a b c d e f g"])) == 0
    assert len(Sketch([eight, eight + " i", eight + " i j k l m", eight + " i j k l m n"])) == 4
    assert overlap(Sketch([eight]), Sketch([eight.upper()])) == 1
    assert overlap(Sketch([eight]), Sketch([eight + " i"])) == 0
    assert overlap(Sketch(), Sketch([eight])) == 0


def test_characters_are_words_where_words_are_not_spaced() -> None:
    text = "战国无双系列的正统第三续作以三大故事为主轴"
    assert len(Sketch([text])) == len(text) - 12
    assert overlap(Sketch([text[3:19]]), Sketch([f"x{text}y"])) == 1


def test_saved_and_read_again() -> None:
    sketch = Sketch(lines(500, 1), limit=100)
    again = Sketch.from_json(json.loads(json.dumps(sketch.to_json())))
    assert again.to_json() == sketch.to_json()
    for extra in (again, sketch):
        for text in lines(500, 2):
            extra.add(text)
    assert again.to_json() == sketch.to_json()


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ({}, "this is no sketch of a text: KeyError: 'limit'"),
        (
            {"limit": 9, "modulus": 1, "ngrams": ["xyz"]},
            "this is no sketch of a text: ValueError: invalid literal for int() with base 16: 'xyz'",
        ),
        ({"limit": 9, "modulus": 3, "ngrams": []}, "this is no sketch of a text: its n-grams do not belong to its modulus"),
        ({"limit": 9, "modulus": 2, "ngrams": ["01"]}, "this is no sketch of a text: its n-grams do not belong to its modulus"),
        (
            {"limit": 0, "modulus": 2, "ngrams": []},
            "this is no sketch of a text: UsageError: a sketch keeps at least 1 n-gram, got limit=0",
        ),
    ],
)
def test_what_is_no_sketch(data: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as raised:
        Sketch.from_json(data)
    assert str(raised.value) == text


def test_evaluating_on_what_was_trained_on_is_refused() -> None:
    test, train = lines(200, 1), lines(400, 2)
    check_overlap({"test": test}, {"train": train, "empty": []})
    check_overlap({"test": iter(test)}, {"train": Sketch(train)})
    check_overlap({"test": test}, {"train": [*train, test[0]]})  # 0.5 %
    with pytest.raises(UsageError) as raised:
        check_overlap({"fine": lines(9, 3), "test": iter(test)}, {"other": train, "train": iter([*train, *test[:50]])})
    assert str(raised.value) == (
        "the evaluation text 'test' overlaps with the training text 'train': 25.0% of its 13-word sequences are in it, "
        "more than 1.0%: choose another text for one of them"
    )
    check_overlap({"test": test}, {"train": [*train, *test[:50]]}, limit=0.25)
    for limit in (-0.1, 1.1, float("nan")):
        with pytest.raises(UsageError) as raised:
            check_overlap({}, {}, limit=limit)
        assert str(raised.value) == f"the limit of overlap is a share between 0 and 1, got {limit}"


def test_all_words_of_a_row_count(tmp_path: Any) -> None:
    """Those of an answer too, and those of a template not."""
    path = tmp_path / "a.jsonl"
    answer = "so many words in one answer that a sequence of thirteen words is in it"
    path.write_text(json.dumps({"instruction": "Say it.", "input": "", "output": answer}))
    source = Source(str(path))
    assert list(documents(source)) == [f"Say it.\n\n{answer}"]
    assert overlap(Sketch([answer]), Sketch(documents(source))) == 1
    assert len(Sketch(documents(source))) == len(answer.split()) - 12
