"""Settings and fixtures for every test: no network, one thread a worker, quiet libraries, bounded property tests."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, cast

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from fxprune import ShearResult

    from .checkpoints import Stock
    from .command import Ran, Run

# What fails in these modules is explained as it is in a test.
pytest.register_assert_rewrite(
    *(
        f"tests.{name}"
        for name in (
            "checkpoints",
            "closeness",
            "compensating",
            "masking",
            "rule_operator",
            "processes",
            "scoring",
            "selecting",
            "sensing",
        )
    )
)

# Deterministic, so that a failure on one machine is a failure on all; no deadline, since the machine is shared.
settings.register_profile(
    "fxprune", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)
settings.load_profile("fxprune")


def pytest_configure(config: pytest.Config) -> None:
    """One thread for each xdist worker: two workers on two cores must not fight for them."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Every test starts from the same random state, in whatever order tests run."""
    torch.manual_seed(0)


@pytest.fixture
def corpora() -> Callable[..., Path]:
    """The directory of the real corpora, asked for with the files that a test reads; it is skipped where they are not."""

    def directory(*files: str) -> Path:
        named = os.environ.get("FXPRUNE_DATA")
        if not named:
            pytest.skip("FXPRUNE_DATA names no directory")
        for file in files:
            if not (Path(named) / file).is_file():
                pytest.skip(f"the directory that FXPRUNE_DATA names has no {file}")
        return Path(named)

    return directory


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    """A process without fxprune that loads checkpoints."""
    from .checkpoints import Stock

    process = Stock(tmp_path_factory.mktemp("stock"))
    yield process
    process.close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the command runs: a directory with a model, another without tokenizer, a text, and files that are none of these."""
    from .zoo import build, tokenizer

    made = tmp_path_factory.mktemp("place")
    cast("PreTrainedModel", build("llama", tied=False)).save_pretrained(made / "dense")
    tokenizer().save_pretrained(made / "dense")
    cast("PreTrainedModel", build("gpt2")).save_pretrained(made / "other")
    chosen = random.Random(0)
    lines = (" ".join(f"w{chosen.randrange(94)}" for _ in range(40)) for _ in range(12))
    (made / "text.txt").write_text("\n".join(lines))
    (made / "short.txt").write_text("w1 w2 w3")
    (made / "foreign.json").write_text('{"made": "elsewhere"}')
    (made / "empty").mkdir()
    return made


@pytest.fixture(scope="module")
def checkpoint(place: Path) -> Path:
    """A pruned checkpoint of the model."""
    from fxprune.cli import main

    from .command import PLAIN

    out = place / "checkpoint"
    assert main(["prune", str(place / "dense"), "-o", str(out), "--ratio", "0.25", *PLAIN]) == 0
    return out


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in the directory; nothing may be left there, unless a test takes it away."""
    from .command import call

    monkeypatch.chdir(place)
    before = sorted(os.listdir(place))

    def command(*arguments: str) -> Ran:
        return call(capsys, *arguments)

    yield command
    assert sorted(os.listdir(place)) == before
    logging.getLogger("fxprune").setLevel(logging.NOTSET)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Text for a short recovery."""
    from .recovering import write_text

    return write_text(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What short shearings read: two sources of text, and instructions."""
    from .shearing import three_sources

    return three_sources(tmp_path_factory.mktemp("sources"))


@pytest.fixture(scope="session")
def whole(files: list[str], tmp_path_factory: pytest.TempPathFactory) -> ShearResult:
    """A shearing of two stages that nothing interrupts."""
    from .shearing import uninterrupted

    return uninterrupted(tmp_path_factory.mktemp("whole") / "out", files)


@pytest.fixture
def one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shearings of models of one shape share a trace."""
    from fxprune.lorashear import parts

    from .shearing import traced_once

    monkeypatch.setattr(parts, "trace", traced_once)
