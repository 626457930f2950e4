"""The numbers that the README and the documentation show are those in benchmarks/results."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paper.criteria import closed
from fxprune.evaluation.tasks import read_rows

ROOT = Path(__file__).parents[1]

CRITERIA = {
    "dense": "dense",
    "random": "random",
    "L2": "l2",
    "LLM-Pruner, vector": "vector",
    "LLM-Pruner, element 1": "element1",
    "LLM-Pruner, element 2": "element2",
    "LLM-Pruner, mix": "mix",
    "LLM-Pruner, channel": "channel",
    "Wanda-sp": "wanda-sp",
    "FLAP": "flap",
    "Torch-Pruning 1.6.1, Taylor": "torch-pruning",
    "fxprune, uniform (stock classes load it)": "uniform",
    "fxprune, default": "default",
}
SHEARED = {
    "dense": "dense",
    "LLM-Pruner (element 1), then recovery": "llm-pruner",
    "the same, but for kfac in place of element 1": "kfac-at-once",
    "recipe default of fxprune prune, then recovery": "default-at-once",
    "LoRAShear, recipe lorashear (the paper's saliency)": "lorashear",
    "LoRAShear, recipe default (kfac)": "kfac",
    ".. without knowledge (--protect-share 0)": "kfac-no-knowledge",
    ".. all units at once after the warm-up (--one-shot)": "kfac-one-shot",
    ".. static weights in recovery (--curriculum static)": "kfac-static",
}
MEMORY = {
    "forward and backward that frees each gradient": "freed-traced",
    "fxprune, taylor1": "fxprune-taylor1",
    "fxprune, taylor2 (one sample at a time)": "fxprune-taylor2",
    "fxprune, taylor_mixed (a quarter of the parameters at a time)": "fxprune-taylor_mixed",
    "plain backward, the whole gradient kept": "whole-traced",
    "Torch-Pruning 1.6.1, Taylor": "torch-pruning-taylor",
}
TEXTS = ("wikitext2", "ptb", "c4")


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())


def table(file: str, header: str) -> dict[str, list[str]]:
    """The one table under a header line that begins so: for each row's first cell, without marks, the others."""
    lines = (ROOT / file).read_text().splitlines()
    (start,) = (number for number, line in enumerate(lines) if line.startswith(header))
    found = {}
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        label, *cells = (re.sub(r"\*\*|`", "", cell).strip() for cell in line.strip("|").split("|"))
        found[label] = cells
    return found


def assert_shown(cells: Sequence[str], values: Sequence[float]) -> None:
    """The numbers in cells, in order, are these values as far as they are written out."""
    numbers = [n for cell in cells for n in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", cell)]
    assert len(numbers) == len(values), f"{cells} should show {values}"
    for number, value in zip(numbers, values, strict=True):
        mantissa, _, exponent = number.partition("e")
        half = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2]))
        assert abs(float(number.replace(",", "")) - value) <= half * (1 + 1e-6), f"{number} stands for {value}"


def assert_table(shown: Mapping[str, Sequence[str]], expected: Mapping[str, Sequence[float]]) -> None:
    """A table has these rows, in this order, with these numbers."""
    assert list(shown) == list(expected)
    for label, values in expected.items():
        assert_shown(shown[label], values)


def assert_sentence(pattern: str, values: Sequence[float], file: str = "README.md") -> None:
    """The numbers of a sentence in a file, which is there once."""
    (cells,) = re.findall(pattern, (ROOT / file).read_text())
    assert_shown([cells] if isinstance(cells, str) else cells, values)


def rows_of(book: Mapping[str, Any], **wanted: Any) -> dict[tuple[str, float], Any]:
    """Rows by name and ratio, of those whose key has what is wanted; dense rows in any case."""
    return {
        (row["name"], row["key"]["ratio"]): row
        for row in book["rows"]
        if row["name"] == "dense" or all(row["key"].get(name) == value for name, value in wanted.items())
    }


def perplexities(row: Mapping[str, Any], texts: Sequence[str] = TEXTS) -> list[float]:
    return [row["perplexity"][text]["perplexity"] for text in texts]


