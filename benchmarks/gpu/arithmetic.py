"""Work that a model cannot do without: floating-point operations and bytes, and what share of a device's peak that comes to.

Operations of training are counted as in PaLM (arXiv 2204.02311, appendix B): 6 N + 12 L H Q T a token, with N parameters, L layers
of H heads of width Q, and T tokens of context; 2 N of the 6 N are the forward pass, 2 N the gradient of what the layers read and
2 N that of their weights. Frozen weights have none of the last, so a LoRA step takes 4 N + 6 N_adapters + 12 L H Q T. N counts the
weights of linear layers, the output embedding among them; looking up an input embedding takes no operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Work:
    """Sizes of a model that its work depends on.

    Attributes:
        linear: Weights of linear layers.
        attention: Query features (heads times width), summed over the layers: L H Q.
        cache: Key and value features that the KV cache holds for a token, summed over the layers.
        read: Parameters that a forward pass reads whole: all but an input embedding of its own.
        width: Bytes of a number.
    """

    linear: int
    attention: int
    cache: int
    read: int
    width: int

    @classmethod
    def of(cls, model: nn.Module) -> Work:
        """Of a Llama, pruned or not, as it is stored."""
        linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        embeddings = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
        for module in linear.values():
            embeddings.pop(id(module.weight), None)
        shapes = [(n.rpartition(".")[2], tuple(m.weight.shape)) for n, m in linear.items()]
        return cls(
            linear=sum(m.weight.numel() for m in linear.values()),
            attention=sum(inputs for name, (_, inputs) in shapes if name == "o_proj"),
            cache=sum(outputs for name, (outputs, _) in shapes if name in ("k_proj", "v_proj")),
            read=sum(p.numel() for p in model.parameters()) - sum(e.numel() for e in embeddings.values()),
            width=next(model.parameters()).element_size(),
        )

    def prefill_flops(self, batch: int, prompt: int) -> int:
        """Of reading prompts: 2 for each weight, and 4 for each feature and token that a token attends to (or itself)."""
        return batch * prompt * (2 * self.linear + 2 * self.attention * (prompt + 1))

    def decode_bytes(self, batch: int, context: int) -> int:
        """Read to write one token of each sequence: the weights once, and the KV cache of ``context`` tokens of each."""
        return self.width * (self.read + batch * context * self.cache)

    def training_flops(self, trained: int, context: float) -> float:
        """Of a token in training with frozen weights and ``trained`` adapter parameters; see the top of this file."""
        return 4 * self.linear + 6 * trained + 12 * self.attention * context


def mean_context(lengths: Sequence[int]) -> float:
    """T for examples of these lengths: tokens of the example that a token is in, the mean over all tokens."""
    return sum(n * n for n in lengths) / sum(lengths)


def utilisation(tokens_per_second: float, flops_per_token: float, peak_tflops: float) -> float:
    """Model FLOPs utilisation: operations of the model a second over the device's peak."""
    return tokens_per_second * flops_per_token / (peak_tflops * 1e12)


@dataclass(frozen=True)
class Gain:
    """A pruned model's time beside the dense one's.

    Attributes:
        speedup: Dense time over pruned time.
        ideal: What it would be if time were in proportion to the work.
        share: The first over the second: 1 is ideal.
        saved: Share of the time that could be saved that is saved: stricter, as 0 is no gain at all.
    """

    speedup: float
    ideal: float
    share: float
    saved: float

    @classmethod
    def of(cls, times: tuple[float, float], work: tuple[float, float]) -> Gain:
        """From (dense, pruned) times and work."""
        speedup, ideal = times[0] / times[1], work[0] / work[1]
        saved = (1 - 1 / speedup) / (1 - 1 / ideal)
        return cls(*(round(v, 4) for v in (speedup, ideal, speedup / ideal, saved)))
