"""Pictures of a block: what is drawn, how it is named, and what is refused."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from torch import Tensor, nn

from fxprune.capture import trace
from fxprune.coupling import coupling_graph
from fxprune.errors import FxPruneError, UsageError
from fxprune.groups import Groups
from fxprune.passes.dependency import find_groups
from fxprune.pictures import PALETTE, block_dot, check_picture, draw_block

from .command import Ran, Run
from .coupled import L0, L1, llama_groups, mlp_groups

graphviz = pytest.mark.skipif(shutil.which("dot") is None, reason="Graphviz (dot) is not installed")


@pytest.fixture(scope="module")
def llama() -> Groups:
    return llama_groups(2)


@pytest.fixture(scope="module")
def mlp() -> Groups:
    return mlp_groups()


def edges(dot: str) -> set[tuple[str, str, str]]:
    """(source, target, groups) of each edge, ports included."""
    return set(re.findall(r'^  "(.+?)"(?::d\d+)? -> (.+?) \[color=".+?", tooltip="(.+?)"\];$', dot, re.MULTILINE))


def legend(dot: str) -> dict[str, tuple[str, str]]:
    """Letter and colour of each group."""
    (line,) = [row for row in dot.splitlines() if row.startswith("  legend")]
    found = re.findall(r'bgcolor="(#\w{6})"><font[^>]*>(\w+)</font></td><td align="left">(.+?)</td>', line)
    return {name: (letter, colour) for colour, letter, name in found}


def test_every_group_of_the_block_has_a_letter_and_a_colour(llama: Groups) -> None:
    named = legend(block_dot(llama, "model.layers.1"))
    assert list(named) == [
        "model.hidden",
        "model.layers.head_dim",
        L1 + "self_attn.kv_heads",
        L1 + "self_attn.query_groups",
        L1 + "self_attn.head_dim",
        L1 + "mlp.ffn",
    ]
    assert [letter for letter, _ in named.values()] == list("ABCDEF")
    assert [colour for _, colour in named.values()] == list(PALETTE[:6])


def test_edges_go_with_the_data_and_carry_their_groups(llama: Groups) -> None:
    dot = block_dot(llama, "model.layers.1.mlp")
    graph = coupling_graph(llama)
    inside = {v for v, data in graph.nodes(data=True) if data["module"].startswith("model.layers.1.mlp")}
    wanted: dict[tuple[str, str], list[str]] = {}
    for a, b, data in graph.edges(data=True):
        if data["direction"] == "forward" and {a, b} & inside and {graph.nodes[v]["type"] for v in {a, b} - inside} <= {"node"}:
            wanted.setdefault((a.partition("[")[0], b.partition("[")[0]), []).append(data["group"])
    drawn = {(a, b.split('"')[1]): groups for a, b, groups in edges(dot)}
    assert drawn == {ends: ", ".join(dict.fromkeys(names)) for ends, names in wanted.items()}
    assert '"model.layers.1.mlp.down_proj.weight":d1 [color="#E69F00"' in dot  # channels flow into its columns ..
    assert '"model.layers.1.mlp.down_proj.weight":d0 -> ' in dot  # .. and the hidden size out of its rows


def test_a_weight_shows_its_dimensions_with_the_contracted_one_above(llama: Groups) -> None:
    start = f'"{L0}mlp.up_proj.weight" [label='
    (card,) = [line for line in block_dot(llama, "model.layers.0").splitlines() if line.strip().startswith(start)]
    assert re.findall(r"dim (\d): (\d+)", card) == [("1", "48"), ("0", "64")]
    assert "mlp.up_proj.weight</td>" in card


def test_submodules_are_clusters_and_neighbours_are_dashed(llama: Groups) -> None:
    dot = block_dot(llama, "model.layers.1")
    clusters = re.findall(r'subgraph "cluster_(\w+)"', dot)
    assert sorted(clusters) == ["input_layernorm", "mlp", "post_attention_layernorm", "self_attn"]
    dashed = re.findall(r'^  "(\w+)" \[label=.*style="dashed"', dot, re.MULTILINE)
    graph = coupling_graph(llama)
    assert dashed
    assert all(graph.nodes[v].get("layer") != 1 for v in dashed)


def test_the_first_block_is_drawn_where_none_is_named(llama: Groups) -> None:
    assert block_dot(llama) == block_dot(llama, "model.layers.0")


class Odd(nn.Module):
    """Names that HTML would read as its own (fx itself refuses quotes)."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.ModuleDict({"a<b>&c": nn.Linear(4, 6), "<!--": nn.Linear(6, 2)})

    def forward(self, x: Tensor) -> Tensor:
        first, last = self.body.values()
        out: Tensor = last(first(x).relu())
        return out


