"""A measurement that is cut short goes on: nothing is measured twice, and the result is the same."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune import measure_knowledge
from fxprune.errors import UsageError
from fxprune.passes.batches import causal_loss

from .sensing import Batch, Case, batches, case_of

OPTIONS: dict[str, Any] = {"kinds": ["kv_heads", "ffn", "layers"], "share": 0.5}
PLACES, BATCHES = 6, 3


@pytest.fixture(scope="module")
def llama() -> Case:
    return case_of("llama")


class Cut(BaseException):
    """What an interruption is, but for pytest, which would stop at one."""


class Counted:
    """Next-token cross-entropy that is counted, and cut short."""

    def __init__(self, last: int = 1_000_000) -> None:
        self.calls, self.last = 0, last

    def __call__(self, outputs: Any, batch: Batch) -> Tensor:
        self.calls += 1
        if self.calls > self.last:
            raise Cut
        return causal_loss(outputs, batch)


def entries(path: Path) -> dict[str, list[float | None]]:
    return json.loads(path.read_text())["entries"]


@pytest.mark.parametrize("by", ["loss", "divergence"])
@pytest.mark.parametrize("done", [0, 1, 3, 5])
def test_an_interrupted_measurement_goes_on(by: str, done: int, llama: Case, tmp_path: Path) -> None:
    whole = Counted()
    wanted = measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores, by=by, loss=whole, **OPTIONS)
    assert whole.calls == (1 + PLACES) * BATCHES
    state, short = tmp_path / "state", Counted(BATCHES * (1 + done) + 1)
    given: dict[str, Any] = {"scores": llama.scores, "by": by, "state": state, **OPTIONS}
    with pytest.raises(Cut):
        measure_knowledge(llama.gm, llama.groups, batches(), loss=short, **given)
    assert len(entries(state)) == 1 + done
    assert os.listdir(tmp_path) == ["state"]
    told: list[int] = []
    rest = Counted()
    found = measure_knowledge(
        llama.gm, llama.groups, batches(), loss=rest, progress=lambda what, done, total: told.append(done), **given
    )
    assert found == wanted
    again = BATCHES if by == "divergence" else 0  # the dense predictions are needed, and not kept on the disk
    assert rest.calls == (PLACES - done) * BATCHES + again
    assert told == list(range(done + 1, PLACES + 1))
    assert measure_knowledge(llama.gm, llama.groups, batches(), loss=Counted(0), **given) == wanted


def test_other_kinds_add_to_a_state(llama: Case, tmp_path: Path) -> None:
    given: dict[str, Any] = {"scores": llama.scores, "state": tmp_path / "state"}
    measure_knowledge(llama.gm, llama.groups, batches(), kinds=["ffn"], **given)
    counted = Counted()
    counted.__qualname__ = causal_loss.__qualname__  # type: ignore[attr-defined]
    found = measure_knowledge(llama.gm, llama.groups, batches(), kinds=["kv_heads", "ffn"], loss=counted, **given)
    assert counted.calls == 2 * BATCHES
    assert found == measure_knowledge(llama.gm, llama.groups, batches(), kinds=["kv_heads", "ffn"], scores=llama.scores)


def test_units_are_not_scored_again_when_all_is_known(llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {"kinds": ["ffn"], "share": 0.5, "state": tmp_path / "state"}
    wanted = measure_knowledge(llama.gm, llama.groups, batches(), **given)

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("scored again")

    monkeypatch.setattr("fxprune.passes.knowledge.score", fail)
    assert measure_knowledge(llama.gm, llama.groups, batches(), **given) == wanted


def nudged(case: Case) -> None:
    """One weight, by the least that there is."""
    weight = case.gm.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(9.0))


def unnudged(case: Case) -> None:
    weight = case.gm.get_parameter("model.layers.1.mlp.up_proj.weight")
    with torch.no_grad():
        weight[3, 5] = torch.nextafter(weight[3, 5], torch.tensor(-9.0))


def other_text() -> list[dict[str, Tensor]]:
    found = batches()
    found[1]["input_ids"][0, 0] += 1
    return found


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"share": 0.25}, "share was 0.5, now 0.25"),
        ({"take": "most"}, "take was least, now most"),
        ({"by": "divergence"}, "by was loss, now divergence"),
        ({"loss": Counted()}, "loss was causal_loss, now Counted"),
        ({"scores": None}, "units by was scores [0-9a-f]{16}, now taylor1"),
        ({"scores": None, "criterion": "random", "seed": 3}, "units by was scores [0-9a-f]{16}, now random, seed 3"),
        ({"batches": other_text()}, "text, samples or length differs"),
        ({"weights": nudged}, "weights differs"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_a_state_of_something_else_is_refused(change: dict[str, Any], said: str, llama: Case, tmp_path: Path) -> None:
    state = tmp_path / "state"
    given: dict[str, Any] = {"scores": llama.scores, "state": state, **OPTIONS}
    measure_knowledge(llama.gm, llama.groups, batches(), **given)
    was = state.read_bytes()
    text = change.pop("batches", batches())
    edit: Callable[[Case], None] | None = change.pop("weights", None)
    if edit is not None:
        edit(llama)
    with pytest.raises(
        UsageError, match=f"state' holds the state of another measurement: {said}\\. Repeat what it was started with, or"
    ):
        measure_knowledge(llama.gm, llama.groups, text, **{**given, **change})
    if edit is not None:
        unnudged(llama)
    assert state.read_bytes() == was


def test_a_state_of_another_model_is_refused(llama: Case, tmp_path: Path) -> None:
    gpt2 = case_of("gpt2")
    given: dict[str, Any] = {"state": tmp_path / "state", "criterion": "l1", **OPTIONS}
    measure_knowledge(llama.gm, llama.groups, batches(), **given)
    with pytest.raises(UsageError, match=r"model differs; weights differs"):
        measure_knowledge(gpt2.gm, gpt2.groups, batches(), **given)


@pytest.mark.parametrize("held", ["", "no JSON", '{"made": "elsewhere"}', '{"fxprune_measuring": 9}', "[]"])
def test_a_file_that_is_no_state_is_not_replaced(held: str, llama: Case, tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text(held)
    with pytest.raises(UsageError, match=r"mine\.json' is not the state of a measurement: it will not be replaced"):
        measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores, state=tmp_path / "mine.json")
    assert (tmp_path / "mine.json").read_text() == held


def test_a_state_needs_a_directory(llama: Case, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"there is no directory '.*nowhere' to write 'state' to"):
        measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores, state=tmp_path / "nowhere" / "state")


def test_a_full_disk_leaves_the_last_whole_state(llama: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = tmp_path / "state"
    given: dict[str, Any] = {"scores": llama.scores, "state": state, **OPTIONS}
    real, writes = os.fsync, 0

    def full(handle: int) -> None:
        nonlocal writes
        writes += 1
        if writes == 4:
            raise OSError(28, "No space left on device")
        real(handle)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UsageError, match=r"cannot write '.*state': No space left on device"):
        measure_knowledge(llama.gm, llama.groups, batches(), **given)
    assert len(entries(state)) == 3
    assert os.listdir(tmp_path) == ["state"]
    counted = measure_knowledge(llama.gm, llama.groups, batches(), **given)
    assert counted == measure_knowledge(llama.gm, llama.groups, batches(), scores=llama.scores, **OPTIONS)
