"""Plans: JSON there and back, replay on another copy, and every way in which a plan cannot be used."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxprune import PrunePlan, find_groups, rewrite, trace
from fxprune.errors import PlanError
from fxprune.groups import Groups


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, width), nn.Linear(width, 6)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.down(self.up(x).relu())
        return out


class Small(nn.Module):
    """Two residual blocks; the input and the output are pinned."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.enter, self.leave = nn.Linear(3, 6), nn.Linear(6, 2)
        self.layers = nn.ModuleList([Block(width), Block(width)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.enter(x)
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.leave(x)
        return out


@pytest.fixture(scope="module")
def gm() -> GraphModule:
    torch.manual_seed(0)
    return trace(Small(), (torch.randn(2, 3),))


@pytest.fixture(scope="module")
def groups(gm: GraphModule) -> Groups:
    return find_groups(gm)


@pytest.fixture
def plan(groups: Groups) -> PrunePlan:
    return PrunePlan.from_keep(
        groups,
        {"layers.0.ffn": [5, 0, 2, 2], "hidden": torch.tensor([1, 3, 4])},
        drop=["layers.1"],
        recipe={"ratio": 0.2, "kinds": {"ffn": 1.0}},
        scores={"layers.0.ffn": torch.rand(8), "hidden": torch.rand(6)},
    )


def test_groups_of_the_model(groups: Groups) -> None:
    assert {n: g.prunable for n, g in groups.items()} == {
        "enter.other": False,
        "hidden": True,
        "layers.0.ffn": True,
        "layers.1.ffn": True,
        "leave.other": False,
    }
    assert list(groups.blocks) == ["layers.0", "layers.1"]


def test_units_are_sorted_and_listed_once(plan: PrunePlan) -> None:
    assert plan.keep["layers.0.ffn"].tolist() == [0, 2, 5]
    assert plan.counts() == {"layers.0.ffn": 3, "hidden": 3}
    assert plan.sizes == {"layers.0.ffn": 8, "hidden": 6}
    assert plan.members["layers.0.ffn"] == [["layers.0.up.weight", 0], ["layers.0.up.bias", 0], ["layers.0.down.weight", 1]]
    assert plan.drop == ("layers.1",)


def test_groups_that_stay_whole_are_not_listed(groups: Groups) -> None:
    plan = PrunePlan.from_keep(groups, {"layers.0.ffn": range(8), "enter.other": [0, 1, 2], "hidden": [0]})
    assert list(plan.keep) == ["hidden"]


def test_json_there_and_back(plan: PrunePlan, groups: Groups, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    again = PrunePlan.load(tmp_path / "plan.json")
    assert again.to_json() == plan.to_json()
    assert again.diff(plan) == {}
    again.check(groups)
    for name in ("drop", "sizes", "members", "fingerprint", "recipe"):
        assert getattr(again, name) == getattr(plan, name)
    for table in ("keep", "scores"):
        mine, theirs = getattr(plan, table), getattr(again, table)
        assert list(mine) == list(theirs)
        assert all(torch.equal(mine[n], theirs[n]) and mine[n].dtype == theirs[n].dtype for n in mine)
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    bare = PrunePlan.from_keep(groups, {"hidden": [2]})
    assert "scores" not in bare.to_json()
    assert PrunePlan.from_json(json.loads(json.dumps(bare.to_json()))).diff(bare) == {}


def test_saving_replaces_a_file_or_leaves_it(plan: PrunePlan, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    plan.save(str(path))
    before = path.read_text()
    with pytest.raises(
        PlanError, match=r"^the plan's recipe cannot be written as JSON: Object of type Tensor is not JSON serializable$"
    ):
        replace(plan, recipe={"ratio": torch.tensor(0.2)}).save(path)
    assert path.read_text() == before
    replace(plan, drop=()).save(path)
    assert PrunePlan.load(path).drop == ()
    with pytest.raises(PlanError, match=rf"^cannot write the plan '{tmp_path}/none/plan.json': No such file or directory$"):
        plan.save(tmp_path / "none" / "plan.json")
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_diff(groups: Groups) -> None:
    one = PrunePlan.from_keep(groups, {"layers.0.ffn": [0, 1, 2], "hidden": [0, 1, 2, 3, 4]}, drop=["layers.1"])
    two = PrunePlan.from_keep(groups, {"layers.0.ffn": [0, 3], "layers.1.ffn": [7]})
    assert one.diff(one) == {}
    assert one.diff(two) == {
        "layers.0.ffn": {"mine": [1, 2], "theirs": [3]},
        "hidden": {"mine": [], "theirs": [5]},
        "layers.1.ffn": {"mine": [0, 1, 2, 3, 4, 5, 6], "theirs": []},
        "drop": {"mine": ["layers.1"], "theirs": []},
    }
    assert two.diff(one)["layers.0.ffn"] == {"mine": [3], "theirs": [1, 2]}
    other = PrunePlan.from_keep(find_groups(trace(Small(width=9), (torch.randn(2, 3),))), {"hidden": [0]})
    with pytest.raises(PlanError, match=r"^the plans were made for different models \(fingerprints \w{16} and \w{16}\)$"):
        one.diff(other)


def test_replay_on_another_copy_is_bit_identical(gm: GraphModule, plan: PrunePlan, tmp_path: Path) -> None:
    plan.save(tmp_path / "plan.json")
    torch.manual_seed(0)
    twin = Small()  # the same seed: another object with the same weights
    replayed = rewrite(trace(twin, (torch.randn(4, 3),), dynamic_shapes={}), PrunePlan.load(tmp_path / "plan.json"))
    first, second = (dict(m.named_parameters()) for m in (rewrite(gm, plan), replayed))
    assert first.keys() == second.keys()
    assert {n: tuple(p.shape) for n, p in first.items()} == {
        "enter.weight": (3, 3),
        "enter.bias": (3,),
        "layers.0.up.weight": (3, 3),
        "layers.0.up.bias": (3,),
        "layers.0.down.weight": (3, 3),
        "layers.0.down.bias": (3,),
        "leave.weight": (2, 3),
        "leave.bias": (2,),
    }
    assert all(torch.equal(first[n], second[n]) for n in first)
    kept = twin.layers[0].up.weight[[0, 2, 5]][:, [1, 3, 4]]  # type: ignore[union-attr, index]
    assert torch.equal(first["layers.0.up.weight"], kept)


def test_a_plan_of_another_model(plan: PrunePlan) -> None:
    for other in (Small(width=9), nn.Sequential(nn.Linear(3, 6), nn.Linear(6, 2))):
        groups = find_groups(trace(other, (torch.randn(2, 3),)))
        with pytest.raises(PlanError) as raised:
            plan.check(groups)
        assert str(raised.value) == (
            f"the plan was made for another model (fingerprint {plan.fingerprint}, this model has {groups.fingerprint()}): "
            "parameter names or shapes differ"
        )
        with pytest.raises(PlanError, match=r"^the plan was made for another model"):
            rewrite(trace(other, (torch.randn(2, 3),)), plan)
    with pytest.raises(PlanError, match=r"^the plan was made for another model \(fingerprint missing, this model has \w{16}\)"):
        replace(plan, fingerprint="").check(groups)


@pytest.mark.parametrize(
    ("keep", "text"),
    [
        (
            {"layers.0.fnn": [0]},
            "the plan names a prune group 'layers.0.fnn' that the model does not have; did you mean 'layers.0.ffn'? ",
        ),
        ({"enter.other": [0, 1]}, "group 'enter.other' cannot be pruned: a model input"),
        ({"layers.0.ffn": []}, "the plan keeps no unit of group 'layers.0.ffn': at least one must stay"),
        ({"layers.0.ffn": [1, 8]}, "the plan keeps unit 8 of group 'layers.0.ffn', which has units 0 to 7"),
        ({"layers.0.ffn": [-1, 3]}, "the plan keeps unit -1 of group 'layers.0.ffn', which has units 0 to 7"),
        ({"layers.0.ffn": torch.ones(8) > 0}, "the units of group 'layers.0.ffn' must be whole numbers, got bool"),
        ({"layers.0.ffn": [0.5, 3]}, "the units of group 'layers.0.ffn' must be whole numbers, got float32"),
    ],
)
def test_impossible_units(groups: Groups, keep: Any, text: str) -> None:
    with pytest.raises(PlanError) as raised:
        PrunePlan.from_keep(groups, keep)
    assert str(raised.value).startswith(text)


def test_unknown_blocks(groups: Groups) -> None:
    with pytest.raises(PlanError) as raised:
        PrunePlan.from_keep(groups, {}, drop=["layers.2"])
    assert str(raised.value) == (
        "'layers.2' is not a residual block that can be dropped; did you mean 'layers.1'? Choose from: layers.0, layers.1"
    )


def test_plans_made_by_hand_are_checked(plan: PrunePlan, groups: Groups) -> None:
    """`from_keep` sorts; a plan from a file or built directly may not be sorted, or may mean other dimensions."""
    for units in ([2, 0, 5], [0, 2, 2]):
        with pytest.raises(PlanError, match=r"^the plan's units of group 'hidden' are not in rising order$"):
            replace(plan, keep={"hidden": torch.tensor(units)}).check(groups)
    other = {**plan.members, "hidden": plan.members["hidden"][:-1]}
    text = r"^the plan was made for another form of group 'hidden': in this trace it cuts other dimensions$"
    with pytest.raises(PlanError, match=text):
        replace(plan, members=other).check(groups)
    with pytest.raises(PlanError, match=text):
        replace(plan, sizes={**plan.sizes, "hidden": 7}).check(groups)
    replace(plan, members={}, sizes={}).check(groups)


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"

    def error() -> str:
        with pytest.raises(PlanError) as raised:
            PrunePlan.load(path)
        return str(raised.value)

    assert error() == f"cannot read the plan '{path}': No such file or directory"
    path.write_text("{")
    assert error().startswith(f"'{path}' is not JSON: Expecting property name enclosed in double quotes")
    path.write_bytes(b"\xff\xfe\x00")
    assert error().startswith(f"'{path}' is not JSON: ")
    for text in ("[]", "{}", '{"fxprune_plan": 2}', '"plan"'):
        path.write_text(text)
        assert error() == f"'{path}' cannot be used: this is not an fxprune plan of format 1"
    with pytest.raises(PlanError, match=rf"^cannot read the plan '{tmp_path}/fxprune_plan.json': No such file or directory$"):
        PrunePlan.load(tmp_path)


DAMAGES: list[tuple[list[str], Any, str]] = [
    (["groups"], ..., "'groups' is missing"),
    (["groups"], [], "'groups' should be of type dict, got []"),
    (["groups", "hidden"], 3, "'int' object is not subscriptable"),
    (["groups", "hidden", "keep"], ..., "'keep' is missing"),
    (["groups", "hidden", "keep"], "012", "'keep' should be of type list, got '012'"),
    (["groups", "hidden", "keep"], [0, 1.5], "the units of group 'hidden' must be whole numbers, got 1.5"),
    (["groups", "hidden", "keep"], [0, True], "the units of group 'hidden' must be whole numbers, got True"),
    (["groups", "hidden", "keep"], [[0], [1]], "the units of group 'hidden' must be whole numbers, got [0]"),
    (["groups", "hidden", "keep"], [2**70], ""),
    (["groups", "hidden", "size"], "6", "'size' should be of type int, got '6'"),
    (["groups", "hidden", "members"], [["a"]], ""),
    (["drop"], "layers.1", "'drop' should be of type list, got 'layers.1'"),
    (["fingerprint"], None, "'fingerprint' should be of type str, got None"),
    (["recipe"], ..., "'recipe' is missing"),
    (["scores", "hidden"], ["a"], ""),
    (["scores"], 1, ""),
    (["curves"], {"hidden": [[float("inf"), 1.0]]}, "cannot convert float infinity to integer"),
]


@pytest.mark.parametrize(("path", "value", "text"), DAMAGES)
def test_damaged_plans(plan: PrunePlan, path: list[str], value: Any, text: str) -> None:
    data = copy.deepcopy(plan.to_json())
    inner: Any = data
    for piece in path[:-1]:
        inner = inner[piece]
    if value is ...:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    with pytest.raises(PlanError) as raised:
        PrunePlan.from_json(data)
    assert str(raised.value).startswith(f"the plan is damaged: {text}")
    assert len(str(raised.value)) < 200


def test_out_of_range_units_in_a_file(plan: PrunePlan, groups: Groups) -> None:
    for units, text in (
        ([0, 6], "the plan keeps unit 6 of group 'hidden', which has units 0 to 5"),
        ([-2, 1], "the plan keeps unit -2 of group 'hidden', which has units 0 to 5"),
        ([], "the plan keeps no unit of group 'hidden': at least one must stay"),
        ([3, 1], "the plan's units of group 'hidden' are not in rising order"),
    ):
        data = plan.to_json()
        data["groups"]["hidden"]["keep"] = units
        with pytest.raises(PlanError) as raised:
            PrunePlan.from_json(data).check(groups)
        assert str(raised.value) == text
