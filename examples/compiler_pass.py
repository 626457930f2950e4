"""fxprune as compiler passes: in torch's PassManager, and in fxprune.Pipeline, which says what each pass did.

Run it:  python examples/compiler_pass.py

A tiny random Llama is traced once and pruned three ways: by fxprune's passes between passes of torch in torch's `PassManager`;
by the same list in `fxprune.Pipeline`, which prints seconds, nodes and parameters for each; and by the passes that
`fxprune.prune` would run for a recipe. No network, no data.
"""

from __future__ import annotations

import torch
from torch.fx import GraphModule
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.fx.passes.infra.pass_manager import PassManager, pass_result_wrapper
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune
from fxprune.passes import DependencyPass, ImportancePass, RewritePass, SelectionPass, VerifyPass


def tag_linear_maps(gm: GraphModule) -> None:
    """Anyone's pass: mark the linear maps for a quantiser. What stands in ``node.meta["custom"]`` lasts through pruning."""
    for node in gm.graph.nodes:
        if node.target is torch.ops.aten.linear.default:
            node.meta["custom"] = {"quantise": "int8"}


def remove_dead_code(gm: GraphModule) -> None:
    """Another one, in place."""
    gm.graph.eliminate_dead_code()
    gm.recompile()


def main() -> None:
    """Prune three ways, and compare."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6, num_key_value_heads=2
    )
    model = LlamaForCausalLM(config).eval()
    inputs = {"input_ids": torch.randint(0, 128, (2, 16))}

    ours = [
        DependencyPass(),
        ImportancePass("taylor1", [inputs]),
        SelectionPass(ratio=0.2),
        RewritePass(),
        VerifyPass(inputs=inputs),
    ]

    print("1. torch's PassManager")
    manager = PassManager([pass_result_wrapper(tag_linear_maps), *ours, pass_result_wrapper(remove_dead_code)])
    gm = fxprune.trace(model, inputs)
    small = manager(gm).graph_module
    tagged = [node.target for node in small.graph.nodes if node.meta.get("custom", {}).get("quantise")]
    print(f"   {small.meta['fxprune.plan'].recipe['removed']:.1%} of the parameters removed, and {len(tagged)} maps still tagged,")
    print(f"   such as {tagged[0]}; against the masked dense graph: {small.meta['fxprune.verify'].max_rel_error:.1e}\n")

    print("2. fxprune.Pipeline: functions as they are, and a table")
    result = fxprune.Pipeline([CSEPass(), tag_linear_maps, *ours, remove_dead_code])(fxprune.trace(model, inputs))
    print(result)
    assert not result.graph_module.meta["fxprune.plan"].diff(small.meta["fxprune.plan"]), "other passes change no plan"

    print("3. A recipe as a pipeline: the plan of fxprune.prune, pass by pass")
    settings = {"recipe": "wanda-sp", "samples": 8, "length": 32, "units": {"ffn": 0.25}}
    pipeline = fxprune.Pipeline.from_recipe(**settings, model=model)
    result = pipeline(fxprune.trace(model, inputs))
    print(result)
    assert not result.graph_module.meta["fxprune.plan"].diff(fxprune.prune(model, **settings).plan)

    print("A pass that lacks something names the pass that must run first:")
    try:
        fxprune.Pipeline([DependencyPass(), SelectionPass(ratio=0.2)])(fxprune.trace(model, inputs))
    except fxprune.errors.UsageError as error:
        print(f"   {error}")


if __name__ == "__main__":
    main()