def test_criteria_without_recovery() -> None:
    rows, shown = rows_of(results("paper_criteria"), calibration="c4"), table("README.md", "| | 20 %: WikiText-2 |")
    ratios = {name: (0.0, 0.0) if name == "dense" else (0.2, 0.5) for name in CRITERIA.values()}
    assert_table(shown, {k: [p for ratio in ratios[name] for p in perplexities(rows[name, ratio])] for k, name in CRITERIA.items()})


def test_criteria_after_recovery() -> None:
    rows, shown = rows_of(results("paper_criteria"), calibration="c4"), table("docs/results.md", "| | WikiText-2 | PTB | C4 |")
    recovered = {name for (name, _), row in rows.items() if "recovered" in row}
    assert [CRITERIA[label] for label in shown] == [n for n in CRITERIA.values() if n == "dense" or n in recovered]
    for label, cells in shown.items():
        name = CRITERIA[label]
        assert_shown(cells, perplexities(rows["dense", 0.0] if name == "dense" else rows[name, 0.2]["recovered"]))
    ours, best = (perplexities(rows[name, 0.2]["recovered"]) for name in ("default", "element2"))
    assert_sentence(r"`default` has (.*?) / (.*?) / (.*?), the best of the others \(element 2\)", ours)
    assert_sentence(r"the best of the others \(element 2\) (.*?) / (.*?) / (.*?)\. Zero-shot", best)


def test_zero_shot() -> None:
    rows = rows_of(results("paper_tasks"))
    shown = table("docs/results.md", "| | BoolQ | PIQA | HellaSwag |")
    labels = {f"{label}{', recovered' * after}": (name, after) for label, name in CRITERIA.items() for after in (False, True)}
    labels = {label.replace(" (stock classes load it)", ""): row for label, row in labels.items()}
    found = {}
    for label, (name, after) in labels.items():
        row = rows.get((name, 0.0 if name == "dense" else 0.2), {})
        if "tasks" in (row := row.get("recovered", {}) if after else row):
            found[label] = row["tasks"]
    assert list(shown) == list(found)
    for label, cells in shown.items():
        assert_zero_shot(cells, found[label])


def assert_zero_shot(cells: Sequence[str], tasks: Mapping[str, Any]) -> None:
    """A row of a table shows these scores; the standard error of their average is what is said beside it."""
    scores = [100 * task[task["metric"]] for task in tasks["tasks"]]
    assert_shown(cells, [*scores, 100 * tasks["average"], 100 * above_chance(tasks), 100 * above_chance(tasks, "boolq")])
    spread = sum(task[f"{task['metric']}_stderr"] ** 2 for task in tasks["tasks"]) ** 0.5 / len(tasks["tasks"])
    assert 0.008 < spread < 0.009, "the standard error of an average is 0.8 to 0.9 points"


@pytest.mark.data
def test_one_answer_to_every_row_of_boolq(corpora: Callable[..., Path]) -> None:
    rows, _ = read_rows(corpora("boolq.jsonl.gz"), "boolq", 500)
    assert_sentence(
        r'"yes" to every row scores (.*?) % on BoolQ',
        [100 * sum(r["choices"][r["label"]] == "yes" for r in rows) / len(rows)],
        "docs/results.md",
    )


def above_chance(found: Mapping[str, Any], without: str = "") -> float:
    gains = [task[task["metric"]] - task["chance"] for task in found["tasks"] if task["task"] != without]
    return sum(gains) / len(gains)


def test_shares_of_the_gap() -> None:
    text = (ROOT / "README.md").read_text() + (ROOT / "docs" / "results.md").read_text()
    lines = closed(list(rows_of(results("paper_criteria"), calibration="c4").values()))
    shares = [share for line in lines if line.startswith("default") for share in re.findall(r"closes (-?[\d.]+)%", line)]
    assert len(shares) == 9
    for share in shares:
        assert f"{share} %" in text


