"""Pictures of a part of the network: its operators and weights, with the prune groups that run through them in colour.

The picture is the forward half of the coupling graph (`fxprune.coupling.coupling_graph`) within one module: what flows into a
weight is contracted by it, what flows out of it has its rows. Each group has a colour and a letter, so that no reading depends on
colour.
"""

from __future__ import annotations

import html
import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle, product
from pathlib import Path
from string import ascii_uppercase
from typing import Any

import networkx as nx

from .coupling import coupling_graph
from .errors import FxPruneError, UsageError, nearest
from .files import check_file, write_whole
from .graph_files import quoted
from .groups import Groups

PALETTE = ("#56B4E9", "#E69F00", "#009E73", "#F0E442", "#CC79A7", "#0072B2", "#D55E00", "#BBBBBB")
"""Okabe and Ito's colours, told apart by colour-blind readers; after eight groups they begin again, and letters tell them apart."""

DARK = "#0072B2"
"""The one that a white letter reads better on."""

FORMATS = (".dot", ".svg", ".png", ".pdf")

LINE, FAINT, SOFT = "#8A94A0", "#C9CFD6", "#5B6672"


def block_dot(groups: Groups, block: str | None = None) -> str:
    """A picture in Graphviz' DOT language.

    Args:
        groups: What `fxprune.find_groups` returned.
        block: Path of a module, such as ``model.layers.3`` or ``model.layers.3.mlp``; by default the first residual block.

    Returns:
        DOT: a cluster for each submodule, a card for each operator and weight, dashed ones for what lies just outside; edges go
        with the data, one stripe for each group; a legend.

    Raises:
        UsageError: There is no such module in the graph, or no residual block to take by default.
    """
    graph = coupling_graph(groups)
    path = _path(graph, groups, block)
    inside = [v for v, data in graph.nodes(data=True) if _within(data["module"], path)]
    near = {v: None for a in inside for v in (*graph.predecessors(a), *graph.successors(a))}
    outside = [v for v in near if v not in set(inside) and graph.nodes[v]["type"] == "node"]
    edges = _edges(graph, inside, outside)
    met = dict.fromkeys(name for v in inside for name in graph.nodes[v]["groups"])
    letters = dict(zip(met, _letters(), strict=False))
    colours = dict(zip(met, cycle(PALETTE), strict=False))

    def chips(names: Sequence[str]) -> str:
        return "".join(_chip(letters[n], colours[n]) for n in names if n in letters)

    lines = [
        f"digraph {quoted(path)} {{",
        f"  graph [label={quoted(path)}, labelloc=t, fontname=Helvetica, fontsize=16, nodesep=0.25, ranksep=0.32, bgcolor=white];",
        "  node [shape=plain, fontname=Helvetica, fontsize=10];",
        "  edge [arrowsize=0.5, penwidth=1.6];",
        f"  legend [label={_legend(groups, letters, colours)}];",
    ]
    clusters: dict[str, list[str]] = {}
    for key, module, label in _cards(graph, inside, chips, path, border=LINE):
        child = module.removeprefix(path).lstrip(".").partition(".")[0]
        clusters.setdefault(child, []).append(f"{quoted(key)} [label={label}];")
    for name, cards in clusters.items():
        if name:
            title = f"graph [label={quoted(name)}, style=rounded, color={quoted(LINE)}, fontsize=12];"
            lines += [f"  subgraph {quoted('cluster_' + name)} {{", f"    {title}", *(f"    {c}" for c in cards), "  }"]
        else:
            lines += [f"  {c}" for c in cards]
    around = _cards(graph, outside, chips, path, border=FAINT, style="dashed")
    lines += [f"  {quoted(key)} [label={label}];" for key, _, label in around]
    for (a, b), names in edges.items():
        colour = ":".join(colours[n] for n in names)
        lines.append(f"  {_end(graph, a)} -> {_end(graph, b)} [color={quoted(colour)}, tooltip={quoted(', '.join(names))}];")
    return "\n".join([*lines, "}"]) + "\n"


def draw_block(groups: Groups, path: str | os.PathLike[str], block: str | None = None) -> None:
    """Write the picture of `block_dot` as ``.dot``, or through Graphviz as ``.svg``, ``.png`` or ``.pdf``.

    Args:
        groups: What `fxprune.find_groups` returned.
        path: The file.
        block: As for `block_dot`.

    Raises:
        UsageError: As `block_dot`; another suffix; Graphviz is not installed; the file cannot be written.
        FxPruneError: Graphviz failed.
    """
    target = Path(path)
    check_picture(target)
    text = block_dot(groups, block)
    suffix = target.suffix.lower()
    if suffix == ".dot":
        write_whole(target, text, called="the picture")
        return
    done = subprocess.run(["dot", f"-T{suffix[1:]}"], input=text.encode(), capture_output=True, check=False)
    if done.returncode:
        raise FxPruneError(f"Graphviz could not draw the picture: {done.stderr.decode(errors='replace').strip().splitlines()[0]}")
    write_whole(target, done.stdout, called="the picture")


