"""Pruned models under torch.compile: a plan tried on the dense module in one line, and the rewritten module compiled whole.

Run it:  python examples/with_torch_compile.py

1. ``torch.compile(model, backend=fxprune.Backend(plan))`` computes what the pruned model would, and leaves the dense module as it
   is: a plan can be tried and thrown away. ``backend="fxprune", options={"plan": plan}`` is the same by name.
2. ``torch.compile(result.graph_module, fullgraph=True)`` compiles what `fxprune.prune` made, without a graph break and at any
   batch and sequence size.

The last stage here is "aot_eager", so that the example needs no C++ compiler and ends in seconds; leave ``inner`` (or
``backend``) out for inductor. No network, no data.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fxprune


def main() -> None:
    """Compile both ways, and compare with the rewritten module."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=6,
        num_key_value_heads=2,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).eval()
    result = fxprune.prune(model, ratio=0.2, recipe="magnitude")
    small = result.graph_module
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    print(f"the plan removes {result.report.removed:.1%} of {result.report.parameters_before:,} parameters")

    backend = fxprune.Backend(result.plan, inner="aot_eager")
    tried = torch.compile(model, backend=backend, dynamic=True)
    compiled = torch.compile(small, fullgraph=True, dynamic=True, backend="aot_eager")
    with torch.no_grad():
        for shape in ((2, 16), (3, 40)):
            ids = torch.randint(0, 128, shape)
            wanted = small(input_ids=ids).logits
            errors = [float((m(input_ids=ids).logits - wanted).abs().max() / wanted.abs().max()) for m in (tried, compiled)]
            print(f"{shape[0]} x {shape[1]:2} tokens: backend on the dense module {errors[0]:.0e}, compiled module {errors[1]:.0e}")
            assert max(errors) < 1e-5

    print(f"what the backend compiled: {backend.graphs[-1]}")
    same = all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    print(
        f"the dense module {'is as it was' if same else 'has changed'}: {sum(p.numel() for p in model.parameters()):,} parameters"
    )
    assert same


if __name__ == "__main__":
    main()
