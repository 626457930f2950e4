"""A model that transformers does not know, and proof that no model is known by name.

`tests/chatglm.py` holds the architecture. The reference of the second part shares nothing with fxprune: the eager module, whose
parameters were set to zero by plain indexing.
"""

from __future__ import annotations

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune.capture import trace
from fxprune.groups import Groups
from fxprune.passes.dependency import find_groups
from fxprune.passes.rewrite import rewrite
from fxprune.passes.selection import Selection
from fxprune.plan import PrunePlan

from .chatglm import ChatGLM, Shape, build_chatglm, prompts
from .masking import KeptLayerNorm, error, prunable, sizes, some

WIDTH, HEADS, INNER = 12, 8, 160
EXPECTED = {"hidden": [96], "kv_heads": [8, 8], "ffn": [160, 160], "head_dim": [3, 3, 12, 12]}
"""Of a head's twelve dimensions two halves of six are rotated, by the same angles: three pairs twice. Values have all twelve."""


def run_inputs() -> dict[str, Tensor]:
    """Other sizes than those that were traced: three rows, prompts of other lengths, one of them without an answer."""
    return prompts([4, 11, 9], 11, seed=1)


@pytest.fixture(scope="module", params=[True, False], ids=["lookup", "computed"])
def traced(request: pytest.FixtureRequest) -> tuple[ChatGLM, GraphModule, Groups]:
    """The model, its graph and its groups; both ways to come by cosines and sines."""
    model = build_chatglm(Shape(lookup=request.param))
    gm = trace(model, prompts([3, 5], 7))
    return model, gm, find_groups(gm)


def rotated(layer: int, groups: Groups) -> str:
    """The rotary pairs of a layer: the group that the frequencies or the tables belong to."""
    (name,) = (n for n, g in groups.items() if any(m.name.startswith(f"layers.{layer}.attention.rotary.") for m in g.members))
    return name


def test_the_graph_computes_what_the_module_does(traced: tuple[ChatGLM, GraphModule, Groups]) -> None:
    model, gm, _ = traced
    for lengths, length in (([4, 11, 9], 11), ([2] * 5, 3), ([6, 1], 32)):
        inputs = prompts(lengths, length, seed=length)
        with torch.no_grad():
            torch.testing.assert_close(gm(**inputs), model(**inputs), rtol=1e-5, atol=1e-5)


def test_the_mask_and_both_positions_matter() -> None:
    model = build_chatglm()
    inputs = prompts([4, 7, 9], 11)
    with torch.no_grad():
        dense = model(**inputs)
        for name, other in (
            ("attention_mask", torch.ones(11, 11, dtype=torch.bool).triu(1).expand(3, -1, -1)),
            ("position_ids", inputs["position_ids"].clone().index_fill_(1, torch.tensor([0]), 0)),
            ("position_ids", inputs["position_ids"].clone().index_fill_(1, torch.tensor([1]), 0)),
        ):
            assert (model(**{**inputs, name: other}) - dense).abs().max() > 1e-2 * dense.abs().max()


def test_exactly_the_expected_groups(traced: tuple[ChatGLM, GraphModule, Groups]) -> None:
    _, _, groups = traced
    found = {n: (g.size, {(m.name, m.dim) for m in g.members if m.trainable}) for n, g in prunable(groups).items()}
    everywhere = {("word_embeddings.weight", 1), ("final_layernorm.weight", 0), ("final_layernorm.bias", 0), ("lm_head.weight", 1)}
    for i in range(2):
        layer = f"layers.{i}"
        read = {(f"{layer}.{n}.weight", 1) for n in ("attention.query_key_value", "mlp.dense_h_to_4h")}
        norms_and_outputs = ("input_layernorm", "attention.dense", "post_attention_layernorm", "mlp.dense_4h_to_h")
        everywhere |= read | {(f"{layer}.{n}.{p}", 0) for n in norms_and_outputs for p in ("weight", "bias")}
    assert found.pop("hidden") == (96, everywhere)
    for i in range(2):
        attention, mlp = f"layers.{i}.attention", f"layers.{i}.mlp"
        fused = {(f"{attention}.query_key_value.weight", 0), (f"{attention}.query_key_value.bias", 0)}
        whole = {*fused, (f"{attention}.dense.weight", 1)}
        inner = {(f"{mlp}.dense_h_to_4h.weight", 0), (f"{mlp}.dense_h_to_4h.bias", 0), (f"{mlp}.dense_4h_to_h.weight", 1)}
        assert found.pop(rotated(i, groups)) == (3, fused)
        assert found.pop(f"{attention}.kv_heads") == (HEADS, whole)
        assert found.pop(f"{attention}.head_dim") == (WIDTH, whole)
        assert found.pop(f"{mlp}.ffn") == (INNER, inner)
    assert not found
    assert {g.reason for g in groups.values() if not g.prunable} == {
        "rows are looked up by number at embedding (aten.embedding)",
        "a model output",
    }


