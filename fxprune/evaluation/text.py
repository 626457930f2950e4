"""Evaluation text as one stream of tokens: which rows a source has, and how a protocol joins them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..calibration import encode, read_texts
from ..data.sources import Source, text_lines
from ..errors import UsageError, nearest

PROTOCOLS = ("llm-pruner", "stream")
"""How rows become tokens.

``llm-pruner``: all rows, empty ones too, joined by blank lines and tokenised at once, with the special tokens that the tokenizer
adds by itself (LLM-Pruner, ``LLMPruner/datasets/ppl_dataset.py``; the same as GPTQ's). ``stream``: rows that hold nothing are
dropped, the rest is joined by blank lines and tokenised 256 rows at a time, without special tokens.
"""


def check_protocol(protocol: str) -> None:
    """Raise `UsageError` unless there is such a protocol."""
    if protocol not in PROTOCOLS:
        raise UsageError(f"unknown protocol '{protocol}'; {nearest(str(protocol), PROTOCOLS)}")


def token_stream(tokenizer: Any, rows: Sequence[str], *, protocol: str = PROTOCOLS[0]) -> Tensor:
    """The tokens of a text.

    Args:
        tokenizer: A Hugging Face tokenizer.
        rows: What `text_rows` gave for the same protocol.
        protocol: One of `PROTOCOLS`.

    Returns:
        LongTensor ``[tokens]``.

    Raises:
        UsageError: An unknown protocol.
    """
    check_protocol(protocol)
    if protocol == "stream":
        return encode(tokenizer, rows)
    return torch.tensor(tokenizer("\n\n".join(rows), verbose=False)["input_ids"], dtype=torch.long)


def text_rows(source: str | os.PathLike[str], *, name: str = "", protocol: str = PROTOCOLS[0], tokenizer: Any = None) -> list[str]:
    """The rows of a text; for ``llm-pruner`` as its Hugging Face dataset has them.

    Rows of ``.jsonl`` files and datasets are taken as they are. A line of a ``.txt`` file is a row; for ``llm-pruner`` without the
    white space around it, as in ``ptb_text_only``, or, if the text or its file is called ``wikitext...``, as in ``wikitext``: the
    line with its line end, and nothing for a blank line.

    Args:
        source: A ``.txt``, ``.json`` or ``.jsonl`` file (``.gz`` too), or a ``datasets`` name as ``name``, ``name:split`` or
            ``name:config:split``.
        name: What the text is called.
        protocol: One of `PROTOCOLS`.
        tokenizer: Its chat template writes conversations, see `fxprune.data.whole_text`.

    Raises:
        UsageError: A missing or damaged file, an unknown dataset or protocol, or a text without a word.
    """
    check_protocol(protocol)
    rows = list(read_texts(source, tokenizer)) if protocol == "stream" else _dataset_rows(source, name, tokenizer)
    if not any(row.strip() for row in rows):
        raise UsageError(f"the text '{name or os.fspath(source)}' is empty: there is nothing to predict")
    return rows


def _dataset_rows(source: str | os.PathLike[str], name: str, tokenizer: Any) -> list[str]:
    path = Path(source)
    if not os.path.isfile(path) or Source(os.fspath(source)).kind != ".txt":
        return list(read_texts(source, tokenizer))
    lines = text_lines(path)
    if any(label.lower().startswith("wikitext") for label in (name, path.name)):
        return [line + "\n" if line.strip() else "" for line in lines]
    return [line.strip() for line in lines]
