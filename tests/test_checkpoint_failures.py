"""Checkpoints that are damaged or cannot be written: each is named, and nothing is written by halves."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune import PrunePlan
from fxprune.api import PruneResult
from fxprune.checkpoint import save
from fxprune.checkpoint.directory import new_directory
from fxprune.checkpoint.source import load_source
from fxprune.errors import CheckpointError, UsageError

from .checkpoints import pruned
from .closeness import relative
from .zoo import build, tokens


@pytest.fixture(scope="module")
def small() -> PruneResult:
    return pruned(build("llama"), ratio=0.25)


@pytest.fixture(scope="module")
def uneven() -> PruneResult:
    return pruned(build("llama"), ratio=0.25, ranking="global", widths="per-layer")


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-30] ^= 0xFF  # in the exponent of a weight: nothing but its value changes
    content[-29] ^= 0x7F
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("form", ["small", "uneven"])
def test_damaged_checkpoints_are_named(form: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    out = tmp_path / "out"
    request.getfixturevalue(form).save_pretrained(out)
    weights = (out / "model.safetensors").read_bytes()
    cut(out / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"cannot load the checkpoint '{out}': .*incomplete metadata"):
        fxprune.load(out)
    with pytest.raises(CheckpointError, match=r"cannot load .*incomplete metadata"):
        load_source(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"cannot load the checkpoint '{out}': .*no file named model.safetensors"):
        fxprune.load(out)
    (out / "model.safetensors").write_bytes(weights)
    (out / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"cannot load the checkpoint '{out}': Expecting"):
        fxprune.load(out)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no directory '/no/such/place'"):
        fxprune.load("/no/such/place")
    with pytest.raises(UsageError, match=f"'{tmp_path}' holds no checkpoint: there is no config.json"):
        fxprune.load(tmp_path)
    with pytest.raises(UsageError, match=f"'{tmp_path}' holds no config.json: it is not a Hugging Face checkpoint"):
        load_source(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UsageError, match=f"'{tmp_path}' is a PEFT adapter: merge it into its model first"):
        load_source(tmp_path)
    with pytest.raises(UsageError, match=r"there is no file '/no/such/model\.gguf'"):
        load_source("/no/such/model.gguf")
    with pytest.raises(UsageError, match=r"unknown dtype 'bfloat'; did you mean 'bfloat16'\? Choose from: auto, bfloat16"):
        load_source(tmp_path, dtype="bfloat")


def test_meta_source_has_no_weights(small: PruneResult, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "out")
    model, tokenizer = load_source(tmp_path / "out", meta=True)
    assert tokenizer is None
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == small.report.parameters_after


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_what_may_not_be_written(small: PruneResult, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    file.write_text("")
    with pytest.raises(UsageError, match=f"the output directory '{out}' exists and is not empty; choose another, or say overwrite"):
        small.save_pretrained(out)
    with pytest.raises(
        UsageError, match=f"the output directory '{out}' holds no checkpoint: it will not be replaced; choose another"
    ):
        small.save_pretrained(out, overwrite=True)
    with pytest.raises(UsageError, match=f"the output '{file}' is a file; name a directory"):
        small.save_pretrained(file, overwrite=True)
    with pytest.raises(UsageError, match=f"cannot write '{file}/out': '{file}' is a file"):
        small.save_pretrained(file / "out")
    with pytest.raises(UsageError, match="cannot write beside '/proc/fxprune/out': "):
        small.save_pretrained("/proc/fxprune/out")
    assert contents(tmp_path) == {"file": b"", "out/thesis.txt": b"years of work"}


def test_the_dense_model_is_not_replaced(small: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tmp_path / "dense"
    dense.mkdir()
    (dense / "config.json").write_text("{}")
    monkeypatch.setattr(small.dense_config, "_name_or_path", str(dense))
    with pytest.raises(UsageError, match=f"the output directory '{dense}' holds the dense model: it will not be replaced"):
        small.save_pretrained(dense, overwrite=True)
    assert contents(tmp_path) == {"dense/config.json": b"{}"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission(small: PruneResult, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match=f"cannot write '{tmp_path}/out': no permission to write in '{tmp_path}'"):
            small.save_pretrained(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_an_empty_directory_and_missing_parents_are_fine(
    small: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for out in ("empty", "some/way/down"):
        small.save_pretrained(out)
        assert relative(fxprune.load(out)(tokens(2, 9)).logits, small.graph_module(input_ids=tokens(2, 9)).logits) < 1e-6


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def after_some_bytes(directory: Any, *_: Any, **__: Any) -> None:
    (Path(directory) / "config.json").write_text("{}")
    (Path(directory) / "model.safetensors").write_bytes(b"half")
    full()


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


FAILURES: dict[str, tuple[str, Any, str]] = {
    "weights": ("model", after_some_bytes, "could not write '{out}': No space left on device; nothing was left behind"),
    "plan": ("plan", full, "could not write '{out}': No space left on device; nothing was left behind"),
    "bytes": ("flip", flip_a_byte, "the checkpoint read back from disk differs from the pruned model (relative error"),
    "cut": (
        "flip",
        cut,
        "differs from the pruned model (it cannot be loaded: SafetensorError: Error while deserializing header: incomplete",
    ),
    "rename": ("rename", full, "could not write '{out}': No space left on device; nothing was left behind"),
    "interrupt": ("model", interrupted, ""),
}


@pytest.mark.parametrize("before", ["nothing", "old"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("form", ["small", "uneven"])
def test_a_failure_leaves_everything_as_it_was(
    form: str, failure: str, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    result: PruneResult = request.getfixturevalue(form)
    out = tmp_path / "made" / "out"
    if before == "old":
        out.mkdir(parents=True)
        (out / "config.json").write_text('{"old": true}')
        (out / "model.safetensors").write_bytes(b"old weights")
    was = contents(tmp_path)
    where, how, said = FAILURES[failure]
    with monkeypatch.context() as patch:
        if where == "model":
            patch.setattr(result.model, "save_pretrained", how)
        elif where == "plan":
            patch.setattr(PrunePlan, "save", how)
        elif where == "rename":
            rename = Path.rename
            patch.setattr(Path, "rename", lambda self, to: how() if self.name.endswith(".part") else rename(self, to))
        else:
            write = save.write_pretrained

            def damaged(model: Any, tokenizer: Any, work: Path, size: str) -> None:
                write(model, tokenizer, work, size)
                how(work / "model.safetensors")

            patch.setattr(save, "write_pretrained", damaged)
        expected = KeyboardInterrupt if how is interrupted else CheckpointError
        with pytest.raises(expected) as caught:
            result.save_pretrained(out, overwrite=True)
    assert said.format(out=out) in str(caught.value)
    assert contents(tmp_path) == was
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["made", "out", *was_names(was)] if before == "old" else [])
    result.save_pretrained(out, overwrite=True)  # and the result can still be saved
    assert relative(fxprune.load(out)(tokens(2, 9)).logits, result.graph_module(input_ids=tokens(2, 9)).logits) < 1e-6
    assert os.listdir(out.parent) == ["out"]


def was_names(was: dict[str, bytes]) -> list[str]:
    return [Path(name).name for name in was]


def test_an_error_of_another_kind_is_not_dressed_up(small: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(PrunePlan, "save", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        small.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of that size."""
    place.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("size", ["16k", "64k", "112k", "120k"])