def test_what_each_unit_owns(traced: tuple[ChatGLM, GraphModule, Groups]) -> None:
    """Queries, keys and values lie head by head; a pair is a quarter of a head apart, in both halves of query and key."""
    _, _, groups = traced
    name = "layers.1.attention.query_key_value.weight"
    head, values, pairs = (groups[n] for n in ("layers.1.attention.kv_heads", "layers.1.attention.head_dim", rotated(1, groups)))

    def rows(group: fxprune.PruneGroup, unit: int) -> list[int]:
        (member,) = (m for m in group.members if m.name == name)
        return member.indices([unit]).tolist()

    assert rows(head, 2) == list(range(72, 108))
    assert rows(values, 5) == [36 * h + 24 + 5 for h in range(HEADS)]
    assert rows(pairs, 1) == [36 * h + i for h in range(HEADS) for i in (1, 4, 7, 10, 13, 16, 19, 22)]


@pytest.mark.parametrize("lookup", [True, False])
def test_kinds(lookup: bool) -> None:
    groups = find_groups(trace(build_chatglm(Shape(lookup=lookup)), prompts([3, 5], 7), dynamic_shapes={}))
    assert sizes(groups) == EXPECTED


def test_a_mask_with_a_dimension_for_heads() -> None:
    inputs = prompts([3, 5], 7)
    gm = trace(build_chatglm(), {**inputs, "attention_mask": inputs["attention_mask"].unsqueeze(1)})
    assert sizes(find_groups(gm))["kv_heads"] == [8, 8]


def test_every_group_alone_and_all_at_once(traced: tuple[ChatGLM, GraphModule, Groups]) -> None:
    _, gm, groups = traced
    keep = {n: some(g) for n, g in prunable(groups).items()}
    wrong = {n: e for n, units in keep.items() if not (e := error(gm, groups, {n: units}, run_inputs())) < 1e-4}
    assert not wrong
    assert error(gm, groups, keep, run_inputs()) < 1e-4
    assert error(gm, groups, {n: some(g, 1) for n, g in prunable(groups).items() if n != "hidden"}, run_inputs()) < 1e-4


# ---------------------------------------------------------------------------------------------------------------------
# A reference that shares nothing with fxprune: the module itself, its parameters zeroed by hand.


def _gone(kept: Tensor, size: int) -> list[int]:
    return sorted(set(range(size)) - set(kept.tolist()))


@torch.no_grad()
def _zero(model: nn.Module, layer: int, rows: Mapping[str, list[int]], columns: Mapping[str, list[int]]) -> None:
    block = model.get_submodule(f"layers.{layer}")
    for path, index in rows.items():
        block.get_parameter(f"{path}.weight")[index] = 0
        block.get_parameter(f"{path}.bias")[index] = 0
    for path, index in columns.items():
        block.get_parameter(f"{path}.weight")[:, index] = 0


def _heads(model: nn.Module, layer: int, gone: list[int]) -> None:
    fused = [h * 3 * WIDTH + i for h in gone for i in range(3 * WIDTH)]
    out = [h * WIDTH + i for h in gone for i in range(WIDTH)]
    _zero(model, layer, {"attention.query_key_value": fused}, {"attention.dense": out})


def _value_width(model: nn.Module, layer: int, gone: list[int]) -> None:
    fused = [h * 3 * WIDTH + 2 * WIDTH + i for h in range(HEADS) for i in gone]
    out = [h * WIDTH + i for h in range(HEADS) for i in gone]
    _zero(model, layer, {"attention.query_key_value": fused}, {"attention.dense": out})


