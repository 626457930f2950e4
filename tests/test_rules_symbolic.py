"""Rules on symbolic sizes: functions traced with a symbolic batch and sequence, run at other sizes than they were traced with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fxprune.capture import trace

from .rule_program import Function, Program, choices, difference, placeholders


def _split_heads(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    heads = x.view(b, s, 3, 4).transpose(1, 2)
    scores = torch.bmm(heads.reshape(b * 3, s, 4), heads.reshape(b * 3, s, 4).transpose(1, 2))
    return scores.view(b, 3, s, s)


def _zeros_of_batch_times_heads(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    heads = x.view(b, s, 3, 4).transpose(1, 2).reshape(b * 3, s, 4)
    return torch.baddbmm(x.new_zeros(b * 3, s, s), heads, heads.transpose(1, 2)) + torch.zeros(3 * b, 1, 1)


def _merge_heads(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    heads = x.view(b, s, 3, 4).transpose(1, 2).reshape(b * 3, s, 4)
    return (heads * 2).view(b, 3, s, 4).transpose(1, 2).reshape(b, s, 12)


def _repeat_kv(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    return x.view(b, s, 3, 4)[:, :, :, None, :].expand(b, s, 3, 5, 4).reshape(b, s, 15, 4)


def _rotate_half(x: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x + torch.cat((-x[..., half:], x[..., :half]), dim=-1)


def _interleave(x: Tensor) -> Tensor:
    return x + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)


def _windows(x: Tensor) -> Tensor:
    b, s, _ = x.shape
    return x.view(b, s, 2, 3, 2).permute(0, 2, 1, 3, 4).reshape(b * 2, s, 6)


SYMBOLIC: dict[str, tuple[Callable[..., Any], list[int]]] = {
    "split heads, batch times heads": (_split_heads, [3, 4]),
    "merge heads": (_merge_heads, [3, 4]),
    "repeat_kv": (_repeat_kv, [3, 4, 5]),
    "rotate_half": (_rotate_half, [6]),
    "interleaved pairs": (_interleave, [6]),
    "windows": (_windows, [2, 2, 3]),
    "flatten tokens": (lambda x: x.view(-1, 12).relu().view(x.shape[0], -1, 12), [12]),
    "flatten tokens, unknown size last": (lambda x: x.reshape(x.shape[0] * x.shape[1], -1), [12]),
    "flatten": (lambda x: x.flatten(0, 1), [12]),
    "unflatten": (lambda x: x.unflatten(-1, (3, 4)).flatten(2), [3, 4]),
    "narrow units": (lambda x: x.narrow(-1, 2, 4), [2, 4, 6]),
    "narrow tokens": (lambda x: x.narrow(1, 1, x.shape[1] - 1), [12]),
    "first token": (lambda x: x[:, 0], [12]),
    "last token": (lambda x: x[:, -1], [12]),
    "all but the first token": (lambda x: x[:, 1:], [12]),
    "all but the last token": (lambda x: x[:, : x.shape[1] - 1], [12]),
    "tokens split at a symbolic place": (lambda x: torch.split(x, [1, x.shape[1] - 1], dim=1)[1], [12]),
    "prepended zeros": (lambda x: torch.cat([x.new_zeros(x.shape[0], 1, 12), x], dim=1), [12]),
    "zeros of the input's size": (lambda x: torch.zeros(x.shape[0], x.shape[1], 12, dtype=x.dtype) + x, [12]),
    "causal mask": (lambda x: (x @ x.transpose(1, 2)).masked_fill(torch.ones(x.shape[1], x.shape[1]).triu(1).bool(), 0.0), [12]),
    "rows by number": (lambda x: x[torch.arange(x.shape[0]), -1], [12]),
    "repeated batch": (lambda x: x.repeat(2, 1, 3), [2, 3, 12]),
    "repeated tokens": (lambda x: x.repeat_interleave(2, dim=1), [2, 12]),
    "repeated flat": (lambda x: x[:, 0].repeat_interleave(2), [2, 12]),
    "repeated a symbolic number of times": (lambda x: x[:1, 0].repeat(x.shape[0], 1) + x[:, -1], [12]),
    "copies of a symbolic number": (lambda x: x[:1, 0].repeat_interleave(x.shape[0], dim=0), [12]),
    "repeated units": (lambda x: x.repeat_interleave(2, dim=-1), [2, 12]),
    "expanded to the batch": (lambda x: x[:1, :1].expand(x.shape[0], x.shape[1], 12) + x, [12]),
    "mean over tokens": (lambda x: x.mean(1, keepdim=True).squeeze(1), [12]),
    "transposed to channels first": (lambda x: x.permute(0, 2, 1).unsqueeze(-1).squeeze(-1), [12]),
    "divided by the length": (lambda x: x / x.shape[1], [12]),
    "tokens and units mixed": (lambda x: x.view(x.shape[0], 12, x.shape[1]), []),
    "tokens and units flattened": (lambda x: x.flatten(1), [12]),
    "halves of the batch": (lambda x: torch.cat(x.chunk(2, dim=-1), dim=0), [6]),
    "zeros of batch times heads": (_zeros_of_batch_times_heads, [3, 4]),
    "einsum": (lambda x: torch.einsum("bsd,btd->bst", x, x), [12]),
}


@pytest.mark.parametrize("name", SYMBOLIC)
def test_symbolic_sizes(name: str) -> None:
    function, expected = SYMBOLIC[name]
    auto = torch.export.Dim.AUTO
    traced = trace(Function(function), torch.randn(2, 5, 12, dtype=torch.float64), dynamic_shapes=(({0: auto, 1: auto},),))
    program = Program.of(traced, [torch.randn(4, 7, 12, dtype=torch.float64)])
    assert len(program.symbols) == 2, "the batch and the sequence must stay symbolic"
    assert sorted(a.size for a in program.free()) == expected
    for choice in choices(program.free(), torch.Generator().manual_seed(0)):
        wanted = program.slice(program.run_masked(choice), program.output_spaces, choice)
        assert difference(program.run_pruned(choice), wanted) == "", choice


def test_a_size_that_the_trace_has_specialised_pins_only_its_dimension() -> None:
    auto = torch.export.Dim.AUTO
    gm = trace(Function(lambda x: x.relu()), torch.randn(2, 5, 12), dynamic_shapes=(({0: auto, 1: auto},),))
    node = next(n for n in gm.graph.nodes if n.op == "call_function")
    assert isinstance(node.meta["val"].shape[1], torch.SymInt)
    node.meta["val"] = torch.empty(2, 5, 12)
    program = Program.of(gm, [torch.randn(4, 5, 12)])
    assert [a.size for a in program.free()] == [12]
    assert [a.size for a in program.axes() if a.pins] == [2, 5]
    (placeholder,) = placeholders(gm)
    placeholder.meta["val"], node.meta["val"] = node.meta["val"], placeholder.meta["val"]
    program = Program.of(gm, [torch.randn(4, 5, 12)])
    assert [a.size for a in program.free()] == [12]
    assert [a.size for a in program.axes() if a.pins] == [2, 5]
