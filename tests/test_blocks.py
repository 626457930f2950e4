"""Which modules are residual blocks, whatever they look like, and that dropping one is exact."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import PrunePlan
from fxprune.api import PruneResult
from fxprune.errors import UsageError

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))

Sum = Callable[[Tensor, Tensor], Tensor]


class Block(nn.Module):
    """An input and what is made of it, put together by a function."""

    def __init__(self, put: Sum) -> None:
        super().__init__()
        self.up, self.down, self.put = nn.Linear(8, 16), nn.Linear(16, 8), put

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 8]`` to ``[..., 8]``."""
        return self.put(x, self.down(torch.relu(self.up(x))))


class Stack(nn.Module):
    """Blocks, one after the other."""

    def __init__(self, *blocks: nn.Module, sequential: bool = False) -> None:
        super().__init__()
        self.layers: nn.Module = nn.Sequential(*blocks) if sequential else nn.ModuleList(blocks)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., 8]`` to ``[..., 4]``."""
        if isinstance(self.layers, nn.Sequential):
            x = self.layers(x)
        else:
            for layer in self.layers._modules.values():
                assert layer is not None
                x = layer(x)
        out: Tensor = self.head(x)
        return out


def plain(x: Tensor, f: Tensor) -> Tensor:
    return x + f


def stack(put: Sum) -> Stack:
    torch.manual_seed(0)
    return Stack(*(Block(put) for _ in range(3))).eval()


def shortened(model: nn.Module) -> PruneResult:
    return fxprune.prune(
        model.eval(), inputs=X, units={"layers": 0.34}, kinds=["layers"], recipe="magnitude", layers_by="first", check=True
    )


@pytest.mark.parametrize(
    "put",
    [
        lambda x, f: torch.add(f, x, alpha=0.95),
        lambda x, f: x + f + 0.05,
        lambda x, f: x + (x + f),
        lambda x, f: (x + f) + (x + f),
        lambda x, f: 0.95 * x + f,
        lambda x, f: x - f,
    ],
    ids=["a factor", "a number", "twice", "doubled", "scaled", "a difference"],
)
def test_what_is_more_than_its_input_and_something_is_no_block(put: Sum) -> None:
    model = stack(put)
    assert dict(fxprune.find_groups(fxprune.trace(model, X)).blocks) == {}
    with pytest.raises(UsageError, match="no residual block that can be dropped whole"):
        shortened(model)


@pytest.mark.parametrize(
    "put", [plain, lambda x, f: torch.add(x, f, alpha=0.5), lambda x, f: (f + 0.05) + x, lambda x, f: x + f + f]
)
def test_a_block_is_dropped_exactly(put: Sum) -> None:
    model = stack(put)
    gm = fxprune.trace(model, X)
    groups = fxprune.find_groups(gm)
    assert list(groups.blocks) == ["layers.0", "layers.1", "layers.2"]
    plan = PrunePlan.from_keep(groups, {}, drop=["layers.1"])
    expected = Stack(model.layers.get_submodule("0"), model.layers.get_submodule("2"))
    expected.head = model.head
    torch.testing.assert_close(fxprune.rewrite(gm, plan)(X), expected(X))
    assert fxprune.verify(gm, fxprune.rewrite(gm, plan), plan, X).max_rel_error == 0


def test_blocks_that_share_weights() -> None:
    """Zero weights are not zero blocks: what other blocks need stays, and the reference leaves out what the block adds."""
    shared = Block(plain)
    tied = [Block(plain) for _ in range(4)]
    for block in tied[1:]:
        block.up.weight, block.down.weight = tied[0].up.weight, tied[0].down.weight
    for model in (Stack(Block(plain), shared, shared, Block(plain)), Stack(*tied)):
        for path in ("layers.1", "layers.3"):
            gm = fxprune.trace(model.eval(), X)
            plan = PrunePlan.from_keep(fxprune.find_groups(gm), {}, drop=[path])
            assert fxprune.verify(gm, fxprune.rewrite(gm, plan), plan, X).max_rel_error == 0
        result = shortened(model)
        assert result.form == "module"
        assert result.model is not None
        torch.testing.assert_close(result.model(X), result.graph_module(X))


def test_a_block_that_is_not_zero_where_its_weights_are() -> None:
    class Highway(Block):
        def forward(self, x: Tensor) -> Tensor:
            gate = torch.sigmoid(self.down(torch.relu(self.up(x))))
            return x + gate * (torch.tanh(x) - x)

    result = shortened(Stack(*(Highway(plain) for _ in range(3))))
    assert result.report.verify is not None
    assert result.report.verify.max_rel_error == 0


def test_blocks_of_a_sequence() -> None:
    result = shortened(Stack(*(Block(plain) for _ in range(3)), sequential=True))
    assert result.form == "module"
    assert result.model is not None
    assert type(result.model.get_submodule("layers")) is nn.Sequential
    assert len(result.model.get_submodule("layers")._modules) == 2
    torch.testing.assert_close(result.model(X), result.graph_module(X))
