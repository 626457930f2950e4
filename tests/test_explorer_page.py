"""The explorer in a real browser: no word on the console, and what it shows is what Python says."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune.groups import Groups
from fxprune.plan import PrunePlan

from .browser import browser, picture, visit
from .zoo import build, tokens

pytestmark = browser

ODD = "</script><script>document.title='taken'</script><img src=x onerror=document.title='taken'>"


@pytest.fixture(scope="module")
def groups() -> Groups:
    return fxprune.find_groups(fxprune.trace(build("llama"), {"input_ids": tokens(2, 7)}))


@pytest.fixture(scope="module")
def scores(groups: Groups) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(0)
    return {n: torch.rand(g.size, generator=made) for n, g in groups.items() if g.prunable}


@pytest.fixture(scope="module")
def plan(groups: Groups) -> PrunePlan:
    return PrunePlan.from_keep(groups, {"model.layers.0.mlp.ffn": range(40)}, drop=["model.layers.1"], recipe={"note": ODD})


@pytest.fixture(scope="module")
def page(groups: Groups, scores: dict[str, torch.Tensor], plan: PrunePlan) -> str:
    return fxprune.explore(groups, scores=scores, plan=plan, title=ODD).html


def test_it_opens_in_silence_with_every_group(page: str, groups: Groups, tmp_path: Path) -> None:
    seen = visit(
        page,
        tmp_path,
        """return {
            ready: document.documentElement.dataset.ready, title: document.title, heading: document.querySelector("h1").textContent,
            rows: [...document.querySelectorAll("#rows tr td:first-child")].map((c) => c.textContent),
            bars: [...document.querySelectorAll(".bar")].map((b) => b.getAttribute("aria-label").split(";")[0]),
            stats: document.getElementById("stats").textContent, foot: document.getElementById("footer").textContent,
            unnamed: [...document.querySelectorAll("button, input, select, canvas[tabindex]")].filter((e) =>
                !(e.getAttribute("aria-label") || e.textContent || e.labels?.length)).length,
            group: document.getElementById("group-title").textContent,
        }""",
    )
    assert seen.console == []
    assert seen.answer["ready"] == "yes"
    assert seen.answer["title"] == f"{ODD}: prune groups"
    assert seen.answer["heading"] == ODD
    assert seen.answer["rows"] == list(groups)
    assert sorted(seen.answer["bars"]) == sorted(groups)
    assert "groups prunable10 of 11" in seen.answer["stats"]
    assert "rounded to 3 significant digits" in seen.answer["foot"]
    assert seen.answer["unnamed"] == 0
    assert seen.answer["group"] == "model.layers.0.mlp.ffn"


def spelled(positions: list[int]) -> str:
    """``0-63, 192-255`` with no more than six runs."""
    cuts = [0, *(i for i, (a, b) in enumerate(pairwise(positions), 1) if b != a + 1), len(positions)]
    runs = [positions[a:b] for a, b in pairwise(cuts)]
    text = ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}\u2013{r[-1]}" for r in runs[:6])
    return text if len(runs) <= 6 else f"{text}, \u2026 ({len(positions)} in all)"


def test_each_unit_owns_what_python_says(page: str, groups: Groups, tmp_path: Path) -> None:
    seen = visit(
        page,
        tmp_path,
        """const press = (key) => document.getElementById("canvas").dispatchEvent(new KeyboardEvent("keydown", { key }));
        return [...document.querySelectorAll("#rows button")].map((button) => {
            button.click();
            press("Home");
            const size = Number(document.getElementById("canvas").getAttribute("aria-valuemax")) + 1;
            return Array.from({ length: size }, () => {
                const own = [...document.querySelectorAll("[data-member]")].map((c) => c.textContent);
                press("ArrowRight");
                return own;
            });
        });""",
    )
    assert seen.console == []
    wanted = [[[spelled(m.indices([u]).tolist()) for m in g.members] for u in range(g.size)] for g in groups.values()]
    assert seen.answer == wanted


def number(value: float) -> str:
    return f"{float(f'{value:.3g}'):g}"


def test_the_plan_is_shown_to_the_unit(
    page: str, groups: Groups, scores: dict[str, torch.Tensor], plan: PrunePlan, tmp_path: Path
) -> None:
    seen = visit(
        page,
        tmp_path,
        """const say = (unit) => {
            const canvas = document.getElementById("canvas");
            const press = (key) => canvas.dispatchEvent(new KeyboardEvent("keydown", { key }));
            press("Home");
            for (let i = 0; i < unit; i++) press("ArrowRight");
            return canvas.getAttribute("aria-valuetext");
        };
        const units = [39, 40].map(say), row = document.querySelector('tr[data-row="model.layers.1"]');
        const columns = [...document.querySelectorAll("#profile .columns")];
        const depth = columns.map((c) => [c.getAttribute("aria-label"), c.children.length]);
        document.querySelector('tr[data-row="model.layers.1"] button').click();
        return {
            units, depth, dropped: row.className, after: row.querySelector(".amount").title,
            text: document.getElementById("plan").textContent, why: document.querySelector("#group .pinned").textContent,
            gone: document.getElementById("canvas").getAttribute("aria-valuetext"),
            bar: document.querySelector('tr[data-row="model.layers.0"] td:nth-of-type(4) .n').textContent,
        };""",
    )
    kept, removed = seen.answer["units"]
    assert kept.startswith("unit 39, score ")
    assert (kept.split(", ")[-1], removed.split(", ")[-1]) == ("kept", "removed")
    scored, stays = seen.answer["depth"]
    means = [number(float(scores[f"model.layers.{i}.mlp.ffn"].mean())) for i in (0, 1)]
    assert scored[0].startswith(f"mean score by layer: least {min(means)} in layer {means.index(min(means))}, most {max(means)}")
    assert stays == ["kept by layer: least 0 % in layer 1, most 63 % in layer 0", 2]
    assert seen.answer["dropped"] == "dropped"
    assert seen.answer["after"].startswith("0 of ")
    assert seen.answer["why"] == "Dropped with the whole block model.layers.1."
    assert seen.answer["gone"].endswith("removed")
    assert seen.answer["bar"] == "40/64"
    before, after = groups.total, groups.remaining(plan.counts(), plan.drop)
    assert f"{before:,} \u2192 {after:,} parameters, {before - after:,} saved" in seen.answer["text"]
    assert ODD in seen.answer["text"]


def test_the_table_sorts_and_filters(page: str, groups: Groups, scores: dict[str, torch.Tensor], tmp_path: Path) -> None:
    seen = visit(
        page,
        tmp_path,
        """const names = () => [...document.querySelectorAll("#rows tr td:first-child")].map((c) => c.textContent);
        const head = (key) => document.querySelector(`th[data-key="${key}"]`), set = (id, value, kind) => {
            const field = document.getElementById(id);
            field.value = value;
            field.dispatchEvent(new Event(kind, { bubbles: true }));
        };
        const out = {};
        head("units").querySelector("button").click();
        out.rising = [names(), head("units").getAttribute("aria-sort")];
        head("units").querySelector("button").click();
        out.falling = [names(), head("units").getAttribute("aria-sort")];
        head("mean").querySelector("button").click();
        out.mean = names();
        head("name").querySelector("button").click();
        out.named = [names(), head("units").getAttribute("aria-sort")];
        set("find", "layers.1 attn", "input");
        out.found = [names(), document.getElementById("count").textContent];
        set("find", "", "input");
        set("kind", "ffn", "change");
        out.kind = names();
        set("kind", "", "change");
        set("state", "pinned", "change");
        out.pinned = [names(), document.querySelector("#rows td:last-child").textContent];
        set("state", "pruned", "change");
        out.pruned = names();
        return out;""",
    )
    assert seen.console == []
    found, sizes = seen.answer, {n: g.size for n, g in groups.items()}
    assert found["rising"] == [sorted(groups, key=sizes.__getitem__), "ascending"]
    assert found["falling"] == [sorted(groups, key=lambda n: -sizes[n]), "descending"]
    means = {n: float(s.mean()) for n, s in scores.items()}
    assert found["mean"] == [*sorted(means, key=means.__getitem__), "model.embed_tokens.other"]  # what is unknown stands last
    assert found["named"] == [sorted(groups), "none"]
    attention = [f"model.layers.1.self_attn.{k}" for k in ("head_dim", "kv_heads", "query_groups")]
    assert found["found"] == [attention, "3 of 11 groups"]
    assert found["kind"] == ["model.layers.0.mlp.ffn", "model.layers.1.mlp.ffn"]
    assert found["pinned"] == [
        ["model.embed_tokens.other"],
        "no: rows are looked up by number at embedding (aten.embedding)",
    ]
    assert found["pruned"] == ["model.layers.0.mlp.ffn", *(n for n in sorted(groups) if n.startswith("model.layers.1."))]


def test_pictures_keys_and_addresses(page: str, tmp_path: Path) -> None:
    seen = visit(
        page,
        tmp_path,
        """const out = {}, canvas = () => document.getElementById("canvas"), ink = () => canvas().toDataURL();
        out.pinned = document.querySelector("#group .pinned").textContent;
        const bars = [...document.querySelectorAll("#map button")];
        bars[0].click();
        out.hash = location.hash;
        bars[0].focus();
        bars[0].dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
        out.below = document.activeElement.getAttribute("aria-label").split(";")[0];
        document.activeElement.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowRight", bubbles: true }));
        out.right = document.activeElement.getAttribute("aria-label").split(";")[0];
        document.querySelector('#rows tr[data-group="2"] button').click();
        const heat = ink();
        document.querySelector('input[value="bars"]').click();
        const plain = ink();
        document.querySelector('input[value="rank"]').click();
        out.pictures = new Set([heat, plain, ink()]).size;
        canvas().dispatchEvent(new KeyboardEvent("keydown", { key: "Home" }));
        out.first = canvas().getAttribute("aria-valuetext");
        canvas().dispatchEvent(new KeyboardEvent("keydown", { key: "End" }));
        out.last = canvas().getAttribute("aria-valuetext");
        const box = canvas().getBoundingClientRect();
        canvas().dispatchEvent(new PointerEvent("pointermove", { clientX: box.right - 3, clientY: box.top + 20 }));
        out.tip = document.getElementById("tip").textContent;
        return out;""",
        address="#model.embed_tokens.other",
    )
    assert seen.console == []
    found = seen.answer
    assert found["pinned"] == (
        "Pinned: no unit may be removed.rows are looked up by number at embedding (aten.embedding)a model output"
    )
    assert found["hash"] == "#model.layers.0.self_attn.kv_heads"
    assert found["below"] == "model.layers.1.self_attn.kv_heads"
    assert found["right"] == "model.layers.1.self_attn.query_groups"
    assert found["pictures"] == 3
    assert "rank 1 of 4" in found["first"]
    assert "rank 4 of 4" in found["last"]
    assert found["tip"].startswith(found["last"])
    assert "model.layers.0.self_attn.q_proj.weight [dim 0]: " in found["tip"]


def test_without_importance_it_says_why(groups: Groups, tmp_path: Path) -> None:
    with torch.device("meta"):
        model = build("llama")
    seen = visit(
        fxprune.explore(model).html,
        tmp_path,
        """return { head: document.getElementById("subtitle").textContent, scale: document.getElementById("scale").textContent,
            choices: document.querySelectorAll("#units input, #paint input").length, plan: document.getElementById("plan").hidden,
            mean: document.querySelectorAll('th[data-key="mean"], th[data-key="kept"]').length }""",
    )
    assert seen.console == []
    assert seen.answer["head"] == "LlamaForCausalLM \u00b7 no importance: the model was built without weights"
    assert seen.answer["scale"].startswith("No importance: the model was built without weights.")
    assert (seen.answer["choices"], seen.answer["plan"], seen.answer["mean"]) == (0, True, 0)


@pytest.mark.parametrize("module", [torch.nn.ReLU(), torch.nn.Linear(3, 2)])
def test_models_without_layers_or_groups(module: torch.nn.Module, tmp_path: Path) -> None:
    page = fxprune.explore(fxprune.find_groups(fxprune.trace(module, torch.randn(2, 3)))).html
    assert visit(page, tmp_path).console == []


@pytest.mark.parametrize("width", [1400, 420])
def test_nothing_hangs_over_the_edge(page: str, tmp_path: Path, width: int) -> None:
    script = "return [window.innerWidth, document.documentElement.scrollWidth]"
    inner, wide = visit(page, tmp_path, script, width=width).answer
    assert inner == width
    assert wide <= inner


@pytest.mark.parametrize("width", [1400, 420])
def test_what_is_broken_or_too_wide_would_be_seen(tmp_path: Path, width: int) -> None:
    broken = '<!doctype html><body><div style="width:2000px">wide</div><script>nothing.here()</script></body>'
    seen = visit(broken, tmp_path, "return [window.innerWidth, document.documentElement.scrollWidth]", width=width)
    assert [line.split(", source")[0] for line in seen.console] == ['"Uncaught ReferenceError: nothing is not defined"']
    assert seen.answer == [width, 2008]
    silent = '<!doctype html><body><script>console.warn("a word")</script></body>'
    assert [line.split(", source")[0] for line in visit(silent, tmp_path, width=width).console] == ['"a word"']


def test_bars_shrink_before_the_map_scrolls(tmp_path: Path) -> None:
    groups = fxprune.find_groups(fxprune.trace(build("llama", tied=False), {"input_ids": tokens(2, 7)}))
    page = fxprune.explore(groups, plan=PrunePlan.from_keep(groups, {"model.layers.0.mlp.ffn": range(20)})).html
    script = """const map = document.getElementById("map");
        return [map.scrollWidth, map.clientWidth, ...Array.from(map.querySelectorAll("canvas"), (c) => c.clientWidth)]"""
    (wide, room, *narrow), (_, _, *roomy) = (visit(page, tmp_path, script, width=width).answer for width in (1280, 1600))
    assert wide <= room
    assert sum(narrow) < sum(roomy)


def test_it_looks_like_something_in_light_and_in_the_dark(page: str, tmp_path: Path) -> None:
    light, dark = (picture(page, tmp_path, dark=night) for night in (False, True))
    for rows, corner in ((light, "f4f5f7"), (dark, "0f141a")):
        assert rows[0][1:4].hex() == corner  # the first pixel
        assert len(set(rows)) > 200  # of a blank page all rows are alike


def test_the_size_of_smollm2_is_light_and_quick(tmp_path: Path) -> None:
    """Thirty layers with 48,788 scores: under 3 MB, and drawn in under two seconds."""
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    inputs: dict[str, Any] = {"input_ids": torch.zeros(1, 8, dtype=torch.long, device="meta")}
    groups = fxprune.find_groups(fxprune.trace(model, inputs, dynamic_shapes={}))
    scores = {n: torch.rand(g.size) for n, g in groups.items() if g.prunable}
    assert sum(map(len, scores.values())) == 48788
    page = fxprune.explore(groups, scores=scores).html
    assert len(page.encode()) < 3e6
    script = "return [document.documentElement.dataset.ready, performance.now()]"
    times = [visit(page, tmp_path, script) for _ in range(3)]  # the machine may be busy
    assert [seen.console for seen in times] == [[], [], []]
    assert [seen.answer[0] for seen in times] == ["yes", "yes", "yes"]
    assert min(seen.answer[1] for seen in times) < 2000
