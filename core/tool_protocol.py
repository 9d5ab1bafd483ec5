"""How a model calls Python, and how it is answered: by its own chat template, or in fenced code blocks.

A protocol knows three things, and no engine and no sandbox:

* the prompt (`prompt`, `encode`): the tools block of the template, or an instruction in the last user message;
* the calls in what the model wrote (`parse`);
* the tokens of the answer (`reply_ids`): all that stands between the end of the model's turn and the first token of
  its next one. They are read off the rendered template behind the mark that ends an assistant's turn, so that the
  model's own tokens are never rendered or tokenized again, whether or not its template keeps earlier turns as they are.

What a tool printed cannot speak for the template: control tokens in it are broken up by a space.
"""

import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from jinja2 import TemplateError

from .answer_extraction import after_think
from .chat_encoding import encode_prompt
from .errors import DataError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ToolProtocolName = Literal["template", "code_block"]

TOOL_NAME = "python"
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {
            "name": TOOL_NAME,
            "description": "Run Python code in a notebook whose variables stay, and return what it prints and the "
            "value of its last expression. numpy (np) and sympy are imported.",
            "parameters": {
                "type": "object",
                "properties": {"code": {"type": "string", "description": "The code of one cell."}},
                "required": ["code"],
            },
        },
    }
]
CODE_BLOCK_INSTRUCTION = (
    "You can run Python: write one ```python block and end your turn. You are answered with what it prints and the "
    "value of its last expression, in an ```output block. Variables stay; numpy (np) and sympy are imported. Without "
    "a ```python block your turn is your final answer."
)
_HOW_TEMPLATE = '{"name": "python", "arguments": {"code": "..."}} between the tags of a tool call'
_HOW_BLOCK = "a line ```python, the code, and a line ```"

