"""Graphs of groups as files: GraphML, JSON and DOT."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import networkx as nx

from .files import check_file, write_whole

AnyGraph: TypeAlias = "nx.MultiDiGraph | nx.DiGraph | nx.Graph"


def write_graph(graph: AnyGraph, path: str | os.PathLike[str]) -> None:
    """Write a graph of `fxprune.coupling` to a file, in the format that the suffix names.

    ``.graphml`` for Gephi, yEd or Cytoscape; ``.json`` as networkx' node-link data; ``.dot`` for Graphviz, parameters as boxes
    and backward edges dashed. Lists are joined with ", " where the format has none.

    Args:
        graph: From `coupling_graph`, `member_graph` or `triggers`.
        path: The file; it is written beside and renamed, so that no half of it is ever left.

    Raises:
        UsageError: The suffix is none of these, or the file cannot be written.
    """
    name = Path(path)
    check_graph(name)
    write_whole(path, _FORMATS[name.suffix.lower()](graph), called="the graph")


def check_graph(path: Path) -> None:
    """Raise `UsageError` unless a graph can be written there."""
    check_file(path, "a graph", _FORMATS)


def quoted(text: str) -> str:
    """A string of the DOT language."""
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
    return f'"{escaped}"'


def _flat(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: ", ".join(map(str, value)) if isinstance(value, tuple) else value for name, value in facts.items()}


def _graphml(graph: AnyGraph) -> str:
    flat = graph.__class__(**_flat(graph.graph))
    flat.add_nodes_from((key, _flat(data)) for key, data in graph.nodes(data=True))
    for i, (a, b, data) in enumerate(graph.edges(data=True)):  # the key becomes the edge's XML id, which must be unique
        flat.add_edges_from([(a, b, f"e{i}", _flat(data)) if graph.is_multigraph() else (a, b, _flat(data))])
    return "\n".join(nx.generate_graphml(flat)) + "\n"


def _json(graph: AnyGraph) -> str:
    return json.dumps(nx.node_link_data(graph, edges="edges"), indent=1) + "\n"


def _dot(graph: AnyGraph) -> str:
    sort, arrow = ("digraph", "->") if graph.is_directed() else ("graph", "--")
    lines = [f"{sort} coupling {{", "  node [fontsize=10];", "  edge [fontsize=8];"]
    for key, data in graph.nodes(data=True):
        about = data.get("size", data.get("op", data.get("numel")))
        look = {"label": f"{key}\n{about}", "shape": "box" if data["type"] == "parameter" else "ellipse"}
        lines.append(f"  {quoted(key)} [{_attributes({**look, **_flat(data)})}];")
    for a, b, data in graph.edges(data=True):
        back = {"style": "dashed", "constraint": "false"} if data.get("direction") == "backward" else {}
        label = data["rule"] if "rule" in data else f"dim {', '.join(map(str, data['dims']))}"
        lines.append(f"  {quoted(a)} {arrow} {quoted(b)} [{_attributes({'label': label, **back, **_flat(data)})}];")
    return "\n".join([*lines, "}"]) + "\n"


def _attributes(facts: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={quoted(str(value))}" for name, value in facts.items())


_FORMATS: dict[str, Callable[[AnyGraph], str]] = {".graphml": _graphml, ".json": _json, ".dot": _dot}
