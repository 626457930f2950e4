"""ChatGLM-6B's first architecture, the one that LLM-Pruner prunes, at a tiny size and from its published description.

What is awkward about it: queries, keys and values of one head lie next to each other in one projection; half of every head is
rotated by the position in the prompt and half by the position in the answer; the residual is the normalised input, scaled; the
sequence is the first dimension inside; the prompt is attended to in both directions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; no two that matter are equal.

    Attributes:
        vocabulary: Number of tokens.
        hidden: Width of the residual stream.
        heads: Attention heads.
        inner: Width of the feed-forward block.
        layers: Blocks.
        positions: Longest sequence.
        lookup: True if cosines and sines are looked up in tables, False if they are computed from the frequencies.
    """

    vocabulary: int = 97
    hidden: int = 96
    heads: int = 8
    inner: int = 160
    layers: int = 2
    positions: int = 32
    lookup: bool = True

    @property
    def width(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads


class Rotary(nn.Module):
    """Cosines and sines of positions, for one half of a head: pairs are dimension ``i`` and ``i + width / 4``."""

    inv_freq: Tensor
    cosines: Tensor
    sines: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.lookup, half = shape.lookup, shape.width // 2
        self.register_buffer("inv_freq", 10000.0 ** (-torch.arange(0, half, 2) / half))
        if self.lookup:
            angles = torch.outer(torch.arange(shape.positions), self.inv_freq).repeat(1, 2)
            self.register_buffer("cosines", angles.cos(), persistent=False)
            self.register_buffer("sines", angles.sin(), persistent=False)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """``(batch, seq)`` to two tensors ``(seq, batch, 1, width / 2)``."""
        at = positions.transpose(0, 1)
        if self.lookup:
            return F.embedding(at, self.cosines).unsqueeze(2), F.embedding(at, self.sines).unsqueeze(2)
        angles = at.unsqueeze(-1) * self.inv_freq
        angles = torch.cat((angles, angles), dim=-1).unsqueeze(2)
        return angles.cos(), angles.sin()


def rotate(x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
    """Turn every pair of the last dimension by its angle."""
    left, right = x.chunk(2, dim=-1)
    return x * angles[0] + torch.cat((-right, left), dim=-1) * angles[1]


class Attention(nn.Module):
    """Self-attention over ``(seq, batch, hidden)`` with one projection for all three."""

    def __init__(self, shape: Shape, number: int) -> None:
        super().__init__()
        self.heads, self.width, self.number = shape.heads, shape.width, number
        self.rotary = Rotary(shape)
        self.query_key_value = nn.Linear(shape.hidden, 3 * shape.hidden)
        self.dense = nn.Linear(shape.hidden, shape.hidden)

    def forward(self, x: Tensor, position_ids: Tensor, masked: Tensor) -> Tensor:
        """``masked`` is true where nothing may be attended to."""
        length, batch, _ = x.shape
        mixed = self.query_key_value(x).view(length, batch, self.heads, 3 * self.width)
        query, key, value = mixed.split(self.width, dim=-1)
        prompt, answer = self.rotary(position_ids[:, 0]), self.rotary(position_ids[:, 1])
        query, key = (self._turned(t, prompt, answer) for t in (query, key))
        query = query / (math.sqrt(self.width) * self.number)  # later layers have larger scores: half precision must hold them
        query, key, value = (t.reshape(length, batch * self.heads, self.width).transpose(0, 1) for t in (query, key, value))
        scores = torch.bmm(query, key.transpose(1, 2)).view(batch, self.heads, length, length)
        scores = scores.masked_fill(masked, -10000.0).float() * self.number
        weights = F.softmax(scores, dim=-1).to(value.dtype).view(batch * self.heads, length, length)
        context = torch.bmm(weights, value).view(batch, self.heads, length, self.width).permute(2, 0, 1, 3)
        return self.dense(context.reshape(length, batch, self.heads * self.width))

    @staticmethod
    def _turned(x: Tensor, prompt: tuple[Tensor, Tensor], answer: tuple[Tensor, Tensor]) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return torch.cat((rotate(first, prompt), rotate(second, answer)), dim=-1)


class FeedForward(nn.Module):
    """Up, GELU, down."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.dense_h_to_4h = nn.Linear(shape.hidden, shape.inner)
        self.dense_4h_to_h = nn.Linear(shape.inner, shape.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense_4h_to_h(F.gelu(self.dense_h_to_4h(x), approximate="tanh"))


class Block(nn.Module):
    """Attention and feed-forward; what goes round each is the *normalised* input, scaled up."""

    def __init__(self, shape: Shape, number: int) -> None:
        super().__init__()
        self.alpha = math.sqrt(2 * shape.layers)
        self.input_layernorm = nn.LayerNorm(shape.hidden)
        self.attention = Attention(shape, number)
        self.post_attention_layernorm = nn.LayerNorm(shape.hidden)
        self.mlp = FeedForward(shape)

    def forward(self, x: Tensor, position_ids: Tensor, masked: Tensor) -> Tensor:
        x = self.input_layernorm(x)
        x = x * self.alpha + self.attention(x, position_ids, masked)
        x = self.post_attention_layernorm(x)
        return x * self.alpha + self.mlp(x)


class ChatGLM(nn.Module):
    """The language model; its output projection is not tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(shape.vocabulary, shape.hidden)
        self.layers = nn.ModuleList(Block(shape, i + 1) for i in range(shape.layers))
        self.final_layernorm = nn.LayerNorm(shape.hidden)
        self.lm_head = nn.Linear(shape.hidden, shape.vocabulary, bias=False)

    def forward(self, input_ids: Tensor, position_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits ``(batch, seq, vocabulary)``.

        Args:
            input_ids: ``(batch, seq)``.
            position_ids: ``(batch, 2, seq)``: in the prompt, and in the answer.
            attention_mask: ``(batch, seq, seq)`` or ``(batch, 1, seq, seq)``, true where nothing may be attended to.
        """
        masked = attention_mask if attention_mask.dim() == 4 else attention_mask.unsqueeze(1)
        x = self.word_embeddings(input_ids).transpose(0, 1)
        for layer in self.layers:
            x = layer(x, position_ids, masked)
        return self.lm_head(self.final_layernorm(x)).transpose(0, 1)


def build_chatglm(shape: Shape | None = None) -> ChatGLM:
    """A model with random weights everywhere, biases and norms included, in evaluation mode."""
    torch.manual_seed(0)
    model = ChatGLM(shape or Shape())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.dim() == 1 else 0.05))
    return model.eval()


def prompts(lengths: list[int], length: int, *, seed: int = 0) -> dict[str, Tensor]:
    """Inputs for rows whose prompts have the given lengths, the answer making up ``length`` tokens."""
    prompt = torch.tensor(lengths)[:, None]
    at = torch.arange(length)[None]
    positions = torch.stack((torch.minimum(at, prompt - 1), (at - prompt + 1).clamp(min=0)), dim=1)
    seen = (at[:, None] < prompt[..., None]) | torch.ones(length, length, dtype=torch.bool).tril()
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(5, Shape.vocabulary, (len(lengths), length), generator=generator)
    return {"input_ids": tokens, "position_ids": positions, "attention_mask": ~seen}
