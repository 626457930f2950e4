"""Models of images and text: every tower is found and pruned exactly, with the image tokens where they are."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune.capture import trace
from fxprune.errors import CaptureError
from fxprune.groups import Groups, PruneGroup
from fxprune.passes.dependency import find_groups
from fxprune.passes.rewrite import rewrite
from fxprune.plan import PrunePlan

from .masking import error, prunable, some
from .multimodal import CASES, IDEFICS_TOWERS, LLAVA_TOWERS, FixedGrid, caption, grids, one_image, prefix, qwen2_vl, randomised


@functools.cache
def traced(name: str) -> tuple[nn.Module, GraphModule, Groups]:
    """The model, its graph of fixed sizes and its groups; made once."""
    model = CASES[name].build()
    gm = trace(model, CASES[name].inputs(0), dynamic_shapes={})
    return model, gm, find_groups(gm)


def kinds(groups: Groups, towers: Sequence[str]) -> dict[str, dict[str, list[int]]]:
    """For each tower, sizes of its prunable groups by kind, but for the residual streams."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, group in prunable(groups).items():
        if group.kind != "hidden":
            tower = next((t for t in towers if name.startswith(t)), "")
            found.setdefault(tower, {}).setdefault(group.kind, []).append(group.size)
    return {tower: {kind: sorted(n) for kind, n in table.items()} for tower, table in found.items()}


def streams(groups: Groups) -> dict[int, PruneGroup]:
    """The residual streams by size: 40 wide in vision towers, 48 in decoders."""
    return {g.size: g for g in groups.values() if g.kind == "hidden" and g.size > 2}


