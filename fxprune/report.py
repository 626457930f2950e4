"""The report of a prune, in Markdown: what went, what it costs, and the proof that the surgery is exact."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .groups import Groups, family_of, layer_of

BAR = 24


def markdown(data: Mapping[str, Any], groups: Groups | None = None) -> str:
    """A readable report.

    Args:
        data: `PruneReport.to_json`, with what an evaluation may have added: ``perplexity``, ``latency`` and ``samples``, each a
            mapping with ``before`` and ``after``.
        groups: For the picture of widths layer by layer.
    """
    parts = [
        f"# Pruned by {data['removed']:.1%}\n",
        _summary(data),
        _proof(data),
        _widths(data, groups),
        _samples(data),
        _recipe(data),
    ]
    return "\n".join(p for p in parts if p)


def write_report(directory: Path, data: Mapping[str, Any], groups: Groups | None = None) -> Path:
    """Write ``report.md`` into a checkpoint directory and return its path."""
    path = directory / "report.md"
    path.write_text(markdown(data, groups), encoding="utf-8")
    return path


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _summary(data: Mapping[str, Any]) -> str:
    rows: list[list[Any]] = [
        _row("parameters", data["parameters_before"], data["parameters_after"], "{:,}"),
        _row("parameter memory (MB)", data["bytes_before"] / 1e6, data["bytes_after"] / 1e6, "{:,.1f}"),
    ]
    for name, ppl in (data.get("perplexity") or {}).items():
        rows.append(_row(f"perplexity, {name}", ppl["before"]["perplexity"], ppl["after"]["perplexity"], "{:,.2f}"))
    if latency := data.get("latency"):
        before, after = latency["before"], latency["after"]
        rows.append(_row(f"prefill of {before['prompt']} tokens (ms)", before["prefill_ms"], after["prefill_ms"], "{:,.1f}"))
        rows.append(_row("decode (ms/token)", before["decode_ms"], after["decode_ms"], "{:,.1f}"))
    text = table(["", "before", "after", "change"], rows)
    for name, ppl in (data.get("perplexity") or {}).items():
        p = ppl["after"]
        text += (
            f"\nPerplexity on {name}: {p['tokens']:,} predicted tokens in {p['windows']} windows of {p['length']}, stride "
            f"{p['stride']}{'' if data.get('recovery') else '; no recovery training has been done'}.\n"
        )
    return text


def _row(name: str, before: float, after: float, form: str) -> list[str]:
    return [name, form.format(before), form.format(after), f"{after / before - 1:+.1%}" if before else ""]


def _proof(data: Mapping[str, Any]) -> str:
    lines = ["## Proof\n"]
    if check := data.get("verify"):
        rounding = check.get("rounding")
        wide = "" if rounding is None else f"; in float64: in its own precision rounding makes {rounding:.1e} of it"
        lines.append(
            f"- Rewritten graph against the {check['reference']}: relative error **{check['max_rel_error']:.1e}** "
            f"(allowed {check['tolerance']:.0e}{wide}).\n"
        )
    else:
        lines.append("- Verification was switched off.\n")
    if made_up := data.get("compensation"):
        maps = made_up["maps"] or made_up["added"]
        lines.append(
            f"- Then compensated ({made_up['method']}) on {made_up['tokens']:,} calibration tokens: {len(maps)} maps that read "
            "pruned units. What was compared above are the weights before.\n"
        )
    if data.get("eager_error") is not None:
        lines.append(f"- Eager model against the rewritten graph: relative error **{data['eager_error']:.1e}**.\n")
    forms = {
        "uniform": "a stock transformers class: `AutoModelForCausalLM.from_pretrained` loads it, fxprune is not needed",
        "per-layer": "per-layer widths: `fxprune.load`, or `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)`",
        "module": "a plain module: `fxprune.load(directory, model=dense)`",
        "graph": "the rewritten graph only",
    }
    lines.append(f"- Form: {forms[data['form']]}.\n")
    if data.get("stock_load"):
        lines.append(f"- Read back by a process that never imports fxprune: {data['stock_load']}.\n")
    if data.get("note"):
        lines.append(f"- Note: {data['note']}.\n")
    return "".join(lines)


def _widths(data: Mapping[str, Any], groups: Groups | None) -> str:
    if not data["widths"] and not data["dropped"]:
        return ""
    families: dict[str, list[tuple[int, list[int]]]] = {}
    for name, sizes in data["widths"].items():
        layer = layer_of(name)
        families.setdefault(family_of(name), []).append((-1 if layer is None else layer, sizes))
    out = ["## What went\n\n"]
    if data["dropped"]:
        out.append(f"Whole blocks: {', '.join(data['dropped'])}\n\n")
    for family, entries in families.items():
        if len({tuple(s) for _, s in entries}) == 1:
            before, after = entries[0][1]
            where = f" in each of {len(entries)} layers" if len(entries) > 1 else ""
            out.append(f"- `{family}`: {before} to {after} units{where}\n")
            continue
        out.append(f"- `{family}`:\n\n```\n")
        for number, (before, after) in sorted(entries):
            filled = round(BAR * after / before)
            out.append(f"  {number:>3}  {'#' * filled}{'.' * (BAR - filled)}  {after}/{before}\n")
        out.append("```\n")
    if groups is not None:
        free = sum(g.prunable for g in groups.values())
        out.append(f"\n{len(groups)} prune groups were found, {free} of them prunable.\n")
    return "".join(out)


def _samples(data: Mapping[str, Any]) -> str:
    samples = data.get("samples")
    if not samples:
        return ""
    texts = (f"\nPrompt: *{s['prompt']}*\n\n- before: {_line(s['before'])}\n- after: {_line(s['after'])}\n" for s in samples)
    return "## Generated text\n" + "".join(texts)


def _line(text: str) -> str:
    return " ".join(text.split()) or "(nothing)"


def _recipe(data: Mapping[str, Any]) -> str:
    rows = [[f"`{k}`", v] for k, v in data["recipe"].items()]
    stages = ", ".join(f"{k} {v:.1f} s" for k, v in data["seconds"].items())
    facts = ", ".join(f"{k} {v}" for k, v in data["versions"].items())
    return f"## Recipe\n\n{table(['setting', 'value'], rows)}\nTime: {stages}.\n\nVersions: {facts}.\n"
