"""Draw units.svg: what one key-value head, one query group and one FFN channel of a tiny Llama own, as its traced graph says.

Run it:  python docs/images/make_units.py

Nothing is drawn by hand: the indices come from `fxprune.find_groups`.
"""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune

CELL, GAP, TOP = 4, 34, 46
MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
UNITS = (
    ("kv_heads", 1, "#0b6e99", "key-value head 1"),
    ("query_groups", 2, "#d9730d", "query group 2"),
    ("ffn", 7, "#448361", "FFN channel 7"),
)


def make() -> str:
    """The picture as SVG text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=4,
    )
    gm = fxprune.trace(LlamaForCausalLM(config).eval(), {"input_ids": torch.randint(0, 32, (2, 8))})
    groups = fxprune.find_groups(gm)
    parts, x = [], 12
    for path in MATRICES:
        name = f"model.layers.0.{path}.weight"
        rows, columns = gm.get_parameter(name).shape
        label = path.rpartition(".")[2]
        parts.append(f'<text x="{x}" y="{TOP - 18}" font-weight="bold">{label}</text>')
        parts.append(f'<text x="{x}" y="{TOP - 5}" fill="#777">{rows} x {columns}</text>')
        parts.append(f'<rect x="{x}" y="{TOP}" width="{columns * CELL}" height="{rows * CELL}" fill="#eee" stroke="#999"/>')
        for kind, unit, colour, _ in UNITS:
            group = next(g for g in groups.values() if g.kind == kind)
            for member in (m for m in group.members if m.name == name):
                for index in member.indices([unit]).tolist():
                    across = (
                        (x, TOP + index * CELL, columns * CELL, CELL)
                        if member.dim == 0
                        else (x + index * CELL, TOP, CELL, rows * CELL)
                    )
                    place = " ".join(f'{key}="{value}"' for key, value in zip(("x", "y", "width", "height"), across, strict=True))
                    parts.append(f'<rect {place} fill="{colour}" fill-opacity="0.75"/>')
        x += columns * CELL + GAP
    height = TOP + 32 * CELL + 40
    for number, (_, _, colour, said) in enumerate(UNITS):
        left = 12 + number * 190
        parts.append(f'<rect x="{left}" y="{height - 24}" width="12" height="12" fill="{colour}" fill-opacity="0.75"/>')
        parts.append(f'<text x="{left + 18}" y="{height - 14}">{said}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{x}" height="{height}" font-family="sans-serif" font-size="11">'
    return "\n".join([head, f'<rect width="{x}" height="{height}" fill="white"/>', *parts, "</svg>", ""])


if __name__ == "__main__":
    Path(__file__).with_name("units.svg").write_text(make())
