"""Knowledge as a result: ranks, what is protected, the table, the file and the picture."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fxprune import Knowledge, Selection
from fxprune.errors import UsageError
from fxprune.knowledge import Removal


def row(name: str, kind: str, layer: int | None, change: float, divergence: float | None = None) -> Removal:
    after = math.inf if change == math.inf else 10 * math.exp(change)
    return Removal(name, kind, layer, 8, 7, change, 10.0, after, divergence)


def knowledge(*rows: Removal, **options: Any) -> Knowledge:
    given: dict[str, Any] = {
        "unmeasured": {"m.hidden": "a norm looks at it"},
        "loss": math.log(10),
        "by": "loss",
        "share": 1.0,
        "take": "least",
        "text": "4 x 8 tokens of a.txt, seed 0",
        "fingerprint": "0123456789abcdef",
    }
    return Knowledge(rows, **given | options)


ROWS = (
    row("m.0.kv_heads", "kv_heads", 0, 0.5, 0.1),
    row("m.0.ffn", "ffn", 0, math.inf, 0.2),
    row("m.1.kv_heads", "kv_heads", 1, -0.25, 0.7),
    row("m.1.ffn", "ffn", 1, 0.125, 0.3),
    row("m.shared", "head_dim", None, 0.0625, 0.01),
    row("m.0", "layers", 0, 1.5, 2.0),
    row("m.1", "layers", 1, 3.0, 1.0),
)


def test_groups_are_ranked_among_groups_and_blocks_among_blocks() -> None:
    found = knowledge(*ROWS)
    assert [r.name for r in found.rows] == [r.name for r in ROWS]
    assert [r.rank for r in found.rows] == [2, 1, 5, 3, 4, 2, 1]
    assert [r.name for r in found.ranked()] == ["m.0.ffn", "m.0.kv_heads", "m.1.ffn", "m.shared", "m.1.kv_heads", "m.1", "m.0"]
    assert [r.name for r in found.ranked(["layers", "kv_heads"])] == ["m.0.kv_heads", "m.1.kv_heads", "m.1", "m.0"]
    by = knowledge(*ROWS, by="divergence")
    assert [r.rank for r in by.rows] == [4, 3, 1, 2, 5, 1, 2]


@pytest.mark.parametrize(
    ("share", "kinds", "names"),
    [
        (0, None, ()),
        (0.01, None, ("m.0.ffn",)),
        (0.2, None, ("m.0.ffn",)),
        (0.21, None, ("m.0.ffn", "m.0.kv_heads")),
        (0.6, None, ("m.0.ffn", "m.0.kv_heads", "m.1.ffn")),
        (1, None, ("m.0.ffn", "m.0.kv_heads", "m.1.ffn", "m.shared", "m.1.kv_heads")),
        (0.5, ["kv_heads"], ("m.0.kv_heads",)),
        (0.5, ["layers"], ("m.1",)),
        (0.5, ["ffn", "layers"], ("m.0.ffn", "m.1")),
    ],
)
def test_the_share_that_is_protected(share: float, kinds: list[str] | None, names: tuple[str, ...]) -> None:
    assert knowledge(*ROWS).protected(share, kinds) == names
    assert Selection(ratio=0.2, protect=names).protect == names


def test_where_only_blocks_were_measured_they_are_protected() -> None:
    assert knowledge(*ROWS[-2:]).protected(0.5) == ("m.1",)


def test_a_tenth_of_ten_is_one() -> None:
    """And not two, as 0.1 * 10 rounded up would be if it came out above one."""
    rows = [row(f"m.{i}.ffn", "ffn", i, float(i)) for i in range(30)]
    assert len(knowledge(*rows[:10]).protected(0.1)) == 1
    assert len(knowledge(*rows).protected(0.1)) == 3


def test_refused_shares_and_kinds() -> None:
    with pytest.raises(UsageError, match=r"the share to protect must lie between 0 and 1 \(0.1 protects a tenth\), got 10"):
        knowledge(*ROWS).protected(10)
    with pytest.raises(UsageError, match=r"nothing of kind 'fnn' was measured; did you mean 'ffn'\? Choose from: ffn, head_dim, "):
        knowledge(*ROWS).protected(0.1, ["fnn"])


def table_lines(found: Knowledge, protect: float = 0.0) -> list[str]:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(found.table(protect))
    return [" ".join(line.split()) for line in captured.get().splitlines() if line.strip()]


def test_the_table() -> None:
    plain = [r for r in ROWS if r.kind != "head_dim"]
    lines = table_lines(knowledge(*(Removal(**{**vars(r), "divergence": None}) for r in plain)))
    assert lines[0] == "rank group or block kind layer removed loss perplexity"
    assert lines[2] == "1 m.0.ffn ffn 0 7 of 8 +inf inf"
    assert lines[3] == "2 m.0.kv_heads kv_heads 0 7 of 8 +0.5000 16.49"
    told = "perplexity of the whole model 10.00, loss 2.3026, on 4 x 8 tokens of a.txt, seed 0"
    assert " ".join(lines[8:]) == f"{told} not measured: m.hidden: a norm looks at it"
    lines = table_lines(knowledge(*ROWS, by="divergence"), 0.2)
    assert lines[0] == "rank group or block kind layer removed loss perplexity divergence protected"
    assert lines[2] == "1 m.1.kv_heads kv_heads 1 7 of 8 -0.2500 7.79 0.7000 yes"
    assert lines[6] == "5 m.shared head_dim - 7 of 8 +0.0625 10.64 0.0100"


def test_groups_of_one_role_that_were_not_measured_for_one_reason_are_one_line() -> None:
    experts = {f"model.layers.{i}.mlp.experts": "a router looks at it" for i in range(30)}
    found = knowledge(*ROWS, unmeasured={"model.hidden": "a norm looks at it", **experts, "model.layers.3.x": "a norm looks at it"})
    assert " ".join(table_lines(found)).partition("seed 0 ")[2] == (
        "not measured: model.hidden: a norm looks at it not measured: model.layers.*.mlp.experts (30 groups): a router looks at it "
        "not measured: model.layers.3.x: a norm looks at it"
    )


def test_a_file_holds_all_of_it_and_is_plain_json(tmp_path: Path) -> None:
    found = knowledge(*ROWS, by="divergence", share=0.5, take="most")
    found.save(tmp_path / "a.json")
    assert Knowledge.load(tmp_path / "a.json") == found
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    data = json.loads((tmp_path / "a.json").read_text(), parse_constant=refuse)
    assert data["rows"][1]["loss_change"] == data["rows"][1]["perplexity_after"] == "inf"
    assert (data["fxprune_knowledge"], data["rows"][0]["name"], data["rows"][0]["rank"]) == (1, "m.0.kv_heads", 4)


def changed(**changes: Any) -> dict[str, Any]:
    return {**knowledge(*ROWS).to_json(), **changes}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ({"made": "elsewhere"}, "this is not knowledge of format 1, as fxprune sensitivity writes it"),
        ([], "this is not knowledge of format 1"),
        (changed(fxprune_knowledge=2), "this is not knowledge of format 1"),
        ({k: v for k, v in changed().items() if k != "share"}, "the knowledge is damaged: 'share' is missing"),
        (changed(rows=[{"name": "a"}]), "the knowledge is damaged: 'kind' is missing"),
        (changed(rows=[{**changed()["rows"][0], "layer": "0"}]), "'layer' should be a whole number, got '0'"),
        (changed(rows=[{**changed()["rows"][0], "name": 3}]), "'name' should be text, got 3"),
        (changed(rows=[{**changed()["rows"][0], "loss_change": "much"}]), "could not convert string to float: 'much'"),
        (changed(by="lost"), "it is ranked by 'lost'; did you mean 'loss'"),
        (changed(rows=3), "the knowledge is damaged: "),
    ],
)
def test_a_file_that_holds_something_else(data: Any, said: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(data))
    with pytest.raises(UsageError) as caught:
        Knowledge.load(tmp_path / "a.json")
    assert said in str(caught.value)
    assert "a.json' cannot be used: " in str(caught.value)


def test_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"cannot read '.*a\.json': No such file or directory"):
        Knowledge.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("no JSON")
    with pytest.raises(UsageError, match=r"a\.json' is not JSON: Expecting value"):
        Knowledge.load(tmp_path / "a.json")
    with pytest.raises(UsageError, match=r"cannot write '.*nowhere/a\.json': No such file or directory"):
        knowledge(*ROWS).save(tmp_path / "nowhere" / "a.json")


@pytest.mark.parametrize("protect", [0.0, 0.4])
def test_a_picture(protect: float, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    knowledge(*ROWS).plot(tmp_path / "a.svg", protect)
    svg = (tmp_path / "a.svg").read_text()
    for words in ("<!-- kv_heads -->", "<!-- ffn -->", "<!-- layers -->", "<!-- layer -->", "<!-- rise of the loss (nats) -->"):
        assert words in svg
    assert "<!-- Each taken away by itself: all units that may go; 2 not shown -->" in svg  # one is infinite, one in no layer
    assert ("<!-- protected by a share of 0.4 -->" in svg) is (protect > 0)
    knowledge(*ROWS, share=0.25, by="divergence").plot(tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")


def test_groups_of_one_kind_and_several_roles_are_lines_of_their_own(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [row(f"{part}.block.{i}.ffn", "ffn", i, 1.0 + i) for part in ("encoder", "decoder") for i in range(3)]
    rows += [row(f"{part}.block.{i}", "layers", i, 2.0 + i) for part in ("encoder", "decoder") for i in range(3)]
    knowledge(*rows).plot(tmp_path / "a.svg")
    svg = (tmp_path / "a.svg").read_text()
    for words in ("encoder.block.*.ffn", "decoder.block.*.ffn", "encoder.block", "decoder.block"):
        assert f"<!-- {words} -->" in svg


def test_a_picture_that_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("matplotlib")
    with pytest.raises(UsageError, match="there is nothing to plot over the depth: no measured group lies in a numbered layer"):
        knowledge(ROWS[4]).plot(tmp_path / "a.png")
    with pytest.raises(UsageError, match=r"there is no directory '.*nowhere' to write 'a\.png' to"):
        knowledge(*ROWS).plot(tmp_path / "nowhere" / "a.png")
    with pytest.raises(UsageError, match=r"cannot write a plot as '.*a\.txt': its name must end in one of \.pdf, \.png, \.svg"):
        knowledge(*ROWS).plot(tmp_path / "a.txt")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UsageError, match=r"a plot needs matplotlib \(.*\): pip install 'fxprune\[plot\]'"):
        knowledge(*ROWS).plot(tmp_path / "a.png")
