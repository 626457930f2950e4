"""The training state: whole at any moment, refused by another run, and a run that goes on as if it had never been killed."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from fxprune.checkpoint import directory as saving
from fxprune.errors import CheckpointError, UsageError
from fxprune.recovery import loop
from fxprune.recovery.state import Position, StateDirectory

from .processes import finished, kill_again_and_again
from .recovering import SLOWLY, SMALL, losses, pruned, trained, uneven, weights, write_text

WRITER = "fxprune.recovery.state.save_file"


def position(step: int) -> Position:
    return Position(step=step, tokens=10 * step, history={"step": [1.0], "loss": [2.5], "lr": [0.1], "tokens": [3.0]})


def directory(place: Path, **identity: Any) -> StateDirectory:
    return StateDirectory(place / "out", {"lr": 0.1, **identity})


# --- the directory ----------------------------------------------------------------------------------------------------------------


def test_a_state_comes_back_and_two_are_kept(tmp_path: Path) -> None:
    state = directory(tmp_path)
    assert state.read() is None
    assert state.last_step() is None
    for step in (3, 6, 9):
        state.write(position(step), {"a": torch.full((2, 3), float(step)), "b": torch.tensor(step)})
    assert sorted(p.name for p in state.path.iterdir()) == ["lock", "step-000000006", "step-000000009"]
    assert sorted(p.name for p in (state.path / "step-000000009").iterdir()) == ["state.json", "tensors.safetensors"]
    state.close()
    again = directory(tmp_path)
    found = again.read()
    assert found is not None
    assert found[0] == position(9)
    assert torch.equal(found[1]["a"], torch.full((2, 3), 9.0))
    assert again.last_step() == 9
    again.remove()
    assert not list(tmp_path.iterdir())


def test_a_directory_without_a_state_vanishes(tmp_path: Path) -> None:
    directory(tmp_path).close()
    assert not list(tmp_path.iterdir())


HARM = ("truncated", "no tensors", "no json", "other json", "one tensor", "another shape")
LACKING: dict[str, Any] = {
    "no step": lambda data: data["position"].pop("step"),
    "no validation": lambda data: data["position"].pop("validation"),
    "a step in words": lambda data: data["position"].update(step="two"),
    "a history without lr": lambda data: data["position"]["history"].pop("lr"),
    "a history with a hole": lambda data: data["position"]["history"]["lr"].append(0.1),
    "no identity": lambda data: data.update(identity=[]),
}


@pytest.mark.parametrize("damage", [*HARM, *LACKING])
def test_a_damaged_state_falls_back_to_the_one_before(damage: str, tmp_path: Path) -> None:
    state = directory(tmp_path)
    for step in (1, 2):
        state.write(position(step), {"a": torch.ones(50)})
    harm(state.path / "step-000000002", damage)
    found = state.read()
    assert found is not None
    assert found[0].step == 1
    state.write(position(2), {"a": torch.full((50,), 2.0)})  # the run comes to that step again
    again = state.read()
    assert again is not None
    assert again[0].step == 2
    assert torch.equal(again[1]["a"], torch.full((50,), 2.0))
    state.write(position(3), {"a": torch.ones(50)})
    assert [p.name for p in sorted(state.path.glob("step-*"))] == ["step-000000002", "step-000000003"], "both whole, both kept"
    for step in (2, 3):
        harm(state.path / f"step-{step:09d}", damage)
    with pytest.raises(CheckpointError, match=r"out.recovering' is damaged \(.*\); start over with --restart \(restart=True\)"):
        state.read()
    state.close()
    assert StateDirectory(tmp_path / "out", {"lr": 0.1}, restart=True).read() is None


def harm(path: Path, damage: str) -> None:
    tensors, text = path / "tensors.safetensors", path / "state.json"
    if damage == "truncated":
        tensors.write_bytes(tensors.read_bytes()[:-9])
    elif damage == "no tensors":
        tensors.unlink()
    elif damage in ("one tensor", "another shape"):
        save_file({} if damage == "one tensor" else {"a": torch.ones(51)}, tensors)
    elif damage in LACKING:
        data = json.loads(text.read_text())
        LACKING[damage](data)
        text.write_text(json.dumps(data))
    else:
        text.write_text("{" if damage == "no json" else '{"position": {"steps": 3}}')


def test_what_a_killed_writer_left_is_cleared(tmp_path: Path) -> None:
    state = directory(tmp_path)
    state.write(position(1), {})
    (state.path / ".part").mkdir()
    (state.path / ".part" / "tensors.safetensors").write_bytes(b"half")
    state.close()
    found = directory(tmp_path).read()
    assert found is not None
    assert found[0].step == 1
    assert not (state.path / ".part").exists()


def test_the_state_of_another_run_is_refused(tmp_path: Path) -> None:
    state = StateDirectory(tmp_path / "out", {"lr": 0.1, "the model": "abc", "targets": ("q_proj",)})
    state.write(position(1), {})
    state.close()
    StateDirectory(tmp_path / "out", {"lr": 0.1, "the model": "abc", "targets": ["q_proj"]}).close()
    with pytest.raises(UsageError) as caught:
        StateDirectory(tmp_path / "out", {"lr": 0.2, "the model": "xyz", "targets": ("q_proj",)}).read()
    assert str(caught.value) == (
        f"'{tmp_path / 'out'}.recovering' holds the state of another recovery: lr was 0.1, now 0.2; the model was abc, now xyz. "
        "Repeat the settings it was started with, or start over with --restart (restart=True)"
    )


def test_only_one_process_writes(tmp_path: Path) -> None:
    state = directory(tmp_path)
    with pytest.raises(
        UsageError, match=r"another process is writing to '.*out.recovering': wait for it, or choose another output"
    ):
        directory(tmp_path)
    state.write(position(1), {})
    state.close()
    directory(tmp_path).close()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "out.recovering").write_text("a file")
    with pytest.raises(UsageError, match=r"cannot write the training state '.*out.recovering': File exists"):
        directory(tmp_path)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("No space left on device")])
def test_a_full_disk_leaves_the_states_before_it(error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = directory(tmp_path)

    def full(*_: Any) -> None:
        raise error

    monkeypatch.setattr(WRITER, full)
    with pytest.raises(CheckpointError) as caught:
        state.write(position(1), {})
    said = f"could not write the training state '{state.path}': No space left on device; "
    assert str(caught.value) == said + "none was written before"
    monkeypatch.setattr(WRITER, save_file)
    state.write(position(1), {"a": torch.ones(2)})
    monkeypatch.setattr(WRITER, full)
    with pytest.raises(CheckpointError) as caught:
        state.write(position(2), {})
    assert str(caught.value) == said + "that of step 1 is whole, and the same command goes on from it"
    found = state.read()
    assert found is not None
    assert found[0].step == 1
    assert sorted(p.name for p in state.path.iterdir()) == ["lock", "step-000000001"]


# --- a run that was interrupted ---------------------------------------------------------------------------------------------------


class Killed(BaseException):
    """As sudden as a signal, for the code inside."""


def killed_after(step: int) -> Callable[[str, int, int], None]:
    """A progress callback that ends the run once a step is done."""

    def progress(what: str, done: int, total: int) -> None:
        if what.startswith("recovery") and done == step:
            raise Killed

    return progress


RUNS: dict[str, dict[str, Any]] = {
    "lora": {"dropout": 0.3, "micro_batch_size": 2},
    "full": {"method": "full", "weight_decay": 0.1},
    "best": {"lr": 0.3, "validation_every": 2, "patience": 3, "schedule": "constant"},
    "rare": {"checkpoint_every": 5},
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_goes_on_with_the_same_result(name: str, text: Path, tmp_path: Path) -> None:
    """Ended after every second step: losses, measurements and weights are those of a run that was never ended, bit for bit."""
    options = {"checkpoint_every": 1, **RUNS[name]}
    expected = trained(pruned(), str(text), **options)
    out = tmp_path / "out"
    for step in (2, 4, 6, 7):
        if step < expected.report.steps:
            with pytest.raises(Killed):
                trained(pruned(), str(text), output=out, progress=killed_after(step), **options)
            assert not out.exists()
    result = trained(pruned(), str(text), output=out, **options)
    assert losses(result) == losses(expected)
    assert result.report.validation == expected.report.validation
    for name in ("steps", "best_step", "stopped", "tokens"):
        assert getattr(result.report, name) == getattr(expected.report, name)
    before, after = weights(expected.model), weights(result.model)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_is_pickled(text: Path, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        trained(pruned(), str(text), output=tmp_path / "out", progress=killed_after(4), checkpoint_every=2)
    newest = tmp_path / "out.recovering" / "step-000000002"
    assert sorted(p.name for p in newest.iterdir()) == ["state.json", "tensors.safetensors"]
    tensors = load_file(newest / "tensors.safetensors")
    assert {key.partition("/")[0] for key in tensors} == {"trained", "optimizer", "best"}
    assert json.loads((newest / "state.json").read_text())["position"]["step"] == 2


def test_a_run_of_another_kind_is_refused(text: Path, tmp_path: Path) -> None:
    other = write_text(tmp_path / "other.jsonl", seed=5)
    out = tmp_path / "out"
    with pytest.raises(Killed):
        trained(pruned(), str(text), output=out, progress=killed_after(3), checkpoint_every=1)
    cases: list[tuple[Any, str, dict[str, Any], str]] = [
        (pruned(), str(text), {"lr": 1e-3}, r"another recovery: lr was 0.003, now 0.001\. Repeat"),
        (pruned(), str(text), {"targets": ("q_proj",)}, r"targets was all, now \['q_proj'\]"),
        (pruned(), str(other), {}, r"the data differs; the validation data differs"),
        (uneven(), str(text), {}, r"the model differs; its plan differs\."),
        (pruned(), str(text), {"packing": "off"}, r"packing was auto, now off; packed was True, now False"),
    ]
    for target, data, changes, said in cases:
        with pytest.raises(UsageError, match=said):
            trained(target, data, output=out, checkpoint_every=1, **changes)
    assert (tmp_path / "out.recovering").is_dir()
    result = trained(pruned(), str(text), output=out, restart=True, lr=1e-3)
    assert losses(result) == losses(trained(pruned(), str(text), lr=1e-3))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other.jsonl", "out"]


def test_what_changes_no_result_may_change(text: Path, tmp_path: Path) -> None:
    expected = trained(pruned(), str(text))
    with pytest.raises(Killed):
        trained(pruned(), str(text), output=tmp_path / "out", progress=killed_after(3), checkpoint_every=2)
    changed = {"checkpoint_every": 3, "micro_batch_size": 3, "gradient_checkpointing": "on"}
    assert losses(trained(pruned(), str(text), output=tmp_path / "out", **changed)) == pytest.approx(losses(expected), abs=1e-5)


def test_a_checkpoint_that_could_not_be_written_costs_no_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full when the checkpoint is written: the state of the last step stays, and is all that the next run needs."""

    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(saving, "_put_in_place", full)
        with pytest.raises(CheckpointError, match=r"could not write '.*out': No space left on device; nothing was left behind"):
            trained(pruned(), str(text), output=tmp_path / "out", checkpoint_every=0)
    assert [p.name for p in tmp_path.iterdir()] == ["out.recovering"]

    def step(*_: Any) -> None:
        raise AssertionError("it trained again")

    with monkeypatch.context() as patch:
        patch.setattr(loop.Training, "_step", step)
        result = trained(pruned(), str(text), output=tmp_path / "out", checkpoint_every=0)
    assert losses(result) == losses(trained(pruned(), str(text)))
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_without_an_output_nothing_is_written(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    trained(pruned(), str(text))
    assert not list(tmp_path.iterdir())


# --- kill -9 ----------------------------------------------------------------------------------------------------------------------


def command(place: Path, text: Path, out: str) -> list[str]:
    """The command line of a run of 24 steps with a state after each."""
    options = {**SMALL, "max_steps": 24, "checkpoint_every": 1, "dropout": 0.2, "validation_every": 7}
    sets = [part for name, value in options.items() for part in ("--set", f"{name}={value}")]
    return ["recover", str(place / "pruned"), "-o", str(place / out), "--data", str(text), *sets]


@pytest.mark.slow
def test_kill_nine_at_any_moment(text: Path, tmp_path: Path) -> None:
    """Killed five times, by a clock that knows nothing of the steps: the weights are those of a run that was never killed."""
    pruned().save_pretrained(tmp_path / "pruned")
    expected = trained(
        str(tmp_path / "pruned"), str(text), max_steps=24, dropout=0.2, validation_every=7, output=tmp_path / "expected"
    )
    arguments = ["-c", SLOWLY, *command(tmp_path, text, "out")]
    out, state = tmp_path / "out", tmp_path / "out.recovering"
    kill_again_and_again(arguments, out, lambda: {*state.glob("step-*")}, times=5, longest=0.6)
    found = finished(arguments, out)["recovery"]
    assert found["history"]["loss"] == losses(expected)
    assert found["validation"] == expected.report.validation
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("expected", "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert sorted(p.name for p in tmp_path.iterdir() if not p.name.startswith(".")) == ["expected", "out", "pruned"]
