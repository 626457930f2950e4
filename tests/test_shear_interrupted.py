"""`fxprune.shear` cut short: killed in every stage, damaged, out of room; the same call goes on with the same result."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune import Knowledge, ShearResult
from fxprune.api import example_inputs
from fxprune.errors import CheckpointError, FxPruneError, UsageError
from fxprune.lorashear import parts, run
from fxprune.lorashear.lhspg import LHSPG
from fxprune.lorashear.work import WorkDirectory

from .curricula import dense
from .shearing import Killed, killed, killed_at, sheared, traced_once, weights

pytestmark = pytest.mark.usefixtures("one_trace")


MOMENTS = [
    ("knowledge", 2),
    ("shearing (warm-up", 1),
    ("shearing (period 1 of 2", 4),
    ("shearing (period 2 of 2", 5),
    ("shearing (period 2 of 2", 6),
    ("recovery, stage 1, round 1", 2),
    ("measuring all sources", 0),
]


def same(result: ShearResult, expected: ShearResult) -> None:
    """All but times and what tells the runs apart."""
    one, two = ({**r.report.to_json(), "recovery": r.report.recovery} for r in (result, expected))
    for report in (one, two):
        for name in ("run", "seconds"):
            del report[name]
        del report["lhspg"]["tokens_per_second"], report["prune"]["verify"]["seconds"]
        recovery = report.pop("recovery")
        assert recovery is not None
        report["kept"] = {name: recovery[name] for name in ("history", "curriculum", "tokens", "steps", "best_step", "stopped")}
    assert one == two
    a, b = weights(result.directory), weights(expected.directory)
    assert set(a) == set(b)
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_interrupted_run_goes_on_with_the_same_result(files: list[str], tmp_path: Path, whole: ShearResult) -> None:
    """Killed in every stage, one after another: weights, losses, units, shares and tokens are those of a run that never was."""
    out, calls = tmp_path / "out", []
    for moment in MOMENTS:
        with pytest.raises(Killed):
            sheared(out, files[:2], then=[files[2]], progress=killed_at(*moment))
        assert not out.exists()
    work = tmp_path / "out.shearing"
    assert {"run.json", "knowledge.json", "pruned", "recovered.recovering"} <= set(os.listdir(work))
    assert fxprune.load(work / "pruned") is not None
    result = sheared(out, files[:2], then=[files[2]], progress=lambda what, *_: calls.append(what))
    assert not [what for what in calls if what.startswith(("knowledge", "shearing"))]
    same(result, whole)
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("where", ["save_pruned", "recover", "new_directory", "write_pages"])
def test_killed_between_the_stages(
    where: str, files: list[str], tmp_path: Path, whole: ShearResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(run, where, killed)
        with pytest.raises(Killed):
            sheared(out, files[:2], then=[files[2]])
    assert not out.exists()
    same(sheared(out, files[:2], then=[files[2]]), whole)


def test_killed_while_clearing_up(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The output stands: the same call finds that, and clears up."""
    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "remove", killed)
        with pytest.raises(Killed):
            sheared(tmp_path / "out", files[0], shear_share=1, protect_share=0, steps=6)
    assert sorted(os.listdir(tmp_path)) == ["out", "out.shearing"]
    result = sheared(tmp_path / "out", files[0], shear_share=1, protect_share=0, steps=6)
    assert result.report.lhspg["steps"] == 6
    assert os.listdir(tmp_path) == ["out"]