@pytest.mark.parametrize("form", ["small", "uneven"])
def test_a_disk_that_is_really_full(form: str, size: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    result: PruneResult = request.getfixturevalue(form)
    with disk(tmp_path / "disk", size) as place:
        with pytest.raises(CheckpointError, match=f"could not write '{place}/out': .*No space left on device.*; nothing was left"):
            result.save_pretrained(place / "out")
        assert list(place.iterdir()) == []


def test_what_a_killed_process_left_vanishes(tmp_path: Path) -> None:
    """Parts of the same target that nobody writes any more; not those of a process that is alive, nor of another target."""
    killed = (
        "import sys, os, signal\nfrom fxprune.checkpoint.directory import new_directory\n"
        "with new_directory(sys.argv[1]) as work:\n    (work / 'half').write_text('x')\n    {}\n"
    )
    for target in ("out", "outer"):
        code = killed.format("os.kill(os.getpid(), signal.SIGKILL)")
        assert subprocess.run([sys.executable, "-c", code, target], cwd=tmp_path, check=False).returncode == -9
    command = [sys.executable, "-c", killed.format("print(flush=True); input()"), "out"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as alive:
        assert alive.stdout is not None
        alive.stdout.readline()
        (left,) = tmp_path.glob(".out.*.part")  # the one that is alive: it swept the killed one's
        for text in ("first", "second"):
            with new_directory(tmp_path / "out", overwrite=True) as work:
                (work / "config.json").write_text(text)
        (before,) = tmp_path.glob(".outer.*.part")
        assert sorted(p.name for p in tmp_path.iterdir()) == sorted([left.name, before.name, "out"])
        assert (left / "half").is_file()
        assert (tmp_path / "out" / "config.json").read_text() == "second"
        stale = tmp_path / ".out.abcdefgh.old"
        (stale / "was").mkdir(parents=True)
        alive.kill()
    with new_directory(tmp_path / "out", overwrite=True) as work:
        assert not left.exists()
        assert not stale.exists()
        (work / "config.json").write_text("third")
    assert sorted(p.name for p in tmp_path.iterdir()) == [before.name, "out"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsupported(*_: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", unsupported)
    other = tmp_path / ".out.abcdefgh.part"
    other.mkdir()
    with new_directory(tmp_path / "out") as work:
        (work / "config.json").write_text("{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "out"]  # who knows whether it is still written to


def test_what_another_user_left_is_let_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, opened = tmp_path / ".out.abcdefgh.part", os.open
    other.mkdir()

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if path == other:
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr("fxprune.checkpoint.directory.os.open", refuse)
    with new_directory(tmp_path / "out") as work:
        (work / "config.json").write_text("{}")
    assert sorted(p.name for p in tmp_path.iterdir()) == [other.name, "out"]
