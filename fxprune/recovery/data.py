"""What a recovery reads: examples to train on, examples held out, and what a report says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import islice, permutations
from typing import Any

from torch import nn

from ..calibration import check_known, warn_of_unknown
from ..data import Examples, Sketch, Source, Sources, by_name, check_overlap, documents, join, load_examples, parse_sources
from ..data.examples import SHUFFLED_TOKENS
from ..data.overlap import COMPARED, overlap
from ..errors import UsageError
from ..passes.batches import Progress
from ..wording import counted
from .curriculum import Curriculum
from .settings import Recovery

NO_TOKENIZER = (
    "text needs a tokenizer, and there is none beside the model: copy its files there (tokenizer.json, tokenizer_config.json), or "
    "pass tokenizer= in Python"
)

SHARED = 0.05
"""Share of one source's 13-word sequences in another from which on a report says so."""

REPEATED = 0.1
"""Share of held-out examples that are trained on too, from above which on a report says so: a few set phrases are in any text."""


@dataclass(frozen=True)
class Stage:
    """A stage of a curriculum.

    Attributes:
        train: Examples of its sources, named as `fxprune.recovery.curriculum.Curriculum.sources` names them.
        held: To measure each source on.
    """

    train: Examples
    held: dict[str, Examples]


@dataclass(frozen=True)
class TrainingData:
    """Examples of a recovery.

    Attributes:
        train: To train on.
        held: To measure on, or None.
        account: For the report.
        stages: Of a curriculum; ``train`` is then the first one's.
    """

    train: Examples
    held: Examples | None
    account: dict[str, Any]
    stages: tuple[Stage, ...] = ()

    @property
    def parts(self) -> tuple[Examples, ...]:
        """All that is trained on or measured on."""
        stages = [examples for stage in self.stages for examples in (stage.train, *stage.held.values())]
        return (*(stages or [self.train]), *([] if self.held is None else [self.held]))

    @property
    def fingerprint(self) -> str:
        """Of all that is trained on, and for a curriculum of what is held out of it."""
        if not self.stages:
            return self.train.fingerprint[:16]
        digest = hashlib.sha256()
        for stage in self.stages:
            digest.update(stage.train.fingerprint.encode() + stage.train.source.numpy().astype("<i8").tobytes())
            digest.update("".join(held.fingerprint for held in stage.held.values()).encode())
        return digest.hexdigest()[:16]


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
    sketches = {} if isinstance(data, Examples) else _sketches(by_name(data), validation, settings)
    if validation is None:
        train, kept = everything.split(min(settings.validation_samples, len(everything) // 10), settings.seed)
        held = kept if len(kept) else None
        of = f"held out of {', '.join(everything.names)}"
    else:
        train, held = everything, _examples(validation, tokenizer, settings, samples=None, progress=progress)
        of = ", ".join(held.names)
    account: dict[str, Any] = {"training": _described(train), "sketches": {n: s.to_json() for n, s in sketches.items()}}
    account["validation"] = None if held is None else {**_described(held), "sources": of}
    account["overlaps"] = [] if held is None else _repeated(train, held)
    return TrainingData(train, held, account)


def load_stages(
    curriculum: Curriculum,
    validation: tuple[Source, ...] | Examples | None,
    tokenizer: Any,
    settings: Recovery,
    *,
    progress: Progress | None = None,
) -> TrainingData:
    """Read a curriculum's sources, ``samples`` examples of each, and hold ``validation_samples`` of each out, at most a tenth.

    Args:
        curriculum: Names the sources.
        validation: More text to measure on, as for `load_data`; None for no more.
        tokenizer: For text.
        settings: The recovery's.
        progress: Called with (what, done, total).

    Raises:
        UsageError: As `load_data`; or nothing can be held out of a source.
    """
    if not settings.validation_samples:
        raise UsageError("a curriculum measures on examples held out of each source: validation_samples must be at least 1")
    train: dict[str, Examples] = {}
    held: dict[str, Examples] = {}
    for name, source in curriculum.sources.items():
        found = replace(_examples((source,), tokenizer, settings, samples=settings.samples, progress=progress), names=(name,))
        count = min(settings.validation_samples, len(found) // 10)
        if not count:
            raise UsageError(
                f"'{name}' comes to {counted(len(found), 'example')} of at most {settings.cutoff} tokens, and a tenth is held out "
                "to measure on: give text for at least 10, or lower cutoff"
            )
        train[name], held[name] = found.split(count, settings.seed)
    sketches = _sketches(curriculum.sources, validation, settings)
    repeated = _repeated(join(list(train.values())), join(list(held.values())))
    parts = [list(stage) for stage in curriculum.named()]
    stages = tuple(Stage(join([train[n] for n in names]), {n: held[n] for n in names}) for names in parts)
    more = None if validation is None else _examples(validation, tokenizer, settings, samples=None, progress=progress)
    account: dict[str, Any] = {
        "training": _described(join(list(train.values()))),
        "held_out": _described(join(list(held.values()))),
    }
    account["sketches"] = {n: s.to_json() for n, s in sketches.items()}
    account["overlaps"] = [*_overlaps(sketches), *repeated]
    account["validation"] = None if more is None else {**_described(more), "sources": ", ".join(more.names)}
    return TrainingData(stages[0].train, more, account, stages)


def _sketches(
    sources: Mapping[str, Source], validation: tuple[Source, ...] | Examples | None, settings: Recovery
) -> dict[str, Sketch]:
    """A small sketch of each source; validation text that is in one of them is refused."""
    sketches: dict[str, Sketch] = {}
    count = None if settings.samples is None else settings.samples + SHUFFLED_TOKENS // settings.cutoff
    compared = isinstance(validation, tuple)
    large: dict[str, Sketch] = {}
    for name, source in sources.items():
        sketches[name] = small = Sketch()
        large[name] = more = Sketch(limit=COMPARED)
        for text in islice(documents(source), count):
            small.add(text)
            if compared:
                more.add(text)
    if isinstance(validation, tuple):
        for source in validation:
            same = [
                name
                for name, s in sources.items()
                if s.file is not None and source.file is not None and s.file.samefile(source.file)
            ]
            if same:
                raise UsageError(f"the validation text '{source.label}' is the training text '{same[0]}' itself")
        check_overlap({name: documents(s) for name, s in by_name(validation).items()}, large)
    return sketches


def _overlaps(sketches: Mapping[str, Sketch]) -> list[str]:
    """What two sources have in common: held-out text of one may be trained on in the other."""
    found = []
    for one, other in permutations(sketches, 2):
        share = overlap(sketches[one], sketches[other])
        if share > SHARED:
            found.append(
                f"{share:.0%} of the 13-word sequences of '{one}' are in '{other}': its held-out text may be trained on there"
            )
    return found


def _repeated(train: Examples, held: Examples) -> list[str]:
    """What is measured on and trained on too, token by token; sketches do not see texts of a few words."""
    known = {ids.numpy().tobytes() for ids in train.ids.split(train.lengths.tolist())}
    count = sum(ids.numpy().tobytes() in known for ids in held.ids.split(held.lengths.tolist()))
    said = f"{count} of the {counted(len(held), 'example')} that recovery measures on are trained on too, word by word"
    return [f"{said}: what it measures looks better than it is"] if count > REPEATED * len(held) else []


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
        return given if samples is None or samples >= len(given) else given.select(range(samples))
    if tokenizer is None:
        raise UsageError(NO_TOKENIZER)
    examples = load_examples(
        given,
        tokenizer,
        samples=samples,
        cutoff=settings.cutoff,
        completion_only=settings.completion_only,
        seed=settings.seed,
        progress=progress,
    )
    warn_of_unknown(tokenizer, examples.ids, f"the text of {', '.join(examples.names)}")
    return examples


def check_tokens(examples: Examples, model: nn.Module) -> None:
    """See that the model knows every token.

    Raises:
        UsageError: A token is beyond the vocabulary: the tokenizer is another model's.
    """
    check_known(examples.ids, model, "the data")


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
