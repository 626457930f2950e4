"""The commands prune, verify, eval and groups: what each prints where, and what it writes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import fxprune
from fxprune.commands.common import describe_widths

from .command import PLAIN, ROOT, Run
from .zoo import VOCABULARY


def test_prune_prints_the_directory_and_tells_the_rest_on_stderr(run: Run, place: Path) -> None:
    ran = run(
        *("prune", "dense", "-o", "out", "--ratio", "0.2", "--calibration", "text.txt", "--samples", "6", "--length", "16"),
        *("--batch-size", "4", "--criterion", "taylor2", "--multiple", "ffn=4", "--seed", "3", "--recipe", "uniform"),
        *("--levels", "2", "--sensitivity-samples", "2", "--rounds", "2", "--compensation", "least-squares"),
    )
    assert (ran.status, ran.out) == (0, "out\n")
    report = json.loads((place / "out" / "fxprune_report.json").read_text())
    assert f"parameters {report['parameters_before']:,} -> {report['parameters_after']:,}" in ran.said
    assert "verified relative error" in ran.said
    assert "against the masked dense" in ran.said
    assert "form: uniform" in ran.said
    recipe = report["recipe"]
    assert (recipe["ranking"], recipe["levels"], recipe["sensitivity_samples"], recipe["rounds"]) == ("measured", 2, 2, 2)
    assert (recipe["compensation"], report["compensation"]["method"]) == ("least-squares", "least-squares")
    assert (recipe["criterion"], recipe["samples"], recipe["length"], recipe["seed"], recipe["multiple"]) == (
        "taylor2",
        6,
        16,
        3,
        {"ffn": 4},
    )
    assert recipe["calibration"] == "6 x 16 tokens of text.txt, seed 3"
    assert report["verify"]["ok"]
    model = fxprune.load(place / "out")
    assert sum(p.numel() for p in model.parameters()) == report["parameters_after"]
    shutil.rmtree(place / "out")


def test_prune_in_a_process_of_its_own(place: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "fxprune.cli", "prune", str(place / "dense"), "--criterion", "l1", "--dtype", "bfloat16"]
    command += ["-o", str(tmp_path / "out"), "--units", "ffn=0.5,kv_heads=0.5", "-v", "--no-verify"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, f"{tmp_path / 'out'}\n"), done.stderr
    assert "trace: " in done.stderr  # -v says what is done
    assert "verified" not in done.stderr
    report = json.loads((tmp_path / "out" / "fxprune_report.json").read_text())
    assert report["verify"] is None
    assert report["bytes_after"] == 2 * report["parameters_after"]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    bad = subprocess.run([*command[:4], "-o"], cwd=tmp_path, capture_output=True, text=True, check=False, env=environment)
    assert (bad.returncode, bad.stdout) == (2, "")
    assert bad.stderr.splitlines() == [
        "fxprune prune: error: argument -o/--output: expected one argument",
        "fxprune prune --help shows what it takes",
    ]


def test_a_plan_is_replayed(run: Run, place: Path, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "again"
    ran = run("prune", "dense", "-o", str(out), "--plan", "checkpoint/fxprune_plan.json")
    assert ran.status == 0
    one, other = load_file(checkpoint / "model.safetensors"), load_file(out / "model.safetensors")
    assert one.keys() == other.keys()
    assert all(torch.equal(t, other[n]) for n, t in one.items())
    was = (out / "fxprune_report.json").stat().st_ino
    ran = run("prune", "dense", "-o", str(out), "--overwrite", "--plan", str(out / "fxprune_plan.json"))  # the plan it replaces
    assert ran.status == 0
    assert (out / "fxprune_report.json").stat().st_ino != was
    for more, said in (
        (("--criterion", "l1"), "--plan is replayed as it is, and chooses no units: leave out --criterion"),
        (
            ("--recipe", "flap"),
            "--plan is replayed as it is, and chooses no units: leave out --recipe, or give --compensation with it",
        ),
        (
            ("--calibration", "text.txt"),
            "--plan is replayed as it is, and reads no text: leave out --calibration, or give --compensation",
        ),
        (("--compensation", "least-squares", "--rounds", "2"), "chooses no units: leave out --rounds"),
    ):
        ran = run("prune", "dense", "-o", str(tmp_path / "third"), "--plan", "checkpoint", *more)
        assert ran.status == 2
        assert said in ran.said
    ran = run("prune", "other", "-o", str(tmp_path / "third"), "--plan", "checkpoint")
    assert ran.status == 2
    assert "the plan was made for another model (fingerprint " in ran.said
    assert os.listdir(tmp_path) == ["again"]


def test_windows_are_no_longer_than_the_model_reads(run: Run) -> None:
    (measured,) = json.loads(run("eval", "dense", "--text", "text.txt", "--json").out)["perplexities"]
    assert (measured["length"], measured["stride"]) == (64, 64)


def test_widths_in_words() -> None:
    widths = {"a.0.ffn": [64, 17], "a.1.ffn": [64, 48], "a.0.heads": [4, 3]}
    assert describe_widths(widths, ["a.5"], {"a.2.ffn": 64, "a.3.other": 7}) == [
        "dropped: a.5",
        "a.*.ffn: 64 -> 17 to 48 in 2 of 3, the others whole",
        "a.*.heads: 4 -> 3",
    ]


def test_a_replay_says_how_it_was_made(run: Run, place: Path, tmp_path: Path) -> None:
    """What the plan's recipe says of compensation holds only if it was done again."""
    text = ("--calibration", "text.txt", "--samples", "6", "--length", "16")
    one, two, three = (tmp_path / name for name in ("one", "two", "three"))
    made_up = ("--compensation", "least-squares", *text)
    assert run("prune", "dense", "-o", str(one), "--ratio", "0.2", "--criterion", "l2", *made_up).status == 0
    ran = run("prune", "dense", "-o", str(two), "--plan", str(one))
    note = "the plan was made with compensation (least-squares), which a replay leaves out unless it is asked for"
    assert note in ran.said
    said = json.loads((two / "fxprune_report.json").read_text())["recipe"]
    assert (said["replayed"], said["compensation"]) == (True, "none")
    assert not (two / "fxprune_recipe.yaml").exists()
    assert "```bash\nfxprune prune dense --plan fxprune_plan.json -o two\n```" in (two / "README.md").read_text()
    assert run("prune", "dense", "-o", str(three), "--plan", str(one), *made_up[:4]).status == 0
    weights = [load_file(directory / "model.safetensors") for directory in (one, two, three)]
    assert all(torch.equal(t, weights[2][n]) for n, t in weights[0].items())
    assert not all(torch.equal(t, weights[1][n]) for n, t in weights[0].items())
    card = " ".join((three / "README.md").read_text().replace("\\\n", "").split())
    command = "fxprune prune dense --plan fxprune_plan.json --compensation least-squares --samples 6 --length 16 --batch-size 8"
    assert f"{command} --calibration text.txt -o three" in card


