"""Templates: the literal Alpaca prompts, chat templates through the tokenizer, plain text, and what cannot be rendered."""

from __future__ import annotations

from typing import Any

import pytest

from fxprune.data import Example, Source, render, whole_text
from fxprune.data.templates import contents
from fxprune.errors import UsageError

CHATML = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chatty(template: str | None = CHATML) -> Any:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()), eos_token="</s>")
    made.chat_template = template
    return made


def error(row: Any, *, tokenizer: Any = None, **fields: Any) -> str:
    with pytest.raises(UsageError) as raised:
        render(row, Source("set", **fields), tokenizer)
    return str(raised.value)


def test_alpaca_with_input() -> None:
    row = {"instruction": "Add {the} numbers.", "input": "2 and 3", "output": "5"}
    expected = Example(
        "Below is an instruction that describes a task, paired with an input that provides further context. "
        "Write a response that appropriately completes the request.\n\n### Instruction:\nAdd {the} numbers.\n\n"
        "### Input:\n2 and 3\n\n### Response:\n",
        "5",
    )
    assert render(row, Source("set")) == render(row, Source("set", template="alpaca")) == expected
    assert contents(row, Source("set")) == "Add {the} numbers.\n2 and 3\n5"


@pytest.mark.parametrize("given", [{"input": ""}, {"input": None}, {}])
def test_alpaca_without_input(given: dict[str, Any]) -> None:
    row = {"instruction": "Sing.", **given, "output": "La."}
    assert render(row, Source("set")) == Example(
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nSing.\n\n### Response:\n",
        "La.",
    )


TURNS = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Ho"), ("user", "And?"), ("assistant", "So."), ("user", "Bye")]
CHATS: list[dict[str, Any]] = [
    {"messages": [{"role": r, "content": c} for r, c in TURNS]},
    {"conversations": [{"from": {"user": "human", "assistant": "gpt"}.get(r, r), "value": c} for r, c in TURNS]},
    {"talk": [{"role": r, "content": c} for r, c in TURNS], "text": "unused"},
]


@pytest.mark.parametrize("row", CHATS)
@pytest.mark.parametrize("template", ["auto", "chat"])
def test_the_last_turn_of_the_assistant_is_the_completion(row: dict[str, Any], template: str) -> None:
    source = Source("set", column="talk" if "talk" in row else None, template=template)
    assert render(row, source, chatty()) == Example(
        "<|system|>Be brief.</s>\n<|user|>Hi</s>\n<|assistant|>Ho</s>\n<|user|>And?</s>\n<|assistant|>", "So.</s>\n"
    )
    assert contents(row, source) == "Be brief.\nHi\nHo\nAnd?\nSo.\nBye"


def test_a_template_that_opens_the_turn_otherwise() -> None:
    """Qwen3 opens a turn with an empty thought that the finished turn does not have."""
    template = CHATML.replace("<|assistant|>{% endif", "<|assistant|><think></think>{% endif")
    assert render(CHATS[0], Source("set"), chatty(template)).completion == "<|assistant|>So.</s>\n"
    other = "{{ messages | length }}" + CHATML
    assert error(CHATS[0], tokenizer=chatty(other)) == (
        "the tokenizer's chat template writes the turns of 'set' differently when an answer follows: "
        "the answer cannot be told from the prompt"
    )


@pytest.mark.parametrize("turns", [[], [("user", "Hi")], [("user", "Hi"), ("assistant", " ")]])
def test_a_chat_without_an_answer_is_empty(turns: list[tuple[str, str]]) -> None:
    row = {"messages": [{"role": r, "content": c} for r, c in turns]}
    assert render(row, Source("set"), chatty()) == Example("", "")


def test_an_answer_to_nothing_has_no_prompt() -> None:
    row = {"messages": [{"role": "assistant", "content": "Welcome"}]}
    assert render(row, Source("set"), chatty()) == Example("", "<|assistant|>Welcome</s>\n")


def test_text() -> None:
    assert render({"id": 1, "content": "words"}, Source("set")) == Example("", "words")
    with pytest.raises(UsageError, match="'set' has no column of text; it has instruction, response, wanted text, "):
        render({"instruction": "asked", "response": "answered"}, Source("set"))  # Dolly's: half of it would be lost
    with pytest.raises(UsageError, match="the column 'text' of 'set' holds a int, not text"):
        render({"text": 3}, Source("set"))
    row = {"instruction": "a", "output": "b", "text": "c"}
    assert render(row, Source("set", template="text")) == Example("", "c")
    assert render(row, Source("set", column="output")) == Example("", "b")


