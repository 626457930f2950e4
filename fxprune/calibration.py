"""Calibration text: from a file, a ``datasets`` name, strings, or sampled from the model itself."""

from __future__ import annotations

import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .errors import FxPruneError, UsageError

Calibration: TypeAlias = "str | os.PathLike[str] | Sequence[str] | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None"

SAMPLES, LENGTH, BATCH = 32, 128, 8
"""Defaults; LLM-Pruner takes 10 samples of 64 tokens."""

TEXT_FIELDS = ("text", "content", "document", "instruction")


def load_calibration(
    source: Calibration,
    *,
    model: nn.Module,
    tokenizer: Any = None,
    samples: int = SAMPLES,
    length: int = LENGTH,
    batch_size: int = BATCH,
    seed: int = 0,
) -> tuple[list[Mapping[str, Tensor]], str]:
    """Calibration batches, and one line that says what they are.

    Args:
        source: None: ``samples`` sequences sampled from the model itself, seeded; no data is needed. A path to a ``.txt``,
            ``.json``, ``.jsonl`` file (``.gz`` too). A ``datasets`` name as ``name``, ``name:split`` or ``name:config:split``.
            A list of strings. Or a ready batch or a list of them, used as they are.
        model: Samples its own text; gives the device.
        tokenizer: Needed for text.
        samples: Number of sequences; cut at seeded random places of the tokenised text.
        length: Tokens of each.
        batch_size: Samples in each batch; what is held in memory at a time.
        seed: Of the sampling.

    Returns:
        (batches ``{"input_ids": LongTensor [batch_size, length]}``, a description).

    Raises:
        UsageError: A missing or damaged file, too little text, no tokenizer, an unknown dataset or column, batches that hold
            something else than tensors.
        FxPruneError: The model's own text is not finite.
    """
    if samples < 1 or length < 2:
        raise UsageError(f"calibration needs at least 1 sample of 2 tokens, got samples={samples}, length={length}")
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    if source is None:
        ids = sample_from(model, samples, length, seed)
        return _batches(ids, batch_size), f"{samples} x {length} tokens sampled from the model, seed {seed}"
    texts: Iterable[str]
    if isinstance(source, str | os.PathLike):
        texts, label = read_texts(source), os.fspath(source)
        label = os.path.basename(label) if os.path.isfile(label) else label
    else:
        items: list[Any] = [source] if isinstance(source, Mapping) else list(source)
        if items and all(isinstance(i, Mapping) and i and all(isinstance(v, Tensor) for v in i.values()) for i in items):
            return items, f"{len(items)} batch{'es' if len(items) > 1 else ''} given"
        if not items or not all(isinstance(i, str) for i in items):
            raise UsageError("calibration is a list of strings or of batches (mappings of tensors), and must not be empty")
        texts, label = items, f"{len(items)} given texts"
    if tokenizer is None:
        raise UsageError("calibration text needs a tokenizer: pass tokenizer=, or leave calibration out")
    ids = encode(tokenizer, texts, wanted=samples * length * 8)
    if len(ids) < length:
        raise UsageError(f"the calibration text '{label}' has {len(ids)} tokens, fewer than one sample of {length}")
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length + 1, (samples,), generator=generator)
    rows = torch.stack([ids[s : s + length] for s in starts.tolist()])
    return _batches(rows, batch_size), f"{samples} x {length} tokens of {label}, seed {seed}"


