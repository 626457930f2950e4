"""The explorer's data, the verb that makes it, and the command."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import PlanError, UsageError
from fxprune.explorer.data import explorer_data, layout, place, rounded
from fxprune.explorer.explore import _title
from fxprune.explorer.page import SCRIPTS, embedded, render
from fxprune.groups import Groups
from fxprune.plan import PrunePlan
from fxprune.spaces import Axis, concat, product

from .command import Run
from .zoo import build, tokens

Setting = tuple[nn.Module, Groups, dict[str, torch.Tensor]]


@pytest.fixture(scope="module")
def llama() -> Setting:
    model = build("llama", num_hidden_layers=3)
    gm = fxprune.trace(model, {"input_ids": tokens(2, 7)})
    groups = fxprune.find_groups(gm)
    return model, groups, fxprune.score(gm, groups, "l2")


def planned(groups: Groups, **scores: Any) -> PrunePlan:
    keep = {"model.layers.0.mlp.ffn": range(0, 64, 2), "model.layers.1.self_attn.kv_heads": [1]}
    return PrunePlan.from_keep(groups, keep, drop=["model.layers.2"], recipe={"criterion": "l2", "ratio": 0.3}, **scores)


def data_of(page: fxprune.Explorer) -> dict[str, Any]:
    """The data as the page holds it."""
    text = page.html.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]
    data: dict[str, Any] = json.loads(text)
    assert data == json.loads(json.dumps(page.data))
    return data


def test_every_group_is_there_with_what_it_owns(llama: Setting) -> None:
    _, groups, scores = llama
    data = explorer_data(groups, title="t", scores=scores)
    assert [g["name"] for g in data["groups"]] == list(groups)
    for shown, group in zip(data["groups"], groups.values(), strict=True):
        assert (shown["kind"], shown["size"], shown["prunable"]) == (group.kind, group.size, group.prunable)
        assert [(data["parameters"][p][0], dim) for p, dim, _ in shown["members"]] == [(m.name, m.dim) for m in group.members]
        assert shown["reasons"] == list(group.axis.pins)
        if group.name in scores:
            torch.testing.assert_close(torch.tensor(shown["scores"]), scores[group.name], rtol=5e-3, atol=0)
    names = {n: (shape, trained, also) for n, shape, trained, also in data["parameters"]}
    assert names["model.embed_tokens.weight"] == ([97, 48], True, ["lm_head.weight"])
    assert names["model.rotary_emb.inv_freq"][1] is False
    assert data["summary"]["parameters"] == groups.total


def test_layouts_are_trees_and_each_stands_once(llama: Setting) -> None:
    _, groups, _ = llama
    data = explorer_data(groups, title="t")
    rotary = next(g for g in data["groups"] if g["name"] == "model.layers.head_dim")
    at = {data["parameters"][p][0]: data["layouts"][tree] for p, _, tree in rotary["members"]}
    heads = ["x", ["x", ["axis", 2, "kv_heads"], ["axis", 3, "query_groups"]], ["+", ["own", 4], ["own", 4]]]
    assert at["model.layers.0.self_attn.q_proj.weight"] == heads
    assert len({repr(tree) for tree in data["layouts"]}) == len(data["layouts"]) < 20


def test_a_layout_by_hand() -> None:
    a, b = Axis(2), Axis(3)
    assert layout(product(a, concat(b, a)), a, {b: "ffn"}) == ["x", ["own", 2], ["+", ["axis", 3, "ffn"], ["own", 2]]]


@pytest.mark.parametrize(
    ("name", "row", "column"),
    [
        ("model.layers.3.mlp.ffn", "model.layers.3", "mlp.ffn"),
        ("model.layers.12.experts.4.ffn", "model.layers.12", "experts.*.ffn"),
        ("2.body.hidden", "2", "body.hidden"),
        ("model.hidden", "", "model.hidden"),
        ("model.layers.head_dim#2", "", "model.layers.head_dim#2"),
        ("conv2.channels", "", "conv2.channels"),
    ],
)
def test_places(name: str, row: str, column: str) -> None:
    assert place(name) == (row, column)


def test_scores_keep_three_digits() -> None:
    assert rounded([0.0123456, -98765.4, 0.0, float("nan"), float("inf")]) == [0.0123, -98800.0, 0.0, None, None]


def test_a_plan_says_what_stays_and_what_is_saved(llama: Setting) -> None:
    _, groups, _ = llama
    plan = planned(groups)
    data = explorer_data(groups, title="t", plan=plan)
    kept = {g["name"]: g for g in data["groups"] if "kept" in g}
    assert set(kept) == set(plan.keep)
    for name, units in plan.keep.items():
        bits = np.unpackbits(np.frombuffer(base64.b64decode(kept[name]["kept"]), dtype=np.uint8))
        assert np.flatnonzero(bits[: groups[name].size]).tolist() == units.tolist()
        assert not bits[groups[name].size :].any()
    rows = {r["name"]: r for r in data["rows"]}
    assert list(rows) == [f"model.layers.{i}" for i in range(3)]
    assert [r["dropped"] for r in rows.values()] == [False, False, True]
    assert rows["model.layers.2"]["parameters"][1] == 0
    sums = [sum(r["parameters"][i] for r in data["rows"]) + data["outside"][i] for i in (0, 1)]
    assert sums == [groups.total, groups.remaining(plan.counts(), plan.drop)] == [data["plan"]["before"], data["plan"]["after"]]
    assert data["plan"]["recipe"] == [["criterion", "l2"], ["ratio", "0.3"]]


def test_rows_are_in_the_order_of_their_numbers() -> None:
    model = nn.Sequential(*(m for _ in range(11) for m in (nn.Linear(4, 4), nn.ReLU())))
    data = explorer_data(fxprune.find_groups(fxprune.trace(model, torch.randn(2, 4))), title="t")
    assert [r["name"] for r in data["rows"]] == [str(i) for i in range(0, 22, 2)]


def test_a_model_gets_l2_where_nothing_is_said(llama: Setting) -> None:
    model, _, scores = llama
    page = fxprune.explore(model, title="tiny")
    data = data_of(page)
    assert data["importance"] == {"name": "l2", "formula": "sum w^2", "data": "no text is read"}
    assert (data["title"], data["architecture"], data["plan"]) == ("tiny", "LlamaForCausalLM", None)
    shown = next(g for g in data["groups"] if g["name"] == "model.layers.1.mlp.ffn")
    torch.testing.assert_close(torch.tensor(shown["scores"]), scores["model.layers.1.mlp.ffn"], rtol=5e-3, atol=0)


def test_criteria_with_text(llama: Setting) -> None:
    model, *_ = llama
    batch = {"input_ids": tokens(2, 9)}
    data = data_of(fxprune.explore(model, criterion="taylor1", calibration=batch))
    assert data["importance"] == {"name": "taylor1", "formula": "sum |w g|", "data": "1 batch given"}

    def largest(name: str, weight: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
        return weight.abs()

    data = data_of(fxprune.explore(model, criterion=largest, calibration=batch))
    assert data["importance"]["name"] == "largest"


def test_groups_with_scores_or_with_what_a_plan_recorded(llama: Setting) -> None:
    _, groups, scores = llama
    given = data_of(fxprune.explore(groups, scores=scores))
    assert given["importance"]["name"] == "as given"
    assert all("scores" in g for g in given["groups"] if g["prunable"])
    plan = planned(groups, scores={"model.layers.0.mlp.ffn": torch.arange(64)})
    recorded = data_of(fxprune.explore(groups, plan=plan))
    assert recorded["importance"] == {"name": "l2", "formula": "sum w^2", "data": "recorded in the plan; calibration: none"}
    assert [g["name"] for g in recorded["groups"] if "scores" in g] == ["model.layers.0.mlp.ffn"]
    assert data_of(fxprune.explore(groups))["importance"] == {"why": "no scores were given"}


def test_a_plan_file_is_read(llama: Setting, tmp_path: Path) -> None:
    model, groups, _ = llama
    planned(groups).save(tmp_path / "plan.json")
    data = data_of(fxprune.explore(model, plan=tmp_path / "plan.json"))
    assert data["plan"]["drop"] == ["model.layers.2"]
    assert data["importance"]["name"] == "l2"  # the plan recorded no scores


def test_without_weights_there_is_no_importance() -> None:
    with torch.device("meta"):
        model = build("llama")
    data = data_of(fxprune.explore(model))
    assert data["importance"] == {"why": "the model was built without weights"}
    assert not any("scores" in g for g in data["groups"])
    with pytest.raises(UsageError, match="criterion= needs weights, and the model was built without weights"):
        fxprune.explore(model, criterion="l1")


@pytest.mark.parametrize(
    ("named", "title"), [("/home/somebody/my-model", "my-model"), ("org/name", "org/name"), ("", "LlamaForCausalLM")]
)
def test_a_machine_s_paths_stay_at_home(llama: Setting, monkeypatch: pytest.MonkeyPatch, named: str, title: str) -> None:
    model, *_ = llama
    monkeypatch.setattr(model.config, "_name_or_path", named)
    assert _title(model) == title


def test_refusals(llama: Setting) -> None:
    model, groups, scores = llama
    with pytest.raises(UsageError, match=r"expected a torch.nn.Module or its prune groups to explore, got str"):
        fxprune.explore("model")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="scores= are shown as they are: leave out criterion="):
        fxprune.explore(model, scores=scores, criterion="l1")
    with pytest.raises(UsageError, match="criterion= needs the model; with groups, give scores="):
        fxprune.explore(groups, criterion="l1")
    with pytest.raises(UsageError, match=r"criterion 'l2' reads no text: leave out calibration=, or name one that does"):
        fxprune.explore(model, calibration=["some text"])
    with pytest.raises(UsageError, match=r"the scores of group 'model.hidden' must have shape \[48\], got \[3\]"):
        fxprune.explore(groups, scores={"model.hidden": torch.ones(3)})
    with pytest.raises(UsageError, match=r"there is no prune group 'model.hiden'; did you mean 'model.hidden'\?"):
        fxprune.explore(groups, scores={"model.hiden": torch.ones(48)})
    other = fxprune.find_groups(fxprune.trace(nn.Linear(2, 3), torch.randn(1, 2)))
    with pytest.raises(PlanError, match="the plan was made for another model"):
        fxprune.explore(other, plan=planned(groups))


def test_nothing_in_the_data_ends_its_script() -> None:
    odd = "</script><!--&\u2028"
    text = embedded({"a": odd})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": odd}


def test_every_script_is_in_the_page() -> None:
    folder = Path(fxprune.__file__).parent / "explorer" / "page"
    assert sorted(SCRIPTS) == sorted(p.name for p in folder.glob("*.js"))


def test_the_page_reads_nothing_from_elsewhere(llama: Setting) -> None:
    page = render(explorer_data(llama[1], title="<b>t</b> $title $data"))
    assert "default-src 'none'" in page
    assert "http:" not in page.replace("http-equiv", "")
    assert "https:" not in page
    assert "<title>&lt;b&gt;t&lt;/b&gt; $title $data: prune groups</title>" in page


def test_saving(llama: Setting, tmp_path: Path) -> None:
    page = fxprune.explore(llama[1])
    page.save(tmp_path / "e.html")
    assert (tmp_path / "e.html").read_text() == page.html
    with pytest.raises(UsageError, match=r"cannot write the explorer '.*nowhere/e.html': No such file or directory"):
        page.save(tmp_path / "nowhere" / "e.html")


# The command


def written(place: Path) -> dict[str, Any]:
    text = (place / "e.html").read_text()
    (place / "e.html").unlink()
    data: dict[str, Any] = json.loads(text.partition('id="data">')[2].partition("</script>")[0])
    return data


def test_the_command_writes_a_page(run: Run, place: Path) -> None:
    assert run("explore", "dense", "-o", "e.html").said.startswith("wrote e.html (0.")
    assert written(place)["importance"]["name"] == "l2"
    shape = ("--samples", "2", "--length", "8", "--batch-size", "1", "--seed", "3")
    assert run("explore", "dense", "-o", "e.html", "--criterion", "wanda", "--calibration", "text.txt", *shape).status == 0
    data = written(place)
    assert data["importance"]["data"] == "2 x 8 tokens of text.txt, seed 3"
    assert data["title"] == "dense"


def test_the_command_reads_a_plan_and_needs_no_weights(run: Run, place: Path, checkpoint: Path) -> None:
    plan = os.path.relpath(checkpoint / "fxprune_plan.json", place)
    assert run("explore", "dense", "-o", "e.html", "--plan", plan, "--meta").status == 0
    data = written(place)
    assert data["plan"]["after"] < data["plan"]["before"]
    assert data["architecture"] == "LlamaForCausalLM"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("-o", "e.htm"), "cannot write an explorer as 'e.htm': its name must end in .html"),
        (("-o", "e.html", "--criterion", "l3"), "unknown criterion 'l3'; did you mean 'l2'?"),
        (
            ("-o", "e.html", "--criterion", "l1", "--meta"),
            "--criterion needs weights, and --meta reads none: leave one of them out",
        ),
        (
            ("-o", "e.html", "--calibration", "text.txt"),
            "criterion 'l2' reads no text: leave out --calibration, or name one that does",
        ),
        (("-o", "e.html", "--plan", "missing.json"), "cannot read the plan 'missing.json': No such file or directory"),
    ],
)
def test_the_command_refuses_before_it_loads(run: Run, arguments: tuple[str, ...], message: str) -> None:
    ran = run("explore", "nowhere", *arguments)
    assert ran.status in (1, 2)
    assert ran.said.startswith(f"fxprune: {message}")