def test_another_run_after_one_that_was_killed_while_clearing_up(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "remove", killed)
        with pytest.raises(Killed):
            sheared(out, files[0], steps=10, shear_share=1, protect_share=0)
    with pytest.raises(UsageError, match=r"the output directory '.*out' exists and is not empty"):
        sheared(out, files[0], ratio=0.3, steps=10, shear_share=1, protect_share=0)
    assert not (tmp_path / "out.shearing").exists(), "its output stood already"
    with monkeypatch.context() as patch:
        patch.setattr(WorkDirectory, "remove", killed)
        with pytest.raises(Killed):
            sheared(out, files[0], steps=10, shear_share=1, protect_share=0, overwrite=True)
    result = sheared(out, files[0], ratio=0.3, steps=10, shear_share=1, protect_share=0, overwrite=True)
    assert result.report.ratio == 0.3
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("damaged", "said"), [("run.json", "the state of the shearing in '.*' is damaged"), ("scores.safetensors", "")]
)
def test_damaged_state(damaged: str, said: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Importance is measured again; what says whose a state is cannot be, and --restart begins anew."""
    out, options = tmp_path / "out", dict[str, Any](steps=10, shear_share=1, criterion="kfac")
    expected = sheared(tmp_path / "whole", files[0], **options)
    with monkeypatch.context() as patch:
        patch.setattr(parts.Parts, "train", killed)
        with pytest.raises(Killed):
            sheared(out, files[0], **options)
    file = tmp_path / "out.shearing" / damaged
    file.write_bytes(file.read_bytes()[:50])
    if said:
        with pytest.raises(UsageError, match=said + r": start over with --restart \(restart=True\)"):
            sheared(out, files[0], **options)
    assert not sheared(out, files[0], restart=bool(said), **options).plan.diff(expected.plan)


def test_a_checkpoint_that_was_damaged_before_it_was_put_in_place(
    files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read first: what stood in its place stays, and so does the state."""
    out, options = tmp_path / "out", dict[str, Any](steps=10, protect_share=0, overwrite=True)
    before = sheared(out, files[0], **options)
    with monkeypatch.context() as patch:
        patch.setattr(run._Shearing, "deliver", killed)
        with pytest.raises(Killed):
            sheared(out, files[0], ratio=0.1, **options)
    file = tmp_path / "out.shearing" / "recovered" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(CheckpointError, match=r"out\.shearing/recovered' is damaged: .*; start over with --restart"):
        sheared(out, files[0], ratio=0.1, **options)
    assert sum(p.numel() for p in fxprune.load(out).parameters()) == before.report.parameters_after
    assert file.is_file()


def test_a_loss_that_is_not_finite_and_a_full_disk(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was reached stays, and the same call goes on."""
    out, options = tmp_path / "out", {"shear_share": 1, "protect_share": 0, "steps": 8}
    expected = sheared(tmp_path / "expected", files[0], **options)
    begin, count = LHSPG._begin, []

    def spoilt(self: LHSPG, period: int) -> None:
        count.append(1)
        begin(self, period)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))

    with monkeypatch.context() as patch:
        patch.setattr(LHSPG, "_begin", spoilt)
        with pytest.raises(FxPruneError, match=r"the last good state, of step \d+, is kept in '.*out\.shearing/lhspg'"):
            sheared(out, files[0], **{**options, "checkpoint_every": 2})
    assert count
    assert not out.exists()
    with monkeypatch.context() as patch:

        def full(*_: Any, **__: Any) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        patch.setattr("fxprune.recovery.state.save_file", full)
        with pytest.raises(CheckpointError, match=r"could not write the training state '.*out\.shearing/lhspg': No space left"):
            sheared(out, files[0], **options)
    with monkeypatch.context() as patch:
        patch.setattr("fxprune.checkpoint.save.write_pretrained", full)
        with pytest.raises(CheckpointError, match=r"could not write '.*out\.shearing/pruned': No space left on device"):
            sheared(out, files[0], **options)
    result = sheared(out, files[0], **options)
    a, b = weights(result.directory), weights(expected.directory)
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert sorted(os.listdir(tmp_path)) == ["expected", "out"]


def test_what_was_measured_can_be_used_elsewhere(files: list[str], tmp_path: Path) -> None:
    """The file in the working directory is what `fxprune sensitivity` writes."""
    with pytest.raises(Killed):
        sheared(tmp_path / "out", files[0], progress=killed_at("shearing (warm-up", 1))
    found = Knowledge.load(tmp_path / "out.shearing" / "knowledge.json")
    found.check(fxprune.find_groups(traced_once(dense(), example_inputs(dense()))))
    assert len(found.rows) == 4
