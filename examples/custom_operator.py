"""An operator of your own: what fxprune does without a rule, and with one of a few lines.

Run it:  python examples/custom_operator.py

A gated feed-forward block whose gate is one fused operator: its input is two halves, the gate and the values, and one number comes
out for each pair. Without a rule the operator pins what it touches: nothing wrong, but nothing to prune either. The rule says
that the halves go together, and then both halves of `up` lose the same channels. See docs/rules.md for all that a rule can say.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import fxprune


@torch.library.custom_op("example::gated", mutates_args=())
def gated(x: Tensor, width: int) -> Tensor:
    """``silu(gate) * value``, where the last dimension of ``x`` is gate and value, ``width`` each."""
    gate, value = x.split(width, dim=-1)
    return nn.functional.silu(gate) * value


@gated.register_fake
def _(x: Tensor, width: int) -> Tensor:
    return x.new_empty(*x.shape[:-1], width)


class Block(nn.Module):
    """A feed-forward block with a fused gate."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.width, self.up, self.down = width, nn.Linear(16, 2 * width), nn.Linear(width, 16)

    def forward(self, x: Tensor) -> Tensor:
        """Shape ``[.., 16]`` in and out."""
        return self.down(torch.ops.example.gated(self.up(x), self.width))  # type: ignore[no-any-return]


def show(groups: fxprune.Groups) -> None:
    """The groups that reach into both maps, or what keeps them."""
    for group in groups.values():
        state = "prunable" if group.prunable else f"pinned: {group.reason}"
        print(f"   {group.size:3} units of {', '.join(f'{m.name}[{m.dim}]' for m in group.members)}: {state}")


def main() -> None:
    """Look, teach, prune, compare."""
    torch.manual_seed(0)
    model, x = Block().eval(), torch.randn(8, 16)

    print("Without a rule:")
    show(fxprune.find_groups(fxprune.trace(model, x)))

    @fxprune.rule(torch.ops.example.gated.default)
    def gated_rule(call: Any) -> list[Any]:
        halves = call.split_concat(call["x"][-1], [call.shape[-1]] * 2)  # the last dimension is two pieces, one after the other
        return [*call["x"][:-1], call.unify(*halves)]  # which go together, and with what comes out

    @gated_rule.resize
    def _(call: Any) -> dict[str, Any]:
        return {"width": call.kept(call.outputs[0][-1])}  # the argument that is a size follows the output's

    print("With one:")
    gm = fxprune.trace(model, x)
    groups = fxprune.find_groups(gm)
    show(groups)

    scores = fxprune.score(gm, groups, "l2")
    plan = fxprune.select(groups, scores, units=0.5, kinds=[group.kind for group in groups.values() if group.prunable])
    small = fxprune.rewrite(gm, plan)
    print(f"Half of them removed: up.weight is {tuple(small.get_parameter('up.weight').shape)},")
    (call,) = (node for node in small.graph.nodes if node.target is torch.ops.example.gated.default)
    print(f"and the operator is called with width {call.args[1]}")
    report = fxprune.verify(gm, small, plan, torch.randn(5, 16))
    print(f"Against the masked dense module: {report.max_rel_error:.1e}")
    assert report.ok


if __name__ == "__main__":
    main()