@pytest.mark.parametrize(
    ("options", "drop"),
    [(("--ratio", "0.25", *PLAIN), []), (("--units", "0.5", "--kinds", "layers"), ["model.layers.1"]), (("--plan", "PLAN"), [])],
)
def test_a_dry_run_tells_the_effect_and_writes_nothing(
    options: tuple[str, ...], drop: list[str], run: Run, checkpoint: Path
) -> None:
    """That nothing is written, the fixture checks."""
    given = [str(checkpoint / "fxprune_plan.json") if o == "PLAN" else o for o in options]
    ran = run("prune", "dense", "--dry-run", "--json", *given)
    assert (ran.status, ran.err) == (0, "")
    told = json.loads(ran.out)
    before, after = told["before"], told["after"]
    assert told["drop"] == drop
    report = json.loads((checkpoint / "fxprune_report.json").read_text())
    assert before["parameters"] == report["parameters_before"]
    assert before["bytes"] == 4 * before["parameters"]
    assert before["macs"] == before["parameters"] - VOCABULARY * 48 - 5 * 48  # all but the embedding and the norms
    if not drop:
        assert after["parameters"] == report["parameters_after"]
        assert after["macs"] == after["parameters"] - VOCABULARY * 48 - 5 * 48
        assert told["keep"] == {n: width for n, (_, width) in report["widths"].items()}
    shown = run("prune", "dense", "--dry-run", *given).out
    for key in ("parameters", "bytes", "macs"):
        assert f"{before[key]:,}" in shown
        assert f"{after[key]:,}" in shown
    assert f"{after['parameters'] / before['parameters'] - 1:+.1%}" in shown
    assert ("note: scored by magnitude, without calibration; the widths of a real run may differ" in shown) == (
        "PLAN" not in options
    )


