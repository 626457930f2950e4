"""What is trained: LoRA adapters in the linear layers of an eager model or of a graph, or every parameter; and the merge."""

from __future__ import annotations

import copy
import fnmatch
import math
import warnings
import zlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from transformers.pytorch_utils import Conv1D

from .._compat import quiet_trees
from ..errors import UsageError, nearest
from .settings import Recovery

LINEAR = (nn.Linear, Conv1D)
ADAPTER = "default"


def twin(model: nn.Module) -> nn.Module:
    """A copy of a model with parameter objects of its own over the same memory; buffers are shared."""
    memo: dict[int, object] = {id(b): b for b in model.buffers()}
    memo |= {id(p): nn.Parameter(p.detach(), requires_grad=p.requires_grad) for p in model.parameters()}
    with quiet_trees():
        return copy.deepcopy(model, memo)


def prepare(model: nn.Module, settings: Recovery, *, wide: bool) -> nn.Module:
    """A copy of a model that is ready to be trained; the model itself stays as it is.

    Args:
        model: An eager model or a GraphModule with ``nn.Linear`` submodules.
        settings: Say what is trained.
        wide: Hold all weights in 32 bits, whatever they are stored in. What is trained is held so in any case.

    Returns:
        The copy, in training mode. Adapters start from ``settings.seed`` and their layer's name, so that an eager model and its
        graph start alike.

    Raises:
        UsageError: No layer can be adapted, a pattern matches none, a layer shares its weight, or everything is
            frozen.
    """
    student = twin(model)
    full = settings.method == "full"
    if wide or full:
        _widen(student)
    if full:
        if not trained(student):
            raise UsageError(
                f"every parameter of this {type(model).__name__} is frozen (requires_grad=False): thaw some, or train adapters"
            )
        for parameter in trained(student).values():
            parameter.data = parameter.data.clone()
        return student.train()
    targets = target_layers(student, settings)
    _inject(student, targets, settings)
    for path in targets:
        layer = student.get_submodule(path)
        generator = torch.Generator().manual_seed(zlib.crc32(f"{settings.seed} {path}".encode()))
        a, b = layer.get_parameter(f"lora_A.{ADAPTER}.weight"), layer.get_parameter(f"lora_B.{ADAPTER}.weight")
        with torch.no_grad():
            fresh = torch.empty(a.shape, dtype=torch.float32)
            a.copy_(nn.init.kaiming_uniform_(fresh, a=math.sqrt(5), generator=generator))
            b.zero_()
    return student.train()


def _widen(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.element_size() < 4:
            parameter.data = parameter.data.float()


def _inject(student: nn.Module, targets: list[str], settings: Recovery) -> None:
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type] # declared as int, and used as a number
        lora_dropout=settings.dropout,
        use_rslora=settings.rslora,
        target_modules=targets,
        fan_in_fan_out=any(isinstance(student.get_submodule(t), Conv1D) for t in targets),
    )
    with warnings.catch_warnings():  # peft corrects fan_in_fan_out itself for layers of the other kind, and says so
        warnings.simplefilter("ignore")
        try:
            inject_adapter_in_model(config, student, adapter_name=ADAPTER)
        except ValueError as error:
            reason = (str(error).splitlines() or ["ValueError"])[0]
            raise UsageError(f"peft refuses an adapter in this {type(student).__name__} ({reason}): name other targets") from error
    for parameter in student.parameters():
        if parameter.requires_grad and parameter.element_size() < 4:
            parameter.data = parameter.data.float()


