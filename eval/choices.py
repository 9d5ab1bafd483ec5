"""Multiple-choice questions: the choices as lettered lines under the question, the right one as its letter."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.errors import DataError
from ..core.trajectory import content_hash

LETTERS = "ABCDEFGHIJ"
TEXT_KEYS = ("text", "atext")  # of ARC's and HEAD-QA's choices, which carry labels beside their texts


def lettered(
    question: str,
    answer: str,
    row: Mapping[str, Any],
    columns: Sequence[str],
    answer_index: int | None = None,
    shuffle: bool = False,
) -> tuple[str, str]:
    """Write a question with its choices, and find the letter of the right one.

    Args:
        question: the question alone.
        answer: the right choice: its number, its letter or its text.
        row: where the choices stand.
        columns: one column with the list of choices, or a column for each choice.
        answer_index: the number of the first choice, where `answer` is a number; None: a letter or a text.
        shuffle: put the choices in an order that depends on the question only.

    Raises:
        DataError: there are no choices, or the answer is none of them.
    """
    missing = [name for name in columns if name not in row]
    if missing:
        raise DataError(f"no column {missing[0]!r} (named by `choices`); the row has {sorted(row)}")
    texts = _texts(row[columns[0]]) if len(columns) == 1 else [str(row[name]).strip() for name in columns]
    if not 2 <= len(texts) <= len(LETTERS):
        raise DataError(f"{len(texts)} choices; there must be 2 to {len(LETTERS)}")
    right = _place(answer, texts, answer_index)
    order = list(range(len(texts)))
    if shuffle:
        random.Random(content_hash(question, texts)).shuffle(order)
    lines = [f"{letter}. {texts[place]}" for letter, place in zip(LETTERS, order, strict=False)]
    return "\n".join([question.strip(), "", *lines]), LETTERS[order.index(right)]


def _texts(value: Any) -> list[str]:
    if isinstance(value, Mapping):  # a list of structs, as `datasets` may hand it out
        value = next((value[key] for key in TEXT_KEYS if key in value), None)
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise DataError(f"the column of `choices` holds no list: {str(value)[:80]!r}")
    return [
        str(next((item[key] for key in TEXT_KEYS if key in item), item) if isinstance(item, Mapping) else item).strip()
        for item in value
    ]


def _place(answer: str, texts: Sequence[str], answer_index: int | None) -> int:
    answer = answer.strip()
    if answer_index is not None:
        if answer.lstrip("-").isdigit() and 0 <= int(answer) - answer_index < len(texts):
            return int(answer) - answer_index
    elif texts.count(answer) == 1:
        return texts.index(answer)
    elif len(answer) == 1 and answer in LETTERS[: len(texts)]:
        return LETTERS.index(answer)
    raise DataError(f"answer {answer[:80]!r} is none of the {len(texts)} choices")
