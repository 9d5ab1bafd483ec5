r"""The reasoning of a trajectory as text, and that text as steps.

Pure functions that scan each text a constant number of times, so that a hostile megabyte costs milliseconds.
"""

import re
from collections.abc import Iterator
from typing import Literal, NamedTuple

Segmentation = Literal["paragraph", "sentence", "lcot2tree"]

_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")  # of DeepSeek's API, vLLM's server, Anthropic's API
_ANALYSIS = re.compile(r"<\|channel\|>analysis<\|message\|>(.*?)(?=<\|end\|>|<\|channel\|>|\Z)", re.DOTALL)

_DELIMITER = re.compile(r"```|~~~|\$\$|(?<!\\)\\\[|(?<!\\)\\\]|\\begin\{[a-zA-Z]+\*?\}|\\end\{[a-zA-Z]+\*?\}")
_PARAGRAPH_END = re.compile(r"\n\s*\n\s*")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|(?<=[.!?][\"'”’)\]*_])\s+|\n\s*")
_HEADING = re.compile(r"#{1,6} .*|\*\*[^*]+\*\*")
# Where LCoT2Tree (2505.22148) cuts: before any of these, as they are written here.
_LCOT2TREE_START = re.compile(
    "Alternatively|Wait, no|Hmm|But wait|Let me verify|let's verify|Or wait|To verify|Wait|Verify|Let's confirm"
    "|Let's check|Another example|But let's|No:|no:"
)


class TextSpan(NamedTuple):
    """A part of a completion: characters `start` to `end` of `completion[message][key]`."""

    message: int
    key: str
    start: int
    end: int


def reasoning_text(completion: list[dict]) -> str:
    """Return what the model thought: its reasoning blocks, or its whole response where it marked none.

    A block is a message's own reasoning field, the text between think tags, or the analysis channel of gpt-oss. A
    block that never closes runs to the end of its turn; one that was opened inside the prompt starts its turn.
    """
    spans = reasoning_spans(completion)
    blocks = ((completion[span.message].get(span.key) or "")[span.start : span.end].strip() for span in spans)
    return "\n\n".join(block for block in blocks if block).replace("’", "'")


def reasoning_spans(completion: list[dict]) -> list[TextSpan]:
    """Return where the text of `reasoning_text` stands, in order."""
    turns = [i for i, message in enumerate(completion) if message["role"] == "assistant"]
    marked = [_reasoning_block(i, completion[i]) for i in turns]
    if all(spans is None for spans in marked):
        return [TextSpan(i, "content", 0, len(completion[i].get("content") or "")) for i in turns]
    return [span for spans in marked for span in spans or ()]


def _reasoning_block(index: int, message: dict) -> list[TextSpan] | None:
    """The marked reasoning of one turn; None if nothing is marked, an empty span if a block is there and empty."""
    if key := next((key for key in _REASONING_KEYS if message.get(key)), None):
        return [TextSpan(index, key, 0, len(message[key]))]
    content = message.get("content") or ""
    closed, opened = content.rfind("</think>"), content.find("<think>")
    if closed >= 0 or opened >= 0:
        start = opened + len("<think>") if 0 <= opened < (closed if closed >= 0 else len(content)) else 0
        return [TextSpan(index, "content", start, closed if closed >= 0 else len(content))]
    analysis = [TextSpan(index, "content", *match.span(1)) for match in _ANALYSIS.finditer(content)]
    return analysis or None


def word_count(completion: list[dict]) -> int:
    """Return the number of words (by white space) of everything the assistant wrote, reasoning included."""
    total = 0
    for message in completion:
        if message["role"] == "assistant":
            total += len((message.get("content") or "").split())
            total += sum(len(message[key].split()) for key in _REASONING_KEYS if message.get(key))
    return total


def split_steps(text: str, segmentation: Segmentation = "paragraph", min_chars: int = 30) -> list[str]:
    """Cut reasoning into steps: the text of `step_spans`."""
    return [text[start:end] for start, end in step_spans(text, segmentation, min_chars)]


def step_spans(text: str, segmentation: Segmentation = "paragraph", min_chars: int = 30) -> list[tuple[int, int]]:
    """Return where the steps of a reasoning text start and end, without the white space around them.

    Args:
        text: what `reasoning_text` returned.
        segmentation: `paragraph` cuts at blank lines, `sentence` at the ends of sentences and lines, `lcot2tree`
            before the words of LCoT2Tree (2505.22148). None of them cuts inside a code fence or display math.
        min_chars: a shorter piece belongs to the step before it (a short first piece to the one after it);
            `lcot2tree` does not cut before the running step is longer than this. A line that only announces what
            follows ("Alternative plan:", a heading) belongs to the step after it, however long it is.

    Returns:
        Spans in order; none for an empty text.
    """
    if segmentation == "lcot2tree":
        marks = [match.start() for match in _LCOT2TREE_START.finditer(text)]
    else:
        ends = _PARAGRAPH_END if segmentation == "paragraph" else _SENTENCE_END
        marks = [match.end() for match in ends.finditer(text)]
    cuts = _outside(marks, _atomic_spans(text))
    if segmentation == "lcot2tree":
        far: list[int] = []
        for cut in cuts:
            if cut - (far[-1] if far else 0) > min_chars:
                far.append(cut)
        return list(_pieces(text, far))
    steps: list[tuple[int, int]] = []
    announced = False  # the last step is so far only the line that announces it
    for start, end in _pieces(text, cuts):
        announces = _announces(text[start:end])
        short = bool(steps) and not announces and min(end - start, steps[-1][1] - steps[-1][0]) < min_chars
        if announced or short:
            steps[-1] = (steps[-1][0], end)
        else:
            steps.append((start, end))
        announced = announces
    if announced and len(steps) > 1 and steps[-1][1] - steps[-1][0] < min_chars:  # nothing follows it
        steps[-2:] = [(steps[-2][0], steps[-1][1])]
    return steps


def _announces(piece: str) -> bool:
    """Whether a piece is one line that only says what comes next."""
    return "\n" not in piece and (piece.endswith((":", ":**")) or _HEADING.fullmatch(piece) is not None)


def _pieces(text: str, cuts: list[int]) -> Iterator[tuple[int, int]]:
    """Spans between the cuts without the white space around them; empty ones left out."""
    for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True):
        while start < end and text[end - 1].isspace():
            end -= 1
        while start < end and text[start].isspace():
            start += 1
        if start < end:
            yield start, end


def _atomic_spans(text: str) -> list[tuple[int, int]]:
    """Code fences and display math that close: (start, end), in order, not nested."""
    tokens = [(match.start(), match.end(), match[0]) for match in _DELIMITER.finditer(text)]
    last = {token: start for start, _, token in tokens}
    spans: list[tuple[int, int]] = []
    closer, opened = None, 0
    for start, end, token in tokens:
        if closer is None:
            wanted = _closer(token)
            if wanted is not None and last.get(wanted, -1) > start:
                closer, opened = wanted, start
        elif token == closer:
            spans.append((opened, end))
            closer = None
    return spans


def _closer(token: str) -> str | None:
    if token.startswith("\\begin"):
        return token.replace("\\begin", "\\end", 1)
    return {"```": "```", "~~~": "~~~", "$$": "$$", "\\[": "\\]"}.get(token)


def _outside(marks: list[int], spans: list[tuple[int, int]]) -> list[int]:
    """The marks that lie in no span; both come in order."""
    kept, span = [], 0
    for mark in marks:
        while span < len(spans) and spans[span][1] <= mark:
            span += 1
        if span == len(spans) or mark <= spans[span][0]:
            kept.append(mark)
    return kept
