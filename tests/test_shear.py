"""`fxprune.shear`: what comes out, that it is exact, where tokens go, the ablations, and that a killed run goes on."""

from __future__ import annotations

import copy
import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import fxprune
from fxprune import ShearReport, ShearResult
from fxprune.api import example_inputs
from fxprune.errors import PlanError, UsageError, VerificationError
from fxprune.lorashear import parts
from fxprune.lorashear.training import ShearTraining
from fxprune.lorashear.work import WorkDirectory
from fxprune.recovery.loop import Training

from .closeness import relative
from .curricula import dense
from .reported import unreadable
from .shearing import Killed, killed_at, sheared, traced_once
from .zoo import build, tokenizer, tokens

pytestmark = pytest.mark.usefixtures("one_trace")


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return cast(Tensor, model(input_ids=tokens(3, 11, seed=9)).logits)


# --- what comes out ---------------------------------------------------------------------------------------------------------------


def test_the_output_is_a_checkpoint_of_the_size_asked_for(whole: ShearResult) -> None:
    report, unit = whole.report, 3 * 48
    total = sum(p.numel() for p in dense().parameters())
    assert report.parameters_before == total
    assert report.parameters_after == sum(p.numel() for p in whole.model.parameters())
    assert report.removed == pytest.approx(0.2, abs=unit / total)
    assert whole.plan.recipe["recipe"] == report.recipe == "default"
    again = AutoModelForCausalLM.from_pretrained(whole.directory, trust_remote_code=True)
    assert torch.equal(logits(again), logits(whole.model))
    assert ShearReport.read(whole.directory) == report
    assert os.listdir(whole.directory.parent) == ["out"]
    assert whole.tokenizer("w1 w2")["input_ids"] == tokenizer()("w1 w2")["input_ids"]


def test_a_result_says_in_a_line_what_it_is(whole: ShearResult) -> None:
    report = whole.report
    sizes = f"{report.parameters_before:,} -> {report.parameters_after:,} parameters ({-report.removed:+.1%})"
    assert repr(whole) == f"ShearResult({type(whole.model).__name__}, {sizes}, per-layer, '{whole.directory}')"


def test_the_report_has_a_section_for_each_stage(whole: ShearResult) -> None:
    report = whole.report
    assert report.knowledge is not None
    assert report.recovery is not None
    costs = {row["name"]: row["loss_change"] for row in report.knowledge["rows"]}
    assert set(costs) == {f"model.layers.{i}.{g}" for i in (0, 1) for g in ("self_attn.kv_heads", "mlp.ffn")}
    most = max(costs, key=costs.__getitem__)
    assert report.knowledge["protected"] == [most]  # a tenth of four groups, rounded up
    assert most not in whole.plan.keep
    assert report.knowledge["text"] == "4 x 20 tokens held out of kept.jsonl, lost.jsonl"
    periods = report.lhspg["periods"]
    assert [p["target"] for p in periods] == [0.5, 1.0]
    assert periods[-1]["removed"] == pytest.approx(report.removed, abs=1e-6)
    assert sum(p["units"] for p in periods) == sum(len(units) for units in whole.plan.removed().values())
    assert all(p["saliency"]["least"] <= p["saliency"]["most"] for p in periods)
    assert report.prune["verify"]["max_rel_error"] < 1e-5
    assert report.prune["merged_error"] < 1e-5
    assert report.prune["zeros"] == report.parameters_before - report.parameters_after
    assert [list(stage) for stage in report.recovery["curriculum"]["stages"]] == [["kept.jsonl", "lost.jsonl"], ["alpaca.jsonl"]]
    assert all(r["weights"] for r in report.recovery["curriculum"]["measurements"])
    assert report.settings["periods"] == 2
    assert report.budget == {"tokens": None, "steps": 20}
    assert report.settings["lr"] == 3e-3
    assert report.lhspg["criterion"] == whole.plan.recipe["criterion"] == "kfac"
    assert set(report.seconds) == {"importance", "knowledge", "lhspg", "prune", "recovery"}
    assert all(value > 0 for value in report.seconds.values())
    written = json.loads((whole.directory / "fxprune_report.json").read_text())
    assert [(d["use"], d["name"]) for d in written["data"]] == [
        *(("shearing", name) for name in ("kept.jsonl", "lost.jsonl")),
        *(("recovery", name) for name in ("kept.jsonl", "lost.jsonl", "alpaca.jsonl")),
    ]
    assert "# out" in (whole.directory / "README.md").read_text()
    assert unreadable(whole.directory) == []


