"""A pruned graph refuses inputs of sizes that its trace does not hold for."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxprune
from fxprune.errors import CaptureError, UsageError

from .zoo import build, tokens


class Network(nn.Module):
    """Token ids to logits by way of one FFN; what comes of the FFN's input is for subclasses to say."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(97, 16), nn.Linear(16, 32), nn.Linear(32, 50)

    def ffn(self, x: Tensor) -> Tensor:
        """``[..., 16]`` to ``[..., 50]``."""
        out: Tensor = self.down(torch.relu(self.up(x)))
        return out


class Branching(Network):
    """Treats texts of more than six tokens in another way."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ids."""
        return self.ffn(self.embed(x) * (2 if x.shape[1] > 6 else 1))


class RowByRow(Network):
    """A loop over the batch, which a graph writes out."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ids."""
        return torch.stack([self.ffn(row) for row in self.embed(x)])


def pruned(model: nn.Module, inputs: Any, **options: Any) -> GraphModule:
    return fxprune.prune(model, 0.2, inputs=inputs, recipe="magnitude", **options).graph_module


@pytest.mark.parametrize("of", [lambda gm: gm, copy.deepcopy, lambda gm: copy.deepcopy(copy.deepcopy(gm))])
def test_the_other_branch_is_refused(of: Callable[[GraphModule], GraphModule]) -> None:
    gm = of(pruned(Branching(), (tokens(2, 8),)))
    assert gm(tokens(3, 7)).shape == (3, 7, 50)
    for arguments, keywords in (((tokens(2, 6),), {}), ((), {"x": tokens(2, 6)})):
        with pytest.raises(UsageError) as caught:
            gm(*arguments, **keywords)
        assert str(caught.value) == (
            "x.shape[1] is 6, and the graph was traced for 7 and more: trace the model with an example of such a size"
        )


def test_the_first_branch_has_an_end() -> None:
    gm = pruned(Branching(), (tokens(2, 4),))
    assert gm(tokens(1, 6)).shape == (1, 6, 50)
    with pytest.raises(UsageError, match="traced for at most 6"):
        gm(tokens(2, 7))


def test_fixed_sizes_stay_fixed() -> None:
    model, example = Branching(), (tokens(2, 8),)
    gm = pruned(model, example, graph=fxprune.trace(model, example, dynamic_shapes={}))
    assert gm(*example).shape == (2, 8, 50)
    for other in (tokens(2, 9), tokens(3, 8)):
        with pytest.raises(UsageError, match=r"traced for [28]: trace"):
            gm(other)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_batch_that_is_written_out_is_the_examples(rows: int) -> None:
    """An example of one row is traced as two where the batch is free, and must not be where it is not."""
    torch.manual_seed(0)
    model, ids = RowByRow().eval(), tokens(rows, 8)
    torch.testing.assert_close(fxprune.trace(model, (ids,))(ids), model(ids))
    gm = pruned(model, (ids,))
    assert gm(ids).shape == (rows, 8, 50)
    with pytest.raises(UsageError, match=rf"x.shape\[0\] is 2, and the graph was traced for {rows}: trace"):
        gm(tokens(2, 8))


class Even(Network):
    """Treats texts of an odd length in another way."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ids."""
        return self.ffn(self.embed(x) * (2 if x.shape[1] % 2 else 1))


class NotFive(Network):
    """Treats texts of one length in another way."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ids."""
        return self.ffn(self.embed(x) * (2 if x.shape[1] == 5 else 1))


class Longer(Network):
    """Treats a text that is longer than another in another way."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of both."""
        return self.ffn(self.embed(x) * (2 if x.shape[1] > y.shape[1] else 1)), self.ffn(self.embed(y))


class Pairs(Network):
    """Two tokens at a time."""

    def forward(self, x: Tensor) -> Tensor:
        """Logits of ids, in pairs."""
        out = self.ffn(self.embed(x))
        return out.view(x.shape[0], x.shape[1] // 2, 2, 50)


@pytest.mark.parametrize("of", [lambda gm: gm, copy.deepcopy])
def test_conditions_that_are_no_span_of_one_size(of: Callable[[GraphModule], GraphModule]) -> None:
    for model, example, fits, others in (
        (Even(), (tokens(2, 8),), (tokens(3, 6),), (tokens(2, 7),)),
        (Even(), (tokens(2, 7),), (tokens(3, 5),), (tokens(2, 6),)),
        (NotFive(), (tokens(2, 8),), (tokens(3, 6),), (tokens(2, 5),)),
        (Longer(), (tokens(2, 8), tokens(2, 4)), (tokens(1, 3), tokens(3, 2)), (tokens(2, 4), tokens(2, 8))),
        (Longer(), (tokens(2, 4), tokens(2, 8)), (tokens(2, 4), tokens(2, 4)), (tokens(2, 4), tokens(2, 3))),
    ):
        gm = of(pruned(model.eval(), example))
        gm(*fits)
        with pytest.raises(
            UsageError, match=r"x\.shape\[1\] is .*, and the graph was traced for .*: trace the model with an example"
        ):
            gm(*others)


def test_a_condition_that_cannot_be_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def unprintable(expression: Any) -> str:
        raise AssertionError(expression)

    monkeypatch.setattr("fxprune.sizes.python_text", unprintable)
    with pytest.raises(CaptureError, match=r"branches on sizes by '.*', which a graph cannot ask for: trace it with fixed sizes"):
        fxprune.trace(Even(), (tokens(2, 8),))
    assert fxprune.trace(Even(), (tokens(2, 8),), dynamic_shapes={})(tokens(2, 8)).shape == (2, 8, 50)


def test_what_operators_ask_for_is_left_to_them() -> None:
    gm = pruned(Pairs(), (tokens(2, 8),))
    assert not gm._forward_pre_hooks
    assert gm(tokens(1, 2)).shape == (1, 1, 2, 50)
    with pytest.raises(RuntimeError, match="is invalid for input of size"):
        gm(tokens(2, 7))


def test_a_condition_names_its_sizes() -> None:
    gm = pruned(Longer(), (tokens(2, 8), tokens(2, 4)))
    with pytest.raises(UsageError) as caught:
        gm(tokens(2, 4), y=tokens(2, 5))
    assert str(caught.value) == (
        "x.shape[1] is 4 and y.shape[1] is 5, and the graph was traced for x.shape[1] > y.shape[1]: "
        "trace the model with an example of such sizes"
    )
    compiled = torch.compile(gm, fullgraph=True)
    ids = tokens(2, 8), tokens(2, 4)
    torch.testing.assert_close(compiled(*ids), gm(*ids))
    with pytest.raises(RuntimeError):
        compiled(*reversed(ids))


def test_sizes_that_are_one_stay_one() -> None:
    inputs = {"input_ids": tokens(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    gm = pruned(build("llama"), inputs)
    gm(input_ids=tokens(3, 5), attention_mask=torch.ones(3, 5, dtype=torch.long))
    with pytest.raises(UsageError, match=r"input_ids.shape\[1\] is 5 and attention_mask.shape\[1\] is 8: the graph was traced"):
        gm(input_ids=tokens(2, 5), attention_mask=torch.ones(2, 8, dtype=torch.long))


def test_what_may_have_any_size_is_not_looked_at() -> None:
    gm = pruned(build("llama"), {"input_ids": tokens(2, 8)})
    assert not gm._forward_pre_hooks
    assert gm(input_ids=tokens(1, 1)).logits.shape[:2] == (1, 1)
