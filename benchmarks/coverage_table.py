"""Joins the rows of `benchmarks.coverage` into benchmarks/results/coverage.json and docs/coverage.md."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import TORCH_PRUNING

ENOUGH = 0.9
"""Share of the parameters outside the embeddings that counts as covered."""

TITLES = {
    "causal": "Causal language models",
    "masked": "Masked language models",
    "seq2seq": "Sequence to sequence",
    "image": "Image classification",
    "image-text": "Image and text encoders",
    "vision-language": "Vision-language models",
    "audio": "Audio encoders (CTC)",
    "speech": "Speech to text",
}

Row = Mapping[str, Any]


def read(folder: Path, tasks: Iterable[str]) -> list[dict[str, Any]]:
    """Every row in the folder, in order of task and type; pins are counted by reason, and no path of the machine is left."""
    rows = [json.loads(path.read_text()) for task in tasks for path in sorted(folder.glob(f"{task}.*.json"))]
    for row in rows:
        row |= {k: _clean(row[k]) for k in ("error", "form_note") if k in row}
        if "pinned" in row:
            row["pinned"] = dict(Counter(reason.split(" at ")[0] for *_, reason in row["pinned"]).most_common())
    return rows


def built(row: Row) -> bool:
    """Whether transformers makes the model at all."""
    return bool(row["stage"] != "build")


def ran(row: Row) -> bool:
    """Whether the dense model itself runs on the benchmark's inputs."""
    return bool(row["stage"] not in ("build", "run"))


def traced(row: Row) -> bool:
    """Whether the trace computes what the model computes."""
    return bool(row.get("traced_error", 1.0) < 1e-4)


def covered(row: Row) -> bool:
    """Whether enough of the parameters lies in a prunable group."""
    return bool(row.get("share", 0.0) >= ENOUGH)


def exact(row: Row) -> bool:
    """Whether it was pruned, and nothing was wrong."""
    return "wrong" in row and not row["wrong"]


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """The counts that the documents quote, for each task."""
    out: dict[str, Any] = {}
    for task in TITLES:
        mine = [r for r in rows if r["task"] == task]
        able = [r for r in mine if ran(r)]
        good = [r for r in able if traced(r)]
        if not mine:
            continue
        out[task] = {
            "types": len(mine),
            "instantiate": sum(map(built, mine)),
            "run": len(able),
            "trace": len(good),
            "exact": sum(map(exact, good)),
            "covered": sum(map(covered, good)),
            "checks": sum(r.get("checks", 0) for r in mine),
            "wrong": sum(len(r.get("wrong", [])) for r in mine),
            "worst": max((max(r["worst"].values()) for r in good if "worst" in r), default=0.0),
            **({"forms": dict(Counter(r.get("form", "not reached") for r in good))} if task == "causal" else {}),
        }
    return out


def markdown(header: Mapping[str, Any], rows: Sequence[Row], others: Mapping[str, Row]) -> str:
    """The document.

    Args:
        header: Command, versions and machine of the run.
        rows: What `read` gave.
        others: Torch-Pruning's rows by ``task.type``; may be empty.
    """
    found = summary(rows)
    versions = header["versions"]
    lines = [
        "# Coverage: every architecture that transformers ships",
        "",
        f"Tiny random models of every registered type of transformers {versions['transformers']} (torch {versions['torch']}), by",
        f"`{header['command']}` on {header['date']}; rows: `benchmarks/results/coverage.json`. Each model is traced, and the",
        "trace compared with the model at other sizes. Every prunable group is pruned to random units, alone and all together,",
        "and compared with the masked dense model (statistics over the kept units). Of causal LMs a uniform plan, half of the",
        "heads and of every FFN, is saved and read back by stock transformers.",
        "",
        "| task | types | instantiate | run | trace | exact | >= 90 % of parameters in a group | checks | wrong | worst error |",
        "|---|" + "---:|" * 9,
    ]
    for task, n in found.items():
        counts = [n[k] for k in ("types", "instantiate", "run", "trace", "exact", "covered", "checks", "wrong")]
        lines.append(f"| {TITLES[task].lower()} | {' | '.join(f'{c:,}' for c in counts)} | {n['worst']:.0e} |")
    lines += ["", *_reloads(found)]
    if others:
        lines += _others(rows, others)
    lines += ["", "## Exceptions", "", *_exceptions(rows)]
    for task in found:
        lines += ["", f"## {TITLES[task]}", "", *_table([r for r in rows if r["task"] == task], others, task == "causal")]
    return "\n".join(lines) + "\n"


