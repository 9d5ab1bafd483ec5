"""Chat messages as token ids: a prompt to answer, and which tokens of a whole chat the assistant wrote."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from .errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_EMPTY_THINKING = re.compile(r"<think>\s*</think>\n*")
_PROBE = "\N{WHITE SQUARE}\N{BLACK SQUARE}"


@dataclass(frozen=True)
class EncodedChat:
    """A chat as token ids.

    Attributes:
        input_ids: (length,) int32 token ids.
        assistant: (length,) booleans, True where the token holds text that the assistant wrote.
        truncated: Were tokens cut off at the end?
    """

    input_ids: np.ndarray
    assistant: np.ndarray
    truncated: bool


def encode_prompt(
    tokenizer: "PreTrainedTokenizerBase",
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> list[int]:
    """Turn chat messages into prompt token ids that end where the assistant's turn begins.

    Args:
        tokenizer: of the model that will answer (`engine.tokenizer`).
        messages: `{"role", "content", ...}` in order.
        tools: JSON schemas of the tools the model may call.
        chat_template_kwargs: further variables of the template, such as `{"enable_thinking": False}`.

    Raises:
        ModelError: the model folder has no chat template.
        DataError: the template refuses these messages.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"{tokenizer.name_or_path}: the tokenizer has no chat template, so messages cannot become a prompt. Use an "
            "instruction-tuned model, or copy a `chat_template.jinja` of the same family into the model folder."
        )
    try:
        ids = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=[dict(tool) for tool in tools] if tools else None,
            add_generation_prompt=True,
            return_dict=False,
            **(chat_template_kwargs or {}),
        )
    except (TemplateError, TypeError, KeyError) as error:
        roles = ", ".join(str(message.get("role")) for message in messages)
        raise DataError(
            f"{tokenizer.name_or_path}: its chat template refuses these messages (roles: {roles}): {error}"
        ) from error
    return list(ids)  # pyright: ignore[reportReturnType]


def encode_chat(
    tokenizer: "PreTrainedTokenizerBase",
    prompt: list[dict[str, Any]],
    completion: list[dict[str, Any]],
    *,
    tools: list | None = None,
    max_length: int | None = None,
    include_end_token: bool = False,
) -> EncodedChat:
    """Render a trajectory with the chat template, tokenize the text once, and mark what the assistant wrote.

    Every assistant turn of the completion is marked: its content, its reasoning as far as the template keeps it, and
    its tool calls; not the turn's header, nor an empty think block that the template adds, nor (by default) the
    end-of-turn token. The marks come from character offsets, so a token that merges a header's newline with the
    content's counts as content.

    Args:
        tokenizer: A fast tokenizer with a chat template.
        prompt: Messages that are given, examples by an assistant included.
        completion: Messages that follow, tool results included.
        tools: Tool schemas for the template.
        max_length: Cut the sequence on the right to this many tokens.
        include_end_token: Also mark the token that ends each assistant turn.

    Raises:
        ModelError: The tokenizer has no chat template or gives no offsets.
        DataError: The template does not render the messages so that the assistant's turns can be found.
    """
    if not tokenizer.chat_template:
        raise ModelError(
            f"the tokenizer {tokenizer.name_or_path!r} has no chat template; set one, or use the chat model's"
        )
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer {tokenizer.name_or_path!r} gives no character offsets; a fast one is needed")

    def render(messages: list[dict[str, Any]], generate: bool = False) -> str:
        try:
            text = tokenizer.apply_chat_template(messages, tools=tools, tokenize=False, add_generation_prompt=generate)
        except (TemplateError, ValueError) as error:
            raise DataError(f"the chat template refuses the messages: {error}") from error
        return str(text)

    text = render([*prompt, *completion])
    spans = _assistant_spans(render, prompt, completion, text, include_end_token)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, truncation=False, verbose=False)
    starts, ends = np.array(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2).T
    ends = np.maximum(ends, starts + 1)  # some tokenizers trim a token of blanks to nothing
    assistant = np.zeros(len(starts), dtype=bool)
    for first, last in spans:
        assistant |= (starts < last) & (ends > first)
    length = len(starts) if max_length is None else min(len(starts), max_length)
    ids = np.array(encoded["input_ids"][:length], dtype=np.int32)
    return EncodedChat(ids, assistant[:length], truncated=length < len(starts))


def _assistant_spans(
    render: Callable[..., str], prompt: list[dict], completion: list[dict], text: str, include_end_token: bool
) -> list[tuple[int, int]]:
    """Return the (first, last) characters of `text` that each assistant turn of the completion wrote."""
    question = [{"role": "user", "content": "?"}]
    header = render(question, generate=True).removeprefix(render(question))
    end_mark = render([*question, {"role": "assistant", "content": _PROBE}]).rpartition(_PROBE)[2].strip()
    spans: list[tuple[int, int]] = []
    for i, message in enumerate(completion):
        if message["role"] != "assistant":
            continue
        before = [*prompt, *completion[:i]]
        # A template may open its generation prompt with more than it writes for a finished turn ("<think>").
        first = _shared(text, render(before, generate=True))
        if first < len(render(before)):
            # It renders the turn before differently when that is the last one: two assistant turns in a row.
            follows = text.find(header, spans[-1][1]) if spans and header else -1
            if follows < 0:
                raise DataError(f"completion[{i}]: the chat template does not render this turn after those before it")
            first = follows + len(header)
        content = message.get("content") or ""
        thought = _EMPTY_THINKING.match(text, first)
        if thought and not _EMPTY_THINKING.match(content):
            first = thought.end()
        # The content itself may quote the mark; whatever else the turn holds (tool calls) follows the content.
        found = text.find(content.strip(), first)
        last = text.find(end_mark, first if found < 0 else found + len(content.strip())) if end_mark else -1
        if last < 0:
            last = len(text.rstrip())
            if any(later["role"] == "assistant" for later in completion[i + 1 :]):
                raise DataError(f"completion[{i}]: the chat template marks no end of an assistant turn")
        elif include_end_token:
            last += len(end_mark)
        spans.append((first, last))
    return spans


def _shared(a: str, b: str) -> int:
    """Return the length of the common beginning of two texts."""
    if a.startswith(b):
        return len(b)
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
