"""The graphs of prune groups: vertices, edges, connectedness, members, triggers."""

from __future__ import annotations

import time

import networkx as nx
import pytest
import torch
from torch import Tensor, nn

from fxprune.capture import trace
from fxprune.coupling import coupling_graph, member_graph, shared_groups, triggers, why
from fxprune.errors import UsageError
from fxprune.groups import Groups
from fxprune.passes.dependency import find_groups
from fxprune.rules import registry

from .coupled import L0, L1, MODELS, conv_groups, gpt2_groups, llama_groups, mlp_groups


@pytest.fixture(scope="module")
def zoo() -> dict[str, Groups]:
    return {"llama": llama_groups(2), "gpt2": gpt2_groups(), "mlp": mlp_groups(), "conv": conv_groups()}


@pytest.fixture(scope="module")
def llama(zoo: dict[str, Groups]) -> Groups:
    return zoo["llama"]


@pytest.fixture(scope="module")
def mlp(zoo: dict[str, Groups]) -> Groups:
    return zoo["mlp"]


@pytest.mark.parametrize("model", MODELS)
def test_every_group_is_one_connected_part(zoo: dict[str, Groups], model: str) -> None:
    graph = coupling_graph(zoo[model])
    for name, group in zoo[model].items():
        vertices = [v for v, data in graph.nodes(data=True) if name in data["groups"]]
        part = nx.DiGraph()
        part.add_nodes_from(vertices)
        part.add_edges_from((a, b) for a, b, data in graph.edges(data=True) if data["group"] == name)
        assert {f"{m.name}[{m.dim}]" for m in group.members} <= set(vertices), name
        assert set(part) == set(vertices), f"an edge of {name} leaves it"
        assert nx.is_weakly_connected(part), name


@pytest.mark.parametrize("model", MODELS)
def test_edges_come_in_pairs_and_forward_goes_with_the_data(zoo: dict[str, Groups], model: str) -> None:
    groups = zoo[model]
    graph = coupling_graph(groups)
    order = {n.name: i for i, n in enumerate(next(iter(groups.inference.calls.values())).node.graph.nodes)}
    for a, b, key, data in graph.edges(keys=True, data=True):
        twin = graph.edges[b, a, key]
        assert {data["direction"], twin["direction"]} == {"forward", "backward"}
        assert {k: v for k, v in data.items() if k != "direction"} == {k: v for k, v in twin.items() if k != "direction"}
        if data["direction"] == "forward":
            assert a in order or graph.nodes[a]["type"] == "parameter"
            if a in order and b in order:
                assert order[a] < order[b] or b != data["operator"]  # two contracted activations have no order
            assert a != data["operator"]  # an operator's result is never upstream of its operands
        assert data["group"] in graph.nodes[a]["groups"]
        assert data["group"] in graph.nodes[b]["groups"]


def test_a_square_matrix_does_not_couple_its_input_with_its_output(mlp: Groups) -> None:
    """Both ends of ``x + W x`` belong to one group, but W mixes them: only the addition ties them."""
    graph = coupling_graph(mlp)
    square = next(n for n, d in graph.nodes(data=True) if d["type"] == "node" and d["module"] == "2.body.0")
    (source,) = [a for a, b, d in graph.edges(data=True) if d["operator"] == square and b == "2.body.0.weight[1]"]
    assert source != square
    assert "hidden" in graph.nodes[source]["groups"]
    assert "hidden" in graph.nodes[square]["groups"]
    assert not graph.has_edge(source, square)
    assert not graph.has_edge("2.body.0.weight[0]", "2.body.0.weight[1]")
    assert graph.has_edge("2.body.0.weight[0]", square)


def test_vertices_say_what_they_are(llama: Groups) -> None:
    graph = llama.to_networkx()
    assert isinstance(graph, nx.MultiDiGraph)
    assert graph.nodes["model.embed_tokens.weight[1]"] == {
        "type": "parameter",
        "name": "model.embed_tokens.weight",
        "dim": 1,
        "size": 48,
        "trainable": True,
        "aliases": ("lm_head.weight",),
        "module": "model.embed_tokens",
        "groups": ("model.hidden",),
        "kinds": ("hidden",),
    }
    gate = next(d for _, d in graph.nodes(data=True) if d["type"] == "node" and d["module"] == L1 + "mlp.gate_proj")
    assert gate == {
        "type": "node",
        "op": "aten.linear.default",
        "module": L1 + "mlp.gate_proj",
        "layer": 1,
        "groups": (L1 + "mlp.ffn",),
        "kinds": ("ffn",),
    }
    assert any(not d["trainable"] for _, d in graph.nodes(data=True) if d["type"] == "parameter")  # rotary frequencies


def test_a_group_of_one_layer_stays_in_it(llama: Groups) -> None:
    graph = coupling_graph(llama)
    layers = {d.get("layer") for _, d in graph.nodes(data=True) if L0 + "mlp.ffn" in d["groups"]}
    assert layers == {0}


