"""One period of LHSPG against the formulas in NumPy: nothing of fxprune but the optimizer under test is used.

The reference is given the gradients of what is trained, step by step, and computes everything else by itself: which channels become
redundant, the wrapped optimizer's (SGD) steps, the trial, the test, the shrinking, and what follows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fxprune import LHSPG, Selection

from .shearing import ALL, SCALE, batch, fresh, trained

Array = npt.NDArray[np.float64]
LR, PENALTY, EPSILON, WARMUP, STEPS, RATIO = 0.05, 0.6, 0.1, 2, 6, 0.25
LAYERS, CHANNELS, HIDDEN = 2, 64, 48


class Reference:
    """Channels of the feed-forward blocks of a llama."""

    def __init__(self, model: Any, *, half_space: bool, adapted: bool) -> None:
        self.p: dict[str, Array] = {n: t.detach().numpy().copy() for n, t in model.named_parameters()}
        self.half_space, self.adapted = half_space, adapted
        total = sum(a.size for n, a in self.p.items() if "lora_" not in n)
        self.count = round(RATIO * total / (3 * HIDDEN))
        self.redundant: list[tuple[int, int]] = []
        self.alive: set[tuple[int, int]] = set()
        self.died: list[int] = []

    def name(self, layer: int, path: str, leaf: str = "base_layer.") -> str:
        return (
            f"base_model.model.model.layers.{layer}.mlp.{path}_proj.{leaf}weight"
            if self.adapted
            else f"model.layers.{layer}.mlp.{path}_proj.weight"
        )

    def x(self, layer: int, j: int) -> list[Array]:
        """The channel's slices, as views."""
        return [self.p[self.name(layer, "gate")][j], self.p[self.name(layer, "up")][j], self.p[self.name(layer, "down")][:, j]]

    def followers(self, layer: int, j: int) -> list[Array]:
        if not self.adapted:
            return []
        b = [self.p[self.name(layer, path, "lora_B.default.")][j] for path in ("gate", "up")]
        return [*b, self.p[self.name(layer, "down", "lora_A.default.")][:, j]]

    def g(self, layer: int, j: int, grads: dict[str, Array]) -> list[Array]:
        if not self.adapted:
            g = {path: grads[self.name(layer, path)] for path in ("gate", "up", "down")}
            return [g["gate"][j], g["up"][j], g["down"][:, j]]
        update = {}
        for path in ("gate", "up", "down"):
            a, b = (self.p[self.name(layer, path, f"lora_{f}.default.")] for f in "AB")
            update[path] = SCALE * b @ a
        return [update["gate"][j], update["up"][j], update["down"][:, j]]

    def choose(self, grads: dict[str, Array]) -> None:
        rows = []
        for layer in range(LAYERS):
            for j in range(CHANNELS):
                x, g = np.concatenate(self.x(layer, j)), np.concatenate(self.g(layer, j, grads))
                size, dot = np.linalg.norm(x), x @ g
                rows.append([size, size / x.size, 1 + dot / (size * np.linalg.norm(g)), abs(dot), 0.5 * dot**2])
        table = np.array(rows)
        score = (table / np.linalg.norm(table, axis=0)).sum(1)
        self.redundant = [divmod(int(i), CHANNELS) for i in np.argsort(score)[: self.count]]
        self.alive = set(self.redundant)

    def step(self, n: int, grads: dict[str, Array]) -> None:
        if n == WARMUP:
            self.choose(grads)
        old = {unit: [v.copy() for v in self.x(*unit)] for unit in self.redundant}
        for name, gradient in grads.items():
            self.p[name] -= LR * gradient
        left = STEPS - (n - WARMUP)
        for unit in self.redundant:
            if unit not in self.alive:
                self.clear(unit)
        for unit in sorted(self.alive) if n < WARMUP + STEPS else []:
            x = np.concatenate(old[unit])
            if self.half_space:
                trial = x - LR * np.concatenate(self.g(*unit, grads)) - LR * PENALTY * x / np.linalg.norm(x)
                if trial @ x < EPSILON * (x @ x):
                    self.clear(unit)
                    self.alive.discard(unit)
                    self.died.append(n)
                    continue
            else:
                trial = np.concatenate(self.x(*unit))
            shrunk = trial * (left - 1) / left
            for view, values in zip(self.x(*unit), np.split(shrunk, 3), strict=True):
                view[:] = values
            for view in self.followers(*unit):
                view *= (left - 1) / left
            if left == 1:
                self.alive.discard(unit)

    def clear(self, unit: tuple[int, int]) -> None:
        for view in (*self.x(*unit), *self.followers(*unit)):
            view[:] = 0


@pytest.mark.parametrize("projection", ["half-space", "linear"])
@pytest.mark.parametrize("adapted", [True, False], ids=["lora", "full"])
def test_one_period(projection: str, adapted: bool) -> None:
    model, gm, groups = fresh(targets=ALL if adapted else None, dtype=torch.float64)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():  # channels of all sizes, so that they leave the half-space at different steps
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
        for layer in range(LAYERS):
            size = 0.1 + torch.rand(CHANNELS, generator=generator, dtype=torch.float64)
            leaf = "base_layer.weight" if adapted else "weight"
            mlp = model.get_submodule(f"{'base_model.model.' if adapted else ''}model.layers.{layer}.mlp")
            for path in ("gate", "up"):
                mlp.get_parameter(f"{path}_proj.{leaf}").mul_(size[:, None])
            mlp.get_parameter(f"down_proj.{leaf}").mul_(size)
    reference = Reference(model, half_space=projection == "half-space", adapted=adapted)
    optimizer = LHSPG(
        torch.optim.SGD(trained(model), lr=LR),
        gm,
        groups,
        selection=Selection(ratio=RATIO, kinds=("ffn",), ranking="global", widths="per-layer"),
        warmup=WARMUP,
        periods=1,
        period_steps=STEPS,
        projection=projection,
        penalty=PENALTY,
        epsilon=EPSILON,
    )
    for n in range(WARMUP + STEPS + 2):
        model(**batch(n % 3)).loss.backward()
        grads = {name: p.grad.numpy().copy() for name, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        reference.step(n, grads)
        for name, parameter in model.named_parameters():
            np.testing.assert_allclose(
                parameter.detach().numpy(), reference.p[name], rtol=1e-9, atol=1e-12, err_msg=f"{name}, step {n}"
            )
    found = {(int(n.split("layers.")[1][0]), j) for n, units in optimizer.zero.items() for j in units.tolist()}
    assert found == set(reference.redundant)
    assert len(found) == reference.count > 20
    if projection == "half-space":
        assert len(set(reference.died)) > 1, "all left at once: no test"
        assert len(reference.died) < reference.count, "some are to be shrunk to the end"
