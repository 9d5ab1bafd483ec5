"""The question sets of unlearning benchmarks: read from files or the hub, checked whole, turned into token ids."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ..core.chat_encoding import encode_chat, encode_prompt
from ..core.errors import DataError, ModelError
from ..core.row_sources import source_rows
from ..core.trajectory import MAX_ERRORS_SHOWN, content_hash, final_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPEC_HELP = "A file, or a dataset on the hub as `owner/name:subset:split`."


@dataclass(frozen=True)
class Text:
    """A token sequence whose likelihood is asked for.

    Attributes:
        key: names it within a run.
        text: what its scored tokens say.
        input_ids: (length,) token ids.
        scored: (length,) booleans, the tokens of the likelihood, an answer's end-of-turn token included.
        words: (length,) booleans, those of `scored` that are text: what token-wise metrics look at.
    """

    key: str
    text: str
    input_ids: np.ndarray
    scored: np.ndarray
    words: np.ndarray


@dataclass(frozen=True)
class Ask:
    """A prompt that the model answers."""

    key: str
    prompt_ids: tuple[int, ...]
    max_tokens: int


def read_set(
    spec: str, name: str, required: Sequence[str], columns: Mapping[str, str], max_rows: int | None = None
) -> list[dict[str, Any]]:
    """Read the rows of one set under our column names.

    Args:
        spec: a file, or `owner/name[:subset[:split]]`.
        name: recipe key of the set, for messages.
        required: columns that must be there and not be empty.
        columns: our name -> the file's. One mapping serves all sets of a recipe: a set may lack what it does not need.
        max_rows: read the first rows only.

    Raises:
        DataError: no such file or dataset, no row, or rows without a required column; names file and row of each.
    """
    rows: list[dict[str, Any]] = []
    faults: list[str] = []
    for where, row in _named(name, source_rows(spec, "train", None)):
        if max_rows is not None and len(rows) >= max_rows:
            break
        row |= {ours: row[theirs] for ours, theirs in columns.items() if theirs in row}
        if missing := [column for column in required if not _has_content(row.get(column))]:
            state = "empty" if missing[0] in row else "not there"
            faults.append(f"{where}: `{missing[0]}` is {state}")
        rows.append(row)
    if faults:
        more = f"\n  ... and {len(faults) - MAX_ERRORS_SHOWN} more" if len(faults) > MAX_ERRORS_SHOWN else ""
        raise DataError(
            f"`{name}`: {len(faults)} of {len(rows)} row(s) cannot be used:\n  "
            + "\n  ".join(faults[:MAX_ERRORS_SHOWN])
            + f"{more}\nMend the rows, or say how the file calls the column: `columns: {{{required[0]}: <theirs>}}`."
        )
    if not rows:
        raise DataError(f"`{name}`: {spec} has no row.")
    return rows


def _named(name: str, rows: Iterator[tuple[str, dict[str, Any]]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Say in a source's error which set of the recipe it is."""
    try:
        yield from rows
    except DataError as error:
        raise DataError(f"`{name}`: {error}") from error


def _has_content(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return bool(value) and all(_has_content(item) for item in value)
    return value is not None and (not isinstance(value, str) or bool(value.strip()))


def messages_of(question: Any) -> list[dict[str, Any]]:
    """Return a question as chat messages; it may be a string or messages already."""
    return question if isinstance(question, list) else [{"role": "user", "content": str(question)}]


def text_of(answer: Any) -> str:
    """Return an answer as text; it may be a string or a completion of chat messages."""
    return final_text(answer) if isinstance(answer, list) else str(answer)


def row_id(row: Mapping[str, Any], *columns: str) -> str:
    """Return the content hash that tells whether two runs asked the same."""
    return content_hash(*(row.get(column) for column in columns))


def encode_answer(tokenizer: "PreTrainedTokenizerBase", key: str, question: Any, answer: str) -> Text:
    """Encode a question and its answer by the chat template; the answer and the token that ends it are scored.

    Raises:
        ModelError: the tokenizer has no chat template.
        DataError: the template does not take these messages.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, so questions cannot be asked. Put a "
            "`chat_template.jinja` into the model folder; for TOFU's base models `Question: ...\\nAnswer: ...` is one."
        )
    prompt, completion = messages_of(question), [{"role": "assistant", "content": answer}]
    whole = encode_chat(tokenizer, prompt, completion, include_end_token=True)
    words = encode_chat(tokenizer, prompt, completion).assistant
    if not words.any():
        raise DataError(f"{key}: the chat template leaves nothing of the answer {answer[:80]!r}")
    return Text(key, answer, whole.input_ids, whole.assistant, words)


def encode_text(tokenizer: "PreTrainedTokenizerBase", key: str, text: str, max_length: int) -> Text:
    """Encode plain text; every token but the first, which has no context, is scored.

    Raises:
        DataError: it has fewer than two tokens.
    """
    ids = np.array(tokenizer(text, verbose=False)["input_ids"][:max_length], dtype=np.int32)
    if len(ids) < 2:
        raise DataError(f"{key}: {text[:80]!r} has {len(ids)} token(s); a likelihood needs two")
    scored = np.arange(len(ids)) > 0
    return Text(key, text, ids, scored, scored)


def ask_chat(
    tokenizer: "PreTrainedTokenizerBase", key: str, question: Any, max_tokens: int, kwargs: Mapping[str, Any]
) -> Ask:
    """Encode a question as a prompt, by the chat template."""
    ids = encode_prompt(tokenizer, messages_of(question), chat_template_kwargs=kwargs)
    return Ask(key, tuple(ids), max_tokens)
