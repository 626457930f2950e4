"""The command: what it refuses, in a sentence, and before a model is loaded where it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from .command import Run

OUT = ("-o", "out")
RATIO = (*OUT, "--ratio", "0.2")
TARGET = "say what to remove: just one of --ratio (share of all parameters), --units (share of units) and --plan (a file)"


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model may be loaded."""

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("fxprune.commands.common.load_source", fail)


@pytest.mark.usefixtures("unloaded")
def test_a_recipe_file_is_spoken_of_in_its_own_words(run: Run, place: Path) -> None:
    """Settings in a file have no dashes in front of them."""
    (place / "wrong.yaml").write_text("batchsize: 3\n")
    said = run("prune", "dense", *RATIO, "--recipe", "wrong.yaml").said
    assert (
        "'wrong.yaml' has an unknown setting 'batchsize'; did you mean 'batch_size'? Choose from: aggregation, batch_size, " in said
    )
    assert "--" not in said
    (place / "wrong.yaml").unlink()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((*OUT,), TARGET),
        ((*RATIO, "--units", "0.3"), TARGET),
        (("--ratio", "0.2"), "name an output directory with -o (or add --dry-run)"),
        (
            (*RATIO, "--data", "a.txt"),
            "fxprune prune: error: unrecognized arguments: --data a.txt; did you mean '--calibration'? fxprune prune --help shows",
        ),
        ((*RATIO, "--rankin", "global"), "unrecognized arguments: --rankin global; did you mean '--ranking'?"),
        ((*RATIO, "--json"), "--json is for --dry-run: a prune's numbers are in OUTPUT/fxprune_report.json"),
        ((*OUT, "--ratio", "0"), "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 0.0"),
        ((*OUT, "--ratio", "1"), "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 1.0"),
        ((*OUT, "--ratio", "1.5"), "a ratio must lie between 0 and 1 (0.2 removes 20 %), got 1.5"),
        ((*OUT, "--ratio", "nan"), "a ratio must lie between 0 and 1 (0.2 removes 20 %), got nan"),
        ((*OUT, "--ratio", "abc"), "argument --ratio: 'abc' is no share: write 0.2 for 20 %"),
        (
            (*RATIO, "--multiple", "2.5"),
            "argument --multiple: '2.5' is neither a whole number nor of the form kind=number,kind=number",
        ),
        ((*RATIO, "--multiple", "ffn=x"), "argument --multiple: 'ffn=x' is neither a whole number nor of the form"),
        ((*RATIO, "--multiple", "fnn=8"), "unknown kind 'fnn'; did you mean 'ffn'? Choose from: "),
        ((*OUT, "--units", "a,b"), "argument --units: 'a,b' is neither a number nor of the form kind=number,kind=number"),
        ((*OUT, "--units", "ffn=x"), "argument --units: 'ffn=x' is not of the form kind=number,kind=number"),
        ((*OUT, "--units", "ffn=0.3, ffn=0.5"), "argument --units: 'ffn=0.3, ffn=0.5' names ffn twice"),
        ((*OUT, "--units", "fnn=0.3"), "unknown kind 'fnn'; did you mean 'ffn'? Choose from: "),
        ((*RATIO, "--kinds", "head,ffn"), "unknown kind 'head'; did you mean 'kv_heads'? Choose from: channels, experts, ffn, "),
        ((*RATIO, "--kinds", "0.5"), "unknown kind '0.5'; choose from: "),
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
        ((*RATIO, "--layers-by", "firts"), "unknown --layers-by 'firts'; did you mean 'first'? Choose from: first, influence"),
        ((*RATIO, "--compensation", "least"), "unknown compensation 'least'; did you mean 'least-squares'? Choose from: bias, "),
        ((*RATIO, "--recipe", "flapp"), "unknown recipe 'flapp'; did you mean 'flap'? Choose from: channel, default, flap, "),
        ((*RATIO, "--recipe", "mine.yaml"), "there is no recipe file 'mine.yaml'"),
        ((*RATIO, "--levels", "0"), "levels must be a whole number of at least 1, got 0"),
        ((*RATIO, "--rounds", "0"), "rounds must be a whole number of at least 1, got 0"),
        ((*RATIO, "--sensitivity-samples", "0"), "--sensitivity-samples must be a whole number of at least 1, got 0"),
        ((*RATIO, "--multiple", "0"), "multiple must be a whole number of at least 1, got 0"),
        ((*RATIO, "--floor", "1"), "floor is a share of units from 0 up to (not including) 1, got 1.0"),
        ((*RATIO, "--protect-first", "-1"), "--protect-first must be a whole number of at least 0, got -1"),
        ((*RATIO, "--calibration", "missing.txt"), "there is no file 'missing.txt'"),
        ((*RATIO, "--plan", "foreign.json"), "--plan replays a plan as it is: leave out --ratio"),
        ((*OUT, "--plan", "foreign.json", "--kinds", "ffn"), "--plan replays a plan as it is: leave out --kinds"),
        ((*OUT, "--plan", "missing.json"), "there is no plan file 'missing.json'"),
        ((*RATIO, "--device", "gpu"), "cannot use device 'gpu': "),
        (
            (*RATIO, "--device", "meta"),
            "cannot use device 'meta': it holds no numbers; to see groups without weights, say fxprune groups --meta",
        ),
        ((*RATIO, "--colour"), "fxprune prune: error: unrecognized arguments: --colour"),
        ((*RATIO, "--critreion", "l1"), "unrecognized arguments: --critreion l1; did you mean '--criterion'?"),
        (("-o", "text.txt", "--ratio", "0.2"), "the output 'text.txt' is a file; name a directory"),
        (("-o", "text.txt/out", "--ratio", "0.2"), "cannot write 'text.txt/out': '{place}/text.txt' is a file"),
        (
            ("-o", "other", "--ratio", "0.2"),
            "the output directory 'other' exists and is not empty; choose another, or say --overwrite",
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
            "unknown dtype 'int8'; choose from: auto, bfloat16, float16, float32, float64",
        ),
        (("prune", "dense", *RATIO, "--protect", "layer.0"), 2, "--protect layer.0 matches no group and no block; "),
        (
            ("recover", "dense", "--data", "short.txt", "-o", "out", "--set", "warmup=1", "rank=4"),
            2,
            "unrecognized arguments: rank=4; --set takes one FIELD=VALUE: write '--set rank=4'",
        ),
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
        (("prune", "dense", *OUT, "--ratio", "0.99"), 2, "a ratio of 99.0% cannot be reached: with --kinds kv_heads,"),
        (
            ("prune", "dense", *OUT, "--plan", "foreign.json"),
            2,
            "'foreign.json' cannot be used: this is not an fxprune plan of format 1",
        ),
        (("prune", "dense", *OUT, "--plan", "text.txt"), 2, "'text.txt' is not JSON: "),
        (("verify", "nowhere", "--dense", "dense"), 2, "there is no directory 'nowhere'"),
        (("verify", "dense", "--dense", "dense"), 2, "'dense' holds no fxprune_plan.json: it is no checkpoint that fxprune wrote"),
        (("verify", "dense"), 2, "the following arguments are required: --dense"),
        (("eval", "dense"), 2, "say what to measure: one or more of --text FILE"),
        (("eval", "dense", "--text", "missing.txt"), 2, "there is no file 'missing.txt'"),
        (("eval", "dense", "--text", "short.txt", "--length", "8"), 2, "the text has 3 tokens, fewer than one window of 8"),
        (
            ("eval", "dense", "--text", "text.txt", "--length", "128"),
            2,
            "the model reads at most 64 tokens, fewer than one window of",
        ),
        (("eval", "dense", "--calibration", "text.txt", "--latency"), 2, "did you mean '--text'?"),
        (
            ("eval", "dense", "--text", "text.txt", "--length", "1"),
            2,
            "length must be at least 2 and stride between 1 and length, got ",
        ),
        (("eval", "dense", "--text", "text.txt", "--length", "8", "--stride", "9"), 2, "got --length 8, --stride 9"),
        (
            ("eval", "dense", "--text", "text.txt", "--length", "8", "--batch-size", "0"),
            2,
            "--batch-size must be a whole number of at least 1, got 0",
        ),
        (("eval", "dense", "--text", "text.txt", "--length", "8", "--max-windows", "0"), 2, "--max-windows must be a "),
        (("eval", "other", "--text", "text.txt"), 2, "there is no tokenizer beside 'other'"),
        (
            ("groups", "dense", "--export", "groups.png"),
            2,
            "cannot write a graph as 'groups.png': its name must end in one of .dot",
        ),
        (
            ("groups", "dense", "--why", "a.weight", "lm_head.weight", "--json"),
            2,
            "--why says what couples two parameters, and nothing else: leave out --json",
        ),
        (("groups", "dense", "--json", "--expand"), 2, "--json lists every group by itself, as --expand does in the table: "),
        (("explore", "dense", "-o", "e.html", "--samples", "0"), 2, "samples must be a whole number of at least 1, got 0"),
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
