"""Calibration text: from a file, a ``datasets`` name, strings, or sampled from the model itself."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .errors import UsageError

Calibration: TypeAlias = "None | str | os.PathLike[str] | Sequence[str] | Sequence[Mapping[str, Tensor]]"

TEXT_FIELDS = ("text", "content", "document", "instruction")


def load_calibration(
    source: Calibration,
    *,
    model: nn.Module,
    tokenizer: Any = None,
    samples: int = 10,
    length: int = 64,
    seed: int = 0,
) -> tuple[list[Mapping[str, Tensor]], str]:
    """Calibration batches, and one line that says what they are.

    Args:
        source: None: ``samples`` sequences sampled from the model itself, seeded; no data is needed. A path to a ``.txt``,
            ``.json``, ``.jsonl`` file (``.gz`` too). A ``datasets`` name as ``name``, ``name:split`` or ``name:config:split``.
            A list of strings. Or a list of ready batches, used as they are.
        model: Samples its own text; gives the device.
        tokenizer: Needed for text.
        samples: Number of sequences; cut at seeded random places of the tokenised text.
        length: Tokens of each.
        seed: Of the sampling.

    Returns:
        (one batch ``{"input_ids": LongTensor [samples, length]}``, a description).

    Raises:
        UsageError: A missing file, too little text, no tokenizer, an unknown dataset or column.
    """
    if samples < 1 or length < 2:
        raise UsageError(f"calibration needs at least 1 sample of 2 tokens, got samples={samples}, length={length}")
    if source is None:
        return [{"input_ids": sample_from(model, samples, length, seed)}], f"{samples} x {length} tokens sampled from the model, seed {seed}"
    if not isinstance(source, str | os.PathLike):
        items = list(source)
        if items and all(isinstance(i, Mapping) for i in items):
            return items, f"{len(items)} batches given"  # type: ignore[return-value]
        if not items or not all(isinstance(i, str) for i in items):
            raise UsageError("calibration is a list of strings or of batches (mappings of tensors), and must not be empty")
        texts: Iterable[str] = items  # type: ignore[assignment]
        label = f"{len(items)} given texts"
    else:
        texts, label = read_texts(source), os.path.basename(os.fspath(source))
    if tokenizer is None:
        raise UsageError("calibration text needs a tokenizer: pass tokenizer=, or leave calibration out")
    ids = encode(tokenizer, texts, wanted=samples * length * 8)
    if len(ids) < length + 1:
        raise UsageError(f"the calibration text '{label}' has {len(ids)} tokens, fewer than one sample of {length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length, (samples,), generator=generator)
    batch = torch.stack([ids[s : s + length] for s in starts.tolist()])
    return [{"input_ids": batch}], f"{samples} x {length} tokens of {label}, seed {seed}"


def encode(tokenizer: Any, texts: Iterable[str], *, wanted: int | None = None) -> Tensor:
    """Token ids of texts joined by blank lines, a LongTensor ``[tokens]``; reads on until there are ``wanted`` tokens."""
    pieces: list[int] = []
    for chunk in _chunks(texts):
        pieces += tokenizer("\n\n".join(chunk), add_special_tokens=False)["input_ids"]
        if wanted is not None and len(pieces) >= wanted:
            break
    return torch.tensor(pieces, dtype=torch.long)


def _chunks(texts: Iterable[str], size: int = 256) -> Iterator[list[str]]:
    source = iter(t for t in texts if t.strip())
    while chunk := list(islice(source, size)):
        yield chunk


def read_texts(source: str | os.PathLike[str]) -> Iterable[str]:
    """Texts of a file or of a ``datasets`` name.

    Raises:
        UsageError: There is no such file or dataset, or no column of text in it.
    """
    name = os.fspath(source)
    path = Path(name)
    suffixes = [s for s in path.suffixes if s != ".gz"]
    if path.is_file():
        return _read_file(path, suffixes[-1] if suffixes else ".txt")
    if suffixes and suffixes[-1] in (".txt", ".json", ".jsonl", ".parquet", ".csv") or path.is_absolute() or name.startswith("."):
        raise UsageError(f"there is no file '{name}'")
    return _dataset(name)


def _read_file(path: Path, kind: str) -> Iterable[str]:
    opener = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as file:
        if kind == ".txt":
            return [line for line in file.read().split("\n") if line.strip()]
        if kind == ".jsonl":
            rows = [json.loads(line) for line in file if line.strip()]
        elif kind == ".json":
            rows = json.load(file)
        else:
            raise UsageError(f"'{path.name}' is neither .txt, .json nor .jsonl (.gz allowed)")
    return [_text_of(row, path.name) for row in rows]


def _text_of(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    field = next((f for f in TEXT_FIELDS if isinstance(row.get(f), str)), None)
    if field is None:
        raise UsageError(f"'{where}' has no column of text; it has {', '.join(row)}, wanted one of {', '.join(TEXT_FIELDS)}")
    return str(row[field])


def _dataset(name: str) -> Iterator[str]:
    import datasets

    repo, *rest = name.split(":")
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    try:
        rows = datasets.load_dataset(repo, config, split=split, streaming=True)
    except Exception as error:
        raise UsageError(
            f"'{name}' is neither a file nor a dataset that can be loaded ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "write name, name:split or name:config:split"
        ) from error
    return (_text_of(row, name) for row in rows)


def sample_from(model: nn.Module, samples: int, length: int, seed: int) -> Tensor:
    """Sequences drawn from the model at temperature 1: calibration without data.

    Args:
        model: A causal LM: called with ``input_ids`` it gives ``logits``.
        samples: Number of sequences.
        length: Tokens of each, after the start token.
        seed: Of the draws; the caller's random state is left alone.

    Returns:
        LongTensor ``[samples, length]``.

    Raises:
        UsageError: The model is no causal LM.
    """
    config = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = getattr(text, "vocab_size", None)
    if not isinstance(vocabulary, int):
        raise UsageError(f"{type(model).__name__} cannot sample its own calibration text (it has no vocabulary): pass calibration=")
    start = getattr(text, "bos_token_id", None)
    first = next(model.parameters())
    generator = torch.Generator(device="cpu").manual_seed(seed)
    known = isinstance(start, int) and 0 <= start < vocabulary
    ids = torch.full((samples, 1), start if known else 0, dtype=torch.long, device=first.device)
    was_training = model.training
    model.eval()
    cache: Any = None
    try:
        with torch.no_grad():
            for _ in range(length):
                step = ids if cache is None else ids[:, -1:]
                extra = {} if cache is None else {"past_key_values": cache}
                output = model(input_ids=step, **extra)
                if getattr(output, "logits", None) is None:
                    raise UsageError(f"{type(model).__name__} returns no logits: pass calibration=")
                cache = getattr(output, "past_key_values", None)
                chances = torch.softmax(output.logits[:, -1].float().cpu(), -1)
                drawn = torch.multinomial(chances, 1, generator=generator).to(first.device)
                ids = torch.cat([ids, drawn], 1)
    finally:
        model.train(was_training)
    return ids[:, 1:]