def test_criteria_calibrated_on_the_kind_of_text() -> None:
    rows = rows_of(results("paper_criteria"), calibration="wikitext")
    own, second, wanda = (perplexities(rows[name, 0.2]) for name in ("default", "element2", "wanda-sp"))
    assert_sentence(r"`default` has (.*?) on WikiText-2, (.*?) on PTB and (.*?) on C4, where", own)
    assert_sentence(r"where element 2 has (.*?) / (.*?) / (.*?) and\s", second)
    assert_sentence(r"Wanda-sp (.*?) / (.*?) / (.*?): it closes", wanda)
    shares = [float(re.findall(r"closes (-?[\d.]+)%", line)[0]) for line in closed(list(rows.values()))]
    assert_sentence(r": it closes (.*?) % of the gap on WikiText-2, and (.*?) % and (.*?) % on the other two", shares)


def test_dependency() -> None:
    rows, shown = rows_of(results("paper_dependency")), table("docs/results.md", "| coupled units | 20 %: WikiText-2 |")
    labels = {"with dependency": "with", "without": "without"}
    assert_table(shown, {k: [p for ratio in (0.2, 0.5) for p in perplexities(rows[name, ratio])] for k, name in labels.items()})


def test_aggregation() -> None:
    rows, shown = rows_of(results("paper_aggregation")), table("docs/results.md", "| aggregation | 20 %: WikiText-2 |")
    names = [name for name, _ in rows if name != "dense"]
    assert_table(
        shown, {name: [p for ratio in (0.2, 0.5) for p in perplexities(rows[name, ratio])] for name in dict.fromkeys(names)}
    )


def test_ratios() -> None:
    rows, shown = rows_of(results("paper_ratios")), table("docs/results.md", "| removed | LLM-Pruner: WikiText-2 |")
    found: dict[float, list[float]] = {}
    for ratio in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        chosen = [rows["dense", 0.0]] * 2 if not ratio else [rows[name, ratio] for name in ("llm-pruner", "uniform")]
        found[ratio] = [p for row in chosen if "error" not in row for p in perplexities(row)]
    assert_table(shown, {f"{100 * ratio:.0f} %": values for ratio, values in found.items()})


def test_layers() -> None:
    kinds = {row["name"]: row["groups"] for row in results("paper_layers")["rows"]}
    whole = {kind: {g["layer"]: g["curve"][-1][1] for g in groups} for kind, groups in kinds.items()}
    assert_sentence(r"stands on \((.*?) nats without it\)", [whole["ffn"][0]], "docs/results.md")
    assert_sentence(
        r"the second layer's heads \((.*?)\) and the last layer's FFN \((.*?)\)",
        [whole["kv_heads"][1], whole["ffn"][29]],
        "docs/results.md",
    )
    worst = sorted((loss, kind, layer) for kind, losses in whole.items() for layer, loss in losses.items())[-3:]
    assert [place for _, *place in reversed(worst)] == [["ffn", 0], ["kv_heads", 1], ["ffn", 29]]
    half = sorted(min(g["curve"], key=lambda p: abs(p[0] - 768))[1] for g in kinds["ffn"])
    assert sum(0.01 <= loss <= 0.05 for loss in half) >= 28


def test_data_amount() -> None:
    shown, expected = table("docs/results.md", "| samples | tokens | steps |"), {}
    for row in results("paper_data_amount")["rows"]:
        if row["name"] != "dense":
            how, name = row["recovery"], row["name"].removesuffix(" samples")
            label = f"{name}, recipe llm-pruner" if how and row["key"]["recovery"]["recipe"] == "llm-pruner" else name
            expected[label] = [how["tokens"] if how else 0, how["steps"] if how else 0, *perplexities(row)]
    assert_table(shown, expected)
    most = next(row for row in results("paper_data_amount")["rows"] if row["name"] == "10,000 samples")
    assert_sentence(r"samples of Alpaca \((.*?) / (.*?) / (.*?); \[docs", perplexities(most))
    ours = perplexities(rows_of(results("paper_criteria"), calibration="c4")["default", 0.2])
    assert_sentence(r"is better without any recovery \((.*?) / (.*?) / (.*?)\) than this model", ours, "docs/results.md")
    assert all(a < b for a, b in zip(ours, perplexities(most), strict=True))