def trained(student: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name; tied ones once."""
    return {name: parameter for name, parameter in student.named_parameters() if parameter.requires_grad}


def out_of_reach(model: nn.Module) -> tuple[int, str]:
    """(elements of the matrices that are in no linear layer and no embedding, so that no adapter of ours trains them; one's name).

    Such are the experts of a mixture, which transformers keep as one parameter for all of them, and convolutions.
    """
    reached = {id(m.weight) for m in model.modules() if isinstance(m, (*LINEAR, nn.Embedding))}
    rest = {n: p for n, p in model.named_parameters() if p.dim() > 1 and id(p) not in reached}
    return sum(p.numel() for p in rest.values()), max(rest, key=lambda name: rest[name].numel(), default="")


def target_layers(model: nn.Module, settings: Recovery) -> list[str]:
    """Paths of the layers that get an adapter.

    Raises:
        UsageError: There are none, a pattern matches none, or one shares its weight with another module: a merge would silently
            change that one too.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, LINEAR)}
    if not layers:
        raise UsageError(
            f"this {type(model).__name__} has no linear layer that could take an adapter; train every parameter with method=full"
        )
    names = {id(p): list[str]() for p in model.parameters()}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names[id(parameter)].append(name)
    shared = {n: others for n, m in layers.items() if len(others := names[id(m.weight)]) > 1}
    if settings.targets == "all":
        heads = set(_output_layers(model))
        found = [n for n in layers if n not in heads and n not in shared]
        if not found:
            raise UsageError(f"this {type(model).__name__} has no linear layer but its output embedding: name targets")
        return found
    found = []
    for pattern in settings.targets if not isinstance(settings.targets, str) else settings.targets.split(","):
        matching = [n for n in layers if fnmatch.fnmatchcase(n, pattern) or fnmatch.fnmatchcase(n, f"*.{pattern}")]
        if not matching:
            leaves = {n.rpartition(".")[2] for n in layers}
            raise UsageError(f"the target '{pattern}' matches no linear layer; {nearest(pattern, leaves)}")
        found += [n for n in matching if n not in found]
    for name in found:
        if name in shared:
            others = [n for n in shared[name] if n != f"{name}.weight"]
            raise UsageError(
                f"the target '{name}' shares its weight with '{others[0]}': merging an adapter into it would change both; leave it "
                "out, or untie them first"
            )
    return found


def _output_layers(model: nn.Module) -> Iterator[str]:
    """The layer that gives the logits: as the class says, or in a graph the last one before its first output."""
    if isinstance(model, GraphModule):
        node = next(n for n in reversed(model.graph.nodes) if n.op == "output")
        while node.all_input_nodes and node.op != "call_module":
            node = node.all_input_nodes[0]
        yield str(node.target)
        return
    find = getattr(model, "get_output_embeddings", None)
    head = None if find is None else find()
    yield from (n for n, m in model.named_modules() if m is head)


def merged(model: nn.Module, tensors: Mapping[str, Tensor], settings: Recovery) -> nn.Module:
    """The model with what was learnt in its weights.

    Adapters are added in 32 bits and rounded once to the dtype of the weight.

    Args:
        model: What `prepare` was given; it is not changed, and all weights that did not change are shared with it.
        tensors: The trained parameters, under their names in what `prepare` returned.
        settings: As for `prepare`.

    Returns:
        An ordinary model of the same class in evaluation mode, with the same frozen parameters.
    """
    made = twin(model)
    parameters = dict(made.named_parameters())
    if settings.method == "full":
        new = {id(parameters[n]): t for n, t in tensors.items()}
    else:
        scale = settings.alpha / (math.sqrt(settings.rank) if settings.rslora else settings.rank)
        new = {}
        for path in target_layers(made, settings):
            layer = made.get_submodule(path)
            weight = parameters[f"{path}.weight"]
            a, b = (tensors[f"{path}.lora_{x}.{ADAPTER}.weight"].to(weight.device) for x in "AB")
            delta = (b @ a) * scale
            new[id(weight)] = weight.detach().to(delta.dtype) + (delta.T if isinstance(layer, Conv1D) else delta)
    for parameter in parameters.values():
        if id(parameter) in new:
            parameter.data = new[id(parameter)].to(parameter.device, parameter.dtype, copy=True)
    return made.eval()
