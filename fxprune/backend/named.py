"""The backend by its name: ``torch.compile(model, backend="fxprune", options={"plan": plan})``."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.fx import GraphModule

from ..errors import UsageError, nearest
from ..plan import PrunePlan
from .compiler import Backend, check_plan

_OPTIONS = ("plan", "inner")


def compile_pruned(
    gm: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile one graph; all that one plan and one inner backend name, until `torch._dynamo.reset`, are of one `Backend`.

    Args:
        gm: Dynamo's graph.
        example_inputs: Its inputs.
        options: ``plan`` and, optionally, ``inner``: see `Backend`.

    Raises:
        UsageError: There is no plan, or an option that is not known, or the file has another plan than the graphs so far.
    """
    given = dict(options or {})
    for name in given:
        if name not in _OPTIONS:
            raise UsageError(f"the fxprune backend has no option '{name}'; {nearest(name, _OPTIONS)}")
    if "plan" not in given:
        raise UsageError('the fxprune backend needs a plan: torch.compile(model, backend="fxprune", options={"plan": plan})')
    plan, inner = given["plan"], given.get("inner", "inductor")
    check_plan(plan)
    if isinstance(plan, PrunePlan):
        return _of_plan(plan, inner)(gm, example_inputs)
    return _of_file(os.path.abspath(plan), inner)(gm, example_inputs)


class _OfFile:
    """The backend of a plan file. Torch takes its graphs for those of any later plan in that file, so it looks at each call."""

    def __init__(self, path: str, inner: Any) -> None:
        self._path, self._seen = path, _written(path)
        self._backend = Backend(path, inner)

    def __call__(self, gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        self._check()
        compiled = self._backend(gm, example_inputs)

        def run(*args: Any) -> Any:
            self._check()
            return compiled(*args)

        return run

    def _check(self) -> None:
        now = _written(self._path)
        if now is None or now == self._seen:
            return
        if PrunePlan.load(self._path).to_json() != self._backend.plan.to_json():
            raise UsageError(
                f"there is another plan in '{self._path}' than when it was compiled: call torch._dynamo.reset() to compile that one"
            )
        self._seen = now


def _written(path: str) -> tuple[int, int, int] | None:
    """What changes when a file is written; None if there is none."""
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


_of_plan = functools.lru_cache(maxsize=16)(Backend)
_of_file = functools.lru_cache(maxsize=16)(_OfFile)


def _reset() -> None:
    _of_plan.cache_clear()
    _of_file.cache_clear()


compile_pruned.reset = _reset  # type: ignore[attr-defined]  # torch._dynamo.reset calls it
