"""Rules on random programs: chains of operators that rearrange, tie and contract, built by hypothesis."""

from __future__ import annotations

import operator
from random import Random
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from .rule_program import Program, choices, difference

aten: Any = torch.ops.aten


class Builder:
    """A random graph under construction: every value is a node with its example tensor in ``meta["val"]``."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.graph = Graph()
        self.generator = torch.Generator().manual_seed(random.randrange(1 << 30))
        self.inputs: list[Tensor] = []
        self.values: list[Node] = []
        self.contracts = False

    def input(self, *shape: int) -> Node:
        """A new input of the graph."""
        last = next((n for n in reversed(self.graph.nodes) if n.op == "placeholder"), None)
        with self.graph.inserting_after(last):
            node = self.graph.placeholder(f"arg{len(self.inputs)}")
        node.meta["val"] = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        self.inputs.append(node.meta["val"])
        return node

    def emit(self, target: Any, *args: Any) -> Node:
        """One operator call."""
        node = self.graph.call_function(target, args)
        numbers = torch.fx.node.map_arg(args, lambda n: n.meta["val"])
        node.meta["val"] = target(*numbers)
        if isinstance(node.meta["val"], Tensor):
            self.values.append(node)
        return node

    def shape(self, node: Node) -> list[int]:
        """Of a value."""
        return list(node.meta["val"].shape)

    def finish(self) -> Program:
        """The graph with its last two values as outputs."""
        self.graph.output(tuple(self.values[-2:]))
        return Program.of(GraphModule(nn.Module(), self.graph), self.inputs)

    def step(self) -> None:
        """Append one random operator to a random recent value."""
        x = self.random.choice(self.values[-3:])
        arrange = [self.regroup, self.permute, self.slice, self.split, self.cat, self.expand, self.repeat, self.write]
        move = self.random.choice([*arrange, self.tie, self.weigh, self.sum])
        if len(self.shape(x)) > 0 and x.meta["val"].numel() <= 1500:
            move(x, self.shape(x))

    def regroup(self, x: Node, shape: list[int]) -> None:
        """A view as another random factorisation of the same volume."""
        primes = [p for n in shape for p in _primes(n)]
        if 0 in shape:
            return
        new: list[int] = []
        for p in primes:
            if new and self.random.random() < 0.5:
                new[-1] *= p
            else:
                new.append(p)
        self.emit(aten.reshape.default, x, new or [1])

    def permute(self, x: Node, shape: list[int]) -> None:
        """Dimensions in random order."""
        self.emit(aten.permute.default, x, self.random.sample(range(len(shape)), len(shape)))

    def slice(self, x: Node, shape: list[int]) -> None:
        """A random window, or every other entry."""
        dim = self.random.randrange(len(shape))
        start, end = sorted(self.random.randrange(shape[dim] + 1) for _ in range(2))
        if self.random.random() < 0.3:
            self.emit(aten.slice.Tensor, x, dim, self.random.randrange(2), None, 2)
        elif end > start:
            self.emit(aten.slice.Tensor, x, dim, start, end)

    def split(self, x: Node, shape: list[int]) -> None:
        """Two pieces, joined again the other way round."""
        dim = self.random.randrange(len(shape))
        if shape[dim] > 1:
            cut = self.random.randrange(1, shape[dim])
            pieces = self.emit(aten.split_with_sizes.default, x, [cut, shape[dim] - cut], dim)
            first, second = (self.emit(operator.getitem, pieces, i) for i in range(2))
            self.emit(aten.cat.default, [second, first], dim)

    def cat(self, x: Node, shape: list[int]) -> None:
        """Joined with itself or with a new input."""
        dim = self.random.randrange(len(shape))
        other = x if self.random.random() < 0.5 else self.input(*shape)
        self.emit(aten.cat.default, [x, other], dim)

    def write(self, x: Node, shape: list[int]) -> None:
        """A random window overwritten with a new input."""
        dim = self.random.randrange(len(shape))
        start, end = sorted(self.random.randrange(shape[dim] + 1) for _ in range(2))
        source = self.input(*shape[:dim], end - start, *shape[dim + 1 :])
        self.emit(aten.slice_scatter.default, x, source, dim, start, end)

    def tie(self, x: Node, shape: list[int]) -> None:
        """Added to another value of as many entries, viewed alike; this is where layouts meet."""
        mates = [v for v in self.values if v is not x and v.meta["val"].numel() == x.meta["val"].numel()]
        if mates:
            other = self.emit(aten.reshape.default, self.random.choice(mates), shape)
            self.emit(aten.add.Tensor, x, other)

    def weigh(self, x: Node, shape: list[int]) -> None:
        """A linear layer on the last dimension, or a product with a broadcast input."""
        if self.random.random() < 0.5:
            self.contracts = True
            self.emit(aten.linear.default, x, self.input(self.random.choice([2, 4, 6]), shape[-1]))
        else:
            self.emit(aten.mul.Tensor, x, self.input(*[self.random.choice([n, 1]) for n in shape]))

    def expand(self, x: Node, shape: list[int]) -> None:
        """A new broadcast dimension."""
        dim = self.random.randrange(len(shape) + 1)
        wide = self.emit(aten.unsqueeze.default, x, dim)
        self.emit(aten.expand.default, wide, [*shape[:dim], self.random.choice([2, 3]), *shape[dim:]])

    def repeat(self, x: Node, shape: list[int]) -> None:
        """Tiles, or neighbours repeated."""
        dim = self.random.randrange(len(shape))
        if self.random.random() < 0.5:
            self.emit(aten.repeat.default, x, [self.random.choice([1, 2]) for _ in shape])
        else:
            self.emit(aten.repeat_interleave.self_int, x, 2, dim)

    def sum(self, x: Node, shape: list[int]) -> None:
        """One dimension contracted."""
        self.contracts = True
        self.emit(aten.sum.dim_IntList, x, [self.random.randrange(len(shape))], self.random.random() < 0.5)


def _primes(n: int) -> list[int]:
    found, p = [], 2
    while n > 1:
        while n % p == 0:
            found.append(p)
            n //= p
        p += 1
    return found


def test_random_programs() -> None:
    checked = 0

    @settings(max_examples=300)
    @given(st.randoms(use_true_random=False), st.integers(2, 9))
    def run(random: Random, steps: int) -> None:
        nonlocal checked
        builder = Builder(random)
        shape = [random.choice([2, 3, 4, 6]) for _ in range(random.randint(1, 3))]
        builder.values.append(builder.input(*shape))
        for _ in range(steps):
            builder.step()
        if len(builder.values) < 2:
            return
        program = builder.finish()
        for choice in choices(program.free(), builder.generator):
            actual = program.run_pruned(choice)
            for dense in [program.run_masked(choice), *([] if builder.contracts else [program.run(program.inputs)])]:
                wanted = program.slice(dense, program.output_spaces, choice)
                assert difference(actual, wanted) == "", f"{choice}\n{program.gm.graph}"
            checked += 1

    run()
    assert checked > 500, "most random programs ended up pinned: the test has lost its point"
