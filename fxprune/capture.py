"""Capture: any ``nn.Module`` to one canonical ``torch.fx.GraphModule``.

`torch.export` (non-strict) is the tracer. What comes out has ``get_attr`` parameters under their original names (the very
tensors of the model, nothing is copied), symbolic batch and sequence, no in-place operator, no higher-order region, and
no assertion nodes; input-free subgraphs are folded to constants. It works on a meta-device model.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import operator
import traceback
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from ._compat import dynamic_size_errors
from .errors import CaptureError, UsageError

log = logging.getLogger("fxprune")

_CONSTANT = "fxprune_constant_"


def trace(
    model: nn.Module,
    inputs: Mapping[str, Any] | tuple[Any, ...] | Tensor,
    *,
    dynamic_shapes: Any = None,
) -> GraphModule:
    """Trace a model into a canonical graph.

    Args:
        model: A Hugging Face model, a plain module or an fx GraphModule; on the meta device too. It is left as it was.
        inputs: Example inputs: a mapping of keyword arguments, a tuple of positional ones, or one tensor.
        dynamic_shapes: As for `torch.export.export`. By default every dimension of an integer or boolean input is symbolic,
            and of a floating-point input the first (and, with three dimensions, the second); if the model does not allow
            it, the trace falls back to fixed sizes with a warning.

    Returns:
        A GraphModule that is called like the model.

    Raises:
        UsageError: ``model`` is no module, or ``inputs`` is empty or holds no tensor.
        CaptureError: The model cannot be traced; says where it failed and what to try.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module to trace, got {type(model).__name__}")
    args, kwargs = _arguments(inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    args, kwargs = _widen(args, device), {k: _widen(v, device) for k, v in kwargs.items()}
    shapes = dynamic_shapes if dynamic_shapes is not None else _default_shapes(model, args, kwargs)
    with quiet(model), torch.no_grad():
        exported = _export(model, args, kwargs, shapes, fixed_fallback=dynamic_shapes is None)
        if any(_mutates(n) for n in exported.graph.nodes):
            exported = exported.run_decompositions({})
    gm: GraphModule = exported.module(check_guards=False)
    owned = _adopt(gm, model)
    _inline_regions(gm)
    _clean(gm)
    _fold(gm, owned)
    gm.graph.lint()
    gm.recompile()
    return gm


def _arguments(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(inputs, Mapping):
        kwargs = {str(k): v for k, v in inputs.items()}
    elif isinstance(inputs, Tensor):
        args = (inputs,)
    elif isinstance(inputs, tuple | list):
        args = tuple(inputs)
    else:
        raise UsageError(f"inputs must be a mapping, a tuple or a tensor, got {type(inputs).__name__}")
    if not any(isinstance(v, Tensor) for v in (*args, *kwargs.values())):
        raise UsageError("inputs hold no tensor: pass for example {'input_ids': ids}")
    return args, kwargs


def _widen(value: Any, device: torch.device) -> Any:
    """Examples of size 1 would specialise the trace (0/1 specialisation): use two rows, on the model's device."""
    if isinstance(value, tuple):
        return tuple(_widen(v, device) for v in value)
    if not isinstance(value, Tensor):
        return value
    for dim in range(value.dim() if not value.is_floating_point() else min(value.dim(), 1)):
        if value.shape[dim] == 1:
            value = value.repeat_interleave(2, dim)
    return value.to(device)


def _default_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    auto = torch.export.Dim.AUTO

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        free = value.dim() if not value.is_floating_point() else 2 if value.dim() == 3 else 1
        return dict.fromkeys(range(min(free, value.dim())), auto) or None

    positional = tuple(of(a) for a in args)
    keyword = {k: of(v) for k, v in kwargs.items()}
    if not kwargs:
        return positional
    if not args:
        return keyword
    names = [n for n in _signature(model) if n not in keyword]
    return {**dict(zip(names, positional, strict=False)), **keyword}


def _signature(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


@contextlib.contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode and no KV cache while tracing; the model is put back as it was."""
    training = [m for m in model.modules() if m.training]
    configs: list[Any] = []
    seen: list[Any] = [getattr(m, "config", None) for m in model.modules()]
    for config in {id(c): c for c in seen if c is not None}.values():
        parts = (config, getattr(config, "text_config", None), getattr(config, "decoder", None))
        configs.extend(part for part in parts if getattr(part, "use_cache", None) is True)
    model.eval()
    for config in configs:
        config.use_cache = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        for config in configs:
            config.use_cache = True


def _export(model: nn.Module, args: Any, kwargs: Any, shapes: Any, *, fixed_fallback: bool) -> Any:
    try:
        return torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
    except Exception as error:
        if not (fixed_fallback and isinstance(error, dynamic_size_errors())):
            raise _explain(model, error) from error
        log.warning("symbolic sizes failed (%s); traced again with fixed ones", _first_line(error))
    try:
        return torch.export.export(model, args, kwargs, strict=False)
    except Exception as error:
        raise _explain(model, error) from error


def _first_line(error: BaseException) -> str:
    text = str(error).strip()
    return f"{type(error).__name__}: {text.splitlines()[0][:300] if text else 'no message'}"


def _explain(model: nn.Module, error: BaseException) -> CaptureError:
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "/torch/" not in f.filename.replace("\\", "/") and "/fxprune/" not in f.filename]
    where = f" at {own[-1].filename}:{own[-1].lineno} ({(own[-1].line or '').strip()})" if own else ""
    return CaptureError(
        f"could not trace {type(model).__name__}{where}: {_first_line(error)}. "
        "Try: example inputs of the kind the model is used with, dynamic_shapes={} for fixed sizes, "
        "attn_implementation='eager', or take data-dependent control flow out of forward."
    )


def _mutates(node: Node) -> bool:
    schema = getattr(node.target, "_schema", None)
    return node.op == "call_function" and schema is not None and bool(schema.is_mutable)


def _adopt(gm: GraphModule, model: nn.Module) -> set[str]:
    """Let every parameter be the model's own object under its first name, so that tied weights are one tensor.

    Returns the names of the model's own parameters and buffers.
    """
    first: dict[int, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        first.setdefault(id(tensor), name)
    originals = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target in originals:
            tensor = originals[node.target]
            node.target = first[id(tensor)]
            node.meta["val"] = tensor
    for name in [n for n, _ in [*gm.named_parameters(remove_duplicate=False), *gm.named_buffers(remove_duplicate=False)]]:
        if name not in originals:
            continue
        owner, leaf = _owner(gm, name)
        if name != first[id(originals[name])]:
            delattr(owner, leaf)
        elif isinstance(tensor := originals[name], nn.Parameter):
            owner._parameters[leaf] = tensor
        else:
            owner._buffers[leaf] = tensor
    gm.meta["aliases"] = {n: first[id(t)] for n, t in originals.items() if n != first[id(t)]}
    return set(originals)


def _owner(root: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return root.get_submodule(path), leaf


def _inline_regions(gm: GraphModule) -> None:
    """Replace ``wrap_with_set_grad_enabled`` / ``wrap_with_autocast`` regions by their bodies."""
    regions = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
    for node in list(gm.graph.nodes):
        name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
        if name not in regions:
            continue
        body_node, *operands = node.args[regions[name] :]
        body = gm.get_submodule(body_node.target)
        assert isinstance(body, GraphModule)
        _inline_regions(body)
        env: dict[Node, Any] = dict(zip((n for n in body.graph.nodes if n.op == "placeholder"), operands, strict=True))
        with gm.graph.inserting_before(node):
            for inner in body.graph.nodes:
                if inner.op == "get_attr":
                    setattr(gm, f"{_CONSTANT}{node.name}_{inner.name}", getattr(body, inner.target))
                    env[inner] = gm.graph.get_attr(f"{_CONSTANT}{node.name}_{inner.name}")
                    env[inner].meta = dict(inner.meta)
                elif inner.op == "output":
                    result = torch.fx.node.map_arg(inner.args[0], env.__getitem__)
                elif inner.op != "placeholder":
                    env[inner] = gm.graph.node_copy(inner, env.__getitem__)
        for user in list(node.users):
            if user.target is operator.getitem:
                user.replace_all_uses_with(result[user.args[1]])
                gm.graph.erase_node(user)
        if node.users:
            node.replace_all_uses_with(result if isinstance(result, Node) else result[0])
        gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()
    gm.delete_all_unused_submodules()


_ASSERTIONS = ("_assert_", "sym_constrain_range", "_guards_fn")


def _clean(gm: GraphModule) -> None:
    """Drop assertions, then dead code."""
    for node in reversed(gm.graph.nodes):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op in ("call_function", "call_module") and name.startswith(_ASSERTIONS) and not node.users:
            gm.graph.erase_node(node)
    gm.graph.eliminate_dead_code()


def _fold(gm: GraphModule, owned: set[str]) -> None:
    """Evaluate what depends on no input, parameter or buffer, once, and keep the result as a constant buffer."""
    constant: dict[Node, Any] = {}
    for node in gm.graph.nodes:
        if node.op == "get_attr":
            value = _lookup(gm, node.target)
            if node.target not in owned and isinstance(value, Tensor):
                constant[node] = value
        elif node.op == "call_function" and all(i in constant for i in node.all_input_nodes) and _foldable(node):
            arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: constant[n])
            with torch.no_grad():
                constant[node] = node.target(*arguments[0], **arguments[1])
    for i, (node, value) in enumerate(constant.items()):
        if node.op == "get_attr" or not isinstance(value, Tensor) or all(u in constant for u in node.users):
            continue
        name = f"{_CONSTANT}{i}"
        gm.register_buffer(name, value.detach().clone(), persistent=False)
        with gm.graph.inserting_before(node):
            made = gm.graph.get_attr(name)
        made.meta = {**node.meta, "val": value}
        node.replace_all_uses_with(made)
    gm.graph.eliminate_dead_code()


def _foldable(node: Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem
    if torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable:
        return False
    return all(isinstance(v, Tensor) and v.device.type != "meta" for v in _values(node)) and _small(node)


def _values(node: Node) -> list[Any]:
    value = node.meta.get("val")
    return list(value) if isinstance(value, list | tuple) else [value]


def _small(node: Node) -> bool:
    """At most 16 MiB of static size: folding must not blow up the graph."""
    total = 0
    for value in _values(node):
        if any(not isinstance(n, int) for n in value.shape):
            return False
        total += value.numel() * value.element_size()
    return total <= 1 << 24


def _lookup(gm: GraphModule, target: str) -> Any:
    value: Any = gm
    for piece in target.split("."):
        value = getattr(value, piece)
    return value
