"""The model card: ``README.md`` with the metadata that the Hugging Face hub reads, the numbers, the recipe and how to load it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from .blocks import Listing, Notes, Table, Text, code, in_markdown, markdown
from .loading import TRANSFORMERS_FORMS, loading_class
from .numbers import Record, base_model, numbers, numbers_table, part
from .recipe import prune_command, recipe_yaml, recover_commands, replay_command, shear_command
from .sections import UNREADABLE
from .training import held_out

CARD_FILE = "README.md"

PIPELINES = {
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
    "ForMaskedLM": "fill-mask",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForImageClassification": "image-classification",
    "ForCTC": "automatic-speech-recognition",
    "ForSpeechSeq2Seq": "automatic-speech-recognition",
}

_SEAL = re.compile(r"\n<!-- written by fxprune, (\w{16}): with another text above it, it is left as it is -->\n$")


def card(record: Record) -> str:
    """The whole file; `huggingface_hub.ModelCard.load` reads it."""
    body = f"---\n{metadata(record)}---\n\n{_body(record)}"
    return f"{body}\n<!-- written by fxprune, {_digest(body)}: with another text above it, it is left as it is -->\n"


def is_ours(text: str) -> bool:
    """True if a card is as it was written, so that it may be written again."""
    seal = _SEAL.search(text)
    return seal is not None and _digest(text[: seal.start()]) == seal[1]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def metadata(record: Record) -> str:
    """The YAML at the head of the card."""
    from huggingface_hub import ModelCardData

    report = record.report
    dense, form = part(report, "dense"), report.get("form")
    kind = str(dense.get("class") or "")
    tags = ["pruning", "structured-pruning", "fxprune", *(["custom_code"] if form == "per-layer" else [])]
    data = ModelCardData(
        base_model=base_model(dense),
        library_name="transformers" if form in TRANSFORMERS_FORMS else "fxprune",
        license=dense.get("license"),
        pipeline_tag=next((task for end, task in PIPELINES.items() if kind.endswith(end)), None),
        tags=tags,
    )
    return str(data.to_yaml()) + "\n"


def _body(record: Record) -> str:
    report = record.report
    dense = part(report, "dense")
    of = code(dense["name"]) if dense.get("name") else "a dense model"
    share = report.get("removed")
    what = f"with {share:.1%} of its parameters removed" if isinstance(share, int | float) else "trained again"
    parts = [
        f"# {in_markdown(record.name)}",
        in_markdown(f"This is {of} {what} by fxprune (structured pruning on torch.fx graphs)."),
    ]
    for title, build in (("Load it", _loading), ("Numbers", _numbers), ("How it was made", _making), ("Limits", _limits)):
        try:
            blocks = [markdown(block) for block in build(record)]
        except UNREADABLE as error:
            blocks = [in_markdown(f"This part of the report cannot be read: {type(error).__name__}: {error}")]
        if blocks:
            parts += [f"## {title}", *blocks]
    return "\n\n".join(parts) + "\n"


def _loading(record: Record) -> Iterator[Text | Listing]:
    form, auto, name = record.report.get("form"), loading_class(record), repr(record.name)
    if form in TRANSFORMERS_FORMS:
        trust = ", trust_remote_code=True" if form == "per-layer" else ""
        yield Listing(f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({name}{trust})", "python")
    if form == "uniform":
        yield Text("It is of a stock transformers class: fxprune is not needed.")
    elif form == "per-layer":
        yield Text(
            "Its layers have widths of their own, which no stock class expresses: the small modelling file beside the weights "
            "changes the stock class when it is loaded. With fxprune installed, no remote code is needed:"
        )
        yield Listing(f"import fxprune\n\nmodel = fxprune.load({name})", "python")
    elif form == "module":
        yield Listing(
            f"import fxprune\n\nmodel = fxprune.load({name}, model=dense)    # the dense module that it was pruned from", "python"
        )


def _numbers(record: Record) -> Iterator[Table | Notes]:
    found = numbers(record)
    if found:
        yield numbers_table(found)
    said = [f"{n.label}: {n.protocol}" for n in found if n.group in ("perplexity", "task") and n.protocol]
    recovery = record.report.get("recovery")
    if recovery and (both := held_out(recovery)):
        held = (recovery["data"].get("validation") or {}).get("sources", "held-out text")
        said.append(f"perplexity on {held}: {both[0]:,.2f} before recovery, {both[1]:,.2f} after")
    if said:
        yield Notes(said)


def _making(record: Record) -> Iterator[Text | Listing]:
    report = record.report
    if (report.get("recipe") or {}).get("replayed") and "shearing" not in report:
        yield Listing(replay_command(report, record.name), "bash")
        yield Text("with `fxprune_plan.json`, which says which units stay.")
    if text := recipe_yaml(report):
        yield Listing(prune_command(report, record.name) or shear_command(report, record.name), "bash")
        yield Text("with `fxprune_recipe.yaml`:")
        yield Listing(text, "yaml")
    if calibrated := part(report, "recipe").get("calibration"):
        yield Text(f"Calibration: {calibrated}.")
    for recover in recover_commands(report, record.name):
        yield Text("and then")
        yield Listing(recover, "bash")
    if versions := part(report, "versions"):
        yield Text(f"Versions: {', '.join(f'{k} {v}' for k, v in versions.items() if k not in ('machine', 'device'))}.")


def _limits(record: Record) -> Iterator[Notes]:
    report = record.report
    said = ["What holds for the dense model, its licence and its biases among it, holds here; pruning adds errors of its own."]
    if report.get("widths") and not report.get("recovery"):
        said.append("No recovery training has been done.")
    if not any(n.group == "task" for n in numbers(record)):
        said.append("No task has been measured: evaluate it on yours before you rely on it.")
    if report.get("form") == "per-layer":
        said.append("Engines that build models from a stock configuration cannot load widths that differ from layer to layer.")
    yield Notes(said)
