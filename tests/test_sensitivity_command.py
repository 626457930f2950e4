"""``fxprune sensitivity``, and ``fxprune prune --knowledge`` with what it wrote."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

from fxprune import Knowledge
from fxprune.calibration import load_calibration

from .command import PLAIN, ROOT, Run

TEXT = ("--text", "text.txt", "--samples", "4", "--length", "12", "--batch-size", "2", "--seed", "3")


@pytest.fixture(scope="module")
def written(place: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A measurement of the model, by the command."""
    from fxprune.cli import main

    file = tmp_path_factory.mktemp("measured") / "sensitivity.json"
    text = [str(place / word) if word == "text.txt" else word for word in TEXT]
    assert main(["sensitivity", str(place / "dense"), *text, "-o", str(file)]) == 0
    return file


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fxprune.commands.common.load_source", fail)


def test_the_numbers_are_those_of_the_model_on_the_text(place: Path, written: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "dense")
    tokenizer = AutoTokenizer.from_pretrained(place / "dense")
    batches, _ = load_calibration(place / "text.txt", model=model, tokenizer=tokenizer, samples=4, length=12, batch_size=2, seed=3)
    ids = torch.cat([batch["input_ids"] for batch in batches])
    found = Knowledge.load(written)
    assert found.text == "4 x 12 tokens of text.txt, seed 3"

    def loss() -> float:
        with torch.no_grad():
            return float(model(input_ids=ids, labels=ids).loss)

    dense = loss()
    assert found.loss == pytest.approx(dense, abs=1e-5)
    down = model.get_parameter("model.layers.1.mlp.down_proj.weight")
    (row,) = (r for r in found.rows if r.name == "model.layers.1.mlp.ffn")
    assert (row.removed, row.units) == (63, 64)
    changes = []
    for kept in range(64):  # which one stays, its importance says
        whole = down.detach().clone()
        down.data[:, [i for i in range(64) if i != kept]] = 0
        changes.append(loss() - dense)
        down.data.copy_(whole)
    assert min(abs(change - row.loss_change) for change in changes) < 1e-5
    assert abs(row.loss_change) > 1e-3


def test_the_answer_is_a_table_and_what_to_type(run: Run) -> None:
    ran = run("sensitivity", "dense", *TEXT, "--protect-share", "0.25", "--by", "divergence", "--share", "0.5", "--take", "most")
    assert ran.status == 0
    assert ran.err == ""
    lines = ran.out.splitlines()
    assert " ".join(lines[1].split()) == "rank group or block kind layer removed loss perplexity divergence protected"
    told = json.loads(run("sensitivity", "dense", *TEXT, "--by", "divergence", "--share", "0.5", "--take", "most", "--json").out)
    found = Knowledge.from_json(told)
    assert (found.by, found.share, found.take) == ("divergence", 0.5, "most")
    groups, layers = ([r for r in found.ranked() if (r.kind == "layers") is blocks] for blocks in (False, True))
    shown = [f"{r.name} ({r.divergence:+.3g})" for r in groups]
    assert lines[-3] == f"groups that matter most: {', '.join(shown[:3])}; least: {shown[3]}"
    shown = [f"{r.name} ({r.divergence:+.3g})" for r in layers]
    assert lines[-2] == f"layers that matter most: {', '.join(shown)}"
    (name,) = found.protected(0.25)
    command = f"fxprune prune dense --ratio 0.2 --widths per-layer --protect {name}"
    assert lines[-1] == f"to keep what matters most whole: {command} -o DIR"


