"""The command: its help, its defaults, what its arguments mean and how it ends."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch

import fxprune
from fxprune._version import __version__
from fxprune.cli import kinds, main, shares
from fxprune.commands.prune import HOW
from fxprune.errors import FxPruneError, VerificationError

from .command import PLAIN, ROOT, Ran, Run


def test_help_needs_no_torch() -> None:
    code = """
import contextlib, io, sys
from fxprune.cli import main
for command in ([], ["prune"], ["groups"], ["explore"], ["verify"], ["eval"], ["recover"], ["shear"], ["demo"]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert "usage: fxprune" in text.getvalue()
heavy = {"torch", "transformers", "rich", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_other_libraries_log_by_handlers_of_their_own() -> None:
    """Not by one of ours at the root, which would say everything twice."""
    code = """
import logging
from fxprune.cli import main
for _ in range(2):
    assert main(["report", "nowhere"]) == 2
assert not logging.getLogger().handlers
for _ in range(2):
    logging.getLogger("fxprune.passes").warning("once")
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["fxprune: there is no directory 'nowhere'"] * 2 + ["once"]


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fxprune", "--help"], cwd=ROOT, capture_output=True, check=True)
        return time.perf_counter() - start

    assert min(seconds() for _ in range(5)) < 0.5


def test_help_names_every_command_and_choice(run: Run) -> None:
    text = run("--help").out
    assert all(command in text for command in ("prune", "groups", "verify", "eval", "demo"))
    text = " ".join(run("prune", "--help").out.split())
    from fxprune.criteria import AGGREGATIONS, CRITERIA
    from fxprune.passes.compensation import COMPENSATIONS
    from fxprune.passes.selection import RANKINGS
    from fxprune.recipes import RECIPES

    for choice in (
        *CRITERIA,
        *AGGREGATIONS,
        *COMPENSATIONS,
        *RANKINGS,
        *RECIPES,
        "local",
        "global",
        "uniform",
        "per-layer",
        "influence",
        "bfloat16",
    ):
        assert choice in text
    assert run("--version") == Ran(0, f"fxprune {__version__}\n", "")


def test_defaults_are_those_of_the_library(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import inspect

    from fxprune.api import prune
    from fxprune.recipes import RECIPES

    seen: dict[str, Any] = {}

    def prune_model(model: Any, **options: Any) -> None:
        seen.update(options)
        raise FxPruneError("seen enough")

    monkeypatch.setattr("fxprune.commands.prune.prune_model", prune_model)
    assert run("prune", "dense", "-o", "out", "--ratio", "0.2").status == 1
    signature = inspect.signature(prune).parameters
    for name in ("recipe", "seed", "calibration", "check"):
        assert seen[name] == signature[name].default, name
    assert not set(HOW) & set(seen)  # the recipe decides, as it does for the library
    assert all(signature[name].default is None for name in HOW)
    said = {k: v for k, v in RECIPES["default"].items() if k in fxprune.Selection.__dataclass_fields__}
    assert seen["selection"] == fxprune.Selection(ratio=0.2, **said) != fxprune.Selection(ratio=0.2)


def test_kinds_and_shares() -> None:
    assert kinds("ffn, kv_heads,") == ["ffn", "kv_heads"]
    assert kinds("ffn=1, kv_heads=.5") == {"ffn": 1.0, "kv_heads": 0.5}
    assert shares("0.25") == 0.25
    assert shares("ffn=0.3") == {"ffn": 0.3}


def raising(error: BaseException) -> Callable[..., None]:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    return fail


def test_exit_statuses(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("groups", "dense")
    monkeypatch.setattr("fxprune.commands.groups.run", raising(VerificationError("it differs")))
    assert run(*arguments) == Ran(1, "", "fxprune: it differs\n")
    wrapped = Exception("PassManager says")
    wrapped.__cause__ = VerificationError("it differs")
    monkeypatch.setattr("fxprune.commands.groups.run", raising(wrapped))
    assert run(*arguments) == Ran(1, "", "fxprune: it differs\n")
    with pytest.raises(Exception, match="PassManager says"):  # -vv is for tracebacks
        main([*arguments, "-vv"])
    monkeypatch.setattr("fxprune.commands.groups.run", raising(KeyboardInterrupt()))
    assert run(*arguments) == Ran(130, "", "fxprune: interrupted; nothing was written\n")
    monkeypatch.setattr("fxprune.commands.groups.run", raising(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError, match="a bug"):  # a bug is not dressed up as a user's mistake
        main([*arguments])


def test_a_wrong_network_is_not_written(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    original = fxprune.rewrite

    def sabotaged(*arguments: Any) -> Any:
        small = original(*arguments)
        with torch.no_grad():
            next(p for n, p in small.named_parameters() if n.endswith("down_proj.weight"))[0, 0] += 1
        return small

    monkeypatch.setattr("fxprune.api.rewrite", sabotaged)
    ran = run("prune", "dense", "-o", "out", "--ratio", "0.2", *PLAIN)
    assert (ran.status, ran.out) == (1, "")
    assert "fxprune: the pruned network differs from its reference (masked dense): relative error " in ran.said
    assert ran.said.endswith("allowed 1e-06; nothing was written")