def test_tokens_and_steps_add_up(whole: ShearResult) -> None:
    report = whole.report
    assert report.recovery is not None
    schedule = {name: report.lhspg[name] for name in ("steps", "warmup", "periods", "period_steps")}
    assert (schedule["steps"], schedule["warmup"], schedule["period_steps"]) == (6, 2, 2)  # 0.3 of 20; 0.2 of 6 and what is over
    assert report.recovery["steps"] == 14
    tokens = report.tokens
    assert tokens["recovery"] == report.recovery["tokens"]
    assert [p["tokens"] for p in schedule["periods"]] == tokens["periods"]
    read = tokens["warm-up"] + sum(tokens["periods"]) + tokens["after the periods"]
    assert read == report.lhspg["history"]["tokens"][-1] == sum(s["tokens"] for s in report.lhspg["sources"].values())
    assert tokens["total"] == read + tokens["recovery"]


def test_the_dense_model_is_as_it_was(files: list[str], tmp_path: Path) -> None:
    model = copy.deepcopy(dense())
    before = {n: t.clone() for n, t in model.state_dict().items()}
    sheared(tmp_path / "out", files[0], model=model, shear_share=1, protect_share=0, steps=6)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    assert not [n for n, _ in model.named_modules() if "lora" in n]
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


def test_what_is_removed_is_what_was_trained(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The checkpoint computes what the model with adapters and zeros computed when training ended."""
    seen: list[Tensor] = []
    run_training = ShearTraining.run

    def watched(self: ShearTraining) -> None:
        run_training(self)
        seen.append(logits(self.model.eval()))

    monkeypatch.setattr(ShearTraining, "run", watched)
    result = sheared(tmp_path / "out", files[0], shear_share=1)
    assert relative(seen[0], logits(result.model)) < 1e-5
    assert result.report.recovery is None
    assert set(result.report.tokens) == {"warm-up", "periods", "after the periods", "total"}


def test_a_unit_that_is_not_zero_is_not_removed(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_training = ShearTraining.run

    def sabotaged(self: ShearTraining) -> None:
        run_training(self)
        with torch.no_grad():
            self.model.get_parameter("model.layers.1.mlp.down_proj.base_layer.weight").add_(1e-9)

    monkeypatch.setattr(ShearTraining, "run", sabotaged)
    with pytest.raises(VerificationError, match=r"a unit of 'model\..*' that goes is not zero in 'model\..*': nothing was removed"):
        sheared(tmp_path / "out", files[0], protect_share=0, protect=["model.layers.0"])
    assert not (tmp_path / "out").exists()


def test_uniform_widths_load_in_stock_transformers(files: list[str], tmp_path: Path) -> None:
    result = sheared(tmp_path / "out", files[0], widths="uniform", protect_share=0, kinds=["ffn"], ratio=0.15)
    assert result.report.form == "uniform"
    assert result.report.knowledge is None
    one, two = (len(units) for units in result.plan.keep.values())
    assert one == two
    again = AutoModelForCausalLM.from_pretrained(result.directory)
    assert again.config.intermediate_size == one
    assert torch.equal(logits(again), logits(result.model))


def test_half_precision_on_the_processor(files: list[str], tmp_path: Path) -> None:
    """Trained in 32 bits, stored in 16: what goes is zero in both."""
    model = copy.deepcopy(dense()).bfloat16()
    result = sheared(tmp_path / "out", files[0], model=model, shear_share=1, protect_share=0, steps=6)
    assert {p.dtype for p in result.model.parameters()} == {torch.bfloat16}
    assert result.report.prune["zeros"] > 0


# --- options ----------------------------------------------------------------------------------------------------------------------


def test_the_ablations(files: list[str], tmp_path: Path) -> None:
    """At equal tokens: without knowledge, at once instead of progressively, with static weights."""
    result = sheared(tmp_path / "out", files[:2], protect_share=0, one_shot=True, curriculum="static", tokens=4000, steps=None)
    report = result.report
    assert report.knowledge is None
    assert report.recovery is not None
    assert report.recovery["curriculum"]["weights"] == "static"
    assert (len(report.lhspg["periods"]), report.lhspg["period_steps"]) == (1, 1)
    assert report.lhspg["periods"][0]["step"] == report.lhspg["warmup"]
    assert report.tokens["after the periods"] > 0
    assert report.tokens["total"] == pytest.approx(4000, rel=0.1)
    assert report.tokens["total"] <= 4000
    assert report.tokens["total"] - report.tokens["recovery"] == pytest.approx(1200, rel=0.25)


def test_units_ranked_by_a_criterion(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scored once, on text of every source of the first stage, and kept: the same after a kill."""
    real, calls = fxprune.score, list[Any]()

    def watched(gm: Any, groups: Any, criterion: str, **options: Any) -> dict[str, Tensor]:
        calls.append((criterion, [tuple(b["input_ids"].shape) for b in options["calibration"]]))
        return real(gm, groups, criterion, **options)

    monkeypatch.setattr(parts, "score", watched)
    options: dict[str, Any] = {"criterion": "taylor1", "criterion_samples": 10, "protect_share": 0, "shear_share": 1, "steps": 6}
    with pytest.raises(Killed):
        sheared(tmp_path / "out", files[:2], progress=killed_at("shearing", 3), **options)
    scores = load_file(tmp_path / "out.shearing" / "scores.safetensors")
    measured = WorkDirectory(tmp_path / "out").stages["importance"]["seconds"]
    result = sheared(tmp_path / "out", files[:2], **options)
    assert calls == [("taylor1", [(8, 20), (2, 20)])]
    gone = result.plan.removed()
    assert gone
    for name, units in gone.items():
        if name.endswith("ffn"):
            assert sorted(units.tolist()) == sorted(scores[name].argsort()[: len(units)].tolist())
    assert result.plan.recipe["criterion"] == result.report.settings["criterion"] == "taylor1"
    assert result.report.seconds["importance"] == measured > 0
    other = sheared(tmp_path / "other", files[:2], **{**options, "criterion": "saliency"})
    assert other.plan.diff(result.plan)
    assert os.listdir(tmp_path / "out") == os.listdir(tmp_path / "other")


def test_units_that_no_linear_map_reads(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be saved has none of them, so that they are made up."""
    monkeypatch.setattr(parts, "find_consumers", lambda *_: [])
    kinds = ["ffn", "kv_heads", "experts", "hidden"]
    result = sheared(tmp_path / "out", files[0], protect_share=0, shear_share=1, steps=6, kinds=kinds)
    assert result.report.settings["criterion"] == "auto"
    assert result.report.lhspg["criterion"] == result.plan.recipe["criterion"] == "taylor2"
    assert result.report.notes[:3] == [
        "this model has nothing of kind 'experts' that can be pruned",
        (
            "this model has nothing of kind 'hidden' that can be pruned ('hidden': a norm, a softmax or a router looks at "
            "all of its units)"
        ),
        "taylor2 ranks units, not kfac: no linear map contracts those of 'model.layers.0.mlp.ffn'",
    ]


def test_a_criterion_that_reads_no_text(files: list[str], tmp_path: Path) -> None:
    """It is not refused for want of windows, though no source could give one."""
    short = tmp_path / "short.jsonl"
    short.write_text('{"text": "w1 w2 w3"}\n' * 12)
    options: dict[str, Any] = {"criterion": "l2", "knowledge_length": 64, "protect_share": 0, "shear_share": 1, "steps": 6}
    result = sheared(tmp_path / "out", str(short), **options)
    gm = fxprune.trace(dense(), example_inputs(dense()))
    scores = fxprune.score(gm, fxprune.find_groups(gm), "l2")
    for name, units in result.plan.removed().items():
        assert sorted(units.tolist()) == sorted(scores[name].argsort()[: len(units)].tolist())


def test_heads_of_a_fused_projection(files: list[str], tmp_path: Path) -> None:
    """Heads and the dimensions of heads lie in the same parameters, and one is not taken for the other."""
    options: dict[str, Any] = {"kinds": ["kv_heads"], "protect_share": 0, "shear_share": 1, "steps": 6, "ratio": 0.1}
    result = sheared(tmp_path / "out", files[0], model=build("gpt2"), criterion="kfac", criterion_samples=8, **options)
    assert {name.rpartition(".")[2] for name in result.plan.removed()} == {"kv_heads"}
    assert result.report.removed == pytest.approx(0.1, abs=0.02)


def test_constraints_hold_at_the_end(files: list[str], tmp_path: Path) -> None:
    """And where they put the target out of reach by more than a thousandth, the report says so."""
    result = sheared(
        tmp_path / "out", files[0], ratio=0.1, kinds=["ffn"], protect_first=1, multiple=8, protect_share=0, shear_share=1, steps=6
    )
    assert {name: len(units) for name, units in result.plan.keep.items()} in ({"model.layers.1.mlp.ffn": n} for n in (32, 40))
    assert (
        result.report.notes[0]
        == f"asked for 10.00% of the parameters: the nearest that the units allow is {result.report.removed:.2%}"
    )


def test_knowledge_that_was_measured_before(files: list[str], tmp_path: Path, whole: ShearResult) -> None:
    gm = traced_once(dense(), example_inputs(dense()))
    found = fxprune.measure_knowledge(gm, fxprune.find_groups(gm), [{"input_ids": tokens(2, 16)}], kinds=["ffn"], text="tokens")
    found.save(tmp_path / "known.json")
    result = sheared(tmp_path / "out", files[0], knowledge=tmp_path / "known.json", shear_share=1, protect_share=0.5, steps=6)
    assert result.report.knowledge is not None
    assert result.report.knowledge["text"] == "tokens"
    assert result.report.knowledge["protected"] == list(found.protected(0.5)) == [found.ranked()[0].name]
    assert found.ranked()[0].name not in result.plan.keep
    foreign = replace(found, fingerprint="another's")
    with pytest.raises(UsageError, match="the knowledge was measured on another model"):
        sheared(tmp_path / "other", files[0], knowledge=foreign)
    assert sorted(os.listdir(tmp_path)) == ["known.json", "out"]
    before = whole.report.knowledge
    assert before is not None
    assert fxprune.Knowledge.load(whole.directory).to_json() == {key: value for key, value in before.items() if key != "protected"}
    again = sheared(tmp_path / "again", files[0], knowledge=whole.directory, shear_share=1, steps=6)
    assert again.report.knowledge == before
    assert again.report.seconds["knowledge"] == 0
    bare = sheared(tmp_path / "bare", files[0], protect_share=0, shear_share=1, steps=6)
    with pytest.raises(UsageError, match=r"bare' holds no knowledge: one that was sheared with a protect_share does"):
        sheared(tmp_path / "other", files[0], knowledge=bare.directory)


def test_lengths_are_no_more_than_the_model_reads(files: list[str], tmp_path: Path) -> None:
    result = sheared(tmp_path / "out", files[:2], cutoff=99, length=200, knowledge_length=400, rounds=1, steps=12)
    settings, knowledge = result.report.settings, result.report.knowledge
    assert [settings[name] for name in ("cutoff", "length", "knowledge_length")] == [64, 64, 64]
    assert knowledge is not None
    assert knowledge["text"] == "4 x 64 tokens held out of kept.jsonl, lost.jsonl"
    assert result.report.notes[:2] == [
        "cutoff 99 and length 200 became 64: the model reads no more tokens",
        "knowledge_length 400 became 64: the model reads no more tokens",
    ]
    assert result.report.recovery is not None
    assert (result.report.recovery["settings"]["cutoff"], result.report.recovery["settings"]["length"]) == (64, 64)


def test_knowledge_that_puts_the_target_out_of_reach(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the most favourable case would do, and what was measured does not: said before anything is trained; it is kept."""
    monkeypatch.setattr(parts.Parts, "rehearse", lambda *_: None)
    with pytest.raises(
        PlanError, match=r"with a share of 0\.75 of all groups left whole \(protect_share\), a ratio of 30\.0% cannot"
    ):
        sheared(tmp_path / "out", files[0], ratio=0.3, protect_share=0.75)
    kept = tmp_path / "out.shearing" / "knowledge.json"
    result = sheared(
        tmp_path / "out", files[0], ratio=0.1, protect_share=0.25, knowledge=kept, restart=True, steps=6, shear_share=1
    )
    assert result.report.knowledge is not None
    assert len(result.report.knowledge["protected"]) == 1


def test_recovery_reads_another_order_than_shearing(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, list[Tensor]] = {"shear": [], "recover": []}
    step = Training._step

    def watched(self: Training) -> None:
        due = self._due()
        seen["shear" if isinstance(self, ShearTraining) else "recover"].append(due.batches.batch(due.epoch, due.index)["input_ids"])
        step(self)

    monkeypatch.setattr(Training, "_step", watched)
    sheared(tmp_path / "out", files[0], rounds=1, steps=10, protect_share=0)
    assert not torch.equal(seen["shear"][0], seen["recover"][0])


def test_a_teacher_in_both_stages(files: list[str], tmp_path: Path) -> None:
    """Its own predictions at the first step, so that there is nothing to learn from it yet."""
    result = sheared(tmp_path / "out", files[0], steps=10, distill_weight=1.0, protect_share=0)
    losses = result.report.lhspg["history"]["loss"]
    assert losses[0] == pytest.approx(0, abs=1e-5)
    assert losses[-1] > 1e-3
    assert result.report.settings["distill_weight"] == 1.0


def test_stages_that_are_not_in_a_list(files: list[str], tmp_path: Path) -> None:
    result = sheared(tmp_path / "out", files[0], then=files[2], steps=10, protect_share=0)
    assert result.report.recovery is not None
    assert len(result.report.recovery["curriculum"]["stages"]) == 2


def test_kinds_of_which_nothing_can_go_are_named(files: list[str], tmp_path: Path) -> None:
    """No adapter of ours reaches the experts of a mixture."""
    model = build("mixtral")
    note = (
        "all groups of kind 'ffn' stay whole ('model.layers.0.mlp.experts.ffn': none of its weights is trained or has an adapter)"
    )
    result = sheared(tmp_path / "out", files[0], model=model, ratio=0.05, steps=10, shear_share=1, protect_share=0)
    assert note in result.report.notes
    with pytest.raises(
        PlanError, match=r"at most .* can go; .*; LHSPG takes nothing of 'model\.layers\.0\.mlp\.experts\.ffn' \(none"
    ):
        sheared(tmp_path / "more", files[0], model=model, ratio=0.6, steps=10, shear_share=1, protect_share=0)
