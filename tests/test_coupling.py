"""The coupling graph: paths, directions, connectedness, triggers, exports and error texts."""

from __future__ import annotations

import json
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig

from fxprune import coupling
from fxprune.capture import trace
from fxprune.coupling import Step, coupling_graph, shared_groups, triggers, why, write_graph
from fxprune.errors import UsageError
from fxprune.groups import Groups
from fxprune.passes.dependency import find_groups
from fxprune.rules import registry


class Residual(nn.Module):
    def __init__(self, *body: nn.Module) -> None:
        super().__init__()
        self.body = nn.Sequential(*body)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.body(x)
        return out


class ConvNet(nn.Module):
    """Plain, depthwise and grouped convolutions, two norms, a residual addition and a fused projection cut by chunk."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.point = nn.Conv2d(8, 8, 1)
        self.grouped = nn.Conv2d(8, 16, 3, groups=4)
        self.group_norm = nn.GroupNorm(4, 16)
        self.fused = nn.Linear(16, 20)
        self.head = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.point(self.depthwise(x))
        gate, up = self.fused(self.group_norm(self.grouped(x)).mean((2, 3))).chunk(2, -1)
        out: Tensor = self.head(gate.sigmoid() * up)
        return out


def llama_groups(layers: int) -> Groups:
    config = LlamaConfig(
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=101,
        tie_word_embeddings=True,
    )
    model: Any = AutoModelForCausalLM.from_config(config)
    return find_groups(trace(model, {"input_ids": torch.randint(0, 101, (2, 7))}))


def gpt2_groups() -> Groups:
    sizes: dict[str, Any] = {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 67, "n_positions": 16}
    config = GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
    model: Any = AutoModelForCausalLM.from_config(config)
    return find_groups(trace(model, {"input_ids": torch.randint(0, 67, (2, 7))}))


def mlp_groups() -> Groups:
    blocks = [Residual(nn.Linear(12, 20), nn.ReLU(), nn.Linear(20, 12)), Residual(nn.Linear(12, 12), nn.Tanh())]
    return find_groups(trace(nn.Sequential(nn.Linear(6, 12), *blocks, nn.Linear(12, 3)), torch.randn(4, 6)))


def conv_groups() -> Groups:
    return find_groups(trace(ConvNet(), torch.randn(2, 3, 8, 8)))


@pytest.fixture(scope="module")
def zoo() -> dict[str, Groups]:
    return {"llama": llama_groups(2), "gpt2": gpt2_groups(), "mlp": mlp_groups(), "conv": conv_groups()}


@pytest.fixture(scope="module")
def llama(zoo: dict[str, Groups]) -> Groups:
    return zoo["llama"]


@pytest.fixture(scope="module")
def mlp(zoo: dict[str, Groups]) -> Groups:
    return zoo["mlp"]


MODELS = ("llama", "gpt2", "mlp", "conv")
L0, L1 = "model.layers.0.", "model.layers.1."


def follows(steps: list[Step]) -> bool:
    """True if each step begins where the last one ended, and all are of one group."""
    joined = all(a.target == b.source for a, b in pairwise(steps))
    return joined and len({s.group for s in steps}) == 1


# Paths


def test_gate_and_down_are_tied_by_the_product_of_gate_and_up(llama: Groups) -> None:
    steps = why(llama, L0 + "mlp.gate_proj.weight", L0 + "mlp.down_proj.weight")
    assert follows(steps)
    assert {s.group for s in steps} == {"model.layers.0.mlp.ffn"}
    assert [s.rule for s in steps] == ["linear", "pointwise", "pointwise", "linear"]
    assert [s.module.removeprefix(L0) for s in steps] == ["mlp.gate_proj", "mlp.act_fn", "mlp", "mlp.down_proj"]
    assert {s.direction for s in steps} == {"forward"}
    assert steps[0].source == L0 + "mlp.gate_proj.weight[0]"
    assert steps[-1].target == L0 + "mlp.down_proj.weight[1]"


def test_gate_and_up_go_forward_to_where_they_meet_and_back(llama: Groups) -> None:
    steps = why(llama, L0 + "mlp.gate_proj.weight", L0 + "mlp.up_proj.weight", group=L0 + "mlp.ffn")
    assert [s.direction for s in steps] == ["forward"] * 3 + ["backward"] * 2
    assert steps[2].operator == steps[3].operator == steps[2].target
    assert steps[2].target.startswith("mul")


def test_the_way_back_is_the_way_there_turned_around(llama: Groups) -> None:
    there = why(llama, L0 + "mlp.gate_proj.weight", L0 + "mlp.down_proj.weight")
    back = why(llama, L0 + "mlp.down_proj.weight", L0 + "mlp.gate_proj.weight")
    assert [(s.source, s.target) for s in there] == [(s.target, s.source) for s in reversed(back)]
    assert {s.direction for s in back} == {"backward"}


@pytest.mark.parametrize("kind", ["kv_heads", "query_groups"])
def test_queries_and_output_are_tied_through_attention(llama: Groups, kind: str) -> None:
    steps = why(llama, L0 + "self_attn.q_proj.weight", L0 + "self_attn.o_proj.weight", group=f"{L0}self_attn.{kind}")
    assert follows(steps)
    assert steps[0].source == L0 + "self_attn.q_proj.weight[0]"
    assert steps[-1].target == L0 + "self_attn.o_proj.weight[1]"
    assert {s.direction for s in steps} == {"forward"}
    assert {"linear", "view", "transpose", "attention"} <= {s.rule for s in steps}


def test_keys_and_values_meet_in_attention(llama: Groups) -> None:
    steps = why(llama, L0 + "self_attn.k_proj.weight", L0 + "self_attn.v_proj.weight", group=L0 + "self_attn.kv_heads")
    turn = next(i for i, s in enumerate(steps) if s.direction == "backward")
    assert steps[turn - 1].operator == steps[turn].operator
    assert steps[turn].rule == "attention"
    assert "query_groups" not in {s.group for s in steps}


def test_query_groups_do_not_reach_keys(llama: Groups) -> None:
    with pytest.raises(UsageError, match="does not run through both"):
        why(llama, L0 + "self_attn.q_proj.weight", L0 + "self_attn.k_proj.weight", group=L0 + "self_attn.query_groups")


def test_contracted_activations_couple_with_each_other(llama: Groups) -> None:
    graph = coupling_graph(llama)
    attention = next(n for n in graph if n.startswith("scaled_dot_product_attention"))
    across = [(a, b, d) for a, b, d in graph.edges(data=True) if d["operator"] == attention and attention not in (a, b)]
    assert {d["group"] for _, _, d in across} == {"model.layers.head_dim"}  # the rotary pairs, contracted in q k^T
    assert sorted(d["direction"] for _, _, d in across) == ["backward", "forward"]


def test_the_hidden_size_ties_the_embedding_to_every_norm(llama: Groups) -> None:
    norms = [n for n in llama.parameters if "norm" in n]
    assert len(norms) == 5
    for norm in norms:
        assert shared_groups(llama, "model.embed_tokens.weight", norm) == ["model.hidden"]
        steps = why(llama, "model.embed_tokens.weight", norm)
        assert follows(steps)
        assert steps[0].rule == ("linear" if norm == "model.norm.weight" else "embedding")  # the tied head is nearer to the last
        assert steps[-1].target == norm + "[0]"
        assert steps[-1].direction == "backward"


def test_layers_are_tied_by_the_hidden_size_alone(llama: Groups) -> None:
    one, other = L0 + "mlp.gate_proj.weight", L1 + "mlp.gate_proj.weight"
    assert shared_groups(llama, one, other) == ["model.hidden"]
    steps = why(llama, one, other)
    assert follows(steps)
    assert (steps[0].source, steps[-1].target) == (one + "[1]", other + "[1]")
    assert any(s.rule == "pointwise" and s.operator.startswith("add") for s in steps)  # over the residual stream
    assert not any("down_proj" in s.module for s in steps)  # and not through a matrix, which has another axis inside


def test_rotary_pairs_tie_layers_through_a_buffer(llama: Groups) -> None:
    one, other = L0 + "self_attn.q_proj.weight", L1 + "self_attn.k_proj.weight"
    assert shared_groups(llama, one, other) == ["model.hidden", "model.layers.head_dim"]
    steps = why(llama, one, other, group="model.layers.head_dim")
    assert follows(steps)
    buffer = next(m.name for m in llama["model.layers.head_dim"].members if not m.trainable)
    assert why(llama, one, buffer)[-1].target == buffer + "[0]"


def test_a_tie_is_a_step_of_its_own(llama: Groups) -> None:
    (tie,) = why(llama, "lm_head.weight", "model.embed_tokens.weight")
    assert tie.rule == "tied"
    first, *rest = why(llama, "lm_head.weight", "model.norm.weight")
    assert str(first) == "lm_head.weight[1] is model.embed_tokens.weight[1] (tied weights; group model.hidden)"
    assert follows([first, *rest])
    *rest, last = why(llama, "model.norm.weight", "lm_head.weight")
    assert last.target == "lm_head.weight[1]"
    assert follows([*rest, last])


def test_fused_projections_are_followed_through_split(zoo: dict[str, Groups]) -> None:
    attn = "transformer.h.0.attn."
    steps = why(zoo["gpt2"], attn + "c_attn.weight", attn + "c_proj.weight", group=attn + "kv_heads")
    rules = [s.rule for s in steps]
    assert follows(steps)
    assert rules.index("split") + 1 == rules.index("getitem")
    assert (steps[0].source, steps[-1].target) == (attn + "c_attn.weight[1]", attn + "c_proj.weight[0]")
    mlp = "transformer.h.1.mlp."
    assert {s.group for s in why(zoo["gpt2"], mlp + "c_fc.weight", mlp + "c_proj.weight")} == {mlp + "ffn"}


def test_plain_modules(mlp: Groups) -> None:
    steps = why(mlp, "1.body.0.weight", "1.body.2.weight")
    assert list(map(str, steps)) == [
        "1.body.0.weight[0] -> linear_1 (forward, rule linear at linear_1 in 1.body.0; group 1.body.ffn)",
        "linear_1 -> relu (forward, rule pointwise at relu in 1.body.1; group 1.body.ffn)",
        "relu -> 1.body.2.weight[1] (forward, rule linear at linear_2 in 1.body.2; group 1.body.ffn)",
    ]
    (bias,) = {s.group for s in why(mlp, "1.body.0.bias", "1.body.2.weight")}
    assert bias == "1.body.ffn"
    assert {s.group for s in why(mlp, "0.weight", "3.weight")} == {"hidden"}


# Vertices and edges


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
    }
    gate = next(d for _, d in graph.nodes(data=True) if d["type"] == "node" and d["module"] == L1 + "mlp.gate_proj")
    assert gate == {
        "type": "node",
        "op": "aten.linear.default",
        "module": L1 + "mlp.gate_proj",
        "layer": 1,
        "groups": (L1 + "mlp.ffn",),
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
    started = time.perf_counter()
    graph = coupling_graph(groups)
    assert time.perf_counter() - started < 2
    assert len(graph) > 2000


def test_a_rule_that_inference_refused_couples_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = registry.Rule("wrong", lambda call: [*call["self"], call["self"][-1]])  # one dimension too many
    monkeypatch.setitem(registry._RULES, torch.ops.aten.relu.default, wrong)
    groups = find_groups(trace(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(2, 6)))
    graph = coupling_graph(groups)
    assert all(d["group"] in graph.nodes[end]["groups"] for a, b, d in graph.edges(data=True) for end in (a, b))
    assert shared_groups(groups, "0.weight", "2.weight") == []


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


# Exports


def test_graphml_reads_back(llama: Groups, tmp_path: Path) -> None:
    graph = coupling_graph(llama)
    write_graph(graph, tmp_path / "g.graphml")
    again = nx.read_graphml(tmp_path / "g.graphml")
    assert set(again) == set(graph)
    assert sorted(again.edges()) == sorted(graph.edges())
    key = L0 + "mlp.gate_proj.weight[0]"
    assert again.nodes[key] == {**graph.nodes[key], "groups": L0 + "mlp.ffn", "aliases": ""}
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


# Errors


def test_an_unknown_suffix(mlp: Groups, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        write_graph(coupling_graph(mlp), tmp_path / "graph.png")
    assert str(error.value) == "cannot write a graph as 'graph.png': the suffix must be one of .graphml, .json, .dot"
    assert list(tmp_path.iterdir()) == []


def test_a_path_that_cannot_be_written(mlp: Groups, tmp_path: Path) -> None:
    with pytest.raises(UsageError) as error:
        write_graph(coupling_graph(mlp), tmp_path / "nowhere" / "g.json")
    assert str(error.value) == f"cannot write the graph to '{tmp_path}/nowhere/g.json': No such file or directory"
    (tmp_path / "folder.dot").mkdir()
    with pytest.raises(UsageError, match="Is a directory"):
        write_graph(coupling_graph(mlp), tmp_path / "folder.dot")
    assert [p.name for p in tmp_path.iterdir()] == ["folder.dot"]


def test_unknown_parameters(mlp: Groups, llama: Groups) -> None:
    known = "0.bias, 0.weight, 1.body.0.bias, 1.body.0.weight, 1.body.2.bias, 1.body.2.weight, "
    known += "2.body.0.bias, 2.body.0.weight, 3.bias, 3.weight"
    with pytest.raises(UsageError) as error:
        why(mlp, "0.weight", "1.body.0.weigth")
    assert (
        str(error.value)
        == f"the traced model has no parameter '1.body.0.weigth'; did you mean '1.body.0.weight'? Choose from: {known}"
    )
    with pytest.raises(UsageError, match=r"no parameter 'lm_head.wight'; did you mean 'lm_head.weight'"):
        why(llama, "lm_head.wight", "model.norm.weight")


def test_nothing_shared(mlp: Groups) -> None:
    with pytest.raises(UsageError) as error:
        why(mlp, "1.body.0.bias", "2.body.0.bias")
    assert str(error.value) == (
        "'1.body.0.bias' and '2.body.0.bias' share no prune group, so neither forces the other to be pruned: "
        "through the first run 1.body.ffn; through the second hidden"
    )


def test_the_same_parameter_twice(mlp: Groups) -> None:
    with pytest.raises(UsageError, match=r"'0.weight' is named twice"):
        why(mlp, "0.weight", "0.weight")


def test_groups_that_do_not_fit(mlp: Groups) -> None:
    with pytest.raises(UsageError, match=r"there is no prune group 'hiden'; did you mean 'hidden'\?"):
        why(mlp, "0.weight", "3.weight", group="hiden")
    with pytest.raises(UsageError) as error:
        why(mlp, "0.weight", "3.weight", group="1.body.ffn")
    assert str(error.value) == "group '1.body.ffn' does not run through both '0.weight' and '3.weight'; Choose from: hidden"
    with pytest.raises(UsageError, match=r"there is no prune group 'body.ffn'; did you mean '1.body.ffn'\?"):
        triggers(mlp, "body.ffn")
    with pytest.raises(UsageError, match=r"group '1.body.ffn' does not run through '3.weight'; did you mean "):
        triggers(mlp, "1.body.ffn", "3.weight")


def test_a_rule_that_went_away_leaves_no_path(monkeypatch: pytest.MonkeyPatch, mlp: Groups) -> None:
    monkeypatch.setattr(coupling, "rule_for", lambda target: None)
    with pytest.raises(
        UsageError, match=r"no coupling was recorded between '0.weight' and '3.weight', though hidden runs through both"
    ):
        why(mlp, "0.weight", "3.weight")