def _reloads(found: Mapping[str, Any]) -> list[str]:
    forms = found.get("causal", {}).get("forms")
    if not forms:
        return []
    text = ", ".join(f"{n} {form}" for form, n in sorted(forms.items(), key=lambda f: -f[1]))
    return [
        f"Checkpoints of the {sum(forms.values())} causal LMs that trace: {text}. *Uniform* loads in the stock class",
        "with a solved configuration; *per-layer* loads in `AutoModelForCausalLM` with the modelling file that travels with it;",
        "*graph* is exact as a GraphModule, but the eager class computes something from a pruned size; *refused* was not written,",
        "because what was read back differed.",
    ]


def _others(rows: Sequence[Row], others: Mapping[str, Row]) -> list[str]:
    lines = [
        "",
        f"Torch-Pruning {TORCH_PRUNING} on the same models (`python -m benchmarks.coverage_torch_pruning` says how it is used):",
        "",
    ]
    lines += ["| task | models | " + " | ".join(_RESULTS) + " |", "|---|---:|" + "---:|" * len(_RESULTS)]
    for task, title in TITLES.items():
        mine = [others[f"{task}.{r['type']}"] for r in rows if r["task"] == task and f"{task}.{r['type']}" in others]
        counts = Counter(r["result"] for r in mine)
        if mine:
            lines.append(f"| {title.lower()} | {len(mine)} | " + " | ".join(str(counts[k]) for k in _RESULTS) + " |")
    return lines


_RESULTS = ("exact", "wrong", "crash after pruning", "crash while pruning", "build failed", "nothing pruned", "timeout", "no model")


def _exceptions(rows: Sequence[Row]) -> list[str]:
    kinds: list[tuple[str, Callable[[Row], bool], Callable[[Row], str]]] = [
        ("Do not instantiate", lambda r: not built(r), lambda r: r.get("error", "")),
        ("Do not run on the benchmark's inputs", lambda r: built(r) and not ran(r), _why_untraced),
        ("Do not trace", lambda r: ran(r) and not traced(r), _why_untraced),
        ("Wrong", lambda r: bool(r.get("wrong")), _what_is_wrong),
        ("Not finished", lambda r: traced(r) and "error" in r, lambda r: r["error"]),
        ("Below 90 %", lambda r: traced(r) and "share" in r and not covered(r), _why_uncovered),
        ("Not uniform", lambda r: r.get("form", "uniform") != "uniform", lambda r: f"{r['form']}: {r['form_note']}"),
    ]
    lines = []
    for title, applies, reason in kinds:
        chosen = [r for r in rows if applies(r)]
        if chosen:
            lines += [f"**{title}** ({len(chosen)})", ""]
            lines += [f"- {r['task']} `{r['type']}`: {_clean(reason(r))}" for r in chosen] + [""]
    return lines or ["None."]


def _why_untraced(row: Row) -> str:
    return str(row.get("error", f"the trace differs by {row.get('traced_error')}"))


def _what_is_wrong(row: Row) -> str:
    return "; ".join(f"{name}: {error} {why}" for name, _, error, why in row["wrong"][:3])


def _why_uncovered(row: Row) -> str:
    reasons = [f"{reason} ({n})" for reason, n in list(row["pinned"].items())[:4]]
    return f"{row['share']:.0%}; not covered: {', '.join(row['uncovered'][:3])}; pinned: {'; '.join(reasons)}"


def _clean(text: str) -> str:
    """One line, without the machine's paths."""
    words = " ".join(text.replace("|", "/").split()).split(" ")
    return " ".join(w.rpartition("site-packages/")[2] if "site-packages/" in w else w for w in words)[:400]


def _table(rows: Sequence[Row], others: Mapping[str, Row], checkpoints: bool) -> list[str]:
    head = ["type", "prunable groups", "in a group", "without hidden", "checks", "worst error"]
    head += ["checkpoint"] * checkpoints + ["Torch-Pruning"] * bool(others)
    lines = ["| " + " | ".join(head) + " |", "|---|---|" + "---:|" * 4 + "---|" * (len(head) - 6)]
    for row in rows:
        name = f"`{row['type']}`"
        if "worst" not in row:
            steps = (("does not instantiate", built), ("does not run", ran), ("does not trace", traced))
            cells = [name, next((words for words, passed in steps if not passed(row)), "not finished"), *[""] * 4]
        else:
            kinds = ", ".join(f"{n} {k}" for k, n in sorted(row["groups"].items()))
            shares = [f"{row[k]:.0%}" for k in ("share", "share_without_hidden")]
            cells = [name, kinds, *shares, str(row["checks"]), f"{max(row['worst'].values()):.0e}"]
        if checkpoints:
            plan = " + ".join(row.get("plan", []))
            cells.append(f"{row['form']}{f' ({plan})' if plan else ''}" if "form" in row else "")
        if others:
            cells.append(others.get(f"{row['task']}.{row['type']}", {}).get("result", ""))
        lines.append("| " + " | ".join(cells) + " |")
    return lines
