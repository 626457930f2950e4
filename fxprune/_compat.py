"""Private corners of torch and transformers that fxprune needs, each with the versions that need it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.fx import GraphModule

__all__ = [
    "CANNOT_TELL",
    "FakeTensorMode",
    "aot_export_module",
    "current_graph",
    "dynamic_size_errors",
    "guard_identity",
    "guard_scalar",
    "on_deepcopy",
    "own_conditions",
    "python_text",
    "quiet_trees",
]

CANNOT_TELL = (DataDependentOutputException, DynamicOutputShapeException)
"""Raised where tensors without numbers (torch 2.11 to 2.13) do not suffice."""


@contextmanager
def quiet_trees() -> Iterator[None]:
    """No warning within where torch compares trees with its own deprecated ``LeafSpec``, as copies of graphs do (torch 2.13)."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*LeafSpec", category=FutureWarning)
        yield


def dynamic_size_errors() -> tuple[type[BaseException], ...]:
    """Errors by which `torch.export` says that a symbolic size was too much for it (torch 2.11 to 2.13)."""
    from torch._dynamo.exc import UserError
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    return (UserError, ConstraintViolationError, GuardOnDataDependentSymNode)


def aot_export_module(*args: Any, **kwargs: Any) -> Any:
    """What `torch.export` makes aten graphs with; it takes Dynamo's tensors and symbolic sizes (torch 2.11 to 2.13)."""
    from torch._functorch.aot_autograd import aot_export_module as export

    return export(*args, **kwargs)


def guard_scalar(value: Any) -> Any:
    """The number that a symbolic number stands for, with a guard on it (torch 2.11 to 2.13)."""
    from torch.fx.experimental.symbolic_shapes import guard_scalar as guard

    return guard(value)


def on_deepcopy(gm: GraphModule, hook: Callable[[GraphModule], object]) -> None:
    """Call something with every deep copy of a graph, of which torch drops the hooks of forward (torch 2.11 to 2.13)."""
    gm._register_deepcopy_hook(hook)


def own_conditions(shape_env: Any) -> list[Any]:
    """Conditions on symbolic sizes that a model's own Python asked for, in order, once each (torch 2.11 to 2.13).

    What torch's kernels and their references ask for is left out: it is about memory, or operators ask for it again when they run.
    """
    inner = os.path.join(os.path.dirname(torch.__file__), "_")

    def own(guard: Any) -> bool:
        place = getattr(guard.sloc, "framework_loc", None)
        return not str(getattr(place, "filename", place)).startswith(inner)

    return list(dict.fromkeys(guard.expr for guard in shape_env.guards if own(guard)))


def python_text(expression: Any) -> str:
    """A condition on symbolic sizes as Python has it, with ``//`` and ``%`` (torch 2.11 to 2.13)."""
    from torch.utils._sympy.printers import PythonPrinter

    text: str = PythonPrinter().doprint(expression)
    return text


def current_graph() -> str:
    """Dynamo's name of the graph that it compiles, ``frame/compile``; ``?`` outside of Dynamo (torch 2.11 to 2.13)."""
    from torch._guards import CompileContext

    known = CompileContext.current_compile_id()
    return "?" if known is None else str(known)


def guard_identity(source: Any) -> None:
    """Let Dynamo compile again when the object of a source is another one than now (torch 2.11 to 2.13).

    Dynamo takes the parameters of a module for inputs, and calls one compiled graph with those of another module of its kind.
    """
    from torch._dynamo.guards import GuardBuilder, install_guard

    install_guard(source.make_guard(GuardBuilder.ID_MATCH))