def test_steps() -> None:
    (row,) = results("paper_steps")["rows"]
    curve = row["recovery"]["validation"]
    assert row["key"]["recovery"]["validation"] == "wikitext2"
    best = min(curve, key=lambda each: each["perplexity"])
    said = [curve[0]["perplexity"], best["perplexity"], best["step"], curve[-1]["perplexity"], curve[-1]["step"]]
    pattern = r"From (.*?) it comes down to (.*?) after (.*?) steps (?s:.*?)without training: (.*?) after (.*?)\. So recovery"
    assert_sentence(pattern, said, "docs/results.md")


def test_exactness_and_fuzzing() -> None:
    exact, fuzz = results("exactness")["summary"], results("fuzz")["summary"]
    assert_sentence(
        r"alone and all at once: (.*?) checks, (.*?) wrong \(tolerance 1e-4\), worst relative error (.*?), on SmolLM2",
        [exact["checks"], exact["wrong"], exact["worst"]],
    )
    names = ("programs", "prunable_groups", "checks_with_verify", "checks_with_zeroed_eager_module", "wrong", "worst_error")
    assert_sentence(
        r"routing and odd reshapes: (.*?) programs, (.*?) prunable groups, (.*?) checks against the verify pass and (.*?) against "
        r"the zeroed eager module, in\sdouble precision: (.*?) wrong \(tolerance 1e-9\), worst (.*?)\.\n",
        [fuzz[name] for name in names],
    )


def test_torch_pruning_on_every_architecture() -> None:
    found = results("coverage_torch_pruning")["results"]
    causal = found["causal"]
    failed = sum(causal.get(name, 0) for name in ("build failed", "crash while pruning", "crash after pruning"))
    ended = [failed, causal["timeout"], 40, causal["nothing pruned"], causal["no model"]]
    assert_sentence(
        r"; (.*?) fail while building or pruning, (.*?) run out of (.*?) s, (.*?) prune nothing, (.*?) do not run", ended
    )
    assert_sentence(r"meet no norm: (.*?) of (.*?) exact", [causal["exact"], sum(causal.values())])
    others = [n for task in ("masked", "seq2seq", "image") for n in (found[task]["exact"], sum(found[task].values()))]
    assert_sentence(r"masked models (.*?) of (.*?), sequence to\ssequence (.*?) of (.*?), image (.*?) of (.*?)\.", others)


def test_the_demo() -> None:
    demo, shown = results("demo"), table("README.md", "| SmolLM2-135M-Instruct, 20 % of all parameters removed |")
    ((text, perplexity),) = demo["perplexity"].items()
    latency = [demo["latency"][when] for when in ("before", "after")]
    (width,) = {tuple(widths) for widths in demo["widths"].values()}
    expected = {
        "parameters": [demo["parameters_before"], demo["parameters_after"]],
        f"FFN width in each of {len(demo['widths'])} layers": width,
        f"perplexity, {text.replace('the ', 'an ')} ({perplexity['after']['tokens']:,} tokens, windows of 128)": [
            perplexity[when]["perplexity"] for when in ("before", "after")
        ],
        "prefill of 128 tokens (ms)": [entry["prefill_ms"] for entry in latency],
        "decode (ms/token)": [entry["decode_ms"] for entry in latency],
        "rewritten graph against the masked dense model, relative error": [demo["verify"]["max_rel_error"]],
        "eager model against the rewritten graph, relative error": [demo["eager_error"]],
    }
    assert_table(shown, expected)


def test_memory() -> None:
    tokens, shown = results("memory")["tokens"], table("docs/results.md", "| | 10 x 64 tokens | 1 x 64 tokens |")
    amounts = ("10x64", "1x64")
    assert_table(shown, {k: [tokens[amount]["variants"][name]["above_model"] for amount in amounts] for k, name in MEMORY.items()})


def test_memory_of_a_large_model() -> None:
    tokens, shown = results("memory_7b")["tokens"], table("docs/results.md", "| at a time | 5 x 64 tokens |")
    names = {"fxprune, taylor1": "fxprune-taylor1", "fxprune, kfac (recipe default)": "fxprune-kfac"}
    runs = {label: [tokens[amount]["variants"][name] for amount in ("5x64", "10x64")] for label, name in names.items()}
    assert_table(shown, {label: [run["over_weights"] for run in found] for label, found in runs.items()})
    peaks = [run["over_weights"] for run in runs["fxprune, taylor1"]]
    assert_sentence(r"scoring 5 x 64 tokens at a time peaks at (.*?) times the weights, 10 x 64 at (.*?) \(", peaks)
    assert_sentence(r"random weights of (.*?) MiB", [runs["fxprune, taylor1"][0]["weights"]], "docs/results.md")