def test_a_model_without_parameters() -> None:
    class Nothing(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    assert len(coupling_graph(find_groups(trace(Nothing(), torch.randn(2, 3))))) == 0


def test_operators_without_a_rule_couple_nothing() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(6, 8)
            self.last = nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.last(torch.linalg.matrix_exp(torch.diag_embed(self.first(x))).sum(-1))
            return out

    groups = find_groups(trace(Odd(), torch.randn(2, 6)))
    with pytest.raises(UsageError, match=r"'first.weight' and 'last.weight' share no prune group"):
        why(groups, "first.weight", "last.weight")


def test_thirty_layers_take_less_than_two_seconds() -> None:
    groups = llama_groups(30)
    started = time.process_time()
    graph = coupling_graph(groups)
    assert time.process_time() - started < 2
    assert len(graph) > 2000


def test_a_rule_that_inference_refused_couples_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = registry.Rule("wrong", lambda call: [*call["self"], call["self"][-1]])  # one dimension too many
    monkeypatch.setitem(registry._RULES, torch.ops.aten.relu.default, wrong)
    groups = find_groups(trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 6)))
    graph = coupling_graph(groups)
    assert all(d["group"] in graph.nodes[end]["groups"] for a, b, d in graph.edges(data=True) for end in (a, b))
    assert shared_groups(groups, "0.weight", "2.weight") == []


# Members


@pytest.mark.parametrize("model", MODELS)
def test_kinds_stand_beside_their_groups(zoo: dict[str, Groups], model: str) -> None:
    groups = zoo[model]
    graph = coupling_graph(groups)
    for _, data in graph.nodes(data=True):
        assert data["kinds"] == tuple(groups[name].kind for name in data["groups"])
    assert all(data["kind"] == groups[data["group"]].kind for *_, data in graph.edges(data=True))


@pytest.mark.parametrize("model", MODELS)
def test_members_are_those_of_the_groups(zoo: dict[str, Groups], model: str) -> None:
    groups = zoo[model]
    graph = member_graph(groups)
    ends = nx.bipartite.sets(graph.subgraph(next(nx.connected_components(graph))))
    assert {graph.nodes[v]["type"] for v in ends[0]} != {graph.nodes[v]["type"] for v in ends[1]}
    found = {(a, b, dim) for a, b, dims in graph.edges(groups, data="dims") for dim in dims}
    assert found == {(name, m.name, m.dim) for name, g in groups.items() for m in g.members}
    for name, group in groups.items():
        data = graph.nodes[name]
        assert (data["bipartite"], data["kind"], data["size"], data["prunable"]) == (0, group.kind, group.size, group.prunable)
        assert (data["reason"], data["parameters_per_unit"], data.get("layer")) == (
            group.reason,
            group.parameters_per_unit,
            group.layer,
        )


def test_a_parameter_says_what_it_is(llama: Groups) -> None:
    assert member_graph(llama).nodes[L1 + "mlp.up_proj.weight"] == {
        "type": "parameter",
        "bipartite": 1,
        "shape": (64, 48),
        "numel": 64 * 48,
        "trainable": True,
        "aliases": (),
        "module": L1 + "mlp.up_proj",
        "layer": 1,
    }
    assert member_graph(llama).nodes["model.embed_tokens.weight"]["aliases"] == ("lm_head.weight",)


def test_a_matrix_that_one_group_cuts_both_ways_has_one_edge(mlp: Groups) -> None:
    assert member_graph(mlp).edges["hidden", "2.body.0.weight"]["dims"] == (0, 1)


def test_the_hidden_size_alone_holds_the_layers_together(llama: Groups) -> None:
    graph = member_graph(llama)
    assert set(nx.articulation_points(graph)) == {"model.hidden", "model.layers.head_dim", "model.embed_tokens.weight"}
    graph.remove_nodes_from(["model.hidden", "model.layers.head_dim"])
    assert not nx.has_path(graph, L0 + "mlp.ffn", L1 + "mlp.ffn")


# Triggers


@pytest.mark.parametrize("model", MODELS)
def test_triggers_reach_the_whole_group_breadth_first(zoo: dict[str, Groups], model: str) -> None:
    graph = coupling_graph(zoo[model])
    for name, group in zoo[model].items():
        tree = triggers(zoo[model], name)
        assert nx.is_arborescence(tree)
        assert set(tree) == {v for v, data in graph.nodes(data=True) if name in data["groups"]}
        ordered = sorted(tree.nodes(data="depth"), key=lambda v: tree.nodes[v[0]]["order"])
        assert [d for _, d in ordered] == sorted(d for _, d in ordered)
        start = next(m for m in group.members if m.trainable)
        assert ordered[0] == (f"{start.name}[{start.dim}]", 0)


def test_triggers_begin_where_they_are_told(llama: Groups) -> None:
    ffn = L0 + "mlp.ffn"
    tree = triggers(llama, ffn, L0 + "mlp.down_proj.weight")
    root = L0 + "mlp.down_proj.weight[1]"
    assert tree.graph == {"group": ffn, "start": root}
    (child,) = tree[root]
    assert tree.edges[root, child]["direction"] == "backward"
    assert nx.shortest_path_length(tree, root, L0 + "mlp.gate_proj.weight[0]") == 4
    assert triggers(llama, ffn, child).graph["start"] == child
    assert triggers(llama, "model.hidden", "lm_head.weight").graph["start"] == "model.embed_tokens.weight[1]"