def test_a_dry_run_says_what_form_a_real_run_has(run: Run) -> None:
    said = "a real run measures the loss, and every layer gets widths of its own: fxprune.load reads those"
    for recipe, told in (("default", True), ("uniform", False), ("magnitude", False)):
        ran = run("prune", "dense", "--dry-run", "--ratio", "0.1", "--recipe", recipe, "--json")
        assert (said in json.loads(ran.out)["note"]) is told


def test_what_a_criterion_without_text_leaves_of_the_recipe(run: Run, tmp_path: Path) -> None:
    said = "recipe none: l2 reads no text, so nothing is measured or compensated; --recipe says otherwise"
    for number, (more, told) in enumerate((((), True), (("--recipe", "magnitude"), False))):
        ran = run("prune", "dense", "--ratio", "0.1", "--criterion", "l2", *more, "-o", str(tmp_path / f"told{number}"))
        assert (ran.status, said in ran.said) == (0, told)


def test_a_dry_run_needs_no_tokenizer_and_no_gradient(run: Run) -> None:
    ran = run("prune", "other", "--dry-run", "--json", "--ratio", "0.2", "--criterion", "taylor_mixed")
    assert ran.status == 0
    assert json.loads(ran.out)["after"]["parameters"] < json.loads(ran.out)["before"]["parameters"]


def test_verify_accepts_a_checkpoint(run: Run, checkpoint: Path) -> None:
    ran = run("verify", "checkpoint", "--dense", "dense", "--json")
    assert (ran.status, ran.err) == (0, "")
    told = json.loads(ran.out)
    assert told["ok"]
    assert told["max_rel_error"] <= told["tolerance"] == 1e-4
    ran = run("verify", "checkpoint", "--dense", "dense")
    error = f"relative error {told['max_rel_error']:.1e}, allowed 1e-04"
    assert ran.out == f"'checkpoint' equals its reference ({told['reference']}): {error}\n"
    ran = run("verify", "checkpoint", "--dense", "other")
    assert ran.status == 1
    assert "the plan was made for another model (fingerprint " in ran.said


def tampered(checkpoint: Path, to: Path, how: str) -> Path:
    shutil.copytree(checkpoint, to)
    file = to / "model.safetensors"
    if how == "one weight":
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] += 3
        save_file(tensors, file, metadata={"format": "pt"})
    elif how == "another shape":
        tensors = load_file(file)
        tensors["model.layers.1.mlp.down_proj.weight"] = torch.ones(3, 3)
        save_file(tensors, file, metadata={"format": "pt"})
    elif how == "half":
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    elif how == "plan":
        plan = json.loads((to / "fxprune_plan.json").read_text())
        name = next(iter(plan["groups"]))
        size, units = plan["groups"][name]["size"], plan["groups"][name]["keep"]
        plan["groups"][name]["keep"] = sorted({*units[1:], next(u for u in range(size) if u not in units)})
        (to / "fxprune_plan.json").write_text(json.dumps(plan))
    else:
        (to / "fxprune_plan.json").write_text("{")
    return to


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("one weight", "' differs from the masked dense model: relative error "),
        ("another shape", "cannot load a causal language model from '"),
        ("half", "incomplete metadata, file not fully covered"),
        ("plan", "' differs from the masked dense model: relative error "),
        ("no plan", "' is not JSON: "),
    ],
)
@pytest.mark.filterwarnings("ignore")  # what transformers says of a damaged file
def test_verify_finds_tampering(how: str, said: str, run: Run, checkpoint: Path, tmp_path: Path) -> None:
    ran = run("verify", str(tampered(checkpoint, tmp_path / "bad", how)), "--dense", "dense")
    assert ran.status == 1
    assert said in ran.said


