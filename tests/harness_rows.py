"""Made-up rows of the seven zero-shot tasks, as the hub's datasets have them and as our task files do, and a tokenizer for them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

_TEXT = """
the cat a dog river who went over under blue house because quickly Paris seven it didn't hand-made stone bread (again) 42
window. Then, he naïve café says: why not?
"""
WORDS = _TEXT.split()

Raw = dict[str, Any]


def words(chosen: random.Random, most: int, least: int = 1) -> str:
    return " ".join(chosen.choice(WORDS) for _ in range(chosen.randint(least, most)))


def byte_pair_tokenizer(*, bos: bool = False, size: int = 320) -> PreTrainedTokenizerFast:
    """A byte-level BPE like GPT-2's, trained on the spot; with ``bos`` it puts ``<s>`` before every text, as Llama's does."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    made.train_from_iterator([words(random.Random(i), 30) + "\nQuestion: who?\nAnswer: no yes" for i in range(200)], trainer)
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def raw_rows(task: str, count: int, seed: int = 0) -> list[Raw]:
    """Rows with the columns of the hub's dataset of the task."""
    chosen = random.Random(f"{task} {seed}")
    return [_RAW[task](chosen) for _ in range(count)]


def _boolq(r: random.Random) -> Raw:
    return {"passage": words(r, 20), "question": words(r, 6), "label": r.randrange(2)}


def _piqa(r: random.Random) -> Raw:
    return {"goal": words(r, 9), "sol1": words(r, 6) + r.choice(["", " "]), "sol2": words(r, 6), "label": r.randrange(2)}


def _hellaswag(r: random.Random) -> Raw:
    endings = [words(r, 7) for _ in range(4)]
    shown = {"activity_label": words(r, 2).title(), "ctx_a": words(r, 9), "ctx_b": words(r, 3).lower()}
    return {**shown, "endings": endings, "label": str(r.randrange(4))}


def _winogrande(r: random.Random) -> Raw:
    sentence = f"{words(r, 8)} _ {words(r, 6)}"
    return {"sentence": sentence, "option1": words(r, 2), "option2": words(r, 2), "answer": r.choice("12")}


def _arc(r: random.Random) -> Raw:
    labels = r.choice(["ABCD", "1234", "ABC", "ABCDE"])
    return {**_choices(r, labels), "question": words(r, 9)}


def _openbookqa(r: random.Random) -> Raw:
    return {**_choices(r, "ABCD"), "question_stem": words(r, 9)}


def _choices(r: random.Random, labels: str) -> Raw:
    return {"choices": {"text": [words(r, 5) for _ in labels], "label": list(labels)}, "answerKey": r.choice(labels)}


_RAW = {
    "boolq": _boolq,
    "piqa": _piqa,
    "hellaswag": _hellaswag,
    "winogrande": _winogrande,
    "arc_easy": _arc,
    "arc_challenge": _arc,
    "openbookqa": _openbookqa,
}


def task_row(task: str, raw: Mapping[str, Any]) -> Raw:
    """The row of our task file: the whole prompt, the choices and the index of the right one."""
    if task == "boolq":
        return _row(f"{raw['passage']}\nQuestion: {raw['question']}?\nAnswer:", ["no", "yes"], raw["label"])
    if task == "piqa":
        return _row(f"Question: {raw['goal']}\nAnswer:", [raw["sol1"], raw["sol2"]], raw["label"])
    if task == "hellaswag":
        context = f"{raw['activity_label']}: {raw['ctx_a']} {raw['ctx_b'].capitalize()}"
        return _row(context, raw["endings"], int(raw["label"]))
    if task == "winogrande":
        before, _, after = raw["sentence"].partition("_")
        return {**_row(before, [raw["option1"], raw["option2"]], int(raw["answer"]) - 1), "suffix": after.strip()}
    label = raw["choices"]["label"].index(raw["answerKey"])
    asked = raw["question_stem"] if task == "openbookqa" else f"Question: {raw['question']}\nAnswer:"
    return _row(asked, raw["choices"]["text"], label)


def _row(context: str, choices: Sequence[str], label: int) -> Raw:
    return {"context": context, "choices": list(choices), "label": label, "id": "not read"}
