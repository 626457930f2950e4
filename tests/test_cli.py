"""The command: what it prints where, what it refuses and how it ends."""

from __future__ import annotations

import json
import logging
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import fxprune
from fxprune._version import __version__
from fxprune.cli import kinds, main, shares
from fxprune.commands.prune import HOW
from fxprune.errors import FxPruneError, VerificationError

from .zoo import VOCABULARY, build

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ("--recipe", "magnitude", "--criterion", "l1")
"""Equal widths by magnitude, nothing measured and nothing made up for."""


def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a model, another without tokenizer, a text, and files that are none of these."""
    made = tmp_path_factory.mktemp("place")
    cast(PreTrainedModel, build("llama", tied=False)).save_pretrained(made / "dense")
    tokenizer().save_pretrained(made / "dense")
    cast(PreTrainedModel, build("gpt2")).save_pretrained(made / "other")
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
    out = place / "checkpoint"
    assert main(["prune", str(place / "dense"), "-o", str(out), "--ratio", "0.25", *PLAIN]) == 0
    return out


@dataclass
class Ran:
    status: int
    out: str
    err: str

    @property
    def said(self) -> str:
        """Standard error on one line: rich breaks long ones."""
        return " ".join(self.err.split())


Run = Callable[..., Ran]


@pytest.fixture
def run(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Run the command in the directory; nothing may be left there, unless a test takes it away."""
    monkeypatch.chdir(place)
    before = sorted(os.listdir(place))
    capsys.readouterr()

    def command(*arguments: str) -> Ran:
        try:
            status = main(list(arguments))
        except SystemExit as exit:
            status = cast(int, exit.code)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err)

    yield command
    assert sorted(os.listdir(place)) == before
    logging.getLogger("fxprune").setLevel(logging.NOTSET)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fxprune.commands.common.load_source", fail)


# --- help ------------------------------------------------------------------------------------------------------------------------


