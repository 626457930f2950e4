"""Saliency of units against the definitions, computed from whole matrices ``s B A`` and plain indexing."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pytest
import torch

from fxprune.errors import FxPruneError, UsageError
from fxprune.lorashear.adapters import factors_of, find_adapters
from fxprune.lorashear.saliency import CRITERIA, Moments, check_weights, measure, moments, saliency
from fxprune.lorashear.units import Structure, find_structures

from .shearing import ALL, SCALE, fresh, named

Array = npt.NDArray[np.float64]


def structures(targets: tuple[str, ...] | None = ALL) -> tuple[dict[str, Structure], dict[str, torch.Tensor], dict[str, Array]]:
    """Structures, parameters as they are, and as arrays by a short name."""
    model, gm, groups = fresh(targets=targets)
    torch.manual_seed(3)
    tensors = dict(gm.named_parameters())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    adapters = find_adapters(gm)
    owned = {n for n, p in tensors.items() if p.requires_grad} if targets is None else factors_of(adapters)
    found, _ = find_structures(groups, adapters, owned)
    arrays = {n: p.detach().double().numpy() for n, p in model.named_parameters()}
    return found, dict(tensors), arrays


def projection(arrays: dict[str, Array], layer: int, path: str) -> tuple[Array, Array | None]:
    """A layer's weight and its update."""
    prefix = f"base_model.model.model.layers.{layer}.{path}"
    if f"{prefix}.weight" in arrays:
        return arrays[f"{prefix}.weight"], None
    a, b = (arrays[f"{prefix}.lora_{x}.default.weight"] for x in "AB")
    return arrays[f"{prefix}.base_layer.weight"], SCALE * b @ a


def by_hand(
    arrays: dict[str, Array], layer: int, rows: dict[str, list[list[int]]], columns: dict[str, list[list[int]]]
) -> dict[str, list[float]]:
    """Each criterion of each unit, from the rows and columns of each matrix that it owns."""
    count = len(next(iter(rows.values())))
    values: dict[str, list[float]] = {c: [] for c in CRITERIA}
    for unit in range(count):
        x, guided, g = [], [], []
        for path, owned, dim in [(p, r, 0) for p, r in rows.items()] + [(p, c, 1) for p, c in columns.items()]:
            weight, update = projection(arrays, layer, path)
            x.append(weight.take(owned[unit], dim).ravel())
            if update is not None:
                guided.append(x[-1])
                g.append(update.take(owned[unit], dim).ravel())
        whole, own, other = np.concatenate(x), np.concatenate(guided), np.concatenate(g)
        norm, product = float(np.linalg.norm(whole)), float(own @ other)
        values["magnitude"].append(norm)
        values["average"].append(norm / whole.size)
        values["cosine"].append(1 + product / float(np.linalg.norm(own) * np.linalg.norm(other)))
        values["taylor1"].append(abs(product))
        values["taylor2"].append(product**2 / 2)
    return values


def channels() -> list[list[int]]:
    return [[j] for j in range(64)]


def heads(width: int) -> list[list[int]]:
    return [list(range(h * width, (h + 1) * width)) for h in range(2)]


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "v_proj", "down_proj")], ids=["all", "some"])
@pytest.mark.parametrize("criterion", CRITERIA)
def test_criteria_against_their_definitions(criterion: str, targets: tuple[str, ...]) -> None:
    """A channel's gate and up rows and down column; a head's rows of k, v, and with its queries of q and columns of o."""
    found, tensors, arrays = structures(targets)
    for kind, layer, rows, columns in (
        ("ffn", 0, {"mlp.gate_proj": channels(), "mlp.up_proj": channels()}, {"mlp.down_proj": channels()}),
        (
            "kv_heads",
            1,
            {"self_attn.k_proj": heads(8), "self_attn.v_proj": heads(8), "self_attn.q_proj": heads(24)},
            {"self_attn.o_proj": heads(24)},
        ),
    ):
        (name,) = (n for n, s in found.items() if (s.group.kind, s.group.layer) == (kind, layer))
        expected = by_hand(arrays, layer, rows, columns)[criterion]
        np.testing.assert_allclose(measure(moments(found[name], tensors), criterion).numpy(), expected, rtol=2e-4)