_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_XML = re.compile(
    r"\s*<function=([^>\n]*)>\s*(?:<parameter=code>\n?(.*?)\n?</parameter>\s*)?(?:</function>\s*)?\Z", re.DOTALL
)
_BLOCK = re.compile(r"```(?:python|py)[ \t]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
_SPOKEN, _HEARD = "\N{WHITE SQUARE}\N{BLACK SQUARE}", "\N{BLACK SQUARE}\N{WHITE SQUARE}"


@dataclass(frozen=True)
class Call:
    """One attempt to call Python: `code` to run, or the `fault` that the model is told.

    `start` is the character of the turn where it begins.
    """

    code: str | None
    fault: str | None
    start: int


@dataclass(frozen=True)
class ParsedTurn:
    """One assistant's turn: its chat message, and the calls in it, in order."""

    message: dict[str, Any]
    calls: tuple[Call, ...]


class ToolProtocol:
    """Text only: the base of the two protocols, for rollouts without tools.

    Args:
        tokenizer: of the model.
        end_ids: the tokens that end a turn (`core.checkpoint.read_checkpoint(...).stop_ids`); default: its end token.
        chat_template_kwargs: further variables of the chat template, such as `{"enable_thinking": False}`.
    """

    tools: list[dict[str, Any]] | None = None  # of the prompt; also the `tools` column of a row to train on
    stop: tuple[str, ...] = ()  # strings that end a turn besides the end tokens

    def __init__(
        self,
        tokenizer: "PreTrainedTokenizerBase",
        end_ids: Collection[int] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        self.tokenizer = tokenizer
        own: Any = tokenizer.eos_token_id
        self.end_ids = frozenset(end_ids if end_ids is not None else () if own is None else (own,))
        self._kwargs = dict(chat_template_kwargs or {})
        # Longest first: a token may begin another one.
        vocabulary: dict[str, int] = tokenizer.get_added_vocab()  # pyright: ignore
        control = sorted({*vocabulary, *tokenizer.all_special_tokens}, key=len, reverse=True)
        control = [text for text in control if len(text) > 1 and not text.isspace()]
        self._control = re.compile("|".join(map(re.escape, control)) or r"(?!)")
        self._check()

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return the messages as they are asked with this protocol: the `prompt` of the row."""
        return [dict(message) for message in messages]

    def encode(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the token ids of a prompt, up to where the assistant's turn begins.

        Raises:
            ModelError: the tokenizer has no chat template.
            DataError: the template refuses the messages.
        """
        return encode_prompt(self.tokenizer, self.prompt(messages), self.tools, self._kwargs)

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens, markup included, without the end token of the turn."""
        ids = list(token_ids)
        ended = bool(ids) and ids[-1] in self.end_ids
        return str(self.tokenizer.decode(ids[:-1] if ended else ids, skip_special_tokens=False))

    def tokenize(self, text: str) -> list[int]:
        """Return the token ids of text that is inserted as it is (an interruption)."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def parse(self, text: str, cut_off: bool = False) -> ParsedTurn:
        """Read one whole turn of the assistant; its think block, if any, has its opening tag.

        Args:
            text: what `decode` returned.
            cut_off: the turn was ended by a limit. A call that is not closed is then no malformed one.
        """
        return ParsedTurn({"role": "assistant", "content": text}, ())

    def reply_messages(self, results: Sequence[str]) -> list[dict[str, Any]]:
        """Return the chat messages that answer the calls of one turn, one text per call, in order."""
        raise NotImplementedError("a protocol without tools answers nothing")

    def clean(self, result: str) -> str:
        """Break up the control tokens in what a tool printed, so that it cannot open or close a turn."""
        return self._control.sub(lambda found: f"{found[0][0]} {found[0][1:]}", result)

    def reply_ids(self, messages: Sequence[Mapping[str, Any]], ended: bool) -> list[int]:
        """Return the tokens of an answer, up to where the assistant's next turn begins.

        Args:
            messages: what `reply_messages` returned.
            ended: whether the model ended its turn by an end token; else the answer begins with the template's.
        """
        return self.tokenize(self._reply_text(messages, ended))

    def shorten(self, text: str, most: int) -> str:
        """Keep the first and the last half of `most` tokens, with a line between them that says what is left out."""
        ids = self.tokenize(text)
        if len(ids) <= most:
            return text
        head, tail = self.decode(ids[: most - most // 2]), self.decode(ids[len(ids) - most // 2 :])
        return f"{head}\n[... {len(ids) - most:,} tokens left out ...]\n{tail}"

    def _spoken(self) -> dict[str, Any]:
        """Return a turn of the assistant that calls the tool and holds `_SPOKEN` as the last that the model chose."""
        raise NotImplementedError

    def _render(self, messages: list[dict[str, Any]], generate: bool) -> str:
        tools: Any = self.tools
        text = self.tokenizer.apply_chat_template(
            messages, tools=tools, tokenize=False, add_generation_prompt=generate, **self._kwargs
        )
        return str(text)

    def _reply_text(self, messages: Sequence[Mapping[str, Any]], ended: bool) -> str:
        question = [{"role": "user", "content": "?"}, self._spoken()]
        try:
            text = self._render([*question, *(dict(message) for message in messages)], generate=True)
        except (TemplateError, TypeError, KeyError, ValueError) as error:
            raise DataError(f"{self._name}: its chat template refuses the answer of a tool: {error}") from error
        tail = text.rpartition(_SPOKEN)[2]
        ends = [str(self.tokenizer.decode([token])) for token in self.end_ids]
        at, length = min(((tail.find(end), len(end)) for end in ends if end and end in tail), default=(-1, 0))
        if at < 0:
            raise ModelError(
                f"{self._name}: its chat template ends an assistant's turn with none of the model's end tokens "
                f"({', '.join(map(repr, ends)) or 'it has none'}). Mend `eos_token` of the tokenizer, or the template."
            )
        return tail[at + length :] if ended else tail[at:]

    @property
    def _name(self) -> str:
        return str(self.tokenizer.name_or_path or "this tokenizer")

    def _check(self) -> None:
        """Refuse a chat template that cannot serve this protocol; called at the end of `__init__`."""

    def _check_replies(self) -> None:
        """Refuse a template that drops what a tool answered.

        Raises:
            ModelError: says what is missing.
        """
        if not self.tokenizer.chat_template:
            raise ModelError(
                f"{self._name}: the tokenizer has no chat template, so no tool can be called. Use an instruction-tuned "
                "model, or copy a `chat_template.jinja` of the same family into the model folder."
            )
        try:
            text = self._reply_text(self.reply_messages([_HEARD]), ended=True)
        except DataError as error:
            raise ModelError(f"{error}.{self._other}") from error
        if text.count(_HEARD) != 1 or text.endswith(_HEARD):
            raise ModelError(
                f"{self._name}: its chat template does not show the model what a tool answered, once and closed."
                f"{self._other}"
            )

    @property
    def _other(self) -> str:
        return ""


class TemplateProtocol(ToolProtocol):
    """Tool calls as the model's own chat template writes them: JSON or XML between `<tool_call>` tags (Qwen, Hermes).

    Several calls of one turn are run one after the other in the same session.

    Raises:
        ModelError: the template renders no tools, no calls or no tool results, or calls of another form.
    """

    tools = TOOLS

    def _check(self) -> None:
        if self.tokenizer.chat_template:
            try:
                asked = self._render([{"role": "user", "content": "?"}], generate=True)
                called = self._render([{"role": "user", "content": "?"}, self._spoken()], generate=False)
            except (TemplateError, TypeError, KeyError, ValueError) as error:
                raise ModelError(f"{self._name}: its chat template refuses tools: {error}.{self._other}") from error
            if TOOLS[0]["function"]["description"] not in asked:
                raise ModelError(f"{self._name}: its chat template does not tell the model of its tools.{self._other}")
            if _SPOKEN not in called or "<tool_call>" not in called.partition("?")[2]:
                raise ModelError(
                    f"{self._name}: its chat template does not write calls between <tool_call> tags.{self._other}"
                )
        self._check_replies()

    @property
    def _other(self) -> str:
        return " Use `tool_protocol: code_block`, which any chat template can render, or another model."

    def parse(self, text: str, cut_off: bool = False) -> ParsedTurn:
        """See `ToolProtocol.parse`. Calls stand behind the think block, or inside one that never closes."""
        first = text.rfind("</think>") + len("</think>") if "</think>" in text else 0
        kept, calls, end = text[:first], [], first
        for found in _CALL.finditer(text, first):
            kept, end = kept + text[end : found.start()], found.end()
            if not found[2] and cut_off:
                kept += found[0]
                continue
            code, fault = _read_call(found[1], closed=found[2] == "</tool_call>")
            calls.append(Call(code, fault, found.start()))
            if code is None:
                kept += found[0]  # the model sees its mistake again where the row is rendered
        kept += text[end:]
        message: dict[str, Any] = {"role": "assistant", "content": kept}
        codes = [call.code for call in calls if call.code is not None]
        if codes:
            message |= {"content": kept.rstrip("\n"), "tool_calls": [_tool_call(code) for code in codes]}
        return ParsedTurn(message, tuple(calls))

    def reply_messages(self, results: Sequence[str]) -> list[dict[str, Any]]:
        """See `ToolProtocol.reply_messages`: one tool message per call."""
        return [{"role": "tool", "name": TOOL_NAME, "content": self.clean(result).rstrip()} for result in results]

    def _spoken(self) -> dict[str, Any]:
        return {"role": "assistant", "content": "", "tool_calls": [_tool_call(_SPOKEN)]}


class CodeBlockProtocol(ToolProtocol):
    """A ```python block, answered in an ```output block of the next user message.

    Any chat template can render it. A turn ends at its first fence that closes; the answer stands in a turn of its own
    (our choice: the field also writes it into the assistant's turn), so that a row's messages show who wrote what.

    Raises:
        ModelError: the tokenizer has no chat template.
    """

    stop = ("\n```\n", "```output")

    def _check(self) -> None:
        self._check_replies()

    def prompt(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """See `ToolProtocol.prompt`: the instruction follows the last user message."""
        asked = super().prompt(messages)
        for message in reversed(asked):
            if message.get("role") == "user":
                message["content"] = f"{message['content']}\n\n{CODE_BLOCK_INSTRUCTION}"
                return asked
        raise DataError("a prompt without a user message has no place for the instruction of `code_block`.")

    def parse(self, text: str, cut_off: bool = False) -> ParsedTurn:
        """See `ToolProtocol.parse`. Blocks inside a think block are thoughts."""
        message = {"role": "assistant", "content": text}
        said = after_think(text)
        found = _BLOCK.search(text, len(text) - len(said)) if said is not None else None
        if found is None:
            return ParsedTurn(message, ())
        closed = found[0].rstrip(" \t").endswith("```") and found.end() > found.end(1)
        if closed and found[1].strip():
            return ParsedTurn(message, (Call(found[1].removesuffix("\n"), None, found.start()),))
        if not closed and cut_off:
            return ParsedTurn(message, ())
        cause = "its block is empty" if closed else "its block is not closed"
        return ParsedTurn(message, (Call(None, _fault(cause, _HOW_BLOCK), found.start()),))

    def reply_messages(self, results: Sequence[str]) -> list[dict[str, Any]]:
        """See `ToolProtocol.reply_messages`: one user message with an output block per call."""
        blocks = [f"```output\n{self.clean(result).rstrip()}\n```" for result in results]
        return [{"role": "user", "content": "\n".join(blocks)}]

    def _spoken(self) -> dict[str, Any]:
        return {"role": "assistant", "content": _SPOKEN}


def open_protocol(
    name: ToolProtocolName | None,
    tokenizer: "PreTrainedTokenizerBase",
    end_ids: Collection[int] | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> ToolProtocol:
    """Return the protocol of a recipe's `tool_protocol`; None is text only.

    Raises:
        ModelError: the chat template cannot render what the protocol needs; says what to use instead.
    """
    kinds = {None: ToolProtocol, "template": TemplateProtocol, "code_block": CodeBlockProtocol}
    return kinds[name](tokenizer, end_ids, chat_template_kwargs)


def _tool_call(code: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": TOOL_NAME, "arguments": {"code": code}}}


def _read_call(body: str, closed: bool) -> tuple[str | None, str | None]:
    """Return the code of what stands between the tags, or what is wrong with it."""
    if not closed:
        return None, _fault("it is not closed", _HOW_TEMPLATE)
    if body.lstrip().startswith("<function="):
        found = _XML.match(body)
        if found is None:
            return None, _fault("its tags do not match", _HOW_TEMPLATE)
        name, code = found[1].strip(), found[2]
    else:
        try:
            call = json.loads(body, strict=False)  # models write line breaks inside strings
            arguments = call["arguments"]
            if isinstance(arguments, str):
                arguments = json.loads(arguments, strict=False)
            name, code = call["name"], arguments.get("code")
        except json.JSONDecodeError as error:
            return None, _fault(f"it is not valid JSON ({error.msg} at character {error.pos})", _HOW_TEMPLATE)
        except (KeyError, TypeError, AttributeError, RecursionError):
            return None, _fault("it is not an object with a name and arguments", _HOW_TEMPLATE)
    if name != TOOL_NAME:
        return None, _fault(f"there is no tool {str(name)[:50]!r}, only {TOOL_NAME!r}", _HOW_TEMPLATE)
    if not isinstance(code, str) or not code.strip():
        return None, _fault("it has no `code`", _HOW_TEMPLATE)
    return code.encode("utf-8", "replace").decode(), None  # JSON can hold halves of surrogate pairs


def _fault(cause: str, how: str) -> str:
    return f"[The call was not run: {cause}. Write {how}.]\n"
