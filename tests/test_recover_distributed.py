"""Recovery by two processes (gloo): the loss of one process, DDP and FSDP, and a state that any number of them goes on from."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune.recovery.world import World

from .processes import LAUNCH, begun, finished
from .recovering import SLOWLY, SMALL, losses, pruned, trained, write_text

SETTINGS = {**SMALL, "batch_size": 5, "micro_batch_size": 2}
"""An odd batch: the processes get different numbers of rows."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("place")
    pruned().save_pretrained(made / "pruned")
    write_text(made / "text.jsonl")
    return made


def command(place: Path, out: Path, **changes: Any) -> list[str]:
    options = [part for name, value in {**SETTINGS, **changes}.items() for part in ("--set", f"{name}={value}")]
    return ["-m", "fxprune.cli", "recover", str(place / "pruned"), "-o", str(out), "--data", str(place / "text.jsonl"), *options]


@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
@pytest.mark.parametrize("method", ["lora", "full"])
def test_two_processes_learn_what_one_does(parallel: str, method: str, place: Path, tmp_path: Path) -> None:
    expected = trained(pruned(), str(place / "text.jsonl"), **{**SETTINGS, "method": method})
    more = {"ACCELERATE_USE_FSDP": "true"} if parallel == "fsdp" else {}
    report = finished([*LAUNCH, *command(place, tmp_path / "out", method=method)], tmp_path / "out", **more)["recovery"]
    assert (report["choices"]["parallel"], report["choices"]["processes"]) == (parallel, 2)
    assert report["history"]["loss"] == pytest.approx(losses(expected), abs=1e-4)
    measured = [v["perplexity"] for v in report["validation"]]
    assert measured == pytest.approx([v["perplexity"] for v in expected.report.validation], rel=1e-4)
    assert report["tokens"] == expected.report.tokens
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize("first", ["ddp", "fsdp"])
def test_a_killed_run_of_two_goes_on(first: str, place: Path, tmp_path: Path) -> None:
    """Two processes are killed, two go on and are killed, and one brings it to the end."""
    expected = trained(pruned(), str(place / "text.jsonl"), **{**SETTINGS, "max_steps": 12})
    script = tmp_path / "slowly.py"
    script.write_text(SLOWLY)
    arguments = [str(script), *command(place, tmp_path / "out", max_steps=12, checkpoint_every=1)[2:]]
    more = {"ACCELERATE_USE_FSDP": "true"} if first == "fsdp" else {}
    state = tmp_path / "out.recovering"
    for least in (2, 5):
        process = begun([*LAUNCH, *arguments], **more)
        while process.poll() is None and not any(int(p.name[5:]) >= least for p in state.glob("step-*")):
            time.sleep(0.002)
        workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in (process.pid, *map(int, workers)):  # the launcher first: it must not start the others again
            os.kill(pid, signal.SIGKILL)
        process.wait()
        assert not (tmp_path / "out").exists(), "it was over before it was killed: no test"
    report = finished(arguments, tmp_path / "out")["recovery"]
    assert report["history"]["loss"] == pytest.approx(losses(expected), abs=1e-4)


def test_every_row_is_somebodys_and_parts_are_alike() -> None:
    batch = {"input_ids": torch.arange(14).view(7, 2), "labels": torch.arange(14).view(7, 2)}
    for size in (1, 2, 3, 4):
        for micro in (1, 2, 3, 8):
            shares = [World(torch.device("cpu"), rank, size).share(batch, micro) for rank in range(size)]
            assert len({tuple(p["labels"].shape for p in parts) for parts in shares}) == 1
            rows = torch.cat([p["labels"] for parts in shares for p in parts])
            kept = rows[(rows != -100).all(1)]
            assert torch.equal(kept, batch["labels"])
            assert bool((rows[len(kept) :] == -100).all())
            assert all(
                torch.equal(p["input_ids"][p["labels"] != -100], p["labels"][p["labels"] != -100]) for s in shares for p in s
            )
