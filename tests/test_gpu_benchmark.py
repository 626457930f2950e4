"""The GPU benchmark on a CPU, at the size of a toy; its arithmetic against numbers worked out by hand."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu import importance, meter, recovery
from benchmarks.gpu.__main__ import PARTS, gpu, main
from benchmarks.gpu.arithmetic import Gain, Work, mean_context, utilisation
from benchmarks.gpu.examples import ALPACA, settings
from benchmarks.gpu.pace import WARM, Pace
from benchmarks.gpu.plain import Padded
from benchmarks.gpu.replay import Decoder, measure_replayed, replayed
from benchmarks.gpu.scale import SCALES
from benchmarks.gpu.session import Session
from benchmarks.paper import criteria, lorashear
from benchmarks.paper.common import Book, run
from fxprune.errors import FxPruneError, UsageError
from fxprune.evaluation import measure_cost
from fxprune.recovery.settings import settings_of

CPU = torch.device("cpu")
TRY = ("--device", "cpu", "--dtype", "float32", "--model-shape", "tiny", "--repeats", "1")


def toy(*, tied: bool = False) -> Any:
    heads = {"num_attention_heads": 2, "head_dim": 4}
    sizes: dict[str, Any] = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 10, **heads}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=tied)).eval()


# --- arithmetic ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_work_of_a_toy_by_hand(tied: bool) -> None:
    work = Work.of(toy(tied=tied))
    # four 8 x 8 projections, three of 8 x 16, the output embedding of 10 x 8; three norms are read too, the input embedding is not
    assert work == Work(linear=4 * 64 + 3 * 128 + 80, attention=8, cache=16, read=720 + 24, width=4)
    assert work.linear == measure_cost(toy(tied=tied)).macs  # as torch's counter has it
    assert work.prefill_flops(2, 3) == 2 * (3 * 2 * 720 + 4 * 8 * (1 + 2 + 3))
    assert work.decode_bytes(2, 5) == 4 * (744 + 2 * 5 * 16)
    assert work.training_flops(10, 3) == 4 * 720 + 6 * 10 + 12 * 8 * 3


def test_the_shape_is_that_of_llama_7b() -> None:
    model = SCALES["7b"].build(torch.device("meta"), torch.bfloat16, 0)
    assert sum(p.numel() for p in model.parameters()) == 6_738_415_616
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    work = Work.of(model)
    assert (work.linear, work.attention, work.cache, work.width) == (6_607_077_376, 32 * 4096, 2 * 32 * 4096, 2)
    assert work.read == 6_738_415_616 - 32_000 * 4096
    # a LoRA of rank 8 in all seven projections: 8 x (inputs + outputs) each
    trained = 32 * 8 * (4 * 8192 + 3 * (4096 + 11008))
    flops = work.training_flops(trained, 512)
    assert flops == pytest.approx(4 * 6.607e9 + 6 * 19_988_480 + 12 * 131_072 * 512, rel=1e-3)
    assert utilisation(10_000, flops, 989.4) == pytest.approx(10_000 * flops / 989.4e12)


def test_shares_by_hand() -> None:
    assert mean_context([1, 3]) == 10 / 4
    assert utilisation(1000, 2e9, 100) == pytest.approx(0.02)
    assert Gain.of((10.0, 8.0), (100.0, 80.0)) == Gain(1.25, 1.25, 1.0, 1.0)
    assert Gain.of((10.0, 10.0), (100.0, 80.0)) == Gain(1.0, 1.25, 0.8, 0.0)
    assert Gain.of((10.0, 6.0), (100.0, 50.0)) == Gain(1.6667, 2.0, 0.8333, 0.8)
    assert meter.memory_ratio(15, 10) == 1.5
    assert meter.memory_ratio(None, 10) is None
    assert importance.judged(1.25) == {"target": 1.25, "met": False}
    assert importance.judged(1.2)["met"] is True
    assert importance.judged(None)["met"] is None


def test_pace_leaves_the_first_steps_out() -> None:
    pace = Pace(CPU, timed=2)
    pace.begun, pace.stamps = 1.0, {1: 9.0, 2: 10.0, 3: 11.0, 4: 11.5, 5: 13.0}
    found = pace.to_json([100, 200, 300, 350, 420])
    assert WARM == 3
    assert found == {
        "tokens_per_second": 60.0,  # 120 tokens in 2 seconds
        "tokens": 120,
        "seconds": 2.0,
        "steps": 2,
        "warm_up_steps": 3,
        "warm_up_seconds": 10.0,
    }


def test_the_clock_waits_for_a_gpu_and_its_peak_is_that_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def told(name: str, value: int = 0) -> Callable[..., int]:
        def call(*_: Any) -> int:
            said.append(name)
            return value

        return call

    for name in ("synchronize", "reset_peak_memory_stats", "empty_cache"):
        monkeypatch.setattr(torch.cuda, name, told(name))
    monkeypatch.setattr(torch.cuda, "memory_allocated", told("memory_allocated", 70))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", told("max_memory_allocated", 90))
    made, measured = meter.measure(torch.device("cuda"), told("work", 5))
    assert made == 5
    assert said == [
        "empty_cache",
        "reset_peak_memory_stats",
        "memory_allocated",
        "synchronize",
        "work",
        "synchronize",
        "max_memory_allocated",
    ]
    assert (measured.before, measured.peak) == (70, 90)
    assert measured.to_json(60)["peak_over_weights"] == 1.5
    assert meter.measure(CPU, lambda: None)[1].peak is None


# --- decoding and data -----------------------------------------------------------------------------------------------------------


def test_the_replayed_decoder_writes_what_generate_writes() -> None:
    model = toy()
    ids = torch.randint(0, 10, (3, 5))
    wanted = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)[:, 5:]
    with torch.no_grad():
        decoder = Decoder(model, ids, new_tokens=4)
        for _ in range(2):  # after a rewind again
            found = [decoder.first]
            for _ in range(4):
                decoder.step()
                found.append(decoder.token.clone())
            assert torch.equal(torch.cat(found, 1), wanted)
            decoder.rewind()
    times = measure_replayed(model, ids, new_tokens=4, repeats=1)
    assert set(times) == {"prefill_ms", "decode_ms"}
    assert min(times.values()) > 0


def test_without_cuda_work_is_done_as_it_is() -> None:
    def work() -> None:
        raise AssertionError("not to be called")

    assert replayed(work, work, CPU) is work


@pytest.mark.parametrize("name", SCALES)
def test_both_sides_train_on_as_many_tokens(name: str) -> None:
    scale = SCALES[name]
    full, alpaca = settings(scale, scale.forward_rows, steps=20, seed=0)
    assert set(full.examples.lengths.tolist()) == {scale.row}
    assert (full.forward_examples, full.forward_examples * full.accumulate) == (full.forward_rows, full.rows)
    assert len(full.examples) == 20 * full.rows
    assert len(alpaca.examples) == 20 * alpaca.accumulate * alpaca.forward_examples
    lengths = alpaca.examples.lengths
    assert int(lengths.max()) <= alpaca.cutoff == scale.row // 2
    assert alpaca.forward_examples * alpaca.cutoff <= alpaca.forward_rows * alpaca.row  # never more in a forward pass
    step = float(lengths.float().mean()) * alpaca.accumulate * alpaca.forward_examples
    assert step == pytest.approx(alpaca.rows * alpaca.row, rel=0.25)
    assert float(lengths.float().mean()) * 512 / scale.row == pytest.approx(110, rel=0.1)  # measured on Alpaca
    assert min(ALPACA) * scale.row // 512 <= int(lengths.min())


def test_padding_is_neither_learned_nor_counted() -> None:
    collate = Padded()
    batch = collate([torch.tensor([5, 6, 7]), torch.tensor([8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]
    assert collate.tokens == [4]


# --- the parts -------------------------------------------------------------------------------------------------------------------


def rows_of(path: Path, part: str) -> list[dict[str, Any]]:
    data = json.loads(path.read_text())
    return [row for row in data["rows"] if row["key"]["part"] == part]


def measured(tmp_path: Path, part: str, *more: str) -> list[dict[str, Any]]:
    path = tmp_path / "gpu.json"
    main(["--parts", part, *TRY, "--output", str(path), *more])
    rows = rows_of(path, part)
    assert not [row["error"] for row in rows if "error" in row]
    assert all(row["key"].items() >= {"model": "tiny", "device": "cpu", "dtype": "float32"}.items() for row in rows)
    header = json.loads(path.read_text())["runs"][0]
    assert header["command"].startswith("python -m benchmarks.gpu --device cpu")
    assert str(tmp_path) not in json.dumps(header)
    assert header["versions"]["torch"] == torch.__version__
    assert header["gpu"] is None
    return rows


def test_importance(tmp_path: Path) -> None:
    traced, *scored, pruned = measured(tmp_path, "importance")
    assert traced["parameters"] == 157_968
    assert all(traced[step]["seconds"] > 0 for step in ("build", "trace", "find_groups"))
    assert [(r["key"]["criterion"], r["tokens"], r["key"]["batch_size"]) for r in scored] == [
        ("taylor1", 640, 10),
        ("taylor1", 640, 5),
        ("taylor2", 640, 10),
        ("kfac", 1024, 4),
        ("kfac", 1024, 2),
    ]
    for row in (*scored, pruned):
        assert row["weight_bytes"] == 4 * 157_968
        assert row["seconds"] > 0
        assert row["peak_over_weights"] is None  # which is measured on a GPU
    assert all(row["target"] == 1.25 for row in scored)
    assert pruned["removed"] == pytest.approx(0.2, abs=0.01)
    assert pruned["verify_error"] < 1e-4
    assert pruned["stages"]["importance"] > 0


def test_latency(tmp_path: Path) -> None:
    rows = measured(tmp_path, "latency")
    cases = [(r["key"]["ratio"], r["key"]["batch"], r["key"]["way"]) for r in rows]
    assert cases == [(ratio, batch, way) for ratio in (0.0, 0.2, 0.5) for batch in (1, 2) for way in ("eager", "graph")]
    dense = {case[1:]: row for case, row in zip(cases, rows, strict=True) if not case[0]}
    for (ratio, *case), row in zip(cases, rows, strict=True):
        assert min(row["prefill_ms"], row["decode_ms"]) > 0
        if not ratio:
            assert "gain" not in row
            continue
        beside = dense[tuple(case)]
        gain = row["gain"]["decode"]
        assert gain["speedup"] == pytest.approx(beside["decode_ms"] / row["decode_ms"], rel=1e-3)
        assert gain["ideal"] == pytest.approx(beside["decode_bytes"] / row["decode_bytes"], rel=1e-3)
        assert row["gain"]["prefill"]["ideal"] == pytest.approx(beside["prefill_flops"] / row["prefill_flops"], rel=1e-3)
        assert row["met"] is all(g["share"] >= 0.9 for g in row["gain"].values())
        assert row["removed"] == pytest.approx(ratio, abs=0.03)
        assert row["widths"]["model.layers.0.mlp.ffn"][1] % 4 == 0


def test_recovery(tmp_path: Path) -> None:
    model, full, alpaca = measured(tmp_path, "recovery", "--forward-rows", "1", "--peak-tflops", "0.5")
    assert model["removed"] == pytest.approx(0.2, abs=0.01)
    for row in (full, alpaca):
        ours, theirs = row["fxprune"], row["trainer"]
        assert row["speedup"] == pytest.approx(ours["tokens_per_second"] / theirs["tokens_per_second"], rel=1e-3)
        assert ours["trained"] == theirs["trained"]  # the same adapters
        assert ours["choices"]["packing"] is True
        assert (ours["forward_rows"], ours["choices"]["micro_batch_size"], row["peak_tflops"]) == (1, 1, 0.5)
        for side in (ours, theirs):
            assert (side["steps"], side["warm_up_steps"]) == (2, 3)
            used = side["tokens_per_second"] * row["flops_per_token"] / 0.5e12
            assert side["model_flops_utilisation"] == pytest.approx(used, rel=1e-3)
            assert side["loss"] == pytest.approx(4.6, abs=0.2)  # log 101: the tokens are random
    assert full["fxprune"]["tokens"] == full["trainer"]["tokens"] == 2 * 4 * 64
    assert alpaca["trainer"]["tokens"] == pytest.approx(alpaca["fxprune"]["tokens"], rel=0.3)


# --- what goes wrong -------------------------------------------------------------------------------------------------------------


def session(path: Path) -> Session:
    book = Book(path, argparse.Namespace(seed=0, threads=1, repeats=1, output=path), "gpu")
    return Session("tiny", SCALES["tiny"], CPU, torch.float32, 0, 1, 1.0, 4, book)


def test_a_case_that_fails_is_recorded_and_the_others_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    here = session(tmp_path / "gpu.json")

    def fails() -> dict[str, Any]:
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    assert here.attempt("latency", {"batch": 1}, fails) is None
    assert here.attempt("latency", {"batch": 2}, lambda: {"decode_ms": 3.0}) == {"decode_ms": 3.0}
    first, second = rows_of(here.book.path, "latency")
    assert first["error"] == "OutOfMemoryError: CUDA out of memory."
    assert (second["key"]["batch"], second["decode_ms"]) == (2, 3.0)
    assert here.attempt("latency", {"batch": 1}, lambda: {"decode_ms": 4.0}) is not None
    assert [row["decode_ms"] for row in rows_of(here.book.path, "latency")] == [4.0, 3.0]
    capsys.readouterr()


def test_without_memory_both_sides_take_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    errors: list[Exception] = [torch.OutOfMemoryError("no room"), FxPruneError("out of memory at step 1: lower micro_batch_size")]

    def both(_: Session, __: nn.Module, setting: Any) -> dict[str, Any]:
        tried.append(setting.forward_rows)
        if errors:
            raise errors.pop()
        return {"done": True}

    monkeypatch.setattr(recovery, "_both", both)
    assert recovery._compare(session(tmp_path / "a.json"), toy(), 0) == {"done": True}
    assert tried == [4, 2, 1]
    errors.append(FxPruneError("the loss is nan"))
    with pytest.raises(FxPruneError, match="the loss is nan"):
        recovery._compare(session(tmp_path / "b.json"), toy(), 0)
    errors += [torch.OutOfMemoryError("no room")] * 3
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        recovery._compare(session(tmp_path / "c.json"), toy(), 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--parts", "importance,latncy"], "unknown part 'latncy'; did you mean 'latency'?"),
        (["--repeats", "0"], "--repeats must be above 0, got 0"),
        (["--forward-rows", "-1"], "--forward-rows must be above 0, got -1"),
        (["--peak-tflops", "0"], "--peak-tflops must be above 0, got 0"),
        (["--device", "nowhere"], "cannot use device 'nowhere'"),
    ],
)
def test_what_is_refused(options: Sequence[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(main, [*TRY, *options, "--output", str(tmp_path / "gpu.json")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "gpu.json").exists()


def test_what_is_said_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    facts = {"name": "G", "total_memory": 2**31, "multi_processor_count": 3, "major": 9, "minor": 0}
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: argparse.Namespace(**facts))
    found = gpu(torch.device("cuda"))
    assert found is not None
    assert {**found, "cuda": ""} == {"name": "G", "memory_gib": 2.0, "multiprocessors": 3, "capability": "9.0", "cuda": ""}


def ran(tmp_path: Path, script: str, body: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A script of ``benchmarks/gpu`` with another program in place of Python."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{body}\n")
    python.chmod(0o755)
    path = Path(__file__).parents[1] / "benchmarks" / "gpu" / script
    environment = {**os.environ, "PYTHON": str(python)}
    return subprocess.run(
        ["bash", str(path), *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )


def test_the_script_runs_every_part_whatever_happens_to_one(tmp_path: Path) -> None:
    body = 'echo "called: $*"\ncase "$*" in *latency*) exit 3 ;; esac'
    done = ran(tmp_path, "run.sh", body, str(tmp_path / "out"), "--seed", "4")
    said = done.stdout.splitlines()
    output = f"--output {tmp_path}/out/gpu.json --seed 4"
    assert said == [
        f"called: -m benchmarks.gpu --parts importance {output}",
        f"called: -m benchmarks.gpu --parts latency {output}",
        "latency ended with 3 (124: out of time)",
        f"called: -m benchmarks.gpu --parts recovery {output}",
    ]
    assert done.returncode == 3
    assert (tmp_path / "out" / "gpu.log").read_text().splitlines() == said
    assert list(PARTS) == ["importance", "latency", "recovery"]


def test_the_shear_script_measures_memory_once_and_then_shears(tmp_path: Path) -> None:
    body = 'echo "$*"\ncase "$2" in *memory) touch "$6" ;; esac'
    for memory in (True, False):
        done = ran(tmp_path, "shear.sh", body, "model.gguf", "texts", str(tmp_path / "out"), "--rows", "kfac")
        assert done.returncode == 0
        lines = done.stdout.splitlines()
        assert len(lines) == 1 + memory
        if memory:
            assert lines[0] == f"-m benchmarks.shear_memory --device cuda --output {tmp_path}/out/shear_memory.json"
        module, *options = lines[-1].split()[1:]
        assert module == "benchmarks.paper.lorashear"
        assert options[-2:] == ["--rows", "kfac"]
        assert options[options.index("--tokens") + 1] == "20000000"
        with pytest.raises(UsageError, match="there is no directory 'texts'"):  # its options are known, and right up to the texts
            lorashear.main(options)
        with pytest.raises(UsageError, match="there is no directory 'texts'"):  # and so are its rows
            lorashear.main(options[:-2])


def test_the_smollm2_script_runs_the_recipe_to_its_end(tmp_path: Path) -> None:
    body = 'for word in "$@"; do echo "$word"; done'
    done = ran(tmp_path, "smollm2.sh", body, "model.gguf", "texts", str(tmp_path / "out"), "--limit", "5")
    assert done.returncode == 0
    _, module, *options = done.stdout.split()
    assert module == "benchmarks.paper.criteria"
    with pytest.raises(UsageError, match="there is no directory 'texts'"):  # its options are known, and right up to the texts
        criteria.main(options)
    settings = settings_of("llm-pruner", {"max_tokens": options[options.index("--recover") + 1]})
    epoch = math.ceil((51_974 - 2_000) / settings.batch_size)
    assert settings.max_tokens is not None
    assert settings.max_tokens > 51_974 * settings.cutoff * settings.epochs  # no limit
    assert settings.epochs * epoch == 1562
