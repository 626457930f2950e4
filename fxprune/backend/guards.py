"""What lets Dynamo compile again, and how often it does: private corners of torch 2.11 to 2.13."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch.fx import GraphModule

from .._compat import guard_identity


def guard(gm: GraphModule, positions: Iterable[int]) -> None:
    """Let Dynamo compile again for other tensors in these places of the graph.

    The frame's own variable that holds their module is guarded too: torch allows ``recompile_limit`` graphs of one code to each
    module so guarded, and otherwise to all of its modules together.
    """
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    holders = set()
    for position in positions:
        source = getattr(placeholders[position], "_dynamo_source", None)
        if source is not None:
            guard_identity(source)
            holders.add(_holder(source))
    for source in holders - {None}:
        guard_identity(source)


def _holder(source: Any) -> Any:
    """The local variable with the module that a tensor is reached from; None if it is reached from something else."""
    from torch._dynamo.source import LocalSource, NNModuleSource

    inner = None
    while (base := getattr(source, "base", None)) is not None:
        inner, source = source, base
    return source if isinstance(source, LocalSource) and isinstance(inner, NNModuleSource) else None


def limit_reached() -> tuple[str, int] | None:
    """The limit that the graph in work exhausts, by its name in ``torch._dynamo.config``, and its value.

    Returns:
        None where torch would compile the same code once more, and outside of Dynamo.
    """
    from torch._dynamo import config
    from torch._dynamo.eval_frame import _debug_get_cache_entry_list
    from torch._dynamo.symbolic_convert import InstructionTranslator
    from torch._guards import CompileContext

    known = CompileContext.current_compile_id()
    if known is None:
        return None
    frame: Any = InstructionTranslator.current_tx().output.root_tx
    entries = _debug_get_cache_entry_list(frame.f_code)
    guarded = [entry.guard_manager.id_matched_objs for entry in entries]  # weak references to modules, by variable
    alike = sum(all((m := ref()) is None or m is frame.f_locals.get(n) for n, ref in modules.items()) for modules in guarded)
    if alike + 1 >= config.recompile_limit:
        return "recompile_limit", config.recompile_limit
    if max(len(entries), known.frame_compile_id or 0) + 1 >= config.accumulated_recompile_limit:
        return "accumulated_recompile_limit", config.accumulated_recompile_limit
    return None
