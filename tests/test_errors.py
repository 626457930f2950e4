"""Errors are part of the interface: their classes, and sentences that help on."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import fxprune.errors as errors
from fxprune.errors import FxPruneError, nearest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted({*(ROOT / "fxprune").rglob("*.py"), *(ROOT / "passes").rglob("*.py")})
KINDS = {
    "UsageError": ValueError,
    "RecipeError": ValueError,
    "CaptureError": RuntimeError,
    "PlanError": ValueError,
    "VerificationError": RuntimeError,
    "CheckpointError": RuntimeError,
}


@pytest.mark.parametrize("name", KINDS)
def test_each_error_is_ours_and_one_of_pythons(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, FxPruneError)
    assert issubclass(kind, KINDS[name])
    assert kind.__doc__


def test_no_error_class_is_missing_here() -> None:
    public = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, FxPruneError)}
    assert public == {"FxPruneError", *KINDS}


@pytest.mark.parametrize(
    ("typed", "choices", "tail"),
    [
        ("taylor1x", ["l1", "taylor1", "l2"], "did you mean 'taylor1'? Choose from: l1, l2, taylor1"),
        ("zzz", ["b", "a"], "choose from: a, b"),
        ("zzz", [], "choose from: (nothing: there are none)"),
        ("name7", [f"name{i:02}" for i in range(30)], "There are 30 to choose from, such as: name00, name01, "),
    ],
)
def test_the_nearest_choice(typed: str, choices: list[str], tail: str) -> None:
    assert tail in nearest(typed, iter(choices))


def test_the_nearest_of_many_is_still_named() -> None:
    said = nearest("name07x", [f"name{i:02}" for i in range(30)])
    assert said.startswith("did you mean 'name07'? There are 30 to choose from, such as: ")
    assert said.endswith(", ...")
    assert "name07, ..." in said
    assert "name08" not in said


def raised(tree: ast.AST) -> list[tuple[str, ast.expr]]:
    """Name and message of every error of ours that is raised."""
    calls = (n.exc for n in ast.walk(tree) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call))
    return [(c.func.id, c.args[0]) for c in calls if isinstance(c.func, ast.Name) and c.func.id in KINDS and c.args]


def literal(message: ast.expr) -> str:
    """What a message says, with ``{}`` for what is filled in."""
    if isinstance(message, ast.Constant):
        return str(message.value)
    if isinstance(message, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{}" for v in message.values)
    if isinstance(message, ast.BinOp):
        return literal(message.left) + literal(message.right)
    return ""


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_messages_are_sentences(path: Path) -> None:
    """Lower case, no full stop at the end (a command's name comes before, nothing after), no line breaks, and not two words."""
    for kind, message in raised(ast.parse(path.read_text())):
        said = literal(message)
        if not said:
            continue
        assert not re.match(r"[A-Z][a-z]", said), (kind, said)
        assert not said.endswith((".", "!", " ")), (kind, said)
        assert "\n" not in said, (kind, said)
        assert len(said.split()) > 3, (kind, said)
