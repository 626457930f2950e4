"""The backend by name: its options, and a plan file that changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from fxprune.backend import Backend, compile_pruned
from fxprune.errors import PlanError, UsageError

from .compiling import case, feeds, untraced

__all__ = ["untraced"]  # a fixture


def close(a: Any, b: Any) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def by_name(model: nn.Module, plan: Any) -> Any:
    return torch.compile(model, backend="fxprune", options={"plan": plan, "inner": "eager"})


def test_the_backend_goes_by_name_with_a_plan_or_its_file(tmp_path: Path) -> None:
    made, x = feeds(), torch.randn(2, 4, 6)
    made.plan.save(tmp_path / "plan.json")
    for plan in (made.plan, str(tmp_path / "plan.json"), tmp_path / "plan.json"):
        torch._dynamo.reset()
        with torch.no_grad():
            close(by_name(made.model, plan)(x), made.small(x))
    assert (made.small(x) - made.model(x)).abs().max() > 0.01


def test_another_plan_in_the_file_is_refused_until_a_reset(tmp_path: Path) -> None:
    """Torch would take the graphs of the first for those of the second: the options are equal."""
    made, x, path = feeds(1), torch.randn(2, 4, 6), str(tmp_path / "plan.json")
    other = case(made.model, (torch.randn(3, 5, 6),), kinds=["ffn"], seed=5)
    made.plan.save(path)
    first = by_name(made.model, path)
    with torch.no_grad():
        close(first(x), made.small(x))
        made.plan.save(path)  # the same again
        close(first(x), made.small(x))
        other.plan.save(path)
        message = f"there is another plan in '{path}' than when it was compiled: call torch._dynamo.reset() to compile that one"
        for compiled in (by_name(made.model, path), first):
            with pytest.raises(UsageError) as caught:
                compiled(x)
            assert str(caught.value) == message
        with pytest.raises(BackendCompilerFailed, match="there is another plan in"):
            first(torch.randn(3, 7, 6))
        torch._dynamo.reset()
        close(by_name(made.model, path)(x), other.small(x))
        Path(path).unlink()  # what it said is known
        wide = torch.randn(3, 7, 6)
        close(by_name(made.model, path)(wide), other.small(wide))


def test_bad_options_are_named() -> None:
    plan = feeds().plan
    gm = torch.fx.symbolic_trace(nn.Linear(2, 2))
    for make, message in (
        (
            lambda: compile_pruned(gm, []),
            'the fxprune backend needs a plan: torch.compile(model, backend="fxprune", options={"plan":',
        ),
        (
            lambda: compile_pruned(gm, [], options={"plna": plan}),
            "the fxprune backend has no option 'plna'; did you mean 'plan'? Choose from: inner, plan",
        ),
        (lambda: compile_pruned(gm, [], options={"plan": {}}), "plan must be a PrunePlan or the path of one, got dict"),
        (lambda: Backend(3), "plan must be a PrunePlan or the path of one, got int"),  # type: ignore[arg-type]
        (
            lambda: Backend(plan, inner="inductr"),
            "there is no backend 'inductr' to compile the pruned graphs with; did you mean 'inductor'?",
        ),
        (lambda: Backend(plan, inner="fxprune"), "there is no backend 'fxprune' to compile the pruned graphs with"),
    ):
        with pytest.raises(UsageError) as caught:
            make()
        assert str(caught.value).startswith(message)
    with pytest.raises(PlanError, match=r"cannot read the plan 'none\.json'"):
        Backend("none.json")
