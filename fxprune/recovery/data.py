"""What a recovery reads: examples to train on, examples held out, and what a report says of them."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from typing import Any

from torch import nn

from ..data import Examples, Sketch, Source, Sources, check_overlap, documents, load_examples, parse_sources
from ..data.examples import SHUFFLED_TOKENS
from ..data.overlap import COMPARED
from ..errors import UsageError
from ..passes.batches import Progress
from .settings import Recovery


@dataclass(frozen=True)
class TrainingData:
    """Examples of a recovery.

    Attributes:
        train: To train on.
        held: To measure on, or None.
        account: For the report.
    """

    train: Examples
    held: Examples | None
    account: dict[str, Any]


def load_data(
    data: tuple[Source, ...] | Examples,
    validation: tuple[Source, ...] | Examples | None,
    tokenizer: Any,
    settings: Recovery,
    *,
    progress: Progress | None = None,
) -> TrainingData:
    """Read the data, and hold examples out of it unless there is other text to measure on.

    Args:
        data: Sources of text, or examples that were read already; see `sources_of`.
        validation: The same, to measure on; None holds ``validation_samples`` examples out of the data, at most a tenth of them.
        tokenizer: For text.
        settings: The recovery's.
        progress: Called with (what, done, total).

    Raises:
        UsageError: A source is empty or cannot be read, there is no tokenizer, or validation text is in the training text.
    """
    everything = _examples(data, tokenizer, settings, samples=settings.samples, progress=progress)
    sketches: dict[str, Sketch] = {}
    if not isinstance(data, Examples):
        count = None if settings.samples is None else settings.samples + SHUFFLED_TOKENS // settings.cutoff
        compared = isinstance(validation, tuple)
        large: dict[str, Sketch] = {}
        for source in data:
            sketches[source.label] = small = Sketch()
            large[source.label] = more = Sketch(limit=COMPARED)
            for text in islice(documents(source), count):
                small.add(text)
                if compared:
                    more.add(text)
        if isinstance(validation, tuple):
            check_overlap({s.label: documents(s) for s in validation}, large)
    if validation is None:
        train, kept = everything.split(min(settings.validation_samples, len(everything) // 10), settings.seed)
        held = kept if len(kept) else None
        of = f"held out of {', '.join(everything.names)}"
    else:
        train, held = everything, _examples(validation, tokenizer, settings, samples=None, progress=progress)
        of = ", ".join(held.names)
    account: dict[str, Any] = {"training": _described(train), "sketches": {n: s.to_json() for n, s in sketches.items()}}
    account["validation"] = None if held is None else {**_described(held), "sources": of}
    return TrainingData(train, held, account)


def _described(examples: Examples) -> dict[str, Any]:
    counts = examples.source.bincount(minlength=len(examples.names)).tolist()
    return {
        "sources": ", ".join(f"{name} ({count:,} examples)" for name, count in zip(examples.names, counts, strict=True)),
        "examples": len(examples),
        "tokens": examples.tokens,
        "fingerprint": examples.fingerprint[:16],
    }


def _examples(
    given: tuple[Source, ...] | Examples, tokenizer: Any, settings: Recovery, *, samples: int | None, progress: Progress | None
) -> Examples:
    if isinstance(given, Examples):
        if not len(given):
            raise UsageError("there are no examples to learn from")
        if int(given.lengths.max()) > settings.cutoff:
            longest = int(given.lengths.max())
            raise UsageError(f"an example has {longest} tokens, more than cutoff={settings.cutoff}: set it to {longest}")
        return given
    if tokenizer is None:
        raise UsageError("text needs a tokenizer, and there is none beside the model: pass tokenizer=")
    return load_examples(
        given,
        tokenizer,
        samples=samples,
        cutoff=settings.cutoff,
        completion_only=settings.completion_only,
        seed=settings.seed,
        progress=progress,
    )


def check_tokens(examples: Examples, model: nn.Module) -> None:
    """See that the model knows every token.

    Raises:
        UsageError: A token is beyond the vocabulary: the tokenizer is another model's.
    """
    rows = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    largest = int(examples.ids.max())
    if rows and largest >= max(rows):
        raise UsageError(f"the data has token {largest}, and the model knows {max(rows)}: the tokenizer belongs to another model")


def sources_of(given: Sources | Examples) -> tuple[Source, ...] | Examples:
    """What was given, read as sources; a mistyped one is refused before anything is loaded.

    Raises:
        UsageError: One cannot be read as a source, or is no file.
    """
    if isinstance(given, Examples):
        return given
    sources = parse_sources(given)
    for source in sources:
        _ = source.kind
    return sources
