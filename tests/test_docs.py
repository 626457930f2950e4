"""What the documentation says is so: messages, settings, criteria, the public interface, links, pictures."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import fxprune
from fxprune.criteria import AGGREGATIONS, CRITERIA
from fxprune.data import Source
from fxprune.data.templates import contents
from fxprune.recipes import RECIPES, SETTINGS
from fxprune.recovery.settings import RECIPES as RECOVERIES

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def read(page: str) -> str:
    return (ROOT / "docs" / page).read_text()


def rows(text: str) -> list[list[str]]:
    """Cells of every table row; a bar within backquotes parts no cells."""
    found = []
    for line in text.splitlines():
        if line.startswith("|"):
            kept = re.sub(r"`[^`]*`", lambda code: code[0].replace("|", "\0"), line)
            found.append([cell.strip().replace("\0", "|") for cell in kept.strip("|").split("|")])
    return found


def code(cell: str) -> str:
    return cell.strip("`")


# ---------------------------------------------------------------------------------------------------------------------


@cache
def messages() -> frozenset[str]:
    """Every text in the source, with a hole where a value stands."""
    found = set()
    for path in [*(ROOT / "fxprune").rglob("*.py"), *(ROOT / "passes").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [str(p.value) if isinstance(p, ast.Constant) else "…" for p in node.values]
                found.add("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(re.sub(r"%\d*[dsr]|\{\}", "…", node.value))
    return frozenset(found)


def quoted() -> list[str]:
    return [
        m for line in read("troubleshooting.md").splitlines() if line.startswith("### ") for m in re.findall(r"`([^`]+)`", line)
    ]


def pattern(message: str) -> re.Pattern[str]:
    return re.compile(".*?".join(map(re.escape, message.split("…"))), re.DOTALL)


@pytest.mark.parametrize("message", quoted())
def test_each_message_of_troubleshooting_is_in_the_source(message: str) -> None:
    assert max(map(len, message.split("…"))) >= 8, "too little of it is text to find it by"
    assert any(pattern(message).search(text) for text in messages())


def test_a_message_that_does_not_exist_is_found_out() -> None:
    assert len(quoted()) > 30
    assert not any(pattern("there is no plot: run a SelectionPass").search(text) for text in messages())


def test_the_settings_of_recipes_are_all_there_with_their_values() -> None:
    table = {
        code(row[0]): row[1] for row in rows(read("recipes.md").partition("## The settings")[2].partition("## The named")[0])[2:]
    }
    shown = {"kinds": "`kv_heads, query_groups, ffn`", "protect": "nothing"}
    assert table == {name: shown.get(name, f"`{value}`") for name, value in SETTINGS.items()}
    assert SETTINGS["kinds"] == ("kv_heads", "query_groups", "ffn")
    assert SETTINGS["protect"] == ()


def test_the_settings_of_a_recovery_are_all_there_with_their_values() -> None:
    part = read("recovery.md").partition("## Settings")[2].partition("## How large")[0]
    table = {code(row[0]): row[1:3] for row in rows(part)[2:]}
    default, paper = (RECOVERIES[name].to_json() for name in ("default", "llm-pruner"))

    def shown(value: Any) -> str:
        plain = str(value).lower() if value is None or isinstance(value, bool) else value
        return f"`{plain:g}`" if isinstance(plain, float) else f"`{plain}`"

    assert table == {n: [shown(v), "" if paper[n] == v else shown(paper[n])] for n, v in default.items()}


def test_the_rows_that_recovery_shows_are_read() -> None:
    part = re.findall(r"```json\n(.*?)```", read("recovery.md"), re.DOTALL)
    found = [contents(json.loads(line), Source("a.jsonl")) for line in part[0].splitlines()]
    assert found == [
        "Name a colour of the sky.\n\nBlue.",
        "The sky is\n blue.",
        "What colour is the sky?\nBlue.",
        "The sky is blue because air scatters short waves more than long ones.",
    ]


def said(name: str, value: Any) -> str:
    if isinstance(value, dict):
        return f"`{name}: {{{', '.join(f'{k}: {v}' for k, v in value.items())}}}`"
    return f"`{name}: [{', '.join(value)}]`" if isinstance(value, tuple) else f"`{name}: {value}`"


def test_the_named_recipes_are_all_there_with_their_settings() -> None:
    table = {code(row[0]): row[1] for row in rows(read("recipes.md").partition("## The named")[2].partition("## The file")[0])[2:]}
    assert table.keys() == RECIPES.keys()
    for name, recipe in RECIPES.items():
        differing = {key: value for key, value in recipe.items() if value != SETTINGS[key]}
        assert table[name] == ", ".join(said(key, value) for key, value in differing.items()), name


def test_the_criteria_are_all_there_with_their_formulas() -> None:
    text = read("criteria.md")
    table = [(code(row[0]), code(row[1])) for row in rows(text.partition("## Your own")[0])[2:]]
    assert table == [(c.name, c.formula) for c in CRITERIA.values()]
    assert all(f"`{name}`" in text for name in AGGREGATIONS)
    fields = [code(name) for row in rows(text.partition("## Your own")[2])[2:] for name in row[0].split(", ")]
    assert fields == ["name", "formula", "element", "gradient", "per_sample", "signed", "accumulate", "feature"]
    assert set(fields) == set(inspect.signature(next(iter(CRITERIA.values())).__class__).parameters)


def test_the_public_interface_is_all_there() -> None:
    listed = [(code(row[0]), row[1]) for row in rows(read("api.md")) if row[0].startswith("`")]
    expected = {f"fxprune.{name}" for name in fxprune.__all__ if not name.startswith("__")}
    expected |= {f"fxprune.passes.{name}" for name in importlib.import_module("fxprune.passes").__all__}
    assert {name for name, _ in listed} == expected
    assert len(listed) == len(expected)
    for name, kind in listed:
        where, _, own = name.rpartition(".")
        assert inspect.isclass(getattr(importlib.import_module(where), own)) == (kind == "class"), name


# ---------------------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of headings."""
    heads = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        found = page.parent / file if file else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_page_can_be_reached() -> None:
    reached, ahead = set(), [ROOT / "docs" / "index.md"]
    while ahead:
        page = ahead.pop()
        if page.exists() and page not in reached:
            reached.add(page)
            ahead += [(page.parent / t).resolve() for t in re.findall(r"\]\(([^)#\s]+\.md)[)#]", page.read_text())]
    assert {p.name for p in PAGES} <= {p.name for p in reached}


def test_the_picture_of_units_is_what_the_graph_says() -> None:
    path = ROOT / "docs" / "images" / "make_units.py"
    spec = importlib.util.spec_from_file_location("make_units", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.make() == path.with_name("units.svg").read_text()
