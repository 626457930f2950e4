"""Groups as rows, as a table and as a summary."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn

from fxprune.capture import trace
from fxprune.groups import Groups
from fxprune.passes.dependency import find_groups
from fxprune.table import GroupSummary, _nameless, _ranges, group_rows, group_summary, group_table

from .zoo import build, tokens


@pytest.fixture(scope="module")
def llama() -> Groups:
    return find_groups(trace(build("llama", num_hidden_layers=3, vocab_size=101), {"input_ids": tokens(2, 7)}))


class Layer(nn.Module):
    def __init__(self, width: int, *, turned: bool) -> None:
        super().__init__()
        self.up = nn.Linear(6, width)
        self.down = nn.Linear(width, 6)
        self.turned = turned

    def forward(self, x: Tensor) -> Tensor:
        inner = self.up(x).relu()
        out: Tensor = x + self.down(inner.flip(-1) if self.turned else inner)
        return out


class Stack(nn.Module):
    """Layers of which one is wider, and two take their entries in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(Layer(width, turned=i in (1, 3)) for i, width in enumerate([10, 10, 14, 10, 10])))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.layers(x)
        return out


@pytest.fixture(scope="module")
def stack() -> Groups:
    return find_groups(trace(Stack(), torch.randn(4, 6)))


def printed(groups: Groups, width: int = 200, **options: bool) -> str:
    out = io.StringIO()
    Console(file=out, width=width).print(group_table(groups, **options))
    return out.getvalue()


def test_one_row_a_group(llama: Groups) -> None:
    rows = group_rows(llama)
    assert [r.name for r in rows] == list(llama)
    assert all(r.groups == (r.name,) for r in rows)
    ffn = next(r for r in rows if r.name == "model.layers.1.mlp.ffn")
    assert (ffn.kind, ffn.units, ffn.parameters_per_unit, ffn.layers) == ("ffn", 64, 144.0, "1")
    assert (ffn.prunable, ffn.reason, ffn.normalised) == (True, "", False)
    assert set(ffn.parameters) == {
        f"model.layers.1.mlp.{p}" for p in ("gate_proj.weight[0]", "up_proj.weight[0]", "down_proj.weight[1]")
    }


def test_alike_layers_share_a_row(llama: Groups) -> None:
    rows = {r.name: r for r in group_rows(llama, collapse=True)}
    assert len(rows) == 7
    ffn = rows["model.layers.*.mlp.ffn"]
    assert ffn.layers == "0-2"
    assert ffn.groups == tuple(f"model.layers.{i}.mlp.ffn" for i in range(3))
    assert len(ffn.parameters) == 9
    hidden = rows["model.hidden"]
    assert (hidden.layers, hidden.normalised, hidden.kind) == ("0-2", True, "hidden")
    assert rows["model.embed_tokens.other"].layers == ""


def test_layers_that_differ_do_not(stack: Groups) -> None:
    rows = [r for r in group_rows(stack, collapse=True) if r.kind == "ffn"]
    assert [(r.name, r.units, r.layers, r.prunable, r.reason) for r in rows] == [
        ("layers.*.ffn", 10, "0,4", True, ""),
        ("layers.*.ffn", 10, "1,3", False, "entries change places at aten.flip"),
        ("layers.2.ffn", 14, "2", True, ""),
    ]
    single = next(r for r in group_rows(stack) if r.name == "layers.3.ffn")
    assert single.reason == "entries change places at flip_1 (aten.flip)"


def test_only_prunable(stack: Groups) -> None:
    rows = group_rows(stack, only_prunable=True)
    assert [r.name for r in rows] == ["layers.0.ffn", "layers.2.ffn", "layers.4.ffn"]
    assert "no: " not in printed(stack, only_prunable=True)


def test_rows_are_json(llama: Groups) -> None:
    data = [dataclasses.asdict(r) for r in group_rows(llama, collapse=True)]
    assert json.loads(json.dumps(data))[1]["name"] == "model.hidden"


def test_the_table_reads_well(llama: Groups) -> None:
    text = printed(llama)
    assert "parameters" in text
    (line,) = [row for row in text.splitlines() if "mlp.ffn" in row]
    assert line.split() == ["model.layers.*.mlp.ffn", "ffn", "64", "144", "0-2", "yes"]
    assert "yes, normalised" in text
    assert "no: rows are looked up by number at embedding (aten.embedding)" in text
    assert str(group_summary(llama)) in text
    expanded = printed(llama, expand=True)
    assert all(name in expanded for name in llama)


def test_narrow_terminals_lose_nothing(llama: Groups) -> None:
    lines = printed(llama, width=70).splitlines()
    width = next(line for line in lines if " kind " in line).index("kind")
    assert "model.layers.*.self_attn.query_groups" in "".join(line[:width].strip() for line in lines)


def test_names_are_no_markup() -> None:
    model = nn.Sequential()
    model.add_module("[red]a", nn.Linear(4, 6))
    model.add_module("b", nn.Linear(6, 2))
    assert "[red]a.other" in printed(find_groups(trace(model, torch.randn(2, 4))))


def test_summary_counts_what_units_can_take_along(stack: Groups) -> None:
    summary = group_summary(stack)
    # up.weight, up.bias and down.weight of the layers 0, 2 and 4; the width between layers is an input, hence pinned
    free = sum(w * 6 + w + 6 * w for w in (10, 14, 10))
    total = sum(w * 6 + w + 6 * w + 6 for w in (10, 10, 14, 10, 10))
    assert summary == GroupSummary(parameters=total, prunable_parameters=free, groups=6, prunable_groups=3, blocks=5)
    assert summary.share == free / total
    assert str(summary) == (
        f"{total} parameters, {100 * free / total:.1f} % of them in prunable groups; 3 of 6 groups prunable, 5 residual blocks"
    )


def test_summary_counts_an_element_once(llama: Groups) -> None:
    summary = group_summary(llama)
    assert summary.parameters == summary.prunable_parameters == llama.total  # the hidden size alone reaches all of it
    assert summary.share == 1.0


def test_summary_of_a_part_of_a_dimension() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(3, 8, bias=False)
            self.last = nn.Linear(8, 2, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            a, b = self.first(x).chunk(2, -1)
            out: Tensor = self.last(torch.cat([a, b.flip(-1)], -1))
            return out

    summary = group_summary(find_groups(trace(Half(), torch.randn(2, 3))))
    assert (summary.parameters, summary.prunable_parameters) == (40, 4 * 3 + 4 * 2)


def test_summary_of_no_parameters() -> None:
    summary = group_summary(find_groups(trace(nn.ReLU(), torch.randn(2, 3))))
    assert summary.share == 0.0
    assert str(summary) == "0 parameters, 0.0 % of them in prunable groups; 0 of 0 groups prunable, 0 residual blocks"


@pytest.mark.parametrize(("numbers", "text"), [([], ""), ([4], "4"), (range(30), "0-29"), ([5, 0, 3, 2, 4, 2, 9], "0,2-5,9")])
def test_ranges(numbers: list[int], text: str) -> None:
    assert _ranges(numbers) == text


@pytest.mark.parametrize(
    ("reason", "text"),
    [
        ("padded at pad_3 (aten.pad)", "padded at aten.pad"),
        ("layouts that do not fit each other meet at view_12 (aten.view)", "layouts that do not fit each other meet at aten.view"),
        ("a model input", "a model input"),
    ],
)
def test_nameless(reason: str, text: str) -> None:
    assert _nameless(reason) == text
