"""Checkpoints: what is written loads where fxprune is not, computes the same, and is never written by halves."""

from __future__ import annotations

import contextlib
import copy
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PhiConfig, PreTrainedTokenizerFast

import fxprune
from fxprune import PrunePlan
from fxprune.api import PruneResult, prune
from fxprune.checkpoint import config as solver
from fxprune.checkpoint import save
from fxprune.checkpoint.eager import combined, renamed
from fxprune.checkpoint.source import load_source
from fxprune.checkpoint.surgery import apply_surgery, set_attribute
from fxprune.errors import CheckpointError, UsageError

from .zoo import VOCABULARY, build, tokens

SHAPES = ((1, 5), (3, 11), (2, 16))
PROMPT, NEW = (2, 6), 8

_STOCK = """
import json, os, sys
sys.modules["fxprune"] = None  # an import of it fails, wherever it may be installed
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
for line in sys.stdin:
    asked = json.loads(line)
    try:
        model = AutoModelForCausalLM.from_pretrained(asked["directory"], trust_remote_code=asked["trust"]).eval()
        model.generation_config.eos_token_id = None
        given = load_file(asked["inputs"])
        with torch.no_grad():
            made = {n: model(input_ids=x).logits for n, x in given.items() if n != "prompt"}
            options = {"max_new_tokens": asked["new"], "do_sample": False, "use_cache": True, "pad_token_id": 0}
            prompt = given["prompt"]
            made["prompt"] = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
        save_file({n: x.contiguous() for n, x in made.items()}, asked["outputs"])
        if asked["resave"]:
            model.save_pretrained(asked["resave"])
        answer = {"class": type(model).__name__, "module": type(model).__module__, "dtype": str(model.dtype)}
    except Exception as error:
        answer = {"error": f"{type(error).__name__}: {error}"}
    print(json.dumps(answer), flush=True)
"""


