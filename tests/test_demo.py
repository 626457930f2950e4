"""The demo from start to finish, on a model that takes a moment: what it writes, and that what it prints is what it wrote."""

from __future__ import annotations

import gzip
import html
import io
import json
import logging
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from huggingface_hub import ModelCard
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from fxprune import demo
from fxprune.api import PruneResult

from .reported import Tables, unreadable
from .zoo import build, tokenizer, tokens

QUICK = {"samples": 4, "length": 16, "sensitivity_samples": 2, "levels": 2, "rounds": 1}


@dataclass(frozen=True)
class Shown:
    """A demo that ran.

    Attributes:
        result: What it returned.
        output: The directory that it wrote.
        data: The report in it.
        said: What it printed, in one line.
    """

    result: PruneResult
    output: Path
    data: dict[str, Any]
    said: str


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Shown:
    place = tmp_path_factory.mktemp("demo")
    cast(PreTrainedModel, build("llama", max_position_embeddings=256)).save_pretrained(place / "tiny")
    tokenizer().save_pretrained(place / "tiny")
    chosen = random.Random(0)
    with gzip.open(place / "wikitext2_raw_valid.txt.gz", "wt") as file:
        file.write(" ".join(f"w{chosen.randrange(94)}" for _ in range(256)))
    (place / "out").mkdir()
    (place / "out" / "config.json").write_text("of an earlier demo")
    (place / "out" / "earlier.txt").write_text("of an earlier demo")
    level = logging.getLogger("transformers").level
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FXPRUNE_DATA", str(place))
        patch.setattr(demo, "model_file", lambda: place / "tiny")
        patch.setattr(demo, "QUICK", QUICK)
        printed = io.StringIO()
        patch.setattr(demo, "out", Console(file=printed, width=140, force_terminal=False, color_system=None))
        result = demo.run(place / "out")
    logging.getLogger("transformers").setLevel(level)
    transformers_logging.enable_progress_bar()
    data = json.loads((place / "out" / "fxprune_report.json").read_text())
    return Shown(result, place / "out", data, " ".join(printed.getvalue().split()))


def test_stock_transformers_loads_what_it_wrote(shown: Shown) -> None:
    stock: Any = AutoModelForCausalLM.from_pretrained(shown.output)
    assert type(stock).__module__ == "transformers.models.llama.modeling_llama"
    assert sum(p.numel() for p in stock.parameters()) == shown.data["parameters_after"] < shown.data["parameters_before"]
    assert shown.data["removed"] == pytest.approx(0.2, abs=0.05)
    with torch.no_grad():
        assert torch.equal(stock(tokens(2, 9)).logits, cast(Any, shown.result.model)(tokens(2, 9)).logits)
    assert not (shown.output / "earlier.txt").exists(), "the output is replaced"
    assert ModelCard.load(shown.output / "README.md").data.base_model == "HuggingFaceTB/SmolLM2-135M-Instruct"


def test_the_report_has_every_number(shown: Shown) -> None:
    check = shown.data["verify"]
    assert check["ok"]
    assert 0 <= check["max_rel_error"] < check["tolerance"] <= 1e-3
    assert shown.data["eager_error"] < check["tolerance"]
    assert list(shown.data["perplexity"]) == ["the embedded passage", "WikiText-2 (validation)"]
    text = gzip.decompress((shown.output.parent / "wikitext2_raw_valid.txt.gz").read_bytes()).decode()
    ids = torch.tensor(tokenizer()(text)["input_ids"]).view(2, 128)
    dense: Any = shown.result.dense_model
    for when, model in (("before", dense), ("after", cast(Any, AutoModelForCausalLM.from_pretrained(shown.output)))):
        with torch.no_grad():
            predicted = model(ids).logits[:, :-1].flatten(0, 1).log_softmax(-1)
        wanted = torch.nn.functional.nll_loss(predicted, ids[:, 1:].flatten()).exp()
        found = shown.data["perplexity"]["WikiText-2 (validation)"][when]
        assert (found["tokens"], found["windows"]) == (254, 2)
        assert found["perplexity"] == pytest.approx(float(wanted), rel=1e-4)
    for timed in shown.data["latency"].values():
        assert (timed["prompt"], timed["prefill_ms"] > 0, timed["decode_ms"] > 0) == (128, True, True)
    assert [sample["prompt"] for sample in shown.data["samples"]] == list(demo.PROMPTS)


def test_the_pages_say_it(shown: Shown) -> None:
    assert unreadable(shown.output) == []
    table = Tables((shown.output / "report.html").read_text())
    assert table.open == []
    for name, both in shown.data["perplexity"].items():
        before, after = (both[when]["perplexity"] for when in ("before", "after"))
        assert table.row(f"perplexity, {name}") == [f"{before:,.2f}", f"{after:,.2f}", f"{after / before - 1:+.1%}"]
    assert shown.data["stock_load"] in html.unescape((shown.output / "report.html").read_text())


def test_what_is_printed_is_what_was_written(shown: Shown) -> None:
    data, said = shown.data, shown.said
    rows = [("parameters", data["parameters_before"], data["parameters_after"], "{:,}")]
    for name, both in data["perplexity"].items():
        label = f"perplexity, {name} ({both['after']['tokens']:,} tokens, windows of 128)"
        rows.append((label, both["before"]["perplexity"], both["after"]["perplexity"], "{:.2f}"))
    before, after = data["latency"]["before"], data["latency"]["after"]
    rows.append(("prefill, 128 tokens (ms)", before["prefill_ms"], after["prefill_ms"], "{:.1f}"))
    rows.append(("decode (ms/token)", before["decode_ms"], after["decode_ms"], "{:.1f}"))
    for label, dense, pruned, form in rows:
        assert f"│ {label} │ {form.format(dense)} │ {form.format(pruned)} │ {pruned / dense - 1:+.1%} │" in said
    assert f"tiny: LlamaForCausalLM, {data['parameters_before']:,} parameters, dequantised to torch.float32" in said
    assert f"verified against the {data['verify']['reference']}: relative error {data['verify']['max_rel_error']:.1e}" in said
    assert f"least squares gave the {len(data['compensation']['maps'])} maps that read pruned units weights" in said
    assert f"eager model against the rewritten graph: relative error {data['eager_error']:.1e}" in said
    assert data["stock_load"].startswith(f"LlamaForCausalLM, {data['parameters_after']:,} parameters, continues ")
    assert " ".join(data["stock_load"].split()) in said
    widths = {n.partition("layers.")[2].partition(".")[2]: w for n, w in data["widths"].items()}
    for family, (wide, narrow) in widths.items():
        assert f"{family}: {wide} -> {narrow}" in said
    for sample in data["samples"]:
        assert f"{sample['prompt']} before: {' '.join(sample['before'].split())} after: {' '.join(sample['after'].split())}" in said
    assert f"report {shown.output / 'report.html'} time" in said