def test_memory_of_a_shearing_step_of_a_large_model() -> None:
    (row,) = results("shear_memory_7b")["rows"].values()
    assert max(row["measured"], key=row["measured"].__getitem__) == "begin of a period"
    said = [max(row["measured"].values()), row["peak"]]
    assert_sentence(r"on the CPU: (.*?) MiB at the most, where a period begins, against (.*?) counted", said, "docs/lorashear.md")


def test_latency() -> None:
    plans, shown = results("latency")["plans"], table("docs/results.md", "| | removed | prefill: eager |")
    assert len(shown) == len(plans)
    for cells, plan in zip(shown.values(), plans.values(), strict=True):
        expected = [] if plan["removed"] == 0 else [100 * plan["removed"]]
        for stage in ("prefill", "decode"):
            for way in ("eager", "compiled"):
                expected += [plan[way][f"{stage}_ms"]]
                expected += [plan[way]["gain"][stage]["speedup"]] if "gain" in plan[way] else []
            expected += [plan["eager"]["gain"][stage]["ideal"]] if "gain" in plan["eager"] else []
        assert_shown(cells, expected)


def test_capture() -> None:
    cases, shown = results("capture")["cases"], table("docs/results.md", "| | SmolLM2 shape |")
    shapes = ("smollm2-135m", "llama-7b", "llama-70b")
    expected = {
        "trace, symbolic batch and sequence": [cases[f"{shape}-symbolic"]["trace"] for shape in shapes],
        "find the groups": [cases[f"{shape}-symbolic"]["groups"] for shape in shapes],
        "both, with fixed sizes (dynamic_shapes={})": [cases[f"{shape}-fixed"]["total"] for shape in shapes],
        "Torch-Pruning 1.6.1, its dependency graph and groups": [cases[f"{shape}-torch-pruning"]["total"] for shape in shapes],
    }
    assert_table(shown, expected)


def test_coverage() -> None:
    summary, shown = results("coverage")["summary"], table("README.md", "| | types | instantiate |")
    assert len(shown) == len(summary)
    for cells, found in zip(shown.values(), summary.values(), strict=True):
        assert_shown(cells, [found[name] for name in ("types", "instantiate", "run", "trace", "exact", "covered")])
    text = (ROOT / "README.md").read_text()
    assert f"{sum(found['checks'] for found in summary.values()):,} checks" in text
    assert not any(found["wrong"] for found in summary.values())


@pytest.mark.parametrize("ratio", [0.2, 0.5])
def test_lorashear(ratio: float) -> None:
    book = results("paper_lorashear")
    rows, shown = rows_of(book, tasks=None), table("docs/lorashear.md", f"| {100 * ratio:.0f} % of the parameters |")
    known = {name for name, of in rows if of == ratio}
    assert [SHEARED[label] for label in shown] == [n for n in SHEARED.values() if n in known or (n == "dense" and ratio == 0.2)]
    for label, cells in shown.items():
        name = SHEARED[label]
        assert_shown(cells, perplexities(rows["dense", 0.0] if name == "dense" else rows[name, ratio], (*TEXTS, "books")))


def test_lorashear_zero_shot() -> None:
    rows = {key: row for key, row in rows_of(results("paper_lorashear")).items() if row.get("tasks")}
    shown = table("docs/lorashear.md", "| | BoolQ | PIQA | HellaSwag |")
    labels = {f"{100 * of:.0f} %: {label}": (name, of) for of in (0.2, 0.5) for label, name in SHEARED.items()}
    labels = {"dense": ("dense", 0.0), **labels}
    assert list(shown) == [label for label, row in labels.items() if row in rows]
    for label, cells in shown.items():
        assert_zero_shot(cells, rows[labels[label]]["tasks"])
