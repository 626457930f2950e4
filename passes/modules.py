"""Give parameters back to real submodules: ``aten.linear`` and its kin become calls of ``nn.Linear`` and its kin."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, Node

from ..rules.registry import bind

aten: Any = torch.ops.aten

_CONVOLUTIONS: dict[Any, Any] = {aten.conv1d.default: nn.Conv1d, aten.conv2d.default: nn.Conv2d, aten.conv3d.default: nn.Conv3d}


def to_modules(graph: Graph, root: nn.Module, aliases: Mapping[str, str]) -> None:
    """Replace functional calls by module calls where weight and bias are one module's own.

    Args:
        graph: Changed in place.
        root: Holds the parameters under their original names; the modules are put there, sharing the same tensors.
        aliases: Other names of tied parameters with the first name of each.
    """
    made: dict[str, Any] = {}
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in (aten.linear.default, aten.embedding.default, *_CONVOLUTIONS):
            continue
        arguments = bind(node)
        path = _path(node, arguments, root, aliases)
        if path is None:
            continue
        call_of = (node.target, {n: str(v) for n, v in arguments.items() if n not in ("input", "indices")})
        if path not in made:
            module = _module(node, arguments, root)
            if module is None:
                continue
            _install(root, path, module)
            made[path] = call_of
        elif made[path] != call_of:  # another use of the same weight: the module computes something else
            continue
        operand = arguments["indices"] if node.target is aten.embedding.default else arguments["input"]
        with graph.inserting_before(node):
            call = graph.call_module(path, (operand,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        graph.erase_node(node)
    for node in reversed(graph.nodes):
        if node.op == "get_attr" and not node.users:
            graph.erase_node(node)


def _path(node: Node, arguments: dict[str, Any], root: nn.Module, aliases: Mapping[str, str]) -> str | None:
    """The module whose ``weight`` (and ``bias``) these are; for tied weights the one that the call came from."""
    weight, bias = arguments["weight"], arguments.get("bias")
    if not isinstance(weight, Node) or weight.op != "get_attr" or not isinstance(_get(root, str(weight.target)), nn.Parameter):
        return None
    stack = node.meta.get("nn_module_stack") or {}
    last = next(reversed(stack.values()), None)
    called = last[0] if isinstance(last, tuple) else None
    if called and aliases.get(f"{called}.weight") == weight.target:
        path = str(called)
    elif str(weight.target).endswith(".weight"):
        path = str(weight.target).removesuffix(".weight")
    else:
        return None
    if isinstance(bias, Node):
        own = f"{path}.bias"
        if bias.op != "get_attr" or aliases.get(own, own) != bias.target:
            return None
    owner = _get(root, path)
    return path if owner is None or not set(dict(owner.named_parameters())) - {"weight", "bias"} else None


def _get(root: nn.Module, name: str) -> Any:
    value: Any = root
    for piece in name.split("."):
        value = getattr(value, piece, None)
    return value


def _module(node: Node, arguments: dict[str, Any], root: nn.Module) -> nn.Module | None:
    weight = _get(root, str(arguments["weight"].target))
    bias_node = arguments.get("bias")
    bias = None if bias_node is None else _get(root, str(bias_node.target))
    options: dict[str, Any] = {"device": "meta", "dtype": weight.dtype}
    module: nn.Module
    if node.target is aten.embedding.default:
        if arguments["scale_grad_by_freq"] or arguments["sparse"]:
            return None
        padding = arguments["padding_idx"]
        module = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=None if padding < 0 else padding, **options)
    elif node.target is aten.linear.default:
        if weight.dim() != 2:
            return None
        module = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, **options)
    else:
        groups = arguments["groups"]
        module = _CONVOLUTIONS[node.target](
            weight.shape[1] * groups,
            weight.shape[0],
            kernel_size=tuple(weight.shape[2:]),
            stride=tuple(arguments["stride"]),
            padding=tuple(arguments["padding"]),
            dilation=tuple(arguments["dilation"]),
            groups=groups,
            bias=bias is not None,
            **options,
        )
    module.weight = weight
    if bias is not None:
        module.bias = bias
    return module


def _install(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    owner = root
    for piece in parents:
        if piece not in owner._modules:
            owner.add_module(piece, nn.Module())
        owner = owner.get_submodule(piece)
    before = owner._modules.get(leaf) or nn.Module()
    for name, buffer in before._buffers.items():  # such as an embedding's scale
        module.register_buffer(name, buffer)
    for name, child in before._modules.items():
        module.add_module(name, child)
    owner._modules[leaf] = module
