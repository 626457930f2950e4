"""The commands in a report: they make the checkpoint again."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, cast

import yaml

from fxprune.lorashear.settings import settle
from fxprune.reporting.numbers import Record
from fxprune.reporting.page import page_of, render_markdown
from fxprune.reporting.recipe import prune_command, recipe_yaml

from .command import Run
from .reported import full, recovery, report, shearing
from .zoo import build


def markdown(record: Record) -> str:
    return render_markdown(page_of(record))


def test_the_command_makes_it_again(run: Run, place: Path, tmp_path: Path) -> None:
    options = ["--recipe", "wanda-sp", "--samples", "4", "--length", "16", "--calibration", "text.txt", "--seed", "5"]
    assert run("prune", "dense", "--units", "ffn=0.25,kv_heads=0.5", "-o", str(tmp_path / "one"), *options).status == 0
    text = (tmp_path / "one" / "report.md").read_text()
    command = re.findall(r"```bash\n(.+?)\n```", text, re.DOTALL)[0].replace("\\\n", " ").split()
    assert command[:3] == ["fxprune", "prune", "dense"]
    (place / "fxprune_recipe.yaml").write_text((tmp_path / "one" / "fxprune_recipe.yaml").read_text())
    try:
        assert run(*command[1:-1], str(tmp_path / "two")).status == 0
    finally:
        (place / "fxprune_recipe.yaml").unlink()
    one, two = (json.loads((tmp_path / n / "fxprune_plan.json").read_text()) for n in ("one", "two"))
    assert one == two


def test_what_a_command_cannot_know() -> None:
    """Text that was given in Python is for the reader to name; a dtype is not left to chance."""
    recipe = {"criterion": "taylor1", "ratio": 0.2, "calibration": "4 x 8 tokens of 2 given texts, seed 0"}
    for described, dtype, more in (
        ("4 x 8 tokens of 2 given texts, seed 0", "bfloat16", " --calibration TEXT --dtype bfloat16"),
        ("3 batches given", "float32", " --calibration TEXT"),
        ("4 x 8 tokens sampled from the model, seed 0", "float32", ""),
    ):
        made = {"recipe": {**recipe, "calibration": described}, "dense": {"name": "dense", "dtype": dtype}}
        command = prune_command(made, "out").replace(" \\\n   ", "")
        assert command == f"fxprune prune dense --recipe fxprune_recipe.yaml --ratio 0.2{more} -o out"


def test_a_model_that_is_stored_in_another_dtype(run: Run, place: Path, tmp_path: Path) -> None:
    """Read as it is stored it would be scored in another dtype."""
    cast(Any, build("llama")).bfloat16().save_pretrained(place / "half")
    try:
        options = ["--recipe", "magnitude", "--ratio", "0.2", "--dtype", "float32"]
        assert run("prune", "half", "-o", str(tmp_path / "out"), *options).status == 0
        assert run("prune", "dense", "-o", str(tmp_path / "same"), *options).status == 0
    finally:
        shutil.rmtree(place / "half")
    said = [(tmp_path / name / "report.md").read_text().count("--dtype float32") for name in ("out", "same")]
    assert said == [2, 0]  # the recipe's command and the replay's


def test_the_commands_of_a_recovery() -> None:
    trained = Record("full", report(recovery=recovery()))
    text = " ".join(markdown(trained).replace("\\\n", " ").split())
    assert (
        "fxprune recover PRUNED --data a.txt=1,b.jsonl=2 --curriculum dynamic --rounds 2 --floor 0.05 --patience 1 --threshold 0 "
        "--teacher org/dense --set lr=0.001 --set max_steps=12 -o full" in text
    )
    assert "fxprune prune org/dense --recipe fxprune_recipe.yaml --ratio 0.25 --calibration text.txt --seed 3 -o PRUNED" in text
    assert "fxprune prune org/dense --plan fxprune_plan.json -o PRUNED" in text
    alone = markdown(Record("x", report(recovery=recovery(curriculum=None, teacher=None, recipe="llm-pruner"))))
    assert "--data a.txt,b.jsonl --recipe llm-pruner --set rank=16" in " ".join(alone.replace("\\\n", " ").split())
    assert "fxprune prune org/dense --plan fxprune_plan.json -o x" in markdown(Record("x", report()))


def test_the_command_of_a_shearing() -> None:
    text = " ".join(markdown(full()).replace("\\\n", " ").split())
    assert "fxprune shear org/dense --recipe fxprune_recipe.yaml --ratio 0.25 --data a.txt=1,b.jsonl=2 --tokens 976 -o full" in text
    for other in ("fxprune prune", "fxprune recover", "--plan"):
        assert other not in text, "what LHSPG took is in the weights: no other command makes it again"
    settings = settle("lorashear", {"periods": 3, "lr": 1e-3}).to_json()
    data = {**shearing(), "settings": settings}
    kept = recipe_yaml({"shearing": data})
    assert settle(yaml.safe_load(kept), {}).to_json() == settings
    for budget, said in (({"tokens": None, "steps": 40}, "--steps 40 -o x"), ({"tokens": 900, "steps": None}, "--tokens 900 -o x")):
        asked = markdown(Record("x", report(shearing={**data, "budget": budget})))
        assert said in " ".join(asked.replace("\\\n", " ").split())
    later = recovery(curriculum=None, teacher=None, earlier=recovery())
    after = markdown(Record("x", report(shearing={**data, "tokens": {**data["tokens"], "recovery": 9}}, recovery=later)))
    after = " ".join(after.replace("\\\n", " ").split())
    assert "--data a.txt=1,b.jsonl=2 --tokens 176 -o PRUNED" in after
    assert "fxprune recover PRUNED --data a.txt,b.jsonl " in after
    alone = markdown(Record("x", report(shearing={**data, "lhspg": {**data["lhspg"], "sources": {"a.txt": {}}}})))
    assert "--ratio 0.25 --data a.txt --tokens 176" in " ".join(alone.replace("\\\n", " ").split())
