"""Graphs of groups as GraphML, JSON and DOT: what is written reads back."""

from __future__ import annotations

import json
import re
from pathlib import Path

import networkx as nx
import pytest

from fxprune.coupling import coupling_graph, member_graph, triggers
from fxprune.errors import UsageError
from fxprune.graph_files import write_graph
from fxprune.groups import Groups

from .coupled import L0, llama_groups, mlp_groups


@pytest.fixture(scope="module")
def llama() -> Groups:
    return llama_groups(2)


@pytest.fixture(scope="module")
def mlp() -> Groups:
    return mlp_groups()


def test_graphml_reads_back(llama: Groups, tmp_path: Path) -> None:
    graph = coupling_graph(llama)
    write_graph(graph, tmp_path / "g.graphml")
    again = nx.read_graphml(tmp_path / "g.graphml")
    assert set(again) == set(graph)
    assert sorted(again.edges()) == sorted(graph.edges())
    key = L0 + "mlp.gate_proj.weight[0]"
    assert again.nodes[key] == {**graph.nodes[key], "groups": L0 + "mlp.ffn", "kinds": "ffn", "aliases": ""}
    assert {tuple(sorted(d.items())) for *_, d in again.edges(data=True)} >= {
        tuple(sorted(d.items())) for *_, d in graph.edges(key, data=True)
    }
    ids = re.findall(r'<edge [^>]*id="([^"]+)"', (tmp_path / "g.graphml").read_text())
    assert len(ids) == len(set(ids)) == graph.number_of_edges()


def test_json_reads_back(llama: Groups, tmp_path: Path) -> None:
    graph = coupling_graph(llama)
    write_graph(graph, str(tmp_path / "g.json"))
    again = nx.node_link_graph(json.loads((tmp_path / "g.json").read_text()), edges="edges")
    assert isinstance(again, nx.MultiDiGraph)
    assert set(again.edges(keys=True)) == set(graph.edges(keys=True))
    for vertex, data in graph.nodes(data=True):
        assert {k: tuple(v) if isinstance(v, list) else v for k, v in again.nodes[vertex].items()} == data


QUOTED = r'"((?:[^"\\]|\\.)*)"'


def read_dot(text: str) -> tuple[dict[str, dict[str, str]], list[tuple[str, str, dict[str, str]]]]:
    """A reader of what `write_graph` writes, quoting included."""

    def plain(quoted: str) -> str:
        return re.sub(r"\\(.)", lambda m: "\n" if m[1] == "n" else m[1], quoted)

    def attributes(inside: str) -> dict[str, str]:
        return {name: plain(value) for name, value in re.findall(rf"(\w+)={QUOTED}", inside)}

    vertices, edges = {}, []
    header, *lines, end = text.strip().splitlines()
    assert (header, end) == ("digraph coupling {", "}")
    for line in lines:
        if edge := re.fullmatch(rf"  {QUOTED} -> {QUOTED} \[(.*)\];", line):
            edges.append((plain(edge[1]), plain(edge[2]), attributes(edge[3])))
        elif vertex := re.fullmatch(rf"  {QUOTED} \[(.*)\];", line):
            vertices[plain(vertex[1])] = attributes(vertex[2])
        else:
            assert re.fullmatch(r"  (node|edge) \[fontsize=\d+\];", line), line
    return vertices, edges


def test_dot_reads_back(llama: Groups, tmp_path: Path) -> None:
    graph = coupling_graph(llama)
    write_graph(graph, tmp_path / "g.dot")
    vertices, edges = read_dot((tmp_path / "g.dot").read_text())
    assert set(vertices) == set(graph)
    assert sorted((a, b) for a, b, _ in edges) == sorted(graph.edges())
    key = L0 + "mlp.gate_proj.weight[0]"
    assert vertices[key]["label"] == key + "\n64"
    assert vertices[key]["shape"] == "box"
    assert {d["style"] for _, _, d in edges if d["direction"] == "backward"} == {"dashed"}
    assert all("style" not in d for _, _, d in edges if d["direction"] == "forward")


def test_dot_quotes_whatever_a_module_is_called(mlp: Groups, tmp_path: Path) -> None:
    odd = {"0.weight[0]": 'a "b" \\n.weight[0]', "0.bias[0]": "c -> d];\n", "linear": "back\\"}
    graph = nx.relabel_nodes(coupling_graph(mlp), odd)
    write_graph(graph, tmp_path / "g.dot")
    vertices, edges = read_dot((tmp_path / "g.dot").read_text())
    assert set(vertices) == set(graph)
    assert sorted((a, b) for a, b, _ in edges) == sorted(graph.edges())


@pytest.mark.parametrize("suffix", [".graphml", ".json", ".dot", ".DOT"])
def test_trees_are_written_too(mlp: Groups, tmp_path: Path, suffix: str) -> None:
    tree = triggers(mlp, "hidden")
    path = tmp_path / f"tree{suffix}"
    write_graph(tree, path)
    if suffix == ".graphml":
        assert set(nx.read_graphml(path).edges()) == set(tree.edges())
    elif suffix == ".json":
        assert set(nx.node_link_graph(json.loads(path.read_text()), edges="edges").edges()) == set(tree.edges())
    else:
        assert {(a, b) for a, b, _ in read_dot(path.read_text())[1]} == set(tree.edges())
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_a_member_graph_is_written_in_every_format(llama: Groups, tmp_path: Path) -> None:
    graph = member_graph(llama)
    for suffix in (".graphml", ".json", ".dot"):
        write_graph(graph, tmp_path / f"m{suffix}")
    again = nx.read_graphml(tmp_path / "m.graphml")
    assert not again.is_directed()
    assert set(map(frozenset, again.edges())) == set(map(frozenset, graph.edges()))
    assert again.nodes["model.embed_tokens.weight"]["shape"] == "101, 48"
    assert again.edges["model.hidden", "model.embed_tokens.weight"]["dims"] == "1"
    data = json.loads((tmp_path / "m.json").read_text())
    assert {n["id"]: n["kind"] for n in data["nodes"] if n["type"] == "group"} == {n: g.kind for n, g in llama.items()}
    text = (tmp_path / "m.dot").read_text()
    assert text.startswith("graph coupling {")
    assert '"model.embed_tokens.weight" -- "model.hidden" [label="dim 1", dims="1"];' in text


def test_an_unknown_suffix(mlp: Groups, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        write_graph(coupling_graph(mlp), tmp_path / "graph.png")
    assert str(error.value) == (
        f"cannot write a graph as '{tmp_path}/graph.png': its name must end in one of .dot, .graphml, .json"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written(mlp: Groups, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        write_graph(coupling_graph(mlp), tmp_path / "nowhere" / "g.json")
    assert str(error.value) == f"there is no directory '{tmp_path}/nowhere' to write 'g.json' to"
    (tmp_path / "folder.dot").mkdir()
    with pytest.raises(UsageError, match=r"folder\.dot' is a directory; name a file"):
        write_graph(coupling_graph(mlp), tmp_path / "folder.dot")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.dot"]
