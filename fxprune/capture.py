"""Capture: any ``nn.Module`` to one canonical ``torch.fx.GraphModule``.

`torch.export` (non-strict) is the tracer. What comes out has ``get_attr`` parameters under their original names (the very
tensors of the model, nothing is copied), symbolic batch and sequence, no in-place operator, no higher-order region, and
no assertion nodes; input-free subgraphs are folded to constants. It works on a meta-device model.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import operator
import traceback
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Interpreter, Node

from ._compat import CANNOT_TELL, FakeTensorMode, dynamic_size_errors, quiet_trees
from .errors import CaptureError, UsageError
from .mode import quiet, unchanged
from .quantised import refuse_quantised
from .sizes import SIZES, InputSizes
from .wording import listed

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
            it, or computes with its length in a way that only holds for the example's, the trace falls back to a symbolic
            batch, then to fixed sizes, with a warning.

    Returns:
        A GraphModule that is called like the model.

    Raises:
        UsageError: ``model`` is no module or is quantised, or ``inputs`` is empty or holds no tensor.
        CaptureError: The model cannot be traced; says where it failed and what to try.
    """
    if not isinstance(model, nn.Module):
        raise UsageError(f"expected a torch.nn.Module to trace, got {type(model).__name__}")
    if lazy := next((name for name, p in model.named_parameters() if nn.parameter.is_lazy(p)), None):
        raise UsageError(f"parameter '{lazy}' has no size yet: run this {type(model).__name__} once before it is traced")
    refuse_quantised(model)
    args, kwargs = _arguments(inputs)
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    # copies: a view would bring guards on the tensor that it is a part of
    args, kwargs = torch.utils._pytree.tree_map_only(Tensor, lambda t: t.detach().to(device, copy=True), (args, kwargs))
    if dynamic_shapes is not None:
        return _capture(model, args, kwargs, dynamic_shapes)
    wide_args, wide_kwargs = tuple(map(_widen, args)), {k: _widen(v) for k, v in kwargs.items()}
    try:
        gm = _most_symbolic(model, wide_args, wide_kwargs)
        gm.meta[SIZES](gm, args, kwargs)
    except (CaptureError, UsageError):
        if all(a is b for a, b in zip((*args, *kwargs.values()), (*wide_args, *wide_kwargs.values()), strict=True)):
            raise
        return _most_symbolic(model, args, kwargs)
    return gm


def _most_symbolic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> GraphModule:
    attempts = _default_shapes(model, args, kwargs)
    for position, shapes in enumerate(attempts):
        last = position == len(attempts) - 1
        try:
            gm = _capture(model, args, kwargs, shapes)
        except CaptureError as error:
            if last or not isinstance(error.__cause__, dynamic_size_errors()):
                raise
            log.warning("symbolic sizes failed (%s); traced again with %s", _first_line(error.__cause__), _FEWER[position])
            continue
        trouble = None if last else _trouble_elsewhere(gm, model, args, kwargs)
        if trouble is None:
            return gm
        log.warning("the trace holds for one size only (%s); traced again with %s", trouble, _FEWER[position])
    raise AssertionError("the last attempt returns or raises")


_FEWER = ("a symbolic batch only", "fixed sizes")


def _capture(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], shapes: Any) -> GraphModule:
    with quiet(model), unchanged(model), torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The tensor attributes? .* assigned during export")  # it is put back
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # where torch prints its whole graph when it fails
                exported: Any = torch.export.export(model, args, kwargs, dynamic_shapes=shapes, strict=False)
            if any(_mutates(n) for n in exported.graph.nodes):
                with quiet_trees():
                    exported = exported.run_decompositions({})
        except Exception as error:
            raise _explain(model, error) from error
    if changed := sorted(set(exported.graph_signature.buffers_to_mutate.values())):
        log.warning("the model's forward changes its buffers (%s); the graph reads them as they are now", listed(changed, 3))
    gm: GraphModule = exported.module(check_guards=False)
    gm.meta = {key: value for key, value in gm.meta.items() if not key.startswith("fxprune.")}  # of a graph that was traced again
    canonicalise(gm, _adopt(gm, model))
    gm.meta[SIZES] = InputSizes(gm)
    return gm


def canonicalise(gm: GraphModule, owned: set[str]) -> None:
    """Make an exported graph canonical in place: regions inlined, assertions dropped, constants folded.

    Args:
        gm: Aten operators, without mutation.
        owned: Names of the model's own parameters and buffers: those are no constants.
    """
    _inline_regions(gm)
    _clean(gm)
    _fold(gm, owned)
    gm.graph.lint()
    gm.recompile()


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
    if not any(isinstance(v, Tensor) for v in torch.utils._pytree.tree_leaves((args, kwargs))):
        raise UsageError("inputs hold no tensor: pass for example {'input_ids': ids}")
    return args, kwargs


def _widen(value: Any) -> Any:
    """Examples of size 1 would specialise the trace (0/1 specialisation): use two rows, and two tokens."""
    if not isinstance(value, Tensor):
        return value
    for dim in (0, 1) if value.dim() == 2 and not value.is_floating_point() else (0,) if value.dim() else ():
        if value.shape[dim] == 1:
            value = value.repeat_interleave(2, dim)
    return value


