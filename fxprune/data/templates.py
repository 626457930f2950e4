"""A row of a data set as a prompt and a completion: plain text, Stanford Alpaca, TRL's pairs, or a tokenizer's chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from ..errors import UsageError, nearest
from .sources import COLUMNS, Source, reason, rows, text_of

ALPACA_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{instruction}\n\n### Response:\n"
)
"""The prompts of tatsu-lab/stanford_alpaca (``train.py``), with the line break after ``Response:`` that LLM-Pruner trains with
(``templates/alpaca.json``)."""

CHAT_COLUMNS = ("messages", "conversations")
PAIR = COLUMNS["prompt"]
TOOLS = ("tool_calls", "tool_call_id", "name")
"""What a turn may have beside its words; a chat template that knows of tools writes it."""
ROLES = {"human": "user", "gpt": "assistant", "model": "assistant", "bot": "assistant"}
"""Names of roles in ``from``/``value`` conversations (ShareGPT), as chat templates name them."""

_Made = TypeVar("_Made")


@dataclass(frozen=True)
class Example:
    """A text to learn from.

    Attributes:
        prompt: What is given; empty for plain text.
        completion: What is to be written after it, or the whole of a plain text. Empty if the row holds none.
    """

    prompt: str
    completion: str


def render(row: Mapping[str, Any], source: Source, tokenizer: Any = None) -> Example:
    """The prompt and the completion of a row.

    ``alpaca``: columns ``instruction``, ``output`` and, if there is one, ``input``. ``prompt``: columns ``prompt`` and
    ``completion``, one after the other as they are (TRL's prompt-completion format). ``chat``: a list of turns, as
    ``role``/``content`` or ``from``/``value``, in the column ``messages`` or ``conversations``, or in the two of ``prompt``; the
    last turn of the assistant is the completion, what follows it is dropped. ``text``: the source's column, see `text_of`.
    ``auto`` takes chat if there is such a list, alpaca or prompt if their columns are there, or else text.

    Args:
        row: One row of ``source``.
        source: Says the template and the column.
        tokenizer: A transformers tokenizer with a chat template; needed for ``chat`` only.

    Raises:
        UsageError: A column is missing or of another type, a turn cannot be read, or the tokenizer has no chat template.
    """
    template = _template(row, source)
    if template == "chat":
        return _chat(_turns(row, source), source, tokenizer)
    if template == "alpaca":
        instruction, given, output = _columns(row, source, template)
        prompt = ALPACA_INPUT if given else ALPACA
        return Example(prompt.format(instruction=instruction, input=given), output)
    if template == "prompt":
        return Example(*_columns(row, source, template))
    return Example("", text_of(row, source))


def whole_text(row: Mapping[str, Any], source: Source, tokenizer: Any = None) -> str:
    """A row as running text: its prompt and its completion, one after the other.

    Args:
        row: One row of ``source``.
        source: Says the template and the column.
        tokenizer: Of a conversation its chat template writes the turns; without one they stand line by line.

    Raises:
        UsageError: As `render`.
    """
    if _template(row, source) == "chat" and getattr(tokenizer, "chat_template", None) is None:
        return contents(row, source)
    example = render(row, source, tokenizer)
    return example.prompt + example.completion


def texts(source: Source, tokenizer: Any = None) -> Iterator[str]:
    """`whole_text` of each row of a source.

    Raises:
        UsageError: As `rows` and `render`.
    """
    return each(source, lambda row: whole_text(row, source, tokenizer))


def contents(row: Mapping[str, Any], source: Source) -> str:
    """All words of a row without those of a template, a line break between its parts."""
    template = _template(row, source)
    if template == "chat":
        return "\n".join(turn["content"] for turn in _turns(row, source))
    if template == "text":
        return text_of(row, source)
    return "\n".join(_columns(row, source, template))


def documents(source: Source) -> Iterator[str]:
    """`contents` of every row: what two sources are compared by."""
    return each(source, lambda row: contents(row, source))


def each(source: Source, make: Callable[[Mapping[str, Any]], _Made]) -> Iterator[_Made]:
    """What is made of each row of a source, one after the other.

    Raises:
        UsageError: As `rows`; what ``make`` raises on a row after the first is raised with the row's number (from 1 on).
    """
    found = rows(source)  # a file that cannot be read at all is refused at once

    def made() -> Iterator[_Made]:
        for number, row in enumerate(found, start=1):
            try:
                yield make(row)
            except UsageError as error:
                if number == 1:
                    raise
                raise UsageError(f"{error} (in row {number})") from error

    return made()


def _template(row: Mapping[str, Any], source: Source) -> str:
    if source.template != "auto":
        return source.template
    columns = CHAT_COLUMNS if source.column is None else (source.column,)
    if any(isinstance(row.get(c), list) for c in columns):
        return "chat"
    if source.column is not None:
        return "text"
    if all(isinstance(row.get(c), list) for c in PAIR):
        return "chat"
    return "alpaca" if "instruction" in row and "output" in row else "prompt" if all(c in row for c in PAIR) else "text"


def _columns(row: Mapping[str, Any], source: Source, template: str) -> tuple[str, ...]:
    """The texts of the columns that a template reads; an absent value, and Alpaca's absent input, is an empty text."""
    values = []
    for column in COLUMNS[template]:
        if column not in row and column != "input":
            raise UsageError(
                f"'{source.label}' has no column '{column}', which the template {template} reads; {nearest(column, row)}"
            )
        value = row.get(column)
        if not isinstance(value, str | None):
            raise UsageError(f"the column '{column}' of '{source.label}' holds a {type(value).__name__}, not text")
        values.append(value or "")
    return tuple(values)


def _turns(row: Mapping[str, Any], source: Source) -> list[dict[str, Any]]:
    column = source.column or next((c for c in CHAT_COLUMNS if c in row), None)
    if column is None and all(isinstance(row.get(c), list) for c in PAIR):
        return [_turn(turn, source) for c in PAIR for turn in row[c]]
    if column is None or column not in row:
        wanted = f"column '{column}'" if column else f"column of turns ({' or '.join(CHAT_COLUMNS)})"
        raise UsageError(f"'{source.label}' has no {wanted}; {nearest(column or CHAT_COLUMNS[0], row)}")
    turns = row[column]
    if not isinstance(turns, list):
        raise UsageError(f"the column '{column}' of '{source.label}' holds a {type(turns).__name__}, not a list of turns")
    return [_turn(turn, source) for turn in turns]


def _turn(turn: Any, source: Source) -> dict[str, Any]:
    pair: tuple[str, str | None] | None = None
    called: dict[str, Any] = {}
    if isinstance(turn, Mapping):
        pairs = [(turn.get(r), turn.get(c)) for r, c in (("role", "content"), ("from", "value"))]
        called = {name: turn[name] for name in TOOLS if turn.get(name) is not None}
        pair = next(((r, c) for r, c in pairs if isinstance(r, str) and (isinstance(c, str) or (c is None and called))), None)
    if pair is None:
        has = ", ".join(turn) if isinstance(turn, Mapping) else type(turn).__name__
        raise UsageError(f"a turn of '{source.label}' needs texts role and content, or from and value; it has {has}")
    return {"role": ROLES.get(pair[0], pair[0]), "content": pair[1] or "", **called}


def _chat(turns: list[dict[str, Any]], source: Source, tokenizer: Any) -> Example:
    if getattr(tokenizer, "chat_template", None) is None:
        raise UsageError(
            f"'{source.label}' holds conversations, and {'there is no tokenizer' if tokenizer is None else 'the tokenizer has no'}"
            f"{'' if tokenizer is None else ' chat template'}: take an instruction-tuned model's, give it one "
            "(tokenizer.chat_template, or the file chat_template.jinja beside the model), or name a column of text"
        )
    last = next((i for i in reversed(range(len(turns))) if turns[i]["role"] == "assistant"), None)
    if last is None or not (turns[last]["content"].strip() or turns[last].get("tool_calls")):
        return Example("", "")
    try:
        whole = tokenizer.apply_chat_template(turns[: last + 1], tokenize=False)
        for opened in (True, False):  # some templates open the assistant's turn with more than they put before its words
            prompt = tokenizer.apply_chat_template(turns[:last], tokenize=False, add_generation_prompt=opened) if last else ""
            if whole.startswith(prompt):
                return Example(prompt, whole[len(prompt) :])
    except Exception as error:  # jinja2's errors, and whatever a template's own raise_exception gives
        raise UsageError(
            f"the tokenizer's chat template cannot write a conversation of '{source.label}': {reason(error)}"
        ) from error
    raise UsageError(
        f"the tokenizer's chat template writes the turns of '{source.label}' differently when an answer follows: "
        "the answer cannot be told from the prompt"
    )
