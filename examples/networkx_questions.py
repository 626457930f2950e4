"""Questions about a model's prune groups, answered by stock networkx.

Two graphs hold the answers. ``member_graph`` is bipartite: which group reaches into which parameter. ``coupling_graph`` (the
same as ``groups.to_networkx()``) has fx nodes and parameter dimensions as vertices, and an edge wherever removing an index at
one end forces it out at the other. Both are ordinary networkx graphs: no function of fxprune is needed to ask them.

Run: python examples/networkx_questions.py (seconds; a tiny Llama with random weights, no network).
"""

from __future__ import annotations

import networkx as nx
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune.coupling import coupling_graph, member_graph

config = LlamaConfig(
    vocab_size=101,
    hidden_size=48,
    intermediate_size=64,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    tie_word_embeddings=True,
)
model = LlamaForCausalLM(config).eval()
groups = fxprune.find_groups(fxprune.trace(model, {"input_ids": torch.zeros(2, 8, dtype=torch.long)}))
members, couplings = member_graph(groups), coupling_graph(groups)
print(f"{members}\n{couplings}\n")

print("Which groups span layers?")
for name, facts in members.nodes(data=True):
    layers = {members.nodes[p]["layer"] for p in members[name] if "layer" in members.nodes[p]}
    if facts["type"] == "group" and len(layers) > 1:
        print(f"  {name}: {facts['kind']} of {facts['size']} units, in layers {sorted(layers)}")

head = "model.layers.0.self_attn.kv_heads"
print(f"\nWhich parameters does key-value head 1 own ({head})?")
for parameter, edge in members[head].items():
    shape = members.nodes[parameter]["shape"]
    for dim in edge["dims"]:
        member = next(m for m in groups[head].members if (m.name, m.dim) == (parameter, dim))
        own = member.indices([1])
        print(f"  {parameter} {list(shape)}: {len(own)} of {shape[dim]} along dim {dim}, from {int(own[0])} to {int(own[-1])}")

print("\nWithout which group or parameter would the model's groups fall apart (articulation points)?")
for vertex in sorted(nx.articulation_points(members)):
    rest = members.copy()
    rest.remove_node(vertex)
    print(f"  {vertex} ({members.nodes[vertex]['type']}): {nx.number_connected_components(rest)} parts without it")

gate, down = "model.layers.0.mlp.gate_proj.weight[0]", "model.layers.0.mlp.down_proj.weight[1]"
print(f"\nWhy must {gate} and {down} go together?")
ffn = nx.subgraph_view(couplings, filter_edge=lambda a, b, key: couplings.edges[a, b, key]["kind"] == "ffn")
for a, b in nx.utils.pairwise(nx.shortest_path(ffn, gate, down)):
    (edge, *_) = ffn[a][b].values()
    print(f"  {a} -> {b}: {edge['rule']}, {edge['direction']}")

print("\nIs there any way from one layer's channels to another's but over the residual stream?")
one, other = "model.layers.0.mlp.gate_proj.weight[0]", "model.layers.1.mlp.gate_proj.weight[0]"
print(f"  over FFN couplings: {'yes' if nx.has_path(ffn, one, other) else 'no'}")
print("  over shared parameters:", " - ".join(nx.shortest_path(members, "model.layers.0.mlp.ffn", "model.layers.1.mlp.ffn")))

print("\nThe model condensed to its layers: which groups join them?")
layers: dict[str, set[str]] = {}
for vertex, facts in couplings.nodes(data=True):
    layers.setdefault(f"layer {facts['layer']}" if "layer" in facts else "outside", set()).add(vertex)


def joined(one: set[str], other: set[str]) -> dict[str, set[str]]:
    """The groups of all couplings between two sets of vertices."""
    return {"groups": {couplings.edges[edge]["group"] for edge in nx.edge_boundary(couplings, one, other, keys=True)}}


condensed = nx.quotient_graph(couplings, layers, edge_data=joined, create_using=nx.Graph)
condensed = nx.relabel_nodes(condensed, {frozenset(own): name for name, own in layers.items()})
for a, b, between in condensed.edges(data="groups"):
    print(f"  {a} - {b}: {', '.join(sorted(between))}")
