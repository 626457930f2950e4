"""The model card: the hub's own reader takes it, its snippet loads the model, what was changed or stated stays."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

import fxprune
from fxprune.checkpoint.source import load_source
from fxprune.errors import UsageError
from fxprune.report import license_of, origin_of, source_name
from fxprune.reporting.card import card, is_ours
from fxprune.reporting.numbers import Record

from .command import PLAIN, Run
from .recovering import trained
from .reported import evaluation, full, recovery, report, write
from .zoo import build

HOSTILE = 'x"\n---\nlicense: mit\n---\n# `y`: {z} <script>'


def data_of(text: str) -> dict[str, Any]:
    return plain(ModelCard(text).data)


def plain(data: Any) -> dict[str, Any]:
    return dict(data.to_dict())


def test_the_metadata(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(card(Record("small", report(dense={**report()["dense"], "license": "apache-2.0"}))))
    found = ModelCard.load(tmp_path / "README.md")
    assert plain(found.data) == {
        "base_model": "org/dense",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["pruning", "structured-pruning", "fxprune", "custom_code"],
    }
    assert plain(ModelCardData(**yaml.safe_load(found.data.to_yaml()))) == plain(found.data)
    assert found.text.lstrip().startswith("# small")


@pytest.mark.parametrize(
    ("kind", "task", "auto"),
    [
        ("LlamaForCausalLM", "text-generation", "AutoModelForCausalLM"),
        ("GPT2LMHeadModel", "text-generation", "AutoModelForCausalLM"),
        ("BertForMaskedLM", "fill-mask", "BertForMaskedLM"),
        ("ViTForImageClassification", "image-classification", "ViTForImageClassification"),
        ("CLIPTextModel", None, "CLIPTextModel"),
    ],
)
def test_what_it_is_for(kind: str, task: str | None, auto: str) -> None:
    text = card(Record("small", report(form="uniform", dense={"name": "local", "hub": False, "class": kind, "dtype": "float32"})))
    assert data_of(text).get("pipeline_tag") == task
    assert "base_model" not in data_of(text), "a folder's name is no hub id"
    assert f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained('small')\n" in text
    assert "license" not in data_of(text)
    assert "This is `local` with 25.0% of its parameters removed by fxprune" in text


def test_how_each_form_is_loaded() -> None:
    uniform, own, module = (card(Record("small", report(form=form))) for form in ("uniform", "per-layer", "module"))
    assert "fxprune is not needed" in uniform
    assert "custom_code" not in uniform
    assert "from_pretrained('small', trust_remote_code=True)" in own
    assert "model = fxprune.load('small')" in own
    assert "Engines that build models from a stock configuration cannot load" in own
    assert "Engines" not in uniform
    assert "fxprune.load('small', model=dense)" in module
    assert data_of(module)["library_name"] == "fxprune"


def test_a_masked_lm_of_its_own_widths_is_loaded_by_its_auto_class(tmp_path: Path) -> None:
    model = build("bert")
    fxprune.prune(model, ratio=0.2, recipe="magnitude", widths="per-layer", kinds=["ffn"]).save_pretrained(tmp_path / "small")
    (code, _) = re.findall(r"```python\n(.*?)```", (tmp_path / "small" / "README.md").read_text(), re.DOTALL)
    assert "AutoModelForMaskedLM.from_pretrained('small', trust_remote_code=True)" in code
    assert "`AutoModelForMaskedLM.from_pretrained(dir, trust_remote_code=True)`" in (tmp_path / "small" / "report.md").read_text()
    names: dict[str, Any] = {}
    exec(code.replace("'small'", repr(str(tmp_path / "small"))), names)
    report = json.loads((tmp_path / "small" / "fxprune_report.json").read_text())
    assert report["form"] == "per-layer"
    assert sum(p.numel() for p in names["model"].parameters()) == report["parameters_after"]


def test_numbers_recipe_and_limits() -> None:
    text = card(Record("full", report(recovery=recovery()), evaluation()))
    assert "| parameters | 102,400 | 76,800 | -25.0% |" in text
    assert "| perplexity, wiki, 128 tokens | 40.00 | 50.00 | +25.0% |" in text
    assert "perplexity on held out of a.txt, b.jsonl: 40.25 before recovery, 31.50 after" in text
    assert "No recovery training" not in text
    assert "No task has been measured" not in text
    recipe = yaml.safe_load(re.findall(r"```yaml\n(.*?)```", text, re.DOTALL)[0])
    assert recipe == {k: v for k, v in report()["recipe"].items() if k in recipe}
    assert set(recipe) == {"criterion", "compensation", "samples", "length", "kinds", "ranking", "widths"}
    assert "fxprune recover PRUNED --data a.txt=1,b.jsonl=2" in text
    plain = card(Record("small", report()))
    assert "No recovery training has been done." in plain
    assert "No task has been measured" in plain
    assert "Calibration: 16 x 32 tokens of text.txt, seed 3." in plain
    assert "x86" not in plain.split("Versions:")[1], "the machine is not the hub's concern"


def test_hostile_names_stay_in_their_place() -> None:
    record = Record("small" + HOSTILE, report(dense={"name": HOSTILE, "hub": True, "class": HOSTILE}), evaluation())
    found = data_of(card(record))
    assert found["base_model"] == HOSTILE
    assert found.get("license") is None
    assert not re.search(r"(?m)^# `y`", re.sub(r"(?ms)^(`{3,})[^`\n]*\n.*?^\1$", "", ModelCard(card(record)).text))


def test_little_is_enough() -> None:
    text = card(Record("small", {}))
    assert data_of(text) == {"library_name": "transformers", "tags": ["pruning", "structured-pruning", "fxprune"]}
    assert "This is a dense model trained again by fxprune" in text
    assert is_ours(text)
    bad = card(Record("small", report(recovery=recovery(validation=[{"step": 8}]))))
    assert "This part of the report cannot be read: KeyError: 'perplexity'" in bad
    assert "This part of the report cannot be read: " in card(Record("small", report(recovery=recovery(best_step=7))))


def test_a_change_is_seen() -> None:
    text = card(full())
    assert is_ours(text)
    assert not is_ours(text.replace("76,800", "76,801"))
    assert not is_ours("# My model\n")
    assert not is_ours(text + "more")


def test_the_snippet_loads_the_model(run: Run, checkpoint: Path, place: Path) -> None:
    text = (checkpoint / "README.md").read_text()
    (snippet,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    run("--version")  # the fixture makes the place the working directory
    names: dict[str, Any] = {}
    exec(snippet, names)
    assert (
        sum(p.numel() for p in names["model"].parameters())
        == json.loads((checkpoint / "fxprune_report.json").read_text())["parameters_after"]
    )
    assert "This is `dense` with" in text
    assert str(place) not in text


def test_names_of_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "org" / "local").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert source_name("org/model") == ("org/model", True)
    assert source_name("org/local") == ("local", False)
    assert source_name(str(tmp_path / "mine") + "/") == ("mine", False)
    assert source_name("/gone/secret/place") == ("place", False)
    assert source_name("./gone/place") == ("place", False)
    cached = "/home/me/.cache/huggingface/hub/models--HuggingFaceTB--SmolLM2-135M/snapshots/abc"
    assert source_name(cached) == ("HuggingFaceTB/SmolLM2-135M", True)
    assert source_name("gpt2") == ("gpt2", False)
    assert source_name("") == ("", False)


def test_the_licence_of_the_dense_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert license_of(str(tmp_path)) is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_text("---\nlicense: apache-2.0\n---\n# A model\n")
    assert license_of(str(tmp_path)) == "apache-2.0"
    assert license_of("") is None, "a model without a place does not come from the working directory"
    for text in ("# no metadata\n", "---\nlicense: [\n---\n", "---\nlicense:\n- a\n---\n"):
        (tmp_path / "README.md").write_text(text)
        assert license_of(str(tmp_path)) is None, text
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: str(tmp_path / "cached.md"))
    (tmp_path / "cached.md").write_text("---\nlicense: mit\n---\n")
    assert license_of("org/model") == "mit"
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda name, file: None)
    assert license_of("org/model") is None


# --- where the model comes from --------------------------------------------------------------------------------------------------


@pytest.fixture
def small(checkpoint: Path, tmp_path: Path) -> Path:
    """A checkpoint whose dense model was a local directory: nothing says what it is called on the hub."""
    shutil.copytree(checkpoint, tmp_path / "small")
    fxprune.render_report(tmp_path / "small")
    assert base_of(tmp_path / "small") is None
    return tmp_path / "small"


def base_of(directory: Path) -> Any:
    return ModelCard.load(directory / "README.md").data.base_model


def written(directory: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((directory / "fxprune_report.json").read_text())
    return found


def test_a_base_model_is_stated_and_stays(run: Run, small: Path, text: Path, tmp_path: Path) -> None:
    before, card = written(small), (small / "README.md").read_text()
    ran = run("report", str(small), "--base-model", "org/dense")
    assert (ran.status, ran.err) == (0, "")
    assert ran.out.split() == [str(small / n) for n in ("report.html", "report.md", "fxprune_recipe.yaml", "README.md")]
    assert base_of(small) == "org/dense"
    assert written(small) == {**before, "dense": {**before["dense"], "base_model": "org/dense"}}
    body = card.partition("\n---\n")[2].rpartition("\n<!--")[0]
    assert body in (small / "README.md").read_text(), "the model it was made from is called what it was called"
    assert run("report", str(small)).status == 0
    assert base_of(small) == "org/dense"
    trained(str(small), str(text), max_steps=1, output=tmp_path / "recovered")
    assert base_of(tmp_path / "recovered") == "org/dense"
    assert run("prune", str(small), "--ratio", "0.1", "-o", str(tmp_path / "again"), *PLAIN).status == 0
    assert base_of(tmp_path / "again") == "org/dense"
    assert written(tmp_path / "again")["dense"]["name"] == "small"
    fxprune.render_report(small, base_model="gpt2")
    assert base_of(small) == "gpt2"


@pytest.mark.parametrize(
    "said", ["", "./dense", "a/b/c", "/models/dense", "org/", "https://huggingface.co/org/dense", "two words", "org/dense.git"]
)
def test_what_is_no_hub_id(run: Run, small: Path, said: str) -> None:
    before = {path.name: path.read_bytes() for path in small.iterdir()}
    ran = run("report", str(small), "--base-model", said)
    assert (ran.status, ran.out) == (2, "")
    assert ran.said == (f"fxprune: '{said}' is no hub id: it has the form name or owner/name, as in HuggingFaceTB/SmolLM2-135M")
    assert {path.name: path.read_bytes() for path in small.iterdir()} == before
    with pytest.raises(UsageError, match="is no hub id"):
        fxprune.render_report(small, base_model=said)


def test_on_a_card_that_somebody_changed_it_is_left_to_them(run: Run, small: Path, tmp_path: Path, text: Path) -> None:
    mine = (small / "README.md").read_text().replace("## Limits", "## What I found out")
    (small / "README.md").write_text(mine)
    ran = run("report", str(small), "--base-model", "org/dense")
    assert (ran.status, "README.md" in ran.out) == (0, False)
    assert ran.said == (
        f"'{small}/README.md' has been changed by somebody and is left as it is: write 'base_model: org/dense' among its metadata "
        "yourself"
    )
    assert (small / "README.md").read_text() == mine
    trained(str(small), str(text), max_steps=1, output=tmp_path / "recovered")
    assert base_of(tmp_path / "recovered") == "org/dense"


def test_a_report_of_little_takes_it_too(tmp_path: Path) -> None:
    fxprune.render_report(write(tmp_path / "old", {"removed": 0.25}), base_model="org/dense")
    assert base_of(tmp_path / "old") == "org/dense"
    fxprune.render_report(write(tmp_path / "other", report()), base_model="org/stated")
    assert base_of(tmp_path / "other") == "org/stated", "what is stated is asked before what it was loaded by"
    assert written(tmp_path / "other")["dense"]["name"] == "org/dense"


def test_only_what_is_certain_is_taken_from_a_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: Path) -> None:
    def origin(name: str, dense: Any) -> str | None:
        return origin_of(str(write(tmp_path / name, report(dense=dense))))

    assert origin("hub", {"name": "org/dense", "hub": True}) == "org/dense"
    assert origin("local", {"name": "dense", "hub": False}) is None
    assert origin("stated", {"name": "dense", "hub": False, "base_model": "org/x"}) == "org/x"
    assert origin("damaged", [1]) is None
    (tmp_path / "hub" / "fxprune_report.json").write_text("{")
    assert origin_of(str(tmp_path / "hub")) is None
    monkeypatch.chdir(tmp_path / "stated")
    assert origin_of("") is None, "a model without a place does not come from the working directory"
    shutil.copytree(place / "dense", tmp_path / "instruct")
    (tmp_path / "instruct" / "README.md").write_text("---\nbase_model: org/base\nlicense: mit\n---\n# Instruct\n")
    model, _ = load_source(tmp_path / "instruct")
    found = fxprune.prune(model, units={"ffn": 0.5}, criterion="l1").report.dense
    assert (found["name"], found["license"], "base_model" in found) == ("instruct", "mit", False)
