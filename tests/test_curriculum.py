"""A curriculum's words: shares by hand, the budget of its stages, batches whose mixture changes, and what is refused."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import pytest
import torch

import fxprune
from fxprune.data import Batches, Examples, Source, join, load_examples
from fxprune.errors import UsageError
from fxprune.recovery.curriculum import Curriculum, StagePlan, plan_stages
from fxprune.recovery.settings import Recovery

from .curricula import HALF, taught, write_sources, write_words
from .recovering import trained
from .zoo import build, tokenizer

OWN = {"a": 1.0, "b": 1.0, "c": 1.0}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return write_sources(tmp_path_factory.mktemp("files"))


def curriculum(files: tuple[str, str], *more: str, **options: Any) -> Curriculum:
    return Curriculum([list(files), *more], **options)


# --- shares -----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "lost", "shares"),
    [
        (OWN, {"a": 0.3, "b": 0.1, "c": 0.0}, {"a": 0.625, "b": 0.275, "c": 0.1}),
        (OWN, {"a": 0.3, "b": 0.1, "c": -5.0}, {"a": 0.625, "b": 0.275, "c": 0.1}),
        (OWN | {"b": 3.0}, {"a": 0.3, "b": 0.1, "c": 0.0}, {"a": 0.45, "b": 0.45, "c": 0.1}),
        (OWN, {"a": 0.0, "b": -0.1, "c": -0.2}, {"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}),
        (OWN | {"b": 3.0}, {"a": 0.0, "b": -0.1, "c": -0.2}, {"a": 0.24, "b": 0.52, "c": 0.24}),
        ({"a": 2.0}, {"a": 0.7}, {"a": 1.0}),
    ],
    ids=["proportional", "better than dense", "own weights", "nothing lost", "nothing lost, own weights", "one source"],
)
def test_dynamic_shares_by_hand(own: dict[str, float], lost: dict[str, float], shares: dict[str, float]) -> None:
    made = Curriculum([Source("x")], floor=0.1)
    assert made.token_shares(own, lost) == pytest.approx(shares, abs=1e-12)


def test_static_shares_are_the_sources_own() -> None:
    made = Curriculum([Source("x")], "static", floor=0.1)
    for lost in (None, {"a": 9.0, "b": 0.0, "c": 0.0}):
        assert made.token_shares({"a": 1.0, "b": 3.0, "c": 1.0}, lost) == pytest.approx({"a": 0.2, "b": 0.6, "c": 0.2})


def test_sources_are_named_apart(tmp_path: Path) -> None:
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        write_words(tmp_path / folder / "text.jsonl", 0)
    one, two = (str(tmp_path / folder / "text.jsonl") for folder in ("one", "two"))
    made = Curriculum([f"{one}=2,{two}", [one, "hub/name:config:test[body]"]])
    assert list(made.sources) == [one, two, "hub/name:config:test[body]"]
    assert made.named() == [{one: 2.0, two: 1.0}, {one: 1.0, "hub/name:config:test[body]": 1.0}]
    assert Curriculum([one]).named() == [{"text.jsonl": 1.0}]
    plain = json.loads(json.dumps(made.to_json()))
    assert plain["stages"] == made.named()
    assert plain | {"stages": 0} == {
        "weights": "dynamic",
        "floor": 0.05,
        "rounds": 4,
        "patience": 1,
        "threshold": 0.0,
        "shares": None,
        "stages": 0,
    }
    assert dataclasses.replace(made, weights="static").weights == "static"
    assert fxprune.Curriculum is Curriculum


# --- the budget -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "limits", "steps", "tokens"),
    [
        ({}, {"epochs": 1.0}, [90, 10], [None, None]),
        ({}, {"epochs": 0.5}, [45, 5], [None, None]),
        ({}, {"max_steps": 20}, [18, 2], [None, None]),
        ({"shares": (1, 99)}, {"max_steps": 15}, [1, 14], [None, None]),
        ({}, {"max_steps": 2}, [1, 1], [None, None]),
        ({"shares": (1, 1)}, {"max_steps": 20}, [10, 10], [None, None]),
        ({"shares": (1, 3)}, {"max_steps": 80}, [20, 20], [None, None]),
        ({}, {"max_tokens": 5000}, [45, 5], [4500.0, 500.0]),
        ({"shares": (0.2, 0.8)}, {"max_tokens": 1050}, [2, 8], [210.0, 840.0]),
        ({"shares": (0.2, 0.8)}, {"max_tokens": 10}, [1, 1], [2.0, 8.0]),
    ],
    ids=str,
)
def test_how_a_budget_is_divided(
    options: dict[str, Any], limits: dict[str, Any], steps: list[int], tokens: list[float | None]
) -> None:
    """9,000 and 1,000 tokens, 100 of them a step; epochs never exceed two."""
    made = Curriculum([Source("x"), Source("y")], **options)
    plans = plan_stages(made, Recovery(**limits), epochs=[90, 10], tokens=[9000, 1000], per_step=[100.0, 100.0])
    assert [p.steps for p in plans] == steps
    assert [p.tokens for p in plans] == [None if t is None else pytest.approx(t) for t in tokens]
    assert [p.rounds for p in plans] == [min(4, n) for n in steps]


def test_rounds_are_as_long() -> None:
    plan = StagePlan(steps=10, rounds=4, tokens=None)
    assert [plan.begin(i) for i in range(5)] == [0, 2, 5, 7, 10]


# --- batches ----------------------------------------------------------------------------------------------------------------------


def mixture() -> Examples:
    """30 examples of 4 tokens and 20 of 12."""
    long = 30 * [4] + 20 * [12]
    starts = torch.tensor([0, *torch.tensor(long).cumsum(0).tolist()])
    source = torch.tensor(30 * [0] + 20 * [1])
    ids = torch.arange(int(starts[-1]), dtype=torch.int32)
    return Examples(ids, starts, torch.zeros(50, dtype=torch.long), source, ("short", "long"), "none")


def test_weights_are_shares_of_the_tokens() -> None:
    made = Batches(mixture(), batch_size=8, length=12, packing=False, pad_id=0, seed=1)
    assert made.row_tokens == {"short": 4.0, "long": 12.0}
    drawn = made.drawn({"short": 0.5, "long": 0.5}, steps=3, epoch=2, before={})
    assert (len(made), len(drawn)) == (7, 3)
    assert drawn.taken(2) == {"short": (18, 72), "long": (6, 72)}
    assert [len(drawn.batch(2, i)["labels"]) for i in range(3)] == [8, 8, 8]
    assert made.taken(0) == {"short": (30, 120), "long": (20, 240)}


@pytest.mark.parametrize("packing", [False, True])
def test_a_source_goes_on_where_it_stopped(packing: bool) -> None:
    """Whatever the weights of the rounds were, no example comes again before all of its source were there."""
    made = Batches(mixture(), batch_size=5, length=12, packing=packing, pad_id=0, seed=1)
    before = {"short": 0, "long": 0}
    seen: dict[int, list[int]] = {0: [], 1: []}
    for turn, share in enumerate((0.1, 0.5, 0.9, 0.3, 0.7, 0.5), start=1):
        drawn = made.drawn({"short": share, "long": 1 - share}, steps=2, epoch=turn, before=before)
        before = {name: before[name] + rows for name, (rows, _) in drawn.taken(turn).items()}
        for batch in drawn.epoch(turn):
            for i in batch:
                seen[int(made.examples.source[i])].append(i)
    for source, size in ((0, 30), (1, 20)):
        counts = torch.tensor(seen[source]).bincount(minlength=50)[made.examples.source == source]
        assert len(counts) == size
        assert int(counts.max()) - int(counts.min()) <= 1
        assert len(seen[source]) > 10


def test_examples_end_to_end(files: tuple[str, str]) -> None:
    parts = [load_examples(file, tokenizer(), cutoff=24) for file in files]
    joined = join(parts)
    assert joined.names == ("kept.jsonl", "lost.jsonl")
    assert joined.source.tolist() == len(parts[0]) * [0] + len(parts[1]) * [1]
    for i in (0, len(parts[0]) - 1, len(parts[0]), len(joined) - 1):
        part, own = (parts[0], i) if i < len(parts[0]) else (parts[1], i - len(parts[0]))
        assert all(torch.equal(a, b) for a, b in zip(joined[i], part[own], strict=True))
    assert joined.fingerprint == joined.select(range(len(joined))).fingerprint


# --- what is refused --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("stages", "options", "said"),
    [
        ("a.jsonl", {}, "stages of a curriculum is a list with the sources of each stage: [["),
        ({"a.jsonl": 1.0}, {}, "stages of a curriculum is a list with the sources of each stage: [["),
        ([], {}, "a curriculum needs at least one stage of sources"),
        ([["x"], []], {}, "stage 2 of the curriculum: no source of text is given"),
        ([["x"], "nowhere.jsonl"], {}, "stage 2 of the curriculum: there is no file 'nowhere.jsonl'"),
        ([["x", "x"]], {}, "stage 1 of the curriculum: 'x' is given twice"),
        ([mixture()], {}, "stage 1 of a curriculum is sources of text, not examples that were read already"),
        (
            [["x"]],
            {"weights": "dynamc"},
            "unknown weights 'dynamc' of a curriculum; did you mean 'dynamic'? Choose from: dynamic, static",
        ),
        ([["x"]], {"rounds": 0}, "rounds of a curriculum must be a whole number of at least 1, got 0"),
        ([["x"]], {"rounds": 2.5}, "rounds of a curriculum must be a whole number of at least 1, got 2.5"),
        ([["x"]], {"patience": -1}, "patience of a curriculum must be a whole number of at least 0, got -1"),
        ([["x"]], {"threshold": -0.1}, "threshold of a curriculum must be a number of at least 0, got -0.1"),
        ([["x"]], {"floor": 0}, "floor of a curriculum must lie above 0 and be at most 1, got 0"),
        ([["x"]], {"floor": float("nan")}, "floor of a curriculum must lie above 0 and be at most 1, got nan"),
        ([["x", "y", "z"]], {"floor": 0.4}, "a floor of 0.4 for each of 3 sources is more than all: it can be 0.333 at most"),
        (
            [["x"]],
            {"shares": [0.5, 0.5]},
            "shares of a curriculum must be a positive number for each of its 1 stage, got [0.5, 0.5]",
        ),
        (
            [["x"], ["y"]],
            {"shares": [1, 0]},
            "shares of a curriculum must be a positive number for each of its 2 stages, got [1, 0]",
        ),
    ],
    ids=str,
)
def test_what_is_no_curriculum(stages: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UsageError) as caught:
        Curriculum(stages, **options)
    assert said in str(caught.value)


def test_what_does_not_go_together(files: tuple[str, str], tmp_path: Path) -> None:
    few, empty = tmp_path / "few.jsonl", tmp_path / "empty.jsonl"
    few.write_text("\n".join(json.dumps({"text": "w1 w2 w3"}) for _ in range(7)))
    empty.write_text("")
    held = tmp_path / "held.jsonl"
    held.write_text(Path(files[0]).read_text().splitlines()[3])
    plain = curriculum(files)
    cases: list[tuple[Curriculum, dict[str, Any], str]] = [
        (
            plain,
            {"patience": 3},
            "patience is of a recovery without a curriculum: set patience of the curriculum (in rounds) instead",
        ),
        (
            plain,
            {"validation_every": 3},
            "validation_every is of a recovery without a curriculum: set rounds of the curriculum instead",
        ),
        (plain, {"validation_samples": 0}, "a curriculum measures on examples held out of each source: validation_samples must be"),
        (
            curriculum(files, str(few)),
            {"cutoff": 32},
            "'few.jsonl' comes to 7 examples of at most 32 tokens, and a tenth is held out to measure on: give text for at",
        ),
        (curriculum(files, str(empty)), {}, "'empty.jsonl' is empty: it has no rows"),
        (curriculum(files, files[0]), {"max_steps": 1}, "max_steps is 1 and the curriculum has 2 stages: each needs a step"),
        (
            curriculum(files, files[0], shares=(1, 1)),
            {"max_steps": None},
            "shares of a curriculum divide max_steps or max_tokens: give one of them",
        ),
        (
            plain,
            {"validation": str(held)},
            "the evaluation text 'held.jsonl' overlaps with the training text 'kept.jsonl': 100.0% of its 13-word sequences",
        ),
    ]
    for made, changes, said in cases:
        with pytest.raises(UsageError) as caught:
            taught(made, **changes)
        assert said in str(caught.value)


def test_a_dense_model_is_needed_where_weights_follow_it(files: tuple[str, str]) -> None:
    with pytest.raises(UsageError) as caught:
        trained(build("llama"), None, curriculum=curriculum(files))
    assert str(caught.value) == (
        "dynamic weights follow what the pruned model has lost against the dense one, and there is no teacher: pass the dense "
        "model, teacher=, or take static weights (weights='static', --curriculum static)"
    )
    with pytest.raises(UsageError, match="the teacher predicts 60 tokens, the model 97: it must be the dense model"):
        taught(curriculum(files), teacher=build("llama", vocab_size=60))


def test_data_or_a_curriculum(files: tuple[str, str]) -> None:
    with pytest.raises(UsageError, match=r"there is nothing to train on: give data, or curriculum=fxprune.Curriculum"):
        trained(build("llama"), None)
    with pytest.raises(UsageError, match="data and a curriculum are given: name the data in the curriculum's stages only"):
        trained(build("llama"), files[0], curriculum=curriculum(files))
    with pytest.raises(UsageError, match=r"curriculum is a fxprune.Curriculum, not a list"):
        trained(build("llama"), None, curriculum=cast(Any, [[files[0]]]))


def test_sources_that_share_text_are_named(files: tuple[str, str], tmp_path: Path) -> None:
    both = tmp_path / "both.jsonl"
    lines = Path(files[0]).read_text().splitlines()[:80]
    both.write_text("\n".join([*lines, *write_words(tmp_path / "more.jsonl", HALF, rows=80, seed=9).read_text().splitlines()]))
    result = taught(Curriculum([[files[0], str(both)]], "static", rounds=1), max_steps=1)
    kept, other = (n for n in result.report.notes if "13-word sequences" in n)
    assert "of the 13-word sequences of 'kept.jsonl' are in 'both.jsonl': its held-out text may be trained on there" in kept
    assert "of the 13-word sequences of 'both.jsonl' are in 'kept.jsonl'" in other