def test_weights_that_are_trained_have_their_gradient() -> None:
    found, tensors, _ = structures(None)
    (name,) = (n for n, s in found.items() if (s.group.kind, s.group.layer) == ("ffn", 0))
    for parameter in tensors.values():
        parameter.grad = torch.randn_like(parameter)
    mlp = "model.layers.0.mlp"
    w = torch.cat(
        [
            tensors[f"{mlp}.{p}_proj.weight"].detach().mT if p == "down" else tensors[f"{mlp}.{p}_proj.weight"].detach()
            for p in ("gate", "up", "down")
        ],
        1,
    )
    grads = {p: tensors[f"{mlp}.{p}_proj.weight"].grad for p in ("gate", "up", "down")}
    g = torch.cat([t.mT if p == "down" else t for p, t in grads.items() if t is not None], 1)
    own = moments(found[name], tensors)
    torch.testing.assert_close(measure(own, "taylor1").float(), (w * g).sum(1).abs(), rtol=1e-4, atol=1e-5)
    cosine = torch.nn.functional.cosine_similarity(w, g, dim=1)
    torch.testing.assert_close(measure(own, "cosine").float(), 1 + cosine, rtol=1e-5, atol=1e-5)


def test_adapters_that_are_at_their_start_say_nothing() -> None:
    """B is zero: no Taylor term, and a cosine of neither agreement nor disagreement."""
    _, gm, groups = fresh()
    adapters = find_adapters(gm)
    found, _ = find_structures(groups, adapters, factors_of(adapters))
    own = moments(found[named(groups, "ffn", 0)], dict(gm.named_parameters()))
    assert measure(own, "taylor1").tolist() == [0.0] * 64
    assert measure(own, "cosine").tolist() == [1.0] * 64


def made(*columns: list[float]) -> Moments:
    square, guided, update, product, elements = (torch.tensor(c, dtype=torch.float64) for c in columns)
    return Moments(square, guided, update, product, elements)


def test_each_criterion_is_divided_by_its_norm_over_all_units_that_are_compared() -> None:
    found = {
        "a": made([9.0, 16.0, 100.0], [1.0] * 3, [1.0] * 3, [0.0] * 3, [3.0] * 3),
        "b": made([144.0], [1.0], [4.0], [2.0], [6.0]),
    }
    weights = {"magnitude": 2.0, "taylor1": 1.0}
    got = saliency(found, weights, {"a": torch.tensor([2])})
    assert got["a"][:2].tolist() == pytest.approx([2 * 3 / 13, 2 * 4 / 13])  # 9 + 16 + 144 is 13 squared; the 100 does not count
    assert got["b"].tolist() == pytest.approx([2 * 12 / 13 + 1])
    assert got["a"][2] < -(2 + 1) * 2


def test_a_criterion_that_is_zero_everywhere_counts_for_nothing() -> None:
    found = {"a": made([4.0, 9.0], [1.0] * 2, [0.0] * 2, [0.0] * 2, [1.0] * 2)}
    assert saliency(found, {"magnitude": 1.0, "taylor2": 1.0})["a"].tolist() == pytest.approx(
        [2 / math.sqrt(13), 3 / math.sqrt(13)]
    )


def test_what_is_not_finite_is_refused() -> None:
    found = {"a": made([4.0, math.nan], [1.0] * 2, [0.0] * 2, [0.0] * 2, [1.0] * 2)}
    with pytest.raises(FxPruneError, match=r"the saliency \(magnitude\) is not finite: the weights or the adapters have diverged"):
        saliency(found, {"magnitude": 1.0})


def test_weights_of_criteria() -> None:
    assert check_weights({"magnitude": 1, "taylor1": 0}) == {"magnitude": 1.0}
    with pytest.raises(UsageError, match="unknown saliency criterion 'taylor'"):
        check_weights({"taylor": 1})
    with pytest.raises(UsageError, match="the weight of saliency criterion 'cosine' must be 0 or a positive number, got -1"):
        check_weights({"cosine": -1})
    with pytest.raises(UsageError, match="no saliency criterion has a weight: give at least one of magnitude, average"):
        check_weights({"cosine": 0})
