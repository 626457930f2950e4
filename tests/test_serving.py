"""What a checkpoint meets in use, in a process that cannot import fxprune: pipeline, Trainer, PEFT, int8; what engines look for."""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file

from fxprune.api import PruneResult, prune
from fxprune.checkpoint.load import load

from .closeness import relative
from .engine import engine
from .processes import LAUNCH, environment
from .zoo import build, tokenizer, tokens

UNITS = {"kv_heads": 0.5, "ffn": 0.3}
ROUNDING = 0.1
"""Of weights and activations to eight bits, in networks of random weights; a wrong scale or layout gives about 1."""
PROMPT, NEW = "w3 w14 w15 w9 w26", 8


def uniform(name: str, **options: Any) -> PruneResult:
    dtype = options.pop("dtype", torch.float32)
    model = build(name, **options).to(dtype)
    return prune(model, units=UNITS, recipe={"criterion": "l1"}, tokenizer=tokenizer())


def sixteen_heads(**options: Any) -> PruneResult:
    """Sixteen heads on four key-value heads, to begin with."""
    model = build("llama", tied=False, num_attention_heads=16, num_key_value_heads=4, hidden_size=96)
    return prune(model, **{"recipe": {"criterion": "l1"}, "tokenizer": tokenizer(), **options})


def per_layer() -> PruneResult:
    options: dict[str, Any] = {"ranking": "global", "widths": "per-layer", "protect": ["model.layers.1*"]}
    return prune(build("llama"), 0.1, recipe={"criterion": "l1"}, tokenizer=tokenizer(), **options)


MADE: dict[str, Callable[[], PruneResult]] = {
    "llama": lambda: uniform("llama"),
    "phi3": lambda: uniform("phi3"),
    "qwen3": lambda: uniform("qwen3", tied=False),
    "gemma2": lambda: uniform("gemma2"),
    "llama-bfloat16": lambda: uniform("llama", tied=False, dtype=torch.bfloat16),
    "llama-for-two": lambda: sixteen_heads(units={"kv_heads": 0.4, "ffn": 0.3}, multiple={"kv_heads": 2, "ffn": 16}),
    "per-layer": per_layer,
}
STOCK = ("llama", "phi3", "qwen3", "gemma2", "llama-bfloat16")
SERVED = ("llama", "phi3", "per-layer")