@pytest.mark.parametrize(
    ("row", "fields", "text"),
    [
        (
            {"instruction": "a", "outputs": "b"},
            {"template": "alpaca"},
            (
                "'set' has no column 'output', which the template alpaca reads; "
                "did you mean 'outputs'? Choose from: instruction, outputs"
            ),
        ),
        ({"instruction": "a", "output": 3}, {}, "the column 'output' of 'set' holds a int, not text"),
        (
            {"message": [], "id": 1},
            {"template": "chat"},
            "'set' has no column of turns (messages or conversations); did you mean 'message'? Choose from: id, message",
        ),
        (
            {"messages": []},
            {"template": "chat", "column": "mesages"},
            "'set[mesages]' has no column 'mesages'; did you mean 'messages'? Choose from: messages",
        ),
        ({"messages": "Hi"}, {"template": "chat"}, "the column 'messages' of 'set' holds a str, not a list of turns"),
        ({"messages": ["Hi"]}, {}, "a turn of 'set' needs texts role and content, or from and value; it has str"),
        (
            {"messages": [{"role": "user", "text": "Hi"}]},
            {},
            "a turn of 'set' needs texts role and content, or from and value; it has role, text",
        ),
        (
            {"messages": [{"role": "user", "content": None}]},
            {},
            "a turn of 'set' needs texts role and content, or from and value; it has role, content",
        ),
    ],
)
def test_rows_of_another_kind(row: dict[str, Any], fields: dict[str, Any], text: str) -> None:
    assert error(row, tokenizer=chatty(), **fields) == text


def test_pairs_of_prompt_and_completion() -> None:
    row = {"prompt": "The sky is", "completion": " blue.", "source": "TRL"}
    assert render(row, Source("set")) == render(row, Source("set", template="prompt")) == Example("The sky is", " blue.")
    assert (contents(row, Source("set")), whole_text(row, Source("set"))) == ("The sky is\n blue.", "The sky is blue.")
    assert render(row, Source("set", column="prompt")) == Example("", "The sky is")
    assert error({"prompt": "a"}, template="prompt") == (
        "'set' has no column 'completion', which the template prompt reads; did you mean 'prompt'? Choose from: prompt"
    )
    turns = CHATS[0]["messages"]
    row = {"prompt": turns[:-1], "completion": turns[-1:]}
    assert render(row, Source("set"), chatty()) == render(CHATS[0], Source("set"), chatty())
    assert contents(row, Source("set")) == contents(CHATS[0], Source("set"))


def test_rows_as_running_text() -> None:
    """What calibration and evaluation read of a row is what recovery reads, with the prompt."""
    row = {"instruction": "Say it.", "output": "It."}
    example = render(row, Source("set"))
    assert whole_text(row, Source("set")) == example.prompt + "It."
    chat = render(CHATS[0], Source("set"), chatty())
    assert whole_text(CHATS[0], Source("set"), chatty()) == chat.prompt + chat.completion
    assert (
        whole_text(CHATS[0], Source("set"), chatty(None))
        == whole_text(CHATS[0], Source("set"))
        == contents(CHATS[0], Source("set"))
    )


def test_turns_that_call_tools_go_to_the_template_whole() -> None:
    call = {"function": {"name": "clock", "arguments": "{}"}}
    turns = [
        {"role": "user", "content": "When?"},
        {"role": "assistant", "content": None, "tool_calls": [call], "from": None, "value": None},
    ]
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}(){% endfor %}"
    template = f"{{% for m in messages %}}<{{{{ m.role }}}}>{{{{ m.content }}}}{calls}{{% endfor %}}"
    assert render({"messages": turns}, Source("set"), chatty(template)) == Example("<user>When?", "<assistant>clock()")
    both = [{"role": None, "content": None, "from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]
    assert contents({"conversations": both}, Source("set")) == "Hi\nHo"


def test_a_chat_needs_a_chat_template() -> None:
    file = "(tokenizer.chat_template, or the file chat_template.jinja beside the model)"
    advice = f"take an instruction-tuned model's, give it one {file}, or name a column of text"
    assert error(CHATS[0], tokenizer=chatty(None)) == (
        f"'set' holds conversations, and the tokenizer has no chat template: {advice}"
    )
    assert error(CHATS[0]) == f"'set' holds conversations, and there is no tokenizer: {advice}"
    strict = "{{ raise_exception('roles must alternate') }}"
    assert error(CHATS[0], tokenizer=chatty(strict)) == (
        "the tokenizer's chat template cannot write a conversation of 'set': TemplateError: roles must alternate"
    )