def test_help_needs_no_torch() -> None:
    code = """
import contextlib, io, sys
from fxprune.cli import main
for command in ([], ["prune"], ["groups"], ["verify"], ["eval"], ["recover"], ["demo"]):
    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        main([*command, "--help"])
    assert "usage: fxprune" in text.getvalue()
heavy = {"torch", "transformers", "rich", "numpy", "safetensors"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_help_answers_at_once() -> None:
    def seconds() -> float:
        start = time.perf_counter()
        subprocess.run([sys.executable, "-m", "fxprune.cli", "--help"], cwd=ROOT, capture_output=True, check=True)
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


# --- what is refused -------------------------------------------------------------------------------------------------------------

OUT = ("-o", "out")
RATIO = (*OUT, "--ratio", "0.2")
TARGET = "say what to remove: one of --ratio (share of all parameters), --units (share of units) and --plan (a file)"


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*OUT,), TARGET),
        ((*RATIO, "--units", "0.3"), TARGET),
        (("--ratio", "0.2"), "name an output directory with -o (or add --dry-run)"),
        ((*OUT, "--ratio", "0"), "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 0.0"),
        ((*OUT, "--ratio", "1"), "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 1.0"),
        ((*OUT, "--ratio", "1.5"), "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 1.5"),
        ((*OUT, "--ratio", "nan"), "a ratio must lie between 0 and 1 (0.2 removes 20 %), got nan"),
        ((*OUT, "--ratio", "abc"), "argument --ratio: invalid float value: 'abc'"),
        ((*OUT, "--units", "a,b"), "argument --units: 'a,b' is neither a number nor of the form kind=number,kind=number"),
        ((*OUT, "--units", "ffn=x"), "argument --units: 'ffn=x' is not of the form kind=number,kind=number"),
        ((*OUT, "--units", "fnn=0.3"), "unknown kind 'fnn'; did you mean 'ffn'? Choose from: "),
        ((*RATIO, "--kinds", "head,ffn"), "unknown kind 'head'; did you mean 'kv_heads'? Choose from: channels, experts, ffn, "),
        ((*RATIO, "--kinds", "0.5"), "unknown kind '0.5'; Choose from: "),
        ((*RATIO, "--kinds", ""), "no kind may be pruned: name at least one"),
        (
            (*RATIO, "--ranking", "globl"),
            "unknown ranking 'globl'; did you mean 'global'? Choose from: global, local, measured, standardised",
        ),
        ((*RATIO, "--widths", "unifrom"), "unknown widths 'unifrom'; did you mean 'uniform'? Choose from: per-layer, uniform"),
        (
            (*RATIO, "--criterion", "tailor1"),
            "unknown criterion 'tailor1'; did you mean 'taylor1'? Choose from: flap, kfac, l1, l2, random, ",
        ),
        ((*RATIO, "--aggregation", "som"), "unknown aggregation 'som'; did you mean 'sum'? Choose from: first, last, max, "),
        ((*RATIO, "--layers-by", "firts"), "unknown layers_by 'firts'; did you mean 'first'? Choose from: first, influence"),
        ((*RATIO, "--compensation", "least"), "unknown compensation 'least'; did you mean 'least-squares'? Choose from: bias, "),
        ((*RATIO, "--recipe", "flapp"), "unknown recipe 'flapp'; did you mean 'flap'? Choose from: channel, default, flap, "),
        ((*RATIO, "--recipe", "mine.yaml"), "there is no recipe file 'mine.yaml'"),
        ((*RATIO, "--levels", "0"), "levels must be at least 1, got 0"),
        ((*RATIO, "--rounds", "0"), "rounds must be at least 1, got 0"),
        ((*RATIO, "--sensitivity-samples", "0"), "sensitivity_samples must be at least 1, got 0"),
        ((*RATIO, "--multiple", "0"), "multiple must be a whole number, at least 1, got 0"),
        ((*RATIO, "--floor", "1"), "floor is a share of units from 0 up to (not including) 1, got 1.0"),
        ((*RATIO, "--protect-first", "-1"), "protect_first and protect_last are numbers of layers, got -1 and 0"),
        ((*RATIO, "--calibration", "missing.txt"), "there is no file 'missing.txt'"),
        ((*RATIO, "--plan", "foreign.json"), "--plan replays a plan as it is: leave out --ratio"),
        ((*OUT, "--plan", "foreign.json", "--kinds", "ffn"), "--plan replays a plan as it is: leave out --kinds"),
        ((*OUT, "--plan", "missing.json"), "there is no plan file 'missing.json'"),
        ((*RATIO, "--device", "gpu"), "cannot use device 'gpu': "),
        (
            (*RATIO, "--device", "meta"),
            "cannot use device 'meta': it holds no numbers; to see groups without weights, say groups --meta",
        ),
        ((*RATIO, "--colour"), "unrecognized arguments: --colour"),
        (("-o", "text.txt", "--ratio", "0.2"), "the output 'text.txt' is a file; name a directory"),
        (("-o", "text.txt/out", "--ratio", "0.2"), "cannot write 'text.txt/out': '{place}/text.txt' is a file"),
        (
            ("-o", "other", "--ratio", "0.2"),
            "the output directory 'other' exists and is not empty; choose another, or say overwrite",
        ),
        (("-o", "dense", "--ratio", "0.2", "--overwrite"), "the output 'dense' is the model itself; choose another directory"),
        (("-o", ".", "--ratio", "0.2", "--overwrite"), "the output directory '.' holds no checkpoint: it will not be replaced"),
    ],
    ids=lambda value: None if isinstance(value, str) else " ".join(value),
)
def test_prune_refuses_before_a_model_is_loaded(arguments: tuple[str, ...], said: str, run: Run, place: Path) -> None:
    ran = run("prune", "dense", *arguments)
    assert ran.status == 2
    assert said.format(place=place) in ran.said
    assert ran.out == ""


@pytest.mark.parametrize(
    ("arguments", "status", "said"),
    [
        (
            ("prune", "nowhere", *RATIO),
            2,
            "cannot load a causal language model from 'nowhere' (there is no such directory, and as a hub id",
        ),
        (("prune", "./nowhere", *RATIO), 2, "there is no directory './nowhere'"),
        (("prune", "nowhere.gguf", *RATIO), 2, "there is no file 'nowhere.gguf'"),
        (
            ("prune", "text.txt", *RATIO),
            2,
            "'text.txt' is a file; name a directory with a checkpoint in it, a hub id or a .gguf file",
        ),
        (("prune", "empty", *RATIO), 2, "'empty' holds no config.json: it is not a Hugging Face checkpoint"),
        (("prune", "dense", *RATIO, "--dtype", "bf16"), 2, "unknown dtype 'bf16'; did you mean 'bfloat16'? Choose from: auto, "),
        (
            ("prune", "dense", *RATIO, "--dtype", "int8"),
            2,
            "unknown dtype 'int8'; Choose from: auto, bfloat16, float16, float32, float64",
        ),
        (("prune", "dense", *RATIO, "--protect", "layer.0"), 2, "protect='layer.0' matches no group and no block; "),
        (("prune", "dense", *RATIO, "--kinds", "experts"), 2, "this model has no prunable group of kind experts; it has ffn, "),
        (
            ("prune", "dense", *RATIO, "--calibration", "short.txt"),
            2,
            "the calibration text 'short.txt' has 3 tokens, fewer than one",
        ),
        (
            ("prune", "other", *RATIO, "--calibration", "text.txt"),
            2,
            "calibration text needs a tokenizer, and there is none beside 'other'",
        ),
        (("prune", "dense", *OUT, "--ratio", "0.99"), 1, "a ratio of 99.0% cannot be reached: with these kinds, "),
        (("prune", "dense", *OUT, "--plan", "foreign.json"), 1, "this is not an fxprune plan of format 1"),
        (("prune", "dense", *OUT, "--plan", "text.txt"), 1, "'text.txt' is not JSON: "),
        (("verify", "nowhere", "--dense", "dense"), 2, "there is no directory 'nowhere'"),
        (("verify", "dense", "--dense", "dense"), 2, "'dense' holds no fxprune_plan.json: it is no checkpoint that fxprune wrote"),
        (("verify", "dense"), 2, "the following arguments are required: --dense"),
        (("eval", "dense"), 2, "the following arguments are required: --text"),
        (("eval", "dense", "--text", "missing.txt"), 2, "there is no file 'missing.txt'"),
        (("eval", "dense", "--text", "short.txt", "--length", "8"), 2, "the text has 3 tokens, fewer than one window of 8"),
        (("eval", "dense", "--text", "text.txt"), 2, "the model reads at most 64 tokens, fewer than one window of 128"),
        (
            ("eval", "dense", "--text", "text.txt", "--length", "1"),
            2,
            "length must be at least 2 and stride between 1 and length, got ",
        ),
        (("eval", "dense", "--text", "text.txt", "--length", "8", "--stride", "9"), 2, "got length=8, stride=9"),
        (("eval", "dense", "--text", "text.txt", "--length", "8", "--batch-size", "0"), 2, "must be at least 1, got batch_size=0"),
        (("eval", "dense", "--text", "text.txt", "--length", "8", "--max-windows", "0"), 2, "max_windows=0"),
        (("eval", "other", "--text", "text.txt"), 2, "there is no tokenizer beside 'other'"),
        (("groups", "dense", "--export", "groups.png"), 2, "cannot write a graph as 'groups.png': the suffix must be one of "),
        (("groups", "dense", "--why", "a.weight", "lm_head.weight"), 2, "the traced model has no parameter 'a.weight'; "),
        (("demo", "-o", "text.txt"), 2, "the output 'text.txt' is a file; name a directory"),
        (("demo", "-o", "."), 2, "the output directory '.' holds no checkpoint: it will not be replaced"),
        (("demo", "--ratio", "2"), 2, "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 2.0"),
        (("prun",), 2, "argument COMMAND: invalid choice: 'prun'"),
        ((), 2, "the following arguments are required: COMMAND"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_what_ends_badly_says_so_in_a_sentence(arguments: tuple[str, ...], status: int, said: str, run: Run) -> None:
    ran = run(*arguments)
    assert ran.status == status
    assert said in ran.said
    assert ran.out == ""
    assert "Traceback" not in ran.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu(run: Run) -> None:
    ran = run("groups", "dense", "--device", "cuda")
    assert ran.status == 2
    assert "cannot use device 'cuda': Torch not compiled with CUDA enabled" in ran.said or "NVIDIA" in ran.said


def test_kinds_and_shares() -> None:
    assert kinds("ffn, kv_heads,") == ["ffn", "kv_heads"]
    assert kinds("ffn=1, kv_heads=.5") == {"ffn": 1.0, "kv_heads": 0.5}
    assert shares("0.25") == 0.25
    assert shares("ffn=0.3") == {"ffn": 0.3}


# --- prune -----------------------------------------------------------------------------------------------------------------------


def test_prune_prints_the_directory_and_tells_the_rest_on_stderr(run: Run, place: Path) -> None:
    ran = run(
        *("prune", "dense", "-o", "out", "--ratio", "0.2", "--calibration", "text.txt", "--samples", "6", "--length", "16"),
        *("--batch-size", "4", "--criterion", "taylor2", "--multiple", "4", "--seed", "3", "--recipe", "uniform"),
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
        4,
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
    assert bad.stderr.endswith("error: argument -o/--output: expected one argument\n")


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
    ran = run("prune", "other", "-o", str(tmp_path / "third"), "--plan", "checkpoint/fxprune_plan.json")
    assert ran.status == 1
    assert "the plan was made for another model (fingerprint " in ran.said
    assert os.listdir(tmp_path) == ["again"]


@pytest.mark.parametrize(
    ("options", "drop"),
    [(("--ratio", "0.25", *PLAIN), []), (("--units", "0.5", "--kinds", "layers"), ["model.layers.1"]), (("--plan", "PLAN"), [])],
)
def test_a_dry_run_tells_the_effect_and_writes_nothing(
    options: tuple[str, ...], drop: list[str], run: Run, checkpoint: Path
) -> None:
    """That nothing is written, the fixture checks."""
    given = [str(checkpoint / "fxprune_plan.json") if o == "PLAN" else o for o in options]
    ran = run("prune", "dense", "--dry-run", *given)
    assert ran.status == 0
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
    for key in ("parameters", "bytes", "macs"):
        assert f"{before[key]:,}" in ran.said
        assert f"{after[key]:,}" in ran.said
    assert f"{after['parameters'] / before['parameters'] - 1:+.1%}" in ran.said


def test_a_dry_run_needs_no_tokenizer_and_no_gradient(run: Run) -> None:
    ran = run("prune", "other", "--dry-run", "--ratio", "0.2", "--criterion", "taylor_mixed")
    assert ran.status == 0
    assert json.loads(ran.out)["after"]["parameters"] < json.loads(ran.out)["before"]["parameters"]


# --- verify ----------------------------------------------------------------------------------------------------------------------


def test_verify_accepts_a_checkpoint(run: Run, checkpoint: Path) -> None:
    ran = run("verify", "checkpoint", "--dense", "dense")
    assert ran.status == 0
    told = json.loads(ran.out)
    assert told["ok"]
    assert told["max_rel_error"] <= told["tolerance"] == 1e-4
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


# --- eval and groups -------------------------------------------------------------------------------------------------------------


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


def test_groups(run: Run, tmp_path: Path) -> None:
    rows = json.loads(run("groups", "dense", "--json").out)
    assert {"hidden", "kv_heads", "query_groups", "head_dim", "ffn"} <= {r["kind"] for r in rows}
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
    assert "No such file or directory" in ran.said


# --- how it ends -----------------------------------------------------------------------------------------------------------------


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
    ran = run("prune", "dense", *RATIO, *PLAIN)
    assert (ran.status, ran.out) == (1, "")
    assert "fxprune: the pruned network differs from its reference (masked dense): relative error " in ran.said
    assert ran.said.endswith("allowed 1e-04; nothing was written")