def _batches(ids: Tensor, size: int) -> list[Mapping[str, Tensor]]:
    return [{"input_ids": part} for part in ids.split(size)]


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
        UsageError: There is no such file or dataset (the latter when it is read), or no column of text in it.
    """
    name = os.fspath(source)
    path = Path(name)
    suffixes = [s for s in path.suffixes if s != ".gz"]
    if path.is_file():
        return _read_file(path, suffixes[-1] if suffixes else ".txt")
    looks = path.suffix in (".txt", ".json", ".jsonl", ".parquet", ".csv", ".gz")
    if looks or path.is_absolute() or name.startswith("."):
        raise UsageError(f"there is no file '{name}'")
    return _dataset(name)


def _read_file(path: Path, kind: str) -> Iterable[str]:
    if kind not in (".txt", ".json", ".jsonl"):
        raise UsageError(f"'{path.name}' is neither .txt, .json nor .jsonl (.gz allowed)")
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            text = file.read()
        if kind == ".txt":
            return [line for line in text.split("\n") if line.strip()]
        rows = json.loads(text) if kind == ".json" else list(_lines(text))
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise UsageError(f"cannot read '{path.name}' as {kind[1:]}: {_reason(error)}") from error
    if not isinstance(rows, list):
        raise UsageError(f"'{path.name}' must hold a list of texts or of rows with a column of text, not a {type(rows).__name__}")
    return [_text_of(row, path.name) for row in rows]


def _lines(text: str) -> Iterator[Any]:
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                yield json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"line {number}, column {error.colno}: {error.msg}") from error


def _text_of(row: Any, where: str) -> str:
    if isinstance(row, str):
        return row
    if not isinstance(row, Mapping):
        raise UsageError(f"'{where}' must hold texts or rows with a column of text, not a {type(row).__name__}")
    field = next((f for f in TEXT_FIELDS if isinstance(row.get(f), str)), None)
    if field is None:
        raise UsageError(f"'{where}' has no column of text; it has {', '.join(row)}, wanted one of {', '.join(TEXT_FIELDS)}")
    return str(row[field])


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or ['no message'])[0]}"


def _dataset(name: str) -> Iterator[str]:
    import datasets

    repo, *rest = name.split(":")
    config = rest[0] if len(rest) == 2 else None
    split = rest[-1] if rest else "train"
    try:
        for row in datasets.load_dataset(repo, config, split=split, streaming=True):
            yield _text_of(row, name)
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"'{name}' is neither a file nor a dataset that can be loaded ({_reason(error)}); "
            "write name, name:split or name:config:split"
        ) from error


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
    known = vocabulary_of(model)
    if known is None:
        raise UsageError(f"{type(model).__name__} cannot sample its own calibration text (it has no vocabulary): pass calibration=")
    vocabulary, start = known
    device = next(model.parameters()).device
    if device.type == "meta":
        raise UsageError("the model is on the meta device and cannot sample its own calibration text: it has no weights")
    generator = torch.Generator(device="cpu").manual_seed(seed)
    ids = torch.full((samples, 1), start if 0 <= start < vocabulary else 0, dtype=torch.long, device=device)
    training = [m for m in model.modules() if m.training]
    model.eval()
    cache: Any = None
    try:
        with torch.no_grad():
            for _ in range(length):
                logits, cache = _next(model, ids, cache)
                drawn = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator).to(device)
                ids = torch.cat([ids, drawn], 1)
    finally:
        for module in training:
            module.training = True
    return ids[:, 1:]


def vocabulary_of(model: nn.Module) -> tuple[int, int] | None:
    """(size of the vocabulary, the token that starts a text or 0); None for a model that has no vocabulary."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size, start = getattr(text, "vocab_size", None), getattr(text, "bos_token_id", None)
    return (size, start if isinstance(start, int) else 0) if isinstance(size, int) else None


def _next(model: nn.Module, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
    """Logits of the next token, ``[samples, vocabulary]``, in float32 on the CPU, and the model's KV cache if it has one."""
    step = ids if cache is None else ids[:, -1:]
    try:
        output = model(input_ids=step, **({} if cache is None else {"past_key_values": cache}))
    except (
        TypeError,
        ValueError,
        IndexError,
    ) as error:  # too long for its positions, an encoder-decoder, or no language model at all
        raise UsageError(
            f"{type(model).__name__} cannot sample its own calibration text ({_reason(error)}): pass calibration="
        ) from error
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3:
        raise UsageError(f"{type(model).__name__} returns no logits of the next token: pass calibration=")
    last: Tensor = logits[:, -1].float().cpu()
    if not bool(torch.isfinite(last).all()):
        raise FxPruneError(f"the logits of {type(model).__name__} are NaN or infinite: the model is damaged, nothing was pruned")
    return last, getattr(output, "past_key_values", None)
