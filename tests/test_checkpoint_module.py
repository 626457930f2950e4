"""Checkpoints of plain modules: loaded into a copy of the dense one, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.api import prune
from fxprune.errors import CheckpointError, UsageError

from .closeness import relative


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(12, 16)
        self.norm = nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 40), nn.Linear(40, 16)
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        return cast(Tensor, self.head(x + self.down(torch.relu(self.up(self.norm(x))))))


class Pictures(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.norm2 = nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12)
        self.head = nn.Linear(12, 5)
        for norm in (self.norm1, self.norm2):
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
            nn.init.normal_(cast(Tensor, norm.running_mean))
            nn.init.uniform_(cast(Tensor, norm.running_var), 0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.norm1(self.first(x)))
        return cast(Tensor, self.head(torch.relu(self.norm2(self.second(x))).mean((2, 3))))


@pytest.mark.parametrize(
    ("kind", "shape", "units", "widths"),
    [
        (Residual, (4, 12), {"ffn": 0.5, "hidden": 0.25}, {"ffn": [40, 20], "hidden": [16, 12]}),
        (Pictures, (4, 3, 8, 8), {"channels": 0.5}, {"channels": [8, 4], "channels#2": [12, 6]}),
    ],
)
def test_a_plain_module_is_loaded_into_a_copy_of_the_dense_one(
    kind: type[nn.Module], shape: tuple[int, ...], units: dict[str, float], widths: dict[str, list[int]], tmp_path: Path
) -> None:
    dense = kind().eval()
    x, target = torch.randn(shape), torch.randn(shape[0], 5)
    batch = {"x": x, "target": target}
    before = {n: t.clone() for n, t in dense.state_dict().items()}

    def loss(output: Tensor, batch: Any) -> Tensor:
        return (output - batch["target"]).pow(2).mean()

    result = prune(dense, units=units, inputs={"x": x}, calibration=[batch], loss=loss, criterion="taylor1")
    assert result.form == "module"
    assert result.report.widths == widths
    result.save_pretrained(tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "README.md",
        "fxprune_plan.json",
        "fxprune_recipe.yaml",
        "fxprune_report.json",
        "fxprune_surgery.json",
        "model.safetensors",
        "report.html",
        "report.md",
    ]
    torch.manual_seed(5)
    other = kind().eval()  # its values do not matter
    loaded = fxprune.load(tmp_path / "out", model=other)
    fresh = torch.randn(7, *shape[1:])
    assert relative(result.graph_module(x=fresh), loaded(fresh)) < 1e-6
    assert relative(result.graph_module(x=fresh), cast(nn.Module, result.model)(fresh)) < 1e-6
    assert str(loaded) == str(result.model)  # in_features, normalized_shape and the like
    assert all(torch.equal(t, dense.state_dict()[n]) for n, t in before.items())
    assert [tuple(p.shape) for p in other.parameters()] == [tuple(p.shape) for p in dense.parameters()]


def test_plain_module_checkpoints_that_cannot_be_read(tmp_path: Path) -> None:
    dense, x = Residual().eval(), torch.randn(4, 12)
    out = tmp_path / "out"
    prune(dense, units=0.5, kinds="ffn", inputs={"x": x}, recipe={"criterion": "l1"}).save_pretrained(out)
    with pytest.raises(UsageError, match=r"holds a pruned plain module: pass the dense one, fxprune\.load\(dir, model=dense\)"):
        fxprune.load(out)
    with pytest.raises(CheckpointError, match=f"cannot load '{out}' into this Pictures: .*up"):
        fxprune.load(out, model=Pictures())
    (out / "model.safetensors").write_bytes((out / "model.safetensors").read_bytes()[:200])
    with pytest.raises(CheckpointError, match=f"cannot load '{out}' into this Residual: .*header"):
        fxprune.load(out, model=dense)
    (out / "fxprune_surgery.json").write_text("{")
    with pytest.raises(CheckpointError, match=f"cannot load '{out}' into this Residual: Expecting"):
        fxprune.load(out, model=dense)


def test_a_buffer_outside_the_state_is_cut_and_kept(tmp_path: Path) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
            self.register_buffer("gate", torch.randn(12), persistent=False)

        def forward(self, x: Tensor) -> Tensor:
            return cast(Tensor, self.down(torch.relu(self.up(x)) * cast(Tensor, self.gate)))

    dense, x = Gated().eval(), torch.randn(2, 8)
    result = prune(dense, units={"ffn": 0.5}, inputs=(x,), recipe="magnitude")
    result.save_pretrained(tmp_path / "small")
    model: Any = result.model
    assert torch.equal(fxprune.load(tmp_path / "small", model=dense)(x), model(x))
    assert model.gate.shape == (6,)
    assert dict(model.state_dict()).keys() == dict(dense.state_dict()).keys()  # it still is none of the state's