def test_without_a_text_the_model_writes_its_own(run: Run) -> None:
    ran = run("sensitivity", "other", "--samples", "2", "--length", "8", "--json", "--kinds", "ffn", "--criterion", "l1")
    assert ran.status == 0
    found = Knowledge.from_json(json.loads(ran.out))
    assert found.text == "2 x 8 tokens sampled from the model, seed 0"
    assert [r.name for r in found.rows] == ["transformer.h.0.mlp.ffn", "transformer.h.1.mlp.ffn"]
    ran = run("sensitivity", "other", "--samples", "2", "--length", "8", "--kinds", "layers", "--protect-share", "0.5")
    command = "fxprune prune other --ratio 0.2 --kinds layers --protect transformer.h."
    assert ran.out.splitlines()[-1].startswith(f"to keep what matters most whole: {command}")
    ran = run("sensitivity", "other", "--samples", "2", "--length", "8", "--kinds", "layers", "--protect-share", "0")
    assert ran.out.splitlines()[-1].startswith("layers that matter most: ")


def test_what_it_writes_and_what_it_says_to_type_next_work(run: Run, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    file, picture = tmp_path / "a b.json", tmp_path / "a.png"
    ran = run("sensitivity", "dense", *TEXT, "-o", str(file), "--plot", str(picture), "--protect-share", "0.5")
    assert ran.status == 0
    assert {p.name for p in tmp_path.iterdir()} == {"a b.json", "a.png"}
    assert picture.read_bytes().startswith(b"\x89PNG")
    names = Knowledge.load(file).protected(0.5)
    plans = []
    for line in ran.out.splitlines()[-2:]:
        words = shlex.split(line.partition(": ")[2])
        assert words[:2] == ["fxprune", "prune"]
        assert words[-2:] == ["-o", "DIR"]
        done = run(*words[1:-2], "-o", str(tmp_path / "out"), *PLAIN, "--overwrite")
        assert done.status == 0
        assert f"left whole {', '.join(names)}" in done.said
        plans.append(json.loads((tmp_path / "out" / "fxprune_plan.json").read_text()))
    assert ["--knowledge" in line for line in ran.out.splitlines()[-2:]] == [True, False]
    for plan in plans:
        assert set(plan["recipe"]["protect"]) == set(names)
        assert not set(plan["groups"]) & set(names)
        assert len(plan["groups"]) == 2
    assert plans[0]["groups"] == plans[1]["groups"]


def test_prune_keeps_a_tenth_of_the_kinds_that_it_prunes(run: Run, written: Path) -> None:
    found = Knowledge.load(written)
    per_layer = ("--widths", "per-layer", *PLAIN)
    ran = run("prune", "dense", "--dry-run", "--json", "--units", "0.5", "--knowledge", str(written), *per_layer)
    assert ran.status == 0
    kept = json.loads(ran.out)["keep"]
    assert {r.name for r in found.rows if r.kind != "layers"} - set(kept) == set(found.protected(0.1))
    ran = run("prune", "dense", "--dry-run", "--json", "--units", "ffn=0.5", "--knowledge", str(written), *per_layer)
    (name,) = found.protected(0.1, ["ffn"])
    assert set(json.loads(ran.out)["keep"]) == {f"model.layers.{i}.mlp.ffn" for i in (0, 1)} - {name}
    ran = run("prune", "dense", "--dry-run", "--json", "--units", "0.5", "--kinds", "layers", "--knowledge", str(written))
    (block,) = found.protected(0.1, ["layers"])
    assert json.loads(ran.out)["drop"] == [f"model.layers.{i}" for i in (0, 1) if f"model.layers.{i}" != block]
    both = ("--protect", "model.layers.0.mlp.ffn", "--protect", "model.layers.1.mlp.ffn", "--kinds", "ffn,kv_heads")
    ran = run("prune", "dense", "--dry-run", "--json", "--units", "0.5", "--knowledge", str(written), *both, *per_layer)
    assert not {n for n in json.loads(ran.out)["keep"] if n.endswith("ffn")}  # what is typed is kept as well
    ran = run(
        "prune", "dense", "--dry-run", "--json", "--units", "0.5", "--knowledge", str(written), "--protect-share", "0", *per_layer
    )
    assert len(json.loads(ran.out)["keep"]) == 4


def test_the_commands_of_the_documentation(run: Run, place: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    (shell,) = re.findall(r"^```bash\n(.*?)^```", (ROOT / "docs" / "sensitivity.md").read_text(), flags=re.MULTILINE | re.DOTALL)
    real = {"my-model": "dense", "wiki.txt": "text.txt", **{n: str(tmp_path / n) for n in ("sensitivity.json", "sensitivity.png")}}
    real["my-model-20"] = str(tmp_path / "out")
    small = {"sensitivity": ("--samples", "4", "--length", "12"), "prune": (*PLAIN, "--widths", "per-layer")}
    for line in shell.splitlines():
        words = [real.get(word, word) for word in shlex.split(line)[1:]]
        assert run(*words, *small[words[0]]).status == 0
    assert {p.name for p in tmp_path.iterdir()} == {"sensitivity.json", "sensitivity.png", "out"}


class Cut:
    """Measures, and is interrupted before the third entry is on the disk."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from fxprune.passes.measuring import State

        self.added: list[str] = []
        real = State.add

        def add(state: State, name: str, entry: Any) -> None:
            if len(self.added) == 3:
                raise KeyboardInterrupt
            self.added.append(name)
            real(state, name, entry)

        monkeypatch.setattr(State, "add", add)


@pytest.fixture
def halfway(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[str]]:
    """A measurement that was interrupted."""
    file = tmp_path / "a.json"
    with monkeypatch.context() as patch:
        cut = Cut(patch)
        ran = run("sensitivity", "dense", *TEXT, "-o", str(file))
        assert ran.status == 130
        assert ran.said == "interrupted; the same command with --resume goes on"
        assert ran.out == ""
    assert [p.name for p in tmp_path.iterdir()] == ["a.json.measuring"]
    return file, cut.added


def test_an_interrupted_command_goes_on(
    halfway: tuple[Path, list[str]], run: Run, place: Path, written: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, before = halfway
    refused = run("sensitivity", "dense", *TEXT, "-o", str(file))
    assert refused.status == 2
    assert "a.json.measuring' holds a measurement that was cut short: go on with --resume, or delete it" in refused.said
    refused = run("sensitivity", "dense", *TEXT, "--share", "0.5", "-o", str(file), "--resume")
    assert refused.status == 2
    assert "a.json.measuring' holds the state of another measurement: share was 1, now 0.5. Repeat" in refused.said
    from fxprune.passes.measuring import State

    after: list[str] = []
    real = State.add

    def add(state: State, name: str, entry: Any) -> None:
        after.append(name)
        real(state, name, entry)

    monkeypatch.setattr(State, "add", add)
    ran = run("sensitivity", "dense", *TEXT, "-o", str(file), "--resume")
    assert ran.status == 0
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
    assert len(before) == 3
    assert len(after) == 4
    assert {*before, *after} == {"", *(r.name for r in Knowledge.load(written).rows)}
    assert Knowledge.load(file) == Knowledge.load(written)


def test_an_interrupted_command_that_keeps_nothing_says_so(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fxprune.passes.knowledge._Run.measure", interrupt)
    ran = run("sensitivity", "dense", *TEXT)
    assert (ran.status, ran.out, ran.said) == (130, "", "interrupted; nothing was written")


def test_a_measurement_is_not_lost_to_another(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "known.json"
    file.write_text("hours of work")
    ran = run("sensitivity", "dense", *TEXT, "--kinds", "layers", "-o", str(file))
    assert (ran.status, ran.out) == (2, "")
    assert ran.said == f"fxprune: '{file}' exists, and measuring takes its time: choose another output, or say --overwrite"
    assert file.read_text() == "hours of work"
    assert run("sensitivity", "dense", *TEXT, "--kinds", "layers", "-o", str(file), "--overwrite").status == 0
    assert {row.kind for row in Knowledge.load(file).rows} == {"layers"}


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--kinds", "heads"), "unknown kind 'heads'; did you mean 'kv_heads'? Choose from: channels, experts, ffn, "),
        (("--kinds", "ffn=0.5"), "kinds are names such as kv_heads, ffn, layers, in a list, got {'ffn': 0.5}"),
        (("--share", "0"), "the share of units to take away must be above 0 and at most 1, got 0.0"),
        (("--take", "none"), "unknown take 'none'; "),
        (("--by", "perplexity"), "unknown measure 'perplexity'; choose from: divergence, loss"),
        (("--criterion", "tailor1"), "unknown criterion 'tailor1'; did you mean 'taylor1'?"),
        (("--protect-share", "10"), "--protect-share must lie between 0 and 1 (0.1 protects a tenth), got 10.0"),
        (("--text", "missing.txt"), "there is no file 'missing.txt'"),
        (("--resume",), "--resume goes on with a measurement whose output is named with -o: name it"),
        (("-o", "out.txt"), "cannot write a measurement as 'out.txt': its name must end in .json"),
        (("-o", "nowhere/out.json"), "there is no directory 'nowhere' to write 'out.json' to"),
        (("--plot", "out.gif"), "cannot write a plot as 'out.gif': its name must end in one of .pdf, .png, .svg"),
        (("--plot", "nowhere/out.png"), "there is no directory 'nowhere' to write 'out.png' to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_refused_before_a_model_is_loaded(arguments: tuple[str, ...], said: str, run: Run) -> None:
    ran = run("sensitivity", "dense", *arguments)
    assert ran.status == 2
    assert said in ran.said
    assert ran.out == ""


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "cannot load a causal language model from 'nowhere' (there is no such directory"),
        (("dense", "--text", "short.txt"), "the calibration text 'short.txt' has 3 tokens, fewer than one sample of 64"),
        (("other", "--text", "text.txt"), "text needs a tokenizer, and there is none beside 'other'"),
        (("dense", *TEXT, "--kinds", "experts"), "this model has nothing of kind 'experts' that can be pruned; it has ffn, "),
        (
            ("dense", *TEXT, "--criterion", "wanda", "--kinds", "head_dim"),
            "there are no scores for group 'model.layers.head_dim': use ",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_refused(arguments: tuple[str, ...], said: str, run: Run) -> None:
    ran = run("sensitivity", *arguments)
    assert ran.status == 2
    assert said in ran.said
    assert ran.out == ""


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ("--protect-share", "0.1"),
            "--protect-share is a share of what fxprune sensitivity measured: name its file with --knowledge",
        ),
        (("--knowledge", "missing.json"), "cannot read 'missing.json': No such file or directory"),
        (
            ("--knowledge", "foreign.json"),
            "'foreign.json' cannot be used: this is not knowledge of format 1, as fxprune sensitivity writes it",
        ),
        (
            ("--knowledge", "FILE", "--protect-share", "2"),
            "--protect-share must lie between 0 and 1 (0.1 protects a tenth), got 2.0",
        ),
        (
            ("--knowledge", "FILE", "--kinds", "experts"),
            "has nothing of kind experts: measure that with fxprune sensitivity --kinds",
        ),
        (
            ("--knowledge", "FILE", "--recipe", "uniform"),
            "leaves single layers whole, and with --widths uniform all layers have one width: use --widths per-layer",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_prune_refuses_before_a_model_is_loaded(arguments: tuple[str, ...], said: str, run: Run, written: Path) -> None:
    given = [str(written) if word == "FILE" else word for word in arguments]
    ran = run("prune", "dense", "-o", "out", "--ratio", "0.2", *given)
    assert ran.status == 2
    assert said in ran.said


def test_prune_refuses_knowledge_of_another_model_and_beside_a_plan(run: Run, written: Path, place: Path, checkpoint: Path) -> None:
    ran = run("prune", "other", "-o", "out", "--ratio", "0.2", "--knowledge", str(written))
    assert ran.status == 2
    assert "the knowledge was measured on another model (fingerprint " in ran.said
    ran = run("prune", "dense", "-o", "out", "--plan", "checkpoint/fxprune_plan.json", "--knowledge", str(written))
    assert ran.status == 2
    assert "--plan replays a plan as it is: leave out --knowledge" in ran.said