def check_picture(path: Path) -> None:
    """Raise `UsageError` unless a picture can be written there: a suffix of `FORMATS`, a directory, Graphviz where it is needed."""
    check_file(path, "a picture", FORMATS)
    if path.suffix.lower() != ".dot" and shutil.which("dot") is None:
        raise UsageError(f"drawing {path.suffix} takes Graphviz, and there is no program 'dot': install it, or write .dot")


def _path(graph: nx.MultiDiGraph, groups: Groups, block: str | None) -> str:
    if block is None:
        if not groups.blocks:
            raise UsageError("the model has no residual block to draw: name a module with --block (block=)")
        return next(iter(groups.blocks))
    modules: dict[str, None] = {}
    for _, data in graph.nodes(data=True):
        pieces = data["module"].split(".") if data["module"] else []
        modules |= dict.fromkeys(".".join(pieces[: i + 1]) for i in range(len(pieces)))
    if block not in modules:
        raise UsageError(f"no prune group runs through a module '{block}'; {nearest(block, modules)}")
    return block


def _within(module: str, path: str) -> bool:
    return module == path or module.startswith(f"{path}.")


def _edges(graph: nx.MultiDiGraph, inside: Sequence[str], outside: Sequence[str]) -> dict[tuple[str, str], list[str]]:
    """Forward couplings with an end inside, each with its groups."""
    found: dict[tuple[str, str], list[str]] = {}
    own, known = set(inside), {*inside, *outside}
    for a, b, data in graph.edges(data=True):
        if a in known and b in known and (a in own or b in own) and data["direction"] == "forward":
            names = found.setdefault((a, b), [])
            if data["group"] not in names:
                names.append(data["group"])
    return found


def _cards(
    graph: nx.MultiDiGraph, vertices: Sequence[str], chips: Any, path: str, *, border: str, style: str = "solid"
) -> Iterator[tuple[str, str, str]]:
    """(key, module, label) of a card for each operator, and for each parameter with a row for each of its dimensions."""
    parameters: dict[str, list[str]] = {}
    for vertex in vertices:
        data = graph.nodes[vertex]
        if data["type"] == "parameter":
            parameters.setdefault(data["name"], []).append(vertex)
            continue
        name = data["op"].removeprefix("aten.").partition(".")[0]
        row = f"<tr>{_text(name, 'b')}{_inner(chips(data['groups']))}</tr>"
        yield vertex, data["module"], _table(row, border, style)
    for name, dims in parameters.items():
        rows = [f'<tr><td colspan="2" bgcolor="#EEF1F4">{_escaped(name.removeprefix(path + "."))}</td></tr>']
        for vertex in sorted(dims, key=lambda v: (not _entered(graph, v), graph.nodes[v]["dim"])):
            data = graph.nodes[vertex]
            size = f"<font color='{SOFT}'>dim {data['dim']}: {data['size']:,}</font>"
            rows.append(f'<tr><td port="d{data["dim"]}">{size}</td>{_inner(chips(data["groups"]))}</tr>')
        yield name, graph.nodes[dims[0]]["module"], _table("".join(rows), border, style)


def _entered(graph: nx.MultiDiGraph, vertex: str) -> bool:
    """Whether data flows into this dimension: it is contracted, and stands above the others."""
    return any(data["direction"] == "forward" for *_, data in graph.in_edges(vertex, data=True))


def _table(rows: str, border: str, style: str) -> str:
    return f'<<table border="1" cellborder="0" cellspacing="0" cellpadding="3" color="{border}" style="{style}">{rows}</table>>'


def _inner(chips: str) -> str:
    return f'<td><table border="0" cellborder="0" cellspacing="2" cellpadding="2"><tr>{chips or "<td></td>"}</tr></table></td>'


def _chip(letter: str, colour: str) -> str:
    ink = "white" if colour == DARK else "black"
    return f'<td bgcolor="{colour}"><font color="{ink}" point-size="9">{letter}</font></td>'


def _text(text: str, tag: str) -> str:
    return f"<td><{tag}>{_escaped(text)}</{tag}></td>"


def _escaped(text: str) -> str:
    return html.escape(text) or " "


def _end(graph: nx.MultiDiGraph, vertex: str) -> str:
    data: Mapping[str, Any] = graph.nodes[vertex]
    return f"{quoted(data['name'])}:d{data['dim']}" if data["type"] == "parameter" else quoted(vertex)


def _legend(groups: Groups, letters: Mapping[str, str], colours: Mapping[str, str]) -> str:
    rows = []
    for name, letter in letters.items():
        group = groups[name]
        state = "" if group.prunable else ", pinned"
        rows.append(
            f'<tr>{_chip(letter, colours[name])}<td align="left">{_escaped(name)}</td>'
            f"<td align=\"left\"><font color='{SOFT}'>{group.kind}, {group.size:,} units{state}</font></td></tr>"
        )
    return f'<<table border="0" cellborder="0" cellspacing="3" cellpadding="2">{"".join(rows)}</table>>'


def _letters() -> Iterator[str]:
    """A, B, .. Z, AA, AB, .."""
    for length in (1, 2, 3):
        yield from map("".join, product(ascii_uppercase, repeat=length))
