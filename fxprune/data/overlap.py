"""Whether a text was seen before: small sketches of the 13-word sequences of texts, and the share that two have in common."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import UsageError

WORDS = 13
"""Words of an n-gram, as in the contamination studies of GPT-3 (Brown et al. 2020, appendix C) and in lm-eval."""

SHORTEST = 8
"""A line of at least so many words and fewer than `WORDS` is one n-gram; a shorter one tells nothing (also GPT-3's bound)."""

KEPT = 2000
COMPARED = 100_000
"""N-grams that a sketch holds at most: one to be saved, and one that is made just to compare."""

_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\uf900-\ufaff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_PRIME = np.uint64(0x9E3779B97F4A7C15)


class Sketch:
    """A small fingerprint of a text, built piece by piece.

    Words are runs of letters and digits, case-folded (each Chinese, Japanese or Korean character is one), so that spacing and
    punctuation do not matter; n-grams do not cross line ends, so that it does not matter how lines are joined, and their order
    does not matter. Of the different n-grams those are kept whose 64-bit hash is a multiple of ``modulus``, a power of two that
    doubles when more than ``limit`` are kept (Wegman's adaptive sampling): a sketch depends on the text only.

    Args:
        texts: What to begin with.
        limit: N-grams to keep at most; between a half and all of it are kept of a long text.
    """

    def __init__(self, texts: Iterable[str] = (), *, limit: int = KEPT) -> None:
        if limit < 1:
            raise UsageError(f"a sketch keeps at least 1 n-gram, got limit={limit}")
        self.limit, self.modulus = limit, 1
        self.kept: set[int] = set()
        for text in texts:
            self.add(text)

    def add(self, text: str) -> None:
        """Read one more text."""
        for line in text.splitlines():
            words = _WORD.findall(line.casefold())
            if len(words) < SHORTEST:
                continue
            hashes = _ngrams(np.array([_hash(w) for w in words], dtype=np.uint64))
            self.kept.update(hashes[hashes % np.uint64(self.modulus) == 0].tolist())
            while len(self.kept) > self.limit:
                self.modulus *= 2
                self.kept = {h for h in self.kept if h % self.modulus == 0}

    def __len__(self) -> int:
        return len(self.kept)

    def to_json(self) -> dict[str, Any]:
        """Plain data, for a report."""
        return {"limit": self.limit, "modulus": self.modulus, "ngrams": [f"{h:016x}" for h in sorted(self.kept)]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Sketch:
        """What `to_json` gave.

        Raises:
            UsageError: It is something else.
        """
        try:
            sketch = cls(limit=int(data["limit"]))
            sketch.modulus, sketch.kept = int(data["modulus"]), {int(h, 16) for h in data["ngrams"]}
            sound = sketch.modulus > 0 and sketch.modulus.bit_count() == 1 and not any(h % sketch.modulus for h in sketch.kept)
        except (KeyError, TypeError, ValueError) as error:
            raise UsageError(f"this is no sketch of a text: {type(error).__name__}: {error}") from error
        if not sound:
            raise UsageError("this is no sketch of a text: its n-grams do not belong to its modulus")
        return sketch


@lru_cache(maxsize=1 << 18)
def _hash(word: str) -> int:
    return int.from_bytes(hashlib.blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _ngrams(words: np.ndarray) -> np.ndarray:
    """A hash of each n-gram, uint64; a polynomial in the words' hashes modulo 2^64, mixed by splitmix64's finaliser."""
    size = min(len(words), WORDS)
    count = len(words) - size + 1
    found = np.full(count, size, dtype=np.uint64)
    for i in range(size):
        found = found * _PRIME + words[i : i + count]
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        found = (found ^ (found >> np.uint64(shift))) * np.uint64(factor)
    mixed: np.ndarray = found ^ (found >> np.uint64(31))
    return mixed


def overlap(of: Sketch, within: Sketch) -> float:
    """Share of the first text's n-grams that are in the second, between 0 and 1; 0 if it has none.

    Both sketches keep every n-gram whose hash is a multiple of the larger modulus: among those the share is exact, and it
    estimates that of the whole text with a standard error of at most ``0.5 / sqrt(their number)``.
    """
    modulus = max(of.modulus, within.modulus)
    asked = {h for h in of.kept if h % modulus == 0}
    return len(asked & within.kept) / len(asked) if asked else 0.0


def check_overlap(
    evaluation: Mapping[str, Iterable[str] | Sketch],
    training: Mapping[str, Iterable[str] | Sketch],
    *,
    limit: float = 0.01,
) -> None:
    """Refuse to evaluate on what was trained or calibrated on.

    Args:
        evaluation: Texts or sketches, by name.
        training: The same, of calibration or recovery.
        limit: Share of an evaluation text's n-grams that may be in a training text; chance and set phrases give a few (of PTB's
            validation text 1.6 % are in its training text).

    Raises:
        UsageError: An evaluation text has a larger share in common with a training text; names both, and the share.
    """
    if not 0 <= limit <= 1:
        raise UsageError(f"the limit of overlap is a share between 0 and 1, got {limit}")
    seen = {name: _sketch(texts) for name, texts in training.items()}
    for name, texts in evaluation.items():
        sketch = _sketch(texts)
        for other, within in seen.items():
            share = overlap(sketch, within)
            if share > limit:
                raise UsageError(
                    f"the evaluation text '{name}' overlaps with the training text '{other}': {share:.1%} of its {WORDS}-word "
                    f"sequences are in it, more than {limit:.1%}: choose another text for one of them"
                )


def _sketch(texts: Iterable[str] | Sketch) -> Sketch:
    return texts if isinstance(texts, Sketch) else Sketch(texts, limit=COMPARED)
