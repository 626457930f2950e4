"""Private corners of torch and transformers that fxprune needs, each with the versions that need it."""

from __future__ import annotations


def dynamic_size_errors() -> tuple[type[BaseException], ...]:
    """Errors by which `torch.export` says that a symbolic size was too much for it (torch 2.11 to 2.13)."""
    from torch._dynamo.exc import UserError
    from torch.fx.experimental.symbolic_shapes import ConstraintViolationError, GuardOnDataDependentSymNode

    return (UserError, ConstraintViolationError, GuardOnDataDependentSymNode)
