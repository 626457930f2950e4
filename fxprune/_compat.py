"""Private corners of torch and transformers that fxprune needs, each with the versions that need it."""

from __future__ import annotations

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode

__all__ = ["CANNOT_TELL", "FakeTensorMode", "dynamic_size_errors"]

CANNOT_TELL = (DataDependentOutputException, DynamicOutputShapeException)
"""Raised where tensors without numbers (torch 2.11 to 2.13) do not suffice."""


def dynamic_size_errors() -> tuple[type[BaseException], ...]:
    """Errors by which `torch.export` says that a symbolic size was too much for it (torch 2.11 to 2.13)."""
    from torch._dynamo.exc import UserError
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    return (UserError, ConstraintViolationError, GuardOnDataDependentSymNode)
