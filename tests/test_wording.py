"""How messages say things."""

from __future__ import annotations

import pytest

from fxprune.wording import as_typed

OPTIONS = {"widths", "protect_first", "kinds", "overwrite", "restart", "teacher", "ratio", "units", "curriculum", "block", "plan"}


@pytest.mark.parametrize(
    ("message", "typed"),
    [
        ("use widths='per-layer', or protect nothing", "use --widths per-layer, or protect nothing"),
        ("it exists: say overwrite=True (--overwrite)", "it exists: say --overwrite"),
        ("start over with --restart (restart=True)", "start over with --restart"),
        ("name a module with --block (block=)", "name a module with --block"),
        ("at most 3 % (kinds=ffn,kv_heads, protect_first=4): less", "at most 3 % (--kinds ffn,kv_heads, --protect-first 4): less"),
        ("give either ratio= (of all) or units= (of units)", "give either --ratio (of all) or --units (of units)"),
        ("pass the dense model, teacher=.", "pass the dense model, --teacher."),
        ("got ratio=0.2.", "got --ratio 0.2."),
        ("protect='model.*.3' matches nothing", "protect='model.*.3' matches nothing"),
        ("curriculum=fxprune.Curriculum(...)", "curriculum=fxprune.Curriculum(...)"),
        ('options={"plan": plan} and plan={...}', 'options={"plan": plan} and plan={...}'),
        ("use_cache=False keeps it inside", "use_cache=False keeps it inside"),
        ("overwrite=False", "overwrite=False"),
        ("'ratio=0.5' is no name, nor is 'a.plan=0.5'", "'ratio=0.5' is no name, nor is 'a.plan=0.5'"),
        ("fxprune.load(dir, model=dense)", "fxprune.load(dir, model=dense)"),
        ("protect_first must be 0", "--protect-first must be 0"),
        ("'protect_first' of protect_first.json", "'protect_first' of protect_first.json"),
        ("take static ones (weights='static', --curriculum static)", "take static ones (--curriculum static)"),
        ("with kinds=ffn, widths=uniform at most", "with --kinds ffn, --widths uniform at most"),
    ],
)
def test_keyword_arguments_are_said_as_the_options_of_the_command(message: str, typed: str) -> None:
    assert as_typed(message, OPTIONS) == typed