@pytest.mark.parametrize("name", CASES)
def test_the_graph_computes_what_the_model_does(name: str) -> None:
    model, gm, _ = traced(name)
    for seed in (0, 1):
        inputs = CASES[name].inputs(seed)
        with torch.no_grad():
            expected, actual = model(**inputs), gm(**inputs)
        key = "logits_per_image" if name == "clip" else "logits"
        torch.testing.assert_close(actual[key], expected[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_every_group_alone_and_all_at_once(name: str) -> None:
    _, gm, groups = traced(name)
    inputs = CASES[name].inputs(2)
    keep = {n: some(g) for n, g in prunable(groups).items()}
    assert not {n: e for n, units in keep.items() if not (e := error(gm, groups, {n: units}, inputs)) < 1e-4}
    assert error(gm, groups, keep, inputs) < 1e-4


@pytest.mark.parametrize("name", CASES)
def test_heads_and_feed_forward_blocks_of_every_tower(name: str) -> None:
    _, _, groups = traced(name)
    found = kinds(groups, CASES[name].towers)
    for tower in CASES[name].towers:
        assert "ffn" in found[tower]
        assert "projector" in tower or {"kv_heads", "head_dim"} <= set(found[tower])


def test_the_groups_of_llava() -> None:
    _, _, groups = traced("llava-siglip")
    vision, projector, decoder = LLAVA_TOWERS
    assert kinds(groups, LLAVA_TOWERS) == {
        vision: {"kv_heads": [5, 5], "head_dim": [8, 8, 8, 8], "ffn": [56, 56]},
        projector: {"ffn": [48]},
        decoder: {"kv_heads": [2, 2], "query_groups": [3, 3], "head_dim": [4, 8, 8], "ffn": [64, 64]},
    }
    reached = {m.name for m in streams(groups)[40].members}
    assert streams(groups)[40].prunable
    assert {"model.multi_modal_projector.linear_1.weight", "model.vision_tower.embeddings.position_embedding.weight"} <= reached


def test_the_groups_of_a_flamingo() -> None:
    _, _, groups = traced("idefics")
    vision, crossing, decoder = IDEFICS_TOWERS
    assert kinds(groups, IDEFICS_TOWERS) == {
        vision: {"kv_heads": [5, 5], "head_dim": [8, 8, 8, 8], "ffn": [56, 56]},
        crossing: {"kv_heads": [6, 6], "head_dim": [8, 8, 8, 8], "ffn": [64, 64]},
        decoder: {"kv_heads": [6, 6], "head_dim": [4, 4, 8, 8], "ffn": [64, 64]},
    }
    decoder_stream, vision_stream = streams(groups)[48], streams(groups)[40]
    assert decoder_stream.prunable
    assert {f"model.gated_cross_attn_layers.{i}.cross_attn.o_proj.weight" for i in (0, 1)} <= {
        m.name for m in decoder_stream.members
    }
    assert not vision_stream.prunable
    assert vision_stream.reason == "a model output"  # the features of the images are one
    assert {f"model.gated_cross_attn_layers.{i}.cross_attn.k_proj.weight" for i in (0, 1)} <= {
        m.name for m in vision_stream.members
    }


class Only(nn.Module):
    """One of a model's outputs: the others hold features of images, or whole streams, which pins them."""

    def __init__(self, model: nn.Module, output: str) -> None:
        super().__init__()
        self.model, self.output = model, output

    def forward(self, **inputs: Tensor) -> Tensor:
        return self.model(**inputs)[self.output]


@pytest.mark.parametrize("name", ["llava-siglip", "paligemma"])
def test_the_stream_that_images_are_put_into(name: str) -> None:
    """The mask is the same for every dimension of an embedding: words, images and the projector share one axis."""
    gm = trace(Only(CASES[name].build(), "logits"), CASES[name].inputs(0), dynamic_shapes={})
    groups = find_groups(gm)
    stream = streams(groups)[48]
    assert stream.prunable
    assert any("projector" in m.name for m in stream.members)
    assert any("embed_tokens" in m.name for m in stream.members)
    assert error(gm, groups, {stream.name: some(stream)}, CASES[name].inputs(1)) < 1e-4


def test_a_layer_that_is_not_read_has_no_groups() -> None:
    """LLaVA reads the last layer but one of its CLIP tower: what comes after it computes nothing."""
    _, _, groups = traced("llava-clip")
    assert not [n for n in groups if "vision_tower.encoder.layers.1." in n]


def test_what_is_no_output_is_not_pinned() -> None:
    model = CASES["clip"].build()
    assert not any(g.prunable for g in streams(traced("clip")[2]).values())
    gm = trace(Only(model, "logits_per_image"), caption(0), dynamic_shapes={})
    groups = find_groups(gm)
    assert {n: g.prunable for n, g in streams(groups).items()} == {40: True, 48: True}
    (joint,) = (g for g in groups.values() if g.size == 24)
    assert joint.prunable
    assert {"model.visual_projection.weight", "model.text_projection.weight"} == {m.name for m in joint.members}
    keep = {n: some(g) for n, g in prunable(groups).items()}
    assert not {n: e for n, units in keep.items() if not (e := error(gm, groups, {n: units}, caption(1))) < 1e-4}
    assert error(gm, groups, keep, caption(1)) < 1e-4


@pytest.mark.parametrize(("name", "batch"), [("llava-siglip", 2), ("paligemma", 3)])
def test_symbolic_sizes(name: str, batch: int) -> None:
    """Of LLaVA the number of images is fixed: it splits their features into a list."""
    model, make = CASES[name].build(), {"llava-siglip": one_image, "paligemma": prefix}[name]
    gm = trace(model, make(0))
    inputs = make(5, batch, 14)
    with torch.no_grad():
        torch.testing.assert_close(gm(**inputs)["logits"], model(**inputs).logits, rtol=1e-5, atol=1e-5)
    groups = find_groups(gm)
    assert error(gm, groups, {n: some(g) for n, g in prunable(groups).items()}, inputs) < 1e-4


def test_qwen2_vl_with_its_image_sizes_worked_out_beforehand() -> None:
    torch.manual_seed(0)
    stock: Any = randomised(qwen2_vl())
    with torch.no_grad():
        expected = [stock(**grids(seed)).logits for seed in (0, 1)]
    with pytest.raises(CaptureError, match="data-dependent"):
        trace(stock, grids(0), dynamic_shapes={})
    model = FixedGrid(stock)
    inputs = [model.inputs(grids(seed)) for seed in (0, 1)]
    gm = trace(model, inputs[0], dynamic_shapes={})
    with torch.no_grad():
        for wanted, given in zip(expected, inputs, strict=True):
            torch.testing.assert_close(gm(**given)["logits"], wanted, rtol=1e-5, atol=1e-5)
    groups = find_groups(gm)
    vision, decoder = "model.model.visual.", "model.model.language_model."
    assert kinds(groups, (vision, decoder)) == {
        vision: {"kv_heads": [5, 5], "head_dim": [2], "ffn": [80, 80, 160]},
        decoder: {"kv_heads": [2, 2], "query_groups": [3, 3], "head_dim": [2, 8, 8], "ffn": [64, 64]},
    }
    keep = {n: some(g) for n, g in prunable(groups).items()}
    assert not {n: e for n, units in keep.items() if not (e := error(gm, groups, {n: units}, inputs[1])) < 1e-4}
    assert error(gm, groups, keep, inputs[1]) < 1e-4


def _without(groups: Groups, gone: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    return {n: torch.tensor([u for u in range(groups[n].size) if u not in units]) for n, units in gone.items()}


def test_llava_against_the_eager_model() -> None:
    """Two heads of the tower, channels of projector and decoder: the stock model with zeros where they were."""
    model, gm, groups = traced("llava-siglip")
    stock: Any = CASES["llava-siglip"].build()
    heads, wide, deep = [1, 4], [0, 7, *range(20, 40)], [3, *range(30, 60)]
    tower, decoder = stock.model.vision_tower, stock.model.language_model
    attention, projector, mlp = tower.encoder.layers[1].self_attn, stock.model.multi_modal_projector, decoder.layers[0].mlp
    rows = [h * 8 + i for h in heads for i in range(8)]
    with torch.no_grad():
        for part in (attention.q_proj, attention.k_proj, attention.v_proj):
            part.weight[rows] = 0
            part.bias[rows] = 0
        attention.out_proj.weight[:, rows] = 0
        projector.linear_1.weight[wide] = 0
        projector.linear_1.bias[wide] = 0
        projector.linear_2.weight[:, wide] = 0
        mlp.gate_proj.weight[deep] = 0
        mlp.up_proj.weight[deep] = 0
        mlp.down_proj.weight[:, deep] = 0
    names = ("vision_tower.encoder.layers.1.self_attn.kv_heads", "multi_modal_projector.ffn", "language_model.layers.0.mlp.ffn")
    plan = PrunePlan.from_keep(groups, _without(groups, {f"model.{n}": g for n, g in zip(names, (heads, wide, deep), strict=True)}))
    small, inputs = rewrite(gm, plan), one_image(3)
    with torch.no_grad():
        expected, actual, before = (m(**inputs)["logits"] for m in (stock, small, model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max(), "the removed units did not matter: no test"


@pytest.mark.parametrize(
    "name",
    [
        "llava-siglip",
        "llava-clip",
    ],
)
def test_prune_gives_an_eager_model(name: str) -> None:
    model = CASES[name].build()
    result = fxprune.prune(model, units={"kv_heads": 0.4, "ffn": 0.25}, inputs=one_image(0), recipe={"criterion": "l1"})
    assert result.report.verify is not None
    assert result.report.verify.ok
    assert isinstance(result.model, type(model))
    with torch.no_grad():
        expected, actual = (m(**one_image(4))["logits"] for m in (result.graph_module, result.model))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def test_a_trace_that_is_not_the_model_is_named() -> None:
    """Without token_type_ids PaliGemma's own masks differ between eager mode and export: the note must not blame the pruning."""
    model, inputs = CASES["paligemma"].build(), one_image(0)
    result = fxprune.prune(model, units={"ffn": 0.5}, recipe={"criterion": "l1"}, inputs=inputs, widths="per-layer")
    assert result.form == "graph"
    assert "the trace computes something else than the dense model on these inputs" in result.report.note
