"""Token ids of many examples: drawn from a mixture of sources, tokenised, cut, and kept compactly."""

from __future__ import annotations

import hashlib
import logging
import random
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..passes.batches import Progress
from .sources import Source, Sources, parse_sources
from .templates import Example, each, render

log = logging.getLogger("fxprune")

IGNORED = -100
"""The label that `torch.nn.functional.cross_entropy` and transformers leave out of the loss."""

SHUFFLED_TOKENS = 2**21
"""A stream of examples is shuffled within a buffer of so many tokens, so that it need not be read to its end."""

_AT_ONCE = 256
_LITTLE = 1000  # examples of a source that may be left unread without a word, and a tenth of what was read

_Item = TypeVar("_Item")
_Piece = tuple[list[int], int]  # token ids, and how many of them are prompt


@dataclass(frozen=True)
class Examples:
    """Token ids of many examples, end to end.

    Attributes:
        ids: int32 ``[tokens]``.
        starts: int64 ``[n + 1]``; example i is ``ids[starts[i] : starts[i + 1]]``.
        prompts: int64 ``[n]``, leading tokens of each example that are not learned.
        source: int64 ``[n]``, where each example is from, an index into ``names``.
        names: Labels of the sources.
        fingerprint: SHA-256 (hex) of ``ids``, ``starts`` and ``prompts``.
    """

    ids: Tensor
    starts: Tensor
    prompts: Tensor
    source: Tensor
    names: tuple[str, ...]
    fingerprint: str

    @classmethod
    def of_ids(cls, rows: Iterable[Sequence[int] | Tensor], label: str = "ids") -> Examples:
        """Token ids as they are: each row one example, of which every token but the first is learned.

        Args:
            rows: Lists of token ids or integer tensors ``[tokens]``, of any lengths above 1.
            label: What they are called.

        Raises:
            UsageError: There are no rows, or one is no list of at least two whole numbers.
        """
        parts = [torch.as_tensor(row) for row in rows]
        if not parts:
            raise UsageError(f"'{label}' is empty: it has no rows")
        for number, part in enumerate(parts):
            if part.dim() != 1 or len(part) < 2 or part.is_floating_point():
                raise UsageError(f"row {number} of '{label}' is no list of at least two token ids")
        nothing = torch.zeros(len(parts), dtype=torch.long)
        lengths = torch.tensor([len(part) for part in parts])
        return _examples(torch.cat(parts).to("cpu", torch.int32), lengths, nothing, nothing, (label,))

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Ids and labels of one example, int64 ``[its tokens]``; the labels of its prompt and of its first token are -100."""
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        ids = self.ids[int(self.starts[index]) : int(self.starts[index + 1])].long()
        labels = ids.clone()
        labels[: max(int(self.prompts[index]), 1)] = IGNORED
        return ids, labels

    @property
    def tokens(self) -> int:
        """Tokens of all examples."""
        return len(self.ids)

    @property
    def lengths(self) -> Tensor:
        """Tokens of each example, int64 ``[n]``."""
        return self.starts.diff()

    def select(self, indices: Sequence[int]) -> Examples:
        """Some of the examples, in the order given."""
        chosen = torch.tensor(indices, dtype=torch.long)
        lengths = self.lengths[chosen]
        parts = [self.ids[a : a + n] for a, n in zip(self.starts[chosen].tolist(), lengths.tolist(), strict=True)]
        ids = torch.cat(parts) if parts else self.ids[:0]
        return _examples(ids, lengths, self.prompts[chosen], self.source[chosen], self.names)

    def split(self, validation: int, seed: int = 0) -> tuple[Examples, Examples]:
        """(training, validation): ``validation`` examples held out, drawn without replacement.

        Raises:
            UsageError: ``validation`` is negative or leaves nothing to train on.
        """
        if not 0 <= validation < len(self):
            raise UsageError(f"validation takes between 0 and {len(self) - 1} of the {len(self)} examples, got {validation}")
        order = torch.randperm(len(self), generator=torch.Generator().manual_seed(seed))
        held, rest = order[:validation].sort().values, order[validation:].sort().values
        return self.select(rest.tolist()), self.select(held.tolist())


def join(parts: Sequence[Examples]) -> Examples:
    """Examples of several sources end to end, each part with sources of its own."""
    first = [sum(len(p.names) for p in parts[:i]) for i in range(len(parts))]
    source = torch.cat([p.source + n for p, n in zip(parts, first, strict=True)])
    ids, lengths, prompts = (torch.cat(t) for t in ([p.ids for p in parts], [p.lengths for p in parts], [p.prompts for p in parts]))
    return _examples(ids, lengths, prompts, source, tuple(name for p in parts for name in p.names))


def _examples(ids: Tensor, lengths: Tensor, prompts: Tensor, source: Tensor, names: tuple[str, ...]) -> Examples:
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    digest = hashlib.sha256()
    for part, kind in ((ids, "<i4"), (starts, "<i8"), (prompts, "<i8")):
        digest.update(part.numpy().astype(kind, copy=False).tobytes())
    return Examples(ids, starts, prompts, source, names, digest.hexdigest())


def load_examples(
    sources: Sources,
    tokenizer: Any,
    *,
    samples: int | None = None,
    cutoff: int = 256,
    completion_only: bool = False,
    seed: int = 0,
    skip_empty: bool = True,
    progress: Progress | None = None,
) -> Examples:
    """Examples from one source or a mixture.

    An instruction or a conversation is one example; what is beyond ``cutoff`` is lost. A longer text is cut into several
    examples, the last one shorter; the lines of a text file are running text, joined by blank lines. The tokenizer's end token
    ends each text that was not cut, and its start token starts each text if it adds one itself, both as in LLM-Pruner's
    ``post_training.py``. Every source is shuffled, seeded, within a buffer of `SHUFFLED_TOKENS`.

    Of several sources examples are taken in proportion to the weights, at any time within one example of the exact share, until
    there are ``samples`` or a source has none left: nothing is repeated (``first_exhausted`` of
    `datasets.interleave_datasets`). With the same seed the examples of a smaller ``samples`` are the first of a larger one.

    Args:
        sources: As for `parse_sources`.
        tokenizer: A transformers tokenizer.
        samples: Examples wanted; by default as many as there are.
        cutoff: Tokens of the longest example.
        completion_only: Learn the completion only, not the prompt before it.
        seed: Of the shuffling.
        skip_empty: Leave out rows without a completion (28 rows of Alpaca). False keeps those that have a prompt.
        progress: Called with (what, done, total).

    Raises:
        UsageError: A source cannot be read, has no column of text, or has nothing to learn in it; a number makes no sense.
    """
    if cutoff < 2 or (samples is not None and samples < 1):
        raise UsageError(f"examples need a cutoff of at least 2 tokens and at least 1 sample, got {cutoff=}, {samples=}")
    chosen = parse_sources(sources)
    readers = [_Reader(s, tokenizer, cutoff, completion_only, skip_empty) for s in chosen]
    size = max(SHUFFLED_TOKENS // cutoff, _AT_ONCE)
    streams = [_shuffled(iter(reader), size, f"{seed} {i}") for i, reader in enumerate(readers)]
    total = sum(s.weight for s in chosen)
    ids, lengths, prompts, source, taken = array("i"), array("q"), array("q"), array("q"), [0] * len(chosen)
    while samples is None or len(lengths) < samples:
        due = max(range(len(chosen)), key=lambda i: chosen[i].weight / total * (len(lengths) + 1) - taken[i])
        piece = next(streams[due], None)
        if piece is None:
            _exhausted(readers[due], taken[due], len(lengths), samples)
            if samples is None:
                _unread(readers[due], [(r, n, s) for r, n, s in zip(readers, taken, streams, strict=True) if r is not readers[due]])
            break
        ids.extend(piece[0])
        lengths.append(len(piece[0]))
        prompts.append(piece[1])
        source.append(due)
        taken[due] += 1
        if progress is not None and len(lengths) % _AT_ONCE == 0:
            progress("reading examples", len(lengths), samples or len(lengths))
    for reader, count in zip(readers, taken, strict=True):
        log.info("%s: %d examples taken, %s", reader.source.label, count, reader.account())
    numbers = [torch.from_numpy(np.frombuffer(a, dtype=np.int64).copy()) for a in (lengths, prompts, source)]
    flat = torch.from_numpy(np.frombuffer(ids, dtype=np.int32).copy())
    return _examples(flat, numbers[0], numbers[1], numbers[2], tuple(s.label for s in chosen))


def _shuffled(items: Iterator[_Piece], size: int, seed: str) -> Iterator[_Piece]:
    """Items in a random order: each is drawn from the next ``size`` of them (as datasets' ``IterableDataset.shuffle``)."""
    generator, buffer = random.Random(seed), list(islice(items, size))
    for item in items:
        place = generator.randrange(size)
        yield buffer[place]
        buffer[place] = item
    generator.shuffle(buffer)
    yield from buffer


def _exhausted(reader: _Reader, taken: int, got: int, samples: int | None) -> None:
    label = reader.source.label
    if not taken:
        if not reader.rows:
            raise UsageError(f"'{label}' is empty: it has no rows")
        raise UsageError(f"'{label}' has nothing to learn from: {reader.account()}")
    if samples is not None:
        log.warning("%s has only %d examples: %d are taken of the %d asked for", label, taken, got, samples)


def _unread(ended: _Reader, others: list[tuple[_Reader, int, Iterator[_Piece]]]) -> None:
    """Say that a mixture ended with one of its sources, and more than a little of the others was not read."""
    left = []
    for reader, taken, stream in others:
        little = min(taken // 10 + 1, _LITTLE)
        if len(list(islice(stream, little + 1))) > little:
            left.append(f"'{reader.source.label}'")
    if left:
        log.warning(
            "'%s' has no more examples, and the mixture ends with it: the rest of %s is not read; to read more, give the sources "
            "weights by their sizes",
            ended.source.label,
            " and ".join(left),
        )


class _Reader:
    """The examples of one source, in its order, and a count of what was left out."""

    def __init__(self, source: Source, tokenizer: Any, cutoff: int, completion_only: bool, skip_empty: bool) -> None:
        self.source, self.tokenizer, self.cutoff = source, tokenizer, cutoff
        self.completion_only, self.skip_empty = completion_only, skip_empty
        self.rows = self.empty = self.unlearned = 0
        first = tokenizer("a")["input_ids"][:1]
        self.start = first if first and first[0] == tokenizer.bos_token_id else []
        self.end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def account(self) -> str:
        """What was read and left out."""
        skipped = [f"{self.empty} without text to learn"] * bool(self.empty)
        skipped += [f"{self.unlearned} with nothing to learn within {self.cutoff} tokens"] * bool(self.unlearned)
        return f"{self.rows} rows read{', ' if skipped else ''}{' and '.join(skipped)}"

    def __iter__(self) -> Iterator[_Piece]:
        pieces = self._running() if self.source.kind == ".txt" and self.source.column is None else self._separate()
        for ids, prompt in pieces:
            if len(ids) > max(prompt, 1):
                yield ids, prompt
            else:
                self.unlearned += 1

    def _separate(self) -> Iterator[_Piece]:
        for chunk in _chunks(self._rendered()):
            whole = self._tokens([e.prompt + e.completion for e in chunk])
            known = self._tokens([e.prompt for e in chunk]) if self.completion_only else [[] for _ in chunk]
            for example, ids, prompt in zip(chunk, whole, known, strict=True):
                text = example.prompt + example.completion
                bos = [] if self._has(text, "bos_token") else self.start
                eos = [] if self._has(text, "eos_token") else self.end
                full = [*bos, *ids, *eos]
                if example.prompt:
                    yield full[: self.cutoff], min(self._shared(prompt, ids, len(bos)), self.cutoff)
                else:
                    yield from self._cut(full)

    def _shared(self, prompt: list[int], ids: list[int], start: int) -> int:
        """Tokens that the prompt alone and the whole text begin with; a token across the boundary is learned."""
        if not self.completion_only:
            return 0
        return start + next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))

    def _cut(self, ids: list[int]) -> Iterator[_Piece]:
        """Pieces of ``cutoff`` tokens; a last single token would be nothing to learn and is dropped."""
        for begin in range(0, max(len(ids), 1), self.cutoff):
            piece = ids[begin : begin + self.cutoff]
            if begin == 0 or len(piece) > 1:
                yield piece, 0

    def _running(self) -> Iterator[_Piece]:
        rest, started = list(self.start), False
        for chunk in _chunks(e.completion for e in self._rendered()):
            text = ("\n\n" if started else "") + "\n\n".join(chunk)
            rest, started = rest + self._tokens([text])[0], True
            whole = len(rest) // self.cutoff * self.cutoff
            for begin in range(0, whole, self.cutoff):
                yield rest[begin : begin + self.cutoff], 0
            rest = rest[whole:]
        if started and len(rest) + len(self.end) > 1:
            yield from self._cut(rest + self.end)

    def _rendered(self) -> Iterator[Example]:
        for example in each(self.source, lambda row: render(row, self.source, self.tokenizer)):
            self.rows += 1
            if example.completion.strip() or (example.prompt and not self.skip_empty):
                yield example
            else:
                self.empty += 1

    def _tokens(self, texts: list[str]) -> list[list[int]]:
        found: list[list[int]] = self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        return found

    def _has(self, text: str, name: str) -> bool:
        """Whether a chat template has already written the start or end token."""
        token = getattr(self.tokenizer, name)
        return bool(token) and (text.startswith(token) if name == "bos_token" else text.rstrip().endswith(token))


def _chunks(items: Iterable[_Item]) -> Iterator[list[_Item]]:
    source = iter(items)
    while chunk := list(islice(source, _AT_ONCE)):
        yield chunk