def _default_shapes(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    """What to try, from the most symbolic to the least: batch and sequence, the batch, nothing."""
    return [_symbolic(model, args, kwargs, dims) for dims in (None, 1)] + [None]


def _symbolic(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], most: int | None) -> Any:
    auto = torch.export.Dim.AUTO

    def of(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return None
        free = value.dim() if not value.is_floating_point() else 2 if value.dim() == 3 else 1
        return dict.fromkeys(range(min(free, value.dim(), most or free)), auto) or None

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


def _trouble_elsewhere(gm: GraphModule, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    """Why a symbolic trace does not run at other sizes than the example's; None if it does, or if the model itself does not.

    Where a model computes with a size (chunks of a scan), `torch.export` may keep one result of that as a plain number. Sizes
    without division or remainder cannot go wrong that way, so most models are not run at all. No numbers are computed.
    """
    if all(size.expr.is_polynomial() for node in gm.graph.nodes for size in _symbolic_sizes(node)):
        return None
    examples = [v for node in gm.graph.nodes if node.op == "placeholder" for v in _values(node)]
    symbols = {
        size.expr: size
        for node in gm.graph.nodes
        if node.op == "placeholder"
        for size in _symbolic_sizes(node)
        if size.expr.is_symbol
    }
    convention = cast(Any, gm.graph._codegen).pytree_info.in_spec
    for more in (1, 5003):
        table = {symbol: _beyond(node, more) for symbol, node in symbols.items()}
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        with mode, torch.no_grad(), _silent("torch._subclasses.fake_tensor"):
            inputs = [_of_size(v, table) for v in examples]
            try:
                _Shapes(gm, mode).run(*inputs, enable_io_processing=False)
            except CANNOT_TELL:
                return None
            except Exception as error:  # noqa: BLE001 - whatever it is, the trace does not hold there
                elsewhere = torch.utils._pytree.tree_unflatten(inputs, convention)
                here = torch.utils._pytree.tree_map_only(Tensor, mode.from_tensor, (args, kwargs))
                own_limit = not _runs(model, *elsewhere) and _runs(model, *here)  # a table of positions ends there, for example
                return None if own_limit else _first_line(error)
    return None


def _runs(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a model takes inputs of these sizes at all, as far as tensors without numbers can tell."""
    with quiet(model):
        try:
            model(*args, **kwargs)
        except Exception:  # noqa: BLE001 - any reason will do
            return False
    return True


def _symbolic_sizes(node: Node) -> list[Any]:
    tensors = [v for v in _values(node) if isinstance(v, Tensor)]
    return [cast(Any, n).node for v in tensors for n in v.shape if not isinstance(n, int)]


@contextlib.contextmanager
def _silent(name: str) -> Iterator[None]:
    """What torch logs as an error on its own, before it raises it."""
    logger = logging.getLogger(name)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before


def _beyond(size: Any, more: int) -> int:
    """An allowed size of a symbolic dimension, larger than the example's if there is one."""
    upper = size.shape_env.var_to_range[size.expr].upper
    wanted: int = size.hint + more
    return min(wanted, int(upper)) if upper.is_Integer else wanted


def _of_size(value: Any, table: Mapping[Any, int]) -> Any:
    if not isinstance(value, Tensor):
        return value
    shape = [n if isinstance(n, int) else int(cast(Any, n).node.expr.subs(table)) for n in value.shape]
    return torch.empty(shape, dtype=value.dtype, device=value.device)


class _Shapes(Interpreter):
    """Runs a graph on tensors without numbers."""

    def __init__(self, gm: GraphModule, mode: FakeTensorMode) -> None:
        super().__init__(gm)
        self.mode = mode

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        return self.mode.from_tensor(value) if isinstance(value, Tensor) else value


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
    """Replace ``wrap_with_set_grad_enabled`` / ``wrap_with_autocast`` regions by their bodies; casts under autocast are lost."""
    regions = {"wrap_with_set_grad_enabled": 1, "wrap_with_autocast": 4}
    autocast = [n for n in gm.graph.nodes if getattr(n.target, "__name__", "") == "wrap_with_autocast" and n.args[2]]
    if autocast:
        log.warning(
            "the model's forward runs a part under torch.autocast (%s); the graph computes it in the model's own precision",
            str(autocast[0].args[1]).removeprefix("torch."),
        )
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
    remove_dead(gm.graph)
    gm.delete_all_unused_submodules()


_ASSERTIONS = ("_assert_", "sym_constrain_range", "_guards_fn")


def _clean(gm: GraphModule) -> None:
    """Drop assertions, then dead code."""
    for node in reversed(gm.graph.nodes):
        name = getattr(node.target, "__name__", str(node.target))
        if node.op in ("call_function", "call_module") and name.startswith(_ASSERTIONS) and not node.users:
            gm.graph.erase_node(node)
    remove_dead(gm.graph)


def remove_dead(graph: Graph) -> None:
    """Drop what nobody reads: attention too, which torch keeps for the random numbers that dropout may draw."""
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


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
    remove_dead(gm.graph)


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