class Stock:
    """A process with transformers and without fxprune, asked by lines of JSON: starting one for each test would take minutes."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("COV_")}
        environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules"), "PYTHONWARNINGS": "ignore"}
        command = [sys.executable, "-c", _STOCK]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, cwd=scratch, env=environment)
        self.asked = 0

    def __call__(
        self, directory: Path, inputs: dict[str, Tensor], *, trust: bool = False, resave: Path | None = None
    ) -> tuple[dict[str, str], dict[str, Tensor]]:
        """What the process says of a checkpoint, and its logits for each input and its continuation of ``prompt``."""
        self.asked += 1
        given, made = (self.scratch / f"{kind}{self.asked}.safetensors" for kind in ("inputs", "outputs"))
        save_file(inputs, given)
        asked = {"directory": str(directory), "inputs": str(given), "outputs": str(made), "trust": trust, "new": NEW}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps({**asked, "resave": str(resave) if resave else ""}) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        assert "error" not in answer, answer["error"]
        return answer, load_file(made)

    def close(self) -> None:
        """End the process."""
        with self.process:
            assert self.process.stdin is not None
            self.process.stdin.close()


@pytest.fixture(scope="session")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stock]:
    process = Stock(tmp_path_factory.mktemp("stock"))
    yield process
    process.close()


def inputs() -> dict[str, Tensor]:
    return {**{f"{b}x{s}": tokens(b, s, seed=s) for b, s in SHAPES}, "prompt": tokens(*PROMPT, seed=7)}


def relative(expected: Tensor, actual: Tensor) -> float:
    assert expected.shape == actual.shape
    expected, actual = expected.detach().double(), actual.detach().double()
    return float((expected - actual).abs().max() / expected.abs().max())


def expected_of(result: PruneResult) -> dict[str, Tensor]:
    """The rewritten graph's logits, and its greedy continuation of the prompt without any cache."""
    given = inputs()
    with torch.no_grad():
        made = {n: result.graph_module(input_ids=x).logits for n, x in given.items() if n != "prompt"}
        ids = given["prompt"]
        for _ in range(NEW):
            ids = torch.cat([ids, result.graph_module(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return {**made, "prompt": ids}


def outputs_of(model: Any) -> dict[str, Tensor]:
    """The same of an eager model, which generates with its KV cache."""
    given = inputs()
    prompt = given["prompt"]
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        made = {n: model(input_ids=x).logits for n, x in given.items() if n != "prompt"}
        options: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        made["prompt"] = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)
    return made


def assert_same(expected: dict[str, Tensor], actual: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, logits in expected.items():
        if name == "prompt":
            assert torch.equal(logits, actual[name]), "generated other tokens"
        else:
            assert relative(logits, actual[name]) < tolerance, name


def check(result: PruneResult, directory: Path, stock: Stock) -> nn.Module:
    """Save, and load by every way there is: in this process, and in one without fxprune. Returns what `fxprune.load` gave."""
    result.save_pretrained(directory)
    assert os.listdir(directory.parent) == [directory.name], "something was left beside the checkpoint"
    expected = expected_of(result)
    assert result.model is not None
    assert_same(expected, outputs_of(result.model))
    loaded = fxprune.load(directory)
    assert not loaded.training
    assert_same(expected, outputs_of(loaded))
    answer, made = stock(directory, inputs(), trust=result.form == "per-layer")
    assert_same(expected, made)
    assert answer["class"] == type(result.model).__name__ == type(result.dense_model).__name__
    assert answer["module"].startswith("transformers." if result.form == "uniform" else "transformers_modules.")
    return loaded


def pruned(model: nn.Module, **options: Any) -> PruneResult:
    return prune(model, recipe={"criterion": "l1"}, **options)


def stated(name: str, keep: Callable[[str, int], Any], drop: tuple[str, ...] = (), **changes: Any) -> PruneResult:
    """Prune by a plan: ``keep(group, size)`` gives the units that stay, or None."""
    model = build(name, **changes)
    groups = fxprune.find_groups(fxprune.trace(model, {"input_ids": tokens(2, 16)}))
    kept = {n: units for n, g in groups.items() if g.prunable and (units := keep(n, g.size)) is not None}
    return prune(model, plan=PrunePlan.from_keep(groups, kept, drop=drop))


# --- uniform widths: a stock class ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "changes", "options", "fields"),
    [
        ("llama", {}, {"ratio": 0.3}, {}),
        ("llama", {"tied": False}, {"units": {"kv_heads": 0.5, "ffn": 0.25}}, {"num_key_value_heads": 1, "num_attention_heads": 3}),
        ("llama", {}, {"units": {"ffn": 0.3}}, {"intermediate_size": 45, "hidden_size": 48}),
        ("llama", {}, {"units": {"query_groups": 0.34}}, {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
        ("llama", {"tied": False}, {"units": {"hidden": 0.25}}, {"hidden_size": 36, "head_dim": 8}),
        ("llama", {"num_hidden_layers": 3}, {"units": {"layers": 0.34}}, {"num_hidden_layers": 2}),
        (
            "gemma3",
            {"num_hidden_layers": 3, "layer_types": ["full_attention", *["sliding_attention"] * 2]},
            {"units": {"layers": 0.34}},
            {},
        ),
        ("gpt2", {}, {"units": {"ffn": 0.3}}, {"n_inner": 134, "n_embd": 48}),
        ("gpt_neox", {"tied": False}, {"units": {"ffn": 0.3}}, {"intermediate_size": 45}),
        ("opt", {}, {"units": {"ffn": 0.3}}, {"ffn_dim": 45}),
        ("phi3", {}, {"units": {"kv_heads": 0.5, "ffn": 0.3}}, {"num_key_value_heads": 1, "intermediate_size": 45}),
        ("falcon_new", {}, {"units": {"ffn": 0.3}}, {"ffn_hidden_size": 134}),
        ("mixtral", {}, {"units": {"experts": 0.5}}, {"num_local_experts": 2, "intermediate_size": 64}),
    ],
    ids=lambda value: "-".join(value["units"]) if isinstance(value, dict) and isinstance(value.get("units"), dict) else None,
)
def test_uniform_widths_load_in_the_stock_class(
    name: str, changes: dict[str, Any], options: dict[str, Any], fields: dict[str, int], tmp_path: Path, stock: Stock
) -> None:
    result = pruned(build(name, **changes), **options)
    assert (result.form, result.report.form) == ("uniform", "uniform")
    assert "stock configuration" not in result.report.note
    loaded: Any = check(result, tmp_path / "out", stock)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert {k: written[k] for k in fields} == fields
    assert not {"fxprune", "auto_map"} & set(written)
    assert sum(p.numel() for p in loaded.parameters()) == result.report.parameters_after < result.report.parameters_before


def test_dropped_layers_renumber_the_cache_and_shorten_lists() -> None:
    kinds = ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]
    result = stated("gemma3", lambda n, s: None, drop=("model.layers.1",), num_hidden_layers=4, layer_types=kinds)
    model: Any = result.model
    assert result.form == "uniform"
    assert model.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]


# --- per-layer widths ----------------------------------------------------------------------------------------------------------


def even_less(name: str, size: int) -> list[int] | None:
    """FFN widths that differ from layer to layer."""
    return list(range(size - 9 - 8 * int(name.split(".")[2]))) if name.endswith("ffn") else None


def rotary(name: str, size: int) -> list[int] | None:
    """Three of four rotary pairs, and six of the values' eight dimensions: one head width again, but not a stock one."""
    if name == "model.layers.head_dim":
        return [0, 1, 3]
    return [0, 1, 3, 4, 5, 7] if name.endswith("head_dim") else None


FOUR: dict[str, Any] = {"num_hidden_layers": 4}
GEMMA: dict[str, Any] = {**FOUR, "layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]}
QWEN: dict[str, Any] = {
    **FOUR,
    "layer_types": ["full_attention", "sliding_attention"] * 2,
    "sliding_window": 8,
    "use_sliding_window": True,
}


@pytest.mark.parametrize(
    ("make", "note"),
    [
        pytest.param(
            lambda: pruned(build("llama"), ratio=0.25, ranking="global", widths="per-layer"),
            "no stock configuration expresses the plan: widths differ between layers",
            id="llama-global",
        ),
        pytest.param(
            lambda: pruned(build("phi3", tied=False), ratio=0.25, ranking="global", widths="per-layer"),
            "widths differ between layers",
            id="phi3-global",
        ),
        pytest.param(
            lambda: pruned(build("llama"), units={"hidden": 0.34}),
            "LlamaConfig refuses {'hidden_size': 32}: ValueError: The hidden size (32) is not a multiple of the number of",
            id="llama-hidden-refused",
        ),
        pytest.param(
            lambda: pruned(build("gemma2"), units={"hidden": 0.25}),
            "its Gemma2ForCausalLM differs from the pruned graph (relative error",  # it scales embeddings by its hidden size
            id="gemma2-hidden",
        ),
        pytest.param(
            lambda: stated("llama", rotary), "its LlamaForCausalLM differs from the pruned graph", id="llama-rotary-pairs"
        ),
        pytest.param(
            lambda: stated("llama", even_less, drop=("model.layers.0", "model.layers.2"), **FOUR), "widths differ", id="llama-drop"
        ),
        pytest.param(lambda: stated("gemma2", even_less, drop=("model.layers.1",), **FOUR), "widths differ", id="gemma2-drop"),
        pytest.param(lambda: stated("gemma3", even_less, drop=("model.layers.0",), **GEMMA), "widths differ", id="gemma3-drop"),
        pytest.param(lambda: stated("qwen3", even_less, drop=("model.layers.2",), **QWEN), "widths differ", id="qwen3-drop"),
        pytest.param(
            lambda: pruned(build("gpt2"), units={"kv_heads": 0.34, "ffn": 0.3}),
            "GPT2Config refuses {'n_embd': 32}: `embed_dim` must be divisible by num_heads",
            id="gpt2-heads",
        ),
        pytest.param(
            lambda: pruned(build("gpt_neox", tied=False), units={"kv_heads": 0.34}), "GPTNeoXConfig refuses", id="gpt_neox-heads"
        ),
        pytest.param(lambda: pruned(build("opt"), units={"kv_heads": 0.34}), "OPTConfig refuses", id="opt-heads"),
        pytest.param(lambda: pruned(build("falcon_new"), units={"kv_heads": 0.5}), "stock", id="falcon-heads"),
    ],
)
def test_per_layer_widths_load_with_and_without_fxprune(
    make: Callable[[], PruneResult], note: str, tmp_path: Path, stock: Stock
) -> None:
    result = make()
    assert result.form == "per-layer"
    assert note in result.report.note
    loaded: Any = check(result, tmp_path / "out", stock)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["auto_map"] == {"AutoModelForCausalLM": f"modeling_fxprune.{type(result.dense_model).__name__}"}
    assert {n: tuple(p.shape) for n, p in loaded.named_parameters()} == {
        n: tuple(p.shape) for n, p in cast(nn.Module, result.model).named_parameters()
    }
    layers = len(loaded.get_submodule("model.layers")) if result.plan.drop else loaded.config.num_hidden_layers
    assert loaded.config.num_hidden_layers == layers
    if result.plan.drop:
        assert [layer.self_attn.layer_idx for layer in loaded.model.layers] == list(range(layers))
        assert len(getattr(loaded.config, "layer_types", None) or range(layers)) == layers


def test_a_per_layer_model_saved_again_is_the_same(tmp_path: Path, stock: Stock) -> None:
    kinds = GEMMA["layer_types"]
    result = stated("gemma3", even_less, drop=("model.layers.1",), num_hidden_layers=4, layer_types=kinds)
    first, second, third, fourth = (tmp_path / n for n in ("first", "second", "third", "fourth"))
    result.save_pretrained(first)
    loaded: Any = fxprune.load(first)
    loaded.save_pretrained(second)
    again: Any = fxprune.load(second)
    again.save_pretrained(third)
    _, made = stock(third, inputs(), trust=True, resave=fourth)
    expected = expected_of(result)
    assert_same(expected, made)
    for directory in (second, third, fourth):
        one, other = load_file(first / "model.safetensors"), load_file(directory / "model.safetensors")
        assert one.keys() == other.keys()
        assert all(torch.equal(t, other[n]) for n, t in one.items())
        assert_same(expected, outputs_of(fxprune.load(directory)))
    configs = [json.loads((d / "config.json").read_text()) for d in (second, third, fourth)]
    assert configs[0]["fxprune"] == configs[1]["fxprune"] == configs[2]["fxprune"]
    assert configs[2]["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]


def test_the_class_that_travels_along_takes_stock_configurations_too(tmp_path: Path) -> None:
    """transformers registers it for the configuration's type, and then builds stock checkpoints with it."""
    result = stated("llama", even_less)
    result.save_pretrained(tmp_path / "out")
    dense = result.dense_model
    assert dense is not None
    made = type(fxprune.load(tmp_path / "out"))(result.dense_config)
    made.load_state_dict(dense.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(made(tokens(2, 5)).logits, dense(tokens(2, 5)).logits)


def test_a_per_layer_model_can_be_pruned_again(tmp_path: Path, stock: Stock) -> None:
    first = stated("llama", even_less, drop=("model.layers.1",), num_hidden_layers=4, tied=False)
    first.save_pretrained(tmp_path / "first")
    middle, _ = load_source(tmp_path / "first")
    groups = fxprune.find_groups(fxprune.trace(middle, {"input_ids": tokens(2, 16)}))
    keep: dict[str, Any] = {n: list(range(1, g.size)) for n, g in groups.items() if g.kind in ("ffn", "query_groups")}
    keep = {n: u for n, u in keep.items() if ".2." not in n}
    plan = PrunePlan.from_keep(groups, keep, drop=["model.layers.0"])
    second = prune(middle, plan=plan)
    assert second.form == "per-layer"
    assert "the model itself has the per-layer form" in second.report.note
    loaded: Any = check(second, tmp_path / "made" / "second", stock)
    assert [layer.mlp.gate_proj.out_features for layer in loaded.model.layers] == [64 - 9 - 16 - 1, 64 - 9 - 24]
    assert json.loads((tmp_path / "made" / "second" / "config.json").read_text())["fxprune"]["drop"] == {"model.layers": [0, 1]}


@pytest.mark.parametrize(
    ("name", "settings", "auto"),
    [
        (
            "BertForMaskedLM",
            {"hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 6},
            "MaskedLM",
        ),
        ("T5ForConditionalGeneration", {"d_model": 48, "d_kv": 8, "num_heads": 6, "d_ff": 64, "num_layers": 2}, "Seq2SeqLM"),
        ("T5ForConditionalGeneration", {"d_model": 48, "d_kv": 8, "num_heads": 6, "d_ff": 64, "num_layers": 2}, "drop"),
    ],
    ids=["bert", "t5", "t5-drop"],
)
def test_models_that_are_no_causal_language_models(name: str, settings: dict[str, Any], auto: str, tmp_path: Path) -> None:
    """T5 has residual blocks inside its blocks: one may go with the other, but its eager block counts on all of its parts."""
    kind: Any = getattr(transformers, name)
    model = kind(kind.config_class(vocab_size=VOCABULARY, **settings)).eval()
    given = {"input_ids": tokens(2, 9), **({"decoder_input_ids": tokens(2, 7)} if name.startswith("T5") else {})}
    groups = fxprune.find_groups(fxprune.trace(model, given))
    keep = {n: list(range(20 + i)) for i, (n, g) in enumerate(groups.items()) if g.kind == "ffn" and g.prunable}
    drop = []
    if auto == "drop":
        alone = prune(model, plan=PrunePlan.from_keep(groups, {}, drop=["decoder.block.0.layer.2"]), inputs=given)
        assert alone.form == "graph"
        drop = ["decoder.block.1", "decoder.block.1.layer.0"]
        keep = {n: units for n, units in keep.items() if not n.startswith("decoder.block.1.")}
    result = prune(model, plan=PrunePlan.from_keep(groups, keep, drop=drop), inputs=given)
    assert result.form == "per-layer"
    result.save_pretrained(tmp_path / "out")
    loaded = fxprune.load(tmp_path / "out")
    assert relative(result.graph_module(**given).logits, loaded(**given).logits) < 1e-5
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert list(written["auto_map"]) == [f"AutoModelFor{'Seq2SeqLM' if auto == 'drop' else auto}"]


def test_lists_inside_lists_are_renumbered_first() -> None:
    drop = {"a": [0], "a.1.b": [1], "a.2.b": [0]}
    names = ["a.0.b.0.w", "a.1.b.0.w", "a.1.b.1.w", "a.1.b.2.w", "a.2.b.0.w", "a.2.b.1.w", "a.3.b.1.w", "c.0.w"]
    assert [renamed(n, drop) for n in names] == [None, "a.0.b.0.w", None, "a.0.b.1.w", None, "a.1.b.0.w", "a.2.b.1.w", "c.0.w"]
    model = nn.ModuleDict(
        {"a": nn.ModuleList(nn.ModuleDict({"b": nn.ModuleList(nn.Linear(i + 1, j + 1) for j in range(3))}) for i in range(4))}
    )
    shapes = {n: p.shape for n, p in model.named_parameters()}
    apply_surgery(model, {"drop": drop})
    assert {n: p.shape for n, p in model.named_parameters()} == {renamed(n, drop): s for n, s in shapes.items() if renamed(n, drop)}


def test_a_module_with_fields_of_its_own_in_the_configuration() -> None:
    shared: Any = PhiConfig(num_attention_heads=6)
    module: Any = nn.Module()
    module.config = shared
    before = set_attribute(module, "config.num_attention_heads", 4)
    assert (module.config.num_attention_heads, shared.num_attention_heads) == (4, 6)
    shared.use_cache = False
    assert module.config.use_cache is False
    module.config.use_cache = True
    assert shared.use_cache is True
    twin = copy.deepcopy(module)
    assert (twin.config.num_attention_heads, twin.config.hidden_size) == (4, shared.hidden_size)
    set_attribute(module, "config.num_attention_heads", before)
    assert module.config.num_attention_heads == 6
    with pytest.raises(AttributeError, match="no_such_field"):
        _ = module.config.no_such_field


def test_two_surgeries_combined() -> None:
    first = {
        "drop": {"layers": [1]},
        "lengths": {"layers": 4},
        "renumber": {"layers": ["idx"]},
        "shapes": {"layers.0.w": [3], "layers.1.w": [2], "layers.2.w": [1], "head.w": [9]},
        "added": {"layers.0.bias": [3], "layers.1.bias": [2], "layers.2.bias": [1], "head.bias": [9]},
        "buffers": {},
        "attributes": {"layers.1": {"a": 1}, "head": {"a": 1, "b": 2}},
        "dense": {"n_layer": 4},
    }
    second = {
        "drop": {"layers": [0], "others": [2]},
        "lengths": {"layers": 3, "others": 5},
        "renumber": {"layers": ["idx"], "others": []},
        "shapes": {"layers.1.w": [7], "layers.1.bias": [7]},
        "added": {"others.0.bias": [4]},
        "buffers": {"b": [1]},
        "attributes": {"head": {"b": 3}},
    }
    assert combined(first, second) == {
        "drop": {"layers": [0, 1], "others": [2]},
        "lengths": {"layers": 4, "others": 5},
        "renumber": {"layers": ["idx"], "others": []},
        "shapes": {"layers.0.w": [2], "layers.1.w": [7], "head.w": [9]},
        "added": {"layers.0.bias": [2], "layers.1.bias": [7], "head.bias": [9], "others.0.bias": [4]},
        "buffers": {"b": [1]},
        "attributes": {"layers.0": {"a": 1}, "head": {"a": 1, "b": 3}},
        "dense": {"n_layer": 4},
    }


# --- what the eager class cannot express ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bloom", "mpt"])
def test_heads_with_position_slopes_exist_as_a_graph_only(name: str, tmp_path: Path) -> None:
    result = pruned(build(name), units={"kv_heads": 0.34})
    assert (result.form, result.model, result.report.eager_error) == ("graph", None, None)
    kind = type(result.dense_model).__name__
    assert f"the eager {kind} cannot express this plan: its own forward computes something from a pruned size" in result.report.note
    assert result.report.verify is not None
    assert result.report.verify.ok
    with pytest.raises(CheckpointError, match=r"there is no eager model to save: .*The rewritten graph_module is exact"):
        result.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- what goes into the directory ----------------------------------------------------------------------------------------------


def names_in(directory: Path) -> list[str]:
    names = []
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            names += list(opened.keys())
    return names


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_stored_once_and_stay_tied(widths: str, tied: bool, tmp_path: Path) -> None:
    result = pruned(build("llama", tied=tied), units={"hidden": 0.25 if widths == "uniform" else 0.34})
    assert result.form == widths
    result.save_pretrained(tmp_path / "out")
    loaded: Any = fxprune.load(tmp_path / "out")
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert ("lm_head.weight" in names_in(tmp_path / "out")) != tied
    assert loaded.lm_head.weight.shape == (VOCABULARY, 36 if widths == "uniform" else 32)


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_bfloat16_stays_bfloat16(widths: str, tmp_path: Path, stock: Stock) -> None:
    model = build("llama", tied=False).to(torch.bfloat16)
    result = pruned(model, ratio=0.25, widths=widths, ranking="global" if widths == "per-layer" else "local")
    assert result.form == widths
    assert result.report.verify_tolerance == 0.1
    assert result.report.bytes_after == 2 * result.report.parameters_after
    result.save_pretrained(tmp_path / "out")
    loaded = fxprune.load(tmp_path / "out")
    answer, made = stock(tmp_path / "out", inputs(), trust=True)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert answer["dtype"] == "torch.bfloat16"
    for name, logits in expected_of(result).items():
        if name != "prompt":
            assert relative(logits, made[name]) < 0.05
            assert relative(logits, loaded(input_ids=inputs()[name]).logits) < 0.05
    wide = fxprune.load(tmp_path / "out", dtype=torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_small_shards(widths: str, tmp_path: Path, stock: Stock) -> None:
    result = pruned(build("llama"), ratio=0.25, widths=widths, ranking="global" if widths == "per-layer" else "local")
    assert result.form == widths
    result.save_pretrained(tmp_path / "out", max_shard_size="30KB")
    shards = sorted(p.name for p in (tmp_path / "out").glob("*.safetensors"))
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(shards) > 2
    assert sorted(set(index["weight_map"].values())) == shards
    assert_same(expected_of(result), stock(tmp_path / "out", inputs(), trust=True)[1])


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<unk>", "<s>", "</s>", *(f"w{i}" for i in range(VOCABULARY - 3))]
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


@pytest.mark.parametrize("widths", ["uniform", "per-layer"])
def test_what_travels_along(widths: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    """Tokenizer, generation settings (even those that transformers would not save itself), plan and report; and no pickle."""
    model: Any = build("llama")
    model.generation_config = GenerationConfig(do_sample=False, temperature=0.5, eos_token_id=[2, 5], max_new_tokens=3)
    options: dict[str, Any] = {"widths": widths, "ranking": "global" if widths == "per-layer" else "local"}
    result = prune(model, 0.25, recipe={"criterion": "l1"}, tokenizer=tokenizer, **options)
    out = tmp_path / "out"
    result.save_pretrained(out)
    loaded: Any = fxprune.load(out)
    assert (loaded.generation_config.temperature, loaded.generation_config.eos_token_id) == (0.5, [2, 5])
    assert model.generation_config.temperature == 0.5
    assert cast(Any, result.model).generation_config.eos_token_id == [2, 5]
    source, read = load_source(out)
    assert read("w3 w90 nonsense")["input_ids"] == [6, 93, 0]
    assert type(source).__name__ == "LlamaForCausalLM"
    plan = PrunePlan.load(out / "fxprune_plan.json")
    assert plan.counts() == result.plan.counts()
    assert plan.recipe["criterion"] == "l1"
    report = json.loads((out / "fxprune_report.json").read_text())
    assert (report["form"], report["removed"]) == (widths, round(result.report.removed, 6))
    files = {p.name: p.read_bytes() for p in out.iterdir()}
    wanted = {"config.json", "generation_config.json", "model.safetensors", "fxprune_plan.json", "fxprune_report.json"}
    wanted |= {"tokenizer.json", "tokenizer_config.json", *(["modeling_fxprune.py"] if widths == "per-layer" else [])}
    assert set(files) == wanted
    for name, content in files.items():
        assert not content.startswith((b"\x80", b"PK\x03\x04")), f"{name} is a pickle"
    assert (out.stat().st_mode & 0o777) == 0o755


# --- plain modules -------------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return cast(Tensor, self.head(x + self.down(torch.relu(self.up(self.norm(x))))))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(cast(Tensor, norm.running_mean))
            nn.init.uniform_(cast(Tensor, norm.running_var), 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.first(x)))
        return cast(Tensor, self.head(torch.relu(self.norm2(self.second(x))).mean((2, 3))))


@pytest.mark.parametrize(
    ("kind", "shape", "units", "widths"),
    [
        (Residual, (4, 12), {"ffn": 0.5, "hidden": 0.25}, {"ffn": [40, 20], "hidden": [16, 12]}),
        (Pictures, (4, 3, 8, 8), {"channels": 0.5}, {"channels": [8, 4], "channels#2": [12, 6]}),
    ],
)
def test_a_plain_module_is_loaded_into_a_copy_of_the_dense_one(
    kind: type[nn.Module], shape: tuple[int, ...], units: dict[str, float], widths: dict[str, list[int]], tmp_path: Path
) -> None:
    dense = kind().eval()
    x, target = torch.randn(shape), torch.randn(shape[0], 5)
    batch = {"x": x, "target": target}
    before = {n: t.clone() for n, t in dense.state_dict().items()}

    def loss(output: Tensor, batch: Any) -> Tensor:
        return (output - batch["target"]).pow(2).mean()

    result = prune(dense, units=units, inputs={"x": x}, calibration=[batch], loss=loss, criterion="taylor1")
    assert result.form == "module"
    assert result.report.widths == widths
    result.save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "fxprune_plan.json",
        "fxprune_report.json",
        "fxprune_surgery.json",
        "model.safetensors",
    ]
    torch.manual_seed(5)
    other = kind().eval()  # its values do not matter
    loaded = fxprune.load(tmp_path / "out", model=other)
    fresh = torch.randn(7, *shape[1:])
    assert relative(result.graph_module(x=fresh), loaded(fresh)) < 1e-6
    assert relative(result.graph_module(x=fresh), cast(nn.Module, result.model)(fresh)) < 1e-6
    assert str(loaded) == str(result.model)  # in_features, normalized_shape and the like
    assert all(torch.equal(t, dense.state_dict()[n]) for n, t in before.items())
    assert [tuple(p.shape) for p in other.parameters()] == [tuple(p.shape) for p in dense.parameters()]


def test_plain_module_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    dense, x = Residual().eval(), torch.randn(4, 12)
    out = tmp_path / "out"
    prune(dense, units=0.5, kinds="ffn", inputs={"x": x}, recipe={"criterion": "l1"}).save_pretrained(out)
    with pytest.raises(UsageError, match=r"holds a pruned plain module: pass the dense one, fxprune\.load\(dir, model=dense\)"):
        fxprune.load(out)
    with pytest.raises(CheckpointError, match=f"cannot load '{out}' into this Pictures: .*up"):
        fxprune.load(out, model=Pictures())
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:200])
    with pytest.raises(CheckpointError, match=f"cannot load '{out}' into this Residual: .*header"):
        fxprune.load(out, model=dense)
    (out / "fxprune_surgery.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"cannot load '{out}' into this Residual: Expecting"):
        fxprune.load(out, model=dense)


# --- reading ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small() -> PruneResult:
    return pruned(build("llama"), ratio=0.25)


@pytest.fixture(scope="module")
def uneven() -> PruneResult:
    return pruned(build("llama"), ratio=0.25, ranking="global", widths="per-layer")


def flip_a_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-30] ^= 0xFF  # in the exponent of a weight: nothing but its value changes
    content[-29] ^= 0x7F
    file.write_bytes(content)


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("form", ["small", "uneven"])
def test_damaged_checkpoints_are_named(form: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    out = tmp_path / "out"
    request.getfixturevalue(form).save_pretrained(out)
    weights = (out / "model.safetensors").read_bytes()
    cut(out / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"cannot load the checkpoint '{out}': .*incomplete metadata"):
        fxprune.load(out)
    with pytest.raises(CheckpointError, match=r"cannot load .*incomplete metadata"):
        load_source(out)
    (out / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"cannot load the checkpoint '{out}': .*no file named model.safetensors"):
        fxprune.load(out)
    (out / "model.safetensors").write_bytes(weights)
    (out / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"cannot load the checkpoint '{out}': Expecting"):
        fxprune.load(out)


def test_nothing_to_load(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="there is no directory '/no/such/place'"):
        fxprune.load("/no/such/place")
    with pytest.raises(UsageError, match=f"'{tmp_path}' holds no checkpoint: there is no config.json"):
        fxprune.load(tmp_path)
    with pytest.raises(UsageError, match=f"'{tmp_path}' holds no config.json: it is not a Hugging Face checkpoint"):
        load_source(tmp_path)
    with pytest.raises(UsageError, match=r"there is no file '/no/such/model\.gguf'"):
        load_source("/no/such/model.gguf")
    with pytest.raises(UsageError, match=r"unknown dtype 'bfloat'; did you mean 'bfloat16'\? Choose from: auto, bfloat16"):
        load_source(tmp_path, dtype="bfloat")


def test_meta_source_has_no_weights(small: PruneResult, tmp_path: Path) -> None:
    small.save_pretrained(tmp_path / "out")
    model, tokenizer = load_source(tmp_path / "out", meta=True)
    assert tokenizer is None
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert sum(p.numel() for p in model.parameters()) == small.report.parameters_after


# --- nothing by halves -----------------------------------------------------------------------------------------------------------


def contents(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in sorted(directory.rglob("*")) if p.is_file()}


def test_what_may_not_be_written(small: PruneResult, tmp_path: Path) -> None:
    out, file = tmp_path / "out", tmp_path / "file"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    file.write_text("")
    with pytest.raises(UsageError, match=f"the output directory '{out}' exists and is not empty; choose another, or say overwrite"):
        small.save_pretrained(out)
    with pytest.raises(
        UsageError, match=f"the output directory '{out}' holds no checkpoint: it will not be replaced; choose another"
    ):
        small.save_pretrained(out, overwrite=True)
    with pytest.raises(UsageError, match=f"the output '{file}' is a file; name a directory"):
        small.save_pretrained(file, overwrite=True)
    with pytest.raises(UsageError, match=f"cannot write '{file}/out': '{file}' is a file"):
        small.save_pretrained(file / "out")
    with pytest.raises(UsageError, match="cannot write beside '/proc/fxprune/out': "):
        small.save_pretrained("/proc/fxprune/out")
    assert contents(tmp_path) == {"file": b"", "out/thesis.txt": b"years of work"}


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_parent_without_permission(small: PruneResult, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UsageError, match=f"cannot write '{tmp_path}/out': no permission to write in '{tmp_path}'"):
            small.save_pretrained(tmp_path / "out")
    finally:
        tmp_path.chmod(0o700)


def test_an_empty_directory_and_missing_parents_are_fine(
    small: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    for out in ("empty", "some/way/down"):
        small.save_pretrained(out)
        assert relative(fxprune.load(out)(tokens(2, 9)).logits, small.graph_module(input_ids=tokens(2, 9)).logits) < 1e-6


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def after_some_bytes(directory: Any, *_: Any, **__: Any) -> None:
    (Path(directory) / "config.json").write_text("{}")
    (Path(directory) / "model.safetensors").write_bytes(b"half")
    full()


def interrupted(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


FAILURES: dict[str, tuple[str, Any, str]] = {
    "weights": ("model", after_some_bytes, "could not write '{out}': No space left on device; nothing was left behind"),
    "plan": ("plan", full, "could not write '{out}': No space left on device; nothing was left behind"),
    "bytes": ("flip", flip_a_byte, "the checkpoint read back from disk differs from the pruned model (relative error"),
    "cut": (
        "flip",
        cut,
        "differs from the pruned model (it cannot be loaded: SafetensorError: Error while deserializing header: incomplete",
    ),
    "rename": ("rename", full, "could not write '{out}': No space left on device; nothing was left behind"),
    "interrupt": ("model", interrupted, ""),
}


@pytest.mark.parametrize("before", ["nothing", "old"])
@pytest.mark.parametrize("failure", FAILURES)
@pytest.mark.parametrize("form", ["small", "uneven"])
def test_a_failure_leaves_everything_as_it_was(
    form: str, failure: str, before: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    result: PruneResult = request.getfixturevalue(form)
    out = tmp_path / "made" / "out"
    if before == "old":
        out.mkdir(parents=True)
        (out / "config.json").write_text('{"old": true}')
        (out / "model.safetensors").write_bytes(b"old weights")
    was = contents(tmp_path)
    where, how, said = FAILURES[failure]
    with monkeypatch.context() as patch:
        if where == "model":
            patch.setattr(result.model, "save_pretrained", how)
        elif where == "plan":
            patch.setattr(PrunePlan, "save", how)
        elif where == "rename":
            rename = Path.rename
            patch.setattr(Path, "rename", lambda self, to: how() if self.name.endswith(".part") else rename(self, to))
        else:
            write = save._write_pretrained

            def damaged(result: PruneResult, work: Path, size: str) -> None:
                write(result, work, size)
                how(work / "model.safetensors")

            patch.setattr(save, "_write_pretrained", damaged)
        expected = KeyboardInterrupt if how is interrupted else CheckpointError
        with pytest.raises(expected) as caught:
            result.save_pretrained(out, overwrite=True)
    assert said.format(out=out) in str(caught.value)
    assert contents(tmp_path) == was
    assert sorted(p.name for p in tmp_path.rglob("*")) == sorted(["made", "out", *was_names(was)] if before == "old" else [])
    result.save_pretrained(out, overwrite=True)  # and the result can still be saved
    assert relative(fxprune.load(out)(tokens(2, 9)).logits, result.graph_module(input_ids=tokens(2, 9)).logits) < 1e-6
    assert os.listdir(out.parent) == ["out"]


def was_names(was: dict[str, bytes]) -> list[str]:
    return [Path(name).name for name in was]


def test_an_error_of_another_kind_is_not_dressed_up(small: PruneResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(PrunePlan, "save", broken)
    with pytest.raises(ZeroDivisionError, match="a bug"):
        small.save_pretrained(tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@contextlib.contextmanager
def disk(place: Path, size: str) -> Iterator[Path]:
    """A file system of that size."""
    place.mkdir()
    mount = shutil.which("mount")
    if (
        mount is None
        or subprocess.run([mount, "-t", "tmpfs", "-o", f"size={size}", "tmpfs", place], capture_output=True).returncode
    ):
        pytest.skip("mounting a small file system is not permitted here")
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("size", ["16k", "64k", "112k", "120k"])
@pytest.mark.parametrize("form", ["small", "uneven"])
def test_a_disk_that_is_really_full(form: str, size: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    result: PruneResult = request.getfixturevalue(form)
    with disk(tmp_path / "disk", size) as place:
        with pytest.raises(CheckpointError, match=f"could not write '{place}/out': .*No space left on device.*; nothing was left"):
            result.save_pretrained(place / "out")
        assert list(place.iterdir()) == []


# --- the solver ------------------------------------------------------------------------------------------------------------------


def test_few_models_are_built_to_solve_a_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    original = solver._mismatches

    def counted(*arguments: Any) -> tuple[int, str]:
        built.append(arguments[2])
        return original(*arguments)

    monkeypatch.setattr(solver, "_mismatches", counted)
    result = pruned(build("llama"), units={"kv_heads": 0.5, "ffn": 0.3})
    assert result.form == "uniform"
    assert len(built) <= 6
    built.clear()
    result = pruned(build("llama"), ratio=0.25, ranking="global", widths="per-layer")
    assert result.form == "per-layer"
    assert built == []  # no stock configuration has several widths: none is tried


def test_the_dense_configuration_is_not_changed() -> None:
    model: Any = build("gemma3", num_hidden_layers=3, layer_types=["full_attention", *["sliding_attention"] * 2])
    before = json.dumps(model.config.to_dict(), default=str)
    names = [n for n, _ in model.named_parameters()]
    groups = fxprune.find_groups(fxprune.trace(model, {"input_ids": tokens(2, 16)}))
    for keep in ({}, {"model.layers.2.mlp.ffn": list(range(9))}):
        prune(model, plan=PrunePlan.from_keep(groups, keep, drop=["model.layers.1"]))
        assert json.dumps(model.config.to_dict(), default=str) == before
        assert [n for n, _ in model.named_parameters()] == names
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == [0, 1, 2]