def _pairs(model: nn.Module, layer: int, gone: list[int]) -> None:
    quarter = WIDTH // 4
    fused = [h * 3 * WIDTH + part * quarter + i for h in range(HEADS) for part in range(8) for i in gone]
    _zero(model, layer, {"attention.query_key_value": fused}, {})


def _inner(model: nn.Module, layer: int, gone: list[int]) -> None:
    _zero(model, layer, {"mlp.dense_h_to_4h": gone}, {"mlp.dense_4h_to_h": gone})


KINDS: dict[str, tuple[Callable[[nn.Module, int, list[int]], None], int, Callable[[int, Groups], str]]] = {
    "heads": (_heads, HEADS, lambda i, _: f"layers.{i}.attention.kv_heads"),
    "value width": (_value_width, WIDTH, lambda i, _: f"layers.{i}.attention.head_dim"),
    "rotary pairs": (_pairs, WIDTH // 4, rotated),
    "ffn": (_inner, INNER, lambda i, _: f"layers.{i}.mlp.ffn"),
}


def assert_same(small: nn.Module, stock: nn.Module, dense: nn.Module) -> None:
    """The pruned module does what the altered one does, and that is not what the dense one did."""
    with torch.no_grad():
        expected, actual, before = (m(**run_inputs()) for m in (stock, small, dense))
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert (before - expected).abs().max() > 1e-2 * expected.abs().max(), "the removed units did not matter: no test"


@pytest.mark.parametrize("kinds", [*([k] for k in KINDS), list(KINDS)], ids=lambda k: "+".join(k))
def test_against_the_module_zeroed_by_hand(traced: tuple[ChatGLM, GraphModule, Groups], kinds: list[str]) -> None:
    dense, gm, groups = traced
    stock = build_chatglm(Shape(lookup=hasattr(dense.get_submodule("layers.0.attention.rotary"), "cosines")))
    keep: dict[str, Tensor] = {}
    for kind in kinds:
        zero, size, name = KINDS[kind]
        for layer, n in ((0, size // 2), (1, 1)):
            kept = torch.randperm(size)[:n].sort().values
            keep[name(layer, groups)] = kept
            zero(stock, layer, _gone(kept, size))
    assert_same(rewrite(gm, PrunePlan.from_keep(groups, keep)), stock, dense)


def test_hidden_size_against_the_module_zeroed_by_hand(traced: tuple[ChatGLM, GraphModule, Groups]) -> None:
    dense, gm, groups = traced
    stock: Any = build_chatglm()
    kept = torch.arange(96)[torch.arange(96) % 5 != 2]
    gone = _gone(kept, 96)
    with torch.no_grad():
        stock.word_embeddings.weight[:, gone] = 0
        stock.lm_head.weight[:, gone] = 0
    for i, block in enumerate(stock.layers):
        out = {"attention.dense": gone, "mlp.dense_4h_to_h": gone}
        _zero(stock, i, out, {"attention.query_key_value": gone, "mlp.dense_h_to_4h": gone})
        for name in ("input_layernorm", "post_attention_layernorm"):
            setattr(block, name, KeptLayerNorm(getattr(block, name), kept))
    stock.final_layernorm = KeptLayerNorm(stock.final_layernorm, kept)
    small = rewrite(gm, PrunePlan.from_keep(groups, {"hidden": kept}))
    assert small.get_parameter("layers.1.attention.query_key_value.weight").shape == (288, len(kept))
    assert_same(small, stock, dense)


# ---------------------------------------------------------------------------------------------------------------------
# LLM-Pruner's recipe: a quarter of heads and feed-forward channels, by Taylor importance, in all layers but the outer ones.


def _loss(logits: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


RECIPE = Selection(units={"kv_heads": 0.25, "ffn": 0.25}, widths="per-layer", protect_first=1, protect_last=1)


def widths(model: nn.Module) -> list[tuple[int, int]]:
    """(heads, feed-forward channels) of every layer, as its parameters have them."""
    found = []
    for i in range(4):
        fused, inner = (model.get_parameter(f"layers.{i}.{n}.weight") for n in ("attention.query_key_value", "mlp.dense_h_to_4h"))
        found.append((fused.shape[0] // (3 * WIDTH), inner.shape[0]))
    return found


def test_the_recipe_step_by_step() -> None:
    model = build_chatglm(Shape(layers=4))
    gm = trace(model, prompts([3, 5], 7))
    groups = find_groups(gm)
    batches = [prompts([4, 6], 12, seed=s) for s in range(3)]
    scores = fxprune.score(gm, groups, criterion="taylor1", calibration=batches, loss=_loss)
    plan = fxprune.select(groups, scores, RECIPE)
    small = rewrite(gm, plan)
    assert widths(small) == [(8, 160), (6, 120), (6, 120), (8, 160)]
    report = fxprune.verify(gm, small, plan, run_inputs())
    assert report.ok
    assert report.max_rel_error < 1e-4


def test_the_recipe_in_one_call() -> None:
    model = build_chatglm(Shape(layers=4))
    batches = [prompts([4, 6], 12, seed=s) for s in range(3)]
    result = fxprune.prune(
        model, selection=RECIPE, inputs=prompts([3, 5], 7), calibration=batches, loss=_loss, verify_inputs=run_inputs()
    )
    assert result.form == "module"
    assert result.model is not None
    assert widths(result.model) == widths(result.graph_module) == [(8, 160), (6, 120), (6, 120), (8, 160)]
    assert [layer.attention.heads for layer in result.model.layers] == [8, 6, 6, 8]  # type: ignore[union-attr]
    inputs = prompts([7, 3], 15, seed=5)
    with torch.no_grad():
        torch.testing.assert_close(result.model(**inputs), result.graph_module(**inputs), rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------------------------------------------------------------
# No model is known by name.

SOURCES = sorted({p.resolve() for folder in ("fxprune", "passes") for p in (Path(__file__).parents[1] / folder).rglob("*.py")})
ALLOWED = {"align", "codegen", "clip", "encoderdecoder"}
"""Names of model families that mean something else here: torch's ``CodeGen`` and ``clip_grad_norm_``, ``is_encoder_decoder``,
matplotlib's ``align``."""


def _code_words(source: str) -> Iterator[str]:
    """Words of identifiers and strings, lower case, alone and joined to their neighbours; no docstrings, no comments."""
    prose = {
        (node.value.lineno, node.value.col_offset)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
    }
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in (tokenize.NAME, tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", -1)) and token.start not in prose:
            for name in re.findall(r"[A-Za-z][\w-]*", token.string):
                parts = re.findall(r"[A-Z]?[a-z]+\d*|[A-Z]+(?![a-z])\d*|\d+", name)
                yield from ("".join(parts[i:j]).lower() for i in range(len(parts)) for j in range(i + 1, len(parts) + 1))


def _families() -> set[str]:
    """Model types and prefixes of model classes that transformers knows: ``gpt_neox`` as ``gptneox``."""
    known: Any = importlib.import_module("transformers.models.auto.configuration_auto")
    names = {*known.CONFIG_MAPPING_NAMES, *(c.removesuffix("Config") for c in known.CONFIG_MAPPING_NAMES.values())}
    plain = {re.sub(r"[_-]", "", n).lower() for n in names}
    return {n for n in plain if len(n) >= 4}


def test_no_source_file_names_a_model_family() -> None:
    assert len(SOURCES) > 40
    families = _families()
    assert {"llama", "gpt2", "gptneox", "bloom", "phi3"} <= families
    found = {(p.name, w) for p in SOURCES for w in _code_words(p.read_text(encoding="utf-8")) if w in families - ALLOWED}
    assert not found


def test_the_search_for_names_finds_them() -> None:
    code = 'def f(x):\n    """About a Bert."""\n    return isinstance(x, LlamaAttention) or x == "gpt_neox"  # a Mistral\n'
    assert set(_code_words(code)) & _families() == {"llama", "gptneox"}


def test_this_model_is_not_known() -> None:
    for path in SOURCES:
        assert not re.search(r"(?i)(?<![a-z])(chat)?glm(?![a-z])", path.read_text(encoding="utf-8")), path
