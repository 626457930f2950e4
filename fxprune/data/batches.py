"""Batches for training in an order that can be entered at any step: padded examples, or examples packed into full rows."""

from __future__ import annotations

import bisect
import copy
import math
from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError, nearest
from .examples import IGNORED, Examples

_GROUPED = 50
"""Without packing, examples are sorted by length within so many batches (as transformers' ``group_by_length``)."""


class Batches:
    """Batches of each epoch, a function of the seed, the epoch and the step: nothing before a step is needed to make it.

    A row is one example, or with ``packing`` several whole examples in ``length`` tokens. What is packed together is fixed by the
    seed (best-fit decreasing, within each source); every epoch visits the rows in an order of its own.

    A packed batch has no attention mask. ``position_ids`` begin at 0 at each example; from that transformers makes attention that
    does not cross examples (``masking_utils.find_packed_sequence_indices``), but only if there is no KV cache: call the model with
    ``use_cache=False``. Some models do not look at ``position_ids``: ask `fxprune.data.packs_apart` before packing for one.

    Args:
        examples: Not empty.
        batch_size: Rows of a batch; the last one of an epoch may have fewer.
        length: Tokens of a packed row, and the longest example allowed.
        packing: Whether to pack.
        pad_id: Token that fills rows up.
        seed: Of the order.
        weights: Share of each epoch's rows for each source, by name. An epoch keeps its number of rows; a source with a larger
            share than it has rows is repeated, one with a smaller share goes on in the next epoch where it stopped. By default
            every row once.

    Raises:
        UsageError: No examples, one that is longer than ``length``, a number that makes no sense, or weights that do not belong to
            the sources.
    """

    def __init__(
        self,
        examples: Examples,
        *,
        batch_size: int,
        length: int,
        packing: bool,
        pad_id: int,
        seed: int,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        if batch_size < 1 or length < 2:
            raise UsageError(f"batches need at least 1 row of 2 tokens, got {batch_size=}, {length=}")
        if not len(examples):
            raise UsageError("there are no examples to make batches of")
        longest = int(examples.lengths.max())
        if longest > length:
            raise UsageError(f"an example has {longest} tokens, more than a row of {length}: raise length or lower the cutoff")
        self.examples, self.batch_size, self.length = examples, batch_size, length
        self.packing, self.pad_id, self.seed = packing, pad_id, seed
        lengths, source = examples.lengths.tolist(), examples.source.numpy()
        self._rows: list[list[int]] = []
        self._of_source: list[np.ndarray] = []
        for number in range(len(examples.names)):
            members = np.flatnonzero(source == number).tolist()
            packed = _pack(members, lengths, length, self._random(number, 1)) if packing else [[i] for i in members]
            self._of_source.append(np.arange(len(self._rows), len(self._rows) + len(packed)))
            self._rows += packed
        self._used: list[int] = [sum(lengths[i] for i in row) for row in self._rows]
        self._cached: tuple[int, list[list[int]]] | None = None
        self._shares = None if weights is None else self._counts(weights, len(self._rows))
        self._first, self._before = 0, [0] * len(self._of_source)

    def __len__(self) -> int:
        """Steps of an epoch, the same for all."""
        return math.ceil((len(self._rows) if self._shares is None else sum(self._shares)) / self.batch_size)

    def drawn(self, weights: Mapping[str, float], *, steps: int, epoch: int, before: Mapping[str, int]) -> Batches:
        """The same rows with an epoch of another length and other weights, for a mixture that changes while it is read.

        Args:
            weights: Share of the epoch's tokens for each source, by name; of sources with shorter rows more rows are drawn.
            steps: Of the epoch; every batch is full.
            epoch: Its number: what to ask `batch` for.
            before: Rows of each source that were read until then; the source goes on from there.

        Raises:
            UsageError: The weights do not belong to the sources, or are no positive numbers.
        """
        made = copy.copy(self)
        lengths = self.row_tokens
        rows = {name: weight / lengths.get(name, 1.0) for name, weight in weights.items()}
        made._shares = self._counts(rows, steps * self.batch_size)
        made._first, made._before, made._cached = epoch, [before.get(name, 0) for name in self.examples.names], None
        return made

    @property
    def row_tokens(self) -> dict[str, float]:
        """Mean tokens of a row of each source that has rows."""
        named = zip(self.examples.names, self._of_source, strict=True)
        return {name: sum(self._used[r] for r in rows.tolist()) / len(rows) for name, rows in named if len(rows)}

    def taken(self, epoch: int) -> dict[str, tuple[int, int]]:
        """Rows and tokens of each source in an epoch."""
        chosen = np.array([row for rows in self._order(epoch) for row in rows])
        used = np.array(self._used)
        found = {}
        for name, members in zip(self.examples.names, self._of_source, strict=True):
            own = chosen[np.isin(chosen, members)]
            found[name] = len(own), int(used[own].sum())
        return found

    @property
    def fill(self) -> float:
        """Share of the tokens of epoch 0 that are no padding."""
        batches = self._order(0)
        used = sum(self._used[r] for rows in batches for r in rows)
        return used / sum(len(rows) * self._width(rows) for rows in batches)

    def epoch(self, number: int) -> list[list[int]]:
        """Indices of the examples in each batch of an epoch."""
        return [[i for row in batch for i in self._rows[row]] for batch in self._order(number)]

    def batch(self, epoch: int, index: int) -> dict[str, Tensor]:
        """One batch.

        Args:
            epoch: From 0.
            index: Step of the epoch, from 0.

        Returns:
            ``input_ids``, ``labels`` (-100 where nothing is learned: prompts, padding, the first token of every example) and
            ``position_ids``, int64 ``[rows, length]`` if packed, or as long as the batch's longest example with an
            ``attention_mask`` (1 for tokens, 0 for padding, on the right).
        """
        if not 0 <= index < len(self):
            raise IndexError(f"batch {index} of {len(self)}")
        rows = self._order(epoch)[index]
        width = self._width(rows)
        ids = torch.full((len(rows), width), self.pad_id)
        labels = torch.full((len(rows), width), IGNORED)
        positions = torch.arange(width).repeat(len(rows), 1)
        for place, row in enumerate(rows):
            begin = 0
            for i in self._rows[row]:
                example, wanted = self.examples[i]
                end = begin + len(example)
                ids[place, begin:end], labels[place, begin:end] = example, wanted
                positions[place, begin:] = torch.arange(width - begin)
                begin = end
            if self.packing:  # the padding is a last sequence of its own
                positions[place, begin:] = torch.arange(width - begin)
        batch = {"input_ids": ids, "labels": labels, "position_ids": positions}
        if not self.packing:
            used = torch.tensor([self._used[r] for r in rows])
            batch["attention_mask"] = (torch.arange(width) < used[:, None]).long()
        return batch

    def _width(self, rows: list[int]) -> int:
        return self.length if self.packing else max(self._used[r] for r in rows)

    def _random(self, *numbers: int) -> np.random.Generator:
        return np.random.Generator(np.random.PCG64([self.seed, *numbers]))

    def _counts(self, weights: Mapping[str, float], total: int) -> list[int]:
        """Rows of each source in an epoch: the largest remainders are rounded up."""
        names = self.examples.names
        for name, weight in weights.items():
            if name not in names:
                raise UsageError(f"there is a weight for '{name}', which is no source; {nearest(name, names)}")
            if not math.isfinite(weight) or weight <= 0:
                raise UsageError(f"the weight of '{name}' must be a positive number, got {weight}")
        missing = [name for name, members in zip(names, self._of_source, strict=True) if len(members) and name not in weights]
        if missing:
            raise UsageError(f"there is no weight for {', '.join(map(repr, missing))}: give each source one")
        shares = [weights[n] if len(members) else 0.0 for n, members in zip(names, self._of_source, strict=True)]
        exact = [total * share / sum(shares) for share in shares]
        counts = [math.floor(x) for x in exact]
        for i in sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])[: total - sum(counts)]:
            counts[i] += 1
        return counts

    def _order(self, epoch: int) -> list[list[int]]:
        """Rows of each batch of an epoch."""
        if epoch < 0:
            raise IndexError(f"epoch {epoch}")
        if self._cached is not None and self._cached[0] == epoch:
            return self._cached[1]
        random = self._random(epoch, 2)
        if self._shares is None:
            chosen = random.permutation(len(self._rows))
        else:
            parts = [self._visits(source, epoch, count) for source, count in enumerate(self._shares) if count]
            chosen = random.permutation(np.concatenate(parts))
        rows = chosen.tolist()
        if not self.packing:
            group = _GROUPED * self.batch_size
            rows = [r for i in range(0, len(rows), group) for r in sorted(rows[i : i + group], key=self._used.__getitem__)]
        batches = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
        if not self.packing:
            batches = [batches[i] for i in random.permutation(len(batches))]
        self._cached = (epoch, batches)
        return batches

    def _visits(self, source: int, epoch: int, count: int) -> np.ndarray:
        """The ``count`` rows of a source that are due in an epoch: its shuffled rows again and again, cut at epochs."""
        members = self._of_source[source]
        start = self._before[source] + (epoch - self._first) * count
        first, last = start // len(members), (start + count - 1) // len(members)
        rounds = np.concatenate([self._random(source, turn, 3).permutation(members) for turn in range(first, last + 1)])
        begin = start - first * len(members)
        return rounds[begin : begin + count]


def _pack(members: list[int], lengths: list[int], capacity: int, random: np.random.Generator) -> list[list[int]]:
    """Best-fit decreasing: the longest first, each into the row with the least space left that holds it.

    Examples of one length come in a random order. The spaces left are kept sorted; rows with the same space are a stack.
    """
    order = sorted(random.permutation(members).tolist(), key=lambda i: -lengths[i])
    rows: list[list[int]] = []
    spaces: list[int] = []
    open_rows: dict[int, list[int]] = {}
    for i in order:
        place = bisect.bisect_left(spaces, lengths[i])
        if place == len(spaces):
            space, row = capacity, len(rows)
            rows.append([])
        else:
            space = spaces[place]
            row = open_rows[space].pop()
            if not open_rows[space]:
                del open_rows[space], spaces[place]
        rows[row].append(i)
        left = space - lengths[i]
        if left not in open_rows:
            open_rows[left] = []
            bisect.insort(spaces, left)
        open_rows[left].append(row)
    return rows