def test_verify_tells_what_changed_the_weights_since(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    assert run("prune", "dense", "-o", out, *PLAIN, "--units", "ffn=0.5", "--compensation", "least-squares").status == 0
    ran = run("verify", out, "--dense", "dense")
    assert ran.status == 0
    assert ran.out.startswith(f"the plan of '{out}', applied to the dense model, equals its reference (masked dense")
    told = json.loads(run("verify", out, "--dense", "dense", "--json").out)
    assert told["changed_by"] == ["compensation (least-squares)"]
    assert told["parameters"] - told["slices_of_the_dense_model"] == 2  # down_proj of two layers
    assert (
        f"besides being cut, weights were changed by compensation (least-squares): {told['slices_of_the_dense_model']} of "
        f"{told['parameters']} weight tensors are the dense model's slices"
    ) in ran.out
    file = Path(out) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 3
    save_file(tensors, file, metadata={"format": "pt"})
    ran = run("verify", out, "--dense", "dense")
    assert ran.status == 1
    assert "parameter 'model.layers.1.mlp.up_proj.weight' is not the dense model's slice, and nothing is known to have" in ran.said


def test_verify_reads_the_per_layer_form(run: Run, tmp_path: Path) -> None:
    out = str(tmp_path / "out")
    options = (*PLAIN, "--ratio", "0.25", "--ranking", "global", "--widths", "per-layer")
    ran = run("prune", "dense", "-o", out, *options)
    assert ran.status == 0
    assert "form: per-layer" in ran.said
    assert "no stock configuration expresses the plan: widths differ between layers" in ran.said
    assert run("verify", out, "--dense", "dense").status == 0
    measured = run("eval", out, "--text", "text.txt", "--length", "16")
    assert measured.out.startswith("perplexity ")


def test_eval_states_its_protocol(run: Run) -> None:
    options = ("--text", "text.txt", "--length", "16", "--stride", "8", "--max-windows", "5", "--batch-size", "2")
    ran = run("eval", "dense", *options)
    assert ran.status == 0
    assert ran.out.rstrip().endswith("on text.txt: 47 tokens, 5 windows of 16, stride 8")  # 15 + 4 * 8
    ran = run("eval", "dense", *options, "--json", "--latency")
    told = json.loads(ran.out)
    assert told["perplexity"]["tokens"] == 47
    assert (told["perplexity"]["text"], told["perplexity"]["stride"]) == ("text.txt", 8)
    assert told["latency"]["prompt"] == 64 - 16  # the model reads 64
    assert told["latency"]["decode_ms"] > 0
    ran = run("eval", "dense", *options, "--latency")
    assert "ms for 48 tokens, decode " in ran.out


def test_a_report_that_holds_something_else(run: Run, place: Path, checkpoint: Path) -> None:
    shutil.copytree(checkpoint, place / "copy")
    (place / "copy" / "fxprune_report.json").write_text("[]")
    ran = run("verify", "copy", "--dense", "dense")
    shutil.rmtree(place / "copy")
    assert (ran.status, ran.err) == (0, "")


def test_a_note_in_a_plan_may_be_anything(run: Run, tmp_path: Path, checkpoint: Path) -> None:
    plan = json.loads((checkpoint / "fxprune_plan.json").read_text())
    (tmp_path / "plan.json").write_text(json.dumps({**plan, "recipe": {**plan["recipe"], "note": 5}}))
    assert json.loads(run("prune", "dense", "--plan", str(tmp_path / "plan.json"), "--dry-run", "--json").out)["note"] == "5"


def test_groups(run: Run, tmp_path: Path) -> None:
    rows = json.loads(run("groups", "dense", "--json").out)
    assert {"hidden", "kv_heads", "query_groups", "head_dim", "ffn"} <= {r["kind"] for r in rows}
    assert [r for r in rows if r["prunable"]] == json.loads(run("groups", "dense", "--json", "--prunable").out) != rows
    ran = run("groups", "dense", "--json", "--export", str(tmp_path / "both.json"))
    assert json.loads(ran.out) == rows
    assert (tmp_path / "both.json").is_file()
    table = run("groups", "dense", "--meta", "--prunable").out
    assert "ffn" in table
    assert "embed_tokens.other" not in table
    assert "model.layers.1.mlp.ffn" in run("groups", "dense", "--expand").out
    ran = run("groups", "dense", "--why", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mlp.down_proj.weight")
    assert ran.status == 0
    assert "model.layers.0.mlp.ffn:\n" in ran.out
    assert "rule linear" in ran.out
    for name in ("groups.json", "groups.graphml", "groups.dot"):
        ran = run("groups", "dense", "--export", str(tmp_path / name))
        assert (ran.status, ran.out) == (0, "")
        assert f"wrote {tmp_path / name}" in "".join(ran.err.split("\n"))
        assert (tmp_path / name).stat().st_size > 1000
    ran = run("groups", "dense", "--export", str(tmp_path / "no" / "groups.json"))
    assert ran.status == 2
    assert "there is no directory" in ran.said
