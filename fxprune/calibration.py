"""Calibration text: from a file, a ``datasets`` name, strings, or sampled from the model itself."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .data.sources import parse_sources, reason
from .data.templates import texts
from .errors import FxPruneError, UsageError, check_seed, check_whole
from .mode import evaluating
from .wording import counted

log = logging.getLogger("fxprune")

Calibration: TypeAlias = "str | os.PathLike[str] | Sequence[str] | Mapping[str, Tensor] | Sequence[Mapping[str, Tensor]] | None"

SAMPLES, LENGTH, BATCH = 32, 128, 8
"""Defaults; LLM-Pruner takes 10 samples of 64 tokens."""


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
            ``.json``, ``.jsonl``, ``.csv`` or ``.parquet`` file (``.gz`` too). A ``datasets`` name as ``name``, ``name:split`` or
            ``name:config:split``. ``[column]`` after either names the column of text.
            A list of strings. Or a ready batch or a list of them, used as they are.
        model: Samples its own text; gives the device.
        tokenizer: Needed for text.
        samples: Number of sequences; cut at seeded random places of the tokenised text.
        length: Tokens of each; no more than the model reads.
        batch_size: Samples in each batch; what is held in memory at a time.
        seed: Of the sampling.

    Returns:
        (batches ``{"input_ids": LongTensor [batch_size, length]}``, a description).

    Raises:
        UsageError: A missing or damaged file, too little text, no tokenizer, an unknown dataset or column, batches that hold
            something else than tensors.
        FxPruneError: The model's own text is not finite.
    """
    for name, value, least in (("samples", samples, 1), ("length", length, 2), ("batch_size", batch_size, 1)):
        check_whole(name, value, least)
    check_seed(seed)
    length = min(length, longest_input(model) or length)
    if source is None:
        ids = sample_from(model, samples, length, seed)
        return _batches(ids, batch_size), f"{samples} x {length} tokens sampled from the model, seed {seed}"
    given: Iterable[str]
    if isinstance(source, str | os.PathLike):
        given, label = read_texts(source, tokenizer), os.fspath(source)
        label = os.path.basename(label) if os.path.isfile(label) else label
    else:
        items: list[Any] = [source] if isinstance(source, Mapping) else list(source)
        if items and all(isinstance(i, Mapping) and i and all(isinstance(v, Tensor) for v in i.values()) for i in items):
            return items, f"{counted(len(items), 'batch', 'batches')} given"
        if not items or not all(isinstance(i, str) for i in items):
            raise UsageError("calibration is a list of strings or of batches (mappings of tensors), and must not be empty")
        given, label = items, counted(len(items), "given text")
    if tokenizer is None:
        raise UsageError("calibration text needs a tokenizer: pass tokenizer=, or leave calibration out")
    ids = encode(tokenizer, given, wanted=samples * length * 8)
    warn_of_unknown(tokenizer, ids, f"the calibration text '{label}'")
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


def warn_of_unknown(tokenizer: Any, ids: Tensor, called: str) -> None:
    """Log a warning where more than half of a text is unknown to a tokenizer: what is measured on it says nothing.

    Args:
        tokenizer: That made the ids.
        ids: LongTensor of any shape.
        called: The text, for the message.
    """
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = float((ids == unknown).double().mean()) if isinstance(unknown, int) and ids.numel() else 0.0
    if share > 0.5:
        log.warning(
            "%s: %.0f %% of its tokens are unknown to the tokenizer; is it this model's, and is this its language?",
            called,
            100 * share,
        )


def _chunks(texts: Iterable[str], size: int = 256) -> Iterator[list[str]]:
    source = iter(t for t in texts if t.strip())
    while chunk := list(islice(source, size)):
        yield chunk


def read_texts(source: str | os.PathLike[str], tokenizer: Any = None) -> Iterable[str]:
    """Texts of a file or of a ``datasets`` name, as `fxprune.data.parse_sources` takes it; not a mixture.

    An instruction or a conversation is one text with its answer, as `fxprune.recover` reads it (`fxprune.data.whole_text`).

    Raises:
        UsageError: There is no such file or dataset (the latter when it is read), the file is damaged, there is no column of text
            in it, or several sources are named.
    """
    found = parse_sources(source)
    if len(found) > 1:
        raise UsageError(
            f"one source of text is read here, and '{os.fspath(source)}' names {len(found)}: put them into one file, or name one"
        )
    read = texts(found[0], tokenizer)
    return read if found[0].file is None else list(read)


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
    cache: Any = None
    with evaluating(model), torch.no_grad():
        for _ in range(length):
            logits, cache = _next(model, ids, cache)
            drawn = torch.multinomial(torch.softmax(logits, -1), 1, generator=generator).to(device)
            ids = torch.cat([ids, drawn], 1)
    return ids[:, 1:]


def vocabulary_of(model: nn.Module) -> tuple[int, int] | None:
    """(size of the vocabulary, the token that starts a text or 0); None for a model that has no vocabulary."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    size, start = getattr(text, "vocab_size", None), getattr(text, "bos_token_id", None)
    return (size, start if isinstance(start, int) else 0) if isinstance(size, int) else None


def known_tokens(model: nn.Module) -> int | None:
    """How many tokens a model has an embedding for; None for one without embeddings."""
    try:
        found: Any = model.get_input_embeddings()  # type: ignore[operator] # of transformers' models
    except (AttributeError, NotImplementedError):  # no such method, or transformers' "this class has none"
        found = None
    if isinstance(rows := getattr(getattr(found, "weight", None), "shape", (None,))[0], int):
        return rows
    return max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=None)


def check_known(ids: Tensor, model: nn.Module, called: str) -> None:
    """See that a model knows every token of a text.

    Args:
        ids: Token ids of any shape.
        model: That is to read them.
        called: The text, for the message.

    Raises:
        UsageError: A token is beyond the vocabulary: the tokenizer is another model's.
    """
    known, largest = known_tokens(model), int(ids.max()) if ids.numel() else 0
    if known is not None and largest >= known:
        raise UsageError(f"{called} has token {largest}, and the model knows {known}: the tokenizer belongs to another model")


def longest_input(model: nn.Module) -> int | None:
    """Tokens that the model was made for, None if it does not say."""
    config: Any = getattr(model, "config", None)
    try:
        text = config.get_text_config() if hasattr(config, "get_text_config") else config
    except ValueError:  # several text configurations, as of a text encoder and a decoder of sounds
        return None
    limit = getattr(text, "max_position_embeddings", getattr(text, "max_seq_len", None))  # the latter is MPT's name
    if not isinstance(limit, int) or limit <= 0:
        return None
    for name, module in model.named_modules():  # RoBERTa numbers positions from the one behind the padding's
        if isinstance(module, nn.Embedding) and name.endswith("position_embeddings") and module.padding_idx is not None:
            return limit - module.padding_idx - 1
    return limit


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
            f"{type(model).__name__} cannot sample its own calibration text ({reason(error)}): pass calibration="
        ) from error
    logits = getattr(output, "logits", None)
    if logits is None or logits.dim() != 3:
        raise UsageError(f"{type(model).__name__} returns no logits of the next token: pass calibration=")
    last: Tensor = logits[:, -1].float().cpu()
    if not bool(torch.isfinite(last).all()):
        raise FxPruneError(f"the logits of {type(model).__name__} are NaN or infinite: the model is damaged, nothing was pruned")
    return last, getattr(output, "past_key_values", None)
