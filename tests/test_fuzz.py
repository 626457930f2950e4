"""Random networks, pruned at random, against the masked dense network; the long run is `python -m benchmarks.fuzz`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import benchmarks.fuzz
from fxprune.rules import Call, registry, rule_for
from fxprune.spaces import product

from .fuzz import KINDS, Network, Program, check, generate, parse, programs
from .fuzz_corpus import CORPUS

aten: Any = torch.ops.aten


@pytest.mark.parametrize("name", CORPUS)
def test_corpus(name: str) -> None:
    outcome = check(parse(CORPUS[name]))
    assert not outcome.problems
    assert not outcome.untraced
    assert not outcome.fixed
    assert outcome.verified, "nothing was checked"


def test_the_corpus_has_every_kind_of_step() -> None:
    assert {step.kind for text in CORPUS.values() for step in parse(text).steps} == set(KINDS)


@pytest.mark.slow
@settings(max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(programs(), st.integers(0, 2**20))
def test_random_programs(program: Program, seed: int) -> None:
    outcome = check(program, seed)
    assert not outcome.problems, f"\n{program}"


def test_random_programs_have_something_to_prune() -> None:
    outcomes = [check(generate(Random(i)), i) for i in range(12)]
    assert sum(o.prunable > 0 for o in outcomes) >= 10
    assert sum(o.prunable for o in outcomes) >= 24
    assert sum(o.masked for o in outcomes) >= 12
    assert not any(o.untraced for o in outcomes)


def test_a_program_reads_back_from_its_text_and_computes_the_same() -> None:
    for i in range(20):
        program = generate(Random(i))
        again = parse(str(program))
        assert again == program
        x = torch.randn(2, 3, program.width, dtype=torch.float64)
        for a, b in zip(Network(program)(x), Network(again)(x), strict=True):
            assert torch.equal(a, b)


def test_all_weights_are_random() -> None:
    for i in range(20):
        module = Network(generate(Random(i)))
        for tensor in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
            assert not ((tensor == 0) | (tensor == 1)).any()


# ---------------------------------------------------------------------------------------------------------------------
# What is wrong must be found out.


def _passes(call: Call) -> Any:
    return call["self"].dims


def _select(call: Call) -> Any:
    dim = call["self"].axis(call["dim"])
    return [s for d, s in enumerate(call["self"]) if d != dim]


def _tiled(call: Call) -> Any:
    x, dim = call["self"], call["self"].axis(call["dim"])
    call.notes["copies"] = copies = call.fresh(call["repeats"])
    return [*x[:dim], product(copies, x[dim]), *x[dim + 1 :]]


def _loose_glu(call: Call) -> Any:
    x, dim = call["self"], call["self"].axis(call["dim"])
    return [*x[:dim], call.split_concat(x[dim], [call.shape[dim]] * 2)[0], *x[dim + 1 :]]


def _turned_linear(call: Call) -> Any:
    call.unify(call["input"][-1], call["weight"][-1])
    return [*call["input"][:-1], call.fresh(call.shape[-1])]


PROPAGATED: dict[str, tuple[Any, Callable[[Call], Any]]] = {
    "flip": (aten.flip, _passes),
    "roll": (aten.roll, _passes),
    "select": (aten.select.int, _select),
    "repeat_interleave": (aten.repeat_interleave.self_int, _tiled),
    "glu": (aten.glu, _loose_glu),
    "linear": (aten.linear, _turned_linear),
}
RESIZED = {
    "attention": aten.scaled_dot_product_attention,
    "window": aten.slice.Tensor,
    "regroup": aten.reshape,
    "split": aten.split_with_sizes,
    "group_norm": aten.group_norm,
    "conv1d": aten.conv1d,
}


def _found(kind: str) -> bool:
    """Whether a random program with a kind of step, one of the first fifteen, has a problem."""
    generated = (generate(Random(i)) for i in range(1000))
    having = (p for p in generated if any(step.kind == kind for step in p.steps))
    return any(check(p).problems for p in islice(having, 15))


@pytest.mark.parametrize("kind", PROPAGATED)
def test_a_wrong_rule_is_found_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, propagate = PROPAGATED[kind]
    right = rule_for(operator)
    assert right is not None
    monkeypatch.setitem(registry._RULES, operator, registry.Rule("wrong", propagate, right.resizer))
    assert _found(kind)


@pytest.mark.parametrize("kind", RESIZED)
def test_a_missing_resize_is_found_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = rule_for(RESIZED[kind])
    assert right is not None
    assert right.resizer is not None
    monkeypatch.setattr(right, "resizer", None)
    assert _found(kind)


@pytest.mark.parametrize("kind", ["flip", "select", "glu"])
def test_the_zeroed_eager_module_finds_a_wrong_rule_by_itself(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    operator, propagate = PROPAGATED[kind]
    monkeypatch.setitem(registry._RULES, operator, registry.Rule("wrong", propagate))
    monkeypatch.setattr("fxprune.verify", lambda *_: SimpleNamespace(max_rel_error=0.0))
    assert _found(kind)


def test_the_long_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "fuzz.json"
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--programs", "3", "--seed", "5", "--output", str(output)])
    benchmarks.fuzz.main()
    first = json.loads(output.read_text())
    assert first["summary"]["programs"] == 3
    assert first["summary"]["wrong"] == 0
    assert first["summary"]["checks_with_verify"] > 3
    assert first["command"].startswith("python -m benchmarks.fuzz --programs 3")
    assert sum(first["steps"].values()) > 9
    benchmarks.fuzz.main()
    again = json.loads(output.read_text())
    assert [again[k] for k in ("summary", "steps")] == [first[k] for k in ("summary", "steps")]
    assert str(output) in capsys.readouterr().out


def test_the_long_run_outlives_a_program_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("on purpose")

    monkeypatch.setattr(benchmarks.fuzz, "check", fail)
    monkeypatch.setattr(sys, "argv", ["fuzz.py", "--programs", "2", "--output", str(tmp_path / "fuzz.json")])
    benchmarks.fuzz.main()
    data = json.loads((tmp_path / "fuzz.json").read_text())
    assert data["summary"]["wrong"] == 2
    assert "on purpose" in data["problems"][1]["problems"][0]