@graphviz
def test_odd_names_are_drawn_as_they_are(tmp_path: Path) -> None:
    groups = find_groups(trace(Odd(), torch.randn(2, 4)))
    draw_block(groups, tmp_path / "odd.svg", "body")
    texts = "".join(ElementTree.parse(tmp_path / "odd.svg").getroot().itertext())
    assert "a<b>&c.weight" in texts
    assert "<!--.weight" in texts


@graphviz
def test_an_svg_shows_every_card(llama: Groups, tmp_path: Path) -> None:
    draw_block(llama, tmp_path / "block.svg", "model.layers.1")
    text = (tmp_path / "block.svg").read_text()
    root = ElementTree.fromstring(text)
    titles = {e.text for e in root.iter("{http://www.w3.org/2000/svg}title")}
    graph = coupling_graph(llama)
    inside = {d.get("name", v) for v, d in graph.nodes(data=True) if d.get("layer") == 1}
    assert inside <= titles
    assert PALETTE[5].lower() in text.lower()
    assert [p.name for p in tmp_path.iterdir()] == ["block.svg"]


def test_dot_needs_no_graphviz(mlp: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    draw_block(mlp, tmp_path / "block.dot", "1")
    assert (tmp_path / "block.dot").read_text() == block_dot(mlp, "1")
    with pytest.raises(UsageError) as error:
        draw_block(mlp, tmp_path / "block.svg", "1")
    assert str(error.value) == "drawing .svg takes Graphviz, and there is no program 'dot': install it, or write .dot"


def test_graphviz_that_fails_leaves_nothing(mlp: Groups, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "dot"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\ncat > /dev/null\necho 'no fonts' >&2\nexit 3\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:/bin:/usr/bin")
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(FxPruneError, match="Graphviz could not draw the picture: no fonts"):
        draw_block(mlp, out / "block.svg", "1")
    assert list(out.iterdir()) == []


def test_refusals(mlp: Groups, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no prune group runs through a module '1.boddy'; did you mean '1.body'\?"):
        block_dot(mlp, "1.boddy")
    with pytest.raises(UsageError) as error:
        check_picture(Path("block.jpg"))
    said = "its name must end in one of .dot, .pdf, .png, .svg"
    assert str(error.value) == f"cannot write a picture as 'block.jpg': {said}"
    plain = find_groups(trace(nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)), torch.randn(2, 3)))
    with pytest.raises(UsageError, match=r"the model has no residual block to draw: name a module with --block"):
        block_dot(plain)
    with pytest.raises(UsageError, match=r"there is no directory '.*nowhere' to write 'b.dot' to"):
        draw_block(mlp, tmp_path / "nowhere" / "b.dot", "1")
    (tmp_path / "folder.dot").mkdir()
    (tmp_path / "folder.svg").mkdir()
    for name in ("folder.dot", "folder.svg") if shutil.which("dot") else ("folder.dot",):
        with pytest.raises(UsageError, match=rf"'.*{name}' is a directory; name a file"):
            draw_block(mlp, tmp_path / name, "1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["folder.dot", "folder.svg"]


def test_the_command_draws(run: Run, place: Path) -> None:
    assert run("groups", "dense", "--meta", "--picture", "block.dot", "--block", "model.layers.1").said == "wrote block.dot"
    text = (place / "block.dot").read_text()
    (place / "block.dot").unlink()
    assert text.startswith('digraph "model.layers.1" {')
    assert run("groups", "dense", "--meta", "--picture", "b.dot", "--export", "g.json").said == "wrote g.json wrote b.dot"
    for file in ("b.dot", "g.json"):
        (place / file).unlink()


def test_the_command_refuses_before_it_loads(run: Run) -> None:
    assert run("groups", "nowhere", "--picture", "b.gif").said == (
        "fxprune: cannot write a picture as 'b.gif': its name must end in one of .dot, .pdf, .png, .svg"
    )
    assert run("groups", "nowhere", "--export", "g.gif").said == (
        "fxprune: cannot write a graph as 'g.gif': its name must end in one of .dot, .graphml, .json"
    )
    assert run("groups", "nowhere", "--block", "model.layers.1") == Ran(
        2, "", "fxprune: --block says what --picture draws: give --picture FILE with it\n"
    )