Made = Callable[[str], tuple[PruneResult, Path]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A pruned model and its checkpoint, made when first asked for."""
    place = tmp_path_factory.mktemp("serving")

    @functools.cache
    def make(name: str) -> tuple[PruneResult, Path]:
        result = MADE[name]()
        assert result.form == ("per-layer" if name == "per-layer" else "uniform"), result.report.note
        result.save_pretrained(place / name)
        return result, place / name

    return make


_SERVE = """
import json, sys
sys.modules["fxprune"] = None  # an import of it fails, wherever it may be installed
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments, pipeline
from transformers.utils import logging
logging.set_verbosity_error()
logging.disable_progress_bar()
torch.set_num_threads(1)
asked = json.loads(sys.stdin.read())

def train(model, out):
    rows = [{"input_ids": ids, "labels": ids} for ids in asked["rows"]]
    options = dict(per_device_train_batch_size=2, max_steps=2, learning_rate=1e-2, save_strategy="no", report_to=[], use_cpu=True)
    trainer = Trainer(model=model, args=TrainingArguments(out, disable_tqdm=True, logging_steps=1, **options), train_dataset=rows)
    before = {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    moved = [n for n, p in model.named_parameters() if p.requires_grad and not torch.equal(p, before[n])]
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    return trainer, {"trained": len(before), "moved": len(moved), "losses": losses}

def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(asked["rows"])).logits

answers = {}
for name, directory in asked["directories"].items():
    load = lambda: AutoModelForCausalLM.from_pretrained(directory, trust_remote_code=name == "per-layer").eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    tokenizer.pad_token = tokenizer.eos_token
    answer = answers[name] = {"class": type(load()).__module__}

    model = load()
    model.generation_config.eos_token_id = None
    generate = pipeline("text-generation", model=model, tokenizer=tokenizer)
    options = dict(max_new_tokens=asked["new"], do_sample=False, return_full_text=False)
    answer["pipeline"] = generate(asked["prompt"], **options)[0]["generated_text"]
    padded = tokenizer([asked["prompt"], "w5 w6"], padding=True, padding_side="left", return_tensors="pt")
    padded.pop("token_type_ids", None)
    ids = model.generate(**padded, max_new_tokens=asked["new"], do_sample=False, pad_token_id=tokenizer.pad_token_id)
    answer["batch"] = [tokenizer.decode(row, skip_special_tokens=True) for row in ids]

    dense = logits(load())
    quantised = torch.ao.quantization.quantize_dynamic(load(), {torch.nn.Linear}, dtype=torch.qint8)
    int8 = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    answer["int8"] = len(int8)
    answer["int8 error"] = float((logits(quantised) - dense).norm() / dense.norm())

    trainer, answer["trainer"] = train(load(), directory + "-trained")
    trainer.save_model(directory + "-trained/last")
    again = AutoModelForCausalLM.from_pretrained(directory + "-trained/last", trust_remote_code=name == "per-layer")
    answer["trained again"] = float((logits(again) - logits(trainer.model)).abs().max())

    lora = get_peft_model(load(), LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    _, answer["peft"] = train(lora, directory + "-lora")
    merged = lora.eval().merge_and_unload()
    answer["merged"] = float((logits(merged) - dense).abs().max())
print(json.dumps(answers))
"""


@pytest.fixture(scope="module")
def answers(made: Made, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a process without fxprune says of the checkpoints."""
    place = tmp_path_factory.mktemp("elsewhere")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH" and not k.startswith("COV_")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(place / "modules"), "PYTHONWARNINGS": "ignore"}
    directories = {name: str(made(name)[1]) for name in SERVED}
    asked = {"directories": directories, "rows": tokens(4, 12).tolist(), "prompt": PROMPT, "new": NEW}
    command = [sys.executable, "-c", _SERVE]
    ran = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, cwd=place, env=environment, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found: dict[str, Any] = json.loads(ran.stdout.splitlines()[-1])
    return found


def greedy(result: PruneResult, text: str) -> str:
    """The rewritten graph's continuation, stepped without a cache."""
    words = tokenizer()
    ids = words(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, result.graph_module(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
    return str(words.decode(ids[0], skip_special_tokens=True))


@pytest.mark.parametrize("name", SERVED)
def test_pipeline_and_padded_batches_generate_what_the_graph_does(name: str, made: Made, answers: dict[str, Any]) -> None:
    result, _ = made(name)
    module = answers[name]["class"]
    assert module.startswith("transformers_modules." if name == "per-layer" else "transformers.models.")
    assert answers[name]["pipeline"].split() == greedy(result, PROMPT).split()[len(PROMPT.split()) :]
    assert answers[name]["batch"] == [greedy(result, PROMPT), greedy(result, "w5 w6")]


@pytest.mark.parametrize("name", SERVED)
def test_trainer_and_peft_train_every_weight(name: str, made: Made, answers: dict[str, Any]) -> None:
    result, _ = made(name)
    assert result.model is not None
    trained, lora = answers[name]["trainer"], answers[name]["peft"]
    assert trained["trained"] == trained["moved"] == len(list(result.model.parameters()))
    assert len(trained["losses"]) == len(lora["losses"]) == 2
    assert trained["losses"][1] < trained["losses"][0]
    assert answers[name]["trained again"] < 1e-5
    linear = sum(isinstance(m, torch.nn.Linear) for n, m in result.model.named_modules() if n != "lm_head")
    assert lora["trained"] == 2 * linear
    assert lora["moved"] >= linear  # B starts at zero and moves first
    assert answers[name]["merged"] > 0


@pytest.mark.parametrize("name", SERVED)
def test_int8_after_pruning(name: str, made: Made, answers: dict[str, Any]) -> None:
    result, _ = made(name)
    assert result.model is not None
    assert answers[name]["int8"] == sum(isinstance(m, torch.nn.Linear) for m in result.model.modules())
    assert 0 < answers[name]["int8 error"] < ROUNDING


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")
def test_int8_of_the_graph_module(made: Made) -> None:
    """Its linear maps are modules, which is what quantisers look for."""
    small = made("llama")[0].graph_module
    quantised = torch.ao.quantization.quantize_dynamic(small, {torch.nn.Linear}, dtype=torch.qint8)
    int8 = [m for m in quantised.modules() if isinstance(m, torch.ao.nn.quantized.dynamic.Linear)]
    assert len(int8) == sum(isinstance(m, torch.nn.Linear) for m in small.modules())
    with torch.no_grad():
        expected, got = small(input_ids=tokens(3, 9)).logits, quantised(input_ids=tokens(3, 9)).logits
    assert 0 < float((got - expected).norm() / expected.norm()) < ROUNDING


@pytest.mark.parametrize("name", SERVED)
def test_torchao_after_pruning(name: str, made: Made) -> None:
    torchao = pytest.importorskip("torchao", reason="torchao is not installed").quantization
    result, directory = made(name)
    quantised: Any = load(directory)
    linear = [m for m in quantised.modules() if isinstance(m, torch.nn.Linear)]
    dense = {type(m.weight) for m in linear}
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig())
    assert dense == {torch.nn.Parameter}
    assert not {type(m.weight) for m in linear} & dense
    with torch.no_grad():
        expected, got = (m(input_ids=tokens(3, 9)).logits for m in (result.graph_module, quantised))
    assert 0 < float((got - expected).norm() / expected.norm()) < ROUNDING


def test_torchao_takes_whole_groups_of_weights(made: Made) -> None:
    torchao = pytest.importorskip("torchao", reason="torchao is not installed").quantization
    groups = torchao.IntxWeightOnlyConfig(granularity=torchao.PerGroup(16))
    torchao.quantize_(load(made("llama-for-two")[1]), groups)
    with pytest.raises(AssertionError, match="to be divisible by"):
        torchao.quantize_(load(made("llama")[1]), groups)


# ---------------------------------------------------------------------------------------------------------------------
# vLLM builds its own modules from config.json and fills them by the names of stock tensors: queries, keys and values into one
# matrix, gate and up projections into another. What it counts on is that a checkpoint is what stock code would have written.


def tensors(directory: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype of every tensor, by name."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:
            slices = {name: opened.get_slice(name) for name in list(opened.keys())}
            found |= {n: (tuple(part.get_shape()), part.get_dtype()) for n, part in slices.items()}
    return found


@pytest.mark.parametrize("name", STOCK)
def test_a_checkpoint_is_what_stock_code_writes_for_its_configuration(name: str, made: Made, tmp_path: Path) -> None:
    result, directory = made(name)
    config: Any = transformers.AutoConfig.from_pretrained(directory)
    fresh: Any = transformers.AutoModelForCausalLM.from_config(config)
    fresh.to(config.dtype).save_pretrained(tmp_path)
    assert tensors(directory) == tensors(tmp_path)
    written, plain = (json.loads((d / "config.json").read_text()) for d in (directory, tmp_path))
    assert written["architectures"] == plain["architectures"] == [type(result.dense_model).__name__]
    assert {k: v for k, v in written.items() if k != "transformers_version"} == {
        k: v for k, v in plain.items() if k != "transformers_version"
    }
    dense = result.dense_config.to_dict()
    changed = {
        k for k in written if k in dense and written[k] != dense[k] and k not in ("architectures", "dtype", "transformers_version")
    }
    assert changed <= {"num_key_value_heads", "num_attention_heads", "intermediate_size", "head_dim"}
    for file in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        assert (directory / file).is_file(), file
    assert transformers.AutoTokenizer.from_pretrained(directory)(PROMPT)["input_ids"] == tokenizer()(PROMPT)["input_ids"]


@pytest.mark.parametrize("name", STOCK)
def test_projections_can_be_fused(name: str, made: Made) -> None:
    _, directory = made(name)
    config: Any = transformers.AutoConfig.from_pretrained(directory)
    weights = load_file(directory / "model.safetensors")
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    assert heads % groups == 0
    assert (heads, groups) == (3, 1)
    width, inner = config.head_dim, config.intermediate_size
    for layer in range(config.num_hidden_layers):
        path = f"model.layers.{layer}"
        own = {n.removeprefix(f"{path}."): tuple(t.shape) for n, t in weights.items() if n.startswith(f"{path}.")}
        if name == "phi3":
            assert own["self_attn.qkv_proj.weight"] == ((heads + 2 * groups) * width, config.hidden_size)
            assert own["mlp.gate_up_proj.weight"] == (2 * inner, config.hidden_size)
            continue
        for projection, count in (("q", heads), ("k", groups), ("v", groups)):
            assert own[f"self_attn.{projection}_proj.weight"] == (count * width, config.hidden_size)
        assert own["mlp.gate_proj.weight"] == own["mlp.up_proj.weight"] == (inner, config.hidden_size)
        assert own["mlp.down_proj.weight"] == (config.hidden_size, inner)
    assert ("lm_head.weight" in weights) is not config.tie_word_embeddings
    assert {t.dtype for t in weights.values()} == {config.dtype}
    assert config.dtype == (torch.bfloat16 if "bfloat16" in name else torch.float32)


def test_a_bfloat16_checkpoint_computes_what_its_graph_does(made: Made) -> None:
    result, directory = made("llama-bfloat16")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(directory).eval()
    with torch.no_grad():
        assert relative(result.graph_module(input_ids=tokens(2, 9)).logits, loaded(input_ids=tokens(2, 9)).logits) < 2e-2


# ---------------------------------------------------------------------------------------------------------------------
# Several processes share the matrices: heads, key-value heads and FFN channels must divide.


@pytest.mark.parametrize(
    ("name", "ranks"), [("llama", 1), ("phi3", 1), ("llama-for-two", 1), ("llama-for-two", 2), ("llama-for-two", 4)]
)
def test_fused_and_split_matrices_compute_the_same(name: str, ranks: int, made: Made) -> None:
    """With four ranks each of two key-value heads is on two."""
    result, directory = made(name)
    with torch.no_grad():
        assert relative(result.graph_module(input_ids=tokens(3, 9)).logits, engine(directory, tokens(3, 9), ranks)) < 1e-5


def sizes(result: PruneResult) -> tuple[int, ...]:
    assert result.model is not None
    config: Any = result.model.config
    return config.num_attention_heads, config.num_key_value_heads, config.intermediate_size


def test_a_multiple_for_each_kind_makes_a_model_that_can_be_split(tmp_path: Path, made: Made) -> None:
    assert sizes(made("llama-for-two")[0]) == (8, 2, 48)
    (tmp_path / "two.yaml").write_text("criterion: l1\nkinds: [kv_heads, ffn]\nmultiple: {kv_heads: 2, ffn: 16}\n")
    assert sizes(sixteen_heads(ratio=0.3, recipe=tmp_path / "two.yaml")) == (8, 2, 48)


@pytest.mark.parametrize(
    ("multiple", "found", "missing"),
    [
        (1, (12, 3, 45), "num_key_value_heads is 3"),
        (16, (12, 3, 48), "num_key_value_heads is 3"),
        ({"kv_heads": 4}, (16, 4, 45), "intermediate_size is 45"),
    ],
)
def test_one_number_leaves_heads_as_they_come(multiple: Any, found: tuple[int, ...], missing: str, tmp_path: Path) -> None:
    result = sixteen_heads(units={"kv_heads": 0.25, "ffn": 0.3}, multiple=multiple)
    assert sizes(result) == found
    result.save_pretrained(tmp_path / "odd")
    with pytest.raises(ValueError, match=f"{missing}, which cannot be split over 2"):
        engine(tmp_path / "odd", tokens(3, 9), 2)


_TOGETHER = """
import json, sys
sys.modules["fxprune"] = None
import torch
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], distributed_config=DistributedConfig(tp_plan="auto", tp_size=2)).eval()
with torch.no_grad():
    logits = model(input_ids=torch.tensor(json.loads(sys.argv[2]))).logits
local = [list(part.weight.to_local().shape) for part in (model.model.layers[0].self_attn.k_proj, model.model.layers[0].mlp.up_proj)]
if torch.distributed.get_rank() == 0:
    print(json.dumps({"local": local, "logits": logits.tolist()}))
torch.distributed.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
def test_transformers_splits_a_checkpoint_over_two_processes(made: Made, tmp_path: Path) -> None:
    result, directory = made("llama-for-two")
    (tmp_path / "together.py").write_text(_TOGETHER)
    command = [sys.executable, *LAUNCH, str(tmp_path / "together.py"), str(directory), json.dumps(tokens(3, 9).tolist())]
    ran = subprocess.run(command, env=environment(CUDA_VISIBLE_DEVICES=""), capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["local"] == [[8, 96], [24, 96]]
    with torch.no_grad():
        assert relative(result.graph_module(input_ids=tokens(3, 9)).logits, torch.tensor(found["logits"])) < 1e-5
